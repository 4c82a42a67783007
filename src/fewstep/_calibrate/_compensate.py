r"""Dynamic compensation: one ratio per step, fitted to a few converged trajectories.

Once evaluation i has corrected its own state (if the solver has a corrector), its data prediction
is replaced, for that step and for good, by the Lagrange interpolant of the last K + 1 stored ones

    D_i <- sum_{j = i-K..i} ell_j(u) D_j,     u = u_{i-1} + r_i (u_i - u_{i-1}),

with nodes u_j, the times of the evaluations; r_i = 1 leaves it. Stored means replaced: D_j are what
earlier replacements left. All of it is linear, so a compensated plan is a plan, with as many
evaluations as before. A row with r_i != 1 is consistent, but of order 1 as the grid is refined: the
ratios are fitted to one budget and mean nothing elsewhere.

Source: DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation (arXiv
2409.03755). There the solver is UniPC, K = 2, u = t, and the ratios are found step by step by AdamW
through the network; one number per step needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._plan import Plan, Row, State
from .._prediction import unknown
from .._process import Array, Level
from ._teacher import Counted, Teacher, trajectory

__all__ = ["Cascade", "Compensation", "compensated", "fit_ratios"]

_Terms = dict[tuple[str, int], float]  # of states ("X", j) and data predictions ("D", j)

Variable = Literal["t", "lambda"]
Of = Literal["data", "noise"]
Objective = Literal["trajectory", "sample"]
Loss = Literal["square", "log"]


def _one_of(argument: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(unknown(argument, str(value), known))


# -- the transformation --------------------------------------------------------------------------


def compensated(
    plan: Plan,
    ratios: Sequence[float],
    order: int = 2,
    *,
    variable: Variable = "t",
    of: Of = "data",
) -> Plan:
    """The plan with the data prediction of evaluation i replaced, before it is stepped from, by an
    interpolation of the last order + 1 stored ones at u_{i-1} + ratios[i] (u_i - u_{i-1}).

    plan: deterministic and not fused; any solver. A corrector, which makes the state of evaluation
        i again at its own level, still sees that evaluation itself.
    ratios: one per evaluation; 1 changes nothing. The first `order` must be 1, and so must those of
        evaluations that share their level with one of the `order` before.
    variable: what u is, the process's t or lambda. of: what is interpolated; noise predictions are
        what codes interpolate whose solver is in noise form (with "t": DC-Solver's UniPC there).
    """
    asked = _checked(plan, order, variable, of)
    ratios = [float(r) for r in ratios]
    if len(ratios) != len(asked):
        raise ValueError(
            f"ratios has {len(ratios)} entries; this plan has {len(asked)} evaluations, give one "
            "for each"
        )
    free = _free(plan, asked, order, variable, of)
    for i, r in enumerate(ratios):
        if not math.isfinite(r):
            raise ValueError(f"ratios[{i}] = {r}; need finite numbers")
        if r != 1 and i not in free:
            raise ValueError(
                f"ratios[{i}] = {r:g} must be 1: order = {order} interpolates {order + 1} "
                f"evaluations at different levels, with finite {variable}, and here are none"
            )
    if all(r == 1 for r in ratios):
        return plan
    u = [_place(plan.asked(k), variable) for k in asked]
    stored: list[_Terms] = []  # what is in the buffer: data or noise predictions
    for i, (k, r) in enumerate(zip(asked, ratios, strict=True)):
        stored.append(_noise(plan, k) if of == "noise" else {("D", k): 1.0})
        if r != 1:
            total: _Terms = {}
            for j, w in _lagrange(u, i, order, r).items():
                _add(total, w, stored[j])
            stored[i] = total
    changed: dict[int, _Terms] = {}  # data predictions by state
    for k, terms in zip(asked, stored, strict=True):
        if terms.keys() - {("D", k), ("X", k)}:
            changed[k] = _data(plan, k, terms) if of == "noise" else terms
    rows = tuple(_rewritten(plan, plan.given + i, row, changed) for i, row in enumerate(plan.rows))
    about = {
        **plan.about,
        "ratios": " ".join(f"{r:.6g}" for r in ratios),
        "compensated": f"{of}, order {order} in {variable}",
    }
    # For other times other ratios would be right: what it was compiled from does not hold any more.
    return replace(plan, rows=rows, about=about, origin=None)


def _checked(plan: Plan, order: int, variable: str, of: str) -> list[int]:
    """The evaluated states, in order."""
    _one_of("variable", variable, ("t", "lambda"))
    _one_of("of", of, ("data", "noise"))
    if isinstance(order, bool) or not isinstance(order, Integral) or order < 1:
        raise ValueError(f"order = {order!r}; need an integer >= 1")
    if plan.draws:
        raise ValueError("plan: it draws noise; only deterministic plans can be compensated")
    if plan.raw or "fused" in plan.about:
        raise ValueError(
            "plan: it is fused, so that its correctors can no longer be told from its steps; "
            "compensate the unfused plan"
        )
    if plan.axis is not None:
        raise ValueError(
            f"plan: its levels run along axis {plan.axis}; compensate the plans that it was "
            "stacked from"
        )
    if "ratios" in plan.about:
        raise ValueError("plan: it is compensated already; compensate the plan that it came from")
    return [k for k, call in enumerate(plan.calls) if call is not None]


def _place(level: Level, variable: str) -> float:
    return float(level.t if variable == "t" else level.lam)


def _free(plan: Plan, asked: Sequence[int], order: int, variable: str, of: str) -> list[int]:
    """The evaluations that may have another ratio than 1."""
    levels = [plan.asked(k) for k in asked]
    u = [_place(level, variable) for level in levels]
    out = []
    for i in range(order, len(u)):
        nodes = u[i - order : i + 1]
        usable = of == "data" or (min(v.sigma for v in levels[: i + 1]) > 0 < levels[i].alpha)
        if usable and all(map(math.isfinite, nodes)) and len(set(nodes)) == len(nodes):
            out.append(i)
    return out


def _lagrange(u: Sequence[float], i: int, order: int, ratio: float) -> dict[int, float]:
    """Of evaluations i - order to i, the weights of the interpolant."""
    at, nodes = u[i - 1] + ratio * (u[i] - u[i - 1]), range(i - order, i + 1)
    return {j: math.prod((at - u[m]) / (u[j] - u[m]) for m in nodes if m != j) for j in nodes[::-1]}


def _noise(plan: Plan, k: int) -> _Terms:
    """The noise prediction of state k."""
    level = plan.asked(k)
    if level.sigma == 0:  # never used: see `_free`
        return {("D", k): math.nan}
    return {("X", k): 1 / level.sigma, ("D", k): -level.alpha / level.sigma}


def _data(plan: Plan, k: int, noise: _Terms) -> _Terms:
    """The data prediction of state k that means this noise."""
    level = plan.asked(k)
    total = {("X", k): 1 / level.alpha}
    _add(total, -level.sigma / level.alpha, noise)
    return total


def _add(total: _Terms, factor: Any, terms: Mapping[tuple[str, int], Any]) -> None:
    for symbol, c in terms.items():
        total[symbol] = total.get(symbol, 0.0) + factor * c


def _rewritten(plan: Plan, made: int, row: Row, changed: Mapping[int, _Terms]) -> Row:
    """The row that makes a state, with data predictions replaced."""
    mine = {j: changed[j] for j in row.b if j in changed and not _corrects(plan, made, j)}
    if not mine:
        return row
    total: _Terms = {}
    size: _Terms = {}
    for j, c in row.a.items():
        _add(total, c, {("X", j): 1.0})
        _add(size, np.abs(c), {("X", j): 1.0})
    for j, c in row.b.items():
        terms = mine.get(j, {("D", j): 1.0})
        _add(total, c, terms)
        _add(size, np.abs(c), {s: abs(v) for s, v in terms.items()})
    # What cancels (states, where a row in noise form is given its noise back) is left at rounding.
    kept = {s: c for s, c in total.items() if np.any(np.abs(c) > 1e-14 * size[s])}
    a, b = ({j: c for (kind, j), c in kept.items() if kind == name} for name in ("X", "D"))
    return replace(row, a=a, b=b, order=min(row.order, 1))


def _corrects(plan: Plan, made: int, j: int) -> bool:
    """Whether state `made` is state j again, made with the evaluation at j."""
    return (
        plan.calls[made] is None
        and all(call is None for call in plan.calls[j + 1 : made])
        and plan.levels[made].t == plan.asked(j).t
    )


# -- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Compensation:
    """What `fit_ratios` found.

    plan: the compensated plan; the plan as it was where nothing better was found.
    ratios: one per evaluation, those of `plan`.
    before, after: errors of the held-out noises, of the plan as it was and of `plan`.
    found: what searches found, used or not, by the objective; scores: the mean log error of the
        held-out noises for each of them and for "none".
    evaluations: what all of it took, of single samples, reference and check included.
    note: a sentence on what was decided and why.
    """

    plan: Plan
    ratios: tuple[float, ...]
    before: Array
    after: Array
    found: Mapping[str, tuple[float, ...]]
    scores: Mapping[str, float]
    evaluations: int
    note: str


def fit_ratios(
    teacher: Teacher,
    plan: Plan,
    *,
    count: int = 10,
    held_out: Teacher | None = None,
    order: int = 2,
    variable: Variable = "t",
    of: Of = "data",
    objective: Objective = "sample",
    loss: Loss = "log",
    bounds: tuple[float, float] = (0.0, 2.0),
    tries: int = 15,
) -> Compensation:
    """Ratios for `compensated`, fitted to the first `count` noises of a teacher.

    objective: "trajectory" takes step after step, and that ratio whose next state (after its
        corrector, if there is one) is nearest to the converged one, as published. With a corrector
        every try costs an evaluation, without one none. "sample" goes on from there, or from 1 if
        that is nearer: one ratio after another, over and over, by the distance of the sample, which
        every try needs the rest of the run for. It mostly gains more; either may be what is
        returned (benchmarks/compensation.py).
    loss: over samples, the mean "square" of the distance (as published), or the mean "log": the few
        samples that end elsewhere altogether own the first, and none owns the second.
    held_out: decides between what was found and the plan as it was, by the mean log error; by
        default the other noises of the teacher.
    bounds: of the ratios. tries: values of every ratio that are looked at, in a search.
    """
    _one_of("objective", objective, ("trajectory", "sample"))
    _one_of("loss", loss, ("square", "log"))
    asked = _checked(plan, order, variable, of)
    low, high = map(float, bounds)
    if not (math.isfinite(high - low) and low < 1 < high):
        raise ValueError(f"bounds = {bounds}; need finite low < 1 < high")
    if tries < 3:
        raise ValueError(f"tries = {tries}; need at least 3")
    if not 1 <= count <= len(teacher):
        raise ValueError(f"count = {count}; need 1 to {len(teacher)}, the samples of the teacher")
    rest = teacher[count:] if held_out is None and count < len(teacher) else held_out
    if rest is None:
        raise ValueError(
            f"count = {count}: of {len(teacher)} samples that leaves none to check on; give fewer, "
            "or held_out"
        )
    start = teacher.model.process.t_start
    if plan.levels[0].t != start or plan.given != 1:
        raise ValueError(
            f"plan: it starts from {plan.given} states, at t = {plan.levels[0].t:g}; a teacher's "
            f"noises are one state at t = {start:g}"
        )

    def trial(run: Plan, ratios: Sequence[float]) -> Plan:
        return compensated(run, ratios[: run.nfe], order, variable=variable, of=of)

    model, other = Counted(teacher.model), Counted(rest.model)
    fitted, rest = replace(teacher[:count], model=model), replace(rest, model=other)
    free, ones = _free(plan, asked, order, variable, of), (1.0,) * len(asked)
    found: dict[str, tuple[float, ...]] = {}
    if free:
        parts = [_until(plan, i, asked) for i in range(len(asked))]
        ends = [float(part.levels[-1].t) for part in parts]
        times = list(dict.fromkeys((float(start), *ends)))
        states = trajectory(
            model, fitted.x, times, fitted.cond, nfe=teacher.nfe or 200, batch=teacher.batch
        )
        targets = [replace(fitted, samples=states[times.index(t)]) for t in ends]

        def value_of(ratios: Sequence[float]) -> float:
            return _log_mean(targets[-1].errors(trial(plan, ratios)), loss)

        steps = _Sweep(trial, free, parts, targets, loss, (low, high), tries)
        found["trajectory"] = ratios = steps(ones)[0]
        if objective == "sample":
            whole = replace(steps, runs=[plan] * len(asked), targets=targets[-1:] * len(asked))
            value, ratios = min((value_of(r), r) for r in (ones, ratios))
            for _ in range(_SWEEPS):
                before = value
                ratios, value = whole(ratios)
                if not before - value > _ENOUGH:
                    break
            found["sample"] = ratios
    runs = {"none": plan, **{name: trial(plan, ratios) for name, ratios in found.items()}}
    errors = {name: rest.errors(run) for name, run in runs.items()}
    scores = {name: _log_mean(e, "log") for name, e in errors.items()}
    best = min(scores, key=lambda name: scores[name])  # of equal ones the first, which is "none"
    if not free:
        note = (
            f"kept as it is: there are nowhere {order + 1} evaluations in a row at different "
            f"levels, with finite {variable}, that order = {order} could interpolate"
        )
    else:
        changes = "; ".join(f"{name} {scores[name] - scores['none']:+.3f}" for name in found)
        note = (
            f"{'kept as it is' if best == 'none' else f'compensated by {best}'}; change of the "
            f"mean log error of {len(rest)} held-out noises: {changes}"
        )
    return Compensation(
        runs[best],
        found.get(best, ones),
        errors["none"],
        errors[best],
        found,
        scores,
        model.evaluations + other.evaluations,
        note,
    )


#: Sweeps over all ratios, at most, and the gain in log error that makes another worth while.
_SWEEPS, _ENOUGH = 4, 0.01


@dataclass(frozen=True, eq=False)
class _Sweep:
    """Every free ratio once, in order: ratio i is that with which the end of runs[i] is nearest to
    the samples of targets[i]. Answers of the network that ratio i has no part in are asked for
    once."""

    trial: Callable[[Plan, Sequence[float]], Plan]
    free: Sequence[int]
    runs: Sequence[Plan]
    targets: Sequence[Teacher]
    loss: str
    bounds: tuple[float, float]
    tries: int

    def __call__(self, ratios: Sequence[float]) -> tuple[tuple[float, ...], float]:
        """(the ratios, the last distance), from these."""
        ratios, answers, value = list(ratios), [], math.inf
        for i in self.free:
            target = self.targets[i]
            # The last run goes past every evaluation; ratios from i on have no part in these yet.
            _, known = _walk(target, self.trial(self.runs[-1], ratios), answers[: i + 1], i + 1)
            told: dict[float, list[Tensor]] = {}

            def distance(r: float, i: int = i, known: Any = known, told: Any = told) -> float:
                run = self.trial(self.runs[i], [*ratios[:i], r, *ratios[i + 1 :]])
                x, told[r] = _walk(self.targets[i], run, known)
                return _log_mean(self.targets[i].distances(x), self.loss)

            ratios[i], value = _minimum(distance, *self.bounds, ratios[i], self.tries)
            answers = told[ratios[i]]
        return tuple(ratios), value


def _log_mean(errors: Array, loss: str) -> float:
    """The loss, as the logarithm of an error: it has the same minimum so."""
    errors = np.maximum(errors, 1e-300)
    if loss == "log" or not np.isfinite(errors).all():
        return float(np.log(errors).mean())
    largest = errors.max()
    return float(np.log(np.square(errors / largest).mean()) / 2 + np.log(largest))


def _until(plan: Plan, i: int, asked: Sequence[int]) -> Plan:
    """The plan up to the state that evaluation i leads to, corrected if it is corrected."""
    last = len(plan.levels) - 1
    if i + 1 < len(asked):
        after = asked[i + 2] if i + 2 < len(asked) else last + 1
        last = max(
            k
            for k in range(asked[i + 1], after)
            if k == asked[i + 1] or _corrects(plan, k, asked[i + 1])
        )
    return replace(
        plan,
        levels=plan.levels[: last + 1],
        rows=plan.rows[: last + 1 - plan.given],
        calls=(*plan.calls[:last], None),
        keep=(),
        origin=None,
    )


def _walk(
    teacher: Teacher, run: Plan, known: Sequence[Tensor], stop: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The last state, and the network's answers, the first of which are known; up to `stop` of
    them."""
    answers = list(known)
    with torch.no_grad():
        state = run.start(teacher.x)
        while not state.done and state.nfe != stop:
            if state.nfe == len(answers):
                answers.append(_asked(teacher, state))
            state = state.advance(answers[state.nfe])
    return state.x, answers


def _asked(teacher: Teacher, state: State) -> Tensor:
    """The network about a state, in batches."""
    x_in, t_in = state.query()
    level = state.plan.asked(state.index)
    return torch.cat(
        [
            teacher.model.output(x_in[part], t_in[part], level, teacher[part].cond)
            for part in teacher.chunks()
        ]
    )


def _minimum(
    f: Callable[[float], float], low: float, high: float, start: float, tries: int
) -> tuple[float, float]:
    """(x, f(x)) of the least f found between the bounds: `start`, and then golden sections with
    parabolas where these do better (R. P. Brent, Algorithms for Minimization without Derivatives,
    1973, chapter 5)."""
    golden, tiny = (3 - math.sqrt(5)) / 2, 1e-3 * (high - low)
    x = w = v = min(max(start, low), high)
    fx = fw = fv = f(x)
    step = before = 0.0
    for _ in range(tries - 1):
        middle = (low + high) / 2
        if abs(x - middle) <= 2 * tiny - (high - low) / 2:
            break
        p = q = 0.0
        if abs(before) > tiny and all(map(math.isfinite, (fx, fw, fv))):
            r, s = (x - w) * (fx - fv), (x - v) * (fx - fw)
            p, q = (x - v) * s - (x - w) * r, 2 * (s - r)
            p, q = (-p, q) if q > 0 else (p, -q)
        if abs(p) < abs(0.5 * q * before) and q * (low - x) < p < q * (high - x):
            step, before = p / q, step
            if min(x + step - low, high - x - step) < 2 * tiny:
                step = math.copysign(tiny, middle - x)
        else:
            before = (high if x < middle else low) - x
            step = golden * before
        u = x + (step if abs(step) >= tiny else math.copysign(tiny, step))
        fu = f(u)
        if fu <= fx:
            low, high = (x, high) if u >= x else (low, x)
            (v, fv), (w, fw), (x, fx) = (w, fw), (x, fx), (u, fu)
        else:
            low, high = (u, high) if u < x else (low, u)
            if fu <= fw or w == x:
                (v, fv), (w, fw) = (w, fw), (u, fu)
            elif fu <= fv or v in (x, w):
                v, fv = u, fu
    return x, fx


# -- ratios without a search ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cascade:
    r"""Ratios as a polynomial of step, guidance and budget, for those that were not searched:

        r_n(w, N) = sum_{i=0..3} sum_{a=0..2} sum_{b=0..2} c[i, 2 - a, 2 - b]
                    (n / N)^i (w / 12)^a (N / 50)^b,       n = order + 1, ..., N,

    and 1 for the first `order` steps. It is the cascade polynomial regression of DC-Solver (arXiv
    2409.03755), whose 36 numbers, in the order in which they are published, are c: `reshape(4, 3,
    3)`. There a general optimiser fits them; it is a linear problem.

    guidances, budgets, limits: least and largest w, N and ratio of the fit. Outside of them the
        polynomial means nothing: w and N are moved to the nearest inside, and so is the ratio.
        (Published numbers come without; then nothing is moved.)
    note: what was lowered for lack of data, "" if nothing.
    """

    coefficients: Array
    order: int = 2
    guidances: tuple[float, float] = (-math.inf, math.inf)
    budgets: tuple[float, float] = (1, math.inf)
    limits: tuple[float, float] = (-math.inf, math.inf)
    note: str = ""

    def __post_init__(self) -> None:
        c = np.array(self.coefficients, dtype=np.float64)
        if c.shape != (4, 3, 3) or not np.isfinite(c).all():
            raise ValueError(f"coefficients have shape {c.shape}; need (4, 3, 3) finite numbers")
        c.setflags(write=False)
        object.__setattr__(self, "coefficients", c)

    @classmethod
    def fit(cls, runs: Sequence[tuple[float, int, Sequence[float]]], order: int = 2) -> Cascade:
        """Least squares on (guidance, nfe, ratios) of several searches; `order` as in those.

        Degrees are 3 in the step and 2 in guidance and budget, where there are 4 different values
        of these or more; of 2 or 3 the degree is 1. (Quadratics through 3 values are met exactly,
        errors of the search included, and predict worse.) They are lower still while the numbers
        are not determined: in the step first, where a run has many, then in the budget.
        """
        points: list[tuple[float, float, float]] = []
        values: list[float] = []
        for guidance, nfe, ratios in runs:
            if len(ratios) != nfe:
                raise ValueError(f"runs: {len(ratios)} ratios for nfe = {nfe}; need one for each")
            for n in range(order, nfe):
                points.append(((n + 1) / nfe, guidance / 12, nfe / 50))
                values.append(float(ratios[n]))
        if not points or not np.isfinite([*values, *np.ravel(points)]).all():
            raise ValueError(
                f"runs: {len(points)} ratios after the first {order}; need some, all finite"
            )
        table, y = np.array(points), np.array(values)
        full = (3, 2, 2)
        found = [len(set(column)) - 1 for column in table.T]
        most = (found[0], *(min(n, max(1, n - 1)) for n in found[1:]))
        degrees = [min(want, have) for want, have in zip(full, most, strict=True)]
        while True:
            exponents = [
                (i, a, b)
                for i in range(degrees[0] + 1)
                for a in range(degrees[1] + 1)
                for b in range(degrees[2] + 1)
            ]
            design = np.prod(table[:, None, :] ** np.array(exponents), axis=2)
            size = np.linalg.norm(design, axis=0)
            solution, _, rank, _ = np.linalg.lstsq(design / size, y, rcond=1e-9)
            if rank == len(exponents):
                break
            worst = 0 if degrees[0] else 2 if degrees[2] else 1
            degrees[worst] -= 1
        coefficients = np.zeros((4, 3, 3))
        for (i, a, b), c in zip(exponents, solution / size, strict=True):
            coefficients[i, 2 - a, 2 - b] = c
        note = ""
        if tuple(degrees) != full:
            names = ("the step", "guidance", "the budget")
            lowered = [
                f"{have} instead of {want} in {name}"
                for have, want, name in zip(degrees, full, names, strict=True)
                if have < want
            ]
            note = f"degree {', '.join(lowered)}: {len(points)} ratios of {len(runs)} runs"

        def ends(numbers: Any) -> tuple[float, float]:
            return float(np.min(numbers)), float(np.max(numbers))

        guidances, budgets = ends([run[0] for run in runs]), ends([run[1] for run in runs])
        return cls(coefficients, order, guidances, budgets, ends(y), note)

    def predict(self, guidance: float, nfe: int) -> tuple[float, ...]:
        """One ratio per evaluation, for `compensated` with the same order, variable and solver as
        those it was fitted to."""
        if nfe < 1 or not math.isfinite(guidance):
            raise ValueError(f"guidance = {guidance}, nfe = {nfe}; need a finite one and nfe >= 1")
        steps = np.arange(self.order + 1, nfe + 1) / nfe
        w, n = np.clip(guidance, *self.guidances) / 12, np.clip(nfe, *self.budgets) / 50
        powers = np.arange(2, -1, -1)
        cubic = np.einsum("iab,a,b->i", self.coefficients, w**powers, n**powers)
        rest = np.clip(np.polynomial.polynomial.polyval(steps, cubic), *self.limits)
        return (1.0,) * min(self.order, nfe) + tuple(rest.tolist())
