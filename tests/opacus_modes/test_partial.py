"""Any part of a model frozen before it is wrapped: exact in every mode."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.modes import ALL_MODES, assert_step_is_exact
from tests.support import NAMES, TASK, batch_for, stock_model

LAST = ("layer.1.", "h.1.")


def _is_head(model: Any, key: str) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.")


SUBSETS: dict[str, Callable[[Any, str], bool]] = {
    "bias only": lambda model, key: key.endswith("bias"),
    "last layer and head": lambda model, key: (
        any(part in key for part in LAST) or "pooler" in key or _is_head(model, key)
    ),
    "embeddings only": lambda model, key: "embeddings" in key or "wte" in key or "wpe" in key,
    "head only": _is_head,
    "all but embeddings": lambda model, key: (
        not ("embeddings" in key or "wte" in key or "wpe" in key)
    ),
}


DAILY = [
    ("bias only", "ghost"),
    ("bias only", "ew"),
    ("head only", "hooks"),
    ("head only", "ghost"),
    ("bias only", "bk"),
    ("head only", "bk"),
]


@pytest.mark.parametrize(
    ("subset", "mode"),
    [
        pytest.param(subset, mode, marks=() if (subset, mode) in DAILY else pytest.mark.slow)
        for subset in SUBSETS
        for mode in ALL_MODES
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_subset(name: str, subset: str, mode: str) -> None:
    if subset == "head only" and TASK[name] == "base":
        subset = "last layer and head"  # a base model has no head of its own

    def freeze(model: Any) -> None:
        model.requires_grad_(False)
        # Under each of its names: GPT-2's head is the token table.
        for key, parameter in model.named_parameters(remove_duplicate=False):
            if SUBSETS[subset](model, key):
                parameter.requires_grad_(True)
        assert any(p.requires_grad for p in model.parameters())

    assert_step_is_exact(name, mode, batch_for(name), stock_model(name), prepare=freeze)
