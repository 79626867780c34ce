"""Parts whose parameters have exact per-sample gradients, and the parameter-free work around them."""

from dpzoo.layers.attention import attend, merge_heads, split_heads
from dpzoo.layers.embeddings import PositionEmbedding, TokenEmbedding
from dpzoo.layers.lm_head import LMHead

__all__ = [
    "LMHead",
    "PositionEmbedding",
    "TokenEmbedding",
    "attend",
    "merge_heads",
    "split_heads",
]
