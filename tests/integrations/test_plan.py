"""What a run will be is said before it begins, and asking changes nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments

import dpzoo
from dpzoo.integrations import DPTrainer, PrivacyArguments
from tests.integrations.runs import BERT, Rows, arguments, privacy, trainer_of
from tests.support import assert_bit_equal, snapshot, stock_model


@pytest.fixture(scope="module")
def start() -> Any:
    torch.manual_seed(0)
    return dpzoo.convert(stock_model(BERT, torch.float32))


def test_the_plan_is_the_run(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, {"target_epsilon": 3.0}, max_steps=-1, num_train_epochs=3)
    plan = trainer.plan(measure=True)
    assert plan.seconds is not None
    assert plan.seconds > 0
    weights = sum(p.numel() * 4 for p in start.parameters())
    assert plan.memory is not None
    assert plan.memory > 5 * weights
    trainer.train()
    assert plan.steps == trainer.state.global_step == 6
    assert plan.noise_multiplier == trainer.noise_multiplier
    assert plan.delta == trainer.delta
    assert trainer.epsilon <= plan.epsilon
    assert (plan.units, plan.logical, plan.physical, plan.sample_rate) == (16, 8, 4, 0.5)
    trained = sum(p.numel() for p in start.parameters())
    assert plan.trained == trained
    assert plan.step_signal == pytest.approx(8 / (plan.noise_multiplier * trained**0.5))
    assert plan.signal == pytest.approx(plan.step_signal * 6**0.5)
    for part in (
        "epsilon 3 at delta 0.0625 (rdp)",
        "8 units on average, 4 rows in memory",
        "steps     6",
    ):
        assert part in str(plan)


def test_measuring_changes_no_draw_and_no_weight(start: Any, tmp_path: Path) -> None:
    runs = []
    for measure in (False, True):
        torch.manual_seed(4)
        trainer = trainer_of(start, tmp_path / str(measure))
        if measure:
            before, state = snapshot(trainer.model), torch.get_rng_state()
            trainer.plan(measure=True)
            assert_bit_equal(trainer.model.state_dict(), before)
            assert all(p.grad is None for p in trainer.model.parameters())
            assert torch.equal(torch.get_rng_state(), state)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert_bit_equal(runs[0], runs[1])


def test_a_drowned_signal_and_a_short_reach_are_warned_of(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drowned = trainer_of(start, tmp_path, {"noise_multiplier": 50.0})
    assert "the noise hides the signal: over the whole run" in drowned.plan().warnings[0]
    assert "warning   the noise hides the signal" in str(drowned.plan())
    with caplog.at_level(logging.WARNING, logger="dpzoo"):
        drowned.train()
    assert any(
        "Before training: the noise hides the signal" in r.getMessage() for r in caplog.records
    )
    clear = {"noise_multiplier": 1e-3}
    assert trainer_of(start, tmp_path, clear).plan().warnings == ()  # SGD's reach is not known
    adam = {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
    short = trainer_of(start, tmp_path, clear, **adam, learning_rate=5e-5).plan()
    assert short.reach == pytest.approx(4 * 5e-5 / 2)
    assert "the learning rate 5e-05 moves no weight by more than 0.0001 in 4" in short.warnings[0]
    assert trainer_of(start, tmp_path, clear, **adam, learning_rate=5e-3).plan().warnings == ()


def test_the_banner_tells_the_batches_that_there_are(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(start, tmp_path, max_steps=1)
    banner = logging.getLogger("transformers.trainer")
    filters = list(banner.filters)
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO, logger="transformers.trainer"):
            trainer.train()
    finally:
        transformers.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records]
    assert "  Num examples = 16" in said
    assert "  Rows in memory at a time = 4" in said
    assert "  Rows of a logical batch (Poisson, expected) = 8" in said
    assert "  Parts of a logical batch (on average) = 2" in said
    assert not any("Instantaneous" in line or "Accumulation" in line for line in said)
    assert banner.filters == filters


def test_the_arguments_parse_beside_trainers() -> None:
    parser = HfArgumentParser((TrainingArguments, PrivacyArguments))
    given = ["--output_dir", "x", "--target_epsilon", "3", "--clipping_norm", "0.2", "--use_cpu"]
    args, private = parser.parse_args_into_dataclasses(given)
    assert args.max_grad_norm == 1.0
    assert (private.target_epsilon, private.clipping_norm) == (3.0, 0.2)
    assert private.accountant == "prv"


def test_the_old_name_is_taken_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="max_grad_norm is called clipping_norm now"):
        old = PrivacyArguments(target_epsilon=1.0, max_grad_norm=0.3)
    assert old.clipping_norm == old.max_grad_norm == 0.3
    assert old == PrivacyArguments(target_epsilon=1.0, clipping_norm=0.3)
    with (
        pytest.warns(DeprecationWarning, match="is called clipping_norm now"),
        pytest.raises(dpzoo.InputError, match="max_grad_norm and clipping_norm, two names of one"),
    ):
        PrivacyArguments(target_epsilon=1.0, clipping_norm=0.3, max_grad_norm=0.3)


def test_a_peft_model_around_a_stock_one_trains(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    stock = stock_model(BERT, torch.float32)
    model = peft.get_peft_model(stock, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    before = snapshot(model)
    trainer = DPTrainer(
        model=model, args=arguments(tmp_path), train_dataset=Rows(BERT), privacy=privacy()
    )
    assert trainer.model is model
    trainer.train()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    trainer.save_model(str(tmp_path / "saved"))
    assert "Epsilon" in (tmp_path / "saved" / "README.md").read_text()
