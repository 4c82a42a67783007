"""Noise as a function: a value depends on (seed, sample index, position, element) alone.

Sample k of a run is therefore the same whatever the batch, its order, the split over calls or
processes, and the device.

Bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), key = the seed, counter = (c, sample index, position). Element 64 g + 16 w + l of a
sample is word w of the counter c = 16 g + l.

Normals: a word is a sign and k < 2^31; the value is the inverse normal CDF at (k + 1/2) / 2^32, a
cubic on each sixteenth of each octave, within 8e-8 of a value of order 1 and two units in the last
place of any. Values reach 6.34 and are float32 numbers, also in a wider dtype. Integer operations,
float32 products and sums rounded one by one, and a table made on the host are all there is. Every
device rounds these alike, so the bits are the same everywhere. (A compiler that contracts a
product and a sum, as torch.compile may, changes last bits.)

A Brownian path: M, Brownian in a clock q, is R = M / sqrt(q), which is the stationary
Ornstein-Uhlenbeck process in E = log(q) / 2, of covariance exp(-|E - E'|). R is made from
independent normals at the multiples of 16 (their correlation, 1e-7, is left out) and from dyadic
midpoints,

    R(m) = (R(m - d) + R(m + d)) / (2 cosh d) + sqrt(tanh d) Z,

down to cells of a given length, within which it is the bridge with one normal for the cell. That
is exact in law at places in different cells; places within one are too much alike. Between nodes
the means are combinations of sinh, which later midpoints leave as they are, hence

    R(E) = sum over the levels of  sqrt(tanh d) sinh(d - |E - m|) / sinh(d)  Z(m),

one linear combination of counter normals with coefficients from the host.

All this exists twice, with the same bits: in tensor operations, which run anywhere, and in
`_kernel.c` for the CPU.
"""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _combine
from ._process import Level

try:
    from ._kernel import normals as _kernel
except ImportError:  # installed without a compiler
    _kernel = None

__all__ = [
    "BrownianPath",
    "Called",
    "Draw",
    "Given",
    "Noise",
    "Source",
    "as_source",
    "start_noise",
]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
#: Counters of a block: int64 temporaries that stay in a CPU's second-level cache; elsewhere enough
#: for a device to be busy.
_BLOCK = {"cpu": 1 << 13}
_LARGE_BLOCK = 1 << 20
#: Normals that are worth a thread.
_GRAIN = 1 << 15

#: Distance of the independent values of the path, in E.
_ROOT = 16
#: The node at E has the position E 2^36 (56 bits) in the stream of its path.
_FRACTION = 36
_FARTHEST = 2.0 ** (55 - _FRACTION) - _ROOT
#: The smallest cell has a middle that still has a position.
_SMALLEST_CELL = 2.0 ** (1 - _FRACTION)
#: A step shorter than a cell is taken from cells so many times smaller.
_FINER = 1 << 12
#: Weights up to this are left out.
_NEGLIGIBLE = 1e-9

#: A weight, and the low and the high word of a position.
Term = tuple[float, int, int]
Words = tuple[Any, Any, Any, Any]


def _philox(counter: Words, keys: Sequence[tuple[Any, Any]]) -> Words:
    """The four words of a counter, int64 tensors or ints in [0, 2^32). keys: one pair per round."""
    a, b, c, d = counter
    for k, m in keys:
        # x M = x (M - 2^32) + 2^32 x, where the first product fits in a signed 64-bit integer.
        p, q = a * (_MULTIPLIERS[0] - 2**32), c * (_MULTIPLIERS[1] - 2**32)
        a, b, c, d = ((q >> 32) + c) ^ b ^ k, q & _WORD, ((p >> 32) + a) ^ d ^ m, p & _WORD
    return a, b, c, d


