"""Linear layers that a stock checkpoint stores transposed.

GPT-2's stock projections are `Conv1D`, with weights of (in, out). Here they are exact
`torch.nn.Linear`, with weights of (out, in), because that is what every sampler knows. The
difference stays inside: state dicts have the stock layout, on the way out and on the way in. Square
weights (``c_proj``) would load untransposed without a complaint, so this lives where no caller can
forget it.
"""

import re
from typing import Any

from torch import nn


class TransposedProjections(nn.Module):
    """A container whose state dict holds the weights of some of its Linear children transposed."""

    transposed: tuple[str, ...] = ()
    """Names of the children whose weights a stock checkpoint stores as (in, out)."""

    def _transposed_keys(self, keys: Any, prefix: str) -> list[str]:
        # A wrapper (PEFT's, say) may have moved the layer one level down.
        wrapped = r"(base_layer\.|original_module\.|modules_to_save\.[^.]+\.)*"
        pattern = re.compile(rf"{re.escape(prefix)}({'|'.join(self.transposed)})\.{wrapped}weight")
        return [key for key in keys if pattern.fullmatch(key)]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.state_dict`, in the stock layout; the transposed weights are views."""
        result = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for key in self._transposed_keys(list(result), prefix):
            result[key] = result[key].t()
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in self._transposed_keys(list(state_dict), prefix):
            if state_dict[key].ndim == 2:
                state_dict[key] = state_dict[key].t()
        super()._load_from_state_dict(state_dict, prefix, *args)
