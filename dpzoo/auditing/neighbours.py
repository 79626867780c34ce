"""Neighbours: the batch as given, with a row and without it."""

from collections.abc import Iterator

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.exactness import step_modes
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import Gradients, clip_factors, row_norms
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.record import Record
from dpzoo.auditing.sensitivity import SLACK

MEMORY = 2e9
"""Bytes of per-sample gradients beyond which a mode of Opacus is left out."""

REMEDY = (
    "let nothing that a row computes depend on the other rows: on their content, their number or how far "
    "they are padded"
)


def neighbours(subject: ModelUnderAudit, record: Record) -> None:
    """A row taken out of the batch as given: the others' gradients stay, and the sum moves by its own.

    The batch has its own size and padding here, up to 64 rows of it; padding is kept, and made again as
    a collator would. Two gradients for each row that is taken out; then, in each mode, two clipped
    sums, at the clipping norm of the training and at one that clips every row.

    Catches: mixing that depends on the batch's size (an expert's capacity), wrong axes where rows are as
    many as tokens, heads that read the last position, whatever it holds, and losses over padding.
    """
    batch = subject.whole
    if batch.rows < 2:
        record.skip("the batch has one row")
        return
    record.ran()
    total = subject.total_gradient(batch)
    chosen = _chosen(subject, batch)
    own: dict[int, Gradients] = {}
    for row in chosen:
        try:
            own[row] = subject.alone(batch, row)
        except Exception as error:
            record.skip(f"a row cannot run alone ({first_line(error)}; see isolation)")
            return
        try:
            for title, rest in _rests(subject, batch, row):
                wanted = {name: total[name] - own[row][name] for name in total}
                if _differ(subject, record, title, row, subject.total_gradient(rest), wanted):
                    return
        except Exception as error:
            record.find(
                "crash", f"without row {row}, the model raises: {first_line(error)}", REMEDY
            )
            return
    _padding(subject, record, batch, own)
    for mode in step_modes(subject, record):
        _clipped(subject, record, mode, batch, own)


def _chosen(subject: ModelUnderAudit, batch: Batch) -> list[int]:
    """The first row, the last and the longest; one in a quick audit."""
    mask = batch.tensors().get("attention_mask")
    longest = 0 if mask is None else int(mask.reshape(batch.rows, -1).sum(1).argmax())
    return list(dict.fromkeys((longest, 0, batch.rows - 1)))[: 1 if subject.quick else 3]


def _rests(subject: ModelUnderAudit, batch: Batch, row: int) -> Iterator[tuple[str, Batch]]:
    rest = batch.without(row)
    yield "", rest
    trimmed = rest.trimmed()
    pairs = zip(rest.tensors().values(), trimmed.tensors().values(), strict=True)
    # A function of all outputs sees those at padding too.
    if subject.loss.source != "outputs" and any(a.shape != b.shape for a, b in pairs):
        yield ", and the others are padded to the longest of them", trimmed


def _differ(
    subject: ModelUnderAudit,
    record: Record,
    title: str,
    row: int,
    got: Gradients,
    wanted: Gradients,
) -> bool:
    wrong = record.differ(got, wanted, subject.tolerance)
    if wrong:
        name = next(iter(wrong))
        record.find(
            "privacy",
            f"the other rows' gradients change where row {row} is taken out of the batch{title}",
            REMEDY,
            parameters=wrong,
            expected=f"relative error below {subject.tolerance:g}",
            got=f"{wrong[name]:.3g} for {name}",
        )
    return bool(wrong)


def _padding(
    subject: ModelUnderAudit, record: Record, batch: Batch, own: dict[int, Gradients]
) -> None:
    """How far a row is padded leaves its gradient as it is."""
    if subject.loss.source == "outputs":
        return
    pad_id = getattr(getattr(subject.model, "config", None), "pad_token_id", None) or 0
    for row, wanted in own.items():
        alone = batch.take([row])
        for title, other in (("less", alone.trimmed()), ("further", alone.padded(pad_id))):
            if other is None:
                return
            try:
                got = subject.total_gradient(other)
            except Exception as error:
                record.skip(f"padded {title}: {first_line(error)}")
                continue
            wrong = record.differ(got, wanted, subject.tolerance)
            if not wrong:
                continue
            longest = batch.fills_its_length()
            record.find(
                "privacy" if longest else "note",
                f"a row's gradient depends on how far it is padded (row {row}, {title}), "
                + (
                    "and the batch is padded to its longest row: who else is drawn changes it"
                    if longest
                    else "which depends on the other rows where a collator pads to the longest"
                ),
                "mask what is padding; or pad every batch to one fixed length (padding='max_length')",
                parameters=wrong,
                expected=f"relative error below {subject.tolerance:g}",
                got=f"{next(iter(wrong.values())):.3g} for {next(iter(wrong))}",
            )
            return


def _clipped(
    subject: ModelUnderAudit, record: Record, mode: str, batch: Batch, own: dict[int, Gradients]
) -> None:
    """What a row moves the clipped sum by is its own gradient, clipped."""
    size = batch.rows * sum(p.numel() * p.element_size() for p in subject.parameters.values())
    if mode not in ("ghost", "bk") and size > MEMORY:
        record.skip(f"{mode}: {batch.rows} per-sample gradients take {size / 1e9:.0f} GB")
        return
    opacus = subject.opacus(mode)
    norms = {row: row_norms({n: g[None] for n, g in rows.items()}) for row, rows in own.items()}
    first = list(own)[:1]
    clips = {0.7 * min(float(norm) for norm in norms.values()): list(own)}
    if not subject.quick:
        clips.setdefault(subject.max_grad_norm, first)
    for clip, chosen in clips.items():
        try:
            if not clip > 0:
                continue
            whole = opacus.clipped_sum([batch], clip)
            for row in chosen:
                rows = own[row]
                rest = opacus.clipped_sum([batch.without(row)], clip)
                moved = {name: whole[name] - rest[name] for name in whole}
                ratio = float(row_norms({n: g[None] for n, g in moved.items()})) / clip
                record.measure(ratio, "C")
                factor = clip_factors(norms[row], clip)
                share = {name: rest[name] + factor.to(g) * g for name, g in rows.items()}
                wrong = record.differ(whole, share, subject.tolerance)
                if not (wrong or ratio > 1 + SLACK):
                    continue
                record.find(
                    "privacy",
                    f"row {row} moves the clipped sum of the batch by more than the clipping norm"
                    if ratio > 1 + SLACK
                    else f"what row {row} moves the clipped sum of the batch by is not its own gradient",
                    "see exactness, privacy_unit and isolation for the cause; train in a mode that passes",
                    parameters=wrong,
                    mode=mode,
                    expected=f"at most {clip:.4g} (C)",
                    got=f"{ratio:.4g} times C",
                )
                return
        except Exception as error:
            record.find(
                "crash",
                f"{mode} mode raises on the batch as given: {first_line(error)}",
                "see the error; the other checks run on fewer rows",
                mode=mode,
            )
            return
