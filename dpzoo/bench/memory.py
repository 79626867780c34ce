"""Peak memory of a mode, in a process of its own.

    python -m dpzoo.bench.memory '{"workload": {...}, "mode": "bk"}'

runs a few whole steps and prints what the process holds at its peak, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpzoo.bench.workload import Step, Workload
from dpzoo.errors import DpzooError, first_line

STEPS = 3
"""The first allocates what later ones use again, such as the gradients; three are enough to see it."""

KEPT_BY_THE_HEAP = 256 * 2**10
"""Tensors of more bytes go back to the system when they are freed (glibc's MALLOC_MMAP_THRESHOLD_).

Otherwise its heap keeps gaps of up to 32 MiB, and a peak says how tensors happened to be laid out, not how
much was in use: 700 MiB where 545 were."""

PROCESSES = 3
"""What a process holds at its peak on a CPU varies by a few per cent with how its heap is laid out."""


@dataclass(frozen=True)
class Peak:
    """Memory of a process, in bytes.

    Args:
        before: in use before the model was built (on a CPU: Python and the libraries; 0 on CUDA).
        peak: the most that was in use at once, ``before`` included.
    """

    before: int
    peak: int

    @property
    def within(self) -> int:
        """What the model and its training took at most."""
        return self.peak - self.before


def measure(workload: Workload, mode: str, processes: int = PROCESSES) -> Peak:
    """Peak memory of a mode: of some new processes, the one in the middle.

    Raises:
        MeasurementError: a process failed; with the end of what it said.
    """
    peaks = [_in_a_new_process(workload, mode) for _ in range(processes)]
    return sorted(peaks, key=lambda peak: peak.within)[processes // 2]


def _in_a_new_process(workload: Workload, mode: str) -> Peak:
    spec = json.dumps({"workload": workload.to_dict(), "mode": mode})
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(KEPT_BY_THE_HEAP))
    done = subprocess.run(
        [sys.executable, "-m", "dpzoo.bench.memory", spec],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MeasurementError(f"The memory of mode {mode!r} was not measured: {lines[-1]}")
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


class MeasurementError(DpzooError):
    """A measuring process failed."""


def run_here(workload: Workload, mode: str) -> Peak:
    """Run a few whole steps in this process, which should have done nothing else.

    Returns:
        Its peak memory.
    """
    probe = _probe(workload.device)
    before = probe()
    step = Step(workload, mode)
    for _ in range(STEPS):
        step("step")
    return Peak(before, probe())


def _probe(device: str) -> Callable[[], int]:
    """A function that gives the peak so far."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: int(torch.cuda.max_memory_allocated(device))
    return _resident_peak


def _resident_peak() -> int:
    """The process's highest resident set so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str]) -> int:
    """Measure what the one argument, JSON, describes."""
    spec: dict[str, Any] = json.loads(arguments[0])
    try:
        peak = run_here(Workload(**spec["workload"]), spec["mode"])
    except (DpzooError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        sys.stderr.write(f"{type(error).__name__}: {first_line(error)}\n")
        return 1
    sys.stdout.write(json.dumps({"before": peak.before, "peak": peak.peak}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
