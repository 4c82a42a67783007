r"""Fixed-number Adams and what is made from other multistep methods: momentum, UniC, DualFast.

In y = x / alpha over rho = sigma / alpha the probability-flow ODE is dy/drho = e(x), and a step is
y_{i+1} = y_i + Delta_i s_i with Delta_i = rho_{i+1} - rho_i and a slope s_i. Here the slopes:

    iPNDM        s_i = sum_k c_k e_{i-k},  c the Adams-Bashforth numbers of equal steps, on any grid
    GHVB         v_{i+1} = (1 - beta) v_i + beta e_i,     s_i = sum_{k < r} c_k v_{i+1-k},
                 c from (1 + B/2 + 5 B^2/12 + ...)(beta + (1 - beta) B) / beta, cut after r terms,
                 with B the backward difference; beta = 1 is iPNDM
    heavy ball   s_i = (1 - beta) s_{i-1} + beta f_i,     f_i the slope of any other method
    Nesterov     v_{i+1} = (1 - beta) v_i + beta f_i,     s_i = (1 - beta) v_{i+1} + beta f_i

with v_0 = e_0. Velocities need no memory of their own. The slope of the step before is
(y_i - y_{i-1}) / Delta_{i-1}, which is all that heavy ball asks for. Two GHVB slopes with the same
c differ by s_i - (1 - beta) s_{i-1} = beta sum_k c_k e_{i-k}: rows over two states and r outputs.
Nesterov's differ by beta ((2 - beta) f_i - (1 - beta) f_{i-1}). Only start-up is written out.

Order. Equal-step numbers on steps whose ratio is not near 1 are first order; on smoothly graded
grids second order, whatever the nominal order r is, for every beta in (0, 1]; order r on equal
steps of rho only. Heavy ball is first order for beta < 1 and multiplies the leading error of DDIM
by (2 - beta) / beta. In exchange the interval of stability on the negative real axis grows: DDIM's
2 by (2 - beta) / beta; GHVB of r = 1, 2, 3, 4 reaches to 2(2 - beta)/beta, 2 - beta,
6(2 - beta)/(12 - beta), 3(2 - beta)/(11 - beta).

`exact` GHVB solves for c on the actual nodes at every step (order r on any grid). This variant is
not in the paper; on grids whose steps shrink, and at few steps, it is the less accurate one.

`form` = "flow" takes the same numbers to x / (alpha + sigma) over sigma / (alpha + sigma), with
u = e - D in place of e: both ends of every process are finite there.

Warnings. The official code starts its velocity from the raw network output also where that is not
a noise prediction. Its UniPC with momentum overwrites the predictor's velocity by the current
slope, so that only its corrector has momentum; that method is left out. `ipndm_v` of diff-sampler
misplaces a parenthesis; ours is the variable-step Adams method (deis_rhoab3).

Ends. Step k of the start takes the k outputs there are; steps from or to alpha = 0 are DDIM, and a
noise prediction at alpha = 0 is x / sigma. At sigma = 0 rho = 0 is a point like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .._prediction import unknown
from .._process import Level, Process
from .._weights import FORMS, scale, weights
from ._base import Corrector, Formula, Multistep, Solver, Step
from ._exponential import exponential

__all__ = ["Terms", "dualfast", "ghvb", "heavy_ball", "ipndm", "multistep", "transfer", "unic"]

_MOMENTUM = "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2307.11118"
_DUALFAST = "DualFast, 2506.13058"


class Terms:
    """A row under construction: coefficients of states and data predictions, newest first."""

    def __init__(self, length: int) -> None:
        self.a, self.b = [0.0] * length, [0.0] * length
        self.c: Any = 0.0

    def add(self, factor: float, other: Terms | Formula, shift: int = 0) -> None:
        """Add factor times a row whose newest level is number `shift` here."""
        for k, (a, b) in enumerate(zip(other.a, other.b, strict=True), shift):
            self.a[k] += factor * a
            self.b[k] += factor * b
        self.c = self.c + factor * other.c

    def add_slope(self, factor: float, history: Sequence[Level], k: int, form: str) -> None:
        """Add factor times M = (x - N D) / sigma of level k: e ("noise") or u = e - D ("flow")."""
        self.a[k] += factor / history[k].sigma
        self.b[k] -= factor * scale(form, history[k]) / history[k].sigma


def transfer(start: Level, end: Level) -> tuple[float, float]:
    """DDIM between any two levels as coefficients of (x, D)."""
    return end.sigma / start.sigma, float(weights("data", "lambda", start, end, [start])[0])


def multistep(solver: str | Solver, argument: str) -> Multistep:
    """Look up a multistep method without a corrector, and not reversible; refuse others."""
    if isinstance(solver, str):
        from ._registry import as_solver

        found: object = as_solver(solver)
    else:
        found = solver
    if not isinstance(found, Solver):
        raise ValueError(
            f"{argument} = {found!r}; give the name of a multistep solver, or a solver"
        )
    if found.stochastic:
        raise ValueError(f"{argument} = {found.name!r} draws noise; need a deterministic solver")
    if not isinstance(found, Multistep) or found.corrector is not None or found.reversible:
        raise ValueError(
            f"{argument} = {found.name!r}; need a multistep solver without corrector or momentum, "
            "such as 'ddim', 'dpmpp_2m', 'ipndm_4' or fewstep.exponential(...)"
        )
    return found


def _count(solver: Multistep) -> int:
    return solver.nodes or solver.order


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} = {value!r}; need a number in (0, 1]")
    return float(value)


# Adams numbers


def adams(order: int, beta: float = 1.0) -> list[float]:
    """c_k of GHVB, newest first; beta = 1: the Adams-Bashforth numbers."""
    series = [1.0]
    for m in range(1, order):
        series.append(1.0 - sum(g / (m + 1 - j) for j, g in enumerate(series)))
    ratio = (1 - beta) / beta
    series = [g + ratio * before for g, before in zip(series, [0.0, *series], strict=False)]
    return [
        sum(g * (-1) ** j * math.comb(k, j) for k, g in enumerate(series)) for j in range(order)
    ]


def _memory(beta: float, steps: int) -> np.ndarray:
    """v_{i+1} over (e_i, e_{i-1}, ..., e_0), with `steps` = i + 1 outputs and v_0 = e_0."""
    weight = beta * (1 - beta) ** np.arange(steps)
    weight[-1] += (1 - beta) ** steps
    return weight


@dataclass(frozen=True)
class _Adams:
    """The coefficient function of iPNDM and GHVB."""

    order: int
    beta: float
    exact: bool
    form: str

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        start, terms = history[0], Terms(len(history))
        terms.a[0], terms.b[0] = transfer(start, end)
        if 0 in (scale(self.form, start), scale(self.form, end)):
            return Formula(terms.a, terms.b, 1)
        if self.exact:  # an infinite step has no place in the nodes
            history = [level for level in history if scale(self.form, level) > 0]
        step = float(weights(self.form, "own", start, end, [start])[0])
        memory, slope = self._slope(history, end)
        for k, weight in enumerate(slope[1:], 1):
            terms.add_slope(step * weight, history, k, self.form)
        rest = sum(slope[1:])
        if memory:
            terms.add(step * memory, _last_slope(self.form, history[1], start))
            rest += memory
        terms.add_slope(-step * rest, history, 0, self.form)
        known = self.order if self.exact else min(self.order, 2)
        order = min(known, len(history))
        return Formula(
            terms.a, terms.b, order, base=scale(self.form, end) / scale(self.form, start)
        )

    def _slope(self, history: Sequence[Level], end: Level) -> tuple[float, list[float]]:
        """(share of the slope of the step before, weights of the outputs, newest first)."""
        seen = len(history)
        if self.exact:
            return 0.0, self._solved(history, end)
        if seen > self.order:
            return 1 - self.beta, [self.beta * c for c in adams(self.order, self.beta)]
        total = np.zeros(seen)
        for k, c in enumerate(adams(min(seen, self.order), self.beta)):
            total[k:] += c * _memory(self.beta, seen - k)
        return 0.0, total.tolist()

    def _solved(self, history: Sequence[Level], end: Level) -> list[float]:
        """c such that the step integrates polynomials in zeta of degree < order exactly."""
        seen = len(history)
        velocities = np.zeros((min(self.order, seen), seen))
        for k, row in enumerate(velocities):
            row[k:] = _memory(self.beta, seen - k)
        zeta = [level.sigma / scale(self.form, level) for level in (end, *history)]
        u = (np.array(zeta[1:]) - zeta[1]) / (zeta[0] - zeta[1])
        powers = np.arange(len(velocities))
        moments = velocities @ u[:, None] ** powers
        c = np.linalg.solve(moments.T, 1 / (powers + 1))
        return (c @ velocities).tolist()


def _last_slope(form: str, before: Level, start: Level) -> Formula:
    """The mean M between two states, in the form's own coordinates, over (start, before)."""
    n = scale(form, before)
    if n == 0:  # from alpha = 0: the limit is x / sigma there
        return Formula([0.0, 1 / before.sigma], [0.0, 0.0], 1)
    w = float(weights(form, "own", before, start, [before])[0])
    return Formula([1 / w, -scale(form, start) / n / w], [0.0, 0.0], 1)


