"""Every planted bug is caught by the check meant for it; wrong axes with B == seq row by row."""

import pytest
import torch

from dpzoo.auditing import audit
from dpzoo.auditing.exactness import exactness
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import disagreements
from dpzoo.auditing.record import Record
from tests.auditing.planted import PLANTED, Planted
from tests.auditing.planted_models import HIDDEN, WrongAxis, floats


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_bug_is_named_by_its_check(planted: Planted) -> None:
    model, batch = planted.build()
    report = audit(model, batch, **planted.options)
    found = [
        f
        for f in report[planted.check].findings
        if f.severity == planted.severity
        and planted.says in f.message
        and planted.mode in (None, f.mode)
        and (planted.names is None or planted.names in f.parameters + f.modules)
    ]
    assert found, str(report)
    assert all(finding.remedy for finding in found)
    assert report.ok == (planted.severity == "note")


def test_there_are_twenty_planted_bugs_and_every_model_check_has_one() -> None:
    assert len(PLANTED) >= 20
    assert {p.check for p in PLANTED} >= {
        "coverage", "privacy_unit", "exactness", "isolation", "sensitivity", "clipped_sum",
        "microbatching", "edge_cases", "stale_state", "training_effect",
    }  # fmt: skip


def test_rows_tell_a_wrong_axis_where_sums_do_not() -> None:
    """With as many rows as tokens all shapes are right, and so is the sum over rows."""
    model, batch = WrongAxis(), (floats(4, 4, HIDDEN),)
    subject = ModelUnderAudit(
        model, batch, loss=None, max_grad_norm=1.0, modes=("hooks",), rows_as_given=True
    )
    rows = subject.mode_run("hooks").rows
    assert {name: g.shape for name, g in rows.items()} == {
        name: g.shape for name, g in subject.oracle.items()
    }
    sums = {name: g.sum(0) for name, g in rows.items()}
    truth = {name: g.sum(0) for name, g in subject.oracle.items()}
    assert disagreements(sums, truth, 1e-10) == {}
    record = Record("exactness")
    exactness(subject, record)
    (finding,) = record.findings
    assert finding.severity == "privacy"
    assert "the sum over rows is right and the rows are not" in finding.message
    assert set(finding.parameters) == {"inner.weight", "inner.bias"}


def test_as_many_rows_as_tokens_are_cut_and_it_is_said() -> None:
    report = audit(WrongAxis(), (floats(4, 4, HIDDEN),), checks=["privacy_unit"])
    assert report.rows == 3
    assert "the batch has 4 rows; the checks run on 3" in report.remarks[0]


def test_a_token_mean_hides_at_small_clipping_norms() -> None:
    """At C far below the norms every row is clipped to C whatever the others do."""
    from dpzoo.auditing.numerics import clip_and_sum, clip_factors, row_norms
    from tests.auditing.planted import token_batch
    from tests.auditing.planted_models import Tagger, token_mean

    subject = ModelUnderAudit(
        Tagger(), token_batch(), loss=token_mean, max_grad_norm=1.0, modes=("hooks",)
    )
    batch = subject.batch.take([0, 3, 3, 3]).ignoring([1, 2, 3], keep=1)
    distances = []
    for factor in (1e-3, 1.0):
        sums = []
        for some in (batch, batch.without(0)):
            rows = subject.opacus("hooks").run(some).rows
            norms = row_norms(rows)
            clip = factor * float(row_norms(subject.oracle).max())
            sums.append(clip_and_sum(rows, clip_factors(norms, clip)))
        difference = {n: (sums[0][n] - sums[1][n])[None] for n in sums[0]}
        distances.append(float(row_norms(difference)[0]) / clip)
    assert distances[0] == pytest.approx(1.0, rel=1e-3)
    assert torch.tensor(distances).isfinite().all()
