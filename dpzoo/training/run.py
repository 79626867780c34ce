"""`dpzoo.train`: from a file of private text to a model, its epsilon, and the card that says so."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpzoo.accounting import epsilon_of
from dpzoo.empirical import GradientCanaries, RunReport, audit_run
from dpzoo.empirical.one_run import ASSUMES
from dpzoo.errors import InputError, first_line
from dpzoo.integrations import Plan, PrivacyCard
from dpzoo.integrations.plan import duration
from dpzoo.training.gradient_route import RECIPE_NAME, GradientRoute
from dpzoo.training.head_route import HeadRoute
from dpzoo.training.job import Job, Say
from dpzoo.training.models import hub_id
from dpzoo.training.recipe import Recipe, written

log = logging.getLogger(__name__)

MEASURED_AT = 1e-5
"""Delta of the bound by canaries. Their number times it has to be far below 1; 1 / units is too much."""


@dataclass(frozen=True)
class Run:
    """What a run came to.

    Args:
        plan: of the run.
        folder: of the model; None after a dry run.
        card: its terms; None after a dry run.
        metrics: on the held-out rows. They are in no epsilon, and in no card.
        audit: what the canaries showed; None without them, and after a dry run.
    """

    plan: Plan
    folder: Path | None = None
    card: PrivacyCard | None = None
    metrics: dict[str, float] | None = None
    audit: RunReport | None = None


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    dry_run: bool = False,
    resume: bool = False,
    say: Say = log.info,
) -> Run:
    """Train a model on private rows: read, choose, plan, train in mode bk, save with its privacy card.

    Args:
        recipe: a `Recipe`, a mapping of its fields, or a YAML file of them.
        dry_run: stop after the plan; nothing is written.
        resume: go on with the run that OUT.run has checkpoints of, by its recipe.
        say: takes lines for a person. Those with a loss or an accuracy are not private.

    Returns:
        The plan, and what was saved.

    Raises:
        InputError: rows, columns, model or settings that do not fit; a folder that has another run.

    Guarantees:
        The saved weights satisfy the card's (epsilon, delta) for one row of the training data. The loss and
        the accuracy that are said do not.
    """
    wrote = written(recipe)
    recipe = Recipe.of(wrote)
    wrote = {name: getattr(recipe, name) for name in wrote}
    if resume:
        recipe, wrote = _resumed(recipe, wrote)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"dpzoo.train runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}. Start it without "
            f"torchrun, or train with dpzoo.integrations.DPTrainer, which runs in several."
        )
    job = Job(recipe, wrote, say)
    route: HeadRoute | GradientRoute
    route = HeadRoute(job) if job.trainable == "head" else GradientRoute(job)
    plan = route.plan()
    say(str(plan))
    if dry_run:
        say("nothing was trained (dry run)")
        return Run(plan)
    _refuse_used(job, resume)
    began = time.monotonic()
    card, model = route.train(resume)
    report = None if job.canaries is None else _audit(job.canaries, card)
    if report is not None:
        measured = {  # by the bound that `report.ok`, and so the exit status, goes by
            "epsilon_at_least": report.epsilon_lower,
            "assuming": ASSUMES[report.largest.name],
            "epsilon_at_least_assuming_nothing": report["any mechanism"].epsilon,
            "epsilon_accounted": report.epsilon or 0.0,
            "delta": report.delta,
            "confidence": report.confidence,
            "canaries": report.canaries,
        }
        card = replace(card, measured=measured)
        if not report.ok:
            card = replace(card, notes=(*card.notes, f"**{str(report).splitlines()[0]}.**"))
    metrics = route.score(model)
    out = Path(recipe.out)
    model.save_pretrained(out)
    job.tokenizer.save_pretrained(out)
    card.write(out, base_model=hub_id(job.name), pipeline_tag=job.pipeline)
    say(f"\nprivacy   {card.statement()}")
    for line in str(report).splitlines() if report else ():
        say(f"measured  {line}")
    for name, value in metrics.items():
        say(f"held out  {name} {value:.4g} (not covered by epsilon)")
    say(f"time      {duration(time.monotonic() - began)}")
    say(f"saved     {out}, a stock checkpoint with its privacy card: publish this folder")
    if job.work.exists():
        say(f"private   {job.work}: checkpoints, losses, the noise's keys: never publish it")
    return Run(plan, out, card, metrics, report)


def _audit(canaries: GradientCanaries, card: PrivacyCard) -> RunReport:
    """What the run's canaries say of its epsilon, at a delta of which they can say something."""
    delta = min(card.delta, MEASURED_AT)
    history = ((card.noise_multiplier, card.sample_rate, card.steps),)
    return audit_run(
        canaries,
        {"likelihood": canaries.scores(card.noise_multiplier, card.sample_rate)},
        delta=delta,
        epsilon=epsilon_of(card.accountant, history, delta),
        independent=True,
    )


def _resumed(recipe: Recipe, wrote: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a run was begun with, what was chosen included, and what a person wrote of it.

    Args:
        recipe: of the run that goes on.
        wrote: the fields that were written for it. None leaves a choice to dpzoo, which was made.
    """
    path = Path(f"{recipe.out}.run") / RECIPE_NAME
    if not path.is_file():
        raise InputError(f"There is no run to resume: {path} does not exist. Leave resume out.")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kept, first = Recipe.of(saved["recipe"]), dict(saved["written"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({first_line(error)}), so it is not known what the run was begun with. "
            f"Restore it, or begin a new run with another out: the two runs' epsilons then add up."
        ) from None
    changed = {
        name: value
        for name, value in wrote.items()
        if value is not None and value not in (getattr(kept, name), first.get(name))
    }
    if changed:
        raise InputError(
            f"The run is resumed with {changed}, and it was begun with "
            f"{ {key: getattr(kept, key) for key in changed} }. Leave them out, or begin a new run with "
            f"another out: the two runs' epsilons then add up."
        )
    return kept, first


def _refuse_used(job: Job, resume: bool) -> None:
    out = Path(job.recipe.out)
    for folder in (out, job.work):  # now, and not when the training is done
        try:
            new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
            if new:
                folder.rmdir()
        except OSError:
            writable = False
        if not writable:
            raise InputError(
                f"{folder} is no folder that can be written. Name another with out (--out)."
            )
    if out.exists() and any(out.iterdir()):
        raise InputError(f"The folder {out} is not empty. Name another with out (--out).")
    found = sorted(job.work.glob("checkpoint-*"))
    if found and not resume:
        raise InputError(
            f"{job.work} has a run that was not finished ({found[-1].name}). Go on with it (resume=True, "
            f"--resume), or name another out: the two runs' epsilons then add up."
        )
