"""Saved checkpoints are stock: bit by bit, after training, resizing and on the way to a hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dpzoo
from tests.stock_checkpoints import ROUNDING, assert_loaded, load_stock
from tests.support import (
    NAMES,
    TASK,
    TIED,
    assert_bit_equal,
    assert_same_outputs,
    inputs_for,
    randomize,
    snapshot,
    stock_model,
    tied_groups,
)

AUTO_CLASSES = {
    "base": transformers.AutoModel,
    "pre-training": transformers.AutoModelForPreTraining,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
    "next-sentence-prediction": transformers.AutoModelForNextSentencePrediction,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}

pytestmark = pytest.mark.usefixtures("quiet")


def assert_same_folders(got: Path, wanted: Path) -> None:
    """Same files, same config, same tensors under the same names."""
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in wanted.iterdir())
    for file in ("config.json", "generation_config.json"):
        if (wanted / file).exists():
            assert json.loads((got / file).read_text()) == json.loads((wanted / file).read_text())
    weights = [load_file(folder / "model.safetensors") for folder in (got, wanted)]
    assert_bit_equal(*weights)


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, True) for name in NAMES), *((name, False) for name in TIED)],
)
def test_saved_checkpoints_are_stock(name: str, tied: bool, tmp_path: Path) -> None:
    """Whoever gets the trained model has transformers alone, and must find every weight in place."""
    stock = stock_model(name, torch.float32, tie_word_embeddings=tied)
    zoo = dpzoo.convert(stock)
    zoo.save_pretrained(tmp_path / "zoo")
    stock.save_pretrained(tmp_path / "stock")
    assert_same_folders(tmp_path / "zoo", tmp_path / "stock")
    again = load_stock(name, tmp_path / "zoo")
    assert type(again).__module__.startswith("transformers.")
    assert_bit_equal(again.state_dict(), stock.state_dict())
    assert tied_groups(again) == tied_groups(stock)
    inputs = inputs_for(name, dtype=torch.float32)
    assert_same_outputs(again, stock, inputs, tolerance=0.0)
    if TASK[name] in AUTO_CLASSES:
        auto = AUTO_CLASSES[TASK[name]].from_pretrained(tmp_path / "zoo")
        assert type(auto) is type(stock)
    assert_loaded(dpzoo.from_pretrained(tmp_path / "zoo"), stock)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_saves_what_the_stock_model_would_have_learnt(
    name: str, tmp_path: Path
) -> None:
    """One step of SGD on both; a tie lost or a layout mistaken on the way out would show."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock_model(name))
    zoo.load_state_dict(stock.state_dict())
    before = snapshot(stock)
    inputs = inputs_for(name)
    for model in (stock, zoo):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs = model(**inputs)
        tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
        sum(tensor.square().mean() for tensor in tensors).backward()
        optimizer.step()
    zoo.save_pretrained(tmp_path)
    saved = load_stock(name, tmp_path).double()
    wanted = stock.state_dict()
    changed = 0
    for key, value in saved.state_dict().items():
        assert (value - wanted[key]).abs().max() <= 1e-12, key
        changed += not torch.equal(value, before[key])
    assert changed >= len(wanted) - 2  # softmax ignores the biases of the two layers' keys


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_model_saves_a_checkpoint_that_loads(
    name: str, tied: bool, tmp_path: Path
) -> None:
    """A second bias of the old size, or an alias of the new one, would be missing on loading."""
    zoo = dpzoo.convert(stock_model(name, torch.float32, tie_word_embeddings=tied))
    zoo.resize_token_embeddings(67)
    randomize(zoo)
    zoo.save_pretrained(tmp_path)
    stock = load_stock(name, tmp_path)
    assert_bit_equal(stock.state_dict(), zoo.state_dict())
    inputs = inputs_for(name, dtype=torch.float32)
    assert_same_outputs(zoo, stock, inputs, tolerance=ROUNDING)
    assert_bit_equal(dpzoo.to_transformers(zoo).state_dict(), snapshot(zoo))


def test_push_to_hub_uploads_a_stock_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that would be uploaded is what save_pretrained writes."""

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> str:
        assert repo_id == "somebody/tiny"
        shutil.copytree(working_dir, tmp_path / "uploaded")
        return "uploaded"

    created = huggingface_hub.RepoUrl("https://huggingface.co/somebody/tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: created)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *a, **k: _no_card())
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    stock = stock_model("GPT2LMHeadModel", torch.float32)
    assert dpzoo.convert(stock).push_to_hub("somebody/tiny") == "uploaded"
    again = load_stock("GPT2LMHeadModel", tmp_path / "uploaded")
    assert_bit_equal(again.state_dict(), stock.state_dict())


def _no_card() -> Any:
    raise huggingface_hub.errors.EntryNotFoundError("no model card yet")
