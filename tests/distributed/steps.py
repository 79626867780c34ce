"""One of several processes: a private step in bk of each case, compared with the step of one process.

    torchrun --nproc-per-node N -m tests.distributed.steps FOLDER

reads FOLDER/cases.pt, a list of `Case`, and writes FOLDER/RANK.pt, case id -> `Result`.
"""

import copy
import datetime
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import dpzoo
from dpzoo import families
from dpzoo.clipping import engine
from tests.modes import OutputLoss
from tests.secrets_that_repeat import repeat_secrets
from tests.support import NAMES, batch_for, randomize, stock_model

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A private step of one model.

    Args:
        name: a class of dpzoo, or an architecture of `dpzoo.families`; with "+tied", its head is tied.
        way: "ddp" (torch's), "unused" (the same, looking for unused parameters), "dpddp" (Opacus'), "fsdp"
            (the model as one group), "layers" (each layer, and a tied head with its table, by itself).
        shares: the rows of the batch that each rank has.
        noise: the noise multiplier.
        parts: each rank's rows come in so many parts.
        uneven: rank 1 has one part more.
        frozen: parameters whose names contain this are frozen.
        clipping: as of make_private; "per_layer" with a norm for each parameter.
        reduction: of the loss.
        mixed: under FSDP2, the layers compute in bfloat16.
        checkpointing: activations are computed again in the backward pass.
    """

    name: str
    way: str
    shares: Sequence[Sequence[int]] = ((0, 1, 2), (3,))
    noise: float = 0.0
    parts: int = 1
    uneven: bool = False
    frozen: str = "-"
    clipping: str = "flat"
    reduction: str = "mean"
    mixed: bool = False
    checkpointing: bool = False

    @property
    def id(self) -> str:
        """A name that says what is not the default."""
        shares = "_".join("".join(map(str, s)) or "none" for s in self.shares)
        default = vars(Case("", ""))
        more = {k: v for k, v in vars(self).items() if v != default[k] and k != "shares"}
        said = [f"{k}={v}" for k, v in more.items() if k not in ("name", "way")]
        return "-".join([self.name, self.way, *said, shares])


@dataclass
class Result:
    """What one rank saw.

    Args:
        off: the largest difference of the gradient from one process', relative to the largest entry.
        noise: parameter -> gradient less one process' without noise, in units of sigma C / rows.
        local: numbers of the parameters and of the sums that this rank had, and of the whole model.
        error: what was raised, as text.
    """

    off: float = -1.0
    noise: Batch = field(default_factory=dict)
    local: tuple[int, int, int] = (0, 0, 0)
    error: str = ""


def prepared(case: Case) -> tuple[Any, Batch, Any]:
    """The model, the batch and the criterion: the same in every process."""
    torch.manual_seed(0)
    if case.name in NAMES:
        stock, batch = stock_model(case.name), batch_for(case.name)
        model: Any = dpzoo.convert(stock).train()
        criterion: Any = OutputLoss(case.name, batch, case.reduction)
    elif case.name == "Scaled":
        model, batch = (
            Scaled().double(),
            {"x": torch.randn(4, 5, 6).double(), "labels_": torch.zeros(4)},
        )
        criterion = RowLosses(None, batch["labels_"], case.reduction)
    else:
        name, _, tied = case.name.partition("+")
        model, _ = families.build(name)
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        batch, labels = families.tiny.batch(model)
        criterion = RowLosses(model, labels, case.reduction)
        batch = {**batch, "labels_": labels}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.frozen not in name)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, batch, criterion


class Scale(nn.Module):
    """A layer whose weight is computed from its parameters, and from one of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 1))

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale.exp() * gain).tanh()


class Scaled(nn.Module):
    """Layers of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(), Scale()])
        self.gain = nn.Parameter(torch.randn(6))

    def get_input_embeddings(self) -> nn.Module:
        """None that is tied."""
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = self.gain * self.gain
        for layer in self.layers:
            x = layer(x, gain)
        return x


class RowLosses:
    """The losses of an architecture's rows."""

    def __init__(self, model: Any, labels: torch.Tensor, reduction: str) -> None:
        self.labels, self.reduction = labels, reduction
        self.of: Any = lambda outputs, _: outputs.square().flatten(1).sum(1)
        if model is not None:
            self.of = dpzoo.ModelLoss(model, reduction="none")
        self.batch: Batch = {}

    def __call__(self, outputs: Any) -> torch.Tensor:
        losses = self.of(outputs, self.batch["labels_"])
        if self.reduction == "none":
            return losses
        return losses.sum() / (max(len(losses), 1) if self.reduction == "mean" else 1)


