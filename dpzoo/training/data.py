"""Rows out of a file, and what they are for: TSV, CSV, JSONL, Parquet, or a folder of `datasets`."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpzoo.errors import InputError, first_line

CLASSIFICATION, LANGUAGE_MODELLING = "classification", "language-modelling"
TASKS = (CLASSIFICATION, LANGUAGE_MODELLING)

LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic")
TEXTS = ("text", "sentence", "content", "review", "document", "body", "message", "utterance")
PAIRS = (
    ("mr", "ref"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("source", "target"),
    ("input", "output"),
)
"""Names of columns that are a prompt and the text that answers it."""

MOST_LABELS = 50
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,30}( [\w.-]{1,30})?")
_DELIMITERS = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class Table:
    """The rows of a file, by columns.

    Args:
        columns: name -> values, one for each row.
        note: what was guessed of the file, for a person.
    """

    columns: dict[str, list[Any]]
    note: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True)
class Task:
    """What is learned from a table.

    Args:
        name: "classification" or "language-modelling".
        text: the column with the text; of a language model, the text that it learns to write.
        label: the column with the class; None for language modelling.
        prompt: the column with what the text answers, which is read and not learned; or None.
        labels: the classes, sorted.
        reason: why, for a person.
    """

    name: str
    text: str
    label: str | None
    prompt: str | None
    labels: tuple[str, ...]
    reason: str


def read_table(path: str | Path, header: bool | None = None, *, least: int = 2) -> Table:
    """Read a file, or a folder that `datasets.Dataset.save_to_disk` wrote.

    Args:
        path: .tsv, .csv, .jsonl (or .json with a row on each line), .parquet, or a folder. The last two
            need the package datasets.
        header: whether the first line of a TSV or CSV file has the columns' names; None to guess.
        least: rows that there must be; 2 to train on.

    Raises:
        InputError: the file is not there, of another kind, too short, or a row is not like the others.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"The data file {path} does not exist.")
    kind = path.suffix.lower()
    if path.is_dir() or kind == ".parquet":
        table = Table(_with_datasets(path))
    elif kind in _DELIMITERS:
        table = _delimited(path, _DELIMITERS[kind], header)
    elif kind in (".jsonl", ".json", ".ndjson"):
        table = Table(_json_lines(path))
    else:
        raise InputError(
            f"The data file {path} has the ending {kind!r}, wanted .tsv, .csv, .jsonl or .parquet, or a "
            f"folder that datasets' save_to_disk wrote."
        )
    if not table.columns or len(table) < least:
        why = "no batch hides one row" if least > 1 else "there is nothing to read"
        raise InputError(f"{path} has fewer than {least} rows: {why}.")
    return table


def _delimited(path: Path, delimiter: str, header: bool | None) -> Table:
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE  # in TSV, text
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: a quote that is not closed would take the next rows into its own
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            rows = []
            for row in reader:
                line = reader.line_num
                rows += [row] if row else []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as UTF-8 text in columns, after line {line}: {first_line(error)}. "
            f"Mend that line, or write the rows as .jsonl."
        ) from None
    if not rows:
        return Table({})
    width = len(rows[0])
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise InputError(
                f"{path}, row {number}, has {len(row)} columns, wanted {width} as in the first row. Quote "
                f"texts that have a {delimiter!r} in them (CSV), or remove it (TSV)."
            )
    first = [cell.strip() for cell in rows[0]]
    guessed = all(_NAME.fullmatch(cell) for cell in first)
    guessed &= all(cell not in {row[i] for row in rows[1:]} for i, cell in enumerate(rows[0]))
    if header if header is not None else guessed:
        twice = sorted({name for name in first if first.count(name) > 1})
        if twice:
            raise InputError(
                f"{path} names the columns {first} in its first line, {twice[0]!r} more than once. Rename "
                f"one, or say that this line is a row (header=False, --no-header)."
            )
        names, rows = first, rows[1:]
        note = f"the first line names the columns: {', '.join(names)}"
    else:
        names = [f"column {i + 1}" for i in range(width)]
        note = "no line of names: the columns are called " + ", ".join(names)
    return Table({name: [row[i] for row in rows] for i, name in enumerate(names)}, note)


def _json_lines(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}, is not JSON in UTF-8: {first_line(error)}. Wanted one object "
                    f"on each line."
                ) from None
            if not isinstance(row, dict) or (columns and row.keys() != columns.keys()):
                got = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise InputError(
                    f"{path}, line {number}, has {got}, wanted an object with the keys of the first line: "
                    f"{sorted(columns)}."
                )
            for key, value in row.items():
                columns.setdefault(str(key), []).append(value)
    return columns


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"it has a key more than once, of {[key for key, _ in pairs]}")
    return made


