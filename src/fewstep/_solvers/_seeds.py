r"""Singlestep stochastic solvers: SEEDS, SDE-DPM-Solver++(2S), dpmpp_sde, 2S and DPM-2 ancestral.

SEEDS (arXiv 2305.14267) is an exponential singlestep method for the reverse SDE with noise level
squared eta^2 (0: the probability-flow ODE; 1: the reverse-time SDE). From s, with E(l) = eta^2
(lambda_l - lambda_s),

    data form     x_l = (sigma_l / sigma_s) e^{-E(l)} x_s + sum_j W_j D_j + N(s, l)
    noise form    x_l = (alpha_l / alpha_s) x_s + (1 + eta^2) sum_j W_j e_j + N(s, l)

for inner states l and the target. In data form the mean is the row that the ODE solver has on the
process alpha, sigma e^{-E}, which is how it is made here; in noise form the ODE solver's weights
are scaled. So every exponential singlestep method has its stochastic one (`seeds`). N is one
Brownian path: a normal for each segment between neighbouring states of a step, propagated,

    data form     N(s, l) = sum over segments (a, b) up to l
                            sigma_l e^{E(b) - E(l)} sqrt(1 - e^{2E(a) - 2E(b)}) z_ab
    noise form    N(s, l) = alpha_l sum eta sqrt(rho_a^2 - rho_b^2) z_ab

A draw shared by two stages is one draw. (A port that reuses the first segment's coefficient for
the last is right for equal segments only.)

Data form keeps the variance of the process for any step. The noise form is SEEDS as published and,
with one evaluation, SDE-DPM-Solver-1; the standard deviation of its noise exceeds sigma_t by a
factor up to e^h: for short steps only.

Ancestral solvers (k-diffusion). Their parameter eta_d is one for each step, not eta: E is such that
e^{-2E} = 1 - eta_d^2 (1 - e^{-2h}), the same as eta^2 = eta_d^2 for eta_d = 0 and 1 only.

    2s_ancestral  an ODE step from s to the level `down` of rho = rho_t e^{-E}, then exact noise up
                  to t. Both keep the marginals of the process, so the order is the ODE solver's.
    dpmpp_sde     data form with this E for the inner state (from s) and for the target (from s), D
                  from (1 - 1/2r) D_s + (1/2r) D_m, noises to both from one path Brownian in rho:
                  sqrt(rho_s - rho_t) z_st = sqrt(rho_s - rho_m) z_sm + sqrt(rho_m - rho_t) z_mt.
                  (The exact noise for eta_d = 1 is Brownian in rho^2; the law of the sample differs
                  at second order only.)

Order. Weak (of moments): 2 with two evaluations or more, also for three, since the noise inside a
step is not resolved beyond that. Strong: 1.

Ends. A step to sigma = 0 is x = D. From alpha = 0 the start is forgotten (eta^2 > 0); inner states
are at kappa_i = kappa_t (1 + eta^2) / (k - i + 1 + eta^2) in kappa = alpha / sigma, the centroid of
the kernel for the last of them, each from the newest D: second order for D linear in kappa. Noise
form has no limit there and takes this step too. A step with one evaluation is the first-order row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .._noise import Draw
from .._process import Level, Process
from ._base import Formula, Solver
from ._runge_kutta import _Etd
from ._singlestep import Singlestep, _Exponential, _known, ddim, singlestep

__all__ = ["ancestral_singlestep", "dpmpp_sde", "seeds"]

_SEEDS = "SEEDS: Exponential SDE Solvers, 2305.14267"
_KD = "k-diffusion"
_LOUD = "few and long steps: the noise of a step is larger than its end allows, by up to e^h"
_ENDS = "no start-up; at sigma = 0 order 1 (x = D); from alpha = 0 the start is forgotten"


@dataclass(frozen=True)
class _Noisy(Singlestep):
    """What the families share. noise: eta^2, or eta_d."""

    noise: float = 1.0

    def amount(self, start: Level, end: Level) -> float:
        """E from start to end."""
        raise NotImplementedError

    def normal(self, path: Sequence[Level]) -> Mapping[Draw, float]:
        """N(s, l), for the levels s, ..., l."""
        raise NotImplementedError

    def rows(self, process: Process, start: Level, end: Level, count: int) -> Any:
        """Inner levels, and formulas, between finite levels."""
        raise NotImplementedError

    def step(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], Sequence[Formula]]:
        if end.sigma == 0:
            return [], [ddim(start, end)]
        if start.alpha == 0:
            return self._from_noise(process, start, end, count)
        if count == 1:
            return [], [self.first([start, end])]
        return self.rows(process, start, end, count)

    def first(self, path: Sequence[Level]) -> Formula:
        """One evaluation, in data form, from the first level of the path to its last."""
        mean = ddim(path[0], _slowed(path[-1], self.amount(path[0], path[-1])))
        return mean._replace(noise=self.normal(path))

    def _from_noise(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], list[Formula]]:
        high, n = math.exp(end.lam), self.noise
        kappas = [high * (1 + n) / (count - i + n) for i in range(count - 1)]
        times = [float(process.time(math.log(kappa))) for kappa in kappas]
        path, out = [start], list[Formula]()
        for i, t in enumerate((*times, end.t)):
            path.append(end if i == count - 1 else _known(process, t, start, end))
            row, rest = self.first(path), [0.0] * i
            order = 2 if i and i == count - 1 else 1
            out.append(row._replace(a=[*row.a, *rest], b=[*rest, *row.b], order=order))
        return path[1:-1], out


@dataclass(frozen=True)
class _Seeds(_Noisy):
    """SEEDS: noise is eta^2; form that of `stages`."""

    form: str = "data"

    def amount(self, start: Level, end: Level) -> float:
        return self.noise * (end.lam - start.lam)

    def normal(self, path: Sequence[Level]) -> dict[Draw, float]:
        out, end = dict[Draw, float](), path[-1]
        for a, b in pairwise(path):
            if a.lam == b.lam:
                continue  # integer times may put two states of a step at one level
            if self._data(path):
                clock, tag = (self.noise * a.lam, self.noise * b.lam), int(self.form != "data")
                kept = math.exp(-self.amount(b, end))
                c = end.sigma * kept * math.sqrt(-math.expm1(-2 * self.amount(a, b)))
            else:
                clock, tag = (-b.lam, -a.lam), 0
                c = end.alpha * a.rho * math.sqrt(-self.noise * math.expm1(2 * (a.lam - b.lam)))
            out[Draw(a, b, clock, tag)] = c
        return out

    def _data(self, path: Sequence[Level]) -> bool:
        """Whether a step is in data form, on a path of its own where the others are not."""
        return self.form == "data" or path[0].alpha == 0

    def first(self, path: Sequence[Level]) -> Formula:
        if self._data(path):
            return super().first(path)
        return self._scaled(ddim(path[0], path[-1]), path)

    def rows(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], list[Formula]]:
        inner = [_known(process, t, start, end) for t in self.inner(process, start, end, count)]
        path, out = [start, *inner, end], list[Formula]()
        if self.form == "noise":
            means = self.stages(process, path[:-1], end)
            return inner, [self._scaled(mean, path[: i + 2]) for i, mean in enumerate(means)]
        slow = [_slowed(level, self.amount(start, level)) for level in path]
        for i, mean in enumerate(self.stages(process, slow[:-1], slow[-1])):
            noise = self.normal(path[: i + 2])
            out.append(mean._replace(noise=noise, order=min(mean.order, 2)))
        return inner, out

    def _scaled(self, mean: Formula, path: Sequence[Level]) -> Formula:
        """Noise form: weights times 1 + eta^2, and noise."""
        n, (start, end) = self.noise, (path[0], path[-1])
        a, b = ([(1 + n) * c for c in part] for part in (mean.a, mean.b))
        a[0] -= n * end.alpha / start.alpha
        return Formula(a, b, min(mean.order, 2), exact=False, noise=self.normal(path))


def _slowed(level: Level, E: float) -> Level:
    """The level of alpha and sigma e^{-E}: rows there are means of rows with noise."""
    return replace(level, sigma=level.sigma * math.exp(-E), lam=level.lam + E)


@dataclass(frozen=True)
class _Ancestral(_Noisy):
    """ODE step to `down`, then noise up to the target. noise is eta_d."""

    def amount(self, start: Level, end: Level) -> float:
        h = end.lam - start.lam
        return h if self.noise == 1 else -0.5 * math.log1p(self.noise**2 * math.expm1(-2 * h))

    def normal(self, path: Sequence[Level]) -> dict[Draw, float]:
        # The SDE that these steps converge to has eta^2 = eta_d^2; for eta_d = 1 this is its noise.
        start, end, n = path[0], path[-1], self.noise**2
        total = end.sigma * math.sqrt(-math.expm1(-2 * self.amount(start, end)))
        out, left = dict[Draw, float](), 0.0
        for a, b in reversed(list(pairwise(path))):
            if a.lam != b.lam:
                draw = Draw(a, b, (n * a.lam, n * b.lam))
                out[draw] = math.exp(-left) * math.sqrt(-math.expm1(2 * n * (a.lam - b.lam)))
                left += n * (b.lam - a.lam)
        size = math.sqrt(-math.expm1(-2 * left))
        return {draw: total * c / size for draw, c in reversed(out.items())}

    def rows(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], Sequence[Formula]]:
        down = _slowed(end, self.amount(start, end))
        inner = [_snapped(process, t, start, end) for t in self.inner(process, start, down, count)]
        *means, last = self.stages(process, [start, *inner], down)
        return inner, [*means, last._replace(noise=self.normal([start, end]))]


def _snapped(process: Process, t: float, start: Level, end: Level) -> Level:
    """The level at t, where rounding alone keeps it from the target's the target's."""
    level = _known(process, t, start, end)
    return end if abs(level.lam - end.lam) <= 1e-12 * (1 + abs(end.lam)) else level


@dataclass(frozen=True)
class _DpmppSde(_Ancestral):
    """k-diffusion's dpmpp_sde. noise is eta_d."""

    def normal(self, path: Sequence[Level]) -> dict[Draw, float]:
        start, end = path[0], path[-1]
        total = end.sigma * math.sqrt(-math.expm1(-2 * self.amount(start, end)))
        if start.alpha == 0:  # an infinite rho: all of its path is in the first segment
            b = path[1]
            return {Draw(start, b, (-0.5 * b.lam, math.inf)): total}
        return {
            Draw(a, b, (-0.5 * b.lam, -0.5 * a.lam)): total
            * math.sqrt((a.rho - b.rho) / (start.rho - end.rho))
            for a, b in pairwise(path)
            if a.lam != b.lam
        }

    def rows(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], Sequence[Formula]]:
        (t,) = self.inner(process, start, end, count)
        inner = _known(process, t, start, end)
        row = self.first([start, inner, end])
        share = 0.5 * (end.lam - start.lam) / (inner.lam - start.lam)
        b = [(1 - share) * row.b[0], share * row.b[0]]
        target = row._replace(a=[*row.a, 0.0], b=b, order=2)
        return [inner], [self.first([start, inner]), target]


