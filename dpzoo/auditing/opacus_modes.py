"""Per-sample gradients, norms and clipped sums as unmodified Opacus computes them, in any mode."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.grad_sample.utils import prepare_module
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn

from dpzoo import opacus_internals as internals
from dpzoo.auditing.batches import Batch
from dpzoo.auditing.numerics import Gradients
from dpzoo.auditing.row_losses import RowLoss
from dpzoo.errors import first_line as said

PER_ROW_LOSS_ONLY = {
    "ghost": "ghost: the loss is a scalar, and ghost's second pass weights the loss of every row",
    "bk": "bk: the loss is a scalar, and bk takes one loss for each row",
}
"""The modes that cannot take a step on a scalar loss, and what is said then."""


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    kind, text = type(error).__name__, said(error)
    return kind if text == kind else f"{kind}: {text}"


@dataclass
class ModeRun:
    """What a mode computed for a batch.

    Args:
        rows: parameter name -> per-sample gradients (every mode but ghost); in bk, the rows' shares of
            the sum.
        norms: parameter name -> per-sample norms, (rows,) (ghost, bk).
        error: type and first line of what was raised; empty if nothing was.
    """

    rows: Gradients = field(default_factory=dict)
    norms: Gradients = field(default_factory=dict)
    error: str = ""

    @property
    def values(self) -> Gradients:
        """One value of each row and parameter: gradients, or norms in a mode that has no others."""
        return self.rows or self.norms


class _FirstByPosition:
    """A model that is called with keywords and hands the first argument on by position.

    ExpandedWeights' wrapper reads the batch size off its first positional argument.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._first = next(iter(inspect.signature(wrapper._module.forward).parameters), None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self._first in kwargs:
            args = (kwargs.pop(self._first),)
        return self._wrapper(*args, **kwargs)


class OpacusMode:
    """Opacus around a copy of a model.

    Args:
        make: gives a new copy; called again after something raised, for Opacus' hooks then hold
            activations of a batch that never finished.
        mode: Opacus' grad_sample_mode.
        loss: the loss.
    """

    def __init__(self, make: Callable[[], nn.Module], mode: str, loss: RowLoss) -> None:
        self.make, self.mode, self.loss = make, mode, loss
        self._wrapped: Any = None

    @property
    def wrapper(self) -> Any:
        """Opacus' wrapper around the present copy."""
        if self._wrapped is None:
            model = self.make()
            parameters = [p for p in model.parameters() if p.requires_grad]
            for p in parameters:
                p.grad = None
            self._wrapped = self.prepare(model)
        return self._wrapped

    def prepare(self, model: nn.Module) -> Any:
        """The wrapper around a new copy."""
        return prepare_module(model, grad_sample_mode=self.mode)

    def discard(self) -> None:
        """Forget the copy."""
        self._wrapped = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Trainable parameters of the copy, by the names they have without the wrapper."""
        named = self.wrapper._module.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    def run(self, batch: Batch, weights: torch.Tensor | None = None) -> ModeRun:
        """Per-sample gradients, or norms in ghost mode; a failure is part of the result.

        Args:
            batch: the batch.
            weights: (rows,) factors of the rows' losses.
        """
        try:
            self.clear()
            self.backward(batch, weights)
            made = ModeRun()
            for name, p in self.parameters.items():
                if self.mode == "ghost":
                    norms = internals.norms_of(p)
                    if norms is not None:
                        made.norms[name] = norms.detach().reshape(-1)
                elif isinstance(p.grad_sample, torch.Tensor):
                    made.rows[name] = p.grad_sample.detach()
            self.clear()
            return made
        except Exception as error:
            self.discard()
            return ModeRun(error=first_line(error))

    def clear(self) -> None:
        """Remove what an earlier batch left on the parameters."""
        for p in self.parameters.values():
            internals.forget_rows(p)

    def backward(self, batch: Batch, weights: torch.Tensor | None = None) -> None:
        """Forward and one backward pass of the mean over rows, hooks on."""
        losses = self.losses(batch)
        if weights is not None:
            losses = losses * weights
        mean = losses if losses.dim() == 0 else losses.sum() / max(len(losses), 1)
        mean.backward()

    def losses(self, batch: Batch) -> torch.Tensor:
        """The loss, one value a row or a scalar, with the graph that the mode needs."""
        model = _FirstByPosition(self.wrapper) if self.mode == "ew" else self.wrapper
        return self.loss(model, batch)

    def optimizer(
        self, max_grad_norm: float, denominator: int = 1, sigma: float = 0.0, lr: float = 0.0
    ) -> Any:
        """Opacus' optimizer for the mode, plain SGD inside, around the present copy."""
        kind = DPOptimizerFastGradientClipping if self.mode == "ghost" else DPOptimizer
        if self.mode == "ghost":
            self.wrapper.max_grad_norm = max_grad_norm
        return kind(
            torch.optim.SGD(list(self.parameters.values()), lr=lr),
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            expected_batch_size=denominator,
        )

    def private_backward(self, batch: Batch, optimizer: Any, factor: float = 1.0) -> None:
        """The backward pass of a training step, of the loss times a factor: in ghost mode, both."""
        losses = self.losses(batch) * factor
        if self.mode == "ghost":
            DPTensorFastGradientClipping(self.wrapper, optimizer, losses, "mean").backward()
        else:
            mean = losses if losses.dim() == 0 else losses.sum() / max(len(losses), 1)
            mean.backward()

    def discard_graph(self, losses: torch.Tensor) -> None:
        """Let a forward pass end without a trace: its backward pass empties Opacus' bookkeeping."""
        (losses if losses.dim() == 0 else losses.sum()).backward()
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)

    def clipped_sum(
        self, parts: Sequence[Batch], max_grad_norm: float, *, one_draw: bool = True
    ) -> Gradients:
        """What a noiseless step sums up, over physical batches of one logical batch.

        Args:
            parts: the physical batches.
            max_grad_norm: the clipping norm.
            one_draw: False takes a step for each batch; the sum is the last one's.

        Raises:
            Exception: whatever Opacus raises; the copy is discarded then.
        """
        try:
            self.clear()
            optimizer = self.optimizer(max_grad_norm)
            for i, part in enumerate(parts):
                optimizer.signal_skip_step(do_skip=one_draw and i < len(parts) - 1)
                optimizer.zero_grad()
                self.private_backward(part, optimizer)
                optimizer.pre_step()
            summed = {n: p.grad.detach().clone() for n, p in self.parameters.items()}
            self.clear()
            return summed
        except Exception:
            self.discard()
            raise
