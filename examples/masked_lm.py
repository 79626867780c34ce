"""Adapt a masked language model to a domain with differential privacy, from a file of texts.

    python examples/masked_lm.py --data notes.txt --eval others.txt --model roberta-base --out adapted

A line is a row and a unit of privacy, and is cut at the recipe's max_length.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import recipes
from support.data import read_lines
from support.rows import IGNORED, Batch, Rows, hold_out
from support.texts import tokenize
from support.training import (
    delta_of,
    launch,
    load,
    options,
    outputs_of,
    save,
    show,
    train_privately,
)
from torch import nn


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe, and the share of tokens to predict."""

    mask_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.at_most(self, "mask_share", 0.5)


class MaskedRows(Rows):
    """Rows that get another mask whenever they are drawn.

    As in BERT: of the chosen tokens 80 % become the mask, 10 % any token, and 10 % stay. A row's own
    generator decides, so that nothing depends on who else is in the batch.

    Args:
        encoded: input_ids and attention_mask, (rows, seq).
        tokenizer: has a mask token; special tokens are never chosen.
        share, fixed: the chance that a token is chosen; whether a row always gets the same mask.
    """

    def __init__(
        self, encoded: Batch, tokenizer: Any, share: float, seed: int, fixed: bool = False
    ) -> None:
        super().__init__(**{name: encoded[name] for name in ("input_ids", "attention_mask")})
        self.special = torch.isin(encoded["input_ids"], torch.tensor(tokenizer.all_special_ids))
        self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.share, self.seed, self.fixed = share, seed, fixed
        self.draws = [0] * len(self)

    def __getitem__(self, i: int) -> Batch:
        row = super().__getitem__(i)
        own = torch.Generator().manual_seed(hash((self.seed, i, self.draws[i])) % 2**63)
        self.draws[i] += not self.fixed
        ids = row["input_ids"]
        chosen = (torch.rand(len(ids), generator=own) < self.share) & ~self.special[i]
        fate = torch.rand(len(ids), generator=own)
        other = torch.randint(self.vocabulary, ids.shape, generator=own)
        shown = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, other, ids))
        labels = ids.where(chosen, IGNORED)
        return {**row, "input_ids": shown.where(chosen, ids), "labels": labels}


def masked_loss(model: nn.Module, rows: Rows) -> float:
    """Cross entropy of the masked tokens, averaged over the tokens of all rows."""
    total, count = 0.0, 0
    for batch, out in outputs_of(model, rows):
        labels = batch["labels"].flatten()
        loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels, reduction="sum")
        total, count = total + loss.item(), count + int((labels != IGNORED).sum())
    return total / max(1, count)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    texts = [line for line in read_lines(arguments.data) if line.strip()]
    if arguments.eval:
        held = [line for line in read_lines(arguments.eval) if line.strip()]
    else:
        texts, held = hold_out(texts, str, recipe.heldout_share, arguments.seed, arguments.data)
    model, tokenizer = load(recipe.model, "masked-lm")
    parts = (texts[: arguments.rows], held)
    own, other = (tokenize(part, tokenizer, recipe.max_length) for part in parts)
    how = (tokenizer, recipe.mask_share, arguments.seed)
    train, heldout = MaskedRows(own, *how), MaskedRows(other, *how, fixed=True)
    print(f"{len(train)} lines to train on, {len(heldout)} held out")
    before, delta = masked_loss(model, heldout), delta_of(arguments, len(train))
    spent = train_privately(model, train, recipe, delta=delta)
    after = masked_loss(model, heldout)
    show(
        spent,
        before=f"held-out loss {before:.3f}, perplexity {math.exp(before):.1f}",
        after=f"held-out loss {after:.3f}, perplexity {math.exp(after):.1f}",
        saved=save(model, tokenizer, arguments.out, heldout),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return launch(run, options(__doc__, Recipe, "masked-lm", "one text a line"), argv)


if __name__ == "__main__":
    sys.exit(main())