@lru_cache(maxsize=1)
def _cubics() -> NDArray[np.float32]:
    """The coefficients, (513, 4): Phi^-1(f / 2^32) for f = 2^e (1 + (s + 1/2) / 16 + x),
    |x| <= 1/32, in row 16 (e + 1) + s; f is in [1/2, 2^31].

    Taylor's polynomial of degree 4, its last term economised with T_4. Derivatives in closed form:
    what the last bits of the host's logarithm do is lost in rounding to float32.
    """
    normal, h = NormalDist(), 1 / 32
    rows = []
    for i in range(32 * 16 + 1):
        octave = 2.0 ** (i // 16 - 33)
        # The last row serves f = 2^31 alone, at x = -h.
        z = normal.inv_cdf(octave * (1 + (i % 16 + 0.5) / 16))
        s = octave * math.sqrt(2 * math.pi) * math.exp(z * z / 2)
        last = (7 * z + 6 * z**3) * s**4 / 24
        second, third = z * s**2 / 2 + last * h**2, (1 + 2 * z * z) * s**3 / 6
        rows.append((z - last * h**4 / 8, s, second, third))
    return np.array(rows, dtype=np.float32)


@lru_cache(maxsize=32)
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The coefficients, and 1/2: an integer tensor plus this is float32 on every device."""
    with torch.inference_mode(False):
        return torch.from_numpy(_cubics()).to(device), torch.full(
            (), 0.5, dtype=torch.float32, device=device
        )


def _normal(word: Tensor) -> Tensor:
    """Standard normals in float32 from int64 words in [0, 2^32)."""
    table, half = _table(word.device)
    bits = ((word >> 1) + half).view(torch.int32)
    x = ((bits & 0x7FFFF) | 0x3F800000).view(torch.float32) - (1 + 1 / 32)
    index = ((bits >> 19) - 126 * 16).view(-1)
    z = table[:, 3].index_select(0, index).view(word.shape)
    for row in (2, 1, 0):
        z = z * x + table[:, row].index_select(0, index).view(word.shape)
    return z * (1 - 2 * (word & 1))


@lru_cache(maxsize=16)
def _lanes(
    seeds: int | tuple[int, ...], indices: int | tuple[int, ...], batch: int, device: torch.device
) -> Tensor:
    """For every sample its index and the keys of the rounds, (batch, 21), int64."""
    out = np.empty((batch, 1 + 2 * _ROUNDS), dtype=np.int64)
    out[:, 0] = indices + np.arange(batch) if isinstance(indices, int) else indices
    seed = np.array(seeds, dtype=np.uint64)
    for i, word in enumerate((seed & np.uint64(_WORD), seed >> np.uint64(32))):
        for r in range(_ROUNDS):
            out[:, 1 + 2 * r + i] = (word.astype(np.int64) + r * _WEYL[i]) & _WORD
    with torch.inference_mode(False):
        return torch.from_numpy(out).to(device)


def _combination(terms: Sequence[Term], lanes: Tensor, count: int) -> Tensor:
    """sum c z(position) over the terms in their order, (batch, count), float32."""
    out = torch.empty(len(lanes), count, dtype=torch.float32, device=lanes.device)
    if not _by_kernel(terms, lanes, out):
        _by_tensors(terms, lanes, out)
    return out


def _by_kernel(terms: Sequence[Term], lanes: Tensor, out: Tensor) -> bool:
    """By the kernel, where it applies: it sees addresses and nothing else."""
    if (
        _kernel is None
        or not _combine.KERNEL
        or not out.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    threads = max(1, min(torch.get_num_threads(), out.numel() * len(terms) // _GRAIN))
    parallel = _combine._parallel() if threads > 1 else 0
    table = _table(out.device)[0].data_ptr()
    shape, place = out.shape, out.data_ptr()
    flat = (v for term in terms for v in term)
    _kernel(parallel, threads, *shape, place, table, lanes.data_ptr(), *flat)
    return True


def _by_tensors(terms: Sequence[Term], lanes: Tensor, out: Tensor) -> None:
    batch, count = out.shape
    index, *keys = lanes.view(*lanes.shape, 1, 1).unbind(1)
    rounds = list(zip(keys[::2], keys[1::2], strict=True))
    block = _BLOCK.get(out.device.type, _LARGE_BLOCK)
    # Samples of less than 64 elements need no more than the counters of these.
    width, words = min(16, count), min(4, -(-count // 16))
    groups = -(-count // 64)
    size = max(1, min(groups, block // max(1, batch * width)))
    together = max(1, min(len(terms), block // max(1, batch * width * size)))
    for g in range(0, groups, size):
        first = torch.arange(16 * g, 16 * min(g + size, groups), device=out.device)
        first = first.view(-1, 16)[:, :width]
        part = out[:, 64 * g : 64 * (g + size)]
        for i in range(0, len(terms), together):
            some = terms[i : i + together]
            low, high = (_column([int(term[k]) for term in some], out.device) for k in (1, 2))
            bits = torch.stack(_philox((first, index, low, high), rounds)[:words], -2)
            z = _normal(bits).flatten(2)[..., : part.shape[1]]
            for j, (c, _, _) in enumerate(some):
                # Not `add_(alpha=)`, which rounds once or twice, as it likes.
                if i == j == 0:
                    torch.mul(z[j], c, out=part)
                else:
                    part.add_(z[j] * c)


def _column(values: list[int], device: torch.device) -> Tensor:
    """The values along the first of four axes, without a copy from the host."""
    full = [torch.full((1, 1, 1, 1), v, dtype=torch.int64, device=device) for v in values]
    return full[0] if len(full) == 1 else torch.cat(full)


def _term(c: float, position: int, kind: int) -> Term:
    position &= (1 << 56) - 1
    return float(np.float32(c)), position & _WORD, position >> 32 | kind << 24


def _path(E: float, cell: float) -> dict[int, float]:
    """R(E) as {position of a node: weight}."""
    root = math.floor(E / _ROOT)
    x = E - _ROOT * root  # exact; places count from this root from here on
    base, whole = root * _ROOT << _FRACTION, math.sinh(_ROOT)
    weights = {base: math.sinh(_ROOT - x) / whole}
    a, width = 0.0, float(_ROOT)
    if x:
        weights[base + (_ROOT << _FRACTION)] = math.sinh(x) / whole
    while x != a:
        d = width / 2
        m = a + d
        if width > cell:
            weight = math.sqrt(math.tanh(d)) * math.sinh(d - abs(x - m)) / math.sinh(d)
        else:
            weight = math.sqrt(2 * math.sinh(x - a) * math.sinh(a + width - x) / math.sinh(width))
        weights[base + int(math.ldexp(m, _FRACTION))] = weight
        if width <= cell:
            break
        a, width = (a if x < m else m), d
    return weights


def _sum(terms: Sequence[tuple[float, Mapping[int, float]]], kind: int) -> tuple[Term, ...]:
    total: dict[int, float] = {}
    for c, nodes in terms:
        for n, weight in nodes.items():
            total[n] = total.get(n, 0.0) + c * weight
    return tuple(_term(c, n, kind) for n, c in total.items() if abs(c) > _NEGLIGIBLE)


@lru_cache(maxsize=4096)
def _innovation(a: float, b: float, cell: float, kind: int) -> tuple[Term, ...]:
    """(R(b) - e^-d R(a)) / sqrt(1 - e^-2d), d = |b - a|."""
    d = abs(b - a)
    if math.isinf(d):
        return _sum([(1.0, _path(max(-_FARTHEST, min(b, _FARTHEST)), cell))], kind)
    if d < _SMALLEST_CELL:
        raise ValueError(
            f"clock = {(a, b)}: a path tells places apart that differ by {_SMALLEST_CELL:.2g} or "
            "more; use Noise(path=False)"
        )
    while d < cell:
        cell = max(cell / _FINER, _SMALLEST_CELL)
    scale = 1 / math.sqrt(-math.expm1(-2 * d))
    return _sum([(scale, _path(b, cell)), (-math.exp(-d) * scale, _path(a, cell))], kind)


def _natural(name: str, value: Any, bits: int) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} = {value!r}; need an integer from 0 to 2^{bits} - 1")
    return number


def _cell(value: Any) -> float:
    if not (isinstance(value, (int, float, np.floating)) and _SMALLEST_CELL <= value <= _ROOT):
        raise ValueError(
            f"resolution = {value!r}; need a number from {_SMALLEST_CELL:.2g} to {_ROOT}"
        )
    return math.ldexp(0.5, math.frexp(value)[1])


@dataclass(frozen=True)
class Draw:
    """A standard normal of the shape of a sample that rows of a plan use.

    start, end: the levels of the step that it belongs to.
    clock: the places E = log(q) / 2 of both ends where the noise of the step is an increment of a
        process that is Brownian in the clock q, in units of its standard deviation given the
        first: any two different numbers, also infinite. None: it belongs to no path.
    tag: tells draws between the same levels apart. Each tag has a path of its own.
    """

    start: Level
    end: Level
    clock: tuple[float, float] | None = None
    tag: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tag < 255:
            raise ValueError(f"tag = {self.tag!r}; need an integer from 0 to 254")
        if self.clock is None:
            return
        a, b = self.clock
        if a == b or any(math.isnan(E) or _FARTHEST < abs(E) < math.inf for E in (a, b)):
            raise ValueError(
                f"clock = {self.clock}; need two different numbers of at most {_FARTHEST:.0f}, or "
                "infinite"
            )


class Source(abc.ABC):
    """Where the draws of a stochastic plan come from."""

    @abc.abstractmethod
    def draw(self, draw: Draw, number: int, like: Tensor) -> Tensor:
        """A standard normal with the shape, dtype and device of `like`.

        number: index of the draw in its plan. The same arguments give the same values.
        """


@dataclass(frozen=True)
class Noise(Source):
    """Counter-based noise.

    seed: an integer: sample i of a batch draws from (seed, first + i). A tuple: sample i draws
        from (seed[i], 0), so that (a, b) gives the first samples of the runs a and b.
    first: index of the first sample, to continue or split a run.
    path: draws with a clock come from one Brownian path per sample, the same for every number of
        steps: more steps refine it. Otherwise all draws are independent.
    resolution: length of the cells of the path, in E (rounded down to a power of two). Steps at
        least as long add up to rounding. Shorter ones are taken from cells 4096 times smaller, and
        so on: they are standard normal, and add up among themselves; the two paths differ within a
        cell, and a longer and a shorter step that meet in one are correlated, by at most 0.34.
    indices: indices of the samples instead of first, first + 1, ...
    """

    seed: int | Sequence[int] = 0
    first: int = 0
    path: bool = False
    resolution: float = 2.0**-16
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.seed, (Sequence, np.ndarray)) and not isinstance(self.seed, str):
            put(self, "seed", tuple(_natural("seed", s, 64) for s in self.seed))
        else:
            put(self, "seed", _natural("seed", self.seed, 64))
        put(self, "first", _natural("first", self.first, 32))
        put(self, "path", bool(self.path))
        put(self, "resolution", _cell(self.resolution))
        if self.indices is not None:
            put(self, "indices", tuple(_natural("indices", i, 32) for i in self.indices))
        if self.first and (self.indices is not None or isinstance(self.seed, tuple)):
            raise ValueError(
                f"first = {self.first}, with indices or a seed for each sample; give one of them"
            )
        if isinstance(self.seed, tuple) and len(self.indices or self.seed) != len(self.seed):
            raise ValueError(
                f"indices = {self.indices} for {len(self.seed)} seeds; give one for each"
            )

    def start(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The noise that a run starts from: standard normal, of the shape (batch, ...)."""
        return self._values([_term(1.0, 0, 0)], shape, dtype, torch.device(device))

    def draw(self, draw: Draw, number: int, like: Tensor) -> Tensor:
        """See `Source`. Independent draws are told apart by their number."""
        if self.path and draw.clock is not None:
            terms = _innovation(*draw.clock, self.resolution, 1 + draw.tag)
        else:
            terms = [_term(1.0, 1 + _natural("number", number, 48), 0)]
        return self._values(terms, like.shape, like.dtype, like.device)

    def _values(
        self, terms: Sequence[Term], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        shape = tuple(shape)
        if not shape or math.prod(shape[1:]) > 2**34:
            raise ValueError(f"shape = {shape}; need (batch, ...) and at most 2^34 elements each")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype = {dtype}; need a floating-point type")
        batch = shape[0]
        self._check(batch)
        index = self.first if self.indices is None else self.indices
        if isinstance(self.seed, tuple) and self.indices is None:
            index = (0,) * batch
        lanes = _lanes(self.seed, index, batch, device)
        return _combination(terms, lanes, math.prod(shape[1:])).view(shape).to(dtype)

    def _check(self, batch: int) -> None:
        for name, value in (("seed", self.seed), ("indices", self.indices)):
            if isinstance(value, tuple) and len(value) != batch:
                raise ValueError(
                    f"{name} has {len(value)} entries for {batch} samples; give one each"
                )
        if self.first + batch > 2**32:
            raise ValueError(f"first = {self.first} with {batch} samples; indices end at 2^32 - 1")

    def take(self, samples: Sequence[int], batch: int) -> Noise:
        """The noise of these samples of a batch."""
        self._check(batch)
        chosen = [_natural("samples", i, 32) for i in samples]
        if not all(i < batch for i in chosen):
            raise ValueError(f"samples = {chosen}; need indices from 0 to {batch - 1}")
        indices = self.indices
        if isinstance(self.seed, tuple):
            seed: int | Sequence[int] = tuple(self.seed[i] for i in chosen)
        else:
            seed, indices = self.seed, indices or range(self.first, self.first + batch)
        indices = None if indices is None else tuple(indices[i] for i in chosen)
        return Noise(seed, 0, self.path, self.resolution, indices)

    def describe(self) -> dict[str, Any]:
        """A description that JSON can hold."""
        return {
            "seed": list(self.seed) if isinstance(self.seed, tuple) else self.seed,
            "first": self.first,
            "path": self.path,
            "resolution": self.resolution,
            "indices": None if self.indices is None else list(self.indices),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Noise:
        """The inverse of `describe`."""
        names = ("seed", "first", "path", "resolution", "indices")
        if set(description) != set(names):
            raise ValueError(f"description has {sorted(description)}; need {', '.join(names)}")
        return cls(**description)


def _matches(value: Any, like: Tensor, what: str) -> Tensor:
    if not (isinstance(value, Tensor) and value.dtype.is_floating_point):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} is {kind}; need a floating-point tensor")
    if value.shape != like.shape or value.device != like.device:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)} on {value.device}; need {tuple(like.shape)} on "
            f"{like.device}"
        )
    return value.to(like.dtype)


