"""``dpzoo audit``: the zoo's model or the stock one, random rows or a file's, table or JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dpzoo.auditing.run import QUICK
from dpzoo.cli import main
from dpzoo.example_batch import example_batch
from dpzoo.families.tiny import build
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
    assert out.isascii(), "no frames in a pipe"
    assert "bert.embeddings.position_embeddings" in out


def test_json_and_another_task(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--json",
        "--task",
        "sequence-classification",
        "--checks",
        "privacy_unit",
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
        "exactness,privacy_unit",
    ]
    assert main(["audit", folder, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["rows"] >= 3


def test_any_architecture_is_audited_in_bk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stock class, in bk, with a batch from its config; fewer checks with --quick."""
    model, _ = build("causal-lm/llama")
    model.float().save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path), "--quick", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["model"], data["modes"], data["ok"]) == ("LlamaForCausalLM", ["bk"], True)
    assert [check["name"] for check in data["checks"]] == list(QUICK)
    assert any(
        "a quick audit, without privacy_unit, sensitivity" in remark for remark in data["remarks"]
    )
    largest = {check["name"]: check["largest"] for check in data["checks"]}
    assert 0 <= largest["exactness"]["relative"] < 1e-9
    assert largest["neighbours"]["C"] == pytest.approx(1.0, abs=1e-3)
    with pytest.warns(FutureWarning, match="'unit' is now 'privacy_unit'"):
        assert main(["audit", str(tmp_path), "--task", "base", "--checks", "coverage,unit"]) == 0
    assert "audit of LlamaModel: ok, 4 rows, modes bk" in capsys.readouterr().out


def test_rows_that_the_tokenizer_does_not_know(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its files transformers makes a tokenizer of no words: four equal rows of [UNK]."""
    data = Path(folder) / "rows.tsv"
    data.write_text("the film is good\nbad\nvery long and bad\nshort\n")
    assert main(["audit", folder, "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "knows no word of row 1 of" in error
    assert "leave --data out" in error


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


BAD: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "config": (
        lambda f: (f / "config.json").write_text("{"),
        [],
        "cannot be loaded by transformers",
    ),
    "family": (
        lambda f: _config(f, model_type="gpt2"),
        [],
        "none of its weights would be read",
    ),
    "class": (
        lambda f: _config(f, architectures=["Nonsense"]),
        [],
        "was saved from Nonsense, which",
    ),
    "shapes": (
        lambda f: _config(f, intermediate_size=21),
        [],
        "is (20,), wanted (21,)",
    ),
    "layers": (
        lambda f: _config(f, num_hidden_layers=3),
        [],
        "and 10 more: a BertForMaskedLM of it would be random there",
    ),
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99), [], "SafetensorError"),
    "nan": (
        lambda f: _weights(f, lambda w: {k: v * float("nan") for k, v in w.items()}),
        [],
        "parameters with NaN or Inf: bert.",
    ),
    "names": (
        lambda f: _weights(f, lambda w: {f"x.{k}": v for k, v in w.items()}),
        [],
        "a BertForMaskedLM of it would be random there",
    ),
    "mode": (lambda f: None, ["--modes", "hook"], "got modes ['hook'], wanted some of: hooks"),
    "norm": (
        lambda f: None,
        ["--max-grad-norm", "abc"],
        "--max-grad-norm got 'abc', wanted a number",
    ),
    "task": (lambda f: None, ["--task", "singing"], "does not know task 'singing'"),
    "data": (lambda f: None, ["--data", "/nowhere"], "/nowhere cannot be read: FileNotFoundError"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_broken_ends_in_one_line(
    what: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in JSON, where that was asked for."""
    broken, options, says = BAD[what]
    broken(Path(folder))
    capsys.readouterr()
    assert main(["audit", folder, *options, "--json"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("dpzoo: ")
    assert says in line
    assert json.loads(captured.out) == {"ok": False, "error": line.removeprefix("dpzoo: ")}


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_a_batch_that_its_class_takes(name: str) -> None:
    config = tiny_config(name)
    model = stock_class(class_by_name(name))(config)
    with torch.no_grad():
        outputs = model(**example_batch(TASK[name], config))
    if TASK[name] != "base":
        assert bool(outputs.loss.isfinite())
