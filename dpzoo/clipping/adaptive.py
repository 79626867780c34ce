"""Adaptive clipping: the clipping norm follows a quantile of the rows' norms, privately."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError


class AdaptiveBookKeepingOptimizer(BookKeepingOptimizer):
    """`BookKeepingOptimizer` whose clipping norm moves towards a quantile of the rows' norms.

    After each logical step, with b the noised share of the rows that were not clipped,
    ``C <- C exp(-clipbound_learning_rate (b - target_unclipped_quantile))``, kept between
    ``min_clipbound`` and ``max_clipbound`` (Andrew et al. 2021, arXiv 1905.03871). The arguments are
    those of Opacus' ``clipping="adaptive"``. The share is of the expected batch size: the size of a
    Poisson batch is itself private, and may be 0.

    What is released is not the count of rows that were not clipped, but the sum of +1/2 for each of them
    and -1/2 for each that was clipped. A row moves that by 1/2, as the theorem assumes; it would move the
    count by 1.

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
        InputError: there is no expected batch size; ``min_clipbound`` is not below ``max_clipbound``;
            ``noise_multiplier`` is not below ``2 unclipped_num_std``, so that the count alone would
            spend more than it.

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
        if not kwargs.get("expected_batch_size"):
            raise InputError(
                "clipping='adaptive' got expected_batch_size=None, wanted the expected rows of a batch: "
                "the share of rows that were not clipped is of it."
            )
        kwargs["clipping"] = "flat"
        super().__init__(optimizer, noise_multiplier=noise_multiplier, **kwargs)
        self.target_unclipped_quantile = target_unclipped_quantile
        self.clipbound_learning_rate = clipbound_learning_rate
        self.max_clipbound, self.min_clipbound = max_clipbound, min_clipbound
        self.unclipped_num_std = unclipped_num_std
        self._halves = (
            0.0  # the sum over rows of 1/2 for one that was not clipped, and -1/2 for others
        )

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
        self._halves += float((factors[None] >= 1).double().sum()) - len(norms) / 2
        return factors

    def _forget(self) -> None:
        super()._forget()
        self._halves = 0.0

    def _noise_in_place(self, grads: list[torch.Tensor], std: float, scale: float) -> None:
        """Noise for the gradients and for the count: one release, of two sums."""
        noise, count = self.release.noise, torch.tensor([self._halves], dtype=torch.float64)
        digest = noise.digest([*grads, count])
        step = self.release.begin(self.noise_multiplier)
        count_std = self.unclipped_num_std if self.noise_multiplier else 0.0
        first = noise.add(grads, std, scale, step=step, digest=digest)
        second = noise.add([count], count_std, step=step, digest=digest, domain="count")
        self.release.commit(first, second)
        if self.expected_batch_size:
            share = float(count) / self.expected_batch_size + 0.5
            step_size = self.clipbound_learning_rate * (share - self.target_unclipped_quantile)
            moved = self.max_grad_norm * math.exp(-step_size)
            self.max_grad_norm = min(max(moved, self.min_clipbound), self.max_clipbound)
