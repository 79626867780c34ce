"""The command line: ``dpzoo list | convert | audit | bench | train``.

Each command is a module with ``add_parser(commands)``, which describes it and sets ``run``, and
``run(options)``, which returns the exit status. It is imported when it is called: torch takes seconds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

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
  130  interrupted

what goes where:
  results go to standard output, as tables on a terminal and as plain aligned text elsewhere, or as JSON
  with --json; progress and complaints go to standard error. Tables and progress bars want rich
  (pip install 'dpzoo[cli]'); without it they are plain text too.

examples:
  dpzoo list                                      what dpzoo has
  dpzoo train reviews.tsv --epsilon 3             a private model of a file of texts
  dpzoo convert bert-base-uncased bert-base       any checkpoint to a verified safetensors one
  dpzoo audit bert-base --task sequence-classification
  dpzoo bench bert-base --modes ghost,bk          what privacy costs in time and memory
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0 if all is well, 1 where a check failed, 2 where the command could not run.

    Raises:
        SystemExit: with status 2 on arguments that do not parse, with 0 after --help and --version.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = parser(words).parse_args(words)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader went away, as head does: there is nobody to complain to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("dpzoo: interrupted\n")
        return 130
    except (DpzooError, OSError) as error:
        sys.stderr.write(f"dpzoo: {error}\n")
        return 2


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
