r"""What a plan does, computed from its rows: order, error constant, stability, and in words.

All in the coordinate y = x / alpha and the clock lambda, where every process is

    dy / dlambda = D - y,        y(l) = e^-(l - m) y(m) + int_m^l e^-(l - tau) D dtau.

A *step* is everything from one node of the grid to the next, its stages and correctors included.
"Exact history" means: the states before a step, and the network there, are exact.

Order
-----
The rows are compiled again on ever finer grids near the start, the end and inner nodes of the plan,
and every step is taken from exact history on a problem with a known solution: the sum of Gaussian
solutions y_k = sum_m w_km sqrt(c_m^2 + rho^2), whose data prediction is smooth at both ends, with
D disturbed away from it by a time-dependent, non-commuting, nonlinear function of the deviation,
so that all order conditions of multistep and Runge-Kutta rows count (those of several branches of
several stages each, from order 5 on, only in the quadratic term). The slope of the local error,
less one, is the order of the step.

The order of the plan belongs to the family of plans on the same grid, refined smoothly: between its
nodes lambda is smooth in the index, so ratios of neighbouring steps tend to 1 (a grid equal in
lambda stays so). Formulas with fixed numbers have their `smooth_order` here. In bulk a local error
h^(p+1) adds up to h^p. Errors made only once, by the lower order of a start-up or of a last step,
are not summed: local order p there gives h^(p+1). At alpha = 0 and sigma = 0, where lambda is
infinite, it is flow time s = sigma / (alpha + sigma) that is smooth in the index, so that the first
or last node stays, and its neighbours come nearer to it as 1/n: the last step of a DDIM end then
errs by O(rho^2), which is second order whatever the bulk does. With the penultimate node held
fixed (at the least noise a network knows) there is no order: that error does not shrink.

    order = min(bulk, start, end)

A plan that cannot be compiled again (loaded, learned, made by hand) is not a member of a family.
Its order is then what its rows declare, combined in the same way, and a lower bound where stages
of one step declare less than the step: see `Orders.computed`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._names import NAMES
from ._plan import Plan, Row
from ._process import Array, CosineVP, Level, Process
from ._solvers._base import Draft, Solver
from ._solvers._registry import solvers
from ._solvers._singlestep import Singlestep

__all__ = [
    "ErrorConstant",
    "Orders",
    "Stability",
    "error_constant",
    "explain",
    "order",
    "orders",
    "stability",
]

_BASE = Solver.__module__

#: Largest step in lambda from which windows shrink, the factors, and steps on either side.
_STEP = 0.2
_SHRINK = (0.5, 0.25, 0.125)
_SIDE = 12
#: Relative errors below this are rounding.
_ROUNDING = 1e-13


class Orders(NamedTuple):
    """The exponents of the step size in the global error: of the steps in bulk, of the first steps
    and of the last (inf: no error at all); whether they were computed, or are what rows declare."""

    bulk: float
    start: float
    end: float
    computed: bool

    @property
    def order(self) -> int:
        """The least of the three, as a whole number."""
        return round(min(self.bulk, self.start, self.end))


# -- compiling, and running single steps -----------------------------------------------------------


def _source(plan: Plan) -> tuple[Solver, Process] | None:
    """What made the plan, if that is known."""
    origin = plan.origin
    return None if origin is None else (origin.solver, origin.process)


def _draft(plan: Plan) -> Draft:
    """The rows of a plan in data predictions, and the levels at which the network is asked."""
    asked = [call is not None and (call.level or True) for call in plan.calls]
    rows = tuple(plan.data_row(row) for row in plan.rows)
    return Draft(plan.levels, rows, tuple(asked), plan.given, plan.keep, plan.basis)


def _steps(draft: Draft, times: Sequence[float] | Array) -> list[range]:
    """The states that every step makes: up to the last one at its node."""
    last = {level.t: k for k, level in enumerate(draft.levels)}
    ends = [max(last[float(times[0])], draft.given - 1), *(last[float(t)] for t in times[1:])]
    return [range(a + 1, b + 1) for a, b in itertools.pairwise(ends)]


def _nodes(plan: Plan) -> list[float]:
    """The times of the plan's grid; of a plan that cannot be compiled again, the times of all its
    states, stages of a step included."""
    return _distinct(plan) if plan.origin is None else list(plan.origin.times)


def _distinct(plan: Plan) -> list[float]:
    made = plan.levels[plan.given - 1 :]  # states that the run starts from are no steps
    return [t for t, _ in itertools.groupby(level.t for level in made)]


def _value(row: Row, states: Mapping[int, Any], outputs: Mapping[int, Any]) -> Any:
    """Without the constant: what responds to states and data predictions."""
    total = sum((c * states[j] for j, c in row.a.items()), 0.0)
    return total + sum((c * outputs[j] for j, c in row.b.items()), 0.0)


def _asked(draft: Draft, k: int) -> Level | None:
    at = draft.evaluated[k]
    return None if at is False else draft.levels[k] if at is True else at


class _Problem:
    """A coupled nonlinear problem of three unknowns with a known solution, of scale `c`."""

    def __init__(self, c: float) -> None:
        rng = np.random.default_rng(0)
        self.c = c
        self.std = c * np.array([0.5, 0.8, 1.3, 2.0])
        self.weights = rng.normal(size=(3, 4))
        self.linear, self.drift = rng.normal(size=(2, 3, 3)) * 0.5
        self.square = rng.normal(size=(3, 3))

    def size(self, level: Level) -> float:
        return math.hypot(level.alpha * self.c, level.sigma)

    def state(self, level: Level, dim: int) -> Array:
        x = self.weights @ np.hypot(level.alpha * self.std, level.sigma)
        return x.reshape(3, *(1,) * dim)

    def data(self, x: Array, level: Level) -> Array:
        dim = x.ndim - 1
        v = np.hypot(level.alpha * self.std, level.sigma)
        mean = (self.weights @ (level.alpha * self.std**2 / v)).reshape(3, *(1,) * dim)
        share = level.alpha * self.c / self.size(level)
        u = (x - self.state(level, dim)) * (share / self.size(level))
        linear = self.linear + self.drift * share**2
        turned = np.tensordot(linear, u, 1) + u * np.tensordot(self.square, u, 1)
        return mean + self.c * turned


def _local_error(draft: Draft, step: range, problem: _Problem) -> float:
    """The largest error of a step from exact history, relative to the state."""
    dim = max(np.ndim(c) for row in draft.rows for c in row.coefficients)
    states: dict[int, Array] = {}
    outputs: dict[int, Array] = {}

    def ask(k: int) -> None:
        at = _asked(draft, k)
        if at is not None:
            outputs[k] = problem.data(states[k], at)

    used = [draft.rows[k - draft.given] for k in step]
    for k in {j for row in used for j in (*row.a, *row.b) if j < step.start}:
        states[k] = problem.state(draft.levels[k], dim)
        ask(k)
    for k in step:
        row = draft.rows[k - draft.given]
        states[k] = _value(row, states, outputs) + row.c
        if k < step[-1]:
            ask(k)
    end = draft.levels[step[-1]]
    return float(np.max(np.abs(states[step[-1]] - problem.state(end, dim)))) / problem.size(end)


# -- order -----------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    """The nodes of a plan, on a process on which they can be refined."""

    solver: Solver
    process: Process
    nodes: tuple[float, ...]
    spared: int  # evaluations that a grid of full steps would spend beyond those of the plan


def _grid(solver: Solver, process: Process, plan: Plan) -> _Grid:
    nodes = _nodes(plan)
    full = solver.draft(process, np.array(nodes)).evaluated
    spared = sum(asked is not False for asked in full) - plan.nfe
    if process.integer_times:
        # A table has kinks and ends before sigma = 0: no grid on it can be refined for ever.
        # Orders are those on a smooth path through the same levels.
        smooth = CosineVP(s=0.0, t_start=1.0)
        lam = [float(process.lam(t)) for t in nodes]
        nodes = [
            2 / math.pi * math.atan2(math.exp(-v), 1.0)
            if v > 0
            else 2 / math.pi * math.atan2(1.0, math.exp(v))
            for v in lam
        ]
        process = smooth
    return _Grid(solver, process, tuple(nodes), spared)


def _window(grid: _Grid, i: int, shrink: float) -> tuple[Array, float]:
    """Times of a fine smooth grid at node i, with the slope and the curvature of the grid there
    and steps of `_STEP` times `shrink`; and the scale of the problem. An end stays an end."""
    process, nodes, n = grid.process, grid.nodes, len(grid.nodes) - 1
    levels = [process.level(t) for t in nodes]
    finite = math.isfinite(levels[i].lam)
    clock = [v.lam if finite else v.sigma / (v.alpha + v.sigma) for v in levels]
    sides = (0, 2 * _SIDE) if i == 0 else (2 * _SIDE, 0) if i == n else (_SIDE, _SIDE)
    k = np.arange(-sides[0], sides[1] + 1)
    near = [j for j in range(i - 2, i + 3) if 0 <= j <= n and math.isfinite(clock[j])]
    near = sorted(sorted(near, key=lambda j: abs(j - i))[:3])
    fit = np.polyfit(np.array(near) - i, [clock[j] for j in near], len(near) - 1)[::-1]
    slope = float(fit[1]) if len(fit) > 1 else 0.0
    ahead = levels[-1].sigma / levels[-1].alpha if levels[-1].alpha else math.inf
    behind = levels[0].sigma / levels[0].alpha if levels[0].alpha else math.inf
    sign = 1.0 if (ahead < behind) == finite else -1.0
    step = _STEP if finite else _STEP / (2 * _SIDE)
    bend = 2 * float(fit[2]) / abs(slope) * step / abs(slope) if len(fit) == 3 and slope else 0.0
    bend = sign * min(max(sign * bend, -0.4 / (2 * _SIDE)), 0.4 / (2 * _SIDE))
    for _ in range(8):
        here = shrink * k
        at = clock[i] + step * here * (sign + 0.5 * bend * here)
        with np.errstate(divide="ignore", invalid="ignore"):
            lam = at if finite else np.log1p(-at) - np.log(at)
        lam[sides[0]] = levels[i].lam
        other = np.arange(len(k)) != sides[0]
        times = np.full(len(k), nodes[i])
        times[other] = process.time(lam[other])
        if np.allclose(process.lam(times[other]), lam[other], rtol=1e-9, atol=1e-9):
            return times, (levels[i].rho if finite else 1.0)
        step *= 0.5  # beyond the levels that the process has
    raise ValueError(
        f"plan: no finer grid near t = {nodes[i]:g}; {process!r} has no levels around it"
    )


def _slope(errors: Sequence[float]) -> float:
    """The exponent of the shrinking factor, from the finest pair that is not rounding."""
    good = [(f, e) for f, e in zip(_SHRINK, errors, strict=True) if e > _ROUNDING]
    if len(good) < 2:
        return math.inf
    (f0, e0), (f1, e1) = good[-2:]
    return math.log(e0 / e1) / math.log(f0 / f1)


def _errors(grid: _Grid, i: int, shrink: float) -> list[float]:
    """Local errors of the steps of the window at node i."""
    times, c = _window(grid, i, shrink)
    draft = grid.solver.draft(grid.process, times)
    if grid.spared:
        nfe = sum(asked is not False for asked in draft.evaluated) - grid.spared
        draft = grid.solver.draft(grid.process, times, nfe)
    problem = _Problem(c)
    return [_local_error(draft, step, problem) for step in _steps(draft, times)]


def _stochastic(plan: Plan) -> bool:
    """Whether it draws, or its solver would with more evaluations."""
    return plan.stochastic or (plan.origin is not None and plan.origin.solver.stochastic)


def _deterministic(plan: Plan) -> None:
    if _stochastic(plan):
        raise ValueError(
            "plan: it draws noise; order conditions, error constants and stability are those of "
            "the ODE. The weak order is declared by the solver, and by every row"
        )


def orders(plan: Plan) -> Orders:
    """The orders of the bulk, the start and the end of a plan; see the head of this module."""
    _deterministic(plan)
    source = _source(plan)
    if source is None:
        return _declared(plan)
    grid = _grid(*source, plan)
    n = len(grid.nodes) - 1

    def exponent(grid: _Grid, i: int, which: slice) -> float:
        return _slope([sum(_errors(grid, i, shrink)[which]) for shrink in _SHRINK])

    inner = grid
    if n == 1:  # a node in between, to look at the bulk
        lam = [float(grid.process.lam(t)) for t in grid.nodes]
        known = [v for v in lam if math.isfinite(v)]
        at = sum(known) / len(known) if known else 0.0
        if len(known) == 1:
            at += 1.0 if math.inf in lam else -1.0  # toward the infinite end
        between = float(grid.process.time(at))
        inner = grid._replace(nodes=(grid.nodes[0], between, grid.nodes[1]), spared=0)
    last = len(inner.nodes) - 1
    picks = sorted({1, last // 2, last - 1} - {0})
    bulk = min(exponent(inner, i, slice(_SIDE - 1, _SIDE + 2)) for i in picks) - 1
    start, end = exponent(grid, 0, slice(_SIDE)), exponent(grid, n, slice(-_SIDE, None))
    if _growth(inner, last // 2 or 1) > 1.01:  # roots that are 1 move by O(step)
        bulk = 0.0  # not zero-stable: errors grow without bound
    return Orders(bulk, start, end, True)


def _growth(grid: _Grid, i: int) -> float:
    """The spectral radius of a step repeated for ever, as its size tends to 0: above 1 a method
    does not converge, whatever its local order."""
    times, _ = _window(grid, i, 1e-3)
    draft = grid.solver.draft(grid.process, times)
    steps = _steps(draft, times)
    frozen = _frozen(draft, steps, len(steps) // 2)
    return float(_radius(frozen, np.array([0.0]))[0])


def _declared(plan: Plan) -> Orders:
    """What the rows say: the highest is the bulk's; lower ones are made once each."""
    said = [row.order for row in plan.rows]
    bulk = max(said)
    low = [k for k, p in enumerate(said) if p < bulk]
    top = [k for k, p in enumerate(said) if p == bulk]
    start = min((said[k] + 1 for k in low if k < top[0]), default=math.inf)
    end = min((said[k] + 1 for k in low if k > top[0]), default=math.inf)
    return Orders(bulk, start, end, False)


