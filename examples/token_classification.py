"""Tag the words of sentences with differential privacy, from a CoNLL-like file.

    python examples/token_classification.py --data train.tsv --eval dev.tsv --out tagger

A line holds token<TAB>tag, and a blank line ends a sentence. A word that the tokenizer takes apart has its
tag on its first piece. The sentence is the unit of privacy: its loss is the mean over its own words. The
set of tags is not covered by the privacy statement (name them with --labels).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
import torch
from quickstart_data import DataError
from rows import IGNORED, Rows, hold_out, padded, read_lines
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

Sentence = tuple[tuple[str, str], ...]  # words and their tags


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe, and the share of sentences held out where there is no --eval."""

    heldout_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.at_most(self, "heldout_share", 0.5)


def read_sentences(path: Path) -> list[Sentence]:
    """Sentences in the order of the file.

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


def encode(
    sentences: Sequence[Sentence], tags: Sequence[str], tokenizer: Any, length: int, path: Path
) -> Rows:
    """Token ids, mask and labels, each (rows, length); pieces of a word after the first are ignored.

    Raises:
        DataError: a tag is not one of `tags`.
    """
    index = {tag: i for i, tag in enumerate(tags)}
    unknown = sorted({tag for sentence in sentences for _, tag in sentence} - set(tags))
    if unknown:
        raise DataError(f"{path}: tags {', '.join(unknown)} are not among {', '.join(tags)}")
    ids, labels = [], []
    for sentence in sentences:
        encoded = tokenizer(
            [word for word, _ in sentence],
            is_split_into_words=True,
            truncation=True,
            max_length=length,
        )
        word_of = encoded.word_ids()
        first = [word is not None and word not in word_of[:i] for i, word in enumerate(word_of)]
        ids.append(encoded["input_ids"])
        labels.append(
            [
                index[sentence[word][1]] if begins else IGNORED
                for word, begins in zip(word_of, first, strict=True)
            ]
        )
    ones = padded([[1] * len(row) for row in ids], length, 0)
    input_ids = padded(ids, length, tokenizer.pad_token_id)
    return Rows(input_ids=input_ids, attention_mask=ones, labels=padded(labels, length, IGNORED))


def scores(model: nn.Module, rows: Rows, outside: int | None) -> tuple[float, float]:
    """Accuracy over all words, and the F1 score of the words whose tag is not `outside`."""
    predicted, wanted = [], []
    for batch, out in outputs_of(model, rows):
        real = batch["labels"] != IGNORED
        predicted.append(out.logits.argmax(-1)[real])
        wanted.append(batch["labels"][real])
    p, w = torch.cat(predicted), torch.cat(wanted)
    hits = ((p == w) & (w != outside)).sum().item() if outside is not None else 0
    named = (p != outside).sum().item() + (w != outside).sum().item() if outside is not None else 0
    return (p == w).float().mean().item(), 2 * hits / max(1, named)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    sentences, path = read_sentences(arguments.data), arguments.data
    given = arguments.labels.split(",") if arguments.labels else None
    tags = given or sorted({tag for sentence in sentences for _, tag in sentence})
    if arguments.eval:
        held, held_path = read_sentences(arguments.eval), arguments.eval
    else:
        key = lambda sentence: tuple(word for word, _ in sentence)  # noqa: E731
        sentences, held = hold_out(sentences, key, recipe.heldout_share, arguments.seed, path)
        held_path = path
    model, tokenizer = load(recipe.model, "token-classification", **classes(tags))
    train = encode(sentences[: arguments.rows], tags, tokenizer, recipe.max_length, path)
    heldout = encode(held, tags, tokenizer, recipe.max_length, held_path)
    print(f"{len(train)} sentences to train on, {len(heldout)} held out, {len(tags)} tags")
    spent = train_privately(model, train, recipe, delta=delta_of(arguments, len(train)))

    outside = tags.index("O") if "O" in tags else None
    right, f1 = scores(model, heldout, outside)
    words = heldout.columns["labels"][heldout.columns["labels"] != IGNORED]
    most = words.bincount().max().item() / len(words)
    report = {"held_out_accuracy": f"{right:.1%} of words (the most common tag: {most:.1%})"}
    if outside is not None:
        report["held_out_F1"] = f"{f1:.3f}, of words with another tag than O"
    show(spent, **report, saved=save(model, tokenizer, arguments.out, heldout))


def main(argv: Sequence[str] | None = None) -> int:
    data = "token<TAB>tag lines, a blank line after each sentence"
    parser = options(__doc__, Recipe, "token-classification", data)
    parser.add_argument("--labels", help="the tags, by commas (default: those in --data)")
    return launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
