"""Opacus grad and norm samplers of dpzoo's own parts, registered when this package is imported.

Only classes defined in `dpzoo.layers` are registered: what Opacus does with anybody else's modules
is the same before and after the import.
"""

from dpzoo.grad_samplers import embeddings, lm_head, upcast

__all__ = ["embeddings", "lm_head", "upcast"]
