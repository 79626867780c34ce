"""All that dpzoo reads and sets in Opacus beyond its public interface: read this for a new Opacus release.

Written for opacus 1.6.0. ``tests/test_opacus_internals.py`` compares the names with the installed version,
and finds uses of them in other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

# --- modules and parameters under Opacus' hooks -------------------------------------------------


def uses_left(owner: Any) -> int:
    """How many uses of a parameter (under FSDP2: of a module) the backward pass has still to reach."""
    return getattr(owner, "_forward_counter", 0)


def counts_uses(owner: Any) -> bool:
    """Whether Opacus' hooks count the uses of a parameter or module."""
    return hasattr(owner, "_forward_counter")


def forget_hooks(parameter: torch.Tensor) -> None:
    """Take off what Opacus' hooks keep on a parameter."""
    for name in ("_forward_counter", "grad_sample"):
        vars(parameter).pop(name, None)


def is_expanded(weight: Any) -> bool:
    """Whether ExpandedWeights (mode "ew") has put a tensor of its own where the parameter was."""
    return hasattr(weight, "orig_weight")


def unexpanded(tensor: torch.Tensor) -> torch.Tensor:
    """The parameter for which ExpandedWeights has put this tensor; or the tensor itself."""
    own: torch.Tensor = vars(tensor).get("orig_weight", tensor)  # it answers no other question
    return own


def is_private(parameter: torch.Tensor) -> bool:
    """Whether Opacus computes a parameter's per-sample gradients."""
    return counts_uses(getattr(parameter, "orig_weight", parameter))


def under_ghost(model: nn.Module) -> bool:
    """Whether one of the model's layers carries the hooks of Opacus' ghost mode."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if hasattr(type(owner), "get_clipping_coef"):
                return bool(getattr(owner, "hooks_enabled", True))
    return False


def has_grad_sampler(kind: type[nn.Module]) -> bool:
    """Whether a grad sampler is registered for a class of modules."""
    return kind in GradSampleModule.GRAD_SAMPLERS


# --- what a backward pass leaves on parameters --------------------------------------------------

LEFT_ON_PARAMETERS = ("grad_sample", "summed_grad", "_norm_sample", "_current_grad_sample")


def norms_of(parameter: Any) -> torch.Tensor | None:
    """Norms of a parameter's per-sample gradients in ghost mode, (rows,); None before a backward pass."""
    norms: torch.Tensor | None = getattr(parameter, "_norm_sample", None)
    return norms


def set_norms(parameter: Any, norms: torch.Tensor) -> None:
    """Put other norms there."""
    parameter._norm_sample = norms


def forget_rows(parameter: Any) -> None:
    """Remove gradients, per-sample gradients, norms and sums."""
    parameter.grad = parameter.grad_sample = parameter.summed_grad = None
    vars(parameter).pop("_norm_sample", None)


def norms_of_rows(wrapper: Any) -> torch.Tensor | None:
    """Norms of the rows in ghost mode's last backward pass, (rows,)."""
    norms: torch.Tensor | None = getattr(wrapper, "_per_sample_gradient_norms", None)
    return norms


def counts_ghost_norms(model: Any) -> bool:
    """Whether a wrapper or hooks object is ghost mode's."""
    return hasattr(model, "get_norm_sample")


def leave_rows(parameter: Any, ghost: bool, rows: torch.Tensor) -> None:
    """Leave what a backward pass on some rows leaves: (rows, *shape), or in ghost mode their sum."""
    if ghost:
        parameter.grad = rows.sum(0)
    else:
        parameter.grad_sample = rows


# --- optimizers ---------------------------------------------------------------------------------

STEP_STATE = ("_step_skip_queue", "_is_last_step_skipped")
"""Attributes of an optimizer that a `BatchMemoryManager` moves on."""


def announced(optimizer: Any) -> list[bool]:
    """Of the coming steps, which a `BatchMemoryManager` has announced as skipped."""
    return list(getattr(optimizer, "_step_skip_queue", []))


def skipped_last(optimizer: Any) -> bool:
    """Whether the last step was that of a logical batch's earlier part."""
    return bool(getattr(optimizer, "_is_last_step_skipped", False))


def skips_next(optimizer: Any) -> bool:
    """Whether this step is one of a logical batch's earlier parts; if so, it is noted as skipped."""
    if optimizer._check_skip_next_step():
        optimizer._is_last_step_skipped = True
        return True
    return False


def note_step(optimizer: Any) -> None:
    """A logical batch's step was taken."""
    optimizer._is_last_step_skipped = False


def forget_skips(optimizer: Any) -> None:
    """Forget what a `BatchMemoryManager` has announced."""
    optimizer._step_skip_queue.clear()
    optimizer._is_last_step_skipped = False


@contextmanager
def without_noise(optimizer: Any) -> Iterator[float]:
    """Have ``add_noise`` add none; gives the standard deviation that it would have had."""
    # The second is adaptive clipping's, of the gradients.
    both = ("noise_multiplier", "_adjusted_noise_multiplier")
    names = [name for name in both if getattr(optimizer, name, None) is not None]
    kept = {name: getattr(optimizer, name) for name in names}
    for name in names:
        setattr(optimizer, name, 0.0)
    try:
        yield float(kept[names[-1]] * optimizer.max_grad_norm)
    finally:
        for name in names:
            setattr(optimizer, name, kept[name])


def is_ghost_optimizer(optimizer: Any) -> bool:
    """Whether it is the optimizer of ghost mode."""
    return "FastGradientClipping" in type(optimizer).__name__


# --- loaders and losses -------------------------------------------------------------------------


def is_poisson(sampler: Any) -> bool:
    """Whether a batch sampler draws each row with one probability."""
    drawn = any("UniformWithReplacement" in kind.__name__ for kind in type(sampler).__mro__)
    return drawn and getattr(sampler, "sample_rate", None) is not None


def is_splitting(sampler: Any) -> bool:
    """Whether a batch sampler is a `BatchMemoryManager`'s, around another."""
    return type(sampler).__name__ == "BatchSplittingSampler"


def on_ghost_backward(criterion: Any, seen: Callable[[int], None]) -> None:
    """Have the losses of ghost mode's criterion tell their number of rows when they are backpropagated."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super(made, self).__call__(*args, **kwargs)
        backward = loss.backward

        def counted(*given: Any, **options: Any) -> Any:
            seen(len(loss.loss_per_sample))
            return backward(*given, **options)

        loss.backward = counted
        return loss

    kind = type(criterion)
    made: Any = type(kind.__name__, (kind,), {"__call__": call})
    criterion.__class__ = made
