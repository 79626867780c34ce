"""Scaled dot-product attention over heads. It has no parameters, so it needs no sampler.

Multiple choice enters the layers as (batch, num_choices * seq, hidden), which keeps the row of the
data set as the batch dimension of every layer that holds a parameter; only here, where choices must
not see each other, it is folded to (batch * num_choices, heads, seq, head_dim).

Shapes, in short, here and in the models' files:

    B  rows of the batch, the privacy unit     C  hidden size
    N  sequences of a row, 1 but for choices   H  heads
    T  tokens of a sequence                    D  head_dim, C / H
    S  keys: T, and those of the cache         V  vocabulary
"""

import torch
from torch.nn import functional as F

from dpzoo.errors import UnsupportedConfigError


def split_heads(x: torch.Tensor, num_heads: int, num_choices: int = 1) -> torch.Tensor:
    """(batch, num_choices * seq, hidden) -> (batch * num_choices, num_heads, seq, head_dim)."""
    batch, length, hidden = x.shape
    rows, seq = batch * num_choices, length // num_choices
    return x.reshape(rows, seq, num_heads, hidden // num_heads).transpose(1, 2)


def merge_heads(x: torch.Tensor, num_choices: int = 1) -> torch.Tensor:
    """(batch * num_choices, num_heads, seq, head_dim) -> (batch, num_choices * seq, hidden)."""
    rows, num_heads, seq, head_dim = x.shape
    merged = x.transpose(1, 2)
    return merged.reshape(rows // num_choices, num_choices * seq, num_heads * head_dim)


def first_tokens(hidden: torch.Tensor, num_choices: int = 1) -> torch.Tensor:
    """The first token of every sequence: (batch, hidden), or (batch, num_choices, hidden)."""
    if num_choices == 1:
        return hidden[:, 0]
    return hidden[:, :: hidden.shape[1] // num_choices]


def refuse_uneven_heads(hidden: int, heads: int) -> None:
    """Raise `UnsupportedConfigError` when the hidden size does not divide among the heads."""
    if hidden % heads:
        raise UnsupportedConfigError(
            f"The hidden size ({hidden}) is not a multiple of the number of attention heads "
            f"({heads}). Choose sizes that divide."
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    dropout: float,
    eager: bool,
    upcast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of queries over keys, ``softmax(scaling * q k^T + mask) v``.

    Args:
        query: (rows, heads, q_len, head_dim).
        key: (rows, heads, kv_len, head_dim).
        value: (rows, heads, kv_len, head_dim).
        mask: broadcastable to (rows, heads, q_len, kv_len). Boolean: True takes part;
            floating: added to the scores. None: everything takes part, up to ``causal``.
        causal: with no mask, and more than one query, position i sees keys 0..i only.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight; 0 outside training.
        eager: compute the weights one by one and return them, instead of the fused kernel.
        upcast: compute scores and softmax in float32 or wider (eager only).

    Returns:
        The context, (rows, heads, q_len, head_dim), and the attention weights after dropout,
        (rows, heads, q_len, kv_len), if ``eager``, else None.
    """
    if not eager:
        is_causal = causal and mask is None and query.shape[2] > 1
        context = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=is_causal, scale=scaling
        )  # (B N, H, T, D)
        return context, None
    if upcast:
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scaling
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (B N, H, T, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1).to(value.dtype)
    weights = F.dropout(weights, dropout)
    return torch.matmul(weights, value), weights  # (B N, H, T, S) @ (B N, H, S, D)
