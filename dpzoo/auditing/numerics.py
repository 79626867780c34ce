"""Comparing gradients, per row and per parameter."""

from collections.abc import Mapping

import torch

Gradients = dict[str, torch.Tensor]
"""Parameter name -> gradient; per-sample gradients have the rows first."""

TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
"""How far a gradient may be off, relative to its parameter's largest entry.

float64 rounds at 1e-16, but many losses (transformers' among them) are computed in float32 whatever
the model's dtype. The bugs that an audit is there for are larger by orders of magnitude.
"""


def largest(gradients: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute value of all."""
    return max((top(g) for g in gradients.values()), default=0.0)


def top(value: torch.Tensor) -> float:
    """The largest absolute value; NaN if there is one. One pass, no copy."""
    return float(torch.linalg.vector_norm(value, torch.inf)) if value.numel() else 0.0


def errors(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far gradients are off, relative to the parameter's largest entry; worst first.

    A parameter whose true gradient vanishes (an attention key's bias, say) is measured against a
    tenth of the largest gradient of all: its rounding has that size.

    Args:
        got: the gradients to judge; compared under the names they have in common with ``wanted``.
        wanted: the true ones.
    """
    floor = 0.1 * largest(wanted)
    off = {}
    for name, gradient in got.items():
        if name not in wanted:
            continue
        truth = wanted[name]
        error = 0.0
        if gradient.shape != truth.shape:
            error = float("inf")
        elif truth.numel():
            difference, scale = top(gradient - truth), max(top(truth), floor)
            # NaN is off without limit, too.
            error = difference / scale if scale and difference == difference else float("inf")
            error = 0.0 if difference == 0 else error
        off[name] = error
    return dict(sorted(off.items(), key=lambda item: -item[1]))


def disagreements(
    got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float
) -> dict[str, float]:
    """The parameters whose `errors` are larger than rounding.

    Args:
        got: as in `errors`.
        wanted: as in `errors`.
        tolerance: the largest relative error that counts as rounding.
    """
    return {name: error for name, error in errors(got, wanted).items() if not error <= tolerance}


def row_norms(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The norm of each row's gradient over all parameters, (rows,)."""
    squares = [g.reshape(len(g), -1).square().sum(1) for g in rows.values()]
    return torch.stack(squares).sum(0).sqrt()


def gram(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Inner products of the rows' gradients, (rows, rows)."""
    return torch.stack([(f := g.reshape(len(g), -1)) @ f.T for g in rows.values()]).sum(0)


def clip_factors(norms: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """Opacus' clip factors, min(1, C / (norm + 1e-6)), (rows,)."""
    return (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)


def clip_and_sum(rows: Mapping[str, torch.Tensor], factors: torch.Tensor) -> Gradients:
    """The sum over rows of each row's gradient times its factor."""
    return {name: torch.einsum("i,i...->...", factors.to(g), g) for name, g in rows.items()}
