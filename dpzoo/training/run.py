"""`dpzoo.train`: from a file of private text to a model, its epsilon, and the card that says so."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import logging
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
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
from dpzoo.accounting import epsilon_of
from dpzoo.empirical import GradientCanaries, RunReport, audit_run
from dpzoo.empirical.one_run import ASSUMES
from dpzoo.errors import InputError, first_line
from dpzoo.files import write_text
from dpzoo.integrations import DPTrainer, Plan, PrivacyArguments, PrivacyCard, StatisticsCallback
from dpzoo.integrations.accounting import noise_for
from dpzoo.integrations.inputs import per_sample
from dpzoo.integrations.plan import cost_of, duration, fixed_bytes
from dpzoo.training.data import (
    Table,
    Task,
    class_indices,
    guess_task,
    read_table,
    texts_of,
)
from dpzoo.training.models import hub_id, load, make_trainable, model_name, refuse_wordless
from dpzoo.training.recipe import DEFAULTS, MAX_LENGTH, Recipe, choose, logical_batch, written

log = logging.getLogger(__name__)

Say = Callable[[str], None]
RECIPE_NAME = "recipe.json"
CANARIES_NAME = "canaries.npz"
MEASURED_AT = 1e-5
"""Delta of the bound by canaries. Their number times it has to be far below 1; 1 / units is too much."""
MOST_CANARIES = 1
"""For each unit to train on."""
NUMBER = "canary"
"""The column that says which canary a row is."""
LOG_NAME = "log_not_private.csv"
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MOST_IN_MEMORY = {"cpu": 64, "cuda": 512}
_LOGS = 20


@dataclass(frozen=True)
class Run:
    """What a run came to.

    Args:
        plan: of the run.
        folder: of the model; None after a dry run.
        card: its terms; None after a dry run.
        metrics: on the held-out rows. They are in no epsilon, and in no card.
        audit: what the canaries showed; None without them, and after a dry run.
    """

    plan: Plan
    folder: Path | None = None
    card: PrivacyCard | None = None
    metrics: dict[str, float] | None = None
    audit: RunReport | None = None


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    dry_run: bool = False,
    resume: bool = False,
    say: Say = log.info,
) -> Run:
    """Train a model on private rows: read, choose, plan, train in mode bk, save with its privacy card.

    Args:
        recipe: a `Recipe`, a mapping of its fields, or a YAML file of them.
        dry_run: stop after the plan; nothing is written.
        resume: go on with the run that OUT.run has checkpoints of, by its recipe.
        say: takes lines for a person. Those with a loss or an accuracy are not private.

    Returns:
        The plan, and what was saved.

    Raises:
        InputError: rows, columns, model or settings that do not fit; a folder that has another run.

    Guarantees:
        The saved weights satisfy the card's (epsilon, delta) for one row of the training data. The loss and
        the accuracy that are said do not.
    """
    wrote = written(recipe)
    recipe = Recipe.of(wrote)
    wrote = {name: getattr(recipe, name) for name in wrote}
    if resume:
        recipe, wrote = _resumed(recipe, wrote)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"dpzoo.train runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}. Start it without "
            f"torchrun, or train with dpzoo.integrations.DPTrainer, which runs in several."
        )
    job = _Job(recipe, wrote, say)
    plan = job.plan()
    say(str(plan))
    if dry_run:
        say("nothing was trained (dry run)")
        return Run(plan)
    _refuse_used(job, resume)
    began = time.monotonic()
    card, model = job.train(resume)
    report = None if job.canaries is None else _audit(job.canaries, card)
    if report is not None:
        measured = {  # by the bound that `report.ok`, and so the exit status, goes by
            "epsilon_at_least": report.epsilon_lower,
            "assuming": ASSUMES[report.largest.name],
            "epsilon_at_least_assuming_nothing": report["any mechanism"].epsilon,
            "epsilon_accounted": report.epsilon or 0.0,
            "delta": report.delta,
            "confidence": report.confidence,
            "canaries": report.canaries,
        }
        card = replace(card, measured=measured)
        if not report.ok:
            card = replace(card, notes=(*card.notes, f"**{str(report).splitlines()[0]}.**"))
    metrics = job.score(model)
    out = Path(recipe.out)
    model.save_pretrained(out)
    job.tokenizer.save_pretrained(out)
    card.write(out, base_model=hub_id(job.name), pipeline_tag=job.pipeline)
    say(f"\nprivacy   {card.statement()}")
    for line in str(report).splitlines() if report else ():
        say(f"measured  {line}")
    for name, value in metrics.items():
        say(f"held out  {name} {value:.4g} (not covered by epsilon)")
    say(f"time      {duration(time.monotonic() - began)}")
    say(f"saved     {out}, a stock checkpoint with its privacy card: publish this folder")
    if job.work.exists():
        say(f"private   {job.work}: checkpoints, losses, the noise's keys: never publish it")
    return Run(plan, out, card, metrics, report)


def _audit(canaries: GradientCanaries, card: PrivacyCard) -> RunReport:
    """What the run's canaries say of its epsilon, at a delta of which they can say something."""
    delta = min(card.delta, MEASURED_AT)
    history = ((card.noise_multiplier, card.sample_rate, card.steps),)
    return audit_run(
        canaries,
        {"likelihood": canaries.scores(card.noise_multiplier, card.sample_rate)},
        delta=delta,
        epsilon=epsilon_of(card.accountant, history, delta),
        independent=True,
    )


