"""The notebook runs from top to bottom, with fewer rows and epochs."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import transformers

from tests.examples.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "first_run.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.usefixtures("quick_accountant")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in cells("code"):
        code = "".join(cell["source"])
        code = code.replace(
            "ROWS, EPOCHS, DELTA = 2000, 10, 1e-4", "ROWS, EPOCHS, DELTA = 60, 2, 1e-2"
        )
        code = code.replace("[0.5, 1.0, 2.0, 4.0, 8.0]", "[2.0, 8.0]")
        exec(compile(code, NOTEBOOK.name, "exec"), names)
    assert names["ROWS"] == 60
    assert len(names["seen"]) == 2
    assert 7 < names["seen"][-1][0] <= 8
    assert len(names["scores"]) == 2
    assert names["report"].ok
    transformers.BertForSequenceClassification.from_pretrained("private-model")


def test_its_outputs_are_stored_and_small() -> None:
    """Plots are for people who look at it without running it."""
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not any(output["output_type"] == "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 200_000
