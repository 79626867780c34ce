"""What the zoo holds: (family, task) -> class, and a class by its name.

A class has the name of the transformers class that it replaces. A new family is a file in `dpzoo.models`
that says in ``TASKS`` what its classes do, and a call of `register_family`: here, or outside the package.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import transformers

from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.models import bert, distilbert, gpt2, roberta
from dpzoo.models.base import PerSampleModel, stock_class

__all__ = [
    "CLASSES",
    "FAMILIES",
    "PIPELINE_TASKS",
    "TASKS",
    "class_by_name",
    "list_models",
    "model_class",
    "register_family",
    "stock_class",
]

_FAMILIES: dict[str, ModuleType] = {}
_CLASSES: dict[tuple[str, str], type[PerSampleModel]] = {}
_BY_NAME: dict[str, type[PerSampleModel]] = {}
_TASKS: dict[str, tuple[str, ...]] = {
    "base": (),
    "pre-training": (),
    "masked-lm": (),
    "causal-lm": (),
    "next-sentence-prediction": (),
    "sequence-classification": (),
    "multiple-choice": (),
    "double-heads": (),
    "token-classification": (),
    "question-answering": (),
}

FAMILIES = MappingProxyType(_FAMILIES)
"""Family (transformers' ``model_type``) -> the module with its classes."""

CLASSES = MappingProxyType(_CLASSES)
"""(family, task) -> dpzoo class."""

TASKS = MappingProxyType(_TASKS)
"""Task -> the names of the classes that do it, at most one of each family."""

PIPELINE_TASKS = MappingProxyType(
    {
        "feature-extraction": "base",
        "fill-mask": "masked-lm",
        "ner": "token-classification",
        "sentiment-analysis": "sequence-classification",
        "text-classification": "sequence-classification",
        "text-generation": "causal-lm",
    }
)
"""transformers' names of pipelines -> the task that is meant, for suggestions."""


def register_family(module: ModuleType, tasks: Mapping[str, str] | None = None) -> None:
    """Add a family, for the rest of the process.

    From then on `convert`, `from_pretrained`, `list_models` and the rest know it like the others.

    Args:
        module: the module with the family's classes, each named as the transformers class that it
            replaces. Their ``config_class`` names the family (transformers' ``model_type``).
        tasks: one of `TASKS` -> the name of the class that does it; at least one. None takes the
            module's own ``TASKS``.

    Raises:
        InputError: no task or an unknown one, a name that the module has no `PerSampleModel` of or
            transformers no class of, classes of several families, or a family that is there already.
            Nothing is added then.
    """
    tasks = getattr(module, "TASKS", {}) if tasks is None else tasks
    known = ", ".join(TASKS)
    if not tasks or not tasks.keys() <= TASKS.keys():
        raise InputError(f"register_family got tasks {sorted(tasks)}, wanted some of: {known}.")
    classes = {}
    for task, name in tasks.items():
        cls = getattr(module, name, None)
        if not (isinstance(cls, type) and issubclass(cls, PerSampleModel)):
            raise InputError(
                f"register_family got {name!r} for {task!r}, and {module.__name__} has {cls!r} of that "
                f"name. Wanted a subclass of dpzoo.models.base.PerSampleModel."
            )
        if cls.__name__ != name or not hasattr(transformers, name):
            raise InputError(
                f"register_family got {name!r} ({cls.__qualname__}), wanted the name of the transformers "
                f"class that it replaces: convert finds it by that."
            )
        classes[task] = cls
    families = sorted(
        {str(getattr(cls.config_class, "model_type", "")) for cls in classes.values()}
    )
    if len(families) > 1 or families[0] in ("", *FAMILIES):
        raise InputError(
            f"register_family got classes of the families {families} (config_class.model_type), wanted "
            f"one, and none of those there are: {', '.join(FAMILIES)}."
        )
    _FAMILIES[families[0]] = module
    for task, cls in classes.items():
        _TASKS[task] = (*_TASKS[task], cls.__name__)
        _CLASSES[families[0], task] = cls
        _BY_NAME[cls.__name__] = cls


for _module in (
    bert,
    roberta,
    distilbert,
    gpt2,
):
    register_family(_module)


def list_models() -> dict[str, dict[str, str]]:
    """The registry: family -> task -> class name, in the order of `FAMILIES` and `TASKS`."""
    return {
        family: {
            task: CLASSES[family, task].__name__ for task in TASKS if (family, task) in CLASSES
        }
        for family in FAMILIES
    }


def model_class(family: str, task: str) -> type[PerSampleModel]:
    """The dpzoo class of a family and a task.

    Raises:
        UnsupportedModelError: an unknown family or task, or a pair that has no class; lists what
            there is.
    """
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"Unknown family {family!r}. Wanted one of: {', '.join(FAMILIES)}."
            + _suggestion(family, FAMILIES)
        )
    tasks = list_models()[family]
    if task not in tasks:
        known = "has no class for" if task in TASKS else "does not know"
        raise UnsupportedModelError(
            f"Family {family!r} {known} task {task!r}. Wanted one of: {', '.join(tasks)}."
            + _suggestion(PIPELINE_TASKS.get(task, str(task)), tasks)
        )
    return CLASSES[family, task]


def class_by_name(name: str) -> type[PerSampleModel]:
    """The dpzoo class of a transformers class name.

    Raises:
        UnsupportedModelError: dpzoo has no class of that name; lists what there is.
    """
    if name not in _BY_NAME:
        raise UnsupportedModelError(
            f"dpzoo has no class for {name}. Wanted one of: {', '.join(sorted(_BY_NAME))}."
            + _suggestion(name, _BY_NAME)
        )
    return _BY_NAME[name]


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
