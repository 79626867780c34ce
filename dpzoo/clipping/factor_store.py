"""What one backward pass records: each parameter's uses as factors, the units' norms, weighted sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dpzoo.clipping import layouts
from dpzoo.clipping.autograd_graph import walk
from dpzoo.clipping.units import Units
from dpzoo.factors import (
    DenseGrads,
    EmbeddingFactors,
    GradFactors,
    LayerInput,
    LinearFactors,
    inner_product,
    total_squared_norm,
    upcast,
)

CANCELLED = 1e-3
"""A row's squared norm is computed once more in float64 where rounding may be more of it than this.

Below it the bound stands for the norm, and a row is clipped to less than C by up to half of this. In
float32 a row of t unrelated positions is at 3.5e-7 t, and opposing positions are above it at any length.
"""


class Region(NamedTuple):
    """A part of a parameter: offset, sizes and strides in its memory, strides falling."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that is as the parameter is."""
        return x.as_strided(self.sizes, self.strides, x.storage_offset() + self.offset)


class Uses:
    """The uses of one region of a parameter by the units of one group; its rows here are units."""

    def __init__(self) -> None:
        self.factors: list[GradFactors] = []
        self.squared: torch.Tensor | None = None
        self.magnitude: torch.Tensor | None = None

    def add(self, use: GradFactors) -> None:
        """Add a use, and update the squared norms."""
        squared, magnitude = use.squared_norm()
        if self.squared is None:
            self.squared, self.magnitude = squared, magnitude
            self.factors.append(use)
            return
        whole = magnitude if magnitude is not None else squared.sqrt()
        before = self.magnitude if self.magnitude is not None else self.squared.clamp(min=0).sqrt()
        self.magnitude = whole + before
        for other in self.factors:
            squared = squared + 2 * inner_product(*_same_shape(other, use))
        self.squared = self.squared + squared
        last = self.factors[-1]
        if isinstance(use, DenseGrads) and isinstance(last, DenseGrads):
            self.factors[-1] = DenseGrads(last.grads + use.grads.reshape(last.grads.shape))
        else:
            self.factors.append(use)

    def recompute(self, rows: torch.Tensor) -> None:
        """Compute the squared norms of some rows in float64."""
        assert self.squared is not None
        exact = total_squared_norm([use.select(rows).double() for use in self.factors])
        self.squared = self.squared.clone()
        self.squared[rows] = exact.clamp(min=0).to(self.squared.dtype)


