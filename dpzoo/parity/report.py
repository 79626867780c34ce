"""What a comparison found."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        error: the largest difference, relative where the values are larger than 0; a count where
            things are equal or not.
        tolerance: the largest error that passes.
        where: the output, parameter or field with the largest error; empty if there is none.
    """

    name: str
    error: float
    tolerance: float
    where: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passed; not a number does not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Parity:
    """What the comparisons of a checkpoint found.

    Attributes:
        model: the class.
        task: dpzoo's name of its task.
        parameters: their number; a tied weight counts once.
        stored: dtype of the written weights.
        compared: dtype in which outputs and gradients were compared.
        fresh: parameters that the source does not have; they are random, from a fixed seed.
        unused: keys of the source that the class does not have; they are not written.
        checks: the comparisons.
    """

    model: str
    task: str
    parameters: int
    stored: str
    compared: str
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every comparison passed."""
        return all(check.ok for check in self.checks)


def counted(name: str, found: list[str]) -> Check:
    """A check that nothing was found."""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return Check(name, float(len(found)), 0.0, found[0] + more if found else "")


def worst_of(name: str, errors: Mapping[str, float], tolerance: float) -> Check:
    """The check of the largest of several errors."""
    worst, where = 0.0, ""
    for key in sorted(errors):
        if larger(worst, errors[key]) is not worst:
            worst, where = errors[key], key
    return Check(name, worst, tolerance, where)


def larger(a: float, b: float) -> float:
    """The larger of two errors; not a number is larger than any."""
    return b if a == a and not b <= a else a
