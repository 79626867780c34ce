"""The table of config fields, arguments and output fields against the installed transformers, by name.

A field that a new transformers adds fails here, before a user meets it.
"""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import TransformersKwargs

import dpzoo
from dpzoo.models.base import ForwardArguments
from dpzoo.models.cache import CACHE
from dpzoo.models.fields import (
    COMMON_FIELDS,
    HARMLESS_ARGUMENTS,
    IGNORED_FIELDS,
    REFUSED_ARGUMENTS,
    REFUSED_FIELDS,
    UNSET_OUTPUTS,
    default_fields,
    fields_read,
)
from dpzoo.registry import class_by_name, stock_class
from tests.support import (
    CONFIG_CLASSES,
    FAMILY,
    NAMES,
    TASK,
    batch_for,
    inputs_for,
    stock_model,
    tiny_config,
)

BODIES = {FAMILY[name]: class_by_name(name) for name in NAMES if TASK[name] == "base"}
CAN_DECODE = [n for n in NAMES if TASK[n] == "causal-lm" or FAMILY[n] == "gpt2"]


def handled(family: str) -> frozenset[str]:
    return COMMON_FIELDS | BODIES[family]._handled_fields


# --- the table and the installed version ------------------------------------------------------------


@pytest.mark.parametrize("family", BODIES)
def test_every_config_field_is_in_the_table(family: str) -> None:
    """What the class declares, and what the stock model reads beside that, by its source."""
    config_class = CONFIG_CLASSES[family]
    aliases = set(config_class.attribute_map)
    there = (set(default_fields(config_class)) | fields_read(config_class)) - aliases
    there = {name for name in there if not name.startswith("_")}
    there -= {"num_labels", "output_attentions"}  # properties, over id2label and a private field
    known = handled(family) | IGNORED_FIELDS.keys() | REFUSED_FIELDS.keys()
    assert not there - known, f"new in transformers: {sorted(there - known)}"
    assert not handled(family) - there, "no longer there"
    assert not handled(family) & REFUSED_FIELDS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_forward_signatures_are_those_of_stock(name: str) -> None:
    """Names, order and defaults. Keyword-only parameters are named where stock has them in **kwargs."""
    cls = class_by_name(name)
    ours, stock = (
        {
            key: parameter.default
            for key, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        for model in (cls, stock_class(cls))
    )
    assert list(ours) == list(stock)
    assert ours == stock


@pytest.mark.parametrize("family", BODIES)
def test_every_argument_that_stock_knows_is_in_the_table(family: str) -> None:
    handled = {
        *inspect.signature(BODIES[family].forward).parameters,
        *ForwardArguments.__annotations__,
    }
    there = set(TransformersKwargs.__annotations__)
    known = handled | HARMLESS_ARGUMENTS | REFUSED_ARGUMENTS.keys()
    assert not there - known, f"new in transformers: {sorted(there - known)}"


@pytest.mark.parametrize("argument", REFUSED_ARGUMENTS)
@pytest.mark.parametrize("name", [n for n in NAMES if TASK[n] == "base"])
def test_refused_arguments_say_why(name: str, argument: str) -> None:
    zoo = dpzoo.convert(stock_model(name))
    with pytest.raises(dpzoo.InputError, match=f"got '{argument}', which it cannot honour \\("):
        zoo(**inputs_for(name), **{argument: torch.ones(1)})


@pytest.mark.parametrize("name", NAMES)
def test_every_output_field_is_set_or_in_the_table(name: str) -> None:
    """With everything asked for, no field of the stock output class stays None but those named."""
    zoo = dpzoo.convert(stock_model(name))
    options: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    if name in CAN_DECODE and TASK[name] != "question-answering":
        options["use_cache"] = True
    output = zoo(**batch_for(name), **options)
    stock = stock_model(name)(**batch_for(name))
    assert type(output) is type(stock)
    unset = {
        field.name for field in dataclasses.fields(output) if getattr(output, field.name) is None
    } - UNSET_OUTPUTS.keys()
    # A labelled causal encoder, a question's answer and plain encoders have no cache to give.
    if "use_cache" not in options or FAMILY[name] != "gpt2":
        unset -= {CACHE}
    assert not unset, f"new in transformers: {sorted(unset)}"


# --- what is refused, and what loads ----------------------------------------------------------------


@pytest.mark.parametrize("family", BODIES)
def test_a_field_that_a_new_transformers_declares_is_refused_unless_at_its_default(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, old = BODIES[family], CONFIG_CLASSES[family]

    class Newer(old):  # type: ignore[misc,valid-type]
        softcap: float | None = 0.5

    monkeypatch.setattr(cls, "config_class", Newer)
    config = Newer(**tiny_config(cls.__name__).to_diff_dict())
    cls(config)
    for value in (3.0, None):
        config.softcap = value
        with pytest.raises(
            dpzoo.UnsupportedConfigError,
            match=rf"config\.softcap={value!r}, a field of Newer in.*Wanted 0\.5, the default",
        ):
            cls(config)


@pytest.mark.parametrize("family", BODIES)
def test_a_key_that_stock_reads_and_the_table_has_not_is_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version would whose model looks for a key that its config class does not declare."""
    cls, config = BODIES[family], tiny_config(BODIES[family].__name__, ffn_gate="silu")
    cls(config)  # nothing reads it: a note
    read = fields_read(cls.config_class) | {"ffn_gate"}
    monkeypatch.setattr("dpzoo.models.fields.fields_read", lambda _: read)
    with pytest.raises(
        dpzoo.UnsupportedConfigError, match=r"config\.ffn_gate='silu', which the stock code reads"
    ):
        cls(config)
    config.ffn_gate = None
    cls(config)


@pytest.mark.parametrize("family", BODIES)
def test_the_stock_source_is_read_for_what_it_asks_of_a_config(family: str) -> None:
    read = fields_read(CONFIG_CLASSES[family])
    assert {"vocab_size", "layer_types", "is_causal", "sliding_window"} <= read
    if family == "gpt2":  # by getattr and hasattr, undeclared
        assert {"hidden_dropout", "summary_last_dropout"} <= read
    assert "get_text_config" not in read


@pytest.mark.parametrize("name", [n for n in NAMES if TASK[n] == "base"])
def test_layers_of_several_kinds_are_refused(name: str) -> None:
    config = tiny_config(name, per_layer_config={1: {"initializer_range": 0.5}})
    with pytest.raises(dpzoo.UnsupportedConfigError, match=r"is_heterogeneous=True.*several"):
        class_by_name(name)(config)


@pytest.mark.parametrize(
    ("field", "value"), [("layer_types", ["sliding_attention"] * 2), ("sliding_window", 3)]
)
def test_other_attention_is_refused(field: str, value: Any) -> None:
    """The stock masks and caches would honour it, in every family."""
    for family, cls in BODIES.items():
        config = tiny_config(cls.__name__)
        setattr(config, field, value)
        with pytest.raises(dpzoo.UnsupportedConfigError, match=f"config.{field}=.*every layer"):
            cls(config)
        assert family


PUBLISHED: dict[str, dict[str, Any]] = {
    "bert": {
        "_name_or_path": "bert-base-uncased",
        "_commit_hash": "0" * 40,
        "_num_labels": 2,
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "finetuning_task": "sst2",
        "gradient_checkpointing": False,
        "output_past": True,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
    },
    "roberta": {
        "bos_token_id": 0,
        "classifier_dropout": None,
        "eos_token_id": 2,
        "gradient_checkpointing": False,
        "id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"},
        "label2id": {"CONTRADICTION": 0, "ENTAILMENT": 2, "NEUTRAL": 1},
        "_num_labels": 3,
        "create_pooler_output": True,
        "type_vocab_size": 1,
    },
    "distilbert": {
        "finetuning_task": "sst-2",
        "output_past": True,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
    },
    "gpt2": {
        "_num_labels": 1,
        "gradient_checkpointing": False,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "n_ctx": 1024,
        "predict_special_tokens": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
}
"""What published config.json files of the four families say beside the sizes."""

EVERYWHERE: dict[str, Any] = {
    "auto_map": {"AutoModel": "modeling.Own"},
    "do_sample": True,
    "dtype": "float32",
    "length_penalty": 2.0,
    "max_length": 50,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "output_attentions": False,
    "output_hidden_states": False,
    "prefix": None,
    "return_dict": True,
    "torch_dtype": "float32",
    "torchscript": False,
    "transformers_version": "4.6.0.dev0",
    "use_bfloat16": False,
    "my_own_note": {"data": "reviews", "epsilon": 3.0},
}
"""What older versions, generation and users write into any config.json."""


@pytest.mark.parametrize("name", NAMES)
def test_what_published_configs_say_loads(name: str, tmp_path: Path) -> None:
    """Through a folder, as from the hub; what is no field is kept, and written again."""
    family = FAMILY[name]
    config = tiny_config(name)
    labels = (
        {"id2label", "label2id", "_num_labels"} if TASK[name] == "question-answering" else set()
    )
    said = {key: value for key, value in PUBLISHED[family].items() if key not in labels}
    written = {**config.to_dict(), **EVERYWHERE, **said, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    model = dpzoo.from_config(str(tmp_path))
    assert type(model) is class_by_name(name)
    assert model.config.my_own_note == EVERYWHERE["my_own_note"]
    assert model.config.to_dict()["my_own_note"] == EVERYWHERE["my_own_note"]


def test_gradient_checkpointing_in_a_config_is_heard() -> None:
    """An old key that transformers still honours: it turns checkpointing on, the kind that is exact."""
    name = "BertForSequenceClassification"
    model = class_by_name(name)(tiny_config(name, gradient_checkpointing=True))
    stock = stock_class(class_by_name(name))(tiny_config(name, gradient_checkpointing=True))
    assert model.is_gradient_checkpointing == stock.is_gradient_checkpointing
