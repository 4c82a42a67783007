"""Order, error constant, stability and words of every registered solver, against runs."""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import fewstep as fs
from fewstep import _analysis
from fewstep._names import NAMES
from problems import PROCESSES, in_turn

SOLVERS = list(fs.solvers)
DETERMINISTIC = [name for name, entry in fs.solvers.items() if not entry.stochastic]
STOCHASTIC = [name for name in SOLVERS if name not in DETERMINISTIC]

# -- order ---------------------------------------------------------------------------------------

#: Data broad enough for the asymptotic regime to begin at few steps.
MEANS = np.random.default_rng(3).normal(size=(3, 2)) * 0.6
STD = np.array([0.5, 0.7, 0.9])
EXACT = fs.exact.Mixture(np.full(3, 1 / 3), MEANS, STD**2)


def denoise(x: np.ndarray, level: fs.Level) -> np.ndarray:
    v = level.alpha**2 * STD**2 + level.sigma**2
    d = x[:, None] - level.alpha * MEANS
    r = -0.5 * (d**2).sum(-1) / v - np.log(v)
    r = np.exp(r - r.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return np.einsum("bk,bkd->bd", r, MEANS + (level.alpha * STD**2 / v)[:, None] * d)


def run(plan: fs.Plan, x: np.ndarray) -> np.ndarray:
    state = plan.start(*[torch.from_numpy(x)] * plan.given)
    while not state.done:
        answer = denoise(state.query()[0].numpy(), plan.asked(state.index))
        state = state.advance(torch.from_numpy(answer))
    return state.x.numpy()


def inside(n: int) -> np.ndarray:
    return fs.VP().time(np.linspace(-0.8, 1.0, n + 1))


#: (process, grid of n steps, sizes): away from both ends, to sigma = 0, and from alpha = 0 to it.
RUNS = {
    "inside": (fs.VP(), inside, (64, 128)),
    "to clean": (fs.Flow(), lambda n: np.linspace(0.7, 0.0, n + 1), (100, 200)),
    "noise to clean": (fs.Flow(), lambda n: np.linspace(1.0, 0.0, n + 1), (100, 200)),
}
#: A power of the step times its logarithm shows a slope this much off at these sizes.
SLACK = 0.4


@functools.cache
def reference(where: str) -> tuple[np.ndarray, np.ndarray]:
    """Starting states, and the solution at the end of the run."""
    process, grid, _ = RUNS[where]
    ends = [process.level(float(t)) for t in grid(1)]
    size = math.hypot(0.7 * ends[0].alpha, ends[0].sigma)
    x = np.random.default_rng(1).normal(size=(4, 2)) * size
    exact = EXACT.solve(torch.from_numpy(x), *((v.alpha, v.sigma) for v in ends))
    return x, exact.numpy()


@pytest.mark.parametrize(("solver", "where"), in_turn(3, DETERMINISTIC, RUNS))
def test_order_is_the_measured_one(solver, where):
    """plan.order() of 16 steps against the errors of whole runs on the same grid, refined."""
    process, grid, sizes = RUNS[where]
    plan = fs.plan(solver, process, grid=grid(16))
    x, exact = reference(where)
    order = plan.order()
    for refine in (1, 4):  # methods with large errors on long steps reach their slope later
        plans = [fs.plan(solver, process, grid=grid(n * refine)) for n in sizes]
        errors = [float(np.sqrt(np.mean((run(p, x) - exact) ** 2))) for p in plans]
        slope = math.log2(errors[-2] / errors[-1])
        if abs(slope - order) < SLACK or order == 0:
            break
    if order == 0:  # does not converge
        assert slope < SLACK, errors
    else:
        assert slope == pytest.approx(order, abs=SLACK), (errors, _analysis.orders(plan))


@pytest.mark.parametrize(
    ("solver", "name"), in_turn(2, DETERMINISTIC, ["vp", "scaled-linear table"])
)
def test_bulk_order_is_the_declared_one(solver, name):
    process = PROCESSES[name]
    entry = fs.solvers[solver]
    found = _analysis.orders(fs.plan(solver, process, 8))
    assert found.computed
    assert round(found.bulk) == (entry.smooth_order or entry.order), found


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_steps_have_the_order_that_their_rows_declare(solver):
    """From exact history a step errs by h^(p + 1), p the order of its last row: in bulk, and, of
    methods that have their order on any grid, from the first step on."""
    process = fs.EDM()
    plan = fs.plan(solver, process, grid=[*process.time(np.linspace(-1.0, 1.0, 9))])
    grid = _analysis._grid(*_analysis._source(plan), plan)
    for node, those in ((4, range(11, 14)), (0, range(6))):
        errors = [_analysis._errors(grid, node, f) for f in _analysis._SHRINK]
        times, _ = _analysis._window(grid, node, 0.5)
        draft = fs.solvers[solver].draft(process, times)
        steps = _analysis._steps(draft, times)
        for i in those:
            slope = _analysis._slope([e[i] for e in errors])
            declared = draft.rows[steps[i][-1] - draft.given].order
            if node:
                assert round(slope - 1) == declared, (i, slope)
            elif not fs.solvers[solver].smooth_order:
                # the symmetry of the first step of a pair can give more
                assert slope - 1 > declared - 0.7, (i, slope)


@pytest.mark.parametrize(
    ("solver", "name", "nfe"), in_turn(2, DETERMINISTIC, ["edm", "flow"], [1, 3])
)
def test_short_plans_have_an_order_too(solver, name, nfe):
    plan = fs.plan(solver, PROCESSES[name], nfe)
    # 0: Runge-Kutta in lambda from alpha = 0, where steps in lambda never become small
    assert (0 if fs.solvers[solver].fragile else 1) <= plan.order() <= 6


def test_upward_and_tables():
    for solver in ("ddim", "dpmpp_3m", "unipc_2"):
        up = fs.plan(solver, fs.VP(), 8, upward=True)
        assert _analysis.orders(up).bulk == pytest.approx(fs.solvers[solver].order, abs=0.2)
        table = fs.plan(solver, fs.DiscreteVP.squared_cosine(), 8)
        smooth = fs.plan(solver, fs.CosineVP(), 8)
        assert table.order() == smooth.order()


def test_start_up_and_end_are_in_the_order():
    """Third order in bulk; the first DDIM step and the last make it second order."""
    found = _analysis.orders(fs.plan("dpmpp_3m", fs.EDM(), 8))
    assert [round(v) for v in found[:3]] == [3, 2, 2]
    assert found.order == 2
    # flow_pc2 starts with a corrected step and has a limit at sigma = 0: third order throughout
    assert fs.plan("flow_pc2", fs.EDM(), 8).order() == 3
    assert fs.plan("flow_pc2", fs.Flow(), 8).order() == 2  # its step from alpha = 0 is DDIM


def test_the_order_can_be_wrong():
    """A weight off by its own h is found out."""
    exact = fs.solvers["dpmpp_2m_heun"].step

    def bent(process, history, end):
        formula = exact(process, history, end)
        if len(formula.b) == 2:
            shift = 0.05 * (end.lam - history[0].lam)
            formula = formula._replace(b=[formula.b[0] + shift, formula.b[1] - shift])
        return formula

    plan = fs.plan(fs.Multistep("bent", 2, bent, "test", "sigma = 0"), fs.EDM(), 8, final="min")
    assert round(_analysis.orders(plan).bulk) == 1


def explosive(process, history, end):
    """y_{i+1} = 3 y_i - 2 y_{i-1} + ...: exact on constants, first order, root 2."""
    first = fs.solvers["ddim"].step(process, history[:1], end)
    if len(history) == 1 or end.sigma == 0:
        return first._replace(
            a=[*first.a, *[0.0] * (len(history) - 1)], b=[*first.b, *[0.0] * (len(history) - 1)]
        )
    again = fs.solvers["ddim"].step(process, history[1:], history[0])
    # 2 (x_i - ddim(x_{i-1})), carried to the end, is zero on exact solutions to second order
    scale = 2.0 * end.alpha / history[0].alpha
    a = [first.a[0] + scale, -scale * again.a[0]]
    return fs.Formula(a, [first.b[0], -scale * again.b[0]], 1)


def test_a_method_that_is_not_zero_stable_has_no_order():
    solver = fs.Multistep("explosive", 1, explosive, "test", "sigma = 0", nodes=2)
    plan = fs.plan(solver, fs.EDM(), 8, final="min")
    assert _analysis.orders(plan).bulk == 0
    assert plan.order() == 0
    assert _analysis.stability(plan).limit == 0


class Heun(fs.Solver):
    """Several stages in a step: Heun's method in lambda, exponential form, 2 NFE."""

    name, order, nfe_per_step = "heun", 2, 2
    source, ends = "test", "sigma = 0: DDIM"

    def steps(self, nfe, clean):
        return (nfe + 1) // 2

    def draft(self, process, times, nfe=None):
        levels, rows, evaluated = [process.level(float(times[0]))], [], [True]
        for t in times[1:]:
            now, end, k = levels[-1], process.level(float(t)), len(levels) - 1
            step = fs.solvers["ddim"].step(process, [now], end)
            rows.append(fs.Row({k: step.a[0]}, {k: step.b[0]}, 1))
            levels.append(end)
            evaluated.append(end.sigma > 0)
            if end.sigma > 0:
                h = end.lam - now.lam
                late = end.alpha * (h - 1 + math.exp(-h)) / h
                b = {k: step.b[0] - late, k + 1: late}
                rows.append(fs.Row({k: step.a[0]}, b, 2))
                levels.append(end)
                evaluated.append(bool(t != times[-1]))
        return fs.Draft(tuple(levels), tuple(rows), tuple(evaluated))


def test_several_stages():
    plan = fs.plan(Heun(), fs.EDM(), grid=[*np.geomspace(10, 0.1, 7)])
    found = _analysis.orders(plan)
    assert [round(v) for v in found[:3]] == [2, 3, 3]
    constant = plan.error_constant()
    assert constant.limit == pytest.approx([0.0, -1 / 12], abs=1e-4)  # the trapezoidal rule
    assert constant.orders == (2,) * 6
    # R(s) = 1 - s phi_1 h + ..., from its two rows
    regions = plan.stability()
    h, s = regions.h[0], 1.7
    first = 1 - s * (1 - math.exp(-h))
    late = (h - 1 + math.exp(-h)) / h
    both = math.exp(-h) + (1 - s) * (1 - math.exp(-h) - late) + (1 - s) * late * first
    assert float(regions.radius(0, s)) == pytest.approx(abs(both))


def test_a_loaded_plan_says_what_its_rows_declare(tmp_path):
    plan = fs.plan("dpmpp_3m", fs.VP(), 8)
    plan.save(tmp_path / "p")
    loaded = fs.Plan.load(tmp_path / "p")
    found = _analysis.orders(loaded)
    assert found == (3, 2, 2, False)
    assert loaded.order() == plan.order() == 2
    assert loaded.error_constant().limit == ()
    assert loaded.error_constant().steps == pytest.approx(plan.error_constant().steps, nan_ok=True)
    assert loaded.stability().intervals == plan.stability().intervals
    assert "as declared" in loaded.explain()
    fused = plan.fuse()
    assert fused.stability().limit == pytest.approx(plan.stability().limit, rel=1e-6)


# -- error constant ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        ("ddim", [1 / 2]),
        ("dpmpp_2m_heun", [0, 5 / 12]),
        ("dpmpp_2m", [1 / 12, 5 / 12]),  # h/2 for the first moment costs h^3 D' / 12
        ("dpmpp_3m", [0, 0, 3 / 8]),
        ("ab4", [0, 0, 0, 251 / 720]),
        ("dpmpp_3m_shipped", [0, 1 / 12]),  # half of the h^3 D'' / 6 is left out
        ("unipc_1", [1 / 12, -1 / 12]),
    ],
)
def test_error_constant_in_the_limit(solver, limit):
    constant = fs.plan(solver, fs.VP(), 8).error_constant()
    assert constant.limit == pytest.approx(limit, abs=2e-4)
    assert constant.order == len(limit)


