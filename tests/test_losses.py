"""`ModelLoss`: each row's loss is the stock model's own loss of that row alone, in float64."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dpzoo
from dpzoo import ModelLoss
from dpzoo.losses import token_losses

VOCAB, HIDDEN, ROWS, SEQ, LABELS, CHOICES = 61, 16, 3, 7, 5, 4

Batch = dict[str, torch.Tensor]

ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": LABELS,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    **{k: v for k, v in ENCODER.items() if "dropout" not in k},
    "num_key_value_heads": 1,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "summary_first_dropout": 0.0,
    "classifier_dropout": 0.0,
    "num_labels": LABELS,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "classifier_dropout": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "num_labels": LABELS,
}
IMAGE: dict[str, Any] = {
    **{k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")},
    "image_size": 8,
    "patch_size": 4,
}

HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # test -> stock class, kind of labels, config
    "llama": ("LlamaForCausalLM", "tokens", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "tokens", GPT2),
    "bert decoder": ("BertLMHeadModel", "tokens", {**ENCODER, "is_decoder": True}),
    "bert": ("BertForMaskedLM", "tokens", ENCODER),
    "deberta": ("DebertaV2ForMaskedLM", "tokens", ENCODER),
    "modernbert": (
        "ModernBertForMaskedLM",
        "tokens",
        {**ENCODER, "embedding_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "t5": ("T5ForConditionalGeneration", "tokens", T5),
    "bart": ("BartForConditionalGeneration", "tokens", BART),
    "bart decoder, which does not shift": ("BartForCausalLM", "tokens", BART),
    "bert tokens": ("BertForTokenClassification", "token classes", ENCODER),
    "llama tokens": (
        "LlamaForTokenClassification",
        "token classes",
        {**LLAMA, "classifier_dropout": 0.0},
    ),
    "bert classes": ("BertForSequenceClassification", "class", ENCODER),
    "llama classes": ("LlamaForSequenceClassification", "class", LLAMA),
    "gpt2 classes": ("GPT2ForSequenceClassification", "class", GPT2),
    "deberta classes": ("DebertaV2ForSequenceClassification", "class", ENCODER),
    "bart classes": ("BartForSequenceClassification", "class", BART),
    "several classes": ("BertForSequenceClassification", "several", ENCODER),
    "one value": ("BertForSequenceClassification", "value", {**ENCODER, "num_labels": 1}),
    "values": (
        "LlamaForSequenceClassification",
        "values",
        {**LLAMA, "problem_type": "regression"},
    ),
    "bert choices": ("BertForMultipleChoice", "choice", ENCODER),
    "electra choices": (
        "ElectraForMultipleChoice",
        "choice",
        {**ENCODER, "embedding_size": 8, "summary_last_dropout": 0.0},
    ),
    "bert span": ("BertForQuestionAnswering", "span", {**ENCODER, "num_labels": 2}),
    "gpt2 span": ("GPT2ForQuestionAnswering", "span", {**GPT2, "num_labels": 2}),
    "vit": ("ViTForImageClassification", "class", IMAGE),
    "deit": ("DeiTForImageClassification", "class", IMAGE),
    "vit, several classes": ("ViTForImageClassification", "several", IMAGE),
    "next sentence": ("BertForNextSentencePrediction", "pair", ENCODER),
    "pre-training": ("BertForPreTraining", "two", ENCODER),
    "double heads": ("GPT2DoubleHeadsModel", "double", {**GPT2, "num_labels": 1}),
}


def stock(name: str) -> Any:
    cls_name, _, fields = HEADS[name]
    cls = getattr(transformers, cls_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**fields)).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def batch_of(name: str, rows: int = ROWS) -> tuple[Batch, Batch]:
    """Inputs, and labels by the names that the stock model gives them."""
    cls_name, kind, _ = HEADS[name]
    torch.manual_seed(1)
    inputs: Batch
    if "Image" in cls_name:
        inputs = {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=torch.float64)}
    else:
        shape = (rows, CHOICES, SEQ) if kind in ("choice", "double") else (rows, SEQ)
        inputs = {"input_ids": torch.randint(4, VOCAB, shape)}
        inputs["input_ids"][..., -1] = 2  # BART's classifier wants one end in each row
    classes = torch.randint(0, LABELS, (rows,))
    tokens = torch.randint(0, LABELS if kind == "token classes" else VOCAB, (rows, SEQ))
    if rows:
        tokens[0, :3] = -100  # rows have different numbers of labels
        tokens[1:2, 5:] = -100
    if kind in ("tokens", "token classes"):
        return inputs, {"labels": tokens}
    if kind == "class":
        return inputs, {"labels": classes}
    if kind == "several":
        return inputs, {"labels": torch.randint(0, 2, (rows, LABELS)).double()}
    if kind == "value":
        return inputs, {"labels": torch.randn(rows, dtype=torch.float64)}
    if kind == "values":
        return inputs, {"labels": torch.randn(rows, LABELS, dtype=torch.float64)}
    if kind == "choice":
        return inputs, {"labels": torch.randint(0, CHOICES, (rows,))}
    if kind == "span":
        starts, ends = torch.randint(0, SEQ, (rows,)), torch.randint(0, SEQ, (rows,))
        return inputs, {"start_positions": starts, "end_positions": ends}
    if kind == "pair":
        return inputs, {"labels": torch.randint(0, 2, (rows,))}
    if kind == "two":
        return inputs, {"labels": tokens, "next_sentence_label": torch.randint(0, 2, (rows,))}
    inputs["mc_token_ids"] = torch.full((rows, CHOICES), SEQ - 1)
    choices = torch.randint(0, VOCAB, (rows, CHOICES, SEQ))
    return inputs, {"labels": choices, "mc_labels": torch.randint(0, CHOICES, (rows,))}


def inputs_of(model: Any, inputs: Batch, labels: Batch) -> Batch:
    """Encoder-decoders need a decoder's input; the stock model would make it of the labels."""
    if type(model).__name__.endswith("ConditionalGeneration"):
        shifted = labels["labels"].roll(1, -1).masked_fill(labels["labels"].roll(1, -1) == -100, 0)
        return {**inputs, "decoder_input_ids": shifted}
    return inputs


