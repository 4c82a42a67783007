"""Churn, Restart, Langevin correctors: published algorithms, exact noise, budgets, biases."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._solvers._noisy import Interval, churn, predictor_corrector, restart
from problems import PROCESSES, Mixture, Normal, in_turn, normals, run

MIXTURE, NORMAL = Mixture(), Normal()
ROWS = ["vp", "edm", "flow", "linear table", "zero terminal SNR", "user table", "trigonometric"]
SOLVERS = {
    "churn": churn(),
    "churn 40": churn(s_churn=40.0, s_min=0.0),
    "churn ddim": churn("ddim", 10.0),
    "churn dpmpp_3s": churn("dpmpp_3s"),
    "restart": restart(),
    "restart two": restart("dpmpp_2s", [(0.5, 2.0, 2), (0.06, 0.3, 3)], share=0.6),
    "restart steps": restart("ddim", [(0.3, 0.6, 2, 3), (1.0, 2.0, 1)], share=0.5),
    "langevin": predictor_corrector(),
    "langevin twice": predictor_corrector("heun", 0.1, 2),
    "langevin published": predictor_corrector("ddim", 0.16, 1, smooth=0.0),
    "langevin ddpm": predictor_corrector("ddpm"),
}


#: What does not get finer with the grid.
FIXED = ("restart steps", "langevin published")


def denoise(x, sigma):
    return MIXTURE.denoise(x, 1.0, sigma)


def heun(x, now, then):
    """EDM's step in sigma."""
    slope = (x - denoise(x, now)) / now
    if then == 0:
        return x - now * slope
    u = x + (then - now) * slope
    return x + (then - now) * 0.5 * (slope + (u - denoise(u, then)) / then)


def spaced(high: float, low: float, n: int) -> np.ndarray:
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


# -- published algorithms ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s_churn", "s_min", "s_max", "s_noise"),
    [(40, 0.05, 50, 1.003), (2, 0.0, 79, 1.0), (80, 0.05, 1, 1.007)],
)
def test_churn_is_edms(s_churn, s_min, s_max, s_noise):
    sigmas = np.append(spaced(80.0, 0.002, 10), 0.0)
    plan = fs.plan(churn("heun", s_churn, s_min, s_max, s_noise), fs.EDM(), grid=sigmas)
    x = 80 * MIXTURE.start(4)
    z = normals(plan, x.shape)
    want, at = x, 0
    for now, then in pairwise(sigmas):
        if s_min <= now <= s_max:
            up = now * (1 + min(s_churn / 10, math.sqrt(2) - 1))
            want = want + math.sqrt(up**2 - now**2) * s_noise * z[at]
            now, at = up, at + 1
        want = heun(want, now, then)
    assert at == len(z) > 0
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x, z), want, rtol=1e-8, atol=1e-10)
    assert plan.nfe == 19


def test_restart_is_the_official_one():
    """Where the interval's ends are nodes or below: else it rises by the factor all the same."""
    sigmas = np.append(spaced(80.0, 0.002, 18), 0.0)
    low = float(sigmas[12])
    solver = restart("heun", [(low + 1e-3, 4.0, 1, 3), (0.06, 0.3, 2, 2)])
    plan = fs.plan(solver, fs.EDM(), grid=sigmas)
    x = 80 * MIXTURE.start(4)
    z = normals(plan, x.shape)
    at = {12: (1, 4.0, 3), int(np.argmin(abs(sigmas - 0.06))): (2, 0.3, 2)}
    assert len(at) == 2
    want, m = x, 0
    for i, (now, then) in enumerate(pairwise(sigmas), 1):
        want = heun(want, now, then)
        for _ in range(at[i][0] if i in at else 0):
            high = max(at[i][1], then * 0.3 / 0.06 if at[i][1] == 0.3 else 0)
            want = want + math.sqrt(high**2 - then**2) * z[m]
            m += 1
            for a, b in pairwise(spaced(high, then, at[i][2] + 1)):
                want = heun(want, a, b)
    assert m == len(z) == 3
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x, z), want, rtol=1e-8, atol=1e-10)
    assert plan.nfe == 35 + 6 + 2 * 4


