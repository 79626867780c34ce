"""What the commands share: tables on standard output, progress on standard error.

rich lays out what a person looks at, on a terminal; anything else is plain aligned text, which is what
scripts and logs want.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Say = Callable[[str], None]


def fits(columns: int) -> bool:
    """Whether a table of this width is readable on standard output; a file takes any."""
    return not sys.stdout.isatty() or shutil.get_terminal_size().columns >= columns


def print_json(data: Any) -> None:
    """Print JSON to standard output, with null for numbers that it does not have (NaN, infinity)."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str = "",
    numbers: Sequence[str] = (),
) -> None:
    """Print a table to standard output.

    Args:
        header: names of the columns.
        rows: a cell for each column; None is an empty cell.
        title: a line above it.
        numbers: columns that are aligned to the right.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(header, cells, title, numbers)
    else:
        sys.stdout.write(plain_table(header, cells, title=title, numbers=numbers) + "\n")


def plain_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    numbers: Sequence[str] = (),
) -> str:
    """The same as text: columns two spaces apart, nothing wrapped and nothing cut."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, ["-" * width for width in widths], *rows):
        padded = [
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for cell, width, name in zip(line, widths, header, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([title, *lines] if title else lines)


def _rich_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str, numbers: Sequence[str]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(header):
        # What is copied out of a table is in its first column: never in two lines.
        whole = {"no_wrap": True, "min_width": max(map(len, (name, *(row[0] for row in rows))))}
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            overflow="fold",
            **({} if place else whole),  # type: ignore[arg-type]
        )
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, highlight=False, markup=False).print(table, crop=False)


@contextmanager
def progress(total: int | None = None) -> Iterator[Say]:
    """A line of standard error that says what is being done, while someone looks at it.

    Args:
        total: number of steps, if it is known: each call then counts as the beginning of one.

    Yields:
        A function that takes what is being done now. It does nothing where standard error is no
        terminal.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    counting: list[Any] = [] if total is None else [BarColumn(), MofNCompleteColumn()]
    columns = [SpinnerColumn(), *counting, TimeElapsedColumn(), TextColumn("{task.description}")]
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    with bar:
        task = bar.add_task("", total=total)
        started = False

        def say(text: str) -> None:
            nonlocal started
            bar.update(task, description=text, advance=int(started))
            started = True

        yield say
