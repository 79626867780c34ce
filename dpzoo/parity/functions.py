"""Whether models compute the same: outputs on one batch, and the gradient of every row's loss."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpzoo.example_batch import example_batch
from dpzoo.parity.report import Check, larger, worst_of
from dpzoo.transfer import named_tensors, transposed_names

Tensors = Mapping[str, torch.Tensor]
Say = Callable[[str], None]

LARGE = 400_000_000
"""Parameters beyond which the models are compared in float32: in float64 they would not fit."""

OUTPUTS = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative difference of equal functions: the rounding of up to 48 layers."""

GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-3}
FLOAT32_LOSS = 1e-5
"""transformers casts the logits of a language model to float32 before it takes the loss."""

LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions", "mc_labels")


def compare_functions(
    task: str, stock: Any, zoo: Any, again: Any, wide: torch.dtype, say: Say
) -> list[Check]:
    """Outputs of the three models on one padded batch, and per-row gradients of the first two."""
    for model in (stock, zoo, again):
        model.to(wide).eval()
        # Without one, GPT-2's classifier takes a single row only. Random tokens never are padding.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = 0
    batch = example_batch(task, stock.config)
    say("comparing outputs")
    wanted = _outputs(stock, batch)
    checks = [
        worst_of(
            "outputs, stock and dpzoo", _differences(wanted, _outputs(zoo, batch)), OUTPUTS[wide]
        ),
        worst_of(
            "outputs, stock and written",
            _differences(wanted, _outputs(again, batch)),
            OUTPUTS[wide],
        ),
    ]
    del again
    gc.collect()
    tolerance = GRADIENTS[wide]
    if task in ("causal-lm", "double-heads"):
        tolerance = max(tolerance, FLOAT32_LOSS)
    differences: dict[str, float] = {}
    rows = len(batch["input_ids"])
    for row in range(rows):
        say(f"comparing gradients, row {row + 1} of {rows}")
        for name, error in _gradient_differences(task, stock, zoo, batch, row).items():
            differences[name] = larger(differences.get(name, 0.0), error)
    checks.append(worst_of("gradients of every row, stock and dpzoo", differences, tolerance))
    return checks


def _outputs(model: PreTrainedModel, batch: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor that a model returns, hidden states included."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, use_cache=False)
    found = {}
    for name, value in outputs.items():
        for i, one in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(one, torch.Tensor):
                found[f"{name}[{i}]" if isinstance(value, tuple) else name] = one
    return found


def _differences(wanted: Tensors, got: Tensors) -> dict[str, float]:
    """Largest difference by name, relative to the largest wanted value."""
    errors = dict.fromkeys(wanted.keys() ^ got.keys(), float("inf"))
    for name in wanted.keys() & got.keys():
        if wanted[name].shape != got[name].shape:
            errors[name] = float("inf")
        else:
            scale = float(wanted[name].abs().max()) or 1.0
            errors[name] = float((wanted[name] - got[name]).abs().max()) / scale
    return errors


def _gradient_differences(
    task: str, stock: Any, zoo: Any, batch: Tensors, row: int
) -> dict[str, float]:
    """By parameter, relative to the row's largest gradient: alone in stock, in its batch in dpzoo."""
    stock.zero_grad(set_to_none=True)
    alone = _row_alone(batch, row)
    outputs = stock(**alone)
    _stock_loss(task, outputs, alone).backward()
    zoo.zero_grad(set_to_none=True)
    outputs = zoo(**batch)
    _zoo_losses(task, outputs, batch)[row].backward()
    wanted, got = _gradients(stock), _gradients(zoo)
    scale = max((float(g.abs().max()) for g in wanted.values() if g.numel()), default=0.0) or 1.0
    errors = dict.fromkeys(wanted.keys() ^ got.keys(), float("inf"))
    for name in wanted.keys() & got.keys():
        errors[name] = float((wanted[name] - got[name]).abs().max()) / scale
    return errors


def _row_alone(batch: Tensors, row: int) -> dict[str, torch.Tensor]:
    """A batch of one row, without its padding."""
    seq = batch["input_ids"].shape[-1]
    length = int(batch["attention_mask"][row].sum(-1).max())
    return {
        name: value[row : row + 1, ..., :length]
        if value.dim() > 1 and value.shape[-1] == seq
        else value[row : row + 1]
        for name, value in batch.items()
    }


def _stock_loss(task: str, outputs: Any, row: Tensors) -> torch.Tensor:
    """The loss of a row that is alone in its batch, as transformers defines it."""
    if task == "base":
        return _base_losses(outputs, row)[0]
    loss: torch.Tensor = outputs.loss
    return loss + outputs.mc_loss if task == "double-heads" else loss


def _zoo_losses(task: str, outputs: Any, batch: Tensors) -> torch.Tensor:
    """One loss for each row."""
    if task == "base":
        return _base_losses(outputs, batch)
    losses: torch.Tensor = outputs.loss_per_sample
    return losses + outputs.mc_loss_per_sample if task == "double-heads" else losses


def _base_losses(outputs: Any, batch: Tensors) -> torch.Tensor:
    """A base model has no loss: a fixed nonlinear function of every real token's state stands in."""
    mask = batch["attention_mask"].unsqueeze(-1)
    losses = (outputs.last_hidden_state.sin() * mask).flatten(1).sum(1)
    pooled = outputs.get("pooler_output")
    return losses if pooled is None else losses + pooled.sin().sum(1)


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients in the stock layout, under every name of a parameter; zeros where there is none."""
    transposed = set(transposed_names(model))
    found = {}
    for name, parameter in named_tensors(model).items():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found[name] = gradient.t() if name in transposed else gradient
    return found
