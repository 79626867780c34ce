"""The private head: its features, its training against each row alone, its stock checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

import dpzoo
from dpzoo import heads
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.heads import output_layer, pool_by_mean, read_features, train_head

WORDS = ("good", "bad", "film", "the", "was", "very")
TEXTS = ["the film was good", "bad", "the film was very very bad", "good film", "very good"]
SMALL = {"vocab_size": 11, "num_labels": 3, "pad_token_id": 0}
LAYERS = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def build(family: str) -> Any:
    torch.manual_seed(1)
    model: Any
    if family in ("bert", "dpzoo-bert"):
        model = BertForSequenceClassification(BertConfig(**SMALL, **LAYERS))
    elif family == "roberta":
        model = RobertaForSequenceClassification(RobertaConfig(**SMALL, **LAYERS))
    elif family == "distilbert":
        model = DistilBertForSequenceClassification(
            DistilBertConfig(**SMALL, dim=12, n_layers=2, n_heads=3, hidden_dim=20)
        )
    else:
        model = GPT2ForSequenceClassification(GPT2Config(**SMALL, n_embd=12, n_layer=2, n_head=3))
    for parameter in model.parameters():  # zero biases would hide a swap
        nn.init.normal_(parameter, std=0.3)
    return dpzoo.convert(model) if family == "dpzoo-bert" else model


FAMILIES = ["bert", "dpzoo-bert", "roberta", "distilbert", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_the_features_is_the_model(family: str, tokenizer: Any) -> None:
    """Each row alone, by the whole model, against its features by the last layer; dropout is off."""
    model = build(family).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = read_features(model, tokenizer, TEXTS, max_length=8, batch_size=2)
    assert model.training
    assert values.shape == (5, 12)
    _, layer = output_layer(model)
    assert isinstance(layer, nn.Linear)
    model.eval()
    for text, row in zip(TEXTS, values, strict=True):
        alone = tokenizer([text], truncation=True, max_length=8, return_tensors="pt")
        torch.testing.assert_close(layer(row), model(**alone).logits[0], rtol=0, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["bert", "dpzoo-bert", "roberta"])
def test_pooling_is_the_mean_of_all_tokens(family: str, tokenizer: Any) -> None:
    model = build(family).eval()
    norm = pool_by_mean(model)
    values = read_features(model, tokenizer, TEXTS)
    assert norm == pytest.approx(0.1 * 12**0.5)
    torch.testing.assert_close(values.norm(dim=1), torch.full((5,), norm), rtol=0.02, atol=0)
    body = model.roberta if family == "roberta" else model.bert
    for text, row in zip(TEXTS, values, strict=True):
        ids = tokenizer([text], return_tensors="pt")
        states = body(**ids, output_hidden_states=True).hidden_states[2][0]
        mean = torch.nn.functional.layer_norm(states.mean(0) + states[0] / 1000, (12,))
        torch.testing.assert_close(row, torch.tanh(mean / 10), rtol=0, atol=1e-4)


def test_a_row_has_its_features_whatever_the_others_are(tokenizer: Any) -> None:
    model = build("bert")
    pool_by_mean(model)
    one = read_features(model, tokenizer, TEXTS)
    other = read_features(model, tokenizer, ["very " * 9, *TEXTS[1:][::-1], TEXTS[0]])
    torch.testing.assert_close(one[0], other[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(one[1:], other[1:-1].flip(0), rtol=0, atol=1e-6)


def blobs(rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(rows) % 3
    centres = torch.eye(3, 12) * 3
    return centres[labels] + 0.3 * torch.randn(rows, 12, generator=generator), labels


def test_training_moves_the_last_layer_alone_and_spends_what_it_may(tokenizer: Any) -> None:
    model = build("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values, labels = blobs()
    run = train_head(model, values, labels, epsilon=8.0, delta=1e-3, epochs=10, accountant="rdp")
    assert run.epsilon is not None
    assert 7.0 < run.epsilon <= 8.0
    assert (run.delta, run.steps, run.sample_rate) == (1e-3, 20, 0.5)
    assert run.noise_multiplier is not None
    assert run.noise_multiplier > 0.5
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"classifier.weight", "classifier.bias"}
    assert (model.classifier(values).argmax(1) == labels).float().mean() > 0.8
    assert not model.classifier._forward_hooks  # the engine's


def test_without_privacy(tokenizer: Any) -> None:
    model = build("bert")
    values, labels = blobs()
    run = train_head(model, values, labels, epsilon=None, epochs=5, batch_size=100)
    assert (run.epsilon, run.delta, run.noise_multiplier, run.steps) == (None, None, None, 15)
    assert (model.classifier(values).argmax(1) == labels).float().mean() > 0.95


def test_a_row_moves_the_weights_by_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise: one step from zero is the mean of gradients that are each clipped to C.

    Features of norm 1e6 would, unclipped, move the weights a million times further.
    """
    values, labels = blobs(40)
    values[7] *= 1e6
    real = heads.PrivacyEngine.make_private_with_epsilon

    def silent(self: Any, **kwargs: Any) -> Any:
        for name in ("target_epsilon", "target_delta", "epochs"):
            kwargs.pop(name)
        return self.make_private(**kwargs, noise_multiplier=0.0, poisson_sampling=False)

    monkeypatch.setattr(heads.PrivacyEngine, "make_private_with_epsilon", silent)
    monkeypatch.setattr(heads.PrivacyEngine, "get_epsilon", lambda self, delta: 0.0)
    assert real is not silent
    model = build("bert")
    scale, rate, clip = 2.0, 0.7, 0.5
    monkeypatch.setattr(heads.math, "ceil", lambda x: 40)  # one step with all rows
    train_head(
        model,
        values,
        labels,
        epsilon=8.0,
        delta=1e-3,
        epochs=1,
        learning_rate=rate,
        max_grad_norm=clip,
        feature_norm=scale,
    )
    total_w, total_b = torch.zeros(3, 12), torch.zeros(3)
    for row, label in zip(values / scale, labels, strict=True):  # each row alone, by autograd
        layer = nn.Linear(12, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        nn.functional.cross_entropy(layer(row)[None], label[None]).backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        norm = float((layer.weight.grad.norm() ** 2 + layer.bias.grad.norm() ** 2) ** 0.5)
        factor = min(1.0, clip / norm)
        total_w += factor * layer.weight.grad
        total_b += factor * layer.bias.grad
    torch.testing.assert_close(
        model.classifier.weight, -rate * total_w / 40 / scale, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(model.classifier.bias, -rate * total_b / 40, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "dpzoo-bert"])
def test_a_stock_pipeline_runs_what_was_saved(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build(family)
    norm = pool_by_mean(model)
    values = read_features(model, tokenizer, TEXTS)
    labels = torch.tensor([2, 0, 0, 2, 1])
    train_head(
        model, values, labels, epsilon=8.0, delta=0.1, epochs=3, accountant="rdp", feature_norm=norm
    )
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(stock) is BertForSequenceClassification
    assert stock.config.num_hidden_layers == 3
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = stock(**batch).logits
    torch.testing.assert_close(logits, model.eval()(**batch).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, model.classifier(values), rtol=0, atol=1e-6)
    classify = pipeline("text-classification", str(tmp_path / "out"))
    assert [answer["label"] for answer in classify(TEXTS)] == [
        f"LABEL_{i}" for i in logits.argmax(1)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 5)}, r"features of shape \(4, 5\), wanted \(rows, 12\)"),
        ({"values": torch.zeros(1, 12)}, r"shape \(1, 12\), wanted .* at least 2 rows"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels of shape \(3,\).*wanted \(4,\)"),
        ({"labels": torch.zeros(4)}, r"torch\.float32, wanted \(4,\), torch\.int64"),
        (
            {"labels": torch.tensor([0, 1, 2, 3])},
            r"labels from 0 to 3, wanted 0 to 2.*num_labels=4",
        ),
        ({"labels": torch.tensor([0, -100, 2, 1])}, r"labels from -100 to 2, wanted 0 to 2"),
        ({"delta": None}, r"an epsilon and no delta"),
        ({"epsilon": 0.0}, r"target_epsilon=0\.0, wanted a positive number"),
        ({"delta": 1.5}, r"target_delta=1\.5, wanted a number between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"values": torch.zeros(4, 12), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(InputError, match=message):
        train_head(build("bert"), **{**good, "epsilon": 1.0, "delta": 0.1, **change})


def test_models_without_a_head_or_a_pooler_are_refused(tokenizer: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Sequential has no linear layer at classifier\.out_"
    ):
        output_layer(nn.Sequential())
    with pytest.raises(UnsupportedModelError, match=r"pool_by_mean got a GPT2For.*bert, roberta"):
        pool_by_mean(build("gpt2"))
    with pytest.raises(InputError, match=r"got 0 texts"):
        read_features(build("bert"), tokenizer, [])
