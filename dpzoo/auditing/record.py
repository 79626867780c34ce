"""What a check writes while it runs."""

from collections.abc import Iterable
from typing import Any

from dpzoo.auditing.findings import CheckResult, Finding, Severity


class Record:
    """The findings of one check, and what it had to leave out.

    Args:
        name: the check's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.findings: list[Finding] = []
        self.skipped: list[str] = []
        self.parts = 0

    def ran(self) -> None:
        """Count a part of the check that ran."""
        self.parts += 1

    def skip(self, reason: str) -> None:
        """Say why a part of the check did not."""
        if reason not in self.skipped:
            self.skipped.append(reason)

    def find(
        self,
        severity: Severity,
        message: str,
        remedy: str = "",
        *,
        parameters: Iterable[str] = (),
        modules: Iterable[str] = (),
        mode: str | None = None,
        expected: Any = None,
        got: Any = None,
    ) -> None:
        """Add a finding; see `Finding` for the arguments."""
        self.findings.append(
            Finding(
                check=self.name,
                severity=severity,
                message=message,
                remedy=remedy,
                parameters=tuple(parameters),
                modules=tuple(modules),
                mode=mode,
                expected=None if expected is None else str(expected),
                got=None if got is None else str(got),
            )
        )

    def result(self, catches: str, seconds: float) -> CheckResult:
        """The outcome."""
        ran = self.parts > 0 or bool(self.findings)
        return CheckResult(self.name, catches, self.findings, "; ".join(self.skipped), ran, seconds)
