"""``dpzoo train``: from a file of private text to a model, its epsilon, and the card that says so."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from dataclasses import fields
from typing import Any

from dpzoo.errors import InputError
from dpzoo.training import Recipe, train
from dpzoo.training.data import TASKS
from dpzoo.training.recipe import TRAINABLE

EPILOG = """\
Printed before training: what was guessed of the file, what is trained and why, and the plan: noise, steps,
sample rate, delta, signal against noise, time and memory. --dry-run stops there.

OUT is a stock checkpoint with a privacy card (README.md, privacy.json); it may be published. OUT.run has
checkpoints, losses and the keys of the noise, and may not.

exit status:
  0  the model was saved; or, with --dry-run, planned
  2  it could not run: the file, its columns, the model, an option; nothing was released

examples:
  dpzoo train reviews.tsv --epsilon 3                    a classifier; the label's column is found
  dpzoo train reviews.tsv --epsilon 3 --dry-run          only the plan
  dpzoo train notes.jsonl --task language-modelling --model distilbert/distilgpt2 --out writer
  dpzoo train rows.csv --text body --label topic --train lora --model roberta-base
  dpzoo train rows.csv --out topics --resume             after a kill
"""
_HELP = {
    "data": "training rows: .tsv, .csv, .jsonl, .parquet, or a folder of datasets; or a recipe (.yaml)",
    "out": "folder of the model (private-model)",
    "eval": "held-out rows; by default a tenth of the rows",
    "model": "hub id, folder, or a config.json for a model from scratch",
    "text": "column with the text",
    "label": "column with the class",
    "prompt": "column that the text answers",
    "labels": "all classes, by commas; by default those that occur",
    "unit": "column that says whose a row is; by default the unit is the row",
    "max_rows_per_unit": "of a unit with more rows, a step takes so many",
    "epsilon": "to end with, at most (8)",
    "delta": "at most 1 / rows, the default",
    "epochs": "expected number of times that a row is drawn",
    "batch_size": "expected rows of a logical batch",
    "physical_batch_size": "rows in memory at a time",
    "learning_rate": "the first one",
    "clipping_norm": "C, the norm that a row's gradient is clipped to",
    "max_length": "tokens kept of a row",
    "lora_rank": "of the adapters (8)",
    "heldout_share": "of the rows, without --eval (0.1)",
    "seed": "of the split and of new weights; not of the noise",
}
_OWN = ("task", "trainable", "header", "statistics", "data")


def add_parser(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "train",
        help="train a model on private text",
        description="Train a model on the rows of a file with differential privacy, and say what it cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("data", metavar="FILE", help=_HELP["data"])
    command.add_argument("--dry-run", action="store_true", help="stop after the plan")
    command.add_argument("--resume", action="store_true", help="go on with the run in OUT.run")
    command.add_argument("--task", choices=TASKS, help="by default guessed, and said")
    command.add_argument(
        "--train", dest="trainable", choices=TRAINABLE, help="chosen, and said why"
    )
    command.add_argument(
        "--header", action=argparse.BooleanOptionalAction, help="by default guessed"
    )
    command.add_argument(
        "--statistics", action="store_true", help="keep rows' norms in OUT.run (not private)"
    )
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str}
    for field in fields(Recipe):
        if field.name not in _OWN:
            kind = str(field.type).split(" ")[0]
            option = f"--{field.name.replace('_', '-')}"
            command.add_argument(option, type=kinds[kind], help=_HELP[field.name])
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, and tell on standard output."""
    import transformers

    try:
        import dpzoo.integrations  # noqa: F401
    except ImportError as error:  # without accelerate
        raise InputError(str(error)) from None
    given = {
        f.name: v for f in fields(Recipe) if (v := getattr(options, f.name)) not in (None, False)
    }
    if options.header is False:
        given["header"] = False
    if options.data.endswith((".yaml", ".yml")):
        given = {
            **Recipe.of(options.data).given(),
            **{k: v for k, v in given.items() if k != "data"},
        }
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # "new head, train it": we do

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="opacus")  # how it searches for the noise
        train(given, dry_run=options.dry_run, resume=options.resume, say=say)
    return 0
