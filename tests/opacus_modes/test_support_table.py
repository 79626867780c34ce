"""What runs under each release of Opacus that dpzoo allows: computed, and compared with docs/zoo.md.

One class of each family stands for it here, the one with a tied output head; test_exactness.py goes
through all 28. A new release of Opacus gets a column of its own in `RUNS`, once this file has said what
it does.
"""

import importlib.metadata
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from packaging.specifiers import SpecifierSet
from torch import nn
from torch.utils.data import DataLoader

import dpzoo
from tests.modes import MODES, Step, assert_step_is_exact
from tests.support import FAMILY, NAMES, ROWS, batch_for, stock_model

ROOT = Path(__file__).resolve().parents[2]

RUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "1.6": {
        "BERT, 9 classes": ("exact", "exact", "exact", "exact"),
        "RoBERTa, 7 classes": ("exact", "exact", "exact", "exact"),
        "DistilBERT, 6 classes": ("exact", "exact", "exact", "exact"),
        "GPT-2, 6 classes": ("exact", "exact", "exact", "exact"),
        "empty batches": ("yes", "yes", "no", "yes"),
        "first input by keyword": ("yes", "yes", "no", "yes"),
        "gradient checkpointing": ("yes", "yes", "no", "yes"),
        "per-layer clipping": ("yes", "yes", "yes", "no"),
        "`wrap_model=False`": ("yes", "yes", "no", "yes"),
        "stock BERT, 2 models": ("0", "0", "0", "0"),
        "stock RoBERTa, 2 models": ("1", "1", "2", "1"),
        "stock DistilBERT, 2 models": ("0", "0", "0", "0"),
        "stock GPT-2, 1 model": ("0", "0", "0", "0"),
    }
}
"""Opacus release -> row of the page's table -> what each of `MODES` does."""

INSTALLED = ".".join(importlib.metadata.version("opacus").split(".")[:2])

FAMILIES = {"BERT": "bert", "RoBERTa": "roberta", "DistilBERT": "distilbert", "GPT-2": "gpt2"}
ONE_OF = {
    "BERT": "BertForMaskedLM",
    "RoBERTa": "RobertaForMaskedLM",
    "DistilBERT": "DistilBertForMaskedLM",
    "GPT-2": "GPT2LMHeadModel",
}
STOCK = {
    "BERT": ("BertForSequenceClassification", "BertForMaskedLM"),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaForMaskedLM"),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertForMaskedLM"),
    "GPT-2": ("GPT2LMHeadModel",),
}

REFUSALS = (
    AttributeError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    dpzoo.DpzooError,
)
"""An answer that is wrong is an AssertionError, and no refusal."""


def runs(attempt: Callable[[], object]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt()
    except REFUSALS:
        return False
    return True


def exact_step(name: str, mode: str, **options: Any) -> None:
    assert_step_is_exact(name, mode, batch_for(name), stock_model(name), **options)


def empty_batch(name: str, mode: str) -> None:
    step = Step(name, dpzoo.convert(stock_model(name)), mode)
    step.backward({key: value[:0] for key, value in batch_for(name).items()})
    assert all(bool((value == 0).all()) for value in step.gradient().values())


def by_keyword(name: str, mode: str) -> None:
    step = Step(name, dpzoo.convert(stock_model(name)), mode)
    assert step.wrapped(**batch_for(name)).logits.shape[0] == ROWS


def per_layer(name: str, mode: str) -> None:
    model = dpzoo.convert(stock_model(name))
    clips = [1.0 for _ in model.parameters()]
    step = Step(name, model, mode, max_grad_norm=clips, clipping="per_layer")
    step.backward(batch_for(name))
    assert all(float(value.norm()) < 1.0 for value in step.gradient().values())


FEATURES: dict[str, Callable[[str, str], None]] = {
    "empty batches": empty_batch,
    "first input by keyword": by_keyword,
    "gradient checkpointing": lambda name, mode: exact_step(
        name, mode, prepare=lambda model: model.gradient_checkpointing_enable()
    ),
    "per-layer clipping": per_layer,
    "`wrap_model=False`": lambda name, mode: exact_step(name, mode, wrap_model=False),
}


def stock_step(name: str, mode: str) -> None:
    """A step of a stock model, all parameters trained; raises unless every one has a gradient a row."""
    model, batch, criterion = stock_model(name).train(), batch_for(name), nn.CrossEntropyLoss()
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=criterion,
        data_loader=DataLoader(list(range(ROWS)), batch_size=ROWS),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    logits = made[0](batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = logits.flatten(0, -2), batch["labels"].flatten()
    if mode == "ghost":
        loss = made[2](*targets, shape=logits.shape if logits.ndim == 3 else None)
    else:
        loss = criterion(*targets)
    loss.backward()
    made[1].step()


def observed(row: str, mode: str) -> str:
    """The cell of the table, as the installed Opacus fills it."""
    if row in FEATURES:
        return (
            "yes"
            if all(runs(lambda n=n: FEATURES[row](n, mode)) for n in ONE_OF.values())
            else "no"
        )
    family = row.removeprefix("stock ").split(",")[0]
    if row.startswith("stock "):
        return str(sum(runs(lambda n=n: stock_step(n, mode)) for n in STOCK[family]))
    return "exact" if runs(lambda: exact_step(ONE_OF[family], mode)) else "no"


def page_table() -> dict[str, tuple[str, ...]]:
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    block = re.findall(r"<!-- modes -->(.*?)<!-- /modes -->", text, flags=re.DOTALL)
    assert len(block) == 1
    lines = [line.strip("| ") for line in block[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert cells[0][-len(MODES) :] == list(MODES)
    return {row[0]: tuple(row[1:]) for row in cells[2:]}


def test_the_installed_release_is_one_of_the_table() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = SpecifierSet(re.findall(r'^    "opacus(.*)",$', pyproject, flags=re.MULTILINE)[0])
    assert INSTALLED in RUNS, "fill in what the tests below say"
    assert all(release in allowed for release in RUNS)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", RUNS[max(RUNS)])
def test_a_cell(row: str, mode: str) -> None:
    assert observed(row, mode) == RUNS[INSTALLED][row][MODES.index(mode)]


def test_the_table_counts_every_class_and_every_stock_model() -> None:
    table = RUNS[INSTALLED]
    for family, key in FAMILIES.items():
        count = sum(FAMILY[name] == key for name in NAMES)
        assert f"{family}, {count} classes" in table
    stock = [table[row] for row in table if row.startswith("stock ")]
    assert sum(map(len, STOCK.values())) * len(MODES) == 28
    assert sum(int(cell) for cells in stock for cell in cells) == 5


def test_the_page_has_this_table() -> None:
    assert page_table() == RUNS[max(RUNS)]
    assert list(page_table()) == list(RUNS[max(RUNS)])
