"""The config fields, arguments and outputs of transformers' models, and what the zoo does with each.

Each is handled, ignored by name because it changes nothing here, or refused by name. What a family handles
is in its own file (``_handled_fields``); the rest is here. ``tests/models/test_fields.py`` compares the
table with the installed transformers, field by field, so that a test names a new field before a user needs
it.

A config also holds keys that no class declares: transformers keeps any key of a config.json. Most of them
do not change the function (``task_specific_params``, ``n_ctx``, the user's own notes). Refusing them would
refuse most published checkpoints. Such a key can change what the stock model computes only if the stock
code reads it. So a key that is not in the table is refused if the installed source of the stock model, or
of the masks and caches that it uses, reads it from a config. Otherwise it is kept.
"""

import functools
import importlib
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from dpzoo.errors import UnsupportedConfigError, UnsupportedModelError, loading
from dpzoo.files import path_of

_FULL_ATTENTION = "every layer attends to the whole sequence, over a cache of its own"
_ONE_ROW = "a row of the batch is one sequence: packed ones would be several privacy units"

COMMON_FIELDS = frozenset(
    {
        "id2label",
        "initializer_range",
        "label2id",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "vocab_size",
    }
)
"""Config fields that every family handles."""

IGNORED_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "architectures": "says which class a checkpoint was saved from; from_pretrained reads it",
        "bos_token_id": "for generate",
        "dtype": "for the loader",
        "embedding_size": "stock asks whether it is there, and then lets heads not divide the hidden size",
        "eos_token_id": "for generate",
        "per_layer_config": "refused as is_heterogeneous",
        "transformers_version": "written by save_pretrained",
    }
)
"""Config fields that change nothing in a forward pass, and why."""

REFUSED_FIELDS: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        # First: with one, transformers raises on reading the others.
        "is_heterogeneous": (
            False,
            "all layers have one config, and per_layer_config gives them several",
        ),
        "add_cross_attention": (False, "cross-attention is not part of the zoo"),
        "attention_chunk_size": (None, _FULL_ATTENTION),
        "chunk_size_feed_forward": (0, "a chunked feed-forward calls one layer several times"),
        "cross_attention_hidden_size": (None, "cross-attention is not part of the zoo"),
        "is_causal": (None, "the direction of attention follows the class and config.is_decoder"),
        "is_encoder_decoder": (False, "encoder-decoder models are not part of the zoo"),
        "kv_sharing_modes": (None, _FULL_ATTENTION),
        "layer_types": (None, _FULL_ATTENTION),
        "num_kv_shared_layers": (None, _FULL_ATTENTION),
        "position_embedding_type": (
            "absolute",
            "only learned absolute positions are implemented",
        ),
        "pruned_heads": ({}, "pruned heads change the shape of single layers"),
        "sliding_window": (None, _FULL_ATTENTION),
        "tie_encoder_decoder": (False, "encoder-decoder models are not part of the zoo"),
    }
)
"""Config fields that would change the function: the one value that is honoured, and why only that."""

TWO_LABELS: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {"num_labels": (2, "question answering has two outputs, the first and the last token")}
)
"""Added to `REFUSED_FIELDS` by the question answering classes."""

HARMLESS_ARGUMENTS = frozenset({"num_items_in_batch", "cache_position", "return_dict", "use_cache"})
"""Forward arguments that callers pass to every model and that change nothing here.

``num_items_in_batch`` among them: a loss that divides by the tokens of the whole batch is what the
per-row losses are there to avoid.
"""

REFUSED_ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "cu_seq_lens_k": _ONE_ROW,
        "cu_seq_lens_q": _ONE_ROW,
        "encoder_attention_mask": "cross-attention is not part of the zoo",
        "encoder_hidden_states": "cross-attention is not part of the zoo",
        "is_causal": "the direction of attention follows the class and config.is_decoder",
        "max_length_k": _ONE_ROW,
        "max_length_q": _ONE_ROW,
        "output_router_logits": "the zoo has no mixture of experts",
        "seq_idx": _ONE_ROW,
    }
)
"""Forward arguments that stock models know and the zoo's do not honour, and why. Any other is unknown."""

