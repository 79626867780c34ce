"""The errors that dpzoo raises, one class for each kind of trouble.

Every message names the thing, the value got, the value wanted and the next step. All of them are
``ValueError`` too, so that code written against transformers keeps catching what it caught.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def first_line(error: BaseException) -> str:
    """What an error says first, without its full stop, to be a part of a sentence; its type, if nothing."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200].rstrip(". ") or type(error).__name__


class DpzooError(Exception):
    """Base class of every error that dpzoo raises on purpose."""


class UnsupportedConfigError(DpzooError, ValueError):
    """A config field asks for something that the class cannot honour."""


class UnsupportedModelError(DpzooError, ValueError):
    """A model, family, task or class that dpzoo does not know how to handle."""


class ConversionError(DpzooError, ValueError):
    """Parameters that do not correspond one to one between a stock model and the dpzoo model."""


class InputError(DpzooError, ValueError):
    """Arguments of a forward pass that are missing, contradictory or out of range."""


class RankError(DpzooError, RuntimeError):
    """Another process of a distributed run died, froze, failed or is at another place."""


@contextmanager
def loading(source: Any, note: str = "", *, as_stock: bool = False) -> Iterator[None]:
    """A block that has transformers load a checkpoint: what its files provoke becomes an `InputError`.

    Args:
        source: the checkpoint, for the message.
        note: what stands before the reason.
        as_stock: leave transformers' own words: OSError for files that are not there, ImportError for a
            package, ValueError for an argument or a config, RuntimeError for shapes.
    """
    try:
        yield
    except DpzooError:
        raise
    except BaseException as error:
        # The tokenizers' and safetensors' own panics are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or "no message"
        known = isinstance(error, OSError | ImportError) or type(error) is ValueError
        if as_stock and (known or "ignore_mismatched_sizes" in reason):
            raise
        raise InputError(
            f"{source} cannot be loaded by transformers ({type(error).__name__}): {note}{reason}"
        ) from error
