"""Tied output heads: exact in every mode, and without a tensor of (batch, vocab, hidden)."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpzoo
from dpzoo.layers import LMHead
from tests.modes import ALL_MODES, Step, assert_step_is_exact
from tests.support import ROWS, TIED, VOCAB, batch_for, stock_model

WITH_BIAS = [name for name in TIED if not name.startswith("GPT2")]


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("mode", ["ghost", "bk"])
@pytest.mark.parametrize("name", TIED)
def test_nothing_of_batch_by_vocab_by_hidden_is_built(name: str, mode: str) -> None:
    """Here rows x vocab x hidden is larger than every activation, logit and Gram matrix."""
    batch = batch_for(name, seq=5)
    sizes = {}
    for run in (mode, "hooks"):
        model = dpzoo.convert(stock_model(name))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        step = Step(name, model, run)
        with LargestTensor() as largest:
            step.backward(batch)
        sizes[run] = largest.numel
    assert sizes[mode] < ROWS * VOCAB * 24 <= sizes["hooks"]


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", WITH_BIAS)
def test_a_frozen_table_with_a_trainable_head_bias(name: str, mode: str) -> None:
    def freeze(model: Any) -> None:
        model.get_input_embeddings().weight.requires_grad_(False)
        assert model.get_output_embeddings().bias.requires_grad

    assert_step_is_exact(name, mode, batch_for(name), stock_model(name), prepare=freeze)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_without_a_look_up(name: str, mode: str) -> None:
    """With inputs_embeds the head is the only use of the table, unless token types look it up."""
    batch = batch_for(name, embeds=True)
    assert_step_is_exact(name, mode, batch, stock_model(name))


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", TIED)
def test_resized_tied_heads(name: str, mode: str) -> None:
    """resize_token_embeddings keeps the parts' types, and so the exactness."""
    stock = stock_model(name)
    stock.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    zoo = dpzoo.convert(stock_model(name))
    zoo.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    zoo.load_state_dict(stock.state_dict())
    assert type(zoo.get_output_embeddings()) is LMHead
    batch = batch_for(name)
    key = "input_ids"
    batch[key][0, ..., 0] = VOCAB + 3
    assert_step_is_exact(name, mode, batch, dpzoo.to_transformers(zoo))
