"""What is recorded when a torch function takes both rows of the batch and shared tensors.

One function for each kind. It runs the torch function, has its output tapped (or its shared arguments,
expanded to the rows), and says how the tap's gradient becomes per-row gradients. It raises `Unknown` for
arguments that it has no way for; `dpzoo.clipping.row_by_row`, which knows every function, takes those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.functions import Function
from dpzoo.clipping.index_rules import index
from dpzoo.clipping.layout_rules import RULES, elementwise, product
from dpzoo.clipping.layouts import (
    FIRST,
    SINGLE,
    AnyLayout,
    Indexed,
    Mixed,
    Unknown,
    layout_key,
    row_ids,
    rows_first,
    shifted,
)
from dpzoo.clipping.recorder import ParameterCall, Recorder, mixing_error
from dpzoo.clipping.row_by_row import recurrent, row_by_row
from dpzoo.errors import UnsupportedModelError
from dpzoo.factors import upcast


def record_call(recorder: Recorder, call: ParameterCall) -> Any:
    """Run the function, and have the recorder note how its parameters' per-row gradients are had."""
    known = USE_RULES.get(call.function.name)
    if known is not None:
        try:
            return known(recorder, call)
        except Unknown:
            pass
    return row_by_row(recorder, call)


def _only(shared: list[torch.Tensor], *known: Any) -> bool:
    return all(any(z is k for k in known) for z in shared)


def _noted(
    recorder: Recorder, function: Function, shared: Any, tensors: tuple[Any, ...], *more: Any
) -> list[bool]:
    """Note a function's use of some tensors; which of them are shared ones."""
    taken = [value is not None and any(value is z for z in shared) for value in tensors]
    names = [recorder.owner.name_of(z) for z, on in zip(tensors, taken, strict=True) if on]
    recorder.uses.append((function.name, *names, *more))
    return taken


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    return [args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(names)]


def _positions(x: torch.Tensor, layout: AnyLayout, rows: int) -> torch.Tensor:
    """(rows, positions, features); the features are the last dimension."""
    first = rows_first(x, layout, rows)
    return first.reshape(rows, first[0, ..., 0].numel(), first.shape[-1])


def _record_linear(recorder: Recorder, call: ParameterCall) -> Any:
    function, func, args, kwargs, row_tensors, shared = call
    x, weight, bias = _named(args, kwargs, "input", "weight", "bias")
    if len(row_tensors) != 1 or row_tensors[0] is not x or not _only(shared, weight, bias):
        raise Unknown
    if weight.ndim != 2:
        raise Unknown
    return _linear(recorder, function, func(*args, **kwargs), x, weight, bias, shared)


def _linear(
    recorder: Recorder,
    function: Function,
    out: Any,
    x: Any,
    weight: Any,
    bias: Any,
    shared: Any,
    *,
    transposed: bool = False,
) -> Any:
    """Tap ``out = x @ weight^T + bias``; ``transposed``: the weight is (in, out), as matmul takes it."""
    layout = recorder.layout_of(x)
    if layout.dim == x.ndim - 1:
        raise mixing_error(function.name)
    rows = recorder.rows
    takes_weight, takes_bias = _noted(
        recorder, function, shared, (weight, bias), layout_key(layout)
    )

    def record(store: FactorStore, grad: torch.Tensor, *saved: torch.Tensor) -> None:
        grads = _positions(grad, layout, rows)
        if takes_bias:
            store.add_dense(bias, _summed_to(grads, bias))
        if takes_weight:
            store.add_linear(weight, grads, saved[0], layout, transposed)

    out = recorder.tap(out, record, (x,) if takes_weight else (), [x])
    recorder.mark(out, layout)
    return out


