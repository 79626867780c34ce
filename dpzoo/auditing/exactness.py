"""Exactness, the clipped sum, microbatching: does every way to compute it give the row's own gradient?"""

import torch

from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import (
    Gradients,
    clip_and_sum,
    clip_factors,
    disagreements,
    row_norms,
)
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY, first_line
from dpzoo.auditing.record import Record
from dpzoo.modes import MODES


def exactness(subject: ModelUnderAudit, record: Record) -> None:
    """Per row and per parameter, each mode gives the gradient (in ghost mode, norm) of the row alone.

    In bk the gradient is the row's own share of the sum, all rows run together, and the norms that
    clip factors are made from are compared with the shares.

    Catches: a wrong batch axis with as many rows as tokens, where sums agree and rows do not; tied
    weights with one use missing from the norm; grad samplers that are wrong.
    """
    oracle = subject.oracle
    for mode in subject.modes:
        if not subject.usable(mode, record.skipped):
            continue
        record.ran()
        if MODES[mode].rows:
            _rows(subject, record, mode, oracle)
        if MODES[mode].norms:
            summed = subject.mode_run(mode).rows if MODES[mode].rows else oracle
            _norms(subject, record, mode, summed)


def _rows(subject: ModelUnderAudit, record: Record, mode: str, oracle: Gradients) -> None:
    rows = subject.mode_run(mode).rows
    wrong = record.differ(rows, oracle, subject.tolerance)
    if not wrong:
        return
    sums = {name: rows[name].sum(0) for name in wrong}
    truth = {name: oracle[name].sum(0) for name in oracle}
    lost = disagreements(sums, truth, subject.tolerance)
    for names, severity, message in (
        (
            [n for n in wrong if n not in lost],
            "privacy",
            "the sum over rows is right and the rows are not: what is clipped is not a row's gradient",
        ),
        (
            [n for n in wrong if n in lost],
            "utility",
            "per-sample gradients differ from those of the rows run alone",
        ),
    ):
        if names:
            record.find(
                severity,  # type: ignore[arg-type]
                f"{message} (worst row {_worst_row(rows[names[0]], oracle[names[0]])})",
                "see coverage and isolation for the cause; else the module's grad sampler is wrong",
                parameters=names,
                mode=mode,
                expected=f"relative error below {subject.tolerance:g}",
                got=f"{wrong[names[0]]:.3g} for {names[0]}",
            )


def _worst_row(got: torch.Tensor, wanted: torch.Tensor) -> int:
    return int((got - wanted).abs().reshape(len(got), -1).max(1).values.argmax())


def _norms(subject: ModelUnderAudit, record: Record, mode: str, truth: Gradients) -> None:
    """The norms that a mode clips by are those of what it adds up: ``truth``."""
    got = subject.mode_run(mode).norms
    wanted = {name: rows.reshape(len(rows), -1).norm(dim=1) for name, rows in truth.items()}
    wrong = record.differ(got, wanted, subject.tolerance)
    short = [n for n in wrong if not bool((got[n] >= wanted[n] * (1 - subject.tolerance)).all())]
    for names, severity, message in (
        (
            short,
            "privacy",
            f"{mode} mode's norms are smaller than the rows' true norms: rows are "
            "clipped too little (a use of the weight that no hook sees?)",
        ),
        (
            [n for n in wrong if n not in short],
            "utility",
            f"{mode} mode's norms are larger than the rows' true norms: rows are clipped too much",
        ),
    ):
        if names:
            name = names[0]
            row = int((got[name] - wanted[name]).abs().argmax())
            record.find(
                severity,  # type: ignore[arg-type]
                message,
                "use each parameter through the forward of a module; for a tied head, hooks mode or "
                "dpzoo.convert(model)",
                parameters=names,
                mode=mode,
                expected=f"norm {float(wanted[name][row]):.4g} of {name}, row {row}",
                got=f"{float(got[name][row]):.4g}",
            )


def _middle(subject: ModelUnderAudit) -> float:
    """A clipping norm that clips some rows and leaves others."""
    return max(float(subject.norms.median()), 1e-12)


def step_modes(subject: ModelUnderAudit, record: Record) -> list[str]:
    """The modes that can take a step; why others cannot is written down."""
    modes = []
    for mode in subject.modes:
        if mode in PER_ROW_LOSS_ONLY and not subject.per_row_loss:
            record.skip(PER_ROW_LOSS_ONLY[mode])
            continue
        if subject.usable(mode, record.skipped):
            modes.append(mode)
    return modes


def clipped_sum(subject: ModelUnderAudit, record: Record) -> None:
    """A noiseless Opacus step sums up the same in every mode: the rows' true gradients, clipped.

    Catches: a mode whose norms and sums belong to different gradients, second passes that drop a
    part, clip factors applied to the wrong rows.
    """
    clip = _middle(subject)
    wanted = clip_and_sum(subject.oracle, clip_factors(subject.norms, clip))
    for mode in step_modes(subject, record):
        record.ran()
        try:
            got = subject.opacus(mode).clipped_sum([subject.batch], clip)
        except Exception as error:
            record.find("crash", f"{mode} mode raises in a step: {first_line(error)}", mode=mode)
            continue
        wrong = record.differ(got, wanted, subject.tolerance)
        if wrong:
            length = float(row_norms({n: g[None] for n, g in got.items()})[0])
            truth = float(row_norms({n: g[None] for n, g in wanted.items()})[0])
            record.find(
                "privacy",
                "the clipped sum of a step is not that of the rows' true gradients",
                "see exactness and isolation for the cause; train in a mode that passes",
                parameters=wrong,
                mode=mode,
                expected=f"a sum of norm {truth:.4g}",
                got=f"norm {length:.4g}, off by {next(iter(wrong.values())):.3g} in {next(iter(wrong))}",
            )


def microbatching(subject: ModelUnderAudit, record: Record) -> None:
    """Physical batches of 1, 2, 3 and all rows of one logical batch give one sum.

    Catches: losses and layers that depend on the physical batch (token means, batch statistics,
    num_items_in_batch), and modes that keep the last physical batch only.
    """
    clip = _middle(subject) if subject.rows else 1.0
    for mode in step_modes(subject, record):
        opacus = subject.opacus(mode)
        record.ran()
        try:
            whole = opacus.clipped_sum([subject.batch], clip)
            for size in sorted({1, 2, 3} - {subject.rows}):
                starts = range(0, subject.rows, size)
                parts = [subject.batch.take(range(s, min(s + size, subject.rows))) for s in starts]
                wrong = record.differ(opacus.clipped_sum(parts, clip), whole, subject.tolerance)
                if wrong:
                    record.find(
                        "privacy",
                        f"physical batches of {size} give another sum than one of {subject.rows}: a "
                        f"row's contribution depends on the rows it is computed with",
                        "reduce the loss over each row's own tokens; see isolation for the cause",
                        parameters=wrong,
                        mode=mode,
                        expected=f"relative error below {subject.tolerance:g}",
                        got=f"{next(iter(wrong.values())):.3g} for {next(iter(wrong))}",
                    )
                    break
        except Exception as error:
            record.find(
                "crash", f"{mode} mode raises on physical batches: {first_line(error)}", mode=mode
            )
