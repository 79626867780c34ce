"""A training loop's objects, and what is wrong with how they are put together."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dpzoo.auditing.record import Record
from dpzoo.clipping.draws import CountedSampler
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.clipping.units import UnitRows
from dpzoo.opacus_internals import (
    counts_ghost_norms,
    is_ghost_optimizer,
    is_poisson,
    is_splitting,
)
from dpzoo.poisson import rows_of


class Loop:
    """The objects of a loop, and what they are beneath their wrappers."""

    def __init__(self, model: Any, optimizer: Any, loader: Any, engine: Any) -> None:
        self.wrapper, self.optimizer, self.loader, self.engine = model, optimizer, loader, engine
        self.module: nn.Module = getattr(model, "_module", model)
        self.accountant = getattr(engine, "accountant", None)
        release = getattr(optimizer, "release", None)
        self.seeded = release is not None and not release.noise.is_secure
        ghost = is_ghost_optimizer(optimizer) or counts_ghost_norms(model)
        book = isinstance(optimizer, BookKeepingOptimizer)
        self.mode = "bk" if book else "ghost" if ghost else "hooks"

    @property
    def sampler(self) -> Any:
        """The batch sampler beneath a BatchMemoryManager's and the engine's count."""
        sampler: Any = getattr(self.loader, "batch_sampler", None)
        while is_splitting(sampler) or isinstance(sampler, CountedSampler):
            sampler = sampler.sampler
        return sampler

    def generators(self) -> list[torch.Generator]:
        """The generators that the optimizer, the loader and its samplers were given."""
        sampler, owners = getattr(self.loader, "batch_sampler", None), [self.optimizer, self.loader]
        while sampler is not None:
            owners.append(sampler)
            sampler = getattr(sampler, "sampler", None)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))

    def size(self) -> int | None:
        """Rows of the data set; None where rows cannot be asked for and collated by themselves."""
        data: Any = getattr(self.loader, "dataset", None)
        if not callable(getattr(self.loader, "collate_fn", None)):
            return None
        return len(data) if hasattr(data, "__getitem__") and hasattr(data, "__len__") else None

    def rows_of(self, drawn: Sequence[int]) -> tuple[list[Any], list[int]]:
        """The rows of some draw of rows, or of units: the rows, and what is drawn with each."""
        data: Any = self.loader.dataset
        if not isinstance(data, UnitRows):
            return rows_of(data, list(drawn)), list(drawn)
        chosen = {
            unit: data.chosen(unit, lambda _, have, want: range(want)) for unit in data.draw(drawn)
        }
        labels = [unit for unit, rows in chosen.items() for _ in rows]
        return rows_of(data.dataset, [row for rows in chosen.values() for row in rows]), labels

    def collated(self, drawn: Sequence[int]) -> Any:
        """The batch of a draw, as the loader makes it."""
        return self.loader.collate_fn(self.rows_of(drawn)[0])

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The model's trainable parameters, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def name_of(self, parameter: nn.Parameter) -> str:
        """A parameter's name in the model, or that it has none there."""
        names = (n for n, p in self.module.named_parameters() if p is parameter)
        return next(names, f"(not in the model: shape {tuple(parameter.shape)})")

    def accounted(self) -> tuple[float, float] | None:
        """(noise multiplier, sampling rate) that the accountant would write down for a step."""
        hook = getattr(self.optimizer, "step_hook", None)
        if hook is None or self.accountant is None:
            return None
        kept = copy.deepcopy(self.accountant.history)
        try:
            hook(_FakeOptimizer(self.optimizer))
            sigma, rate, _ = self.accountant.history[-1]
            return float(sigma), float(rate)
        finally:
            self.accountant.history = kept


class _FakeOptimizer:
    """An optimizer after one plain step, for the accountant's hook."""

    accumulated_iterations = 1

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def sampling(loop: Loop, record: Record) -> None:
    """The sampler is Poisson, with the rate that is accounted."""
    sampler = loop.sampler
    rate = getattr(sampler, "sample_rate", None)
    if not is_poisson(sampler):
        inner = type(getattr(sampler, "sampler", None)).__name__
        record.find(
            "privacy",
            "batches are not drawn by Poisson sampling, and the accountant counts on it: shuffled or "
            "fixed batches leak more than it says",
            "train with the loader that make_private(poisson_sampling=True) returns",
            expected="each row in each batch independently with one probability",
            got=f"{type(sampler).__name__} over {inner}",
        )
    accounted = loop.accounted()
    if accounted is None:
        record.find(
            "privacy",
            "no accountant hears of the optimizer's steps",
            "optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate))",
        )
        return
    sigma, accounted_rate = accounted
    if rate is not None and not accounted_rate >= rate * (1 - 1e-6):
        record.find(
            "privacy",
            "the accountant counts on a smaller sampling rate than the loader's",
            "make the loader and the accountant with one make_private call",
            expected=f"{rate:.6g} (the loader's)",
            got=f"{accounted_rate:.6g}",
        )
    if not sigma <= float(loop.optimizer.noise_multiplier) * (1 + 1e-6):
        record.find(
            "privacy",
            "the accountant counts on more noise than the optimizer adds",
            "do not change noise_multiplier in one of the two only",
            expected=f"{loop.optimizer.noise_multiplier:.6g} (the optimizer's)",
            got=f"{sigma:.6g}",
        )
    _secrets(loop, record, sigma)
    expected = getattr(loop.optimizer, "expected_batch_size", None)
    if rate is not None and expected and loop.optimizer.loss_reduction == "mean":
        true = rate * sampler.num_samples
        if abs(expected / true - 1) > 0.05 and abs(expected - true) > 1:
            record.find(
                "utility",
                "the optimizer divides by another batch size than the loader's expected one: the "
                "effective learning rate is off by their ratio",
                "set expected_batch_size to sampling rate * rows of the data set",
                expected=f"{true:.4g}",
                got=f"{expected:.4g}",
            )


