"""The body that BertModel and RobertaModel share: embeddings, post-norm encoder, pooler.

The two families differ in where positions begin, and nowhere else.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import can_return_tuple

from dpzoo.layers.embeddings import rows_of_ids
from dpzoo.layers.encoder import Encoder, EncoderEmbeddings, EncoderLayer, Pooler
from dpzoo.layers.lm_head import LMHead, TiedBias
from dpzoo.models.base import (
    PerSampleModel,
    one_input,
    refuse_arguments,
    refuse_too_long,
)
from dpzoo.models.cache import CACHE, takes_cache

ENCODER_FIELDS = frozenset(
    {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "hidden_act",
        "hidden_dropout_prob",
        "hidden_size",
        "intermediate_size",
        "is_decoder",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "type_vocab_size",
        "use_cache",
    }
)
"""The config fields that BERT and RoBERTa honour."""


class EncoderBody(PerSampleModel):
    """Token ids to hidden states and a pooled first token; subclasses say where positions begin."""

    def _build(
        self,
        config: Any,
        layer_class: type[EncoderLayer],
        *,
        add_pooling_layer: bool,
        position_padding_idx: int | None = None,
    ) -> None:
        self.gradient_checkpointing = False
        self.embeddings = EncoderEmbeddings(config, position_padding_idx=position_padding_idx)
        self.encoder = Encoder(config, layer_class)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def _max_length(self) -> int:
        """The longest sequence that the position table has room for."""
        return self.config.max_position_embeddings

    def _default_positions(
        self, input_ids: torch.Tensor | None, seq: int, past: int, device: torch.device
    ) -> torch.Tensor:
        """Position ids when none are given: (1, seq) or (rows, seq), for ids of (rows, seq)."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding; a plain `torch.nn.Embedding` becomes a `TokenEmbedding`."""
        self.embeddings.word_embeddings = value

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        *,
        num_choices: int = 1,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode a batch.

        Args:
            input_ids: (batch, num_choices * seq).
            attention_mask: (batch, seq), or (batch, num_choices, seq), nonzero for real tokens; or
                4-D as `dpzoo.layers.attend` takes it.
            token_type_ids: (batch, seq) or (1, seq); zeros by default.
            position_ids: (batch, seq) or (1, seq).
            inputs_embeds: (batch, num_choices * seq, hidden), in the place of ``input_ids``.
            encoder_hidden_states: must be None.
            encoder_attention_mask: must be None.
            cache: a transformers cache, for decoders.
            use_cache: return a cache (decoders only; the config's default).
            num_choices: how many sequences a row holds, one after the other.
            output_attentions: return every layer's attention weights.
            output_hidden_states: return all hidden states, or those with the given numbers.
            **kwargs: ``return_dict``, and arguments that change nothing.

        Returns:
            ``last_hidden_state`` (batch, num_choices * seq, hidden), ``pooler_output`` (batch,
            hidden) or (batch, num_choices, hidden) or None, and what was asked for.

        Raises:
            InputError: both or neither of ids and embeddings, ids of a wrong shape, a sequence
                longer than the position table, or an argument that cannot be honoured.

        Guarantees:
            Every value of row i is a function of row i of the arguments.
        """
        name = type(self).__name__
        refuse_arguments(
            name,
            kwargs,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        tables = self.embeddings
        given = one_input(name, input_ids, inputs_embeds, tables.word_embeddings)
        batch, seq = given.shape[0], given.shape[1] // num_choices
        config = self.config
        if config.is_decoder:
            use_cache = config.use_cache if use_cache is None else use_cache
            if self.gradient_checkpointing and self.training:
                use_cache = False
            if use_cache and cache is None:
                cache = DynamicCache(config=config)
        else:
            use_cache = False
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            refuse_too_long(name, seq, past, self._max_length())
            flat = None if input_ids is None else input_ids.reshape(batch * num_choices, seq)
            position_ids = self._default_positions(flat, seq, past, given.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, seq, dtype=torch.long, device=given.device)
        shape = {"batch": batch, "num_choices": num_choices, "seq": seq}
        position_ids = rows_of_ids(
            position_ids, name="position_ids", table=tables.position_embeddings, **shape
        )
        token_type_ids = rows_of_ids(
            token_type_ids, name="token_type_ids", table=tables.token_type_embeddings, **shape
        )
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)

        hidden = self.embeddings(inputs_embeds, token_type_ids, position_ids)
        recorder = self._recorder(output_hidden_states, output_attentions, num_choices)
        eager = self._eager(recorder)
        mask = self._attention_mask(
            hidden,
            attention_mask,
            causal=config.is_decoder,
            eager=eager,
            num_choices=num_choices,
            cache=cache,
        )
        self._keep_wide()
        hidden = self._checkpointable(hidden)
        recorder.add(hidden)
        layers = self.encoder(hidden, mask, cache=cache, num_choices=num_choices, eager=eager)
        for hidden, weights in layers:
            recorder.add(hidden, weights)
        pooled = None if self.pooler is None else self.pooler(hidden, num_choices)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=pooled,
            **{CACHE: cache if use_cache else None},
            hidden_states=recorder.hidden_states,
            attentions=recorder.attentions,
        )


class MaskedLMHead(TiedBias):
    """Transform and vocabulary projection over (batch, seq, hidden); subclasses name the transform."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.vocab_size, tied=config.tie_word_embeddings)
        self.decoder = LMHead(config.hidden_size, config.vocab_size)
