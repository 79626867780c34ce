"""The loop that the task examples share, and their rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import recipes, training
from support.data import DataError, read_lines
from support.recipes import RecipeError
from support.rows import IGNORED, Batch, Rows, hold_out, micro_batches, padded, trimmed
from text_classification import Recipe
from torch.utils.data import DataLoader

import dpzoo
from tests.support import randomize, tiny_config

ROWS, SEQ = 11, 7


def classifier() -> Any:
    model = dpzoo.from_config(
        tiny_config("BertForSequenceClassification"), task="sequence-classification"
    )
    randomize(model)
    return model


def some_rows(count: int = ROWS) -> Rows:
    lengths = [1 + (3 * i) % SEQ for i in range(count)]
    ids = padded([torch.randint(4, 61, (n,)).tolist() for n in lengths], SEQ, 1)
    mask = padded([[1] * n for n in lengths], SEQ, 0)
    return Rows(input_ids=ids, attention_mask=mask, labels=torch.arange(count) % 5)


def recipe(**values: Any) -> Recipe:
    base = recipes.read(Recipe, "text-classification")
    return replace(base, **{"epochs": 2, "batch_size": 4, "micro_batch_size": 3, **values})


def unpadded(batch: Batch) -> list[tuple[list[int], int]]:
    """The tokens and the label of each row."""
    columns = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    return [(ids[mask.bool()].tolist(), int(label)) for ids, mask, label in columns]


# --- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, ROWS, 50])
def test_micro_batches_are_the_batch(size: int) -> None:
    rows = some_rows()
    parts = list(micro_batches(rows.columns, size))
    assert [len(part["labels"]) for part in parts] == [
        *[size] * (ROWS // size),
        *([ROWS % size] if ROWS % size else []),
    ]
    for part in parts:  # no column is padding alone
        assert part["input_ids"].shape[1] == int(part["attention_mask"].sum(1).max())
    seen = [row for part in parts for row in unpadded(part)]
    assert sorted(seen) == sorted(unpadded(rows.columns))


def test_an_empty_batch_has_no_parts() -> None:
    empty = {name: column[:0] for name, column in some_rows().columns.items()}
    assert list(micro_batches(empty, 4)) == []


def test_labels_of_rows_are_no_positions() -> None:
    """As many rows as positions: the labels have the mask's last size, and are not cut."""
    rows = some_rows(SEQ)
    rows.columns["attention_mask"][:, 4:] = 0
    part = trimmed(rows.columns)
    assert part["input_ids"].shape == (SEQ, 4)
    assert part["labels"].shape == (SEQ,)


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_give_the_same_sums(size: int) -> None:
    """Otherwise the micro-batch size would change the result, or a row would count twice."""
    rows, sums = some_rows(), []
    model = classifier().double()
    for parts in (ROWS, size):
        private, optimizer, criterion, _ = dpzoo.PrivacyEngine().make_private(
            module=model.train(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            criterion=dpzoo.ModelLoss(),
            data_loader=DataLoader(rows, batch_size=ROWS),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            grad_sample_mode="bk",
            poisson_sampling=False,
        )
        for part in micro_batches(rows.columns, parts):
            criterion(private(**part)).backward()
        optimizer.step()
        sums.append([parameter.grad.clone() for parameter in model.parameters()])
        private.to_standard_module()
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_hold_out_keeps_equal_keys_together() -> None:
    pairs = [(i % 6, i) for i in range(40)]
    train, held = hold_out(pairs, lambda pair: pair[0], 0.3, 0, Path("x"))
    assert sorted(train + held) == sorted(pairs)
    assert len({key for key, _ in held}) == 2
    assert not {key for key, _ in train} & {key for key, _ in held}
    assert hold_out(pairs, lambda pair: pair[0], 0.3, 1, Path("x"))[1] != held
    with pytest.raises(DataError, match=r"x: 1 different row\(s\), wanted at least 2"):
        hold_out(pairs, lambda pair: 0, 0.3, 0, Path("x"))


def test_padded_fills_and_cuts() -> None:
    wanted = [[1, 2, IGNORED], [3, 4, 5], [IGNORED] * 3]
    assert padded([[1, 2], [3, 4, 5, 6], []], 3, IGNORED).tolist() == wanted


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: No such file"):
        read_lines(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
        read_lines(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        read_lines(tmp_path / "empty.txt")
    (tmp_path / "line.txt").write_bytes("a\u2028b\r\nc".encode())
    assert read_lines(tmp_path / "line.txt") == ["a\u2028b", "c"]


# --- the loop --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_accountant")
@pytest.mark.parametrize("micro", [2, 50])
def test_the_run_spends_its_budget_and_no_more(micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logical steps are counted, whatever they are cut into: by accountant, schedule and noise."""
    rates: list[float] = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure: Callable[[], float] | None = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    model, spec = classifier(), recipe(micro_batch_size=micro, learning_rate=0.6)
    spent = training.train_privately(model, some_rows(), spec, delta=0.01)
    assert spent.steps == len(rates) == 2 * 3
    assert rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert spent.sample_rate == pytest.approx(1 / 3)
    assert spec.epsilon - 0.1 < spent.epsilon <= spec.epsilon
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("quick_accountant")
def test_a_constant_rate_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    schedule = torch.optim.lr_scheduler.LambdaLR
    monkeypatch.setattr(
        torch.optim.lr_scheduler,
        "LambdaLR",
        lambda *args: taken.append(schedule(*args)) or taken[0],
    )
    training.train_privately(classifier(), some_rows(), recipe(schedule="constant"), delta=0.01)
    assert taken[0].get_last_lr() == [5e-4]
    assert taken[0].last_epoch == 6


@pytest.mark.usefixtures("quick_accountant")
def test_empty_batches_are_steps() -> None:
    """Expected size 1: a third of the batches have no row. Leaving them out would leak that."""
    model = classifier()
    before = {name: value.clone() for name, value in model.named_parameters()}
    spent = training.train_privately(model, some_rows(5), recipe(batch_size=1), delta=0.01)
    assert spent.steps == 10
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_clipping_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    make = dpzoo.PrivacyEngine.make_private

    def make_private(self: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["clipping"], kwargs["max_grad_norm"], kwargs["grad_sample_mode"]))
        return make(self, **kwargs)

    monkeypatch.setattr(dpzoo.PrivacyEngine, "make_private", make_private)
    spec = recipe(clipping="automatic", max_grad_norm=0.7, epochs=1)
    training.train_privately(classifier(), some_rows(), spec, delta=0.01)  # PRV, as in use
    assert seen == [("automatic", 0.7, "bk")]


def test_delta() -> None:
    options = training.options("", Recipe, "text-classification", "lines")
    given = ["--data", "x", "--out", "y"]
    assert training.delta_of(options.parse_args(given), 50) == 0.01
    assert training.delta_of(options.parse_args([*given, "--delta", "1e-3"]), 50) == 0.001
    for bad in ("0", "0.02", "1"):
        with pytest.raises(RecipeError, match=r"--delta is .*, wanted .* below 1 / 50"):
            training.delta_of(options.parse_args([*given, "--delta", bad]), 50)
    with pytest.raises(RecipeError, match="no rows to train on"):
        training.delta_of(options.parse_args(given), 0)


def test_save_compares_with_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            pass

    model = classifier()
    assert "within" in training.save(model, Tokenizer(), tmp_path / "a", some_rows())
    other = classifier()
    monkeypatch.setattr(model, "save_pretrained", other.save_pretrained)
    with pytest.raises(RuntimeError, match=r"logits differ from dpzoo's by"):
        training.save(model, Tokenizer(), tmp_path / "b", some_rows())
