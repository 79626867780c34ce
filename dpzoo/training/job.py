"""A recipe with its rows, its model, and what is chosen for them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dpzoo.empirical import GradientCanaries
from dpzoo.errors import InputError
from dpzoo.integrations import PrivacyArguments
from dpzoo.training.data import Table, Task, class_indices, guess_task, read_table, texts_of
from dpzoo.training.models import load, model_name, refuse_wordless
from dpzoo.training.recipe import DEFAULTS, MAX_LENGTH, Recipe, choose, logical_batch

Say = Callable[[str], None]
CANARIES_NAME = "canaries.npz"
MOST_CANARIES = 1
"""For each unit to train on."""
NUMBER = "canary"
"""The column that says which canary a row is."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels", NUMBER)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_TUNABLE = ("epochs", "batch_size", "learning_rate", "clipping_norm", "max_length", "trainable")


class Job:
    """A recipe with its data, model and choices: what both routes need.

    Raises:
        InputError: as `dpzoo.training.run.train`.
    """

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
            self.train_rows, self.heldout = split(table, task, recipe)
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
        if recipe.unit in INPUTS:
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

    def majority(self) -> float:
        """Accuracy of always saying the training rows' most frequent class."""
        most = Counter(self.classes).most_common(1)[0][0]
        return self.heldout_classes.count(most) / len(self.heldout_classes)


def split(table: Table, task: Task, recipe: Recipe) -> tuple[Table, Table]:
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
