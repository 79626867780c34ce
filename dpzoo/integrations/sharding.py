"""DPTrainer under FSDP2: the model split over the ranks before it is made private, and whole in files.

transformers leaves FSDP to accelerate, which exchanges the parameters of an optimizer that is there
already, and takes no FSDP on CPUs. A private optimizer has sums, names and noise for the parameters it was
made with. So the model is split first, here, by layers as there; accelerate finds it prepared. Checkpoints
are those of one process: any number of processes goes on from them, under DDP and FSDP2 alike.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from dpzoo.errors import InputError, UnsupportedModelError
from dpzoo.integrations.inputs import base_of


@dataclass(frozen=True)
class Sharding:
    """How a model is split.

    Args:
        layers: names of the classes whose instances are groups; empty for those that the model names
            (``_no_split_modules``) and has in a list.
        whole: the model is one group.
        reshard: a layer's parameters go after its forward pass, and are gathered again for the backward.
        bf16: layers compute in bfloat16.
    """

    layers: tuple[str, ...] = ()
    whole: bool = False
    reshard: bool = True
    bf16: bool = False


_OFF = ("", "0", "false", "none")
_CONFIG: dict[str, tuple[tuple[str, ...], str]] = {
    "version": (("2",), "2: FSDP1 puts parameters in pieces that no layer uses as they are"),
    "cpu_offload": (_OFF, "False: parameters stay where they are used"),
    "activation_checkpointing": (
        _OFF,
        "False: give TrainingArguments.gradient_checkpointing instead",
    ),
    "cpu_ram_efficient_loading": (_OFF, "False: rank 0 sends its weights to the others"),
    "state_dict_type": (("full_state_dict",), "'FULL_STATE_DICT': checkpoints are whole"),
    "auto_wrap_policy": (
        ("transformer_based_wrap", "no_wrap"),
        "'TRANSFORMER_BASED_WRAP' or 'NO_WRAP'",
    ),
    "min_num_params": (_OFF, "0: groups are layers"),
    **dict.fromkeys(("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"), (_OFF, "False")),
    "reshard_after_forward": (("true", "false"), "True or False"),
}
"""Field of fsdp_config -> the values that can be honoured, in small letters, and what is wanted."""


def sharding_of(args: TrainingArguments) -> Sharding | None:
    """What ``fsdp`` and ``fsdp_config`` ask for; None without.

    Raises:
        InputError: a value that cannot be honoured; one process; FSDP of accelerate's launcher.
    """
    if str(os.environ.get("ACCELERATE_USE_FSDP")).lower() not in _OFF:
        raise InputError(
            f"DPTrainer got ACCELERATE_USE_FSDP={os.environ['ACCELERATE_USE_FSDP']!r} in the environment "
            f"(accelerate launch --use_fsdp, or its config), wanted none: accelerate would split the model "
            f"after it is private. Launch without FSDP and give TrainingArguments(fsdp=True)."
        )
    if not args.fsdp:
        return None
    if args.world_size < 2:
        raise InputError(
            f"DPTrainer got TrainingArguments.fsdp={args.fsdp!r} in one process, wanted several: "
            f"torchrun --standalone --nproc-per-node 2 your_script.py. Or leave fsdp out."
        )
    config = dict(args.fsdp_config or {})
    plugin = getattr(args, "fsdp_plugin_args", None) or {}
    config.setdefault("version", plugin.get("fsdp_version", 1))
    for name, value in config.items():
        if name == "transformer_layer_cls_to_wrap":
            continue
        fitting, wanted = _CONFIG.get(name, ((), "a field of FSDP2's, or none"))
        if str(value).lower() not in fitting:
            raise InputError(
                f"DPTrainer got TrainingArguments.fsdp_config={{{name!r}: {value!r}}}, wanted {wanted}."
            )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise InputError(
                f"DPTrainer got TrainingArguments.{name}=True with fsdp, wanted False: the parts of a "
                f"model are not converted after it is split. Give bf16=True, which evaluation goes by too."
            )
    if not args.accelerator_config.even_batches:
        raise InputError(
            "DPTrainer got TrainingArguments.accelerator_config={'even_batches': False} with fsdp, wanted "
            "True: every pass is a collective, in evaluation too, and ranks need as many batches."
        )
    layers = config.get("transformer_layer_cls_to_wrap") or ()
    return Sharding(
        layers=(layers,) if isinstance(layers, str) else tuple(layers),
        whole=str(config.get("auto_wrap_policy", "")).lower() == "no_wrap",
        reshard=str(config.get("reshard_after_forward", True)).lower() == "true",
        bf16=bool(args.bf16),
    )


def shard(model: nn.Module, sharding: Sharding, device: torch.device, ranks: int) -> nn.Module:
    """Split a model over all ranks, with rank 0's weights; a collective. It is changed in place.

    A layer that shares a parameter with another (a tied head's table) stays in the group of the whole.

    Args:
        model: whole, the same on all ranks but for its values.
        sharding: the groups.
        device: where the parts are to be.
        ranks: how many.

    Raises:
        InputError: no layer is of a class that was named.
        UnsupportedModelError: a PEFT model; one that is split already.
    """
    if base_of(model) is not model:
        raise UnsupportedModelError(
            f"DPTrainer got a {type(model).__name__} with fsdp, wanted a model without adapters: theirs "
            f"would be saved in pieces. Leave fsdp out (DDP): what adapters train is small."
        )
    if any(isinstance(p.data, DTensor) for p in model.parameters()):
        raise UnsupportedModelError(
            f"DPTrainer got a {type(model).__name__} that is split over ranks already, wanted a whole one: "
            f"with TrainingArguments(fsdp=True) DPTrainer splits it."
        )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            held = tensor.detach().to(device).contiguous()
            distributed.broadcast(held, 0)
            tensor.copy_(held)
    owners: dict[torch.Tensor, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter].append(name)
    named = _layers(model, sharding)
    missing = set(sharding.layers) - {type(m).__name__ for _, m in named}
    if missing and not sharding.whole:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise InputError(
            f"DPTrainer got TrainingArguments.fsdp_config={{'transformer_layer_cls_to_wrap': "
            f"{sorted(missing)!r}}}, which {type(model).__name__} does not have, wanted classes among "
            f"{', '.join(kinds)}."
        )
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks,)),
        "reshard_after_forward": sharding.reshard,
    }
    if sharding.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for name, module in reversed(named):
        within = all(
            other.startswith(f"{name}.") for p in module.parameters() for other in owners[p]
        )
        if within and any(True for _ in module.parameters()):
            fully_shard(module, **options)
    fully_shard(model, **options)
    vars(model)["_is_accelerate_prepared"] = True  # so that it is not put into DDP
    return model


def _layers(model: nn.Module, sharding: Sharding) -> list[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    if sharding.whole:
        return []
    if sharding.layers:
        return [(n, m) for n, m in modules.items() if n and type(m).__name__ in sharding.layers]
    # Of others that the model names (BERT's embeddings) it may call a part by itself.
    own = getattr(model, "_no_split_modules", None) or ()
    return [
        (name, module)
        for name, module in modules.items()
        if type(module).__name__ in own
        and isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList)
    ]


def gather_no_more(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward has gathered: the step changes the parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of the whole model on rank 0, empty on the others; a collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    for name, source in _tied(model).items():
        if name in state:  # tied ones are one tensor, as in a model that is whole
            state[name] = state[source]
    return state


def _tied(model: nn.Module) -> dict[str, str]:
    """Name in the state dict -> the name that files have instead."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def load_whole(model: nn.Module, folder: str) -> None:
    """Load a checkpoint's weights into the parts; each rank reads the whole.

    Raises:
        InputError: the folder has no weights, or not all of them.
    """
    state: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        state |= load_file(file)
    for name, source in _tied(model).items():
        if name not in state and source in state:
            state[name] = state[source]
    buffers, own = dict(model.named_buffers()), model.state_dict()
    missing = [name for name in own if name not in state and name not in buffers]
    if missing:
        raise InputError(
            f"The checkpoint {folder} has no weights of {missing[0]} and {len(missing) - 1} more, wanted "
            f"model.safetensors with all. Resume from another checkpoint."
        )
    parts = {name: _part(value, own.get(name)) for name, value in state.items()}
    model.load_state_dict(parts, strict=False)


def _part(whole: Any, like: Any) -> Any:
    """This rank's part of a tensor that all ranks have, where another is in parts."""
    if not isinstance(like, DTensor):
        return whole
    place = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), *place, src_data_rank=None)


def whole_optimizer_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict, with whole tensors, on all ranks; a collective."""

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    parts = {n: {k: whole(v) for k, v in own.items()} for n, own in state["state"].items()}
    return {**state, "state": parts}


def split_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """The inverse, of a state that is loaded; a hook of `torch.optim.Optimizer`."""
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    at = dict(zip(numbers, own, strict=False))  # torch says so if they are not as many

    def part(value: Any, parameter: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.ndim
        alike = whole and parameter is not None and value.shape == parameter.shape
        return _part(value, parameter) if alike else value

    parts = {
        n: {k: part(v, at.get(n)) for k, v in values.items()}
        for n, values in state["state"].items()
    }
    return {**state, "state": parts}
