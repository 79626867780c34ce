"""The check of a backward pass against autograd, with a weight for each row.

For weights w_i drawn at random, autograd's gradient of sum_i w_i loss_i is sum_i w_i G_i, where G_i is
the gradient of row i's loss. (Rows of one unit have one weight.) The recorded uses give the same sum, if
every use was recorded, and if each was given to the row that it is of: were any part of G_i given to
another row, the sums would differ, but for weights in a set of measure zero. So one ordinary backward pass
checks both, whatever the model does, and it finds losses that depend on other rows' activations, too.

It is done for the first batch of each kind, the second, the fourth, the eighth and so on: functions of the
graph, parameters and the places of rows, not sizes. Where a place was guessed from sizes, these are part of
the kind. A batch of one row is of another kind than one of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dpzoo.clipping.factor_store import FactorStore, shape_of
from dpzoo.clipping.recorder import Recorder, run_backward
from dpzoo.clipping.units import Units
from dpzoo.errors import InputError
from dpzoo.factors import DenseGrads, EmbeddingFactors, LinearFactors, upcast

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.1}
"""Of the difference, relative to the norms of the rows' gradients in the parameter. What the check looks
for, a use that is lost or given to another row, changes the sum by a good part of itself."""

AUTOCAST = 0.2

SMALL = 0.05
"""A parameter whose gradients are less than this times the tolerance of the rows' whole is rounding."""


SKETCHES = 8
"""Products a^T G b with random a and b that stand for a gradient G: two that agree in all are equal."""


class Verification:
    """The check of one backward pass.

    Autograd's weighted sums are taken first, and kept as a few random products each, so that the check
    needs no more memory than a step without privacy does.

    Args:
        losses: the rows' losses, (rows,), whose graph is kept.
        parameters: all that are trained.
        recorder: of the forward pass.
        units: of the rows.
    """

    def __init__(
        self,
        losses: torch.Tensor,
        parameters: list[torch.Tensor],
        recorder: Recorder,
        units: Units,
    ) -> None:
        draws = torch.Generator().manual_seed(int.from_bytes(b"rows", "big"))
        signs = torch.tensor([1.0, -1.0]).repeat(units.count // 2 + 1)[: units.count]
        weights = (torch.rand(units.count, generator=draws, dtype=torch.float64) + 0.5) * signs
        self.weights = weights.to(losses.device)
        self.autocast = recorder.autocast
        self._expected: dict[torch.Tensor, tuple[float, torch.Tensor, torch.dtype]] = {}

        def note(parameter: torch.Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            with _plain(grad):
                self._expected[parameter] = _norm(grad), _sketch(grad), grad.dtype

        before = [p.grad for p in parameters]
        handles = [p.register_post_accumulate_grad_hook(note) for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            total = (losses * units.to_rows(self.weights).to(losses.dtype)).sum()
            run_backward(recorder, total, parameters, accumulate=True, retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad

    def compare(
        self,
        store: FactorStore,
        squared: dict[torch.Tensor, torch.Tensor],
        name_of: Callable[[torch.Tensor], str],
    ) -> bool:
        """Compare the recorded rows' weighted sums with autograd's.

        Args:
            store: what was recorded.
            squared: parameter -> squared norms of the units, (units,).
            name_of: a parameter's name.

        Returns:
            Whether they could be compared: not where a row's gradient is not finite.

        Raises:
            InputError: a parameter's sums differ.
        """
        norms = {p: float(value.double().sum().sqrt()) for p, value in squared.items()}
        whole = math.sqrt(sum(norm**2 for norm in norms.values()))
        if not math.isfinite(whole):
            return False  # the next batch is checked
        faults: list[str] = []
        for parameter, (size, sketch, dtype) in self._expected.items():
            tolerance = AUTOCAST if self.autocast else TOLERANCE.get(dtype, AUTOCAST)
            # A parameter's gradients may be rounding alone (a bias that a softmax does not feel).
            rounding = SMALL * tolerance * whole
            if parameter not in squared:
                if size > rounding:
                    faults.append(
                        f"{name_of(parameter)} has a gradient of norm {size:.3g} and no recorded use"
                    )
                continue
            with _plain(parameter):
                weights = self.weights.to(torch.promote_types(dtype, torch.float32))
                got = _recorded(store, parameter, weights)
                off = float((got - sketch).square().mean().sqrt())
            # Rows' gradients may cancel in the sum; its rounding goes by the norms of the rows.
            scale = max(norms[parameter], size)
            if off > tolerance * scale + rounding:
                faults.append(f"{name_of(parameter)} is off by {off / scale:.2g} of its norm")
        if faults:
            raise InputError(
                f"The recorded per-sample gradients are not those of the rows: {'; '.join(faults[:3])}"
                f"{f'; and {len(faults) - 3} more' if len(faults) > 3 else ''}. Either what one row "
                f"computes depends on another (a mean over the batch, a loss over all tokens of the "
                f"batch), or a parameter is used in a way that grad_sample_mode='bk' does not see. "
                f"dpzoo.audit(model, batch) says which rows. Nothing was added to the sums."
            )
        return True


@contextmanager
def _plain(tensor: torch.Tensor) -> Iterator[None]:
    """No recording, no gradients, no autocast."""
    with (
        torch.no_grad(),
        torch._C.DisableTorchFunction(),
        torch.autocast(tensor.device.type, enabled=False),
    ):
        yield


def _norm(grad: torch.Tensor) -> float:
    return float((grad.coalesce().values() if grad.is_sparse else grad).norm())


def _sketch(grad: torch.Tensor) -> torch.Tensor:
    """Random products of a gradient, (SKETCHES,), whose mean square is about its squared norm."""
    size = len(grad) if grad.ndim else 1
    left, right = _sides(grad, size)
    if grad.is_sparse:  # of an embedding
        values = upcast(grad._values())
        return ((values @ right.t()) * left.t()[grad._indices()[0]]).double().sum(0)
    return ((upcast(grad.reshape(size, -1)) @ right.t()).t() * left).sum(1).double()


def _sides(like: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The random vectors for gradients of a shape, (SKETCHES, size) and (SKETCHES, the rest)."""
    draws = torch.Generator().manual_seed(like.numel())
    dtype = torch.promote_types(like.dtype, torch.float32)
    left, right = (
        torch.randn(SKETCHES, n, generator=draws).to(like.device, dtype)
        for n in (size, like.numel() // max(size, 1))
    )
    return left, right


def _recorded(store: FactorStore, parameter: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same products of a recorded weighted sum; of factors without forming it, (SKETCHES,)."""
    size = len(parameter) if parameter.ndim else 1
    uses = store.weighted_uses(parameter, weights)
    if not uses or any(isinstance(u, DenseGrads) or shape_of(u)[0] != size for u, _ in uses):
        return _sketch(store.weighted_sum(parameter, weights, forget=False))
    left, right = _sides(parameter, size)
    total = torch.zeros(SKETCHES, dtype=torch.float64, device=parameter.device)
    for use, own in uses:
        if isinstance(use, LinearFactors):
            sides = use.grads @ left.t().to(use.grads), use.inputs @ right.t().to(use.inputs)
        elif isinstance(use, EmbeddingFactors):
            sides = left.t()[use.ids].to(use.grads), use.grads @ right.t().to(use.grads)
        total += (sides[0] * sides[1] * own.view(-1, 1, 1)).double().sum((0, 1))
    return total
