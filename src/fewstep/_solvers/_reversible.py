r"""Solvers that can be run backwards exactly: BDIA, reversible Heun, EDICT.

They carry two states, and every row can be solved for its older one without asking the network
about it. A run hands over both (`State.ends`), and `Plan.inverse` is the plan that goes back:

    forth = fs.plan("bdia_1", model, 20, final="min")
    noise, partner = fs.walk(forth.inverse(), model, image, fs.second_state(forth, model, image))
    image, _ = fs.walk(forth.inverse().inverse(), model, noise, partner)

BDIA. Phi(x_i; i -> j) is one step of a base method from node i to any node j. From the second step

    x_{i+1} = gamma (x_{i-1} - Phi(x_i; i -> i-1)) + Phi(x_i; i -> i+1)

    DDIM    Phi(x, e; i -> j) = (alpha_j / alpha_i) x + alpha_j (rho_j - rho_i) e: 1 NFE per step
    Heun    the same with (e(x_i) + e(u)) / 2 for e, u the DDIM step to node i + 1, both ways: 2 NFE
            per step, first order as the mean slope is not that of the step before. (The line
            through both slopes would be second order, and explodes where steps shrink.)
    others  any multistep row, taken forwards and backwards: more accurate, but not reversible, as
            x_{i-1} enters through the network

In y = x / alpha the weight is gamma_y = gamma alpha_{i-1} / alpha_{i+1}, and the error of a DDIM
step is (Delta_i^2 - gamma_y Delta_{i-1}^2) / 2 d^2y/drho^2: first order for gamma < 1, with about
(1 - gamma)/(1 + gamma) of DDIM's error on equal steps; second order on smoothly graded grids for
gamma = 1; and on every grid for gamma_i = (alpha_{i+1}/alpha_{i-1}) (Delta_i / Delta_{i-1})^2
("per step", not in the paper). Where steps shrink fast, a fixed gamma over-corrects by
(Delta_{i-1} / Delta_i)^2: `fragile`.

Reversible Heun. The pair z' = 2 y - z + Delta e(z), y' = y + Delta (e(z) + e(z')) / 2, z_0 = y_0,
in any form's coordinates (here y = x / alpha over rho; ours are those of "flow" by default).
Eliminating y leaves z_{i+1} = z_{i-1} + (Delta_i + Delta_{i-1}) e(z_i), which is BDIA on DDIM with
gamma_y = 1. The last step ends with Delta e(z) in place of the mean, so that no evaluation is spent
at the last node and sigma = 0 is as good an end as any; it is then half leapfrog and half DDIM,
gamma_y = 1/2, and takes out the parasitic part.

EDICT. Two states that start equal, a = alpha_t / alpha_s, b = alpha_t (rho_t - rho_s), mixing p:

    x1 = a x + b e(y, s),     y1 = a y + b e(x1, s),
    x' = p x1 + (1 - p) y1,   y' = p y1 + (1 - p) x'

e(x1, s): a state of level t is asked about at s. In every second step y moves first; mixing does
not alternate. The sample is y' in a run of whole steps. With one evaluation left over the last step
stops at its first half, and the state that moved is the sample. A step from alpha = 0 takes the
data form of the two rows, x1 = (sigma_t / sigma_s) x + ... D, where a is infinite.

Rounding. Going back divides by gamma at every step (by p twice for EDICT): errors of the arithmetic
grow like gamma^-N, and so does any non-determinism of the network. Check gamma^-N times 6e-8
(float32) or 1e-16 (float64) against the error that is allowed. Measured in float32 at N = 10, 20,
50 (VP, uniform times): gamma = 0.5 8e-6, 6e-3, 8e6; gamma = 0.8 3e-7, 2e-6, 2e-3; gamma = 1 and
reversible Heun below 5e-7 throughout; EDICT 1e-6. The round trip is exact only on the grid of the
plan, and a latent found on a coarse grid is not white noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .._denoiser import Model
from .._plan import Plan, Row
from .._process import Array, Level, Process
from .._weights import scale, weights
from ._base import Draft, Formula, Multistep, Solver, Step
from ._momentum import Terms, multistep, transfer

__all__ = ["bdia", "edict", "reversible_heun", "second_state", "walk"]

_BDIA = "Exact Diffusion Inversion via Bi-directional Integration Approximation, 2307.10829"
_EDICT = "EDICT: Exact Diffusion Inversion via Coupled Transformations, 2211.12446"
_REVERSIBLE = "Efficient and Accurate Gradients for Neural SDEs, 2105.13493"

Gamma = float | Literal["per step"]


def _rho_step(start: Level, end: Level) -> float:
    """alpha_end (rho_end - rho_start); start may not have alpha = 0."""
    return float(weights("noise", "rho", start, end, [start])[0])


@dataclass(frozen=True)
class _Bidirectional:
    """The coefficient function of BDIA. gamma counts in x or, with a form, in its x / N."""

    base: Step
    nodes: int
    gamma: Gamma
    form: str | None = None

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        forward, terms = self.base(process, history[: self.nodes], end), Terms(len(history))
        terms.add(1.0, forward)
        order = forward.order
        if len(history) > 1 and (gamma := self._weight(history[1], history[0], end)):
            terms.add(-gamma, self.base(process, history[: self.nodes], history[1]))
            terms.a[1] += gamma
            order = max(order, 2) if self.gamma in (1, "per step") else order
        return forward._replace(a=terms.a, b=terms.b, order=order, c=terms.c)

    def _weight(self, before: Level, start: Level, end: Level) -> float:
        """gamma in x."""
        if self.form is None:
            return float(self.gamma)
        here, there = scale(self.form, before), scale(self.form, end)
        if here == 0 or there == 0:
            return 0.0  # the form's own step is infinite there
        if self.gamma != "per step":
            return float(self.gamma) * there / here
        forth, back = (
            float(weights(self.form, "own", start, level, [start])[0]) for level in (end, before)
        )
        return here / there * (forth / back) ** 2


def _check_gamma(gamma: Any) -> Gamma:
    if gamma == "per step":
        return gamma
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma <= 1:
        raise ValueError(f"gamma = {gamma!r}; need a number in (0, 1], or 'per step'")
    return float(gamma)


def bdia(
    base: str | Multistep = "ddim",
    gamma: Gamma = 0.5,
    *,
    form: str | None = None,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Solver:
    """Bi-directional integration approximation of a base method; the formula is above.

    base: "ddim" (reversible), "heun" (2 NFE per step, reversible, order 1), or any multistep solver
        (its order).
    gamma: in (0, 1], or "per step" (base "ddim"): second order on every grid, not for inversion. On
        our problems the most accurate two-step method unguided and at weak guidance, and worse than
        DDIM at strong guidance (scale 4 and more), where its small interval of stability shows.
        The authors take 0.5 at about 10 steps and 1 at about 40, on Stable Diffusion's uniform
        times. On grids whose steps shrink fast, 0.3 or less, or a form, or "per step".
    form: weigh with gamma in the coordinates x / N of "noise" or "flow" instead of in x, as
        published (base "ddim"). "per step" needs one; default "flow", which every process and both
        ends know.

    Source: BDIA (arXiv 2307.10829), the update of the official code for DDIM; the paper's equations
    for EDM and DPM-Solver++ were not at hand: "heun" and multistep bases follow from the same rule.
    """
    gamma = _check_gamma(gamma)
    shown = gamma if isinstance(gamma, str) else f"{gamma:g}"
    if base == "heun" and form is None and not isinstance(gamma, str):
        return _BidirectionalHeun(name or f"bdia(heun, {shown})", gamma, aliases=aliases)
    inner = multistep(base, "base") if base != "heun" else None
    if (form is not None or gamma == "per step") and (inner is None or inner.name != "ddim"):
        raise ValueError(
            f"gamma = {gamma!r}, form = {form!r} with base = {base!r}; 'per step' and a form exist "
            "for base = 'ddim' only"
        )
    assert inner is not None
    form = "flow" if gamma == "per step" and form is None else form
    if form not in (None, "noise", "flow"):
        raise ValueError(f"form = {form!r}; accepted: 'noise', 'flow', or None for gamma in x")
    shown += f", {form}" * (form is not None)
    nodes = inner.nodes or inner.order
    order, smooth = inner.order, inner.smooth_order
    if nodes == 1 and gamma == "per step":
        order = 2
    elif nodes == 1 and gamma == 1:
        smooth = 2
    first = nodes > 1 and "at sigma = 0 order 1" in inner.ends
    clean = "order 1" if first else "the formula as it is"
    return Multistep(
        name=name or f"bdia({inner.name}, {shown})",
        order=order,
        step=_Bidirectional(inner.step, nodes, gamma, form),
        source=f"{_BDIA}, gamma {shown}; {inner.source}",
        ends=f"first step: the base; at sigma = 0 {clean}",
        nodes=max(nodes, 2),
        smooth_order=smooth,
        reversible=nodes == 1,
        fragile=_OVERCORRECTS if gamma != "per step" else "",
        aliases=aliases,
    )


_OVERCORRECTS = (
    "where steps in rho shrink fast (few steps, grids dense near data) a fixed gamma over-corrects "
    "by the square of the ratio of steps"
)
_STALE = (
    "where sigma / alpha falls by a large factor in one step (few steps), as the second state is "
    "asked about at a level far above its own; made for 50 steps"
)


@dataclass(frozen=True)
class _ReversibleHeun(Multistep):
    """Leapfrog, with half of gamma in the last step."""

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        draft = super().draft(process, times, nfe)
        last = len(draft.rows) - 1
        if last < 1:
            return draft
        assert isinstance(self.step, _Bidirectional)
        formula = replace(self.step, gamma=0.5)(
            process, (draft.levels[last], draft.levels[last - 1]), draft.levels[-1]
        )
        a = dict(zip((last, last - 1), formula.a, strict=True))
        row = _row(a, {last: formula.b[0]}, 2)
        return replace(draft, rows=(*draft.rows[:-1], row))


def reversible_heun(form: str = "flow", *, name: str | None = None) -> Multistep:
    """Reversible Heun: exactly reversible, 1 NFE per step.

    form: the coordinates x / N over zeta that are stepped in (see `exponential`): "flow", which has
    both ends of every process, or "noise": y = x / alpha over rho, where the first step from
    alpha = 0 is DDIM and cannot be inverted.

    The sample is second order on any grid; the states on the way are those of a leapfrog, second
    order on smoothly graded grids. In "flow" it is not worse than DDIM on any process and grid of
    this package; in "noise" it is, by far, where steps in rho shrink fast. Not stable for any real
    negative Delta de/dy, as every method whose inversion does not amplify: strong guidance may show
    that.

    Source: arXiv 2105.13493, algorithm 1, without its noise.
    """
    if form not in ("noise", "flow"):
        raise ValueError(f"form = {form!r}; accepted: 'noise', 'flow'")
    ddim = multistep("ddim", "base")
    return _ReversibleHeun(
        name=name or f"reversible_heun({form})",
        order=1,
        step=_Bidirectional(ddim.step, 1, 1.0, form),
        source=f"{_REVERSIBLE}, algorithm 1",
        ends="first step DDIM; the last step, to sigma = 0 too, is half leapfrog, half DDIM",
        nodes=2,
        smooth_order=2,
        reversible=True,
        fragile="" if form == "flow" else _OVERCORRECTS,
    )


def _spent(name: str, nfe: int | None, most: int, least: int) -> int:
    """Evaluations to be left out of `most`."""
    if nfe is None:
        return 0
    if not least <= nfe <= most:
        raise ValueError(
            f"nfe = {nfe}, but {name} on this grid takes {least} to {most} evaluations"
        )
    return most - nfe


@dataclass(frozen=True)
class _BidirectionalHeun(Solver):
    """BDIA on Heun's slope. Steps with one evaluation (the first ones, if the budget asks for it,
    and the one to sigma = 0) take DDIM's slope; a Heun step from alpha = 0 averages D, not e."""

    name: str
    gamma: float
    order: int = 1
    nfe_per_step: int = 2
    source: str = f"{_BDIA}; Heun as in EDM, 2206.00364, algorithm 1"
    ends: str = (
        "first step: Heun, or DDIM if one evaluation is left over; to sigma = 0 DDIM's slope"
    )
    fragile: str = _OVERCORRECTS
    reversible: bool = True
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int, clean: bool) -> int:
        return (nfe + clean + 1) // 2

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n, clean = len(nodes) - 1, nodes[-1].sigma == 0
        single = _spent(self.name, nfe, 2 * n - clean, n)
        levels, rows, evaluated = [nodes[0]], [], [True]
        here, before = 0, None  # the newest two states
        for i, (start, end) in enumerate(pairwise(nodes)):
            probe = None
            if i >= single and end.sigma > 0:
                probe = len(levels)
                a, b = transfer(start, end)
                rows.append(_row({here: a}, {here: b}, 1))
                levels.append(end)
                evaluated.append(True)
            a, b = self._phi(start, end, end, here, probe)
            if before is not None:
                back = self._phi(start, nodes[i - 1], end, here, probe)
                for mine, theirs in zip((a, b), back, strict=True):
                    for j, c in theirs.items():
                        mine[j] = mine.get(j, 0.0) - self.gamma * c
                a[before] = a.get(before, 0.0) + self.gamma
            rows.append(_row(a, b, 1))
            here, before = len(levels), here
            levels.append(end)
            evaluated.append(i < n - 1)
        keep = () if before is None else (before,)
        return Draft(tuple(levels), tuple(rows), tuple(evaluated), keep=keep)

    def _phi(
        self, start: Level, to: Level, probed: Level, here: int, probe: int | None
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Phi(x; start -> to) over states and outputs."""
        a, b = transfer(start, to)
        states, outputs = {here: a}, {here: b}
        if probe is None:
            return states, outputs
        if start.alpha == 0:  # e has an infinite way to go there; D has not
            return states, {here: 0.5 * b, probe: 0.5 * b}
        half = 0.5 * _rho_step(start, to)
        states[here] -= half / start.sigma
        outputs[here] += half * start.alpha / start.sigma
        states[probe] = half / probed.sigma
        outputs[probe] = -half * probed.alpha / probed.sigma
        return states, outputs


def _row(a: Mapping[int, float], b: Mapping[int, float], order: int, exact: bool = True) -> Row:
    # A weight of zero (a probe at alpha = 0) stays: it says that the evaluation belongs here.
    return Row(
        {j: float(c) for j, c in a.items() if c != 0},
        {j: float(c) for j, c in b.items()},
        order,
        exact,
    )


@dataclass(frozen=True)
class _Edict(Solver):
    """See `edict`."""

    name: str
    mixing: float
    pair: bool
    order: int = 1
    nfe_per_step: int = 2
    source: str = f"{_EDICT}, eqs. 13 to 15"
    ends: str = "at sigma = 0 the formula as it is; an odd budget ends with half a step"
    fragile: str = _STALE
    reversible: bool = True
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int, clean: bool) -> int:
        return (nfe + 1) // 2

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n, p = len(nodes) - 1, self.mixing
        half = _spent(self.name, nfe, 2 * n, 2 * n - 1)
        levels: list[Level] = [nodes[0]] * (1 + self.pair)
        asked: list[bool | Level] = [False] * len(levels)
        rows: list[Row] = []
        pair = [0, len(levels) - 1]

        def move(mover: int, other: int, start: Level, end: Level) -> None:
            x, y = pair[mover], pair[other]
            asked[y] = levels[y] == start or start
            scale, drive = transfer(start, end)
            if start.alpha == 0:
                a, b = {x: scale}, {y: drive}
            else:  # in terms of e(y, start), as published
                step = _rho_step(start, end)
                a, b = {x: end.alpha / start.alpha}, {y: -step * start.alpha / start.sigma}
                a[y] = a.get(y, 0.0) + step / start.sigma
            add(mover, a, b, end, exact=start.alpha == 0 or levels[y] == start)

        def add(
            which: int, a: dict[int, float], b: dict[int, float], end: Level, exact: bool = True
        ) -> None:
            rows.append(_row(a, b, 1, exact))
            pair[which] = len(levels)
            levels.append(end)
            asked.append(False)

        for i, (start, end) in enumerate(pairwise(nodes)):
            first, second = (0, 1) if i % 2 == 0 else (1, 0)
            move(first, second, start, end)
            if i == n - 1 and half:
                break
            move(second, first, start, end)
            for mine, other in ((0, 1), (1, 0)):
                add(mine, {pair[mine]: p, pair[other]: 1 - p}, {}, end)
        last = len(levels) - 1
        keep = tuple(sorted({*pair} - {last}))
        given = 1 + self.pair
        return Draft(tuple(levels), tuple(rows), tuple(asked), given, keep)


def edict(mixing: float = 0.93, *, pair: bool = False, name: str | None = None) -> Solver:
    """EDICT: two coupled DDIM states, exactly reversible, 2 NFE per step, order 1.

    mixing: p between 0.5 and 1, 0.93 in the paper; without mixing the two states drift apart.
    pair: start from two states, as edits do that replay an inverted pair.

    At equal NFE it is less accurate than DDIM: for exact inversion only, or for edits that were
    published with it. Source: arXiv 2211.12446, eqs. 13 to 15, with the alternation of the
    official code.
    """
    if isinstance(mixing, bool) or not isinstance(mixing, (int, float)) or not 0.5 < mixing < 1:
        raise ValueError(f"mixing = {mixing!r}; need a number between 0.5 and 1")
    name = name or f"edict({mixing:g}{', pair' if pair else ''})"
    return _Edict(name, float(mixing), bool(pair))


# Use


def second_state(
    plan: Plan, model: Model, x: Tensor, *, cond: Mapping[str, Any] | None = None
) -> Tensor:
    """The second state that `plan.inverse()` needs for data x that no run of `plan` has made.

    A convention, not a fact: x itself where the two states end at one level (EDICT), else one DDIM
    step upwards from x, with the network at x (BDIA, reversible Heun; one evaluation). The round
    trip is exact for any choice.

    plan: of a reversible solver, forwards; with final="min" if it takes a DDIM step, as a network
    knows no noise at sigma = 0. x: (batch, ...), data at the last level. cond: as in `sample`.
    """
    if len(plan.keep) != 1:
        name = plan.about.get("solver", "this plan")
        raise ValueError(f"plan: {name} hands over no second state; it is not reversible")
    start, end = plan.levels[-1], plan.levels[plan.keep[0]]
    if start == end:
        return x
    if start.sigma == 0:
        raise ValueError(
            "plan: it ends at sigma = 0, where x does not say which noise to add; make it with "
            "final='min'"
        )
    a, b = transfer(start, end)
    with torch.no_grad():
        return a * x + b * model(x, start.t, **(cond or {}))


def walk(
    plan: Plan, model: Model, *states: Tensor, cond: Mapping[str, Any] | None = None
) -> tuple[Tensor, ...]:
    """Run a plan from all the states it starts from to all that it hands over (`State.ends`).

    `sample` for plans that start from or end with two states: reversible ones and their inverses.
    The sample is the first state returned.
    """
    state = plan.start(*states)
    with torch.no_grad():
        while not state.done:
            output = model.output(*state.query(), plan.asked(state.index), cond or {})
            state = state.advance(output)
    return state.ends
