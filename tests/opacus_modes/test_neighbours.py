"""One row, one unit: a row neither sees the others nor moves the sum by more than C."""

import pytest
import torch

import dpzoo
from tests.modes import ALL_MODES, Step, oracle_norms
from tests.support import (
    A_FEW,
    NAMES,
    ROWS,
    batch_for,
    largest_error,
    oracle_gradients,
    row_of,
    stock_model,
)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("name", NAMES)
def test_isolation(name: str, mode: str) -> None:
    """Row 1's gradient stays when the others change in content, padding, labels and number."""
    model = dpzoo.convert(stock_model(name))
    step = Step(name, model, mode)
    batch, other = batch_for(name, padding="right"), batch_for(name, padding="left")
    step.backward(batch)
    before = [g.detach().clone() for g in step.optimizer.grad_samples]
    assert all(len(g) == ROWS for g in before)  # choices and tokens are not rows
    step.optimizer.zero_grad()
    step.backward({key: torch.cat([other[key][:1], batch[key][1:2]]) for key in batch})
    for old, new in zip(before, step.optimizer.grad_samples, strict=True):
        assert len(new) == 2
        assert largest_error(new[1], old[1]) <= 1e-12


@pytest.mark.parametrize("mode", ["ghost", "bk"])
@pytest.mark.parametrize("name", NAMES)
def test_isolation_of_norms(name: str, mode: str) -> None:
    """As above, in the modes that have no gradients of single rows."""
    model = dpzoo.convert(stock_model(name))
    step = Step(name, model, mode)
    batch, other = batch_for(name, padding="right"), batch_for(name, padding="left")
    step.backward(batch)
    before = step.norms().clone()
    assert before.shape == (ROWS,)
    step.optimizer.zero_grad()
    step.backward({key: torch.cat([other[key][:1], batch[key][1:2]]) for key in batch})
    assert largest_error(step.norms()[1], before[1]) <= 1e-12


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(
            *(name, mode),
            marks=()
            if mode == "bk" or (name in A_FEW and mode in ("hooks", "ghost"))
            else pytest.mark.slow,
        )
        for name in NAMES
        for mode in ALL_MODES
    ],
)
def test_sensitivity(name: str, mode: str) -> None:
    """Without row i the clipped sum moves by at most C, for C far below, near and far above."""
    stock = stock_model(name)
    batch = batch_for(name)
    gradients = oracle_gradients(name, stock, batch)
    model = dpzoo.convert(stock)
    names = [key for key, _ in model.named_parameters()]
    norms = oracle_norms(gradients, names)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for clip in (float(norms.min()) * 1e-3, float(norms.median()), float(norms.max()) * 1e3):
        sums = []
        for removed in (None, 0, ROWS - 1):
            kept = [i for i in range(ROWS) if i != removed]
            part = {key: torch.cat([row_of(batch, i)[key] for i in kept]) for key in batch}
            step = Step(name, model, mode, max_grad_norm=clip, reduction="sum")
            step.backward(part)
            gradient = step.gradient()
            sums.append(torch.cat([gradient[key].flatten() for key in names]))
            step.engine.to_standard_module()
            model.load_state_dict(start)
        for without in sums[1:]:
            assert float((sums[0] - without).norm()) <= clip * (1 + 1e-6)
        if clip > float(norms.max()):  # nothing is clipped: the difference is the row itself
            moved = float((sums[0] - sums[1]).norm())
            assert moved == pytest.approx(float(norms[0]), rel=1e-6)
