"""Arguments of forward passes: what is no tensor of the right kind, shape or range is named at the door."""

from collections import Counter
from typing import Any

import pytest
import torch

import dpzoo
from dpzoo.losses import class_losses, token_losses
from tests.odd_inputs import CLEAR, STOCK, UNCLEAR, WRONG, sweep
from tests.support import NAMES, VOCAB, batch_for, stock_model, tiny_config
from tests.tally import AS_STOCK, count


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_argument_is_a_clear_error_or_what_stock_does_with_it(name: str) -> None:
    results = list(sweep([name]))
    bad = [one for one in results if one[3] in (UNCLEAR, WRONG)]
    assert not bad, bad[:5]
    for one in results:
        count("an odd argument of a forward pass", CLEAR if one[3] == CLEAR else AS_STOCK)
    counts = Counter(one[3] for one in results)
    assert counts[CLEAR] > 60
    assert counts[STOCK] > 5


def model(name: str, **overrides: Any) -> Any:
    return dpzoo.convert(stock_model(name, torch.float32, **overrides))


IDS = torch.full((3, 6), 5)

MESSAGES: list[tuple[str, dict[str, Any], str]] = [
    (
        "BertModel",
        {"input_ids": IDS[0]},
        r"BertModel.forward\(\) got input_ids of shape \(6,\), wanted \(batch, seq\).",
    ),
    (
        "BertModel",
        {"input_ids": IDS[:, None]},
        r"got input_ids of shape \(3, 1, 6\), wanted \(batch, seq\)",
    ),
    (
        "GPT2Model",
        {"input_ids": IDS[0]},
        r"of shape \(6,\), wanted \(batch, seq\) or \(batch, num_choices, seq\)",
    ),
    (
        "BertModel",
        {"input_ids": IDS[:, :0]},
        r"inputs of shape \(3, 0\), wanted at least one token a sequence",
    ),
    (
        "BertModel",
        {"input_ids": IDS + 56},
        r"input_ids with the value 61, wanted 0 to 60. Do the tokenizer and",
    ),
    (
        "GPT2Model",
        {"input_ids": -IDS},
        r"GPT2Model.forward\(\) got input_ids with the value -5, wanted 0 to 60",
    ),
    (
        "BertModel",
        {"input_ids": IDS.float()},
        r"of dtype torch.float32, wanted torch.int64 or torch.int32",
    ),
    ("BertModel", {"input_ids": IDS.tolist()}, r"got input_ids of type list, wanted a tensor"),
    (
        "BertModel",
        {"inputs_embeds": torch.rand(3, 6, 23)},
        r"of shape \(3, 6, 23\), wanted \(batch, seq, 24\)",
    ),
    (
        "BertModel",
        {"inputs_embeds": IDS},
        r"inputs_embeds of dtype torch.int64, wanted a floating one",
    ),
    (
        "BertModel",
        {"input_ids": IDS, "token_type_ids": IDS},
        r"token_type_ids with the value 5, wanted 0 to 2",
    ),
    (
        "GPT2Model",
        {"input_ids": IDS, "token_type_ids": IDS * 20},
        r"token_type_ids with the value 100, wanted 0 to",
    ),
    (
        "RobertaModel",
        {"input_ids": IDS, "position_ids": IDS * 5},
        r"position_ids with the value 25, wanted 0 to 22",
    ),
    (
        "BertModel",
        {"input_ids": IDS, "position_ids": IDS.bool()},
        r"position_ids of dtype torch.bool, wanted torch",
    ),
    (
        "BertModel",
        {"input_ids": IDS, "attention_mask": IDS[0]},
        r"attention_mask of shape \(6,\), wanted \(3, 6\)",
    ),
    (
        "BertModel",
        {"input_ids": IDS, "attention_mask": IDS[:2]},
        r"attention_mask of shape \(2, 6\), wanted \(3, 6\)",
    ),
    (
        "GPT2Model",
        {"input_ids": IDS, "attention_mask": IDS[:, 1:]},
        r"of shape \(3, 5\), wanted \(3, 6\). It has an entry",
    ),
    (
        "GPT2Model",
        {"input_ids": IDS, "attention_mask": IDS[:1]},
        r"attention_mask of shape \(1, 6\), wanted \(3, 6\)",
    ),
    (
        "BertModel",
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)},
        r"of shape \(2, 1, 6, 6\), wanted \(3, 6\) or \(1, heads, 6, 6\) or \(3, heads, 6, 6\)",
    ),
    (
        "GPT2ForSequenceClassification",
        {"input_ids": IDS[:, None]},
        r"inputs of shape \(3, 1, 6\), wanted \(batch, seq\)",
    ),
    (
        "GPT2ForQuestionAnswering",
        {"input_ids": IDS[:, None]},
        r"this head reads one sequence a row",
    ),
    (
        "BertForMultipleChoice",
        {"input_ids": IDS},
        r"of shape \(3, 6\), wanted \(batch, num_choices, seq\)",
    ),
    (
        "GPT2DoubleHeadsModel",
        {"input_ids": IDS[:, None], "mc_token_ids": torch.tensor([[6], [0], [0]])},
        r"mc_token_ids with the value 6, wanted 0 to 5",
    ),
    (
        "BertForTokenClassification",
        {"input_ids": IDS, "labels": IDS},
        r"labels with the value 5, wanted 0 to 4, or -100. A head has as many classes as it was built with",
    ),
    (
        "BertForMaskedLM",
        {"input_ids": IDS, "labels": IDS.to(torch.uint8)},
        r"labels of dtype torch.uint8, wanted torch.int64",
    ),
    (
        "BertForMaskedLM",
        {"input_ids": IDS, "labels": IDS.tolist()},
        r"labels of type list, wanted a tensor",
    ),
    (
        "BertForSequenceClassification",
        {"input_ids": IDS, "labels": torch.tensor([0, 5, 1])},
        r"labels with the value 5, wanted 0 to 4",
    ),
    (
        "BertForSequenceClassification",
        {"input_ids": IDS, "labels": torch.tensor([0, 1, 1], dtype=torch.uint8)},
        r"labels of dtype torch.uint8, wanted torch.int64",
    ),
    (
        "BertForQuestionAnswering",
        {"input_ids": IDS, "start_positions": torch.zeros(3), "end_positions": torch.zeros(3)},
        r"start_positions of dtype torch.float32, wanted torch.int64",
    ),
    (
        "BertForPreTraining",
        {"input_ids": IDS, "labels": IDS, "next_sentence_label": torch.zeros(2, dtype=torch.long)},
        r"next_sentence_label of shape \(2,\), wanted \(3,\) or \(3, 1\)",
    ),
]


