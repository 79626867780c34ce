"""The route of the model's own gradients: adapters, biases or every parameter."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from dpzoo import heads
from dpzoo.empirical import GradientCanaries
from dpzoo.files import write_text
from dpzoo.integrations import DPTrainer, Plan, PrivacyArguments, PrivacyCard, StatisticsCallback
from dpzoo.integrations.inputs import per_sample
from dpzoo.integrations.plan import cost_of, duration, fixed_bytes
from dpzoo.training.data import Table, class_indices, texts_of
from dpzoo.training.job import CANARIES_NAME, DEVICE, NUMBER, Job, Say
from dpzoo.training.models import make_trainable
from dpzoo.training.recipe import Recipe

RECIPE_NAME = "recipe.json"
LOG_NAME = "log_not_private.csv"
_MOST_IN_MEMORY = {"cpu": 64, "cuda": 512}
_LOGS = 20


class GradientRoute:
    """Adapters, biases or every parameter, by `DPTrainer`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        model = make_trainable(job.model, job.trainable, job.task, job.recipe.lora_rank)
        self.model: Any = per_sample(model, "bk")
        self.encoded = encode(job, job.train_rows)
        if job.owners:
            for row, owner in zip(self.encoded, job.owners, strict=True):
                row[str(job.recipe.unit)] = owner
        if job.canaries is not None:
            self._plant(job.canaries)
        collate: Any = (
            DataCollatorWithPadding if job.task.label else DataCollatorForTokenClassification
        )
        self.collate = collate(job.tokenizer)
        self._measure()

    def _plant(self, canaries: GradientCanaries) -> None:
        """Put the canaries' rows behind the others, which have none in their loss."""
        canaries.join(self.model)
        names, token = self.encoded[0], _token(self.job.tokenizer)
        empty: dict[str, Any] = {name: [0] * 2 for name in names} | {"input_ids": [token] * 2}
        empty |= {"attention_mask": [1] * 2, "labels": -100 if self.job.task.label else [-100] * 2}
        self.encoded = [{**row, NUMBER: canaries.none} for row in self.encoded]
        for number in range(len(canaries)):
            row = {**empty, NUMBER: number}
            if self.job.owners:
                row[str(self.job.recipe.unit)] = f"\0canary {number}"
            self.encoded.append(row)

    def _measure(self) -> None:
        """The rows in memory at a time, by made-up rows of the greatest length."""
        job, recipe = self.job, self.job.recipe
        ids = torch.full((2, job.length), _token(job.tokenizer), device=DEVICE)
        labels = torch.zeros(2, dtype=torch.long, device=DEVICE) if job.task.label else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.cost = cost_of(self.model.to(DEVICE), batch, 2)
        room = 0.5 * _free_memory() - fixed_bytes(self.model)
        most = min(job.batch, _MOST_IN_MEMORY[DEVICE])
        physical = min(recipe.physical_batch_size or job.batch, job.batch)
        if recipe.physical_batch_size is None:
            physical = 2 ** int(math.log2(max(1, min(most, room / self.cost.bytes))))
        # A logical batch is a whole number of physical ones.
        parts = max(1, round(job.batch / physical))
        physical = min(physical, max(1, job.units // parts))
        self.physical, self.parts = physical, parts
        tokens = sum(len(row["input_ids"]) for row in self.encoded) / job.rows
        self.seconds = self.cost.seconds * tokens / job.length

    def _trainer(self, folder: Path | str) -> DPTrainer:
        recipe, job = self.job.recipe, self.job
        logical = self.physical * self.parts
        steps = math.ceil(job.epochs * math.ceil(job.units / logical))
        largest = max(Counter(job.owners).values()) if job.owners else 1
        most = recipe.max_rows_per_unit or (self.physical if largest > self.physical else None)
        args = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=self.physical,
            per_device_eval_batch_size=self.physical,
            gradient_accumulation_steps=self.parts,
            num_train_epochs=job.epochs,
            learning_rate=job.rate,
            lr_scheduler_type="linear",
            optim="adamw_torch",
            save_steps=max(1, steps // 10),
            save_total_limit=2,
            logging_steps=max(1, steps // _LOGS),
            report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
            disable_tqdm=True,
            remove_unused_columns=job.canaries is None,
            dataloader_pin_memory=DEVICE == "cuda",
            seed=recipe.seed,
        )
        trainer = (DPTrainer if job.canaries is None else _AuditedTrainer)(
            model=self.model,
            args=args,
            data_collator=self.collate,
            train_dataset=self.encoded,
            eval_dataset=encode(job, job.heldout),
            processing_class=job.tokenizer,
            privacy=PrivacyArguments(
                target_epsilon=recipe.epsilon,
                target_delta=job.delta,
                clipping_norm=job.clipping_norm,
                clipping=job.defaults.clipping,
                tuned=job.tuned,
                unit_column=recipe.unit,
                max_rows_per_unit=most,
            ),
            callbacks=[_ProgressLog(job.say, Path(folder) / LOG_NAME)],
            compute_metrics=_accuracy if job.task.label else None,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if job.canaries is not None:
            scale = logical / job.clipping_norm
            trainer.add_callback(_Watching(job.canaries, Path(folder) / CANARIES_NAME, scale))
        if recipe.statistics:
            trainer.add_callback(
                StatisticsCallback(draw=bool(importlib.util.find_spec("matplotlib")))
            )
        return trainer

    def plan(self) -> Plan:
        job = self.job
        with tempfile.TemporaryDirectory() as folder:
            plan = self._trainer(folder).plan()
        return replace(
            plan,
            seconds=self.seconds * plan.logical * plan.steps * job.rows / job.units,
            memory=fixed_bytes(self.model) + self.cost.bytes * self.physical,
        )

    def _kept(self) -> Recipe:
        """The recipe with all that was chosen: a resumed run chooses nothing."""
        job = self.job
        return replace(
            job.recipe,
            trainable=job.trainable,
            physical_batch_size=self.physical,
            batch_size=self.physical * self.parts,
        )

    def train(self, resume: bool) -> tuple[PrivacyCard, Any]:
        job = self.job
        job.work.mkdir(parents=True, exist_ok=True)
        path = job.work / RECIPE_NAME
        kept = {"recipe": asdict(self._kept()), "written": job.wrote}
        write_text(path, json.dumps(kept, indent=1) + "\n")
        self.trainer = self._trainer(job.work)
        self.before = None if job.task.label else self.trainer.evaluate()["eval_loss"]
        going_on = resume and any(job.work.glob("checkpoint-*"))
        if resume and not going_on:
            job.say(
                "resumed   there is no checkpoint yet: the run begins again, and has released nothing"
            )
        if job.canaries is not None:
            path = job.work / CANARIES_NAME
            if resume and path.exists():
                job.canaries.load(path)
            job.canaries.save(path)
        self.trainer.train(resume_from_checkpoint=going_on or None)
        model: Any = self.trainer.model
        if job.canaries is not None:
            job.canaries.leave(model)
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(Path(job.recipe.out) / "adapter")
            self.metrics = self.trainer.evaluate()
            model = model.merge_and_unload()
        else:
            self.metrics = self.trainer.evaluate()
        return self.trainer.card(), model

    def score(self, model: Any) -> dict[str, float]:
        if self.job.task.label:
            return {
                "accuracy": self.metrics["eval_accuracy"],
                "accuracy of always one class": self.job.majority(),
            }
        assert self.before is not None
        return {"loss": self.metrics["eval_loss"], "loss before training": self.before}


class _AuditedTrainer(DPTrainer):
    """`DPTrainer` with canaries among its rows."""

    def _row_losses(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        losses = super()._row_losses(model, inputs)
        return losses + model.get_submodule("canaries").term


class _Watching(TrainerCallback):
    """Keeps what each step released of the canaries, beside the checkpoints."""

    def __init__(self, canaries: GradientCanaries, path: Path, scale: float) -> None:
        self.canaries, self.path, self.scale = canaries, path, scale

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.canaries.see(state.global_step, self.scale)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Before the checkpoint, which may be the last thing that is written.
        if control.should_save:
            self.canaries.save(self.path)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def encode(job: Job, table: Table) -> list[dict[str, Any]]:
    """Rows as Trainer takes them."""
    task, tokenizer, length = job.task, job.tokenizer, job.length
    texts = texts_of(table, task.text)
    if task.label:
        rows = tokenizer(heads.filled(tokenizer, texts), truncation=True, max_length=length)
        names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in rows]
        return [
            {**{name: rows[name][i] for name in names}, "labels": label}
            for i, label in enumerate(class_indices(table, task))
        ]
    end = [tokenizer.eos_token_id]
    prompts: list[list[int]] = [[]] * len(texts)
    if task.prompt:
        plain = tokenizer(texts_of(table, task.prompt), add_special_tokens=False)["input_ids"]
        prompts = [ids[: length // 2 - 1] + end for ids in plain]
    found = []
    for prompt, answer in zip(
        prompts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
    ):
        ids = prompt + answer[: length - len(prompt) - 1] + end
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


def _token(tokenizer: Any) -> int:
    """One for a row that says nothing."""
    return int(tokenizer.eos_token_id or tokenizer.pad_token_id or 0)


def _free_memory() -> float:
    """Bytes that are free now, of the device or of the machine."""
    if DEVICE == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # no such names on this system
        return 4.0 * 2**30


class _ProgressLog(TrainerCallback):
    """Tells a person how the run goes, and keeps it as CSV. The losses are not private."""

    def __init__(self, say: Say, path: Path) -> None:
        self.say, self.path = say, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        taken = max(1, state.global_step - self.first)
        left = (time.monotonic() - self.began) / taken * (state.max_steps - state.global_step)
        self.say(
            f"step      {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f} (not private)  "
            f"epsilon {logs['epsilon']:.2f}  {duration(left)} left"
        )
        names = ("step", "loss", "learning_rate", "epsilon")
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(names)
            writer.writerow([state.global_step, *(logs.get(name) for name in names[1:])])
