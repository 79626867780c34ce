"""Planted loops: a private loop, wrong in one way, and two that are right."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpzoo


class Loop:
    """What a loop trains with."""

    def __init__(self, mode: str = "hooks", **options: Any) -> None:
        freeze = options.pop("freeze", ())
        learning_rate = options.pop("lr", 0.1)
        self.net = nn.Sequential(nn.Linear(7, 40), nn.Tanh(), nn.Linear(40, 5))
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in freeze)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        data = TensorDataset(torch.randn(40, 7), torch.randint(0, 5, (40,)))
        self.engine = (dpzoo.PrivacyEngine if mode == "bk" else PrivacyEngine)(accountant="rdp")
        made = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(trained, lr=learning_rate),
            data_loader=DataLoader(data, batch_size=8),
            criterion=nn.CrossEntropyLoss(),
            noise_multiplier=1.1,
            max_grad_norm=options.pop("max_grad_norm", 0.7),
            grad_sample_mode=mode,
            **options,
        )
        self.model, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if mode in ("ghost", "bk") else F.cross_entropy

    def objects(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.loader, self.engine

    def backward(self, batch: Any, scale: float = 1.0) -> None:
        (self.criterion(self.model(batch[0]), batch[1]) * scale).backward()

    def step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        self.backward(batch)
        self.optimizer.step()


@dataclass
class PlantedLoop:
    """A loop's bug; as `tests.auditing.planted.Planted`.

    Args:
        build: makes the loop and the arguments of audit_loop.
    """

    name: str
    check: str
    severity: str
    says: str
    build: Callable[[], tuple[Loop, dict[str, Any]]]
    modes: tuple[str, ...] = field(default=())


def with_noise(add: Callable[[Any], None], scale: Callable[[Any], None] | None = None) -> Loop:
    """A loop whose optimizer adds noise, or divides, in a way of its own."""
    loop = Loop()
    optimizer = loop.optimizer

    class Custom(type(optimizer)):  # type: ignore[misc]
        def add_noise(self) -> None:
            add(self)

        if scale is not None:

            def scale_grad(self) -> None:
                scale(self)

    optimizer.__class__ = Custom
    return loop


def _forgets_c(optimizer: DPOptimizer) -> None:
    for p in optimizer.params:
        p.grad = p.summed_grad + optimizer.noise_multiplier * 0.5 * torch.randn_like(p)


def _on_the_mean(optimizer: DPOptimizer) -> None:
    """Noise calibrated to the sum, divided by the batch size once more than the gradient is."""
    for p in optimizer.params:
        noise = optimizer.noise_multiplier * optimizer.max_grad_norm * torch.randn_like(p)
        p.grad = p.summed_grad + noise / optimizer.expected_batch_size


def _times_batch(optimizer: DPOptimizer) -> None:
    for p in optimizer.params:
        noise = optimizer.noise_multiplier * optimizer.max_grad_norm * torch.randn_like(p)
        p.grad = p.summed_grad + noise * optimizer.expected_batch_size


def _seeded(optimizer: DPOptimizer) -> None:
    torch.manual_seed(0)
    for p in optimizer.params:
        p.grad = p.summed_grad + 1.1 * 0.7 * torch.randn_like(p)


def _not_the_head(optimizer: DPOptimizer) -> None:
    for p in optimizer.params:
        noise = 1.1 * 0.7 * torch.randn_like(p)
        p.grad = p.summed_grad + (noise if len(p) != 5 else 0 * noise)


def _unfrozen(mode: str) -> Loop:
    loop = Loop(mode, freeze=("0.weight", "0.bias"))
    for p in loop.net.parameters():
        p.requires_grad_()
    return loop


def _abandoned() -> Loop:
    loop = Loop()
    with BatchMemoryManager(
        data_loader=loop.loader, max_physical_batch_size=2, optimizer=loop.optimizer
    ) as parts:
        for batch in parts:
            loop.step(batch)
            break
    return loop


def _stale_optimizer() -> Loop:
    """The model's weights are replaced after the optimizer was made (a move, an adapter)."""
    loop = Loop()
    head = loop.net[2]
    head.weight = nn.Parameter(head.weight.detach().clone())
    head.weight.grad_sample, head.weight._forward_counter = None, 0
    return loop


def _wrong_rate() -> Loop:
    loop = Loop()
    hook = loop.engine.accountant.get_optimizer_hook_fn(sample_rate=0.01)
    loop.optimizer.attach_step_hook(hook)
    return loop


def _less_noise() -> Loop:
    loop = Loop()
    loop.engine.accountant.history = [(1.1, 0.2, 3)]

    def hook(optimizer: Any) -> None:
        loop.engine.accountant.step(noise_multiplier=2.2, sample_rate=0.2)

    loop.optimizer.attach_step_hook(hook)
    return loop


