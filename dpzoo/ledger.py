"""An append-only record of the steps that runs have begun and of what they released, next to checkpoints.

A checkpoint tells what was spent until it was written. The ledger also tells what was spent afterwards: by
a process that was killed, by a step that was repeated with other sums, by another continuation of the same
checkpoint. A step is written to it before it is taken. So a step that was begun is paid for, finished or
not.

The file has a line for each entry: JSON, a space, a hash of the line before it and of this one. The first
line has a random number. So

- a flipped bit, a missing, moved or foreign line in the middle is noticed, and is an error: what was spent
  is no longer known. The hash has no key: it finds accidents, not forgery.
- the end of a line that a crash cut off is dropped and named in the log. Its entry had not returned, so
  that nothing of it was released.
- lines missing at the end, or a missing file, are noticed by whoever holds an earlier `Ledger.head`: this
  object, and a checkpoint (`Ledger.require`).

Entries are made under a lock, so that any number of processes can share a ledger, and are on disk before
the call returns. The file is made aside and put in its place whole. It may be published: digests are keyed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpzoo.errors import InputError
from dpzoo.files import write_text

log = logging.getLogger(__name__)

VERSION = 1
_LINE = re.compile(rb"(.*) ([0-9a-f]{32})")
_RESTORE = "Restore the file from a copy: without it, it is not known what was spent."

Price = tuple[float, float]
"""(noise multiplier, sample rate) of a step."""


class Ledger:
    """The ledger in a file.

    Args:
        path: of the file. It is made by the first entry, with its folder; beside it there is a lock file.
        timeout: seconds to wait for another process that is making an entry.

    Guarantees:
        `paid` has every step whose `begin` returned, in this process or in any other, killed or not, and
        every further digest of it whose `commit` returned.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InputError(f"Ledger got {self.path}, a folder; wanted the path of a file in it.")
        self._lock = FileLock(f"{self.path}.lock", timeout=timeout)
        self._mutex = threading.RLock()
        self._mine: dict[str, tuple[int, Price]] = {}  # run -> step begun by this object
        self._forget()

    def begin(self, run: str, step: int, *, noise_multiplier: float, sample_rate: float) -> None:
        """Write a step, before it is taken: before its rows or its noise are drawn.

        Args:
            run: the run's name.
            step: its number in the run, from 1 on.
            noise_multiplier: sigma, 0 or more.
            sample_rate: chance of a row to be drawn, above 0 and at most 1.

        Raises:
            InputError: an argument out of range; a file that is damaged, gone, or no ledger.
            OSError: the entry could not be written. The step must not be taken.
        """
        _check("run", run, "a name", isinstance(run, str) and bool(run))
        _check("step", step, "an integer from 1 on", type(step) is int and step >= 1)
        noise, rate = _number(noise_multiplier), _number(sample_rate)
        _check("noise_multiplier", noise_multiplier, "0 or more", 0 <= noise < math.inf)
        _check("sample_rate", sample_rate, "above 0 and at most 1", 0 < rate <= 1)
        with self._writing():
            self._mine[run] = (step, (noise, rate))
            if (noise, rate) not in self._steps[run].get(step, {}):
                self._append(["begin", run, step, noise, rate])

    def commit(self, run: str, step: int, digest: str) -> bool:
        """Write what a step releases, before it is released: when its noise is drawn.

        Args:
            run: the run's name.
            step: a step that was begun; last by this object, or else last in the file.
            digest: names the release: `NoiseSource.add`'s, in hexadecimal digits. Where a step has
                several releases, one digest of all. Where the noise is not keyed (a step done again
                has other noise), a random one.

        Returns:
            True if it is new: it has to be paid. False if the step was done with this digest before, so
            that it releases the same once more, bit for bit.

        Raises:
            InputError: the step was not begun; otherwise as `begin`.
            OSError: the entry could not be written. Nothing must be released.
        """
        _check("digest", digest, "a text", isinstance(digest, str) and bool(digest))
        with self._writing():
            begun = self._steps[run].get(step, {})
            if not begun:
                raise InputError(
                    f"The ledger {self.path} got a commit of step {step!r} of run {run!r}, which was not "
                    f"begun. Call Ledger.begin before the step."
                )
            mine, price = self._mine.get(run, (None, None))
            if mine != step or price not in begun:
                price = list(begun)[-1]
            if digest in begun[price]:
                return False
            self._append(["commit", run, step, *price, digest])
            return True

    def paid(self, run: str, after: int = 0) -> list[tuple[float, float, int]]:
        """Everything that a run has spent in its steps above ``after``; of an unknown run, nothing.

        Returns:
            (noise multiplier, sample rate, steps), as Opacus' accountants keep their history. For each step
            and each (noise multiplier, sample rate) that it was begun with: as many as it has digests, and
            one if it has none.

        Raises:
            InputError: as `begin`.
        """
        with self._mutex:
            self._read()
            counts = dict(self._totals[run])
            for step, prices in self._steps.get(run, {}).items() if after else ():
                for price, digests in prices.items():
                    if step <= after:
                        counts[price] -= max(1, len(digests))
            return [(noise, rate, count) for (noise, rate), count in counts.items() if count]

    def steps(self, run: str) -> int:
        """The largest number of a step that the run has begun; 0 if there is none."""
        with self._mutex:
            self._read()
            return self._last[run]

    @property
    def head(self) -> str:
        """The file's present end, for a checkpoint to hold and to `require`."""
        with self._mutex:
            self._read()
            return f"{self._lines}:{self._chain}"

    def create(self) -> None:
        """Make the file, if there is none: one without entries."""
        with self._writing():
            pass

    def require(self, run: str, head: str | None = None, *, begun: bool = True) -> None:
        """Refuse to go on without what a checkpoint relies on.

        Args:
            run: a run that the ledger must know.
            head: `head` as it was when the checkpoint was written.
            begun: False: the run may have no entry, because all its steps are in the checkpoint.

        Raises:
            InputError: the file is gone or damaged, has no entry of the run, or is not a continuation of
                what it was at ``head``.
        """
        with self._mutex:
            if not self.path.exists():
                raise InputError(
                    f"The ledger {self.path} is gone; run {run!r} needs it. Copy it from the folder in "
                    f"which the run was begun: without it, it is not known what was spent."
                )
            self._forget()
            self._read(head)
            if begun and run not in self._steps:
                raise InputError(
                    f"The ledger {self.path} has no entry of run {run!r}, only of {sorted(self._steps)}. "
                    f"Copy the ledger from the folder in which the run was begun."
                )

    def _forget(self) -> None:
        self._end, self._lines, self._chain = 0, 0, ""
        self._file: tuple[int, int] | None = None
        # run -> step -> price -> digests
        self._steps: dict[str, dict[int, dict[Price, set[str]]]] = defaultdict(dict)
        # Counted here, or each step would go through all before it:
        self._totals: dict[str, dict[Price, int]] = defaultdict(lambda: defaultdict(int))
        self._last: dict[str, int] = defaultdict(int)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The lock, and the newest entries."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._mutex:
            try:
                self._lock.acquire(poll_interval=0.005)
            except Timeout:
                raise InputError(
                    f"The ledger {self.path} has been locked for {self._lock.timeout} s by another "
                    f"process. End that process, and try again."
                ) from None
            try:
                if not self._lines and not self.path.exists():
                    self._create()
                self._read(repair=True)
                yield
            finally:
                self._lock.release()

    def _create(self) -> None:
        text = json.dumps(["dpzoo ledger", VERSION, secrets.token_hex(16)])
        write_text(self.path, f"{text} {_hash('', text.encode())}\n")

    def _append(self, entry: list[Any]) -> None:
        """Write a line; under the lock, after `_read`."""
        text = json.dumps(entry).encode()
        line = text + b" " + _hash(self._chain, text).encode() + b"\n"
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(self._end)
            try:
                if file.write(line) != len(line):
                    raise OSError(f"The ledger {self.path}: the disk is full.")
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._end)
                raise
        self._take(line[:-1])

    def _read(self, head: str | None = None, *, repair: bool = False) -> None:
        """Take the lines that have come since the last time, and check them.

        Args:
            head: one that must be among them.
            repair: the lock is held, so that an end without a line break is no line in the making:
                drop it from the file, or end it if it is whole.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            if self._lines:
                raise InputError(f"The ledger {self.path} is gone. {_RESTORE}") from None
            return
        with file:
            stat = os.fstat(file.fileno())
            if self._file not in (None, (stat.st_dev, stat.st_ino)):
                # Another file came in its place: it has to go on where this one was.
                head = f"{self._lines}:{self._chain}" if self._lines else head
                self._forget()
            self._file = (stat.st_dev, stat.st_ino)
            if stat.st_size < self._end:
                raise InputError(
                    f"The ledger {self.path} has {stat.st_size} bytes and had {self._end}. {_RESTORE}"
                )
            if stat.st_size == self._end and not head:
                if not self._lines:
                    raise self._damaged("it is empty", 1)
                return
            file.seek(self._end)
            *lines, rest = file.read().split(b"\n")
        wanted = head is None
        for line in lines:
            self._take(line)
            wanted = wanted or head == f"{self._lines}:{self._chain}"
        if not wanted:
            raise InputError(
                f"The ledger {self.path} has {self._lines} lines and does not go on from {head!r}, where "
                f"the checkpoint was written (line:hash). It is another one, or an older copy. {_RESTORE}"
            )
        if rest and not self._lines:
            raise self._damaged("it is no ledger's", 1)
        if rest and not repair:
            with self._writing():
                pass
        elif rest:
            self._repair(rest)

    def _repair(self, rest: bytes) -> None:
        """Deal with an end that has no line break; under the lock."""
        match = _LINE.match(rest)
        if match is None:
            log.warning(
                "The ledger %s: dropped the line that a crash cut off, %r.", self.path, rest
            )
            os.truncate(self.path, self._end)
            return
        self._take(rest)
        with open(self.path, "ab") as file:
            file.write(b"\n")

    def _take(self, line: bytes) -> None:
        match = _LINE.fullmatch(line)
        number = self._lines + 1
        if match is None or _hash(self._chain, match[1]) != match[2].decode():
            why = (
                "it does not follow from the line before it" if self._lines else "it is no ledger's"
            )
            raise self._damaged(why, number)
        kind, *entry = json.loads(match[1])
        if not self._lines:
            if kind != "dpzoo ledger" or entry[0] != VERSION:
                raise self._damaged(
                    f"got {kind!r} {entry[0]!r}, wanted 'dpzoo ledger' {VERSION}", 1
                )
        else:
            run, step, noise, rate, *digests = entry
            prices, price = self._steps[run].setdefault(step, {}), (noise, rate)
            before = max(1, len(prices[price])) if price in prices else 0
            prices.setdefault(price, set()).update(digests)
            self._totals[run][price] += max(1, len(prices[price])) - before
            self._last[run] = max(self._last[run], step)
        self._lines, self._chain = number, match[2].decode()
        self._end += len(line) + 1

    def _damaged(self, why: str, number: int) -> InputError:
        return InputError(f"The ledger {self.path} is damaged in line {number}: {why}. {_RESTORE}")


def _hash(chain: str, text: bytes) -> str:
    return hashlib.blake2b(chain.encode() + text, digest_size=16).hexdigest()


def _check(name: str, got: Any, wanted: str, right: bool) -> None:
    if not right:
        raise InputError(f"The ledger got {name}={got!r}, wanted {wanted}.")


def _number(value: Any) -> float:
    """The value, or NaN if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
