r"""Noise for policy gradients on flow models: Flow-GRPO's rows, and noise in chosen steps only.

Flow-GRPO (arXiv 2505.05470) runs the reverse SDE of the straight path, alpha = 1 - t, sigma = t,
with velocity u = e - D and diffusion w = a sqrt(t / (1 - t)), by Euler-Maruyama, dt < 0:

    x' = x (1 + w^2 dt / (2 t)) + u (1 + w^2 (1 - t) / (2 t)) dt + w sqrt(-dt) Z

On another path it is this row in x / (alpha + sigma), t = sigma / (alpha + sigma). At t = 1, 1 - t
in w is that of the next node, as published. a is a noise level on every path: since
g^2 = 2 t / (1 - t), eta^2 = w^2 / g^2 = a^2 / 2, constant (a = 0.7: 0.245).

It has weak order 1 and inflates the variance: of Gaussian data of standard deviation 0.5 by up to
22 % half-way in 10 steps, so that the network sees more noise than it is told. The exact
first-order row of the same SDE, with eta^2 = a^2 / 2, does not, costs the same, and has a
log-density too (`State.transition`): use that one, and this one to compare.

G2RPO (arXiv 2510.01982) lets a single step draw noise, so that a reward is credited to it alone,
and takes deterministic steps before and after: `noise_in_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np

from .._noise import Draw
from .._plan import Row
from .._process import Array, Level, Process
from ._base import Draft, Formula, Multistep, Solver

__all__ = ["NoiseInSteps", "flow_grpo", "noise_in_steps"]

_FRAGILE = "long steps from t near 1, where w is large: Euler-Maruyama multiplies the state"


def flow_grpo(a: float = 0.7, *, name: str | None = None) -> Multistep:
    """Flow-GRPO's Euler-Maruyama row, 1 NFE per step; see the module.

    a: the noise level, eta^2 = a^2 / 2; 0 is "ddim". The step to sigma = 0 is x = D, without
        noise; the published code adds w sqrt(t) Z there.
    """
    if not 0 <= a < math.inf:
        raise ValueError(f"a = {a}; need a finite noise level >= 0")
    return Multistep(
        name=name or f"flow_grpo({a:g})",
        order=1,
        step=partial(_euler_maruyama, a),
        source="Flow-GRPO, 2505.05470, Euler-Maruyama of its flow SDE",
        ends="from alpha = 0 w is that of the next node; at sigma = 0: D, without noise",
        fragile=_FRAGILE,
        stochastic=a > 0,
        strong_order=1 if a > 0 else 0,
        scaled=lambda s: flow_grpo(s * a),
        member="ddim",
    )


def _euler_maruyama(a: float, process: Process, history: Sequence[Level], end: Level) -> Formula:
    start = history[0]
    if end.sigma == 0:
        return Formula([0.0], [end.alpha], 1)
    (n, t, clean), (m, to, left) = _straight(start), _straight(end)
    dt = to - t
    w2 = a * a * t / (clean or left)
    slope = (1 + w2 * clean / (2 * t)) * dt / t  # u = (x - D) / t
    x = (m / n) * (1 + w2 * dt / (2 * t) + slope)
    noise: dict[Draw, Any] = {}
    if a > 0:
        clock = (0.5 * math.log(to), 0.5 * math.log(t))  # W is Brownian in t
        noise[Draw(start, end, clock)] = m * math.sqrt(-w2 * dt)
    return Formula([x], [-m * slope], 1, exact=a == 0, noise=noise)


def _straight(level: Level) -> tuple[float, float, float]:
    """alpha + sigma, and t, 1 - t on the straight path."""
    n = level.alpha + level.sigma
    return n, level.sigma / n, level.alpha / n


@dataclass(frozen=True)
class NoiseInSteps(Solver):
    """See `noise_in_steps`."""

    noisy: Solver
    still: Solver
    chosen: tuple[int, ...]
    name: str
    stochastic: bool = True
    order: int = field(init=False)
    source: str = field(init=False)
    ends: str = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "order", min(self.noisy.order, self.still.order))
        put(self, "source", f"{self.noisy.source}; single steps: G2RPO, 2510.01982")
        put(self, "ends", self.noisy.ends)
        put(self, "nfe_per_step", self.noisy.nfe_per_step)
        put(self, "strong_order", self.noisy.strong_order)
        put(self, "fragile", self.noisy.fragile)
        put(self, "member", self.still.name)

    def scaled(self, s: float) -> Solver:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same steps with s times the noise level; 0: the deterministic solver."""
        assert self.noisy.scaled is not None
        return self.still if s == 0 else noise_in_steps(self.noisy.scaled(s), self.chosen)

    def steps(self, nfe: int, clean: bool) -> int:
        return self.noisy.steps(nfe, clean)

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        n = len(times) - 1
        wrong = [k for k in self.chosen if not -n <= k < n]
        if wrong:
            raise ValueError(f"steps: {wrong[0]}; this run has the steps 0 to {n - 1}")
        chosen = {k % n for k in self.chosen}
        noisy = self.noisy.draft(process, times, nfe)
        try:
            still = self.still.draft(process, times, nfe)
            alike = (noisy.levels, noisy.evaluated) == (still.levels, still.evaluated)
        except ValueError:  # another number of evaluations for these times
            still, alike = noisy, False
        if not alike:
            raise ValueError(
                f"solver = {self.noisy.name!r} makes other states than {self.still.name!r}; "
                "noise_in_steps needs two solvers that differ in their coefficients only"
            )
        # A state belongs to the step that ends at its level, or next beyond it.
        ends = np.array([process.level(float(t)).lam for t in times[1:]])
        made = [int(np.searchsorted(ends, v.lam)) for v in noisy.levels[noisy.given :]]
        numbers: dict[int, int] = {}
        rows: list[Row] = []
        for k, row, other in zip(made, noisy.rows, still.rows, strict=True):
            if k in chosen:
                e = {numbers.setdefault(m, len(numbers)): c for m, c in row.e.items()}
                rows.append(replace(row, e=e))
            else:
                # Two states do not share their noise any more: their sum has another variance.
                rows.append(replace(other, exact=other.exact and len(other.a) < 2))
        return replace(noisy, rows=tuple(rows), draws=tuple(noisy.draws[m] for m in numbers))


def noise_in_steps(solver: Solver, steps: int | Sequence[int]) -> NoiseInSteps:
    """A stochastic solver that draws noise in some steps only; the others are its own without
    noise. The same evaluations.

    steps: index of the step from the start of the run, or several; negative ones from its end.
        The step to sigma = 0 draws nothing in most solvers.
    """
    if not isinstance(solver, Solver) or not solver.stochastic or solver.scaled is None:
        name = getattr(solver, "name", solver)
        raise ValueError(f"solver = {name!r}; need a stochastic solver that has `scaled`")
    chosen = tuple(steps) if isinstance(steps, Sequence) else (steps,)
    if not chosen or any(isinstance(k, bool) or not isinstance(k, Integral) for k in chosen):
        raise ValueError(f"steps = {steps!r}; need the index of a step, or several")
    chosen = tuple(int(k) for k in chosen)
    name = f"{solver.name}, noise in {', '.join(map(str, chosen))}"
    return NoiseInSteps(solver, solver.scaled(0.0), chosen, name)
