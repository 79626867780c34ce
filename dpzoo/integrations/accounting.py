"""What a run has spent, with the steps of killed runs among it."""

from __future__ import annotations

import functools
import math
import os
import secrets
from typing import Any

from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier

from dpzoo.errors import InputError
from dpzoo.integrations.arguments import PrivacyArguments
from dpzoo.integrations.state import History, Ledger, PrivacyState


class Account:
    """The account of one run, from its first step to its last, over kills and restarts.

    Args:
        accountant: an Opacus accountant; the private optimizer enters its steps there.
        folder: where the ledger is kept.
    """

    def __init__(self, accountant: Any, folder: str) -> None:
        self.accountant = accountant
        self.run = secrets.token_hex(8)
        self.begun = 0
        """Steps that were begun, by this process or by a killed one whose run it goes on with."""
        self.delta: float | None = None
        self.sample_rate: float | None = None
        self.noise_multiplier: float | None = None
        self._ledger = Ledger(folder)

    def choose_noise(self, privacy: PrivacyArguments, steps: int) -> None:
        """Set the noise multiplier: the one given, or the least that keeps the target after ``steps``."""
        self.noise_multiplier = privacy.noise_multiplier
        if privacy.target_epsilon is not None:
            self.noise_multiplier = float(
                get_noise_multiplier(
                    target_epsilon=privacy.target_epsilon,
                    target_delta=self.delta,
                    sample_rate=self.sample_rate,
                    steps=steps,
                    accountant=privacy.accountant,
                )
            )

    @property
    def epsilon(self) -> float:
        """Spent so far, at ``delta``: 0 before the first step, infinite without noise.

        Guarantees:
            Counts every step that was begun, once. Steps that a resumed run does again are the same
            steps (see `dpzoo.integrations.state`).
        """
        history: History = [tuple(entry) for entry in self.accountant.history]
        missing = self.begun - sum(steps for _, _, steps in history)
        if missing > 0:
            assert self.noise_multiplier is not None
            assert self.sample_rate is not None
            noise, rate, steps = (
                history.pop() if history else (self.noise_multiplier, self.sample_rate, 0)
            )
            history.append((noise, rate, steps + missing))
        if not history:
            return 0.0
        if any(noise == 0 for noise, _, _ in history):
            return math.inf
        assert self.delta is not None
        return epsilon_of(self.accountant.mechanism(), tuple(history), self.delta)

    def begin_step(self, number: int) -> None:
        """Enter step ``number``, counted from 1, here and in the ledger; before it is taken."""
        self.begun = max(self.begun, number)
        self._ledger.record(self.run, number)

    def resume(self, state: PrivacyState, checkpoint: str) -> None:
        """Go on with the run of a checkpoint, and owe what was spent on it since.

        Raises:
            InputError: this account is another run's, and has been used.
        """
        if self.begun and state.run != self.run:
            raise InputError(
                f"The checkpoint {checkpoint} is of another run than the {self.begun} steps that this "
                f"DPTrainer has taken. Resume it with a new DPTrainer: the two runs' epsilons then add up."
            )
        self.run = state.run
        self.noise_multiplier = state.noise_multiplier
        self.accountant.history = list(state.history)
        beside = Ledger(os.path.dirname(os.path.abspath(checkpoint)))
        known = (beside.steps(self.run), self._ledger.steps(self.run))
        self.begun = max(self.begun, state.steps, *known)

    def state(self, steps: int, settings: dict[str, Any]) -> PrivacyState:
        """What a checkpoint after ``steps`` steps is to hold."""
        assert self.delta is not None
        assert self.noise_multiplier is not None
        return PrivacyState(
            run=self.run,
            steps=steps,
            mechanism=self.accountant.mechanism(),
            history=list(self.accountant.history),
            epsilon=self.epsilon,
            delta=self.delta,
            noise_multiplier=self.noise_multiplier,
            settings=settings,
        )


# An accountant may take a second for its answer, and it is asked at every log and checkpoint.
@functools.lru_cache(maxsize=1024)
def epsilon_of(
    mechanism: str, history: tuple[tuple[float, float, int], ...], delta: float
) -> float:
    """Epsilon of a history of (noise multiplier, sample rate, steps), by one of Opacus' accountants."""
    accountant = create_accountant(mechanism)
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))
