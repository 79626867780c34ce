"""Per-sample gradients of `LMHead`, the vocabulary projection tied to the token embedding.

Forward runs embedding, then head; backward runs head, then embedding. Opacus counts the forwards
of a parameter in ``_forward_counter`` and, in hooks mode, adds what each use returns; in ghost mode
it keeps only what the last one returns, which would lose the head's part of the norm. So the head
defers: while a use of the weight is still to come, it leaves its inputs and gradients with the
parameter and returns nothing for it, and the embedding's sampler, which comes last, accounts for
both. That is one mechanism for hooks and ghost mode alike. (functorch and ExpandedWeights never
ask these samplers.)
"""

import torch
from opacus.grad_sample import register_grad_sampler

from dpzoo.layers.lm_head import LMHead

Use = tuple[torch.Tensor, torch.Tensor]
"""One use of a tied weight as a projection: inputs (batch, seq, hidden), output gradients
(batch, seq, vocab)."""

_DEFERRED = "_dpzoo_deferred_uses"


def head_grad_sample(use: Use) -> torch.Tensor:
    """The per-sample gradient of one use, shape (batch, vocab, hidden)."""
    inputs, grads = use
    return torch.einsum("nsv,nsh->nvh", grads, inputs)


def uses_inner_product(a: Use, b: Use) -> torch.Tensor:
    """``<H_a, H_b> = sum_{s,r} <l_s, l_r> <h_s, h_r>`` per sample, shape (batch,).

    The Gram form of Li et al. 2021 (arXiv 2110.05679): two (batch, seq, seq) products.
    """
    gram = torch.matmul(a[1], b[1].transpose(1, 2))
    return (gram * torch.matmul(a[0], b[0].transpose(1, 2))).sum((1, 2))


def take_deferred(weight: torch.Tensor) -> list[Use]:
    """The uses that a head left for the embedding's sampler; they are forgotten with this call."""
    return weight.__dict__.pop(_DEFERRED, [])


@register_grad_sampler(LMHead)
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
        ``inputs_embeds`` was given).

    Guarantees:
        Together with `dpzoo.grad_samplers.embeddings`, every use of the weight in the forward pass
        is counted once in the row's gradient and in its norm.
    """
    wide = torch.promote_types(backprops.dtype, torch.float32)
    use = (activations[0].to(wide), backprops.to(wide))
    samples: dict[torch.Tensor, torch.Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = use[1].sum(1)
    if layer.weight.requires_grad:
        if getattr(layer.weight, "_forward_counter", 1) > 1:
            layer.weight.__dict__.setdefault(_DEFERRED, []).append(use)
        else:
            samples[layer.weight] = head_grad_sample(use)
            for deferred in take_deferred(layer.weight):
                samples[layer.weight] += head_grad_sample(deferred)
    return samples
