"""Tag the words of sentences with differential privacy, from a CoNLL-like file.

    python examples/token_classification.py --data train.tsv --eval dev.tsv --out tagger

A line holds token<TAB>tag, and a blank line ends a sentence, the unit of privacy. A word that the
tokenizer takes apart has its tag on its first piece. The set of tags is not covered by the privacy
statement (see --labels).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support import training
from support.data import DataError
from support.recipes import TrainingRecipe, from_options
from support.rows import IGNORED, Rows, Sentence, hold_out, labelled, read_sentences
from torch import nn


def words_of(sentence: Sentence) -> tuple[str, ...]:
    return tuple(word for word, _ in sentence)


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
    options = {"is_split_into_words": True, "truncation": True, "max_length": length}
    for sentence in sentences:
        encoded = tokenizer(list(words_of(sentence)), **options)
        ids.append(encoded["input_ids"])
        of = encoded.word_ids()  # of each piece; the special tokens are of none
        first = [word is not None and word not in of[:i] for i, word in enumerate(of)]
        pieces = zip(of, first, strict=True)
        labels.append([index[sentence[w][1]] if begins else IGNORED for w, begins in pieces])
    return labelled(ids, labels, length, tokenizer.pad_token_id)


def scores(model: nn.Module, rows: Rows, outside: int | None) -> tuple[float, float]:
    """Accuracy over all words, and the F1 score of the words whose tag is not `outside`."""
    predicted, wanted = [], []
    for batch, out in training.outputs_of(model, rows):
        real = batch["labels"] != IGNORED
        predicted.append(out.logits.argmax(-1)[real])
        wanted.append(batch["labels"][real])
    p, w = torch.cat(predicted), torch.cat(wanted)
    right = (p == w).float().mean().item()
    if outside is None:
        return right, 0.0
    hits = ((p == w) & (w != outside)).sum().item()
    return right, 2 * hits / max(1, int((p != outside).sum() + (w != outside).sum()))


def run(arguments: argparse.Namespace) -> None:
    recipe = from_options(TrainingRecipe, arguments)
    sentences, path = read_sentences(arguments.data), arguments.data
    found = {tag for sentence in sentences for _, tag in sentence}
    tags = arguments.labels.split(",") if arguments.labels else sorted(found)
    held_path = arguments.eval or path
    if arguments.eval:
        held = read_sentences(held_path)
    else:
        sentences, held = hold_out(sentences, words_of, recipe.heldout_share, arguments.seed, path)
    model, tokenizer = training.load(recipe.model, "token-classification", **training.classes(tags))
    train = encode(sentences[: arguments.rows], tags, tokenizer, recipe.max_length, path)
    heldout = encode(held, tags, tokenizer, recipe.max_length, held_path)
    print(f"{len(train)} sentences to train on, {len(heldout)} held out, {len(tags)} tags")
    spent = training.train_privately(
        model, train, recipe, delta=training.delta_of(arguments, len(train))
    )

    right, f1 = scores(model, heldout, tags.index("O") if "O" in tags else None)
    words = heldout.columns["labels"][heldout.columns["labels"] != IGNORED]
    most = words.bincount().max().item() / len(words)
    report = {"held_out_accuracy": f"{right:.1%} of words (the most common tag: {most:.1%})"}
    if "O" in tags:
        report["held_out_F1"] = f"{f1:.3f}, of words with another tag than O"
    training.show(spent, **report, saved=training.save(model, tokenizer, arguments.out, heldout))


def main(argv: Sequence[str] | None = None) -> int:
    data = "token<TAB>tag lines, a blank line after each sentence"
    parser = training.options(__doc__, TrainingRecipe, "token-classification", data)
    parser.add_argument("--labels", help="the tags, by commas (default: those in --data)")
    return training.launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
