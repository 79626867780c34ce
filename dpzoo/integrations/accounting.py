"""What a run has spent, with the steps of killed runs among it."""

from __future__ import annotations

import functools
import math
import secrets
from pathlib import Path
from typing import Any

from opacus.accountants.utils import get_noise_multiplier
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dpzoo.accounting import epsilon_of
from dpzoo.errors import InputError, first_line
from dpzoo.integrations.arguments import PrivacyArguments
from dpzoo.integrations.state import LEDGER_NAME, History, PrivacyState
from dpzoo.ledger import Ledger

MOST_EPSILON = 200.0


class Account:
    """The account of one run, from its first step to its last, over kills and restarts.

    What a run has spent is what its ledger has: each step that was begun once, and once more for each
    further release of it.

    Args:
        mechanism: an Opacus accountant's, "prv" or "rdp".
        folder: where the ledger is kept.
        enters: whether steps are entered in the ledger: by the first of several processes alone.
    """

    def __init__(self, mechanism: str, folder: str, *, enters: bool = True) -> None:
        self.mechanism, self.enters = mechanism, enters
        self.run = secrets.token_hex(8)
        self.begun = 0
        """Steps that were begun, by this process or by a killed one whose run it goes on with."""
        self.delta: float | None = None
        self.sample_rate: float | None = None
        self.noise_multiplier: float | None = None
        self.ledger = Ledger(Path(folder) / LEDGER_NAME)

    def choose_noise(self, privacy: PrivacyArguments, steps: int) -> None:
        """Set the noise multiplier: the one given, or the least that keeps the target after ``steps``."""
        self.noise_multiplier = privacy.noise_multiplier
        if privacy.target_epsilon is not None:
            assert self.delta is not None
            assert self.sample_rate is not None
            terms = privacy.target_epsilon, self.delta, self.sample_rate, steps
            self.noise_multiplier = noise_for(privacy.accountant, *terms)

    @property
    def history(self) -> History:
        """(noise multiplier, sample rate, steps) of everything that was spent."""
        if not self.enters and self.noise_multiplier is not None and not self.ledger.path.exists():
            # On another machine than the ledger.
            return [(self.noise_multiplier, self.sample_rate or 1.0, self.begun)] * bool(self.begun)
        return self.ledger.paid(self.run) if self.begun else []

    @property
    def epsilon(self) -> float:
        """Spent so far, at ``delta``: 0 before the first step, infinite without noise.

        Guarantees:
            Counts every step that was begun. A step that a resumed run does again is counted once if it
            is the same step, bit for bit, and once more if it is not.
        """
        history = self.history
        if not history:
            return 0.0
        if any(noise == 0 for noise, _, _ in history):
            return math.inf
        assert self.delta is not None
        return epsilon_of(self.mechanism, tuple(history), self.delta)

    def begin_step(self, number: int) -> None:
        """Enter step ``number``, counted from 1, before it is taken."""
        assert self.noise_multiplier is not None
        assert self.sample_rate is not None
        if self.enters:
            self.ledger.begin(
                self.run,
                number,
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.sample_rate,
            )
        self.begun = max(self.begun, number)

    def refuse_other_runs(self, folder: str) -> None:
        """Raise unless the output folder is free for a new run.

        Raises:
            InputError: it holds checkpoints of another run.
        """
        found = sorted(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        if found:
            raise InputError(
                f"The output folder {folder} holds another run ({found[0].name}), and a second one would "
                f"mix the two accounts. Resume it with train(resume_from_checkpoint=True), or give another "
                f"output_dir: the two runs' epsilons then add up."
            )

    def resume(self, state: PrivacyState, checkpoint: str) -> None:
        """Continue the run of a checkpoint, and account for what was spent on it since.

        Raises:
            InputError: this account is another run's, and has been used; the run's ledger is gone or not
                the one that the checkpoint was written with.
        """
        if self.begun and state.run != self.run:
            raise InputError(
                f"The checkpoint {checkpoint} is of another run than the {self.begun} steps that this "
                f"DPTrainer has taken. Resume it with a new DPTrainer: the two runs' epsilons then add up."
            )
        ledger = Ledger(Path(checkpoint).resolve().parent / LEDGER_NAME)
        ledger.require(state.run, state.ledger)
        self.run, self.ledger = state.run, ledger
        self.noise_multiplier = state.noise_multiplier
        self.begun = max(state.steps, ledger.steps(self.run))

    def state(self, steps: int, settings: dict[str, Any], files: dict[str, str]) -> PrivacyState:
        """What a checkpoint after ``steps`` steps is to hold."""
        assert self.delta is not None
        assert self.noise_multiplier is not None
        return PrivacyState(
            run=self.run,
            steps=steps,
            mechanism=self.mechanism,
            history=self.history,
            epsilon=self.epsilon,
            delta=self.delta,
            noise_multiplier=self.noise_multiplier,
            settings=settings,
            ledger=self.ledger.head,
            files=files,
        )


@functools.lru_cache(maxsize=64)  # the search takes seconds, and a plan and its run ask alike
def noise_for(mechanism: str, epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier that keeps epsilon after ``steps``, by one of Opacus' accountants.

    Raises:
        InputError: there is none, the accountant cannot compute with these numbers, or would take for ever.
    """
    terms = (
        f"epsilon {epsilon:g} at delta {delta:.3g} after {steps:,} steps of sample rate {rate:.3g}, by "
        f"Opacus' accountant {mechanism}"
    )
    if mechanism == "prv" and epsilon > MOST_EPSILON:
        raise InputError(
            f"The noise for {terms}, is not searched for, wanted an epsilon of at most {MOST_EPSILON:g}: "
            f"above, the search takes hours, and epsilon protects nobody."
        )
    try:
        return float(
            get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant=mechanism,
            )
        )
    except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        raise InputError(
            f"No noise is found for {terms}: {first_line(error)}. Wanted a larger epsilon or delta, or "
            f"fewer steps."
        ) from error
