"""The empirical audit: what a whole training run reveals, measured on canaries.

`dpzoo.audit` proves that a step is right; this bounds from below what all steps together released.
"""

from dpzoo.empirical.canaries import Canaries, Trace
from dpzoo.empirical.gradient_canaries import GradientCanaries
from dpzoo.empirical.one_run import Bound, RunReport, audit_run

__all__ = ["Bound", "Canaries", "GradientCanaries", "RunReport", "Trace", "audit_run"]
