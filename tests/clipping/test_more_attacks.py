"""Rows that meet without a gradient, and what is kept or changed on the way: each was silent once."""

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dpzoo
from dpzoo.clipping.frozen import FrozenWatch
from dpzoo.clipping.module import BookKeepingHooks
from dpzoo.errors import InputError
from tests.clipping.runs import BATCH, Run, by_hand
from tests.clipping.test_sums import Running
from tests.clipping.test_uses import DIM, SEQ, OneRow, floats, loss_of

ROWS = 4
Forward = Callable[[Any, torch.Tensor], torch.Tensor]


class Made(nn.Module):
    """A linear layer, a table, dropout and a function of them and the input."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.w, self.table = nn.Parameter(floats(DIM, DIM)), nn.Parameter(floats(64, DIM))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def h(m: Any, x: torch.Tensor) -> torch.Tensor:
    """(rows, seq, features), each row's own."""
    return x @ m.w


def with_(change: Callable[[torch.Tensor], Any]) -> Forward:
    """Each row's own, times a value that ``change`` makes of the whole batch."""
    return lambda m, x: h(m, x) * change(x)


def column(of_rows: Callable[[torch.Tensor], torch.Tensor]) -> Forward:
    return with_(lambda x: of_rows(x[:, 0, 0])[:, None, None])


def written(write: Callable[[torch.Tensor, torch.Tensor], Any]) -> Forward:
    """What ``write(target, x)`` writes into zeros like the batch, added."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(x)
        write(target, x)
        return h(m, x) + target

    return function


def changed(write: Callable[[torch.Tensor, torch.Tensor], Any]) -> Forward:
    """``write(hidden, x)`` changes the hidden values in place."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = h(m, x)
        write(hidden, x)
        return hidden

    return function


def _held(how: Callable[[torch.Tensor, torch.Tensor], Any]) -> Forward:
    """A mean in a part of a constant tensor."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        held = torch.zeros(7, SEQ, DIM, dtype=x.dtype)
        how(held, x.mean(0))
        return h(m, x) - held[0]

    return function


def _assigned(m: Any, x: torch.Tensor) -> torch.Tensor:
    held = torch.zeros(SEQ, DIM, dtype=x.dtype)
    held.data = x.mean(0)
    return h(m, x) - held


class Centred(torch.autograd.Function):
    """Centred values, and the gradient of uncentred ones."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def own_class(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).long()


def last(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x)).flip(0)


