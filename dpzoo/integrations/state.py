"""The privacy of a run on disk: what a checkpoint holds, and the steps that have ever been taken.

A checkpoint folder gets two files:

- ``privacy.json``: the accountant's history, epsilon, delta, the noise multiplier and the settings that
  steps depend on. It may be published.
- ``privacy_random_state.pt``: the keys of the noise, of the batches and of rows' randomness. It is SECRET:
  whoever has it can compute the noise of all steps. Only its owner can read it.

Next to the checkpoints, ``privacy_ledger.jsonl`` (`dpzoo.ledger`) lists each step before it is taken, with
a keyed digest of what it released.

What resuming costs. A run is killed after step m, and resumed from the checkpoint of step k < m. Steps
k+1 to m are repeated. Their noise is a keyed function of the step and of the sums that it is added to. A
step that is repeated with the same sums is the same step, bit for bit, and reveals nothing new. A step with
anything different (other rows, another dropout, changed data) has independent noise, and is paid for again.
No comparison is needed for that. Settings are compared, because a change halfway is rarely intended.

``privacy.json`` is written last, and has a digest of itself and of every other file: a checkpoint without
it, or with a changed file, is not complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dpzoo.errors import InputError
from dpzoo.files import is_part, whole_file, write_text

log = logging.getLogger(__name__)

STATE_NAME = "privacy.json"
RANDOM_STATE_NAME = "privacy_random_state.pt"
LEDGER_NAME = "privacy_ledger.jsonl"
VERSION = 3

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
        ledger: the ledger's head when the checkpoint was written.
        files: file -> SHA-256 of the checkpoint's other files.
    """

    run: str
    steps: int
    mechanism: str
    history: History
    epsilon: float
    delta: float
    noise_multiplier: float
    settings: dict[str, Any]
    ledger: str
    files: dict[str, str]

    def save(self, folder: str | Path) -> None:
        """Write ``privacy.json``, whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        fields = {"version": VERSION, **asdict(self)}
        text = json.dumps({**fields, "digest": _digest(fields)}, indent=1, sort_keys=True)
        write_text(Path(folder) / STATE_NAME, text + "\n")

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
        try:
            fields = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
            version, digest = fields["version"], fields.pop("digest", None)
            if version == VERSION and digest != _digest(fields):
                raise ValueError("it does not have the digest of what it says")
            del fields["version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{folder / STATE_NAME} is damaged ({error!r}), so it is not known what has been spent. "
                f"Resume from an earlier checkpoint."
            ) from None
        if version != VERSION:
            raise InputError(
                f"{folder / STATE_NAME} has version {version!r}, wanted {VERSION}. Resume with the "
                f"dpzoo that wrote it."
            )
        found = digests(folder)
        wrong = sorted(n for n, digest in fields["files"].items() if found.get(n) != digest)
        if wrong:
            raise InputError(
                f"{folder / wrong[0]} is {'changed' if wrong[0] in found else 'gone'} since the checkpoint "
                f"was written: a run that goes on from it would not be the run. Restore the file, or "
                f"resume from an earlier checkpoint."
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
                f"The run was resumed with {', '.join(changed)}. The account is that of one run on one "
                f"set of terms. Resume with the same settings, or train a new model from the checkpoint's "
                f"weights: the two runs' epsilons then add up."
            )


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def save_random_state(state: dict[str, Any], folder: str | Path) -> None:
    """Write ``privacy_random_state.pt``, whole or not at all, readable by its owner only."""
    with whole_file(Path(folder) / RANDOM_STATE_NAME, mode=0o600) as part:
        torch.save(state, part)


def load_random_state(folder: str | Path) -> dict[str, Any]:
    """Read what `save_random_state` wrote."""
    state: dict[str, Any] = torch.load(
        Path(folder) / RANDOM_STATE_NAME, map_location="cpu", weights_only=True
    )
    return state


def digests(folder: str | Path) -> dict[str, str]:
    """File -> SHA-256 of every file of a checkpoint but ``privacy.json``."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != STATE_NAME and not is_part(path):
            with path.open("rb") as file:
                found[name] = (
                    hashlib.file_digest(file, "sha256").hexdigest()
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(file.read()).hexdigest()
                )
    return found


def newest_whole(folder: str | Path) -> str | None:
    """The newest checkpoint of a folder that is whole; those passed over are named in the log."""
    found = sorted(
        (p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name[11:].isdigit()),
        key=lambda p: -int(p.name[11:]),
    )
    for path in found:
        try:
            PrivacyState.load(path)
        except InputError as error:
            log.warning("%s is passed over: %s", path, error)
            continue
        return str(path)
    if found:
        raise InputError(
            f"No checkpoint of {folder} is whole, of {', '.join(p.name for p in found)}: the log says why "
            f"each was passed over. Give another output_dir to begin a new run."
        )
    return None
