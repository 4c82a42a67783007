r"""Searched grids: nodes from an analytic error model (`dmn`) or from the model itself (`gits`).

Both return a `Grid`, so the result is used like any other and one search serves any budget.

dmn. With x / sigma as the state, the data form of the multistep method adds

    sum_j W_sj D_j,    W_sj = int_{step s} exp(lambda) ell_j(lambda) dlambda        (exact weights)

in step s, so an error of D_j enters the result with the weight C_j = sum_s W_sj, unamplified. If it
is proportional to sigma_j^p / alpha_j, the nodes are those that minimise

    L = sum_j |C_j| sigma_j^p / alpha_j,     orders 1, 2, 3, ..., 3, 2, 1.

The official code differs in one place, which is kept: the terms of the first three steps and of the
last are not summed with the others but count as a 2-norm per step. Its comment advises to sum those
of the second and third as well above 7 steps: then L is made small by weights that cancel, and
samples can be 4 to 40 times worse (digits on EDM, NFE 5 to 12).

gits. A teacher run through n candidate nodes gives states x_i and data predictions D_i. One Euler
step in y = x / alpha and rho = sigma / alpha from node i to node j (DDIM, on any process) lands at

    y_ij = D_i + rho_j e_i,     e_i = (x_i - alpha_i D_i) / sigma_i,

and the distance of y_ij from the teacher's y_j is its cost c_ij. The nodes 0 = i_0 < ... < i_N of N
steps are those of least sum_k gamma^k c(i_k, i_{k+1}), found exactly by dynamic programming; gamma
> 1 holds later errors for worse. One table of costs serves every N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._denoiser import Model
from ._grids import Grid, as_grid, grids, replaced
from ._noise import start_noise
from ._prediction import unknown
from ._process import Array, Process
from ._sampling import DEFAULT_SOLVER, plan, steps
from ._solvers._base import Solver
from ._solvers._registry import as_solver

__all__ = ["CostGrid", "dmn", "gits", "shortest"]

# -- DMN -----------------------------------------------------------------------------------------

_X, _W = np.polynomial.legendre.leggauss(24)
_X, _W = 0.5 * (_X + 1), 0.5 * _W
_STARTS = ("lambda", "uniform", "karras", "softened")
_WIDTH = 3  # nodes of a step
_MOST = 50  # steps; a limit on time
_ALONE = [0, 1, 2, -1]  # steps whose terms are not summed with the others


def dmn(p: int = 1) -> Grid:
    """The grid that minimises the error bound of a data-form multistep solver of order 3, on any
    process, from nothing but the process: "Accelerating Diffusion Sampling with Optimized Time
    Steps" (arXiv 2402.17376).

    p: errors of the data prediction are modelled as sigma^p / alpha: 1 for pixels, 2 for latents.

    L has kinks and many local minima, so it is minimised from four grids and again from the best,
    with exact gradients: below the values of the official code from 8 steps on. Takes 0.02 s for 5
    steps, 0.5 s for 10, 2 s for 20, at most 50; computed once per process and number of steps. With
    final = "zero" the last node, t_end in the search, is moved to sigma = 0. Needs scipy.
    """
    if isinstance(p, bool) or not isinstance(p, int) or p < 1:
        raise ValueError(f"p = {p!r}; need an integer >= 1")
    name = "dmn" if p == 1 else f"dmn({p})"
    known: dict[object, Array] = {}

    def place(process: Process, steps: int, final: str) -> Array:
        if steps > _MOST:
            raise ValueError(f"nfe = {steps}; grid {name!r} is searched for at most {_MOST} steps")
        start, end = process.lam_start, float(process.lam(process.t_end))

        def scale(lam: Array) -> Array:
            """sigma^p / alpha."""
            if p == 1:
                return np.exp(-lam)
            return np.exp(-lam) * process.sigma(process.time(lam)) ** (p - 1)

        # What the answer depends on, for any process: two clocks on one path share it.
        key = steps, start, end, scale(np.linspace(start, end, 65)).tobytes()
        if key not in known:
            begin = [
                process.lam(np.asarray(grids[name].place(process, steps, "min"))[1:-1])
                for name in _STARTS
            ]
            known[key] = _optimum(_Bound(scale, start, end, steps), begin)
        t = process.time(known[key])
        t[0], t[-1] = process.t_start, process.t_end
        return t

    return replaced(Grid(name, place), name)


@dataclass(frozen=True)
class _Bound:
    """L and its gradient, as a function of the inner lambdas."""

    scale: Callable[[Array], Array]
    start: float
    end: float
    steps: int

    def __call__(self, inner: Array) -> tuple[float, Array]:
        n, count = self.steps, len(inner)
        lam = np.concatenate([[self.start], inner, [self.end]])
        # Complex steps: row m carries the derivative by inner[m] in its imaginary part, to the last
        # digit. The scale may be a table, and is differentiated by a central difference.
        tiny = 1e-30
        moved = np.tile(lam.astype(complex), (max(count, 1), 1))
        moved[np.arange(count), np.arange(count) + 1] += tiny * 1j
        w = multistep_weights(moved)
        scale = self.scale(lam[:-1])
        slope = (self.scale(lam[:-1] + 1e-5) - self.scale(lam[:-1] - 1e-5)) / 2e-5
        node = np.arange(n)[:, None] - np.arange(_WIDTH)  # of step s, k back
        used = np.arange(_WIDTH) < _orders(n)[:, None]
        node = np.where(used, node, 0)
        terms = np.where(used, w[0].real * scale[node], 0.0)
        by_terms = np.zeros_like(terms)  # dL / dterms
        total, summed = 0.0, np.zeros(n)
        alone = np.zeros(n, dtype=bool)
        alone[[k for k in _ALONE if k < n]] = True
        for s in np.flatnonzero(alone):
            size = math.sqrt(float(np.square(terms[s]).sum()))
            total += size
            by_terms[s] = terms[s] / size
        np.add.at(summed, node[~alone], terms[~alone])
        by_terms[~alone] = np.sign(summed)[node[~alone]]
        total += float(np.abs(summed).sum())
        by_terms = np.where(used, by_terms, 0.0)
        gradient = ((w.imag[:count] / tiny) * scale[node] * by_terms).sum((1, 2))
        by_scale = np.zeros(n)
        np.add.at(by_scale, node, w[0].real * by_terms)
        return total, gradient + (by_scale * slope)[1:]


def _orders(n: int) -> Any:
    s = np.arange(n)
    return np.minimum(_WIDTH, np.minimum(s + 1, n - s))


def multistep_weights(lam: Any) -> Any:
    """W[..., s, k]: weight of node s - k in step s of x / sigma, for nodes lam[..., 0..N], which
    may be complex; orders 1, 2, 3, ..., 3, 2, 1. The same integrals as `fewstep.weights`, all steps
    at once."""
    orders = _orders(lam.shape[-1] - 1)
    out = np.zeros((*lam.shape[:-1], len(orders), _WIDTH), lam.dtype)
    for order in range(1, _WIDTH + 1):
        s = np.flatnonzero(orders == order)
        start, h = lam[..., s], lam[..., s + 1] - lam[..., s]
        delta = h[..., None] * _X
        kernel = np.exp(start[..., None] + delta) * (h[..., None] * _W)
        nodes = [(lam[..., s - k] - start)[..., None] for k in range(order)]
        for k in range(order):
            ell = kernel
            for m in range(order):
                if m != k:
                    ell = ell * ((delta - nodes[m]) / (nodes[k] - nodes[m]))
            out[..., s, k] = ell.sum(-1)
    return out


def _optimum(bound: _Bound, begin: Sequence[Array]) -> Array:
    """All lambdas of the lowest minimum found from these inner ones."""
    n, start, end = bound.steps, bound.start, bound.end
    if n == 1:
        return np.array([start, end])
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError("grid 'dmn' needs scipy: pip install \"fewstep[exact]\"") from error
    gap = 1e-3 * (end - start) / n
    order = np.eye(n, n - 1) - np.eye(n, n - 1, -1)  # gaps = order @ inner + offset
    offset = np.zeros(n)
    offset[0], offset[-1] = -start, end
    constraint = {
        "type": "ineq",
        "fun": lambda x: order @ x + offset - gap,
        "jac": lambda x: order,
    }

    def solve(begin: Array) -> tuple[float, Array]:
        # in units of the value at the start: the optimiser's tolerance is absolute
        unit = bound(begin)[0]

        def scaled(x: Array) -> tuple[float, Array]:
            value, gradient = bound(x)
            return value / unit, gradient / unit

        options = {"maxiter": 150, "ftol": 1e-9}
        result = minimize(
            scaled, begin, jac=True, method="SLSQP", constraints=[constraint], options=options
        )
        if result.fun < 1 and bool((order @ result.x + offset > 0).all()):
            return result.fun * unit, result.x
        return unit, begin

    even = np.linspace(start, end, n + 1)[1:-1]
    # Slightly evened out, so that nodes that meet, or lie outside, start apart.
    runs = [solve(0.98 * np.clip(x, start, end) + 0.02 * even) for x in begin]
    best, x = min(runs, key=lambda run: run[0])
    for _ in range(5):  # a fresh start leaves a kink that stopped the last one
        value, moved = solve(x)
        if not value < best * (1 - 1e-4):
            break
        best, x = value, moved
    return np.concatenate([[start], x, [end]])


# -- GITS ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class CostGrid(Grid):
    """Nodes chosen from `times` for least total `cost`: what `gits` returns. A grid for any number
    of steps below len(times); `dataclasses.replace(grid, gamma=...)` weighs errors differently.

    times: (n,), from t_start to t_end and, if the process has one, t_clean.
    cost: (n, n), cost[i, j] of one step from node i to node j > i. nfe: network evaluations per
    sample that the table took. path: the process searched on.
    """

    place: Callable[[Process, int, str], Array] = field(init=False, repr=False)
    times: Array = field(repr=False)
    cost: Array = field(repr=False)
    gamma: float
    nfe: int
    path: Process

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)
        if self.cost.shape != (len(self.times),) * 2 or len(self.times) < 2:
            raise ValueError(
                f"cost has shape {self.cost.shape}; need a square table for {len(self.times)} times"
            )
        object.__setattr__(self, "place", self._place)

    def _place(self, process: Process, steps: int, final: str) -> Array:
        last = process.t_end if final == "min" else process.t_clean
        first, end = (np.flatnonzero(self.times == t) for t in (process.t_start, last))
        if not np.array_equal(process.lam(self.times), self.path.lam(self.times)):
            raise ValueError(
                f"grid = {self.name!r} was searched on {self.path!r}; search again for {process!r}"
            )
        if not (len(first) and len(end)):
            raise ValueError(
                f"grid = {self.name!r} has no node at t = {process.t_start:g} or {last:g}; it was "
                f"searched from {self.times[0]:g} to {self.times[-1]:g}, search again"
            )
        i, j = int(first[0]), int(end[0])
        if steps > j - i:
            raise ValueError(
                f"nfe = {steps}; grid {self.name!r} chooses from {j - i + 1} nodes: use at most "
                f"{j - i}, or search with more nodes"
            )
        return self.times[i + shortest(self.cost[i : j + 1, i : j + 1], steps, self.gamma)]


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma = {gamma}; need a positive number")


def shortest(cost: Array, steps: int, gamma: float = 1.0) -> Any:
    """Indices 0 = i_0 < ... < i_steps = n - 1 of least sum_k gamma^k cost[i_k, i_{k+1}], exactly:
    V_1(i) = cost[i, n - 1], V_k(i) = min_{j > i} cost[i, j] + gamma V_{k-1}(j)."""
    n = len(cost)
    ahead = np.where(np.triu(np.ones((n, n), dtype=bool), 1), cost, np.inf)
    value, choices = ahead[:, -1], []
    for _ in range(steps - 1):
        candidates = ahead + gamma * value
        choices.append(candidates.argmin(1))
        value = candidates.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return np.array([*path, n - 1])


def gits(
    model: Model,
    shape: Sequence[int],
    *,
    nodes: int = 61,
    metric: Literal["dev", "l1", "l2"] = "dev",
    gamma: float = 1.15,
    solver: str | Solver = DEFAULT_SOLVER,
    grid: str | Grid = "karras",
    seed: int | Sequence[int] = 0,
    batch: int | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "gits",
) -> CostGrid:
    """The grid that follows this model's own trajectories best: "On the Trajectory Regularity of
    ODE-based Diffusion Sampling" (arXiv 2405.11326). Works for guided models too.

        grid = fs.gits(model, (64, 3, 32, 32))
        images = fs.sample(model, (16, 3, 32, 32), nfe=6, grid=grid)

    shape: (samples, ...): how many trajectories, of what shape; 64 to 256 are enough. Costs one
        teacher run each, `nodes` evaluations, and no gradients.
    nodes: candidates from t_start to t_end, placed by `grid`; sigma = 0 is a candidate besides.
    metric: of the distance between an Euler step and the teacher, per element: "dev" compares the
        distances from the straight line between the teacher's ends (the paper's), "l2" and "l1" the
        states.
    gamma: weight of a later step's error relative to the one before; 1.15 in the paper, which scans
        1.0 to 1.2 for text to image. `dataclasses.replace(grid, gamma=...)` costs nothing: try a
        few with the solver you will use.
    solver: of the teacher; one evaluation per step.
    seed, cond, device, dtype: as for `sample`, for all samples.
    batch: how many trajectories are kept at a time: their states at all nodes, three times over.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    shape = tuple(shape)
    if not shape or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise ValueError(f"shape = {shape}; need positive integers, samples first")
    if metric not in _METRICS:
        raise ValueError(unknown("metric", str(metric), _METRICS))
    _check_gamma(gamma)
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 2:
        raise ValueError(f"nodes = {nodes!r}; need an integer >= 2")
    if as_solver(solver).nfe_per_step != 1:
        raise ValueError(f"solver = {solver!r}; the teacher needs one of 1 evaluation per step")
    samples = shape[0]
    size = samples if batch is None else batch
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"batch = {batch!r}; need an integer >= 1, or None for all {samples}")
    times = plan(solver, model, nodes - 1, grid=as_grid(grid), final="min").times
    process, clean = model.process, model.process.t_clean
    if clean is not None:
        times = np.append(times, clean)
    teacher = plan(solver, model, grid=list(times))
    cost = np.zeros((len(times), len(times)))
    where = model.device if device is None else device
    for first in range(0, samples, size):
        count = min(size, samples - first)
        seeds = seed if isinstance(seed, (int, np.integer)) else list(seed)[first : first + count]
        x = start_noise(
            (count, *shape[1:]),
            seeds,
            first=first if isinstance(seed, (int, np.integer)) else 0,
            dtype=dtype,
            device=where,
        )
        x = x * teacher.prior_std
        states, data = [x], []
        part = {k: _part(v, first, count, samples) for k, v in (cond or {}).items()}
        for record in steps(model, x=x, solver=teacher, cond=part):
            data.append(record.denoised)
            states.append(record.x)
        cost += _costs(process, times, states, data, metric) * (count / samples)
    return CostGrid(name=name, times=times, cost=cost, gamma=gamma, nfe=teacher.nfe, path=process)


