"""Callbacks for `DPTrainer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpzoo.clipping.statistics import Statistics, plot

STATISTICS_NAME = "statistics_not_private.jsonl"
PLOT_NAME = "statistics_not_private.png"


class StatisticsCallback(TrainerCallback):
    """Rows' norms, clipped share and signal to noise of each step, into a file and a plot. NOT PRIVATE.

        trainer = DPTrainer(..., callbacks=[StatisticsCallback()])

    `dpzoo.clipping.statistics.Statistics` says what a record has.

    Args:
        folder: of the file and the plot; None for the trainer's ``output_dir``.
        draw: whether the plot is drawn at the end, which takes matplotlib.

    Attributes:
        records: of this process's steps.
    """

    def __init__(self, folder: str | Path | None = None, *, draw: bool = True) -> None:
        self._folder, self._draw = folder, draw
        self._statistics: Statistics | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of the steps of this process."""
        return [] if self._statistics is None else self._statistics.records

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Watch the private optimizer."""
        optimizer = given["optimizer"]
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's wrapper
        self._statistics = Statistics(given["model"], optimizer)
        folder = Path(self._folder or args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / STATISTICS_NAME

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the step's record."""
        if self.records:
            record = {"NOT PRIVATE": True, **self.records[-1], "step": state.global_step}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Draw the run."""
        if self._draw and self.records:
            plot(self.records, self._path.with_name(PLOT_NAME))
