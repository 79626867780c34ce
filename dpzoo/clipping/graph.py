"""What the autograd graph says about uses of parameters that the recorder did not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpzoo.clipping.recorder import TAP
from dpzoo.errors import InputError


def refuse_unseen(
    losses: torch.Tensor,
    name_of: Callable[[torch.Tensor], str],
    trained: Any,
    mixed: list[tuple[Any, str]],
) -> frozenset[str]:
    """Raise if the losses use a parameter in a way that no tap recorded.

    The graph is walked from the losses. At a tap the walk goes on with the tensors of rows that went
    into the tapped function, and not with its parameters, which the tap records. A parameter that the
    walk meets all the same is used past every tap.

    Args:
        losses: the rows' losses, (rows,).
        name_of: a parameter's name.
        trained: ids of the parameters that are trained.
        mixed: nodes of outputs in which rows were combined, and the function that combined them.

    Returns:
        Names of the functions of the graph.

    Raises:
        InputError: a parameter is used outside the private forward pass (in the criterion, say, or in
            a function that torch does not show), so that its gradient, and the rows' norms, would lack
            that use; a reentrant checkpoint is below the losses. It runs its layers without gradients,
            and again in its backward function, which asking for the anchor's gradient alone never
            calls: they would get no gradient at all.
    """
    seen: set[Any] = set()
    names: set[str] = set()
    ahead: list[Any] = [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, TAP):
            if node.rows != len(losses):
                raise InputError(
                    f"The losses have {len(losses)} rows and come through a call of the model with "
                    f"{node.rows} rows, wanted as many in each call whose outputs a loss takes."
                )
            ahead.extend(node.parents)
            continue
        name = node.name()
        names.add(name)
        if "CheckpointFunction" in name:
            raise InputError(
                "grad_sample_mode='bk' got losses that come through a reentrant activation checkpoint, "
                "wanted use_reentrant=False: in gradient_checkpointing_enable({'use_reentrant': False}), "
                "or as an argument of torch.utils.checkpoint.checkpoint."
            )
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)  # of an AccumulateGrad node
            if leaf is None:
                ahead.append(following)
            elif id(leaf) in trained:
                raise InputError(
                    f"The losses use {name_of(leaf)} outside the model's private forward pass, or in a "
                    f"function that torch does not show ({node.name()}), wanted every use in torch "
                    f"functions that the model's forward calls: elsewhere its per-sample gradients "
                    f"cannot be had. Move that use into the forward, or freeze the parameter."
                )
    for node, function in mixed:
        if node in seen:
            raise InputError(
                f"The recorded per-sample gradients are not those of the rows: the losses use an output in "
                f"which {function} combined rows of the batch, wanted each row by itself: what one row "
                f"computes must not depend on another. dpzoo.audit(model, batch) says which rows."
            )
    return frozenset(names)
