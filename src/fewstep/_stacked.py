"""Plans side by side in one state: levels per sample, per token or per frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ._noise import Draw
from ._plan import Call, Plan, Row
from ._process import Array, Level

__all__ = ["stacked"]


def stacked(
    plans: Sequence[Plan],
    axis: int = -2,
    *,
    delays: Sequence[int] | None = None,
    rest: float | Sequence[float] | None = None,
) -> Plan:
    """One plan for a state whose parts along an axis follow plans of their own, in the same
    network calls: samples from different strengths, tokens or frames at different levels
    (diffusion forcing, arXiv 2407.01392; rolling windows, arXiv 2402.09470), histories and draws
    included.

    plans: one for each index of the axis; any mix of solvers, processes, lengths and draws, of one
        kind of times, all fused or none.
    axis: of the state, counted from its end: -1 the last, -2 (default) tokens of (..., tokens,
        channels), -x.ndim the batch. Network times are (batch, len(plans)), or (batch,) there.
    delays: evaluations that each member waits before its first, 0 if not given. Some member must
        be moving at every evaluation.
    rest: time that the network is told for members that are done, one for all or one for each;
        default: the last that each was asked at. (Waiting members are told their first.) A network
        that was trained on clean context wants the process's clean end, for example 0.

    A member that waits or is done keeps its values: rows copy it, and no row uses the network's
    answer about it, which only has to be finite. Draw number m of a member is its part of draw
    number m of the whole. The result equals the members' own runs to rounding.

    The noise to start from has no single scale where that of the members differs: `prior_std` is
    nan then, and every part is to be scaled by its own.
    """
    plans = tuple(plans)
    _check(plans, axis)
    steps = _delays(delays, plans)
    shape = (len(plans), *(1,) * (-axis - 1))
    members = [_Member(*v) for v in zip(plans, steps, _rests(rest, plans), strict=True)]
    last = max(m.delay + m.nfe for m in members)
    for k in range(last):
        if not any(m.delay <= k < m.delay + m.nfe for m in members):
            raise ValueError(
                f"delays = {list(steps)}: no member moves at evaluation {k + 1}; need one that does"
            )

    def array(values: Sequence[float]) -> Array:
        return np.array(values, dtype=np.float64).reshape(shape)

    def level(parts: Sequence[Level]) -> Level:
        return Level(
            *(array([getattr(v, name) for v in parts]) for name in ("t", "alpha", "sigma", "lam"))
        )

    levels = [level([m.level for m in members])]
    rows: list[Row] = []
    calls: list[Call | None] = []
    for k in range(last + 1):
        groups = [m.group(k) for m in members]
        size = max(map(len, groups))
        for slot in range(size):
            made = len(levels)
            parts = []
            for m, group in zip(members, groups, strict=True):
                i = slot - (size - len(group))  # shorter groups wait first
                parts.append(m.wait(made) if i < 0 else m.move(group[i], made))
            moving = [row for row in parts if row.order != _WAITS]
            terms: dict[str, dict[int, Array]] = {}
            for kind in ("a", "b", "e"):
                mine: list[Mapping[int, Any]] = [getattr(row, kind) for row in parts]
                terms[kind] = {j: array([v.get(j, 0.0) for v in mine]) for j in set().union(*mine)}
            order, exact = min(row.order for row in moving), all(row.exact for row in moving)
            c = _constants([row.c for row in parts], shape) if any(r.shifts for r in parts) else 0.0
            rows.append(Row(terms["a"], terms["b"], order, exact, terms["e"], c))
            levels.append(level([m.level for m in members]))
        calls += [None] * (len(levels) - 1 - len(calls))
        if k < last:
            asked = [m.ask(k, len(levels) - 1) for m in members]
            numbers: list[Any] = [array([getattr(c, name) for c, _ in asked]) for name in _SCALARS]
            same = all(v == m.level for m, (_, v) in zip(members, asked, strict=True))
            calls.append(Call(*numbers, level=None if same else level([v for _, v in asked])))
        else:
            calls.append(None)
    priors = {plan.prior_std for plan in plans}
    return Plan(
        tuple(levels),
        tuple(rows),
        tuple(calls),
        plans[0].integer_times,
        priors.pop() if len(priors) == 1 else math.nan,
        _about(plans),
        raw=plans[0].raw,
        draws=tuple(_draws(plans, level)),
        axis=axis,
    )


_SCALARS = ("p", "q", "c_in", "c_noise")
_ENDS = ("start", "end")
#: The order of a row that copies its member.
_WAITS = -1


@dataclass
class _Member:
    """Where a member is, while the states of the whole are made one after the other."""

    plan: Plan
    delay: int
    rest: tuple[Call, Level] | None

    def __post_init__(self) -> None:
        self.evaluated = [k for k, call in enumerate(self.plan.calls) if call is not None]
        self.nfe = len(self.evaluated)
        self.now = 0
        self.states = {0: 0}  # of the member -> of the whole: the newest copy
        self.outputs: dict[int, int] = {}

    @property
    def level(self) -> Level:
        return self.plan.levels[self.now]

    def group(self, k: int) -> range:
        """States that it makes between evaluations k - 1 and k of the whole."""
        ends = [-1, *self.evaluated, len(self.plan.levels) - 1]
        if k == 0:  # what needs no evaluation; it waits for its first where that will be
            return range(1, self.evaluated[0] + 1)
        i = k - self.delay
        return range(ends[i] + 1, ends[i + 1] + 1) if 1 <= i <= self.nfe else range(0)

    def wait(self, made: int) -> Row:
        before, self.states[self.now] = self.states[self.now], made
        return Row({before: 1.0}, {}, _WAITS)

    def move(self, state: int, made: int) -> Row:
        row = self.plan.rows[state - 1]
        a = {self.states[j]: c for j, c in row.a.items()}
        b = {self.outputs[j]: c for j, c in row.b.items()}
        self.states[state], self.now = made, state
        return Row(a, b, row.order, row.exact, row.e, row.c)

    def ask(self, k: int, state: int) -> tuple[Call, Level]:
        """Evaluation k of the whole, about its state with this index."""
        i = k - self.delay
        if i >= self.nfe and self.rest is not None:
            return self.rest
        j = self.evaluated[min(max(i, 0), self.nfe - 1)]
        if i == self.evaluated.index(j):
            self.outputs[j] = state
        call = self.plan.calls[j]
        assert call is not None  # as `evaluated` says
        return call, self.plan.asked(j)


def _check(plans: Sequence[Plan], axis: int) -> None:
    if not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise ValueError(f"plans = {list(plans)!r}; need plans, one for each index of the axis")
    if not isinstance(axis, Integral) or isinstance(axis, bool) or axis >= 0:
        raise ValueError(f"axis = {axis!r}; need a negative integer, counted from the end")
    for i, plan in enumerate(plans):
        problem = ""
        if plan.axis is not None:
            problem = "is stacked already"
        elif plan.basis is not None:
            problem = "acts on the modes of a basis"
        elif plan.given != 1 or plan.keep:
            problem = "starts from several states, or hands over several"
        elif plan.nfe == 0:
            problem = "asks the network nothing"
        elif any(np.ndim(c) for row in plan.rows for c in _numbers(row)):
            problem = "has coefficients that are arrays"
        elif any(np.ndim(row.c) >= -axis for row in plan.rows):
            problem = f"adds constants that run along axis {axis}"
        elif plan.raw != plans[0].raw:
            problem = "is fused, or the first is, but not both"
        elif plan.integer_times != plans[0].integer_times:
            problem = "tells the network integers, or the first does, but not both"
        if problem:
            raise ValueError(f"plans: number {i} {problem}; such plans cannot be stacked")


def _numbers(row: Row) -> Iterator[Any]:
    for terms in (row.a, row.b, row.e):
        yield from terms.values()


def _constants(parts: Sequence[Any], shape: tuple[int, ...]) -> Array:
    """Constants side by side: numbers, or arrays that broadcast against what follows the axis."""
    size = np.broadcast_shapes(shape[1:], *(np.shape(c) for c in parts))
    return np.stack([np.broadcast_to(np.asarray(c, dtype=np.float64), size) for c in parts])


def _delays(delays: Sequence[int] | None, plans: Sequence[Plan]) -> tuple[int, ...]:
    steps = (0,) * len(plans) if delays is None else tuple(delays)
    if len(steps) != len(plans) or not all(isinstance(d, Integral) and d >= 0 for d in steps):
        raise ValueError(
            f"delays = {list(steps)}; need {len(plans)} integers >= 0, one for each plan"
        )
    return tuple(map(int, steps))


def _rests(rest: Any, plans: Sequence[Plan]) -> Iterator[tuple[Call, Level] | None]:
    """The question about every member that is done."""
    if np.ndim(rest) and len(rest) != len(plans):
        raise ValueError(f"rest = {rest!r}; need a time, or one for each of {len(plans)} plans")
    for i, plan in enumerate(plans):
        t = rest[i] if np.ndim(rest) else rest
        if t is None:
            yield None
            continue
        if plan.origin is None:
            raise ValueError(
                f"rest = {rest!r} with a plan that was read from a file or changed since it was "
                "compiled; compile it with fewstep.plan"
            )
        with np.errstate(all="ignore"):
            level = plan.origin.process.level(float(t))
            numbers: list[Any] = [float(v) for v in plan.origin.prediction.scalars(level)]
        if not np.isfinite(numbers).all():
            raise ValueError(
                f"rest = {rest!r}: the network cannot be asked at t = {t} ({', '.join(_SCALARS)} = "
                f"{numbers}); give a time at which all of these are finite"
            )
        yield Call(*numbers), level


def _about(plans: Sequence[Plan]) -> dict[str, str]:
    """What is said of the members, each thing once."""
    out = {}
    for key in dict.fromkeys(key for plan in plans for key in plan.about):
        out[key] = ", ".join(dict.fromkeys(plan.about.get(key, "-") for plan in plans))
    return {**out, "stacked": str(len(plans))}


def _draws(plans: Sequence[Plan], level: Any) -> Iterator[Draw]:
    """Draw number m of all members as one."""
    none = Level(*[math.nan] * 4)
    for m in range(max(len(plan.draws) for plan in plans)):
        mine = [plan.draws[m] if m < len(plan.draws) else None for plan in plans]
        real = [draw for draw in mine if draw is not None]
        if all(draw == real[0] for draw in real):
            yield real[0]
        else:
            ends = ([none if v is None else getattr(v, end) for v in mine] for end in _ENDS)
            yield Draw(*map(level, ends), clock=None, tag=real[0].tag)
