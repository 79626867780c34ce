"""Reading checkpoints for the commands: they are read, or refused with a one-line error.

Other libraries read the files, and each has its own errors for what can be wrong with a file. Here all of
them become an `InputError` that names the checkpoint.
"""

import copy
import os
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpzoo.errors import InputError, loading
from dpzoo.models.base import PerSampleModel
from dpzoo.models.fields import read_fields
from dpzoo.pretrained import _class_for, refuse_unknown_family
from dpzoo.registry import FAMILIES, model_class, stock_class

MOST_NAMES = 6


def load(source: str | Path, task: str | None = None, *, fresh: bool = False) -> PerSampleModel:
    """A checkpoint as a dpzoo model, for a command.

    Args:
        source: hub id or folder.
        task: as in `dpzoo.from_pretrained`.
        fresh: take a checkpoint that lacks more than a new head; what it lacks is random then.

    Raises:
        InputError: it is not there, cannot be read, or is not whole.
        UnsupportedModelError, UnsupportedConfigError, ConversionError: as `dpzoo.from_pretrained`.
    """
    config = read_config(source)
    cls = _class_for(config, task, str(source))
    model, report = load_class(cls, source, config)
    missing = [] if fresh else lost(report["missing_keys"], cls, config)
    if missing:
        raise InputError(
            f"{source} lacks {some(missing)}: a {cls.__name__} of it would be random there. It is damaged, "
            f"or of another class ({config.architectures} says its config.json)."
        )
    return model


def read_config(source: str | Path, family: str | None = None) -> PreTrainedConfig:
    """A checkpoint's config.

    Args:
        source: hub id or folder.
        family: of an old checkpoint, whose config.json does not say.

    Raises:
        InputError: it is not there, cannot be read, or is of another family.
        UnsupportedConfigError: a size that no model has.
    """
    with reading(source) as where:
        fields = read_fields(source, **where)
        said = fields.get("model_type")
        if said is not None:
            if family not in (None, said):
                raise InputError(f"{source} is of the family {said!r}, not {family!r}.")
            refuse_unknown_family(said if isinstance(said, str) else repr(said), str(source))
            return AutoConfig.from_pretrained(source, **where)
        if family is None:
            raise InputError(
                f"{source} cannot be loaded: its config.json has no model_type. If you know its family, "
                f"pass it: --family, one of: {', '.join(FAMILIES)}."
            )
        config_class = stock_class(model_class(family, "base")).config_class
        return config_class.from_pretrained(source, **where)


def load_class(
    cls: Any,
    source: str | Path,
    config: PreTrainedConfig,
    *,
    new_head: bool = False,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """``cls.from_pretrained``: the model and transformers' report.

    Args:
        cls: a class of dpzoo or of transformers.
        source: hub id or folder.
        config: the checkpoint's; a copy is used.
        new_head: as in `load_stock`.
        **settings: as ``from_pretrained``'s.

    Raises:
        InputError: it cannot be read, or has tensors of other shapes.
        DpzooError: as ``from_pretrained``.
    """
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(source) as where:
        model, report = cls.from_pretrained(
            source, config=copy.deepcopy(config), **settings, **where
        )
    prefix = f"{model.base_model_prefix}."
    wrong = [
        one
        for one in sorted(report["mismatched_keys"])
        if not new_head or one[0].startswith(prefix)
    ]
    if wrong:
        name, got, wanted = wrong[0]
        raise InputError(
            f"{source} does not fit its config.json: {name} is {tuple(got)}, wanted {tuple(wanted)}"
            f"{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}. Restore the config.json that it "
            f"was written with."
        )
    return model, report


def load_stock(
    cls: Any, source: str | Path, config: PreTrainedConfig, *, new_head: bool = False
) -> Any:
    """A checkpoint of any architecture as a class of transformers, whole below its head.

    Args:
        cls: a class, or an auto class.
        source: hub id or folder.
        config: the checkpoint's.
        new_head: take a head of other sizes than the class's for none: the class's is random then.

    Raises:
        InputError: as `load_class`; or what it lacks is no head.
    """
    model, report = load_class(cls, source, config, new_head=new_head)
    prefix = f"{model.base_model_prefix}."
    headless = not any(key.startswith(prefix) for key in model.state_dict())
    missing = sorted(
        key
        for key in report["missing_keys"]
        if (headless or key.startswith(prefix)) and "pooler" not in key
    )
    if config.model_type in FAMILIES:  # of which more is known
        missing = sorted({*missing, *lost(report["missing_keys"], type(model), config)})
    if missing:
        raise InputError(
            f"{source} lacks {len(missing)} of {type(model).__name__}'s parameters below its head "
            f"({some(missing)}), which would be random. Wanted a whole checkpoint."
        )
    return model


def lost(missing: Iterable[str], cls: Any, config: PreTrainedConfig) -> list[str]:
    """Of the parameters that a checkpoint lacks, those that it should have: all but a new head's.

    Args:
        missing: the names, of ``cls``.
        cls: the class that is loaded.
        config: the checkpoint's. It says from which class it was saved: what that one has, a whole
            checkpoint has. Where that is not known, everything but heads and poolers is wanted. Published
            encoders that call themselves bare often have no pooler, which counts as a head's then.
    """
    names = {name.removeprefix(f"{cls.base_model_prefix}."): name for name in missing}
    if not names:
        return []
    base = stock_class(model_class(config.model_type, "base"))
    saved_as: Any = getattr(transformers, str((config.architectures or [None])[0]), None)
    if not (isinstance(saved_as, type) and issubclass(saved_as, PreTrainedModel)):
        saved_as = base  # the name is the checkpoint's: nothing but a model's class is called by it
    try:
        wanted = _names(saved_as, config)
    except Exception:  # of another kind, or one that cannot be built from this config
        saved_as, wanted = base, _names(base, config)
    wanted = {name.removeprefix(f"{cls.base_model_prefix}.") for name in wanted}
    poolers = {name for name in wanted if name.startswith("pooler.")}
    if saved_as is base and poolers <= names.keys():
        wanted -= poolers
    return sorted(names[name] for name in wanted & names.keys())


def _names(cls: Any, config: PreTrainedConfig) -> set[str]:
    with torch.device("meta"):
        return set(cls(copy.deepcopy(config)).state_dict())


def some(names: list[str] | tuple[str, ...]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


@contextmanager
def reading(source: str | Path) -> Iterator[dict[str, Any]]:
    """A block that reads a checkpoint: whatever its files provoke becomes an `InputError`.

    Yields:
        Settings that say where it is: the cache alone, where the hub cannot be reached.
    """
    where = _where(source)
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with loading(source, "the hub cannot be reached, and this in the cache: " if where else ""):
            yield where
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _where(source: str | Path) -> dict[str, Any]:
    if os.path.isdir(source):
        return {}
    text = os.fspath(source)
    if os.path.exists(source):
        raise InputError(
            f"{source} is a file, wanted a folder with a checkpoint (config.json, weights)."
        )
    path = isinstance(source, Path) or text.startswith((".", "~", os.sep)) or "\\" in text
    if path or text.count("/") > 1 or not text.strip("/ "):
        raise InputError(f"There is no folder {text!r}. Wanted one with a checkpoint, or a hub id.")
    return {"local_files_only": True} if _away() else {}


def _away() -> bool:
    """Whether the hub's name cannot be looked up: asking it would be tried again for half a minute."""
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    if urllib.request.getproxies() or not host:
        return False
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False
