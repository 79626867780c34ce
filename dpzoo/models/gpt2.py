"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

What makes it itself: pre-norm layers, one fused projection for queries, keys and values, causal
attention, learned positions, token types looked up in the *token* table, an output projection that is
the token table, and checkpoints that store projections transposed (see `dpzoo.layers.transposed`).
The reference for every value is transformers 5, ``models/gpt2/modeling_gpt2.py``.

Letters in comments are shapes, see `dpzoo.layers.attention`.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, GPT2Config
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2DoubleHeadsModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from dpzoo.errors import InputError, UnsupportedConfigError
from dpzoo.layers.attention import attend, merge_heads, refuse_uneven_heads, split_heads
from dpzoo.layers.checkpointing import CheckpointedLayer
from dpzoo.layers.embeddings import (
    PositionEmbedding,
    TokenEmbedding,
    rows_of_ids,
)
from dpzoo.layers.lm_head import LMHead
from dpzoo.layers.transposed import TransposedProjections
from dpzoo.losses import (
    batch_mean,
    causal_losses,
    class_losses,
    sequence_losses,
)
from dpzoo.models import heads
from dpzoo.models.base import (
    ForwardArguments,
    PerSampleModel,
    one_input,
    refuse_arguments,
    refuse_too_long,
)
from dpzoo.models.cache import CACHE, takes_cache
from dpzoo.models.heads import last_real, real_tokens
from dpzoo.shapes import check

TASKS = {
    "base": "GPT2Model",
    "causal-lm": "GPT2LMHeadModel",
    "sequence-classification": "GPT2ForSequenceClassification",
    "double-heads": "GPT2DoubleHeadsModel",
    "token-classification": "GPT2ForTokenClassification",
    "question-answering": "GPT2ForQuestionAnswering",
}
"""What the classes of this file do; `dpzoo.registry` reads it."""

SUMMARY_TYPES = ("cls_index", "last", "first", "mean")


class GPT2Attention(TransposedProjections):
    """Causal self-attention and its way back to the residual stream."""

    transposed = ("c_attn", "c_proj")

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        refuse_uneven_heads(hidden, config.num_attention_heads)
        self.num_heads = config.num_attention_heads
        self.layer_idx = layer_idx
        self.upcast = config.reorder_and_upcast_attn
        self.scaling = (hidden // self.num_heads) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        num_choices: int,
        eager: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            split_heads(part, self.num_heads, num_choices)
            for part in self.c_attn(hidden).split(hidden.shape[-1], dim=-1)  # (B, N T, C) each
        )  # (B N, H, T, D) each
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # (B N, H, S, D)
        context, weights = attend(
            query,
            key,
            value,
            mask=mask,
            causal=True,
            scaling=self.scaling,
            dropout=self.attn_dropout.p if self.training else 0.0,
            eager=eager,
            upcast=self.upcast,
        )  # (B N, H, T, D), (B N, H, T, S)
        return self.resid_dropout(self.c_proj(merge_heads(context, num_choices))), weights


class GPT2MLP(TransposedProjections):
    """The feed-forward network."""

    transposed = ("c_fc", "c_proj")

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = 4 * config.hidden_size if config.n_inner is None else config.n_inner
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.c_proj = nn.Linear(inner, config.hidden_size)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden))))


class GPT2Block(CheckpointedLayer):
    """One layer: attention, then feed-forward, each over a normalised copy of the stream."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        num_choices: int = 1,
        eager: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, num_choices * seq, hidden) -> the same shape, and the attention weights if eager."""
        attended, weights = self.attn(self.ln_1(hidden), mask, cache, num_choices, eager)
        hidden = hidden + attended
        return hidden + self.mlp(self.ln_2(hidden)), weights


class GPT2PreTrainedModel(PerSampleModel):
    """What the GPT-2 classes have in common."""

    config: GPT2Config
    config_class = GPT2Config
    base_model_prefix = "transformer"
    _handled_fields = frozenset(
        {
            "activation_function",
            "attn_pdrop",
            "classifier_dropout",
            "embd_pdrop",
            "hidden_dropout",
            "layer_norm_epsilon",
            "n_embd",
            "n_head",
            "n_inner",
            "n_layer",
            "n_positions",
            "reorder_and_upcast_attn",
            "resid_pdrop",
            "scale_attn_by_inverse_layer_idx",
            "scale_attn_weights",
            "summary_activation",
            "summary_first_dropout",
            "summary_last_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "use_cache",
        }
    )
    _no_split_modules = ["GPT2Block"]
    _skip_keys_device_placement = [CACHE]
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (GPT2Attention, GPT2MLP)):
            # Two paths a layer add to the residual stream: their projections start smaller.
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.c_proj.weight, mean=0.0, std=std)


