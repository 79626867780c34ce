"""How large epsilon must be, given how many coins were guessed right: the statistics of one-run audits.

Each of m canaries was in the training data with probability 1/2, independently. From what the training
released, r coins were guessed, and v of the guesses are right. r must be fixed before the coins are known.
Both functions give the largest epsilon that such a result refutes at a significance level.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtrc, betaincinv, expit, log_ndtr, ndtr, ndtri

TOLERANCE = 1e-12


def guessing_p_value(
    epsilon: float, delta: float, canaries: int, guesses: int, correct: int
) -> float:
    """The chance of that many right guesses, or an upper bound on it, if (epsilon, delta) holds.

    Args:
        epsilon: 0 or more.
        delta: from 0 to 1.
        canaries: m.
        guesses: r, at most m.
        correct: v, at most r.

    Source: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2.
    """
    right = expit(epsilon)
    beta = float(_at_least(np.array(correct), guesses, right))
    if delta == 0 or correct == 0:
        return beta
    fewer = np.arange(1, correct + 1)
    slack = float(np.max((_at_least(correct - fewer, guesses, right) - beta) / fewer))
    return min(1.0, beta + 2 * canaries * delta * max(slack, 0.0))


def epsilon_lower_bound(
    canaries: int,
    guesses: int,
    correct: int,
    *,
    delta: float,
    significance: float = 0.05,
    at_least: float = 0.0,
) -> float:
    """The largest epsilon for which (epsilon, delta) is refuted; it assumes nothing else.

    Args:
        canaries: m.
        guesses: r, at most m.
        correct: v, at most r.
        delta: above 0 and below 1, or 0.
        significance: the chance of refuting what is true.
        at_least: returned where the bound is below it.

    Source: as `guessing_p_value`.
    """

    def refuted_by(epsilon: float) -> float:
        return significance - guessing_p_value(epsilon, delta, canaries, guesses, correct)

    return _last_positive(refuted_by, at_least)


def gaussian_lower_bound(
    canaries: int,
    guesses: int,
    correct: int,
    *,
    delta: float,
    significance: float = 0.05,
    at_least: float = 0.0,
) -> float:
    """The largest epsilon for which the Gaussian mechanism with (epsilon, delta) is refuted.

    It is the sharper bound. It refutes a trade-off curve: that of one Gaussian mechanism. Many steps of
    DP-SGD together come close to it, and few give less away where an audit looks, at rates above 1 / m.

    Args:
        canaries: m.
        guesses: r, at most m.
        correct: v, at most r.
        delta: above 0 and below 1.
        significance: the chance of refuting what is true.
        at_least: returned where the bound is below it.

    Source: Mahloujifar, Melis, Chaudhuri 2024 (arXiv 2410.22235), Algorithm 3, for two secrets.
    """

    def refuted_by(mu: float) -> float:
        right = significance * correct / canaries
        wrong = significance * (guesses - correct) / canaries
        for i in range(correct - 1, -1, -1):
            more = max(wrong, float(ndtr(ndtri(right) - mu)))
            if more == wrong:  # and stays so
                break
            right, wrong = min(1.0, right + i / (guesses - i) * (more - wrong)), more
        return right + wrong - guesses / canaries

    floor = gaussian_mu(at_least, delta)
    mu = _last_positive(refuted_by, floor)
    return at_least if mu == floor else gaussian_epsilon(mu, delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at ``delta`` of the Gaussian mechanism whose sensitivity is ``mu`` standard deviations.

    Source: Dong, Roth, Su 2019 (arXiv 1905.02383), Corollary 2.13.
    """
    return 0.0 if mu == 0 else _last_positive(lambda e: _log_delta(e, mu) - math.log(delta), 0.0)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu for which `gaussian_epsilon` is ``epsilon``."""
    return _last_positive(lambda mu: math.log(delta) - _log_delta(epsilon, mu), 0.0)


def _log_delta(epsilon: float, mu: float) -> float:
    """Log of the delta of a mu-Gaussian mechanism at epsilon."""
    if mu == 0:
        return -math.inf
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log1p(-math.exp(second - first)) if second < first else -math.inf


def _at_least(successes: np.ndarray, trials: int, chance: float) -> np.ndarray:
    """P[Binomial(trials, chance) >= successes]."""
    above = bdtrc(np.maximum(successes - 1, 0).astype(float), trials, chance)
    return np.where(successes <= 0, 1.0, above)


def _last_positive(objective: Callable[[float], float], start: float) -> float:
    """Where a decreasing objective becomes negative; ``start`` if it does not begin above 0."""
    if objective(start) <= 0:
        return start
    low, high = start, max(1.0, 2 * start)
    while objective(high) > 0:
        low, high = high, 2 * high
    root: float = brentq(objective, low, high, xtol=TOLERANCE)
    return root


def independent_lower_bound(
    scores: np.ndarray, coins: np.ndarray, *, delta: float, significance: float = 0.05
) -> float:
    """As `gaussian_lower_bound`, for canaries that do not disturb one another: several times sharper.

    The canaries of even index choose a threshold; the others count how often a canary that was in is below
    it, and one that was out above. It assumes that scores are independent, given the coins, as those of
    orthogonal gradients are.

    Args:
        scores: (m,), larger for canaries that were in.
        coins: (m,) of bool.
        delta: above 0 and below 1.
        significance: the chance of refuting what is true.

    Source: Nasr et al. 2023 (arXiv 2302.07956), section 4, with Clopper and Pearson's intervals.
    """
    chosen = np.arange(len(scores)) % 2 == 0
    mus = _separation(scores[chosen], coins[chosen], np.unique(scores[chosen]), significance)
    threshold = np.unique(scores[chosen])[np.argmax(mus)]
    (mu,) = _separation(scores[~chosen], coins[~chosen], np.array([threshold]), significance)
    return gaussian_epsilon(max(0.0, float(mu)), delta)


def _separation(
    scores: np.ndarray, coins: np.ndarray, thresholds: np.ndarray, significance: float
) -> np.ndarray:
    """A lower bound on mu at each threshold."""
    present, absent = np.sort(scores[coins]), np.sort(scores[~coins])
    missed = _rate_above(np.searchsorted(present, thresholds), len(present), significance / 2)
    alarms = len(absent) - np.searchsorted(absent, thresholds)
    return -ndtri(_rate_above(alarms, len(absent), significance / 2)) - ndtri(missed)


def _rate_above(events: np.ndarray, trials: int, significance: float) -> np.ndarray:
    """Clopper and Pearson's upper bound on a rate, from a number of events."""
    inside = np.minimum(events, max(trials - 1, 0))
    return np.where(
        events < trials,
        betaincinv(inside + 1, np.maximum(trials - inside, 1), 1 - significance),
        1.0,
    )
