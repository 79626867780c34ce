"""The wrapped model of book-keeping: it records forward passes, and runs the private backward pass."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dpzoo.clipping.autograd_graph import RecordUse, refuse_unseen
from dpzoo.clipping.containers import mapped, tensors_of
from dpzoo.clipping.draws import in_another_order
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.independence import Probe, dependent_outputs
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.clipping.ranks import Shards, refuse_unseen_ranks, silence
from dpzoo.clipping.recorder import Recorder, run_backward
from dpzoo.clipping.units import Units
from dpzoo.clipping.use_rules import record_call
from dpzoo.clipping.verification import Verification
from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.opacus_internals import forget_hooks

MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class BookKeepingHooks(AbstractGradSampleHooks):
    """A model whose forward passes are recorded, without wrapping it (``wrap_model=False``).

    Args:
        m: the model: any module that uses its parameters in torch functions. What a row
            computes must not depend on other rows.
        batch_first: must be True.
        loss_reduction: "mean" or "sum", of the criterion.

    Raises:
        UnsupportedModelError: ``batch_first`` is False.
    """

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", **_: Any
    ) -> None:
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        if not batch_first:
            raise UnsupportedModelError(
                "grad_sample_mode='bk' got batch_first=False, wanted True: rows come first."
            )
        _refuse_model(m)
        for parameter in m.parameters():
            forget_hooks(parameter)
            setattr(parameter, "summed_grad", None)  # noqa: B010  (not an attribute of tensors)
        self.anchor = torch.zeros((), device=_device(m), requires_grad=True)
        self._store: FactorStore | None = None
        self._recorder: Recorder | None = None
        self._depth = 0
        self._empty = False  # the forward pass under way is an empty batch's
        self._example: Any = None  # the arguments of a forward pass of one row
        self._eager = contextlib.ExitStack()
        self._verifying = False
        self._checked: dict[int, int] = {}  # kind of batch -> batches of it so far
        self._earlier: set[Any] = set()  # uses in earlier forward passes, since the last backward
        self._passes: deque[list[torch.Tensor]] = deque(maxlen=4)  # inputs of these
        self._moved = False  # rows of these came again at other places
        self._mixed: list[tuple[Any, str]] = []  # outputs of these in which rows were combined
        self._tried = 0  # forward passes of several rows
        self._uses: set[str] = set()  # functions that used parameters in them
        self._due = False  # there was a new one
        self._dependent: set[int] = set()  # outputs of this pass in which rows depend on others
        self._names: dict[int, str] = {}
        self._norms: torch.Tensor | None = None
        self._factors: torch.Tensor | None = None
        self.nonfinite_rows = 0
        """Units so far (rows, without unit_ids) whose gradient was not finite: they contributed nothing."""
        self._shards = Shards(m) if isinstance(m, FSDPModule) else None
        self._undo = silence(m) if isinstance(m, DistributedDataParallel) else None
        self._handles: list[RemovableHandle] = [
            m.register_forward_pre_hook(self._begin, with_kwargs=True),
            m.register_forward_hook(self._end, always_call=True),
        ]
        if self._shards is not None:
            self._handles.append(m.register_forward_pre_hook(self._meet, prepend=True))
            for module in self._shards.modules:
                if module is not m:
                    self._pass_fsdp(module)

    # --- forward --------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return None
        tensors = list(tensors_of((args, kwargs)))
        rows = _rows_of(kwargs, tensors)
        if self._recorder is not None and not self._recorder.spent:
            self._earlier.update(self._recorder.uses)
            self._mixed += self._recorder.mixed
            self._passes.append(self._recorder.inputs)
        self._recorder = None
        if self._shards is not None:
            self._shards.enter(module)
        if not rows:
            # Models stumble over empty tensors: one row passes instead, and counts for nothing.
            self._empty = bool(tensors)
            return (self._example or mapped(_zero_row, (args, kwargs))) if tensors else None
        if self._example is None:
            first = partial(_first_row, rows)
            self._example = mapped(first, (args, kwargs))
        named, whole = self._trained()
        self._names = trained = {id(whole.get(p, p)): name for name, p in named}
        self._recorder = recorder = Recorder(self, rows, record_call)
        recorder.inputs = [t for t in tensors if t.ndim and len(t) == rows]
        self._moved |= any(in_another_order(inputs, recorder.inputs) for inputs in self._passes)
        if "torch._dynamo" in sys.modules:  # compiled parts run as they are written
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        recorder.inputs = [t for t in recorder.inputs if id(t) not in trained]
        for tensor in recorder.inputs:
            recorder.mark(tensor)
        self._dependent = self._try_others(module, args, kwargs, recorder)
        recorder.__enter__()
        recorder.on = True
        return None

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth = max(self._depth - 1, 0)  # a hook before `_begin` may have raised
        if self._depth == 0 and self._recorder is not None and self._recorder.on:
            self._recorder.on = False
            self._recorder.__exit__(None, None, None)
            self._eager.close()
            self._recorder.see_outputs(tensors_of(output), self._dependent)
            names = {str(use[0]) for use in self._recorder.uses}
            self._due = not names <= self._uses
            self._uses |= names
        if self._depth == 0 and self._shards is not None and torch.is_grad_enabled():
            self._shards.leave(module, tensors_of(output))
        if self._depth == 0 and self._empty:
            self._empty = False
            return mapped(_no_row, output)
        return None

    def _try_others(
        self, module: nn.Module, args: Any, kwargs: Any, recorder: Recorder
    ) -> set[int]:
        """Before a forward pass: which outputs depend on other rows (`dpzoo.clipping.independence`)."""
        if recorder.rows < 2 or self._shards is not None:
            return set()
        self._tried += 1
        if self._tried & (self._tried - 1) and not self._due:
            return set()
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        own = {id(t) for t in recorder.inputs}

        def run(change: Callable[[torch.Tensor], torch.Tensor], rows: int) -> list[torch.Tensor]:
            probe = Probe(self, rows)

            def copied(x: torch.Tensor) -> torch.Tensor:
                if id(x) not in own:
                    return x
                made = change(x.detach()).clone()  # the model may write into it
                probe.mark(made)
                return made

            # What the model may change, such as a cache, is copied, too.
            given, named = mapped(copied, (args, kwargs), copy.deepcopy)
            with probe:
                return list(tensors_of(inner.forward(*given, **named)))

        return dependent_outputs(
            run,
            recorder.rows,
            self.anchor.device,
            first=self._tried == 1,
            autocast=recorder.autocast,
        )

    def _trained(self) -> tuple[list[tuple[str, torch.Tensor]], dict[torch.Tensor, torch.Tensor]]:
        """(name, parameter) of all that are trained; and what layers use for them, if it is another."""
        shards = self._shards
        named = self._module.named_parameters() if shards is None else shards.named
        whole = {} if shards is None else shards.whole()
        return [(n, p) for n, p in named if p.requires_grad], whole

    def _meet(self, module: nn.Module, args: Any) -> None:
        """Before the ranks gather parameters for a forward pass."""
        if self._shards is not None and self._depth == 0 and torch.is_grad_enabled():
            self._shards.ranks.meet("forward pass")

    def _pass_fsdp(self, module: nn.Module) -> None:
        """Let a layer's arguments pass FSDP2's hook by, which would put them through an unseen function."""
        shards, given = self._shards, []
        assert shards is not None

        def enter(_: nn.Module, *arguments: Any) -> Any:
            if not self._depth or not torch.is_grad_enabled():
                return None
            given.append(list(tensors_of(arguments)))
            with torch._C.DisableTorchFunction():
                return mapped(torch.Tensor.detach, arguments)

        def entered(_: nn.Module, *arguments: Any) -> Any:
            if not self._depth or not torch.is_grad_enabled():
                return None
            shards.enter(module)
            named, whole = self._trained()  # this layer's have just come
            self._names.update({id(whole.get(p, p)): name for name, p in named})
            before = iter(given.pop())
            return mapped(lambda x: next(before).to(x.dtype), arguments)

        def left(_: nn.Module, args: Any, output: Any) -> None:
            if self._depth and torch.is_grad_enabled():
                shards.leave(module, tensors_of(output))

        self._handles += [
            module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            module.register_forward_pre_hook(entered, with_kwargs=True),
            module.register_forward_hook(left),
        ]

    def name_of(self, tensor: torch.Tensor) -> str:
        """A trained parameter's name, or what a tensor that comes from parameters was computed by."""
        name = self._names.get(id(tensor))
        if name is not None:
            return name
        if tensor._base is not None and id(tensor._base) in self._names:
            return f"a view of {self._names[id(tensor._base)]}"
        node = tensor.grad_fn
        return "a parameter of no module" if node is None else f"the output of {node.name()}"

    def record_use(self, record: RecordUse, grads: tuple[torch.Tensor, ...], saved: Any) -> None:
        """Let a tap's backward record its use; for `dpzoo.clipping.recorder.Tap`."""
        if self._verifying:
            return
        if self._depth:
            raise UnsupportedModelError(
                "The model's forward computes a gradient itself (torch.autograd.grad), through uses of "
                "trainable parameters. grad_sample_mode='bk' does not record backward passes of backward "
                "passes. Freeze the parameters below, or use grad_sample_mode='functorch'."
            )
        if self._store is None:
            raise InputError(
                "An ordinary loss was backpropagated through a model in grad_sample_mode='bk': its "
                "gradients would not be clipped. Call backward() on what the criterion from "
                "make_private returns: criterion(model(**batch)).backward()."
            )
        with (
            torch._C.DisableTorchFunction(),
            torch.no_grad(),
            torch.autocast(grads[0].device.type, enabled=False),
        ):
            record(self._store, *(g.detach() for g in grads), *(s.detach() for s in saved))

    # --- backward -------------------------------------------------------------------------------

    def backward(
        self, losses: torch.Tensor, optimizer: BookKeepingOptimizer, unit_ids: Any = None
    ) -> None:
        """Add the clipped sum of the units' gradients to the optimizer's sums; a unit is a row or several.

        Args:
            losses: the rows' losses, (rows,). A unit's is the mean of its rows'.
            optimizer: gives the clip factors, and keeps the sums.
            unit_ids: the ids of the rows' units, (rows,); see `dpzoo.clipping.draws.Draws.units`.

        Raises:
            InputError: the losses are not one for each row; they come through a reentrant activation
                checkpoint; a parameter is used where the recorder cannot see it; or the recorded
                gradients are not the rows' gradients (see `dpzoo.clipping.verification`).

        Guarantees:
            A unit's share of the sum is its gradient times a factor that depends on that unit alone, of
            norm at most C; a unit whose gradient is not finite has share 0.
        """
        if losses.ndim != 1:
            raise InputError(
                f"The criterion gave losses of shape {tuple(losses.shape)}, wanted (rows,): one loss "
                f"for each row. dpzoo.ModelLoss() takes a model's outputs; for flat token losses pass "
                f"shape=logits.shape."
            )
        try:
            if self._moved:
                raise InputError(
                    "Two forward passes before a backward() have the same rows in another order: a row "
                    "would be in the losses of two, and count twice. Wanted each row at its place in all "
                    "passes of a step; a pass that is not trained on belongs under torch.no_grad()."
                )
            named, whole = self._trained()
            _refuse_hooks(named)
            uses = {id(whole.get(p, p)): whole.get(p, p) for _, p in named}
            self._names = {key: n for key, (n, _) in zip(uses, named, strict=True)}
            units = optimizer.draws.units(len(losses), unit_ids)
            with self.waiting("backward pass"):
                store = self._record(units.mean(losses), list(uses.values()), units)
            inputs = [] if self._recorder is None else self._recorder.inputs
            with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
                made = optimizer.add_rows(store, named, inputs, whole)
        except BaseException as error:
            optimizer.drop()  # nothing, rather than a part
            optimizer.draws.abandon()
            optimizer.fail(error)
            raise
        finally:
            self._passes.clear()
            self._mixed.clear()
            self._moved = False
            if self._recorder is not None:
                self._recorder.spent = True
        self._norms, self._factors, left_out = made
        self.nonfinite_rows += left_out

    def _record(
        self, losses: torch.Tensor, parameters: list[torch.Tensor], units: Units
    ) -> FactorStore:
        rows = len(losses)
        store = FactorStore(rows, parameters, units)
        if not rows and self._shards is not None:
            for _ in range(1 + self._any_rank(False)):
                with self._gathering():
                    pass
            self._shards.clear()
        if not rows or (losses.grad_fn is None and not parameters):
            return store
        if losses.grad_fn is None:
            raise InputError(
                "The losses have no gradient in grad_sample_mode='bk', wanted those of a forward pass with "
                "gradients on: neither torch.no_grad() around the model, nor detach() of its outputs."
            )
        recorder = self._recorder
        if recorder is None:
            raise InputError(
                "The losses do not come from a forward pass of the model in grad_sample_mode='bk', wanted "
                "criterion(model(**batch)): call the model itself, not a part of it, with gradients on."
            )
        if recorder.rows != rows:
            raise InputError(
                f"The losses have {rows} rows and the batch had {recorder.rows}, wanted one loss for each "
                f"row of the batch, from one call of the model."
            )
        functions = refuse_unseen(
            losses, self.name_of, self._names, [*self._mixed, *recorder.mixed]
        )
        several = rows > 1, units.count > 1
        recorder.see_hooks()
        kind = hash((frozenset((*recorder.uses, *self._earlier)), functions, several))
        count = self._checked.get(kind, 0) + 1
        # Not the first alone: a layer that starts at zero (LoRA's B, a gate) hides what is below it.
        check = self._any_rank(count & (count - 1) == 0)
        checked = None
        if check:
            self._verifying = True
            try:
                with self._gathering():
                    checked = Verification(losses, parameters, recorder, units)
            finally:
                self._verifying = False
        self._store = store
        try:
            with self._gathering(store.resolve_computed):
                run_backward(recorder, losses.sum(), (self.anchor,), retain_graph=False)
        finally:
            self._store = None
            if self._shards is not None:
                self._shards.clear()
        recorder.refuse_changed()
        squared = store.squared_norms()
        if checked is None or checked.compare(store, squared, self.name_of):
            self._checked[kind] = count
        self._earlier.clear()
        return store

    @property
    def rows_of_pass(self) -> int:
        """Rows of the last forward pass, if there was no backward pass since; else 0."""
        recorder = self._recorder
        return 0 if recorder is None or recorder.spent else recorder.rows

    def waiting(self, place: str) -> Any:
        """Name the ranks that FSDP2 waits for in vain."""
        return (
            contextlib.nullcontext() if self._shards is None else self._shards.ranks.waiting(place)
        )

    def _gathering(self, *finish: Callable[[], None]) -> Any:
        """A backward pass, in which FSDP2's parameters are gathered; ``finish`` needs them, too."""
        return contextlib.nullcontext() if self._shards is None else self._shards.backward(*finish)

    def _any_rank(self, check: bool) -> bool:
        """Whether a rank wants to check this backward pass: under FSDP2 all take part in the extra pass."""
        return (
            check if self._shards is None else any(self._shards.ranks.meet("backward pass", check))
        )

    # --- reading, not private -------------------------------------------------------------------

    @property
    def per_sample_gradient_norms(self) -> torch.Tensor:
        """Norms of the last backward pass's units, (units,), as they came. NOT private: for debugging."""
        if self._norms is None:
            # Not an AttributeError: torch would replace these words by its own.
            raise InputError(
                "per_sample_gradient_norms is not set. Call backward() on the criterion's loss first."
            )
        return self._norms

    @property
    def clipped_fraction(self) -> float:
        """Share of the last backward pass's units that were clipped. NOT private: for debugging."""
        if self._factors is None or len(self._factors) == 0:
            return 0.0
        return float((self._factors < 1).float().mean())

    def remove_hooks(self) -> None:
        """Take the taps off."""
        while self._handles:
            self._handles.pop().remove()
        if self._shards is not None:
            self._shards.release()
        if self._undo is not None:
            self._undo()

    def cleanup(self) -> None:
        """Take the taps off, and what was hung on the parameters."""
        super().cleanup()
        for parameter in self._module.parameters():
            parameter.__dict__.pop("summed_grad", None)

    def set_grad_sample_to_none(self) -> None:
        """There is no ``grad_sample`` in this mode."""


