"""Where ghost mode is wrong, book-keeping is right or refuses: sums, edges, freshness, clippings."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.factors import DenseGrads, EmbeddingFactors, LayerInput, LinearFactors, inner_product
from tests.modes import Step, assert_step_is_exact, oracle_norms
from tests.support import (
    NAMES,
    ROWS,
    TIED,
    batch_for,
    in_stock_layout,
    largest_error,
    oracle_gradients,
    row_of,
    stock_model,
)


def private(model: nn.Module, rows: int, **options: Any) -> Any:
    """(model, optimizer, criterion) of a plain module, lr 1, sums, no noise unless asked for."""
    settings = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "loss_reduction": "sum",
        "poisson_sampling": False,
        "grad_sample_mode": "bk",
        **options,
    }
    made = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=RowLoss(),
        data_loader=DataLoader(list(range(rows)), batch_size=rows),
        **settings,
    )
    return made[:3]


class RowLoss:
    """A nonlinear loss of each row of a tensor."""

    reduction = "sum"

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        losses = (output.sin() + 0.1 * output.square()).flatten(1).sum(1)
        return losses if self.reduction == "none" else losses.sum()


def rows_alone(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter name -> (rows, *shape), each row alone, autograd."""
    grads: dict[str, list[torch.Tensor]] = {}
    for row in x:
        model.zero_grad(set_to_none=True)
        RowLoss()(model(row.unsqueeze(0))).backward()
        for key, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grads.setdefault(key, []).append(grad.clone())
    model.zero_grad(set_to_none=True)
    return {key: torch.stack(value) for key, value in grads.items()}


def assert_module_is_exact(model: nn.Module, x: torch.Tensor) -> None:
    model = model.double()
    wanted = rows_alone(model, x)
    norms = oracle_norms(wanted, wanted)
    clip = float(norms.median())
    wrapped, optimizer, criterion = private(model, len(x), max_grad_norm=clip)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    criterion(wrapped(x)).backward()
    assert largest_error(wrapped.per_sample_gradient_norms, norms) <= 1e-9
    optimizer.step()
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    for key, parameter in model.named_parameters():
        total = torch.einsum("n,n...->...", factors, wanted[key])
        assert largest_error(before[key] - parameter.detach(), total) <= 1e-9, key


class Twice(nn.Module):
    """One linear layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Mixed(nn.Module):
    """Convolution, GroupNorm, RMSNorm, LayerNorm without bias, a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(5)
        self.norm = nn.LayerNorm(5, bias=False)
        self.out = nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.group(F.silu(self.conv(x)))
        return self.out(input=self.norm(self.rms(hidden)))


