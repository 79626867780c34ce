"""The model and the data set that a private run can take."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from dpzoo.conversion import convert
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.models.base import PerSampleModel


def per_sample(model: Any) -> nn.Module:
    """The model itself where it has per-row losses, or else its conversion.

    Raises:
        UnsupportedModelError: a model that dpzoo does not have; a PEFT model around a stock one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, PerSampleModel):
        return model
    if base is not model:
        raise UnsupportedModelError(
            f"DPTrainer got a {type(model).__name__} around a {type(base).__name__}, wanted one around "
            f"a dpzoo model. Convert first: get_peft_model(dpzoo.convert(model), ...)."
        )
    return convert(model)


def length_of(dataset: Any, logical: int) -> int:
    """Rows of a training set.

    Args:
        dataset: the rows.
        logical: the expected rows of a batch.

    Raises:
        InputError: a data set without a length, or with fewer rows than a batch.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"DPTrainer got a {type(dataset).__name__} as train_dataset, wanted a data set with a "
            f"length, and rows by index: Poisson sampling chooses among all of them."
        )
    if len(dataset) < logical:
        raise InputError(
            f"DPTrainer got a logical batch (per_device_train_batch_size * "
            f"gradient_accumulation_steps) of {logical} rows for {len(dataset)} training rows, wanted "
            f"at most as many. Lower gradient_accumulation_steps."
        )
    return len(dataset)
