"""The mathematics of per-row gradients that are known by their factors.

One contribution to the per-sample gradients of one parameter is kept in the form in which it is cheapest
to take a norm, an inner product with another contribution, and a weighted sum over the rows:

- `LinearFactors`, of a linear layer: G_i = sum_t l_it r_it^T, kept as (l, r);
- `EmbeddingFactors`, of an embedding: G_i = sum_t onehot(id_it) g_it^T, kept as (id, g);
- `DenseGrads`, the per-sample gradients themselves: vectors, and small or long-sequence matrices.

The norm of a parameter that is used several times needs the inner products of all pairs of uses; that
is what makes tied weights exact. Sources: Li et al. 2021 (arXiv 2110.05679) for the Gram form, Bu et al.
2023 (arXiv 2210.00038) for book-keeping, Ding et al. 2024 (arXiv 2405.18194) for embedding x linear.

Rounding. A Gram norm is a sum of t^2 terms that may cancel. With u the unit roundoff of the dtype, each
term <l_t, l_s> <r_t, r_s> is computed with an error of the order of u |l_t| |l_s| |r_t| |r_s|, so the
squared norm has one of the order of u b^2, where b = sum_t |l_t| |r_t| (`magnitude`). The same holds for
the weighted sum: each product l_t r_t^T is rounded, and the row's share of the sum differs from the exact
one by at most the order of u b. An upper bound of the norm is made from both.

Shapes: rows of the batch n, positions t or s, weight (out, in). Everything is float32 or wider.

Where the unit of privacy is more than a row, its rows are one longer row: G_u = sum_i sum_t l_it r_it^T,
over the rows i of unit u. `Group` joins the positions of units that have equally many rows, and all the
above holds for the joined rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCKS = 4
"""A Gram matrix of t positions is computed in this many strips, and only on and below its diagonal:
(BLOCKS + 1) / (2 BLOCKS) of the products. More strips save little and make the products small."""

SHORTEST_STRIP = 32
"""Below this many positions a strip is too small to be worth a product of its own."""


class Group(NamedTuple):
    """Units of privacy that have equally many rows in a batch.

    Args:
        units: their numbers, (g,), or the slice that they are.
        rows: their rows, (g * size,), unit by unit, or the slice that they are.
        size: rows of each.
    """

    units: torch.Tensor | slice
    rows: torch.Tensor | slice
    size: int

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """(n, t, ...) -> (g, size * t, ...): the positions of a unit's rows, one row after the other."""
        if self is EACH:
            return x
        return x[self.rows].unflatten(0, (-1, self.size)).flatten(1, 2)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (g, ...): a unit's rows added up."""
        if self is EACH:
            return x
        own = x[self.rows]
        return own if self.size == 1 else own.unflatten(0, (-1, self.size)).sum(1)


EACH = Group(slice(None), slice(None), 1)
"""Every row is a unit."""


def positions_of(x: torch.Tensor) -> torch.Tensor:
    """(n, ..., features) -> (n, positions, features)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def upcast(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(n, ...) -> (n, entries), of no rows too."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


class LayerInput:
    """The input of one or several linear layers: what they share is computed once.

    Query, key and value projections read one tensor. Its Gram matrix is a good part of each one's
    norm, and scaling it by the clip factors serves all their weighted sums.

    Args:
        source: the input, (n, ..., features), or in another layout if ``by_row`` is given.
        by_row: the input as (n, ..., features).
    """

    def __init__(self, source: torch.Tensor, by_row: torch.Tensor | None = None) -> None:
        self.source: torch.Tensor | None = source
        self.positions = upcast(positions_of(source if by_row is None else by_row))
        self.readers = 0
        self._grams: dict[tuple[int, int], torch.Tensor] = {}
        self._scaled: tuple[torch.Tensor, torch.Tensor] | None = None
        self._joined: dict[int, LayerInput] = {}

    def joined(self, group: Group) -> LayerInput:
        """The input of a group's units, (g, size * t, features)."""
        if group is EACH:
            return self
        if id(group) not in self._joined:
            self._joined[id(group)] = LayerInput(group.joined(self.positions))
        return self._joined[id(group)]

    def is_of(self, source: torch.Tensor) -> bool:
        """Whether ``source`` is this input: the same memory, unchanged since."""
        own = self.source
        return own is not None and (
            (own.data_ptr(), own.shape, own.stride(), own.dtype, own._version)
            == (source.data_ptr(), source.shape, source.stride(), source.dtype, source._version)
        )

    def release(self) -> None:
        """No more readers: free what only another reader would need."""
        self.source = None
        self._grams.clear()
        for own in self._joined.values():
            own.release()
        self._joined.clear()

    def gram(self, rows: slice, columns: slice) -> torch.Tensor:
        """``<r_t, r_s>`` for t in ``rows`` and s in ``columns``, (n, rows, columns)."""
        key = (rows.start, columns.start)
        if key not in self._grams:
            self._grams[key] = _gram(self.positions, rows, self.positions, columns)
        return self._grams[key]

    def scaled(self, weights: torch.Tensor) -> torch.Tensor:
        """The positions of row i times ``weights[i]``, (n, t, features)."""
        if self._scaled is None or self._scaled[0] is not weights:
            self._scaled = (weights, self.positions * weights.view(-1, 1, 1))
        return self._scaled[1]


