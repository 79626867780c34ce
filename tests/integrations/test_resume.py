"""Kill and resume: the same weights, and never a smaller epsilon than was spent."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from opacus.accountants import create_accountant
from transformers import DataCollatorForLanguageModeling, TrainerCallback

import dpzoo
from dpzoo.integrations import DPTrainer
from dpzoo.integrations.batches import PoissonBatches
from dpzoo.integrations.state import LEDGER_NAME, RANDOM_STATE_NAME, STATE_NAME
from dpzoo.ledger import Ledger
from tests.integrations.runs import BERT, GPT2, Kill, Killed, Rows, trainer_of
from tests.support import assert_bit_equal, largest_error, stock_model

SAVED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 7,  # two steps an epoch: kills and checkpoints fall within and between them
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
}


@pytest.fixture(scope="module")
def start() -> Any:
    """With dropout, whose masks have to come again too."""
    torch.manual_seed(0)
    return dpzoo.convert(stock_model(BERT, torch.float32, hidden_dropout_prob=0.2))


def killed_run(start: Any, folder: Path, step: int, **options: Any) -> DPTrainer:
    """A run that ends in the middle of a step; it has the operating system's noise, if asked."""
    event = options.pop("event", "on_optimizer_step")
    private = options.pop("private", {})
    trainer = trainer_of(start, folder, private, callbacks=[Kill(step, event)], **SAVED | options)
    with pytest.raises(Killed):
        trainer.train()
    return trainer


class Epsilons(TrainerCallback):
    """Epsilon, asked as early as anyone can and after every step."""

    def __init__(self) -> None:
        self.trainer: DPTrainer | None = None
        self.seen: list[float] = []

    def _ask(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self.seen.append(self.trainer.epsilon)

    on_train_begin = on_step_end = _ask


POINTS = [
    (3, "on_pre_optimizer_step"),  # the gradient is there, the noise is not
    (3, "on_optimizer_step"),  # the weights are new, and no step is counted
    (4, "on_step_begin"),  # between two steps, and two epochs
    (5, "on_step_begin"),  # right after a checkpoint
    (7, "on_optimizer_step"),  # the last step
]


@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks"])
def test_a_run_killed_at_five_points_is_resumed(start: Any, mode: str, tmp_path: Path) -> None:
    """Three steps an epoch: there are checkpoints in the middle of one, and at its end."""
    private = {"grad_sample_mode": mode}
    options = {**SAVED, "train_dataset": Rows(BERT, 24)}
    straight = trainer_of(start, tmp_path / "straight", private, **options)
    straight.train()
    for i, (step, event) in enumerate(POINTS if mode == "bk" else POINTS[1::3]):
        folder = tmp_path / str(i)
        killed = killed_run(start, folder, step, event=event, private=private, **options)
        spent = killed.epsilon
        assert killed._account.begun == step - (event == "on_step_begin")

        epsilons = Epsilons()
        resumed = trainer_of(start, folder, private, callbacks=[epsilons], **options)
        epsilons.trainer = resumed
        torch.rand(i)  # the global generator is somewhere else
        result = resumed.train(resume_from_checkpoint=True)
        assert result.global_step == 7
        assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())
        assert len(epsilons.seen) == 1 + 7 - (step - 1) // 2 * 2
        assert min(epsilons.seen) >= spent > 0
        assert resumed.epsilon == result.metrics["epsilon"] == straight.epsilon


SCRIPT = """
import os, signal, sys, torch
from transformers import TrainerCallback
from tests.integrations.runs import trainer_of
from tests.integrations.test_resume import SAVED

class Kill(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

folder = sys.argv[1]
start = torch.load(f"{folder}/start.pt", weights_only=False)
trainer_of(start, folder, callbacks=[Kill()], **SAVED).train()
"""


