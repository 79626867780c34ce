"""A table that a user assigns is as exact as the one it replaces, its padding row included."""

import copy
from typing import Any

import pytest
from torch import nn

import dpzoo
from dpzoo.layers import PositionEmbedding, TokenEmbedding
from tests.modes import assert_model_step_is_exact
from tests.support import PAD, VOCAB, batch_for, oracle_gradients, stock_model

TABLES = {
    "BertForSequenceClassification": [
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
    ],
    "RobertaForSequenceClassification": ["roberta.embeddings.word_embeddings"],
    "DistilBertForSequenceClassification": [
        "distilbert.embeddings.word_embeddings",
        "distilbert.embeddings.position_embeddings",
    ],
    "GPT2ForTokenClassification": ["transformer.wte", "transformer.wpe"],
    "GPT2LMHeadModel": ["transformer.wte"],
    "BertForMaskedLM": ["bert.embeddings.word_embeddings"],
}
CASES = [(name, path) for name, paths in TABLES.items() for path in paths]


def replace(model: Any, path: str, table: nn.Embedding) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, table)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize(("name", "path"), CASES)
def test_an_assigned_table_is_exact(name: str, path: str, mode: str) -> None:
    """More rows than before, and one that is padding: Opacus' own sampler would train it."""
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    kind = type(zoo.get_submodule(path))
    table = nn.Embedding(VOCAB + 3, 24, padding_idx=PAD).double()
    replace(stock, path, table)
    replace(zoo, path, copy.deepcopy(table))
    assert type(zoo.get_submodule(path)) is kind
    batch = batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    assert float(wanted[f"{path}.weight"][:, PAD].abs().max()) == 0
    assert_model_step_is_exact(name, mode, batch, zoo, wanted)


def test_what_is_assigned_keeps_its_type_or_gets_a_safe_one() -> None:
    model = dpzoo.convert(stock_model("GPT2LMHeadModel"))
    model.transformer.wpe = nn.Embedding(40, 24)
    assert type(model.transformer.wpe) is PositionEmbedding
    model.transformer.set_submodule("wpe", nn.Embedding(41, 24))
    assert type(model.transformer.wpe) is PositionEmbedding
    model.transformer.add_module("wpe", nn.Embedding(42, 24))
    assert type(model.transformer.wpe) is PositionEmbedding
    model.extra = nn.Embedding(3, 4)
    assert type(model.extra) is TokenEmbedding

    class Own(nn.Embedding):
        pass

    model.extra = Own(3, 4)
    assert type(model.extra) is Own
    del model.extra
