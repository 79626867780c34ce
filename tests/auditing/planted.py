"""Planted bugs: small models and losses, each wrong in one way that raises nothing, or too late.

`PLANTED` lists them with the check that must catch each, the severity, and a word of the message.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from torch import nn
from torch.nn import functional as F

ROWS, SEQ, VOCAB, HIDDEN = 4, 6, 11, 8


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


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape)


def labels(*shape: int) -> torch.Tensor:
    """Token labels; the rows have different numbers of them."""
    made = torch.randint(0, VOCAB, shape)
    for i, row in enumerate(made):
        row[: i + 1] = -100
    return made


# --- the batch dimension ----------------------------------------------------------------------------


class WrongAxis(nn.Module):
    """(rows, seq, d) handed to its layers as (seq, rows, d), and back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1)
        return self.head(hidden.mean(1))


class Flattening(nn.Module):
    """(rows, choices, d) becomes (rows * choices, d): the unit becomes the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(HIDDEN, 5), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.score(torch.tanh(self.body(flat))).view(x.shape[0], x.shape[1])


class Positions(nn.Module):
    """Position ids of shape (1, seq), as in stock transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(SEQ, HIDDEN)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        where = torch.arange(x.shape[1], device=x.device)[None]
        return self.head(torch.tanh(self.tokens(x) + self.positions(where)).mean(1))


# --- rows that meet ---------------------------------------------------------------------------------


class InBatchMean(nn.Module):
    """Activations centred over the batch; opacus' ModuleValidator finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x)
        return self.head(torch.tanh(hidden - hidden.mean(0)))


class Tagger(nn.Module):
    """Tokens to logits (rows, seq, vocab)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return self.head(torch.tanh(self.tokens(input_ids)))


def per_token(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Losses of tokens, (rows, seq); 0 where ignored."""
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")


def token_mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As in transformers: over all labelled tokens of the batch."""
    counted = (batch["labels"] != -100).sum()
    return per_token(model, batch).sum() / counted.clamp(min=1)


def items_in_batch(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss for each row, divided by what the whole batch has: num_items_in_batch."""
    counted = (batch["labels"] != -100).sum() / len(batch["labels"])
    return per_token(model, batch).sum(1) / counted.clamp(min=1)


def row_mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The right one: each row over its own tokens."""
    counted = (batch["labels"] != -100).sum(1)
    return per_token(model, batch).sum(1) / counted.clamp(min=1)


def target_mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A token mean whose labels have another name, and no -100 in this batch."""
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.transpose(1, 2), batch["y"])


def masked_mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A mean over the tokens that a mask counts, those of all rows."""
    logits, mask = model(batch["input_ids"]), batch["attention_mask"]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def summed(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A sum over the rows, where a mean is expected."""
    return model(batch[0]).square().sum(1).sum()


class Capacity(nn.Module):
    """Experts that take so many rows of a batch: what comes later is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 3)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        chosen = F.one_hot(shares.argmax(-1), 3)
        room = 4 + len(x) // 4
        taken = chosen * (chosen.cumsum(0) <= room)  # a row's place in its expert's queue
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head(x + (torch.tanh(outputs) * (taken * shares)[:, None]).sum(-1))


class LastPosition(nn.Module):
    """Classifies from the last position, which is padding in all rows but the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, labels: Any
    ) -> Any:
        hidden = torch.tanh(self.body(inputs_embeds)).cumsum(1)
        losses = F.cross_entropy(self.head(hidden[:, -1]), labels, reduction="none")
        return {"loss_per_sample": losses}


class Remembering(nn.Module):
    """Adds the mean of the batch before, which no buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Linear(HIDDEN, 3), [torch.zeros(HIDDEN)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.head(x + self.last[0].to(x))
        if len(x):
            self.last[0] = x.mean(0).detach()
        return outputs


class Ranked(nn.Module):
    """Looks up a row's rank in the batch: integers, through which no gradient flows."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks, self.head = nn.Embedding(64, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.ranks(x[:, 0].argsort().argsort())) + x)


class InLargeBatches(nn.Module):
    """Centred over the batch, in batches of more than 20 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x - x.mean(0) if len(x) > 20 else x)


class Shuffling(nn.Module):
    """Mixes each row with another one, drawn at random: mixup in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(0.7 * x + 0.3 * x[torch.randperm(len(x))])


def in_batch_negatives(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Every other row is a negative example of this one."""
    hidden = F.normalize(model(batch[0]), dim=1, eps=1e-6)
    return F.cross_entropy(hidden @ hidden.T * 3, torch.arange(len(hidden)), reduction="none")


class Experts(nn.Module):
    """A mixture of experts; ``balance`` holds the share of the batch that each expert got."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 3)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        self.balance = shares
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head((outputs * shares[:, None]).sum(-1))


def with_balance_loss(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    module = getattr(model, "_module", model)
    losses = model(batch[0]).square().mean(1)
    return losses + 0.5 * module.balance.mean(0).square().sum()


# --- weights used past their module -----------------------------------------------------------------


class FunctionalTie(nn.Module):
    """The head is F.linear with the token table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return F.linear(torch.tanh(self.inner(self.tokens(input_ids))), self.tokens.weight)


class ModuleTie(FunctionalTie):
    """The head is a module whose weight is the token table's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.tokens(input_ids))))


class OutsideUse(nn.Module):
    """A layer whose forward never runs: its weight is used from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(F.linear(x, self.inner.weight, self.inner.bias)))


class Container(nn.Module):
    """Holds a parameter beside submodules that have theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)) * self.scale)


class Buffered(nn.Linear):
    """A buffer beside its parameters."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, 3)
        self.register_buffer("seen", torch.zeros(3))


class RunningMean(nn.Module):
    """A running mean of the batch, in a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x):
            with torch.no_grad():
                self.mean.lerp_(x.reshape(-1, HIDDEN).mean(0), 0.1)
        return x


class Codes(nn.Module):
    """A frozen parameter that follows the data."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.codes.add_(x.reshape(-1, HIDDEN).sum(0))
        return x


class Tokens(nn.Module):
    """Values to ids."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.detach().abs() * 4).long().clamp(max=VOCAB - 1)


class Keyword(nn.Module):
    """Calls a layer with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(input=x)))


