"""A model on another path: the same trajectories where methods live in lambda."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._on_path import on_path
from fewstep._pfgm import PFGM
from problems import PROCESSES

MIXTURE = fs.exact.Mixture(np.full(3, 1 / 3), [[-1.0, 0.4], [0.3, 1.0], [0.8, -0.9]], [0.05] * 3)
CONTINUOUS = {k: p for k, p in PROCESSES.items() if not p.integer_times}
LAM = np.linspace(-2.5, 3.0, 9)
STOCHASTIC = ("ddpm", "sde_dpmpp_2m", "sa_solver")


def norm(level: fs.Level) -> float:
    return math.hypot(level.alpha, level.sigma)


def both(solver, model, other, noise=None):
    """The run on the model's own path and on the other, at the same lambda, from the same state,
    as x / hypot(alpha, sigma)."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = []
    for on in (model, other):
        plan = fs.plan(solver, on, grid=on.process.time(LAM))
        start, end = norm(plan.levels[0]), norm(plan.levels[-1])
        ran = fs.sample(on, x=x * start, solver=plan, noise=noise, progress=False)
        out.append(ran / end)
    return out


@pytest.mark.parametrize("predicts", ["noise", "data", "v", "flow", "score", "edm"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_exponential_rows_commute_with_a_change_of_path(name, predicts):
    model = MIXTURE.denoiser(fs.VP(), predicts)
    other = on_path(model, CONTINUOUS[name])
    noise = list(torch.randn(8, 4, 2, dtype=torch.float64))
    for solver in ("ddim", "dpmpp_2m", "noise_ab3", "flow_ab2", *STOCHASTIC):
        a, b = both(solver, model, other, noise)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=solver)


def test_methods_in_the_time_of_the_path_do_not():
    model = MIXTURE.denoiser(fs.VP())
    a, b = both("deis_tab2", model, on_path(model, fs.Flow()))
    assert float((a - b).abs().max()) > 1e-3


def test_the_model_is_the_same_function():
    model = MIXTURE.denoiser(fs.VP(), "v")
    other = on_path(model, fs.EDM())
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0, 9.0, 60.0])
    want = MIXTURE.denoiser(fs.EDM())(x, t)
    torch.testing.assert_close(other(x, t), want, rtol=1e-6, atol=1e-6)


def test_the_velocity_is_the_published_conversion():
    """u'(x', r) = (c' / c) x' + (dt/dr) c u(x' / c, t), from a straight path to VP."""
    flow, vp, r, h = fs.Flow(), fs.VP(), 0.4, 1e-6
    other = on_path(MIXTURE.denoiser(flow, "flow"), vp)
    x = torch.randn(5, 2, dtype=torch.float64)

    def t_and_c(r):
        level = vp.level(r)
        t = float(flow.time(level.lam))
        return t, level.sigma / t

    (t, c), ahead, behind = t_and_c(r), t_and_c(r + h), t_and_c(r - h)
    dt, dc = ((p - q) / (2 * h) for p, q in zip(ahead, behind, strict=True))
    d = MIXTURE.denoise(x / c, 1 - t, t)
    want = dc / c * x + dt * c * ((x / c - d) / t)
    beta = 0.1 + 19.9 * r  # the probability flow of VP: f x - g^2 / 2 s
    level = vp.level(r)
    score = (level.alpha * other(x, r) - x) / level.sigma**2
    torch.testing.assert_close(want, -beta / 2 * (x + score), rtol=1e-6, atol=1e-6)


def test_ends_are_shared_and_the_start_is_scaled():
    model = MIXTURE.denoiser(fs.VP(), "noise")
    other = on_path(model, fs.Flow(t_end=1e-5))
    for t, own in ((other.process.t_start, 1.0), (other.process.t_end, 1e-3)):
        assert float(other.process.lam(t)) == pytest.approx(float(fs.VP().lam(own)), abs=1e-9)
    start = other.process.t_start
    scale = norm(other.process.level(start))
    assert fs.plan("ddim", other, 4).prior_std == pytest.approx(scale, rel=1e-9)
    samples = fs.sample(other, (2, 2), nfe=8, solver="dpmpp_2m", seed=0, dtype=torch.float64)
    assert bool(samples.isfinite().all())
    inner = on_path(model, fs.Flow(t_start=0.9, t_end=0.1)).process
    assert (inner.t_start, inner.t_end) == (0.9, 0.1)


def test_guidance_sees_the_same_noise_level():
    process, told = fs.VP(), []

    def network(x, t, label):
        told.append(len(x))
        return x * label.reshape(-1, 1)

    guided = fs.Guided(fs.Denoiser(network, process, "data"), 2.0, {"label": 0.0}, (0.5, 2.0))
    runs = []
    for model in (guided, on_path(guided, fs.EDM())):
        told.clear()
        fs.sample(
            model,
            (2, 3),
            solver=fs.plan("ddim", model, grid=model.process.time(LAM)),
            cond={"label": torch.ones(2)},
        )
        runs.append(list(told))
    assert runs[0] == runs[1]
    assert set(runs[0]) == {2, 4}


def test_what_a_path_is_not_stays():
    coupled = on_path(MIXTURE.denoiser(fs.Flow(independent=False), "flow"), fs.VP())
    with pytest.raises(ValueError, match="coupled"):
        fs.plan("ddpm", coupled, 4)
    student = on_path(MIXTURE.denoiser(PFGM()), fs.VP())
    with pytest.raises(ValueError, match="PFGM"):
        fs.plan("ddpm", student, 4)
    z = fs.start_noise((3, 2), 0)
    assert not torch.equal(student.process.noise_from(z, fs.Noise(0)), z)


def test_refusals():
    model = MIXTURE.denoiser(fs.VP())
    with pytest.raises(ValueError, match="model ="):
        on_path(lambda x, t: x, fs.VP())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="process ="):
        on_path(model, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole times"):
        on_path(model, fs.DiscreteVP.linear())
    with pytest.raises(ValueError, match="shares no levels"):
        on_path(model, fs.EDM(sigma_min=1e6, sigma_max=1e7))
