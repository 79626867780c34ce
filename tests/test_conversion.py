"""Stock model to dpzoo model and back: values, storage, structure, state dicts, and what is refused."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dpzoo
from dpzoo.layers.lm_head import LMHead
from dpzoo.registry import class_by_name, stock_class
from tests.support import (
    FAMILY,
    NAMES,
    ROUNDING,
    SPARE_BIAS,
    TASK,
    TIED,
    assert_bit_equal,
    assert_parts_keep_their_types,
    assert_same_outputs,
    head_name,
    in_stock_layout,
    inputs_for,
    module_types,
    randomize,
    snapshot,
    stock_model,
    tied_groups,
    tiny_config,
    transposed_names,
)


def trainable(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}


def embedding_name(name: str) -> str:
    return {
        "bert": "bert.embeddings.word_embeddings.weight",
        "roberta": "roberta.embeddings.word_embeddings.weight",
        "distilbert": "distilbert.embeddings.word_embeddings.weight",
        "gpt2": "transformer.wte.weight",
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
