"""Stale state: does a step use anything of an earlier one?"""

import torch

from dpzoo import opacus_internals as internals
from dpzoo.auditing.batches import Batch
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY
from dpzoo.auditing.record import Record

POISON = 1e6


def stale_state(subject: ModelUnderAudit, record: Record) -> None:
    """Nothing that an earlier batch left behind enters a step.

    In ghost mode, stale norms are poisoned before a batch; those that are still there afterwards were
    not computed from it. In bk, a step after another batch's is compared with one before any. Tried on
    the whole batch and on every row alone.

    Catches: branches that some batches skip (ghost mode then clips with an older batch's norms),
    parameters that take part in the norm and not in the step.
    """
    if not {"ghost", "bk"} & set(subject.modes):
        record.skip("only ghost mode keeps norms from one batch to the next")
    for mode, check in (("ghost", _ghost), ("bk", _book_keeping)):
        if mode in subject.modes and subject.usable(mode, record.skipped):
            record.ran()
            check(subject, record)


def _batches(subject: ModelUnderAudit) -> list[tuple[str, Batch]]:
    batches = [("the whole batch", subject.batch)]
    batches += [
        (f"row {i} alone", subject.batch.take([i]))
        for i in range(subject.rows)
        if not subject.unreached or any(subject.unreached)
    ]
    if subject.batch.floats():
        batches.append(("the batch negated", subject.batch.scaled(range(subject.rows), -1.0)))
    return batches


def _book_keeping(subject: ModelUnderAudit, record: Record) -> None:
    """A batch's step in bk is the same whatever came before."""
    if not subject.per_row_loss:
        record.skip(PER_ROW_LOSS_ONLY["bk"])
        return
    bk, clip = subject.opacus("bk"), subject.max_grad_norm
    for title, batch in _batches(subject):
        try:
            bk.discard()
            wanted = bk.clipped_sum([batch], clip)
            got = bk.clipped_sum([subject.batch, batch], clip, one_draw=False)
        except Exception:  # edge_cases and coverage name what raises
            continue
        stale = record.differ(got, wanted, subject.tolerance)
        if stale:
            name = next(iter(stale))
            record.find(
                "privacy",
                f"a step depends on the batch before it ({title})",
                "let nothing of a batch stay in the model: no caches, no running statistics",
                parameters=stale,
                mode="bk",
                expected="the sum of this batch",
                got=f"another one, off by {stale[name]:.3g} in {name}",
            )
            return


def _ghost(subject: ModelUnderAudit, record: Record) -> None:
    """A batch renews every parameter's norms."""
    stale: dict[str, str] = {}
    for title, batch in _batches(subject):
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
            mode="ghost",
            expected="a norm computed from this batch",
            got=f"the older batch's for {name}",
        )


def _left_over(subject: ModelUnderAudit, batch: Batch) -> list[str]:
    """Parameters whose norm a batch does not renew."""
    opacus = subject.opacus("ghost")
    try:
        opacus.clear()
        for p in opacus.parameters.values():
            poison = torch.full((batch.rows,), POISON, dtype=p.dtype, device=p.device)
            internals.set_norms(p, poison)
        opacus.backward(batch)
        norms = {name: internals.norms_of(p) for name, p in opacus.parameters.items()}
        left = [
            n for n, v in norms.items() if v is not None and len(v) and bool((v == POISON).all())
        ]
        opacus.clear()
        return left
    except Exception:
        opacus.discard()  # edge_cases and coverage name what raises
        return []
