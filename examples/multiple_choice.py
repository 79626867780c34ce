"""Choose among continuations with differential privacy.

    python examples/multiple_choice.py --data train.tsv --eval dev.tsv --out chooser

A line holds context<TAB>choice<TAB>...<TAB>choice<TAB>answer, with equally many choices in all lines; the
answer is the index of the right one, counted from 0. A line with all its choices is one row, and one unit
of privacy: in a stock model the choices become rows of the batch, and then a line could contribute as many
times the clipping norm as it has choices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.data import DataError, read_lines
from support.recipes import TrainingRecipe, from_options
from support.rows import Rows, hold_out
from support.texts import accuracy
from support.training import delta_of, launch, load, options, save, show, train_privately


@dataclass(frozen=True)
class Question:
    context: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, choices: int | None = None) -> list[Question]:
    """Questions in the order of the file, each with `choices` choices (None: as many as the first).

    Raises:
        DataError: the file cannot be read, or a line does not fit; names the line.
    """
    questions = []
    for number, line in enumerate(read_lines(path), 1):
        fields = [field.strip() for field in line.split("\t")]
        choices = len(fields) - 2 if choices is None else choices
        if choices < 2 or len(fields) != choices + 2 or not all(fields):
            raise DataError(
                f"{path}, line {number}: {len(fields)} field(s), some perhaps empty, wanted "
                f"{max(choices, 2) + 2}: context<TAB>{max(choices, 2)} choices<TAB>answer"
            )
        if fields[-1] not in map(str, range(choices)):
            raise DataError(
                f"{path}, line {number}: the answer is {fields[-1]!r}, wanted 0 to {choices - 1}"
            )
        questions.append(Question(fields[0], tuple(fields[1:-1]), int(fields[-1])))
    return questions


def encode(questions: Sequence[Question], tokenizer: Any, length: int) -> Rows:
    """Each column (rows, choices, length) but the labels, (rows,)."""
    choices = len(questions[0].choices)
    encoded = tokenizer(
        [question.context for question in questions for _ in range(choices)],
        [choice for question in questions for choice in question.choices],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    columns = {name: column.unflatten(0, (-1, choices)) for name, column in encoded.items()}
    return Rows(**columns, labels=torch.tensor([question.answer for question in questions]))


def run(arguments: argparse.Namespace) -> None:
    recipe = from_options(TrainingRecipe, arguments)
    questions = read_questions(arguments.data)
    choices = len(questions[0].choices)
    if arguments.eval:
        held = read_questions(arguments.eval, choices)
    else:
        questions, held = hold_out(
            questions, lambda q: q.context, recipe.heldout_share, arguments.seed, arguments.data
        )
    model, tokenizer = load(recipe.model, "multiple-choice")
    train = encode(questions[: arguments.rows], tokenizer, recipe.max_length)
    heldout = encode(held, tokenizer, recipe.max_length)
    print(f"{len(train)} questions to train on, {len(heldout)} held out, {choices} choices each")
    spent = train_privately(model, train, recipe, delta=delta_of(arguments, len(train)))
    show(
        spent,
        held_out_accuracy=f"{accuracy(model, heldout):.1%} (by chance: {1 / choices:.1%})",
        saved=save(model, tokenizer, arguments.out, heldout),
    )


def main(argv: Sequence[str] | None = None) -> int:
    data = "lines of context<TAB>choices, by tabs<TAB>index of the answer, from 0"
    return launch(run, options(__doc__, TrainingRecipe, "multiple-choice", data), argv)


if __name__ == "__main__":
    sys.exit(main())
