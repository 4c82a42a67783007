"""Every registered solver: measured order, behaviour at the ends, facts it states.

Nothing here names a solver it tests: adding one to the registry subjects it to all of this.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as fs
from problems import PROCESSES, Mixture, Normal, in_turn, normals, reverse_sde, run, walk

SOLVERS = list(fs.solvers)
STOCHASTIC = [name for name, entry in fs.solvers.items() if entry.stochastic]
DETERMINISTIC = [name for name in SOLVERS if name not in STOCHASTIC]

# -- order ---------------------------------------------------------------------------------------

#: The exact problem: fast in numpy for the runs, and with an ODE solution known to 1e-12.
MIXTURE = Mixture(components=3, dim=2, seed=4)
EXACT = fs.exact.Mixture(np.full(3, 1 / 3), MIXTURE.means, MIXTURE.std**2)
LAM = (-1.5, 1.5)
#: Nodes with exact states before the run, and nodes after it that keep away what a solver does at
#: its own end (lower orders).
HISTORY, TAIL = 3, 4
ORDER_PROCESSES = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow()}
#: Step sizes: equal, and alternating 1 : 3.
SPACINGS = {"uniform": (1.0, 1.0), "alternating 1:3": (0.5, 1.5)}


@functools.cache
def exact_path(n: int, spacing: str) -> tuple[np.ndarray, torch.Tensor]:
    """lambda of HISTORY + n + TAIL + 1 nodes; the exact y = x / alpha at the first HISTORY + 1 and
    at node HISTORY + n."""
    sizes = np.resize(SPACINGS[spacing], HISTORY + n + TAIL) * (LAM[1] - LAM[0]) / n
    lam = LAM[0] + np.concatenate([[0.0], np.cumsum(sizes)]) - sizes[:HISTORY].sum()
    rho = np.exp(-lam)
    y = torch.from_numpy(MIXTURE.start(6) * math.hypot(rho[0], 0.5))
    states = [y]
    for i in [*range(1, HISTORY + 1), HISTORY + n]:
        at = 0 if i <= HISTORY else HISTORY
        states.append(EXACT.solve(states[at], (1.0, rho[at]), (1.0, rho[i])))
    return lam, torch.stack(states)


def error(solver: str, process: fs.Process, n: int, spacing: str) -> float:
    """RMS of x / alpha at node HISTORY + n, from exact states and network values before."""
    lam, y = exact_path(n, spacing)
    times = process.time(lam)
    plan = fs.plan(solver, process, grid=times)
    levels = plan.levels
    node = {t: i for i, t in enumerate(times)}

    def denoise(x: torch.Tensor, level: fs.Level) -> torch.Tensor:
        return torch.from_numpy(MIXTURE.denoise(x.numpy(), level.alpha, level.sigma))

    # the last state at a node: the ones before it there are inner states or predicted ones
    begin, end = (
        max(i for i, v in enumerate(levels) if v.t == times[k]) for k in (HISTORY, HISTORY + n)
    )
    plan = replace(plan, keep=(end,))  # a state that nothing later needs is measured too
    before = [i for i in range(begin + 1) if levels[i].t in node]
    states = {i: y[node[levels[i].t]] * levels[i].alpha for i in before}
    outputs = {i: denoise(states[i], plan.asked(i)) for i in before if i < begin and plan.calls[i]}
    if plan.calls[begin] is None:
        state = plan._walk(states, outputs, begin)
    else:
        state = fs.State(plan, begin, states, outputs)
    while state.index < end:
        state = state.advance(denoise(state.query()[0], plan.asked(state.index)))
    return float((state.states[end] / levels[end].alpha - y[-1]).square().mean().sqrt())


@pytest.mark.parametrize(
    ("solver", "name", "spacing"), in_turn(3, DETERMINISTIC, ORDER_PROCESSES, SPACINGS)
)
def test_measured_order_is_the_declared_one(solver, name, spacing):
    entry = fs.solvers[solver]
    # higher orders reach the rounding of the reference sooner
    sizes = np.array([40, 80, 160]) * (4 if entry.order < 4 else 3 if entry.order == 4 else 1)
    errors = [error(solver, ORDER_PROCESSES[name], n, spacing) for n in sizes]
    slope = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    declared = (entry.smooth_order if spacing == "uniform" else 0) or entry.order
    assert slope == pytest.approx(declared, abs=0.2), errors


def test_the_order_test_can_fail():
    """A third-order method with one weight changed by its own h^2 is caught."""
    exact = fs.solvers["dpmpp_3m"].step

    def wrong(process, history, end):
        formula = exact(process, history, end)
        if len(b := formula.b) == 3:
            bend = 0.1 * (end.lam - history[0].lam)
            formula = formula._replace(b=[b[0] + bend * b[2], b[1], (1 - bend) * b[2]])
        return formula

    solver = fs.Multistep("wrong", 3, wrong, "", "")
    fs.solvers.register(solver)
    try:
        sizes = np.array([160, 320, 640])
        errors = [error("wrong", fs.VP(), n, "uniform") for n in sizes]
    finally:
        del fs.solvers._entries["wrong"]
    assert -np.polyfit(np.log(sizes), np.log(errors), 1)[0] < 2.5


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("form", ["data", "noise", "v", "flow"])
def test_any_order_in_any_variable(form, order):
    process, lam = fs.VP(), np.linspace(-1.0, 0.6, order + 1)
    levels = [process.level(float(t)) for t in process.time(lam)]
    for variable in ("lambda", "t", "rho", "own"):
        solver = fs.exponential(order, form=form, variable=variable, growth=math.inf)
        formula = solver.step(process, levels[-2::-1], levels[-1])
        assert formula.order == order
        assert len(formula.b) == order
        assert np.isfinite([*formula.a, *formula.b]).all()


# -- the ends ------------------------------------------------------------------------------------

#: Budgets and ends: all of them in the slow test; in the fast one every process and grid takes one
#: of these for every third solver, in turn, so that each solver meets all of them several times.
CASES = list(itertools.product([1, 2, 3, 4, 5, 7, 10, 14, 50], ("zero", "min")))
#: No solver may be worse than first order on the same nodes by more than this, on any process,
#: grid and budget: 10 with the guard against amplification, 20 for published forms without it.
#: Worse: in the error of the sample, or of a stochastic solver in the law of the samples of
#: Gaussian data, which is known without sampling, first order being DDIM or the ancestral step.
WORST, WORST_AS_PUBLISHED = 10.0, 20.0
NORMAL, ANCESTRAL = Normal(), reverse_sde()


@functools.cache
def reference(start: fs.Level, end: fs.Level) -> np.ndarray:
    """The solution between two levels of any process, on the flow path they share, to about 1e-5:
    a state x at (alpha, sigma) is x / (alpha + sigma) at flow time sigma / (alpha + sigma)."""
    z = MIXTURE.start(32)
    t0, t1 = (v.sigma / (v.alpha + v.sigma) for v in (start, end))
    flow = fs.Flow(t_start=t0, t_end=t1 or 1e-6)
    plan = fs.plan("ab4", flow, 500, grid="lambda", final="min" if t1 else "zero")
    return run(plan, MIXTURE.denoise, z * t0) * (end.alpha + end.sigma)


def try_all(name: str, grid: str, cases: Mapping[str, Sequence[tuple[int, str]]]) -> list[str]:
    """Solvers on one process and grid, each with its budgets and ends. Returns the fragile solvers
    that were found to be so."""
    process, fragile = PROCESSES[name], []
    allowed = functools.cache(functools.partial(fits, process, grid))
    first_order: dict[tuple[int, str], float] = {}
    first_law: dict[tuple[int, str], float] = {}
    needed = {case for several in cases.values() for case in several}
    for solver in ["ddim", *(s for s in SOLVERS if s != "ddim")]:
        entry = fs.solvers[solver]
        for nfe, final in sorted({*needed, *cases[solver]} if solver == "ddim" else cases[solver]):
            where = (solver, final, nfe)
            try:
                plan = fs.plan(solver, process, nfe, grid=grid, final=final)
            except ValueError as error:
                reason = str(error)
                assert reason.startswith(("grid", "final", "nfe")), where
                # only for want of nodes: what a solver does with them is no reason to refuse
                assert not allowed(entry.steps(nfe, final == "zero"), final), (where, reason)
                continue
            assert plan.nfe == nfe, where
            end = process.t_clean if final == "zero" else process.t_end
            assert plan.times[-1] == end, where
            assert plan.levels[-1].sigma == (0.0 if final == "zero" else process.sigma(end))
            start = plan.levels[0]
            # pure noise of the scale sigma(start): the same start for the reference
            z = MIXTURE.start(32)
            out, states = run_all(plan, z * start.sigma)
            assert np.isfinite(out).all(), where
            # (Two inner states of a step may have one integer time; and where the network is asked
            # at another level than the state's, at alpha = 0 it answers the same.)
            apart = all(plan.asked(k) == level for k, level in enumerate(plan.levels))
            at = [*plan.evaluations, plan.levels[-1]]
            for k, (before, after) in enumerate(itertools.pairwise(states)):
                moved = (np.abs(after - before) > 1e-12 * np.abs(before)).any()
                assert moved or not apart or at[k] == at[k + 1], where
            if entry.stochastic:
                rms, first = NORMAL.gap(plan), first_law
            else:
                gap = out - reference(start, plan.levels[-1])
                rms, first = float(np.sqrt((gap**2).mean())), first_order
            if solver == "ddim":
                first[nfe, final], first_law[nfe, final] = rms, NORMAL.gap(plan)
                if process.independent:
                    plan = fs.plan(ANCESTRAL, process, nfe, grid=grid, final=final)
                    first_law[nfe, final] = max(first_law[nfe, final], NORMAL.gap(plan))
            worst = WORST if "amplify" in entry.ends else WORST_AS_PUBLISHED
            if not rms <= worst * first.get((nfe, final), math.inf):
                assert entry.fragile, (where, rms / first[nfe, final])
                fragile.append(solver)
    return fragile


def run_all(plan: fs.Plan, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sample, and what was asked about and the sample."""
    states = walk(plan, MIXTURE.denoise, x)
    asked = [v for v, call in zip(states, plan.calls, strict=True) if call is not None]
    return states[-1], [*asked, states[-1]]


