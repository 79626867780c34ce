"""Well-known public checkpoints: what they are, how large, and how their keys are laid out.

The data is in ``catalogue.toml`` next to this file, with its sources. Nothing here contacts a hub.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    PreTrainedConfig,
    RobertaConfig,
)

from dpzoo.registry import CLASSES, class_by_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint.

    Attributes:
        id: on the Hugging Face hub.
        family: transformers' ``model_type``.
        layers, hidden, heads, vocabulary, positions: its sizes; the feed-forward part is 4 x hidden.
        parameters: of ``architecture``, or of the family's base class if that is None; a tied weight
            counts once.
        source: where the sizes were read.
        architecture: the class that its config names; None where it names none or that is not known.
        token_types: rows of the token type table; None for a family without one.
        labels: classes of a classifier; None for another head.
        sinusoidal: whether positions are computed (DistilBERT).
        quirks: how its keys differ from what the class saves today, as names in `quirks`.
        quirk_source: where the quirks were read.
    """

    id: str
    family: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    positions: int
    parameters: int
    source: str
    architecture: str | None = None
    token_types: int | None = None
    labels: int | None = None
    sinusoidal: bool = False
    quirks: tuple[str, ...] = ()
    quirk_source: str | None = None

    @property
    def task(self) -> str:
        """The task of ``architecture``, by dpzoo's name; "base" without one."""
        if self.architecture is None:
            return "base"
        cls = class_by_name(self.architecture)
        return next(task for (_, task), other in CLASSES.items() if other is cls)

    def config(self) -> PreTrainedConfig:
        """A config with the checkpoint's sizes; the rest as the family has it."""
        settings: dict[str, Any] = {"vocab_size": self.vocabulary}
        if self.architecture is not None:
            settings["architectures"] = [self.architecture]
        if self.labels is not None:
            settings["num_labels"] = self.labels
        feed_forward = 4 * self.hidden
        if self.family == "gpt2":
            return GPT2Config(
                n_embd=self.hidden,
                n_layer=self.layers,
                n_head=self.heads,
                n_positions=self.positions,
                **settings,
            )
        if self.family == "distilbert":
            return DistilBertConfig(
                dim=self.hidden,
                n_layers=self.layers,
                n_heads=self.heads,
                hidden_dim=feed_forward,
                max_position_embeddings=self.positions,
                sinusoidal_pos_embds=self.sinusoidal,
                **settings,
            )
        return {"bert": BertConfig, "roberta": RobertaConfig}[self.family](
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=feed_forward,
            max_position_embeddings=self.positions,
            type_vocab_size=self.token_types,
            **settings,
        )


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((files("dpzoo") / "catalogue.toml").read_text(encoding="utf-8"))


def catalogue() -> tuple[Checkpoint, ...]:
    """The checkpoints, in the order of the file."""
    return tuple(
        Checkpoint(**{**entry, "quirks": tuple(entry.get("quirks", ()))})
        for entry in _data()["checkpoints"]
    )


def quirks() -> Mapping[str, str]:
    """Name of a quirk -> what it is."""
    return MappingProxyType(dict(_data()["quirks"]))
