"""What transformers' own model test suite asks of a model, and the parity tests do not look at.

The suite itself is not part of this repository. Each test here pins a point of it on which a rewrite
of a model can go wrong without a difference in any output that it was tried on.
"""

import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import GenerationMixin

from dpzoo.layers import LMHead, PositionEmbedding, TokenEmbedding
from dpzoo.registry import class_by_name, stock_class
from tests.support import (
    FAMILY,
    NAMES,
    PAD,
    ROUNDING,
    SEQ,
    TASK,
    TIED,
    VOCAB,
    batch_for,
    inputs_for,
    largest_error,
    randomize,
    stock_model,
    tiny_config,
)


def model_of(name: str, **overrides: Any) -> Any:
    """A randomised dpzoo model, float32, in eval mode."""
    model = class_by_name(name)(tiny_config(name, **overrides))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_new_models_are_initialised_as_stock(name: str, tied: bool) -> None:
    """GPT-2's projections into the residual stream start smaller; a container has to say so."""
    config = tiny_config(name, initializer_range=0.3, tie_word_embeddings=tied)
    wanted = stock_class(class_by_name(name))(config).state_dict()
    got = class_by_name(name)(config).state_dict()
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key] == 0, value == 0), key  # biases, rows of padding
        assert torch.equal(got[key] == 1, value == 1), key
        if len(value.unique()) > 400:  # fewer values do not tell a width
            assert 0.8 < got[key].std() / value.std() < 1.25, key


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_models_built_without_data_can_be_initialised_later(name: str, tied: bool) -> None:
    with torch.device("meta"):
        model = class_by_name(name)(tiny_config(name, tie_word_embeddings=tied))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights()
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key


def test_sinusoidal_positions_are_those_of_stock() -> None:
    config = tiny_config("DistilBertModel", sinusoidal_pos_embds=True)
    key = "embeddings.position_embeddings.weight"
    wanted = transformers.DistilBertModel(config).state_dict()[key]
    assert torch.equal(class_by_name("DistilBertModel")(config).state_dict()[key], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_can_be_taken_out_and_put_in(name: str) -> None:
    model = model_of(name)
    assert type(model.get_input_embeddings()) is TokenEmbedding
    plain = nn.Embedding(VOCAB, 24)
    model.set_input_embeddings(plain)
    assert model.get_input_embeddings() is plain is model.base_model.get_input_embeddings()
    assert type(plain) is TokenEmbedding
    head = model.get_output_embeddings()
    assert (head is not None) == (name in TIED)
    if head is not None:
        other = nn.Linear(24, VOCAB, bias=head.bias is not None)
        model.set_output_embeddings(other)
        assert model.get_output_embeddings() is other


@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 20])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_resizing_keeps_values_types_and_ties(name: str, tied: bool, size: int) -> None:
    model = model_of(name, tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    table, kept = model.get_input_embeddings(), min(size, VOCAB)
    assert type(table) is TokenEmbedding
    assert model.config.vocab_size == size == len(table.weight)
    assert torch.equal(table.weight[:kept], before[:kept])
    head = model.get_output_embeddings()
    if head is not None:
        assert (head.weight is table.weight) == tied
        assert type(head) is (LMHead if tied else nn.Linear)
    inputs = {key: value % 40 for key, value in inputs_for(name, dtype=torch.float32).items()}
    logits = model(**inputs).to_tuple()[0]
    assert head is None or logits.shape[-1] == size


@pytest.mark.parametrize("name", NAMES)
def test_casting_and_freezing_keep_the_types(name: str) -> None:
    model = model_of(name)
    types = [type(module) for module in model.modules()]
    model.to(torch.bfloat16).requires_grad_(False)
    assert [type(module) for module in model.modules()] == types
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    owners = {
        type(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None
    }
    assert owners <= {nn.Linear, nn.LayerNorm, TokenEmbedding, PositionEmbedding, LMHead}


@pytest.mark.parametrize("name", NAMES)
def test_single_hidden_states_can_be_asked_for(name: str) -> None:
    model, inputs = model_of(name), inputs_for(name, dtype=torch.float32)
    everything = model(**inputs, output_hidden_states=True).hidden_states
    for wanted, kept in ((1, {1}), ([0, -1], {0, len(everything) - 1})):
        some = model(**inputs, output_hidden_states=wanted).hidden_states
        assert {i for i, state in enumerate(some) if state is not None} == kept
        assert all(torch.equal(some[i], everything[i]) for i in kept)


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model, batch = model_of(name).train(), batch_for(name, dtype=torch.float32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing == checkpointing
        outputs = model(**batch)
        loss = outputs.last_hidden_state.sum() if TASK[name] == "base" else outputs.loss
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):
        assert largest_error(b, a) <= ROUNDING[torch.float32]
    assert pickle.loads(pickle.dumps(model)).is_gradient_checkpointing


@pytest.mark.parametrize("name", [n for n in NAMES if TASK[n] == "base"])
def test_ids_that_stock_takes(name: str) -> None:
    """Positions that start over (packed sequences) in a row longer than the table; one type a row."""
    seq = 31  # of 23 positions
    inputs = {"input_ids": torch.randint(4, VOCAB, (2, seq))}
    inputs["position_ids"] = (torch.arange(seq) % 11 + PAD + 1).expand(2, seq)
    if FAMILY[name] in ("bert", "roberta"):
        inputs["token_type_ids"] = torch.tensor([[1], [2]])
    stock, model = stock_model(name), model_of(name).double()
    model.load_state_dict(stock.state_dict(), strict=True)
    with torch.no_grad():
        got, wanted = (m(**inputs).last_hidden_state for m in (model, stock))
    assert largest_error(got, wanted) <= ROUNDING[torch.float64]


@pytest.mark.parametrize("name", [n for n in NAMES if TASK[n] == "causal-lm"])
def test_shifted_labels_take_the_place_of_labels(name: str) -> None:
    """Sequence-parallel training lines targets up with the logits itself."""
    model, batch = model_of(name), batch_for(name, dtype=torch.float32)
    labels = batch.pop("labels")
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    wanted = model(**batch, labels=labels).loss_per_sample
    got = model(**batch, labels=torch.zeros_like(labels), shift_labels=shifted).loss_per_sample
    assert largest_error(got, wanted) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_that_generate_say_so(name: str) -> None:
    """Some callers look for the mixin among the direct bases."""
    wanted = stock_class(class_by_name(name)).can_generate()
    assert class_by_name(name).can_generate() == wanted
    assert (GenerationMixin in class_by_name(name).__bases__) == wanted


def test_a_static_cache_generates_what_a_dynamic_one_does() -> None:
    model = model_of("GPT2LMHeadModel")
    inputs = inputs_for("GPT2LMHeadModel", padding="left")
    options = {"max_new_tokens": SEQ, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    wanted = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), wanted)
