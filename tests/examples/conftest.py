"""What the tests of the task examples share: tiny checkpoints with tokenizers, and small files."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from opacus.accountants import RDPAccountant, registry
from transformers import AutoConfig, BertTokenizer

import dpzoo

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "studies")]  # as when a script runs

from support import scratch  # noqa: E402

from tests.examples.tiny import WORDS, sentence  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str, str], Path]:
    """Builds a folder with a random model of a family, for a task, and its tokenizer."""

    def build(family: str, task: str) -> Path:
        folder = tmp_path / f"{family}-{task}"
        folder.mkdir()
        if family in ("bert", "distilbert"):
            vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
            (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
            tokenizer = BertTokenizer(str(folder / "vocab.txt"))
        else:
            tokenizer = scratch.train_tokenizer([sentence(i)[0] for i in range(12)], 300)
        tokenizer.save_pretrained(folder)
        config = AutoConfig.from_pretrained(
            ROOT / "configs" / "models" / f"{family}-tiny.json",
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            num_labels={"sequence-classification": 2}.get(task, 3),
        )
        dpzoo.from_config(config, task=task).save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """60 lines of text<TAB>label."""
    path = tmp_path / "reviews.tsv"
    path.write_text("".join("\t".join(sentence(i)) + "\n" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def quick_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    """RDP of few orders, all whole, instead of PRV, which takes seconds to find a noise multiplier."""
    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", [*range(2, 40)])
    monkeypatch.setitem(registry._ACCOUNTANTS, "prv", RDPAccountant)