def test_a_process_that_was_killed(start: Any, tmp_path: Path) -> None:
    torch.save(start, tmp_path / "start.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    # To the bit, sums are the same only on the same number of threads.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, **threads}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = json.loads((tmp_path / "checkpoint-4" / STATE_NAME).read_text())["run"]
    assert Ledger(tmp_path / LEDGER_NAME).steps(run) == 5
    straight = trainer_of(start, tmp_path / "straight", **SAVED)
    straight.train()
    resumed = trainer_of(start, tmp_path, **SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.epsilon == straight.epsilon


def test_operating_system_noise_is_the_same_again(start: Any, tmp_path: Path) -> None:
    """Without a seed two runs differ, and a killed one and its continuation do not."""
    options = {"private": {"noise_seed": None}}
    trajectories: list[list[torch.Tensor]] = []

    class Weights(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            trajectories[-1].append(model.classifier.weight.detach().clone())

    killed = trainer_of(
        start, tmp_path, options["private"], callbacks=[Weights(), Kill(6)], **SAVED
    )
    trajectories.append([])
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer_of(start, tmp_path, options["private"], callbacks=[Weights()], **SAVED)
    trajectories.append([])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for first, second in zip(trajectories[0][2:], trajectories[1], strict=False):
        assert torch.equal(first, second)
    # Another run from the same checkpoint, by the trainer that was killed.
    trajectories.append([])
    killed.remove_callback(Kill)
    killed.train(resume_from_checkpoint=tmp_path / "checkpoint-4")  # a Path will do
    assert_bit_equal(killed.model.state_dict(), resumed.model.state_dict())
    assert killed.epsilon == resumed.epsilon


def test_epsilon_owes_the_steps_after_the_checkpoint_until_they_are_redone(
    start: Any, tmp_path: Path
) -> None:
    killed = killed_run(start, tmp_path, 6)
    assert killed._account.history == [(1.0, 0.5, 6)]
    resumed = trainer_of(start, tmp_path, **SAVED)
    resumed._count(resumed.train_dataset, resumed.args)
    resumed._resume(str(tmp_path / "checkpoint-2"))
    assert resumed.epsilon == killed.epsilon
    (tmp_path / LEDGER_NAME).unlink()
    moved = trainer_of(start, tmp_path / "elsewhere", **SAVED)
    with pytest.raises(dpzoo.InputError, match=r"ledger .* is gone"):
        moved._resume(str(tmp_path / "checkpoint-2"))


def test_a_step_done_again_differently_is_paid_for(start: Any, tmp_path: Path) -> None:
    """Another row: other sums, other noise, one more step; and nothing has to notice the change."""
    killed = killed_run(start, tmp_path / "run", 6)
    before, spent = killed.model.classifier.weight.detach().clone(), killed.epsilon
    rows = Rows(BERT)
    for i in range(len(rows)):
        rows.batch["input_ids"][i, 0] += 1
    resumed = trainer_of(start, tmp_path / "run", train_dataset=rows, **SAVED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    # steps 5 and 6 were begun twice, with other sums each time; step 7 once
    assert resumed._account.history == [(1.0, 0.5, 9)]
    assert resumed.epsilon > spent
    assert largest_error(before, resumed.model.classifier.weight) > 1e-3


def test_epsilon_after_twenty_random_kills(start: Any, tmp_path: Path) -> None:
    """At random points: the weights of the run, and epsilon never below the steps begun."""
    random.seed(7)
    straight = trainer_of(start, tmp_path / "straight", **SAVED)
    straight.train()
    events = ["on_pre_optimizer_step", "on_optimizer_step", "on_step_begin", "on_step_end"]
    for chain in range(4):
        folder, known = tmp_path / str(chain), 0.0
        for kill in range(5):
            event, step = random.choice(events), random.randint(2, 7)
            trainer = trainer_of(start, folder, callbacks=[Kill(step, event)], **SAVED)
            saved = sorted(folder.glob("checkpoint-*"))
            with contextlib.suppress(Killed):
                trainer.train(resume_from_checkpoint=True if saved else None)
            assert trainer.epsilon >= known, (chain, kill)
            fresh = create_accountant("rdp")
            fresh.history = [(1.0, 0.5, trainer._account.begun)]
            assert trainer.epsilon >= fresh.get_epsilon(1 / 16) * (1 - 1e-12)
            known = trainer.epsilon
            if not saved and not sorted(folder.glob("checkpoint-*")):
                shutil.rmtree(folder, ignore_errors=True)  # nothing to resume: another run
                known = 0.0
        last = trainer_of(start, folder, **SAVED)
        last.train(resume_from_checkpoint=True if sorted(folder.glob("checkpoint-*")) else None)
        assert_bit_equal(last.model.state_dict(), straight.model.state_dict())
        assert last.epsilon == straight.epsilon


def test_a_chain_of_kills(start: Any, tmp_path: Path) -> None:
    straight = trainer_of(start, tmp_path / "straight", **SAVED)
    straight.train()
    killed_run(start, tmp_path / "run", 3)
    for step in (4, 6, 7):
        trainer = trainer_of(start, tmp_path / "run", callbacks=[Kill(step)], **SAVED)
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=True)
    last = trainer_of(start, tmp_path / "run", **SAVED)
    last.train(resume_from_checkpoint=True)
    assert_bit_equal(last.model.state_dict(), straight.model.state_dict())
    assert last.epsilon == straight.epsilon
    assert last._account.history == [(1.0, 0.5, 7)]


def test_an_epoch_cut_short_does_not_repeat_batches(start: Any, tmp_path: Path) -> None:
    """A callback may end an epoch early; its next batches are drawn for the next steps all the same."""

    class Short(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step == 3

    drawn: list[int] = []

    class Sampler(PoissonBatches):
        def draw(self, step: int) -> list[int]:
            drawn.append(step)
            return super().draw(step)

    options = {**SAVED, "gradient_accumulation_steps": 1}  # four steps an epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpzoo.integrations.trainer.PoissonBatches", Sampler)
        straight = trainer_of(start, tmp_path / "straight", callbacks=[Short()], **options)
        straight.train()
    assert drawn == list(range(7))
    killed = trainer_of(start, tmp_path / "run", callbacks=[Short(), Kill(6)], **options)
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer_of(start, tmp_path / "run", callbacks=[Short()], **options)
    resumed.train(resume_from_checkpoint=True)
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())


def test_the_noise_of_a_target_is_not_chosen_again(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = {"target_epsilon": 2.0}
    straight = trainer_of(start, tmp_path / "straight", private, **SAVED)
    straight.train()
    killed_run(start, tmp_path / "run", 5, private=private)
    monkeypatch.setattr("dpzoo.integrations.accounting.get_noise_multiplier", None)
    resumed = trainer_of(start, tmp_path / "run", private, **SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())
    assert 1.98 <= resumed.epsilon == straight.epsilon <= 2.0


def test_gpt2_resumes_from_stock_layout(tmp_path: Path) -> None:
    model = dpzoo.convert(stock_model(GPT2, torch.float32))
    straight = trainer_of(model, tmp_path / "straight", **SAVED)
    straight.train()
    killed_run(model, tmp_path / "run", 4)
    resumed = trainer_of(model, tmp_path / "run", **SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())


def test_masks_drawn_by_the_collator_come_again(tmp_path: Path) -> None:
    """Masked-LM: other masks under the same noise would show gradients."""
    name = "BertForMaskedLM"
    model = dpzoo.convert(stock_model(name, torch.float32))
    words = [f"w{i}" for i in range(56)]
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = transformers.BertTokenizer(vocab={t: i for i, t in enumerate([*special, *words])})
    rows = [
        {"input_ids": row["input_ids"].tolist(), "attention_mask": row["attention_mask"].tolist()}
        for row in (Rows(name)[i] for i in range(16))
    ]
    options = {
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4),
        "train_dataset": rows,
    }
    straight = trainer_of(model, tmp_path / "straight", **options, **SAVED)
    straight.train()
    killed_run(model, tmp_path / "run", 4, **options)
    resumed = trainer_of(model, tmp_path / "run", **options, **SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())

    batches = trainer_of(model, tmp_path, **options, **SAVED)
    labels = [part["labels"] for i in (3, 4) for part in batches.get_train_dataloader().dataset
              .__getitems__([i, 0, 1, 2])["parts"]]  # fmt: skip
    assert not torch.equal(*labels)  # steps differ


# --- what is on disk ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    killed_run(start, folder, 4)
    return folder / "checkpoint-2"


def test_what_a_checkpoint_says(checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE_NAME).read_text())
    assert state["steps"] == 2
    assert state["history"] == [[1.0, 0.5, 2]]
    assert (state["mechanism"], state["delta"], state["noise_multiplier"]) == ("rdp", 1 / 16, 1.0)
    assert state["epsilon"] == pytest.approx(1.741, abs=1e-3)
    assert "noise_seed" not in (checkpoint / STATE_NAME).read_text()  # it may be published
    mode = (checkpoint / RANDOM_STATE_NAME).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600  # secret
    assert Ledger(checkpoint.parent / LEDGER_NAME).steps(state["run"]) == 4
    key = torch.load(checkpoint / RANDOM_STATE_NAME, weights_only=True)
    for secret in (key["key"], key["noise"]["noise"]["key"]):
        for path in (checkpoint / STATE_NAME, checkpoint.parent / LEDGER_NAME):
            assert secret not in path.read_text()


def copied(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(checkpoint.parent / LEDGER_NAME, folder / LEDGER_NAME)
    return Path(shutil.copytree(checkpoint, folder / "checkpoint-2"))


@pytest.mark.parametrize("name", [STATE_NAME, RANDOM_STATE_NAME])
def test_a_checkpoint_without_privacy_is_refused(
    start: Any, checkpoint: Path, name: str, tmp_path: Path
) -> None:
    folder = copied(checkpoint, tmp_path)
    (folder / name).unlink()
    with pytest.raises(dpzoo.InputError, match=f"checkpoint-2 has no {name}, so it is not known"):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=str(folder))
    with pytest.raises(dpzoo.InputError, match=r"No checkpoint of .* is whole, of checkpoint-2"):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_files_of_a_checkpoint_are_missed(
    start: Any, checkpoint: Path, name: str, how: str, tmp_path: Path
) -> None:
    path = copied(checkpoint, tmp_path) / name
    if how == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    with pytest.raises(dpzoo.InputError, match=f"{name} is {how} since the checkpoint was written"):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=str(path.parent))


def test_the_newest_whole_checkpoint_is_resumed(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed_run(start, tmp_path, 7)
    (tmp_path / "checkpoint-6" / STATE_NAME).unlink()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = trainer_of(start, tmp_path, **SAVED)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is passed over" in caplog.text
    assert "checkpoint-4 is passed over" in caplog.text
    straight = trainer_of(start, tmp_path / "straight", **SAVED)
    straight.train()
    assert_bit_equal(trainer.model.state_dict(), straight.model.state_dict())


def test_a_used_folder_is_not_used_again(start: Any, tmp_path: Path) -> None:
    trainer_of(start, tmp_path, **SAVED).train()
    with pytest.raises(dpzoo.InputError, match=r"holds another run \(checkpoint-"):
        trainer_of(start, tmp_path, **SAVED).train()


def test_a_finished_run_is_not_trained_on(start: Any, tmp_path: Path) -> None:
    first = trainer_of(start, tmp_path, **SAVED | {"save_strategy": "epoch"})
    first.train()
    again = trainer_of(start, tmp_path, **SAVED | {"save_strategy": "epoch"})
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == 7
    assert again.epsilon == first.epsilon
    assert_bit_equal(again.model.state_dict(), first.model.state_dict())


def test_an_account_that_was_changed_is_refused(
    start: Any, checkpoint: Path, tmp_path: Path
) -> None:
    path = copied(checkpoint, tmp_path) / STATE_NAME
    fields = json.loads(path.read_text())
    fields["history"][0][2] -= 1
    path.write_text(json.dumps(fields))
    with pytest.raises(
        dpzoo.InputError, match=r"is damaged .*does not have the digest of what it says"
    ):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("value", [3, [1], {"a": 1}, 1.5])
def test_what_is_no_path_is_no_checkpoint(value: Any, start: Any, tmp_path: Path) -> None:
    with pytest.raises(
        dpzoo.InputError, match=r"DPTrainer.train\(\) got a \w+, wanted True, or the path"
    ):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=value)


def test_nested_json_is_damage(start: Any, checkpoint: Path, tmp_path: Path) -> None:
    copied = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copied)
    (copied / STATE_NAME).write_text("[" * 100_000)
    with pytest.raises(dpzoo.InputError, match=r"is damaged .*recursion depth"):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=str(copied))