class FactorStore:
    """The gradient factors of every use that the backward pass reaches, with norms and weighted sums.

    Args:
        rows: rows of the batch.
        parameters: those that are trained.
        units: which rows are clipped as one.

    What is added is of rows; norms, and the weights of a sum, are of units.
    """

    def __init__(self, rows: int, parameters: list[torch.Tensor], units: Units) -> None:
        self.rows = rows
        self.units = units
        self._parameters = {id(p): p for p in parameters}
        self._uses: dict[torch.Tensor, dict[Region | None, list[Uses]]] = {}
        self._split: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._input: tuple[Any, LayerInput] | None = None

    # --- adding uses ----------------------------------------------------------------------------

    def add_dense(self, z: torch.Tensor, grads: torch.Tensor) -> None:
        """Add per-row gradients of a shared tensor.

        Args:
            z: a parameter, or a tensor that comes from parameters alone.
            grads: (rows, *z.shape).
        """
        grads = upcast(grads.detach())
        parameter, region = self._locate(z)
        if parameter is None:
            self._add_computed(z, grads)
            return
        if z is not parameter:
            grads = grads.permute(0, *(d + 1 for d in _dims_by_stride(z)))
        shape = parameter.shape if region is None else region.sizes
        self.add(parameter, DenseGrads(grads.reshape(self.rows, *shape)), region)

    def add_linear(
        self,
        z: torch.Tensor,
        grads: torch.Tensor,
        x: torch.Tensor,
        layout: Any,
        transposed: bool,
    ) -> None:
        """Add a linear layer's use of its weight.

        Args:
            z: the weight, (out, in), or (in, out) if ``transposed``; further dimensions belong to in.
            grads: of the output, (rows, positions, out).
            x: the input, in its own layout, features last.
            layout: of x.
            transposed: the weight is (in, out).
        """
        parameter, region = self._locate(z)
        order = list(range(z.ndim)) if parameter is None or parameter is z else _dims_by_stride(z)
        if z.ndim == 2 and order == [1, 0]:
            transposed = not transposed
        elif order != list(range(z.ndim)):
            parameter = None
        grads = upcast(grads)
        shared = self._input_of(x, layout)
        if parameter is None:
            dense = torch.matmul(grads.transpose(1, 2), shared.positions)
            dense = dense.transpose(1, 2) if transposed else dense
            self._add_computed(z, dense.reshape(self.rows, *z.shape))
            return
        if transposed:
            use = LinearFactors(shared.positions, LayerInput(grads))
        else:
            use = LinearFactors(grads, shared)
        self.add(parameter, use, region)

    def add_embedding(
        self,
        z: torch.Tensor,
        ids: torch.Tensor,
        grads: torch.Tensor,
        padding: int | None,
    ) -> None:
        """Add an embedding's use of its table.

        Args:
            z: the table, (size, ...).
            ids: (rows, positions).
            grads: of the looked-up vectors, (rows, positions, features).
            padding: the id whose vector gets no gradient, or None.
        """
        grads = upcast(grads)
        if padding is not None:
            grads = grads.masked_fill((ids == padding % z.shape[0]).unsqueeze(-1), 0)
        use = EmbeddingFactors(ids, grads, z.shape[0])
        parameter, region = self._locate(z)
        if parameter is None or (parameter is not z and _dims_by_stride(z) != list(range(z.ndim))):
            self.add_dense(z, use.dense().reshape(self.rows, *z.shape))
            return
        self.add(parameter, use, region)

    def add(self, parameter: torch.Tensor, use: GradFactors, region: Region | None = None) -> None:
        """Add a use of a parameter, or of a region of it, and update its norms."""
        regions = self._uses.setdefault(parameter, {})
        if region not in regions:
            regions[region] = [Uses() for _ in self.units.groups]
        for group, uses in zip(self.units.groups, regions[region], strict=True):
            uses.add(use.joined(group))

    def _input_of(self, x: torch.Tensor, layout: Any) -> LayerInput:
        """A linear layer's input, shared with the layer before in the backward pass if it is its too."""
        if self._input is None or self._input[0] != layout or not self._input[1].is_of(x):
            self._release_input()
            self._input = layout, LayerInput(x, layouts.rows_first(x, layout, self.rows))
        return self._input[1]

    def _release_input(self) -> None:
        if self._input is not None:
            self._input[1].release()
        self._input = None

    # --- tensors that come from parameters ------------------------------------------------------

    def _locate(self, z: torch.Tensor) -> tuple[torch.Tensor | None, Region | None]:
        """The parameter that z is or is a view of, and the region if it is a part of it; else two None."""
        if id(z) in self._parameters:
            return z, None
        base = z._base
        if base is None or id(base) not in self._parameters or base.dtype != z.dtype:
            return None, None
        order = _dims_by_stride(z)
        sizes = tuple(z.shape[d] for d in order)
        strides = tuple(z.stride(d) for d in order)
        if not base.is_contiguous() or _overlaps_itself(sizes, strides):
            return None, None
        offset = int(z.storage_offset() - base.storage_offset())
        if z.numel() == base.numel():  # the whole of it, in another shape or transposed
            return base, None
        return base, Region(offset, sizes, strides)

    def _add_computed(self, z: torch.Tensor, grads: torch.Tensor) -> None:
        kept = self._computed.get(id(z))
        self._computed[id(z)] = (z, grads if kept is None else kept[1] + grads)

    def resolve_computed(self) -> None:
        """Turn per-row gradients of computed tensors into such of their parameters."""
        while self._computed:
            _, (z, grads) = self._computed.popitem()
            looked_up = layouts.known(z, layouts.LOOKED_UP)
            if looked_up is not None and id(looked_up[0]) in self._parameters:
                table, ids, padding = looked_up
                ids = ids.reshape(1, -1).expand(self.rows, -1)
                spread = grads.reshape(self.rows, ids.shape[1], -1)
                self.add_embedding(table, ids, spread, padding)
                continue
            leaves = self._leaves(z)
            if not leaves:
                continue
            with torch.enable_grad():
                for leaf, grad in zip(leaves, _per_row_vjp(z, leaves, grads), strict=True):
                    if grad is not None:
                        self.add_dense(leaf, grad)

    def _leaves(self, z: torch.Tensor) -> list[torch.Tensor]:
        ids = (id(getattr(node, "variable", None)) for node in walk(z.grad_fn))
        return [self._parameters[key] for key in dict.fromkeys(ids) if key in self._parameters]

    # --- norms and sums -------------------------------------------------------------------------

    def squared_norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """Parameter -> squared norms of its units' gradients, (units,), as far as any were reached.

        Guarantees:
            Upper bounds that hold under rounding, of what `weighted_sum` adds up.
        """
        self._release_input()
        self.resolve_computed()
        for parameter, regions in self._uses.items():
            if len(regions) > 1 and _overlap(parameter, list(regions)):
                columns = zip(*regions.values(), strict=True)
                self._uses[parameter] = {
                    None: [_merged(parameter, dict(zip(regions, c, strict=True))) for c in columns]
                }
        by_kind: dict[Any, list[Uses]] = {}
        for regions in self._uses.values():
            for groups in regions.values():
                for k, uses in enumerate(groups):
                    assert uses.squared is not None
                    kind = k, uses.squared.device, uses.squared.dtype
                    by_kind.setdefault(kind, []).append(uses)
        bounds: dict[int, torch.Tensor] = {}
        for group in by_kind.values():
            bounds.update(zip(map(id, group), _upper_bounds(group).unbind(), strict=True))
        norms: dict[torch.Tensor, torch.Tensor] = {}
        for parameter, regions in self._uses.items():
            each = [self.units.merged([bounds[id(u)] for u in g]) for g in regions.values()]
            norms[parameter] = each[0] if len(each) == 1 else torch.stack(each).sum(0)
        return norms

    def weighted_uses(
        self, parameter: torch.Tensor, weights: torch.Tensor
    ) -> list[tuple[GradFactors, torch.Tensor]]:
        """A parameter's uses, each with the weights of its units; none where they are of parts of it."""
        regions = self._uses[parameter]
        if list(regions) != [None]:
            return []
        groups = zip(regions[None], self.units.split(weights), strict=True)
        return [(use, own) for uses, own in groups for use in uses.factors]

    def weighted_sum(
        self,
        parameter: torch.Tensor,
        weights: torch.Tensor,
        kept: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        *,
        forget: bool = True,
    ) -> torch.Tensor:
        """A weighted sum of a parameter's units, on top of ``total``; they are then forgotten.

        Args:
            parameter: a parameter that the backward pass reached.
            weights: clip factors, (units,).
            kept: True for the units that take part, (units,); None for all. What the others hold
                (not-a-numbers, say) is not looked at.
            total: the sum so far, changed in place; None for none.
            forget: False keeps the units for another sum.
        """
        regions = self._uses.pop(parameter) if forget else self._uses[parameter]
        if self._split is None or self._split[0] is not weights:  # parameters share what is scaled
            self._split = weights, self.units.split(weights)
        here = [None] * len(self._split[1]) if kept is None else self.units.split(kept)
        for region, groups in regions.items():
            if region is not None and total is None:
                dtype = groups[0].factors[0].grads.dtype
                total = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            for uses, own, taken in zip(groups, self._split[1], here, strict=True):
                own = own if taken is None else own[taken]
                factors = uses.factors if not forget else uses.factors[::-1]
                for k in range(len(factors)):
                    use = factors.pop() if forget else factors[k]
                    use = use if taken is None else use.select(taken)
                    scale = own.to(use.grads.dtype)
                    if region is None:
                        total = _added(total, use, scale, parameter.shape)
                    else:
                        assert total is not None
                        view = region.of(total)
                        view += use.add_to(None, scale).reshape(view.shape)
        assert total is not None  # a parameter that was reached has a use
        return total


