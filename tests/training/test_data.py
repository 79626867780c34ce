"""Rows out of files, and what they are for."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import dpzoo
from dpzoo.training import Recipe
from dpzoo.training.data import Table, class_indices, guess_task, read_table, texts_of
from dpzoo.training.job import split


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        (
            "a.tsv",
            "sentence\tlabel\na b\t1\nc\t0\n",
            {"sentence": ["a b", "c"], "label": ["1", "0"]},
        ),
        ("a.tsv", 'a "b\t1\nc\t0\n', {"column 1": ['a "b', "c"], "column 2": ["1", "0"]}),
        (
            "a.csv",
            'mr,ref\n"x, y","say ""z"""\np,q\n',
            {"mr": ["x, y", "p"], "ref": ['say "z"', "q"]},
        ),
        ("a.csv", "\ufefftext,label\na,x\nb,y\n", {"text": ["a", "b"], "label": ["x", "y"]}),
        (
            "a.jsonl",
            '{"t": "a", "n": 1}\n\n{"n": null, "t": "b"}\n',
            {"t": ["a", "b"], "n": [1, None]},
        ),
        # The first line is a row: its class is one that other rows have.
        ("a.tsv", "good\tpos\nbad\tneg\nfine\tpos\n", {"column 1": ["good", "bad", "fine"]}),
    ],
)
def test_files(name: str, text: str, columns: dict[str, list[Any]], tmp_path: Path) -> None:
    found = read_table(written(tmp_path, name, text))
    assert {key: found.columns[key] for key in columns} == columns
    assert len(found) == len(next(iter(columns.values())))
    assert name != "a.tsv" or "columns" in found.note


def test_what_is_said_of_the_first_line_counts(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "text\tlabel\na\tx\nb\ty\n")
    assert len(read_table(path, header=True)) == 2
    assert len(read_table(path, header=False)) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a", r"has the ending '.txt', wanted .tsv, .csv, .jsonl or .parquet"),
        ("a.tsv", "a\tb\nc\n", r"row 2, has 1 columns, wanted 2 as in the first row"),
        ("a.tsv", "", "has fewer than 2 rows"),
        ("a.csv", "text,label\nx,1\n", "has fewer than 2 rows: no batch hides one row"),
        ("a.jsonl", '{"a": 1}\n{"b": 1}\n', r"line 2, has \['b'\], wanted .* first line: \['a'\]"),
        ("a.jsonl", '{"a": 1}\nnonsense\n', "line 2, is not JSON"),
        ("a.jsonl", "[1]\n", "line 1, has list, wanted an object"),
        (
            "a.jsonl",
            '{"a": 1, "a": 2}\n',
            r"line 1, is not .*: it has a key more than once, of \['a'",
        ),
        ("a.jsonl", "[" * 100_000, "line 1, is not JSON in UTF-8: .*. Wanted one object"),
        # A quote that is not closed would take the rows up to the next one into its own.
        (
            "a.csv",
            'text,label\n"good,x\nbad,y\nfine,x\n',
            "in columns, after line 1: unexpected end",
        ),
        ("a.csv", 'text,label\ngood,x\n"bad"y,y\n', "after line 2: ',' expected after"),
        (
            "a.csv",
            "text,label\n" + "a" * 140_000 + ",x\n",
            "line 1: field larger .*, or write the rows as",
        ),
        (
            "a.csv",
            "text,text,label\na,b,x\n",
            r"'label'\] in its first line, 'text' more than once",
        ),
        ("a.csv.gz", "a,b\n", r"has the ending '.gz', wanted .tsv"),
    ],
)
def test_broken_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(dpzoo.InputError, match=message):
        read_table(written(tmp_path, name, text))


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(dpzoo.InputError, match=r"gone.csv does not exist"):
        read_table(tmp_path / "gone.csv")
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\x00a\tb\n")
    with pytest.raises(dpzoo.InputError, match="cannot be read as UTF-8 text"):
        read_table(tmp_path / "b.tsv")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(dpzoo.InputError, match="line 1, is not JSON in UTF-8: 'utf-8' codec can't"):
        read_table(tmp_path / "b.jsonl")


