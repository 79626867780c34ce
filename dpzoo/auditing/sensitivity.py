"""Sensitivity: by how much do the clipped sums of neighbouring batches differ?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import Gradients, clip_factors, gram, row_norms
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY
from dpzoo.auditing.record import Record

SLACK = 1e-3
SWEEP = (0.01, 0.3, 1.0, 1.5, 3.0, 10.0)
"""Clipping norms, in units of the largest row norm."""
UNITS = 4


@dataclass
class Side:
    """A batch's rows as they enter a clipped sum.

    Args:
        rows: name -> (n, *shape); what a factor multiplies.
        norms: (n,); what the factors are made from.
    """

    rows: Gradients
    norms: torch.Tensor


def sensitivity(subject: ModelUnderAudit, record: Record) -> None:
    """Adding or removing a row changes the clipped sum by at most the clipping norm C.

    Swept over C from far below to far above the rows' norms, for the batch as it is, with one row
    scaled by 1e3, one long row among short ones, and one row whose labels are all ignored. With the ids
    of units, of whole units in mode bk.

    Catches: token-mean losses (hidden at small C), units that are not the row, norms that miss a
    part of the gradient (ghost mode with a functional tie), balance losses.
    """
    modes = []
    for mode in subject.modes:
        if not subject.usable(mode, record.skipped) and not _countable(subject, mode):
            continue
        if mode in PER_ROW_LOSS_ONLY and not subject.per_row_loss:
            record.skip(PER_ROW_LOSS_ONLY[mode])
            continue
        record.ran()
        modes.append(mode)
    worst = dict.fromkeys(modes, (0.0, "", 0.0))
    for title, batch, row, weights in _neighbours(subject) if modes else ():
        fewer = None if weights is None else weights[torch.arange(len(weights)) != row]
        more_sides = _sides(subject, modes, batch, weights)
        fewer_sides = _sides(subject, modes, batch.without(row), fewer)
        for mode in modes:
            more, less = more_sides[mode], fewer_sides[mode]
            if more is None or less is None:
                record.skip(f"{mode}, {title}: raises or is not finite")
                continue
            worst[mode] = max(worst[mode], _worst(more, less, title, subject.max_grad_norm))
    if subject.units is not None and "bk" in modes:
        worst["bk"] = max([worst["bk"], *_without_a_unit(subject, record)])
    for mode, (ratio, title, clip) in worst.items():
        record.measure(ratio, "C")
        if ratio > 1 + SLACK:
            record.find(
                "privacy",
                f"neighbouring batches' clipped sums differ by more than the clipping norm ({title})",
                "the noise is calibrated to C, so epsilon does not hold; see isolation, privacy_unit and "
                "exactness for the cause",
                mode=mode,
                expected=f"at most {clip:.4g} (C)",
                got=f"{ratio * clip:.4g}, {ratio:.3g} times C",
            )


def _countable(subject: ModelUnderAudit, mode: str) -> bool:
    """Whether a mode's per-sample gradients can be clipped, though not one to a row."""
    if mode == "ghost":
        return False
    run = subject.mode_run(mode)
    lengths = {len(rows) for rows in run.rows.values()}
    return not run.error and run.rows.keys() == subject.parameters.keys() and len(lengths) == 1


def _neighbours(subject: ModelUnderAudit) -> Iterator[tuple[str, Batch, int, torch.Tensor | None]]:
    """(what the batch is, the batch, the row that is removed, weights of the rows' losses)."""
    batch, rows = subject.batch, subject.rows
    yield "the batch as it is", batch, 0, None
    if batch.floats():
        yield "one row scaled by 1e3", batch.scaled([0], 1e3), 0, None
    elif subject.per_row_loss:
        weights = torch.ones(rows, dtype=subject.dtype)
        weights[0] = 1e3
        yield "one row's loss scaled by 1e3", batch, 0, weights
    if batch.token_labels():
        labels = next(iter(batch.token_labels().values()))
        counts = (labels != -100).reshape(rows, -1).sum(1)
        long, short = int(counts.argmax()), int(counts.argmin())
        if long == short:
            short = (long + 1) % rows
        copies = batch.take([long, *[short] * (rows - 1)])
        yield "one long row among short ones", copies.ignoring(range(1, rows), keep=1), 0, None
        yield "one row without labels", batch.ignoring([0]), 0, None


