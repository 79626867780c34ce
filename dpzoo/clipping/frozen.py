"""Nothing but trainable parameters learns: in a training forward no buffer and no frozen tensor changes.

What a model remembers of a batch in a buffer (a running mean, a codebook, a cache) is published with it,
without clipping and without noise.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.opacus_internals import unexpanded

_NORMS = nn.modules.batchnorm._NormBase


def refuse_learning_buffers(model: nn.Module) -> None:
    """Raise for layers that are known to change buffers or frozen tensors in training.

    Raises:
        UnsupportedModelError: a BatchNorm or InstanceNorm in training mode keeps running statistics; a
            BatchNorm in training mode takes the batch's; an embedding has max_norm; a spectral norm.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _NORMS):
            instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
            # Without running statistics a BatchNorm takes the batch's in eval mode, too.
            mixes = not instance and module.running_mean is None
            why = "is in training mode" if module.training else "has no running statistics"
            if mixes or (module.training and (module.track_running_stats or not instance)):
                raise UnsupportedModelError(
                    f"{name} ({kind}) {why} and takes statistics over the rows of a batch, "
                    f"which no clipping bounds, wanted layers that see each row by itself. Replace it by "
                    f"GroupNorm or LayerNorm (opacus.validators.ModuleValidator.fix), or keep it, with "
                    f"running statistics, in eval mode: {name}.eval() after every model.train()."
                )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise UnsupportedModelError(
                f"{name} ({kind}) has max_norm={module.max_norm}, which changes the rows of the table that "
                f"a batch looks up, without noise. Wanted max_norm=None."
            )
        if kind in ("_SpectralNorm", "SpectralNorm"):
            raise UnsupportedModelError(
                f"{name} ({kind}) changes buffers in every training forward. Remove the spectral norm."
            )


class FrozenWatch:
    """Compares a model's buffers and parameters around forward passes with gradients or in training mode.

    Version counters are compared in every pass. A write to ``tensor.data`` leaves no version: at the passes
    1, 2, 3, 4, 8, 16 and so on, and at one in 32 at random, digests of the values are compared, too.

    Args:
        model: the model; hooks are put on it.
        dropped: called before an error is raised.
    """

    def __init__(self, model: nn.Module, dropped: Any = lambda: None) -> None:
        self._model, self._dropped = model, dropped
        self._depth = 0
        self._passes = 0
        self._before: list[tuple[str, torch.Tensor, int, int | None]] = []
        self._values: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_forward, prepend=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _watched(self) -> dict[str, torch.Tensor]:
        watched = dict(self._model.named_buffers())
        watched.update(self._model.named_parameters())
        return {name: unexpanded(tensor) for name, tensor in watched.items()}

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._before = []
        if module.training or torch.is_grad_enabled():
            self._passes += 1
            deep = self._passes < 4 or not self._passes & (self._passes - 1)
            deep = deep or not secrets.randbelow(32)  # a layer that writes each tenth time, say
            for name, tensor in self._watched().items():
                digest = _digest(tensor) if deep else None
                self._before.append((name, tensor, tensor._version, digest))
                if not isinstance(tensor, nn.Parameter) and name not in self._values:
                    self._values[name] = tensor.detach().clone()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth or not self._before:
            return
        after = self._watched()
        self._refuse_new(after)
        for name, tensor, version, digest in self._before:
            now = after.get(name)
            trained = tensor.requires_grad
            if now is tensor and now._version == version:
                if digest is None or digest == _digest(now):
                    continue
            elif now is not tensor and (trained or type(tensor.data) is not torch.Tensor):
                continue  # FSDP2 puts gathered copies there for the pass, and drops them
            known = self._values.get(name)
            if known is not None and now is not None and _equal(known, now):
                continue  # written again, with the same values
            self._before = []
            self._values.pop(name, None)
            self._dropped()
            frozen = "frozen parameter" if known is None else "buffer"
            raise InputError(
                f"{name} changed in a training forward pass, and it is a "
                f"{'trained parameter' if trained else frozen}, wanted nothing to change but trained "
                f"parameters, in optimizer.step(): what it keeps of a batch has neither clipping nor "
                f"noise. Put the layer that writes it into eval mode, or remove it."
            )
        self._before = []

    def _refuse_new(self, after: dict[str, torch.Tensor]) -> None:
        before = {name for name, *_ in self._before}
        new = [n for n, x in after.items() if n not in before and not x.requires_grad]
        kept = set(self._model.state_dict(keep_vars=True)) if new else set()
        found = next((name for name in new if name in kept), None)
        if found is not None:
            self._before = []
            self._dropped()
            raise InputError(
                f"{found} was made in a training forward pass, and is saved with the model, wanted nothing "
                f"to change there but trained parameters: what it keeps of a batch has neither clipping "
                f"nor noise. Make it before make_private, or register it with persistent=False if it is a "
                f"constant."
            )


def _digest(x: torch.Tensor) -> int | None:
    """A number that changes with any one value of a tensor; None for tensors that are not plain."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.element_size())
    if type(x) not in (torch.Tensor, nn.Parameter) or x.is_meta or x.is_sparse or width is None:
        return None
    if x.is_complex() or x.is_quantized:
        return None
    numbers = x.detach().contiguous().view(width).reshape(-1)
    # In parts: torch copies what it sums in another dtype.
    return int(torch.stack([n.sum(dtype=torch.int64) for n in numbers.split(1 << 20)]).sum())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
