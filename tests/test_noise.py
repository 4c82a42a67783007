"""The generator against its definition and by statistics; the path by its law, which is exact:
draws are linear combinations of independent normals, so covariances are sums over weights."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import zlib
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

import fewstep as fs
from accounting import BOTH, Operations
from fewstep import _combine, _noise
from fewstep._noise import BrownianPath, Called, Draw, Given, Noise, as_source, start_noise

LEVEL = fs.EDM().level(1.0)
CELL = 1 / 256


def step(a, b, tag=0):
    return Draw(LEVEL, LEVEL, (a, b), tag)


FREE = Draw(LEVEL, LEVEL)


@pytest.fixture(params=BOTH)
def way(request, monkeypatch):
    monkeypatch.setattr(_combine, "KERNEL", request.param)


# The generator


def keys(k, m, rounds=10):
    return [((k + r * 0x9E3779B9) % 2**32, (m + r * 0xBB67AE85) % 2**32) for r in range(rounds)]


ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, words: the authors' published vectors for philox4x32 of 10 rounds
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert _noise._philox(counter, keys(*key)) == words
    tensors = tuple(torch.tensor([c, 0, c]) for c in counter)
    got = _noise._philox(tensors, keys(*key))
    assert [(int(w[0]), int(w[2])) for w in got] == [(w, w) for w in words]


def test_a_value_is_the_word_of_its_counter(way):
    """The layout that the module documents, and that files and other programs may rely on."""
    seed, index, number, count = 2**40 + 12345, 7, 2**33, 200
    z = Noise(seed, index).draw(FREE, number, torch.empty(1, count))[0]
    position = number + 1
    for e in (0, 1, 15, 16, 47, 63, 64, 130, 199):
        group, word, lane = e // 64, e % 64 // 16, e % 16
        counter = (16 * group + lane, index, position % 2**32, position >> 32)
        bits = _noise._philox(counter, keys(seed % 2**32, seed >> 32))[word]
        assert z[e] == _noise._normal(torch.tensor([bits]))[0]
        p = (Fraction(bits >> 1) + Fraction(1, 2)) / 2**32
        true = math.copysign(float(inverse(p)), 1 if bits & 1 else -1)
        assert abs(float(z[e]) - true) < 5e-7


def inverse(p):
    """Phi^-1 in 40 digits."""
    with mpmath.workdps(40):
        u = 2 * mpmath.mpf(p.numerator) / p.denominator - 1
        return mpmath.sqrt(2) * mpmath.erfinv(u)


def test_inverse_of_the_normal_distribution():
    generator = np.random.default_rng(0)
    edges = [2**i + d for i in range(2, 31) for d in (-1, 0, 1)]
    k = np.unique([0, 1, 2, *edges, 2**31 - 1, 2**31 - 100, *generator.integers(0, 2**31, 500)])
    k = np.unique(np.concatenate([k, (2.0 ** generator.uniform(0, 31, 500)).astype(np.int64)]))
    z = _noise._normal(torch.from_numpy(2 * k))
    true = np.array([float(inverse(Fraction(2 * int(i) + 1, 2**33))) for i in k])
    error, size = np.abs(z.double().numpy() - true), np.abs(true)
    assert (error <= np.maximum(8e-8, 2.0**-22 * size)).all()
    density = np.exp(-(size**2) / 2) / math.sqrt(2 * math.pi)
    assert (error * density).max() < 4e-8  # the error of the distribution function
    assert torch.equal(_noise._normal(torch.from_numpy(2 * k + 1)), -z)
    assert (np.diff(z.numpy()) >= 0).mean() == 1  # in the order of the distribution function
    assert z[0] == np.float32(-6.3379579)


def test_the_bits_are_those_of_the_first_release(way):
    """Changing any of these changes everybody's samples."""
    assert zlib.crc32(_noise._cubics().tobytes()) == TABLE
    noise = Noise(1234, 5, path=True)
    like = torch.empty(3, 70)
    values = [
        noise.start((3, 70)),
        noise.draw(FREE, 0, like),
        noise.draw(step(0.5, -0.25), 0, like),
    ]
    assert [zlib.crc32(v.numpy().tobytes()) for v in values] == BITS


TABLE, BITS = 1045031454, [740324301, 1190694964, 2020596235]


