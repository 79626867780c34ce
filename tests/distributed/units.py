"""One of two processes that train over units with `dpzoo.PrivacyEngine`, honestly and otherwise.

    torchrun --nproc-per-node 2 -m tests.distributed.units FOLDER

writes FOLDER/RANK.pt, name -> what this rank saw. The judging is done in `test_units`.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

import dpzoo
from dpzoo.clipping import engine
from tests.distributed.steps import Case, distribute, full, prepared
from tests.secrets_that_repeat import repeat_secrets

UNITS = 12
OWNERS = [f"u{(5 * i) % UNITS}" for i in range(UNITS)] + [f"u{k}" for k in (0, 0, 0, 1, 1, 4, 7, 7)]
"""Units of one to four rows, which are not side by side."""
CLIP, CAP, BATCH, DRAWS = 0.3, 3, 4, 6000
WAYS = ("ddp", "fsdp")


class Owned(Dataset[Any]):
    """Rows of float64, with large gradients; each says which it is."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(len(OWNERS), 4, generator=generator, dtype=torch.float64) * 3
        self.y = torch.arange(len(OWNERS)) % 3

    def __len__(self) -> int:
        return len(OWNERS)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i], i


def model_of() -> nn.Sequential:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def wrapped(model: nn.Sequential, way: str) -> Any:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp":
        fully_shard(model[0])
        return fully_shard(model)
    return model


class Run:
    """A private run of the small model; the learning rate is 0, so that all steps are at one point."""

    def __init__(self, way: str, **options: Any) -> None:
        self.model = model_of()
        self.engine = dpzoo.PrivacyEngine(accountant="rdp")
        rank = distributed.get_rank()
        module = wrapped(self.model, way)
        torch.manual_seed(100 + rank)
        settings = {"unit_ids": OWNERS, "max_rows_per_unit": CAP, "noise_multiplier": 0.0}
        made = self.engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.0),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(
                options.pop("rows", None) or Owned(), batch_size=options.pop("batch", BATCH)
            ),
            grad_sample_mode="bk",
            **{"max_grad_norm": CLIP, **settings, **options},
        )
        self.private, self.optimizer, self.criterion, self.loader = made

    def step(self, x: torch.Tensor, y: torch.Tensor, ids: Any = None) -> list[torch.Tensor]:
        """The gradient of a step, whole."""
        self.optimizer.zero_grad()
        self.criterion(self.private(x), y).backward(unit_ids=ids)
        self.optimizer.step()
        return [full(p.grad) for p in self.model.parameters()]

    def steps(self, passes: int) -> list[tuple[list[int], list[torch.Tensor]]]:
        """This rank's rows, and the gradient, of each step."""
        return [
            (rows.tolist(), self.step(x, y)) for _ in range(passes) for x, y, rows in self.loader
        ]


