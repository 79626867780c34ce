"""DPTrainer's FSDP2: the parts of a model, and whole checkpoints of them."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import dpzoo
from dpzoo.integrations.sharding import (
    Sharding,
    gather_no_more,
    load_whole,
    shard,
    split_optimizer_state,
    whole_optimizer_state,
    whole_state,
)
from tests.integrations.runs import BERT, LM
from tests.support import assert_bit_equal, batch_for, stock_model

CLOSE = 1e-10  # AdamW divides key biases' gradients, 1e-17 of rounding, by 1e-8


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def made(name: str) -> Any:
    torch.manual_seed(0)
    return dpzoo.convert(stock_model(name))


def split(model: Any, sharding: Sharding = Sharding()) -> Any:  # noqa: B008  (frozen)
    return shard(model, sharding, torch.device("cpu"), 1)


def groups(model: Any) -> set[str]:
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, FSDPModule)}
    return {kind.removeprefix("FSDP") for kind in kinds}


@pytest.mark.parametrize("name", [BERT, LM, "BertForMaskedLM"])
def test_weights_and_optimizer_go_into_files_whole_and_come_back(name: str, tmp_path: Path) -> None:
    """A tied head, and GPT-2, whose layout in files is another."""
    whole, parts = made(name), split(made(name))
    assert all(isinstance(p.data, DTensor) for p in parts.parameters())
    state = whole_state(parts)
    assert_bit_equal(state, whole.state_dict())
    inner: Any = torch.optim.AdamW
    batch = batch_for(name)
    adams = [inner(m.parameters(), lr=0.01) for m in (whole, parts)]
    adams[1].register_load_state_dict_pre_hook(split_optimizer_state)
    for model, adam in zip((whole, parts), adams, strict=True):
        model(**batch).loss.backward()
        adam.step()
        gather_no_more(model)
    parts.save_pretrained(tmp_path, state_dict=whole_state(parts))
    again = type(whole).from_pretrained(tmp_path)
    assert again.config.architectures == [name]
    for key, value in whole.state_dict().items():
        got = again.state_dict()[key]
        torch.testing.assert_close(got, value, rtol=0, atol=CLOSE)
    saved = whole_optimizer_state(adams[1].state_dict())
    for number, values in adams[0].state_dict()["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(saved["state"][number][key], value, rtol=0, atol=1e-12)

    fresh = split(made(name))
    load_whole(fresh, str(tmp_path))
    assert_bit_equal(whole_state(fresh), whole_state(parts))
    adam = inner(fresh.parameters(), lr=0.01)
    adam.register_load_state_dict_pre_hook(split_optimizer_state)
    adam.load_state_dict(copy.deepcopy(saved))
    for p in fresh.parameters():
        assert isinstance(adam.state[p]["exp_avg"], DTensor)
    for number, values in whole_optimizer_state(adam.state_dict())["state"].items():
        assert_bit_equal(values, saved["state"][number])
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(dpzoo.InputError, match=r"has no weights of .*, wanted model\.safetensors"):
        load_whole(fresh, str(tmp_path))


def test_what_an_evaluation_gathered_goes_before_the_step() -> None:
    """A step without rows has no pass that would let it go, and changes the parts."""
    model = split(made(BERT), Sharding(whole=True, reshard=False)).eval()
    with torch.no_grad():
        model(**batch_for(BERT))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    gather_no_more(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def test_groups() -> None:
    assert groups(split(made(BERT))) == {"BertLayer", BERT}
    assert groups(split(made(BERT), Sharding(whole=True))) == {BERT}
    named = Sharding(layers=("BertAttention", "BertEmbeddings"))
    assert groups(split(made(BERT), named)) == {"BertAttention", "BertEmbeddings", BERT}
    model = "BertForMaskedLM"  # whose head is tied
    assert groups(split(made(model), named)) == {"BertAttention", model}


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(
        dpzoo.InputError, match=r"\['Bart'\]}, which .* wanted classes among .*BertLayer"
    ):
        split(made(BERT), Sharding(layers=("Bart",)))
    with pytest.raises(
        dpzoo.UnsupportedModelError, match="split over ranks already, wanted a whole"
    ):
        split(split(made(BERT)))
    adapters = get_peft_model(made(BERT), LoraConfig(target_modules=["query"]))
    with pytest.raises(
        dpzoo.UnsupportedModelError, match="PeftModel with fsdp, wanted a model without"
    ):
        split(adapters)
