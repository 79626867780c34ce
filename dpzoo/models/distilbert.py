"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108).

What makes it itself: half of BERT's layers under names of their own (``q_lin``, ``ffn.lin1``,
``sa_layer_norm``), no token types, no pooler (the heads that need one have a ``pre_classifier``),
LayerNorm eps fixed at 1e-12, positions learned or sinusoidal. The reference for every value is
transformers 5, ``models/distilbert/modeling_distilbert.py``.

Letters in comments are shapes, see `dpzoo.layers.attention`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DistilBertConfig
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    QuestionAnsweringModelOutput,
)
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
from dpzoo.layers.embeddings import (
    HoldsTables,
    PositionEmbedding,
    TokenEmbedding,
    rows_of_ids,
)
from dpzoo.layers.lm_head import LMHead
from dpzoo.models import heads
from dpzoo.models.base import (
    ForwardArguments,
    PerSampleModel,
    activation,
    one_input,
    refuse_arguments,
    refuse_too_long,
)
from dpzoo.models.fields import TWO_LABELS

TASKS = {
    "base": "DistilBertModel",
    "masked-lm": "DistilBertForMaskedLM",
    "sequence-classification": "DistilBertForSequenceClassification",
    "multiple-choice": "DistilBertForMultipleChoice",
    "token-classification": "DistilBertForTokenClassification",
    "question-answering": "DistilBertForQuestionAnswering",
}
"""What the classes of this file do; `dpzoo.registry` reads it."""

LAYER_NORM_EPS = 1e-12


def sinusoidal_positions(count: int, dim: int) -> torch.Tensor:
    """The sine and cosine table of Vaswani et al. 2017 (section 3.5), shape (count, dim).

    Even columns hold sines, odd ones cosines, with wavelengths from 2 pi to 10000 * 2 pi.
    """
    pairs = torch.arange(dim, dtype=torch.float64) // 2 * 2
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1)
    angles = angles / 10000.0 ** (pairs / dim)
    table = torch.empty(count, dim, dtype=torch.float64)
    table[:, 0::2] = angles[:, 0::2].sin()
    table[:, 1::2] = angles[:, 1::2].cos()
    return table


class Embeddings(HoldsTables, nn.Module):
    """Token and position embeddings, added and normalised."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.word_embeddings = TokenEmbedding(
            config.vocab_size, config.dim, padding_idx=config.pad_token_id
        )
        self.position_embeddings = PositionEmbedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedded: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        embedded = embedded + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded))


class DistilBertSelfAttention(nn.Module):
    """Self-attention and its way back to the residual stream."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        refuse_uneven_heads(config.dim, config.n_heads)
        self.num_heads = config.n_heads
        self.scaling = (config.dim // config.n_heads) ** -0.5
        self.q_lin = nn.Linear(config.dim, config.dim)
        self.k_lin = nn.Linear(config.dim, config.dim)
        self.v_lin = nn.Linear(config.dim, config.dim)
        self.out_lin = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, num_choices: int, eager: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, weights = attend(
            split_heads(self.q_lin(hidden), self.num_heads, num_choices),  # (B N, H, T, D)
            split_heads(self.k_lin(hidden), self.num_heads, num_choices),
            split_heads(self.v_lin(hidden), self.num_heads, num_choices),
            mask=mask,
            causal=False,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
            eager=eager,
        )  # (B N, H, T, D), (B N, H, T, T)
        return self.out_lin(merge_heads(context, num_choices)), weights  # (B, N T, C)


class FFN(nn.Module):
    """The feed-forward network."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.lin1 = nn.Linear(config.dim, config.hidden_dim)
        self.lin2 = nn.Linear(config.hidden_dim, config.dim)
        self.activation = activation(config.activation)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.lin2(self.activation(self.lin1(hidden))))


class TransformerBlock(CheckpointedLayer):
    """One layer: attention, then feed-forward, each added to its input and normalised."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.attention = DistilBertSelfAttention(config)
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.ffn = FFN(config)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        num_choices: int = 1,
        eager: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, num_choices * seq, hidden) -> the same shape, and the attention weights if eager."""
        attended, weights = self.attention(hidden, mask, num_choices, eager)
        hidden = self.sa_layer_norm(attended + hidden)
        return self.output_layer_norm(self.ffn(hidden) + hidden), weights


class Transformer(nn.Module):
    """The stack of layers."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layers)])


