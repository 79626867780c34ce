"""No false alarm on clean models that are not dpzoo's."""

import random

import pytest
import torch
from torch import nn

from dpzoo.auditing import audit
from dpzoo.auditing.run import COMPARING
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
    true = {("edge_cases", mode, f"{mode} mode raises on an empty batch") for mode in modes}
    assert alarms == true, str(report)
    assert report.ok == (not true)
    for result in report:
        allowed = ("scalar", "only ghost") if result.skipped else ()
        assert not result.skipped or any(word in result.skipped for word in allowed), result.skipped


RANDOM = {
    "variational auto-encoder": "random in training (randn)",
    "stochastic depth of rows": "random in training (rand)",
    "stochastic depth of a layer": "random in training (Python's or numpy's random numbers)",
    "dropout by another name": "random in training (bernoulli)",
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_model_that_draws_is_called_random(name: str) -> None:
    model, batch, options = CLEAN[name]()
    report = audit(model, batch, **options, checks=["privacy_unit"])
    said = [remark for remark in report.remarks if "random" in remark]
    assert [remark.partition(",")[0] for remark in said] == [RANDOM.get(name)] * (name in RANDOM)


def test_a_model_that_nothing_holds_is_random_and_is_not_compared() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.calls = nn.Linear(7, 5), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = [
                [random.random() for _ in row] for row in x
            ]  # as many numbers as there are rows
            return self.head(x + torch.tensor(noise, dtype=x.dtype).reshape(x.shape))

    report = audit(Counting(), (torch.randn(4, 7),))
    assert report.ok, str(report)
    for name in COMPARING:
        assert "equal runs differ, and nothing can be compared" in report[name].skipped
        assert report[name].status == "skipped"


def test_there_are_ten() -> None:
    assert len(CLEAN) >= 10
