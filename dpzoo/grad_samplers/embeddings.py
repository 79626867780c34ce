"""Per-sample gradients and their norms of `TokenEmbedding` and `PositionEmbedding`.

The gradient of one sample is ``G = sum_t onehot(id_t) g_t^T`` over the positions t of its row, with
g_t the gradient of the looked-up vector; a position that holds ``padding_idx`` contributes nothing,
as in autograd. If an output head is tied to the table, its share is ``H = sum_s l_s h_s^T`` over the
positions s of the head, with l_s the gradient of the logits and h_s the head's input; the head's
sampler leaves (h, l) in `dpzoo.grad_samplers.lm_head.take_deferred`, and here the two become one.
"""

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import nn

from dpzoo.factors import EmbeddingFactors, GradFactors, total_squared_norm, upcast
from dpzoo.grad_samplers.lm_head import take_deferred
from dpzoo.grad_samplers.upcast import without_autocast
from dpzoo.layers.embeddings import PositionEmbedding, TokenEmbedding


def _factors(layer: nn.Embedding, ids: torch.Tensor, backprops: torch.Tensor) -> EmbeddingFactors:
    """The look-up's factors: ids (batch, length) and gradients (batch, length, hidden), padding zeroed."""
    batch = ids.shape[0]
    length = ids[0].numel() if batch else 0
    ids = ids.reshape(batch, length)
    values = upcast(backprops.reshape(batch, length, layer.embedding_dim))
    if layer.padding_idx is not None:
        values = values.masked_fill((ids == layer.padding_idx).unsqueeze(-1), 0)
    return EmbeddingFactors(ids, values, layer.num_embeddings)


@register_grad_sampler([TokenEmbedding, PositionEmbedding])
@without_autocast
def embedding_grad_sample(
    layer: nn.Embedding, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Per-sample gradients of a table, shape (batch, num_embeddings, hidden).

    Args:
        layer: the table.
        activations: one tensor of ids, (batch, length).
        backprops: gradients of the output, (batch, length, hidden).

    Guarantees:
        Entry i depends on row i alone, and equals what autograd gives for row i, the share of a
        tied `LMHead` of the same forward pass included.
    """
    grads = _factors(layer, activations[0], backprops).dense()
    for use in take_deferred(layer):
        grads += use.dense()
    return {layer.weight: grads}


@register_norm_sampler([TokenEmbedding, PositionEmbedding])
@without_autocast
def embedding_norm_sample(
    layer: nn.Embedding, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Norms of the per-sample gradients of a table, shape (batch,), without the gradients.

    Positions of a row that hold the same id add up before they are squared. With tied heads the
    squared norm is ``|G|^2 + 2 <G, H> + |H|^2``, where ``<G, H> = sum_{t,s} l_s[id_t] <g_t, h_s>``
    needs no tensor with both a vocabulary and a hidden dimension (Ding et al. 2024,
    arXiv 2405.18194).

    Args and Guarantees as in `embedding_grad_sample`.
    """
    uses: list[GradFactors] = [_factors(layer, activations[0], backprops)]
    uses += take_deferred(layer)
    return {layer.weight: total_squared_norm(uses).clamp(min=0).sqrt()}
