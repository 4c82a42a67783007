"""Mean-reverting paths: the table, the published formulas, and means that do not matter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._mean_reverting import Centred, MeanReverting, restore
from fewstep._solvers._stochastic import sde

MIXTURE = fs.exact.Mixture(np.full(3, 1 / 3), [[-0.3, 0.2], [0.1, 0.4], [0.3, -0.2]], [0.01] * 3)


def cosine_thetas(n: int) -> list[float]:
    """The published schedule, written out."""
    values = [math.cos((i / (n + 2) + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 3)]
    return [1 - values[i] / values[0] for i in range(1, n + 2)]


@pytest.mark.parametrize(
    ("name", "thetas"),
    [
        ("cosine", cosine_thetas(100)),
        ("linear", np.linspace(0.0001, 0.02, 101).tolist()),
        ("constant", [1.0] * 101),
    ],
)
def test_the_table_is_the_published_one(name, thetas):
    process = getattr(MeanReverting, name)(std=0.2)
    dt = -math.log(0.005) / sum(thetas)
    for t in (0, 1, 50, 100):
        big = dt * sum(thetas[: t + 1])
        level = process.level(t)
        assert level.alpha == pytest.approx(math.exp(-big), rel=1e-12)
        assert level.sigma == pytest.approx(0.2 * math.sqrt(-math.expm1(-2 * big)), rel=1e-12)
        assert level.lam == pytest.approx(math.log(level.alpha / level.sigma), abs=1e-12)
    assert (process.t_start, process.t_end, process.t_clean) == (100, 0, -1)
    assert process.level(-1.0).sigma == 0
    assert process.prior_std(100.0) == 0.2


def test_times_and_clean_ends():
    for process in (MeanReverting.cosine(), MeanReverting.from_thetas([1, 2, 3], 0.1, t_clean=0.0)):
        t = np.linspace(process.t_end, process.t_start, 57)
        np.testing.assert_allclose(process.time(process.lam(t)), t, atol=1e-9)
        knots = process.knots(float(process.lam(process.t_start)), float(process.lam(t[1])))
        np.testing.assert_allclose(process.time(knots), np.round(process.time(knots)), atol=1e-9)
        assert len(knots)
    assert process.t_end == 1.0
    assert process.alpha(0.0) == 1.0


def published(kind: str, form: str, order: int, process, times, x, mu, network, zs):
    """MaRS's formulas in x and mu, order 1 in the first step."""
    before: list[tuple[float, torch.Tensor]] = []
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        u, v = process.level(s), process.level(t)
        h, ea, es = v.lam - u.lam, v.alpha / u.alpha, v.sigma / u.sigma
        m = network(x, u)
        delta = 0.0
        if order == 2 and before:
            h_before, m_before = before[-1]
            delta = (m - m_before) * h / h_before
        e, f, g = math.exp(h), math.exp(-h), math.exp(-2 * h)
        if (kind, form) == ("ode", "noise"):
            new = ea * x + (1 - ea) * mu - v.sigma * ((e - 1) * m + ((e - 1) / h - 1) * delta)
        elif (kind, form) == ("ode", "data"):
            new = es * x + (1 - es + es * u.alpha - v.alpha) * mu
            new = new + v.alpha * ((1 - f) * m + (1 + (f - 1) / h) * delta)
        elif form == "noise":
            new = ea * x + (1 - ea) * mu
            new = new - 2 * v.sigma * ((e - 1) * m + ((e - 1) / h - 1) * delta)
            new = new + v.sigma * math.sqrt(e * e - 1) * zs[i]
        else:
            new = es * f * x + (1 - ea * g - v.alpha * (1 - g)) * mu
            new = new + v.alpha * ((1 - g) * m + (1 - (1 - g) / (2 * h)) * delta)
            new = new + v.sigma * math.sqrt(1 - g) * zs[i]
        before.append((h, m))
        x = new
    return x


SOLVERS = {
    ("ode", "noise", 1): fs.exponential(1, form="noise"),
    ("ode", "noise", 2): fs.exponential(2, form="noise", growth=math.inf),
    ("ode", "data", 1): fs.solvers["ddim"],
    ("ode", "data", 2): fs.solvers["dpmpp_2m_heun"],
    ("sde", "noise", 1): sde(1, form="noise"),
    ("sde", "noise", 2): sde(2, form="noise", growth=math.inf),
    ("sde", "data", 1): sde(1),
    ("sde", "data", 2): sde(2, growth=math.inf),
}


