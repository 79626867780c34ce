"""Every block of Python on the pages runs, as it stands; the site knows every page."""

import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from opacus.accountants import RDPAccountant, registry
from torch.utils.data import DataLoader

import dpzoo
from tests.docs.pages import DOCS, PAGES, ROOT, after, blocks, given, hub, objects, rows, run, stock


@pytest.fixture(autouse=True)
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the hub's models in it, and an accountant that is quick: few orders, all whole."""
    hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", [*range(2, 40)])
    monkeypatch.setitem(registry._ACCOUNTANTS, "prv", RDPAccountant)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_blocks_of_a_page_run(page: str) -> None:
    names = run(page, blocks(page, "python"), **given(page))
    check: Callable[[dict[str, Any]], None] = CHECKS.get(page, lambda names: None)
    check(names)


def trained_and_saved(names: dict[str, Any]) -> None:
    saved = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    batch = {"input_ids": names["encoded"]["input_ids"][:2]}
    torch.testing.assert_close(saved(**batch).logits, names["model"](**batch).logits)
    assert 7 < names["engine"].get_epsilon(names["DELTA"]) <= 8
    assert len(names["optimizer"].state) == len(list(saved.parameters()))


def lost_nothing(names: dict[str, Any]) -> None:
    assert len(names["norms"]) >= 0
    assert 0 <= names["share"] <= 1
    assert names["lost"] == 0
    assert names["report"].ok


def ways_in_and_out(names: dict[str, Any]) -> None:
    assert type(names["stock_model"]) is transformers.GPT2LMHeadModel
    assert type(names["model"]) is dpzoo.GPT2LMHeadModel


def nothing_was_left_out(names: dict[str, Any]) -> None:
    """A check that is skipped proves nothing."""
    assert names["report"].model == "BertForSequenceClassification"
    assert [each.skipped for each in names["stock_report"].results if each.skipped] == []


CHECKS = {
    "audit": nothing_was_left_out,
    "start": trained_and_saved,
    "your-model": lost_nothing,
    "zoo": ways_in_and_out,
}
"""What is left when a page's blocks have run."""


# --- from other libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3), ids=["opacus", "private-transformers", "fastdp"])
def test_what_a_migration_ends_with_trains(index: int) -> None:
    diff = blocks("migrate", "diff")[index]
    model = stock()
    before = {name: value.clone() for name, value in model.named_parameters()}
    names = run(
        "migrate",
        [after(diff)],
        **{**objects(model), "loader": DataLoader(rows(40), batch_size=10)},
    )
    assert 0 < names["engine"].get_epsilon(1e-3) <= 8
    assert [
        name for name, value in model.named_parameters() if torch.equal(value, before[name])
    ] == []


def test_what_a_migration_begins_with_is_python() -> None:
    for diff in blocks("migrate", "diff"):
        lines = [line[1:] for line in diff.splitlines() if not line.startswith("+")]
        ast.parse("\n".join(lines))


# --- the site --------------------------------------------------------------------------------------


def navigated(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [
        page
        for part in (entry if isinstance(entry, list) else entry.values())
        for page in navigated(part)
    ]


def test_every_page_has_a_place_and_every_place_a_page() -> None:
    """`make docs` says so too; this needs no mkdocs."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(navigated(config["nav"])) == pages


def test_the_links_between_pages_lead_somewhere() -> None:
    for path in DOCS.rglob("*.md"):
        for target in re.findall(
            r"\]\(([^)#\s]+\.(?:md|png|py))(?:#[^)]*)?\)", path.read_text(encoding="utf-8")
        ):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_api_pages_name_what_there_is() -> None:
    named = [
        line[4:].strip()
        for path in (DOCS / "api").glob("*.md")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    ]
    models = {name for name in dpzoo.__all__ if isinstance(getattr(dpzoo, name), type)}
    models = {
        name for name in models if issubclass(getattr(dpzoo, name), transformers.PreTrainedModel)
    }
    errors = {
        name for name in dpzoo.__all__ if name.endswith("Error") and name != "AuditFailedError"
    }
    rest = set(dpzoo.__all__) - models - errors - {"__version__"}
    assert {f"dpzoo.{name}" for name in rest} <= set(named)


def test_the_site_is_built_by_ci() -> None:
    done = subprocess.run(
        ["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "mkdocs build --strict" in done.stdout
    assert "run docs\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
