"""What dpzoo's mode "bk" computes: each row's own share of the clipped sum, and the norms it goes by."""

from typing import Any

import torch

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.numerics import Gradients
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY, ModeRun, OpacusMode, first_line
from dpzoo.clipping.module import BookKeepingModule
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError


class OneRow(BookKeepingOptimizer):
    """Stands where the private optimizer does: clip factor 1 for one row, 0 for the others.

    Args:
        parameters: those that are trained.
        row: the row's index.
    """

    def __init__(self, parameters: list[torch.Tensor], row: int) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
        )
        self.row = row
        self.norms: dict[torch.Tensor, torch.Tensor] = {}

    def clip_factors(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor
    ) -> dict[torch.Tensor | None, torch.Tensor]:
        """As `BookKeepingOptimizer.clip_factors`; keeps the norms of each parameter."""
        self.norms = {parameter: value.sqrt() for parameter, value in squared.items()}
        factors = torch.zeros_like(norms)
        factors[self.row : self.row + 1] = 1
        return {None: factors}


class BookMode(OpacusMode):
    """`dpzoo.PrivacyEngine`'s mode "bk" around a copy of a model.

    A row's gradient is read off the sum itself: all rows run together, and the row alone has a clip
    factor. It takes one loss for each row.
    """

    def prepare(self, model: torch.nn.Module) -> Any:
        return BookKeepingModule(model)

    def run(
        self, batch: Batch, weights: torch.Tensor | None = None, unit_ids: Any = None
    ) -> ModeRun:
        """As `OpacusMode.run`; with ids of the rows' units, (rows,), of units in the place of rows."""
        try:
            made = ModeRun()
            shares: dict[str, list[torch.Tensor]] = {}
            count = batch.rows if unit_ids is None else len(set(unit_ids))
            for row in range(max(count, 1)):
                self.clear()
                one = OneRow(list(self.parameters.values()), row)
                losses = self.losses(batch)
                losses = losses if weights is None else losses * weights
                self.wrapper.backward(losses, one, unit_ids)
                for name, p in self.parameters.items():
                    if p in one.norms:
                        made.norms[name] = one.norms[p]
                        shares.setdefault(name, []).append(one.sums[p].detach())
            made.rows = {name: torch.stack(rows)[:count] for name, rows in shares.items()}
            self.clear()
            return made
        except Exception as error:
            self.discard()
            return ModeRun(error=first_line(error))

    def losses(self, batch: Batch) -> torch.Tensor:
        losses = super().losses(batch)
        if losses.dim() == 0:
            raise InputError(
                f"{PER_ROW_LOSS_ONLY['bk']}. Pass loss=... with one value for each row; "
                f"dpzoo.ModelLoss(model) has them for transformers' models."
            )
        return losses

    def backward(self, batch: Batch, weights: torch.Tensor | None = None) -> None:
        losses = self.losses(batch)
        self.wrapper.backward(
            losses if weights is None else losses * weights,
            OneRow(list(self.parameters.values()), 0),
        )

    def optimizer(
        self, max_grad_norm: float, denominator: int = 1, sigma: float = 0.0, lr: float = 0.0
    ) -> Any:
        return BookKeepingOptimizer(
            torch.optim.SGD(list(self.parameters.values()), lr=lr),
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            expected_batch_size=denominator,
        )

    def private_backward(self, batch: Batch, optimizer: Any, factor: float = 1.0) -> None:
        self.wrapper.backward(self.losses(batch) * factor, optimizer)

    def step_after(self, before: Batch, batch: Batch, max_grad_norm: float) -> Gradients:
        """What a noiseless step sums up when another batch's step came before it.

        Raises:
            Exception: whatever is raised; the copy is discarded then.
        """
        try:
            self.clear()
            optimizer = self.optimizer(max_grad_norm)
            for part in (before, batch):
                optimizer.zero_grad()
                self.private_backward(part, optimizer)
                optimizer.pre_step()
            summed = {n: p.grad.detach().clone() for n, p in self.parameters.items()}
            self.clear()
            return summed
        except Exception:
            self.discard()
            raise


def mode_around(make: Any, mode: str, loss: Any) -> OpacusMode:
    """A mode around copies of a model; arguments as `OpacusMode`."""
    return (BookMode if mode == "bk" else OpacusMode)(make, mode, loss)
