"""docs/adding-a-family.md: what it shows, runs; the registry takes a family, or says what is wrong."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

import dpzoo
from dpzoo import registry
from dpzoo.models import bert
from dpzoo.models.base import PerSampleModel
from tests.docs.family import ROOT, TASKS, load, unchanged_registry

PAGE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "support"))
    monkeypatch.delitem(sys.modules, "albert", raising=False)
    assert len(blocks("python")) == 2
    names: dict[str, object] = {}
    with unchanged_registry():
        for block in blocks("python"):
            exec(compile(block, "adding-a-family.md", "exec"), names)
        assert dpzoo.list_models()["albert"] == TASKS
    monkeypatch.delitem(sys.modules, "albert")
    stock, model = names["stock"], names["model"]._module  # type: ignore[attr-defined]
    assert type(stock) is transformers.AlbertForSequenceClassification
    for key, value in model.state_dict().items():
        assert torch.equal(stock.state_dict()[key], value), key
    assert "albert" not in dpzoo.list_models()


def test_the_lines_in_the_package_are_as_the_page_shows_them() -> None:
    source = (ROOT / "dpzoo" / "registry.py").read_text(encoding="utf-8").splitlines()
    lines = [line for block in blocks("diff") for line in block.splitlines()]
    assert sum(line.startswith("+") for line in lines) == 1
    for line in lines:
        if not line.startswith("+"):
            assert line[1:] in source, line


def test_the_files_and_tests_that_the_page_names_exist() -> None:
    paths = set(re.findall(r"\b(?:dpzoo|tests|configs|docs|examples)/[\w/]+(?:\.\w+)?", PAGE))
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing == {"dpzoo/models/albert.py"}
    tests = (ROOT / "tests" / "docs" / "test_albert.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests


def test_a_registered_family_is_one_among_the_others() -> None:
    albert = load()
    with unchanged_registry():
        registry.register_family(albert, TASKS)
        assert dpzoo.list_models()["albert"] == TASKS
        assert list(registry.FAMILIES) == ["bert", "roberta", "distilbert", "gpt2", "albert"]
        for task, name in TASKS.items():
            cls = getattr(albert, name)
            assert registry.model_class("albert", task) is registry.class_by_name(name) is cls
            assert registry.stock_class(cls) is getattr(transformers, name)
        config = transformers.AlbertConfig(hidden_size=12, num_attention_heads=3)
        with torch.device("meta"):
            model = dpzoo.from_config(config, task="base")
        assert type(model) is albert.AlbertModel
        with pytest.raises(dpzoo.InputError, match=r"\['albert'\].*none of those there are: bert,"):
            registry.register_family(albert, TASKS)
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=r"AlbertConfig is of the family 'albert'"
    ):
        dpzoo.from_config(config, task="base")


class AlbertForQuestionAnswering(PerSampleModel):
    """A class of ALBERT that says nothing of its config."""


AlbertForQuestionAnswering.config_class = None


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, r"got tasks \[\], wanted some of: base, pre-training, "),
        ({"fill-mask": "AlbertForMaskedLM"}, r"got tasks \['fill-mask'\], wanted some of: base, "),
        ({"base": "AlbertBody"}, r"got 'AlbertBody' for 'base', and albert has None of that name"),
        (
            {"base": "AlbertConfig"},
            r"'AlbertConfig' for 'base'.*Wanted a subclass of dpzoo\.models",
        ),
        (
            {"base": "AlbertPreTrained"},
            r"'AlbertPreTrained' \(AlbertModel\), wanted the name of the",
        ),
        (
            {"base": "AlbertBackbone"},
            r"'AlbertBackbone' \(AlbertBackbone\), wanted the name of the",
        ),
        (
            {"base": "AlbertModel", "masked-lm": "BertForMaskedLM"},
            r"of the families \['albert', 'bert'\]",
        ),
        (
            {"masked-lm": "BertForMaskedLM"},
            r"of the families \['bert'\].*, and none of those there",
        ),
        ({"question-answering": "AlbertForQuestionAnswering"}, r"of the families \[''\]"),
    ],
    ids=str,
)
def test_what_cannot_be_registered_is_named_and_changes_nothing(
    tasks: dict[str, str], message: str
) -> None:
    module: ModuleType = load()
    module.AlbertPreTrained = module.AlbertModel
    module.AlbertBackbone = type("AlbertBackbone", (module.AlbertModel,), {})
    module.BertForMaskedLM = bert.BertForMaskedLM
    module.AlbertForQuestionAnswering = AlbertForQuestionAnswering
    before = dpzoo.list_models(), dict(registry.TASKS), dict(registry.CLASSES)
    with unchanged_registry():
        with pytest.raises(dpzoo.InputError, match=message):
            registry.register_family(module, tasks)
        assert (dpzoo.list_models(), dict(registry.TASKS), dict(registry.CLASSES)) == before
