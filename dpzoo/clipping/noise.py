"""Gaussian noise that nobody can compute: a keyed function of the step and of the sums it is added to.

A `NoiseSource` has a secret key of 32 bytes from the operating system. For each step

    digest = PRF(key, sums, context)             is what gets noise,
    name   = PRF(key, domain, step, std, digest) is what is released,
    noise  = Gaussian(AES-CTR(PRF(key, name)))   is the noise, one stream of bits for each name.

Equal inputs give equal noise, bit for bit, on any number of threads. Anything different gives noise that
is independent, as deterministic signatures do it (RFC 6979). So a step that is done again after a crash
with the same sums releases what it released before. A step done again with other sums, another step
number, another std or another context is a new release with noise of its own, and has to be paid for:
`dpzoo.ledger` counts the names. (The std is in the name because s + a z and s + b z together show s.)

Why nobody can compute it:

- PRF is BLAKE2b with a key (RFC 7693). Sums are hashed first: GMAC (NIST SP 800-38D) of each segment of
  memory, under a secret key and a fixed nonce; then BLAKE2b over the tags, shapes and types. GMAC under a
  fixed nonce is a universal hash plus a constant: two different segments of n blocks of 16 bytes have one
  tag for at most n + 1 of 2^128 keys (Carter and Wegman 1981; McGrew and Viega 2004). A PRF of a universal
  hash is a PRF. Under a fixed nonce the tags would show the hash's key, so they never leave this module:
  what leaves it is BLAKE2b's output.
- The bits of a release are those of AES-128 in counter mode, under a key of that release. Each chunk of
  each tensor has a range of counters of its own.
- Box and Muller's transform (1958) makes Gaussians of them. Its radius is made of 64 random bits, so that
  noise reaches 9.34 std: what is cut off has probability 1e-20 for a coordinate. (Floats of 24 and 32
  random bits end at 5.8 and 6.7 std.) The radius has the relative resolution of its type in the tails too.

What is not hidden. Whoever sees two releases of one step learns whether their sums were equal. If a step
is done again by the same program on the same data, they always are, and nothing is learned. If program or
data were changed in between, equality tells that the change did not concern that step's batch. So put what
describes program and data set into ``context``: another context has independent noise, whatever the sums.

Floating point. The low bits of a float s + z depend on s in ways that the theory of the Gaussian mechanism
does not know: some values can come from one s and not from its neighbour (Mironov 2012; Jin et al. 2022,
arXiv 2112.05307), and the low bits of Box and Muller's pairs show the pairs (Holohan and Braghin 2021,
arXiv 2107.10138). Here s + z is rounded to multiples of a power of two, of 2^-13 to 2^-12 std, before it
is scaled.

- It costs no privacy and no accounting: it comes after the noise. (Rounding s by itself would add up to
  spacing * sqrt(d) to the sensitivity: 1 to 2 std for 67 million coordinates. That is not done.) The
  variance grows by 5e-9 of itself at most.
- What it gives: released values below 4,096 std are on a lattice that does not depend on the sums; all its
  points within 9 std of the sum can come; and the bits that both attacks read are not released.
- What it does not give: a proof. Rounded s + ideal noise would be exactly as private as the theory says.
  Floats differ from it where they fall on the other side of a boundary. Errors of e in the mean move the
  log-probability of one coordinate by about 2 e / spacing. In float64 e is below 2^-49 std: 2^-35 for a
  coordinate, 2^-9 for 67 million if all errors conspire. In float32 it is below 2^-20 std, and the same
  bound says nothing about a large model.
- What is not done: sums are made in floats too, so that one row moves a sum by its clipped gradient only up
  to rounding (Casacuberta et al. 2022, arXiv 2207.10635). Nor does a step take constant time.

Other devices than the CPU use torch's generator there (on CUDA Philox: fast, not made for cryptography).
For each tensor and release it is seeded four times with 64 bits of the keyed function, and the noise is the
sum of four draws over 2: so neither a search over 64 bits finds it, nor does it end at 6.7 std. (The sum of
four is also what Holohan and Braghin advise, and what Opacus' secure mode does.)
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dpzoo.errors import InputError

log = logging.getLogger(__name__)

CHUNK = 1 << 17
"""Coordinates whose noise is drawn at once: even, and about what a core's cache holds."""
SEGMENT = 1 << 22
"""Bytes of memory that one GMAC is of."""
LATTICE_BITS = 12
"""Released values are multiples of the power of two in (2^-13, 2^-12] std."""
DEVICE_DRAWS = 4
"""Draws of a device's generator, each with its own seed, that one noise value is made of."""
LANES, WIDTH, BLOCK = 4, 4096, 1 << 24
"""Of the universal hash on devices: hashes of 64 bits, words they multiply, words held at once."""

_ZEROS = bytes(8 * CHUNK)


