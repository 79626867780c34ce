"""Edge cases: the batches that Poisson sampling and real data bring sooner or later."""

import torch

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import largest
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY, first_line
from dpzoo.auditing.record import Record
from dpzoo.modes import MODES


def edge_cases(subject: ModelUnderAudit, record: Record) -> None:
    """Batches of 0 and 1 rows, rows without labels, rows of zeros, and a row that is not finite.

    Catches: models that crash on the empty batches of Poisson sampling (skipping them breaks the
    accounting, and a crash tells that nobody was drawn), token means of no token (NaN), gradients
    that are NaN for an innocent row.
    """
    for mode in subject.modes:
        if not subject.usable(mode, record.skipped):
            continue
        if not MODES[mode].empty:
            record.skip(f"{mode}: torch's ExpandedWeights refuse empty batches")
            continue
        record.ran()
        _sizes(subject, record, mode)
    _innocent_rows(subject, record)
    if not subject.quick:
        _poisoned(subject, record)


def _sizes(subject: ModelUnderAudit, record: Record, mode: str) -> None:
    """Batches of 0 and 1."""
    empty, one = subject.batch.take([]), subject.batch.take([0])
    opacus = subject.opacus(mode)
    per_row = mode not in PER_ROW_LOSS_ONLY or subject.per_row_loss
    for title, batch in (("an empty batch", empty), ("a batch of one row", one)):
        try:
            if per_row:
                got = opacus.clipped_sum([batch], subject.max_grad_norm)
            else:
                run = opacus.run(batch)
                if run.error:
                    raise RuntimeError(run.error)
                got = run.norms
        except Exception as error:
            if mode == "bk" and batch.rows == 0:
                record.find(
                    "note",
                    f"the model raises on an empty batch: {first_line(error)}",
                    "Poisson sampling draws such batches, with probability exp(-expected rows). bk takes "
                    "the step without the model: skip the forward and the backward pass, and still call "
                    "optimizer.step(). DPTrainer does so",
                    mode=mode,
                )
                continue
            record.find(
                "crash",
                f"{mode} mode raises on {title}: {first_line(error)}",
                "Poisson sampling draws such batches; the step must run and add noise. For an empty "
                "batch: no reshape(-1) over no elements, no mean over no rows (sum / max(rows, 1)). "
                "Where a library's layer raises (Opacus' norm sampler of nn.Embedding does), "
                "make_private(rand_on_empty=True) puts a random row in its place",
                mode=mode,
                expected="a step",
                got="an exception",
            )
            continue
        size = largest(got)
        if batch.rows == 0 and size != 0:
            record.find(
                "privacy",
                f"{mode} mode's sum over an empty batch is not zero",
                "reduce with sum / max(rows, 1): a mean over no rows is NaN",
                mode=mode,
                expected="0",
                got=f"{size:.3g}",
            )
        elif not size < float("inf"):
            record.find("privacy", f"{mode} mode's step on {title} is not finite", mode=mode)


def _innocent_rows(subject: ModelUnderAudit, record: Record) -> None:
    """Rows that are usual in data have finite gradients; a row that has not would ruin the sum."""
    trials: list[tuple[str, Batch, str]] = []
    if subject.batch.token_labels(sure=True):
        trials.append(
            (
                "all its labels are ignored",
                subject.batch.ignoring([0]),
                "a row's loss is the sum over its labelled tokens / max(their number, 1)",
            )
        )
    if subject.batch.floats():
        trials.append(
            (
                "its values are 0",
                subject.batch.scaled([0], 0.0),
                "add an eps under roots, norms and logarithms",
            )
        )
    for title, batch, remedy in trials:
        row = batch.take([0])
        try:
            gradient = subject.total_gradient(row)
        except Exception as error:
            record.find("crash", f"a row raises if {title}: {first_line(error)}", remedy)
            continue
        record.ran()
        bad = [name for name, g in gradient.items() if not bool(g.isfinite().all())]
        if bad:
            left_out = all(MODES[mode].own for mode in subject.modes)
            record.find(
                "note" if left_out else "privacy",
                f"a row's gradient is not finite if {title}: "
                + (
                    "bk leaves the row out and counts it, and nothing is learnt from it"
                    if left_out
                    else "its clip factor is NaN, all weights turn NaN, and that tells that the row "
                    "was there"
                ),
                remedy,
                parameters=bad,
                expected="a finite gradient",
                got="NaN or Inf",
            )


def _poisoned(subject: ModelUnderAudit, record: Record) -> None:
    """What a step makes of a row whose gradient is NaN; Opacus' does not leave it out, bk does."""
    spread = []
    for mode in subject.modes:
        if mode == "ew" or subject.broken(mode) or not subject.per_row_loss:
            continue
        weights = torch.ones(subject.rows, dtype=subject.dtype)
        weights[0] = float("nan")
        run = subject.opacus(mode).run(subject.batch, weights)
        subject.opacus(mode).discard()
        values = run.values
        if run.error or not values:
            continue
        record.ran()
        own = MODES[mode].own
        first = 0 if own else 1
        healthy = [bool(v[first:].isfinite().all()) for v in values.values()]
        if not all(healthy):
            names = [n for n, ok in zip(values, healthy, strict=True) if not ok]
            record.find(
                "privacy",
                "a NaN in one row's loss makes other rows' gradients NaN"
                + (", or is not left out of the sum" if own else ""),
                "rows meet somewhere; see isolation",
                parameters=names,
                mode=mode,
            )
        if not own:
            spread.append(mode)
    if spread:
        record.find(
            "note",
            "Opacus adds a row whose gradient is NaN or Inf to the sum, and all weights become NaN",
            "leave such rows out before the step (their clip factor is 0), and count them",
        )
