r"""Runge-Kutta steps that build the history of a multistep method: PNDM, or any other.

In rho = sigma / alpha the ODE is dy/drho = e (y = x / alpha, e the noise prediction), and a step
with e' in place of e is DDIM with that noise ("transfer"), y_t = y_s + (rho_t - rho_s) e'. PNDM
takes Adams-Bashforth numbers of equal steps (`ipndm`) once it has a history, and before that

    4 evaluations   e' = (e_s + 2 e_1 + 2 e_2 + e_3) / 6, states 1 and 2 half way in t, 3 at t
    2 evaluations   e' = (e_s + e_1) / 2, state 1 at t

of which only e_s enters the history.

    F-PNDM   three steps of 4, then 4 nodes: N + 9 NFE for N steps
    S-PNDM   one step of 2, then 2 nodes: N + 1 NFE
    PLMS     one step of 2, then 2, 3, 4 nodes: N + 1 NFE; `skip_prk_steps` of diffusers, and the
             PLMS of latent diffusion

On grids that are not equal in rho all of these are of first order, of second where steps change
smoothly. Source: Pseudo Numerical Methods for Diffusion Models on Manifolds (arXiv 2202.09778),
section 3 and its official code.

Budget: the last step is never a Runge-Kutta step; where the evaluations do not reach for all of
them and one step more (13 for F-PNDM), none is taken, and the start-up is that of the multistep
method.
Ends: those of the multistep method, and of `_singlestep` for the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._plan import Row
from .._process import Array, Level, Process
from ._base import Draft, Multistep, Solver, _row
from ._momentum import ipndm
from ._runge_kutta import runge_kutta
from ._singlestep import Singlestep

__all__ = ["Started", "pndm", "started"]


@dataclass(frozen=True)
class Started(Solver):
    """A multistep method whose first steps are those of a singlestep method.

    first: evaluations of these steps, 2 or more each.
    """

    name: str
    order: int
    body: Multistep
    starter: Singlestep
    first: tuple[int, ...]
    source: str
    ends: str
    smooth_order: int = 0
    fragile: str = ""
    aliases: tuple[str, ...] = ()

    def _nfe(self, steps: int) -> int:
        """Evaluations of `steps` steps, the first ones Runge-Kutta steps."""
        return steps + sum(self.first) - len(self.first)

    def steps(self, nfe: int, clean: bool) -> int:
        few = nfe < self._nfe(len(self.first) + 1)
        return nfe if few else nfe - self._nfe(0)

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        nodes = [process.level(float(t)) for t in times]
        steps = len(nodes) - 1
        possible = [steps, self._nfe(steps)][: 2 if steps > len(self.first) else 1]
        if nfe is not None and nfe not in possible:
            raise ValueError(
                f"nfe = {nfe}, but {steps} steps of {self.name} spend "
                f"{' or '.join(map(str, possible))}"
            )
        return self.lay(process, nodes, () if (nfe or possible[-1]) == steps else self.first)

    def lay(self, process: Process, nodes: Sequence[Level], first: Sequence[int]) -> Draft:
        """Rows of steps through `nodes`, the first ones with these numbers of evaluations."""
        levels, rows, where = [nodes[0]], list[Row](), [0]
        for i, end in enumerate(nodes[1:]):
            if i < len(first):
                draft = self.starter.lay(process, nodes[i : i + 2], [first[i]])
                for row in draft.rows:
                    rows.append(_shifted(row, where[-1]))
                levels += draft.levels[1:]
            else:
                seen = where[: -1 - min(self.body.nodes or self.body.order, i + 1) : -1]
                history = [levels[k] for k in seen]
                formula = self.body.step(process, history, end)
                rows.append(_row(formula, seen, seen[0], seen[0]))
                levels.append(end)
            where.append(len(levels) - 1)
        return Draft(tuple(levels), tuple(rows), (True,) * len(rows) + (False,))


def _shifted(row: Row, by: int) -> Row:
    """The row over states that come `by` later."""
    a, b = ({j + by: c for j, c in terms.items()} for terms in (row.a, row.b))
    return Row(a, b, row.order, row.exact)


def started(
    body: Multistep,
    starter: Singlestep,
    first: Sequence[int],
    *,
    name: str | None = None,
    source: str = "multistep method with a Runge-Kutta start",
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Started:
    """A multistep method that gets its history from Runge-Kutta steps instead of lower orders.

    body: a multistep method without corrector, lower last orders or a second state to hand over.
    starter: a singlestep method. first: evaluations of its steps, each 2 to starter.nfe_per_step.
    """
    if body.stochastic or starter.stochastic:
        name = body.name if body.stochastic else starter.name
        raise ValueError(f"{name!r} draws noise; need deterministic solvers for body and starter")
    if body.corrector is not None or body.lower_final or body.reversible:
        raise ValueError(
            f"body = {body.name!r}; need a multistep solver without corrector, lower_final and "
            "memory of a second state"
        )
    if not first or not all(2 <= k <= starter.nfe_per_step for k in first):
        raise ValueError(
            f"first = {tuple(first)}; need numbers from 2 to {starter.nfe_per_step}, the "
            f"evaluations of a full step of {starter.name}"
        )
    first = tuple(map(int, first))
    after = body.ends.partition("; ")[2] or body.ends
    return Started(
        name=name or f"started({body.name}, {starter.name}, {', '.join(map(str, first))})",
        order=body.order,
        body=body,
        starter=starter,
        first=first,
        source=source,
        ends=f"start-up by steps of {', '.join(map(str, first))} evaluations; {after}",
        smooth_order=body.smooth_order,
        fragile=fragile or body.fragile,
        aliases=aliases,
    )


_PNDM = "PNDM, 2202.09778"


def pndm(nodes: int = 4, start: int = 4, *, name: str, aliases: tuple[str, ...] = ()) -> Started:
    """PNDM: Adams-Bashforth of `nodes` nodes with fixed numbers, after three steps of 4 evaluations
    (start = 4) or one of 2 (start = 2). 1 NFE per step after these."""
    if start not in (2, 4):
        raise ValueError(f"start = {start!r}; accepted: 2, 4 (evaluations of the first steps)")
    starter = runge_kutta("4rk" if start == 4 else "2heun", placed="t")
    first = (4, 4, 4) if start == 4 else (2,)
    variant = "F-PNDM" if start == 4 else "S-PNDM" if nodes == 2 else "second time repeated"
    return started(
        ipndm(nodes),
        starter,
        first,
        name=name,
        source=f"{_PNDM}, {variant}",
        fragile="few steps: the Runge-Kutta steps are long in rho, and end where sigma is small",
        aliases=aliases,
    )
