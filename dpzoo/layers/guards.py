"""Losses that must not be backpropagated: in Opacus' ghost mode, any that its criterion did not make.

Ghost mode clips in the ``backward()`` of the loss that the criterion from ``make_private`` returns. An
ordinary ``outputs.loss.backward()`` there raises nothing, and the optimizer takes the step without any
clipping at all.
"""

import torch
from torch import nn

from dpzoo.errors import InputError
from dpzoo.opacus_internals import under_ghost


def refuse_unclipped(loss: torch.Tensor | None, model: nn.Module) -> None:
    """Have the backward pass of a reduced loss raise in ghost mode.

    Raises:
        InputError: in the backward pass, if the model is under ghost mode.
    """
    if loss is None or not loss.requires_grad or not under_ghost(model):
        return
    name = type(model).__name__

    def refuse(grad: torch.Tensor) -> None:
        raise InputError(
            f"The loss in {name}'s outputs was backpropagated in grad_sample_mode='ghost', where only "
            f"the criterion's loss is clipped. Wanted: criterion(model(**batch)).backward(), with the "
            f"criterion that make_private(criterion=dpzoo.ModelLoss(), ...) returns."
        )

    loss.register_hook(refuse)