def _with_datasets(path: Path) -> dict[str, list[Any]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{path} is a Parquet file or a folder, which the package datasets reads. Install it "
            f"(python -m pip install 'dpzoo[data]'), or give a .tsv, .csv or .jsonl file."
        ) from None
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise InputError(
            f"{path} cannot be read by datasets: {first_line(error)}. Wanted a Parquet file, or "
            "a folder that datasets' save_to_disk wrote."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise InputError(f"{path} has the splits {sorted(found)}, wanted train among them.")
        found = found["train"]
    columns = {name: list(found[name]) for name in found.column_names}
    for name, feature in found.features.items():
        if isinstance(feature, datasets.ClassLabel):
            columns[name] = [feature.int2str(value) for value in columns[name]]
    return columns


# --- the task -----------------------------------------------------------------------------------


def guess_task(
    table: Table,
    *,
    task: str | None = None,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    labels: Sequence[str] | None = None,
) -> Task:
    """What a table is for: what is given, and the rest by its columns.

    Args:
        table: the training rows.
        task, text, label, prompt: of `Task`; None to guess.
        labels: all classes; None for those that occur.

    Raises:
        InputError: nothing fits, or several columns do.
    """
    columns = table.columns
    if task is not None and task not in TASKS:
        raise InputError(f"task={task!r}, wanted one of {TASKS}.")
    for option, name in (("text", text), ("label", label), ("prompt", prompt)):
        if name is not None and name not in columns:
            raise InputError(f"{option}={name!r} is no column; there are {sorted(columns)}.")
    if label is not None and (prompt is not None or task == LANGUAGE_MODELLING):
        raise InputError(f"label={label!r} is for classification, wanted none beside a prompt.")
    if label is None and prompt is None and task != LANGUAGE_MODELLING:
        label = _label_column(columns, text, needed=task == CLASSIFICATION)
    if label is not None:
        text = text or _text_column(columns, label)
        found = sorted({_class(label, row, value) for row, value in enumerate(columns[label], 1)})
        classes = tuple(labels) if labels else tuple(found)
        if len(set(classes)) < len(classes) or "" in classes:
            raise InputError(f"labels={list(classes)}, wanted names that differ, by commas.")
        strange = sorted(set(found) - set(classes))
        if strange or len(classes) < 2:
            raise InputError(
                f"Column {label!r} has the classes {', '.join(strange or found)[:200]}, wanted "
                + (f"only those of labels={list(classes)}." if strange else "at least 2.")
            )
        reason = f"column {label!r} has {len(found)} classes, column {text!r} is the text"
        return Task(CLASSIFICATION, text, label, None, classes, reason)
    if text is None and prompt is None:
        pair = next((p for p in PAIRS if set(p) <= set(columns)), None)
        if pair is not None:
            prompt, text = pair
    text = text or _text_column(columns, prompt)
    reason = f"no column of classes, column {text!r} is what is learned"
    reason += f", after column {prompt!r}" if prompt else ""
    return Task(LANGUAGE_MODELLING, text, None, prompt, (), reason)


def _label_column(columns: dict[str, list[Any]], text: str | None, *, needed: bool) -> str | None:
    others = {name: values for name, values in columns.items() if name != text}
    rows = len(next(iter(columns.values())))
    few = [
        name
        for name, values in others.items()
        if len(columns) > 1
        and 2 <= len({str(value) for value in values}) <= min(MOST_LABELS, max(2, rows // 4))
    ]
    named = [name for name in others if name.lower() in LABELS and name in few]
    if len(named) == 1 or len(few) == 1:
        return (named or few)[0]
    called = [name for name in others if name.lower() in LABELS]
    if any(set(pair) <= set(columns) for pair in PAIRS) or len(columns) == 1:
        called = []
    if few or needed or called:
        counts = [f"{name} ({len(set(map(str, others[name])))} values)" for name in few or called]
        raise InputError(
            f"{'Several columns' if few else 'No column'} of {sorted(columns)} could be the class"
            f"{': ' + ', '.join(sorted(counts)) if counts else ''}. Name it with label (--label)"
            + ("." if needed else ", or say task='language-modelling' (--task).")
        )
    return None


def _text_column(columns: dict[str, list[Any]], taken: str | None) -> str:
    texts = [
        name
        for name, values in columns.items()
        if name != taken and {type(value) for value in values} - {type(None)} == {str}
    ]
    named = [name for name in texts if name.lower() in TEXTS]
    if len(named) == 1:
        return named[0]
    if len(texts) == 1:
        return texts[0]
    raise InputError(
        f"{'Several' if texts else 'None'} of the columns {sorted(columns)} could be the text. Name it "
        f"with text (--text)."
    )


def _class(column: str, row: int, value: Any) -> str:
    name = _cell(column, row, value).strip()
    if not name:
        raise InputError(f"Row {row} has no class in column {column!r}, wanted one in every row.")
    return name


def class_indices(table: Table, task: Task) -> list[int]:
    """The class of every row, as its index in ``task.labels``.

    Raises:
        InputError: a row has no class, or one that is not among them.
    """
    assert task.label is not None
    index = {name: i for i, name in enumerate(task.labels)}
    if task.label not in table.columns:
        raise InputError(f"There is no column {task.label!r}; there are {sorted(table.columns)}.")
    names = [_class(task.label, row, v) for row, v in enumerate(table.columns[task.label], 1)]
    strange = sorted({name for name in names if name not in index})
    if strange:
        raise InputError(
            f"Column {task.label!r} has {strange[:5]}, wanted only the classes of the training rows: "
            f"{list(task.labels)}. Name all classes with labels (--labels)."
        )
    return [index[name] for name in names]


def texts_of(table: Table, column: str) -> list[str]:
    """A column as texts; a missing one is the empty text.

    Raises:
        InputError: there is no such column, or it has something that is no text and no number.
    """
    if column not in table.columns:
        raise InputError(f"There is no column {column!r}; there are {sorted(table.columns)}.")
    return [_cell(column, row, value) for row, value in enumerate(table.columns[column], 1)]


def _cell(column: str, row: int, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple | dict | bytes):
        raise InputError(
            f"Row {row} has a {type(value).__name__} in column {column!r}, wanted a text or a number."
        )
    text = str(value)
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise InputError(
            f"Row {row} has half of a surrogate pair in column {column!r}, wanted Unicode text."
        )
    return text
