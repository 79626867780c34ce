"""The projection onto the vocabulary, for heads whose weight is the token embedding's."""

import torch
from torch import nn

from dpzoo.layers.precision import UpcastLinear


class LMHead(nn.Linear):
    """A vocabulary projection tied to a `TokenEmbedding`: (batch, seq, hidden) -> (batch, seq, vocab).

    The weight *is* the embedding's parameter. Its per-sample gradient is the sum over both uses,
    and so is not known before the embedding's backward has run. Opacus' ghost clipping refuses a
    parameter that is used twice in modules that have a norm sampler; this class has a grad
    sampler only, which hands its share over to the embedding's sampler
    (`dpzoo.grad_samplers.lm_head`). An untied head needs none of this and stays an exact
    `torch.nn.Linear`: see `retype_lm_head`.
    """

    table: nn.Module | None = None
    """The embedding that the weight belongs to. A plain reference, not a submodule."""


def retype_lm_head(head: nn.Module, embedding: nn.Module) -> None:
    """Make the type of a vocabulary projection tell whether it is tied, in place.

    Args:
        head: an `LMHead` or `torch.nn.Linear`; anything else is left alone.
        embedding: the token embedding that the head may share its weight with.
    """
    if type(head) in (nn.Linear, LMHead, UpcastLinear):
        tied = head.weight is getattr(embedding, "weight", None)
        head.__class__ = LMHead if tied else nn.Linear
        # Past nn.Module.__setattr__, which would make the embedding a part of the head.
        vars(head).update(table=embedding) if tied else vars(head).pop("table", None)


class TiedBias(nn.Module):
    """A container of a vocabulary projection ``decoder`` whose bias stock models store twice.

    Stock BERT and RoBERTa heads hold a parameter ``bias`` beside ``decoder.bias``. Tied, the two
    are one parameter; untied (``tie_word_embeddings=False``), the outer one is dead: saved and
    loaded, never used. A container that holds a parameter sends its whole subtree to functorch in
    Opacus, so here only the decoder holds one. The outer name lives on in the state dict, with the
    value that the stock model would have there.
    """

    decoder: nn.Linear
    spare_bias: torch.Tensor | None

    def __init__(self, vocab_size: int, *, tied: bool) -> None:
        super().__init__()
        spare = None if tied else torch.zeros(vocab_size)
        self.register_buffer("spare_bias", spare, persistent=False)

    @property
    def bias(self) -> torch.Tensor:
        """What a stock model calls ``bias``: the decoder's, or the dead one of an untied head."""
        return self.decoder.bias if self.spare_bias is None else self.spare_bias

    def set_bias(self, value: torch.Tensor) -> None:
        """Make ``value`` the outer bias: an alias if it is the decoder's, else a dead value."""
        self.spare_bias = None if value is self.decoder.bias else value.detach()

    def set_decoder(self, decoder: nn.Linear) -> None:
        """Replace the projection; a dead bias takes its size, or the checkpoint would not load."""
        self.decoder = decoder
        if self.spare_bias is not None:
            self.spare_bias = decoder.bias.detach().clone()

    def tie_bias(self) -> None:
        """Make the two biases one; where they differ, the outer one's value stays, as in stock."""
        spare, self.spare_bias = self.spare_bias, None
        if spare is not None and spare.shape == self.decoder.bias.shape:
            with torch.no_grad():
                self.decoder.bias.copy_(spare)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
    ):
        value = state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )
        if value is None:
            missing_keys.append(prefix + "bias")
        elif value.shape != self.bias.shape:
            errors.append(
                f"size mismatch for {prefix}bias: copying a param with shape {value.shape} from "
                f"checkpoint, the shape in current model is {self.bias.shape}."
            )
        elif local_metadata.get("assign_to_params_buffers", False):
            if self.spare_bias is not None:
                self.spare_bias = value.detach()
            else:
                trainable = self.decoder.bias.requires_grad
                self.decoder.bias = nn.Parameter(value.detach(), requires_grad=trainable)
        else:
            with torch.no_grad():
                self.bias.copy_(value)
