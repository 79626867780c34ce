"""The parts of the SST-2 study: a start from public text, what it says of reviews, and a head on that.

The private part is small on purpose. Noise grows with the number of parameters that are trained, and a
head of some thousand can be trained on every row in every step, a hundred times over, for the time that
one pass over all layers takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sst2_opinions import opinions
from support import recipes
from support.classification import start_as_mean_pooling
from support.data import Row
from support.progress import Progress
from support.recipes import RecipeError
from support.rows import Rows, trimmed
from support.texts import encode
from support.training import DEVICE, classes, load, on_device
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from dpzoo import heads

LABELS = ("negative", "positive")  # 0 and 1 of the files


@dataclass(frozen=True)
class Recipe:
    """What the study's runs need. configs/recipes/sst2-study.yaml says how the values were chosen.

    Args:
        model: a BERT whose states' mean represents a sentence.
        max_length: in tokens; the rest of a longer row is cut off.
        opinions: number of made-up sentences that the public start trains on, once.
        opinions_batch_size, opinions_learning_rate, opinions_head_learning_rate: of that AdamW.
        mean_layers: by commas, the layers whose states enter a row's features by their mean.
        first_layers: the same for the state of the first token.
        feature_norm: the norm of a row's features, which the head reads.
        prior: factor of the public start's own logits, which the head's are added to.
        epochs, batch_size: as in every recipe; the batch may be all rows.
        learning_rate, momentum: of the head's SGD without privacy and from epsilon 8 on; the rate is
            less in proportion to the root of a smaller epsilon. It falls linearly over the steps.
        max_grad_norm: C, the norm that a row's gradient is clipped to.
        averaged_share: the share of the steps, the last ones, whose weights are averaged.
        full_epochs, full_batch_size, full_learning_rate: of the run that trains every parameter.
    """

    model: str
    max_length: int
    opinions: int
    opinions_batch_size: int
    opinions_learning_rate: float
    opinions_head_learning_rate: float
    mean_layers: str
    first_layers: str
    feature_norm: float
    prior: float
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    max_grad_norm: float
    averaged_share: float
    full_epochs: int
    full_batch_size: int
    full_learning_rate: float

    def __post_init__(self) -> None:
        recipes.positive(self, zero=("prior", "momentum"))
        recipes.at_most(self, "averaged_share", 1)
        for name in ("mean_layers", "first_layers"):
            layers = getattr(self, name)
            if not all(part.strip().isdigit() for part in layers.split(",")):
                raise RecipeError(f"{name} is {layers!r}, wanted numbers by commas")

    def layers(self) -> tuple[list[int], list[int]]:
        """The numbers of the layers: of those of the means, and of those of the first tokens."""
        means, firsts = self.mean_layers.split(","), self.first_layers.split(",")
        return [int(part) for part in means], [int(part) for part in firsts]


def public_start(recipe: Recipe, seed: int) -> tuple[PreTrainedModel, Rows, object]:
    """A classifier that has seen made-up opinions only, these opinions, and its tokenizer."""
    model, tokenizer = load(recipe.model, "sequence-classification", **classes(LABELS))
    deepest = model.config.num_hidden_layers
    if max(layer for layers in recipe.layers() for layer in layers) > deepest:
        raise RecipeError(
            f"mean_layers and first_layers are {recipe.mean_layers} and {recipe.first_layers}, and the "
            f"model has {deepest}"
        )
    start_as_mean_pooling(model, 10)  # the scale of sst2-minilm.yaml
    head = list(model.classifier.parameters())
    for parameter in head:
        nn.init.zeros_(parameter)
    made = [Row(text, label, "") for text, label in opinions(recipe.opinions, seed)]
    rows = encode(made, tokenizer, recipe.max_length)
    loader = DataLoader(rows, batch_size=recipe.opinions_batch_size, shuffle=True)
    body = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": recipe.opinions_learning_rate},
            {"params": head, "lr": recipe.opinions_head_learning_rate},
        ]
    )
    steps = len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps)
    )
    model.train()
    with Progress("public start", steps) as progress:
        for batch in loader:
            outputs = model(**on_device(trimmed(batch)))
            optimizer.zero_grad()
            outputs.loss.backward()
            optimizer.step()
            schedule.step()
            progress.count(outputs.logits, batch["labels"].to(DEVICE))
            progress.step()
    return model, rows, tokenizer


@dataclass(frozen=True)
class Features:
    """What a frozen model says of rows: features (rows, width), its logits (rows, 2), labels (rows,)."""

    values: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.values, self.logits, self.labels)


@torch.no_grad()
def read_features(
    model: PreTrainedModel, rows: Rows, layers: tuple[list[int], list[int]]
) -> Features:
    """The mean states of some layers and the first token's of others, each of norm 1, side by side.

    Every row's features are a function of that row alone.
    """
    lengths = rows.columns["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)  # little padding; undone below
    ordered = Rows(**{name: column[order] for name, column in rows.columns.items()})
    values, logits = [], []
    for batch in DataLoader(ordered, batch_size=64):
        part = on_device(trimmed(batch))
        outputs = model.eval()(**part, output_hidden_states=True)
        mask = part["attention_mask"].unsqueeze(-1).to(outputs.logits.dtype)
        means = [(outputs.hidden_states[i] * mask).sum(1) / mask.sum(1) for i in layers[0]]
        states = [*means, *(outputs.hidden_states[i][:, 0] for i in layers[1])]
        values.append(torch.cat([normalize(state, dim=1) for state in states], dim=1).cpu())
        logits.append(outputs.logits.cpu())
    back = order.argsort()
    return Features(torch.cat(values)[back], torch.cat(logits)[back], rows.columns["labels"])


def centred(features: Features, centre: torch.Tensor, norm: float) -> Features:
    """The features without what all sentences share, (width,), which must come from public text."""
    values = norm * normalize(features.values - centre, dim=1)
    return Features(values, features.logits, features.labels)


class Head(nn.Module):
    """A linear correction of the public start's logits: it starts as the public start itself."""

    def __init__(self, width: int, prior: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(LABELS))
        self.prior = prior
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Features (rows, width) and the public start's logits (rows, 2) -> logits (rows, 2)."""
        return self.prior * logits + self.linear(values)


def train_head(
    features: Features, recipe: Recipe, epsilon: float | None, delta: float
) -> tuple[Head, heads.HeadRun]:
    """Train a head with DP-SGD, or (epsilon None) the same without clipping and noise."""
    head = Head(features.values.shape[1], recipe.prior)
    run = heads.fit_head(
        head,
        features.dataset(),
        epsilon=epsilon,
        delta=delta,
        epochs=recipe.epochs,
        batch_size=min(recipe.batch_size, len(features.labels)),
        learning_rate=recipe.learning_rate,
        momentum=recipe.momentum,
        max_grad_norm=recipe.max_grad_norm,
        averaged_share=recipe.averaged_share,
    )
    return head, run


@torch.no_grad()
def head_accuracy(head: Head, features: Features) -> float:
    guesses = head(features.values, features.logits).argmax(1)
    return (guesses == features.labels).float().mean().item()


def accuracy_of_start(features: Features) -> float:
    return (features.logits.argmax(1) == features.labels).float().mean().item()
