"""The files around the code say what the code does: versions, constraints, commands, configs."""

import importlib
import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import transformers
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import AutoConfig

import dpzoo
from dpzoo.versions import TRANSFORMERS, warn_if_untested

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
    folders = (".ci", "configs", "conversion", "docs", "dpzoo", "examples", "tests")
    below = [path for name in folders for path in (ROOT / name).rglob("*")]
    paths = [*ROOT.iterdir(), *below]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def test_the_version_is_one() -> None:
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "dpzoo.versions.__version__"
    }
    installed = importlib.metadata.version("dpzoo")
    assert installed == dpzoo.__version__, "the installation is older than the code: make install"


def test_the_changelog_knows_the_version() -> None:
    assert f"## {dpzoo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_marked_as_typed() -> None:
    assert importlib.resources.files(dpzoo).joinpath("py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["dpzoo"]


# --- what the archives hold ---------------------------------------------------------------------

BUILD = """
import sys, setuptools.build_meta as backend
place = sys.argv[1]  # which setuptools overwrites
backend.build_sdist(place)
backend.build_wheel(place)
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names in the wheel and in the source archive, built from a copy of the tree."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for path in tracked_files():
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for path in (one for one in (ROOT / "dpzoo").iterdir() if one.is_symlink()):
        (tree / "dpzoo" / path.name).symlink_to(os.readlink(path))
    subprocess.run(
        [sys.executable, "-c", BUILD, str(dist)], cwd=tree, capture_output=True, check=True
    )
    (wheel,) = dist.glob("*.whl")
    (source,) = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        in_wheel = {name for name in file.namelist() if not name.endswith("/")}
    with tarfile.open(source) as file:
        members = [one for one in file.getmembers() if one.isfile()]
        in_source = {one.name.split("/", 1)[1] for one in members}
    return {"wheel": in_wheel, "source": in_source}


def test_the_wheel_holds_what_the_library_needs(archives: dict[str, set[str]]) -> None:
    inside = {name for name in archives["wheel"] if ".dist-info/" not in name}
    code = {
        path.relative_to(ROOT).as_posix()
        for path in tracked_files()
        if path.is_relative_to(ROOT / "dpzoo") and path.suffix == ".py"
    }
    data = {"dpzoo/py.typed", "dpzoo/catalogue.toml", "dpzoo/families/verified.json"}
    data |= {f"dpzoo/tiny_configs/{path.name}" for path in CONFIGS}
    assert inside == code | data
    assert any(name.endswith("licenses/LICENSE") for name in archives["wheel"])


def test_the_source_archive_holds_what_git_has(archives: dict[str, set[str]]) -> None:
    """All that one needs to build, test and run everything; only git's and CI's own files are left out."""
    wanted = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    wanted -= {name for name in wanted if name.startswith(".")}
    assert sorted(wanted - archives["source"]) == []


def test_the_tiny_configs_are_the_packages_too() -> None:
    """configs/models is one folder under two names; the wheel has it as dpzoo/tiny_configs."""
    folder = importlib.resources.files(dpzoo).joinpath("tiny_configs")
    for path in CONFIGS:
        assert folder.joinpath(path.name).read_bytes() == path.read_bytes()


def test_the_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"peft", "bench", "test", "docs"} <= extras.keys()
    assert any(line.startswith("matplotlib") for line in extras["bench"])


# --- what an import costs -----------------------------------------------------------------------

IMPORT = """
import json, sys, time
import torch, transformers, opacus
from transformers import (
    BertModel, DistilBertModel, GPT2Model, PreTrainedModel, RobertaModel, initialization
)
from opacus.grad_sample import GradSampleModule
before = set(sys.modules)
start = time.process_time()
from dpzoo import *
seconds = time.process_time() - start
import dpzoo.cli, dpzoo.cli.audit, dpzoo.cli.bench, dpzoo.cli.convert, dpzoo.cli.list, dpzoo.cli.train
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def test_every_public_name_is_there() -> None:
    code = "import dpzoo\nassert set(dpzoo.__all__) <= set(dir(dpzoo))\n"
    code += (
        "print(*(n for n in dpzoo.__all__ if getattr(dpzoo, n).__class__.__name__ == 'module'))\n"
    )
    code += "print(dpzoo.layers.attention.attend.__name__, hasattr(dpzoo, 'nothing'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["attend", "False"]


def test_a_former_module_is_still_there_and_warns() -> None:
    sys.modules.pop("dpzoo.clipping.loss", None)
    with pytest.warns(
        FutureWarning, match=r"dpzoo\.clipping\.loss is now dpzoo\.clipping\.criterion"
    ):
        former = importlib.import_module("dpzoo.clipping.loss")
    assert former.PrivateLoss is importlib.import_module("dpzoo.clipping.criterion").PrivateLoss


def test_an_import_brings_nothing_along_and_is_quick() -> None:
    """What transformers loads late for the models that are imported here is its own."""
    command = [sys.executable, "-c", IMPORT]
    runs = [
        json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        )
        for _ in range(2)
    ]
    brought = set(runs[0][1]) - set(sys.stdlib_module_names)
    # What is there for one command or one adapter is imported by it, when it runs.
    assert not brought & {"peft", "accelerate", "rich", "matplotlib", "yaml", "pandas", "sklearn"}
    # A tenth of this as a rule; of the processor, because tests share the machine with others.
    assert min(seconds for seconds, _ in runs) < 1.0


