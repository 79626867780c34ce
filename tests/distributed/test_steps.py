"""bk in several processes, under DDP and FSDP2: the step of one process, and its noise, once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.integrations.batches import PoissonBatches
from dpzoo.poisson import LockstepSampler
from tests.distributed.steps import Case, Result
from tests.distributed.torchrun import saved_by_ranks
from tests.support import NAMES

TOLERANCE = 1e-12
EMPTY_FIRST: Any = ((), (0, 1, 2, 3))
EMPTY: Any = ((), ())
THREE: Any = ((0, 2), (), (1, 3))

BERT, LLAMA, T5 = "BertForSequenceClassification", "causal-lm/llama+tied", "seq2seq-lm/t5"
FAMILIES = [
    *(
        LLAMA,
        T5,
        "causal-lm/qwen3",
        "image-classification/vit",
        "masked-lm/modernbert",
        "causal-lm/gemma2",
    ),
    *("causal-lm/mamba", "seq2seq-lm/bart", "sequence-classification/deberta-v2", "causal-lm/phi3"),
]
EXACT = [
    *(Case(BERT, way) for way in ("ddp", "unused", "fsdp", "layers")),
    *(Case(LLAMA, way, EMPTY_FIRST) for way in ("ddp", "layers")),
    # Only some ranks' rows are padded: the ranks' graphs differ.
    Case(T5, "layers", EMPTY_FIRST),
    Case("masked-lm/modernbert", "layers"),
    *(Case("GPT2LMHeadModel", way, parts=2) for way in ("unused", "layers")),
    *(Case("BertForMaskedLM", way, checkpointing=True) for way in ("ddp", "layers")),
    Case(BERT, "layers", clipping="per_layer"),
    *(Case("Scaled", way) for way in ("ddp", "layers")),
    *(Case(BERT, way, clipping="automatic", reduction="sum") for way in ("ddp", "layers")),
    Case(BERT, "layers", EMPTY, frozen="embeddings"),
]
MIXED = Case("GPT2LMHeadModel", "layers", mixed=True)
UNEVEN = Case(BERT, "layers", uneven=True)
NOISY = [
    *(Case(BERT, "ddp", shares, noise=1.5) for shares in (Case.shares, EMPTY_FIRST)),
    *(Case(BERT, "layers", shares, noise=1.5) for shares in (Case.shares, EMPTY)),
]
MANY = [
    *(Case(name, way) for name in NAMES for way in ("ddp", "layers")),
    *(Case(name, way) for name in FAMILIES for way in ("ddp", "fsdp", "layers")),
]
MANY_IN_THREE = [Case(name, way, THREE) for name in FAMILIES for way in ("ddp", "layers")]


def results_of(
    cases: list[Case],
    processes: int,
    name: str,
    factory: pytest.TempPathFactory,
    patience: int = 300,
) -> dict[str, list[Result]]:
    """Case id -> what each rank saw."""
    ranks = saved_by_ranks(
        "tests.distributed.steps",
        name,
        factory,
        cases=cases,
        patience=patience,
        processes=processes,
    )
    return {c.id: [rank.get(c.id, Result(error="not reached")) for rank in ranks] for c in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    return results_of([*EXACT, *NOISY, MIXED, UNEVEN], 2, "steps", tmp_path_factory)


def assert_exact(case: Case, ranks: list[Result]) -> None:
    for rank in ranks:
        assert not rank.error, rank.error
        assert 0 <= rank.off <= TOLERANCE
    if case.way in ("fsdp", "layers"):  # parameters and sums are in pieces
        own, _, whole = (sum(rank.local[i] for rank in ranks) for i in range(3))
        assert own == whole / len(ranks)
        assert max(rank.local[0] for rank in ranks) < 1.2 * whole / len(ranks) ** 2
        assert all(rank.local[1] <= rank.local[0] for rank in ranks)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.id)
def test_the_sums_are_those_of_one_process(case: Case, results: dict[str, list[Result]]) -> None:
    assert_exact(case, results[case.id])


def test_mixed_precision_is_that_of_bfloat16(results: dict[str, list[Result]]) -> None:
    assert all(0 < rank.off < 0.05 for rank in results[MIXED.id])


def test_ranks_with_different_numbers_of_parts_are_named(results: dict[str, list[Result]]) -> None:
    for rank in results[UNEVEN.id]:
        assert (
            "RankError: Ranks are at different places (rank 0: step 1; rank 1: forward pass)"
            in rank.error
        )
        assert "as many parts of each, empty ones too" in rank.error


@pytest.mark.parametrize("case", NOISY, ids=lambda case: case.id)
def test_the_noise_is_drawn_once(case: Case, results: dict[str, list[Result]]) -> None:
    """sigma C on the sum, the same on all ranks, independent between shards."""
    first, second = results[case.id]
    assert not first.error, first.error
    for name, value in first.noise.items():
        assert torch.equal(value, second.noise[name])
    everything = torch.cat([value.flatten() for value in first.noise.values()])
    assert float(everything.std()) == pytest.approx(1, abs=5 / (2 * everything.numel()) ** 0.5)
    # Half of a parameter's rows are rank 0's, the rest rank 1's.
    halves = [v.chunk(2) for v in first.noise.values() if len(v) % 2 == 0]
    mine, other = (torch.cat([half[i].flatten() for half in halves]) for i in range(2))
    for half in (mine, other):
        assert float(half.std()) == pytest.approx(1, abs=5 / (2 * half.numel()) ** 0.5)
    assert float((mine * other).mean()) == pytest.approx(0, abs=5 / mine.numel() ** 0.5)
    assert not torch.isclose(mine[:64], other[:64]).any()


@pytest.mark.slow
def test_every_class_and_ten_architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    for processes, cases in ((2, MANY), (3, MANY_IN_THREE)):
        found = results_of(cases, processes, f"many-{processes}", tmp_path_factory, 1800)
        for case in cases:
            assert_exact(case, found[case.id])


# --- draws ------------------------------------------------------------------------------------------


def assert_poisson(draws: Any, rows: int, rate: float, count: int) -> None:
    """Each row with the rate, and any two rows independently."""
    drawn = torch.zeros(count, rows, dtype=torch.float64)
    for i, batch in enumerate(draws):
        assert len(set(batch)) == len(batch)
        drawn[i, batch] = 1
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert float((drawn.mean(0) - rate).abs().max()) < 5 * deviation
    pairs = (drawn.T @ drawn / count - rate**2)[~torch.eye(rows, dtype=torch.bool)]
    assert float(pairs.abs().max()) < 5.5 * (rate**2 * (1 - rate**2) / count) ** 0.5


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ten_thousand_draws_of_all_ranks_are_poisson_draws(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, rate, count = 13, 0.25, 10_000
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        generator = torch.Generator().manual_seed(rank + 1)
        sampler = LockstepSampler(total_size=rows, sample_rate=rate, generator=generator)
        sampler.num_batches = count
        parts.append(list(sampler))
    assert_poisson(
        ([i for p in step for i in p] for step in zip(*parts, strict=True)), rows, rate, count
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_trainers_draw_does_not_depend_on_the_ranks(ranks: int) -> None:
    def batches(rank: int, ranks: int) -> list[list[int]]:
        return list(PoissonBatches(13, 0.25, 10_000, 7, lambda: 0, rank, ranks))

    alone = batches(0, 1)
    each = [batches(rank, ranks) for rank in range(ranks)]
    for step, wanted in enumerate(alone):
        assert all(rank[step][0] == step for rank in each)
        assert sorted(i for rank in each for i in rank[step][1:]) == wanted[1:]
    assert_poisson((batch[1:] for batch in alone), 13, 0.25, 10_000)


# --- what is refused --------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def private(model: nn.Module, wrapped: Any) -> Any:
    return dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=wrapped.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(list(range(4)), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="bk",
    )


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("static", "DistributedDataParallel has static_graph=True, which .* would pass by"),
        ("hook", "DistributedDataParallel has a communication hook"),
        ("inner", r"0 \(FSDPLinear\) is spread over processes and the model around it is not"),
        ("inner ddp", r"0 \(DistributedDataParallel\) is spread over processes"),
        ("tensor parallel", "0.weight is a DTensor in a model that is not under FSDP2"),
        (
            "replicas",
            r"0.weight is placed \(Replicate\(\), Shard\(dim=0\)\) on a mesh of 2 dimensions",
        ),
        ("ignored", "1.weight is on every rank as a whole, and .* without ignored_params"),
    ],
)
def test_what_cannot_be_honoured_is_named(kind: str, message: str) -> None:
    model = wrapped = layers()
    if kind == "static":
        wrapped = DistributedDataParallel(model, static_graph=True)
    elif kind == "hook":
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    elif kind == "inner":
        fully_shard(model[0])
    elif kind == "inner ddp":
        wrapped = nn.Sequential(DistributedDataParallel(model[0]), model[1])
    elif kind == "tensor parallel":
        weight = distribute_tensor(
            model[0].weight.data, init_device_mesh("cpu", (1,)), [Replicate()]
        )
        model[0].weight = nn.Parameter(weight)
    elif kind == "replicas":
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
        fully_shard(model, mesh=mesh)
    else:
        fully_shard(model, ignored_params=set(model[1].parameters()))
    with pytest.raises(dpzoo.UnsupportedModelError, match=message):
        private(model, wrapped)


@pytest.mark.usefixtures("one_rank")
def test_cleanup_leaves_the_model_to_ddp() -> None:
    model = DistributedDataParallel(layers(), find_unused_parameters=True)
    private(model, model)[0].cleanup()
    assert model.require_backward_grad_sync
    assert model.find_unused_parameters


@pytest.mark.usefixtures("one_rank")
def test_cleanup_leaves_the_model_to_fsdp() -> None:
    model = fully_shard(layers())
    made = private(model, model)
    made[0].cleanup()
    model(torch.randn(3, 4)).sum().backward()
    assert all(
        isinstance(p.grad, DTensor) and p.grad.full_tensor().any() for p in model.parameters()
    )


def test_a_saved_state_of_shards_is_refused(tmp_path: Path, one_rank: None) -> None:
    model = fully_shard(layers())
    _, optimizer, *_ = private(model, model)
    with pytest.raises(dpzoo.InputError, match="save_checkpoint got a model under FSDP2"):
        dpzoo.PrivacyEngine().save_checkpoint(
            path=tmp_path / "c", module=model, optimizer=optimizer
        )
