"""The privacy card: what a saved model guarantees, for people (README.md) and for programs (privacy.json).

Both may be published: they have what the guarantee is about, no secrets, and no losses of training rows.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dpzoo.files import whole_file, write_text
from dpzoo.integrations.plan import rounded_up
from dpzoo.integrations.state import STATE_NAME

CARD_NAME = "README.md"
TAGS = ("differential-privacy", "dpzoo")
UNPUBLISHED = (
    *("checkpoint-*", "_*", "*privacy_random_state*", "privacy_ledger*", "runs/*", "*tfevents*"),
    *("trainer_state.json", "*_results.json", "*not_private*", "logs/*", "*.log", "wandb/*"),
)
"""Patterns of files beside a model that are secret or tell of training rows: none of them is uploaded."""

_BEGIN, _END = "<!-- privacy card: written by dpzoo -->", "<!-- end of the privacy card -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("dpzoo", "opacus", "torch", "transformers")}


@dataclass(frozen=True)
class PrivacyCard:
    """The terms on which a model was trained.

    Args:
        epsilon: spent at ``delta``; infinite without noise, 0 before the first step.
        delta: of the guarantee.
        accountant: "prv" or "rdp", of Opacus.
        noise_multiplier: sigma: the noise's standard deviation in units of C.
        clipping_norm: C, the norm that a unit's gradient is clipped to.
        sample_rate: chance of a unit to be in a step.
        steps: steps taken.
        units: of the training data: rows, if the unit is one.
        trained: what was trained.
        clipping: "flat" or "automatic".
        unit: what is protected.
        neighbours: which data sets count as neighbours.
        tuned: which hyper-parameters were chosen, on which data.
        notes: what else bears on the guarantee.
        measured: what canaries among the units showed (`dpzoo.audit_run`): epsilon_at_least, the largest
            bound, and what it is assuming; epsilon_at_least_assuming_nothing; both with that confidence, at
            delta, where epsilon_accounted is accounted. None without canaries.
        versions: package -> version.
    """

    epsilon: float
    delta: float
    accountant: str
    noise_multiplier: float
    clipping_norm: float
    sample_rate: float
    steps: int
    units: int
    trained: str
    clipping: str = "flat"
    unit: str = "one row of the training data"
    neighbours: str = "adding or removing one unit"
    tuned: str | None = None
    notes: tuple[str, ...] = ()
    measured: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=_versions)

    def to_json(self) -> str:
        """The fields as JSON; an infinite epsilon is null."""
        fields = asdict(self)
        fields["epsilon"] = self.epsilon if math.isfinite(self.epsilon) else None
        return json.dumps({"kind": "privacy card", **fields}, indent=1) + "\n"

    def statement(self) -> str:
        """The guarantee in one line."""
        return (
            f"epsilon {rounded_up(self.epsilon)} at delta {rounded_up(self.delta)} ({self.accountant}): "
            f"{self.steps} steps "
            f"with noise multiplier {self.noise_multiplier:.4g}, clipping norm {self.clipping_norm:g} "
            f"({self.clipping}), sample rate {self.sample_rate:.4g} of {self.units} units; for "
            f"{self.neighbours}; the unit is {self.unit}"
        )

    def to_markdown(self) -> str:
        """The section of README.md."""
        private = math.isfinite(self.epsilon) and self.steps > 0
        epsilon = f"**{rounded_up(self.epsilon)}**" if private else "none"
        rows = {
            "Unit of privacy": self.unit,
            "Neighbouring data sets": self.neighbours,
            "Epsilon": epsilon,
            **self._measured(),
            "Delta": f"{rounded_up(self.delta)} (1 / units is {1 / max(self.units, 1):.3g})",
            "Accountant": f"{self.accountant} (Opacus)",
            "Noise multiplier": f"{self.noise_multiplier:.6g} (standard deviation, in units of C)",
            "Clipping norm C": f"{self.clipping_norm:g}, {self.clipping} clipping of each unit's gradient",
            "Sampling": f"Poisson, rate {self.sample_rate:.6g}",
            "Steps": f"{self.steps}",
            "Units": f"{self.units} (counted as public)",
            "Trained": self.trained,
            "What was tuned on what": self.tuned or "not stated",
            "Versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        says = (
            "The weights were trained with DP-SGD. What one unit of the training data, more or less, can "
            "change about them is bounded by epsilon and delta."
            if private
            else "These weights have **no** privacy guarantee from training: "
            + ("no noise was added." if self.steps else "they have not been trained.")
        )
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        covered = (
            "The guarantee does not cover losses and metrics on private rows, choices made by looking at "
            "such rows (hyper-parameters, the best of several checkpoints), the number of units and the "
            "set of classes, other models trained on the same rows (their epsilons add up), or the data of "
            "the pretrained model."
        )
        notes = "".join(f"\n- {note}" for note in self.notes)
        return (
            f"{_BEGIN}\n## Privacy\n\n{says}\n\n| | |\n|---|---|\n{table}\n\n{covered}\n"
            f"{notes}{chr(10) if notes else ''}{_END}\n"
        )

    def _measured(self) -> dict[str, str]:
        if self.measured is None:
            return {}
        bounds = {
            self.measured["assuming"]: self.measured["epsilon_at_least"],
            "nothing": self.measured["epsilon_at_least_assuming_nothing"],
        }
        found = "; ".join(
            f"at least {math.floor(100 * epsilon) / 100:.2f}, assuming {assumed}"
            for assumed, epsilon in bounds.items()
        )
        return {
            "Epsilon, measured": f"{found}; at delta {self.measured['delta']:.3g}, where "
            f"{rounded_up(self.measured['epsilon_accounted'])} is accounted; with "
            f"{self.measured['confidence']:.0%} confidence, by {self.measured['canaries']:.0f} canaries "
            f"among the units"
        }

    def write(self, folder: str | Path, *, state: bool = True, **metadata: Any) -> None:
        """Write README.md and privacy.json.

        In a README.md that is there, the section is replaced or added, and the rest stays.

        Args:
            folder: of the model.
            state: False for README.md alone: a checkpoint's privacy.json is `PrivacyState`'s.
            **metadata: fields of `huggingface_hub.ModelCardData`, such as base_model.
        """
        path = Path(folder) / CARD_NAME
        if path.is_file():
            card = ModelCard.load(path, ignore_metadata_errors=True)
            text = _SECTION.sub("", card.text).rstrip("\n")
        else:
            name = metadata.get("model_name") or Path(folder).resolve().name
            empty = ModelCardData(library_name="transformers").to_yaml()
            card = ModelCard(f"---\n{empty}\n---\n")
            text = f"\n# {name}"
        card.text = f"{text}\n\n{self.to_markdown()}"
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
        for key, value in metadata.items():
            if value is not None and key != "tags":
                setattr(card.data, key, value)
        with whole_file(path) as part:
            card.save(part)
        if state:
            write_text(Path(folder) / STATE_NAME, self.to_json())


def publishable(values: dict[str, Any]) -> dict[str, Any]:
    """A log entry or metrics without what is computed from training rows and not private."""
    return {key: v for key, v in values.items() if key not in ("loss", "train_loss", "grad_norm")}
