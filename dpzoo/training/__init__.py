"""From a file of private text to a private model: `dpzoo.train`, and ``dpzoo train FILE``.

`run` needs accelerate, as transformers' Trainer does, and is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpzoo.training.recipe import Recipe

if TYPE_CHECKING:
    from dpzoo.training.run import Run


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    dry_run: bool = False,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Train a model on private rows; `dpzoo.training.run.train` says what, and what is guaranteed."""
    from dpzoo.training import run

    return run.train(recipe, dry_run=dry_run, resume=resume, say=say or run.log.info)


__all__ = ["Recipe", "train"]
