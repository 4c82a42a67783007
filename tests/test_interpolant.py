"""Stochastic interpolants: between laws for which b and s are known."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._interpolant import Gamma, Interpolant, gammas
from fewstep._noise import Noise

A = 2.0
BROWNIAN = Gamma.brownian(A)


@pytest.mark.parametrize("gamma", [*gammas.values(), BROWNIAN], ids=lambda g: g.name)
def test_the_product_is_half_the_slope_of_the_square(gamma):
    t, h = np.linspace(0.02, 0.98, 9), 1e-6
    slope = (gamma.value(t + h) ** 2 - gamma.value(t - h) ** 2) / (4 * h)
    np.testing.assert_allclose(gamma.product(t), slope, atol=1e-8)
    np.testing.assert_allclose(gamma.value(np.array([0.0, 1.0])), 0, atol=1e-15)
    assert np.isfinite(gamma.product(np.array([0.0, 1.0]))).all()


# -- one normal law to another: all is affine, laws are known without sampling --------------------

MEANS, STDS = (-1.0, 2.0), (0.5, 0.8)


def law(t: float) -> tuple[float, float, float, float]:
    """Mean and variance of x_t, and their derivatives."""
    mean = (1 - t) * MEANS[0] + t * MEANS[1]
    variance = (1 - t) ** 2 * STDS[0] ** 2 + t**2 * STDS[1] ** 2 + A * t * (1 - t)
    slope = -2 * (1 - t) * STDS[0] ** 2 + 2 * t * STDS[1] ** 2 + A * (1 - 2 * t)
    return mean, variance, MEANS[1] - MEANS[0], slope


def drift(x, t):
    mean, variance, dm, dv = law(float(t[0]))
    return dm + dv / (2 * variance) * (x - mean)


def score(x, t):
    mean, variance, _, _ = law(float(t[0]))
    return -(x - mean) / variance


def errors(model: Interpolant, plan: fs.Plan) -> tuple[float, float]:
    """Of mean and variance at the end: coefficients over the start and all draws."""
    start, end = (1.0, 0.0) if model.backward else (0.0, 1.0)
    m, v, _, _ = law(start)
    n = len(plan.draws)
    x = torch.full((n + 2, 1), m, dtype=torch.float64)
    x[1] += math.sqrt(v)
    noise = [torch.zeros(n + 2, 1, dtype=torch.float64) for _ in range(n)]
    for k in range(n):
        noise[k][k + 2] = 1.0
    out = fs.sample(model, x=x, solver=plan, noise=noise or None, progress=False)[:, 0]
    mean, variance = float(out[0]), float((out[1:] - out[0]).square().sum())
    return mean - law(end)[0], variance - law(end)[1]


EPS = {"ode": 0.0, "constant": 0.4, "function": lambda t: 0.5 + 0.3 * np.cos(3 * t)}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_order_in_law(method, eps, backward):
    model = Interpolant(drift, score, eps=EPS[eps], backward=backward)
    calls = 2 if method == "heun" else 1
    found = []
    for steps in (16, 32, 64):
        found.append(errors(model, model.plan(calls * steps, method=method)))
    slopes = [math.log2(abs(found[i][1] / found[i + 1][1])) for i in (0, 1)]
    order = 2 if method == "heun" else 1
    assert min(slopes) > order - 0.25, found
    assert abs(found[-1][1]) < (0.002 if method == "heun" else 0.05)
    assert abs(found[-1][0]) < (0.002 if method == "heun" else 0.05)


def test_ode_trajectories_are_exact_maps():
    """Between normal laws the ODE is the affine map from one to the other, back and forth."""
    x = torch.linspace(-2, 1, 5, dtype=torch.float64)[:, None]
    model = Interpolant(drift)
    there = fs.sample(model, x=x, solver=model.plan(400), progress=False)
    want = MEANS[1] + STDS[1] / STDS[0] * (x - MEANS[0])
    torch.testing.assert_close(there, want, atol=1e-4, rtol=1e-4)
    back = Interpolant(drift, backward=True)
    here = fs.sample(back, x=there, solver=back.plan(400), progress=False)
    torch.testing.assert_close(here, x, atol=1e-4, rtol=1e-4)


# -- one mixture to another ------------------------------------------------------------------------

M0 = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
M1 = torch.tensor([[0.0, 2.0], [0.5, -1.5], [-1.0, -1.0]], dtype=torch.float64)
S0, S1 = 0.4, 0.3


def velocity_and_score(x, t):
    """v and s of x_t = (1 - t) x_0 + t x_1 + sqrt(A t (1 - t)) z, a mixture over pairs."""
    t = float(t[0])
    means = ((1 - t) * M0[:, None] + t * M1).reshape(-1, 2)
    slopes = (M1 - M0[:, None]).reshape(-1, 2)
    variance = (1 - t) ** 2 * S0**2 + t**2 * S1**2 + A * t * (1 - t)
    d = x[:, None] - means
    r = (-d.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
    cross = (t * S1**2 - (1 - t) * S0**2) / variance
    return (r * (slopes + cross * d)).sum(1), -(r * d / variance).sum(1)


def v_network(x, t):
    return velocity_and_score(x, t)[0]


def s_network(x, t):
    return velocity_and_score(x, t)[1]


def b_network(x, t):
    v, s = velocity_and_score(x, t)
    return v - A * (1 - 2 * float(t[0])) / 2 * s


def draws(means, std, n, seed):
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(len(means), (n,), generator=g)
    return means[k] + std * torch.randn(n, 2, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.25, 1.0])
def test_mixtures_go_into_each_other(eps, backward):
    n = 6000
    (start, a), (end, b) = ((M1, S1), (M0, S0)) if backward else ((M0, S0), (M1, S1))
    model = Interpolant(b_network, s_network, eps=eps, backward=backward)
    x = draws(start, a, n, 0)
    out = fs.sample(model, x=x, solver=model.plan(60), progress=False)
    mean, cov = end.mean(0), torch.cov(end.T, correction=0) + b**2 * torch.eye(2)
    assert float((out.mean(0) - mean).abs().max()) < 4 * math.sqrt(float(cov.max()) / n)
    assert float((torch.cov(out.T) - cov).abs().max()) < 4 * float(cov.max()) * math.sqrt(2 / n)
    near = (out[:, None] - end).norm(dim=-1).argmin(1)
    shares = torch.bincount(near, minlength=len(end)) / n
    assert float((shares - 1 / len(end)).abs().max()) < 0.03


def test_v_and_s_are_b():
    x = draws(M0, S0, 7, 1)
    for eps in (0.0, 0.3):
        b = Interpolant(b_network, s_network, eps=eps)
        v = Interpolant(v_network, s_network, "v", BROWNIAN, eps)
        runs = [fs.sample(m, x=x, solver=m.plan(9), seed=3, progress=False) for m in (b, v)]
        torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)
    assert v.plan(4).levels[1].sigma == pytest.approx(math.sqrt(A) / 2)


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("nfe", range(1, 8))
def test_evaluations_are_what_is_asked_for(method, nfe):
    model = Interpolant(b_network, s_network, eps=0.3)
    plan = model.plan(nfe, method=method)
    assert plan.nfe == nfe
    assert (plan.levels[0].t, plan.levels[-1].t) == (0.0, 1.0)
    assert len(plan.draws) == (nfe if method == "euler" else -(-nfe // 2))


def test_states_are_values(tmp_path):
    model = Interpolant(b_network, s_network, eps=0.3)
    plan, x = model.plan(5), draws(M0, S0, 3, 1)
    whole = fs.sample(model, x=x, solver=plan, seed=4, progress=False)
    state = plan.start(x, noise=4)
    while not state.done:
        output = model.output(*state.query(), state.level, {})
        if state.nfe == 2:
            state.save(tmp_path / "state")
            state = pickle.loads(pickle.dumps(fs.State.load(tmp_path / "state")))
        state = state.advance(output)
    assert torch.equal(state.x, whole)
    again = fs.sample(model, x=x[1:], solver=plan, seed=4, first=1, progress=False)
    torch.testing.assert_close(again, whole[1:], rtol=1e-12, atol=1e-12)


def test_log_density_of_a_step():
    model = Interpolant(drift, score, eps=0.4)
    state = model.plan(4, method="euler").start(torch.zeros(3, 1, dtype=torch.float64), noise=1)
    output = model.output(*state.query(), state.level, {})
    step = state.transition(output)
    assert step.std == pytest.approx(math.sqrt(2 * 0.4 / 4))
    want = torch.distributions.Normal(step.mean, step.std).log_prob(state.x).sum(1)
    torch.testing.assert_close(step.log_prob(state.x), want)


@pytest.mark.parametrize("backward", [False, True])
def test_more_steps_refine_one_path(backward):
    model = Interpolant(drift, score, eps=0.4, backward=backward)
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    runs = [
        fs.sample(
            model,
            x=x,
            solver=model.plan(n, method="euler"),
            noise=Noise(1, path=True),
            progress=False,
        )
        for n in (8, 16, 32, 64)
    ]
    gaps = [float((a - b).square().mean().sqrt()) for a, b in itertools.pairwise(runs)]
    assert gaps[2] < 0.4 * gaps[0]


def test_guidance_and_calls_with_a_time_per_sample():
    def network(x, t, label):
        return x * label.reshape(-1, *(1,) * (x.ndim - 1))

    model = Interpolant(network)
    guided = fs.Guided(model, 3.0, {"label": 0.0})
    x = torch.ones(2, 3, 4)
    cond = {"label": torch.ones(2)}
    out = fs.sample(guided, x=x, solver=model.plan(2, method="euler"), cond=cond)
    torch.testing.assert_close(out, x * 2.5**2)
    both = Interpolant(lambda x, t: x, lambda x, t: x, eps=lambda t: t)
    f = both(x, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(f, x * torch.tensor([1.25, 1.5]).reshape(2, 1, 1))


def test_refusals():
    model = Interpolant(b_network, s_network)
    for call in (
        lambda: fs.sample(model, x=torch.zeros(1, 2), nfe=4),
        lambda: fs.plan("ddim", model, grid=[0.0, 0.5, 1.0]),
        lambda: fs.plan("euler_ancestral", model, 4, grid="karras"),
    ):
        with pytest.raises(ValueError, match="no alpha and sigma"):
            call()
    with pytest.raises(ValueError, match="x is missing"):
        fs.sample(model, (3, 2), solver=model.plan(3))
    with pytest.raises(ValueError, match="without a score"):
        Interpolant(b_network, eps=1.0)
    with pytest.raises(ValueError, match="predicts = 'v' and no score"):
        Interpolant(v_network, predicts="v", gamma="brownian")
    with pytest.raises(ValueError, match="gamma"):
        Interpolant(v_network, gamma="brown")
    with pytest.raises(ValueError, match="predicts"):
        Interpolant(v_network, predicts="u")
    with pytest.raises(ValueError, match="eps"):
        Interpolant(v_network, s_network, eps=-1.0)
    with pytest.raises(ValueError, match="eps"):
        Interpolant(v_network, s_network, eps=lambda t: -t).plan(4)
    with pytest.raises(ValueError, match="times"):
        model.plan(times=[0.0, 0.5, 0.4])
    with pytest.raises(ValueError, match="nfe = 9"):
        model.plan(9, times=[0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="nfe is missing"):
        model.plan()
    with pytest.raises(ValueError, match="method"):
        model.plan(4, method="rk4")
