"""The study of docs/empirical-audit.md, examples/studies/empirical_audit.py, with one seed of it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def study() -> Any:
    spec = importlib.util.spec_from_file_location(
        "study", ROOT / "examples" / "studies" / "empirical_audit.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_right_run_passes_and_its_white_box_bound_is_above_one_and_a_half() -> None:
    report = study().run("none", 2.542, seed=0)
    assert report.epsilon == pytest.approx(8.0, abs=0.02)
    assert report.ok
    assert report["any mechanism"].epsilon > 1.5


def test_half_the_noise_is_found() -> None:
    report = study().run("half the noise", 2.542, seed=0)
    assert not report.ok
    assert report["independent canaries"].epsilon > 8.0


@pytest.mark.slow
@pytest.mark.parametrize("fault", study().FAULTS[1:])
def test_every_planted_fault_is_found(fault: str) -> None:
    assert not study().run(fault, 2.542, seed=1).ok