def distribute(case: Case, model: Any) -> Any:
    """Wrap a model as the case says."""
    if case.way in ("ddp", "unused", "dpddp"):
        if distributed.get_rank():
            randomize(model)  # the wrapper has to bring rank 0's values
        if case.way == "dpddp":
            return DifferentiallyPrivateDistributedDataParallel(model)
        return DistributedDataParallel(model, find_unused_parameters=case.way == "unused")
    options = {}
    if case.mixed:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if case.way == "layers":
        for module in reversed(list(model.modules())):
            if isinstance(module, nn.ModuleList):
                for child in module:
                    fully_shard(child, **options)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        table = model.get_input_embeddings()
        if head is not None and head.weight is table.weight and not model.config.is_encoder_decoder:
            fully_shard([table, head], **options)
    return fully_shard(model, **options)


def full(tensor: Any) -> torch.Tensor:
    """The whole of a tensor: a collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(case: Case, model: Any, wrapped: Any, batch: Batch, criterion: Any, mine: Any) -> Any:
    """A private step on some rows; the optimizer, and how many numbers its sums had."""
    rows = len(next(iter(batch.values())))
    count = sum(p.requires_grad for p in model.parameters())
    private, optimizer, private_criterion, _ = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=wrapped,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        criterion=criterion,
        data_loader=DataLoader(list(range(rows)), batch_size=rows),
        noise_multiplier=case.noise,
        max_grad_norm=[0.5 + 0.1 * i for i in range(count)]
        if case.clipping == "per_layer"
        else 0.5,
        clipping=case.clipping,
        loss_reduction=case.reduction,
        poisson_sampling=False,
        grad_sample_mode="bk",
    )
    parts = case.parts + (case.uneven and distributed.get_rank() == 1)
    size = -(-len(mine) // parts)
    for i in range(parts):
        part = list(mine[i * size : (i + 1) * size])
        criterion.batch = {key: value[part] for key, value in batch.items()}
        inputs = {k: v for k, v in criterion.batch.items() if k != "labels_"}
        optimizer.signal_skip_step(do_skip=i + 1 < parts)
        optimizer.zero_grad()
        private_criterion(private(**inputs)).backward()
        held = sum(total.numel() for total in optimizer.sums.values())
        optimizer.step()
    return optimizer, held


def run(case: Case) -> Result:
    """The case, on this rank."""
    rank = distributed.get_rank()
    model, batch, criterion = prepared(case)
    alone = copy.deepcopy(model)
    quiet = replace(case, noise=0.0, parts=1, uneven=False)
    everyone = [row for share in case.shares for row in share]
    step(quiet, alone, alone, batch, prepared(case)[2], everyone)
    wanted = {n: p.grad.clone() for n, p in alone.named_parameters() if p.requires_grad}
    wrapped = distribute(case, model)
    _, held = step(case, model, wrapped, batch, criterion, case.shares[rank])
    got = {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    scale = max(float(value.abs().max()) for value in wanted.values()) or 1.0
    off = max(float((got[n] - wanted[n]).abs().max()) for n in wanted) / scale
    after = {n: full(p) for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach() + p.grad for n, p in alone.named_parameters() if p.requires_grad}
    moved = max(float((before[n] - after[n] - got[n]).abs().max()) for n in got)
    assert moved < 1e-9, f"the step is not the gradient's: {moved}"
    rows = len(next(iter(batch.values()))) if case.reduction == "mean" else 1
    unit = 0.5 * case.noise / rows
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    return Result(
        off=off,
        noise={n: (got[n] - wanted[n]) / unit for n in got} if unit else {},
        local=(own, held, sum(p.numel() for p in alone.parameters())),
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    engine.secret_generator = lambda: None  # draws repeat: by the seed of each rank
    repeat_secrets(os.environ["RANK"])
    distributed.init_process_group(
        "gloo", timeout=datetime.timedelta(seconds=int(os.environ.get("PATIENCE", 60)))
    )
    results = {}
    for case in torch.load(folder / "cases.pt", weights_only=False):
        try:
            results[case.id] = run(case)
        except Exception as error:
            if "TRACE" in os.environ:
                raise
            results[case.id] = Result(error=f"{type(error).__name__}: {error}")
            if "different places" not in str(error):
                break  # the others wait for this rank no more
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    # By its importable name, under which the test can unpickle what is written.
    from tests.distributed import steps

    steps.main(Path(sys.argv[1]))
