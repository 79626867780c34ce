"""Stock architectures in mode "bk": every row and parameter against the row alone, in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dpzoo
from dpzoo import families
from dpzoo.families import trial
from dpzoo.families.__main__ import main
from dpzoo.families.record import markdown, recorded, verdict, write
from dpzoo.families.sweep import sweep

CAUSAL = """
    bloom deepseek_v3 falcon gemma gemma2 gemma3_text gpt2 gpt_neo gpt_neox gpt_oss gptj granite jamba
    llama mamba mistral mixtral olmo2 opt phi phi3 qwen2 qwen3 qwen3_moe qwen3_next smollm3 stablelm
    whisper
"""
MASKED = "bert deberta layoutlm modernbert"
CLASSIFIERS = """
    albert bert camembert convbert deberta deberta-v2 distilbert electra funnel llama mobilebert mpnet
    nystromformer qwen2 roformer squeezebert xlm-roberta xlnet
"""
SEQ2SEQ = "bart mbart pegasus t5"
IMAGES = "beit convnext deit dinov2 swin vit"

NAMES = [
    f"{task}/{kind}"
    for task, kinds in (
        ("causal-lm", CAUSAL),
        ("masked-lm", MASKED),
        ("sequence-classification", CLASSIFIERS),
        ("seq2seq-lm", SEQ2SEQ),
        ("image-classification", IMAGES),
    )
    for kind in kinds.split()
]

COINCIDING = [
    "causal-lm/gpt2",
    "causal-lm/llama",
    "causal-lm/mamba",
    "causal-lm/mixtral",
    "causal-lm/gemma2",
    "masked-lm/bert",
    "sequence-classification/deberta-v2",
    "seq2seq-lm/t5",
    "image-classification/vit",
    "image-classification/swin",
]
"""Rows, tokens, labels and the size of a head are one number, and it divides the hidden size."""


def assert_exact(result: families.Result) -> None:
    assert result.runs == "yes"
    assert result.modes == {"bk": "exact"}, result
    tolerance = 1e-6 if result.float32 else 1e-9
    assert 0 <= result.error["bk"] <= tolerance
    # transformers' loss is in float32.
    assert result.loss is None or result.loss <= 1e-6, "ModelLoss is the stock loss of a row alone"


def test_sixty() -> None:
    assert len(set(NAMES)) == 60
    assert set(NAMES) <= set(families.architectures())


def _slow(names: list[str]) -> list[Any]:
    """Swin shifts its windows: a step of it takes longer than all others together."""
    slow = "image-classification/swin"
    return [pytest.param(n, marks=pytest.mark.slow) if n == slow else n for n in names]


@pytest.mark.parametrize("name", _slow(NAMES))
def test_exact(name: str) -> None:
    assert_exact(families.examine(name, ["bk"]))


@pytest.mark.parametrize("name", _slow(COINCIDING))
def test_exact_where_sizes_coincide(name: str) -> None:
    assert_exact(families.examine(name, ["bk"], families.COINCIDING))


def test_a_tiny_instance_is_what_it_says() -> None:
    model, task = families.build("llama")
    assert task == "causal-lm"
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.std() > 0 for p in model.parameters()), "norms are not all ones"
    assert model.config.num_key_value_heads == 2 < model.config.num_attention_heads
    for name in ("gpt2", "sequence-classification/albert"):
        rates = [m.p for m in families.build(name)[0].modules() if isinstance(m, nn.Dropout)]
        assert rates
        assert not any(rates), name
    assert families.build("seq2seq-lm/bart")[0].config.dropout == 0
    hybrid = families.build("qwen3_next")[0].config
    assert len(set(hybrid.layer_types)) == 2, "a layer of each kind"
    inputs, labels = families.batch(model)
    assert labels.shape == (4, 9)
    assert inputs["attention_mask"].sum(1).tolist() == [9, 9, 9, 7]
    assert (labels[-1, -2:] == -100).all()
    inputs, labels = families.batch(model, rows=2, seq=5)
    assert labels.shape == inputs["input_ids"].shape == (2, 5)


def test_the_oracle_is_each_row_alone() -> None:
    model, _ = families.build("gpt2")
    inputs, labels = families.batch(model)
    rows = families.oracle(model, inputs, labels)
    losses = families.row_losses(model, inputs, labels)
    for i, row in enumerate(rows):
        grads = torch.autograd.grad(losses[i], list(model.parameters()), retain_graph=True)
        want = dict(zip(dict(model.named_parameters()), grads, strict=True))
        assert families.largest_error(row, want) <= 1e-12


def test_what_is_wrong_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "masked-lm/bert"
    inner = trial.step

    def one_parameter_off(*args: Any) -> Any:
        sums, norms = inner(*args)
        sums["cls.predictions.bias"] *= 1.001
        return sums, norms

    def one_row_off(*args: Any) -> Any:
        sums, norms = inner(*args)
        norms[2] *= 1.001
        return sums, norms

    def swapped_rows(*args: Any) -> Any:
        return [*rows(*args)[1:], rows(*args)[0]]

    for planted in (one_parameter_off, one_row_off):
        monkeypatch.setattr(trial, "step", planted)
        assert families.examine(name, ["bk"]).modes["bk"].startswith("WRONG")
    monkeypatch.setattr(trial, "step", inner)
    rows = trial.rows_of_bk
    monkeypatch.setattr(trial, "rows_of_bk", swapped_rows)
    assert families.examine(name, ["bk"]).modes["bk"].startswith("WRONG")

    def refusing(*args: Any) -> Any:
        raise dpzoo.InputError("this layer\nand more")

    monkeypatch.setattr(trial, "step", refusing)
    assert families.examine(name, ["bk"]).modes["bk"] == "refused: InputError: this layer"


def test_a_gradient_that_is_not_a_number_is_wrong() -> None:
    nan, one = {"w": torch.tensor([float("nan")])}, {"w": torch.ones(1)}
    assert families.largest_error(nan, one) == float("inf")
    assert families.largest_error({}, one) == 1


def test_one_that_hangs_stops_nothing() -> None:
    results = sweep(["causal-lm/llama", "masked-lm/bert"], ["bk"], jobs=2, seconds=0.0)
    assert [one.runs for one in results] == ["no result after 0 s"] * 2


def test_the_command_writes_the_page_and_the_record(tmp_path: Path, capsys: Any) -> None:
    page, data = tmp_path / "models.md", tmp_path / "record.json"
    words = ["--only", "causal-lm/llama", "--mode", "bk"]
    assert main([*words, "--json", str(data), "--markdown", str(page)]) == 0
    assert "causal-lm/llama" in capsys.readouterr().out
    text = page.read_text("utf-8")
    assert "| llama | LlamaForCausalLM | - | - | **exact** |" in text
    assert "python -m dpzoo.families --only causal-lm/llama" in text
    (one,) = json.loads(data.read_text("utf-8"))["results"]
    assert one["modes"] == {"bk": "exact"}
    with pytest.raises(dpzoo.InputError, match="--only got 'lama', and no architecture"):
        main(["--only", "lama"])


def test_the_packaged_record_and_the_page_agree(tmp_path: Path) -> None:
    versions, results = recorded()
    page = Path(__file__).parents[1].joinpath("docs", "models.md").read_text("utf-8")
    for name, number in versions.items():
        assert f"{name} {number}" in page
    command = page.split("python -m ")[1].split("\n")[0]
    made = markdown(results, f"python -m {command}")
    assert [line for line in made.splitlines() if line.startswith("|")] == [
        line for line in page.splitlines() if line.startswith("|")
    ]
    assert sum(verdict(one, "bk") == "exact" for one in results) >= 100
    assert not any(verdict(one, "bk") == "WRONG" for one in results)
    again = tmp_path / "again.json"
    write(again, results)
    assert json.loads(again.read_text("utf-8"))["results"][0]["name"] == results[0].name


def test_unknown_names() -> None:
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=r"no architecture 'lama'.*architectures\(\)"
    ):
        families.build("lama")
    with pytest.raises(dpzoo.UnsupportedModelError, match="no architecture 'causal-lm/lama'"):
        families.build("causal-lm/lama")
