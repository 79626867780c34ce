"""Epsilon by several accountants side by side."""

import math
import sys
import types
from typing import Any

import pytest

from dpzoo import accounting
from dpzoo.accounting import AccountantsDisagree, compare, epsilon_of
from dpzoo.errors import InputError

HISTORY = [(1.2, 0.02, 60), (2.0, 0.02, 20)]


def test_prv_and_rdp_stand_side_by_side_and_rdp_is_looser(recwarn: Any) -> None:
    found = compare(HISTORY, 1e-5)
    assert found.epsilons["prv"] == epsilon_of("prv", tuple(HISTORY), 1e-5)
    assert found.epsilons["rdp"] > 1.02 * found.epsilons["prv"]
    assert not found.warning
    assert not [w for w in recwarn if w.category is AccountantsDisagree]
    assert "prv" in str(found)
    assert found.to_dict()["delta"] == 1e-5


def test_pld_agrees_where_it_is_installed() -> None:
    pytest.importorskip("dp_accounting")
    found = compare(HISTORY, 1e-5)
    assert found.difference is not None
    assert found.difference < 0.02
    assert not found.warning


@pytest.mark.parametrize(
    ("epsilons", "message"),
    [
        (
            {"prv": 2.0, "rdp": 3.0, "pld": 2.1},
            "PRV gives epsilon 2.0000 and PLD 2.1000, 5.0% apart",
        ),
        ({"prv": 2.0, "rdp": 1.5, "pld": 2.0}, "RDP gives epsilon 1.5000"),
        ({"prv": 2.0, "rdp": 2.5, "pld": 2.03}, ""),
        ({"prv": 0.015, "rdp": 0.1, "pld": 0.005}, ""),  # PRV's own error, and no disagreement
    ],
)
def test_the_warning_is_about_what_cannot_be_right(
    epsilons: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    spec = types.ModuleType("dp_accounting")
    spec.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "dp_accounting", spec)
    monkeypatch.setattr(accounting, "epsilon_of", lambda name, *_: epsilons[name])
    found = compare(HISTORY, 1e-5)
    warned = [str(w.message) for w in recwarn if w.category is AccountantsDisagree]
    if message:
        assert message in found.warning
        assert warned == [found.warning]
    else:
        assert not found.warning
        assert not warned


def test_an_accountant_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, *_: Any) -> float:
        if name == "prv":
            raise MemoryError("too fine a grid")
        return 2.0

    monkeypatch.setattr(accounting, "epsilon_of", fails)
    found = compare(HISTORY, 1e-5)
    assert found.missing["prv"] == "MemoryError: too fine a grid"
    assert "prv" not in found.epsilons
    assert "prv  none: MemoryError" in str(found)


def test_no_noise_and_no_steps() -> None:
    assert compare([(0.0, 0.1, 5)], 1e-5).epsilons == {"prv": math.inf, "rdp": math.inf}
    assert compare([], 1e-5).epsilons == {"prv": 0.0, "rdp": 0.0}


@pytest.mark.parametrize(
    ("history", "delta", "message"),
    [
        (HISTORY, 0.0, "delta=0.0"),
        ([(1.0, 2.0, 3)], 1e-5, r"\(1.0, 2.0, 3\)"),
        ([(1.0, 0.5)], 1e-5, "noise multiplier, sample rate, steps"),
    ],
)
def test_what_is_no_history_is_refused(history: Any, delta: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(history, delta)
