"""DPTrainer in a script: the privacy that it reports, and Trainer's own features around the steps."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from opacus.accountants import create_accountant
from transformers import AutoModelForSequenceClassification, ProgressCallback, TrainerCallback

import dpzoo
from dpzoo.integrations import DPTrainer
from tests.integrations.runs import (
    BERT,
    GPT2,
    LOG,
    MODES,
    Rows,
    arguments,
    assert_close,
    draws,
    privacy,
    trainer_of,
)
from tests.support import (
    assert_bit_equal,
    assert_same_outputs,
    inputs_for,
    snapshot,
    stock_model,
)


def test_the_target_epsilon_is_reached_and_not_passed(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    trainer = trainer_of(
        start, tmp_path, {"target_epsilon": 3.0}, max_steps=-1, num_train_epochs=3, **LOG
    )
    assert trainer.epsilon == 0.0
    assert trainer.noise_multiplier > 0  # the plan's
    result = trainer.train()
    logged = [entry["epsilon"] for entry in trainer.state.log_history]
    assert len(logged) == 7  # six steps, and the end
    assert logged == sorted(logged)
    assert logged[0] > 0
    assert 2.98 <= result.metrics["epsilon"] == trainer.epsilon == logged[-1] <= 3.0
    assert trainer.delta == 1 / 16
    accountant = create_accountant("rdp")
    for _ in range(6):
        accountant.step(noise_multiplier=trainer.noise_multiplier, sample_rate=0.5)
    assert trainer.epsilon == pytest.approx(accountant.get_epsilon(1 / 16))


def test_the_default_accountant(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    private = {"accountant": "prv", "target_epsilon": 2.0, "target_delta": 1e-3}
    trainer = trainer_of(start, tmp_path, private)
    assert 1.95 <= trainer.train().metrics["epsilon"] <= 2.0
    assert trainer.delta == 1e-3


def test_epsilon_is_on_the_progress_bar(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    seen = []

    class Bar(TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            bars = [
                c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)
            ]
            seen.append(bars[0].training_bar.postfix)

    trainer = trainer_of(start, tmp_path, disable_tqdm=False, max_steps=2, callbacks=[Bar()], **LOG)
    trainer.train()
    logged = [entry["epsilon"] for entry in trainer.state.log_history]
    assert seen == [f"epsilon {value:.3f}" for value in logged]


def test_what_trainer_would_do_to_the_noised_gradient(tmp_path: Path) -> None:
    """Its clipping by a global norm (1.0 by default) is not applied, and no norm is logged."""
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    models = []
    for norm in (1.0, 0.0):
        private = {"noise_multiplier": 50.0, "grad_sample_mode": "ghost"}
        trainer = trainer_of(start, tmp_path, private, max_grad_norm=norm, max_steps=2, **LOG)
        trainer.train()
        models.append(trainer.model)
        assert not any("grad_norm" in entry for entry in trainer.state.log_history)
    assert_bit_equal(models[0].state_dict(), models[1].state_dict())
    # Far more than steps clipped to norm 1 would have moved it: 2 * 0.05.
    assert float((models[0].classifier.weight - start.classifier.weight).detach().norm()) > 0.2


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_an_ordinary_one_afterwards(mode: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        dpzoo.convert(stock_model(BERT, torch.float32)), tmp_path, {"grad_sample_mode": mode}
    )
    trainer.train()
    model = trainer.model
    assert type(model) is dpzoo.BertForSequenceClassification
    assert not any(module._forward_hooks for module in model.modules())
    model.train()
    model.zero_grad()
    model(**Rows(BERT).take([0, 1])).loss.backward()
    assert model.classifier.weight.grad is not None


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    assert prediction.predictions.shape == (16, 5)
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_a_stock_model_is_converted_trained_and_saved_for_transformers_alone(
    tmp_path: Path,
) -> None:
    """The run_glue way: AutoModel, metrics, evaluation, prediction, save_model."""
    stock_model(BERT, torch.float32).save_pretrained(tmp_path / "start")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    trainer = DPTrainer(
        model=stock,
        args=arguments(tmp_path / "out", eval_strategy="epoch"),
        train_dataset=Rows(BERT),
        eval_dataset=Rows(BERT),
        compute_metrics=accuracy,
        privacy=privacy(),
    )
    assert type(trainer.model) is dpzoo.BertForSequenceClassification
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_accuracy", "epsilon"} <= metrics.keys()
    assert sum("eval_accuracy" in entry for entry in trainer.state.log_history) == 3
    logits = trainer.predict(Rows(BERT)).predictions
    assert (logits.argmax(-1) == Rows(BERT).batch["labels"].numpy()).mean() == metrics[
        "eval_accuracy"
    ]
    trainer.save_model(str(tmp_path / "saved"))

    script = (
        "import sys, torch, transformers; torch.manual_seed(0);"
        f"m = transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'saved')!r});"
        f"b = torch.load({str(tmp_path / 'batch.pt')!r});"
        f"torch.save(m.eval()(**b).logits.detach(), {str(tmp_path / 'logits.pt')!r});"
        "assert not any(name.startswith('dpzoo') for name in sys.modules)"
    )
    batch = Rows(BERT).take([0, 1, 2])
    torch.save(batch, tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), torch.tensor(logits[:3]), rtol=1e-5, atol=1e-5
    )


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """GPT-2's square projections load in the wrong layout without a complaint: values are compared."""
    start = dpzoo.convert(stock_model(GPT2, torch.float32))
    scores = iter([0.1, 0.9, 0.2, 0.3])
    trainer = trainer_of(
        start,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_dataset=Rows(GPT2),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    stock = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_bit_equal(trainer.model.state_dict(), stock.state_dict())
    last = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    square = "transformer.h.0.attn.c_proj"
    best = stock.get_submodule(square).weight
    assert not torch.equal(last.get_submodule(square).weight, best)
    assert torch.equal(trainer.model.get_submodule(square).weight.t(), best)
    inputs = inputs_for(GPT2, dtype=torch.float32)
    assert_same_outputs(trainer.model.eval(), stock.eval(), inputs, tolerance=1e-5)


def test_losses_of_ones_own_are_taken_by_row(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))

    def by_row(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    own = trainer_of(start, tmp_path, compute_loss_func=by_row, eval_dataset=Rows(BERT))
    plain = trainer_of(start, tmp_path, eval_dataset=Rows(BERT))
    own.train(), plain.train()
    assert_close(own.model, plain.model, 1e-6)
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    mean = trainer_of(start, tmp_path, compute_loss_func=lambda *a, **k: by_row(*a, **k).mean())
    with pytest.raises(dpzoo.InputError, match=r"gave a loss of shape \(\), wanted \(\d+,\): one"):
        mean.train()


def test_an_optimizer_and_a_schedule_of_ones_own(tmp_path: Path) -> None:
    model = dpzoo.convert(stock_model(BERT, torch.float32))
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    own = DPTrainer(
        model=model,
        args=arguments(tmp_path, learning_rate=9.0),
        train_dataset=Rows(BERT),
        optimizers=(optimizer, schedule),
        privacy=privacy(noise_multiplier=0.0),  # Trainer's own has the parameters in another order
    )
    plain = trainer_of(start, tmp_path, {"noise_multiplier": 0.0})
    own.train(), plain.train()
    assert_close(own.model, plain.model, 1e-6)


def test_adapters_train_and_the_rest_stays(tmp_path: Path) -> None:
    base = dpzoo.convert(stock_model(BERT, torch.float32))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    before = snapshot(model)
    trainer = DPTrainer(
        model=model, args=arguments(tmp_path), train_dataset=Rows(BERT), privacy=privacy()
    )
    trainer.train()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_schedules_and_callbacks_count_logical_steps(tmp_path: Path) -> None:
    calls: list[str] = []

    class Count(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            calls.append("begin")

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            calls.append("substep")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            calls.append("end")

    start = dpzoo.convert(stock_model(BERT, torch.float32))
    options = {"max_steps": -1, "num_train_epochs": 2.0, "lr_scheduler_type": "linear"}
    trainer = trainer_of(start, tmp_path, callbacks=[Count()], **options, **LOG)
    trainer.train()
    assert calls == ["begin", "end"] * 4
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert [e["epoch"] for e in trainer.state.log_history] == [0.5, 1.0, 1.5, 2.0, 2.0]


class ByTheBatch(Rows):
    """A data set that gives the rows of a batch at once, as Hugging Face's `datasets` does."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{**super(ByTheBatch, self).__getitem__(i), "unused": "text"} for i in indices]


def test_rows_come_by_the_batch_and_unused_columns_go(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    one = trainer_of(start, tmp_path)
    two = trainer_of(start, tmp_path, train_dataset=ByTheBatch(BERT))
    one.train(), two.train()
    assert_bit_equal(two.model.state_dict(), one.model.state_dict())


def test_tokens_and_operations_are_counted(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    trainer = trainer_of(start, tmp_path, include_num_input_tokens_seen="all")
    trainer.train()
    rows = sum(len(batch) for batch in draws(trainer, 4))
    assert trainer.state.num_input_tokens_seen == rows * 9
    parameters = start.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 6 * rows * 9 * parameters


def test_a_model_init_is_converted_and_workers_load(tmp_path: Path) -> None:
    stock = stock_model(BERT, torch.float32)
    trainer = DPTrainer(
        model_init=lambda: copy.deepcopy(stock),
        args=arguments(tmp_path, dataloader_num_workers=1),
        train_dataset=Rows(BERT),
        privacy=privacy(),
    )
    trainer.train()
    plain = trainer_of(dpzoo.convert(stock), tmp_path)
    plain.train()
    assert_bit_equal(trainer.model.state_dict(), plain.model.state_dict())


def test_dpzoo_does_not_import_it() -> None:
    """Importing Trainer takes time, and needs accelerate."""
    script = """
import sys, dpzoo
assert not {"dpzoo.integrations", "transformers.trainer"} & set(sys.modules)
sys.modules["accelerate"] = None
import dpzoo.integrations
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dpzoo.integrations needs the package accelerate, as")
