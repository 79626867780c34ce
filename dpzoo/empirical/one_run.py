"""`dpzoo.audit_run`: a lower bound on epsilon from what one training run released."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpzoo.accounting import Comparison, History, compare
from dpzoo.auditing.report import AuditFailedError
from dpzoo.empirical.bounds import (
    epsilon_lower_bound,
    gaussian_lower_bound,
    independent_lower_bound,
)
from dpzoo.empirical.canaries import Canaries
from dpzoo.empirical.gradient_canaries import GradientCanaries
from dpzoo.errors import InputError

PARTS = (16, 8, 4, 2)
"""One in so many coins is guessed: fixed before they are known, as the theorems ask."""

ASSUMES = {
    "any mechanism": "nothing",
    "Gaussian curve": "the trade-off curve of a Gaussian mechanism",
    "independent canaries": "that curve, and canaries that do not disturb one another",
}
"""Name of a bound -> what it assumes."""


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon.

    Args:
        name: one of `ASSUMES`.
        epsilon: the bound.
        score: the name of the scores that gave it.
        guesses: how many coins were guessed; 0 where a threshold was tested instead.
        correct: how many guesses are right.
    """

    name: str
    epsilon: float
    score: str = ""
    guesses: int = 0
    correct: int = 0

    def __str__(self) -> str:
        how = (
            f"{self.correct} of {self.guesses} guesses right" if self.guesses else "by a threshold"
        )
        of = f' (by "{self.score}", {how})' if self.epsilon > 0 else ""
        return f"epsilon is at least {self.epsilon:.3f}{of}, assuming {ASSUMES[self.name]}"


@dataclass
class RunReport:
    """The outcome of `dpzoo.audit_run`; ``print(report)`` gives the text.

    Args:
        canaries: how many there were.
        included: how many of them were trained on.
        delta: of the claim and the bounds.
        confidence: that all bounds hold together.
        epsilon: the claim, by an accountant; None if there is none.
        bounds: one for each kind.
        accountants: epsilon by several accountants, where a history was given.
        scores: name -> the canaries' scores.
        coins: (canaries,), True for those that were trained on.
    """

    canaries: int
    included: int
    delta: float
    confidence: float
    epsilon: float | None
    bounds: list[Bound]
    accountants: Comparison | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    coins: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), repr=False)

    @property
    def largest(self) -> Bound:
        """The bound that `ok` goes by."""
        return max(self.bounds, key=lambda bound: bound.epsilon)

    @property
    def epsilon_lower(self) -> float:
        """The largest of the bounds."""
        return self.largest.epsilon

    @property
    def ok(self) -> bool:
        """Whether no bound is above the claim. It is no proof that the claim is right."""
        return self.epsilon is None or self.epsilon_lower <= self.epsilon

    def __getitem__(self, name: str) -> Bound:
        for bound in self.bounds:
            if bound.name == name:
                return bound
        raise KeyError(f"{name!r}; bounds: {', '.join(b.name for b in self.bounds)}")

    def raise_if_failed(self) -> None:
        """Raise if a bound is above the claim.

        Raises:
            AuditFailedError: with the report as its ``report``.
        """
        if not self.ok:
            raise AuditFailedError(str(self), self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, without scores and coins."""
        return {
            "ok": self.ok,
            "canaries": self.canaries,
            "included": self.included,
            "delta": self.delta,
            "confidence": self.confidence,
            "epsilon": self.epsilon,
            "epsilon_lower": self.epsilon_lower,
            "bounds": [{**asdict(b), "assumes": ASSUMES[b.name]} for b in self.bounds],
            "accountants": None if self.accountants is None else self.accountants.to_dict(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        plain = self.to_dict()
        if plain["epsilon"] == math.inf:
            plain["epsilon"] = None
        return json.dumps(plain, indent=indent)

    def plot(self, path: str | Path) -> None:
        """Draw the canaries' scores, in and out, and the bounds beside the claim; needs matplotlib.

        Args:
            path: of the picture; its ending says the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * (len(self.scores) + 1), 3.2), layout="constrained")
        *panels, last = figure.subplots(1, len(self.scores) + 1)
        for panel, (name, scores) in zip(panels, self.scores.items(), strict=True):
            edges = np.histogram_bin_edges(scores, 30)
            for coin, label in ((False, "out"), (True, "in")):
                panel.hist(scores[self.coins == coin], edges, alpha=0.6, label=label)
            panel.set_xlabel(f"score: {name}")
            panel.set_ylabel("canaries")
            panel.legend()
        last.barh([b.name for b in self.bounds], [b.epsilon for b in self.bounds])
        if self.epsilon is not None and self.epsilon < math.inf:
            last.axvline(self.epsilon, color="black", linestyle="--", label="accounted")
            last.legend()
        last.set_xlabel(f"epsilon at delta {self.delta:.3g}, at least")
        figure.savefig(path, dpi=130)

    def __str__(self) -> str:
        verdict = (
            "no bound is above the claim" if self.ok else "FAILED: epsilon is not what is claimed"
        )
        claim = "none" if self.epsilon is None else f"epsilon {self.epsilon:.3f}"
        lines = [
            f"audit of a run: {verdict}",
            f"  {self.canaries} canaries, {self.included} of them trained on",
            f"  claim: {claim}, delta {self.delta:.3g}",
            f"  with {self.confidence:.0%} confidence:",
            *(f"    {bound}" for bound in self.bounds),
        ]
        if self.accountants is not None:
            lines += [f"  {line}" for line in str(self.accountants).splitlines()]
        return "\n".join(lines)


