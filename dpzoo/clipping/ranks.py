"""Several processes: where they meet before they add up, and the shards of a model under FSDP2.

What a rank has drawn, whether its batch is empty, and whether a backward pass has to be checked differ from
rank to rank. Collectives must not. So the ranks meet before each of them, in a gloo group of their own on
the CPU, and say where they are. A rank that is at another place, has failed, died or frozen is named, on
all others, within the time-out of the process group (``init_process_group(timeout=...)``; in transformers
``TrainingArguments.ddp_timeout``). Nothing of a step is released before all have met.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from dpzoo.errors import DpzooError, InputError, RankError, UnsupportedModelError, first_line

_GLOO = re.compile(
    "gloo|Connection closed by peer|Connection reset|Timed out waiting", re.IGNORECASE
)
_SHARED: list[tuple[Any, Ranks]] = []  # of the present process group


class Ranks:
    """The processes of the default process group, and a gloo group for what they tell each other.

    Args:
        timeout: for all that ranks wait for; None for the process group's.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        group: Any = distributed.group.WORLD
        kinds = [torch.device(kind) for kind in ("cuda", "cpu")]
        backends = [group._get_backend(d) for d in kinds if d in group._device_types]
        self.timeout: timedelta = timeout or backends[0].options._timeout
        if timeout is not None:
            distributed.distributed_c10d._set_pg_timeout(timeout)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._group = distributed.new_group(backend="gloo", timeout=self.timeout)
        store = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore("dpzoo", store)
        self._meetings = 0
        self._broken = False
        atexit.register(self._end)

    @classmethod
    def present(cls, timeout: timedelta | None = None) -> Ranks:
        """Those of the present process group, made once: a collective the first time."""
        if not _SHARED or _SHARED[0][0] is not distributed.group.WORLD:
            _SHARED[:] = [(distributed.group.WORLD, cls(timeout))]
        return _SHARED[0][1]

    def meet(self, place: str, word: Any = None) -> list[Any]:
        """Wait for all ranks.

        Args:
            place: where this rank is; all have to be at the same.
            word: what it tells the others.

        Returns:
            The words, by rank.

        Raises:
            RankError: a rank did not come in time, or is at another place.
        """
        self._meetings += 1
        said: list[Any] = [None] * self.size
        with self.waiting(place):
            self._store.set(str(self.rank), str(self._meetings))
            distributed.all_gather_object(said, (place, word), group=self._group)
        if any(other != place for other, _ in said):
            where = "; ".join(f"rank {rank}: {other}" for rank, (other, _) in enumerate(said))
            raise RankError(
                f"Ranks are at different places ({where}), wanted all at the same. If one has an error, "
                f"its own log says which. Else give all ranks as many batches, and under FSDP2, where "
                f"every forward and backward pass is a collective, as many parts of each, empty ones too. "
                f"Nothing of this step was released."
            )
        return [word for _, word in said]

    def agree(self, terms: dict[str, Any]) -> None:
        """Wait for all ranks, and compare what they train on.

        Raises:
            InputError: a value is not the same on all ranks; the message names all of those.
            RankError: as of `meet`.
        """
        said = self.meet("terms of the run", terms)
        wrong = [
            f"{name} ({', '.join(f'rank {rank}: {own[name]!r}' for rank, own in enumerate(said))})"
            for name in terms
            if any(own[name] != terms[name] for own in said)
        ]
        if wrong:
            raise InputError(
                f"Ranks differ in {'; '.join(wrong)}, wanted the same on all: each takes its part of one "
                f"draw from one data set. Give all ranks the whole data set, in one order, with the ids of "
                f"all its rows (ids are compared as repr() has them), and the same arguments."
            )

    @contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """Name the ranks that a collective waited for in vain."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and not _GLOO.search(str(error)):
                raise
            missing, self._broken = self._missing(), True
            who = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
            raise RankError(
                f"Rank {self.rank} waited in vain for {who} at the {place} (the time-out is "
                f"{self.timeout.total_seconds():g} s; {first_line(error)}). It died, froze or "
                f"failed: its own log says why. Nothing of this step was released by this rank; if it was "
                f"begun it is paid. End all ranks, and resume from the last checkpoint."
            ) from error

    def _end(self) -> None:
        """At the end of the process: gloo's threads would wait for the lost rank for ever."""
        if self._broken:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def fail(self, error: BaseException) -> None:
        """This rank has refused something: tell the others, who come to their next meeting."""
        if isinstance(error, DpzooError) and not isinstance(error, RankError):
            with suppress(RankError):
                self.meet(f"an error of its own ({type(error).__name__})")

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        held = [value]
        with self.waiting("start"):
            distributed.broadcast_object_list(held, 0, group=self._group)
        return held[0]

    def _missing(self) -> list[int]:
        """Ranks that have not come to the present meeting, as far as the store still answers."""
        missing: list[int] = []

        def ask() -> None:
            with suppress(Exception):  # the store may have died with a rank
                for rank in range(self.size):
                    come = self._store.check([str(rank)]) and self._store.get(str(rank))
                    if int(come or 0) < self._meetings:
                        missing.append(rank)

        asking = threading.Thread(target=ask, daemon=True)  # or have frozen with it
        asking.start()
        asking.join(3)
        return list(missing)