UNSET_OUTPUTS: Mapping[str, str] = MappingProxyType(
    {"cross_attentions": "cross-attention is not part of the zoo"}
)
"""Output fields that are always None, and why."""


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), (0, 10_000)),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), (1, 100_000)),
        **dict.fromkeys(
            ("hidden_size", "dim", "n_embd", "intermediate_size", "hidden_dim", "n_inner"),
            (1, 1_000_000),
        ),
        **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), (1, 100_000_000)),
        "type_vocab_size": (0, 1_000_000),
        "num_labels": (1, 10_000_000),
    }
)
"""Config field -> the least and the largest size, far beyond what was ever trained."""


def refuse_sizes(name: str, fields: Mapping[str, Any]) -> None:
    """Raise for values that no model has, before anything of that size is made.

    Args:
        name: the class or the checkpoint, for the message.
        fields: of a config, as in config.json; those that are not there are not looked at.

    Raises:
        UnsupportedConfigError: a size that is no whole number or out of `SIZES`, a rate of dropout out of 0
            to 1, an eps or a standard deviation below 0, labels that are no mapping from numbers, classes
            that are no names, or more parameters than this machine has memory for in 16 bits.
    """
    for field, wanted in _wrong_values(fields):
        value = repr(fields[field])
        value = value if len(value) < 80 else f"{value[:77]}..."
        raise UnsupportedConfigError(
            f"{name} has config.{field}={value}, wanted {wanted}. Set it to what the weights have."
        )
    width, layers, inner, *tables = (
        next((fields[field] for field in names if fields.get(field)), 0)
        for names in (
            ("hidden_size", "dim", "n_embd"),
            ("num_hidden_layers", "n_layer", "n_layers"),
            ("intermediate_size", "hidden_dim", "n_inner"),
            ("vocab_size",),
            ("max_position_embeddings", "n_positions"),
            ("type_vocab_size",),
        )
    )
    count, memory = width * (sum(tables) + layers * (4 * width + 2 * inner)), _memory()
    if 2 * count > memory and torch.empty(0).device.type != "meta":
        raise UnsupportedConfigError(
            f"{name} has a config of {count:.1e} parameters (width {width}, {layers} layers, tables of "
            f"{', '.join(map(str, tables))} rows), wanted at most {memory / 2:.1e}, for which this machine "
            f"has memory. Set what is wrong to what the weights have."
        )


CONFIG_ARGUMENTS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Arguments that say where a checkpoint lies; they are needed to find its config too."""


def read_fields(name_or_path: Any, **kwargs: Any) -> dict[str, Any]:
    """A checkpoint's config.json, before a config is made of it.

    Args:
        name_or_path: hub id or folder.
        **kwargs: `CONFIG_ARGUMENTS`; others are left alone.

    Raises:
        InputError: no text and no path.
        UnsupportedConfigError: as `refuse_sizes`.
        OSError: transformers cannot find or read it.
    """
    path_of(name_or_path, "from_pretrained", "a hub id or the path of a folder")
    where = {key: kwargs[key] for key in CONFIG_ARGUMENTS if key in kwargs}
    with loading(name_or_path, as_stock=True):
        fields: dict[str, Any] = PreTrainedConfig.get_config_dict(name_or_path, **where)[0]
        if not isinstance(fields, dict):
            raise TypeError(f"its config.json has a {type(fields).__name__}, wanted an object")
    refuse_sizes(str(name_or_path), fields)
    return fields


def refuse_checkpoint(cls: Any, name_or_path: Any, **kwargs: Any) -> None:
    """Raise for a checkpoint that a class would not read, or could not, before it is tried.

    Raises:
        UnsupportedModelError: it is of another family.
        UnsupportedConfigError: as `refuse_sizes`, for the checkpoint's config and for overrides of it.
        OSError: as `read_fields`.
    """
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        fields = {**vars(config), "model_type": config.model_type}
    else:
        fields = read_fields(name_or_path if config is None else config, **kwargs)
    refuse_sizes(str(name_or_path), {**fields, **kwargs})
    family = getattr(cls.config_class, "model_type", "")
    if fields.get("model_type", family) != family:
        raise UnsupportedModelError(
            f"{cls.__name__} got {name_or_path}, which is of the family {fields['model_type']!r}, wanted "
            f"{family!r}: none of its weights would be read. Use dpzoo.from_pretrained, which takes the "
            f"class from the checkpoint."
        )


def _wrong_values(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wanted)."""
    for field, value in fields.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field in SIZES:
            low, high = SIZES[field]
            whole = isinstance(value, int) and number and low <= value <= high
            if not whole and not (value is None and field in ("n_inner", "num_labels")):
                yield field, f"a whole number from {low:,} to {high:,}"
        elif "dropout" in field or field.endswith("pdrop"):
            if (
                value is not None
                and not isinstance(value, bool)
                and not (number and 0 <= value <= 1)
            ):
                yield field, "a number from 0 to 1"
        elif field in ("initializer_range", "layer_norm_eps", "layer_norm_epsilon"):
            if not (number and 0 <= value < math.inf):
                yield field, "a number from 0 on"
        elif field == "problem_type" and value not in (None, *PROBLEM_TYPES):
            yield field, f"one of: {', '.join(PROBLEM_TYPES)}"
        elif field == "architectures" and value is not None:
            if not (isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)):
                yield field, "a list of names of classes"
        elif field == "id2label" and value is not None:
            keys = [str(key) for key in value] if isinstance(value, Mapping) else ["none"]
            if len(keys) > SIZES["num_labels"][1] or not all(key.isdecimal() for key in keys):
                yield field, "an object with a name for each number of a label"


