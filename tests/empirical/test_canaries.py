"""Canaries and `dpzoo.audit_run`: in loops, in DPTrainer, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import TrainingArguments

import dpzoo
from dpzoo.auditing import AuditFailedError
from dpzoo.errors import InputError
from dpzoo.integrations import DPTrainer, PrivacyArguments
from tests.support import tiny_config

SIZE = 120


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def canaries(seed: int = 0) -> dpzoo.Canaries:
    rows = 30 * torch.eye(SIZE)
    return dpzoo.Canaries([(row, torch.tensor(1)) for row in rows], seed=seed)


def trained(mode: str, noise: float) -> tuple[dpzoo.Canaries, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    planted = canaries()
    rows = planted.mix(TensorDataset(torch.zeros(60, SIZE), torch.randint(2, (60,))))
    model: Any = nn.Linear(SIZE, 2)
    before = copy.deepcopy(model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    trace = planted.watch(model, optimizer, loss=loss_of)
    assert all(
        torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)
    )
    made = dpzoo.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(rows, batch_size=len(rows) // 2),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    model, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    for _ in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    trace.close()
    losses = planted.losses(model, loss=loss_of, reference=before)
    return planted, {"sums": trace.sums(), "spread": trace.spread(), "loss": losses}


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_a_run_without_noise_is_refuted_by_every_score(mode: str) -> None:
    planted, scores = trained(mode, noise=0.0)
    for name, values in scores.items():
        report = dpzoo.audit_run(planted, {name: values}, delta=1e-3, epsilon=1.0)
        assert not report.ok, f"{name}: {report}"
        assert report["any mechanism"].correct == report["any mechanism"].guesses
        with pytest.raises(AuditFailedError, match="epsilon is not what is claimed") as caught:
            report.raise_if_failed()
        assert caught.value.report is report


def test_a_right_run_is_not_refuted_and_its_report_says_what_was_seen(tmp_path: Path) -> None:
    planted, scores = trained("bk", noise=4.0)
    history = [(4.0, 0.5, 8)]
    report = dpzoo.audit_run(planted, scores, delta=1e-3, history=history, independent=True)
    assert report.ok
    assert report.epsilon is not None
    assert report.accountants is not None
    assert report.epsilon == report.accountants.epsilons["prv"]
    assert report.included == planted.coins.sum()
    plain = json.loads(report.to_json())
    assert plain["ok"] is True
    assert [b["name"] for b in plain["bounds"]] == [b.name for b in report.bounds]
    text = str(report)
    for part in ("120 canaries", "no bound is above the claim", "95% confidence", "prv", "rdp"):
        assert part in text
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_guesses_count_the_right_coins() -> None:
    planted = dpzoo.Canaries(range(64), coins=[True] * 32 + [False] * 32)
    report = dpzoo.audit_run(planted, -np.arange(64), delta=1e-5)
    best = report["any mechanism"]
    assert (best.guesses, best.correct) == (32, 32)
    worst = dpzoo.audit_run(planted, np.arange(64), delta=1e-5)
    assert worst.epsilon_lower == 0
    assert worst.ok  # without a claim there is nothing to refute


def test_mixing_adds_the_rows_whose_coin_says_so_and_no_others() -> None:
    planted = canaries()
    private = TensorDataset(torch.zeros(7, SIZE), torch.zeros(7, dtype=torch.long))
    mixed = planted.mix(private)
    assert len(mixed) == 7 + planted.coins.sum()  # type: ignore[arg-type]
    found = {int(mixed[i][0].argmax()) for i in range(7, len(mixed))}  # type: ignore[arg-type]
    assert found == set(np.flatnonzero(planted.coins))


def test_coins_are_fair_secret_and_can_be_kept() -> None:
    first, second = dpzoo.Canaries(range(2000)), dpzoo.Canaries(range(2000))
    assert abs(first.coins.mean() - 0.5) < 0.08
    assert (first.coins != second.coins).any()
    assert (dpzoo.Canaries(range(2000), coins=first.coins).coins == first.coins).all()
    assert (
        dpzoo.Canaries(range(50), seed=1).coins == dpzoo.Canaries(range(50), seed=1).coins
    ).all()


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("GPT2ForSequenceClassification", "sequence-classification"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForTokenClassification", "token-classification"),
    ],
)
def test_random_rows_train_in_dptrainer(name: str, task: str, tmp_path: Path) -> None:
    config = tiny_config(name)
    model = dpzoo.from_config(config, task=task)
    planted = dpzoo.Canaries.random(12, task, model.config, length=6, seed=0)
    private = dpzoo.Canaries.random(12, task, model.config, length=6, seed=1).rows
    reference = dpzoo.from_config(config, task=task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trace = planted.watch(model, optimizer)
    trainer = DPTrainer(
        model=model,
        optimizers=(optimizer, None),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=6, max_steps=1, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=planted.mix(private),  # type: ignore[arg-type]
        data_collator=default_collate,
        privacy=PrivacyArguments(noise_multiplier=1.0),
    )  # fmt: skip
    trainer.train()
    assert trace.steps.shape == (1, 12)
    scores = {
        "sums": trace.sums(),
        "loss": planted.losses(trainer.model),
        "difference": planted.losses(trainer.model, reference=reference),
    }
    assert not np.allclose(scores["loss"], scores["difference"])
    assert trainer.delta is not None
    report = dpzoo.audit_run(planted, scores, delta=trainer.delta, epsilon=trainer.epsilon)
    assert report.ok


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpzoo.Canaries([1]), "got 1 rows, wanted at least 2"),
        (lambda: dpzoo.Canaries(range(3), coins=[True]), r"coins of shape \(1,\), wanted \(3,\)"),
        (lambda: canaries().mix([{"x": 1}]), "no names .* wanted the same"),  # type: ignore[arg-type]
        (lambda: dpzoo.audit_run(canaries(), [1.0], delta=1e-5), r"shape \(1,\)"),
        (lambda: dpzoo.audit_run(canaries(), np.full(SIZE, np.nan), delta=1e-5), "120 are not finite"),
        (lambda: dpzoo.audit_run(canaries(), {}, delta=1e-5), "no scores"),
        (lambda: dpzoo.audit_run(canaries(), np.zeros(SIZE), delta=0), "delta=0"),
        (lambda: dpzoo.audit_run(canaries(), np.zeros(SIZE), delta=0.1, confidence=1), "confidence=1"),
        (lambda: dpzoo.Canaries(torch.eye(3)).losses(nn.Linear(3, 2)), "gives no loss for a canary"),
        (
            lambda: canaries().watch(
                net := nn.Linear(SIZE, 2), torch.optim.SGD(net.parameters()), loss=loss_of
            ).sums(),
            "no steps",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_audited_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
