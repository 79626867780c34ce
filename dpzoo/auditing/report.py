"""What an audit says: findings, one result for each check, and the report that holds them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dpzoo.errors import DpzooError

Severity = Literal["privacy", "crash", "utility", "note"]

SEVERITIES: tuple[Severity, ...] = ("privacy", "crash", "utility", "note")
"""Gravest first.

privacy: the guarantee does not hold, though nothing raises. crash: training stops. utility: private,
but not the training that was meant. note: worth knowing, and no reason to stop.
"""


class AuditFailedError(DpzooError):
    """An audit found something that must be mended before training; ``report`` has the details."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


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
    """

    name: str
    catches: str
    findings: list[Finding] = field(default_factory=list)
    skipped: str = ""
    ran: bool = True
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """``failed``, ``passed`` (perhaps with notes) or ``skipped``."""
        if any(finding.severity != "note" for finding in self.findings):
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


@dataclass
class AuditReport:
    """The outcome of `dpzoo.audit` or `dpzoo.audit_loop`.

    ``print(report)`` gives a table (laid out by rich, where that is installed).

    Args:
        model: the class of what was audited.
        rows: number of rows of the batch that the checks ran on.
        modes: the grad_sample_modes that were asked for.
        dtype: the dtype that gradients were compared in.
        results: one for each check, in the order in which they ran.
        shapes: the layer-by-layer table of activation, backprop and grad_sample shapes.
        remarks: what was done to the batch before the checks.
        seconds: wall-clock time of the whole.
    """

    model: str
    rows: int = 0
    modes: tuple[str, ...] = ()
    dtype: str = ""
    results: list[CheckResult] = field(default_factory=list)
    shapes: list[ShapeRow] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def findings(self) -> list[Finding]:
        """All findings, gravest first."""
        found = [finding for result in self.results for finding in result.findings]
        return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))

    @property
    def ok(self) -> bool:
        """Whether nothing graver than a note was found."""
        return all(finding.severity == "note" for finding in self.findings)

    def __iter__(self) -> Iterator[CheckResult]:
        return iter(self.results)

    def __getitem__(self, check: str) -> CheckResult:
        for result in self.results:
            if result.name == check:
                return result
        raise KeyError(f"{check!r}; checks that ran: {', '.join(r.name for r in self.results)}")

    def raise_if_failed(self, *, severities: tuple[Severity, ...] = SEVERITIES[:3]) -> None:
        """Raise if there is a finding of one of the severities.

        Raises:
            AuditFailedError: with the findings in its message and the report as ``report``.
        """
        failures = [f for f in self.findings if f.severity in severities]
        if failures:
            lines = "\n".join(f"- {finding} {finding.remedy}".rstrip() for finding in failures)
            raise AuditFailedError(
                f"The audit of {self.model} failed in {len(failures)} place(s):\n{lines}", self
            )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: dicts, lists, strings and numbers."""
        checks = [{**asdict(result), "status": result.status} for result in self.results]
        data = {
            "model": self.model,
            "ok": self.ok,
            "rows": self.rows,
            "modes": list(self.modes),
            "dtype": self.dtype,
            "seconds": self.seconds,
            "remarks": self.remarks,
            "checks": checks,
            "shapes": [asdict(row) for row in self.shapes],
        }
        plain: dict[str, Any] = json.loads(json.dumps(data))  # tuples become lists
        return plain

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        # Rendering stands above the data and may need rich.
        from dpzoo.auditing.rendering import render

        return render(self)
