"""The book of one backward pass: every parameter's uses, and the norms of the rows so far."""

from __future__ import annotations

import torch

from dpzoo.clipping.uses import Direct, LayerInput, Use, inner_product
from dpzoo.errors import InputError

MANY = 1_000_000


class Book:
    """Collects uses as the backward pass reaches them; closes with a weighted sum.

    Args:
        rows: rows of the batch. A use with another number of rows is refused.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._uses: dict[torch.Tensor, list[Use]] = {}
        self._squared: dict[torch.Tensor, torch.Tensor] = {}
        self._input: LayerInput | None = None
        self.counts: dict[torch.Tensor, int] = {}
        """Parameter -> how many uses in the autograd graph were entered; at least `MANY` if unknown."""

    def input_of(self, x: torch.Tensor) -> LayerInput:
        """A linear layer's input, shared with the layer before in the backward pass if it is its too.

        Args:
            x: (rows, ..., features).
        """
        if self._input is None or not self._input.is_of(x):
            self._seal_input()
            self._input = LayerInput(x)
        return self._input

    def _seal_input(self) -> None:
        if self._input is not None:
            self._input.seal()
        self._input = None

    def add(self, parameter: torch.Tensor, use: Use, name: str, *, counted: bool = True) -> None:
        """Enter a use of a parameter and bring its norms up to date.

        Args:
            parameter: the parameter.
            use: its use.
            name: the module's, for the error message.
            counted: whether this is one use in the autograd graph; False where it may be several.

        Raises:
            InputError: the use has not one entry for each row: the layer mixes rows, or (a table
                looked up with ids of shape (1, seq)) is shared by them.
        """
        grads = use.grads
        if grads.shape[0] != self.rows:
            raise InputError(
                f"{name} has per-sample gradients of batch dimension {grads.shape[0]}, wanted "
                f"{self.rows}, the rows of the loss. Its input must have one entry for each row: "
                f"dpzoo's models do (dpzoo.convert), and position ids of shape (1, seq) do not."
            )
        self.counts[parameter] = self.counts.get(parameter, 0) + (1 if counted else MANY)
        uses = self._uses.setdefault(parameter, [])
        squared = use.squared_norm()
        for other in uses:
            squared = squared + 2 * inner_product(other, use)
        if isinstance(use, Direct) and uses and isinstance(uses[-1], Direct):
            uses[-1] = Direct(uses[-1].grads + use.grads)
        else:
            uses.append(use)
        before = self._squared.get(parameter)
        self._squared[parameter] = squared if before is None else before + squared

    def squared_norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """Parameter -> squared norms of its rows' gradients, (rows,), as far as any were reached."""
        self._seal_input()
        return {parameter: value.clamp(min=0) for parameter, value in self._squared.items()}

    def close(
        self, parameter: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A parameter's ``summed_grad`` plus the weighted sum of its rows, which are then forgotten.

        Args:
            parameter: a parameter that the backward pass reached.
            weights: clip factors, (rows,).
            kept: True for the rows that take part, (rows,); None for all. What the others hold
                (not-a-numbers, say) is not looked at.
        """
        uses = self._uses.pop(parameter)
        total: torch.Tensor | None = getattr(parameter, "summed_grad", None)
        if kept is not None:
            uses, weights = [use.select(kept) for use in uses], weights[kept]
        while uses:
            use = uses.pop(0)
            total = use.add_to(total, weights.to(use.grads.dtype))
        assert total is not None  # a parameter that was reached has a use
        return total
