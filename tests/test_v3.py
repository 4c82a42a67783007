"""DPM-Solver-v3: its special cases, its integrals, its ends. Parity is in test_parity.py, order and
ends of the registered ones in test_solvers.py."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import fewstep as fs
from fewstep._analysis import orders
from fewstep._calibrate._ems import EMS
from fewstep._solvers._v3 import dpm_solver_v3
from test_solvers import error

PROCESSES = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow()}


def flat(l: float, s: float, low: float = -8.0, high: float = 60.0) -> EMS:
    """A table of constants."""
    one = np.ones(7)
    return EMS(np.linspace(low, high, 7), l * one, s * one, 0 * one)


def rough(count: int = 7, size: tuple[int, ...] = (3,), b: float = 1.0, seed: int = 0) -> EMS:
    """A table that no formula simplifies, linear between values that jump."""
    rng = np.random.default_rng(seed)
    lam = -2.0 + np.cumsum(rng.uniform(0.2, 1.2, count))
    l, s, c = rng.normal(size=(3, count, *size))
    return EMS(lam, 0.5 + 0.4 * l, -0.5 + 0.5 * s, b * c)


def refined(ems: EMS, parts: int) -> EMS:
    """The same functions of lambda, on more values."""
    lam = np.concatenate([np.linspace(*v, parts, endpoint=False) for v in pairwise(ems.lam)])
    lam = np.append(lam, ems.lam[-1])

    def at(v: np.ndarray) -> np.ndarray:
        columns = [np.interp(lam, ems.lam, c) for c in v.reshape(len(v), -1).T]
        return np.stack(columns, -1).reshape(len(lam), *v.shape[1:])

    return EMS(lam, at(ems.l), at(ems.s), at(ems.b))


def gap(one: fs.Plan, other: fs.Plan) -> float:
    """Largest difference of two plans' coefficients, relative to the largest coefficient."""
    worst = 0.0
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        assert mine.order == theirs.order
        size = max(np.max(np.abs(c)) for c in (*mine.coefficients, *theirs.coefficients, 1.0))
        for p, q in ((mine.a, theirs.a), (mine.b, theirs.b), ({0: mine.c}, {0: theirs.c})):
            for j in {*p, *q}:
                worst = max(worst, np.max(np.abs(p.get(j, 0.0) - q.get(j, 0.0))) / size)
    return worst


@pytest.mark.parametrize("growth", [1.5, math.inf])
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("form", "l", "s"), [("data", 1.0, 0.0), ("noise", 0.0, -1.0)])
def test_special_statistics_are_the_exponential_solvers(form, l, s, order, name, growth):
    """l = 1, s = b = 0 and l = 0, s = -1, b = 0: to rounding, on every grid and to both ends."""
    ours = dpm_solver_v3(flat(l, s), order, corrector="none", lower_final=False, growth=growth)
    plain = fs.exponential(order, form=form, growth=growth)
    for settings in ({}, {"final": "min"}, {"upward": True}, {"grid": "uniform"}):
        plans = [fs.plan(v, PROCESSES[name], 7, **settings) for v in (ours, plain)]
        assert gap(*plans) < 1e-12, settings


def test_special_statistics_and_the_corrector():
    """A corrector through p + 1 nodes is UniC's, with derivatives of the polynomial: compare
    order 1, where divided differences are these."""
    ours = dpm_solver_v3(flat(1.0, 0.0), 1, corrector_pseudo=True, lower_final=False)
    assert gap(*(fs.plan(v, fs.VP(), 6) for v in (ours, fs.exponential(1, corrector=True)))) < 1e-13


def test_closed_form_of_gaussian_data():
    """Of order 1 it is Euler in the angle at the data's scale; a table of the closed form tends to
    it as the square of its cells."""
    first = dpm_solver_v3(order=1, corrector="none")
    for process in (fs.VP(), fs.EDM()):  # from alpha = 0 this one begins with DDIM
        assert gap(fs.plan(first, process, 6), fs.plan("angle_ab1", process, 6)) < 1e-13
    exact = fs.plan(dpm_solver_v3(), fs.VP(), 6, final="min")
    gaps = []
    for count in (100, 1600):
        table = EMS.gaussian(fs.VP(), 0.5, count=count)
        gaps.append(gap(exact, fs.plan(dpm_solver_v3(table), fs.VP(), 6, final="min")))
    assert gaps[1] < min(5e-6, gaps[0] / 100)