def test_langevin_is_score_sdes_with_expected_norms():
    sigmas, r = np.append(spaced(50.0, 0.01, 8), 0.0), 0.16
    plan = fs.plan(predictor_corrector("ddim", r, 2), fs.EDM(), grid=sigmas)
    x = 50 * MIXTURE.start(4)
    z = normals(plan, x.shape)
    want, m = x, 0
    for now, then in pairwise(sigmas):
        delta = 2 * r**2 * now**2
        for _ in range(2):
            score = (denoise(want, now) - want) / now**2
            want = want + delta * score + math.sqrt(2 * delta) * z[m]
            m += 1
        d = denoise(want, now)
        want = d + then / now * (want - d)
    assert m == len(z) == 16
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x, z), want, rtol=1e-9, atol=1e-11)
    assert plan.nfe == 24


# -- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("solver", ["churn", "churn 40", "restart", "restart two"])
def test_noise_is_raised_exactly(solver, name):
    """A row that only adds noise takes the law of the process to that of the process."""
    plan, count = fs.plan(SOLVERS[solver], PROCESSES[name], 31), 0
    for i, row in enumerate(plan.rows):
        if plan.calls[i] is None:
            ((j, a),) = row.a.items()
            ((_, e),) = row.e.items()
            (low, std), (mean, want) = (
                NORMAL.moments(plan.levels[j]),
                NORMAL.moments(plan.levels[i + 1]),
            )
            assert j == i
            assert not row.b
            assert row.exact
            assert a * low == pytest.approx(mean, rel=1e-12)
            assert math.hypot(a * std, e) == pytest.approx(want, rel=1e-12)
            assert plan.levels[i + 1].lam < plan.levels[i].lam
            assert plan.levels[i + 1].lam >= PROCESSES[name].lam(PROCESSES[name].t_start) - 1e-9
            count += 1
    assert count == len(plan.draws) > 0


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trigonometric"])
@pytest.mark.parametrize("solver", [n for n in SOLVERS if n not in FIXED])
def test_with_small_steps_every_state_has_the_law_of_the_process(solver, name):
    process = PROCESSES[name]
    grid = process.time(np.linspace(-2.0, 2.0, 301))
    plan = fs.plan(SOLVERS[solver], process, grid=grid)
    want = np.array([NORMAL.moments(level) for level in plan.levels])
    gap = np.abs(NORMAL.laws(plan) - want) / want[:, 1:]
    assert gap.max() < (0.02 if SOLVERS[solver].order == 1 else 3e-3)
    assert plan.stochastic


def test_noise_other_than_1_is_not_the_process():
    process = fs.EDM()
    grid = process.time(np.linspace(-2.0, 2.0, 301))
    plan = fs.plan(churn("heun", 40.0, 0.0, math.inf, 1.05), process, grid=grid)
    (_, have), (_, want) = NORMAL.laws(plan)[-1], NORMAL.moments(plan.levels[-1])
    assert have > 1.005 * want
    assert any(not row.exact for row in plan.rows)


@pytest.mark.parametrize("r", [0.05, 0.16, 0.4])
def test_bias_of_the_langevin_corrector(r):
    """About data at one point its stationary variance is sigma^2 / (1 - r^2)."""
    plan = fs.plan(predictor_corrector("ddim", r), fs.VP(), grid=[0.6, 0.1])
    row, sigma = plan.rows[0], plan.levels[0].sigma
    assert not row.exact
    assert row.a[0] * plan.levels[0].alpha + row.b[0] == pytest.approx(plan.levels[0].alpha)
    variance = sigma**2
    for _ in range(20000):
        variance = row.a[0] ** 2 * variance + row.e[0] ** 2
    assert variance == pytest.approx(sigma**2 / (1 - r**2), rel=1e-10)


