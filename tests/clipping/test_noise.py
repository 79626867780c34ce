"""The noise: Gaussian, independent, a keyed function of step and sums, on any number of threads."""

import hashlib
import itertools
import logging
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats
from torch import nn

from dpzoo.clipping import noise as noise_module
from dpzoo.clipping.noise import CHUNK, NoiseSource
from dpzoo.errors import InputError
from tests.clipping.test_behaviour import private

KEY = bytes(range(32))
SIZES = [(), (0,), (1,), (3, 5), (CHUNK - 1,), (2, CHUNK + 3)]


def draw(
    count: int, std: float = 1.0, step: int = 1, key: bytes = KEY, **options: Any
) -> torch.Tensor:
    tensor = torch.zeros(count, **options)
    NoiseSource(key).add([tensor], std, step=step)
    return tensor


def noise_of(
    sums: list[torch.Tensor], step: int = 1, key: bytes = KEY, **options: Any
) -> torch.Tensor:
    """Noise on sums, (numel of all,)."""
    return torch.cat(noises_of(sums, step, key, **options))


def noises_of(
    sums: list[torch.Tensor], step: int = 1, key: bytes = KEY, **options: Any
) -> list[torch.Tensor]:
    """Noise on each of the sums, (numel,)."""
    noised = [tensor.clone() for tensor in sums]
    NoiseSource(key).add(noised, options.pop("std", 1.0), step=step, **options)
    return [(b - a).flatten() for a, b in zip(sums, noised, strict=True)]


@pytest.fixture(params=["cpu", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's own path, and the path of other devices with the CPU standing in for one."""
    if request.param == "device":
        monkeypatch.setattr(noise_module, "_on_cpu", lambda tensor: False)
    return str(request.param)


def assert_independent(*draws: torch.Tensor) -> None:
    """Correlations of values, of squares and at a shift by one are those of chance."""
    table = torch.stack([d.double().flatten() for d in draws])
    bound = 5.5 / math.sqrt(table.shape[1])
    for values in (table, table.square(), torch.stack([table[0], *table[1:].roll(1, dims=1)])):
        off = torch.corrcoef(values) - torch.eye(len(table))
        assert float(off.abs().max()) <= bound


# What distribution it is


def assert_gaussian(noise: torch.Tensor, std: float) -> None:
    """Moments, tails and Kolmogorov and Smirnov's distance; bounds are five standard errors."""
    z = noise.double().flatten() / std
    count = len(z)
    assert abs(float(z.mean())) <= 5 / math.sqrt(count)
    assert abs(float(z.var()) - 1) <= 5 * math.sqrt(2 / count)
    assert abs(float((z**3).mean())) <= 5 * math.sqrt(15 / count)
    assert abs(float((z**4).mean()) - 3) <= 5 * math.sqrt(96 / count)
    for quantile in (0.01, 0.5, 1.0, 2.0, 3.0, 4.0):
        share = float((z.abs() > quantile).double().mean())
        expected = math.erfc(quantile / math.sqrt(2))
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)
    # 2e-7: chance of a larger distance. The lattice adds at most half a spacing times the density, 5e-5.
    distance = stats.kstest(z.numpy(), "norm").statistic
    assert distance <= 2.8 / math.sqrt(count) + 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1.0, 3e-5, 700.0])
def test_the_noise_is_gaussian(path: str, std: float, dtype: torch.dtype) -> None:
    assert_gaussian(draw(700_001, std, dtype=dtype), std)


