"""`DPTrainer`: transformers' Trainer, whose training is differentially private.

How it fits into Trainer's loop, which is left as it is: that loop counts batches, and here one of its
batches is a logical batch, a Poisson sample of any size, none included. `training_step` runs it part by
part, and leaves the clipped sum to the optimizer, whose one step Trainer then takes. So epochs, max_steps,
schedules, callbacks and the progress bar count logical steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    rotate_checkpoints,
)

from dpzoo.accounting import epsilon_of
from dpzoo.clipping import PrivacyEngine
from dpzoo.clipping.ranks import Ranks, silence
from dpzoo.clipping.units import UnitRows, unit_terms
from dpzoo.errors import InputError
from dpzoo.files import path_of
from dpzoo.integrations.accounting import Account
from dpzoo.integrations.arguments import PrivacyArguments, private_arguments, settings_of
from dpzoo.integrations.batches import (
    LogicalBatches,
    PoissonBatches,
    Without,
    batch_key,
    identity,
    true_banner,
)
from dpzoo.integrations.card import PrivacyCard
from dpzoo.integrations.inputs import (
    length_of,
    own_loss,
    per_sample,
    refuse_overridden,
    row_losses,
)
from dpzoo.integrations.plan import Plan, cost_of, fixed_bytes
from dpzoo.integrations.publishing import PublishingTrainer
from dpzoo.integrations.sharding import (
    gather_no_more,
    load_whole,
    shard,
    sharding_of,
    split_optimizer_state,
    whole_optimizer_state,
)
from dpzoo.integrations.state import (
    PrivacyState,
    digests,
    load_random_state,
    newest_whole,
    save_random_state,
)
from dpzoo.integrations.stepping import PrivateStep
from dpzoo.poisson import rows_digest, seeded

log = logging.getLogger(__name__)


class DPTrainer(PublishingTrainer):
    """`transformers.Trainer` with DP-SGD: per-row clipping, noise, Poisson sampling, accounting.

        trainer = DPTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out,
                            privacy=PrivacyArguments(target_epsilon=8.0, clipping_norm=0.1))
        trainer.train()

    The logical batch has ``per_device_train_batch_size * gradient_accumulation_steps`` rows on average, and
    under torchrun or accelerate launch that many for each process (DDP; FSDP2 with
    ``TrainingArguments(fsdp=True)``). A process has at most
    ``per_device_train_batch_size`` of them in memory at a time. The rest is Trainer's: it
    evaluates, predicts, logs, saves stock checkpoints and resumes.

    Args:
        model: a dpzoo model, a PEFT model around one, or a stock transformers model, which is converted
            (`dpzoo.convert`); the trained model is ``trainer.model``.
        args: the `transformers.TrainingArguments`; ``trainer.args`` is a copy with the logical batch in
            the place of the physical one.
        data_collator: as Trainer's.
        train_dataset: a data set with a length, whose rows are the unit of privacy; or, with
            ``PrivacyArguments.unit_column``, the users, documents or households whose rows they are. The
            batch sizes are then of units (logical) and of rows (in memory).
        *positional: Trainer's further arguments, by position.
        privacy: the `PrivacyArguments`.
        **options: Trainer's further arguments. ``compute_loss_func`` has to return losses of shape
            (rows,), each of its row alone.

    Raises:
        InputError: an argument that cannot be honoured; the message names it and says what to do.
        UnsupportedModelError: a model that cannot be converted.

    Guarantees:
        The weights after all steps, together, satisfy (``epsilon``, ``delta``) differential privacy for
        adding or removing a row (a unit, with all its rows) of ``train_dataset``, by the accountant's
        count. What Trainer logs of training rows (the loss) is not private, and neither is a choice made
        by private evaluation rows.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *positional: Any,
        privacy: PrivacyArguments | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(privacy, PrivacyArguments):
            raise InputError(
                f"DPTrainer got privacy={privacy!r}, wanted a PrivacyArguments, such as "
                f"PrivacyArguments(target_epsilon=8.0)."
            )
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        self.privacy = privacy
        self._sharding = sharding_of(args)
        args, self._physical_rows = private_arguments(args, privacy.grad_sample_mode)
        if privacy.secure_mode and args.world_size > 1:
            raise InputError(
                f"DPTrainer got secure_mode=True in {args.world_size} processes, wanted False: ranks take "
                f"their shares of one draw, which each makes from a secret key that all have."
            )
        self._engine = PrivacyEngine(accountant=privacy.accountant, secure_mode=privacy.secure_mode)
        self._account = Account(privacy.accountant, args.output_dir, enters=args.process_index == 0)
        self._batch_key = batch_key(privacy.noise_seed)
        self._step: PrivateStep | None = None
        self._noise_state: dict[str, Any] | None = None
        refuse_overridden(type(self), DPTrainer)
        if train_dataset is not None:
            self._count(train_dataset, args)
        model = None if model is None else per_sample(model, privacy.grad_sample_mode)
        self._own_forward = None if model is None else model.__dict__.get("forward")
        model = None if model is None else self._placed(model, args)
        super().__init__(model, args, data_collator, train_dataset, *positional, **options)
        self._given = self.optimizer, self.lr_scheduler
        if self._sharding is not None and self._given != (None, None):
            raise InputError(
                "DPTrainer got optimizers with TrainingArguments.fsdp, wanted none: an optimizer has the "
                "parameters of the whole model, and the model is split. Give TrainingArguments.optim and "
                "lr_scheduler_type, or DPTrainer's optimizer_cls_and_kwargs."
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; a stock model is converted, and under FSDP2 split over the ranks."""
        model = per_sample(super().call_model_init(trial), self.privacy.grad_sample_mode)
        return self._placed(model, self.args)

    def _placed(self, model: nn.Module, args: TrainingArguments) -> nn.Module:
        if self._sharding is None:
            return model
        return shard(model, self._sharding, args.device, args.world_size)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._sharding is None:  # parts are where they belong
            super()._move_model_to_device(model, device)

    def _count(self, dataset: Any, args: TrainingArguments) -> None:
        """Take the terms of the account from the number of rows, or of units."""
        logical, column = args.per_device_train_batch_size, self.privacy.unit_column
        if column is not None:
            dataset = UnitRows(dataset, column, self.privacy.max_rows_per_unit)
            largest = max(range(len(dataset)), key=dataset.size)
            if dataset.size(largest) > self._physical_rows:
                raise InputError(
                    f"A unit of {column!r} has {dataset.size(largest)} rows, and "
                    f"per_device_train_batch_size={self._physical_rows} rows are in memory at a time, "
                    f"wanted all its drawn rows in one part: they are clipped as one. Set "
                    f"max_rows_per_unit={self._physical_rows}, or raise per_device_train_batch_size."
                )
        self._drawn_from = dataset
        self._rows = length_of(dataset, logical)
        self._account.delta = self.privacy.delta(self._rows)
        self._account.sample_rate = logical / self._rows

    # --- the privacy spent ----------------------------------------------------------------------

    @property
    def epsilon(self) -> float:
        """Epsilon spent so far, at ``delta``; 0 before training, infinite without noise.

        Guarantees:
            Not below what was spent before by a killed run that this one goes on with, the steps after
            the checkpoint included, where the ledger is beside the checkpoint.
        """
        return self._account.epsilon

    @property
    def delta(self) -> float | None:
        """The run's delta; None without training rows."""
        return self._account.delta

    @property
    def noise_multiplier(self) -> float | None:
        """The run's noise multiplier: the one given, or what the target needs; None without rows."""
        if self._account.noise_multiplier is None and self.delta is not None:
            self._account.choose_noise(self.privacy, self._planned_steps())
        return self._account.noise_multiplier

    def plan(self, *, measure: bool = False) -> Plan:
        """What the run will be: noise, steps, signal; `print` shows it, with warnings.

        Args:
            measure: estimate time and memory too, by two passes over the first rows.

        Raises:
            InputError: there are no training rows.

        Guarantees:
            The run draws the same rows, noise and dropout with and without it.
        """
        if self.train_dataset is None:
            raise InputError("DPTrainer.plan() got train_dataset=None, wanted a data set.")
        self._count(self.train_dataset, self.args)
        args, steps = self.args, self._planned_steps()
        noise = self.noise_multiplier
        assert noise is not None
        assert self.delta is not None
        seconds = memory = None
        if measure and self._sharding is not None:
            raise InputError(
                "DPTrainer.plan() got measure=True with TrainingArguments.fsdp, wanted False: the passes "
                "are those of a whole model. Measure without fsdp, in one process."
            )
        if measure:
            first = list(range(min(4, self._physical_rows, len(self.train_dataset))))
            batch = LogicalBatches(self.train_dataset, self._collate(), len(first), 0).__getitems__(
                [0, *first]
            )
            cost = cost_of(self.model, self._prepare_inputs(batch["parts"][0]), len(first))
            seconds = cost.seconds * steps * args.per_device_train_batch_size
            memory = fixed_bytes(self.model) + cost.bytes * self._physical_rows
        adam = "adam" in str(args.optim).lower() and self._given == (None, None)
        share = 0.5 if str(getattr(args.lr_scheduler_type, "value", "")) == "linear" else 1.0
        return Plan(
            units=self._rows,
            unit="row" if self.privacy.unit_column is None else f"{self.privacy.unit_column!r}",
            logical=args.per_device_train_batch_size,
            physical=self._physical_rows,
            steps=steps,
            sample_rate=args.per_device_train_batch_size / self._rows,
            noise_multiplier=noise,
            clipping_norm=self.privacy.clipping_norm,
            epsilon=self.privacy.target_epsilon or self._planned_epsilon(steps),
            delta=self.delta,
            accountant=self.privacy.accountant,
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            learning_rate=args.learning_rate,
            reach=share * args.learning_rate * steps if adam else None,
            seconds=seconds,
            memory=memory,
        )

    def card(self) -> PrivacyCard:
        """The terms on which the weights, as they are now, were trained.

        Raises:
            InputError: there are no training rows.
        """
        if self.delta is None:
            raise InputError("DPTrainer.card() got train_dataset=None, wanted the rows of the run.")
        privacy, noise = self.privacy, self.noise_multiplier
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        notes = []
        if privacy.noise_seed is not None:
            notes.append("The noise is from a seed: whoever knows it can take the noise off.")
        if self.args.load_best_model_at_end:
            notes.append(
                f"These may be the weights of the step that was best by {self.args.metric_for_best_model} "
                f"on the evaluation rows. Epsilon does not cover that choice, unless those rows are public."
            )
        return PrivacyCard(
            epsilon=self.epsilon,
            delta=self.delta,
            accountant=privacy.accountant,
            noise_multiplier=noise or 0.0,
            clipping_norm=privacy.clipping_norm,
            clipping=privacy.clipping,
            sample_rate=self._account.sample_rate or 0.0,
            steps=self._account.begun,
            units=self._rows,
            unit="one row of the training data"
            if privacy.unit_column is None
            else f"all rows of the training data of one {privacy.unit_column!r}",
            trained=f"{trained:,} of {sum(p.numel() for p in self.model.parameters()):,} parameters",
            tuned=privacy.tuned,
            notes=tuple(notes),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with ``epsilon`` among the values and on the progress bar; its terms at the end."""
        if self.delta is not None:
            logs["epsilon"] = self.epsilon
            if "train_runtime" in logs:
                logs |= {
                    "delta": self.delta,
                    "noise_multiplier": self._account.noise_multiplier or 0.0,
                    "clipping_norm": self.privacy.clipping_norm,
                    "sample_rate": self._account.sample_rate or 0.0,
                }
            for callback in self.callback_handler.callbacks:
                bar = getattr(callback, "training_bar", None)
                if isinstance(callback, ProgressCallback) and bar is not None:
                    bar.set_postfix_str(f"epsilon {logs['epsilon']:.3f}", refresh=False)
        super().log(logs, start_time)

    # --- the run --------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, privately. `dpzoo.integrations.state` tells what resuming costs.

        Raises:
            InputError: there are no training rows; the trainer has trained, and no checkpoint of that
                run is given; the checkpoint has no privacy state; a setting that steps depend on, or the
                data, are not what they were.
        """
        if self.train_dataset is None:
            raise InputError("DPTrainer.train() got train_dataset=None, wanted a data set.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(self.args.output_dir) or True
        elif resume_from_checkpoint:
            wanted = "True, or the path of a checkpoint"
            resume_from_checkpoint = path_of(resume_from_checkpoint, "DPTrainer.train()", wanted)
        self._count(self.train_dataset, self.args)
        if isinstance(resume_from_checkpoint, str):
            steps = self._resume(resume_from_checkpoint)
            if steps >= self._planned_steps():
                log.warning(
                    "The run of %s is finished; nothing is trained.", resume_from_checkpoint
                )
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = TrainerState.load_from_json(
                    os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME)
                )
                return TrainOutput(steps, 0.0, {"epsilon": self.epsilon})
        else:
            self._begin()
        for warning in self.plan().warnings:
            log.warning("Before training: %s.", warning)
        if self.args.world_size > 1:
            # On the CPU transformers does not hand the time-out on.
            ranks = Ranks.present(timedelta(seconds=self.args.ddp_timeout))
            units = self._drawn_from if isinstance(self._drawn_from, UnitRows) else None
            ranks.agree({**self._terms(), **unit_terms(units)})
            shared = self._account.run, self._batch_key
            self._account.run, self._batch_key = ranks.share(shared)
        self.optimizer, self.lr_scheduler = self._given
        if "_original_forward" not in self.model.__dict__:  # accelerate's, of an evaluation
            self._own_forward = self.model.__dict__.get("forward")
        with true_banner(self._physical_rows, self.args.per_device_train_batch_size):
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._detach()

    def _terms(self) -> dict[str, Any]:
        privacy = self.privacy
        return {
            "rows of train_dataset": len(self.train_dataset),
            "digest of some rows, in their order": (
                None if privacy.unit_column else rows_digest(self.train_dataset)
            ),
            "rows of a logical batch": self.args.per_device_train_batch_size,
            "rows of a physical batch": self._physical_rows,
            "unit_column": privacy.unit_column,
            "noise multiplier": self.noise_multiplier,
        }

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial is a run on the same rows, and none of them would be accounted for.

        Raises:
            InputError: always.
        """
        raise InputError(
            "DPTrainer.hyperparameter_search() would train on the same rows in every trial, and count "
            "none of it. Choose hyper-parameters on public data, or add up the trials' epsilons."
        )

    def _begin(self) -> None:
        if self._account.begun:
            raise InputError(
                f"DPTrainer.train() was called again after {self._account.begun} steps, which have spent "
                f"their epsilon already. Resume with resume_from_checkpoint=..., or make a new DPTrainer: "
                f"the two runs' epsilons then add up."
            )
        self._account.refuse_other_runs(self.args.output_dir)
        self._noise_state = None

    def _planned_steps(self) -> int:
        """Logical steps of the whole run."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        batches = math.ceil(self._rows / args.per_device_train_batch_size)
        return math.ceil(args.num_train_epochs * batches)

    def _resume(self, checkpoint: str) -> int:
        """Take up a checkpoint's account and random state, before anything trains; its steps."""
        state = PrivacyState.load(checkpoint)
        state.refuse_changes(self._settings())
        random_state = load_random_state(checkpoint)
        self._account.resume(state, checkpoint)
        self._batch_key = int(random_state["key"], 16)
        self._noise_state = random_state["noise"]
        return state.steps

    def _settings(self) -> dict[str, Any]:
        """Everything that a step depends on, but for weights and data, as JSON has it."""
        trained = [p.numel() for p in self.model.parameters() if p.requires_grad]
        more = {
            "rows of train_dataset": len(self.train_dataset),
            "units of train_dataset": self._rows,
            "rows of a physical batch": self._physical_rows,
            "class of the model": type(self.model).__name__.removeprefix("FSDP"),
            "trained parameters": [len(trained), sum(trained)],
        }
        privacy = replace(self.privacy, target_delta=self.delta)
        return settings_of(self.args, privacy, more)

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self._noise_state is None:
            self._account.choose_noise(self.privacy, max_steps)
        self.model.train()
        if self._sharding is not None:
            gather_no_more(self.model)
        self.create_optimizer()
        if self._sharding is not None:
            self.optimizer.register_load_state_dict_pre_hook(split_optimizer_state)
        noise_multiplier = self._account.noise_multiplier
        assert noise_multiplier is not None
        self._step = PrivateStep(
            self._engine,
            self.model,
            self.optimizer,
            self.privacy,
            noise_multiplier=noise_multiplier,
            rows=self._rows,
            logical=self.args.per_device_train_batch_size,
            device=self.args.device,
            ranks=self.args.world_size,
        )
        release = self._step.release
        if self._noise_state is not None:
            self._step.load_noise_state(self._noise_state)
        release.run = self._account.run
        release.watched_by(self._account.ledger)
        log.info(
            "Private training: the unit is %s of train_dataset (%d units, adding or removing one); "
            "epsilon %s at delta %.3g after %d steps, by %s; noise multiplier %.4g, clipping norm %g, "
            "expected batch %d, sample rate %.4g.",
            "a row" if self.privacy.unit_column is None else f"a {self.privacy.unit_column!r}",
            self._rows,
            self.privacy.target_epsilon or f"{self._planned_epsilon(max_steps):.3f}",
            self.delta,
            max_steps,
            self.privacy.accountant,
            noise_multiplier,
            self.privacy.clipping_norm,
            self.args.per_device_train_batch_size,
            self._account.sample_rate,
        )
        self.optimizer = self._step.optimizer
        prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            silence(self.model_wrapped)
        self._unwrap_forward()
        return prepared

    def _planned_epsilon(self, steps: int) -> float:
        noise, rate = self._account.noise_multiplier, self._account.sample_rate
        if not noise or rate is None or self.delta is None:
            return math.inf
        return epsilon_of(self.privacy.accountant, ((noise, rate, steps),), self.delta)

    def _unwrap_forward(self) -> None:
        # Under bf16 accelerate puts a forward() on the model that rebuilds the outputs, without the
        # rows' losses. `autocast_smart_context_manager` does the other half of its work.
        for name in ("forward", "_original_forward"):
            self.model.__dict__.pop(name, None)
        if self._own_forward is not None:
            self.model.forward = self._own_forward

    def _detach(self) -> None:
        if self._step is not None:
            self._step.detach()
            self._step = None

    # --- batches --------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Logical batches: Poisson samples, each in collated parts."""
        args = self.args
        rank, ranks = args.process_index, args.world_size
        batches = LogicalBatches(
            self._drawn_from, self._collate(), self._physical_rows, self._batch_key, rank
        )
        sampler = PoissonBatches(
            self._rows,
            args.per_device_train_batch_size / self._rows,
            math.ceil(self._rows / args.per_device_train_batch_size),
            None if self.privacy.secure_mode else self._batch_key,
            lambda: self.state.global_step,
            rank,
            ranks,
        )
        return DataLoader(
            batches,
            batch_sampler=sampler,
            collate_fn=identity,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _collate(self) -> Any:
        collate = self._get_collator_with_removed_columns(self.data_collator, "training")
        column = self.privacy.unit_column
        return collate if column is None else Without(column, collate)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer's, of a logical batch."""
        count = super().floating_point_ops
        return sum(count(part) for part in inputs["parts"])

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for part in inputs["parts"]:
            super()._track_num_input_tokens(part)

    # --- a step ---------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of a logical batch, part by part; the clipped sum is the optimizer's.

        Args:
            model: the model.
            inputs: a logical batch, as `LogicalBatches` gives it.
            num_items_in_batch: not used: rows weigh alike, whatever the number of their tokens.

        Returns:
            The mean of the rows' losses, not private; 0 for an empty batch.
        """
        number, parts, private = inputs["step"], inputs["parts"], self._step
        assert private is not None
        if number != self.state.global_step:
            raise InputError(
                f"The batch of step {number} came at step {self.state.global_step}, and a batch is drawn "
                f"for one step alone. Wanted the batches of DPTrainer.get_train_dataloader(), in order."
            )
        self._account.begin_step(number + 1)
        if self._sharding is not None:  # every pass is a collective: all take as many
            most = max(Ranks.present().meet(f"parts of step {number + 1}", len(parts)))
            parts = [*parts, *[self._empty_part() for _ in range(most - len(parts))]]
        model.train()
        total, rows = torch.zeros((), device=self.args.device), 0
        private.begin(inputs["rows"], inputs["units"])
        with seeded(self._batch_key, number, 1 + 2 * self.args.process_index):  # dropout
            for i, part in enumerate(parts):
                part = self._prepare_inputs(part)
                with self.compute_loss_context_manager(), private.forward():
                    own = own_loss(self)
                    if own is not None and self._sharding is None:
                        private.try_others(own, lambda x: self._row_losses(model, x), part)
                    losses = self._row_losses(model, part)
                    loss = private.criterion(losses)
                loss.backward()
                private.end_part(last=i + 1 == len(parts))
                total += losses.detach().sum().float()
                rows += len(losses)
        if not parts:
            private.nothing()
        return total / max(rows, 1)

    def _empty_part(self) -> dict[str, Any]:
        """A part without rows, as the collator would make it."""
        with seeded(0):
            rows = LogicalBatches(self.train_dataset, self._collate(), 1, 0).__getitems__([0, 0])
        return {
            name: value[:0] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in rows["parts"][0].items()
        }

    def _row_losses(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return row_losses(self, model, inputs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Autocast under bf16, in training and evaluation; under FSDP2 the layers see to it."""
        return contextlib.nullcontext() if self._sharding else self.accelerator.autocast()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if self._sharding is not None:
                gather_no_more(self.model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        # Trainer asks before the step, when there is no noise in the gradients yet: not private.
        return None

    # --- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        first, several = self.args.process_index == 0, self.args.world_size > 1
        os.makedirs(folder, exist_ok=True)
        # A checkpoint without the optimizer's state, or with batches that cannot be drawn again, is not
        # one to resume from.
        if (
            first
            and self._step is not None
            and not self.privacy.secure_mode
            and not self.args.save_only_model
        ):
            save_random_state(
                {"key": f"{self._batch_key:x}", "noise": self._step.noise_state()}, folder
            )
        # privacy.json is what makes a checkpoint whole: it is written last, and only then may an older
        # checkpoint be deleted.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if several:
            Ranks.present().meet("checkpoint")  # the ranks' own files are written
        if first:
            self._account.state(step, self._settings(), digests(folder)).save(folder)
        if limit is not None and self.args.should_save:
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial=trial),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state, own = whole_optimizer_state(self.optimizer.state_dict()), self.optimizer
        self.optimizer = SimpleNamespace(state_dict=lambda: state)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            self.optimizer = own

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._sharding is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_whole(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._sharding is None:
            super()._load_best_model()
        else:
            load_whole(self.model, str(self.state.best_model_checkpoint))