def test_the_published_corrector_does_not_converge_and_the_smooth_one_does():
    process, gaps = fs.VP(), {}
    for smooth in (0.0, 0.1):
        for n in (160, 640):
            grid = process.time(np.linspace(-1.5, 1.5, n + 1))
            solver = predictor_corrector("ddim", 0.16, smooth=smooth)
            gaps[smooth, n] = NORMAL.gap(fs.plan(solver, process, grid=grid))
    assert gaps[0.0, 640] > 0.8 * gaps[0.0, 160] > 1e-3
    assert gaps[0.1, 640] == pytest.approx(0.25 * gaps[0.1, 160], rel=0.05)


@pytest.mark.parametrize("name", ["churn", "restart", "langevin", "langevin ddpm"])
def test_no_noise_is_the_solver_itself(name):
    solver = SOLVERS[name]
    still, member = (fs.plan(s, fs.EDM(), 20) for s in (solver.scaled(0.0), solver.member))
    assert not still.stochastic
    for mine, theirs in zip(still.canonical(), member.canonical(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    less, whole = (fs.plan(solver.scaled(s), fs.EDM(), 20) for s in (0.5, 1.0))
    assert whole == fs.plan(solver, fs.EDM(), 20)
    noise = [[sum(c * c for c in row.e.values()) for row in p.rows if row.e] for p in (less, whole)]
    assert noise[0][0] < noise[1][0]


def test_the_noise_of_a_restart_scales():
    """Half the noise: a quarter of the variance that is added in x / alpha."""
    added = []
    for s in (0.5, 1.0):
        plan = fs.plan(restart().scaled(s), fs.EDM(), 20)
        (row,) = [row for row in plan.rows if row.e]
        added.append(sum(c * c for c in row.e.values()))
    assert added[0] == pytest.approx(0.25 * added[1])
    least = fs.plan(restart().scaled(1e-6), fs.EDM(), 20)
    assert max(sum(row.e.values()) for row in least.rows) < 1e-3
    assert least.nfe == 20


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "name"), in_turn(3, SOLVERS, ROWS))
def test_every_budget_is_spent(solver, name):
    process = PROCESSES[name]
    for nfe in range(1, 41):
        for final in ("zero", "min"):
            plan = fs.plan(SOLVERS[solver], process, nfe, final=final)
            assert plan.nfe == nfe
            assert len(set(plan.draws)) == len(plan.draws)
            assert all(draw.clock is None for draw in plan.draws)
            if process.integer_times:
                assert all(v.t == round(v.t) for v in plan.evaluations)
    assert plan.stochastic


def test_passes_of_a_restart():
    """Least noisy intervals go first; parts are equal; the main run has the rest."""
    solver = restart("heun", [(0.1, 0.5, 2), (1.0, 4.0), (5.0, 9.0, 1, 3)], share=0.5)
    have = {nfe: [(v.low, count) for v, count in solver.passes(nfe)] for nfe in (11, 12, 20, 40)}
    assert have[11] == []
    assert have[12] == [(5.0, 6)]
    assert have[20] == [(5.0, 6), (1.0, 4)]
    assert have[40] == [(5.0, 6), (1.0, 4), (0.1, 4), (0.1, 4)]
    assert "none below 12" in solver.ends
    for nfe, passes in have.items():
        plan = fs.plan(solver, fs.EDM(), nfe)
        assert len(plan.draws) == len(passes)
        assert plan.nfe == nfe


def test_imagenets_restarts():
    """203 NFE: 36 steps and 132 evaluations of restarts."""
    info = [
        (19.35, 40.79, 1, 3),
        (1.09, 1.92, 1, 3),
        (0.59, 1.09, 5, 3),
        (0.30, 0.59, 5, 3),
        (0.06, 0.30, 6, 5),
    ]
    solver = restart("heun", info, share=2 / 3)
    assert solver.steps(203, True) == 36
    plan = fs.plan(solver, fs.EDM(), 203, grid="karras")
    assert len(plan.draws) == 18
    # the nearest node may lie on either side; where it goes up to is the published level or more
    tops = [(draw.start.rho, draw.end.rho) for draw in plan.draws]
    for (low, high), v in zip(tops, [i for i in info for _ in range(i[2])], strict=True):
        assert low == pytest.approx(v[0], rel=0.35)
        assert high == pytest.approx(max(v[1], low * v[1] / v[0]))


