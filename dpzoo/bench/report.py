"""The figures of a benchmark, as ratios to the step without privacy, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpzoo.bench.workload import BASELINE, SETTINGS, Workload
from dpzoo.errors import InputError
from dpzoo.files import whole_file

TITLES = {
    "gradient": "gradient half",
    "step": "whole step",
    "amortized": "amortized",
    "memory": "peak memory",
}
"""Columns of the table."""


@dataclass(frozen=True)
class Measurement:
    """One mode on one workload.

    Args:
        workload: what was trained.
        mode: how.
        seconds: setting -> median seconds per physical batch.
        ratios: setting, or "memory" -> multiple of the baseline's. Times: the median over pairs of
            steps that ran next to each other. Memory: of what the model and its training took.
        peak_bytes: what the model and its training took at most, or None where it was not measured.
        process_bytes: the same with Python and the libraries.
        error: why the mode could not run; the rest is empty then.
    """

    workload: Workload
    mode: str
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    process_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class BenchReport:
    """What `dpzoo.bench.bench` measured.

    Args:
        measurements: one for each workload and mode.
        every: physical batches of a logical one in "amortized".
        versions: of Python, torch, transformers, opacus and dpzoo; the device and its threads.
    """

    measurements: tuple[Measurement, ...]
    every: int
    versions: dict[str, str]

    def rows(self) -> list[list[str]]:
        """The table, as text: a heading and a row for each measurement."""
        titles = [t if s != "amortized" else f"{t} over {self.every}" for s, t in TITLES.items()]
        rows = [["work", "mode", *titles]]
        for m in self.measurements:
            label = f"{m.workload.batch} x {m.workload.seq}"
            if m.error is not None:
                rows.append([label, m.mode, "cannot run", *["-"] * (len(TITLES) - 1)])
            else:
                rows.append([label, m.mode, *(_cell(m, key) for key in TITLES)])
        return rows

    def notes(self) -> list[str]:
        """Why the modes that cannot run could not, a line each."""
        reasons = {m.mode: m.error for m in self.measurements if m.error is not None}
        return [f"{mode} cannot run: {error}" for mode, error in reasons.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, as plain data."""
        return {
            "versions": self.versions,
            "every": self.every,
            "measurements": [asdict(m) for m in self.measurements],
        }

    def plot(self, path: str | Path) -> None:
        """Draw how the ratios grow with seq and with batch, into a .png, .svg or .pdf file.

        Raises:
            InputError: as `refuse_plot`.
        """
        refuse_plot(path, [m.workload for m in self.measurements])
        from matplotlib.figure import Figure

        workloads = [m.workload for m in self.measurements]
        sweeps = [(axis, at) for axis in ("seq", "batch") for at in _sweeps(workloads, axis)]
        figure = Figure(figsize=(4.2 * len(sweeps), 6.4), layout="constrained")
        axes = figure.subplots(2, len(sweeps), squeeze=False, sharey="row")
        for column, (axis, fixed) in enumerate(sweeps):
            self._draw(axes[:, column], axis, fixed)
        for row in axes:  # which share their scale, so not before all is drawn
            row[0].set_ylim(bottom=0)
        with whole_file(path) as part:
            figure.savefig(part, dpi=130)

    def _draw(self, axes: Any, axis: str, fixed: int) -> None:
        other = "batch" if axis == "seq" else "seq"
        chosen = [m for m in self.measurements if getattr(m.workload, other) == fixed]
        modes = list(dict.fromkeys(m.mode for m in chosen if m.mode != BASELINE))
        ticks = sorted({getattr(m.workload, axis) for m in chosen})
        for panel, key, title in zip(
            axes, ("step", "memory"), ("time of a whole step", "peak memory"), strict=True
        ):
            for number, mode in enumerate(modes):
                points = sorted(
                    (getattr(m.workload, axis), m.ratios[key])
                    for m in chosen
                    if m.mode == mode and key in m.ratios
                )
                if points:
                    style = {"marker": "osD^v<>"[number % 7], "label": mode}
                    panel.plot(*zip(*points, strict=True), **style)
            panel.axhline(1.0, color="grey", linewidth=1, linestyle="--")
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set_title(f"{other} {fixed}", fontsize=10)
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{title} / non-private")
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=8)


def _cell(m: Measurement, key: str) -> str:
    if key not in m.ratios:
        return "-"
    if key == "memory":
        assert m.peak_bytes is not None  # it has a ratio
        return f"{m.ratios[key]:.2f} ({m.peak_bytes / 2**20:,.0f} MiB)"
    return f"{m.ratios[key]:.2f} ({m.seconds[key] * 1000:,.0f} ms)"


def refuse_plot(path: str | Path, workloads: Sequence[Workload]) -> None:
    """Refuse what `BenchReport.plot` cannot draw, before it is measured.

    Raises:
        InputError: matplotlib is missing, it has no such format, there is no such folder, or no two
            workloads differ in seq alone or batch alone.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("A plot needs matplotlib: pip install 'dpzoo[bench]'.") from error
    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known:
        raise InputError(f"A plot got {path}, wanted a file of: {', '.join(sorted(known))}.")
    if not Path(path).parent.is_dir():
        raise InputError(f"A plot got {path}, and {Path(path).parent} is no folder. Create it.")
    if not any(_sweeps(workloads, axis) for axis in ("seq", "batch")):
        raise InputError(
            "There is nothing to plot: wanted at least two workloads that differ in seq alone or "
            "in batch alone, as --batch 8 --seq 32,64,128 gives."
        )


def _sweeps(workloads: Sequence[Workload], axis: str) -> list[int]:
    """The values of the other axis at which this one takes several values."""
    other = "batch" if axis == "seq" else "seq"
    seen: dict[int, set[int]] = {}
    for one in workloads:
        seen.setdefault(getattr(one, other), set()).add(getattr(one, axis))
    return [at for at, values in seen.items() if len(values) > 1]


def check_settings(settings: Sequence[str]) -> None:
    """Refuse what is no setting.

    Raises:
        InputError: names it.
    """
    for setting in settings:
        if setting not in SETTINGS:
            raise InputError(f"Got the setting {setting!r}, wanted of {', '.join(SETTINGS)}.")