def _secrets(loop: Loop, record: Record, sigma: float) -> None:
    """The noise has a secret, and all that is released is paid for."""
    if loop.seeded:
        record.find(
            "privacy",
            "the noise follows from a seed (noise_generator): whoever knows or guesses it can subtract it",
            "leave noise_generator out: the noise then has a secret key",
        )
    count_std = getattr(loop.optimizer, "unclipped_num_std", None)
    if count_std and not isinstance(loop.optimizer, BookKeepingOptimizer):
        # Its gradients' noise is raised for a count that a row moves by 1/2; a row moves it by 1.
        true = (sigma**-2 - (2 * count_std) ** -2 + count_std**-2) ** -0.5
        record.find(
            "privacy",
            "Opacus' adaptive clipping releases how many rows were not clipped, which a row moves by 1, "
            "where the accountant assumes 1/2; and divides it by the batch's size, which is private",
            "use dpzoo.PrivacyEngine with grad_sample_mode='bk' and clipping='adaptive'",
            expected=f"noise multiplier {sigma:.4g}",
            got=f"{true:.4g} at most",
        )


def parameters(loop: Loop, record: Record) -> None:
    """The optimizer trains the model's trainable parameters, all of them, on one device."""
    held = {id(p) for p in loop.optimizer.params}
    own = {id(p) for p in loop.module.parameters()}
    foreign = [p for p in loop.optimizer.params if id(p) not in own]
    if foreign:
        record.find(
            "utility",
            "the optimizer holds parameters that are not the model's: they are stepped, and the model "
            "stays as it is",
            "make the optimizer after the model is on its device, adapted and converted",
            parameters=[f"shape {tuple(p.shape)}" for p in foreign],
            expected="the model's own parameters",
            got=f"{len(foreign)} others",
        )
    left = [name for name, p in loop.trainable.items() if id(p) not in held]
    if left:
        record.find(
            "utility",
            "trainable parameters are not in the optimizer: they never move, and in ghost mode their "
            "gradients still count in the norm",
            "freeze them, or give them to the optimizer",
            parameters=left,
        )
    devices = {str(p.device) for p in loop.module.parameters()}
    if len(devices) > 1:
        record.find(
            "note",
            f"the model is spread over several devices ({', '.join(sorted(devices))})",
            "move it to one device before adapters and the optimizer are made",
        )
    rates = [group.get("lr") for group in loop.optimizer.param_groups]
    if any(rate == 0 for rate in rates):
        record.find(
            "note",
            "a parameter group has learning rate 0 now",
            "no cause for worry in a scheduler's warm-up; else the weights never move",
        )


def settings(
    loop: Loop, record: Record, scaler: Any, accumulation: int, clip: float | None
) -> None:
    """What the caller says about the loop."""
    enabled = scaler is not None and getattr(scaler, "is_enabled", lambda: True)()
    if enabled:
        record.find(
            "utility",
            "a GradScaler multiplies the loss before per-sample gradients are clipped: every norm is "
            "scaled, so that every row is clipped, however short its gradient",
            "train in bfloat16 without a scaler",
            expected="loss scale 1",
            got=f"loss scale {scaler.get_scale():g}",
        )
    if clip:
        record.find(
            "utility",
            "the gradient is clipped once more, after per-sample clipping; in ghost mode before the "
            "noise is added, and the noise hides it",
            "set it to 0 or leave the call out: the private optimizer clips",
            expected="no clip_grad_norm_",
            got=f"clip_grad_norm_({clip:g})",
        )
    if accumulation > 1:
        record.find(
            "privacy",
            f"{accumulation} of the loader's batches for one step: "
            + (
                "ghost mode keeps the last one only, and the accountant counts one draw"
                if loop.mode == "ghost"
                else "several Poisson draws in one step may hold a row several times, and the accountant "
                "counts one"
            ),
            "take a step for each batch; split large ones with "
            "opacus.utils.batch_memory_manager.BatchMemoryManager",
            expected="one draw for each step",
            got=str(accumulation),
        )