def test_error_constant_of_steps():
    """DDIM: (h - 1 + e^-h) / h^2 of every step; with equal small steps the limit."""
    plan = fs.plan("ddim", fs.EDM(), 6)
    constant = plan.error_constant()
    h = np.diff([v.lam for v in plan.levels[:-1]])
    assert constant.steps[:-1] == pytest.approx((h - 1 + np.exp(-h)) / h**2, rel=1e-9)
    assert math.isnan(constant.steps[-1])
    small = fs.plan("ab4", fs.EDM(), grid=[*np.exp(-np.linspace(0, 0.7, 11))]).error_constant()
    assert small.orders == (1, 2, 3, *[4] * 7)
    assert small.steps[5] == pytest.approx(251 / 720, rel=0.05)


def test_error_constant_predicts_the_error_of_a_step():
    """C h^3 D'' against the local error for D = sin(3 lambda)."""
    process, h = fs.EDM(), 0.01
    plan = fs.plan("dpmpp_2m_heun", process, grid=[*np.exp(-np.arange(4) * h)])
    w, lam = 3.0, np.arange(4) * h
    data, state = np.sin(w * lam), (np.sin(w * lam) - w * np.cos(w * lam)) / (1 + w * w)
    row = plan.rows[2]
    made = sum(c * state[j] for j, c in row.a.items()) + sum(c * data[j] for j, c in row.b.items())
    predicted = plan.error_constant().steps[2] * h**3 * (-w * w * np.sin(w * lam[2]))
    assert state[3] - made == pytest.approx(predicted, rel=0.15)


