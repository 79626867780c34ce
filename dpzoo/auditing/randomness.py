"""What a model draws at random in a forward pass, and how the draws are held fixed.

Dropout under any name, stochastic depth and the noise of a variational encoder are allowed: these draws do
not depend on the data. But they make two runs differ, so that nothing can be compared. Checks of such a
model replace the draws by constants, equal for all rows.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Fixed = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor | float]


def _middle(drawn: torch.Tensor, given: dict[str, Any]) -> float:
    low = given.get("low", given.get("from")) or 0
    high = given.get("high", given.get("to"))
    return (low + high) // 2 if high is not None else low


def _kept(drawn: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | float:
    # bernoulli_(p) draws with p; bernoulli(x) with x. Nothing is dropped.
    p = given["p"] if given.get("p") is not None else given.get("self", 0.5)
    return (p > 0).to(drawn) if isinstance(p, torch.Tensor) else float(p > 0)


FIXED: dict[str, Fixed] = {
    "bernoulli": _kept,
    "uniform": lambda drawn, given: (given.get("from", 0.0) + given.get("to", 1.0)) / 2,
    "rand": lambda drawn, given: 0.5,
    "randn": lambda drawn, given: 0.5,
    "normal": lambda drawn, given: given.get("mean", 0.0) + 0.5 * given.get("std", 1.0),
    "randint": _middle,
    "random": _middle,
    # Not in order: rows that are shuffled meet other rows.
    "randperm": lambda drawn, given: drawn.sort().values.roll(1),
    "multinomial": lambda drawn, given: (
        torch.arange(drawn.shape[-1], device=drawn.device) % given["self"].shape[-1]
    ),
    "exponential": lambda drawn, given: 1.0,
    "geometric": lambda drawn, given: 1.0,
    "cauchy": lambda drawn, given: 1.0,
    "log_normal": lambda drawn, given: 1.0,
    "poisson": lambda drawn, given: given["self"].round(),
    "_standard_gamma": lambda drawn, given: given["self"],
    "_sample_dirichlet": lambda drawn, given: given["self"] / given["self"].sum(-1, keepdim=True),
}
"""Name of torch's random function, less ``_like`` and a last ``_`` -> the constants in its place."""


class RandomDraws(TorchDispatchMode):
    """Sees what torch draws at random, whatever layer or function asks for it.

    Args:
        fixed: replace the draws by constants.
    """

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        self.seen: dict[str, None] = {}
        self.loose: dict[str, None] = {}
        """Those that have no constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rate = next((n for n in ("dropout_p", "dropout", "p") if n in names), None)
        by_dropout = "attention" in func.name() or "rnn" in func.name()
        if by_dropout and (rate is None or not given.get(rate)):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2].removesuffix("_").removesuffix("_like")
        self.seen[name] = None
        out = func(*args, **kwargs)
        if not self.fixed:
            return out
        if name == "native_dropout":
            return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)
        if name not in FIXED or not isinstance(out, torch.Tensor):
            self.loose[name] = None
            return out
        value = FIXED[name](out, given)
        return out.copy_(value) if isinstance(value, torch.Tensor) else out.fill_(value)


@contextmanager
def fixed_draws(seed: int = 0) -> Iterator[RandomDraws]:
    """Nothing is random: torch's draws are constants, Python's and numpy's begin with one seed."""
    random.seed(seed)
    np.random.seed(seed)
    with RandomDraws(fixed=True) as draws:
        yield draws


def numbers() -> tuple[Any, ...]:
    """Python's and numpy's random states, for comparing."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]


@contextmanager
def kept_states(module: torch.nn.Module) -> Iterator[None]:
    """Random states of torch, Python and numpy are afterwards what they were."""
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    python, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)
