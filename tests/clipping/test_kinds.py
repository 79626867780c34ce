"""Adaptive clipping, schedulers, virtual batches and checkpoints of `dpzoo.PrivacyEngine`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpzoo
from dpzoo.clipping.rules import ClippingRule
from dpzoo.errors import InputError

ROWS = 6
ADAPTIVE = {
    "clipping": "adaptive",
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.4,
    "max_clipbound": 50.0,
    "min_clipbound": 0.01,
    "unclipped_num_std": 1.5,
}


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(
        torch.randn(ROWS, 4, dtype=torch.float64) * torch.arange(1, ROWS + 1)[:, None],
        torch.randint(0, 3, (ROWS,)),
    )


def private(
    model: nn.Module,
    mode: str = "bk",
    *,
    sigma: float = 0.0,
    seed: int | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """(engine, model, optimizer, backward) with SGD; ``backward(x, y)`` does a batch."""
    engine = (dpzoo.PrivacyEngine if mode == "bk" else PrivacyEngine)(accountant="rdp")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data(), batch_size=ROWS),
        noise_multiplier=sigma,
        max_grad_norm=options.pop("max_grad_norm", 0.5),
        poisson_sampling=False,
        grad_sample_mode=mode,
        noise_generator=generator,
        **options,
    )
    wrapped, optimizer = made[:2]
    criterion = made[2] if mode == "bk" else nn.CrossEntropyLoss()

    def backward(x: torch.Tensor, y: torch.Tensor) -> None:
        criterion(wrapped(x), y).backward()

    return engine, wrapped, optimizer, backward


def step(optimizer: Any, backward: Any, rows: slice = slice(None)) -> None:
    optimizer.zero_grad()
    x, y = data().tensors
    backward(x[rows], y[rows])
    optimizer.step()


# --- a rule of the user's ----------------------------------------------------------------------------


class Smooth(ClippingRule):
    """C tanh(norm) / norm."""

    def factors(self, clip: float, squared: Any, norms: torch.Tensor) -> Any:
        return {None: clip * norms.tanh() / norms}


def test_a_new_rule_is_one_class() -> None:
    model = model_of()
    x, y = data().tensors
    rows = []
    for row, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(model(row[None]), label[None])
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    grads = [torch.cat([g.flatten() for g in row]) for row in rows]
    wanted = sum(0.5 * g.norm().tanh() * g / g.norm() for g in grads) / ROWS
    _, _, optimizer, backward = private(model, clipping=Smooth())
    step(optimizer, backward)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(
        InputError, match=r"clipping='smooth', wanted one of \('flat', 'per_layer', "
    ):
        private(model_of(), clipping="smooth")


# --- adaptive clipping ------------------------------------------------------------------------------


def test_adaptive_clipping_moves_as_opacus_does() -> None:
    """Without noise, twenty steps: the same clipping norms and the same weights as hooks mode."""
    ends, norms = [], []
    for mode in ("hooks", "bk"):
        model = model_of()
        _, _, optimizer, backward = private(model, mode, **ADAPTIVE)
        if mode == "hooks":
            optimizer.unclipped_num_std = 0.0  # it noises the count even without noise
        path = []
        for _ in range(20):
            step(optimizer, backward)
            path.append(float(optimizer.max_grad_norm))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        norms.append(path)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert len(set(norms[1])) > 5  # it moved
    # Opacus keeps the norm in float32 once it has moved.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_adaptive_clipping_settles_at_the_quantile() -> None:
    model = model_of()
    _, wrapped, optimizer, backward = private(model, **ADAPTIVE)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(60):
        step(optimizer, backward)
    assert wrapped.clipped_fraction == 0.5


def test_adaptive_clipping_noises_the_gradients_more_and_the_count() -> None:
    model = nn.Linear(200, 300, bias=False)
    _, _, optimizer, _ = private(model, sigma=2.0, seed=3, **ADAPTIVE)
    optimizer.expected_batch_size = 1
    wanted = (2.0**-2 - 3.0**-2) ** -0.5 * 0.5
    before = [optimizer.max_grad_norm]
    optimizer.step()
    assert float(model.weight.grad.std()) == pytest.approx(wanted, rel=0.02)
    # No rows: the share is noise alone, 0 + N(0, 1.5^2), and the norm moves by it.
    assert optimizer.max_grad_norm != pytest.approx(before[0] * torch.e ** (0.4 * 0.5), rel=1e-3)
    assert 0.01 <= optimizer.max_grad_norm <= 50.0


def test_adaptive_clipping_counts_over_a_logical_batch() -> None:
    """Virtual steps in between do not reset the count."""
    norms = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 3), slice(3, 6)]):
        _, _, optimizer, backward = private(model_of(), **ADAPTIVE)
        for part in parts:
            optimizer.signal_skip_step(part.stop != 6)
            step(optimizer, backward, part)
        norms.append(optimizer.max_grad_norm)
    assert norms[0] == norms[1] != 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_clipbound": 60.0}, "min_clipbound=60.0 and max_clipbound=50.0"),
        ({"unclipped_num_std": 0.4}, "unclipped_num_std=0.4, wanted less than twice the second"),
    ],
)
def test_adaptive_clipping_refuses(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        private(model_of(), sigma=1.0, **(ADAPTIVE | change))


def test_an_unknown_clipping_is_refused() -> None:
    with pytest.raises(InputError, match="clipping='ghost', wanted one of"):
        private(model_of(), clipping="ghost")


# --- schedulers -------------------------------------------------------------------------------------


def test_schedulers_of_noise_and_clipping_norm() -> None:
    """Opacus' schedulers: the noise that is added follows both."""
    model = nn.Linear(200, 300, bias=False)
    _, _, optimizer, _ = private(model, sigma=1.0, seed=0)
    optimizer.expected_batch_size = 1
    noise = ExponentialNoise(optimizer, gamma=0.5)
    clip = ExponentialGradClip(optimizer, gamma=3.0)
    for power in range(3):
        optimizer.step()
        wanted = 0.5 * 1.5**power
        assert float(model.weight.grad.std()) == pytest.approx(wanted, rel=0.02)
        noise.step()
        clip.step()


