"""The stochastic multistep family: its formulas against the papers' and against 50 digits.

Orders, ends, budgets and scaling of noise are tested for the whole registry elsewhere.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.integrate import quad

import fewstep as fs
from fewstep._noise import Noise
from fewstep._solvers._stochastic import (
    Window,
    _weights,
    ancestral,
    er_noise,
    er_sde,
    jump,
    sa_solver,
    sde,
)
from problems import PROCESSES, Mixture, Normal, walk

FLOW = fs.Flow()
#: Levels of a history (newest first) and a target, on three paths.
LEVELS = {
    name: [process.level(float(t)) for t in process.time(np.array([0.9, 0.0, -0.5, -1.1]))]
    for name, process in {"vp": fs.VP(), "edm": fs.EDM(), "flow": FLOW}.items()
}


def at(lam: float) -> fs.Level:
    """A level with alpha = 1."""
    return fs.Level(0.0, 1.0, math.exp(-lam), lam)


def row(solver: fs.Multistep, history, end, process=FLOW) -> fs.Formula:
    return solver.step(process, history, end)


def std(formula: fs.Formula) -> float:
    (value,) = formula.noise.values() or (0.0,)
    return value


# -- numbers ---------------------------------------------------------------------------------------

#: Flow, t = 0.8 -> 0.5 after 0.9 and 0.95, for eta^2 = 0, 1/2, 1: coefficient of x and standard
#: deviation of the noise; the coefficients of D, newest first, of the four solvers of the test.
LINEAR = {0.0: (0.625, 0.0), 0.5: (0.3125, 0.4330127019), 1.0: (0.15625, 0.4841229183)}
GOLDEN = {
    0.0: [
        [0.375],
        [0.6955333671, -0.3205333671],
        [0.7673237465, -0.3923237465],
        [1.2284122815, -1.3538183558, 0.5004060742],
    ],
    0.5: [
        [0.4375],
        [0.8114555950, -0.3739555950],
        [0.9325863907, -0.4950863907],
        [1.5270807960, -1.7347684093, 0.6451876133],
    ],
    1.0: [
        [0.46875],
        [0.8694167089, -0.4006667089],
        [1.0344857087, -0.5657357087],
        [1.7263209794, -2.0083998235, 0.7508288441],
    ],
}
GOLDEN_NOISE_FORM = {0.0: (-1.5, 0.0), 0.5: (-2.25, 1.3693063938), 1.0: (-3.0, 1.9364916731)}


@pytest.mark.parametrize("eta2", GOLDEN)
def test_golden_rows(eta2):
    history, end = [FLOW.level(t) for t in (0.8, 0.9, 0.95)], FLOW.level(0.5)
    free = functools.partial(sde, eta2=eta2, growth=math.inf)
    solvers = [free(1), free(2, second="midpoint"), free(2), free(3)]
    lin, spread = LINEAR[eta2]
    for solver, wanted in zip(solvers, GOLDEN[eta2], strict=True):
        formula = row(solver, history[: len(wanted)], end)
        assert formula.a == pytest.approx([lin] + [0] * (len(wanted) - 1), abs=1e-10)
        assert formula.b == pytest.approx(wanted, abs=1e-10)
        assert std(formula) == pytest.approx(spread, abs=1e-10)
    formula = row(free(1, form="noise"), history[:1], end)
    weight, spread = GOLDEN_NOISE_FORM[eta2]  # of e = (x - alpha D) / sigma, beside 2.5 x
    assert (formula.a[0] - 2.5) * 0.8 == pytest.approx(weight, abs=1e-10)
    assert formula.b[0] == pytest.approx(-weight * 0.2 / 0.8, abs=1e-10)
    assert std(formula) == pytest.approx(spread, abs=1e-10)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(
    "solver",
    [
        *(sde(p, eta2=e) for p in (1, 2, 3, 4) for e in (0.3, 1.0, 4.0)),
        sde(2, second="midpoint"),
        sde(2, second="bh1"),
        sde(3, third="shipped"),
        sde(3, eta2=Window(2.0, 0.7, 0.9)),
        sde(3, eta2=lambda rho: rho / (1 + rho)),
        *(er_sde(p) for p in (1, 2, 3)),
        er_sde(3, third="uncorrected"),
        ancestral(0.6),
        ancestral(lambda start, end: 0.3 * end.sigma),
        jump(0.4),
    ],
    ids=lambda s: s.name,
)
def test_data_rows_keep_constant_data_and_the_variance(solver, name):
    end, *history = LEVELS[name]
    formula = row(solver, history[: solver.nodes], end)
    start, lin, spread = history[0], formula.a[0], std(formula)
    assert sum(formula.b) == pytest.approx(end.alpha - lin * start.alpha, rel=1e-13)
    variance = (lin * start.sigma) ** 2 + spread**2
    assert math.sqrt(variance) == pytest.approx(end.sigma, rel=1e-13)
    assert formula.exact
    assert spread > 0


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_noise_rows_keep_x_over_alpha(order, name):
    end, *history = LEVELS[name]
    formula = row(sde(order, form="noise", eta2=0.7, growth=math.inf), history[:order], end)
    # x = alpha y with D = y everywhere: no noise prediction
    assert sum(a * v.alpha for a, v in zip(formula.a, history, strict=False)) + sum(
        formula.b
    ) == pytest.approx(end.alpha, rel=1e-13)
    variance = 0.7 * (history[0].rho ** 2 - end.rho**2) * end.alpha**2
    assert std(formula) ** 2 == pytest.approx(variance, rel=1e-13)
    assert not formula.exact


def moments(form: str, variable: str, eta2: float, lams, h: float) -> list:
    """The weights for alpha = 1 in 80 digits, from closed integrals of monomials."""
    delta, h = [mp.mpf(v) - mp.mpf(lams[0]) for v in lams], mp.mpf(h)
    g = 1 + mp.mpf(eta2)
    count = len(delta)
    if variable == "lambda":
        u = delta
        # int e^{-c x} x^k over [0, h], by parts; k = 0 first
        c = -g if form == "data" else mp.mpf(1)
        I = [-mp.expm1(-c * h) / c]
        for k in range(1, count):
            I.append((k * I[-1] - h**k * mp.e ** (-c * h)) / c)
    else:
        u = [mp.e ** (-d) for d in delta]
        c = -g if form == "data" else mp.mpf(1)
        I = [h if c + k == 0 else -mp.expm1(-(c + k) * h) / (c + k) for k in range(count)]
    front = g * mp.e ** (-g * h) if form == "data" else -g * mp.e ** (-mp.mpf(lams[0]))
    powers = mp.matrix(count, count)
    for k in range(count):
        for j in range(count):
            powers[k, j] = u[j] ** k
    return list(mp.lu_solve(powers, mp.matrix([front * v for v in I])))


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.1, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("eta2", [0.25, 1.0, 9.0])
@pytest.mark.parametrize("variable", ["lambda", "rho"])
@pytest.mark.parametrize("form", ["data", "noise"])
def test_weights_agree_with_many_digits(form, variable, eta2, h):
    start = at(0.25)
    end = at(start.lam + h)
    with mp.workdps(100):
        for back in ([0.7], [0.7, 1.9], [0.7, 1.9, 2.5], [-1.0, 0.7, 1.9]):
            nodes = [start, *(at(start.lam - h * r) for r in back)]
            weights = _weights(form, variable, Window(eta2), start, end, nodes)
            lams = [node.lam for node in nodes]
            wanted = moments(form, variable, eta2, lams, end.lam - start.lam)
            size = max(abs(w) for w in wanted)
            for w, exact in zip(weights, wanted, strict=True):
                assert abs((mp.mpf(float(w)) - exact) / size) < 1e-13


def test_one_long_step_forgets_and_stays_exact():
    """h = 700, eta^2 = 3: only the end of the step counts, and D is extrapolated to it."""
    start, end = at(-300.0), at(400.0)
    nodes = [start, at(-310.0)]
    weights = _weights("data", "lambda", Window(3.0), start, end, nodes)
    slope = (700 - 0.25) / 10  # the kernel's mean is 1 / (1 + eta^2) before the end
    assert weights == pytest.approx([1 + slope, -slope], rel=1e-12)


# -- noise levels that vary ------------------------------------------------------------------------

VARYING = {
    "window inside": Window(1.5, 0.6, 0.9),
    "window across": Window(0.8, 0.2, 0.8),
    "smooth": lambda rho: rho**2 / (1 + rho),
    "er": er_noise,
}


@pytest.mark.parametrize("name", VARYING)
def test_varying_noise_is_the_composition_of_short_constant_pieces(name):
    """From rho = 1 to 0.4, D a quadratic in lambda through three nodes."""
    eta2, n = VARYING[name], 3000
    value = eta2.at if isinstance(eta2, Window) else lambda lam: eta2(np.exp(-lam))
    start, end = at(0.0), at(-math.log(0.4))
    history = [start, at(-0.4), at(-1.0)]
    formula = row(sde(3, eta2=eta2, growth=math.inf), history, end)
    lams = [v.lam for v in history]
    edges = np.linspace(0.0, end.lam, n + 1)
    if isinstance(eta2, Window):
        edges = np.unique([*edges, *(v for v in eta2._ends if 0 < v < end.lam)])
    for k in range(3):
        basis = np.polyfit(lams, np.eye(3)[k], 2)
        lin, data, variance = 1.0, 0.0, 0.0
        for a, b in itertools.pairwise(edges):
            middle = (a + b) / 2
            piece = row(sde(1, eta2=float(value(np.array(middle)))), [at(a)], at(b))
            lin *= piece.a[0]
            data = piece.a[0] * data + piece.b[0] * np.polyval(basis, middle)
            variance = piece.a[0] ** 2 * variance + std(piece) ** 2
        assert formula.a[0] == pytest.approx(lin, rel=1e-6)
        assert formula.b[k] == pytest.approx(data, abs=1e-6)
        assert std(formula) == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_a_window_is_exactly_its_pieces():
    """Two steps that meet at the window's end are one step across it; outside there is no noise."""
    window = Window(1.7, 0.5, 3.0)
    start, edge, end = at(0.1), at(-math.log(0.5)), at(1.6)
    whole, first, last = (
        row(sde(1, eta2=e), [a], b)
        for e, a, b in ((window, start, end), (1.7, start, edge), (0.0, edge, end))
    )
    assert not last.noise
    assert whole.a[0] == pytest.approx(first.a[0] * last.a[0], rel=1e-14)
    assert whole.b[0] == pytest.approx(last.a[0] * first.b[0] + last.b[0], rel=1e-14)
    assert std(whole) == pytest.approx(last.a[0] * std(first), rel=1e-14)
    plan = fs.plan(sde(2, eta2=Window(1.0, 0.5, 2.0)), fs.EDM(), 20, grid="lambda")
    for draw in plan.draws:
        assert draw.end.rho < 2.0
        assert draw.start.rho > 0.5
    noisy = [k for k, r in enumerate(plan.rows) if r.e]
    assert 0 < len(noisy) < 19
    still = fs.plan(fs.exponential(2), fs.EDM(), 20, grid="lambda")
    for k, (mine, theirs) in enumerate(zip(plan.rows, still.rows, strict=True)):
        assert (mine.b == theirs.b) == (k not in noisy)