# -- stability -----------------------------------------------------------------------------------


def test_stability_of_ddim_is_the_formula():
    plan = fs.plan("ddim", fs.VP(), 9)
    regions = plan.stability()
    h = np.array(regions.h)
    assert [high for _, high in regions.intervals] == pytest.approx(2 / -np.expm1(-h), rel=1e-6)
    assert regions.least == 0
    assert regions.limit == pytest.approx(min(2 / -np.expm1(-h)))
    s = np.array([0.3 + 0.4j, 2.0, -1.0])
    assert regions.radius(3, s) == pytest.approx(abs(1 - s * -np.expm1(-h[3])))
    with pytest.raises(ValueError, match="step = 99; steps of finite size are 0, 1"):
        regions.radius(99, 1.0)
    up = fs.plan("ddim", fs.VP(), 9, upward=True).stability()
    assert [high for _, high in up.intervals] == pytest.approx(2 / np.expm1(-np.array(up.h)))


def noise_form_interval(solver: fs.Solver) -> float:
    """The end of the stable interval in z = Delta de/dy, on equal steps of a rho that hardly
    changes over the step."""
    plan = fs.plan(solver, fs.EDM(sigma_max=2e4), grid=[*(2e4 - np.arange(24.0))])
    regions = plan.stability()
    return regions.intervals[16][1] * -math.expm1(-regions.h[16])


