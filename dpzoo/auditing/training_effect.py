"""Training effect: does a step train the model that is used afterwards?"""

import copy

import torch

from dpzoo.auditing.book_keeping import mode_around
from dpzoo.auditing.exactness import step_modes
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import largest
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.record import Record
from dpzoo.conversion import to_transformers
from dpzoo.errors import UnsupportedModelError

LEARNING_RATE = 0.1


def training_effect(subject: ModelUnderAudit, record: Record) -> None:
    """After one real step the weights moved, are finite, and matter; an exported model agrees.

    The step has no noise, so that what moves is what the data moves, and runs in the model's own
    dtype. Where dpzoo can turn the model into the stock transformers class, that one's loss on the
    same row is compared.

    Catches: weights that never move (detached copies, steps lost in a narrow dtype), losses
    computed from other weights than those trained, exports that are another function.
    """
    for mode in step_modes(subject, record):
        record.ran()
        _step(subject, record, mode)
    _export(subject, record)


def _step(subject: ModelUnderAudit, record: Record, mode: str) -> None:
    opacus = mode_around(lambda: subject.fresh_copy(), mode, subject.loss)
    batch = subject.given_batch
    try:
        before = {name: p.detach().clone() for name, p in opacus.parameters.items()}
        optimizer = opacus.optimizer(subject.max_grad_norm, subject.rows, lr=LEARNING_RATE)
        with torch.no_grad():
            loss = opacus.losses(batch).double()
        opacus.private_backward(batch, optimizer)
        optimizer.step()
        after = {name: p.detach() for name, p in opacus.parameters.items()}
        opacus.clear()
        with torch.no_grad():
            new_loss = opacus.losses(batch).double()
    except Exception as error:
        record.find("crash", f"{mode} mode raises in a step: {first_line(error)}", mode=mode)
        return
    bad = [name for name, p in after.items() if not bool(p.isfinite().all())]
    if bad:
        record.find(
            "privacy",
            "weights are NaN or Inf after one step",
            "find the row with a gradient that is not finite (see edge_cases)",
            parameters=bad,
            mode=mode,
        )
        return
    truth = {name: p.sum(0) for name, p in subject.oracle.items()}
    floor = 1e-7 * largest(truth)  # a gradient that vanishes moves nothing, and need not
    still = [
        name
        for name, p in after.items()
        if torch.equal(p, before[name]) and float(truth[name].abs().max()) > floor
    ]
    if still:
        record.find(
            "utility",
            "weights do not move in a step, though the loss depends on them",
            "check that the optimizer holds the model's own parameters (move to the device before "
            "adapters are added), and that their dtype resolves the step",
            parameters=still,
            mode=mode,
            expected="a change",
            got="none",
        )
    # To first order the mean loss changes by the gradient times the step; where that is large enough
    # for the dtype to show, the loss has to follow.
    moves = {name: (after[name] - before[name]).to(truth[name]) for name in truth}
    predicted = sum(float((truth[n] * moves[n]).sum()) for n in truth) / subject.rows
    changed = float((new_loss - loss).mean())
    visible = 100 * torch.finfo(next(iter(after.values())).dtype).eps
    if abs(predicted) > visible * float(loss.abs().mean()) and abs(changed) < 0.01 * abs(predicted):
        record.find(
            "utility",
            "the weights moved and the loss did not follow: it is computed from other weights (a cached "
            "or merged copy?)",
            "compute the forward pass from the parameters themselves",
            mode=mode,
            expected=f"a change of the loss of about {predicted:.3g}",
            got=f"{changed:.3g}",
        )


def _export(subject: ModelUnderAudit, record: Record) -> None:
    """The stock model that a dpzoo model saves as computes the same losses."""
    if subject.user_loss is not None:
        return
    try:
        stock = to_transformers(copy.deepcopy(subject.model))
    except UnsupportedModelError:
        return
    except Exception as error:
        record.find("crash", f"the model cannot be exported: {first_line(error)}")
        return
    stock.train(subject.model.training)
    differences = []
    with torch.no_grad():
        for i in range(subject.rows):
            # Without padding, over which the softmax of a stock answer runs, and dpzoo's does not.
            row = subject.batch.take([i]).trimmed()
            ours, theirs = subject.loss.total(subject.model, row), subject.loss.total(stock, row)
            if bool(theirs.isfinite().all()):  # transformers' mean over no label is NaN
                differences.append(float((ours - theirs).abs() / theirs.abs().clamp(min=1.0)))
    if differences:
        record.measure(max(differences))
    if differences and max(differences) > subject.tolerance:
        record.find(
            "utility",
            "the exported stock model computes another loss",
            "report this: dpzoo's conversion is at fault",
            expected=f"relative error below {subject.tolerance:g}",
            got=f"{max(differences):.3g}",
        )
