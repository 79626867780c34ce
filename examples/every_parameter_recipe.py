"""The recipe of every_parameter.py: what every-parameter.yaml and sst2-minilm.yaml hold."""

from __future__ import annotations

from dataclasses import dataclass

from recipes import RECIPES, RecipeError, at_most, one_of, positive, read

__all__ = ["RECIPES", "Recipe", "RecipeError", "read_recipe"]


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run. configs/recipes/every-parameter.yaml says what each of them does."""

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
        positive(self)
        at_most(self, "heldout_share", 0.5)
        at_most(self, "warmup_share", 1)
        one_of(self, "pooling", ("mean", "checkpoint"))


def read_recipe(name: str, overrides: dict[str, object] | None = None) -> Recipe:
    """`recipes.read` of that kind."""
    return read(Recipe, name, overrides)
