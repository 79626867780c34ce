"""The reader of recipes, and the recipes of the repository."""

import argparse
from dataclasses import fields
from pathlib import Path

import gpt2_e2e
import lora
import masked_lm
import pytest
import sst2_model
import text_classification
import yaml
from support import classification, recipes
from support.recipes import RecipeError, TrainingRecipe, read

KINDS = {
    "e2e-gpt2": gpt2_e2e.Recipe,
    "e2e-scratch": gpt2_e2e.Recipe,
    "lora": lora.Recipe,
    "masked-lm": masked_lm.Recipe,
    "multiple-choice": TrainingRecipe,
    "every-parameter": classification.Recipe,
    "sst2-minilm": classification.Recipe,
    "sst2-study": sst2_model.Recipe,
    "text-classification": text_classification.Recipe,
    "text-classification-head": text_classification.Recipe,
    "text-classification-bias": text_classification.Recipe,
    "token-classification": TrainingRecipe,
}
"""Every recipe of the repository, and what reads it."""


def test_every_recipe_has_a_reader() -> None:
    assert {path.stem for path in recipes.RECIPES.glob("*")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_recipes_of_the_repository_are_read(name: str) -> None:
    kind = KINDS[name]
    recipe = read(kind, name)
    values = yaml.safe_load((recipes.RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert {field.name for field in fields(kind)} == set(values)
    for key, value in values.items():
        assert getattr(recipe, key) == type(getattr(recipe, key))(value)


def test_a_recipe_of_another_kind_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"lora\.yaml: unknown keys: alpha, rank; missing keys: t"
    ):
        read(text_classification.Recipe, "lora")


def test_every_recipe_says_where_its_values_are_from() -> None:
    """Published, measured, or said to be neither."""
    for path in recipes.RECIPES.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "Source" in text or "ot tuned" in text or "chosen" in text, path


def changed(tmp_path: Path, name: str, **values: object) -> str:
    recipe = yaml.safe_load((recipes.RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump({**recipe, **values}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1}, r"unknown keys: lr; missing keys: none; known keys: model, max_length"),
        ({"schedule": "cosine"}, r"schedule is 'cosine', wanted constant or linear"),
        ({"clipping": "per_layer"}, r"clipping is 'per_layer', wanted flat or automatic"),
        ({"trainable": "some"}, r"trainable is 'some', wanted head or bias or all"),
        ({"weight_decay": -1}, r"weight_decay is -1\.0, wanted 0 or above"),
        ({"max_grad_norm": 0}, r"max_grad_norm is 0\.0, wanted a number above 0"),
        ({"batch_size": 1.5}, r"batch_size is 1\.5, wanted a whole number"),
        ({"heldout_share": 0.6}, r"heldout_share is 0\.6, wanted at most 0\.5"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(text_classification.Recipe, changed(tmp_path, "text-classification", **values))


def test_options_override_the_recipe() -> None:
    parser = argparse.ArgumentParser()
    recipes.add_options(parser, lora.Recipe, "lora")
    arguments = parser.parse_args(["--rank", "4", "--learning-rate", "2e-3", "--model", "here"])
    recipe = recipes.from_options(lora.Recipe, arguments)
    assert (recipe.rank, recipe.learning_rate, recipe.model) == (4, 0.002, "here")
    assert recipe.batch_size == read(lora.Recipe, "lora").batch_size
    assert issubclass(lora.Recipe, TrainingRecipe)