@pytest.mark.parametrize(
    ("name", "batch", "message"), MESSAGES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(MESSAGES)]
)
def test_the_message_has_the_argument_the_value_got_and_the_value_wanted(
    name: str, batch: dict[str, Any], message: str
) -> None:
    with pytest.raises(dpzoo.InputError, match=message):
        model(name)(**batch)


def test_refused_labels_do_not_settle_the_kind_of_problem() -> None:
    classifier = model("BertForSequenceClassification")
    with pytest.raises(
        dpzoo.InputError, match=r"labels of a multi_label_classification model have shape"
    ):
        classifier(input_ids=IDS, labels=torch.tensor([0.0, 1.0, 1.0]))
    assert classifier.config.problem_type is None
    assert classifier(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss is not None
    assert classifier.config.problem_type == "single_label_classification"


def test_a_mask_is_as_long_as_the_cache_and_the_new_tokens() -> None:
    gpt2 = model("GPT2LMHeadModel")
    cache = gpt2(IDS, use_cache=True)[1]
    with pytest.raises(dpzoo.InputError, match=r"of shape \(3, 1\), wanted \(3, 7\)"):
        gpt2(IDS[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 1))
    gpt2(IDS[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 7))


def test_empty_batches_pass_whatever_their_length() -> None:
    for seq in (0, 6):
        out = model("BertForTokenClassification")(
            input_ids=IDS[:0, :seq], labels=IDS[:0, :seq], attention_mask=IDS[:0, :seq]
        )
        assert out.loss == 0


def test_a_resized_table_has_the_ids_that_it_was_resized_to() -> None:
    bert = model("BertForMaskedLM")
    bert.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    bert(IDS + 56)
    with pytest.raises(dpzoo.InputError, match=r"with the value 62, wanted 0 to 61"):
        bert(IDS + 57)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_traced_programs_read_no_values(name: str) -> None:
    """A range that is looked up would be a constant of the program, or stop it."""
    zoo, batch = model(name), batch_for(name, dtype=torch.float32)
    inputs = {"input_ids": batch["input_ids"]}
    zoo.config.use_cache = False
    exported = torch.export.export(zoo, (), inputs).module()
    assert torch.allclose(exported(**inputs).logits, zoo(**inputs).logits, atol=1e-5)
    with torch.device("meta"):
        on_meta = type(zoo)(tiny_config(name))
    assert on_meta(torch.full((3, 6), 10**6, device="meta")).logits.device.type == "meta"

    def of_row(ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(zoo, dict(zoo.named_parameters()), (ids[None],)).logits[0]

    rows = batch["input_ids"].masked_fill(batch["input_ids"] == 1, 4)
    together = torch.vmap(of_row, randomness="error")(rows)
    assert torch.allclose(together, torch.stack([of_row(row) for row in rows]), atol=1e-5)


def test_losses_name_the_argument_of_whoever_calls_them() -> None:
    logits = torch.randn(3, 4)
    with pytest.raises(
        dpzoo.InputError, match=r"mc_labels with the value 4, wanted 0 to 3, or -100"
    ):
        class_losses(logits, torch.tensor([0, 4, 1]), "mc_labels")
    with pytest.raises(dpzoo.InputError, match=r"labels of dtype torch.int32, wanted torch.int64"):
        token_losses(logits, torch.tensor([0, 1, 1], dtype=torch.int32))
