"""Accuracy on SST-2 from MiniLM at several epsilons and without privacy, several seeds of each.

    PYTHONPATH=examples python examples/studies/sst2_study.py --data train.tsv --eval dev.tsv --out study

Files are lines of sentence<TAB>0 or 1. Results go to study/results.json as they come, and a run that is
in there is not made again. For each seed:

1. a public start: the sentence encoder is tuned on made-up opinions (sst2_opinions.py), no review seen;
2. the reviews go through it once, and a linear head on its states is trained with DP-SGD at each epsilon,
   and without privacy;
3. for comparison, every parameter is trained without privacy, from the same start.

An epsilon is that of one run, for the presence or absence of any one line of the training file. It covers
neither the number of lines nor the other runs on the same lines: publish one of these models, not all.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sst2_model import (
    Features,
    Recipe,
    accuracy_of_start,
    centred,
    head_accuracy,
    public_start,
    read_features,
    train_head,
)
from support import recipes
from support.data import Row, tsv_data
from support.recipes import RecipeError
from support.rows import Rows
from support.texts import accuracy, encode
from support.training import delta_of, launch, train_without_privacy

START, HEAD, FULL = "public start alone", "head, no privacy", "all parameters, no privacy"


def private(epsilon: float) -> str:
    return f"head, epsilon {epsilon:g}"


class Results:
    """results.json: the settings, and for each run its accuracy and what it took."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                raise RecipeError(f"{path} is from other settings; name another folder with --out")
            self.content = found

    def has(self, kind: str, seed: int) -> bool:
        return f"{kind}, seed {seed}" in self.content["runs"]

    def add(self, kind: str, seed: int, began: float, **values: Any) -> None:
        run = {"kind": kind, "seed": seed, **values, "seconds": round(time.monotonic() - began, 1)}
        self.content["runs"][f"{kind}, seed {seed}"] = run
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        part.replace(self.path)
        print(f"seed {seed}, {kind}: {values['accuracy']:.1%}, {run['seconds']:.0f} s", flush=True)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [run for run in self.content["runs"].values() if run["kind"] == kind]


def study_seed(
    seed: int,
    arguments: argparse.Namespace,
    recipe: Recipe,
    data: tuple[Sequence[Row], Sequence[Row]],
    results: Results,
) -> None:
    """Make the runs of one seed that are not yet in the results."""
    heads: dict[str, float | None] = {private(e): e for e in arguments.epsilons}
    heads[HEAD] = None
    wanted = [START, *heads, *([] if arguments.no_full else [FULL])]
    if all(results.has(kind, seed) for kind in wanted):
        return
    began = time.monotonic()
    torch.manual_seed(seed)
    model, opinions, tokenizer = public_start(recipe, seed)
    train, heldout = (encode(rows, tokenizer, recipe.max_length) for rows in data)
    if not all(results.has(kind, seed) for kind in (START, *heads)):
        print(f"seed {seed}: reading {len(train) + len(heldout)} rows", flush=True)
        features = features_of(model, recipe, opinions, train, heldout)
        results.add(START, seed, began, accuracy=accuracy_of_start(features[1]))
        for kind, epsilon in heads.items():
            began = time.monotonic()
            torch.manual_seed(1000 + seed)
            delta = delta_of_study(arguments, len(train))
            head, run = train_head(features[0], recipe, epsilon, delta)
            results.add(
                kind,
                seed,
                began,
                accuracy=head_accuracy(head, features[1]),
                epsilon=run.epsilon,
                noise_multiplier=run.noise_multiplier,
                steps=run.steps,
            )
    if FULL in wanted and not results.has(FULL, seed):
        began = time.monotonic()
        torch.manual_seed(1000 + seed)
        train_without_privacy(
            model,
            train,
            epochs=recipe.full_epochs,
            batch_size=recipe.full_batch_size,
            learning_rate=recipe.full_learning_rate,
        )
        results.add(FULL, seed, began, accuracy=accuracy(model, heldout))


def features_of(model: Any, recipe: Recipe, opinions: Rows, *data: Rows) -> list[Features]:
    """The features of each set of rows; the centre is that of the opinions, which are public."""
    few = Rows(**{name: column[:1000] for name, column in opinions.columns.items()})
    centre = read_features(model, few, recipe.layers()).values.mean(0)
    return [
        centred(read_features(model, rows, recipe.layers()), centre, recipe.feature_norm)
        for rows in data
    ]


def table(results: Results, kinds: Sequence[str]) -> Table:
    """One line for each kind of run."""
    made = Table(
        title="accuracy on the held-out rows, %; noise multiplier, steps and seconds of a run",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("run", "mean", "std", "min", "max", "seeds", "noise", "steps", "s"):
        made.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for kind in kinds:
        runs = results.of(kind)
        if not runs:
            continue
        values = [100 * run["accuracy"] for run in runs]
        spread = f"{stdev(values):.1f}" if len(values) > 1 else "-"
        noise = runs[0].get("noise_multiplier")
        made.add_row(
            kind,
            f"{mean(values):.1f}",
            spread,
            f"{min(values):.1f}",
            f"{max(values):.1f}",
            str(len(values)),
            "-" if noise is None else f"{noise:.3f}",
            str(runs[0].get("steps", "-")),
            f"{mean(run['seconds'] for run in runs):.0f}",
        )
    return made


def delta_of_study(arguments: argparse.Namespace, rows: int) -> float:
    """--delta, or 1 / rows, at which other results on this data are given."""
    return 1 / rows if arguments.delta is None else delta_of(arguments, rows)


def read_data(arguments: argparse.Namespace) -> tuple[Sequence[Row], Sequence[Row]]:
    data = tsv_data(
        arguments.data,
        arguments.eval,
        label_names=("0", "1"),
        seed=0,
        heldout_share=arguments.heldout_share,
    )
    return data.train[: arguments.rows], data.heldout


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    if not arguments.epsilons or min(arguments.epsilons) <= 0 or arguments.seeds < 1:
        raise RecipeError("--epsilons and --seeds want numbers above 0")
    train, heldout = read_data(arguments)
    delta = delta_of_study(arguments, len(train))
    settings = {
        "recipe": vars(recipe),
        "rows": [len(train), len(heldout)],
        "delta": delta,
        "data": [str(arguments.data.name), str(arguments.eval and arguments.eval.name)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "results.json", settings)
    results.content["made with"] = {"python": platform.python_version(), "torch": torch.__version__}
    print(f"{len(train)} rows to train on, {len(heldout)} held out, delta {delta:.2e}")
    for seed in range(arguments.seeds):
        study_seed(seed, arguments, recipe, (train, heldout), results)
    Console().print(table(results, [START, *(private(e) for e in arguments.epsilons), HEAD, FULL]))
    print(f"written: {results.path}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="lines of sentence<TAB>0 or 1")
    add("--eval", type=Path, metavar="FILE", help="held-out lines (default: some of --data)")
    add("--heldout-share", type=float, default=0.2, help="of --data, where there is no --eval")
    add("--rows", type=int, help="train on the first of the training rows only, to try things out")
    add("--epsilons", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    add("--seeds", type=int, default=3, help="the number of seeds: 0, 1, ... (default: 3)")
    add("--delta", type=float, help="of the guarantee (default: 1 / training rows)")
    add("--no-full", action="store_true", help="leave out the training of every parameter")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where results.json is kept")
    recipes.add_options(made, Recipe, "sst2-study")
    made.set_defaults(seed=0)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return launch(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