# --- files about the project --------------------------------------------------------------------


def test_the_citation_is_valid_and_of_this_version() -> None:
    """The required keys of CFF 1.2.0, and the kinds of its references."""
    data = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert data["cff-version"] == "1.2.0"
    assert data["type"] == "software"
    assert data["version"] == dpzoo.__version__
    assert data["license"] == PROJECT["license"]
    assert data["title"].startswith("dpzoo")
    assert data["message"]
    for one in (data, *data["references"]):
        assert one["title"]
        for author in one["authors"]:
            assert author.keys() in ({"name"}, {"family-names", "given-names"})
    for one in data["references"]:
        assert one.keys() == {"type", "title", "authors", "year", "url"}
        assert one["type"] == "article"


def test_the_security_notes_say_what_they_must() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for word in ("secure_mode", "one row", "Mironov", "pytorch_model.bin", "privately"):
        assert word in text
    assert "@" not in text, "an address that nobody confirmed"


def test_the_range_of_transformers_is_one() -> None:
    (wanted,) = (one for one in requirements() if one.name == "transformers")
    assert wanted.specifier == SpecifierSet(TRANSFORMERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(min(pin.version for pin in wanted.specifier))  # the first of the range
        warn_if_untested(transformers.__version__)
    for version in ("5.20.1", "5.25.0.dev0", "5.25.0", "6.0.0"):
        with pytest.warns(
            UserWarning, match=rf"not tested with transformers {version}, but with >=5"
        ):
            warn_if_untested(version)


OUTSIDE = """
import importlib.metadata
import warnings

version = importlib.metadata.version
importlib.metadata.version = lambda name: "5.99.0" if name == "transformers" else version(name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dpzoo
    from dpzoo import convert, models
said = [one for one in caught if "was not tested with transformers 5.99.0" in str(one.message)]
print(len(said), said[0].filename, said[0].category.__name__)
"""


def test_importing_beside_another_transformers_warns_once_and_works() -> None:
    command = [sys.executable, "-c", OUTSIDE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "<string>", "UserWarning"]


def test_the_runs_that_the_range_rests_on_are_written_down() -> None:
    """docs/versions.md has a passed run of the oldest, the pinned and the newest supported one."""
    table = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    passed = set(re.findall(r"^\|.*transformers (\S+),.* passed.*\|$", table, flags=re.MULTILINE))
    bounds = {clause.operator: clause.version for clause in SpecifierSet(TRANSFORMERS)}
    assert bounds[">="] in passed
    assert pinned_here()["transformers"] in passed
    newest = max(map(Version, passed))
    assert Version(bounds["<"]).release == (newest.major, newest.minor + 1)
    assert "failed" not in table


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
