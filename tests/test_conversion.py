"""Stock model to dpzoo model and back: values, storage, structure, state dicts, and what is refused."""

import copy
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from opacus import GradSampleModule
from torch import nn

import dpzoo
from dpzoo.layers.embeddings import PositionEmbedding, TokenEmbedding
from dpzoo.layers.lm_head import LMHead
from dpzoo.registry import class_by_name, stock_class
from tests.support import (
    FAMILY,
    NAMES,
    ROUNDING,
    TASK,
    TIED,
    assert_bit_equal,
    assert_same_outputs,
    in_stock_layout,
    inputs_for,
    randomize,
    snapshot,
    stock_model,
    tied_groups,
    tiny_config,
    transposed_names,
)

GPT2 = [name for name in NAMES if FAMILY[name] == "gpt2"]
SPARE_BIAS = [name for name in TIED if FAMILY[name] in ("bert", "roberta")]
"""Classes whose stock class has a second bias beside the decoder's."""


def trainable(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}


def module_types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def assert_parts_keep_their_types(zoo: Any) -> None:
    """Opacus finds a sampler by the exact type of a module."""
    assert type(zoo.get_input_embeddings()) is TokenEmbedding
    positions = [m for m in zoo.modules() if type(m) is PositionEmbedding]
    assert len(positions) == 1
    head = zoo.get_output_embeddings()
    if head is not None:
        tied = head.weight is zoo.get_input_embeddings().weight
        assert type(head) is (LMHead if tied else nn.Linear)


def embedding_name(name: str) -> str:
    return {
        "bert": "bert.embeddings.word_embeddings.weight",
        "roberta": "roberta.embeddings.word_embeddings.weight",
        "distilbert": "distilbert.embeddings.word_embeddings.weight",
        "gpt2": "transformer.wte.weight",
    }[FAMILY[name]]