def test_a_state_of_another_version_is_refused(
    start: Any, checkpoint: Path, tmp_path: Path
) -> None:
    path = copied(checkpoint, tmp_path) / STATE_NAME
    path.write_text(path.read_text().replace('"version": 3', '"version": 9'))
    with pytest.raises(dpzoo.InputError, match=r"has version 9, wanted 3\. Resume"):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=str(path.parent))
    path.write_text("{")
    with pytest.raises(dpzoo.InputError, match="is damaged"):
        trainer_of(start, tmp_path, **SAVED).train(resume_from_checkpoint=str(path.parent))


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"noise_multiplier": 2.0}, {}, r"PrivacyArguments.noise_multiplier=2.0 \(it was 1.0\)"),
    ({"clipping_norm": 1.0}, {}, r"PrivacyArguments.clipping_norm=1.0 \(it was 0.5\)"),
    ({"grad_sample_mode": "ghost"}, {}, r"grad_sample_mode='ghost' \(it was 'bk'\)"),
    ({"target_delta": 1e-3}, {}, r"PrivacyArguments.target_delta=0.001 \(it was 0.0625\)"),
    ({}, {"gradient_accumulation_steps": 1}, r"per_device_train_batch_size=4 \(it was 8\)"),
    (
        {},
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
        r"rows of a physical batch=8 \(it was 4\)",
    ),
    ({}, {"train_dataset": Rows(BERT, 12)}, r"rows of train_dataset=12 \(it was 16\)"),
    ({}, {"learning_rate": 0.02}, r"TrainingArguments.learning_rate=0.02 \(it was 0.01\)"),
    ({}, {"max_steps": 9}, r"TrainingArguments.max_steps=9 \(it was 7\)"),
    ({}, {"seed": 4}, r"TrainingArguments.seed=4 \(it was 3\)"),
]


