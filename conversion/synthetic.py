"""Synthetic checkpoints: small, with random weights, laid out as the catalogue's quirks say.

One has the config family and the key layout of checkpoints that people have, and values that are known.
What is written through dpzoo must have those values, whatever names the file gives them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig

MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"
PREFIX = {"Bert": "bert", "Roberta": "roberta", "DistilBert": "distilbert", "GPT2": "transformer"}
FAMILY = {"Bert": "bert", "Roberta": "roberta", "DistilBert": "distilbert", "GPT2": "gpt2"}

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SyntheticCheckpoint:
    """A synthetic checkpoint.

    Attributes:
        quirk: the catalogue's name of what is special.
        written: the transformers class whose weights are in the file.
        loaded: the class that they are loaded into, if it is another one.
        task: dpzoo's name of the task, where config.json does not say it.
        layout: changes the keys of the file; gets the class's state dict, untied, and the config.
        surplus: part of the keys that are in the file and must not matter.
        config: fields in the place of the tiny config's.
        without: fields that config.json lacks.
        resize: size of the vocabulary after a resize.
        dtype: of the weights.
        suffix: of the file.
        fresh: whether config.json names a class that the file lacks the head of.
    """

    quirk: str
    written: str
    loaded: str = ""
    task: str | None = None
    layout: Callable[[State, Any], State] = lambda state, config: state
    surplus: str = ""
    config: tuple[tuple[str, Any], ...] = ()
    without: tuple[str, ...] = ()
    resize: int = 0
    dtype: torch.dtype = torch.float32
    suffix: str = "safetensors"
    fresh: bool = False

    @property
    def name(self) -> str:
        """Quirk, class in the file, and class that it is loaded into."""
        into = f" as {self.loaded}" if self.loaded and self.loaded != self.written else ""
        return f"{self.quirk}: {self.written}{into}"

    @property
    def family(self) -> str:
        return FAMILY[_kind(self.written)]

    @property
    def arguments(self) -> dict[str, Any]:
        """What `dpzoo.parity.convert_checkpoint` has to be told about it."""
        unnamed = "model_type" in self.without
        family = self.family if unnamed else None
        return {"task": self.task, "family": family, "fresh": self.fresh}

    def build(self, folder: Path, alter: str = "") -> State:
        """Write the checkpoint to a folder.

        Args:
            folder: where to; it must exist.
            alter: part of a key of the file: the first such tensor is changed after the true values
                were taken, as if it had been read wrongly.

        Returns:
            Name in the loaded class -> value, for everything that the file has values for.
        """
        tiny = MODELS / f"{self.family}-tiny.json"
        config = AutoConfig.from_pretrained(tiny, **dict(self.config))
        torch.manual_seed(0)
        model = getattr(transformers, self.written)(config)
        if self.resize:
            model.resize_token_embeddings(self.resize, mean_resizing=False)
        _randomize(model)
        model.to(self.dtype)
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        expected = self._expected(state, model.config)
        file = self.layout(dict(state), model.config)
        if alter:
            key = next(key for key in file if alter in key)
            file[key] = ~file[key] if file[key].dtype == torch.bool else file[key] + 1
        self._write(folder, file, model.config)
        return expected

    def _expected(self, state: State, config: Any) -> State:
        """The values under the names of the class that is loaded."""
        with torch.device("meta"):
            loaded = getattr(transformers, self.loaded or self.written)(config)
        prefix = PREFIX[_kind(self.written)] + "."
        expected = {}
        for key in loaded.state_dict():
            for name in (key, prefix + key, key.removeprefix(prefix)):
                if name in state:
                    expected[key] = state[name]
                    break
        return expected

    def _write(self, folder: Path, file: State, config: Any) -> None:
        config.architectures = [self.loaded or self.written]
        config.dtype = self.dtype
        config.save_pretrained(folder)
        path = folder / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name in self.without:
            del fields[name]
        path.write_text(json.dumps(fields), encoding="utf-8")
        if self.suffix == "bin":
            torch.save(file, folder / "pytorch_model.bin")
        else:
            tensors = {key: value.clone().contiguous() for key, value in file.items()}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _kind(name: str) -> str:
    return next(kind for kind in ("DistilBert", "Roberta", "Bert", "GPT2") if name.startswith(kind))


def _randomize(model: torch.nn.Module) -> None:
    """Give every parameter values of its own: zeros and ones hide what is lost."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25)
            if ("norm" in name.lower() or "ln_" in name) and name.endswith("weight"):
                parameter.add_(1.0)


# --- layouts ------------------------------------------------------------------------------------


def _gamma_beta(state: State, config: Any) -> State:
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in names.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


def _only_body(state: State, config: Any) -> State:
    prefix = PREFIX["GPT2"] + "."
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _with(**shapes: tuple[str, ...]) -> Callable[[State, Any], State]:
    """Add random tensors: key, with two underscores for a dot, and the config's fields with its shape."""

    def layout(state: State, config: Any) -> State:
        for key, fields in shapes.items():
            shape = [getattr(config, field) for field in fields]
            state[key.replace("__", ".")] = torch.randn(
                *shape, dtype=next(iter(state.values())).dtype
            )
        return state

    return layout


def _position_ids(state: State, config: Any) -> State:
    ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
    key = next(key for key in state if key.endswith("position_embeddings.weight"))
    return {key.replace("position_embeddings.weight", "position_ids"): ids, **state}


