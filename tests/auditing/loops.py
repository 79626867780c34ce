"""Planted loops: a private loop, wrong in one way; and right ones."""

import random
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
from dpzoo.clipping.noise import NoiseSource


class Loop:
    """What a loop trains with."""

    def __init__(self, mode: str = "hooks", **options: Any) -> None:
        freeze = options.pop("freeze", ())
        learning_rate = options.pop("lr", 0.1)
        collate = options.pop("collate_fn", None)
        between = nn.Sequential(nn.Tanh(), nn.Dropout(options.pop("dropout", 0.0)))
        self.net = nn.Sequential(nn.Linear(7, 40), between, nn.Linear(40, 5))
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in freeze)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        data = TensorDataset(torch.randn(40, 7), torch.randint(0, 5, (40,)))
        own, batch = options.pop("own", mode == "bk"), options.pop("batch_size", 8)
        self.engine = (dpzoo.PrivacyEngine if own else PrivacyEngine)(accountant="rdp")
        made = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(trained, lr=learning_rate),
            data_loader=DataLoader(data, batch_size=batch, collate_fn=collate),
            criterion=nn.CrossEntropyLoss(reduction=options.get("loss_reduction", "mean")),
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


def collated(rows: list[Any]) -> tuple[torch.Tensor, ...]:
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


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


# --- what only the body, the collator or the loader shows ----------------------------------------------


def _every_fourth() -> tuple[Loop, dict[str, Any]]:
    """Gradients of four draws for one step."""
    loop, count = Loop("bk", poisson_sampling=False), iter(range(10**6))

    def step(batch: Any) -> None:
        loop.backward(batch)
        if next(count) % 4 == 3:
            loop.optimizer.step()
            loop.optimizer.zero_grad()

    return loop, {"step": step}