def audit_run(
    canaries: Canaries | GradientCanaries,
    scores: Any,
    *,
    delta: float,
    epsilon: float | None = None,
    history: History | None = None,
    confidence: float = 0.95,
    independent: bool = False,
) -> RunReport:
    """Bound epsilon from below, by how well the canaries that were trained on can be told from the others.

    The highest scores are guessed to be in, or the highest to be in and as many of the lowest to be out,
    for one in 16, 8, 4 and 2 of the canaries. Every score, rule and bound is a test of its own, and the
    allowed error is divided among them, so that all bounds hold together.

    Args:
        canaries: as they were mixed into the training data.
        scores: (canaries,), larger for canaries that seem to be in; or name -> such scores.
        delta: of the bounds and of the claim.
        epsilon: the claim to test; by default, that of ``history`` by PRV.
        history: (noise multiplier, sample rate, steps) that the accountant wrote down.
        confidence: that no bound is above the true epsilon; above 0.5 and below 1.
        independent: whether canaries do not disturb one another, as where their gradients are orthogonal.
            It adds a bound that is several times sharper.

    Returns:
        The report. A bound far below the claim says little: few canaries, weak scores, or a loose claim.

    Raises:
        InputError: scores of another number, or that are not finite; a delta or confidence out of range.

    Guarantees:
        If the training is (epsilon, delta)-private for adding or removing a canary, the bound "any
        mechanism" is above epsilon with a chance of at most 1 - ``confidence``, however the scores were
        made from what the training released.

    Source: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846); Mahloujifar, Melis, Chaudhuri 2024 (arXiv
    2410.22235); Nasr et al. 2023 (arXiv 2302.07956).
    """
    named = _checked(canaries, scores, delta, confidence)
    accountants = None if history is None else compare(history, delta)
    if epsilon is None and accountants is not None:
        epsilon = accountants.epsilons.get("prv", max(accountants.epsilons.values(), default=None))
    names = list(ASSUMES)[: 3 if independent else 2]
    share = (1 - confidence) / len(names)  # of each kind of bound in the allowed error
    guessed = sorted(_guesses(canaries.coins, named), key=lambda g: -g[2] / g[1])
    bounds = []
    for name, bound in zip(names, (epsilon_lower_bound, gaussian_lower_bound), strict=False):
        best = Bound(name, 0.0)
        for score, count, right in guessed:
            found = bound(
                len(canaries),
                count,
                right,
                delta=delta,
                significance=share / len(guessed),
                at_least=best.epsilon,
            )
            if found > best.epsilon:
                best = Bound(name, found, score, count, right)
        bounds.append(best)
    if independent:
        tests = [
            Bound(
                names[2],
                independent_lower_bound(
                    values, canaries.coins, delta=delta, significance=share / len(named)
                ),
                score,
            )
            for score, values in named.items()
        ]
        bounds.append(max(tests, key=lambda bound: bound.epsilon))
    return RunReport(
        canaries=len(canaries),
        included=int(canaries.coins.sum()),
        delta=delta,
        confidence=confidence,
        epsilon=epsilon,
        bounds=bounds,
        accountants=accountants,
        scores=named,
        coins=canaries.coins,
    )


def _guesses(coins: np.ndarray, scores: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int, int]]:
    """(name of the scores, how many coins are guessed, how many rightly), for every rule."""
    for name, values in scores.items():
        order = np.argsort(values, kind="stable")
        for count in sorted({max(2, len(coins) // part) for part in PARTS}):
            for out in (0, count // 2):
                right = int(coins[order[len(coins) - (count - out) :]].sum())
                right += int((~coins[order[:out]]).sum())
                yield name, count, right


def _checked(
    canaries: Canaries | GradientCanaries, scores: Any, delta: float, confidence: float
) -> dict[str, np.ndarray]:
    named = scores if isinstance(scores, Mapping) else {"score": scores}
    arrays = {str(name): np.asarray(values, dtype=np.float64) for name, values in named.items()}
    for name, values in arrays.items():
        if values.shape != (len(canaries),) or not np.isfinite(values).all():
            raise InputError(
                f"audit_run got scores {name!r} of shape {values.shape}, of which "
                f"{int((~np.isfinite(values)).sum())} are not finite; wanted a finite number for each of "
                f"the {len(canaries)} canaries, trained on or not, in their order."
            )
    if not arrays:
        raise InputError("audit_run got no scores, wanted at least one array of them.")
    if not 0 < delta < 1:
        raise InputError(f"audit_run got delta={delta!r}, wanted a number between 0 and 1.")
    if not 0.5 < confidence < 1:
        raise InputError(f"audit_run got confidence={confidence!r}, wanted one above 0.5, below 1.")
    return arrays
