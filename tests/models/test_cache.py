"""The cache has two names, by transformers' version: both are taken, the installed one is shown."""

import inspect
import logging
import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import dpzoo
from dpzoo.models.cache import CACHE, CACHE_NAMES
from dpzoo.registry import class_by_name, stock_class
from tests.support import NAMES, PAD, inputs_for, stock_model

CACHED = [
    name
    for name in NAMES
    if {*CACHE_NAMES} & {*inspect.signature(class_by_name(name).forward).parameters}
]


@pytest.fixture
def said_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers logs once a process, every time."""
    said: list[str] = []
    # transformers gives the standard library's class the method.
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, text, *rest: said.append(text))
    return said


def test_the_name_is_that_of_the_installed_version() -> None:
    new = Version(transformers.__version__) >= Version("5.24")
    assert ("cache" if new else "past_key_values") == CACHE


@pytest.mark.parametrize("name", CACHED)
def test_the_signature_shows_the_installed_name(name: str) -> None:
    cls = class_by_name(name)
    names = list(inspect.signature(cls.forward).parameters)
    wanted = list(inspect.signature(stock_class(cls).forward).parameters)
    assert names.index(CACHE) == wanted.index(CACHE)
    assert [each for each in CACHE_NAMES if each in names] == [CACHE]


@pytest.mark.parametrize("name", [n for n in CACHED if n not in ("BertModel", "RobertaModel")])
def test_both_names_mean_the_same(name: str, said_once: list[str]) -> None:
    """Nothing that the zoo does with a cache warns of a name."""
    model = dpzoo.convert(stock_model(name))
    inputs = inputs_for(name, padding="none")
    inputs.pop("mc_token_ids", None)
    first = {key: value[..., :5] for key, value in inputs.items()}
    second = {key: value[..., 5:] for key, value in inputs.items()}
    for part in (first, second):
        part.pop("attention_mask", None)
    outputs = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for each in CACHE_NAMES:
            start = model(**first, use_cache=True)
            outputs.append(model(**second, use_cache=True, **{each: start.get(CACHE)}))
    assert not said_once
    # A body's output, a classifier's without a cache, and a language model's alike.
    assert torch.equal(outputs[0][0], outputs[1][0])
    cache: Any = start.get(CACHE)
    if cache is not None:
        with pytest.raises(dpzoo.InputError, match="two names of one argument"):
            model(**second, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertLMHeadModel", "RobertaForCausalLM"])
def test_generating_warns_of_no_name(name: str, said_once: list[str]) -> None:
    model = dpzoo.convert(stock_model(name))
    ids = torch.randint(4, 40, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": PAD}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = model.generate(ids, **options, do_sample=False)
        slow = model.generate(ids, **options, do_sample=False, use_cache=False)
    assert torch.equal(cached, slow)
    assert not [message for message in said_once if "deprecated" in message]
