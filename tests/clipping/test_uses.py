"""Layers written in every way, in mode "bk": each row's gradient against the row alone, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpzoo
from dpzoo.clipping.module import BookKeepingHooks, BookKeepingModule

Batch = dict[str, torch.Tensor]


class OneRow:
    """An optimizer that takes one row's gradient whole, and the others not at all."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.norms: dict[torch.Tensor, torch.Tensor] = {}

    def clip_factors(self, squared: Any, norms: torch.Tensor) -> Any:
        self.norms = {p: value.sqrt() for p, value in squared.items()}
        return {None: (torch.arange(len(norms)) == self.row).to(norms)}


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A loss for each row, (rows,), that gives every entry another gradient."""
    flat = out.flatten(1)
    weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return (flat.tanh() * weights).sum(1)


def row_gradients(model: nn.Module, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Each row alone, by autograd."""
    rows = len(next(iter(batch.values())))
    made = []
    for i in range(rows):
        loss = loss_of(model(**{k: v[i : i + 1] for k, v in batch.items()}))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss.sum(), [p for _, p in named], allow_unused=True)
        made.append({n: g for (n, _), g in zip(named, grads, strict=True) if g is not None})
    return made


def assert_exact(model: nn.Module, batch: Batch, tolerance: float = 1e-10) -> BookKeepingHooks:
    """Every row's gradient and its norm, in every parameter, equal those of the row alone."""
    torch.manual_seed(0)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * 0.4)
    wanted = row_gradients(model, batch)
    watched = BookKeepingHooks(model)
    for i, alone in enumerate(wanted):
        for p in model.parameters():
            p.summed_grad = None  # type: ignore[attr-defined]
        one = OneRow(i)
        watched.backward(loss_of(model(**batch)), one)  # type: ignore[arg-type]
        scale = sum(float(g.square().sum()) for g in alone.values()) ** 0.5
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            got = p.summed_grad if p.summed_grad is not None else torch.zeros_like(p)  # type: ignore[attr-defined]
            want = alone.get(name, torch.zeros_like(p))
            assert float((got - want).norm()) <= tolerance * scale, (name, i)
            if name in alone:
                assert abs(float(one.norms[p][i] - want.norm())) <= tolerance * scale, (name, i)
    watched.cleanup()
    return watched


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- parameters anywhere ----------------------------------------------------------------------------


