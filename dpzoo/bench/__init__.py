"""What a private step costs, as a multiple of the same model's step without privacy.

`workload` says what is trained and builds a step in a mode; `timing` runs the modes in turns in one
process; `memory` runs each mode in a process of its own; `report` holds the figures, and shows them.
"""

from dpzoo.bench.report import BenchReport, Measurement
from dpzoo.bench.runner import bench
from dpzoo.bench.workload import BASELINE, MODES, SETTINGS, Workload

__all__ = ["BASELINE", "MODES", "SETTINGS", "BenchReport", "Measurement", "Workload", "bench"]
