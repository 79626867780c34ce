"""PEFT's methods around stock models, in mode "bk": each row against the row alone, in float64."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from dpzoo.clipping.module import BookKeepingHooks
from tests.clipping.test_uses import OneRow

SIZE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZE, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(
        **SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, **options
    )
    config.bos_token_id = config.eos_token_id = 2
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    config.decoder_start_token_id = config.pad_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "llama": (llama, "CAUSAL_LM", ["q_proj", "v_proj"], ["k_proj", "down_proj"], "embed_tokens"),
    "gpt2": (gpt2, "CAUSAL_LM", ["c_attn"], ["c_attn", "c_proj"], "wte"),
    "bert": (bert, "SEQ_CLS", ["query", "value"], ["key", "output.dense"], "word_embeddings"),
    "t5": (t5, "SEQ_2_SEQ_LM", ["q", "v"], ["k", "wo"], "embed_tokens"),
}


def method(kind: str, name: str) -> Any:
    _, task, targets, fed, table = MODELS[name]
    forward = [t for t in fed if t in ("down_proj", "c_proj", "output.dense", "wo")]
    return {
        "LoRA": lambda: peft.LoraConfig(task_type=task, r=2, target_modules=targets),
        "LoRA of the table": lambda: peft.LoraConfig(task_type=task, r=2, target_modules=[table]),
        "DoRA": lambda: peft.LoraConfig(task_type=task, r=2, target_modules=targets, use_dora=True),
        "rsLoRA": lambda: peft.LoraConfig(
            task_type=task, r=2, target_modules=targets, use_rslora=True
        ),
        "IA3": lambda: peft.IA3Config(
            task_type=task, target_modules=[*fed], feedforward_modules=forward
        ),
        "VeRA": lambda: peft.VeraConfig(task_type=task, r=4, target_modules=targets),
        "layer norms": lambda: peft.LNTuningConfig(
            task_type=task, target_modules=["LayerNorm"] if name == "bert" else None
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=3, encoder_hidden_size=8
        ),
        "tokens": lambda: peft.LoraConfig(
            task_type=task, r=2, target_modules=targets, trainable_token_indices=[5, 6, 7]
        ),
    }[kind]()


KINDS = (
    *("LoRA", "LoRA of the table", "DoRA", "rsLoRA", "IA3", "VeRA", "layer norms"),
    *("prefix", "prompt", "p-tuning", "tokens"),
)

# PEFT itself does not run these on the stock model, privacy or not.
NOT_RUN = {("prefix", "bert"), ("VeRA", "gpt2")}


def losses(model: nn.Module, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if name == "bert":
        logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
        return F.cross_entropy(logits, batch["ids"][:, 0] % 3, reduction="none")
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
    if name == "t5":
        inputs["decoder_input_ids"] = batch["ids"][:, :5]
    logits = model(**inputs).logits
    targets = batch["ids"][:, : logits.shape[1]] if name == "t5" else batch["ids"][:, 1:]
    logits = logits[:, -targets.shape[1] - (name != "t5") :]
    logits = logits if name == "t5" else logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_exact(kind: str, name: str) -> None:
    if (kind, name) in NOT_RUN:
        return
    torch.manual_seed(0)
    model = peft.get_peft_model(MODELS[name][0](), method(kind, name)).double().train()
    for p in model.parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p) * 0.2)
    batch = {"ids": torch.randint(3, 61, (4, 7)), "mask": torch.ones(4, 7, dtype=torch.long)}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    alone = [
        torch.autograd.grad(
            losses(model, name, {k: v[i : i + 1] for k, v in batch.items()}).sum(),
            parameters,
            allow_unused=True,
        )
        for i in range(4)
    ]
    assert any(g is not None and float(g.norm()) > 0 for g in alone[0])
    watched = BookKeepingHooks(model)
    for i in range(4):
        taken = OneRow(model, i)
        watched.backward(losses(model, name, batch), taken)
        scale = float(sum(g.square().sum() for g in alone[i] if g is not None)) ** 0.5
        for (key, p), grad in zip(named, alone[i], strict=True):
            want = torch.zeros_like(p) if grad is None else grad
            got = taken.sums.get(p, torch.zeros_like(p))
            assert float((got - want).norm()) <= 1e-9 * scale, (key, i)
            if p in taken.norms:
                assert abs(float(taken.norms[p][i] - want.norm())) <= 1e-9 * scale, (key, i)
