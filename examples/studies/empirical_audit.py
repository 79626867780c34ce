"""What the empirical audit finds: a right private training, and five that are not, with many seeds.

    python examples/studies/empirical_audit.py --seeds 100

A logistic regression trains on 500 random rows and 1,000 canaries, of which coins put about half in. Each
canary has a feature of its own, so that its gradient is orthogonal to all others. The table says how often
the audit put a bound above the epsilon that the accountant claims. The whole study takes minutes.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpzoo
from dpzoo.accounting import epsilon_of

ROWS, CANARIES, FEATURES = 500, 1000, 16
RATE, STEPS, DELTA, C = 1 / 2, 64, 1e-5, 1.0
NOISE = {8.0: 2.542, 1.0: 15.3}  # about that epsilon -> noise multiplier
LENGTH = 30.0  # of a canary: its gradient is far longer than C

FAULTS = ("none", "no noise", "half the noise", "unclipped rows", "one seed", "wrong rate by 4")


@contextmanager
def planted(fault: str, optimizer: Any) -> Iterator[None]:
    """The private optimizer with a fault; the accountant is not told."""
    if fault == "no noise":
        optimizer.noise_multiplier = 0.0
    elif fault == "half the noise":
        optimizer.noise_multiplier /= 2
    elif fault == "unclipped rows":
        optimizer.clip_factors = lambda squared, norms: {None: torch.ones_like(norms)}
    elif fault == "one seed":

        def add(tensors: list[torch.Tensor], std: float, scale: float = 1.0, **_: Any) -> bytes:
            generator = torch.Generator().manual_seed(0)
            for tensor in tensors:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * std).mul_(scale)
            return b""

        optimizer.release.noise.add = add
    yield


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def run(fault: str, noise: float, seed: int) -> dpzoo.RunReport:
    """Train once, and audit."""
    generator = torch.Generator().manual_seed(seed)
    size = FEATURES + CANARIES
    features = torch.zeros(ROWS, size)
    features[:, :FEATURES] = torch.randn(ROWS, FEATURES, generator=generator)
    labels = (features[:, 0] > 0).long()
    private = TensorDataset(features, labels)
    own = torch.zeros(CANARIES, size)
    own[:, FEATURES:] = LENGTH * torch.eye(CANARIES)
    canaries = dpzoo.Canaries(list(zip(own, torch.ones(CANARIES, dtype=torch.long), strict=True)))
    rows = canaries.mix(private)

    model = torch.nn.Linear(size, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trace = canaries.watch(model, optimizer, loss=loss_of)
    engine = dpzoo.PrivacyEngine()
    model, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(rows, batch_size=math.ceil(len(rows) * RATE)),
        criterion=torch.nn.CrossEntropyLoss(),
        noise_multiplier=noise,
        max_grad_norm=C,
        grad_sample_mode="bk",
    )
    with planted(fault, optimizer):
        for _ in range(STEPS // len(loader)):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
    scores = {
        "sums": trace.sums(),
        "spread": trace.spread(),
        "loss": canaries.losses(model, loss=loss_of),
    }
    accounted = RATE / 4 if fault == "wrong rate by 4" else RATE
    epsilon = epsilon_of("prv", ((noise, accounted, STEPS),), DELTA)
    return dpzoo.audit_run(canaries, scores, delta=DELTA, epsilon=epsilon, independent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", help="draw the first right run's report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| fault | claimed epsilon | runs with a bound above it | any mechanism | Gaussian curve |"
          " independent canaries | seconds a run |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    cases = [(fault, 8.0) for fault in FAULTS] + [("none", 1.0)]
    for fault, target in cases:
        start = time.process_time()
        reports = [run(fault, NOISE[target], seed) for seed in range(options.seeds)]
        seconds = (time.process_time() - start) / options.seeds
        if options.plot and (fault, target) == cases[0]:
            reports[0].plot(options.plot)
        bounds = [
            " to ".join(
                f"{q:.2f}" for q in np.quantile([r[b.name].epsilon for r in reports], (0, 1))
            )
            for b in reports[0].bounds
        ]
        failed = sum(not report.ok for report in reports)
        print(f"| {fault} | {reports[0].epsilon:.2f} | {failed} of {options.seeds} | "
              f"{' | '.join(bounds)} | {seconds:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
