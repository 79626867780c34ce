"""The command line: ``dpzoo audit <hub id | folder>``.

The audit itself knows no family; what a class takes as a batch is known here, by its task.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpzoo.auditing import CHECKS, audit
from dpzoo.auditing.opacus_modes import MODES
from dpzoo.conversion import to_transformers
from dpzoo.errors import DpzooError, InputError
from dpzoo.pretrained import from_pretrained
from dpzoo.registry import CLASSES

ROWS, SEQ, CHOICES, LONGEST = 4, 12, 3, 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where a privacy or crash check failed, 2 where it could not run.
    """
    options = _parser().parse_args(arguments)
    try:
        return _audit(options)
    except (DpzooError, OSError) as error:
        sys.stderr.write(f"dpzoo: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpzoo", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("audit", help="prove that a model's private training is right")
    command.add_argument("model", help="a hub id or a folder with a checkpoint")
    command.add_argument("--task", help="dpzoo's name of the task; by default the checkpoint's")
    command.add_argument(
        "--stock", action="store_true", help="audit the stock transformers class instead"
    )
    command.add_argument(
        "--data", type=Path, help="rows of a TAB-separated file: text, and a class if there is one"
    )
    command.add_argument("--modes", default="hooks,ghost", help=f"of {','.join(MODES)}")
    command.add_argument("--checks", help=f"of {','.join(CHECKS)}; all by default")
    command.add_argument("--max-grad-norm", type=float, default=1.0)
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _audit(options: argparse.Namespace) -> int:
    _progress("loading")
    model: Any = from_pretrained(options.model, task=options.task)
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
        progress=_progress,
    )
    _progress("")
    sys.stdout.write((report.to_json() if options.json else str(report)) + "\n")
    return int(any(f.severity in ("privacy", "crash") for f in report.findings))


def _progress(text: str) -> None:
    """One line of standard error, where someone looks at it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text + ' ...' if text else ''}")
        sys.stderr.flush()


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


def example_batch(
    task: str, config: Any, texts: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A batch with labels for a task.

    Args:
        task: dpzoo's name of it.
        config: the model's.
        texts: ``input_ids`` and ``attention_mask``, (rows, seq), and perhaps ``class``, (rows,); by
            default random tokens in rows of different lengths.

    Returns:
        What the model's forward takes; rows have different numbers of labels.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, max(high, 1), shape, generator=generator)

    if texts is None:
        mask = torch.ones(ROWS, SEQ, dtype=torch.long)
        for i, row in enumerate(mask):
            row[SEQ - i :] = 0
        # Well past the special tokens of every vocabulary, where it is large enough.
        ids = config.vocab_size // 2 + draw(config.vocab_size // 2, ROWS, SEQ)
        ids[mask == 0] = config.pad_token_id or 0
        texts = {"input_ids": ids, "attention_mask": mask}
    ids, mask = texts["input_ids"], texts["attention_mask"]
    if task in ("multiple-choice", "double-heads"):
        ids, mask = (t[:, None].repeat(1, CHOICES, 1) for t in (ids, mask))
        ids[:, 1:, 1] = config.vocab_size // 2  # choices that differ
    rows, seq = len(ids), ids.shape[-1]
    batch = {"input_ids": ids, "attention_mask": mask}
    classes = texts.get("class")
    if task in ("masked-lm", "causal-lm", "pre-training", "double-heads"):
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "token-classification":
        labels = draw(config.num_labels, *ids.shape)
        batch["labels"] = labels.masked_fill(mask == 0, -100)
    elif task == "question-answering":
        batch["start_positions"] = draw(seq // 2, rows)
        batch["end_positions"] = seq // 2 + draw(seq // 4, rows)
    elif task == "multiple-choice":
        batch["labels"] = draw(CHOICES, rows)
    elif task in ("sequence-classification", "next-sentence-prediction"):
        count = 2 if task == "next-sentence-prediction" else config.num_labels
        if count == 1:
            batch["labels"] = torch.rand(rows, generator=generator)
        else:
            given = classes is not None and int(classes.max()) < count
            batch["labels"] = classes if given and classes is not None else draw(count, rows)
    if task == "pre-training":
        batch["next_sentence_label"] = draw(2, rows)
    if task == "double-heads":
        batch["mc_labels"] = draw(CHOICES, rows)
        batch["mc_token_ids"] = mask.sum(-1) - 1
    return batch


if __name__ == "__main__":
    sys.exit(main())
