"""DPTrainer over units: drawn, clipped and paid for as one; resumed to the bit."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import create_accountant
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.clipping.units import keyed_choice
from dpzoo.integrations import PrivacyArguments
from tests.integrations.runs import (
    BERT,
    LM,
    UNITS,
    Owned,
    assert_close,
    draws,
    privacy,
    trainer_of,
)
from tests.integrations.test_resume import SAVED, killed_run
from tests.support import assert_bit_equal, stock_model

UNIT: dict[str, Any] = {"unit_column": "who"}


def start_of(name: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    options = {"hidden_dropout_prob": dropout} if dropout else {}
    return dpzoo.convert(stock_model(name, torch.float32, **options))


@pytest.mark.parametrize("name", [BERT, LM])
def test_it_takes_the_steps_of_a_loop_written_by_hand(name: str, tmp_path: Path) -> None:
    start, rows = start_of(name), Owned(name)
    options = {"train_dataset": rows, "remove_unused_columns": False}
    trainer = trainer_of(start, tmp_path, {"noise_multiplier": 0.0, **UNIT}, **options)
    trainer.train()
    model = copy.deepcopy(start).train()
    private, optimizer, criterion, _ = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=dpzoo.ModelLoss(),
        data_loader=DataLoader(rows, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        grad_sample_mode="bk",
        poisson_sampling=False,
    )
    optimizer.expected_batch_size = 8  # units
    numbers = list(dict.fromkeys(rows.who))
    for units in draws(trainer, 4):
        optimizer.zero_grad()
        indices = [i for i, who in enumerate(rows.who) if numbers.index(who) in units]
        criterion(private(**rows.take(indices))).backward(unit_ids=[rows.who[i] for i in indices])
        optimizer.step()
    assert_close(trainer.model, model, 1e-6)  # float32, four steps
    assert not torch.equal(next(model.parameters()), next(start.parameters()))


def test_accounting_is_over_units(tmp_path: Path) -> None:
    trainer = trainer_of(start_of(BERT), tmp_path, UNIT, train_dataset=Owned(BERT))
    trainer.train()
    assert trainer.delta == 1 / UNITS
    fresh = create_accountant("rdp")
    for _ in range(4):
        fresh.step(noise_multiplier=1.0, sample_rate=8 / UNITS)
    assert trainer.epsilon == fresh.get_epsilon(1 / UNITS)


@pytest.mark.parametrize(("most", "step"), [(None, 4), (2, 6)])
def test_a_run_killed_in_mid_epoch_is_resumed(most: int | None, step: int, tmp_path: Path) -> None:
    """With dropout, and a cap whose choices have to come again."""
    start, private = start_of(BERT, 0.2), {**UNIT, "max_rows_per_unit": most}
    options: dict[str, Any] = {**SAVED, "train_dataset": Owned(BERT)}
    options |= {"per_device_train_batch_size": 3}  # units of three rows fill a part
    straight = trainer_of(start, tmp_path / "straight", private, **options)
    straight.train()
    killed_run(start, tmp_path, step, private=private, **options)
    resumed = trainer_of(start, tmp_path, private, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.epsilon == straight.epsilon
    changed = trainer_of(start, tmp_path, {**private, "max_rows_per_unit": 1}, **options)
    with pytest.raises(
        dpzoo.InputError, match=r"resumed with PrivacyArguments.max_rows_per_unit=1"
    ):
        changed.train(resume_from_checkpoint=True)


def test_parts_have_whole_units_and_choices_are_fresh(tmp_path: Path) -> None:
    rows = Owned(BERT)
    private = {**UNIT, "max_rows_per_unit": 2, "noise_seed": None}
    trainer = trainer_of(start_of(BERT), tmp_path, private, train_dataset=rows)
    loader = trainer.get_train_dataloader()
    of = trainer._drawn_from
    counts = np.zeros(len(rows), dtype=int)
    drawn = np.zeros(UNITS, dtype=int)
    for step in range(2000):
        units = loader.batch_sampler.draw(step)  # type: ignore[union-attr]
        choose = keyed_choice(trainer._batch_key, step)
        for unit in units:
            chosen = of.chosen(unit, choose)
            assert len(set(chosen)) == of.size(unit) <= 2
            assert {rows.who[i] for i in chosen} == {rows.who[of.rows[unit][0]]}
            counts[chosen] += 1
            drawn[unit] += 1
        # The choice of one unit is the same whoever else is drawn.
        assert of.chosen(3, choose) == of.chosen(3, keyed_choice(trainer._batch_key, step))
    assert np.abs(drawn - 1000).max() < 5 * 500**0.5
    for unit, own in enumerate(of.rows):
        share = min(2, len(own)) / len(own)
        spread = (drawn[unit] * share * (1 - share)) ** 0.5
        assert np.abs(counts[own] - drawn[unit] * share).max() <= 5 * spread
    for batch in loader:
        sizes = list(batch["units"].values())
        assert sum(sizes) == batch["rows"] == sum(len(p["labels"]) for p in batch["parts"])
        ends = np.cumsum(sizes).tolist()
        for part in np.cumsum([len(p["labels"]) for p in batch["parts"]]).tolist():
            assert part in ends
        assert all(len(p["labels"]) <= 4 and "who" not in p for p in batch["parts"])


def test_a_unit_larger_than_the_physical_batch_is_refused(tmp_path: Path) -> None:
    options = {"train_dataset": Owned(BERT), "per_device_train_batch_size": 2}
    with pytest.raises(dpzoo.InputError, match=r"has 3 rows, and per_device_train_batch_size=2"):
        trainer_of(start_of(BERT), tmp_path, UNIT, **options)
    trainer_of(start_of(BERT), tmp_path, {**UNIT, "max_rows_per_unit": 2}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**UNIT, "grad_sample_mode": "ghost"}, "unit_column='who', wanted None outside"),
        ({"max_rows_per_unit": 2}, "max_rows_per_unit=2, wanted None without unit_column"),
        ({**UNIT, "max_rows_per_unit": 0}, "max_rows_per_unit=0, wanted None without"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dpzoo.InputError, match=f"PrivacyArguments got {message}"):
        privacy(**options)
    assert PrivacyArguments(noise_multiplier=1.0, **UNIT).delta(16) == 1 / 16


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        dpzoo.InputError, match=r"no column 'whose' to tell units by; it has .*labels, who"
    ):
        trainer_of(start_of(BERT), tmp_path, {"unit_column": "whose"}, train_dataset=Owned(BERT))


def test_more_units_than_there_are(tmp_path: Path) -> None:
    """The logical batch is of units."""
    with pytest.raises(dpzoo.InputError, match="of 20 units for 16 training units"):
        trainer_of(
            start_of(BERT),
            tmp_path,
            UNIT,
            train_dataset=Owned(BERT),
            gradient_accumulation_steps=5,
        )
