"""What every model of the zoo has in common: a `transformers.PreTrainedModel` that is safe per sample.

The class keeps three promises on behalf of the families: config fields that a class cannot honour
are refused at construction, the parts keep their types whatever is set, resized or tied, and
checkpoints are read and written in the stock layout.
"""

import copy
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from dpzoo import grad_samplers  # noqa: F401  (registers the samplers of the parts)
from dpzoo.errors import InputError, UnsupportedModelError, loading
from dpzoo.files import path_of, whole_folder
from dpzoo.layers.embeddings import HoldsTables
from dpzoo.layers.guards import refuse_unclipped
from dpzoo.layers.lm_head import LMHead, TiedBias, retype_lm_head
from dpzoo.layers.precision import refuse_loss_scale, upcast_samplers
from dpzoo.losses import batch_mean, with_loss_per_sample
from dpzoo.models.fields import (
    COMMON_FIELDS,
    HARMLESS_ARGUMENTS,
    REFUSED_ARGUMENTS,
    REFUSED_FIELDS,
    refuse_checkpoint,
    refuse_fields,
)
from dpzoo.shapes import check
from dpzoo.transfer import rebuild, refuse_adapters

MASKS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
)
"""Dtypes of an attention mask; what counts is whether an entry is 0."""


class ForwardArguments(TypedDict, total=False):
    """What every forward pass takes beside its own arguments; their meaning is transformers'."""

    output_attentions: bool | None
    output_hidden_states: bool | int | list[int] | None
    return_dict: bool | None
    num_items_in_batch: Any
    cache_position: Any