class TiedInput(nn.Module):
    """A table looked up twice, and used as projection: three uses of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(11, 6, padding_idx=0)
        self.second = nn.Embedding(11, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 11)
        self.head.weight = self.first.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(ids) * self.second(ids.flip(1))))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Twice(), (5, 6)),
        (Twice(), (5, 4, 6)),
        (Twice(), (5, 40, 6)),
        (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), (5, 3, 2, 6)),
        (Mixed(), (5, 3, 7)),
        (nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 50)), (3, 70, 50)),
    ],
    ids=["twice", "twice-3d", "twice-long", "4d", "mixed", "gram-strips"],
)
def test_any_module(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert_module_is_exact(model, torch.randn(*shape, dtype=torch.float64))


def test_three_uses_of_one_table() -> None:
    """Two look-ups and a projection, ids repeated in a row, padding in one of the look-ups."""
    assert_module_is_exact(TiedInput(), torch.randint(0, 11, (5, 8)))


def test_every_pair_of_uses_has_its_inner_product() -> None:
    """Against the gradients written out, for all nine pairs of forms."""
    n, size, hidden = 3, 7, 5
    ids = torch.randint(0, size, (n, 6))
    uses: list[tuple[Any, torch.Tensor]] = []
    grads, inputs = torch.randn(n, 4, size), torch.randn(n, 4, hidden)
    uses.append(
        (LinearFactors(grads, LayerInput(inputs)), torch.einsum("nto,nti->noi", grads, inputs))
    )
    vectors = torch.randn(n, 6, hidden)
    table = torch.zeros(n, size, hidden).scatter_add_(
        1, ids.unsqueeze(-1).expand_as(vectors), vectors
    )
    uses.append((EmbeddingFactors(ids, vectors, size), table))
    dense = torch.randn(n, size, hidden)
    uses.append((DenseGrads(dense), dense))
    for a, grad_a in uses:
        assert largest_error(a.squared_norm()[0], grad_a.square().sum((1, 2))) <= 1e-5
        for b, grad_b in uses:
            assert largest_error(inner_product(a, b), (grad_a * grad_b).sum((1, 2))) <= 1e-5
        weights = torch.rand(n)
        total = torch.randn(size, hidden)
        wanted = total + torch.einsum("n,noi->oi", weights, grad_a)
        assert largest_error(a.add_to(total.clone(), weights), wanted) <= 1e-5
        assert largest_error(a.add_to(None, weights), wanted - total) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_adds_nothing(name: str) -> None:
    step = Step(name, dpzoo.convert(stock_model(name)), "bk")
    batch = batch_for(name)
    step.backward({key: value[:0] for key, value in batch.items()})
    assert all(bool((value == 0).all()) for value in step.gradient().values())
    step.backward(batch)
    assert any(bool((value != 0).any()) for value in step.gradient().values())


@pytest.mark.parametrize("name", [*TIED, "BertForMultipleChoice"])
def test_several_backward_calls_add_up(name: str) -> None:
    """Micro-batches without a BatchMemoryManager: what ghost mode silently loses."""
    stock, batch = stock_model(name), batch_for(name)
    whole = Step(name, dpzoo.convert(stock), "bk", max_grad_norm=0.7)
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    whole.backward(batch)
    wanted = whole.gradient()
    whole.engine.to_standard_module()
    whole.model.load_state_dict(start)
    split = Step(name, whole.model, "bk", max_grad_norm=0.7)
    for i in range(ROWS):
        split.backward(row_of(batch, i))
    for key, value in split.gradient().items():
        assert largest_error(value, wanted[key]) <= 1e-10, key


@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "GPT2LMHeadModel", "RobertaForTokenClassification"]
)
def test_other_clippings(name: str, clipping: str) -> None:
    stock, batch = stock_model(name), batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    model = dpzoo.convert(stock)
    names = [key for key, _ in model.named_parameters()]
    total = oracle_norms(wanted, names)
    if clipping == "per_layer":
        clips: Any = [float(oracle_norms(wanted, [key]).median()) + 1e-3 for key in names]
        step = Step(name, model, "bk", max_grad_norm=clips, clipping="per_layer")
    else:
        clips = [0.5] * len(names)
        step = Step(name, model, "bk", max_grad_norm=0.5, clipping="automatic", gamma=0.02)
    step.backward(batch)
    got = step.gradient()
    for key, clip in zip(names, clips, strict=True):
        norms = oracle_norms(wanted, [key])
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        if clipping == "automatic":
            factors = clip / (total + 0.02)
        summed = torch.einsum("n,n...->...", factors, wanted[key])
        assert largest_error(got[key] * ROWS, summed) <= 1e-9, key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_contributes_nothing(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    wrapped, optimizer, criterion = private(model, 4)
    start = {key: item.clone() for key, item in model.state_dict().items()}
    criterion(wrapped(x[[0, 1, 3]])).backward()
    optimizer.step()
    wanted = {key: item.clone() for key, item in model.state_dict().items()}
    optimizer.zero_grad()
    model.load_state_dict(start)
    x[2, 1, 0] = value
    criterion(wrapped(x)).backward()
    optimizer.step()
    assert wrapped.nonfinite_rows == 1
    for key, item in model.state_dict().items():
        assert largest_error(item, wanted[key]) <= 1e-12, key


def test_parameters_unfrozen_after_wrapping_are_in_the_norm() -> None:
    """In ghost mode the norm would miss them and the row exceed C."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model[0].requires_grad_(False)
    wrapped, optimizer, criterion = private(model, 1, max_grad_norm=0.01)
    model[0].requires_grad_(True)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    criterion(wrapped(torch.randn(1, 4, dtype=torch.float64))).backward()
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(moved.norm()) <= 0.01
    assert bool((moved[:20] != 0).any())


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.use_left = nn.Linear(3, 2), nn.Linear(3, 2), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) if self.use_left else self.right(x)


