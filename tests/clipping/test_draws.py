"""One step is one draw: attacks on what the engine trusts, in every mode."""

import copy
import io
import logging
import math
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import dpzoo
from dpzoo.clipping.engine import _refuse_equal_ranks
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError, UnsupportedModelError
from tests.support import assert_bit_equal

ROWS, RATE = 40, 8
MODES = ("bk", "ghost", "hooks", "functorch")


class Numbered(Dataset[Any]):
    """Rows whose features are large, so that each is clipped; the last feature is the row's number."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        return torch.randn(4) * 30, index % 3


class Run:
    """A private run of a small model, without noise unless asked for."""

    def __init__(self, mode: str = "bk", **options: Any) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.model = options.pop("model", None) or nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        self.model.train()
        make = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))
        loader = options.pop(
            "loader",
            DataLoader(Numbered(), batch_size=RATE, collate_fn=options.pop("collate_fn", None)),
        )
        self.engine = dpzoo.PrivacyEngine(accountant="rdp", **options.pop("engine", {}))
        made = self.engine.make_private(
            module=self.model,
            optimizer=make(self.model.parameters()),
            criterion=nn.CrossEntropyLoss(),
            data_loader=loader,
            noise_multiplier=options.pop("noise_multiplier", 0.0),
            max_grad_norm=options.pop("max_grad_norm", 1.0),
            grad_sample_mode=mode,
            **options,
        )
        self.private, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.criterion(self.private(x), y).backward()

    def steps(self) -> int:
        return sum(count for _, _, count in self.engine.accountant.history)


def some(loader: Any, least: int = 2) -> Iterator[Any]:
    """Batches of at least so many rows."""
    return (batch for batch in loader if len(batch[0]) >= least)


@pytest.mark.parametrize("mode", MODES)
def test_an_ordinary_loop(mode: str) -> None:
    run = Run(mode, noise_multiplier=1.0)
    for _ in range(2):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            run.backward(x, y)
            run.optimizer.step()
    assert run.steps() == 2 * len(run.loader)


def ordinary(run: Run) -> None:
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()


def two_draws(run: Run) -> None:
    for k, (x, y) in enumerate(run.loader):
        run.backward(x, y)
        if k % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()


def twice(run: Run) -> None:
    for x, y in some(run.loader):
        run.backward(x, y)
        run.backward(x, y)
        run.optimizer.step()


def half_twice(run: Run) -> None:
    for x, y in some(run.loader, 4):
        half = len(x) - len(x) // 2
        run.backward(x[:half], y[:half])
        run.backward(x[: len(x) - half], y[: len(x) - half])
        run.optimizer.step()


def a_part_only(run: Run) -> None:
    for x, y in some(run.loader):
        run.backward(x[1:], y[1:])
        run.optimizer.step()


def foreign_rows(run: Run) -> None:
    x = torch.randn(6, 4)
    run.backward(x, torch.zeros(6, dtype=torch.long))
    run.optimizer.step()


def the_empty_skipped(run: Run) -> None:
    for _ in range(40):
        for x, y in run.loader:
            if not len(x):
                continue
            run.optimizer.zero_grad()
            run.backward(x, y)
            run.optimizer.step()


def zipped(run: Run) -> None:
    for (a, ya), (b, yb) in zip(run.loader, run.loader, strict=True):
        run.optimizer.zero_grad()
        run.backward(torch.cat([a, b]), torch.cat([ya, yb]))
        run.optimizer.step()


def step_again(run: Run) -> None:
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()
        run.optimizer.step()


LOOPS: dict[Callable[[Run], None], str] = {
    two_draws: "passed over without a step|the draw has",
    twice: "came twice|the draw has",
    a_part_only: "and the draw has",
    foreign_rows: "no draw of the private loader is open",
    zipped: "the draw has|passed over",
    step_again: "no draw of the private loader is open|came after 0 rows",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_that_are_not_one_draw_a_step(loop: Callable[[Run], None], mode: str) -> None:
    run = Run(mode)
    # In hooks mode Opacus refuses some by itself, before rows are counted.
    says = f"{LOOPS[loop]}|Poisson|accumul|initialized|grad_sample"
    with pytest.raises((InputError, ValueError, AttributeError), match=says):
        loop(run)


def test_the_same_part_twice_is_refused() -> None:
    with pytest.raises(InputError, match="Rows of the draw came twice"):
        half_twice(Run())


class Pairs(Dataset[Any]):
    """Rows as a dictionary, several columns of one shape and type; two rows have the same words."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        words = torch.full((5,), max(index, 1))
        return {"words": words, "ones": torch.ones(5, dtype=torch.long), "labels": index % 3}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(ROWS, 4), nn.Linear(4, 3)

    def forward(self, ones: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.head((self.table(words) * ones[..., None]).mean(1))


COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cloned": lambda x: x.clone(),
    "picked": lambda x: x[torch.arange(len(x))],
    "from numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "stacked": lambda x: torch.stack(list(x)),
}


