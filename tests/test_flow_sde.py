"""Flow-GRPO's row, and noise in chosen steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._solvers._flow_sde import flow_grpo, noise_in_steps
from fewstep._solvers._stochastic import sde

#: Solvers whose noise makes states that are not there without it.
OTHER_STATES = {
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "edm_churn",
    "euler_churn",
    "pc_langevin",
    "restart",
}
STOCHASTIC = [s for s in fs.solvers if fs.solvers[s].stochastic and fs.solvers[s].scaled]


def test_the_row_is_the_published_one():
    rng, a, times = np.random.default_rng(0), 0.7, np.linspace(1, 0, 11)
    plan = fs.plan(flow_grpo(a), fs.Flow(), grid=times)
    for k in range(9):
        t, dt = times[k], times[k + 1] - times[k]
        w = a * math.sqrt(t / (1 - (times[1] if t == 1 else t)))
        x, u = rng.normal(size=(2, 5))
        mean = x * (1 + w**2 * dt / (2 * t)) + u * (1 + w**2 * (1 - t) / (2 * t)) * dt
        row = plan.rows[k]
        np.testing.assert_allclose(row.a[k] * x + row.b[k] * (x - t * u), mean, atol=1e-14)
        assert row.e[k] == pytest.approx(w * math.sqrt(-dt), rel=1e-14)
    assert plan.rows[9].b == {9: 1.0}
    assert not plan.rows[9].e


def inflation(solver, n: int) -> float:
    """Largest variance of the states over the process's, for data N(0, 1/4)."""
    plan = fs.plan(solver, fs.Flow(), grid=np.linspace(1, 0, n + 1))
    variance, worst = 1.0, 0.0
    for k, (row, level, end) in enumerate(
        zip(plan.rows, plan.levels[:-1], plan.levels[1:], strict=True)
    ):
        gain = level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2)
        c = row.a.get(k, 0.0) + row.b[k] * gain
        variance = c * c * variance + sum(e * e for e in row.e.values())
        worst = max(worst, variance / (end.alpha**2 * 0.25 + end.sigma**2))
    return worst


def test_it_inflates_the_variance_and_the_exact_row_does_not():
    assert inflation(flow_grpo(), 10) == pytest.approx(1.22, abs=0.01)
    assert inflation(flow_grpo(), 20) == pytest.approx(1.15, abs=0.01)
    assert inflation(sde(1, eta2=0.7**2 / 2), 10) <= 1 + 1e-12


def test_it_is_the_same_method_on_every_path():
    model = fs.exact.Gaussian([0.3, -0.2], 0.2)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = list(torch.randn(8, 3, 2, dtype=torch.float64))
    lam, out = np.linspace(-1, 3, 7), []
    for process in (fs.Flow(), fs.VP(), fs.EDM()):
        plan = fs.plan("flow_grpo", process, grid=process.time(lam))
        first, last = (plan.levels[i].alpha + plan.levels[i].sigma for i in (0, -1))
        ran = fs.sample(model.denoiser(process), x=x * first, solver=plan, noise=noise)
        out.append(ran / last)
    torch.testing.assert_close(out[0], out[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out[0], out[2], rtol=1e-9, atol=1e-9)


def test_without_noise_it_is_ddim():
    for process in (fs.Flow(), fs.VP(), fs.EDM()):
        still = fs.plan(flow_grpo().scaled(0.0), process, 7)
        assert not still.stochastic
        want = fs.plan("ddim", process, 7).canonical()
        for ours, theirs in zip(still.canonical(), want, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_in_one_step(name):
    """Rows of the step are the stochastic solver's, all others its deterministic member's."""
    solver, process = fs.solvers[name], fs.VP()
    nfe = 10 * solver.nfe_per_step
    whole = fs.plan(solver, process, nfe)
    if name in OTHER_STATES:
        with pytest.raises(ValueError, match="makes other states"):
            fs.plan(noise_in_steps(solver, 2), process, nfe)
        return
    plan = fs.plan(noise_in_steps(solver, 2), process, nfe)
    still = fs.plan(solver.scaled(0.0), process, nfe)
    assert plan.nfe == nfe
    used = {i for i, row in enumerate(plan.rows) if row.e}
    assert used
    times = np.array(plan.origin.times)
    for i, row in enumerate(plan.rows):
        inside = times[2] > plan.levels[1 + i].t >= times[3]
        want = (whole if inside else still).rows[i]
        assert (row.a, row.b) == (want.a, want.b)
        assert list(row.e.values()) == (list(want.e.values()) if inside else [])
        for m, other in zip(row.e, want.e, strict=bool(inside)):
            assert plan.draws[m] == whole.draws[other]
    assert {m for i in used for m in plan.rows[i].e} == set(range(len(plan.draws)))


def test_a_reward_is_credited_to_one_step():
    model = fs.exact.Gaussian([0.3], 0.2).denoiser(fs.Flow(), "flow")
    solver = noise_in_steps(fs.solvers["ddpm"], 3)
    plan = fs.plan(solver, model, 8)
    state, stds = plan.start(torch.randn(2, 1), noise=5), []
    while not state.done:
        output = model.output(*state.query(), state.level, {})
        step = state.transition(output)
        stds.append(float(np.max(step.std)))
        before, state = state, state.advance(output)
        if stds[-1]:
            assert bool(step.log_prob(state.x).isfinite().all())
            assert before.index == 3
    assert [s > 0 for s in stds] == [i == 3 for i in range(8)]


def test_several_steps_and_scales():
    solver = fs.solvers["ddpm"]
    plan = fs.plan(noise_in_steps(solver, [0, -2]), fs.VP(), 6)
    assert [bool(row.e) for row in plan.rows] == [True, False, False, False, True, False]
    chosen = noise_in_steps(solver, [0, 1])
    half = fs.plan(chosen.scaled(0.5), fs.VP(), 6)
    assert half.rows[1].e[1] < fs.plan(chosen, fs.VP(), 6).rows[1].e[1]
    assert chosen.scaled(0.0).stochastic is False


def test_refusals():
    with pytest.raises(ValueError, match="a ="):
        flow_grpo(-1.0)
    with pytest.raises(ValueError, match="stochastic solver"):
        noise_in_steps(fs.solvers["ddim"], 1)
    for steps in ([], 1.5, [True]):
        with pytest.raises(ValueError, match="steps ="):
            noise_in_steps(fs.solvers["ddpm"], steps)
    with pytest.raises(ValueError, match="steps: 9; this run has the steps 0 to 3"):
        fs.plan(noise_in_steps(fs.solvers["ddpm"], 9), fs.VP(), 4)
