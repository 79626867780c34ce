"""One of the processes that `test_two_processes` starts with torchrun: runs cases, writes what came out.

    torchrun --nproc-per-node 2 -m tests.distributed.worker FOLDER

reads FOLDER/cases.pt, a list of `Case`, and writes FOLDER/RANK.pt, case id -> `Result`.
The judging is done in the test.
"""

import dataclasses
import datetime
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.utils.fsdp_utils import FSDP2Wrapper
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.clipping import engine
from tests.modes import OutputLoss
from tests.secrets_that_repeat import repeat_secrets
from tests.support import batch_for, randomize, stock_model

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A private step of one model.

    Args:
        name: a class of dpzoo, or "Linear", a plain layer that is there for Opacus' own behaviour.
        mode: a grad_sample_mode; ghost_fsdp goes with FSDP2, Opacus' others and bk with DPDDP.
        shares: the rows of the batch that each rank has.
        clip: the clipping norm, C; a list for clipping by layer.
        noise: the noise multiplier.
        reduction: the reduction of the loss, "mean" or "sum".
        physical: split a rank's rows into physical batches of this size.
        trained: parameters whose names begin with none of these are frozen.
        untied: the head has a weight of its own.
        sharding: under FSDP2, "layers" (Opacus' FSDP2Wrapper, a tied head and its table as one group),
            "apart" (the same without that group) or "whole" (the model as one group).
        weightless: give a rank without rows the first row, with a loss of zero.
        placed: bring gradients into the placement of their parameters before the optimizer runs.
        saved: gather the state dict after the step, on rank 0.
        outputs: the plain layer's.
    """

    name: str
    mode: str
    shares: Sequence[Sequence[int]] = ((0, 1, 2), (3,))
    clip: Any = 1.0
    noise: float = 0.0
    reduction: str = "mean"
    physical: int | None = None
    trained: tuple[str, ...] = ("",)
    untied: bool = False
    sharding: str = "layers"
    weightless: bool = False
    placed: bool = False
    saved: bool = False
    outputs: int = 2

    @property
    def makes_criterion(self) -> bool:
        """Whether make_private returns a criterion, and the model has the norms of its rows."""
        return self.mode in ("ghost", "ghost_fsdp", "bk")

    @property
    def id(self) -> str:
        """A name that says what is not the default."""
        said = [self.name, self.mode]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name == "shares":
                said.append("/".join("".join(map(str, share)) or "none" for share in value))
            elif field.name == "clip":
                said += ["per_layer"] if isinstance(value, list) else []
            elif value != field.default:
                plain = isinstance(value, bool | tuple)
                said.append(field.name if plain else f"{field.name}={value}")
        return "-".join(said)


@dataclasses.dataclass
class Result:
    """What one rank saw; under FSDP2, its shards: the first or the last rows of every parameter.

    Args:
        gradient: parameter name -> what the optimizer was given.
        change: parameter name -> by how much the step lowered the parameter (the learning rate is 1).
        parameters: parameter name -> its value after the step.
        norms: the norm of each of the rank's own rows, in modes that make a criterion.
        state: the state dict of the whole model, if that was asked for.
        error: what was raised, as text; all else is empty then.
    """

    gradient: Batch = dataclasses.field(default_factory=dict)
    change: Batch = dataclasses.field(default_factory=dict)
    parameters: Batch = dataclasses.field(default_factory=dict)
    norms: torch.Tensor | None = None
    state: Batch = dataclasses.field(default_factory=dict)
    error: str = ""


def stock_and_batch(case: Case) -> tuple[Any, Batch]:
    """The stock model and the logical batch of a case: the same in every process."""
    torch.manual_seed(0)
    if case.name == "Linear":
        # Within another module: FSDP2Wrapper shards a layer and then the whole, which must be two.
        model = nn.Sequential(nn.Linear(3, case.outputs)).double()
        return model, {"input": torch.randn(4, 3).double()}
    stock = stock_model(case.name, **({"tie_word_embeddings": False} if case.untied else {}))
    return stock, batch_for(case.name)


def model_of(case: Case, stock: Any) -> Any:
    """The model to train, with what is not trained frozen."""
    model = stock if case.name == "Linear" else dpzoo.convert(stock)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(case.trained))
    return model.train()


class LinearLoss:
    """Per-row losses of the plain layer."""

    reduction = "mean"

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        losses = outputs.square().sum(1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


def distribute(case: Case, model: Any) -> Any:
    """Wrap a model as the case says."""
    if case.mode != "ghost_fsdp":
        if distributed.get_rank():
            randomize(model)  # the wrapper has to bring rank 0's values
        return DifferentiallyPrivateDistributedDataParallel(model)
    if case.sharding == "whole":
        return fully_shard(model)
    if case.sharding == "layers" and case.name != "Linear":
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and head.weight is table.weight:
            fully_shard([table, head])
    return FSDP2Wrapper(model)


def place_like_parameters(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


def whole_state(model: Any) -> Batch:
    """A collective; the other ranks get nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def run(case: Case) -> Result:
    rank = distributed.get_rank()
    stock, batch = stock_and_batch(case)
    model = model_of(case, stock)
    wrapped = distribute(case, model)
    criterion: Any
    if case.name == "Linear":
        criterion = LinearLoss()
        criterion.reduction = case.reduction
    else:
        criterion = OutputLoss(case.name, {}, case.reduction)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    if case.placed:
        inner.register_step_pre_hook(place_like_parameters)
    rows = len(next(iter(batch.values())))
    engine = dpzoo.PrivacyEngine if case.mode == "bk" else PrivacyEngine
    made: Any = engine(accountant="rdp").make_private(
        module=wrapped,
        optimizer=inner,
        criterion=criterion,
        data_loader=DataLoader(list(range(rows)), batch_size=rows),
        noise_multiplier=case.noise,
        max_grad_norm=case.clip,
        clipping="per_layer" if isinstance(case.clip, list) else "flat",
        loss_reduction=case.reduction,
        poisson_sampling=False,
        grad_sample_mode=case.mode,
    )
    private, optimizer = made[0], made[1]
    backward_of = made[2] if case.makes_criterion else criterion

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: local(p) for name, p in parameters.items()}
    torch.manual_seed(1)  # the same on all ranks: the noise must not lean on their being different
    mine = list(case.shares[rank])
    dummy = case.weightless and not mine
    mine = [0] if dummy else mine
    size = case.physical or max(len(mine), 1)
    parts = [mine[i : i + size] for i in range(0, len(mine), size)] or [[]]
    for i, part in enumerate(parts):
        piece = {key: value[part] for key, value in batch.items()}
        criterion.batch = piece
        optimizer.signal_skip_step(do_skip=i + 1 < len(parts))
        optimizer.zero_grad()
        loss = backward_of(private(**piece))
        (loss * 0 if dummy else loss).backward()
        norms = private.per_sample_gradient_norms.clone() if case.makes_criterion else None
        optimizer.step()

    return Result(
        gradient={name: local(p.grad) for name, p in parameters.items()},
        change={name: before[name] - local(p) for name, p in parameters.items()},
        parameters={name: local(p) for name, p in parameters.items()},
        norms=norms,
        state=whole_state(model) if case.saved else {},
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A rank that waits for another in vain says so, before the test's own patience ends.
    engine.secret_generator = lambda: None  # draws repeat: by the seed of each rank
    repeat_secrets(os.environ["RANK"])
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    for case in torch.load(folder / "cases.pt", weights_only=False):
        try:
            results[case.id] = run(case)
        except Exception as error:  # both ranks raise, or the other one's collective times out
            results[case.id] = Result(error=f"{type(error).__name__}: {error}")
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    # By its importable name, under which the test can unpickle what is written.
    from tests.distributed import worker

    worker.main(Path(sys.argv[1]))