def head_name(name: str) -> str:
    return {
        "bert": "cls.predictions.decoder.weight",
        "roberta": "lm_head.decoder.weight",
        "distilbert": "vocab_projector.weight",
        "gpt2": "lm_head.weight",
    }[FAMILY[name]]


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name: str, dtype: torch.dtype) -> None:
    """A parameter swapped, transposed, dropped or cast on the way would change a value or a key."""
    stock = stock_model(name, dtype)
    before = snapshot(stock)
    zoo = dpzoo.convert(stock)
    assert type(zoo) is getattr(dpzoo, name)
    assert zoo.dtype == dtype
    assert_bit_equal(zoo.state_dict(), before)
    back = dpzoo.to_transformers(zoo)
    assert type(back) is type(stock)
    assert_bit_equal(back.state_dict(), before)
    assert list(back.state_dict()) == list(before)
    assert_bit_equal(stock.state_dict(), before)
    names = [n for n, _ in stock.named_parameters(remove_duplicate=False)]
    assert [n for n, _ in back.named_parameters(remove_duplicate=False)] == names
    inputs = inputs_for(name, dtype=dtype)
    assert_same_outputs(back, stock, inputs, tolerance=0.0)
    assert_same_outputs(zoo, stock, inputs, tolerance=ROUNDING[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_a_new_dpzoo_model_goes_to_transformers_and_back(name: str) -> None:
    """The way back must not need anything that only `convert` leaves behind."""
    zoo = getattr(dpzoo, name)(tiny_config(name)).double().eval()
    randomize(zoo)
    before = snapshot(zoo)
    stock = dpzoo.to_transformers(zoo)
    assert_bit_equal(stock.state_dict(), before)
    assert_bit_equal(dpzoo.convert(stock).state_dict(), before)
    assert_same_outputs(zoo, stock, inputs_for(name), tolerance=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_in_the_stock_order(name: str) -> None:
    """Optimizer states and ``zip(a.parameters(), b.parameters())`` go by order, not by name."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    layouts = [(n, in_stock_layout(zoo, n, p)) for n, p in zoo.named_parameters()]
    for (ours, mine), (theirs, yours) in zip(layouts, stock.named_parameters(), strict=True):
        assert torch.equal(mine, yours), (ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_storage_is_shared_where_layouts_agree(name: str) -> None:
    """A copy would double the peak of loading; GPT-2's projections alone need one."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    back = dpzoo.to_transformers(zoo)
    there, here = zoo.state_dict(), stock.state_dict()
    again = back.state_dict()
    copied = transposed_names(zoo)
    assert bool(copied) == (FAMILY[name] == "gpt2")
    for key, value in here.items():
        shared = key not in copied
        assert (there[key].data_ptr() == value.data_ptr()) is shared, key
        assert (again[key].data_ptr() == there[key].data_ptr()) is shared, key


@pytest.mark.parametrize("name", NAMES)
def test_requires_grad_is_carried(name: str) -> None:
    """A frozen parameter that thaws on the way would be trained, and would spend privacy."""
    stock = stock_model(name)
    for i, parameter in enumerate(stock.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    frozen = trainable(stock)
    zoo = dpzoo.convert(stock)
    for key, value in trainable(zoo).items():
        assert value == frozen[key], key
    assert trainable(dpzoo.to_transformers(zoo)) == frozen


@pytest.mark.parametrize("name", SPARE_BIAS)
def test_a_frozen_untied_head_stays_frozen(name: str) -> None:
    """The dead bias of an untied head is no parameter inside; frozen, it must not come back live."""
    stock = stock_model(name, tie_word_embeddings=False)
    stock.requires_grad_(False)
    zoo = dpzoo.convert(stock)
    assert not any(trainable(zoo).values())
    assert not any(trainable(dpzoo.to_transformers(zoo)).values())
    zoo.requires_grad_(True)
    assert all(trainable(dpzoo.to_transformers(zoo)).values())


@pytest.mark.parametrize("name", NAMES)
def test_training_flags_are_carried_module_by_module(name: str) -> None:
    """A body put in eval mode by hand (no dropout) must not wake up in the converted model."""
    stock = stock_model(name).train()
    body = (
        stock.base_model
        if stock.base_model is not stock
        else stock.get_submodule(
            {"bert": "encoder", "roberta": "encoder", "distilbert": "transformer", "gpt2": "h"}[
                FAMILY[name]
            ]
        )
    )
    body.eval()
    prefix = next(key for key, module in stock.named_modules() if module is body)
    zoo = dpzoo.convert(stock)
    back = dpzoo.to_transformers(zoo)
    for model in (zoo, back):
        for key, module in model.named_modules():
            inside = f"{key}.".startswith(f"{prefix}.")
            assert module.training is not inside, key


@pytest.mark.parametrize("name", NAMES)
def test_settings_changed_on_modules_are_carried(name: str) -> None:
    """Dropout set to 0, or a table's padding row given up, on the instance: the config does not know."""
    stock = stock_model(name)
    rates = {}
    for key, module in stock.named_modules():
        if isinstance(module, nn.Dropout):
            rates[key] = module.p = (1 + len(rates)) / 100
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2
    stock.get_input_embeddings().padding_idx = 5
    zoo = dpzoo.convert(stock)
    for model in (zoo, dpzoo.to_transformers(zoo)):
        modules = dict(model.named_modules())
        assert {key: modules[key].p for key in rates} == rates
        assert {m.eps for m in modules.values() if isinstance(m, nn.LayerNorm)} == {1e-2}
        assert model.get_input_embeddings().padding_idx == 5


@pytest.mark.parametrize("name", NAMES)
def test_config_names_and_generation_config_are_carried_as_copies(name: str) -> None:
    """A shared config would let a change of the one model reach into the other."""
    stock = (
        stock_model(name, id2label={0: "no", 1: "yes"})
        if TASK[name]
        not in (
            "sequence-classification",
            "token-classification",
        )
        else stock_model(name)
    )
    stock.name_or_path = "somebody/some-model"
    stock.set_attn_implementation("eager")
    if stock.can_generate():
        stock.generation_config.max_new_tokens = 37
    zoo = dpzoo.convert(stock)
    back = dpzoo.to_transformers(zoo)
    for model in (zoo, back):
        assert model.name_or_path == "somebody/some-model"
        assert type(model.config) is type(stock.config)
        assert model.config is not stock.config
        assert model.config.to_dict() == stock.config.to_dict()
        assert model.config._attn_implementation == "eager"
        assert model.can_generate() == stock.can_generate()
        if stock.can_generate():
            assert model.generation_config is not stock.generation_config
            assert model.generation_config.max_new_tokens == 37
    zoo.config.vocab_size = 7
    assert stock.config.vocab_size == back.config.vocab_size == 61


def test_a_bare_encoder_without_pooler_stays_without_one() -> None:
    """The config does not tell whether there is a pooler; an invented one would hold random values."""
    for name in ("BertModel", "RobertaModel"):
        stock = stock_class(class_by_name(name))(tiny_config(name), add_pooling_layer=False)
        zoo = dpzoo.convert(stock)
        assert zoo.pooler is None
        back = dpzoo.to_transformers(zoo)
        assert back.pooler is None
        assert_bit_equal(back.state_dict(), snapshot(stock))


def test_buffers_of_the_way_back_are_stock_values() -> None:
    """Stock embeddings keep position and token type ids in buffers; conversion builds without data."""
    for name in ("BertModel", "RobertaModel", "DistilBertModel", "GPT2Model"):
        stock = stock_model(name)
        back = dpzoo.to_transformers(dpzoo.convert(stock))
        buffers = dict(stock.named_buffers())
        assert dict(back.named_buffers()).keys() == buffers.keys()
        for key, value in back.named_buffers():
            assert torch.equal(value, buffers[key]), key


def test_the_random_state_is_untouched() -> None:
    """Conversion that drew numbers would make a seeded run depend on where the model came from."""
    stock = stock_model("BertForMaskedLM")
    state = torch.get_rng_state()
    dpzoo.to_transformers(dpzoo.convert(stock))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_data_converts() -> None:
    """On the meta device there is nothing to copy; the names and shapes must still correspond."""
    with torch.device("meta"):
        stock = transformers.GPT2LMHeadModel(tiny_config("GPT2LMHeadModel"))
    zoo = dpzoo.convert(stock)
    assert {p.device.type for p in zoo.parameters()} == {"meta"}
    assert type(zoo.lm_head) is LMHead


@pytest.mark.parametrize("name", [*TIED, "BertForSequenceClassification"])
def test_a_resized_stock_model_converts(name: str) -> None:
    """resize_token_embeddings before conversion: the new size is in config and tables alike."""
    stock = stock_model(name)
    stock.resize_token_embeddings(67)
    before = snapshot(stock)
    zoo = dpzoo.convert(stock)
    assert zoo.config.vocab_size == 67
    assert_bit_equal(zoo.state_dict(), before)
    assert_same_outputs(zoo, stock, inputs_for(name), tolerance=1e-10)
    zoo.resize_token_embeddings(71)
    assert_parts_keep_their_types(zoo)
    again = dpzoo.to_transformers(zoo)
    assert again.get_input_embeddings().weight.shape[0] == 71
    assert_same_outputs(zoo, again, inputs_for(name), tolerance=1e-10)


# --- what is tied -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", TIED)
def test_tied_structure_is_carried(name: str, tied: bool) -> None:
    """Two parameters where stock has one would drift apart in training; one for two would be shared."""
    stock = stock_model(name, tie_word_embeddings=tied)
    groups = tied_groups(stock)
    assert any({embedding_name(name), head_name(name)} <= group for group in groups) is tied
    zoo = dpzoo.convert(stock)
    assert tied_groups(zoo) == groups
    assert_parts_keep_their_types(zoo)
    assert type(zoo.get_output_embeddings()) is (LMHead if tied else nn.Linear)
    back = dpzoo.to_transformers(zoo)
    assert tied_groups(back) == groups
    assert_bit_equal(back.state_dict(), snapshot(stock))
    assert back.all_tied_weights_keys == stock.all_tied_weights_keys


@pytest.mark.parametrize("name", TIED)
def test_untied_although_the_config_says_tied(name: str, tmp_path: Path) -> None:
    """A checkpoint whose head differs from its embedding is loaded untied; so is it converted."""
    untied = stock_model(name, torch.float32, tie_word_embeddings=False)
    untied.config.tie_word_embeddings = True
    untied.save_pretrained(tmp_path)
    stock = type(untied).from_pretrained(tmp_path)
    assert stock.config.tie_word_embeddings
    head = stock.get_output_embeddings().weight
    assert head is not stock.get_input_embeddings().weight
    before, groups = snapshot(stock), tied_groups(stock)
    zoo = dpzoo.convert(stock)
    assert type(zoo.get_output_embeddings()) is nn.Linear
    assert tied_groups(zoo) == groups
    assert_bit_equal(zoo.state_dict(), before)
    assert_same_outputs(zoo, stock, inputs_for(name, dtype=torch.float32), tolerance=1e-5)
    back = dpzoo.to_transformers(zoo)
    for model in (zoo, back):
        assert model.all_tied_weights_keys == stock.all_tied_weights_keys
    assert tied_groups(back) == groups
    assert_bit_equal(back.state_dict(), before)
    # Asked to tie after all, both models do what their config says.
    stock.tie_weights()
    zoo.tie_weights()
    assert type(zoo.get_output_embeddings()) is LMHead
    assert tied_groups(zoo) == tied_groups(stock)
    assert_bit_equal(zoo.state_dict(), snapshot(stock))


@pytest.mark.parametrize("name", TIED)
def test_tied_although_the_config_says_untied(name: str) -> None:
    """Tied by hand: the head must have the type whose sampler counts both uses of the weight."""
    stock = stock_model(name, tie_word_embeddings=False)
    stock.get_output_embeddings().weight = stock.get_input_embeddings().weight
    groups = tied_groups(stock)
    zoo = dpzoo.convert(stock)
    assert type(zoo.get_output_embeddings()) is LMHead
    assert tied_groups(zoo) == groups
    assert tied_groups(dpzoo.to_transformers(zoo)) == groups


# --- state dicts --------------------------------------------------------------------------------


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


# --- copies -------------------------------------------------------------------------------------


def _through_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_torch_save,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_whole_models(name: str, way: str) -> None:
    """Types, ties and the layout of state dicts live in classes and hooks that a copy could lose."""
    for tied in (True, False) if name in TIED else (True,):
        stock = stock_model(name, tie_word_embeddings=tied)
        wanted = snapshot(stock)
        zoo = dpzoo.convert(stock)
        copied = COPIES[way](zoo)
        assert module_types(copied) == module_types(zoo)
        assert tied_groups(copied) == tied_groups(zoo)
        assert_bit_equal(copied.state_dict(), wanted)
        assert_same_outputs(copied, zoo, inputs_for(name), tolerance=0.0)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert_bit_equal(zoo.state_dict(), wanted)
        copied.load_state_dict(wanted, strict=True)
        assert_bit_equal(dpzoo.to_transformers(copied).state_dict(), wanted)


# --- what is refused ----------------------------------------------------------------------------


def test_an_unsupported_class_is_named_with_what_is_supported() -> None:
    """A class without a counterpart must not fall to a neighbour's."""
    config = transformers.AlbertConfig(
        vocab_size=61, hidden_size=24, num_attention_heads=3, intermediate_size=20, embedding_size=8
    )
    with pytest.raises(dpzoo.UnsupportedModelError, match="has no class for AlbertModel") as error:
        dpzoo.convert(transformers.AlbertModel(config))
    for name in NAMES:
        assert name in str(error.value)


def test_things_that_are_no_transformers_model_are_refused() -> None:
    """The message says what came and what was wanted."""
    wanted = "wanted an instance of a transformers class"
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=f"torch.*Linear, {wanted}.*BertForMaskedLM"
    ):
        dpzoo.convert(nn.Linear(2, 2))
    with pytest.raises(dpzoo.UnsupportedModelError, match=f"NoneType, {wanted}"):
        dpzoo.convert(None)

    class Mine(transformers.BertModel):
        pass

    with pytest.raises(dpzoo.UnsupportedModelError, match=r"Mine, .* load_state_dict takes stock"):
        dpzoo.convert(Mine(tiny_config("BertModel")))


@pytest.mark.parametrize("name", NAMES)
def test_converting_twice_and_back_twice_is_refused(name: str) -> None:
    """Silently returning the argument would hide a mistake in the caller's bookkeeping."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=f"{name}, which is a dpzoo model already"
    ):
        dpzoo.convert(zoo)
    with pytest.raises(dpzoo.UnsupportedModelError, match=f"{name}, wanted a dpzoo model"):
        dpzoo.to_transformers(stock)


@pytest.mark.parametrize("function", ["convert", "to_transformers"])
def test_wrapped_models_are_refused_with_the_way_out(function: str) -> None:
    """Names inside a wrapper do not correspond; what helps is the model inside."""
    call = getattr(dpzoo, function)
    model = stock_model("BertForSequenceClassification")
    model = dpzoo.convert(model) if function == "to_transformers" else model
    for wrap, advice in (
        (nn.DataParallel, r"torch\.nn\.parallel.*: pass model\.module"),
        (torch.compile, r"OptimizedModule.*: pass model\._orig_mod"),
        (GradSampleModule, r"GradSampleModule.*before make_private, or model\._module"),
    ):
        wrapped = wrap(model)
        with pytest.raises(dpzoo.UnsupportedModelError, match=f"dpzoo.{function}.*{advice}"):
            call(wrapped)
        if isinstance(wrapped, GradSampleModule):
            assert_bit_equal(call(wrapped._module).state_dict(), snapshot(model))


@pytest.mark.parametrize("function", ["convert", "to_transformers"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_adapters_are_refused_with_the_way_out(function: str, name: str) -> None:
    """An adapter's weights have no stock name; merged, they are part of the model's."""
    call = getattr(dpzoo, function)

    def build() -> Any:
        model = stock_model(name)
        return dpzoo.convert(model) if function == "to_transformers" else model

    lora = peft.LoraConfig(r=2, target_modules=["query", "c_attn"])
    wrapped = peft.get_peft_model(build(), lora)
    with pytest.raises(dpzoo.UnsupportedModelError, match=f"dpzoo.{function}.*merge_and_unload"):
        call(wrapped)
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"adapter at '.*(query|c_attn)'"):
        call(wrapped.base_model.model)
    injected = build()
    # What transformers' add_adapter calls, which is particular about the version of PEFT.
    peft.inject_adapter_in_model(lora, injected)
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"adapter at '.*(query|c_attn)'"):
        call(injected)
    merged = wrapped.merge_and_unload()
    assert_same_outputs(call(merged), merged, inputs_for(name), tolerance=1e-10)


def test_quantised_and_scattered_models_are_refused() -> None:
    """Weights without gradients, or on several devices, are no model to train privately."""
    stock = stock_model("BertModel")
    stock.is_quantized = True
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=r"quantised BertModel.*quantization_config"
    ):
        dpzoo.convert(stock)
    stock = stock_model("BertModel")
    stock.hf_device_map = {"embeddings": "cpu", "encoder": 0}
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=r"spread over \['0', 'cpu'\].*one device"
    ):
        dpzoo.convert(stock)
    stock.hf_device_map = {"": "disk"}
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"spread over \['disk'\]"):
        dpzoo.convert(stock)
    stock.hf_device_map = {"": "cpu"}
    dpzoo.convert(stock)


def test_a_changed_model_lists_every_difference_sorted() -> None:
    """Half a conversion is none: all missing, unexpected and mis-shaped names in one error."""
    stock = stock_model("BertForSequenceClassification")
    del stock.bert.encoder.layer[1]
    stock.zebra = nn.Linear(2, 2)
    stock.aside = nn.Parameter(torch.zeros(3))
    stock.classifier = nn.Linear(24, 9)
    with pytest.raises(dpzoo.ConversionError, match="do not correspond") as error:
        dpzoo.convert(stock)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    kinds = ("missing: ", "unexpected: ", "mis-shaped: ")
    found = {kind: [line for line in lines if line.startswith(kind)] for kind in kinds}
    assert [line for kind in kinds for line in found[kind]] == lines
    assert all(part == sorted(part) for part in found.values())
    assert len(found["missing: "]) == 16
    assert all("bert.encoder.layer.1." in line for line in found["missing: "])
    assert found["unexpected: "] == [
        "unexpected: aside",
        "unexpected: zebra.bias",
        "unexpected: zebra.weight",
    ]
    assert found["mis-shaped: "] == [
        "mis-shaped: classifier.bias is (9,), wanted (5,)",
        "mis-shaped: classifier.weight is (9, 24), wanted (5, 24)",
    ]
    assert "Convert it before adding modules" in str(error.value)


def test_a_changed_dpzoo_model_lists_every_difference() -> None:
    """The same guard on the way back."""
    zoo = dpzoo.convert(stock_model("GPT2ForTokenClassification"))
    zoo.extra = nn.Linear(2, 2)
    zoo.transformer.h[0].mlp.c_fc = nn.Linear(24, 21)
    with pytest.raises(dpzoo.ConversionError) as error:
        dpzoo.to_transformers(zoo)
    for line in (
        "unexpected: extra.bias",
        "unexpected: extra.weight",
        "mis-shaped: transformer.h.0.mlp.c_fc.bias is (21,), wanted (20,)",
        "mis-shaped: transformer.h.0.mlp.c_fc.weight is (24, 21), wanted (24, 20)",
    ):
        assert line in str(error.value)


def test_a_refused_model_is_left_as_it_was() -> None:
    """An error half way must not have emptied or retyped the caller's model."""
    stock = stock_model("GPT2LMHeadModel")
    before, types = snapshot(stock), module_types(stock)
    stock.extra = nn.Linear(2, 2)
    with pytest.raises(dpzoo.ConversionError):
        dpzoo.convert(stock)
    del stock.extra
    assert_bit_equal(stock.state_dict(), before)
    assert module_types(stock) == types


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (NAMES, {"add_cross_attention": True}, r"add_cross_attention=True \(cross-attention"),
    (NAMES, {"is_encoder_decoder": True}, r"is_encoder_decoder=True \(encoder-decoder"),
    (NAMES, {"chunk_size_feed_forward": 2}, r"chunk_size_feed_forward=2 .*Wanted 0"),
    (
        NAMES,
        {"position_embedding_type": "relative_key"},
        r"position_embedding_type='relative_key' \(only learned absolute.*Wanted 'absolute'",
    ),
    (NAMES, {"pruned_heads": {0: [1]}}, r"pruned_heads=\{0: \[1\]\}"),
    (NAMES, {"is_causal": False}, r"is_causal=False"),
    (
        [name for name in NAMES if FAMILY[name] == "roberta"],
        {"pad_token_id": None},
        r"RobertaModel cannot honour config\.pad_token_id=None.*Wanted an integer",
    ),
    (
        ["GPT2DoubleHeadsModel"],
        {"summary_type": "attn"},
        r"summary_type='attn'.*Wanted one of cls_index, last, first, mean",
    ),
    (
        [n for n in NAMES if TASK[n] == "question-answering" and FAMILY[n] != "gpt2"],
        {"num_labels": 3},
        r"num_labels=3 \(question answering has two outputs.*Wanted 2",
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param(name, options, message, id=f"{name}-{next(iter(options))}")
        for names, options, message in REFUSED
        for name in names
    ],
)
def test_config_fields_that_cannot_be_honoured_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    """A field that is ignored makes another function than the checkpoint's."""
    config = tiny_config(name, **options)
    with pytest.raises(dpzoo.UnsupportedConfigError, match=message):
        getattr(dpzoo, name)(config)


def test_a_stock_model_with_a_refused_config_is_refused() -> None:
    """Conversion builds the model from the config, and so sees what the constructor sees."""
    stock = stock_model("BertLMHeadModel", add_cross_attention=True)
    with pytest.raises(dpzoo.UnsupportedConfigError, match="add_cross_attention=True"):
        dpzoo.convert(stock)
    stock = stock_model("BertModel", chunk_size_feed_forward=2)
    with pytest.raises(dpzoo.UnsupportedConfigError, match="chunk_size_feed_forward=2"):
        dpzoo.convert(stock)


def test_the_number_of_labels_is_free_where_stock_ignores_it() -> None:
    """Stock GPT-2's question answering head has two outputs whatever num_labels says."""
    stock = stock_model("GPT2ForQuestionAnswering", num_labels=3)
    zoo = dpzoo.convert(stock)
    assert_same_outputs(zoo, stock, inputs_for("GPT2ForQuestionAnswering"), tolerance=1e-10)