class Course:
    """A solution on which the method of `order` nodes makes no error, whatever the table is:

    dy = -l y - f,    df = s f + b + e^S p',    D = (1 - l) y - f,    p of degree order - 1
    """

    def __init__(self, ems: EMS, order: int, lam: np.ndarray) -> None:
        size = ems.size
        slope = np.polynomial.Polynomial(np.arange(1.0, order)) if order > 1 else lambda _: 0.0
        state = np.stack([np.full(size, 0.7), np.full(size, -0.4), np.zeros(size)])
        columns = {k: v.reshape(len(ems.lam), -1).T for k, v in vars(ems).items() if k in "lsb"}

        def at(k: str, u: float) -> np.ndarray:
            return np.array([np.interp(u, ems.lam, c) for c in columns[k]]).reshape(size)

        def rate(u: float, v: np.ndarray) -> np.ndarray:
            y, f, S = v.reshape(3, *size)
            l, s, b = (at(k, u) for k in "lsb")
            return np.stack([-l * y - f, s * f + b + np.exp(S) * slope(u), s]).ravel()

        self.y, self.D = [], []
        for i, end in enumerate(lam):
            if i:  # piece by piece: the right side has kinks
                low, high = sorted((lam[i - 1], end))
                inner = ems.lam[(ems.lam > low) & (ems.lam < high)]
                for a, b in pairwise(
                    [low, *inner, high] if low < end else [high, *inner[::-1], low]
                ):
                    found = solve_ivp(rate, (a, b), state.ravel(), "DOP853", rtol=1e-12, atol=1e-13)
                    state = found.y[:, -1].reshape(state.shape)
            y, f, _ = state
            self.y.append(y)
            self.D.append((1 - at("l", end)) * y - f)


