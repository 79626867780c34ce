"""What was tried to make mode "bk" wrong without an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dpzoo
from dpzoo.clipping.module import BookKeepingHooks
from tests.clipping.test_uses import DIM, ROWS, SEQ, OneRow, assert_exact, floats, loss_of


class Made(nn.Module):
    """A model of some parameters and a function of them and the input."""

    def __init__(self, function: Callable[..., torch.Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _doubled(m: Any, x: torch.Tensor) -> torch.Tensor:
    found = F.embedding(torch.arange(SEQ), m.w)
    found *= 2
    return x + found


def _part_doubled(m: Any, x: torch.Tensor) -> torch.Tensor:
    found = F.embedding(torch.arange(SEQ), m.w).unsqueeze(0)
    found[:, 0] *= 2
    return x + found


def _copies_changed(m: Any, x: torch.Tensor) -> torch.Tensor:
    copies = m.w.repeat(SEQ, 1)
    copies[0] *= 3
    return x + copies


def _view_of_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    part = x[:, 1:][:, :2]
    part += m.w
    return x


def _unsorted(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A mixture's way: tokens sorted by expert, and put back by number."""
    flat = x.reshape(-1, DIM)
    shares = (flat @ m.gate).softmax(-1)
    expert = shares.argmax(-1)
    order = expert.argsort()
    parts = flat[order].split(expert.bincount(minlength=3).tolist())
    done = torch.cat([F.linear(part, w) for part, w in zip(parts, m.w, strict=True)])
    out = torch.empty_like(done)
    out[order] = done
    return (out * shares.gather(1, expert[:, None]) * m.scale).view(len(x), SEQ, DIM)


