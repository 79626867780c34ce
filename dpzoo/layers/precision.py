"""Reduced precision: per-sample norms in float32, and loss scales refused.

Opacus computes in the dtype of a layer's output gradient. In bfloat16, its norm of a linear layer is a sum
of products that were rounded to eight bits. Where the tokens of a row cancel each other it may be 0, and
the row is then not clipped at all. Opacus finds a sampler by the exact class of a module. So a linear layer
gets another class as soon as it runs in reduced precision under Opacus, also a layer of an adapter library.
`dpzoo.grad_samplers.upcast` has the samplers of these classes, which compute in float32.
"""

import math
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from dpzoo.errors import InputError
from dpzoo.opacus_internals import is_private


class UpcastLinear(nn.Linear):
    """A `torch.nn.Linear` whose per-sample gradients and norms are float32 or wider."""


class UpcastLayerNorm(nn.LayerNorm):
    """A `torch.nn.LayerNorm` whose per-sample gradients and norms are float32 or wider."""


UPCAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: UpcastLinear,
    nn.LayerNorm: UpcastLayerNorm,
}
"""The classes whose samplers are Opacus' own -> the classes that replace them in reduced precision."""

SMALLEST_SCALE = 32.0
"""A factor of the loss that no reduction and hardly a weight has, and that a GradScaler exceeds."""


def is_reduced_precision(dtype: torch.dtype) -> bool:
    """Whether a dtype is a floating one below float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


def private_parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters that Opacus computes per-sample gradients of; none outside Opacus."""
    return filter(is_private, model.parameters())


def upcast_samplers(model: nn.Module) -> None:
    """Let norms be computed in float32 if the model runs in reduced precision under Opacus.

    To be called in a forward pass. Outside Opacus, or in full precision, it does nothing.

    Args:
        model: its plain Linear and LayerNorm modules are given the classes in `UPCAST`, in place.

    Guarantees:
        In modes hooks and ghost, all per-sample gradients and norms of these layers are float32 or
        wider. A sum is so too where the parameter is: Opacus adds up rows and noise in the
        parameter's dtype, and a warning says so for a parameter that is narrower.
    """
    private = list(private_parameters(model))
    if not private:
        return
    narrow = [parameter for parameter in private if is_reduced_precision(parameter.dtype)]
    device = private[0].device.type
    cast = torch.is_autocast_enabled(device) and is_reduced_precision(
        torch.get_autocast_dtype(device)
    )
    if not (narrow or cast):
        return
    if narrow:
        warnings.warn(
            f"{type(model).__name__} trains parameters of {narrow[0].dtype} under Opacus, which sums "
            f"gradients and draws noise in the parameters' dtype: noise below a sum's last bit is lost. "
            f"Keep trainable parameters in float32 and run the model under "
            f"torch.autocast({device!r}, dtype={narrow[0].dtype}) (frozen ones may stay as they are), or "
            f"use dpzoo.PrivacyEngine with grad_sample_mode='bk', which sums in float32.",
            stacklevel=2,
        )
    for module in model.modules():
        if type(module) in UPCAST:
            module.__class__ = UPCAST[type(module)]


def refuse_loss_scale(losses: torch.Tensor | None, model: nn.Module) -> None:
    """Have the backward pass refuse a GradScaler, if the model is under Opacus.

    A scaler multiplies the loss by a power of two. Norms are then taken of scaled gradients, so that
    every row is clipped, however short its gradient.

    Raises:
        InputError: in the backward pass, if the gradient of all rows' losses is one number of at
            least `SMALLEST_SCALE` that is a power of two, or is one when multiplied by the number of
            rows (the mean's share). Weights that differ between rows, and a loss that is divided,
            pass.
    """
    if losses is None or not losses.requires_grad or not len(losses):
        return
    if next(private_parameters(model), None) is not None:
        losses.register_hook(partial(_refuse_scaled, type(model).__name__))


def _refuse_scaled(name: str, grad: torch.Tensor) -> None:
    low, high = (float(value) for value in grad.aminmax())
    if low != high or low < SMALLEST_SCALE:
        return
    for scale in (low, low * len(grad)):
        exponent = math.log2(scale)
        if abs(exponent - round(exponent)) < 1e-5:
            raise InputError(
                f"The loss of {name} was multiplied by {scale:g} before backward(), as a GradScaler "
                f"does it: norms are then {scale:g} times too large, and every row is clipped. Wanted "
                f"the loss as it is: train in bfloat16, without a GradScaler "
                f"(GradScaler(enabled=False), fp16=False)."
            )