@pytest.mark.parametrize("upward", [False, True])
@pytest.mark.parametrize("corrector", ["none", "full"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_where_what_is_left_is_a_polynomial(order, corrector, upward):
    """Every integral, on any lambda inside and outside the table, in both directions. States before
    the run are part of the course: the first steps are not exact."""
    ems = rough()
    process = fs.VP()
    lam = np.linspace(-2.6, 4.1, 9)[:: -1 if upward else 1]
    assert lam.min() < ems.lam[0]
    assert lam.max() > ems.lam[-1]
    solver = dpm_solver_v3(ems, order, corrector=corrector, lower_final=False, growth=math.inf)
    plan = fs.plan(solver, process, grid=process.time(lam).tolist(), upward=upward)
    course = Course(ems, order, lam)
    node = {t: i for i, t in enumerate(plan.origin.times)}
    states = {0: course.y[0] * plan.levels[0].alpha}
    for k, row in enumerate(plan.rows, 1):
        i = node[plan.levels[k].t]
        true = course.y[i] * plan.levels[k].alpha
        made = row.c + sum(c * states[j] for j, c in row.a.items())
        made = made + sum(c * course.D[node[plan.levels[j].t]] for j, c in row.b.items())
        if row.order == order:
            np.testing.assert_allclose(made, true, rtol=1e-9, atol=1e-9)
        states[k] = true
    assert sum(row.order == order for row in plan.rows) >= 6


@pytest.mark.parametrize("b", [0.0, 1.0])
def test_integrals_do_not_depend_on_how_finely_a_table_is_given(b):
    """Linear pieces cut in 5 and in 60 parts, which other sums integrate: the same rows."""
    ems = rough(b=b)
    plans = [
        fs.plan(dpm_solver_v3(refined(ems, parts)), fs.EDM(), 6, final="min")
        for parts in (1, 5, 60)
    ]
    assert gap(plans[0], plans[1]) < 1e-12
    assert gap(plans[0], plans[2]) < 1e-12


def test_the_trapezoid_rule_tends_to_the_exact_one():
    gaps = []
    for parts in (10, 20, 40):
        ems = refined(rough(), parts)
        rules = [dpm_solver_v3(ems, rule=v, growth=math.inf) for v in ("exact", "trapezoid")]
        times = fs.VP().time(np.linspace(ems.lam[0], ems.lam[-1], 6)).tolist()
        gaps.append(gap(*(fs.plan(v, fs.VP(), grid=times) for v in rules)))
    assert gaps[2] < 1e-2
    assert np.diff(np.log2(gaps)) == pytest.approx(-2.0, abs=0.2)


@pytest.mark.parametrize(
    ("order", "settings", "declared"),
    [
        (1, {"corrector_pseudo": True}, 2),
        (2, {"corrector": "none"}, 2),
        (3, {"corrector": "none", "pseudo": True}, 2),
        (3, {"corrector_pseudo": True}, 2),
        (3, {"corrector": "none"}, 3),
        (4, {}, 4),
    ],
)
def test_orders(order, settings, declared):
    """Also on uneven steps; divided differences alone stop at order 2."""
    solver = dpm_solver_v3(None, order, **settings)
    assert solver.order == declared
    sizes = np.array([80, 160, 320])
    errors = [error(solver, fs.EDM(), n, "alternating 1:3") for n in sizes]
    assert -np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(declared, abs=0.25)


def test_order_of_a_plan_with_constants():
    """Constants count in the order of the steps: without them rows are not even consistent."""
    lam = np.array([-9.0, 9.0])  # linear: without kinks
    ems = EMS(lam, np.array([1.0, 0.1]), np.array([0.5, -1.0]), np.array([0.6, 0.2]))
    plan = fs.plan(dpm_solver_v3(ems), fs.VP(), 12, final="min", grid="lambda")
    assert any(row.shifts for row in plan.rows)
    assert orders(plan).bulk == pytest.approx(3, abs=0.1)
    limit = plan.stability().limit
    without = replace(plan, rows=tuple(replace(row, c=0.0) for row in plan.rows))
    assert limit == without.stability().limit
    assert "dy / dlambda = -l y - f" in plan.explain()


# -- ends ------------------------------------------------------------------------------------------


def test_beyond_a_table_the_last_step_keeps_the_data_prediction():
    """x = alpha_t D, with D where the table ends, as the formula has it there."""
    process = fs.Flow()
    for last, beyond in ((2.0, False), (0.5, True)):
        rng = np.random.default_rng(1)
        l, s, b = 0.3 + 0.2 * rng.random((3, 5, 2))
        ems = EMS(np.linspace(-3.0, last, 5), l, -s, b)
        solver = dpm_solver_v3(ems, 1, corrector="none")
        times = [float(process.time(v)) for v in (-1.0, 1.0)]
        row = fs.plan(solver, process, grid=[*times, 0.0]).rows[1]
        if beyond:
            assert (row.a, row.b, row.c) == ({}, {1: 1.0}, 0.0)
            continue
        end = process.level(float(process.time(last)))
        toward = fs.plan(solver, process, grid=[*times, end.t]).rows[1]
        start = process.level(times[1])
        x, data = np.array([0.4, -0.2]), np.array([0.3, 0.1])
        y = (toward.a[1] * x + toward.b[1] * data + toward.c) / end.alpha
        inside = np.linspace(1.0, last, 20001)
        at = {
            k: [np.interp(inside, ems.lam, c) for c in v.T]
            for k, v in zip("lsb", (l, -s, b), strict=True)
        }
        for i in range(2):
            f = (1 - at["l"][i][0]) * x[i] / start.alpha - data[i]
            S = np.concatenate([[0.0], np.cumsum((at["s"][i][1:] + at["s"][i][:-1]) / 2)])
            S *= inside[1] - inside[0]
            f = math.exp(S[-1]) * (f + np.trapezoid(np.exp(-S) * at["b"][i], inside))
            want = (1 - at["l"][i][-1]) * y[i] - f
            got = row.a[1][i] * x[i] + row.b[1][i] * data[i] + row.c[i]
            assert got == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("ems", [None, rough(b=0.5)], ids=["closed form", "table"])
def test_first_and_last_steps_where_lambda_is_infinite(ems):
    process = fs.Flow()
    down = fs.plan(dpm_solver_v3(ems), process, 6)
    up = fs.plan(dpm_solver_v3(ems), process, 6, upward=True)
    plain = fs.plan("ddim", process, grid=down.origin.times).rows[0]
    assert down.levels[0].alpha == 0
    assert (down.rows[0].a, down.rows[0].b) == (plain.a, plain.b)
    last = up.rows[-1]
    assert up.levels[-1].alpha == 0
    assert (last.exact, last.order, len(last.b)) == (True, 1, 1)
    for plan in (down, up):
        assert all(np.isfinite(c).all() for row in plan.rows for c in row.coefficients)


@pytest.mark.parametrize(("side", "corrected"), [("above", [1, 2]), ("below", [3, 4, 5])])
def test_half_of_the_states_are_corrected(side, corrected):
    solver = dpm_solver_v3(None, 2, corrector=side, threshold=0.5)
    times = [1.0, 0.8, 0.6, 0.5, 0.3, 0.1, 0.0]
    plan = fs.plan(solver, fs.Flow(), grid=times)
    again = [a.t for a, b in pairwise(plan.levels) if a == b]
    assert again == [times[i] for i in corrected if i > 1]  # the first step is from alpha = 0
    on_vp = fs.plan(solver, fs.VP(), grid=[1.0, 0.8, 0.6, 0.5, 0.3, 0.1, 0.001])
    assert [a.t for a, b in pairwise(on_vp.levels) if a == b] == [
        times[i] for i in corrected if i > 1
    ]


def test_coordinates_that_would_amplify_take_fewer_nodes():
    """After short steps a long one: too long for the data form; the kernel of the other coordinate
    has decayed before the polynomial is far from its nodes."""
    lam = np.linspace(-5.0, 12.0, 30)
    one = np.ones(30)
    ems = EMS(lam, *(np.stack(v, 1) for v in ((one, 0 * one), (0 * one, -4 * one), (0 * one,) * 2)))
    times = fs.VP().time(np.array([-2.0, -1.8, -1.6, -1.4, 2.0])).tolist()
    guarded, free = (
        fs.plan(
            dpm_solver_v3(ems, corrector="none", lower_final=False, growth=growth),
            fs.VP(),
            grid=times,
        )
        for growth in (1.5, math.inf)
    )
    last, whole = guarded.rows[-1], free.rows[-1]
    assert (last.order, whole.order) == (1, 3)
    assert last.b[2][0] == 0 != whole.b[2][0]
    assert last.b[2][1] != 0


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(), (3, 1, 1), (3, 4, 5), (5,)])
def test_statistics_of_any_size_run_and_fuse(size):
    plan = fs.plan(dpm_solver_v3(rough(9, size, 0.3)), fs.VP(), 5, predicts="noise")
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(plan: fs.Plan) -> torch.Tensor:
        state = plan.start(x)
        while not state.done:
            state = state.advance(torch.tanh(state.query()[0]))
        return state.x

    want = run(plan)
    assert want.shape == x.shape
    for form in (plan.fuse(), plan.cheapest, plan.cheapest_on("cuda")):
        torch.testing.assert_close(run(form), want, rtol=1e-9, atol=1e-9)


def test_statistics_of_another_size_are_refused():
    plan = fs.plan(dpm_solver_v3(rough(9, (4, 1))), fs.VP(), 3)
    for shape in ((4, 4), (2, 3, 7), (4,)):
        with pytest.raises(ValueError, match=r"coefficients of shape \(4, 1\)"):
            plan.start(torch.zeros(shape))
    assert plan.start(torch.zeros(2, 4, 7)).x.shape == (2, 4, 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"order": 0}, "order = 0"),
        ({"order": 5}, "order = 5"),
        ({"order": True}, "order = True"),
        ({"ems": "table"}, "ems = str"),
        ({"corrector": "half"}, "corrector = 'half'"),
        ({"rule": "simpson"}, "rule = 'simpson'"),
        ({"rule": "trapezoid"}, "rule = 'trapezoid' without ems"),
        ({"threshold": math.nan}, "threshold = nan"),
        ({"growth": 0.0}, "growth = 0.0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        dpm_solver_v3(**arguments)
