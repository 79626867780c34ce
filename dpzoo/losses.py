"""Losses with one value per row of the batch, reduced over the row's own tokens first.

Differential privacy bounds what one row can change. transformers divides a token loss by the number
of labelled tokens *in the batch*, so there every row's gradient depends on how many tokens the
others have, and removing a row moves the clipped sum by more than the clipping norm. Here a row's
loss is the mean over that row's labelled tokens, and nothing else enters it. Where all rows have the
same number of labelled tokens (sequence classification and multiple choice always do), the batch
mean of these losses equals transformers' loss.

Every function returns a tensor of shape (batch,), float32 or wider. A row with nothing to learn from
(all labels ignored) has loss 0 and gradient 0.
"""

import functools
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from dpzoo.errors import InputError, UnsupportedConfigError, UnsupportedModelError
from dpzoo.factors import upcast
from dpzoo.shapes import IDS, check

IGNORE_INDEX = -100
"""A label with this value takes no part in the loss, as everywhere in transformers."""

CLASSES = (torch.int64,)
OTHER_LABELS = (torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float32,
                torch.float16, torch.bfloat16)  # fmt: skip
"""Dtypes of labels that are no classes."""
NUM_LABELS = "A head has as many classes as it was built with: from_pretrained(..., num_labels=)."

Output = TypeVar("Output")


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Mean cross entropy over each row's labelled positions.

    Args:
        logits: (batch, ..., classes).
        labels: (batch, ...), integer classes, or ``ignore_index``.
        ignore_index: the label that takes no part.

    Returns:
        Shape (batch,).

    Raises:
        InputError: the shapes do not belong together, or a label is no class.

    Guarantees:
        Entry i is a function of row i alone.
    """
    check("labels", labels, dtypes=CLASSES, advice="Class labels are whole numbers: labels.long().")
    if labels.shape != logits.shape[:-1]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, wanted {tuple(logits.shape[:-1])}, one label "
            f"for each position of the logits. Check the collator's padding of labels."
        )
    batch, classes = logits.shape[0], logits.shape[-1]
    check("labels", labels, dtypes=CLASSES, high=classes, ignored=ignore_index, advice=NUM_LABELS)
    labels = labels.to(logits.device)
    per_token = F.cross_entropy(
        upcast(logits).reshape(labels.numel(), classes),
        labels.reshape(labels.numel()),
        reduction="none",
        ignore_index=ignore_index,
    )
    per_row = per_token.reshape(batch, labels[0].numel() if batch else 0).sum(1)
    counted = (labels != ignore_index).reshape(batch, -1 if batch else 0).sum(1)
    return per_row / counted.clamp(min=1)


def class_losses(logits: torch.Tensor, labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
    """The cross entropy of one class a row.

    Args:
        logits: (batch, classes).
        labels: (batch,) or (batch, 1).
        name: the argument's, for the message.

    Returns:
        Shape (batch,).

    Raises:
        InputError: as `token_losses`.
    """
    rows, classes = logits.shape
    check(name, labels, (rows,), (rows, 1), dtypes=CLASSES, high=classes, ignored=IGNORE_INDEX)
    return token_losses(logits, labels.reshape(rows))


def causal_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`token_losses` of next-token prediction: position t of the logits answers for label t + 1.

    Args:
        logits: (batch, ..., seq, vocab).
        labels: (batch, ..., seq), not shifted; usually the input ids, ``-100`` where ignored.

    Returns:
        Shape (batch,).
    """
    if not isinstance(labels, torch.Tensor) or labels.shape != logits.shape[:-1]:
        return token_losses(logits, labels)  # raises, naming the shapes as the caller knows them
    # The labels move, not the logits: a slice of those is copied in the loss and again in its gradient,
    # and nothing in a step is larger.
    following = labels.roll(-1, dims=-1)
    following[..., -1:] = IGNORE_INDEX
    return token_losses(logits, following)


