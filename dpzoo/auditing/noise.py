"""The noise meter: how much noise does a step really add, against how much a row can add?"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import Gradients
from dpzoo.auditing.opacus_modes import OpacusMode, first_line
from dpzoo.auditing.record import Record

DEVIATIONS = 6.0
"""How many standard errors a measured figure may be off: false alarms at 1 in 10^9."""
MANY = 1000
"""Draws from which on a standard deviation is worth stating."""


def noise(subject: ModelUnderAudit, record: Record) -> None:
    """With no signal, a step has noise of standard deviation sigma * C / denominator.

    Measured on the mode's own optimizer around the model: the loss times 0, one step, twice.
    `dpzoo.audit_loop` measures the user's.

    Catches: noise of the wrong scale, a factor of the batch size between noise and gradient,
    parameters without noise, noise that repeats in parameters or steps.
    """
    sigma = 1.0
    for mode in subject.modes:
        if mode == "ew":
            record.skip("ew: as hooks")
            continue
        if not subject.usable(mode, record.skipped):
            continue
        record.ran()
        opacus = subject.opacus(mode)
        steps = []
        try:
            for _ in range(2):
                steps.append(_silent_step(subject, opacus, sigma))
        except Exception as error:
            opacus.discard()
            record.find(
                "crash",
                f"{mode} mode raises in a step without signal: {first_line(error)}",
                mode=mode,
            )
            continue
        wanted = sigma * subject.max_grad_norm / subject.rows
        measure(record, steps, wanted, mode=mode)


def _silent_step(subject: ModelUnderAudit, opacus: OpacusMode, sigma: float) -> Gradients:
    opacus.clear()
    optimizer = opacus.optimizer(subject.max_grad_norm, subject.rows, sigma)
    if opacus.mode == "ghost":
        # Norms are 0, and so is what the second pass would leave.
        opacus.discard_graph(opacus.losses(subject.batch) * 0.0)
    else:
        opacus.private_backward(subject.batch, optimizer, factor=0.0)
    optimizer.pre_step()
    step = {
        name: p.grad.detach().clone() for name, p in opacus.parameters.items() if p.grad is not None
    }
    opacus.clear()
    return step


def measure(
    record: Record, steps: Sequence[Gradients], wanted: float, *, mode: str | None = None
) -> None:
    """Judge the noise of two silent steps.

    Args:
        record: where to write.
        steps: for each step, parameter name -> what the step would subtract (at lr 1).
        wanted: the standard deviation that it should have.
        mode: for the findings.
    """
    first, second = steps
    sizes = {name: value.numel() for name, value in first.items()}
    silent = [n for n in first if float(first[n].abs().max()) == 0 and wanted > 0]
    if silent:
        record.find(
            "privacy",
            "parameters get no noise",
            "every trainable parameter must be in the private optimizer",
            parameters=silent,
            mode=mode,
            expected=f"standard deviation {wanted:.4g}",
            got="0",
        )
    loud = [n for n in first if n not in silent]
    off = {}
    for name in loud:
        both = torch.cat([first[name].flatten(), second[name].flatten()]).double()
        deviation = float(both.square().mean().sqrt())
        error = DEVIATIONS / (2 * len(both)) ** 0.5
        if wanted and len(both) >= MANY:
            record.measure(abs(deviation / wanted - 1), "of the standard deviation")
        if not abs(deviation / wanted - 1) <= error + 1e-9 if wanted else deviation > 0:
            off[name] = deviation
    if off:
        name = max(off, key=lambda n: sizes[n])
        less = any(value < wanted for value in off.values())
        record.find(
            "privacy" if less else "utility",
            f"the step's noise has {'less' if less else 'more'} than the standard deviation that the "
            f"accountant counts on: sigma * C, over the same denominator as the gradients",
            "add noise of standard deviation sigma * C to the sum, then divide both by the expected "
            "batch size",
            parameters=sorted(off, key=lambda n: -sizes[n]),
            mode=mode,
            expected=f"standard deviation {wanted:.4g}",
            got=f"{off[name]:.4g} in {name} ({off[name] / wanted:.3g} times)"
            if wanted
            else off[name],
        )
    _dependence(record, first, second, loud, mode)


def _dependence(
    record: Record, first: Gradients, second: Gradients, names: list[str], mode: str | None
) -> None:
    """Noise that repeats: in the next step, or in the next parameter."""
    pairs = [(f"{n}, two steps", n, first[n], second[n]) for n in names]
    pairs += [(f"{a} and {b}", a, first[a], first[b]) for a, b in pairwise(names)]
    by_size: dict[int, str] = {}
    for n in names:
        other = by_size.setdefault(first[n].numel(), n)
        if other != n:
            pairs.append((f"{other} and {n}", n, first[other], first[n]))
    repeated = []
    for title, name, a, b in pairs:
        size = min(a.numel(), b.numel())
        x, y = a.flatten()[:size].double(), b.flatten()[:size].double()
        if size == 1:
            alike = bool((x == y).all())
        else:
            correlation = float((x @ y) / (x.norm() * y.norm()).clamp(min=1e-300))
            alike = correlation > min(DEVIATIONS / size**0.5, 0.999999)
        if alike:
            repeated.append((title, name))
    if repeated:
        record.find(
            "privacy",
            f"the noise is not independent ({repeated[0][0]}): averaged or subtracted, it cancels",
            "draw new noise for each parameter and step; do not seed the generator inside the loop",
            parameters=dict.fromkeys(name for _, name in repeated),
            mode=mode,
        )
