r"""Running a program, and its derivatives: for every noise n, J_n^T r_n, and sum_n w_n J_n^T J_n.

J_n is the derivative of the result z_N with respect to the numbers of the program (`Space`): with
u_k the adjoint of z_k, or dz_k a tangent,

    dz_k = x da_k + m dc_k + sum_j (D_j db_kj + b_kj dD_j),
    dD_k = p_k dz_k + q_k dout(c_in dz_k) + (dD_k / dlambda_k) dlambda_k.

Three ways to the second line, which is all that the network has to do with it:

    reverse      adjoints by hand, call by call from the last: the graph of one network call is
                 alive at a time. J^T r costs a forward with graph and a backward per call, and so
                 does every random probe v, E v v^T = 1, of which sum w (J^T v)(J^T v)^T is an
                 unbiased estimate of the matrix.
    forward      one Jacobian-vector product per call and number before it (45, 148, 265 for 5, 8,
                 10 calls): exact.
    differences  the same with (D(z + h dz) - D(z)) / h: network calls only, no autograd. h dz is
                 `_STEPS` times as large as z, by what the network answers in.

dD / dlambda at fixed z is exact where the network can be differentiated in the time it is told,
with the scalars p, q, c_in, c_noise differentiated on the host; else (networks told integers, or
that look times up) it is a central difference, over one integer to either side or 0.01 in lambda.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from .._denoiser import Model, check_output, told_integers
from .._prediction import unknown
from .._process import Array, Level, Process
from ._program import Program, Space

__all__ = ["MODES", "Machine", "Products", "Walk"]

MODES = ("reverse", "forward", "differences")
#: Size of a perturbation relative to the state: half the digits where the network is smooth; above
#: the rounding of input and output where they are short. What is too large bends every column the
#: same way, and fits end early; rounding averages out over samples.
_STEPS = {
    torch.float64: 1e-6,
    torch.float32: 3e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
#: Float32 on GPUs, where convolutions round to TF32 unless told otherwise.
_STEP_TF32 = 1e-3
#: Steps in lambda: of the network's time, and of the host's scalars.
_TIME_STEP, _HOST_STEP = 1e-2, 1e-4


@dataclass(frozen=True, eq=False)
class Walk:
    """A program's run: z_0 .. z_N, and what rows add up: the modes of x, of m, and of D_0 ..
    D_{N-1} (or x, m and D themselves)."""

    states: list[Tensor]
    x: Tensor
    mean: Tensor | None
    data: list[Tensor]

    @property
    def result(self) -> Tensor:
        """z_N."""
        return self.states[-1]


@dataclass(frozen=True, eq=False)
class Products:
    """transposed (count, numbers): J_n^T r_n. gram (numbers, numbers): sum_n w_n J_n^T J_n, or an
    estimate. gradients: products with the network's Jacobian that were taken, on single samples."""

    transposed: Array
    gram: Array
    gradients: int = 0


