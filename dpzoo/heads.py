"""A private head on a frozen encoder: the sure way where rows are few.

    norm = pool_by_mean(model)  # BERT and RoBERTa: read every token, not the first alone
    values = read_features(model, tokenizer, texts)  # once
    run = train_head(model, values, labels, epsilon=8, delta=1e-5, feature_norm=norm)
    model.save_pretrained("out")  # a stock checkpoint, for `pipeline` as it is

`model` is a stock transformers classifier or one of dpzoo's. Its features are what its own last linear
layer reads, and the head is that layer: nothing has to be exported, and logits are equal by construction.

What is private: the encoder is frozen, in eval mode and deterministic, so the features of a row are a
function of that row alone (up to the rounding that padding brings), and nothing else of the model depends
on the rows. The mechanism is DP-SGD on a linear layer, with Poisson sampling, whose data set is the rows of
features. The guarantee covers the weights, for adding or removing one row. It does not cover the features,
nor what you choose by looking at the rows: learning rate, maximum length, the set of labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpzoo.clipping import PrivacyEngine
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.losses import IGNORE_INDEX, RowLosses

_OUTPUTS = ("classifier.out_proj", "classifier", "score")
_POOLED = {  # model type -> its layers, and the dense layer between the first token and the head
    "bert": ("bert.encoder.layer", "bert.pooler.dense"),
    "roberta": ("roberta.encoder.layer", "classifier.dense"),
}
_MEAN_WEIGHT = 1000.0
"""Weight of the mean beside the residual, the first token's state, in the layer that pools."""
_POOLER_WEIGHT = 0.1
"""Weight of the pooler: its tanh is then close to linear."""


@dataclass(frozen=True)
class HeadRun:
    """What training a head has spent.

    Attributes:
        epsilon: spent at `delta` for adding or removing one row; None without privacy.
        delta: of the guarantee; None without privacy.
        noise_multiplier: of every step, in units of the clipping norm; None without privacy.
        sample_rate: probability of each row to be in a step.
        steps: number of steps.
    """

    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    sample_rate: float
    steps: int


def output_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer of a sequence classifier, and its path.

    Raises:
        UnsupportedModelError: there is none under the names that transformers has for it.
    """
    for path in _OUTPUTS:
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return path, layer
    raise UnsupportedModelError(
        f"{type(model).__name__} has no linear layer at {', '.join(_OUTPUTS)}; wanted a sequence "
        f"classifier, as AutoModelForSequenceClassification loads it."
    )


@torch.no_grad()
def pool_by_mean(model: Any) -> float:
    """Let a BERT or RoBERTa classifier read the mean of all tokens; changes `model`, needs no data.

    These classify from the first token's state. Sentence encoders such as MiniLM were trained on the mean
    of all tokens', and the pooler is often untrained. The model gets one layer more, an ordinary one of its
    architecture: queries and keys of zero, so that its attention weighs all tokens alike; values and their
    projection that pass them on, times 1000, beside which the residual is nothing; a feed-forward part of
    zero. Its LayerNorm has weight 1 and bias 0, and the pooler becomes a tenth of the identity. The head
    then reads tanh(x / 10), close to x / 10, where x is the mean brought to mean 0 and variance 1: equally
    long for all rows.

    Args:
        model: a BERT or RoBERTa ForSequenceClassification, of transformers or of dpzoo.

    Returns:
        The norm of what the head reads, for `train_head`: a tenth of the root of the width.

    Raises:
        UnsupportedModelError: it is of another model type, or has no pooler.
    """
    kind = str(getattr(model.config, "model_type", None))
    try:
        layers, dense = (model.get_submodule(path) for path in _POOLED[kind])
    except (KeyError, AttributeError):
        raise UnsupportedModelError(
            f"pool_by_mean got a {type(model).__name__} (model type {kind!r}), wanted a sequence "
            f"classifier of: {', '.join(_POOLED)}. Train the head without it."
        ) from None
    layer = copy.deepcopy(layers[-1])
    for parameter in (*layer.parameters(), *dense.parameters()):
        parameter.zero_()
    for linear, weight in (
        (layer.attention.self.value, 1.0),
        (layer.attention.output.dense, _MEAN_WEIGHT),
        (dense, _POOLER_WEIGHT),
    ):
        linear.weight.fill_diagonal_(weight)
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1.0)
    layers.append(layer)
    model.config.num_hidden_layers += 1
    return _POOLER_WEIGHT * math.sqrt(dense.out_features)


@torch.no_grad()
def read_features(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """What the last layer of a classifier reads of each text.

    Args:
        model: a sequence classifier; runs in eval mode, and is left in the mode it was in.
        tokenizer: of the same checkpoint, with a padding token.
        texts: one for each row.
        max_length: in tokens; the rest of a longer text is cut off. Not to be read off the rows.
        batch_size: texts in memory at a time, of similar length. Changes time and memory, not the result.
        progress: called after each batch with the characters read so far, and all.

    Returns:
        (rows, width) float32 on the CPU, in the order of the texts.

    Raises:
        UnsupportedModelError: see `output_layer`.
        InputError: there are no texts.

    Guarantees:
        A row of the result depends on that text alone, up to rounding.
    """
    if not texts:
        raise InputError("read_features got 0 texts, wanted at least one.")
    path, layer = output_layer(model)
    training = model.training
    texts = filled(tokenizer, texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    done, total = 0, sum(map(len, texts))
    model.set_submodule(path, nn.Identity())  # "logits" are then what it would have read
    try:
        model.eval()
        for start in range(0, len(order), batch_size):
            batch = tokenizer(
                [texts[i] for i in order[start : start + batch_size]],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(layer.weight.device)
            parts.append(model(**batch).logits.float().cpu())
            if progress is not None:
                done += sum(len(texts[i]) for i in order[start : start + batch_size])
                progress(done, total)
    finally:
        model.set_submodule(path, layer)
        model.train(training)
    values = torch.cat(parts)
    return torch.empty_like(values).index_copy_(0, torch.tensor(order), values)


def filled(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Texts of at least one token: where a tokenizer makes none of the empty text, it is the end token."""
    if tokenizer("")["input_ids"]:
        return list(texts)
    return [text or tokenizer.eos_token or tokenizer.pad_token for text in texts]


