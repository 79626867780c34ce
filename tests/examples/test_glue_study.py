"""The study of what to train: a tiny run of each kind, and a stopped command that goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import glue_study
import pytest

pytestmark = pytest.mark.usefixtures("quick_accountant")
TINY = (
    "--max-length 12 --opinions 12 --opinions-batch-size 6 --mean-layers 1 --first-layers 2 --epochs 2 "
    "--batch-size 30 --steps 2 --epsilons 8 none"
)


def test_the_whole_command(
    checkpoint: Callable[[str, str], Path],
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = checkpoint("bert", "sequence-classification"), tmp_path / "study"
    options = f"--data {reviews} --eval {reviews} --out {out} --model {model} {TINY}".split()
    assert glue_study.main([*options, "--kinds", "head", "lora"]) == 0
    assert glue_study.main(options) == 0  # goes on
    shown = capsys.readouterr().out
    assert "60 rows to train on, 60 held out, delta 1.67e-02" in shown
    assert shown.count("rows read in") == shown.count("lora, epsilon 8:") == 1
    runs = json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"]
    kinds = [
        f"{kind}, {how}" for kind in ("head", "lora", "all") for how in ("epsilon 8", "no privacy")
    ]
    assert {run["kind"] for run in runs.values()} == {glue_study.START, *kinds}
    sizes = {run["kind"]: run.get("parameters") for run in runs.values()}
    assert sizes["head, epsilon 8"] < sizes["lora, epsilon 8"] < sizes["all, epsilon 8"]
    for run in runs.values():
        assert 0 <= run["accuracy"] <= 1
        if run["kind"].endswith("epsilon 8"):
            assert 7 < run["epsilon"] <= 8
    assert glue_study.main([*options, "--delta", "0.01"]) == 2
    assert "is from other settings" in capsys.readouterr().err


def test_no_negative_epsilon(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--data {reviews} --eval {reviews} --out {tmp_path} --epsilons 0".split()
    assert glue_study.main(options) == 2
    assert "--epsilons and --seeds want numbers above 0" in capsys.readouterr().err
