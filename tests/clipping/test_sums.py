"""A sum belongs to one optimizer and one draw, and nothing but trained parameters learns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dpzoo.errors import InputError, UnsupportedModelError
from tests.clipping.runs import BATCH, MODES, Run, by_hand


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
