"""The post-norm Transformer encoder of BERT and RoBERTa, under the names their checkpoints use.

Source of the function: Devlin et al. 2018 (arXiv 1810.04805), as transformers 5 computes it. Hidden
states are (batch, num_choices * seq, hidden) throughout; see `dpzoo.layers.attention`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from dpzoo.errors import UnsupportedConfigError
from dpzoo.layers.attention import attend, merge_heads, split_heads
from dpzoo.layers.checkpointing import CheckpointedLayer
from dpzoo.layers.embeddings import HoldsTables, PositionEmbedding, TokenEmbedding


def activation(function: Any) -> Any:
    """An activation by its transformers name, or a callable as it is."""
    return ACT2FN[function] if isinstance(function, str) else function


def refuse_uneven_heads(hidden: int, heads: int) -> None:
    """Raise `UnsupportedConfigError` when the hidden size does not divide among the heads."""
    if hidden % heads:
        raise UnsupportedConfigError(
            f"The hidden size ({hidden}) is not a multiple of the number of attention heads "
            f"({heads}). Choose sizes that divide."
        )


class EncoderEmbeddings(HoldsTables, nn.Module):
    """Token, position and token type embeddings, added and normalised."""

    def __init__(self, config: Any, *, position_padding_idx: int | None = None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.padding_idx: Any = position_padding_idx
        self.word_embeddings = TokenEmbedding(
            config.vocab_size, hidden, padding_idx=config.pad_token_id
        )
        self.position_embeddings = PositionEmbedding(
            config.max_position_embeddings, hidden, padding_idx=position_padding_idx
        )
        self.token_type_embeddings = TokenEmbedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if position_padding_idx is not None:
            # RoBERTa registers this table last, and optimizer states go by the order of parameters.
            positions = self.position_embeddings
            del self.position_embeddings
            self.position_embeddings = positions

    def forward(
        self,
        embedded: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Embedded tokens (batch, length, hidden) and ids (batch, length) -> (batch, length, hidden)."""
        embedded = embedded + self.token_type_embeddings(token_type_ids)
        embedded = embedded + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded))


class SelfAttention(nn.Module):
    """Queries, keys and values, and the attention among them."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        refuse_uneven_heads(config.hidden_size, config.num_attention_heads)
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        self.is_causal = config.is_decoder
        self.layer_idx = layer_idx
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any,
        num_choices: int,
        eager: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = split_heads(self.query(hidden), self.num_heads, num_choices)
        key = split_heads(self.key(hidden), self.num_heads, num_choices)
        value = split_heads(self.value(hidden), self.num_heads, num_choices)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        context, weights = attend(
            query,
            key,
            value,
            mask=mask,
            causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
            eager=eager,
        )
        return merge_heads(context, num_choices), weights


class AddNorm(nn.Module):
    """A projection back to the residual stream, added to it and normalised."""

    def __init__(self, config: Any, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Self-attention and its way back to the residual stream."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, layer_idx)
        self.output = AddNorm(config, config.hidden_size)

    def forward(self, hidden: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, weights = self.self(hidden, *args)
        return self.output(context, hidden), weights


class Intermediate(nn.Module):
    """The widening half of the feed-forward network."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden))


class EncoderLayer(CheckpointedLayer):
    """One layer: attention, then feed-forward, each added to its input and normalised."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Any = None,
        num_choices: int = 1,
        eager: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, num_choices * seq, hidden) -> the same shape, and the attention weights if eager."""
        attended, weights = self.attention(hidden, mask, cache, num_choices, eager)
        return self.output(self.intermediate(attended), attended), weights


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: Any, layer_class: type[EncoderLayer]) -> None:
        super().__init__()
        layers = [layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(layers)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        cache: Any = None,
        num_choices: int = 1,
        eager: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Each layer's output in turn, with its attention weights if ``eager``."""
        for layer in self.layer:
            hidden, weights = layer(hidden, mask, cache=cache, num_choices=num_choices, eager=eager)
            yield hidden, weights


class Pooler(nn.Module):
    """A projection of every sequence's first token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden: torch.Tensor, num_choices: int = 1) -> torch.Tensor:
        """(batch, num_choices * seq, hidden) -> (batch, hidden), or (batch, num_choices, hidden)."""
        return self.activation(self.dense(first_tokens(hidden, num_choices)))


def first_tokens(hidden: torch.Tensor, num_choices: int = 1) -> torch.Tensor:
    """The first token of every sequence: (batch, hidden), or (batch, num_choices, hidden)."""
    if num_choices == 1:
        return hidden[:, 0]
    return hidden[:, :: hidden.shape[1] // num_choices]