def _adams(
    order: int,
    beta: float,
    exact: bool,
    form: str,
    name: str,
    source: str,
    aliases: tuple[str, ...] = (),
) -> Multistep:
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order = {order!r}; need an integer >= 1")
    beta = _share("beta", beta)
    if form not in ("noise", "flow"):
        raise ValueError(unknown("form", str(form), ("noise", "flow")))
    nodes = order if beta == 1 else 10**6 if exact else order + 1
    smooth = 2 if order > 1 and not exact else 0
    return Multistep(
        name=name,
        order=order if exact else 1,
        step=_Adams(order, beta, exact, form),
        source=source,
        ends="start-up orders 1, 2, ...; at sigma = 0 the formula as it is",
        nodes=nodes,
        smooth_order=smooth,
        aliases=aliases,
    )


def ipndm(order: int = 4, *, form: str = "noise", aliases: tuple[str, ...] = ()) -> Multistep:
    """iPNDM, also known as PLMS without its Runge-Kutta start: DDIM steps with
    e' = sum_k c_k e_{i-k}, c = (3, -1)/2, (23, -16, 5)/12, (55, -59, 37, -9)/24, ...

    form: "noise" as published; "flow": the same numbers on u = e - D in x / (alpha + sigma) over
    sigma / (alpha + sigma), ours.

    1 NFE per step; order 1 on any grid, 2 where steps change smoothly. Source: Pseudo Numerical
    Methods for Diffusion Models on Manifolds (arXiv 2202.09778), eq. 12 with start-up orders 1, 2,
    3, as in Fast Sampling with Exponential Integrator (arXiv 2204.13902).
    """
    source = "PNDM, 2202.09778, eq. 12; start-up as in DEIS, 2204.13902"
    prefix = ""
    if form == "flow":
        source, prefix = f"{source}; its numbers in flow time", "flow_"
    return _adams(order, 1.0, False, form, f"{prefix}ipndm_{order}", source, aliases)


