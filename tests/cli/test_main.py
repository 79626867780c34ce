"""The program: version, help that teaches, exit statuses, and a reader that goes away."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import dpzoo
from dpzoo.cli import main, parse

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
        assert type(parse(words)).__module__ == f"dpzoo.cli.{words[0]}"
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


def test_the_programs_help_has_every_command_and_its_statuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert "1  a check failed" in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


def test_a_terminal_gets_help_with_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["list", "--help"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert "─" in text
    assert "jq -r '.catalogue[] | [.id, .parameters] | @tsv'" in text, "examples are no markup"


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 89, 90, 100, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_cut_at_any_width(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = screen.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7]|38|48)[;m]", text), "a colour"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "…" not in text
    options = import_module(f"dpzoo.cli.{command}").Options
    names = {f"--{f.name.replace('_', '-')}" for f in fields(options) if f.default is not MISSING}
    names = {{"--trainable": "--train"}.get(name, name) for name in names} - {"--topic"}
    assert names <= set(re.findall(r"--[a-z-]+", text[: text.index("exit status")]))


def test_no_escape_codes_where_there_is_no_terminal(tmp_path: Path) -> None:
    for words in (["list"], ["train", "--help"], ["train", str(tmp_path / "gone.tsv")]):
        run = run_program(
            *words, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="40"
        )
        assert "\x1b" not in run.stdout + run.stderr


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
    assert "Usage: dpzoo" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["audit", "x", "--modes"], ["bench", "x", "--modes"], ["train", "x", "--epsilon"]]
)
def test_an_option_without_its_value(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"dpzoo: Option '{words[-1]}' requires an argument. See dpzoo {words[0]} --help."


def test_nought_is_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--epsilon", "--epochs", "--learning-rate", "--batch-size"):
        assert main(["train", str(tmp_path / "rows.tsv"), option, "0"]) == 2
        name = option.removeprefix("--").replace("-", "_")
        assert f"{name}=0, wanted a number above 0" in capsys.readouterr().err.replace("0.0", "0")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_gets_a_hint(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"list": "--famly", "train": "--epsilom", "bench": "--batc"}.get(command, "--tusk")
    with pytest.raises(SystemExit) as stop:
        main([command, "x", "y", wrong, "1", "--json"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    right = {"list": "--family", "train": "--epsilon", "bench": "--batch"}.get(command, "--task")
    line = said.err.splitlines()[-1]
    assert line.startswith(f"dpzoo: No such option: {wrong} (Possible options: ")
    assert right in line
    assert line.endswith(f"See dpzoo {command} --help.")
    assert json.loads(said.out) == {"ok": False, "error": line.removeprefix("dpzoo: ")}


def test_an_interruption_is_said_and_has_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpzoo.cli.list.run", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "dpzoo: interrupted\n"


@pytest.fixture(autouse=True)
def ordinary_signals() -> Iterator[None]:
    """As at a terminal: a process that is started in the background ignores some."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    ways = (signal.SIG_DFL, signal.SIG_DFL, signal.default_int_handler)
    before = [signal.signal(n, way) for n, way in zip(numbers, ways, strict=True)]
    yield
    for number, way in zip(numbers, before, strict=True):
        signal.signal(number, way)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_end_it_by_the_ordinary_way_out(
    name: str, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number, cleaned = getattr(signal, name), []

    def ended(options: Any) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(number)
    monkeypatch.setattr(dpzoo.cli.list, "run", ended)
    assert main(["list", "--json"]) == status
    captured = capsys.readouterr()
    said = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert captured.err == f"dpzoo: {said}\n"
    assert json.loads(captured.out) == {"ok": False, "error": said}
    assert cleaned == [True]
    assert signal.getsignal(number) is before


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    seen = []
    monkeypatch.setattr(
        dpzoo.cli.list, "run", lambda options: seen.append(signal.getsignal(signal.SIGHUP)) or 0
    )
    try:
        assert main(["list"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


def test_an_error_of_our_own_is_a_traceback_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1 would say that a check failed."""

    def broken(options: Any) -> int:
        raise KeyError("oops")

    monkeypatch.setattr(dpzoo.cli.list, "run", broken)
    assert main(["list", "--json"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "KeyError, which is an error in dpzoo: please report it" in captured.err
    assert json.loads(captured.out)["ok"] is False


def test_json_is_json_where_the_arguments_do_not_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "gpt2", "--steps", "many", "--json"])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["ok"] is False
    assert "'--steps'" in data["error"]
    assert f"dpzoo: {data['error']}\n" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "--threads got '0', wanted whole numbers above 0"),
        (["--threads", "99999999999"], "--threads got '99999999999', wanted whole numbers"),
        (["--batch", "9" * 30], "9999', wanted whole numbers above 0"),
        (["--seq", "²"], "--seq got '²', wanted whole numbers above 0"),
        (["--settings", ""], "--settings got none, wanted some of: gradient, step, amortized"),
        (["--device", "cuda:7"], "--device got 'cuda:7' ("),
        (["--device", "toaster"], "--device got 'toaster' ("),
        (["--plot", "growth.png"], "There is nothing to plot: wanted at least two workloads"),
        (["--seq", "8,16", "--plot", "growth.txt"], "A plot got growth.txt, wanted a file of: "),
        (["--seq", "8,16", "--plot", "no/where/growth.png"], "and no/where is no folder. Create it."),
        (["--profile", "no/where/tables.txt"], "--profile got no/where/tables.txt, and its folder is"),
    ],
)  # fmt: skip
def test_bench_checks_its_options_before_it_measures(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpzoo.cli.bench.bench", lambda *args, **kwargs: pytest.fail("measured"))
    assert main(["bench", "gpt2", *words]) == 2
    assert message in capsys.readouterr().err


def run_program(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m dpzoo.cli {' '.join(words)}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=env, check=False
    )


def test_a_full_standard_output_is_one_line() -> None:
    run = run_program("list", ">", "/dev/full")
    assert (run.returncode, run.stderr) == (2, "dpzoo: [Errno 28] No space left on device\n")


def test_a_locale_without_our_characters_gets_them_escaped() -> None:
    run = run_program("audit", "--help", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (run.returncode, run.stderr) == (0, "")


def test_an_interruption_of_the_imports_is_no_traceback() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "dpzoo.cli", "list"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
    )
    assert program.stderr is not None
    for line in program.stderr:
        if line.split()[-1] == "torch._C":
            break
    program.send_signal(signal.SIGINT)
    rest = program.stderr.read()
    assert "Traceback" not in rest
    assert rest.endswith("dpzoo: interrupted\n")
    assert program.wait() == 130


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
