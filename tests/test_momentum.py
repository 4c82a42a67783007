"""Fixed-number Adams, momentum, DualFast and UniC: the published recursions, taken literally."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import fewstep as fs
from fewstep._solvers._momentum import adams, dualfast, ghvb, heavy_ball, ipndm, unic
from problems import PROCESSES, Mixture, run
from test_solvers import error

MIXTURE = Mixture(components=3, dim=2, seed=4)
PATHS = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow(t_start=0.97)}

#: beta c_k of GHVB, newest first (arXiv 2307.11118).
TABLE = {
    1: lambda b: [b],
    2: lambda b: [(2 + b) / 2, -(2 - b) / 2],
    3: lambda b: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
    4: lambda b: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
    5: lambda b: [
        (1650 + 251 * b) / 720,
        -(3420 - 646 * b) / 720,
        (2880 - 264 * b) / 720,
        -(1380 - 106 * b) / 720,
        (270 - 19 * b) / 720,
    ],
}


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("order", TABLE)
def test_coefficients(order, beta):
    np.testing.assert_allclose(beta * np.array(adams(order, beta)), TABLE[order](beta), rtol=1e-13)


# -- literal recursions --------------------------------------------------------------------------


def literal(plan: fs.Plan, slope) -> np.ndarray:
    """y_{i+1} = y_i + Delta_i slope(i, e_i) along the levels of a plan, in x / alpha over rho."""
    levels = plan.levels
    y = MIXTURE.start(16) * levels[0].sigma / levels[0].alpha
    for i, (start, end) in enumerate(pairwise(levels)):
        d = MIXTURE.denoise(start.alpha * y, start.alpha, start.sigma)
        y = y + (end.rho - start.rho) * slope(i, (y - d) / start.rho)
    return y * levels[-1].alpha


def agrees(solver: fs.Solver, slope, grid: str = "karras", nfe: int = 11) -> None:
    for path in PATHS.values():
        plan = fs.plan(solver, path, nfe, grid=grid)
        x = MIXTURE.start(16) * plan.levels[0].sigma
        want = literal(plan, slope())
        size = np.abs(want).max()
        np.testing.assert_allclose(run(plan, MIXTURE.denoise, x), want, atol=1e-11 * size)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_ipndm_is_its_recursion(order):
    def slope():
        past = []

        def of(i, e):
            past.insert(0, e)
            return sum(c * v for c, v in zip(TABLE[min(i + 1, order)](1.0), past, strict=False))

        return of

    agrees(ipndm(order), slope)


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ghvb_is_its_recursion(order, beta):
    """With velocities as in the paper, against rows over two states."""

    def slope():
        past = []

        def of(i, e):
            past.insert(0, (1 - beta) * past[0] + beta * e if past else e)
            c = np.array(TABLE[min(i + 1, order)](beta)) / beta
            return sum(w * v for w, v in zip(c, past, strict=False))

        return of

    agrees(ghvb(order, beta), slope)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_heavy_ball_is_its_recursion(order, nesterov):
    beta = 0.7

    def slope():
        past, velocity = [], []

        def of(i, e):
            past.insert(0, e)
            f = sum(c * v for c, v in zip(TABLE[min(i + 1, order)](1.0), past, strict=False))
            velocity.append((1 - beta) * velocity[-1] + beta * f if velocity else e)
            return (1 - beta) * velocity[-1] + beta * f if nesterov else velocity[-1]

        return of

    agrees(heavy_ball(ipndm(order), beta, nesterov=nesterov), slope)


def test_heavy_ball_on_dpmpp_2m_is_the_official_update():
    """The velocity is that of D_s + D1 / 2 and starts at the second step."""
    beta = 0.9
    for path in PATHS.values():
        plan = fs.plan("hb_dpmpp_2m", path, 9, grid="lambda", final="min")
        levels = plan.levels
        x = start = MIXTURE.start(16) * levels[0].sigma
        velocity, past = None, []
        for i, (s, t) in enumerate(pairwise(levels)):
            past.append(MIXTURE.denoise(x, s.alpha, s.sigma))
            f = past[-1]
            if i > 0:
                ratio = (s.lam - levels[i - 1].lam) / (t.lam - s.lam)
                f = f + 0.5 * (past[-1] - past[-2]) / ratio
                f = velocity = f if velocity is None else (1 - beta) * velocity + beta * f
            x = t.sigma / s.sigma * x - t.alpha * math.expm1(s.lam - t.lam) * f
        np.testing.assert_allclose(run(plan, MIXTURE.denoise, start), x, atol=1e-11)


def test_the_family_meets():
    for process in PROCESSES.values():
        final = "min" if process.t_clean is None else "zero"

        def plan(solver, process=process, final=final):
            return fs.plan(solver, process, 7, final=final)

        def rows_agree(one, two):
            for mine, theirs in zip(one.rows, two.rows, strict=True):
                for key in ("a", "b"):
                    c, d = getattr(mine, key), getattr(theirs, key)
                    for j in c.keys() | d.keys():
                        size = max(map(abs, [*c.values(), *d.values()]))
                        assert c.get(j, 0) == pytest.approx(d.get(j, 0), abs=1e-12 * size)

        rows_agree(plan(ghvb(1, 0.6)), plan(heavy_ball("ddim", 0.6, form="noise")))
        rows_agree(plan(ghvb(3, 1.0)), plan("ipndm_3"))
        rows_agree(plan(heavy_ball("dpmpp_2m", 1.0)), plan("dpmpp_2m"))
        rows_agree(plan(dualfast("ddim", 0.5, rising=False)), plan("ipndm_2"))
        rows_agree(plan(dualfast("dpmpp_2m", 0.0)), plan("dpmpp_2m"))


def test_exact_ghvb_of_beta_one_is_variable_step_adams():
    for grid in ("karras", "uniform"):
        plans = [
            fs.plan(s, fs.EDM(), 7, grid=grid) for s in (ghvb(4, 1.0, exact=True), "deis_rhoab3")
        ]
        x = MIXTURE.start(8) * 80
        mine, theirs = (run(plan, MIXTURE.denoise, x) for plan in plans)
        np.testing.assert_allclose(mine, theirs, atol=1e-9)


# -- order and stability -------------------------------------------------------------------------


def slope_weights(solver: fs.Multistep, rho: list[float]) -> np.ndarray:
    """Weights of e at these rho, newest first, in the slope of the step to the first of them, for
    a method without memory of states."""
    process = fs.EDM()
    end, *history = (process.level(r) for r in rho)
    formula = solver.step(process, history, end)
    step = rho[0] - rho[1]
    return np.array([-b * level.rho / step for b, level in zip(formula.b, history, strict=True)])


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_exact_ghvb_integrates_polynomials(order, beta):
    rho = [0.4, 0.5, 0.95, 1.3, 2.9, 3.1, 5.0]  # target, start, older
    weights = slope_weights(ghvb(order, beta, exact=True), rho)
    u = (np.array(rho[1:]) - rho[1]) / (rho[0] - rho[1])
    for q in range(order):
        terms = weights * u[: len(weights)] ** q
        assert terms.sum() == pytest.approx(1 / (q + 1), abs=1e-10 * np.abs(terms).sum())


@pytest.mark.parametrize("beta", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_on_equal_steps_of_rho(order, beta):
    """dy/drho = exp(rho), past the start: order r for every beta."""
    errors = []
    for n in (100, 200, 400):
        rho = np.linspace(5.0, 3.0, n + 1)
        plan = fs.plan(ghvb(order, beta), fs.EDM(sigma_min=3.0, sigma_max=5.0), grid=rho)
        exact = np.exp(rho)
        y, data = {0: exact[0]}, {}
        for i, row in enumerate(plan.rows):
            data[i] = y[i] - rho[i] * exact[i]
            y[i + 1] = sum(c * y[j] for j, c in row.a.items())
            y[i + 1] += sum(c * data[j] for j, c in row.b.items())
            if i + 1 <= n // 4:
                y[i + 1] = exact[i + 1]
        errors.append(abs(y[n] - exact[n]))
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(slopes, order, atol=0.12, err_msg=str(errors))


def radius(solver: fs.Solver, z: float) -> float:
    """Spectral radius of the method on equal steps of rho with Delta de/dy = z."""
    n, step = 24, 0.01
    rho = 1.0 - step * np.arange(n + 1)
    plan = fs.plan(solver, fs.EDM(sigma_min=0.5, sigma_max=1.0), grid=rho)
    row, slope = plan.rows[-1], -z / step  # e = slope y, D = y - rho e
    span = n - min((*row.a, *row.b))
    companion = np.eye(span, k=-1)
    for j, c in row.a.items():
        companion[0, n - 1 - j] += c
    for j, c in row.b.items():
        companion[0, n - 1 - j] += c * (1 - rho[j] * slope)
    return float(np.abs(np.linalg.eigvals(companion)).max())


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(
    "kind", ["hb 1", "hb 2", "hb 3", "hb 4", "ghvb 1", "ghvb 2", "ghvb 3", "ghvb 4"]
)
def test_interval_of_stability(kind, beta):
    """Closed forms of the end point on the negative real axis."""
    name, order = kind.split()
    order = int(order)
    if name == "hb":
        solver = heavy_ball(ipndm(order), beta)
        reach = {1: 2, 2: 1, 3: 6 / 11, 4: 3 / 10}[order] * (2 - beta) / beta
    else:
        solver = ghvb(order, beta)
        reach = {
            1: 2 * (2 - beta) / beta,
            2: 2 - beta,
            3: 6 * (2 - beta) / (12 - beta),
            4: 3 * (2 - beta) / (11 - beta),
        }[order]
    assert radius(solver, -0.99 * reach) < 1
    assert radius(solver, -1.01 * reach) > 1


def test_momentum_multiplies_the_error_of_ddim():
    """(2 - beta) / beta on equal steps of rho."""
    rho = np.linspace(5.0, 1.0, 2001)
    process = fs.EDM(sigma_min=1.0, sigma_max=5.0)
    x = MIXTURE.start(8) * 5
    fine = run(
        fs.plan("deis_rhoab3", process, grid=np.linspace(5.0, 1.0, 4001)), MIXTURE.denoise, x
    )
    plain, *slowed = (
        run(fs.plan(solver, process, grid=rho), MIXTURE.denoise, x) - fine
        for solver in ("ddim", heavy_ball("ddim", 0.8), heavy_ball("ddim", 0.5))
    )
    for gap, beta in zip(slowed, (0.8, 0.5), strict=True):
        ratio = np.sqrt((gap**2).mean() / (plain**2).mean())
        assert ratio == pytest.approx((2 - beta) / beta, rel=0.03)


# -- UniC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["uniform", "alternating 1:3"])
@pytest.mark.parametrize(
    "predictor",
    ["ddim", "dpmpp_2m", "dpm_solver_2m", "deis_rhoab1", "deis_tab1", "flow_ab2", "ipndm_2"],
)
def test_unic_raises_the_order_by_one(predictor, spacing):
    solver = unic(predictor)
    entry = fs.solvers[predictor]
    smooth = spacing == "uniform" and entry.smooth_order
    assert solver.order == entry.order + 1
    want = (entry.smooth_order if smooth else entry.order) + 1
    errors = [error(solver, fs.VP(), n, spacing) for n in (160, 320, 640)]
    slope = -np.polyfit(np.log([160, 320, 640]), np.log(errors), 1)[0]
    assert slope == pytest.approx(want, abs=0.25), errors


def test_unic_is_the_corrector_of_the_named_methods():
    made = unic("dpmpp_2m", second="midpoint", growth=math.inf)
    for process in (fs.VP(), fs.EDM(), fs.Flow()):
        plans = [fs.plan(s, process, 7) for s in (replace(made, lower_final=True), "unipc_2")]
        assert plans[0] == plans[1]
        plans = [fs.plan(s, process, 7) for s in (unic("flow_ab2"), "flow_pc2")]
        assert plans[0] == plans[1]


def test_unic_may_look_further_or_less_far_than_its_predictor():
    for solver, order, corrected in (
        (unic("ddim", 3), 2, [2, 3, 4, 4]),
        (unic("dpmpp_3m", 1), 2, [2, 2, 2, 2]),
    ):
        plan = fs.plan(solver, fs.EDM(), 6, grid="lambda", final="min")
        assert plan.nfe == 6
        assert solver.order == order
        pairs = zip(plan.rows, plan.levels, plan.levels[1:], strict=False)
        orders = [row.order for row, before, after in pairs if before.t == after.t]
        assert orders[:4] == corrected


@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrected_vary_coeff_differs_where_two_outputs_were_replaced(order):
    """Steps of order 2 and corrections of order 1 (start-up and end included), nothing else."""
    mine, theirs = (
        fs.plan(name, fs.VP(), 9, grid="lambda", final="min")
        for name in (f"unipc_{order}_vary", f"unipc_{order}")
    )
    differ = [mine.rows[i] != row for i, row in enumerate(theirs.rows)]
    two = [len(row.b) == 2 for row in theirs.rows]
    assert differ == two
    assert any(two)


# -- ends and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        ghvb(3, 0.6, exact=True),
        heavy_ball("ipndm_4", 0.5, nesterov=True),
        heavy_ball("flow_ab2", 0.8),
        heavy_ball("v_ab2", 0.8),
        dualfast("dpm_solver_2m", lambda process, level: 0.1),
        unic("ipndm_4", 4),
        unic("v_ab2"),
    ],
    ids=lambda solver: solver.name,
)
def test_all_processes_both_ends_both_ways(solver):
    x = MIXTURE.start(4)
    for process in PROCESSES.values():
        for final in ("min",) if process.t_clean is None else ("zero", "min"):
            plan = fs.plan(solver, process, 5, final=final)
            assert np.isfinite(run(plan, MIXTURE.denoise, x * plan.levels[0].sigma)).all()
        up = fs.plan(solver, process, 5, upward=True)
        assert np.isfinite(run(up, MIXTURE.denoise, x)).all()


def test_up_and_down_again():
    """Fine grids: encoding and decoding return the data."""
    x = MIXTURE.start(8) * 0.3
    for solver in ("ipndm_4", "ghvb_3_8", "hb_ipndm_4"):
        up = fs.plan(solver, fs.VP(), 400, grid="lambda", upward=True)
        down = fs.plan(solver, fs.VP(), 400, grid="lambda", final="min")
        back = run(down, MIXTURE.denoise, run(up, MIXTURE.denoise, x))
        assert np.abs(back - x).max() < 0.02


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ipndm(0), "order = 0"),
        (lambda: ghvb(2, 0.0), "beta = 0"),
        (lambda: ghvb(2, 1.5), "beta = 1.5"),
        (lambda: heavy_ball("ddimm", 0.9), "did you mean 'ddim'"),
        (lambda: heavy_ball(3, 0.9), "base = 3"),  # pyright: ignore[reportArgumentType]
        (lambda: heavy_ball("unipc_2", 0.9), "base = 'unipc_2'.*corrector"),
        (lambda: heavy_ball("ddim", 0.9, plain=0), "plain = 0"),
        (lambda: heavy_ball("ddim", 0.9, form="x"), "form"),
        (lambda: dualfast("ddim", -0.1), "c = -0.1"),
        (lambda: unic("bdia_1"), "predictor = 'bdia_1'"),
        (lambda: unic("flow_pc2"), "predictor = 'flow_pc2'"),
        (lambda: unic("hb_ipndm_4"), "predictor = 'hb_ipndm_4'.*momentum"),
        (lambda: unic("ghvb_1_8"), "predictor = 'ghvb_1_8'.*momentum"),
        (lambda: unic("edict"), "predictor = 'edict'"),
        (lambda: unic("ddim", 0), "order = 0"),
        (lambda: unic("ddim", second="half"), "second = 'half'"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fs.unic("ddpm"),
        lambda: fs.heavy_ball("sde_dpmpp_2m", 0.9),
        lambda: fs.dualfast("ddpm"),
        lambda: fs.bdia("ddpm", 0.5),
        lambda: fs.started(fs.solvers["sde_dpmpp_2m"], fs.solvers["heun"], [2]),
        lambda: fs.started(fs.solvers["dpmpp_2m"], fs.solvers["seeds_2"], [2]),
    ],
)
def test_what_builds_on_a_deterministic_solver_refuses_a_stochastic_one(make):
    """Their rows would leave out its noise, or take a corrected state for the one that had it."""
    with pytest.raises(ValueError, match="draws noise"):
        make()
