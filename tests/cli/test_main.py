"""The program: version, help that teaches, exit statuses, and a reader that goes away."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dpzoo
from dpzoo.cli import main, parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = ("list", "train", "convert", "audit", "bench")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dpzoo {dpzoo.__version__}\n"


def test_the_program_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dpzoo": "dpzoo.cli:main"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit statuses and examples, and every example is something that the parser takes."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "exit status:\n  0" in text
    examples = text[text.index("examples:\n") :].splitlines()[1:]
    calls = [line.split() for line in examples if line.startswith("  dpzoo ")]
    assert len(calls) >= 2
    for call in calls:
        words = call[1:]
        for end in ("|", ">"):
            words = words[: words.index(end)] if end in words else words
        # A remark after several spaces.
        line = next(line for line in examples if line.split() == call).strip()
        remark = line.split("   ", 1)[1].split() if "   " in line else []
        words = words[: len(words) - len(remark)] if remark else words
        options = parser().parse_args(words)
        assert callable(options.run)


def test_the_programs_help_has_every_command_and_its_statuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text
    assert "1  a check failed" in text
    assert text == parser().format_help(), "the table of commands says other than their modules"


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_what_needs_no_command_imports_none(word: str) -> None:
    """torch takes seconds, and a shell's completion or a version check should not."""
    code = (
        "import contextlib, sys, dpzoo.cli\n"
        f"with contextlib.suppress(SystemExit): dpzoo.cli.main([{word!r}])\n"
        "sys.exit(str(sorted({'torch', 'transformers', 'opacus'} & sys.modules.keys())))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.stderr == "[]\n"
    assert "dpzoo" in run.stdout


@pytest.mark.parametrize("words", [[], ["nonsense"], ["convert", "only-one"]])
def test_arguments_that_do_not_parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: dpzoo" in capsys.readouterr().err


def test_an_interruption_is_said_and_has_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpzoo.cli.list.run", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "dpzoo: interrupted\n"


def test_as_a_module_into_a_pipe_that_closes() -> None:
    """``python -m dpzoo.cli list | head -1``: no complaint, no traceback."""
    command = f"{sys.executable} -m dpzoo.cli list catalogue --json | head -1"
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "{\n", "")