def test_the_transform_is_that_of_its_bits_in_exact_arithmetic() -> None:
    """Each draw against Box and Muller's formula in long double, from AES called here; the errors."""
    count, std = 20_001, 2.0
    pairs = (count + 1) // 2
    for index, (real, angle) in itertools.product(
        (0, 7), ((np.float32, np.int32), (np.float64, np.int64))
    ):
        size = np.dtype(angle).itemsize
        counter = index.to_bytes(12, "big") + bytes(4)
        bits = Cipher(algorithms.AES(KEY[:16]), modes.CTR(counter)).encryptor()
        stream = bits.update(bytes((8 + size) * pairs))
        u = np.abs(np.frombuffer(stream, np.int64, pairs).astype(np.longdouble)) / 2**63
        turn = np.frombuffer(stream, angle, pairs, 8 * pairs).astype(np.longdouble) / 2 ** (
            8 * size
        )
        full = 2 * np.arctan2(np.longdouble(0), np.longdouble(-1))
        radius, angle_ = std * np.sqrt(-2 * np.log(u)), full * turn
        wanted = np.concatenate([radius * np.cos(angle_), radius * np.sin(angle_)])[:count]
        got = noise_module._gaussian(KEY[:16], index, count, std, np.dtype(real))
        assert got.dtype == real
        # Near u = 1 the radius is the root of a small number, 1 - u, that is known to a unit of u.
        unit, rounding = (2.0**-24, 2.0**-20) if real is np.float32 else (2.0**-53, 2.0**-49)
        bound = rounding + np.tile(unit * std / radius, 2)[:count]
        assert (np.abs(got - wanted) / std <= bound).all()


def _stream(words: bytes) -> Callable[..., bytes]:
    return lambda key, index, count: words[:count].ljust(count, b"\0")


