"""The command: ``python -m dpzoo.families``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpzoo.errors import InputError
from dpzoo.families import MODES
from dpzoo.families.record import markdown, write
from dpzoo.families.sweep import sweep
from dpzoo.families.tiny import AUTO_CLASSES, COINCIDING, Sizes, architectures
from dpzoo.families.trial import Result
from dpzoo.files import write_text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m dpzoo.families",
        description="Try every architecture of the installed transformers in each mode.",
    )
    made.add_argument("--only", help="these model types, or task/type, separated by commas")
    made.add_argument("--task", choices=AUTO_CLASSES, action="append", help="by default all five")
    made.add_argument("--mode", choices=MODES, action="append", help="by default all three")
    made.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    made.add_argument("--seconds", type=float, default=120.0, help="limit for one (default: 120)")
    made.add_argument(
        "--coincide", action="store_true", help="sizes that are equal: rows, tokens, heads"
    )
    made.add_argument("--json", type=Path, help="write the results there")
    made.add_argument("--markdown", type=Path, help="write the table there, docs/models.md say")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; the status is 1 where bk is wrong anywhere."""
    options = parser().parse_args(words)
    names = architectures(options.task or tuple(AUTO_CLASSES))
    if options.only:
        wanted = options.only.split(",")
        names = [n for n in names if n in wanted or n.split("/")[1] in wanted]
        if not names:
            raise InputError(f"--only got {options.only!r}, and no architecture is of that name.")
    modes = options.mode or MODES
    sizes = COINCIDING if options.coincide else Sizes()

    def say(result: Result) -> None:
        found = " | ".join(
            f"{m}: {v[:90]}" + (f" {result.error[m]:.0e}" if m in result.error else "")
            for m, v in result.modes.items()
        )
        gap = f" | loss off by {result.loss:.0e}" if (result.loss or 0) > 1e-5 else ""
        sys.stdout.write(
            f"{result.name:42s} {result.seconds:5.1f}s | {found or result.runs}{gap}\n"
        )
        sys.stdout.flush()

    results = sweep(names, modes, sizes, jobs=options.jobs, seconds=options.seconds, say=say)
    if options.json:
        write(options.json, results)
    if options.markdown:
        given = " ".join(
            ["python -m dpzoo.families", *(words if words is not None else sys.argv[1:])]
        )
        write_text(options.markdown, markdown(results, given))
    return int(any(r.modes.get("bk", "").startswith("WRONG") for r in results))


if __name__ == "__main__":
    sys.exit(main())
