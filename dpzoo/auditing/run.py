"""`dpzoo.audit`: what one batch proves about a model's private training."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpzoo.auditing.check_names import current_name
from dpzoo.auditing.coverage import coverage, privacy_unit, shapes
from dpzoo.auditing.edge_cases import edge_cases
from dpzoo.auditing.exactness import clipped_sum, exactness, microbatching
from dpzoo.auditing.isolation import isolation
from dpzoo.auditing.model_under_audit import CannotRunError, ModelUnderAudit
from dpzoo.auditing.neighbours import neighbours
from dpzoo.auditing.noise import noise
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.own_batch import batch_of
from dpzoo.auditing.randomness import kept_states
from dpzoo.auditing.record import Record
from dpzoo.auditing.report import AuditReport
from dpzoo.auditing.row_losses import Loss, losses_of_head
from dpzoo.auditing.sensitivity import sensitivity
from dpzoo.auditing.stale_state import stale_state
from dpzoo.auditing.statelessness import statelessness
from dpzoo.auditing.training_effect import training_effect
from dpzoo.errors import InputError
from dpzoo.modes import MODES

Check = Callable[[ModelUnderAudit, Record], None]

CHECKS: dict[str, Check] = {
    "coverage": coverage,
    "privacy_unit": privacy_unit,
    "exactness": exactness,
    "isolation": isolation,
    "statelessness": statelessness,
    "neighbours": neighbours,
    "sensitivity": sensitivity,
    "clipped_sum": clipped_sum,
    "microbatching": microbatching,
    "edge_cases": edge_cases,
    "stale_state": stale_state,
    "noise": noise,
    "training_effect": training_effect,
}
"""Check name -> the check, in the order in which they run; each one's docstring says what it catches."""


COMPARING = (
    "exactness", "isolation", "neighbours", "sensitivity", "clipped_sum", "microbatching", "stale_state",
    "training_effect",
)  # fmt: skip
"""Checks that compare runs. They are skipped for a model that stays random with fixed draws."""

DEFAULT_MODES = ("hooks", "ghost", "bk")

QUICK = ("coverage", "exactness", "isolation", "statelessness", "neighbours", "edge_cases", "noise")
"""The checks of a quick audit, which is in mode "bk"."""


def audit(
    model: nn.Module,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    max_grad_norm: float = 1.0,
    modes: Iterable[str] | None = None,
    checks: Iterable[str] | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
    unit_ids: Any = None,
) -> AuditReport:
    """Prove that a model's private training is right on a batch, or name what is wrong.

    Works on any module: dpzoo's, a stock transformers model, the user's own. Everything runs on deep copies
    in float64, in train mode with dropout off (submodules that are in eval mode stay there, if the model
    itself is in train mode); per-sample gradients come from unmodified Opacus, in mode "bk" from dpzoo's
    engine, and are compared, per row and per parameter, with each row run alone under plain autograd. If a
    model is still random (stochastic depth, a variational encoder), its draws are replaced by constants,
    and a remark says so.

    Args:
        model: a module before `make_private`, on any device.
        batch: a dict of keyword arguments or a tuple of positional ones; tensors have the rows
            first. Most checks run on 3 to 5 of its rows, their number unlike its other dimensions. By
            default, for a transformers model, a batch made from its config.
        loss: maps (model, batch) to per-row losses, (rows,), or to a scalar that is taken for their
            mean. By default the model's own: its outputs' ``loss_per_sample``, else their ``loss``,
            else a fixed nonlinear function of each row's outputs. Mode "bk" cannot train on a scalar: for
            a stock transformers model, it is audited with `dpzoo.ModelLoss`.
        max_grad_norm: the clipping norm that training will use; others are tried beside it.
        modes: grad_sample_modes to audit: of "hooks", "functorch", "ew", "ghost", "bk"; by default hooks,
            ghost and bk.
        checks: names of `dpzoo.auditing.CHECKS`; all of them by default.
        quick: by default fewer: the checks `dpzoo.auditing.run.QUICK`, mode "bk", 3 rows. A remark of the
            report says so.
        progress: called with the name of each check before it runs.
        unit_ids: the ids of the units that the batch's rows are of, (rows,), as `make_private` takes them
            in mode "bk": the sensitivity check then takes away a whole unit, too. The first four are tried.

    Returns:
        The report. ``report.ok`` is the verdict: False for a finding of severity privacy, crash or
        utility, and where no check could run. ``report.raise_if_failed()`` raises in the same cases.

    Raises:
        InputError: a wrapped model, one that cannot be copied, no trainable parameter, a batch that
            does not run, an unknown mode or check. What raises inside Opacus is a finding.

    Guarantees:
        The model is bit-equal afterwards: parameters, buffers, gradients, hooks, attributes of
        parameters, train flags; so are torch's, numpy's and Python's random states.
    """
    modes, names = chosen(modes, checks, quick)
    _refuse(model, max_grad_norm)
    if unit_ids is not None and "bk" not in modes:
        raise InputError(
            f"audit got unit_ids and modes={modes}, wanted 'bk' among the modes: it alone clips the rows "
            f"of a unit as one."
        )
    start = time.perf_counter()
    with _quietly(model):
        if batch is None:
            batch = batch_of(model)

        def subject(modes: tuple[str, ...], loss: Loss | None) -> ModelUnderAudit:
            return ModelUnderAudit(
                model,
                batch,
                loss=loss,
                max_grad_norm=max_grad_norm,
                modes=modes,
                quick=quick,
                unit_ids=unit_ids if "bk" in modes else None,
            )

        subjects = [subject(modes, loss)]
        of_head = None
        if "bk" in modes and subjects[0].loss.source == "loss" and not subjects[0].per_row_loss:
            of_head = losses_of_head(model)
        if of_head is not None:
            others = tuple(mode for mode in modes if mode != "bk")
            subjects = [subject(others, None)] if others else []
            subjects.append(subject(("bk",), of_head))
            subjects[0].remarks.append("bk: the losses are dpzoo.ModelLoss(model)'s, row by row")
        if quick:
            left_out = [name for name in CHECKS if name not in names]
            subjects[0].remarks.append(f"a quick audit, without {', '.join(left_out) or 'nothing'}")
        return _report(subjects, modes, names, start, progress)


