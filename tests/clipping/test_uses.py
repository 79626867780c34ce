"""Layers written in every way, in mode "bk": each row's gradient against the row alone, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpzoo
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.module import BookKeepingHooks
from dpzoo.clipping.optimizer import BookKeepingOptimizer

Batch = dict[str, torch.Tensor]


class OneRow(BookKeepingOptimizer):
    """An optimizer that takes one row's gradient whole, and the others not at all."""

    def __init__(self, model: nn.Module, row: int = 0) -> None:
        super().__init__(
            torch.optim.SGD(model.parameters(), lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
        )
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


def unit_gradients(rows: list[dict[str, Any]], ids: Any) -> list[dict[str, torch.Tensor]]:
    """The means over each unit's rows, units as they come."""
    made: list[dict[str, torch.Tensor]] = []
    for unit in dict.fromkeys(ids):
        own = [row for row, of in zip(rows, ids, strict=True) if of == unit]
        names = dict.fromkeys(name for row in own for name in row)
        made.append({n: sum(r[n] for r in own if n in r) / len(own) for n in names})  # type: ignore[misc]
    return made


def assert_exact(
    model: nn.Module, batch: Batch, tolerance: float = 1e-10, ids: Any = None
) -> BookKeepingHooks:
    """Every row's gradient and its norm, in every parameter, equal those of the row alone.

    With ``ids``, the ids of the rows' units: every unit's equal the mean of its rows', each alone.
    """
    torch.manual_seed(0)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn_like(p) * 0.4)
    wanted = row_gradients(model, batch)
    wanted = wanted if ids is None else unit_gradients(wanted, ids)
    watched = BookKeepingHooks(model)
    for i, alone in enumerate(wanted):
        one = OneRow(model, i)
        watched.backward(loss_of(model(**batch)), one, ids)
        scale = sum(float(g.square().sum()) for g in alone.values()) ** 0.5
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            got = one.sums.get(p, torch.zeros_like(p))
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
    "a slice of a weight": (
        lambda m, x: F.linear(x, m.w[:3]) + F.linear(x, m.w[3:]),
        {"w": (6, DIM)},
    ),
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
    "convolution": (
        lambda m, x: F.conv1d(x.transpose(1, 2), m.w, m.b, padding=1),
        {"w": (6, DIM, 3), "b": (6,)},
    ),
    "patches": (
        lambda m, x: F.conv2d(x[:, :4].unsqueeze(1), m.w, m.b, stride=2),
        {"w": (6, 1, 2, 2), "b": (6,)},
    ),
    "transposed convolution": (
        lambda m, x: F.conv_transpose1d(x.transpose(1, 2), m.w),
        {"w": (DIM, 6, 3)},
    ),
    "group norm": (
        lambda m, x: F.group_norm(x.transpose(1, 2), 2, m.w, m.b),
        {"w": (DIM,), "b": (DIM,)},
    ),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), {"w": (6, DIM, DIM)}),
    "einsum, linear": (lambda m, x: torch.einsum("bti,ihd->bthd", x, m.w), {"w": (DIM, 2, 3)}),
    "einsum, per position": (
        lambda m, x: torch.einsum("bti,tio->bto", x, m.w),
        {"w": (SEQ, DIM, 3)},
    ),
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
        lambda m, x: (
            F.linear(x.transpose(0, 1).reshape(-1, DIM), m.w).view(SEQ, len(x), 6).transpose(0, 1)
        ),
        {"w": (6, DIM)},
    ),
    "heads folded with rows": (
        lambda m, x: (x.view(len(x), SEQ, 2, 2).transpose(1, 2).reshape(-1, SEQ, 2) @ m.w).view(
            len(x), -1
        ),
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
            x,
            [x.new_zeros(1, len(x), 3)] * 2,
            [m.i, m.h, m.bi, m.bh],
            True,
            1,
            0.0,
            False,
            False,
            True,
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
    assert_exact(
        Made(function, **shapes), {"x": floats(ROWS, SEQ, DIM)}, 1e-6 if "plus" in name else 1e-10
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_many_rows_as_positions_and_features(name: str) -> None:
    """Sizes that coincide: rows are followed, not guessed."""
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(1)
    for rows in (1, DIM, SEQ, 2, 6):
        assert_exact(
            Made(function, **shapes),
            {"x": floats(rows, SEQ, DIM)},
            1e-6 if "plus" in name else 1e-10,
        )


# --- whole layers -----------------------------------------------------------------------------------


class Around(nn.Module):
    """A layer between two linear ones."""

    def __init__(self, layer: nn.Module, call: Any = None, into: int = DIM, out: int = DIM) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(DIM, into), layer, nn.Linear(out, 3)
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.call(self.layer, self.before(x)))


def channels(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(rows, seq, channels) through a layer of (rows, channels, seq)."""
    return layer(x.transpose(1, 2)).transpose(1, 2)


class Scaled(nn.Module):
    """A layer of one's own: a parameter, a flag, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.twice = nn.Parameter(torch.ones(DIM)), True
        self.register_buffer("offset", torch.arange(DIM, dtype=torch.float64))

    def forward(self, x: torch.Tensor, power: float = 1.0) -> torch.Tensor:
        out = (x * self.scale + self.offset).tanh() ** power
        return out * 2 if self.twice else out


class InPlace(nn.Module):
    """In-place operations on a layer's output and on views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bias = nn.Linear(DIM, 2 * DIM), nn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.one(x)
        out += 1
        left, right = out[..., :DIM], out[..., DIM:]
        left *= 2
        right += self.bias
        out[:, 0] = 0
        return out[..., :DIM] + out[..., DIM:]


class Lists(nn.Module):
    """Parameters in a list and in a dictionary, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(floats(DIM, DIM)) for _ in range(3)])
        self.dict = nn.ParameterDict({"a": nn.Parameter(floats(DIM))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in (*self.list, self.list[0]):
            x = torch.tanh(x @ weight) + self.dict["a"]
        return x


class Function(torch.autograd.Function):
    """A function of one's own, of rows alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0].cos()


def packed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)[0]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Around(nn.LSTM(DIM, 3, batch_first=True), packed, out=3),
    "LSTM, two layers, both ways, rows second": lambda: Around(
        nn.LSTM(DIM, 3, num_layers=2, bidirectional=True),
        lambda m, x: m(x.transpose(0, 1))[0].transpose(0, 1),
        out=6,
    ),
    "GRU": lambda: Around(nn.GRU(DIM, 3, batch_first=True), packed, out=3),
    "RNN": lambda: Around(nn.RNN(DIM, 3, batch_first=True), packed, out=3),
    "MultiheadAttention": lambda: Around(
        nn.MultiheadAttention(DIM, 2, batch_first=True), lambda m, x: m(x, x, x)[0]
    ),
    "MultiheadAttention, rows second": lambda: Around(
        nn.MultiheadAttention(DIM, 2),
        lambda m, x: m(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1),
    ),
    "MultiheadAttention, other keys": lambda: Around(
        nn.MultiheadAttention(DIM, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True),
        lambda m, x: m(x, x[..., :3], x[..., :2])[0],
    ),
    "TransformerEncoderLayer": lambda: Around(
        nn.TransformerEncoderLayer(DIM, 2, 6, dropout=0.0, batch_first=True)
    ),
    "TransformerDecoderLayer": lambda: Around(
        nn.TransformerDecoderLayer(DIM, 2, 6, dropout=0.0, batch_first=True),
        lambda m, x: m(x, x * 2),
    ),
    **{
        f"Conv1d, {mode}": (
            lambda mode=mode: Around(
                nn.Conv1d(DIM, 6, 3, padding=1, padding_mode=mode), channels, out=6
            )
        )
        for mode in ("zeros", "circular", "reflect", "replicate")
    },
    "Conv1d, groups, dilation": lambda: Around(
        nn.Conv1d(DIM, 6, 2, groups=2, dilation=2), channels, out=6
    ),
    "Conv2d": lambda: Around(
        nn.Conv2d(1, 2, 3, padding="same"), lambda m, x: m(x.unsqueeze(1)).sum(1)
    ),
    "ConvTranspose1d": lambda: Around(nn.ConvTranspose1d(DIM, 6, 3), channels, out=6),
    "GroupNorm": lambda: Around(nn.GroupNorm(2, DIM), channels),
    "InstanceNorm": lambda: Around(nn.InstanceNorm1d(DIM, affine=True), channels),
    "RMSNorm": lambda: Around(nn.RMSNorm(DIM)),
    "PReLU": lambda: Around(nn.PReLU(SEQ)),
    "Bilinear": lambda: Around(nn.Bilinear(DIM, DIM, 3), lambda m, x: m(x, x * 2), out=3),
    "a layer of one's own": lambda: Around(Scaled(), lambda m, x: m(x, power=2.0)),
    "in place": lambda: Around(InPlace()),
    "lists": lambda: Around(Lists()),
    "a layer called twice": lambda: Around(nn.Linear(DIM, DIM), lambda m, x: m(m(x).tanh())),
    "BatchNorm in eval mode": lambda: Around(nn.BatchNorm1d(DIM).eval(), channels),
    "weight norm": lambda: Around(nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM))),
    "orthogonal": lambda: Around(
        nn.utils.parametrizations.orthogonal(nn.Linear(DIM, DIM), use_trivialization=False)
    ),
    "a function of one's own": lambda: Around(
        nn.Linear(DIM, DIM), lambda m, x: Function.apply(m(x))
    ),
    "checkpointed": lambda: Around(
        nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, DIM)),
        lambda m, x: checkpoint(m, x, use_reentrant=False),
    ),
    "checkpointed, rows second": lambda: Around(
        nn.Sequential(nn.Linear(DIM, 6), Scaled6(), nn.Linear(6, DIM)),
        lambda m, x: checkpoint(m, x.transpose(0, 1), use_reentrant=False).transpose(0, 1),
    ),
    "functional_call": lambda: Around(
        nn.Linear(DIM, DIM),
        lambda m, x: torch.func.functional_call(
            m, {k: v * 2 for k, v in m.named_parameters()}, (x,)
        ),
    ),
}


class Scaled6(nn.Module):
    """A scale of six features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    for rows in (ROWS, SEQ, DIM):
        torch.manual_seed(1)
        assert_exact(LAYERS[name]().double(), {"x": floats(rows, SEQ, DIM)})


@pytest.mark.parametrize("name", ["DPLSTM", "DPGRU", "DPMultiheadAttention"])
def test_opacus_layers(name: str) -> None:
    from opacus import layers

    made = {
        "DPLSTM": lambda: Around(layers.DPLSTM(DIM, 3, batch_first=True), packed, out=3),
        "DPGRU": lambda: Around(layers.DPGRU(DIM, 3, batch_first=True), packed, out=3),
        "DPMultiheadAttention": lambda: Around(
            layers.DPMultiheadAttention(DIM, 2, dropout=0.0),
            lambda m, x: m(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
        ),
    }[name]()
    torch.manual_seed(1)
    assert_exact(made.double(), {"x": floats(ROWS, SEQ, DIM)})


def test_user_hooks_and_instance_forwards() -> None:
    """What changes a layer's output changes the gradients, and the recorded ones with it."""
    model = Around(nn.Linear(DIM, DIM)).double()
    model.layer.register_forward_hook(lambda module, args, out: out * 3)
    model.before.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.after.forward = lambda x: F.linear(x, model.after.weight).cos()  # type: ignore[method-assign]
    model.layer.register_full_backward_hook(lambda module, grads, outs: (grads[0] * 0.5,))
    torch.manual_seed(1)
    assert_exact(model, {"x": floats(ROWS, SEQ, DIM)})


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(9, DIM, mode=mode), nn.Linear(DIM, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.bag(x))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode: str) -> None:
    """Repeated words too, which Opacus' sampler counts once."""
    torch.manual_seed(1)
    assert_exact(
        Bag(mode).double(), {"x": torch.tensor([[1, 1, 2], [3, 4, 3], [0, 8, 8], [5, 5, 5]])}
    )


class Lookups(nn.Module):
    """A table with a padding row, looked up in two ways and tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, DIM, padding_idx=0), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.table(x) + self.table.weight[x] * 0.5
        return F.linear(self.mix(hidden).tanh(), self.table.weight)


def test_look_ups_and_ties() -> None:
    torch.manual_seed(1)
    ids = torch.tensor([[1, 2, 0], [3, 3, 3], [6, 0, 0], [5, 4, 1]])
    assert_exact(Lookups().double(), {"x": ids})


class Tables(nn.Module):
    """Tables that are computed, a part of another, and looked up by ids that the model makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.types = nn.Embedding(2, DIM)
        self.scaled, self.part = nn.Parameter(floats(11, DIM)), nn.Parameter(floats(15, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = (torch.arange(x.shape[1]) % 2).expand(x.shape)
        tables = F.embedding(x, self.scaled * 2) + F.embedding(x, self.part[2:13], padding_idx=3)
        return (tables * (self.types(made.clone()) + self.types(x % 2))).tanh()


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_tables_of_every_kind(rows: int) -> None:
    torch.manual_seed(1)
    assert_exact(Tables().double(), {"x": torch.randint(0, 11, (rows, 3))})


def test_ids_that_the_model_makes_cost_what_the_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    enter = FactorStore.add_embedding

    def watched(self: FactorStore, z: Any, ids: torch.Tensor, *rest: Any) -> None:
        shapes.append(tuple(ids.shape))
        enter(self, z, ids, *rest)

    monkeypatch.setattr(FactorStore, "add_embedding", watched)
    torch.manual_seed(1)
    assert_exact(Tables().double(), {"x": torch.randint(0, 11, (4, 3))})
    assert set(shapes) == {(4, 3)}


# --- refused, by name ---------------------------------------------------------------------------------


class MeanTaken(nn.Module):
    """Rows meet below a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.one(x)
        return self.two(hidden - hidden.mean(0))


class Frozen(nn.Module):
    """Rows meet where no parameter follows."""

    def __init__(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.one, self.how = nn.Linear(DIM, DIM), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self.one(x))


class Whole(torch.autograd.Function):
    """A linear layer in a function that torch does not show."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.t(), torch.einsum("...i,...o->io", x, grad)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.w = nn.Linear(DIM, DIM), nn.Parameter(floats(DIM, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Whole.apply(self.one(x), self.w)


def _mixed_up(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mean below a layer": (MeanTaken, "combined by|not those of the rows|combines rows"),
    "a mean at the end": (lambda: Frozen(lambda x: x - x.mean(0)), "not those of the rows"),
    "rows turned round": (lambda: Frozen(_mixed_up), "not those of the rows"),
    "similarities of rows": (
        lambda: Frozen(lambda x: x.flatten(1) @ x.flatten(1).t()),
        "not those of the rows",
    ),
    "BatchNorm in training mode": (lambda: Around(nn.BatchNorm1d(DIM), channels), "batch_norm"),
    "BatchNorm without parameters": (
        lambda: Around(nn.BatchNorm1d(DIM, affine=False), channels),
        "combined by batch_norm|not those of the rows|combines rows",
    ),
    "a parameter in a function that torch does not show": (Hidden, "that torch does not show"),
}


@pytest.mark.parametrize("rows", [ROWS, DIM, SEQ])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, rows: int) -> None:
    make, says = REFUSED[name]
    model = make().double().train()
    torch.manual_seed(1)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn_like(p))
    watched, taken = BookKeepingHooks(model), OneRow(model)
    with pytest.raises(dpzoo.DpzooError, match=says):
        watched.backward(loss_of(model(x=floats(rows, SEQ, DIM))), taken)
    assert not taken.sums


def test_gradient_hooks_on_parameters_are_refused() -> None:
    model = Around(nn.Linear(DIM, DIM)).double()
    model.layer.weight.register_hook(lambda grad: grad * 2)
    watched = BookKeepingHooks(model)
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"layer\.weight has a gradient hook"):
        watched.backward(loss_of(model(floats(ROWS, SEQ, DIM))), OneRow(model, 0))


def test_a_model_is_made_private_once() -> None:
    model = Around(nn.Linear(DIM, DIM)).double()
    first = BookKeepingHooks(model)
    with pytest.raises(dpzoo.InputError, match="in grad_sample_mode='bk' already"):
        BookKeepingHooks(model)
    first.cleanup()
    BookKeepingHooks(model)


def test_compiled_parts_run_as_they_are_written() -> None:
    torch.manual_seed(1)
    model = Around(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())).double()
    model.layer = torch.compile(model.layer)  # type: ignore[assignment]
    model.call = torch.compile(lambda layer, x: layer(x) * 2, dynamic=True)
    with torch.compiler.set_stance("force_eager"):  # the rows alone, without a compiler
        assert_exact(model, {"x": floats(ROWS, SEQ, DIM)})


