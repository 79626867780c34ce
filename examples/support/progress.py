"""Progress of a training run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# Composing the privacy losses takes a good part of a second, so epsilon is not asked for at each step.
_UPDATES = 20


class Progress:
    """Shows step, loss and accuracy since the last update, and the epsilon spent so far.

    Loss and accuracy are those of the training rows just seen. They are not private.

    Args:
        title: what stands before the bar.
        steps: the number of optimizer steps to come.
        budget: the epsilon that will have been spent at the end; None for a run without privacy.
    """

    def __init__(self, title: str, steps: int, budget: float | None = None) -> None:
        self._title = title
        self._steps = steps
        self._budget = budget
        self._done = 0
        self._rows = 0
        self._right: int | None = None
        self._loss = 0.0
        self._began = time.monotonic()
        console = Console()
        self._bar: RichProgress | None = None
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._steps, figures="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in a physical batch: logits (batch, labels), labels (batch,). The batch may be empty."""
        logits = logits.detach()
        self.add(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        right = int((logits.argmax(1) == labels).sum()) if len(labels) else 0
        self._right = (self._right or 0) + right

    def add(self, losses: torch.Tensor) -> None:
        """Take in a physical batch by the losses of its rows, (batch,), where accuracy means nothing."""
        self._rows += len(losses)
        self._loss += float(losses.detach().sum())

    def step(self, epsilon: Callable[[], float] | None = None) -> None:
        """Take in that the weights have moved. `epsilon` gives what has been spent by now."""
        self._done += 1
        every = math.ceil(self._steps / _UPDATES)
        if self._done % every == 0 or self._done == self._steps:
            figures = f"loss {self._loss / max(1, self._rows):.3f}"
            if self._right is not None:
                figures += f"  accuracy {self._right / max(1, self._rows):.1%}"
            if epsilon is not None:
                figures += f"  epsilon {epsilon():.2f} of {self._budget:g}"
            self._rows, self._loss, self._right = 0, 0.0, None
            if self._bar is None:
                seconds = time.monotonic() - self._began
                print(
                    f"{self._title}: step {self._done}/{self._steps}  {figures}  {seconds:.0f} s",
                    flush=True,
                )
            else:
                self._bar.update(self._task, figures=figures)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
