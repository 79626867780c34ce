"""Checkpoints in, by transformers' own loader: hub, cache, offline mode, shards, old key names.

``save_pretrained`` and ``push_to_hub`` need nothing here: they are transformers' own, over a state
dict that has the stock names and layouts.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dpzoo.errors import UnsupportedModelError, loading
from dpzoo.models.base import PerSampleModel
from dpzoo.models.fields import CONFIG_ARGUMENTS, read_fields, refuse_sizes
from dpzoo.registry import FAMILIES, class_by_name, list_models, model_class


def from_pretrained(name_or_path: Any, task: str | None = None, **kwargs: Any) -> PerSampleModel:
    """Load a checkpoint as a dpzoo model.

    The stock class is loaded by transformers and converted in memory; layouts that agree are shared,
    so the peak is one model, plus one layer for GPT-2.

    Args:
        name_or_path: hub id or local folder.
        task: one of the family's tasks in `dpzoo.list_models`; None takes the class that the
            checkpoint was saved from (``config.architectures``).
        **kwargs: everything that `transformers.PreTrainedModel.from_pretrained` takes: revision,
            token, cache_dir, local_files_only, dtype, attn_implementation, config overrides such as
            num_labels, ``output_loading_info``, ...

    Returns:
        The model, in eval mode; with ``output_loading_info=True``, a pair of it and transformers'
        report.

    Raises:
        UnsupportedModelError: a family, task or saved class that dpzoo does not have.
        UnsupportedConfigError: a config field that the class cannot honour, or a size that no model has.
        InputError: a file that is damaged, or weights of which the class has none.
        OSError: transformers cannot find or read the checkpoint.
    """
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        where = {key: kwargs[key] for key in CONFIG_ARGUMENTS if key in kwargs}
        place = name_or_path if config is None else config
        read_fields(place, **where)
        with loading(place, as_stock=True):
            config = AutoConfig.from_pretrained(place, **where)
    return _class_for(config, task, str(name_or_path)).from_pretrained(name_or_path, **kwargs)


def from_config(
    config: PreTrainedConfig | str, task: str | None = None, **kwargs: Any
) -> PerSampleModel:
    """Build a model with freshly initialised weights.

    Args:
        config: a transformers config, or a hub id or folder to read one from.
        task: as in `from_pretrained`.
        **kwargs: with a name, config overrides and loading arguments; with a config, ``dtype`` and
            ``attn_implementation``.

    Returns:
        The model, in training mode, as from its constructor.

    Raises:
        UnsupportedModelError: as `from_pretrained`.
    """
    build = {key: kwargs.pop(key) for key in ("dtype", "attn_implementation") if key in kwargs}
    if not isinstance(config, PreTrainedConfig):
        name = str(config)
        refuse_sizes(name, {**read_fields(config, **kwargs), **kwargs})
        config = AutoConfig.from_pretrained(config, **kwargs)
    elif kwargs:
        raise UnsupportedModelError(
            f"dpzoo.from_config got {', '.join(sorted(kwargs))} beside a config. Wanted dtype or "
            f"attn_implementation: set the others on the config itself."
        )
    else:
        name = type(config).__name__
    return _class_for(config, task, name)._from_config(config, **build)


def refuse_unknown_family(family: Any, name: str) -> None:
    """Raise `UnsupportedModelError` for what is none of the zoo's families."""
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} is of the family {family!r}. Wanted one of: {', '.join(FAMILIES)}."
        )


def _class_for(config: PreTrainedConfig, task: str | None, name: str) -> type[PerSampleModel]:
    family = config.model_type
    refuse_unknown_family(family, name)
    if task is not None:
        return model_class(family, task)
    saved_as = (config.architectures or [None])[0]
    if saved_as is None:
        raise UnsupportedModelError(
            f"{name} does not say which class it was saved from (config.architectures is "
            f"{config.architectures!r}). Pass task=, one of: {', '.join(list_models()[family])}."
        )
    try:
        return class_by_name(saved_as)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{name} was saved from {saved_as}, which dpzoo does not have. Pass task=, one of: "
            f"{', '.join(list_models()[family])}."
        ) from error
