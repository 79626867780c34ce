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
            2022, arXiv 2206.07136). "adaptive" is `dpzoo.clipping.adaptive`'s.
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
        self._shares: list[float] | None = None  # of each parameter in max_grad_norm, per layer
        if clipping == "per_layer":
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            if not isinstance(max_grad_norm, (list, tuple)) or len(max_grad_norm) != count:
                raise InputError(
                    f"clipping='per_layer' got max_grad_norm={max_grad_norm!r}, wanted a list of "
                    f"{count} numbers, one for each parameter of the optimizer."
                )
            norms = torch.tensor(max_grad_norm, dtype=torch.float64)
            max_grad_norm = float(norms.norm())
            self._shares = (norms / max_grad_norm).tolist()
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
        self._clipped_at = 0.0  # the largest norm that a row of the present sums may have

    @property
    def gradient_noise_multiplier(self) -> float:
        """Standard deviation of the gradients' noise in units of the clipping norm."""
        return self.noise_multiplier

    def noise_state(self) -> dict[str, Any]:
        """What the noise of the coming steps depends on: secret, as long as the run's data are.

        Empty in secure mode, whose noise cannot be drawn a second time.
        """
        if self.secure_mode:
            return {}
        own = self.generator
        return {
            "streams": self._streams.state(),
            "generator": None if own is None else own.get_state(),
            "max_grad_norm": float(self.max_grad_norm),
        }

    def load_noise_state(self, state: dict[str, Any]) -> None:
        """Go on where `noise_state` was taken: the noise that comes is the one that would have come.

        Raises:
            InputError: the state has a generator's and this optimizer has none, or the reverse; or
                exactly one of the two is in secure mode.
        """
        if self.secure_mode != (not state):
            raise InputError(
                f"The noise state is one {'of' if not state else 'without'} secure mode, wanted one "
                f"{'without' if not state else 'of'} it: make the engine as the saved one was made."
            )
        if not state:
            return
        if (state["generator"] is None) != (self.generator is None):
            raise InputError(
                f"The noise state has {'no' if state['generator'] is None else 'a'} generator's "
                f"state, and make_private got noise_generator={self.generator!r}. Wanted both or "
                f"neither: make the engine as the saved one was made."
            )
        self._streams.load_state(state["streams"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.max_grad_norm = state["max_grad_norm"]

    def clip_factors(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor
    ) -> dict[torch.Tensor | None, torch.Tensor]:
        """The factor of each row, (rows,), under None; or of each row and parameter ("per_layer").

        Args:
            squared: parameter -> squared norms of the rows, (rows,).
            norms: norms of the rows over all parameters, (rows,).
        """
        self._clipped_at = max(self._clipped_at, self.max_grad_norm)
        if self._shares is not None:
            shares = dict(zip(self._all_parameters(), self._shares, strict=True))
            return {
                parameter: _clipped(shares[parameter] * self.max_grad_norm, values.sqrt())
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
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                total = torch.zeros_like(parameter, dtype=dtype)
            grads.append(total)
        # A scheduler may have changed max_grad_norm since the rows were clipped.
        clipped_at = max(self._clipped_at, self.max_grad_norm)
        self._noise_in_place(grads, self.gradient_noise_multiplier * clipped_at)
        self._clipped_at = 0.0
        for parameter, grad in zip(self.params, grads, strict=True):
            # Rounded to the parameter's dtype after the noise, not before: that is post-processing.
            parameter.grad = grad.to(parameter.dtype).view_as(parameter)
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
