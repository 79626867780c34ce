"""State dicts have the stock names and layouts, of models, submodules and heads."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import dpzoo
from dpzoo.layers.lm_head import LMHead
from tests.support import (
    FAMILY,
    NAMES,
    SPARE_BIAS,
    TIED,
    assert_bit_equal,
    assert_parts_keep_their_types,
    assert_same_outputs,
    head_name,
    inputs_for,
    module_types,
    snapshot,
    stock_model,
    tied_groups,
    tiny_config,
    transposed_names,
)

GPT2 = [name for name in NAMES if FAMILY[name] == "gpt2"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_are_interchangeable(name: str, tied: bool) -> None:
    """Trainer's resume and many scripts go this way; c_proj is square, so only values can tell."""
    stock = stock_model(name, tie_word_embeddings=tied)
    before = snapshot(stock)
    zoo = getattr(dpzoo, name)(tiny_config(name, tie_word_embeddings=tied)).double().eval()
    given = stock.state_dict()
    result = zoo.load_state_dict(given, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_bit_equal(given, before)
    assert_bit_equal(zoo.state_dict(), before)
    assert_parts_keep_their_types(zoo)
    assert_same_outputs(zoo, stock, inputs_for(name), tolerance=1e-10)

    other = stock_model(name, tie_word_embeddings=tied)
    assert any(not torch.equal(value, before[key]) for key, value in other.state_dict().items())
    other.load_state_dict(zoo.state_dict(), strict=True)
    assert_bit_equal(other.state_dict(), before)
    assert_same_outputs(other, stock, inputs_for(name), tolerance=0.0)


@pytest.mark.parametrize("name", GPT2)
def test_every_gpt2_projection_is_stored_transposed(name: str) -> None:
    """The four projections of a layer, value by value, and the parameters inside as nn.Linear."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    prefix = "" if name == "GPT2Model" else "transformer."
    state = zoo.state_dict()
    for layer in range(2):
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            key = f"{prefix}h.{layer}.{path}"
            wanted = stock.get_submodule(key).weight
            inside = zoo.get_submodule(key)
            assert type(inside) is nn.Linear
            assert torch.equal(state[f"{key}.weight"], wanted)
            assert torch.equal(inside.weight, wanted.t())
            assert inside.weight.is_contiguous()
    square = state[f"{prefix}h.0.attn.c_proj.weight"]
    assert square.shape[0] == square.shape[1]
    assert not torch.equal(square, square.t())
    assert len(transposed_names(zoo)) == 8


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_submodules_are_interchangeable(name: str) -> None:
    """Scripts save ``model.transformer`` or one block; the layout must not depend on where one asks."""
    stock, other = stock_model(name), stock_model(name)
    zoo = dpzoo.convert(stock_model(name))
    layers = {
        "bert": "encoder.layer",
        "roberta": "encoder.layer",
        "distilbert": "transformer.layer",
    }
    path = f"{layers.get(FAMILY[name], 'h')}.1"
    for pick in (lambda m: m.base_model, lambda m: m.base_model.get_submodule(path)):
        wanted = snapshot(pick(stock))
        pick(zoo).load_state_dict(wanted, strict=True)
        assert_bit_equal(pick(zoo).state_dict(), wanted)
        pick(other).load_state_dict(pick(zoo).state_dict(), strict=True)
        assert_bit_equal(pick(other).state_dict(), wanted)


@pytest.mark.parametrize("name", SPARE_BIAS)
def test_state_dicts_of_heads_are_interchangeable(name: str) -> None:
    """The head's second bias has its own code path, whatever module the state dict is asked of."""
    for tied in (True, False):
        stock = stock_model(name, tie_word_embeddings=tied)
        zoo = dpzoo.convert(stock_model(name, tie_word_embeddings=tied))
        path = "cls" if FAMILY[name] == "bert" else "lm_head"
        wanted = snapshot(stock.get_submodule(path))
        zoo.get_submodule(path).load_state_dict(wanted, strict=True)
        assert_bit_equal(zoo.get_submodule(path).state_dict(), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_with_a_prefix_keeps_the_stock_layout(name: str) -> None:
    """Wrappers (DataParallel, Lightning) put a prefix before every key."""
    stock = stock_model(name)
    wanted = {f"module.{key}": value for key, value in snapshot(stock).items()}
    wrapped = nn.Sequential(OrderedDict(module=dpzoo.convert(stock)))
    assert_bit_equal(wrapped.state_dict(), wanted)
    fresh = nn.Sequential(OrderedDict(module=dpzoo.convert(stock_model(name))))
    fresh.load_state_dict(wanted, strict=True)
    assert_bit_equal(fresh.state_dict(), wanted)
    assert_bit_equal(stock_state := fresh.module.state_dict(prefix="module."), wanted)
    assert stock_state.keys() == wanted.keys()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForCausalLM", "GPT2LMHeadModel"])
def test_strict_errors_are_those_of_stock(name: str) -> None:
    """A key that is silently ignored leaves random weights in the model."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock_model(name))
    full = snapshot(stock)
    for absent in full:
        reports = []
        state = {key: value for key, value in full.items() if key != absent}
        for model in (stock, zoo):
            model.load_state_dict(full)
            found = model.load_state_dict(state, strict=False)
            reports.append((sorted(found.missing_keys), sorted(found.unexpected_keys)))
            with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
                model.load_state_dict(state)
        assert reports[0] == reports[1] == ([absent], [])
    for extra in ("nonsense", f"{next(iter(full))}.more", "a.b.c", head_name(name) + "s"):
        reports = []
        for model in (stock, zoo):
            found = model.load_state_dict({**full, extra: torch.ones(2)}, strict=False)
            reports.append((sorted(found.missing_keys), sorted(found.unexpected_keys)))
            with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
                model.load_state_dict({**full, extra: torch.ones(2)})
        assert reports[0] == reports[1] == ([], [extra])
    for key, value in full.items():
        wrong = {**full, key: torch.ones(*value.shape[:-1], value.shape[-1] + 1)}
        for model in (stock, zoo):
            with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
                model.load_state_dict(wrong)


def test_a_projection_in_the_wrong_layout_is_refused() -> None:
    """Weights saved as nn.Linear has them do not fit, where they are not square."""
    zoo = dpzoo.convert(stock_model("GPT2LMHeadModel"))
    key = "transformer.h.0.attn.c_attn.weight"
    state = zoo.state_dict()
    state[key] = state[key].t()
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        zoo.load_state_dict(state)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_assigned_state_dicts(name: str, tied: bool) -> None:
    """assign=True makes new parameters: what was tied must be tied again, and typed so."""
    wanted = snapshot(stock_model(name, tie_word_embeddings=tied))
    zoo = dpzoo.convert(stock_model(name, torch.float32, tie_word_embeddings=tied))
    groups, types = tied_groups(zoo), module_types(zoo)
    zoo.load_state_dict(wanted, strict=True, assign=True)
    assert zoo.dtype == torch.float64
    assert_bit_equal(zoo.state_dict(), wanted)
    assert tied_groups(zoo) == groups
    assert module_types(zoo) == types
    assert_bit_equal(dpzoo.to_transformers(zoo).state_dict(), wanted)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_parameter_may_come_under_one_name(name: str, assign: bool) -> None:
    """Files hold a tied tensor once, under the first of its names; Trainer loads them so."""
    wanted = snapshot(stock_model(name))
    once = {key: v for key, v in wanted.items() if key != head_name(name)}
    once = {key: v for key, v in once.items() if not key.endswith("decoder.bias")}
    zoo = dpzoo.convert(stock_model(name))
    report = zoo.load_state_dict(once, strict=False, assign=assign)
    assert set(report.missing_keys) == wanted.keys() - once.keys()
    assert_bit_equal(zoo.state_dict(), wanted)
    assert_parts_keep_their_types(zoo)
    assert type(zoo.get_output_embeddings()) is LMHead


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel"])
def test_parameters_as_state_dict_entries(name: str, tied: bool) -> None:
    """keep_vars gives parameters, assign puts them in: no container may come to hold one."""
    stock = stock_model(name, tie_word_embeddings=tied)
    zoo = dpzoo.convert(stock_model(name, tie_word_embeddings=tied))
    parameters = [key for key, _ in zoo.named_parameters()]
    zoo.load_state_dict(stock.state_dict(keep_vars=True), assign=True)
    assert [key for key, _ in zoo.named_parameters()] == parameters
    assert all(p.is_leaf and p.requires_grad for p in zoo.parameters())
    assert_bit_equal(zoo.state_dict(), snapshot(stock))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel"])
def test_keep_vars_gives_tensors_that_autograd_knows(name: str) -> None:
    """A detached entry would cut the graph of a caller who differentiates through the state dict."""
    for tied in (True, False):
        zoo = dpzoo.convert(stock_model(name, tie_word_embeddings=tied))
        state = zoo.state_dict(keep_vars=True)
        parameters = dict(zoo.named_parameters(remove_duplicate=False))
        for key, value in state.items():
            if key in parameters and key not in transposed_names(zoo):
                assert value is parameters[key], key
            elif key in parameters:
                value.square().sum().backward()
                assert torch.equal(parameters[key].grad, 2 * parameters[key]), key
        assert not any(value.requires_grad for value in zoo.state_dict().values())