def in_parts(run: Run, picks: Callable[[int], list[list[int]]], copy: Any) -> None:
    for batch in run.loader:
        if len(batch["words"]) < 4:
            run.optimizer.draws.restart()
            continue
        for rows in picks(len(batch["words"])):
            part = {k: copy(v[rows]) for k, v in batch.items()}
            labels = part.pop("labels")
            run.criterion(run.private(**part), labels).backward()
        run.optimizer.step()


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(
    "picks",
    [
        lambda n: [[*range(n // 2)], [*range(n // 2)], [*range(n % 2)]],
        lambda n: [[*range(n - 1)], [0]],
        lambda n: [[0, *range(n - 1)]],
    ],
    ids=["a half again", "one again", "one twice in one part"],
)
def test_copies_of_rows_are_seen(copy: str, picks: Any) -> None:
    run = Run(model=Words(), loader=DataLoader(Pairs(), batch_size=RATE))
    with pytest.raises(InputError, match="Rows of the draw came twice"):
        in_parts(run, picks, COPIES[copy])


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_different_rows_add_up(copy: str) -> None:
    run = Run(model=Words(), loader=DataLoader(Pairs(), batch_size=ROWS - 1))
    in_parts(run, lambda n: [[*range(1, n, 2)], [*range(0, n, 2)]], COPIES[copy])
    assert run.steps() == len(run.loader)


@pytest.mark.parametrize("mode", MODES)
def test_skipping_empty_draws_is_refused(mode: str) -> None:
    run = Run(
        mode,
        loader=DataLoader(TensorDataset(torch.randn(6, 4), torch.zeros(6).long()), batch_size=1),
    )
    with pytest.raises(InputError, match=r"passed over without a step|the draw has 0"):
        the_empty_skipped(run)


@pytest.mark.parametrize("how", ["cut", "joined", "copied"])
@pytest.mark.parametrize("mode", MODES)
def test_collators_that_cut_or_join_rows(how: str, mode: str) -> None:
    def collate(rows: list[Any]) -> Any:
        x, y = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        if how == "cut":
            return x.repeat_interleave(4, 0), y.repeat_interleave(4)
        if how == "joined":
            return x[: len(x) // 2 or 1], y[: len(x) // 2 or 1]
        return torch.cat([x, x[:1]]), torch.cat([y, y[:1]])

    run = Run(mode, collate_fn=collate)
    with pytest.raises(InputError, match="the draw has"):
        ordinary(run)


def test_a_loss_of_tokens_is_refused() -> None:
    run = Run(model=nn.Linear(4, 3))
    x, y = next(some(run.loader))
    losses = run.private(x.unsqueeze(1).expand(-1, 3, -1)).flatten(0, 1)
    with pytest.raises(InputError, match=r"losses have \d+ rows and the batch had"):
        run.criterion(losses, y.repeat_interleave(3)).backward()


@pytest.mark.parametrize("cut", [1, 3, 100])
def test_parts_of_one_draw_add_up(cut: int) -> None:
    whole, parts = Run(), Run()
    for (x, y), (u, v) in zip(some(whole.loader), some(parts.loader), strict=False):
        for run, size in ((whole, len(x)), (parts, cut)):
            a, b = (x, y) if run is whole else (u, v)
            run.optimizer.zero_grad()
            run.optimizer.draws.restart()
            run.optimizer.draws.begin(len(a))
            for start in range(0, len(a), size):
                run.backward(a[start : start + size], b[start : start + size])
            run.optimizer.step()
        break
    assert whole.steps() == parts.steps() == 1


@pytest.mark.parametrize("mode", MODES)
def test_batch_memory_manager_and_leaving_it_early(mode: str) -> None:
    run = Run(mode)

    def epoch(stop: int | None) -> None:
        with BatchMemoryManager(
            data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer
        ) as physical:
            for k, (x, y) in enumerate(physical):
                run.optimizer.zero_grad()
                run.backward(x, y)
                run.optimizer.step()
                if k == stop:
                    break

    before = [p.detach().clone() for p in run.model.parameters()]
    epoch(1)
    taken = run.steps()
    for p, b in zip(run.model.parameters(), before, strict=True):
        if not taken:
            assert torch.equal(p, b)
    epoch(None)
    assert run.steps() == taken + len(run.loader)
    moved = [p.detach() - b for p, b in zip(run.model.parameters(), before, strict=True)]
    # every row at most once a step, C = 1, lr = 0.1, divided by the expected batch
    assert float(torch.cat([m.flatten() for m in moved]).norm()) <= 0.1 * 2 * ROWS / RATE * 10


def test_a_loader_may_be_read_without_steps() -> None:
    run = Run()
    with torch.no_grad():
        for x, _ in run.loader:
            run.private(x)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()
        if run.steps() == 2:
            break
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()
    assert run.steps() == 2 + len(run.loader)


def test_workers_do_not_confuse_the_count() -> None:
    run = Run(loader=DataLoader(Numbered(), batch_size=RATE, num_workers=2))
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()
    assert run.steps() == len(run.loader)


@pytest.mark.parametrize("mode", MODES)
def test_without_poisson_sampling_the_caller_answers(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = Run(mode, poisson_sampling=False)
    assert "the caller is responsible for the draws" in caplog.text
    run.backward(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    run.optimizer.step()
    assert run.steps() == 1


def test_a_criterion_of_another_reduction_is_refused() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(
        InputError, match="criterion with reduction='sum' and loss_reduction='mean'"
    ):
        dpzoo.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(reduction="sum"),
            data_loader=DataLoader(Numbered(), batch_size=RATE),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost",
        )


def test_samplers_that_would_be_replaced_are_refused() -> None:
    rows = Numbered()
    weighted = DataLoader(rows, batch_size=8, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS))
    with pytest.raises(
        InputError, match="has a WeightedRandomSampler, and Poisson sampling would replace"
    ):
        Run(loader=weighted)
    batches = DataLoader(rows, batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(InputError, match="has a list, and Poisson sampling would replace it"):
        Run(loader=batches)
    Run(loader=DataLoader(rows, batch_size=8, shuffle=True))
    Run(loader=weighted, poisson_sampling=False)


# --- sums are owned -------------------------------------------------------------------------------------


def by_hand(**options: Any) -> Run:
    return Run(poisson_sampling=False, **options)


BATCH = (torch.randn(5, 4) * 30, torch.tensor([0, 1, 2, 0, 1]))


def test_two_optimizers_of_one_model_are_refused() -> None:
    run = by_hand(optimizer=lambda p: torch.optim.SGD(list(p)[:2], lr=0.1))
    with pytest.raises(
        InputError, match=r"2\.weight and 1 more of the model's trained parameters are not"
    ):
        run.backward(*BATCH)
    assert not run.optimizer.sums


def test_a_later_parameter_group_counts() -> None:
    run = by_hand(optimizer=lambda p: torch.optim.SGD(list(p)[:2], lr=0.1))
    run.optimizer.add_param_group({"params": list(run.model[2].parameters())})
    run.backward(*BATCH)
    total = torch.cat([v.flatten() for v in run.optimizer.sums.values()]).norm()
    assert float(total) <= 5 * (1 + 1e-6)
    assert len(run.optimizer.sums) == 4


@pytest.mark.parametrize("when", ["between parts", "before the step"])
@pytest.mark.parametrize("freeze", [True, False])
def test_changing_what_is_trained_within_a_step_is_refused(when: str, freeze: bool) -> None:
    run = by_hand()
    if not freeze:
        run.model[0].weight.requires_grad_(False)
    run.backward(*BATCH)
    run.model[0].weight.requires_grad_(not freeze)
    again = (lambda: run.backward(*BATCH)) if when == "between parts" else run.optimizer.step
    with pytest.raises(InputError, match="frozen or unfrozen between"):
        again()
    assert not run.optimizer.sums
    run.backward(*BATCH)  # and after that, as it is now
    run.optimizer.step()


def test_an_exception_halfway_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the middle of a sum, and a retry."""
    run = by_hand()
    from dpzoo.clipping.factor_store import FactorStore

    weighted_sum, calls = FactorStore.weighted_sum, []

    def failing(self: FactorStore, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("planted")
        return weighted_sum(self, *args, **kwargs)

    run.backward(*BATCH)  # its first batch is checked, with sums of its own
    run.optimizer.drop()
    monkeypatch.setattr(FactorStore, "weighted_sum", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run.backward(*BATCH)
    assert not run.optimizer.sums
    run.backward(*BATCH)
    total = torch.cat([v.flatten() for v in run.optimizer.sums.values()]).norm()
    assert float(total) <= 5 * (1 + 1e-6)


def test_losses_cannot_be_used_twice_or_mixed_with_a_batch_loss() -> None:
    run = by_hand()
    loss = run.criterion(run.private(BATCH[0]), BATCH[1])
    with pytest.raises(
        InputError, match=r"combined with a tensor of shape \(\) that needs a gradient"
    ):
        loss + run.model[0].weight.square().sum()
    with pytest.raises(
        InputError, match=r"combined with a tensor of shape \(\) that needs a gradient"
    ):
        loss * run.model[0].weight.sum()
    (loss * 65536 + 1.0).backward()
    total = torch.cat([v.flatten() for v in run.optimizer.sums.values()]).norm()
    assert float(total) <= 5 * (1 + 1e-6)
    for again in (loss, loss * 2):
        with pytest.raises(InputError, match="backward\\(\\) was called twice on one private loss"):
            again.backward()


def test_closures_and_lbfgs_are_refused() -> None:
    with pytest.raises(InputError, match="LBFGS, which evaluates the loss several times"):
        by_hand(optimizer=lambda p: torch.optim.LBFGS(p))
    for mode in ("bk", "hooks"):
        run = by_hand(mode=mode)
        with pytest.raises(InputError, match="got a closure"):
            run.optimizer.step(lambda: 0.0)


# --- nothing but parameters learns ----------------------------------------------------------------------


class Running(nn.Module):
    """A running mean in a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1) if len(x) else None
        return self.out(x)


class Replaced(Running):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = x.detach().sum(0)
        return self.out(x)


class FrozenMoves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.codes.data.add_(x.detach().sum())
        with torch.no_grad():
            self.codes.add_(1.0)
        return self.out(x)


@pytest.mark.parametrize("mode", ["bk", "hooks", "ghost"])
@pytest.mark.parametrize("kind", [Running, Replaced, FrozenMoves])
def test_what_learns_without_gradients_is_refused(kind: type[nn.Module], mode: str) -> None:
    if mode != "bk" and kind is FrozenMoves:
        return  # Opacus takes no module with both kinds of parameters
    run = Run(mode, model=kind(), poisson_sampling=False)
    with pytest.raises(InputError, match="changed in a training forward pass"):
        run.backward(*BATCH)
    run.model.eval()
    with torch.no_grad():
        run.private(BATCH[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm1d(4, affine=False),
        lambda: nn.BatchNorm1d(4).requires_grad_(False),
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 1)), nn.InstanceNorm1d(4, track_running_stats=True)
        ),
        lambda: nn.Embedding(4, 2, max_norm=1.0),
    ],
)
def test_known_layers_are_refused_at_once(layer: Callable[[], nn.Module], mode: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"in training mode|max_norm"):
        Run(mode, model=nn.Sequential(layer(), nn.Linear(4, 3)))


# --- accounting -----------------------------------------------------------------------------------------


def test_the_expected_batch_size_is_exact() -> None:
    loader = DataLoader(TensorDataset(torch.randn(98, 4), torch.zeros(98).long()), batch_size=2)
    for mode in ("bk", "hooks"):
        assert Run(mode, loader=loader).optimizer.expected_batch_size == 2


def test_gdp_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="accountant='gdp' is a central-limit approximation"):
        dpzoo.PrivacyEngine(accountant="gdp")


