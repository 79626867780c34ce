"""The statistics of one-run audits: against simulation, and against jax_privacy's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

from dpzoo.empirical.bounds import (
    epsilon_lower_bound,
    gaussian_epsilon,
    gaussian_lower_bound,
    gaussian_mu,
    guessing_p_value,
    independent_lower_bound,
)

RECORD = json.loads((Path(__file__).parent / "jax_privacy.json").read_text())


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda c: f"{c['canaries']}-{c['guesses']}")
def test_bounds_are_those_of_jax_privacy(case: dict) -> None:
    """`record_jax_privacy.py` made the record, from scores and thresholds, with a tight root search."""
    m, r, v = case["canaries"], case["guesses"], case["correct"]
    for bound, name in ((epsilon_lower_bound, "one_run"), (gaussian_lower_bound, "one_run_fdp")):
        ours = bound(m, r, v, delta=case["delta"], significance=case["significance"])
        assert ours == pytest.approx(case[name], abs=1e-9), name


def test_with_delta_0_the_p_value_is_a_binomial_tail() -> None:
    got = guessing_p_value(1.0, 0.0, 100, 40, 35)
    assert got == pytest.approx(binom.sf(34, 40, 1 / (1 + np.exp(-1.0))), rel=1e-12)
    assert guessing_p_value(1.0, 1e-3, 100, 40, 35) > got
    assert guessing_p_value(1.0, 1e-3, 100, 40, 0) == 1.0


def test_a_bound_is_where_the_p_value_is_the_significance() -> None:
    epsilon = epsilon_lower_bound(500, 100, 90, delta=1e-5, significance=0.05)
    assert guessing_p_value(epsilon, 1e-5, 500, 100, 90) == pytest.approx(0.05, rel=1e-6)
    assert epsilon_lower_bound(500, 100, 50, delta=1e-5) == 0
    assert epsilon_lower_bound(500, 100, 90, delta=1e-5, at_least=5.0) == 5.0
    assert gaussian_lower_bound(500, 100, 90, delta=1e-5, at_least=9.0) == 9.0


def test_the_gaussian_mechanisms_epsilon() -> None:
    for mu in (0.1, 0.7, 2.0, 6.0):
        epsilon = gaussian_epsilon(mu, 1e-5)
        delta = norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-5, rel=1e-6)
        assert gaussian_mu(epsilon, 1e-5) == pytest.approx(mu, abs=1e-9)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


def test_bounds_of_a_gaussian_mechanism_are_below_its_epsilon_and_grow_with_its_mu() -> None:
    rng = np.random.default_rng(0)
    last = 0.0
    for mu in (0.0, 1.0, 2.0):
        above = []
        for _ in range(20):
            coins = rng.random(400) < 0.5
            scores = rng.normal(size=400) + mu * coins
            found = independent_lower_bound(scores, coins, delta=1e-5, significance=0.05)
            above.append(found)
        true = gaussian_epsilon(mu, 1e-5)
        assert sum(bound > true + 1e-9 for bound in above) <= 3, (mu, above)
        if mu:
            assert np.median(above) > max(last, true / 4), (mu, above)
        last = float(np.median(above))
