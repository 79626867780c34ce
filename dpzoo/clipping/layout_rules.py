"""Where the rows are in a function's output: one rule for each kind of torch function.

A rule gets the number of rows, the function's arguments, one of its inputs with that input's layout, and
the output. It returns the layout of the output (a list, for several outputs; None for numbers that are
the same for all rows), or raises `Mixing` where entries of several rows are combined, or `Unknown` where
it cannot tell. `dpzoo.clipping.index_rules` has the rules of functions that select entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dpzoo.clipping.index_rules import (
    concatenated,
    gather,
    index,
    index_select,
    narrow,
    parts,
    repeats_entries,
    unbind,
)
from dpzoo.clipping.layouts import (
    FIRST,
    AnyLayout,
    Indexed,
    Layout,
    Mixing,
    Rule,
    Unknown,
    argument,
    dims_of,
    shifted,
)


def elementwise(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """Entry by entry, with broadcasting."""
    if not isinstance(out, torch.Tensor):  # where(condition): the places of what is true
        return None
    return shifted(layout, x, out)


def keeps_dims(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """Leading dimensions stay where they are: linear, embedding, layer_norm, convolutions."""
    return layout


def along(at: int, default: Any = None) -> Rule:
    """A function along one or several dimensions, whose output keeps them: softmax, cumsum."""

    def rule(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
        dim = argument(args, kwargs, at, ("dim", "dims", "axis"), default)
        if dim is None or layout.dim in dims_of(dim, x.ndim):
            raise Mixing
        return layout

    return rule


def reduction(at: int = 1) -> Rule:
    """A function along some dimensions, which disappear, or stay with one entry."""

    def rule(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
        dim = argument(args, kwargs, at, ("dim", "axis"))
        if isinstance(dim, torch.Tensor):  # torch.max(a, b)
            return shifted(layout, x, out)
        if isinstance(dim, bool) or dim is None or (isinstance(dim, (tuple, list)) and not dim):
            raise Mixing
        dims = dims_of(dim, x.ndim)
        if layout.dim in dims:
            raise Mixing
        first = out[0] if isinstance(out, tuple) else out
        if first.ndim == x.ndim or isinstance(layout, Indexed):
            return layout
        return layout._replace(dim=layout.dim - sum(d < layout.dim for d in dims))

    return rule


def refold(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``view`` and similar functions: the same entries in the same order, in other dimensions."""
    if isinstance(layout, Indexed):
        if out.shape[:1] != x.shape[:1]:
            raise Unknown
        return layout
    if not isinstance(out, torch.Tensor) or (out.dtype != x.dtype and out.shape != x.shape):
        raise Unknown
    # Entries that follow each other within a row; and how many rounds over all rows there are.
    inside = layout.inner * math.prod(x.shape[layout.dim + 1 :])
    after = 1
    for dim in range(out.ndim - 1, -1, -1):
        size = out.shape[dim]
        if after * size > inside or (dim == 0 and after * size == inside):
            if inside % after:
                raise Mixing  # a dimension that begins in the middle of a row
            inner = inside // after
            if size % (inner * n):
                raise Mixing
            return Layout(dim, size // (inner * n), inner)
        after *= size
    raise Unknown


_MOVES: dict[Any, tuple[int, ...]] = {}


def order_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int
) -> tuple[int, ...]:
    """Which dimension of the input each dimension of a permuting function's output is."""
    rest = tuple(tuple(a) if isinstance(a, (list, torch.Size)) else a for a in args[1:])
    key = (func, ndim, rest, tuple(sorted((k, str(v)) for k, v in kwargs.items())))
    found = _MOVES.get(key)
    if found is None:
        probe = torch.empty(tuple(range(2, ndim + 2)), device="meta")
        found = _MOVES[key] = tuple(size - 2 for size in func(probe, *args[1:], **kwargs).shape)
    return found


