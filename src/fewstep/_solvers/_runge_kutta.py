r"""Runge-Kutta methods from tables: explicit in any clock, exponential with phi functions.

Explicit. In a form (N, zeta, M) of `_weights`, dX/dzeta = M with X = x / N, or in the linear ODE
dX/dlambda = D - X, X = x / alpha ("lambda"), a table (a, b) with c_i = sum_j a_ij gives

    X_i = X_s + sum_{j<i} a_ij Delta M_j,  X_t = X_s + sum_j b_j Delta M_j,  Delta = zeta_t - zeta_s

with inner state i at zeta_s + c_i Delta. In the noise form this is rhoRK of DEIS (arXiv 2204.13902)
and Heun's method of EDM (2206.00364, algorithm 1); in the flow form, midpoint or Heun in the time
of a flow. Data, noise and flow rows are DDIM plus sum_j W_j (M_j - M_s); v and lambda
rows reproduce constants only to their order.

An inner state may be put elsewhere (midpoints in t, as PNDM; integers): then the a_ij of its row
are scaled to end there, and b stays, which costs order.

Exponential. For Y' = -Y + D in lambda (Y = x / alpha, data form) and w' = w - e (w = x / sigma,
noise form), with z = -h or h, the numbers are functions of z,

    data    x_i = (sigma_i / sigma_s) x_s + alpha_i h sum_j a_ij(-h) D_j
    noise   x_i = (alpha_i / alpha_s) x_s - sigma_i h sum_j a_ij(h) e_j

combinations of phi_k(c z), phi_k(z) = int_0^1 e^((1 - u) z) u^(k-1) / (k - 1)! du, computed by
quadrature of that integral, in which nothing cancels. sum_j a_ij = c_i phi_1(c_i z), which is DDIM,
so tables list j >= 1 only.

A table has a member for every smaller number of evaluations. Budgets, alpha = 0, sigma = 0, integer
times: see `_singlestep`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .._prediction import unknown
from .._process import Level, Process
from .._weights import _W, _X, FORMS, scale, weights
from ._base import Formula
from ._singlestep import Singlestep, mixed, slope

__all__ = [
    "PhiTable",
    "Tableau",
    "exponential_runge_kutta",
    "phi_tables",
    "runge_kutta",
    "tableaus",
]


class Tableau(NamedTuple):
    """Explicit Runge-Kutta: rows of a below the first, b, order."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    @property
    def c(self) -> tuple[float, ...]:
        """Places of the inner states, as shares of the step."""
        return tuple(math.fsum(row) for row in self.a)


def _two(c: float) -> Tableau:
    """The two-stage method with its inner state at c: midpoint, Ralston, Heun."""
    return Tableau(((c,),), (1 - 0.5 / c, 0.5 / c), 2)


