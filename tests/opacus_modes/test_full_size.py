"""float32 at full size: bk's clipped sum against the stock model row by row in float64.

    python -m tests.opacus_modes.test_full_size 8 128   # rows, tokens

prints the errors, and beside them that of the stock model row by row in float32: the rounding of the
function itself, which no way of summing can mend. Four layers of RoBERTa-base's classifier and of GPT-2's
language model, head tied, whole vocabularies.
"""

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import dpzoo
from tests.modes import engine_of
from tests.support import in_stock_layout

SHORTER = 1e-6
"""Relative, of a row's norm below the true one: some roundings of 2^-24 in a row."""

LONGER = 2e-5
"""Relative, of a norm above the true one, and of the whole sum in l2: rows are clipped by an upper bound
of their norm under rounding (`dpzoo.factors`), so a clipped row may be shorter than C, and never longer.
The bound is widest for a tied table, whose two uses may cancel."""

CLIP = 1.05
"""C in units of the first row's norm: some of the others are longer, and some are not."""

Batch = dict[str, torch.Tensor]


def classifier() -> Any:
    config = transformers.RobertaConfig(
        vocab_size=50265,
        num_hidden_layers=4,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return transformers.RobertaForSequenceClassification(config)


def language_model() -> Any:
    config = transformers.GPT2Config(n_layer=4, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


MODELS = {"classifier": classifier, "language model": language_model}


def rows_of(model: Any, rows: int, seq: int) -> list[Batch]:
    """Rows as batches of one; every second one is padded on the right, and differently."""
    made = []
    for i in range(rows):
        length = seq - (i % 2) * (seq // 4 + i)
        ids = torch.randint(4, model.config.vocab_size, (1, seq))
        mask = (torch.arange(seq) < length).long().unsqueeze(0)
        if isinstance(model, transformers.GPT2LMHeadModel):
            labels = ids.masked_fill(mask == 0, -100)
        else:
            ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
            labels = torch.tensor([i % 2])
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def row_gradient(stock: Any, row: Batch) -> float:
    """Leave a row's gradient on the stock model's parameters; its norm, in float64."""
    stock.zero_grad(set_to_none=True)
    stock(**row).loss.backward()
    squares = [p.grad.double().square().sum() for p in stock.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def oracle(stock: Any, rows: list[Batch], clip: float = 0.0) -> tuple[torch.Tensor, float, Batch]:
    """(norms of the rows, C, the clipped sum), added up in float64; `CLIP` says C if none is given."""
    norms = []
    sums = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in stock.named_parameters()}
    for row in rows:
        norms.append(row_gradient(stock, row))
        clip = clip or CLIP * norms[0]
        for key, p in stock.named_parameters():
            sums[key].add_(p.grad, alpha=min(1.0, clip / (norms[-1] + 1e-6)))
    stock.zero_grad(set_to_none=True)
    return torch.tensor(norms, dtype=torch.float64), clip, sums


def book_keeping(stock: Any, rows: list[Batch], clip: float) -> tuple[Any, torch.Tensor]:
    """(the dpzoo model, with the clipped sums as its gradients; norms of the rows)."""
    model = dpzoo.convert(stock).train()
    wrapped, optimizer, criterion, _ = engine_of("bk").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=dpzoo.ModelLoss(reduction="sum"),
        data_loader=DataLoader(list(range(len(rows))), batch_size=len(rows)),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        loss_reduction="sum",
        poisson_sampling=False,
        grad_sample_mode="bk",
    )
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    criterion(wrapped(**batch)).backward()
    optimizer.pre_step()
    return model, wrapped.per_sample_gradient_norms


def distance(got: Batch, wanted: Batch) -> float:
    """Relative, in l2, of all parameters together."""
    assert got.keys() == wanted.keys()
    off = sum(float((got[key] - value).square().sum()) for key, value in wanted.items())
    return (off / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def errors(kind: str, rows: int, seq: int, *, stock_too: bool = False) -> tuple[float, ...]:
    """(error of bk's sum, smallest and largest error of a norm, float32 row by row, bk from that)."""
    torch.manual_seed(0)
    stock = MODELS[kind]().train()
    batch = rows_of(stock, rows, seq)
    norms, clip, sums = oracle(copy.deepcopy(stock).double(), batch)
    assert bool((norms > clip).any())
    assert bool((norms[1:] < clip).any())
    narrow = oracle(stock, batch, clip)[2] if stock_too else None
    model, got = book_keeping(stock, batch, clip)
    grads = {k: in_stock_layout(model, k, p.grad).double() for k, p in model.named_parameters()}
    off = got.double() / norms - 1
    figures = distance(grads, sums), float(off.min()), float(off.max())
    if narrow is None:
        return figures
    return *figures, distance(narrow, sums), distance(grads, narrow)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_float32_is_exact_to_its_rounding(kind: str) -> None:
    """A sum in a narrow dtype, or a Gram matrix that loses digits, does not show in tiny models."""
    of_sum, lowest, highest = errors(kind, rows=4, seq=128)
    assert of_sum <= LONGER
    assert lowest >= -SHORTER
    assert highest <= LONGER


if __name__ == "__main__":
    for kind in MODELS:
        figures = errors(kind, int(sys.argv[1]), int(sys.argv[2]), stock_too=True)
        print(
            "{}: bk's sum {:.2e}, its norms {:.2e} to {:.2e}; float32 row by row {:.2e}, "
            "bk from that {:.2e}".format(kind, *figures)
        )
