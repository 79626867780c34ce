"""The noise: Opacus' distribution, once a logical step, independent, reproducible."""

import math

import pytest
import torch
from torch import nn

from dpzoo.clipping.noise import CHUNK, STREAMS, NoiseStreams
from tests.clipping.test_behaviour import private


def draw(count: int, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    tensor = torch.zeros(count)
    NoiseStreams(torch.Generator().manual_seed(seed)).add([tensor], std)
    return tensor


def test_mean_variance_and_tails() -> None:
    """Over two million coordinates; bounds are five standard errors."""
    count = 2_000_000
    noise = draw(count, std=3.0) / 3.0
    assert abs(float(noise.mean())) <= 5 / math.sqrt(count)
    assert abs(float(noise.var()) - 1) <= 5 * math.sqrt(2 / count)
    assert abs(float((noise**4).mean()) - 3) <= 5 * math.sqrt(96 / count)
    for quantile in (0.5, 1.0, 2.0, 3.0):
        share = float((noise.abs() > quantile).float().mean())
        expected = math.erfc(quantile / math.sqrt(2))
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)


def test_streams_parameters_and_steps_are_independent() -> None:
    """Correlations between streams, between tensors and between steps are those of chance."""
    streams = NoiseStreams(torch.Generator().manual_seed(1))
    first = [torch.zeros(CHUNK * STREAMS), torch.zeros(CHUNK)]
    second = [torch.zeros(CHUNK * STREAMS), torch.zeros(CHUNK)]
    streams.add(first, 1.0)
    streams.add(second, 1.0)
    pieces = [*first[0].split(CHUNK), first[1], *second[0].split(CHUNK), second[1]]
    table = torch.corrcoef(torch.stack(pieces))
    off = table - torch.eye(len(table))
    assert float(off.abs().max()) <= 5 / math.sqrt(CHUNK)


def test_a_seed_gives_the_same_noise_on_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw(CHUNK * 5 + 7)
        torch.set_num_threads(3)
        three = draw(CHUNK * 5 + 7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)
    assert not torch.equal(one, draw(CHUNK * 5 + 7, seed=1))


def test_scale_and_no_noise() -> None:
    tensors = [torch.ones(5), torch.full((3, 2), 2.0)]
    NoiseStreams().add(tensors, 0.0, scale=0.5)
    assert torch.equal(tensors[0], torch.full((5,), 0.5))
    assert torch.equal(tensors[1], torch.ones(3, 2))
    one = torch.zeros(100_000)
    NoiseStreams(torch.Generator().manual_seed(0)).add([one], 2.0, scale=0.25)
    assert torch.allclose(one, draw(100_000) * 0.5)


def test_streams_go_on_from_their_state() -> None:
    streams = NoiseStreams(torch.Generator().manual_seed(2))
    streams.add([torch.zeros(CHUNK)], 1.0)
    state = streams.state()
    wanted, got = torch.zeros(CHUNK * 2), torch.zeros(CHUNK * 2)
    streams.add([wanted], 1.0)
    other = NoiseStreams()
    other.load_state(state)
    other.add([got], 1.0)
    assert torch.equal(wanted, got)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_adds_noise_of_sigma_times_c_once(reduction: str) -> None:
    """With an empty batch the step is the noise alone: std sigma C, over the denominator."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 10))
    generator = torch.Generator().manual_seed(3)
    wrapped, optimizer, criterion = private(
        model, 4, noise_multiplier=0.8, max_grad_norm=2.0, noise_generator=generator
    )
    optimizer.loss_reduction = reduction
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    criterion(wrapped(torch.zeros(0, 300))).backward()
    optimizer.step()
    noise = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    std = 0.8 * 2.0 / (4 if reduction == "mean" else 1)
    assert float(noise.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * len(noise)))