#: Explicit methods by name; DEIS's names where it has them.
tableaus: Mapping[str, Tableau] = {
    "midpoint": _two(0.5),
    "ralston": _two(2 / 3),
    "2heun": _two(1.0),
    "3kutta": Tableau(((0.5,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6), 3),
    "3ral": Tableau(((0.5,), (0.0, 0.75)), (2 / 9, 3 / 9, 4 / 9), 3),
    "3heun": Tableau(((1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3),
    "3vdh": Tableau(((8 / 15,), (0.25, 5 / 12)), (0.25, 0.0, 0.75), 3),
    "3ssprk": Tableau(((1.0,), (0.25, 0.25)), (1 / 6, 1 / 6, 4 / 6), 3),
    "4rk": Tableau(((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 2 / 6, 2 / 6, 1 / 6), 4),
    "38": Tableau(((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4),
    "merson": Tableau(
        ((1 / 3,), (1 / 6, 1 / 6), (1 / 8, 0.0, 3 / 8), (0.5, 0.0, -1.5, 2.0)),
        (1 / 6, 0.0, 0.0, 4 / 6, 1 / 6),
        4,
    ),
    "dormand_prince": Tableau(
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        5,
    ),
}
#: Members of fewer evaluations, by their number.
_LOWER = {2: "2heun", 3: "3kutta", 4: "4rk", 5: "merson"}

#: coefficient, k, c: a multiple of phi_k(c z).
_Phi = tuple[float, int, float]


class PhiTable(NamedTuple):
    """Exponential Runge-Kutta: c of the inner states; for every inner state and the target, j ->
    weight of stage j >= 1 as terms (v, k, c) of the sum of v phi_k(c z); classical order."""

    c: tuple[float, ...]
    rows: tuple[Mapping[int, tuple[_Phi, ...]], ...]
    order: int


_THIRDS = {1: ((4.0, 2, 1.0), (-8.0, 3, 1.0)), 2: ((-1.0, 2, 1.0), (4.0, 3, 1.0))}
_OUTER = ((2.0, 2, 1.0), (-4.0, 3, 1.0))
_A52 = ((0.5, 2, 0.5), (-1.0, 3, 1.0), (0.25, 2, 1.0), (-0.5, 3, 0.5))
#: Exponential methods by name.
phi_tables: Mapping[str, PhiTable] = {
    "etd2rk": PhiTable((1.0,), ({}, {1: ((1.0, 2, 1.0),)}), 2),
    "etd3rk": PhiTable((0.5, 1.0), ({}, {1: ((2.0, 1, 1.0),)}, _THIRDS), 3),
    "krogstad": PhiTable(
        (0.5, 0.5, 1.0),
        (
            {},
            {1: ((1.0, 2, 0.5),)},
            {2: ((2.0, 2, 1.0),)},
            {1: _OUTER, 2: _OUTER, 3: ((-1.0, 2, 1.0), (4.0, 3, 1.0))},
        ),
        4,
    ),
    "hochbruck_ostermann": PhiTable(
        (0.5, 0.5, 1.0, 0.5),
        (
            {},
            {1: ((1.0, 2, 0.5),)},
            {1: ((1.0, 2, 1.0),), 2: ((1.0, 2, 1.0),)},
            {1: _A52, 2: _A52, 3: ((0.25, 2, 0.5), *((-c, k, x) for c, k, x in _A52))},
            {3: ((-1.0, 2, 1.0), (4.0, 3, 1.0)), 4: ((4.0, 2, 1.0), (-8.0, 3, 1.0))},
        ),
        4,
    ),
}


def phi(k: int, z: float) -> float:
    """phi_k(z), k >= 1, free of cancellation for any real z."""
    parts = math.ceil(abs(z)) + 1
    u = (np.arange(parts)[:, None] + _X) / parts
    kernel = np.exp((1 - u) * z) * u ** (k - 1)
    return float((kernel * (_W / parts)).sum()) / math.factorial(k - 1)


def runge_kutta(
    table: str | Tableau,
    *,
    form: Literal["data", "noise", "v", "flow", "lambda"] = "noise",
    placed: Literal["own", "t"] = "own",
    name: str | None = None,
    source: str = "explicit Runge-Kutta",
    fragile: str = "",
    aliases: tuple[str, ...] = (),
) -> Singlestep:
    """An explicit Runge-Kutta method, one NFE per stage.

    table: a name in `fewstep.tableaus`, or a `Tableau`.
    form: the clock: "noise" (rho = sigma / alpha), "flow" (sigma / (alpha + sigma)), "v" (the
        angle), "data" (alpha / sigma), "lambda" (D - x / alpha, not an exponential method).
    placed: whether inner states are at shares c_i of the step in that clock, or of the time t
        (PNDM; at most second order).
    """
    for argument, value, known in (
        ("form", form, (*FORMS, "lambda")),
        ("placed", placed, ("own", "t")),
    ):
        if value not in known:
            raise ValueError(unknown(argument, value, known))
    if isinstance(table, str):
        if table not in tableaus:
            raise ValueError(unknown("table", table, tuple(tableaus)))
        label, table = table, tableaus[table]
    else:
        label = f"{len(table.b)} stages"
    _check(table)
    count = len(table.b)
    members = (*(tableaus[_LOWER[k]] for k in range(2, min(count, 6))), table)
    if placed == "t":
        members = tuple(m._replace(order=min(m.order, 2)) for m in members)
    step = _Explicit(form, members, placed == "t")
    pure = form in ("v", "flow")
    ends = "no start-up; at sigma = 0 order 1"
    if not pure:
        ends += "; at alpha = 0 midpoint in alpha / sigma"
    return Singlestep(
        name=name or f"runge_kutta({label}, {form}{', in t' if placed == 't' else ''})",
        order=members[-1].order,
        inner=step.inner,
        stages=step,
        source=source,
        ends=ends,
        nfe_per_step=count,
        pure=pure,
        fragile=fragile,
        aliases=aliases,
    )


def _check(table: Tableau) -> None:
    lengths = [len(row) for row in table.a]
    if lengths != list(range(1, len(table.b))) or len(table.b) < 2:
        raise ValueError(
            f"table: rows of {lengths} numbers and {len(table.b)} weights; need two stages or "
            "more, with rows of 1, 2, ... and one weight per stage"
        )
    if abs(math.fsum(table.b) - 1) > 1e-12 or min(table.c) <= 0 or max(table.c) > 1:
        raise ValueError(
            f"table: weights sum to {math.fsum(table.b):g} and stages are at {table.c}; need a "
            "sum of 1 and places in (0, 1]"
        )


@dataclass(frozen=True)
class _Explicit:
    """Rows of explicit tables; members by their number of evaluations, from 2."""

    form: str
    members: tuple[Tableau, ...]
    in_time: bool

    def inner(self, process: Process, start: Level, end: Level, count: int) -> list[float]:
        """Times of zeta_s + c_i (zeta_t - zeta_s)."""
        c = self.members[count - 2].c
        if self.in_time:
            return [end.t if v == 1 else (1 - v) * start.t + v * end.t for v in c]
        return [end.t if v == 1 else _between(self.form, process, start, end, v) for v in c]

    def __call__(self, process: Process, levels: Sequence[Level], end: Level) -> list[Formula]:
        table, start = self.members[len(levels) - 2], levels[0]
        out = []
        for target, row in zip((*levels[1:], end), (*table.a, table.b), strict=True):
            nodes, c = levels[: len(row)], math.fsum(row)
            span = _span(self.form, start, target) / c
            order = table.order if target is end and row is table.b else _order(table.c, row)
            out.append(self._row(nodes, target, [span * v for v in row], order))
        return out

    def _row(self, nodes: Sequence[Level], end: Level, W: Sequence[float], order: int) -> Formula:
        if self.form in ("data", "noise", "flow"):
            return mixed(self.form, nodes, end, W, order)
        slopes = [slope(self.form, node) for node in nodes]
        a = [w * x for w, (x, _) in zip(W, slopes, strict=True)]
        a[0] += _scale(self.form, end) / _scale(self.form, nodes[0])
        return Formula(a, [w * d for w, (_, d) in zip(W, slopes, strict=True)], order, False)


def _scale(form: str, level: Level) -> float:
    return level.alpha if form == "lambda" else scale(form, level)


def _span(form: str, start: Level, end: Level) -> float:
    """N_t (zeta_t - zeta_s)."""
    if form == "lambda":
        return end.alpha * (end.lam - start.lam)
    return float(weights(form, "own", start, end, [start])[0])


def _between(form: str, process: Process, start: Level, end: Level, c: float) -> float:
    """The time of zeta_s + c (zeta_t - zeta_s)."""
    s, t = start.lam, end.lam
    if form == "lambda":
        lam = s + c * (t - s)
    elif form == "noise":
        lam = -math.log((1 - c) * math.exp(-s) + c * math.exp(-t))
    elif form == "data":
        lam = math.log((1 - c) * math.exp(s) + c * math.exp(t))
    elif form == "flow":
        alpha, sigma = (
            (1 - c) * getattr(start, part) / scale(form, start)
            + c * getattr(end, part) / scale(form, end)
            for part in ("alpha", "sigma")
        )
        lam = math.log(alpha / sigma)
    else:
        turn = [math.atan2(v.sigma, v.alpha) for v in (start, end)]
        lam = -math.log(math.tan((1 - c) * turn[0] + c * turn[1]))
    return float(process.time(lam))


def _order(c: Sequence[float], row: Sequence[float]) -> int:
    """Order of an inner state: how far its weights integrate powers."""
    end, order = math.fsum(row), 1
    nodes = (0.0, *c[: len(row) - 1])
    while order < len(row) and math.isclose(
        sum(v * n**order for v, n in zip(row, nodes, strict=True)), end ** (order + 1) / (order + 1)
    ):
        order += 1
    return order


def exponential_runge_kutta(
    table: str | PhiTable,
    *,
    form: Literal["data", "noise"] = "data",
    name: str | None = None,
    source: str = "exponential Runge-Kutta",
    aliases: tuple[str, ...] = (),
) -> Singlestep:
    """An exponential Runge-Kutta method in lambda, one NFE per stage.

    table: "etd2rk", "etd3rk" (Cox and Matthews), "krogstad" (4 stages, order 4),
        "hochbruck_ostermann" (5 stages, order 4 also where h is large), or a `PhiTable` of 2 to 6
        stages; steps that can spend fewer evaluations take a named method of as many.
    """
    if form not in ("data", "noise"):
        raise ValueError(unknown("form", form, ("data", "noise")))
    title = table if isinstance(table, str) else "own table"
    if isinstance(table, str):
        if table not in phi_tables:
            raise ValueError(unknown("table", table, tuple(phi_tables)))
        table = phi_tables[table]
    count = len(table.rows)
    early = any(j >= i for i, row in enumerate(table.rows, 1) for j in row)
    if not 2 <= count <= 6 or len(table.c) != count - 1 or early or not all(table.c):
        raise ValueError(
            f"table has {count} rows and {len(table.c)} inner places; need 2 to 6 rows, one place "
            "(not 0) fewer, and row i over the stages 1 to i - 1"
        )
    step = _Etd(form, (*(t for t in phi_tables.values() if len(t.rows) < count), table))
    return Singlestep(
        name=name or f"exponential_runge_kutta({title}, {form})",
        order=table.order,
        inner=step.inner,
        stages=step,
        source=source,
        ends="no start-up; at sigma = 0 order 1; at alpha = 0 midpoint in alpha / sigma",
        nfe_per_step=count,
        aliases=aliases,
    )


@dataclass(frozen=True)
class _Etd:
    """Rows of exponential tables; members by their number of evaluations, from 2."""

    form: str
    members: tuple[PhiTable, ...]

    def inner(self, process: Process, start: Level, end: Level, count: int) -> list[float]:
        """Times of lambda_s + c_i h."""
        c = self.members[count - 2].c
        return [end.t if v == 1 else _between("lambda", process, start, end, v) for v in c]

    def __call__(self, process: Process, levels: Sequence[Level], end: Level) -> list[Formula]:
        table = self.members[len(levels) - 2]
        h = end.lam - levels[0].lam
        z = -h if self.form == "data" else h
        out = []
        for i, (target, row) in enumerate(zip((*levels[1:], end), table.rows, strict=True), 1):
            kernel = h * target.alpha if self.form == "data" else -h * target.sigma
            W = [0.0] * i
            for j, terms in row.items():
                W[j] = kernel * math.fsum(v * phi(k, c * z) for v, k, c in terms)
            order = table.order
            if i < len(table.rows):
                limit = [sum(v / math.factorial(k) for v, k, _ in row.get(j, ())) for j in range(i)]
                limit[0] = table.c[i - 1] - sum(limit)
                order = _order(table.c, limit)
            out.append(mixed(self.form, levels[:i], target, W, order))
        return out
