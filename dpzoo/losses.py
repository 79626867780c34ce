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

from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from dpzoo.errors import InputError, UnsupportedConfigError

IGNORE_INDEX = -100
"""A label with this value takes no part in the loss, as everywhere in transformers."""

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
        InputError: the shapes do not belong together.

    Guarantees:
        Entry i is a function of row i alone.
    """
    if labels.shape != logits.shape[:-1]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, wanted {tuple(logits.shape[:-1])}, one label "
            f"for each position of the logits. Check the collator's padding of labels."
        )
    batch, classes = logits.shape[0], logits.shape[-1]
    labels = labels.to(logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    per_token = F.cross_entropy(
        wide.reshape(labels.numel(), classes),
        labels.reshape(labels.numel()),
        reduction="none",
        ignore_index=ignore_index,
    )
    per_row = per_token.reshape(batch, labels[0].numel() if batch else 0).sum(1)
    counted = (labels != ignore_index).reshape(batch, -1 if batch else 0).sum(1)
    return per_row / counted.clamp(min=1)


def causal_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`token_losses` of next-token prediction: position t of the logits answers for label t + 1.

    Args:
        logits: (batch, ..., seq, vocab).
        labels: (batch, ..., seq), not shifted; usually the input ids, ``-100`` where ignored.

    Returns:
        Shape (batch,).
    """
    if labels.shape != logits.shape[:-1]:
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
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
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
    num_labels = logits.shape[-1]
    labels = labels.to(logits.device)
    if config.problem_type is None:
        if num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"

    if config.problem_type == "single_label_classification":
        return token_losses(logits, labels.reshape(logits.shape[0]))
    if config.problem_type not in ("regression", "multi_label_classification"):
        raise UnsupportedConfigError(
            f"config.problem_type is {config.problem_type!r}, wanted one of 'regression', "
            f"'single_label_classification', 'multi_label_classification', or None to have it "
            f"inferred from the labels."
        )
    if num_labels == 1 and labels.numel() == logits.numel():
        labels = labels.reshape(logits.shape)
    if labels.shape != logits.shape:
        raise InputError(
            f"labels of a {config.problem_type} model have shape {tuple(labels.shape)}, wanted "
            f"{tuple(logits.shape)}: one value for each output of each row."
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if config.problem_type == "regression":
        return F.mse_loss(wide, labels.to(wide.dtype), reduction="none").mean(1)
    targets = labels.to(wide.dtype)
    return F.binary_cross_entropy_with_logits(wide, targets, reduction="none").mean(1)


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


class ModelLoss:
    """The criterion that takes a model's outputs: one line for every head and every Opacus mode.

        criterion = dpzoo.ModelLoss()
        model, optimizer, criterion, loader = PrivacyEngine().make_private(
            ..., criterion=criterion, grad_sample_mode="ghost"
        )
        loss = criterion(model(**batch))
        loss.backward()

    Ghost mode needs the loss of every row, before any reduction; it asks a criterion for it by
    setting ``reduction = "none"``. The models have computed it already, from the labels that they
    were given. Without Opacus, and in its other modes, the criterion gives the reduced loss.

    Args:
        reduction: "mean" over the rows, "sum" over them, or "none" for (batch,) losses. It has to
            equal the ``loss_reduction`` that ``make_private`` is given.

    Raises:
        InputError: an unknown reduction.

    Guarantees:
        With "none", entry i is a function of row i alone.
    """

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction
        self._refuse_unknown()

    def __call__(self, outputs: Any) -> torch.Tensor:
        """The loss of a model's outputs; of double heads, the sum of their two losses.

        Args:
            outputs: what a dpzoo model returned for a batch with labels.

        Raises:
            InputError: the outputs carry no per-row loss.
        """
        self._refuse_unknown()
        parts = [
            losses
            for name in ("loss_per_sample", "mc_loss_per_sample")
            if (losses := getattr(outputs, name, None)) is not None
        ]
        if not parts:
            raise InputError(
                f"ModelLoss got {type(outputs).__name__} without loss_per_sample, wanted the outputs "
                f"of a dpzoo model that was given labels (and return_dict=True). Pass labels=... to "
                f"the model, or use a criterion on the logits."
            )
        losses = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.reduction == "none":
            return losses
        return losses.sum() / (max(len(losses), 1) if self.reduction == "mean" else 1)

    def _refuse_unknown(self) -> None:
        if self.reduction not in ("mean", "sum", "none"):
            raise InputError(
                f"ModelLoss got reduction={self.reduction!r}, wanted 'mean', 'sum' or 'none'."
            )
