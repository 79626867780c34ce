"""BERT (Devlin et al. 2018, arXiv 1810.04805).

What makes it itself: learned absolute positions from 0, two token types, post-norm layers, a pooler
over the first token, and a masked-LM head (dense, activation, LayerNorm, projection) whose weight is
the token table's. As a decoder (``config.is_decoder``) attention is causal. The reference for every
value is transformers 5, ``models/bert/modeling_bert.py``.

The file follows the data from the embeddings to the pooler; then come the heads. Letters in comments are
shapes, see `dpzoo.layers.attention`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from dpzoo.layers.attention import (
    attend,
    first_tokens,
    merge_heads,
    refuse_uneven_heads,
    split_heads,
)
from dpzoo.layers.checkpointing import CheckpointedLayer
from dpzoo.layers.embeddings import HoldsTables, PositionEmbedding, TokenEmbedding, rows_of_ids
from dpzoo.layers.lm_head import LMHead, TiedBias
from dpzoo.losses import class_losses, token_losses
from dpzoo.models import heads
from dpzoo.models.base import (
    ForwardArguments,
    PerSampleModel,
    activation,
    one_input,
    refuse_arguments,
    refuse_too_long,
)
from dpzoo.models.cache import CACHE, takes_cache
from dpzoo.models.fields import TWO_LABELS

TASKS = {
    "base": "BertModel",
    "pre-training": "BertForPreTraining",
    "masked-lm": "BertForMaskedLM",
    "causal-lm": "BertLMHeadModel",
    "next-sentence-prediction": "BertForNextSentencePrediction",
    "sequence-classification": "BertForSequenceClassification",
    "multiple-choice": "BertForMultipleChoice",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
}
"""What the classes of this file do; `dpzoo.registry` reads it."""


class BertEmbeddings(HoldsTables, nn.Module):
    """Token, position and token type embeddings, added and normalised."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.word_embeddings = TokenEmbedding(
            config.vocab_size, width, padding_idx=config.pad_token_id
        )
        self.position_embeddings = PositionEmbedding(config.max_position_embeddings, width)
        self.token_type_embeddings = TokenEmbedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        embedded: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Embedded tokens (batch, length, width) and ids (batch, length) -> (batch, length, width)."""
        embedded = embedded + self.token_type_embeddings(token_type_ids)  # (B, N T, C)
        embedded = embedded + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded))


class BertSelfAttention(nn.Module):
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
        query = split_heads(self.query(hidden), self.num_heads, num_choices)  # (B N, H, T, D)
        key = split_heads(self.key(hidden), self.num_heads, num_choices)
        value = split_heads(self.value(hidden), self.num_heads, num_choices)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # (B N, H, S, D)
        context, weights = attend(
            query,
            key,
            value,
            mask=mask,
            causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
            eager=eager,
        )  # (B N, H, T, D), (B N, H, T, S)
        return merge_heads(context, num_choices), weights  # (B, N T, C)


class BertOutput(nn.Module):
    """A projection back to the residual stream, added to it and normalised."""

    def __init__(self, config: Any, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class BertAttention(nn.Module):
    """Self-attention and its way back to the residual stream."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, layer_idx)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, weights = self.self(hidden, *args)
        return self.output(context, hidden), weights


class BertIntermediate(nn.Module):
    """The widening half of the feed-forward network."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden))


class BertLayer(CheckpointedLayer):
    """One layer: attention, then feed-forward, each added to its input and normalised."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_idx)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

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


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: Any, layer_class: type[BertLayer]) -> None:
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


class BertPooler(nn.Module):
    """A projection of every sequence's first token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden: torch.Tensor, num_choices: int = 1) -> torch.Tensor:
        """(batch, num_choices * seq, hidden) -> (batch, hidden), or (batch, num_choices, hidden)."""
        return self.activation(self.dense(first_tokens(hidden, num_choices)))


class BertPreTrainedModel(PerSampleModel):
    """What the BERT classes have in common."""

    config: BertConfig
    config_class = BertConfig
    base_model_prefix = "bert"
    _handled_fields = frozenset(
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
    _no_split_modules = ["BertLayer", "BertEmbeddings"]


class BertModel(BertPreTrainedModel):
    """The encoder, with the pooler that sentence-level heads read."""

    _embeddings_class: type[BertEmbeddings] = BertEmbeddings
    _layer_class: type[BertLayer] = BertLayer

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = self._embeddings_class(config, config.hidden_size)
        self.encoder = BertEncoder(config, self._layer_class)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def _max_length(self) -> int:
        """The longest sequence that the position table has room for."""
        return self.config.max_position_embeddings

    def _default_positions(
        self, input_ids: torch.Tensor | None, seq: int, past: int, device: torch.device
    ) -> torch.Tensor:
        """Position ids when none are given: (1, seq) or (rows, seq), for ids of (rows, seq)."""
        return (torch.arange(seq, device=device) + past).unsqueeze(0)

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
            inputs_embeds: (batch, num_choices * seq, hidden), instead of ``input_ids``.
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

        hidden = self.embeddings(inputs_embeds, token_type_ids, position_ids)  # (B, N T, C)
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
        self._upcast_samplers()
        hidden = self._checkpointable(hidden)
        recorder.add(hidden)
        layers = self.encoder(hidden, mask, cache=cache, num_choices=num_choices, eager=eager)
        for hidden, weights in layers:
            recorder.add(hidden, weights)
        # (B, C), or (B, N, C) for choices
        pooled = None if self.pooler is None else self.pooler(hidden, num_choices)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=pooled,
            **{CACHE: cache if use_cache else None},
            hidden_states=recorder.hidden_states,
            attentions=recorder.attentions,
        )


def classifier_dropout(config: Any) -> float:
    """The dropout before a classifier: its own, or else the hidden layers'."""
    if config.classifier_dropout is not None:
        return float(config.classifier_dropout)
    return float(config.hidden_dropout_prob)


