"""What the engine accounts for, its noise, and what its checkpoints hold."""

import copy
import io
import logging
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpzoo
from dpzoo.clipping.engine import _refuse_equal_ranks
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError
from tests.clipping.runs import BATCH, MODES, Run, by_hand
from tests.support import assert_bit_equal

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


@pytest.mark.parametrize("mode", ["bk", "ghost"])
def test_a_criterion_without_a_reduction_is_refused(mode: str) -> None:
    for reduction in ("none", "sum"):
        model = nn.Linear(2, 2)
        with pytest.raises(InputError, match=f"reduction='{reduction}' and loss_reduction='mean'"):
            dpzoo.PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                criterion=nn.CrossEntropyLoss(reduction=reduction),
                data_loader=DataLoader(
                    TensorDataset(torch.zeros(4, 2), torch.zeros(4)), batch_size=2
                ),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                grad_sample_mode=mode,
            )


HISTORY = "privacy_accountant_state_dict"
DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.clear(), r"is no checkpoint that can be read .KeyError|read without running code in it"),
    (lambda c: c.update(module_state_dict=3), r"state of the model that does not fit .* \(TypeError: Exp"),
    (lambda c: c.update(module_state_dict={"x": torch.ones(1)}), r"of the model .*Missing key.*, wanted"),
    (lambda c: c[HISTORY].update(mechanism="zz"), "of the accountant that does not fit .*: state_dict of"),
    (lambda c: c.update({HISTORY: 3}), r"is damaged \(TypeError: .*it is not known what was spent"),
    (lambda c: c[HISTORY].update(history=[(1, 2)]), r"is damaged \(ValueError: not enough values"),
    (lambda c: c[HISTORY].update(history=[(-1.0, 0.5, 2)]), r"damaged \(ValueError: its account has the"),
    (lambda c: c[HISTORY].update(history=[(float("nan"), 0.5, 2)]), r"its account has the steps \[\(nan"),
    (lambda c: c[HISTORY].update(history=[(1.0, 0.5, -2)]), "its account has the steps"),
    (lambda c: c[HISTORY].update(history=[(1.0, 1.5, 2)]), "its account has the steps"),
    (lambda c: c[HISTORY].update(history=[]), r"of 2 steps that were taken its account has \[\]\), wanted"),
    (lambda c: c.update(optimizer_state_dict=3), r"state of the optimizer that does not fit .*\(Attrib"),
    (lambda c: c["optimizer_state_dict"].update(param_groups=[]), "of the optimizer .* parameter groups"),
    (lambda c: c.update(dpzoo_release=3), r"is damaged \(AttributeError: 'int' object"),
    (lambda c: c.update(dpzoo_release={}), r"is damaged \(KeyError: 'head'\)"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_checkpoint_that_does_not_fit_is_refused(
    damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    run, path = Run(noise_multiplier=1.0, poisson_sampling=False), tmp_path / "run.pt"
    train(run, 2)
    run.engine.save_checkpoint(path=path, module=run.private, optimizer=run.optimizer)
    checkpoint = torch.load(path, weights_only=False)
    damage(checkpoint)
    torch.save(checkpoint, path)
    other = Run(noise_multiplier=1.0, poisson_sampling=False)
    with pytest.raises(InputError, match=message):
        other.engine.load_checkpoint(path=path, module=other.private, optimizer=other.optimizer)
    assert other.engine.accountant.history in ([], run.engine.accountant.history)


def test_a_checkpoint_is_not_written_over_a_folder(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(IsADirectoryError):
        run.engine.save_checkpoint(path=tmp_path, module=run.private, optimizer=run.optimizer)


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
