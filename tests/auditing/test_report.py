"""The report: its verdict, its table on a terminal and elsewhere, its data."""

import json
import sys

import pytest
import torch
from torch import nn

import dpzoo
from dpzoo.auditing import CHECKS, AuditFailedError, AuditReport, CheckResult, Finding, audit
from dpzoo.auditing.batches import Batch, prepared
from dpzoo.auditing.check_names import FORMER_NAMES
from dpzoo.auditing.report import SEVERITIES
from dpzoo.auditing.run import chosen
from dpzoo.errors import InputError
from tests.auditing.planted_models import HIDDEN, Flattening, Positions, floats, ids


@pytest.fixture(scope="module")
def positions() -> AuditReport:
    torch.manual_seed(0)
    return audit(Positions(), (ids(4, 6),))


def test_the_finding_for_shared_positions_says_what_where_and_how(positions: AuditReport) -> None:
    (finding,) = [f for f in positions.findings if "one input for the whole batch" in f.message]
    assert finding.modules == ("positions",)
    assert finding.parameters == ("positions.weight",)
    assert finding.expected == "batch dimension 4"
    assert finding.got == "batch dimension 1, input (1, 6)"
    assert "per-row position_ids" in finding.remedy
    assert "dpzoo.convert(model)" in finding.remedy