def test_the_tails_reach_nine_standard_deviations_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least radius bits, 0 among them, give the largest noise; none is infinite."""
    words = struct.pack("<4q", 0, 1, -1, -(2**63))  # angles are 0: noise is the radius
    for dtype in (np.float32, np.float64):
        monkeypatch.setattr(noise_module, "_keystream", _stream(words))
        noise = noise_module._gaussian(bytes(16), 0, 8, 1.0, np.dtype(dtype))
        assert noise[:3] == pytest.approx(math.sqrt(126 * math.log(2)))
        assert noise[3] == 0
        assert math.erfc(float(noise[0]) / math.sqrt(2)) < 1e-16


@pytest.mark.slow
def test_a_hundred_million_draws() -> None:
    """Chi-square over 1,000 cells of equal probability, tails to 5.5 std, correlations of six kinds."""
    count, cells = 100_000_000, 1000
    edges = torch.from_numpy(stats.norm.ppf(np.arange(1, cells) / cells))
    seen, tails = torch.zeros(cells), dict.fromkeys((4.0, 4.5, 5.0, 5.5), 0)
    products: dict[str, list[torch.Tensor]] = {}
    before = draw(count // 20, step=20).double()
    for step in range(20):
        z = draw(count // 20, step=step).double()
        # Half a spacing further, at random: a lattice point is somewhere in its cell.
        z += (torch.rand(len(z), dtype=torch.float64) - 0.5) * 2.0**-12
        seen += torch.bincount(torch.bucketize(z, edges), minlength=cells)
        for quantile in tails:
            tails[quantile] += int((z.abs() > quantile).sum())
        blocks = z[: len(z) // CHUNK * CHUNK].view(-1, 2, CHUNK // 2)
        for name, product in {
            "cosines and sines": blocks[:, 0] * blocks[:, 1],
            "their squares": (blocks[:, 0] ** 2 - 1) * (blocks[:, 1] ** 2 - 1) / 2,
            "neighbours": z[1:] * z[:-1],
            "chunks": z[CHUNK:] * z[:-CHUNK],
            "steps": z * before,
            "squares of steps": (z**2 - 1) * (before**2 - 1) / 2,
        }.items():
            products.setdefault(name, []).append(product.mean() * math.sqrt(product.numel()))
        before = z
    chi = float(((seen - count / cells) ** 2 / (count / cells)).sum())
    assert stats.chi2.sf(chi, cells - 1) > 1e-6
    assert stats.chi2.cdf(chi, cells - 1) > 1e-6
    for quantile, got in tails.items():
        expected = count * math.erfc(quantile / math.sqrt(2))
        assert abs(got - expected) <= 5 * math.sqrt(expected) + 1
    for name, means in products.items():
        assert abs(float(torch.stack(means).sum())) <= 5 * math.sqrt(20), name


# What it depends on


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_equal_sums_have_equal_noise_on_any_number_of_threads(threads: int, path: str) -> None:
    sums = [torch.randn(size) for size in SIZES] + [torch.randn(CHUNK * 3 + 1).double()]
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            tensors = [tensor.clone() for tensor in sums]
            results.append((NoiseSource(KEY).add(tensors, 1.3, 0.7, step=4), tensors))
    finally:
        torch.set_num_threads(before)
    (one, first), (other, second) = results
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chunks_tensors_steps_domains_keys_and_stds_are_independent(path: str) -> None:
    big, small = torch.zeros(2 * CHUNK), torch.zeros(CHUNK)
    base = noise_of([big, small])
    others = [
        noise_of([big, small], step=2),
        noise_of([big, small], domain="count"),
        noise_of([big, small], key=KEY[::-1]),
        noise_of([big, small], std=1.5) / 1.5,
    ]
    assert_independent(*base.split(CHUNK), *others[0].split(CHUNK))
    # Halves of a chunk are the cosines and sines of the same radii: independent too.
    assert_independent(*base.split(CHUNK // 2))
    assert_independent(base, *others)


def test_any_bit_of_any_sum_gives_other_noise(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "SEGMENT", 1000)
    sums = [torch.randn(6, 7), torch.randn(40_000), torch.randn(5).double(), torch.zeros(3)]
    base = noise_of(sums)
    for tensor, bit in itertools.product(range(len(sums)), (0, 7, 23, 31)):
        changed = [s.clone() for s in sums]
        words = changed[tensor].view(-1).view(torch.int32)
        words[-1] = words[-1] ^ (-(2**31) if bit == 31 else 2**bit)
        if tensor != 2 and bit == 31:
            assert torch.equal(changed[tensor].abs(), sums[tensor].abs())  # -0.0 is not 0.0
        noise = noise_of(changed)
        assert_independent(base, noise)


def test_whatever_is_different_has_another_name(path: str) -> None:
    """Shapes, types, order, splits, contexts, domain, step, std, key; scale is not among them."""
    values = torch.randn(12)
    digest = NoiseSource(KEY).digest
    digests = [
        digest([values]),
        digest([values.view(3, 4)]),
        digest([values.view(4, 3)]),
        digest([values[:5], values[5:]]),
        digest([values[5:], values[:5]]),
        digest([values, torch.zeros(0)]),
        digest([torch.zeros(0), values]),
        digest([values, torch.zeros(1)]),
        digest([values.view(torch.float64)]),  # the same bytes
        digest([torch.zeros(12)]),
        digest([torch.zeros(12).double()]),
        digest([values], b""),
        digest([values], b"a"),
        digest([values], b"a", b"b"),
        digest([values], b"ab"),
        digest([]),
        NoiseSource().digest([values]),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 32 for d in digests)

    def name(scale: float = 1.0, std: float = 1.0, key: bytes = KEY, **options: Any) -> bytes:
        return NoiseSource(key).add([values.clone()], std, scale, **{"step": 1, **options})

    names = [
        name(),
        name(std=2.0),
        name(step=2),
        name(domain="x"),
        name(key=KEY[::-1]),
        name(std=0.0),
    ]
    names += [name(digest=d) for d in digests[1:]]
    assert len(set(names)) == len(names)
    assert name(scale=0.5) == name() == name(digest=digests[0])


def test_a_digest_that_is_given_stands_for_the_sums(path: str) -> None:
    """Gradients and a count that are released together: equal only if both are."""
    source, sums, count = NoiseSource(KEY), torch.zeros(CHUNK), torch.tensor([5.0])
    noises = []
    for value in (count, count + 1):
        tensor = sums.clone()
        source.add([tensor], 1.0, step=1, digest=source.digest([sums, value]))
        noises.append(tensor)
    assert_independent(*noises)


def test_digests_of_many_changes_do_not_collide(path: str) -> None:
    """Every word changed by every power of two, in turn."""
    source = NoiseSource(KEY)
    words = torch.zeros(40, dtype=torch.int32)
    digests = {source.digest([words.view(torch.float32)])}
    for index, bit in itertools.product(range(len(words)), range(32)):
        changed = words.clone()
        changed[index] = -(2**31) if bit == 31 else 2**bit
        digests.add(source.digest([changed.view(torch.float32)]))
    assert len(digests) == 1 + 40 * 32


def test_the_device_hash_is_the_sum_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Python's integers, over rows, lanes and blocks that do not fit."""
    monkeypatch.setattr(noise_module, "BLOCK", 2 * noise_module.WIDTH + 5)
    width, lanes = noise_module.WIDTH, noise_module.LANES
    sums = [torch.randn(100), torch.randn(5 * width + 3), torch.randn(7).double()]
    got = np.frombuffer(NoiseSource(KEY)._folded(sums), np.int64)
    key = NoiseSource(KEY)._prf(b"multipliers", size=16)
    multipliers = np.frombuffer(noise_module._keystream(key, 0, 8 * width * lanes), np.int64)
    wanted: list[int] = []
    for block in noise_module._blocks([s.view(torch.int32) for s in sums]):
        assert len(block) <= 2 * width + 5
        for lane in multipliers.reshape(lanes, width).tolist():
            for row in block.split(width):
                total = sum(a * w for a, w in zip(lane, row.tolist(), strict=False))
                wanted.append((total + 2**63) % 2**64 - 2**63)
    assert got.tolist() == wanted
    assert torch.equal(
        torch.cat(list(noise_module._blocks([s.view(torch.int32) for s in sums]))),
        torch.cat([s.view(torch.int32) for s in sums]),
    )


