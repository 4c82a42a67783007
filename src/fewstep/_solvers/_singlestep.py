r"""The singlestep family: several network evaluations per step, no memory of earlier steps.

A step from s to t makes inner states u_1, ..., u_{k-1} and the target, each a row over the states
of the step and their data predictions; k evaluations, at s and at the inner states. DPM-Solver 2
and 3 and DPM-Solver++ 2S and 3S are here, Runge-Kutta methods in `_runge_kutta`.

Exponential singlestep methods (DPM-Solver, arXiv 2206.00927, algorithms 1, 2, 4, 5; DPM-Solver++,
2211.01095, algorithm 1). With lambda_i = lambda_s + r_i h, W the weights of `_weights` in lambda, M
one of e (noise form) and D (data form), and a base that is DDIM:

    two evaluations      u_1 = ddim(s -> s_1)                                   r_1 = 1/2
                         x_t = ddim(s -> t) + (W / 2 r_1) (M(u_1) - M_s),       W = sum of weights
    three evaluations    u_1 = ddim(s -> s_1)                                   r_1 = 1/3
                         u_2 = ddim(s -> s_2) + W_1 (M(u_1) - M_s)              r_2 = 2/3
                         x_t = ddim(s -> t) + W_2 (M(u_2) - M_s)

W_1 and W_2 are the exact weights through s and one inner node; with them the last row is of third
order only for r_2 = 2/3. second = "exact" ("taylor" in the official code) takes the exact weights
through all nodes: two evaluations W_1 in place of W / 2 r_1, three evaluations W_1 and W_2 through
s, s_1, s_2, of third order for any r. The same in other words: DPM-Solver-3 is the third-order
method of Hochbruck and Ostermann with one inner weight, RES 2S (2308.02157) is DPM-Solver++ 2S with
exact weights.

Budget. K steps spend exactly nfe evaluations: K - 1 steps share evenly, the earlier ones more, the
last takes what is left, at least one. A step to sigma = 0 takes one (DDIM: x = alpha_t D_s), since
no network can be asked there nor between t_end and there. This is the published `fast` split (nfe =
7: 3, 3, 1; 8: 3, 3, 2), where the last step does not go to sigma = 0; where it does, 8 becomes
3, 2, 2, 1. A step with fewer evaluations is the family's member of lower order.

alpha = 0 has no lambda. A step from there, or to there, is the midpoint rule in kappa = alpha /
sigma, the clock in which dX/dkappa = D is finite at alpha = 0, with Jameson's stages where it has
more than two evaluations, each ddim(s -> s_i) with the newest D in place of D_s, kappa_i = kappa_s
+ (kappa_t - kappa_s) / (k - i + 1); of one evaluation it is DDIM.

Networks that know integer times only: inner states are put on the nearest integer after the start
(which may be the target's), and the weights are those of that place. The fixed numbers of a
Runge-Kutta table stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .._noise import Draw
from .._plan import Row
from .._prediction import unknown
from .._process import Array, Level, Process
from .._weights import scale, weights
from ._base import Draft, Formula, Solver, _row

__all__ = ["Inner", "Singlestep", "Stages", "ddim", "mixed", "singlestep"]

#: (process, start, end, evaluations) -> times of the inner states, one less than evaluations.
Inner = Callable[[Process, Level, Level, int], Sequence[float]]
#: (process, levels of the start and of the inner states, target) -> a formula for every inner state
#: and for the target, each over the start and the inner states before it, oldest first.
Stages = Callable[[Process, Sequence[Level], Level], Sequence[Formula]]


@dataclass(frozen=True)
class Singlestep(Solver):
    """A method that spends up to `nfe_per_step` evaluations in every step.

    inner: where the inner states are. stages: the coefficient function; both are called for two
    evaluations or more, one is DDIM. lower_final: where all steps could be full, the last spends
    one evaluation all the same ("fast" DPM-Solver-3). pure: inner and stages hold from and to
    alpha = 0.
    """

    name: str
    order: int
    inner: Inner
    stages: Stages
    source: str
    ends: str
    nfe_per_step: int = 2
    lower_final: bool = False
    pure: bool = False
    smooth_order: int = 0
    fragile: str = ""
    stochastic: bool = False
    strong_order: int = 0
    scaled: Callable[[float], Solver] | None = None
    member: str = ""
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int, clean: bool) -> int:
        alone = clean or (self.lower_final and nfe % self.nfe_per_step == 0)
        return math.ceil((nfe - alone) / self.nfe_per_step) + alone

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        return self.lay(process, nodes, self.budget(nfe, len(nodes) - 1, nodes[-1].sigma == 0))

    def budget(self, nfe: int | None, steps: int, clean: bool) -> list[int]:
        """Evaluations of every step. nfe None: every step a full one."""
        full, before = self.nfe_per_step, steps - 1
        most = full * before + (1 if clean else full)
        if nfe is None:
            nfe = most
        if not steps <= nfe <= most:
            end = ", the last of which goes to sigma = 0" if clean else ""
            raise ValueError(
                f"nfe = {nfe}, but {steps} steps{end} of 1 to {full} evaluations spend {steps} to "
                f"{most}"
            )
        last = max(1, nfe - full * before)
        share, more = divmod(nfe - last, max(1, before))
        return [share + (i < more) for i in range(before)] + [last]

    def lay(self, process: Process, nodes: Sequence[Level], budget: Sequence[int]) -> Draft:
        """Rows of steps through `nodes`, with these numbers of evaluations."""
        levels, rows, draws = [nodes[0]], list[Row](), dict[Draw, int]()
        for start, end, count in zip(nodes, nodes[1:], budget, strict=False):
            inner, formulas = self.step(process, start, end, count)
            made = [len(levels) - 1]
            for level, formula in zip((*inner, end), formulas, strict=True):
                rows.append(_row(formula, made, made[0], made[0], draws))
                made.append(len(levels))
                levels.append(level)
        evaluated = (True,) * len(rows) + (False,)
        return Draft(tuple(levels), tuple(rows), evaluated, draws=tuple(draws))

    def step(
        self, process: Process, start: Level, end: Level, count: int
    ) -> tuple[list[Level], Sequence[Formula]]:
        """The inner levels of one step, and the formulas of its states."""
        if count == 1:
            return [], [ddim(start, end)]
        pure = self.pure or (start.alpha > 0 and end.alpha > 0)
        times = (self.inner if pure else _kappa)(process, start, end, count)
        inner = [_known(process, t, start, end) for t in times]
        stages = self.stages if pure else _from_noise
        return inner, stages(process, [start, *inner], end)


def _known(process: Process, t: float, start: Level, end: Level) -> Level:
    """The level at which an inner state at time t is: an integer between integers, not the
    start's, if the network knows no other."""
    if process.integer_times and start.t == round(start.t) and end.t == round(end.t):
        step = 1.0 if end.t > start.t else -1.0
        t = float(round(t)) if round(t) != start.t else start.t + step
    return end if t == end.t else process.level(t)


