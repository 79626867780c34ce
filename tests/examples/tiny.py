"""Small texts, a small model, and the options of small runs, for the tests of the task examples."""

from collections.abc import Iterable
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

MOODS = {"neg": ("bad", "poor", "awful"), "pos": ("good", "fine", "great")}
SUBJECTS = ("film", "book", "plot", "cast")
WORDS = (*MOODS["neg"], *MOODS["pos"], *SUBJECTS, "the", "was", "very", "un", "##real")

SMALL = "--epochs 2 --batch-size 12 --micro-batch-size 5 --max-length 12"
"""Options of every example that make its run one of seconds."""


def sentence(i: int) -> tuple[str, str]:
    """The i-th text and its label."""
    label = ("neg", "pos")[i % 2]
    mood, subject = MOODS[label][i % 3], SUBJECTS[i // 2 % 4]
    return f"the {subject} was {'very ' * (i % 4)}{mood}", label


def save_tiny_bert(folder: Path, words: Iterable[str]) -> Path:
    """A BERT of two small layers with random weights and its tokenizer, in a new folder."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
