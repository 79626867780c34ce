"""What the autograd graph says about uses of parameters that no tap would see."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpzoo.errors import InputError


def uses_in_graph(losses: torch.Tensor) -> dict[torch.Tensor, int]:
    """How often the losses use each trainable parameter.

    Args:
        losses: the rows' losses, (rows,).

    Raises:
        InputError: a reentrant checkpoint is below them. It runs its layers without gradients, and
            again in its backward function, which asking for the anchor's gradient alone never calls:
            they would get no gradient at all.
    """
    used: dict[torch.Tensor, int] = {}
    seen: set[Any] = set()
    ahead: list[Any] = [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise InputError(
                "grad_sample_mode='bk' got losses that come through a reentrant activation checkpoint, "
                "wanted use_reentrant=False: in gradient_checkpointing_enable({'use_reentrant': False}), "
                "or as an argument of torch.utils.checkpoint.checkpoint."
            )
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)  # of an AccumulateGrad node
            if leaf is None:
                ahead.append(following)
            else:
                used[leaf] = used.get(leaf, 0) + 1
    return used


def refuse_unseen(
    used: dict[torch.Tensor, int], seen: dict[torch.Tensor, int], model: nn.Module
) -> None:
    """Raise if the losses use a parameter more often than taps saw it.

    Args:
        used: parameter -> uses in the graph.
        seen: parameter -> uses that were entered.
        model: for the parameters' names.

    Raises:
        InputError: a parameter is used past the forward of the module that holds it, so that its
            gradient, and the rows' norms, would lack that use.
    """
    for name, parameter in model.named_parameters():
        times, entered = used.get(parameter, 0), seen.get(parameter, 0)
        if times > entered:
            raise InputError(
                f"The losses use {name} {times} times, {entered} of them through the forward of the "
                f"module that holds it, wanted all: per-sample gradients come from modules' inputs and "
                f"outputs. Use it through a module's forward (a tied head as dpzoo's models tie it), or "
                f"freeze it."
            )