def ddim(start: Level, end: Level) -> Formula:
    """One evaluation: x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) D_s."""
    return Formula(
        [end.sigma / start.sigma], weights("data", "lambda", start, end, [start]).tolist(), 1
    )


def mixed(form: str, nodes: Sequence[Level], end: Level, W: Sequence[float], order: int) -> Formula:
    """DDIM from nodes[0], plus sum_j W[j] (M_j - M_0) over the other nodes: every formula that
    reproduces constant data and constant noise. form: "data", "noise" or "flow"."""
    first = ddim(nodes[0], end)
    slopes = [slope(form, node) if w else (0.0, 0.0) for node, w in zip(nodes, W, strict=True)]
    both: list[list[float]] = []
    for base, part in ((first.a[0], 0), (first.b[0], 1)):
        own = slope(form, nodes[0])[part]
        others = [w * m[part] for w, m in zip(W[1:], slopes[1:], strict=True)]
        start = base - sum(W[1:]) * own
        # what cancels is 0, not rounding: nothing to store and nothing to add
        both.append([start if abs(start) > 1e-15 * (abs(base) + abs(own)) else 0.0, *others])
    a, b = both
    return Formula(a, b, order)


def slope(form: str, level: Level) -> tuple[float, float]:
    """(p, q) of M = p x + q D at a level. "lambda": the derivative of x / alpha by lambda."""
    if form == "data":
        return 0.0, 1.0
    if form == "lambda":
        return -1.0 / level.alpha, 1.0
    n = scale(form, level)
    return (level.alpha / n if form == "v" else 1.0) / level.sigma, -n / level.sigma


def _kappa(process: Process, start: Level, end: Level, count: int) -> list[float]:
    """Times of the inner states of a step from or to alpha = 0."""
    low, high = math.exp(start.lam), math.exp(end.lam)
    kappas = [low + (high - low) / (count - i) for i in range(count - 1)]
    return [float(process.time(math.log(kappa))) for kappa in kappas]