def ghvb(
    order: int,
    beta: float,
    *,
    exact: bool = False,
    form: str = "noise",
    name: str | None = None,
) -> Multistep:
    """Generalised heavy ball: `order` velocities v_{i+1} = (1 - beta) v_i + beta e_i, combined so
    that the order of Adams-Bashforth is kept.

    order: number of velocities r. beta: in (0, 1]; 1 is iPNDM, smaller is more stable and less
    accurate. The paper writes one number q: r = ceil(q), beta = q - (r - 1); 1.8 is ghvb(2, 0.8).
    exact: solve for the coefficients on the actual nodes (needs all past outputs: memory grows).
    form: "noise" as published, or "flow" (see `ipndm`).

    1 NFE per step; order 1 on any grid, 2 where steps change smoothly (exact: r on any grid).
    Source: arXiv 2307.11118, section 4.2 and its table of coefficients.
    """
    variable = ", exact" * exact + f", {form}" * (form != "noise")
    name = name or f"ghvb({order}, {beta:g}{variable})"
    return _adams(order, beta, exact, form, name, f"{_MOMENTUM}, GHVB{variable}")


@dataclass(frozen=True)
class _HeavyBall:
    """beta (the base's row) + (1 - beta) (the row that keeps the slope of the step before)."""

    base: Step
    nodes: int
    beta: float
    form: str
    plain: int
    nesterov: bool

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        terms, start = Terms(len(history)), history[0]
        own = self.base(process, history[: self.nodes], end)
        order = own.order if self.beta == 1 else 1
        if len(history) <= self.plain or end.alpha == 0:
            terms.add(1.0, own)
            return own._replace(a=terms.a, b=terms.b, order=order)
        before = history[1]
        step = float(weights(self.form, "own", start, end, [start])[0])
        ratio = scale(self.form, end) / scale(self.form, start)
        kept = Terms(len(history))
        kept.a[0] = ratio
        kept.add(step, _last_slope(self.form, before, start))
        terms.add(1 - self.beta, kept)
        terms.add(self.beta * (2 - self.beta if self.nesterov else 1), own)
        if self.nesterov:
            terms.add(-self.beta * (1 - self.beta), self._again(process, history, end))
        return Formula(terms.a, terms.b, order, own.exact, base=ratio, c=terms.c)

    def _again(self, process: Process, history: Sequence[Level], end: Level) -> Terms:
        """The step with the slope that the base had in the step before."""
        start, before = history[:2]
        terms = Terms(len(history))
        terms.a[0] = scale(self.form, end) / scale(self.form, start)
        step = float(weights(self.form, "own", start, end, [start])[0])
        slope = _last_slope(self.form, before, start)
        own = self.base(process, history[1 : 1 + self.nodes], start)
        terms.add(step * slope.a[0], own, shift=1)
        terms.a[1] += step * slope.a[1]
        return terms


