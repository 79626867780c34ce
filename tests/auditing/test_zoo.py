"""The zoo passes; the report of each stock counterpart names its real defects."""

from tests.support import A_FEW, NAMES, others_slow

SAMPLED = others_slow(NAMES, A_FEW)