class Padded(nn.Module):
    """A table with a padding row, whose outputs at padding are not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN, padding_idx=0)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.tokens(x)).mean(1))


class RepeatingBag(nn.Module):
    """A bag with a word twice: Opacus 1.6.0's sampler of EmbeddingBag counts it once (+= by index)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCAB, 7, mode="sum"), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(len(x), device=x.device) * x.shape[1]
        return self.head(torch.tanh(self.bag(x.reshape(-1), offsets)))


class AveragedLinear(nn.Linear):
    """A layer whose grad sampler (below) gives every row the rows' mean: sums are right."""


@register_grad_sampler(AveragedLinear)
def averaged(
    layer: nn.Linear, activations: Any, backprops: torch.Tensor
) -> dict[Any, torch.Tensor]:
    weight = torch.einsum("ni,nj->nij", backprops, activations[0])
    bias = backprops
    return {
        layer.weight: weight.mean(0).expand_as(weight).clone(),
        layer.bias: bias.mean(0).expand_as(bias).clone(),
    }


# --- what only some batches do ----------------------------------------------------------------------


class Branch(nn.Module):
    """A second branch runs for batches with a positive first entry only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(HIDDEN, 5), nn.Linear(HIDDEN, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x)
        if len(x) == 0 or bool(x[0, 0] > 0):
            hidden = hidden + self.other(x)
        return self.head(torch.tanh(hidden))


class Detached(nn.Module):
    """A trainable layer whose output is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x).detach())


class Normalised(nn.Module):
    """x / |x| without an eps: the gradient of a row of zeros is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x)
        return self.head(hidden / hidden.norm(dim=1, keepdim=True))


class Reshaping(nn.Module):
    """reshape(rows, -1) raises for no rows, as flatten(1) does not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SEQ * HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.reshape(len(x), -1))


class Cached(nn.Module):
    """Its loss comes from a copy of the weights; the weights get a gradient and do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(HIDDEN, 5), nn.Linear(5, 3)
        self.kept = [self.inner.weight.detach().clone()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = F.linear(x, self.kept[0].to(x.dtype))
        live = self.inner(x)  # straight through: the value of one, the gradient of the other
        hidden = merged + live - live.detach()
        with torch.no_grad():
            frozen = F.linear(torch.tanh(hidden), torch.ones(3, 5, dtype=x.dtype))
        moving = self.head(torch.tanh(hidden))
        return frozen + moving - moving.detach()


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
