"""A logical step in parts, alike in the modes bk, ghost and hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpzoo.clipping import PrivacyEngine
from dpzoo.clipping.criterion import refuse_dependence
from dpzoo.clipping.noise import NoiseSource
from dpzoo.errors import InputError
from dpzoo.integrations.arguments import PrivacyArguments
from dpzoo.losses import RowLosses
from dpzoo.modes import MODES
from dpzoo.opacus_internals import leave_rows


class PrivateStep:
    """A model watched for per-row gradients, and the private optimizer around an ordinary one.

    Args:
        engine: gets the steps into its accountant.
        model: the model; it is not wrapped.
        optimizer: a torch optimizer of (some of) its parameters.
        privacy: the run's.
        noise_multiplier: the run's.
        rows: of the training data; or units.
        logical: the expected rows, or units, of a batch.
        device: the model's.
        ranks: processes, each with the whole model, or all with a part of it (FSDP2).

    Raises:
        InputError: an optimizer that is private already, or of other parameters.
    """

    def __init__(
        self,
        engine: PrivacyEngine,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        privacy: PrivacyArguments,
        *,
        noise_multiplier: float,
        rows: int,
        logical: int,
        device: torch.device,
        ranks: int = 1,
    ) -> None:
        _refuse_optimizer(optimizer, model)
        self._mode = privacy.grad_sample_mode
        # The engine wants a loader for its length. The batches come from PoissonBatches.
        counted = DataLoader(TensorDataset(torch.empty(rows, 0)), batch_size=logical)
        engine.dataset, engine.replicated = None, ranks > 1
        self._hooks, self.optimizer, *criterion, _ = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=RowLosses(),
            data_loader=counted,
            noise_multiplier=noise_multiplier,
            max_grad_norm=privacy.clipping_norm,
            grad_sample_mode=privacy.grad_sample_mode,
            clipping=privacy.clipping,
            wrap_model=False,
        )
        self.criterion: Any = criterion[0] if criterion else RowLosses()
        # Opacus rounds both to whole batches an epoch.
        self.optimizer.expected_batch_size = logical / ranks
        self._tried = 0  # batches of several rows
        self.release = self.optimizer.release
        self.release.sample_rate = logical / rows
        if privacy.noise_seed is not None:
            self.release.noise = NoiseSource.insecure(privacy.noise_seed)

    def begin(self, rows: int, units: dict[int, int] | None = None) -> None:
        """A step on a draw begins, of arguments as `Draw`: forget the last step's gradients."""
        self.optimizer.zero_grad()
        self.optimizer.draws.restart()
        self.optimizer.draws.begin(rows, units)

    def end_part(self, *, last: bool) -> None:
        """Add up a part's clipped sum, after its backward pass; the last one's is left to the step."""
        self.optimizer.signal_skip_step(not last)
        if not last:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def try_others(
        self, who: str, losses: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any]
    ) -> None:
        """Before some parts: raise if a row's loss depends on other rows (`dpzoo.clipping.criterion`).

        Args:
            who: computes the losses.
            losses: of a part's inputs, (rows,).
            inputs: of the part.
        """
        rows = len(next(iter(inputs.values())))
        if rows < 2 or not MODES[self._mode].own:
            return
        self._tried += 1
        if self._tried & (self._tried - 1):
            return

        def changed(change: Any) -> torch.Tensor:
            return losses(
                {
                    name: change(x) if isinstance(x, torch.Tensor) and len(x) == rows else x
                    for name, x in inputs.items()
                }
            )

        refuse_dependence(who, changed, self._hooks, rows, first=self._tried == 1)

    def forward(self) -> AbstractContextManager[None]:
        """Around the model's forward pass: names the ranks that FSDP2 waits for in vain."""
        if not MODES[self._mode].own:
            return nullcontext()
        around: AbstractContextManager[None] = self._hooks.waiting("forward pass")
        return around

    def nothing(self) -> None:
        """The step of an empty draw: the sum of no rows, to which the step adds its noise."""
        for parameter in self.optimizer.params:
            if not MODES[self._mode].own:
                none = parameter.new_zeros((0, *parameter.shape))
                leave_rows(parameter, self._mode == "ghost", none)

    def noise_state(self) -> dict[str, Any]:
        """What the noise of the coming steps depends on: secret."""
        state: dict[str, Any] = self.release.state()
        return state

    def load_noise_state(self, state: dict[str, Any]) -> None:
        """Go on where `noise_state` was taken."""
        self.release.load_state(state)

    def detach(self) -> None:
        """Leave the model as it was, an ordinary one."""
        self._hooks.cleanup()


def _refuse_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    if isinstance(optimizer, DPOptimizer):
        raise InputError(
            f"DPTrainer got a {type(optimizer).__name__} in optimizers, wanted a torch optimizer: it "
            f"makes a private one of it."
        )
    own = set(model.parameters())
    if not all(p in own for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            "DPTrainer got an optimizer of other parameters than the model's. A stock model is "
            "converted: call model = dpzoo.convert(model) first, and make the optimizer of that."
        )
