"""The optimizer's half: clip factors, and noise added in place to sums that are already clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _generate_noise
from torch.optim import Optimizer

from dpzoo.clipping.noise import NoiseStreams
from dpzoo.errors import InputError

CLIPPINGS = ("flat", "per_layer", "automatic")


class BookKeepingOptimizer(DPOptimizerFastGradientClipping):
    """A `DPOptimizer` whose gradients arrive clipped and summed in ``summed_grad``.

    Args:
        optimizer: any torch optimizer.
        noise_multiplier: sigma; the noise on each coordinate of the sum is N(0, (sigma C)^2).
        max_grad_norm: C; for "per_layer" a list, one for each parameter of the optimizer.
        expected_batch_size: what the sum is divided by for "mean".
        loss_reduction: "mean" or "sum".
        generator: source of the noise; see `dpzoo.clipping.noise`.
        secure_mode: noise as Opacus' secure mode makes it.
        clipping: "flat": min(1, C / (norm + 1e-6)). "per_layer": the same of each parameter by
            itself. "automatic": C / (norm + gamma), every row brought to (almost) norm C (Bu et al.
            2022, arXiv 2206.07136).
        gamma: of automatic clipping.

    Guarantees:
        Noise is added once per logical step, to every trainable parameter, whether or not a gradient
        reached it.
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
        clipping: str = "flat",
        gamma: float = 0.01,
        **kwargs: Any,
    ) -> None:
        if clipping not in CLIPPINGS:
            raise InputError(
                f"grad_sample_mode='bk' got clipping={clipping!r}, wanted one of {CLIPPINGS}."
            )
        self.clipping, self.gamma = clipping, gamma
        self.max_grad_norms = None
        if clipping == "per_layer":
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            if not isinstance(max_grad_norm, (list, tuple)) or len(max_grad_norm) != count:
                raise InputError(
                    f"clipping='per_layer' got max_grad_norm={max_grad_norm!r}, wanted a list of "
                    f"{count} numbers, one for each parameter of the optimizer."
                )
            self.max_grad_norms = [float(norm) for norm in max_grad_norm]
            max_grad_norm = float(torch.tensor(self.max_grad_norms, dtype=torch.float64).norm())
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
        self._streams = NoiseStreams(generator)

    def clip_factors(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor
    ) -> dict[torch.Tensor | None, torch.Tensor]:
        """The factor of each row, (rows,), under None; or of each row and parameter ("per_layer").

        Args:
            squared: parameter -> squared norms of the rows, (rows,).
            norms: norms of the rows over all parameters, (rows,).
        """
        if self.max_grad_norms is not None:
            clips = dict(zip(self._all_parameters(), self.max_grad_norms, strict=True))
            return {
                parameter: _clipped(clips[parameter], values.sqrt())
                for parameter, values in squared.items()
            }
        if self.clipping == "automatic":
            return {None: self.max_grad_norm / (norms + self.gamma)}
        return {None: _clipped(self.max_grad_norm, norms)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the sums of a logical batch that is over.

        Args:
            set_to_none: free ``grad`` (as in torch.optim, and unlike Opacus, the default): the sums
                of the next batch are new tensors, beside which zeros would be kept for nothing.
        """
        super().zero_grad(set_to_none)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise and scale the sums, unless the step is one of a logical batch's earlier parts."""
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        if self.step_hook:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    def add_noise(self) -> None:
        """Turn every ``summed_grad``, in place, into the noised and scaled ``grad``."""
        grads = []
        for parameter in self.params:
            total = getattr(parameter, "summed_grad", None)
            if total is None:
                total = torch.zeros_like(parameter)
            grads.append(total.to(parameter.dtype) if total.dtype != parameter.dtype else total)
        self._noise_in_place(grads, self.noise_multiplier * self.max_grad_norm)
        for parameter, grad in zip(self.params, grads, strict=True):
            parameter.grad = grad.view_as(parameter)
            parameter.summed_grad = None

    def _noise_in_place(self, grads: list[torch.Tensor], std: float) -> None:
        scale = 1.0 if self.loss_reduction == "sum" else 1.0 / self.expected_batch_size
        if self.secure_mode:
            for grad in grads:
                noise = _generate_noise(std, grad, generator=self.generator, secure_mode=True)
                grad.add_(noise).mul_(scale)
        else:
            self._streams.add(grads, std, scale)

    def _all_parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class DistributedBookKeepingOptimizer(BookKeepingOptimizer):
    """`BookKeepingOptimizer` for one of several processes: noise on rank 0, sums over all ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def _noise_in_place(self, grads: list[torch.Tensor], std: float) -> None:
        super()._noise_in_place(grads, std if self.rank == 0 else 0.0)
        for grad in grads:
            torch.distributed.all_reduce(grad)
            if self.loss_reduction == "mean":
                grad.div_(self.world_size)


def _clipped(max_grad_norm: float, norms: torch.Tensor) -> torch.Tensor:
    """Opacus' clip factor: min(1, C / (norm + 1e-6))."""
    return (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
