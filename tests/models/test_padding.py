"""A row does not depend on how far it is padded, and padding is what the model was built with."""

from typing import Any

import pytest
import torch

import dpzoo
from tests.support import (
    CHOICES,
    PAD,
    ROUNDING,
    ROWS,
    SEQ,
    VOCAB,
    largest_error,
    stock_model,
)

EXACT = ROUNDING[torch.float64]
LENGTHS = (9, 4, 1, 6)


def padded(given: str, side: str, *leading: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of (ROWS, *leading, SEQ) and the mask of rows of LENGTHS real tokens, padded on a side."""
    mask = torch.zeros(ROWS, *leading, SEQ, dtype=torch.long)
    positions = torch.zeros_like(mask)
    for i, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(SEQ - length, SEQ)
        mask[i, ..., place] = 1
        positions[i, ..., place] = torch.arange(length)
    if given == "embeds":
        return {
            "inputs_embeds": torch.randn(*mask.shape, 24).double(),
            "position_ids": positions,
        }, mask
    return {"input_ids": torch.randint(4, VOCAB, mask.shape), "position_ids": positions}, mask


def alone(inputs: dict[str, Any], mask: torch.Tensor, i: int) -> dict[str, Any]:
    """Row i as a batch of one, without its padding (and so without positions, which are the default)."""
    key = next(iter(inputs))
    real, dim = mask[i].reshape(-1, SEQ)[0].bool(), mask.ndim - 1
    return {key: inputs[key][i : i + 1].movedim(dim, 0)[real].movedim(0, dim)}


@pytest.mark.parametrize("pad", [PAD, None], ids=["pad", "no-pad"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("given", ["embeds", "ids"])
def test_gpt2_classifies_by_the_last_real_token(given: str, side: str, pad: int | None) -> None:
    """The oracle: the stock model, on each row alone and without padding."""
    if given == "ids" and pad is not None:
        pad = VOCAB - 1  # not among the ids below the mask: there the mask alone must not count
    stock = stock_model("GPT2ForSequenceClassification", pad_token_id=pad)
    zoo = dpzoo.convert(stock)
    inputs, mask = padded(given, side)
    if given == "ids":
        inputs["input_ids"] = inputs["input_ids"].clamp(max=VOCAB - 2)
        if pad is not None:
            inputs["input_ids"][mask == 0] = pad
    labels = torch.tensor([0, 3, 1, 4])
    got = zoo(**inputs, attention_mask=mask, labels=labels)
    for i in range(ROWS):
        wanted = stock(**alone(inputs, mask, i), labels=labels[i : i + 1])
        assert largest_error(got.logits[i], wanted.logits[0]) <= EXACT
        assert largest_error(got.loss_per_sample[i], wanted.loss) <= EXACT


@pytest.mark.parametrize("side", ["right", "left"])
def test_gpt2s_second_head_reads_the_last_real_token_of_every_choice(side: str) -> None:
    stock = stock_model("GPT2DoubleHeadsModel")
    zoo = dpzoo.convert(stock)
    inputs, mask = padded("ids", side, CHOICES)
    labels = torch.tensor([0, 2, 1, 1])
    got = zoo(**inputs, attention_mask=mask, mc_labels=labels)
    for i in range(ROWS):
        wanted = stock(**alone(inputs, mask, i), mc_labels=labels[i : i + 1])
        assert largest_error(got.mc_logits[i], wanted.mc_logits[0]) <= EXACT
        assert largest_error(got.mc_loss_per_sample[i], wanted.mc_loss) <= EXACT
    flat = zoo(
        **{key: value.reshape(-1, SEQ) for key, value in inputs.items()},
        attention_mask=mask.reshape(-1, SEQ),
    )
    assert largest_error(flat.mc_logits.reshape(ROWS, CHOICES), got.mc_logits) <= EXACT


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["cls_index", "last", "first", "mean"])
def test_gpt2s_summary_of_a_sequence_leaves_padding_out(kind: str, side: str) -> None:
    stock = stock_model("GPT2DoubleHeadsModel", summary_type=kind)
    zoo = dpzoo.convert(stock)
    inputs, mask = padded("embeds", side)
    got = zoo(**inputs, attention_mask=mask).mc_logits
    for i in range(ROWS):
        wanted = stock(**alone(inputs, mask, i)).mc_logits
        assert largest_error(got[i], wanted.reshape(())) <= EXACT


def test_a_summary_that_scores_no_choices_takes_no_labels() -> None:
    zoo = dpzoo.convert(stock_model("GPT2DoubleHeadsModel", summary_type="last"))
    ids = torch.randint(4, VOCAB, (ROWS, CHOICES, SEQ))
    with pytest.raises(
        dpzoo.InputError, match=r"shape \(4, 9\), wanted \(4, 3\).*'cls_index' \(got 'l"
    ):
        zoo(input_ids=ids, mc_labels=torch.zeros(ROWS, dtype=torch.long))


def test_gpt2_without_padding_token_and_mask_cannot_tell() -> None:
    zoo = dpzoo.convert(stock_model("GPT2ForSequenceClassification", pad_token_id=None))
    with pytest.raises(dpzoo.InputError, match=r"pad_token_id=None.*or pass an attention_mask"):
        zoo(input_ids=torch.randint(4, VOCAB, (ROWS, SEQ)))


def test_a_cached_step_is_classified_by_its_own_tokens() -> None:
    """A mask spans past and new tokens."""
    zoo = dpzoo.convert(stock_model("GPT2ForSequenceClassification"))
    inputs, mask = padded("embeds", "left")
    whole = zoo(**inputs, attention_mask=mask).logits
    first = zoo(
        **{key: value[:, :5] for key, value in inputs.items()},
        attention_mask=mask[:, :5],
        use_cache=True,
    )
    rest = {key: value[:, 5:] for key, value in inputs.items()}
    got = zoo(**rest, attention_mask=mask, cache=next(reversed(first.values()))).logits
    assert largest_error(got, whole) <= EXACT


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("name", ["RobertaModel", "RobertaForSequenceClassification"])
def test_roberta_counts_positions_from_the_padding_it_was_built_with(name: str, when: str) -> None:
    """Set on the config later, by a script that loads another tokenizer, it moves nothing."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    for model in (stock, zoo):
        model.config.pad_token_id = 0
    if when == "before":
        zoo = dpzoo.convert(stock)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ))
    ids[1:, -3:] = PAD
    mask = (ids != PAD).long()
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.randn(ROWS, SEQ, 24).double()}):
        wanted, got = (model(**inputs, attention_mask=mask)[0] for model in (stock, zoo))
        assert largest_error(got, wanted) <= EXACT
        back = dpzoo.to_transformers(zoo)
        assert largest_error(back(**inputs, attention_mask=mask)[0], wanted) <= EXACT
    with pytest.raises(dpzoo.InputError, match="wanted at most 21"):
        zoo(input_ids=torch.randint(4, VOCAB, (2, 22)))
