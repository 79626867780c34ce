"""The files around the code say what the code does: versions, constraints, commands, configs."""

import importlib.metadata
import importlib.resources
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoConfig

import dpzoo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CONFIGS = sorted((ROOT / "configs" / "models").glob("*.json"))


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_here() -> dict[str, str]:
    """The pins that count on this interpreter, canonical name -> version."""
    return {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in constraints()
        if pin.marker is None or pin.marker.evaluate()
    }


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return [one for one in found if canonicalize_name(one.name) != "dpzoo"]


def tracked_files() -> list[Path]:
    """What git tracks, or would with `git add .`; without git, the files of the known folders."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if listed.returncode == 0:
            paths = (ROOT / name for name in listed.stdout.split("\0") if name)
            return [path for path in paths if path.is_file()]
    folders = (".ci", "configs", "conversion", "dpzoo", "examples", "tests")
    below = [path for name in folders for path in (ROOT / name).rglob("*")]
    paths = [*ROOT.iterdir(), *below]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def test_the_version_is_one() -> None:
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dpzoo.__version__"}
    installed = importlib.metadata.version("dpzoo")
    assert installed == dpzoo.__version__, "the installation is older than the code: make install"


def test_the_changelog_knows_the_version() -> None:
    assert f"## {dpzoo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_marked_as_typed() -> None:
    assert importlib.resources.files(dpzoo).joinpath("py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["dpzoo"]


def test_every_constraint_is_exact_and_said_once() -> None:
    for pin in constraints():
        assert [clause.operator for clause in pin.specifier] == ["=="], str(pin)
        assert "+" not in str(pin.specifier), f"{pin}: a local build is not for every machine"
    active = [pin.name for pin in constraints() if pin.marker is None or pin.marker.evaluate()]
    assert len(active) == len({canonicalize_name(name) for name in active})


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_every_dependency_inside_its_range(requirement: Requirement) -> None:
    if requirement.marker is not None and not requirement.marker.evaluate():
        requirement_pins = [pin for pin in constraints() if pin.name == requirement.name]
        assert requirement_pins, f"constraints.txt does not pin {requirement.name}"
        return
    version = pinned_here().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_constraints_pin_what_the_dependencies_bring_along() -> None:
    """By the installed metadata; the accelerator libraries of a torch build are torch's to pin."""
    pinned, seen, queue = pinned_here(), set(), [(one.name, one.extras) for one in requirements()]
    missing = set()
    while queue:
        name, extras = queue.pop()
        try:
            below = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform or Python
        if canonicalize_name(name) not in pinned:
            missing.add(canonicalize_name(name))
        for requirement in map(Requirement, below):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            )
            key = (requirement.name, frozenset(requirement.extras))
            if wanted and key not in seen and canonicalize_name(requirement.name) != "dpzoo":
                seen.add(key)
                queue.append((requirement.name, requirement.extras))
    accelerators = re.compile(r"cuda|nvidia|triton|rocm|intel")
    assert sorted(name for name in missing if not accelerators.search(name)) == []


def test_the_readme_names_the_commands_and_they_are_targets() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"^\s*make ([a-z-]+)", readme, flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test"} <= commands
    assert commands <= targets
    assert "run test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_there_are_two_tiny_configs_for_every_family() -> None:
    families = [AutoConfig.from_pretrained(path).model_type for path in CONFIGS]
    assert sorted(set(families)) == ["bert", "distilbert", "gpt2", "roberta"]
    assert all(families.count(family) >= 2 for family in families)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_model_config_builds_the_stock_model_it_names(path: Path) -> None:
    config = AutoConfig.from_pretrained(path)
    (architecture,) = config.architectures
    model = getattr(transformers, architecture)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    home = re.compile(
        r"(?<![\w.])/(?:home/[a-z]|Users/[A-Za-z]|root/|work/|private/var/|mnt/[a-z])"
    )
    offences = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not text
        offences += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, start=1)
            if home.search(line)
        ]
    assert offences == []