def test_stability_intervals_of_adams_and_momentum():
    """Closed forms: 2, 1, 6/11, 3/10 for Adams; heavy ball times (2 - beta) / beta; GHVB of
    2, 3, 4 outputs 2 - beta, 6 (2 - beta) / (12 - beta), 3 (2 - beta) / (11 - beta)."""
    adams = {1: 2.0, 2: 1.0, 3: 6 / 11, 4: 3 / 10}
    for p, end in adams.items():
        plain = fs.exponential(p, form="noise", variable="rho")
        assert noise_form_interval(plain) == pytest.approx(end, rel=2e-3)
    for beta in (0.3, 0.8):
        more = (2 - beta) / beta
        for p, end in adams.items():
            base = fs.exponential(p, form="noise", variable="rho")
            solver = fs.heavy_ball(base, beta)
            assert noise_form_interval(solver) == pytest.approx(end * more, rel=5e-3), (p, beta)
        closed = {
            2: 2 - beta,
            3: 6 * (2 - beta) / (12 - beta),
            4: 3 * (2 - beta) / (11 - beta),
        }
        for r, end in closed.items():
            solver = fs.ghvb(r, beta)
            assert noise_form_interval(solver) == pytest.approx(end, rel=5e-3), (r, beta)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_amplification_is_that_of_a_run(solver):
    """The network D = (1 - s) x / alpha, run."""
    plan = fs.plan(solver, fs.VP(), 7, final="min")
    s = np.array([0.4, 1.0, 3.0])
    ran, exact = plan.stability().amplification(s)
    span = plan.levels[-1].lam - plan.levels[0].lam
    assert exact == pytest.approx(np.exp(-s * span))
    for k, stiffness in enumerate(s):
        state = plan.start(*[torch.ones(1, 1, dtype=torch.float64)] * plan.given)
        while not state.done:
            x_in, _ = state.query()
            state = state.advance((1 - stiffness) * x_in / plan.asked(state.index).alpha)
        end = abs(float(state.x)) / plan.levels[-1].alpha * plan.levels[0].alpha
        assert ran[k] == pytest.approx(end, rel=1e-6, abs=1e-12)


