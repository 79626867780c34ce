"""A checkpoint through dpzoo: read, written, read again, and compared."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from dpzoo.errors import DpzooError, InputError
from dpzoo.models.base import PerSampleModel
from dpzoo.parity.functions import LARGE, Say, Tensors, compare_functions
from dpzoo.parity.report import Parity, counted
from dpzoo.pretrained import _class_for
from dpzoo.registry import CLASSES, FAMILIES, model_class, stock_class

VOLATILE = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
)
"""Config fields that say where a model came from and how it was stored, not what it computes."""


def convert_checkpoint(
    source: str | Path,
    target: Path,
    *,
    task: str | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    expected: Tensors | None = None,
    say: Say = lambda text: None,
) -> Parity:
    """Write a checkpoint through dpzoo and compare stock, dpzoo and what was written.

    Needs memory for about three copies of the model in the dtype of the comparison, and two gradients.

    Args:
        source: hub id or folder: any file format that transformers reads.
        target: a folder to write to, which exists and is empty.
        task: as in `dpzoo.from_pretrained`; by default that of the class that the checkpoint was
            saved from.
        family: of a checkpoint whose config.json has no ``model_type``.
        dtype: of the written weights; by default as they are stored.
        expected: name -> value that the written weights must have, where the caller knows them.
        say: told what is being done.

    Returns:
        The comparisons. The folder holds the written checkpoint, whether they passed or not.

    Raises:
        InputError: the source cannot be read (the message keeps the reason), or is of another family.
        UnsupportedModelError, UnsupportedConfigError, ConversionError: as `dpzoo.from_pretrained`.
    """
    with _quiet(), torch.random.fork_rng():
        say("loading with transformers")
        config = _read_config(source, family)
        cls = _class_for(config, task, str(source))

        def load(by: Any) -> Any:
            settings = {"dtype": dtype or "auto", "output_loading_info": True}
            return _seeded(
                lambda: by.from_pretrained(source, config=copy.deepcopy(config), **settings), source
            )

        stock, report = load(stock_class(cls))
        say("loading with dpzoo")
        zoo, _ = load(cls)
        say("writing")
        zoo.save_pretrained(target)
        say("reading back with transformers")
        again, left = _seeded(
            lambda: stock_class(cls).from_pretrained(
                target, dtype="auto", output_loading_info=True
            ),
            target,
        )
        checks = [
            counted("keys of the written file that are missing or left over", _loose_ends(left)),
            counted("parameters, stock and dpzoo", _unequal(stock.state_dict(), zoo.state_dict())),
            counted(
                "parameters, stock and written", _unequal(stock.state_dict(), again.state_dict())
            ),
            counted(
                "config fields, stock and written", _changed_fields(stock.config, again.config)
            ),
        ]
        if expected is not None:
            checks.append(
                counted("parameters, expected and written", _missing(expected, again.state_dict()))
            )
        stored = str(next(again.parameters()).dtype).removeprefix("torch.")
        count = sum(parameter.numel() for parameter in stock.parameters())
        wide = torch.float64 if count <= LARGE else torch.float32
        checks += compare_functions(_task_of(cls), stock, zoo, again, wide, say)
    return Parity(
        model=cls.__name__,
        task=_task_of(cls),
        parameters=count,
        stored=stored,
        compared=str(wide).removeprefix("torch."),
        fresh=tuple(sorted(report["missing_keys"])),
        unused=tuple(sorted(report["unexpected_keys"])),
        checks=tuple(checks),
    )


# --- loading ------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no tables of new parameters: the comparison reports both itself."""
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _read(load: Callable[[], Any], source: str | Path) -> Any:
    """The result of ``load``, with an error of ours for whatever a file from elsewhere provokes."""
    try:
        return load()
    except DpzooError:
        raise
    except Exception as error:
        raise InputError(
            f"{source} cannot be loaded by transformers ({type(error).__name__}): {error}"
        ) from error


def _read_config(source: str | Path, family: str | None) -> PreTrainedConfig:
    """The config; old ones may not say of which family they are."""
    try:
        config = _read(lambda: AutoConfig.from_pretrained(source), source)
    except InputError as error:
        if "model_type" not in str(error):
            raise
        if family is None:
            raise InputError(
                f"{error}\nIf you know its family, pass it: --family, one of: {', '.join(FAMILIES)}."
            ) from error
        config_class = stock_class(model_class(family, "base")).config_class
        return _read(lambda: config_class.from_pretrained(source), source)
    if family not in (None, config.model_type):
        raise InputError(f"{source} is of the family {config.model_type!r}, not {family!r}.")
    return config


def _seeded(load: Callable[[], Any], source: str | Path) -> Any:
    """As `_read`; parameters that the checkpoint lacks come out the same at every load."""
    torch.manual_seed(0)
    return _read(load, source)


def _task_of(cls: type[PerSampleModel]) -> str:
    return next(task for (_, task), other in CLASSES.items() if other is cls)


# --- parameters and configs ---------------------------------------------------------------------


def _loose_ends(report: Mapping[str, Any]) -> list[str]:
    return sorted(str(entry) for entries in report.values() for entry in entries)


def _unequal(wanted: Tensors, got: Tensors) -> list[str]:
    """Names that only one side has, and names whose values differ in a bit, in dtype or in shape."""
    return sorted(wanted.keys() ^ got.keys()) + _missing(
        {name: value for name, value in wanted.items() if name in got}, got
    )


def _missing(wanted: Tensors, got: Tensors) -> list[str]:
    """Names whose wanted value ``got`` does not have."""
    return sorted(
        name
        for name, value in wanted.items()
        if name not in got or got[name].dtype != value.dtype or not torch.equal(got[name], value)
    )


def _changed_fields(wanted: PreTrainedConfig, got: PreTrainedConfig) -> list[str]:
    a, b = wanted.to_dict(), got.to_dict()
    return sorted(key for key in (a.keys() | b.keys()) - VOLATILE if a.get(key) != b.get(key))
