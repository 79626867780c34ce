"""``dpzoo audit``: the zoo's model or the stock one, random rows or a file's, table or JSON."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dpzoo.cli import main
from dpzoo.example_batch import example_batch
from dpzoo.registry import stock_class
from tests.support import NAMES, TASK, class_by_name, stock_model, tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> str:
    stock_model("BertForMaskedLM", dtype=torch.float32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_zoos_model_passes_and_the_stock_one_does_not(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", folder, "--checks", "coverage,isolation,exactness"]) == 0
    assert "audit of BertForMaskedLM: ok" in capsys.readouterr().out
    assert main(["audit", folder, "--stock", "--checks", "coverage,isolation"]) == 1
    out = capsys.readouterr().out
    assert "audit of BertForMaskedLM: FAILED" in out
    assert "bert.embeddings.position_embeddings" in out


def test_json_and_another_task(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--json",
        "--task",
        "sequence-classification",
        "--checks",
        "unit",
        "--modes",
        "hooks",
    ]
    assert main(["audit", folder, *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["model"], data["modes"], data["ok"]) == (
        "BertForSequenceClassification",
        ["hooks"],
        True,
    )


def test_what_cannot_run_is_said(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", folder, "--checks", "nonsense"]) == 2
    assert (
        "dpzoo: audit got checks ['nonsense'], wanted some of: coverage" in capsys.readouterr().err
    )
    short = Path(folder) / "short.tsv"
    short.write_text("one row\t1\n")
    assert main(["audit", folder, "--data", str(short)]) == 2
    assert "short.tsv has 1 rows, wanted at least 4" in capsys.readouterr().err


def test_rows_of_a_file(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first rows of a file, through the checkpoint's own tokenizer, classes included."""
    words = [
        "[UNK]",
        "[PAD]",
        *["the", "film", "is", "good", "bad", "long", "short", "and", "very"],
    ]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]", model_max_length=20
    )
    tokenizer.save_pretrained(folder)
    data = Path(folder) / "rows.tsv"
    data.write_text("the film is good\t1\nbad\t0\nvery long and bad\t0\nshort and good\t1\n")
    options = [
        "--task",
        "sequence-classification",
        "--data",
        str(data),
        "--checks",
        "exactness,unit",
    ]
    assert main(["audit", folder, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["rows"] >= 3


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_a_batch_that_its_class_takes(name: str) -> None:
    config = tiny_config(name)
    model = stock_class(class_by_name(name))(config)
    with torch.no_grad():
        outputs = model(**example_batch(TASK[name], config))
    if TASK[name] != "base":
        assert bool(outputs.loss.isfinite())
