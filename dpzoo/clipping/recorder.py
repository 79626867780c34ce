"""Sees every torch function of a forward pass, and records where rows and parameters are used together.

In a private forward pass the recorder, a `TorchFunctionMode`, is asked for every torch function that
the model calls. Tensors that come from the batch are *rows* and carry a layout (`layouts`). Tensors
that need a gradient and are no rows come from trainable parameters alone: they are *shared*. Whatever
else there is, is constant.

- A function of rows and constants runs as it is, and its output is rows.
- A function of shared tensors and constants runs as it is, and its output is shared.
- A function of both is a use of parameters. The output gets a tap (linear, embedding, layer_norm and
  other functions whose per-row gradients are known by factors), or the shared tensor is expanded to the
  rows and tapped there (functions that work entry by entry, `matmul` with batch dimensions, attention
  masks), or the per-row gradient of that one function is computed row by row (everything else).

A tap is the identity. Its backward gives what it sees to the backward pass's `FactorStore`. It has an
edge to an anchor, a scalar that needs a gradient. Asking autograd for the anchor's gradient alone runs
everything between the loss and the taps, and nothing else, so no weight gradient is computed
(Bu et al. 2023, arXiv 2210.00038, section 3).

Modules play no part in this. Parameters in containers, functional ties, positions of shape (1, seq),
user hooks and parametrisations need no special case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from dpzoo.clipping.autograd_graph import TAP, RecordUse, Tap, inputs_of, walk
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.functions import FIRST_ONLY, FUNCTIONS, PLAIN, Function, resolve, tensors_in
from dpzoo.clipping.layout_rules import order_of
from dpzoo.clipping.layouts import (
    FIRST,
    LOOKED_UP,
    MARK,
    SAME,
    SINGLE,
    AnyLayout,
    Indexed,
    Layout,
    Mixed,
    Mixing,
    Unknown,
    indexed,
    known,
    layout_key,
    layout_of,
    per_row,
    row_ids,
    rows_first,
    shifted,
)
from dpzoo.errors import InputError, UnsupportedModelError

INDEXING = ("getitem", "unbind", "select", "split", "chunk")
"""Functions that take single rows out of a batch: not alone a reason to refuse what a row computes."""


class ParameterCall(NamedTuple):
    """A call of a torch function with rows and shared tensors."""

    function: Function
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    row_tensors: list[torch.Tensor]
    shared: list[torch.Tensor]


UNSEEN = "an unseen function (beside other rows a row gets another output)"

SIZED = (
    *("new_zeros", "new_ones", "new_empty", "new_full", "narrow"),
    *("view", "reshape", "expand", "unflatten"),
)
"""Functions that take whole numbers for sizes."""


class Recorder(TorchFunctionMode):
    """The mode of one forward pass.

    Args:
        owner: has ``anchor``, a scalar that needs a gradient, and ``record_use(record, grads, saved)``,
            which a tap's backward calls.
        rows: of the batch.
        record_call: runs a function of rows and shared tensors: `dpzoo.clipping.use_rules.record_call`.
    """

    def __init__(
        self, owner: Any, rows: int, record_call: Callable[[Recorder, ParameterCall], Any]
    ) -> None:
        super().__init__()
        self.owner, self.rows, self._record_call = owner, rows, record_call
        self.uses: list[Any] = []
        """Which function used what, in which layout: equal for batches that are recorded alike."""
        self.guessed = False
        self.on = self.spent = False
        """Whether the forward pass is under way; whether a backward pass was recorded."""
        self.mixed: list[tuple[Any, str]] = []
        """Nodes of outputs in which rows were combined, and the function that combined them."""
        self._used_shared: list[tuple[Any, int, str]] = []
        self.inputs: list[torch.Tensor] = []
        """The batch's tensors with its rows in front, (rows, ...) each."""
        self._outputs: list[weakref.ref[torch.Tensor]] = []
        self.autocast = torch.is_autocast_enabled(owner.anchor.device.type)
        self._classes: dict[Any, bool] = {}

    # --- marks ----------------------------------------------------------------------------------

    def mark(self, value: Any, layout: Any = FIRST) -> None:
        """Say that a tensor has the batch's rows."""
        if self.rows == 1:
            layout = SINGLE
        setattr(value, MARK, (self.rows, layout))

    def layout_of(self, tensor: torch.Tensor) -> Any:
        """The layout of a tensor's rows; None if it has none."""
        return layout_of(tensor, self.rows)

    # --- every function -------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record what it does with rows and shared tensors."""
        entry = FUNCTIONS.get(func)
        if entry is None:
            entry = resolve(func)
        if entry is PLAIN:
            return func(*args, **kwargs) if kwargs else func(*args)
        rows = self.rows
        row_tensors: list[torch.Tensor] = []
        shared: list[torch.Tensor] = []
        learning = torch.is_grad_enabled()
        for value in args if not kwargs else (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                mark = getattr(value, MARK, None)
                if mark is not None and mark[0] == rows:
                    row_tensors.append(value)
                elif learning and value.requires_grad:
                    shared.append(value)
            elif isinstance(value, (list, tuple)):
                for tensor in tensors_in(value):
                    mark = getattr(tensor, MARK, None)
                    if mark is not None and mark[0] == rows:
                        row_tensors.append(tensor)
                    elif learning and tensor.requires_grad:
                        shared.append(tensor)
        kwargs = kwargs or {}
        if shared:
            lost = [t for t in shared if t.grad_fn is not None and self._has_rows(t)]
            if lost:
                for tensor in lost:
                    self._recover(tensor, entry.name)
                    row_tensors.append(tensor)
                shared = [t for t in shared if not any(t is other for other in lost)]
        if not shared:
            out = func(*args, **kwargs)
            if row_tensors:
                if entry.simple and len(row_tensors) == 1 and type(out) is torch.Tensor:
                    x = row_tensors[0]
                    if out.ndim == x.ndim:  # the usual case, in short
                        setattr(out, MARK, getattr(x, MARK))
                        return out
                self.propagate(entry, func, args, kwargs, row_tensors, out)
            return out
        if not row_tensors:
            out = func(*args, **kwargs)
            self._note(entry, args, kwargs, shared, out)
            return out
        for tensor in row_tensors:
            if isinstance(self.layout_of(tensor), Mixed):
                raise InputError(
                    f"{entry.name} was called with a trainable parameter and a tensor in which rows of "
                    f"the batch were combined by {self.layout_of(tensor).function}, wanted rows that are "
                    f"kept apart: what one row computes must not depend on another."
                )
        for z in shared:
            if z.grad_fn is not None:
                self._used_shared.append((weakref.ref(z), z._version, entry.name))
        return self._record_call(
            self, ParameterCall(entry, func, args, kwargs, row_tensors, shared)
        )

    def propagate(
        self,
        entry: Function,
        func: Any,
        args: Any,
        kwargs: Any,
        row_tensors: list[torch.Tensor],
        out: Any,
    ) -> None:
        """Mark a function's output with the layout of its rows."""
        if isinstance(out, torch.Tensor):
            if entry.in_place and entry.name != "getitem":
                target = args[0]
                self._in_place(entry, args, kwargs, row_tensors, target)
                return
        elif not isinstance(out, (tuple, list)):
            if entry.name == "register_hook":
                self.uses.append((entry.name,))
            if entry.name == "setitem":
                self._in_place(entry, args, kwargs, row_tensors, args[0])
            return
        layout = self.layout_of_output(entry, func, args, kwargs, row_tensors, out)
        self.mark_all(out, layout)

    def mark_all(self, out: Any, layout: Any) -> None:
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
                self.mark_all(tensor, layout)

    def layout_of_output(
        self,
        entry: Function,
        func: Any,
        args: Any,
        kwargs: Any,
        row_tensors: list[torch.Tensor],
        out: Any,
    ) -> Any:
        found: Any = None
        if self.rows == 1:
            return SINGLE
        if entry.name in FIRST_ONLY:
            row_tensors = [x for x in row_tensors if x is args[0]]
        try:
            for x in row_tensors:
                layout = getattr(x, MARK)[1]
                if isinstance(layout, Mixed):
                    if not x.is_floating_point() and (entry.name in SIZED or _are_places(out)):
                        continue  # a size, or how far a mask goes: more or less padding
                    return layout
                one = self._layout_by(entry, func, args, kwargs, x, layout, out)
                if found is None:
                    found = one
                elif one is not None and one != found and not self._same_rows(one, found, out):
                    raise Mixing
        except Mixing:
            self.uses.append(("mixed", entry.name))
            return None if _are_places(out) else Mixed(entry.name)
        except Unknown:
            return self._guess(entry, row_tensors, out)
        return found

    def _same_rows(self, a: AnyLayout, b: AnyLayout, out: Any) -> bool:
        """Whether two layouts of one output say the same of every entry."""
        if not isinstance(out, torch.Tensor) or isinstance(a, list) or a.dim != b.dim:
            return False
        size = out.shape[a.dim]
        ids = [row_ids(each, size, self.rows, out.device) for each in (a, b)]
        return torch.equal(*ids)

    def _layout_by(
        self, entry: Function, func: Any, args: Any, kwargs: Any, x: Any, layout: Any, out: Any
    ) -> Any:
        if entry.permuting:
            if isinstance(layout, Indexed) or not isinstance(out, torch.Tensor):
                raise Unknown
            order = order_of(func, args, kwargs, x.ndim)
            return layout._replace(dim=order.index(layout.dim))
        if entry.rule is None:
            raise Unknown
        return entry.rule(self.rows, args, kwargs, x, layout, out)

    def _guess(self, entry: Function, row_tensors: list[torch.Tensor], out: Any) -> Any:
        """No rule: rows first, if the size is theirs. The step is checked, for these very shapes."""
        self.guessed = True
        outs = list(tensors_in([out]))
        self.uses.append((entry.name, *(tuple(t.shape) for t in (*row_tensors, *outs))))
        layout = getattr(row_tensors[0], MARK)[1]
        if all(t.shape == row_tensors[0].shape for t in outs):
            return layout
        whole = [
            Layout(0, 1, t.shape[0] // self.rows)
            if t.ndim and t.shape[0] % self.rows == 0
            else None
            for t in outs
        ]
        return whole[0] if isinstance(out, torch.Tensor) else whole

    def _in_place(
        self,
        entry: Function,
        args: Any,
        kwargs: Any,
        row_tensors: list[torch.Tensor],
        target: torch.Tensor,
    ) -> None:
        """The target of an in-place function keeps its layout, or takes that of what is put in."""
        if getattr(target, MARK, None) is not None and self.layout_of(target) is not None:
            values = [x for x in row_tensors if x is not target]
            floats = (v for v in values if v.is_floating_point())  # others may be places
            mixed = next((v for v in floats if isinstance(self.layout_of(v), Mixed)), None)
            if mixed is not None:
                for changed in (target, target._base):
                    if changed is not None:
                        self.mark(changed, self.layout_of(mixed))
            elif entry.name in ("index_add", "index_put", "scatter_add", "index_copy"):
                self._check_target(entry, args, target, values)
            elif entry.name == "setitem":
                self._put(target, args[1], args[2])
            return
        if self.rows == 1:
            self.mark(target)
            return
        found: Any = None
        try:
            if entry.name == "setitem":
                found = self._layout_of_item(target, args[1], row_tensors)
            elif entry.name in ("index_add", "index_copy"):
                raise Unknown
            else:
                for x in row_tensors:
                    own = getattr(x, MARK)[1]
                    if isinstance(own, Mixed):
                        self.mark(target, own)
                        return
                    found = shifted(own, x, target)
        except Unknown:
            found = None
        if found is None:
            if target.ndim and target.shape[0] % self.rows == 0:
                found = self._guess(entry, [target_like(target, row_tensors)], target)
            else:
                return
        self.mark(target, found)
        base = target._base
        if base is not None and self.layout_of(base) is None and base.shape == target.shape:
            self.mark(base, found)

    def _put(self, target: torch.Tensor, item: Any, value: Any) -> None:
        """After ``target[places] = entries of rows``, the target's entries there are those rows'."""
        layout, own = self.layout_of(target), getattr(value, MARK, (0, None))[1]
        if not isinstance(item, torch.Tensor) or item.ndim != 1 or self.rows == 1:
            return
        if not isinstance(layout, (Layout, Indexed)) or not isinstance(own, (Layout, Indexed)):
            return
        if layout.dim or own.dim:
            return
        put = row_ids(own, len(value), self.rows, target.device)
        before = row_ids(layout, len(target), self.rows, target.device)
        after = before.clone()
        after[item] = put
        if not torch.equal(before, after):
            self.mark(target, indexed(after, self.rows))

    def _layout_of_item(
        self, target: torch.Tensor, item: Any, row_tensors: list[torch.Tensor]
    ) -> Any:
        """The layout of ``target`` after ``target[item] = rows``, if the item leaves it whole."""
        value = row_tensors[-1]
        if any(value is t for t in tensors_in([item])):
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
        target: torch.Tensor,
        values: list[torch.Tensor],
    ) -> None:
        """Rows that are added to places of other rows would be mixed."""
        layout = self.layout_of(target)
        if entry.name in ("index_add", "index_copy") and len(args) >= 4:
            dim, places, source = args[1], args[2], args[3]
            own = self.layout_of(source)
            if dim % target.ndim == layout.dim and own is not None and own.dim == dim % source.ndim:
                put = row_ids(own, source.shape[own.dim], self.rows, target.device)
                got = row_ids(layout, target.shape[layout.dim], self.rows, target.device)
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
                setattr(out, LOOKED_UP, (out._version, (table, ids, padding)))
        elif entry.name == "getitem" and isinstance(args[1], torch.Tensor) and args[0].is_leaf:
            if args[1].ndim == 1 and args[1].dtype == torch.int64 and bool((args[1] >= 0).all()):
                setattr(out, LOOKED_UP, (out._version, (args[0], args[1], None)))
        elif entry.name in ("repeat", "tile") and isinstance(out, torch.Tensor):
            source = shared[0]
            more = out.ndim - source.ndim
            same = {d for d in range(out.ndim) if d < more or source.shape[d - more] == 1}
            setattr(out, SAME, (out._version, same))

    def _has_rows(self, tensor: torch.Tensor) -> bool:
        """Whether an unmarked tensor has taps below it: it came from rows, by a way that is not seen."""

        def ways(node: Any) -> Iterable[Any]:
            return () if self._classes.get(node) is False else inputs_of(node)

        root = tensor.grad_fn
        if root not in self._classes:
            self._classes[root] = any(isinstance(node, TAP) for node in walk(root, ways))
        return self._classes[root]

    def _recover(self, tensor: torch.Tensor, name: str) -> None:
        """Guess the layout of a tensor that came from rows by a function that no mode sees."""
        self.guessed = True
        self.uses.append(("unseen", name, type(tensor.grad_fn).__name__, tuple(tensor.shape)))
        if tensor.ndim and tensor.shape[0] % self.rows == 0:
            self.mark(tensor, Layout(0, 1, tensor.shape[0] // self.rows))
            return
        raise UnsupportedModelError(
            f"{name} was called with a tensor of shape {tuple(tensor.shape)} that comes from rows of the "
            f"batch through {type(tensor.grad_fn).__name__}, which torch functions do not show, wanted "
            f"{self.rows} rows in its first dimension. Use torch functions there."
        )

    def see_outputs(self, outputs: Iterable[torch.Tensor], dependent: Collection[int] = ()) -> None:
        """Note where the rows are in the model's outputs: that is part of the kind of batch.

        Args:
            outputs: the tensors of the model's output.
            dependent: which of them were found to depend on other rows.
        """
        for k, tensor in enumerate(outputs):
            self._outputs.append(weakref.ref(tensor))
            if k in dependent:
                self.mixed.append((tensor.grad_fn, UNSEEN))
            layout = self.layout_of(tensor)
            if isinstance(layout, Mixed):
                if tensor.grad_fn is not None and layout.function not in INDEXING:
                    self.mixed.append((tensor.grad_fn, layout.function))
            elif layout is not None:
                self.uses.append(("output", layout_key(layout)))

    def see_hooks(self) -> None:
        """Note the gradient hooks that were put on the outputs: they are part of the kind of batch, too."""
        for k, ref in enumerate(self._outputs):
            tensor = ref()
            if tensor is not None and tensor._backward_hooks:
                self.uses.append(("register_hook", k))

    def refuse_changed(self) -> None:
        """Raise if a tensor that comes from parameters was changed in place after it was used with rows."""
        for ref, version, name in self._used_shared:
            z = ref()
            if z is not None and z._version != version:
                raise UnsupportedModelError(
                    f"{self.owner.name_of(z)} was changed in place after {name} had used it with rows of "
                    f"the batch, so that the parameters' part in it is lost. Wanted the function that "
                    f"makes a new tensor."
                )
        self._used_shared.clear()

    # --- uses of parameters ---------------------------------------------------------------------

    def tap(
        self,
        outputs: Any,
        record: RecordUse,
        saved: tuple[torch.Tensor, ...] = (),
        row_tensors: Iterable[torch.Tensor] = (),
    ) -> Any:
        """Tap tensors, computed from those with rows in ``row_tensors``; see `Tap`."""
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tapped = Tap.apply(self.owner.anchor, self.owner, record, len(outputs), *outputs, *saved)
        node: Any = (tapped if isinstance(tapped, torch.Tensor) else tapped[0]).grad_fn
        node.parents = tuple(x.grad_fn for x in row_tensors if x.grad_fn is not None)
        node.rows = self.rows
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
        rows = self.rows
        self.uses.append((entry.name, "expanded", self.owner.name_of(z), layout_key(layout)))
        if rows == 1:

            def record_one(store: FactorStore, grad: torch.Tensor) -> None:
                store.add_dense(z, grad.unsqueeze(0))

            return self.tap(z, record_one)
        size = x.shape[layout.dim]
        right = x.ndim - layout.dim  # the rows' dimension, from the right
        if z.ndim >= right and z.shape[-right] != 1:
            return self.tap_own(z, z.ndim - right, layout, size)
        shape = [1] * max(z.ndim, right)
        shape[len(shape) - z.ndim :] = z.shape
        shape[-right] = size
        moved = layout if isinstance(layout, Indexed) else layout._replace(dim=len(shape) - right)
        if isinstance(layout, Indexed) and moved.dim != len(shape) - right:
            raise Unknown

        def record(store: FactorStore, grad: torch.Tensor) -> None:
            store.add_dense(z, per_row(grad, moved, rows).reshape(rows, *z.shape))

        return self.tap(z.expand(shape), record)

    def tap_own(self, z: torch.Tensor, dim: int, layout: AnyLayout, size: int) -> torch.Tensor:
        """Tap a shared tensor that has an entry for each of the rows: row i takes part i alone."""
        rows = self.rows
        if z.shape[dim] != size:
            raise Unknown
        if isinstance(layout, Indexed) and dim:
            raise Unknown
        own = layout if isinstance(layout, Indexed) else layout._replace(dim=dim)
        same = z.stride(dim) == 0 or dim in (known(z, SAME) or ())
        one = z.narrow(dim, 0, 1) if same else z
        looked_up = known(z, LOOKED_UP)
        if looked_up is not None and dim >= looked_up[1].ndim:  # a feature for each row
            looked_up = None

        def record(store: FactorStore, grad: torch.Tensor) -> None:
            if looked_up is not None:
                table, ids, padding = looked_up
                ids = rows_first(ids, own, rows).reshape(rows, -1)
                grads = rows_first(grad, own, rows).reshape(rows, ids.shape[1], -1)
                store.add_embedding(table, ids, grads, padding)
                return
            if same:
                grads = per_row(grad, own, rows)
                store.add_dense(one, grads.sum(dim + 1, keepdim=True))
                return
            ids = row_ids(own, size, rows, grad.device)
            mask = ids == torch.arange(rows, device=grad.device).unsqueeze(1)
            mask = mask.view(rows, *(1,) * dim, size, *(1,) * (z.ndim - dim - 1))
            store.add_dense(z, grad.unsqueeze(0) * mask)

        return self.tap(z, record)


def run_backward(
    recorder: Recorder,
    total: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    *,
    accumulate: bool = False,
    retain_graph: bool,
) -> None:
    """A backward pass in which non-reentrant checkpoints are recorded as they were in the forward pass.

    They run their layers once more, inside the backward pass, with the modes that were on when the
    engine was started. `torch.autograd.grad` is a torch function itself, and would start it with the
    mode off; so the engine is called directly.

    Args:
        recorder: of the forward pass.
        total: a scalar.
        leaves: what gradients are asked for, and of nothing else.
        accumulate: whether they are added to the leaves' ``grad``.
        retain_graph: whether the graph is needed again.
    """
    ones = torch.ones_like(total)
    with recorder:
        _engine_run_backward(
            (total,),
            (ones,),
            retain_graph,
            False,
            tuple(leaves),
            allow_unreachable=True,
            accumulate_grad=accumulate,
        )


def target_like(target: torch.Tensor, row_tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensor with rows whose layout an in-place target is guessed from."""
    return next((x for x in row_tensors if x.shape == target.shape), row_tensors[0])


def mixing_error(name: str) -> InputError:
    """The error for a function that combines rows."""
    return InputError(
        f"{name} combines rows of the batch, wanted each row by itself: what one row computes must not "
        f"depend on another."
    )


def _are_places(out: Any) -> bool:
    """Whether what rows made together are whole numbers in tensors; a single one is a statistic."""
    return all(t.ndim and not (t.is_floating_point() or t.is_complex()) for t in tensors_in([out]))
