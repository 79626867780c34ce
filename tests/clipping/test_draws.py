"""One step is one draw: attacks on what the engine trusts, in every mode."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import dpzoo
from dpzoo.errors import InputError
from tests.clipping.runs import MODES, RATE, ROWS, Numbered, Run


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
