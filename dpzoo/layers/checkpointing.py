"""Activation checkpointing that keeps per-sample gradients, or refuses by name.

Opacus' hooks see a layer's inputs in the forward pass that builds the graph. Reentrant checkpointing
builds it in the backward pass, layer by layer, hooks and all: per-sample gradients are exact.
Non-reentrant checkpointing, transformers' default, builds the graph at once and recomputes under
hooks that have fired already: gradients go missing, or an error speaks of tied parameters.
"""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpzoo.errors import UnsupportedConfigError
from dpzoo.opacus_internals import counts_uses


class CheckpointedLayer(GradientCheckpointingLayer):
    """A layer that may be checkpointed, unless that would lose per-sample gradients.

    Raises:
        UnsupportedConfigError: when called under Opacus while it is to be checkpointed without
            ``use_reentrant=True``, or under ExpandedWeights at all.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            self._refuse_lossy_checkpointing()
        return super().__call__(*args, **kwargs)

    def _refuse_lossy_checkpointing(self) -> None:
        name = type(self).__name__
        # As transformers sets it: a partial of torch.utils.checkpoint.checkpoint.
        options = getattr(self._gradient_checkpointing_func, "keywords", {})
        for parameter in self.parameters():
            if not isinstance(parameter, nn.Parameter):
                raise UnsupportedConfigError(
                    f"{name} is checkpointed, and Opacus' grad_sample_mode='ew' cannot see into the "
                    f"recomputation. Use mode 'hooks', 'functorch' or 'ghost', or call "
                    f"model.gradient_checkpointing_disable()."
                )
            if counts_uses(parameter) and options.get("use_reentrant") is not True:
                raise UnsupportedConfigError(
                    f"{name} is checkpointed with use_reentrant=False, which loses per-sample "
                    f"gradients under Opacus. Wanted use_reentrant=True, dpzoo's default: call "
                    f"model.gradient_checkpointing_enable() without gradient_checkpointing_kwargs."
                )