def _causal_masks(state: State, config: Any) -> State:
    size = config.n_positions
    for layer in range(config.n_layer):
        attention = f"transformer.h.{layer}.attn"
        state[f"{attention}.bias"] = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
        state[f"{attention}.masked_bias"] = torch.tensor(-1e4)
    return state


def _without(*parts: str) -> Callable[[State, Any], State]:
    def layout(state: State, config: Any) -> State:
        kept = {
            key: value for key, value in state.items() if not any(part in key for part in parts)
        }
        assert len(kept) < len(state), f"no key has any of {parts}"
        return kept

    return layout


DECODER = (
    "predictions.decoder.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
    "lm_head.weight",
)
"""The output projections of the four families."""

# --- the checkpoints ----------------------------------------------------------------------------------

HEADS = ("BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "GPT2LMHeadModel")

SYNTHETIC_CHECKPOINTS = (
    SyntheticCheckpoint("legacy-layer-norm", "BertForMaskedLM", layout=_gamma_beta),
    SyntheticCheckpoint("legacy-layer-norm", "BertForPreTraining", "BertModel", layout=_gamma_beta),
    SyntheticCheckpoint("no-prefix", "GPT2LMHeadModel", layout=_only_body),
    SyntheticCheckpoint("no-prefix", "BertModel", "BertForSequenceClassification", fresh=True),
    SyntheticCheckpoint(
        "no-prefix", "DistilBertModel", "DistilBertForTokenClassification", fresh=True
    ),
    SyntheticCheckpoint("base-prefix", "BertForPreTraining", "BertModel", surplus="cls."),
    SyntheticCheckpoint(
        "base-prefix",
        "RobertaForCausalLM",
        "RobertaModel",
        surplus="lm_head.",
        config=(("is_decoder", True),),
    ),
    SyntheticCheckpoint(
        "base-prefix", "DistilBertForMaskedLM", "DistilBertModel", surplus="vocab_"
    ),
    SyntheticCheckpoint(
        "base-prefix", "GPT2DoubleHeadsModel", "GPT2Model", surplus="multiple_choice_head."
    ),
    SyntheticCheckpoint("position-ids", "BertModel", layout=_position_ids, surplus="position_ids"),
    SyntheticCheckpoint(
        "position-ids", "BertForTokenClassification", layout=_position_ids, surplus="position_ids"
    ),
    SyntheticCheckpoint(
        "position-ids", "RobertaForMaskedLM", layout=_position_ids, surplus="position_ids"
    ),
    SyntheticCheckpoint(
        "causal-mask", "GPT2LMHeadModel", layout=_causal_masks, surplus=".attn.bias"
    ),
    SyntheticCheckpoint("pooler-missing", "BertForMaskedLM", "BertModel"),
    SyntheticCheckpoint("pooler-missing", "RobertaForMaskedLM", "RobertaModel"),
    SyntheticCheckpoint(
        "pooler-surplus",
        "BertForMaskedLM",
        layout=_with(
            bert__pooler__dense__weight=("hidden_size", "hidden_size"),
            bert__pooler__dense__bias=("hidden_size",),
        ),
        surplus="pooler",
    ),
    SyntheticCheckpoint(
        "pooler-surplus",
        "RobertaForSequenceClassification",
        layout=_with(
            roberta__pooler__dense__weight=("hidden_size", "hidden_size"),
            roberta__pooler__dense__bias=("hidden_size",),
        ),
        surplus="pooler",
    ),
    SyntheticCheckpoint(
        "head-surplus", "BertForPreTraining", "BertForMaskedLM", surplus="cls.seq_relationship"
    ),
    SyntheticCheckpoint(
        "head-surplus",
        "RobertaForMaskedLM",
        "RobertaForTokenClassification",
        surplus="lm_head.",
        fresh=True,
    ),
    SyntheticCheckpoint(
        "head-surplus",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        surplus="vocab_",
        fresh=True,
    ),
    *(SyntheticCheckpoint("decoder-saved", head) for head in HEADS),
    *(SyntheticCheckpoint("decoder-missing", head, layout=_without(*DECODER)) for head in HEADS),
    SyntheticCheckpoint("decoder-bias-missing", "BertForMaskedLM", layout=_without("decoder.bias")),
    SyntheticCheckpoint(
        "decoder-bias-missing", "RobertaForMaskedLM", layout=_without("decoder.bias")
    ),
    SyntheticCheckpoint(
        "one-token-type",
        "RobertaForSequenceClassification",
        config=(("type_vocab_size", 1), ("num_labels", 3)),
    ),
    *(SyntheticCheckpoint("resized-vocabulary", head, resize=103) for head in HEADS),
    SyntheticCheckpoint("bin-only", "BertForMaskedLM", suffix="bin"),
    SyntheticCheckpoint("bin-only", "GPT2LMHeadModel", layout=_only_body, suffix="bin"),
    SyntheticCheckpoint("half-precision", "GPT2LMHeadModel", dtype=torch.float16, suffix="bin"),
    SyntheticCheckpoint("half-precision", "BertForSequenceClassification", dtype=torch.float16),
    SyntheticCheckpoint(
        "sinusoidal-positions",
        "DistilBertForQuestionAnswering",
        config=(("sinusoidal_pos_embds", True), ("num_labels", 2)),
    ),
    SyntheticCheckpoint("no-architecture", "BertModel", task="base", without=("architectures",)),
    SyntheticCheckpoint(
        "no-model-type", "BertModel", task="base", without=("architectures", "model_type")
    ),
)
