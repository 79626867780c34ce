"""RoBERTa (Liu et al. 2019, arXiv 1907.11692).

What makes it itself: BERT's encoder, with positions that begin after the padding id and skip padding
(a pad token keeps position ``pad_token_id``, whose row in the table is never trained), a two-layer
classification head over the first token, and a masked-LM head that always uses gelu. The forward passes
of the tasks are BERT's. The reference for every value is transformers 5,
``models/roberta/modeling_roberta.py``.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, RobertaConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MultipleChoiceModelOutput,
)
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from dpzoo.errors import UnsupportedConfigError
from dpzoo.layers.lm_head import LMHead, TiedBias
from dpzoo.models import heads
from dpzoo.models.base import ForwardArguments, PerSampleModel
from dpzoo.models.bert import (
    BertEmbeddings,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertLayer,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
    BertTask,
    classifier_dropout,
)
from dpzoo.models.fields import TWO_LABELS

TASKS = {
    "base": "RobertaModel",
    "masked-lm": "RobertaForMaskedLM",
    "causal-lm": "RobertaForCausalLM",
    "sequence-classification": "RobertaForSequenceClassification",
    "multiple-choice": "RobertaForMultipleChoice",
    "token-classification": "RobertaForTokenClassification",
    "question-answering": "RobertaForQuestionAnswering",
}
"""What the classes of this file do; `dpzoo.registry` reads it."""


class RobertaEmbeddings(BertEmbeddings):
    """BERT's, with a position for padding."""

    def __init__(self, config: RobertaConfig, width: int) -> None:
        super().__init__(config, width)
        self.padding_idx: Any = config.pad_token_id
        positions = self.position_embeddings
        positions.padding_idx = config.pad_token_id
        # Stock registers this table last, and optimizer states go by the order of parameters.
        del self.position_embeddings
        self.position_embeddings = positions


class RobertaLayer(BertLayer):
    """One encoder layer, under the name that FSDP and device maps know it by."""


class RobertaPreTrainedModel(PerSampleModel):
    """What the RoBERTa classes have in common."""

    config: RobertaConfig
    config_class = RobertaConfig
    base_model_prefix = "roberta"
    _handled_fields = BertPreTrainedModel._handled_fields
    _no_split_modules = ["RobertaLayer", "RobertaEmbeddings"]


class RobertaModel(RobertaPreTrainedModel, BertModel):
    """The encoder, with the pooler that multiple choice reads."""

    config: RobertaConfig
    embeddings: RobertaEmbeddings
    _embeddings_class = RobertaEmbeddings
    _layer_class = RobertaLayer

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True) -> None:
        if config.pad_token_id is None:
            raise UnsupportedConfigError(
                "RobertaModel cannot honour config.pad_token_id=None: RoBERTa counts positions from "
                "it. Wanted an integer (1 in the published checkpoints): set it."
            )
        super().__init__(config, add_pooling_layer)

    def _max_length(self) -> int:
        return self.config.max_position_embeddings - self.embeddings.padding_idx - 1

    def _default_positions(
        self, input_ids: torch.Tensor | None, seq: int, past: int, device: torch.device
    ) -> torch.Tensor:
        padding = self.embeddings.padding_idx  # of the model as built, whatever the config says now
        if input_ids is None:  # padding cannot be told from embeddings
            return torch.arange(padding + 1, padding + 1 + seq, device=device).unsqueeze(0)
        real = input_ids.ne(padding).long()
        return (real.cumsum(dim=1) + past) * real + padding


class RobertaLMHead(TiedBias):
    """Dense, gelu, LayerNorm, projection: (batch, seq, hidden) -> (batch, seq, vocab)."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config.vocab_size, tied=config.tie_word_embeddings)
        self.decoder = LMHead(config.hidden_size, config.vocab_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden))))


class RobertaClassificationHead(nn.Module):
    """Two layers over the first token: (batch, seq, hidden) -> (batch, num_labels)."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.dense(self.dropout(features[:, 0])))
        return self.out_proj(self.dropout(hidden))


class _RobertaLM(RobertaPreTrainedModel):
    """Where the classes with a vocabulary projection keep it."""

    _tied_weights_keys = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    @property
    def _vocabulary_head(self) -> Any:
        return self.lm_head

    get_output_embeddings = BertForMaskedLM.get_output_embeddings
    set_output_embeddings = BertForMaskedLM.set_output_embeddings


class RobertaForCausalLM(_RobertaLM, GenerationMixin):
    """Next-token prediction; meant for ``config.is_decoder=True``."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.lm_head = RobertaLMHead(config)
        self.post_init()

    forward = BertLMHeadModel.forward


class RobertaForMaskedLM(_RobertaLM):
    """Prediction of masked tokens."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.lm_head = RobertaLMHead(config)
        self.post_init()

    forward = BertForMaskedLM.forward


class RobertaForSequenceClassification(BertTask, RobertaPreTrainedModel):
    """A class, several classes, or numbers for each row, read off the first token."""

    _task = heads.sequence_classification

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()

    def _project(self, body: BaseModelOutputWithPoolingAndCrossAttentions) -> torch.Tensor:
        return self.classifier(body.last_hidden_state)


class RobertaForMultipleChoice(RobertaPreTrainedModel):
    """One of several sequences a row; the privacy unit stays the row, all its choices together."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> MultipleChoiceModelOutput:
        """Inputs as in `RobertaModel`, of shape (batch, num_choices, seq); ``labels`` (batch,)."""
        return heads.multiple_choice(
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

    _project = BertForMultipleChoice._project


class RobertaForTokenClassification(BertTask, RobertaPreTrainedModel):
    """A class for each token."""

    _task = heads.token_classification

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    _project = BertForTokenClassification._project


class RobertaForQuestionAnswering(RobertaPreTrainedModel):
    """The first and last token of an answer."""

    _honoured_fields = TWO_LABELS

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = BertForQuestionAnswering.forward
