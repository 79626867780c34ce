"""A checkpoint through dpzoo: read, written, read again, and compared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from dpzoo.checkpoints import load_class, lost, read_config
from dpzoo.models.base import PerSampleModel
from dpzoo.parity.functions import LARGE, Say, Tensors, compare_functions
from dpzoo.parity.report import Parity, counted
from dpzoo.pretrained import _class_for
from dpzoo.registry import CLASSES, stock_class

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
    fresh: bool = False,
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
        fresh: pass a source that lacks more than a new head; what it lacks is random, from a fixed seed.
        expected: name -> value that the written weights must have, where the caller knows them.
        say: told what is being done.

    Returns:
        The comparisons. The folder holds the written checkpoint, whether they passed or not.

    Raises:
        InputError: the source cannot be read (the message keeps the reason), or is of another family.
        UnsupportedModelError, UnsupportedConfigError, ConversionError: as `dpzoo.from_pretrained`.
    """
    with torch.random.fork_rng():
        say("loading with transformers")
        config = read_config(source, family)
        cls = _class_for(config, task, str(source))
        kind: Any = dtype or "auto"
        stock, report = _seeded(lambda: load_class(stock_class(cls), source, config, dtype=kind))
        say("loading with dpzoo")
        zoo, _ = _seeded(lambda: load_class(cls, source, config, dtype=kind))
        say("writing")
        zoo.save_pretrained(target)
        say("reading back with transformers")
        again, left = _seeded(
            lambda: load_class(stock_class(cls), target, read_config(target), dtype="auto")
        )
        wanting = [] if fresh else lost(report["missing_keys"], cls, config)
        checks = [
            counted("parameters that the source should have and lacks", wanting),
            counted("parameters with values that are not finite", _not_finite(stock)),
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


def _seeded(load: Callable[[], Any]) -> Any:
    """The result of ``load``; parameters that the checkpoint lacks come out the same at every load."""
    torch.manual_seed(0)
    return load()


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
        name for name, value in wanted.items() if name not in got or not _same(value, got[name])
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, with a NaN equal to the same NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    bits = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)


def _not_finite(model: torch.nn.Module) -> list[str]:
    named = model.named_parameters()
    return sorted(name for name, value in named if not bool(value.isfinite().all()))


def _changed_fields(wanted: PreTrainedConfig, got: PreTrainedConfig) -> list[str]:
    a, b = wanted.to_dict(), got.to_dict()
    return sorted(key for key in (a.keys() | b.keys()) - VOLATILE if a.get(key) != b.get(key))
