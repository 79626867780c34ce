"""Where the rows of a batch are in a tensor, followed from function to function.

A tensor of the batch has its rows along its first dimension. What functions do to it may move that
dimension (``transpose``), fold it with others (``view(rows * seq, hidden)``), repeat it, or select
entries of it (``x[chosen]``). A layout says where the rows went. It is derived from the function and
its arguments, not from sizes: with as many rows as tokens, heads and features it is the same.

Where no rule is known for a function, and its output has the rows' size in its first dimension, the
layout is a guess, and the recorder has the step checked by a second backward pass (see
`dpzoo.clipping.verification`). Where rows are combined (a mean over the batch), the result is
`Mixed`, and using it with a row or a parameter is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Layout(NamedTuple):
    """Rows along one dimension: entry k of dimension ``dim`` is of row ``(k // inner) % rows``.

    A plain batch dimension has inner = outer = 1; (rows * seq) has inner = seq; (heads * rows) has
    outer = heads.
    """

    dim: int
    outer: int = 1
    inner: int = 1


class Indexed:
    """Rows chosen by index along the first dimension: entry k is of row ``ids[k]``.

    Args:
        ids: row numbers, (entries,).
    """

    __slots__ = ("ids",)
    dim = 0

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Indexed) and (
            self.ids is other.ids or torch.equal(self.ids, other.ids)
        )

    __hash__ = None  # type: ignore[assignment]


class Mixed:
    """Entries that depend on several rows."""

    __slots__ = ("function",)

    def __init__(self, function: str) -> None:
        self.function = function


AnyLayout = Layout | Indexed
Rule = Callable[[int, tuple[Any, ...], dict[str, Any], torch.Tensor, AnyLayout, Any], Any]
"""(rows, args, kwargs, input, its layout, output) -> layout of the output, or of each output."""

FIRST = Layout(0)

SINGLE = Layout(-1000)
"""Of a batch of one row: all entries are its own, whatever dimension they are in."""

MARK = "_dpzoo_rows"
"""Attribute of a tensor that has rows: (number of rows, layout)."""

SAME = "_dpzoo_same"
"""Attribute of a shared tensor: dimensions along which all its entries are equal by construction."""

LOOKED_UP = "_dpzoo_lookup"
"""Attribute of a shared tensor: (table, ids, padding_idx), of which it is the look-up."""


def known(z: torch.Tensor, name: str) -> Any:
    """What `SAME` or `LOOKED_UP` says of a shared tensor; None if it was changed in place since."""
    version, value = getattr(z, name, (-1, None))
    return value if version == z._version else None


def layout_of(tensor: torch.Tensor, rows: int) -> AnyLayout | Mixed | None:
    """The layout of a tensor's rows; None if it has none."""
    mark = getattr(tensor, MARK, None)
    return mark[1] if mark is not None and mark[0] == rows else None


class Unknown(Exception):  # noqa: N818  (control flow, not an error)
    """No rule says where the rows of a function's output are."""


class Mixing(Exception):  # noqa: N818
    """The function combines entries of several rows."""


def row_ids(layout: AnyLayout, size: int, rows: int, device: torch.device) -> torch.Tensor:
    """The row of each entry along the layout's dimension, (size,)."""
    if layout is SINGLE:
        return torch.zeros(size, dtype=torch.long, device=device)
    if isinstance(layout, Indexed):
        return layout.ids
    return torch.arange(size, device=device).div_(layout.inner, rounding_mode="floor") % rows


def indexed(ids: torch.Tensor, rows: int) -> AnyLayout:
    """The layout of entries of the rows ``ids``: a plain one where they are in order and complete."""
    count = len(ids)
    if count and count % rows == 0:
        inner = count // rows
        plain = torch.arange(count, device=ids.device).div_(inner, rounding_mode="floor")
        if torch.equal(ids, plain):
            return Layout(0, 1, inner)
    return Indexed(ids)


def rows_first(x: torch.Tensor, layout: AnyLayout, rows: int) -> torch.Tensor:
    """(rows, ...): the dimension of the rows first, what was folded with it in its old place.

    `Indexed` rows are padded with zeros to the longest row's number of entries: (rows, longest, ...).
    """
    if layout is SINGLE:
        return x.unsqueeze(0)
    if isinstance(layout, Indexed):
        where = places(layout.ids, rows)
        out = x.new_zeros(rows, int(where[1]), *x.shape[1:])
        out[layout.ids, where[0]] = x
        return out
    dim, outer, inner = layout
    if outer == 1:
        if inner == 1:
            return x.unsqueeze(dim + 1).movedim(dim, 0) if dim else x.unsqueeze(1)
        return x.unflatten(dim, (rows, inner)).movedim(dim, 0)
    split = x.unflatten(dim, (outer, rows, inner)).movedim(dim + 1, 0)
    return split.flatten(dim + 1, dim + 2)


def places(ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each entry its place among its row's entries, (entries,), and the longest row's length."""
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=rows)
    starts = counts.cumsum(0) - counts
    where = torch.empty_like(ids)
    where[order] = torch.arange(len(ids), device=ids.device) - starts[ids[order]]
    longest = counts.max() if len(counts) else torch.zeros((), dtype=ids.dtype)
    return where, longest


def shifted(layout: AnyLayout, x: torch.Tensor, out: torch.Tensor) -> AnyLayout:
    """The layout after broadcasting to the output's dimensions, which align from the right."""
    more = out.ndim - x.ndim
    if not more:
        return layout
    if isinstance(layout, Indexed):
        raise Unknown
    return layout._replace(dim=layout.dim + more)


def layout_key(layout: AnyLayout) -> Any:
    """What of a layout does not depend on the batch's sizes."""
    if layout is SINGLE:
        return "one row"
    if isinstance(layout, Indexed):
        return "indexed"
    return (layout.dim, layout.outer > 1, layout.inner > 1)


def per_row(grad: torch.Tensor, layout: AnyLayout, rows: int) -> torch.Tensor:
    """(rows, ...): what was folded with the rows' dimension is summed, to one entry."""
    if isinstance(layout, Indexed):
        out = grad.new_zeros(rows, *grad.shape[1:])
        return out.index_add_(0, layout.ids, grad).unsqueeze(1)
    first = rows_first(grad, layout, rows)
    if layout.inner * layout.outer > 1:
        first = first.sum(layout.dim + 1, keepdim=True)
    return first


def argument(args: Any, kwargs: Any, at: int, names: Sequence[str], default: Any = None) -> Any:
    """An argument of a torch function, by one of its names or by its place."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[at] if len(args) > at else default


def dims_of(value: Any, ndim: int) -> list[int]:
    """A dimension or several of them, counted from 0."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v % ndim if ndim else 0 for v in values]