@pytest.mark.parametrize("delta", [0, 1, 1.5, -0.1, None])
def test_deltas_out_of_range_are_refused(delta: Any) -> None:
    run = Run()
    with pytest.raises(InputError, match=r"delta=.*, wanted a number between 0 and 1"):
        run.engine.get_epsilon(delta)
    with pytest.raises(InputError, match=r"target_delta=.*, wanted a number between 0 and 1"):
        dpzoo.PrivacyEngine().make_private_with_epsilon(
            module=run.model,
            optimizer=None,
            data_loader=None,
            target_epsilon=1.0,
            target_delta=delta,
            epochs=1,
        )
    assert run.engine.get_epsilon(1e-5) == 0


def test_a_row_moves_the_adaptive_count_by_half() -> None:
    """With and without a row, all else equal: the released sum, before its noise."""
    options = {
        "clipping": "adaptive",
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0,
        "min_clipbound": 0.01,
        "unclipped_num_std": 1.0,
    }
    found = []
    for rows in (5, 4):
        run = by_hand(max_grad_norm=1.0, **options)
        run.backward(BATCH[0][:rows], BATCH[1][:rows])
        found.append(run.optimizer.rule.halves)
    assert abs(found[0] - found[1]) == 0.5
    with pytest.raises(InputError, match="wanted mode 'bk'"):
        by_hand(mode="hooks", max_grad_norm=1.0, **options)


