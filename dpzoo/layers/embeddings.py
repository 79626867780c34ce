"""Embedding tables that are looked up once a forward pass, with ids of shape (batch, length).

They are `torch.nn.Embedding` in everything but their type. The type is what matters: Opacus finds
a sampler by the exact class of a module, and `dpzoo.grad_samplers` registers samplers for these
two that honour ``padding_idx``, accept an empty batch and know about tied output heads.

The rest of the package keeps one rule for them: **one call per table and forward pass**, with ids
whose first dimension is the batch. A table looked up twice has two contributions to its gradient,
and Opacus' ghost clipping refuses that; ids of shape (1, seq), broadcast over the batch, have one
gradient for the whole batch, and no per-sample gradient at all.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpzoo.errors import InputError
from dpzoo.opacus_internals import is_expanded
from dpzoo.shapes import check


class _Table(nn.Embedding):
    """An embedding that keeps its padding row untrained in every mode of Opacus."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, nn.Parameter):
            return super().forward(ids)
        # The weight is not a parameter but what a transform put in its place. ExpandedWeights knows
        # F.embedding only, and ignores padding_idx there; functorch's embedding fails on an empty
        # batch, its indexing does not. In both, cut padding off before the gradient gets there.
        expanded = is_expanded(self.weight)
        embedded = F.embedding(ids, self.weight) if expanded else self.weight[ids]
        if self.padding_idx is None:
            return embedded
        padding = (ids == self.padding_idx).unsqueeze(-1)
        return torch.where(padding, embedded.detach(), embedded)


class TokenEmbedding(_Table):
    """A table of token (or token type) embeddings; ids (batch, length) -> (batch, length, hidden)."""


class PositionEmbedding(_Table):
    """A table of learned positions; ids (batch, length) -> (batch, length, hidden)."""


class HoldsTables:
    """For modules: a plain `torch.nn.Embedding` assigned to one of their attributes gets a safe type.

    Opacus' own sampler of `torch.nn.Embedding` trains the padding row and fails on an empty batch.

    Guarantees:
        A table that is replaced or resized by assignment keeps exact per-sample gradients: the new one
        has the type of the old one, or `TokenEmbedding`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        self._retype(name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: Any) -> None:
        """As `torch.nn.Module.add_module`, with a safe type for a plain embedding."""
        self._retype(name, module)
        super().add_module(name, module)  # type: ignore[misc]

    def _retype(self, name: str, value: Any) -> None:
        if type(value) is nn.Embedding:
            old = self.__dict__.get("_modules", {}).get(name)
            value.__class__ = type(old) if isinstance(old, _Table) else TokenEmbedding


def rows_of_ids(
    ids: torch.Tensor,
    *,
    batch: int,
    num_choices: int,
    seq: int,
    name: str,
    table: nn.Module | None = None,
) -> torch.Tensor:
    """Bring ids to one row per sample.

    Args:
        ids: one id per token, with last dimension seq or num_choices * seq: (seq,), (1, seq),
            (num_choices, seq), (batch, seq), (batch, num_choices, seq), (batch * num_choices, seq),
            (batch, num_choices * seq), or these with dimensions of size 1. A last dimension of size 1
            is one id for all tokens of a sequence.
        batch: rows of the batch, the privacy unit.
        num_choices: sequences that one row holds (1 everywhere but in multiple choice).
        seq: length of one sequence.
        name: the argument's name, for the error message.
        table: what they are looked up in.

    Returns:
        Ids of shape (batch, num_choices * seq), contiguous.

    Raises:
        InputError: the shape is none of the above, the dtype is no whole number's, or the table does not
            have an id.
    """
    check(name, ids, high=getattr(table, "num_embeddings", None))
    if ids.ndim and ids.shape[-1] == 1:
        ids = ids.expand(*ids.shape[:-1], seq).contiguous()
    length, count = num_choices * seq, ids.numel()
    if ids.ndim and ids.shape[-1] in (seq, length):
        if count == batch * length:
            return ids.reshape(batch, length)
        if count in (seq, length):
            rows = ids.reshape(1, count // seq, seq).expand(batch, num_choices, seq)
            return rows.reshape(batch, length).contiguous()
    wanted = f"(1, {seq}) or ({batch}, {seq})"
    if num_choices > 1:
        wanted = f"(1, {seq}) or ({batch}, {num_choices}, {seq})"
    raise InputError(
        f"{name} of shape {tuple(ids.shape)}, wanted {wanted}. "
        f"Pass one id per token, with the same batch and sequence length as the input."
    )
