"""The report as text: laid out by rich on a terminal and in a notebook, plain otherwise."""

import io
import shutil
import sys
import textwrap

from dpzoo.auditing.findings import CheckResult, Finding

MOST_NAMES = 6
"""How many parameters or modules a finding lists before it counts the rest."""


def render(
    head: str, remarks: list[str], results: list[CheckResult], findings: list[Finding]
) -> str:
    """The report as text: a line for each check, then every finding with its remedy."""
    seen = sys.stdout.isatty() or "ipykernel" in sys.modules
    return (_rich if seen else _plain)(head, remarks, results, findings)


def summary(result: CheckResult) -> str:
    """What a check's line says beside its name and status."""
    counts = [
        f"{sum(f.severity == severity for f in result.findings)} {severity}"
        for severity in dict.fromkeys(f.severity for f in result.findings)
    ]
    if result.skipped:
        counts.append(f"{'partly ' if result.ran else ''}skipped: {result.skipped}")
    return "; ".join(counts)


def largest(result: CheckResult) -> str:
    """The largest errors that a check measured."""
    return ", ".join(
        f"{value:.4f} C" if unit == "C" else f"{value:.1e} {unit}"
        for unit, value in result.largest.items()
    )


def details(finding: Finding) -> list[str]:
    """A finding as lines, the message first."""
    lines = [str(finding)]
    for title, names in (("parameters", finding.parameters), ("modules", finding.modules)):
        if names:
            rest = len(names) - MOST_NAMES
            more = f" and {rest} more" if rest > 0 else ""
            lines.append(
                f"{title}: {', '.join(n or '(the model)' for n in names[:MOST_NAMES])}{more}"
            )
    if finding.expected is not None or finding.got is not None:
        lines.append(f"expected {finding.expected}, got {finding.got}")
    if finding.remedy:
        lines.append(f"remedy: {finding.remedy}")
    return lines


def _plain(
    head: str, remarks: list[str], results: list[CheckResult], findings: list[Finding]
) -> str:
    lines = [head, *(f"  ({remark})" for remark in remarks), ""]
    width = max((len(result.name) for result in results), default=0)
    wide = max((len(largest(result)) for result in results), default=0)
    for result in results:
        cells = f"  {result.name:<{width}}  {result.status:<7}  {largest(result):<{wide}}"
        lines.append(f"{cells}  {summary(result)}".rstrip())
    for number, finding in enumerate(findings, 1):
        first, *rest = details(finding)
        lines += ["", *textwrap.wrap(f"{number}. {first}", 100, subsequent_indent="   ")]
        for line in rest:
            lines += textwrap.wrap(line, 100, initial_indent="   ", subsequent_indent="     ")
    return "\n".join(lines)


def _rich(
    head: str, remarks: list[str], results: list[CheckResult], findings: list[Finding]
) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = max(80, min(140, shutil.get_terminal_size((110, 24)).columns))
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(Text(head))
    for remark in remarks:
        console.print(Text(f"({remark})"))
    table = Table()
    for title in ("check", "result", "seconds", "largest error", "what"):
        table.add_column(title, justify="right" if title == "seconds" else "left")
    for result in results:
        seconds = f"{result.seconds:.1f}"
        row = (result.name, result.status, seconds, largest(result), summary(result))
        table.add_row(*map(Text, row))
    console.print(table)
    if findings:
        found = Table(show_lines=True)
        for title in ("check", "severity", "finding"):
            found.add_column(title)
        for finding in findings:
            _, *rest = details(finding)
            mode = f"\n[{finding.mode}]" if finding.mode else ""
            text = "\n".join([finding.message, *rest])
            found.add_row(Text(finding.check + mode), Text(finding.severity), Text(text))
        console.print(found)
    text_: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text_.rstrip("\n")
