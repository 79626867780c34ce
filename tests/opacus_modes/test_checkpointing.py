"""Activation checkpointing: exact where it can be, refused by name where it cannot."""

from typing import Any

import pytest

import dpzoo
from tests.modes import Step, assert_step_is_exact
from tests.support import NAMES, batch_for, stock_model


def enable(model: Any) -> None:
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing


def enable_as_bk_takes_it(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing


def enable_with_frozen_embeddings(model: Any) -> None:
    enable(model)
    for key, parameter in model.named_parameters():
        if "embeddings" in key or "wte" in key or "wpe" in key:
            parameter.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("mode", "prepare"),
    [
        ("hooks", enable),
        ("ghost", enable_with_frozen_embeddings),
        ("bk", enable_as_bk_takes_it),
        pytest.param("hooks", enable_with_frozen_embeddings, marks=pytest.mark.slow),
        pytest.param("ghost", enable, marks=pytest.mark.slow),
        pytest.param("functorch", enable, marks=pytest.mark.slow),
        pytest.param("functorch", enable_with_frozen_embeddings, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_are_exact(name: str, mode: str, prepare: Any) -> None:
    assert_step_is_exact(name, mode, batch_for(name), stock_model(name), prepare=prepare)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_non_reentrant_checkpointing_is_refused_under_opacus(mode: str) -> None:
    name = "BertForSequenceClassification"
    model = dpzoo.convert(stock_model(name))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(**batch_for(name)).loss.backward()  # without Opacus it is as good as any
    step = Step(name, model, mode)
    with pytest.raises(
        dpzoo.UnsupportedConfigError,
        match="BertLayer is checkpointed with "
        "use_reentrant=False, which loses per-sample gradients",
    ):
        step.backward(batch_for(name))


def test_expanded_weights_refuse_checkpointing() -> None:
    name = "GPT2ForSequenceClassification"
    model = dpzoo.convert(stock_model(name))
    model.gradient_checkpointing_enable()
    step = Step(name, model, "ew")
    with pytest.raises(
        dpzoo.UnsupportedConfigError, match=r"GPT2Block is checkpointed.*'ew' cannot"
    ):
        step.backward(batch_for(name))
