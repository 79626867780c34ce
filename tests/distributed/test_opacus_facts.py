"""Opacus 1.6.0 with several processes, where it is not what one would think: smallest examples.

Each test says what is observed and what follows for a user. A release of Opacus that behaves
otherwise fails here, and the way around can go. What needs two processes to be seen is at the end of
`test_two_processes`.
"""

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClippingFSDP
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch import nn


def batches(
    monkeypatch: pytest.MonkeyPatch, rank: int, seed: int, **options: Any
) -> list[torch.Tensor]:
    """What the distributed sampler gives rank 0 or 1 of two, as lists of row numbers."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    generator = torch.Generator().manual_seed(seed)
    sampler = DistributedUniformWithReplacementSampler(generator=generator, **options)
    assert len(sampler) == int(1 / options["sample_rate"])
    return list(sampler)


def test_empty_batches_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that draws no row in a step is not told of the step; the one-process sampler tells it.

    From there on the ranks add up gradients of different steps, and at the end of the epoch one of
    them waits for a partner that has finished. Seldom with large batches: the probability is
    exp(-rows of a rank's expected batch) for each step and rank. The way around is a sampler that
    yields the empty batch: `examples/distributed.py` has one.
    """
    options = {"total_size": 40, "sample_rate": 1 / 20}
    counts = [len(batches(monkeypatch, rank, seed=rank, **options)) for rank in range(2)]
    assert counts[0] != counts[1]
    assert max(counts) < 20


def test_equal_generators_draw_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed on all ranks, the k-th rows of all shards are drawn together or not at all.

    The privacy accountant takes every row to be drawn by itself. So: another seed on every rank, or
    none, once the model has been built.
    """
    options = {"total_size": 40, "sample_rate": 1 / 4, "shuffle": False}
    first, second = (batches(monkeypatch, rank, seed=0, **options) for rank in range(2))
    assert [batch.tolist() for batch in second] == [(batch + 1).tolist() for batch in first]


def fsdp_norms(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The norms that the hooks of ghost_fsdp find; they do not need a sharded model."""
    private = GradSampleModuleFastGradientClippingFSDP(model, loss_reduction="sum")
    private(*inputs).square().sum().backward()
    return private.get_norm_sample()


def test_ghost_fsdp_fails_on_an_empty_batch() -> None:
    """In a layer without a norm sampler, LayerNorm say. The other ranks then wait in vain.

    A rank without rows can take part with any one row whose loss is multiplied by 0: see
    ``weightless`` in `tests.distributed.worker`.
    """
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        fsdp_norms(nn.LayerNorm(3), torch.randn(0, 5, 3))
    assert fsdp_norms(nn.Linear(3, 2), torch.randn(0, 5, 3)).shape == (0,)


class Tied(nn.Module):
    """A table, and a head that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).tanh())


def test_ghost_fsdp_takes_the_two_uses_of_a_tied_weight_for_two_weights() -> None:
    """It counts the forwards of a module, not of a parameter, so its refusal of tying never comes.

    The norms lack the inner product of the two uses, and a row may go into the sum with a norm above
    the clipping norm. dpzoo's samplers account for both uses: `dpzoo.grad_samplers.lm_head`.
    """
    torch.manual_seed(0)
    model, ids = Tied().double(), torch.randint(5, (4, 6))
    true = torch.stack(
        [
            torch.autograd.grad(model(row).square().sum(), model.table.weight)[0].norm()
            for row in ids.unsqueeze(1)
        ]
    )
    ratio = fsdp_norms(model, ids) / true
    assert bool((ratio < 0.95).any())