def fits(process: fs.Process, grid: str, steps: int, final: str) -> bool:
    """Whether the grid has nodes for so many steps."""
    try:
        fs.plan("ddim", process, steps, grid=grid, final=final)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("grid", fs.grids)
@pytest.mark.parametrize("name", PROCESSES)
def test_ends(name, grid):
    turn = 7 * list(PROCESSES).index(name) + 3 * list(fs.grids).index(grid)
    everyone = (name, grid) == ("edm", "karras")  # one place where all are compared
    cases = {
        s: [CASES[(turn + i) % len(CASES)]] if everyone or (turn + i // 3) % 3 == i % 3 else []
        for i, s in enumerate(SOLVERS)
    }
    try_all(name, grid, cases)
    assert fs.grids[grid].discrete or fits(PROCESSES[name], grid, 10, "min")


@pytest.mark.slow
@pytest.mark.parametrize("grid", fs.grids)
@pytest.mark.parametrize("name", PROCESSES)
def test_ends_all_budgets(name, grid):
    try_all(name, grid, dict.fromkeys(SOLVERS, CASES))


GRIDS_TO_BREAK_ON = ("karras", "softened", "uniform", "lambda", "ays_sdxl")


@pytest.mark.parametrize("solver", [s for s in SOLVERS if fs.solvers[s].fragile])
def test_fragile_is_said_of_solvers_that_are(solver):
    """A solver that is called fragile really is far worse than first order somewhere."""
    cases = dict.fromkeys(SOLVERS, ()) | {solver: CASES}
    places = itertools.product(("edm", "vp", "flow"), GRIDS_TO_BREAK_ON)
    assert any(solver in try_all(name, grid, cases) for name, grid in places)


# -- facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_facts(solver):
    entry = fs.solvers[solver]
    assert entry.name == solver
    assert entry.order >= (0 if entry.stochastic else 1)  # 0: what is drawn never gets less
    assert entry.smooth_order in (0, *range(entry.order + 1, 9))
    assert entry.nfe_per_step >= 1
    assert (entry.adaptive, entry.needs_calibration) == (False, False)
    assert len(entry.source) > 10
    assert "sigma = 0" in entry.ends
    for alias in entry.aliases:
        assert fs.solvers[alias] is entry
    for nfe in range(1, 15):
        for final in ("zero", "min"):
            assert fs.plan(solver, fs.VP(), nfe, final=final).nfe == nfe
    times = fs.VP().time(np.linspace(-0.5, 1.0, 13))
    plan = fs.plan(solver, fs.VP(), grid=times)
    assert plan.stochastic == entry.stochastic
    assert max(row.order for row in plan.rows) in (entry.order, entry.smooth_order)
    assert plan.rows[0].order == min(1, entry.order)
    # a full step costs what is said: the slope of the cost, free of start-up
    longer = fs.plan(solver, fs.VP(), grid=[*times, float(fs.VP().time(1.1))])
    assert longer.nfe - plan.nfe == entry.nfe_per_step


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_solver_says_of_its_ends_is_what_its_plan_does(solver):
    """Order of the first rows, and of the row that goes to sigma = 0."""
    entry = fs.solvers[solver]
    process = fs.VP()
    plan = fs.plan(solver, process, grid=[*process.time(np.linspace(-0.5, 0.5, 11)), 0.0])
    # a corrector's row stays at its level
    moves = zip(plan.rows, plan.levels, plan.levels[1:], strict=False)
    orders = [row.order for row, start, end in moves if start.t != end.t]
    nodes = max(orders)
    if entry.nfe_per_step == 1 and "start-up orders 1, 2" in entry.ends:
        assert orders[:4] == [min(nodes, k) for k in (1, 2, 3, 4)]
    if "at sigma = 0 order 1" in entry.ends:
        assert orders[-1] == 1
    elif "amplify" not in entry.ends:  # the guard may lower this long step
        assert orders[-1] == nodes
    if "last steps of order 1, 2" in entry.ends:
        assert orders[-3:] == [min(nodes, k) for k in (3, 2, 1)]


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_deterministic_solvers_have_no_facts_of_noise(solver):
    entry = fs.solvers[solver]
    assert (entry.strong_order, entry.scaled, entry.member) == (0, None, "")


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "zero terminal SNR"])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_noise_can_be_scaled_and_without_it_the_solver_is_a_known_one(solver, name):
    entry, process, x = fs.solvers[solver], PROCESSES[name], MIXTURE.start(4)
    assert entry.strong_order in (0, 1)
    assert entry.scaled is not None
    for nfe, grid, final in ((1, "uniform", "zero"), (8, "softened", "zero"), (9, "lambda", "min")):
        where = {"grid": grid, "final": final}
        plan = fs.plan(solver, process, nfe, **where)
        for draw in plan.draws:
            assert (draw.clock is None) == (entry.strong_order == 0)
        assert fs.plan(entry.scaled(1.0), process, nfe, **where) == plan
        without = entry.scaled(0.0)
        assert not without.stochastic
        still = fs.plan(without, process, nfe, **where)
        assert not still.stochastic
        sample = run(still, MIXTURE.denoise, x * plan.prior_std)
        if entry.member:
            known = fs.solvers[entry.member]
            assert not known.stochastic
            assert (without.order, without.nfe_per_step) == (known.order, known.nfe_per_step)
            member = fs.plan(known, process, nfe, **where)
            assert still.evaluations == member.evaluations
            for mine, theirs in zip(still.canonical(), member.canonical(), strict=True):
                size = np.abs(theirs).max()
                np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11 * size)
            same = run(member, MIXTURE.denoise, x * plan.prior_std)
            np.testing.assert_allclose(sample, same, rtol=1e-9, atol=1e-10)
        if plan.levels[0].alpha == 0:
            continue  # from where any noise at all forgets the start
        # and a little noise is a little change
        little = fs.plan(entry.scaled(1e-4), process, nfe, **where)
        if little.evaluations != still.evaluations:
            continue  # what noise costs in evaluations is spent on steps without it
        change = run(little, MIXTURE.denoise, x * plan.prior_std) - sample
        assert np.abs(change).max() < 0.1


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_draws_are_named_by_their_place_and_used(solver):
    """Every draw belongs to a step of the grid, is another one, and enters a row; a run depends on
    each of them."""
    plan = fs.plan(solver, fs.EDM(), 9)
    assert len(set(plan.draws)) == len(plan.draws)
    times = [level.t for level in plan.levels]
    for draw in plan.draws:
        assert {draw.start.t, draw.end.t} <= {*times, *(v.t for v in plan.evaluations)}
    x, z = MIXTURE.start(3) * 80, normals(plan, (3, MIXTURE.dim))
    out = run(plan, MIXTURE.denoise, x, z)
    for m in range(len(plan.draws)):
        other = z.copy()
        other[m] += 1.0
        assert (run(plan, MIXTURE.denoise, x, other) != out).any()