def _without_a_unit(subject: ModelUnderAudit, record: Record) -> Iterator[tuple[float, str, float]]:
    """`_worst` of a batch of some units, as it is and with one unit's losses scaled by 1e3."""
    assert subject.units is not None
    mode: Any = subject.opacus("bk")
    batch, ids = subject.units
    tried = list(dict.fromkeys(ids))[:UNITS]
    rows = [row for row, own in enumerate(ids) if own in tried]
    batch, ids = batch.to(subject.dtype).take(rows), [ids[row] for row in rows]
    rest = [row for row, own in enumerate(ids) if own != ids[0]]
    for title, scale in (("one unit less", 1.0), ("one unit less, of losses scaled by 1e3", 1e3)):
        weights = torch.tensor(
            [scale if own == ids[0] else 1.0 for own in ids], dtype=subject.dtype
        )
        sides = []
        for part in (list(range(len(ids))), rest):
            own = [ids[row] for row in part]
            run = mode.run(batch.take(part), weights[part], own)
            norms = torch.stack(list(run.norms.values())).norm(dim=0) if run.norms else None
            if run.error or norms is None or not bool(norms.isfinite().all()):
                record.skip(f"bk, {title}: raises or is not finite ({run.error})")
                break
            sides.append(Side(_with_zeros(subject, run.rows), norms))
        else:
            yield _worst(sides[0], sides[1], title, subject.max_grad_norm)


def _sides(
    subject: ModelUnderAudit, modes: list[str], batch: Batch, weights: torch.Tensor | None
) -> dict[str, Side | None]:
    """The batch's rows in each mode; None where it raises or is not finite."""
    sides: dict[str, Side | None] = {}
    explicit: Gradients | None = None
    for mode in sorted(modes, key="ghost".__eq__):  # ghost last: it may use what another mode made
        run = subject.opacus(mode).run(batch, weights)
        rows, norms = run.rows, None
        if mode == "ghost":
            if run.norms.keys() == subject.parameters.keys():
                norms = torch.stack(list(run.norms.values())).norm(dim=0)
                # What the second pass weights: the gradient of each row's loss in the batch.
                rows = explicit if explicit is not None else _own_rows(subject, batch, weights)
        elif rows and len({len(g) for g in rows.values()}) == 1:
            norms = row_norms(rows)
            if mode == "bk":  # which has norms of its own, and clips by them
                norms = torch.stack(list(run.norms.values())).norm(dim=0)
                rows = _with_zeros(subject, rows)
            if mode in subject.exact_modes:
                explicit = rows
        sides[mode] = None
        if not run.error and norms is not None and bool(norms.isfinite().all()):
            sides[mode] = Side(rows, norms)
    return sides


def _with_zeros(subject: ModelUnderAudit, rows: Gradients) -> Gradients:
    """With zeros for the parameters that no row has a share of: branches that did not run."""
    count = len(next(iter(rows.values())))
    return {
        name: rows[name] if name in rows else p.new_zeros(count, *p.shape)
        for name, p in subject.parameters.items()
    }


def _own_rows(subject: ModelUnderAudit, batch: Batch, weights: torch.Tensor | None) -> Gradients:
    rows = subject.own_rows(batch)
    if weights is None:
        return rows
    return {n: torch.einsum("i,i...->i...", weights.to(g), g) for n, g in rows.items()}


def _worst(more: Side, fewer: Side, title: str, user_norm: float) -> tuple[float, str, float]:
    """(distance of the clipped sums in units of C, title, C), at its worst over C."""
    both = {name: torch.cat([more.rows[name], fewer.rows[name]]) for name in more.rows}
    products = gram(both)
    top = float(torch.cat([more.norms, fewer.norms]).max())
    typical = float(fewer.norms.median()) if len(fewer.norms) else top
    clips = {user_norm, *(f * top for f in SWEEP), *(f * typical for f in SWEEP)} - {0.0}
    worst = (0.0, title, user_norm)
    n = len(more.norms)
    for clip in sorted(clips):
        factors = clip_factors(torch.cat([more.norms, fewer.norms]), clip)
        signed = torch.cat([factors[:n], -factors[n:]]).to(products)
        distance = float((signed @ products @ signed).clamp(min=0).sqrt())
        single = float((factors.to(products) * products.diagonal().clamp(min=0).sqrt()).max())
        if single > clip * (1 + SLACK) and single >= distance:
            worst = max(worst, (single / clip, f"{title}: one row's contribution alone", clip))
        else:
            worst = max(worst, (distance / clip, title, clip))
    return worst
