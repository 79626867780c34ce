"""The keys and values of earlier tokens: one argument and one output, under two names.

transformers 5.24 renamed ``past_key_values`` to ``cache``, in arguments and in outputs. The zoo's models
take both names with every version, and show and return the one that the installed version has.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

from dpzoo.errors import InputError

CACHE_NAMES = ("cache", "past_key_values")
"""The argument's names, the newest first; forward passes here are written with that one."""

CACHE: str = next(
    name
    for name in CACHE_NAMES
    if name in {field.name for field in fields(BaseModelOutputWithPast)}
)
"""The name that the installed transformers has."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a forward pass with an argument ``cache`` take it under each of its names.

    Returns:
        The method. `inspect.signature`, by which callers find out about a model, gives the parameter
        the installed version's name.

    Raises:
        InputError: from the method, when both names are given.
    """

    @functools.wraps(forward)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            if kwargs.get("cache") is not None:
                raise InputError(
                    f"{type(self).__name__}.forward() got cache and past_key_values, two names of one "
                    f"argument. Pass one of them."
                )
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(name=CACHE) if parameter.name == "cache" else parameter
        for parameter in signature.parameters.values()
    ]
    named.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return named
