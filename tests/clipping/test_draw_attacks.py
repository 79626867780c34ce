"""More attacks on draws, samplers, losses and what learns without gradients; each was silent once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from dpzoo.errors import InputError, UnsupportedModelError
from tests.clipping.runs import Numbered, Run

MODES = ("bk", "ghost", "hooks")


def steps(run: Run, count: int = 1000) -> None:
    """A pass over the loader, with a step for the first batches only."""
    for k, (x, y) in enumerate(run.loader):
        if k < count:
            run.backward(x, y)
            run.optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_sampler": BatchSampler(SubsetRandomSampler(range(10)), 4, False)},
        {"batch_size": 4, "sampler": RandomSampler(range(10))},
        {"batch_size": 4, "sampler": SequentialSampler(range(10))},
    ],
    ids=["inside a batch sampler", "random of ten", "first ten"],
)
def test_samplers_of_a_part_of_the_rows_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Poisson sampling would replace it"):
        Run(loader=DataLoader(Numbered(), **options))


class Writes(nn.Module):
    """Writes through .data, which leaves no version."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.out = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = {"buffer": self.buffer, "frozen": self.frozen, "trained": self.out.bias}
        if self.what in kept:
            kept[self.what].data.add_(x.detach().sum(0))
        elif not torch.is_grad_enabled():
            self.buffer.add_(x.sum(0))
        return self.out(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["buffer", "frozen", "trained"])
def test_writes_without_a_version_are_refused(what: str, mode: str) -> None:
    run = Run(mode, model=Writes(what))
    with pytest.raises(InputError, match=f"changed in a training forward pass.* {what}"):
        steps(run)


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_gradients_learns_nothing(mode: str) -> None:
    run = Run(mode, model=Writes("without gradients"))
    x, _ = next(iter(run.loader))
    with torch.no_grad(), pytest.raises(InputError, match="buffer changed in a training forward"):
        run.private(torch.cat([x, torch.ones(1, 4)]))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_norm_without_statistics_is_refused_in_eval_mode(mode: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"norm .* has no running statistics"):
        Run(mode, model=Quiet())


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
        self.out = nn.Linear(4, 3)

    def train(self, mode: bool = True) -> "Quiet":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


@pytest.mark.parametrize("scale", [lambda x: x.std(), lambda x: x.sum().reshape(1)])
def test_statistics_of_the_batch_do_not_scale_a_loss(
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    run = Run()
    x, y = next(b for b in run.loader if len(b[0]) > 2)
    for use in (lambda a, b: a * b, lambda a, b: a / b):
        with pytest.raises(InputError, match="was scaled by a tensor of shape"):
            use(run.criterion(run.private(x), y), scale(x))
    (run.criterion(run.private(x), y) * torch.rand(len(x))).backward()
    run.optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_the_last_batch_is_not_skipped_either(mode: str) -> None:
    rows = TensorDataset(torch.randn(6, 4), torch.zeros(6).long())
    run = Run(mode, loader=DataLoader(rows, batch_size=3))
    with pytest.raises(InputError, match="ended with 1 of its last batches passed over"):
        steps(run, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_fails_leaves_nothing_to_the_next(mode: str) -> None:
    """The disk is full under the ledger, the loop goes on, and nobody calls zero_grad()."""
    run, alone = Run(mode), Run(mode, poisson_sampling=False)
    begin, batches = run.optimizer.release.begin, iter(run.loader)
    run.backward(*next(batches))
    run.optimizer.release.begin = _full_disk
    with pytest.raises(OSError, match="no space left"):
        run.optimizer.step()
    run.optimizer.release.begin = begin
    batch = next(batches)
    for each in (run, alone):
        each.backward(*batch)
        each.optimizer.pre_step()
    for p, q in zip(run.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


def _full_disk(noise_multiplier: float) -> int:
    raise OSError("no space left on device")


@pytest.mark.parametrize("mode", MODES)
def test_a_step_hook_of_the_users_leaves_the_accounts(mode: str) -> None:
    run, seen = Run(mode, noise_multiplier=1.0), []
    run.optimizer.attach_step_hook(seen.append)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        run.backward(x, y)
        run.optimizer.step()
    assert seen == [run.optimizer] * len(run.loader)
    assert sum(count for _, _, count in run.engine.accountant.history) == len(run.loader)


class TokenMean(nn.Module):
    """Each row's loss, over a whole number that is the batch's."""

    def __init__(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.out, self.of = nn.Linear(4, 3), of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x) / self.of(x > 0)


@pytest.mark.parametrize(
    "of",
    [lambda n: n.sum(), lambda n: n.sum(1).max() + 1, lambda n: 1 + n.sum(1).argmax()],
    ids=["count", "largest count", "which row"],
)
def test_whole_numbers_of_the_batch_are_statistics_too(
    of: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    run = Run(model=TokenMean(of))
    x, y = next(b for b in run.loader if len(b[0]) > 2)
    with pytest.raises(InputError, match="what one row computes must not depend on another"):
        run.backward(x, y)
    own = Run(model=TokenMean(lambda n: 1 + n.sum(1, keepdim=True)))
    steps(own)


@pytest.mark.secret_draws
def test_who_is_drawn_does_not_follow_from_torchs_seed() -> None:
    """The seed at the top of a script is known, and torch's default is the same everywhere."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        run = Run()
        torch.manual_seed(7)
        drawn.append([x.flatten().tolist() for x, _ in run.loader])
    assert drawn[0] != drawn[1]


def again(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Steps on the sum of two forward passes, the second of changed rows."""
    run = Run()
    for x, y in run.loader:
        run.criterion(run.private(x) + run.private(change(x)), y).backward()
        run.optimizer.step()


@pytest.mark.parametrize(
    "change",
    [lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: x[torch.randperm(len(x))]],
    ids=["from behind", "the next one's", "at random"],
)
def test_rows_in_two_passes_at_other_places_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(
        InputError, match=r"Two forward passes before .* the same rows in another order"
    ):
        again(change)


@pytest.mark.parametrize(
    "change",
    [lambda x: x, torch.clone, lambda x: x + 0.1 * torch.randn_like(x), lambda x: 1 - x],
    ids=["the same", "a copy", "noisy", "another view"],
)
def test_rows_in_two_passes_at_their_places_are_one_gradient(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    again(change)


def test_after_a_refusal_the_same_batch_may_be_taken_as_it_should_be() -> None:
    run = Run()
    x, y = next(batch for batch in run.loader if len(batch[0]) > 1)
    with pytest.raises(InputError, match="Two forward passes before a backward"):
        run.criterion(run.private(x) + run.private(x.flip(0)), y).backward()
    run.backward(x, y)
    run.optimizer.step()


def test_a_rate_that_was_changed_by_hand_is_refused() -> None:
    run = Run()
    run.loader.batch_sampler.sampler.sample_rate *= 2
    with pytest.raises(
        InputError, match=r"sampler has sample_rate=.*, wanted .*, which make_private set"
    ):
        next(iter(run.loader))
