"""What a check says: findings, its result, and the shapes that it saw."""

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["privacy", "crash", "utility", "note"]

SEVERITIES: tuple[Severity, ...] = ("privacy", "crash", "utility", "note")
"""Gravest first.

privacy: the guarantee does not hold, though nothing raises. crash: training stops. utility: private,
but not the training that was meant (gradients that are not the rows', weights that do not move). note:
worth knowing, and no reason to stop.
"""

FAILURES = SEVERITIES[:3]
"""What fails an audit; see `AuditReport.ok`."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Args:
        check: the check's name.
        severity: one of `SEVERITIES`.
        message: what is wrong, in a sentence.
        remedy: what to do about it, in a line.
        parameters: full names of the parameters concerned, worst first.
        modules: paths of the modules concerned.
        mode: grad_sample_mode in which it shows; None where it does not depend on one.
        expected: the shape or number that was wanted.
        got: the shape or number that was found.
    """

    check: str
    severity: Severity
    message: str
    remedy: str = ""
    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    mode: str | None = None
    expected: str | None = None
    got: str | None = None

    def __str__(self) -> str:
        where = f" [{self.mode}]" if self.mode else ""
        return f"{self.check}{where}, {self.severity}: {self.message}"


@dataclass
class CheckResult:
    """One check's outcome.

    Args:
        name: the check's name.
        catches: the bugs that it is there for.
        findings: what it found.
        skipped: why it could not run, or could not in some mode; empty where it ran in full.
        ran: whether any part of it ran.
        seconds: its wall-clock time.
        largest: the largest error that it measured, by unit: "relative" to the gradient's largest entry,
            "C" for what a row moves the clipped sum by, in clipping norms (1 is what it may), ...
    """

    name: str
    catches: str
    findings: list[Finding] = field(default_factory=list)
    skipped: str = ""
    ran: bool = True
    seconds: float = 0.0
    largest: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``failed``, ``passed`` (perhaps with notes) or ``skipped``."""
        if any(finding.severity in FAILURES for finding in self.findings):
            return "failed"
        return "passed" if self.ran else "skipped"


@dataclass(frozen=True)
class ShapeRow:
    """One call of a module that holds parameters, as a line of `AuditReport.shapes`.

    Args:
        module: the module's path.
        kind: its class.
        activation: the shapes of its inputs.
        backprop: the shape of the gradient of its output; None if none came back.
        grad_sample: parameter name -> shape of the per-sample gradient (hooks mode where audited).
    """

    module: str
    kind: str
    activation: tuple[tuple[int, ...], ...]
    backprop: tuple[int, ...] | None
    grad_sample: dict[str, tuple[int, ...] | None]

    def __str__(self) -> str:
        samples = ", ".join(f"{name} {shape}" for name, shape in self.grad_sample.items())
        return f"{self.module} ({self.kind}): {self.activation} <- {self.backprop}; {samples}"
