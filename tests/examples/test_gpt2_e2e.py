"""The table-to-text example: data, tokenizer, generation, score, and tiny runs of the whole script."""

from pathlib import Path
from typing import Any

import gpt2_e2e
import pytest
import torch
from gpt2_e2e import encode
from support import scratch
from support.data import DataError
from support.generation import bleu, generate, read_pairs
from support.rows import IGNORED
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.support import randomize

FOODS, NAMES = ("Thai", "French", "Indian"), ("Cotto", "Aromi", "Zizzi", "Strada")
TEXTS = [f"name[{n}], food[{f}] {n} serves {f} food." for n in NAMES for f in FOODS]
SMALL = (
    "--epochs 1 --batch-size 12 --micro-batch-size 5 --max-length 64 --vocabulary 300 "
    "--layers 1 --hidden 12 --heads 2"
)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    lines = ["mr,ref"]
    for name in NAMES:
        for food in FOODS:
            lines += [
                f'"name[{name}], food[{food}]","{name}{i * " really"} serves {food} food."'
                for i in range(3)
            ]
    path = tmp_path / "e2e.csv"
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


@pytest.fixture
def model_and_tokenizer() -> tuple[Any, Any]:
    tokenizer = scratch.train_tokenizer(TEXTS, 300)
    model = scratch.small_gpt2(tokenizer, positions=64, layers=2, hidden=12, heads=2)
    randomize(model)
    return model, tokenizer


def test_pairs(tables: Path, tmp_path: Path) -> None:
    pairs = read_pairs(tables)
    assert len(pairs) == 36
    assert pairs[1] == ("name[Cotto], food[Thai]", "Cotto really serves Thai food.")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.csv: columns \['a', 'b'\], wanted mr and ref"):
        read_pairs(tmp_path / "other.csv")
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        read_pairs(tmp_path / "none.csv")


def test_the_tokenizer_spells_everything() -> None:
    tokenizer = scratch.train_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300
    for text in ("name[Cotto], food[Thai]", "Ünknown 汉字 words", scratch.END):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(scratch.END)["input_ids"] == [tokenizer.eos_token_id]


def test_the_loss_is_the_references(model_and_tokenizer: tuple[Any, Any]) -> None:
    """Labels are the tokens of the reference and its end; those of the table are not learnt."""
    _, tokenizer = model_and_tokenizer
    table, reference = "name[Cotto]", "Cotto serves food."
    rows = encode([(table, reference), ("name[A], " * 30, "A.")], tokenizer, 40)
    ids, labels = rows.columns["input_ids"][0], rows.columns["labels"][0]
    said = labels[labels != IGNORED]
    assert tokenizer.decode(said) == reference + scratch.END
    assert torch.equal(ids[labels != IGNORED], said)
    text = tokenizer.decode(ids[rows.columns["attention_mask"][0].bool()])
    assert text == table + scratch.END + reference + scratch.END
    assert bool((rows.columns["labels"][1] == IGNORED).all())  # a table that fills the row
    assert rows.columns["attention_mask"][1].sum() == 40


def test_bleu_groups_references() -> None:
    written = ["a b c d e", "f g h i j"]
    assert bleu(written, [["x y z", "a b c d e"], ["f g h i j"]]) == pytest.approx(100)
    assert bleu(written, [["a b c d e"], ["a b c d e"]]) < 60
    assert bleu(written, [["k"], ["l", "m"]]) == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_does_not_depend_on_the_batch(
    beams: int, model_and_tokenizer: tuple[Any, Any]
) -> None:
    model, tokenizer = model_and_tokenizer
    tables = ["name[Cotto]", "name[Zizzi], food[Indian], food[Thai]", "food[French]"]
    options = {"length": 64, "beams": beams}
    together = generate(model, tokenizer, tables, **options)
    assert together == generate(model, tokenizer, tables, **options, size=1)
    assert any(together)
    assert tokenizer.padding_side == "right"
    with pytest.raises(
        DataError, match=r"a table has \d+ tokens, wanted fewer than .* 64 positions"
    ):
        generate(model, tokenizer, ["name[A], " * 30], **options)


@pytest.mark.usefixtures("quick_accountant")
def test_the_whole_script(
    tables: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scratch, "public_texts", lambda: TEXTS)
    out = tmp_path / "out"
    options = f"--data {tables} --out {out} --compare --nonprivate-epochs 1 {SMALL}"
    assert gpt2_e2e.main([*options.split(), "--nonprivate-batch-size", "10"]) == 0
    shown = capsys.readouterr().out
    private, _, plain = shown.partition("without privacy:")
    for part in ("30 rows to train on, 6 held out", " of 8 ", "add or remove one row"):
        assert part in private
    for half in (private, plain):
        assert "on 2 held-out tables (copying them:" in half
        assert "held out loss" in half
    assert "NOT cover" not in shown
    stock = GPT2LMHeadModel.from_pretrained(out)
    assert stock.lm_head.weight is stock.transformer.wte.weight
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == stock.config.vocab_size
    assert tokenizer.get_vocab() == scratch.train_tokenizer(TEXTS, 300).get_vocab()  # no row in it


@pytest.mark.usefixtures("quick_accountant")
def test_a_checkpoint_and_the_tokenizer_of_the_rows(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = f"--data {tables} {SMALL}"
    assert gpt2_e2e.main(f"{options} --out {first} --tokenizer-from-data".split()) == 0
    assert "does NOT cover the vocabulary" in capsys.readouterr().out
    public = scratch.train_tokenizer(TEXTS, 300).get_vocab()
    assert AutoTokenizer.from_pretrained(first).get_vocab() != public
    again = f"{options} --eval {tables} --out {second} --recipe e2e-gpt2 --model {first} --beams 2"
    assert gpt2_e2e.main(again.split()) == 0
    assert "36 rows to train on, 36 held out" in capsys.readouterr().out
    before, after = (GPT2LMHeadModel.from_pretrained(folder) for folder in (first, second))
    assert after.num_parameters() == before.num_parameters()
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_public_texts_hold_no_rows() -> None:
    """The tokenizer's default: what it is trained on is no function of the data."""
    texts = scratch.public_texts()
    assert len(texts) > 2000
    assert all(isinstance(text, str) for text in texts[:10])
