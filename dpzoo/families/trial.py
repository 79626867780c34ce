"""One architecture tried: its rows alone, then a step in each mode, compared per row and per parameter."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from dpzoo.clipping import PrivacyEngine
from dpzoo.clipping.module import BookKeepingHooks
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import UnsupportedModelError
from dpzoo.families.tiny import Batch, Sizes, batch, build, first_line, model_class, row_losses
from dpzoo.losses import ModelLoss

Gradients = dict[str, torch.Tensor]

MODES = ("hooks", "ghost", "bk")
EXACT, FLOAT32 = 1e-9, 1e-6
"""Largest relative error of an exact mode; the second where the stock model computes in float32."""


def oracle(model: Any, inputs: Batch, labels: torch.Tensor) -> list[Gradients]:
    """Each row's gradient, from the row run alone through the model by autograd.

    Returns:
        For each row, name -> the gradient, zero where the row does not use the parameter.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    made = []
    for i in range(len(labels)):
        model.zero_grad()
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        # Not autograd.grad: reversible layers and reentrant checkpoints fill .grad, and nothing else.
        row_losses(model, row, labels[i : i + 1]).sum().backward()
        made.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
        )
    model.zero_grad()
    return made


def _stock_gap(model: Any, inputs: Batch, labels: torch.Tensor) -> float | None:
    """Relative difference of `ModelLoss` and the stock loss of the first row; None: it has none."""
    row, target = {k: v[:1] for k, v in inputs.items()}, labels[:1]
    with torch.no_grad():
        ours = float(row_losses(model, row, target))
        try:
            stock = float(model(**row, labels=target).loss)
        except Exception:  # some heads take no labels
            return None
    return abs(ours - stock) / max(abs(stock), 1e-9)


def _norm(gradients: Gradients) -> float:
    return sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5