@pytest.mark.parametrize("name", HEADS)
def test_rows_losses_are_the_stock_losses_of_the_rows(name: str) -> None:
    model, (inputs, labels) = stock(name), batch_of(name)
    inputs = inputs_of(model, inputs, labels)
    before = dict(model.config.to_dict())
    got = ModelLoss(model, reduction="none")(model(**inputs), **labels)
    assert model.config.to_dict() == before, "the model's config is left as it is"
    assert got.shape == (ROWS,)
    assert got.dtype == torch.float64
    for i in range(ROWS):
        row = {k: v[i : i + 1] for k, v in {**inputs, **labels}.items()}
        out = model(**row)
        want = out.loss + out.mc_loss if "double" in name else out.loss
        # transformers casts a language model's logits to float32 for its loss.
        assert abs(float((got[i] - want).detach())) <= 1e-6 * float(want.detach()), i
        if want.dtype == torch.float64:
            assert abs(float((got[i] - want).detach())) <= 1e-12 * float(want.detach()), i


@pytest.mark.parametrize("name", HEADS)
def test_a_task_says_the_same_as_the_model(name: str) -> None:
    model, (inputs, labels) = stock(name), batch_of(name)
    outputs = model(**inputs_of(model, inputs, labels))
    criterion = ModelLoss(model, reduction="none")
    by_class = ModelLoss(type(model), reduction="none")
    assert by_class.task == criterion.task
    if "problem_type" not in HEADS[name][2]:
        by_task = ModelLoss(criterion.task, reduction="none")
        assert torch.equal(by_task(outputs, **labels), criterion(outputs, **labels))
        assert torch.equal(by_class(outputs, **labels), criterion(outputs, **labels))


@pytest.mark.parametrize("name", HEADS)
def test_empty_batches_and_reductions(name: str) -> None:
    model, (inputs, labels) = stock(name), batch_of(name)
    outputs = model(**inputs_of(model, inputs, labels))
    empty = type(outputs)(**{k: v[:0] for k, v in outputs.items() if isinstance(v, torch.Tensor)})
    none = {k: v[:0] for k, v in labels.items()}
    assert ModelLoss(model, reduction="none")(empty, **none).shape == (0,)
    assert float(ModelLoss(model)(empty, **none)) == 0
    rows = ModelLoss(model, reduction="none")(outputs, **labels)
    torch.testing.assert_close(ModelLoss(model)(outputs, **labels), rows.mean())
    torch.testing.assert_close(ModelLoss(model, reduction="sum")(outputs, **labels), rows.sum())


def test_a_row_without_labels_has_loss_and_gradient_zero() -> None:
    model, (inputs, labels) = stock("llama"), batch_of("llama")
    labels["labels"][1] = -100
    losses = ModelLoss(model, reduction="none")(model(**inputs), labels["labels"])
    assert losses[1] == 0
    grads = torch.autograd.grad(losses[1], list(model.parameters()))
    assert all((g == 0).all() for g in grads)


