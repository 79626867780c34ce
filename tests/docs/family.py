"""ALBERT of examples/support/albert.py as a fifth family, for as long as a test module runs."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from dpzoo import registry
from tests import support

ROOT = Path(__file__).resolve().parents[2]

TASKS = {
    "base": "AlbertModel",
    "masked-lm": "AlbertForMaskedLM",
    "sequence-classification": "AlbertForSequenceClassification",
}
NAMES = list(TASKS.values())

SIZES: dict[str, Any] = {
    "vocab_size": support.VOCAB,
    "embedding_size": 14,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 23,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu_new",
    "classifier_dropout_prob": 0.0,
}


def load() -> ModuleType:
    """The file, as ``import albert`` gives it where its folder is on the path."""
    spec = importlib.util.spec_from_file_location(
        "albert", ROOT / "examples" / "support" / "albert.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def unchanged_registry() -> Iterator[None]:
    """Whatever is registered inside is gone afterwards."""
    tables: tuple[dict[Any, Any], ...] = (
        registry._FAMILIES,
        registry._TASKS,
        registry._CLASSES,
        registry._BY_NAME,
    )
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)


@contextmanager
def registered() -> Iterator[ModuleType]:
    """The family in the registry, and in the tables by which `tests.support` builds models."""
    module = load()
    with unchanged_registry(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "albert", module)
        registry.register_family(module, TASKS)
        patch.setitem(support.CONFIG_CLASSES, "albert", transformers.AlbertConfig)
        patch.setitem(support._SIZES, "albert", SIZES)
        for task, name in TASKS.items():
            patch.setitem(support.TASK, name, task)
            patch.setitem(support.FAMILY, name, "albert")
        yield module
