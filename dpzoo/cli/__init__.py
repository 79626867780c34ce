"""The command line: ``dpzoo list | train | convert | audit | bench``.

Each command is a module with ``Options``, a dataclass that typer reads, ``EPILOG``, the end of its help,
and ``run(options)``, which returns the exit status. It is imported when it is called: torch takes seconds.
"""

import io
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dpzoo.cli.output import print_json
from dpzoo.errors import DpzooError
from dpzoo.versions import __version__

COMMANDS = {
    "list": "show families, tasks, classes and known checkpoints",
    "train": "train a model on private text",
    "convert": "write a verified stock safetensors checkpoint",
    "audit": "prove that a model's private training is right",
    "bench": "measure what a private step costs",
}
"""Command -> what the program's help says of it."""

EPILOG = """\
exit status:
  0  fine
  1  a check failed: the model, the checkpoint or the figures are not as they
     should be
  2  the command could not run: its arguments, a missing file, a class that
     dpzoo does not have
  130  interrupted; 143 and 129: ended by SIGTERM, SIGHUP

what goes where:
  results go to standard output, as tables on a terminal and as plain aligned
  text elsewhere, or as JSON with --json, {"ok": false, "error": ...} where the
  command could not run; progress and complaints go to standard error

examples:
  dpzoo list                                  what dpzoo has
  dpzoo train reviews.tsv --epsilon 3         a private model of a file's texts
  dpzoo convert bert-base-uncased bert-base   any checkpoint, verified
  dpzoo audit bert-base --task sequence-classification
  dpzoo bench bert-base --modes ghost,bk      what privacy costs
"""


FRAMED = 90
"""Columns from which on rich's frames have room for every option's name; it cuts them in fewer."""


class Ended(BaseException):
    """A signal that asks the program to end; what it was writing is cleaned up on the way out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0 if all is well, 1 where a check failed, 2 where the command could not run, and
        128 and the signal's number where one ended it. With --json there is an object on standard output
        in any case: ``{"ok": false, "error": ...}`` where the command could not run.

    Raises:
        SystemExit: with status 2 on arguments that do not parse, with 0 after --help and --version.
    """
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a locale without our characters
    try:
        with _signals():
            options = parse(words)
            status: int = import_module(type(options).__module__).run(options)
            sys.stdout.flush()
            return status
    except typer.Exit as stop:
        sys.stdout.flush()
        raise SystemExit(stop.exit_code) from None
    except typer.TyperException as error:
        context: Any = getattr(error, "ctx", None)  # of the command whose arguments are wrong
        if context is not None:  # an option without its value comes without
            sys.stderr.write(f"{context.get_usage()}\n")
        command = context.command_path if context is not None else " ".join(["dpzoo", *words[:1]])
        text = f"{error.format_message().rstrip('.')}. See {command} --help."
        raise SystemExit(_fail(text, words)) from None
    except BrokenPipeError:  # the reader went away, as head does: there is nobody to complain to
        _drop_output()
        return 0
    except (KeyboardInterrupt, Ended) as stop:
        number = stop.args[0] if isinstance(stop, Ended) else signal.SIGINT
        ended = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        return _fail(ended, words, 128 + number)
    except (DpzooError, OSError) as error:
        return _fail(str(error), words)
    except Exception as error:
        traceback.print_exc()
        return _fail(f"{type(error).__name__}, which is an error in dpzoo: please report it", words)


def _fail(text: str, words: Sequence[str], status: int = 2) -> int:
    """Say why there is no result, and return the status."""
    try:
        if "--json" in words:
            print_json({"ok": False, "error": text})
        sys.stdout.flush()
    except OSError:  # standard output is full or gone
        _drop_output()
    sys.stderr.write(f"dpzoo: {text}\n")
    return status


def _drop_output() -> None:
    """Let Python have nowhere to fail when it flushes standard output at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals() -> Iterator[None]:
    """Have the signals that end a program raise, so that nothing half-written stays behind."""

    def end(number: int, frame: object) -> None:
        raise Ended(signal.Signals(number))

    handlers = {
        getattr(signal, name): handler
        for name, handler in (
            ("SIGINT", signal.default_int_handler),
            ("SIGTERM", end),
            ("SIGHUP", end),
        )
        if hasattr(signal, name)
    }
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _LaidOut:
    epilog: str | None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        text, self.epilog = self.epilog, None  # which would be wrapped, or read as markup
        room = min(30, 2 * formatter.width // 5)  # of a narrow terminal, for options' names
        formatter.write_dl = partial(formatter.write_dl, col_max=room)
        super().format_help(ctx, formatter)  # type: ignore[misc]
        formatter.write(f"\n{text}")


class _Command(_LaidOut, TyperCommand):
    pass


class _Program(_LaidOut, TyperGroup):
    pass


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"dpzoo {__version__}\n")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show it and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Transformers that train with differential privacy, from stock checkpoints and back."""


def parse(words: Sequence[str]) -> Any:
    """What the words ask for, as the ``Options`` of the command's module; no other command is imported.

    Raises:
        typer.TyperException: they do not parse.
        typer.Exit: help or the version was asked for, and was printed.
    """
    width = shutil.get_terminal_size().columns
    app = typer.Typer(
        cls=_Program,
        add_completion=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "terminal_width": max(40, min(width, 80)) - 2,
        },
        epilog=EPILOG,
        rich_markup_mode="rich" if sys.stdout.isatty() and width >= FRAMED else None,
    )
    app.callback()(_program)
    for name, text in COMMANDS.items():
        made: Any = import_module(f"dpzoo.cli.{name}") if name in words else None
        command = app.command(
            name, cls=_Command, help=None if made else text, epilog=made and made.EPILOG
        )
        command(made.Options if made else lambda: None)
    program = typer.main.get_command(app)
    with program.make_context("dpzoo", [*words]) as context:
        return program.invoke(context)