def _report(
    subjects: Sequence[ModelUnderAudit],
    modes: tuple[str, ...],
    names: Iterable[str],
    start: float,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    first = subjects[0]
    report = AuditReport(
        model=type(first.original).__name__,
        rows=first.rows,
        modes=modes,
        dtype=str(first.dtype).removeprefix("torch."),
        remarks=first.remarks,
    )
    for name in names:
        if progress is not None:
            progress(name)
        check, record, begun = CHECKS[name], Record(name), time.perf_counter()
        for subject in subjects:
            record.owners = subject.owners
            try:
                if subject.random and name in COMPARING:
                    raise CannotRunError(subject.random)
                check(subject, record)
            except CannotRunError as error:
                record.skip(str(error))
            except Exception as error:
                record.find("crash", f"the check could not finish: {first_line(error)}")
        report.results.append(record.result(catches(check), time.perf_counter() - begun))
    try:
        report.shapes = shapes(first)
    except Exception as error:
        report.remarks.append(f"no shapes: {first_line(error)}")
    report.seconds = time.perf_counter() - start
    return report


def catches(check: Check) -> str:
    """The bugs that a check is there for, from its docstring."""
    text = " ".join((check.__doc__ or "").split())
    return text.partition("Catches: ")[2]


def chosen(
    modes: Iterable[str] | None, checks: Iterable[str] | None, quick: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modes and checks of an audit.

    Raises:
        InputError: one is not known.
    """
    if modes is None:
        modes = ("bk",) if quick else DEFAULT_MODES
    if checks is None:
        checks = QUICK if quick else CHECKS
    elif isinstance(checks, str):
        checks = current_name(checks)
    else:
        checks = [current_name(name) for name in checks]
    return _known("modes", modes, tuple(MODES)), _known("checks", checks, tuple(CHECKS))


def _known(what: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"audit got {what} {unknown or 'that are empty'}, wanted some of: {', '.join(known)}."
        )
    return names


def _refuse(model: nn.Module, max_grad_norm: float) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"audit got {type(model).__name__}, wanted a torch.nn.Module.")
    if type(model).__module__.startswith("opacus.") and hasattr(model, "_module"):
        raise InputError(
            f"audit got a wrapped model ({type(model).__name__}), wanted the module itself: pass "
            f"model._module, or audit before make_private. For a loop, dpzoo.audit_loop."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"audit got a {type(model).__name__} without trainable parameters; there is nothing to audit."
        )
    if not 0 < max_grad_norm < math.inf:
        raise InputError(f"audit got max_grad_norm={max_grad_norm}, wanted a number above 0.")


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Random states restored, gradients on, Opacus' and torch's warnings about hooks silenced."""
    with kept_states(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield
