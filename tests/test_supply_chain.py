"""What the package is built on: the licences page, the pins, and a database that cannot be asked."""

import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
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


CLEAN, SKIPPED = (
    {"name": "a", "version": "1", "vulns": []},
    {"name": "A", "skip_reason": "not found: a"},
)
BAD = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
AWAY = "ConnectionError: Name or service not known"


@pytest.mark.parametrize(
    ("answers", "status", "out", "err"),
    [
        ({"pypi": [CLEAN, {**BAD, "vulns": []}]}, 0, "2 of 2 pinned versions could be looked up", ""),
        ({"pypi": [CLEAN, BAD]}, 1, "b 2: X-1, mended in ['3']\n2 of 2 pinned versions could", ""),
        # "No known vulnerabilities found", says pip-audit, with status 0.
        ({"pypi": [SKIPPED, CLEAN]}, 3, "1 of 2 pinned versions", f"pypi: not found: a; osv: {AWAY}"),
        ({"pypi": [SKIPPED, BAD], "esms": [CLEAN]}, 1, "X-1, mended in ['3']\n2 of 2 pinned", ""),
        ({}, 3, "0 of 2 pinned versions could be looked up", f"nothing is known: pypi: {AWAY}"),
    ],
)  # fmt: skip
def test_a_database_out_of_reach_is_no_clean_bill(
    answers: dict[str, Any], status: int, out: str, err: str, script: Any, capsys: Any,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        if "pip_audit" not in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        found = answers.get(command[command.index("-s") + 1])
        text = "" if found is None else json.dumps({"dependencies": found})
        return subprocess.CompletedProcess(command, found is None, text, AWAY)

    (tmp_path / "pins.txt").write_text('# pins\na==1\nb==2 ; python_version >= "3.11"\n')
    (tmp_path / "page.md").write_text("# Licences\n\nLast look for known vulnerabilities: never\n")
    monkeypatch.setattr(script, "PINS", tmp_path / "pins.txt")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.vulnerabilities() == status
    captured = capsys.readouterr()
    assert out in captured.out
    assert err in captured.err
    assert bool(captured.err) == bool(err)
    page = (tmp_path / "page.md").read_text()
    assert page.count("Last look") == 1
    assert captured.out.splitlines()[-1] in page


@pytest.mark.parametrize("python", ["/no/python3.10", sys.executable])
def test_pins_of_an_old_python_are_resolved_with_it_alone(
    python: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's --python-version leaves markers as they are: the pins would be those of the running one."""
    monkeypatch.setattr(script, "OLD_PYTHON", "3.10" if sys.version_info[:2] != (3, 10) else "3.9")
    monkeypatch.setattr(script.sys, "version_info", (3, 11))
    monkeypatch.setattr(script, "resolved", lambda python: pytest.fail("resolved"))
    monkeypatch.setenv("OLD_PYTHON", python)
    with pytest.raises(
        SystemExit, match=r"wanted a Python 3\.\d+, for whose pins pip has to run with it"
    ):
        script.constraints()


def test_the_pins_of_both_pythons_are_asked_for(script: Any) -> None:
    new, old = script.pins()
    assert "torch==" in " ".join(new)
    assert old
    for part in (new, old):
        names = [pin.split("==")[0] for pin in part]
        assert len(set(names)) == len(names)
        assert not any(";" in pin for pin in part)