def test_a_norm_lowered_after_clipping_does_not_lower_the_noise() -> None:
    model = nn.Linear(4, 3).double()
    _, _, optimizer, backward = private(model, sigma=1.0, seed=0, max_grad_norm=8.0)
    stds: list[float] = []
    optimizer._noise_in_place = lambda grads, std, scale: stds.append(std)
    optimizer.zero_grad()
    backward(*data().tensors)
    optimizer.max_grad_norm = 2.0
    optimizer.step()
    step(optimizer, backward)
    assert stds == [8.0, 2.0]


def test_a_scheduler_scales_the_norms_of_all_layers() -> None:
    """The noise follows max_grad_norm, so the layers' own norms must."""
    model = model_of()
    clips = [0.1 * (i + 1) for i in range(len(list(model.parameters())))]
    _, _, optimizer, backward = private(model, clipping="per_layer", max_grad_norm=clips)
    optimizer.max_grad_norm *= 0.25
    optimizer.zero_grad()
    x, y = data().tensors
    backward(x[-1:] * 50, y[-1:])
    for parameter, clip in zip(model.parameters(), clips, strict=True):
        assert float(parameter.summed_grad.norm()) <= 0.25 * clip * (1 + 1e-6)
    assert any(
        float(p.summed_grad.norm()) > 0.24 * c
        for p, c in zip(model.parameters(), clips, strict=True)
    )