class GPT2Model(GPT2PreTrainedModel):
    """The decoder."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.gradient_checkpointing = False
        self.wte = TokenEmbedding(config.vocab_size, hidden)
        self.wpe = PositionEmbedding(config.max_position_embeddings, hidden)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding; a plain `torch.nn.Embedding` becomes a `TokenEmbedding`."""
        self.wte = value

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode a batch.

        Args:
            input_ids: (batch, seq) or (batch, num_choices, seq).
            cache: a transformers cache, over (batch * num_choices) rows.
            attention_mask: like ``input_ids``, over past and new tokens, nonzero for real ones; or
                4-D as `dpzoo.layers.attend` takes it.
            token_type_ids: like ``input_ids`` or (1, seq); looked up in the token table.
            position_ids: like ``input_ids`` or (1, seq).
            inputs_embeds: ``input_ids``' shape with a last dimension hidden, in their place.
            encoder_hidden_states: must be None.
            encoder_attention_mask: must be None.
            use_cache: return a cache (the config's default).
            output_attentions: return every layer's attention weights.
            output_hidden_states: return all hidden states, or those with the given numbers.
            **kwargs: ``return_dict``, and arguments that change nothing.

        Returns:
            ``last_hidden_state``, the input's shape with a last dimension hidden, and what was asked
            for.

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
        given = one_input(name, input_ids, inputs_embeds, self.wte, choices=True)
        shape = given.shape if inputs_embeds is None else given.shape[:-1]
        batch, seq = shape[0], shape[-1]
        num_choices = math.prod(shape[1:-1])
        length = num_choices * seq
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0

        if position_ids is None:
            refuse_too_long(name, seq, past, self.config.max_position_embeddings)
            position_ids = (torch.arange(seq, device=given.device) + past).unsqueeze(0)
        sizes = {"batch": batch, "num_choices": num_choices, "seq": seq}
        position_ids = rows_of_ids(position_ids, name="position_ids", table=self.wpe, **sizes)
        if token_type_ids is not None:
            token_type_ids = rows_of_ids(
                token_type_ids, name="token_type_ids", table=self.wte, **sizes
            )
        hidden = self._embed(input_ids, inputs_embeds, token_type_ids, batch, length)
        hidden = self.drop(hidden + self.wpe(position_ids))  # (B, N T, C)

        recorder = self._recorder(output_hidden_states, output_attentions, num_choices)
        eager = self._eager(recorder)
        mask = self._attention_mask(
            hidden,
            attention_mask,
            causal=True,
            eager=eager,
            num_choices=num_choices,
            cache=cache,
            position_ids=position_ids.reshape(batch * num_choices, seq),
        )
        self._upcast_samplers()
        hidden = self._checkpointable(hidden)
        recorder.add(hidden)
        for block in self.h:
            hidden, weights = block(hidden, mask, cache=cache, num_choices=num_choices, eager=eager)
            recorder.add(hidden, weights)
        hidden = self.ln_f(hidden)
        hidden = hidden.reshape(*shape, hidden.shape[-1])  # (B, T, C) or (B, N, T, C)
        recorder.replace_last(hidden)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden,
            **{CACHE: cache if use_cache else None},
            hidden_states=recorder.hidden_states,
            attentions=recorder.attentions,
        )

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        batch: int,
        length: int,
    ) -> torch.Tensor:
        """Tokens and token types, (batch, length, hidden), with one look-up of the table for both."""
        if inputs_embeds is not None:
            embedded = inputs_embeds.reshape(batch, length, inputs_embeds.shape[-1])
            if token_type_ids is None:
                return embedded
            return embedded + self.wte(token_type_ids)
        tokens = input_ids.reshape(batch, length)  # type: ignore[union-attr]
        if token_type_ids is None:
            return self.wte(tokens)
        both = self.wte(torch.cat([tokens, token_type_ids], dim=1))
        return both[:, :length] + both[:, length:]