def silence(ddp: DistributedDataParallel) -> Callable[[], None]:
    """Keep DDP from averaging gradients: there are none, and the sums are added up in the step.

    Returns:
        What undoes it.

    Raises:
        UnsupportedModelError: an option of DDP that would not be honoured.
    """
    given = {
        "static_graph=True": ddp.static_graph,
        "mixed_precision": ddp.mixed_precision is not None,
        "a communication hook": bool(ddp._comm_hooks),
    }
    wrong = [name for name, has in given.items() if has]
    if wrong:
        raise UnsupportedModelError(
            f"DistributedDataParallel has {' and '.join(wrong)}, which grad_sample_mode='bk' would pass "
            f"by: it forms no ordinary gradients. Leave it out; for bf16 use torch.autocast."
        )
    # As in its no_sync(): no hook of a gradient waits for the others. To look for unused parameters it
    # would take the outputs apart, and lose the rows' losses.
    fields = "require_backward_grad_sync", "require_forward_param_sync", "find_unused_parameters"
    before = {field: getattr(ddp, field) for field in fields}
    vars(ddp).update(dict.fromkeys(fields, False))
    return lambda: vars(ddp).update(before)


class Shards:
    """The parameters of a model under FSDP2: each rank has a part of each, and all of it while it is used.

    In the backward pass FSDP2 gathers a layer when a gradient reaches it. Which ones are reached, and in
    which order, may differ from rank to rank (a mask that only one batch has; an empty batch), and then
    the ranks would wait for each other for ever. So that is done here: a pass goes back over all layers in
    the order in which the forward pass left and entered them, on every rank. autograd runs the functions of
    a graph in the reverse order in which they were made: a layer is whole while its own are run.

    Args:
        model: on which ``fully_shard`` was called.

    Raises:
        UnsupportedModelError: parameters that are not split over the ranks in one dimension.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for module in self.modules:
            module.reshard()
            module.set_requires_gradient_sync(False)
        self._let(False)
        states = {id(s): s for s in (m._get_fsdp_state() for m in self.modules)}
        self._groups = [group for s in states.values() for group in s._fsdp_param_groups]
        self.named = list(model.named_parameters())
        self.ranks = Ranks.present()
        # (left, not entered; module), since the last backward
        self._events: list[tuple[bool, Any]] = []
        self._position, self._finish, self._finishing = 0, lambda: None, False
        for name, parameter in self.named:
            _refuse_placement(name, parameter)

    def _let(self, gather: bool) -> None:
        for module in self.modules:
            module.set_unshard_in_backward(gather)
            module.set_reshard_after_backward(gather)

    def release(self) -> None:
        """Leave the model to FSDP2."""
        self._let(True)
        for module in self.modules:
            module.set_requires_gradient_sync(True)

    def whole(self) -> dict[torch.Tensor, torch.Tensor]:
        """Parameter -> what the layers use, gathered from all ranks; without those never gathered."""
        return {
            p.sharded_param: p._unsharded_param
            for group in self._groups
            for p in group.fsdp_params
            if hasattr(p, "_unsharded_param")
        }

    def enter(self, module: nn.Module) -> None:
        """The forward pass is at a layer, whose parameters are whole."""
        self._events.append((False, module))

    def leave(self, module: nn.Module, outputs: Iterable[torch.Tensor]) -> None:
        """The forward pass is through it."""
        place = len(self._events)
        self._events.append((True, module))
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._back_to(place))

    def clear(self) -> None:
        """The forward passes so far have had their backward."""
        self._events.clear()

    @contextmanager
    def backward(self, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A backward pass over all layers, whether or not gradients reach them.

        Args:
            finish: called before a layer's parameters go.
        """
        self._position, self._finish, self._finishing = len(self._events), finish, False
        yield
        self._back_to(0)

    def _back_to(self, place: int) -> None:
        if self._finishing:
            return
        while self._position > place:
            self._position -= 1
            left, module = self._events[self._position]
            with torch._C.DisableTorchFunction():
                if left:
                    module.set_unshard_in_backward(True)
                    module.unshard()
                    module.set_unshard_in_backward(False)
                else:
                    self._finishing = True  # it may run parts of the graph again, and their hooks
                    self._finish()
                    self._finishing = False
                    module.reshard()


