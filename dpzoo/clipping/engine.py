"""`dpzoo.PrivacyEngine`: Opacus' engine with one more mode, ``grad_sample_mode="bk"``."""

from __future__ import annotations

import logging
import math
import numbers
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import opacus
import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn, optim
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dpzoo.clipping.criterion import PrivateCriterion
from dpzoo.clipping.draws import Draws, count_draws
from dpzoo.clipping.frozen import FrozenWatch, refuse_learning_buffers
from dpzoo.clipping.module import BookKeepingHooks, BookKeepingModule
from dpzoo.clipping.noise import NoiseSource
from dpzoo.clipping.optimizer import (
    BookKeepingOptimizer,
    DistributedBookKeepingOptimizer,
    ShardedBookKeepingOptimizer,
    refuse_optimizer,
    source_of,
    with_release,
)
from dpzoo.clipping.rules import rule_of
from dpzoo.clipping.units import UnitRows, unit_loader, unit_terms
from dpzoo.errors import DpzooError, InputError, first_line
from dpzoo.files import path_of, whole_file
from dpzoo.ledger import Ledger
from dpzoo.opacus_internals import on_ghost_backward
from dpzoo.poisson import prime_empty_batches, rows_digest

log = logging.getLogger(__name__)

SPREAD = (
    DistributedDataParallel,
    DifferentiallyPrivateDistributedDataParallel,
    FSDPModule,
)
"""What a model is that several processes train as one."""

RELEASE_STATE = "dpzoo_release"
"""Key of a checkpoint: the noise's key, the run's name, its steps and the ledger's."""
BESIDE = "the path of a file: the ledger of the steps that were begun lies beside it"


