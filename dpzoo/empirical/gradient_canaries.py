"""Canaries in the space of gradients: rows whose gradient is a coordinate of their own (white box)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dpzoo.empirical.canaries import thrown
from dpzoo.errors import InputError
from dpzoo.files import whole_file

STRENGTH = 1e4
"""Norm of a canary's gradient before it is clipped: above any clipping norm that is in use."""


class GradientCanaries(nn.Module):
    """Rows that add C times a coordinate of their own to the clipped sum, if their coin says so.

        canaries = dpzoo.GradientCanaries(500)       # 500 further rows of the data set, of loss 0
        canaries.join(model)                         # model(..., canary=numbers) from now on
        ...
            losses = losses + canaries.term          # (rows,), all 0: the gradient is what counts
            ...
            optimizer.step()
            canaries.see(step, expected_batch_size / C)
        canaries.leave(model)
        report = dpzoo.audit_run(canaries, canaries.scores(noise, rate), delta=delta, epsilon=epsilon)

    The coordinates are entries of ``weight``, a parameter beside the model's that is trained, clipped and
    noised with them. No other row has a gradient there, so canaries disturb nobody, and nobody them.

    A canary is a row of the data set whatever its coin says, drawn and counted like any other; the coin
    decides between a gradient of norm C and one of 0. The number of rows, the sample rate, the expected
    batch size and epsilon are the same for all coins.

    Args:
        number: of canaries.
        coins: of a run whose coins were kept; by default they are thrown.
        seed: fixes the coins, for tests; by default they come from the operating system.

    Raises:
        InputError: fewer than two; coins of another number.

    Guarantees:
        The training's guarantee for every private row is what it was, by the account of all rows.

    Source: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), section 6: canaries that are gradients.
    """

    def __init__(self, number: int, *, coins: Any = None, seed: int | None = None) -> None:
        super().__init__()
        self.coins = thrown(number, coins, seed)
        self.weight = nn.Parameter(torch.zeros(number + 1, 1))
        """(canaries + 1, 1): the last entry is that of all other rows, which have no gradient in it."""
        self.term: Any = 0.0
        """(rows,), all 0, of the last forward pass: to be added to the rows' losses."""
        self._own: Any = None  # the forward that a model had set on itself
        self._joined: Any = None
        self.seen: dict[int, np.ndarray] = {}
        """Step -> (canaries,), the released gradient in units of C."""

    def __len__(self) -> int:
        return len(self.coins)

    @property
    def none(self) -> int:
        """The number of rows that are no canaries."""
        return len(self)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Zeros that have the canaries' gradients.

        Args:
            numbers: (rows,) int64, which canary each row is, or `none`.

        Returns:
            (rows,), 0; the gradient of a row whose coin is in is `STRENGTH` at its entry of ``weight``.
        """
        strengths = torch.tensor([*(STRENGTH * self.coins), 0.0], device=numbers.device)[:, None]
        entries = F.embedding(numbers, self.weight) * F.embedding(numbers, strengths.float())
        return (entries - entries.detach()).squeeze(-1)

    def join(self, model: nn.Module) -> None:
        """Become a part of a model, whose forward then takes ``canary=numbers`` and leaves `term`.

        Raises:
            InputError: it has something called canaries, as others that did not leave.
        """
        if hasattr(model, "canaries"):
            raise InputError(
                f"GradientCanaries.join() got a {type(model).__name__} that has an attribute canaries "
                f"({type(model.canaries).__name__}), wanted one without. Let other canaries leave() first."
            )
        forward, self._own = model.forward, model.__dict__.get("forward")

        def joined(*args: Any, canary: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if canary is not None:
                self.term = self(canary)
            return forward(*args, **kwargs)

        model.add_module("canaries", self)
        model.forward = self._joined = joined

    def leave(self, model: nn.Module) -> None:
        """Leave the model as it was: the parameter is no part of what is published.

        Raises:
            InputError: it is not the model that they joined, or its forward was replaced since.
        """
        if (
            model._modules.get("canaries") is not self
            or model.__dict__.get("forward") is not self._joined
        ):
            raise InputError(
                f"GradientCanaries.leave() got a {type(model).__name__}, wanted the model that they joined "
                f"and its forward as they left it. Undo first what was put on it later."
            )
        del model._modules["canaries"], model.forward
        if self._own is not None:
            model.forward = self._own

    def see(self, step: int, scale: float) -> None:
        """Keep what a step released of the canaries.

        Args:
            step: its number; a step that is done again is kept once.
            scale: from the released gradient to units of C: expected batch size / C for "mean".
        """
        assert self.weight.grad is not None
        self.seen[step] = self.weight.grad[:-1, 0].float().cpu().numpy() * scale

    def scores(self, noise_multiplier: float, sample_rate: float) -> np.ndarray:
        """The log of how much likelier what was released is with each canary in than out, (canaries,).

        No test of a coin is better, if noise and rate are what they are said to be. If they are not, the
        scores are as valid, and guess worse.

        Args:
            noise_multiplier: of the steps.
            sample_rate: of the steps.

        Raises:
            InputError: no step was seen.
        """
        if not self.seen:
            raise InputError("GradientCanaries.scores() saw no step, wanted see() after each.")
        released = np.stack([self.seen[step] for step in sorted(self.seen)]).astype(np.float64)
        variance = max(noise_multiplier, 1e-3) ** 2
        with np.errstate(divide="ignore"):  # at rate 1
            drawn, passed_over = np.log(sample_rate), np.log1p(-sample_rate)
        likelier: np.ndarray = np.logaddexp(passed_over, drawn + (2 * released - 1) / 2 / variance)
        return likelier.sum(0)

    def save(self, path: str | Path) -> None:
        """Record coins and what was seen, readable by the owner only: coins are secret until the end."""
        steps = sorted(self.seen)
        seen = np.array([self.seen[step] for step in steps]).reshape(len(steps), len(self))
        with whole_file(path, mode=0o600) as part, part.open("wb") as file:
            np.savez(file, coins=self.coins, steps=np.array(steps, dtype=np.int64), seen=seen)

    def load(self, path: str | Path) -> None:
        """Go on with what `save` recorded.

        Raises:
            InputError: it is of another number of canaries.
        """
        with np.load(path) as kept:
            self.coins = thrown(len(self), kept["coins"], None)
            self.seen = dict(zip(kept["steps"].tolist(), kept["seen"], strict=True))