def train_head(
    model: nn.Module,
    values: torch.Tensor,
    labels: torch.Tensor,
    *,
    epsilon: float | None,
    delta: float | None = None,
    epochs: int = 50,
    batch_size: int | None = None,
    learning_rate: float = 8.0,
    momentum: float = 0.9,
    max_grad_norm: float = 0.5,
    feature_norm: float | None = None,
    accountant: str = "prv",
    progress: Callable[[int, int, float], None] | None = None,
    canaries: Any = None,
) -> HeadRun:
    """Train the last layer of a classifier from zero, in place, on features.

    Everything else stays as it is. DP-SGD in book-keeping mode: Poisson sampling, flat clipping, a rate
    that falls linearly to 0, and at the end the mean of the weights of the last half of the steps, which
    costs no privacy. The features are divided by their usual norm, a public number, so that the same rates
    serve all models.

    Args:
        model: the classifier that the features were read from.
        values: (rows, width), from `read_features`.
        labels: (rows,) int64, from 0 to the model's number of labels less 1.
        epsilon: what the run may spend; None trains without clipping and noise, for comparison.
        delta: of the guarantee; at most 1 / rows is usual. None only without privacy.
        epochs: expected number of times that a row is drawn.
        batch_size: expected rows of a step (default: half of them). Large ones are better here.
        learning_rate: the first one, without privacy and from epsilon 8 on; times the root of epsilon / 8
            below that, where the noise is larger.
        momentum: of SGD.
        max_grad_norm: C, the norm that a row's gradient (of the divided features) is clipped to.
        feature_norm: what the features are divided by: their usual norm, from public knowledge. By default
            the root of the width, for entries of about 1; `pool_by_mean` returns that of its own.
        accountant: "prv" or "rdp".
        progress: called after each step with the steps taken, all steps, and the loss (not private).
        canaries: `dpzoo.GradientCanaries`, rows beside those of ``values``: they count.

    Returns:
        What was spent.

    Raises:
        UnsupportedModelError: see `output_layer`.
        InputError: shapes, labels, epsilon or delta do not fit.

    Guarantees:
        (epsilon, delta) of the returned run for the weights, for adding or removing one row.
    """
    _, layer = output_layer(model)
    _check(layer, values, labels)
    if epsilon is not None and delta is None:
        raise InputError("train_head got an epsilon and no delta, wanted both: at most 1 / rows.")
    scale = 1 / (feature_norm or math.sqrt(layer.in_features))
    head = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    columns = [values.float() * scale]
    if canaries is not None:
        count = len(canaries)
        columns = [
            torch.cat([*columns, torch.zeros(count, layer.in_features)]),
            torch.cat([torch.full((len(values),), canaries.none), torch.arange(count)]),
        ]
        labels = torch.cat([labels, torch.full((count,), IGNORE_INDEX)])
    rows = len(labels)
    run = fit_head(
        head,
        TensorDataset(*columns, labels),
        epsilon=epsilon,
        delta=delta,
        epochs=epochs,
        batch_size=max(1, min(batch_size or rows, math.ceil(rows / 2))),
        learning_rate=learning_rate,
        momentum=momentum,
        max_grad_norm=max_grad_norm,
        accountant=accountant,
        progress=progress,
        canaries=canaries,
    )
    with torch.no_grad():
        layer.weight.copy_(head.weight * scale)
        if layer.bias is not None:
            layer.bias.copy_(head.bias)
    return run