def heavy_ball(
    base: str | Multistep,
    beta: float,
    *,
    form: str | None = None,
    plain: int = 1,
    nesterov: bool = False,
    name: str | None = None,
) -> Multistep:
    """Momentum on a multistep method: s_i = (1 - beta) s_{i-1} + beta f_i, f_i the method's slope.

    base: a name or a solver. The paper's HB on PLMS of order p is heavy_ball("ipndm_p", beta); its
    HB on DPM-Solver++ 2M is heavy_ball("dpmpp_2m", beta, plain=2).
    beta: in (0, 1]; 1 is the base. form: coordinates of the slopes, x / N over zeta (see
    `exponential`); default: the base's own. plain: steps without momentum at the start (official
    code: 1 on PLMS, 2 on DPM-Solver++ 2M). nesterov: the Nesterov variant of the official code.

    1 NFE per step, order 1 for beta < 1. Source: arXiv 2307.11118, section 4.1.
    """
    inner = multistep(base, "base")
    beta = _share("beta", beta)
    form = getattr(inner.step, "form", None) if form is None else form
    if form not in FORMS:
        raise ValueError(unknown("form", str(form), FORMS))
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < 1:
        raise ValueError(f"plain = {plain!r}; need an integer >= 1 (the first step has no past)")
    kind = "Nesterov" if nesterov else "heavy ball"
    nodes = _count(inner)
    ends = "start-up orders 1, 2, ...; at sigma = 0 what the base does there"
    return Multistep(
        name=name or f"{kind.replace(' ', '_').lower()}({inner.name}, {beta:g})",
        order=inner.order if beta == 1 else 1,
        step=_HeavyBall(inner.step, nodes, beta, form, plain, nesterov),
        source=f"{_MOMENTUM}, {kind}; {inner.source}",
        ends=ends,
        nodes=max(nodes + nesterov, plain + 1),
        lower_final=inner.lower_final,
        smooth_order=inner.smooth_order if beta == 1 else 0,
        fragile=inner.fragile,
    )


# DualFast


@dataclass(frozen=True)
class _DualFast:
    base: Step
    nodes: int
    c: Callable[[Process, Level], float]

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        own = self.base(process, history[: self.nodes], end)
        terms, start = Terms(len(history)), history[0]
        terms.add(1.0, own)
        if len(history) > 1 and end.alpha > 0:
            step = float(weights("noise", "rho", start, end, [start])[0])
            amount = step * float(self.c(process, start))
            terms.add_slope(amount, history, 0, "noise")
            terms.add_slope(-amount, history, 1, "noise")
        return own._replace(a=terms.a, b=terms.b, order=1)


@dataclass(frozen=True)
class _Rising:
    """c from 0 at the start of the process to `most` at its last noise level, linear in lambda."""

    most: float

    def __call__(self, process: Process, level: Level) -> float:
        low, high = process.lam_start, float(process.lam(process.t_end))
        return self.most * min(1.0, max(0.0, (level.lam - low) / (high - low)))


@dataclass(frozen=True)
class _Constant:
    most: float

    def __call__(self, process: Process, level: Level) -> float:
        return self.most