class NoiseSource:
    """Noise for lists of tensors, from a secret key.

    Args:
        key: 32 secret bytes; None takes fresh ones from the operating system. Whoever knows them can
            subtract the noise.

    Guarantees:
        No state but the key: a copy, a fork or a thread of its own gives the same noise for the same
        step, and no two different releases share noise.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = secrets.token_bytes(32) if key is None else key
        if not isinstance(key, bytes) or len(key) != 32:
            raise InputError(
                f"NoiseSource got a key of type {type(key).__name__}"
                f"{f' and {len(key)} bytes' if isinstance(key, bytes) else ''}, wanted 32 secret bytes. "
                f"Leave it out to have them from the operating system."
            )
        self._key = key
        self._secure = True

    @classmethod
    def insecure(cls, seed: int) -> NoiseSource:
        """A source that a seed fixes, for experiments: no privacy against whoever guesses the seed."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"NoiseSource.insecure got seed={seed!r}, wanted an integer.")
        log.warning(
            "The noise follows from the seed %d: whoever knows or guesses it can subtract the noise, so "
            "that this run has no differential privacy. Leave the seed out for a run that is to have it.",
            seed,
        )
        source = cls(
            hashlib.blake2b(str(seed).encode(), digest_size=32, person=b"dpzoo seed").digest()
        )
        source._secure = False
        return source

    @property
    def is_secure(self) -> bool:
        """Whether the key is secret: False for `insecure`, and for a state that came from it."""
        return self._secure

    def __repr__(self) -> str:
        return f"NoiseSource({'secret key' if self._secure else 'insecure: key from a seed'})"

    def digest(self, tensors: list[torch.Tensor], *context: bytes) -> bytes:
        """A keyed digest of sums, before their noise.

        Args:
            tensors: as in `add`; they are not changed.
            context: whatever else the release depends on, such as a fingerprint of settings, program
                and data set, or the values of other sums that get noise in the same step.

        Returns:
            32 bytes. They may be published: without the key they tell nothing but equality.

        Guarantees:
            Covers every bit of every tensor, shapes, types, kinds of device, their order, ``context``, and
            the arithmetic of this machine (another processor or library may make other noise from the
            same bits; it counts as another release). Two different inputs share a digest with
            probability below 2^-100.
        """
        flats = _checked(tensors)
        described = [f"{t.dtype} {tuple(t.shape)} {t.device.type}".encode() for t in tensors]
        machines = {str(t.device): None for t in tensors}
        parts = [_packed(context), _packed(described), _packed(_arithmetic(d) for d in machines)]
        parts += self._tags([_memory(flat) for flat in flats if _on_cpu(flat)])
        others = [flat for flat in flats if not _on_cpu(flat)]
        for device in dict.fromkeys(flat.device for flat in others):
            parts.append(self._folded([flat for flat in others if flat.device == device]))
        return self._prf(b"digest", *parts)

    def add(
        self,
        tensors: list[torch.Tensor],
        std: float,
        scale: float = 1.0,
        *,
        step: int,
        digest: bytes | None = None,
        domain: str = "gradients",
    ) -> bytes:
        """``tensor = (tensor + noise) * scale``, in place, with noise from N(0, std^2).

        Several processes: add their sums up first, and noise the total in one process. A digest of one
        process's part does not cover the others', and a sum of lattice points and parts is on no lattice.

        Args:
            tensors: float32 or float64, on any device, none of them twice.
            std: standard deviation of the noise, 0 or from 2^-60 to 2^60; 0 adds none and rounds nothing.
            scale: factor of the noised tensors. It is applied after the rounding.
            step: the number of the logical step.
            digest: of the sums, if it is known; `digest` of ``tensors`` if None. Give it where several
                calls make one release (gradients and a count, say): all sums of the step have to
                be in it.
            domain: what the noise is for. Two calls in one step with one digest need two domains.

        Returns:
            32 bytes that name this release: a keyed digest of domain, step, std and ``digest``. Equal names
            have equal noise; a new name is a new release and has to be paid for. May be published.

        Raises:
            InputError: a tensor of another type or layout, or in the list twice; std or scale out of
                range or not finite; a step that is no integer from 0 on; a digest that is not bytes.
        """
        flats = _checked(tensors)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InputError(f"NoiseSource.add got step={step!r}, wanted an integer from 0 on.")
        if not (std == 0 or 2.0**-60 <= std <= 2.0**60):
            raise InputError(f"NoiseSource.add got std={std!r}, wanted 0 or 2^-60 to 2^60.")
        if not math.isfinite(scale):
            raise InputError(f"NoiseSource.add got scale={scale!r}, wanted a finite number.")
        digest = self.digest(tensors) if digest is None else digest
        if not isinstance(digest, bytes):
            raise InputError(
                f"NoiseSource.add got digest={digest!r}, wanted bytes: NoiseSource.digest's."
            )
        name = self._prf(
            b"name", domain.encode(), str(step).encode(), struct.pack("<d", std), digest
        )
        if std:
            # Python's floats: the spacing is a power of two, exact in every type.
            spacing = math.ldexp(1.0, math.frexp(std)[1] - 1 - LATTICE_BITS)
            arrays = [flat.numpy() for flat in flats if _on_cpu(flat)]
            _add_on_cpu(arrays, std, scale, spacing, self._prf(b"bits", name, size=16))
            for index, flat in enumerate(flats):
                if not _on_cpu(flat):
                    seeds = self._prf(b"seeds", name, str(index).encode(), size=8 * DEVICE_DRAWS)
                    noise = _device_noise(flat, struct.unpack(f"<{DEVICE_DRAWS}q", seeds))
                    flat.mul_(1 / spacing).add_(noise, alpha=std / spacing)
                    flat.round_().mul_(spacing * scale)
        elif scale != 1.0:
            for flat in flats:
                flat.mul_(scale)
        for tensor, flat in zip(tensors, flats, strict=True):
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))
        return name

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: the key. SECRET for as long as the data are."""
        return {"version": 1, "key": self._key.hex(), "secure": self._secure}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the key that `state` gave.

        Raises:
            InputError: it is not such a state.
        """
        try:
            if set(state) != {"version", "key", "secure"} or state["version"] != 1:
                raise ValueError
            key, secure = bytes.fromhex(state["key"]), state["secure"]
            if len(key) != 32 or not isinstance(secure, bool):
                raise ValueError
        except (TypeError, ValueError):
            # No values: they may be secret.
            raise InputError(
                "The noise state is not one that NoiseSource.state() of this version gave: wanted "
                "version 1, a key of 64 hexadecimal digits, and whether it is secure. Resume from "
                "another checkpoint, or with the dpzoo that wrote this one."
            ) from None
        self._key, self._secure = key, secure

    def _prf(self, *parts: bytes, size: int = 32) -> bytes:
        return hashlib.blake2b(_packed(parts), key=self._key, digest_size=size).digest()

    def _tags(self, memories: list[memoryview]) -> list[bytes]:
        """The GMAC of every `SEGMENT` bytes. Secret: see above."""
        gmac, nonce = AESGCM(self._prf(b"gmac", size=16)), bytes(12)
        segments = [m[i : i + SEGMENT] for m in memories for i in range(0, len(m), SEGMENT)]
        return _parallel(lambda segment: gmac.encrypt(nonce, b"", segment), segments)

    def _folded(self, flats: list[torch.Tensor]) -> bytes:
        """A universal hash of tensors of one device, computed there. Secret, as tags are.

        The words of 32 bits are laid in rows of `WIDTH`. A row's hash is sum_j a_j w_j modulo 2^64, with
        secret a_j of 64 bits (Carter and Wegman 1981; Lemire and Kaser 2014, arXiv 1202.4961). Two
        different rows differ in a w_j, by a number with fewer than 32 factors of two: their hashes agree
        for at most 2^-32 of all a_j, and in all `LANES` for at most 2^-128.
        """
        device = flats[0].device
        key = self._prf(b"multipliers", size=16)
        bits = bytearray(_keystream(key, 0, 8 * LANES * WIDTH))
        multipliers = torch.frombuffer(bits, dtype=torch.int64).to(device).view(LANES, WIDTH)
        hashes: list[torch.Tensor] = []
        for block in _blocks([flat.view(torch.int32) for flat in flats]):
            missing = -len(block) % WIDTH
            rows = torch.nn.functional.pad(block, (0, missing)).view(-1, WIDTH)
            hashes += [(rows * lane).sum(dim=1) for lane in multipliers]
        return torch.cat(hashes).cpu().numpy().tobytes() if hashes else b""


