"""A batch for a transformers model, from its config."""

from typing import Any

import torch
from transformers import PreTrainedModel

from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.example_batch import ROWS, SEQ, example_batch
from dpzoo.families.tiny import AUTO_CLASSES, Sizes, batch, pixels
from dpzoo.losses import ModelLoss, unwrapped
from dpzoo.registry import CLASSES


def batch_of(model: Any, texts: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A batch with labels for a transformers model, dpzoo's or a stock one, from its config.

    Args:
        model: also wrapped by PEFT.
        texts: as in `example_batch`.

    Returns:
        What its forward takes, 4 rows; text rows have different lengths.

    Raises:
        InputError: it is no transformers model, or takes neither text nor images; token ids of ``texts``
            that it does not have.
    """
    stock = unwrapped(model)
    if not isinstance(stock, PreTrainedModel):
        raise InputError(
            f"audit got no batch for a {type(model).__name__}, wanted one: a batch can be made for "
            f"transformers models alone, from their config. Pass what the model takes: audit(model, batch)."
        )
    config = stock.config
    text, image = config.get_text_config(), stock.main_input_name == "pixel_values"
    words = getattr(text, "vocab_size", None)
    if texts is not None and (image or int(texts["input_ids"].max()) >= (words or 0)):
        raise InputError(
            f"The tokenizer gives token ids up to {int(texts['input_ids'].max())}, and "
            f"{type(stock).__name__} takes {'images' if image else f'ids below {words}'}. Wanted the "
            f"model's own tokenizer."
        )
    for (_, own), cls in CLASSES.items():
        if isinstance(stock, cls):
            return example_batch(own, config, texts)
    try:
        task = ModelLoss(stock).task
    except UnsupportedModelError:
        task = "base"
    if not image and not isinstance(words, int):
        raise InputError(
            f"audit makes batches of text and of images, and {type(stock).__name__} takes "
            f"{stock.main_input_name}. Pass a batch: audit(model, batch)."
        )
    if image and task == "base":
        return {"pixel_values": pixels(config, ROWS)}
    if task not in AUTO_CLASSES or texts is not None:
        made = example_batch("causal-lm" if task == "seq2seq-lm" else str(task), text, texts)
        if config.is_encoder_decoder:
            made["decoder_input_ids"] = made["input_ids"].clone()
        return made
    vocabulary = Sizes.vocab if image else text.vocab_size
    inputs, labels = batch(
        stock, sizes=Sizes(rows=ROWS, seq=SEQ, vocab=vocabulary, labels=config.num_labels)
    )
    if "attention_mask" in inputs and text.pad_token_id is not None:
        inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, text.pad_token_id)
    return {**inputs, "labels": labels}
