"""The loss of a batch, as one value for each row or as a scalar that is taken for their mean."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.randomness import fixed_draws
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.losses import ModelLoss, unwrapped
from dpzoo.models.base import PerSampleModel
from dpzoo.models.cache import CACHE_NAMES

Loss = Callable[[Any, Any], torch.Tensor]


class RowLoss:
    """The loss that an audit takes gradients of.

    Args:
        loss: maps (model, batch) to per-row losses (rows,) or a scalar. By default the model's own:
            ``loss_per_sample`` of its outputs, else their ``loss``, else a fixed nonlinear function
            of each row's outputs.

    Attributes:
        source: where the default found the loss: "loss", "outputs" or "user"; None before a call.
        fixed: hold what is drawn at random fixed.
    """

    def __init__(self, loss: Loss | None) -> None:
        self._loss = loss
        self.source: str | None = None
        self.fixed = False

    def __call__(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Per-row losses, (rows,), or a scalar.

        Raises:
            InputError: a loss of another shape.
        """
        with fixed_draws() if self.fixed else nullcontext():
            return self._value(model, batch)

    def _value(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        if self._loss is not None:
            value, self.source = self._loss(model, batch.value), "user"
        else:
            outputs = batch.call(model)
            own = own_loss(outputs)
            if own is None:
                value, self.source = functional(outputs, batch.rows), "outputs"
            else:
                value, self.source = own, "loss"
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"audit's loss returned {type(value).__name__}, wanted a tensor: one value for each "
                f"row, or a scalar."
            )
        if value.dim() > 1 and value.numel() == batch.rows:
            value = value.reshape(batch.rows)
        if value.dim() > 0 and tuple(value.shape) != (batch.rows,):
            raise InputError(
                f"audit's loss has shape {tuple(value.shape)}, wanted ({batch.rows},), one value for "
                f"each row, or a scalar. Pass loss=... to audit."
            )
        return value

    def total(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """The sum over rows; of a scalar loss, its value times the number of rows."""
        value = self(model, batch)
        return value * batch.rows if value.dim() == 0 else value.sum()


LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label", "mc_labels")


def losses_of_head(model: Any) -> Loss | None:
    """The rows' losses of a stock transformers model, by `dpzoo.ModelLoss`; None for other models.

    The model's own loss is a mean over the batch, with which mode "bk" cannot train.
    """
    stock = unwrapped(model)
    if not isinstance(stock, PreTrainedModel) or isinstance(stock, PerSampleModel):
        return None
    try:
        criterion = ModelLoss(stock, reduction="none")
    except UnsupportedModelError:
        return None

    def losses(model: Any, batch: Any) -> torch.Tensor:
        inputs = dict(batch)
        # Encoder-decoders make the decoder's inputs from the labels.
        kept = stock.config.is_encoder_decoder and "decoder_input_ids" not in inputs
        given = inputs if kept else {k: v for k, v in inputs.items() if k not in LABELS}
        spans = (inputs.get("start_positions"), inputs.get("end_positions"))
        labels = inputs.pop("labels", spans)
        return criterion(model(**given), labels, **inputs)

    return losses


def _fields(outputs: Any) -> dict[str, Any]:
    """The named values of a model's outputs, attributes beside the items included."""
    fields = dict(vars(outputs)) if hasattr(outputs, "__dict__") else {}
    if isinstance(outputs, Mapping):
        fields.update(outputs)
    return fields if not isinstance(outputs, torch.Tensor) else {}


def own_loss(outputs: Any) -> torch.Tensor | None:
    """The loss that a model's outputs carry, heads added up; None if they carry none."""
    if isinstance(outputs, torch.Tensor) and outputs.dim() == 0:
        return outputs
    fields = _fields(outputs)
    for suffix in ("loss_per_sample", "loss"):
        found = [
            value
            for name, value in fields.items()
            if name.endswith(suffix) and isinstance(value, torch.Tensor)
        ]
        if found:
            total = found[0]
            for value in found[1:]:
                total = total + value
            return total
    return None


def functional(outputs: Any, rows: int) -> torch.Tensor:
    """A fixed nonlinear function of each row's outputs, (rows,).

    No weight of it is alike or zero, so every output counts, and sums, permutations and
    normalisations of the outputs show.

    Raises:
        InputError: the outputs have no floating point tensor of ``rows`` rows.
    """
    total = None
    seen = []
    for tensor in _tensors(outputs):
        seen.append(tuple(tensor.shape))
        if tensor.dim() == 0 or len(tensor) != rows:
            continue
        size = tensor[0].numel() if rows else 1
        flat = tensor.reshape(rows, size)
        index = torch.arange(size, dtype=flat.dtype, device=flat.device)
        weight = 1 + 0.5 * torch.cos(1.3 * index + 0.2)
        value = (weight * (torch.sin(flat) + 0.25 * flat * flat)).sum(1) / max(size, 1) ** 0.5
        total = value if total is None else total + value
    if total is None:
        raise InputError(
            f"audit found neither a loss nor an output of {rows} rows; floating point outputs: "
            f"{seen}. Pass loss=... to audit, returning one value for each row."
        )
    return total


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for name, value in outputs.items():
            if name not in CACHE_NAMES:  # inputs of a next call, not outputs
                yield from _tensors(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _tensors(value)
    elif hasattr(outputs, "__dataclass_fields__"):
        yield from _tensors(vars(outputs))
