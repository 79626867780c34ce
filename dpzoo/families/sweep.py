"""Many architectures, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import Any

import torch
import transformers

from dpzoo.families.tiny import Sizes, model_class
from dpzoo.families.trial import MODES, Result, examine


def _child(pipe: Any, name: str, modes: Sequence[str], sizes: Sizes) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    pipe.send(asdict(examine(name, modes, sizes)))
    pipe.close()


def sweep(
    names: Sequence[str],
    modes: Sequence[str] = MODES,
    sizes: Sizes = Sizes(),  # noqa: B008
    *,
    jobs: int = 1,
    seconds: float = 120.0,
    say: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Examine many, each in a process of its own: one that hangs or crashes stops nothing.

    Args:
        names: of `architectures`.
        modes: of `MODES`.
        sizes: of the instances.
        jobs: processes at a time.
        seconds: that one may take.
        say: is given each result as it comes.

    Returns:
        The results, in the order of the names.
    """
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["dpzoo.families"])
    waiting, running, done = list(names), {}, {}  # type: ignore[var-annotated]
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            mine, its = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(its, name, tuple(modes), sizes), daemon=True
            )
            process.start()
            its.close()
            running[mine] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for pipe, (name, process, began) in list(running.items()):
            late = time.monotonic() - began > seconds
            if pipe not in ready and not late:
                continue
            try:
                if late:
                    raise TimeoutError(f"no result after {seconds:.0f} s")
                result = Result(**pipe.recv())
            except (EOFError, TimeoutError) as error:
                why = f"no result after {seconds:.0f} s" if late else "the process died"
                result = Result(
                    name, model_class(name).__name__, runs=f"{why}{'' if late else str(error)}"
                )
            process.kill()
            process.join()
            del running[pipe]
            done[name] = result
            say(result)
    return [done[name] for name in names]
