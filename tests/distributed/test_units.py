"""Units over two processes: one process' sums, whole units, one Poisson draw, one epsilon; attacks."""

import re
from typing import Any

import pytest
import torch
from opacus.accountants import create_accountant

from tests.distributed.test_steps import TOLERANCE, assert_poisson
from tests.distributed.torchrun import saved_by_ranks
from tests.distributed.units import (
    ATTACKS,
    BATCH,
    CAP,
    CLIP,
    DRAWS,
    OWNERS,
    UNITS,
    WAYS,
    Owned,
    model_of,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    return saved_by_ranks("tests.distributed.units", "units", tmp_path_factory)


@pytest.fixture(scope="module")
def gradients() -> list[list[torch.Tensor]]:
    """Each row's, by autograd alone."""
    model, rows = model_of(), Owned()
    losses = [
        torch.nn.functional.cross_entropy(model(x[None]), y[None])
        for x, y, _ in (rows[i] for i in range(len(rows)))
    ]
    return [list(torch.autograd.grad(loss, list(model.parameters()))) for loss in losses]


def clipped_sum(rows: list[int], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Of the units that rows make, each by the mean of its rows."""
    total = [torch.zeros_like(g) for g in gradients[0]]
    for name in dict.fromkeys(OWNERS[i] for i in rows):
        own = [gradients[i] for i in rows if OWNERS[i] == name]
        unit = [sum(parts) / len(own) for parts in zip(*own, strict=True)]
        norm = torch.cat([g.flatten() for g in unit]).norm()  # type: ignore[union-attr]
        for k, g in enumerate(unit):
            total[k] += g * min(1.0, CLIP / (float(norm) + 1e-6))
    return total


@pytest.mark.parametrize("way", WAYS)
def test_the_sums_are_those_of_one_process(
    way: str, ranks: list[dict[str, Any]], gradients: list[list[torch.Tensor]]
) -> None:
    """In one part and in two; a unit is whole, and on one rank; some local batches are empty."""
    largest, empty = 0.0, 0
    for kind in ("steps", "parts"):
        first, second = (rank[f"honest {way}"][kind] for rank in ranks)
        assert len(first) == len(second)
        for (mine, gradient), (others, same) in zip(first, second, strict=True):
            rows = [*mine, *others]
            empty += (not mine) + (not others)
            assert len(set(rows)) == len(rows)
            for name in {OWNERS[i] for i in rows}:
                counts = [sum(OWNERS[i] == name for i in part) for part in (mine, others)]
                assert sorted(counts) == [0, min(CAP, OWNERS.count(name))]
            wanted = clipped_sum(rows, gradients)
            for one, other, want in zip(gradient, same, wanted, strict=True):
                assert torch.equal(one, other)
                largest = max(largest, float((one * BATCH - want).abs().max()))
    assert largest <= TOLERANCE
    assert empty


@pytest.mark.parametrize("way", WAYS)
def test_a_transformers_units_are_those_of_one_process(
    way: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        assert rank[f"transformer {way}"][1] <= TOLERANCE


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_unit_moves_the_sum_by_no_more_than_the_norm(
    way: str, ranks: list[dict[str, Any]]
) -> None:
    """It is clipped, and on a rank that has no other."""
    there, away = ranks[0][f"neighbours {way}"]
    assert float((there - away).norm()) == pytest.approx(CLIP, rel=1e-5)
    assert float((there - away).norm()) <= CLIP * (1 + 1e-12)


def test_the_draws_of_both_ranks_are_one_poisson_draw_of_units(
    ranks: list[dict[str, Any]],
) -> None:
    parts = [rank["draws"] for rank in ranks]
    assert [len(part) for part in parts] == [DRAWS, DRAWS]
    both = ([*one, *other] for one, other in zip(*parts, strict=True))
    assert_poisson(both, UNITS, BATCH / UNITS, DRAWS)
    for part in parts:
        assert sum(map(len, part)) / DRAWS == pytest.approx(BATCH / 2, abs=0.1)


@pytest.mark.parametrize("way", WAYS)
def test_epsilon_is_that_of_one_process(way: str, ranks: list[dict[str, Any]]) -> None:
    fresh = create_accountant("rdp")
    for _ in range(6):
        fresh.step(noise_multiplier=1.3, sample_rate=BATCH / UNITS)
    for rank in ranks:
        seen = rank[f"honest {way}"]
        assert seen["epsilon"] == fresh.get_epsilon(1e-3)
        assert seen["history"] == [(1.3, BATCH / UNITS, 6)]
        assert seen["expected"] == BATCH / 2  # of this rank


# --- attacks ----------------------------------------------------------------------------------------

BOTH = {
    "on two ranks": r"Rows of unit 'u0' came on ranks 0 and 1 in one step.* bring a unit's rows to one",
    "shared out twice": r"Rows of unit \d+ came on ranks [01] and [01] in one step",
    "ids on one": "got unit_ids on rank 0 and none on rank 1.* Give unit_ids in each backward",
    "other ids": r"Ranks differ in digest of unit_ids \(rank 0: '\w+', rank 1: '\w+'\), wanted the same",
    "other types": r"Ranks differ in digest of unit_ids",
    "own rows": r"Ranks differ in digest of unit_ids .* with the ids of all its rows",
    "no ids": r"length of the data set \(rank 0: 12, rank 1: 20\).*units \(rank 0: 12, rank 1: None\)",
    "other cap": r"Ranks differ in max_rows_per_unit \(rank 0: 3, rank 1: 4\)",
    "other norm": r"Ranks differ in max_grad_norm \(rank 0: '0.3', rank 1: '3.0'\)",
    "other rate": r"Ranks differ in batches of an epoch \(rank 0: 3, rank 1: 4\)",
    "another order": r"Ranks differ in digest of some rows, in their order \(rank 0: '\w+', rank",
    "not spread": r"got unit_ids in 2 processes and a Sequential that is not spread over them, wanted Dis",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BOTH)
def test_attacks_are_refused_on_both_ranks(
    name: str, way: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        assert re.search(f"^InputError: .*{BOTH[name]}", rank[f"{name} {way}"])


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_cuts_a_unit_stops_the_other(way: str, ranks: list[dict[str, Any]]) -> None:
    assert set(ATTACKS) == {*BOTH, "cut", "a row more"}
    first, second = (rank[f"cut {way}"] for rank in ranks)
    assert re.search("^InputError: A backward pass brought .* rows .*, and they cut a unit", first)
    assert re.search(r"^RankError: .*rank 0: an error of its own \(InputError\)", second)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_refuses_its_rows_stops_the_other(
    way: str, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[f"a row more {way}"] for rank in ranks)
    assert re.search("^InputError: .*(rows|Rows)", first)
    assert re.search("^RankError: .*rank 0", second)
    assert all(rank["a row more took"] < 20 for rank in ranks)  # and not the time-out's 60 s
