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

import recipes
from peft import LoraConfig, PeftModel, get_peft_model
from quickstart_data import tsv_data
from rows import Rows
from text_classification import accuracy, encode
from torch import nn
from training import (
    DEVICE,
    classes,
    delta_of,
    launch,
    load,
    options,
    outputs_of,
    save,
    show,
    train_privately,
)
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
    """A training recipe, the share of texts held out where there is no --eval, and the adapter's size.

    The adapter adds `alpha` / `rank` times a product of two matrices of `rank` columns and rows.
    """

    heldout_share: float
    rank: int
    alpha: int

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.at_most(self, "heldout_share", 0.5)


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
    data = tsv_data(
        arguments.data,
        arguments.eval,
        label_names=arguments.labels.split(",") if arguments.labels else None,
        seed=arguments.seed,
        heldout_share=recipe.heldout_share,
    )
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
    parser = options(__doc__, Recipe, "lora", "lines of text<TAB>label")
    parser.add_argument("--labels", help="by commas (default: those that occur in --data)")
    return launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
