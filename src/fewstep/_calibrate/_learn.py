r"""Learned plans: the numbers of a program fitted to converged samples of the model in hand.

A program (`_program`) has N(N + 5) / 2 numbers, all of them free: when the network is asked, what
it is told, and how its answers are combined. From several hand-made plans, damped Gauss-Newton
(Levenberg-Marquardt) steps lower

    F = mean_n f(s_n),   s_n = mean over elements of (z_N - x*)^2 + delta^2,   x* converged,
    f = log s ("log"), s^(1/4) ("root"), s^(1/2) ("l1"), s ("l2"),

by H = sum w_n J_n^T J_n, g = sum w_n J_n^T r_n, w = f'(s): step = -(H + mu diag H)^-1 g. log s is
the loss of Bespoke Non-Stationary Solvers (arXiv 2403.01329): the few noises whose sample changes
its mode under any small error would own a sum of squares. They still pull as hard as any other;
F = log m, mean_n s_n^2 / (s_n^2 + m^2) = 1/2 ("median": a smooth one, as S-estimators have it;
w ~ s / (s^2 + m^2)^2) lets go of them, and of the samples that are right already. The best fits go
on with it, and the best of all takes some steps with "root" and "l1", which give up a little of the
median for the root mean square. Reverse-mode matrices are random estimates, averaged over the last
iterations.

What is returned is the best, on noises that were not fitted, of all iterates and all hand-made
plans: it is no worse there than the best hand-made one in median, and in root mean square. Best is
the least product of the two, or the least median.

Restrictions of the same program, for less to learn or to compare: "coefficients" on a fixed grid
(S4S, arXiv 2502.17423), "labels", what the network is told, with all else fixed; "times" of a
hand-made solver, whose coefficients follow, and "times and labels" (LD3, arXiv 2405.15506).
"""

from __future__ import annotations

import itertools
import math
import time as clock
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._denoiser import Model
from .._plan import Plan
from .._prediction import unknown
from .._process import Array
from .._sampling import plan
from ._jacobian import Machine, Walk
from ._program import Program, Space, answered, banded, longer, plan_of, principal, program_of
from ._teacher import Counted, Teacher

__all__ = ["CHOICES", "LOSSES", "WHAT", "Fit", "Learned", "Progress", "data_mean", "learn", "score"]

LOSSES = ("log", "median", "root", "l1", "l2")
CHOICES = ("both", "median")
WHAT = ("all", "coefficients", "labels", "times", "times and labels")

#: Damping: at the start, factors after success and failure, floor, tries per iteration.
_DAMPING, _EASED, _RAISED, _LEAST, _TRIES = 1e-2, 0.2, 4.0, 1e-9, 12
#: Of the diagonal of H, the floor relative to its largest entry.
_FLOOR = 1e-10
#: Largest moves: of lambda; of a coefficient c, (this) (1 + |c|).
_MOVE_TIME, _MOVE = 0.7, 0.5
#: A fit is done after so many decreases in a row that are smaller than this, relative to f's scale.
_SMALL, _PATIENCE = 1e-3, 4
#: Share of the last estimate in the average of H.
_MEMORY = 0.5
#: Iterations after which the worse half of the fits is given up; noises of the first round.
_ROUNDS, _PILOT, _FINALISTS = (5, 12), 96, 2
#: Fits from near the best with what a budget leaves: at most so many, so many in a row to no use,
#: how near (by so much F is larger there), and the least curvature that this is reckoned with,
#: relative to the diagonal's.
_SHAKES, _USELESS, _SHAKE, _SOFTEST = 20, 4, 1.0, 1e-4
#: Iterations of the last fit, with another loss, and the share of the budget kept for it.
_POLISH, _RESERVE = 12, 0.8


def score(errors: Array, choice: str = "both") -> float:
    """What plans are chosen by: log of the median, plus that of the root mean square for "both"."""
    errors = np.asarray(errors)
    if not np.isfinite(errors).all():
        return math.inf
    tiny = np.finfo(np.float64).tiny
    median = math.log(np.median(errors) + tiny)
    return median if choice == "median" else median + 0.5 * math.log(np.mean(errors**2) + tiny)


