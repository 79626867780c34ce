"""Units of several rows: drawn as one, clipped as one, paid for as one; attacks on each of the three."""

import math
import statistics
import time
from typing import Any

import numpy as np
import opacus
import peft
import pytest
import torch
import transformers
from opacus.accountants import create_accountant
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import dpzoo
from dpzoo.clipping.module import BookKeepingHooks
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError
from dpzoo.families import trial
from dpzoo.families.tiny import Sizes, batch, build, row_losses
from tests.clipping.test_peft import MODELS, losses, method
from tests.clipping.test_uses import (
    DIM,
    FUNCTIONS,
    LAYERS,
    SEQ,
    Lookups,
    Made,
    OneRow,
    assert_exact,
    floats,
    unit_gradients,
)
from tests.support import (
    NAMES,
    batch_for,
    batch_losses,
    in_stock_layout,
    oracle_gradients,
    stock_model,
)
from tests.test_families import NAMES as SIXTY

IDS = {
    "scattered": [7, 3, 7, 5, 3, 7, 1],  # units of 3, 2, 1 and 1 rows
    "in a row": [1, 5, 3, 3, 7, 7, 7],
    "alike": [1, 1, 2, 2, 3, 3],
    "one unit": [4, 4, 4],
}

# --- exact: each row alone through the stock model, per unit and per parameter --------------------------


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, ids: str) -> None:
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(1)
    x = floats(len(IDS[ids]), SEQ, DIM)
    tolerance = 1e-6 if "plus" in name else 1e-12  # it rounds to float32 itself
    assert_exact(Made(function, **shapes), {"x": x}, tolerance, IDS[ids])


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    torch.manual_seed(1)
    x = floats(7, SEQ, DIM)
    assert_exact(LAYERS[name]().double(), {"x": x}, 1e-12, IDS["scattered"])


def test_look_ups_and_ties() -> None:
    torch.manual_seed(1)
    x = torch.tensor([[1, 2, 0], [3, 3, 3], [6, 0, 0], [5, 4, 1], [3, 3, 1], [0, 0, 0], [2, 1, 2]])
    for ids in ("scattered", "in a row"):
        assert_exact(Lookups().double(), {"x": x}, 1e-12, IDS[ids])


def assert_units_exact(model: Any, losses_of: Any, alone: list[Any], ids: list[int]) -> None:
    """Each unit's gradient and its norms, parameter by parameter."""
    watched = BookKeepingHooks(model)
    for i, want in enumerate(unit_gradients(alone, ids)):
        one = OneRow(model, i)
        watched.backward(losses_of(), one, ids)
        scale = sum(float(g.square().sum()) for g in want.values()) ** 0.5
        for name, p in model.named_parameters():
            if p.requires_grad:
                got = one.sums.get(p, torch.zeros_like(p))
                assert float((got - want[name]).norm()) <= 1e-12 * scale, (name, i)
                if p in one.norms:
                    gap = abs(float(one.norms[p][i] - want[name].norm()))
                    assert gap <= 1e-12 * scale, (name, i, gap / scale)
    watched.cleanup()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stock code casts to float32 by name (RMS norms, softmax, rotations) stays in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


