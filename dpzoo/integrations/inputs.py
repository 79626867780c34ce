"""The model, the data set, the losses and the subclass that a private run can take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from dpzoo.clipping.units import UnitRows
from dpzoo.conversion import convert
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.losses import ModelLoss
from dpzoo.models.base import PerSampleModel
from dpzoo.modes import MODES


def base_of(model: Any) -> Any:
    """The model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def per_sample(model: Any, mode: str) -> nn.Module:
    """The model as it is trained: a stock one is converted where dpzoo has its class.

    In mode "bk" any other model goes through as it is, PEFT models around stock ones too: its rows'
    losses come from `dpzoo.ModelLoss`.

    Raises:
        UnsupportedModelError: in other modes than "bk", a model that dpzoo does not have, or a PEFT model
            around a stock one.
    """
    base = base_of(model)
    if isinstance(base, PerSampleModel):
        return model
    if base is not model:
        if MODES[mode].own:
            return model
        raise UnsupportedModelError(
            f"DPTrainer got a {type(model).__name__} around a {type(base).__name__} in "
            f"grad_sample_mode={mode!r}, wanted one around a dpzoo model. Convert first: "
            f"get_peft_model(dpzoo.convert(model), ...); or use mode 'bk', which takes it as it is."
        )
    try:
        return convert(model)
    except UnsupportedModelError:
        if MODES[mode].own:
            return model
        raise


def length_of(dataset: Any, logical: int) -> int:
    """Rows of a training set, or units.

    Args:
        dataset: the rows, or the units.
        logical: the expected number of them in a batch.

    Raises:
        InputError: a data set without a length, or with fewer rows than a batch.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"DPTrainer got a {type(dataset).__name__} as train_dataset, wanted a data set with a "
            f"length, and rows by index: Poisson sampling chooses among all of them."
        )
    if len(dataset) < logical:
        what = "units" if isinstance(dataset, UnitRows) else "rows"
        raise InputError(
            f"DPTrainer got a logical batch (per_device_train_batch_size * "
            f"gradient_accumulation_steps) of {logical} {what} for {len(dataset)} training {what}, wanted "
            f"at most as many. Lower gradient_accumulation_steps."
        )
    return len(dataset)


def own_loss(trainer: Any) -> str | None:
    """What of the user's computes the rows' losses; None if it is ours."""
    if type(trainer).compute_loss is not Trainer.compute_loss:
        return "compute_loss"
    return None if trainer.compute_loss_func is None else "compute_loss_func"


def row_losses(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The rows' losses, (rows,): by the trainer's compute_loss or compute_loss_func, or the model's own.

    Raises:
        InputError: a function of the user's gives a loss of another shape.
    """
    base, rows, inputs = base_of(model), len(next(iter(inputs.values()))), dict(inputs)
    who = own_loss(trainer)
    if who == "compute_loss":
        losses = trainer.compute_loss(model, inputs)
    elif who is None and isinstance(base, PerSampleModel):
        return ModelLoss(reduction="none")(model(**inputs))
    else:
        labels = inputs.pop("labels", None)
        outputs = model(**inputs)
        if who is None:
            return ModelLoss(base, reduction="none")(outputs, labels)
        losses = trainer.compute_loss_func(outputs, labels, num_items_in_batch=None)
    if not isinstance(losses, torch.Tensor) or tuple(losses.shape) != (rows,):
        got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise InputError(
            f"{who} gave a loss of shape {got}, wanted ({rows},): one for each row, of that row alone, "
            f"without a mean over the batch."
        )
    return losses


FIXED = (
    "training_step",
    "get_train_dataloader",
    "_get_train_sampler",
    "create_accelerator_and_postprocess",
)


def refuse_overridden(kind: type, base: type) -> None:
    """Raise for methods that a private run has to have as they are.

    Raises:
        InputError: a subclass overrides one.
    """
    for name in FIXED:
        own = getattr(kind, name, None)
        if own is not getattr(base, name, None):
            raise InputError(
                f"{kind.__name__} overrides {name}(), wanted DPTrainer's: batches are Poisson samples and "
                f"steps are private. Override compute_loss() for a loss of your own (one for each row), "
                f"data_collator for other batches, or a TrainerCallback for what happens between steps."
            )