class _GPT2LM(GPT2PreTrainedModel):
    """Where the classes that generate keep their projection."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}


class GPT2LMHeadModel(_GPT2LM, GenerationMixin):
    """Next-token prediction."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[ForwardArguments],
    ) -> CausalLMOutputWithCrossAttentions:
        """Inputs as in `GPT2Model`; ``labels`` (batch, seq) are shifted inside."""
        return heads.causal_lm(
            self,
            self.lm_head,
            labels,
            logits_to_keep,
            input_ids=input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )


class GPT2SequenceSummary(nn.Module):
    """One vector a sequence, and its projection to a score; driven by config.summary_*."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.summary_type = config.summary_type
        outputs = config.num_labels if config.summary_proj_to_labels else config.hidden_size
        self.summary = (
            nn.Linear(config.hidden_size, outputs) if config.summary_use_proj else nn.Identity()
        )
        name = config.summary_activation
        self.activation = ACT2FN[name] if name else nn.Identity()
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(getattr(config, "summary_last_dropout", 0.0))

    def forward(
        self,
        hidden: torch.Tensor,
        cls_index: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, ..., seq, hidden) and token indices (batch, ...) -> (batch, ..., outputs).

        As in the stock model, "last", "first" and "mean" go by the second dimension, whatever it is.
        Where that one is the tokens', ``real`` (batch, ..., seq), True for real ones, keeps padding out.
        """
        kind, index = self.summary_type, None
        tokens = real if hidden.ndim == 3 else None
        if kind == "cls_index":
            index = last_real(real) if cls_index is None and real is not None else cls_index
        elif tokens is not None and kind != "mean":
            index = last_real(tokens) if kind == "last" else tokens.long().argmax(-1)
        if index is not None:
            index = index[..., None, None].expand(*index.shape, 1, hidden.shape[-1])
            vector = hidden.gather(-2, index).squeeze(-2)
        elif kind == "cls_index":
            vector = hidden[..., -1, :]
        elif kind == "mean" and tokens is not None:
            weights = tokens.unsqueeze(-1).to(hidden.dtype)
            vector = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        elif kind == "mean":
            vector = hidden.mean(dim=1)
        else:
            vector = hidden[:, -1 if kind == "last" else 0]
        return self.last_dropout(self.activation(self.summary(self.first_dropout(vector))))