def span_losses(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of the cross entropies of a span's first and last position.

    A position outside the sequence is ignored: that half of the row's loss is 0. (transformers
    divides by the number of rows in the batch whose position is inside; here other rows do not
    matter.) Padding takes no part: with it, a row's loss would depend on how far the longest row of
    the batch makes it be padded. (transformers' softmax runs over padding too; without padding, and
    with all positions inside, the two losses are equal.)

    Args:
        start_logits: (batch, seq).
        end_logits: (batch, seq).
        start_positions: (batch,) or (batch, 1).
        end_positions: (batch,) or (batch, 1).
        attention_mask: (batch, seq), zero at padding; None or of another shape: nothing is padding.

    Returns:
        Shape (batch,).
    """
    seq = start_logits.shape[1]
    padding = None
    if attention_mask is not None and attention_mask.shape == start_logits.shape:
        padding = attention_mask == 0
    halves = []
    rows = start_logits.shape[0]
    for name, logits, positions in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        check(name, positions, (rows,), (rows, 1), dtypes=CLASSES)
        target = positions.reshape(logits.shape[0]).clamp(0, seq)
        if padding is not None:
            inside = target.clamp(max=seq - 1).unsqueeze(1)
            target = target.masked_fill(padding.gather(1, inside).squeeze(1), seq)
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        halves.append(token_losses(logits, target, ignore_index=seq))
    return (halves[0] + halves[1]) / 2


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Loss of a sequence classifier or regressor, by ``config.problem_type``.

    As in transformers, a ``problem_type`` of None is settled by the first labels seen, and the
    choice is kept in the config: one output means regression, integer labels one class a row,
    floating labels several.

    Args:
        logits: (batch, num_labels).
        labels: (batch,) of classes; (batch,) or (batch, num_labels) of targets for regression;
            (batch, num_labels) of 0/1 for several classes a row.
        config: the model's config; reads and may set ``problem_type``.

    Returns:
        Shape (batch,). Over several outputs, the row's mean.

    Raises:
        InputError: labels whose shape does not fit the logits.
        UnsupportedConfigError: an unknown ``problem_type``.
    """
    check("labels", labels, dtypes=(*IDS, *OTHER_LABELS))
    labels = labels.to(logits.device)
    problem = config.problem_type
    if problem is None:
        classes = labels.dtype in (torch.long, torch.int) or (
            labels.ndim < 2 and not labels.is_floating_point()
        )
        problem = "single_label_classification" if classes else "multi_label_classification"
        problem = "regression" if logits.shape[-1] == 1 else problem
    losses = _sequence_losses(logits, labels, problem)
    config.problem_type = problem  # not before: refused labels say nothing of those that come next
    return losses


def _sequence_losses(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> torch.Tensor:
    num_labels = logits.shape[-1]
    if problem == "single_label_classification":
        return class_losses(logits, labels)
    if problem not in ("regression", "multi_label_classification"):
        raise UnsupportedConfigError(
            f"config.problem_type is {problem!r}, wanted one of 'regression', "
            f"'single_label_classification', 'multi_label_classification', or None to have it "
            f"inferred from the labels."
        )
    if num_labels == 1 and labels.numel() == logits.numel():
        labels = labels.reshape(logits.shape)
    if labels.shape != logits.shape:
        raise InputError(
            f"labels of a {problem} model have shape {tuple(labels.shape)}, wanted "
            f"{tuple(logits.shape)}: one value for each output of each row."
        )
    logits = upcast(logits)
    targets = labels.to(logits.dtype)
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, targets, reduction="none").mean(1)


def batch_mean(losses: torch.Tensor | None) -> torch.Tensor | None:
    """The mean of per-row losses; 0, still differentiable, for an empty batch."""
    if losses is None:
        return None
    return losses.sum() / max(len(losses), 1)


def with_loss_per_sample(output: Output, losses: torch.Tensor | None) -> Output:
    """Attach ``loss_per_sample``, shape (batch,) or None, to a transformers output.

    It is an attribute and not an item: ``output.to_tuple()``, ``output[0]`` and code that walks
    over the items (Trainer's evaluation, say) see what they see with a stock model.
    """
    object.__setattr__(output, "loss_per_sample", losses)
    return output


class RowLosses:
    """The criterion of rows' losses, (rows,), as the engines take one."""

    reduction = "mean"

    def __call__(self, losses: torch.Tensor) -> torch.Tensor:
        """The losses, or their mean; 0 without rows."""
        return losses if self.reduction == "none" else losses.sum() / max(len(losses), 1)