def test_restarts_on_a_grid_of_integers():
    """With hardly any integers between, more times instead of fewer evaluations."""
    process = PROCESSES["user table"]
    solver = restart("heun", [(0.3, 0.32, 1, 6)], share=0.6)
    plan = fs.plan(solver, process, 20)
    assert plan.nfe == 20
    assert len(plan.draws) > 1
    assert all(v.t == round(v.t) for v in plan.levels)
    table = PROCESSES["zero terminal SNR"]
    with pytest.raises(ValueError, match="grid: a restart at t = 998"):
        fs.plan(restart(), table, grid=[999, 998, 400])


def test_corrections_left_out_are_the_last():
    plan = fs.plan(predictor_corrector("ddim", corrections=3), fs.EDM(), 10)
    per_level = [sum(v.t == t for v in plan.evaluations) for t in dict.fromkeys(plan.times)][:-1]
    assert per_level == [4, 4, 2]
    with pytest.raises(ValueError, match="nfe = 3, but 4 steps"):
        fs.plan(predictor_corrector("ddim", corrections=3), fs.EDM(), 3, grid=[80, 10, 1, 0.1, 0])


def test_pure_noise_is_not_corrected():
    plan = fs.plan(predictor_corrector(), fs.Flow(), 9)
    assert plan.calls[1] is not None
    assert plan.rows[0].b
    assert not plan.rows[0].e
    assert [row.e != {} for row in plan.rows[1:3]] == [True, True]


def test_a_path_does_not_matter():
    """Draws belong to none, also those of a predictor that has one."""
    plan = fs.plan(predictor_corrector("ddpm"), fs.VP(), 8)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    ends = []
    for path in (True, False):
        state = plan.start(x, noise=fs.Noise(1, path=path))
        while not state.done:
            state = state.advance(torch.tanh(state.query()[0]))
        ends.append(state.x)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: churn("dpmpp_2m"), "solver = 'dpmpp_2m'; need a solver that carries nothing"),
        (lambda: churn("unipc_1"), "solver = 'unipc_1'"),
        (lambda: churn("seeds_2"), "solver = 'seeds_2' draws noise"),
        (lambda: churn(s_churn=-1.0), "s_churn = -1.0; need a number >= 0"),
        (lambda: churn(s_min=2.0, s_max=1.0), "need s_min <= s_max"),
        (lambda: restart(share=1.0), "share = 1.0"),
        (lambda: restart(intervals=[]), "intervals is empty"),
        (lambda: restart(intervals=[(2.0, 1.0)]), r"intervals has \(2.0, 1.0\)"),
        (lambda: restart(intervals=[(1.0, 2.0, 0)]), "integers times >= 1"),
        (lambda: restart(intervals=[3.0]), "intervals has 3.0"),
        (lambda: predictor_corrector(corrections=0), "corrections = 0; need an integer >= 1"),
        (lambda: predictor_corrector(snr=0.7), "snr = 0.7; need a number from 0 to 0.5"),
        (lambda: predictor_corrector("dpmpp_2m"), "predictor = 'dpmpp_2m'"),
        (lambda: predictor_corrector("dim"), "did you mean"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_coupled_pairs_are_refused():
    for name in ("edm_churn", "restart", "pc_langevin"):
        with pytest.raises(ValueError, match="independent = False"):
            fs.plan(name, fs.Flow(independent=False), 20)


def test_interval_defaults():
    assert Interval(0.5, 2.0) == (0.5, 2.0, 1, 0)
