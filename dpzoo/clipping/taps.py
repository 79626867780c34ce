"""Taps: identity functions on layer outputs, whose backward enters the layer's uses in the book.

A tap has an edge to an anchor, a scalar that needs a gradient. Asking autograd for the anchor's
gradient alone runs everything between the loss and the taps, and nothing else: no weight gradient is
computed, and nothing below the first trainable layer (Bu et al. 2023, arXiv 2210.00038, section 3).
A tap keeps its layer's input as autograd keeps tensors, and so goes along with non-reentrant
activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import nn
from torch.nn import functional as F

from dpzoo.clipping.book import Book
from dpzoo.clipping.uses import Direct, Lookup, positions_of, projection, wide
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.layers.embeddings import PositionEmbedding, TokenEmbedding

Entry = Callable[[Book, Any, str, torch.Tensor, torch.Tensor], None]
"""(book, module, name, input, gradient of the output) -> None: enter a module's uses."""


def enter_linear(
    book: Book, module: nn.Linear, name: str, x: torch.Tensor, g: torch.Tensor
) -> None:
    """Weight by `projection`, bias as a vector."""
    grads = wide(positions_of(g))
    if module.bias is not None and module.bias.requires_grad:
        book.add(module.bias, Direct(grads.sum(1)), name)
    if module.weight.requires_grad:
        book.add(module.weight, projection(grads, book.input_of(x)), name)


def enter_embedding(
    book: Book, module: nn.Embedding, name: str, ids: torch.Tensor, g: torch.Tensor
) -> None:
    """The table by `Lookup`; a padding row gets no gradient."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise UnsupportedModelError(
            f"{name} is an Embedding with max_norm, scale_grad_by_freq or sparse, which make a row's "
            f"gradient depend on other rows or have no dense form. Wanted a plain one."
        )
    grads = wide(positions_of(g))
    ids = ids.reshape(grads.shape[:2])
    if module.padding_idx is not None:
        grads = grads.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
    book.add(module.weight, Lookup(ids, grads, module.num_embeddings), name)


def enter_layer_norm(
    book: Book, module: nn.LayerNorm, name: str, x: torch.Tensor, g: torch.Tensor
) -> None:
    """Weight and bias as vectors; the input is normalised once more instead of kept."""
    lead = x.ndim - len(module.normalized_shape)
    dims = tuple(range(1, lead))
    grads = wide(g)
    if module.bias is not None and module.bias.requires_grad:
        book.add(module.bias, Direct(grads.sum(dims) if dims else grads), name)
    if module.weight is not None and module.weight.requires_grad:
        scaled = F.layer_norm(wide(x), module.normalized_shape, eps=module.eps).mul_(grads)
        book.add(module.weight, Direct(scaled.sum(dims) if dims else scaled), name)


def enter_rms_norm(
    book: Book, module: nn.RMSNorm, name: str, x: torch.Tensor, g: torch.Tensor
) -> None:
    """The weight as a vector."""
    lead = x.ndim - len(module.normalized_shape)
    dims = tuple(range(1, lead))
    scaled = F.rms_norm(wide(x), module.normalized_shape, eps=module.eps) * wide(g)
    book.add(module.weight, Direct(scaled.sum(dims) if dims else scaled), name)


def enter_by_sampler(
    book: Book, module: nn.Module, name: str, x: torch.Tensor, g: torch.Tensor
) -> None:
    """Any other module that holds parameters: Opacus' sampler for it, or functorch, for it alone."""
    if len(g) == 0:  # which Opacus' sampler of convolutions takes for one row
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                empty = parameter.new_zeros((0, *parameter.shape))
                book.add(parameter, Direct(wide(empty)), name, counted=False)
        return
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
    for parameter, grads in sampler(module, [x], g).items():
        if parameter.requires_grad:
            book.add(parameter, Direct(wide(grads)), name, counted=False)


ENTRIES: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Linear, enter_linear),
    (nn.Embedding, enter_embedding),
    (TokenEmbedding, enter_embedding),
    (PositionEmbedding, enter_embedding),
    (nn.LayerNorm, enter_layer_norm),
    (nn.RMSNorm, enter_rms_norm),
)
"""Classes whose uses are kept by their factors. A subclass counts if its forward is the class's."""


def entry_of(module: nn.Module, name: str) -> Entry:
    """How to enter a module's uses, by its class.

    Raises:
        UnsupportedModelError: the module holds parameters beside submodules that hold some, or
            buffers: its per-sample gradients cannot be had.
    """
    for kind, entry in ENTRIES:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return entry
    below = [key for key, _ in module.named_parameters() if "." in key]
    if below or next(module.buffers(), None) is not None:
        what = f"parameters of its submodules ({below[0]}, ...)" if below else "buffers"
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) holds parameters beside {what}, so its per-sample "
            f"gradients cannot be computed. Move each parameter into a layer of its own, or freeze it."
        )
    return enter_by_sampler


class Tap(torch.autograd.Function):
    """The identity; its backward calls ``enter`` with the layer's input and the output's gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, enter: Any
    ) -> torch.Tensor:
        """``output``, as a tensor that has an edge to ``anchor``."""
        ctx.save_for_backward(x)
        ctx.enter = enter
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient through, and enter the layer's uses."""
        (x,) = ctx.saved_tensors
        ctx.enter(x.detach(), grad.detach())
        return grad, None, grad.new_zeros(()), None


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> torch.Tensor:
    """The tensor that a layer was called with, by position or by keyword."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if len(given) != 1:
        raise InputError(
            f"{name} was called with {len(given)} tensors, wanted one: its per-sample gradients are "
            f"computed from one input."
        )
    return given[0]
