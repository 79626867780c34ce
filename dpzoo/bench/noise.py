"""What the noise costs: `python -m dpzoo.bench.noise`.

Two tables, each of medians over rounds in which the candidates run in turns:

- nanoseconds for a coordinate, of `NoiseSource.add` and of torch's own generator used as well as can be:
  `normal_` into a buffer that fits the cache, added and scaled, from one generator for each thread;
- seconds of the digest, of the noise and of a step without privacy, of RoBERTa-base with four layers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from dpzoo.bench.timing import seconds_of
from dpzoo.bench.workload import BASELINE, Step, Workload
from dpzoo.clipping.noise import NoiseSource

_PIECE = 32_000  # below what torch splits among threads by itself


def per_draw(
    threads: int, *, count: int = 16_000_000, rounds: int = 11, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Nanoseconds for each of ``count`` coordinates, with as many threads.

    Returns:
        Medians: "normal_" of torch, "dpzoo" of `NoiseSource.add` with a digest that is given, "digest".
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensor, source = torch.zeros(count, dtype=dtype), NoiseSource()
        times = _in_turns(
            {
                "normal_": lambda: _torch_noise(tensor, threads),
                "dpzoo": lambda: source.add([tensor], 1.0, 0.5, step=1, digest=b""),
                "digest": lambda: source.digest([tensor]),
            },
            rounds,
            "cpu",
        )
    finally:
        torch.set_num_threads(before)
    return {name: seconds / count * 1e9 for name, seconds in times.items()}


def per_step(workload: Workload, *, rounds: int = 7) -> dict[str, float]:
    """Seconds of a step without privacy, and of the digest of and the noise on its gradients."""
    step, source = Step(workload, BASELINE), NoiseSource()
    sums = [torch.randn_like(p) for p in step.model.parameters() if p.requires_grad]
    candidates: dict[str, Callable[[], object]] = {
        "step": lambda: step("gradient"),
        "digest": lambda: source.digest(sums),
        "noise": lambda: source.add(sums, 1.0, step=1, digest=b""),
    }
    return _in_turns(candidates, rounds, workload.device)


def _in_turns(
    candidates: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, float]:
    """Median seconds of each, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            times[name].append(seconds_of(lambda run=run: run(), device))  # type: ignore[misc]
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def _torch_noise(tensor: torch.Tensor, threads: int) -> None:
    pieces = tensor.split(_PIECE)

    def run(first: int) -> None:
        generator = torch.Generator().manual_seed(first)
        for piece in pieces[first::threads]:
            piece.add_(torch.empty_like(piece).normal_(generator=generator)).mul_(0.5)

    if threads == 1:
        run(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m dpzoo.bench.noise", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu", help="of the second table")
    args = parser.parse_args()
    for dtype in (torch.float32, torch.float64):
        for threads in args.threads:
            ns = per_draw(
                threads, dtype=dtype, count=16_000_000 if dtype == torch.float32 else 4_000_000
            )
            print(
                f"{dtype}, {threads} thread(s): normal_ {ns['normal_']:.2f} ns, dpzoo {ns['dpzoo']:.2f} ns "
                f"({ns['dpzoo'] / ns['normal_']:.2f}), digest {ns['digest']:.2f} ns"
            )
    workload = Workload("roberta-base", layers=4, batch=8, seq=128, device=args.device)
    seconds = per_step(workload)
    for name, value in seconds.items():
        print(f"{name}: {value * 1000:.2f} ms, {100 * value / seconds['step']:.1f} % of a step")


if __name__ == "__main__":
    main()
