"""Clipping rules: how much of a row's gradient enters the sum. A new rule is one class.

``make_private(clipping="flat")`` names one of `RULES`; in mode "bk" an instance will do as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from dpzoo.errors import InputError

Parameters = list[torch.Tensor]
Squared = dict[torch.Tensor, torch.Tensor]
Factors = dict[torch.Tensor | None, torch.Tensor]
"""Clip factors of the rows, (rows,), under None; or those of each parameter."""


class ClippingRule:
    """How rows are clipped, and what is released besides their sum.

    Guarantees:
        Of every rule: a row's factors depend on that row alone, and bring its share of the sum to a norm of
        at most the clipping norm C.
    """

    name: ClassVar[str]
    one_process: ClassVar[bool] = False
    """Whether what it counts is of one process alone."""

    def start(self, parameters: Parameters, clip: Any, sigma: float, expected: int | None) -> float:
        """Get ready for an optimizer; C, from what the user gave.

        Args:
            parameters: the optimizer's.
            clip: ``max_grad_norm``.
            sigma: ``noise_multiplier``.
            expected: rows of a batch.

        Raises:
            InputError: the rule cannot go with one of the arguments.
        """
        norm: float = clip
        return norm

    def factors(self, clip: float, squared: Squared, norms: torch.Tensor) -> Factors:
        """Clip factors of a backward pass's rows.

        Args:
            clip: C.
            squared: parameter -> squared norms of the rows, (rows,).
            norms: norms of the rows over all parameters, (rows,).
        """
        raise NotImplementedError

    def gradient_noise(self, noise_multiplier: float) -> float:
        """The gradients' noise in units of C, where the whole step is to cost ``noise_multiplier``."""
        return noise_multiplier

    def counts(self) -> list[torch.Tensor]:
        """Sums over the step's rows that are released with the gradients', float64; none by default."""
        return []

    count_std: float = 0.0
    """Standard deviation of the noise of the counts."""

    def next_norm(self, clip: float, counts: list[torch.Tensor], expected: int | None) -> float:
        """C of the next step, from this step's, the noised counts, and the expected rows of a batch."""
        return clip

    def forget(self) -> None:
        """The sums were released or dropped: count from 0."""


def capped(clip: float, norms: torch.Tensor) -> torch.Tensor:
    """Opacus' clip factor: min(1, C / (norm + 1e-6))."""
    return (clip / (norms + 1e-6)).clamp(max=1.0)


@dataclass
class Flat(ClippingRule):
    """min(1, C / (norm + 1e-6)), of the whole gradient."""

    name = "flat"

    def factors(self, clip: float, squared: Squared, norms: torch.Tensor) -> Factors:
        return {None: capped(clip, norms)}


@dataclass
class Automatic(ClippingRule):
    """C / (norm + gamma): every row is brought to (almost) norm C (Bu et al. 2022, arXiv 2206.07136)."""

    gamma: float = 0.01
    name = "automatic"

    def start(self, parameters: Parameters, clip: Any, sigma: float, expected: int | None) -> float:
        if not 0 < self.gamma < math.inf:
            raise InputError(
                f"clipping='automatic' got gamma={self.gamma!r}, wanted a number above 0: rows would be "
                f"brought to a norm above max_grad_norm. 0.01 is usual."
            )
        return super().start(parameters, clip, sigma, expected)

    def factors(self, clip: float, squared: Squared, norms: torch.Tensor) -> Factors:
        return {None: clip / (norms + self.gamma)}


class PerLayer(ClippingRule):
    """As `Flat`, of each parameter by itself; ``max_grad_norm`` is a list, one number for each."""

    name = "per_layer"

    def start(self, parameters: Parameters, clip: Any, sigma: float, expected: int | None) -> float:
        if not isinstance(clip, (list, tuple)) or len(clip) != len(parameters):
            raise InputError(
                f"clipping='per_layer' got max_grad_norm={clip!r}, wanted a list of "
                f"{len(parameters)} numbers, one for each parameter of the optimizer."
            )
        norms = torch.tensor(clip, dtype=torch.float64)
        total = float(norms.norm())
        self._shares = dict(zip(parameters, (norms / total).tolist(), strict=True))
        return total

    def factors(self, clip: float, squared: Squared, norms: torch.Tensor) -> Factors:
        return {p: capped(self._shares[p] * clip, values.sqrt()) for p, values in squared.items()}