def _add_on_cpu(
    arrays: list[np.ndarray], std: float, scale: float, spacing: float, key: bytes
) -> None:
    """Noise and rounding, chunk by chunk; chunk number i has the i-th range of counters."""
    chunks = [array[i : i + CHUNK] for array in arrays for i in range(0, len(array), CHUNK)]

    def one(job: tuple[int, np.ndarray]) -> None:
        index, chunk = job
        chunk *= 1 / spacing
        chunk += _gaussian(key, index, len(chunk), std / spacing, chunk.dtype)
        np.rint(chunk, out=chunk)
        chunk *= spacing * scale

    _parallel(one, list(enumerate(chunks)))


def _gaussian(key: bytes, index: int, count: int, std: float, dtype: Any) -> np.ndarray:
    """``count`` (at most `CHUNK`) draws of N(0, std^2), by Box and Muller from keyed bits.

    numpy and not torch: its logarithm, sine and cosine of float32 take a third of the time.
    """
    pairs = (count + 1) // 2
    angle_type = np.dtype(np.int32 if dtype == np.float32 else np.int64)
    bits = _keystream(key, index, (8 + angle_type.itemsize) * pairs)
    # u in [-1, 1] with 64 bits: as float32 too, its relative resolution is 2^-24 down to 2^-63.
    radius = np.frombuffer(bits, np.int64, pairs).astype(dtype)
    radius *= 2.0**-63
    radius *= radius
    np.maximum(radius, 2.0**-126, out=radius)  # where all bits are 0
    np.log(radius, out=radius)
    radius *= -(std**2)  # -ln u^2 = -2 ln |u|
    np.sqrt(radius, out=radius)
    angle = np.frombuffer(bits, angle_type, pairs, 8 * pairs).astype(dtype)
    angle *= math.pi / 2.0 ** (8 * angle_type.itemsize - 1)
    noise = np.empty((2, pairs), dtype)
    np.cos(angle, out=noise[0])
    np.sin(angle, out=noise[1])
    noise *= radius
    return noise.reshape(-1)[:count]