FAMILIES = [
    "causal-lm/gpt2",
    "causal-lm/llama",
    "causal-lm/qwen3",
    "causal-lm/mixtral",
    "causal-lm/mamba",
    "masked-lm/bert",
    "masked-lm/modernbert",
    "sequence-classification/deberta-v2",
    "seq2seq-lm/t5",
    "image-classification/vit",
]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in SIXTY if name not in FAMILIES]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", [*FAMILIES, *REST])
def test_families(name: str) -> None:
    model, _ = build(name, Sizes(rows=7))
    inputs, labels = batch(model, sizes=Sizes(rows=7))
    alone = trial.oracle(model, inputs, labels)
    assert_units_exact(model, lambda: row_losses(model, inputs, labels), alone, IDS["scattered"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_zoo(name: str) -> None:
    stock, data = stock_model(name), batch_for(name, rows=7)
    gradients = oracle_gradients(name, stock, data)
    model = dpzoo.convert(stock).train()
    alone = [{n: in_stock_layout(model, n, g[i]) for n, g in gradients.items()} for i in range(7)]
    assert_units_exact(model, lambda: batch_losses(name, model, data), alone, IDS["scattered"])


@pytest.mark.slow
@pytest.mark.parametrize("ids", ["in a row", "scattered"])
def test_time(ids: str) -> None:
    """At most 1.3 times the same rows without units, interleaved."""
    config = transformers.GPT2Config(vocab_size=2000, n_embd=256, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).train()
    watched, tokens = BookKeepingHooks(model), torch.randint(0, 2000, (7, 64))
    optimizer, loss = OneRow(model), dpzoo.ModelLoss(model, reduction="none")
    seconds: dict[Any, list[float]] = {None: [], ids: []}
    for _ in range(12):
        for how, times in seconds.items():
            began = time.perf_counter()
            watched.backward(loss(model(tokens), tokens), optimizer, IDS[how] if how else None)
            times.append(time.perf_counter() - began)
            optimizer.drop()
            optimizer.draws.abandon()
    plain, units = (statistics.median(times[4:]) for times in seconds.values())
    assert units <= 1.3 * plain, units / plain


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["LoRA", "LoRA of the table", "IA3"])
def test_peft(kind: str, name: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(MODELS[name][0](), method(kind, name)).double().train()
    for p in model.parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p) * 0.2)
    data = {"ids": torch.randint(3, 61, (7, 7)), "mask": torch.ones(7, 7, dtype=torch.long)}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    alone = []
    for i in range(7):
        own = losses(model, name, {k: v[i : i + 1] for k, v in data.items()}).sum()
        alone.append(dict(zip(named, torch.autograd.grad(own, named.values()), strict=True)))
    assert_units_exact(model, lambda: losses(model, name, data), alone, IDS["scattered"])


# --- a run over units -----------------------------------------------------------------------------------

OWNERS = [f"user {(7 * i) % 17 % 10}" for i in range(40)]
"""Ten owners of 3 to 8 of 40 rows."""


class Owned(Dataset[Any]):
    """Rows whose features are large, so that each is clipped; the last says which row it is."""

    def __init__(self, column: bool = False) -> None:
        self.x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 30
        self.x[:, 3] = torch.arange(40)
        self.column = column

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        if self.column:
            return {"x": self.x[i], "y": i % 3, "who": OWNERS[i]}
        return self.x[i], i % 3


