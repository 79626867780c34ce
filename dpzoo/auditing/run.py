"""`dpzoo.audit`: what one batch proves about a model's private training."""

import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from dpzoo.auditing.coverage import coverage, shapes, unit
from dpzoo.auditing.edges import edges
from dpzoo.auditing.effect import effect
from dpzoo.auditing.exactness import exactness, parity, split
from dpzoo.auditing.freshness import freshness
from dpzoo.auditing.isolation import isolation
from dpzoo.auditing.noise import noise
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.record import Record
from dpzoo.auditing.report import AuditReport
from dpzoo.auditing.row_losses import Loss
from dpzoo.auditing.sensitivity import sensitivity
from dpzoo.auditing.statelessness import statelessness
from dpzoo.auditing.subject import CannotRunError, Subject
from dpzoo.errors import InputError
from dpzoo.modes import MODES

Check = Callable[[Subject, Record], None]

CHECKS: dict[str, Check] = {
    "coverage": coverage,
    "unit": unit,
    "exactness": exactness,
    "isolation": isolation,
    "statelessness": statelessness,
    "sensitivity": sensitivity,
    "parity": parity,
    "split": split,
    "edges": edges,
    "freshness": freshness,
    "noise": noise,
    "effect": effect,
}
"""Check name -> the check, in the order in which they run; each one's docstring says what it catches."""


def audit(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    max_grad_norm: float = 1.0,
    modes: Iterable[str] = ("hooks", "ghost"),
    checks: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
    unit_ids: Any = None,
) -> AuditReport:
    """Prove that a model's private training is right on a batch, or name what is wrong.

    Works on any module: dpzoo's, a stock transformers model, the user's own. Everything runs on deep
    copies in float64, in train mode with dropout off; per-sample gradients come from unmodified
    Opacus, in mode "bk" from dpzoo's engine, and are compared, per row and per parameter, with each
    row run alone under plain autograd.

    Args:
        model: a module before `make_private`, on any device.
        batch: a dict of keyword arguments or a tuple of positional ones; tensors have the rows
            first. The checks run on 3 to 5 of its rows, their number unlike its other dimensions.
        loss: maps (model, batch) to per-row losses, (rows,), or to a scalar that is taken for their
            mean. By default the model's own: its outputs' ``loss_per_sample``, else their ``loss``,
            else a fixed nonlinear function of each row's outputs.
        max_grad_norm: the clipping norm that training will use; others are tried beside it.
        modes: grad_sample_modes to audit: of "hooks", "functorch", "ew", "ghost", "bk".
        checks: names of `dpzoo.auditing.CHECKS`; all of them by default.
        progress: called with the name of each check before it runs.
        unit_ids: the ids of the units that the batch's rows are of, (rows,), as `make_private` takes them
            in mode "bk": the sensitivity check then takes away a whole unit, too. The first four are tried.

    Returns:
        The report; ``report.ok`` says whether nothing graver than a note was found.

    Raises:
        InputError: a wrapped model, one that cannot be copied, no trainable parameter, a batch that
            does not run, an unknown mode or check. What raises inside Opacus is a finding.

    Guarantees:
        The model is bit-equal afterwards: parameters, buffers, gradients, hooks, attributes of
        parameters, train flags; so are torch's, numpy's and Python's random states.
    """
    modes = _known("modes", modes, tuple(MODES))
    names = _known("checks", CHECKS if checks is None else checks, tuple(CHECKS))
    _refuse(model, max_grad_norm)
    if unit_ids is not None and "bk" not in modes:
        raise InputError(
            f"audit got unit_ids and modes={modes}, wanted 'bk' among the modes: it alone clips the rows "
            f"of a unit as one."
        )
    start = time.perf_counter()
    with _quietly(model):
        subject = Subject(
            model, batch, loss=loss, max_grad_norm=max_grad_norm, modes=modes, unit_ids=unit_ids
        )
        return _report(subject, names, start, progress)


def _report(
    subject: Subject,
    names: Iterable[str],
    start: float,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    report = AuditReport(
        model=type(subject.original).__name__,
        rows=subject.rows,
        modes=subject.modes,
        dtype=str(subject.dtype).removeprefix("torch."),
        remarks=subject.remarks,
    )
    for name in names:
        if progress is not None:
            progress(name)
        check, record, begun = CHECKS[name], Record(name), time.perf_counter()
        try:
            check(subject, record)
        except CannotRunError as error:
            record.skip(str(error))
        except Exception as error:
            record.find("crash", f"the check could not finish: {first_line(error)}")
        report.results.append(record.result(catches(check), time.perf_counter() - begun))
    try:
        report.shapes = shapes(subject)
    except Exception as error:
        report.remarks.append(f"no shapes: {first_line(error)}")
    report.seconds = time.perf_counter() - start
    return report


def catches(check: Check) -> str:
    """The bugs that a check is there for, from its docstring."""
    text = " ".join((check.__doc__ or "").split())
    return text.partition("Catches: ")[2]


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
    if not max_grad_norm > 0:
        raise InputError(f"audit got max_grad_norm={max_grad_norm}, wanted a number above 0.")


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Random states restored, gradients on, Opacus' and torch's warnings about hooks silenced."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=[d.index for d in devices]),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