def _no_hook() -> Loop:
    loop = Loop()
    loop.optimizer.step_hook = None
    return loop


def _post_hoc_clipping() -> tuple[Loop, dict[str, Any]]:
    loop = Loop("ghost")

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loop.backward(batch)
        nn.utils.clip_grad_norm_(loop.net.parameters(), 0.01)
        loop.optimizer.step()

    return loop, {"step": step}


def _accumulating() -> tuple[Loop, dict[str, Any]]:
    loop = Loop("ghost")

    def step(batch: Any) -> None:
        half = max(len(batch[0]) // 2, 1)
        loop.optimizer.zero_grad()
        for part in (slice(0, half), slice(half, None)):
            loop.backward((batch[0][part], batch[1][part]))
        loop.optimizer.step()

    return loop, {"step": step}


def _scaled_loss() -> tuple[Loop, dict[str, Any]]:
    loop = Loop()

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loop.backward(batch, scale=2.0**16)
        loop.optimizer.step()

    return loop, {"step": step}


def _eager_scheduler() -> tuple[Loop, dict[str, Any]]:
    """It steps for each physical batch."""
    loop = Loop()
    scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer.original_optimizer, 1)

    def step(batch: Any) -> None:
        loop.step(batch)
        for _ in range(3):
            scheduler.step()

    return loop, {"step": step, "scheduler": scheduler}


def _with(loop: Loop, **options: Any) -> tuple[Loop, dict[str, Any]]:
    return loop, options


class Scaler:
    """As much of a GradScaler as is asked for (torch's disables itself without an accelerator)."""

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 2.0**16


PLANTED_LOOPS = [
    PlantedLoop("shuffled batches under a Poisson accountant", "loop lint", "privacy",
                "not drawn by Poisson sampling", lambda: _with(Loop(poisson_sampling=False))),
    PlantedLoop("an accountant with a smaller rate", "loop lint", "privacy",
                "smaller sampling rate", lambda: _with(_wrong_rate())),
    PlantedLoop("an accountant with more noise", "loop lint", "privacy",
                "more noise than the optimizer", lambda: _with(_less_noise())),
    PlantedLoop("no accountant", "loop lint", "privacy", "no accountant hears",
                lambda: _with(_no_hook())),
    PlantedLoop("a GradScaler", "loop lint", "utility", "GradScaler",
                lambda: _with(Loop(), scaler=Scaler())),
    PlantedLoop("clip_grad_norm_, said", "loop lint", "utility", "clipped once more",
                lambda: _with(Loop("ghost"), clip_grad_norm=1.0)),
    PlantedLoop("accumulation under ghost, said", "loop lint", "privacy", "keeps the last one only",
                lambda: _with(Loop("ghost"), accumulation_steps=4)),
    PlantedLoop("an optimizer of other weights", "loop lint", "utility", "not the model's",
                lambda: _with(_stale_optimizer())),
    PlantedLoop("unfreezing after wrapping, ghost", "freshness", "privacy", "were unfrozen after",
                lambda: _with(_unfrozen("ghost"))),
    PlantedLoop("unfreezing after wrapping, hooks", "freshness", "privacy", "were unfrozen after",
                lambda: _with(_unfrozen("hooks"))),
    PlantedLoop("an abandoned BatchMemoryManager", "freshness", "privacy", "was left early",
                lambda: _with(_abandoned())),
    PlantedLoop("noise without C", "noise", "privacy", "less than the standard deviation",
                lambda: _with(with_noise(_forgets_c))),
    PlantedLoop("noise divided by the batch size twice", "noise", "privacy",
                "less than the standard deviation", lambda: _with(with_noise(_on_the_mean))),
    PlantedLoop("sum-calibrated noise on the mean", "noise", "utility",
                "more than the standard deviation", lambda: _with(with_noise(_times_batch))),
    PlantedLoop("noise of one seed", "noise", "privacy", "not independent",
                lambda: _with(with_noise(_seeded))),
    PlantedLoop("a parameter without noise", "noise", "privacy", "get no noise",
                lambda: _with(with_noise(_not_the_head))),
    PlantedLoop("clip_grad_norm_ under ghost, seen", "loop steps", "utility",
                "change between the backward pass and the step", _post_hoc_clipping),
    PlantedLoop("accumulation under ghost, seen", "loop steps", "privacy",
                "keeps the last one's gradient only", _accumulating),
    PlantedLoop("a loss scale, seen", "loop steps", "note", "more than 95 % of rows", _scaled_loss),
    PlantedLoop("a scheduler for each physical batch", "loop steps", "utility",
                "steps more often", _eager_scheduler),
    PlantedLoop("weights that do not move", "loop steps", "utility", "no weight moves",
                lambda: (lambda loop: (loop, {"step": loop.step}))(Loop(lr=0.0))),
]  # fmt: skip