@dataclass
class Adaptive(Flat):
    """As `Flat`, with a clipping norm that moves towards a quantile of the rows' norms, privately.

    After each logical step, with b the noised share of the rows that were not clipped,
    ``C <- C exp(-clipbound_learning_rate (b - target_unclipped_quantile))``, kept between
    ``min_clipbound`` and ``max_clipbound`` (Andrew et al. 2021, arXiv 1905.03871). The arguments are
    those of Opacus' ``clipping="adaptive"``. The share is of the expected batch size: the size of a
    Poisson batch is itself private, and may be 0.

    What is released is not the count of rows that were not clipped, but the sum of +1/2 for each of them
    and -1/2 for each that was clipped. A row moves that by 1/2, as the theorem assumes; it would move the
    count by 1.

    Args:
        target_unclipped_quantile: the share of rows that should not be clipped, 0 to 1.
        clipbound_learning_rate: how fast C moves.
        max_clipbound: the largest C.
        min_clipbound: the smallest C.
        unclipped_num_std: standard deviation of the noise on the count of rows not clipped.

    Raises:
        InputError: there is no expected batch size; ``min_clipbound`` is not below ``max_clipbound``;
            ``noise_multiplier`` is not below ``2 unclipped_num_std``, so that the count alone would
            spend more than it.

    Guarantees:
        A step is as private as one Gaussian mechanism with ``noise_multiplier``: the gradients' noise
        is raised to ``(sigma^-2 - (2 unclipped_num_std)^-2)^(-1/2)`` (theorem 1 of the paper).
    """

    target_unclipped_quantile: float
    clipbound_learning_rate: float
    max_clipbound: float
    min_clipbound: float
    unclipped_num_std: float
    name = "adaptive"
    one_process = True

    def start(self, parameters: Parameters, clip: Any, sigma: float, expected: int | None) -> float:
        if not self.min_clipbound < self.max_clipbound:
            raise InputError(
                f"clipping='adaptive' got min_clipbound={self.min_clipbound} and "
                f"max_clipbound={self.max_clipbound}, wanted the first to be the smaller."
            )
        if sigma >= 2 * self.unclipped_num_std:
            raise InputError(
                f"clipping='adaptive' got noise_multiplier={sigma} and "
                f"unclipped_num_std={self.unclipped_num_std}, wanted less than twice the second: the count "
                f"of rows that were not clipped would cost more than the whole step may. Raise "
                f"unclipped_num_std (a tenth of the batch size is usual)."
            )
        if not expected:
            raise InputError(
                "clipping='adaptive' got expected_batch_size=None, wanted the expected rows of a batch: "
                "the share of rows that were not clipped is of it."
            )
        self.halves, self.count_std = 0.0, self.unclipped_num_std
        return super().start(parameters, clip, sigma, expected)

    def factors(self, clip: float, squared: Squared, norms: torch.Tensor) -> Factors:
        factors = super().factors(clip, squared, norms)
        self.halves += float((factors[None] >= 1).double().sum()) - len(norms) / 2
        return factors

    def gradient_noise(self, noise_multiplier: float) -> float:
        """The gradients' part of the noise; the count has the rest of the privacy."""
        if not noise_multiplier:
            return 0.0
        return float((noise_multiplier**-2 - (2 * self.unclipped_num_std) ** -2) ** -0.5)

    def counts(self) -> list[torch.Tensor]:
        return [torch.tensor([self.halves], dtype=torch.float64)]

    def next_norm(self, clip: float, counts: list[torch.Tensor], expected: int | None) -> float:
        if not expected:
            return clip
        share = float(counts[0]) / expected + 0.5
        step_size = self.clipbound_learning_rate * (share - self.target_unclipped_quantile)
        return min(max(clip * math.exp(-step_size), self.min_clipbound), self.max_clipbound)

    def forget(self) -> None:
        self.halves = 0.0


RULES: dict[str, type[Any]] = {rule.name: rule for rule in (Flat, PerLayer, Automatic, Adaptive)}
"""What ``clipping`` may name."""


def rule_of(clipping: str | ClippingRule, options: dict[str, Any]) -> ClippingRule:
    """The rule of a name, with its own of the options, which are taken out; or the rule given.

    Raises:
        InputError: there is no rule of that name.
    """
    if isinstance(clipping, ClippingRule):
        return clipping
    kind = RULES.get(clipping)
    if kind is None:
        raise InputError(
            f"grad_sample_mode='bk' got clipping={clipping!r}, wanted one of {tuple(RULES)}, or a "
            f"dpzoo.clipping.rules.ClippingRule."
        )
    names = [field.name for field in fields(kind)] if hasattr(kind, "__dataclass_fields__") else []
    rule: ClippingRule = kind(**{name: options.pop(name) for name in names if name in options})
    return rule