# --- noise and checkpoints ------------------------------------------------------------------------------


def train(run: Run, steps: int, seed: int = 0) -> None:
    for _ in range(steps):
        torch.manual_seed(seed + run.optimizer.release.steps)
        run.optimizer.zero_grad()
        run.backward(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        run.optimizer.step()


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("mode", ["bk", "hooks", "ghost"])
def test_a_step_done_again_is_the_same_step_or_another_one(mode: str, tmp_path: Path) -> None:
    """Killed after step 3, continued from step 2: once equal, once with other rows."""
    path = tmp_path / "run.pt"
    first = Run(mode, noise_multiplier=1.0, poisson_sampling=False)
    train(first, 2)
    first.engine.save_checkpoint(path=path, module=first.private, optimizer=first.optimizer)
    assert (os.stat(path).st_mode & 0o077) == 0
    train(first, 1)

    def resumed(seed: int) -> Run:
        run = Run(mode, noise_multiplier=1.0, poisson_sampling=False)
        run.engine.load_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
        assert run.steps() >= 3  # the step after the checkpoint is owed at once
        train(run, 1, seed)
        return run

    same = resumed(0)
    assert torch.equal(weights(same), weights(first))
    assert same.steps() == 3
    other, third = resumed(100), resumed(200)
    assert other.steps() == 4
    assert third.steps() == 5  # two releases of step 3 were known, and this is one more
    # Equal noise would leave the difference of two clipped sums: at most 2 * 5 * C * lr / rows.
    for run in (other, third):
        assert float((weights(run) - weights(first)).norm()) > 0.05


def test_two_runs_do_not_share_noise() -> None:
    a, b = (Run(noise_multiplier=1.0, poisson_sampling=False) for _ in range(2))
    assert torch.equal(weights(a), weights(b))
    train(a, 1)
    train(b, 1)
    assert not torch.equal(weights(a), weights(b))


def test_a_generator_of_the_users_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Run(noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(1))
    assert "this run has no differential privacy" in caplog.text
    with pytest.raises(InputError, match="noise_generator in secure mode"):
        Run(engine={"secure_mode": True}, noise_generator=torch.Generator())
    Run(engine={"secure_mode": True}, noise_multiplier=1.0)


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_checkpoint_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run()
    torch.save({"module_state_dict": {}, "privacy_accountant_state_dict": Runs()}, "bad.pt")
    with pytest.raises(InputError, match="read without running code"):
        run.engine.load_checkpoint(path="bad.pt", module=run.private, optimizer=run.optimizer)
    with pytest.raises(InputError, match="read without running code"):
        run.engine.load_checkpoint(
            path="bad.pt", module=run.private, torch_load_kwargs={"weights_only": False}
        )
    assert not Path("ran").exists()


def taken(run: Run, epochs: int = 1) -> int:
    for _ in range(epochs):
        for x, y in run.loader:
            run.backward(x, y)
            run.optimizer.step()
    return run.steps()


@pytest.mark.parametrize("optimizer", [True, False], ids=["with", "without its optimizer"])
def test_rolling_back_costs_what_was_done_since(optimizer: bool, tmp_path: Path) -> None:
    run, path = Run(noise_multiplier=1.0), tmp_path / "best.pt"
    taken(run)
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    steps = taken(run, 2)
    own = {"optimizer": run.optimizer} if optimizer else {}
    run.engine.load_checkpoint(path=path, module=run.private, **own)
    assert run.steps() == steps
    other = Run(noise_multiplier=1.0)
    own = {"optimizer": other.optimizer} if optimizer else {}
    other.engine.load_checkpoint(path=path, module=other.private, **own)
    assert other.steps() == steps


def test_an_engine_does_not_forget_its_own_steps(tmp_path: Path) -> None:
    run, other, path = Run(noise_multiplier=1.0), Run(noise_multiplier=1.0), tmp_path / "other.pt"
    taken(run), taken(other, 2)
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    steps, before = other.steps(), copy.deepcopy(other.model.state_dict())
    message = f"has accounted {steps} steps, and .*other.pt has an account of {run.steps()}"
    for own in ({"optimizer": other.optimizer}, {}):
        with pytest.raises(InputError, match=message):
            other.engine.load_checkpoint(path=path, module=other.private, **own)
    assert other.steps() == steps
    assert_bit_equal(before, other.model.state_dict())


def test_a_ledger_that_is_gone_is_missed_after_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, path = Run(noise_multiplier=1.0), tmp_path / "run.pt"
    taken(run)
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    taken(run)
    Path(f"{path}.ledger").unlink()
    other = Run(noise_multiplier=1.0)
    with pytest.raises(InputError, match=r"ledger .*run\.pt\.ledger is gone"):
        other.engine.load_checkpoint(path=path, module=other.private, optimizer=other.optimizer)
    with caplog.at_level(logging.WARNING):
        other.engine.load_checkpoint(path=path, module=other.private)
    assert "is gone: steps that were taken after" in caplog.text


@pytest.mark.parametrize("place", [io.BytesIO(), None, 7, b"run.pt"])
def test_a_checkpoint_has_a_path(place: Any) -> None:
    """Its ledger lies beside it."""
    run = Run()
    kind = type(place).__name__
    for call in (run.engine.save_checkpoint, run.engine.load_checkpoint):
        with pytest.raises(InputError, match=f"^{call.__name__} got a {kind}, wanted the path"):
            call(path=place, module=run.model, optimizer=run.optimizer)


def test_a_ledger_that_is_gone_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run = Run(noise_multiplier=1.0, poisson_sampling=False)
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    train(run, 2)
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    (tmp_path / "run.pt.ledger").unlink()
    other = Run(noise_multiplier=1.0, poisson_sampling=False)
    with pytest.raises(InputError, match="is gone"):
        other.engine.load_checkpoint(path=path, module=other.private, optimizer=other.optimizer)


def test_every_mode_has_noise_of_the_right_size() -> None:
    for mode in MODES:
        model = nn.Linear(4, 3000)
        run = Run(
            mode, model=model, noise_multiplier=2.0, max_grad_norm=0.5, poisson_sampling=False
        )
        before = model.weight.detach().clone()
        run.backward(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
        run.optimizer.step()
        moved = (model.weight.detach() - before) / 0.1 * run.optimizer.expected_batch_size
        assert math.isclose(float(moved.std()), 1.0, rel_tol=0.03), mode


def test_a_sum_belongs_to_its_optimizer() -> None:
    """What another optimizer does to the parameters' attributes is not looked at."""
    run = by_hand()
    run.backward(*BATCH)
    for p in run.model.parameters():
        p.summed_grad = torch.full_like(p, 1e6)
    run.optimizer.step()
    assert all(float(p.detach().abs().max()) < 10 for p in run.model.parameters())
    assert isinstance(run.optimizer, BookKeepingOptimizer)


def test_ranks_with_equal_seeds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would draw the same rows together; two processes are played by what they tell each other."""
    others: list[Any] = []

    def gather(seen: list[Any], own: Any) -> None:
        seen[:] = [own, *others]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    two, loaders = types.SimpleNamespace(world_size=2), torch.Generator().manual_seed(7)
    torch.manual_seed(5)
    for other, generator in (((6, None), None), ((6, 8), loaders), ((6, None), loaders)):
        others[:] = [other]
        _refuse_equal_ranks(two, generator)
    for other, generator, twice in (((5, None), None, 5), ((6, 7), loaders, 7)):
        others[:] = [other]
        with pytest.raises(
            InputError,
            match=rf"Ranks have equal seeds \(\[{twice}, {twice}\]\).*another seed in each",
        ):
            _refuse_equal_ranks(two, generator)