def _keystream(key: bytes, index: int, count: int) -> bytes:
    """``count`` bytes of AES in counter mode, from the counter ``index`` * 2^32 on."""
    encryptor = Cipher(
        algorithms.AES(key), modes.CTR((index << 32).to_bytes(16, "big"))
    ).encryptor()
    return encryptor.update(memoryview(_ZEROS)[:count])


def _parallel(do: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
    """``[do(job) for job in jobs]``, on as many threads as torch uses."""
    workers = min(torch.get_num_threads(), len(jobs))
    if workers <= 1:
        return [do(job) for job in jobs]
    results: list[Any] = [None] * len(jobs)
    with ThreadPoolExecutor(workers) as pool:
        shares = pool.map(lambda first: [do(job) for job in jobs[first::workers]], range(workers))
        for first, share in enumerate(shares):
            results[first::workers] = share
    return results


def _device_noise(like: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
    """N(0, 1) in the shape of ``like``, from its device's generator: the scaled sum of a few draws."""
    noise = torch.zeros_like(like)
    for seed in seeds:
        generator = torch.Generator(like.device).manual_seed(seed)
        noise += torch.empty_like(like).normal_(generator=generator)
    return noise.mul_(DEVICE_DRAWS**-0.5)


@functools.cache
def _arithmetic(device: str) -> bytes:
    """A digest of the noise that a device makes of fixed bits."""
    if device == "cpu":
        draws = [_gaussian(bytes(16), 0, 4096, 1.0, np.dtype(t)) for t in (np.float32, np.float64)]
    else:
        # More than a device draws at once: how many that is decides which number goes where.
        like = torch.empty(1 << 21, device=device)
        draws = [_device_noise(like, range(DEVICE_DRAWS)).cpu().numpy()]
    return hashlib.blake2b(b"".join(d.tobytes() for d in draws), digest_size=16).digest()


def _blocks(words: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors' words, in order, in pieces of at most `BLOCK`."""
    held: list[torch.Tensor] = []
    for piece in (piece for tensor in words for piece in tensor.split(BLOCK)):
        if held and sum(map(len, held)) + len(piece) > BLOCK:
            yield torch.cat(held)
            held = []
        held.append(piece)
    if held:
        yield torch.cat(held)


def _checked(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Flat views of tensors that noise can be added to, (numel,); copies of those that are not contiguous.

    Raises:
        InputError: a tensor that it cannot be added to.
    """
    seen: set[tuple[torch.device, int]] = set()
    for index, tensor in enumerate(tensors):
        got = None
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            got, way = type(tensor).__name__, "Pass the plain tensor (DTensor.to_local() is one)."
            if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided:
                got, way = f"layout {tensor.layout}", "Pass tensor.to_dense()."
        elif tensor.dtype not in (torch.float32, torch.float64):
            got, way = (
                f"dtype {tensor.dtype}",
                "Sums and noise are float32 or wider: sum in float32.",
            )
        elif any(
            n > 1 and not stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            got, way = "an expanded tensor", "Its elements are overlapping: pass a copy."
        elif tensor.numel() and (tensor.device, tensor.data_ptr()) in seen:
            got, way = "a tensor that is in the list already", "Pass each tensor once."
        if got:
            raise InputError(
                f"NoiseSource got {got} as tensor {index}, wanted float32 or float64 tensors, each of "
                f"its own memory. {way}"
            )
        seen.add((tensor.device, tensor.data_ptr()))
    return [tensor.detach().contiguous().view(-1) for tensor in tensors]


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _memory(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _packed(parts: Iterable[bytes]) -> bytes:
    """The parts, each after its length: no two lists of parts give the same bytes."""
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)
