"""The unit of privacy: the rows of a user, a document or a household, drawn and clipped as one.

`UnitRows` is a data set seen as units: it is what Poisson sampling draws from. `Units` says which rows of a
batch are of one unit: it is what clipping goes by.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dpzoo.errors import InputError
from dpzoo.factors import EACH, Group
from dpzoo.poisson import rows_of

Choose = Callable[[int, int, int], Sequence[int]]
"""(unit, rows that it has, rows wanted) -> as many places, each set of them equally probable."""


class UnitRows(Dataset[Any]):
    """A data set of units, each of them a list of rows.

    Args:
        dataset: the rows: a length, and rows by index.
        unit_ids: one id for each row, all of one type; or the name of the column that has them. Rows with
            equal ids are one unit.
        max_rows_per_unit: rows of a unit that a draw takes at most; None for all that it has.

    Raises:
        InputError: there is no such column; not one id for each row; an id that is missing (None or
            not-a-number), or of another type; a single unit; a cap below 1.

    Guarantees:
        Where a unit has more rows than the cap, a draw takes a set of them that is uniform, fresh and
        independent of all else: of other units, of other draws, of what the rows hold.
    """

    def __init__(self, dataset: Any, unit_ids: Any, max_rows_per_unit: int | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"unit_ids got a {type(dataset).__name__}, wanted a data set with a length, and rows by "
                f"index: Poisson sampling chooses among all units."
            )
        whole = isinstance(max_rows_per_unit, int) and max_rows_per_unit >= 1
        if max_rows_per_unit is not None and not whole:
            raise InputError(
                f"max_rows_per_unit={max_rows_per_unit!r}, wanted a whole number above 0, or None for all "
                f"rows of a unit."
            )
        self.dataset, self.most = dataset, max_rows_per_unit
        ids = _column(dataset, unit_ids) if isinstance(unit_ids, str) else unit_ids
        ids = checked_ids(ids, len(dataset))
        self.numbers: dict[Hashable, int] = {}
        self.rows: list[list[int]] = []
        for row, own in enumerate(ids):
            number = self.numbers.setdefault(own, len(self.rows))
            if number == len(self.rows):
                self.rows.append([])
            self.rows[number].append(row)
        if len(self.rows) < 2:
            raise InputError(
                f"unit_ids has {len(self.rows)} unit in {len(dataset)} rows, wanted at least 2: no draw "
                f"hides the only one. Is it the column that tells whose a row is?"
            )

    def __len__(self) -> int:
        """Units."""
        return len(self.rows)

    def size(self, unit: int) -> int:
        """Rows of a unit that a draw takes."""
        return min(len(self.rows[unit]), self.most or len(self.rows[unit]))

    def draw(self, units: Sequence[int]) -> dict[int, int]:
        """Unit -> rows of it in the draw, in the order in which they come: equal ones together."""
        return {unit: self.size(unit) for unit in sorted(units, key=self.size)}

    def chosen(self, unit: int, choose: Choose | None = None) -> list[int]:
        """The rows of a unit in a draw.

        Args:
            unit: its number.
            choose: makes the choice; by default with the operating system's random numbers.
        """
        own, size = self.rows[unit], self.size(unit)
        if size == len(own):
            return own
        places = (
            secrets.SystemRandom().sample(range(len(own)), size)
            if choose is None
            else choose(unit, len(own), size)
        )
        return [own[place] for place in sorted(places)]

    def __getitem__(self, unit: int) -> list[Any]:
        """The rows of a unit, as a draw takes them."""
        return self.__getitems__([unit])

    def __getitems__(self, units: list[int]) -> list[Any]:
        """The rows of a draw, unit by unit."""
        return rows_of(self.dataset, [row for unit in units for row in self.chosen(unit)])


def unit_terms(units: UnitRows | None) -> dict[str, Any]:
    """Name -> value of what is the same on all ranks: units are shared out by number; None: rows are."""
    digest = hashlib.sha256()
    if units is not None:
        for own, rows in zip(units.numbers, units.rows, strict=True):
            digest.update(repr((own, rows)).encode())
    return {
        "units": None if units is None else len(units),
        "digest of unit_ids": None if units is None else digest.hexdigest()[:16],
        "max_rows_per_unit": None if units is None else units.most,
    }


class Units:
    """Which rows of a batch are of one unit.

    Args:
        labels: one for each row; rows with equal labels are one unit.
    """

    def __init__(self, labels: Sequence[Hashable]) -> None:
        rows: dict[Hashable, list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        numbers = {label: number for number, label in enumerate(rows)}
        self.count = len(rows)
        self.of_rows = torch.tensor([numbers[label] for label in labels], dtype=torch.long)
        """The number of each row's unit, (rows,); units are numbered as they come."""
        self.sizes = torch.tensor([len(own) for own in rows.values()], dtype=torch.long)
        """Rows of each unit, (units,)."""
        by_size: dict[int, list[Hashable]] = {}
        for label, own in rows.items():
            by_size.setdefault(len(own), []).append(label)
        self.groups = [
            Group(
                _index([numbers[label] for label in own]),
                _index([row for label in own for row in rows[label]]),
                size,
            )
            for size, own in sorted(by_size.items())
        ]
        if self.count == len(labels):
            self.groups = [EACH]

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(units,) -> (rows,): to each row what its unit has."""
        return values[self.of_rows.to(values.device)]

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Rows' losses, (rows,), so scaled that those of a unit add up to their mean."""
        if self.groups[0] is EACH:
            return losses
        return losses / self.to_rows(self.sizes.to(losses.device))

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """(units,) -> for each group what its units have."""
        return [values if g is EACH else values[g.units] for g in self.groups]

    def merged(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        out = parts[0].new_empty(self.count)
        for group, part in zip(self.groups, parts, strict=True):
            out[group.units] = part
        return out


def unit_loader(
    loader: DataLoader[Any], unit_ids: Any, max_rows_per_unit: int | None
) -> DataLoader[Any]:
    """A loader whose batches have ``loader.batch_size`` units; arguments as `UnitRows`."""
    sampler: Any = loader.batch_sampler
    return DataLoader(
        UnitRows(loader.dataset, unit_ids, max_rows_per_unit),
        batch_size=sampler.batch_size,
        drop_last=sampler.drop_last,
        collate_fn=loader.collate_fn,
        **{
            name: getattr(loader, name)
            for name in (
                *("num_workers", "pin_memory", "timeout", "worker_init_fn", "generator"),
                *("multiprocessing_context", "prefetch_factor", "persistent_workers"),
            )
        },
    )


def keyed_choice(key: int, step: int) -> Choose:
    """The choice of a unit's rows in a step, by a secret key: a function of key, step and unit alone.

    `dpzoo.integrations.batches.PoissonBatches` draws from the same generator, with 0 where ``unit + 1`` is.
    """

    def choose(unit: int, have: int, want: int) -> list[int]:
        numbers = np.random.Philox(key=key, counter=[0, 0, unit + 1, step])
        return np.random.Generator(numbers).choice(have, want, replace=False).tolist()

    return choose


def _column(dataset: Any, name: str) -> Any:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, (list, tuple)):
        if name in columns:
            return dataset[name]
    else:
        row = dataset[0] if len(dataset) else None
        columns = list(row) if isinstance(row, Mapping) else []
        if name in columns:
            return [dataset[k][name] for k in range(len(dataset))]
    raise InputError(
        f"The data set has no column {name!r} to tell units by; it has {', '.join(columns) or 'none'}. "
        f"Wanted one of them, or a sequence of ids, one for each row."
    )


