"""The code of docs/units.md runs as it is written, and its recipes keep a unit's rows together."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.integrations import PrivacyArguments
from tests.support import batch_for, stock_model

PAGE = (Path(__file__).parents[2] / "docs" / "units.md").read_text(encoding="utf-8")
LOOP, TRAINER, CARRIED, CHUNKED, PACKED, WINDOWS, AUDIT = re.findall(
    r"```python\n(.*?)```", PAGE, re.DOTALL
)
NAME = "GPT2LMHeadModel"


def collate(rows: list[Any]) -> Any:
    made = {k: torch.stack([r[k] for r in rows]) for k in rows[0] if k != "user"}
    return {**made, "user": torch.tensor([r["user"] for r in rows])}


def test_the_loops() -> None:
    data = batch_for(NAME, rows=12)
    users = [k // 3 for k in range(12)]
    names: dict[str, Any] = {
        "dpzoo": dpzoo,
        "DataLoader": DataLoader,
        "model": stock_model(NAME).train(),
        "rows": [{**{k: v[i] for k, v in data.items()}, "user": users[i]} for i in range(12)],
        "users": users,
    }
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    names["collate"] = lambda rows: {k: v for k, v in collate(rows).items() if k != "user"}
    exec(LOOP, names)
    names["loader"].collate_fn.wrapped_collator_fn = collate
    names["loader"].collate_fn.first_batch = collate(names["rows"])
    exec(CARRIED, names)
    assert names["engine"].accountant.history == [(1.0, 1.0, 2)]
    batch = {k: v[:6] for k, v in data.items()}
    names |= {"model": dpzoo.convert(stock_model(NAME)), "batch": batch, "batch_ids": users[:6]}
    exec(AUDIT.replace("unit_ids=", "checks=('sensitivity',), unit_ids="), names)
    assert names["report"].ok
    exec(TRAINER, names | {"PrivacyArguments": PrivacyArguments})


def test_chunks_and_packs() -> None:
    texts = {"me": [[1, 2, 3], [4] * 9], "you": [[5]]}
    names: dict[str, Any] = {"documents": [[1] * 17, [2] * 8, [3]], "texts_of": texts}
    exec(CHUNKED, names)
    assert names["unit_ids"] == [0, 0, 0, 1, 2]
    assert all(len(set(row)) == 1 and len(row) <= 8 for row in names["rows"])
    exec(PACKED, names)
    assert names["rows"] == [[1, 2, 3, 0, 4, 4, 4, 4], [4, 4, 4, 4, 4, 0], [5, 0]]
    assert names["unit_ids"] == ["me", "me", "you"]


def test_windows() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        word: k for k, word in enumerate(["[PAD]", "[UNK]", "who", "me", "you", "why", "not", "so"])
    }
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names: dict[str, Any] = {
        "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]"),
        "questions": ["who", "why not"],
        "contexts": ["me you " * 10, "so"],
        "asked_by": ["her", "him"],
    }
    exec(WINDOWS, names)
    assert names["unit_ids"] == ["her"] * (len(names["windows"]["input_ids"]) - 1) + ["him"]
    assert len(names["unit_ids"]) > 2