def test_a_long_step_amplifies_where_data_follow_the_state():
    """Extrapolated to order 4 over h near 2: unstable for small s, and stable near s = 1."""
    regions = fs.plan("ab4", fs.VP(), 8).stability()
    assert 0 < regions.least < 1 < regions.limit < 2
    assert float(regions.radius(6, 0.1)) > 1
    assert float(regions.radius(6, 1.0)) < 1


def test_stability_of_plans_with_one_number_per_mode():
    plan = fs.plan("dpmpp_2m", fs.VP(), 6)
    rows = [
        fs.Row(
            {j: c * np.ones((2, 3)) for j, c in row.a.items()},
            {j: c * np.ones((2, 3)) for j, c in row.b.items()},
            row.order,
        )
        for row in plan.rows
    ]
    many = fs.Plan(plan.levels, tuple(rows), plan.calls)
    assert many.stability().intervals == plan.stability().intervals
    s = np.array([0.5, 2.0])
    assert many.stability().amplification(s)[0] == pytest.approx(
        plan.stability().amplification(s)[0]
    )


def test_nothing_to_say_is_said():
    plan = fs.plan("ddim", fs.EDM(), 1)
    with pytest.raises(ValueError, match="no step of finite size"):
        plan.stability()
    assert "no step of finite size" in plan.explain()


def test_plot(tmp_path, monkeypatch):
    regions = fs.plan("unipc_2", fs.EDM(), 6).stability()
    regions.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    axes = Figure().subplots(1, 2)
    regions.plot(axes)
    texts = [t.get_text() for t in axes[0].texts]
    assert any(f"limit {regions.limit:.3g}" in t for t in texts)
    assert axes[0].get_xlabel() == "Re s"
    assert axes[1].get_xlabel() == "step"
    with pytest.raises(ValueError, match="target: 1 axes; need two"):
        regions.plot(axes[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="fewstep"):
        regions.plot(tmp_path / "b.png")


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_explain(solver):
    entry = fs.solvers[solver]
    plan = fs.plan(solver, fs.VP(), 7)
    text = plan.explain()
    assert text.startswith(f"{solver}: 7 network evaluations")
    order = f"{entry.order} (weak)" if entry.stochastic else f"together {plan.order()}"
    for words in (entry.source, entry.ends, "VP(", order, "Formula"):
        assert words in text
    # the family's formula is there, not only its name
    formula = text.split("Formula")[1].split("Source:")[0]
    assert "=" in formula
    assert len(formula.splitlines()) > 2
    if solver in NAMES:
        for name in (*NAMES[solver].diffusers, *NAMES[solver].k_diffusion, *NAMES[solver].comfyui):
            assert name in text


@pytest.mark.parametrize("nfe", [1, 8])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_orders_of_the_ode_are_refused_for_stochastic_plans(solver, nfe):
    plan = fs.plan(solver, fs.VP(), nfe)
    for analysis in (plan.order, plan.error_constant, plan.stability):
        with pytest.raises(ValueError, match="draws noise"):
            analysis()


def test_names_are_of_solvers():
    assert set(NAMES) <= set(SOLVERS)
