"""What is trained: a model, a batch, and one training step of them in a mode."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from dpzoo.checkpoints import load
from dpzoo.clipping import PrivacyEngine
from dpzoo.conversion import to_transformers
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.example_batch import example_batch
from dpzoo.losses import ModelLoss
from dpzoo.modes import MODES as PRIVATE_MODES
from dpzoo.pretrained import from_config
from dpzoo.registry import CLASSES, class_by_name

BASELINE = "non-private"
MODES = (BASELINE, "stock", *PRIVATE_MODES)
"""``non-private`` is dpzoo's class without privacy, ``stock`` transformers' class without privacy."""

SETTINGS = ("gradient", "step", "amortized")
"""``gradient``: a step without noise. ``step``: a step with noise. ``amortized``: one of ``every``
physical batches of a logical batch that is noised once; without privacy, of an accumulated batch."""

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


PRESETS = {
    "bert-base": ("bert", "sequence-classification"),
    "roberta-base": ("roberta", "sequence-classification"),
    "distilbert-base": ("distilbert", "sequence-classification"),
    "gpt2": ("gpt2", "causal-lm"),
}
"""Name -> (family, task): models of these sizes with random weights, so that nothing is downloaded."""


@dataclass(frozen=True)
class Workload:
    """One thing to measure.

    Args:
        model: a preset ("bert-base", "roberta-base", "distilbert-base", "gpt2": random weights), the
            name of a class of dpzoo ("GPT2LMHeadModel": its family's preset), a folder or a hub id.
        task: dpzoo's name of it; by default the preset's or the checkpoint's.
        batch: rows of a physical batch.
        seq: tokens of a row; none is padding.
        layers: a number of layers in place of the preset's.
        lora: train LoRA adapters of this rank (and the classification head) instead of all
            parameters; 0 for all.
        dtype: "float32" or "bfloat16" (float32 parameters under autocast).
        device: "cpu", "cuda", ...
        optimizer: "sgd" or "adamw".
    """

    model: str
    task: str | None = None
    batch: int = 8
    seq: int = 128
    layers: int | None = None
    lora: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    optimizer: str = "sgd"

    def to_dict(self) -> dict[str, Any]:
        """As plain data; ``Workload(**data)`` is the way back."""
        return asdict(self)

    def with_shape(self, batch: int, seq: int) -> Workload:
        """The same workload with another batch."""
        return replace(self, batch=batch, seq=seq)

    def build_model(self) -> Any:
        """The dpzoo model, in train mode, without dropout.

        Raises:
            InputError: the name is none of the presets, classes and checkpoints, or the preset
                cannot be cut to ``layers``.
        """
        torch.manual_seed(0)
        model = self._preset()
        if model is None:
            if self.layers is not None:
                raise InputError(
                    f"layers={self.layers} goes with a preset, got the checkpoint {self.model!r}. "
                    f"Leave it out, or use one of {', '.join(PRESETS)}."
                )
            # A step takes as long with random weights.
            model = load(self.model, self.task, fresh=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False
        if self.lora:
            model = _with_lora(model, self.lora)
        return model.to(self.device).train()

    def _preset(self) -> Any:
        name, task = self.model, self.task
        if name in PRESETS:
            family, default = PRESETS[name]
            task = task or default
        else:
            try:
                cls = class_by_name(name)
            except UnsupportedModelError:
                return None
            family, of_class = next(key for key, value in CLASSES.items() if value is cls)
            task = task or of_class
        config = transformers.AutoConfig.for_model(family)
        needed = self.seq + 2  # RoBERTa counts positions from 2
        for key in ("max_position_embeddings", "n_positions"):
            if key in config.to_dict():
                setattr(config, key, max(getattr(config, key), needed))
        for key in ("attention_dropout", "dropout", "seq_classif_dropout", "hidden_dropout_prob",
                    "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "attn_pdrop",
                    "summary_first_dropout"):  # fmt: skip
            if key in config.to_dict():
                setattr(config, key, 0.0)
        if self.layers is not None:
            config.num_hidden_layers = self.layers
        if family == "gpt2":
            config.pad_token_id = 0
        return from_config(config, task=task)

    def build_batch(self, model: Any) -> dict[str, torch.Tensor]:
        """Random tokens, all of them real, and labels for the model's task."""
        base = model.get_base_model() if self.lora else model
        task = next(task for (_, task), cls in CLASSES.items() if isinstance(base, cls))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            base.config.vocab_size // 2,
            base.config.vocab_size,
            (self.batch, self.seq),
            generator=generator,
        )
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch = example_batch(task, base.config, texts)
        return {key: value.to(self.device) for key, value in batch.items()}


class Step:
    """A training step of a workload in a mode.

    Raises:
        InputError: no such mode; or "stock" with LoRA, which has no counterpart to take apart.
    """

    def __init__(self, workload: Workload, mode: str) -> None:
        if mode not in MODES:
            raise InputError(f"Got the mode {mode!r}, wanted one of {', '.join(MODES)}.")
        model = workload.build_model()
        self.workload, self.mode = workload, mode
        self.batch = workload.build_batch(model)
        if mode == "stock":
            if workload.lora:
                raise InputError("Mode 'stock' got lora, wanted none: leave out one of the two.")
            model = to_transformers(model).train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        kind = OPTIMIZERS[workload.optimizer]
        # So small a rate that the weights, and with them the work, stay what they are.
        optimizer = kind(trainable, lr=1e-7)
        self.model, self.optimizer, self.criterion = model, optimizer, None
        self.private = mode not in (BASELINE, "stock")
        if self.private:
            self._make_private(model, optimizer)

    def _make_private(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        by_criterion = PRIVATE_MODES[self.mode].criterion
        with warnings.catch_warnings():
            # No secure mode, no Poisson sampling: nothing is released.
            warnings.simplefilter("ignore")
            made = PrivacyEngine(accountant="rdp").make_private(
                module=model,
                optimizer=optimizer,
                data_loader=DataLoader(range(self.workload.batch), self.workload.batch),  # type: ignore[arg-type]
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
                grad_sample_mode=self.mode,
                criterion=ModelLoss() if by_criterion else None,
            )
        self.model, self.optimizer = made[0], made[1]
        self.criterion = made[2] if by_criterion else None

    def __call__(self, setting: str, every: int = 1) -> None:
        """Run it once.

        Args:
            setting: of `SETTINGS`.
            every: physical batches of a logical one, for "amortized".
        """
        self.optimizer.zero_grad()
        if setting != "amortized":
            self._backward()
            self._step(noise=setting == "step")
            return
        for index in range(every):
            last = index == every - 1
            self._backward()
            if self.private and not last:
                self.optimizer.signal_skip_step(True)
            if self.private or last:
                self._step(noise=True)
            if self.private and not last:
                self.optimizer.zero_grad()

    def _backward(self) -> None:
        device = torch.device(self.workload.device).type
        narrow = self.workload.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            outputs = self.model(**self.batch)
            loss = outputs.loss if self.criterion is None else self.criterion(outputs)
        loss.backward()

    def _step(self, noise: bool) -> None:
        if self.private:
            self.optimizer.noise_multiplier = float(noise)
        self.optimizer.step()


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("lora needs peft: pip install 'dpzoo[peft]'.") from error
    classifier = "Classification" in type(model).__name__
    targets = {"distilbert": ["q_lin", "v_lin"]}.get(model.config.model_type)
    config = LoraConfig(r=rank, task_type="SEQ_CLS" if classifier else None, target_modules=targets)
    return get_peft_model(model, config)
