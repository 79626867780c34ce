"""The command line: ``dpzoo list | convert | audit | bench | train``.

Each command is a module with ``add_parser(commands)``, which describes it and sets ``run``, and
``run(options)``, which returns the exit status. It is imported when it is called: torch takes seconds.
"""

import argparse
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module

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
"""Command -> what the program's help says of it; the module says the same."""

EPILOG = """\
exit status:
  0  fine
  1  a check failed: the model, the checkpoint or the figures are not as they should be
  2  the command could not run: its arguments, a missing file, a class that dpzoo does not have
  130  interrupted; 143 and 129: ended by SIGTERM, SIGHUP

what goes where:
  results go to standard output, as tables on a terminal and as plain aligned text elsewhere, or as JSON
  with --json, {"ok": false, "error": ...} where the command could not run; progress and complaints go to
  standard error. Tables and progress bars want rich
  (pip install 'dpzoo[cli]'); without it they are plain text too.

examples:
  dpzoo list                                      what dpzoo has
  dpzoo train reviews.tsv --epsilon 3             a private model of a file of texts
  dpzoo convert bert-base-uncased bert-base       any checkpoint to a verified safetensors one
  dpzoo audit bert-base --task sequence-classification
  dpzoo bench bert-base --modes ghost,bk          what privacy costs in time and memory
"""


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
            options = parser(words).parse_args(words)
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except SystemExit as stop:
        if stop.code == 2:
            _fail("its arguments do not parse; see standard error", words, said=True)
        raise
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


def _fail(text: str, words: Sequence[str], status: int = 2, *, said: bool = False) -> int:
    """Say why there is no result, and return the status."""
    try:
        if "--json" in words:
            print_json({"ok": False, "error": text})
        sys.stdout.flush()
    except OSError:  # standard output is full or gone
        _drop_output()
    if not said:
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


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of ``dpzoo``.

    Args:
        words: what it is going to parse; only the command among them is imported. None for all commands.
    """
    whole = argparse.ArgumentParser(
        prog="dpzoo",
        description="Transformers that train with differential privacy, from stock checkpoints and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"dpzoo {__version__}")
    commands = whole.add_subparsers(
        required=True, metavar="command", description="dpzoo COMMAND --help says more about each"
    )
    for name, text in COMMANDS.items():
        if words is None or name in words:
            import_module(f"dpzoo.cli.{name}").add_parser(commands)
        else:
            commands.add_parser(name, help=text)
    return whole
