r"""Schedules: every step of a multistep sampler chosen on its own.

A `Schedule` is a list of times and one `Choice` per step: how many nodes, which prediction is
integrated over which variable, with which weights, and whether the state made is corrected. The
parts are those of `exponential` and `ipndm`; every such solver is a schedule (`schedule_of`), and
a schedule is a solver again (`Schedule.solver`): its rows come from the same coefficient
functions, so ends, start-up and guards are theirs.

Taylor factors. With M the integrand and u its variable, a row of p nodes integrates the polynomial

    M_s + sum_{k=1}^{p-1} r_k c_k (u - u_s)^k,     sum_k c_k (u - u_s)^k through the p nodes,

exactly. All r_k = 1: the exact weights. The p - 1 numbers r_k reach every row of p nodes that
reproduces constants, so estimates of a derivative through fewer nodes, the factors of the published
samplers and the third-order rows that are shipped, (1, 1/2), are points of this space. The order of
a row is the number of its first factor that is not 1.

Analytic first step. The first data prediction is taken to be 0 or the mean of the data, and the
evaluation saved buys one more step (`analytic_first`).

Source: A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models (USF,
S^3; arXiv 2312.07243), its code's decision vector; there the factors are functions of the step.
Not taken over: factors of a U-Net's skip connections, which no sampler knows of; DPM-Solver-v3's
integrand, which needs statistics of the model; correctors that evaluate again (in the published
code they never do).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._analytic import analytic_first
from .._denoiser import Model
from .._grids import Grid
from .._plan import Plan
from .._prediction import unknown
from .._process import Array, Level, Process
from .._sampling import DEFAULT_GRID, plan
from .._solvers._base import Draft, Formula, Multistep, Solver
from .._solvers._exponential import _add, _Exponential, exponential
from .._solvers._momentum import Terms, _Adams, ipndm
from .._solvers._registry import as_solver
from .._weights import _difference, usable, weights

__all__ = ["FIRST", "WEIGHTS", "Choice", "Schedule", "schedule_of"]

#: Weights of a row. "midpoint" and "bh1" change rows of two nodes in lambda (see `exponential`);
#: "adams" are the numbers of equal steps (see `ipndm`), for noise and flow in their own variable.
WEIGHTS = ("exact", "midpoint", "bh1", "adams")
#: What the first data prediction is: the network's, 0, or the mean of the data.
FIRST = ("network", "zero", "mean")


@dataclass(frozen=True)
class Choice:
    """How one step is made.

    order: nodes, 1 to 4; a start-up step takes as many as there are.
    form, variable: the integrand and its variable, as in `exponential`.
    weights: one of WEIGHTS.
    relax: Taylor factors r_1, r_2, ... (top of this module); those left out are 1.
    corrector: correct the new state with the evaluation made there (UniC), through one node more,
        without Taylor factors; the last state is not evaluated and never corrected.
    growth: guard of rows that would amplify errors, as in `exponential`; inf: none.
    """

    order: int = 2
    form: str = "data"
    variable: str = "lambda"
    weights: str = "exact"
    relax: tuple[float, ...] = ()
    corrector: bool = False
    growth: float = math.inf

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(unknown("weights", str(self.weights), WEIGHTS))
        if isinstance(self.order, bool) or self.order not in (1, 2, 3, 4):
            raise ValueError(f"order = {self.order!r}; need 1, 2, 3 or 4 nodes")
        relax = tuple(float(r) for r in self.relax)
        if len(relax) > 3 or not all(map(math.isfinite, relax)):
            raise ValueError(f"relax = {self.relax}; need up to three finite factors")
        object.__setattr__(self, "relax", relax)
        if self.weights == "adams":
            if self.form not in ("noise", "flow") or self.variable != "own" or relax:
                raise ValueError(
                    f"weights = 'adams' with form = {self.form!r}, variable = {self.variable!r}, "
                    f"relax = {relax}; those numbers are for noise and flow in 'own', no factors"
                )
        elif self.weights != "exact" and relax[:1] not in ((), (1.0,)):
            raise ValueError(
                f"relax = {relax} with weights = {self.weights!r}, which sets the first factor "
                "itself; use weights = 'exact'"
            )
        _family(self)  # refuses the rest

    def predict(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        """The row from history[0], through the newest `order` of the history."""
        history = history[: self.order]
        formula = _family(self).step(process, history, end)
        if any(r != 1 for r in self.relax[: formula.order - 1]):
            formula = self._relaxed(formula, process, history, end)
        return formula

    def correct(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        """The same step through the new state's own evaluation, history[0] = end, too."""
        corrector = _family(self, corrector=True).corrector
        assert corrector is not None
        return corrector(process, history[: self.order + 1], end)

    def _relaxed(
        self, formula: Formula, process: Process, history: Sequence[Level], end: Level
    ) -> Formula:
        start = history[0]
        others = [n for n in history[1:] if usable(self.form, self.variable, n)]
        nodes = [start, *others][: formula.order]
        W = weights(self.form, self.variable, start, end, nodes, process)
        points = [(n.t, n.lam - start.lam) for n in nodes]
        gaps = [_difference(self.form, self.variable, p, points[0], start.lam) for p in points[1:]]
        u = np.array([0.0, *gaps]) / gaps[-1]
        powers = u[:, None] ** np.arange(len(u))
        # Polynomial k of the inverse has 1 at node k; W integrates powers of u exactly.
        moments, ell = W @ powers, np.linalg.inv(powers)
        factors = (*self.relax, 1.0, 1.0, 1.0)[: len(u) - 1]
        change = ((np.array([1.0, *factors]) - 1) * moments) @ ell
        a, b = list(formula.a), list(formula.b)
        for node, w in zip(nodes[1:], change[1:], strict=True):
            k = history.index(node)
            a[k], b[k] = _add(a[k], b[k], float(w), self.form, node)
            a[0], b[0] = _add(a[0], b[0], -float(w), self.form, start)
        order = next((k for k, r in enumerate(factors, 1) if r != 1), formula.order)
        return formula._replace(a=a, b=b, order=order)