def everything(noise, shape, dtype=torch.float32):
    """Start, two independent draws and two of a path, stacked behind the batch."""
    like = torch.empty(shape, dtype=dtype)
    parts = [noise.start(shape, dtype), noise.draw(FREE, 0, like), noise.draw(FREE, 1, like)]
    parts += [noise.draw(step(1.0, 0.3), 2, like), noise.draw(step(0.3, -math.inf, 1), 3, like)]
    assert all(z.shape == like.shape and z.dtype == dtype for z in parts)
    return torch.stack(parts, 1)


SHAPES = [
    (),
    (1,),
    (2,),
    (16,),
    (17,),
    (63,),
    (64,),
    (65,),
    (3, 5, 7),
    (2, 3, 4, 5, 2),
    (4, 40, 40),
]


@pytest.mark.parametrize("one", SHAPES, ids=str)
def test_a_sample_is_the_same_in_every_batch(way, one):
    noise = Noise(2**63 + 11, path=True)
    z = everything(noise, (7, *one))
    for batch in (1, 4):
        parts = []
        for i in range(0, 7, batch):
            part = Noise(2**63 + 11, first=i, path=True)
            parts.append(everything(part, (min(batch, 7 - i), *one)))
        assert torch.equal(torch.cat(parts), z)
    order = [5, 2, 2, 6]
    taken = noise.take(order, 7)
    assert torch.equal(everything(taken, (4, *one)), z[order])
    assert torch.equal(everything(taken.take([3, 0], 4), (2, *one)), z[[6, 5]])
    seeds = Noise([3, 2**63 + 11, 3], path=True)
    mixed = everything(seeds, (3, *one))
    assert torch.equal(mixed[1], z[0])
    assert torch.equal(mixed[0], mixed[2])
    assert torch.equal(everything(seeds.take([1, 2], 3), (2, *one)), mixed[[1, 2]])
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(everything(noise, (7, *one), dtype), z.to(dtype))


def test_both_ways_threads_and_blocks_give_the_same_bits(monkeypatch):
    noise, threads = Noise(5, path=True), torch.get_num_threads()
    shapes = [(1, 20000), (3, 9001), (200, 33), (0, 3), (3, 0)]

    def run():
        return [everything(noise, shape) for shape in shapes]

    want = run()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for kernel in (True, False):
                monkeypatch.setattr(_combine, "KERNEL", kernel)
                for block in (1 << 9, 1 << 20):
                    monkeypatch.setitem(_noise._BLOCK, "cpu", block)
                    assert all(map(torch.equal, run(), want))
    finally:
        torch.set_num_threads(threads)


PROGRAM = """
import torch, zlib
from fewstep._noise import Noise, Draw
import fewstep as fs
level = fs.EDM().level(1.0)
noise = Noise(9, first=2, path=True)
like = torch.empty(2, 1000)
torch.manual_seed(0)
for z in (noise.start((2, 1000)), noise.draw(Draw(level, level, (0.1, 0.7)), 0, like)):
    print(zlib.crc32(z.numpy().tobytes()))
"""


def test_another_process_gives_the_same_bits():
    texts = set()
    for kernel in ("1", "0"):
        environment = {**os.environ, "FEWSTEP_KERNEL": kernel, "OMP_NUM_THREADS": "1"}
        texts.add(subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment))
    noise, like = Noise(9, path=True), torch.empty(4, 1000)
    here = [noise.start((4, 1000))[2:], noise.draw(step(0.1, 0.7), 0, like)[2:]]
    assert texts == {b"".join(b"%d\n" % zlib.crc32(z.numpy().tobytes()) for z in here)}


EXACT = {"mul", "add", "sub", "rsub", "bitwise_and", "bitwise_or", "bitwise_xor"}
EXACT |= {"__and__", "__or__", "__xor__", "__rshift__", "bitwise_right_shift"}
MOVES = {"index_select", "stack", "cat", "arange", "full", "empty", "view", "slice", "select"}
MOVES |= {"_unsafe_view", "unbind", "unsqueeze", "expand", "alias", "detach", "as_strided"}


