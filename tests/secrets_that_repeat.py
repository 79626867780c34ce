"""The system's random numbers, replaced by ones that follow from a name, for tests that repeat."""

import hashlib
import itertools
import os
import random
from collections.abc import Callable
from typing import Any


def repeat_secrets(name: str, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let `os.urandom`, `secrets` and `random.SystemRandom` of this process give what follows from `name`.

    No two calls give the same bytes, so that keys, ids and draws differ as they do outside of tests.
    """
    calls = itertools.count()

    def urandom(size: int, /) -> bytes:
        return hashlib.shake_256(f"{name} {next(calls)}".encode()).digest(size)

    replace(os, "urandom", urandom)
    replace(random, "_urandom", urandom)