# --- virtual batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_batch_memory_manager(size: int) -> None:
    whole, parts = model_of(), model_of()
    _, _, optimizer, backward = private(whole)
    step(optimizer, backward)
    engine = dpzoo.PrivacyEngine(accountant="rdp")
    wrapped, optimizer, criterion, loader = engine.make_private(
        module=parts,
        optimizer=torch.optim.SGD(parts.parameters(), lr=0.1, momentum=0.5),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data(), batch_size=ROWS),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        grad_sample_mode="bk",
    )
    loader.batch_sampler.sample_rate = 1.0  # Poisson sampling that takes every row, in order
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=size, optimizer=optimizer
    ) as batches:
        for x, y in batches:
            optimizer.zero_grad()
            criterion(wrapped(x), y).backward()
            optimizer.step()
    assert len(engine.accountant.history) == 1
    assert engine.accountant.history[0][2] == 1  # one logical step
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, ADAPTIVE], ids=["flat", "adaptive"])
@pytest.mark.parametrize("seed", [7, None])
def test_a_run_goes_on_from_a_checkpoint(
    tmp_path: Path, seed: int | None, options: dict[str, Any]
) -> None:
    """Six steps in one go equal three, a checkpoint, and three in a new engine: noise included."""
    path = tmp_path / "checkpoint.pt"
    model = model_of()
    engine, wrapped, optimizer, backward = private(model, sigma=1.0, seed=seed, **options)
    for index in range(6):
        if index == 3:
            engine.save_checkpoint(path=path, module=wrapped, optimizer=optimizer)
        step(optimizer, backward)
    resumed = model_of(seed=5)
    torch.manual_seed(99)  # the default generator is not what the noise depends on
    again, wrapped, second, backward = private(
        resumed, sigma=1.0, seed=None if seed is None else 12345, **options
    )
    again.load_checkpoint(path=path, module=wrapped, optimizer=second)
    assert again.accountant.history[0][2] == 3
    for _ in range(3):
        step(second, backward)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.get_epsilon(1e-5) == engine.get_epsilon(1e-5)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    engine, wrapped, optimizer, _ = private(model_of(), sigma=1.0, seed=7)
    engine.save_checkpoint(path=path, module=wrapped, optimizer=optimizer)
    hooks, wrapped, optimizer, _ = private(model_of(), "hooks", sigma=1.0)
    hooks.save_checkpoint(path=path, module=wrapped, optimizer=optimizer)
    other, wrapped, optimizer, _ = private(model_of(), sigma=1.0)
    with pytest.raises(InputError, match="has no noise state, wanted a checkpoint"):
        other.load_checkpoint(path=path, module=wrapped, optimizer=optimizer)


def test_a_noise_state_of_something_else_is_refused() -> None:
    _, _, optimizer, _ = private(model_of(), sigma=1.0, seed=7)
    state = optimizer.noise_state()
    with pytest.raises(InputError, match="wanted a release and a max_grad_norm"):
        optimizer.load_noise_state({"streams": []})
    with pytest.raises(InputError, match="wanted the run's name, its steps and the key"):
        optimizer.load_noise_state({**state, "release": {}})


# --- twenty steps against rows run alone ------------------------------------------------------------


def clipped_sum(model: nn.Module, clipping: str, clip: Any) -> list[torch.Tensor]:
    """The clipped sum of the rows' gradients, each row alone."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(*data().tensors, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        row = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in row]).norm()
        for i, g in enumerate(row):
            if clipping == "per_layer":
                factor = (clip[i] / (g.norm() + 1e-6)).clamp(max=1.0)
            elif clipping == "automatic":
                factor = clip / (norm + 0.01)
            else:
                factor = (clip / (norm + 1e-6)).clamp(max=1.0)
            total[i] += factor * g
    return total


@pytest.mark.parametrize(
    ("clipping", "clip"),
    [("flat", 0.5), ("automatic", 0.5), ("per_layer", [0.3, 0.1, 0.2, 0.1, 0.4, 0.2])],
)
def test_twenty_steps_of_every_clipping(clipping: str, clip: Any) -> None:
    model, reference = model_of(), model_of()
    _, _, optimizer, backward = private(model, clipping=clipping, max_grad_norm=clip)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.5)
    for _ in range(20):
        step(optimizer, backward)
        for parameter, total in zip(
            reference.parameters(), clipped_sum(reference, clipping, clip), strict=True
        ):
            parameter.grad = total / ROWS
        plain.step()
    start = model_of()
    for got, wanted, before in zip(
        model.parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
        assert not torch.equal(wanted, before)