@lru_cache
def _forward_mode() -> None:
    """Load torch's forward mode, which warns of its own deprecated parts the first time."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _inner(u: Tensor, v: Tensor) -> Tensor:
    """Of every sample, the sum of products."""
    return (u * v).flatten(1).sum(1)


def _add(z: Tensor, v: Tensor, c: float | Tensor) -> None:
    """z += c v, where a tensor c is one number per mode."""
    if isinstance(c, Tensor):
        z.addcmul_(v, c)
    else:
        z.add_(v, alpha=c)


def _masks(program: Program, like: Tensor) -> Tensor | None:
    """The modes of every band (bands, modes): 1, elsewhere 0."""
    bands = program.bands
    return None if bands is None else like.new_tensor(bands.spread(np.eye(bands.count)))


@dataclass(frozen=True, eq=False)
class Machine:
    """A model to run programs on, with how to differentiate it.

    step: relative perturbation of mode "differences"; None: by the network's dtype.
    """

    model: Model
    mode: str = "reverse"
    probes: int = 1
    step: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(unknown("jacobian", self.mode, MODES))
        if self.probes < 1:
            raise ValueError(f"probes = {self.probes}; need an integer >= 1")

    @property
    def _whole(self) -> bool:
        return told_integers(self.model.rounds, self.model.prediction)

    def _scalars(self, level: Level) -> tuple[float, float, float, float]:
        p, q, c_in, c_noise = (float(s) for s in self.model.prediction.scalars(level))
        return p, q, c_in, c_noise

    def _time(self, z: Tensor, c_noise: float) -> Tensor:
        dtype = torch.int64 if self._whole else z.dtype
        return z.new_full((len(z),), round(c_noise) if self._whole else c_noise, dtype=dtype)

    def _out(self, z: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        _, _, c_in, c_noise = self._scalars(level)
        out = self.model.output(c_in * z, self._time(z, c_noise), level, cond)
        check_output(out, z)
        return out

    def data(self, z: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        """D(z, t)."""
        p, q, _, _ = self._scalars(level)
        with torch.no_grad():
            return p * z + q * self._out(z, level, cond).to(z.dtype)

    def run(self, program: Program, x: Tensor, cond: Mapping[str, Any]) -> Walk:
        """The run of a program from noise x."""
        levels = program.levels(self.model.process)
        with torch.no_grad():
            walk = Walk([], program.modes(x), program.mean_like(x), [])
            a, b, c = program.coefficients(walk.x)
            for k in range(program.nfe + 1):
                z = walk.x * a[k]
                if walk.mean is not None:
                    z += walk.mean * c[k]
                for j in range(k):
                    _add(z, walk.data[j], b[k][j])
                walk.states.append(program.image(z))
                if k < program.nfe:
                    data = self.data(walk.states[k], levels[k], cond)
                    walk.data.append(program.modes(data))
        return walk

    def products(
        self,
        program: Program,
        walk: Walk,
        x: Tensor,
        cond: Mapping[str, Any],
        residual: Tensor,
        weights: Array,
        free: NDArray[np.intp],
        generator: torch.Generator | None = None,
    ) -> Products:
        """J^T r and the matrix, over the numbers that are `free` (indices in `Space`; the others
        are 0). weights (count,): w. generator: of the probes of mode "reverse"."""
        space = Space(self.model.process, program.nfe, bands=program.bands)
        wanted = {int(i) for i in free}
        if self.mode == "reverse":
            signs = [
                torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8)
                for _ in range(self.probes)
            ]
            vectors = [residual, *((2 * s - 1).to(x) for s in signs)]
            rows = self._reverse(space, program, walk, x, cond, vectors, wanted)
            probes = np.concatenate(rows[1:])
            w = np.tile(weights / self.probes, self.probes)
            gradients = program.nfe * len(vectors) * len(x)
            return Products(rows[0], (probes * w[:, None]).T @ probes, gradients)
        return self._tangents(space, program, walk, x, cond, residual, weights, wanted)

    # the network

    def _differentiable(self, x: Tensor, level: Level, cond: Mapping[str, Any]) -> bool:
        """Whether autograd gets from the answer to the time that the network is told."""
        if self._whole or self.mode == "differences":
            return False
        t_in = self._time(x, self._scalars(level)[3]).requires_grad_()
        try:
            with torch.enable_grad():
                out = self.model.output(self._scalars(level)[2] * x, t_in, level, cond)
                if not out.requires_grad:
                    return False
                (slope,) = torch.autograd.grad(out.sum(), t_in, allow_unused=True)
        except RuntimeError:  # such as t.numpy() inside
            return False
        return slope is not None

    def _slopes(self, level: Level) -> tuple[float, float, float, float]:
        """d(p, q, c_in, c_noise) / dlambda."""
        low, high = _around(self.model.process, level, _HOST_STEP, False)
        ends = zip(self._scalars(low), self._scalars(high), strict=True)
        p, q, c_in, c_noise = ((b - a) / (high.lam - low.lam) for a, b in ends)
        return p, q, c_in, c_noise

    def _in_time(self, z: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        """dD / dlambda at fixed z, by differences."""
        low, high = _around(self.model.process, level, _TIME_STEP, self.model.rounds)
        return (self.data(z, high, cond) - self.data(z, low, cond)) / (high.lam - low.lam)

    # reverse

    def _reverse(
        self,
        space: Space,
        program: Program,
        walk: Walk,
        x: Tensor,
        cond: Mapping[str, Any],
        vectors: list[Tensor],
        wanted: set[int],
    ) -> list[Array]:
        """J^T v of every vector, (count, numbers) each."""
        n, levels = program.nfe, program.levels(self.model.process)
        exact = self._differentiable(x[:1], levels[-1], _first(cond, len(x)))
        out = [np.zeros((len(x), space.size)) for _ in vectors]
        masks, table = _masks(program, walk.x), program.coefficients(walk.x)[1]
        last = [program.modes(v) for v in vectors]
        # Adjoints of the data predictions, and of the state in hand.
        up = [[torch.zeros_like(walk.x) for _ in range(n)] for _ in vectors]
        for k in range(n, -1, -1):
            here = last
            if k < n:
                timed = space.place("t", k) in wanted
                adjoints = [program.image(u[k]) for u in up]
                here, slopes = self._call_reverse(
                    walk.states[k], levels[k], cond, adjoints, timed, exact
                )
                here = [program.modes(v) for v in here]
                for rows, slope in zip(out, slopes, strict=True):
                    rows[:, space.place("t", k)] = slope
            for rows, u, v in zip(out, up, here, strict=True):
                for kind, j, term in _terms_of(k, walk):
                    places = space.places(kind, k, j)
                    if not wanted.isdisjoint(places):
                        found = (v * term).flatten(1)
                        found = found.sum(1)[:, None] if masks is None else found @ masks.T
                        for i, part in zip(places, found.double().cpu().numpy().T, strict=True):
                            rows[:, i] = part if i in wanted else 0.0
                    if kind == "b":
                        _add(u[j], v, table[k][j])
        return out

    def _call_reverse(
        self,
        z: Tensor,
        level: Level,
        cond: Mapping[str, Any],
        adjoints: list[Tensor],
        timed: bool,
        exact: bool,
    ) -> tuple[list[Tensor], list[Array]]:
        """From adjoints of D to adjoints of z, and their products with dD / dlambda."""
        p, q, c_in, c_noise = self._scalars(level)
        x_in = (c_in * z).requires_grad_()
        t_in, sources = self._time(z, c_noise), [x_in]
        if timed and exact:
            sources.append(t_in.requires_grad_())
        with torch.enable_grad():
            answer = self.model.output(x_in, t_in, level, cond)
        if not answer.requires_grad:
            raise ValueError(
                "jacobian = 'reverse': the network's answer has no graph (compiled, remote, or run "
                "without gradients); use jacobian = 'differences'"
            )
        slope = self._in_time(z, level, cond) if timed and not exact else None
        states, slopes = [], []
        for i, u in enumerate(adjoints):
            grads = torch.autograd.grad(
                answer, sources, (q * u).to(answer.dtype), retain_graph=i < len(adjoints) - 1
            )
            g = grads[0].to(z.dtype)
            states.append(p * u + c_in * g)
            if not timed:
                part = z.new_zeros(len(z))
            elif slope is not None:
                part = _inner(u, slope)
            else:
                dp, dq, dc_in, dc_noise = self._slopes(level)
                part = _inner(u, dp * z + dq * answer.detach().to(z.dtype))
                part += dc_in * _inner(g, z) + dc_noise * grads[1].to(z.dtype)
            slopes.append(part.double().cpu().numpy())
        return states, slopes

    # forward and differences

    def _tangents(
        self,
        space: Space,
        program: Program,
        walk: Walk,
        x: Tensor,
        cond: Mapping[str, Any],
        residual: Tensor,
        weights: Array,
        wanted: set[int],
    ) -> Products:
        n, levels = program.nfe, program.levels(self.model.process)
        exact = self._differentiable(x[:1], levels[-1], _first(cond, len(x)))
        masks, table = _masks(program, walk.x), program.coefficients(walk.x)[1]
        moved: list[dict[int, Tensor]] = []  # modes of dD_k by number
        tangents: dict[int, Tensor] = {}
        for k in range(n + 1):
            tangents = {}
            for j, here in enumerate(moved[:k]):
                for i, v in here.items():
                    part = v * table[k][j]
                    tangents[i] = tangents[i] + part if i in tangents else part
            for kind, j, term in _terms_of(k, walk):
                for g, i in enumerate(space.places(kind, k, j)):
                    if i in wanted:
                        tangents[i] = (term if masks is None else term * masks[g]).expand_as(walk.x)
            if k == n:
                break
            z, level = walk.states[k], levels[k]
            base = self._base(z, level, cond) if tangents else None
            moved.append(
                {
                    i: program.modes(self._pushed(z, program.image(v), level, cond, base))
                    for i, v in tangents.items()
                }
            )
            if (i := space.place("t", k)) in wanted:
                slope = (
                    self._time_tangent(z, level, cond) if exact else self._in_time(z, level, cond)
                )
                moved[k][i] = program.modes(slope)
        residual = program.modes(residual)
        out, gram = np.zeros((len(x), space.size)), np.zeros((space.size, space.size))
        index = sorted(tangents)
        for i in index:
            out[:, i] = _inner(tangents[i], residual).double().cpu().numpy()
        root = torch.as_tensor(np.sqrt(weights)).to(x)
        root = root.reshape(-1, *(1 for _ in residual.shape[1:]))
        columns = torch.stack([(root * tangents[i]).flatten() for i in index])
        gram[np.ix_(index, index)] = (columns @ columns.T).double().cpu().numpy()
        taken = sum(map(len, moved)) * len(x) if self.mode == "forward" else 0
        return Products(out, gram, taken)

    def _base(self, z: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor | None:
        """The answer that differences start from."""
        if self.mode == "forward":
            return None
        with torch.no_grad():
            return self._out(z, level, cond)

    def _pushed(
        self, z: Tensor, dz: Tensor, level: Level, cond: Mapping[str, Any], base: Tensor | None
    ) -> Tensor:
        """p dz + q dout(c_in dz)."""
        p, q, c_in, c_noise = self._scalars(level)
        if base is None:
            t_in = self._time(z, c_noise)
            _, out = self._dual(c_in * z, c_in * dz, t_in, None, level, cond)
            return p * dz + q * out.to(z.dtype)
        short = base.dtype == torch.float32 and base.device.type == "cuda"
        step = self.step or (_STEP_TF32 if short else _STEPS[base.dtype])
        size = float(dz.square().mean().sqrt())
        if size == 0:
            return torch.zeros_like(dz)
        h = step * float(z.square().mean().sqrt()) / size
        with torch.no_grad():
            after = self._out(z + h * dz, level, cond)
        return p * dz + q * ((after.to(z.dtype) - base.to(z.dtype)) / h)

    def _dual(
        self,
        x_in: Tensor,
        dx_in: Tensor,
        t_in: Tensor,
        dt_in: Tensor | None,
        level: Level,
        cond: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The answer, and its derivative along (dx_in, dt_in)."""
        # Not torch.func.jvp: that makes every tensor within one without storage, and networks that
        # look at the time they are told (t.item(), t.numpy()) fail.
        _forward_mode()
        with torch.no_grad(), forward_ad.dual_level():
            if dt_in is not None:
                t_in = forward_ad.make_dual(t_in, dt_in)
            answer = self.model.output(forward_ad.make_dual(x_in, dx_in), t_in, level, cond)
            out, slope = forward_ad.unpack_dual(answer)
            return out, torch.zeros_like(out) if slope is None else slope

    def _time_tangent(self, z: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        """dD / dlambda at fixed z, exact."""
        _, q, c_in, c_noise = self._scalars(level)
        dp, dq, dc_in, dc_noise = self._slopes(level)
        t_in = self._time(z, c_noise)
        dt_in = torch.full_like(t_in, dc_noise)
        out, slope = self._dual(c_in * z, dc_in * z, t_in, dt_in, level, cond)
        return dp * z + dq * out.to(z.dtype) + q * slope.to(z.dtype)


def _terms_of(k: int, walk: Walk) -> list[tuple[str, int, Tensor]]:
    """What z_k is a sum of: (kind, j, term)."""
    terms = [("a", 0, walk.x)]
    if walk.mean is not None:
        terms.append(("c", 0, walk.mean))
    return [*terms, *(("b", j, walk.data[j]) for j in range(k))]


def _first(cond: Mapping[str, Any], count: int) -> dict[str, Any]:
    from ._teacher import taken

    return taken(cond, slice(0, 1), count)


def _around(process: Process, level: Level, step: float, rounds: bool) -> tuple[Level, Level]:
    """Levels on either side, within what the network knows."""
    if rounds:
        low, high = sorted((process.t_start, process.t_end))
        ends = [process.level(float(np.clip(level.t + d, low, high))) for d in (-1, 1)]
    else:
        start, end = process.lam_start, float(process.lam(process.t_end))
        lams = np.clip([level.lam - step, level.lam + step], start, end)
        ends = [process.level(float(process.time(lam))) for lam in lams]
    first, second = sorted(ends, key=lambda end: end.lam)
    return first, second