def order(plan: Plan) -> int:
    """The order of the whole run, start-up and end included."""
    return orders(plan).order


# -- stability -------------------------------------------------------------------------------------


class _Frozen(NamedTuple):
    """A step as an endless recursion: new states from `memory` older ones, newest first, as
    (own + (1 - s) response) y; axes (row, old states and then new ones, modes)."""

    own: Array
    response: Array
    memory: int


def _frozen(draft: Draft, steps: Sequence[range], i: int) -> _Frozen:
    """Step i with its coefficients held fixed, in y = x / alpha. A state of an older step is the
    state at the same place, counted from the end, of that many steps before."""
    step, levels = steps[i], draft.levels
    r = len(step)
    place: dict[int, int] = {}  # of older states
    for back, g in enumerate(range(i - 1, -2, -1)):
        group = steps[g] if g >= 0 else range(steps[0].start)
        for k in group:
            place[k] = back * r + min(group[-1] - k, r - 1)
    rows = [draft.rows[k - draft.given] for k in step]
    used = {j for row in rows for j in (*row.a, *row.b) if j < step.start}
    memory = -(-(1 + max(place[j] for j in used)) // r) * r
    shapes = [np.shape(c) for row in rows for c in (*row.a.values(), *row.b.values())]
    shape = np.broadcast_shapes(*shapes)
    own, response = np.zeros((2, r, memory + r, math.prod(shape)))
    for n, (k, row) in enumerate(zip(step, rows, strict=True)):
        for table, terms in ((own, row.a), (response, row.b)):
            for j, c in terms.items():
                column = place[j] if j < step.start else memory + j - step.start
                scale = levels[j].alpha / levels[k].alpha
                if table is response:
                    at = _asked(draft, j)
                    assert at is not None  # a row has no data prediction of it otherwise
                    scale /= at.alpha
                table[n, column] += np.broadcast_to(c, shape).ravel() * scale
    both = np.concatenate([own, response]).reshape(-1, own.shape[-1])
    distinct = np.unique(both, axis=1).reshape(2, *own.shape[:2], -1)
    return _Frozen(distinct[0], distinct[1], memory)


def _radius(frozen: _Frozen, s: NDArray[Any]) -> Array:
    """Spectral radius for every stiffness s, the largest over modes."""
    own, response, memory = frozen
    r = len(own)
    largest = np.zeros(s.shape)
    for mode in range(own.shape[-1]):
        states = np.zeros((*s.shape, memory + r, memory), dtype=np.result_type(s, np.float64))
        states[..., np.arange(memory), np.arange(memory)] = 1.0
        for n in range(r):
            row = own[n, :, mode] + (1 - s[..., None]) * response[n, :, mode]
            states[..., memory + n, :] = np.einsum("...j,...jk->...k", row, states)
        newest = states[..., : memory - 1 : -1, :]
        after = np.concatenate([newest, states[..., : memory - r, :]], axis=-2)
        values = np.abs(np.linalg.eigvals(after)).max(-1)
        largest = np.maximum(largest, values)
    return largest


@dataclass(frozen=True, eq=False)
class Stability:
    """Linear stability of a plan, on dy / dlambda = -s y, y = x / alpha.

    Constants in rows do not matter: differences of two runs do not have them.
    That is a network with D = (1 - s) x / alpha: s = 1 is constant data; guidance and sharp data
    make s large (guidance of weight w multiplies the conditional part by w). The step to n + 1 is
    held fixed, repeated for ever, and called stable for the s for which no solution grows.

    steps: the steps looked at (those of finite size), by index. h: their sizes in lambda.
    intervals: for each the first interval (low, high) of real stiffness on which it is stable, with
        the sign for which exact solutions decay: of s, or of -s for h < 0. (0, 0): there is none;
        high = inf: no limit. low > 0 says that the step amplifies where D follows the state (s = 0
        is D = x / alpha, near clean data): extrapolating D over a long step does.
    limit: the largest stable stiffness, the smallest `high`. For DDIM 2 / (1 - exp(-h)), of the
        largest h. least: the largest `low`.
    """

    steps: tuple[int, ...]
    h: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    title: str
    _frozen: tuple[_Frozen, ...] = field(repr=False)
    _draft: Draft = field(repr=False)

    @property
    def limit(self) -> float:
        """The largest stiffness for which every step is stable."""
        return min(high for _, high in self.intervals)

    @property
    def least(self) -> float:
        """The stiffness from which on every step is stable; 0 for steps that are small enough."""
        return max(low for low, _ in self.intervals)

    def radius(self, step: int, s: Any) -> Array:
        """Spectral radius of one step, repeated, for (complex) stiffness s of any shape."""
        if step not in self.steps:
            raise ValueError(
                f"step = {step}; steps of finite size are {', '.join(map(str, self.steps))}"
            )
        return _radius(self._frozen[self.steps.index(step)], np.asarray(s))

    def amplification(self, s: Any) -> tuple[Array, Array]:
        """What the whole run multiplies y by, for (complex) stiffness s of any shape, and what the
        exact solution does: exp(-s (lambda_end - lambda_start)). Of the modes of a plan with a
        basis, the largest. States at alpha = 0 count as zero, and the run from the next node."""
        s, draft = np.asarray(s), self._draft
        dims = max(np.ndim(c) for r in draft.rows for c in (*r.a.values(), *r.b.values()))
        s = s.reshape(*s.shape, *(1,) * dims)
        levels = draft.levels
        states: dict[int, Any] = {}
        outputs: dict[int, Any] = {}
        begin = next(k for k, level in enumerate(levels) if level.alpha > 0)
        for k, level in enumerate(levels):
            if k < draft.given or k <= begin:
                share = np.exp(-s * (level.lam - levels[begin].lam)) if level.alpha else 0 * s
                states[k] = level.alpha * share
            else:
                states[k] = _value(draft.rows[k - draft.given], states, outputs)
            at = _asked(draft, k)
            if at is not None:
                outputs[k] = (1 - s) * states[k] / at.alpha if at.alpha else 0 * s
        ran = np.abs(states[len(levels) - 1]) / levels[-1].alpha
        with np.errstate(invalid="ignore"):
            exact = np.abs(np.exp(-s * (levels[-1].lam - levels[begin].lam)))
        if not math.isfinite(levels[-1].lam):
            exact = np.where(s.real > 0, 0.0, np.where(s.real < 0, math.inf, 1.0))
        modes = tuple(range(s.ndim - dims, ran.ndim))
        return ran.max(axis=modes), np.broadcast_to(exact, s.shape).max(axis=modes)

    def plot(self, target: str | os.PathLike[str] | Any) -> None:
        """Draw the regions of stability and the limit of every step, to a picture file or into two
        matplotlib axes (regions, limits). Needs matplotlib."""
        try:
            import matplotlib as mpl
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plot needs matplotlib: pip install "fewstep[plot]".') from error
        figure = None
        if isinstance(target, (str, os.PathLike)):
            figure = Figure(figsize=(11, 4.8), layout="constrained")
            axes = figure.subplots(1, 2, width_ratios=(3, 2))
        else:
            axes = np.ravel(target)
            if len(axes) != 2:
                raise ValueError(f"target: {len(axes)} axes; need two, or the name of a picture")
        colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(self.steps)))
        self._plot_regions(axes[0], colours)
        self._plot_limits(axes[1], colours)
        if figure is not None:
            figure.suptitle(f"Stability of {self.title}")
            figure.savefig(os.fspath(target), dpi=120)

    def _plot_regions(self, ax: Any, colours: Array) -> None:
        sign = math.copysign(1.0, self.h[0])
        finite = [v for _, v in self.intervals if 0 < v < math.inf]
        width = 1.3 * max(finite, default=10.0)
        width = min(width, 4 * min(finite, default=width))
        re, im = np.linspace(-0.15 * width, width, 140), np.linspace(0, 0.75 * width, 90)
        s = sign * (re + 1j * im[:, None])
        shown = np.unique(np.linspace(0, len(self.steps) - 1, 6).round().astype(int))
        for n in shown:
            values = _radius(self._frozen[n], s)
            both, up = np.concatenate([values[:0:-1], values]), np.concatenate([-im[:0:-1], im])
            ax.contour(re, up, both, levels=[1 + 1e-6], colors=[colours[n]], linewidths=1.8)
            ax.plot(
                [], [], color=colours[n], label=f"step {self.steps[n] + 1}, h = {self.h[n]:.2f}"
            )
        worst = int(np.argmin([high for _, high in self.intervals]))
        if 0 < self.limit < math.inf:
            ax.plot([self.limit], [0], "o", color="crimson", zorder=5)
            ax.annotate(
                f"limit {self.limit:.3g} (step {self.steps[worst] + 1})",
                (self.limit, 0),
                xytext=(8, -14),
                textcoords="offset points",
                color="crimson",
                bbox={"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.8},
            )
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.axvline(1, color="0.6", linewidth=0.8, linestyle=":", label="s = 1: constant data")
        ax.set_xlabel("Re s" if sign > 0 else "Re -s")
        ax.set_ylabel("Im s")
        ax.set_title("stable inside; dy / dlambda = -s y", fontsize=10)
        ax.set_aspect("equal")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)

    def _plot_limits(self, ax: Any, colours: Array) -> None:
        where = np.array(self.steps) + 1
        ddim = 2 / np.abs(np.expm1(-np.array(self.h)))
        finite = [v for _, v in self.intervals if v < math.inf]
        top = 1.1 * max(*finite, *ddim[ddim < 4 * max(finite, default=1.0)], 1.0)
        low, high = np.array(self.intervals).T
        ax.plot(where, ddim, "--", color="0.5", label="limit of DDIM on these steps")
        ax.vlines(where, low, np.minimum(high, top), colors=colours, linewidth=7, alpha=0.75)
        ax.plot([], [], color="0.4", linewidth=7, label="stable")
        ax.axhline(self.limit, color="crimson", linewidth=1, label=f"limit {self.limit:.3g}")
        ax.axhline(1, color="0.6", linestyle=":", linewidth=0.8)
        ax.set_ylim(0, top)
        ax.set_xticks(where if len(where) <= 12 else where[:: len(where) // 10])
        ax.set_xlabel("step")
        ax.set_ylabel("real stiffness s" if self.h[0] > 0 else "real -s")
        ax.set_title("stable interval of every step", fontsize=10)
        # Below: bars may be anywhere.
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8, frameon=False
        )


def _interval(frozen: _Frozen, h: float) -> tuple[float, float]:
    """The first interval of real |s| on which the step is stable."""
    unit = math.copysign(1.0, h) / abs(math.expm1(-h))  # DDIM is stable to 2 of these

    def good(z: Array) -> NDArray[np.bool_]:
        return _radius(frozen, unit * z) <= 1 + 1e-9

    def refine(a: float, b: float) -> float:
        """Where it turns, between two points that differ."""
        for _ in range(8):
            z = np.linspace(a, b, 17)
            n = int(np.argmax(good(z) != good(z[:1])))
            a, b = float(z[n - 1]), float(z[n])
        return 0.5 * (a + b)

    z = np.geomspace(1e-3, 1e4, 200)
    stable = good(z)
    if not stable.any():
        return 0.0, 0.0
    first = int(np.argmax(stable))
    low = refine(z[first - 1], z[first]) if first else 0.0
    after = ~stable[first:]
    last = first + int(np.argmax(after))
    high = refine(z[last - 1], z[last]) if after.any() else math.inf
    return abs(unit) * low, abs(unit) * high


def stability(plan: Plan) -> Stability:
    """Regions of linear stability of every step, and their limits on the real axis."""
    _deterministic(plan)
    draft = _draft(plan)
    nodes = _nodes(plan)
    steps = _steps(draft, nodes)
    ends = [draft.levels[steps[0].start - 1], *(draft.levels[step[-1]] for step in steps)]
    finite = [
        i
        for i, pair in enumerate(itertools.pairwise(ends))
        if all(math.isfinite(v.lam) for v in pair)
    ]
    kept, frozen = [], []
    for i in finite:
        used = {j for k in steps[i] for j in draft.rows[k - draft.given].a}
        used |= {j for k in steps[i] for j in draft.rows[k - draft.given].b}
        if all(draft.levels[j].alpha > 0 for j in used):
            kept.append(i)
            frozen.append(_frozen(draft, steps, i))
    if not kept:
        raise ValueError(
            "plan: no step of finite size in lambda; stability is that of steps between alpha > 0 "
            "and sigma > 0"
        )
    h = tuple(float(ends[i + 1].lam - ends[i].lam) for i in kept)
    intervals = tuple(_interval(f, size) for f, size in zip(frozen, h, strict=True))
    name = plan.about.get("solver", "plan")
    title = f"{name}: {plan.nfe} NFE, {plan.about.get('grid', 'own')} grid"
    return Stability(tuple(kept), h, intervals, title, tuple(frozen), draft)


# -- error constant --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorConstant:
    """Leading constants of the local error, in data terms.

    From exact history, with D a given function of lambda, a step of size h in lambda errs by

        y_exact - y = sum_{k = 1..p} C_k h^(p+1) d^k D / dlambda^k + O(h^(p+2)),   y = x / alpha,

    p its order. Data-form methods in lambda have C_p alone: DDIM 1/2, Adams-Bashforth 2 5/12. Rows
    of another form or variable (noise, flow; rho, t) are exact on other functions than polynomials
    in lambda, and have all C_k. Not in these numbers: what a Runge-Kutta step adds because D
    depends on its stages (terms in dD/dy); and, of rows that know statistics of the data, the parts
    of the error that are constant or in proportion to y.

    order: p of the steps in bulk. limit: C_1 .. C_p for equal steps h -> 0, at the middle of the
        plan; empty if the plan cannot be compiled again.
    orders: of every step of the plan, as its last row declares. steps: for each the constant C_p,
        p its own order, at its own size and history: (y_exact - y) / h^(p+1) for D = (lambda -
        lambda_start)^p / p!. nan where a step or its history is infinite in lambda.
    """

    order: int
    limit: tuple[float, ...]
    orders: tuple[int, ...]
    steps: tuple[float, ...]


def _moment_error(draft: Draft, step: range, start: Level, k: int) -> float:
    """y_exact - y of a step for D = delta^k / k!, delta = lambda - lambda_start, from exact
    history; the largest over modes."""

    def state(level: Level) -> float:
        delta = level.lam - start.lam
        return sum((-1) ** (k - m) * delta**m / math.factorial(m) for m in range(k + 1))

    def data(level: Level) -> float:
        return (level.lam - start.lam) ** k / math.factorial(k)

    states = {j: draft.levels[j].alpha * state(draft.levels[j]) for j in range(step.start)}
    outputs = {}
    for j in range(step[-1]):
        at = _asked(draft, j)
        if at is not None:
            outputs[j] = data(at)
    for j in step:
        row = draft.rows[j - draft.given]
        if any(not math.isfinite(draft.levels[i].lam) for i in (*row.a, *row.b, j)):
            return math.nan
        states[j] = _value(row, states, outputs)
    end = draft.levels[step[-1]]
    gap = np.ravel(state(end) - states[step[-1]] / end.alpha)
    return float(gap[np.argmax(np.abs(gap))])


def error_constant(plan: Plan, found: Orders | None = None) -> ErrorConstant:
    """Leading constants of the local error of every step, and of equal small steps. found: the
    orders of the plan, if they are known already."""
    _deterministic(plan)
    draft = _draft(plan)
    steps = _steps(draft, _nodes(plan))
    starts = [draft.levels[step.start - 1] for step in steps]
    said = [draft.rows[step[-1] - draft.given].order for step in steps]
    own = []
    with np.errstate(invalid="ignore"):
        for step, start, p in zip(steps, starts, said, strict=True):
            h = draft.levels[step[-1]].lam - start.lam
            fine = math.isfinite(h)
            own.append(_moment_error(draft, step, start, p) / h ** (p + 1) if fine else math.nan)
    source, found = _source(plan), found or orders(plan)
    p, limit = round(found.bulk), ()
    if source is not None and p > 0:
        grid = _grid(*source, plan)
        lam = [float(grid.process.lam(t)) for t in grid.nodes]
        inside = [v for v in lam if math.isfinite(v)]
        middle, sign = inside[len(inside) // 2], (1.0 if lam[-1] > lam[0] else -1.0)
        limit = tuple(_limit_constant(grid, middle, sign, p, k) for k in range(1, p + 1))
    return ErrorConstant(p, limit, tuple(said), tuple(own))


def _limit_constant(grid: _Grid, middle: float, sign: float, p: int, k: int) -> float:
    """C_k for equal steps, extrapolated to size 0."""
    values = []
    finest = 0.01 if p < 3 else 0.04  # h^(p+1) must stay far above rounding
    for size in (4 * finest, 2 * finest, finest):
        lam = middle + sign * size * np.arange(-_SIDE, _SIDE + 1)
        times = np.asarray(grid.process.time(lam))
        draft = grid.solver.draft(grid.process, times)
        step = _steps(draft, times)[_SIDE]
        start = draft.levels[step.start - 1]
        h = draft.levels[step[-1]].lam - start.lam
        values.append(_moment_error(draft, step, start, k) / h ** (p + 1))
    once = [2 * b - a for a, b in itertools.pairwise(values)]
    return (4 * once[1] - once[0]) / 3


# -- in words --------------------------------------------------------------------------------------


def _family(solver: Solver) -> tuple[str, str]:
    """The mathematics of the solver's family, from where it is implemented, and the parameters."""
    parts = vars(solver).values() if hasattr(solver, "__dict__") else ()
    home = type(solver).__module__
    numbers = next(
        (
            v
            for v in parts
            if is_dataclass(v) and not isinstance(v, Solver) and type(v).__module__ != _BASE
        ),
        solver,
    )
    if numbers is not solver and home in (_BASE, Singlestep.__module__):
        home = type(numbers).__module__
    values = (
        {f.name: getattr(numbers, f.name) for f in fields(numbers)}
        if is_dataclass(numbers) and numbers is not solver
        else {}
    )
    plain = [f"{k} = {v}" for k, v in values.items() if isinstance(v, (str, int, float, bool))]
    if home == _BASE:  # a coefficient function of one's own: what it, or its module, says of itself
        step = getattr(solver, "step", None)
        step = getattr(step, "func", step)  # of a functools.partial
        home = getattr(step, "__module__", home)
        text = getattr(step, "__doc__", None) or getattr(sys.modules.get(home), "__doc__", None)
        return inspect.cleandoc(text or ""), ", ".join(plain)
    paragraphs = (getattr(sys.modules.get(home), "__doc__", None) or "").strip().split("\n\n")
    kept, seen = [], False
    for text in paragraphs:
        formula = text.startswith("    ")
        if seen and not formula and not text[:1].islower():
            break
        kept.append(text)
        seen = seen or formula
    return "\n\n".join(kept), ", ".join(plain)


def explain(plan: Plan) -> str:
    """What the plan does and where it comes from, for a person to read."""
    about, source = plan.about, _source(plan)
    name = about.get("solver", "plan")
    where = [
        f"{about[k]} {k}" if k == "grid" else about[k] for k in ("process", "grid") if k in about
    ]
    ends = [f"t = {v.t:g} (sigma = {v.sigma:.4g})" for v in (plan.levels[0], plan.levels[-1])]
    out = [f"{name}: {plan.nfe} network evaluations, {' to '.join(ends)}", ", ".join(where)]
    known = solvers.get(name) if source is None else source[0]
    if known is not None:
        text, parameters = _family(known)
        out += ["", "Formula", *(f"  {line}".rstrip() for line in text.splitlines())]
        if parameters:
            out.append(f"  Here: {parameters}.")
        out += [f"  Source: {known.source}.", "", "Ends", f"  {known.ends}."]
        if known.fragile:
            out.append(f"  Fragile: {known.fragile}")
    elif plan.raw or plan.basis is not None or not known:
        out += ["", "Formula", "  X[i+1] = sum a X + sum b D; print the plan for its coefficients."]
    out += ["", "Order"]
    said = [row.order for row in plan.rows]
    out.append(f"  declared by rows: {', '.join(map(str, said))}")
    if _stochastic(plan):
        out.append(f"  stochastic ({len(plan.draws)} draws): orders are weak, of moments")
        if known is not None:
            strong = known.strong_order or "none, its draws belong to no path"
            out.append(f"  of the method: {known.order} (weak), {strong} (strong)")
        return "\n".join([*out, *_elsewhere(name)])
    found = orders(plan)
    if known is not None and known.smooth_order:
        out.append(
            f"  of the method: {known.order} on any grid, {known.smooth_order} on smooth ones"
        )
    elif known is not None:
        out.append(f"  of the method: {known.order}")
    how = "computed" if found.computed else "as declared (this plan cannot be compiled again)"
    parts = zip(("bulk", "start", "end"), found[:3], strict=True)
    shown = ", ".join(f"{k} {'no error' if v == math.inf else f'{v:.1f}'}" for k, v in parts)
    out.append(f"  of this plan, {how}: {shown}; together {found.order}")
    constant = error_constant(plan, found)
    if constant.limit:
        terms = [f"{c:.4g} D^({k})" for k, c in enumerate(constant.limit, 1) if abs(c) > 5e-5]
        p = constant.order
        out.append(f"  error of a small step h in lambda: h^{p + 1} ({' + '.join(terms) or '0'})")
    out += ["", "Stability (dy/dlambda = -s y; s = 1 is constant data, guidance makes s large)"]
    try:
        regions = stability(plan)
        n = int(np.argmin([high for _, high in regions.intervals]))
        step, h = regions.steps[n] + 1, regions.h[n]
        out.append(
            f"  largest stable s: {regions.limit:.3g}, at step {step} (h = {h:.3g}; DDIM has"
        )
        out[-1] += f" {2 / abs(math.expm1(-h)):.3g} there)"
        if regions.least > 0:
            out.append(f"  some steps amplify for s below {regions.least:.2g}")
    except ValueError as error:
        out.append(f"  {error}")
    return "\n".join([*out, *_elsewhere(name)])


def _elsewhere(name: str) -> list[str]:
    """What other code calls a solver."""
    also = NAMES.get(name)
    if also is None:
        return []
    out = ["", "Elsewhere"]
    rows = (("diffusers", also.diffusers), ("k-diffusion", also.k_diffusion))
    for label, entries in (*rows, ("ComfyUI", also.comfyui)):
        out.append(f"  {label + ':':<13}{'; '.join(entries) or 'none'}")
    return out + [f"  Note: {note}." for note in also.notes]
