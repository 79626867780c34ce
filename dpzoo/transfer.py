"""Copying parameters from a model to one of another class, in memory: the base of conversion.

The two sides have the same parameter names. What differs is one rule as data, which runs both ways:
the projections of `dpzoo.layers.transposed` have their weights transposed. Everything else is
passed on unchanged, and shares its storage with the model it came from.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpzoo.errors import ConversionError, UnsupportedModelError
from dpzoo.layers.lm_head import TiedBias
from dpzoo.layers.transposed import TransposedProjections


def rebuild(model: PreTrainedModel, cls: type[Any], *, release: bool = False) -> Any:
    """A model of class ``cls`` with the parameters, settings and modes of ``model``.

    Args:
        model: a stock model or one of the zoo.
        cls: the class of the other kind.
        release: free each of the model's layers as soon as it has been copied.

    Raises:
        ConversionError: missing, unexpected and mis-shaped names, all of them, sorted.
    """
    built = _empty(cls, model)
    transposed = {*transposed_names(model), *transposed_names(built)}  # only the zoo's has any
    _transfer(named_tensors(model), built, transposed=transposed, release=release)
    _carry(model, built)
    return built


def _empty(cls: type[Any], model: PreTrainedModel) -> Any:
    """An instance of ``cls`` on the meta device, with a copy of the model's config."""
    # A bare encoder may have been built without its pooler, which the config does not tell.
    arguments = {"add_pooling_layer": False} if getattr(model, "pooler", True) is None else {}
    with torch.device("meta"):
        built = cls(copy.deepcopy(model.config), **arguments)
    # Parameters are handed over later; buffers (stock models keep position ids in some) are
    # computed, by the code that computes them when transformers loads a checkpoint.
    for module in built.modules():
        computed = dict(module.named_buffers(recurse=False))
        for name, buffer in computed.items():
            setattr(module, name, torch.empty_like(buffer, device=model.device))
        if computed:
            built._init_weights(module)
    return built


def transposed_names(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that the stock layout stores transposed, if the model is the zoo's."""
    for prefix, module in model.named_modules():
        if isinstance(module, TransposedProjections):
            for child in module.transposed:
                yield f"{prefix}.{child}.weight"


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under each of its names, with the stock names of what dpzoo keeps elsewhere."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        if isinstance(module, TiedBias):
            tensors[f"{prefix}.bias"] = module.bias
    return tensors


def _transfer(
    source: dict[str, torch.Tensor],
    built: nn.Module,
    *,
    transposed: set[str],
    release: bool,
) -> None:
    """Fill every parameter of the new model exactly once, keeping what is tied tied."""
    wanted = named_tensors(built)
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - source.keys())]
    problems += [f"unexpected: {name}" for name in sorted(source.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & source.keys()):
        shape = tuple(source[name].shape)
        shape = shape[::-1] if name in transposed else shape
        if shape != tuple(wanted[name].shape):
            problems.append(f"mis-shaped: {name} is {shape}, wanted {tuple(wanted[name].shape)}")
    if problems:
        raise ConversionError(
            f"{type(built).__name__}: the two models do not correspond.\n  "
            + "\n  ".join(problems)
            + "\nWas the model changed after it was built? Convert it before adding modules."
        )
    filled: dict[int, nn.Parameter] = {}
    for name, tensor in source.items():
        key = id(tensor)
        path, _, leaf = name.rpartition(".")
        if key not in filled:
            data = tensor.detach()
            if name in transposed:
                data = data.t().contiguous()
                if release:
                    tensor.data = torch.empty(0, dtype=data.dtype, device=data.device)
            # The dead bias of an untied head is a buffer in dpzoo: it is as frozen as the live one.
            live = tensor if isinstance(tensor, nn.Parameter) else source[f"{path}.decoder.bias"]
            filled[key] = nn.Parameter(data, requires_grad=live.requires_grad)
        module = built.get_submodule(path)
        if not isinstance(module, TiedBias):
            setattr(module, leaf, filled[key])
    for path, module in built.named_modules():
        if isinstance(module, TiedBias):
            module.set_bias(filled[id(source[f"{path}.bias"])])


SETTINGS = ("p", "eps", "padding_idx")
"""What callers change on the modules of a model they have, where the config does not tell."""


def _carry(model: PreTrainedModel, built: PreTrainedModel) -> None:
    """What a model has besides its parameters: modes, settings, generation config, names."""
    built.name_or_path = model.name_or_path
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    built.all_tied_weights_keys = dict(model.all_tied_weights_keys)
    modules: dict[str, nn.Module] = {}
    namesakes = dict(model.named_modules())
    for name, module in built.named_modules():
        # A module without a namesake (an activation, say) goes with the one that it is in.
        modules[name] = source = namesakes.get(name) or modules[name.rpartition(".")[0]]
        module.training = source.training
        for setting in SETTINGS:
            if name in namesakes and hasattr(module, setting) and hasattr(source, setting):
                setattr(module, setting, getattr(source, setting))


def refuse_adapters(model: nn.Module, function: str) -> None:
    """Raise `UnsupportedModelError` for a model that holds an adapter; ``function`` is for the message."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"{function} got a {type(model).__name__} with an adapter at {name!r} "
                f"({type(module).__name__}): merge or remove it first (merge_and_unload()), or "
                f"convert the model before adding the adapter."
            )
