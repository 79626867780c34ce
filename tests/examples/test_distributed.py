"""The example for several processes: two of them under torchrun, and one as the simplest case."""

import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from tests.distributed.torchrun import ROOT, run_two_processes

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))  # as when the script runs

WORDS = {"pos": ("good", "fine", "great"), "neg": ("bad", "poor", "awful")}


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """The command line for a BERT of two small layers on 60 rows."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS["pos"], *WORDS["neg"]]
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(model / "vocab.txt")).save_pretrained(model)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(model)
    labels = ["neg", "pos"] * 30
    lines = [
        f"{WORDS[label][i % 3]} {WORDS[label][i % 2]}\t{label}" for i, label in enumerate(labels)
    ]
    data = tmp_path / "reviews.tsv"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = f"--model {model} --data {data} --eval {data} --out {tmp_path / 'out'}"
    small = "--epochs 1 --max-length 8 --physical-batch-size 2"
    return [*paths.split(), *small.split()]


def assert_trained(options: list[str]) -> None:
    """What was saved is a stock checkpoint, and every parameter has moved."""
    before, after = (
        BertForSequenceClassification.from_pretrained(options[options.index(key) + 1])
        for key in ("--model", "--out")
    )
    assert after.config.id2label == {0: "neg", 1: "pos"}
    for name, parameter in before.named_parameters():
        assert not torch.equal(parameter, after.get_parameter(name)), name
        assert bool(after.get_parameter(name).isfinite().all()), name


def test_two_processes(options: list[str], tmp_path: Path) -> None:
    """With two rows to a batch, most steps have a rank that draws none: they stay in step."""
    script = str(EXAMPLES / "distributed.py")
    printed = run_two_processes([script, *options, "--batch-size", "2"], tmp_path / "log")
    assert "60 rows to train on, 60 held out" in printed
    assert "in 2 processes on cpu" in printed
    assert "private, rank 0 of 2: step 30/30" in printed
    assert re.search(r"privacy +epsilon [67]\.\d\d at delta 1\.67e-02", printed)
    assert printed.count("held-out accuracy") == 1
    assert_trained(options)


def test_one_process(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import distributed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key, value in {
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(key, value)
    assert distributed.main([*options, "--batch-size", "12", "--mode", "hooks"]) == 0
    assert "private, rank 0 of 1: step 5/5" in capsys.readouterr().out
    assert_trained(options)


def test_without_torchrun_it_says_how(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import distributed

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.main(options) == 2
    assert "torchrun --standalone --nproc-per-node 2" in capsys.readouterr().err
