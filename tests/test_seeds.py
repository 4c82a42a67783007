"""Singlestep stochastic solvers: published rows, shared noise, one path, limits, refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._solvers._seeds import ancestral_singlestep, dpmpp_sde, seeds
from problems import PROCESSES, Mixture, Normal, in_turn, run, walk

MIXTURE = Mixture()
FAMILIES = {
    "seeds_2": seeds(),
    "seeds_3": seeds("dpmpp_3s", 0.5),
    "seeds_4": seeds("etdrk4_krogstad"),
    "noise form": seeds("dpm_solver_2"),
    "noise form, 3": seeds("dpm_solver_3", 0.3),
    "dpmpp_sde": dpmpp_sde(),
    "dpmpp_sde, eta": dpmpp_sde(0.6, 1 / 3),
    "2s_ancestral": ancestral_singlestep(),
    "2_ancestral, eta": ancestral_singlestep("dpm_solver_2", 0.6),
}

# -- rows ----------------------------------------------------------------------------------------

#: Flow, 0.8 -> 0.5, SEEDS-2 with phi_2: (x, D, z1) of u and (x, D_s, D_m, z1, z2) of x_t.
GOLDEN = {
    1.0: (
        (0.4166666667, 0.25, 0.5773502692),
        (0.15625, -0.1931183498, 0.6618683498, 0.2165063509, 0.4330127019),
    ),
    0.5: (
        (0.5892556510, 0.2154822031, 0.4714045208),
        (0.3125, -0.1417139464, 0.5792139464, 0.25, 0.3535533906),
    ),
    0.0: ((0.8333333333, 0.1666666667, 0), (0.625, -0.0839893597, 0.4589893597, 0, 0)),
}


@pytest.mark.parametrize("eta2", GOLDEN)
def test_seeds_2_rows(eta2):
    plan = fs.plan(seeds(eta2=eta2), fs.Flow(), grid=[0.8, 0.5])
    assert plan.times[1] == pytest.approx(2 / 3)
    inner, last = plan.rows
    have = [inner.a[0], inner.b[0], inner.e.get(0, 0)]
    assert have == pytest.approx(GOLDEN[eta2][0], abs=1e-10)
    have = [last.a[0], last.b[0], last.b[1], last.e.get(0, 0), last.e.get(1, 0)]
    assert have == pytest.approx(GOLDEN[eta2][1], abs=1e-10)
    assert plan.stochastic == (eta2 > 0)


@pytest.mark.parametrize(
    ("eta2", "weight", "std"), [(0.5, -2.25, 1.3693063938), (1, -3, 1.9364916731)]
)
def test_the_noise_form_with_one_evaluation(eta2, weight, std):
    """lin 2.5, in x and eps."""
    (row,) = fs.plan(seeds("dpm_solver_2", eta2), fs.Flow(), 1, grid=[0.8, 0.5]).rows
    assert (row.a[0], row.e[0]) == pytest.approx((2.5 + weight / 0.8, std))
    assert row.b[0] == pytest.approx(-weight * 0.2 / 0.8)
    assert not row.exact


@pytest.mark.parametrize("r", [0.5, 0.3])
@pytest.mark.parametrize("eta2", [1.0, 0.4])
def test_seeds_2_in_noise_form_is_the_papers(r, eta2):
    solver = seeds(fs.singlestep(2, form="noise", ratios=[r]), eta2)
    process = fs.VP()
    plan = fs.plan(solver, process, grid=process.time(np.array([-0.4, 0.6])))
    s, m, t = plan.levels
    h, eta = t.lam - s.lam, math.sqrt(eta2)
    x, z = MIXTURE.start(3), np.random.default_rng(0).normal(size=(2, 3, 3))

    def eps(x, level):
        return (x - level.alpha * MIXTURE.denoise(x, level.alpha, level.sigma)) / level.sigma

    e = eps(x, s)
    u = m.alpha / s.alpha * x - (1 + eta2) * m.sigma * math.expm1(r * h) * e
    u += eta * m.sigma * math.sqrt(math.expm1(2 * r * h)) * z[0]
    want = t.alpha / s.alpha * x
    want -= (1 + eta2) * t.sigma * math.expm1(h) * (e + (eps(u, m) - e) / (2 * r))
    want += eta * t.sigma * math.sqrt(math.exp(2 * h) - math.exp(2 * h * (1 - r))) * z[0]
    want += eta * t.sigma * math.sqrt(math.expm1(2 * h * (1 - r))) * z[1]
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x, z), want, rtol=1e-12)


# -- k-diffusion, in its own words ---------------------------------------------------------------


def ancestral_step(start: float, end: float, eta: float) -> tuple[float, float]:
    up = min(end, eta * (end**2 * (start**2 - end**2) / start**2) ** 0.5)
    return (end**2 - up**2) ** 0.5, up


def denoise(x, sigma):
    return MIXTURE.denoise(x, 1.0, sigma)


def k_dpmpp_sde(x, sigmas, eta, r, noise):
    """noise(sigma, sigma_next): increments of one path in sigma, of unit variance."""
    for now, then in pairwise(sigmas):
        d = denoise(x, now)
        if then == 0:
            return d
        middle = now ** (1 - r) * then**r
        down, up = ancestral_step(now, middle, eta)
        u = down / now * x + (1 - down / now) * d + noise(now, middle) * up
        down, up = ancestral_step(now, then, eta)
        d = (1 - 0.5 / r) * d + 0.5 / r * denoise(u, middle)
        x = down / now * x + (1 - down / now) * d + noise(now, then) * up
    return x


def k_ancestral(x, sigmas, eta, z, second_order):
    for now, then, normal in zip(sigmas, sigmas[1:], z, strict=False):
        down, up = ancestral_step(now, then, eta)
        if down == 0:
            return denoise(x, now)
        middle = math.sqrt(now * down)
        if second_order == "2s":
            u = middle / now * x + (1 - middle / now) * denoise(x, now)
            x = down / now * x + (1 - down / now) * denoise(u, middle)
        else:
            u = x + (x - denoise(x, now)) / now * (middle - now)
            x = x + (u - denoise(u, middle)) / middle * (down - now)
        x = x + normal * up
    return x


SIGMAS = [14.0, 5.0, 2.0, 0.7, 0.2, 0.0]


@pytest.mark.parametrize(("eta", "r"), [(1.0, 0.5), (0.6, 0.5), (0.8, 0.3)])
def test_dpmpp_sde_is_k_diffusions(eta, r):
    plan = fs.plan(dpmpp_sde(eta, r), fs.EDM(), grid=SIGMAS)
    x = 14 * MIXTURE.start(4)
    normals = np.random.default_rng(1).normal(size=(len(plan.draws), *x.shape))
    # the path that these draws are increments of
    at, path = [SIGMAS[0]], [np.zeros_like(x)]
    for draw, normal in zip(plan.draws, normals, strict=True):
        assert draw.start.t == pytest.approx(at[-1])
        at.append(draw.end.t)
        path.append(path[-1] + math.sqrt(draw.start.t - draw.end.t) * normal)

    def noise(start, end):
        i, j = (int(np.argmin(np.abs(np.array(at) - v))) for v in (start, end))
        return (path[j] - path[i]) / math.sqrt(start - end)

    want = k_dpmpp_sde(x, SIGMAS, eta, r, noise)
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x, normals), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize(("solver", "kind"), [("dpmpp_2s", "2s"), ("dpm_solver_2", "2")])
def test_ancestral_is_k_diffusions(solver, kind, eta):
    plan = fs.plan(ancestral_singlestep(solver, eta), fs.EDM(), grid=SIGMAS)
    x = 14 * MIXTURE.start(4)
    z = np.random.default_rng(1).normal(size=(len(SIGMAS) - 2, *x.shape))
    assert len(plan.draws) == len(z)
    # the last step, to 0, draws nothing and has one evaluation
    want = k_ancestral(x, SIGMAS, eta, [*z, z[0]], kind)
    np.testing.assert_allclose(run(plan, MIXTURE.denoise, x, z), want, rtol=1e-9, atol=1e-11)


def test_with_eta_1_the_network_is_asked_about_the_node_itself():
    plan = fs.plan("dpmpp_2s_ancestral", fs.DiscreteVP.linear(), 9)
    for i in range(0, len(plan.rows) - 1, 2):
        assert plan.levels[i + 1] == plan.levels[i + 2]


# -- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith("seeds")])
@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_noise_of_a_step_is_that_of_its_segments(name, process):
    """With D held constant the target, and every inner state, is what first-order steps from state
    to state with the same draws lead to."""
    process = PROCESSES[process]
    times = process.time(np.array([-1.0, 0.4]))
    plan = fs.plan(FAMILIES[name], process, grid=times)
    eta2 = FAMILIES[name].noise
    x = np.random.default_rng(0).normal(size=(1, 2))
    z = np.random.default_rng(1).normal(size=(len(plan.draws), 1, 2))
    states = walk(plan, lambda x, alpha, sigma: np.full_like(x, 0.3), x, z)
    here, m = x, 0
    for a, b, state in zip(plan.levels, plan.levels[1:], states[1:], strict=False):
        if a != b:
            h = b.lam - a.lam
            here = (
                b.sigma / a.sigma * math.exp(-eta2 * h) * here
                - b.alpha * math.expm1(-(1 + eta2) * h) * 0.3
                + b.sigma * math.sqrt(-math.expm1(-2 * eta2 * h)) * z[m]
            )
            m += 1
        np.testing.assert_allclose(state, here, rtol=1e-12, atol=1e-13)
    assert m == len(plan.draws) >= 2
    assert plan.rows[-1].e.keys() == set(range(m))  # the target uses them all


@pytest.mark.parametrize("name", ["seeds_2", "seeds_3", "noise form"])
def test_one_path_whatever_the_steps(name):
    """Where D = 0 (in noise form: eps = 0) rows are exact, and on one path steps of any number
    lead to the same sample."""
    process = fs.VP()
    out = {}
    for path in (True, False):
        for n in (1, 2, 8):
            grid = process.time(np.linspace(-1, 1, n + 1))
            state = fs.plan(FAMILIES[name], process, grid=grid).start(
                torch.ones(2, 50, dtype=torch.float64), noise=fs.Noise(3, path=path)
            )
            while not state.done:
                x, _ = state.query()
                zero = torch.zeros_like(x)
                state = state.advance(x / state.level.alpha if "noise" in name else zero)
            out[path, n] = state.x
    scale = (out[True, 1] - out[True, 1].mean()).std()
    assert scale > 0.1
    for n in (2, 8):
        assert (out[True, n] - out[True, 1]).std() < 1e-5 * scale
        assert (out[False, n] - out[False, 1]).std() > 0.1 * scale


def rms_of_doubling(solver: fs.Solver, path: bool) -> list[float]:
    process, x = fs.VP(), torch.from_numpy(MIXTURE.start(400))
    ends = []
    for n in (10, 20, 40, 80):
        grid = process.time(np.linspace(-1.5, 1.5, n + 1))
        plan = fs.plan(solver, process, grid=grid)
        state = plan.start(x, noise=fs.Noise(1, path=path))
        while not state.done:
            level = plan.asked(state.index)
            d = MIXTURE.denoise(state.query()[0].numpy(), level.alpha, level.sigma)
            state = state.advance(torch.from_numpy(d))
        ends.append(state.x)
    return [float((a - b).square().mean().sqrt()) for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", FAMILIES)
def test_strong_order_1(name):
    solver = FAMILIES[name]
    errors = rms_of_doubling(solver, True)
    slope = -np.polyfit(np.arange(3), np.log2(errors), 1)[0]
    assert solver.strong_order == 1
    assert slope == pytest.approx(1, abs=0.3), errors
    fresh = rms_of_doubling(solver, False)
    assert fresh[-1] > 0.5 * fresh[0]  # it is the path that does it


@pytest.mark.parametrize("name", FAMILIES)
def test_without_noise_it_is_the_ode_solver(name):
    """In the limit, through the same code; and at 0 by its name."""
    solver = FAMILIES[name]
    process = fs.VP()
    member = fs.plan(solver.scaled(0.0), process, 9)
    assert not member.stochastic
    assert solver.scaled(0.0).name == solver.member
    limit = fs.plan(solver.scaled(1e-100), process, 9)
    assert limit.stochastic
    for mine, theirs in zip(limit.rows, member.rows, strict=True):
        for part in ("a", "b"):
            have, want = getattr(mine, part), getattr(theirs, part)
            for j in have.keys() | want.keys():
                assert have.get(j, 0.0) == pytest.approx(want.get(j, 0.0), rel=1e-11, abs=1e-11)
    assert solver.scaled(1.0).noise == solver.noise
    kind = 2 if name.startswith(("seeds", "noise")) else 1
    assert solver.scaled(0.5).noise == pytest.approx(0.5**kind * solver.noise)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 1.5)])
def test_weak_order_2(name, spacing):
    normal, process, gaps = Normal(), fs.Flow(), []
    for n in (80, 160, 320):
        lam = np.concatenate([[0.0], np.cumsum(np.resize(spacing, n))]) * 3 / n - 1.5
        gaps.append(normal.gap(fs.plan(FAMILIES[name], process, grid=process.time(lam))))
    slope = -np.polyfit(np.arange(3), np.log2(gaps), 1)[0]
    assert FAMILIES[name].order == 2
    assert slope == pytest.approx(2, abs=0.15), gaps


# -- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "process"),
    in_turn(3, FAMILIES, ["vp", "linear table", "flow", "zero terminal SNR", "user table"]),
)
def test_every_budget_is_spent(name, process):
    process = PROCESSES[process]
    for nfe in range(1, 41):
        for final in ("zero", "min"):
            plan = fs.plan(FAMILIES[name], process, nfe, final=final)
            assert plan.nfe == nfe
            if final == "zero":
                assert plan.rows[-1].b == {len(plan.rows) - 1: 1.0}
                assert not plan.rows[-1].a
                assert not plan.rows[-1].e
            if process.integer_times:
                assert all(v.t == round(v.t) for v in plan.evaluations)


@pytest.mark.parametrize("eta2", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("count", [2, 3])
def test_from_alpha_0_a_linear_answer_is_integrated_exactly(eta2, count):
    """D = c + d kappa: the exact step is its mean over the kernel, and forgets the start."""
    solver = seeds(("dpmpp_2s_taylor", "dpmpp_3s")[count - 2], eta2)
    plan = fs.plan(solver, fs.Flow(), count, grid=[1.0, 0.6])
    end, n = plan.levels[-1], 1 + eta2
    kappa = end.alpha / end.sigma

    def line(x, alpha, sigma):
        return np.full_like(x, 2.0 + 3.0 * alpha / sigma)

    zero = np.zeros((len(plan.draws), 1, 1))
    for start in (-1.0, 5.0):
        out = run(plan, line, np.full((1, 1), start), zero)
        assert out[0, 0] == pytest.approx(end.alpha * (2.0 + 3.0 * kappa * n / (n + 1)))
    assert math.sqrt(sum(c * c for c in plan.rows[-1].e.values())) == pytest.approx(end.sigma)


def test_noise_form_from_alpha_0_takes_the_data_step_on_a_path_of_its_own():
    plan = fs.plan(seeds("dpm_solver_2"), fs.Flow(), 8)
    assert [draw.tag for draw in plan.draws][:3] == [1, 1, 0]
    assert not plan.rows[1].a


def test_inner_states_on_the_target_of_integer_times():
    """Steps of one integer: both stages, and no draw between equal levels."""
    process = fs.DiscreteVP.linear()
    for name, solver in FAMILIES.items():
        plan = fs.plan(solver, process, grid=[600, 599, 598, 596])
        assert all(v.t == round(v.t) for v in plan.evaluations), name
        assert all(d.start.t != d.end.t for d in plan.draws)
        assert Normal().gap(plan) < 1e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: seeds("heun"), "solver = 'heun'; need an exponential singlestep"),
        (lambda: seeds("dpmpp_2m"), "solver = 'dpmpp_2m'"),
        (lambda: seeds("seeds_2"), "solver = 'seeds_2'"),
        (lambda: seeds("dpmpp_2"), "did you mean"),
        (lambda: seeds(eta2=-1), "eta2 = -1; need a finite number >= 0"),
        (lambda: seeds(eta2=math.nan), "eta2 = nan"),
        (lambda: ancestral_singlestep(eta=1.5), "eta = 1.5; need a number from 0 to 1"),
        (lambda: ancestral_singlestep("dpmpp_3s"), "solver = 'dpmpp_3s'; need a DPM-Solver"),
        (lambda: ancestral_singlestep("etd2rk"), "solver = 'etd2rk'"),
        (lambda: dpmpp_sde(True), "eta = True"),
        (lambda: dpmpp_sde(ratio=0.0), "ratios"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
