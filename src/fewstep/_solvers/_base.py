"""What a solver is, and the multistep family: one network evaluation per step."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._plan import Row
from .._process import Array, Level, Process

__all__ = ["Draft", "Multistep", "Solver", "Step"]


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


#: One multistep row: (process, history newest first, target level) ->
#: (coefficients of past states, coefficients of past data predictions, order, exact), newest first.
Step = Callable[
    [Process, Sequence[Level], Level],
    tuple[Sequence[float], Sequence[float], int, bool],
]


@dataclass(frozen=True)
class Multistep(Solver):
    """A linear multistep method given by its coefficient function `step`.

    Start-up: step k sees the k + 1 newest levels, at most `nodes` (default: `order`). With
    `lower_final` the last steps see at most as many levels as there are steps left, that step
    included.
    """

    name: str
    order: int
    step: Step
    source: str
    ends: str
    nodes: int = 0
    lower_final: bool = False
    aliases: tuple[str, ...] = ()

    def steps(self, nfe: int) -> int:
        return nfe

    def draft(self, process: Process, times: Array) -> Draft:
        levels = tuple(process.level(float(t)) for t in times)
        n = len(levels) - 1
        rows = []
        for i in range(n):
            keep = min(self.nodes or self.order, i + 1, n - i if self.lower_final else n)
            history = levels[i - keep + 1 : i + 1][::-1]
            a, b, order, exact = self.step(process, history, levels[i + 1])
            rows.append(
                Row(
                    {i - k: float(c) for k, c in enumerate(a) if c != 0},
                    {i - k: float(c) for k, c in enumerate(b) if c != 0},
                    order,
                    exact,
                )
            )
        return Draft(levels, tuple(rows), (*(True,) * n, False))