class PrivacyEngine(opacus.PrivacyEngine):
    """`opacus.PrivacyEngine` with book-keeping: exact private steps in one backward pass.

    With ``grad_sample_mode="bk"``, `make_private` and `make_private_with_epsilon` return what Opacus'
    ghost mode returns, (model, optimizer, criterion, loader), and the loop is the same:

        loss = criterion(model(**batch))
        loss.backward()
        optimizer.step()

    All other modes and the accountants are Opacus' own. ``clipping`` may be "flat", "per_layer",
    "automatic" or "adaptive", with Opacus' arguments for it; in mode "bk" also a rule of your own
    (`dpzoo.clipping.rules`).

    In every mode:

    - A step has to take one draw of the returned loader (`dpzoo.clipping.draws`), under Poisson sampling.
      With ``poisson_sampling=False`` the caller is responsible for the draws.
    - Noise comes from a secret key (`dpzoo.clipping.noise`). ``secure_mode=True`` is the same; it refuses
      a ``noise_generator``, which would void the guarantee.
    - Nothing but trainable parameters may change in a training forward (`dpzoo.clipping.frozen`).

    Args:
        accountant: "prv", "rdp" or "gdp" (an approximation that can be too small; it is warned about).
        secure_mode: no generator of the user's.

    Guarantees:
        Each logical step adds N(0, (noise_multiplier * max_grad_norm)^2) noise, once, to a sum in
        which a row's share has norm at most ``max_grad_norm``; with ``unit_ids``, a unit's, all its rows
        together.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        super().__init__(accountant=accountant, secure_mode=False)  # Opacus' wants torchcsprng
        self._keyed = secure_mode
        self._releases: list[Any] = []
        self.replicated = False
        """Whether every rank has the whole model, its own share of one draw, and no wrapper to say so."""
        if accountant == "gdp":
            warnings.warn(
                "accountant='gdp' is a central-limit approximation, and its epsilon can be far below the "
                "true one. Use 'prv' or 'rdp' for an epsilon that is to be stated.",
                stacklevel=2,
            )

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        loss_reduction: str = "mean",
        grad_sample_mode: str = "hooks",
        poisson_sampling: bool = True,
        noise_generator: torch.Generator | None = None,
        unit_ids: Any = None,
        max_rows_per_unit: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `opacus.PrivacyEngine.make_private`, with ``grad_sample_mode="bk"`` among the modes.

        Args:
            unit_ids: in mode "bk": whose each row of the loader's data set is; a sequence of ids, or the
                name of a column. Rows with equal ids are one unit of privacy: Poisson sampling draws units,
                the loader's batch size is of units, a unit's drawn rows are clipped as one gradient (of the
                mean of their losses), and epsilon is for adding or removing a unit with all its rows.
            max_rows_per_unit: of a unit with more rows a draw takes so many, chosen afresh.
            **kwargs: Opacus'.

        Raises:
            InputError: ids as of `dpzoo.clipping.units.UnitRows`, or in another mode, or without Poisson
                sampling; the loader has a sampler that Poisson sampling would replace; a generator in
                secure mode; an optimizer that evaluates the loss several times a step; ranks that draw
                alike, or that have different units, caps, clipping norms, noise or numbers of batches.
            UnsupportedModelError: a layer that learns from the batch without gradients.
        """
        refuse_optimizer(optimizer)
        _check_norm(kwargs.get("max_grad_norm", 1.0))
        refuse_learning_buffers(module)
        data_loader = _units_of(data_loader, unit_ids, max_rows_per_unit)
        units = data_loader.dataset if isinstance(data_loader.dataset, UnitRows) else None
        if units is not None and (grad_sample_mode != "bk" or not poisson_sampling):
            raise InputError(
                f"make_private got unit_ids in grad_sample_mode={grad_sample_mode!r} with "
                f"poisson_sampling={poisson_sampling}, wanted 'bk' and True: Opacus' modes clip each row "
                f"by itself, so that a unit of k rows moves the sum by k C; and what is drawn are units. "
                f"Use grad_sample_mode='bk', or leave out unit_ids: the unit is then the row."
            )
        if units is not None and not isinstance(module, SPREAD) and _processes() > 1:
            raise InputError(
                f"make_private got unit_ids in {_processes()} processes and a {type(module).__name__} that "
                f"is not spread over them, wanted DistributedDataParallel(model) or fully_shard(model): "
                f"else each process draws from all units, and trains a model of its own. Wrap the model, "
                f"or train in one process."
            )
        if self._keyed and noise_generator is not None:
            raise InputError(
                "make_private got a noise_generator in secure mode, wanted none: whoever knows its seed "
                "can subtract the noise. Leave it out, or make the engine with secure_mode=False."
            )
        if kwargs.get("clipping") == "adaptive" and grad_sample_mode != "bk":
            raise InputError(
                f"grad_sample_mode={grad_sample_mode!r} got clipping='adaptive', wanted mode 'bk': in the "
                f"others a row moves the released count by 1 where the accountant assumes 1/2."
            )
        if poisson_sampling:
            _refuse_sampler(data_loader)
        else:
            log.warning(
                "poisson_sampling=False: epsilon is computed for Poisson draws, and the caller is "
                "responsible for the draws and for the rows of each step."
            )
        criterion = (
            nn.CrossEntropyLoss(reduction=loss_reduction) if criterion is None else criterion
        )
        reduced = getattr(criterion, "reduction", loss_reduction)
        given = (
            reduced in ("mean", "sum") or grad_sample_mode == "bk" or "ghost" in grad_sample_mode
        )
        if given and reduced != loss_reduction:
            raise InputError(
                f"make_private got a criterion with reduction={reduced!r} and "
                f"loss_reduction={loss_reduction!r}, wanted the same: rows would be scaled by their number."
            )
        made = super().make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
            poisson_sampling=poisson_sampling,
            noise_generator=noise_generator,
            **kwargs,
        )
        private, private_optimizer, loader = made[0], made[1], made[-1]
        # Opacus takes int() of a product that may be just below the whole number.
        batches = len(loader)
        rows = len(loader.dataset) // batches
        ranks = getattr(private_optimizer, "world_size", 1)
        private_optimizer.expected_batch_size = rows / ranks if ranks > 1 else rows
        draws = Draws(poisson_sampling, getattr(private_optimizer, "drop", lambda: None), units)
        if hasattr(private_optimizer, "release"):
            private_optimizer.draws = draws
            self._releases.append(private_optimizer.release)
            private_optimizer.release.sample_rate = 1 / batches
            account = private_optimizer.step_hook

            def pay(stepped: Any) -> None:
                if stepped.release.was_new:  # the same step, done again, tells nothing new
                    account(stepped)

            private_optimizer.step_hook = pay
        _watch(private, module, getattr(private_optimizer, "drop", lambda: None))
        if hasattr(private_optimizer, "ranks"):
            private_optimizer.ranks.agree(
                {
                    "max_grad_norm": repr(kwargs.get("max_grad_norm")),
                    "noise_multiplier": private_optimizer.noise_multiplier,
                    "poisson_sampling": poisson_sampling,
                    # Without Poisson sampling the caller answers for who has which rows.
                    "length of the data set": len(loader.dataset) if poisson_sampling else None,
                    "digest of some rows, in their order": (
                        rows_digest(loader.dataset) if poisson_sampling and units is None else None
                    ),
                    "batches of an epoch": batches if poisson_sampling else None,
                    **unit_terms(units),
                }
            )
        if poisson_sampling:
            if data_loader.generator is not None:
                log.warning(
                    "The data_loader has a generator, and rows are drawn from it: epsilon does not hold "
                    "for whoever knows its seed. Leave it out, and the draws are secret."
                )
            elif noise_generator is None:
                # Who is drawn is as secret as the noise: torch's own seed may be known, its default is.
                loader.batch_sampler.generator = secret_generator()
            if grad_sample_mode == "bk" or isinstance(loader.dataset[0], dict):
                prime_empty_batches(loader)
            count_draws(loader, draws)
            if not self.replicated:  # then the draws are the caller's
                _refuse_equal_ranks(private_optimizer, data_loader.generator)
        if grad_sample_mode != "bk":
            if len(made) == 4:
                on_ghost_backward(made[2], draws.take)
            return made
        private_criterion = PrivateCriterion(private, private_optimizer, criterion, loss_reduction)
        return private, private_optimizer, private_criterion, loader

    def make_private_with_epsilon(self, **kwargs: Any) -> Any:
        """As `opacus.PrivacyEngine.make_private_with_epsilon`.

        Raises:
            InputError: ``target_epsilon`` is not positive, ``target_delta`` is not between 0 and 1 (at
                most 1 / rows is usual), there are fewer than two rows; otherwise as `make_private`.
        """
        delta, epsilon = kwargs.get("target_delta"), kwargs.get("target_epsilon")
        _check_delta("target_delta", delta)
        if not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
            raise InputError(f"target_epsilon={epsilon!r}, wanted a positive number, such as 8.0.")
        loader = kwargs.get("data_loader")
        if loader is not None and len(loader.dataset) < 2:
            raise InputError(
                f"The data set has {len(loader.dataset)} row, wanted at least 2: no batch hides one row."
            )
        if loader is not None:  # the noise follows from how many units a batch has, of how many
            ids = kwargs.pop("unit_ids", None), kwargs.pop("max_rows_per_unit", None)
            kwargs["data_loader"] = _units_of(loader, *ids)
        return super().make_private_with_epsilon(**kwargs)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far, at ``delta``; 0 before the first step.

        Raises:
            InputError: ``delta`` is not between 0 and 1.
        """
        _check_delta("delta", delta)
        if not len(self.accountant):
            return 0.0
        return max(0.0, float(super().get_epsilon(delta)))

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        if grad_sample_mode != "bk":
            return super()._prepare_model(
                module, grad_sample_mode=grad_sample_mode, wrap_model=wrap_model, **kwargs
            )
        if not module.training:
            raise InputError(
                f"{type(module).__name__} is in eval mode, wanted a model that trains: call "
                f"model.train() before make_private."
            )
        if isinstance(module, BookKeepingModule):
            return module
        kwargs.pop("max_grad_norm", None)  # the optimizer's
        return (BookKeepingModule if wrap_model else BookKeepingHooks)(module, **kwargs)

    def _prepare_optimizer(
        self,
        *,
        optimizer: optim.Optimizer,
        distributed: bool = False,
        noise_generator: Any = None,
        grad_sample_mode: str = "hooks",
        **kwargs: Any,
    ) -> Any:
        noise = source_of(noise_generator)
        distributed = distributed or self.replicated
        if grad_sample_mode != "bk":
            made = super()._prepare_optimizer(
                optimizer=optimizer,
                distributed=distributed,
                noise_generator=None,
                grad_sample_mode=grad_sample_mode,
                **kwargs,
            )
            if any(type(p).__name__ == "DTensor" for p in made.params):
                return made  # sharded gradients have the noise of their own ranks
            return with_release(made, noise, counts_samples="ghost" not in grad_sample_mode)
        if isinstance(optimizer, opacus.optimizers.DPOptimizer):
            optimizer = optimizer.original_optimizer
        kwargs["clipping"] = rule = rule_of(kwargs.get("clipping", "flat"), kwargs)
        if distributed and rule.one_process:
            raise InputError(
                f"grad_sample_mode='bk' got clipping={rule.name!r} with distributed=True, wanted one of "
                f"the two: the count of rows that were not clipped is of one process alone."
            )
        kind: type[BookKeepingOptimizer] = BookKeepingOptimizer
        if distributed:
            sharded = any(
                isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"]
            )
            kind = ShardedBookKeepingOptimizer if sharded else DistributedBookKeepingOptimizer
        return kind(optimizer, noise=noise, **kwargs)

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As Opacus', with what the noise of the coming steps depends on, written aside and renamed.

        Next to the file, ``PATH.ledger`` lists the steps that were begun since. A run that continues from
        the file pays for them. Whoever reads the file can compute the noise of the coming steps. So only
        its owner can read it; protect it like the data.

        Raises:
            InputError: the model is under FSDP2; the path is none.
            OSError: it could not be written; an older file is unchanged.
        """
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise InputError(
                "save_checkpoint got a model under FSDP2, of which each rank has a part, wanted whole "
                "parameters. Save model, optimizer and optimizer.noise_state() (secret) with "
                "torch.distributed.checkpoint, and keep the steps in a ledger: "
                "optimizer.release.watched_by(dpzoo.ledger.Ledger(path))."
            )
        path = path_of(path, "save_checkpoint", BESIDE)
        saved = dict(checkpoint_dict or {})
        release = getattr(optimizer, "release", None)
        if release is not None:
            state = (
                optimizer.noise_state()
                if isinstance(optimizer, BookKeepingOptimizer)
                else {"release": release.state()}
            )
            ledger = release.watched_by(Ledger(f"{path}.ledger"))
            if release.keeps_ledgers:
                ledger.create()  # so that a later one that is gone is missed
            state["head"] = ledger.head if ledger.path.exists() else None
            saved[RELEASE_STATE] = state
        with whole_file(path, mode=0o600) as part:
            super().save_checkpoint(
                path=part, module=module, optimizer=optimizer, checkpoint_dict=saved, **kwargs
            )

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As Opacus', but a file that holds anything but tensors, numbers, texts and lists is refused.

        An optimizer that this engine made goes on with the run: a step with the sums that it had gets the
        noise that it had, and costs nothing; with any other it gets other noise, and costs a step. Steps
        that were begun after the checkpoint was written are paid for at once.

        Raises:
            InputError: reading the file would run code, or it is no checkpoint; it has no state of the
                noise; its ledger is gone or not the one that it was written with; this engine has accounted
                steps that the file does not have.
        """
        path = path_of(path, "load_checkpoint", BESIDE)
        options = {**(torch_load_kwargs or {}), "weights_only": True}
        try:
            checkpoint: dict[str, Any] = torch.load(path, **options)
            weights, account = (
                checkpoint[f"{key}_state_dict"] for key in ("module", "privacy_accountant")
            )
        except FileNotFoundError:
            raise
        except Exception as error:
            raise InputError(
                f"{path} is no checkpoint that can be read without running code in it "
                f"({type(error).__name__}: {first_line(error)}), wanted one that "
                f"save_checkpoint wrote."
            ) from error
        state = checkpoint.pop(RELEASE_STATE, None)
        release = getattr(optimizer, "release", None)
        try:
            history = [(float(noise), float(rate), int(n)) for noise, rate, n in account["history"]]
            if not all(noise >= 0 and 0 < rate <= 1 and n > 0 for noise, rate, n in history):
                raise ValueError(f"its account has the steps {history}")
            head = None if state is None else state.pop("head")
            saved = None if state is None else state["release"]
            run, taken = ("", 0) if saved is None else (str(saved["run"]), int(saved["steps"]))
            if sum(n for _, _, n in history) < taken:
                raise ValueError(f"of {taken} steps that were taken its account has {history}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {first_line(error)}), wanted a checkpoint as "
                f"save_checkpoint wrote it: it is not known what was spent."
            ) from error
        if release is not None and state is None:
            raise InputError(
                f"{path} has no noise state, wanted a checkpoint that this engine saved with its "
                f"optimizer. To go on from another one, load it without the optimizer: the two runs' "
                f"epsilons then add up."
            )
        ledger, paid = Ledger(f"{path}.ledger"), []
        if state is not None:
            if release is not None and head is not None:
                ledger.require(run, head, begun=False)
            if ledger.path.exists():
                paid = ledger.paid(run, after=taken)
            elif head is not None:
                log.warning(
                    "The ledger %s is gone: steps that were taken after %s was written are not in "
                    "epsilon. Copy it from the folder in which the run was begun.",
                    ledger.path,
                    path,
                )
        self._refuse_to_forget(path, [*history, *paid], run)
        with _fitting(path, "model"):
            module.load_state_dict(weights, **(module_load_dict_kwargs or {}))
        with _fitting(path, "accountant"):
            self.accountant.load_state_dict(account)
        self.accountant.history.extend(paid)
        if paid:
            log.warning(
                "%d steps were begun after %s was written: they are paid for.",
                sum(count for _, _, count in paid),
                path,
            )
        for key, own in (
            ("optimizer", optimizer),
            ("noise_scheduler", noise_scheduler),
            ("grad_clip_scheduler", grad_clip_scheduler),
        ):
            saved = checkpoint.pop(f"{key}_state_dict", None)
            if (own is None) != (saved is None):
                warnings.warn(
                    f"{path} has {'no' if saved is None else 'a'} state of the {key}, and "
                    f"{'none' if own is None else 'one'} was given: it is not restored.",
                    stacklevel=2,
                )
            elif saved is not None:
                with _fitting(path, key):
                    own.load_state_dict(saved)
        if release is not None:
            with _fitting(path, "noise"):
                if isinstance(optimizer, BookKeepingOptimizer):
                    optimizer.load_noise_state(state)
                else:
                    release.load_state(state["release"])
            release.watched_by(ledger)
        return checkpoint

    def _refuse_to_forget(self, path: Any, loaded: list[Any], run: str) -> None:
        """Raise if the file's account lacks steps that this engine has accounted."""
        own, there = (sum(entry[2] for entry in h) for h in (self.accountant.history, loaded))
        known = {release.run for release in self._releases}
        if own and (own > there or (run and run not in known)):
            raise InputError(
                f"load_checkpoint got an engine that has accounted {own} steps, and {path} has an account "
                f"of {there}, wanted a new PrivacyEngine, or a file of the same run with its ledger: the "
                f"engine's own steps would be forgotten. The epsilons of two runs add up."
            )