def _part(value: Any, first: int, count: int, samples: int) -> Any:
    """The condition of `count` samples from number `first`."""
    if isinstance(value, Mapping):
        return {k: _part(v, first, count, samples) for k, v in value.items()}
    per_sample = isinstance(value, (list, tuple)) and len(value) == samples
    if per_sample or (isinstance(value, Tensor) and value.ndim and value.shape[0] == samples):
        return value[first : first + count]
    return value


def _rms(v: Tensor) -> Tensor:
    """Root mean square over the elements of each (node, sample)."""
    return v.flatten(2).square().mean(2).sqrt()


_METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "dev": _rms,
    "l1": lambda v: v.flatten(2).abs().mean(2),
    "l2": _rms,
}


def _costs(
    process: Process,
    times: Array,
    states: Sequence[Tensor],
    data: Sequence[Tensor],
    metric: str,
) -> Array:
    """cost[i, j], averaged over the samples of these trajectories."""
    levels = [process.level(float(t)) for t in times]
    measure, n = _METRICS[metric], len(times)
    # y = x / alpha at nodes 1..; at node 0 alpha may be 0, and it is nobody's target
    y = torch.stack([x / v.alpha for x, v in zip(states[1:], levels[1:], strict=True)])
    rho = torch.tensor([v.rho for v in levels[1:]], dtype=y.dtype, device=y.device)
    rho = rho.reshape(-1, *(1 for _ in y.shape[1:]))
    # direction of the line through the teacher's ends: y_0 - y_n, or, where alpha = 0, its limit
    begin = levels[0]
    line = states[0] / begin.sigma if begin.alpha == 0 else states[0] / begin.alpha - y[-1]
    flat = line.flatten(1)
    flat = flat / flat.square().sum(1, keepdim=True).sqrt()

    def deviation(v: Tensor) -> Tensor:
        """The part of y - y_n perpendicular to the line."""
        v = (v - y[-1]).flatten(2)
        return v - (v * flat).sum(2, keepdim=True) * flat

    goal = measure(deviation(y)) if metric == "dev" else None
    cost = np.full((n, n), np.inf)
    for i in range(n - 1):
        noise = (states[i] - levels[i].alpha * data[i]) / levels[i].sigma
        landed = data[i] + rho[i:] * noise
        if goal is None:
            distance = measure(landed - y[i:])
        else:
            distance = measure(deviation(landed)) - goal[i:]
        cost[i, i + 1 :] = distance.mean(1).double().cpu().numpy()
    return cost