def test_names_are_unique_and_the_registry_refuses_a_second():
    names = [n for s in fs.solvers.values() for n in (s.name, *s.aliases)]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="'ddim' is taken"):
        fs.solvers.register(fs.solvers["ddim"])
    with pytest.raises(KeyError, match="did you mean 'dpmpp_2m'"):
        fs.solvers["dpmp_2m"]


def test_first_order_members_are_one_method():
    """DDIM, Euler on a flow and in sigma, DPM-Solver-1: the same row in every form but v."""
    for process in PROCESSES.values():
        final = "min" if process.t_clean is None else "zero"
        plans = [
            fs.plan(fs.exponential(1, form=f), process, 5, final=final)
            for f in ("data", "noise", "flow")
        ]
        for other in plans[1:]:
            for mine, theirs in zip(plans[0].rows, other.rows, strict=True):
                assert mine.a == pytest.approx(theirs.a, rel=1e-13)
                assert mine.b == pytest.approx(theirs.b, rel=1e-13)
    # and on a flow that row is Euler in t: x + dt u with u = (x - D) / t
    plan = fs.plan("ddim", fs.Flow(), 5)
    for i, row in enumerate(plan.rows):
        t, dt = plan.times[i], plan.times[i + 1] - plan.times[i]
        assert row.a.get(i, 0.0) == pytest.approx(1 + dt / t, abs=1e-15)
        assert row.b[i] == pytest.approx(-dt / t)


