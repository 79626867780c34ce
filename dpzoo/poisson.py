"""What Poisson sampling needs of a data loader beyond what Opacus gives it."""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from opacus.data_loader import CollateFnWithEmpty
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch.utils.data import DataLoader

from dpzoo.errors import InputError


def rows_of(dataset: Any, indices: list[int]) -> list[Any]:
    """Rows of a data set, read at once where it can."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(indices))
    return [dataset[index] for index in indices]


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


def rows_digest(dataset: Any) -> str | None:
    """A hash of 16 rows, by which ranks see whether they have the same rows in one order.

    None if rows come out differently when they are read again.
    """
    last = len(dataset) - 1
    places = sorted({round(last * k / 15) for k in range(16)}) if last >= 0 else []

    def once() -> str:
        digest = hashlib.sha256()
        with seeded(0):
            for row in rows_of(dataset, places):
                _enter(digest, row)
        return digest.hexdigest()[:16]

    first = once()
    return first if once() == first else None


def _enter(digest: Any, value: Any) -> None:
    """What a row holds, entered into a hash; of other than numbers, texts and their containers the type."""
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=repr)
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.array(value)) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(
            repr((value.dtype, value.shape)).encode() + plain.view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, (list, tuple)):
        digest.update(b"[")
        for one in value:
            _enter(digest, one)
        digest.update(b"]")
    elif isinstance(value, (str, bytes, int, float, bool)) or value is None:
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__name__.encode())


class LockstepSampler(DistributedUniformWithReplacementSampler):
    """Opacus' Poisson sampler of several processes, with the empty batches left in.

    Opacus' own passes over the steps in which a rank draws no row. That rank is then ahead of the
    others: gradients of different steps are added up, and at the end of the epoch the others wait
    for it in vain.

    Guarantees:
        Every rank has ``len(self)`` batches an epoch, and every row of its share is in each of them
        with probability ``sample_rate``, independently.
    """

    def __iter__(self) -> Iterator[list[int]]:
        rows = torch.arange(self.total_size)
        if self.shuffle:  # the same permutation on all ranks, of which each takes its share
            seed = self.shuffle_seed + self.epoch
            rows = torch.randperm(self.total_size, generator=torch.Generator().manual_seed(seed))
        share = rows[self.rank :: self.num_replicas]
        for _ in range(self.num_batches):
            drawn = torch.rand(len(share), generator=self.generator) < self.sample_rate
            yield share[drawn].tolist()


def prime_empty_batches(loader: DataLoader[Any], example: Any = None) -> DataLoader[Any]:
    """Let a Poisson loader begin with an empty batch.

    Opacus' loader learns what an empty batch looks like from the first batch that is not. If the
    very first draw of a run is empty (with probability exp(-expected batch size), and more often in
    small tests), rows that are dicts, as transformers' collators take them, give a ``TypeError``.
    Call this once on the loader that ``make_private`` returned.

    With several processes it also replaces Opacus' sampler by a `LockstepSampler`: Opacus' leaves empty
    batches out. Every rank has to draw its rows with another seed than the others: seed them apart,
    or not at all, before training begins.

    Args:
        loader: the Poisson loader from Opacus; changed in place.
        example: any collated batch; by default, the first row of the data set, collated. Only its
            keys, dtypes and shapes are used, the latter with 0 rows.

    Returns:
        The same loader.

    Raises:
        InputError: the loader is not Opacus' Poisson loader.
    """
    collate = loader.collate_fn
    if not isinstance(collate, CollateFnWithEmpty):
        raise InputError(
            f"prime_empty_batches got a {type(loader).__name__} whose batches cannot be empty, wanted "
            f"the loader that PrivacyEngine.make_private(poisson_sampling=True) returns."
        )
    if collate.first_batch is None:
        if example is None:
            example = collate(rows_of(loader.dataset, [0]))
        collate.first_batch = example
    if type(loader.batch_sampler) is DistributedUniformWithReplacementSampler:
        # A DataLoader does not allow another sampler, and a LockstepSampler has the same attributes.
        loader.batch_sampler.__class__ = LockstepSampler
    return loader