@lru_cache(maxsize=4096)
def _method(
    order: int, form: str, variable: str, second: str, growth: float, corrector: bool
) -> Multistep:
    return exponential(
        order,
        form=form,
        variable=variable,
        second=second,  # pyright: ignore[reportArgumentType]  (checked there)
        growth=growth,
        corrector=corrector,
    )


def _family(choice: Choice, corrector: bool = False) -> Multistep:
    """The method of the registry's family that the step is of; its corrector is exponential."""
    adams = choice.weights == "adams"
    if adams and not corrector:
        return ipndm(choice.order, form=choice.form)
    second = "exact" if adams else choice.weights
    return _method(choice.order, choice.form, choice.variable, second, choice.growth, corrector)


@dataclass(frozen=True)
class _Steps:
    """Coefficient functions: step k has the k + 1 levels so far as its history."""

    choices: tuple[Choice, ...]

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        choice = self.choices[len(history) - 1]
        return _padded(choice.predict(process, history, end), len(history))

    def correct(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        choice = self.choices[len(history) - 2]
        formula = choice.correct(process, history, end) if choice.corrector else None
        return None if formula is None else _padded(formula, len(history))


def _padded(formula: Formula, length: int) -> Formula:
    terms = Terms(length)
    for k, (a, b) in enumerate(zip(formula.a, formula.b, strict=True)):
        terms.a[k], terms.b[k] = a, b
    return formula._replace(a=terms.a, b=terms.b)


@dataclass(frozen=True)
class _Scheduled(Multistep):
    """A multistep method with a number of steps of its own."""

    count: int = 0

    def steps(self, nfe: int, clean: bool) -> int:
        self._check(nfe)
        return nfe

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        self._check(len(times) - 1 if nfe is None else nfe)
        return super().draft(process, times, nfe)

    def _check(self, nfe: int) -> None:
        if nfe != self.count:
            raise ValueError(f"nfe = {nfe}; this schedule has {self.count} steps, one choice each")


@dataclass(frozen=True)
class Schedule:
    """A sampler as times and choices: times[0] is where it starts, step i goes from times[i] to
    times[i + 1] and is made by choices[i]. first: one of FIRST."""

    times: tuple[float, ...]
    choices: tuple[Choice, ...]
    first: str = "network"

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        object.__setattr__(self, "choices", tuple(self.choices))
        if len(self.times) != len(self.choices) + 1 or not self.choices:
            raise ValueError(
                f"choices has {len(self.choices)} entries for {len(self.times)} times; need one "
                "per step, at least one"
            )
        if self.first not in FIRST:
            raise ValueError(unknown("first", str(self.first), FIRST))
        if self.first != "network" and len(self.choices) < 2:
            raise ValueError(f"first = {self.first!r} with one step; no evaluation would be left")

    @property
    def nfe(self) -> int:
        """Evaluations of a run."""
        return len(self.choices) - (self.first != "network")

    def solver(self, name: str = "schedule") -> Solver:
        """The choices as a solver, for any times of this number; with the network's own first
        prediction."""
        steps = _Steps(self.choices)
        return _Scheduled(
            name=name,
            order=1,
            step=steps,
            source="Unified Sampling Framework, 2312.07243: every step chosen on its own",
            ends="start-up orders 1, 2, ...; at sigma = 0 what the chosen formulas do there",
            nodes=len(self.choices),
            corrector=steps.correct if any(c.corrector for c in self.choices) else None,
            count=len(self.choices),
        )

    def plan(self, on: Process | Model, *, mean: ArrayLike | None = None, **options: Any) -> Plan:
        """The plan. mean: of the data, broadcasts against a sample; needed if first = "mean".
        options: as in `fewstep.plan` (predicts)."""
        run = plan(self.solver(), on, grid=self.times, **options)
        if self.first == "network":
            return run
        if self.first == "zero":
            return analytic_first(run, 0.0)
        if mean is None:
            raise ValueError("mean is missing; this schedule begins with the mean of the data")
        return analytic_first(run, 0.0, np.asarray(mean, dtype=np.float64))

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and numbers, for JSON."""
        return {
            "times": list(self.times),
            "choices": [{**asdict(c), "relax": list(c.relax)} for c in self.choices],
            "first": self.first,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Schedule:
        """The schedule that gave this `to_dict`."""
        known = {f.name for f in fields(Choice)}
        for c in values["choices"]:
            for name in c:
                if name not in known:
                    raise ValueError(unknown("choice", str(name), known))
        choices = [Choice(**{**c, "relax": tuple(c["relax"])}) for c in values["choices"]]
        return Schedule(tuple(values["times"]), tuple(choices), values["first"])

    def __str__(self) -> str:
        lines = [f"schedule: {self.nfe} NFE, first prediction: {self.first}"]
        lines.append(f"{'step':>5} {'t':>12} {'to':>12} nodes  form   variable weights   others")
        for i, c in enumerate(self.choices):
            others = [f"relax {', '.join(f'{r:.3g}' for r in c.relax)}"] * bool(c.relax)
            others += ["corrector"] * c.corrector + [f"growth {c.growth:g}"] * (c.growth < math.inf)
            lines.append(
                f"{i:>5} {self.times[i]:>12.6g} {self.times[i + 1]:>12.6g} {c.order:>5}  "
                f"{c.form:<6} {c.variable:<8} {c.weights:<9} {'; '.join(others)}".rstrip()
            )
        return "\n".join(lines)


def schedule_of(
    solver: str | Solver,
    on: Process | Model,
    nfe: int,
    *,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    first: str = "network",
) -> Schedule:
    """The schedule that is this solver: any `exponential` or `ipndm` of up to four nodes, by name
    or made. With first = "zero" or "mean" it has one step more than evaluations."""
    found = as_solver(solver)
    step = found.step if isinstance(found, Multistep) else None
    adams = isinstance(step, _Adams) and step.beta == 1 and not step.exact
    if not isinstance(found, Multistep) or not (
        type(step) is _Exponential or (adams and found.corrector is None)
    ):
        raise ValueError(
            f"solver = {found.name!r}; schedules are made of the exponential and ipndm families"
        )
    count = found.nodes or found.order
    if count > 4:
        raise ValueError(f"solver = {found.name!r} has {count} nodes; schedules have up to 4")
    steps = nfe + (first != "network")
    run = plan(found, on, steps, grid=grid, final=final)
    assert run.origin is not None
    if isinstance(step, _Adams):
        facts: dict[str, Any] = {"form": step.form, "variable": "own", "weights": "adams"}
    else:
        assert isinstance(step, _Exponential)
        facts = {"form": step.form, "variable": step.variable, "weights": step.second}
        facts |= {"growth": step.growth, "relax": (1.0, 0.5) if step.third == "shipped" else ()}
    orders = [min(count, i + 1, steps - i if found.lower_final else steps) for i in range(steps)]
    last = steps - 1
    correct = found.corrector is not None
    choices = [Choice(p, corrector=correct and i < last, **facts) for i, p in enumerate(orders)]
    return Schedule(run.origin.times, tuple(choices), first)
