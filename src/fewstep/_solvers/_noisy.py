r"""Noise put on top of ODE solvers: EDM churn, Restart, and Score-SDE's Langevin corrector.

Each wraps a solver of one state (DDIM, Heun, DPM-Solver++ 2S, ...: nothing carried from step to
step, which noise would make stale). With rho = sigma / alpha, adding noise is exact,

    x_u = (alpha_u / alpha_s) x_s + alpha_u sqrt(rho_u^2 - rho_s^2) z          rho_u >= rho_s

since it is what the forward process does, and costs no evaluation.

Churn (EDM, arXiv 2206.00364, algorithm 2). Before each step from rho_i in [s_min, s_max] the noise
is raised to rho_u = (1 + gamma) rho_i, gamma = min(s_churn / N, sqrt(2) - 1) with N the steps of
the run; the step goes from there. In the library's terms a step has noise level squared
eta^2 = ((1 + gamma)^2 - 1) / (2 h): for EDM's ImageNet setting 3 to 7, far more than the reverse
SDE's 1. The marginals are kept, so the weak order is the ODE solver's, for steps longer by
log(1 + gamma). s_noise multiplies z; other than 1 it offsets what a network loses, and the limit of
small steps is not the process any more.

Restart (arXiv 2306.14878, algorithm 1). When the run has come down to rho_low, it goes up to
rho_high by adding noise and comes down again, several times. Large noise at once forgets more of
the errors made above than the same amount in small parts.

Langevin corrector (Score-SDE, arXiv 2011.13456, algorithms 4 and 5). At a level, before the step,

    x <- x + delta s + sqrt(2 delta) z,   delta = 2 r^2 sigma^2,   s = (alpha D - x) / sigma^2
      =  (1 - 2 r^2) x + 2 r^2 alpha D + 2 r sigma z

r is the paper's signal-to-noise ratio. The published delta = 2 (r |z| / |s|)^2 takes norms averaged
over the batch, so that a sample depends on its neighbours; this is the same with expected norms,
|z|^2 = d and |s|^2 = d / sigma^2, which makes it a row; `fewstep.langevin` and
`fewstep.sample_corrected` measure them. (The factor alpha_i, within a few per cent
of 1, that the code has on VP processes is left out.) The chain has a bias: about data at one point
its variance is sigma^2 / (1 - r^2). A correction is noise level squared eta^2 = 2 r^2 / h over a
step. With r fixed and h -> 0 that grows without limit and the bias stays; see `smooth`.

Which noise helps: with an exact score none of these beats the ODE solver at equal NFE. With a wrong
one, noise at high rho repairs errors and noise at low rho makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .._noise import Draw
from .._plan import Row
from .._process import Array, Level, Process
from ._base import Draft, Formula, Multistep, Solver, _row
from ._singlestep import Singlestep

__all__ = ["Interval", "churn", "predictor_corrector", "restart"]

_EDM = "EDM, 2206.00364, algorithm 2"
_RESTART = "Restart Sampling, 2306.14878, algorithm 1"
_PC = "Score-Based Generative Modeling through SDEs, 2011.13456, algorithms 4 and 5"


# What is wrapped, and how drafts are put together


@dataclass(frozen=True)
class _First(Singlestep):
    """A first-order multistep method: one evaluation, one state."""

    def step(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], Sequence[Formula]]:
        return [], self.stages(process, [start], end)


def _one_state(solver: str | Solver, argument: str) -> Singlestep:
    """Look up a solver of one state; refuse others."""
    found: object = solver
    if isinstance(solver, str):
        from ._registry import as_solver

        found = as_solver(solver)
    if isinstance(found, Singlestep):
        return found
    if isinstance(found, Multistep):
        plain = found.corrector is None and not found.reversible
        if plain and (found.nodes or found.order) == 1:
            row = found.step
            return _First(
                name=found.name,
                order=1,
                inner=lambda process, start, end, count: (),
                stages=lambda process, levels, end: [row(process, levels, end)],
                source=found.source,
                ends="no start-up; at sigma = 0 order 1",
                nfe_per_step=1,
                fragile=found.fragile,
                stochastic=found.stochastic,
                scaled=found.scaled,
                member=found.member,
            )
    name = found.name if isinstance(found, Solver) else found
    raise ValueError(
        f"{argument} = {name!r}; need a solver that carries nothing from step to step, such as "
        "'ddim', 'heun', 'dpmpp_2s' or fewstep.singlestep(...)"
    )


def _quiet(solver: str | Solver, argument: str) -> Singlestep:
    """A deterministic solver of one state."""
    found = _one_state(solver, argument)
    if found.stochastic:
        raise ValueError(f"{argument} = {found.name!r} draws noise; need a deterministic solver")
    return found


@dataclass(frozen=True, kw_only=True)
class _Wrapped(Solver):
    """What the three have in common. base: the solver of one state that takes the steps."""

    name: str
    base: Singlestep
    order: int
    source: str
    ends: str
    nfe_per_step: int = 1
    fragile: str = ""
    member: str = ""
    scaled: Callable[[float], Solver] | None = None
    stochastic: bool = True
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int, clean: bool) -> int:
        return self.base.steps(nfe, clean)


class _Drafting:
    """A draft under construction, from its first state."""

    def __init__(self, start: Level) -> None:
        self.levels, self.evaluated = [start], [False]
        self.rows: list[Row] = []
        self.draws: dict[Draw, int] = {}

    def step(self, process: Process, solver: Singlestep, end: Level, count: int) -> None:
        """One step of a solver from the newest state."""
        base, start = len(self.levels) - 1, self.levels[-1]
        inner, formulas = solver.step(process, start, end, count)
        for i, (level, formula) in enumerate(zip((*inner, end), formulas, strict=True)):
            # No path: what is drawn besides does not belong to one.
            noise = {replace(d, clock=None): c for d, c in formula.noise.items()}
            states = range(base, base + i + 1)
            self.add(level, formula._replace(noise=noise), states)
        for state in range(base, base + len(formulas)):
            self.evaluated[state] = True

    def raised(self, level: Level, tag: int = 0, s_noise: float = 1.0) -> None:
        """Exact noise from the newest state up to a level."""
        start = self.levels[-1]
        size = level.sigma * math.sqrt(-math.expm1(2 * (level.lam - start.lam)))
        noise = {Draw(start, level, tag=tag): s_noise * size}
        row = Formula([level.alpha / start.alpha], [0.0], 1, s_noise == 1, noise=noise)
        self.add(level, row, [len(self.levels) - 1])

    def add(self, level: Level, formula: Formula, states: Sequence[int]) -> None:
        """A state made by a formula over these."""
        self.rows.append(_row(formula, states, states[0], states[0], self.draws))
        self.levels.append(level)
        self.evaluated.append(False)

    @property
    def draft(self) -> Draft:
        return Draft(
            tuple(self.levels), tuple(self.rows), tuple(self.evaluated), draws=tuple(self.draws)
        )


def _noisier(process: Process, start: Level, lam: float) -> Level:
    """The level at lambda, not beyond the start of the process, and at the nearest integer time
    (but that of alpha = 0) if the network knows no other; `start` itself if that is no noisier."""
    t = float(process.time(max(lam, float(process.lam(process.t_start)))))
    if _integers(process, start):
        t = float(round(t))
        t -= _upward(process) * (process.alpha(t) == 0)
    level = process.level(t)
    return level if level.lam < start.lam else start


def _upward(process: Process) -> float:
    """The sign of time towards noise."""
    return math.copysign(1.0, process.t_start - process.t_end)


def _integers(process: Process, start: Level) -> bool:
    return process.integer_times and start.t == round(start.t)


def _nonnegative(name: str, value: Any, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        accepted = "a number >= 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise ValueError(f"{name} = {value!r}; need {accepted}")
    return float(value)


# Churn


@dataclass(frozen=True, kw_only=True)
class _Churn(_Wrapped):
    """See `churn`."""

    s_churn: float
    s_min: float
    s_max: float
    s_noise: float

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n = len(nodes) - 1
        gamma = min(self.s_churn / n, math.sqrt(2) - 1)
        made = _Drafting(nodes[0])
        budget = self.base.budget(nfe, n, nodes[-1].sigma == 0)
        for (start, end), count in zip(pairwise(nodes), budget, strict=True):
            if start.alpha > 0 and self.s_min <= start.rho <= self.s_max:
                up = _noisier(process, start, start.lam - math.log1p(gamma))
                if up is not start:
                    made.raised(up, s_noise=self.s_noise)
            made.step(process, self.base, end, count)
        return made.draft


def churn(
    solver: str | Solver = "heun",
    s_churn: float = 5.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.0,
    *,
    name: str | None = None,
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Solver:
    """EDM's stochastic sampler on any ODE solver of one state: its NFE, its weak order.

    solver: "heun" is EDM's, "ddim" is k-diffusion's Euler with churn.
    s_churn, s_min, s_max, s_noise: EDM's, the range in rho = sigma / alpha. The default s_churn is
        for tens of steps. Published, for hundreds: ImageNet-64 (40, 0.05, 50, 1.003), CIFAR-10 VP
        (30, 0.01, 1, 1.007) and VE (80, 0.05, 1, 1.007), ADM's ImageNet-64 (80, 0.05, 50, 1.003).

    Noise is never raised above the start of the process, which EDM's code does in its first step
    where s_max allows it. Integer-time networks are asked at the nearest integer.
    """
    base = _quiet(solver, "solver")
    s_churn, s_noise = _nonnegative("s_churn", s_churn), _nonnegative("s_noise", s_noise)
    s_min, s_max = _nonnegative("s_min", s_min), _nonnegative("s_max", s_max)
    if s_min > s_max:
        raise ValueError(f"s_min = {s_min:g} and s_max = {s_max:g}; need s_min <= s_max")
    if s_churn == 0 or s_noise == 0:
        return base
    return _Churn(
        name=name or f"churn({base.name}, {s_churn:g}, {s_min:g}, {s_max:g}, {s_noise:g})",
        base=base,
        order=base.order,
        source=_EDM,
        ends=f"{base.ends}; no noise at the start of the process, nor outside of s_min to s_max",
        nfe_per_step=base.nfe_per_step,
        fragile=fragile or base.fragile,
        member=base.name,
        scaled=lambda s: churn(base, s_churn * s * s, s_min, s_max, s_noise, name=name),
        aliases=aliases,
        s_churn=s_churn,
        s_min=s_min,
        s_max=s_max,
        s_noise=s_noise,
    )


# Restart


class Interval(NamedTuple):
    """Where a run goes up and down again: from the node nearest to `low` up to `high`, in rho, at
    least by the factor high / low and at most to the start of the process; `times` times, in
    `steps` steps (0: what the budget gives)."""

    low: float
    high: float
    times: int = 1
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class _Restart(_Wrapped):
    """See `restart`. size: factor of the noise."""

    intervals: tuple[Interval, ...]
    share: float
    size: float = 1.0

    def passes(self, nfe: int) -> list[tuple[Interval, int]]:
        """The intervals that are run again, noisiest first, and the evaluations of each."""
        full, most = self.base.nfe_per_step, int(nfe * self.share + 1e-9)
        out = [interval for interval in self.intervals for _ in range(interval.times)]
        while out and sum((v.steps or 2) * full for v in out) > most:
            out.pop()
        free = [v for v in out if not v.steps]
        most -= sum(v.steps * full for v in out)
        each = most // (len(free) * full) if free else 0
        return [(v, (v.steps or each) * full) for v in out]

    def steps(self, nfe: int, clean: bool) -> int:
        spent = sum(count for _, count in self.passes(nfe))
        return self.base.steps(nfe - spent, clean)

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n, clean = len(nodes) - 1, nodes[-1].sigma == 0
        # the node that each interval begins at: never the first, the last one if there is no other
        inside = range(1, n) or range(1, n + 1 - clean)
        at = {
            v: min(inside, key=lambda k: abs(nodes[k].rho - v.low))
            for v in self.intervals
            if inside
        }
        passes = [
            (interval, spent)
            for interval, spent in (self._all(nodes, at) if nfe is None else self.passes(nfe))
            if interval in at
        ]
        main = None if nfe is None else nfe - sum(spent for _, spent in passes)
        made, tag = _Drafting(nodes[0]), 0
        for k, count in enumerate(self.base.budget(main, n, clean), 1):
            made.step(process, self.base, nodes[k], count)
            for interval, left in passes:
                while left and at[interval] == k:
                    left -= self._again(process, made, interval, left, tag)
                    tag += 1
        return made.draft

    def _all(
        self, nodes: Sequence[Level], at: Mapping[Interval, int]
    ) -> list[tuple[Interval, int]]:
        """Without a budget: as many steps as the run itself has in an interval."""
        out = []
        for interval in self.intervals if at else ():
            k = at[interval]
            top = nodes[k].lam - self._rise(nodes[k], interval)
            steps = interval.steps or max(1, sum(top < v.lam for v in nodes[:k]))
            out += [(interval, steps * self.base.nfe_per_step)] * interval.times
        return out

    def _rise(self, node: Level, interval: Interval) -> float:
        """How far up in lambda: log of the factor on rho, enough to be another level."""
        factor = max(interval.high / node.rho, interval.high / interval.low)
        return max(0.5 * math.log1p(self.size**2 * (factor**2 - 1)), 1e-8)

    def _again(
        self, process: Process, made: _Drafting, interval: Interval, left: int, tag: int
    ) -> int:
        """One time up and down; the evaluations it takes, of those that are left."""
        node = made.levels[-1]
        top = _noisier(process, node, node.lam - self._rise(node, interval))
        if top is node and _integers(process, node):  # which lie too far apart
            top = process.level(node.t + _upward(process))
        if top is node or top.alpha == 0:
            raise ValueError(f"grid: a restart at t = {node.t:g} finds no noisier time, alpha > 0")
        steps = -(-left // self.base.nfe_per_step)
        # EDM's spacing, as published
        rho = np.linspace(top.rho ** (1 / 7), node.rho ** (1 / 7), steps + 1)[1:-1] ** 7
        at = [float(process.time(-math.log(v))) for v in rho]
        if _integers(process, node):
            at = sorted({float(round(t)) for t in at} - {top.t, node.t}, reverse=top.t > node.t)
        ends = [*map(process.level, at), node]
        made.raised(top, tag)
        spent = 0
        for i, end in enumerate(ends):
            most = left - spent - (len(ends) - 1 - i)
            count = min(self.base.nfe_per_step, most)
            made.step(process, self.base, end, count)
            spent += count
        return spent


def restart(
    solver: str | Solver = "heun",
    intervals: Sequence[Sequence[float]] = ((0.5, 2.0, 2),),
    *,
    share: float = 1 / 3,
    name: str | None = None,
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Solver:
    """Restart: up from rho = low to high by noise, and down again; weak order of the ODE solver.

    intervals: of (low, high, times, steps), see `Interval`. Published, with steps = N_Restart - 1
        and a main run of 18 to 36 Heun steps: CIFAR-10 (0.06, 0.30, 2 to 20, 2), or (0.06, 0.20,
        30, 8); ImageNet-64, 203 NFE: (19.35, 40.79, 1, 3), (1.09, 1.92, 1, 3), (0.59, 1.09, 5, 3),
        (0.30, 0.59, 5, 3), (0.06, 0.30, 6, 5).
    share: of nfe evaluations restarts spend at most nfe * share: those with `steps` what these
        cost, the others equal parts, two full steps or more. What does not fit is left out, the
        last interval first; the main run has the rest. (ImageNet-64 above: 2/3.) With a list of
        times and no nfe, all are run, without `steps` in as many as the main run has there.

    A restart is at the node nearest to `low`, the last one excepted, as in the official code; there
    the range is the interval only if such a node is near. Its steps are spaced as EDM's, rho = 7.
    """
    base = _quiet(solver, "solver")
    if not 0 < _nonnegative("share", share, 1.0) < 1:
        raise ValueError(f"share = {share!r}; need a number between 0 and 1")
    given = tuple(sorted((_interval(v) for v in intervals), key=lambda v: -v.low))
    if not given:
        raise ValueError("intervals is empty; give at least one (low, high), in rho")
    least = math.ceil((given[0].steps or 2) * base.nfe_per_step / share - 1e-9)

    def sized(size: float) -> Solver:
        if size == 0:
            return base
        return _Restart(
            name=name or f"restart({base.name}, {', '.join(str(tuple(v)) for v in given)})",
            base=base,
            order=base.order,
            source=_RESTART,
            ends=f"{base.ends}; restarts take at most {share:.3g} of nfe, so none below {least}",
            nfe_per_step=base.nfe_per_step,
            fragile=fragile or base.fragile,
            member=base.name,
            scaled=lambda s: sized(size * s),
            aliases=aliases,
            intervals=given,
            share=share,
            size=size,
        )

    return sized(1.0)


def _interval(value: Any) -> Interval:
    try:
        out = Interval(*value)
        good = 0 < out.low < out.high < math.inf
        good &= out.times == int(out.times) >= 1 and out.steps == int(out.steps) >= 0
    except (TypeError, ValueError):
        good, out = False, None
    if not good or out is None:
        raise ValueError(
            f"intervals has {value!r}; need (low, high), (low, high, times) or (low, high, times, "
            "steps) with 0 < low < high in rho and integers times >= 1, steps >= 0"
        )
    return Interval(float(out.low), float(out.high), int(out.times), int(out.steps))


# Langevin corrector


@dataclass(frozen=True, kw_only=True)
class _Langevin(_Wrapped):
    """See `predictor_corrector`."""

    snr: float
    corrections: int
    smooth: float

    def steps(self, nfe: int, clean: bool) -> int:
        last = self.corrections + (1 if clean else self.base.nfe_per_step)
        return 1 + max(0, -(-(nfe - last) // self.nfe_per_step))

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n, clean = len(nodes) - 1, nodes[-1].sigma == 0
        most = self.base.nfe_per_step * (n - clean) + clean
        total = most + n * self.corrections
        if nfe is not None and not n <= nfe <= total:
            raise ValueError(
                f"nfe = {nfe}, but {n} steps with up to {self.corrections} corrections each spend "
                f"{n} to {total}"
            )
        left = total if nfe is None else nfe
        budget = self.base.budget(min(left, most), n, clean)
        left -= sum(budget)
        made, late = _Drafting(nodes[0]), 0
        for (start, end), count in zip(pairwise(nodes), budget, strict=True):
            here = min(left, self.corrections) + late
            late, left = 0, left - min(left, self.corrections)
            if start.alpha == 0 and n > 1:  # there is nothing to correct in pure noise
                here, late = 0, here
            h = end.lam - start.lam
            r = self.snr * math.sqrt(min(1.0, h / self.smooth if self.smooth else 1.0))
            for tag in range(here):
                state = len(made.levels) - 1
                made.evaluated[state] = True
                noise = {Draw(start, start, tag=1 + tag): 2 * r * start.sigma}
                a, b = 1 - 2 * r * r, 2 * r * r * start.alpha
                made.add(start, Formula([a], [b], 1, False, noise=noise), [state])
            made.step(process, self.base, end, count)
        return made.draft


def predictor_corrector(
    predictor: str | Solver = "ddim",
    snr: float = 0.16,
    corrections: int = 1,
    *,
    smooth: float = 0.1,
    name: str | None = None,
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Solver:
    """Predictor-corrector sampling: `corrections` Langevin steps at every level, then a step of the
    predictor; NFE per step is the predictor's plus `corrections`.

    predictor: a solver of one state, also a stochastic one. Score-SDE's reverse diffusion and
        ancestral predictors are first-order SDE steps; "ddim" is their probability flow.
    snr: the paper's r: 0.16 (CIFAR-10), 0.075 (LSUN, CelebA-HQ 256), 0.17 (CelebA), 0.15 (1024
        pixels); below 1/2.
    smooth: steps shorter than this in lambda have r^2 smaller by h / smooth, so that eta^2 stays at
        2 snr^2 corrections / smooth, the bias vanishes with h, and the order is 1. 0 is the
        published rule, r fixed (for 1,000 steps of h = 0.009), which does not converge.

    The last step, to sigma = 0, is the data prediction: the noise-free mean of the paper.
    """
    base = _one_state(predictor, "predictor")
    snr, smooth = _nonnegative("snr", snr, 0.5), _nonnegative("smooth", smooth)
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 1:
        raise ValueError(f"corrections = {corrections!r}; need an integer >= 1")
    if snr == 0:
        return base
    scaled = base.scaled

    def again(s: float) -> Solver:
        inner = base if scaled is None else scaled(s)
        return predictor_corrector(inner, snr * s, corrections, smooth=smooth, name=name)

    return _Langevin(
        name=name or f"predictor_corrector({base.name}, {snr:g}, {corrections})",
        base=base,
        order=1,
        source=_PC,
        ends=f"{base.ends}; with too few evaluations the last corrections are left out",
        nfe_per_step=base.nfe_per_step + corrections,
        fragile=fragile or base.fragile,
        member=base.member or base.name,
        scaled=again,
        aliases=aliases,
        snr=snr,
        corrections=corrections,
        smooth=smooth,
    )
