"""Accuracy on GLUE's SST-2 by what is trained: a head, LoRA or every parameter, at several epsilons.

    PYTHONPATH=examples python examples/studies/glue_study.py --data train.tsv --eval dev.tsv --out study

Files have a column of sentences and one of labels, 0 or 1. All runs begin from one public start, the
sentence encoder tuned on made-up opinions (sst2_opinions.py), which is made once. Results go to
study/results.json as they come, and a run that is in there is not made again. study/features.pt is as
private as the rows.

An epsilon is that of one run, for the presence or absence of any one row. It covers neither the number of
rows nor the other runs on them: publish one of these models, not all.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from sst2_model import LABELS, Features, Recipe, head_accuracy, public_start, train_head
from sst2_opinions import opinions
from sst2_study import Results, delta_of_study, features_of, table
from support import recipes
from support.data import Row
from support.progress import Progress
from support.recipes import RecipeError
from support.rows import Rows, micro_batches
from support.texts import accuracy, encode
from support.training import classes, launch, load, on_device
from torch import nn
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.accounting import epsilon_of
from dpzoo.integrations.accounting import noise_for
from dpzoo.training.data import class_indices, guess_task, read_table, texts_of

START = "public start alone"


@dataclass(frozen=True)
class Values:
    """Of a run of AdamW, whose rate falls linearly to 0: expected rows of a step, steps, rate, and C."""

    batch_size: int
    steps: int
    learning_rate: float
    max_grad_norm: float


# docs/accuracy.md says how these were chosen. HEAD replaces values of sst2-study.yaml.
HEAD = {"batch_size": 8192, "epochs": 8, "learning_rate": 0.5}
PRIVATE = {"lora": Values(1024, 16, 5e-3, 10.0), "all": Values(1024, 16, 2e-4, 30.0)}
PLAIN = {"lora": Values(64, 100, 2e-3, 0.0), "all": Values(64, 100, 1e-4, 0.0)}
RANK = 8
MICRO = 16  # rows in memory at a time, of similar length


def name_of(kind: str, epsilon: float | None) -> str:
    return f"{kind}, {'no privacy' if epsilon is None else f'epsilon {epsilon:g}'}"


def prepared(model: nn.Module, kind: str) -> nn.Module:
    """The model with what is trained: LoRA on all linear layers beside the classifier, or all of it."""
    if kind == "all":
        return model
    where = r".*(query|key|value|dense)"
    lora = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=RANK, target_modules=where)
    return get_peft_model(model, lora)


def fit(
    model: nn.Module, rows: Rows, values: Values, epsilon: float | None, delta: float
) -> dict[str, Any]:
    """Train what is trainable in `model`, in place; what was spent and what it took."""
    loader: Any = DataLoader(rows, batch_size=min(values.batch_size, len(rows)), shuffle=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(trained, lr=values.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        inner, lambda step: max(0.0, 1 - step / values.steps)
    )
    spent: dict[str, Any] = {"parameters": sum(p.numel() for p in trained), **asdict(values)}
    module, optimizer, criterion = model.train(), inner, dpzoo.ModelLoss()
    if epsilon is not None:
        rate = 1 / len(loader)
        noise = noise_for("prv", epsilon, delta, rate, values.steps)
        module, optimizer, criterion, loader = dpzoo.PrivacyEngine().make_private(
            module=module,
            optimizer=inner,
            criterion=criterion,
            data_loader=loader,  # comes back with Poisson sampling
            noise_multiplier=noise,
            max_grad_norm=values.max_grad_norm,
            grad_sample_mode="bk",
        )
        spent |= {"noise_multiplier": noise, "sample_rate": rate}
        spent["epsilon"] = epsilon_of("prv", ((noise, rate, values.steps),), delta)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    with Progress("training", values.steps) as progress:
        for batch in itertools.islice(batches, values.steps):
            optimizer.zero_grad()
            for part in micro_batches(batch, MICRO):
                loss = criterion(module(**on_device(part)))
                share = 1.0 if epsilon is not None else len(part["labels"]) / len(batch["labels"])
                (loss * share).backward()  # parts of a private step add up by themselves
                progress.add(loss.detach().expand(len(part["labels"])))
            optimizer.step()  # also where nobody was drawn: then it is noise alone
            schedule.step()
            progress.step()
    if epsilon is not None:
        module.to_standard_module()  # takes the engine's hooks off `model`
    return spent


class Study:
    """One public start, the rows as it reads them, and the runs from it."""

    def __init__(self, options: argparse.Namespace, data: list[list[Row]]) -> None:
        self.folder: Path = options.out
        self.recipe = recipes.from_options(Recipe, options)
        self.delta = delta_of_study(options, len(data[0]))
        sizes = [len(part) for part in data]
        settings = {"recipe": vars(self.recipe), "rows": sizes, "delta": self.delta}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.folder / "results.json", settings)
        began = clocks()
        if not (self.folder / "start").is_dir():
            torch.manual_seed(0)
            model, _, tokenizer = public_start(self.recipe, 0)
            tokenizer.save_pretrained(self.folder / "start")
            model.save_pretrained(self.folder / "start")
        model, self.tokenizer = self.model()
        self.rows = [self.encoded(part) for part in data]
        if not self.results.has(START, 0):
            self.add(START, 0, began, accuracy=accuracy(model, self.rows[1]))
        print(f"{sizes[0]} rows to train on, {sizes[1]} held out, delta {self.delta:.2e}")

    def model(self) -> tuple[Any, Any]:
        return load(str(self.folder / "start"), "sequence-classification", **classes(LABELS))

    def encoded(self, rows: Sequence[Row]) -> Rows:
        return encode(rows, self.tokenizer, self.recipe.max_length)

    def add(self, name: str, seed: int, began: tuple[float, float], **values: Any) -> None:
        cpu = round(time.process_time() - began[1], 1)
        self.results.add(name, seed, began[0], **values, cpu_seconds=cpu)

    def features(self) -> list[Features]:
        """What the frozen start says of the rows, read once."""
        cache = self.folder / "features.pt"
        if not cache.is_file():
            began = time.process_time()
            public = self.encoded([Row(*made, "") for made in opinions(self.recipe.opinions, 0)])
            found = features_of(self.model()[0], self.recipe, public, *self.rows)
            torch.save([vars(part) for part in found], cache)
            print(f"rows read in {time.process_time() - began:.0f} s of processor time", flush=True)
        return [Features(**part) for part in torch.load(cache)]

    def run(self, kind: str, epsilon: float | None, seed: int, steps: int | None) -> None:
        """One run, unless the results have it."""
        name = name_of(kind, epsilon)
        if self.results.has(name, seed):
            return
        features = self.features() if kind == "head" else []
        began = clocks()
        torch.manual_seed(1000 + seed)
        if kind == "head":
            head, spent = train_head(features[0], self.recipe, epsilon, self.delta)
            found = {**vars(spent), "parameters": sum(p.numel() for p in head.parameters())}
            score = head_accuracy(head, features[1])
        else:
            model = prepared(self.model()[0], kind)
            values = (PLAIN if epsilon is None else PRIVATE)[kind]
            values = replace(values, steps=steps or values.steps)
            found = fit(model, self.rows[0], values, epsilon, self.delta)
            score = accuracy(model, self.rows[1])
        self.add(name, seed, began, accuracy=score, **found)


def epsilon_of_option(text: str) -> float | None:
    return None if text == "none" else float(text)


def clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def run(options: argparse.Namespace) -> None:
    if options.seeds < 1 or any(
        epsilon is not None and epsilon <= 0 for epsilon in options.epsilons
    ):
        raise RecipeError("--epsilons and --seeds want numbers above 0")
    tables = [read_table(path) for path in (options.data, options.eval)]
    task = guess_task(tables[0])
    data = [
        [Row(*row, "") for row in zip(texts_of(t, task.text), class_indices(t, task), strict=True)]
        for t in tables
    ]
    study = Study(options, data)
    runs = list(itertools.product(options.kinds, options.epsilons))
    for seed, (kind, epsilon) in itertools.product(range(options.seeds), runs):
        study.run(kind, epsilon, seed, options.steps)
    Console().print(table(study.results, [START, *(name_of(*made) for made in runs)]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="to train on")
    add("--eval", type=Path, required=True, metavar="FILE", help="held-out rows")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where results.json is kept")
    add("--kinds", nargs="+", choices=("head", *PRIVATE), default=["head", *PRIVATE])
    add(
        "--epsilons",
        type=epsilon_of_option,
        nargs="+",
        default=[1.0, 3.0, 8.0, None],
        help="or none",
    )
    add("--seeds", type=int, default=1, help="the number of seeds: 0, 1, ... (default: 1)")
    add("--delta", type=float, help="of the guarantee (default: 1 / training rows)")
    add("--steps", type=int, help="of LoRA and of every parameter, to try things out")
    recipes.add_options(made, Recipe, "sst2-study")
    made.set_defaults(seed=0, **HEAD)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return launch(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
