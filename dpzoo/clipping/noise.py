"""Gaussian noise, added in place, from several independent streams at once.

Drawing the noise of a whole model takes a CPU core about as long as half a training step. On a CPU
the coordinates are dealt out in chunks, in a fixed order, to `STREAMS` generators, each a Mersenne
twister seeded once in the optimizer's life with a seed of its own, and the streams run on as many
threads as torch uses. The chunks, the streams and their order do not depend on the number of threads:
a seed gives the same noise on any machine. Two streams are two places on a cycle of length 2^19937 - 1,
of which a stream uses less than 2^60; that two of them overlap is less likely than 2^-19000. Seeds are
distinct by construction, and streams are never seeded again, so that no two steps share noise.

On other devices the device's own generator draws it, in one stream.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

STREAMS = 8
CHUNK = 32_000
"""Coordinates a chunk: small enough for the cache, and below what torch splits among threads."""


class NoiseStreams:
    """A source of noise for lists of tensors.

    Args:
        generator: the user's generator, from which the streams' seeds are drawn; None for torch's
            default. (On other devices than the CPU it is used as it is.)
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator
        self._streams: list[torch.Generator] | None = None

    def add(self, tensors: list[torch.Tensor], std: float, scale: float = 1.0) -> None:
        """``tensor = (tensor + noise) * scale``, in place, with noise from N(0, std^2).

        Args:
            tensors: contiguous tensors.
            std: standard deviation of the noise; 0 adds none.
            scale: factor of the noised tensors.
        """
        on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        for tensor in tensors:
            if tensor.device.type != "cpu":
                if std:
                    noise = torch.empty_like(tensor).normal_(0.0, std, generator=self._generator)
                    tensor.add_(noise)
                if scale != 1.0:
                    tensor.mul_(scale)
        if not on_cpu:
            return
        if not std:
            if scale != 1.0:
                torch._foreach_mul_(on_cpu, scale)
            return
        chunks = [chunk for tensor in on_cpu for chunk in tensor.view(-1).split(CHUNK)]
        streams = self._seeded()

        def run(index: int) -> None:
            for chunk in chunks[index :: len(streams)]:
                noise = torch.empty_like(chunk).normal_(0.0, std, generator=streams[index])
                chunk.add_(noise)
                if scale != 1.0:
                    chunk.mul_(scale)

        workers = min(len(streams), max(torch.get_num_threads(), 1), os.cpu_count() or 1)
        if workers == 1 or len(chunks) == 1:
            for index in range(len(streams)):
                run(index)
            return
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, range(len(streams))))

    def _seeded(self) -> list[torch.Generator]:
        if self._streams is None:
            seeds: list[int] = []
            source = self._generator if self._on_cpu() else None
            while len(seeds) < STREAMS:
                # A Mersenne twister takes 32 bits of its seed.
                seed = int(torch.randint(2**32, (), generator=source))
                if seed not in seeds:
                    seeds.append(seed)
            self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self._streams

    def _on_cpu(self) -> bool:
        return self._generator is not None and self._generator.device.type == "cpu"

    def state(self) -> Any:
        """The streams' states, to go on with after a restart."""
        return [stream.get_state() for stream in self._seeded()]

    def load_state(self, state: Any) -> None:
        """Take the states that `state` gave."""
        self._streams = [torch.Generator() for _ in state]
        for stream, value in zip(self._streams, state, strict=True):
            stream.set_state(value)
