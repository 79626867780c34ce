"""What the package is built on: the licences page, the pins, and a database that cannot be asked."""

import importlib.machinery
import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(
        "supply_chain", str(ROOT / ".ci" / "supply-chain")
    )
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("supply_chain", loader)
    )
    loader.exec_module(module)
    return module


def test_the_page_has_a_licence_of_everything_that_an_installation_brings(script: Any) -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| (.+?) \| `", page, flags=re.MULTILINE))
    needed = script.closure(script.requirements("dpzoo", ""))
    wanted = {name for name in needed if not name.startswith(script.LEFT_TO_TORCH)}
    assert {"torch", "opacus", "transformers"} <= wanted <= listed.keys()
    assert "not stated" not in listed.values()


def test_pins_have_a_line_for_each_python_where_they_differ(script: Any) -> None:
    new, old = {"a": "1", "b": "2", "triton": "3"}, {"a": "1", "b": "1", "c": "4"}
    assert script.pinned(new, old) == [
        "a==1",
        'b==2 ; python_version >= "3.11"',
        'b==1 ; python_version < "3.11"',
        'c==4 ; python_version < "3.11"',
    ]


@pytest.mark.parametrize(
    ("code", "out", "err", "status", "said"),
    [
        (0, "", "No known vulnerabilities found", 0, ""),
        (1, "Found 1 known vulnerability", "", 1, ""),
        (1, "", "ConnectionError: Name or service not known", 3, "is out of reach, so that nothing"),
        (1, "", "ValueError: a bad line", 2, "pip-audit failed: ValueError: a bad line"),
    ],
)  # fmt: skip
def test_a_database_out_of_reach_is_no_clean_bill(
    code: int, out: str, err: str, status: int, said: str, script: Any, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        asked = "pip_audit" in command
        return subprocess.CompletedProcess(command, code if asked else 0, out, err)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.vulnerabilities() == status
    captured = capsys.readouterr()
    assert captured.out == out
    assert said in captured.err
