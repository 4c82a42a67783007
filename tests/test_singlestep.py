"""Several evaluations per step: budgets, published formulas, tables, starts, integer times."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest

import fewstep as fs
from fewstep._solvers._pndm import pndm, started
from fewstep._solvers._runge_kutta import (
    PhiTable,
    Tableau,
    exponential_runge_kutta,
    phi,
    phi_tables,
    runge_kutta,
    tableaus,
)
from fewstep._solvers._singlestep import Singlestep, singlestep
from problems import Mixture, run

SINGLESTEP = [name for name, s in fs.solvers.items() if isinstance(s, Singlestep)]
MIXTURE = Mixture()

# -- budgets -------------------------------------------------------------------------------------

#: DPM-Solver, `fast`: evaluations of every step, orders 3 and 2, where the end is not sigma = 0.
FAST = {
    3: {
        1: [1],
        2: [2],
        3: [2, 1],
        4: [3, 1],
        5: [3, 2],
        6: [3, 2, 1],
        7: [3, 3, 1],
        8: [3, 3, 2],
        9: [3, 3, 2, 1],
        10: [3, 3, 3, 1],
    },
    2: {1: [1], 2: [2], 3: [2, 1], 4: [2, 2], 5: [2, 2, 1], 8: [2, 2, 2, 2]},
}


@pytest.mark.parametrize("order", [2, 3])
def test_the_budget_is_split_as_published(order):
    solver = singlestep(order)
    for nfe, counts in FAST[order].items():
        steps = solver.steps(nfe, False)
        assert solver.budget(nfe, steps, False) == counts
        clean = solver.budget(nfe, solver.steps(nfe, True), True)
        assert clean == counts or counts[-1] > 1
    assert singlestep(3).budget(8, 4, True) == [3, 2, 2, 1]
    assert singlestep(2).budget(6, 4, True) == [2, 2, 1, 1]


@pytest.mark.parametrize("name", SINGLESTEP)
def test_every_budget_is_spent(name):
    solver = fs.solvers[name]
    for nfe in range(1, 40):
        for clean in (False, True):
            counts = solver.budget(nfe, solver.steps(nfe, clean), clean)
            assert sum(counts) == nfe
            assert min(counts) >= 1
            assert max(counts) <= solver.nfe_per_step
            assert counts[-1] == 1 or not clean
            assert counts[:-1] == sorted(counts[:-1], reverse=True)


def test_times_given_with_and_without_a_budget():
    solver, times = fs.solvers["dpmpp_3s"], [1.0, 0.7, 0.4, 0.1]
    assert fs.plan(solver, fs.VP(), grid=times).nfe == 9
    assert fs.plan(solver, fs.VP(), grid=[*times, 0.0]).nfe == 10
    for nfe in range(4, 11):
        plan = fs.plan(solver, fs.VP(), nfe, grid=[*times, 0.0])
        assert plan.nfe == nfe
        assert set(times) <= set(plan.times)
    for nfe in (3, 11):
        with pytest.raises(ValueError, match=f"nfe = {nfe}, but 4 steps, the last of which"):
            fs.plan(solver, fs.VP(), nfe, grid=[*times, 0.0])
    with pytest.raises(ValueError, match="3 steps of 1 to 3 evaluations spend 3 to 9"):
        fs.plan(solver, fs.VP(), 10, grid=times)


# -- published formulas --------------------------------------------------------------------------

PATHS = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow()}
PROCESS = pytest.mark.parametrize("process", PATHS.values(), ids=PATHS)


def levels(process: fs.Process, ratios: tuple[float, ...]) -> list[fs.Level]:
    """A step from lambda = -1 to 0.8, with inner states."""
    lam = [-1.0, *(-1.0 + 1.8 * r for r in ratios), 0.8]
    return [process.level(float(t)) for t in process.time(np.array(lam))]


def applied(formula: fs.Formula, x: np.ndarray, d: np.ndarray) -> float:
    return float(np.dot(formula.a, x) + np.dot(formula.b, d))


def noise(level: fs.Level, x: float, d: float) -> float:
    return (x - level.alpha * d) / level.sigma


@PROCESS
@pytest.mark.parametrize("r", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("second", ["midpoint", "exact"])
def test_two_evaluations_as_in_the_papers(process, r, second):
    s, s1, t = nodes = levels(process, (r,))
    h = t.lam - s.lam
    x, d = np.random.default_rng(0).normal(size=(2, 2))
    data = singlestep(2, second=second).stages(process, nodes[:-1], t)[-1]
    factor = {"midpoint": 0.5 * -math.expm1(-h), "exact": 1 + math.expm1(-h) / h}[second] / r
    want = t.sigma / s.sigma * x[0] - t.alpha * math.expm1(-h) * d[0]
    assert applied(data, x, d) == pytest.approx(want + t.alpha * factor * (d[1] - d[0]), rel=1e-12)
    eps = singlestep(2, form="noise", second=second).stages(process, nodes[:-1], t)[-1]
    e = [noise(s, x[0], d[0]), noise(s1, x[1], d[1])]
    factor = {"midpoint": 0.5 * math.expm1(h), "exact": math.expm1(h) / h - 1}[second] / r
    want = t.alpha / s.alpha * x[0] - t.sigma * math.expm1(h) * e[0]
    assert applied(eps, x, d) == pytest.approx(want - t.sigma * factor * (e[1] - e[0]), rel=1e-11)


@PROCESS
def test_three_evaluations_as_in_the_papers(process):
    s, s1, s2, t = nodes = levels(process, (1 / 3, 2 / 3))
    h, (r1, r2) = t.lam - s.lam, (1 / 3, 2 / 3)
    x, d = np.random.default_rng(1).normal(size=(2, 3))
    first, second, third = singlestep(3, form="noise").stages(process, nodes[:-1], t)
    e = [noise(*parts) for parts in zip((s, s1, s2), x, d, strict=True)]
    u1 = s1.alpha / s.alpha * x[0] - s1.sigma * math.expm1(r1 * h) * e[0]
    assert applied(first, x[:1], d[:1]) == pytest.approx(u1, rel=1e-11)
    inner = math.expm1(r2 * h) / (r2 * h) - 1
    u2 = s2.alpha / s.alpha * x[0] - s2.sigma * math.expm1(r2 * h) * e[0]
    u2 -= s2.sigma * r2 / r1 * inner * (e[1] - e[0])
    assert applied(second, x[:2], d[:2]) == pytest.approx(u2, rel=1e-11)
    want = t.alpha / s.alpha * x[0] - t.sigma * math.expm1(h) * e[0]
    want -= t.sigma / r2 * (math.expm1(h) / h - 1) * (e[2] - e[0])
    assert applied(third, x, d) == pytest.approx(want, rel=1e-11)
    # data form, official code
    u2 = s2.sigma / s.sigma * x[0] - s2.alpha * math.expm1(-r2 * h) * d[0]
    u2 += r2 / r1 * s2.alpha * (math.expm1(-r2 * h) / (r2 * h) + 1) * (d[1] - d[0])
    want = t.sigma / s.sigma * x[0] - t.alpha * math.expm1(-h) * d[0]
    want += t.alpha / r2 * (math.expm1(-h) / h + 1) * (d[2] - d[0])
    _, second, third = singlestep(3).stages(process, nodes[:-1], t)
    assert applied(second, x[:2], d[:2]) == pytest.approx(u2, rel=1e-11)
    assert applied(third, x, d) == pytest.approx(want, rel=1e-11)


def test_edm_sampler():
    """EDM, algorithm 1 without churn, in its own words: 2 N - 1 evaluations for N levels."""
    process, x = fs.EDM(), 80.0 * MIXTURE.start(8)
    plan = fs.plan("heun", process, 9, grid="karras")
    t = list(dict.fromkeys(plan.times))
    assert len(t) == 6
    want = x
    for now, after in itertools.pairwise(t):
        slope = (want - MIXTURE.denoise(want, 1.0, now)) / now
        euler = want + (after - now) * slope
        if after > 0:
            slope = 0.5 * (slope + (euler - MIXTURE.denoise(euler, 1.0, after)) / after)
        want = want + (after - now) * slope
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x), want, rtol=1e-9, atol=1e-9)


def same(one: fs.Solver, other: fs.Solver, process: fs.Process, nfe: int) -> None:
    rows = [fs.plan(s, process, nfe, final="min").canonical() for s in (one, other)]
    for mine, theirs in zip(*rows, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)


@PROCESS
def test_methods_with_two_names(process):
    """ETD2RK is DPM-Solver++ 2 with r = 1 and exact weights; the start of S-PNDM is Heun in rho."""
    same(exponential_runge_kutta("etd2rk"), singlestep(2, second="exact", ratios=[1]), process, 6)
    assert fs.solvers["res_2s"] is fs.solvers["dpmpp_2s_taylor"]
    assert fs.solvers["edm_heun"] is fs.solvers["heun"]
    same(runge_kutta("2heun", placed="t"), fs.solvers["heun"], process, 6)


# -- tables --------------------------------------------------------------------------------------


def defects(table: Tableau, order: int) -> float:
    """Largest defect of the conditions of all trees of this order."""
    n = len(table.b)
    A = np.zeros((n, n))
    for i, row in enumerate(table.a, 1):
        A[i, :i] = row
    b, c = np.array(table.b), A.sum(1)
    trees = {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ A @ c, 1 / 6)],
        4: [
            (b @ c**3, 1 / 4),
            ((b * c) @ A @ c, 1 / 8),
            (b @ A @ c**2, 1 / 12),
            (b @ A @ A @ c, 1 / 24),
        ],
        5: [
            (b @ c**4, 1 / 5),
            ((b * c**2) @ A @ c, 1 / 10),
            ((b * c) @ A @ c**2, 1 / 15),
            ((b * c) @ A @ A @ c, 1 / 30),
            (b @ (A @ c) ** 2, 1 / 20),
            (b @ A @ c**3, 1 / 20),
            (b @ A @ (c * (A @ c)), 1 / 40),
            (b @ A @ A @ c**2, 1 / 60),
            (b @ A @ A @ A @ c, 1 / 120),
        ],
    }
    return max(abs(got - want) for got, want in trees[order])


@pytest.mark.parametrize("name", tableaus)
def test_order_conditions(name):
    table = tableaus[name]
    for order in range(1, table.order + 1):
        assert defects(table, order) < 1e-14
    if table.order < 5:
        assert defects(table, table.order + 1) > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-200.0, -40.0, -7.3, -1e-3, 1e-9, 0.0, 0.5, 20.0, 60.0])
def test_phi_functions(k, z):
    with mpmath.workdps(60):
        if z:
            tail = mpmath.e**z - mpmath.fsum(
                mpmath.mpf(z) ** i / math.factorial(i) for i in range(k)
            )
            want = float(tail / mpmath.mpf(z) ** k)
        else:
            want = 1 / math.factorial(k)
    assert phi(k, z) == pytest.approx(want, rel=2e-14)


@pytest.mark.parametrize(
    ("name", "order"), [("etd2rk", 2), ("etd3rk", 2), ("krogstad", 3), ("hochbruck_ostermann", 4)]
)
def test_stiff_order(name, order):
    """The conditions of Hochbruck and Ostermann (2005) hold up to the stiff order and not beyond.
    The two numbers are h of the weights and of the inner states: conditions hold for any pair."""
    table = phi_tables[name]
    c = np.array([0.0, *table.c])

    def numbers(z: float) -> np.ndarray:
        a = np.zeros((len(c) + 1, len(c)))
        for i, row in enumerate(table.rows, 1):
            for j, terms in row.items():
                a[i, j] = sum(v * phi(k, x * z) for v, k, x in terms)
            at = [*c, 1.0][i]
            a[i, 0] = at * phi(1, at * z) - a[i].sum()
        return a

    worst = dict.fromkeys((2, 3, 4), 0.0)
    for z, other in ((-0.5, 1.0), (-3.0, -7.0), (4.0, 2.0)):
        b, at_zero, a = numbers(z)[-1], numbers(0.0)[-1], numbers(other)[:-1]

        def whole(k: int, b=b, z=z) -> float:
            return phi(k, z) - b @ c ** (k - 1) / math.factorial(k - 1)

        def inner(k: int, a=a, z=other) -> np.ndarray:
            exact = np.array([v**k * phi(k, v * z) for v in c])
            return exact - a @ c ** (k - 1) / math.factorial(k - 1)

        found = {
            2: [whole(2), *inner(1)],
            3: [whole(3), b @ inner(2)],
            4: [
                1 / 24 - at_zero @ c**3 / 6,
                at_zero @ inner(3),
                at_zero @ a @ inner(2),
                (at_zero * c) @ inner(2),
            ],
        }
        for p, values in found.items():
            worst[p] = max(worst[p], *map(abs, values))
    for p, value in worst.items():
        assert value < 1e-13 if p <= order else value > 1e-3


# -- alpha = 0 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpmpp_3s", "heun", "ho5", "rk4", "flow_rk4", "flow_midpoint"])
@pytest.mark.parametrize("upward", [False, True])
def test_pure_noise(name, upward):
    """A step from or to alpha = 0 spends its evaluations and is second order: exact for a data
    prediction that is linear in kappa = alpha / sigma (flow form: for u linear in time)."""
    process, solver = fs.Flow(), fs.solvers[name]
    times = [0.6, 1.0] if upward else [1.0, 0.6]
    for nfe in range(2, solver.nfe_per_step + 1):
        plan = fs.plan(solver, process, nfe, grid=times, upward=upward)
        assert plan.nfe == nfe
        if name.startswith("flow"):
            # u = e - D = t, so x_t = x_s + (t^2 - s^2) / 2 and D = x - t u
            def denoise(x, alpha, sigma):
                return x - sigma**2

            change = 0.5 * (times[1] ** 2 - times[0] ** 2)
        else:

            def denoise(x, alpha, sigma):
                return np.full_like(x, alpha / sigma)

            s, t = plan.levels[0], plan.levels[-1]
            kappa = [v.alpha / v.sigma for v in (s, t)]
            change = t.sigma * 0.5 * (kappa[1] ** 2 - kappa[0] ** 2)
        x = np.array([[0.3, -1.0]])
        ratio = 1.0 if name.startswith("flow") else plan.levels[-1].sigma / plan.levels[0].sigma
        np.testing.assert_allclose(run(plan, denoise, x), ratio * x + change, rtol=1e-12)


# -- integer times -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SINGLESTEP, "pndm", "plms"])
def test_networks_of_integer_times_are_asked_at_integers(name):
    table = fs.DiscreteVP.from_alphas_cumprod(np.linspace(0.999, 0.01, 50))
    for nfe in (2, 5, 14, 24):
        plan = fs.plan(name, table, nfe, grid="uniform", final="min")
        assert plan.nfe == nfe
        assert all(v.t == round(v.t) for v in plan.levels)
    # from each integer to the next there is no room: the inner states are at the target
    plan = fs.plan(name, table, grid=[9, 8, 7, 6, 5])
    assert all(v.t == round(v.t) for v in plan.levels)
    # not so if the network was trained on any time
    free = fs.plan(name, replace(table, integer_times=False), grid=[9, 8, 7, 6, 5])
    assert len(free.rows) == len(plan.rows)


# -- Runge-Kutta starts --------------------------------------------------------------------------


def test_pndm_budgets_and_places():
    process = fs.VP()
    for steps in (4, 10, 20):
        times = np.linspace(1.0, 0.1, steps + 1)
        assert fs.plan("pndm", process, grid=times).nfe == steps + 9
        assert fs.plan("s_pndm", process, grid=times).nfe == steps + 1
        assert fs.plan("pndm", process, steps, grid=times).nfe == steps
        with pytest.raises(ValueError, match=rf"nfe = 3, but {steps} steps of pndm spend {steps} "):
            fs.plan("pndm", process, 3, grid=times)
    plan = fs.plan("pndm", process, grid=[1.0, 0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(plan.times[:5], [1.0, 0.9, 0.9, 0.8, 0.8])
    # PLMS asks twice at the second time
    assert fs.plan("plms", process, grid=[1.0, 0.8, 0.6]).times.tolist() == [1.0, 0.8, 0.8, 0.6]
    # too few evaluations for the start: iPNDM
    ours, theirs = fs.plan("pndm", process, 12), fs.plan("ipndm_4", process, 12)
    assert [ours.levels, ours.rows] == [theirs.levels, theirs.rows]
    assert ours.nfe + 1 == fs.plan("pndm", process, 13).nfe


def test_a_start_keeps_the_order_of_the_method():
    """Third-order Adams-Bashforth from nothing: its first, first-order step costs an order, a
    Runge-Kutta start does not."""
    body = fs.exponential(3, growth=math.inf)
    ready = started(body, singlestep(3), (3, 3))
    process, lam, x = fs.EDM(), (0.0, 1.5), MIXTURE.start(16)
    grids = {n: process.time(np.linspace(*lam, n + 1)) for n in (16, 32, 64, 2048)}
    exact = run(fs.plan("ab4", process, grid=grids[2048]), MIXTURE.denoise, x)

    def error(solver: fs.Solver, n: int) -> float:
        out = run(fs.plan(solver, process, grid=grids[n]), MIXTURE.denoise, x)
        return float(np.sqrt(((out - exact) ** 2).mean()))

    slopes = {s.name: math.log2(error(s, 32) / error(s, 64)) for s in (body, ready)}
    assert slopes[body.name] == pytest.approx(2, abs=0.3)
    assert slopes[ready.name] == pytest.approx(3, abs=0.3)


# -- bad parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: singlestep(4), "order = 4; accepted: 2, 3"),
        (lambda: singlestep(2, form="flow"), "form = 'flow'"),
        (lambda: singlestep(2, second="taylor"), "second = 'taylor'"),
        (lambda: singlestep(3, ratios=[0.5]), "need 2 different numbers"),
        (lambda: singlestep(3, second="exact", ratios=[0.5, 0.5]), "need 2 different numbers"),
        (lambda: singlestep(2, ratios=[0.0]), "need 1 different numbers"),
        (lambda: singlestep(3, ratios=[0.25, 0.5]), "r_2 = 2/3 only"),
        (lambda: runge_kutta("4kr"), "did you mean '4rk'"),
        (lambda: runge_kutta("4rk", form="rho"), "form = 'rho'"),
        (lambda: runge_kutta("4rk", placed="lambda"), "placed = 'lambda'"),
        (lambda: runge_kutta(Tableau(((0.5,),), (0.0, 0.9), 2)), "weights sum to 0.9"),
        (lambda: runge_kutta(Tableau(((1.5,),), (0.0, 1.0), 1)), "places in \\(0, 1\\]"),
        (lambda: runge_kutta(Tableau((), (1.0,), 1)), "two stages or more"),
        (lambda: exponential_runge_kutta("krogstadt"), "did you mean 'krogstad'"),
        (lambda: exponential_runge_kutta("krogstad", form="v"), "form = 'v'"),
        (lambda: pndm(4, 3, name="x"), "start = 3"),
        (lambda: started(fs.solvers["unipc_2"], singlestep(2), [2]), "body = 'unipc_2'"),
        (lambda: started(fs.solvers["ab3"], singlestep(2), [3]), "numbers from 2 to 2"),
    ],
)
def test_bad_parameters(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_table_of_ones_own():
    """The exponential midpoint rule, by its table, is the exact two-node method; others fill in."""
    table = PhiTable((0.5,), ({}, {1: ((2.0, 2, 1.0),)}), 2)
    for form in ("data", "noise"):
        mine = exponential_runge_kutta(table, form=form)
        theirs = singlestep(2, form=form, second="exact")
        for nfe in (4, 5, 7):
            plans = [fs.plan(s, fs.VP(), nfe, grid="lambda") for s in (mine, theirs)]
            for a, b in zip(*(p.canonical() for p in plans), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    for bad in (PhiTable((), ({},), 1), PhiTable((0.5,), ({1: ((1.0, 2, 1.0),)}, {}), 2)):
        with pytest.raises(ValueError, match="need 2 to 6 rows"):
            exponential_runge_kutta(bad)
