"""Per-row gradients of any function: its own vector-Jacobian products, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.functions import tensors_in
from dpzoo.clipping.layouts import AnyLayout, Indexed, Layout, Mixed, layout_key, rows_first
from dpzoo.clipping.recorder import ParameterCall, Recorder, mixing_error
from dpzoo.errors import UnsupportedModelError, first_line

Spot = tuple[int, int | None]
"""Where a tensor is among a call's arguments: its place, and its place in a list there."""


def row_by_row(recorder: Recorder, call: ParameterCall) -> Any:
    """Run a function, and tap its output: per-row gradients are its own vector-Jacobian products."""
    function, func, args, kwargs, row_tensors, shared = call
    rows = recorder.rows
    flat = [*args, *kwargs.values()]
    spots = list(_spots(flat))
    row_spots = [s for s in spots if any(_at(flat, s) is x for x in row_tensors)]
    shared_spots = [s for s in spots if any(_at(flat, s) is z for z in shared)]
    saved = tuple(_at(flat, s) for s in row_spots)
    zs = [_at(flat, s) for s in shared_spots]
    layouts = [recorder.layout_of(x) for x in saved]
    named = ", ".join(map(recorder.owner.name_of, zs))
    _refuse_arguments(call, layouts, named)
    out = func(*args, **kwargs)
    outs = (out,) if isinstance(out, torch.Tensor) else tuple(o for o in out if o is not None)
    if not all(isinstance(o, torch.Tensor) for o in outs):
        raise UnsupportedModelError(
            f"{function.name} of rows of the batch and {named} returns {type(out).__name__}, wanted "
            f"tensors."
        )
    founds = _layouts_of_outputs(recorder, call, out, outs, named)
    recorder.uses.append(
        (function.name, "row by row", *map(recorder.owner.name_of, zs), *map(layout_key, founds))
    )
    smooth = [k for k, o in enumerate(outs) if o.requires_grad]
    replay = _Replay(call, flat, row_spots, shared_spots, smooth, named)

    def record(store: FactorStore, *given: torch.Tensor) -> None:
        grads = [rows_first(given[k], founds[k], rows) for k in smooth]
        kept = [
            rows_first(x, layout, rows)
            for x, layout in zip(given[len(outs) :], layouts, strict=True)
        ]
        samples = replay.gradients(grads, kept, [z.detach() for z in zs])
        for z, sample in zip(zs, samples, strict=True):
            store.add_dense(z, sample)

    tapped = tuple(o.clone() if k in smooth else o for k, o in enumerate(outs))
    tapped = recorder.tap(tapped, record, saved, row_tensors)
    tapped = tapped if isinstance(tapped, tuple) else (tapped,)
    for tensor, layout in zip(tapped, founds, strict=True):
        recorder.mark(tensor, layout)
    if isinstance(out, torch.Tensor):
        return tapped[0]
    rest = iter(tapped)
    return type(out)([None if o is None else next(rest) for o in out])


def _refuse_arguments(call: ParameterCall, layouts: list[AnyLayout], named: str) -> None:
    """Raise for what this way cannot do."""
    function, _, args, kwargs, _, _ = call
    if function.in_place:
        raise UnsupportedModelError(
            f"{function.name} in place, of rows of the batch and {named}, is not supported. Wanted the "
            f"function that makes a new tensor."
        )
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if function.name in ("batch_norm", "native_batch_norm") and training:
        raise mixing_error("batch_norm in training mode")
    if any(isinstance(layout, Indexed) for layout in layouts):
        raise UnsupportedModelError(
            f"{function.name} of rows that were picked by index and {named} is not supported: its "
            f"per-row gradients have no rule. Use linear layers there, or freeze the parameter."
        )


def _layouts_of_outputs(
    recorder: Recorder, call: ParameterCall, out: Any, outs: tuple[torch.Tensor, ...], named: str
) -> list[Layout]:
    function, func, args, kwargs, row_tensors, _ = call
    found = recorder.layout_of_output(function, func, args, kwargs, row_tensors, out)
    founds = found[: len(outs)] if isinstance(found, list) else [found] * len(outs)
    if any(isinstance(layout, Mixed) for layout in founds):
        raise mixing_error(function.name)
    if not all(isinstance(layout, Layout) for layout in founds):
        raise UnsupportedModelError(
            f"{function.name} of {named} gives {[tuple(o.shape) for o in outs]} for {recorder.rows} rows, "
            f"and it is not known where its rows are. Use other functions there, or freeze the parameter."
        )
    return founds


