"""Text and labels: Python's own documentation strings, or a TSV file.

The built-in data set needs no download. Every Python installation carries the source of its standard
library, and the modules there explain themselves in English. A row is one sentence of one
documentation string; its label is the area that the module belongs to (see AREAS). The sources are
parsed, never imported, so nothing in them runs.

The rows differ a little from one Python version to the next, because the library does. On one
interpreter they are the same rows in the same order every time.
"""

from __future__ import annotations

import ast
import functools
import inspect
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# One area, one label: modules and packages of the standard library by what they are for. Those that a
# Python version does not have (telnetlib, distutils, ...) are passed over.
AREAS: dict[str, str] = {
    "internet": (
        "asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket "
        "socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc"
    ),
    "text and data formats": (
        "_markupbase base64 codecs configparser csv difflib email encodings html json mailbox "
        "mimetypes pickle pickletools plistlib quopri re string tabnanny textwrap tomllib xml"
    ),
    "concurrency": (
        "_threading_local asyncio concurrent multiprocessing queue sched selectors subprocess threading"
    ),
    "files and system": (
        "_pyio bz2 dbm filecmp fileinput fnmatch genericpath getpass glob gzip io linecache lzma "
        "ntpath os pathlib platform posixpath shelve shutil site stat sysconfig tarfile tempfile venv "
        "zipapp zipfile zipimport"
    ),
    "numbers and dates": (
        "_pydatetime _pydecimal _strptime bisect calendar colorsys datetime fractions graphlib heapq "
        "hmac numbers random secrets statistics uuid zoneinfo"
    ),
    "testing and debugging": (
        "bdb cProfile cgitb cmd code codeop compileall dis doctest inspect logging modulefinder pdb "
        "profile pstats py_compile pyclbr pydoc symtable timeit trace traceback tracemalloc unittest "
        "warnings"
    ),
}

_SKIPPED_FOLDERS = {"test", "tests", "__pycache__", "site-packages"}
_SENTENCE_END = re.compile(r"(?<=[\w)\"'`][.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[a-z]+")
_MAX_LABELS = 200


class DataError(ValueError):
    """The data cannot be used as it is; the message says where and why."""


@dataclass(frozen=True)
class Row:
    """One unit of privacy: a text, the index of its label, and where it came from."""

    text: str
    label: int
    source: str


@dataclass(frozen=True)
class TextData:
    """Rows to train on, rows held out, and the names of the labels, in the order of their indices."""

    name: str
    label_names: tuple[str, ...]
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]