def test_v_form_is_exact_for_white_data():
    """For data N(0, I) on a VP path v vanishes: any step is exact."""
    plan = fs.plan("v_ab2", fs.VP(), 3, grid="uniform")
    x = np.random.default_rng(0).normal(size=(5, 2))
    out = run(plan, lambda x, alpha, sigma: alpha * x / (alpha**2 + sigma**2), x)
    np.testing.assert_allclose(out, x, rtol=1e-12)


def test_lower_final_order():
    solver = fs.exponential(3, lower_final=True)
    orders = [row.order for row in fs.plan(solver, fs.EDM(), 7, final="min").rows]
    assert orders == [1, 2, 3, 3, 3, 2, 1]


def test_the_growth_guard_lowers_the_order_of_rows_that_amplify():
    """The last step of a uniform-t grid is many times longer in lambda than the one before."""
    guarded = fs.plan("ab4", fs.Flow(), 10, grid="uniform", final="min")
    free = fs.plan(fs.exponential(4, growth=math.inf), fs.Flow(), 10, grid="uniform", final="min")
    assert guarded.rows[-1].order < free.rows[-1].order == 4
    assert guarded.rows[:5] == free.rows[:5]
    even = fs.plan("ab4", fs.Flow(), 20, grid="lambda", final="min")
    assert [row.order for row in even.rows[4:]] == [4] * 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"order": 0}, "order = 0"),
        ({"order": True}, "order = True"),
        ({"order": 2, "form": "eps"}, "form = 'eps'"),
        ({"order": 2, "variable": "lamda"}, "did you mean 'lambda'"),
        ({"order": 2, "second": "half"}, "second = 'half'"),
        ({"order": 2, "third": "shipped"}, "third = 'shipped' with order = 2"),
        ({"order": 2, "variable": "rho", "second": "midpoint"}, "variable = 'lambda' only"),
        ({"order": 2, "growth": 0.0}, "growth = 0.0"),
    ],
)
def test_bad_parameters(arguments, words):
    with pytest.raises(ValueError, match=words):
        fs.exponential(**arguments)