def test_a_held_out_file_may_have_one_row(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n')
    assert len(read_table(path, least=1)) == 1
    with pytest.raises(dpzoo.InputError, match="has fewer than 2 rows: no batch hides one row"):
        read_table(path)
    with pytest.raises(dpzoo.InputError, match="has fewer than 1 rows: there is nothing to read"):
        read_table(written(tmp_path, "b.jsonl", "\n"), least=1)


def test_parquet_and_folders_are_read_by_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(dpzoo.InputError, match=r"pip install 'dpzoo\[data\]'"):
        read_table(tmp_path / "a.parquet")

    class ClassLabel:
        def int2str(self, value: int) -> str:
            return ("no", "yes")[value]

    class Rows(dict[str, list[Any]]):
        column_names = ("text", "answer")
        features = {"text": None, "answer": ClassLabel()}

    def broken(path: str, **_: Any) -> Any:
        raise ValueError("Parquet magic bytes not found.\nMore")

    rows = Rows(text=["a", "b"], answer=[1, 0])
    fake: Any = ModuleType("datasets")
    fake.ClassLabel, fake.DatasetDict = ClassLabel, type("DatasetDict", (dict,), {})
    fake.Dataset = SimpleNamespace(from_parquet=lambda path, keep_in_memory: rows)
    fake.load_from_disk = lambda path: fake.DatasetDict(train=rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    wanted = {"text": ["a", "b"], "answer": ["yes", "no"]}
    assert read_table(tmp_path / "a.parquet").columns == wanted
    assert read_table(tmp_path).columns == wanted
    fake.Dataset.from_parquet = broken
    with pytest.raises(dpzoo.InputError, match=r"magic bytes not found\. Wanted a Parquet file"):
        read_table(tmp_path / "a.parquet")
    fake.load_from_disk = lambda path: fake.DatasetDict(test=rows)
    with pytest.raises(
        dpzoo.InputError, match=r"has the splits \['test'\], wanted train among them"
    ):
        read_table(tmp_path)


# --- the task -----------------------------------------------------------------------------------

REVIEWS = Table(
    {
        "id": list(range(8)),
        "review": [f"text {i}" for i in range(8)],
        "stars": ["one", "two"] * 4,
    }
)


def test_a_column_of_few_values_is_the_class() -> None:
    task = guess_task(REVIEWS)
    assert (task.name, task.text, task.label) == ("classification", "review", "stars")
    assert task.labels == ("one", "two")
    assert task.reason == "column 'stars' has 2 classes, column 'review' is the text"
    assert class_indices(REVIEWS, task) == [0, 1] * 4


def test_texts_alone_are_for_language_modelling() -> None:
    table = Table({"text": ["a", "b", None]})
    task = guess_task(table)
    assert (task.name, task.text, task.prompt) == ("language-modelling", "text", None)
    assert texts_of(table, "text") == ["a", "b", ""]
    assert texts_of(Table({"text": ["a", float("nan"), 2.5]}), "text") == ["a", "", "2.5"]
    with pytest.raises(
        dpzoo.InputError, match="Row 1 has half of a surrogate pair in column 'text'"
    ):
        texts_of(Table({"text": ["a \ud83d"]}), "text")
    with pytest.raises(dpzoo.InputError, match="Row 2 has a dict in column 'text', wanted a text"):
        texts_of(Table({"text": ["a", {"role": "user"}]}), "text")


def test_pairs_are_a_prompt_and_its_answer() -> None:
    pairs = Table({"ref": [f"r{i}" for i in range(9)], "mr": [f"m{i}" for i in range(9)]})
    task = guess_task(pairs)
    assert (task.name, task.text, task.prompt) == ("language-modelling", "ref", "mr")
    turned = guess_task(pairs, text="mr", prompt="ref")
    assert (turned.text, turned.prompt) == ("mr", "ref")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"a": ["x", "y"] * 4, "b": ["p", "q"] * 4},
            {},
            r"Several columns of .*: a \(2 values\), b \(2 values\). Name it with label",
        ),
        ({"a": list("abcdefgh")}, {"task": "classification"}, "No column of .* could be the class"),
        (
            {"a": list("abcdefgh"), "b": list("stuvwxyz")},
            {},
            "Several of the columns .* be the text",
        ),
        ({"a": [1] * 8}, {}, "None of the columns .* could be the text"),
        ({"a": list("abcdefgh")}, {"text": "z"}, r"text='z' is no column; there are \['a'\]"),
        ({"a": list("abcdefgh")}, {"task": "regression"}, "task='regression', wanted one of"),
        (
            {"a": list("abcd"), "b": ["x"] * 4},
            {"label": "b"},
            "has the classes x, wanted at least 2",
        ),
        (
            {"a": list("abcd"), "b": ["x", "y", "", "x"]},
            {"label": "b"},
            "Row 3 has no class in column",
        ),
        (
            {"a": list("abcd"), "b": ["x", "y", "z", "x"]},
            {"label": "b", "labels": ["x", "y"]},
            r"has the classes z, wanted only those of labels=\['x', 'y'\]",
        ),
        (
            {"a": list("abcd"), "b": list("efgh")},
            {"label": "b", "prompt": "a"},
            "wanted none beside a",
        ),
        (
            {"a": list("abcd"), "b": ["x", float("nan"), "y", "x"]},
            {"label": "b"},
            "Row 2 has no class in column 'b'",
        ),
        (
            {"a": list("abcd"), "b": ["x", ["y"], "y", "x"]},
            {"label": "b"},
            "Row 2 has a list in column 'b', wanted a text or a number",
        ),
        (
            {"a": list("abcd"), "b": ["x", "y", "y", "x"]},
            {"label": "b", "labels": ["x", "y", "x"]},
            r"labels=\['x', 'y', 'x'\], wanted names that differ",
        ),
        # Columns that are called a class and are none, which would be language modelling in silence.
        (
            {"text": list("abcd"), "label": ["x"] * 4},
            {},
            r"No column of .* could be the class: label \(1 values\). Name it .* or say task=",
        ),
        (
            {"text": list("abcdefgh"), "intent": list("stuvwxyz")},
            {},
            r"could be the class: intent \(8 values\)",
        ),
    ],
)
def test_tables_that_could_be_anything(
    columns: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dpzoo.InputError, match=message):
        guess_task(Table(columns), **options)


