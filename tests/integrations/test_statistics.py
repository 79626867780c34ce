"""Clipping statistics against rows' gradients, each row alone through the stock model."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dpzoo
from dpzoo.clipping.statistics import plot, read
from dpzoo.integrations import StatisticsCallback
from tests.integrations.runs import BERT, Rows, draws, trainer_of
from tests.support import stock_model


def row_gradients(model: Any, rows: list[int]) -> list[dict[str, torch.Tensor]]:
    found = []
    for row in rows:
        model.zero_grad()
        batch = Rows(BERT).take([row])
        model(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_the_records_are_the_rows_own(sigma: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = stock_model(BERT, torch.float32).train()
    everyone = row_gradients(stock, list(range(16)))
    norms = [math.sqrt(sum(float(g.square().sum()) for g in row.values())) for row in everyone]
    clip = sum(sorted(norms)[7:9]) / 2  # some rows are clipped, and some are not
    callback = StatisticsCallback(draw=sigma > 0)
    trainer = trainer_of(
        dpzoo.convert(copy.deepcopy(stock)),
        tmp_path,
        {"noise_multiplier": sigma, "clipping_norm": clip},
        callbacks=[callback],
        max_steps=2,
    )
    rows = draws(trainer, 1)[0]
    trainer.train()
    first, _ = callback.records
    wanted = [everyone[row] for row in rows]
    norms = torch.tensor([norms[row] for row in rows])
    assert first["rows"] == len(rows) > 4  # in two parts
    assert first["not_finite"] == 0
    spread = [float(norms.min()), float(norms.median()), float(norms.max())]
    assert first["norms"] == pytest.approx(spread, rel=1e-3)
    share = float((norms > clip).float().mean())
    assert first["clipped"] == pytest.approx(share)
    assert 0 < share < 1  # or the test cannot fail
    for name in wanted[0]:
        mean = sum(float(r[name].square().sum()) for r in wanted) / len(wanted)
        assert first["layers"][name] == pytest.approx(math.sqrt(mean), rel=1e-3, abs=1e-5), name
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    total = [sum(f * r[n] for f, r in zip(factors, wanted, strict=True)) for n in wanted[0]]
    signal = math.sqrt(sum(float(t.square().sum()) for t in total))
    assert first["signal"] == pytest.approx(signal, rel=1e-3)
    trained = sum(p.numel() for p in stock.parameters())
    assert first["noise"] == pytest.approx(sigma * clip * math.sqrt(trained))
    ratio = signal / first["noise"] if sigma else math.inf
    assert first["signal_to_noise"] == pytest.approx(ratio, rel=1e-3)
    path = tmp_path / "statistics_not_private.jsonl"
    assert [r["step"] for r in read(path)] == [1, 2]
    assert json.loads(path.read_text().splitlines()[0])["NOT PRIVATE"] is True
    assert (tmp_path / "statistics_not_private.png").exists() == (sigma > 0)


def test_watching_changes_no_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    plain = trainer_of(start, tmp_path / "a")
    watched = trainer_of(start, tmp_path / "b", callbacks=[StatisticsCallback(draw=False)])
    plain.train(), watched.train()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_modes_and_empty_files_are_refused(tmp_path: Path) -> None:
    start = dpzoo.convert(stock_model(BERT, torch.float32))
    trainer = trainer_of(
        start, tmp_path, {"grad_sample_mode": "ghost"}, callbacks=[StatisticsCallback()]
    )
    with pytest.raises(
        dpzoo.InputError, match=r"Statistics got a .*, wanted .* grad_sample_mode='bk'"
    ):
        trainer.train()
    with pytest.raises(dpzoo.InputError, match="plot got 0 records"):
        plot([], tmp_path / "x.png")
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(dpzoo.InputError, match="has no records of steps"):
        read(tmp_path / "empty.jsonl")