def test_another_arithmetic_is_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose cosine differs in a bit must not make almost the same noise on the same sums."""
    values = torch.zeros(1000)
    before = NoiseSource(KEY).digest([values])
    monkeypatch.setattr(noise_module, "_arithmetic", lambda device: b"another")
    assert NoiseSource(KEY).digest([values]) != before


def test_the_arithmetic_is_told_by_the_draws() -> None:
    assert noise_module._arithmetic("cpu") == noise_module._arithmetic.__wrapped__("cpu")
    cosine = np.cos
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_module.np, "cos", lambda x, out: np.nextafter(cosine(x), 2, out=out))
        assert noise_module._arithmetic.__wrapped__("cpu") != noise_module._arithmetic("cpu")


def test_a_published_digest_does_not_show_the_hash_key() -> None:
    """GMAC's tags under a fixed nonce would: what comes out is not made of them by anything but BLAKE2b."""
    source, values = NoiseSource(KEY), torch.randn(100)
    tags = source._tags([noise_module._memory(values)])
    published = source.digest([values]) + source.add([values.clone()], 1.0, step=1)
    assert all(tag[:4] not in published for tag in tags)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_each_device_by_itself_and_with_the_cpu(device: str) -> None:
    """Gaussian, equal for equal sums, independent for others and between tensors."""
    sums = [torch.randn(2, CHUNK, device=device), torch.randn(CHUNK), torch.zeros(7, device=device)]
    base = torch.cat([noise.cpu() for noise in noises_of(sums)])
    assert torch.equal(base, torch.cat([noise.cpu() for noise in noises_of(sums)]))
    # Rounding moves 1e-7 of a sum of size 1.
    assert_gaussian(base, 1.0)
    assert_independent(*base[: 3 * CHUNK].split(CHUNK))
    for index in range(3):
        changed = [tensor.clone() for tensor in sums]
        changed[index].view(-1)[-1] += 2.0**-20
        assert_independent(base, torch.cat([noise.cpu() for noise in noises_of(changed)]))


# What is done to the tensors


@pytest.mark.parametrize("std", [1.0, 0.7, 1.999, 3e-5])
def test_released_values_are_on_a_lattice_that_no_sum_changes(std: float, path: str) -> None:
    """Multiples of a power of two of 2^-13 to 2^-12 std, for sums of any size; every near point comes."""
    spacing = 2.0 ** (math.floor(math.log2(std)) - 12)
    assert 2**-13 * std < spacing <= 2**-12 * std
    for dtype, size in itertools.product((torch.float32, torch.float64), (0.0, 1e-4, 1.0, 4000.0)):
        sums = torch.randn(400_000, dtype=dtype) * size * std
        NoiseSource(KEY).add([sums], std, step=1)
        steps = sums.double() / spacing
        assert torch.equal(steps, steps.round())
        if size == 0:
            # Each of the 41 has 19 draws or more on the average.
            assert len(steps[steps.abs() <= 20].unique()) == 41
    exact = torch.full((200_000,), 0.3 * spacing)
    NoiseSource(KEY).add([exact], std, step=1)
    # The sum is not rounded by itself: that would shift it by 0.3 of a spacing.
    assert abs(float(exact.double().mean()) / std) <= 5 / math.sqrt(200_000)


