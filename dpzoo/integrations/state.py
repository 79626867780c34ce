"""The privacy of a run on disk: what a checkpoint holds, and the steps that have ever been taken.

A checkpoint folder gets two files:

- ``privacy.json``: the accountant's history, epsilon, delta, the noise multiplier and the settings that
  steps depend on. It may be published.
- ``privacy_random_state.pt``: where the noise goes on, and the key of the batches. It is SECRET: whoever
  has it can compute the noise of the steps to come, and of those that were. Only its owner can read it.

Beside the checkpoints, ``privacy_ledger.json`` has the number of steps each run has begun, written before
the step is taken.

What resuming costs. A run is killed after step m, and resumed from the checkpoint of step k < m. Steps
k+1 to m are done again: the same weights, rows, dropout and noise give the same steps, so that whoever saw
the weights of the killed run learns nothing from the resumed one. That holds as long as nothing else is
different. With the same noise and another learning rate (batch size, masks, data), the difference between
the two runs' weights would show gradients without noise. Therefore every setting that a step depends on
has to be what it was, and a resumed run with another is refused. Fresh noise would not be better: the steps
done twice would then have to be paid for twice, though the killed run's are known to nobody.

The reported epsilon covers max(k, m) steps from the moment of resuming: never less than was spent.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dpzoo.errors import InputError

STATE_NAME = "privacy.json"
RANDOM_STATE_NAME = "privacy_random_state.pt"
LEDGER_NAME = "privacy_ledger.json"
VERSION = 1

History = list[tuple[float, float, int]]
"""(noise multiplier, sample rate, steps), as Opacus' accountants keep it."""


@dataclass
class PrivacyState:
    """What has been spent, and on what terms.

    Args:
        run: the run's name, random; a resumed run keeps it.
        steps: logical steps taken.
        mechanism: the accountant's.
        history: the accountant's.
        epsilon: spent, at ``delta``.
        delta: the run's.
        noise_multiplier: of the steps.
        settings: name -> value of everything that steps depend on.
    """

    run: str
    steps: int
    mechanism: str
    history: History
    epsilon: float
    delta: float
    noise_multiplier: float
    settings: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write ``privacy.json``, whole or not at all."""
        _write(Path(folder) / STATE_NAME, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, checkpoint: str | Path) -> PrivacyState:
        """Read a checkpoint's.

        Raises:
            InputError: the folder has no complete privacy state, or one of another version.
        """
        folder = Path(checkpoint)
        for name in (STATE_NAME, RANDOM_STATE_NAME):
            if not (folder / name).is_file():
                raise InputError(
                    f"The checkpoint {folder} has no {name}, so it is not known what has been spent on "
                    f"it, or which noise comes next. Wanted a checkpoint that DPTrainer wrote "
                    f"(without save_only_model and secure_mode). Resume from an earlier one, or train "
                    f"a new model from its weights: the two runs' epsilons then add up."
                )
        fields = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        version = fields.pop("version", None)
        if version != VERSION:
            raise InputError(
                f"{folder / STATE_NAME} has version {version!r}, wanted {VERSION}. Resume with the "
                f"dpzoo that wrote it."
            )
        fields["history"] = [tuple(entry) for entry in fields["history"]]
        return cls(**fields)

    def refuse_changes(self, settings: dict[str, Any]) -> None:
        """Raise unless the settings of a resumed run are those of the run.

        A setting that only one of the two knows (another version of transformers has another set of
        them) is passed over.

        Raises:
            InputError: a setting differs; the message names all that do.
        """
        changed = [
            f"{name}={settings[name]!r} (it was {value!r})"
            for name, value in sorted(self.settings.items())
            if name in settings and settings[name] != value
        ]
        if changed:
            raise InputError(
                f"The run was resumed with {', '.join(changed)}. Steps done again with the same noise "
                f"and another setting would show gradients without noise. Resume with the same "
                f"settings, or train a new model from the checkpoint's weights: the two runs' "
                f"epsilons then add up."
            )


def save_random_state(state: dict[str, Any], folder: str | Path) -> None:
    """Write ``privacy_random_state.pt``, whole or not at all, readable by its owner only."""
    path = Path(folder) / RANDOM_STATE_NAME
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        torch.save(state, file)
    part.replace(path)


def load_random_state(folder: str | Path) -> dict[str, Any]:
    """Read what `save_random_state` wrote."""
    state: dict[str, Any] = torch.load(
        Path(folder) / RANDOM_STATE_NAME, map_location="cpu", weights_only=True
    )
    return state


class Ledger:
    """The steps that each run has begun, in a file beside its checkpoints.

    Args:
        folder: the folder of the checkpoints.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LEDGER_NAME

    def steps(self, run: str) -> int:
        """Steps that a run has begun, as far as is known here."""
        return self._read().get(run, 0)

    def record(self, run: str, steps: int) -> None:
        """Note that a run begins its step number ``steps``; call it before the step is taken."""
        known = self._read()
        if steps > known.get(run, 0):
            _write(self.path, {**known, run: steps})

    def _read(self) -> dict[str, int]:
        if not self.path.is_file():
            return {}
        known: dict[str, int] = json.loads(self.path.read_text(encoding="utf-8"))
        return known


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)
