"""One private step of a model in a mode of Opacus or of dpzoo, and what the oracle says of it."""

from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader

import dpzoo
from tests.support import ROWS, batch_losses, in_stock_layout, oracle_gradients

TOLERANCE = 1e-9

MODES = ("hooks", "functorch", "ew", "ghost")
"""Opacus' own."""

ALL_MODES = (*MODES, "bk")


def engine_of(mode: str) -> Any:
    """The engine that has the mode, with an accountant."""
    return (dpzoo.PrivacyEngine if mode == "bk" else PrivacyEngine)(accountant="rdp")


class OutputLoss:
    """Per-row losses of any of the classes, base models included, in the form ghost mode takes."""

    def __init__(self, name: str, batch: dict[str, torch.Tensor], reduction: str) -> None:
        self.name, self.batch, self.reduction = name, batch, reduction

    def __call__(self, outputs: Any) -> torch.Tensor:
        losses = batch_losses(self.name, lambda **_: outputs, self.batch)
        if self.reduction == "none":
            return losses
        return losses.sum() / (max(len(losses), 1) if self.reduction == "mean" else 1)


class Step:
    """A model made private with noise 0, and the sums of its private steps.

    Args:
        name: the class.
        model: a dpzoo model.
        mode: of `ALL_MODES`.
        max_grad_norm: the clipping norm, C.
        reduction: "mean" or "sum".
        **options: more arguments of make_private.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        mode: str,
        *,
        max_grad_norm: Any = 1.0,
        reduction: str = "mean",
        rows: int = ROWS,
        wrap_model: bool = True,
        **options: Any,
    ) -> None:
        self.name, self.mode, self.reduction, self.model = name, mode, reduction, model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        made = engine_of(mode).make_private(
            module=model,
            optimizer=torch.optim.SGD(trainable, lr=1.0),
            criterion=OutputLoss(name, {}, reduction),
            data_loader=DataLoader(list(range(rows)), batch_size=rows),
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            loss_reduction=reduction,
            poisson_sampling=False,
            grad_sample_mode=mode,
            wrap_model=wrap_model,
            **options,
        )
        self.engine, self.optimizer = made[0], made[1]
        self.makes_criterion = mode in ("ghost", "bk")
        self.criterion = made[2] if self.makes_criterion else OutputLoss(name, {}, reduction)
        self.wrapped = made[0] if wrap_model else model

    def backward(self, batch: dict[str, torch.Tensor]) -> None:
        criterion = self.criterion.criterion if self.makes_criterion else self.criterion
        criterion.batch = batch
        if self.mode == "ew":  # takes its first argument by position
            rest = {key: value for key, value in batch.items() if key != "input_ids"}
            outputs = self.wrapped(batch["input_ids"], **rest)
        else:
            outputs = self.wrapped(**batch)
        self.criterion(outputs).backward()

    def norms(self) -> torch.Tensor:
        """The norm of each row's gradient, (rows,), as the mode computed it; before `gradient`."""
        if self.makes_criterion:
            return self.engine.per_sample_gradient_norms
        per_parameter = [g.reshape(len(g), -1).norm(dim=1) for g in self.optimizer.grad_samples]
        return torch.stack(per_parameter).norm(dim=0)

    def gradient(self) -> dict[str, torch.Tensor]:
        """Parameter name -> what optimizer.step() subtracted, in the stock layout (lr is 1)."""
        before = {key: value.detach().clone() for key, value in self._parameters().items()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            key: in_stock_layout(self.model, key, before[key] - value.detach())
            for key, value in self._parameters().items()
        }

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {key: p for key, p in self.model.named_parameters() if p.requires_grad}


def oracle_norms(gradients: dict[str, torch.Tensor], names: Any) -> torch.Tensor:
    """The norm of each row over the given parameters, (rows,)."""
    return torch.stack([gradients[key].flatten(1).norm(dim=1) for key in names]).norm(dim=0)


def oracle_sum(
    gradients: dict[str, torch.Tensor], names: Any, max_grad_norm: float
) -> dict[str, torch.Tensor]:
    """The sum over rows of clipped gradients, with Opacus' clip factor min(1, C / (norm + 1e-6))."""
    factors = (max_grad_norm / (oracle_norms(gradients, names) + 1e-6)).clamp(max=1.0)
    return {key: torch.einsum("n,n...->...", factors, gradients[key]) for key in names}


def relative_error(got: torch.Tensor, wanted: torch.Tensor, scale: float) -> float:
    """max |got - wanted| over ``scale``."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return float((got.detach() - wanted).abs().max()) / scale if wanted.numel() else 0.0


def assert_step_is_exact(
    name: str,
    mode: str,
    batch: dict[str, torch.Tensor],
    stock: Any,
    *,
    prepare: Callable[[Any], None] = lambda model: None,
    **options: Any,
) -> None:
    """Per-row norms and the sum after a whole optimizer step equal the oracle's.

    Args:
        name: the class.
        mode: of `ALL_MODES`.
        batch: inputs and labels.
        stock: the stock model, which is the oracle and is then converted.
        prepare: what to do with the dpzoo model before it is made private (freeze a part, say).
        **options: of `Step`.
    """
    wanted = oracle_gradients(name, stock, batch)
    model = dpzoo.convert(stock)
    prepare(model)
    assert_model_step_is_exact(name, mode, batch, model, wanted, **options)


def assert_model_step_is_exact(
    name: str,
    mode: str,
    batch: dict[str, torch.Tensor],
    model: Any,
    wanted: dict[str, torch.Tensor],
    **options: Any,
) -> None:
    """`assert_step_is_exact` of a model as it is, against per-row gradients in the stock layout."""
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    norms = oracle_norms(wanted, names)
    clip = float(norms[norms > 0].median())  # some rows are clipped and some are not
    step = Step(name, model, mode, max_grad_norm=clip, **options)
    step.backward(batch)
    assert relative_error(step.norms(), norms, float(norms.max())) <= TOLERANCE
    rows = len(norms) if step.reduction == "mean" else 1
    sums = oracle_sum(wanted, names, clip)
    scale = max(float(value.abs().max()) for value in sums.values())
    got = step.gradient()
    assert sorted(got) == sorted(names)
    for key in names:
        assert relative_error(got[key] * rows, sums[key], scale) <= TOLERANCE, key
