"""Recipes: the hyper-parameters of the quickstart, read from configs/recipes/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "recipes"


class RecipeError(ValueError):
    """A recipe, or an option that overrides it, cannot be used; the message names the key."""


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run. configs/recipes/quickstart.yaml says what each of them does."""

    max_length: int
    max_train_rows_per_label: int
    heldout_share: float
    epochs: int
    batch_size: int
    physical_batch_size: int
    learning_rate: float
    head_learning_rate: float
    warmup_share: float
    max_grad_norm: float
    epsilon: float
    pooling: str
    pooler_scale: float
    nonprivate_epochs: int
    nonprivate_batch_size: int
    nonprivate_learning_rate: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type != "str" and not 0 < value < float("inf"):
                raise RecipeError(f"{field.name} is {value}, wanted a number above 0")
        for name, limit in (("heldout_share", 0.5), ("warmup_share", 1)):
            if getattr(self, name) > limit:
                raise RecipeError(f"{name} is {getattr(self, name)}, wanted at most {limit}")
        if self.pooling not in ("mean", "checkpoint"):
            raise RecipeError(f"pooling is {self.pooling!r}, wanted mean or checkpoint")


def read_recipe(name: str, overrides: dict[str, object] | None = None) -> Recipe:
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
    kinds = {
        field.name: {"int": int, "float": float, "str": str}[field.type] for field in fields(Recipe)
    }
    unknown = sorted(str(key) for key in values if key not in kinds)
    missing = sorted(key for key in kinds if key not in values)
    if unknown or missing:
        raise RecipeError(
            f"{path}: unknown keys: {', '.join(unknown) or 'none'}; "
            f"missing keys: {', '.join(missing) or 'none'}; known keys: {', '.join(kinds)}"
        )
    values.update(overrides or {})
    converted = {}
    for key, kind in kinds.items():
        try:
            converted[key] = kind(values[key])  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            raise RecipeError(f"{path}: {key} is {values[key]!r}, wanted {kind.__name__}") from None
        if kind is int and converted[key] != float(values[key]):
            raise RecipeError(f"{path}: {key} is {values[key]!r}, wanted a whole number")
    return Recipe(**converted)