class Run:
    """A private run over units, without noise unless asked for; five units a batch."""

    def __init__(self, unit_ids: Any = OWNERS, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = options.pop("model", None) or nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        self.engine = dpzoo.PrivacyEngine(accountant="rdp")
        made = self.engine.make_private(
            module=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=options.pop("loader", None)
            or DataLoader(
                options.pop("rows", None) or Owned(), batch_size=5, **options.pop("data", {})
            ),
            unit_ids=unit_ids,
            **{
                "noise_multiplier": 0.0,
                "max_grad_norm": 1.0,
                "grad_sample_mode": "bk",
                **options,
            },
        )
        self.private, self.optimizer, self.criterion, self.loader = (
            made[0],
            made[1],
            made[2],
            made[-1],
        )

    def backward(self, x: torch.Tensor, y: torch.Tensor, ids: Any = None) -> None:
        self.criterion(self.private(x), y).backward(unit_ids=ids)

    def epoch(self, loader: Any = None) -> None:
        for x, y in self.loader if loader is None else loader:
            self.optimizer.zero_grad()
            self.backward(x, y)
            self.optimizer.step()

    def total(self) -> float:
        return float(torch.cat([v.flatten() for v in self.optimizer.sums.values()]).norm())


def owners(x: torch.Tensor) -> list[str]:
    return [OWNERS[int(row)] for row in x[:, 3]]


def test_an_ordinary_loop() -> None:
    """Batches have whole units, of which each moves the sum by at most C; workers change nothing."""
    for data in ({}, {"num_workers": 2, "shuffle": True}):
        run = Run(noise_multiplier=1.0, data=data)
        assert run.optimizer.expected_batch_size == 5
        for x, y in run.loader:
            run.optimizer.zero_grad()
            run.backward(x, y)
            names = owners(x)
            assert all(names.count(name) == OWNERS.count(name) for name in names)
            assert len(run.private.per_sample_gradient_norms) == len(set(names))
            assert run.total() <= len(set(names)) * (1 + 1e-6)
            run.optimizer.step()
        assert run.engine.accountant.history == [(1.0, 0.5, 2)]


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_clipped_sums(clipping: str) -> None:
    """A whole backward pass and step of each kind, against autograd's of each row alone."""
    options: dict[str, Any] = {"clipping": clipping, "max_grad_norm": 0.7}
    if clipping == "per_layer":
        options["max_grad_norm"] = [0.1, 0.2, 0.3, 0.4]
    if clipping == "adaptive":
        options |= {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2}
        options |= {"max_clipbound": 10.0, "min_clipbound": 0.01, "unclipped_num_std": 1.0}
    run = Run(poisson_sampling=True, **options)
    run.model.double()
    x, y = next(iter(run.loader))
    x = x.double()
    x[:, :3] /= 30
    x[:, 3:] /= 20
    ids = owners(x * torch.tensor([1, 1, 1, 20]))
    rows = []
    stock = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    stock.load_state_dict(run.model.state_dict())
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(stock(x[i : i + 1]), y[i : i + 1])
        rows.append(dict(enumerate(torch.autograd.grad(loss, list(stock.parameters())))))
    units = unit_gradients(rows, ids)  # type: ignore[arg-type]
    run.backward(x, y)
    for k, p in enumerate(run.model.parameters()):
        want = torch.zeros_like(p)
        for unit in units:
            norm = torch.cat([g.flatten() for g in unit.values()]).norm()
            factor = min(1.0, 0.7 / (norm + 1e-6))
            if clipping == "per_layer":
                factor = min(1.0, options["max_grad_norm"][k] / (unit[k].norm() + 1e-6))
            if clipping == "automatic":
                factor = 0.7 / (norm + 0.01)
            want += factor * unit[k]
        assert float((run.optimizer.sums[p] - want).norm()) <= 1e-12 * float(want.norm())
    if clipping == "adaptive":  # a unit counts once, however many rows it has
        unclipped = sum(
            float(torch.cat([g.flatten() for g in u.values()]).norm()) <= 0.7 for u in units
        )
        assert run.optimizer.rule.halves == unclipped - len(units) / 2
    run.optimizer.step()
    assert not run.optimizer.sums


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_sensitivity_of_a_whole_unit(scale: float) -> None:
    """In float32: a unit of rows that agree, and of rows that cancel but for rounding."""
    torch.manual_seed(0)
    model, _ = build("causal-lm/gpt2", Sizes(rows=6))
    model.float()
    inputs, labels = batch(model, sizes=Sizes(rows=6))
    watched = BookKeepingHooks(model)
    for signs in ([1.0] * 6, [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]):
        opt = BookKeepingOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            expected_batch_size=1,
        )
        same = {k: v[:1].expand(6, *v.shape[1:]).contiguous() for k, v in inputs.items()}
        rows = row_losses(
            model, same if -1.0 in signs else inputs, labels[:1].expand(6, -1).contiguous()
        )
        watched.backward(rows * torch.tensor(signs) * scale, opt, [1] * 6)
        total = torch.cat([v.flatten().double() for v in opt.sums.values()]).norm()
        assert float(total) <= 0.5 * (1 + 1e-6)


def test_a_row_that_is_not_finite_takes_its_unit_along() -> None:
    run = Run()
    x, y = next(iter(run.loader))
    names = owners(x)
    bad = x.clone()
    bad[0, 0] = float("nan")
    kept = [i for i, name in enumerate(names) if name != names[0]]
    run.backward(bad, y)
    got = {p: v.clone() for p, v in run.optimizer.sums.items()}
    assert run.private.nonfinite_rows == 1  # a unit
    other = Run(None, poisson_sampling=False)
    other.backward(x[kept], y[kept], [names[i] for i in kept])
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(got[p], other.optimizer.sums[q], atol=1e-6)


