"""Batches as they come: empty, of one, of very different rows, split into physical batches."""

from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

import dpzoo
from tests.modes import ALL_MODES, Step, assert_step_is_exact, engine_of
from tests.support import (
    FAMILY,
    NAMES,
    PAD,
    ROWS,
    TASK,
    TIED,
    VOCAB,
    batch_for,
    in_stock_layout,
    inputs_for,
    largest_error,
    row_of,
    stock_model,
    without_labels,
)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_is_a_step_of_zero(name: str, mode: str) -> None:
    """First of a run and with nothing before it: forward, backward and step run, and add nothing."""
    step = Step(name, dpzoo.convert(stock_model(name)), mode)
    batch = batch_for(name)
    empty = {key: value[:0] for key, value in batch.items()}
    step.backward(empty)
    for key, value in step.gradient().items():
        assert bool((value == 0).all()), key
    step.backward(batch)  # and the next one is an ordinary one
    assert any(bool((value != 0).any()) for value in step.gradient().values())


def test_expanded_weights_refuse_an_empty_batch_and_say_so() -> None:
    """torch's own transform wants a row; nothing is silently skipped."""
    name = "BertForSequenceClassification"
    step = Step(name, dpzoo.convert(stock_model(name)), "ew")
    with pytest.raises(RuntimeError, match="Batch size must be positive, got 0"):
        step.backward({key: value[:0] for key, value in batch_for(name).items()})


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name: str, mode: str) -> None:
    batch = row_of(batch_for(name), ROWS - 1)
    assert_step_is_exact(name, mode, batch, stock_model(name), rows=1)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", [name for name in TIED if TASK[name] != "double-heads"])
def test_a_row_without_a_labelled_token(name: str, mode: str) -> None:
    batch = batch_for(name)
    batch["labels"][1] = -100
    assert_step_is_exact(name, mode, batch, stock_model(name))


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForCausalLM", "GPT2LMHeadModel"])
def test_rows_of_very_different_length(name: str, mode: str) -> None:
    batch = batch_for(name, padding="none", seq=17)
    mask = torch.ones(ROWS, 17, dtype=torch.long)
    mask[0, 1:] = 0
    mask[1, 15:] = 0
    batch["attention_mask"] = mask
    batch["input_ids"][mask == 0] = PAD
    batch["labels"][mask == 0] = -100
    assert_step_is_exact(name, mode, batch, stock_model(name))


