"""The former name of `dpzoo.clipping.criterion`; it goes with 0.2."""

import warnings

from dpzoo.clipping.criterion import PrivateCriterion, PrivateLoss

__all__ = ["PrivateCriterion", "PrivateLoss"]

warnings.warn(
    "dpzoo.clipping.loss is now dpzoo.clipping.criterion. Import from there: dpzoo 0.2 drops the old name.",
    FutureWarning,
    stacklevel=2,
)