def fit_head(
    head: nn.Module,
    data: TensorDataset,
    *,
    epsilon: float | None,
    delta: float | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float = 0.9,
    max_grad_norm: float = 0.5,
    averaged_share: float = 0.5,
    accountant: str = "prv",
    progress: Callable[[int, int, float], None] | None = None,
    canaries: Any = None,
) -> HeadRun:
    """Train a small module on features from zero, in place: the loop of `train_head`.

    Args:
        head: maps the columns of `data` but the last to logits (rows, classes). Its parameters become 0.
        data: columns of features, and (rows,) labels.
        averaged_share: the share of the steps, the last ones, whose weights are averaged.
        canaries: as in `train_head`, and so are the others; which canary a row is stands in the last column
            of features.

    Returns:
        What was spent.

    Guarantees:
        As `train_head`.
    """
    parameters = list(head.parameters())
    for parameter in parameters:
        nn.init.zeros_(parameter)
    loader: Any = DataLoader(data, batch_size=batch_size, shuffle=True)
    steps, rate = epochs * len(loader), 1 / len(loader)
    learning_rate *= 1.0 if epsilon is None else min(1.0, math.sqrt(epsilon / 8))
    module: Any = head if canaries is None else _Audited(head, canaries)
    criterion: Any = nn.CrossEntropyLoss() if canaries is None else RowLosses()
    inner = torch.optim.SGD(module.parameters(), lr=learning_rate, momentum=momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: max(0.0, 1 - step / steps))
    optimizer: Any = inner
    engine = PrivacyEngine(accountant=accountant)
    if epsilon is not None:
        module, optimizer, criterion, loader = engine.make_private_with_epsilon(
            module=module,
            optimizer=inner,
            criterion=criterion,
            data_loader=loader,  # comes back with Poisson sampling
            target_epsilon=epsilon,
            target_delta=delta,
            epochs=epochs,
            max_grad_norm=max_grad_norm,
            grad_sample_mode="bk",
        )
    averaged = [torch.zeros_like(parameter) for parameter in parameters]
    first = steps - max(1, round(averaged_share * steps))
    done = 0
    for _ in range(epochs):
        for *columns, wanted in loader:
            optimizer.zero_grad()
            if canaries is None:
                loss = criterion(module(*columns), wanted)
            else:
                loss = criterion(module(*columns, wanted))
            loss.backward()
            optimizer.step()
            if canaries is not None:
                canaries.see(done, optimizer.expected_batch_size / max_grad_norm)
            schedule.step()
            if done >= first:  # of noisy weights: costs no privacy
                for mean, parameter in zip(averaged, parameters, strict=True):
                    mean += parameter.detach() / (steps - first)
            done += 1
            if progress is not None:
                progress(done, steps, float(loss.detach()))
    if epsilon is not None:
        module.to_standard_module()  # takes the engine's hooks off
    with torch.no_grad():
        for mean, parameter in zip(averaged, parameters, strict=True):
            parameter.copy_(mean)
    if epsilon is None or delta is None:
        return HeadRun(None, None, None, rate, done)
    noise = float(optimizer.noise_multiplier)
    return HeadRun(engine.get_epsilon(delta), delta, noise, rate, done)


class _Audited(nn.Module):
    """The losses of rows, of which some are canaries.

    Args:
        head: features -> logits.
        canaries: numbers -> what is added to the losses.
    """

    def __init__(self, head: nn.Module, canaries: nn.Module) -> None:
        super().__init__()
        self.head, self.canaries = head, canaries

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        """(rows,), of features, numbers and labels."""
        *features, numbers, wanted = columns
        losses = nn.functional.cross_entropy(self.head(*features), wanted, reduction="none")
        return losses + self.canaries(numbers)


def _check(layer: nn.Linear, values: torch.Tensor, labels: torch.Tensor) -> None:
    if values.ndim != 2 or values.shape[1] != layer.in_features or len(values) < 2:
        raise InputError(
            f"train_head got features of shape {tuple(values.shape)}, wanted (rows, {layer.in_features}) "
            f"with at least 2 rows, as read_features gives them for this model."
        )
    if labels.shape != values.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"train_head got labels of shape {tuple(labels.shape)}, {labels.dtype}, wanted "
            f"({len(values)},), torch.int64."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= layer.out_features:
        raise InputError(
            f"train_head got labels from {low} to {high}, wanted 0 to {layer.out_features - 1}: load the "
            f"model with num_labels={high + 1}."
        )
