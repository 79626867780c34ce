"""Two thousand steps: memory and step time stay flat, and epsilon is a fresh accountant's."""

import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from opacus.accountants import RDPAccountant
from torch.utils.data import DataLoader

import dpzoo
from tests.integrations.runs import BERT, trainer_of
from tests.modes import engine_of
from tests.support import stock_model

STEPS, EACH, ROWS, BATCH, SIGMA = 2_000, 100, 64, 8, 1.1

pytestmark = pytest.mark.slow


class Watch:
    """Resident memory, and the processor time of a step, over a run."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.seconds: list[float] = []
        self.last = time.process_time()

    def step(self) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        if len(self.seconds) % EACH == 0:
            gc.collect()
            self.memory.append(psutil.Process().memory_info().rss)
        self.last = time.process_time()

    def assert_flat(self) -> None:
        assert len(self.seconds) == STEPS
        # The first tenth fills caches and arenas.
        begin = max(self.memory[STEPS // EACH // 10 : STEPS // EACH // 5])
        assert max(self.memory[-3:]) <= 1.02 * begin, [one >> 20 for one in self.memory]
        # Other processes share the caches: the fastest steps of each part are the program's own.
        part = STEPS // 5
        early, late = (
            statistics.quantiles(times, n=10)[0]
            for times in (self.seconds[part : 2 * part], self.seconds[-part:])
        )
        assert late <= 1.25 * early, (early, late)


def fresh_epsilon(sigma: float, rate: float) -> float:
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, STEPS)]
    return float(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks"])
def test_a_long_loop_runs_flat_and_its_account_is_true(mode: str) -> None:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    model = dpzoo.BertForSequenceClassification(config).train()
    rows = [{"input_ids": torch.randint(2, 50, (8,)), "labels": i % 2} for i in range(ROWS)]
    engine = engine_of(mode)
    by_criterion = mode != "hooks"
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=dpzoo.ModelLoss() if by_criterion else None,
        data_loader=DataLoader(rows, batch_size=BATCH),  # type: ignore[arg-type]
        noise_multiplier=SIGMA,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    wrapped, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if by_criterion else dpzoo.ModelLoss()
    dpzoo.prime_empty_batches(loader)
    watch = Watch()
    while len(watch.seconds) < STEPS:
        for batch in itertools.islice(loader, STEPS - len(watch.seconds)):
            optimizer.zero_grad()
            criterion(wrapped(**batch)).backward()
            optimizer.step()
            watch.step()
    watch.assert_flat()
    wanted = fresh_epsilon(SIGMA, BATCH / ROWS)
    assert engine.get_epsilon(1e-5) == pytest.approx(wanted, rel=1e-9)


def test_a_long_trainer_runs_flat_and_its_account_is_true(tmp_path: Path) -> None:
    class Watching(transformers.TrainerCallback):
        watch = Watch()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.watch.step()

    callback = Watching()
    trainer = trainer_of(
        dpzoo.convert(stock_model(BERT, torch.float32)),
        tmp_path,
        {"noise_multiplier": SIGMA, "target_delta": 1e-5},
        max_steps=STEPS,
        callbacks=[callback],
    )
    trainer.train()
    callback.watch.assert_flat()
    rate = 8 / 16
    assert trainer.epsilon == pytest.approx(fresh_epsilon(SIGMA, rate), rel=1e-9)
