"""What conversion refuses: by its type, its wrappers, its parameters and its config."""

from typing import Any

import peft
import pytest
import torch
import transformers
from opacus import GradSampleModule
from torch import nn

import dpzoo
from tests.support import (
    FAMILY,
    NAMES,
    TASK,
    assert_bit_equal,
    assert_same_outputs,
    inputs_for,
    module_types,
    snapshot,
    stock_model,
    tiny_config,
)


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