def test_a_parameter_used_by_the_criterion_is_refused() -> None:
    model = Around(nn.Linear(DIM, DIM)).double()
    watched = BookKeepingHooks(model)
    losses = loss_of(model(floats(ROWS, SEQ, DIM))) + model.after.weight.square().sum()
    with pytest.raises(
        dpzoo.InputError, match=r"use after\.weight outside the model's private forward"
    ):
        watched.backward(losses, OneRow(model, 0))


def test_a_part_of_the_model_called_by_itself_is_refused() -> None:
    model = Around(nn.Linear(DIM, DIM)).double()
    watched = BookKeepingHooks(model)
    with pytest.raises(dpzoo.InputError, match="call the model itself, not a part of it"):
        watched.backward(loss_of(model.before(floats(ROWS, SEQ, DIM))), OneRow(model, 0))
    losses = loss_of(model.after(model(floats(ROWS, SEQ, DIM)) @ floats(3, DIM)))
    with pytest.raises(
        dpzoo.InputError, match=r"use after\.\w+ outside the model's private forward"
    ):
        watched.backward(losses, OneRow(model, 0))


def test_losses_of_fewer_rows_than_the_batch_are_refused() -> None:
    model = Around(nn.Linear(DIM, DIM)).double()
    watched = BookKeepingHooks(model)
    with pytest.raises(dpzoo.InputError, match="losses have 15 rows and the batch had 3"):
        watched.backward(model(floats(ROWS, SEQ, DIM)).sum(-1).flatten(), OneRow(model, 0))


