"""Planted bugs: small models and losses, each wrong in one way that raises nothing, or too late.

`PLANTED` lists them with the check that must catch each, the severity, and a word of the message.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.auditing.planted_models import (
    HIDDEN,
    ROWS,
    SEQ,
    VOCAB,
    AveragedLinear,
    Branch,
    Buffered,
    Cached,
    Capacity,
    Codes,
    Container,
    Detached,
    Experts,
    Flattening,
    FunctionalTie,
    InBatchMean,
    InLargeBatches,
    Keyword,
    LastPosition,
    ModuleTie,
    Normalised,
    OutsideUse,
    Padded,
    Positions,
    Ranked,
    Remembering,
    RepeatingBag,
    Reshaping,
    RunningMean,
    Shuffling,
    Tagger,
    Tokens,
    WrongAxis,
    floats,
    ids,
    in_batch_negatives,
    items_in_batch,
    labels,
    masked_mean,
    row_mean,
    summed,
    target_mean,
    token_mean,
    with_balance_loss,
)


@dataclass
class Planted:
    """A bug.

    Args:
        name: what is wrong.
        check: the check that must name it.
        severity: of the finding.
        says: a part of the finding's message.
        build: makes the model and the batch.
        names: a parameter or module that the finding must name.
        mode: the mode that it is found in.
        options: arguments of audit.
    """

    name: str
    check: str
    severity: str
    says: str
    build: Callable[[], tuple[nn.Module, Any]]
    names: str | None = None
    mode: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _first_positive() -> torch.Tensor:
    x = floats(ROWS, HIDDEN)
    x[:, 0] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return x


def token_batch() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(ROWS, SEQ), "labels": labels(ROWS, SEQ)}


def _padded_embeds() -> dict[str, torch.Tensor]:
    mask = torch.ones(ROWS, SEQ, dtype=torch.long)
    for i in range(1, ROWS):
        mask[i, -i:] = 0
    return {
        "inputs_embeds": floats(ROWS, SEQ, HIDDEN),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 2, 1]),
    }


def _targets() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(ROWS, SEQ), "y": torch.randint(0, VOCAB, (ROWS, SEQ))}


def _masked() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(ROWS, SEQ), "attention_mask": torch.ones(ROWS, SEQ)}


def _norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def _conv_norm_net() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(20, 3))


def _averaged() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 5), nn.Tanh(), AveragedLinear(5, 3))


def _x() -> tuple[torch.Tensor, ...]:
    return (floats(ROWS, HIDDEN),)


PLANTED = [
    Planted(
        "a wrong batch axis, as many rows as tokens",
        "privacy_unit",
        "privacy",
        "does not depend on the number of rows",
        lambda: (WrongAxis(), (floats(4, 4, HIDDEN),)),
        names="inner",
    ),
    Planted(
        "choices flattened into the batch",
        "privacy_unit",
        "privacy",
        "a multiple of the number of rows",
        lambda: (Flattening(), (floats(ROWS, 3, HIDDEN),)),
        names="body.weight",
    ),
    Planted(
        "choices flattened into the batch, seen from the sum",
        "sensitivity",
        "privacy",
        "differ by more than the clipping norm",
        lambda: (Flattening(), (floats(ROWS, 3, HIDDEN),)),
        mode="hooks",
    ),
    Planted(
        "positions of shape (1, seq)",
        "coverage",
        "crash",
        "one input for the whole batch",
        lambda: (Positions(), (ids(ROWS, SEQ),)),
        names="positions.weight",
    ),
    Planted(
        "batch norm",
        "isolation",
        "privacy",
        "a row cannot run alone",
        lambda: (_norm_net(), _x()),
    ),
    Planted(
        "batch norm over positions",
        "isolation",
        "privacy",
        "depends on other rows",
        lambda: (_conv_norm_net(), (floats(ROWS, 3, SEQ),)),
        names="0.weight",
    ),
    Planted(
        "batch norm, structure",
        "coverage",
        "crash",
        "holds a buffer beside trainable parameters",
        lambda: (_norm_net(), _x()),
        names="1",
    ),
    Planted(
        "a buffer beside parameters",
        "coverage",
        "crash",
        "holds a buffer",
        lambda: (nn.Sequential(Buffered()), _x()),
        names="0",
    ),
    *(
        Planted(
            name,
            "statelessness",
            "privacy",
            says,
            lambda layer=layer: (
                nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer(), nn.Linear(HIDDEN, 3)),
                _x(),
            ),
        )
        for name, says, layer in (
            ("a running mean in a buffer", "changed in a training forward pass", RunningMean),
            (
                "a frozen parameter that follows the data",
                "changed in a training forward pass",
                Codes,
            ),
            (
                "statistics of a norm without parameters",
                "is in training mode",
                lambda: nn.BatchNorm1d(HIDDEN, affine=False),
            ),
            (
                "a table whose rows are renormed",
                "has max_norm",
                lambda: nn.Sequential(Tokens(), nn.Embedding(VOCAB, HIDDEN, max_norm=1.0)),
            ),
            (
                "a running variance in a norm of instances",
                "takes statistics over the rows",
                lambda: nn.Sequential(
                    nn.Unflatten(1, (2, 4)),
                    nn.InstanceNorm1d(2, track_running_stats=True),
                    nn.Flatten(),
                ),
            ),
            (
                "statistics of a frozen norm",
                "is in training mode",
                lambda: nn.BatchNorm1d(HIDDEN).requires_grad_(False),
            ),
        )
    ),
    Planted(
        "the batch's mean subtracted",
        "isolation",
        "privacy",
        "depends on other rows",
        lambda: (InBatchMean(), _x()),
        names="inner.weight",
    ),
    Planted(
        "in-batch negatives",
        "isolation",
        "privacy",
        "depends on other rows",
        lambda: (nn.Sequential(nn.Linear(HIDDEN, 5)), _x()),
        options={"loss": in_batch_negatives},
    ),
    Planted(
        "a mixture's balance loss",
        "isolation",
        "privacy",
        "other rows",
        lambda: (Experts(), _x()),
        names="router.weight",
        options={"loss": with_balance_loss},
    ),
    Planted(
        "a token-mean loss",
        "isolation",
        "privacy",
        "not the mean of the rows' losses",
        lambda: (Tagger(), token_batch()),
        options={"loss": token_mean},
    ),
    Planted(
        "a token-mean loss, seen from the sum",
        "sensitivity",
        "privacy",
        "one long row among short ones",
        lambda: (Tagger(), token_batch()),
        mode="hooks",
        options={"loss": token_mean},
    ),
    Planted(
        "a token-mean loss, seen from physical batches",
        "microbatching",
        "privacy",
        "physical batches of 1 give another sum",
        lambda: (Tagger(), token_batch()),
        mode="hooks",
        options={"loss": token_mean},
    ),
    Planted(
        "a loss over num_items_in_batch",
        "isolation",
        "privacy",
        "depends on other rows",
        lambda: (Tagger(), token_batch()),
        options={"loss": items_in_batch},
    ),
    Planted(
        "a token-mean loss, its labels under another name",
        "isolation",
        "privacy",
        "other rows have fewer labels",
        lambda: (Tagger(), _targets()),
        options={"loss": target_mean},
    ),
    Planted(
        "a token-mean loss over a mask",
        "isolation",
        "privacy",
        "other rows are shorter",
        lambda: (Tagger(), _masked()),
        options={"loss": masked_mean},
    ),
    Planted(
        "a sum over rows for a mean",
        "isolation",
        "privacy",
        "not the mean of the rows' losses",
        lambda: (nn.Sequential(nn.Linear(HIDDEN, 5)), _x()),
        options={"loss": summed},
    ),
    Planted(
        "experts with a capacity",
        "isolation",
        "privacy",
        "there are 16 other rows",
        lambda: (Capacity(), _x()),
    ),
    Planted(
        "experts with a capacity, in the batch as given",
        "neighbours",
        "privacy",
        "the other rows' gradients change",
        lambda: (Capacity(), (floats(40, HIDDEN),)),
    ),
    Planted(
        "a head that reads the last position",
        "neighbours",
        "privacy",
        "are padded to the longest of them",
        lambda: (LastPosition(), _padded_embeds()),
    ),
    Planted(
        "rows that are mixed at random",
        "isolation",
        "privacy",
        "other rows",
        lambda: (Shuffling(), _x()),
    ),
    Planted(
        "a mean that is kept of the batch before",
        "isolation",
        "privacy",
        "other rows",
        lambda: (Remembering(), _x()),
    ),
    Planted(
        "ranks within the batch",
        "isolation",
        "privacy",
        "other rows",
        lambda: (Ranked(), _x()),
    ),
    Planted(
        "rows that meet in large batches alone",
        "neighbours",
        "privacy",
        "the other rows' gradients change",
        lambda: (InLargeBatches(), (floats(40, HIDDEN),)),
    ),
    Planted(
        "a functional tie in hooks mode: the head's gradient is lost",
        "coverage",
        "utility",
        "do not add up to autograd's",
        lambda: (FunctionalTie(), token_batch()),
        names="tokens.weight",
        mode="hooks",
        options={"loss": row_mean},
    ),
    Planted(
        "a functional tie in ghost mode: the head's norm is missing",
        "exactness",
        "privacy",
        "smaller than the rows' true norms",
        lambda: (FunctionalTie(), token_batch()),
        names="tokens.weight",
        mode="ghost",
        options={"loss": row_mean},
    ),
    Planted(
        "a functional tie in ghost mode, seen from the sum",
        "sensitivity",
        "privacy",
        "differ by more than the clipping norm",
        lambda: (FunctionalTie(), token_batch()),
        mode="ghost",
        options={"loss": row_mean},
    ),
    Planted(
        "a functional tie in ghost mode, seen from a step",
        "clipped_sum",
        "privacy",
        "not that of the rows' true gradients",
        lambda: (FunctionalTie(), token_batch()),
        mode="ghost",
        options={"loss": row_mean},
    ),
    Planted(
        "a module tie in ghost mode",
        "coverage",
        "crash",
        "Parameter tying is not supported",
        lambda: (ModuleTie(), token_batch()),
        names="head.weight",
        mode="ghost",
        options={"loss": row_mean},
    ),
    Planted(
        "a weight used from outside its layer",
        "coverage",
        "privacy",
        "used past the module that holds them",
        lambda: (OutsideUse(), _x()),
        names="inner.weight",
        mode="hooks",
    ),
    Planted(
        "a parameter held by a container",
        "coverage",
        "note",
        "whole subtree to functorch",
        lambda: (Container(), _x()),
        names="scale",
    ),
    Planted(
        "an activation passed by keyword",
        "coverage",
        "crash",
        "called with keyword arguments only",
        lambda: (Keyword(), _x()),
        names="inner",
    ),
    Planted(
        "a padding row that is trained",
        "coverage",
        "utility",
        "the padding row of an embedding",
        lambda: (Padded(), (torch.cat([ids(ROWS, SEQ), torch.zeros(ROWS, 1).long()], 1),)),
        names="tokens.weight",
        mode="hooks",
    ),
    Planted(
        "a grad sampler whose sum is right and rows are not",
        "exactness",
        "privacy",
        "the sum over rows is right and the rows are not",
        lambda: (_averaged(), _x()),
        names="2.weight",
        mode="hooks",
    ),
    Planted(
        "Opacus' own EmbeddingBag, with repeated words",
        "exactness",
        "privacy",
        "smaller than the rows' true norms",
        lambda: (RepeatingBag(), (torch.tensor([2, 2, 2, 3, 5, 6]).repeat(ROWS, 1),)),
        names="bag.weight",
        mode="ghost",
    ),
    Planted(
        "a branch that some batches skip",
        "stale_state",
        "privacy",
        "as the batch before left them",
        lambda: (Branch(), (_first_positive(),)),
        names="other.weight",
        mode="ghost",
    ),
    Planted(
        "a trainable layer that is detached",
        "coverage",
        "crash",
        "get no gradient from this batch",
        lambda: (Detached(), _x()),
        names="inner.weight",
    ),
    Planted(
        "a row whose gradient is NaN",
        "edge_cases",
        "privacy",
        "not finite if its values are 0",
        lambda: (Normalised(), _x()),
        names="inner.weight",
    ),
    Planted(
        "an empty batch that raises",
        "edge_cases",
        "crash",
        "raises on an empty batch",
        lambda: (Reshaping(), (floats(ROWS, SEQ, HIDDEN),)),
        mode="hooks",
    ),
    Planted(
        "a loss computed from a copy of the weights",
        "training_effect",
        "utility",
        "the loss did not follow",
        lambda: (Cached(), _x()),
        mode="hooks",
    ),
]