class BookKeepingModule(BookKeepingHooks, AbstractGradSampleModule):
    """A model wrapped for ``grad_sample_mode="bk"``; arguments as `BookKeepingHooks`."""

    def __init__(self, m: nn.Module, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        BookKeepingHooks.__init__(self, m, **kwargs)
        self.grad_accumulation_hook = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        with self.waiting("forward pass"):
            return super().forward(*args, **kwargs)


def _refuse_model(model: nn.Module) -> None:
    """Raise for models that are private already, or whose parameters are in pieces."""
    if any(hook_of(hook) for hook in model._forward_pre_hooks.values()):
        raise InputError(
            f"{type(model).__name__} is in grad_sample_mode='bk' already, wanted a model that is not. Use "
            f"what make_private returned the first time, or call its cleanup() before the second."
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise UnsupportedModelError(
                f"{name} is complex ({parameter.dtype}), and grad_sample_mode='bk' takes real parameters. "
                f"Hold its real and imaginary parts, (..., 2), and use torch.view_as_complex, or freeze it."
            )
    refuse_unseen_ranks(model)


def hook_of(hook: Any) -> bool:
    """Whether a forward hook belongs to a `BookKeepingHooks`."""
    return isinstance(getattr(hook, "__self__", None), BookKeepingHooks)


def _refuse_hooks(named: list[tuple[str, torch.Tensor]]) -> None:
    """Raise for gradient hooks on parameters: per-sample gradients do not pass them."""
    for name, parameter in named:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedModelError(
                f"{name} has a gradient hook (Tensor.register_hook), which grad_sample_mode='bk' would not "
                f"call: it computes no ordinary gradient. Remove the hook, or freeze the parameter."
            )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _first_row(rows: int, x: torch.Tensor) -> torch.Tensor:
    return x.detach()[:1].clone() if x.ndim and len(x) == rows else x.detach()


def _zero_row(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(1, *x.shape[1:]) if x.ndim and not len(x) else x


def _no_row(x: torch.Tensor) -> torch.Tensor:
    return x[:0] if x.ndim and len(x) == 1 else x if x.ndim else x * 0  # a loss of no rows


def _rows_of(kwargs: Any, tensors: list[torch.Tensor]) -> int:
    """The number of rows of a batch: the first dimension of its main input."""
    main = next((kwargs[k] for k in MAIN_INPUTS if isinstance(kwargs.get(k), torch.Tensor)), None)
    if main is None:
        main = next((t for t in tensors if t.ndim), None)
    return 0 if main is None or not main.ndim else len(main)
