"""The private criterion: a loss that keeps the rows' losses, and whose ``backward`` is the private one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from dpzoo.clipping.containers import mapped, tensors_of
from dpzoo.clipping.independence import Change, Probe, dependent_outputs
from dpzoo.clipping.layouts import FIRST, MARK, layout_of
from dpzoo.errors import InputError


class PrivateLoss:
    """Losses of a batch's rows, (rows,), with the arithmetic of a scalar loss.

    Args:
        criterion: the `PrivateCriterion` that made it.
        losses: (rows,).
    """

    def __init__(
        self, criterion: PrivateCriterion, losses: torch.Tensor, spent: list[bool] | None = None
    ) -> None:
        self.criterion = criterion
        self.loss_per_sample = losses
        self._spent = [False] if spent is None else spent  # shared by what is computed from it

    def backward(self, *, unit_ids: Any = None) -> None:
        """Add the clipped sum of the rows' gradients to the optimizer's sums.

        The parts of one draw add up: call it for each of them, and then the optimizer's step.

        Args:
            unit_ids: the ids of the rows' units, (rows,), in the batch's order; with
                ``make_private(unit_ids=...)``. They are needed where the collator changes the order of
                rows, which the loader does not see; and they are compared with the draw.

        Raises:
            InputError: it was called before, on this loss or on one that this is computed from; otherwise
                as `dpzoo.clipping.module.BookKeepingHooks.backward` and `dpzoo.clipping.draws`.
        """
        if self._spent[0]:
            raise InputError(
                "backward() was called twice on one private loss, wanted once: its rows would count twice. "
                "Compute the loss once more from another forward pass of the next draw's rows."
            )
        self._spent[0] = True
        self.criterion.module.backward(self.loss_per_sample, self.criterion.optimizer, unit_ids)

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
        return PrivateLoss(self.criterion, losses, self._spent)

    def _values(self, other: Any) -> Any:
        rows = tuple(self.loss_per_sample.shape)
        if isinstance(other, PrivateLoss):
            if other.criterion.loss_reduction != self.criterion.loss_reduction:
                raise InputError(
                    f"Losses of reductions {self.criterion.loss_reduction!r} and "
                    f"{other.criterion.loss_reduction!r} were combined, wanted one reduction."
                )
            if self._spent[0] or other._spent[0]:
                raise InputError(
                    "A private loss was combined with one whose backward() was called."
                )
            other._spent = self._spent
            other = other.loss_per_sample
        if isinstance(other, torch.Tensor) and other.requires_grad and tuple(other.shape) != rows:
            raise InputError(
                f"A private loss of {rows[0]} rows was combined with a tensor of shape "
                f"{tuple(other.shape)} that needs a gradient, wanted one value for each row, ({rows[0]},): "
                f"a loss of the whole batch has no per-row gradient. Add each row's own part."
            )
        return other

    def _factor(self, other: Any) -> Any:
        values, rows = self._values(other), tuple(self.loss_per_sample.shape)
        if isinstance(values, torch.Tensor) and tuple(values.shape) != rows:
            raise InputError(
                f"A private loss of {rows[0]} rows was scaled by a tensor of shape {tuple(values.shape)}, "
                f"wanted one value for each row, ({rows[0]},), or a Python number that does not depend on "
                f"the data: a statistic of the batch would make each row's gradient depend on the others."
            )
        return values

    def __add__(self, other: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample + self._values(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample - self._values(other))

    def __rsub__(self, other: Any) -> PrivateLoss:
        return self._with(self._values(other) - self.loss_per_sample)

    def __mul__(self, factor: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample * self._factor(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> PrivateLoss:
        return self._with(self.loss_per_sample / self._factor(divisor))

    def __neg__(self) -> PrivateLoss:
        return self._with(-self.loss_per_sample)

    def __repr__(self) -> str:
        return f"PrivateLoss({self.item():.4f}, rows={len(self.loss_per_sample)})"


class PrivateCriterion(DPLossFastGradientClipping):
    """A criterion whose losses backpropagate privately; takes what the wrapped criterion takes.

    The rows' losses come from the wrapped criterion with ``reduction="none"``; for flat token losses
    pass ``shape=logits.shape``, as in Opacus' ghost mode.
    """

    tried = 0  # batches of several rows

    def __call__(self, *args: Any, **kwargs: Any) -> PrivateLoss:
        """The loss of a batch.

        Raises:
            InputError: a row's loss is another one when other rows are changed. As in a forward pass
                (`dpzoo.clipping.independence`), several changes are tried before the first batch, and one
                before the batches 2, 4, 8 and so on.
        """
        rows = self.module.rows_of_pass
        if rows > 1:
            self.tried += 1
            if not self.tried & (self.tried - 1):
                self._refuse_dependence(rows, args, kwargs)
        return PrivateLoss(self, super().__call__(*args, **kwargs).loss_per_sample)

    def _refuse_dependence(self, rows: int, args: Any, kwargs: Any) -> None:
        given = {id(x) for x in tensors_of(args[:2]) if x.ndim and len(x) % rows == 0}
        flat = "shape" in kwargs  # all rows' tokens in one list

        def losses(change: Change) -> torch.Tensor:
            def changed(x: torch.Tensor) -> torch.Tensor:
                marked = layout_of(x, rows) == FIRST
                if not marked and (id(x) not in given or (len(x) > rows and not flat)):
                    return x
                return change(x.detach().unflatten(0, (rows, -1))).flatten(0, 1)

            before = self.criterion.reduction
            try:
                made = super(PrivateCriterion, self).__call__(
                    *mapped(changed, args), **mapped(changed, kwargs)
                )
            finally:
                self.criterion.reduction = before
            of_rows: torch.Tensor = made.loss_per_sample
            return of_rows

        refuse_dependence("The criterion", losses, self.module, rows, first=self.tried == 1)


def refuse_dependence(
    who: str, losses: Callable[[Change], torch.Tensor], model: Any, rows: int, *, first: bool
) -> None:
    """Raise if a row's loss depends on other rows (`dpzoo.clipping.independence`).

    Args:
        who: computes the losses.
        losses: with a function for each tensor that has the batch's rows; gives the losses.
        model: the `BookKeepingHooks`.
        rows: of the batch, two or more.
        first: whether this is the first batch.

    Raises:
        InputError: a row has another loss beside other rows.
    """

    def run(change: Change, count: int) -> list[torch.Tensor]:
        with Probe(model, count):
            made = losses(change)
        setattr(made, MARK, (count, FIRST))
        return [made] if made.shape == (count,) else []

    if dependent_outputs(run, rows, model.anchor.device, first=first, autocast=False):
        raise InputError(
            f"{who} gives a row another loss when other rows of the batch are changed, wanted each row's "
            f"loss by itself: no statistic of the batch (class frequencies, a mean loss, other rows as "
            f"negatives), with or without a gradient."
        )