def test_inclusion_and_choice_over_10_000_draws() -> None:
    """Every unit equally probable, by itself, whole; of rows above the cap each as often."""
    run = Run(max_rows_per_unit=4)
    rows = run.loader.dataset
    drawn = torch.zeros(10_000, len(rows))
    taken, chances = torch.zeros(40), torch.zeros(len(rows))
    for k, units in enumerate(d for _ in range(5000) for d in run.loader.batch_sampler):
        drawn[k, units] = 1
        for unit in units if k < 3000 else ():
            chosen = rows.chosen(unit)
            assert len(chosen) == len(set(chosen)) == min(4, len(rows.rows[unit]))
            taken[chosen] += 1
            chances[unit] += 1
    both = drawn.t() @ drawn
    assert float((both.diagonal() - 5000).abs().max()) < 5 * 2500**0.5
    pairs = both[~torch.eye(len(rows), dtype=torch.bool)]
    assert float((pairs - 2500).abs().max()) < 5 * 1875**0.5
    for unit, own in enumerate(rows.rows):
        share = min(4, len(own)) / len(own)
        spread = float(chances[unit]) * share * (1 - share)
        assert float((taken[own] - chances[unit] * share).abs().max()) <= 5 * spread**0.5
    sizes = [rows.size(unit) for unit in next(iter(run.loader.batch_sampler))]
    assert sizes == sorted(sizes)  # equal ones together: their rows are views, not copies


def test_epsilon_is_that_of_a_fresh_accountant_over_units() -> None:
    run = Run(noise_multiplier=1.3)
    run.epoch()
    run.epoch()
    fresh = create_accountant("rdp")
    for _ in range(4):
        fresh.step(noise_multiplier=1.3, sample_rate=5 / 10)
    assert run.engine.get_epsilon(1e-3) == fresh.get_epsilon(1e-3)


def test_noise_for_an_epsilon_is_over_units(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        opacus.privacy_engine, "get_noise_multiplier", lambda **k: asked.update(k) or 1.5
    )
    model = nn.Linear(4, 3)
    made = dpzoo.PrivacyEngine(accountant="rdp").make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(Owned(), batch_size=5),
        target_epsilon=8.0,
        target_delta=1e-3,
        epochs=3,
        max_grad_norm=1.0,
        grad_sample_mode="bk",
        unit_ids=OWNERS,
        max_rows_per_unit=3,
    )
    assert asked["sample_rate"] == 0.5
    assert made[1].noise_multiplier == 1.5
    assert len(made[-1].dataset) == 10
    assert max(map(made[-1].dataset.size, range(10))) == 3


def test_batch_memory_manager_cuts_between_units() -> None:
    for size in (1, 2, 100):
        whole, parts = (
            Run(noise_generator=torch.Generator()) for _ in range(2)
        )  # draws by the seed
        for run in (whole, parts):
            torch.manual_seed(3)
            if run is whole:
                run.epoch()
                continue
            with BatchMemoryManager(
                data_loader=run.loader, max_physical_batch_size=size, optimizer=run.optimizer
            ) as physical:
                run.epoch(physical)
        for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6)
        assert whole.engine.accountant.history == parts.engine.accountant.history


def test_empty_draws_and_leaving_early() -> None:
    run = Run(loader=DataLoader(Owned(), batch_size=1), noise_multiplier=1.0)
    torch.manual_seed(2)
    sizes = []
    for _ in range(3):
        for x, y in run.loader:
            sizes.append(len(x))
            run.optimizer.zero_grad()
            run.backward(x, y)
            run.optimizer.step()
    assert 0 in sizes
    for x, y in run.loader:
        run.backward(x, y)
        break
    run.epoch()
    assert run.engine.accountant.history == [(1.0, 0.1, 40)]


# --- attacks --------------------------------------------------------------------------------------------


