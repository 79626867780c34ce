"""Adaptive clipping: the clipping norm follows a quantile of the rows' norms, privately."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch.optim import Optimizer

from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError


class AdaptiveBookKeepingOptimizer(BookKeepingOptimizer):
    """`BookKeepingOptimizer` whose clipping norm moves towards a quantile of the rows' norms.

    After each logical step, with b the noised share of the rows that were not clipped,
    ``C <- C exp(-clipbound_learning_rate (b - target_unclipped_quantile))``, kept between
    ``min_clipbound`` and ``max_clipbound`` (Andrew et al. 2021, arXiv 1905.03871). The arguments are
    those of Opacus' ``clipping="adaptive"``. The share is of the expected batch size where there is
    one: the size of a Poisson batch is itself private, and may be 0.

    Args:
        optimizer: any torch optimizer.
        noise_multiplier: sigma, of the gradients and the count together: what an accountant is told.
        target_unclipped_quantile: the share of rows that should not be clipped, 0 to 1.
        clipbound_learning_rate: how fast C moves.
        max_clipbound: the largest C.
        min_clipbound: the smallest C.
        unclipped_num_std: standard deviation of the noise on the count of rows not clipped.
        **kwargs: as for `BookKeepingOptimizer`.

    Raises:
        InputError: ``min_clipbound`` is not below ``max_clipbound``; ``noise_multiplier`` is not below
            ``2 unclipped_num_std``, so that the count alone would spend more than it.

    Guarantees:
        A step is as private as one Gaussian mechanism with ``noise_multiplier``: the gradients' noise
        is raised to ``(sigma^-2 - (2 unclipped_num_std)^-2)^(-1/2)`` (theorem 1 of the paper).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        target_unclipped_quantile: float,
        clipbound_learning_rate: float,
        max_clipbound: float,
        min_clipbound: float,
        unclipped_num_std: float,
        **kwargs: Any,
    ) -> None:
        if not min_clipbound < max_clipbound:
            raise InputError(
                f"clipping='adaptive' got min_clipbound={min_clipbound} and "
                f"max_clipbound={max_clipbound}, wanted the first to be the smaller."
            )
        if noise_multiplier >= 2 * unclipped_num_std:
            raise InputError(
                f"clipping='adaptive' got noise_multiplier={noise_multiplier} and "
                f"unclipped_num_std={unclipped_num_std}, wanted less than twice the second: the count of "
                f"rows that were not clipped would cost more than the whole step may. Raise "
                f"unclipped_num_std (a tenth of the batch size is usual)."
            )
        kwargs["clipping"] = "flat"
        super().__init__(optimizer, noise_multiplier=noise_multiplier, **kwargs)
        self.target_unclipped_quantile = target_unclipped_quantile
        self.clipbound_learning_rate = clipbound_learning_rate
        self.max_clipbound, self.min_clipbound = max_clipbound, min_clipbound
        self.unclipped_num_std = unclipped_num_std
        self._rows = self._unclipped = 0

    @property
    def gradient_noise_multiplier(self) -> float:
        """The gradients' part of the noise; the count has the rest of the privacy."""
        if not self.noise_multiplier:
            return 0.0
        inverse = self.noise_multiplier**-2 - (2 * self.unclipped_num_std) ** -2
        return float(inverse**-0.5)

    def clip_factors(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor
    ) -> dict[torch.Tensor | None, torch.Tensor]:
        factors = super().clip_factors(squared, norms)
        self._rows += len(norms)
        self._unclipped += int((factors[None] >= 1).sum())
        return factors

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._rows = self._unclipped = 0

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        stepped = super().pre_step(closure)
        if stepped:
            self._move()
        return stepped

    def _move(self) -> None:
        count = torch.tensor([float(self._unclipped)])
        std = self.unclipped_num_std if self.noise_multiplier else 0.0
        if self.secure_mode:
            count += _generate_noise(std, count, generator=self.generator, secure_mode=True)
        else:
            self._streams.add([count], std)
        rows = self.expected_batch_size or self._rows
        if rows:
            share = float(count) / rows
            step = self.clipbound_learning_rate * (share - self.target_unclipped_quantile)
            moved = self.max_grad_norm * math.exp(-step)
            self.max_grad_norm = min(max(moved, self.min_clipbound), self.max_clipbound)
        self._rows = self._unclipped = 0
