"""A checkpoint from stock to dpzoo and back to disk, compared at every step.

What ``dpzoo convert`` and ``conversion/verify.py`` share: the checkpoint is loaded by transformers and by
dpzoo, written by dpzoo, and read again by transformers alone. The three models are compared parameter
by parameter, output by output, and by the gradient of every row's loss. Nothing is sampled twice: the
batch is the same, made of random tokens in rows of different lengths.
"""

from dpzoo.parity.checkpoint import convert_checkpoint
from dpzoo.parity.report import Check, Parity

__all__ = ["Check", "Parity", "convert_checkpoint"]