def test_a_branch_that_is_not_run_is_zero_and_never_stale() -> None:
    model = Branch().double()
    untapped = copy.deepcopy(model)  # without taps, for the oracle
    wrapped, optimizer, criterion = private(model, 2, noise_multiplier=1.0)
    x = torch.randn(2, 3, dtype=torch.float64)
    for use_left in (True, False):
        model.use_left = untapped.use_left = use_left
        untapped.load_state_dict(model.state_dict())
        criterion(wrapped(x)).backward()
        wanted = rows_alone(untapped, x)
        norms = wrapped.per_sample_gradient_norms
        assert largest_error(norms, oracle_norms(wanted, wanted)) <= 1e-9
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        for old, parameter in zip(before, model.parameters(), strict=True):
            assert bool((old != parameter).all())  # noise on every coordinate, reached or not


def test_an_ordinary_backward_is_refused() -> None:
    model = nn.Linear(3, 2)
    wrapped, _, _ = private(model, 2)
    with pytest.raises(dpzoo.InputError, match=r"ordinary loss was backpropagated.*criterion"):
        wrapped(torch.randn(2, 3)).sum().backward()


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_checkpointed_layers(name: str) -> None:
    """Non-reentrant checkpointing goes along with taps; reentrant is refused."""

    def enable(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    assert_step_is_exact(name, "bk", batch_for(name), stock_model(name), prepare=enable)
    model = dpzoo.convert(stock_model(name))
    model.gradient_checkpointing_enable()
    step = Step(name, model, "bk")
    with pytest.raises(
        dpzoo.InputError, match="reentrant activation checkpoint, wanted use_reentrant"
    ):
        step.backward(batch_for(name))


class Checkpointed(nn.Module):
    """Two layers under a checkpoint, and a head above it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.head, self.reentrant = nn.Linear(4, 2), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def test_reentrant_checkpoints_are_refused() -> None:
    """The layers below would get no gradient, and nothing would say so."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    wrapped, optimizer, criterion = private(Checkpointed(True).double(), 3)
    with pytest.raises(dpzoo.InputError, match="a reentrant activation checkpoint"):
        criterion(wrapped(x)).backward()

    wrapped, optimizer, criterion = private(Checkpointed(False).double(), 3)
    with torch.no_grad():
        wrapped(x)  # an evaluation in between is none
    criterion(wrapped(x)).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters())


def test_fractions_and_norms_can_be_read() -> None:
    name = "BertForSequenceClassification"
    step = Step(name, dpzoo.convert(stock_model(name)), "bk", max_grad_norm=1e-4)
    with pytest.raises(dpzoo.InputError, match="per_sample_gradient_norms is not set"):
        _ = step.engine.per_sample_gradient_norms
    step.backward(batch_for(name))
    assert step.engine.clipped_fraction == 1.0
    assert step.engine.per_sample_gradient_norms.shape == (ROWS,)


def test_twenty_steps_equal_hooks_mode() -> None:
    """The same batches, no noise: twenty Adam steps end at the same parameters."""
    name = "DistilBertForSequenceClassification"
    stock = stock_model(name)
    ends = []
    for mode in ("hooks", "bk"):
        model = dpzoo.convert(stock_model(name))
        model.load_state_dict(stock.state_dict())
        step = Step(name, model, mode, max_grad_norm=0.3)
        step.optimizer.original_optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        torch.manual_seed(4)
        for _ in range(20):
            step.backward(batch_for(name))
            step.optimizer.step()
            step.optimizer.zero_grad()
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        assert largest_error(ends[1][key], value) <= 1e-9, key


