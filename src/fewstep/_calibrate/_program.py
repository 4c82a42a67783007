r"""Programs: a deterministic sampler as the fewest numbers, and every plan as one.

Whatever the solver, N network evaluations and linear algebra between them are the same as

    z_k = a_k x + c_k m + sum_{j<k} b_kj D_j,     D_k = D(z_k, t_k),     result z_N

with x the noise, D_j the data predictions so far, and m the mean of the data: the canonical form of
Bespoke Non-Stationary Solvers (arXiv 2403.01329, proposition 3.1), with one more term. States in
the sums add nothing, nor does another prediction, nor times of the solver beside those of the
network; the level that the network is told, t_k, and the noise that is left in z_k, a_k sigma, need
not agree. `program_of` gives the program of any plan whose coefficients are numbers, `plan_of` the
plan of a program: N(N + 5) / 2 numbers, and N + 2 more where the first step is free.

A first step that is free has z_0 = a_0 x + c_0 m. Where noise dominates, the first evaluation of a
hand-made solver says little more than the mean of the data (`fewstep.analytic_first`); `answered`
says it instead, and the evaluation is spent where it is worth more.

Coefficients may differ from one band of modes to another (`Bands`, `banded`): the principal
directions of the data, in groups. Where noise dominates, the network's answer is linear in every
direction, with another slope in each, which numbers per band follow more closely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._basis import LowRank
from .._denoiser import Model, told_integers
from .._plan import Call, Plan, Row
from .._process import Array, Level, Process

__all__ = [
    "Bands",
    "Program",
    "Space",
    "answered",
    "asking",
    "banded",
    "longer",
    "plan_of",
    "principal",
    "program_of",
]


#: Steps in lambda of evaluations that are put before the first or after the last.
_BEYOND = 0.5
#: So many principal directions at most are told apart: what a hundred samples know.
_DIRECTIONS = 64


@dataclass(frozen=True, eq=False)
class Bands:
    """Bands of modes: the columns of a basis, in groups, and with the last band the rest of the
    space. index (rank + 1,): the band of every column, and of the rest."""

    basis: LowRank
    index: NDArray[np.intp]

    @property
    def count(self) -> int:
        """How many."""
        return int(self.index[-1]) + 1

    def spread(self, values: Array) -> Array:
        """Values (..., count), one per band, as (..., modes)."""
        return np.apply_along_axis(self.basis.spread, -1, values[..., self.index])


def principal(samples: Tensor, count: int) -> Bands | None:
    """`count` bands of the principal directions of samples, ever wider; None where there are not
    two."""
    flat = samples.detach().double().cpu().flatten(1)
    _, _, rows = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    known = min(*rows.shape, _DIRECTIONS)
    index = np.floor(count * np.sqrt(np.arange(known) / known)).astype(np.intp)
    index = np.unique(index, return_inverse=True)[1]
    if index[-1] < 1:
        return None
    rank = int((index < index[-1]).sum())
    shape = np.array(samples.shape[1:])
    return Bands(LowRank(None, shape, rows[:rank].T.numpy()), index[: rank + 1])


@dataclass(frozen=True, eq=False)
class Program:
    """times (N,) of the process at which the network is told to be; a (N + 1,), b (N + 1, N) below
    the diagonal, c (N + 1,) as in the module's formula; mean: m, broadcasts against a sample, or
    None with c = 0; end: the time of the result. With bands, a, b and c have one more axis."""

    times: Array
    a: Array
    b: Array
    c: Array
    mean: Array | None
    end: float
    bands: Bands | None = None

    @property
    def nfe(self) -> int:
        """N."""
        return len(self.times)

    @property
    def gain(self) -> float:
        """sum_j |b_Nj|: what rounding of the data predictions is multiplied by, at worst."""
        return float(np.abs(self.b[-1]).sum(0).max())

    @property
    def first_step(self) -> bool:
        """Whether z_0 is not x."""
        return bool(np.any(self.a[0] != 1) or np.any(self.c[0] != 0))

    def levels(self, process: Process) -> list[Level]:
        """Of every evaluation."""
        return [process.level(float(t)) for t in self.times]

    def mean_like(self, x: Tensor) -> Tensor | None:
        """m next to a batch."""
        if self.mean is None or not self.c.any():
            return None
        return self.modes(x.new_tensor(self.mean).broadcast_to(x.shape[1:])[None])[0]

    def modes(self, v: Tensor) -> Tensor:
        """What the coefficients of a batch act on: its modes, or itself."""
        return v if self.bands is None else self.bands.basis.forward(v)

    def image(self, v: Tensor) -> Tensor:
        """The inverse of `modes`."""
        return v if self.bands is None else self.bands.basis.inverse(v)

    def coefficients(self, like: Tensor) -> tuple[Any, Any, Any]:
        """a, b and c, to multiply batches of modes with: floats or tensors."""
        if self.bands is None:
            return self.a.tolist(), self.b.tolist(), self.c.tolist()
        a, b, c = (like.new_tensor(self.bands.spread(t)) for t in (self.a, self.b, self.c))
        return a, b, c


def program_of(run: Plan) -> Program:
    """The program that does what a plan does. Plans that draw noise, start from several states, or
    have arrays for coefficients are no programs; a constant must be a multiple of one array."""
    if run.draws or run.given != 1 or run.basis is not None or run.axis is not None:
        raise ValueError(f"plan: {run!r} draws noise, starts from several states, or acts on modes")
    tables = run.canonical()
    a, b = (t.reshape(*t.shape[:axes], -1) for t, axes in zip(tables[:2], (1, 2), strict=True))
    if np.ptp(a, axis=-1).any() or np.ptp(b, axis=-1).any():
        raise ValueError(f"plan: {run!r} has arrays for coefficients; a program has numbers")
    a, b = a[..., 0], b[..., 0]
    c, mean = np.zeros(len(a)), None
    if len(tables) > 3:
        constants = tables[3]
        flat = constants.reshape(len(a), -1)
        mean = constants[np.argmax(np.abs(flat).max(1))]
        c = flat @ mean.ravel() / (mean.ravel() @ mean.ravel())
        if np.abs(flat - c[:, None] * mean.ravel()).max() > 1e-9 * np.abs(flat).max():
            raise ValueError(f"plan: {run!r} has constants that are no multiples of one array")
    times = np.array([level.t for level in run.evaluations], dtype=np.float64)
    return Program(times, a, np.tril(b, -1), c, mean, float(run.times[-1]))


def answered(program: Program, mean: Array) -> Program:
    """The same program with its first data prediction replaced by the mean of the data: one
    evaluation less."""
    if program.nfe < 2 or program.first_step:
        raise ValueError("program: its first step is free already, or it has one evaluation")
    return Program(
        program.times[1:],
        program.a[1:],
        program.b[1:, 1:],
        program.b[1:, 0].copy(),
        np.asarray(mean, dtype=np.float64),
        program.end,
    )


def asking(program: Program, mean: Array, time: float) -> Program:
    """The inverse of `answered` with this mean: the same program with one evaluation more, of the
    noise itself at this time, which has the place of the mean."""
    if program.mean is None or not program.first_step:
        raise ValueError("program: its first step is not free")
    table = np.zeros((program.nfe + 2, program.nfe + 1))
    table[1:, 0] = program.c * (np.vdot(program.mean, mean) / np.vdot(mean, mean))
    table[1:, 1:] = program.b
    a = np.array([1.0, *program.a])
    times = np.array([time, *program.times])
    return Program(times, a, table, np.zeros(len(a)), None, program.end)


def banded(program: Program, bands: Bands) -> Program:
    """The same program, with a number for every band."""
    a, b, c = (np.repeat(t[..., None], bands.count, -1) for t in (program.a, program.b, program.c))
    return replace(program, a=a, b=b, c=c, bands=bands)


def longer(program: Program, process: Process, nfe: int, rounds: bool = False) -> list[Program]:
    """The programs of `nfe` evaluations that do the same: new ones in one place, between any two
    evaluations, before the first (where that is not of x itself) or after the last, of states on
    the way from one to the next; nothing uses their answers yet."""
    n, new = program.nfe, nfe - program.nfe
    if new < 1:
        raise ValueError(f"nfe = {nfe}; need more than the program's {n}")
    lams = [float(process.lam(t)) for t in program.times]
    least, most = process.lam_start, float(process.lam(process.t_end))
    sigmas = [*(level.sigma for level in program.levels(process)), 0.0]
    out = []
    for at in range(0 if program.first_step else 1, n + 1):
        high = lams[at] if at < n else min(lams[-1] + _BEYOND * (new + 1), most)
        low = lams[at - 1] if at else max(lams[0] - _BEYOND * (new + 1), least)
        if not np.isfinite(low):
            low = high - 1.0
        told = process.time(np.linspace(low, high, new + 2)[1:-1])
        told = np.round(told) if rounds else told
        index = [*range(at), *(at for _ in told), *range(at, n + 1)]
        a, c, b = program.a[index], program.c[index], program.b[index]
        for i, level in enumerate(process.level(float(t)) for t in told):
            if at:  # noise falls from row to row: as much of both as leaves what the level has
                fall = sigmas[at - 1] - sigmas[at]
                part = np.clip((sigmas[at - 1] - level.sigma) / fall, 0, 1) if fall > 0 else 0.5
                for table, of in ((a, program.a), (c, program.c), (b, program.b)):
                    table[at + i] = (1 - part) * of[at - 1] + part * of[at]
            else:
                first = process.level(float(program.times[0]))
                a[i] *= level.sigma / first.sigma
                c[i] *= level.alpha / first.alpha
            b[at + i, at:] = 0
        b = np.insert(b, [at] * new, 0.0, axis=1)
        times = np.insert(program.times, [at] * new, told)
        out.append(Program(times, a, b, c, program.mean, program.end))
    return out


def plan_of(program: Program, model: Model, about: Mapping[str, str] | None = None) -> Plan:
    """The plan that does what a program does, for the process and prediction of a model.

    The noise in a state and the level that the network is told are different things here, and only
    the second is defined; it is given as the level of the state. The first state is x itself, at
    the start of the process, whatever it is asked about.
    """
    process, n = model.process, program.nfe
    asked = program.levels(process)
    start = process.level(process.t_start)
    shift = int(program.first_step)
    calls: list[Call | None] = [None] * shift
    for k, level in enumerate(asked):
        p, q, c_in, c_noise = (float(s) for s in model.prediction.scalars(level))
        elsewhere = not shift and k == 0 and level != start
        calls.append(Call(p, q, c_in, c_noise, level if elsewhere else None))
    levels = [start, *asked[1 - shift :]]
    bands, mean = program.bands, program.mean
    a, b, c = program.a, program.b, program.c
    if bands is not None:
        a, b, c = (bands.spread(t) for t in (a, b, c))
        if mean is not None:
            shape = (1, *(bands.basis.sample or ()))
            m = program.mean_like(torch.zeros(shape, dtype=torch.float64))
            mean = None if m is None else m.numpy()

    def terms(of: Mapping[int, Array]) -> dict[int, Any]:
        return {j: v if np.ndim(v) else float(v) for j, v in of.items() if np.any(v)}

    rows = []
    for k in range(1 - shift, n + 1):
        constant = 0.0 if mean is None or not np.any(c[k]) else c[k] * mean
        of = terms({0: a[k]}), terms({j + shift: b[k, j] for j in range(k)})
        rows.append(Row(*of, 0, exact=False, c=constant))
    about = {
        "solver": "learned",
        "process": repr(process),
        "grid": "learned",
        "predicts": model.prediction.name,
        **(about or {}),
    }
    if model.conditions > 1:
        about["conditions per evaluation"] = str(model.conditions)
    return Plan(
        (*levels, process.level(program.end)),
        tuple(rows),
        (*calls, None),
        told_integers(model.rounds, model.prediction),
        process.prior_std(process.t_start),
        about,
        basis=None if bands is None else bands.basis,
    )


@dataclass(frozen=True)
class Space:
    """Programs of N evaluations as vectors: lambda(t_k), then a_k, c_k, and b_kj row by row; with
    bands, all bands of every number.

    rounds: times are integers of the process; a vector's lambda need not be, its program's are.
    """

    process: Process
    n: int
    rounds: bool = False
    bands: Bands | None = None

    @property
    def each(self) -> int:
        """How many numbers a coefficient is."""
        return 1 if self.bands is None else self.bands.count

    @property
    def size(self) -> int:
        """How many numbers."""
        n = self.n
        return n + self.each * (2 * (n + 1) + n * (n + 1) // 2)

    @property
    def below(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where the entries of b stand, row by row."""
        return np.tril_indices(self.n + 1, -1, self.n)

    def place(self, kind: str, k: int, j: int = 0) -> int:
        """The index of a number: "t", "a", "c" of k, or "b" of (k, j); with bands, of the first."""
        n = self.n
        if kind == "t":
            return k
        start = {"a": 0, "c": n + 1, "b": 2 * n + 2}[kind]
        return n + self.each * (start + (k * (k - 1) // 2 + j if kind == "b" else k))

    def places(self, kind: str, k: int, j: int = 0) -> range:
        """The indices of a coefficient: of all its bands."""
        first = self.place(kind, k, j)
        return range(first, first + self.each)

    def limits(self) -> tuple[float, float]:
        """Least and largest lambda that the network knows."""
        return self.process.lam_start, float(self.process.lam(self.process.t_end))

    def vector(self, program: Program) -> Array:
        """Of a program; lambda is -inf where alpha = 0."""
        lam = np.array([float(self.process.lam(t)) for t in program.times])
        rows = (program.a.ravel(), program.c.ravel(), program.b[self.below].ravel())
        return np.concatenate([lam, *rows])

    def program(self, of: Array, like: Program) -> Program:
        """Of a vector, with the mean and the end of another, and its times where lambda agrees."""
        n, axes = self.n, () if self.bands is None else (self.each,)
        lam, rows = of[:n], of[n:].reshape(-1, *axes)
        known = np.array([float(self.process.lam(t)) for t in like.times])
        same = lam == known
        times = np.where(same, like.times, 0.0)
        if not same.all():
            times[~same] = self.process.time(lam[~same])
            if self.rounds:
                low, high = sorted((self.process.t_start, self.process.t_end))
                times[~same] = np.clip(np.round(times[~same]), low, high)
        table = np.zeros((n + 1, n, *axes))
        table[self.below] = rows[2 * n + 2 :]
        a, c = rows[: n + 1].copy(), rows[n + 1 : 2 * n + 2].copy()
        return Program(times, a, table, c, like.mean, like.end, self.bands)
