"""Odd arguments of forward passes, one at a time, and what becomes of each.

Run ``python -m tests.odd_inputs`` for the list of those that end neither in a clear error nor as in stock.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import dpzoo
from tests.support import (
    LABEL_KEYS,
    NAMES,
    batch_for,
    largest_error,
    stock_model,
    without_labels,
)


def _put(value: torch.Tensor, number: float) -> torch.Tensor:
    changed = value.clone()
    changed.view(-1)[1] = number
    return changed


ODD: dict[str, Callable[[torch.Tensor], Any]] = {
    "list": lambda v: v.tolist(),
    "array": lambda v: v.numpy(),
    "scalar": lambda v: v.reshape(-1)[0],
    "flat": lambda v: v.reshape(-1),
    "first row": lambda v: v[0],
    "one row": lambda v: v[:1],
    "rank + 1, front": lambda v: v.unsqueeze(0),
    "rank + 1, middle": lambda v: v.unsqueeze(1),
    "rank + 1, back": lambda v: v.unsqueeze(-1),
    "a row less": lambda v: v[:-1],
    "a row more": lambda v: torch.cat([v, v[:1]]),
    "shorter": lambda v: v[..., :-1],
    "longer": lambda v: torch.cat([v, v[..., :1]], -1),
    "no length": lambda v: v[..., :0],
    "transposed": lambda v: v.transpose(0, -1),
    "float32": lambda v: v.float(),
    "float16": lambda v: v.half(),
    "bool": lambda v: v.bool(),
    "uint8": lambda v: v.to(torch.uint8),
    "int16": lambda v: v.to(torch.int16),
    "int32": lambda v: v.to(torch.int32),
    "complex": lambda v: v.to(torch.complex64),
    "-1": lambda v: _put(v, -1),
    "-101": lambda v: _put(v, -101),
    "too large": lambda v: _put(v, 10**6),
    "largest": lambda v: _put(v, 2**63 - 1) if not v.is_floating_point() else _put(v, 1e30),
}

CLEAR, STOCK, MORE, UNCLEAR, WRONG = (
    "clear error",
    "as stock",
    "taken, where stock fails",
    "unclear error",
    "silently wrong",
)


def cases(name: str, embeds: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(argument, what is odd about it, batch)."""
    torch.manual_seed(0)
    batch = batch_for(name, embeds=embeds, dtype=torch.float32)
    length = (batch["inputs_embeds"] if embeds else batch["input_ids"]).shape
    length = length[:-1] if embeds else length
    if len(length) == 2:  # stock takes no others
        batch["position_ids"] = torch.arange(length[-1]).expand(length).contiguous() + 2
    for argument, value in batch.items():
        for odd, change in ODD.items():
            if argument == "inputs_embeds" and odd in ("too large", "largest", "-1", "-101"):
                continue
            try:
                changed = change(value)
            except (RuntimeError, IndexError):  # no such change of this value
                continue
            if (
                isinstance(changed, torch.Tensor)
                and (changed.dtype, changed.shape) == (value.dtype, value.shape)
                and torch.equal(changed, value)
            ):
                continue
            yield argument, odd, {**batch, argument: changed}


def outcome(
    name: str, ours: Any, stock: Any, argument: str, batch: dict[str, Any]
) -> tuple[str, str]:
    """What becomes of a batch, and the error."""
    ours.config.problem_type = stock.config.problem_type = None
    try:
        got = ours(**batch)
    except dpzoo.InputError as error:
        said = str(error)
        named = any(f"{name} of " in said or f"{name} have " in said for name in batch)
        named = named or f"{argument} with the value" in said or "got inputs of shape" in said
        return (CLEAR if named and "wanted" in said and len(said) < 400 else UNCLEAR), said
    except Exception as error:
        return UNCLEAR, f"{type(error).__name__}: {error}"
    try:
        wanted = stock(**batch)
    except Exception:
        return MORE, ""
    if argument not in LABEL_KEYS:
        for key, value in stock(**without_labels(batch)).items():
            if not isinstance(value, torch.Tensor):
                continue
            if got[key].shape != value.shape or largest_error(got[key], value) > 1e-5:
                return WRONG, f"{key}: {tuple(got[key].shape)}, {tuple(value.shape)}"
    elif len(batch[argument]) and wanted.get("loss") is not None and got.loss is None:
        return WRONG, "no loss"
    return STOCK, ""


def sweep(names: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """(class, argument, what is odd, outcome, error) of every case."""
    for name in names:
        stock = stock_model(name, torch.float32)
        ours = dpzoo.convert(stock)
        for embeds in (False, True):
            for argument, odd, batch in cases(name, embeds):
                if embeds and argument != "inputs_embeds":
                    continue
                with torch.no_grad():
                    yield (name, argument, odd, *outcome(name, ours, stock, argument, batch))


if __name__ == "__main__":
    counts: Counter[str] = Counter()
    for name, argument, odd, found, error in sweep(sys.argv[1:] or NAMES):
        counts[found] += 1
        if found not in (CLEAR, STOCK):
            print(f"{name} {argument} {odd}: {found} {error[:160]}")
    print(dict(counts))
