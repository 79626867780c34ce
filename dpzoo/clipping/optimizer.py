"""The private optimizer: clip factors, and noise added in place to sums that are already clipped."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from dpzoo.clipping.draws import Draws
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.noise import NoiseSource
from dpzoo.clipping.ranks import Ranks, scattered
from dpzoo.clipping.rules import ClippingRule, rule_of
from dpzoo.errors import InputError
from dpzoo.factors import upcast
from dpzoo.ledger import Ledger
from dpzoo.opacus_internals import (
    forget_skips,
    note_step,
    skipped_last,
    skips_next,
    without_noise,
)


class Release:
    """Numbers and names the steps of a run, and writes them to its ledger."""

    def __init__(self, noise: NoiseSource) -> None:
        self.noise = noise
        self.run = secrets.token_hex(8)
        self.steps = 0
        self.sample_rate = 1.0
        self.was_new = True
        """Whether the last step was one that has not been paid for yet."""
        self.keeps_ledgers = True
        """False on all ranks but the first, which makes the entries."""
        self._ledgers: dict[str, Ledger] = {}

    def watched_by(self, ledger: Ledger) -> Ledger:
        """Write the coming steps to a ledger, too; returns the ledger of that path."""
        if not self.keeps_ledgers:
            return ledger
        return self._ledgers.setdefault(str(ledger.path.absolute()), ledger)

    def begin(self, noise_multiplier: float) -> int:
        """A step is taken; its number, from 1 on."""
        self.steps += 1
        for ledger in self._ledgers.values():
            ledger.begin(
                self.run,
                self.steps,
                noise_multiplier=float(noise_multiplier),
                sample_rate=self.sample_rate,
            )
        return self.steps

    def commit(self, *names: bytes) -> None:
        """Its noise is drawn, and named."""
        digest = b"".join(names).hex()
        new = [ledger.commit(self.run, self.steps, digest) for ledger in self._ledgers.values()]
        self.was_new = all(new)

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with. SECRET for as long as the data are: it has the noise's key."""
        return {"noise": self.noise.state(), "run": self.run, "steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: it is not such a state.
        """
        if not isinstance(state, dict) or set(state) != {"noise", "run", "steps"}:
            raise InputError(
                "The noise state is not one that this version of dpzoo wrote, wanted the run's name, its "
                "steps and the key of its noise. Resume with the dpzoo that wrote the checkpoint."
            )
        self.noise.load_state(state["noise"])
        self.run, self.steps = str(state["run"]), int(state["steps"])


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Raise for optimizers that evaluate the loss several times a step.

    Raises:
        InputError: it is LBFGS.
    """
    if isinstance(optimizer, LBFGS):
        raise InputError(
            "The optimizer is LBFGS, which evaluates the loss several times in a step: each time would be "
            "one more look at the data. Wanted one that steps on one gradient, such as SGD or AdamW."
        )


class OneGradient:
    """Mixed into private optimizers: a step takes one gradient, and every step hook is called."""

    step_hook: Any

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """A private step.

        Raises:
            InputError: a closure is given; the rows that came are not those of one draw.
        """
        if closure is not None:
            raise InputError(
                "The private optimizer's step() got a closure, wanted none: call backward() before it."
            )
        return super().step()  # type: ignore[misc]

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """As Opacus', after the hooks that are there: the accountant's stays."""
        before = self.step_hook

        def both(optimizer: Any) -> None:
            before(optimizer)
            fn(optimizer)

        self.step_hook = fn if before is None else both


class BookKeepingOptimizer(OneGradient, DPOptimizerFastGradientClipping):
    """A `DPOptimizer` whose gradients arrive clipped and summed in ``summed_grad``.

    Args:
        optimizer: any torch optimizer.
        noise_multiplier: sigma; the noise on each coordinate of the sum is N(0, (sigma C)^2).
        max_grad_norm: C; for clipping="per_layer" a list, one for each parameter of the optimizer.
        expected_batch_size: what the sum is divided by for "mean".
        loss_reduction: "mean" or "sum".
        generator: a torch generator that fixes the noise: for experiments, it voids the guarantee. By
            default the noise has a secret key; see `dpzoo.clipping.noise`.
        secure_mode: allows no ``generator``; the noise is the default's.
        noise: the source of the noise, instead of both.
        clipping: "flat", "per_layer", "automatic" or "adaptive", or a rule: `dpzoo.clipping.rules`.
        **kwargs: the rule's arguments, and Opacus'.

    The sums of a step are the optimizer's own: ``sums``. A parameter's ``summed_grad`` shows its sum, for
    reading. They are dropped when an exception comes between, when the loader begins again, and when the
    set of trained parameters changes.

    Guarantees:
        Noise is added once per logical step, to every trainable parameter, whether or not a gradient
        reached it. What it is added to are the clipped rows of one draw, each once.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: Any,
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        generator: Any = None,
        secure_mode: bool = False,
        clipping: str | ClippingRule = "flat",
        noise: NoiseSource | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_optimizer(optimizer)
        self.rule = rule_of(clipping, kwargs)
        max_grad_norm = self.rule.start(
            [p for group in optimizer.param_groups for p in group["params"]],
            max_grad_norm,
            noise_multiplier,
            expected_batch_size,
        )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
            **kwargs,
        )
        self.release = Release(source_of(generator) if noise is None else noise)
        self.draws = Draws(strict=False)
        self.sums: dict[torch.Tensor, torch.Tensor] = {}
        self._versions: dict[
            torch.Tensor, tuple[torch.Tensor, int]
        ] = {}  # of the sums, as added up
        self._trained: frozenset[int] = frozenset()  # the parameters of the present sums
        self._clipped_at = 0.0  # the largest norm that a row of the present sums may have
        self.statistics: Any = None
        """A `Statistics`, which is shown norms and sums before there is noise in them: not private."""

    @property
    def gradient_noise_multiplier(self) -> float:
        """Standard deviation of the gradients' noise in units of the clipping norm."""
        return self.rule.gradient_noise(self.noise_multiplier)

    def noise_state(self) -> dict[str, Any]:
        """What the noise of the coming steps depends on: secret, as long as the run's data are."""
        return {"release": self.release.state(), "max_grad_norm": float(self.max_grad_norm)}

    def load_noise_state(self, state: dict[str, Any]) -> None:
        """Go on where `noise_state` was taken: equal sums get the noise that they would have got.

        Raises:
            InputError: it is not such a state.
        """
        if not isinstance(state, dict) or set(state) != {"release", "max_grad_norm"}:
            raise InputError(
                "The noise state is not one that this version of dpzoo wrote, wanted a release and a "
                "max_grad_norm. Resume with the dpzoo that wrote the checkpoint."
            )
        self.release.load_state(state["release"])
        self.max_grad_norm = float(state["max_grad_norm"])

    # --- sums -----------------------------------------------------------------------------------

    def add_rows(
        self,
        store: FactorStore,
        named: list[tuple[str, torch.Tensor]],
        inputs: Any = (),
        whole: dict[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Add the clipped rows of a backward pass to the sums.

        Args:
            store: what the backward pass recorded.
            named: (name, parameter) of all that are trained.
            inputs: the model's, (rows, ...) each.
            whole: parameter -> what it is in the store, where it is something else (under FSDP2).

        Returns:
            (norms, clip factors or None for several), (units,) each, and how many units were left out
            because their gradient is not finite.

        Raises:
            InputError: a trained parameter is not the optimizer's; the set of trained parameters changed
                since the draw's first part; the rows are not the draw's (`dpzoo.clipping.draws`).
        """
        own = {id(p) for p in self._all_parameters()}
        lost = [name for name, p in named if id(p) not in own]
        if lost:
            raise InputError(
                f"{lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''} of the model's trained "
                f"parameters are not in the private optimizer, wanted all: rows are clipped by the norm of "
                f"what is trained. Freeze them (requires_grad_(False)), or add them to the optimizer "
                f"before make_private. Two optimizers of one model are not supported: use parameter groups."
            )
        trained = frozenset(id(p) for _, p in named)
        if self.sums and trained != self._trained:
            self.drop()
            raise InputError(
                "Parameters were frozen or unfrozen between two parts of one draw, wanted the same to be "
                "trained in all of them. Change what is trained between steps. The sums are dropped."
            )
        self.draws.take(store.rows, inputs)
        self._before_sums()
        self._trained = trained
        whole = whole or {}
        by_use = store.squared_norms()
        # Large tables, which come first in a model, last: what other layers hold is free by then. One order
        # on all ranks, because FSDP2 adds up parameter by parameter.
        uses = {p: whole.get(p, p) for _, p in reversed(named)}
        squared = {p: by_use[use] for p, use in uses.items() if use in by_use}
        device = next((v.device for v in squared.values()), torch.device("cpu"))
        total = (
            torch.stack([v.to(device) for v in squared.values()]).sum(0)
            if squared
            else torch.zeros(store.units.count, device=device)
        )
        factors = self.clip_factors(squared, total.sqrt())
        finite = total.isfinite()
        if self.statistics is not None:
            self.statistics.record_rows(squared, total.sqrt(), self.max_grad_norm)
        kept = None if bool(finite.all()) else finite
        for parameter, use in uses.items():
            if parameter in squared:
                weights = factors[parameter if parameter in factors else None].to(use.device)
                here = None if kept is None else kept.to(use.device)
                self._add_up(parameter, partial(store.weighted_sum, use, weights, here))
            else:
                self._add_up(parameter, None)
            setattr(parameter, "summed_grad", self.sums.get(parameter))  # noqa: B010
        self._versions = {p: (total, total._version) for p, total in self.sums.items()}
        return total.sqrt(), factors.get(None), int((~finite).sum())

    def _before_sums(self) -> None:
        """All that is refused has been."""

    def _add_up(
        self, parameter: torch.Tensor, weighted_sum: Callable[[Any], torch.Tensor] | None
    ) -> None:
        """Add a backward pass's sum to a parameter's; ``weighted_sum`` is None if no row reached it."""
        if weighted_sum is not None:
            self.sums[parameter] = weighted_sum(self.sums.get(parameter))

    def drop(self) -> None:
        """Forget the sums, and what a `BatchMemoryManager` has announced."""
        self._forget()
        forget_skips(self)

    def fail(self, error: BaseException) -> None:
        """An error in the backward pass; `drop` has been called."""

    def _forget(self) -> None:
        for parameter in self.sums:
            setattr(parameter, "summed_grad", None)  # noqa: B010
        self.sums.clear()
        self._versions.clear()
        if self.statistics is not None:
            self.statistics.begin()
        self._trained, self._clipped_at = frozenset(), 0.0
        self.rule.forget()

    def clip_factors(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor
    ) -> dict[torch.Tensor | None, torch.Tensor]:
        """The factor of each unit, (units,), under None; or of each unit and parameter ("per_layer").

        Args:
            squared: parameter -> squared norms of the units, (units,).
            norms: norms of the units over all parameters, (units,).
        """
        self._clipped_at = max(self._clipped_at, self.max_grad_norm)
        return self.rule.factors(self.max_grad_norm, squared, norms)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; and the sums, unless a draw's earlier parts were stepped over.

        Args:
            set_to_none: free ``grad`` (as in torch.optim, and unlike Opacus, the default): the sums
                of the next batch are new tensors, and zeros would take memory for nothing.
        """
        if not skipped_last(self) and self.sums:
            self.draws.abandon()
            self._forget()
        self.original_optimizer.zero_grad(set_to_none)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise and scale the sums, unless the step is one of a logical batch's earlier parts."""
        if skips_next(self):
            return False
        self.draws.finish()
        if self.sums and self._trained != frozenset(id(p) for p in self.params):
            self.drop()
            raise InputError(
                "Parameters were frozen or unfrozen between backward() and step(), wanted the same to be "
                "trained in both. Change what is trained between steps. The sums are dropped."
            )
        try:
            self.add_noise()
            if self.step_hook:
                self.step_hook(self)
        except BaseException:
            self.drop()  # the draw is over: nothing of it may be added to the next one's sums
            raise
        note_step(self)
        return True

    def add_noise(self) -> None:
        """Turn the sums, in place, into the noised and scaled gradients."""
        known = [(self.sums.get(p), *kept) for p, kept in self._versions.items()]
        if any(now is total and total._version != version for now, total, version in known):
            raise InputError(
                "A parameter's summed_grad was changed in place between backward() and step(), wanted it "
                "for reading alone: rows would be in the sum with more than their clipping norm. Scale the "
                "losses, or the gradients after the step's noise. The sums are dropped."
            )
        grads = []
        for parameter in self.params:
            total = self.sums.get(parameter)
            grads.append(_zeros(parameter) if total is None else total)
        # A scheduler may have changed max_grad_norm since the rows were clipped.
        clipped_at = max(self._clipped_at, self.max_grad_norm)
        if not 0 < clipped_at < math.inf:
            raise InputError(
                f"The private optimizer has max_grad_norm={self.max_grad_norm!r}, wanted a number above 0: "
                f"the noise is a multiple of it. The sums are dropped."
            )
        std = self.gradient_noise_multiplier * clipped_at
        scale = 1.0 if self.loss_reduction == "sum" else 1.0 / self.expected_batch_size
        if self.statistics is not None:
            self.statistics.record_sums(grads, std)
        self._noise_in_place(grads, std, scale)
        self._forget()
        for parameter, grad in zip(self.params, grads, strict=True):
            # Rounded to the parameter's dtype after the noise, not before: that is post-processing.
            parameter.grad = _like(parameter, grad.to(parameter.dtype))
        for parameter in self._all_parameters():
            if not parameter.requires_grad:
                parameter.grad = None  # torch's optimizers would step on what is left there

    def _noise_in_place(self, grads: list[torch.Tensor], std: float, scale: float) -> None:
        """Noise for the gradients and the rule's counts: one release, of all these sums."""
        noise, counts = self.release.noise, self.rule.counts()
        digest = noise.digest([*grads, *counts])
        step = self.release.begin(self.noise_multiplier)
        names = [noise.add(grads, std, scale, step=step, digest=digest)]
        if counts:
            count_std = self.rule.count_std if self.noise_multiplier else 0.0
            names.append(noise.add(counts, count_std, step=step, digest=digest, domain="count"))
        self.release.commit(*names)
        self.max_grad_norm = self.rule.next_norm(
            self.max_grad_norm, counts, self.expected_batch_size
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "The private optimizer was copied or pickled, wanted one of a run: its sums, draws and account "
            "are its own. Save its state_dict(), or use PrivacyEngine.save_checkpoint."
        )

    def _all_parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class DistributedBookKeepingOptimizer(BookKeepingOptimizer):
    """`BookKeepingOptimizer` for one of several processes: sums over all ranks, and noise on rank 0.

    All ranks have rank 0's key and run; rank 0 keeps the ledger. A step that fails on one fails on all.

    Guarantees:
        A unit's rows are of one rank in a step, where they are clipped as one: ranks compare their units
        before anything is added up for release.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = Ranks.present()
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.release.keeps_ledgers = self.rank == 0
        self.release.load_state(self.ranks.share(self.release.state()))

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """As in one process, on the sums of all ranks.

        Raises:
            RankError: a rank did not come in time, or failed. No gradient is set.
        """
        try:
            return super().pre_step(closure)
        except BaseException as error:
            self.drop()
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks."""
        self.ranks.fail(error)

    def add_noise(self) -> None:
        """As in one process, when all ranks are here.

        Raises:
            InputError: a unit has rows on two ranks, or rows have ids on one rank and none on another.
        """
        _refuse_cut(self.ranks.meet(f"step {self.release.steps + 1}", self.draws.stepped))
        super().add_noise()

    def _noise_in_place(self, grads: list[torch.Tensor], std: float, scale: float) -> None:
        if self.loss_reduction == "mean":
            scale /= self.world_size
        with self.ranks.waiting(f"sums of step {self.release.steps + 1}"):
            for index, (parameter, grad) in enumerate(zip(self.params, grads, strict=True)):
                # A rank without rows knows the sum's type by the parameter's.
                grads[index] = grad = grad.to(sum_dtype(parameter))
                torch.distributed.reduce(grad, 0)
            # Noise is a function of the whole sums: it is drawn once, and sent to the others.
            if self.rank == 0:
                super()._noise_in_place(grads, std, scale)
            else:
                self.release.begin(self.noise_multiplier)
            for grad in grads:
                torch.distributed.broadcast(grad, 0)
        self.release.was_new = self.ranks.share(self.release.was_new)


class ShardedBookKeepingOptimizer(DistributedBookKeepingOptimizer):
    """`DistributedBookKeepingOptimizer` under FSDP2: each rank has its shards' sums, noise and gradients.

    Sums go to their shards one parameter at a time. Each rank draws the noise of its own shards, from the
    shared key and under its own name, which covers the sums of all shards.
    """

    def _before_sums(self) -> None:
        self.ranks.meet("sums of a backward pass")

    def _add_up(self, parameter: Any, weighted_sum: Callable[[Any], torch.Tensor] | None) -> None:
        dtype, device = sum_dtype(parameter), parameter.device
        whole = (
            torch.zeros(parameter.shape, dtype=dtype, device=device)
            if weighted_sum is None
            else weighted_sum(None)
        )
        with self.ranks.waiting("sums of a backward pass"):
            shard = scattered(whole.to(dtype), parameter)
        total = self.sums.get(parameter)
        self.sums[parameter] = shard if total is None else total.add_(shard)

    def _noise_in_place(self, grads: list[torch.Tensor], std: float, scale: float) -> None:
        if self.loss_reduction == "mean":
            scale /= self.world_size
        noise = self.release.noise
        digest = b"".join(self.ranks.meet("digests", noise.digest(grads)))
        step = self.release.begin(self.noise_multiplier)
        shard = f"gradients of shard {self.rank} of {self.world_size}"
        name = noise.add(grads, std, scale, step=step, digest=digest, domain=shard)
        self.release.commit(name)
        # Nothing is released before rank 0 has entered it.
        self.release.was_new = self.ranks.meet("entry in the ledger", self.release.was_new)[0]


class OpacusStep(OneGradient):
    """Mixed into the optimizers of Opacus' modes: the draws are counted, and the noise has a secret key."""

    release: Release
    draws: Draws
    counts_samples: bool

    def clip_and_accumulate(self) -> None:
        """As Opacus'; the rows of the per-sample gradients are those of the draw."""
        if self.counts_samples:
            for parameter in self.params:  # type: ignore[attr-defined]
                sample = getattr(parameter, "grad_sample", None)
                if sample is not None:
                    parts = sample if isinstance(sample, list) else [sample]
                    self.draws.take(sum(len(part) for part in parts))
                    break
        super().clip_and_accumulate()  # type: ignore[misc]

    def add_noise(self) -> None:
        """As Opacus', with noise from the release's source."""
        self.draws.finish()
        try:
            self._add_noise()
        except BaseException:
            self.drop()  # the draw is over: nothing of it may be added to the next one's sums
            raise

    def _add_noise(self) -> None:
        own: Any = self
        with without_noise(own) as std:
            super().add_noise()  # type: ignore[misc]
        if getattr(own, "rank", 0) != 0:
            return
        step = self.release.begin(own.noise_multiplier)
        whole = [upcast(p.grad) for p in own.params]
        # One process's part does not determine the sum of all: its noise is fresh at each step.
        digest = secrets.token_bytes(32) if hasattr(own, "rank") else None
        self.release.commit(self.release.noise.add(whole, std, step=step, digest=digest))
        for parameter, grad in zip(own.params, whole, strict=True):
            parameter.grad = grad.to(parameter.grad.dtype)

    def drop(self) -> None:
        """Forget the sums, and what a `BatchMemoryManager` has announced."""
        own: Any = self
        for parameter in own.params:
            parameter.summed_grad = None
            parameter.grad_sample = None
        forget_skips(own)


def with_release(
    optimizer: DPOptimizer, noise: NoiseSource, *, counts_samples: bool
) -> DPOptimizer:
    """An optimizer of one of Opacus' modes, with `OpacusStep` in front of its class."""
    optimizer.__class__ = type(type(optimizer).__name__, (OpacusStep, type(optimizer)), {})
    optimizer.release, optimizer.draws = Release(noise), Draws(strict=False)
    optimizer.counts_samples = counts_samples
    return optimizer


def source_of(generator: torch.Generator | None) -> NoiseSource:
    """The source of the noise: a secret key, or what a user's generator gives, which a log line says."""
    if generator is None:
        return NoiseSource()
    drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
    return NoiseSource.insecure(int(drawn))


def _refuse_cut(said: list[tuple[frozenset[Any], bool]]) -> None:
    """Raise unless each unit of a step is on one rank; ``said`` is each rank's `Draws.stepped`."""
    owners: dict[Any, int] = {}
    for rank, (units, _) in enumerate(said):
        for unit in units:
            if owners.setdefault(unit, rank) != rank:
                raise InputError(
                    f"Rows of unit {unit!r} came on ranks {owners[unit]} and {rank} in one step, wanted "
                    f"all rows of a unit on one rank: they are clipped as one. Use the loader that "
                    f"make_private(unit_ids=...) returned as it is, which gives each unit to one rank; or, "
                    f"with poisson_sampling=False, bring a unit's rows to one rank. Nothing of this step "
                    f"was released."
                )
    bare = [rank for rank, (_, unnamed) in enumerate(said) if unnamed]
    if owners and bare:
        raise InputError(
            f"backward() got unit_ids on rank {next(iter(owners.values()))} and none on rank {bare[0]}, "
            f"wanted the ids of all rows on all ranks: without them a row is a unit by itself. Give "
            f"unit_ids in each backward() of the step. Nothing of this step was released."
        )


def sum_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The type of a parameter's sum and noise."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    """The sum of no rows: of this rank's shard, under FSDP2."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.zeros(own.shape, dtype=sum_dtype(parameter), device=own.device)


def _like(parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient in a parameter's shape, and under FSDP2 a shard's as a part of the whole."""
    if not isinstance(parameter, DTensor):
        return grad.view_as(parameter)
    return DTensor.from_local(
        grad,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
