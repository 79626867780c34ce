"""Text classification, LoRA, and bringing one's own model: tiny runs of the whole scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bring_your_own
import lora
import pytest
import text_classification
import torch
from peft import PeftModel
from support.data import Row
from support.texts import encode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.examples.tiny import SMALL

pytestmark = [
    pytest.mark.usefixtures("quick_accountant"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT, of itself
]
Build = Callable[[str, str], Path]
Shown = pytest.CaptureFixture[str]


def stock(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_text_classification(
    family: str, checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown
) -> None:
    folder, out = checkpoint(family, "sequence-classification"), tmp_path / "out"
    options = f"--model {folder} --data {reviews} --eval {reviews} --out {out} {SMALL}"
    options += " --recipe text-classification"
    assert text_classification.main(options.split()) == 0
    shown = capsys.readouterr().out
    for part in (
        "60 rows to train on, 60 held out",
        "private: step 10/10",
        "add or remove one row",
    ):
        assert part in shown
    assert "at delta 8.33e-03" in shown
    assert "(always 'neg': 50.0%)" in shown
    after = stock(out)
    assert after.config.id2label == {0: "neg", 1: "pos"}
    assert len(AutoTokenizer.from_pretrained(out)) == after.config.vocab_size
    moved = {
        name
        for (name, new), old in zip(
            after.named_parameters(), stock(folder).parameters(), strict=True
        )
        if new.shape != old.shape or not torch.equal(new, old)
    }
    assert moved == {name for name, _ in after.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_head_on_the_frozen_encoder_is_the_default(
    family: str, checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown
) -> None:
    folder, out = checkpoint(family, "sequence-classification"), tmp_path / "out"
    options = f"--model {folder} --data {reviews} --eval {reviews} --out {out}"
    assert text_classification.main([*options.split(), *SMALL.split()]) == 0
    shown = capsys.readouterr().out
    width = stock(folder).config.hidden_size
    trained = 2 * width + (2 if family == "bert" else 0)  # GPT-2's has no bias
    for part in (
        f"{trained:,} of ",
        "60 rows to train on, 60 held out",
        "add or remove one row",
        "steps              10, a row in each with probability 0.2000",
        "(always 'neg': 50.0%)",
        "transformers alone gives its logits within",
    ):
        assert part in shown
    before = dict(stock(folder).named_parameters())
    for name, value in stock(out).named_parameters():
        if name == "bert.pooler.dense.bias":
            continue  # 0 before and after
        changed = name.startswith(("classifier", "score", "bert.pooler", "bert.encoder.layer.2"))
        assert (name in before and torch.equal(value, before[name])) != changed, name


def test_a_head_is_trained_in_one_way(
    checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown
) -> None:
    model = checkpoint("bert", "sequence-classification")
    options = f"--model {model} --data {reviews} --out {tmp_path / 'out'} --schedule constant"
    assert text_classification.main(options.split()) == 2
    assert "schedule is 'constant', wanted linear" in capsys.readouterr().err


def test_biases_alone(checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown) -> None:
    folder, out = checkpoint("bert", "sequence-classification"), tmp_path / "out"
    options = f"--recipe text-classification-bias --model {folder} --data {reviews} --rows 20"
    assert text_classification.main(f"{options} --out {out} {SMALL}".split()) == 0
    assert "20 rows to train on" in capsys.readouterr().out
    before = dict(stock(folder).named_parameters())
    for name, value in stock(out).named_parameters():
        trained = name.endswith("bias") or name.startswith("classifier")
        assert torch.equal(value, before[name]) != trained, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--recipe lora", "unknown keys: alpha, rank"),
        ("--epochs 0", "epochs is 0, wanted a number above 0"),
        ("--delta 0.5", "--delta is 0.5, wanted a number above 0 and below 1 / 60"),
        ("--labels a,b", "is not one of a, b"),
    ],
)
def test_errors_are_for_people(
    options: str, message: str, checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown
) -> None:
    model = checkpoint("bert", "sequence-classification")
    data = f"--model {model} --data {reviews} --eval {reviews} --out {tmp_path / 'out'}"
    assert text_classification.main([*data.split(), *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_lora(family: str, checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown) -> None:
    folder, out = checkpoint(family, "sequence-classification"), tmp_path / "out"
    options = f"--model {folder} --data {reviews} --eval {reviews} --out {out} --rank 3 {SMALL}"
    assert lora.main(options.split()) == 0
    shown = capsys.readouterr().out
    assert "epsilon" in shown
    assert "on the stock model, PEFT gives its logits within" in shown
    config = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(folder))

    adapted = PeftModel.from_pretrained(stock(folder), out / "adapter").eval()
    merged, base = stock(out / "merged").eval(), stock(folder).eval()
    ids = torch.randint(5, 15, (4, 6))
    logits = [model(input_ids=ids).logits for model in (adapted, merged, base)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert not torch.allclose(logits[1], logits[2], rtol=0, atol=1e-4)  # it was trained
    targets = lora.TARGETS[family]
    for (name, new), old in zip(merged.named_parameters(), base.parameters(), strict=True):
        weight = any(f"{target}.weight" in name for target in targets)
        head = name.startswith(("classifier", "pre_classifier", "score"))
        assert torch.equal(new, old) != (weight or head), name


def test_bring_your_own(checkpoint: Build, reviews: Path, tmp_path: Path, capsys: Shown) -> None:
    folder, out = checkpoint("roberta", "sequence-classification"), tmp_path / "out"
    options = f"--model {folder} --data {reviews} --eval {reviews} --out {out} {SMALL}"
    assert bring_your_own.main(options.split()) == 0
    shown = capsys.readouterr().out
    for part in (
        "converted: logits differ by at most",
        "frozen embeddings and the original model: bit-equal",
        "add or remove one row",
    ):
        assert part in shown
    for check in bring_your_own.CHECKS:
        assert check in shown
    before, after = (dict(stock(path).named_parameters()) for path in (folder, out))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "embeddings" in name}


def test_bring_your_own_stops_at_a_failed_audit(
    checkpoint: Build, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would spend the budget on a model whose guarantee does not hold."""
    convert = bring_your_own.dpzoo.convert
    mixed: list[Any] = []

    def spoiled(model: Any) -> Any:
        converted = convert(model)
        forward = converted.roberta.forward

        def mixing(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(0)
            return out

        converted.roberta.forward = mixing
        mixed.append(converted)
        return converted

    monkeypatch.setattr(bring_your_own.dpzoo, "convert", spoiled)
    folder, out = checkpoint("roberta", "sequence-classification"), tmp_path / "out"
    options = f"--model {folder} --data {reviews} --eval {reviews} --out {out} {SMALL}"
    with pytest.raises(Exception, match=r"isolation"):
        bring_your_own.main(options.split())
    assert not out.exists()


def test_encoding_is_by_row(checkpoint: Build) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("bert", "sequence-classification"))
    rows = encode([Row("the film", 1, ""), Row("good " * 9, 0, "")], tokenizer, 6)
    assert rows.columns["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert rows.columns["labels"].tolist() == [1, 0]
