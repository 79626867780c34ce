"""Stock model to dpzoo model and back, in memory.

The two sides have the same parameter names. What differs is one rule as data, which runs both ways:
the projections of `dpzoo.layers.transposed` have their weights transposed. Everything else is
handed over as it is, and shares its storage with the model it came from.
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
from dpzoo.models.base import PerSampleModel
from dpzoo.registry import class_by_name, list_models, stock_class


def convert(model: PreTrainedModel) -> PerSampleModel:
    """Turn a stock transformers model into its dpzoo twin.

    Storage is shared wherever the layouts agree (everything but GPT-2's projections): training the
    one trains those parameters of the other. Use ``copy.deepcopy(model)`` first to keep the original.

    Args:
        model: an instance of one of the transformers classes of `dpzoo.list_models`.

    Returns:
        The dpzoo model: same values, dtype, device, ``requires_grad``, training flag, tied structure,
        generation config and name. Its config is a copy.

    Raises:
        UnsupportedModelError: a class that dpzoo does not have, a wrapped, adapted, quantised or
            already converted model; the message says what to do instead.
        UnsupportedConfigError: a config field that the dpzoo class cannot honour.
        ConversionError: parameter names or shapes that do not match one to one.
    """
    return _convert(model, release=False)


def to_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a dpzoo model into the stock transformers model; the exact inverse of `convert`.

    Storage is shared as in `convert`. To write a checkpoint, ``model.save_pretrained`` is enough.

    Args:
        model: a dpzoo model, not wrapped.

    Returns:
        The stock model.

    Raises:
        UnsupportedModelError: anything but a dpzoo model.
        ConversionError: parameter names or shapes that do not match one to one.
    """
    if not isinstance(model, PerSampleModel):
        _refuse_wrapped(model, "dpzoo.to_transformers")
        raise UnsupportedModelError(
            f"dpzoo.to_transformers got {_described(model)}, wanted a dpzoo model. "
            f"dpzoo.convert(model) makes one of a stock model."
        )
    _refuse_adapters(model, "dpzoo.to_transformers")
    twin = _empty(stock_class(type(model)), model)
    _transfer(_named_tensors(model), twin, transposed=set(_transposed_names(model)))
    _carry(model, twin)
    return twin


def _convert(
    model: PreTrainedModel, *, release: bool, cls: type[PerSampleModel] | None = None
) -> PerSampleModel:
    """`convert`, into ``cls`` if given: the twin's class or a subclass of it.

    With ``release`` a layer of the source is freed as soon as it has been copied.
    """
    if isinstance(model, PerSampleModel):
        raise UnsupportedModelError(
            f"dpzoo.convert got {_described(model)}, which is a dpzoo model already: use it as it is."
        )
    _refuse_wrapped(model, "dpzoo.convert")
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith(
        "transformers."
    ):
        raise UnsupportedModelError(
            f"dpzoo.convert got {_described(model)}, wanted an instance of a transformers class: "
            f"{', '.join(sorted(_class_names()))}. For a subclass of your own, load its weights into "
            f"the dpzoo class: load_state_dict takes stock state dicts."
        )
    cls = cls or class_by_name(name)
    _refuse_adapters(model, "dpzoo.convert")
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            f"dpzoo.convert got a quantised {name}; its weights have no gradients. Load it without "
            f"quantization_config."
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or "disk" in devices:
        raise UnsupportedModelError(
            f"dpzoo.convert got a {name} spread over {sorted(map(str, devices))}. Load it on one "
            f"device (without device_map) and move the dpzoo model."
        )
    twin = _empty(cls, model)
    transposed = set(_transposed_names(twin))
    _transfer(_named_tensors(model), twin, transposed=transposed, release=release)
    _carry(model, twin)
    twin.retype_parts()
    return twin


# --- building and filling the twin --------------------------------------------------------------


def _empty(cls: type[Any], model: PreTrainedModel) -> Any:
    """An instance of ``cls`` on the meta device, with a copy of the model's config."""
    # A bare encoder may have been built without its pooler, which the config does not tell.
    arguments = {"add_pooling_layer": False} if getattr(model, "pooler", True) is None else {}
    with torch.device("meta"):
        twin = cls(copy.deepcopy(model.config), **arguments)
    # Parameters are handed over later; buffers (stock models keep position ids in some) are
    # computed, by the code that computes them when transformers loads a checkpoint.
    for module in twin.modules():
        computed = dict(module.named_buffers(recurse=False))
        for name, buffer in computed.items():
            setattr(module, name, torch.empty_like(buffer, device=model.device))
        if computed:
            twin._init_weights(module)
    return twin


def _transposed_names(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that the stock layout stores transposed, from the dpzoo model."""
    for prefix, module in model.named_modules():
        if isinstance(module, TransposedProjections):
            for child in module.transposed:
                yield f"{prefix}.{child}.weight"


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under each of its names, with the stock names of what dpzoo keeps elsewhere."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        if isinstance(module, TiedBias):
            tensors[f"{prefix}.bias"] = module.bias
    return tensors


def _transfer(
    source: dict[str, torch.Tensor],
    twin: nn.Module,
    *,
    transposed: set[str],
    release: bool = False,
) -> None:
    """Fill every parameter of the twin exactly once, keeping what is tied tied.

    Raises:
        ConversionError: missing, unexpected and mis-shaped names, all of them, sorted.
    """
    wanted = _named_tensors(twin)
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - source.keys())]
    problems += [f"unexpected: {name}" for name in sorted(source.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & source.keys()):
        shape = tuple(source[name].shape)
        shape = shape[::-1] if name in transposed else shape
        if shape != tuple(wanted[name].shape):
            problems.append(f"mis-shaped: {name} is {shape}, wanted {tuple(wanted[name].shape)}")
    if problems:
        raise ConversionError(
            f"{type(twin).__name__}: the two models do not correspond.\n  "
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
        module = twin.get_submodule(path)
        if not isinstance(module, TiedBias):
            setattr(module, leaf, filled[key])
    for path, module in twin.named_modules():
        if isinstance(module, TiedBias):
            module.set_bias(filled[id(source[f"{path}.bias"])])


SETTINGS = ("p", "eps", "padding_idx")
"""What callers change on the modules of a model they have, where the config does not tell."""


def _carry(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """What a model has beside its parameters: modes, settings, generation config, names."""
    twin.name_or_path = model.name_or_path
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(model.generation_config)
    twin.all_tied_weights_keys = dict(model.all_tied_weights_keys)
    modules: dict[str, nn.Module] = {}
    namesakes = dict(model.named_modules())
    for name, module in twin.named_modules():
        # A module without a namesake (an activation, say) goes with the one that it is in.
        modules[name] = source = namesakes.get(name) or modules[name.rpartition(".")[0]]
        module.training = source.training
        for setting in SETTINGS:
            if name in namesakes and hasattr(module, setting) and hasattr(source, setting):
                setattr(module, setting, getattr(source, setting))


# --- what cannot be converted -------------------------------------------------------------------


def _class_names() -> list[str]:
    return [name for tasks in list_models().values() for name in tasks.values()]


def _described(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _refuse_wrapped(model: Any, function: str) -> None:
    """Name the wrapper that a model is in, and how to get it out."""
    module = type(model).__module__
    for package, attribute, advice in (
        ("opacus.", "_module", "pass the model before make_private, or model._module"),
        (
            "peft.",
            "base_model",
            "convert first and then get_peft_model, or pass merge_and_unload()",
        ),
        ("torch.nn.parallel", "module", "pass model.module"),
        ("torch.distributed", "module", "pass the model before it is wrapped"),
        ("torch._dynamo", "_orig_mod", "pass model._orig_mod"),
    ):
        if module.startswith(package) and hasattr(model, attribute):
            raise UnsupportedModelError(
                f"{function} got a wrapped model ({_described(model)}): {advice}."
            )


def _refuse_adapters(model: nn.Module, function: str) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"{function} got a {type(model).__name__} with an adapter at {name!r} "
                f"({type(module).__name__}): merge or remove it first (merge_and_unload()), or "
                f"convert the model before adding the adapter."
            )