def test_the_sum_is_rounded_with_its_noise_only(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Noise of 0.4 spacings on a sum of 0.4 makes 0.8, which is 1; each by itself would be 0."""
    spacing = 2.0**-12
    monkeypatch.setattr(
        noise_module, "_gaussian", lambda key, i, n, std, dtype: np.full(n, 0.4, dtype)
    )
    monkeypatch.setattr(
        noise_module, "_device_noise", lambda like, seeds: torch.full_like(like, 0.4 * spacing)
    )
    monkeypatch.setattr(noise_module, "_arithmetic", lambda device: b"")
    tensor = torch.full((3,), 0.4 * spacing)
    NoiseSource(KEY).add([tensor], 1.0, step=1)
    assert tensor.tolist() == [spacing] * 3


def test_scale_comes_after_noise_and_rounding(path: str) -> None:
    sums = torch.randn(3, 1000)
    whole, scaled = sums.clone(), sums.clone()
    NoiseSource(KEY).add([whole], 2.0, step=1)
    NoiseSource(KEY).add([scaled], 2.0, 1 / 3, step=1)
    torch.testing.assert_close(scaled, whole / 3, rtol=3e-7, atol=0.0)


def test_no_noise_scales_only_and_rounds_nothing(path: str) -> None:
    sums = [torch.randn(5), torch.randn(3, 2).double(), torch.randn(0)]
    tensors = [tensor.clone() for tensor in sums]
    source = NoiseSource(KEY)
    assert len(source.add(tensors, 0.0, step=1)) == 32
    assert all(torch.equal(a, b) for a, b in zip(sums, tensors, strict=True))
    source.add(tensors, 0.0, 0.5, step=1)
    assert all(torch.equal(a * 0.5, b) for a, b in zip(sums, tensors, strict=True))


def test_nothing_to_noise_still_has_a_name(path: str) -> None:
    source = NoiseSource(KEY)
    empty = source.add([], 1.0, step=1)
    assert empty != source.add([torch.zeros(0)], 1.0, step=1)
    assert empty == source.add([], 1.0, step=1)


def test_views_parameters_and_strides(path: str) -> None:
    """A transposed or sliced tensor gets the noise of its contiguous copy, and its neighbours none."""
    store = torch.randn(6, 8)
    whole, base = store.clone(), store.clone()
    source = NoiseSource(KEY)
    copies = [store.t()[2:5].clone(), store[:2, :2].clone()]
    names = (
        source.add(copies, 1.0, step=1),
        source.add([store.t()[2:5], store[:2, :2]], 1.0, step=1),
    )
    assert names[0] == names[1]
    whole.t()[2:5], whole[:2, :2] = copies
    assert torch.equal(store, whole)
    assert torch.equal(store[3:, 5:], base[3:, 5:])
    parameter = nn.Parameter(torch.zeros(100))
    source.add([parameter], 1.0, step=1)
    assert torch.equal(parameter.detach(), draw(100))
    assert parameter.requires_grad


def test_sums_that_are_not_finite_stay_so(path: str) -> None:
    tensor = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    NoiseSource(KEY).add([tensor], 1.0, 0.5, step=1)
    assert tensor.isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([torch.zeros(2), torch.zeros(2).half()], "dtype torch.float16 as tensor 1"),
        ([torch.zeros(2).bfloat16()], "dtype torch.bfloat16 as tensor 0.* sum in float32"),
        ([torch.zeros(2, dtype=torch.complex64)], "dtype torch.complex64"),
        ([torch.zeros(2).to_sparse()], "layout torch.sparse_coo.*to_dense"),
        ([torch.zeros(2), None], "got NoneType as tensor 1"),
        (
            [torch.ones(3).as_subclass(type("DTensor", (torch.Tensor,), {}))],
            "got DTensor.*to_local",
        ),
        ([torch.zeros(3)] * 2, "in the list already as tensor 1"),
        ([torch.zeros(1).expand(3)], "overlapping"),
    ],
)
def test_tensors_that_are_refused(tensors: list[Any], says: str) -> None:
    for call in (lambda s: s.add(tensors, 1.0, step=1), lambda s: s.digest(tensors)):
        with pytest.raises(InputError, match=says):
            call(NoiseSource(KEY))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"std": -1.0}, "std=-1.0, wanted 0 or"),
        ({"std": math.nan}, "std=nan"),
        ({"std": math.inf}, "std=inf"),
        ({"std": 1e-40}, "std=1e-40"),
        ({"scale": math.nan}, "scale=nan"),
        ({"step": -1}, "step=-1, wanted an integer"),
        ({"step": 1.0}, "step=1.0"),
        ({"step": True}, "step=True"),
        ({"digest": "ab"}, "digest='ab', wanted bytes"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], says: str) -> None:
    tensor = torch.zeros(3)
    with pytest.raises(InputError, match=re.escape(says)):
        NoiseSource(KEY).add([tensor], **{"std": 1.0, "step": 1, **options})
    assert torch.equal(tensor, torch.zeros(3))


# The key


def test_keys_are_fresh_and_stay_hidden(caplog: pytest.LogCaptureFixture) -> None:
    first, second = NoiseSource(), NoiseSource()
    assert first.state()["key"] != second.state()["key"]
    assert first.is_secure
    with caplog.at_level(logging.DEBUG):
        first.add([torch.zeros(5)], 1.0, step=1)
    assert not caplog.records
    assert first.state()["key"] not in repr(first) + repr(vars(first).keys())
    assert repr(first) == "NoiseSource(secret key)"


def test_keys_do_not_come_from_the_seeds_of_torch_or_numpy() -> None:
    keys = set()
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        keys.add(NoiseSource().state()["key"])
    assert len(keys) == 2


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), "0" * 32, 5, bytearray(32)])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(InputError, match="wanted 32 secret bytes"):
        NoiseSource(key)


def test_a_seed_is_called_insecure(caplog: pytest.LogCaptureFixture) -> None:
    source = NoiseSource.insecure(7)
    assert "no differential privacy" in caplog.text
    assert not source.is_secure
    assert repr(source) == "NoiseSource(insecure: key from a seed)"
    other = NoiseSource()
    other.load_state(source.state())
    assert not other.is_secure
    a, b, c = torch.zeros(9), torch.zeros(9), torch.zeros(9)
    source.add([a], 1.0, step=1)
    other.add([b], 1.0, step=1)
    NoiseSource.insecure(8).add([c], 1.0, step=1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(InputError, match="seed='7', wanted an integer"):
        NoiseSource.insecure("7")  # type: ignore[arg-type]


def test_a_state_goes_through_a_checkpoint(tmp_path: Any) -> None:
    source = NoiseSource()
    torch.save(source.state(), tmp_path / "state.pt")
    resumed = NoiseSource()
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    a, b = torch.ones(1000), torch.ones(1000)
    assert source.add([a], 1.0, step=3) == resumed.add([b], 1.0, step=3)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"key": "00"},
        {"key": 5},
        {"key": "zz" * 32},
        {"secure": 1},
        {"more": 1},
        None,
    ],
)
def test_other_states_are_refused(change: dict[str, Any] | None) -> None:
    source = NoiseSource(KEY)
    with pytest.raises(InputError, match="The noise state is not one") as caught:
        source.load_state([] if change is None else {**source.state(), **change})  # type: ignore[arg-type]
    assert KEY.hex() not in str(caught.value)
    assert source.state()["key"] == KEY.hex()


def test_what_a_key_gives_is_pinned() -> None:
    """A resumed run must find the noise that the killed one drew, with the next dpzoo too."""
    source = NoiseSource(KEY)
    name = source.add([torch.zeros(3)], 1.0, step=1, digest=bytes(32))
    parts = [b"name", b"gradients", b"1", struct.pack("<d", 1.0), bytes(32)]
    packed = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    assert name == hashlib.blake2b(packed, key=KEY, digest_size=32).digest()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_adds_noise_of_sigma_times_c_once(reduction: str) -> None:
    """With an empty batch the step is the noise alone: std sigma C, over the denominator."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 10))
    generator = torch.Generator().manual_seed(3)
    wrapped, optimizer, criterion = private(
        model, 4, noise_multiplier=0.8, max_grad_norm=2.0, noise_generator=generator
    )
    optimizer.loss_reduction = reduction
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    criterion(wrapped(torch.zeros(0, 300))).backward()
    optimizer.step()
    noise = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    std = 0.8 * 2.0 / (4 if reduction == "mean" else 1)
    assert float(noise.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * len(noise)))
