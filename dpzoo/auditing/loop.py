"""`dpzoo.audit_loop`: what the objects of a training loop reveal about it."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpzoo import opacus_internals as internals
from dpzoo.auditing.findings import CheckResult
from dpzoo.auditing.loop_lint import Loop, parameters, sampling, settings
from dpzoo.auditing.loop_observation import observe
from dpzoo.auditing.loop_trials import repeated_draws, trials
from dpzoo.auditing.noise import measure
from dpzoo.auditing.numerics import Gradients, row_norms
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.randomness import kept_states
from dpzoo.auditing.record import Record
from dpzoo.auditing.report import AuditReport
from dpzoo.clipping.draws import Draws
from dpzoo.clipping.noise import NoiseSource
from dpzoo.clipping.optimizer import Release
from dpzoo.errors import InputError


def audit_loop(
    model: Any,
    optimizer: Any,
    loader: Any,
    privacy_engine: Any,
    *,
    step: Callable[[Any], Any] | None = None,
    scaler: Any = None,
    scheduler: Any = None,
    accumulation_steps: int = 1,
    clip_grad_norm: float | None = None,
) -> AuditReport:
    """Find what is wrong with a private training loop, from the objects that it trains with.

    Args:
        model: what `make_private` returned as the model (the wrapper, or the hooks object).
        optimizer: the private optimizer.
        loader: the loader that the loop draws batches from.
        privacy_engine: the engine, whose accountant is asked what it would account for a step.
        step: the loop's body, if it can be called: takes a batch and does forward, backward and
            ``optimizer.step()``. It is run on batches of the loader, until it has taken two steps, and
            watched; and in trials, on draws of 0 to 5 rows that differ in one thing (a row, a seed, the
            batch before). Parameters, optimizer, accountant and scheduler are put back afterwards.
        scaler: the loop's GradScaler, if it has one.
        scheduler: its learning rate scheduler.
        accumulation_steps: how many of the loader's batches the loop takes for one ``optimizer.step()``.
        clip_grad_norm: the value that the loop passes to ``clip_grad_norm_``, if it calls it (for
            transformers' Trainer, ``args.max_grad_norm``).

    Returns:
        A report with the checks "loop lint", "stale_state", "noise" and, given ``step``, "loop trials"
        and "loop steps". Its verdict is `AuditReport.ok`, as of `dpzoo.audit`.

    Raises:
        InputError: the optimizer is not a private one.

    Guarantees:
        Parameters, gradients, Opacus' state, the accountant's history and torch's random state are as
        before. (What ``step`` itself prints, logs or counts, it does.)
    """
    if not hasattr(optimizer, "original_optimizer") or not hasattr(optimizer, "pre_step"):
        raise InputError(
            f"audit_loop got a {type(optimizer).__name__} as optimizer, wanted the private one that "
            f"PrivacyEngine.make_private returns."
        )
    start = time.perf_counter()
    loop = Loop(model, optimizer, loader, privacy_engine)
    report = AuditReport(model=type(loop.module).__name__, modes=(loop.mode,))

    def lint(record: Record) -> None:
        sampling(loop, record)
        parameters(loop, record)
        settings(loop, record, scaler, accumulation_steps, clip_grad_norm)
        repeated_draws(loop, record)

    checks: list[tuple[str, Callable[[Record], None], str]] = [
        ("loop lint", lint, LINT_CATCHES),
        ("stale_state", lambda record: _stale_state(loop, record), STALE_STATE_CATCHES),
        ("noise", lambda record: _noise(loop, record), NOISE_CATCHES),
    ]
    if step is not None:
        body = step
        # Trials first: a body may learn from the first batch that it sees.
        checks += [
            ("loop trials", lambda record: trials(loop, body, scheduler, record), TRIALS_CATCHES),
            (
                "loop steps",
                lambda record: observe(loop.module, loop, body, scheduler, record),
                STEPS_CATCHES,
            ),
        ]
    for name, check, catches in checks:
        record, begun = Record(name), time.perf_counter()
        if name != "loop trials":  # which says itself whether it could
            record.ran()
        try:
            with kept_states(loop.module), _own_noise(loop):
                check(record)
        except Exception as error:
            record.find("crash", f"the check could not finish: {first_line(error)}")
        result: CheckResult = record.result(catches, time.perf_counter() - begun)
        report.results.append(result)
    report.seconds = time.perf_counter() - start
    return report


LINT_CATCHES = (
    "shuffled batches under a Poisson accountant, another sampling rate or noise multiplier than the "
    "accountant's, optimizers of other parameters than the model's, a GradScaler, gradient-norm "
    "clipping after the fact, several draws for one step, the same draws in every pass, noise from a seed"
)
STALE_STATE_CATCHES = (
    "parameters unfrozen after wrapping, a BatchMemoryManager left early, gradients not cleared"
)
NOISE_CATCHES = "noise of the wrong scale, a factor of the batch size, noise that repeats"
STEPS_CATCHES = (
    "gradients changed between backward and step, several backward passes for one step under ghost "
    "mode, schedulers that step per physical batch, more than 95 % of rows clipped, weights that do "
    "not move"
)


TRIALS_CATCHES = (
    "rows that a collator or a model cuts, copies, mixes or keeps for the next batch, losses reduced over "
    "the batch, noise or draws that are seeded in the body, second optimizers and anything else that "
    "learns from the batch without noise, bodies that train on other rows, empty batches that are skipped"
)


def _stale_state(loop: Loop, record: Record) -> None:
    """Nothing is left of an earlier state or batch."""
    known = getattr(loop.wrapper, "trainable_parameters", None)
    if isinstance(known, list):
        counted = {id(p) for p in known}
        late = [n for n, p in loop.trainable.items() if id(p) not in counted]
    elif loop.mode == "bk":  # counts what is trainable in the batch itself
        late = []
    else:
        late = [n for n, p in loop.trainable.items() if not internals.counts_uses(p)]
    if late:
        record.find(
            "privacy",
            "parameters were unfrozen after the model was wrapped: their gradients are trained on and "
            "do not count in the norm that rows are clipped by",
            "set requires_grad before make_private, and wrap the model again after a change",
            parameters=late,
            mode=loop.mode,
        )
    queue = internals.announced(loop.optimizer)
    if queue or internals.skipped_last(loop.optimizer):
        record.find(
            "privacy",
            "a BatchMemoryManager was left early: the optimizer still skips steps for physical batches "
            "that never came, and would mix two draws in one step",
            "run its loop to the end, or clear optimizer._step_skip_queue and summed_grad",
            expected="an empty queue between epochs",
            got=f"queue {queue}",
        )
    left = [n for n, p in loop.trainable.items() if getattr(p, "summed_grad", None) is not None]
    if left:
        record.find(
            "privacy",
            "clipped sums of an earlier batch are still there and enter the next step",
            "call optimizer.zero_grad() after each step",
            parameters=left,
        )
    lists = [
        n
        for n, p in loop.trainable.items()
        if isinstance(getattr(p, "grad_sample", None), (list, torch.Tensor))
    ]
    if lists and not left:
        record.find(
            "note",
            "per-sample gradients of an earlier batch are still there",
            "call optimizer.zero_grad() before the next batch",
            parameters=lists,
        )


@contextmanager
def _own_noise(loop: Loop) -> Iterator[None]:
    """Sums and noise of the audit's own in dpzoo's engine: the run's go on as if nothing had been."""
    optimizer = loop.optimizer
    names = ("release", "draws", "sums", "_trained", "_clipped_at", "max_grad_norm", "rule")
    kept = {n: vars(optimizer)[n] for n in names if n in vars(optimizer)}
    if "release" in kept:
        optimizer.release = Release(NoiseSource())
    if "sums" in kept:
        optimizer.sums, optimizer.rule = {}, copy.copy(kept["rule"])
    try:
        yield
    finally:
        vars(optimizer).update(kept)
        if "draws" in kept:
            optimizer.draws.restart()


@contextmanager
def _restored(loop: Loop) -> Iterator[None]:
    """Gradients, Opacus' attributes, the optimizer's settings and generator put back."""
    optimizer = loop.optimizer
    names = ("grad", *internals.LEFT_ON_PARAMETERS)
    parameters = list(optimizer.params)
    kept = [{n: getattr(p, n) for n in names if hasattr(p, n)} for p in parameters]
    settings = {
        n: copy.copy(vars(optimizer)[n])
        for n in ("noise_multiplier", *internals.STEP_STATE, "step_hook", "draws")
        if n in vars(optimizer)
    }
    generator = getattr(optimizer, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    if "draws" in settings:
        optimizer.draws = Draws(strict=False)
    try:
        yield
    finally:
        for p, values in zip(parameters, kept, strict=True):
            for n in names:
                if n in values:
                    setattr(p, n, values[n])
                elif n != "grad" and hasattr(p, n):
                    delattr(p, n)
        vars(optimizer).update(settings)
        if state is not None and generator is not None:
            generator.set_state(state)


def _share_of(optimizer: Any, signal: float) -> float:
    """The clip factor of a row whose gradient is ``signal`` everywhere, in modes that clip early."""
    size = sum(p.numel() for p in optimizer.params)
    return min(1.0, float(optimizer.max_grad_norm) / max(signal * size**0.5, 1e-12))


def _pre_step(loop: Loop, signal: float) -> Gradients:
    """What a step would subtract (at lr 1) for one row whose gradient is ``signal`` everywhere."""
    optimizer = loop.optimizer
    optimizer.step_hook = None
    internals.forget_skips(optimizer)
    for p in optimizer.params:
        p.summed_grad = None
        if loop.mode == "bk":
            optimizer.sums[p] = torch.full_like(p, signal * _share_of(optimizer, signal))
            continue
        ghost = loop.mode == "ghost"  # its two passes leave the row's gradient clipped
        left = signal * _share_of(optimizer, signal) if ghost else signal
        internals.leave_rows(p, ghost, torch.full_like(p, left).detach()[None])
    clip = optimizer.max_grad_norm
    if loop.mode == "bk":
        optimizer._trained = frozenset(id(p) for p in optimizer.params)
    optimizer.pre_step()
    optimizer.max_grad_norm = clip  # which adaptive clipping has moved
    names = {id(p): n for n, p in loop.module.named_parameters()}
    return {
        names.get(id(p), f"parameter {i}"): p.grad.detach().clone()
        for i, p in enumerate(optimizer.params)
    }


def _noise(loop: Loop, record: Record) -> None:
    """Measure a row's largest contribution, then the noise of two silent steps, at one scale."""
    # Adaptive clipping in bk spends a part of the privacy on a count, and noises gradients more.
    sigma = float(
        getattr(loop.optimizer, "gradient_noise_multiplier", loop.optimizer.noise_multiplier)
    )
    if not isinstance(loop.optimizer.max_grad_norm, (int, float)):
        record.skip("a clipping norm for each layer")
        return
    multiplier = loop.optimizer.noise_multiplier
    if sigma == 0:
        record.find("privacy", "noise_multiplier is 0: nothing is private")
        return
    with _restored(loop):
        # The same noise with and without the row, or none: the difference is the row.
        keyed = hasattr(loop.optimizer, "release")
        loop.optimizer.noise_multiplier = 0.0 if keyed else loop.optimizer.noise_multiplier
        state = torch.get_rng_state()
        generator = getattr(loop.optimizer, "generator", None)
        inner = generator.get_state() if isinstance(generator, torch.Generator) else None
        first = _pre_step(loop, 0.0)
        torch.set_rng_state(state)
        if inner is not None and generator is not None:
            generator.set_state(inner)
        with_row = _pre_step(loop, 1e6)
        row = {n: (with_row[n] - first[n])[None].double() for n in first}
        contribution = float(row_norms(row)[0])
        if keyed:
            loop.optimizer.noise_multiplier = multiplier
            first = _pre_step(loop, 0.0)
        second = _pre_step(loop, 0.0)
    measure(record, [first, second], sigma * contribution, mode=loop.mode)