def _resumed(recipe: Recipe, wrote: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a run was begun with, what was chosen included, and what a person wrote of it.

    Args:
        recipe: of the run that goes on.
        wrote: the fields that were written for it. None leaves a choice to dpzoo, which was made.
    """
    path = Path(f"{recipe.out}.run") / RECIPE_NAME
    if not path.is_file():
        raise InputError(f"There is no run to resume: {path} does not exist. Leave resume out.")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kept, first = Recipe.of(saved["recipe"]), dict(saved["written"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({first_line(error)}), so it is not known what the run was begun with. "
            f"Restore it, or begin a new run with another out: the two runs' epsilons then add up."
        ) from None
    changed = {
        name: value
        for name, value in wrote.items()
        if value is not None and value not in (getattr(kept, name), first.get(name))
    }
    if changed:
        raise InputError(
            f"The run is resumed with {changed}, and it was begun with "
            f"{ {key: getattr(kept, key) for key in changed} }. Leave them out, or begin a new run with "
            f"another out: the two runs' epsilons then add up."
        )
    return kept, first


def _refuse_used(job: _Job, resume: bool) -> None:
    out = Path(job.recipe.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"The folder {out} is not empty. Name another with out (--out).")
    found = sorted(job.work.glob("checkpoint-*"))
    if found and not resume:
        raise InputError(
            f"{job.work} has a run that was not finished ({found[-1].name}). Go on with it (resume=True, "
            f"--resume), or name another out: the two runs' epsilons then add up."
        )


class _Job:
    """A recipe with its data, model and choices: what both routes need."""

    def __init__(self, recipe: Recipe, wrote: dict[str, Any], say: Say) -> None:
        self.say, self.wrote, self.work = say, wrote, Path(f"{recipe.out}.run")
        by_hand = [name for name in _TUNABLE if wrote.get(name) is not None]
        table = read_table(recipe.data, recipe.header)
        self.task = task = guess_task(
            table,
            task=recipe.task,
            text=recipe.text,
            label=recipe.label,
            prompt=recipe.prompt,
            labels=[name.strip() for name in recipe.labels.split(",")] if recipe.labels else None,
        )
        say(
            f"data      {len(table):,} rows of {recipe.data}{'; ' + table.note if table.note else ''}"
        )
        say(f"task      {task.name}: {task.reason}")
        if recipe.eval:
            self.train_rows = table
            self.heldout = read_table(recipe.eval, recipe.header, least=1)
        else:
            self.train_rows, self.heldout = _split(table, task, recipe)
        self.rows = len(self.train_rows)
        if self.rows < 2 or not len(self.heldout):
            raise InputError(
                f"{recipe.data} has too few rows to hold some out. Give eval (--eval)."
            )
        both = self.train_rows, self.heldout
        self.owners = texts_of(self.train_rows, recipe.unit) if recipe.unit else None
        if self.owners is not None and not all(self.owners):
            raise InputError(
                f"Row {self.owners.index('') + 1} of those to train on has nothing in column "
                f"{recipe.unit!r}, wanted whose it is in every row."
            )
        self.units = len(set(self.owners)) if self.owners else self.rows
        if recipe.unit in _INPUTS:
            raise InputError(
                f"unit={recipe.unit!r} is a name of the model's inputs. Rename the column."
            )
        self.classes, self.heldout_classes = (
            class_indices(rows, task) if task.label else [] for rows in both
        )
        for rows in both:  # or an error before anything is spent
            if not any(map(str.strip, texts_of(rows, task.text))):
                raise InputError(
                    f"Column {task.text!r} is blank in all {len(rows)} rows, wanted texts."
                )
        whose = f" of {self.units:,} {recipe.unit!r}" if recipe.unit else ""
        say(f"split     {self.rows:,} rows{whose} to train on, {len(self.heldout):,} held out")
        if (recipe.canaries or 0) > MOST_CANARIES * self.units:
            raise InputError(
                f"canaries={recipe.canaries!r} for {self.units:,} {'units' if recipe.unit else 'rows'} to "
                f"train on, wanted at most as many. They are rows among the data: more than half of every "
                f"batch would be canaries."
            )
        self.canaries = None if recipe.canaries is None else GradientCanaries(recipe.canaries)
        if self.canaries is not None:
            self.rows, self.units = self.rows + len(self.canaries), self.units + len(self.canaries)
            say(f"canaries  {len(self.canaries):,} rows more, by which epsilon is measured")
        if task.label:
            how = "given" if recipe.labels else "as they occur: their set counts as public"
            say(f"classes   {', '.join(task.labels)} ({how})")
        self.name = model_name(recipe.model, task)
        transformers.set_seed(recipe.seed)  # new weights
        self.model, self.tokenizer, self.scratch = load(self.name, task)
        refuse_wordless(self.name, self.tokenizer, texts_of(self.train_rows, task.text))
        count = self.model.num_parameters()
        self.delta = PrivacyArguments(
            target_epsilon=recipe.epsilon, target_delta=recipe.delta
        ).delta(self.units)
        trainable, why = recipe.trainable, "as told"
        if trainable is None:
            trainable, why = choose(
                task.name,
                self.units,
                count,
                recipe.epsilon,
                self.delta,
                scratch=self.scratch,
                by_unit=recipe.unit is not None,
            )
        if (task.name, trainable) not in DEFAULTS:
            raise InputError(f"trainable={trainable!r} is for classification, wanted lora or all.")
        self.defaults = DEFAULTS[task.name, trainable]
        say(f"model     {self.name} ({type(self.model).__name__}, {count:,} parameters)")
        say(f"trained   {trainable}: {why}")
        self.tuned = f"dpzoo's defaults; chosen on: {self.defaults.source}" + (
            f". Set by hand: {', '.join(by_hand)}" if by_hand else ""
        )
        limit = min(
            getattr(self.model.config, "max_position_embeddings", None) or 10**9,
            self.tokenizer.model_max_length,
        )
        self.epochs = recipe.epochs or self.defaults.epochs
        self.batch = logical_batch(self.defaults, self.units, recipe.batch_size)
        self.rate = recipe.learning_rate or self.defaults.learning_rate
        self.clipping_norm = recipe.clipping_norm or self.defaults.clipping_norm
        self.length = min(recipe.max_length or MAX_LENGTH[task.name], int(limit))
        self.recipe = recipe
        self.trainable = trainable
        self.pipeline = "text-classification" if task.label else "text-generation"
        self._route: _Head | _Gradients = (_Head if trainable == "head" else _Gradients)(self)

    def plan(self) -> Plan:
        return self._route.plan()

    def train(self, resume: bool) -> tuple[PrivacyCard, Any]:
        """The card, and the trained stock model."""
        return self._route.train(resume)

    def score(self, model: Any) -> dict[str, float]:
        """Metrics on the held-out rows."""
        return self._route.score(model)

    def majority(self) -> float:
        """Accuracy of always saying the training rows' most frequent class."""
        most = Counter(self.classes).most_common(1)[0][0]
        return self.heldout_classes.count(most) / len(self.heldout_classes)


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels", NUMBER)
_TUNABLE = ("epochs", "batch_size", "learning_rate", "clipping_norm", "max_length", "trainable")


def _split(table: Table, task: Task, recipe: Recipe) -> tuple[Table, Table]:
    """Training and held-out rows, by a hash of each row's own content, or of its unit.

    A row added or removed moves no other one, and equal rows are on one side; so is a unit.
    """
    names = (recipe.unit,) if recipe.unit else (task.prompt, task.text, task.label)
    columns = [texts_of(table, name) for name in names if name]
    held = []
    for cells in zip(*columns, strict=True):
        digest = hashlib.blake2b(
            "\0".join(cells).encode(), digest_size=8, key=str(recipe.seed).encode()
        ).digest()
        held.append(int.from_bytes(digest, "big") < recipe.heldout_share * 2**64)
    parts = [
        {
            name: [v for v, h in zip(values, held, strict=True) if h is wanted]
            for name, values in table.columns.items()
        }
        for wanted in (False, True)
    ]
    return Table(parts[0]), Table(parts[1])


# --- a head on features -------------------------------------------------------------------------


class _Head:
    """A classifier's last layer, on features that are read once (`dpzoo.heads`)."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        model = job.model.to(_DEVICE)
        pooled = model.config.model_type in ("bert", "roberta")
        self.norm = heads.pool_by_mean(model) if pooled else None

    def plan(self) -> Plan:
        job = self.job
        texts = texts_of(job.train_rows, job.task.text)
        some = texts[:: max(1, len(texts) // 32)]
        began = time.perf_counter()
        self._read(some)
        reading = (time.perf_counter() - began) / len(some)
        logical = max(1, min(job.batch, math.ceil(job.rows / 2)))
        batches = math.ceil(job.rows / logical)
        steps = math.ceil(job.epochs) * batches
        _, layer = heads.output_layer(job.model)
        trained = sum(p.numel() for p in layer.parameters())
        self.planned = Plan(
            units=job.rows,
            unit="row",
            logical=logical,
            physical=job.rows,
            steps=steps,
            sample_rate=1 / batches,
            noise_multiplier=noise_for("prv", job.recipe.epsilon, job.delta, 1 / batches, steps),
            clipping_norm=job.clipping_norm,
            epsilon=job.recipe.epsilon,
            delta=job.delta,
            accountant="prv",
            trained=trained,
            learning_rate=job.rate,
            seconds=reading * (job.rows + len(job.heldout)) + 2e-9 * trained * job.rows * steps,
            memory=fixed_bytes(job.model) + 12.0 * layer.in_features * job.rows,
        )
        return self.planned

    def _read(self, texts: list[str], progress: Any = None) -> torch.Tensor:
        job = self.job
        return heads.read_features(
            job.model, job.tokenizer, texts, max_length=job.length, progress=progress
        )

    def train(self, resume: bool) -> tuple[PrivacyCard, Any]:
        job, plan = self.job, self.planned  # nothing to resume: a head is trained in one go
        began, told = time.monotonic(), [0.0]

        def read(done: int, total: int) -> None:
            spent = time.monotonic() - began
            if spent > 10 and done / total >= told[0] + 0.1:
                told[0] = done / total
                job.say(
                    f"reading   {done / total:.0%}, {duration(spent * (total / done - 1))} left"
                )

        def step(done: int, total: int, loss: float) -> None:
            if done % max(1, total // 5) == 0:
                history = ((plan.noise_multiplier, plan.sample_rate, done),)
                spent = epsilon_of("prv", history, job.delta)
                job.say(
                    f"step      {done}/{total}  loss {loss:.4f} (not private)  epsilon {spent:.2f}"
                )

        values = self._read(texts_of(job.train_rows, job.task.text), read)
        run = heads.train_head(
            job.model,
            values,
            torch.tensor(job.classes),
            epsilon=job.recipe.epsilon,
            delta=job.delta,
            epochs=math.ceil(job.epochs),
            batch_size=job.batch,
            learning_rate=job.rate,
            max_grad_norm=job.clipping_norm,
            feature_norm=self.norm,
            progress=step,
            canaries=job.canaries,
        )
        if job.canaries is not None:
            job.work.mkdir(parents=True, exist_ok=True)
            job.canaries.save(job.work / CANARIES_NAME)
        card = PrivacyCard(
            epsilon=run.epsilon or 0.0,
            delta=job.delta,
            accountant="prv",
            noise_multiplier=run.noise_multiplier or 0.0,
            clipping_norm=job.clipping_norm,
            sample_rate=run.sample_rate,
            steps=run.steps,
            units=job.rows,
            trained=f"the last layer, {plan.trained:,} of {job.model.num_parameters():,} parameters, on "
            f"what the frozen rest says of each row",
            tuned=job.tuned,
        )
        return card, job.model

    def score(self, model: Any) -> dict[str, float]:
        labels = self.job.heldout_classes
        values = self._read(texts_of(self.job.heldout, self.job.task.text))
        guesses = heads.output_layer(model)[1](values.to(_DEVICE)).argmax(1).tolist()
        right = sum(a == b for a, b in zip(guesses, labels, strict=True)) / len(labels)
        return {"accuracy": right, "accuracy of always one class": self.job.majority()}


# --- gradients of the model ---------------------------------------------------------------------


class _Gradients:
    """Adapters, biases or every parameter, by `DPTrainer`."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        model = make_trainable(job.model, job.trainable, job.task, job.recipe.lora_rank)
        self.model: Any = per_sample(model, "bk")
        self.encoded = _encode(job, job.train_rows)
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
        ids = torch.full((2, job.length), _token(job.tokenizer), device=_DEVICE)
        labels = torch.zeros(2, dtype=torch.long, device=_DEVICE) if job.task.label else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.cost = cost_of(self.model.to(_DEVICE), batch, 2)
        room = 0.5 * _free_memory() - fixed_bytes(self.model)
        most = min(job.batch, _MOST_IN_MEMORY[_DEVICE])
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
            dataloader_pin_memory=_DEVICE == "cuda",
            seed=recipe.seed,
        )
        trainer = (DPTrainer if job.canaries is None else _AuditedTrainer)(
            model=self.model,
            args=args,
            data_collator=self.collate,
            train_dataset=self.encoded,
            eval_dataset=_encode(job, job.heldout),
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
        if (
            control.should_save
        ):  # before the checkpoint, which may be the last thing that is written
            self.canaries.save(self.path)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _encode(job: _Job, table: Table) -> list[dict[str, Any]]:
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
    if _DEVICE == "cuda":
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
