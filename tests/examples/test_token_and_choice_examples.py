"""Token classification, multiple choice and masked-LM adaptation: their data, and tiny runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import masked_lm
import multiple_choice
import pytest
import token_classification
import torch
from masked_lm import MaskedRows
from support import training
from support.data import DataError
from support.rows import IGNORED, Rows
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tests.examples.tiny import MOODS, SMALL, SUBJECTS, sentence

Build = Callable[[str, str], Path]
Shown = pytest.CaptureFixture[str]
quick = pytest.mark.usefixtures("quick_accountant")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- token classification --------------------------------------------------------------------------


def tagged(tmp_path: Path) -> Path:
    """40 sentences, whose subjects and moods have tags."""
    tags = {**dict.fromkeys(SUBJECTS, "SUBJECT"), "unreal": "MOOD"}
    tags |= {word: "MOOD" for words in MOODS.values() for word in words}
    lines = []
    for i in range(40):
        words = sentence(i)[0].split() + ["unreal"] * (i % 2)
        lines += [f"{word}\t{tags.get(word, 'O')}" for word in words] + [""] * (1 + i % 2)
    return write(tmp_path / "tagged.conll", "\n".join(lines))


def test_sentences_end_at_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "\na\tX\nb\tO\n \n\nc\tX")
    wanted = [(("a", "X"), ("b", "O")), (("c", "X"),)]
    assert token_classification.read_sentences(path) == wanted


@pytest.mark.parametrize("line", ["a X", "a\tX\tY", "a\t ", "\tX"])
def test_tagged_lines_that_do_not_fit(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t.conll", f"a\tX\n{line}\n")
    with pytest.raises(DataError, match=r"t\.conll, line 2: .*, wanted token<TAB>tag"):
        token_classification.read_sentences(path)


def test_the_first_piece_of_a_word_has_its_tag(checkpoint: Build) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("bert", "token-classification"))
    sentences = [(("unreal", "A"), ("film", "B")), (("film", "B"),) * 5]
    rows = token_classification.encode(sentences, ["A", "B"], tokenizer, 6, Path("x"))
    no = IGNORED
    assert rows.columns["labels"].tolist() == [[no, 0, no, 1, no, no], [no, 1, 1, 1, 1, no]]
    assert rows.columns["attention_mask"].sum(1).tolist() == [5, 6]
    with pytest.raises(DataError, match="x: tags B are not among A, C"):
        token_classification.encode(sentences, ["A", "C"], tokenizer, 6, Path("x"))


def test_scores_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four words right; of three named ones, one hit, two predicted: F1 = 2 / 5."""
    labels = torch.tensor([[IGNORED, 0, 1, 1, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 2, 0]]), 3).float()
    out = type("Out", (), {"logits": logits})
    monkeypatch.setattr(training, "outputs_of", lambda *_: iter([({"labels": labels}, out)]))
    rows: Any = None
    right, f1 = token_classification.scores(torch.nn.Linear(1, 1), rows, 0)
    assert (right, f1) == (0.5, pytest.approx(2 / 5))


@quick
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_token_classification(
    family: str, checkpoint: Build, tmp_path: Path, capsys: Shown
) -> None:
    folder, out = checkpoint(family, "token-classification"), tmp_path / "out"
    options = f"--model {folder} --data {tagged(tmp_path)} --out {out} --epsilon 100 {SMALL}"
    assert token_classification.main([*options.split(), "--learning-rate", "0.05"]) == 0
    shown = capsys.readouterr().out
    for part in ("3 tags", "of words (the most common tag:", "held out F1", "epsilon"):
        assert part in shown
    assert AutoModelForTokenClassification.from_pretrained(out).config.id2label == {
        0: "MOOD",
        1: "O",
        2: "SUBJECT",
    }


# --- multiple choice -------------------------------------------------------------------------------


def questions(tmp_path: Path) -> Path:
    lines = []
    for i in range(40):
        text, label = sentence(i)
        moods = [MOODS["neg"][i % 3], MOODS["pos"][i % 3], "very very"]
        lines.append("\t".join([text, *moods, str(("neg", "pos").index(label))]))
    return write(tmp_path / "questions.tsv", "\n".join(lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\tb\t0", r"line 2: 3 field\(s\), some perhaps empty, wanted 4: context<TAB>2 choices"),
        ("a\tb\t \t0", r"line 2: 4 field\(s\), some perhaps empty"),
        ("a\tb\tc\td\t0", r"line 2: 5 field\(s\)"),
        ("a\tb\tc\t2", r"line 2: the answer is '2', wanted 0 to 1"),
        ("a\tb\tc\tb", r"line 2: the answer is 'b', wanted 0 to 1"),
    ],
)
def test_questions_that_do_not_fit(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "q.tsv", f"context\tone\tother\t1\n{line}\n")
    with pytest.raises(DataError, match=r"q\.tsv, " + message):
        multiple_choice.read_questions(path)


