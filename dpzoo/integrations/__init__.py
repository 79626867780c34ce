"""dpzoo inside other libraries' training loops. Import it by name: it needs accelerate, dpzoo does not.

from dpzoo.integrations import DPTrainer, PrivacyArguments
"""

import importlib.util

try:
    from dpzoo.integrations.arguments import PrivacyArguments
    from dpzoo.integrations.callbacks import StatisticsCallback
    from dpzoo.integrations.card import PrivacyCard
    from dpzoo.integrations.plan import Plan
    from dpzoo.integrations.trainer import DPTrainer
except ImportError as error:  # transformers speaks of a class of its own, not of what it misses
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            "dpzoo.integrations needs the package accelerate, as transformers' Trainer does. Install it: "
            "python -m pip install 'accelerate>=1.15'"
        ) from error
    raise

__all__ = ["DPTrainer", "Plan", "PrivacyArguments", "PrivacyCard", "StatisticsCallback"]
