"""The autograd graph: taps in it, and what it says about uses that the recorder did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dpzoo.errors import InputError

RecordUse = Callable[..., None]


class Tap(torch.autograd.Function):
    """The identity on one or several tensors; its backward calls ``record`` with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        owner: Any,
        record: RecordUse,
        count: int,
        *tensors: torch.Tensor,
    ) -> Any:
        """The first ``count`` of ``tensors``, with an edge to ``anchor``; the rest is kept for backward.

        The outputs share memory with the inputs and are no views of them, so that a model may change
        them in place. The tapped functions keep nothing of their outputs for their own backward.
        """
        ctx.save_for_backward(*tensors[count:])
        ctx.owner, ctx.record, ctx.inputs = owner, record, len(tensors)
        ctx.parents = ()
        outputs = tuple(tensor.data for tensor in tensors[:count])
        return outputs[0] if count == 1 else outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Pass the gradients through, and record the use."""
        ctx.owner.record_use(ctx.record, grads, ctx.saved_tensors)
        return (None, None, None, None, *grads, *(None,) * (ctx.inputs - len(grads)))


TAP: Any = getattr(Tap, "_backward_cls")  # noqa: B009  (not an attribute that torch declares)
"""Class of a tap's node in the autograd graph."""


def inputs_of(node: Any) -> Iterator[Any]:
    """The nodes that a node's gradients go to."""
    return (following for following, _ in node.next_functions)


def walk(root: Any, ways: Callable[[Any], Iterable[Any]] = inputs_of) -> Iterator[Any]:
    """The nodes of the graph from one on, each once.

    Args:
        root: a node, or None.
        ways: the nodes that the walk goes to from one; asked when the caller has seen it.
    """
    seen: set[Any] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead.extend(ways(node))


def refuse_unseen(
    losses: torch.Tensor,
    name_of: Callable[[torch.Tensor], str],
    trained: Any,
    mixed: list[tuple[Any, str]],
) -> frozenset[str]:
    """Raise if the losses use a parameter in a way that no tap recorded.

    The graph is walked from the losses. At a tap the walk goes on with the tensors of rows that went
    into the tapped function, and not with its parameters, which the tap records. A parameter that the
    walk still reaches is used without a tap.

    Args:
        losses: the rows' losses, (rows,).
        name_of: a parameter's name.
        trained: ids of the parameters that are trained.
        mixed: nodes of outputs in which rows were combined (None: without a gradient), and the function
            that combined them.

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
    for node in walk(losses.grad_fn, lambda n: n.parents if isinstance(n, TAP) else inputs_of(n)):
        seen.add(node)
        if hasattr(node, "variable"):
            continue  # a leaf: its user has been asked about it
        if isinstance(node, TAP):
            if node.rows != len(losses):
                raise InputError(
                    f"The losses have {len(losses)} rows and come through a call of the model with "
                    f"{node.rows} rows, wanted as many in each call whose outputs a loss takes."
                )
            continue
        name = node.name()
        names.add(name)
        if "CheckpointFunction" in name:
            raise InputError(
                "grad_sample_mode='bk' got losses that come through a reentrant activation checkpoint, "
                "wanted use_reentrant=False: in gradient_checkpointing_enable({'use_reentrant': False}), "
                "or as an argument of torch.utils.checkpoint.checkpoint."
            )
        for following in inputs_of(node):
            leaf = getattr(following, "variable", None)  # of an AccumulateGrad node
            if leaf is not None and id(leaf) in trained:
                raise InputError(
                    f"The losses use {name_of(leaf)} outside the model's private forward pass, or in a "
                    f"function that torch does not show ({node.name()}), wanted every use in torch "
                    f"functions that the model's forward calls: elsewhere its per-sample gradients "
                    f"cannot be computed. Move that use into the forward, or freeze the parameter."
                )
    for node, function in mixed:
        if node is None or node in seen:
            raise InputError(
                f"The recorded per-sample gradients are not those of the rows: the losses use an output in "
                f"which {function} combined rows of the batch, wanted each row by itself: what one row "
                f"computes must not depend on another. dpzoo.audit(model, batch) says which rows."
            )
    return frozenset(names)
