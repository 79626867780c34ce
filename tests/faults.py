"""Stop a piece of work at every instant that can matter, in a child process: killed, or out of space."""

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tests.tally import WHOLE, count

EVENTS = frozenset(
    {
        "ctypes.dlsym",
        "open",
        "os.chmod",
        "os.link",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "shutil.rmtree",
    }
)
"""Of Python's audit events, those that stand before and after everything that changes a file system."""

WRITES = EVENTS - {
    "ctypes.dlsym",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
    "os.remove",
    "os.rmdir",
}
"""Those of them that a full disk refuses."""


def killed_at_each_instant(work: Callable[[], Any]) -> Iterator[int]:
    """Run the work again and again, each time killed (SIGKILL) one event later, until it gets to its end.

    Yields:
        The number of the event, after the child is gone. The caller looks at what is there, and lays out
        once more what the work starts from.
    """
    at = 0
    while True:
        status = _child(work, at, lambda: os.kill(os.getpid(), signal.SIGKILL), EVENTS)
        yield at
        count("a process killed at each instant of a write", WHOLE)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, f"event {at}: status {status}"
            return
        at += 1


def refused_at_each_instant(work: Callable[[], Any]) -> Iterator[int]:
    """The same, with "no space left on device" instead of a kill; the work must end in an `OSError`."""

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    at = 0
    while True:
        status = _child(work, at, refuse, WRITES)
        yield at
        count("a disk that is full at each instant of a write", WHOLE)
        assert not os.WIFSIGNALED(status)
        if os.WEXITSTATUS(status) == 0:
            return
        # 5: what was refused was not needed
        assert os.WEXITSTATUS(status) in (3, 5), f"event {at}: status {status}"
        at += 1


def full_after(work: Callable[[], Any], size: int) -> int:
    """Run the work where no file can have more than that many bytes; 0, or 3 for an `OSError`."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return os.WEXITSTATUS(_child(limited, -1, lambda: None, frozenset()))


def _child(
    work: Callable[[], Any], at: int, stop: Callable[[], None], events: frozenset[str]
) -> int:
    """The status with which a forked child ends: 0, 3 for an `OSError`, 5 for none in spite of the stop."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = -1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in events or (event == "open" and events is WRITES and not _writes(arguments)):
            return
        count += 1
        if count == at:
            stop()

    status = 4
    try:
        sys.addaudithook(hook)
        work()
        status = 5 if 0 <= at <= count else 0
    except OSError:
        status = 3
    except BaseException as error:  # the child must not go on with the parent's tests
        if "os error" in str(error) or "File too large" in str(error):
            status = 3
    finally:
        os._exit(status)


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
