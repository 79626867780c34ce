"""Isolation: does a row's gradient depend on the other rows?"""

from collections.abc import Iterator

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.numerics import Gradients, disagreements
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.record import Record
from dpzoo.auditing.subject import CannotRunError, Subject

REMEDY = (
    "let nothing reduce over the batch dimension: GroupNorm or LayerNorm for batch statistics, a loss "
    "reduced over each row's own tokens (a row's loss, then the mean), no batch-wide normaliser"
)

TOGETHER = "run together with the other rows"


def isolation(subject: Subject, record: Record) -> None:
    """A row's gradient is unchanged when other rows change in content, labels, padding or number.

    Catches: batch norm, in-batch means and negatives, token-mean losses (transformers' own on
    labels with -100), num_items_in_batch, mixture-of-experts balance losses. It needs no Opacus:
    plain autograd, the row in the batch against the row alone, and the sum with the row against the
    sum without it.
    """
    try:
        oracle = subject.oracle
    except CannotRunError as error:
        record.find(
            "privacy",
            f"{error}: its gradient exists only together with other rows",
            REMEDY,
            expected="a batch of one row to run",
            got="an exception",
        )
        return
    record.ran()
    last = subject.rows - 1
    trials = [(0, *variant) for variant in _variants(subject, 0)]
    trials.insert(1, (last, TOGETHER, subject.batch, last))
    for row, title, batch, place in trials:
        truth = {name: rows[row] for name, rows in oracle.items()}
        if _compare(subject, record, title, batch, place, truth):
            return  # one way in which it depends is enough to be named
    _padding(subject, record)


def _variants(subject: Subject, row: int) -> Iterator[tuple[str, Batch, int]]:
    """(what changed, the batch, where the row is in it)."""
    batch, rows = subject.batch, subject.rows
    yield TOGETHER, batch, row
    others = [i for i in range(rows) if i != row]
    if batch.token_labels():
        yield "other rows have fewer labels", batch.ignoring(others, keep=1), row
    yield "there are fewer other rows", batch.take([row, others[0]]), 0
    copies = batch.take([others[0], row, *[others[0]] * (rows - 2)])
    yield "other rows have other content", copies.scaled([0, *range(2, rows)], 1.5), 1


def _compare(
    subject: Subject, record: Record, title: str, batch: Batch, place: int, truth: Gradients
) -> bool:
    """Compare a row in a batch with the row alone; whether it differs."""
    try:
        with_row = subject.total_gradient(batch)
        without = subject.total_gradient(batch.without(place))
        own = None
        if subject.per_row_loss:
            own = subject.gradient(subject.loss(subject.model, batch)[place])
    except Exception as error:
        record.find("crash", f"with {title}, the model raises: {first_line(error)}", REMEDY)
        return True
    influence = {name: with_row[name] - without[name] for name in truth}
    # The difference of two sums is rounded like the sums.
    wanted = {name: without[name] + truth[name] for name in truth}
    for got, right, message in (
        (own, truth, "a row's gradient depends on other rows"),
        (with_row, wanted, "a row changes the gradients of other rows"),
    ):
        wrong = disagreements(got, right, subject.tolerance) if got is not None else {}
        if wrong:
            name = next(iter(wrong))
            change = own[name] if got is own and own is not None else influence[name]
            loss = (
                ""
                if subject.per_row_loss
                else (
                    " The loss is a scalar that is not the mean of the rows' losses (a token mean?)."
                )
            )
            record.find(
                "privacy",
                f"{message} ({title}).{loss}",
                REMEDY,
                parameters=wrong,
                modules=subject.owners(wrong),
                expected=f"row alone: gradient of norm {float(truth[name].norm()):.4g} in {name}",
                got=f"in the batch: {float(change.norm()):.4g}, off by {wrong[name]:.3g}",
            )
            return True
    return False


def _padding(subject: Subject, record: Record) -> None:
    """Padding all rows further leaves a row's gradient as it is."""
    pad_id = getattr(getattr(subject.model, "config", None), "pad_token_id", None) or 0
    padded = subject.batch.padded(pad_id)
    if padded is None or subject.loss.source == "outputs":
        return  # a function of all outputs sees those at padding too
    try:
        got = subject.total_gradient(padded)
    except Exception as error:
        record.skip(f"further padding: {first_line(error)}")
        return
    truth = {name: rows.sum(0) for name, rows in subject.oracle.items()}
    wrong = disagreements(got, truth, subject.tolerance)
    if wrong:
        record.find(
            "note",
            "the loss depends on how far the rows are padded; if a collator pads to the longest row of "
            "the batch, a row's gradient depends on the others' lengths",
            "pad every batch to one fixed length (padding='max_length')",
            parameters=wrong,
            expected=f"relative error below {subject.tolerance:g}",
            got=f"{next(iter(wrong.values())):.3g} for {next(iter(wrong))}",
        )