@pytest.mark.parametrize("physical", [1, 2, 3, ROWS])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", ["BertForMultipleChoice", "RobertaForTokenClassification", *TIED])
def test_physical_batches_of_any_size_give_one_sum(name: str, mode: str, physical: int) -> None:
    """BatchMemoryManager splits a logical batch; the step that comes of it is the same."""
    batch = batch_for(name)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(ROWS)]
    stock = stock_model(name)
    whole = Step(name, dpzoo.convert(stock), mode, max_grad_norm=0.7)
    start = {key: value.detach().clone() for key, value in whole.model.state_dict().items()}
    whole.backward(batch)
    wanted = whole.gradient()
    whole.engine.to_standard_module()
    whole.model.load_state_dict(start)

    split = Step(name, whole.model, mode, max_grad_norm=0.7)
    before = {key: p.detach().clone() for key, p in split.model.named_parameters()}
    loader = DataLoader(rows, batch_size=ROWS)
    steps = 0
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=physical, optimizer=split.optimizer
    ) as manager:
        for part in manager:
            split.backward(part)
            split.optimizer.step()
            split.optimizer.zero_grad()
            steps += 1
    assert steps == -(-ROWS // physical)
    for key, parameter in split.model.named_parameters():
        got = in_stock_layout(split.model, key, before[key] - parameter.detach())
        assert largest_error(got, wanted[key]) <= 1e-10, key


class TinyTokenizer:
    """As much of a tokenizer as transformers' padding collator asks for."""

    padding_side = "right"

    def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        batch: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for feature in features:
            missing = longest - len(feature["input_ids"])
            batch["input_ids"].append(feature["input_ids"] + [PAD] * missing)
            batch["attention_mask"].append([1] * len(feature["input_ids"]) + [0] * missing)
            batch["labels"].append(feature["labels"])
        return {key: torch.tensor(value) for key, value in batch.items()}


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_poisson_batches_of_a_transformers_collator(family: str, mode: str) -> None:
    """A Poisson loader over ragged rows, empty draws included, trains and accounts every step."""
    name = next(n for n in NAMES if FAMILY[n] == family and TASK[n] == "sequence-classification")
    generator = torch.Generator().manual_seed(5)
    rows = [
        {
            "input_ids": torch.randint(4, VOCAB, (3 + i % 6,), generator=generator).tolist(),
            "labels": i % 5,
        }
        for i in range(12)
    ]
    collator = DataCollatorWithPadding(TinyTokenizer())  # type: ignore[arg-type]
    loader = DataLoader(rows, batch_size=1, collate_fn=collator, generator=generator)
    model = dpzoo.convert(stock_model(name, torch.float32)).train()
    engine = engine_of(mode)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=dpzoo.ModelLoss(),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    private, optimizer, poisson = made[0], made[1], made[-1]
    if mode != "bk":  # whose engine has done it
        dpzoo.prime_empty_batches(poisson)
    criterion = made[2] if mode in ("ghost", "bk") else dpzoo.ModelLoss()
    sizes: list[int] = []
    for _ in range(2):
        for batch in poisson:
            optimizer.zero_grad()
            criterion(private(**batch)).backward()
            optimizer.step()
            sizes.append(len(batch["labels"]))
    assert sizes[0] == 0
    assert max(sizes) > 1
    assert sum(steps for _, _, steps in engine.accountant.history) == len(sizes) == 24
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_priming_wants_a_poisson_loader() -> None:
    with pytest.raises(dpzoo.InputError, match="DataLoader whose batches cannot be empty, wanted"):
        dpzoo.prime_empty_batches(DataLoader([{"input_ids": [1]}]))


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_sequence_and_one_token_more(name: str) -> None:
    limit = 23 - (PAD + 1 if FAMILY[name] == "roberta" else 0)
    model = dpzoo.convert(stock_model(name))
    model(**inputs_for(name, padding="none", seq=limit))
    with pytest.raises(
        dpzoo.InputError,
        match=rf"got a sequence of {limit + 1} tokens, wanted at "
        rf"most {limit}.*max_length={limit}",
    ):
        model(**inputs_for(name, padding="none", seq=limit + 1))


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("missing", ["labels", "mc_labels"])
def test_double_heads_with_labels_for_one(missing: str, mode: str) -> None:
    """The head without labels has gradient 0; its norm of the step before is not used again."""
    name = "GPT2DoubleHeadsModel"
    stock, full = stock_model(name), batch_for(name)
    part = {key: value for key, value in full.items() if key != missing}
    wanted = []
    for i in range(ROWS):  # the rows alone, autograd, through the stock model
        row = row_of(part, i)
        stock.zero_grad(set_to_none=True)
        outputs = stock(**without_labels(row))
        if missing == "labels":
            F.cross_entropy(outputs.mc_logits, row["mc_labels"]).backward()
        else:
            labels = row["labels"][..., 1:].reshape(-1)
            logits = outputs.logits[..., :-1, :].reshape(len(labels), -1)
            F.cross_entropy(logits, labels, ignore_index=-100).backward()
        grads = [p.grad.norm() for p in stock.parameters() if p.grad is not None]
        wanted.append(torch.stack(grads).norm())

    step = Step(name, dpzoo.convert(stock), mode)
    if step.makes_criterion:
        step.criterion.criterion = dpzoo.ModelLoss()
    else:
        step.criterion = dpzoo.ModelLoss()
    for batch in (full, part):
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        step.criterion(step.wrapped(batch["input_ids"], **rest)).backward()
        norms = step.norms().detach().clone()
        step.optimizer.zero_grad()
    assert largest_error(norms, torch.stack(wanted).detach()) <= 1e-9