def _reseeded_body(mode: str) -> tuple[Loop, dict[str, Any]]:
    loop, count = Loop(mode, max_grad_norm=20.0), iter(range(10**6))

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loop.backward(batch)
        torch.manual_seed(next(count) // 1000)
        loop.optimizer.step()

    return loop, {"step": step}


def _known_key() -> tuple[Loop, dict[str, Any]]:
    """A key of zeros for each step's noise, put there by the body."""
    loop = Loop("bk", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        loop.optimizer.release.noise = NoiseSource(bytes(32))
        loop.step(batch)

    return loop, {"step": step}


def _second_optimizer() -> tuple[Loop, dict[str, Any]]:
    """The bias of the head is trained by what hooks mode leaves in ``grad``: the sum without noise."""
    loop = Loop(max_grad_norm=20.0)
    other = torch.optim.SGD([loop.net[2].bias], lr=0.1)

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loop.backward(batch)
        other.step()
        loop.optimizer.step()

    return loop, {"step": step}


def _whole_data(mode: str) -> tuple[Loop, dict[str, Any]]:
    loop = Loop(mode, max_grad_norm=20.0, poisson_sampling=True)
    data = collated([loop.loader.dataset[i] for i in range(40)])
    return loop, {"step": lambda batch: loop.step(data)}


def _skips_empty(mode: str) -> tuple[Loop, dict[str, Any]]:
    loop = Loop(mode, max_grad_norm=20.0)
    return loop, {"step": lambda batch: loop.step(batch) if len(batch[0]) else None}


def _scaled_rate() -> tuple[Loop, dict[str, Any]]:
    """The learning rate follows the loss of the private batch."""
    loop = Loop("bk", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loss = loop.criterion(loop.model(batch[0]), batch[1])
        loss.backward()
        loop.optimizer.param_groups[0]["lr"] = 0.1 * loss.item()
        loop.optimizer.step()

    return loop, {"step": step}


def _true_size() -> tuple[Loop, dict[str, Any]]:
    """The sum is divided by the number of rows that were drawn, which is private."""
    loop = Loop("bk", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        loop.optimizer.expected_batch_size = max(len(batch[0]), 1)
        loop.step(batch)

    return loop, {"step": step}


def _twice() -> tuple[Loop, dict[str, Any]]:
    loop = Loop(max_grad_norm=20.0)

    def step(batch: Any) -> None:
        for _ in range(2):
            loop.step(batch)

    return loop, {"step": step}


def _past_the_private_one() -> tuple[Loop, dict[str, Any]]:
    """The optimizer below the private one is stepped: its gradients are sums without noise."""
    loop = Loop(max_grad_norm=20.0)

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loop.backward(batch)
        loop.optimizer.original_optimizer.step()

    return loop, {"step": step}


def _begun_from_data() -> tuple[Loop, dict[str, Any]]:
    """The head's bias begins with the classes of the first batch."""
    loop, begun = Loop("bk", max_grad_norm=20.0), []

    def step(batch: Any) -> None:
        if not begun:
            begun.append(True)
            loop.net[2].bias.data.copy_(torch.bincount(batch[1], minlength=5) / len(batch[1]))
        loop.step(batch)

    return loop, {"step": step}


def _two_norms() -> tuple[Loop, dict[str, Any]]:
    """Rows are clipped at 1000, the noise is for 20."""
    loop = Loop("ghost", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        clip = loop.model.max_grad_norm
        loop.model.max_grad_norm = 1e3
        loop.optimizer.zero_grad()
        loop.backward(batch)
        loop.model.max_grad_norm = clip
        loop.optimizer.step()

    return loop, {"step": step}


def _unaccounted() -> tuple[Loop, dict[str, Any]]:
    loop = Loop(max_grad_norm=20.0)

    def step(batch: Any) -> None:
        loop.optimizer.step_hook = None
        loop.step(batch)

    return loop, {"step": step}


def _silent() -> tuple[Loop, dict[str, Any]]:
    """The noise is off during the step, and on for whoever looks."""
    loop = Loop("bk", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        sigma, loop.optimizer.noise_multiplier = loop.optimizer.noise_multiplier, 0.0
        loop.step(batch)
        loop.optimizer.noise_multiplier = sigma

    return loop, {"step": step}


def _half() -> tuple[Loop, dict[str, Any]]:
    loop = Loop(max_grad_norm=20.0)
    return loop, {"step": lambda batch: loop.step([x[: len(x) // 2] for x in batch])}


def _shortest(rows: list[Any]) -> Any:
    """Cuts all rows to the length of the shortest."""
    x, y = collated(rows)
    kept = torch.arange(7) < (x.abs() > 0.4).sum(1).min()
    return x * kept, y


def _with_collator(collate: Any, mode: str = "bk") -> tuple[Loop, dict[str, Any]]:
    loop = Loop(mode, max_grad_norm=20.0, collate_fn=collate)
    return loop, {"step": loop.step}


def _mixup(rows: list[Any]) -> Any:
    x, y = collated(rows)
    return 0.7 * x + 0.3 * x[torch.randperm(len(x))], y


def _copied(rows: list[Any]) -> Any:
    """Batches of a fixed size, filled up with the first row."""
    return collated([*rows, *[rows[0]] * (8 - len(rows))])


def _cut(rows: list[Any]) -> Any:
    x, y = collated(rows)
    return torch.cat([x, 0.5 * x]), torch.cat([y, y])


class Remembering:
    """A collator that mixes in what it saw last."""

    def __init__(self) -> None:
        self.last = torch.zeros(7)

    def __call__(self, rows: list[Any]) -> Any:
        x, y = collated(rows)
        mixed, self.last = x + 0.5 * self.last, x.mean(0)
        return mixed, y


def _sum_for_mean() -> tuple[Loop, dict[str, Any]]:
    """Opacus takes the sum over rows for their mean: each row is scaled by the number of rows."""
    loop = Loop(max_grad_norm=20.0)
    loop.criterion = nn.CrossEntropyLoss(reduction="sum")
    return loop, {"step": loop.step}


class Reseeding:
    """A loader that seeds its generator at the beginning of each pass."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __iter__(self) -> Any:
        torch.manual_seed(0)
        return iter(self.loader)


def _reseeded_passes() -> Loop:
    loop = Loop()
    loop.loader = Reseeding(loop.loader)
    return loop


def _sorted(rows: list[Any]) -> Any:
    return collated(sorted(rows, key=lambda row: float(row[0][0])))


def _noisy(rows: list[Any]) -> Any:
    x, y = collated(rows)
    return x + 0.1 * torch.randn_like(x), y


def _jittered(rows: list[Any]) -> Any:
    """As many of Python's random numbers as there are rows."""
    x, y = collated(rows)
    return x * torch.tensor([[random.uniform(0.9, 1.1)] for _ in rows]), y


def _smoothed(mode: str) -> tuple[Loop, dict[str, Any]]:
    """Weights are clamped and averaged after the step: that is post-processing."""
    loop = Loop(mode, max_grad_norm=20.0)
    mean = [p.detach().clone() for p in loop.net.parameters()]

    def step(batch: Any) -> None:
        loop.step(batch)
        with torch.no_grad():
            for p, average in zip(loop.net.parameters(), mean, strict=True):
                p.clamp_(-1, 1)
                average.lerp_(p, 0.1)

    return loop, {"step": step}


def _without_forward() -> tuple[Loop, dict[str, Any]]:
    """In bk an empty draw needs a step, and neither forward nor backward pass."""
    loop = Loop("bk", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        if len(batch[0]):
            loop.backward(batch)
        loop.optimizer.step()

    return loop, {"step": step}


def _scheduled() -> tuple[Loop, dict[str, Any]]:
    loop = Loop("bk", max_grad_norm=20.0)
    scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer.original_optimizer, 1)

    def step(batch: Any) -> None:
        loop.step(batch)
        scheduler.step()

    return loop, {"step": step, "scheduler": scheduler}


def _own_ghost() -> tuple[Loop, dict[str, Any]]:
    loop = Loop("ghost", max_grad_norm=20.0, own=True)

    def step(batch: Any) -> None:
        loop.optimizer.zero_grad()
        loop.criterion(loop.model(batch[0]), batch[1]).backward()
        loop.optimizer.step()

    return loop, {"step": step}


CLEAN_LOOPS: dict[str, Callable[[], tuple[Loop, dict[str, Any]]]] = {
    "a collator that sorts": lambda: _with_collator(_sorted),
    "a collator that adds noise": lambda: _with_collator(_noisy),
    "a collator that draws for each row": lambda: _with_collator(_jittered, "hooks"),
    "weights that are clamped and averaged": lambda: _smoothed("hooks"),
    "the same under ghost": lambda: _smoothed("ghost"),
    "empty draws without a forward pass": _without_forward,
    "a scheduler": _scheduled,
    "hooks mode of dpzoo's engine": lambda: (lambda loop: (loop, {"step": loop.step}))(
        Loop("hooks", max_grad_norm=20.0, own=True)
    ),
    "ghost mode of dpzoo's engine": _own_ghost,
    "dropout": lambda: (lambda loop: (loop, {"step": loop.step}))(
        Loop("bk", max_grad_norm=20.0, dropout=0.3)
    ),
    "dropout under ghost": lambda: (lambda loop: (loop, {"step": loop.step}))(
        Loop("ghost", max_grad_norm=20.0, dropout=0.3)
    ),
}
"""Right loops, which none of the checks may name."""

ADAPTIVE = {
    "clipping": "adaptive",
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.4,
    "max_clipbound": 50.0,
    "min_clipbound": 0.01,
    "unclipped_num_std": 1.5,
}


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
    PlantedLoop("unfreezing after wrapping, ghost", "stale_state", "privacy", "were unfrozen after",
                lambda: _with(_unfrozen("ghost"))),
    PlantedLoop("unfreezing after wrapping, hooks", "stale_state", "privacy", "were unfrozen after",
                lambda: _with(_unfrozen("hooks"))),
    PlantedLoop("an abandoned BatchMemoryManager", "stale_state", "privacy", "was left early",
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
    PlantedLoop("several draws for one step, said", "loop lint", "privacy",
                "of the loader's batches for one step",
                lambda: _with(Loop("bk"), accumulation_steps=5)),
    PlantedLoop("several draws for one step, seen", "loop steps", "privacy",
                "several draws go into one step", _every_fourth),
    PlantedLoop("the same rows in every pass", "loop lint", "privacy",
                "every pass over the loader draws the same rows", lambda: _with(_reseeded_passes())),
    PlantedLoop("noise from the user's generator", "loop lint", "privacy", "the noise follows from a seed",
                lambda: _with(Loop("bk", noise_generator=torch.Generator().manual_seed(3)))),
    PlantedLoop("Opacus' adaptive clipping", "loop lint", "privacy", "which a row moves by 1",
                lambda: _with(Loop(**ADAPTIVE))),
    PlantedLoop("noise seeded in the body", "loop trials", "privacy",
                "the noise is the same whatever the generator's state", lambda: _reseeded_body("hooks")),
    PlantedLoop("draws seeded in the body", "loop trials", "privacy", "the loop's body seeds a generator",
                lambda: _reseeded_body("bk")),
    PlantedLoop("a key of the noise that is known", "loop trials", "privacy",
                "the noise is the same whatever the generator's state", _known_key),
    PlantedLoop("a second optimizer on raw gradients", "loop trials", "privacy",
                "learns from the batch past clipping and noise", _second_optimizer),
    PlantedLoop("a learning rate that follows the loss", "loop trials", "privacy",
                "learns from the batch past clipping and noise", _scaled_rate),
    PlantedLoop("sums divided by the rows drawn", "loop trials", "privacy",
                "learns from the batch past clipping and noise", _true_size),
    PlantedLoop("a body that trains on all rows", "loop trials", "privacy",
                "a step takes 40 rows where the draw has 5", lambda: _whole_data("hooks")),
    PlantedLoop("empty draws that are skipped", "loop trials", "privacy", "takes no step on an empty batch",
                lambda: _skips_empty("hooks")),
    PlantedLoop("mixup in the collator", "loop trials", "privacy", "changes the other rows' share",
                lambda: _with_collator(_mixup)),
    PlantedLoop("copies of a row in the collator", "loop trials", "privacy", "a step takes 8 rows",
                lambda: _with_collator(_copied, "hooks")),
    PlantedLoop("a collator that cuts rows", "loop trials", "privacy", "a step takes 10 rows",
                lambda: _with_collator(_cut, "hooks")),
    PlantedLoop("a collator that remembers", "loop trials", "privacy", "rows of the batch before it",
                lambda: _with_collator(Remembering())),
    PlantedLoop("a sum that is taken for a mean", "loop trials", "privacy", "changes the other rows' share",
                _sum_for_mean),
    PlantedLoop("two steps on one draw", "loop steps", "privacy", "several private steps are taken on one",
                _twice),
    PlantedLoop("the optimizer below the private one", "loop trials", "privacy",
                "learns from the batch past clipping and noise", _past_the_private_one),
    PlantedLoop("weights that begin from data", "loop trials", "privacy",
                "learns from the batch past clipping and noise", _begun_from_data),
    PlantedLoop("clipped at one norm, noise for another", "loop trials", "privacy",
                "moves the clipped sum by more than the clipping norm", _two_norms),
    PlantedLoop("a step that is not accounted", "loop trials", "privacy", "the accountant is not told",
                _unaccounted),
    PlantedLoop("noise that is off in the body", "loop trials", "privacy", "sets noise_multiplier to 0",
                _silent),
    PlantedLoop("half of the rows", "loop trials", "privacy", "a step takes 2 rows", _half),
    PlantedLoop("rows cut to the batch's shortest", "loop trials", "privacy",
                "changes the other rows' share", lambda: _with_collator(_shortest)),
    PlantedLoop("weights that do not move", "loop steps", "utility", "no weight moves",
                lambda: (lambda loop: (loop, {"step": loop.step}))(Loop(lr=0.0))),
]  # fmt: skip