def refuse_unseen_ranks(model: nn.Module) -> None:
    """Raise for what spreads a model over processes in a way that the engine does not see.

    Raises:
        UnsupportedModelError: a wrapper inside the model, FSDP1, or parameters in pieces without FSDP2.
    """
    root = isinstance(model, FSDPModule)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"{name or 'The model'} is a FullyShardedDataParallel (FSDP1), which grad_sample_mode='bk' "
                f"does not take. Use torch.distributed.fsdp.fully_shard (FSDP2) on layers and model."
            )
        inner = isinstance(module, DistributedDataParallel) or (
            isinstance(module, FSDPModule) and not root
        )
        if name and inner:
            raise UnsupportedModelError(
                f"{name} ({kind}) is spread over processes and the model around it is not, wanted the "
                f"whole: sums and noise are one. Call fully_shard (or DistributedDataParallel) on the "
                f"model that goes into make_private, too."
            )
    if not root:
        for name, parameter in model.named_parameters():
            if isinstance(parameter.data, DTensor):
                raise UnsupportedModelError(
                    f"{name} is a DTensor in a model that is not under FSDP2 (tensor parallel, say), and "
                    f"grad_sample_mode='bk' takes whole parameters, or those of fully_shard(model)."
                )


def _refuse_placement(name: str, parameter: torch.Tensor) -> None:
    got = None
    if not isinstance(parameter, DTensor):
        if not parameter.requires_grad:
            return
        got = "on every rank as a whole"
    elif parameter.device_mesh.ndim != 1 or not isinstance(parameter.placements[0], Shard):
        got = f"placed {parameter.placements} on a mesh of {parameter.device_mesh.ndim} dimensions"
    elif parameter.device_mesh.size() != distributed.get_world_size():
        got = f"on {parameter.device_mesh.size()} of {distributed.get_world_size()} ranks"
    elif parameter.to_local().device.type != parameter.device_mesh.device_type:
        got = f"offloaded to the {parameter.to_local().device.type}"
    if got:
        raise UnsupportedModelError(
            f"{name} is {got}, and grad_sample_mode='bk' takes parameters that are split over all ranks "
            f"in one dimension. Call fully_shard without ignored_params and offload_policy, with a mesh of "
            f"one dimension (neither replicas, nor tensor parallel)."
        )


def scattered(whole: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """This rank's part of a sum over all ranks; a collective.

    Args:
        whole: this rank's summand, in the parameter's shape.
        parameter: says how it is split.
    """
    placement: Any = parameter.placements[0]
    dim, size = placement.dim, parameter.device_mesh.size()
    own = parameter.to_local().shape
    moved = whole.movedim(dim, 0)
    part = -(-len(moved) // size)
    if part * size != len(moved) or not moved.is_contiguous():
        padded = moved.new_zeros(part * size, *moved.shape[1:])
        padded[: len(moved)] = moved
        moved = padded
    out = moved.new_empty(part, *moved.shape[1:])
    distributed.reduce_scatter_tensor(out, moved, group=parameter.device_mesh.get_group())
    return out[: own[dim]].movedim(0, dim).contiguous()