def test_classes_of_held_out_rows_are_those_of_the_training_rows() -> None:
    task = guess_task(REVIEWS)
    other = Table({"review": ["a", "b"], "stars": ["one", "three"]})
    with pytest.raises(dpzoo.InputError, match=r"has \['three'\], wanted only the classes of the"):
        class_indices(other, task)


# --- held-out rows ------------------------------------------------------------------------------


def test_a_row_added_or_removed_moves_no_other_one() -> None:
    texts = [f"row {i}" for i in range(400)]
    table = Table({"text": texts})
    task = guess_task(table)
    train, held = (set(texts_of(part, "text")) for part in split(table, task, Recipe("x")))
    assert train | held == set(texts)
    assert 20 < len(held) < 60
    json.dumps(sorted(held))
    for gone in (0, 7, 399):
        left = Table({"text": texts[:gone] + texts[gone + 1 :]})
        fewer, held_fewer = (set(texts_of(part, "text")) for part in split(left, task, Recipe("x")))
        assert fewer == train - {texts[gone]}
        assert held_fewer == held - {texts[gone]}
    twice = [set(texts_of(p, "text")) for p in split(Table({"text": texts * 2}), task, Recipe("x"))]
    assert not twice[0] & twice[1]  # equal rows are on one side
    assert held != set(texts_of(split(table, task, Recipe("x", seed=1))[1], "text"))
