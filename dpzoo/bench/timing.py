"""Seconds per step, of all modes in turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dpzoo.bench.workload import Step, Workload

Progress = Callable[[str], None]
"""Called with a few words before each piece of work."""


def seconds_of(run: Callable[[], None], device: str) -> float:
    """Wall-clock seconds of one call; on CUDA between two events of the device's own clock."""
    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1000


def time_modes(
    workload: Workload,
    modes: Sequence[str],
    settings: Sequence[str],
    *,
    steps: int,
    warmup: int,
    every: int,
    progress: Progress,
) -> dict[str, dict[str, list[float]]]:
    """Times of the modes, interleaved step by step.

    Args:
        workload: what is trained.
        modes: of `dpzoo.bench.MODES`.
        settings: of `dpzoo.bench.SETTINGS`.
        steps: timed steps of each mode and setting.
        warmup: steps before those, not timed.
        every: physical batches of a logical one, for "amortized".
        progress: told of each step.

    Returns:
        Mode -> setting -> seconds per physical batch, ``steps`` of them, in the order they ran.
    """
    ready = {}
    for mode in modes:
        progress(f"{mode}: building")
        ready[mode] = Step(workload, mode)
    times: dict[str, dict[str, list[float]]] = {m: {s: [] for s in settings} for m in modes}
    for setting in settings:
        parts = every if setting == "amortized" else 1
        for index in range(warmup + steps):
            for mode, step in ready.items():
                progress(f"{mode}: {setting} {index + 1}/{warmup + steps}")
                gc.collect()
                seconds = seconds_of(partial(step, setting, every), workload.device)
                if index >= warmup:
                    times[mode][setting].append(seconds / parts)
    return times


def ratio_to(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios of steps that ran next to each other."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))
