"""The steps of DPTrainer: exact in every mode, however they are cut, with batches and noise as claimed."""

import copy
import itertools
import math
import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import dpzoo
from dpzoo.integrations.batches import LogicalBatches, PoissonBatches
from tests.integrations.runs import (
    BERT,
    LM,
    LOG,
    MODES,
    Rows,
    assert_close,
    draws,
    trainer_of,
)
from tests.support import (
    NAMES,
    TASK,
    assert_bit_equal,
    batch_for,
    largest_error,
    snapshot,
    stock_model,
)


@pytest.mark.parametrize("name", [BERT, LM])
@pytest.mark.parametrize("mode", MODES)
def test_it_takes_the_steps_of_a_loop_written_by_hand(name: str, mode: str, tmp_path: Path) -> None:
    """Without noise: clipped, summed and divided by the expected rows, whatever Trainer would average.

    Evaluations in between leave nothing behind.
    """
    start, rows = dpzoo.convert(stock_model(name, torch.float32)), Rows(name)
    trainer = trainer_of(
        start, tmp_path, {"noise_multiplier": 0.0, "grad_sample_mode": mode}, **LOG
    )
    result = trainer.train()
    assert result.global_step == trainer.state.global_step == 4
    assert trainer.state.epoch == 2.0

    model = copy.deepcopy(start).train()
    private, optimizer, criterion, _ = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=dpzoo.ModelLoss(),
        data_loader=DataLoader(rows, batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        grad_sample_mode="bk",
        poisson_sampling=False,
    )
    losses = []
    for indices in draws(trainer, 4):
        optimizer.zero_grad()
        loss = criterion(private(**rows.take(indices)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_close(trainer.model, model, 1e-6)  # float32, four steps
    assert not torch.equal(next(model.parameters()), next(start.parameters()))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert result.training_loss == pytest.approx(sum(losses) / 4, rel=1e-4)


class HeadRows(Rows):
    """Rows for any head, all its labels among them."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(11)
        self.batch = batch_for(name, rows=16, dtype=torch.float32)

    def __len__(self) -> int:
        return 16


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if TASK[name] != "base"])
def test_the_modes_agree_on_every_head(name: str, tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(name, torch.float32))
    models = []
    for mode in MODES:
        private = {"noise_multiplier": 0.0, "grad_sample_mode": mode}
        options = {"train_dataset": HeadRows(name), "eval_dataset": HeadRows(name), "max_steps": 2}
        trainer = trainer_of(start, tmp_path, private, **options)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        models.append(trainer.model)
    for model in models[1:]:
        assert_close(model, models[0], 1e-6)  # float32
    moved = [
        largest_error(p, q) for p, q in zip(models[0].parameters(), start.parameters(), strict=True)
    ]
    assert max(moved) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_parts_and_their_size_do_not_matter(mode: str, tmp_path: Path) -> None:
    """Without noise, which follows from every bit of the sums; it is drawn once for a logical batch."""
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    models = []
    for physical, steps in ((8, 1), (4, 2), (1, 8)):
        options = {"per_device_train_batch_size": physical, "gradient_accumulation_steps": steps}
        private = {"grad_sample_mode": mode, "noise_multiplier": 0.0}
        trainer = trainer_of(start, tmp_path, private, **options)
        sizes: list[int] = []

        def note(*call: Any, sizes: list[int] = sizes) -> None:
            sizes.append(len(call[-1]["labels"]))

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.train()
        assert max(sizes) <= physical
        assert sum(sizes) == sum(len(rows) for rows in draws(trainer, 4))
        models.append(trainer.model)
    for model in models[1:]:
        assert_close(model, models[0], 1e-6)  # float32
    noisy = [
        trainer_of(start, tmp_path, {"grad_sample_mode": mode, "noise_seed": seed})
        for seed in (5, 5, 6)
    ]
    for trainer in noisy:
        trainer.train()
    weights = [trainer.model.classifier.weight for trainer in noisy]
    assert torch.equal(weights[0], weights[1])
    assert largest_error(weights[2], weights[0]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_a_step_of_noise(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last of three batches have no rows: their noise is as large as ever.

    18 rows are no whole number of batches of 8; the expected rows and the sample rate are exact.
    """
    real = PoissonBatches.draw
    monkeypatch.setattr(
        PoissonBatches, "draw", lambda self, step: [] if step in (0, 2) else real(self, step)
    )
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    noise = 0.5 * 2.0 / 8 * 0.05  # C, sigma, expected rows, learning rate

    class Watch(TrainerCallback):
        moved: list[torch.Tensor] = []
        last = snapshot(start)

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            now = snapshot(model)
            self.moved.append(torch.cat([(now[k] - self.last[k]).flatten() for k in now]))
            self.last = now

    watch = Watch()
    private = {"grad_sample_mode": mode, "noise_multiplier": 2.0}
    options = {"train_dataset": Rows(BERT, 18), "max_steps": 3, "callbacks": [watch]}
    trainer = trainer_of(start, tmp_path, private, **options, **LOG)
    trainer.train()
    assert len(watch.moved) == 3
    for step in (0, 2):
        assert float(watch.moved[step].std()) == pytest.approx(noise, rel=0.05)  # 9,000 numbers
    assert trainer._account.history == [(2.0, 8 / 18, 3)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == losses[2] == 0.0
    assert losses[1] > 0


def test_batches_are_poisson_samples_and_differ() -> None:
    sampler = PoissonBatches(1000, 0.1, 10, key=7, current_step=lambda: 20)
    batches = [sampler.draw(step) for step in range(200)]
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(100, abs=3)  # standard error 0.67
    assert sizes.std() == pytest.approx(math.sqrt(90), rel=0.2)
    counts = np.bincount(np.concatenate(batches), minlength=1000)
    assert counts.std() == pytest.approx(math.sqrt(200 * 0.09), rel=0.1)
    shared = [len(set(a) & set(b)) for a, b in itertools.pairwise(batches)]
    assert np.mean(shared) == pytest.approx(10, abs=1)  # 1000 * 0.1 * 0.1: independent
    assert sampler.draw(3) == batches[3]
    assert list(sampler) == [[step, *sampler.draw(step)] for step in range(20, 30)]
    assert PoissonBatches(1000, 0.1, 10, 8, lambda: 0).draw(3) != batches[3]
    fresh = PoissonBatches(1000, 0.1, 10, None, lambda: 0)
    assert fresh.draw(3) != fresh.draw(3)  # the operating system's


def test_rows_of_like_length_share_a_part() -> None:
    """Every row of the draw once, in parts as large as before, and the longest together."""
    lengths = [9, 2, 7, 1, 8, 3, 1, 6]
    rows = [{"input_ids": [0] * length, "labels": i} for i, length in enumerate(lengths)]
    batch = LogicalBatches(rows, lambda part: part, physical=3, key=1).__getitems__([5, *range(8)])
    assert batch["rows"] == 8
    parts = [[len(row["input_ids"]) for row in part] for part in batch["parts"]]
    assert parts == [[1, 1, 2], [3, 6, 7], [8, 9]]
    assert sorted(row["labels"] for part in batch["parts"] for row in part) == list(range(8))
    other = [(torch.zeros(3), i) for i in range(8)]  # rows that do not say how long they are
    parts = LogicalBatches(other, list, physical=5, key=1).__getitems__([0, 1, 4, 6])["parts"]
    assert [[row[1] for row in part] for part in parts] == [[1, 4, 6]]


def test_without_a_seed_noise_and_batches_are_not_those_of_trainers_seed(tmp_path: Path) -> None:
    """TrainingArguments.seed is 42 by default: noise from it could be computed, and subtracted."""
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    one, two = (trainer_of(start, tmp_path, {"noise_seed": None}) for _ in range(2))
    before = draws(one, 4)
    one.train(), two.train()
    assert before == draws(one, 4) != draws(two, 4)
    assert largest_error(one.model.classifier.weight, two.model.classifier.weight) > 1e-3
    again, once_more = (
        trainer_of(start, tmp_path, {"noise_seed": None}, max_steps=1) for _ in range(2)
    )
    for trainer in (again, once_more):
        trainer._batch_key = 1  # the same batches
        trainer.train()
    assert draws(again, 4) == draws(once_more, 4)
    assert largest_error(again.model.classifier.weight, once_more.model.classifier.weight) > 1e-4


def test_dropout_follows_from_a_secret_and_not_from_trainers_seed(tmp_path: Path) -> None:
    stock = stock_model(BERT, torch.float32, hidden_dropout_prob=0.5)
    start = dpzoo.convert(stock)

    def run(seed: int, noise_seed: int | None) -> Any:
        private = {"noise_multiplier": 0.0, "noise_seed": noise_seed}
        trainer = trainer_of(start, tmp_path, private, seed=seed, max_steps=2)
        torch.rand(seed)  # the global generator is somewhere else
        trainer.train()
        return trainer.model

    first, same, other = run(3, 5), run(4, 5), run(3, 6)
    assert_bit_equal(same.state_dict(), first.state_dict())  # what is public does not matter
    assert largest_error(other.classifier.weight, first.classifier.weight) > 1e-6
    secret = [run(3, None).classifier.weight for _ in range(2)]
    assert largest_error(*secret) > 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(mode: str, tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    models = []
    for option in ({}, {"gradient_checkpointing": True}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            private = {"grad_sample_mode": mode, "noise_multiplier": 0.0}
            trainer = trainer_of(start, tmp_path, private, **option)
            trainer.train()
        models.append(trainer.model)
    assert models[1].is_gradient_checkpointing
    assert_close(models[1], models[0], 1e-6)  # float32


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """Parameters and sums stay float32; evaluation before training changes nothing."""
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    exact = trainer_of(start, tmp_path, {"noise_multiplier": 0.0}, eval_dataset=Rows(BERT))
    exact.train()
    half = trainer_of(
        start, tmp_path, {"noise_multiplier": 0.0}, eval_dataset=Rows(BERT), bf16=True
    )
    before = half.evaluate()["eval_loss"]
    half.train()
    assert half.evaluate()["eval_loss"] == pytest.approx(exact.evaluate()["eval_loss"], rel=0.02)
    assert half.evaluate()["eval_loss"] != before
    assert half.model.classifier.weight.dtype == torch.float32
    assert 0 < largest_error(half.model.classifier.weight, exact.model.classifier.weight) < 1e-2


@pytest.mark.parametrize("bf16", [False, True])
def test_a_forward_that_a_model_has_of_its_own_is_used_and_stays(
    bf16: bool, tmp_path: Path
) -> None:
    trainer = trainer_of(dpzoo.convert(stock_model(BERT, torch.float32)), tmp_path, bf16=bf16)
    model: Any = trainer.model
    calls, forward = [], model.forward

    @wraps(forward)  # by whose signature Trainer keeps columns
    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return forward(*args, **kwargs)

    model.forward = own  # after the trainer was made
    trainer.train()
    assert calls
    assert model.forward is own
    assert "_original_forward" not in vars(model)
    assert trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).forward is own


def test_automatic_clipping_brings_every_row_to_the_norm(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    models = {}
    for clipping in ("flat", "automatic"):
        private = {"clipping": clipping, "clipping_norm": 1e4, "noise_multiplier": 0.0}
        trainer = trainer_of(start, tmp_path, private, max_steps=1, learning_rate=1e-6)
        trainer.train()
        weight, before = trainer.model.classifier.weight, start.classifier.weight
        models[clipping] = float((weight - before).detach().norm())
    assert models["automatic"] > 100 * models["flat"]  # no row is that long