def _exponential(solver: str | Solver, argument: str) -> Singlestep:
    """Look up an exponential singlestep method; refuse others."""
    found: object = solver
    if isinstance(solver, str):
        from ._registry import as_solver

        found = as_solver(solver)
    if type(found) is Singlestep and isinstance(found.stages, (_Exponential, _Etd)):
        return found
    name = found.name if isinstance(found, Solver) else found
    raise ValueError(
        f"{argument} = {name!r}; need an exponential singlestep solver, such as 'dpmpp_2s', "
        "'dpm_solver_2', fewstep.singlestep(...) or fewstep.exponential_runge_kutta(...)"
    )


def _level(name: str, value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        accepted = "a finite number >= 0" if most > 1 else "a number from 0 to 1"
        raise ValueError(f"{name} = {value!r}; need {accepted}")
    return float(value)


_MOST = 1e3  # a larger eta^2 forgets the start of any step


def seeds(
    solver: str | Solver = "dpmpp_2s_taylor",
    eta2: float = 1.0,
    *,
    name: str | None = None,
    source: str = _SEEDS,
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Singlestep:
    """The stochastic form of an exponential singlestep ODE solver, with as many NFE per step.

    solver: data form: "dpmpp_2s_taylor" (SEEDS-2 with phi_2), "dpmpp_2s" (with phi_1, as in
        ComfyUI: SDE-DPM-Solver++(2S); its leading error is about three times as large), "dpmpp_3s"
        (SEEDS-3), "etdrk4_krogstad", ...; noise form, as in the paper: "dpm_solver_2",
        "dpm_solver_3". Other inner places: `fewstep.singlestep(..., ratios=)`.
    eta2: noise level squared, from 0 (the ODE solver itself); what ComfyUI's seeds_* call eta.
    """
    base, eta2 = _exponential(solver, "solver"), _level("eta2", eta2, _MOST)
    if eta2 == 0:
        return base
    form: str = base.stages.form  # pyright: ignore[reportFunctionMemberAccess]
    return _Seeds(
        name=name or f"seeds({base.name}, eta2 = {eta2:g})",
        order=min(base.order, 2),
        inner=base.inner,
        stages=base.stages,
        source=source,
        ends=_ENDS,
        nfe_per_step=base.nfe_per_step,
        lower_final=base.lower_final,
        fragile=fragile or (_LOUD if form == "noise" else base.fragile),
        stochastic=True,
        strong_order=1,
        scaled=lambda s: seeds(base, eta2 * s * s, name=name),
        member=base.name,
        aliases=aliases,
        noise=eta2,
        form=form,
    )


def ancestral_singlestep(
    solver: str | Solver = "dpmpp_2s",
    eta: float = 1.0,
    *,
    name: str | None = None,
    source: str = f"{_KD}, sample_dpmpp_2s_ancestral",
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Singlestep:
    """ODE steps to a cleaner level, each followed by exact noise up to its node: weak order and NFE
    of the ODE solver.

    solver: "dpmpp_2s" (k-diffusion's dpmpp_2s_ancestral), "dpm_solver_2" (dpm_2_ancestral), or
        another DPM-Solver, its inner states not beyond half of the step.
    eta: k-diffusion's eta, the standard deviation of the noise in units of the posterior's, 0 to 1;
        eta^2 of the SDE only in the limit of small steps, and at 0 and 1.
    """
    base, eta = _exponential(solver, "solver"), _level("eta", eta, 1.0)
    if not isinstance(base.stages, _Exponential) or max(base.stages.ratios) > 0.5:
        # Further on the network would be asked about cleaner levels than the step goes to.
        raise ValueError(
            f"solver = {base.name!r}; need a DPM-Solver with inner states up to half of the step, "
            "such as 'dpmpp_2s' or 'dpm_solver_2'"
        )
    if eta == 0:
        return base
    return _Ancestral(
        name=name or f"ancestral({base.name}, eta = {eta:g})",
        order=base.order,
        inner=base.inner,
        stages=base.stages,
        source=source,
        ends=_ENDS,
        nfe_per_step=base.nfe_per_step,
        fragile=fragile or base.fragile,
        stochastic=True,
        strong_order=1,
        scaled=lambda s: ancestral_singlestep(base, eta * s, name=name),
        member=base.name,
        aliases=aliases,
        noise=eta,
    )


def dpmpp_sde(
    eta: float = 1.0,
    ratio: float = 0.5,
    *,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Singlestep:
    """k-diffusion's DPM-Solver++ SDE: weak order 2, 2 NFE per step.

    eta: as in `ancestral_singlestep`. ratio: where the inner state is, in lambda. `seeds` with
    "dpmpp_2s_taylor" is the same idea with exact weights and noise.
    """
    eta = _level("eta", eta, 1.0)
    base = singlestep(2, ratios=(ratio,), name="dpmpp_2s" if ratio == 0.5 else None)
    if eta == 0:
        return base
    return _DpmppSde(
        name=name or f"dpmpp_sde(eta = {eta:g}, ratio = {ratio:g})",
        order=2,
        inner=base.inner,
        stages=base.stages,
        source=f"{_KD}, sample_dpmpp_sde",
        ends=_ENDS,
        stochastic=True,
        strong_order=1,
        scaled=lambda s: dpmpp_sde(eta * s, ratio, name=name),
        member=base.name,
        aliases=aliases,
        noise=eta,
    )