def checked_ids(ids: Any, rows: int) -> list[Hashable]:
    """The ids of so many rows, as Python's own values; errors as of `UnitRows`."""
    if not hasattr(ids, "__iter__") or isinstance(ids, (Mapping, Set)):
        got = type(ids).__name__ if hasattr(ids, "__iter__") else repr(ids)
        raise InputError(
            f"unit_ids={got}, wanted a sequence of ids, one for each row, in their order."
        )
    plain = [_plain(own) for own in ids]
    if len(plain) != rows:
        raise InputError(f"unit_ids has {len(plain)} ids for {rows} rows, wanted one for each row.")
    kinds = {type(v).__name__: k for k, v in reversed(list(enumerate(plain)))}
    for k, own in enumerate(plain):
        if own is None or _unequal(own):
            raise InputError(
                f"unit_ids has {own!r} for row {k}, wanted the id of a unit for each row. Whose a row is "
                f"that nobody owns? Leave it out, or give it an id of its own."
            )
        if not isinstance(own, Hashable):
            raise InputError(
                f"unit_ids has a {type(own).__name__} for row {k}, wanted numbers or texts, (rows,)."
            )
    if len(kinds) > 1:
        found = " and ".join(f"{kind} (row {k})" for kind, k in sorted(kinds.items()))
        raise InputError(
            f"unit_ids has ids of {found}, wanted ids of one type: 7 and '7' would be two units."
        )
    return plain


def _plain(value: Any) -> Any:
    """A number of torch's or numpy's as Python's; a longer tensor or array as a list."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _unequal(value: Any) -> bool:
    """Whether a value is unlike itself, as what stands for a missing one is."""
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA
        return True


def _index(places: list[int]) -> torch.Tensor | slice:
    """As a slice if they follow one another: what it takes of a tensor is a view."""
    if places == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return torch.tensor(places, dtype=torch.long)
