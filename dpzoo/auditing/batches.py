"""A batch as something with rows: cut, repeated, changed and given to a model.

A batch is a mapping of keyword arguments or a tuple of positional ones. Its tensors with at least
one dimension have the rows first; everything else (flags, scalars, a tensor of another length) is
passed on unchanged.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dpzoo.errors import InputError

IGNORE_INDEX = -100
MOST_ROWS = 5
"""Rows beyond these are left out: each costs a gradient of the size of the model, several times."""
FEW_ROWS = 3
"""The same of a quick audit."""


class Batch:
    """A batch and its rows.

    Args:
        value: a mapping, a tuple or list, or one tensor.

    Raises:
        InputError: no tensor that has rows.
    """

    def __init__(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = (value,)
        self.value: dict[str, Any] | tuple[Any, ...]
        if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "items")):
            self.value = dict(value.items())
        elif isinstance(value, (tuple, list)):
            self.value = tuple(value)
        else:
            raise InputError(
                f"audit got a batch of type {type(value).__name__}, wanted a dict of keyword arguments "
                f"or a tuple of positional ones, of tensors whose first dimension is the rows."
            )
        with_rows = [v for _, v in self.items() if isinstance(v, torch.Tensor) and v.dim() > 0]
        if not with_rows:
            raise InputError(
                "audit got a batch without tensors, wanted at least one of shape (rows, ...)."
            )
        # The commonest length: a (1, seq) tensor that all rows share may stand first.
        lengths = [len(tensor) for tensor in with_rows]
        self.rows = max(dict.fromkeys(lengths), key=lengths.count)
        self.targets: frozenset[str] = frozenset()
        """Names of further integer tensors in which -100 is taken for no label."""

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) pairs; positional values are named by their index."""
        if isinstance(self.value, dict):
            return list(self.value.items())
        return [(str(i), value) for i, value in enumerate(self.value)]

    def has_rows(self, value: Any) -> bool:
        """Whether a value of the batch is a tensor with one entry for each row."""
        return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == self.rows

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that have rows, by name."""
        return {name: value for name, value in self.items() if self.has_rows(value)}

    def shared(self) -> dict[str, torch.Tensor]:
        """The tensors that do not: one for all rows, by name."""
        return {
            name: value
            for name, value in self.items()
            if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) != self.rows
        }

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Batch":
        """A batch with every tensor that has rows replaced."""
        new = {name: change(name, v) if self.has_rows(v) else v for name, v in self.items()}
        made = Batch.__new__(Batch)
        made.value = new if isinstance(self.value, dict) else tuple(new.values())
        changed = [new[name] for name in self.tensors()]
        made.rows, made.targets = len(changed[0]), self.targets
        return made

    def take(self, indices: Iterable[int]) -> "Batch":
        """The rows of the given indices, in that order."""
        wanted = torch.tensor(list(indices), dtype=torch.long)
        return self.map(lambda _, tensor: tensor[wanted.to(tensor.device)])

    def without(self, row: int) -> "Batch":
        """All rows but one."""
        return self.take(i for i in range(self.rows) if i != row)

    def to(self, dtype: torch.dtype) -> "Batch":
        """Floating point tensors, shared ones too, in another dtype."""
        new = {
            name: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for name, v in self.items()
        }
        made = self.map(lambda _, tensor: tensor)
        made.value = new if isinstance(self.value, dict) else tuple(new.values())
        return made

    def call(self, model: Callable[..., Any]) -> Any:
        """The model's outputs."""
        return model(**self.value) if isinstance(self.value, dict) else model(*self.value)

    # --- what the checks change in a row ------------------------------------------------------------

    def token_labels(self, *, sure: bool = False) -> dict[str, torch.Tensor]:
        """Integer labels, several a row, some of which may be ignored; by name.

        Args:
            sure: leave out what is known by trying alone.
        """
        return {
            name: tensor
            for name, tensor in self.tensors().items()
            if tensor.dim() > 1
            and not tensor.is_floating_point()
            and (
                re.search("label|target", name)
                or (
                    name in self.targets and not (sure and not bool((tensor == IGNORE_INDEX).any()))
                )
            )
        }

    def masks(self) -> dict[str, torch.Tensor]:
        """Tensors that say which positions of a row count, by name."""
        return {
            name: tensor
            for name, tensor in self.tensors().items()
            if tensor.dim() > 1 and ("mask" in name or tensor.dtype == torch.bool)
        }

    def shorter(self, rows: Sequence[int]) -> "Batch":
        """With the second half of each sequence of some rows masked."""

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name not in self.masks():
                return tensor
            tensor = tensor.clone()
            for row in rows:
                for sequence in tensor[row].view(-1, tensor.shape[-1]):
                    counted = sequence.nonzero().flatten()
                    sequence[counted[(len(counted) + 1) // 2 :]] = 0
            return tensor

        return self.map(change)

    def floats(self) -> dict[str, torch.Tensor]:
        """Floating point tensors that have rows, by name."""
        return {name: t for name, t in self.tensors().items() if t.is_floating_point()}

    def ignoring(self, rows: Sequence[int], keep: int = 0) -> "Batch":
        """With all but the last ``keep`` token labels of some rows ignored."""

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name not in self.token_labels():
                return tensor
            tensor = tensor.clone()
            for row in rows:
                flat = tensor[row].reshape(-1)
                labelled = (flat != IGNORE_INDEX).nonzero().flatten()
                flat[labelled[: len(labelled) - keep]] = IGNORE_INDEX
                tensor[row] = flat.reshape(tensor[row].shape)
            return tensor

        return self.map(change)

    def scaled(self, rows: Sequence[int], factor: float) -> "Batch":
        """With the floating point values of some rows multiplied."""

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            tensor = tensor.clone()
            tensor[list(rows)] *= factor
            return tensor

        return self.map(change)

    def _mask(self) -> torch.Tensor | None:
        """The mask of the tokens, 1 or 0 for each; None where there is none, or one of another kind."""
        mask = self.tensors().get("attention_mask")
        if mask is None or mask.dim() < 2 or not bool(((mask == 0) | (mask == 1)).all()):
            return None
        others = [n for n, t in self.tensors().items() if t is not mask and self._along(mask, n, t)]
        return mask if others else None

    def _along(self, mask: torch.Tensor, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the mask's positions."""
        if name.startswith("decoder"):
            return False
        return tensor.shape == mask.shape or (
            "embeds" in name and tensor.shape[:-1] == mask.shape and tensor.dim() > 2
        )

    def padded(self, pad_id: int, more: int = 3) -> "Batch | None":
        """With every sequence padded further on the right; None without an ``attention_mask``."""
        mask = self._mask()
        if mask is None:
            return None

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if not self._along(mask, name, tensor):
                return tensor
            fill = pad_id if name == "input_ids" else 0
            fill = IGNORE_INDEX if name in self.token_labels() else fill
            shape = list(tensor.shape)
            axis = mask.dim() - 1
            shape[axis] = more
            padding = tensor.new_full(shape, 1 if "embeds" in name else fill)
            return torch.cat([tensor, padding], dim=axis)

        return self.map(change)

    def trimmed(self) -> "Batch":
        """Without the positions at either end that are padding in every row, as a collator pads.

        Positions that have a label stay; so do those before the first token, where the batch has indices
        of positions.
        """
        mask = self._mask()
        if mask is None or not bool(mask.any()):
            return self
        counted = mask.bool()
        for labels in self.token_labels().values():
            if labels.shape == mask.shape:
                counted = counted | (labels != IGNORE_INDEX)
        used = counted.reshape(-1, mask.shape[-1]).any(0).nonzero().flatten()
        indices = any(
            re.search("_positions$|_token_ids$", name) and tensor.shape != mask.shape
            for name, tensor in self.tensors().items()
        )
        first = 0 if indices else int(used.min())
        count, axis = int(used.max()) + 1 - first, mask.dim() - 1
        return self.map(
            lambda name, t: t.narrow(axis, first, count) if self._along(mask, name, t) else t
        )

    def fills_its_length(self) -> bool | None:
        """Whether rows are padded to the longest: some are padded, and some not. None: none is."""
        mask = self._mask()
        if mask is None or bool(mask.bool().all()):
            return None
        return bool(mask.bool().reshape(-1, mask.shape[-1]).all(1).any())


def prepared(
    batch: Batch, sizes: Iterable[int], at_most: int = MOST_ROWS
) -> tuple[Batch, list[str]]:
    """A batch of 3 to ``at_most`` rows whose number is unlike every other dimension, and remarks.

    With as many rows as tokens, a gradient taken along the wrong axis has the right shape, and its
    sum is right too.

    Args:
        batch: the user's.
        sizes: dimensions of the model's parameters, avoided where possible.
        at_most: rows; one or two more, where that is needed to avoid a number.
    """
    inner = {size for t in batch.tensors().values() for size in t.shape[1:]}
    inner |= {size for tensor in batch.shared().values() for size in tensor.shape}
    if batch.rows == 0:
        raise InputError("audit got an empty batch, wanted at least one row.")
    most = max(3, min(batch.rows, at_most))
    preferred = [*range(most, 2, -1), *range(most + 1, most + 4)]
    rows = next((n for n in preferred if n not in inner | set(sizes)), None)
    if rows is None or rows > MOST_ROWS:
        rows = next((n for n in preferred if n not in inner), most)
    if rows == batch.rows:
        return batch, []
    why = (
        f"no more than {at_most} are taken"
        if batch.rows > at_most and rows == at_most
        else "at least 3 are needed"
        if batch.rows < 3 and rows == 3
        else f"so that their number is unlike every other dimension ({_list(inner | set(sizes))})"
    )
    remark = f"the batch has {batch.rows} rows; the checks run on {rows}, {why}"
    return batch.take(i % batch.rows for i in range(rows)), [remark]


def _list(sizes: Iterable[int]) -> str:
    small = sorted(size for size in sizes if size <= 2 * MOST_ROWS)
    return ", ".join(map(str, small)) if small else "none small"
