"""The user's model, and every source of randomness, are bit-equal after an audit."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dpzoo
from dpzoo.auditing import audit
from tests.auditing.planted_models import ids
from tests.support import batch_for, stock_model


class Eventful(nn.Module):
    """A buffer, a hook, a frozen part, gradients, attributes on parameters, dropout, two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.drop = nn.Embedding(11, 8, padding_idx=0), nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.dropout_rate = 0.3
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.drop(self.tokens(x)).mean(1))
        return self.head(nn.functional.dropout(self.norm(hidden), self.dropout_rate, self.training))


def state(model: nn.Module) -> dict[str, Any]:
    """All that an audit might touch."""
    return {
        "state": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(p)) for p in model.parameters()],
        "module attributes": [sorted(vars(m)) for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
        "dropout": [getattr(m, "p", None) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
    }


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, where)
    else:
        assert a == b, where


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_as_before(dtype: torch.dtype, training: bool) -> None:
    model = Eventful().to(dtype).train(training)
    batch = (ids(4, 6),)
    model.head.register_forward_hook(lambda *_: None)
    model(batch[0]).sum().backward()
    model.head.weight.mark = "mine"
    before, given = state(model), copy.deepcopy(batch)
    report = audit(model, batch)
    assert_same(before, state(model))
    assert_same(given, batch)
    assert "isolation" in {f.check for f in report.findings}  # it has a batch norm
    assert model.dropout_rate == 0.3


def test_a_model_of_the_zoo_is_as_before() -> None:
    name = "GPT2LMHeadModel"
    model = dpzoo.convert(stock_model(name, dtype=torch.float32))
    batch = batch_for(name)
    before = state(model)
    assert audit(model, batch).ok
    assert_same(before, state(model))


def test_dropout_is_off_while_it_is_audited() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.drop, self.two = nn.Linear(7, 9), nn.Dropout(0.5), nn.Linear(9, 5)
            self.drop_path = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(
                nn.functional.dropout(self.drop(self.one(x)), self.drop_path, self.training)
            )

    assert audit(Dropping(), (torch.randn(4, 7),)).ok


def test_an_audit_says_the_same_thing_twice() -> None:
    model, batch = Eventful(), (ids(4, 6),)
    one, two = (audit(model, batch).to_dict() for _ in range(2))
    for data in (one, two):
        data["seconds"] = 0
        for check in data["checks"]:
            check["seconds"] = 0
    assert one == two