def _from_noise(process: Process, levels: Sequence[Level], end: Level) -> list[Formula]:
    """The midpoint rule in kappa, with Jameson's stages."""
    out = []
    for i, level in enumerate((*levels[1:], end)):
        (a, *_), (b, *_), *_ = ddim(levels[0], level)
        order = 2 if i and level is end else 1
        out.append(Formula([a, *[0.0] * i], [*[0.0] * i, b], order))
    return out


def singlestep(
    order: int,
    *,
    form: Literal["data", "noise"] = "data",
    second: Literal["midpoint", "exact"] = "midpoint",
    ratios: Sequence[float] | None = None,
    name: str | None = None,
    source: str = "exponential singlestep",
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Singlestep:
    """DPM-Solver-`order` (form "noise") or DPM-Solver++ `order`S (form "data"): order 2 or 3, as
    many NFE per step.

    second: "midpoint", the published default, or "exact": weights by quadrature ("taylor").
    ratios: r_1 (, r_2), where the inner states of a full step are; default 1/2, or 1/3 and 2/3.
    """
    if isinstance(order, bool) or order not in (2, 3):
        raise ValueError(f"order = {order!r}; accepted: 2, 3 (one evaluation is DDIM)")
    for argument, value, known in (
        ("form", form, ("data", "noise")),
        ("second", second, ("midpoint", "exact")),
    ):
        if value not in known:
            raise ValueError(unknown(argument, value, known))
    default = (0.5,) if order == 2 else (1 / 3, 2 / 3)
    ratios = default if ratios is None else tuple(map(float, ratios))
    apart = len({0.0, *ratios}) == order == len(ratios) + 1
    if not apart or not all(0 < r <= 1 for r in ratios):
        raise ValueError(f"ratios = {ratios}; need {order - 1} different numbers in (0, 1]")
    if order == 3 and second == "midpoint" and abs(ratios[-1] - 2 / 3) > 1e-9:
        raise ValueError(
            f"ratios = {ratios} with second = 'midpoint', which is of third order for r_2 = 2/3 "
            "only; use second = 'exact'"
        )
    step = _Exponential(form, second == "exact", ratios)
    return Singlestep(
        name=name
        or f"singlestep({order}, {form}, {second}, {', '.join(f'{r:g}' for r in ratios)})",
        order=order,
        nfe_per_step=order,
        inner=step.inner,
        stages=step,
        source=source,
        ends="no start-up; at sigma = 0 order 1; at alpha = 0 midpoint in alpha / sigma",
        lower_final=order == 3,
        fragile=fragile,
        aliases=aliases,
    )


@dataclass(frozen=True)
class _Exponential:
    """DPM-Solver: inner times, and rows."""

    form: str
    exact: bool
    ratios: tuple[float, ...]

    def inner(self, process: Process, start: Level, end: Level, count: int) -> list[float]:
        """Times of lambda_s + r_i h."""
        ratios = self.ratios if count == len(self.ratios) + 1 else (0.5,)
        h = end.lam - start.lam
        return [end.t if r == 1 else float(process.time(start.lam + r * h)) for r in ratios]

    def __call__(self, process: Process, levels: Sequence[Level], end: Level) -> list[Formula]:
        """levels: start and one or two inner ones, anywhere but at the start."""
        start, inner = levels[0], levels[1:]
        out = [ddim(start, inner[0])]
        if len(inner) == 2:
            out.append(self._through(levels[:2], inner[1], [1]))
            # Integer times may leave both inner states at one level: the newer one counts.
            both = self.exact and inner[0].lam != inner[1].lam
            out.append(self._through(levels, end, [1, 2] if both else [2]))
        elif self.exact:
            out.append(self._through(levels, end, [1]))
        else:
            total = float(weights(self.form, "lambda", start, end, [start])[0])
            w = total * 0.5 * (end.lam - start.lam) / (inner[0].lam - start.lam)
            out.append(mixed(self.form, levels, end, [0.0, w], 2))
        return out

    def _through(self, levels: Sequence[Level], end: Level, nodes: list[int]) -> Formula:
        """Exact weights through the start and these nodes."""
        W = np.zeros(len(levels))
        through = [levels[0], *(levels[j] for j in nodes)]
        W[nodes] = weights(self.form, "lambda", levels[0], end, through)[1:]
        order = 3 if len(levels) == 3 else 2
        return mixed(self.form, levels, end, W.tolist(), order)
