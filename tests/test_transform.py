"""Algebra on plans, for every registered solver: canonical form, fusion, upward runs, inversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep import _combine
from fewstep._transform import cheapest
from problems import Mixture, network_for, normals, run

SOLVERS = list(fs.solvers)
DETERMINISTIC = [name for name, entry in fs.solvers.items() if not entry.stochastic]
MIXTURE = Mixture()
#: what a network predicts, and processes
CASES = [(fs.VP(), "noise"), (fs.EDM(), "edm"), (fs.Flow(), "flow"), (fs.Flow(), "data")]


def final_of(model: fs.Denoiser, plan: fs.Plan, x: torch.Tensor) -> torch.Tensor:
    return fs.sample(model, solver=plan, x=x, progress=False)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("solver", SOLVERS)
def test_fused_is_the_same_with_one_combination_per_call(solver, case):
    process, predicts = CASES[case]
    model = network_for(process, predicts, MIXTURE.denoise)
    for nfe in (1, 5, 12):
        plan = fs.plan(solver, model, nfe)
        fused = plan.fuse()
        assert fused.raw
        assert fused.nfe == nfe
        # one row after every call: no state without one but the start and the kept and last
        bare = [k for k, call in enumerate(fused.calls) if call is None]
        assert set(bare) <= {*range(plan.given), *fused.keep, len(fused.levels) - 1}
        x = torch.from_numpy(MIXTURE.start(4)) * plan.prior_std
        state = plan.start(x)  # not through `sample`, which fuses by itself
        while not state.done:
            state = state.advance(model.network(*state.query()))
        want, have = state.x, final_of(model, fused, x)
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(have / scale, want / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_canonical_form(solver):
    """Fusing, saving and the loop itself leave the table of the method as it is."""
    process, n = fs.VP(), 6
    plan = fs.plan(solver, process, n, predicts="noise")
    a, b, *rest = tables = plan.canonical()
    assert (a.shape, b.shape) == ((n + 1,), (n + 1, n))
    assert [e.shape for e in rest] == [(n + 1, len(plan.draws))] * bool(plan.draws)
    assert (b[np.triu_indices(n)] == 0).all()  # evaluation k knows the answers before it only
    for other, size in zip(plan.fuse().canonical(), tables, strict=True):
        np.testing.assert_allclose(other, size, rtol=1e-9, atol=1e-10 * np.abs(size).max())
    # the result, by the table
    x, data = MIXTURE.start(3), []
    draws = normals(plan, x.shape)
    drawn = rest[0] @ draws.reshape(len(draws), -1) if rest else np.zeros((n + 1, x.size))

    def state(k):
        known = sum(b[k, j] * d for j, d in enumerate(data))
        return a[k] * x + known + drawn[k].reshape(x.shape)

    for k, level in enumerate(plan.evaluations):
        data.append(MIXTURE.denoise(state(k), level.alpha, level.sigma))
    table = state(n)
    model = network_for(process, "noise", MIXTURE.denoise)
    given = torch.from_numpy(draws) if rest else 0
    want = fs.sample(
        model, solver=fs.plan(solver, model, n), x=torch.from_numpy(x), noise=given, progress=False
    )
    np.testing.assert_allclose(want.numpy(), table, rtol=1e-8, atol=1e-9)


def test_fused_rows_keep_no_more_than_they_need():
    """UniPC fused: no corrected states, one state and the outputs, whatever the length."""
    plan = fs.plan("unipc_2", fs.VP(), 20, grid="lambda", predicts="data").fuse()
    assert len(plan.levels) == 21
    for row in plan.rows:
        assert len(row.a) <= 1
        assert len(row.b) <= 4
    # a noise-form method on a network that predicts noise needs no older states either
    plan = fs.plan("noise_ab3", fs.VP(), 20, grid="lambda", predicts="noise").fuse()
    assert all(len(row.a) <= 1 and len(row.b) <= 3 for row in plan.rows)


def test_fused_plans_save_and_are_checked(tmp_path):
    plan = fs.plan("unipc_2", fs.VP(), 6, predicts="v").fuse()
    plan.save(tmp_path / "plan")
    again = fs.Plan.load(tmp_path / "plan")
    assert again == plan
    assert again.raw
    bent = dict(plan.rows[2].b)
    bent[2] *= 1.001
    rows = (*plan.rows[:2], fs.Row(plan.rows[2].a, bent, 2), *plan.rows[3:])
    with pytest.raises(ValueError, match="constant data"):
        fs.Plan(plan.levels, rows, plan.calls, raw=True)


def test_a_fused_plan_refuses_hooks_and_inversion():
    plan = fs.plan("ddim", fs.VP(), 3, predicts="noise").fuse()
    state = plan.start(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="hook: a fused plan"):
        state.advance(torch.zeros(2, 3), lambda d, level: d)
    with pytest.raises(ValueError, match="fused plan cannot be inverted"):
        plan.inverse()


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_upward_and_back(solver):
    """Data to noise and back converges to the start: the ODE in the other direction."""
    process = fs.VP()
    x = MIXTURE.means[0] + 0.1 * MIXTURE.start(4)
    gaps = []
    for n in (40, 160):
        up = fs.plan(solver, process, n, grid="lambda", upward=True)
        assert up.nfe == n
        assert (up.times[0], up.times[-1]) == (process.t_end, process.t_start)
        down = fs.plan(solver, process, n, grid="lambda", final="min")
        noise = run(up, MIXTURE.denoise, x)
        gaps.append(float(np.abs(run(down, MIXTURE.denoise, noise) - x).max()))
    assert gaps[1] < 0.6 * gaps[0] or gaps[1] < 1e-6, gaps
    assert gaps[1] < 0.05


def test_only_reversible_plans_have_an_inverse():
    for name, solver in fs.solvers.items():
        plan = fs.plan(name, fs.VP(), 6, final="min")
        if not getattr(solver, "reversible", False):
            words = "it draws noise" if plan.stochastic else "is not reversible"
            with pytest.raises(ValueError, match=words):
                plan.inverse()
        if solver.stochastic:
            with pytest.raises(ValueError, match=f"upward = True with solver = '{name}'"):
                fs.plan(name, fs.VP(), 6, upward=True)


@pytest.mark.parametrize(
    ("solver", "predicts", "one_pass", "eager", "states"),
    [
        ("flow_ab2", "flow", True, True, 9),  # the network predicts what the solver interpolates
        ("dpmpp_2m", "noise", True, True, 9),
        # In one pass three past states are less to read than D to make; one by one they are more.
        ("dpmpp_3m", "noise", True, False, 9),
        ("unipc_2", "noise", True, False, 9),  # the corrected states go in any case
    ],
)
def test_the_cheapest_form(solver, predicts, one_pass, eager, states):
    plan = fs.plan(solver, fs.VP(), 8, grid="lambda", predicts=predicts)
    for kernel, raw in ((True, one_pass), (False, eager)):
        form = cheapest(plan, kernel)
        assert (form.raw, len(form.levels)) == (raw, states)
    assert plan.cheapest == cheapest(plan, _combine.KERNEL)
    assert plan.cheapest.cheapest == plan.cheapest


@pytest.mark.parametrize("case", range(len(CASES)))
def test_fused_about_a_mean(case):
    """With a basis about a mean, raw outputs are centred on the one that D = mu would be."""
    process, predicts = CASES[case]
    model = network_for(process, predicts, MIXTURE.denoise)
    mean = np.array([0.7, -0.4, 0.2])
    solver = fs.gaussian(2, [0.3, 0.5, 0.9], fs.Identity(mean=mean), corrector=True)
    plan = fs.plan(solver, model, 6)
    x = torch.from_numpy(MIXTURE.start(4)) * plan.prior_std
    want, have = final_of(model, plan, x), final_of(model, plan.fuse(), x)
    state = plan.start(x)
    while not state.done:  # sample fuses by itself; this does not
        state = state.advance(model.network(*state.query()))
    torch.testing.assert_close(have, state.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(want, state.x, rtol=0, atol=1e-10)


def test_half_precision_answers_are_kept_as_they_are():
    plan = fs.plan("deis_tab2", fs.VP(), 6, predicts="noise").fuse()
    state = plan.start(torch.randn(2, 3))
    while not state.done:
        state = state.advance(torch.randn(2, 3).bfloat16())
        assert {v.dtype for v in state.outputs.values()} <= {torch.bfloat16}
