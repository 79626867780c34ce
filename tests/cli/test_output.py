"""Tables and progress: rich on a terminal, plain text everywhere else."""

import io
import sys

import pytest

from dpzoo.cli.output import plain_table, print_table, progress

HEADER = ("name", "size")
ROWS = [("a", 5), ("long name", None), ("b", 12345)]
PLAIN = """\
Title
name        size
---------  -----
a              5
long name
b          12345
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_text_is_aligned_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEADER, ROWS, title="Title", numbers=("size",))
    assert capsys.readouterr().out == PLAIN
    wide = "x" * 500
    assert wide in plain_table(("a",), [(wide,)])


def test_a_terminal_gets_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    print_table(HEADER, [*ROWS, ("[bold]not markup[/]", 1)], title="Title", numbers=("size",))
    text = screen.getvalue()
    assert "─" in text
    assert "[bold]not markup[/]" in text
    assert "12345" in text


def test_ids_stay_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any terminal: an id that is folded cannot be copied."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "50")
    name = "organisation/a-checkpoint-with-a-long-name-as-many-have"
    print_table(("checkpoint", "class"), [(name, "BertForSequenceClassification")] * 2)
    assert screen.getvalue().count(name) == 2


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress() as say:
        say("working")
    assert log.getvalue() == ""


def test_progress_with_rich_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(total=3) as say:
        say("first")
        say("second")
        say("third")
    text = screen.getvalue()
    assert "third" in text
    assert "2/3" in text
