"""Loaders for Poisson sampling: the sampler that keeps several processes in step."""

import os
from typing import Any

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch.utils.data import DataLoader, TensorDataset

import dpzoo
from dpzoo.poisson import LockstepSampler, rows_digest

ROWS, PROCESSES, RATE = 41, 3, 1 / 20


@pytest.fixture(params=range(PROCESSES), ids=lambda rank: f"rank {rank}")
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DPDataLoader:
    """What Opacus gives one of three processes."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: PROCESSES)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: request.param)
    return DPDataLoader(
        TensorDataset(torch.arange(ROWS)),
        sample_rate=RATE,
        distributed=True,
        generator=torch.Generator(),
    )


def test_batches_are_those_of_opacus_and_the_empty_ones(loader: DPDataLoader) -> None:
    loader.generator.manual_seed(0)
    sampler = loader.batch_sampler
    wanted = [batch.tolist() for batch in sampler]
    assert dpzoo.prime_empty_batches(loader) is loader
    assert loader.batch_sampler is sampler
    assert type(sampler) is LockstepSampler
    loader.generator.manual_seed(0)
    got = list(sampler)
    assert len(got) == len(sampler) == 20
    assert [batch for batch in got if batch] == wanted
    assert len(wanted) < 20
    sizes = [len(batch) for (batch,) in loader]
    assert len(sizes) == 20
    assert 0 in sizes


def test_each_row_has_one_rank_and_its_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 4000
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: PROCESSES)
    drawn = torch.zeros(PROCESSES, ROWS)
    for rank in range(PROCESSES):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = LockstepSampler(
            total_size=ROWS,
            sample_rate=RATE,
            steps=steps,
            generator=torch.Generator().manual_seed(rank),
        )
        for batch in sampler:
            drawn[rank, batch] += 1
    assert bool(((drawn > 0).sum(0) == 1).all())
    five_deviations = 5 * (steps * RATE * (1 - RATE)) ** 0.5
    assert float((drawn.sum(0) - steps * RATE).abs().max()) < five_deviations


def test_a_sampler_of_ones_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(DistributedUniformWithReplacementSampler):
        pass

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    made = DPDataLoader.from_data_loader(DataLoader(TensorDataset(torch.arange(8)), batch_size=2))
    own = DataLoader(
        made.dataset,
        batch_sampler=Own(total_size=8, sample_rate=0.5),
        collate_fn=made.collate_fn,
    )
    assert type(dpzoo.prime_empty_batches(own).batch_sampler) is Own


def test_a_hash_of_rows_sees_their_order_and_what_they_hold() -> None:
    rows = [{"input_ids": [i, 2], "x": torch.tensor([i / 3])} for i in range(40)]
    digests = {
        rows_digest(each)
        for each in (rows, rows[::-1], [{**r, "y": 1} for r in rows], rows[:-1], [])
    }
    assert len(digests) == 5
    assert rows_digest([dict(reversed(row.items())) for row in rows]) == rows_digest(rows)

    class Random(list):  # type: ignore[type-arg]
        def __getitem__(self, i: Any) -> Any:
            return os.urandom(4)

    assert rows_digest(Random(rows)) is None
