"""Same function as the stock model: outputs, hidden states, attentions, cache and gradients."""

from typing import Any

import pytest
import torch

import dpzoo
from dpzoo.models.cache import CACHE
from tests.support import (
    FAMILY,
    NAMES,
    ROWS,
    SEQ,
    TASK,
    TIED,
    in_stock_layout,
    input_shape,
    inputs_for,
    largest_error,
    stock_model,
)

TOLERANCE = 1e-10


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an output under a name, caches included."""
    found: dict[str, torch.Tensor] = {}
    for key, value in output.items():
        if isinstance(value, torch.Tensor):
            found[key] = value
        elif isinstance(value, tuple):
            found.update({f"{key}.{i}": item for i, item in enumerate(value)})
        elif key == CACHE:
            for i, layer in enumerate(value.layers):
                found[f"{key}.{i}.keys"], found[f"{key}.{i}.values"] = layer.keys, layer.values
        else:
            raise AssertionError(f"unexpected output {key}: {type(value)}")
    return found


def assert_same_function(
    stock: Any, zoo: Any, inputs: dict[str, Any], tolerance: float = TOLERANCE, grads: bool = True
) -> None:
    """Outputs equal, and gradients of a random functional of all of them equal by parameter."""
    outputs = []
    for model in (stock, zoo):
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(7)
        found = tensors_of(model(**inputs))
        outputs.append(found)
        total = sum(
            (tensor * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)).sum()
            for _, tensor in sorted(found.items())
        )
        if grads:
            total.backward()
    expected, got = outputs
    assert list(expected) == list(got)
    for key, value in expected.items():
        assert largest_error(got[key], value) <= tolerance, key
    if not grads:
        return
    stock_parameters = dict(stock.named_parameters(remove_duplicate=False))
    for name, parameter in zoo.named_parameters(remove_duplicate=False):
        wanted = stock_parameters[name].grad
        if wanted is None:
            assert parameter.grad is None, name
            continue
        assert largest_error(in_stock_layout(zoo, name, parameter.grad), wanted) <= tolerance, name


@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_stock(name: str, padding: str, embeds: bool) -> None:
    stock = stock_model(name)
    zoo = dpzoo.convert(stock_copy := stock_model(name))
    stock.load_state_dict(stock_copy.state_dict())
    assert_same_function(
        stock,
        zoo,
        {**inputs_for(name, padding=padding, embeds=embeds), "output_hidden_states": True},
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_attentions_equal_stock(name: str, implementation: str) -> None:
    """Stock returns attention weights in eager mode; asked for, dpzoo gives them in both."""
    stock = stock_model(name, attn_implementation="eager")
    zoo = dpzoo.convert(stock)
    zoo.set_attn_implementation(implementation)
    inputs = inputs_for(name, padding="right")
    assert_same_function(
        stock, zoo, {**inputs, "output_attentions": True, "output_hidden_states": True}, grads=False
    )


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "eager", {"attn_implementation": "eager"}) for name in NAMES),
    *((name, "untied", {"tie_word_embeddings": False}) for name in TIED),
    *(
        (name, "decoder", {"is_decoder": True})
        for name in NAMES
        if FAMILY[name] in ("bert", "roberta") and TASK[name] != "causal-lm"
    ),
    *(
        (name, "encoder", {"is_decoder": False})
        for name in ("BertLMHeadModel", "RobertaForCausalLM")
    ),
    *(
        (name, "unscaled", {"scale_attn_weights": False})
        for name in NAMES
        if FAMILY[name] == "gpt2"
    ),
    *(
        (name, "by-layer", {"scale_attn_by_inverse_layer_idx": True})
        for name in NAMES
        if FAMILY[name] == "gpt2"
    ),
    *(
        ("GPT2DoubleHeadsModel", f"summary-{i}", options)
        for i, options in enumerate(
            [
                {"summary_use_proj": False},
                {"summary_proj_to_labels": False},
                {"summary_activation": "tanh"},
                {"summary_type": "mean"},
                {"summary_type": "first"},
                {"summary_type": "last"},
            ]
        )
    ),
    ("BertForMaskedLM", "no-pad-row", {"pad_token_id": None}),
    ("BertModel", "relu", {"hidden_act": "relu"}),
    ("RobertaForMaskedLM", "relu", {"hidden_act": "relu"}),
    ("DistilBertForMaskedLM", "gelu", {"activation": "gelu"}),
    ("DistilBertModel", "sinusoidal", {"sinusoidal_pos_embds": True}),
    ("GPT2Model", "inner", {"n_inner": None}),
]


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, o, id=f"{n}-{tag}") for n, tag, o in OPTIONS]
)
def test_config_options_equal_stock(name: str, options: dict[str, Any]) -> None:
    stock = stock_model(name, **options)
    zoo = dpzoo.convert(stock)
    assert_same_function(stock, zoo, inputs_for(name, padding="right"))


def test_upcast_attention_equals_stock() -> None:
    """reorder_and_upcast_attn computes in float32: compared there, at float32's precision."""
    for name in ("GPT2LMHeadModel", "GPT2ForSequenceClassification"):
        options = {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}
        stock = stock_model(name, torch.float32, **options)
        inputs = inputs_for(name, padding="right")
        assert_same_function(stock, dpzoo.convert(stock), inputs, tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_stock(name: str) -> None:
    """One part in 1e5 is float32's rounding over two layers."""
    stock = stock_model(name, torch.float32)
    assert_same_function(stock, dpzoo.convert(stock), inputs_for(name), tolerance=1e-5)


@pytest.mark.parametrize("shape", ["row", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_position_ids_equal_stock(name: str, shape: str) -> None:
    """(1, seq) positions mean the same as (batch, seq) ones, and both what they mean to stock."""
    if TASK[name] == "multiple-choice":
        positions = torch.randint(2, 23, (ROWS, 3, SEQ))
        if shape == "row":
            positions = positions[:1, :1].expand(ROWS, 3, SEQ).contiguous()
        given = positions[:1, :1] if shape == "row" else positions
        # Stock DistilBERT passes them on as they are: it needs them flattened.
        flat = FAMILY[name] == "distilbert"
        stock_given = positions.reshape(-1, SEQ) if flat else positions
    else:
        full = input_shape(name)
        positions = torch.randint(2, 23, (full[0] * (full[1] if len(full) == 3 else 1), SEQ))
        stock_given = given = positions[:1] if shape == "row" else positions
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    inputs = inputs_for(name, padding="right")
    inputs.pop("token_type_ids", None)
    wanted = stock(**inputs, position_ids=stock_given)
    got = zoo(**inputs, position_ids=given)
    for key, value in tensors_of(wanted).items():
        assert largest_error(tensors_of(got)[key], value) <= TOLERANCE, key


@pytest.mark.parametrize("dtype", ["bool", "float"])
@pytest.mark.parametrize("name", NAMES)
def test_four_dimensional_masks_equal_stock(name: str, dtype: str) -> None:
    full = input_shape(name)
    rows = full[0] * (full[1] if len(full) == 3 else 1)
    seen = torch.rand(rows, 1, SEQ, SEQ) < 0.6
    seen |= torch.eye(SEQ, dtype=torch.bool)
    mask = seen
    if dtype == "float":
        mask = torch.randn(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    inputs = inputs_for(name, padding="none")
    if TASK[name] == "multiple-choice":
        # Stock heads flatten a mask to two dimensions; the body takes it as it is, and so do we.
        body_inputs = {k: v.reshape(rows, SEQ) for k, v in inputs.items()}
        wanted = stock.base_model(**body_inputs, attention_mask=mask).last_hidden_state
        flat = {k: v.reshape(ROWS, -1) for k, v in inputs.items()}
        got = zoo.base_model(**flat, attention_mask=mask, num_choices=3).last_hidden_state
        assert largest_error(got.reshape(wanted.shape), wanted) <= TOLERANCE
        return
    wanted_output = stock(**inputs, attention_mask=mask)
    got_output = zoo(**inputs, attention_mask=mask)
    for key, value in tensors_of(wanted_output).items():
        assert largest_error(tensors_of(got_output)[key], value) <= TOLERANCE, key


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_a_boolean_four_dimensional_mask_means_the_same_in_eager_mode(name: str) -> None:
    """True takes part. (Stock adds it to the scores, as 1 and 0.)"""
    mask = (torch.rand(ROWS, 1, SEQ, SEQ) < 0.6) | torch.eye(SEQ, dtype=torch.bool)
    zoo = dpzoo.convert(stock_model(name))
    inputs = inputs_for(name, padding="none")
    fused = zoo(**inputs, attention_mask=mask).last_hidden_state
    zoo.set_attn_implementation("eager")
    assert largest_error(zoo(**inputs, attention_mask=mask).last_hidden_state, fused) <= TOLERANCE


CAUSAL = [
    "BertLMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "RobertaForCausalLM",
]


@pytest.mark.parametrize("name", CAUSAL)
def test_cache_equals_stock(name: str) -> None:
    """Two steps over a cache: the caches are equal, and so are the outputs of the second step."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    inputs = inputs_for(name, padding="left")
    first = {key: value[..., :6] for key, value in inputs.items() if key != "mc_token_ids"}
    second = {key: value[..., 6:] for key, value in inputs.items() if key != "mc_token_ids"}
    second["attention_mask"] = inputs["attention_mask"]
    caches = [None, None]
    for step in (first, second):
        results = []
        for i, model in enumerate((stock, zoo)):
            with torch.no_grad():
                output = model(**step, use_cache=True, **{CACHE: caches[i]})
            caches[i] = output[CACHE]
            results.append(tensors_of(output))
        assert list(results[0]) == list(results[1])
        for key, value in results[0].items():
            assert largest_error(results[1][key], value) <= TOLERANCE, key


@pytest.mark.parametrize("name", NAMES)
def test_return_dict_false_gives_the_stock_tuple(name: str) -> None:
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    inputs = inputs_for(name)
    wanted = stock(**inputs, return_dict=False, output_hidden_states=True)
    got = zoo(**inputs, return_dict=False, output_hidden_states=True)
    assert isinstance(got, tuple)
    assert [type(item) for item in got] == [type(item) for item in wanted]
    assert largest_error(got[0], wanted[0]) <= TOLERANCE


@pytest.mark.parametrize("rate", [0.3])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_stands_where_stock_has_it(name: str, rate: float) -> None:
    """In train mode with the same seed, eager, both models draw the same masks in the same order.

    Multiple choice draws for (batch, choices * seq) what stock draws for (batch * choices, seq):
    the same numbers in the same order, so it is equal too.
    """
    dropouts = {
        "bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
        "roberta": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
        "distilbert": ["dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"],
        "gpt2": [
            "embd_pdrop",
            "resid_pdrop",
            "attn_pdrop",
            "summary_first_dropout",
            "classifier_dropout",
        ],
    }[FAMILY[name]]
    options = dict.fromkeys(dropouts, rate)
    stock = stock_model(name, attn_implementation="eager", **options).train()
    zoo = dpzoo.convert(stock)
    assert zoo.training
    inputs = inputs_for(name)
    torch.manual_seed(3)
    wanted = tensors_of(stock(**inputs))
    torch.manual_seed(3)
    got = tensors_of(zoo(**inputs))
    for key, value in wanted.items():
        assert largest_error(got[key], value) <= TOLERANCE, key


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILY[name] == "distilbert"])
def test_distilbert_passes_over_token_types_as_stock_does(name: str) -> None:
    """Tokenizers of BERT come with many of its checkpoints, and send them."""
    zoo = dpzoo.convert(stock_model(name))
    inputs = inputs_for(name)
    types = torch.ones_like(inputs["input_ids"])
    wanted, got = tensors_of(zoo(**inputs)), tensors_of(zoo(**inputs, token_type_ids=types))
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_cannot_be_honoured_are_named(name: str) -> None:
    zoo = dpzoo.convert(stock_model(name))
    with pytest.raises(
        dpzoo.InputError, match=r"forward\(\) got 'attention_maks', which it cannot"
    ):
        zoo(**inputs_for(name), attention_maks=torch.ones(1))
    with pytest.raises(
        dpzoo.InputError, match=r"exactly one of input_ids or inputs_embeds.*got neither"
    ):
        zoo(attention_mask=torch.ones(ROWS, SEQ))
