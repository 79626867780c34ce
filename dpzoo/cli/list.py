"""``dpzoo list``: families, tasks, classes, public checkpoints, and the stock architectures verified."""

import difflib
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from typer import Argument, Option

from dpzoo.catalogue import Checkpoint, catalogue, quirks
from dpzoo.cli.output import fits, print_json, print_table
from dpzoo.errors import UnsupportedModelError
from dpzoo.families.record import recorded, verdict
from dpzoo.families.trial import MODES, Result
from dpzoo.registry import FAMILIES, TASKS, list_models, model_class

WIDE = 150
"""Columns of a terminal that the wide tables take; a narrower one gets less of them."""

Topic = Literal["families", "tasks", "classes", "catalogue", "quirks", "architectures"]

EPILOG = """\
topics:
  families   how many classes and checkpoints each has
  tasks      what --task takes, and the class of each family that does it
  classes    the same, a line for each class
  catalogue  well-known public checkpoints: class, sizes, parameters, quirks of
             their key layouts
  quirks     what those quirks are
  architectures
             stock models of transformers, as they are: which modes give exact
             gradients for each, as verified by `python -m dpzoo.families`;
             here --family is a model_type (llama, say)
  Without a topic: tasks and catalogue.

  The catalogue is what has been looked up, not what is supported: any
  checkpoint of the four families can be loaded. A class in brackets is the
  family's base class, where the checkpoint's own is not known.

exit status:
  0  listed
  2  there is no such family or task

examples:
  dpzoo list
  dpzoo list classes --task masked-lm
  dpzoo list catalogue --family gpt2
  dpzoo list architectures --family qwen3
  dpzoo list catalogue --json | jq -r '.catalogue[] | [.id, .parameters] | @tsv'
"""


@dataclass
class Options:
    """Show what dpzoo has, and the public checkpoints that it knows of."""

    topic: Annotated[Topic | None, Argument(help="by default tasks and catalogue")] = None
    family: Annotated[str | None, Option(help=f"only this one: {', '.join(FAMILIES)}")] = None
    task: Annotated[str | None, Option(help="only what does this task")] = None
    json: Annotated[bool, Option("--json", help="print JSON, an object with a key a topic")] = False


def run(options: Options) -> int:
    """Print what there is.

    Raises:
        UnsupportedModelError: an unknown family or task, or a family without that task.
    """
    if options.topic == "architectures":
        _refuse_unverified(options.family, options.task)
    else:
        _refuse_unknown(options.family, options.task)
    topics = [options.topic] if options.topic else ["tasks", "catalogue"]
    if options.json:
        data = {topic: _JSON[topic](options.family, options.task) for topic in topics}
        print_json(data)
        return 0
    for i, topic in enumerate(topics):
        if i:
            sys.stdout.write("\n")
        _TABLES[topic](options.family, options.task)
    return 0


def _refuse_unknown(family: str | None, task: str | None) -> None:
    """Raise the registry's own error, which lists what there is."""
    if family is not None:
        model_class(family, task or "base")
    elif task is not None and task not in TASKS:
        model_class("bert", task)


def _refuse_unverified(family: str | None, task: str | None) -> None:
    """Raise where the record has nothing of that model_type or task."""
    _, results = recorded()
    kinds, tasks = ({one.name.split("/")[i] for one in results} for i in (1, 0))
    for got, known, what in ((family, kinds, "model_type"), (task, tasks, "task")):
        if got is not None and got not in known:
            close = difflib.get_close_matches(got, known, n=3) or sorted(known)[:5]
            raise UnsupportedModelError(
                f"No architecture with {what} {got!r} is in the record, wanted one such as "
                f"{', '.join(close)}. Try it: python -m dpzoo.families --only {family or 'llama'}."
            )
    if not _verified(family, task):
        raise UnsupportedModelError(
            f"The record has no {family!r} for task {task!r}. `dpzoo list architectures --family "
            f"{family}` shows what it has."
        )


def _verified(family: str | None, task: str | None) -> list[Result]:
    return [
        one
        for one in recorded()[1]
        if task in (None, one.name.split("/")[0]) and family in (None, one.name.split("/")[1])
    ]


def _models(family: str | None, task: str | None) -> dict[str, dict[str, str]]:
    """The registry, filtered: family -> task -> class name."""
    return {
        one: {name: cls for name, cls in tasks.items() if task in (None, name)}
        for one, tasks in list_models().items()
        if family in (None, one)
    }


def _checkpoints(family: str | None, task: str | None) -> list[Checkpoint]:
    return [one for one in catalogue() if family in (None, one.family) and task in (None, one.task)]


# --- JSON ---------------------------------------------------------------------------------------


def _families_json(family: str | None, task: str | None) -> list[dict[str, Any]]:
    return [
        {
            "family": one,
            "classes": len(tasks),
            "checkpoints": len(_checkpoints(one, task)),
        }
        for one, tasks in _models(family, task).items()
    ]