@pytest.mark.parametrize(("kind", "form", "order"), SOLVERS)
def test_the_eight_solvers_of_the_paper(kind, form, order):
    process = MeanReverting.cosine()
    times = np.array([100.0, 77.3, 61.0, 40.0, 18.5, 3.0])
    g = torch.Generator().manual_seed(0)
    x, mu, *zs = torch.randn(7, 4, 3, generator=g, dtype=torch.float64)

    def network(x, t):
        return torch.tanh(x * (1 + t.reshape(-1, 1) / 50) + mu)

    def at(x, level):
        return network(x, torch.full((4,), level.t, dtype=torch.float64))

    model = fs.Denoiser(network, process, form)
    noise = zs if kind == "sde" else None
    solver = SOLVERS[kind, form, order]
    ours = restore(model, mu, x=x, solver=solver, grid=times, noise=noise, progress=False)
    theirs = published(kind, form, order, process, times, x, mu, at, zs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def with_mean(process, mean, predicts):
    """The mixture about a mean, as a network on x that answers in a convention."""
    prediction = process.velocity if predicts == "velocity" else fs.predictions[predicts]

    def network(x_in, t):
        level = process.level(float(t[0]))
        y = x_in / prediction.input_scale(level) - mean
        d = MIXTURE.denoise(y, level.alpha, level.sigma)
        u, w = prediction.from_data(level)
        if predicts == "data":
            return d + mean
        if predicts == "edm":  # of x itself: D = c_skip x + c_out F
            p, q = prediction.to_data(level)
            return (d + mean - p * (y + mean)) / q
        return u * y + w * d

    return fs.Denoiser(network, process, replace(prediction, time="t"))


@pytest.mark.parametrize("predicts", ["noise", "data", "score", "v", "flow", "velocity", "edm"])
def test_a_mean_is_a_shift_for_every_prediction(predicts):
    process = MeanReverting.linear()
    mean = torch.tensor([[5.0, -3.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    y = fs.sample(
        MIXTURE.denoiser(process), (3, 2), nfe=6, solver="dpmpp_2m", seed=4, dtype=torch.float64
    )
    model = with_mean(process, mean, predicts)
    x = restore(model, mean, nfe=6, solver="dpmpp_2m", seed=4, dtype=torch.float64)
    torch.testing.assert_close(x, y + mean, rtol=1e-10, atol=1e-10)
    one = torch.tensor([0.7, -0.2], dtype=torch.float64)  # calls with a time per sample
    t = torch.tensor([90.0, 90.0, 90.0])
    d = Centred(with_mean(process, one, predicts), one)(y, t)
    torch.testing.assert_close(d, MIXTURE.denoiser(process)(y, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", fs.solvers)
def test_every_solver_runs(solver):
    process, mean = MeanReverting.cosine(), torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    options = {"nfe": 4, "solver": solver, "seed": 1, "dtype": torch.float64, "progress": False}
    y = fs.sample(MIXTURE.denoiser(process, "noise"), (1, 2), **options)
    x = restore(with_mean(process, mean, "noise"), mean, **options)
    torch.testing.assert_close(x, y + mean, rtol=1e-8, atol=1e-8)


def test_hooks_see_the_image_and_guidance_goes_inside():
    process, mean = MeanReverting.cosine(), torch.full((2, 2), 0.5, dtype=torch.float64)
    seen = []

    def hook(data, level):
        seen.append(data)
        return data.clamp(0.4, 0.6)

    def network(x, t, label):
        shift = label.reshape(-1, 1) * 0.1
        return with_mean(process, mean.repeat(len(x) // 2, 1), "data").network(x, t) + shift

    model = fs.Guided(fs.Denoiser(network, process, "data"), 2.0, {"label": 0.0})
    out = restore(model, mean, nfe=5, hook=hook, cond={"label": torch.ones(2)}, seed=0)
    assert bool(((out >= 0.4 - 1e-6) & (out <= 0.6 + 1e-6)).all())
    assert len(seen) == 5
    assert float(seen[0].mean()) == pytest.approx(0.5 + 0.2, abs=0.3)


def test_refusals():
    model = MIXTURE.denoiser(MeanReverting.cosine())
    with pytest.raises(ValueError, match="thetas has shape"):
        MeanReverting.from_thetas([1.0, -1.0])
    with pytest.raises(ValueError, match="alpha_end = 1"):
        MeanReverting.cosine(alpha_end=1.0)
    with pytest.raises(ValueError, match="std = 0"):
        MeanReverting.cosine(std=0.0)
    with pytest.raises(ValueError, match="mean has shape"):
        fs.sample(Centred(model, torch.zeros(3)), (1, 2), nfe=2)
    with pytest.raises(ValueError, match="mean is int"):
        Centred(model, 0)
    with pytest.raises(ValueError, match="degraded"):
        restore(model, 0.0, nfe=2)
    odd = fs.Denoiser(lambda x, t: x, MeanReverting.cosine(), fs.Prediction("odd", *[None] * 2))
    with pytest.raises(ValueError, match="Centred knows"):
        Centred(odd, torch.zeros(2))
