"""The accuracy study of a private head: features once, results of each epsilon and seed."""

import json
from collections.abc import Callable
from pathlib import Path

import head_study
import pytest


@pytest.mark.slow
def test_the_study(
    checkpoint: Callable[[str, str], Path],
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = checkpoint("bert", "sequence-classification"), tmp_path / "study"
    options = f"--data {reviews} --eval {reviews} --model {model} --out {out} --seeds 2".split()
    for epsilons in ("8", "8,none"):  # the second time, the features are there
        assert head_study.main([*options, "--max-length", "12", "--epsilons", epsilons]) == 0
    shown = capsys.readouterr().out
    assert shown.count("60 rows read in") == 2
    assert "without privacy: " in shown
    private, plain = json.loads((out / "results.json").read_text())
    assert 7 < private["epsilon"] <= 8
    assert private["delta"] == 1 / 60
    assert plain["epsilon"] is None
    assert len(private["accuracies"]) == len(plain["accuracies"]) == 2
