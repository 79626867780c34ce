"""Models and losses with one bug each; `tests.auditing.planted` says what an audit finds in them."""

from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from torch import nn
from torch.nn import functional as F

ROWS, SEQ, VOCAB, HIDDEN = 4, 6, 11, 8


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