def squeeze(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """Dimensions of one entry disappear."""
    if isinstance(layout, Indexed):
        return layout
    dim = argument(args, kwargs, 1, ("dim",))
    gone = [d for d in range(x.ndim) if x.shape[d] == 1]
    if dim is not None:
        gone = [d for d in dims_of(dim, x.ndim) if d in gone]
    if layout.dim in gone:  # one row
        raise Unknown
    return layout._replace(dim=layout.dim - sum(d < layout.dim for d in gone))


def repeats(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``repeat`` and ``tile``: whole copies along each dimension."""
    if isinstance(layout, Indexed):
        raise Unknown
    dim = layout.dim + out.ndim - x.ndim
    times = out.shape[dim] // x.shape[layout.dim]
    return Layout(dim, layout.outer * times, layout.inner)


def renorm(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """Slices along one dimension, each scaled by its norm over all others."""
    if layout.dim != argument(args, kwargs, 2, ("dim",)) % x.ndim:
        raise Mixing
    return layout


def along_default_first(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """``flip``, ``roll``: entries of the named dimensions change places."""
    dim = argument(args, kwargs, 1, ("dims",)) if len(args) < 3 else args[2]
    dims = dim if isinstance(dim, (tuple, list)) else [v for v in args[1:] if isinstance(v, int)]
    if not dims or layout.dim in dims_of(dims, x.ndim):
        raise Mixing
    return layout


def triangle(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``triu``, ``tril``: what is left of an entry depends on its place in the last two dimensions."""
    if layout.dim >= x.ndim - 2:
        raise Mixing
    return layout


def new_dimension(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """``stack`` and ``unsqueeze``: a dimension appears."""
    dim = argument(args, kwargs, 1, ("dim",), 0) % out.ndim
    if dim > layout.dim:
        return layout
    if isinstance(layout, Indexed):
        raise Unknown
    return layout._replace(dim=layout.dim + 1)


def product(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``matmul``: batch dimensions align from the right, the two last ones multiply."""
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    left = x is a
    other = b if left else a
    if x.ndim == 1:
        raise Mixing
    from_right = x.ndim - layout.dim
    if from_right == (1 if left else 2):
        raise Mixing  # summed over
    if (from_right == 2 and left) or (from_right == 1 and not left):
        place = out.ndim - (1 if other.ndim == 1 else 2) if left else out.ndim - 1
    else:
        place = out.ndim - from_right + (1 if other.ndim == 1 else 0)
    if isinstance(layout, Indexed):
        if place:
            raise Unknown
        return layout
    return layout._replace(dim=place)


def attention(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """scaled_dot_product_attention: rows in a batch dimension."""
    if layout.dim >= x.ndim - 2:
        raise Mixing
    return shifted(layout, x, out)


def batched_first(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """Convolutions, pooling, group norms: what is in the first dimension stays apart."""
    if layout.dim:
        raise Mixing
    return layout


def padded(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``pad``: the last dimensions grow."""
    pad = argument(args, kwargs, 1, ("pad",))
    touched = range(x.ndim - len(pad) // 2, x.ndim)
    if layout.dim in touched and out.shape[layout.dim] != x.shape[layout.dim]:
        raise Unknown
    return layout


def unfolded(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``Tensor.unfold(dim, size, step)``: windows along a dimension, in a new last one."""
    if len(args) < 4:
        return batched_first(n, args, kwargs, x, layout, out)  # F.unfold
    if args[1] % x.ndim == layout.dim:
        raise Mixing
    return layout


def einsum(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """The dimension's letter says where it goes."""
    operands = args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(args[0], str) or "->" not in args[0]:
        raise Unknown
    inputs, output = args[0].replace(" ", "").split("->")
    terms = inputs.split(",")
    at = next(k for k, o in enumerate(operands) if o is x)
    if isinstance(layout, Indexed):
        raise Unknown
    spread = max(
        o.ndim - len(t.replace("...", "")) if "..." in t else 0
        for o, t in zip(operands, terms, strict=True)
    )
    names = _letters(terms[at], x.ndim, spread)
    result = _letters(output, out.ndim, spread)
    if names[layout.dim] not in result:
        raise Mixing
    return layout._replace(dim=result.index(names[layout.dim]))


def _letters(term: str, ndim: int, spread: int) -> list[str]:
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    own = ndim - len(before) - len(after)
    return [*before, *[f"#{k}" for k in range(spread - own, spread)], *after]


def expanded(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``expand``: new leading dimensions, and dimensions of one entry grow."""
    out_layout = shifted(layout, x, out)
    if out.shape[out_layout.dim] != x.shape[layout.dim]:
        raise Unknown  # a single row, expanded
    return out_layout


def like(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``zeros_like``: constants, one entry for each of the input's."""
    return layout if out.shape == x.shape else None


def nothing(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """Numbers that are the same for all rows, or are used as indices."""
    return None


def recurrent(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``lstm``, ``gru``, ``rnn``: (outputs, states), the states with rows in their second dimension."""
    if isinstance(args[1], torch.Tensor) and isinstance(args[2], torch.Tensor):
        raise Unknown  # packed sequences
    if x is not args[0]:
        return None
    return [layout, *(Layout(1) for _ in out[1:])]


def heads_of_attention(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """``multi_head_attention_forward``: (seq, rows, hidden) and weights of (rows, ...)."""
    if not any(x is a for a in args[:3]):
        return None  # a mask
    if layout != Layout(1):
        raise Mixing
    return [layout, FIRST]


def diagonal(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``diagonal(offset, dim1, dim2)``."""
    one = argument(args, kwargs, 2, ("dim1",), 0) % x.ndim
    two = argument(args, kwargs, 3, ("dim2",), 1) % x.ndim
    if layout.dim in (one, two):
        raise Mixing
    if isinstance(layout, Indexed):
        return layout
    return layout._replace(dim=layout.dim - sum(d < layout.dim for d in (one, two)))


def elementwise_reduced(
    n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any
) -> Any:
    """``vecdot``: the last dimension is summed over."""
    dim = kwargs.get("dim", -1) % x.ndim
    if dim == layout.dim:
        raise Mixing
    if isinstance(layout, Indexed):
        return layout
    return layout._replace(dim=layout.dim - (dim < layout.dim) + out.ndim - (x.ndim - 1))


def baddbmm(n: int, args: Any, kwargs: Any, x: torch.Tensor, layout: AnyLayout, out: Any) -> Any:
    """``input + batch1 @ batch2``: rows in the first dimension."""
    if x is args[0]:
        return shifted(layout, x, out)
    return batched_first(n, args, kwargs, x, layout, out)


def _table() -> dict[str, Rule]:
    def names(text: str) -> list[str]:
        return text.split()

    rules: dict[str, Rule] = {}
    for name in names(
        "add sub mul div true_divide floor_divide remainder fmod pow rsub rpow radd rmul rdiv "
        "rtruediv truediv  neg abs exp expm1 log log1p log2 log10 sqrt rsqrt square sin cos "
        "tan tanh sigmoid relu relu6 gelu silu mish elu  selu celu leaky_relu softplus "
        "logsigmoid hardtanh hardswish hardsigmoid tanhshrink softsign erf erfc  erfinv "
        "reciprocal sign ceil floor round trunc frac clamp clamp_min clamp_max clip maximum "
        "minimum  fmax fmin where masked_fill eq ne lt le gt ge logical_and logical_or "
        "logical_not logical_xor  bitwise_and bitwise_or bitwise_not bitwise_xor and or xor "
        "invert iand ior ixor isnan isinf isfinite  nan_to_num dropout alpha_dropout "
        "feature_dropout dropout1d dropout2d dropout3d bernoulli to type  float double half "
        "bfloat16 int long bool short byte type_as clone detach contiguous cpu cuda "
        "requires_grad data addcmul addcdiv lerp atan2 copysign hypot fill zero copy prelu "
        "rrelu threshold  sinc xlogy softshrink hardshrink isclose logaddexp logit positive "
        "atan sinh cosh asinh acosh atanh  real imag conj float_power ldexp div_ signbit "
        "angle masked_fill_ rrelu_ normal uniform exponential random  log_normal geometric "
        "cauchy pin_memory retain_grad alias iadd isub imul itruediv pos isneginf "
        "isposinf view_as_real_ heaviside nextafter gt_ index_fill_ deg2rad rad2deg exp2 "
        "rtruediv rfloordiv  floordiv mod ifloordiv ipow rmod rand ror rxor lshift rshift "
        "ilshift irshift subtract multiply divide negative  absolute greater greater_equal "
        "less less_equal not_equal sgn mvlgamma lgamma digamma i0 special_expit expit"
    ):
        rules[name] = elementwise
    for name in names(
        "softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp gumbel_softmax_"
    ):
        rules[name] = along(1)
    rules["sort"] = rules["argsort"] = rules["glu"] = along(1, -1)
    rules["topk"] = rules["kthvalue"] = along(2, -1)
    rules["normalize"] = along(2, 1)
    rules["renorm"] = renorm
    rules["gumbel_softmax"] = along(4, -1)
    for name in names(
        "sum mean amax amin max min prod std var std_mean var_mean all any argmax argmin "
        "logsumexp  count_nonzero median nanmedian nanmean nansum mode aminmax"
    ):
        rules[name] = reduction(1)
    rules["quantile"] = rules["nanquantile"] = reduction(2)
    rules["triu"] = rules["tril"] = triangle
    rules["norm"] = rules["linalg_vector_norm"] = rules["linalg_norm"] = reduction(2)
    rules["vector_norm"] = reduction(2)
    rules["vecdot"] = rules["linalg_vecdot"] = elementwise_reduced
    for name in names("linear embedding layer_norm rms_norm addmm one_hot"):
        rules[name] = keeps_dims
    for name in names(
        "view reshape flatten unflatten view_as reshape_as ravel contiguous_view _unsafe_view"
    ):
        rules[name] = refold
    for name in names("squeeze"):
        rules[name] = squeeze
    rules["unsqueeze"] = rules["stack"] = new_dimension
    for name in names("repeat tile"):
        rules[name] = repeats
    rules["repeat_interleave"] = repeats_entries
    for name in names("split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk"):
        rules[name] = parts(2)
    rules["narrow"] = narrow
    rules["unbind"] = rules["select"] = unbind
    rules["getitem"] = index
    rules["index_select"] = index_select
    for name in names("gather take_along_dim scatter scatter_add scatter_reduce index_add_inner"):
        rules[name] = gather
    rules["flip"] = along_default_first
    rules["roll"] = along(2)
    for name in names("cat concat concatenate"):
        rules[name] = concatenated
    for name in names("matmul mm bmm mv rmatmul"):
        rules[name] = product
    rules["scaled_dot_product_attention"] = attention
    for name in names(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d "
        "max_pool2d  max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d  adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "group_norm instance_norm interpolate  upsample pixel_shuffle pixel_unshuffle fold "
        "grid_sample affine_grid local_response_norm channel_shuffle  lp_pool1d lp_pool2d"
    ):
        rules[name] = batched_first
    rules["pad"] = padded
    rules["unfold"] = unfolded
    rules["einsum"] = einsum
    for name in names("expand expand_as broadcast_to"):
        rules[name] = expanded
    for name in names("fft ifft rfft irfft hfft fft_fft fft_ifft fft_rfft fft_irfft"):
        rules[name] = along(2, -1)
    for name in names(
        "zeros_like ones_like empty_like full_like rand_like randn_like randint_like"
    ):
        rules[name] = like
    for name in names(
        "new_zeros new_ones new_empty new_full new_tensor nonzero argwhere unique "
        "unique_consecutive  bincount histc item tolist numel allclose equal"
    ):
        rules[name] = nothing
    rules["diagonal"] = diagonal
    rules["multi_head_attention_forward"] = heads_of_attention
    for name in names("lstm gru rnn_tanh rnn_relu"):
        rules[name] = recurrent
    rules["baddbmm"] = baddbmm
    return rules


PERMUTING = frozenset(
    (
        "transpose",
        "permute",
        "t",
        "T",
        "mT",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "adjoint",
    )
)
"""Functions whose output has the input's dimensions in another order: `order_of`."""

RULES = _table()
