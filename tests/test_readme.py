"""What the README shows, runs; what it says of versions and figures is what the other files say."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from opacus.accountants import RDPAccountant, registry

import dpzoo
from dpzoo.versions import TRANSFORMERS
from tests.docs.pages import DOCS, ROOT, blocks, hub, rows, run, stock

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks("README", "python")
ZOO = (DOCS / "zoo.md").read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few orders, all whole, instead of the PRV accountant's search."""
    monkeypatch.setattr(RDPAccountant, "DEFAULT_ALPHAS", [*range(2, 40)])
    monkeypatch.setitem(registry._ACCOUNTANTS, "prv", RDPAccountant)


@pytest.mark.usefixtures("quick")
def test_the_first_example_trains_every_parameter_and_saves_a_stock_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "batch_size=512" in BLOCKS[0]
    names = run("README", [BLOCKS[0].replace("batch_size=512", "batch_size=20")], dataset=rows(60))
    assert re.fullmatch(r"epsilon [78]\.\d\d at delta 1e-5\n", capsys.readouterr().out)
    assert names["engine"].accountant.history[0][2] == 9  # three epochs, as epsilon was planned for

    before = transformers.BertForMaskedLM.from_pretrained("bert-base-uncased").bert.state_dict()
    after, report = transformers.BertForSequenceClassification.from_pretrained(
        "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    moved = {
        name: not torch.equal(parameter, before[name])
        for name, parameter in after.bert.named_parameters()
        if name in before  # the pooler is new
    }
    assert all(moved.values()), sorted(name for name in moved if not moved[name])
    ids = {"input_ids": rows(1)[0]["input_ids"].unsqueeze(0)}
    torch.testing.assert_close(after(**ids).logits, names["model"].eval()(**ids).logits)


@pytest.mark.usefixtures("quick")
def test_the_trainer_is_used_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(
        "README",
        [BLOCKS[1]],
        model=stock(),
        args=transformers.TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True),
        train_dataset=[{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows()],
        tokenizer=None,
    )
    assert 0 < names["trainer"].epsilon <= 8
    transformers.BertForSequenceClassification.from_pretrained("out")


def test_every_block_has_its_test() -> None:
    assert len(BLOCKS) == 2
    assert len(README.splitlines()) < 150


def test_the_table_of_classes_is_the_registry() -> None:
    found = re.findall(r"^\| `([a-z-]+)` \|(.*)\|$", ZOO, flags=re.MULTILINE)
    families = ("bert", "roberta", "distilbert", "gpt2")
    table: dict[str, dict[str, str]] = {family: {} for family in families}
    for task, cells in found:
        for family, cell in zip(families, cells.split("|"), strict=True):
            if cell.strip():
                table[family][task] = cell.strip(" `")
    assert table == dpzoo.list_models()
    assert sum(len(classes) for classes in table.values()) == 28
    assert "[28 classes]" in README


def test_the_badges_are_true() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    first, end = re.fullmatch(r">=([\d.]+),<5\.(\d+)", TRANSFORMERS).groups()  # type: ignore[union-attr]
    for badge, said in {
        f"transformers-{first}_to_5.{int(end) - 1}-": TRANSFORMERS,
        "python-3.10+-": 'requires-python = ">=3.10"',
        "licence-Apache--2.0-": 'license = "Apache-2.0"',
    }.items():
        assert badge in README
        assert said in project


def test_the_accuracies_are_those_of_the_page() -> None:
    section = README.split("## Accuracy")[1].split("\n## ")[0]
    figures = re.findall(r"\d\d\.\d %", section)
    page = (DOCS / "accuracy.md").read_text(encoding="utf-8")
    assert len(figures) == 26
    assert [figure for figure in figures if figure not in page] == []


def test_the_counts_are_those_of_the_pages() -> None:
    models = (DOCS / "models.md").read_text(encoding="utf-8")
    (every,) = re.findall(
        r"^\| all \| (\d+) \| (\d+), .*?, (\d+) \| .* \| (\d+), (\d+), (\d+) \|$",
        models,
        flags=re.MULTILINE,
    )
    tried, hooks, hooks_wrong, exact, refused, wrong = every
    assert f"of [{tried} architectures](docs/models.md) that run, {exact} are exact" in README
    assert f"{refused} are refused by name, none is silently wrong" in README
    assert int(wrong) == 0
    assert f"{hooks} exact, {hooks_wrong} silently wrong" in README
    pitfalls = (DOCS / "pitfalls.md").read_text(encoding="utf-8")
    bugs = len(re.findall(r"^\| (?!bug|-)", pitfalls, flags=re.MULTILINE))
    assert f"[{bugs} bugs](docs/pitfalls.md)" in README


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
