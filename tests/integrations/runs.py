"""What the tests of DPTrainer share: tiny rows, arguments, and a run."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from dpzoo.integrations import DPTrainer, PrivacyArguments
from dpzoo.integrations.batches import PoissonBatches
from tests.support import SEQ, TASK, inputs_for, largest_error, row_of

UNITS = 16
BERT, GPT2, LM = "BertForSequenceClassification", "GPT2ForSequenceClassification", "GPT2LMHeadModel"


class Rows(torch.utils.data.Dataset):
    """Rows with different numbers of tokens, as a Trainer takes them."""

    def __init__(self, name: str, count: int = 16) -> None:
        torch.manual_seed(11)
        batch = inputs_for(name, padding="right", rows=count, dtype=torch.float32)
        batch.pop("token_type_ids", None)
        shape = (count,) if TASK[name] == "sequence-classification" else (count, SEQ)
        labels = torch.randint(0, 5, shape)
        if labels.ndim == 2:  # a different number of labelled tokens in each row
            for i, row in enumerate(labels):
                row[: i % 5] = -100
        self.batch = {**batch, "labels": labels}

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in row_of(self.batch, i).items()}

    def take(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {key: value[indices] for key, value in self.batch.items()}


class Owned(Rows):
    """16 owners of 1 to 3 rows each, not in a row."""

    def __init__(self, name: str, units: int = UNITS) -> None:
        owners = [k for k in range(units) for _ in range(1 + k % 3)]
        super().__init__(name, len(owners))
        self.who = [owners[(7 * i) % len(owners)] for i in range(len(owners))]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "who": f"owner {self.who[i]}"}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Logical batches of 8 rows in parts of 4, of 16: two steps an epoch. Plain SGD shows scales."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",  # the accountant's answer takes its time
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


def privacy(**options: Any) -> PrivacyArguments:
    """Noise from a seed, and the accountant that is quick."""
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "clipping_norm": 0.5, "accountant": "rdp"}
    if "target_epsilon" in options:
        settings.pop("noise_multiplier")
    return PrivacyArguments(**{**settings, "noise_seed": 5, **options})


def trainer_of(
    start: Any, folder: Path, private: dict[str, Any] | None = None, **options: Any
) -> DPTrainer:
    """A trainer of a copy of a model; options that are not TrainingArguments' are DPTrainer's."""
    own = {key: options.pop(key) for key in OWN if key in options}
    own.setdefault("train_dataset", Rows(type(start).__name__))
    return DPTrainer(
        model=copy.deepcopy(start),
        args=arguments(folder, **options),
        privacy=privacy(**(private or {})),
        **own,
    )


MODES = ("bk", "ghost", "hooks")
LOG: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 1}
OWN = (
    *("train_dataset", "eval_dataset", "data_collator", "compute_metrics", "compute_loss_func"),
    *("callbacks", "optimizers", "model_init"),
)


class Killed(BaseException):
    """What ends a run in the middle of a step, past every `except Exception`."""


class Kill(TrainerCallback):
    """Kills the run while its step number ``step`` is under way, or just after it was taken."""

    def __init__(self, step: int, event: str = "on_optimizer_step") -> None:
        self.step = step
        setattr(self, event, self._kill)

    def _kill(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            raise Killed


def draws(trainer: DPTrainer, steps: int) -> list[list[int]]:
    """The rows of a run's batches."""
    sampler = trainer.get_train_dataloader().batch_sampler
    assert isinstance(sampler, PoissonBatches)
    return [sampler.draw(step) for step in range(steps)]


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    wanted = wanted.state_dict()
    for key, value in got.state_dict().items():
        assert largest_error(value, wanted[key]) <= tolerance, key