class _Replay(NamedTuple):
    """A call that can be made once more, for one row, with other values for its tensors."""

    call: ParameterCall
    flat: list[Any]
    row_spots: list[Spot]
    shared_spots: list[Spot]
    smooth: list[int]
    """Which of its outputs have a gradient."""
    named: str

    def __call__(self, row_values: Any, z_values: Any) -> tuple[torch.Tensor, ...]:
        values = [list(v) if isinstance(v, (list, tuple)) else v for v in self.flat]
        for (place, inside), value in (
            *zip(self.row_spots, row_values, strict=True),
            *zip(self.shared_spots, z_values, strict=True),
        ):
            if inside is None:
                values[place] = value
            else:
                values[place][inside] = value
        count = len(self.call.args)
        result = self.call.func(
            *values[:count], **dict(zip(self.call.kwargs, values[count:], strict=True))
        )
        results = (
            [result] if isinstance(result, torch.Tensor) else [r for r in result if r is not None]
        )
        return tuple(results[k] for k in self.smooth)

    def gradients(
        self, grads: list[torch.Tensor], kept: list[torch.Tensor], constants: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Per-row gradients of the shared tensors, (rows, ...) each.

        Args:
            grads: of the outputs, (rows, ...).
            kept: the rows' tensors, (rows, ...).
            constants: the shared tensors' values.
        """

        def one(row_grads: Any, row_values: Any) -> Any:
            pull: Any = torch.func.vjp(lambda *z: self(row_values, z), *constants)[1]
            return pull(tuple(row_grads))

        try:
            return list(torch.func.vmap(one, randomness="error")(grads, kept))
        except Exception:  # a function without a rule for vmap: one row after the other
            return self._one_by_one(grads, kept, constants)

    def _one_by_one(self, grads: Any, kept: Any, constants: Any) -> list[torch.Tensor]:
        leaves = [c.clone().requires_grad_() for c in constants]
        each = []
        try:
            with torch.enable_grad():
                for i in range(len(grads[0])):
                    made = self([k[i] for k in kept], leaves)
                    given = [g[i] for g in grads]
                    each.append(torch.autograd.grad(made, leaves, given, allow_unused=True))
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.call.function.name} of {self.named} cannot be run for one row "
                f"({first_line(error)}), so its per-row gradients cannot be computed. Use other "
                f"functions there, or freeze the parameter."
            ) from error
        return [
            torch.stack([torch.zeros_like(c) if g is None else g for g in column])
            for column, c in zip(zip(*each, strict=True), constants, strict=True)
        ]


def _spots(values: list[Any]) -> Iterator[Spot]:
    for k, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield k, None
        elif isinstance(value, (list, tuple)):
            yield from ((k, j) for j, v in enumerate(value) if isinstance(v, torch.Tensor))


def _at(values: list[Any], spot: Spot) -> Any:
    return values[spot[0]] if spot[1] is None else values[spot[0]][spot[1]]


def recurrent(recorder: Recorder, call: ParameterCall) -> Any:
    """``lstm`` and similar functions: the first states have rows in their second dimension."""
    function, _, args, _, row_tensors, shared = call
    if isinstance(args[1], torch.Tensor) and isinstance(args[2], torch.Tensor):
        raise UnsupportedModelError(
            f"{function.name} of packed sequences is not supported: rows of different lengths are in one "
            f"list there. Wanted padded sequences, (rows, seq, features)."
        )
    states = [s for s in tensors_in([args[1]]) if recorder.layout_of(s) is None]
    if not any(s is z for s in states for z in shared):
        for state in states:
            recorder.mark(state, Layout(1))
        row_tensors = [*row_tensors, *states]
    return row_by_row(recorder, call._replace(row_tensors=row_tensors))
