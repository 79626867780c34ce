"""What a private run takes: `PrivacyArguments`, and the `TrainingArguments` that it can honour."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from dpzoo.errors import InputError

MODES = ("bk", "ghost", "hooks")
ACCOUNTANTS = ("prv", "rdp")


@dataclass
class PrivacyArguments:
    """The privacy of a training run. Parses beside TrainingArguments in one HfArgumentParser.

    Args:
        target_epsilon: the epsilon to end with, at most, after the run's last step; the noise follows
            from it. Exactly one of it and ``noise_multiplier`` is given.
        noise_multiplier: sigma. The noise on each coordinate of a clipped sum is
            N(0, (sigma * clipping_norm)^2); 0 is for tests, and epsilon is then infinite.
        target_delta: delta; None for 1 / rows (or units) of the training data, its largest value allowed.
        clipping_norm: C, the norm that a row's gradient is clipped to. It was called max_grad_norm, a name
            that `transformers.TrainingArguments` has too; the old name is taken, with a warning.
        grad_sample_mode: "bk" (book-keeping, of `dpzoo.PrivacyEngine`), "ghost" or "hooks" (Opacus').
        clipping: "flat", or, in mode "bk", "automatic" (every row brought to norm C, nearly).
        accountant: "prv" or "rdp", of Opacus.
        secure_mode: noise and batches from the operating system's random numbers. It needs the package
            torchcsprng, and such a run cannot be resumed: what it drew cannot be drawn again.
        noise_seed: seed of noise and batches, for tests. Whoever knows it can subtract the noise; None,
            the default, takes one from the operating system, whatever ``TrainingArguments.seed`` is.
        poisson_sampling: True. The accountants hold for nothing else.
        unit_column: the column of the training data that says whose a row is (a user, a document, a
            household), in mode "bk". Rows with equal ids are one unit: drawn together, clipped as one, and
            epsilon is for adding or removing all of them. It is not given to the collator. None: the unit
            is the row.
        max_rows_per_unit: of a unit with more rows a step takes so many, chosen afresh; None for all.
        tuned: for the privacy card, in a sentence: which hyper-parameters were chosen, on which data.

    Raises:
        InputError: a value out of range, or a combination that cannot be honoured.
    """

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float | None = None
    clipping_norm: float = 0.1
    grad_sample_mode: str = "bk"
    clipping: str = "flat"
    accountant: str = "prv"
    secure_mode: bool = False
    noise_seed: int | None = None
    poisson_sampling: bool = True
    unit_column: str | None = None
    max_rows_per_unit: int | None = None
    tuned: str | None = None

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            got = "neither" if self.target_epsilon is None else "both"
            raise InputError(
                f"PrivacyArguments got {got} of target_epsilon and noise_multiplier, wanted exactly "
                f"one: the epsilon to end with, or the noise."
            )
        self._refuse("target_epsilon", "a number above 0", lambda v: v is None or v > 0)
        self._refuse("noise_multiplier", "0 or more", lambda v: v is None or v >= 0)
        self._refuse("target_delta", "between 0 and 1", lambda v: v is None or 0 < v < 1)
        self._refuse("clipping_norm", "a number above 0", lambda v: 0 < v < float("inf"))
        self._refuse("grad_sample_mode", f"one of {MODES}", lambda v: v in MODES)
        self._refuse("accountant", f"one of {ACCOUNTANTS}", lambda v: v in ACCOUNTANTS)
        kinds = ("flat", "automatic") if self.grad_sample_mode == "bk" else ("flat",)
        wanted = f"one of {kinds} in grad_sample_mode={self.grad_sample_mode!r}"
        self._refuse("clipping", wanted, lambda v: v in kinds)
        self._refuse("poisson_sampling", "True: the accountants assume it", lambda v: v is True)
        wanted = "None with secure_mode=True, whose random numbers have no seed"
        self._refuse("noise_seed", wanted, lambda v: v is None or not self.secure_mode)
        wanted = "None outside grad_sample_mode='bk', which alone clips a unit's rows as one"
        self._refuse("unit_column", wanted, lambda v: v is None or self.grad_sample_mode == "bk")
        wanted = (
            "None without unit_column, and a whole number above 0 with it, or None for all rows"
        )
        self._refuse(
            "max_rows_per_unit",
            wanted,
            lambda v: v is None or (self.unit_column is not None and v >= 1),
        )

    @property
    def max_grad_norm(self) -> float:
        """The old name of ``clipping_norm``."""
        return self.clipping_norm

    def _refuse(self, field: str, wanted: str, fits: Callable[[Any], bool]) -> None:
        value = getattr(self, field)
        if not fits(value):
            raise InputError(f"PrivacyArguments got {field}={value!r}, wanted {wanted}.")

    def delta(self, rows: int) -> float:
        """The run's delta for a data set of ``rows`` rows, or units.

        Raises:
            InputError: ``target_delta`` is above 1 / rows: a run that publishes a row picked at random
                would satisfy it; or there is one row, at whose delta of 1 everything is private.
        """
        if rows < 2:
            raise InputError(
                f"A private run got {rows} rows (or units), wanted at least 2, of which none stands out: "
                f"with one, delta is 1, and says nothing. Add rows."
            )
        largest = 1 / rows
        if self.target_delta is None:
            return largest
        if self.target_delta > largest:
            raise InputError(
                f"PrivacyArguments got target_delta={self.target_delta!r} for {rows} rows, wanted at "
                f"most 1/{rows} = {largest:.3g}. Leave it out, or give a smaller one."
            )
        return self.target_delta


def _old_name(init: Callable[..., None]) -> Callable[..., None]:
    """``PrivacyArguments.__init__``, which takes max_grad_norm for clipping_norm."""

    @functools.wraps(init)
    def taken(self: PrivacyArguments, *args: Any, **given: Any) -> None:
        if "max_grad_norm" in given:
            warnings.warn(
                "PrivacyArguments.max_grad_norm is called clipping_norm now: TrainingArguments has a field "
                "of the old name. Rename it; the old name will go.",
                DeprecationWarning,
                stacklevel=2,
            )
            if "clipping_norm" in given:
                raise InputError(
                    "PrivacyArguments got max_grad_norm and clipping_norm, two names of one value; "
                    "wanted clipping_norm alone."
                )
            given["clipping_norm"] = given.pop("max_grad_norm")
        init(self, *args, **given)

    return taken


setattr(PrivacyArguments, "__init__", _old_name(PrivacyArguments.__init__))  # noqa: B010


# --- TrainingArguments --------------------------------------------------------------------------

_WHOLE = (
    "none: DPTrainer has the whole model on every rank (DDP), or with fsdp=True a part of it (FSDP2): "
    "docs/distributed.md"
)

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fp16": (
        lambda a: a.fp16,
        "False: its GradScaler multiplies gradients before they are clipped. Use bf16=True",
    ),
    "n_gpu": (
        lambda a: a.n_gpu > 1,
        "1: nn.DataParallel has no per-row gradients. Set CUDA_VISIBLE_DEVICES to one device",
    ),
    "deepspeed": (lambda a: a.deepspeed, _WHOLE),
    "parallelism_config": (lambda a: a.parallelism_config is not None, _WHOLE),
    "include_num_input_tokens_seen": (
        lambda a: a.world_size > 1 and a.include_num_input_tokens_seen not in (False, "no"),
        "'no' in several processes: it waits for the others once a part, and ranks have different parts",
    ),
    "torch_compile": (lambda a: a.torch_compile, "False: a compiled model has no layers to watch"),
    "use_liger_kernel": (
        lambda a: a.use_liger_kernel,
        "False: its layers have no per-row gradients",
    ),
    "neftune_noise_alpha": (
        lambda a: a.neftune_noise_alpha is not None,
        "None: its noise depends on how long the longest row of the batch is",
    ),
    "label_smoothing_factor": (
        lambda a: a.label_smoothing_factor != 0,
        "0: Trainer's label smoothing is a mean over the batch's tokens, not a loss of each row",
    ),
    "train_sampling_strategy": (
        lambda a: a.train_sampling_strategy != "random",
        "'random': batches are Poisson samples, and nothing else is accounted for",
    ),
    "dataloader_drop_last": (
        lambda a: a.dataloader_drop_last,
        "False: of Poisson samples none is the last, smaller one",
    ),
    "auto_find_batch_size": (
        lambda a: a.auto_find_batch_size,
        "False: steps would be taken again at another size. Lower per_device_train_batch_size and "
        "raise gradient_accumulation_steps; their product is what privacy depends on",
    ),
    "ignore_data_skip": (
        lambda a: a.ignore_data_skip,
        "False: a resumed run takes the batches that the first one would have taken",
    ),
    "accelerator_config": (
        lambda a: (
            (a.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1
        ),
        "gradient_accumulation_kwargs without num_steps: give gradient_accumulation_steps instead",
    ),
    "max_grad_norm": (
        lambda a: a.max_grad_norm not in (None, 0, 1),  # 1.0 is the default: nobody's choice
        "0 (or the default, which is not applied): it would clip the noised gradient. The norm that "
        "rows are clipped to is PrivacyArguments.clipping_norm",
    ),
    "hub_strategy": (
        lambda a: a.push_to_hub and "checkpoint" in str(getattr(a.hub_strategy, "value", "")),
        "'every_save' or 'end': a checkpoint folder holds the state of the noise, which is secret",
    ),
    "optim": (
        lambda a: any(name in str(a.optim).lower() for name in ("lomo", "layerwise")),
        "an optimizer that steps after the backward pass: this one steps within it, past the noise",
    ),
}
"""Fields that cannot be honoured: whether the value is one of those, and what is wanted instead."""


def private_arguments(args: TrainingArguments, mode: str) -> tuple[TrainingArguments, int]:
    """The arguments as Trainer's loop is to see them, and the rows of a physical batch.

    Trainer's loop counts batches, and a logical batch is one of them: in the copy that is returned,
    ``per_device_train_batch_size`` is the logical batch, of all processes together, and
    ``gradient_accumulation_steps`` is 1.

    Args:
        args: the user's.
        mode: the ``grad_sample_mode``; decides the kind of activation checkpointing.

    Raises:
        InputError: a field in `REFUSED`, several processes in another mode than "bk", or a kind of
            activation checkpointing that loses gradients.
    """
    for name, (applies, wanted) in REFUSED.items():
        if applies(args):
            raise InputError(
                f"DPTrainer got TrainingArguments.{name}={getattr(args, name)!r}, wanted {wanted}."
            )
    if args.world_size > 1 and mode != "bk":
        raise InputError(
            f"DPTrainer got {args.world_size} processes in grad_sample_mode={mode!r}, wanted mode 'bk', "
            f"which adds up the sums of all and draws the noise once. Leave grad_sample_mode out."
        )
    physical, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    copied = copy.copy(args)
    copied.per_device_train_batch_size = physical * parts * args.world_size
    copied.ddp_find_unused_parameters = False  # DDP waits for no gradients here
    if args.fsdp:  # `dpzoo.integrations.sharding` splits the model, and Trainer does not
        copied.fsdp = [] if isinstance(args.fsdp, list) else None
        copied.fsdp_plugin_args = None
    copied.gradient_accumulation_steps = 1
    copied.max_grad_norm = 0.0
    # The newer name of two; the older one follows it from transformers 5.23 on.
    for field in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, field, None):
            key = f"{field}_kwargs"
            setattr(copied, key, _checkpointing(getattr(args, key), mode))
    return copied, physical


def _checkpointing(options: Any, mode: str) -> dict[str, Any]:
    reentrant = mode != "bk"
    options = dict(options or {})
    if options.setdefault("use_reentrant", reentrant) is not reentrant:
        raise InputError(
            f"DPTrainer got activation checkpointing with use_reentrant={not reentrant} in "
            f"grad_sample_mode={mode!r}, wanted {reentrant}, the kind that keeps per-row gradients "
            f"there. Leave it out."
        )
    return options


_HARMLESS = (
    *("output_dir", "run_name", "project", "trackio_", "report_to", "hub_", "push_to_hub"),
    *("log", "eval_", "per_device_eval_batch_size", "save_", "load_best_model_at_end"),
    *(
        "metric_for_best_model",
        "greater_is_better",
        "disable_tqdm",
        "do_",
        "resume_from_checkpoint",
    ),
    *("prediction_loss_only", "batch_eval_metrics", "include_", "skip_memory_metrics", "debug"),
    *(
        "dataloader_",
        "ddp_",
        "fsdp",
        "local_rank",
        "enable_jit_checkpoint",
        "torch_empty_cache_steps",
    ),
    *("restore_callback_states_from_checkpoint", "bf16_full_eval", "fp16_full_eval", "use_cache"),
)
"""Beginnings of the names of fields that no step depends on."""


def settings_of(
    args: TrainingArguments, privacy: PrivacyArguments, more: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the steps of a run depend on, weights and data aside, as JSON has it.

    Args:
        args: Trainer's.
        privacy: the run's, with its delta.
        more: name -> value of other things.
    """
    fields: dict[str, Any] = args.to_dict()
    by_metric = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the evaluation
    kept = "eval_" if fields["lr_scheduler_type"] in by_metric else ()
    settings = {
        f"TrainingArguments.{key}": value
        for key, value in fields.items()
        if key.startswith(kept) or not key.startswith(_HARMLESS)
    }
    settings |= {
        f"PrivacyArguments.{key}": value
        for key, value in vars(privacy).items()
        # The seed is a secret, and not used again: the state of the noise goes on.
        if key not in ("noise_seed", "tuned")
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings | more, default=str))
    return plain
