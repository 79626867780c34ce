"""A small private run, for the tests of draws, sums and checkpoints."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dpzoo

ROWS, RATE = 40, 8
MODES = ("bk", "ghost", "hooks", "functorch")


class Numbered(Dataset[Any]):
    """Rows whose features are large, so that each is clipped; the last feature is the row's number."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        return torch.randn(4) * 30, index % 3


class Run:
    """A private run of a small model, without noise unless asked for."""

    def __init__(self, mode: str = "bk", **options: Any) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.model = options.pop("model", None) or nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        self.model.train()
        make = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))
        loader = options.pop(
            "loader",
            DataLoader(Numbered(), batch_size=RATE, collate_fn=options.pop("collate_fn", None)),
        )
        self.engine = dpzoo.PrivacyEngine(accountant="rdp", **options.pop("engine", {}))
        made = self.engine.make_private(
            module=self.model,
            optimizer=make(self.model.parameters()),
            criterion=nn.CrossEntropyLoss(),
            data_loader=loader,
            noise_multiplier=options.pop("noise_multiplier", 0.0),
            max_grad_norm=options.pop("max_grad_norm", 1.0),
            grad_sample_mode=mode,
            **options,
        )
        self.private, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.criterion(self.private(x), y).backward()

    def steps(self) -> int:
        return sum(count for _, _, count in self.engine.accountant.history)


def by_hand(**options: Any) -> Run:
    return Run(poisson_sampling=False, **options)


BATCH = (torch.randn(5, 4) * 30, torch.tensor([0, 1, 2, 0, 1]))
