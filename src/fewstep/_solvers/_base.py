"""What a solver is, and the multistep family: one network evaluation per step."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._noise import Draw
from .._plan import Row
from .._process import Array, Level, Process

if TYPE_CHECKING:
    from .._basis import Basis

__all__ = ["Corrector", "Draft", "Formula", "Multistep", "Solver", "Step"]


@dataclass(frozen=True)
class Draft:
    """Rows before the network is known.

    levels: of all states. rows: rows[i] makes state given + i. evaluated: for every state whether
    the network is asked about it, or the level at which it is, if that is another than its own.
    given, keep, basis, draws: as in `Plan`.
    """

    levels: tuple[Level, ...]
    rows: tuple[Row, ...]
    evaluated: tuple[bool | Level, ...]
    given: int = 1
    keep: tuple[int, ...] = ()
    basis: Basis | None = None
    draws: tuple[Draw, ...] = ()


class Solver(abc.ABC):
    """Contract of a solver. It never sees a network or a tensor.

    1. `name`, `order` (formal order in the half log-SNR step, with exact history and away from
       start-up and end, for any ratio of neighbouring steps), `nfe_per_step`, `source` (paper,
       arXiv id, equation) and `ends` (what it does with too little history and at sigma = 0) are
       facts that tests measure.
    2. `smooth_order` is the order on grids whose step sizes change smoothly (each differs from the
       one before by O(h) of itself), where that is higher: formulas with fixed numbers. 0: the
       same. `fragile` says where the solver is far worse than first order, if it is ("" if not).
    3. `stochastic`, `adaptive`, `needs_calibration` are False unless said otherwise. The order of a
       stochastic solver is the weak one (of moments), 0 if it does not converge; `strong_order` is
       the order on one Brownian path as steps are halved, 0 if its draws belong to no path.
       `scaled(s)` is the solver with s times its noise level (0: none), and `member` names the
       solver that it is then, to rounding.
    4. `steps(nfe, clean)` is the number of steps with which exactly nfe evaluations can be spent;
       `clean` says whether the last step goes to sigma = 0.
    5. `draft(process, times, nfe)` gives the rows for these times; nfe evaluations if that is
       given. Times are checked before it is called: finite levels but for alpha = 0 at the noisy
       end and sigma = 0 at the last node. They run from noise to data, or from data to noise.
    6. A combination it cannot do is refused there with a sentence, never approximated silently.
    """

    name: str
    order: int
    source: str
    ends: str
    nfe_per_step: int = 1
    smooth_order: int = 0
    fragile: str = ""
    stochastic: bool = False
    strong_order: int = 0
    scaled: Callable[[float], Solver] | None = None
    member: str = ""
    adaptive: bool = False
    needs_calibration: bool = False
    aliases: tuple[str, ...] = ()

    @abc.abstractmethod
    def steps(self, nfe: int, clean: bool) -> int:
        """Steps for a budget of network evaluations."""

    @abc.abstractmethod
    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        """Rows for these times."""


class Formula(NamedTuple):
    """One step of a multistep method, aligned with a history of levels (newest first):

        X = sum_k a[k] x_k + sum_k b[k] D_k + sum_d noise[d] Z_d + c

    noise: coefficients of standard normals, each named by its place in time: the same `Draw` in
        two formulas of a step is the same normal.
    order: of this step. exact: reproduces constant data and constant noise exactly.
    base: the part of the start's coefficient that belongs to the state the step starts from, where
        that is not the state that was evaluated there (after a corrector). Default: all of it.
    c: a constant, of the shape of the coefficients; such a formula is not exact.
    """

    a: Sequence[Any]  # floats, or arrays of one number per mode
    b: Sequence[Any]
    order: int
    exact: bool = True
    base: Any = None
    noise: Mapping[Draw, Any] = {}
    c: Any = 0.0


#: (process, levels of the evaluated states newest first, target level) -> formula. For a corrector
#: the first of these levels is the target itself; None means that it has nothing to correct.
Step = Callable[[Process, Sequence[Level], Level], Formula]
Corrector = Callable[[Process, Sequence[Level], Level], Formula | None]


@dataclass(frozen=True)
class Multistep(Solver):
    """A linear multistep method given by its coefficient function `step`.

    Start-up: step k sees the k + 1 newest levels, at most `nodes` (default: `order`). With
    `lower_final` the last steps see at most as many levels as there are steps left, that step
    included.

    With a `corrector`, every state but the last is corrected once the network has been called
    there: the evaluated (predicted) states stay the nodes of later steps, the corrected ones are
    where those steps start. It re-uses the evaluation of the next step and costs none.

    A `reversible` method hands over its last two states, from which `Plan.inverse` goes back.
    """

    name: str
    order: int
    step: Step
    source: str
    ends: str
    nodes: int = 0
    lower_final: bool = False
    corrector: Corrector | None = None
    smooth_order: int = 0
    fragile: str = ""
    reversible: bool = False
    stochastic: bool = False
    strong_order: int = 0
    scaled: Callable[[float], Solver] | None = None
    member: str = ""
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int, clean: bool) -> int:
        return nfe

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n = len(nodes) - 1
        if nfe not in (None, n):
            raise ValueError(
                f"nfe = {nfe}, but the grid has {n + 1} times, which is {n} steps; leave nfe out"
            )
        levels, evaluated, rows = [nodes[0]], [True], []
        where = [0]  # the evaluated state of every node
        base = 0  # the state that the step starts from
        draws: dict[Draw, int] = {}
        for i in range(n):
            keep = min(self.nodes or self.order, i + 1, n - i if self.lower_final else n)
            history = nodes[i - keep + 1 : i + 1][::-1]
            states = where[i - keep + 1 : i + 1][::-1]
            end = nodes[i + 1]
            rows.append(_row(self.step(process, history, end), states, states[0], base, draws))
            where.append(len(levels))
            levels.append(end)
            evaluated.append(i < n - 1)
            made = where[-1]
            if self.corrector is not None and i < n - 1:
                formula = self.corrector(process, [end, *history], end)
                if formula is not None:
                    rows.append(_row(formula, [made, *states], states[0], base, draws))
                    made = len(levels)
                    levels.append(end)
                    evaluated.append(False)
            base = made
        keep = (where[-2],) if self.reversible else ()
        return Draft(tuple(levels), tuple(rows), tuple(evaluated), keep=keep, draws=tuple(draws))


def _row(
    formula: Formula,
    states: Sequence[int],
    start: int,
    base: int,
    draws: dict[Draw, int] | None = None,
) -> Row:
    """The formula as a row over the states with these indices, starting from state `base`. draws:
    the numbers of the plan's draws so far; new ones are added."""
    e: dict[int, Any] = {}
    for draw, c in formula.noise.items():
        if np.any(c != 0):
            if draws is None:
                raise ValueError(f"formula: draws noise where its family does not: {draw}")
            e[draws.setdefault(draw, len(draws))] = _number(c)
    a = dict(zip(states, map(_number, formula.a), strict=True))
    b = dict(zip(states, map(_number, formula.b), strict=True))
    if base != start:
        share = a[start] if formula.base is None else formula.base
        a[start] = a[start] - share
        a[base] = share
    return Row(
        {j: c for j, c in a.items() if np.any(c != 0)},
        {j: c for j, c in b.items() if np.any(c != 0)},
        formula.order,
        formula.exact,
        e,
        _number(formula.c),
    )


def _number(c: Any) -> Any:
    return float(c) if np.ndim(c) == 0 else c