def several(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    return next((x, y) for x, y in run.loader if len(x) > 9)


@pytest.mark.parametrize("ids", [False, True])
def test_a_unit_cut_by_micro_batches_is_refused(ids: bool) -> None:
    run = Run()
    x, y = several(run)
    names = owners(x)
    first = names.count(names[0])
    with pytest.raises(
        InputError, match=r"they cut a unit: .*user" if ids else "they cut a unit: of unit"
    ):
        run.backward(x[: first + 1], y[: first + 1], names[: first + 1] if ids else None)
    assert not run.optimizer.sums
    # What was dropped may be done again, in parts that have whole units.
    run.backward(x[:first], y[:first], names[:first] if ids else None)
    run.backward(x[first:], y[first:], names[first:] if ids else None)
    run.optimizer.step()


def test_a_unit_of_two_parts_is_refused() -> None:
    run = Run()
    x, y = several(run)
    names = owners(x)
    own = names.count(names[0])
    run.backward(x[:own], y[:own], names[:own])
    with pytest.raises(InputError, match="which has 0 left"):
        run.backward(x[:own].clone(), y[:own], names[:own])


def test_rows_in_another_order_need_their_ids() -> None:
    """A collator that sorts rows; with ids that belong to the draw the sums are those of the draw."""
    sums = []
    for shuffled in (False, True):
        run = Run()
        torch.manual_seed(5)
        x, y = several(run)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        order = order if shuffled else torch.arange(len(x))
        run.backward(x[order], y[order], owners(x[order]))
        sums.append([v.clone() for v in run.optimizer.sums.values()])
    for a, b in zip(*sums, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("how", ["shuffled", "a part that begins in a unit"])
def test_rows_that_the_loop_moves_are_refused(how: str) -> None:
    """Without ids it is their order that says whose they are."""
    run = Run()
    x, y = several(run)
    first = owners(x).count(owners(x)[0])
    part = torch.arange(len(x)).roll(1) if how == "shuffled" else torch.arange(1, first + 1)
    with pytest.raises(InputError, match="not in the order of the loader, which says"):
        run.backward(x[part], y[part])
    assert not run.optimizer.sums
    run.backward(x.clone(), y)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda names: [*names[:-1], "user 99"], "rows of 'user 99', which has 0 left"),
        (lambda names: names[:-1], r"ids for \d+ rows, wanted one for each row"),
        (lambda names: [*names[:-1], None], "unit_ids has None for row"),
        (lambda names: list(range(len(names))), "1 rows of 0, which has 0 left"),
    ],
)
def test_ids_of_a_batch_that_are_not_the_draws(ids: Any, message: str) -> None:
    run = Run()
    x, y = several(run)
    with pytest.raises(InputError, match=message):
        run.backward(x, y, ids(owners(x)))


def test_a_unit_of_two_parts_is_refused_where_the_caller_draws() -> None:
    run = Run(None, poisson_sampling=False)
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    run.backward(x[:2], y[:2], ["me", "you"])
    with pytest.raises(InputError, match="Rows of 'you' came in two parts of one step"):
        run.backward(x[2:], y[2:], ["you", "her"])
    assert not run.optimizer.sums
    for _ in range(2):  # another step may take them again
        run.backward(x[:2], y[:2], ["me", "you"])
        run.optimizer.step()
        run.optimizer.zero_grad()


