"""What dpzoo's mode "bk" computes: each row's own share of the clipped sum, and the norms it goes by."""

from typing import Any

import torch

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY, ModeRun, OpacusMode, first_line
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.module import BookKeepingModule
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.errors import InputError


class EachRow(BookKeepingOptimizer):
    """Stands where the private optimizer does: keeps each row's share of the sums, unclipped."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=1,
        )
        self.norms: dict[torch.Tensor, torch.Tensor] = {}
        self.shares: dict[torch.Tensor, torch.Tensor] = {}

    def clip_factors(
        self, squared: dict[torch.Tensor, torch.Tensor], norms: torch.Tensor
    ) -> dict[torch.Tensor | None, torch.Tensor]:
        """As `BookKeepingOptimizer.clip_factors`; keeps the norms of each parameter."""
        self.norms = {parameter: value.sqrt() for parameter, value in squared.items()}
        return {None: torch.ones_like(norms)}

    def add_rows(self, store: FactorStore, named: Any, inputs: Any = (), whole: Any = None) -> Any:
        """As `BookKeepingOptimizer.add_rows`; each sum is taken with one row's factor 1, the others' 0."""
        weighted_sum = store.weighted_sum

        def each(parameter: Any, weights: Any, kept: Any = None, *rest: Any, **more: Any) -> Any:
            ones = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
            rows = [weighted_sum(parameter, one, kept, None, forget=False) for one in ones]
            self.shares[parameter] = torch.stack(rows).detach()
            return weighted_sum(parameter, weights, kept, *rest, **more)

        vars(store)["weighted_sum"] = each
        return super().add_rows(store, named, inputs, whole)


class BookKeepingMode(OpacusMode):
    """`dpzoo.PrivacyEngine`'s mode "bk" around a copy of a model.

    A row's gradient is read off the sum itself: all rows run together, and sums are taken in which the row
    alone has a clip factor. It takes one loss for each row.
    """

    def prepare(self, model: torch.nn.Module) -> Any:
        return BookKeepingModule(model)

    def run(
        self, batch: Batch, weights: torch.Tensor | None = None, unit_ids: Any = None
    ) -> ModeRun:
        """As `OpacusMode.run`; with ids of the rows' units, (rows,), for units instead of rows."""
        try:
            self.clear()
            each = self._each_row(batch, weights, unit_ids)
            named = self.parameters.items()
            norms = {name: each.norms[p] for name, p in named if p in each.norms}
            rows = {name: each.shares[p] for name, p in named if p in each.shares}
            self.clear()
            return ModeRun(rows=rows, norms=norms)
        except Exception as error:
            self.discard()
            return ModeRun(error=first_line(error))

    def _each_row(
        self, batch: Batch, weights: torch.Tensor | None, unit_ids: Any = None
    ) -> EachRow:
        each, losses = EachRow(list(self.parameters.values())), self.losses(batch)
        self.wrapper.backward(losses if weights is None else losses * weights, each, unit_ids)
        return each

    def losses(self, batch: Batch) -> torch.Tensor:
        losses = super().losses(batch)
        if losses.dim() == 0:
            raise InputError(
                f"{PER_ROW_LOSS_ONLY['bk']}. Pass loss=... with one value for each row; "
                f"dpzoo.ModelLoss(model) has them for transformers' models."
            )
        return losses

    def backward(self, batch: Batch, weights: torch.Tensor | None = None) -> None:
        self._each_row(batch, weights)

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


def mode_around(make: Any, mode: str, loss: Any) -> OpacusMode:
    """A mode around copies of a model; arguments as `OpacusMode`."""
    return (BookKeepingMode if mode == "bk" else OpacusMode)(make, mode, loss)