def test_half_precision_is_widened() -> None:
    logits = torch.randn(2, 5, VOCAB, dtype=torch.bfloat16)
    labels = torch.randint(0, VOCAB, (2, 5))
    out = transformers.modeling_outputs.MaskedLMOutput(logits=logits)
    losses = ModelLoss("masked-lm", reduction="none")(out, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_losses(logits.float(), labels))


def test_spans_ignore_padding_and_positions_outside() -> None:
    model, (inputs, _) = stock("bert span"), batch_of("bert span")
    mask = torch.ones(ROWS, SEQ, dtype=torch.long)
    mask[0, 4:] = 0
    outputs = model(**inputs, attention_mask=mask)
    starts, ends = torch.tensor([1, 2, 3]), torch.tensor([5, 4, SEQ + 9])
    losses = ModelLoss(model, reduction="none")(outputs, (starts, ends), attention_mask=mask)
    first = F.cross_entropy(outputs.start_logits[:1, :4], starts[:1])  # its end is in the padding
    last = F.cross_entropy(outputs.start_logits[2:], starts[2:])  # its end is outside
    torch.testing.assert_close(losses[0], first / 2)
    torch.testing.assert_close(losses[2], last / 2)


def test_wrapped_models_are_known() -> None:
    peft = pytest.importorskip("peft")
    model = stock("llama")
    assert (
        ModelLoss(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))).task
        == "causal-lm"
    )
    assert ModelLoss(nn.DataParallel(stock("bert span"))).task == "question-answering"

    class Mine(transformers.LlamaForCausalLM):
        pass

    assert ModelLoss(Mine).task == "causal-lm"


@pytest.mark.parametrize("mode", ["ghost", "bk", "hooks"])
def test_engines_take_it(mode: str) -> None:
    """Clipped sums of a stock model, against the rows alone."""
    name = "vit" if mode == "ghost" else "llama"
    model, (inputs, labels) = stock(name), batch_of(name)
    want: dict[str, torch.Tensor] = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    clip = 0.3
    for i in range(ROWS):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        loss = ModelLoss(model)(model(**row), labels["labels"][i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        for (n, _), g in zip(model.named_parameters(), grads, strict=True):
            want[n] += g * (clip / (norm + 1e-6)).clamp(max=1)
    data = [{k: v[i] for k, v in inputs.items()} for i in range(ROWS)]
    engine: Any = dpzoo.PrivacyEngine(accountant="rdp")
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=ROWS),  # type: ignore[arg-type]
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
        criterion=ModelLoss(model),
        grad_sample_mode=mode,
    )
    criterion = ModelLoss(made[0]) if mode == "hooks" else made[2]
    made[1].zero_grad()
    criterion(made[0](**inputs), labels["labels"]).backward()
    made[1].step()
    # Opacus' own arithmetic is partly in float32.
    tolerance = 1e-9 if mode == "bk" else 1e-6
    total = torch.stack([w.norm() for w in want.values()]).norm()
    for n, p in model.named_parameters():
        assert p.grad is not None
        assert float((p.grad * ROWS - want[n]).norm()) <= tolerance * float(total), n


def _error(*args: Any, **kwargs: Any) -> str:
    criterion, *rest = args
    with pytest.raises(dpzoo.InputError) as caught:
        criterion(*rest, **kwargs)
    return str(caught.value)


def test_errors_say_what_to_do() -> None:
    model, (inputs, labels) = stock("llama"), batch_of("llama")
    y = labels["labels"]
    outputs = model(**inputs, labels=y)
    assert "a mean over the batch" in _error(ModelLoss(model), outputs.loss, y)
    assert "return_dict=True" in _error(ModelLoss(model), model(**inputs, return_dict=False), y)
    assert "got labels = NoneType" in _error(ModelLoss(model), outputs)
    assert "(3, 6), wanted (3, 7)" in _error(ModelLoss(model), outputs, y[:, 1:])
    assert "dpzoo.ModelLoss(model)(model(**inputs), labels)" in _error(ModelLoss(), outputs, y)
    assert "wanted a model or one of: causal-lm" in _error(ModelLoss, "none")
    span = stock("bert span")(**inputs)
    assert "(start_positions, end_positions)" in _error(ModelLoss("question-answering"), span, y)
    with pytest.raises(dpzoo.UnsupportedModelError, match="does not know the head of LlamaModel"):
        ModelLoss(transformers.LlamaModel)
    with pytest.raises(dpzoo.UnsupportedModelError, match="head of ProphetNetForCausalLM"):
        ModelLoss(transformers.ProphetNetForCausalLM)  # its stock loss is one of its own
    with pytest.raises(dpzoo.UnsupportedModelError, match="ModelLoss\\('causal-lm'\\)"):
        ModelLoss(nn.Linear(2, 2))