EXACT: dict[str, tuple[Callable[..., torch.Tensor], dict[str, tuple[int, ...]]]] = {
    "windows of a vector": (lambda m, x: x[:, :3, :2] * m.w.unfold(0, 2, 1), {"w": (4,)}),
    "windows as a weight": (lambda m, x: F.linear(x, m.w.unfold(0, DIM, 1)), {"w": (9,)}),
    "windows as a weight, turned": (lambda m, x: x @ m.w.unfold(0, DIM, 1).t(), {"w": (9,)}),
    "a view that meets itself": (
        lambda m, x: x[:, :2, :2] * m.w.as_strided((2, 2), (1, 1)),
        {"w": (4,)},
    ),
    "a column-major weight": (
        lambda m, x: x @ torch.linalg.inv(m.w + 5 * torch.eye(DIM).to(x)),
        {"w": (DIM, DIM)},
    ),
    "a look-up that is doubled": (_doubled, {"w": (9, DIM)}),
    "a look-up, a part of which is doubled": (_part_doubled, {"w": (9, DIM)}),
    "copies that are changed": (_copies_changed, {"w": (1, DIM)}),
    "a view of a view": (_view_of_a_view, {"w": (DIM,)}),
    "a temperature": (
        lambda m, x: (x @ x.transpose(1, 2)) / m.w.exp().clamp(max=100),
        {"w": ()},
    ),
    "take_along_dim": (
        lambda m, x: torch.take_along_dim(x * m.w, x.argsort(-1), -1) * m.w,
        {"w": (DIM,)},
    ),
    "renorm by rows": (lambda m, x: (x * m.w).renorm(2, 0, 0.5) * m.w, {"w": (DIM,)}),
    "tokens sorted by expert": (
        _unsorted,
        {"gate": (DIM, 3), "w": (3, DIM, DIM), "scale": (DIM,)},
    ),
    "a parameter where a mask is true": (
        lambda m, x: x.masked_fill(x > 0, m.w) + (x * 1).masked_fill_(x < 0, m.w),
        {"w": ()},
    ),
    "filled with a parameter": (lambda m, x: x + torch.zeros_like(x).fill_(m.w), {"w": ()}),
    "einsum without a sum": (lambda m, x: torch.einsum("bti,o->btio", x, m.w), {"w": (6,)}),
    "einsum, a diagonal": (
        lambda m, x: torch.einsum("btt,to->bo", x[:, :4], m.w),
        {"w": (4, 6)},
    ),
    "einsum, all features": (
        lambda m, x: torch.einsum("k,kbtd->btd", m.w, torch.stack([x, x * 2, x.sin()])),
        {"w": (3,)},
    ),
    "a weight of one feature": (lambda m, x: F.linear(x, m.w[0])[..., None], {"w": (6, DIM)}),
    "a mixture of layers": (
        lambda m, x: torch.stack([x, x * 2, x.sin()], -1) @ m.w.softmax(0),
        {"w": (3,)},
    ),
    "a spectrum": (
        lambda m, x: torch.fft.irfft(
            torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), n=SEQ, dim=1
        ),
        {"w": (3, DIM, 2)},
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    function, shapes = EXACT[name]
    for rows in (ROWS, SEQ, DIM, 2, 1):
        torch.manual_seed(1)
        assert_exact(Made(function, **shapes), {"x": floats(rows, SEQ, DIM)})


# --- later batches ------------------------------------------------------------------------------------


class Permute(torch.autograd.Function):
    """Rows in another order, in a function that torch does not show."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.order = order
        with torch._C.DisableTorchFunction():
            return x[order]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        out = torch.empty_like(grad)
        out[ctx.order] = grad
        return out, None


def _changed_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    scale = m.w * 2
    out = x + scale
    if x[0, 0, 0] > 5:
        scale *= 3
    return out


def _where_large(how: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda m, x: how(x * m.w) if x[0, 0, 0] > 5 else x * m.w


LATER: dict[str, Callable[..., torch.Tensor]] = {
    "a mean": _where_large(lambda h: h - h.mean(0)),
    "a mean without a gradient": _where_large(lambda h: h - h.detach().mean(0)),
    "turned round": _where_large(lambda h: h.flip(0)),
    "sorted": lambda m, x: (x * m.w)[x[:, 0, 0].argsort()],
    "sorted, out of sight": lambda m, x: Permute.apply(x * m.w, x[:, 0, 0].argsort()),  # type: ignore[no-any-return]
    "shortened to a norm": lambda m, x: (x * m.w).renorm(2, 1, 1e3),
    "a maximum with the mean": lambda m, x: torch.maximum(x * m.w, (x * m.w).mean(0) - 1e3),
    "a parameter's tensor changed in place": _changed_later,
    "similarities": lambda m, x: (x * m.w).flatten(1) @ (x * m.w).flatten(1).t(),
}


def _batch(rows: int = ROWS, large: bool = False, order: bool = True) -> torch.Tensor:
    x = floats(rows, SEQ, DIM)
    x[:, 0, 0] = torch.arange(rows) * (0.1 if order else -0.1)
    if large:
        x = x + 1e4
        x[:, 0, 0] = 9 - torch.arange(rows) * 0.1
    return x


@pytest.mark.parametrize("first", ["as many rows", "one row", "a row that is not finite"])
@pytest.mark.parametrize("name", LATER)
def test_a_first_batch_that_hides_it(name: str, first: str) -> None:
    """Batches that are right, or cannot be compared, do not vouch for those that are not."""
    torch.manual_seed(1)
    model = Made(LATER[name], w=(DIM,))
    watched = BookKeepingHooks(model)
    before = _batch(1 if first == "one row" else ROWS)
    if first == "a row that is not finite":
        before[0, 1, 1] = torch.nan
    try:
        watched.backward(loss_of(model(before)), OneRow(model))
    except dpzoo.DpzooError:
        assert name not in ("a mean", "turned round")  # these hide
    taken = OneRow(model)
    with pytest.raises(dpzoo.DpzooError, match=r"not those of the rows|changed in place after add"):
        watched.backward(loss_of(model(_batch(large=True))), taken)
    assert not taken.sums


def test_a_gate_that_starts_at_zero_hides_nothing_for_long() -> None:
    """As LoRA's B: what is below it has no gradient in the first batch."""
    torch.manual_seed(1)
    order = torch.tensor([1, 2, 0])
    model = Made(lambda m, x: x * m.w + Permute.apply(x * m.w, order) * m.gate.exp(), w=(DIM,))
    model.gate = nn.Parameter(torch.full((), -torch.inf, dtype=torch.float64), requires_grad=False)
    watched = BookKeepingHooks(model)
    watched.backward(loss_of(model(_batch())), OneRow(model))
    model.gate.data.zero_()
    with pytest.raises(dpzoo.InputError, match="not those of the rows"):
        watched.backward(loss_of(model(_batch())), OneRow(model))


def test_the_first_of_two_calls_counts() -> None:
    """A siamese model: what the first call did is part of the kind of batch."""
    torch.manual_seed(1)

    def hidden(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * m.w)[x[:, 0, 0].argsort()] if x[1, 0, 0] < 0 else x * m.w

    model = Made(hidden, w=(DIM,))
    watched = BookKeepingHooks(model)

    def losses(order: bool) -> torch.Tensor:
        return loss_of(model(_batch(order=order))) + loss_of(model(_batch()))

    for _ in range(2):  # the third is not checked, if it is of the same kind
        watched.backward(losses(True), OneRow(model))
    with pytest.raises(dpzoo.InputError, match="not those of the rows"):
        watched.backward(losses(False), OneRow(model))


def test_a_gradient_inside_the_forward_is_refused() -> None:
    def force(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(F.linear(x, m.w).tanh().sum(), x, create_graph=True)[0]

    model = Made(force, w=(6, DIM))
    BookKeepingHooks(model)
    with pytest.raises(dpzoo.UnsupportedModelError, match="forward computes a gradient itself"):
        model(floats(ROWS, SEQ, DIM))


# --- what users do ------------------------------------------------------------------------------------


def test_the_mode_is_off_after_whatever_the_forward_does() -> None:
    """A hook that raises before the recording begins; a forward that turns gradients off."""
    raising, off = [True], [False]

    def raises(module: nn.Module, args: Any) -> None:
        if raising[0]:
            raise ValueError("a user's")

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        out = x * m.w
        if off[0]:
            torch.set_grad_enabled(False)
        return out

    model = Made(forward, w=(DIM,))
    model.register_forward_pre_hook(raises)
    watched = BookKeepingHooks(model)
    with pytest.raises(ValueError, match="a user's"):
        model(floats(ROWS, SEQ, DIM))
    raising[0] = False
    for off[0] in (False, True, False):
        with torch.enable_grad():
            out = model(floats(ROWS, SEQ, DIM))
        assert not torch.overrides._get_current_function_mode_stack()
        if not off[0]:
            taken = OneRow(model)
            watched.backward(loss_of(out), taken)
            assert taken.sums


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_batch_without_a_finite_row_adds_nothing(rows: int) -> None:
    model = Made(lambda m, x: x * m.w * m.scale, w=(DIM,), scale=())
    watched, taken = BookKeepingHooks(model), OneRow(model)
    watched.backward(loss_of(model(floats(rows, SEQ, DIM) * torch.nan)), taken)
    assert watched.nonfinite_rows == rows
    assert all(not total.any() for total in taken.sums.values())


def test_calls_with_other_rows_are_refused() -> None:
    model = Made(lambda m, x: F.linear(x, m.w), w=(6, DIM))
    watched = BookKeepingHooks(model)
    losses = loss_of(model(floats(1, SEQ, DIM)) - model(floats(ROWS, SEQ, DIM)))
    with pytest.raises(
        dpzoo.InputError, match="3 rows and come through a call of the model with 1"
    ):
        watched.backward(losses, OneRow(model))


def test_losses_without_a_gradient_are_refused() -> None:
    model = Made(lambda m, x: F.linear(x, m.w), w=(6, DIM))
    watched = BookKeepingHooks(model)
    with torch.no_grad():
        losses = loss_of(model(floats(ROWS, SEQ, DIM)))
    with pytest.raises(dpzoo.InputError, match=r"no gradient .* neither torch\.no_grad"):
        watched.backward(losses, OneRow(model))


def test_complex_parameters_are_refused() -> None:
    model = Made(lambda m, x: (x * m.w).real, w=(DIM,)).to(torch.complex128)
    with pytest.raises(dpzoo.UnsupportedModelError, match="w is complex"):
        BookKeepingHooks(model)