def test_a_question_is_one_row(checkpoint: Build) -> None:
    """Choices that became rows would let a question contribute several times."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("bert", "multiple-choice"))
    question = multiple_choice.Question("the film", ("was good", "bad", "poor"), 2)
    rows = multiple_choice.encode([question] * 2, tokenizer, 7)
    assert len(rows) == 2
    assert rows.columns["input_ids"].shape == (2, 3, 7)
    assert rows.columns["attention_mask"][0].sum(1).tolist() == [7, 6, 6]
    assert rows.columns["token_type_ids"][0, 1].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert rows.columns["labels"].tolist() == [2, 2]


@quick
def test_multiple_choice(checkpoint: Build, tmp_path: Path, capsys: Shown) -> None:
    folder, out = checkpoint("bert", "multiple-choice"), tmp_path / "out"
    options = f"--model {folder} --data {questions(tmp_path)} --out {out} {SMALL}"
    assert multiple_choice.main(options.split()) == 0
    shown = capsys.readouterr().out
    for part in ("3 choices each", "(by chance: 33.3%)", "epsilon"):
        assert part in shown
    stock = AutoModelForMultipleChoice.from_pretrained(out)
    before = AutoModelForMultipleChoice.from_pretrained(folder)
    assert not torch.equal(stock.classifier.weight, before.classifier.weight)


# --- masked LM -------------------------------------------------------------------------------------


class Tokenizer:
    """As much of one as masking needs: 0, 1 and 2 are special, and 2 is the mask."""

    all_special_ids = (0, 1, 2)
    mask_token_id = 2

    def __len__(self) -> int:
        return 1000


def masked(ids: torch.Tensor, **options: Any) -> MaskedRows:
    encoded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return MaskedRows(encoded, Tokenizer(), options.pop("share", 0.5), 7, **options)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_masking_follows_bert() -> None:
    ids = torch.randint(3, 1000, (50, 400))
    ids[:, 0], ids[:, 300:] = 1, 0
    rows = masked(ids, share=0.2)
    batch = next(iter(DataLoader(rows, batch_size=50)))
    labels, shown = batch["labels"], batch["input_ids"]
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert not chosen[:, 0].any()
    assert not chosen[:, 300:].any()
    assert chosen[:, 1:300].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (shown[chosen] == 2).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_a_rows_mask_depends_on_no_other_row() -> None:
    """Neither on what the others hold, nor on which of them were drawn before."""
    ids = torch.randint(3, 1000, (4, 30))
    other = ids.clone()
    other[:3] = torch.randint(3, 1000, (3, 30))
    for rows, draws in ((masked(other), (0, 1, 2, 1)), (masked(ids), ())):
        for i in draws:
            rows[i]
        again = masked(ids)
        assert same(rows[3], again[3])
        assert same(rows[3], again[3])  # and so the second time


def test_masks_are_drawn_anew_or_kept() -> None:
    ids = torch.randint(3, 1000, (2, 30))
    rows, kept = masked(ids), masked(ids, fixed=True)
    assert not same(rows[0], rows[0])
    assert same(kept[0], kept[0])
    assert not torch.equal(kept[0]["labels"] == IGNORED, kept[1]["labels"] == IGNORED)


@quick
def test_masked_lm(checkpoint: Build, tmp_path: Path, capsys: Shown) -> None:
    folder, out = checkpoint("bert", "masked-lm"), tmp_path / "out"
    data = write(
        tmp_path / "notes.txt", "\n".join(sentence(i)[0] + " ." * (i // 12) for i in range(60))
    )
    options = f"--model {folder} --data {data} --out {out} --epsilon 50 --mask-share 0.4 {SMALL}"
    assert masked_lm.main([*options.split(), "--learning-rate", "0.02"]) == 0
    shown = capsys.readouterr().out
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in shown.splitlines()
        if line.startswith(("before", "after"))
    ]
    assert len(losses) == 2
    assert losses[1] < losses[0]  # at this rate and epsilon it learns
    stock = AutoModelForMaskedLM.from_pretrained(out)
    assert stock.cls.predictions.decoder.weight is stock.bert.embeddings.word_embeddings.weight


def test_masked_loss_is_by_token() -> None:
    class Model(torch.nn.Module):
        def forward(self, **batch: torch.Tensor) -> Any:
            logits = torch.zeros(*batch["labels"].shape, 5)
            return type("Out", (), {"logits": logits})

    labels = torch.tensor([[1, IGNORED, IGNORED], [1, 2, 3]])
    rows = Rows(attention_mask=torch.ones(2, 3, dtype=torch.long), labels=labels)
    wanted = torch.log(torch.tensor(5.0)).item()
    assert masked_lm.masked_loss(Model(), rows) == pytest.approx(wanted, rel=1e-6)