class Exact(Operations):
    """Only operations that every device rounds alike, in types that every device has, and tensors
    of one device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        assert name in EXACT or name in MOVES or name.removesuffix("_") in EXACT, name
        assert kwargs.get("alpha", 1) == 1  # a product and a sum, which may be fused
        allowed = (torch.int64, torch.int32, torch.float32)
        tensors = [v for v in (*args, *kwargs.values(), out) if isinstance(v, torch.Tensor)]
        assert all(v.dtype in allowed for v in tensors)
        assert len({v.device for v in tensors if v.ndim} | {torch.device(self.device)}) == 1
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_independent_by_construction(device):
    """Also: after the first call nothing is read and nothing copied, from the host or to it."""
    noise = Noise((3, 4), path=True)
    like = torch.empty(2, 300, device=device)
    noise.draw(step(2.0, 1.0), 0, like)
    watch = Exact()
    watch.device = device
    with watch:
        start = noise.start((2, 300), device=device)
        draws = [noise.draw(step(1.0, 0.3), 0, like), noise.draw(FREE, 1, like)]
    assert sum(watch.names.values()) > 100
    for z in (start, *draws):
        assert (z.shape, z.device.type) == (like.shape, device)
    if device == "cpu":
        assert torch.equal(draws[0], noise.draw(step(1.0, 0.3), 0, like))


# Statistics


def failures(z):
    """What is suspicious about (seeds, samples, positions, elements) of alleged standard normals:
    more than 5 standard errors, that is, less than once in 10^6 checks."""
    n, flat = z.size, z.reshape(-1)
    found = []

    def check(what, value, error=1.0):
        if not abs(value) <= 5 * error:
            found.append(f"{what}: {value / error:.1f}")

    def moment(k):
        return math.prod(range(k - 1, 0, -2)) if k % 2 == 0 else 0

    power = np.ones_like(flat)
    for k in range(1, 9):
        power *= flat
        error = math.sqrt((moment(2 * k) - moment(k) ** 2) / n)
        check(f"moment {k}", power.mean() - moment(k), error)
    u = ndtr(np.sort(flat))
    gap = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
    check("Kolmogorov-Smirnov", gap * math.sqrt(n), 2.75 / 5)
    for edge in (0.01, 1.0, 2.0, 3.0, 4.0, 4.5):
        p = 2 * ndtr(-edge)
        check(f"beyond {edge}", (np.abs(flat) > edge).mean() - p, math.sqrt(p * (1 - p) / n))
    for name, value in (("z", z), ("z^2", (z**2 - 1) / math.sqrt(2))):
        for axis, lags in enumerate(((1, 2), (1, 2), (1, 2), (1, 2, 3, 4, 16, 48, 64))):
            for lag in lags:
                a = np.take(value, range(lag, value.shape[axis]), axis)
                b = np.take(value, range(value.shape[axis] - lag), axis)
                check(f"{name}, axis {axis}, lag {lag}", (a * b).sum() / math.sqrt(a.size))
    return found


def sampled(per, seeds=5, samples=5, positions=5):
    out = np.empty((seeds, samples, positions, per))
    for s in range(seeds):
        noise, like = Noise(s), torch.empty(samples, per)
        for p in range(positions):
            out[s, :, p] = noise.draw(FREE, p, like).numpy()
    return out


def test_standard_normal_and_uncorrelated():
    assert failures(sampled(8000)) == []  # 10^6


@pytest.mark.slow
def test_standard_normal_and_uncorrelated_slow():
    assert failures(sampled(80_000)) == []  # 10^7


@pytest.mark.slow
def test_path_is_standard_normal_and_uncorrelated_slow():
    """Seeds, samples, neighbouring steps, elements."""
    out = np.empty((5, 5, 40, 10_000))
    for s in range(5):
        noise, like = Noise(s, path=True), torch.empty(5, 10_000)
        for p in range(40):
            out[s, :, p] = noise.draw(step(3 - 0.1 * p, 2.9 - 0.1 * p), p, like).numpy()
    assert failures(out) == []


def few_rounds(count, monkeypatch):
    philox = _noise._philox
    monkeypatch.setattr(_combine, "KERNEL", False)

    def weak(counter, keys):
        words = philox(counter, keys[:count])
        return torch.broadcast_tensors(*words)

    monkeypatch.setattr(_noise, "_philox", weak)


def test_statistics_find_bad_generators(monkeypatch):
    good = sampled(800)
    assert failures(good) == []
    weyl = np.arange(good.size) * 0.6180339887498949 % 1
    from scipy.special import ndtri

    assert failures(ndtri(weyl.clip(1e-9)).reshape(good.shape))
    assert failures(good * 1.02)
    assert failures(good + 0.02)
    assert failures(np.where(np.abs(good) > 3, good * 0.9, good))
    shared = good.copy()
    shared[1:] = shared[:-1] * 0.1 + shared[1:] * math.sqrt(0.99)
    assert failures(shared)
    with monkeypatch.context() as patch:
        few_rounds(2, patch)
        assert failures(sampled(800))


# The path


def law(*terms):
    """Covariances of linear combinations of nodes, given as terms of `_noise` or weights."""
    maps = [
        dict(t) if isinstance(t, dict) else {(low, high): c for c, low, high in t} for t in terms
    ]
    return np.array([[sum(c * b.get(n, 0.0) for n, c in a.items()) for b in maps] for a in maps])


def innovation(a, b, cell=CELL):
    return _noise._innovation(float(a), float(b), cell, 1)


def test_the_process_has_its_covariance():
    places = [
        -700.5,
        -16.0,
        -15.99,
        -3.0,
        -0.01,
        0.0,
        0.37,
        2 * CELL,
        CELL,
        1.0,
        8.0,
        15.9,
        17.1,
        40,
    ]
    got = law(*(_noise._path(float(E), CELL) for E in places))
    want = np.exp(-np.abs(np.subtract.outer(places, places)))
    assert np.abs(got - want).max() < 3e-7  # e^-16, which the roots leave out


places = st.floats(-30, 30).map(lambda E: round(E, 7))


@settings(deadline=None, max_examples=150)
@given(st.lists(places, min_size=3, max_size=6, unique=True), st.booleans())
def test_steps_are_independent_and_add_up(path, upward):
    path = sorted(path, reverse=upward)
    cell = CELL
    if min(abs(a - b) for a, b in pairwise(path)) < CELL:
        cell = 2.0**-30  # longer and shorter steps meet: the cell of the shortest
    steps = [innovation(a, b, cell) for a, b in pairwise(path)]
    covariance = law(*steps)
    assert np.abs(covariance - np.eye(len(steps))).max() < 2e-6
    total: dict = {}
    for (a, b), terms in zip(pairwise(path), steps, strict=True):
        scale = math.sqrt(-math.expm1(-2 * abs(a - b))) * math.exp(-abs(path[-1] - b))
        for c, low, high in terms:
            total[low, high] = total.get((low, high), 0.0) + scale * c
    scale = math.sqrt(-math.expm1(-2 * abs(path[0] - path[-1])))
    whole = {(low, high): scale * c for c, low, high in innovation(path[0], path[-1], cell)}
    for n in total.keys() | whole.keys():
        assert abs(total.get(n, 0.0) - whole.get(n, 0.0)) < 3e-7


@pytest.mark.parametrize("length", [0.3, 1e-2, 1e-3, 1e-6, 1e-9])
def test_steps_of_any_length_are_standard_normal_and_independent(length):
    path = 0.7354 - length * np.arange(40)
    steps = [innovation(a, b) for a, b in pairwise(path)]
    assert np.abs(law(*steps) - np.eye(39)).max() < 2e-6


def test_steps_from_two_kinds_of_cells_are_nearly_independent():
    """What the docstring of `Noise` warns of: the defect at one change, and that it is a defect."""
    worst = 0.0
    for offset in np.linspace(0.05, 0.95, 19) * CELL:
        a, b = 0.5 + offset + 1.01 * CELL, 0.5 + offset
        path = b - 0.2 * CELL * np.arange(6)
        steps = [
            innovation(a, b),
            *(innovation(c, d) for c, d in pairwise(path)),
        ]
        covariance = law(*steps)
        assert np.abs(np.diag(covariance) - 1).max() < 2e-6
        worst = max(worst, np.abs(covariance - np.diag(np.diag(covariance))).max())
    assert 0.01 < worst < 0.34


def test_a_coarse_step_is_made_of_fine_ones(way):
    """In tensors; and fresh draws, which are not, would fail."""
    like, fine = torch.empty(3, 2000), np.linspace(2.0, -1.5, 41)
    for path in (True, False):
        noise = Noise(3, path=path)
        total = torch.zeros(3, 2000, dtype=torch.float64)
        for k, (a, b) in enumerate(pairwise(fine)):
            d = a - b
            z = noise.draw(step(a, b), k, like)
            total = math.exp(-d) * total + math.sqrt(-math.expm1(-2 * d)) * z
        total /= math.sqrt(-math.expm1(-7.0))
        error = (total - noise.draw(step(2.0, -1.5), 41, like)).abs().max()
        assert (error < 3e-6) if path else (error > 1)


def test_any_place_and_order(way):
    noise, like = Noise(8, path=True), torch.empty(2, 500)
    clocks = [(0.0, -1.0), (-1.0, -math.inf), (math.inf, 0.0), (-math.inf, math.inf)]
    clocks += [(5e5, -5e5), (700.0, 699.0), (1e-10, -1e-10), (16.0, 32.0), (1e-9, 0.0)]
    first = [noise.draw(step(*c), 0, like) for c in clocks]
    _noise._innovation.cache_clear()
    again = [noise.draw(step(*c), 7, like) for c in reversed(clocks)][::-1]
    assert all(map(torch.equal, first, again))
    assert all(abs(z.std() - 1) < 0.12 and z.isfinite().all() for z in first)
    # From and to infinity it is the value there.
    assert torch.equal(first[3], noise.draw(step(3.0, math.inf), 0, like))
    others = [noise.draw(step(0.0, -1.0, tag=1), 0, like), noise.start((2, 500))]
    others += [Noise(8, first=2, path=True).draw(step(0.0, -1.0), 0, like)]
    for other in others:
        assert abs((other * first[0]).mean()) < 5 / math.sqrt(1000)


def test_brownian_path(way):
    path, shape = BrownianPath(4), (2, 10_000)
    assert torch.equal(path(0.0, shape), torch.zeros(shape))
    for a, b in [(0.0, 14.6), (0.03, 14.6), (3.0, 5.0), (5.0, 3.0), (0.0, 1e-30), (1e30, 2e30)]:
        w = path.increment(a, b, shape, torch.float64)
        scale = max(a, b)
        variance = abs((a / scale) ** 2 - (b / scale) ** 2)
        assert abs((w / scale).var() / variance - 1) < 5 * math.sqrt(2 / 20_000)
        assert torch.equal(path.increment(b, a, shape, torch.float64), -w)
        for c in (0.0, 0.3 * scale, 7 * scale):
            two = path.increment(a, c, shape, torch.float64) + path.increment(
                c, b, shape, torch.float64
            )
            assert (two - w).abs().max() < 1e-5 * max(scale, c)
    rho = (14.6, 2.0, 0.3, 0.01)
    w = torch.stack([path(r, shape, torch.float64) / r for r in rho])
    want = np.exp(-np.abs(np.subtract.outer(np.log(rho), np.log(rho))))
    got = (w.view(4, -1) @ w.view(4, -1).T / w[0].numel()).numpy()
    assert np.abs(got - want).max() < 5 * math.sqrt(2 / 20_000)
    # The same path as that of draws whose clock is log(rho).
    noise = Noise(4, path=True, resolution=path.resolution)
    z = noise.draw(step(math.log(2.0), math.log(0.3)), 0, torch.empty(shape))
    mine = (path(0.3, shape) / 0.3 - 0.15 * path(2.0, shape) / 2.0) / math.sqrt(1 - 0.15**2)
    assert (z - mine).abs().max() < 1e-5


# The other sources, and what is refused


def test_given_and_called():
    draws = [start_noise((2, 3), 0), start_noise((2, 3), 1)]
    like = torch.empty(2, 3, dtype=torch.float64)
    for source in (as_source(draws), as_source(torch.stack(draws)), as_source(tuple(draws))):
        assert isinstance(source, Given)
        assert torch.equal(source.draw(FREE, 1, like), draws[1].double())
        with pytest.raises(ValueError, match=r"^noise: 2 draws are given, but the plan asks for"):
            source.draw(FREE, 2, like)
        with pytest.raises(ValueError, match=r"^noise: draw 0 has shape \(2, 3\)"):
            source.draw(FREE, 0, torch.empty(3, 3))
    seen = []

    def function(draw, like):
        seen.append(draw)
        return draws[0]

    source = as_source(function)
    assert isinstance(source, Called)
    assert torch.equal(source.draw(step(1.0, 2.0), 5, like), draws[0].double())
    assert seen == [step(1.0, 2.0)]
    with pytest.raises(ValueError, match=r"^noise: draw 5 has shape"):
        source.draw(FREE, 5, torch.empty(4, 3))
    with pytest.raises(ValueError, match=r"^noise: draw 5 is int; need a floating-point tensor"):
        Called(lambda draw, like: 3).draw(FREE, 5, like)
    with pytest.raises(ValueError, match=r"^noise: there are no draws"):
        Given([])
    with pytest.raises(ValueError, match=r"^noise: draw 1 is not finite"):
        Given([draws[0], draws[1] / 0])
    with pytest.raises(ValueError, match=r"^noise: draw 0 is torch.int64"):
        Given(torch.zeros(2, 3, dtype=torch.int64))


def test_as_source():
    noise = Noise(3)
    assert as_source(noise) is noise
    assert as_source(3) == noise
    assert as_source(np.int64(3)) == noise
    assert as_source([3, 4]) == Noise((3, 4))
    for wrong in (None, "seed", [], True, 1.5, [1, "a"]):
        with pytest.raises(ValueError, match=r"^(noise|seed) = "):
            as_source(wrong)


@pytest.mark.parametrize(
    "noise",
    [
        Noise(),
        Noise(2**64 - 1, 3, True, 0.01),
        Noise([1, 2**63], path=True),
        Noise(1, indices=(5, 0)),
        Noise((1, 2), indices=(5, 0)),
    ],
    ids=str,
)
def test_noise_can_be_kept(noise):
    for copy in (
        pickle.loads(pickle.dumps(noise)),
        Noise.from_description(json.loads(json.dumps(noise.describe()))),
    ):
        assert copy == noise
        assert hash(copy) == hash(noise)
        assert torch.equal(copy.start((2, 3)), noise.start((2, 3)))
    with pytest.raises(ValueError, match=r"^description has \['seed'\]; need seed, first,"):
        Noise.from_description({"seed": 1})


LIKE = torch.empty(2, 3)
WRONG = [
    ("seed", lambda: Noise(-1)),
    ("seed", lambda: Noise(2**64)),
    ("seed", lambda: Noise(1.5)),
    ("seed", lambda: Noise("7")),
    ("seed", lambda: Noise([1, -1])),
    ("seed has 3 entries for 2 samples", lambda: Noise([1, 2, 3]).start((2, 3))),
    ("first", lambda: Noise(0, -1)),
    ("first", lambda: Noise([0, 1], 1)),
    ("first", lambda: Noise(0, 2**32 - 1).start((2, 3))),
    ("resolution", lambda: Noise(resolution=0.0)),
    ("resolution", lambda: Noise(resolution=float("nan"))),
    ("resolution", lambda: BrownianPath(resolution=17)),
    ("indices", lambda: Noise(indices=(1, -1))),
    ("indices", lambda: Noise((1, 2), indices=(1,))),
    ("indices has 1 entries", lambda: Noise(indices=(1,)).start((2, 3))),
    ("number", lambda: Noise().draw(FREE, -1, LIKE)),
    ("shape", lambda: Noise().start(())),
    ("dtype", lambda: Noise().start((2, 3), torch.int64)),
    ("samples", lambda: Noise().take([2], 2)),
    ("samples", lambda: Noise().take([-1], 2)),
    ("clock", lambda: step(1.0, 1.0)),
    ("clock", lambda: step(math.inf, math.inf)),
    ("clock", lambda: step(1.0, math.nan)),
    ("clock", lambda: step(1.0, 1e6)),
    ("clock", lambda: Noise(path=True).draw(step(1.0, 1.0 + 1e-14), 0, LIKE)),
    ("tag", lambda: step(1.0, 2.0, 255)),
    ("a", lambda: BrownianPath().increment(-1.0, 1.0, (2, 3))),
    ("b", lambda: BrownianPath()(math.inf, (2, 3))),
]


@pytest.mark.parametrize(("name", "call"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_refused_in_a_sentence(name, call):
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(name)
    assert "\n" not in text
