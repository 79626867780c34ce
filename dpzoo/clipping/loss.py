"""The criterion's half: a loss that remembers its rows, and whose backward is the private one."""

from __future__ import annotations

from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from dpzoo.errors import InputError


class PrivateLoss:
    """Losses of a batch's rows, (rows,), with the arithmetic of a scalar loss.

    Args:
        criterion: the `PrivateCriterion` that made it.
        losses: (rows,).
    """

    def __init__(self, criterion: PrivateCriterion, losses: torch.Tensor) -> None:
        self.criterion = criterion
        self.loss_per_sample = losses

    def backward(self) -> None:
        """Add the clipped sum of the rows' gradients to the parameters' sums.

        Several calls before a step add up: micro-batches need nothing else.
        """
        self.criterion.module.backward(self.loss_per_sample, self.criterion.optimizer)

    def detach(self) -> torch.Tensor:
        """The reduced loss, as a plain tensor; 0 for an empty batch."""
        losses = self.loss_per_sample.detach()
        if self.criterion.loss_reduction == "sum":
            return losses.sum()
        return losses.sum() / max(len(losses), 1)

    def item(self) -> float:
        """The reduced loss, as a number."""
        return float(self.detach())

    def _with(self, losses: torch.Tensor) -> PrivateLoss:
        return PrivateLoss(self.criterion, losses)

    def _values(self, other: Any) -> Any:
        if isinstance(other, PrivateLoss):
            if other.criterion.loss_reduction != self.criterion.loss_reduction:
                raise InputError("Cannot combine losses with different reductions.")
            return other.loss_per_sample
        return other

    def __add__(self, other: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample + self._values(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample - self._values(other))

    def __rsub__(self, other: Any) -> PrivateLoss:
        return self._with(other - self.loss_per_sample)

    def __mul__(self, factor: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample / divisor)

    def __neg__(self) -> PrivateLoss:
        return self._with(-self.loss_per_sample)

    def __repr__(self) -> str:
        return f"PrivateLoss({self.item():.4f}, rows={len(self.loss_per_sample)})"


class PrivateCriterion(DPLossFastGradientClipping):
    """A criterion whose losses backpropagate privately; takes what the wrapped criterion takes.

    The rows' losses come from the wrapped criterion with ``reduction="none"``; for flat token losses
    pass ``shape=logits.shape``, as in Opacus' ghost mode.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> PrivateLoss:
        """The loss of a batch."""
        return PrivateLoss(self, super().__call__(*args, **kwargs).loss_per_sample)
