"""Epsilon of what was spent, by several accountants side by side."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from opacus.accountants import create_accountant

from dpzoo.errors import InputError

History = Iterable[tuple[float, float, int]]
"""(noise multiplier, sample rate, steps), as Opacus' accountants keep them."""

TIGHT = ("prv", "pld")
"""Accountants whose epsilon is exact but for a discretisation, so that they have to agree."""

RELATIVE, ABSOLUTE = 0.02, 0.015
"""How far tight accountants may be apart: 2 %, and a little more than the 0.01 that Opacus' PRV adds."""


class AccountantsDisagree(UserWarning):
    """Two accountants give epsilons that cannot both be right."""


# An accountant may take a second for its answer, and it is asked at every log and checkpoint.
@functools.lru_cache(maxsize=1024)
def epsilon_of(
    mechanism: str, history: tuple[tuple[float, float, int], ...], delta: float
) -> float:
    """Epsilon of a history at ``delta``: by one of Opacus' accountants, or "pld" by dp_accounting.

    Raises:
        ImportError: "pld" without the dp-accounting package.
    """
    if mechanism == "pld":
        return _pld(history, delta)
    accountant = create_accountant(mechanism)
    accountant.history = list(history)
    return max(0.0, float(accountant.get_epsilon(delta)))  # a bound may be below 0: much noise


def _pld(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    import dp_accounting

    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    for noise, rate, steps in history:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


@dataclass(frozen=True)
class Comparison:
    """Epsilon of one history by several accountants; ``print`` gives a line for each.

    Args:
        delta: the delta of all.
        epsilons: accountant -> epsilon. "rdp" is an upper bound and looser than "prv" and "pld".
        missing: accountant -> why it gave none.
        difference: the relative difference of the tight accountants' epsilons, "prv" and "pld"; None where
            only one answered.
        warning: what is wrong with the epsilons; empty if nothing is.
    """

    delta: float
    epsilons: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    warning: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"epsilon at delta {self.delta:.3g}"]
        lines += [f"  {name}  {epsilon:.4f}" for name, epsilon in self.epsilons.items()]
        lines += [f"  {name}  none: {why}" for name, why in self.missing.items()]
        if self.difference is not None:
            lines.append(f"  prv and pld differ by {self.difference:.2%}")
        return "\n".join([*lines, *([f"  {self.warning}"] if self.warning else [])])


def compare(history: History, delta: float) -> Comparison:
    """Epsilon of a history by Opacus' PRV and RDP, and, where it is installed, by dp_accounting's PLD.

    Args:
        history: (noise multiplier, sample rate, steps): `privacy_engine.accountant.history`.
        delta: above 0 and below 1.

    Returns:
        The epsilons and how far PRV and PLD are apart: one implementation finds the other's errors. RDP is
        normally the largest, and gives no warning for that.

    Raises:
        InputError: an entry that is no (noise multiplier, sample rate, steps); a delta out of range.

    Warns:
        AccountantsDisagree: PRV and PLD differ by more than 2 % and 0.015; or RDP, an upper bound, is below
            one of them by as much.
    """
    entries = _checked(history, delta)
    if not entries or any(noise == 0 for noise, _, _ in entries):
        return Comparison(delta, dict.fromkeys(("prv", "rdp"), math.inf if entries else 0.0))
    epsilons: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in ("prv", "rdp", "pld"):
        if name == "pld" and importlib.util.find_spec("dp_accounting") is None:
            missing[name] = "dp-accounting is not installed"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # RDP's remark about its orders
                epsilons[name] = epsilon_of(name, entries, delta)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    tight = [epsilons[name] for name in TIGHT if name in epsilons]
    difference = abs(tight[0] - tight[1]) / max(min(tight), 1e-12) if len(tight) == 2 else None
    warning = ""
    if len(tight) == 2 and _apart(min(tight), max(tight)):
        warning = (
            f"PRV gives epsilon {epsilons['prv']:.4f} and PLD {epsilons['pld']:.4f}, {difference:.1%} "
            f"apart: more than 2 % and {ABSOLUTE}, which their arithmetic allows. State the larger."
        )
    elif "rdp" in epsilons and tight and _apart(epsilons["rdp"], max(tight)):
        warning = (
            f"RDP gives epsilon {epsilons['rdp']:.4f} and a tight accountant {max(tight):.4f}: an upper "
            f"bound cannot be the smaller one. State the larger."
        )
    if warning:
        warnings.warn(warning, AccountantsDisagree, stacklevel=2)
    return Comparison(delta, epsilons, missing, difference, warning)


def _apart(low: float, high: float) -> bool:
    return high > low * (1 + RELATIVE) + ABSOLUTE


def _checked(history: History, delta: float) -> tuple[tuple[float, float, int], ...]:
    if not 0 < delta < 1:
        raise InputError(f"compare got delta={delta!r}, wanted a number between 0 and 1.")
    entries = []
    for entry in history:
        noise, rate, steps = entry if len(entry) == 3 else (-1, -1, -1)
        if not (noise >= 0 and 0 < rate <= 1 and steps >= 0):
            raise InputError(
                f"compare got {entry!r} in the history, wanted (noise multiplier, sample rate, steps), as "
                f"privacy_engine.accountant.history has them."
            )
        if steps:
            entries.append((float(noise), float(rate), int(steps)))
    return tuple(entries)
