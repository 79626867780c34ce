"""The Trainer script on a tiny model: it trains, resumes, and saves what transformers alone loads."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as when the script runs

import hf_trainer  # noqa: E402

from dpzoo.integrations import DPTrainer, PrivacyArguments  # noqa: E402

GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "dull"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny stock model and a tokenizer of a handful of words."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", *GOOD, *BAD]
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(
        folder
    )
    config = transformers.BertConfig.from_json_file(ROOT / "configs" / "models" / "bert-tiny.json")
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.tsv"
    lines = [f"{word} {word} {i}\t{int(word in GOOD)}" for i in range(80) for word in GOOD + BAD]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def options(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--train_file", str(rows), "--output_dir", str(out)),
        *("--epsilon", "50", "--clip", "1", "--num_train_epochs", "8", "--learning_rate", "0.01"),
        *("--per_device_train_batch_size", "20", "--gradient_accumulation_steps", "2"),
        *("--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "44"),
        *("--save_strategy", "epoch", *more),
    ]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default accountant takes seconds to find a noise multiplier; a seed, to know the outcome."""
    extra = {"accountant": "rdp", "noise_seed": 1}
    monkeypatch.setattr(
        hf_trainer, "PrivacyArguments", lambda **given: PrivacyArguments(**given, **extra)
    )


@pytest.mark.usefixtures("quick_accountant")
def test_it_learns_resumes_and_saves(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = hf_trainer.main(options(model, rows, tmp_path))
    assert metrics["eval_accuracy"] > 0.9  # a coin gives 0.5
    assert 49.9 < metrics["epsilon"] <= 50.0
    assert "432 training rows, epsilon " in capsys.readouterr().out
    history = json.loads((tmp_path / "checkpoint-88" / "trainer_state.json").read_text())
    assert sum("epsilon" in entry for entry in history["log_history"]) == 2

    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(saved) is transformers.BertForSequenceClassification
    assert saved.config.id2label == {0: "0", 1: "1"}

    more = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-55"))
    again = hf_trainer.main(options(model, rows, tmp_path, *more))
    assert again["epsilon"] == metrics["epsilon"]
    assert again["eval_loss"] == metrics["eval_loss"]


def test_what_it_says_of_its_files(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.tsv"
    path.write_text("one column only\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"error: .*text.tsv, line 1: 1 field\(s\), wanted 2"):
        hf_trainer.main(options(model, path, tmp_path / "out"))


def test_the_lines_that_are_marked_are_the_ones_that_differ() -> None:
    """Two imports in one line, and the privacy argument: the rest is a script for Trainer."""
    lines = Path(hf_trainer.__file__).read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if line.endswith("# private")]
    assert len(marked) == 2
    assert hf_trainer.DPTrainer is DPTrainer
