"""What a check writes while it runs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dpzoo.auditing.findings import CheckResult, Finding, Severity
from dpzoo.auditing.numerics import errors


class Record:
    """The findings of one check, and what it had to leave out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.findings: list[Finding] = []
        self.skipped: list[str] = []
        self.parts = 0
        self.largest: dict[str, float] = {}
        self.owners: Callable[[Iterable[str]], tuple[str, ...]] = lambda names: ()
        """Names of parameters -> the modules that hold them."""

    def ran(self) -> None:
        """Count a part of the check that ran."""
        self.parts += 1

    def skip(self, reason: str) -> None:
        """Say why a part of the check did not."""
        if reason not in self.skipped:
            self.skipped.append(reason)

    def measure(self, value: float, unit: str = "relative") -> None:
        """Keep the largest of the errors that a check measured, in a unit."""
        if not value <= self.largest.get(unit, -1.0):
            self.largest[unit] = value

    def differ(
        self, got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float
    ) -> dict[str, float]:
        """`disagreements`, with the largest error kept."""
        off = errors(got, wanted)
        self.measure(max(off.values(), default=0.0))
        return {name: error for name, error in off.items() if not error <= tolerance}

    def find(
        self,
        severity: Severity,
        message: str,
        remedy: str = "",
        *,
        parameters: Iterable[str] = (),
        modules: Iterable[str] | None = None,
        mode: str | None = None,
        expected: Any = None,
        got: Any = None,
    ) -> None:
        """Add a finding; arguments as of `Finding`. Its modules are by default the parameters' owners."""
        parameters = tuple(parameters)
        self.findings.append(
            Finding(
                check=self.name,
                severity=severity,
                message=message,
                remedy=remedy,
                parameters=parameters,
                modules=self.owners(parameters) if modules is None else tuple(modules),
                mode=mode,
                expected=None if expected is None else str(expected),
                got=None if got is None else str(got),
            )
        )

    def result(self, catches: str, seconds: float) -> CheckResult:
        """The outcome."""
        ran = self.parts > 0 or bool(self.findings)
        skipped = "; ".join(dict.fromkeys(self.skipped))
        return CheckResult(
            self.name, catches, self.findings, skipped, ran, seconds, dict(self.largest)
        )
