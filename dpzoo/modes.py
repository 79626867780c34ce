"""The modes of per-sample gradients, and how they differ: one table, for all that depends on the mode."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """A ``grad_sample_mode``.

    Args:
        name: as ``make_private`` takes it.
        own: dpzoo's own engine, which takes any model, and leaves out rows that are not finite.
        criterion: what is backpropagated is a loss of the criterion that ``make_private`` returns; it needs
            the loss of every row, and a scalar loss will not do.
        rows: what each row adds to the sum can be read off.
        norms: rows are clipped by norms that are computed apart from their gradients.
        empty: batches without rows run.
    """

    name: str
    own: bool = False
    criterion: bool = False
    rows: bool = True
    norms: bool = False
    empty: bool = True


MODES = {
    mode.name: mode
    for mode in (
        Mode("hooks"),
        Mode("functorch"),
        Mode("ew", empty=False),
        Mode("ghost", criterion=True, rows=False, norms=True),
        Mode("bk", own=True, criterion=True, norms=True),
    )
}
"""Opacus' own, and dpzoo's."""
