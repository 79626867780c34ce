"""Logical batches: Poisson samples, cut into parts, each a function of a secret key and its step's number.

A run that was killed and resumed does its last steps again. With the same rows, masks and dropout it takes
the same steps, which cost nothing: so rows, collation and dropout of step t follow from a key and from t.
The key is secret and random. To whoever does not have it, the dropout of a row and the mask that a
collator gives it are as good as fresh: they are independent of which other rows the batch has, and of
everything that is published. With a public seed they would not be: taking a row out of the batch would
change, in a known way, the randomness of the rows after it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from dpzoo.clipping.units import UnitRows, keyed_choice
from dpzoo.poisson import rows_of, seeded


class PoissonBatches(Sampler[list[int]]):
    """Batches in which every row is with probability ``sample_rate``, independently of all else.

    Args:
        rows: rows of the data set; or units, which are drawn in the same way.
        sample_rate: the probability, in (0, 1].
        steps: batches in an epoch.
        key: 128 bits, secret. Step t takes its numbers from the Philox generator with this key whose
            counter begins at t * 2^192, so that no two steps share one. None takes fresh ones from the
            operating system, every time.
        current_step: gives the number of steps done so far, read when an epoch begins.
        rank: of this process: it gets every ``ranks``-th row of each draw.
        ranks: processes that draw alike, with one key.

    Guarantees:
        The rows that all ranks have of a step are the draw of one process, each once.
        The batch of step t is drawn for step t alone. In a resumed epoch the first batches are those
        that were taken before, for the loop to pass over.
    """

    def __init__(
        self,
        rows: int,
        sample_rate: float,
        steps: int,
        key: int | None,
        current_step: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.rows, self.sample_rate, self.steps, self.key = rows, sample_rate, steps, key
        self._current_step = current_step
        self._began = False

    def draw(self, step: int) -> list[int]:
        """The rows of a step, in the data set's order; there may be none."""
        if self.key is None:
            bits = np.frombuffer(os.urandom(8 * self.rows), dtype=np.uint64) >> np.uint64(11)
            uniform = bits * 2.0**-53
        else:
            # Counter: four words of 64 bits, the highest last.
            numbers = np.random.Philox(key=self.key, counter=[0, 0, 0, step])
            uniform = np.random.Generator(numbers).random(self.rows)
        return np.flatnonzero(uniform < self.sample_rate).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """Batches as lists of the step's number, and then the rows' indices."""
        first = self._current_step()
        if not self._began:  # Trainer passes over the part of this epoch that is done already
            first -= first % self.steps
            self._began = True
        for step in range(first, first + self.steps):
            yield [step, *self.draw(step)[self.rank :: self.ranks]]

    def __len__(self) -> int:
        return self.steps


class LogicalBatches(Dataset[Any]):
    """A data set whose batches come collated, in parts of at most ``physical`` rows, of whole units.

    Rows of like length share a part, so that little of it is padding. No sum depends on how a draw is cut.

    Args:
        dataset: the rows, or the units, of which none has more than ``physical`` rows.
        collate: a list of rows -> a dict of tensors.
        physical: rows that a part has at most.
        key: secret; what loading and collating draw from Python's, numpy's and torch's global generators
            follows from it, from the step's number and from the rank; which rows of a unit are taken, from
            the key and the step.
        rank: of this process.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        physical: int,
        key: int,
        rank: int = 0,
    ) -> None:
        self.dataset, self.collate, self.physical, self.key = dataset, collate, physical, key
        self.rank = rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: list[int]) -> dict[str, Any]:
        """``{"step": number, "rows": drawn, "units": as `Draw` has them, "parts": [collated, ...]}``.

        An empty batch has no parts.
        """
        step, *drawn = batch
        of, units = self.dataset, None
        chosen = [[index] for index in drawn]
        if isinstance(of, UnitRows):
            units, choose = of.draw(drawn), keyed_choice(self.key, step)
            chosen, of = [of.chosen(unit, choose) for unit in units], of.dataset
        sizes: list[int] = []
        for own in chosen:
            if not sizes or sizes[-1] + len(own) > self.physical:
                sizes.append(0)
            sizes[-1] += len(own)
        with seeded(self.key, step, 2 * self.rank):
            rows = rows_of(of, [index for own in chosen for index in own])
            if units is None:  # a unit's rows stay together
                rows.sort(key=_length)
            rest = iter(rows)
            parts = [self.collate(list(itertools.islice(rest, size))) for size in sizes]
        return {"step": step, "rows": sum(map(len, chosen)), "units": units, "parts": parts}


def _length(row: Any) -> int:
    """Tokens of a row; 0 if it does not say."""
    try:
        return len(row["input_ids"])
    except (TypeError, KeyError, IndexError):
        return 0


def batch_key(seed: int | None) -> int:
    """128 bits for `PoissonBatches`, from the operating system, or from a seed (of the noise, too)."""
    if seed is None:
        return secrets.randbits(128)
    low, high = np.random.SeedSequence([seed, 2]).generate_state(2, np.uint64).tolist()
    return int(high << 64 | low)


class Without:
    """A collator that does not see a column.

    Args:
        column: its name.
        collate: a list of rows -> a batch.
    """

    def __init__(self, column: str, collate: Callable[[list[Any]], Any]) -> None:
        self.column, self.collate = column, collate

    def __call__(self, rows: list[Any]) -> Any:
        return self.collate([{k: v for k, v in row.items() if k != self.column} for row in rows])


def identity(batch: Any) -> Any:
    """The collator of batches that come collated."""
    return batch


@contextlib.contextmanager
def true_banner(physical: int, logical: int) -> Iterator[None]:
    """Have Trainer's banner tell the batches that there are: its loop takes a logical batch for one."""
    lines = {
        "  Instantaneous batch size per device": f"  Rows in memory at a time = {physical:,}",
        "  Total train batch size": f"  Rows of a logical batch (Poisson, expected) = {logical:,}",
        "  Gradient Accumulation steps": "  Parts of a logical batch (on average) = "
        f"{math.ceil(logical / physical):,}",
    }

    def corrected(record: logging.LogRecord) -> bool:
        told = str(record.msg)
        record.msg = next(
            (line for begin, line in lines.items() if told.startswith(begin)), record.msg
        )
        return True

    banner = logging.getLogger("transformers.trainer")
    banner.addFilter(corrected)
    try:
        yield
    finally:
        banner.removeFilter(corrected)