@pytest.mark.parametrize(("private", "options", "message"), CHANGES)
def test_a_changed_setting_is_refused(
    start: Any,
    checkpoint: Path,
    private: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    trainer = trainer_of(start, tmp_path, private, **SAVED | options)
    with pytest.raises(dpzoo.InputError, match=f"resumed with .*{message}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_bit_equal(trainer.model.state_dict(), start.state_dict())  # nothing was touched


def test_what_steps_do_not_depend_on_may_change(
    start: Any, checkpoint: Path, tmp_path: Path
) -> None:
    straight = trainer_of(start, tmp_path / "straight", **SAVED)
    straight.train()
    options = SAVED | {"save_steps": 3, "logging_strategy": "steps", "logging_steps": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Rows(BERT)}
    resumed = trainer_of(start, tmp_path / "resumed", **options, **evaluation)
    resumed.train(resume_from_checkpoint=str(copied(checkpoint, tmp_path / "copy")))
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())


def test_a_second_run_is_not_begun(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, max_steps=2)
    trainer.train()
    with pytest.raises(dpzoo.InputError, match=r"train\(\) was called again after 2 steps, which"):
        trainer.train()


def test_another_run_is_not_taken_up(start: Any, checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, callbacks=[Kill(3)], **SAVED)
    with pytest.raises(Killed):
        trainer.train()
    with pytest.raises(dpzoo.InputError, match="is of another run than the 3 steps that this"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_only_models_are_saved_where_only_they_are_asked_for(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, **SAVED, save_only_model=True)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / STATE_NAME).is_file()
    again = trainer_of(start, tmp_path, **SAVED, save_only_model=True)
    with pytest.raises(dpzoo.InputError, match=f"has no {RANDOM_STATE_NAME}"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_noise_goes_on_after_a_resumption(start: Any, tmp_path: Path) -> None:
    """The noise of later steps is new: no step has that of another."""
    private = {"clipping_norm": 1e-6, "noise_multiplier": 100.0}  # next to nothing but noise
    moves: list[torch.Tensor] = []

    class Moves(TrainerCallback):
        last: Any = None

        def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
            self.last = model.bert.pooler.dense.weight.detach().clone()

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            moves.append((model.bert.pooler.dense.weight - self.last).detach().flatten())

    options = SAVED | {"optim": "sgd", "lr_scheduler_type": "constant"}
    killed = trainer_of(start, tmp_path, private, callbacks=[Moves(), Kill(3)], **options)
    with pytest.raises(Killed):
        killed.train()
    trainer_of(start, tmp_path, private, callbacks=[Moves()], **options).train(True)
    assert len(moves) == 7
    for a, b in itertools.combinations(moves, 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2  # of 576 numbers
    assert largest_error(moves[0].std(), moves[6].std()) < 0.2
