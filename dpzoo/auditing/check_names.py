"""Former names of the audit's checks, which are read until dpzoo 0.2."""

import warnings

FORMER_NAMES = {
    "unit": "privacy_unit",
    "parity": "clipped_sum",
    "split": "microbatching",
    "edges": "edge_cases",
    "freshness": "stale_state",
    "effect": "training_effect",
}
"""Former name of a check -> its name."""


def current_name(check: str) -> str:
    """A check's name, given that or a former one; of a former one it warns."""
    if check not in FORMER_NAMES:
        return check
    name = FORMER_NAMES[check]
    warnings.warn(
        f"The audit's check {check!r} is now {name!r}. Use the new name: dpzoo 0.2 drops the old one.",
        FutureWarning,
        stacklevel=3,
    )
    return name
