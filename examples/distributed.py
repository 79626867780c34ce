"""Fine-tune a classifier with differential privacy in several processes, on one machine or on many.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py
    torchrun --standalone --nproc-per-node 8 examples/distributed.py --model bert-base-uncased --mode hooks
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first.machine:29500 \\
        examples/distributed.py --data train.tsv --eval dev.tsv      # the same line on both machines

A process has a GPU of its own where there are GPUs (NCCL), and the CPU elsewhere (Gloo). Model, data and
recipe are every_parameter.py's, and so are the options, apart from --compare; the batch size is that of all
processes together. The result is the same as with one process: each rank draws from its own share of
the rows, clips the gradients of what it drew, and the ranks add them up; the noise is added once, on
rank 0.

The privacy statement at the end covers what every_parameter.py's covers. It assumes that nobody else knows
the seed: who knows it can draw the same noise and take it off the weights again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from opacus import PrivacyEngine
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.utils.batch_memory_manager import BatchMemoryManager
from support import classification as every_parameter
from support.classification import Recipe, collate, encode
from support.data import DataError
from support.models import WHEEL, PrivacySpent, minilm_folder
from support.progress import Progress
from support.recipes import RecipeError, read
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

import dpzoo


def start_processes() -> torch.device:
    """Join the processes that torchrun started. Returns the device of this one."""
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError(
            "this script is one of several processes, and torchrun starts them:\n"
            "    torchrun --standalone --nproc-per-node 2 examples/distributed.py"
        )
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl")
    return device


def train_privately(
    model: nn.Module,
    data: TensorDataset,
    recipe: Recipe,
    *,
    delta: float,
    mode: str,
    device: torch.device,
) -> PrivacySpent:
    """Train all parameters of `model` in place, on all ranks; they end with equal parameters."""
    loader = DataLoader(data, batch_size=min(recipe.batch_size, len(data)), collate_fn=collate)
    steps = recipe.epochs * len(loader)
    inner_optimizer, schedule = every_parameter.make_optimizer(
        model, recipe.learning_rate, recipe.head_learning_rate, recipe, steps
    )
    engine = PrivacyEngine()
    criterion = nn.CrossEntropyLoss()
    # Brings rank 0's parameters to all ranks, and tells the engine that there are several. The engine
    # then gives the loader a Poisson sampler that knows its rank's share of the rows.
    replica = DifferentiallyPrivateDistributedDataParallel(model.train())
    private = engine.make_private_with_epsilon(
        module=replica,
        optimizer=inner_optimizer,
        criterion=criterion,
        data_loader=loader,
        target_epsilon=recipe.epsilon,
        target_delta=delta,
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        grad_sample_mode=mode,
    )
    if mode == "ghost":
        wrapped, optimizer, criterion, loader = private
    else:
        wrapped, optimizer, loader = private
    # A rank that draws no row takes part in the step all the same, or the ranks would fall out of step.
    loader = dpzoo.prime_empty_batches(loader)

    with contextlib.ExitStack() as stack:
        progress = None
        if distributed.get_rank() == 0:
            title = f"private, rank 0 of {distributed.get_world_size()}"
            progress = stack.enter_context(Progress(title, steps, recipe.epsilon))

        def after_step(*_: object) -> None:
            schedule.step()
            if progress is not None:
                progress.step(lambda: engine.get_epsilon(delta))

        # Of the optimizer within: Opacus' calls it where a logical batch ends.
        hook = inner_optimizer.register_step_post_hook(after_step)
        for _ in range(recipe.epochs):
            # How many physical batches its part of a logical batch takes is each rank's own affair.
            with BatchMemoryManager(
                data_loader=loader,
                max_physical_batch_size=recipe.physical_batch_size,
                optimizer=optimizer,
            ) as batches:
                for batch in batches:
                    ids, mask, labels = (tensor.to(device) for tensor in batch)
                    optimizer.zero_grad()
                    logits = wrapped(input_ids=ids, attention_mask=mask).logits
                    criterion(logits, labels).backward()
                    optimizer.step()
                    if progress is not None:
                        progress.count(logits, labels)
        hook.remove()
    wrapped.to_standard_module()  # takes Opacus' hooks off `model`
    done = sum(entry[2] for entry in engine.accountant.history)
    noise = float(optimizer.noise_multiplier)
    return PrivacySpent(engine.get_epsilon(delta), delta, noise, 1 / len(loader), done)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="every-parameter", help="a name under configs/recipes, or a .yaml file")
    add(
        "--model",
        help=f"a model id or folder (default: all-MiniLM-L6-v2 out of {WHEEL})",
    )
    add("--data", type=Path, metavar="FILE.tsv", help="train on lines of text<TAB>label instead")
    add("--eval", type=Path, metavar="FILE.tsv", help="held-out lines for --data")
    add("--labels", help="the labels of --data, by commas (default: those that occur in it)")
    add("--delta", type=float, help="target delta (default: 1 / number of training rows)")
    add("--mode", choices=("ghost", "hooks"), default="ghost", help="how Opacus clips")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("distributed-model"), help="where the model is saved")
    overrides = parser.add_argument_group("overrides of the recipe")
    for field in fields(Recipe):
        overrides.add_argument(f"--{field.name.replace('_', '-')}", metavar=field.type)
    arguments = parser.parse_args(argv)
    if arguments.data is None and (arguments.eval or arguments.labels):
        parser.error("--eval and --labels go with --data")
    return arguments


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    began = time.monotonic()
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    given = {field.name: getattr(arguments, field.name) for field in fields(Recipe)}
    recipe = read(Recipe, arguments.recipe, {k: v for k, v in given.items() if v is not None})
    # The same on all ranks: who holds which rows is the sampler's business.
    data = every_parameter.read_data(arguments, recipe)
    name = str(arguments.model or minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(name)
    train = encode(data.train, tokenizer, recipe.max_length)
    delta = 1 / len(train) if arguments.delta is None else arguments.delta
    if not 0 < delta <= 1 / len(train):
        raise RecipeError(
            f"--delta is {delta:g}, wanted a number above 0 and at most 1 / {len(train)} (the training "
            "rows): a larger one would allow some row to be published as it is"
        )
    torch.manual_seed(arguments.seed)
    model = every_parameter.load_model(name, data.label_names, recipe).to(device)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if rank == 0:
        print(f"data: {data.name}: {len(train)} rows to train on, {len(data.heldout)} held out")
        print(
            f"model: {type(model).__name__} from {name}, in {processes} processes on {device.type}"
        )
        print("Loss and accuracy on the way are those of rank 0's training rows: NOT private.")

    # From here on every rank draws for itself: with one seed on all of them, whether a row is drawn
    # would tell whether certain rows of the other ranks are, and the accountant takes them to be
    # independent.
    torch.manual_seed(arguments.seed + 1 + rank)
    spent = train_privately(model, train, recipe, delta=delta, mode=arguments.mode, device=device)
    if rank:
        return

    model = model.cpu()
    heldout = encode(data.heldout, tokenizer, recipe.max_length)
    score = every_parameter.accuracy(model, heldout)
    model.save_pretrained(arguments.out)  # a stock checkpoint: transformers loads it as it is
    tokenizer.save_pretrained(arguments.out)
    report = {
        "held-out accuracy": f"{score:.1%}",
        "privacy": f"epsilon {spent.epsilon:.2f} at delta {spent.delta:.2e}, add or remove one row",
        "noise multiplier": f"{spent.noise_multiplier:.3f}, clipping norm {recipe.max_grad_norm:g}",
        "steps": f"{spent.steps}, each row in a batch with probability {spent.sample_rate:.4f}",
        "saved": str(arguments.out),
        "time": f"{time.monotonic() - began:.0f} s",
    }
    print()
    for title, text in report.items():
        print(f"{title:<18} {text}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # As in every_parameter.py: what is left of these says nothing about this run.
    warnings.filterwarnings("ignore", module="opacus")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        device = start_processes()
        try:
            run(arguments, device)
        finally:
            distributed.destroy_process_group()
    except (DataError, RecipeError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
