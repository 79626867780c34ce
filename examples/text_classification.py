"""Classify texts with differential privacy: any file of text<TAB>label, any checkpoint, a recipe.

    python examples/text_classification.py --data train.tsv --eval dev.tsv --out classifier
    python examples/text_classification.py --data train.tsv --out classifier \\
        --recipe text-classification-bias --model bert-base-uncased --epsilon 3

The privacy statement at the end covers the saved weights, for the presence or absence of any one line of
the training file. It does not cover the set of labels (name them with --labels), the number of lines, or
the loss shown on the way. examples/quickstart.py is the longer version, with Opacus' own modes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import recipes
import torch
from quickstart_data import Row, tsv_data
from rows import Rows
from torch import nn
from training import (
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


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe, the share of texts held out where there is no --eval, and what is trained.

    `trainable` is all, or bias: biases and the new head alone (DP-BiTFiT, arXiv 2210.00036).
    """

    heldout_share: float
    trainable: str

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.at_most(self, "heldout_share", 0.5)
        recipes.one_of(self, "trainable", ("all", "bias"))


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Rows:
    """Token ids and mask, (rows, max_length), and labels, (rows,)."""
    encoded = tokenizer(
        [row.text for row in rows],
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    return Rows(**encoded, labels=torch.tensor([row.label for row in rows]))


def freeze_all_but_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        head = name.startswith(("classifier", "pre_classifier", "score"))
        parameter.requires_grad_(head or name.endswith("bias"))


def accuracy(model: nn.Module, rows: Rows) -> float:
    right = [(out.logits.argmax(1) == batch["labels"]) for batch, out in outputs_of(model, rows)]
    return torch.cat(right).float().mean().item()


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
    if recipe.trainable == "bias":
        freeze_all_but_biases(model)
    train = encode(data.train[: arguments.rows], tokenizer, recipe.max_length)
    heldout = encode(data.heldout, tokenizer, recipe.max_length)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{type(model).__name__}: {trained:,} of {model.num_parameters():,} parameters are trained"
    )
    print(f"{len(train)} rows to train on, {len(heldout)} held out")
    delta = delta_of(arguments, len(train))
    spent = train_privately(model, train, recipe, delta=delta)

    label, _ = Counter(data.label_names[row.label] for row in data.train).most_common(1)[0]
    always = sum(data.label_names[row.label] == label for row in data.heldout) / len(heldout)
    show(
        spent,
        held_out_accuracy=f"{accuracy(model, heldout):.1%} (always {label!r}: {always:.1%})",
        saved=save(model, tokenizer, arguments.out, heldout),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, Recipe, "text-classification", "lines of text<TAB>label")
    parser.add_argument("--labels", help="by commas (default: those that occur in --data)")
    return launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
