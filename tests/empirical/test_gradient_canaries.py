"""`dpzoo.GradientCanaries`: what they add to a step, the bound that they give, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpzoo
from dpzoo.accounting import epsilon_of
from dpzoo.errors import InputError
from dpzoo.heads import _Audited
from dpzoo.losses import IGNORE_INDEX, RowLosses

WIDTH, CLASSES, C, DELTA = 6, 3, 0.5, 1e-5


def data(rows: int, canaries: dpzoo.GradientCanaries) -> TensorDataset:
    """Rows, and the canaries behind them."""
    count = len(canaries)
    return TensorDataset(
        torch.cat([torch.randn(rows, WIDTH), torch.zeros(count, WIDTH)]),
        torch.cat([torch.full((rows,), canaries.none), torch.arange(count)]),
        torch.cat([torch.randint(CLASSES, (rows,)), torch.full((count,), IGNORE_INDEX)]),
    )


def private(rows: Any, canaries: dpzoo.GradientCanaries, batch: int, **options: Any) -> Any:
    model = _Audited(nn.Linear(WIDTH, CLASSES), canaries)
    return dpzoo.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=RowLosses(),
        data_loader=DataLoader(rows, batch_size=batch),
        max_grad_norm=C,
        grad_sample_mode="bk",
        **options,
    )


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_a_canary_adds_c_at_its_entry_and_nothing_else(clipping: str) -> None:
    torch.manual_seed(0)
    coins = [True, False, True, True]
    canaries = dpzoo.GradientCanaries(4, coins=coins)
    rows = data(5, canaries)
    alone = data(5, canaries)
    alone.tensors = tuple(column[:5] for column in rows.tensors)
    sums = []
    for dataset in (rows, alone):
        torch.manual_seed(1)
        model, optimizer, criterion, _ = private(
            dataset, canaries, len(dataset), noise_multiplier=0.0,
            poisson_sampling=False, clipping=clipping,
        )  # fmt: skip
        optimizer.zero_grad()
        losses = model(*dataset.tensors)
        assert torch.equal(losses[5:], torch.zeros(len(losses) - 5)), "no part of the loss"
        criterion(losses).backward()
        optimizer.step()
        expected = optimizer.expected_batch_size
        sums.append([p.grad * expected for p in model.parameters()])
        model.remove_hooks()
    (*with_, entries), (*without, none) = sums
    assert entries[:, 0].tolist() == pytest.approx([C, 0, C, C, 0], rel=1e-4)
    assert entries.max() <= C
    assert torch.equal(none, torch.zeros(5, 1))
    for a, b in zip(with_, without, strict=True):
        torch.testing.assert_close(a, b)


def audited(sigma: float, claimed: float, rate: float, steps: int) -> dpzoo.RunReport:
    """A run of 200 rows and 1,000 canaries, and the audit of a claim about it."""
    torch.manual_seed(0)
    canaries = dpzoo.GradientCanaries(1000)
    rows = data(200, canaries)
    _, optimizer, criterion, loader = made = private(
        rows, canaries, round(rate * len(rows)), noise_multiplier=sigma
    )
    done = 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            criterion(made[0](*batch)).backward()
            optimizer.step()
            canaries.see(done, optimizer.expected_batch_size / C)
            done += 1
    assert done == steps
    return dpzoo.audit_run(
        canaries,
        canaries.scores(claimed, rate),
        delta=DELTA,
        epsilon=epsilon_of("prv", ((claimed, rate, steps),), DELTA),
        independent=True,
    )


def test_the_bound_of_a_right_run_at_epsilon_8() -> None:
    report = audited(sigma=2.542, claimed=2.542, rate=1 / 2, steps=64)
    assert report.ok, str(report)
    assert report.epsilon == pytest.approx(8.0, abs=0.01)
    assert report["any mechanism"].epsilon >= 1.5
    assert report["independent canaries"].epsilon >= 2


def test_half_the_noise_is_found() -> None:
    report = audited(sigma=1.271, claimed=2.542, rate=1 / 2, steps=64)
    assert not report.ok
    assert report["any mechanism"].epsilon >= 2.5


def test_coins_and_steps_are_kept(tmp_path: Path) -> None:
    first = dpzoo.GradientCanaries(8)
    for step in range(3):
        first.weight.grad = torch.randn(9, 1)
        first.see(step, 2.0)
    first.save(tmp_path / "canaries.npz")
    assert (tmp_path / "canaries.npz").stat().st_mode & 0o077 == 0
    second = dpzoo.GradientCanaries(8)
    second.load(tmp_path / "canaries.npz")
    assert (second.coins == first.coins).all()
    assert (second.scores(1.0, 0.5) == first.scores(1.0, 0.5)).all()
    second.weight.grad = first.weight.grad
    second.see(2, 2.0)  # done again
    assert (second.scores(1.0, 0.5) == first.scores(1.0, 0.5)).all()
    with pytest.raises(InputError, match=r"coins of shape \(8,\), wanted \(9,\)"):
        dpzoo.GradientCanaries(9).load(tmp_path / "canaries.npz")


def test_they_leave_a_model_as_it_was() -> None:
    model = nn.Linear(WIDTH, CLASSES)
    given = torch.randn(2, WIDTH)
    before = sorted(vars(model))
    canaries = dpzoo.GradientCanaries(3)
    for own in (None, lambda x: 2 * nn.Linear.forward(model, x)):
        if own is not None:
            model.forward = own  # as accelerate and other libraries do
        value = model(given)
        canaries.join(model)
        assert torch.equal(model(given, canary=torch.tensor([0, 3])), value)
        assert canaries.term.shape == (2,)
        with pytest.raises(InputError, match=r"attribute canaries \(GradientCanaries"):
            dpzoo.GradientCanaries(3).join(model)
        with pytest.raises(InputError, match="got a Linear, wanted the model that they joined"):
            canaries.leave(nn.Linear(1, 1))
        canaries.leave(model)
        assert torch.equal(model(given), value)
        assert model.__dict__.get("forward") is own
        assert [n for n, _ in model.named_parameters()] == ["weight", "bias"]
    del model.forward
    assert sorted(vars(model)) == before


def test_a_forward_that_was_put_on_later_is_not_lost() -> None:
    model, canaries = nn.Linear(WIDTH, CLASSES), dpzoo.GradientCanaries(3)
    canaries.join(model)
    joined = model.forward
    model.forward = lambda x: joined(x)
    with pytest.raises(InputError, match="Undo first what was put on it later"):
        canaries.leave(model)
    model.forward = joined
    canaries.leave(model)


def test_scores_are_log_likelihood_ratios() -> None:
    canaries = dpzoo.GradientCanaries(2, coins=[True, False])
    canaries.weight.grad = torch.tensor([[1.0], [0.25], [7.0]])
    canaries.see(0, 1.0)

    def density(x: float, mean: float) -> float:
        return float(np.exp(-((x - mean) ** 2) / 2 / 0.8**2))

    wanted = [
        np.log((0.7 * density(x, 0) + 0.3 * density(x, 1)) / density(x, 0)) for x in (1, 0.25)
    ]
    assert canaries.scores(0.8, 0.3) == pytest.approx(wanted)
    assert canaries.scores(0.8, 1.0) == pytest.approx([(2 * x - 1) / 2 / 0.64 for x in (1, 0.25)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpzoo.GradientCanaries(1), "got 1 rows, wanted at least 2"),
        (lambda: dpzoo.GradientCanaries(3, coins=[True]), r"coins of shape \(1,\), wanted \(3,\)"),
        (lambda: dpzoo.GradientCanaries(3).scores(1.0, 0.5), "saw no step, wanted see"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
