"""Where the time of a step goes, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from dpzoo.bench.workload import Step, Workload

ROWS = 25


def profile(workload: Workload, modes: Sequence[str]) -> str:
    """torch.profiler's table of one whole step of each mode, the costliest operators first."""
    on_cuda = torch.device(workload.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    parts = []
    for mode in modes:
        step = Step(workload, mode)
        step("step")
        with torch_profile(activities=activities) as profiler:
            step("step")
        order = f"self_{'cuda' if on_cuda else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS)
        parts.append(f"{mode}, {workload.batch} x {workload.seq}\n{table}")
    return "\n\n".join(parts)
