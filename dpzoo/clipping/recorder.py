"""Sees every torch function of a forward pass, and records where rows and parameters meet.

In a private forward pass the recorder, a `TorchFunctionMode`, is asked for every torch function that
the model calls. Tensors that come from the batch are *rows* and carry a layout (`layouts`). Tensors
that need a gradient and are no rows come from trainable parameters alone: they are *shared*. Whatever
else there is, is constant.

- A function of rows and constants runs as it is, and its output is rows.
- A function of shared tensors and constants runs as it is, and its output is shared.
- Where rows and shared tensors meet, the output gets a tap (linear, embedding, layer_norm and other
  functions whose per-row gradients are known by factors), or the shared tensor is expanded to the rows
  and tapped there (functions that work entry by entry, `matmul` with batch dimensions, attention
  masks), or the per-row gradient of that one function is computed row by row (everything else).

A tap is the identity. Its backward hands what it sees to the backward pass's `Book`. It has an edge to
an anchor, a scalar that needs a gradient: asking autograd for the anchor's gradient alone runs
everything between the loss and the taps and nothing else, so no weight gradient is computed
(Bu et al. 2023, arXiv 2210.00038, section 3).

Modules play no part in this. Parameters in containers, functional ties, positions of shape (1, seq),
user hooks and parametrisations need no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpzoo.clipping import layouts
from dpzoo.clipping.book import Book
from dpzoo.clipping.layouts import AnyLayout, Layout, Mixed, Mixing, Picked, Unknown, rows_first
from dpzoo.errors import InputError, UnsupportedModelError

MARK = "_dpzoo_rows"
"""Attribute of a tensor that has rows: (number of rows, layout)."""

SAME = "_dpzoo_same"
"""Attribute of a shared tensor: dimensions along which all its entries are equal by construction."""

LOOKED_UP = "_dpzoo_lookup"
"""Attribute of a shared tensor: (table, ids, padding_idx), of which it is the look-up."""

Enter = Callable[..., None]


class Tap(torch.autograd.Function):
    """The identity on one or several tensors; its backward calls ``enter`` with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        owner: Any,
        enter: Enter,
        in_place: bool,
        count: int,
        *tensors: Any,
    ) -> Any:
        """The first ``count`` of ``tensors``, with an edge to ``anchor``; the rest is kept for backward."""
        outputs, saved = tensors[:count], tensors[count:]
        ctx.save_for_backward(*saved)
        ctx.owner, ctx.enter, ctx.inputs = owner, enter, len(tensors)
        ctx.parents = ()
        if in_place:
            ctx.mark_dirty(*outputs)
        else:
            outputs = tuple(output.view_as(output) for output in outputs)
        return outputs[0] if count == 1 else outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Pass the gradients through, and record the use."""
        ctx.owner.enter(ctx.enter, grads, ctx.saved_tensors)
        return (None, None, None, None, None, *grads, *(None,) * (ctx.inputs - len(grads)))


class Recorder(TorchFunctionMode):
    """The mode of one forward pass.

    Args:
        owner: has ``anchor``, a scalar that needs a gradient, and ``enter(enter, grads, saved)``, which
            a tap's backward calls.
        rows: of the batch.
    """

    def __init__(self, owner: Any, rows: int) -> None:
        super().__init__()
        self.owner, self.rows = owner, rows
        self.uses: list[Any] = []
        """What met what, in which layout: equal for two batches that are recorded in the same way."""
        self.guessed = False
        self.autocast = torch.is_autocast_enabled(owner.anchor.device.type)
        self._classes: dict[Any, bool] = {}

    # --- marks ----------------------------------------------------------------------------------

    def mark(self, value: Any, layout: Any = layouts.FIRST) -> None:
        """Say that a tensor has the batch's rows."""
        setattr(value, MARK, (self.rows, layout))

    def layout_of(self, tensor: torch.Tensor) -> Any:
        """The layout of a tensor's rows; None if it has none."""
        mark = getattr(tensor, MARK, None)
        if mark is None or mark[0] != self.rows:
            return None
        return mark[1]

    # --- every function -------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record what it does with rows and shared tensors."""
        entry = FUNCTIONS.get(func)
        if entry is None:
            entry = _resolve(func)
        if entry is PLAIN:
            return func(*args, **kwargs) if kwargs else func(*args)
        rows = self.rows
        rowed: list[torch.Tensor] = []
        shared: list[torch.Tensor] = []
        learning = torch.is_grad_enabled()
        for value in args if not kwargs else (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                mark = getattr(value, MARK, None)
                if mark is not None and mark[0] == rows:
                    rowed.append(value)
                elif learning and value.requires_grad:
                    shared.append(value)
            elif isinstance(value, (list, tuple)):
                for tensor in _tensors(value):
                    mark = getattr(tensor, MARK, None)
                    if mark is not None and mark[0] == rows:
                        rowed.append(tensor)
                    elif learning and tensor.requires_grad:
                        shared.append(tensor)
        kwargs = kwargs or {}
        if shared:
            lost = [t for t in shared if t.grad_fn is not None and self._has_rows(t)]
            if lost:
                for tensor in lost:
                    self._recover(tensor, entry.name)
                    rowed.append(tensor)
                shared = [t for t in shared if not any(t is other for other in lost)]
        if not shared:
            out = func(*args, **kwargs)
            if rowed:
                self._propagate(entry, func, args, kwargs, rowed, out)
            return out
        if not rowed:
            out = func(*args, **kwargs)
            self._note(entry, args, kwargs, shared, out)
            return out
        for tensor in rowed:
            if isinstance(self.layout_of(tensor), Mixed):
                raise InputError(
                    f"{entry.name} was called with a trainable parameter and a tensor in which rows of "
                    f"the batch were combined by {self.layout_of(tensor).function}, wanted rows that do "
                    f"not meet: what one row computes must not depend on another."
                )
        return self._meet(entry, func, args, kwargs, rowed, shared)

    def _propagate(
        self,
        entry: Function,
        func: Any,
        args: Any,
        kwargs: Any,
        rowed: list[torch.Tensor],
        out: Any,
    ) -> None:
        """Mark a function's output with the layout of its rows."""
        if isinstance(out, torch.Tensor):
            if entry.in_place and entry.name != "getitem":
                target = args[0]
                self._propagate_in_place(entry, args, kwargs, rowed, target)
                return
        elif not isinstance(out, (tuple, list)):
            if entry.name == "setitem":
                self._propagate_in_place(entry, args, kwargs, rowed, args[0])
            return
        layout = self._layout(entry, func, args, kwargs, rowed, out)
        self._apply(out, layout)

    def _apply(self, out: Any, layout: Any) -> None:
        if isinstance(out, torch.Tensor):
            if layout is not None:
                setattr(out, MARK, (self.rows, layout))
            return
        for k, tensor in enumerate(out):
            if isinstance(tensor, torch.Tensor):
                own = layout[k] if isinstance(layout, list) else layout
                if own is not None:
                    setattr(tensor, MARK, (self.rows, own))
            elif isinstance(tensor, (tuple, list)):
                self._apply(tensor, layout)

    def _layout(
        self,
        entry: Function,
        func: Any,
        args: Any,
        kwargs: Any,
        rowed: list[torch.Tensor],
        out: Any,
    ) -> Any:
        found: Any = None
        if entry.name in FIRST_ONLY:
            rowed = [x for x in rowed if x is args[0]]
        try:
            for x in rowed:
                layout = getattr(x, MARK)[1]
                if isinstance(layout, Mixed):
                    return layout
                one = self._layout_by(entry, func, args, kwargs, x, layout, out)
                if found is None:
                    found = one
                elif one is not None and one != found:
                    if isinstance(one, list) or not self._same_rows(one, found, out):
                        raise Mixing
        except Mixing:
            floating = any(t.is_floating_point() or t.is_complex() for t in _tensors([out]))
            return Mixed(entry.name) if floating else None
        except Unknown:
            return self._guess(entry, rowed, out)
        return found

    def _same_rows(self, a: AnyLayout, b: AnyLayout, out: Any) -> bool:
        """Whether two layouts of one output say the same of every entry."""
        if not isinstance(out, torch.Tensor) or a.dim != b.dim:
            return False
        size = out.shape[a.dim]
        ids = [layouts.row_ids(each, size, self.rows, out.device) for each in (a, b)]
        return torch.equal(*ids)

    def _layout_by(
        self, entry: Function, func: Any, args: Any, kwargs: Any, x: Any, layout: Any, out: Any
    ) -> Any:
        if entry.permuting:
            if isinstance(layout, Picked) or not isinstance(out, torch.Tensor):
                raise Unknown
            order = layouts.order_of(func, args, kwargs, x.ndim)
            return layout._replace(dim=order.index(layout.dim))
        if entry.rule is None:
            raise Unknown
        return entry.rule(self.rows, args, kwargs, x, layout, out)

    def _guess(self, entry: Function, rowed: list[torch.Tensor], out: Any) -> Any:
        """No rule: rows first, if the size is theirs. The step is checked, for these very shapes."""
        self.guessed = True
        outs = list(_tensors([out]))
        self.uses.append((entry.name, *(tuple(t.shape) for t in (*rowed, *outs))))
        layout = getattr(rowed[0], MARK)[1]
        if all(t.shape == rowed[0].shape for t in outs):
            return layout
        whole = [
            Layout(0, 1, t.shape[0] // self.rows)
            if t.ndim and t.shape[0] % self.rows == 0
            else None
            for t in outs
        ]
        return whole[0] if isinstance(out, torch.Tensor) else whole

    def _propagate_in_place(
        self,
        entry: Function,
        args: Any,
        kwargs: Any,
        rowed: list[torch.Tensor],
        target: torch.Tensor,
    ) -> None:
        """The target of an in-place function keeps its layout, or takes that of what is put in."""
        if getattr(target, MARK, None) is not None and self.layout_of(target) is not None:
            values = [x for x in rowed if x is not target]
            if entry.name in ("index_add", "index_put", "scatter_add", "index_copy"):
                self._check_target(entry, args, kwargs, target, values)
            return
        found: Any = None
        try:
            if entry.name == "setitem":
                found = self._layout_of_item(target, args[1], rowed)
            elif entry.name in ("index_add", "index_copy"):
                raise Unknown
            else:
                for x in rowed:
                    found = layouts.shifted(getattr(x, MARK)[1], x, target)
        except Unknown:
            found = None
        if found is None:
            if target.ndim and target.shape[0] % self.rows == 0:
                found = self._guess(entry, [target_like(target, rowed)], target)
            else:
                return
        self.mark(target, found)
        base = target._base
        if base is not None and self.layout_of(base) is None and base.shape == target.shape:
            self.mark(base, found)

    def _layout_of_item(self, target: torch.Tensor, item: Any, rowed: list[torch.Tensor]) -> Any:
        """The layout of ``target`` after ``target[item] = rows``, if the item leaves it whole."""
        value = rowed[-1]
        if any(value is t for t in _tensors([item])):
            raise Unknown
        layout = getattr(value, MARK)[1]
        if not isinstance(layout, Layout):
            raise Unknown
        probe = torch.empty(target.shape, device="meta")
        place = probe[item]
        dim = layout.dim + place.ndim - value.ndim
        # A dimension of the target that the item takes whole keeps its stride.
        strides = [place.stride(dim)] if place.ndim else []
        for d in range(target.ndim):
            if strides and probe.stride(d) == strides[0] and target.shape[d] == place.shape[dim]:
                return Layout(d, layout.outer, layout.inner)
        raise Unknown

    def _check_target(
        self,
        entry: Function,
        args: Any,
        kwargs: Any,
        target: torch.Tensor,
        values: list[torch.Tensor],
    ) -> None:
        """Rows that are added to places of other rows would meet."""
        layout = self.layout_of(target)
        if entry.name in ("index_add", "index_copy") and len(args) >= 4:
            dim, places, source = args[1], args[2], args[3]
            own = self.layout_of(source)
            if dim % target.ndim == layout.dim and own is not None and own.dim == dim % source.ndim:
                put = layouts.row_ids(own, source.shape[own.dim], self.rows, target.device)
                got = layouts.row_ids(layout, target.shape[layout.dim], self.rows, target.device)
                if torch.equal(got[places], put):
                    return
                self.mark(target, Mixed(entry.name))
                return
        self.guessed = True
        self.uses.append((entry.name, *(tuple(t.shape) for t in (target, *values))))

    def _note(
        self, entry: Function, args: Any, kwargs: Any, shared: list[torch.Tensor], out: Any
    ) -> None:
        """Remember of a shared output what makes its per-row gradients cheap."""
        if entry.name == "embedding" and out.grad_fn is not None:
            ids, table = args[0], args[1]
            if isinstance(table, torch.Tensor) and table.is_leaf:
                padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
                setattr(out, LOOKED_UP, (table, ids, padding))
        elif entry.name == "getitem" and isinstance(args[1], torch.Tensor) and args[0].is_leaf:
            if args[1].ndim == 1 and args[1].dtype == torch.int64 and bool((args[1] >= 0).all()):
                setattr(out, LOOKED_UP, (args[0], args[1], None))
        elif entry.name in ("repeat", "tile") and isinstance(out, torch.Tensor):
            source = shared[0]
            more = out.ndim - source.ndim
            same = {d for d in range(out.ndim) if d < more or source.shape[d - more] == 1}
            setattr(out, SAME, same)

    def _has_rows(self, tensor: torch.Tensor) -> bool:
        """Whether an unmarked tensor has taps below it: it came from rows, by a way that is not seen."""
        root = tensor.grad_fn
        if root in self._classes:
            return self._classes[root]
        seen, ahead, found = set(), [root], False
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch.autograd.function.BackwardCFunction) and isinstance(
                node, _TAP
            ):
                found = True
                break
            if self._classes.get(node) is False:
                continue
            ahead.extend(following for following, _ in node.next_functions)
        self._classes[root] = found
        return found

    def _recover(self, tensor: torch.Tensor, name: str) -> None:
        """Guess the layout of a tensor that came from rows by a function that no mode sees."""
        self.guessed = True
        self.uses.append(("unseen", name, tensor.grad_fn.name(), tuple(tensor.shape)))
        if tensor.ndim and tensor.shape[0] % self.rows == 0:
            self.mark(tensor, Layout(0, 1, tensor.shape[0] // self.rows))
            return
        raise UnsupportedModelError(
            f"{name} was called with a tensor of shape {tuple(tensor.shape)} that comes from rows of the "
            f"batch through {type(tensor.grad_fn).__name__}, which torch functions do not show, wanted "
            f"{self.rows} rows in its first dimension. Use torch functions there."
        )

    # --- rows meet parameters -------------------------------------------------------------------

    def _meet(
        self,
        entry: Function,
        func: Any,
        args: Any,
        kwargs: Any,
        rowed: list[torch.Tensor],
        shared: Any,
    ) -> Any:
        meet = MEETINGS.get(entry.name)
        if meet is not None:
            try:
                return meet(self, entry, func, args, kwargs, rowed, shared)
            except Unknown:
                pass
        return _row_by_row(self, entry, func, args, kwargs, rowed, shared)

    def tap(
        self,
        outputs: Any,
        enter: Enter,
        saved: tuple[torch.Tensor, ...] = (),
        parents: tuple[Any, ...] = (),
        *,
        in_place: bool,
    ) -> Any:
        """Tap tensors; see `Tap`."""
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if in_place:  # what views share memory with must not change its history
            outputs = tuple(o.clone() if o._base is not None else o for o in outputs)
        tapped = Tap.apply(  # type: ignore[no-untyped-call]
            self.owner.anchor, self.owner, enter, in_place, len(outputs), *outputs, *saved
        )
        node = (tapped if isinstance(tapped, torch.Tensor) else tapped[0]).grad_fn
        node.parents = parents
        return tapped

    def expanded(
        self, entry: Function, z: torch.Tensor, x: torch.Tensor, layout: AnyLayout
    ) -> torch.Tensor:
        """A shared tensor, expanded to the rows of another that it is combined with entry by entry.

        Args:
            entry: the function.
            z: the shared tensor; its dimensions align with x's from the right.
            x: a tensor with rows.
            layout: of x.
        """
        rows, size = self.rows, x.shape[layout.dim]
        right = x.ndim - layout.dim  # the rows' dimension, from the right
        self.uses.append((entry.name, "expanded", self.owner.name_of(z), layout_key(layout)))
        if z.ndim >= right and z.shape[-right] != 1 and rows > 1:
            return self._tap_own(entry, z, z.ndim - right, layout, size)
        shape = [1] * max(z.ndim, right)
        shape[len(shape) - z.ndim :] = z.shape
        shape[-right] = size
        moved = layout if isinstance(layout, Picked) else layout._replace(dim=len(shape) - right)
        if isinstance(layout, Picked) and moved.dim != len(shape) - right:
            raise Unknown

        def enter(book: Book, grad: torch.Tensor) -> None:
            book.add_dense(z, per_row(grad, moved, rows).reshape(rows, *z.shape), entry.name)

        return self.tap(z.expand(shape), enter, in_place=False)  # type: ignore[no-any-return]

    def _tap_own(
        self, entry: Function, z: torch.Tensor, dim: int, layout: AnyLayout, size: int
    ) -> torch.Tensor:
        """Tap a shared tensor that has an entry for each of the rows: row i takes part i alone."""
        rows = self.rows
        if z.shape[dim] != size:
            raise Unknown
        if isinstance(layout, Picked) and dim:
            raise Unknown
        own = layout if isinstance(layout, Picked) else layout._replace(dim=dim)
        same = z.stride(dim) == 0 or dim in getattr(z, SAME, ())
        one = z.narrow(dim, 0, 1) if same else z

        looked_up = getattr(z, LOOKED_UP, None) if dim == 0 else None
        if looked_up is not None and looked_up[1].shape != z.shape[:1]:
            looked_up = None

        def enter(book: Book, grad: torch.Tensor) -> None:
            if looked_up is not None:
                table, ids, padding = looked_up
                ids = rows_first(ids, own, rows).reshape(rows, -1)
                grads = rows_first(grad, own, rows).reshape(rows, ids.shape[1], -1)
                book.add_embedding(table, ids, grads, padding, entry.name)
                return
            if same:
                grads = per_row(grad, own, rows)
                book.add_dense(one, grads.sum(dim + 1, keepdim=True), entry.name)
                return
            ids = layouts.row_ids(own, size, rows, grad.device)
            mask = ids == torch.arange(rows, device=grad.device).unsqueeze(1)
            mask = mask.view(rows, *(1,) * dim, size, *(1,) * (z.ndim - dim - 1))
            book.add_dense(z, grad.unsqueeze(0) * mask, entry.name)

        return self.tap(z, enter, in_place=False)  # type: ignore[no-any-return]


def run_backward(
    recorder: Recorder, total: torch.Tensor, anchor: torch.Tensor | None, *, retain_graph: bool
) -> None:
    """A backward pass in which non-reentrant checkpoints are recorded as they were in the forward pass.

    They run their layers once more, inside the backward pass, with the modes that were on when the
    engine was started. `torch.autograd.grad` is a torch function itself, and would start it with the
    mode off; so the engine is called directly.

    Args:
        recorder: of the forward pass.
        total: a scalar.
        anchor: what a gradient is asked for; None for all leaves, into their ``grad``.
        retain_graph: whether the graph is needed again.
    """
    ones = torch.ones_like(total)
    with recorder:
        _engine_run_backward(
            (total,),
            (ones,),
            retain_graph,
            False,
            () if anchor is None else (anchor,),
            allow_unreachable=True,
            accumulate_grad=anchor is None,
        )


def layout_key(layout: AnyLayout) -> Any:
    """What of a layout does not depend on the batch's sizes."""
    if isinstance(layout, Picked):
        return "picked"
    return (layout.dim, layout.outer > 1, layout.inner > 1)


def per_row(grad: torch.Tensor, layout: AnyLayout, rows: int) -> torch.Tensor:
    """(rows, ...): what was folded with the rows' dimension is summed, to one entry."""
    if isinstance(layout, Picked):
        out = grad.new_zeros(rows, *grad.shape[1:])
        return out.index_add_(0, layout.ids, grad).unsqueeze(1)
    first = rows_first(grad, layout, rows)
    if layout.inner * layout.outer > 1:
        first = first.sum(layout.dim + 1, keepdim=True)
    return first


def target_like(target: torch.Tensor, rowed: list[torch.Tensor]) -> torch.Tensor:
    """The tensor with rows whose layout an in-place target is guessed from."""
    return next((x for x in rowed if x.shape == target.shape), rowed[0])


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


# --- functions --------------------------------------------------------------------------------------


class Function:
    """What is known of a torch function.

    Args:
        name: without underscores.
        in_place: whether it changes its first argument.
    """

    __slots__ = ("in_place", "name", "permuting", "rule")

    def __init__(self, name: str, in_place: bool) -> None:
        self.name, self.in_place = name, in_place
        self.permuting = name in layouts.PERMUTING
        self.rule = layouts.RULES.get(name)


PLAIN = Function("plain", False)
"""Functions that look at a tensor and give none: shapes, dtypes, numbers."""

PLAIN_NAMES = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "requires_grad",
        "is_leaf",
        "grad_fn",
        "ndim",
        "is_cuda",
        "is_cpu",
        "layout",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "is_nested",
        "is_mps",
        "is_xla",
        "is_xpu",
        "name",
        "names",
        "output_nr",
        "nbytes",
        "itemsize",
        "_version",
        "_base",
        "_backward_hooks",
        "grad",
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "element_size",
        "len",
        "item",
        "tolist",
        "bool",
        "int",
        "float_",
        "index",
        "repr",
        "str",
        "format",
        "hash",
        "get_device",
        "ndimension",
        "data_ptr",
        "untyped_storage",
        "storage",
        "is_inference",
        "is_signed",
        "is_same_size",
        "result_type",
        "broadcast_shapes",
        "allclose",
        "equal",
        "is_tensor",
        "is_nonzero",
        "register_hook",
        "retain_grad",
        "retains_grad",
        "backward",
        "set_grad_enabled",
        "is_pinned",
        "can_cast",
        "is_conj",
        "is_neg",
        "is_shared",
        "volatile",
        "numpy",
        "array",
        "reduce_ex",
        "deepcopy",
        "dir",
        "contains",
        "iter_",
        "requires_grad_",
        "is_coalesced",
        "sym_size",
        "sym_numel",
        "sym_stride",
        "register_post_accumulate_grad_hook",
        "is_autocast_enabled",
    ]
)

FIRST_ONLY = frozenset(["type_as", "view_as", "reshape_as", "expand_as", "to", "broadcast_to"])
"""Functions that take their values from the first argument alone."""

FUNCTIONS: dict[Any, Function] = {}


def _resolve(func: Any) -> Function:
    name = getattr(func, "__name__", "") or str(func)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        entry = (
            Function(name, False)
            if name in ("T", "mT", "H", "mH", "data", "real", "imag")
            else PLAIN
        )
    elif name in ("__set__", "__delete__"):
        entry = PLAIN
    else:
        bare = name.strip("_")
        item = name == "__setitem__"
        in_place = (
            item
            or (name.endswith("_") and not name.endswith("__"))
            or (
                name.startswith("__i")
                and bare[1:]
                in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
            )
        )
        if name.startswith("__i") and in_place:
            bare = bare[1:]
        plain = bare in PLAIN_NAMES and not in_place
        if name in ("__int__", "__float__", "__bool__", "__index__", "__len__", "__complex__"):
            plain = True
        elif bare in ("int", "float", "bool"):
            plain = False
        entry = PLAIN if plain else Function(bare, in_place)
    FUNCTIONS[func] = entry
    return entry


# --- meetings: functions whose per-row gradients are known by factors -----------------------------------


def _only(shared: list[torch.Tensor], *known: Any) -> bool:
    return all(any(z is k for k in known) for z in shared)


def _parents(rowed: list[torch.Tensor]) -> tuple[Any, ...]:
    return tuple(x.grad_fn for x in rowed if x.grad_fn is not None)


def _named(call: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    return [call[k] if k < len(call) else kwargs.get(name) for k, name in enumerate(names)]


def _positions(x: torch.Tensor, layout: AnyLayout, rows: int) -> torch.Tensor:
    """(rows, positions, features); the features are the last dimension."""
    first = rows_first(x, layout, rows)
    return first.reshape(rows, first[0, ..., 0].numel(), first.shape[-1])


def _meet_linear(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    x, weight, bias = _named(args, kwargs, "input", "weight", "bias")
    if len(rowed) != 1 or rowed[0] is not x or not _only(shared, weight, bias):
        raise Unknown
    return _linear(self, entry, func(*args, **kwargs), x, weight, bias, shared)


def _linear(
    self: Recorder,
    entry: Function,
    out: Any,
    x: Any,
    weight: Any,
    bias: Any,
    shared: Any,
    *,
    turned: bool = False,
) -> Any:
    """Tap ``out = x @ weight^T + bias``; ``turned``: the weight is (in, out), as matmul takes it."""
    layout = self.layout_of(x)
    if layout.dim == x.ndim - 1:
        raise Mixing_error(entry.name)
    rows = self.rows
    takes_weight = any(weight is z for z in shared)
    takes_bias = bias is not None and any(bias is z for z in shared)
    names = [self.owner.name_of(z) for z, on in ((weight, takes_weight), (bias, takes_bias)) if on]
    self.uses.append((entry.name, *names, layout_key(layout)))

    def enter(book: Book, grad: torch.Tensor, *saved: torch.Tensor) -> None:
        grads = _positions(grad, layout, rows)
        if takes_bias:
            book.add_dense(bias, _summed_to(grads, bias), entry.name)
        if takes_weight:
            book.add_linear(weight, grads, saved[0], layout, turned, entry.name)

    out = self.tap(out, enter, (x,) if takes_weight else (), _parents([x]), in_place=True)
    self.mark(out, layout)
    return out


def _summed_to(grads: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(rows, positions, out) -> (rows, *bias.shape), for a bias of (out,), or (1,), or (1, out)."""
    total = grads.float().sum(1) if grads.dtype in (torch.float16, torch.bfloat16) else grads.sum(1)
    if bias.shape[-1] != total.shape[-1]:
        total = total.sum(-1, keepdim=True)
    return total.reshape(len(grads), *bias.shape)


def Mixing_error(name: str) -> InputError:  # noqa: N802
    """The error for a function that combines rows."""
    return InputError(
        f"{name} combines rows of the batch, wanted each row by itself: what one row computes must not "
        f"depend on another."
    )


def _meet_addmm(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    bias, x, weight = _named(args, kwargs, "input", "mat1", "mat2")
    scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
    if entry.in_place or scaled or len(args) > 3 or rowed != [x] or not _only(shared, weight, bias):
        raise Unknown
    if bias.ndim > 1 and bias.shape[0] != 1:
        raise Unknown
    return _linear(self, entry, func(*args, **kwargs), x, weight, bias, shared, turned=True)


def _meet_matmul(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
    if entry.name == "rmatmul":
        raise Unknown
    if len(rowed) != 1 or len(shared) != 1 or kwargs.get("out") is not None:
        raise Unknown
    x, z = rowed[0], shared[0]
    layout = self.layout_of(x)
    if x is a and z.ndim == 2 and layout.dim != x.ndim - 1 and x.ndim > 1:
        return _linear(self, entry, func(*args, **kwargs), x, z, None, shared, turned=True)
    if x.ndim < 3 or z.ndim == 1 or layout.dim >= x.ndim - 2:
        raise Unknown
    if entry.name in ("bmm", "mm") and z.shape[0] != x.shape[0]:
        raise Unknown
    wide_z = self.expanded(entry, z, x, layout)
    out = func(
        *(wide_z if v is z else v for v in args),
        **{k: wide_z if v is z else v for k, v in kwargs.items()},
    )
    self._apply(
        out,
        layouts.product(
            self.rows, (a if a is x else wide_z, b if b is x else wide_z), {}, x, layout, out
        ),
    )
    return out


def _meet_embedding(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
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
    if rowed != [ids] or not _only(shared, table):
        raise Unknown
    name = self.owner.name_of(table)
    if max_norm is not None or by_frequency or sparse:
        raise UnsupportedModelError(
            f"{name} is looked up with max_norm, scale_grad_by_freq or sparse, which make a row's "
            f"gradient depend on other rows or have no dense form. Wanted a plain look-up."
        )
    return _lookup(self, entry, func(*args, **kwargs), ids, table, padding)


def _lookup(self: Recorder, entry: Function, out: Any, ids: Any, table: Any, padding: Any) -> Any:
    layout, rows = self.layout_of(ids), self.rows
    self.uses.append((entry.name, self.owner.name_of(table), layout_key(layout)))

    def enter(book: Book, grad: torch.Tensor, kept: torch.Tensor) -> None:
        spread = grad.reshape(*kept.shape, -1)
        book.add_embedding(
            table,
            _positions(kept.unsqueeze(-1), layout, rows).squeeze(-1),
            _positions(spread, layout, rows),
            padding,
            entry.name,
        )

    out = self.tap(out, enter, (ids,), in_place=True)
    self.mark(out, layout)
    return out


def _meet_getitem(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    table, item = args[0], args[1]
    if isinstance(item, tuple) and len(item) == 1:
        item = item[0]
    if (
        not isinstance(item, torch.Tensor)
        or item.dtype == torch.bool
        or rowed != [item]
        or not _only(shared, table)
    ):
        raise Unknown
    if bool((item < 0).any()):
        raise Unknown
    return _lookup(self, entry, func(*args, **kwargs), item, table, None)


def _meet_norm(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    rms = entry.name == "rms_norm"
    names = (
        ("input", "normalized_shape", "weight", "eps")
        if rms
        else ("input", "normalized_shape", "weight", "bias", "eps")
    )
    values = dict(zip(names, _named(args, kwargs, *names), strict=True))
    x, shape, weight, bias = (
        values["input"],
        values["normalized_shape"],
        values["weight"],
        values.get("bias"),
    )
    if rowed != [x] or not _only(shared, weight, bias):
        raise Unknown
    eps = values["eps"] if values["eps"] is not None else (None if rms else 1e-5)
    layout, rows = self.layout_of(x), self.rows
    if layout.dim >= x.ndim - len(shape):
        raise Mixing_error(entry.name)
    takes_weight, takes_bias = (
        v is not None and any(v is z for z in shared) for v in (weight, bias)
    )
    used = [self.owner.name_of(z) for z, on in ((weight, takes_weight), (bias, takes_bias)) if on]
    self.uses.append((entry.name, *used, layout_key(layout)))
    out = func(*args, **kwargs)

    def enter(book: Book, grad: torch.Tensor, *saved: torch.Tensor) -> None:
        grads = book.upcast(grad)
        if takes_bias:
            book.add_dense(bias, _to_shape(grads, layout, rows, len(shape)), entry.name)
        if takes_weight:
            x_ = book.upcast(saved[0])
            again = F.rms_norm(x_, shape, eps=eps) if rms else F.layer_norm(x_, shape, eps=eps)
            book.add_dense(
                weight, _to_shape(again.mul_(grads), layout, rows, len(shape)), entry.name
            )

    out = self.tap(out, enter, (x,) if takes_weight else (), _parents([x]), in_place=True)
    self.mark(out, layout)
    return out


def _to_shape(grads: torch.Tensor, layout: AnyLayout, rows: int, trailing: int) -> torch.Tensor:
    """(rows, *shape): all but the ``trailing`` last dimensions summed."""
    first = rows_first(grads, layout, rows)
    dims = tuple(range(1, first.ndim - trailing))
    return first.sum(dims) if dims else first


def _meet_convolution(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """A convolution of patches that do not overlap is a linear layer; other ones go row by row."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _named(args, kwargs, *names)
    window = tuple(weight.shape[2:])

    def each(value: Any, default: int) -> tuple[Any, ...]:
        value = default if value is None else value
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(window)

    plain = each(padding, 0) == (0,) * len(window) and each(dilation, 1) == (1,) * len(window)
    if rowed != [x] or self.layout_of(x) != layouts.FIRST or (groups or 1) != 1 or not plain:
        raise Unknown
    if each(stride, 1) != window or not _only(shared, weight, bias) or x.ndim != weight.ndim:
        raise Unknown
    rows = self.rows
    takes_weight, takes_bias = (
        v is not None and any(v is z for z in shared) for v in (weight, bias)
    )
    used = [self.owner.name_of(z) for z, on in ((weight, takes_weight), (bias, takes_bias)) if on]
    self.uses.append((entry.name, *used))
    out = func(*args, **kwargs)

    def enter(book: Book, grad: torch.Tensor, *saved: torch.Tensor) -> None:
        grads = grad.flatten(2).transpose(1, 2)
        if takes_bias:
            book.add_dense(bias, _summed_to(grads, bias), entry.name)
        if takes_weight:
            patches = saved[0]
            for dim, size in enumerate(window):
                patches = patches.unfold(2 + dim, size, size)
            spots = grad.ndim - 2
            patches = patches.permute(0, *range(2, 2 + spots), 1, *range(2 + spots, patches.ndim))
            patches = patches.reshape(rows, grads.shape[1], -1)
            book.add_linear(weight, grads, patches, layouts.FIRST, False, entry.name)

    out = self.tap(out, enter, (x,) if takes_weight else (), _parents([x]), in_place=True)
    self.mark(out, layouts.FIRST)
    return out


# --- meetings by expansion ------------------------------------------------------------------------------


def _meet_aligned(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """Functions whose arguments align from the right: shared ones are expanded to the rows."""
    if entry.in_place and any(args[0] is z for z in shared):
        raise UnsupportedModelError(
            f"{entry.name} changes a tensor that comes from parameters alone "
            f"({self.owner.name_of(args[0])}) in place, with values of the rows. Wanted the function that "
            f"makes a new tensor."
        )
    x = max(rowed, key=lambda t: t.ndim)
    layout = self.layout_of(x)
    wide = {id(z): self.expanded(entry, z, x, layout) for z in shared}
    return self._run_with(entry, func, args, kwargs, rowed, wide)


def _swap(values: Any, wide: dict[int, torch.Tensor]) -> Any:
    if isinstance(values, torch.Tensor):
        return wide.get(id(values), values)
    if isinstance(values, (list, tuple)):
        swapped = [_swap(v, wide) for v in values]
        return type(values)(swapped) if type(values) in (list, tuple) else swapped
    return values


def _run_with(
    self: Recorder,
    entry: Function,
    func: Any,
    args: Any,
    kwargs: Any,
    rowed: Any,
    wide: dict[int, torch.Tensor],
) -> Any:
    args = tuple(_swap(a, wide) for a in args)
    kwargs = {k: _swap(v, wide) for k, v in kwargs.items()}
    out = func(*args, **kwargs)
    self._propagate(entry, func, args, kwargs, rowed, out)
    return out


Recorder._run_with = _run_with  # type: ignore[attr-defined]


def _meet_joined(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """``cat`` and ``stack``."""
    x = rowed[0]
    layout = self.layout_of(x)
    default = args[1] if len(args) > 1 else 0
    dim = kwargs.get("dim", kwargs.get("axis", default))
    if entry.name != "stack" and dim % x.ndim == layout.dim:
        raise Mixing_error(entry.name)
    wide = {}
    for z in shared:
        if z.ndim != x.ndim:
            raise Unknown
        if self.rows == 1 or z.shape[layout.dim] == x.shape[layout.dim]:
            wide[id(z)] = (
                self._tap_own(entry, z, layout.dim, layout, z.shape[layout.dim])
                if self.rows > 1
                else self.expanded(entry, z, x, layout)
            )
        else:
            raise Unknown
    self.uses.append((entry.name, *(self.owner.name_of(z) for z in shared), layout_key(layout)))
    return self._run_with(entry, func, args, kwargs, rowed, wide)


def _meet_setitem(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """``rows[item] = shared``."""
    target, item, value = args
    layout = self.layout_of(target)
    if not any(z is value for z in shared) or layout is None:
        raise Unknown
    place = target[item]
    found = layouts.index(self.rows, (target, item), {}, target, layout, place)
    if isinstance(found, Mixed) or found is None:
        raise Unknown
    func(target, item, self.expanded(entry, value, place, found))
    return None


# --- everything else: the function by itself, row by row ------------------------------------------------


def _row_by_row(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """Tap a function's output; its per-row gradients are its own vector-Jacobian products, row by row."""
    rows = self.rows
    flat = [*args, *kwargs.values()]
    keys, count = list(kwargs), len(args)
    spots = list(_spots(flat))
    row_spots = [s for s in spots if any(_at(flat, s) is x for x in rowed)]
    shared_spots = [s for s in spots if any(_at(flat, s) is z for z in shared)]
    zs = [_at(flat, s) for s in shared_spots]
    lays = [self.layout_of(_at(flat, s)) for s in row_spots]
    if entry.in_place:
        raise UnsupportedModelError(
            f"{entry.name} in place, of rows of the batch and {', '.join(map(self.owner.name_of, zs))}, is not "
            f"supported. Wanted the function that makes a new tensor."
        )
    if entry.name in ("batch_norm", "native_batch_norm"):
        training = kwargs.get("training", args[5] if len(args) > 5 else False)
        if training:
            raise Mixing_error("batch_norm in training mode")
    if any(isinstance(lay, Picked) for lay in lays):
        raise UnsupportedModelError(
            f"{entry.name} of rows that were picked by index and {', '.join(map(self.owner.name_of, zs))} is "
            f"not supported: its per-row gradients have no rule."
        )
    out = func(*args, **kwargs)
    outs = (out,) if isinstance(out, torch.Tensor) else tuple(o for o in out if o is not None)
    if not all(isinstance(o, torch.Tensor) for o in outs):
        raise UnsupportedModelError(
            f"{entry.name} of rows of the batch and {', '.join(map(self.owner.name_of, zs))} returns "
            f"{type(out).__name__}, wanted tensors."
        )
    found = self._layout(entry, func, args, kwargs, rowed, out)
    founds = found[: len(outs)] if isinstance(found, list) else [found] * len(outs)
    if any(not isinstance(f, Layout) for f in founds):
        raise (
            Mixing_error(entry.name)
            if any(isinstance(f, Mixed) for f in founds)
            else UnsupportedModelError(
                f"{entry.name} of {', '.join(map(self.owner.name_of, zs))} gives {[tuple(o.shape) for o in outs]} for "
                f"{rows} rows, and it is not known where its rows are. Use other functions there, or freeze "
                f"the parameter."
            )
        )
    self.uses.append(
        (entry.name, "row by row", *map(self.owner.name_of, zs), *map(layout_key, founds))
    )
    smooth = [k for k, o in enumerate(outs) if o.requires_grad]

    def call(row_values: Any, z_values: Any) -> Any:
        values = [list(v) if isinstance(v, (list, tuple)) else v for v in flat]
        for spot, value in (
            *zip(row_spots, row_values, strict=True),
            *zip(shared_spots, z_values, strict=True),
        ):
            if spot[1] is None:
                values[spot[0]] = value
            else:
                values[spot[0]][spot[1]] = value
        result = func(*values[:count], **dict(zip(keys, values[count:], strict=True)))
        results = (
            (result,) if isinstance(result, torch.Tensor) else [r for r in result if r is not None]
        )
        return tuple(results[k] for k in smooth)

    def enter(book: Book, *given: torch.Tensor) -> None:
        grads = [rows_first(given[k], founds[k], rows) for k in smooth]
        kept = [rows_first(x, lay, rows) for x, lay in zip(given[len(outs) :], lays, strict=True)]
        constants = [z.detach() for z in zs]

        def one(row_grads: Any, row_values: Any) -> Any:
            _, pull = torch.func.vjp(lambda *z: call(row_values, z), *constants)
            return pull(tuple(row_grads))

        try:
            samples = torch.func.vmap(one, randomness="error")(grads, kept)
        except Exception:  # a function without a rule for vmap: one row after the other
            with torch.enable_grad():
                leaves = [z.requires_grad_() for z in (c.clone() for c in constants)]
                each = []
                for i in range(rows):
                    made = call([k[i] for k in kept], leaves)
                    each.append(
                        torch.autograd.grad(made, leaves, [g[i] for g in grads], allow_unused=True)
                    )
            samples = [
                torch.stack([g if g is not None else torch.zeros_like(c) for g in column])
                for column, c in zip(zip(*each, strict=True), constants, strict=True)
            ]
        for z, sample in zip(zs, samples, strict=True):
            book.add_dense(z, sample, entry.name)

    saved = tuple(_at(flat, s) for s in row_spots)
    tapped = tuple(outs[k].clone() if k in smooth else outs[k] for k in range(len(outs)))
    tapped = self.tap(tapped, enter, saved, _parents(rowed), in_place=True)
    tapped = tapped if isinstance(tapped, tuple) else (tapped,)
    for tensor, lay in zip(tapped, founds, strict=True):
        self.mark(tensor, lay)
    if isinstance(out, torch.Tensor):
        return tapped[0]
    rest = iter(tapped)
    return type(out)([None if o is None else next(rest) for o in out])


def _spots(values: list[Any]) -> Iterator[tuple[int, int | None]]:
    for k, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield k, None
        elif isinstance(value, (list, tuple)):
            yield from ((k, j) for j, v in enumerate(value) if isinstance(v, torch.Tensor))


def _at(values: list[Any], spot: tuple[int, int | None]) -> Any:
    return values[spot[0]] if spot[1] is None else values[spot[0]][spot[1]]


def _meet_einsum(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """Two operands: a linear layer in other words, or a shared one that has the rows' letter."""
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if len(operands) != 2 or len(shared) != 1 or len(rowed) != 1 or not isinstance(equation, str):
        raise Unknown
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation:
        raise Unknown
    terms, result = equation.split("->")
    x, z = rowed[0], shared[0]
    letters = dict(
        zip(("x", "z") if operands[0] is x else ("z", "x"), terms.split(","), strict=True)
    )
    layout = self.layout_of(x)
    if isinstance(layout, Picked):
        raise Unknown
    letter = letters["x"][layout.dim]
    if letter in letters["z"]:
        own = self._tap_own(entry, z, letters["z"].index(letter), layout, x.shape[layout.dim])
        return self._run_with(entry, func, args, kwargs, rowed, {id(z): own})
    into = [c for c in letters["z"] if c in letters["x"]]
    free = [c for c in letters["z"] if c not in letters["x"]]
    places = [c for c in letters["x"] if c not in into]
    if any(c in result for c in into) or any(c not in result for c in (*free, *places)):
        raise Unknown
    turned = letters["z"] == "".join(into + free)
    if not turned and letters["z"] != "".join(free + into):
        raise Unknown
    rows = self.rows
    where = layout._replace(dim=places.index(letter))
    self.uses.append((entry.name, self.owner.name_of(z), layout_key(where)))
    out = func(*args, **kwargs)

    def enter(book: Book, grad: torch.Tensor, kept: torch.Tensor) -> None:
        grads = grad.permute([result.index(c) for c in (*places, *free)]).flatten(len(places))
        values = kept.permute([letters["x"].index(c) for c in (*places, *into)]).flatten(
            len(places)
        )
        book.add_linear(z, _positions(grads, where, rows), values, where, turned, entry.name)

    out = self.tap(out, enter, (x,), _parents([x]), in_place=True)
    self.mark(out, layout._replace(dim=result.index(letter)))
    return out


def _meet_recurrent(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """``lstm`` and its kin: the first states have rows in their second dimension, as the layer reads them."""
    if isinstance(args[1], torch.Tensor) and isinstance(args[2], torch.Tensor):
        raise UnsupportedModelError(
            f"{entry.name} of packed sequences is not supported: rows of different lengths are cut into one "
            f"list there. Wanted padded sequences, (rows, seq, features)."
        )
    states = [s for s in _tensors([args[1]]) if self.layout_of(s) is None]
    if not any(s is z for s in states for z in shared):
        for state in states:
            self.mark(state, Layout(1))
        rowed = [*rowed, *states]
    return _row_by_row(self, entry, func, args, kwargs, rowed, shared)


def _meet_grouped(
    self: Recorder, entry: Function, func: Any, args: Any, kwargs: Any, rowed: Any, shared: Any
) -> Any:
    """``grouped_mm`` of a mixture: tokens of one list, in the experts' order, each by its expert's weight."""
    x, weight, offsets = _named(args, kwargs, "mat_a", "mat_b", "offs")
    if rowed != [x] or not _only(shared, weight) or x.ndim != 2 or weight.ndim != 3 or offsets is None:
        raise Unknown
    layout, rows = self.layout_of(x), self.rows
    if layout.dim:
        raise Unknown
    ids = layouts.row_ids(layout, len(x), rows, x.device)
    ends = offsets.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    experts = [weight[k] for k in range(len(parts))]
    self.uses.append((entry.name, self.owner.name_of(weight), layout_key(layout)))
    out = func(*args, **kwargs)

    def enter(book: Book, grad: torch.Tensor, kept: torch.Tensor) -> None:
        for expert, part in zip(experts, parts, strict=True):
            if part.stop > part.start:
                own = Picked(ids[part])
                grads = _positions(grad[part], own, rows)
                book.add_linear(expert, grads, kept[part], own, True, entry.name)

    out = self.tap(out, enter, (x,), _parents([x]), in_place=True)
    self.mark(out, layout)
    return out


MEETINGS: dict[str, Any] = {
    "grouped_mm": _meet_grouped,
    "lstm": _meet_recurrent,
    "gru": _meet_recurrent,
    "rnn_tanh": _meet_recurrent,
    "rnn_relu": _meet_recurrent,
    "einsum": _meet_einsum,
    "linear": _meet_linear,
    "addmm": _meet_addmm,
    "matmul": _meet_matmul,
    "mm": _meet_matmul,
    "bmm": _meet_matmul,
    "embedding": _meet_embedding,
    "getitem": _meet_getitem,
    "layer_norm": _meet_norm,
    "rms_norm": _meet_norm,
    "conv1d": _meet_convolution,
    "conv2d": _meet_convolution,
    "conv3d": _meet_convolution,
    "cat": _meet_joined,
    "concat": _meet_joined,
    "stack": _meet_joined,
    "setitem": _meet_setitem,
    "scaled_dot_product_attention": _meet_aligned,
    "baddbmm": _meet_aligned,
}
for _name, _rule in layouts.RULES.items():
    if _rule is layouts.elementwise and _name != "prelu":
        MEETINGS.setdefault(_name, _meet_aligned)

_TAP: Any = Tap._backward_cls