def _summed_to(grads: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(rows, positions, out) -> (rows, *bias.shape), for a bias of (out,), or (1,), or (1, out)."""
    total = grads.float().sum(1) if grads.dtype in (torch.float16, torch.bfloat16) else grads.sum(1)
    if bias.shape[-1] != total.shape[-1]:
        total = total.sum(-1, keepdim=True)
    return total.reshape(len(grads), *bias.shape)


def _record_addmm(recorder: Recorder, call: ParameterCall) -> Any:
    function, func, args, kwargs, row_tensors, shared = call
    bias, x, weight = _named(args, kwargs, "input", "mat1", "mat2")
    scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
    if (
        function.in_place
        or scaled
        or len(args) > 3
        or row_tensors != [x]
        or not _only(shared, weight, bias)
    ):
        raise Unknown
    if bias.ndim > 1 and bias.shape[0] != 1:
        raise Unknown
    return _linear(
        recorder, function, func(*args, **kwargs), x, weight, bias, shared, transposed=True
    )


def _record_matmul(recorder: Recorder, call: ParameterCall) -> Any:
    function, func, args, kwargs, row_tensors, shared = call
    a, b = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
    if function.name == "rmatmul":
        raise Unknown
    if len(row_tensors) != 1 or len(shared) != 1 or kwargs.get("out") is not None:
        raise Unknown
    x, z = row_tensors[0], shared[0]
    layout = recorder.layout_of(x)
    if x is a and z.ndim == 2 and layout.dim != x.ndim - 1 and x.ndim > 1:
        return _linear(
            recorder, function, func(*args, **kwargs), x, z, None, shared, transposed=True
        )
    if x.ndim < 3 or z.ndim == 1 or layout.dim >= x.ndim - 2:
        raise Unknown
    if function.name in ("bmm", "mm") and z.shape[0] != x.shape[0]:
        raise Unknown
    expanded_z = recorder.expanded(function, z, x, layout)
    out = func(
        *(expanded_z if v is z else v for v in args),
        **{k: expanded_z if v is z else v for k, v in kwargs.items()},
    )
    if recorder.rows == 1:
        recorder.mark(out)
        return out
    recorder.mark_all(
        out,
        product(
            recorder.rows,
            (a if a is x else expanded_z, b if b is x else expanded_z),
            {},
            x,
            layout,
            out,
        ),
    )
    return out


def _record_embedding(recorder: Recorder, call: ParameterCall) -> Any:
    function, func, args, kwargs, row_tensors, shared = call
    ids, table, padding, max_norm, _, by_frequency, sparse = _named(
        args,
        kwargs,
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    if row_tensors != [ids] or not _only(shared, table):
        raise Unknown
    name = recorder.owner.name_of(table)
    if max_norm is not None or by_frequency or sparse:
        raise UnsupportedModelError(
            f"{name} is looked up with max_norm, scale_grad_by_freq or sparse, which make a row's "
            f"gradient depend on other rows or have no dense form. Wanted a plain look-up."
        )
    # Sparse: autograd's own gradient, which the check asks for, then is of the vectors looked up.
    out = func(ids, table, padding, sparse=table.is_leaf)
    return _lookup(recorder, function, out, ids, table, padding)


def _lookup(
    recorder: Recorder, function: Function, out: Any, ids: Any, table: Any, padding: Any
) -> Any:
    layout, rows = recorder.layout_of(ids), recorder.rows
    recorder.uses.append((function.name, recorder.owner.name_of(table), layout_key(layout)))

    def record(store: FactorStore, grad: torch.Tensor, kept: torch.Tensor) -> None:
        spread = grad.reshape(*kept.shape, -1)
        store.add_embedding(
            table,
            _positions(kept.unsqueeze(-1), layout, rows).squeeze(-1),
            _positions(spread, layout, rows),
            padding,
        )

    out = recorder.tap(out, record, (ids,))
    recorder.mark(out, layout)
    return out


def _record_getitem(recorder: Recorder, call: ParameterCall) -> Any:
    function, func, args, kwargs, row_tensors, shared = call
    table, item = args[0], args[1]
    if isinstance(item, tuple) and len(item) == 1:
        item = item[0]
    if (
        not isinstance(item, torch.Tensor)
        or item.dtype == torch.bool
        or row_tensors != [item]
        or not _only(shared, table)
    ):
        raise Unknown
    if bool((item < 0).any()):
        raise Unknown
    return _lookup(recorder, function, func(*args, **kwargs), item, table, None)


def _record_norm(recorder: Recorder, call: ParameterCall) -> Any:
    function, func, args, kwargs, row_tensors, shared = call
    rms = function.name == "rms_norm"
    names = (
        ("input", "normalized_shape", "weight", "eps")
        if rms
        else ("input", "normalized_shape", "weight", "bias", "eps")
    )
    values = dict(zip(names, _named(args, kwargs, *names), strict=True))
    x, shape = values["input"], values["normalized_shape"]
    weight: Any = values["weight"]
    bias: Any = values.get("bias")
    if row_tensors != [x] or not _only(shared, weight, bias):
        raise Unknown
    eps: Any = values["eps"] if values["eps"] is not None else (None if rms else 1e-5)
    layout, rows = recorder.layout_of(x), recorder.rows
    if layout.dim >= x.ndim - len(shape):
        raise mixing_error(function.name)
    takes_weight, takes_bias = _noted(
        recorder, function, shared, (weight, bias), layout_key(layout)
    )
    out = func(*args, **kwargs)

    def record(store: FactorStore, grad: torch.Tensor, *saved: torch.Tensor) -> None:
        grads = upcast(grad)
        if takes_bias:
            store.add_dense(bias, _to_shape(grads, layout, rows, len(shape)))
        if takes_weight:
            x_ = upcast(saved[0])
            again = F.rms_norm(x_, shape, eps=eps) if rms else F.layer_norm(x_, shape, eps=eps)
            store.add_dense(weight, _to_shape(again.mul_(grads), layout, rows, len(shape)))

    out = recorder.tap(out, record, (x,) if takes_weight else (), [x])
    recorder.mark(out, layout)
    return out


def _to_shape(grads: torch.Tensor, layout: AnyLayout, rows: int, trailing: int) -> torch.Tensor:
    """(rows, *shape): all but the ``trailing`` last dimensions summed."""
    first = rows_first(grads, layout, rows)
    dims = tuple(range(1, first.ndim - trailing))
    return first.sum(dims) if dims else first


def _record_convolution(recorder: Recorder, call: ParameterCall) -> Any:
    """A convolution of patches that do not overlap is a linear layer; other ones go row by row."""
    function, func, args, kwargs, row_tensors, shared = call
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _named(args, kwargs, *names)
    window = tuple(weight.shape[2:])

    def each(value: Any, default: int) -> tuple[Any, ...]:
        value = default if value is None else value
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(window)

    plain = each(padding, 0) == (0,) * len(window) and each(dilation, 1) == (1,) * len(window)
    if row_tensors != [x] or recorder.layout_of(x) != FIRST or (groups or 1) != 1 or not plain:
        raise Unknown
    if each(stride, 1) != window or not _only(shared, weight, bias) or x.ndim != weight.ndim:
        raise Unknown
    rows = recorder.rows
    takes_weight, takes_bias = _noted(recorder, function, shared, (weight, bias))
    out = func(*args, **kwargs)

    def record(store: FactorStore, grad: torch.Tensor, *saved: torch.Tensor) -> None:
        grads = grad.flatten(2).transpose(1, 2)
        if takes_bias:
            store.add_dense(bias, _summed_to(grads, bias))
        if takes_weight:
            patches = saved[0]
            for dim, size in enumerate(window):
                patches = patches.unfold(2 + dim, size, size)
            spots = grad.ndim - 2
            patches = patches.permute(0, *range(2, 2 + spots), 1, *range(2 + spots, patches.ndim))
            patches = patches.reshape(rows, grads.shape[1], -1)
            store.add_linear(weight, grads, patches, FIRST, False)

    out = recorder.tap(out, record, (x,) if takes_weight else (), [x])
    recorder.mark(out, FIRST)
    return out


def _record_einsum(recorder: Recorder, call: ParameterCall) -> Any:
    """Two operands: a linear layer in other words, or a shared one that has the rows' letter."""
    function, func, args, kwargs, row_tensors, shared = call
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if (
        len(operands) != 2
        or len(shared) != 1
        or len(row_tensors) != 1
        or not isinstance(equation, str)
    ):
        raise Unknown
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation:
        raise Unknown
    terms, result = equation.split("->")
    x, z = row_tensors[0], shared[0]
    letters = dict(
        zip(("x", "z") if operands[0] is x else ("z", "x"), terms.split(","), strict=True)
    )
    layout = recorder.layout_of(x)
    if isinstance(layout, Indexed) or layout is SINGLE:
        raise Unknown
    if any(len(set(each)) < len(each) for each in letters.values()):
        raise Unknown  # a diagonal
    letter = letters["x"][layout.dim]
    if letter in letters["z"]:
        own = recorder.tap_own(z, letters["z"].index(letter), layout, x.shape[layout.dim])
        return run_with(recorder, call, {id(z): own})
    into = [c for c in letters["z"] if c in letters["x"]]
    free = [c for c in letters["z"] if c not in letters["x"]]
    places = [c for c in letters["x"] if c not in into]
    if (
        not into
        or not free
        or any(c in result for c in into)
        or any(c not in result for c in (*free, *places))
    ):
        raise Unknown
    transposed = letters["z"] == "".join(into + free)
    if not transposed and letters["z"] != "".join(free + into):
        raise Unknown
    rows = recorder.rows
    where = layout._replace(dim=places.index(letter))
    recorder.uses.append((function.name, recorder.owner.name_of(z), layout_key(where)))
    out = func(*args, **kwargs)

    def record(store: FactorStore, grad: torch.Tensor, kept: torch.Tensor) -> None:
        grads = grad.permute([result.index(c) for c in (*places, *free)]).flatten(len(places))
        values = kept.permute([letters["x"].index(c) for c in (*places, *into)]).flatten(
            len(places)
        )
        store.add_linear(z, _positions(grads, where, rows), values, where, transposed)

    out = recorder.tap(out, record, (x,), [x])
    recorder.mark(out, layout._replace(dim=result.index(letter)))
    return out


def _record_grouped(recorder: Recorder, call: ParameterCall) -> Any:
    """``grouped_mm`` of a mixture: one list of tokens, each by its own expert's weight."""
    function, func, args, kwargs, row_tensors, shared = call
    x, weight, offsets = _named(args, kwargs, "mat_a", "mat_b", "offs")
    if (
        row_tensors != [x]
        or not _only(shared, weight)
        or x.ndim != 2
        or weight.ndim != 3
        or offsets is None
    ):
        raise Unknown
    layout, rows = recorder.layout_of(x), recorder.rows
    if layout.dim > 0:
        raise Unknown
    ids = row_ids(layout, len(x), rows, x.device)
    ends = offsets.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    experts = [weight[k] for k in range(len(parts))]
    recorder.uses.append((function.name, recorder.owner.name_of(weight), layout_key(layout)))
    out = func(*args, **kwargs)

    def record(store: FactorStore, grad: torch.Tensor, kept: torch.Tensor) -> None:
        for expert, part in zip(experts, parts, strict=True):
            if part.stop > part.start:
                own = Indexed(ids[part])
                grads = _positions(grad[part], own, rows)
                store.add_linear(expert, grads, kept[part], own, True)

    out = recorder.tap(out, record, (x,), [x])
    recorder.mark(out, layout)
    return out


# --- shared tensors expanded to the rows ----------------------------------------------------------------


def _record_aligned(recorder: Recorder, call: ParameterCall) -> Any:
    """Functions whose arguments align from the right: shared ones are expanded to the rows."""
    function, args, row_tensors, shared = call.function, call.args, call.row_tensors, call.shared
    if function.in_place and any(args[0] is z for z in shared):
        raise UnsupportedModelError(
            f"{function.name} changes a tensor that comes from parameters alone "
            f"({recorder.owner.name_of(args[0])}) in place, with values of the rows. Wanted the function "
            f"that makes a new tensor."
        )
    x = max(row_tensors, key=lambda t: t.ndim)
    layout = recorder.layout_of(x)
    expanded = {id(z): recorder.expanded(function, z, x, layout) for z in shared}
    return run_with(recorder, call, expanded)


def _record_filled(recorder: Recorder, call: ParameterCall) -> Any:
    """``masked_fill`` and ``fill_`` with a parameter of one entry."""
    function, _, args, kwargs, _, shared = call
    value = kwargs.get("value", args[-1])
    target = args[0]
    layout = recorder.layout_of(target)
    if not _only(shared, value) or layout is None:
        raise Unknown
    out = recorder.expanded(function, value, target, layout)
    if function.name == "masked_fill":
        out = torch.where(kwargs.get("mask", args[1]), out, target)
    if function.in_place:
        return target.copy_(out)
    recorder.mark(out, shifted(layout, target, out))
    return out


def _record_template(recorder: Recorder, call: ParameterCall) -> Any:
    """Functions that take a shape or a dtype from their second argument: ``expand_as``, ``type_as``."""
    z, x = call.args[0], call.row_tensors[0]
    out = call.func(*call.args, **call.kwargs)
    if not any(z is other for other in call.shared):
        recorder.propagate(call.function, call.func, call.args, call.kwargs, call.row_tensors, out)
        return out
    if call.function.name != "expand_as":
        return out  # shared, as it was
    layout = recorder.layout_of(x)
    out = recorder.expanded(call.function, z, x, layout).expand_as(x)
    recorder.mark(out, layout)
    return out


def _swap(values: Any, expanded: dict[int, torch.Tensor]) -> Any:
    if isinstance(values, torch.Tensor):
        return expanded.get(id(values), values)
    if isinstance(values, (list, tuple)):
        swapped = [_swap(v, expanded) for v in values]
        return type(values)(swapped) if type(values) in (list, tuple) else swapped
    return values


def run_with(recorder: Recorder, call: ParameterCall, expanded: dict[int, torch.Tensor]) -> Any:
    """Run a function with other tensors for some of its arguments, and mark its output."""
    args = tuple(_swap(a, expanded) for a in call.args)
    kwargs = {k: _swap(v, expanded) for k, v in call.kwargs.items()}
    out = call.func(*args, **kwargs)
    recorder.propagate(call.function, call.func, args, kwargs, call.row_tensors, out)
    return out


def _record_joined(recorder: Recorder, call: ParameterCall) -> Any:
    """``cat`` and ``stack``."""
    function, _, args, kwargs, row_tensors, shared = call
    x = row_tensors[0]
    layout = recorder.layout_of(x)
    default = args[1] if len(args) > 1 else 0
    dim = kwargs.get("dim", kwargs.get("axis", default))
    if function.name != "stack" and dim % x.ndim == layout.dim:
        raise mixing_error(function.name)
    expanded = {}
    for z in shared:
        if z.ndim != x.ndim:
            raise Unknown
        if recorder.rows == 1 or z.shape[layout.dim] == x.shape[layout.dim]:
            expanded[id(z)] = (
                recorder.tap_own(z, layout.dim, layout, z.shape[layout.dim])
                if recorder.rows > 1
                else recorder.expanded(function, z, x, layout)
            )
        else:
            raise Unknown
    recorder.uses.append(
        (function.name, *(recorder.owner.name_of(z) for z in shared), layout_key(layout))
    )
    return run_with(recorder, call, expanded)


def _record_setitem(recorder: Recorder, call: ParameterCall) -> Any:
    """``rows[item] = shared``."""
    function, func, (target, item, value), _, _, shared = call
    layout = recorder.layout_of(target)
    if not any(z is value for z in shared) or layout is None:
        raise Unknown
    if recorder.rows == 1:
        func(target, item, recorder.expanded(function, value, target, layout))
        return None
    place = target[item]
    found = index(recorder.rows, (target, item), {}, target, layout, place)
    if isinstance(found, Mixed) or found is None:
        raise Unknown
    func(target, item, recorder.expanded(function, value, place, found))
    return None


USE_RULES: dict[str, Any] = {
    "grouped_mm": _record_grouped,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn_tanh": recurrent,
    "rnn_relu": recurrent,
    "einsum": _record_einsum,
    "linear": _record_linear,
    "addmm": _record_addmm,
    "matmul": _record_matmul,
    "mm": _record_matmul,
    "bmm": _record_matmul,
    "embedding": _record_embedding,
    "getitem": _record_getitem,
    "layer_norm": _record_norm,
    "rms_norm": _record_norm,
    "fill": _record_filled,
    "masked_fill": _record_filled,
    "expand_as": _record_template,
    "type_as": _record_template,
    "to": _record_template,
    "view_as": _record_template,
    "reshape_as": _record_template,
    "conv1d": _record_convolution,
    "conv2d": _record_convolution,
    "conv3d": _record_convolution,
    "cat": _record_joined,
    "concat": _record_joined,
    "stack": _record_joined,
    "setitem": _record_setitem,
    "scaled_dot_product_attention": _record_aligned,
    "baddbmm": _record_aligned,
}
for _name, _rule in RULES.items():
    if _rule is elementwise and _name != "prelu":
        USE_RULES.setdefault(_name, _record_aligned)