@functools.cache
def _memory() -> float:
    """Bytes of this machine, and of its accelerators."""
    try:
        own = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
    if not torch.cuda.is_available():
        return own
    there = range(torch.cuda.device_count())
    return own + sum(torch.cuda.get_device_properties(i).total_memory for i in there)


def refuse_fields(
    name: str,
    config: PreTrainedConfig,
    config_class: Any,
    *,
    handled: frozenset[str],
    refused: Mapping[str, tuple[Any, str]],
) -> None:
    """Raise for the first config field that a class cannot honour.

    Args:
        name: the class, for the message.
        config: the config to build it from.
        config_class: the family's own, of transformers.
        handled: fields that the class honours with any value.
        refused: field -> the one value that is honoured, and why.

    Raises:
        UnsupportedConfigError: as `refuse_sizes`; a refused field with another value; a field that
            ``config_class`` declares, that the table does not have, and that is not at its default; any
            other key that the table does not have and that the installed stock code reads (see the head of
            this file).
    """
    refuse_sizes(name, vars(config))
    for field, (honoured, reason) in refused.items():
        value = getattr(config, field, honoured)
        if value != honoured and value is not None:
            raise UnsupportedConfigError(
                f"{name} cannot honour config.{field}={value!r} ({reason}). Wanted {honoured!r}: "
                f"set it, or use the stock transformers class."
            )
    defaults = default_fields(config_class)
    for field, value in vars(config).items():
        if field.startswith("_") or field in handled or field in IGNORED_FIELDS or field in refused:
            continue
        if field in defaults:
            if value == defaults[field]:
                continue
            what, wanted = (
                f"a field of {config_class.__name__}",
                f"{defaults[field]!r}, the default",
            )
        elif value is not None and field in fields_read(config_class):
            what, wanted = "which the stock code reads", "none"
        else:
            continue
        raise UnsupportedConfigError(
            f"{name} does not know config.{field}={value!r}, {what} in transformers "
            f"{transformers.__version__}. Wanted {wanted}: set or remove it, or use the stock transformers "
            f"class."
        )


@functools.cache
def default_fields(config_class: Any) -> Mapping[str, Any]:
    """The fields that a config class declares, with their defaults."""
    default = config_class()
    return {field.name: getattr(default, field.name) for field in fields(default)}


@functools.cache
def fields_read(config_class: Any) -> frozenset[str]:
    """The names that a family's stock model reads from a config, by the installed source.

    That is its modeling module and the modules that make its masks and caches. What the rest of
    transformers reads (the loader, ``generate``) it does for the zoo's models as for the stock ones.
    """
    modules = ["transformers.masking_utils", "transformers.cache_utils"]
    family, found, leaf = config_class.__module__.partition(".configuration_")
    if found:
        modules.append(f"{family}.modeling_{leaf}")
    names: set[str] = set()
    for module in modules:
        source = inspect.getsource(importlib.import_module(module))
        names.update(re.findall(r"\bconfig\.(\w+)", source))
        names.update(re.findall(r"attr\(\s*(?:\w+\.)*config,\s*[\"'](\w+)", source))
    return frozenset(name for name in names if not callable(getattr(config_class, name, None)))
