"""What the tests share: tiny stock models, batches for every head, and the oracle.

The oracle is the judge of everything per-sample: each row alone, through the *stock* model, its loss
written out here with torch alone, autograd, float64. Sizes are odd and different from each other
(rows, sequence, hidden, vocabulary), every parameter is random (zero biases hide swaps), and eps and
activations are not the defaults.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from dpzoo.layers.embeddings import PositionEmbedding, TokenEmbedding
from dpzoo.layers.lm_head import LMHead, TiedBias
from dpzoo.layers.transposed import TransposedProjections
from dpzoo.registry import CLASSES, class_by_name, stock_class

NAMES = sorted(cls.__name__ for cls in CLASSES.values())
"""All 28 class names."""

TASK = {cls.__name__: task for (_, task), cls in CLASSES.items()}
FAMILY = {cls.__name__: family for (family, _), cls in CLASSES.items()}

TIED = [
    name
    for name in NAMES
    if TASK[name] in ("masked-lm", "causal-lm", "pre-training", "double-heads")
]
"""The classes with a vocabulary projection."""

SPARE_BIAS = [name for name in TIED if FAMILY[name] in ("bert", "roberta")]
"""Classes whose stock class has a second bias beside the decoder's."""

ROWS, SEQ, CHOICES, VOCAB, PAD = 4, 9, 3, 61, 1

_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 23,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SIZES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": {
        "vocab_size": VOCAB,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 20,
        "max_position_embeddings": 23,
        "activation": "relu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
        "qa_dropout": 0.0,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 20,
        "n_positions": 23,
        "layer_norm_epsilon": 1e-3,
        "activation_function": "silu",
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "classifier_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}
CONFIG_CLASSES = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "distilbert": transformers.DistilBertConfig,
    "gpt2": transformers.GPT2Config,
}


A_FEW = [
    "BertForSequenceClassification",
    "BertForPreTraining",
    "DistilBertForTokenClassification",
    "GPT2DoubleHeadsModel",
    "GPT2LMHeadModel",
    "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering",
]


def others_slow(values: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Parameters of a test, of which those that are not kept belong to the slow sweeps."""
    kept = list(kept)
    return [v if v in kept else pytest.param(v, marks=pytest.mark.slow) for v in values]


def tiny_config(name: str, **overrides: Any) -> Any:
    """A config for a class (by its name), small and odd, dropout 0."""
    family, task = FAMILY[name], TASK[name]
    fields = {"pad_token_id": PAD, **_SIZES[family]}
    if task == "causal-lm" and family != "gpt2":
        fields["is_decoder"] = True
    if task in ("sequence-classification", "token-classification"):
        fields["num_labels"] = 5
    return CONFIG_CLASSES[family](**{**fields, **overrides})


def randomize(model: torch.nn.Module, scale: float = 0.25) -> None:
    """Give every parameter random values; LayerNorm weights around 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, scale)
            if ("norm" in name.lower() or "ln_" in name) and name.endswith("weight"):
                parameter.add_(1.0)


