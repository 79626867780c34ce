"""What the modules that hold parameters see in a forward and a backward pass.

Plain hooks on the plain model, so that it works where Opacus raises. Two passes, with all rows and
with one row less, tell a batch dimension from a constant.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpzoo.auditing.batches import Batch

Shape = tuple[int, ...]


@dataclass
class Call:
    """One call of a module: the shapes of what went in and of the gradient that came back."""

    positional: tuple[Shape, ...]
    keywords: tuple[Shape, ...]
    output: Shape | None
    backprop: Shape | None = None

    @property
    def leading(self) -> int | None:
        """What Opacus takes for the batch size: the last positional tensor's first dimension."""
        shape = self.positional[-1] if self.positional else ()
        return shape[0] if shape else None


@dataclass
class Trace:
    """The calls of a module that holds trainable parameters itself.

    Args:
        module: its path.
        kind: its class.
        calls: its calls with all rows.
        fewer: its calls with one row less.
        rows: the number of rows of the former.
    """

    module: str
    kind: type[nn.Module]
    rows: int
    calls: list[Call] = field(default_factory=list)
    fewer: list[Call] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What the first dimension of the module's inputs is.

        ``rows``; ``shared`` (1, whatever the number of rows); ``multiple`` of the number of rows;
        ``constant`` (another axis); ``other``; ``unseen`` (not called, or with keywords only).
        """
        pairs = [
            (a.leading, b.leading)
            for a, b in zip(self.calls, self.fewer, strict=False)
            if a.leading is not None and b.leading is not None
        ]
        if not pairs or not self.calls:
            return "unseen"
        kinds = [self._kind(a, b) for a, b in pairs]
        return next((kind for kind in kinds if kind != "rows"), "rows")

    def _kind(self, more: int, fewer: int) -> str:
        if (more, fewer) == (self.rows, self.rows - 1):
            return "rows"
        if more == fewer == 1:
            return "shared"
        if more == fewer:
            return "constant"
        if more % self.rows == 0 and more // self.rows * (self.rows - 1) == fewer:
            return "multiple"
        return "other"

    def odd_call(self) -> Call:
        """The first call whose leading dimension is not the number of rows."""
        return next((call for call in self.calls if call.leading != self.rows), self.calls[0])


def trace(
    model: nn.Module, loss: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch, fewer: Batch
) -> list[Trace]:
    """Trace every module that holds trainable parameters of its own; called or not."""
    traces: dict[nn.Module, Trace] = {}
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            traces[module] = Trace(name, type(module), batch.rows)

    def shapes(values: Any) -> tuple[Shape, ...]:
        return tuple(tuple(v.shape) for v in values if isinstance(v, torch.Tensor))

    def into(kept: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else None
            call = Call(
                shapes(args),
                shapes(kwargs.values()),
                tensor if tensor is None else tuple(tensor.shape),
            )
            getattr(traces[module], kept).append(call)
            if kept == "calls" and tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda grad: setattr(call, "backprop", tuple(grad.shape)))

        return hook

    for kept, some in (("calls", batch), ("fewer", fewer)):
        handles = [m.register_forward_hook(into(kept), with_kwargs=True) for m in traces]
        try:
            value = loss(model, some).sum()
            if kept == "calls" and value.requires_grad:
                parameters = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(value, parameters, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
    return list(traces.values())