@dataclass(frozen=True, eq=False)
class Given(Source):
    """Draws that are handed over: a tensor (batch, ...) for each, or all of them stacked."""

    draws: Tensor | Sequence[Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.draws, Tensor):
            object.__setattr__(self, "draws", tuple(self.draws))
        if len(self.draws) == 0:
            raise ValueError("noise: there are no draws; need one for each draw of the plan")
        for i, z in enumerate(self.draws):
            _matches(z, z, f"noise: draw {i}")
            if z.device.type != "meta" and not bool(z.isfinite().all()):
                raise ValueError(f"noise: draw {i} is not finite everywhere")

    def draw(self, draw: Draw, number: int, like: Tensor) -> Tensor:
        """See `Source`."""
        if not 0 <= number < len(self.draws):
            raise ValueError(
                f"noise: {len(self.draws)} draws are given, but the plan asks for number {number} "
                "(from 0); give one for each"
            )
        return _matches(self.draws[number], like, f"noise: draw {number}")


@dataclass(frozen=True)
class Called(Source):
    """Draws that a function makes: function(draw, like) -> standard normal like `like`."""

    function: Callable[[Draw, Tensor], Tensor]

    def draw(self, draw: Draw, number: int, like: Tensor) -> Tensor:
        """See `Source`."""
        return _matches(self.function(draw, like), like, f"noise: draw {number}")