def test_shapes_are_the_table_that_people_print(positions: AuditReport) -> None:
    row = {r.module: r for r in positions.shapes}
    assert row["tokens"].activation == ((4, 6),)
    assert row["tokens"].backprop == (4, 6, HIDDEN)
    assert row["tokens"].grad_sample == {"weight": (4, 11, HIDDEN)}
    assert row["positions"].activation == ((1, 6),)
    assert row["positions"].grad_sample == {"weight": (1, 6, HIDDEN)}
    assert row["head"].grad_sample == {"weight": (4, 3, HIDDEN), "bias": (4, 3)}
    assert "positions (Embedding): ((1, 6),)" in str(row["positions"])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_names_checks_and_findings(
    positions: AuditReport, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    text = str(positions)
    assert text.startswith("audit of Positions: FAILED, 4 rows, modes hooks, ghost, bk, float64")
    assert ("━" in text) == terminal
    for name in CHECKS:
        assert name in text
    flat = " ".join(text.replace("│", " ").split())
    assert "expected batch dimension 4, got batch dimension 1" in flat
    assert "remedy: give the module one input row for each row of the batch" in flat


def test_the_report_is_plain_data(positions: AuditReport) -> None:
    data = json.loads(positions.to_json())
    assert data == positions.to_dict()
    assert data["ok"] is False
    checks = {check["name"]: check for check in data["checks"]}
    assert checks["coverage"]["status"] == "failed"
    assert checks["coverage"]["findings"][0]["modules"] == ["positions"]
    assert all(check["catches"] for check in checks.values())


def test_raise_if_failed(positions: AuditReport) -> None:
    with pytest.raises(
        AuditFailedError, match=r"The audit of Positions failed in \d place"
    ) as raised:
        positions.raise_if_failed()
    assert raised.value.report is positions
    note = CheckResult("x", "", [Finding("x", "note", "n")])
    AuditReport("M", results=[note]).raise_if_failed()
    assert note.status == "passed"


@pytest.mark.parametrize("severity", SEVERITIES)
def test_there_is_one_verdict(severity: str) -> None:
    """What `ok` says, what raises and what is called failed; the command exits by the same."""
    result = CheckResult("x", "", [Finding("x", severity, "wrong", "fix it")])  # type: ignore[arg-type]
    report = AuditReport("M", results=[result])
    assert report.ok == (severity == "note") == (not report.failures)
    assert str(report).startswith(f"audit of M: {'ok' if report.ok else 'FAILED'}")
    if not report.ok:
        with pytest.raises(AuditFailedError, match=f"- x, {severity}: wrong fix it"):
            report.raise_if_failed()


def test_an_audit_in_which_nothing_ran_proves_nothing() -> None:
    report = audit(nn.Linear(7, 5), (floats(4, 7),), checks=["stale_state"], modes=["hooks"])
    assert not report.ok
    with pytest.raises(AuditFailedError, match="Linear proved nothing: no check could run"):
        report.raise_if_failed()


def test_audit_is_a_function_and_the_package_is_called_auditing() -> None:
    assert dpzoo.audit is audit
    assert callable(dpzoo.audit_loop)
    assert {"audit", "audit_loop", "AuditReport", "Finding"} <= set(dpzoo.__all__)


def test_checks_can_be_chosen_and_progress_is_told() -> None:
    told: list[str] = []
    report = audit(
        nn.Linear(7, 5),
        (floats(4, 7),),
        checks=["noise", "privacy_unit"],
        modes="hooks",
        progress=told.append,
    )
    assert [result.name for result in report] == told == ["noise", "privacy_unit"]
    with pytest.raises(KeyError, match="checks that ran: noise, privacy_unit"):
        report["coverage"]


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_former_names_of_checks_are_read_with_a_warning(former: str, name: str) -> None:
    assert name in CHECKS
    assert former not in CHECKS
    message = f"check '{former}' is now '{name}'"
    for checks in (former, [former, name]):
        with pytest.warns(FutureWarning, match=message):
            assert chosen(None, checks, quick=False)[1] == (name,)
    result = CheckResult(name, "")
    with pytest.warns(FutureWarning, match=message):
        assert AuditReport("M", results=[result])[former] is result


def test_an_audit_takes_a_former_name() -> None:
    with pytest.warns(FutureWarning, match="check 'parity' is now 'clipped_sum'"):
        report = audit(nn.Linear(7, 5), (floats(4, 7),), checks=["parity"], modes=["hooks"])
    assert [result.name for result in report] == ["clipped_sum"]


def test_what_cannot_be_audited_is_refused() -> None:
    model, batch = nn.Linear(7, 5), (floats(4, 7),)
    from opacus import GradSampleModule

    for arguments, options, message in (
        (
            (model, batch),
            {"modes": ["hooks", "hook"]},
            r"got modes \['hook'\], wanted some of: hooks",
        ),
        ((model, batch), {"checks": []}, "checks that are empty"),
        ((model, batch), {"max_grad_norm": 0}, "wanted a number above 0"),
        ((model, (floats(4, 6),)), {}, "does not run through Linear: RuntimeError"),
        ((model, (floats(0, 7),)), {}, "empty batch"),
        ((model, "text"), {}, "batch of type str"),
        ((model, {"x": 3}), {}, "without tensors"),
        (("model", batch), {}, "got str, wanted a torch.nn.Module"),
        ((GradSampleModule(nn.Linear(7, 5)), batch), {}, "wrapped model"),
        ((nn.Tanh(), batch), {}, "without trainable parameters"),
        ((model, batch), {"loss": lambda m, b: 3.0}, "loss returned float"),
        ((model, batch), {"loss": lambda m, b: m(b[0])}, r"loss has shape \(4, 5\), wanted \(4,\)"),
        (
            (model, (floats(7)[None].expand(1, 7),)),
            {"loss": lambda m, b: m(b[0]).sum(0)},
            "has shape",
        ),
    ):
        with pytest.raises(InputError, match=message):
            audit(*arguments, **options)


def test_a_report_on_the_unit_counts() -> None:
    report = audit(Flattening(), (floats(4, 3, HIDDEN),), checks=["privacy_unit"], modes=("hooks",))
    (finding,) = report.findings
    assert "12 = 3 * 4" in finding.message
    assert (finding.expected, finding.got) == ("first dimension 4", "12 in (12, 8)")


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 9), 3), ((2, 9), 3), ((3, 9), 3), ((9, 2), 5), ((3, 3), 4), ((5, 5), 4)],
)
def test_rows_are_few_and_unlike_other_dimensions(shape: tuple[int, ...], rows: int) -> None:
    batch, remarks = prepared(Batch((torch.zeros(shape),)), [])
    assert batch.rows == rows
    assert bool(remarks) == (rows != shape[0])