@contextmanager
def _fitting(path: Any, what: str) -> Iterator[None]:
    """A block that takes up a part of a checkpoint: what does not fit is named."""
    try:
        yield
    except DpzooError:
        raise
    except Exception as error:  # as torch and optimizers of others have it
        raise InputError(
            f"{path} has a state of the {what} that does not fit the one that was given "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('. ')}), wanted that of "
            f"the same run."
        ) from error


def _watch(private: Any, module: nn.Module, dropped: Any) -> None:
    """Watch what must not change, for as long as the wrapper has its own hooks."""
    watch, remove_hooks = FrozenWatch(module, dropped), private.remove_hooks

    def removed() -> None:
        watch.remove()
        remove_hooks()

    private.remove_hooks = removed


def _units_of(loader: DataLoader[Any], unit_ids: Any, most: int | None) -> DataLoader[Any]:
    """The loader as it is, or one of units."""
    if unit_ids is None:
        if most is not None:
            raise InputError(
                f"max_rows_per_unit={most} came without unit_ids, wanted both or none."
            )
        return loader
    if isinstance(loader.dataset, UnitRows) or type(loader.batch_sampler) is not BatchSampler:
        raise InputError(
            f"make_private got unit_ids and a loader with a {type(loader.batch_sampler).__name__} of "
            f"{type(loader.dataset).__name__}, wanted the ordinary loader, of rows, as it was before any "
            f"make_private: batch_size=B, and no sampler of its own."
        )
    _refuse_sampler(loader)
    return unit_loader(loader, unit_ids, most)


