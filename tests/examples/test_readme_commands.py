"""Every command line that the README and the pages show, run as written, with small models and files.

What a command is given beyond that is in `SMALLER`. `make` targets are run dry: the
tests themselves are one of them, and continuous integration runs them all.
"""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from dpzoo.cli import main
from tests.docs.pages import PAGES
from tests.examples.test_glue_study import TINY as GLUE_STUDY
from tests.examples.test_sst2_study import TINY as STUDY
from tests.examples.tiny import SMALL
from tests.support import others_slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
FENCED = [
    found
    for page in FILES
    for found in re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
]
COMMANDS = list(
    dict.fromkeys(
        re.split(r"\s+#", line)[0].strip()
        for language, block in FENCED
        if language in ("", "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    )
)

SMALLER = {
    "bench": "--batch 2 --seq 5 --steps 1 --warmup 0 --every 2 --processes 0",
    "text_classification": SMALL,
    "lora": SMALL,
    "sst2_study": STUDY,
    "glue_study": GLUE_STUDY,
    "quickstart": "--rows 20",
}

STUDY_COMMAND = "PYTHONPATH=examples python examples/studies/"

pytestmark = pytest.mark.usefixtures("quick_accountant")


def of(*starts: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(starts)]


def test_every_command_has_its_test() -> None:
    known = of("make ", "pip install ", "dpzoo ", "python examples/", STUDY_COMMAND)
    assert known == COMMANDS
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", of("make "))
def test_make(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    target = command.split()[1]
    wanted = {"demo": "examples/quickstart.py", "test": "-m pytest", "docs": "mkdocs"}[target]
    assert wanted in done.stdout


@pytest.mark.parametrize("command", of("pip install "))
def test_pip_install_names_extras_that_there_are(command: str) -> None:
    (what,) = shlex.split(command)[2:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.fullmatch(r"\.(\[[\w,]+\])?", what)
    asked = re.findall(r"\w+", what)
    assert set(asked) <= set(project["optional-dependencies"])


BENCHES = of("dpzoo bench ")


@pytest.mark.parametrize(
    "command", others_slow(of("dpzoo "), [c for c in of("dpzoo ") if c not in BENCHES[1:]])
)
def test_command_line(
    command: str,
    checkpoint: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(command)
    checkpoint("bert", "masked-lm").rename("bert-base-uncased")
    (tmp_path / "bert-base").symlink_to("bert-base-uncased")
    if name == "bench":
        checkpoint("roberta", "sequence-classification").rename("roberta-tiny")
        checkpoint("gpt2", "causal-lm").rename("gpt2-tiny")
    if command.startswith("dpzoo convert"):
        (tmp_path / "bert-base").unlink()
    if name == "bench":
        # The presets' width and vocabulary, which make their figures, are not for a test.
        arguments[0] = {"roberta-base": "roberta-tiny", "gpt2": "gpt2-tiny"}[arguments[0]]
        if "--layers" in arguments:
            at = arguments.index("--layers")
            del arguments[at : at + 2]
        for option in ("--batch", "--seq", "--shapes"):
            if option in arguments:
                at = arguments.index(option)
                arguments[at + 1] = "2x5,2x6" if option == "--shapes" else "2"
    arguments += SMALLER.get(name, "").split()
    assert main([name, *arguments]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", of("python examples/", STUDY_COMMAND))
def test_examples(
    command: str,
    checkpoint: Callable[[str, str], Path],
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv", "path/to/train.tsv", "path/to/dev.tsv"):
        text = reviews.read_text(encoding="utf-8")
        if "sst2" in command:  # whose labels are 0 and 1
            text = text.replace("\tneg\n", "\t0\n").replace("\tpos\n", "\t1\n")
        (tmp_path / name).write_text(text, encoding="utf-8")
    _, script, *arguments = shlex.split(command.removeprefix("PYTHONPATH=examples "))
    name = Path(script).stem
    module = importlib.import_module(name)
    model = checkpoint("bert", "sequence-classification")
    if name == "quickstart":  # which wants an encoder for six classes, and long sentences
        config = BertConfig.from_pretrained(model, max_position_embeddings=48, num_labels=2)
        BertModel(config).save_pretrained(model)
    arguments += ["--model", str(model), *SMALLER[name].split()]
    assert module.main(arguments) == 0
