"""Blurring diffusion: every mode is a Gaussian path of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._gddim import Blurring, dissipation

BASE = fs.CosineVP(s=0.0, t_start=0.99)
SHAPES = [(7,), (2, 6, 5), (1, 3, 4, 4)]
MULTISTEP = ("ddim", "dpmpp_2m", "noise_ab3", "unipc_2", "flow_ab2")


def damping(model: Blurring, shape, t: float) -> np.ndarray:
    """d, by its formula, in the shape of the spatial axes."""
    axes = shape if len(shape) == 1 else shape[1:]
    rates = np.zeros(axes)
    for where in np.ndindex(*axes):
        rates[where] = sum((math.pi * k / n) ** 2 for k, n in zip(where, axes, strict=True))
    blur = 20.0 * math.sin(math.pi * t / 2) ** 2
    return (1 - model.floor) * np.exp(-rates * blur**2 / 2) + model.floor


def exact(shape, mean, std: float, predicts="noise", floor=0.001) -> Blurring:
    """The network for data N(mean, std^2)."""
    B, model = fs.Cosine(), Blurring(lambda x, t: x, BASE, predicts, floor=floor)

    def network(x, t):
        level = BASE.level(float(t[0]))
        a = torch.from_numpy(level.alpha * damping(model, shape, level.t))
        y, m = B.forward(x.double()), B.forward(mean[None])
        d = m + a * std**2 / (a * a * std**2 + level.sigma**2) * (y - a * m)
        out = d if predicts == "data" else (y - a * d) / level.sigma
        return B.inverse(out).to(x)

    return Blurring(network, BASE, predicts, floor=floor)


def mean_of(shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("predicts", ["noise", "data"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_one_point_is_reached_exactly_in_any_number_of_steps(solver, shape, predicts):
    """eps is constant along the trajectories, and D too."""
    mean = mean_of(shape)
    model = exact(shape, mean, 0.0, predicts, floor=0.05)
    for nfe in (1, 2, 6):
        plan = model.plan(solver, nfe, shape)
        assert plan.nfe == nfe
        out = fs.sample(model, (2, *shape), solver=plan, dtype=torch.float64)
        torch.testing.assert_close(out, mean.expand_as(out), rtol=1e-8, atol=1e-8)


def test_every_mode_is_its_own_path():
    """The run is, mode by mode, that of the solver on the path (alpha d, sigma)."""
    shape, mean = (2, 4, 3), mean_of((2, 4, 3))
    model, B = exact(shape, mean, 0.3), fs.Cosine()
    x = torch.randn(2, *shape, dtype=torch.float64)
    times = np.linspace(0.9, 0.1, 6)
    ran = B.forward(
        fs.sample(model, x=x, solver=model.plan("dpmpp_2m", 5, shape, grid=times), progress=False)
    )
    for k in np.ndindex(4, 3):
        rate = float(model.frequencies(shape)[k])
        path = model.mode(rate)
        for c in range(2):
            m = float(B.forward(mean[None])[0, c, k[0], k[1]])
            alone = fs.exact.Gaussian([m], 0.09).denoiser(path)
            y = B.forward(x)[:, c, k[0], k[1]].reshape(2, 1)
            want = fs.sample(alone, x=y, solver=fs.plan("dpmpp_2m", path, grid=times))
            torch.testing.assert_close(ran[:, c, k[0], k[1]], want[:, 0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("nfe", [1, 3, 8])
def test_noise_keeps_the_law_of_every_mode(nfe):
    """Data at one point: the rows of 'ddpm' are exact in law. Coefficients over the noise."""
    shape = (1, 4, 4)
    model = exact(shape, torch.zeros(shape, dtype=torch.float64), 0.0)
    plan = model.plan("ddpm", nfe, shape, final="min")
    assert len(plan.draws) == nfe
    end = plan.levels[-1]
    variance = 0.0
    for k in range(nfe + 1):  # the start, and every draw, set to a constant field of modes
        one = fs.Cosine().inverse(torch.ones(1, *shape, dtype=torch.float64))
        zero = torch.zeros_like(one)
        noise = [one if m == k - 1 else zero for m in range(nfe)]
        start = one * plan.levels[0].sigma if k == 0 else zero
        out = fs.sample(model, x=start, solver=plan, noise=noise, progress=False)
        variance = variance + fs.Cosine().forward(out).square()
    np.testing.assert_allclose(variance.numpy(), end.sigma**2, rtol=1e-8)


def test_ddpm_is_the_published_sampler():
    """Mean and variance of Blurring Diffusion's p(z_s | z_t), written out."""
    shape, times = (1, 5, 4), np.array([0.7, 0.4])
    model = exact(shape, mean_of(shape), 0.2)
    plan = model.plan("ddpm", 1, shape, grid=times)
    t, s = (BASE.level(v) for v in times)
    at, a_s = (v.alpha * damping(model, shape, v.t) for v in (t, s))
    ratio = at / a_s
    between = t.sigma**2 - ratio**2 * s.sigma**2
    denoise = 1 / (1 / s.sigma**2 + 1 / (t.sigma**2 / ratio**2 - s.sigma**2))
    on_z = ratio * denoise / between + denoise / s.sigma**2 / ratio
    on_eps = -t.sigma * denoise / s.sigma**2 / ratio
    np.testing.assert_allclose(plan.rows[0].a[0], on_z, rtol=1e-9)
    np.testing.assert_allclose(plan.rows[0].b[0], on_eps, rtol=1e-9)
    np.testing.assert_allclose(plan.rows[0].e[0], np.sqrt(denoise), rtol=1e-9)


def test_plans_are_saved_and_states_go_on(tmp_path):
    shape = (2, 4, 3)
    model = exact(shape, mean_of(shape), 0.3)
    plan = model.plan("ddpm", 4, shape)
    plan.save(tmp_path / "plan")
    assert fs.Plan.load(tmp_path / "plan") == plan
    state = plan.start(torch.randn(2, *shape), noise=1)
    state.advance(model.output(*state.query(), state.level, {})).save(tmp_path / "state")
    assert fs.State.load(tmp_path / "state").index == 1


def test_refusals():
    model = exact((4,), mean_of((4,)), 0.1)
    with pytest.raises(ValueError, match="levels of its own"):
        fs.sample(model, (1, 4), nfe=3)
    with pytest.raises(ValueError, match="levels of its own"):
        fs.plan("ddim", model, grid=[0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match="at other times in other modes"):
        model.plan("dpmpp_2s", 6, (4,))
    with pytest.raises(ValueError, match="shape ="):
        model.plan("ddim", 3, ())
    with pytest.raises(ValueError, match="nfe = 0"):
        model.plan("ddim", 0, (4,))
    with pytest.raises(ValueError, match="t_clean"):
        Blurring(lambda x, t: x, fs.VE())
    with pytest.raises(ValueError, match="predicts"):
        Blurring(lambda x, t: x, BASE, "v")
    with pytest.raises(ValueError, match="floor"):
        Blurring(lambda x, t: x, BASE, floor=1.0)
    with pytest.raises(ValueError, match="alpha = 0"):
        Blurring(lambda x, t: x, fs.Flow()).plan("ddim", 3, (4,))
    with pytest.raises(ValueError, match="coupled"):
        Blurring(lambda x, t: x, fs.Flow(t_start=0.9, independent=False)).plan("ddpm", 3, (4,))
    with pytest.raises(ValueError, match="sigma_max"):
        dissipation(-1.0)
