"""Watching a loop's own body while it runs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpzoo.auditing.record import Record
from dpzoo.opacus_internals import STEP_STATE, norms_of_rows

STEPS = 2
MOST_BATCHES = 16


def observe(
    module: nn.Module, loop: Any, step: Callable[[Any], Any], scheduler: Any, record: Record
) -> None:
    """Run a loop's body on batches until it took two steps, and report what it does to the gradients."""
    optimizer = loop.optimizer
    parameters = list(optimizer.params)
    seen = _Seen()
    kept = [p.detach().clone() for p in parameters]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    state = copy.deepcopy(optimizer.state_dict())
    accountant = getattr(loop.accountant, "history", None)
    history = copy.deepcopy(accountant)
    schedule = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None
    # The last batch is read and not stepped; a BatchMemoryManager has announced it.
    skips = {name: copy.copy(vars(optimizer).get(name)) for name in STEP_STATE}
    pre_step, handles = optimizer.pre_step, []
    hooked = "pre_step" in vars(optimizer)

    def left_by_backward(p: nn.Parameter) -> None:
        seen.after_backward[id(p)] = None if p.grad is None else p.grad.detach().clone()

    def counted(*_: Any) -> None:
        seen.forwards += torch.is_grad_enabled()

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.steps += 1
        seen.passes.append(seen.forwards)
        seen.forwards = 0
        if loop.mode == "ghost":
            for p in parameters:
                before = seen.after_backward.get(id(p))
                if before is not None and p.grad is not None and not torch.equal(before, p.grad):
                    seen.changed.append(loop.name_of(p))
        _clip_rate(loop, seen)
        stepped = pre_step(*args, **kwargs)
        seen.whole += bool(stepped)  # and not a part that a BatchMemoryManager has announced
        return stepped

    for p in parameters if loop.mode == "ghost" else ():
        handles.append(p.register_post_accumulate_grad_hook(left_by_backward))
    handles.append(module.register_forward_pre_hook(counted))
    optimizer.pre_step = watched
    try:
        for number, batch in enumerate(loop.loader):
            if seen.whole >= STEPS or number == MOST_BATCHES:
                break
            seen.batches += 1
            step(batch)
        moved = [not torch.equal(p, old) for p, old in zip(parameters, kept, strict=True)]
        epochs = scheduler.last_epoch - schedule["last_epoch"] if schedule is not None else None
    finally:
        if hooked:
            optimizer.pre_step = pre_step
        else:
            del optimizer.pre_step
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
            for buffer, old in buffers:
                buffer.copy_(old)
        vars(optimizer).update(skips)
        optimizer.zero_grad()
        for p in parameters:
            p.grad = None
            p.grad_sample = None
            p.summed_grad = None
        optimizer.load_state_dict(state)
        if history is not None:
            loop.accountant.history = history
        if scheduler is not None:
            scheduler.load_state_dict(schedule)
    _judge(loop, seen, moved, epochs, record)


class _Seen:
    """What happened while the loop's body ran."""

    def __init__(self) -> None:
        self.steps = self.whole = 0
        self.batches = 0
        self.forwards = 0
        self.passes: list[int] = []
        self.changed: list[str] = []
        self.after_backward: dict[int, torch.Tensor | None] = {}
        self.clipped = 0
        self.rows = 0


def _clip_rate(loop: Any, seen: _Seen) -> None:
    """Count the rows that the coming step clips."""
    if loop.mode == "ghost":
        norms = norms_of_rows(loop.wrapper)
    elif loop.mode == "bk":
        norms = loop.wrapper.per_sample_gradient_norms
    else:
        samples = [p.grad_sample for p in loop.optimizer.params]
        if not all(isinstance(g, torch.Tensor) for g in samples) or not len(samples[0]):
            return
        norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in samples]).norm(dim=0)
    if norms is not None and isinstance(loop.optimizer.max_grad_norm, (int, float)):
        seen.rows += len(norms)
        seen.clipped += int((norms > loop.optimizer.max_grad_norm).sum())


def _judge(loop: Any, seen: _Seen, moved: list[bool], epochs: int | None, record: Record) -> None:
    if seen.changed:
        record.find(
            "utility",
            "the gradients change between the backward pass and the step (clip_grad_norm_, unscale_?): "
            "in ghost mode they are sums of clipped gradients already, and noise comes on top",
            "leave the call out: the private optimizer clips. For transformers' Trainer, max_grad_norm=0",
            parameters=dict.fromkeys(seen.changed),
            mode=loop.mode,
        )
    most = max([*seen.passes, seen.forwards])
    if seen.steps == 0 and most < 2:
        record.find("utility", "the loop's body never steps the private optimizer", "call step()")
    if seen.steps > seen.batches:
        record.find(
            "privacy",
            "several private steps are taken on one draw: the accountant counts each as one of fresh rows",
            "take one step for each batch of the loader",
            mode=loop.mode,
            expected=f"{seen.batches} steps for {seen.batches} batches",
            got=str(seen.steps),
        )
    elif seen.steps < seen.batches and most > 1:
        record.find(
            "privacy",
            "several draws go into one step: a row that is in two of them contributes twice, and the "
            "accountant counts one draw",
            "take a step for each batch; split large ones with BatchMemoryManager",
            mode=loop.mode,
            expected=f"{seen.batches} steps for {seen.batches} batches",
            got=str(seen.steps),
        )
    elif most > 1:
        record.find(
            "privacy" if loop.mode == "ghost" else "note",
            f"{max(most, 2)} forward passes for one step: "
            + (
                "ghost mode keeps the last one's gradient only"
                if loop.mode == "ghost"
                else "right for parts of one draw, which add up"
            ),
            "nothing to do for parts of one draw; in ghost mode, split draws with BatchMemoryManager, and "
            "step after each backward pass",
            mode=loop.mode,
            expected="one forward and backward pass for each step",
            got=str(seen.passes),
        )
    if seen.rows and seen.clipped > 0.95 * seen.rows:
        record.find(
            "note",
            "more than 95 % of rows are clipped: the direction of the sum is that of unit gradients "
            "(meant, or a loss scale, a sum instead of a mean, or a small max_grad_norm?)",
            "compare max_grad_norm with the rows' norms",
            expected=f"norms around {loop.optimizer.max_grad_norm}",
            got=f"{seen.clipped} of {seen.rows} rows clipped",
        )
    if epochs is not None and epochs > seen.whole:
        record.find(
            "utility",
            "the scheduler steps more often than the optimizer: once for each physical batch?",
            "call scheduler.step() once for each logical batch (not while steps are skipped)",
            expected=f"{seen.whole} steps",
            got=str(epochs),
        )
    if seen.whole and not any(moved):
        record.find(
            "utility",
            "no weight moves in a step",
            "check the learning rate, and that the optimizer holds the model's own parameters",
            expected="a change",
            got="none",
        )
