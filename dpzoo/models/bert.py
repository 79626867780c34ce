"""BERT (Devlin et al. 2018, arXiv 1810.04805).

What makes it itself: learned absolute positions from 0, two token types, post-norm layers, a pooler
over the first token, and a masked-LM head (dense, activation, LayerNorm, projection) whose weight is
the token table's. As a decoder (``config.is_decoder``) attention is causal. The reference for every
value is transformers 5, ``models/bert/modeling_bert.py``.
"""

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from dpzoo.layers.encoder import EncoderLayer, activation
from dpzoo.losses import batch_mean, class_losses, token_losses
from dpzoo.models import heads
from dpzoo.models.base import (
    ForwardArguments,
    PerSampleModel,
    classifier_dropout,
)
from dpzoo.models.cache import takes_cache
from dpzoo.models.encoder import ENCODER_FIELDS, EncoderBody, MaskedLMHead
from dpzoo.models.fields import TWO_LABELS


class BertLayer(EncoderLayer):
    """One encoder layer, under the name that FSDP and device maps know it by."""


class BertPreTrainedModel(PerSampleModel):
    """What the BERT classes have in common."""

    config: BertConfig
    config_class = BertConfig
    base_model_prefix = "bert"
    _handled_fields = ENCODER_FIELDS
    _no_split_modules = ["BertLayer", "EncoderEmbeddings"]


class BertModel(BertPreTrainedModel, EncoderBody):
    """The encoder, with the pooler that sentence-level heads read."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self._build(config, BertLayer, add_pooling_layer=add_pooling_layer)

    def _default_positions(
        self, input_ids: torch.Tensor | None, seq: int, past: int, device: torch.device
    ) -> torch.Tensor:
        return (torch.arange(seq, device=device) + past).unsqueeze(0)


class BertLMHeadTransform(nn.Module):
    """Dense, activation, LayerNorm: the step before the vocabulary projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden)))


class BertLMPredictionHead(MaskedLMHead):
    """Transform and projection: (batch, seq, hidden) -> (batch, seq, vocab)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
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

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the vocabulary projection, bias included."""
        self.cls.predictions.set_decoder(new_embeddings)


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
        output = BertForPreTrainingOutput(
            loss=batch_mean(losses),
            prediction_logits=prediction_logits,
            seq_relationship_logits=relationship_logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return self._finish(output, losses)


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
        return heads.predict_next(
            self,
            self.cls.predictions,
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
        return heads.predict_masked(
            self,
            self.cls.predictions,
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
        output = NextSentencePredictorOutput(
            loss=batch_mean(losses),
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return self._finish(output, losses)


class BertForSequenceClassification(BertPreTrainedModel):
    """A class, several classes, or numbers for each row, read off the pooled first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> SequenceClassifierOutput:
        """Inputs as in `BertModel`; labels as in `dpzoo.losses.sequence_losses`."""
        return heads.classify_sequence(
            self,
            self._project,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _project(self, body: BaseModelOutputWithPoolingAndCrossAttentions) -> torch.Tensor:
        return self.classifier(self.dropout(body.pooler_output))


class BertForMultipleChoice(BertPreTrainedModel):
    """One of several sequences a row; the privacy unit stays the row, all its choices together."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
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
    ) -> MultipleChoiceModelOutput:
        """Inputs as in `BertModel`, of shape (batch, num_choices, seq); ``labels`` (batch,)."""
        return heads.choose(
            self,
            self._project,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _project(
        self, body: BaseModelOutputWithPoolingAndCrossAttentions, num_choices: int
    ) -> torch.Tensor:
        return self.classifier(self.dropout(body.pooler_output))


class BertForTokenClassification(BertPreTrainedModel):
    """A class for each token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> TokenClassifierOutput:
        """Inputs as in `BertModel`; ``labels`` (batch, seq), -100 where ignored."""
        return heads.classify_tokens(
            self,
            self._project,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

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
        return heads.answer(
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
