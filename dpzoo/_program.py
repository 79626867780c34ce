"""Whether this process is the program ``dpzoo``, which an interruption ends without a traceback.

It is the first module that ``import dpzoo`` runs: torch and transformers take seconds to import, and
``dpzoo.cli`` can catch nothing before they are there. Anywhere else this does nothing.
"""

import signal
import sys
import threading
from pathlib import Path


def is_program() -> bool:
    """Whether the process was started as ``dpzoo`` or ``python -m dpzoo.cli``."""
    started = sys.argv[0]  # "-m" while the module that it names is being looked for
    return Path(started).stem == "dpzoo" or (started == "-m" and "dpzoo.cli" in sys.orig_argv)


if is_program() and threading.current_thread() is threading.main_thread():
    # Until dpzoo.cli.main takes over: end by the signal, which is status 130 in a shell.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