def _tasks_json(family: str | None, task: str | None) -> dict[str, dict[str, str]]:
    models = _models(family, task)
    found = {
        name: {one: tasks[name] for one, tasks in models.items() if name in tasks} for name in TASKS
    }
    return {name: classes for name, classes in found.items() if classes}


def _classes_json(family: str | None, task: str | None) -> list[dict[str, str]]:
    return [
        {"class": cls, "family": one, "task": name}
        for one, tasks in _models(family, task).items()
        for name, cls in tasks.items()
    ]


def _catalogue_json(family: str | None, task: str | None) -> list[dict[str, Any]]:
    return [
        {
            key: value
            for key, value in {**asdict(one), "task": one.task}.items()
            if value is not None
        }
        for one in _checkpoints(family, task)
    ]


def _quirks_json(family: str | None, task: str | None) -> dict[str, dict[str, Any]]:
    checkpoints = _checkpoints(family, task)
    return {
        name: {"meaning": text, "checkpoints": [c.id for c in checkpoints if name in c.quirks]}
        for name, text in quirks().items()
    }


def _architectures_json(family: str | None, task: str | None) -> dict[str, Any]:
    results = [asdict(one) for one in _verified(family, task)]
    for one in results:
        one["task"], one["model_type"] = one.pop("name").split("/")
        one["class"] = one.pop("cls")
        del one["seconds"]
    return {"versions": recorded()[0], "results": results}


_JSON = {
    "families": _families_json,
    "tasks": _tasks_json,
    "classes": _classes_json,
    "catalogue": _catalogue_json,
    "quirks": _quirks_json,
    "architectures": _architectures_json,
}


# --- tables -------------------------------------------------------------------------------------

NUMBERS = ("layers", "hidden", "heads", "vocabulary", "positions", "parameters")


def _families_table(family: str | None, task: str | None) -> None:
    rows = [
        (one["family"], one["classes"], one["checkpoints"]) for one in _families_json(family, task)
    ]
    header = ("family", "classes", "known checkpoints")
    print_table(header, rows, title="Families", numbers=header[1:])


def _tasks_table(family: str | None, task: str | None) -> None:
    tasks = _tasks_json(family, task)
    families = [one for one in FAMILIES if family in (None, one)]
    if fits(WIDE):
        rows = [(name, *(classes.get(one) for one in families)) for name, classes in tasks.items()]
        print_table(("task", *families), rows, title="Tasks and classes")
    else:
        rows = [(name, " ".join(classes.values())) for name, classes in tasks.items()]
        print_table(("task", "classes"), rows, title="Tasks and classes")


def _classes_table(family: str | None, task: str | None) -> None:
    rows = [(one["class"], one["family"], one["task"]) for one in _classes_json(family, task)]
    print_table(("class", "family", "task"), rows, title="Classes")


def _catalogue_table(family: str | None, task: str | None) -> None:
    header = ["checkpoint", "class", *NUMBERS, "quirks"]
    rows = [
        [
            one.id,
            one.architecture or f"({model_class(one.family, 'base').__name__})",
            one.layers,
            one.hidden,
            one.heads,
            one.vocabulary,
            one.positions,
            f"{one.parameters / 1e6:.1f} M",
            ", ".join(one.quirks),
        ]
        for one in _checkpoints(family, task)
    ]
    title = "Known public checkpoints"
    if not fits(WIDE):
        title += " (sizes and quirks: in a wider terminal, or with --json)"
        kept = [header.index(name) for name in ("checkpoint", "class", "parameters")]
        header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    print_table(header, rows, title=title, numbers=NUMBERS)


def _quirks_table(family: str | None, task: str | None) -> None:
    rows = [
        (name, one["meaning"], len(one["checkpoints"]))
        for name, one in _quirks_json(family, task).items()
    ]
    header = ("quirk", "meaning", "seen in")
    print_table(header, rows, title="Quirks of key layouts", numbers=("seen in",))


def _architectures_table(family: str | None, task: str | None) -> None:
    rows = []
    for one in _verified(family, task):
        done = one.name.split("/")
        error = f"{one.error['bk']:.0e}" if "bk" in one.error else None
        verdicts = [verdict(one, mode) for mode in MODES]
        rows.append((done[1], done[0], one.cls, *verdicts, error))
    versions = ", ".join(f"{name} {number}" for name, number in recorded()[0].items())
    print_table(
        ("architecture", "task", "class", *MODES, "error in bk"),
        rows,
        title=f"Stock architectures, verified with {versions}",
        numbers=("error in bk",),
    )


_TABLES = {
    "families": _families_table,
    "tasks": _tasks_table,
    "classes": _classes_table,
    "catalogue": _catalogue_table,
    "quirks": _quirks_table,
    "architectures": _architectures_table,
}
