"""Stock checkpoints in folders, and what a model loaded from one is compared with."""

from typing import Any

import torch

import dpzoo
from dpzoo.registry import class_by_name, stock_class
from tests.support import (
    assert_bit_equal,
    assert_same_outputs,
    inputs_for,
    tied_groups,
)

ROUNDING = 1e-5
"""float32's, over two layers: checkpoints are written in float32 here."""


def assert_loaded(zoo: Any, stock: Any) -> None:
    """A stock model, converted to dpzoo, ready to use, as stock ``from_pretrained`` leaves one."""
    assert type(zoo) is getattr(dpzoo, type(stock).__name__)
    assert not any(module.training for module in zoo.modules())
    assert all(parameter.requires_grad for parameter in zoo.parameters())
    assert_bit_equal(zoo.state_dict(), stock.state_dict())
    assert tied_groups(zoo) == tied_groups(stock)
    inputs = inputs_for(type(stock).__name__, dtype=torch.float32)
    assert_same_outputs(zoo, stock, inputs, tolerance=ROUNDING)


def load_stock(name: str, folder: Any) -> Any:
    """What stock transformers makes of a folder, with nothing missing, left over or misfitting."""
    stock, report = stock_class(class_by_name(name)).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return stock