def _value(s: Array, kind: str) -> tuple[float, Array]:
    """F, and its derivative by s_n, times the number of them: w."""
    if kind == "log":
        return float(np.log(s).mean()), 1 / s
    if kind == "median":
        m = _scale(s)
        pull = 1 / (1 + (s / m) ** 2) ** 2
        return math.log(m), s * pull / np.mean(s**2 * pull)
    if kind == "root":
        return float((s**0.25).mean()), 0.25 * s**-0.75
    if kind == "l1":
        return float(np.sqrt(s).mean()), 0.5 / np.sqrt(s)
    return float(s.mean()), np.ones_like(s)


def _scale(s: Array) -> float:
    """m with mean s^2 / (s^2 + m^2) = 1/2: between the least and the largest of s > 0."""
    logs = np.log(s)
    low, high = float(logs.min()), float(logs.max())
    for _ in range(60):
        m = 0.5 * (low + high)
        low, high = (m, high) if np.mean(1 / (1 + np.exp(2 * (m - logs)))) > 0.5 else (low, m)
    return math.exp(0.5 * (low + high))


def _rms(errors: Array) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def data_mean(teacher: Teacher) -> Array:
    """The mean of the data as the model sees it: of its predictions from pure noise."""
    process, total = teacher.model.process, 0.0
    machine, level = Machine(teacher.model), process.level(process.t_start)
    for part in teacher.chunks():
        sub = teacher[part]
        total = total + machine.data(sub.x, level, sub.cond).double().sum(0)
    mean = (total / len(teacher)).cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]
    if not np.isfinite(mean).all():
        raise ValueError(
            "first_step = True needs the mean of the data, but the data predictions at the start "
            "of the process are not finite; use first_step=False"
        )
    return mean


@dataclass(eq=False)
class Fit:
    """One fit: where it started, where it is, and the best program it met on held-out noises.

    what: which numbers are free. at: their values. base: the program that the others are from.
    kind: "start", "longer" (a shorter plan with evaluations put in), or, from the best program of
        another fit, "refined", "shaken", "polished".
    """

    name: str
    base: Program
    what: str
    loss: str
    at: Array
    damping: float = _DAMPING
    matrix: Array | None = None
    iterations: int = 0
    quiet: int = 0
    done: bool = False
    best: Program | None = None
    best_score: float = math.inf
    origin: Any = None
    first_step: bool = False
    kind: str = "start"
    history: list[tuple[float, float]] = field(default_factory=list)


@dataclass(eq=False)
class Progress:
    """Where learning stands: hand it to `learn(resume=...)`, with the other arguments as before,
    to go on. Plain numbers and arrays: it can be pickled."""

    fits: list[Fit] = field(default_factory=list)
    stage: int = 0
    evaluations: int = 0
    gradients: int = 0
    seconds: float = 0.0
    mean: Array | None = None
    start_errors: dict[str, Array] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """Of all fits."""
        return sum(fit.iterations for fit in self.fits)

    @property
    def best(self) -> float:
        """The best held-out score of all fits so far: log median, + log root mean square."""
        return min((fit.best_score for fit in self.fits), default=math.inf)


@dataclass(frozen=True, eq=False)
class Learned:
    """plan: the best on held-out noises. name: the start it came from, and by what. errors: its
    errors on the held-out noises. start_errors: of every hand-made plan. program: None where a
    hand-made plan won. evaluations: of the network, on single samples. gradients: backward or
    Jacobian-vector products. iterations, seconds: of everything. progress: to go on from."""

    plan: Plan
    name: str
    errors: Array
    start_errors: dict[str, Array]
    program: Program | None
    evaluations: int
    gradients: int
    iterations: int
    seconds: float
    progress: Progress

    def __repr__(self) -> str:
        best = min(self.start_errors.values(), key=score)
        return (
            f"<Learned {self.plan.nfe} NFE from {self.name}: held-out median "
            f"{np.median(self.errors):.4g} (best hand-made {np.median(best):.4g}), root mean "
            f"square {_rms(self.errors):.4g} ({_rms(best):.4g}); {self.iterations} iterations, "
            f"{self.evaluations} evaluations, {self.seconds:.0f} s>"
        )


