"""Classify texts with differential privacy: any file of text<TAB>label, any checkpoint, a recipe.

    python examples/text_classification.py --data train.tsv --eval dev.tsv --out classifier
    python examples/text_classification.py --data train.tsv --out classifier \\
        --recipe text-classification-bias --model bert-base-uncased --epsilon 3

The default recipe trains a head on a frozen encoder (dpzoo.heads), which is what a few thousand rows are
enough for; text-classification trains every parameter, text-classification-bias biases and the head.

The privacy statement at the end covers the saved weights, for the presence or absence of any one line of
the training file. It does not cover the set of labels (name them with --labels), the number of lines, or
the loss shown on the way. examples/every_parameter.py is the longer version, with Opacus' own modes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import recipes
from support.data import Row
from support.models import PrivacySpent
from support.texts import accuracy, encode, read_texts, text_options
from support.training import classes, delta_of, launch, load, save, show, train_privately
from torch import nn

from dpzoo import heads


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe, and what is trained.

    `trainable` is head, on the frozen encoder's features; bias: biases and the new head (DP-BiTFiT, arXiv
    2210.00036); or all.
    """

    trainable: str

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.one_of(self, "trainable", ("head", "bias", "all"))
        if self.trainable == "head":  # as dpzoo.heads trains it, and in no other way
            recipes.one_of(self, "schedule", ("linear",))
            recipes.one_of(self, "clipping", ("flat",))


def freeze_all_but_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        head = name.startswith(("classifier", "pre_classifier", "score"))
        parameter.requires_grad_(head or name.endswith("bias"))


def train_on_features(
    model: Any, tokenizer: Any, rows: Sequence[Row], recipe: Recipe, delta: float
) -> PrivacySpent:
    """Train the last layer alone, on what the frozen rest of the model says of each row, read once."""
    pooled = model.config.model_type in ("bert", "roberta")
    norm = heads.pool_by_mean(model) if pooled else None
    sizes = {"max_length": recipe.max_length, "batch_size": recipe.micro_batch_size}
    values = heads.read_features(model, tokenizer, [row.text for row in rows], **sizes)
    run = heads.train_head(
        model,
        values,
        torch.tensor([row.label for row in rows]),
        epsilon=recipe.epsilon,
        delta=delta,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        feature_norm=norm,
    )
    epsilon, noise = run.epsilon or 0.0, run.noise_multiplier or 0.0
    return PrivacySpent(epsilon, delta, noise, run.sample_rate, run.steps)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    data = read_texts(arguments, recipe)
    model, tokenizer = load(recipe.model, "sequence-classification", **classes(data.label_names))
    rows = data.train[: arguments.rows]
    heldout = encode(data.heldout, tokenizer, recipe.max_length)
    if recipe.trainable == "bias":
        freeze_all_but_biases(model)
    head = recipe.trainable == "head"
    trained = heads.output_layer(model)[1] if head else model
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    print(f"{type(model).__name__}: {count:,} of {model.num_parameters():,} parameters are trained")
    print(f"{len(rows)} rows to train on, {len(heldout)} held out")
    delta = delta_of(arguments, len(rows))
    if head:
        spent = train_on_features(model, tokenizer, rows, recipe, delta)
    else:
        train = encode(rows, tokenizer, recipe.max_length)
        spent = train_privately(model, train, recipe, delta=delta)

    label, _ = Counter(data.label_names[row.label] for row in data.train).most_common(1)[0]
    always = sum(data.label_names[row.label] == label for row in data.heldout) / len(heldout)
    show(
        spent,
        held_out_accuracy=f"{accuracy(model, heldout):.1%} (always {label!r}: {always:.1%})",
        saved=save(model, tokenizer, arguments.out, heldout),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = text_options(__doc__, Recipe, "text-classification-head")
    return launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
