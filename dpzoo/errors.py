"""The errors that dpzoo raises, one class for each kind of trouble.

Every message names the thing, the value got, the value wanted and the next step. All of them are
``ValueError`` too, so that code written against transformers keeps catching what it caught.
"""


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