@pytest.mark.parametrize("lam", [math.inf, 5.0, 1.0, 1e-3])
def test_from_alpha_0_noise_everywhere_forgets_the_start_and_a_window_does_not(lam):
    process = PROCESSES["trigonometric"]
    start = process.level(1.0)
    assert start.alpha == 0
    end = process.level(float(process.time(lam)))
    for solver in (sde(3), er_sde(2), sde(2, form="noise"), ancestral(), jump()):
        formula = row(solver, [start], end, process)
        assert formula.a == [0.0]
        assert formula.b == pytest.approx([end.alpha], rel=1e-14)
        assert std(formula) == pytest.approx(end.sigma, rel=1e-14)
    formula = row(sde(2, eta2=Window(1.0, 0.0, 1.0)), [start], end, process)
    share = 1.0 if lam < 0 else math.exp(-lam) if lam < math.inf else 0.0
    assert formula.a == pytest.approx([end.sigma * share], rel=1e-9)
    assert formula.b == pytest.approx([end.alpha], rel=1e-14)


# -- the draws -------------------------------------------------------------------------------------

PATHS = {
    "data": sde(1, eta2=0.7),
    "window": sde(1, eta2=Window(2.0, 0.35, 1.2)),
    "smooth": sde(1, eta2=er_noise),
    "noise form": sde(1, eta2=0.7, form="noise"),
    "noise form, window": sde(1, eta2=Window(2.0, 0.35, 1.2), form="noise"),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("process", [fs.VP(), FLOW], ids=["vp", "flow"])
def test_noise_of_a_step_is_the_propagated_noise_of_its_halves(name, process):
    solver, like = PATHS[name], torch.zeros(3, 50, dtype=torch.float64)
    start, middle, end = (process.level(float(process.time(v))) for v in (-0.8, 0.3, 1.4))
    noise = Noise(5, path=True, resolution=2.0**-20)

    def drawn(a: fs.Level, b: fs.Level) -> tuple[float, torch.Tensor]:
        formula = row(solver, [a], b, process)
        # the coefficient of x alone: a row in noise form has e in it, which is no noise here
        lin = b.alpha / a.alpha if "form" in name else formula.a[0]
        ((draw, c),) = formula.noise.items()
        return lin, c * noise.draw(draw, 0, like)

    _, whole = drawn(start, end)
    _, first = drawn(start, middle)
    carry, second = drawn(middle, end)
    torch.testing.assert_close(whole, carry * first + second, rtol=0, atol=2e-5)
    assert (whole - carry * first).abs().max() > 0.1
    (draw,) = row(solver, [start], end, process).noise
    other = noise.draw(draw, 0, like) - Noise(6, path=True).draw(draw, 0, like)
    assert other.abs().max() > 0.1


def test_a_corrector_draws_what_its_predictor_drew():
    plan = fs.plan("sa_solver", fs.VP(), 8)
    assert len(plan.draws) == 7
    made: dict[float, list] = {}
    for r, level in zip(plan.rows, plan.levels[1:], strict=True):
        made.setdefault(level.t, []).append(r.e)
    pairs = [e for e in made.values() if len(e) == 2]
    assert len(pairs) == 7
    for predicted, corrected in pairs:
        assert predicted == corrected
        assert len(predicted) == 1


def test_frozen_noise_is_that_of_the_end_and_has_no_path_where_it_varies():
    end, *history = LEVELS["flow"]
    window = Window(1.0, 0.3, 0.7)
    for solver, eta2 in ((sde(2, eta2=window, frozen=True), 1.0), (sde(2, eta2=0.5), 0.5)):
        mine, theirs = row(solver, history[:2], end), row(sde(2, eta2=eta2), history[:2], end)
        assert (mine.a, mine.b, std(mine)) == (theirs.a, theirs.b, std(theirs))
    assert [d.clock for d in row(sde(2, eta2=window, frozen=True), history[:2], end).noise] == [
        None
    ]
    assert sde(2, eta2=window, frozen=True).strong_order == 0
    assert sde(2, eta2=0.5, frozen=True).strong_order == 1


# -- the same in other people's symbols ------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_ddim_is_the_row_with_its_own_eta2(eta, name):
    end, start, *_ = LEVELS[name]
    h = end.lam - start.lam
    E = -0.5 * math.log1p(eta**2 * math.expm1(-2 * h))
    mine, theirs = row(ancestral(eta), [start], end), row(sde(1, eta2=E / h), [start], end)
    assert mine.a + mine.b == pytest.approx(theirs.a + theirs.b, rel=1e-14)
    assert std(mine) == pytest.approx(std(theirs), rel=1e-14)
    # DDIM's own formula: sqrt(sigma_t^2 - v^2) along the predicted noise
    v = eta * end.sigma * math.sqrt(1 - (end.rho / start.rho) ** 2)
    assert std(mine) == pytest.approx(v, rel=1e-13)
    assert mine.a[0] == pytest.approx(math.sqrt(end.sigma**2 - v**2) / start.sigma, rel=1e-14)
    assert mine.b[0] == pytest.approx(end.alpha - mine.a[0] * start.alpha, rel=1e-12)


def test_ddpm_is_the_posterior_of_one_step_of_the_chain():
    process = fs.DiscreteVP.linear()
    for t in (2, 300, 999):
        start, end = process.level(float(t)), process.level(float(t - 1))
        abar, before = start.alpha**2, end.alpha**2
        beta = 1 - abar / before
        small = row(fs.solvers["ddpm"], [start], end, process)
        large = row(fs.solvers["ddpm_large"], [start], end, process)
        for formula in (small, large):
            assert formula.a[0] == pytest.approx(
                math.sqrt(1 - beta) * (1 - before) / (1 - abar), rel=1e-9
            )
            assert formula.b[0] == pytest.approx(math.sqrt(before) * beta / (1 - abar), rel=1e-9)
        assert std(small) ** 2 == pytest.approx(beta * (1 - before) / (1 - abar), rel=1e-9)
        assert std(large) ** 2 == pytest.approx(beta, rel=1e-9)


def test_the_large_variance_is_the_posterior_for_standard_normal_data_on_every_path():
    end, start, *_ = LEVELS["flow"]
    # x_t | x_s for x_0 ~ N(0, 1), independent noise increments
    cov = (end.alpha * start.alpha) + start.alpha / end.alpha * end.sigma**2
    total = start.alpha**2 + start.sigma**2
    posterior = end.alpha**2 + end.sigma**2 - cov**2 / total
    assert std(row(ancestral(variance="large"), [start], end)) ** 2 == pytest.approx(posterior)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ancestral_is_that_of_k_diffusion(eta):
    start, end = (fs.EDM().level(s) for s in (3.0, 1.2))
    s, t = start.sigma, end.sigma
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    down = math.sqrt(t**2 - up**2)
    formula = row(ancestral(eta), [start], end)
    # x + (x - D) / s (down - s), then noise
    assert formula.a == pytest.approx([down / s], rel=1e-14)
    assert formula.b == pytest.approx([1 - down / s], rel=1e-14)
    assert std(formula) == pytest.approx(up, rel=1e-14)
    assert std(row(ancestral(5.0), [start], end)) == t  # clipped


@pytest.mark.parametrize("eta", [0.5, 1.0])  # theirs: eta^2 of ours
@pytest.mark.parametrize("variant", ["midpoint", "exact", "3m"])
def test_sde_dpmpp_is_that_of_k_diffusion(variant, eta):
    levels = [fs.EDM().level(s) for s in (1.2, 3.0, 5.0, 9.0)]
    end, start, *_ = levels
    h, *before = (a.lam - b.lam for a, b in itertools.pairwise(levels))
    H = h * (1 + eta)
    lin, gain = end.sigma / start.sigma * math.exp(-h * eta), -math.expm1(-H)
    r = [v / h for v in before]
    phi2 = math.expm1(-H) / H + 1
    if variant == "3m":
        phi3 = phi2 / H - 0.5
        d10, d11 = np.array([1, -1, 0]) / r[0], np.array([0, 1, -1]) / r[1]
        d1 = d10 + (d10 - d11) * r[0] / (r[0] + r[1])
        d2 = (d10 - d11) / (r[0] + r[1])
        wanted = np.array([gain, 0, 0]) + phi2 * d1 - phi3 * d2
        solver = sde(3, eta2=eta, third="shipped", growth=math.inf)
    else:
        factor = gain / 2 if variant == "midpoint" else phi2
        wanted = np.array([gain, 0]) + factor / r[0] * np.array([1, -1])
        solver = sde(2, eta2=eta, second=variant, growth=math.inf)
    formula = row(solver, levels[1 : 1 + len(wanted)], end)
    assert formula.a[0] == pytest.approx(lin, rel=1e-13)
    assert formula.b == pytest.approx(wanted.tolist(), rel=1e-12)
    noise = end.sigma * math.sqrt(-math.expm1(-2 * h * eta))
    assert std(formula) == pytest.approx(noise, rel=1e-13)


@pytest.mark.parametrize("second", ["midpoint", "exact"])
def test_sde_dpm_solver_2m(second):
    """x_t = (alpha_t/alpha_s) x - 2 sigma_t [(e^h - 1) e_0 + c (e_0 - e_1) / r] + noise."""
    end, start, older, _ = LEVELS["vp"]
    h, before = end.lam - start.lam, start.lam - older.lam
    c = math.expm1(h) / 2 if second == "midpoint" else math.expm1(h) / h - 1
    slope = c * h / before
    e0, e1 = -2 * end.sigma * (math.expm1(h) + slope), 2 * end.sigma * slope
    solver = sde(2, form="noise", second=second, growth=math.inf)
    formula = row(solver, [start, older], end)
    assert formula.a == pytest.approx(
        [end.alpha / start.alpha + e0 / start.sigma, e1 / older.sigma], rel=1e-12
    )
    assert formula.b == pytest.approx(
        [-e0 * start.alpha / start.sigma, -e1 * older.alpha / older.sigma], rel=1e-12
    )
    assert std(formula) == pytest.approx(end.sigma * math.sqrt(math.expm1(2 * h)), rel=1e-13)


@pytest.mark.parametrize("second", ["exact", "bh1"])
def test_sa_solver_of_two_nodes(second):
    """Predictor and corrector: alpha_t [A D_s + c (slope)], c = 1 - A/H, or H/2 ("rescaling")."""
    eta2 = 0.64  # tau = 0.8
    end, start, older, _ = LEVELS["flow"]
    h, before = end.lam - start.lam, start.lam - older.lam
    H = (1 + eta2) * h
    A = -math.expm1(-H)
    c = end.alpha * (1 - A / H if second == "exact" else H / 2)
    solver = sa_solver(2, 2, eta2=eta2, second=second)
    predicted = row(solver, [start, older], end)
    corrected = solver.corrector(FLOW, [end, start, older], end)
    slope = c * h / before
    assert predicted.b == pytest.approx([end.alpha * A + slope, -slope], rel=1e-12)
    assert corrected.b == pytest.approx([c, end.alpha * A - c, 0.0], rel=1e-12)
    assert corrected.a == pytest.approx([0.0, predicted.a[0], 0.0], rel=1e-14)
    assert predicted.noise == corrected.noise


@pytest.mark.parametrize("nodes", [3, 4])
def test_sa_solver_of_more_nodes_integrates_polynomials(nodes):
    """Predictor of `nodes`, corrector of one more, on D = lambda^k: against quadrature."""
    end, *history = LEVELS["vp"]
    history.append(at(-2.0))
    solver = sa_solver(nodes, nodes + 1, eta2=1.0, second="exact")
    h, start = end.lam - history[0].lam, history[0]
    predicted = row(solver, history[:nodes], end)
    corrected = solver.corrector(fs.VP(), [end, *history[:nodes]], end)
    for formula, at_nodes, degree in (
        (predicted, history[:nodes], nodes - 1),
        (corrected, [end, *history[:nodes]], nodes),
    ):
        for k in range(degree + 1):
            exact = quad(lambda x, k=k: 2 * math.exp(-2 * (h - x)) * (start.lam + x) ** k, 0, h)[0]
            got = sum(b * v.lam**k for b, v in zip(formula.b, at_nodes, strict=True))
            assert got == pytest.approx(end.alpha * exact, rel=1e-9)


PHI = {
    1.5: lambda rho: rho**1.5,
    2.0: lambda rho: rho**2,
    2.5: lambda rho: rho**2.5,
    None: lambda rho: rho * (math.exp(rho**0.3) + 10),
}


@pytest.mark.parametrize("p", PHI)
@pytest.mark.parametrize("name", LEVELS)
def test_er_sde_by_its_own_formulas(name, p):
    phi = PHI[p]
    end, *history = LEVELS[name]
    k, (s, s1, s2) = end.rho, (v.rho for v in history)
    r = phi(k) / phi(s)
    first = quad(lambda q: 1 / phi(q), k, s, epsabs=0, epsrel=1e-12)[0]
    second = quad(lambda q: (q - s) / phi(q), k, s, epsabs=0, epsrel=1e-12)[0]
    D = np.eye(3)
    slope, older = (D[0] - D[1]) / (s - s1), (D[1] - D[2]) / (s1 - s2)
    bend = 2 * (slope - older) / (s - s2)
    rows = {
        1: (1 - r) * D[0],
        2: (1 - r) * D[0] + (k - s + phi(k) * first) * slope,
    }
    third = ((k - s) ** 2 / 2 + phi(k) * second) * bend
    rows[3] = rows[2] + third
    corrected = rows[3] + (k - s + phi(k) * first) * bend * (s - s1) / 2
    for order, wanted in rows.items():
        solver = er_sde(order, phi=p, third="uncorrected" if order == 3 else "exact")
        formula = row(solver, history[:order], end)
        assert formula.a[0] == pytest.approx(r * end.alpha / history[0].alpha, rel=1e-12)
        assert formula.b == pytest.approx((end.alpha * wanted[:order]).tolist(), rel=1e-9)
        spread = end.alpha * math.sqrt(k**2 - r**2 * s**2)
        assert std(formula) == pytest.approx(spread, rel=1e-11)
    formula = row(er_sde(3, phi=p), history[:3], end)
    assert formula.b == pytest.approx((end.alpha * corrected).tolist(), rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_er_sde_3_as_published_is_second_order_as_an_ode_and_corrected_is_third(p):
    """The row on D = rho^2, which three nodes reproduce: corrected exactly, published not."""
    end, *history = LEVELS["edm"]
    start = history[0]
    for third, right in (("exact", True), ("uncorrected", False)):
        formula = row(er_sde(3, phi=p, third=third), history[:3], end)
        got = sum(b * v.rho**2 for b, v in zip(formula.b, history, strict=False))
        exact = (
            end.alpha
            * quad(
                lambda lam: p * math.exp(-p * (end.lam - lam)) * math.exp(-2 * lam),
                start.lam,
                end.lam,
            )[0]
        )
        assert (got == pytest.approx(exact, rel=1e-11)) == right
    assert er_sde(3, phi=1.0).order == 3
    assert er_sde(3, phi=1.0, third="uncorrected").order == 2


def test_jumps_are_those_of_consistency_ctm_and_tcd():
    end, start, *_ = LEVELS["flow"]
    for gamma in (0.0, 0.3, 1.0):
        formula = row(jump(gamma), [start], end)
        assert std(formula) == pytest.approx(gamma * end.sigma)
        assert formula.a[0] == pytest.approx(
            math.sqrt(1 - gamma**2) * end.sigma / start.sigma, abs=1e-15
        )
    assert row(jump(), [start], end).b == pytest.approx([end.alpha], rel=1e-14)
    # TCD on its integers: DDIM to floor((1 - gamma) t), then noise up to t
    process = fs.DiscreteVP.scaled_linear()
    start, end = process.level(759.0), process.level(499.0)
    lower = process.level(float(math.floor(0.7 * 499)))
    formula = row(jump(0.3, to="time"), [start], end, process)
    up = end.alpha / lower.alpha
    ddim = row(ancestral(0.0), [start], lower, process)
    assert formula.a[0] == pytest.approx(up * ddim.a[0], rel=1e-12)
    assert formula.b[0] == pytest.approx(up * ddim.b[0], rel=1e-12)
    noise = math.sqrt(1 - (end.alpha / lower.alpha) ** 2)
    assert std(formula) == pytest.approx(noise, rel=1e-12)
    # in continuous time (1 - gamma) t, also where time runs the other way
    for name in ("flow", "custom, time reversed"):
        process = PROCESSES[name]
        clean, t = process.t_clean, 0.4
        lower = process.level(clean + 0.7 * (t - clean))
        end, start = process.level(t), process.level(clean + 1.5 * (t - clean))
        formula = row(jump(0.3, to="time"), [start], end, process)
        up = end.alpha / lower.alpha
        noise = math.sqrt(end.sigma**2 - (up * lower.sigma) ** 2)
        assert std(formula) == pytest.approx(noise, rel=1e-12)


def test_jumps_are_for_networks_that_give_samples():
    """With the consistency function of Gaussian data the law is exact at every state; with their
    denoiser it stays wrong, for any number of steps."""
    normal = Normal()

    def consistent(v, alpha, sigma):
        shrink = normal.std / math.hypot(alpha * normal.std, sigma)
        out = v * shrink
        out[0] += normal.mean * (1 - alpha * shrink)
        return out

    plan = fs.plan("lcm", fs.VP(), 6)
    unit = np.eye(2 + len(plan.draws))
    mean, spread = normal.moments(plan.levels[0])
    states = walk(plan, consistent, mean * unit[0] + spread * unit[1], unit[2:])
    for v, level in zip(states, plan.levels, strict=True):
        law = [v[0], np.sqrt((v[1:] ** 2).sum())]
        assert law == pytest.approx(normal.moments(level), rel=1e-9)
    for solver, order in (("lcm", 0), ("tcd", 0), ("ddpm", 1), ("ddpm_large", 1)):
        few, many = (
            normal.gap(fs.plan(solver, fs.VP(), n, grid="lambda", final="min")) for n in (64, 256)
        )
        assert fs.solvers[solver].order == order
        assert (many / few > 0.6) if order == 0 else (many / few < 0.35)


# -- factories -------------------------------------------------------------------------------------


def test_functions_of_a_step():
    def v(start, end):
        return 0.25 * end.sigma

    def w(start, end):
        return 0.5 * start.sigma

    end, start, *_ = LEVELS["vp"]
    formula = row(ancestral(v, variance=w), [start], end)
    assert std(formula) == 0.5 * start.sigma
    assert not formula.exact
    assert formula.a[0] == pytest.approx(end.sigma * math.sqrt(1 - 0.25**2) / start.sigma)
    half = row(ancestral(v, variance=w).scaled(0.5), [start], end)
    assert std(half) == 0.25 * start.sigma
    with pytest.raises(ValueError, match="eta: the function gives v = "):
        row(ancestral(lambda start, end: 2 * end.sigma), [start], end)
    with pytest.raises(ValueError, match="variance: the function gives -1"):
        row(ancestral(variance=lambda start, end: -1.0), [start], end)


def test_s_noise_is_a_factor_of_the_noise_alone():
    end, *history = LEVELS["edm"]
    plain, more = (row(sde(2, s_noise=s), history[:2], end) for s in (1.0, 1.003))
    assert (plain.a, plain.b) == (more.a, more.b)
    assert std(more) == pytest.approx(1.003 * std(plain), rel=1e-15)
    assert plain.exact
    assert not more.exact
    assert sde(2, s_noise=1.003).order == 0
    fs.plan(sde(2, s_noise=1.003), fs.EDM(), 5)


def test_scaled_multiplies_eta():
    assert sde(2, eta2=0.5).scaled(2.0).step == sde(2, eta2=2.0).step
    assert sde(2, eta2=Window(1.0, 0.1, 2.0)).scaled(0.5).step.noise == Window(0.25, 0.1, 2.0)
    start, end = at(0.0), at(1.0)
    half = row(er_sde(1).scaled(0.5), [start], end)
    full = row(er_sde(1), [start], end)
    share = [math.exp(1) * f.a[0] for f in (half, full)]  # e^{-E}
    assert math.log(share[0]) == pytest.approx(0.25 * math.log(share[1]), rel=1e-12)
    assert row(ancestral(0.8).scaled(0.5), [start], end).a == row(ancestral(0.4), [start], end).a
    with pytest.raises(ValueError, match="factor = -1"):
        sde(1).scaled(-1)
    with pytest.raises(ValueError, match=r"gamma = 1\.2"):
        jump(0.6).scaled(2.0)


@pytest.mark.parametrize("name", ["ddpm", "ddpm_large", "sa_solver", "er_sde_3", "tcd"])
def test_solvers_are_pickled_whole(name):
    solver = fs.solvers[name]
    copy = pickle.loads(pickle.dumps(solver))
    assert copy.step == solver.step
    assert fs.plan(copy, fs.VP(), 4) == fs.plan(solver, fs.VP(), 4)
    assert copy.scaled(0.5).step == solver.scaled(0.5).step


@pytest.mark.parametrize("name", ["trigonometric", "edm", "linear table"])
@pytest.mark.parametrize(
    "solver",
    [
        sde(4, eta2=Window(3.0, 0.05, 3.0), corrector=3),
        sde(2, corrector=5, second="midpoint"),
        sde(3, variable="rho", form="noise", eta2=Window(1.0, 0.1, 1.0)),
        sa_solver(3, 4, eta2=Window(1.0, 0.72, 25.0), frozen=True),
        sde(2, eta2=lambda rho: np.exp(-rho)),
    ],
    ids=lambda s: s.name,
)
def test_combinations_run(solver, name):
    """Plans that are built (and checked), with predictors and correctors that look back unlike."""
    process = PROCESSES[name]
    mixture = Mixture(components=2, dim=3)
    for nfe in (1, 2, 6):
        plan = fs.plan(solver, process, nfe)
        assert plan.nfe == nfe
        state = plan.start(torch.from_numpy(mixture.start(4)) * plan.prior_std, noise=1)
        while not state.done:
            level = plan.asked(state.index)
            out = mixture.denoise(state.x.numpy(), level.alpha, level.sigma)
            state = state.advance(torch.from_numpy(out))
        assert state.x.isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sde(0), "order = 0"),
        (lambda: sde(True), "order = True"),
        (lambda: sde(1, eta2=-1.0), "eta2 = -1.0"),
        (lambda: sde(1, eta2=math.nan), "eta2 = nan"),
        (lambda: sde(1, eta2=lambda rho: -rho), "eta2 = .* not negative"),
        (
            lambda: sde(1, eta2=lambda rho: 1.0),
            r"eta2 = .* of shape \(\) for .* function of arrays",
        ),
        (lambda: sde(1, form="flow"), "form = 'flow'"),
        (lambda: sde(1, variable="t"), "variable = 't'"),
        (lambda: sde(2, second="half"), "second = 'half'"),
        (lambda: sde(2, third="shipped"), "third = 'shipped' with order = 2"),
        (lambda: sde(3, third="uncorrected"), "third = 'uncorrected' with .*'lambda'"),
        (lambda: sde(2, second="midpoint", variable="rho"), "second = 'midpoint' with variable"),
        (lambda: sde(2, corrector=1), "corrector = 1"),
        (lambda: sde(2, corrector=2, form="noise"), "corrector = 2 with form = 'noise'"),
        (lambda: sde(2, corrector=-1), "corrector = -1"),
        (lambda: sde(2, growth=0.0), "growth = 0.0"),
        (lambda: sde(1, s_noise=0.0), "s_noise = 0.0"),
        (lambda: sde(1, form="noise", eta2=er_noise), "eta2 = .* with form = 'noise'"),
        (lambda: Window(1.0, 2.0, 1.0), "low = 2.0, high = 1.0"),
        (lambda: Window(-1.0), "eta2 = -1.0"),
        (lambda: er_sde(4), "order = 4"),
        (lambda: er_sde(2, phi=0.5), "phi = 0.5"),
        (lambda: ancestral(-0.1), "eta = -0.1"),
        (lambda: ancestral(variance="medium"), "variance = 'medium'"),
        (lambda: jump(1.1), "gamma = 1.1; need a number from 0 to 1"),
        (lambda: jump(to="there"), "to = 'there'"),
    ],
)
def test_bad_parameters(make, words):
    with pytest.raises(ValueError, match=words):
        make()
