"""Every architecture that the installed transformers has, tried: ``python -m dpzoo.families``.

For each class of five auto classes a tiny instance with random parameters is made from the default
config by rules, and each row of a small batch is run alone through it, by autograd in float64. Then
Opacus' hooks, its ghost mode and dpzoo's "bk" train it by one step without noise, and what comes out is
compared with the rows run alone: the norm of each row, and the clipped sum in each parameter; in "bk"
each row's gradient in each parameter, too.

    architectures -> build -> batch -> oracle -> one step in each mode -> verdict -> docs/models.md

Run it after an upgrade of transformers.
"""

from dpzoo.families.tiny import (
    AUTO_CLASSES,
    COINCIDING,
    Sizes,
    architectures,
    batch,
    build,
    configure,
    model_class,
    row_losses,
)
from dpzoo.families.trial import (
    MODES,
    Result,
    examine,
    largest_error,
    oracle,
    rows_of_bk,
    step,
)

__all__ = [
    "AUTO_CLASSES",
    "COINCIDING",
    "MODES",
    "Result",
    "Sizes",
    "architectures",
    "batch",
    "build",
    "configure",
    "examine",
    "largest_error",
    "model_class",
    "oracle",
    "row_losses",
    "rows_of_bk",
    "step",
]