def test_ids_of_a_batch_need_units() -> None:
    run = Run(None)
    x, y = next((x, y) for x, y in run.loader if len(x))
    with pytest.raises(InputError, match="got unit_ids, and make_private got none"):
        run.backward(x, y, owners(x))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (OWNERS[:-1], "unit_ids has 39 ids for 40 rows, wanted one for each row"),
        ([*OWNERS, "more"], "unit_ids has 41 ids for 40 rows"),
        ([*range(39), None], "unit_ids has None for row 39"),
        (np.array([*range(39), np.nan]), "unit_ids has nan for row 39"),
        (torch.tensor([0.0] * 39 + [math.nan]), "unit_ids has nan for row 39"),
        (
            [*range(39), "39"],
            r"has ids of int \(row 0\) and str \(row 39\), wanted ids of one type",
        ),
        (torch.zeros(40, 2), "unit_ids has a list for row 0, wanted numbers or texts"),
        (["me"] * 40, "unit_ids has 1 unit in 40 rows, wanted at least 2"),
        (7, "unit_ids=7, wanted a sequence of ids"),
        (dict.fromkeys(range(40), "me"), "unit_ids=dict, wanted a sequence of ids"),
        (set(range(40)), "unit_ids=set, wanted a sequence of ids"),
        ("who", "no column 'who' to tell units by; it has none"),
    ],
)
def test_ids_that_are_no_ids(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Run(ids)


class Missing:
    """As pandas.NA: unlike all, and not even that for sure."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError

    __hash__ = object.__hash__


def test_missing_ids_of_pandas() -> None:
    with pytest.raises(InputError, match="for row 39, wanted the id of a unit"):
        Run([*range(39), Missing()])


@pytest.mark.parametrize("ids", ["who", np.array(OWNERS), tuple(OWNERS)])
def test_ids_of_many_kinds(ids: Any) -> None:
    rows = Owned(column=True)
    run = Run(ids, rows=rows, data={"collate_fn": _without_names})
    assert [len(own) for own in run.loader.dataset.rows] == [
        OWNERS.count(name) for name in dict.fromkeys(OWNERS)
    ]
    run.epoch()


def _without_names(rows: list[Any]) -> Any:
    return torch.stack([r["x"] for r in rows]), torch.tensor([r["y"] for r in rows])


class Hub(Owned):
    """As `datasets.Dataset`: columns by name, rows at once."""

    column_names = ("x", "y", "who")

    def __getitem__(self, i: Any) -> Any:
        return iter(OWNERS) if i == "who" else super().__getitem__(i)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def test_a_column_of_a_hub_data_set() -> None:
    Run("who", rows=Hub()).epoch()
    with pytest.raises(InputError, match="no column 'whose' to tell units by; it has x, y, who"):
        Run("whose", rows=Hub())


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch", "ew"])
def test_opacus_modes_refuse_units(mode: str) -> None:
    with pytest.raises(
        InputError, match=rf"unit_ids in grad_sample_mode='{mode}'.*Use grad_sample_mode='bk'"
    ):
        Run(grad_sample_mode=mode)


def test_what_cannot_be_drawn_by_unit() -> None:
    with pytest.raises(InputError, match="poisson_sampling=False, wanted 'bk' and True"):
        Run(poisson_sampling=False)
    with pytest.raises(InputError, match="max_rows_per_unit=3 came without unit_ids"):
        Run(None, max_rows_per_unit=3)
    with pytest.raises(InputError, match="max_rows_per_unit=0, wanted a whole number above 0"):
        Run(max_rows_per_unit=0)
    with pytest.raises(InputError, match="wanted the ordinary loader"):
        Run(loader=Run().loader)
    weighted = DataLoader(Owned(), batch_size=5, sampler=WeightedRandomSampler([1.0] * 40, 40))
    with pytest.raises(InputError, match="has a WeightedRandomSampler"):
        Run(loader=weighted)


@pytest.mark.parametrize("how", ["cut", "joined"])
def test_collators_that_cut_or_join_rows(how: str) -> None:
    def collate(rows: list[Any]) -> Any:
        x, y = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        return (
            (x.repeat_interleave(2, 0), y.repeat_interleave(2)) if how == "cut" else (x[1:], y[1:])
        )

    with pytest.raises(InputError, match=r"the draw has|cut a unit"):
        Run(data={"collate_fn": collate}).epoch()


def test_two_optimizers() -> None:
    """The second engine's optimizer has not all that is trained; and a model is made private once."""
    run = Run()
    with pytest.raises(InputError, match=r"in grad_sample_mode='bk' already"):
        Run(model=run.model)


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    """Saved in mid-epoch; the run that goes on from it counts on, over units."""
    run = Run(noise_multiplier=1.0)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()
        break
    path = tmp_path / "run.pt"
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    other = Run(noise_multiplier=1.0)
    other.engine.load_checkpoint(path=path, module=other.private, optimizer=other.optimizer)
    other.epoch()
    assert other.engine.accountant.history == [(1.0, 0.5, 3)]