def test_stock_layout_helper_is_used_on_gpt2() -> None:
    """Guards the comparison itself: a square projection compared untransposed would be wrong."""
    model = dpzoo.convert(stock_model("GPT2Model"))
    weight = model.h[0].attn.c_proj.weight
    assert weight.shape[0] == weight.shape[1]
    assert not torch.equal(in_stock_layout(model, "h.0.attn.c_proj.weight", weight), weight)


# --- found by hand, each once -------------------------------------------------------------------


def test_per_layer_clipping_wants_all_that_is_trained_in_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    wrapped, _, criterion = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model[0].parameters(), lr=1.0),
        criterion=RowLoss(),
        data_loader=DataLoader(list(range(3)), batch_size=3),
        noise_multiplier=0.0,
        max_grad_norm=[0.3, 0.2],
        clipping="per_layer",
        loss_reduction="sum",
        poisson_sampling=False,
        grad_sample_mode="bk",
    )[:3]
    with pytest.raises(
        dpzoo.InputError, match=r"2.weight and 1 more .* are not in the private opti"
    ):
        criterion(wrapped(torch.randn(3, 4, dtype=torch.float64))).backward()


def test_a_parameter_that_no_row_reaches_may_be_laid_out_in_any_way() -> None:
    """Its gradient is the noise, or zero; other parameters are exact beside it."""

    class Unreached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.turned = nn.Parameter(torch.randn(5, 4).t())
            self.sliced = nn.Parameter(torch.randn(6, 4)[:, ::2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unreached()
    assert not model.turned.is_contiguous()
    assert_module_is_exact(model, torch.randn(3, 4, dtype=torch.float64))
    assert torch.equal(model.turned.grad, torch.zeros(4, 5, dtype=torch.float64))  # type: ignore[arg-type]
    model = Unreached()
    wrapped, optimizer, criterion = private(model, 3, noise_multiplier=1.0)
    criterion(wrapped(torch.randn(3, 4))).backward()
    optimizer.step()
    for parameter in (model.turned, model.sliced):
        assert parameter.grad is not None
        assert len(set(parameter.grad.flatten().tolist())) == parameter.numel()


class Masked(nn.Module):
    """A layer of one's own with dropout in it, in functions that have a rule and in one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.randn(4, 4))
        self.taps = nn.Parameter(torch.randn(4, 1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(x * self.scale, 0.5, training=self.training) @ self.mix
        hidden = hidden * torch.bernoulli(torch.full_like(hidden, 0.7))
        return F.conv1d(hidden.transpose(1, 2), F.dropout(self.taps, 0.3), groups=4)


def test_dropout_inside_a_layer_of_ones_own_is_exact() -> None:
    """With one mask, the sum of unclipped rows is autograd's gradient of the summed losses."""
    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(5, 6, 4, dtype=torch.float64)
    torch.manual_seed(1)
    RowLoss()(model(x)).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    wrapped, optimizer, criterion = private(model, 5, max_grad_norm=1e9)
    torch.manual_seed(1)
    criterion(wrapped(x)).backward()
    optimizer.step()
    assert len(wanted) == 3
    for name, p in model.named_parameters():
        assert largest_error(p.grad, wanted[name]) <= 1e-9, name


def test_rows_that_are_tuples_a_collator_that_tokenizes_and_an_empty_first_draw() -> None:
    rows = [(f"row {i}", i % 2) for i in range(30)]

    def collate(some: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        ids = [[1 + ord(c) % 7 for c in text[-3:]] for text, _ in some]
        return {"x": torch.tensor(ids), "y": torch.tensor([label for _, label in some])}

    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    wrapped, optimizer, criterion, loader = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(rows, batch_size=1, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="bk",
    )
    for seed in range(20):
        torch.manual_seed(seed)
        for batch in loader:
            first = len(batch["x"]) == 0
            assert batch["x"].shape[1:] == (3,)
            optimizer.zero_grad()
            criterion(wrapped(batch["x"]), batch["y"]).backward()
            optimizer.step()
            break
        if first:
            return
    pytest.fail("no first draw was empty")