class ModelLoss:
    """The criterion that takes a model's outputs: one line for every head and every Opacus mode.

        criterion = dpzoo.ModelLoss(model)
        model, optimizer, criterion, loader = dpzoo.PrivacyEngine().make_private(
            module=model, ..., criterion=criterion, grad_sample_mode="bk"
        )
        loss = criterion(model(**inputs), labels)
        loss.backward()

    dpzoo's own models have computed the rows' losses already, from the labels that they were given:
    for them ``ModelLoss()`` and ``criterion(model(**batch))`` are enough. A stock model's ``loss`` is a
    mean over the batch's tokens, which no privacy engine can take apart, so the rows' losses are
    computed here, from its logits and the labels.

    Ghost mode and "bk" need the loss of every row, before any reduction; they ask a criterion for it
    by setting ``reduction = "none"``. In the other modes the criterion gives the reduced loss.

    Args:
        model: what tells the head: a model (also wrapped by Opacus, PEFT or DDP), its class, or a task:
            one of `ModelLoss.TASKS`. None for dpzoo's own models.
        reduction: "mean" over the rows, "sum" over them, or "none" for (rows,) losses. It has to
            equal the ``loss_reduction`` that ``make_private`` is given.

    Raises:
        InputError: an unknown reduction or task.
        UnsupportedModelError: a class whose head is not known.

    Guarantees:
        With "none", entry i is a function of row i's outputs and labels alone, in float32 or wider.
        Auxiliary losses over the batch (a router's load balance) take no part.
    """

    TASKS = (
        "causal-lm",
        "masked-lm",
        "seq2seq-lm",
        "token-classification",
        "sequence-classification",
        "image-classification",
        "multiple-choice",
        "question-answering",
        "next-sentence-prediction",
        "pre-training",
        "double-heads",
    )
    """What ``model`` may be as a string: the registry's names, and two that only stock models have."""

    def __init__(self, model: Any = None, *, reduction: str = "mean") -> None:
        self.reduction = reduction
        self._refuse_unknown()
        self.config: Any = None
        if isinstance(model, str) and model not in self.TASKS:
            raise InputError(
                f"ModelLoss got {model!r}, wanted a model or one of: {', '.join(self.TASKS)}. "
                f"Pass a reduction by keyword: ModelLoss(reduction='none')."
            )
        self.task: str | None = (
            model if model is None or isinstance(model, str) else _task_of(model)
        )
        """The head; None: the outputs carry the rows' losses."""
        if model is not None and not isinstance(model, str | type):
            self.config = getattr(unwrapped(model), "config", None)

    def __call__(self, outputs: Any, labels: Any = None, **inputs: Any) -> torch.Tensor:
        """The loss of a model's outputs; of double heads and of pre-training, the sum of their two.

        Args:
            outputs: what the model returned.
            labels: as the stock model takes them: (rows, seq) tokens, usually not shifted, or their
                classes, ``-100`` where ignored; (rows,) classes; (rows,) or (rows, num_labels) targets.
                For question answering (start_positions, end_positions), each (rows,). None for a dpzoo
                model that was given labels.
            inputs: the rest of the batch, if you like: ``criterion(model(**batch), **batch)``. Read are
                ``attention_mask`` (question answering ignores padding by it), ``start_positions``,
                ``end_positions``, ``next_sentence_label`` and ``mc_labels``.

        Returns:
            Shape (), or (rows,) with ``reduction="none"``.

        Raises:
            InputError: outputs without what the head gives, labels missing or of another shape.
        """
        self._refuse_unknown()
        losses = _carried(outputs)
        if losses is None:
            losses = self._computed(outputs, labels, inputs)
        if self.reduction == "none":
            return losses
        return losses.sum() / (max(len(losses), 1) if self.reduction == "mean" else 1)

    def _computed(self, outputs: Any, labels: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The rows' losses of a stock model's outputs, (rows,)."""
        if self.task is None:
            raise InputError(
                f"ModelLoss got {type(outputs).__name__} without loss_per_sample, wanted the outputs "
                f"of a dpzoo model that was given labels (and return_dict=True). Pass labels=... to the "
                f"model. For a stock transformers model, name it and give the labels to the criterion: "
                f"dpzoo.ModelLoss(model)(model(**inputs), labels)."
            )
        if self.task == "question-answering":
            starts, ends = labels if isinstance(labels, tuple | list) else (None, None)
            return span_losses(
                self._output(outputs, "start_logits"),
                self._output(outputs, "end_logits"),
                self._label(inputs.get("start_positions", starts), "start_positions"),
                self._label(inputs.get("end_positions", ends), "end_positions"),
                inputs.get("attention_mask"),
            )
        if self.task == "pre-training":
            next_sentence = self._label(inputs.get("next_sentence_label"), "next_sentence_label")
            return token_losses(
                self._output(outputs, "prediction_logits"), self._label(labels, "labels")
            ) + class_losses(
                self._output(outputs, "seq_relationship_logits"),
                next_sentence,
                "next_sentence_label",
            )
        logits, labels = self._output(outputs, "logits"), self._label(labels, "labels")
        if self.task == "causal-lm":
            return causal_losses(logits, labels)
        if self.task == "double-heads":
            choices = self._label(inputs.get("mc_labels"), "mc_labels")
            return causal_losses(logits, labels) + class_losses(
                self._output(outputs, "mc_logits"), choices, "mc_labels"
            )
        if self.task in ("sequence-classification", "image-classification"):
            # The model's own config is left as it is: what labels one batch has says nothing of the next.
            problem = getattr(self.config, "problem_type", None)
            return sequence_losses(logits, labels, SimpleNamespace(problem_type=problem))
        if self.task in ("multiple-choice", "next-sentence-prediction"):
            return class_losses(logits, labels)
        return token_losses(logits, labels)

    def _output(self, outputs: Any, name: str) -> torch.Tensor:
        value = getattr(outputs, name, None)
        if not isinstance(value, torch.Tensor):
            got = type(outputs).__name__
            if isinstance(outputs, torch.Tensor):
                got += f" of shape {tuple(outputs.shape)}"
            raise InputError(
                f"ModelLoss of {self.task!r} got {got} without {name}, wanted the outputs of the model "
                f"with return_dict=True: criterion(model(**inputs), labels). The model's own loss is a "
                f"mean over the batch, and cannot be clipped row by row."
            )
        return value

    def _label(self, value: Any, name: str) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            how = "criterion(model(**inputs), labels)"
            if name != "labels":
                how = f"criterion(model(**inputs), labels, {name}=...)"
            if name in ("start_positions", "end_positions"):
                how = "criterion(model(**inputs), (start_positions, end_positions))"
            raise InputError(
                f"ModelLoss of {self.task!r} got {name} = {type(value).__name__}, wanted a tensor: {how}."
            )
        return value

    def _refuse_unknown(self) -> None:
        if self.reduction not in ("mean", "sum", "none"):
            raise InputError(
                f"ModelLoss got reduction={self.reduction!r}, wanted 'mean', 'sum' or 'none'."
            )


def _carried(outputs: Any) -> torch.Tensor | None:
    """The losses that a dpzoo model attached to its outputs, (rows,)."""
    parts = [
        losses
        for name in ("loss_per_sample", "mc_loss_per_sample")
        if (losses := getattr(outputs, name, None)) is not None
    ]
    return sum(parts[1:], parts[0]) if parts else None


def unwrapped(model: Any) -> Any:
    """The transformers model under what Opacus, DDP and PEFT put around it."""
    while True:
        if isinstance(model, PreTrainedModel):
            return model
        inner = getattr(model, "_module", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None:
            return model
        model = inner


_MAPPINGS = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",  # last of the three: BartForConditionalGeneration is in two
    "token-classification": "TOKEN_CLASSIFICATION",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "image-classification": "IMAGE_CLASSIFICATION",
    "multiple-choice": "MULTIPLE_CHOICE",
    "question-answering": "QUESTION_ANSWERING",
    "next-sentence-prediction": "NEXT_SENTENCE_PREDICTION",
}
"""Task -> its list in transformers' auto classes."""

_UNSHIFTED = (
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MarianForCausalLM",
    "MBartForCausalLM",
    "MvpForCausalLM",
    "PegasusForCausalLM",
    "PLBartForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
)
"""Causal language models whose stock loss takes labels that are shifted already."""

_OTHER_LOSSES: dict[str, str | None] = {
    "GPT2DoubleHeadsModel": "double-heads",
    "BertForPreTraining": "pre-training",
    **dict.fromkeys(_UNSHIFTED, "masked-lm"),
    "ProphetNetForCausalLM": None,  # predicts several tokens at each position
    "ProphetNetForConditionalGeneration": None,
}
"""Classes whose task the auto classes do not tell; None: their loss is one of their own."""


@functools.cache
def _tasks_of_classes() -> dict[str, str | None]:
    """Name of a stock class -> its task."""
    known: dict[str, str | None] = {}
    for task, mapping in _MAPPINGS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            known.update(
                dict.fromkeys(names if isinstance(names, tuple | list) else (names,), task)
            )
    return {**known, **_OTHER_LOSSES}


def _task_of(model: Any) -> str:
    """The task of a stock class, an instance or a subclass of it."""
    cls = model if isinstance(model, type) else type(unwrapped(model))
    known = _tasks_of_classes()
    for base in cls.__mro__:
        task = known.get(base.__name__)
        if task == "seq2seq-lm":
            # Speech models that put their features among a decoder's tokens stand in this list too.
            config = getattr(unwrapped(model), "config", None) or getattr(cls, "config_class", None)
            return task if getattr(config, "is_encoder_decoder", True) else "causal-lm"
        if task is not None:
            return task
        if base.__name__ in known:
            break
    raise UnsupportedModelError(
        f"ModelLoss does not know the head of {cls.__name__}, wanted a class of one of transformers' auto "
        f"classes. Name its task, dpzoo.ModelLoss('causal-lm') say, one of: {', '.join(ModelLoss.TASKS)}; "
        f"or use a criterion on the logits."
    )
