"""dpzoo: Transformers that train with differential privacy, from stock checkpoints and back.

    model = dpzoo.from_pretrained("bert-base-uncased", task="sequence-classification", num_labels=2)
    # or: model = dpzoo.convert(my_transformers_model)

The model is a drop-in for the transformers class of the same name whose every parameter has an exact
per-sample gradient under Opacus, position embeddings and tied heads included. It saves as a stock
checkpoint.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpzoo.versions import __version__  # warns of a transformers that the tests were not run with

if TYPE_CHECKING:
    from dpzoo.auditing import AuditFailedError, AuditReport, Finding, audit, audit_loop
    from dpzoo.clipping import PrivacyEngine
    from dpzoo.conversion import convert, to_transformers
    from dpzoo.empirical import Canaries, GradientCanaries, RunReport, audit_run
    from dpzoo.errors import (
        ConversionError,
        DpzooError,
        InputError,
        UnsupportedConfigError,
        UnsupportedModelError,
    )
    from dpzoo.losses import ModelLoss
    from dpzoo.models.bert import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
    )
    from dpzoo.models.distilbert import (
        DistilBertForMaskedLM,
        DistilBertForMultipleChoice,
        DistilBertForQuestionAnswering,
        DistilBertForSequenceClassification,
        DistilBertForTokenClassification,
        DistilBertModel,
    )
    from dpzoo.models.gpt2 import (
        GPT2DoubleHeadsModel,
        GPT2ForQuestionAnswering,
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        GPT2LMHeadModel,
        GPT2Model,
    )
    from dpzoo.models.roberta import (
        RobertaForCausalLM,
        RobertaForMaskedLM,
        RobertaForMultipleChoice,
        RobertaForQuestionAnswering,
        RobertaForSequenceClassification,
        RobertaForTokenClassification,
        RobertaModel,
    )
    from dpzoo.poisson import prime_empty_batches
    from dpzoo.pretrained import from_config, from_pretrained
    from dpzoo.registry import list_models
    from dpzoo.training import Recipe, train

__all__ = [
    "AuditFailedError",
    "AuditReport",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "Canaries",
    "ConversionError",
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
    "DpzooError",
    "Finding",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GradientCanaries",
    "InputError",
    "ModelLoss",
    "PrivacyEngine",
    "Recipe",
    "RobertaForCausalLM",
    "RobertaForMaskedLM",
    "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaModel",
    "RunReport",
    "UnsupportedConfigError",
    "UnsupportedModelError",
    "__version__",
    "audit",
    "audit_loop",
    "audit_run",
    "convert",
    "from_config",
    "from_pretrained",
    "list_models",
    "prime_empty_batches",
    "to_transformers",
    "train",
]

_HOMES = (
    "errors",
    "poisson",
    "losses",
    "clipping",
    "models.bert",
    "models.distilbert",
    "models.gpt2",
    "models.roberta",
    "registry",
    "conversion",
    "pretrained",
    "auditing",
    "empirical",
    "training",
)
"""Where the public names are, in the order in which they are looked for: what imports least first."""


def __getattr__(name: str) -> Any:
    """Import a public name, or a module, when it is first asked for: torch takes seconds."""
    if name in __all__:
        for home in _HOMES:
            found = vars(import_module(f"dpzoo.{home}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    elif not name.startswith("_"):
        try:
            return import_module(f"dpzoo.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"dpzoo.{name}":
                raise
    raise AttributeError(f"module 'dpzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
