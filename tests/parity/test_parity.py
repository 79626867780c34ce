"""A checkpoint through dpzoo and back: every class is equal, and every planted difference is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

import dpzoo
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.parity import Check, Parity, convert_checkpoint
from dpzoo.parity.report import worst_of
from tests.support import A_FEW, NAMES, TASK, others_slow, stock_model


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def saved(folder: Path, name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    stock_model(name, dtype, **overrides).save_pretrained(folder / "source")
    return folder / "source"


def failed(parity: Parity) -> dict[str, str]:
    """Name of a failed comparison -> what is worst in it."""
    return {check.name: check.where for check in parity.checks if not check.ok}


@pytest.mark.parametrize("name", others_slow(NAMES, A_FEW))
def test_every_class_is_equal(name: str, tmp_path: Path, target: Path) -> None:
    parity = convert_checkpoint(saved(tmp_path, name), target)
    assert parity.ok, parity
    assert (parity.model, parity.task) == (name, TASK[name])
    assert (parity.stored, parity.compared) == ("float32", "float64")
    assert (parity.fresh, parity.unused) == ((), ())
    stock = stock_model(name, torch.float32)
    assert parity.parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert len(parity.checks) == 9
    # Two ways through the network cannot agree in every bit of every gradient: something was compared.
    assert parity.checks[-1].error > 0


@pytest.mark.parametrize("name", ["BertForPreTraining", "GPT2ForSequenceClassification"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_written_in_another_dtype(
    name: str, dtype: torch.dtype, tmp_path: Path, target: Path
) -> None:
    stored = torch.float16 if dtype == torch.float32 else torch.float32
    source = saved(tmp_path, name, stored)
    parity = convert_checkpoint(source, target, dtype=dtype)
    assert parity.ok, parity
    assert parity.stored == str(dtype).removeprefix("torch.")
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    for key, value in after.items():
        assert value.dtype == dtype
        assert torch.equal(value, before[key].to(dtype)), key


def test_another_task_has_a_random_head_and_says_so(tmp_path: Path, target: Path) -> None:
    source = saved(tmp_path, "BertForMaskedLM")
    parity = convert_checkpoint(source, target, task="token-classification")
    assert parity.ok, parity
    assert parity.model == "BertForTokenClassification"
    assert parity.fresh == ("classifier.bias", "classifier.weight")
    assert "cls.predictions.transform.dense.weight" in parity.unused


def test_several_labels_a_row(tmp_path: Path, target: Path) -> None:
    source = saved(
        tmp_path, "BertForSequenceClassification", problem_type="multi_label_classification"
    )
    assert convert_checkpoint(source, target).ok


def test_a_classifier_without_a_padding_token_keeps_being_without(
    tmp_path: Path, target: Path
) -> None:
    source = saved(tmp_path, "GPT2ForSequenceClassification", pad_token_id=None)
    assert convert_checkpoint(source, target).ok
    assert json.loads((target / "config.json").read_text())["pad_token_id"] is None


# --- planted differences ------------------------------------------------------------------------

Plant = Callable[[Any], None]


def plant_on_loading(monkeypatch: pytest.MonkeyPatch, cls: type, change: Plant) -> None:
    """Change what dpzoo loads."""
    load = cls.from_pretrained.__func__

    def changed(kind: type, *args: Any, **kwargs: Any) -> Any:
        model, report = load(kind, *args, **kwargs)
        change(model)
        return model, report

    monkeypatch.setattr(cls, "from_pretrained", classmethod(changed))


@torch.no_grad()
def move_a_weight(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.query.bias[3] += 1e-6


def swap_eps(model: Any) -> None:
    model.bert.encoder.layer[0].output.LayerNorm.eps *= 1.001


def detach_a_layer(model: Any) -> None:
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, inputs, output: output.detach())


def weigh_rows_unequally(model: Any) -> None:
    def hook(module: Any, inputs: Any, outputs: Any) -> Any:
        if getattr(outputs, "loss_per_sample", None) is not None:
            outputs.loss_per_sample = outputs.loss_per_sample * torch.tensor([1, 1, 1, 1.01])
        return outputs

    model.register_forward_hook(hook)


def mix_rows(model: Any) -> None:
    layer = model.bert.embeddings.word_embeddings
    layer.register_forward_hook(lambda module, inputs, output: output + 1e-7 * output.mean(0))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (move_a_weight, "parameters, stock and dpzoo"),
        (swap_eps, "outputs, stock and dpzoo"),
        (mix_rows, "outputs, stock and dpzoo"),
        (detach_a_layer, "gradients of every row, stock and dpzoo"),
        (weigh_rows_unequally, "gradients of every row, stock and dpzoo"),
    ],
)
def test_a_change_on_loading_is_found(
    change: Plant, found: str, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, "BertForMaskedLM")
    plant_on_loading(monkeypatch, dpzoo.BertForMaskedLM, change)
    parity = convert_checkpoint(source, target)
    assert not parity.ok
    assert found in failed(parity)
    if change is move_a_weight:
        assert failed(parity)[found] == "bert.encoder.layer.1.attention.self.query.bias"


def change_a_value(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.attn.c_proj.weight"][2, 3] += 1e-6
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def transpose(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    key = "transformer.h.0.attn.c_proj.weight"  # square: it fits either way
    state[key] = state[key].t().contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def drop_a_key(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["transformer.h.1.ln_2.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def change_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["layer_norm_epsilon"] = 2e-3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "found", "where"),
    [
        (change_a_value, "parameters, stock and written", "transformer.h.0.attn.c_proj.weight"),
        (change_a_value, "outputs, stock and written", ""),
        (transpose, "parameters, stock and written", "transformer.h.0.attn.c_proj.weight"),
        (
            drop_a_key,
            "keys of the written file that are missing or left over",
            "transformer.h.1.ln_2.bias",
        ),
        (change_the_config, "config fields, stock and written", "layer_norm_epsilon"),
        (change_the_config, "outputs, stock and written", ""),
    ],
)
def test_a_change_on_writing_is_found(
    change: Callable[[Path], None],
    found: str,
    where: str,
    tmp_path: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = saved(tmp_path, "GPT2LMHeadModel")
    write = dpzoo.GPT2LMHeadModel.save_pretrained

    def changed(self: Any, folder: Path, **kwargs: Any) -> None:
        write(self, folder, **kwargs)
        change(folder)

    monkeypatch.setattr(dpzoo.GPT2LMHeadModel, "save_pretrained", changed)
    parity = convert_checkpoint(source, target)
    assert not parity.ok
    assert failed(parity)[found].startswith(where)


def test_expected_values_are_compared_with_the_written_ones(tmp_path: Path, target: Path) -> None:
    source = saved(tmp_path, "DistilBertModel")
    expected = load_file(source / "model.safetensors")
    key = "transformer.layer.1.ffn.lin2.bias"
    expected[key] = expected[key] + 1e-6
    parity = convert_checkpoint(source, target, expected=expected)
    assert failed(parity) == {"parameters, expected and written": key}


def test_not_a_number_is_no_agreement(tmp_path: Path, target: Path) -> None:
    assert not Check("x", float("nan"), 1.0).ok
    assert worst_of("x", {"a": 0.5, "b": float("nan"), "c": 0.7}, 1.0).where == "b"
    source = saved(tmp_path, "BertModel")
    state = load_file(source / "model.safetensors")
    state["encoder.layer.0.output.dense.bias"][0] = float("nan")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    parity = convert_checkpoint(source, target)
    assert "outputs, stock and dpzoo" in failed(parity)


# --- what cannot be loaded ----------------------------------------------------------------------


def test_what_cannot_be_loaded_is_named(tmp_path: Path, target: Path) -> None:
    with pytest.raises(InputError, match=r"There is no folder '.*nowhere'"):
        convert_checkpoint(tmp_path / "nowhere", target)
    source = saved(tmp_path, "BertModel")
    (source / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="source cannot be loaded by transformers"):
        convert_checkpoint(source, target)


def test_other_families_are_refused(tmp_path: Path, target: Path) -> None:
    T5Config(architectures=["T5Model"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="of the family 't5'"):
        convert_checkpoint(tmp_path, target)


def test_a_family_is_wanted_where_the_config_has_none_and_believed_only_there(
    tmp_path: Path, target: Path
) -> None:
    source = saved(tmp_path, "BertModel")
    with pytest.raises(InputError, match="source is of the family 'bert', not 'gpt2'"):
        convert_checkpoint(source, target, family="gpt2")
    config = json.loads((source / "config.json").read_text())
    del config["model_type"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="If you know its family, pass it: --family, one of: bert"):
        convert_checkpoint(source, target)
    assert convert_checkpoint(source, target, family="bert").ok
    assert json.loads((target / "config.json").read_text())["model_type"] == "bert"


def test_the_random_state_and_transformers_logging_are_left_alone(
    tmp_path: Path, target: Path
) -> None:
    import transformers

    source = saved(tmp_path, "BertForMaskedLM")
    level = transformers.logging.get_verbosity()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    convert_checkpoint(source, target, task="sequence-classification")
    assert torch.equal(torch.get_rng_state(), before)
    assert transformers.logging.get_verbosity() == level
