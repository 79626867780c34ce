"""The model's half of book-keeping: taps on its layers, and the backward pass that reads them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from torch import nn
from torch.utils.hooks import RemovableHandle

from dpzoo.clipping.book import Book
from dpzoo.clipping.graph import refuse_unseen, uses_in_graph
from dpzoo.clipping.taps import Entry, Tap, entry_of, input_of
from dpzoo.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from dpzoo.clipping.optimizer import BookKeepingOptimizer


class BookKeepingHooks(AbstractGradSampleHooks):
    """Taps on a model's layers, without wrapping it (``wrap_model=False``).

    Args:
        m: the model. Any `torch.nn.Module` will do: linear layers, embeddings, LayerNorm and RMSNorm
            are kept by their factors, other layers that hold parameters by Opacus' sampler for them
            or by functorch.
        batch_first: must be True.
        loss_reduction: "mean" or "sum", of the criterion.

    Raises:
        UnsupportedModelError: a trainable parameter sits where its per-sample gradient cannot be had.
    """

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", **_: Any
    ) -> None:
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        if not batch_first:
            raise UnsupportedModelError(
                "grad_sample_mode='bk' got batch_first=False, wanted True: rows come first."
            )
        for parameter in m.parameters():
            parameter.__dict__.pop("_forward_counter", None)  # Opacus' hooks' own; not used here
            parameter.__dict__.pop("grad_sample", None)
            setattr(parameter, "summed_grad", None)  # noqa: B010  (not an attribute of tensors)
        self._entries: dict[nn.Module, tuple[str, Entry | None]] = {}
        self._handles: list[RemovableHandle] = []
        self._book: Book | None = None
        self._anchor = torch.zeros((), device=_device(m), requires_grad=True)
        self._norms: torch.Tensor | None = None
        self._factors: torch.Tensor | None = None
        self.nonfinite_rows = 0
        """Rows so far whose gradient was not finite, and which contributed nothing."""
        for name, module in m.named_modules():
            own = list(module.parameters(recurse=False))
            if own:
                trainable = any(p.requires_grad for p in own)
                self._entries[module] = (name, entry_of(module, name) if trainable else None)
                self._handles.append(module.register_forward_hook(self._tap, with_kwargs=True))

    # --- forward --------------------------------------------------------------------------------

    def _tap(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            return None
        name, entry = self._entries[module]
        if entry is None:  # frozen when the model was made private, and trainable by now
            entry = entry_of(module, name)
            self._entries[module] = (name, entry)
        if not isinstance(output, torch.Tensor):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) returns {type(output).__name__}, wanted a tensor: "
                f"its per-sample gradients cannot be computed. Freeze it, or use another layer."
            )
        x = input_of(args, kwargs, name)
        return Tap.apply(output, x, self._anchor, partial(self._enter, module, name, entry))

    def _enter(
        self, module: nn.Module, name: str, entry: Entry, x: torch.Tensor, grad: torch.Tensor
    ) -> None:
        if self._book is None:
            raise InputError(
                "An ordinary loss was backpropagated through a model in grad_sample_mode='bk': its "
                "gradients would not be clipped. Call backward() on what the criterion from "
                "make_private returns: criterion(model(**batch)).backward()."
            )
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            entry(self._book, module, name, x, grad)

    # --- backward -------------------------------------------------------------------------------

    def backward(self, losses: torch.Tensor, optimizer: BookKeepingOptimizer) -> None:
        """Add the clipped sum of the rows' gradients to every parameter's ``summed_grad``.

        Args:
            losses: the rows' losses, (rows,).
            optimizer: gives the clip factors.

        Raises:
            InputError: the losses are not one for each row; they come through a reentrant activation
                checkpoint; or a parameter is used past the forward of the module that holds it.

        Guarantees:
            Row i's share of the sum is its gradient times a factor that depends on row i alone, of
            norm at most C; a row whose gradient is not finite has share 0.
        """
        if losses.ndim != 1:
            raise InputError(
                f"The criterion gave losses of shape {tuple(losses.shape)}, wanted (rows,): one loss "
                f"for each row. dpzoo.ModelLoss() takes a model's outputs; for flat token losses pass "
                f"shape=logits.shape."
            )
        used = uses_in_graph(losses)
        book = self._book = Book(len(losses))
        try:
            torch.autograd.grad(losses.sum(), self._anchor, allow_unused=True)
        finally:
            self._book = None
        refuse_unseen(used, book.counts, self._module)
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            self._settle(book, losses, optimizer)

    def _settle(self, book: Book, losses: torch.Tensor, optimizer: BookKeepingOptimizer) -> None:
        squared = book.squared_norms()
        zeros = torch.zeros(book.rows, device=losses.device)
        total = torch.stack(list(squared.values())).sum(0) if squared else zeros
        finite = total.isfinite()
        factors = optimizer.clip_factors(squared, total.sqrt())
        self._norms, self._factors = total.sqrt(), factors.get(None)
        kept = None
        if not bool(finite.all()):
            self.nonfinite_rows += int((~finite).sum())
            kept = finite
        for parameter in squared:
            weights = factors[parameter if parameter in factors else None]
            total_grad = book.close(parameter, weights, kept)
            setattr(parameter, "summed_grad", total_grad)  # noqa: B010

    # --- reading, not private -------------------------------------------------------------------

    @property
    def per_sample_gradient_norms(self) -> torch.Tensor:
        """Norms of the rows of the last backward pass, (rows,). They are NOT private: for debugging."""
        if self._norms is None:
            # Not an AttributeError: torch would put words of its own in the place of these.
            raise InputError(
                "per_sample_gradient_norms is not set. Call backward() on the criterion's loss first."
            )
        return self._norms

    @property
    def clipped_fraction(self) -> float:
        """Share of the last backward pass's rows that were clipped. NOT private: for debugging."""
        if self._factors is None or len(self._factors) == 0:
            return 0.0
        return float((self._factors < 1).float().mean())

    def remove_hooks(self) -> None:
        """Take the taps off."""
        while self._handles:
            self._handles.pop().remove()

    def cleanup(self) -> None:
        """Take the taps off, and what was hung on the parameters."""
        super().cleanup()
        for parameter in self._module.parameters():
            parameter.__dict__.pop("summed_grad", None)

    def set_grad_sample_to_none(self) -> None:
        """There is no ``grad_sample`` in this mode."""


class BookKeepingModule(BookKeepingHooks, AbstractGradSampleModule):
    """A model wrapped for ``grad_sample_mode="bk"``; arguments as `BookKeepingHooks`."""

    def __init__(self, m: nn.Module, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        BookKeepingHooks.__init__(self, m, **kwargs)
        self.grad_accumulation_hook = None


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
