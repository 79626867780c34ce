"""Every synthetic checkpoint: the values in its file arrive under every name, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.synthetic import SYNTHETIC_CHECKPOINTS, SyntheticCheckpoint
from dpzoo.catalogue import quirks
from dpzoo.parity import Parity, convert_checkpoint
from tests.support import others_slow

FIRST = [
    next(checkpoint for checkpoint in SYNTHETIC_CHECKPOINTS if checkpoint.quirk == quirk)
    for quirk in quirks()
]
VALUES = "parameters, expected and written"


def run(checkpoint: SyntheticCheckpoint, folder: Path, alter: str = "") -> Parity:
    (folder / "source").mkdir()
    (folder / "target").mkdir()
    expected = checkpoint.build(folder / "source", alter)
    return convert_checkpoint(
        folder / "source", folder / "target", expected=expected, **checkpoint.arguments
    )


def keys(folder: Path) -> set[str]:
    """Names of the tensors in the checkpoint's file."""
    if (folder / "pytorch_model.bin").exists():
        return set(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    "checkpoint", others_slow(SYNTHETIC_CHECKPOINTS, FIRST), ids=lambda checkpoint: checkpoint.name
)
def test_values_arrive(checkpoint: SyntheticCheckpoint, tmp_path: Path) -> None:
    parity = run(checkpoint, tmp_path)
    assert parity.ok, parity
    assert parity.model == (checkpoint.loaded or checkpoint.written)
    assert VALUES in [check.name for check in parity.checks]


USED = {
    "legacy-layer-norm": "LayerNorm.gamma",
    "no-prefix": "word_embeddings",
    "base-prefix": "layer.1",
    "pooler-missing": "LayerNorm.bias",
    "one-token-type": "token_type_embeddings",
    "sinusoidal-positions": "position_embeddings",
    "decoder-bias-missing": "bias",
}
"""Part of a key of the file that the quirk touches, where there is one in every family."""


@pytest.mark.parametrize("checkpoint", FIRST, ids=lambda checkpoint: checkpoint.name)
def test_a_value_that_is_read_wrongly_is_found(
    checkpoint: SyntheticCheckpoint, tmp_path: Path
) -> None:
    """The comparison knows the truth: it does not only compare two loads of one file."""
    (tmp_path / "look").mkdir()
    checkpoint.build(tmp_path / "look")
    file = keys(tmp_path / "look")
    part = USED.get(checkpoint.quirk, "")
    if not any(part in key for key in file) or not part:
        part = "LayerNorm.weight" if checkpoint.family != "gpt2" else "ln_1.weight"
        part = part if any(part in key for key in file) else "layer_norm.weight"
    parity = run(checkpoint, tmp_path, alter=part)
    assert [check.name for check in parity.checks if not check.ok] == [VALUES]


@pytest.mark.parametrize(
    "checkpoint",
    [checkpoint for checkpoint in SYNTHETIC_CHECKPOINTS if checkpoint.surplus],
    ids=lambda checkpoint: checkpoint.name,
)
def test_what_is_surplus_has_no_influence(checkpoint: SyntheticCheckpoint, tmp_path: Path) -> None:
    parity = run(checkpoint, tmp_path, alter=checkpoint.surplus)
    assert parity.ok, parity
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert not any(checkpoint.surplus in key for key in written)


def find(quirk: str, written: str) -> SyntheticCheckpoint:
    return next(
        checkpoint
        for checkpoint in SYNTHETIC_CHECKPOINTS
        if (checkpoint.quirk, checkpoint.written) == (quirk, written)
    )


@pytest.mark.parametrize(
    ("quirk", "written", "has", "lacks"),
    [
        ("legacy-layer-norm", "BertForMaskedLM", "bert.embeddings.LayerNorm.gamma", "LayerNorm.w"),
        ("no-prefix", "GPT2LMHeadModel", "h.0.attn.c_attn.weight", "transformer."),
        ("base-prefix", "BertForPreTraining", "bert.embeddings.LayerNorm.weight", "\0"),
        ("position-ids", "BertForTokenClassification", "bert.embeddings.position_ids", "\0"),
        ("causal-mask", "GPT2LMHeadModel", "transformer.h.1.attn.masked_bias", "\0"),
        ("pooler-missing", "RobertaForMaskedLM", "lm_head.bias", "pooler"),
        ("pooler-surplus", "BertForMaskedLM", "bert.pooler.dense.weight", "\0"),
        ("head-surplus", "BertForPreTraining", "cls.seq_relationship.weight", "\0"),
        ("decoder-saved", "DistilBertForMaskedLM", "vocab_projector.weight", "\0"),
        ("decoder-missing", "RobertaForMaskedLM", "lm_head.bias", "decoder.weight"),
        ("decoder-bias-missing", "BertForMaskedLM", "cls.predictions.bias", "decoder.bias"),
    ],
)
def test_files_are_laid_out_as_their_quirk_says(
    quirk: str, written: str, has: str, lacks: str, tmp_path: Path
) -> None:
    find(quirk, written).build(tmp_path)
    assert has in keys(tmp_path)
    assert not any(lacks in key for key in keys(tmp_path))


def test_tables_configs_and_dtypes_are_as_their_quirk_says(tmp_path: Path) -> None:
    def build(quirk: str, written: str) -> Path:
        folder = tmp_path / quirk
        folder.mkdir()
        find(quirk, written).build(folder)
        return folder

    state = load_file(
        build("one-token-type", "RobertaForSequenceClassification") / "model.safetensors"
    )
    assert len(state["roberta.embeddings.token_type_embeddings.weight"]) == 1
    state = load_file(build("resized-vocabulary", "GPT2LMHeadModel") / "model.safetensors")
    assert len(state["transformer.wte.weight"]) == 103
    assert {path.name for path in build("bin-only", "BertForMaskedLM").iterdir()} == {
        "config.json",
        "pytorch_model.bin",
    }
    half = torch.load(
        build("half-precision", "GPT2LMHeadModel") / "pytorch_model.bin", weights_only=True
    )
    assert {value.dtype for value in half.values()} == {torch.float16}
    config = json.loads((build("no-model-type", "BertModel") / "config.json").read_text())
    assert not {"model_type", "architectures"} & config.keys()
