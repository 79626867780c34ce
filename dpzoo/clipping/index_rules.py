"""Where the rows are when entries are indexed, cut out or joined: ``x[...]``, ``split``, ``cat``.

Rules as in `dpzoo.clipping.layout_rules`. Indexed entries may be of any rows, in any number and order; the
layout is then an `Indexed`, unless the rows are in order and complete.
"""

from __future__ import annotations

from typing import Any

import torch

from dpzoo.clipping.layouts import (
    AnyLayout,
    Indexed,
    Layout,
    Mixing,
    Rule,
    Unknown,
    argument,
    indexed,
    layout_of,
    row_ids,
)


def repeats_entries(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """``repeat_interleave``: each entry several times."""
    dim = argument(args, kwargs, 2, ("dim",))
    times = argument(args, kwargs, 1, ("repeats",))
    if dim is None:
        raise Unknown
    if dim % x.ndim != layout.dim:
        return layout
    if isinstance(times, torch.Tensor):
        if layout.dim:
            raise Unknown
        return indexed(row_ids(layout, x.shape[0], n, x.device).repeat_interleave(times), n)
    if isinstance(layout, Indexed):
        return Indexed(layout.ids.repeat_interleave(times))
    return layout._replace(inner=layout.inner * times)


def parts(at: int) -> Rule:
    """``split``, ``chunk``, ``narrow``: a part, or several, along a dimension."""

    def rule(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
        dim = argument(args, kwargs, at, ("dim",), 0) % x.ndim
        if dim != layout.dim:
            return layout
        pieces = out if isinstance(out, (tuple, list)) else [out]
        whole = n * getattr(layout, "inner", 1)
        if isinstance(layout, Indexed) or any(p.shape[dim] % whole for p in pieces):
            return _cut(n, layout, x, dim, out)
        made = [layout._replace(outer=piece.shape[dim] // whole) for piece in pieces]
        return made if isinstance(out, (tuple, list)) else made[0]

    return rule


def _cut(n: int, layout: AnyLayout, x: torch.Tensor, dim: int, out: Any) -> Any:
    if dim or not isinstance(out, (tuple, list)):
        raise Mixing
    ids = row_ids(layout, x.shape[0], n, x.device)
    return [indexed(part, n) for part in ids.split([piece.shape[0] for piece in out])]


def narrow(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """A range along a dimension."""
    dim = argument(args, kwargs, 1, ("dim",)) % x.ndim
    start = argument(args, kwargs, 2, ("start",))
    if dim != layout.dim or out.shape[dim] == x.shape[dim]:
        return layout
    return index(
        n, (x, (slice(None),) * dim + (slice(start, start + out.shape[dim]),)), {}, x, layout, out
    )


def unbind(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``unbind`` and ``select``: a dimension disappears."""
    dim = argument(args, kwargs, 1, ("dim",), 0) % x.ndim
    if dim == layout.dim:
        raise Mixing
    if dim > layout.dim:
        return layout
    assert isinstance(layout, Layout)
    return layout._replace(dim=layout.dim - 1)


def index(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``x[...]``."""
    if x is not args[0]:  # an index
        if layout_of(args[0], n) is not None:
            return None
        if args[1] is x:
            return layout
        raise Unknown
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    items = tuple(torch.as_tensor(i, device=x.device) if isinstance(i, list) else i for i in items)
    used = sum(
        (i.ndim if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1)
        for i in items
        if i is not None and i is not Ellipsis
    )
    if Ellipsis in [i if i is None or i is Ellipsis else 0 for i in items]:
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items = items[:at] + (slice(None),) * (x.ndim - used) + items[at + 1 :]
    else:
        items = items + (slice(None),) * (x.ndim - used)
    dim, before, tensors, advanced = 0, 0, [], []
    # before: dimensions of the output so far, those of tensor indices left out
    found: Any = None
    for item in items:
        if item is None:
            before += 1
            continue
        if isinstance(item, torch.Tensor) and item.dtype == torch.bool:
            advanced.append((dim, before, item))
            tensors.append(item)
            dim += item.ndim
            continue
        if isinstance(item, torch.Tensor) and item.ndim:
            advanced.append((dim, before, item))
            tensors.append(item)
        elif isinstance(item, slice):
            if dim == layout.dim:
                found = (before, item)
            before += 1
        elif dim == layout.dim:
            raise Mixing  # one entry of the rows' dimension, for all
        dim += 1
    if found is not None:
        place, part = found
        kept = range(*part.indices(x.shape[layout.dim]))
        if advanced:
            spread = _adjacent(items)
            first = advanced[0][1] if spread else 0
            width = max(1 if t.dtype == torch.bool else t.ndim for t in tensors)
            if not spread or first <= place:
                place += width
        if len(kept) == x.shape[layout.dim] and kept.step == 1:
            if isinstance(layout, Indexed):
                if place:
                    raise Unknown
                return layout
            return layout._replace(dim=place)
        if isinstance(layout, Layout) and kept.step == 1:
            whole = n * layout.inner
            if kept.start % whole == 0 and len(kept) % whole == 0 and len(kept):
                return Layout(place, len(kept) // whole, layout.inner)
            if kept.step == 1 and layout.inner > 1 and layout.outer == 1 and n == 1:
                return Layout(place, 1, len(kept))
        if place:
            raise Unknown
        ids = row_ids(layout, x.shape[layout.dim], n, x.device)
        return indexed(ids[part], n)
    return _indexed_by(n, x, layout, advanced, items)


def _adjacent(items: tuple[Any, ...]) -> bool:
    at = [k for k, i in enumerate(items) if isinstance(i, (torch.Tensor, int))]
    tensors = [k for k in at if isinstance(items[k], torch.Tensor)]
    return bool(tensors) and at[-1] - at[0] + 1 == len(at)


def _indexed_by(n: int, x: torch.Tensor, layout: AnyLayout, advanced: Any, items: Any) -> Any:
    ids = row_ids(layout, x.shape[layout.dim], n, x.device)
    shape: tuple[int, ...] = ()
    chosen: torch.Tensor | None = None
    for dim, _, item in advanced:
        if item.dtype == torch.bool:
            for offset, place in enumerate(item.nonzero(as_tuple=True)):
                if dim + offset == layout.dim:
                    chosen = ids[place]
                shape = torch.broadcast_shapes(shape, place.shape)
        else:
            if dim == layout.dim:
                chosen = ids[item]
            shape = torch.broadcast_shapes(shape, item.shape)
    if chosen is None:
        raise Unknown
    place = advanced[0][1] if _adjacent(items) else 0
    chosen = chosen.broadcast_to(shape)
    if len(shape) == 1 and place == 0:
        return indexed(chosen, n)
    return _folded(chosen, place, n)


def _folded(chosen: torch.Tensor, place: int, n: int) -> Layout:
    """The layout of entries whose rows are ``chosen``, of several dimensions: rows along one of them."""
    for dim in range(chosen.ndim):
        size = chosen.shape[dim]
        if size % n == 0 and size:
            plain = torch.arange(size, device=chosen.device).div_(size // n, rounding_mode="floor")
            view = plain.view(-1, *(1,) * (chosen.ndim - dim - 1))
            if torch.equal(chosen, view.expand_as(chosen)):
                return Layout(place + dim, 1, size // n)
    raise Unknown


def shifted_to(layout: AnyLayout, dim: int) -> AnyLayout:
    """The layout of a vector whose entries become those of a dimension."""
    if isinstance(layout, Indexed):
        if dim:
            raise Unknown
        return layout
    return layout._replace(dim=dim)


def index_select(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """Entries along a dimension by number."""
    chosen = argument(args, kwargs, 2, ("index",))
    if x is chosen:
        if layout_of(args[0], n) is not None:
            return None
        return shifted_to(layout, argument(args, kwargs, 1, ("dim",)) % args[0].ndim)
    dim = argument(args, kwargs, 1, ("dim",)) % x.ndim
    if dim != layout.dim:
        return layout
    if dim:
        raise Unknown
    return indexed(row_ids(layout, x.shape[0], n, x.device)[chosen], n)


def gather(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """Entries along a dimension by number, at each place of the others."""
    at = 2 if len(args) > 1 and isinstance(args[1], torch.Tensor) else 1  # take_along_dim
    dim = argument(args, kwargs, at, ("dim",))
    if dim is None or dim % x.ndim == layout.dim:
        raise Mixing
    return layout


def concatenated(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """``cat``: along the rows' dimension copies of whole batches, or along another."""
    pieces = argument(args, kwargs, 0, ("tensors",))
    dim = argument(args, kwargs, 1, ("dim", "axis"), 0) % x.ndim
    if dim != layout.dim:
        return layout
    own = [layout_of(piece, n) for piece in pieces]
    if any(not isinstance(each, (Layout, Indexed)) or each.dim != dim for each in own):
        raise Mixing
    if len({getattr(each, "inner", None) for each in own}) == 1 and isinstance(layout, Layout):
        return layout._replace(outer=out.shape[dim] // (n * layout.inner))
    if dim:
        raise Unknown
    known = [each for each in own if isinstance(each, (Layout, Indexed))]
    ids = [row_ids(e, len(p), n, x.device) for e, p in zip(known, pieces, strict=True)]
    return indexed(torch.cat(ids), n)
