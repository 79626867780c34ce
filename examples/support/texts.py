"""Classified texts of the examples: options, rows and score."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.data import Row, TextData, docs_data, tsv_data
from support.recipes import TrainingRecipe
from support.rows import Rows
from support.training import options, outputs_of


def text_options(doc: str | None, kind: type, recipe: str) -> argparse.ArgumentParser:
    """`training.options` for lines of text<TAB>label."""
    parser = options(doc, kind, recipe, "lines of text<TAB>label")
    parser.add_argument("--labels", help="by commas (default: those that occur in --data)")
    return parser


def read_texts(arguments: argparse.Namespace, recipe: TrainingRecipe) -> TextData:
    """The rows that the options of `text_options` name.

    Raises:
        DataError: see `support.data.tsv_data`.
    """
    return tsv_data(
        arguments.data,
        arguments.eval,
        label_names=arguments.labels.split(",") if arguments.labels else None,
        seed=arguments.seed,
        heldout_share=recipe.heldout_share,
    )


def tokenize(texts: Sequence[str], tokenizer: Any, length: int) -> Any:
    """What the tokenizer makes of texts, each column (rows, length)."""
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer(texts, return_tensors="pt", **options)


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Rows:
    """Token ids and mask, (rows, max_length), and labels, (rows,)."""
    encoded = tokenize([row.text for row in rows], tokenizer, max_length)
    return Rows(**encoded, labels=torch.tensor([row.label for row in rows]))


def accuracy(model: nn.Module, rows: Rows) -> float:
    """The share of rows whose largest logit is the label's."""
    right = [(out.logits.argmax(1) == batch["labels"]) for batch, out in outputs_of(model, rows)]
    return torch.cat(right).float().mean().item()


def read_rows(path: Path | None) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of one or two texts and a label: those to train on, and those held out (a file's last tenth)."""
    if path is None:
        data = docs_data(seed=0, heldout_share=0.15, max_train_rows_per_label=500)
        train, test = ([(r.text, str(r.label)) for r in p] for p in (data.train, data.heldout))
        return train, test
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [tuple(line.split("\t")) for line in lines if line.strip()]
    if len(rows) < 10 or {len(row) for row in rows} not in ({2}, {3}):
        raise SystemExit(f"error: {path}: wanted ten lines or more of text<TAB>[text<TAB>]label")
    return rows[: -len(rows) // 10], rows[-len(rows) // 10 :]
