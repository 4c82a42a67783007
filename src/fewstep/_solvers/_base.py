"""What a solver is, and the multistep family: one network evaluation per step."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .._plan import Row
from .._process import Array, Level, Process

__all__ = ["Corrector", "Draft", "Formula", "Multistep", "Solver", "Step"]


@dataclass(frozen=True)
class Draft:
    """Rows before the network is known: levels of all states, rows, and which are evaluated."""

    levels: tuple[Level, ...]
    rows: tuple[Row, ...]
    evaluated: tuple[bool, ...]


class Solver(abc.ABC):
    """Contract of a solver. It never sees a network or a tensor.

    1. `name`, `order` (formal order in the half log-SNR step, with exact history and away from
       start-up and end), `nfe_per_step`, `source` (paper, arXiv id, equation) and `ends` (what it
       does with too little history and at sigma = 0) are facts that tests measure.
    2. `stochastic`, `adaptive`, `needs_calibration` are False unless said otherwise.
    3. `steps(nfe)` is the number of steps that spends exactly nfe evaluations.
    4. `draft(process, times)` gives the rows. Times are checked before it is called: finite
       levels but for alpha = 0 at the first and sigma = 0 at the last node.
    5. A combination it cannot do is refused there with a sentence, never approximated silently.
    """

    name: str
    order: int
    source: str
    ends: str
    nfe_per_step: int = 1
    stochastic: bool = False
    adaptive: bool = False
    needs_calibration: bool = False
    aliases: tuple[str, ...] = ()

    @abc.abstractmethod
    def steps(self, nfe: int) -> int:
        """Steps for a budget of network evaluations."""

    @abc.abstractmethod
    def draft(self, process: Process, times: Array) -> Draft:
        """Rows for these times."""


class Formula(NamedTuple):
    """One step of a multistep method, aligned with a history of levels (newest first):

        X = sum_k a[k] x_k + sum_k b[k] D_k

    order: of this step. exact: reproduces constant data and constant noise exactly.
    base: the part of the start's coefficient that belongs to the state the step starts from, where
        that is not the state that was evaluated there (after a corrector). Default: all of it.
    """

    a: Sequence[float]
    b: Sequence[float]
    order: int
    exact: bool = True
    base: float | None = None


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
    """

    name: str
    order: int
    step: Step
    source: str
    ends: str
    nodes: int = 0
    lower_final: bool = False
    corrector: Corrector | None = None
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int) -> int:
        return nfe

    def draft(self, process: Process, times: Array) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        n = len(nodes) - 1
        levels, evaluated, rows = [nodes[0]], [True], []
        where = [0]  # the evaluated state of every node
        base = 0  # the state that the step starts from
        for i in range(n):
            keep = min(self.nodes or self.order, i + 1, n - i if self.lower_final else n)
            history = nodes[i - keep + 1 : i + 1][::-1]
            states = where[i - keep + 1 : i + 1][::-1]
            end = nodes[i + 1]
            rows.append(_row(self.step(process, history, end), states, states[0], base))
            where.append(len(levels))
            levels.append(end)
            evaluated.append(i < n - 1)
            made = where[-1]
            if self.corrector is not None and i < n - 1:
                formula = self.corrector(process, [end, *history], end)
                if formula is not None:
                    rows.append(_row(formula, [made, *states], states[0], base))
                    made = len(levels)
                    levels.append(end)
                    evaluated.append(False)
            base = made
        return Draft(tuple(levels), tuple(rows), tuple(evaluated))


def _row(formula: Formula, states: Sequence[int], start: int, base: int) -> Row:
    """The formula as a row over the states with these indices, starting from state `base`."""
    a = dict(zip(states, map(float, formula.a), strict=True))
    b = dict(zip(states, map(float, formula.b), strict=True))
    if base != start:
        share = a[start] if formula.base is None else formula.base
        a[start] -= share
        a[base] = share
    return Row(
        {j: c for j, c in a.items() if c != 0},
        {j: c for j, c in b.items() if c != 0},
        formula.order,
        formula.exact,
    )
