"""audit_loop: planted loops are caught, right ones pass, and everything is put back."""

import copy
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn

from dpzoo.auditing import audit_loop
from dpzoo.errors import InputError
from tests.auditing.loops import CLEAN_LOOPS, PLANTED_LOOPS, Loop, PlantedLoop


@pytest.mark.parametrize("planted", PLANTED_LOOPS, ids=lambda planted: planted.name)
def test_a_planted_loop_is_named_by_its_check(planted: PlantedLoop) -> None:
    loop, options = planted.build()
    report = audit_loop(*loop.objects(), **options)
    found = [
        f
        for f in report[planted.check].findings
        if f.severity == planted.severity and planted.says in f.message
    ]
    assert found, str(report)
    assert report.ok == (planted.severity == "note"), str(report)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_a_right_loop_passes(mode: str, wrap: bool) -> None:
    loop = Loop(mode, wrap_model=wrap, max_grad_norm=20.0)
    if not wrap:
        objects = loop.objects()
        loop.model = loop.net
        report = audit_loop(*objects, step=loop.step)
    else:
        report = audit_loop(*loop.objects(), step=loop.step)
    assert not report.findings, str(report)
    assert [r.name for r in report] == [
        "loop lint",
        "stale_state",
        "noise",
        "loop trials",
        "loop steps",
    ]
    assert not any(result.skipped for result in report), str(report)


@pytest.mark.parametrize("name", CLEAN_LOOPS)
def test_a_clean_loop_passes(name: str) -> None:
    loop, options = CLEAN_LOOPS[name]()
    report = audit_loop(*loop.objects(), **options)
    assert not report.findings, str(report)
    skipped = [result.skipped for result in report if result.skipped]
    assert len(skipped) == (name == "a collator that draws for each row")
    assert all(text.startswith("random: collator or body draw from Python's") for text in skipped)
    assert report["loop trials"].largest.get("C", 1.0) <= 1 + 1e-3


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_a_loop_of_physical_batches_passes(mode: str) -> None:
    loop = Loop(mode, max_grad_norm=20.0)
    with BatchMemoryManager(
        data_loader=loop.loader, max_physical_batch_size=2, optimizer=loop.optimizer
    ) as parts:
        report = audit_loop(loop.model, loop.optimizer, parts, loop.engine, step=loop.step)
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("most", [1, 2])
def test_a_loop_whose_batches_are_all_parts_passes(mode: str, most: int) -> None:
    """No weight moves in a part, and a draw may have more parts than are looked at."""
    loop = Loop(mode, max_grad_norm=20.0, batch_size=38)
    before = _state(loop)
    with BatchMemoryManager(
        data_loader=loop.loader, max_physical_batch_size=most, optimizer=loop.optimizer
    ) as parts:
        report = audit_loop(loop.model, loop.optimizer, parts, loop.engine, step=loop.step)
    assert report.ok, str(report)
    assert not [f for f in report.findings if "moves" in f.message]
    assert _state(loop)["queue"] == before["queue"] == []
    assert not loop.optimizer._is_last_step_skipped


@pytest.mark.parametrize("most", [None, 2])
def test_a_loop_of_units_passes(most: int | None) -> None:
    """A trial's draw is of units: all rows of one are taken out."""
    loop = Loop(
        "bk",
        max_grad_norm=20.0,
        unit_ids=[row // 3 for row in range(30)] + [*range(30, 40)],
        max_rows_per_unit=most,
    )
    report = audit_loop(*loop.objects(), step=loop.step)
    assert report.ok, str(report)
    assert not any(result.skipped for result in report)
    assert report["loop trials"].largest["C"] == pytest.approx(1.0, abs=1e-3)


def test_a_memory_manager_that_ran_to_its_end_passes() -> None:
    loop = Loop()
    with BatchMemoryManager(
        data_loader=loop.loader, max_physical_batch_size=2, optimizer=loop.optimizer
    ) as parts:
        for batch in parts:
            loop.step(batch)
        loop.optimizer.zero_grad()
        assert audit_loop(loop.model, loop.optimizer, parts, loop.engine).ok


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_everything_is_as_before(mode: str) -> None:
    loop = Loop(mode)
    for batch in loop.loader:
        loop.step(batch)
    loop.optimizer.zero_grad()
    before = _state(loop)
    audit_loop(*loop.objects(), step=loop.step)
    after = _state(loop)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = (
            torch.equal(value, after[name])
            if isinstance(value, torch.Tensor)
            else value == after[name]
        )
        assert same, name


def _state(loop: Loop) -> dict[str, Any]:
    return {
        **{k: v.clone() for k, v in loop.net.state_dict().items()},
        "history": copy.deepcopy(loop.engine.accountant.history),
        "rng": torch.get_rng_state(),
        "queue": list(loop.optimizer._step_skip_queue),
        "hook": loop.optimizer.step_hook,
        "noise": _noise_state(loop.optimizer),
        "methods": sorted(vars(loop.optimizer)),
        "hooks": [len(m._forward_pre_hooks) for m in loop.net.modules()],
        "attributes": [
            sorted(k for k, v in vars(p).items() if v is not None) for p in loop.net.parameters()
        ],
    }


def _noise_state(optimizer: Any) -> Any:
    """The key and the number of the step, with which a run in mode bk goes on."""
    return optimizer.noise_state() if hasattr(optimizer, "noise_state") else None


def test_an_optimizer_that_is_not_private_is_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(InputError, match="got a SGD as optimizer, wanted the private one"):
        audit_loop(net, torch.optim.SGD(net.parameters(), lr=0.1), [], None)
