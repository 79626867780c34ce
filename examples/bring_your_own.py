"""Your own transformers classifier: convert it, audit it, train it privately, and take it back.

    python examples/bring_your_own.py --model path/to/checkpoint --data train.tsv --out private

The model may as well be an object that you have in memory: see `run`. Its embeddings are frozen here, so
that something of the model stays what it was, and the end shows that it did: hidden states before the
first layer are bit-equal to the original's. The rest is trained by the recipe, with epsilon at the end.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
from support import recipes
from support.rows import Batch, trimmed
from support.texts import accuracy, encode, read_texts, text_options
from support.training import (
    DEVICE,
    classes,
    delta_of,
    launch,
    load_tokenizer,
    on_device,
    show,
    train_privately,
)
from text_classification import Recipe
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import dpzoo

CHECKS = ("coverage", "exactness", "isolation", "sensitivity")  # a part of them, for speed


def freeze_embeddings(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "embeddings" in name or ".wte." in name or ".wpe." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def logits_and_embedded(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, labels), and the hidden states before the first layer, (rows, seq, hidden)."""
    out = model.eval()(**batch, output_hidden_states=True)
    return out.logits, out.hidden_states[0]


def largest(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"differ by at most {(a - b).abs().max().item():.0e}"


def run(arguments: argparse.Namespace) -> PreTrainedModel:
    recipe = recipes.from_options(Recipe, arguments)
    data = read_texts(arguments, recipe)
    name, tokenizer, overrides = load_tokenizer(recipe.model)
    overrides |= classes(data.label_names)
    # Yours: any stock model object will do, trained by whatever means.
    stock = AutoModelForSequenceClassification.from_pretrained(name, **overrides).to(DEVICE)
    train = encode(data.train[: arguments.rows], tokenizer, recipe.max_length)
    heldout = encode(data.heldout, tokenizer, recipe.max_length)
    batch = on_device(trimmed({name: column[:5] for name, column in heldout.columns.items()}))
    before, embedded = logits_and_embedded(stock, batch)

    # 1. Convert. The copy keeps the original as it is: otherwise the two share their weights.
    model = dpzoo.convert(copy.deepcopy(stock))
    print(f"converted: logits {largest(logits_and_embedded(model, batch)[0], before)}")

    # 2. Audit, on a batch of yours.
    report = dpzoo.audit(model, batch, max_grad_norm=recipe.max_grad_norm, checks=CHECKS)
    print(report)
    report.raise_if_failed()

    # 3. Train.
    freeze_embeddings(model)
    spent = train_privately(model, train, recipe, delta=delta_of(arguments, len(train)))
    score = accuracy(model, heldout)

    # 4. Back, as an object and as a checkpoint.
    trained, _ = logits_and_embedded(model, batch)
    back = dpzoo.to_transformers(model)
    logits, embedded_now = logits_and_embedded(back, batch)
    if not torch.equal(embedded_now, embedded):
        raise RuntimeError("the frozen embeddings have changed; this is a bug in dpzoo")
    if not torch.equal(logits_and_embedded(stock, batch)[0], before):
        raise RuntimeError("the original model has changed; this is a bug in dpzoo")
    back.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    show(
        spent,
        held_out_accuracy=f"{score:.1%}",
        stock=f"the stock model's logits and dpzoo's {largest(logits, trained)}",
        untouched="frozen embeddings and the original model: bit-equal",
        trained=f"logits and the original's {largest(logits, before)}",
        saved=str(arguments.out),
    )
    return back


def main(argv: Sequence[str] | None = None) -> int:
    return launch(run, text_options(__doc__, Recipe, "text-classification"), argv)


if __name__ == "__main__":
    sys.exit(main())