class PerSampleModel(HoldsTables, PreTrainedModel):
    """A `transformers.PreTrainedModel` whose every parameter has an exact per-sample gradient.

    Args:
        config: the family's own transformers config.

    Raises:
        UnsupportedConfigError: a field of the config asks for something that is not implemented.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = False
    # Trainer then scales the loss by its accumulation steps itself: per-row losses do not depend on
    # how many tokens the rest of an accumulated batch has.
    accepts_loss_kwargs = False
    gradient_checkpointing: bool
    _handled_fields: frozenset[str] = frozenset()
    """The config fields that a family honours, beside `dpzoo.models.fields.COMMON_FIELDS`."""
    _honoured_fields: Mapping[str, tuple[Any, str]] = {}
    """Those of which a class honours one value only, beside `dpzoo.models.fields.REFUSED_FIELDS`."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        refuse_fields(
            type(self).__name__,
            config,
            self.config_class,
            handled=COMMON_FIELDS | self._handled_fields,
            refused={**REFUSED_FIELDS, **self._honoured_fields},
        )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers, the library takes a module without parameters of its own for
        # initialised already, and containers whose children want special values are skipped (GPT-2's
        # projections, a sinusoidal table). Here values go through transformers.initialization, which
        # looks at each parameter, so nothing that was loaded can be overwritten.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TiedBias) and module.spare_bias is not None:
            init.zeros_(module.spare_bias)

    # --- parts keep their types -----------------------------------------------------------------

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie head and embedding as the config says, and give the head the type that tells it."""
        if self.config.tie_word_embeddings:
            for module in self.modules():
                if isinstance(module, TiedBias):
                    module.tie_bias()
        super().tie_weights(*args, **kwargs)
        self.retype_parts()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Target -> source of what the config ties; the class's own table needs no expansion."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {}) if self.config.tie_word_embeddings else {}

    def retype_parts(self) -> None:
        """Make the type of the vocabulary projection say whether it is tied by now."""
        head = self.get_output_embeddings()
        if head is not None:
            retype_lm_head(head, self.get_input_embeddings())

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        # transformers builds a plain Linear; whether it is tied again is settled by tie_weights.
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if isinstance(old_lm_head, LMHead):
            resized.__class__ = LMHead
        return resized

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token table; a plain `torch.nn.Embedding` becomes a `TokenEmbedding`."""
        super().set_input_embeddings(value)
        self.retype_parts()  # the head may share its weight with another table now, or with none

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module.load_state_dict`, with keys, layouts and errors of the stock model.

        A head that is tied stays tied, with ``assign`` too (where torch gives each name a parameter
        of its own).
        """
        head, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if tied:
            head.weight = embedding.weight
        return result

    # --- activation checkpointing ---------------------------------------------------------------

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, reentrant by default: the kind that keeps per-sample gradients.

        The newer name, ``activation_checkpointing_enable``, comes here too.
        """
        if gradient_checkpointing_kwargs is None:
            gradient_checkpointing_kwargs = {"use_reentrant": True}
        hooked = bool(getattr(self, "_require_grads_hooks", None))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about this name
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        if not hooked:
            # transformers has hooked the token table, to make its output need gradients where
            # nothing below the first layer does. functorch cannot run that hook; see _checkpointable.
            self.disable_input_require_grads()

    def _checkpointable(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first layer's input; it must need gradients for a reentrant checkpoint to have any."""
        needs = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return hidden.detach().requires_grad_() if needs and not hidden.requires_grad else hidden

    # --- checkpoints are stock ------------------------------------------------------------------
    # state_dict() has stock names and layouts, so transformers' own save_pretrained and push_to_hub
    # write a stock checkpoint.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, written aside and renamed into its place.

        Other files of the folder stay; weights of an earlier checkpoint do not.

        Raises:
            InputError: ``save_directory`` is a file, or no path.
            OSError: it could not be written; the checkpoint that was there before stands.

        Guarantees:
            Whenever the process ends, the old checkpoint or the new one is there, whole (see
            `dpzoo.files.whole_folder` for folders with subfolders).
        """
        place = Path(path_of(save_directory, "save_pretrained", "the path of a folder"))
        if place.is_file():
            raise InputError(f"save_pretrained got {place}, a file; wanted a folder.")
        saves = getattr(self, "should_save_on_this_rank", lambda main: main)(is_main_process)
        settings = {"state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        if not saves or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(place, is_main_process, **settings)
            return
        if push_to_hub:
            settings.setdefault("repo_id", place.name)
        variant = kwargs.get("variant")
        weights = re.escape(f"model.{variant}" if variant else "model")
        old = re.compile(rf"{weights}(-\d+-of-\d+)?\.safetensors(\.index(\.\w+)?\.json)?")
        place.parent.mkdir(parents=True, exist_ok=True)
        adapters = getattr(self, "_hf_peft_config_loaded", False)  # then nothing else is written
        with whole_folder(place, keep=lambda name: adapters or not old.fullmatch(name)) as folder:
            super().save_pretrained(folder, is_main_process, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a stock checkpoint with transformers' own loader and convert it in memory.

        Arguments are those of `transformers.PreTrainedModel.from_pretrained`; see
        `dpzoo.from_pretrained`.

        Raises:
            UnsupportedModelError: the checkpoint is of another family.
            UnsupportedConfigError: a config field that cannot be honoured, or a size that no model has.
            ConversionError: the class is a user's subclass with parameters of its own.
            InputError: a file that is damaged, or weights of which the class has none (they are random with
                ``output_loading_info=True``, which says so).
        """
        source, told = pretrained_model_name_or_path, kwargs.get("output_loading_info")
        refuse_checkpoint(cls, source, **kwargs)
        with loading(source, as_stock=True):
            stock = stock_class(cls)
            model, report = stock.from_pretrained(
                source, *args, **{**kwargs, "output_loading_info": True}
            )
        names = {name for name, _ in model.named_parameters()}
        if not told and names <= {*report["missing_keys"]}:
            raise InputError(
                f"{cls.__name__} got {source}, which has none of its {len(names)} parameters "
                f"({', '.join(sorted(names)[:3])}, ...), and other keys: "
                f"{', '.join(sorted(report['unexpected_keys'])[:3]) or 'none'}. Wanted a state dict with "
                f"the stock names."
            )
        made = cls.from_stock(model, release=True)
        return (made, report) if told else made

    @classmethod
    def from_stock(cls, model: PreTrainedModel, *, release: bool = False) -> Any:
        """This class with the parameters of a stock model; `dpzoo.convert` finds the class as well.

        Args:
            model: an instance of the class that this one, or the zoo's class above it, replaces.
            release: free each of the model's layers as soon as it has been copied.

        Raises:
            As `dpzoo.convert`.
        """
        refuse_adapters(model, "dpzoo.convert")
        name = type(model).__name__
        if getattr(model, "is_quantized", False):
            raise UnsupportedModelError(
                f"dpzoo.convert got a quantised {name}; its weights have no gradients. Load it without "
                f"quantization_config."
            )
        devices = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(devices) > 1 or "disk" in devices:
            raise UnsupportedModelError(
                f"dpzoo.convert got a {name} spread over {sorted(map(str, devices))}. Load it on one "
                f"device (without device_map) and move the dpzoo model."
            )
        converted = rebuild(model, cls, release=release)
        converted.retype_parts()
        return converted

    # --- what forward passes share --------------------------------------------------------------

    def _attention_mask(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        causal: bool,
        eager: bool,
        num_choices: int = 1,
        cache: Any = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The mask as `dpzoo.layers.attend` takes it, for rows of (batch * num_choices).

        Args:
            hidden: the embedded input, (batch, num_choices * seq, hidden).
            attention_mask: (rows, kv_len), (batch, num_choices, kv_len), nonzero where a token takes
                part; or 4-D, (rows, 1 or heads, q_len, kv_len), used as it is.
            causal: whether a position sees only those before it.
            eager: whether an additive mask is wanted instead of a boolean one.
            num_choices: sequences a row holds.
            cache: a transformers cache, for its length.
            position_ids: (rows, seq); with no mask given, rows that restart are packed sequences.
        """
        rows = unfold_choices(hidden, num_choices)
        if attention_mask is not None:
            self._check_mask(attention_mask, rows, num_choices, cache)
        if attention_mask is not None and attention_mask.ndim == 3:
            attention_mask = attention_mask.reshape(rows.shape[0], attention_mask.shape[-1])
        config = self.config
        if eager and config._attn_implementation != "eager":
            config = copy.copy(config)
            config._attn_implementation_internal = "eager"
        if causal:
            return create_causal_mask(
                config, rows, attention_mask, cache, position_ids=position_ids
            )
        return create_bidirectional_mask(config, rows, attention_mask)

    def _check_mask(
        self, mask: torch.Tensor, rows: torch.Tensor, num_choices: int, cache: Any
    ) -> None:
        """Refuse a mask that does not belong to (batch * num_choices, seq, hidden) new tokens."""
        count, seq = rows.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        static = getattr(cache, "is_compileable", False)  # it is as long as it was made
        whole = "kv_len" if isinstance(past, torch.Tensor) or static else past + seq
        shapes: list[tuple[int | str, ...]] = [(count, whole)]
        rank = getattr(mask, "ndim", 0)
        if num_choices > 1 or rank == 3:
            shapes.append((count // num_choices, num_choices, whole))
        if rank == 4:
            shapes += [(n, "heads", seq, whole) for n in (1, count)]
        check(
            "attention_mask",
            mask,
            *shapes,
            dtypes=MASKS,
            of=f"{type(self).__name__}.forward()",
            advice="It has an entry for each token, those in the cache included: nonzero for real ones.",
        )

    def _output(self, kind: Any, body: Any, losses: torch.Tensor | None, **fields: Any) -> Any:
        """A task's output of a class ``kind``, with the rows' losses, (batch,) or None, and their mean."""
        states, attentions = body.hidden_states, body.attentions
        output = kind(
            loss=batch_mean(losses), **fields, hidden_states=states, attentions=attentions
        )
        return self._finish(output, losses)

    def _finish(self, output: Any, losses: torch.Tensor | None) -> Any:
        """Attach the rows' losses, (batch,) or None, to an output; under Opacus, see `_upcast_samplers`.

        A GradScaler is then refused in the backward pass, where the loss is one of these.
        """
        self._upcast_samplers()
        if self._learns():
            for values in (losses, getattr(output, "mc_loss_per_sample", None)):
                refuse_loss_scale(values, self)
            for reduced in (output.get("loss"), output.get("mc_loss")):
                refuse_unclipped(reduced, self)
        return with_loss_per_sample(output, losses)

    def _upcast_samplers(self) -> None:
        """Have per-sample norms computed in float32 under Opacus, whatever this pass runs in."""
        if self._learns():
            upcast_samplers(self)

    def _learns(self) -> bool:
        """Whether a backward pass may follow that Opacus' hooks see."""
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _recorder(
        self,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
        num_choices: int = 1,
    ) -> "Recorder":
        """A `Recorder` of what is asked for, by argument or, where that is None, by the config."""
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        return Recorder(output_hidden_states, output_attentions, num_choices)

    def _eager(self, recorder: "Recorder") -> bool:
        """Whether attention weights are computed one by one: by config, or to be recorded."""
        return self.config._attn_implementation == "eager" or recorder.wants_attentions


def stock_class(cls: type[PerSampleModel]) -> type[PreTrainedModel]:
    """The transformers class that a class of the zoo, or a subclass of one, replaces.

    It is the first in the class's order of bases that transformers has under the same name and with the
    same ``config_class``.

    Raises:
        UnsupportedModelError: there is none.
    """
    for base in cls.__mro__:
        if issubclass(base, PerSampleModel) and not base.__name__.endswith("PreTrainedModel"):
            stock = getattr(transformers, base.__name__, None)
            if stock is not None and stock.config_class is base.config_class:
                return stock
    raise UnsupportedModelError(
        f"{cls.__module__}.{cls.__qualname__} is not a dpzoo class or a subclass of one. "
        f"dpzoo.list_models() gives those."
    )


def activation(function: Any) -> Any:
    """An activation by its transformers name, or a callable as it is."""
    return ACT2FN[function] if isinstance(function, str) else function


def refuse_arguments(name: str, extra: Mapping[str, Any], **named: Any) -> None:
    """Raise `InputError` for arguments that would change the function and cannot be honoured.

    Args:
        name: the class, for the message.
        extra: the ``**kwargs`` of a forward pass.
        **named: arguments that must be None, by name.
    """
    for argument, value in {**extra, **named}.items():
        if value is None or argument in HARMLESS_ARGUMENTS:
            continue
        reason = f" ({REFUSED_ARGUMENTS[argument]})" if argument in REFUSED_ARGUMENTS else ""
        raise InputError(
            f"{name}.forward() got {argument!r}, which it cannot honour{reason}. Leave it out, or use "
            f"the stock transformers class."
        )


class Recorder:
    """Collects hidden states and attention weights layer by layer, if they are asked for.

    Args:
        hidden_states: True for all, a number or list of them for some (the others become None).
        attentions: whether to keep the attention weights.
        num_choices: sequences that a row holds; hidden states are recorded as transformers gives
            them, (batch * num_choices, seq, hidden).
    """

    def __init__(
        self, hidden_states: bool | int | list[int], attentions: bool, num_choices: int = 1
    ) -> None:
        self._wanted = hidden_states
        self.wants_attentions = attentions
        self._num_choices = num_choices
        self._states: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Record one layer's output, (batch, num_choices * seq, hidden), and attention weights."""
        if self._wanted is not False:
            self._states.append(unfold_choices(hidden, self._num_choices))
        if self.wants_attentions and weights is not None:
            self._weights.append(weights)

    def replace_last(self, hidden: torch.Tensor) -> None:
        """Replace the last layer's output by the model's, as it is."""
        if self._wanted is not False:
            self._states[-1] = hidden

    @property
    def hidden_states(self) -> tuple[torch.Tensor | None, ...] | None:
        """The recorded hidden states, or None."""
        if self._wanted is False:
            return None
        if self._wanted is True:
            return tuple(self._states)
        count = len(self._states)
        indices = [self._wanted] if isinstance(self._wanted, int) else self._wanted
        kept = {i % count for i in indices if -count <= i < count}
        return tuple(state if i in kept else None for i, state in enumerate(self._states))

    @property
    def attentions(self) -> tuple[torch.Tensor, ...] | None:
        """The recorded attention weights, (rows, heads, q_len, kv_len) each, or None."""
        return tuple(self._weights) if self.wants_attentions else None


def unfold_choices(hidden: torch.Tensor, num_choices: int) -> torch.Tensor:
    """(batch, num_choices * seq, hidden) -> (batch * num_choices, seq, hidden)."""
    if num_choices == 1:
        return hidden
    batch, length, width = hidden.shape
    return hidden.reshape(batch * num_choices, length // num_choices, width)


def one_input(
    name: str,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    table: Any,
    *,
    choices: bool = False,
) -> torch.Tensor:
    """Whichever of the two inputs is given, checked.

    Args:
        name: the class, for the message.
        input_ids: (batch, seq), or with ``choices`` (batch, num_choices, seq) too.
        inputs_embeds: the same with a last dimension hidden.
        table: the token embedding.
        choices: whether there may be a dimension of choices.

    Raises:
        InputError: both or neither are given, or one of another type, dtype or shape, without a token, or
            with ids that the table does not have.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "both" if input_ids is not None else "neither"
        raise InputError(
            f"You must specify exactly one of input_ids or inputs_embeds; {name}.forward() got {got}."
        )
    shapes: list[tuple[int | str, ...]] = [("batch", "seq")]
    if choices:
        shapes.append(("batch", "num_choices", "seq"))
    of = f"{name}.forward()"
    if input_ids is not None:
        size = getattr(table, "num_embeddings", None)
        advice = "Do the tokenizer and the model belong together?"
        check("input_ids", input_ids, *shapes, high=size, of=of, advice=advice)
        tokens = input_ids.shape
    else:
        width = getattr(table, "embedding_dim", "hidden")
        full = [(*shape, width) for shape in shapes]
        check("inputs_embeds", inputs_embeds, *full, dtypes=None, of=of)
        tokens = inputs_embeds.shape[:-1]  # type: ignore[union-attr]
    if tokens[0] and not all(tokens):
        raise InputError(
            f"{of} got inputs of shape {tuple(tokens)}, wanted at least one token a sequence. Leave empty "
            f"texts out, or give them a special token (add_special_tokens=True)."
        )
    return input_ids if input_ids is not None else inputs_embeds  # type: ignore[return-value]


def refuse_too_long(name: str, seq: int, past: int | torch.Tensor, limit: int) -> None:
    """Raise `InputError` when a sequence has more positions than the table.

    A static cache keeps its length in a tensor. Reading it would stop compilation and export, so there
    only the new tokens are checked.
    """
    if isinstance(past, torch.Tensor):
        past = 0
    if seq + past > limit:
        raise InputError(
            f"{name} got a sequence of {seq + past} tokens, wanted at most {limit}, the positions of "
            f"its table. Truncate the input (tokenizer(..., truncation=True, max_length={limit}))."
        )
