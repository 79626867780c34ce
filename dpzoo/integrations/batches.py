"""Logical batches: Poisson samples, cut into parts, each a function of the number of its step.

A run that was killed and resumed does its last steps again. It must do the same steps again: with the
same noise and another batch, another mask or another dropout, the difference between the weights of the
two runs would be a difference of gradients without any noise. So nothing here has a state that could
run ahead or fall behind: rows, collation and dropout of step t follow from a key and from t.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dpzoo.errors import InputError

PROBE_ROWS = 64


class PoissonBatches(Sampler[list[int]]):
    """Batches in which every row is with probability ``sample_rate``, independently of all else.

    Args:
        rows: rows of the data set.
        sample_rate: the probability, in (0, 1].
        steps: batches in an epoch.
        key: 128 bits, secret. Step t takes its numbers from the Philox generator with this key whose
            counter begins at t * 2^192, so that no two steps share one. None takes fresh ones from the
            operating system, every time.
        current_step: gives the number of steps done so far, read when an epoch begins.

    Guarantees:
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
    ) -> None:
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
            yield [step, *self.draw(step)]

    def __len__(self) -> int:
        return self.steps


class LogicalBatches(Dataset[Any]):
    """A data set whose batches come collated, in parts of at most ``physical`` rows.

    Args:
        dataset: the rows.
        collate: a list of rows -> a dict of tensors.
        physical: rows that a part has at most.
        seed: of what loading and collating draw from Python's, numpy's and torch's global generators.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], physical: int, seed: int
    ) -> None:
        self.dataset, self.collate, self.physical, self.seed = dataset, collate, physical, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: list[int]) -> dict[str, Any]:
        """``{"step": number, "parts": [collated, ...]}``; an empty batch has no parts."""
        step, *indices = batch
        with seeded(self.seed, step, 0):
            cuts = range(0, len(indices), self.physical)
            chunks = [indices[start : start + self.physical] for start in cuts]
            return {"step": step, "parts": [self.collate(self._rows(chunk)) for chunk in chunks]}

    def _rows(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[index] for index in indices]

    def fingerprint(self) -> str:
        """A digest of a few rows, spread over the data set, as they come collated for step 0."""
        probe = np.linspace(0, len(self) - 1, min(PROBE_ROWS, len(self))).astype(int).tolist()
        digest = hashlib.sha256()
        _feed(digest, self.__getitems__([0, *probe]))
        return digest.hexdigest()

    def reproducible(self, known: dict[str, str] | None) -> dict[str, str]:
        """See to it that steps can be done again; the rows' fingerprint, for a checkpoint to hold.

        Args:
            known: the fingerprint of the run that is resumed, or None.

        Raises:
            InputError: rows are not the same the second time, or not those of the run that is resumed.
        """
        found = {"fingerprint": self.fingerprint()}
        if known is None and self.fingerprint() != found["fingerprint"]:
            raise InputError(
                "train_dataset or data_collator gave other values for the same rows the second time. "
                "Wanted the same, or values random by Python's, numpy's or torch's global generator, "
                "which DPTrainer seeds for each step: no generator, and no seed, of their own."
            )
        if known not in (None, found):
            raise InputError(
                "train_dataset or data_collator gives other rows than in the run that is resumed. Steps "
                "done again with the same noise and other rows would show gradients without noise. "
                "Resume with the same data, or train a new model from the checkpoint's weights: the two "
                "runs' epsilons then add up."
            )
        return found


def batch_key(seed: int | None) -> int:
    """128 bits for `PoissonBatches`, from the operating system, or from a seed (of the noise, too)."""
    if seed is None:
        return secrets.randbits(128)
    low, high = np.random.SeedSequence([seed, 2]).generate_state(2, np.uint64).tolist()
    return int(high << 64 | low)


def identity(batch: Any) -> Any:
    """The collator of batches that come collated."""
    return batch


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators from the numbers, and restore them after."""
    seeds = np.random.SeedSequence(numbers).generate_state(3)
    before = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        torch.manual_seed(int(seeds[2]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "items"):
        for key, item in sorted(value.items()):
            digest.update(str(key).encode())
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())
