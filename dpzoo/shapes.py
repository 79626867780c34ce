"""What the tensors of a forward pass look like, and the error of one that does not.

Shapes and dtypes are known on the host. Ranges need the values: they are read on the CPU, and on a GPU
under `torch.autograd.detect_anomaly` alone, because reading them there makes the host wait. They are not
read where a program is traced.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dpzoo.errors import InputError

IDS = (torch.int64, torch.int32)
"""What an embedding can look up."""

Shape = Sequence[int | str]
"""Sizes; a name stands for any size."""


def check(
    name: str,
    value: Any,
    *shapes: Shape,
    dtypes: Sequence[torch.dtype] | None = IDS,
    high: int | None = None,
    ignored: int | None = None,
    of: str = "",
    advice: str = "",
) -> None:
    """Raise unless a tensor is what an argument can be.

    Args:
        name: the argument.
        value: what was given.
        *shapes: those that it may have; none given, any.
        dtypes: those that it may have; None for the floating ones.
        high: values are whole numbers from 0 to less than this; None for any.
        ignored: one more value that is allowed.
        of: the class or function, for the message.
        advice: the next step.

    Raises:
        InputError: it is not; with the value got and the value wanted.
    """
    what = f"{of} got {name}" if of else name
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{what} of type {type(value).__name__}, wanted a tensor. {advice}".rstrip()
        )
    if dtypes is None and not value.is_floating_point():
        raise InputError(f"{what} of dtype {value.dtype}, wanted a floating one. {advice}".rstrip())
    if dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(f"{what} of dtype {value.dtype}, wanted {wanted}. {advice}".rstrip())
    if shapes and not any(_fits(value.shape, shape) for shape in shapes):
        wanted = " or ".join(shown(shape) for shape in shapes)
        raise InputError(
            f"{what} of shape {tuple(value.shape)}, wanted {wanted}. {advice}".rstrip()
        )
    if high is not None and _readable(value):
        with torch._C.DisableTorchFunction():
            wrong = _outside(value.detach(), high, ignored)
        if wrong is not None:
            also = "" if ignored is None else f", or {ignored}"
            raise InputError(
                f"{what} with the value {wrong}, wanted 0 to {high - 1}{also}. {advice}".rstrip()
            )


def shown(shape: Shape) -> str:
    """A shape as it is written: (3, seq)."""
    return f"({', '.join(str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def _fits(got: Sequence[int], wanted: Shape) -> bool:
    return len(got) == len(wanted) and all(
        isinstance(b, str) or a == b for a, b in zip(got, wanted, strict=True)
    )


def _outside(value: torch.Tensor, high: int, ignored: int | None) -> int | None:
    """A value that is out of range, or None."""
    low, top = (int(end) for end in torch.aminmax(value))
    if low >= 0 and top < high:
        return None
    outside = value[(value < 0) | (value >= high)]
    if ignored is not None:
        outside = outside[outside != ignored]
    return int(outside[0]) if outside.numel() else None


def _readable(value: torch.Tensor) -> bool:
    """Whether to read values: there are some, here, and they are no placeholders of a transformation."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and math.prod(value.shape) > 0
        and (value.device.type == "cpu" or (value.is_cuda and torch.is_anomaly_enabled()))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