def _check_norm(norm: Any) -> None:
    each = norm if isinstance(norm, (list, tuple)) else [norm]
    if not all(isinstance(n, numbers.Real) and 0 < float(n) < math.inf for n in each):
        raise InputError(
            f"max_grad_norm={norm!r}, wanted a number above 0 (for clipping='per_layer' a list of them): "
            f"the norm that a row's gradient is clipped to."
        )


def _check_delta(name: str, delta: Any) -> None:
    if not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise InputError(
            f"{name}={delta!r}, wanted a number between 0 and 1, below 1 / rows of the data set."
        )


def _refuse_sampler(loader: DataLoader[Any]) -> None:
    """Raise for what Poisson sampling would replace."""
    if isinstance(loader.dataset, IterableDataset):
        return  # Opacus says so
    known = (RandomSampler, SequentialSampler)
    batches = loader.batch_sampler
    # A loader that was given a batch sampler has a sampler beside it that it does not use.
    sampler: Any = batches.sampler if type(batches) is BatchSampler else loader.sampler
    odd = type(sampler) not in known or len(sampler.data_source) != len(loader.dataset)  # type: ignore[arg-type]
    if not odd and isinstance(sampler, RandomSampler):
        odd = sampler.replacement or sampler.num_samples != len(sampler.data_source)
    private = type(batches).__module__.startswith(("opacus.", "dpzoo."))
    if private:
        return
    if odd or (batches is not None and type(batches) is not BatchSampler):
        which = batches if batches is not None and type(batches) is not BatchSampler else sampler
        raise InputError(
            f"The data_loader has a {type(which).__name__}, and Poisson sampling would replace it: each "
            f"row would be drawn with the same probability. Wanted a loader with shuffle=True or "
            f"False and no sampler. Weight the rows in the loss instead, or call "
            f"make_private(poisson_sampling=False), and be responsible for the accounting yourself."
        )


def secret_generator() -> torch.Generator | None:
    """A generator with 64 bits from the operating system; None would be torch's own."""
    return torch.Generator().manual_seed(secrets.randbits(64) - 2**63)


def _processes() -> int:
    ready = torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _refuse_equal_ranks(optimizer: Any, generator: torch.Generator | None = None) -> None:
    """Raise where two processes would draw the same rows, by torch's seed or a loader's generator."""
    ranks = getattr(optimizer, "world_size", 1)
    if ranks == 1 or not torch.distributed.is_initialized():
        return
    seen: list[Any] = [None] * ranks
    own = torch.initial_seed(), None if generator is None else generator.initial_seed()
    torch.distributed.all_gather_object(seen, own)
    for seeds in zip(*seen, strict=True):
        given = [seed for seed in seeds if seed is not None]
        if len(set(given)) < len(given):
            raise InputError(
                f"Ranks have equal seeds ({sorted(given)}), so that they draw the same rows together, and "
                f"epsilon is not that of independent draws. Wanted another seed in each: call "
                f"torch.manual_seed(seed + rank), or set none; and give the DataLoader no generator."
            )


__all__ = ["NoiseSource", "PrivacyEngine"]
