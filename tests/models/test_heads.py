"""The heads' modules take what the stock ones take: PEFT and probing scripts call them by themselves."""

import inspect

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

import dpzoo
from dpzoo.models import heads
from dpzoo.registry import class_by_name
from tests.support import ROUNDING, ROWS, SEQ, inputs_for, largest_error, stock_model

EXACT = ROUNDING[torch.float64]
TOKENS, POOLED = (ROWS, SEQ, 24), (ROWS, 24)

HEADS = {
    ("BertForMaskedLM", "cls"): [TOKENS],
    ("BertForNextSentencePrediction", "cls"): [POOLED],
    ("BertForPreTraining", "cls"): [TOKENS, POOLED],
    ("BertForPreTraining", "cls.predictions"): [TOKENS],
    ("BertForPreTraining", "bert.pooler"): [TOKENS],
    ("RobertaForMaskedLM", "lm_head"): [TOKENS],
    ("RobertaForSequenceClassification", "classifier"): [TOKENS],
    ("RobertaForMultipleChoice", "roberta.pooler"): [TOKENS],
    ("GPT2DoubleHeadsModel", "multiple_choice_head"): [TOKENS],
}


@pytest.mark.parametrize(("name", "path"), HEADS)
def test_a_head_called_by_itself_equals_stock(name: str, path: str) -> None:
    stock = stock_model(name)
    states = [torch.randn(shape, dtype=torch.float64) for shape in HEADS[name, path]]
    wanted = stock.get_submodule(path)(*states)
    got = dpzoo.convert(stock).get_submodule(path)(*states)
    assert isinstance(got, tuple) == isinstance(wanted, tuple)
    for a, b in zip(*([x] if torch.is_tensor(x) else x for x in (got, wanted)), strict=True):
        assert largest_error(a, b) <= EXACT


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "RobertaForSequenceClassification"]
)
def test_prefix_tuning_of_a_classifier_equals_stock(name: str) -> None:
    """PEFT runs the body and then the head, and looks for past_key_values among the arguments."""
    models = []
    stock = stock_model(name)
    for model in (stock, dpzoo.convert(stock)):
        torch.manual_seed(0)
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        models.append(get_peft_model(model, config).double().eval())
    inputs = inputs_for(name)
    body = class_by_name(name).base_model_prefix
    if "past_key_values" in inspect.signature(stock.get_submodule(body).forward).parameters:
        wanted, got = (model(**inputs).logits for model in models)
        assert wanted.shape == (ROWS, 5)
        assert largest_error(got, wanted) <= EXACT
        return
    for model in models:  # PEFT does not know the argument's new name yet
        with pytest.raises(ValueError, match="does not support past key values"):
            model(**inputs)


@pytest.mark.parametrize(("old", "new"), heads._RENAMED.items())
def test_the_tasks_earlier_names_stay_for_a_release(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"heads\.{old} is called heads\.{new} now"):
        assert getattr(heads, old) is getattr(heads, new)
