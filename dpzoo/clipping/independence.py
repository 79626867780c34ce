"""Whether what a row computes changes when other rows do: the model is run on batches that were changed.

Backward passes show what gradients flow between rows (`dpzoo.clipping.verification`), and layouts where
torch functions that are known combine rows. A value may pass them both by: a statistic of the batch without
a gradient, in a function without a rule, in numpy, or read by Python. So before a forward pass the model is
run on the batch, without gradients and dropout and with the same random numbers, and on batches in which
some rows are kept and the others replaced by copies of them, or left out. What the kept rows give must
stay.

Several batches are tried before the first pass. Of any two rows, but for few, one is kept in one of them
while the other is replaced. Later some at random are, before the passes 2, 4, 8 and so on, and after a pass
with a use that is new.

A model that gives something else when it is run again is not compared, nor one that draws other random
numbers for other rows, or raises on a changed batch. Where any are drawn, no rows are left out.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dpzoo.clipping.layouts import FIRST, Indexed, Layout, Mixed, layout_of, row_ids
from dpzoo.clipping.recorder import INDEXING, Recorder

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Of a difference, relative to a tensor's largest value; 0.05 for other dtypes, and under autocast. It is
above what other shapes of a matrix product (experts that get other rows) change by rounding."""


DROPOUT = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
    )
)


class Probe(Recorder):
    """The mode of a run that is compared: rows are marked, and nothing is dropped."""

    def __init__(self, owner: Any, rows: int) -> None:
        super().__init__(owner, rows, lambda recorder, call: None)  # never called: no gradients

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, without dropout."""
        name = getattr(func, "__name__", "").strip("_")
        if name in DROPOUT:
            return args[0] if args else (kwargs or {})["input"]
        if name == "scaled_dot_product_attention":
            args, kwargs = (*args[:4], *([0.0] * len(args[4:5])), *args[5:]), dict(kwargs or {})
            kwargs.pop("dropout_p", None)
        return super().__torch_function__(func, types, args, kwargs)


Change = Callable[[torch.Tensor], torch.Tensor]


def dependent_outputs(
    run: Callable[[Change, int], list[torch.Tensor]],
    rows: int,
    device: torch.device,
    *,
    first: bool,
    autocast: bool,
) -> set[int]:
    """Which outputs give a row something else when other rows are changed.

    Args:
        run: runs the model in a `Probe` of so many rows, with a function for each tensor of the batch that
            has its rows in front; gives the tensors of the output.
        rows: of the batch, two or more.
        device: of the model, whose random numbers are kept.
        first: whether this is the first pass.
        autocast: whether values are rounded to fewer bits than their dtype has.
    """
    before = _random_state(device)

    def made(change: Change, count: int) -> tuple[list[torch.Tensor], Any]:
        _restore(before, device)
        try:
            return run(change, count), _key(_random_state(device))
        except (
            Exception
        ):  # it cannot take such a batch, or any: then the pass itself says what is wrong
            return [], None

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base, after = made(_same, rows)
            drawn = after != _key(before)
            for kept in _halves(rows, first):
                for source in [_sources(kept, rows), kept][: 1 if drawn else 2]:
                    places = torch.tensor(source)
                    other, left = made(lambda x, p=places: x[p.to(x.device)], len(source))  # type: ignore[misc]
                    if not base or left != after:
                        continue
                    wrong = _unequal(base, other, kept, source, rows, autocast)
                    if wrong:
                        again = made(_same, rows)[0]
                        every = list(range(rows))
                        return wrong - _unequal(base, again, every, every, rows, autocast)
    finally:
        _restore(before, device)
    return set()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _halves(rows: int, first: bool) -> Iterator[list[int]]:
    """Rows that are kept, for each batch that is tried."""
    if not first:
        yield sorted(random.SystemRandom().sample(range(rows), (rows + 1) // 2))
        return
    ways = [[k % 2 for k in range(rows)], [int(2 * k >= rows) for k in range(rows)]]
    for way in ways[: 1 if rows == 2 else 2]:
        for side in (0, 1):
            yield [k for k in range(rows) if way[k] == side]


def _sources(kept: list[int], rows: int) -> list[int]:
    """For each row, the row whose values it gets."""
    own = set(kept)
    return [k if k in own else kept[k % len(kept)] for k in range(rows)]


def _unequal(
    base: list[torch.Tensor],
    other: list[torch.Tensor],
    kept: list[int],
    source: list[int],
    rows: int,
    autocast: bool,
) -> set[int]:
    """Which tensors have other values at the places of the rows that were kept.

    Args:
        base: of the batch.
        other: of the rows ``source``.
        kept: rows that are at their place in it, or all that it has.
        source: see ``other``.
        rows: of the batch.
        autocast: as of `dependent_outputs`.
    """
    wrong = set()
    for k, (a, b) in enumerate(zip(base, other, strict=False)):
        layout = layout_of(a, rows)
        unseen = layout is None or (isinstance(layout, Mixed) and layout.function in INDEXING)
        if unseen and a.ndim and len(a) == rows:
            layout = FIRST
        if not isinstance(layout, (Layout, Indexed)) or not a.numel():
            continue
        ids = row_ids(layout, a.shape[layout.dim], rows, a.device)
        here = torch.isin(ids, torch.tensor(kept, device=a.device)).nonzero()[:, 0]
        one = a.detach().index_select(layout.dim, here)
        two = b.detach()
        if len(source) == rows:
            if a.shape != b.shape:
                continue
            two = two.index_select(layout.dim, here)
        if one.shape == two.shape and not _alike(one, two, autocast):
            wrong.add(k)
    return wrong


def _alike(a: torch.Tensor, b: torch.Tensor, autocast: bool) -> bool:
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    tolerance = 0.05 if autocast else TOLERANCE.get(a.dtype, 0.05)
    finite = a.isfinite() & b.isfinite()
    odd = ~finite & (a != b) & ~(a.isnan() & b.isnan())
    if bool(odd.any()):
        return False
    a, b = a[finite], b[finite]
    return not a.numel() or float((a - b).abs().max()) <= tolerance * float(a.abs().max())


# --- random numbers -------------------------------------------------------------------------------------


def _random_state(device: torch.device) -> list[Any]:
    """Torch's, Python's and numpy's; and the device's."""
    state = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    if device.type not in ("cpu", "meta"):
        state.append(torch.get_device_module(device).get_rng_state(device))
    return state


def _restore(state: list[Any], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
    for own in state[3:]:
        torch.get_device_module(device).set_rng_state(own, device)


def _key(state: list[Any]) -> Any:
    tensors = [x.cpu().numpy().tobytes() for x in state if isinstance(x, torch.Tensor)]
    return (*tensors, state[1], state[2][1].tobytes(), state[2][2:])