def honest(way: str) -> dict[str, Any]:
    run = Run(way)
    seen = run.steps(4)
    parts = Run(way)
    again = []
    for x, y, rows in parts.loader:  # as many parts on all ranks, of whole units
        ends = [0, *_ends(rows.tolist()), len(rows)]
        cut = ends[len(ends) // 2]
        parts.optimizer.signal_skip_step(do_skip=True)
        _part(parts, x[:cut], y[:cut])
        parts.optimizer.signal_skip_step(do_skip=False)
        _part(parts, x[cut:], y[cut:])
        again.append((rows.tolist(), [full(p.grad) for p in parts.model.parameters()]))
    noisy = Run(way, noise_multiplier=1.3)
    noisy.steps(2)
    return {
        "steps": seen,
        "parts": again,
        "epsilon": noisy.engine.get_epsilon(1e-3),
        "history": noisy.engine.accountant.history,
        "expected": run.optimizer.expected_batch_size,
    }


def _ends(rows: list[int]) -> list[int]:
    names = [OWNERS[i] for i in rows]
    return [k for k in range(1, len(names)) if names[k] != names[k - 1]]


def _part(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
    run.optimizer.zero_grad()
    run.criterion(run.private(x), y).backward()
    run.optimizer.step()


def draws() -> list[list[int]]:
    """This rank's units of many draws."""
    sampler = Run("ddp").loader.batch_sampler
    return [list(d) for _ in range(DRAWS // len(sampler)) for d in sampler]


def neighbours(way: str) -> list[torch.Tensor]:
    """Sums of rows that the caller draws: with a unit of rank 1's, and without, where it then has none."""
    rows, sums = Owned(), []
    for there in (True, False):
        run = Run(way, unit_ids=None, max_rows_per_unit=None, poisson_sampling=False)
        names = ("u0", "u7") if distributed.get_rank() == 0 else ("u1",) * there
        mine = [i for i, name in enumerate(OWNERS) if name in names]
        grads = run.step(rows.x[mine], rows.y[mine], [OWNERS[i] for i in mine])
        sums.append(torch.cat([g.flatten() for g in grads]) * BATCH)
    return sums


def transformer(way: str) -> tuple[list[int], float]:
    """A BERT over two units of two rows: its largest difference from one process."""
    case = Case("BertForSequenceClassification", "layers" if way == "fsdp" else "ddp")
    everyone: Any = {}
    for spread in (False, True):
        model, batch, criterion = prepared(case)
        mine = [0, 2, 1, 3] if not spread else [0, 2] if distributed.get_rank() == 0 else [1, 3]
        made = dpzoo.PrivacyEngine(accountant="rdp").make_private(
            module=distribute(case, model) if spread else model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            criterion=criterion,
            data_loader=DataLoader(list(range(4)), batch_size=4),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            poisson_sampling=False,
            grad_sample_mode="bk",
        )
        criterion.batch = {key: value[mine] for key, value in batch.items()}
        loss = made[2](made[0](**criterion.batch))
        loss.backward(unit_ids=["even" if row in (0, 2) else "odd" for row in mine])
        made[1].step()
        everyone[spread] = {n: full(p.grad) for n, p in model.named_parameters()}
    scale = max(float(v.abs().max()) for v in everyone[False].values())
    off = max(float((everyone[True][n] - v).abs().max()) for n, v in everyone[False].items())
    return mine, off / scale


# --- attacks ----------------------------------------------------------------------------------------


def mine(this: Any, other: Any) -> Any:
    """One value on rank 0, another on rank 1."""
    return this if distributed.get_rank() == 0 else other


def on_two_ranks(way: str) -> None:
    """The caller brings a unit's rows to two ranks."""
    run, rows = Run(way, unit_ids=None, max_rows_per_unit=None, poisson_sampling=False), Owned()
    own = mine([0, 12], [13, 1])  # u0, u0; u0, u5
    run.step(rows.x[own], rows.y[own], [OWNERS[i] for i in own])


def shared_out_twice(way: str) -> None:
    """The ranks' samplers are told to share the units out differently."""
    run = Run(way)
    run.loader.batch_sampler.set_epoch(mine(0, 1))
    for _ in range(5):
        run.steps(1)


def ids_on_one(way: str) -> None:
    run, rows = Run(way, unit_ids=None, max_rows_per_unit=None, poisson_sampling=False), Owned()
    run.step(rows.x[:2], rows.y[:2], mine(OWNERS[:2], None))


def cut(way: str) -> None:
    """Rank 0 cuts a unit in two parts."""
    run = Run(way, batch=UNITS)  # all units: sample rate 1
    for x, y, rows in run.loader:
        ends = _ends(rows.tolist())
        inside = [k for k in range(1, len(rows)) if k not in ends]
        at = mine(inside, ends)[0]
        run.optimizer.signal_skip_step(do_skip=True)
        _part(run, x[:at], y[:at])
        run.optimizer.signal_skip_step(do_skip=False)
        _part(run, x[at:], y[at:])


def a_row_more(way: str) -> None:
    """Rank 0 brings a row that was not drawn: found after its backward pass, before its sums."""
    run = Run(way, unit_ids=None, max_rows_per_unit=None)
    for x, y, _ in run.loader:
        more = [torch.cat([v, torch.ones_like(Owned()[0][k])[None]]) for k, v in enumerate((x, y))]
        run.step(*mine(more, (x, y)))


def another_order(way: str) -> None:
    """The rows of one rank are shuffled, as by a split without a seed."""
    rows = mine(Owned(), Subset(Owned(), [*range(1, len(OWNERS)), 0]))
    Run(way, unit_ids=None, max_rows_per_unit=None, rows=rows)


def differing(**options: Any) -> Callable[[str], None]:
    def attack(way: str) -> None:
        Run(way, **{name: mine(*values) for name, values in options.items()})

    return attack


def not_spread(way: str) -> None:
    Run("alone")


ATTACKS: dict[str, Callable[[str], None]] = {
    "on two ranks": on_two_ranks,
    "shared out twice": shared_out_twice,
    "ids on one": ids_on_one,
    "cut": cut,
    "other ids": differing(unit_ids=(OWNERS, OWNERS[::-1])),
    "other types": differing(unit_ids=([*range(20)], [str(i) for i in range(20)])),
    "own rows": differing(unit_ids=([i // 2 for i in range(20)], [i // 2 + 10 for i in range(20)])),
    "no ids": differing(unit_ids=(OWNERS, None), max_rows_per_unit=(CAP, None)),
    "other cap": differing(max_rows_per_unit=(CAP, CAP + 1)),
    "other norm": differing(max_grad_norm=(CLIP, 10 * CLIP)),
    "other rate": differing(batch=(BATCH, BATCH - 1)),
    "not spread": not_spread,
    "another order": another_order,
    "a row more": a_row_more,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    engine.secret_generator = lambda: None  # draws repeat: by the seed of each rank
    repeat_secrets(os.environ["RANK"])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results: dict[str, Any] = {"draws": draws()}
    for way in WAYS:
        results[f"honest {way}"] = honest(way)
        results[f"neighbours {way}"] = neighbours(way)
        results[f"transformer {way}"] = transformer(way)
        for name, attack in ATTACKS.items():
            began = time.monotonic()
            try:
                attack(way)
                results[f"{name} {way}"] = ""
            except dpzoo.DpzooError as error:
                results[f"{name} {way}"] = f"{type(error).__name__}: {error}"
            results[f"{name} took"] = time.monotonic() - began
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
