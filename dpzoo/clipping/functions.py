"""Torch functions by name: which only look at a tensor, which change one, which have rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dpzoo.clipping.layout_rules import PERMUTING, RULES, elementwise


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FIRST_ONLY = _words("type_as view_as reshape_as expand_as to broadcast_to")
"""Functions that take their values from the first argument alone."""


class Function:
    """What is known of a torch function.

    Args:
        name: without underscores.
        in_place: whether it changes its first argument.
    """

    __slots__ = ("in_place", "name", "permuting", "rule", "simple")

    def __init__(self, name: str, in_place: bool) -> None:
        self.name, self.in_place = name, in_place
        self.permuting = name in PERMUTING
        self.rule = RULES.get(name)
        self.simple = (
            self.rule is elementwise and not in_place and name not in FIRST_ONLY and name != "where"
        )


PLAIN = Function("plain", False)
"""Functions that look at a tensor and give none: shapes, dtypes, numbers."""


PLAIN_NAMES = _words(
    """
    shape dtype device requires_grad is_leaf grad_fn ndim is_cuda is_cpu layout is_sparse is_quantized
    is_meta is_nested is_mps is_xla is_xpu name names output_nr nbytes itemsize version base
    backward_hooks grad size dim numel nelement stride storage_offset is_floating_point is_complex
    is_contiguous element_size len item tolist bool int index repr str format hash get_device ndimension
    data_ptr untyped_storage storage is_inference is_signed is_same_size result_type broadcast_shapes
    allclose equal is_tensor is_nonzero retain_grad retains_grad set_grad_enabled is_pinned
    can_cast is_conj is_neg is_shared volatile numpy array reduce_ex deepcopy dir contains requires_grad_
    is_coalesced sym_size sym_numel sym_stride register_post_accumulate_grad_hook is_autocast_enabled
    """
)

FUNCTIONS: dict[Any, Function] = {}


def resolve(func: Any) -> Function:
    """What is known of a torch function, looked up once."""
    name = getattr(func, "__name__", "") or str(func)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        entry = (
            Function(name, False)
            if name in ("T", "mT", "H", "mH", "data", "real", "imag")
            else PLAIN
        )
    elif name in ("__set__", "__delete__"):
        entry = PLAIN
    else:
        bare = name.strip("_")
        item = name == "__setitem__"
        in_place = (
            item
            or (name.endswith("_") and not name.endswith("__"))
            or (
                name.startswith("__i")
                and bare[1:]
                in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
            )
        )
        if name.startswith("__i") and in_place:
            bare = bare[1:]
        plain = bare in PLAIN_NAMES and not in_place
        if name in ("__int__", "__float__", "__bool__", "__index__", "__len__", "__complex__"):
            plain = True
        elif bare in ("int", "float", "bool"):
            plain = False
        entry = PLAIN if plain else Function(bare, in_place)
    FUNCTIONS[func] = entry
    return entry


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among values, in lists and tuples too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