class DistilBertPreTrainedModel(PerSampleModel):
    """What the DistilBERT classes have in common."""

    config: DistilBertConfig
    config_class = DistilBertConfig
    base_model_prefix = "distilbert"
    _handled_fields = frozenset(
        {
            "activation",
            "attention_dropout",
            "dim",
            "dropout",
            "hidden_dim",
            "max_position_embeddings",
            "n_heads",
            "n_layers",
            "qa_dropout",
            "seq_classif_dropout",
            "sinusoidal_pos_embds",
        }
    )
    _no_split_modules = ["TransformerBlock", "Embeddings"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Embeddings) and self.config.sinusoidal_pos_embds:
            weight = module.position_embeddings.weight
            init.copy_(weight, sinusoidal_positions(*weight.shape).to(weight.dtype))

    def get_position_embeddings(self) -> nn.Embedding:
        """The position table."""
        return self.base_model.embeddings.position_embeddings

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Change the number of positions, in place, before an optimizer or engine holds the table.

        Args:
            new_num_position_embeddings: the new number. Learned rows are kept up to it; rows beyond
                the old number are newly initialised, or computed if the table is sinusoidal.
        """
        old = self.get_position_embeddings()
        count = new_num_position_embeddings
        new = PositionEmbedding(count, old.embedding_dim, dtype=old.weight.dtype)
        new.to(old.weight.device).requires_grad_(old.weight.requires_grad)
        if self.config.sinusoidal_pos_embds:
            new.weight.copy_(sinusoidal_positions(count, old.embedding_dim))
        else:
            self._init_weights(new)
            kept = min(count, old.num_embeddings)
            new.weight[:kept] = old.weight[:kept]
        self.base_model.embeddings.position_embeddings = new
        self.config.max_position_embeddings = count


class DistilBertModel(DistilBertPreTrainedModel):
    """The encoder."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.transformer = Transformer(config)
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
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        num_choices: int = 1,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (batch, num_choices * seq).
            attention_mask: (batch, seq), or (batch, num_choices, seq), nonzero for real tokens; or
                4-D as `dpzoo.layers.attend` takes it.
            inputs_embeds: (batch, num_choices * seq, dim), instead of ``input_ids``.
            position_ids: (batch, seq) or (1, seq).
            num_choices: how many sequences a row holds, one after the other.
            output_attentions: return every layer's attention weights.
            output_hidden_states: return all hidden states, or those with the given numbers.
            **kwargs: ``return_dict``, and arguments that change nothing, ``token_type_ids`` among them.

        Returns:
            ``last_hidden_state`` (batch, num_choices * seq, dim) and what was asked for.

        Raises:
            InputError: both or neither of ids and embeddings, ids of a wrong shape, a sequence
                longer than the position table, or an argument that cannot be honoured.

        Guarantees:
            Every value of row i is a function of row i of the arguments.
        """
        name = type(self).__name__
        # BERT's tokenizers come with many checkpoints and send token types; there is no table of them.
        kwargs.pop("token_type_ids", None)
        refuse_arguments(name, kwargs)
        tables = self.embeddings
        given = one_input(name, input_ids, inputs_embeds, tables.word_embeddings)
        batch, seq = given.shape[0], given.shape[1] // num_choices
        if position_ids is None:
            refuse_too_long(name, seq, 0, self.config.max_position_embeddings)
            position_ids = torch.arange(seq, device=given.device).unsqueeze(0)
        position_ids = rows_of_ids(
            position_ids,
            batch=batch,
            num_choices=num_choices,
            seq=seq,
            name="position_ids",
            table=tables.position_embeddings,
        )
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)

        hidden = self.embeddings(inputs_embeds, position_ids)  # (B, N T, C)
        recorder = self._recorder(output_hidden_states, output_attentions, num_choices)
        eager = self._eager(recorder)
        mask = self._attention_mask(
            hidden, attention_mask, causal=False, eager=eager, num_choices=num_choices
        )
        self._upcast_samplers()
        hidden = self._checkpointable(hidden)
        recorder.add(hidden)
        for block in self.transformer.layer:
            hidden, weights = block(hidden, mask, num_choices=num_choices, eager=eager)
            recorder.add(hidden, weights)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=recorder.hidden_states,
            attentions=recorder.attentions,
        )


class _DistilBertTask(DistilBertPreTrainedModel):
    """The forward pass of a task: ``_task`` of `dpzoo.models.heads`, with the class's own projection."""

    _task: Any
    _project: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> Any:
        """Inputs as in `DistilBertModel`; the class says what ``labels`` are."""
        return self._task(
            self._project,
            labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **kwargs,
        )


class DistilBertForMaskedLM(_DistilBertTask):
    """Prediction of masked tokens.

    ``labels`` (batch, seq), -100 where ignored.
    """

    _task = heads.masked_lm

    _tied_weights_keys = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.activation = activation(config.activation)
        self.distilbert = DistilBertModel(config)
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.vocab_projector = LMHead(config.dim, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.vocab_projector

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the vocabulary projection, bias included."""
        self.vocab_projector = new_embeddings

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.vocab_layer_norm(self.activation(self.vocab_transform(hidden)))
        return self.vocab_projector(hidden)


class DistilBertForSequenceClassification(_DistilBertTask):
    """A class, several classes, or numbers for each row, read off the first token.

    Labels as in `dpzoo.losses.sequence_losses`.
    """

    _task = heads.sequence_classification

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.distilbert = DistilBertModel(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.seq_classif_dropout)
        self.post_init()

    def _project(self, body: BaseModelOutput) -> torch.Tensor:
        hidden = F.relu(self.pre_classifier(body.last_hidden_state[:, 0]))
        return self.classifier(self.dropout(hidden))


class DistilBertForQuestionAnswering(DistilBertPreTrainedModel):
    """The first and last token of an answer."""

    _honoured_fields = TWO_LABELS

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.distilbert = DistilBertModel(config)
        self.qa_outputs = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.qa_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> QuestionAnsweringModelOutput:
        """Inputs as in `DistilBertModel`; positions (batch,), outside the sequence where ignored."""
        return heads.question_answering(
            self,
            self._project,
            start_positions,
            end_positions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **kwargs,
        )

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.qa_outputs(self.dropout(hidden))


class DistilBertForTokenClassification(_DistilBertTask):
    """A class for each token.

    ``labels`` (batch, seq), -100 where ignored.
    """

    _task = heads.token_classification

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.distilbert = DistilBertModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.post_init()

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(hidden))


class DistilBertForMultipleChoice(_DistilBertTask):
    """One of several sequences a row; the privacy unit stays the row, all its choices together.

    Inputs of shape (batch, num_choices, seq); ``labels`` (batch,).
    """

    _task = heads.multiple_choice

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        self.distilbert = DistilBertModel(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, 1)
        self.dropout = nn.Dropout(config.seq_classif_dropout)
        self.post_init()

    def _project(self, body: BaseModelOutput, num_choices: int) -> torch.Tensor:
        first = first_tokens(body.last_hidden_state, num_choices)
        return self.classifier(self.dropout(F.relu(self.pre_classifier(first))))
