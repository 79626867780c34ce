"""The audit: what a batch proves about a model's private training, and what a loop reveals.

The package is called ``auditing`` because `dpzoo.audit` is the function: a submodule of that name
would replace it in the package's namespace for whoever imports the submodule.

It works with any `torch.nn.Module` and any batch.
"""

from dpzoo.auditing.findings import CheckResult, Finding, Severity, ShapeRow
from dpzoo.auditing.loop import audit_loop
from dpzoo.auditing.report import AuditFailedError, AuditReport
from dpzoo.auditing.run import CHECKS, audit

__all__ = [
    "CHECKS",
    "AuditFailedError",
    "AuditReport",
    "CheckResult",
    "Finding",
    "Severity",
    "ShapeRow",
    "audit",
    "audit_loop",
]
