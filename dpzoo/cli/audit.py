"""``dpzoo audit``: prove that a model's private training is right.

The audit itself knows no family; what a class takes as a batch is known by its task.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from dpzoo.auditing import CHECKS, audit
from dpzoo.checkpoints import load
from dpzoo.cli.output import print_json, progress
from dpzoo.conversion import to_transformers
from dpzoo.errors import InputError
from dpzoo.example_batch import ROWS, example_batch
from dpzoo.modes import MODES
from dpzoo.registry import CLASSES

LONGEST = 32

EPILOG = """\
exit status:
  0  every check passed, or what it found is no privacy and no crash matter
  1  a privacy or crash check failed
  2  the audit could not run

examples:
  dpzoo audit bert-base-uncased --task sequence-classification
  dpzoo audit bert-base-uncased --stock          what is wrong with the class as transformers has it
  dpzoo audit ./checkpoint --data rows.tsv       rows of your own, through the checkpoint's tokenizer
  dpzoo audit ./checkpoint --checks coverage,exactness --modes ghost --json
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "audit",
        help="prove that a model's private training is right",
        description="Check a model's per-sample gradients, norms, isolation, noise and more.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="a hub id or a folder with a checkpoint")
    command.add_argument("--task", help="dpzoo's name of the task; by default the checkpoint's")
    command.add_argument(
        "--stock", action="store_true", help="audit the stock transformers class instead"
    )
    command.add_argument(
        "--data", type=Path, help="rows of a TAB-separated file: text, and a class if there is one"
    )
    command.add_argument(
        "--modes", default="hooks,ghost", help=f"of {','.join(MODES)}; hooks,ghost by default"
    )
    command.add_argument("--checks", help=f"of {','.join(CHECKS)}; all by default")
    command.add_argument("--max-grad-norm", type=float, default=1.0, help="the clipping norm C")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit, print the report; 1 if a privacy or crash check failed."""
    with progress() as say:
        say("loading")
        model: Any = load(options.model, options.task)
        task = next(task for (_, task), cls in CLASSES.items() if isinstance(model, cls))
        batch = example_batch(task, model.config, _texts(options))
        if options.stock:
            model = to_transformers(model)
        report = audit(
            model,
            batch,
            max_grad_norm=options.max_grad_norm,
            modes=options.modes.split(","),
            checks=options.checks.split(",") if options.checks else None,
            progress=say,
        )
    if options.json:
        print_json(report.to_dict())
    else:
        sys.stdout.write(f"{report}\n")
    return int(any(f.severity in ("privacy", "crash") for f in report.findings))


def _texts(options: argparse.Namespace) -> dict[str, torch.Tensor] | None:
    """The first rows of the data file, tokenized; None without one."""
    if options.data is None:
        return None
    from transformers import AutoTokenizer

    lines = [line for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < ROWS:
        raise InputError(f"{options.data} has {len(lines)} rows, wanted at least {ROWS}.")
    cells = [line.split("\t") for line in lines[:ROWS]]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        [cell[0] for cell in cells],
        padding=True,
        truncation=True,
        max_length=LONGEST,
        return_tensors="pt",
    )
    inputs: dict[str, torch.Tensor] = dict(encoded)
    if all(len(cell) > 1 and cell[1].strip().isdigit() for cell in cells):
        inputs["class"] = torch.tensor([int(cell[1]) for cell in cells])
    return inputs
