"""The check of a backward pass against autograd, with a weight for each row.

For weights w_i drawn at random, autograd's gradient of sum_i w_i loss_i is sum_i w_i G_i, where G_i is
the gradient of row i's loss. The recorded uses give the same sum, if every use was recorded, and if each
was given to the row that it is of: were any part of G_i given to another row, the sums would differ, but
for weights in a set of measure zero. So one ordinary backward pass checks both, whatever the model does,
and it finds losses that depend on other rows' activations, too.

It is done for the first batch of each kind, the second, the fourth, the eighth and so on: functions of the
graph, parameters and the places of rows, not sizes. Where a place was guessed from sizes, these are part of
the kind. A batch of one row is of another kind than one of several.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dpzoo.clipping.book import Book
from dpzoo.clipping.recorder import Recorder, run_backward
from dpzoo.errors import InputError

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.1}
"""Of the difference, relative to the norms of the rows' gradients in the parameter. What the check looks
for, a use that is lost or given to another row, changes the sum by a good part of itself."""

AUTOCAST = 0.2

SMALL = 0.05
"""A parameter whose gradients are less than this times the tolerance of the rows' whole is rounding."""


def verify(
    losses: torch.Tensor,
    book: Book,
    squared: dict[torch.Tensor, torch.Tensor],
    parameters: list[torch.Tensor],
    name_of: Callable[[torch.Tensor], str],
    recorder: Recorder,
) -> bool:
    """Compare weighted sums of rows' gradients with autograd's.

    Args:
        losses: the rows' losses, (rows,), whose graph is still there.
        book: what was recorded.
        squared: parameter -> squared norms of the rows, (rows,).
        parameters: all that are trained.
        name_of: a parameter's name.
        recorder: of the forward pass.

    Returns:
        Whether they could be compared: not where a row's gradient is not finite.

    Raises:
        InputError: a parameter's sums differ.
    """
    finite = torch.stack(list(squared.values())).sum(0).isfinite() if squared else None
    if finite is not None and not bool(finite.all()):
        return False  # the next batch is checked
    generator = torch.Generator().manual_seed(int.from_bytes(b"rows", "big"))
    weights = (torch.rand(len(losses), generator=generator, dtype=torch.float64) + 0.5).to(
        losses.device
    )
    weights = (
        weights
        * torch.tensor([1.0, -1.0], dtype=torch.float64, device=losses.device).repeat(
            len(losses) // 2 + 1
        )[: len(losses)]
    )
    whole = sum((value.detach().double().sum() for value in squared.values()), torch.zeros(()))
    faults: list[str] = []

    def compare(parameter: torch.Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        with (
            torch.no_grad(),
            torch._C.DisableTorchFunction(),
            torch.autocast(grad.device.type, enabled=False),
        ):
            _compare(
                parameter,
                grad,
                book,
                squared,
                weights,
                float(whole),
                faults,
                name_of,
                recorder.autocast,
            )

    before = [p.grad for p in parameters]
    handles = [p.register_post_accumulate_grad_hook(compare) for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        total = (losses * weights.to(losses.dtype)).sum()
        run_backward(recorder, total, None, retain_graph=False)
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
    if faults:
        raise InputError(
            f"The recorded per-sample gradients are not those of the rows: {'; '.join(faults[:3])}"
            f"{f'; and {len(faults) - 3} more' if len(faults) > 3 else ''}. Either what one row computes "
            f"depends on another (a mean over the batch, a loss over all tokens of the batch), or a "
            f"parameter is used in a way that grad_sample_mode='bk' does not see. dpzoo.audit(model, "
            f"batch) says which rows. Nothing was added to the sums."
        )
    return True


def _compare(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    book: Book,
    squared: dict[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    whole: float,
    faults: list[str],
    name_of: Callable[[torch.Tensor], str],
    rough: bool,
) -> None:
    size = float(grad.double().norm())
    tolerance = AUTOCAST if rough else TOLERANCE.get(grad.dtype, AUTOCAST)
    if parameter not in squared:
        if size > SMALL * tolerance * whole**0.5:
            faults.append(
                f"{name_of(parameter)} has a gradient of norm {size:.3g} and no recorded use"
            )
        return
    got = book.close(
        parameter, weights.to(torch.promote_types(grad.dtype, torch.float32)), forget=False
    )
    off = float((got.double() - grad.double()).norm())
    # Rows' gradients may cancel in the sum, and a parameter's may be rounding alone (a bias that a softmax
    # does not feel): rounding goes by the norms of the rows, and by those over all parameters.
    scale = float((squared[parameter].double().sum()).sqrt())
    if off > tolerance * max(scale, size) + SMALL * tolerance * whole**0.5:
        faults.append(f"{name_of(parameter)} is off by {off / max(scale, size):.2g} of its norm")
