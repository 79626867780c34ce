"""No false alarm on clean models that are not dpzoo's."""

import pytest

from dpzoo.auditing import audit
from tests.auditing.clean import CLEAN, NO_EMPTY_BATCH


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_model_passes(name: str) -> None:
    model, batch, options = CLEAN[name]()
    report = audit(model, batch, **options)
    alarms = {
        (f.check, f.mode, f.message.partition(":")[0])
        for f in report.findings
        if f.severity != "note"
    }
    modes = [mode for mode in NO_EMPTY_BATCH.get(name, ("", ""))[0].split(", ") if mode]
    true = {("edges", mode, f"{mode} mode raises on an empty batch") for mode in modes}
    assert alarms == true, str(report)
    assert report.ok == (not true)
    for result in report:
        allowed = ("scalar", "only ghost") if result.skipped else ()
        assert not result.skipped or any(word in result.skipped for word in allowed), result.skipped


def test_there_are_ten() -> None:
    assert len(CLEAN) >= 10