def _upper_bounds(group: list[Uses]) -> torch.Tensor:
    """Squared norms that hold under rounding, (uses, rows); see `dpzoo.factors`.

    Where the rounding may be a good part of a squared norm, it is computed once more in float64.
    """
    zeros = torch.zeros_like(group[0].squared)  # type: ignore[arg-type]
    squared = torch.stack([uses.squared for uses in group])  # type: ignore[misc]
    magnitude = torch.stack([zeros if u.magnitude is None else u.magnitude for u in group])
    unit = torch.finfo(squared.dtype).eps / 2
    rounding = 4 * unit * magnitude.square()
    doubtful = rounding > CANCELLED * squared
    if bool(doubtful.any()):
        for uses, rows in zip(group, doubtful, strict=True):
            if bool(rows.any()):
                uses.recompute(rows)
        squared = torch.stack([uses.squared for uses in group])  # type: ignore[misc]
    return ((squared.clamp(min=0) + rounding).sqrt() + 2 * unit * magnitude).square()


def _added(
    total: torch.Tensor | None, use: GradFactors, weights: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    if total is None:
        return use.add_to(None, weights).reshape(shape)
    use.add_to(total.view(shape_of(use)), weights)
    return total


def shape_of(use: GradFactors) -> tuple[int, ...]:
    """The shape of a row's gradient."""
    if isinstance(use, LinearFactors):
        return use.grads.shape[-1], use.inputs.shape[-1]
    if isinstance(use, EmbeddingFactors):
        return use.size, use.grads.shape[-1]
    return tuple(use.grads.shape[1:])


def _same_shape(a: GradFactors, b: GradFactors) -> tuple[GradFactors, GradFactors]:
    """Two uses in one shape, so that they have an inner product."""
    if shape_of(a) == shape_of(b):
        return a, b
    if not isinstance(a, DenseGrads) and not isinstance(b, DenseGrads):
        a = DenseGrads(a.dense())
    if isinstance(a, DenseGrads):
        return DenseGrads(a.grads.reshape(-1, *shape_of(b))), b
    assert isinstance(b, DenseGrads)
    return a, DenseGrads(b.grads.reshape(-1, *shape_of(a)))


def _merged(parameter: torch.Tensor, regions: dict[Region | None, Uses]) -> Uses:
    """Uses of regions that overlap, as gradients of the whole parameter."""
    first = next(iter(regions.values())).factors[0].grads
    total = first.new_zeros(len(first), *parameter.shape)
    for region, uses in regions.items():
        for use in uses.factors:
            for row, grad in zip(total, use.dense(), strict=True):
                place = row if region is None else region.of(row)
                place += grad.reshape(place.shape)
    whole = Uses()
    whole.add(DenseGrads(total))
    return whole


def _dims_by_stride(z: torch.Tensor) -> list[int]:
    """Dimensions of a tensor in the order of falling strides; those of one entry keep their place."""
    strides: tuple[int, ...] = z.stride()
    order = sorted((d for d in range(z.ndim) if z.shape[d] > 1), key=lambda d: -strides[d])
    return [order.pop(0) if z.shape[d] > 1 else d for d in range(z.ndim)]


def _overlaps_itself(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a view may have one entry of the memory at two places: an expanded one, windows."""
    reach = 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


_OVERLAPS: dict[Any, bool] = {}


def _overlap(parameter: torch.Tensor, regions: list[Region | None]) -> bool:
    """Whether two of a parameter's regions have an entry in common."""
    if None in regions:
        return True
    key = (tuple(parameter.shape), frozenset(regions))
    if key not in _OVERLAPS:
        taken = torch.zeros(parameter.numel(), dtype=torch.bool)
        _OVERLAPS[key] = False
        for region in regions:
            assert region is not None
            place = taken.as_strided(region.sizes, region.strides, region.offset)
            if bool(place.any()):
                _OVERLAPS[key] = True
                break
            place.fill_(True)
    return _OVERLAPS[key]


def _per_row_vjp(
    z: torch.Tensor, leaves: list[torch.Tensor], grads: torch.Tensor
) -> list[torch.Tensor | None]:
    """Per-row gradients of the leaves from such of z: one batched vector-Jacobian product."""
    grads = grads.to(z.dtype)
    pull: Callable[..., Any] = torch.autograd.grad
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        return list(pull(z, leaves, grads, is_grads_batched=True, **options))
    except RuntimeError:  # a function without a rule for vmap: one row after the other
        each = [pull(z, leaves, grad, **options) for grad in grads]
        return [
            None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)
        ]
