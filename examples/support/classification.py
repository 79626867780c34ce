"""What every_parameter.py and distributed.py share: data, model, optimizer and options of a classifier."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig

import dpzoo
from support.data import Row, TextData, docs_data, tsv_data
from support.models import DROPOUTS, WHEEL
from support.progress import Progress
from support.recipes import RecipeError, add_options, at_most, one_of, positive


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run. configs/recipes/every-parameter.yaml says what each of them does."""

    max_length: int
    max_train_rows_per_label: int
    heldout_share: float
    epochs: int
    batch_size: int
    physical_batch_size: int
    learning_rate: float
    head_learning_rate: float
    warmup_share: float
    max_grad_norm: float
    epsilon: float
    pooling: str
    pooler_scale: float
    nonprivate_epochs: int
    nonprivate_batch_size: int
    nonprivate_learning_rate: float

    def __post_init__(self) -> None:
        positive(self)
        at_most(self, "heldout_share", 0.5)
        at_most(self, "warmup_share", 1)
        one_of(self, "pooling", ("mean", "checkpoint"))


def load_model(
    name: str, label_names: Sequence[str], recipe: Recipe
) -> transformers.PreTrainedModel:
    """Load a pretrained model with a new classification head, ready for per-sample gradients."""
    config = AutoConfig.from_pretrained(name)
    model = dpzoo.from_pretrained(
        name,
        task="sequence-classification",
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={label: i for i, label in enumerate(label_names)},
        # Training on clipped gradients and noise overfits little, and dropout adds to the noise.
        **{key: 0.0 for key in DROPOUTS if hasattr(config, key)},
    )
    if recipe.pooling == "mean":
        start_as_mean_pooling(model, recipe.pooler_scale)
    return model


@torch.no_grad()
def start_as_mean_pooling(model: transformers.PreTrainedModel, scale: float) -> None:
    """Let a BERT classifier start from an average over the tokens; needs no data.

    BERT classifies from the first token's state. Sentence encoders such as MiniLM were trained on the
    average of all tokens' states, and their pooler never. With the queries of the last layer at zero its
    attention weighs all tokens alike, and a pooler of `scale` times the identity passes the result on
    to the head. All of it is trained from there.

    Why scale: a row's gradient is clipped as a whole, over all layers. The head's part of it grows with
    the pooled state, so that a scale above 1 leaves the head, which has the most to learn, more of it.
    """
    if not isinstance(model, dpzoo.BertForSequenceClassification):
        raise RecipeError(
            f"pooling is mean, which is written for BERT, and the model is a {type(model).__name__}; "
            "use --pooling checkpoint"
        )
    query = model.bert.encoder.layer[-1].attention.self.query
    pooler = model.bert.pooler.dense
    for parameter in (query.weight, query.bias, pooler.bias):
        parameter.zero_()
    pooler.weight.copy_(scale * torch.eye(*pooler.weight.shape))


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> TensorDataset:
    """Token ids (rows, max_length), attention mask (rows, max_length; 1 is a token), labels (rows,).

    The rows are sorted by length. Poisson sampling draws every row independently of its place, so the
    order says nothing about who is in a batch; but neighbours end up in the same physical batch, which
    is then cut to its longest row, and little is spent on padding.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    encoded = tokenizer(
        [row.text for row in rows],
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    order = encoded["attention_mask"].sum(1).argsort(stable=True)
    labels = torch.tensor([row.label for row in rows])
    return TensorDataset(
        encoded["input_ids"][order], encoded["attention_mask"][order], labels[order]
    )


def collate(rows: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Stack rows and cut off the columns that are padding in all of them."""
    ids, mask, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest], labels


def make_optimizer(
    model: nn.Module, learning_rate: float, head_learning_rate: float, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over all parameters, and its schedule: a linear rise, then a linear fall to zero."""
    head, body = [], []
    for name, parameter in model.named_parameters():
        (head if name.startswith(("classifier", "score")) else body).append(parameter)
    optimizer = torch.optim.Adam(
        [{"params": body, "lr": learning_rate}, {"params": head, "lr": head_learning_rate}]
    )
    warmup = max(1, round(recipe.warmup_share * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
    )
    return optimizer, schedule


def train_without_privacy(model: nn.Module, data: TensorDataset, recipe: Recipe) -> None:
    """The same model, data and schedule with plain Adam, for comparison."""
    loader = DataLoader(
        data, batch_size=recipe.nonprivate_batch_size, shuffle=True, collate_fn=collate
    )
    steps = recipe.nonprivate_epochs * len(loader)
    rate = recipe.nonprivate_learning_rate
    optimizer, schedule = make_optimizer(model, rate, rate, recipe, steps)
    model.train()
    with Progress("not private", steps) as progress:
        for _ in range(recipe.nonprivate_epochs):
            for ids, mask, labels in loader:
                optimizer.zero_grad()
                logits = model(input_ids=ids, attention_mask=mask).logits
                nn.functional.cross_entropy(logits, labels).backward()
                optimizer.step()
                schedule.step()
                progress.count(logits, labels)
                progress.step()


@torch.inference_mode()
def predict(model: nn.Module, data: TensorDataset) -> torch.Tensor:
    """Logits (rows, labels) in eval mode."""
    model.eval()
    batches = DataLoader(data, batch_size=64, collate_fn=collate)
    return torch.cat([model(input_ids=i, attention_mask=m).logits for i, m, _ in batches])


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    return (predict(model, data).argmax(1) == data.tensors[2]).float().mean().item()


def options(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with what both scripts take; `out` is where the model is saved by default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"a model id or folder (default: all-MiniLM-L6-v2 out of {WHEEL})")
    add("--data", type=Path, metavar="FILE.tsv", help="train on lines of text<TAB>label instead")
    add("--eval", type=Path, metavar="FILE.tsv", help="held-out lines for --data")
    add("--labels", help="the labels of --data, by commas (default: those that occur in it)")
    add("--delta", type=float, help="target delta (default: 1 / number of training rows)")
    add("--mode", choices=("bk", "ghost", "hooks"), default="bk", help="how rows are clipped")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(out), help="where the model is saved")
    add_options(parser, Recipe, "every-parameter")
    return parser


def read_data(arguments: argparse.Namespace, recipe: Recipe) -> TextData:
    """The rows of --data, or the documentation of Python's library.

    Raises:
        DataError: see `support.data.tsv_data`.
        RecipeError: --eval or --labels without --data.
    """
    if arguments.data is not None:
        return tsv_data(
            arguments.data,
            arguments.eval,
            label_names=arguments.labels.split(",") if arguments.labels else None,
            seed=arguments.seed,
            heldout_share=recipe.heldout_share,
        )
    if arguments.eval or arguments.labels:
        raise RecipeError("--eval and --labels go with --data")
    return docs_data(
        seed=arguments.seed,
        heldout_share=recipe.heldout_share,
        max_train_rows_per_label=recipe.max_train_rows_per_label,
    )


def delta_of(arguments: argparse.Namespace, rows: int) -> float:
    """--delta, or 1 / rows.

    Raises:
        RecipeError: delta would allow some row to be published as it is.
    """
    delta = 1 / rows if arguments.delta is None else arguments.delta
    if not 0 < delta <= 1 / rows:
        raise RecipeError(
            f"--delta is {delta:g}, wanted a number above 0 and at most 1 / {rows} (the training "
            "rows): a larger one would allow some row to be published as it is"
        )
    return float(delta)
