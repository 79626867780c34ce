"""The worked example of docs/adding-a-family.md: ALBERT does what the families of the zoo do."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from opacus import PrivacyEngine
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.registry import class_by_name
from tests import support
from tests.docs.family import NAMES, registered
from tests.models.test_parity import assert_same_function, tensors_of
from tests.modes import TOLERANCE, Step, assert_step_is_exact, relative_error
from tests.support import (
    ROWS,
    SEQ,
    assert_bit_equal,
    assert_same_outputs,
    batch_losses,
    labels_for,
    largest_error,
    oracle_gradients,
    row_of,
    snapshot,
    stock_model,
    tied_groups,
)

EXACT = 1e-10

LAYOUTS: dict[str, dict[str, Any]] = {
    "one-layer-shared": {},
    "groups": {"num_hidden_layers": 4, "num_hidden_groups": 2},
    "inner-layers": {"inner_group_num": 2},
    "nothing-shared": {"num_hidden_groups": 3},
}
"""How often a layer is used: three times in all, twice each, three times each, once each."""


@pytest.fixture(autouse=True, scope="module")
def albert() -> Iterator[None]:
    with registered():
        yield


def inputs_for(name: str, **options: Any) -> dict[str, torch.Tensor]:
    """As `support.inputs_for`, with token types, and embeddings of the narrow width."""
    inputs = support.inputs_for(name, hidden=14, **options)
    rows = len(next(iter(inputs.values())))
    return {**inputs, "token_type_ids": torch.randint(0, 3, (rows, SEQ))}


def batch_for(name: str, **options: Any) -> dict[str, torch.Tensor]:
    return {**inputs_for(name, **options), **labels_for(name)}


# --- the same function --------------------------------------------------------------------------


@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_stock(name: str, padding: str, embeds: bool) -> None:
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    inputs = inputs_for(name, padding=padding, embeds=embeds)
    assert_same_function(stock, zoo, {**inputs, "output_hidden_states": True}, EXACT)


@pytest.mark.parametrize(
    "options",
    [
        *LAYOUTS.values(),
        {"num_hidden_layers": 18, "num_hidden_groups": 14},  # use 9 falls into group 6, not 7
        {"hidden_act": "relu"},
        {"attn_implementation": "eager"},
        {"tie_word_embeddings": False},
        {"pad_token_id": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_config_options_equal_stock(name: str, options: dict[str, Any]) -> None:
    stock = stock_model(name, **options)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    inputs = inputs_for(name)
    assert_same_function(stock, zoo, {**inputs, "output_hidden_states": True}, EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_built_from_a_config_equals_stock(name: str) -> None:
    """Conversion carries eps, dropout and padding rows over; a constructor has to set them itself."""
    stock = stock_model(name)
    zoo = class_by_name(name)(copy.deepcopy(stock.config)).double().eval()
    zoo.load_state_dict(stock.state_dict())
    assert_same_function(stock, zoo, inputs_for(name), EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_attentions_equal_stock(name: str, implementation: str) -> None:
    stock = stock_model(name, attn_implementation="eager", inner_group_num=2)
    zoo = dpzoo.convert(stock)
    zoo.set_attn_implementation(implementation)
    inputs = {**inputs_for(name), "output_attentions": True}
    assert len(zoo(**inputs).attentions) == 6
    assert_same_function(stock, zoo, inputs, EXACT, grads=False)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_stands_where_stock_has_it(name: str) -> None:
    """In train mode with the same seed, both models draw the same masks in the same order."""
    fields = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
    options = dict.fromkeys(fields, 0.3)
    stock = stock_model(name, attn_implementation="eager", **options).train()
    zoo = dpzoo.convert(stock)
    inputs = inputs_for(name)
    found = []
    for model in (stock, zoo):
        torch.manual_seed(3)
        found.append(tensors_of(model(**inputs)))
    for key, value in found[0].items():
        assert largest_error(found[1][key], value) <= EXACT, key


@pytest.mark.parametrize("shape", [(1, SEQ), (ROWS, SEQ)], ids=["row", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_position_ids_equal_stock(name: str, shape: tuple[int, int]) -> None:
    stock = stock_model(name)
    inputs = {**inputs_for(name), "position_ids": torch.randint(2, 23, shape)}
    assert_same_outputs(dpzoo.convert(stock), stock, inputs, EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_what_forward_cannot_honour_is_named(name: str) -> None:
    zoo = dpzoo.convert(stock_model(name))
    inputs = inputs_for(name)
    with pytest.raises(dpzoo.InputError, match=r"got 'attention_maks', which it cannot honour"):
        zoo(**inputs, attention_maks=torch.ones(1))
    with pytest.raises(dpzoo.InputError, match=r"AlbertModel got a sequence of 24 tokens, wanted "):
        zoo(input_ids=torch.ones(1, 24, dtype=torch.long))
    with pytest.raises(dpzoo.InputError, match=r"exactly one of input_ids or inputs_embeds.*both"):
        zoo(**inputs, inputs_embeds=torch.ones(ROWS, SEQ, 14))
    with pytest.raises(dpzoo.UnsupportedConfigError, match=r"chunk_size_feed_forward=2"):
        dpzoo.convert(stock_model(name, chunk_size_feed_forward=2))


# --- conversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_conversion_and_state_dicts_go_both_ways(name: str, tied: bool) -> None:
    stock = stock_model(name, tie_word_embeddings=tied)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    assert type(zoo).__module__ == "albert"
    assert_bit_equal(snapshot(zoo), snapshot(stock))
    assert tied_groups(zoo) == tied_groups(stock)
    back = dpzoo.to_transformers(zoo)
    assert type(back) is type(stock)
    assert_bit_equal(snapshot(back), snapshot(stock))
    assert_same_outputs(back, stock, inputs_for(name), 0.0)

    for source, target in ((stock, zoo), (zoo, stock)):
        support.randomize(source)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_bit_equal(snapshot(target), snapshot(source))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_order_of_stock(name: str) -> None:
    """Optimizer states go by it."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    pairs = zip(zoo.named_parameters(), stock.named_parameters(), strict=True)
    for (ours, mine), (theirs, yours) in pairs:
        assert torch.equal(mine, yours), (ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_settings_changed_on_modules_are_carried(name: str) -> None:
    """Also of the dropout that is never called."""
    stock = stock_model(name)
    rates = {}
    for key, module in stock.named_modules():
        if isinstance(module, nn.Dropout):
            rates[key] = module.p = (1 + len(rates)) / 100
    zoo = dpzoo.convert(stock)
    for model in (zoo, dpzoo.to_transformers(zoo)):
        modules = dict(model.named_modules())
        assert {key: modules[key].p for key in rates} == rates


def test_an_encoder_without_its_pooler_stays_without() -> None:
    config = support.tiny_config("AlbertModel")
    stock = transformers.AlbertModel(config, add_pooling_layer=False).double().eval()
    zoo = dpzoo.convert(stock)
    assert zoo.pooler is None
    assert_same_outputs(zoo, stock, inputs_for("AlbertModel"), EXACT)
    assert dpzoo.to_transformers(zoo).pooler is None


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_stock_both_ways(name: str, tmp_path: Any) -> None:
    stock = stock_model(name, torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    zoo = dpzoo.from_pretrained(tmp_path / "stock")
    assert type(zoo).__name__ == name
    zoo.save_pretrained(tmp_path / "zoo")
    again, report = type(stock).from_pretrained(tmp_path / "zoo", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_bit_equal(snapshot(again), snapshot(stock))


def test_a_new_head_on_a_checkpoint_is_initialised_and_the_rest_is_loaded(tmp_path: Any) -> None:
    stock = stock_model("AlbertForMaskedLM", torch.float32)
    stock.save_pretrained(tmp_path)
    zoo = dpzoo.from_pretrained(tmp_path, task="sequence-classification", num_labels=7)
    assert zoo(**inputs_for("AlbertModel")).logits.shape == (ROWS, 7)
    assert zoo.classifier.weight.std() > 0
    wanted = stock.albert.state_dict()
    got = zoo.albert.state_dict()
    assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_a_resized_vocabulary_stays_tied_and_exact() -> None:
    name = "AlbertForMaskedLM"
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    zoo.resize_token_embeddings(70)
    assert zoo.predictions.decoder.weight is zoo.albert.embeddings.word_embeddings.weight
    assert zoo.predictions.decoder.weight.shape == (70, 14)
    stock = dpzoo.to_transformers(zoo)
    assert_same_function(copy.deepcopy(stock), zoo, inputs_for(name), EXACT)
    assert_step_is_exact(name, "hooks", batch_for(name), stock)


# --- per-sample gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_the_batch_has_the_gradient_that_it_has_alone(name: str, padding: str) -> None:
    """Autograd of each row's loss in the batch, against the row alone through the stock model."""
    stock, batch = stock_model(name), batch_for(name, padding=padding)
    wanted = oracle_gradients(name, stock, batch)
    zoo = dpzoo.convert(stock)
    losses = batch_losses(name, zoo, batch)
    parameters = dict(zoo.named_parameters())
    for i, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for key, grad in zip(parameters, grads, strict=True):
            assert largest_error(grad, wanted[key][i]) <= EXACT, (i, key)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients(name: str, layout: str, mode: str) -> None:
    """Per row and per parameter: a layer's uses add up within the row."""
    stock, batch = stock_model(name, **LAYOUTS[layout]), batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    step = Step(name, dpzoo.convert(stock), mode)
    step.backward(batch)
    # One scale for all: the gradient of a key's bias is 0 but for rounding.
    scale = max(float(value.abs().max()) for value in wanted.values())
    for key, parameter in step.model.named_parameters():
        assert relative_error(parameter.grad_sample, wanted[key], scale) <= TOLERANCE, key


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "bk"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_norms_and_clipped_sums(name: str, layout: str, mode: str) -> None:
    stock = stock_model(name, **LAYOUTS[layout])
    assert_step_is_exact(name, mode, batch_for(name), stock)


@pytest.mark.parametrize("mode", ["hooks", "bk"])
@pytest.mark.parametrize("name", NAMES)
def test_norms_and_clipped_sums_from_embeddings(name: str, mode: str) -> None:
    """The token table then has its head's use, or none."""
    batch = batch_for(name, embeds=True)
    stock = stock_model(name)
    if name != "AlbertForMaskedLM":
        stock.base_model.embeddings.word_embeddings.requires_grad_(False)
    assert_step_is_exact(name, mode, batch, stock)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "bk"])
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_is_a_step_of_zero(name: str, mode: str) -> None:
    step = Step(name, dpzoo.convert(stock_model(name)), mode)
    batch = batch_for(name)
    step.backward({key: value[:0] for key, value in batch.items()})
    assert all(bool((value == 0).all()) for value in step.gradient().values())
    step.backward(batch)
    assert any(bool((value != 0).any()) for value in step.gradient().values())


@pytest.mark.parametrize("mode", ["hooks", "bk"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name: str, mode: str) -> None:
    batch = row_of(batch_for(name), 1)
    assert_step_is_exact(name, mode, batch, stock_model(name), rows=1)


# --- what a shared layer cannot have ------------------------------------------------------------


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "nothing-shared"])
@pytest.mark.parametrize("name", NAMES)
def test_ghost_mode_refuses_a_layer_that_is_used_again(name: str, layout: str) -> None:
    step = Step(name, dpzoo.convert(stock_model(name, **LAYOUTS[layout])), "ghost")
    with pytest.raises(NotImplementedError, match="Parameter tying is not supported with Ghost"):
        step.backward(batch_for(name))


