"""Freshness: is everything that enters a step of this step?"""

import torch

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.record import Record
from dpzoo.auditing.subject import Subject

POISON = 1e6


def freshness(subject: Subject, record: Record) -> None:
    """Nothing that an earlier batch left behind enters a step.

    Stale norms are poisoned before a batch; those that are still there afterwards were not computed
    from it. Tried on the whole batch and on every row alone.

    Catches: branches that some batches skip (ghost mode then clips with an older batch's norms),
    parameters that take part in the norm and not in the step.
    """
    if "ghost" not in subject.modes:
        record.skip("only ghost mode keeps norms from one batch to the next")
        return
    with subject.usable("ghost", record.skipped) as usable:
        if not usable:
            return
    record.ran()
    stale: dict[str, str] = {}
    batches = [("the whole batch", subject.batch)]
    batches += [
        (f"row {i} alone", subject.batch.take([i]))
        for i in range(subject.rows)
        if not subject.unreached or any(subject.unreached)
    ]
    if subject.batch.floats():
        batches.append(("the batch negated", subject.batch.scaled(range(subject.rows), -1.0)))
    for title, batch in batches:
        for name in _left_over(subject, batch):
            stale.setdefault(name, title)
    if stale:
        name, title = next(iter(stale.items()))
        record.find(
            "privacy",
            f"a batch leaves the norms of some parameters as the batch before left them ({title}): the "
            f"branch does not run, and rows are clipped by other rows' norms",
            "let every parameter take part in every batch (add 0 * its output), or train in hooks mode, "
            "which raises",
            parameters=stale,
            modules=subject.owners(stale),
            mode="ghost",
            expected="a norm computed from this batch",
            got=f"the older batch's for {name}",
        )


def _left_over(subject: Subject, batch: Batch) -> list[str]:
    """Parameters whose norm a batch does not renew."""
    opacus = subject.opacus("ghost")
    try:
        opacus.clear()
        for p in opacus.parameters.values():
            p._norm_sample = torch.full((batch.rows,), POISON, dtype=p.dtype, device=p.device)
        opacus.backward(batch)
        left = [
            name
            for name, p in opacus.parameters.items()
            if len(p._norm_sample) and bool((p._norm_sample == POISON).all())
        ]
        opacus.clear()
        return left
    except Exception:
        opacus.discard()  # edges and coverage name what raises
        return []
