"""What became of the odd, damaged and interrupted things that were tried; docs/reliability.py shows it."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

CLEAR, AS_STOCK, WHOLE = "clear error", "as stock", "whole"
OUTCOMES = (CLEAR, AS_STOCK, WHOLE)

TALLY: Counter[tuple[str, str]] = Counter()
"""(kind of case, outcome) -> cases. A case with another outcome fails its test."""

HANG = 60
"""Seconds that no case may take."""


def count(kind: str, outcome: str) -> None:
    assert outcome in OUTCOMES
    TALLY[kind, outcome] += 1


@contextmanager
def no_hang() -> Iterator[None]:
    """Fail where the block takes too long."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"a case took over {HANG} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
