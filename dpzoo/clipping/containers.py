"""The tensors in what a model or a criterion is given, and gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments: in lists, tuples, mappings and dataclasses too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_of(vars(value))


def mapped(
    change: Callable[[torch.Tensor], torch.Tensor],
    value: Any,
    rest: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A value with other tensors: in lists, tuples, mappings (which model outputs are), dataclasses too.

    Args:
        change: of a tensor.
        value: with tensors in it.
        rest: of what is neither a tensor nor such a container.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(change, item, rest) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(mapped(change, item, rest) for item in value)
    data = is_dataclass(value) and not isinstance(value, type)
    if not data and not isinstance(value, Mapping):
        return rest(value)
    made: Any = copy.copy(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            made[key] = mapped(change, item, rest)
    # Of dpzoo's outputs: the rows' losses.
    for key, item in getattr(value, "__dict__", {}).items():
        object.__setattr__(made, key, mapped(change, item, rest))
    return made