def dualfast(
    base: str | Multistep = "ddim",
    c: float | Callable[[Process, Level], float] = 0.5,
    *,
    rising: bool = True,
    name: str | None = None,
) -> Multistep:
    """A multistep method whose leading term takes (1 + c) e_s - c e_before in place of e_s:

        x_t = (the base's x_t) + alpha_t (rho_t - rho_s) c_s (e_s - e_before)

    In data form the change of D that corresponds to this change of e gives the same row.
    c: a number >= 0, or a function of (process, level). rising: a number grows from 0 at the
    process's start to c at its least noise, linearly in lambda; else it is constant.

    1 NFE per step, order 1. Source: DualFast (arXiv 2506.13058), from second-hand descriptions: the
    paper's schedule of c and its choice of the older output are not verified; here that is the
    output before, without which the method would not converge. On DDIM this is Adams-Bashforth 2 in
    rho with a free coefficient: constant c = 1/2 is `ipndm_2`. Gains over DDIM are therefore
    gains in discretisation, whatever the network's own error is.
    """
    inner = multistep(base, "base")
    if not callable(c):
        if isinstance(c, bool) or not isinstance(c, (int, float)) or not 0 <= c < math.inf:
            raise ValueError(f"c = {c!r}; need a number >= 0 or a function of (process, level)")
        name = name or f"dualfast({inner.name}, {c:g}{'' if rising else ', constant'})"
        c = _Rising(float(c)) if rising else _Constant(float(c))
    nodes = _count(inner)
    return Multistep(
        name=name or f"dualfast({inner.name}, function)",
        order=1,
        step=_DualFast(inner.step, nodes, c),
        source=f"{_DUALFAST}; {inner.source}",
        ends="first step: the base; at sigma = 0 the base's row and the same change",
        nodes=max(nodes, 2),
        lower_final=inner.lower_final,
        fragile=inner.fragile,
    )


# UniC


@dataclass(frozen=True)
class _Newest:
    """A coefficient function that is shown fewer levels than the solver keeps."""

    step: Step
    nodes: int

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        own, terms = self.step(process, history[: self.nodes], end), Terms(len(history))
        terms.add(1.0, own)
        base = own.a[0] if own.base is None else own.base
        return own._replace(a=terms.a, b=terms.b, base=base)


@dataclass(frozen=True)
class _Corrector:
    """UniC through the target, the start and the newest of the older nodes."""

    correct: Corrector
    order: int

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        own = self.correct(process, history[: self.order + 1], end)
        if own is None:
            return None
        terms = Terms(len(history))
        terms.add(1.0, own)
        return own._replace(a=terms.a, b=terms.b)


def unic(
    predictor: str | Multistep,
    order: int | None = None,
    *,
    form: str | None = None,
    variable: str | None = None,
    second: str = "exact",
    growth: float = 1.5,
    name: str | None = None,
) -> Multistep:
    """A multistep method followed by the corrector UniC: once the network has been called at the
    predicted state, the step is taken again through that output too. No evaluation more.

    predictor: a name or a multistep solver that starts every step from its newest state alone.
    order: outputs of UniC beside the new one; default: the predictor's order (the smooth one if
        that is higher), which raises it by one.
    form, variable: of the corrector (see `exponential`); default: the predictor's own where it is
        an exponential method, else data and lambda. second: "midpoint" is the paper's B(h) = bh2.
    growth: as in `exponential`.

    Source: UniPC (arXiv 2302.04867), algorithm 1: UniC-p after any solver.
    """
    inner = multistep(predictor, "predictor")
    if isinstance(inner.step, _HeavyBall) or getattr(inner.step, "beta", 1.0) < 1:
        raise ValueError(
            f"predictor = {inner.name!r}; momentum takes slopes between predicted states, which a "
            "corrector moves: correct the method without momentum"
        )
    reached = max(inner.order, inner.smooth_order)
    order = reached if order is None else order
    corrector = exponential(
        order,
        form=form or getattr(inner.step, "form", "data"),
        variable=variable or getattr(inner.step, "variable", "lambda"),
        second=second,  # pyright: ignore[reportArgumentType]  (checked there)
        growth=growth,
        corrector=True,
    ).corrector
    assert corrector is not None
    nodes = max(_count(inner), order)
    raised = min(inner.order, order) + 1
    smooth = min(reached, order) + 1
    return replace(
        inner,
        name=name or f"unic({inner.name}, {order})",
        order=raised,
        smooth_order=smooth if smooth > raised else 0,
        step=_Newest(inner.step, _count(inner)),
        corrector=_Corrector(corrector, order),
        nodes=nodes,
        source=f"UniPC, 2302.04867, algorithm 1: UniC-{order}; {inner.source}",
        aliases=(),
    )