def stock_model(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A randomised stock model of a class, in eval mode."""
    model = stock_class(class_by_name(name))(tiny_config(name, **overrides)).to(dtype)
    randomize(model)
    return model.eval()


def input_shape(
    name: str, rows: int = ROWS, seq: int = SEQ, embeds: bool = False
) -> tuple[int, ...]:
    """(rows, seq), or (rows, choices, seq) for the heads that choose.

    Stock double heads take embeddings of (rows, seq, hidden) only.
    """
    if TASK[name] == "multiple-choice" or (TASK[name] == "double-heads" and not embeds):
        return (rows, CHOICES, seq)
    return (rows, seq)


def padding_mask(shape: tuple[int, ...], padding: str) -> torch.Tensor | None:
    """Ones, with a different number of zeros in each sequence, on the given side; None for none."""
    if padding == "none":
        return None
    mask = torch.ones(shape, dtype=torch.long)
    for i, sequence in enumerate(mask.view(-1, shape[-1])):
        count = (0, 4, 1, 3, 5, 2)[i % 6]
        if count:
            sequence[slice(-count, None) if padding == "right" else slice(None, count)] = 0
    return mask


def inputs_for(
    name: str,
    *,
    padding: str = "right",
    embeds: bool = False,
    rows: int = ROWS,
    seq: int = SEQ,
    hidden: int = 24,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass, token types and class-token indices where the class takes them."""
    shape = input_shape(name, rows, seq, embeds)
    mask = padding_mask(shape, padding)
    if mask is not None and embeds and name == "GPT2ForSequenceClassification":
        # Stock reads the last position here, real or not; tests/models/test_padding.py is about that.
        mask[:, -1] = 1
    ids = torch.randint(4, VOCAB, shape)
    inputs: dict[str, torch.Tensor] = {}
    if mask is not None:
        ids[mask == 0] = PAD
        inputs["attention_mask"] = mask
    if embeds:
        inputs["inputs_embeds"] = torch.randn(*shape, hidden, dtype=dtype)
    else:
        inputs["input_ids"] = ids
    if FAMILY[name] in ("bert", "roberta", "gpt2"):
        inputs["token_type_ids"] = torch.randint(0, 3, shape)
    if TASK[name] == "double-heads":
        inputs["mc_token_ids"] = torch.randint(0, seq, shape[:-1])
    return inputs


def labels_for(
    name: str, rows: int = ROWS, seq: int = SEQ, embeds: bool = False
) -> dict[str, torch.Tensor]:
    """Labels that make every part of a head learn, with different numbers of labelled tokens a row."""
    task, shape = TASK[name], input_shape(name, rows, seq, embeds)
    if task == "base":
        return {}
    if task in ("masked-lm", "causal-lm", "pre-training", "double-heads", "token-classification"):
        classes = 5 if task == "token-classification" else VOCAB
        labels = torch.randint(0, classes, shape)
        for i, row in enumerate(labels):
            row.view(-1)[: 2 * i] = -100
        if task == "pre-training":
            return {"labels": labels, "next_sentence_label": torch.randint(0, 2, (rows,))}
        if task == "double-heads" and not embeds:
            return {"labels": labels, "mc_labels": torch.randint(0, CHOICES, (rows,))}
        return {"labels": labels}
    if task == "question-answering":
        starts = torch.randint(0, seq, (rows,))
        starts[1::2] = seq // 2  # the middle is padding in no row: these rows always learn
        return {
            "start_positions": starts,
            "end_positions": torch.randint(0, seq + 2, (rows,)),  # some outside: ignored
        }
    classes = {"next-sentence-prediction": 2, "multiple-choice": CHOICES}.get(task, 5)
    return {"labels": torch.randint(0, classes, (rows,))}


def batch_for(name: str, **options: Any) -> dict[str, torch.Tensor]:
    """Inputs and labels."""
    size = {key: options[key] for key in ("rows", "seq", "embeds") if key in options}
    return {**inputs_for(name, **options), **labels_for(name, **size)}


def row_of(batch: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """Row i alone, as a batch of one."""
    return {key: value[i : i + 1] for key, value in batch.items()}


LABEL_KEYS = ("labels", "next_sentence_label", "start_positions", "end_positions", "mc_labels")


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key not in LABEL_KEYS}


def _mean_over_labelled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one row, averaged over its labelled tokens; 0 if it has none."""
    labels = labels.reshape(-1)
    if bool((labels == -100).all()):
        return logits.sum() * 0
    return F.cross_entropy(logits.reshape(len(labels), -1), labels, ignore_index=-100)


def row_loss(name: str, outputs: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of one row from a model's outputs on that row alone (batch of one).

    A base model's is a fixed nonlinear function of all its outputs.
    """
    task = TASK[name]
    if task == "base":
        loss = outputs.last_hidden_state.square().sum()
        if outputs.get("pooler_output") is not None:
            loss = loss + outputs.pooler_output.sin().sum()
        return loss
    if task == "causal-lm":
        return _mean_over_labelled(outputs.logits[..., :-1, :], row["labels"][..., 1:])
    if task == "double-heads":
        language = _mean_over_labelled(outputs.logits[..., :-1, :], row["labels"][..., 1:])
        if "mc_labels" not in row:
            return language + outputs.mc_logits.sin().sum()
        return language + F.cross_entropy(outputs.mc_logits, row["mc_labels"])
    if task == "pre-training":
        following = F.cross_entropy(outputs.seq_relationship_logits, row["next_sentence_label"])
        return _mean_over_labelled(outputs.prediction_logits, row["labels"]) + following
    if task == "question-answering":
        total = outputs.start_logits.sum() * 0 + outputs.end_logits.sum() * 0
        mask = row.get("attention_mask", torch.ones(outputs.start_logits.shape))
        real = mask[0].bool()  # padding is not among the answers
        for logits, key in (
            (outputs.start_logits, "start_positions"),
            (outputs.end_logits, "end_positions"),
        ):
            position = int(row[key])
            if position < logits.shape[1] and real[position]:
                target = real[:position].sum().reshape(1)
                total = total + F.cross_entropy(logits[:, real], target) / 2
        return total
    return _mean_over_labelled(outputs.logits, row["labels"])


def batch_losses(name: str, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per-row losses (rows,) of a dpzoo model on a batch, as a training loop gets them."""
    outputs = model(**batch)
    if TASK[name] == "base":
        losses = outputs.last_hidden_state.square().flatten(1).sum(1)
        if outputs.get("pooler_output") is not None:
            losses = losses + outputs.pooler_output.sin().flatten(1).sum(1)
        return losses
    if TASK[name] == "double-heads":
        if "mc_labels" not in batch:
            return outputs.loss_per_sample + outputs.mc_logits.sin()
        return outputs.loss_per_sample + outputs.mc_loss_per_sample
    return outputs.loss_per_sample


def oracle_gradients(
    name: str, stock: Any, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Stock parameter name -> per-row gradients, (rows, *shape); under every name of a tied one."""
    rows = len(next(iter(batch.values())))
    parameters = dict(stock.named_parameters(remove_duplicate=False))
    gradients: dict[str, list[torch.Tensor]] = {key: [] for key in parameters}
    for i in range(rows):
        row = row_of(batch, i)
        stock.zero_grad(set_to_none=True)
        row_loss(name, stock(**without_labels(row)), row).backward()
        for key, parameter in parameters.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[key].append(grad.detach().clone())
    stock.zero_grad(set_to_none=True)
    return {key: torch.stack(rows_) for key, rows_ in gradients.items()}


def transposed_names(model: torch.nn.Module) -> set[str]:
    """Parameters of a dpzoo model whose stock counterpart is stored transposed."""
    return {
        f"{prefix}.{child}.weight"
        for prefix, module in model.named_modules()
        if isinstance(module, TransposedProjections)
        for child in module.transposed
    }


def in_stock_layout(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a dpzoo parameter's shape, leading dimensions aside, as the stock model stores it."""
    return tensor.transpose(-1, -2) if name in transposed_names(model) else tensor


def largest_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |got - wanted|, relative to max |wanted| where that exceeds 1."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if wanted.numel() == 0:
        return 0.0
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}
"""How far equal functions may differ, by dtype: the rounding of two layers."""


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_bit_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def assert_same_outputs(got: Any, wanted: Any, inputs: dict[str, Any], tolerance: float) -> None:
    with torch.no_grad():
        a, b = wanted(**inputs), got(**inputs)
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert largest_error(b[key].double(), value.double()) <= tolerance, key


def tied_groups(model: torch.nn.Module) -> set[frozenset[str]]:
    """Names that stand for one and the same parameter, as sets."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    for prefix, module in model.named_modules():
        if isinstance(module, TiedBias):
            groups.setdefault(id(module.bias), set()).add(f"{prefix}.bias")
    return {frozenset(names) for names in groups.values()}


def module_types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def assert_parts_keep_their_types(zoo: Any) -> None:
    """Opacus finds a sampler by the exact type of a module."""
    assert type(zoo.get_input_embeddings()) is TokenEmbedding
    positions = [m for m in zoo.modules() if type(m) is PositionEmbedding]
    assert len(positions) == 1
    head = zoo.get_output_embeddings()
    if head is not None:
        tied = head.weight is zoo.get_input_embeddings().weight
        assert type(head) is (LMHead if tied else nn.Linear)


def head_name(name: str) -> str:
    return {
        "bert": "cls.predictions.decoder.weight",
        "roberta": "lm_head.decoder.weight",
        "distilbert": "vocab_projector.weight",
        "gpt2": "lm_head.weight",
    }[FAMILY[name]]
