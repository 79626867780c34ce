"""``dpzoo list``: all of the registry and the catalogue, filtered, as text and as JSON."""

import io
import json
import re
import sys
from typing import Any

import pytest

from dpzoo.catalogue import catalogue, quirks
from dpzoo.cli import main
from dpzoo.registry import CLASSES, FAMILIES, TASKS


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["list", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["list", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_everything_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    data = listed(capsys)
    assert list(data) == ["tasks", "catalogue"]
    pairs = {
        (family, task): name
        for task, classes in data["tasks"].items()
        for family, name in classes.items()
    }
    assert pairs == {pair: cls.__name__ for pair, cls in CLASSES.items()}
    assert [one["id"] for one in data["catalogue"]] == [one.id for one in catalogue()]
    lines = text(capsys)
    assert lines[0] == "Tasks and classes"
    assert lines[1].split() == ["task", *FAMILIES]
    for entry in catalogue():
        (line,) = [line for line in lines if line.startswith(f"{entry.id} ")]
        assert f"{entry.parameters / 1e6:.1f} M" in line
        assert (entry.architecture or "(") in line


def test_topics(capsys: pytest.CaptureFixture[str]) -> None:
    families = listed(capsys, "families")["families"]
    assert [one["family"] for one in families] == list(FAMILIES)
    assert sum(one["classes"] for one in families) == 28
    assert sum(one["checkpoints"] for one in families) == len(catalogue())
    assert len(listed(capsys, "classes")["classes"]) == 28
    data = listed(capsys, "quirks")["quirks"]
    assert set(data) == set(quirks())
    assert "openai-community/gpt2" in data["causal-mask"]["checkpoints"]
    assert text(capsys, "families")[3].split()[:2] == ["bert", "9"]
    assert len(text(capsys, "classes")) == 28 + 3
    assert any("gamma and beta" in line for line in text(capsys, "quirks"))


def test_filters(capsys: pytest.CaptureFixture[str]) -> None:
    data = listed(capsys, "--family", "gpt2", "--task", "causal-lm")
    assert data["tasks"] == {"causal-lm": {"gpt2": "GPT2LMHeadModel"}}
    assert {(one["family"], one["task"]) for one in data["catalogue"]} == {("gpt2", "causal-lm")}
    data = listed(capsys, "--task", "question-answering")
    assert set(data["tasks"]["question-answering"]) == set(FAMILIES)
    assert "deepset/roberta-base-squad2" in [one["id"] for one in data["catalogue"]]
    lines = text(capsys, "classes", "--family", "distilbert")
    assert len(lines) == 6 + 3
    assert all("DistilBert" in line for line in lines[3:])


def test_json_has_what_is_known_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    entries = {one["id"]: one for one in listed(capsys, "catalogue")["catalogue"]}
    bare = entries["google-bert/bert-base-multilingual-cased"]
    assert "architecture" not in bare
    assert bare["task"] == "base"
    ner = entries["dslim/bert-base-NER"]
    assert (ner["architecture"], ner["labels"]) == ("BertForTokenClassification", 9)
    assert ner["source"].startswith("https://")


def test_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    data = listed(capsys, "architectures")["architectures"]
    assert set(data["versions"]) == {"torch", "transformers", "opacus"}
    assert sum(one["modes"].get("bk") == "exact" for one in data["results"]) >= 100
    assert not any(one["modes"].get("bk", "").startswith("WRONG") for one in data["results"])
    words = ("architectures", "--family", "llama", "--task", "causal-lm")
    (llama,) = listed(capsys, *words)["architectures"]["results"]
    assert (llama["class"], llama["modes"]["bk"]) == ("LlamaForCausalLM", "exact")
    line = text(capsys, *words)[3].split()
    assert line[:3] == ["llama", "causal-lm", "LlamaForCausalLM"]
    assert line[5] == "exact"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--family", "roberto"], "Unknown family 'roberto'. Wanted one of: bert, roberta"),
        (["--task", "ner"], "does not know task 'ner'"),
        (["architectures", "--family", "lama"], "python -m dpzoo.families --only lama"),
        (
            ["architectures", "--family", "t5", "--task", "causal-lm"],
            "no 't5' for task 'causal-lm'",
        ),
        (["--family", "gpt2", "--task", "masked-lm"], "'gpt2' has no class for task 'masked-lm'"),
    ],
)
def test_what_there_is_not(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_every_task_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for task in TASKS:
        assert list(listed(capsys, "tasks", "--task", task)["tasks"]) == [task]


def test_a_narrow_terminal_gets_less(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["list"]) == 0
    text = screen.getvalue()
    assert "in a wider terminal" in text
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= 100 for line in text.splitlines())
    assert all(cls.__name__ in text for cls in CLASSES.values()), "no class name is broken in two"