MIXING: dict[str, Forward] = {
    # in place
    "mean subtracted in place": changed(lambda a, x: a.sub_(a.detach().mean(0))),
    "mean subtracted from .data": changed(lambda a, x: a.data.sub_(a.data.mean(0))),
    ".data replaced": changed(lambda a, x: setattr(a, "data", a.data - a.data.mean(0))),
    "inputs centred in place": lambda m, x: h(m, x.sub_(x.mean(0))),
    "clamped by a maximum": changed(lambda a, x: a.clamp_(max=x.mean(0).max())),
    "multiplied in place by a mask": changed(lambda a, x: a.mul_((x > 1).any(0))),
    "lerp to a mean": changed(lambda a, x: a.lerp_(x.mean(0).expand_as(x), 0.5)),
    "copied from behind": written(lambda out, x: out.copy_(x.flip(0))),
    "the row before": written(lambda out, x: out.__setitem__(slice(1, None), x[:-1])),
    "a mean everywhere": written(lambda out, x: out.__setitem__(slice(None), x.mean(0))),
    "a sum in the first": written(lambda out, x: out.__setitem__(0, x.sum(0))),
    "the first in the last": written(lambda out, x: out.__setitem__(-1, x[0])),
    "scatter_add_": written(lambda out, x: out.scatter_add_(0, torch.zeros_like(x).long(), x)),
    "index_put_": written(lambda out, x: out.index_put_((last(x),), x)),
    "index_copy_": written(lambda out, x: out.index_copy_(0, last(x), x)),
    "index_add_": written(lambda out, x: out.index_add_(0, last(x) * 0, x)),
    "index_reduce_": written(lambda out, x: out.index_reduce_(0, last(x) * 0, x, "amax")),
    "masked_scatter_": written(lambda out, x: out.masked_scatter_(x > 0, x)),
    "put_": written(lambda out, x: out.put_(torch.arange(x.numel()).flip(0), x.flatten())),
    "a mean in a part of a constant": _held(lambda held, mean: held[0].copy_(mean)),
    "a mean set in a constant": _held(lambda held, mean: held.__setitem__(0, mean)),
    "a mean as a constant's .data": _assigned,
    # without a rule
    "quantile": with_(lambda x: torch.quantile(x, 0.5, 0, True)),
    "quantile of a tensor": with_(lambda x: x.quantile(torch.tensor(0.5).to(x), 0, True)),
    "nanmedian": with_(lambda x: x.nanmedian()),
    "std(False)": with_(lambda x: x.std(False)),
    "var(True)": with_(lambda x: x.var(True)),
    "std_mean(False)": with_(lambda x: torch.std_mean(x, False)[0]),
    "msort": with_(torch.msort),
    "cdist": with_(lambda x: torch.cdist(x.flatten(1), x.flatten(1)).sum(1)[:, None, None]),
    "cov": with_(lambda x: torch.cov(x[:, :, 0]).sum(1)[:, None, None]),
    "histc": with_(lambda x: torch.histc(x, DIM)),
    "unique": with_(lambda x: x.unique().mean()),
    "as_strided": with_(lambda x: torch.as_strided(x.repeat(2, 1, 1), x.shape, x.stride(), 20)),
    "rot90": with_(lambda x: torch.rot90(x, 2, (0, 1))),
    "flipud": with_(torch.flipud),
    "diff": with_(lambda x: torch.diff(x, dim=0, prepend=x[:1])),
    "gradient": with_(lambda x: torch.gradient(x, dim=0)[0]),
    "svdvals": with_(lambda x: torch.linalg.svdvals(x.flatten(1))[0]),
    "qr": with_(lambda x: torch.linalg.qr(x.flatten(1))[0].sum(1)[:, None, None]),
    "layer_norm of all": with_(lambda x: F.layer_norm(x, x.shape)),
    "layer_norm over rows": with_(
        lambda x: F.layer_norm(x.transpose(0, 2), (len(x),)).transpose(0, 2)
    ),
    "batch_norm": with_(lambda x: F.batch_norm(x, None, None, training=True)),
    "a convolution whose channels are rows": with_(
        lambda x: F.conv1d(x.flatten(1), torch.ones(len(x), len(x), 3).to(x), padding=1).view_as(x)
    ),
    "triu": column(lambda c: c.expand(len(c), -1).triu().sum(1)),
    "an aten op": with_(lambda x: torch.ops.aten.mean.dim(x, [0], True)),
    "a vmapped function": with_(
        lambda x: torch.func.vmap(lambda c: c - c.mean())(x[:, 0, 0][None])[0][:, None, None]
    ),
    "a function of inputs that torch does not show": with_(Centred.apply),
    "a gradient that hides it": lambda m, x: Centred.apply(h(m, x)),
    "numpy": with_(lambda x: float(x.numpy().std())),
    "an item": with_(lambda x: x.mean().item()),
    # whole numbers
    "ranks": column(lambda c: c.argsort().argsort()),
    "ranks, looked up": lambda m, x: h(m, x) * m.table[x[:, 0, 0].argsort().argsort()][:, None],
    "frequency of the own class": column(
        lambda c: own_class(c).bincount(minlength=2)[own_class(c)]
    ),
    "place in the own class": column(lambda c: F.one_hot(own_class(c), 2).cumsum(0).amax(1)),
    "a capacity": column(lambda c: F.one_hot(own_class(c), 2).cumsum(0).amax(1) <= 2),
    "how many are equal": column(lambda c: (c.round()[:, None] == c.round()).sum(1)),
    "among the first's": with_(lambda x: torch.isin(x, x[:1])),
    "searchsorted": column(lambda c: torch.searchsorted(c.sort()[0], c.contiguous())),
    "which row": with_(lambda x: x.argmax(0)),
    "a mask of the batch": with_(lambda x: (x > 1).any(0)),
    "counts": with_(lambda x: (x > 0).sum(0)),
    "columns by their counts": lambda m, x: h(m, x)[:, :, (x > 0).sum((0, 1)).argsort()[:2]],
    # what the batch is
    "the number of rows": with_(len),
    "the place of a row": with_(lambda x: torch.arange(len(x))[:, None, None]),
    "the place of a row, beside dropout": lambda m, x: m.drop(h(m, x)) * m.table[: len(x), None],
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_meet_are_refused(name: str) -> None:
    torch.manual_seed(1)
    model = Made(MIXING[name]).double()
    watched, taken = BookKeepingHooks(model), OneRow(model)
    with pytest.raises(dpzoo.DpzooError, match=r"combine|not those of the rows"):
        watched.backward(loss_of(model(floats(ROWS, SEQ, DIM))), taken)
    assert not taken.sums


def _drawn(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Random numbers of every kind, a row's own."""
    noise = torch.randn(len(x), 1, 1).to(x)
    order = torch.rand(x.shape[:2]).argsort(1)[..., None].expand_as(x)
    return m.drop(h(m, x)).gather(1, order) * noise if torch.rand(()) < 2 else x


def _experts(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Each token by one of two weights, with dropout in the experts."""
    flat = x.reshape(-1, DIM)
    out = torch.zeros_like(flat)
    for expert in (0, 1):
        mine = torch.where((flat[:, 0] > 0) == bool(expert))[0]
        out.index_add_(0, mine, m.drop(flat[mine] @ (m.w * (expert + 1))))
    return out.view_as(x)


KEPT_APART: dict[str, Forward] = {
    "random numbers": _drawn,
    "experts": _experts,
    "rows one by one": lambda m, x: torch.stack([row.sin() for row in h(m, x)]),
    "fliplr": lambda m, x: h(m, x) + torch.fliplr(x),
    "counts of the row": lambda m, x: h(m, x) * (x > 0).sum((1, 2), keepdim=True),
    "written in place": changed(lambda a, x: a.sub_(x.mean(1, keepdim=True))),
    "a scatter in the row": written(lambda out, x: out.scatter_add_(1, (x > 0).long(), x)),
}


@pytest.mark.parametrize("name", KEPT_APART)
def test_rows_that_are_kept_apart_are_taken(name: str) -> None:
    for rows in (2, ROWS, SEQ):
        torch.manual_seed(1)
        model = Made(KEPT_APART[name]).double()
        watched, taken = BookKeepingHooks(model), OneRow(model)
        for _ in range(3):
            watched.backward(loss_of(model(floats(rows, SEQ, DIM))), taken)
        assert taken.sums


def test_random_numbers_go_on_as_without_the_runs_that_are_compared() -> None:
    model = Made(_drawn).double()
    x = floats(ROWS, SEQ, DIM)
    torch.manual_seed(3)
    wanted = model(x), torch.rand(3)
    BookKeepingHooks(model)
    torch.manual_seed(3)
    got = model(x), torch.rand(3)
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a, b)


@dataclass
class Held:
    x: torch.Tensor


Pair = namedtuple("Pair", "x t")


@pytest.mark.parametrize("batch", [Held, lambda x: Pair(x, x), lambda x: {"x": [x]}])
def test_rows_in_containers_are_followed(batch: Callable[[torch.Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 3)

        def forward(self, given: Any, t: torch.Tensor) -> torch.Tensor:
            x = given["x"][0] if isinstance(given, dict) else given.x
            return self.out(t) / float(x.mean())

    run = by_hand(model=Model())
    with pytest.raises(InputError, match="beside other rows a row gets another output"):
        run.criterion(run.private(batch(BATCH[0]), BATCH[0]), BATCH[1]).backward()


def test_what_a_model_is_given_is_not_used_up() -> None:
    """A cache, say, that grows in each pass."""

    class Cache:
        def __init__(self) -> None:
            self.passes: list[int] = []

    class Model(nn.Linear):
        def forward(
            self, x: torch.Tensor, cache: Cache, held: dict[str, list[int]]
        ) -> torch.Tensor:
            cache.passes.append(1)
            held["passes"].append(1)
            return super().forward(x)

    run, cache, held = by_hand(model=Model(4, 3)), Cache(), {"passes": [0]}
    run.criterion(run.private(BATCH[0], cache, held), BATCH[1]).backward()
    assert (cache.passes, held) == ([1], {"passes": [0, 1]})


def test_a_pass_before_the_last_is_looked_at_too() -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor, centred: bool = False) -> torch.Tensor:
            out = super().forward(x)
            return out - out.detach().mean(0) if centred else out

    run = by_hand(model=Model(4, 3))
    losses = run.private(BATCH[0], centred=True) * run.private(BATCH[0])
    with pytest.raises(InputError, match=r"an output in which .* combined rows"):
        run.criterion(losses, BATCH[1]).backward()


@pytest.mark.parametrize("where", ["forward", "output"])
def test_a_gradient_hook_that_comes_later_is_seen(where: str) -> None:
    class Model(nn.Linear):
        passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            if where == "forward" and self.passes == 3 and out.requires_grad:
                out.register_hook(lambda grad: grad - grad.mean(0))
            return out

    run = by_hand(model=Model(4, 3))
    for run.model.passes in (1, 2):
        run.backward(*BATCH)
        run.optimizer.step()
    run.model.passes = 3
    out = run.private(BATCH[0])
    if where == "output":
        out.register_hook(lambda grad: grad - grad.mean(0))
    with pytest.raises(InputError, match="not those of the rows"):
        run.criterion(out, BATCH[1]).backward()


# --- the criterion --------------------------------------------------------------------------------------


def losses(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, t, reduction="none")


CRITERIA: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "over their mean": lambda o, t: losses(o, t) / losses(o, t).detach().mean(),
    "over their mean, a number": lambda o, t: losses(o, t) / losses(o, t).mean().item(),
    "over the number of rows": lambda o, t: losses(o, t) / len(o),
    "by the frequency of the class": lambda o, t: losses(o, t) / t.bincount(minlength=3)[t],
    "by the largest": lambda o, t: losses(o, t) * losses(o, t).detach().max(),
    "the harder half": lambda o, t: losses(o, t) * (losses(o, t) >= losses(o, t).median()),
    "by rank": lambda o, t: losses(o, t) * losses(o, t).argsort().argsort(),
    "sorted": lambda o, t: losses(o, t).sort()[0],
    "against the next row": lambda o, t: F.softplus(o[:, 0] - o[:, 0].detach().roll(1)),
    "negatives of the batch": lambda o, t: losses(o @ o.detach().t(), torch.arange(len(o))),
    "against the mean": lambda o, t: (o - o.detach().mean(0)).square().sum(1),
    "of the batch's labels": lambda o, t: o.log_softmax(1)[:, t.unique()].sum(1),
}


class Criterion(nn.CrossEntropyLoss):
    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.of(input, target)


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_of_the_batch_are_refused(name: str) -> None:
    run = by_hand()
    run.criterion.criterion = Criterion(CRITERIA[name])
    with pytest.raises(InputError, match="gives a row another loss when other rows"):
        run.backward(*BATCH)


def test_criteria_of_rows_are_taken() -> None:
    run = by_hand()
    weights = torch.tensor([0.1, 2.0, 5.0])
    for of in (
        losses,
        lambda o, t: F.cross_entropy(o, t, weights, reduction="none", label_smoothing=0.1),
        lambda o, t: losses(F.dropout(o, 0.5), t) * torch.rand(len(o)),
    ):
        run.criterion.criterion = Criterion(of)
        run.criterion.tried = 0
        for rows in (2, 3, 5):  # of three rows, weights of classes look like rows
            run.backward(BATCH[0][:rows], BATCH[1][:rows])
            run.optimizer.step()


def test_a_criterion_of_tokens_is_taken() -> None:
    run = by_hand(model=nn.Linear(4, 7))
    logits = run.private(torch.randn(3, 5, 4))
    labels = torch.randint(0, 7, (3, 5))
    run.criterion(logits.view(-1, 7), labels.view(-1), shape=logits.shape).backward()


def test_what_is_not_the_models_gets_no_gradient() -> None:
    """The check's gradients are of the model's parameters alone."""
    run, other = by_hand(), nn.Linear(3, 3)
    run.criterion(other(run.private(BATCH[0])), BATCH[1]).backward()
    assert other.weight.grad is None


# --- buffers ----------------------------------------------------------------------------------------------


class TrainsAlone(nn.Module):
    """A part that is in training mode by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Running()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_buffers_are_watched_in_eval_mode_too() -> None:
    for model in (Running(), TrainsAlone()):
        run = by_hand(model=model)
        model.eval()
        with pytest.raises(InputError, match="mean changed in a training forward pass"):
            run.backward(*BATCH)
        with torch.no_grad():
            run.private(BATCH[0])


class Late(nn.Module):
    """Keeps something of the first batch."""

    def __init__(self, keep: Callable[[nn.Module, torch.Tensor], None]) -> None:
        super().__init__()
        self.out, self.keep = nn.Linear(4, 3), keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "mean"):
            self.keep(self, x.mean(0))
        return self.out(x)


def _buffer(model: nn.Module, mean: torch.Tensor) -> None:
    model.register_buffer("mean", mean)


def _parameter(model: nn.Module, mean: torch.Tensor) -> None:
    model.mean = nn.Parameter(mean, requires_grad=False)


@pytest.mark.parametrize("keep", [_buffer, _parameter])
@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_what_is_made_in_a_forward_is_refused(keep: Any, mode: str) -> None:
    run = by_hand(mode=mode, model=Late(keep))
    with pytest.raises(InputError, match="mean was made in a training forward pass"):
        run.backward(*BATCH)


def test_a_cache_that_is_not_saved_may_be_made() -> None:
    run = by_hand(
        model=Late(lambda m, _: m.register_buffer("mean", torch.ones(2), persistent=False))
    )
    run.backward(*BATCH)


def test_writes_at_every_tenth_pass_are_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda most: 0)

    class Tenth(nn.Linear):
        passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.passes % 10 == 0:
                self.kept.data.copy_(x.mean(0))
            return super().forward(x)

    model = Tenth(4, 3)
    model.register_buffer("kept", torch.zeros(4))
    FrozenWatch(model)
    for model.passes in range(1, 10):
        model(BATCH[0])
    model.passes = 10
    with pytest.raises(InputError, match="kept changed in a training forward"):
        model(BATCH[0])


# --- sums, norms and noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [-1.0, 0.0, float("nan"), float("inf"), "1", None])
@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks"])
def test_clipping_norms_that_are_none_are_refused(norm: Any, mode: str) -> None:
    with pytest.raises(InputError, match=r"max_grad_norm=.*, wanted a number above 0"):
        Run(mode, max_grad_norm=norm)


def test_a_clipping_norm_that_becomes_none_is_refused() -> None:
    """Below 0 there would be no noise."""
    run = by_hand(noise_multiplier=1.0)
    run.optimizer.max_grad_norm = -1.0
    run.backward(*BATCH)
    with pytest.raises(InputError, match=r"max_grad_norm=-1\.0, wanted a number above 0"):
        run.optimizer.step()


@pytest.mark.parametrize("gamma", [0.0, -0.9])
def test_a_gamma_that_lets_rows_grow_is_refused(gamma: float) -> None:
    with pytest.raises(InputError, match=r"got gamma=.*, wanted a number above 0"):
        by_hand(clipping="automatic", gamma=gamma)


def test_sums_that_were_changed_in_place_are_refused() -> None:
    run = by_hand()
    run.backward(*BATCH)
    run.model[0].weight.summed_grad.mul_(100)
    with pytest.raises(InputError, match="summed_grad was changed in place"):
        run.optimizer.step()
    run.backward(*BATCH)
    run.backward(*BATCH)
    run.optimizer.step()


def test_frozen_parameters_are_not_stepped() -> None:
    """By a gradient that is left from before they were frozen, or before make_private."""
    run = by_hand()
    weight = run.model[0].weight.requires_grad_(False)
    weight.grad = torch.ones_like(weight)
    before = weight.clone()
    run.backward(*BATCH)
    run.optimizer.step()
    assert torch.equal(weight, before)


def test_the_private_optimizer_is_not_copied() -> None:
    run = by_hand()
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(InputError, match="optimizer was copied or pickled"):
            copied(run.optimizer)