def learn(
    train: Teacher,
    held: Teacher,
    starts: Sequence[Plan],
    *,
    nfe: int | None = None,
    guards: Sequence[Plan] = (),
    jacobian: str = "reverse",
    what: str = "all",
    first_step: bool = True,
    loss: str = "log",
    choice: str = "both",
    iterations: int = 80,
    budget: float | None = None,
    evaluations: int | None = None,
    cap: float = 1.5,
    probes: int = 2,
    step: float | None = None,
    bands: int = 1,
    seed: int = 0,
    each: Callable[[Progress], None] | None = None,
    resume: Progress | None = None,
) -> Learned:
    """Fit a plan to the model's own converged samples.

    train, held: converged samples to fit, and to choose on: different noises.
    starts: hand-made plans of N evaluations; those of N + 1 begin with a free first step, their
        first evaluation answered by the mean of the data. Plans of fewer, such as a learned one,
        are given the others, in every place in turn.
    nfe: N; None: the fewest that starts and guards have.
    guards: hand-made plans of N evaluations that are not fitted, but must not be better either;
        with `bands`, only they.
    jacobian: "reverse" (autograd, one network graph at a time), "forward" (exact, Jacobian-vector
        products), "differences" (network calls only).
    what: "all", or a restriction; see the top of this module. "times" need starts as compiled by
        `fewstep.plan`.
    first_step: starts of N evaluations are also tried with one more, answered by the mean.
    loss: "log", "root", "l1" or "l2"; the best is fitted a little more with "root" ("log" after
        others).
    choice: what is best on held-out noises: "both", the least product of median and root mean
        square, or "median".
    iterations: at most so many per fit. budget: seconds; evaluations: of the network, on single
        samples; both for all fits together, and looked at between iterations.
    cap: largest sum_j |b_Nj|, which is what rounding of the network's answers is multiplied by, in
        units of the largest of the starts.
    probes: random products per iteration, for "reverse". step: relative size of perturbations, for
        "differences"; None: by the dtype that the network answers in.
    bands: coefficients differ between so many bands of principal directions of the samples. The
        plan is then for samples of this shape. Start it from learned plans, with more noises than
        those took: five bands have five times as many numbers.
    each: called after every iteration. resume: progress of an earlier call, to go on from.
    """
    given = (("loss", loss, LOSSES), ("choice", choice, CHOICES), ("what", what, WHAT))
    for name, value, known in given:
        if value not in known:
            raise ValueError(unknown(name, value, known))
    if not starts:
        raise ValueError("starts is empty; give at least one plan")
    if bands < 1 or (bands > 1 and what.startswith("times")):
        raise ValueError(f"bands = {bands} with what = {what!r}; need 1, or more with free rows")
    if len(held) < 2:
        raise ValueError(f"held has {len(held)} samples; need at least 2")
    return _Learner(
        train, held, list(starts), nfe, list(guards), jacobian, what, first_step, loss, choice,
        iterations, budget, evaluations, cap, probes, step, bands, seed, each, resume,
    ).result()  # fmt: skip


