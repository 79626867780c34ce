"""Activation checkpointing that keeps per-sample gradients, or refuses by name.

Opacus' hooks see a layer's inputs in the forward pass that builds the graph. Reentrant checkpointing
builds it in the backward pass, layer by layer, hooks and all: per-sample gradients are exact.
Non-reentrant checkpointing, transformers' default, builds the graph at once and recomputes under
hooks that have fired already: gradients go missing, or an error speaks of tied parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from dpzoo.errors import UnsupportedConfigError


def guarded(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function that refuses what would lose per-sample gradients.

    Args:
        checkpoint: as transformers sets it on layers: a partial of `torch.utils.checkpoint.checkpoint`,
            called with a partial of the layer's forward and its tensors.

    Returns:
        The same function, which raises `UnsupportedConfigError` for a layer under Opacus that would
        be checkpointed without ``use_reentrant=True``, or under ExpandedWeights at all.
    """
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant") is True

    def run(forward: partial[Any], *args: Any) -> Any:
        layer = forward.args[0]
        for parameter in layer.parameters():
            if not isinstance(parameter, nn.Parameter):
                raise UnsupportedConfigError(
                    f"{type(layer).__name__} is checkpointed, and Opacus' grad_sample_mode='ew' cannot "
                    f"see into the recomputation. Use mode 'hooks', 'functorch' or 'ghost', or call "
                    f"model.gradient_checkpointing_disable()."
                )
            if not reentrant and hasattr(parameter, "_forward_counter"):
                raise UnsupportedConfigError(
                    f"{type(layer).__name__} is checkpointed with use_reentrant=False, which loses "
                    f"per-sample gradients under Opacus. Wanted use_reentrant=True, dpzoo's default: "
                    f"call model.gradient_checkpointing_enable() without gradient_checkpointing_kwargs."
                )
        return checkpoint(forward, *args)

    return run