class BertLMHeadTransform(nn.Module):
    """Dense, activation, LayerNorm: the step before the vocabulary projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden)))


class BertLMPredictionHead(TiedBias):
    """Transform and projection: (batch, seq, hidden) -> (batch, seq, vocab)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.vocab_size, tied=config.tie_word_embeddings)
        self.decoder = LMHead(config.hidden_size, config.vocab_size)
        self.transform = BertLMHeadTransform(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden))


class BertHeads(nn.Module):
    """The pre-training heads under their checkpoint names, each if asked for."""

    def __init__(self, config: BertConfig, *, predictions: bool, seq_relationship: bool) -> None:
        super().__init__()
        if predictions:
            self.predictions = BertLMPredictionHead(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, *states: torch.Tensor) -> Any:
        """As the stock module: the tokens' states, or the pooled one, or both, to as many scores."""
        heads = (getattr(self, name, None) for name in ("predictions", "seq_relationship"))
        present = (head for head in heads if head is not None)
        scores = tuple(head(state) for head, state in zip(present, states, strict=True))
        return scores if len(scores) > 1 else scores[0]


class _BertLM(BertPreTrainedModel):
    """Where the classes with a vocabulary projection keep it."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    @property
    def _vocabulary_head(self) -> Any:
        """What turns hidden states into scores of the vocabulary, a `TiedBias`."""
        return self.cls.predictions

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self._vocabulary_head.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the vocabulary projection, bias included."""
        self._vocabulary_head.set_decoder(new_embeddings)


class BertForPreTraining(_BertLM):
    """Masked-LM and next-sentence heads; a row's loss is the sum of its two losses."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertHeads(config, predictions=True, seq_relationship=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> BertForPreTrainingOutput:
        """Inputs as in `BertModel`.

        The loss needs both ``labels`` (batch, seq) and ``next_sentence_label`` (batch,), as in
        transformers.
        """
        body = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        prediction_logits = self.cls.predictions(body.last_hidden_state)
        relationship_logits = self.cls.seq_relationship(body.pooler_output)
        losses = None
        if labels is not None and next_sentence_label is not None:
            losses = token_losses(prediction_logits, labels)
            losses = losses + class_losses(
                relationship_logits, next_sentence_label, "next_sentence_label"
            )
        return self._output(
            BertForPreTrainingOutput,
            body,
            losses,
            prediction_logits=prediction_logits,
            seq_relationship_logits=relationship_logits,
        )


class BertLMHeadModel(_BertLM, GenerationMixin):
    """Next-token prediction; meant for ``config.is_decoder=True``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertHeads(config, predictions=True, seq_relationship=False)
        self.post_init()

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
        labels: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[ForwardArguments],
    ) -> CausalLMOutputWithCrossAttentions:
        """Inputs as in `BertModel`; ``labels`` (batch, seq) are shifted inside."""
        return heads.causal_lm(
            self,
            self._vocabulary_head,
            labels,
            logits_to_keep,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            cache=cache,
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )


class BertForMaskedLM(_BertLM):
    """Prediction of masked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertHeads(config, predictions=True, seq_relationship=False)
        self.post_init()

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
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> MaskedLMOutput:
        """Inputs as in `BertModel`; ``labels`` (batch, seq), -100 where nothing is to predict."""
        return heads.masked_lm(
            self,
            self._vocabulary_head,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )


class BertForNextSentencePrediction(BertPreTrainedModel):
    """Whether the second sentence follows the first (class 0) or not (class 1)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertHeads(config, predictions=False, seq_relationship=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> NextSentencePredictorOutput:
        """Inputs as in `BertModel`; ``labels`` (batch,)."""
        body = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.cls.seq_relationship(body.pooler_output)
        losses = None if labels is None else class_losses(logits, labels)
        return self._output(NextSentencePredictorOutput, body, losses, logits=logits)


class BertTask:
    """The forward pass of a task: ``_task`` of `dpzoo.models.heads`, with the class's own projection."""

    _task: Any
    _project: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> Any:
        """Inputs as in `BertModel`; the class says what ``labels`` are."""
        return self._task(
            self._project,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class BertForSequenceClassification(BertTask, BertPreTrainedModel):
    """A class, several classes, or numbers for each row, read off the pooled first token.

    Labels as in `dpzoo.losses.sequence_losses`.
    """

    _task = heads.sequence_classification

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _project(self, body: BaseModelOutputWithPoolingAndCrossAttentions) -> torch.Tensor:
        return self.classifier(self.dropout(body.pooler_output))


class BertForMultipleChoice(BertTask, BertPreTrainedModel):
    """One of several sequences a row; the privacy unit stays the row, all its choices together.

    Inputs of shape (batch, num_choices, seq); ``labels`` (batch,).
    """

    _task = heads.multiple_choice

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def _project(
        self, body: BaseModelOutputWithPoolingAndCrossAttentions, num_choices: int
    ) -> torch.Tensor:
        return self.classifier(self.dropout(body.pooler_output))


class BertForTokenClassification(BertTask, BertPreTrainedModel):
    """A class for each token.

    ``labels`` (batch, seq), -100 where ignored.
    """

    _task = heads.token_classification

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(hidden))


class BertForQuestionAnswering(BertPreTrainedModel):
    """The first and last token of an answer."""

    _honoured_fields = TWO_LABELS

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> QuestionAnsweringModelOutput:
        """Inputs as in `BertModel`; positions (batch,), outside the sequence where ignored."""
        return heads.question_answering(
            self,
            self.qa_outputs,
            start_positions,
            end_positions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
