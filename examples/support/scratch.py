"""A small GPT-2 with random weights, and a tokenizer of its own: for where there is no hub to load from.

A tokenizer trained on private rows is not private: its vocabulary spells out what they hold, and no noise
was added to it. So the default here is public text, the documentation strings of Python's library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

import dpzoo
from support.data import docs_data
from support.training import DEVICE, load

END = "<|endoftext|>"


def public_texts() -> list[str]:
    docs = docs_data(seed=0, heldout_share=0.01, max_train_rows_per_label=100_000)
    return [row.text for row in docs.train]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, of at most `vocabulary` tokens; END is the only special one."""
    bytes_ = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = bytes_(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=bytes_.alphabet(),  # so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = {"bos_token": END, "eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def small_gpt2(
    tokenizer: PreTrainedTokenizerFast, *, positions: int, layers: int, hidden: int, heads: int
) -> PreTrainedModel:
    """A GPT2LMHeadModel for the tokenizer, with its head tied to its token embedding, dropout 0."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    )
    return dpzoo.from_config(config, task="causal-lm")


def build(recipe: Any, texts: Sequence[str] | None) -> tuple[Any, Any]:
    """A pretrained model, or a random one with a tokenizer trained on `texts` (None: public ones)."""
    if recipe.model != "none":
        return load(recipe.model, "causal-lm")
    tokenizer = train_tokenizer(texts or public_texts(), recipe.vocabulary)
    sizes = {name: getattr(recipe, name) for name in ("layers", "hidden", "heads")}
    return small_gpt2(tokenizer, positions=recipe.max_length, **sizes).to(DEVICE), tokenizer
