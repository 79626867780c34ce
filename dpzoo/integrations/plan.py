"""What a private run will be, before it is one: noise, signal, time and memory."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LEAST_SIGNAL = 1.0
"""Signal to noise of a whole run below which a model has little chance to learn.

Runs that it was read off, all at epsilon 8: 3,000 sentences and 22.7 million parameters have 0.46 and learn
little; 6,920 reviews and 22.7 million have 1.1 to 1.3, and end between nothing and 77 %; SST-2's 67,349
rows and 125 million have 2.1, and end at 92 % in Li et al. 2021 (arXiv 2110.05679).
"""
_SHORT_REACH = 2e-3
_DEFAULT_RATE = 5e-5  # of TrainingArguments


@dataclass(frozen=True)
class Plan:
    """A private run before it begins.

    Args:
        units: of the training data.
        unit: "row", or the name of the column that says whose a row is.
        logical, physical: units of a logical batch, expected, and rows in memory at a time, at most.
        steps: logical steps, each noised once.
        sample_rate: chance of a unit to be in a step.
        noise_multiplier: sigma.
        clipping_norm: C.
        epsilon: at the end of the run, at ``delta``.
        delta: of the guarantee.
        accountant: "prv" or "rdp".
        trained: trainable parameters.
        learning_rate: the first one.
        reach: how far Adam can move a weight in the run, at most; None for another optimizer.
        seconds: estimated, None if not measured.
        memory: bytes, estimated for weights, optimizer and a physical batch; None if not measured.
        warnings: what a person should know before starting.
    """

    units: int
    unit: str
    logical: int
    physical: int
    steps: int
    sample_rate: float
    noise_multiplier: float
    clipping_norm: float
    epsilon: float
    delta: float
    accountant: str
    trained: int
    learning_rate: float
    reach: float | None = None
    seconds: float | None = None
    memory: float | None = None

    @property
    def step_signal(self) -> float:
        """Largest norm of a step's clipped sum over its noise's: rows / (sigma sqrt(parameters))."""
        if not self.noise_multiplier:
            return math.inf
        return self.logical / (self.noise_multiplier * math.sqrt(self.trained))

    @property
    def signal(self) -> float:
        """The same of all steps together: noise averages out with their root."""
        return self.step_signal * math.sqrt(self.steps)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before starting."""
        found = []
        if self.signal < LEAST_SIGNAL:
            found.append(
                f"the noise hides the signal: over the whole run the largest possible sum of gradients is "
                f"{self.signal:.2g} times the noise, wanted {LEAST_SIGNAL:g} or more. Train fewer "
                f"parameters (a head, biases, LoRA), raise the logical batch or the steps, or take a "
                f"larger epsilon"
            )
        if self.reach is not None and (
            self.reach < _SHORT_REACH or self.learning_rate == _DEFAULT_RATE
        ):
            found.append(
                f"the learning rate {self.learning_rate:g} moves no weight by more than {self.reach:.1g} "
                f"in {self.steps} steps, so that the loss may not move. Private runs are short and have "
                f"large rates: 5e-4 for every parameter, 1e-3 for LoRA, 5e-3 for biases and a head"
            )
        return tuple(found)

    def __str__(self) -> str:
        lines = {
            "units": f"{self.units:,} (a {self.unit}), each in a step with chance {self.sample_rate:.4g}",
            "batch": f"{self.logical:,} units on average, {self.physical:,} rows in memory at a time",
            "steps": f"{self.steps:,}",
            "privacy": f"epsilon {rounded_up(self.epsilon)} at delta {rounded_up(self.delta)} "
            f"({self.accountant}), add or remove one {self.unit}",
            "noise": f"multiplier {self.noise_multiplier:.4g}, clipping norm {self.clipping_norm:g}",
            "trained": f"{self.trained:,} parameters, learning rate {self.learning_rate:g}",
            "signal": f"at most {self.step_signal:.3g} times the noise in a step, {self.signal:.3g} in all",
        }
        if self.seconds is not None:
            lines["time"] = f"about {duration(self.seconds)} on this machine, as busy as it is now"
        if self.memory is not None:
            lines["memory"] = f"about {self.memory / 2**30:.1f} GiB"
        text = "\n".join(f"{name:<9} {value}" for name, value in lines.items())
        return text + "".join(f"\nwarning   {warning}" for warning in self.warnings)


def rounded_up(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, not below itself: epsilon and delta are upper bounds."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    near = round(value / unit)
    whole = near if math.isclose(near * unit, value, rel_tol=1e-9) else math.ceil(value / unit)
    return f"{whole * unit:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@dataclass(frozen=True)
class Cost:
    """What a row costs: seconds of a private pass, and bytes that its backward pass keeps."""

    seconds: float
    bytes: float


def cost_of(model: nn.Module, batch: dict[str, Any], rows: int) -> Cost:
    """Measure a forward and a backward pass on a copy of a model.

    The passes are plain ones; a private pass (mode bk) takes about 1.5 times as long, and keeps the output
    gradients beside the activations: about twice the bytes.

    Args:
        model: any; it is not changed.
        batch: of ``rows`` rows, at least 2, of the shapes to be trained with.
        rows: of the batch.

    Guarantees:
        No global generator, buffer, parameter or gradient is other than it was: a run draws the same
        with this and without.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        trial = copy.deepcopy(model).train()
        storages: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in trial.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor

        def once() -> None:
            loss = trial(**batch)
            loss = getattr(loss, "loss", loss)
            loss.mean().backward()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            once()
        began = time.perf_counter()
        once()
        if devices:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return Cost(1.5 * seconds / rows, 2 * sum(storages.values()) / rows)


def fixed_bytes(model: nn.Module) -> float:
    """Weights, and of what is trained: the sum, the noise and Adam's two moments."""
    return sum(
        p.numel() * p.element_size() * (5 if p.requires_grad else 1) for p in model.parameters()
    )
