"""Samplers that compute in float32 or wider, whatever the model's dtype and the caller's autocast.

What they differentiate is what the layer computed: under autocast a linear layer rounds its input to
the dtype of its output, and so its gradient is that of the rounded input. The product of two bfloat16
numbers is exact in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
from torch import nn

from dpzoo.factors import upcast
from dpzoo.layers.precision import UpcastLayerNorm, UpcastLinear

Layer = TypeVar("Layer", bound=nn.Module)
Samples = dict[torch.Tensor, torch.Tensor]
Sampler = Callable[[Layer, list[torch.Tensor], torch.Tensor], Samples]


def without_autocast(sampler: Sampler[Layer]) -> Sampler[Layer]:
    """The same sampler, whose products stay in float32 if ``backward`` is called under autocast."""

    @functools.wraps(sampler)
    def run(layer: Layer, activations: list[torch.Tensor], backprops: torch.Tensor) -> Samples:
        with torch.autocast(backprops.device.type, enabled=False):
            return sampler(layer, activations, backprops)

    return run


def upcast_sampler(compute: Sampler[Any], *, rounded: bool = False) -> Sampler[Any]:
    """One of Opacus' samplers, of upcast numbers.

    Args:
        compute: Opacus'.
        rounded: whether the layer rounds its input to its output's dtype.
    """

    @without_autocast
    def sample(layer: Any, activations: list[torch.Tensor], backprops: torch.Tensor) -> Samples:
        inputs = activations[0].to(backprops.dtype) if rounded else activations[0]
        return compute(layer, [upcast(inputs)], upcast(backprops))

    return sample


register_grad_sampler(UpcastLinear)(upcast_sampler(compute_linear_grad_sample, rounded=True))
register_norm_sampler(UpcastLinear)(upcast_sampler(compute_linear_norm_sample, rounded=True))
register_grad_sampler(UpcastLayerNorm)(upcast_sampler(compute_layer_norm_grad_sample))
