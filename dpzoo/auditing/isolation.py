"""Isolation: does a row's gradient depend on the other rows?"""

from collections.abc import Iterator

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.model_under_audit import CannotRunError, ModelUnderAudit
from dpzoo.auditing.numerics import Gradients
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.record import Record

REMEDY = (
    "let nothing reduce over the batch dimension: GroupNorm or LayerNorm for batch statistics, a loss "
    "reduced over each row's own tokens (a row's loss, then the mean), no batch-wide normaliser"
)

MANY = 16

TOGETHER = "run together with the other rows"


def isolation(subject: ModelUnderAudit, record: Record) -> None:
    """A row's gradient is unchanged when other rows change in content, labels, padding or number.

    Catches: batch norm, in-batch means and negatives, token-mean losses (transformers' own on
    labels with -100), num_items_in_batch, mixture-of-experts balance losses and capacities. It needs no
    Opacus: plain autograd, the row in the batch against the row alone, and the sum with the row against
    the sum without it.
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
    if not subject.quick:
        trials.insert(1, (last, TOGETHER, subject.batch, last))
    for row, title, batch, place in trials:
        truth = {name: rows[row] for name, rows in oracle.items()}
        if _compare(subject, record, title, batch, place, truth):
            return  # one way in which it depends is enough to be named


def _variants(subject: ModelUnderAudit, row: int) -> Iterator[tuple[str, Batch, int]]:
    """(what changed, the batch, where the row is in it)."""
    batch, rows = subject.batch, subject.rows
    yield TOGETHER, batch, row
    others = [i for i in range(rows) if i != row]
    if batch.token_labels():
        yield "other rows have fewer labels", batch.ignoring(others, keep=1), row
    if batch.masks():
        yield "other rows are shorter", batch.shorter(others), row
    yield "there are fewer other rows", batch.take([row, others[0]]), 0
    if not subject.quick:
        # All alike and before it: what has room for so many tokens (an expert) is full of them.
        many = batch.take([others[0]] * MANY + [row])
        yield f"there are {MANY} other rows", many, MANY
    copies = batch.take([others[0], row, *[others[0]] * (rows - 2)])
    yield "other rows have other content", copies.scaled([0, *range(2, rows)], 1.5), 1


def _compare(
    subject: ModelUnderAudit, record: Record, title: str, batch: Batch, place: int, truth: Gradients
) -> bool:
    """Compare a row in a batch with the row alone; whether it differs."""
    try:
        with_row = subject.total_gradient(batch)
        if batch is subject.batch:  # the others alone
            rest = [i for i in range(batch.rows) if i != place]
            without = {name: rows[rest].sum(0) for name, rows in subject.oracle.items()}
        else:
            without = subject.total_gradient(batch.without(place))
        own = None
        if subject.per_row_loss and not subject.quick:
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
        wrong = record.differ(got, right, subject.tolerance) if got is not None else {}
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
                expected=f"row alone: gradient of norm {float(truth[name].norm()):.4g} in {name}",
                got=f"in the batch: {float(change.norm()):.4g}, off by {wrong[name]:.3g}",
            )
            return True
    return False