class Made(nn.Module):
    """A model of some parameters and a function of them and the input."""

    def __init__(self, forward: Callable[..., torch.Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(floats(*shape)))

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.function(self, **batch)


ROWS, SEQ, DIM = 3, 5, 4

FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": (6, DIM), "b": (6,)}),
    "matmul": (lambda m, x: x @ m.w, {"w": (DIM, 6)}),
    "matmul of the transposed": (lambda m, x: x @ m.w.t() + x @ m.w.T, {"w": (6, DIM)}),
    "matmul from the left": (lambda m, x: m.w @ x, {"w": (7, SEQ)}),
    "matmul per head": (
        lambda m, x: x.view(len(x), SEQ, 2, 2).transpose(1, 2) @ m.w,
        {"w": (2, 2, 3)},
    ),
    "addmm": (
        lambda m, x: torch.addmm(m.b, x.view(-1, DIM), m.w).view(len(x), SEQ, 6),
        {"b": (6,), "w": (DIM, 6)},
    ),
    "addmm, scaled": (
        lambda m, x: torch.addmm(m.b, x.view(-1, DIM), m.w, alpha=2).view(len(x), SEQ, 6),
        {"b": (6,), "w": (DIM, 6)},
    ),
    "a slice of a weight": (lambda m, x: F.linear(x, m.w[:3]) + F.linear(x, m.w[3:]), {"w": (6, DIM)}),
    "overlapping slices": (
        lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[2:]),
        {"w": (6, DIM)},
    ),
    "chunks along the input": (
        lambda m, x: F.linear(x[..., :2], m.w[:, :2]) + F.linear(x[..., 2:], m.w[:, 2:]),
        {"w": (6, DIM)},
    ),
    "experts in one parameter": (
        lambda m, x: F.linear(x, m.w[0]) * F.linear(x, m.w[1]),
        {"w": (2, 6, DIM)},
    ),
    "normalised weight": (lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), {"w": (6, DIM)}),
    "low rank": (lambda m, x: F.linear(x, m.a @ m.b), {"a": (6, 2), "b": (2, DIM)}),
    "functional tie": (
        lambda m, x: F.linear(F.linear(x, m.w), m.w.t()),
        {"w": (6, DIM)},
    ),
    "custom RMS norm": (
        lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        {"w": (DIM,)},
    ),
    "one plus the weight": (lambda m, x: (1.0 + m.w.float()) * x, {"w": (DIM,)}),
    "scale and shift, in place": (
        lambda m, x: (x * 1).mul_(m.w).add_(m.b),
        {"w": (DIM,), "b": (DIM,)},
    ),
    "position table, sliced": (lambda m, x: x + m.w[:SEQ], {"w": (9, DIM)}),
    "position table, looked up": (
        lambda m, x: x + F.embedding(torch.arange(SEQ).unsqueeze(0), m.w),
        {"w": (9, DIM)},
    ),
    "class token, expanded": (
        lambda m, x: torch.cat([m.w.expand(len(x), -1, -1), x], 1),
        {"w": (1, 1, DIM)},
    ),
    "class token, repeated": (
        lambda m, x: torch.cat([m.w.repeat(len(x), 1, 1), x], 1),
        {"w": (1, 1, DIM)},
    ),
    "class token, stacked by hand": (
        lambda m, x: torch.cat([torch.stack([m.w] * len(x)), x], 1),
        {"w": (2, DIM)},
    ),
    "written into rows": (lambda m, x: _written(m, x), {"w": (DIM,)}),
    "masked positions": (
        lambda m, x: torch.where((x.sum(-1, keepdim=True) > 0), m.w, x),
        {"w": (DIM,)},
    ),
    "attention bias": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.w[:SEQ, :SEQ]),
        {"w": (9, 9)},
    ),
    "learned queries": (
        lambda m, x: F.scaled_dot_product_attention(m.w.expand(len(x), -1, -1), x, x),
        {"w": (1, 3, DIM)},
    ),
    "prelu": (lambda m, x: F.prelu(x.transpose(1, 2), m.w), {"w": (DIM,)}),
    "convolution": (lambda m, x: F.conv1d(x.transpose(1, 2), m.w, m.b, padding=1), {"w": (6, DIM, 3), "b": (6,)}),
    "patches": (
        lambda m, x: F.conv2d(x[:, :4].unsqueeze(1), m.w, m.b, stride=2),
        {"w": (6, 1, 2, 2), "b": (6,)},
    ),
    "transposed convolution": (lambda m, x: F.conv_transpose1d(x.transpose(1, 2), m.w), {"w": (DIM, 6, 3)}),
    "group norm": (lambda m, x: F.group_norm(x.transpose(1, 2), 2, m.w, m.b), {"w": (DIM,), "b": (DIM,)}),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), {"w": (6, DIM, DIM)}),
    "einsum, linear": (lambda m, x: torch.einsum("bti,ihd->bthd", x, m.w), {"w": (DIM, 2, 3)}),
    "einsum, per position": (lambda m, x: torch.einsum("bti,tio->bto", x, m.w), {"w": (SEQ, DIM, 3)}),
    "einsum, rows second": (
        lambda m, x: torch.einsum("tbi,oi->tbo", x.transpose(0, 1), m.w).transpose(0, 1),
        {"w": (6, DIM)},
    ),
    "rows second": (
        lambda m, x: (F.linear(x.transpose(0, 1), m.w) + m.b).transpose(0, 1),
        {"w": (6, DIM), "b": (6,)},
    ),
    "rows folded with positions": (
        lambda m, x: (F.linear(x.reshape(-1, DIM), m.w) * m.b).view(len(x), SEQ, 6),
        {"w": (6, DIM), "b": (6,)},
    ),
    "positions folded with rows": (
        lambda m, x: F.linear(x.transpose(0, 1).reshape(-1, DIM), m.w).view(SEQ, len(x), 6).transpose(0, 1),
        {"w": (6, DIM)},
    ),
    "heads folded with rows": (
        lambda m, x: (x.view(len(x), SEQ, 2, 2).transpose(1, 2).reshape(-1, SEQ, 2) @ m.w).view(len(x), -1),
        {"w": (2, 3)},
    ),
    "rows twice": (
        lambda m, x: F.linear(torch.cat([x, x * 2]), m.w).view(2, len(x), SEQ, 6).transpose(0, 1),
        {"w": (6, DIM)},
    ),
    "the last position of each row": (
        lambda m, x: F.linear(x[torch.arange(len(x)), (x[..., 0].argmax(1))], m.w),
        {"w": (6, DIM)},
    ),
    "tokens picked by a mask": (lambda m, x: _picked(m, x), {"w": (DIM, DIM), "b": (DIM,)}),
    "lstm": (
        lambda m, x: torch.lstm(
            x, [x.new_zeros(1, len(x), 3)] * 2, [m.i, m.h, m.bi, m.bh], True, 1, 0.0, False, False, True
        )[0],
        {"i": (12, DIM), "h": (12, 3), "bi": (12,), "bh": (12,)},
    ),
    "gru cell": (
        lambda m, x: torch.gru_cell(x[:, 0], x[:, 1, :3], m.i, m.h),
        {"i": (9, DIM), "h": (9, 3)},
    ),
}


def _written(m: Any, x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[:, 1] = m.w
    return out


def _picked(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A mixture's way: tokens of all rows in one list, and back."""
    flat = x.reshape(-1, DIM)
    chosen = torch.where(flat[:, 0] > 0)[0]
    out = torch.zeros_like(flat)
    out.index_add_(0, chosen, F.linear(flat[chosen], m.w) * m.b)
    return out.view(len(x), SEQ, DIM)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(1)
    assert_exact(Made(function, **shapes), {"x": floats(ROWS, SEQ, DIM)}, 1e-6 if "plus" in name else 1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_many_rows_as_positions_and_features(name: str) -> None:
    """Sizes that coincide: rows are followed, not guessed."""
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(1)
    for rows in (1, DIM, SEQ, 2, 6):
        assert_exact(Made(function, **shapes), {"x": floats(rows, SEQ, DIM)}, 1e-6 if "plus" in name else 1e-10)
