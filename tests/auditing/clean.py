"""Clean models that are not dpzoo's: none of them may raise a false alarm.

Some raise on an empty batch, through no fault of the audit; `NO_EMPTY_BATCH` says why.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn import functional as F

from tests.auditing.planted_models import Tagger, ids, labels, row_mean


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_one = nn.GroupNorm(2, channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_two = nn.GroupNorm(2, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm_one(self.one(x)))
        return F.relu(x + self.norm_two(self.two(hidden)))


class LSTM(nn.Module):
    def __init__(self, kind: Any = DPLSTM) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 7)
        self.lstm = kind(7, 9, batch_first=True)
        self.head = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.tokens(x))[0][:, -1])


class Block(nn.Module):
    """A transformer block, (seq, rows, d) inside its attention as Opacus' layer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.attention = DPMultiheadAttention(8, 2, batch_first=True)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x)
        attended = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = self.norm(hidden + attended)
        return self.head((hidden + F.gelu(self.mlp(hidden))).mean(1))


class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 7, mode="sum"), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(len(x), device=x.device) * x.shape[1]
        return self.head(torch.tanh(self.bag(x.reshape(-1), offsets)))


class Siamese(nn.Module):
    """One tower, two inputs: its parameters are used twice, which hooks mode adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.tower(a) - self.tower(b)).square()


class CharCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 7)
        self.convs = nn.ModuleList(nn.Conv1d(7, 6, width, padding=1) for width in (2, 3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(hidden)).amax(2) for conv in self.convs], 1))


class FixedEncoder(nn.Module):
    """nn.TransformerEncoderLayer with its attention replaced by Opacus' ModuleValidator."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.layer, self.head = ModuleValidator.fix(layer), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


class Encoder(nn.Module):
    """A variational auto-encoder: noise in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(7, 8), nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, log_var = self.encode(x).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * torch.tanh(log_var).exp())


class Skipping(nn.Module):
    """Stochastic depth, of each row or of the layer by Python's generator; or dropout by another name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 5)
        self.how, self.rate = how, 0.4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = torch.tanh(self.two(torch.tanh(self.one(x))))
        if self.how == "rows":
            kept = torch.rand(len(x), 1, dtype=x.dtype, device=x.device) + 1 - self.rate
            branch = branch * kept.floor() / (1 - self.rate)
        elif self.how == "layer":
            branch = branch if random.random() > self.rate else branch * 0.5
        else:
            branch = F.dropout(branch, self.rate, self.training)
        return self.head(x + branch)


class Evaluated(nn.Module):
    """A norm that is kept in eval mode while the model trains, its affine parameters frozen or not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.norm.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def distinct_ids() -> torch.Tensor:
    """No word twice in a row: Opacus' sampler of EmbeddingBag drops repeated ones (see planted)."""
    return torch.stack([torch.randperm(11)[:6] for _ in range(4)])


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=20,
        num_labels=3,
        pad_token_id=1,
    )
    return transformers.RobertaForSequenceClassification(config)


def _roberta_batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 7, dtype=torch.long)
    return {
        "input_ids": torch.randint(4, 31, (4, 7)),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 2, 1]),
    }


def regression(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (model(batch[0]).squeeze(1) - batch[1]).square()


def mean_regression(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]).squeeze(1), batch[1])


def _mlp(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), *more, nn.Linear(9, 5))


X = (4, 7)
CLEAN: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "MLP": lambda: (_mlp(), (torch.randn(X),), {}),
    "MLP with dropout": lambda: (_mlp(nn.Dropout(0.5)), (torch.randn(X),), {}),
    "RMSNorm MLP": lambda: (_mlp(nn.RMSNorm(9)), (torch.randn(X),), {}),
    "LayerNorm MLP": lambda: (_mlp(nn.LayerNorm(9)), (torch.randn(X),), {}),
    "regression": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 1)),
        (torch.randn(X), torch.randn(4)),
        {"loss": regression},
    ),
    "regression, mean over the batch": lambda: (
        nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 1)),
        (torch.randn(X), torch.randn(4)),
        {"loss": mean_regression},
    ),
    "CNN with GroupNorm": lambda: (CNN(), (torch.randn(4, 3, 6, 6),), {}),
    "residual net with GroupNorm": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            Residual(6),
            Residual(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ),
        (torch.randn(4, 3, 7, 7),),
        {},
    ),
    "variational auto-encoder": lambda: (Encoder(), (torch.randn(X),), {}),
    "stochastic depth of rows": lambda: (Skipping("rows"), (torch.randn(X),), {}),
    "stochastic depth of a layer": lambda: (Skipping("layer"), (torch.randn(X),), {}),
    "dropout by another name": lambda: (Skipping("units"), (torch.randn(X),), {}),
    "a norm kept in eval mode": lambda: (Evaluated(), (torch.randn(4, 3, 6, 6),), {}),
    "DPLSTM": lambda: (LSTM(), (ids(4, 6),), {"modes": ("hooks",)}),
    "DPGRU": lambda: (LSTM(DPGRU), (ids(4, 6),), {"modes": ("hooks",)}),
    "block with DPMultiheadAttention": lambda: (Block(), (ids(4, 6),), {}),
    "bag of words": lambda: (BagOfWords(), (distinct_ids(),), {"modes": ("hooks", "ghost")}),
    "Siamese": lambda: (
        Siamese(),
        (torch.randn(X), torch.randn(X)),
        {"modes": ("hooks",)},
    ),
    "char CNN": lambda: (CharCNN(), (ids(4, 6),), {}),
    "tagger, row-mean loss": lambda: (
        Tagger(),
        {"input_ids": ids(4, 6), "labels": labels(4, 6)},
        {"loss": row_mean},
    ),
    "fixed TransformerEncoderLayer": lambda: (FixedEncoder(), (torch.randn(4, 6, 8),), {}),
    "stock RobertaForSequenceClassification": lambda: (_roberta(), _roberta_batch(), {}),
}

NO_EMPTY_BATCH = {
    "char CNN": ("ghost", "Opacus' norm sampler of nn.Embedding reshapes (0, -1)"),
    "tagger, row-mean loss": ("ghost", "Opacus' norm sampler of nn.Embedding reshapes (0, -1)"),
    "block with DPMultiheadAttention": ("hooks, ghost", "Opacus' attention reshapes (-1, 0, d)"),
    "fixed TransformerEncoderLayer": ("hooks, ghost", "Opacus' attention reshapes (-1, 0, d)"),
    "stock RobertaForSequenceClassification": (
        "hooks, ghost",
        "transformers reshapes (0, t, -1, d)",
    ),
}
"""Name -> the modes that raise on an empty batch, and what raises."""
