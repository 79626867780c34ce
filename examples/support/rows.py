"""Rows of the examples: read from files, split into training and held-out parts, kept as tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.data import Dataset

from support.data import DataError, read_lines

Batch = dict[str, torch.Tensor]
T = TypeVar("T")
Sentence = tuple[tuple[str, str], ...]  # words and their tags
IGNORED = -100  # a label that takes no part in the loss


class Rows(Dataset[Batch]):
    """Rows of equal shape. A row, with all that is in it, is what the privacy guarantee protects.

    Args:
        columns: name -> tensor with the rows first. ``attention_mask`` is among them, (rows, seq) or
            (rows, choices, seq), 1 at tokens and 0 at padding, which is on the right.
    """

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["attention_mask"])

    def __getitem__(self, i: int) -> Batch:
        return {name: column[i] for name, column in self.columns.items()}


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Parts of at most `size` rows, of similar length, without the padding that all of a part share.

    In book-keeping mode the clipped sums of several backward passes add up, so that a logical batch may
    be cut anywhere. An empty batch, which Poisson sampling can draw, has no parts.
    """
    lengths = batch["attention_mask"].flatten(1).sum(1)
    for part in lengths.argsort(stable=True).split(size):
        if len(part):
            yield trimmed({name: column[part] for name, column in batch.items()})


def trimmed(batch: Batch) -> Batch:
    """Cut off the positions that are padding in all of these rows."""
    mask = batch["attention_mask"]
    width = max(1, int(mask.sum(-1).max()))
    return {
        name: column[..., :width].contiguous() if column.shape == mask.shape else column
        for name, column in batch.items()
    }


def read_sentences(path: Path) -> list[Sentence]:
    """Sentences of token<TAB>tag lines, with blank lines between them, in the order of the file.

    Raises:
        DataError: the file cannot be read, or a line is not token<TAB>tag; names the line.
    """
    sentences: list[Sentence] = []
    words: list[tuple[str, str]] = []
    for number, line in enumerate([*read_lines(path), ""], 1):
        if line.strip():
            fields = line.split("\t")
            if len(fields) != 2 or not all(field.strip() for field in fields):
                raise DataError(f"{path}, line {number}: {line!r}, wanted token<TAB>tag")
            words.append((fields[0].strip(), fields[1].strip()))
        elif words:
            sentences.append(tuple(words))
            words = []
    return sentences


def hold_out(
    rows: Sequence[T], key: Callable[[T], Hashable], share: float, seed: int, path: Path
) -> tuple[list[T], list[T]]:
    """Split rows into (training, held out); rows of equal key stay on one side.

    Raises:
        DataError: there are fewer than two different keys.
    """
    keys = list(dict.fromkeys(key(row) for row in rows))
    if len(keys) < 2:
        raise DataError(
            f"{path}: {len(keys)} different row(s), wanted at least 2, to hold some out (or --eval)"
        )
    random.Random(seed).shuffle(keys)
    held = set(keys[: min(len(keys) - 1, max(1, round(share * len(keys))))])
    return [r for r in rows if key(r) not in held], [r for r in rows if key(r) in held]


def padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    """Lists of different lengths as a tensor (rows, length), filled up, or cut off, on the right."""
    out = torch.full((len(rows), length), value)
    for line, row in zip(out, rows, strict=True):
        kept = torch.tensor(row[:length], dtype=torch.long)
        line[: len(kept)] = kept
    return out


def labelled(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], length: int, padding: int
) -> Rows:
    """Rows of tokens with a label each: input_ids, attention_mask, labels, each (rows, length)."""
    return Rows(
        input_ids=padded(ids, length, padding),
        attention_mask=padded([[1] * len(row) for row in ids], length, 0),
        labels=padded(labels, length, IGNORED),
    )
