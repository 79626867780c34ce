"""One step is one complete Poisson draw, each row once: draws are counted, and steps compared with them.

The accountant assumes that a step took one draw, in which each row was with the sample rate, and added at
most one clipped gradient for it. `Draws` enforces that. The engine's loader counts the rows of each draw,
before a collator or a model can cut, join or drop them. A backward pass with more rows than the draw has
left is refused. A step with fewer rows is refused, too, and so is a draw without a step. That includes
empty draws: if they were skipped, a step's noise would depend on who was drawn.

Parts of one draw add up: several backward passes before the step, or `BatchMemoryManager`. Leaving the
loader early drops an unfinished step.

Where units are drawn (`dpzoo.clipping.units`), the draw also says whose each row is: its rows come unit by
unit. A part takes units whole.

In several processes each rank has its own part of a draw. A unit is whole on one rank: the optimizer
compares what ranks stepped (`dpzoo.clipping.optimizer.DistributedBookKeepingOptimizer`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Sampler

from dpzoo.clipping.units import UnitRows, Units, checked_ids
from dpzoo.errors import InputError

ONE_STEP = "One step takes the rows of one draw, each once"
SAMPLED = 1024  # elements of a long row that are compared


class Draw(NamedTuple):
    """One draw.

    Args:
        rows: how many.
        units: unit -> rows of it, in the order in which they come; None: each row is one.
    """

    rows: int
    units: dict[int, int] | None = None


class Draws:
    """The draws of one engine and optimizer, in the order in which they are handed out.

    Args:
        strict: whether steps are compared with the draws; False where the caller is responsible for them.
        drop: called when what was begun is over: forget its sums.
        dataset: the units that are drawn; None: rows are.
    """

    def __init__(
        self,
        strict: bool,
        drop: Callable[[], None] = lambda: None,
        dataset: UnitRows | None = None,
    ) -> None:
        self.strict, self._drop, self.dataset = strict, drop, dataset
        self._drawn: deque[Draw] = deque()
        self._taken = 0
        self._left: dict[int, int] | None = None  # of the draw's units; None: all of them
        self._named = False  # the coming rows' units, by ids
        self._seen: set[Any] = set()  # ids of the step's units, where the caller answers for them
        self._unnamed = False  # rows of the step came without, there
        self.stepped: tuple[frozenset[Any], bool] = frozenset(), False
        """The units of the last step; and whether rows came without ids, each a unit by itself."""
        self._parts: list[torch.Tensor] = []  # by which rows are seen that share memory
        self._came: dict[int, Counter[int]] = {}  # input: its rows so far, by which copies are seen
        self._columns: list[torch.Tensor] = []  # of the batch that was handed out last
        self._handed: int | None = None
        self._stepped = False  # in this pass

    def restart(self) -> None:
        """A new pass over the loader begins: draws that were not stepped are over."""
        self._drawn.clear()
        self.abandon()
        self._drop()
        self._handed, self._stepped, self._columns = None, False, []

    def end(self) -> None:
        """The pass over the loader is complete.

        Raises:
            InputError: steps were taken in it, and its last batches had none.
        """
        if self.strict and self._stepped and self._handed:
            raise self._refuse(
                f"The pass over the private loader ended with {self._handed} of its last batches passed "
                f"over without a step, wanted a step for each, empty batches too: their noise must not "
                f"depend on who was drawn."
            )

    def abandon(self) -> None:
        """What was taken of the draw does not count, and may be taken again."""
        self._taken, self._left = 0, None
        self._seen.clear()
        self._unnamed = False
        self._parts.clear()
        self._came.clear()

    def _refuse(self, message: str) -> InputError:
        self.abandon()
        self._drop()
        return InputError(f"{message} What was added up is dropped.")

    def begin(self, rows: int, units: dict[int, int] | None = None) -> None:
        """A draw was made, of arguments as `Draw`; it is stepped after those before it."""
        self._drawn.append(Draw(rows, units))

    def hand_out(self, batch: Any) -> None:
        """The loop got the next draw's batch."""
        self._handed = (self._handed or 0) + 1
        leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        self._columns = [
            x for x in leaves if isinstance(x, torch.Tensor) and x.ndim and not x.is_nested
        ]

    def units(self, rows: int, ids: Any = None) -> Units:
        """The units of the rows that a backward pass brings; to be followed by `take` or `abandon`.

        Args:
            rows: how many, those of the loss.
            ids: the ids that came with the batch, (rows,); None: rows come in the order of the draw.

        Raises:
            InputError: a unit of the draw is there in part; ids without a data set of units, or of units
                that the draw does not have.
        """
        names = None if ids is None else checked_ids(ids, rows)
        self._named = names is not None
        if not self.strict:
            again = self._seen.intersection(names or ())
            if again:
                raise self._refuse(
                    f"Rows of {again.pop()!r} came in two parts of one step, wanted all rows of a unit in "
                    f"one backward pass: they are clipped as one."
                )
            self._seen.update(names or ())
            self._unnamed |= names is None and rows > 0
            return Units(range(rows) if names is None else names)
        if self.dataset is None and names is not None:
            raise InputError(
                "backward() got unit_ids, and make_private got none, so that rows are drawn, not units. "
                "Give make_private(unit_ids=...) the ids of all rows of the data set."
            )
        drawn = self._drawn[0].units if self._drawn else None
        if drawn is None or (self._handed or 0) > 1:  # `take` refuses the second
            return Units(range(rows))
        left = dict(drawn) if self._left is None else self._left
        if names is None:
            ends = [0, *accumulate(left.values())]
            if rows > ends[-1]:
                return Units(range(rows))  # `take` refuses them
            labels = [unit for unit, size in left.items() for _ in range(size)][:rows]
            cut = "" if rows in ends else f"of unit {labels[-1]} some of {left[labels[-1]]} rows"
        else:
            assert self.dataset is not None
            labels = [self.dataset.numbers.get(name, -1) for name in names]
            wrong = [
                f"{names.count(name)} rows of {name!r}, which has {left.get(unit, 0)} left"
                for name, unit in dict(zip(names, labels, strict=True)).items()
                if names.count(name) != left.get(unit, 0)
            ]
            cut = "; ".join(wrong[:3])
        if cut:
            raise self._refuse(
                f"A backward pass brought {rows} rows of the draw, and they cut a unit: {cut}. A unit is "
                f"clipped as one, so all its drawn rows go into one backward pass, in the order in which "
                f"the loader has them. Use BatchMemoryManager, which cuts between the units of "
                f"this loader; set max_rows_per_unit; or, if the collator changes the order of rows, have "
                f"it collate their ids and call backward(unit_ids=...)."
            )
        self._left = {unit: size for unit, size in left.items() if unit not in set(labels)}
        return Units(labels)

    def take(self, rows: int, inputs: Sequence[torch.Tensor] = ()) -> None:
        """Rows of the draw come with a backward pass.

        Args:
            rows: how many, those of the loss.
            inputs: the model's inputs, (rows, ...) each, by which rows that come twice are seen: in the
                first one by its memory, in all by their values (copies, and parts on another device),
                where the batch that the loader handed out has such rows.

        Raises:
            InputError: they are more than the draw has left, or came before; or there is no draw.
        """
        if not self.strict:
            return
        if not self._drawn:
            raise InputError(
                f"A backward pass brought {rows} rows, and no draw of the private loader is open. Under "
                f"Poisson sampling the rows of a step must come from the loader that make_private "
                f"returned: iterate it, and take a step for each of its batches. To be responsible for "
                f"the draws yourself, call make_private(poisson_sampling=False)."
            )
        if self._handed is not None and self._handed > 1:
            raise InputError(
                f"{self._handed - 1} of the private loader's batches were passed over without a step, "
                f"wanted a step for each, empty batches too: their noise must not depend on who was drawn."
            )
        if self._came_before(inputs):
            raise self._refuse(
                f"Rows of the draw came twice: a backward pass on rows that had one already. {ONE_STEP}: "
                f"call backward() once for each part of a batch, and optimizer.step() before the next "
                f"batch."
            )
        if self._drawn[0].units and not self._named and self._moved(rows, inputs):
            raise self._refuse(
                "The rows of a backward pass are not in the order of the loader, which says whose each is. "
                "Wanted the batch as it came, or parts of it in its order; or the ids of the rows' units, "
                "in the rows' order: backward(unit_ids=...)."
            )
        if self._taken + rows > self._drawn[0].rows:
            taken, drawn = self._taken, self._drawn[0].rows
            raise self._refuse(
                f"The losses of a step have {taken + rows} rows ({taken} before, {rows} now), and the draw "
                f"has {drawn}. {ONE_STEP}: call optimizer.step() after each batch of the private loader; "
                f"and neither the collator nor the model may cut a row into several (dpzoo counts losses: "
                f"one for each row drawn)."
            )
        self._taken += rows
        self._parts += [x.detach() for x in inputs[:1]]

    def _alike(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What of the batch that was handed out may have the rows of an input; none for all of it."""
        rows = self._drawn[0].rows
        columns = [c for c in self._columns if len(c) == rows and c.dtype == x.dtype]
        alike = [c for c in columns if c.shape[1:] == x.shape[1:]]
        return [] if any(_same(x, c) for c in alike) else alike

    def _moved(self, rows: int, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether inputs have the batch's rows, and not those that come next."""
        here = slice(self._taken, self._taken + rows)
        for x in inputs:
            alike = self._alike(x)
            own = _digests(x) if alike else []
            known = [d for d in map(_digests, alike) if set(own) <= set(d)]
            if known and all(d[here] != own for d in known):
                return True
        return False

    def _came_before(self, inputs: Sequence[torch.Tensor]) -> bool:
        if any(_overlap(x, other) for x in inputs[:1] for other in self._parts):
            return True
        for k, x in enumerate(inputs):
            alike = self._alike(x)
            if not alike:
                continue
            came = self._came.get(k, Counter()) + Counter(_digests(x))
            # A tensor that the loop made or changed has other rows: nothing is known of it.
            known = [c for c in map(Counter, map(_digests, alike)) if came.keys() <= c.keys()]
            if known and not any(came <= c for c in known):
                return True
            self._came[k] = came
        return False

    def finish(self) -> None:
        """The step is taken.

        Raises:
            InputError: rows of the draw are missing.
        """
        self.stepped = frozenset(self._seen), self._unnamed
        self._seen.clear()
        self._unnamed = False
        if not self.strict:
            return
        if not self._drawn:
            raise InputError(
                "optimizer.step() was called, and no draw of the private loader is open. Under Poisson "
                "sampling each step belongs to one batch of the loader that make_private returned. To be "
                "responsible for the draws yourself, call make_private(poisson_sampling=False)."
            )
        drawn, taken = self._drawn[0].rows, self._taken
        if taken != drawn:
            raise self._refuse(
                f"A step came after {taken} rows, and the draw has {drawn}. {ONE_STEP}: every part of the "
                f"batch needs its backward(); a collator or model must not drop or join rows; and a batch "
                f"without rows is stepped like any other."
            )
        self.stepped = frozenset(self._drawn.popleft().units or ()), False
        self._stepped = True
        self.abandon()
        if self._handed is not None:
            self._handed -= 1


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors, both alive, have memory in common."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    return a.data_ptr() < b.data_ptr() + _extent(b) and b.data_ptr() < a.data_ptr() + _extent(a)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether one tensor is the other, or a view of all of it."""
    return (x.shape, x.stride(), x.device) == (y.shape, y.stride(), y.device) and (
        x.data_ptr() == y.data_ptr()
    )


def in_another_order(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether most rows of a forward pass are those of an earlier one, at other places.

    Args:
        before, after: the inputs of the two, (rows, ...) each.
    """
    alike = [
        (a, b)
        for a, b in zip(before, after, strict=False)
        if (a.shape, a.dtype) == (b.shape, b.dtype)
    ]
    if not alike or all(_same(a, b) for a, b in alike):
        return False
    old, new = (list(zip(*map(_digests, part), strict=True)) for part in zip(*alike, strict=True))
    known = set(old)
    moved = sum(row != here and row in known for row, here in zip(new, old, strict=True))
    return 2 * moved > len(new)


def _digests(x: torch.Tensor) -> list[int]:
    """A number for each row, equal for equal rows."""
    flat = x.detach().reshape(len(x), -1)
    flat = flat[:, :: max(1, flat.shape[1] // SAMPLED)].cpu().contiguous()
    return [hash(row.tobytes()) for row in flat.view(torch.uint8).numpy()]


def _extent(x: torch.Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


class CountedSampler(Sampler[list[int]]):
    """A batch sampler whose draws are noted as they are made.

    Args:
        sampler: gives lists of rows, or of units.
        draws: where they are noted.
    """

    def __init__(self, sampler: Any, draws: Draws) -> None:
        self.sampler, self.draws = sampler, draws
        self._rate = getattr(sampler, "sample_rate", None)

    def __iter__(self) -> Iterator[list[int]]:
        self.draws.restart()
        return self._noted()

    def _noted(self) -> Iterator[list[int]]:
        units = self.draws.dataset
        for drawn in self.sampler:
            rate = getattr(self.sampler, "sample_rate", None)
            if rate != self._rate:
                raise InputError(
                    f"The private loader's sampler has sample_rate={rate!r}, wanted {self._rate!r}, which "
                    f"make_private set and the accountant assumes. For another rate call make_private with "
                    f"a data_loader of another batch size."
                )
            sizes = None if units is None else units.draw(drawn)
            self.draws.begin(len(drawn) if sizes is None else sum(sizes.values()), sizes)
            yield drawn if sizes is None else list(sizes)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)


class _CountedLoader(DataLoader[Any]):
    """A loader that says when it hands out a batch."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        draws = self.batch_sampler.draws  # type: ignore[union-attr]

        def handed() -> Iterator[Any]:
            for batch in batches:
                draws.hand_out(batch)
                yield batch
            draws.end()

        return handed()


def count_draws(loader: DataLoader[Any], draws: Draws) -> DataLoader[Any]:
    """Have a loader's draws noted; it is changed in place."""
    # A DataLoader does not allow another sampler or class.
    loader.__dict__["batch_sampler"] = CountedSampler(loader.batch_sampler, draws)
    loader.__class__ = type(type(loader).__name__, (_CountedLoader, type(loader)), {})
    return loader
