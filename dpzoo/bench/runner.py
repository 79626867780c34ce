"""`bench`: every mode on every workload."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version

import torch

from dpzoo.bench import memory as memory_of
from dpzoo.bench.report import BenchReport, Measurement, check_settings
from dpzoo.bench.timing import Progress, ratio_to, time_modes
from dpzoo.bench.workload import BASELINE, MODES, SETTINGS, Step, Workload
from dpzoo.errors import InputError
from dpzoo.versions import __version__


def bench(
    workloads: Sequence[Workload],
    *,
    modes: Sequence[str] = (BASELINE, "hooks", "ghost", "bk"),
    settings: Sequence[str] = SETTINGS,
    processes: int = memory_of.PROCESSES,
    steps: int = 7,
    warmup: int = 2,
    every: int = 8,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure what private steps cost, as multiples of the same model's step without privacy.

    The modes run in turns in this process, step by step, and each ratio is the median over pairs of
    steps that ran next to each other. Memory is measured in a fresh process for each mode.

    Args:
        workloads: what to train.
        modes: of `MODES`; the baseline, "non-private", is measured in any case.
        settings: of `SETTINGS`; none for memory alone.
        processes: measure peak memory in this many new processes each, and take the one in the middle;
            0 for none.
        steps: timed steps of each mode and setting.
        warmup: steps before those.
        every: physical batches of a logical one, for "amortized".
        progress: called with a few words before each piece of work.

    Returns:
        The figures. A mode that cannot run a workload is in the report with its error.

    Raises:
        InputError: an unknown mode or setting, ``steps`` or ``every`` below 1, ``warmup`` or
            ``processes`` below 0.
    """
    check_settings(settings)
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"Got the mode {mode!r}, wanted of {', '.join(MODES)}.")
    if steps < 1 or warmup < 0 or every < 1 or processes < 0:
        raise InputError(
            f"Got steps={steps}, warmup={warmup}, every={every}, processes={processes}, wanted at least "
            f"1, 0, 1 and 0."
        )
    modes = [BASELINE, *(mode for mode in modes if mode != BASELINE)]
    measurements: list[Measurement] = []
    for workload in workloads:
        shape = f"{workload.batch} x {workload.seq}"

        def say(text: str, shape: str = shape) -> None:
            progress(f"{shape}, {text}")

        errors = {mode: _trial(workload, mode, say) for mode in modes}
        if errors[BASELINE] is not None:
            raise InputError(f"The baseline cannot run {shape}: {errors[BASELINE]}")
        able = [mode for mode in modes if errors[mode] is None]
        times = time_modes(
            workload, able, settings, steps=steps, warmup=warmup, every=every, progress=say
        )
        peaks: dict[str, memory_of.Peak] = {}
        for mode in able if processes else ():
            say(f"{mode}: memory")
            peaks[mode] = memory_of.measure(workload, mode, processes)
        for mode in modes:
            if errors[mode] is not None:
                measurements.append(Measurement(workload, mode, error=errors[mode]))
            else:
                measurements.append(_measurement(workload, mode, times, peaks))
    return BenchReport(tuple(measurements), every, _versions(workloads))


def pieces(
    workloads: int, modes: int, settings: int, *, processes: int, steps: int, warmup: int
) -> int:
    """How often `bench` calls ``progress``, for a bar; the baseline counts among the modes."""
    return workloads * modes * (2 + settings * (warmup + steps) + bool(processes))


def _trial(workload: Workload, mode: str, say: Progress) -> str | None:
    """Why a mode cannot run a workload, found on a small batch of it; None if it can."""
    say(f"{mode}: trying")
    try:
        Step(workload.with_shape(2, min(workload.seq, 8)), mode)("step")
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _measurement(
    workload: Workload,
    mode: str,
    times: dict[str, dict[str, list[float]]],
    peaks: dict[str, memory_of.Peak],
) -> Measurement:
    ratios = {
        setting: ratio_to(values, times[BASELINE][setting])
        for setting, values in times[mode].items()
    }
    peak = peaks.get(mode)
    if peak is not None:
        ratios["memory"] = peak.within / peaks[BASELINE].within
    return Measurement(
        workload,
        mode,
        seconds={setting: statistics.median(values) for setting, values in times[mode].items()},
        ratios=ratios,
        peak_bytes=peak.within if peak else None,
        process_bytes=peak.peak if peak else None,
    )


def _versions(workloads: Sequence[Workload]) -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "transformers", "opacus")}
    versions |= {"dpzoo": __version__, "python": platform.python_version()}
    devices = {workload.device for workload in workloads}
    if devices == {"cpu"}:
        versions["device"] = f"CPU, {torch.get_num_threads()} threads"
    elif torch.cuda.is_available():
        versions["device"] = torch.cuda.get_device_name()
    return versions
