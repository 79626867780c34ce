"""What an audit says: one result for each check, and the report that holds them."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dpzoo.auditing.check_names import current_name
from dpzoo.auditing.findings import FAILURES, SEVERITIES, CheckResult, Finding, ShapeRow
from dpzoo.auditing.rendering import render
from dpzoo.errors import DpzooError


class AuditFailedError(DpzooError):
    """An audit found something that must be fixed before training; ``report`` has the details."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class AuditReport:
    """The outcome of `dpzoo.audit` or `dpzoo.audit_loop`.

    ``print(report)`` gives a table (laid out by rich on a terminal).

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
    def failures(self) -> list[Finding]:
        """The findings that fail the audit, gravest first: those of privacy, crash and utility."""
        return [finding for finding in self.findings if finding.severity in FAILURES]

    @property
    def ok(self) -> bool:
        """The verdict: some check ran, and none found anything graver than a note.

        It is the only one: `raise_if_failed` raises, and ``dpzoo audit`` exits with 1, exactly where it is
        False. Utility findings count: what is trained would not be what was meant.
        """
        return not self.failures and any(result.ran for result in self.results)

    def __iter__(self) -> Iterator[CheckResult]:
        return iter(self.results)

    def __getitem__(self, check: str) -> CheckResult:
        name = current_name(check)
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"{check!r}; checks that ran: {', '.join(r.name for r in self.results)}")

    def raise_if_failed(self) -> None:
        """Raise where `ok` is False.

        Raises:
            AuditFailedError: with the failures in its message and the report as ``report``.
        """
        if self.ok:
            return
        lines = "\n".join(f"- {finding} {finding.remedy}".rstrip() for finding in self.failures)
        count = len(self.failures)
        why = (
            f"failed in {count} place(s):\n{lines}"
            if count
            else "proved nothing: no check could run"
        )
        raise AuditFailedError(f"The audit of {self.model} {why}", self)

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
        # Tuples become lists; what is no number, which JSON does not have, becomes text.
        for check in checks:
            check["largest"] = {
                unit: value if math.isfinite(value) else str(value)
                for unit, value in check["largest"].items()
            }
        plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
        return plain

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        head = [f"audit of {self.model}: {'ok' if self.ok else 'FAILED'}"]
        head += [f"{self.rows} rows"] if self.rows else []
        head += [f"modes {', '.join(self.modes)}"] if self.modes else []
        head += [self.dtype] if self.dtype else []
        head.append(f"{self.seconds:.1f} s")
        return render(", ".join(head), self.remarks, self.results, self.findings)
