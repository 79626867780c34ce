"""ALBERT (Lan et al. 2019, arXiv 1909.11942), as a family of the zoo; see docs/adding-a-family.md.

What makes it itself: one layer, used ``num_hidden_layers`` times (or ``num_hidden_groups`` layers, each
for a part of the depth, each made of ``inner_group_num`` inner ones), tables of ``embedding_size``
columns that a projection maps to ``hidden_size``, and a masked-LM head that maps back to that width,
where its weight is the token table's. Positions are learned, from 0; the pooler's parts are attributes
of the model itself. The reference for every value is transformers 5, ``models/albert/modeling_albert.py``.

Gradient checkpointing is not offered, as in transformers. Opacus counts forward passes to know when all
uses of a parameter have come, and under checkpointing each use is a forward pass of its own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AlbertConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
)
from transformers.utils.generic import can_return_tuple

from dpzoo.layers.attention import (
    attend,
    first_tokens,
    merge_heads,
    refuse_uneven_heads,
    split_heads,
)
from dpzoo.layers.embeddings import rows_of_ids
from dpzoo.layers.lm_head import LMHead, TiedBias
from dpzoo.models import heads
from dpzoo.models.base import (
    PerSampleModel,
    activation,
    one_input,
    refuse_arguments,
    refuse_too_long,
)
from dpzoo.models.bert import BertEmbeddings, BertForSequenceClassification, BertTask


class AlbertAttention(nn.Module):
    """Self-attention, added to its input and normalised."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        refuse_uneven_heads(hidden, config.num_attention_heads)
        self.num_heads = config.num_attention_heads
        self.scaling = (hidden // self.num_heads) ** -0.5
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, weights = attend(
            split_heads(self.query(hidden), self.num_heads),
            split_heads(self.key(hidden), self.num_heads),
            split_heads(self.value(hidden), self.num_heads),
            mask=mask,
            causal=False,
            scaling=self.scaling,
            dropout=self.attention_dropout.p if self.training else 0.0,
            eager=eager,
        )
        attended = self.output_dropout(self.dense(merge_heads(context)))
        return self.LayerNorm(hidden + attended), weights


class AlbertLayer(nn.Module):
    """Attention, then feed-forward, each added to its input and normalised."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.full_layer_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AlbertAttention(config)
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        # As in transformers: there, and never called. Its rate is carried over and back.
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, seq, hidden) -> the same shape, and the attention weights if eager."""
        attended, weights = self.attention(hidden, mask, eager)
        widened = self.ffn_output(self.activation(self.ffn(attended)))
        return self.full_layer_layer_norm(widened + attended), weights


class AlbertLayerGroup(nn.Module):
    """The inner layers that are used together."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        layers = [AlbertLayer(config) for _ in range(config.inner_group_num)]
        self.albert_layers = nn.ModuleList(layers)


class AlbertTransformer(nn.Module):
    """The way from the narrow width to the wide one, and the groups of layers, used over and over."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.depth = config.num_hidden_layers
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        groups = [AlbertLayerGroup(config) for _ in range(config.num_hidden_groups)]
        self.albert_layer_groups = nn.ModuleList(groups)

    def forward(
        self, embedded: torch.Tensor, mask: torch.Tensor | None, *, eager: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The widened input, then each use's output in turn, with its attention weights if ``eager``."""
        hidden = self.embedding_hidden_mapping_in(embedded)
        yield hidden, None
        stretch = self.depth / len(self.albert_layer_groups)
        for use in range(self.depth):
            # In floating point, as in transformers: where stretch is no integer, rounding has a say.
            for layer in self.albert_layer_groups[int(use / stretch)].albert_layers:
                hidden, weights = layer(hidden, mask, eager)
                yield hidden, weights


class AlbertPreTrainedModel(PerSampleModel):
    """What the ALBERT classes have in common."""

    config: AlbertConfig
    config_class = AlbertConfig
    base_model_prefix = "albert"
    supports_gradient_checkpointing = False
    _handled_fields = frozenset(
        {
            "attention_probs_dropout_prob",
            "classifier_dropout_prob",
            "embedding_size",
            "hidden_act",
            "hidden_dropout_prob",
            "hidden_size",
            "inner_group_num",
            "intermediate_size",
            "layer_norm_eps",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_groups",
            "num_hidden_layers",
            "type_vocab_size",
        }
    )


class AlbertModel(AlbertPreTrainedModel):
    """The encoder, with the pooler that the classifier reads."""

    def __init__(self, config: AlbertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config, config.embedding_size)
        self.encoder = AlbertTransformer(config)
        size = config.hidden_size
        self.pooler = nn.Linear(size, size) if add_pooling_layer else None
        self.pooler_activation = nn.Tanh() if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding; a plain `torch.nn.Embedding` becomes a `TokenEmbedding`."""
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch.

        Args:
            input_ids: (batch, seq).
            attention_mask: (batch, seq), nonzero for real tokens; or 4-D as `dpzoo.layers.attend`
                takes it.
            token_type_ids: (batch, seq) or (1, seq); zeros by default.
            position_ids: (batch, seq) or (1, seq).
            inputs_embeds: (batch, seq, embedding_size), instead of ``input_ids``.
            output_attentions: return the attention weights of every use of a layer.
            output_hidden_states: return all hidden states, or those with the given numbers.
            **kwargs: ``return_dict``, and arguments that change nothing.

        Returns:
            ``last_hidden_state`` (batch, seq, hidden), ``pooler_output`` (batch, hidden) or None, and
            what was asked for.

        Raises:
            InputError: both or neither of ids and embeddings, ids of a wrong shape, a sequence
                longer than the position table, or an argument that cannot be honoured.

        Guarantees:
            Every value of row i is a function of row i of the arguments.
        """
        name = type(self).__name__
        refuse_arguments(name, kwargs)
        given = one_input(name, input_ids, inputs_embeds, self.embeddings.word_embeddings)
        batch, seq = given.shape[:2]
        if position_ids is None:
            refuse_too_long(name, seq, 0, self.config.max_position_embeddings)
            position_ids = torch.arange(seq, device=given.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros(seq, dtype=torch.long, device=given.device)
        shape = {"batch": batch, "num_choices": 1, "seq": seq}
        position_ids = rows_of_ids(
            position_ids,
            name="position_ids",
            table=self.embeddings.position_embeddings,
            **shape,
        )
        token_type_ids = rows_of_ids(
            token_type_ids,
            name="token_type_ids",
            table=self.embeddings.token_type_embeddings,
            **shape,
        )
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)

        embedded = self.embeddings(inputs_embeds, token_type_ids, position_ids)
        recorder = self._recorder(output_hidden_states, output_attentions)
        eager = self._eager(recorder)
        mask = self._attention_mask(embedded, attention_mask, causal=False, eager=eager)
        self._upcast_samplers()
        for hidden, weights in self.encoder(embedded, mask, eager=eager):
            recorder.add(hidden, weights)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler_activation(self.pooler(first_tokens(hidden)))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=pooled,
            hidden_states=recorder.hidden_states,
            attentions=recorder.attentions,
        )


class AlbertMLMHead(TiedBias):
    """Dense, activation, LayerNorm, projection: (batch, seq, hidden) -> (batch, seq, vocab)."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config.vocab_size, tied=config.tie_word_embeddings)
        # First, because its bias is what stock parameters begin with here: optimizers go by order.
        self.decoder = LMHead(config.embedding_size, config.vocab_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.LayerNorm(self.activation(self.dense(hidden))))


class AlbertForMaskedLM(BertTask, AlbertPreTrainedModel):
    """Prediction of masked tokens; ``labels`` (batch, seq), -100 where nothing is to predict."""

    _task = heads.masked_lm

    _tied_weights_keys = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.predictions = AlbertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.predictions.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the vocabulary projection, bias included."""
        self.predictions.set_decoder(new_embeddings)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden)


class AlbertForSequenceClassification(BertTask, AlbertPreTrainedModel):
    """A class, several classes, or numbers for each row, read off the pooled first token."""

    _task = heads.sequence_classification

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = AlbertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    _project = BertForSequenceClassification._project
