"""Plans from plans, by algebra on their rows: canonical form, fusion, exact inversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ._combine import KERNEL
from ._plan import Call, Plan, Row
from ._process import Array

__all__ = ["canonical", "cheapest", "fuse", "inverse"]

#: ("X", j), ("D", j), ("Z", m), or the constant _ONE
_Symbol = tuple[str, int]
_Terms = dict[_Symbol, Any]
_ONE: _Symbol = ("1", 0)


def _terms(row: Row) -> _Terms:
    parts = (("X", row.a), ("D", row.b), ("Z", row.e))
    out = {(kind, j): c for kind, terms in parts for j, c in terms.items()}
    return {**out, _ONE: row.c} if row.shifts else out


def _add(total: _Terms, factor: Any, terms: Mapping[_Symbol, Any]) -> None:
    for symbol, c in terms.items():
        total[symbol] = total.get(symbol, 0.0) + factor * c


def _rows(plan: Plan) -> Iterator[tuple[int, Row]]:
    """(index of the state, its row in data predictions)."""
    for made, row in enumerate(plan.rows, plan.given):
        yield made, plan.data_row(row)


def canonical(plan: Plan) -> tuple[Array, ...]:
    """Every asked state, and the result, over the given states and the data predictions (and, in a
    third table, the draws, if there are any; with constants the fourth table is these)."""
    inside: list[_Terms] = [{("X", j): 1.0} for j in range(plan.given)]
    for _, row in _rows(plan):
        total: _Terms = {}
        for (kind, j), c in _terms(row).items():
            _add(total, c, inside[j] if kind == "X" else {(kind, j): 1.0})
        inside.append(total)
    asked = [k for k, call in enumerate(plan.calls) if call is not None]
    shown = [inside[k] for k in (*asked, len(plan.levels) - 1)]

    shape = np.broadcast_shapes(*(np.shape(c) for terms in shown for c in terms.values()))

    def table(symbols: list[_Symbol]) -> Array:
        rows = [[np.broadcast_to(terms.get(s, 0.0), shape) for s in symbols] for terms in shown]
        return np.array(rows, dtype=np.float64).reshape(len(shown), len(symbols), *shape)

    a = table([("X", j) for j in range(plan.given)])
    a, b = (a[:, 0] if plan.given == 1 else a), table([("D", j) for j in asked])
    z = table([("Z", m) for m in range(len(plan.draws))])
    if any(row.shifts for row in plan.rows):
        return a, b, z, table([_ONE])[:, 0]
    return (a, b, z) if plan.draws else (a, b)


def cheapest(plan: Plan, one_pass: bool = KERNEL) -> Plan:
    """Of the equal forms of a plan the one whose run moves the least memory.

    Folding D = p x + q out into rows saves the pass that makes D. Where the network does not
    predict what the solver interpolates, every past D then becomes a past state and a past output:
    in one pass over all of them that is still less, up to three; with kernels that add one tensor
    at a time (`fewstep._combine.KERNEL` is False) it is more from order 3 on, and then only the
    states that are never asked about go.
    """
    if plan.raw:
        return plan
    forms = (fuse(plan), fuse(plan, outputs=False), plan)
    return min(forms, key=lambda form: _traffic(form, one_pass))


def _traffic(plan: Plan, one_pass: bool) -> int:
    """Tensors read and written by a run."""

    def cost(terms: int) -> int:
        return terms + 1 if one_pass or terms == 1 else 3 * (terms - 1)

    total = sum(cost(len(row.a) + len(row.b) + len(row.e)) + 2 * row.shifts for row in plan.rows)
    if not plan.raw:
        calls = [c for c in plan.calls if c and (np.any(c.p != 0) or np.any(c.q != 1))]
        total += sum(cost(1 + bool(np.any(c.p != 0))) for c in calls)
    return total


def fuse(plan: Plan, outputs: bool = True) -> Plan:
    """States that are never asked about are eliminated, and (with `outputs`) D = p x + q out is
    folded into rows.

    A corrected state u and the predicted state e of the same step start from the same state w:
    u = (u/e coefficient of w) e + data predictions, so that no older state has to be kept.
    """
    if plan.raw:
        return plan
    last = len(plan.levels) - 1
    stays = [
        k < plan.given or k == last or k in plan.keep or call is not None
        for k, call in enumerate(plan.calls)
    ]
    rows = dict(_rows(plan))
    gone: dict[int, _Terms] = {}  # eliminated states, over states that stay and data predictions
    exact: dict[int, bool] = {}
    out: list[Row] = []
    for made, row in rows.items():
        total, exact[made] = _terms(row), row.exact
        if not stays[made] and (rewritten := _from_newest(made, row, rows, stays)):
            total = rewritten
            exact[made] &= rows[max(k for k in range(made) if stays[k])].exact
        for j in [j for kind, j in list(total) if kind == "X" and not stays[j]]:
            _add(total, total.pop(("X", j)), gone[j])
            exact[made] &= exact[j]
        if stays[made]:
            row = replace(row, exact=exact[made])
            out.append(_raw(plan, total, row) if outputs else _plain(total, row))
        else:
            gone[made] = total
    new = {k: i for i, k in enumerate(k for k, stay in enumerate(stays) if stay)}
    renumbered = tuple(
        Row(
            {new[j]: c for j, c in row.a.items()},
            {new[j]: c for j, c in row.b.items()},
            row.order,
            row.exact,
            row.e,
            row.c,
        )
        for row in out
    )
    return Plan(
        tuple(plan.levels[k] for k in new),
        renumbered,
        tuple(plan.calls[k] for k in new),
        plan.integer_times,
        plan.prior_std,
        {**plan.about, "fused": "yes"},
        plan.given,
        tuple(new[k] for k in plan.keep),
        plan.basis,
        raw=outputs,
        draws=plan.draws,
        axis=plan.axis,
        origin=plan.origin,
    )


def _plain(total: _Terms, row: Row) -> Row:
    a = {j: c for (kind, j), c in total.items() if kind == "X" and np.any(c != 0)}
    b = {j: c for (kind, j), c in total.items() if kind == "D" and np.any(c != 0)}
    return Row(a, b, row.order, row.exact, _drawn(total), total.get(_ONE, 0.0))


def _drawn(total: _Terms) -> dict[int, Any]:
    return {m: c for (kind, m), c in total.items() if kind == "Z" and np.any(c != 0)}


def _from_newest(made: int, row: Row, rows: Mapping[int, Row], stays: list[bool]) -> _Terms | None:
    """A row that starts from an older state, rewritten to start from the newest that stays."""
    total = _terms(row)
    newest = max(k for k in range(made) if stays[k])
    if newest not in rows:
        return None
    shared = [j for j in row.a if j in rows[newest].a]
    shared = [j for j in shared if not stays[j]] or shared
    if len(shared) != 1 or np.any(np.asarray(rows[newest].a[shared[0]]) == 0):
        return None
    factor = row.a[shared[0]] / rows[newest].a[shared[0]]
    _add(total, factor, {("X", newest): 1.0})
    _add(total, -factor, _terms(rows[newest]))
    del total["X", shared[0]]
    return total


def _raw(plan: Plan, total: _Terms, row: Row) -> Row:
    a: dict[int, Any] = {}
    b: dict[int, Any] = {}
    size: dict[int, Any] = {}
    for (kind, j), c in total.items():
        if kind == "X":
            a[j] = a.get(j, 0.0) + c
            size[j] = size.get(j, 0.0) + np.abs(c)
        elif kind == "D":
            call = plan.calls[j]
            assert call is not None  # checked when the plan was made
            b[j] = c * call.q
            a[j] = a.get(j, 0.0) + c * call.p
            size[j] = size.get(j, 0.0) + np.abs(c * call.p)
    # What cancels (noise-form rows on a network that predicts noise) is left at rounding.
    a = {j: c for j, c in a.items() if np.any(np.abs(c) > 1e-14 * size[j])}
    b = {j: c for j, c in b.items() if np.any(c != 0)}
    return Row(a, b, row.order, row.exact, _drawn(total), total.get(_ONE, 0.0))


def inverse(plan: Plan) -> Plan:
    """The rows solved for their oldest states, from the end: exact inversion.

    From the states that are known, and the network at them, a row with one unknown state gives that
    state; rows that make a state from known ones (probes) are taken as they are. Methods that carry
    two states (BDIA, EDICT) get back to their start in this way; multistep and Runge-Kutta methods
    do not, since their oldest state enters through the network.

    The result hands over as many states as it starts from, and its own inverse goes the way of
    `plan` again, from those.
    """
    if plan.raw:
        raise ValueError("plan: a fused plan cannot be inverted; invert it unfused")
    if plan.draws:
        raise ValueError("plan: it draws noise; only deterministic plans can be inverted")
    last = len(plan.levels) - 1
    where = {k: i for i, k in enumerate((last, *plan.keep))}  # known states, in order
    rows: list[Row] = []
    todo = dict(reversed(list(_rows(plan))))
    name = plan.about.get("solver", "this plan")
    while not all(k in where for k in range(plan.given)):
        for made, row in todo.items():
            unknown = {j for j in (made, *row.a, *row.b) if j not in where}
            if unknown == {made} or (len(unknown) == 1 and unknown.isdisjoint((made, *row.b))):
                break
        else:
            raise ValueError(
                f"plan: {name} is not reversible: no row gives a state before t = "
                f"{plan.levels[min(where)].t:g} without the network there; reversible solvers say "
                "so (`reversible`), or approximate with upward=True"
            )
        (j,) = unknown
        a, b = ({where[i]: v for i, v in terms.items() if i in where} for terms in (row.a, row.b))
        constant = row.c
        if j != made:
            share = row.a[j]
            a, b = ({i: -v / share for i, v in terms.items()} for terms in (a, b))
            a[where[made]] = a.get(where[made], 0.0) + 1.0 / share
            constant = -constant / share
        rows.append(Row(a, b, row.order, row.exact, c=constant))
        where[j] = len(where)
        del todo[made]
    if not rows:
        raise ValueError(f"plan: {name} hands over all that it starts from; nothing to invert")
    used = {i for row in rows for i in row.b}
    calls: list[Call | None] = [plan.calls[k] if where[k] in used else None for k in where]
    made_here = [k for k, _ in _rows(plan) if k not in todo]  # by the rows that were used
    ends = [i for k, i in where.items() if k not in made_here]
    return Plan(
        tuple(plan.levels[k] for k in where),
        tuple(rows),
        tuple(calls),
        plan.integer_times,
        1.0,
        {**plan.about, "direction": "upward, exact inverse"},
        1 + len(plan.keep),
        tuple(sorted(set(ends) - {len(where) - 1})),
        plan.basis,
    )