class _Learner:
    """One call of `learn`."""

    def __init__(
        self,
        train: Teacher,
        held: Teacher,
        starts: list[Plan],
        nfe: int | None,
        guards: list[Plan],
        jacobian: str,
        what: str,
        first_step: bool,
        loss: str,
        choice: str,
        iterations: int,
        budget: float | None,
        evaluations: int | None,
        cap: float,
        probes: int,
        step: float | None,
        bands: int,
        seed: int,
        each: Callable[[Progress], None] | None,
        resume: Progress | None,
    ) -> None:
        self.counted = Counted(train.model)
        self.train = replace(train, model=self.counted)
        self.held = replace(held, model=self.counted)
        self.machine = Machine(self.counted, jacobian, probes, step)
        self.model: Model = train.model
        self.process = self.model.process
        self.what, self.loss, self.choice, self.most = what, loss, choice, iterations
        self.seed, self.each = seed, each
        self.budget, self.allowed = budget, evaluations
        self.begun = clock.perf_counter()
        self.progress = resume or Progress()
        self.before = (self.progress.evaluations, self.progress.seconds)
        self.n = min(run.nfe for run in (*starts, *guards)) if nfe is None else nfe
        few = min(run.nfe for run in starts) < self.n and what != "all"
        if few or max(run.nfe for run in starts) > self.n + 1:
            raise ValueError(
                f"starts have {sorted({run.nfe for run in starts})} evaluations; need N = "
                f"{self.n}, N + 1 for those that begin with a free first step, or, with what = "
                "'all', fewer"
            )
        self.bands = principal(train.samples, bands) if bands > 1 else None
        self.space = Space(self.process, self.n, self.model.rounds, self.bands)
        scale = float(train.samples.double().square().mean().sqrt())
        error = train.error if math.isfinite(train.error) else 0.0
        self.delta = (1e-4 * scale) ** 2 + error**2
        own = [run for run in starts if run.nfe == self.n]
        self.hand = [*own, *guards]
        if not self.hand or any(run.nfe != self.n for run in guards):
            raise ValueError(
                f"guards have {sorted({run.nfe for run in guards})} evaluations; need {self.n}, "
                "and at least one plan of so many among starts and guards, to be no worse than"
            )
        self.cap = cap * max(program_of(run).gain for run in self.hand if _is_program(run))
        if not self.progress.fits:
            self._begin(own, [run for run in starts if run.nfe != self.n], first_step)
        self.names = list(self.progress.start_errors)
        errors = self.progress.start_errors
        ranked = sorted(range(len(self.hand)), key=lambda i: self._score(errors[self.names[i]]))
        self.best_hand = ranked[0]
        # A learned start is no guard: by bands its median falls where its mean square may not.
        first = len(own) if self.bands is not None and guards else 0
        self.reference = errors[self.names[next(i for i in ranked if i >= first)]]

    def _begin(self, own: list[Plan], others: list[Plan], first_step: bool) -> None:
        """Errors of the hand-made plans, and the fits that start from them."""
        more = [run for run in others if run.nfe > self.n]
        if first_step and not more:
            more = [run for run in map(self._more, own) if run is not None]
        seen: dict[str, Array] = {}
        for run in self.hand:
            name = base = _named(run)
            while name in seen:
                name = f"{base} ({sum(key.startswith(base) for key in seen) + 1})"
            seen[name] = self.held.errors(run)
        self.progress.start_errors = seen
        for name, run in zip(seen, own, strict=False):  # which come first
            if _is_program(run):
                self._add(name, (q := program_of(run)), run, q.first_step)
        if more:
            self.progress.mean = data_mean(self.train)
            for run in more:
                if _is_program(run):
                    program = answered(program_of(run), self.progress.mean)
                    self._add(f"{_named(run)}, free first step", program, run, True)
        for run in others:
            if run.nfe < self.n and _is_program(run):
                program = program_of(run)
                put = longer(program, self.process, self.n, self.model.rounds)
                for k, made in enumerate(put):
                    name = f"plan for {run.nfe}, {self.n - run.nfe} more at {k}"
                    self._add(name, made, run, program.first_step, "longer")
        if not self.progress.fits:
            raise ValueError("starts: none of them is a program; give plans with scalar rows")

    def _more(self, run: Plan) -> Plan | None:
        """The same solver and grid with one evaluation more."""
        origin, grid = run.origin, run.about.get("grid", "list")
        if origin is None or grid == "list" or not _is_program(run):
            return None
        final = "min" if origin.times[-1] == self.process.t_end else "zero"
        try:
            return plan(origin.solver, self.model, self.n + 1, grid=grid, final=final)
        except ValueError:
            return None

    def _add(
        self, name: str, program: Program, run: Plan, first_step: bool, kind: str = "start"
    ) -> None:
        if self.process.t_clean is not None:
            # Whatever its last level was, it is fitted to samples at sigma = 0.
            program = replace(program, end=float(self.process.t_clean))
        if self.bands is not None:
            program = banded(program, self.bands)
        fit = Fit(name, program, self.what, self.loss, np.empty(0))
        fit.first_step, fit.kind = first_step, kind
        if self.what.startswith("times"):
            if run.origin is None:
                return
            fit.origin = run.origin
        fit.at = self._first(fit)
        self.progress.fits.append(fit)

    # the numbers that are free

    def _free(self, fit: Fit) -> NDArray[np.intp]:
        """Indices in `Space` of the numbers that a fit moves, directly or not."""
        space, n = self.space, self.n
        lam = space.vector(fit.base)[:n]
        times = [space.place("t", k) for k in range(n) if np.isfinite(lam[k])]
        if fit.what == "labels":
            return np.array(times)
        coefficients = [("a", k, 0) for k in range(0 if fit.first_step else 1, n + 1)]
        coefficients += [("c", k, 0) for k in range(n + 1)] if fit.first_step else []
        coefficients += [("b", k, j) for k in range(1, n + 1) for j in range(k)]
        rows = [i for which in coefficients for i in space.places(*which)]
        return np.array(rows if fit.what == "coefficients" else [*times, *rows])

    def _first(self, fit: Fit) -> Array:
        """The values to start from."""
        if fit.origin is None:
            return self.space.vector(fit.base)[self._free(fit)]
        lam = self.process.lam(np.array(fit.origin.times))[self._inner(fit)]
        extra = self.n if fit.what == "times and labels" else 0
        return np.concatenate([lam, np.zeros(extra)])

    def _inner(self, fit: Fit) -> NDArray[np.intp]:
        """Which times of a solver are free: all but the first, and the last."""
        return np.arange(1, len(fit.origin.times) - 1)

    def _vector(self, fit: Fit, at: Array) -> Array:
        """The numbers of the program for values of the free ones; NaN where there is no such."""
        if fit.origin is None:
            vector = self.space.vector(fit.base)
            vector[self._free(fit)] = at
            return vector
        inner = self._inner(fit)
        times = np.array(fit.origin.times)
        times[inner] = self.process.time(at[: len(inner)])
        if self.model.rounds:
            times[inner] = np.round(times[inner])
        try:
            program = program_of(fit.origin(times))
        except ValueError:  # times that do not fall
            return np.full(self.space.size, math.nan)
        if fit.first_step:
            assert self.progress.mean is not None
            program = answered(program, self.progress.mean)
        vector = self.space.vector(program)
        if fit.what == "times and labels":
            low, high = self.space.limits()
            moved = np.clip(vector[: self.n] + at[len(inner) :], low, high)
            vector[: self.n] = np.where(np.isfinite(vector[: self.n]), moved, vector[: self.n])
        return vector

    def _chain(self, fit: Fit) -> Array:
        """d(numbers of the program) / d(free values)."""
        free = self._free(fit)
        if fit.origin is None:
            return np.eye(self.space.size)[:, free]
        columns, count = [], len(self._inner(fit))
        for i in range(len(fit.at)):
            low, high = fit.at[i] - 1e-5, fit.at[i] + 1e-5
            if self.model.rounds and i < count:  # from integer to integer
                t = float(self.process.time(fit.at[i]))
                low, high = sorted(float(self.process.lam(np.round(t) + d)) for d in (-1, 1))
            ends = []
            for value in (low, high):
                at = fit.at.copy()
                at[i] = value
                ends.append(self._vector(fit, at))
            with np.errstate(invalid="ignore"):
                columns.append((ends[1] - ends[0]) / (high - low))
        chain = np.array(columns).T
        return np.where(np.isfinite(chain), chain, 0.0)

    def _timed(self, fit: Fit) -> NDArray[np.bool_]:
        """Which of the values are lambda, or shifts of it."""
        if fit.origin is not None:
            return np.ones(len(fit.at), dtype=bool)
        return self._free(fit) < self.n

    def _clipped(self, fit: Fit, at: Array) -> Array:
        """Values with lambda in the range that the network knows, or where it started."""
        low, high = self.space.limits()
        clipped = np.clip(at, np.minimum(low, self._first(fit)), high)
        timed = self._timed(fit)
        timed[len(self._inner(fit)) if fit.origin is not None else len(at) :] = False  # shifts
        return np.where(timed, clipped, at)

    def _most(self, fit: Fit) -> Array:
        """The largest moves in one step."""
        return np.where(self._timed(fit), _MOVE_TIME, _MOVE * (1 + np.abs(fit.at)))

    # one iteration

    def _loss(self, off: torch.Tensor, kind: str) -> tuple[float, Array]:
        """(F, weights) of residuals."""
        s = off.double().square().flatten(1).mean(1).cpu().numpy() + self.delta
        return _value(s, kind) if np.isfinite(s).all() else (math.inf, s)

    def _walk(self, program: Program, teacher: Teacher) -> list[Walk]:
        subs = [teacher[part] for part in teacher.chunks()]
        return [self.machine.run(program, sub.x, sub.cond) for sub in subs]

    def _off(self, walks: list[Walk], teacher: Teacher) -> torch.Tensor:
        return torch.cat([walk.result for walk in walks]) - teacher.samples

    def _program(self, fit: Fit, at: Array) -> Program | None:
        vector = self._vector(fit, at)
        if np.isnan(vector).any():
            return None
        program = self.space.program(vector, fit.base)
        return program if program.gain <= self.cap or program.gain <= fit.base.gain else None

    def _judge(self, fit: Fit, program: Program) -> None:
        """Keep a program that is the best of its fit on held-out noises."""
        off = self._off(self._walk(program, self.held), self.held)
        errors = self.held.distances(self.held.samples + off)
        value = self._score(errors)
        fit.history[-1] = (fit.history[-1][0], value)
        if value < fit.best_score and self._eligible(errors) and program.gain <= self.cap:
            fit.best, fit.best_score = program, value

    def _score(self, errors: Array) -> float:
        return score(errors, self.choice)

    def _eligible(self, errors: Array) -> bool:
        """No worse than the best hand-made plan in median, and in root mean square."""
        reference = self.reference
        return bool(np.median(errors) <= np.median(reference) and _rms(errors) <= _rms(reference))

    def _iterate(self, fit: Fit, until: int, teacher: Teacher) -> None:
        """Gauss-Newton steps until so many were made, the fit is done, or the budget is spent."""
        if fit.done or fit.iterations >= until or self._spent(fit):
            return
        program = self._program(fit, fit.at)
        if program is None:
            fit.done = True
            return
        walks = self._walk(program, teacher)
        value, weights = self._loss(self._off(walks, teacher), fit.loss)
        if not fit.history:
            fit.history.append((value, math.inf))
            self._judge(fit, program)
        while not (fit.done or fit.iterations >= until or self._spent(fit)):
            gradient = self._assemble(fit, program, walks, weights, teacher)
            found = self._try(fit, gradient, value, teacher)
            fit.iterations += 1
            if found is None:
                fit.quiet, fit.matrix = fit.quiet + 1, None
            else:
                at, program, walks, new, weights = found
                scale = 1.0 if fit.loss in ("log", "median") else abs(value)
                small = value - new < _SMALL * scale
                fit.at, value, fit.quiet = at, new, fit.quiet + 1 if small else 0
                fit.history.append((value, math.inf))
                self._judge(fit, program)
            fit.done = fit.quiet >= _PATIENCE
            self._tick()

    def _assemble(
        self, fit: Fit, program: Program, walks: list[Walk], weights: Array, teacher: Teacher
    ) -> Array:
        """The gradient; the matrix goes into the fit's average."""
        chain, size = self._chain(fit), self.space.size
        touched = np.flatnonzero(np.abs(chain).max(1) > 0)
        gradient, matrix, at = np.zeros(size), np.zeros((size, size)), 0
        text = f"{self.seed} {fit.name} {fit.iterations}"
        source = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        for walk, part in zip(walks, teacher.chunks(), strict=True):
            sub = teacher[part]
            w = weights[at : at + len(sub)]
            at += len(sub)
            products = self.machine.products(
                program, walk, sub.x, sub.cond, walk.result - sub.samples, w, touched, source
            )
            self.progress.gradients += products.gradients
            gradient += w @ products.transposed
            matrix += products.gram
        matrix = chain.T @ matrix @ chain
        if self.machine.mode == "reverse" and fit.matrix is not None:
            # Weights fall as the error does: compare matrices on one scale.
            old = fit.matrix * (np.trace(matrix) / max(np.trace(fit.matrix), 1e-300))
            matrix = _MEMORY * old + (1 - _MEMORY) * matrix
        fit.matrix = matrix
        return chain.T @ gradient

    def _try(
        self, fit: Fit, gradient: Array, value: float, teacher: Teacher
    ) -> tuple[Array, Program, list[Walk], float, Array] | None:
        """The first of a few damped steps that lowers the loss."""
        matrix = fit.matrix
        assert matrix is not None
        diagonal = np.diag(matrix)
        if not np.isfinite(matrix).all() or not diagonal.max() > 0:
            return None
        diagonal = np.maximum(diagonal, _FLOOR * diagonal.max())
        most = self._most(fit)
        # In units of 1 / sqrt(diagonal) all numbers weigh the same, and the solve is well scaled.
        root = np.sqrt(diagonal)
        scaled = matrix / np.outer(root, root)
        for _ in range(_TRIES):
            damped = scaled + fit.damping * np.eye(len(root))
            move = -np.linalg.lstsq(damped, gradient / root, rcond=None)[0] / root
            at = self._clipped(fit, fit.at + np.clip(move, -most, most))
            program = self._program(fit, at)
            if program is not None:
                walks = self._walk(program, teacher)
                new, weights = self._loss(self._off(walks, teacher), fit.loss)
                if new < value:
                    fit.damping = max(fit.damping * _EASED, _LEAST)
                    return at, program, walks, new, weights
            fit.damping = min(fit.damping * _RAISED, 1e8)
            if self._spent(fit):
                break
        return None

    # all of it

    def _tick(self) -> None:
        self.progress.evaluations = self.before[0] + self.counted.evaluations
        self.progress.seconds = self.before[1] + clock.perf_counter() - self.begun
        if self.each is not None:
            self.each(self.progress)

    def _spent(self, fit: Fit) -> bool:
        self.progress.evaluations = self.before[0] + self.counted.evaluations
        self.progress.seconds = self.before[1] + clock.perf_counter() - self.begun
        share = 1.0 if fit.kind == "polished" else _RESERVE
        return bool(
            (self.budget is not None and self.progress.seconds > share * self.budget)
            or (self.allowed is not None and self.progress.evaluations > share * self.allowed)
        )

    def result(self) -> Learned:
        fits = [fit for fit in self.progress.fits if fit.kind == "start"]
        put = [fit for fit in self.progress.fits if fit.kind == "longer"]
        pilot = max(_PILOT, len(self.train) // 4) if len(fits) + len(put) > 1 else None
        few = self.train[:pilot]
        for fit in put:  # one step tells which place is worth it
            self._iterate(fit, min(1, self.most), few)
        put.sort(key=lambda fit: min([math.inf, *(value for value, _ in fit.history[:2])]))
        alive = fits
        for i, until in enumerate(_ROUNDS):
            for fit in alive:
                self._iterate(fit, min(until, self.most), few if i == 0 else self.train)
            alive = sorted(alive, key=_rank)[: max(_FINALISTS, len(alive) // 2)]
        rest = sorted((fit for fit in fits if fit not in alive), key=_rank)
        # In turn: a shorter plan is better than other starts at first, and may be worse in the end.
        pairs = itertools.zip_longest([*alive, *rest], put)
        queue = [fit for pair in pairs for fit in pair if fit is not None]
        queue[:_FINALISTS] = sorted(queue[:_FINALISTS], key=_rank)
        limited = self.budget is not None or self.allowed is not None
        for fit in queue if limited else queue[:_FINALISTS]:  # others have what a budget leaves
            self._iterate(fit, self.most, self.train)
            self._refine(fit)
        self._shake()
        self._polish()
        return self._learned()

    def _refine(self, fit: Fit) -> None:
        """On with "median", where it may become the best."""
        if self.loss == "log" and self.most and fit.best_score < self._best().best_score + 1:
            later = self._later(fit, f"{fit.name}, median", "refined", loss="median")
            self._iterate(later, self.most, self.train)

    def _shake(self) -> None:
        """What is left of a budget goes into fits from near the best: where the basins of the data
        are sharp, fits end at many places, and the best of them is worth looking around."""
        if (self.budget is None and self.allowed is None) or self.what != "all":
            return
        useless = 0
        for count in range(_SHAKES):
            best = self._best("start", "longer", "refined", "shaken")
            if best.best is None or useless >= _USELESS or self._spent(best):
                return
            fit = self._later(best, f"{best.name.split(_SHAKEN)[0]}{_SHAKEN}{count + 1}", "shaken")
            if not fit.history:
                z = np.random.default_rng([self.seed, count]).standard_normal(len(fit.at))
                fit.at = self._clipped(fit, fit.at + self._move(fit, z))
            self._iterate(fit, self.most, self.train)
            useless = 0 if fit.best_score < best.best_score - 0.01 else useless + 1

    def _move(self, fit: Fit, z: Array) -> Array:
        """A random move that raises F by about _SHAKE: the softer a direction, the farther."""
        program = self._program(fit, fit.at)
        assert program is not None
        walks = self._walk(program, self.train)
        _, weights = self._loss(self._off(walks, self.train), fit.loss)
        self._assemble(fit, program, walks, weights, self.train)
        matrix, fit.matrix = fit.matrix, None
        assert matrix is not None
        if not np.isfinite(matrix).all():
            return np.zeros_like(z)
        root = np.sqrt(np.maximum(np.diag(matrix), _FLOOR * np.diag(matrix).max()))
        values, vectors = np.linalg.eigh(matrix / np.outer(root, root))
        move = vectors @ (z / np.sqrt(np.maximum(values, 0) + _SOFTEST)) / root
        # F is a mean over samples of something that is 1 per relative s, a mean over elements.
        move *= math.sqrt(_SHAKE * self.train.samples.numel() / len(move))
        most = self._most(fit)
        return np.clip(move, -most, most)

    def _best(self, *kinds: str) -> Fit:
        fits = [fit for fit in self.progress.fits if not kinds or fit.kind in kinds]
        return min(fits, key=lambda fit: fit.best_score)

    def _later(self, best: Fit, name: str, kind: str, **changes: Any) -> Fit:
        """The fit of this name, if progress has it; else a new one from the best program of
        another."""
        for fit in self.progress.fits:
            if fit.name == name:
                return fit
        assert best.best is not None
        fit = replace(
            best, name=name, kind=kind, base=best.best, best=None, best_score=math.inf, done=False,
            quiet=0, iterations=0, history=[], matrix=None, damping=_DAMPING, **changes,
        )  # fmt: skip
        fit.at = best.at.copy() if best.origin is not None else self._first(fit)
        self.progress.fits.append(fit)
        return fit

    def _polish(self) -> None:
        """From the best, a few steps with other losses, which weigh the worst samples more; with
        integer times, of the rows alone."""
        what = "coefficients" if self.model.rounds and self.what == "all" else self.what
        for loss in ("root", "l1") if self.loss == "log" else ("log",):
            begun = [f for f in self.progress.fits if f.kind == "polished" and f.loss == loss]
            best = self._best()
            if not begun and (best.best is None or not self.most):
                return
            name = f"{best.name.removesuffix(', root polished')}, {loss} polished"
            fit = begun[0] if begun else self._later(best, name, "polished", loss=loss, what=what)
            self._iterate(fit, min(_POLISH, self.most), self.train)

    def _learned(self) -> Learned:
        progress = self.progress
        best = min(progress.fits, key=lambda fit: fit.best_score)
        hand = self.names[self.best_hand]
        if best.best is None or best.best_score >= self._score(progress.start_errors[hand]):
            chosen, program, name = self.hand[self.best_hand], None, hand
            errors = progress.start_errors[hand]
        else:
            program, name = best.best, best.name
            about = {"from": name, "fitted on": f"{len(self.train)} noises"}
            chosen = plan_of(program, self.model, about)
            errors = self.held.errors(chosen)
        self._tick()
        return Learned(
            chosen, name, errors, progress.start_errors, program, progress.evaluations,
            progress.gradients, progress.iterations, progress.seconds, progress,
        )  # fmt: skip


_SHAKEN = ", shaken "


def _rank(fit: Fit) -> float:
    """The best held-out score of a fit, of any iterate."""
    return min((value for _, value in fit.history), default=math.inf)


def _is_program(run: Plan) -> bool:
    try:
        program_of(run)
    except ValueError:
        return False
    return True


def _named(run: Plan) -> str:
    return f"{run.about.get('solver', 'plan')} on {run.about.get('grid', 'its grid')}"
