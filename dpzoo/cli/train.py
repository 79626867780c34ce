"""``dpzoo train``: from a file of private text to a model, its epsilon, and the card that says so."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import fields, make_dataclass
from typing import Annotated, Any, Literal

from typer import Argument, Option

from dpzoo.errors import InputError
from dpzoo.training import Recipe, train
from dpzoo.training.data import TASKS
from dpzoo.training.recipe import TRAINABLE, written

_WHAT = "Train a model on the rows of a file with differential privacy, and say what it cost."
EPILOG = """\
Printed before training: what was guessed of the file, what is trained and why,
and the plan: noise, steps, sample rate, delta, signal against noise, time and
memory. --dry-run stops there.

OUT is a stock checkpoint with a privacy card (README.md, privacy.json); it may
be published. OUT.run has checkpoints, losses and the keys of the noise, and may
not.

exit status:
  0  the model was saved; or, with --dry-run, planned
  1  the model was saved, and its canaries show more than the accounted epsilon:
     the largest of their bounds, which the card has, is above it
  2  it could not run: the file, its columns, the model, an option; nothing was
     released

examples:
  dpzoo train reviews.tsv --epsilon 3             the label's column is found
  dpzoo train reviews.tsv --epsilon 3 --dry-run   only the plan
  dpzoo train notes.jsonl --task language-modelling --out writer
  dpzoo train rows.csv --text body --label topic --train lora
  dpzoo train rows.csv --out topics --resume      after a kill
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
    "canaries": "rows more, by which the run bounds its own epsilon from below",
    "seed": "of the split and of new weights; not of the noise",
}
_KINDS: dict[str, Any] = {"int": int, "float": float, "str": str}
_OPTIONS: dict[str, Any] = {
    "dry_run": Annotated[bool, Option("--dry-run", help="stop after the plan")],
    "resume": Annotated[bool, Option("--resume", help="go on with the run in OUT.run")],
    "task": Annotated[Literal[TASKS] | None, Option(help="by default guessed, and said")],
    "trainable": Annotated[Literal[TRAINABLE] | None, Option("--train", help="chosen, and said")],
    "header": Annotated[bool | None, Option(help="by default guessed")],
    "statistics": Annotated[bool, Option("--statistics", help="keep rows' norms (not private)")],
}
for _field in fields(Recipe)[1:]:
    if _field.name in _HELP:
        _kind = _KINDS[str(_field.type).split(" ")[0]]
        _OPTIONS[_field.name] = Annotated[_kind | None, Option(help=_HELP[_field.name])]
Options = make_dataclass(
    "Options",
    [
        ("data", Annotated[str, Argument(metavar="FILE", help=_HELP["data"])]),
        *((name, kind, None) for name, kind in _OPTIONS.items()),
    ],
    namespace={"__module__": __name__, "__doc__": _WHAT},
)


def run(options: Any) -> int:
    """Train, and tell on standard output."""
    import transformers

    try:
        import dpzoo.integrations  # noqa: F401
    except ImportError as error:  # without accelerate
        raise InputError(str(error)) from None
    given = {
        f.name: v
        for f in fields(Recipe)
        if (v := getattr(options, f.name)) is not None and v is not False  # 0 is a value
    }
    if options.header is False:
        given["header"] = False
    if options.data.endswith((".yaml", ".yml")):
        given = {**written(options.data), **{k: v for k, v in given.items() if k != "data"}}
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # "new head, train it": we do

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="opacus")  # how it searches for the noise
        run = train(given, dry_run=bool(options.dry_run), resume=bool(options.resume), say=say)
    return int(run.audit is not None and not run.audit.ok)