# --- precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", ["once", "twice"])
def test_autocast_loses_nothing(uses: str) -> None:
    """Its cached casts hide uses from a count of the graph's edges; they are not counted."""
    torch.manual_seed(1)
    call = (lambda m, x: m(m(x))) if uses == "twice" else None
    model, x = Around(nn.Linear(DIM, DIM), call), torch.randn(ROWS, SEQ, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = row_gradients(model, {"x": x})
    watched = BookKeepingHooks(model)
    for i, alone in enumerate(wanted):
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of(model(x))
        one = OneRow(model, i)
        watched.backward(losses, one)
        for name, p in model.named_parameters():
            # bfloat16 has 8 bits: rows alone are themselves within 2 % of float32
            assert (one.sums[p] - alone[name]).norm() <= 0.05 * alone[name].norm()
            assert one.sums[p].dtype == torch.float32


OPPOSED: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "positions": lambda m, x, near: m(torch.stack([x, near], 1)) * torch.tensor([[1.0], [-1.0]]),
    "four positions": lambda m, x, near: (
        m(torch.stack([x, near, x * 2, near * 2], 1)) * torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    ),
    "uses": lambda m, x, near: m(x.unsqueeze(1)) - m(near.unsqueeze(1)),
    "one position of many": lambda m, x, near: torch.cat(
        [
            m(torch.stack([x, near], 1)) * torch.tensor([[1.0], [-1.0]]),
            m(x[:, None] * 1e-8).expand(-1, 30, -1),
        ],
        1,
    ),
}


@pytest.mark.parametrize("name", OPPOSED)
def test_opposing_positions_do_not_hide_a_norm(name: str) -> None:
    """In float32 a norm of positions that nearly cancel is mostly rounding; clipping goes by a bound."""

    for seed in range(30):
        torch.manual_seed(seed)
        model = nn.Linear(64, 48, bias=False)
        head = torch.randn(48)
        around = Made(lambda m, x, near: OPPOSED[name](m.layer, x, near))
        around.layer = model
        watched = BookKeepingHooks(around)
        x = torch.randn(1, 64) * 1e4
        near = x + torch.randn(1, 64) * 10.0 ** -(seed % 6)
        taken = BookKeepingOptimizer(
            torch.optim.SGD(around.parameters(), lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
        )
        watched.backward((around(x=x, near=near) * head).sum((1, 2)), taken)
        size = float(taken.sums[model.weight].double().norm())
        assert size <= 1 + 1e-6, (seed, size)
        watched.cleanup()
