"""The tasks: what comes after the body, shared by the families.

Each function has the name of its task. It takes the model and its inputs, runs ``model.base_model`` on
them and returns the output class that transformers returns, with ``loss_per_sample`` attached. Losses
are per row: see `dpzoo.losses` for what that means and where it differs from transformers.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from dpzoo.errors import InputError
from dpzoo.losses import (
    causal_losses,
    class_losses,
    sequence_losses,
    span_losses,
    token_losses,
)
from dpzoo.models.cache import CACHE
from dpzoo.shapes import check

Projection = Callable[..., torch.Tensor]


def token_classification(
    model: Any, project: Projection, labels: torch.Tensor | None, **inputs: Any
) -> TokenClassifierOutput:
    """Logits (batch, seq, num_labels); a row's loss is the mean over its labelled tokens."""
    return _token_by_token(TokenClassifierOutput, model, project, labels, inputs)


def masked_lm(
    model: Any, project: Projection, labels: torch.Tensor | None, **inputs: Any
) -> MaskedLMOutput:
    """Logits (batch, seq, vocab); a row's loss is the mean over its labelled tokens."""
    return _token_by_token(MaskedLMOutput, model, project, labels, inputs)


def _token_by_token(
    kind: Any, model: Any, project: Projection, labels: torch.Tensor | None, inputs: dict[str, Any]
) -> Any:
    body = model.base_model(**inputs)
    logits = project(body.last_hidden_state)
    losses = None if labels is None else token_losses(logits, labels)
    return model._output(kind, body, losses, logits=logits)


def causal_lm(
    model: Any,
    project: Projection,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    **inputs: Any,
) -> CausalLMOutputWithCrossAttentions:
    """Logits (batch, seq, vocab); a row's loss is the mean over its tokens that have a successor.

    As in transformers, ``shift_labels`` (batch, seq) beside ``labels`` replaces them: targets that are
    lined up with the logits already.
    """
    body = model.base_model(**inputs)
    logits = project(_kept(body.last_hidden_state, logits_to_keep))
    losses = None
    if labels is not None and shift_labels is not None:
        losses = token_losses(logits, shift_labels)
    elif labels is not None:
        losses = causal_losses(logits, labels)
    return model._output(
        CausalLMOutputWithCrossAttentions, body, losses, logits=logits, **{CACHE: body.get(CACHE)}
    )


def sequence_classification(
    model: Any, project: Projection, labels: torch.Tensor | None, **inputs: Any
) -> SequenceClassifierOutput:
    """Logits (batch, num_labels), from whatever ``project`` takes of the body's output."""
    body = model.base_model(**inputs)
    logits = project(body)
    losses = None if labels is None else sequence_losses(logits, labels, model.config)
    return model._output(SequenceClassifierOutput, body, losses, logits=logits)


def multiple_choice(
    model: Any, project: Projection, labels: torch.Tensor | None, **inputs: Any
) -> MultipleChoiceModelOutput:
    """Logits (batch, num_choices), one score a sequence.

    The row stays the batch dimension: inputs of (batch, num_choices, seq) go through the body as
    (batch, num_choices * seq), so that a per-sample gradient is a row's, all its choices together.

    Args:
        model: the model; its body takes ``num_choices``.
        project: the body's output and num_choices to (batch, num_choices, 1) scores.
        labels: (batch,), the right choice.
        **inputs: the body's arguments, ids and masks as (batch, num_choices, seq), embeddings as
            (batch, num_choices, seq, hidden).
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    given = ids if ids is not None else embeds
    if given is not None:
        of, shape = f"{type(model).__name__}.forward()", ("batch", "num_choices", "seq")
        if ids is not None:
            check("input_ids", ids, shape, of=of)
        if embeds is not None:
            check("inputs_embeds", embeds, (*shape, "hidden"), dtypes=None, of=of)
        batch, num_choices, seq = given.shape[:3]
        inputs["num_choices"] = num_choices
        if ids is not None:
            inputs["input_ids"] = ids.reshape(batch, num_choices * seq)
        if embeds is not None:
            inputs["inputs_embeds"] = embeds.reshape(batch, num_choices * seq, embeds.shape[-1])
    body = model.base_model(**inputs)
    logits = project(body, num_choices).reshape(batch, num_choices)
    losses = None if labels is None else class_losses(logits, labels)
    return model._output(MultipleChoiceModelOutput, body, losses, logits=logits)


def question_answering(
    model: Any,
    project: Projection,
    start_positions: torch.Tensor | None,
    end_positions: torch.Tensor | None,
    **inputs: Any,
) -> QuestionAnsweringModelOutput:
    """Logits (batch, seq) of a span's first and last token."""
    body = model.base_model(**inputs)
    refuse_choices(model, body.last_hidden_state)
    start_logits, end_logits = (
        half.squeeze(-1).contiguous() for half in project(body.last_hidden_state).split(1, dim=-1)
    )
    losses = None
    if start_positions is not None and end_positions is not None:
        mask = inputs.get("attention_mask")
        losses = span_losses(start_logits, end_logits, start_positions, end_positions, mask)
    return model._output(
        QuestionAnsweringModelOutput, body, losses, start_logits=start_logits, end_logits=end_logits
    )


def refuse_choices(model: Any, hidden: torch.Tensor) -> None:
    """Raise `InputError` where a row has several sequences, and the head reads one."""
    if hidden.ndim != 3:
        raise InputError(
            f"{type(model).__name__}.forward() got inputs of shape {tuple(hidden.shape[:-1])}, wanted "
            f"(batch, seq): this head reads one sequence a row."
        )


def _kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions that logits are wanted for: the last few, those of given indices, or all for 0."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    return hidden[:, logits_to_keep]


def real_tokens(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """Which of the tokens of (batch, ..., seq, hidden) are no padding, (batch, ..., seq), True for real.

    Args:
        mask: (batch, ..., kv_len) or (rows, kv_len), over past and new tokens. None and a 4-D mask do not
            tell, and give None.
        hidden: for the shape.
    """
    if mask is None or mask.ndim == 4:
        return None
    return mask.reshape(*hidden.shape[:-2], mask.shape[-1])[..., -hidden.shape[-2] :] != 0


def last_real(real: torch.Tensor) -> torch.Tensor:
    """The index of the rightmost True of (..., seq), (...); 0 where there is none."""
    return (torch.arange(real.shape[-1], device=real.device) * real).argmax(-1)


_RENAMED = {
    "choose": "multiple_choice",
    "answer": "question_answering",
    "predict_next": "causal_lm",
    "predict_masked": "masked_lm",
    "classify_tokens": "token_classification",
    "classify_sequence": "sequence_classification",
}


def __getattr__(name: str) -> Any:
    """The functions' earlier names, for one release."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"heads.{name} is called heads.{_RENAMED[name]} now; the old name goes in the next release.",
        DeprecationWarning,
        stacklevel=2,
    )
    return globals()[_RENAMED[name]]