class Narrowing(TorchDispatchMode):
    """Sees where float64 is cast to less: there a model computes in float32, whatever its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.seen |= out.is_floating_point() and out.dtype != torch.float64
        return out


@dataclass
class Result:
    """What was found of one architecture.

    Args:
        name: task/model_type.
        cls: the stock class.
        runs: "yes", or why it was not tried.
        modes: mode -> "exact", "refused: why" or "WRONG: how".
        error: mode -> largest relative error.
        float32: the stock model computes in float32 somewhere.
        loss: relative difference of `ModelLoss` and the stock model's own loss of one row alone.
        seconds: that it took.
    """

    name: str
    cls: str
    runs: str = "yes"
    modes: dict[str, str] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    float32: bool = False
    loss: float | None = None
    seconds: float = 0.0


class _Rows(Dataset[Any]):
    def __init__(self, inputs: Batch) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: int) -> Batch:
        return {k: v[index] for k, v in self.inputs.items()}


def step(
    model: Any, inputs: Batch, labels: torch.Tensor, mode: str, clip: float
) -> tuple[Gradients, torch.Tensor]:
    """One private step without noise, through `dpzoo.PrivacyEngine`.

    Args:
        model: is changed: take another for the next mode.
        inputs: the batch.
        labels: for `ModelLoss`.
        mode: one of `MODES`.
        clip: C.

    Returns:
        Name -> the clipped sum, and the rows' norms, (rows,).
    """
    rows = len(labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(_Rows(inputs), batch_size=rows),
            noise_multiplier=0.0,
            max_grad_norm=clip,
            poisson_sampling=False,
            criterion=ModelLoss(model),
            grad_sample_mode=mode,
        )
    private, optimizer = made[0], made[1]
    criterion = ModelLoss(model) if mode == "hooks" else made[2]
    optimizer.zero_grad()
    criterion(private(**inputs), labels).backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if mode == "hooks":
        samples = [
            p.grad_sample.reshape(rows, -1) for p in named.values() if p.grad_sample is not None
        ]
        norms = torch.cat(samples, 1).norm(dim=1)
    elif mode == "ghost":
        norms = private.get_norm_sample()
    else:
        norms = private.per_sample_gradient_norms
    optimizer.step()
    return {n: p.grad * rows for n, p in named.items() if p.grad is not None}, norms.detach()


def rows_of_bk(model: Any, inputs: Batch, labels: torch.Tensor) -> list[Gradients]:
    """Each row's gradient as mode "bk" has it: what its clipped sum is a sum of."""

    class OneRow(BookKeepingOptimizer):
        def __init__(self, row: int) -> None:
            super().__init__(
                torch.optim.SGD(model.parameters(), lr=0.0),
                noise_multiplier=0.0,
                max_grad_norm=1.0,
                expected_batch_size=1,
            )
            self.row = row

        def clip_factors(self, squared: Any, norms: torch.Tensor) -> Any:
            return {None: (torch.arange(len(norms)) == self.row).to(norms)}

    watched = BookKeepingHooks(model)
    made = []
    for row in range(len(labels)):
        one = OneRow(row)
        watched.backward(row_losses(model, inputs, labels), one)
        made.append(
            {
                n: one.sums[p].clone() if p in one.sums else torch.zeros_like(p)
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        )
    watched.cleanup()
    return made


def largest_error(got: Gradients, want: Gradients) -> float:
    """The norm of the difference, relative to that of what is wanted; infinite where it is not a number."""
    rest = {n: w - got[n] if n in got else w for n, w in want.items()}
    error = _norm(rest) / max(_norm(want), 1e-300)
    return error if error == error else float("inf")


def examine(name: str, modes: Sequence[str] = MODES, sizes: Sizes = Sizes()) -> Result:  # noqa: B008
    """Try one architecture in these modes."""
    began = time.monotonic()
    result = Result(name, model_class(name).__name__)
    try:
        _examine(result, modes, sizes)
    except UnsupportedModelError as error:
        result.runs = first_line(error)
    except Exception as error:
        result.runs = f"does not run alone: {type(error).__name__}: {first_line(error)}"
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _examine(result: Result, modes: Sequence[str], sizes: Sizes) -> None:
    model, _ = build(result.name, sizes)
    inputs, labels = batch(model, sizes=sizes)
    rows = oracle(model, inputs, labels)
    again = oracle(model, inputs, labels)
    if not all(g.isfinite().all() for row in rows for g in row.values()):
        result.runs = "does not run alone: gradients that are not finite"
        return
    noise = max(largest_error(b, a) for a, b in zip(rows, again, strict=True))
    if noise > EXACT:
        result.runs = (
            f"random in training, and no setting turns it off: two runs differ by {noise:.0e}"
        )
        return
    result.loss = _stock_gap(model, inputs, labels)
    norms = [_norm(row) for row in rows]
    if not all(0 < norm < float("inf") for norm in norms):
        result.runs = f"rows alone have gradients of norms {norms}"
        return
    with Narrowing() as narrowing, torch.no_grad():
        together = row_losses(model, inputs, labels)
    result.float32 = narrowing.seen
    tolerance = FLOAT32 if narrowing.seen else EXACT
    with torch.no_grad():
        alone = torch.cat(
            [
                row_losses(model, {k: v[i : i + 1] for k, v in inputs.items()}, labels[i : i + 1])
                for i in range(len(labels))
            ]
        )
    mixed = float(((together - alone).abs() / alone.abs().clamp(min=1e-9)).max())
    if mixed > tolerance:
        result.runs = f"yes, but rows of a batch depend on each other: losses differ by {mixed:.0e}"
    clip = sorted(norms)[len(norms) // 2] * 0.999
    factors = [min(1.0, clip / (norm + 1e-6)) for norm in norms]
    want = {n: sum(f * row[n] for f, row in zip(factors, rows, strict=True)) for n in rows[0]}
    for mode in modes:
        try:
            private, _ = build(result.name, sizes)
            got, found = step(private, inputs, labels, mode, clip)
            error = largest_error(got, want)  # type: ignore[arg-type]
            gaps = [abs(float(f) - norm) / norm for f, norm in zip(found, norms, strict=True)]
            error = max(error, *gaps)
            if mode == "bk":
                private, _ = build(result.name, sizes)
                each = rows_of_bk(private, inputs, labels)
                error = max(
                    error, *(largest_error(g, row) for g, row in zip(each, rows, strict=True))
                )
        except Exception as problem:
            result.modes[mode] = f"refused: {type(problem).__name__}: {first_line(problem)}"
            continue
        result.error[mode] = error if error == error else float("inf")
        result.modes[mode] = "exact" if error <= tolerance else f"WRONG: off by {error:.0e}"
