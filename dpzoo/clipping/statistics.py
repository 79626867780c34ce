"""What clipping and noise do to the gradients of a run: NOT PRIVATE, for whoever may see the rows.

    statistics = Statistics(model, optimizer)   # of PrivacyEngine().make_private(grad_sample_mode="bk")
    ...                                          # the loop, unchanged
    statistics.records[-1]["clipped"]            # share of the last step's rows that were clipped
    plot(statistics.records, "run.png")

Everything here is computed from rows' gradients before there is noise in them. It is in no epsilon. Keep it
as the data are kept, and choose nothing by it that is to be in the guarantee.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError

Record = dict[str, Any]


class Statistics:
    """A record of each logical step: rows' norms, clipped share, signal and noise. NOT PRIVATE.

    Args:
        model: for the parameters' names.
        optimizer: the private optimizer of mode "bk".

    Raises:
        InputError: an optimizer of another mode.

    A record has
        step: from 1 on, of this object;
        rows: that were drawn;
        not_finite: of them, left out for a gradient that is no number;
        norms: min, median and max of the rows' gradient norms, before clipping; None without rows;
        clipped: share of the rows whose norm is above C;
        layers: parameter -> root mean square of the rows' norms of its gradient, before clipping;
        signal: norm of the clipped sum;
        noise: norm that the noise on it has, sigma C sqrt(parameters);
        signal_to_noise: the one over the other, infinite without noise.
    """

    def __init__(self, model: nn.Module, optimizer: BookKeepingOptimizer) -> None:
        if not isinstance(optimizer, BookKeepingOptimizer):
            raise InputError(
                f"Statistics got a {type(optimizer).__name__}, wanted the private optimizer of "
                f"grad_sample_mode='bk': no other sees every row's norms."
            )
        self.records: list[Record] = []
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.begin()
        optimizer.statistics = self

    def begin(self) -> None:
        """Forget the parts of a draw: its sums are done with."""
        self._norms: list[torch.Tensor] = []
        self._squares: dict[str, float] = {}
        self._clipped = 0

    def record_rows(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor, max_grad_norm: float
    ) -> None:
        """A part of a draw: parameter -> squared norms, and the norms over all, (rows,) each."""
        finite = norms.isfinite()
        self._norms.append(norms.detach().float().cpu())
        self._clipped += int((norms[finite] > max_grad_norm).sum())
        for parameter, values in squared.items():
            name = self._names.get(id(parameter), "?")
            total = float(values.detach()[finite.to(values.device)].double().sum())
            self._squares[name] = self._squares.get(name, 0.0) + total

    def record_sums(self, sums: list[torch.Tensor], std: float) -> None:
        """The clipped sums of a step, one for each parameter, and the noise to come: the record is made."""
        norms = torch.cat([*self._norms, torch.empty(0)])
        finite = norms[norms.isfinite()]
        count = max(len(finite), 1)
        signal = math.sqrt(sum(float(total.detach().double().square().sum()) for total in sums))
        noise = std * math.sqrt(sum(total.numel() for total in sums))
        spread = (finite.min(), finite.median(), finite.max()) if len(finite) else None
        self.records.append(
            {
                "step": len(self.records) + 1,
                "rows": len(norms),
                "not_finite": len(norms) - len(finite),
                "norms": None if spread is None else [float(value) for value in spread],
                "clipped": self._clipped / count,
                "layers": {k: math.sqrt(v / count) for k, v in self._squares.items()},
                "signal": signal,
                "noise": noise,
                "signal_to_noise": signal / noise if noise else math.inf,
            }
        )


def read(path: str | Path) -> list[Record]:
    """Records from a file with one on each line, as `StatisticsCallback` writes it.

    Raises:
        InputError: the file has no records.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "signal_to_noise" in record]
    if not records:
        raise InputError(f"{path} has no records of steps, wanted what StatisticsCallback wrote.")
    return records


def plot(records: list[Record], path: str | Path, *, most_layers: int = 12) -> None:
    """Draw a run: rows' norms, clipped share, signal to noise, and the layers. NOT PRIVATE, as it says.

    Args:
        records: of `Statistics`, at least one.
        path: of the image; its ending says the format.
        most_layers: parameters that are shown, those of the largest norms.

    Raises:
        InputError: there are no records.
        ImportError: matplotlib is not installed.
    """
    if not records:
        raise InputError("plot got 0 records, wanted at least one step.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (norms, clipped), (ratio, layers) = figure.subplots(2, 2)
    drawn = [record for record in records if record["norms"]]
    steps = [record["step"] for record in drawn]
    low, middle, high = (zip(*[r["norms"] for r in drawn], strict=True)) if drawn else ((), (), ())
    norms.fill_between(steps, low, high, alpha=0.2, label="min to max")
    norms.plot(steps, middle, label="median")
    norms.set(title="rows' gradient norms before clipping", xlabel="step", yscale="log")
    norms.legend()
    clipped.plot(steps, [r["clipped"] for r in drawn])
    clipped.set(title="share of rows that are clipped", xlabel="step", ylim=(-0.05, 1.05))
    noisy = [r for r in records if math.isfinite(r["signal_to_noise"])]
    ratio.plot([r["step"] for r in noisy], [r["signal_to_noise"] for r in noisy])
    ratio.axhline(1.0, color="grey", linewidth=0.8)
    ratio.set(title="clipped sum over its noise (norms)", xlabel="step")
    means: dict[str, float] = {}
    for record in drawn:
        for name, value in record["layers"].items():
            means[name] = means.get(name, 0.0) + value / len(drawn)
    largest = sorted(means, key=lambda name: means[name])[-most_layers:]
    layers.barh([name[-40:] for name in largest], [means[name] for name in largest])
    layers.set(title="rows' norms by parameter, mean of the run")
    layers.tick_params(axis="y", labelsize=7)
    figure.suptitle("NOT PRIVATE: computed from rows' gradients without noise", color="firebrick")
    figure.savefig(path, dpi=120)