def docs_data(*, seed: int, heldout_share: float, max_train_rows_per_label: int) -> TextData:
    """Build the data set of documentation sentences from the running interpreter.

    Whole modules are held out, not single sentences. The sentences of a module repeat each other's
    names and phrases, so that a split by sentence would test a model on what it has in effect seen.
    Some modules also copy from others (ntpath and posixpath, say): a held-out sentence that shares
    half of its four-word runs with the training part is dropped.

    Args:
        seed: decides which modules are held out and which rows a cap keeps.
        heldout_share: the share of each area's sentences to hold out, at least, in (0, 0.5].
        max_train_rows_per_label: cap on the training rows of an area; the held-out rows of an area
            are capped at a quarter of it.

    Raises:
        DataError: the sources of the standard library are not where Python says they are.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sentences = _docs_sentences(stdlib)
    rng = random.Random(seed)
    train: list[Row] = []
    heldout: list[Row] = []
    for label in range(len(AREAS)):
        by_module: dict[str, list[Row]] = {}
        for row in sentences:
            if row.label == label:
                by_module.setdefault(row.source, []).append(row)
        modules = sorted(by_module)
        rng.shuffle(modules)
        total = sum(len(rows) for rows in by_module.values())
        kept: list[Row] = []
        held: list[Row] = []
        for module in modules:
            rows = by_module[module]
            # A module that holds a large part of its area stays in training, or the area would be
            # tested on what it hardly trains on.
            fits = len(held) + len(rows) <= 1.5 * heldout_share * total
            (held if len(held) < heldout_share * total and fits else kept).extend(rows)
        train += rng.sample(kept, min(len(kept), max_train_rows_per_label))
        heldout += rng.sample(held, min(len(held), max(1, max_train_rows_per_label // 4)))
    heldout = _without_near_copies(heldout, train)
    rng.shuffle(train)
    rng.shuffle(heldout)
    return TextData("documentation of Python's library", tuple(AREAS), tuple(train), tuple(heldout))


@functools.cache
def _docs_sentences(stdlib: Path) -> list[Row]:
    """Every usable sentence once, in a fixed order; a sentence that two areas share is left out."""
    first: dict[str, Row] = {}
    ambiguous: set[str] = set()
    for label, names in enumerate(AREAS.values()):
        for name in names.split():
            for path in _sources(stdlib, name):
                module = path.relative_to(stdlib).with_suffix("").as_posix()
                for text in _sentences_of(path):
                    key = " ".join(_WORD.findall(text.lower()))
                    if key not in first:
                        first[key] = Row(text, label, module)
                    elif first[key].label != label:
                        ambiguous.add(key)
    if len(first) < 1000:
        raise DataError(
            f"found {len(first)} documentation sentences under {stdlib}, wanted several thousand: this "
            "Python seems to come without the source of its library. Use another Python, or your own "
            "data with --data FILE.tsv"
        )
    return [row for key, row in first.items() if key not in ambiguous]


def _sources(stdlib: Path, name: str) -> list[Path]:
    module = stdlib / f"{name}.py"
    if module.is_file():
        return [module]
    paths = sorted((stdlib / name).rglob("*.py"))
    return [p for p in paths if not _SKIPPED_FOLDERS & set(p.relative_to(stdlib).parts)]


def _sentences_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # some old modules have invalid escapes in their strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node, clean=False) or ""
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
                if ">>>" in paragraph:  # an example session, not prose
                    continue
                for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                    if _is_prose(sentence):
                        yield sentence


def _is_prose(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return 5 <= len(sentence.split()) <= 40 and letters > 0.85 * len(sentence)


def _four_word_runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))}


def _without_near_copies(rows: Sequence[Row], of: Sequence[Row]) -> list[Row]:
    seen = set().union(*(_four_word_runs(row.text) for row in of))
    kept = []
    for row in rows:
        runs = _four_word_runs(row.text)
        if len(runs & seen) < 0.5 * len(runs):
            kept.append(row)
    return kept


def tsv_data(
    train_path: Path,
    eval_path: Path | None,
    *,
    label_names: Sequence[str] | None,
    seed: int,
    heldout_share: float,
) -> TextData:
    """Read rows of `text<TAB>label`, a label being any word or number.

    Args:
        train_path: the rows to train on, in UTF-8, without a header line.
        eval_path: the rows to hold out. None holds out `heldout_share` of the distinct texts of
            `train_path`: equal texts stay on one side.
        label_names: the labels there can be. None takes those that occur in `train_path`, which
            counts as public knowledge: the privacy guarantee does not cover the set of labels.
        seed: decides which texts are held out.
        heldout_share: in (0, 1); not used with `eval_path`.

    Raises:
        DataError: a file is missing, is not UTF-8 or is empty, a line is not `text<TAB>label`, or a
            label is not one of the known ones. The message names the file and the line.
    """
    pairs = _read_tsv(train_path)
    names = tuple(label_names) if label_names else _label_names(pairs, train_path)
    rows = _rows(pairs, names, train_path)
    if eval_path is not None:
        heldout = _rows(_read_tsv(eval_path), names, eval_path)
        return TextData(train_path.name, names, tuple(rows), tuple(heldout))
    texts = sorted({row.text for row in rows})
    if len(texts) < 2:
        raise DataError(
            f"{train_path}: too few distinct texts to hold some out; name them with --eval"
        )
    random.Random(seed).shuffle(texts)
    held = set(texts[: max(1, round(heldout_share * len(texts)))])
    return TextData(
        train_path.name,
        names,
        tuple(row for row in rows if row.text not in held),
        tuple(row for row in rows if row.text in held),
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or is empty.
    """
    try:
        # newline="\n": other characters that Python takes for line ends may stand inside a text.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: the file is empty")
    return lines


def _read_tsv(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise DataError(
                f"{path}, line {number}: {len(fields)} field(s), wanted 2: text<TAB>label"
            )
        text, label = fields[0].strip(), fields[1].strip()
        if not text or not label:
            raise DataError(f"{path}, line {number}: the {'label' if text else 'text'} is empty")
        pairs.append((text, label))
    return pairs


def _label_names(pairs: Sequence[tuple[str, str]], path: Path) -> tuple[str, ...]:
    found = {label for _, label in pairs}
    if not 2 <= len(found) <= _MAX_LABELS:
        raise DataError(
            f"{path}: {len(found)} different labels, wanted 2 to {_MAX_LABELS}. The label is the second "
            "column; name the labels with --labels if the file does not hold all of them"
        )
    # 2 before 10 where all labels are whole numbers.
    numeric = all(re.fullmatch(r"-?\d+", label) for label in found)
    return tuple(sorted(found, key=int) if numeric else sorted(found))


def _rows(pairs: Sequence[tuple[str, str]], names: Sequence[str], path: Path) -> list[Row]:
    index = {name: i for i, name in enumerate(names)}
    rows = []
    for number, (text, label) in enumerate(pairs, 1):
        if label not in index:
            raise DataError(
                f"{path}, line {number}: label {label!r} is not one of {', '.join(names)}"
                + (" (the file must not have a header line)" if number == 1 else "")
            )
        rows.append(Row(text, index[label], f"{path.name}:{number}"))
    return rows