def as_source(noise: Any) -> Source:
    """The source that is meant: a `Source`, a seed or a seed for each sample, the draws (a
    sequence of tensors, or one stacked), or a function (draw, like) -> tensor."""
    if isinstance(noise, Source):
        return noise
    many = isinstance(noise, (tuple, list)) and len(noise) > 0
    if isinstance(noise, Integral) or (many and all(isinstance(s, Integral) for s in noise)):
        return Noise(noise)  # pyright: ignore[reportArgumentType]
    if isinstance(noise, Tensor) or (many and all(isinstance(z, Tensor) for z in noise)):
        return Given(noise)
    if callable(noise):
        function: Any = noise
        return Called(function)
    raise ValueError(
        f"noise = {noise!r}; need a seed, fewstep.Noise or another Source, the draws (tensors), or "
        "a function (draw, like) -> tensor"
    )


@dataclass(frozen=True)
class BrownianPath:
    """A Brownian motion W for each sample, of variance rho^2 at rho, known at every rho >= 0.

    path = BrownianPath(seed=0);  path(rho, shape) is W(rho), and W(0) = 0. It depends on the
    arguments alone: queries may come in any order and at any place, and W(b) - W(a) adds up. It is
    W(rho) = rho R(log rho) with the R of `Noise(seed, path=True, resolution=...)` for a clock
    that is log(rho).

    seed, first: as in `Noise`.
    resolution: of the cells, in log(rho). Increments between two points of one cell are too small;
        all others are exact in law.
    """

    seed: int | tuple[int, ...] = 0
    first: int = 0
    resolution: float = 2.0**-20

    def __post_init__(self) -> None:
        noise = Noise(self.seed, self.first, resolution=self.resolution)
        object.__setattr__(self, "seed", noise.seed)
        object.__setattr__(self, "first", noise.first)
        object.__setattr__(self, "resolution", noise.resolution)

    def __call__(
        self,
        rho: float,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """W(rho), (batch, ...)."""
        return self.increment(0.0, rho, shape, dtype, device)

    def increment(
        self,
        a: float,
        b: float,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """W(b) - W(a), of variance |b^2 - a^2|, (batch, ...)."""
        for name, rho in (("a", a), ("b", b)):
            if not 0 <= rho < math.inf:
                raise ValueError(f"{name} = {rho}; need a finite noise level rho >= 0")
        if a == b:
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        low, high = min(a, b), max(a, b)
        ends = [(c, rho) for c, rho in ((1.0, high), (-low / high, low)) if rho > 0]
        terms = _sum([(c, _path(math.log(rho), self.resolution)) for c, rho in ends], 1)
        noise = Noise(self.seed, self.first)
        return noise._values(terms, shape, dtype, torch.device(device)) * (high if a < b else -high)


def start_noise(
    shape: Sequence[int],
    seed: int | Sequence[int],
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of the given shape (batch first), float32 values in any dtype.

    seed: one integer: sample i draws from (seed, first + i). A list: sample i draws from
        (seed[i], 0), so that `seed=[a, b]` gives the first samples of runs a and b.
    first: index of the first sample, to continue or split a run.
    """
    return Noise(seed, first).start(shape, dtype, device)
