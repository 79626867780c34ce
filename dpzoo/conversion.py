"""Stock model to dpzoo model and back, in memory; `dpzoo.transfer` hands the parameters over."""

from typing import Any

from transformers import PreTrainedModel

from dpzoo.errors import UnsupportedModelError
from dpzoo.models.base import PerSampleModel, stock_class
from dpzoo.registry import class_by_name, list_models
from dpzoo.transfer import rebuild, refuse_adapters


def convert(model: PreTrainedModel) -> PerSampleModel:
    """Turn a stock transformers model into the dpzoo model of the same name.

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
    if isinstance(model, PerSampleModel):
        raise UnsupportedModelError(
            f"dpzoo.convert got {_described(model)}, which is a dpzoo model already: use it as it is."
        )
    _refuse_wrapped(model, "dpzoo.convert")
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith(
        "transformers."
    ):
        names = sorted(name for tasks in list_models().values() for name in tasks.values())
        raise UnsupportedModelError(
            f"dpzoo.convert got {_described(model)}, wanted an instance of a transformers class: "
            f"{', '.join(names)}. For a subclass of your own, load its weights into "
            f"the dpzoo class: load_state_dict takes stock state dicts."
        )
    return class_by_name(type(model).__name__).from_stock(model)


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
    refuse_adapters(model, "dpzoo.to_transformers")
    stock: PreTrainedModel = rebuild(model, stock_class(type(model)))
    return stock


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
