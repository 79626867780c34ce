"""The example for several processes, under torchrun."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from tests.distributed.torchrun import ROOT, run_two_processes
from tests.examples.tiny import save_tiny_bert

EXAMPLES = ROOT / "examples"

WORDS = {"pos": ("good", "fine", "great"), "neg": ("bad", "poor", "awful")}


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """The command line for a BERT of two small layers on 60 rows."""
    model = save_tiny_bert(tmp_path / "tiny", [*WORDS["pos"], *WORDS["neg"]])
    labels = ["neg", "pos"] * 30
    lines = [
        f"{WORDS[label][i % 3]} {WORDS[label][i % 2]}\t{label}" for i, label in enumerate(labels)
    ]
    data = tmp_path / "reviews.tsv"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = f"--model {model} --data {data} --eval {data} --out {tmp_path / 'out'}"
    return [
        *paths.split(),
        *["--epochs", "1", "--max_length", "8", "--physical", "2", "--timeout", "60"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes(way: str, options: list[str], tmp_path: Path) -> None:
    """With two rows to a batch, most steps have a rank that draws none: they stay in step."""
    script = str(EXAMPLES / "distributed.py")
    command = [script, *options, "--batch_size", "2", "--way", way]
    printed = run_two_processes(command, tmp_path / "log")
    found = re.findall(rf"^{way}: epsilon ([67]\.\d\d), accuracy \d", printed, re.MULTILINE)
    assert len(found) == 1
    before, after = (
        BertForSequenceClassification.from_pretrained(options[options.index(key) + 1])
        for key in ("--model", "--out")
    )
    for name, parameter in before.named_parameters():
        assert not torch.equal(parameter, after.get_parameter(name)), name
        assert bool(after.get_parameter(name).isfinite().all()), name


def test_without_torchrun_it_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    start = runpy.run_path(str(EXAMPLES / "distributed.py"))["start"]
    with pytest.raises(SystemExit, match="torchrun --standalone --nproc-per-node 2"):
        start(60)
