"""Opacus' hooks mode: every row's gradient of every parameter, against the oracle."""

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch.nn import functional as F

import dpzoo
from tests.support import (
    NAMES,
    PAD,
    ROWS,
    SEQ,
    TASK,
    TIED,
    batch_for,
    batch_losses,
    in_stock_layout,
    largest_error,
    oracle_gradients,
    row_of,
    stock_model,
)

TOLERANCE = 1e-10


def per_sample_gradients(
    name: str, model: Any, batch: dict[str, torch.Tensor], reduction: str = "mean"
) -> dict[str, torch.Tensor]:
    """Parameter name -> (rows, *shape), in the stock layout, from Opacus' hooks."""
    wrapped = GradSampleModule(model.train(), loss_reduction=reduction)
    try:
        losses = batch_losses(name, wrapped, batch)
        (losses.sum() / max(len(losses), 1) if reduction == "mean" else losses.sum()).backward()
        return {
            key: in_stock_layout(model, key, parameter.grad_sample)
            for key, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
    finally:
        wrapped.to_standard_module()


def assert_exact(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for key, value in got.items():
        assert value.shape == wanted[key].shape, (key, value.shape, wanted[key].shape)
        for i, (row, oracle) in enumerate(zip(value, wanted[key], strict=True)):
            assert largest_error(row, oracle) <= TOLERANCE, (key, i)


@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_and_parameter_equals_the_oracle(name: str, padding: str, embeds: bool) -> None:
    stock = stock_model(name)
    batch = batch_for(name, padding=padding, embeds=embeds)
    wanted = oracle_gradients(name, stock, batch)
    model = dpzoo.convert(stock)
    if embeds:  # a table that is not looked up has no per-sample gradient, and must not be trained
        table = model.get_input_embeddings()
        head = model.get_output_embeddings()
        looked_up = "gpt2" in type(model).__module__  # token types are
        if not looked_up and (head is None or head.weight is not table.weight):
            table.weight.requires_grad_(False)
    got = per_sample_gradients(name, model, batch)
    assert_exact(got, wanted)


@pytest.mark.parametrize("name", TIED)
def test_untied_heads(name: str) -> None:
    stock = stock_model(name, tie_word_embeddings=False)
    batch = batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    assert_exact(per_sample_gradients(name, dpzoo.convert(stock), batch), wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_reductions(name: str, reduction: str) -> None:
    stock = stock_model(name)
    batch = batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    got = per_sample_gradients(name, dpzoo.convert(stock), batch, reduction)
    assert_exact(got, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_runs(name: str) -> None:
    """Poisson sampling draws empty batches: zero rows in every gradient, a finite loss of 0."""
    model = dpzoo.convert(stock_model(name))
    batch = {key: value[:0] for key, value in batch_for(name).items()}
    if TASK[name] != "base":
        loss = model(**batch).loss
        assert loss.item() == 0.0
    got = per_sample_gradients(name, model, batch)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        assert got[key].shape == (0, *in_stock_layout(model, key, parameter).shape), key


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name: str) -> None:
    stock = stock_model(name)
    batch = row_of(batch_for(name), ROWS - 1)
    wanted = oracle_gradients(name, stock, batch)
    assert_exact(per_sample_gradients(name, dpzoo.convert(stock), batch), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    """Row 1's gradients stay when the other rows change in content, padding, labels and number."""
    model = dpzoo.convert(stock_model(name))
    batch, other = batch_for(name, padding="right"), batch_for(name, padding="left")
    before = per_sample_gradients(name, model, batch)
    mixed = {key: torch.cat([other[key][:1], batch[key][1:2]]) for key in batch}
    after = per_sample_gradients(name, model, mixed)
    for key, value in before.items():
        assert largest_error(after[key][1], value[1]) <= 1e-12, key


@pytest.mark.parametrize("name", TIED)
def test_a_row_without_labels_has_gradient_zero(name: str) -> None:
    model = dpzoo.convert(stock_model(name))
    batch = batch_for(name)
    batch["labels"][2] = -100
    output = model(**batch)
    assert output.loss_per_sample.shape == (ROWS,)
    if TASK[name] in ("masked-lm", "causal-lm"):
        assert output.loss_per_sample[2].item() == 0.0
        got = per_sample_gradients(name, model, batch)
        assert all(bool((value[2] == 0).all()) for value in got.values())
        assert all(bool((value[1] != 0).any()) for value in got.values())


def test_token_types_of_gpt2_use_the_table_once() -> None:
    """GPT-2 looks token types up in the token table: one call, so that no mode takes it for a tie."""
    model = dpzoo.convert(stock_model("GPT2Model"))
    calls: list[torch.Size] = []
    model.wte.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    model(**batch_for("GPT2Model"))
    assert calls == [torch.Size((ROWS, 18))]


@pytest.mark.parametrize("name", NAMES)
def test_padding_further_changes_no_row(name: str) -> None:
    """A longer row somewhere in the batch pads the others further; their gradients stay."""
    model = dpzoo.convert(stock_model(name))
    batch = batch_for(name, padding="right")
    longer = {
        key: F.pad(value, (0, 3), value={"input_ids": PAD, "labels": -100}.get(key, 0))
        if value.shape[-1:] == (SEQ,) and key != "mc_token_ids"
        else value
        for key, value in batch.items()
    }
    if TASK[name] == "base":  # returns padding's states too
        first, second = model(**batch), model(**longer)
        real = batch["attention_mask"].bool()
        states = second.last_hidden_state[:, :SEQ]
        assert largest_error(states[real], first.last_hidden_state[real]) <= 1e-12
        return
    before = per_sample_gradients(name, model, batch)
    after = per_sample_gradients(name, model, longer)
    for key, value in before.items():
        assert largest_error(after[key], value) <= 1e-12, key
