r"""Search for a schedule: which choices and times suit one model at one number of evaluations.

Candidates are schedules (`_schedule`); a candidate's score is the mean over noises of the log of
its error, the distance of its samples to converged ones. It is taken on a few training noises
first, on all of them if that makes the candidate look best, and last, for the best and for every
hand-made schedule the search began with, on held-out noises: the winner there is returned, so the
result is never worse there than what it began with. (Choosing among few by held-out noises flatters
the winner a little; report a third set.)

Methods. All begin with the same hand-made schedules.

    random        schedules drawn from the space
    evolutionary  parents from the 30 best; crossover and mutation (as in USF's published code), and
                  single changes
    coordinate    every choice of every step in turn, and every time by golden section, until
                  nothing improves
    staged        evolutionary, but of many offspring only those go to the network that a predictor
                  of the score ranks first; refitted after every round (S^3)

The predictor is ridge regression, its strength chosen by leave-one-out, on the choices, the times,
and on what the rows do with data predictions that were recorded once along converged trajectories:
with x* and D* such a trajectory, a plan's deviation from it follows

    E_k = sum_j a_kj E_j + sum_j b_kj g_j E_j + (sum_j a_kj x*_j + sum_j b_kj D*_j - x*_k),

g = alpha c^2 / (alpha^2 c^2 + sigma^2) in place of the model's Jacobian, for a few c (0: none).
That costs products of numbers with one table of inner products per noise, whatever the size of a
sample, and no evaluation. (The published predictor sees the choices only.)

Candidates at different times share network calls (`Batch`): the states of as many candidates as fit
into the teacher's batch are asked about together.

Source: A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (arXiv
2312.07243). There a candidate's score is the FID of 1000 samples; a distance to converged samples
of the same noises needs 16 to 64. Details of its stages are not published in its code; these are
ours.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike

from .._batch import batch
from .._files import read, write
from .._grids import _distinct_integers
from .._plan import Plan
from .._prediction import unknown
from .._process import Array, Level, Process
from .._sampling import plan
from .._solvers._registry import solvers
from .._weights import FORMS, VARIABLES
from ._schedule import FIRST, WEIGHTS, Choice, Schedule, schedule_of
from ._teacher import Teacher

__all__ = ["History", "Method", "Searched", "Tried", "run_together", "search"]

Method = Literal["staged", "evolutionary", "coordinate", "random"]
_METHODS: tuple[str, ...] = get_args(Method)

#: Grids that hand-made schedules are tried on; all solvers on the first, the best on the others.
_GRIDS = ("softened_8", "softened", "arctan", "lambda", "lambda_zero", "karras", "uniform", "beta")
_BEST = 6
#: Candidates per round; parents; offspring per candidate that the predictor chooses from.
_ROUND, _PARENTS, _OFFSPRING = 16, 30, 8
#: Candidates that are compared on the held-out noises, beside the hand-made ones.
_FINAL = 8
_FORMAT = "fewstep.search.1"


# -- What was tried ------------------------------------------------------------------------------


class Tried(NamedTuple):
    """Errors of a schedule on the training noises number first, first + 1, ...; none where a
    formula of it has no finite value, and it was not run."""

    schedule: Schedule
    first: int
    errors: tuple[float, ...]


@dataclass
class History:
    """What a search has tried, in order: pass it on to go on where it stopped. A search that goes
    on makes the same proposals again and looks their errors up, so that it ends as if it had never
    stopped; budgets count from the beginning.

    curve: after every network round, (candidates, evaluations, seconds, best score on all training
    noises so far).
    """

    tried: list[Tried] = field(default_factory=list)
    curve: list[tuple[int, int, float, float]] = field(default_factory=list)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file (JSON), all or nothing."""
        content = {
            "format": _FORMAT,
            "tried": [[t.schedule.to_dict(), t.first, list(t.errors)] for t in self.tried],
            "curve": [list(point) for point in self.curve],
        }
        write(path, json.dumps(content).encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote."""

        def parse(content: bytes) -> History:
            try:
                found = json.loads(content)
                if found["format"] != _FORMAT:
                    raise ValueError(f"format {found['format']!r}")
                tried = [
                    Tried(Schedule.from_dict(s), int(first), tuple(map(float, errors)))
                    for s, first, errors in found["tried"]
                ]
                curve = [(int(a), int(b), float(c), float(d)) for a, b, c, d in found["curve"]]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"is not the history of a search: {error}") from error
            return History(tried, curve)

        return read(path, parse)


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search found.

    plan, schedule: the winner. errors: its, on the held-out noises, one per sample.
    start, start_errors: the best hand-made schedule on the held-out noises, and its errors.
    history: everything tried. candidates: how many schedules were. evaluations: of the network for
    single samples, those on held-out noises included. seconds: of this run.
    """

    plan: Plan
    schedule: Schedule
    errors: Array
    start: Schedule
    start_errors: Array
    history: History
    candidates: int
    evaluations: int
    seconds: float
    method: str

    def __repr__(self) -> str:
        found, began = (float(np.median(e)) for e in (self.errors, self.start_errors))
        return (
            f"<Searched {self.method}: {self.schedule.nfe} NFE, median held-out error {found:.4g}, "
            f"best hand-made {began:.4g}; {self.candidates} candidates>"
        )


def _score(errors: ArrayLike) -> float:
    """Mean log error; infinite where a sample is, or where there is none."""
    if not np.size(errors):
        return math.inf
    return float(np.log(np.maximum(errors, 1e-300)).mean())


# -- Judging -------------------------------------------------------------------------------------


class _SpentError(Exception):
    """The budget is."""


@dataclass
class _Judge:
    """Scores of schedules: runs those that are not known, many in one network call."""

    train: Teacher
    screen: int
    mean: Array
    most_candidates: float
    most_evaluations: float
    most_seconds: float
    each: Callable[[History], None] | None
    known: dict[tuple[Schedule, int], tuple[float, ...]]
    history: History = field(default_factory=History)
    few: dict[Schedule, float] = field(default_factory=dict)
    full: dict[Schedule, float] = field(default_factory=dict)
    evaluations: int = 0
    begun: float = field(default_factory=time.perf_counter)
    before: float = 0.0
    failed: set[Schedule] = field(default_factory=set)

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begun

    def compiled(self, schedule: Schedule) -> Plan | None:
        """The plan, None if there is none: some formula is not finite there."""
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused by the plan
                return schedule.plan(self.train.model, mean=self.mean)
        except ValueError:
            return None

    def look(self, schedules: Iterable[Schedule]) -> None:
        """Score them on the first few noises; raises `_SpentError` once the budget is."""
        new = [s for s in dict.fromkeys(schedules) if s not in self.few]
        for s, errors in self._run(new, 0, self.screen):
            self.few[s] = _score(errors)
            if self.screen == len(self.train):
                self.full[s] = self.few[s]
        self.point()

    def promote(self, most: int = 4) -> None:
        """Score those on all noises that look better than the best so far."""
        if self.screen == len(self.train):
            return
        best = min(self.full.values(), default=math.inf)
        bias = self.bias()
        new = [s for s in self.few if s not in self.full and self.few[s] + bias < best]
        new = sorted(new, key=self.few.__getitem__)[:most]
        for s, errors in self._run(new, self.screen, len(self.train)):
            share = self.screen / len(self.train)
            self.full[s] = share * self.few[s] + (1 - share) * _score(errors)
        self.point()

    def bias(self) -> float:
        """What the score on all noises is above that on a few, on average."""
        pairs = [v - self.few[s] for s, v in self.full.items() if math.isfinite(v)]
        return float(np.mean(pairs)) if pairs else 0.0

    def value(self, schedule: Schedule) -> float:
        """The score on all noises, as far as it is known."""
        if schedule in self.full:
            return self.full[schedule]
        return self.few.get(schedule, math.inf) + self.bias()

    def ranked(self) -> list[Schedule]:
        """All that were tried, best first."""
        bias = self.bias()
        return sorted(self.few, key=lambda s: self.full.get(s, self.few[s] + bias))

    def point(self) -> None:
        best = min(self.full.values(), default=math.inf)
        point = (len(self.few), self.evaluations, self.seconds(), best)
        self.history.curve.append(point)
        if self.each is not None:
            self.each(self.history)

    def _run(
        self, schedules: list[Schedule], first: int, stop: int
    ) -> Iterable[tuple[Schedule, tuple[float, ...]]]:
        """Errors on the training noises first to stop - 1, chunk by chunk."""
        noises = stop - first
        size = max(1, self.train.batch // noises)
        part = self.train[first:stop]
        for i in range(0, len(schedules), size):
            chunk = schedules[i : i + size]
            cost = noises * chunk[0].nfe
            room = (self.most_evaluations - self.evaluations) / cost
            if first == 0:
                room = min(room, self.most_candidates - len(self.few))
            whole, chunk = len(chunk), chunk[: max(0, int(min(room, size)))]
            if not chunk or self.seconds() > self.most_seconds:
                raise _SpentError
            missing = [s for s in chunk if (s, first) not in self.known]
            plans = [self.compiled(s) for s in missing]
            good = [p for p in plans if p is not None]
            answers = iter(run_together(part, good))
            for s, p in zip(missing, plans, strict=True):
                self.known[s, first] = () if p is None else tuple(next(answers).tolist())
            for s in chunk:
                errors = self.known[s, first]
                if len(errors) not in (0, noises):
                    raise ValueError(
                        f"history has {len(errors)} errors of a schedule where this search has "
                        f"{noises} noises; go on with the same teacher and the same screen"
                    )
                self.evaluations += cost if errors else 0
                self.history.tried.append(Tried(s, first, errors))
                yield s, errors
            if len(chunk) < whole:
                raise _SpentError


def run_together(teacher: Teacher, plans: Sequence[Plan]) -> list[Array]:
    """`teacher.errors` of deterministic plans that may ask at different levels, all in the same
    network calls."""
    if not plans:
        return []
    parts: list[list[torch.Tensor]] = [[] for _ in plans]
    size = max(1, teacher.batch // len(plans))
    for i in range(0, len(teacher), size):
        part = teacher[i : i + size]
        states = batch([p.start(part.x) for p in plans])
        while not states.done:
            states = states.step(teacher.model, [part.cond] * len(plans))
        for found, state in zip(parts, states.states, strict=True):
            found.append(state.x)
    return [teacher.distances(torch.cat(found)) for found in parts]


# -- The space -----------------------------------------------------------------------------------


def _clock(lam: Any) -> Array:
    """A clock that is finite at both ends: that of `softened`, 1 at alpha = 0."""
    with np.errstate(over="ignore"):
        return np.asarray((1 / (1 + 4 * np.exp(lam))) ** 0.4)


def _lam(u: Array) -> Array:
    """Inverse of `_clock`, for u in (0, 1)."""
    p = u**2.5
    return np.log1p(-p) - np.log(p) - math.log(4)


@dataclass(frozen=True)
class _Space:
    """Schedules of nfe evaluations: random ones, and those near others."""

    process: Process
    rounds: bool
    nfe: int
    firsts: tuple[str, ...]

    @property
    def last(self) -> float:
        return self.process.t_end if self.process.t_clean is None else self.process.t_clean

    def limits(self) -> tuple[float, float]:
        """Clock at the start and at the last level that may be evaluated."""
        p = self.process
        return tuple(float(_clock(p.lam(t))) for t in (p.t_start, p.t_end))  # type: ignore

    def clock(self, schedule: Schedule) -> Array:
        """Of the inner times."""
        return _clock(self.process.lam(np.array(schedule.times[1:-1])))

    def apart(self, u: Array) -> Array:
        """The clocks, moved apart and into the range where they are not."""
        high, low = self.limits()
        gap, u = 1e-3 * (high - low), np.array(u)
        for i in range(len(u)):
            u[i] = min(u[i], (u[i - 1] if i else high) - gap)
        floor = low if self.process.t_clean is not None else low + gap
        for i in reversed(range(len(u))):
            u[i] = max(u[i], floor + (len(u) - 1 - i) * gap)
        return u

    def times(self, u: Array) -> Array:
        """Times with these clocks inside."""
        lam = np.minimum(_lam(u), float(self.process.lam(self.process.t_end)))
        inner = np.where(u <= self.limits()[1], self.process.t_end, self.process.time(lam))
        return np.array([self.process.t_start, *inner, self.last])

    def with_clock(self, schedule: Schedule, u: Array) -> Schedule:
        """The schedule with its inner times moved; those that need not move stay exactly."""
        u = self.apart(u)
        times = self.times(u)
        times[1:-1] = np.where(u == self.clock(schedule), schedule.times[1:-1], times[1:-1])
        return replace(schedule, times=self.rounded(times))

    def rounded(self, times: Array) -> tuple[float, ...]:
        """Distinct integers where the network knows no others."""
        return tuple((_distinct_integers(times) if self.rounds else times).tolist())

    def start_up(self, schedule: Schedule) -> Schedule:
        """Orders that there are nodes for, and no corrector at the end: one schedule, one name."""
        last = len(schedule.choices) - 1
        choices = [
            _legal(c, order=min(c.order, i + 1), corrector=c.corrector and i < last)
            for i, c in enumerate(schedule.choices)
        ]
        return replace(schedule, choices=tuple(choices))

    def random(self, rng: np.random.Generator) -> Schedule:
        """Gaps near those of the default grid, one method for all steps, and exceptions."""
        first = self._first(rng)
        n = self.nfe + (first != "network")
        gaps = np.exp(0.4 * rng.standard_normal(n))
        high, low = self.limits()
        u = high + (low * (self.process.t_clean is None) - high) * np.cumsum(gaps) / gaps.sum()
        base = Choice()
        for name in _FIELDS:
            base = _redrawn(rng, base, name, 1.0)
        choices = [base] * n
        for i in range(n):
            for name in _FIELDS:
                if rng.random() < 0.1:
                    choices[i] = _redrawn(rng, choices[i], name, 1.0)
        times = self.rounded(self.times(self.apart(u[:-1])))
        return self.start_up(Schedule(times, tuple(choices), first))

    def _first(self, rng: np.random.Generator) -> str:
        return str(rng.choice(self.firsts))

    def nudge(self, rng: np.random.Generator, schedule: Schedule) -> Schedule:
        """Another schedule with one time moved, or one choice changed in one field."""
        n = len(schedule.choices)
        if n > 1 and rng.random() < 0.4:
            u, i = self.clock(schedule), int(rng.integers(n - 1))
            u[i] += 0.3 * (self.limits()[0] / n) * rng.standard_normal()
            return self.with_clock(schedule, u)
        i, name = int(rng.integers(n)), str(rng.choice(list(_FIELDS)))
        choices = list(schedule.choices)
        choices[i] = _redrawn(rng, choices[i], name, 1.0)
        return self.start_up(replace(schedule, choices=tuple(choices)))

    def mutate(self, rng: np.random.Generator, schedule: Schedule, strength: float) -> Schedule:
        """Another schedule near this one: USF's table, its rates times `strength`."""
        s = schedule
        if len(self.firsts) > 1 and rng.random() < 0.3 * strength:
            s = self._with_first(rng, s, self._first(rng))
        u, n = self.clock(s), len(s.choices)
        moves = rng.random(n - 1) < max(0.5 * strength, 1.5 / n)
        width = strength * 0.5 * (self.limits()[0] / n)
        if moves.any():
            s = self.with_clock(s, np.where(moves, u + width * rng.standard_normal(n - 1), u))
        choices = list(s.choices)
        for name, rate in _FIELDS.items():
            changed = rng.random(n) < rate * strength
            if changed.any() and rng.random() < 0.2:
                changed[:] = True
            made = None
            for i in np.flatnonzero(changed):
                new = _redrawn(rng, choices[i], name, strength)
                if changed.all() and name != "relax":
                    made = getattr(new, name) if made is None else made
                    new = _legal(choices[i], **{name: made})
                choices[i] = new
        return self.start_up(replace(s, choices=tuple(choices)))

    def _with_first(self, rng: np.random.Generator, s: Schedule, first: str) -> Schedule:
        """One node more or less where that keeps the number of evaluations."""
        more = (first != "network") - (s.first != "network")
        if not more:
            return replace(s, first=first)
        choices, high = list(s.choices), self.limits()[0]
        u = [high, *self.clock(s), 0.0]
        if more > 0:
            i = int(np.argmin(np.diff(u)))
            u.insert(i + 1, 0.5 * (u[i] + u[i + 1]))
            choices.insert(i, choices[i])
        else:
            if len(choices) < 2:
                return s
            i = int(rng.integers(1, len(u) - 1))
            del u[i], choices[i]
        times = self.rounded(self.times(self.apart(np.array(u[1:-1]))))
        return Schedule(times, tuple(choices), first)

    def cross(self, rng: np.random.Generator, a: Schedule, b: Schedule) -> Schedule:
        """The beginning of one and the end of the other, or each step's choice from either."""
        if a.first != b.first:
            return self.mutate(rng, a, 0.3)
        n = len(a.choices)
        take = rng.random(n) < 0.5 if rng.random() < 0.5 else np.arange(n) < rng.integers(n + 1)
        choices = tuple(x if t else y for x, y, t in zip(a.choices, b.choices, take, strict=True))
        u = np.where(take[1:], self.clock(a), self.clock(b))
        child = self.with_clock(replace(a, choices=choices), u)
        return self.start_up(child)


#: Fields of a choice and how often one is redrawn in one step.
_FIELDS = {
    "order": 0.3,
    "form": 0.2,
    "variable": 0.2,
    "weights": 0.2,
    "relax": 0.2,
    "corrector": 0.2,
}


def _redrawn(rng: np.random.Generator, choice: Choice, name: str, strength: float) -> Choice:
    """One field drawn anew."""
    if name == "order":
        return _legal(choice, order=int(rng.choice(4, p=(0.2, 0.4, 0.3, 0.1))) + 1)
    if name == "corrector":
        return _legal(choice, corrector=bool(rng.random() < 0.5))
    if name == "relax":
        if choice.order == 1 or rng.random() < 0.1:
            return _legal(choice, relax=())
        factors = [*choice.relax, 1.0, 1.0, 1.0][: choice.order - 1]
        factors[int(rng.integers(len(factors)))] += 0.2 * strength * float(rng.standard_normal())
        return _legal(choice, relax=tuple(factors))
    known = {"form": FORMS, "variable": VARIABLES, "weights": WEIGHTS}[name]
    return _legal(choice, **{name: str(rng.choice(known))})


def _legal(choice: Choice, **change: Any) -> Choice:
    """The choice with one field changed, and others where that asks for it."""
    v = {name: getattr(choice, name) for name in Choice.__dataclass_fields__} | change
    if "weights" in change:
        if v["weights"] == "adams":
            v["form"] = v["form"] if v["form"] in ("noise", "flow") else "flow"
            v["variable"], v["relax"] = "own", ()
        elif v["weights"] != "exact":
            v["variable"] = "lambda"
            v["relax"] = (1.0, *v["relax"][1:]) if v["relax"] else ()
            if v["weights"] == "bh1" and v["form"] not in ("data", "noise"):
                v["form"] = "data"
    elif v["weights"] == "adams":
        if v["form"] not in ("noise", "flow") or v["variable"] != "own" or v["relax"]:
            v["weights"] = "exact"
    elif v["weights"] != "exact" and (
        v["variable"] != "lambda"
        or v["relax"][:1] not in ((), (1.0,))
        or (v["weights"] == "bh1" and v["form"] not in ("data", "noise"))
    ):
        v["weights"] = "exact"
    relax = v["relax"][: v["order"] - 1]
    v["relax"] = relax if any(r != 1 for r in relax) else ()
    return Choice(**v)


# -- Hand-made schedules -------------------------------------------------------------------------


def _hand_made(judge: _Judge, space: _Space) -> list[Schedule]:
    """Every solver of the registry that is a schedule on the first grid, the best of them on the
    other grids, and the best of all with an analytic first step: judged."""
    made: dict[Schedule, tuple[str, str]] = {}
    final = "min" if space.process.t_clean is None else "zero"

    def add(names: Iterable[tuple[str, str, str]]) -> None:
        new = []
        for name, grid, first in names:
            try:
                s = schedule_of(
                    name, judge.train.model, space.nfe, grid=grid, final=final, first=first
                )
            except ValueError:  # not a schedule, or not on this process
                continue
            if s not in made:
                made[s] = name, grid
                new.append(s)
        judge.look(new)
        judge.promote()

    add((name, _GRIDS[0], "network") for name in solvers)
    best = sorted(made, key=judge.value)[:_BEST]
    add((made[s][0], grid, "network") for s in best for grid in _GRIDS[1:])
    best = sorted(made, key=judge.value)[:_BEST]
    add((*made[s], first) for s in best for first in space.firsts if first != "network")
    return list(made)


# -- Methods -------------------------------------------------------------------------------------


def _random(judge: _Judge, space: _Space, rng: np.random.Generator) -> None:
    while True:
        judge.look(space.random(rng) for _ in range(_ROUND))
        judge.promote()


def _child(space: _Space, rng: np.random.Generator, parents: Sequence[Schedule]) -> Schedule:
    """Parents are more likely the better they are; strengths are of every order of magnitude."""
    i, j = (int(len(parents) * rng.random() ** 2) for _ in range(2))
    kind = rng.random()
    if kind < 0.2:
        return space.cross(rng, parents[i], parents[j])
    if kind < 0.6:
        return space.nudge(rng, parents[i])
    return space.mutate(rng, parents[i], float(np.exp(rng.uniform(math.log(0.05), 0.0))))


def _children(judge: _Judge, space: _Space, rng: np.random.Generator, count: int) -> list[Schedule]:
    parents = judge.ranked()[:_PARENTS]
    out: dict[Schedule, None] = {}
    for _ in range(20 * count):
        child = _child(space, rng, parents)
        if child not in judge.few:
            out[child] = None
        if len(out) == count:
            break
    return list(out)


def _evolutionary(judge: _Judge, space: _Space, rng: np.random.Generator) -> None:
    while children := _children(judge, space, rng, _ROUND):
        judge.look(children)
        judge.promote()


def _staged(judge: _Judge, space: _Space, rng: np.random.Generator) -> None:
    predictor = _Predictor(judge)
    while pool := _children(judge, space, rng, _ROUND * _OFFSPRING):
        predictor.fit(judge.few)
        judge.look(predictor.best(pool, _ROUND))
        judge.promote()


def _coordinate(judge: _Judge, space: _Space, rng: np.random.Generator) -> None:
    """Sweeps from the best schedule; once one changes nothing, again from a mutant of it."""
    best = judge.ranked()[0]
    while True:
        before = best
        n = len(best.choices)
        for i in rng.permutation(2 * n - 1):
            best = (
                _choices_of(judge, space, best, i) if i < n else _time_of(judge, space, best, i - n)
            )
            judge.promote(1)
        if best == before:
            best = space.mutate(rng, judge.ranked()[0], 0.3)
            judge.look([best])


def _better(judge: _Judge, best: Schedule, others: Iterable[Schedule]) -> Schedule:
    others = list(others)
    judge.look(others)
    return min([best, *others], key=judge.few.__getitem__)


def _choices_of(judge: _Judge, space: _Space, best: Schedule, i: int) -> Schedule:
    """Every field of the choice of step i, one after the other."""
    values: dict[str, Sequence[Any]] = {
        "order": (1, 2, 3, 4),
        "form": FORMS,
        "variable": VARIABLES,
        "weights": WEIGHTS,
        "corrector": (False, True),
    }
    for name in (*values, "relax"):
        here = best.choices[i]
        if name == "relax":
            factors = [*here.relax, 1.0, 1.0, 1.0][: min(here.order, i + 1) - 1]
            changes = [
                _legal(here, relax=tuple(f + d * (k == m) for m, f in enumerate(factors)))
                for k in range(len(factors))
                for d in (-0.2, -0.05, 0.05, 0.2)
            ]
        else:
            changes = [_legal(here, **{name: v}) for v in values[name]]
        made = [
            space.start_up(replace(best, choices=(*best.choices[:i], c, *best.choices[i + 1 :])))
            for c in changes
        ]
        best = _better(judge, best, [s for s in dict.fromkeys(made) if s != best])
    return best


def _time_of(judge: _Judge, space: _Space, best: Schedule, i: int) -> Schedule:
    """Golden section for inner time number i, in half of the gaps around it."""
    u = space.clock(best)
    high, low = space.limits()
    around = [high, *u, low]
    a, b = 0.5 * (u[i] + around[i + 2]), 0.5 * (u[i] + around[i])

    def at(point: float) -> Schedule:
        moved = u.copy()
        moved[i] = point
        return space.with_clock(best, moved)

    share, tried = 0.5 * (math.sqrt(5) - 1), [best]
    points = [b - share * (b - a), a + share * (b - a)]
    made = [at(p) for p in points]
    judge.look(made)
    for _ in range(4):
        tried += made
        if judge.few[made[0]] < judge.few[made[1]]:
            b, points[1], made[1] = points[1], points[0], made[0]
            points[0] = b - share * (b - a)
            made[0] = at(points[0])
        else:
            a, points[0], made[0] = points[0], points[1], made[1]
            points[1] = a + share * (b - a)
            made[1] = at(points[1])
        judge.look(made)
    return min([*tried, *made], key=judge.few.__getitem__)


# -- The predictor -------------------------------------------------------------------------------


class _Predictor:
    """Ridge regression of scores."""

    def __init__(self, judge: _Judge) -> None:
        self.path = _Path(judge.train[: min(8, judge.screen)], judge.mean)
        judge.evaluations += self.path.evaluations
        self.known: dict[Schedule, Array] = {}

    def features(self, schedule: Schedule) -> Array:
        if schedule not in self.known:
            self.known[schedule] = np.concatenate(
                [self.path.features(schedule), _described(self.path.teacher, schedule)]
            )
        return self.known[schedule]

    def fit(self, scores: dict[Schedule, float]) -> None:
        known = [
            s for s, v in scores.items() if math.isfinite(v) and np.isfinite(self.features(s)).all()
        ]
        y = np.array([scores[s] for s in known])
        # What is far from the best is to be told from it, and no more.
        y = np.minimum(y, y.min() + 3.0)
        weight = np.exp(-0.5 * (y - y.min()))
        X = np.array([self.features(s) for s in known])
        self.centre, self.scale = X.mean(0), X.std(0) + 1e-9
        Z = np.concatenate([np.ones((len(X), 1)), (X - self.centre) / self.scale], 1)
        root = np.sqrt(weight)[:, None]
        U, d, Vt = np.linalg.svd(Z * root, full_matrices=False)
        target = y * root[:, 0]
        best, self.beta = math.inf, np.zeros(Z.shape[1])
        for strength in np.geomspace(1e-2, 1e3, 11):
            shrink = d**2 / (d**2 + strength)
            fitted = U @ (shrink * (U.T @ target))
            leverage = np.minimum((U**2 * shrink).sum(1), 0.99)
            loss = float((((target - fitted) / (1 - leverage)) ** 2).mean())
            if loss < best:
                best, self.beta = loss, Vt.T @ (shrink / d.clip(1e-12) * (U.T @ target))

    def __call__(self, schedules: Sequence[Schedule]) -> Array:
        """Predicted scores; infinite where a formula is not finite."""
        X = np.array([self.features(s) for s in schedules])
        Z = np.clip((X - self.centre) / self.scale, -5, 5)
        score = self.beta[0] + Z @ self.beta[1:]
        return np.where(np.isfinite(score), score, math.inf)

    def best(self, schedules: Sequence[Schedule], count: int) -> list[Schedule]:
        """Those of the lowest predicted scores."""
        order = np.argsort(self(schedules), kind="stable")
        return [schedules[i] for i in order[:count]]


def _described(teacher: Teacher, schedule: Schedule) -> Array:
    """Choices and times as numbers, of as many steps as any schedule of these evaluations has."""
    n = schedule.nfe + 1
    u = _clock(teacher.model.process.lam(np.array(schedule.times[1:-1])))
    gaps = np.log(np.maximum(-np.diff([*u, 0.0]), 1e-4))
    out = [np.pad(u[::-1], (0, n - 1 - len(u))), np.pad(gaps[::-1], (0, n - 1 - len(gaps)))]
    steps = np.zeros((n, 15))
    # Counted from the end, where steps of schedules of different lengths correspond.
    for row, c in zip(steps, reversed(schedule.choices), strict=False):
        row[:] = [
            *(c.order == p for p in (2, 3, 4)),
            *(c.form == f for f in FORMS[1:]),
            *(c.variable == v for v in VARIABLES[1:]),
            *(c.weights == w for w in WEIGHTS[1:]),
            c.corrector,
            *([*c.relax, 1.0, 1.0][:2]),
        ]
    return np.concatenate([*out, steps.ravel(), [schedule.first == f for f in FIRST[1:]]])


class _Path:
    """Converged trajectories as inner products of their states and data predictions."""

    def __init__(self, teacher: Teacher, mean: Array, nfe: int = 48) -> None:
        self.teacher = teacher
        model = teacher.model
        run = plan("unipc_3", model, nfe, grid="lambda")
        self.levels = [run.asked(j) for j, call in enumerate(run.calls) if call is not None]
        self.u = np.array([float(_clock(v.lam)) for v in self.levels])
        self.scale = np.array([v.alpha + v.sigma for v in self.levels])
        self.evaluations = nfe * len(teacher)
        self.spread = float(teacher.samples.double().square().mean().sqrt())
        states: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        with torch.no_grad():
            state = run.start(teacher.x)
            while not state.done:
                level = run.asked(state.index)
                answer = model.output(*state.query(), level, teacher.cond)
                states.append(state.x / (level.alpha + level.sigma))
                outputs.append(state.data(answer))
                state = state.advance(answer)
        middle = torch.as_tensor(mean, dtype=teacher.x.dtype).to(teacher.x.device)
        middle = middle.expand(teacher.x.shape)
        columns = [*states, *outputs, teacher.samples, middle]
        self.count = len(columns)
        gram = []
        for k in range(len(teacher)):
            v = torch.stack([c[k].flatten().double() for c in columns])
            gram.append((v @ v.T / v.shape[1]).cpu().numpy())
        self.gram = np.array(gram)

    def _at(self, level: Level) -> Array:
        """Weights of the recorded levels for a level between them: a cubic through four."""
        u = float(_clock(level.lam))
        i = min(max(int(np.searchsorted(-self.u, -u)) - 2, 0), len(self.u) - 4)
        near = self.u[i : i + 4].tolist()
        out = np.zeros(len(self.u))
        for j, x in enumerate(near):
            out[i + j] = math.prod((u - y) / (x - y) for y in near if y != x)
        return out

    def features(self, schedule: Schedule) -> Array:
        """Logs of the deviation from the trajectories, at the end and on the way."""
        process, m = self.teacher.model.process, len(self.levels)
        with np.errstate(all="ignore"):
            draft = schedule.solver().draft(process, np.array(schedule.times))
        first = schedule.first
        weights = {
            k: self._at(v)
            for k, (v, asked) in enumerate(zip(draft.levels, draft.evaluated, strict=True))
            if asked
        }
        ends: list[Array] = []
        for c in (0.0, 0.3 * self.spread, self.spread):
            E = np.zeros((len(draft.levels), self.count))
            E[0, 0] = self.scale[0]
            D: dict[int, Array] = {}
            for k, level in enumerate(draft.levels):
                if k:
                    row = draft.rows[k - 1]
                    E[k] = sum(a * E[j] for j, a in row.a.items())
                    E[k] += sum(b * D[j] for j, b in row.b.items())
                if k in weights:
                    D[k] = np.zeros(self.count)
                    if k == 0 and first != "network":
                        D[k][-1] = float(first == "mean")
                        continue
                    g = level.alpha * c**2 / ((level.alpha * c) ** 2 + level.sigma**2)
                    D[k] += g * E[k]
                    D[k][:m] -= g * (level.alpha + level.sigma) * weights[k]
                    D[k][m : 2 * m] += weights[k]
            ends.append(E[-1])
            ends[-1][-2] -= draft.levels[-1].alpha
            if not c:
                for k, w in list(weights.items())[-(schedule.nfe - 1) :] * (schedule.nfe > 1):
                    ends.append(E[k] / (draft.levels[k].alpha + draft.levels[k].sigma))
                    ends[-1][:m] -= w
        V = np.array(ends)
        if not np.isfinite(V).all():
            return np.full(len(V) + 1, math.nan)
        squares = np.maximum(((V @ self.gram) * V).sum(2), 1e-12)  # of every noise and deviation
        logs = 0.5 * np.log(squares).mean(0)
        return np.append(logs, logs[1:-2].max(initial=-14.0))


# -- Search --------------------------------------------------------------------------------------


def search(
    train: Teacher,
    held: Teacher,
    nfe: int,
    *,
    method: Method = "staged",
    candidates: int | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    starts: Sequence[Schedule] | None = None,
    first: Sequence[str] = FIRST,
    mean: ArrayLike | None = None,
    screen: int = 16,
    history: History | None = None,
    each: Callable[[History], None] | None = None,
) -> Searched:
    """A schedule of `nfe` evaluations for the model of `train`, never worse on the noises of `held`
    than the hand-made schedules it began with. Methods, scores and source: top of this module.

    candidates, evaluations, seconds: budget, whichever is spent first; candidates counts schedules
        (hand-made ones too), evaluations those of the network for single training samples. A
        search without `seconds` is the same whenever and wherever it is run, as far as the
        network's answers are.
    starts: schedules to begin with; None: those solvers of the registry that are schedules, on the
        library's grids (about 80).
    first: what the first data prediction may be (see `Schedule`). mean: of the data; None: that of
        the training samples.
    screen: training noises that all candidates are judged on.
    history: of an earlier search with the same arguments, to go on with; budgets may be larger.
    each: told the history after every round, to save it or to stop by an exception.
    """
    if method not in _METHODS:
        raise ValueError(unknown("method", str(method), _METHODS))
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
    for name, value in (
        ("candidates", candidates),
        ("evaluations", evaluations),
        ("seconds", seconds),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value!r}; need a positive number")
    if candidates is None and evaluations is None and seconds is None:
        raise ValueError("candidates, evaluations and seconds are missing; give at least one")
    if screen < 1:
        raise ValueError(f"screen = {screen}; need at least one noise")
    for name in first:
        if name not in FIRST:
            raise ValueError(unknown("first", str(name), FIRST))
    if "network" not in first:
        raise ValueError(f"first = {tuple(first)}; 'network' must be among them")
    for s in starts or ():
        if s.nfe != nfe:
            raise ValueError(f"starts has a schedule of {s.nfe} evaluations for nfe = {nfe}")
    model = train.model
    middle = train.samples.double().mean(0).cpu().numpy() if mean is None else np.asarray(mean)
    judge = _Judge(
        train,
        min(screen, len(train)),
        middle,
        math.inf if candidates is None else candidates,
        math.inf if evaluations is None else evaluations,
        math.inf if seconds is None else seconds,
        each,
        {(t.schedule, t.first): t.errors for t in (history or History()).tried},
    )
    if history is not None and history.curve:
        judge.before = history.curve[-1][2]
    space = _Space(model.process, model.rounds, nfe, tuple(dict.fromkeys(first)))
    rng = np.random.default_rng(seed)
    hand: list[Schedule] = []
    try:
        if starts is None:
            hand += _hand_made(judge, space)
        else:
            hand += dict.fromkeys(starts)
            judge.look(hand)
            judge.promote()
        if judge.few:
            _SEARCHES[method](judge, space, rng)
    except _SpentError:
        judge.point()
    ranked = judge.ranked()
    if not ranked:
        raise ValueError(
            f"candidates = {candidates}, evaluations = {evaluations}, seconds = {seconds}: not "
            "enough to judge one schedule, or no hand-made one exists; give more, or starts"
        )
    hand = [s for s in (hand or ranked) if s in judge.few]
    last = list(dict.fromkeys([*ranked[:_FINAL], *hand]))
    plans = {s: p for s in last if (p := judge.compiled(s)) is not None}
    size = max(1, held.batch // len(held))
    names, errors = list(plans), []
    for i in range(0, len(names), size):
        errors += run_together(held, [plans[s] for s in names[i : i + size]])
    final = dict(zip(names, errors, strict=True))
    winner = min(names, key=lambda s: _score(final[s]))
    start = min((s for s in hand if s in final), key=lambda s: _score(final[s]))
    return Searched(
        plans[winner],
        winner,
        final[winner],
        start,
        final[start],
        judge.history,
        len(judge.few),
        judge.evaluations + len(held) * nfe * len(names),
        time.perf_counter() - judge.begun,
        method,
    )


_SEARCHES: dict[str, Callable[[_Judge, _Space, np.random.Generator], None]] = {
    "random": _random,
    "evolutionary": _evolutionary,
    "coordinate": _coordinate,
    "staged": _staged,
}
