"""A tied head in ghost_fsdp: what the head knows of its table, seen without sharding anything.

The sums of sharded models are in `tests.distributed.test_two_processes`.
"""

import copy
import pickle

import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClippingFSDP
from torch import nn

import dpzoo
from dpzoo.layers import LMHead
from tests.modes import oracle_norms
from tests.support import TIED, batch_for, batch_losses, oracle_gradients, stock_model


@pytest.mark.parametrize("name", TIED)
def test_the_norm_has_both_uses_of_the_weight(name: str) -> None:
    """Twice: nothing of the first batch is left for the second."""
    stock, batch = stock_model(name), batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    model = dpzoo.convert(stock).train()
    names = [key for key, _ in model.named_parameters()]
    private = GradSampleModuleFastGradientClippingFSDP(model, loss_reduction="sum")
    for _ in range(2):
        batch_losses(name, private, batch).sum().backward()
        norms = private.get_norm_sample()
        torch.testing.assert_close(norms, oracle_norms(wanted, names), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TIED)
def test_the_table_is_a_reference_and_no_part_of_the_head(name: str) -> None:
    model = dpzoo.convert(stock_model(name))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is LMHead
    assert head.table is table
    assert list(head.children()) == []
    assert table not in list(head.modules())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.get_output_embeddings().table is copied.get_input_embeddings()
    resized = model.resize_token_embeddings(70, mean_resizing=False)
    assert model.get_output_embeddings().table is resized
    untied = dpzoo.convert(stock_model(name, tie_word_embeddings=False))
    assert not hasattr(untied.get_output_embeddings(), "table")


def test_the_head_follows_a_change_of_tables() -> None:
    model = dpzoo.convert(stock_model("GPT2LMHeadModel"))
    tied, other = model.get_input_embeddings(), copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(other)
    assert type(model.lm_head) is nn.Linear
    other.weight = tied.weight
    model.set_input_embeddings(other)
    assert type(model.lm_head) is LMHead
    assert model.lm_head.table is other


def test_a_head_that_has_lost_its_table_is_refused() -> None:
    name = "GPT2LMHeadModel"
    model = dpzoo.convert(stock_model(name)).train()
    model.transformer.wte.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    private = GradSampleModuleFastGradientClippingFSDP(model, loss_reduction="sum")
    loss = batch_losses(name, private, batch_for(name)).sum()
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"another weight .*fully_shard\(\["):
        loss.backward()
