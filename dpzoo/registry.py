"""What the zoo holds: (family, task) -> class, and dpzoo class <-> stock class.

A class has the name of the transformers class that it replaces; a new family is a file in
`dpzoo.models`, a line in `FAMILIES`, and its entries in `TASKS`.
"""

import difflib
from types import MappingProxyType
from typing import Any

import transformers
from transformers import PreTrainedModel

from dpzoo.errors import UnsupportedModelError
from dpzoo.models import bert, distilbert, gpt2, roberta
from dpzoo.models.base import PerSampleModel

FAMILIES = MappingProxyType(
    {"bert": bert, "roberta": roberta, "distilbert": distilbert, "gpt2": gpt2}
)
"""Family (transformers' ``model_type``) -> the module with its classes."""

TASKS = MappingProxyType(
    {
        "base": ("BertModel", "RobertaModel", "DistilBertModel", "GPT2Model"),
        "pre-training": ("BertForPreTraining",),
        "masked-lm": ("BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"),
        "causal-lm": ("BertLMHeadModel", "RobertaForCausalLM", "GPT2LMHeadModel"),
        "next-sentence-prediction": ("BertForNextSentencePrediction",),
        "sequence-classification": (
            "BertForSequenceClassification",
            "RobertaForSequenceClassification",
            "DistilBertForSequenceClassification",
            "GPT2ForSequenceClassification",
        ),
        "multiple-choice": (
            "BertForMultipleChoice",
            "RobertaForMultipleChoice",
            "DistilBertForMultipleChoice",
        ),
        "double-heads": ("GPT2DoubleHeadsModel",),
        "token-classification": (
            "BertForTokenClassification",
            "RobertaForTokenClassification",
            "DistilBertForTokenClassification",
            "GPT2ForTokenClassification",
        ),
        "question-answering": (
            "BertForQuestionAnswering",
            "RobertaForQuestionAnswering",
            "DistilBertForQuestionAnswering",
            "GPT2ForQuestionAnswering",
        ),
    }
)
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


def _registry() -> dict[tuple[str, str], type[PerSampleModel]]:
    classes = {}
    for task, names in TASKS.items():
        for name in names:
            for family, module in FAMILIES.items():
                if name in vars(module):
                    classes[family, task] = getattr(module, name)
    return classes


CLASSES = MappingProxyType(_registry())
"""(family, task) -> dpzoo class."""

_BY_NAME = MappingProxyType({cls.__name__: cls for cls in CLASSES.values()})


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
            + _suggestion(PIPELINE_TASKS.get(task, task), tasks)
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


def stock_class(cls: type[PerSampleModel]) -> type[PreTrainedModel]:
    """The transformers class that a dpzoo class, or a subclass of one, replaces.

    Raises:
        UnsupportedModelError: the class does not come from dpzoo.
    """
    for base in cls.__mro__:
        if _BY_NAME.get(base.__name__) is base:
            return getattr(transformers, base.__name__)
    raise UnsupportedModelError(
        f"{cls.__module__}.{cls.__qualname__} is not a dpzoo class or a subclass of one. "
        f"dpzoo.list_models() gives those."
    )


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
