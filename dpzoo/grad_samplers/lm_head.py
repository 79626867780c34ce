"""Per-sample gradients of `LMHead`, the vocabulary projection tied to the token embedding.

Forward runs embedding, then head; backward runs head, then embedding. Opacus counts the forwards
of a parameter and, in hooks mode, adds what each use returns; in ghost mode
it keeps only what the last one returns, which would lose the head's part of the norm. So the head
defers: while a use of the weight is still to come, it leaves its inputs and gradients with the
parameter and returns nothing for it, and the embedding's sampler, which comes last, accounts for
both. That is one mechanism for hooks and ghost mode alike. (functorch and ExpandedWeights never
ask these samplers.)

Under FSDP2 (mode ghost_fsdp) a parameter comes and goes with its shards, so Opacus counts the
forwards of a module instead, and keeps the norms with the module: one for each of its parameters,
from whichever sampler. There the head asks its `LMHead.table` whether it was looked up, leaves its
share with it, and returns a norm of zero for the weight.
"""

import torch
from opacus.grad_sample import register_grad_sampler
from torch import nn

from dpzoo.errors import UnsupportedModelError
from dpzoo.factors import LayerInput, LinearFactors, upcast
from dpzoo.grad_samplers.upcast import without_autocast
from dpzoo.layers.lm_head import LMHead
from dpzoo.opacus_internals import counts_uses, uses_left

_DEFERRED = "_dpzoo_deferred_uses"


def take_deferred(layer: nn.Module) -> list[LinearFactors]:
    """The uses that a head left for the sampler of this layer; they are forgotten with this call."""
    return [*vars(layer.weight).pop(_DEFERRED, []), *vars(layer).pop(_DEFERRED, [])]


def _deferred_to(layer: LMHead) -> torch.Tensor | nn.Module | None:
    """Where a use waits for the embedding's sampler; None if that will not be asked for this pass."""
    forwards = uses_left(layer.weight)
    if forwards:
        return layer.weight if forwards > 1 else None
    if not counts_uses(layer):
        return None
    if layer.table is None or layer.table.weight is not layer.weight:
        raise UnsupportedModelError(
            "A tied LMHead has another weight than its token embedding, wanted one weight in one FSDP "
            "group. Call model.tie_weights(), and then fully_shard([model.get_input_embeddings(), "
            "model.get_output_embeddings()]), before the rest of the model is sharded."
        )
    return layer.table if uses_left(layer.table) else None


@register_grad_sampler(LMHead)
@without_autocast
def lm_head_grad_sample(
    layer: LMHead, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Per-sample gradients of a tied head: its bias now, its weight now or with the embedding.

    Args:
        layer: the head.
        activations: one tensor, the head's input, (batch, seq, hidden).
        backprops: gradients of the logits, (batch, seq, vocab).

    Returns:
        ``{bias: (batch, vocab)}``, and ``{weight: (batch, vocab, hidden)}`` if no use of the weight
        is still to come in this backward pass (the embedding was not looked up, say, because
        ``inputs_embeds`` was given). Under FSDP2 a deferred weight is there as zeros, (batch, 1).

    Raises:
        UnsupportedModelError: under FSDP2, head and embedding are not one parameter.

    Guarantees:
        Together with `dpzoo.grad_samplers.embeddings`, every use of the weight in the forward pass
        is counted once in the row's gradient and in its norm.
    """
    # Under autocast the layer rounded its input to the dtype of its output; so does its gradient.
    inputs = upcast(activations[0].to(backprops.dtype))
    use = LinearFactors(upcast(backprops), LayerInput(inputs))
    samples: dict[torch.Tensor, torch.Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = use.grads.sum(1)
    if layer.weight.requires_grad:
        waits_at = _deferred_to(layer)
        if waits_at is None:
            samples[layer.weight] = use.dense()
            for deferred in take_deferred(layer):
                samples[layer.weight] += deferred.dense()
        else:
            vars(waits_at).setdefault(_DEFERRED, []).append(use)
            if waits_at is layer.table:
                samples[layer.weight] = inputs.new_zeros(len(inputs), 1)
    return samples
