"""`dpzoo.PrivacyEngine`: Opacus' engine with one more mode, ``grad_sample_mode="bk"``."""

from __future__ import annotations

from typing import Any

import opacus
from torch import nn, optim
from torch.utils.data import DataLoader

from dpzoo.clipping.adaptive import AdaptiveBookKeepingOptimizer
from dpzoo.clipping.loss import PrivateCriterion
from dpzoo.clipping.module import BookKeepingHooks, BookKeepingModule
from dpzoo.clipping.optimizer import BookKeepingOptimizer, DistributedBookKeepingOptimizer
from dpzoo.data import prime_empty_batches
from dpzoo.errors import InputError

NOISE_STATE = "dpzoo_noise_state"
"""Key of a checkpoint."""


class PrivacyEngine(opacus.PrivacyEngine):
    """`opacus.PrivacyEngine` with book-keeping: exact private steps in one backward pass.

    With ``grad_sample_mode="bk"``, `make_private` and `make_private_with_epsilon` return what Opacus'
    ghost mode returns, (model, optimizer, criterion, loader), and the loop is the same:

        loss = criterion(model(**batch))
        loss.backward()
        optimizer.step()

    All other modes and the accountants are Opacus' own. ``clipping`` may be "flat", "per_layer",
    "automatic" (`dpzoo.clipping.optimizer.BookKeepingOptimizer`) or "adaptive", with Opacus' arguments
    for it (`dpzoo.clipping.adaptive.AdaptiveBookKeepingOptimizer`).

    Guarantees:
        Each logical step adds N(0, (noise_multiplier * max_grad_norm)^2) noise, once, to a sum in
        which a row's share has norm at most ``max_grad_norm``.
    """

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        loss_reduction: str = "mean",
        grad_sample_mode: str = "hooks",
        poisson_sampling: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As `opacus.PrivacyEngine.make_private`, with ``grad_sample_mode="bk"`` among the modes."""
        criterion = (
            nn.CrossEntropyLoss(reduction=loss_reduction) if criterion is None else criterion
        )
        made = super().make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
            poisson_sampling=poisson_sampling,
            **kwargs,
        )
        if grad_sample_mode != "bk":
            return made
        private, private_optimizer, loader = made
        private_criterion = PrivateCriterion(private, private_optimizer, criterion, loss_reduction)
        if poisson_sampling and isinstance(loader.dataset[0], dict):
            prime_empty_batches(loader)
        return private, private_optimizer, private_criterion, loader

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        if grad_sample_mode != "bk":
            return super()._prepare_model(
                module, grad_sample_mode=grad_sample_mode, wrap_model=wrap_model, **kwargs
            )
        self.validate(module=module, optimizer=None, data_loader=None)
        if isinstance(module, BookKeepingModule):
            return module
        kwargs.pop("max_grad_norm", None)  # the optimizer's
        return (BookKeepingModule if wrap_model else BookKeepingHooks)(module, **kwargs)

    def _prepare_optimizer(
        self,
        *,
        optimizer: optim.Optimizer,
        distributed: bool = False,
        noise_generator: Any = None,
        grad_sample_mode: str = "hooks",
        **kwargs: Any,
    ) -> Any:
        if grad_sample_mode != "bk":
            return super()._prepare_optimizer(
                optimizer=optimizer,
                distributed=distributed,
                noise_generator=noise_generator,
                grad_sample_mode=grad_sample_mode,
                **kwargs,
            )
        if isinstance(optimizer, opacus.optimizers.DPOptimizer):
            optimizer = optimizer.original_optimizer
        generator = self.secure_rng if self.secure_mode else noise_generator
        kind: type[BookKeepingOptimizer] = BookKeepingOptimizer
        if kwargs.get("clipping") == "adaptive":
            if distributed:
                raise InputError(
                    "grad_sample_mode='bk' got clipping='adaptive' with distributed=True, wanted one of "
                    "the two: the count of rows that were not clipped is of one process alone."
                )
            kind = AdaptiveBookKeepingOptimizer
        elif distributed:
            kind = DistributedBookKeepingOptimizer
        return kind(optimizer, generator=generator, secure_mode=self.secure_mode, **kwargs)

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As Opacus', with the state of the noise where the optimizer is one of mode "bk".

        Whoever reads the file can compute the noise of the coming steps: keep it as the data are kept.
        """
        saved = dict(checkpoint_dict or {})
        if isinstance(optimizer, BookKeepingOptimizer):
            saved[NOISE_STATE] = optimizer.noise_state()
        super().save_checkpoint(
            path=path, module=module, optimizer=optimizer, checkpoint_dict=saved, **kwargs
        )

    def load_checkpoint(
        self, *, path: Any, module: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As Opacus'; an optimizer of mode "bk" goes on with the noise that would have come.

        Raises:
            InputError: the optimizer is one of mode "bk", and the file has no noise state or another
                kind of it.
        """
        loaded: dict[str, Any] = super().load_checkpoint(
            path=path, module=module, optimizer=optimizer, **kwargs
        )
        state = loaded.pop(NOISE_STATE, None)
        if isinstance(optimizer, BookKeepingOptimizer):
            if state is None:
                raise InputError(
                    f"{path} has no noise state, wanted a checkpoint that was saved in "
                    f"grad_sample_mode='bk'. To go on from another mode, load it without the optimizer."
                )
            optimizer.load_noise_state(state)
        return loaded