class GPT2DoubleHeadsModel(_GPT2LM, GenerationMixin):
    """Next-token prediction and multiple choice over the same sequences.

    The two losses stay apart, as in transformers: ``loss`` and ``mc_loss``, each with its per-row
    values, ``loss_per_sample`` and ``mc_loss_per_sample``.
    """

    def __init__(self, config: GPT2Config) -> None:
        if config.summary_type not in SUMMARY_TYPES:
            raise UnsupportedConfigError(
                f"GPT2DoubleHeadsModel cannot honour config.summary_type={config.summary_type!r}. "
                f"Wanted one of {', '.join(SUMMARY_TYPES)}: set it."
            )
        super().__init__(config)
        config.num_labels = 1
        self.transformer = GPT2Model(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.multiple_choice_head = GPT2SequenceSummary(config)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mc_token_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mc_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> GPT2DoubleHeadsModelOutput:
        """Inputs as in `GPT2Model`, usually (batch, num_choices, seq).

        Args:
            mc_token_ids: (batch, num_choices), the token that stands for each sequence; by default
                the last one that ``attention_mask`` calls real. (Stock takes the last one, padding or
                not: a row would depend on how far the longest makes it be padded.)
            labels: (batch, num_choices, seq), shifted inside; a row's loss is the mean over all its
                labelled tokens.
            mc_labels: (batch,), the right choice.

        Raises:
            InputError: ``mc_labels`` with inputs that have no choices (the stock model would take
                the rows of the batch for each other's choices), or with a ``config.summary_*`` that
                does not give one score for each choice.
        """
        body = self.transformer(
            input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = body.last_hidden_state
        batch, width = hidden.shape[0], hidden.shape[-1]
        length = math.prod(hidden.shape[1:-1])
        # Three dimensions, whatever the input has: the samplers' (batch, positions, hidden).
        logits = self.lm_head(hidden.reshape(batch, length, width))
        logits = logits.reshape(*hidden.shape[:-1], logits.shape[-1])
        real = real_tokens(attention_mask, hidden)
        if mc_token_ids is not None:
            name = "GPT2DoubleHeadsModel.forward()"
            tokens = hidden.shape[-2]
            check("mc_token_ids", mc_token_ids, hidden.shape[:-2], high=tokens, of=name)
            mc_token_ids = mc_token_ids.long()
        mc_logits = self.multiple_choice_head(hidden, mc_token_ids, real).squeeze(-1)
        losses = None if labels is None else causal_losses(logits, labels)
        mc_losses = None
        if mc_labels is not None:
            if hidden.ndim != 4:
                raise InputError(
                    f"GPT2DoubleHeadsModel got mc_labels with inputs of shape "
                    f"{tuple(hidden.shape[:-1])}, wanted (batch, num_choices, seq): without a "
                    f"dimension of choices, rows of the batch would compete with each other."
                )
            if mc_logits.shape != hidden.shape[:2]:
                raise InputError(
                    f"GPT2DoubleHeadsModel got mc_labels and has scores of shape "
                    f"{tuple(mc_logits.shape)}, wanted {tuple(hidden.shape[:2])}, one for each choice: set "
                    f"config.summary_type to 'cls_index' (got {self.config.summary_type!r}), and "
                    f"summary_use_proj and summary_proj_to_labels to True, before the model is built."
                )
            mc_losses = class_losses(mc_logits, mc_labels, "mc_labels")
        if self._learns():
            # A head without labels has gradient 0, not none: Opacus would wait for it, or take the
            # norm that it had in an earlier step.
            if losses is not None and mc_losses is None:
                losses = losses + 0 * mc_logits.reshape(batch, -1 if batch else 0).sum(1)
            if mc_losses is not None and losses is None:
                mc_losses = mc_losses + 0 * logits.reshape(batch, -1 if batch else 0).sum(1)
        output = GPT2DoubleHeadsModelOutput(
            loss=batch_mean(losses),
            mc_loss=batch_mean(mc_losses),
            logits=logits,
            mc_logits=mc_logits,
            **{CACHE: body.get(CACHE)},
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        object.__setattr__(output, "mc_loss_per_sample", mc_losses)
        return self._finish(output, losses)


class GPT2ForSequenceClassification(GPT2PreTrainedModel):
    """A class, several classes, or numbers for each row, read off its last real token."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> SequenceClassifierOutputWithPast:
        """Inputs as in `GPT2Model`; labels as in `dpzoo.losses.sequence_losses`.

        The last real token is the rightmost that is not ``config.pad_token_id``. Where that cannot be
        told, with ``inputs_embeds`` or no padding token, it is the rightmost that a two-dimensional
        ``attention_mask`` calls real; without one, the last. (Stock takes the last one there, padding
        or not: a row would depend on how far the longest makes it be padded.)

        Raises:
            InputError: several rows, no ``config.pad_token_id`` and no such mask.
        """
        body = self.transformer(
            input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = body.last_hidden_state
        heads.refuse_choices(self, hidden)
        rows = torch.arange(len(hidden), device=hidden.device)
        real = real_tokens(attention_mask, hidden)
        logits = self.score(hidden[rows, self._last_token(input_ids, real, len(hidden))])
        losses = None if labels is None else sequence_losses(logits, labels, self.config)
        fields = {"logits": logits, CACHE: body.get(CACHE)}
        return self._output(SequenceClassifierOutputWithPast, body, losses, **fields)

    def _last_token(
        self, input_ids: torch.Tensor | None, real: torch.Tensor | None, batch: int
    ) -> torch.Tensor | int:
        padding = self.config.pad_token_id
        if padding is not None and input_ids is not None:
            return last_real(input_ids != padding)
        if real is not None:
            return last_real(real)
        if padding is None and batch > 1:
            raise InputError(
                f"GPT2ForSequenceClassification got {batch} rows and config.pad_token_id=None: it "
                f"cannot tell where a row ends. Set model.config.pad_token_id to the tokenizer's, or "
                f"pass an attention_mask of (batch, seq)."
            )
        return -1


class GPT2ForTokenClassification(GPT2PreTrainedModel):
    """A class for each token."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        rates = (getattr(config, field, None) for field in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[ForwardArguments],
    ) -> TokenClassifierOutput:
        """Inputs as in `GPT2Model`; ``labels`` (batch, seq), -100 where ignored."""
        return heads.token_classification(
            self,
            self._project,
            labels,
            input_ids=input_ids,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(hidden))


class GPT2ForQuestionAnswering(GPT2PreTrainedModel):
    """The first and last token of an answer."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
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
        """Inputs as in `GPT2Model`; positions (batch,), outside the sequence where ignored."""
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