@dataclass
class LinearFactors:
    """A linear layer's use of its weight: ``grads`` (n, t, out), and an input of (n, t, in)."""

    grads: torch.Tensor
    input: LayerInput

    @property
    def inputs(self) -> torch.Tensor:
        """(n, t, in)."""
        return self.input.positions

    def squared_norm(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``sum_ts <l_t, l_s> <r_t, r_s>``, (n,), with the symmetry of both Gram matrices; magnitude."""
        n, length, _ = self.grads.shape
        if length == 1:
            return self.grads.square().sum((1, 2)) * self.inputs.square().sum((1, 2)), None
        strip = max(-(-length // BLOCKS), SHORTEST_STRIP)
        if self.grads.device.type != "cpu":  # there a launch costs more than the products it saves
            strip = length
        total, magnitude = self.grads.new_zeros(n), self.grads.new_zeros(n)
        for start in range(0, length, strip):
            rows = slice(start, start + strip)
            left, right = _gram(self.grads, rows, self.grads, rows), self.input.gram(rows, rows)
            total += torch.linalg.vecdot(left.flatten(1), right.flatten(1))
            diagonals = left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)
            magnitude += diagonals.sqrt().sum(1)
            if start:
                before = slice(0, start)
                left = _gram(self.grads, rows, self.grads, before)
                right = self.input.gram(rows, before)
                total += 2 * torch.linalg.vecdot(left.flatten(1), right.flatten(1))
        return total, magnitude

    def add_to(self, total: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
        """``total + sum_i weights_i G_i``, (out, in); in place where there is a total."""
        grads, inputs = self.grads, self.inputs
        out, into = grads.shape[-1], inputs.shape[-1]
        if into <= out * self.input.readers and (self.input.readers > 1 or into < out):
            inputs = self.input.scaled(weights)
        else:
            grads = grads * weights.view(-1, 1, 1)
        left, right = grads.flatten(0, 1).t(), inputs.flatten(0, 1)
        if total is None:
            return left @ right
        return total.addmm_(left, right)

    def joined(self, group: Group) -> GradFactors:
        """The use by a group's units, in the form that costs least."""
        return linear_factors(group.joined(self.grads), self.input.joined(group))

    def select(self, rows: torch.Tensor) -> LinearFactors:
        """The same use of a subset of the rows."""
        return LinearFactors(self.grads[rows], LayerInput(self.inputs[rows]))

    def double(self) -> LinearFactors:
        """The same use in float64."""
        return LinearFactors(self.grads.double(), LayerInput(self.inputs.double()))

    def dense(self) -> torch.Tensor:
        """(n, out, in)."""
        return torch.matmul(self.grads.transpose(1, 2), self.inputs)


@dataclass
class EmbeddingFactors:
    """An embedding's use of its table: ``ids`` (n, t) and ``grads`` (n, t, hidden)."""

    ids: torch.Tensor
    grads: torch.Tensor
    size: int

    def squared_norm(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions of a row with the same id added up, squared and summed, (n,); magnitude."""
        n, length, hidden = self.grads.shape
        sizes = torch.linalg.vector_norm(self.grads, dim=2)
        row = torch.arange(n, device=self.ids.device).unsqueeze(1)
        keys, inverse = torch.unique(row * self.size + self.ids, return_inverse=True)
        if len(keys) == n * length:  # no id twice in a row: positions, as a rule
            return sizes.square().sum(1), None
        sums = self.grads.new_zeros(len(keys), hidden)
        sums.index_add_(0, inverse.reshape(-1), self.grads.reshape(n * length, hidden))
        owner = torch.div(keys, self.size, rounding_mode="floor")
        return self.grads.new_zeros(n).index_add_(0, owner, sums.square().sum(1)), sizes.sum(1)

    def add_to(self, total: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
        """``total + sum_i weights_i G_i``, (size, hidden); in place where there is a total."""
        hidden = self.grads.shape[-1]
        if total is None:
            total = self.grads.new_zeros(self.size, hidden)
        weighted = self.grads * weights.view(-1, 1, 1)
        return total.index_add_(0, self.ids.reshape(-1), weighted.flatten(0, 1))

    def joined(self, group: Group) -> EmbeddingFactors:
        """The use by a group's units."""
        return EmbeddingFactors(group.joined(self.ids), group.joined(self.grads), self.size)

    def select(self, rows: torch.Tensor) -> EmbeddingFactors:
        """The same use of a subset of the rows."""
        return EmbeddingFactors(self.ids[rows], self.grads[rows], self.size)

    def double(self) -> EmbeddingFactors:
        """The same use in float64."""
        return EmbeddingFactors(self.ids, self.grads.double(), self.size)

    def dense(self) -> torch.Tensor:
        """(n, size, hidden)."""
        n, _, hidden = self.grads.shape
        index = self.ids.unsqueeze(-1).expand_as(self.grads)
        return self.grads.new_zeros(n, self.size, hidden).scatter_add_(1, index, self.grads)


@dataclass
class DenseGrads:
    """Per-sample gradients as they are, ``grads`` (n, *shape)."""

    grads: torch.Tensor

    def squared_norm(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(n,); None: nothing cancels."""
        flat = _flat(self.grads)
        return torch.linalg.vector_norm(flat, dim=1).square(), None

    def add_to(self, total: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
        """``total + sum_i weights_i G_i``; in place where there is a total."""
        if total is None:
            return torch.mv(_flat(self.grads).t(), weights).view(self.grads.shape[1:])
        for grad, weight in zip(self.grads, weights.unbind(), strict=True):
            total.addcmul_(grad, weight)
        return total

    def joined(self, group: Group) -> DenseGrads:
        """The gradients of a group's units."""
        return DenseGrads(group.summed(self.grads))

    def select(self, rows: torch.Tensor) -> DenseGrads:
        """The same use of a subset of the rows."""
        return DenseGrads(self.grads[rows])

    def double(self) -> DenseGrads:
        """The same in float64."""
        return DenseGrads(self.grads.double())

    def dense(self) -> torch.Tensor:
        """(n, *shape)."""
        return self.grads


GradFactors = LinearFactors | EmbeddingFactors | DenseGrads


def inner_product(a: GradFactors, b: GradFactors) -> torch.Tensor:
    """``<G_a, G_b>`` of each row, (n,), for any two uses of one parameter."""
    if isinstance(b, DenseGrads) and not isinstance(a, DenseGrads):
        a, b = b, a
    if isinstance(a, EmbeddingFactors) and isinstance(b, LinearFactors):
        a, b = b, a
    if isinstance(a, DenseGrads):
        if isinstance(b, DenseGrads):
            return _flat(a.grads * b.grads).sum(1)
        if isinstance(b, LinearFactors):
            return (torch.matmul(b.inputs, a.grads.transpose(1, 2)) * b.grads).sum((1, 2))
        index = b.ids.unsqueeze(-1).expand_as(b.grads)
        return (a.grads.gather(1, index) * b.grads).sum((1, 2))
    if isinstance(a, LinearFactors) and isinstance(b, LinearFactors):
        left = torch.matmul(a.grads, b.grads.transpose(1, 2))
        right = torch.matmul(a.inputs, b.inputs.transpose(1, 2))
        return torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    if isinstance(a, LinearFactors) and isinstance(b, EmbeddingFactors):
        # l_s[id_t], (n, s, t): no tensor has both a vocabulary and a hidden dimension.
        index = b.ids.unsqueeze(1).expand(-1, a.grads.shape[1], -1)
        gram = torch.matmul(a.inputs, b.grads.transpose(1, 2))
        return (a.grads.gather(2, index) * gram).sum((1, 2))
    assert isinstance(a, EmbeddingFactors)
    assert isinstance(b, EmbeddingFactors)
    same = a.ids.unsqueeze(2) == b.ids.unsqueeze(1)
    return (torch.matmul(a.grads, b.grads.transpose(1, 2)) * same).sum((1, 2))


def linear_factors(grads: torch.Tensor, input: LayerInput) -> GradFactors:
    """A linear layer's use, in the form that costs least.

    Per row, with t positions and a weight of (out, in), counting multiply-adds: the norm by Gram
    matrices takes about ``t^2 (out + in) * 5/8``, and the weighted sum ``t out in`` later; the
    per-sample gradient takes ``t out in`` at once, serves both, and costs memory: ``out in`` numbers
    kept, where the factors have ``t (out + in)``. It is chosen where it is cheaper and not larger.

    Args:
        grads: gradients of the output, (n, t, out).
        input: the layer's input, (n, t, in).
    """
    length, out, into = grads.shape[1], grads.shape[2], input.positions.shape[2]
    if length > 1 and out * into <= length * (out + into):
        return DenseGrads(torch.matmul(grads.transpose(1, 2), input.positions))
    input.readers += 1
    return LinearFactors(grads, input)


def total_squared_norm(uses: list[GradFactors]) -> torch.Tensor:
    """Squared norms of the sums of several uses, (n,): all pairs' inner products."""
    total = uses[0].squared_norm()[0]
    for k, use in enumerate(uses[1:], 1):
        total = total + use.squared_norm()[0]
        for other in uses[:k]:
            total = total + 2 * inner_product(other, use)
    return total


def _gram(a: torch.Tensor, rows: slice, b: torch.Tensor, columns: slice) -> torch.Tensor:
    """``<a_t, b_s>`` for t in ``rows`` of (n, t, d) and s in ``columns``, (n, rows, columns)."""
    return torch.bmm(a[:, rows], b[:, columns].transpose(1, 2))
