"""Train LoRA adapters of a text classifier with differential privacy; export the adapter and the sum.

    python examples/lora.py --data train.tsv --eval dev.tsv --out lora

writes lora/adapter, which PEFT loads onto the *stock* checkpoint, and lora/merged, a stock checkpoint with
the adapter added to the weights. The file has lines of text<TAB>label; what the privacy statement covers is
what examples/text_classification.py says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from support import recipes
from support.rows import Rows
from support.texts import accuracy, encode, read_texts, text_options
from support.training import (
    DEVICE,
    classes,
    delta_of,
    launch,
    load,
    outputs_of,
    save,
    show,
    train_privately,
)
from torch import nn
from transformers import AutoModelForSequenceClassification

# Queries and values; GPT-2 has them, and the keys, in one projection. PEFT's own choice, which has none for
# DistilBERT.
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
}


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe, and the adapter's size: `alpha` / `rank` times a product of rank `rank`."""

    rank: int
    alpha: int


def adapt(model: Any, recipe: Recipe) -> PeftModel:
    """The model with LoRA: its weights are frozen, adapters and the (new) head are trained."""
    lora = LoraConfig(
        task_type="SEQ_CLS",  # keeps the head trainable, and saves it with the adapter
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=TARGETS[model.config.model_type],
    )
    return get_peft_model(model, lora)


def difference(model: nn.Module, other: nn.Module, rows: Rows) -> float:
    """The largest difference between two models' logits."""
    pairs = zip(outputs_of(model, rows), outputs_of(other, rows), strict=True)
    return max((a.logits - b.logits).abs().max().item() for (_, a), (_, b) in pairs)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    data = read_texts(arguments, recipe)
    model, tokenizer = load(recipe.model, "sequence-classification", **classes(data.label_names))
    adapted = adapt(model, recipe)
    train = encode(data.train[: arguments.rows], tokenizer, recipe.max_length)
    heldout = encode(data.heldout, tokenizer, recipe.max_length)
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"{trained:,} of {total:,} parameters are trained, on {len(train)} rows")
    spent = train_privately(adapted, train, recipe, delta=delta_of(arguments, len(train)))
    score = accuracy(adapted, heldout)

    folder = arguments.out / "adapter"
    adapted.save_pretrained(folder)
    stock = AutoModelForSequenceClassification.from_pretrained(
        model.name_or_path, config=model.config
    )
    on_stock = difference(adapted, PeftModel.from_pretrained(stock, folder).to(DEVICE), heldout)
    if not on_stock < 1e-3:
        raise RuntimeError(f"{folder}: on the stock model, logits differ by {on_stock:g}")
    merged = adapted.merge_and_unload()
    show(
        spent,
        held_out_accuracy=f"{score:.1%}",
        adapter=f"{folder}; on the stock model, PEFT gives its logits within {on_stock:.0e}",
        merged=save(merged, tokenizer, arguments.out / "merged", heldout),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return launch(run, text_options(__doc__, Recipe, "lora"), argv)


if __name__ == "__main__":
    sys.exit(main())