@pytest.mark.parametrize("name", NAMES)
def test_ghost_mode_is_exact_where_nothing_is_shared(name: str) -> None:
    stock = stock_model(name, **LAYOUTS["nothing-shared"])
    assert_step_is_exact(name, "ghost", batch_for(name), stock)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_is_refused(name: str) -> None:
    zoo = dpzoo.convert(stock_model(name))
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) check"):
        zoo.gradient_checkpointing_enable()


class Twice(nn.Module):
    """A layer used twice, each use checkpointed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.layer, x.requires_grad_(), use_reentrant=True).tanh()
        return checkpoint(self.layer, x, use_reentrant=True)


class SumOfSquares(nn.Module):
    reduction = "sum"

    def forward(self, outputs: torch.Tensor, targets: None = None) -> torch.Tensor:
        losses = outputs.square().flatten(1).sum(1)
        return losses if self.reduction == "none" else losses.sum()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_why_checkpointing_is_refused(mode: str) -> None:
    """Opacus sees each use as a batch of its own: twice the rows, or norms of the last use alone.

    Where this fails, Opacus has mended it, and the example may offer checkpointing.
    """
    rows, limit = 4, 0.1
    private = PrivacyEngine(accountant="rdp").make_private(
        module=(model := Twice()),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=SumOfSquares(),
        data_loader=DataLoader(list(range(rows)), batch_size=rows),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        loss_reduction="sum",
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer = private[:2]
    before = [p.detach().clone() for p in model.parameters()]
    criterion = private[2] if mode == "ghost" else SumOfSquares()
    criterion(wrapped(torch.randn(1, 5, 6).repeat(rows, 1, 1)), None).backward()
    if mode == "hooks":
        assert [len(g) for g in optimizer.grad_samples] == [2 * rows, 2 * rows]
        return
    optimizer.step()
    moved = [was - p.detach() for was, p in zip(before, model.parameters(), strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm() > 2 * rows * limit


def test_the_audit_passes_in_hooks_mode_and_names_ghost_mode() -> None:
    name = "AlbertForSequenceClassification"
    model, batch = dpzoo.convert(stock_model(name)), batch_for(name)
    report = dpzoo.audit(model, batch, modes=("hooks",))
    assert report.ok, str(report)
    report = dpzoo.audit(model, batch, modes=("ghost",), checks=("coverage",))
    (finding,) = report.findings
    assert finding.severity == "crash"
    assert "Parameter tying is not supported with Ghost Clipping" in finding.message
