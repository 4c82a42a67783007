"""Samplers around a plan: Langevin corrections, denoising Gibbs, Levenberg-Marquardt."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fewstep as fs


def point_mass(process: fs.Process) -> fs.Denoiser:
    """Data at one point: the score is -(x - alpha mu) / sigma^2 exactly."""
    return fs.Denoiser(lambda x, t: torch.full_like(x, 0.3), process, "data")


class Counting:
    def __init__(self, network):
        self.network, self.calls, self.times = network, 0, []

    def __call__(self, x, t, **cond):
        self.calls += 1
        self.times.append(t[0].item())
        return self.network(x, t, **cond)


@pytest.mark.parametrize("process", [fs.VP(), fs.EDM(), fs.Flow()], ids=str)
def test_the_stationary_variance_is_the_formula_s(process):
    """sigma^2 (1 + r^2) at a point mass, in many dimensions. (Steps of fixed size
    2 r^2 sigma^2 would give sigma^2 / (1 - r^2): a larger spread makes these steps shorter.)"""
    snr, d = 0.4, 16384
    model = point_mass(process)
    plan = fs.plan("ddim", model, 5)
    level = plan.levels[0]
    state = plan.start(level.alpha * 0.3 + level.sigma * fs.start_noise((4, d), 1))
    state = fs.langevin(model, state, snr=snr, corrections=40, noise=7)
    noise = state.x - level.alpha * 0.3
    assert noise.square().mean() == pytest.approx(level.sigma**2 * (1 + snr**2), rel=0.015)
    assert abs(float(noise.mean())) < 0.1 * level.sigma


def test_norms_of_a_sample_are_its_own():
    model = fs.exact.digits().denoiser(fs.EDM(), "data")
    plan = fs.plan("ddim", model, 4)
    x = torch.randn(4, 1, 8, 8) * torch.tensor([1.0, 5.0, 20.0, 80.0]).reshape(4, 1, 1, 1)
    noise = fs.Noise(3)

    def both(norms):
        together = fs.langevin(model, plan.start(x), norms=norms, noise=noise, corrections=2).x
        alone = [
            fs.langevin(
                model,
                plan.start(x[k : k + 1]),
                norms=norms,
                noise=noise.take([k], 4),
                corrections=2,
            ).x
            for k in range(4)
        ]
        return float((together - torch.cat(alone)).abs().max())

    assert both("sample") < 1e-2  # of 80, in float32
    assert both("batch") > 1e-1


def test_the_official_step():
    """Against the algorithm as written, on a mixture."""
    model = fs.exact.digits().denoiser(fs.EDM(), "data")
    plan = fs.plan("ddim", model, 4)
    x = 10 * torch.randn(3, 1, 8, 8, dtype=torch.float64)
    z = torch.randn(1, 3, 1, 8, 8, dtype=torch.float64)
    state = plan.start(x)
    new = fs.langevin(model, state, snr=0.1, norms="batch", noise=z)
    sigma = state.level.sigma
    score = (model(x, sigma) - x) / sigma**2
    size = [v.reshape(3, -1).norm(dim=1).mean() for v in (z[0], score)]
    delta = 2 * (0.1 * size[0] / size[1]) ** 2
    assert torch.allclose(new.x, x + delta * score + (2 * delta).sqrt() * z[0], rtol=1e-12)
    assert new.index == state.index
    assert state.x is x or torch.equal(state.x, x)


@pytest.mark.parametrize("nfe", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("corrections", [1, 2, 3])
def test_the_budget_of_a_corrected_run(nfe, corrections):
    network = Counting(lambda x, t: 0.1 * x)
    model = fs.Denoiser(network, fs.Flow(), "flow")
    x = fs.sample_corrected(model, (2, 3), nfe=nfe, corrections=corrections, progress=False)
    assert network.calls == nfe
    assert x.isfinite().all()
    per_level = [len(list(group)) for _, group in itertools.groupby(network.times)]
    assert len(per_level) == math.ceil(nfe / (corrections + 1))
    assert max(per_level) <= corrections + 1


def test_without_corrections_it_is_the_solver():
    model = fs.exact.digits().denoiser(fs.EDM(), "data")
    for solver in ("ddim", "ddpm", "dpmpp_2m"):
        options = {"solver": solver, "nfe": 6, "seed": 2, "progress": False}
        plain = fs.sample(model, (3, 1, 8, 8), **options)
        assert torch.equal(
            plain, fs.sample_corrected(model, (3, 1, 8, 8), corrections=0, **options)
        )


def test_corrections_repair_a_wrong_score():
    """Gaussian data and a start of half the right spread: corrections pull it to the law."""
    d = 256  # the rule is for many dimensions: |z| / |s| has heavy tails in few
    model = fs.exact.Gaussian(np.zeros(d), 1.0).denoiser(fs.VP(), "data")
    x = 0.5 * fs.start_noise((20, d), 0)
    spread = [
        float(
            fs.sample_corrected(
                model, x=x, solver="ddim", nfe=20 * (m + 1), corrections=m, snr=0.3, progress=False
            ).std()
        )
        for m in (0, 4)
    ]
    assert spread[0] == pytest.approx(0.5, abs=0.05)
    assert spread[1] == pytest.approx(1.0, abs=0.12)


def test_bad_arguments():
    model = point_mass(fs.EDM())
    state = fs.plan("ddim", model, 3).start(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"snr = 1\.5; need"):
        fs.langevin(model, state, snr=1.5)
    with pytest.raises(ValueError, match="norms = 'all'; accepted"):
        fs.langevin(model, state, norms="all")
    with pytest.raises(ValueError, match="corrections = -1"):
        fs.langevin(model, state, corrections=-1)
    with pytest.raises(ValueError, match="'heun' spends 2"):
        fs.sample_corrected(model, (2, 3), solver="heun", nfe=4)
    coupled = point_mass(fs.Flow(independent=False))
    with pytest.raises(ValueError, match="coupled"):
        fs.langevin(coupled, state)
    with pytest.raises(ValueError, match="keep = 2"):
        fs.sample_levenberg(model, (2, 3), nfe=3, keep=2, damping=1.0)
    with pytest.raises(ValueError, match="damping = 0"):
        fs.sample_levenberg(model, (2, 3), nfe=3, keep=0.1, damping=0.0)


# -- denoising Gibbs -------------------------------------------------------------------------------


def gibbs(n: int, seed: int = 0, **options):
    """Two points with spread 0.2 in two dimensions, and the exact noise-level posterior."""
    means = np.array([[1.0, 0.0], [-1.0, 0.5]])
    exact = fs.exact.Mixture(np.array([0.5, 0.5]), means, [0.04, 0.04])
    levels = np.geomspace(0.05, 3.0, 25)

    def classifier(y):
        parts = [exact.log_density(y, 1.0, float(s)) for s in levels]
        return torch.stack(parts, 1)

    model = exact.denoiser(fs.EDM(sigma_min=0.01, sigma_max=5.0), "data")
    y = torch.from_numpy(means[np.arange(n) % 2]).float() + fs.start_noise((n, 2), seed)
    return fs.denoising_gibbs(
        model, y, 1.0, classifier, levels, step=lambda rho: 0.5 * rho**2, noise=seed, **options
    ), levels


@pytest.mark.slow
def test_the_chain_keeps_its_law():
    chain, levels = gibbs(1000, skip=15, nfe=25)
    for record in itertools.islice(chain, 3):
        assert record.sample.isfinite().all()
    quantile = np.searchsorted(levels, record.rho) / (len(levels) - 1)
    assert record.nfe == 3 * (15 + 25)
    assert quantile.mean() == pytest.approx(0.5, abs=0.06)  # the prior over levels is log-uniform
    x = record.sample
    assert float((x[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.08)
    assert float((x[:, 0].abs() - 1).std()) == pytest.approx(0.2, abs=0.05)


def test_the_official_shortcuts_bias_the_law():
    chain, levels = gibbs(300, skip=15, nfe=5, argmax=True)
    *_, record = itertools.islice(chain, 3)
    assert np.log(record.rho).std() < 0.5 * np.log(levels).std()


def test_the_chain_is_reproducible_and_refuses_nonsense():
    first, again = (next(gibbs(5, skip=3, nfe=4)[0]) for _ in range(2))
    assert torch.equal(first.sample, again.sample)
    model = point_mass(fs.EDM())
    with pytest.raises(ValueError, match="levels"):
        fs.denoising_gibbs(model, torch.zeros(2, 3), 1.0, lambda y: y, [0.0], step=0.1)
    with pytest.raises(ValueError, match="skip = 0"):
        fs.denoising_gibbs(model, torch.zeros(2, 3), 1.0, lambda y: y, [1.0], step=0.1, skip=0)
    with pytest.raises(ValueError, match="classifier returned shape"):
        next(fs.denoising_gibbs(model, torch.zeros(2, 3), 1.0, lambda y: y, [1.0], step=0.1))


# -- Levenberg-Marquardt ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "flow_ipndm_2"])
def test_with_keep_0_it_is_the_base_solver(solver):
    model = fs.exact.digits().denoiser(fs.EDM(), "data")
    x = 80 * torch.randn(3, 1, 8, 8, dtype=torch.float64)
    plain = fs.sample(model, x=x, solver=solver, nfe=6, progress=False)
    filtered = fs.sample_levenberg(model, x=x, solver=solver, nfe=6, keep=0.0, damping=1e-3)
    assert torch.allclose(plain, filtered, rtol=1e-7, atol=1e-7)


def test_with_keep_above_0_it_does_not_converge():
    model = fs.exact.digits().denoiser(fs.EDM(), "data")
    x = 80 * torch.randn(8, 1, 8, 8, dtype=torch.float64)
    best = fs.sample(model, x=x, solver="dpmpp_2m", nfe=200, progress=False)

    def error(nfe, keep):
        options = {"x": x, "solver": "ddim", "nfe": nfe, "damping": 1e-3}
        return float((fs.sample_levenberg(model, keep=keep, **options) - best).square().mean())

    assert error(100, 0.0) < 0.1 * error(100, 0.3)


class Numbered(fs.Source):
    """Noise that remembers which draws it was asked for."""

    def __init__(self):
        self.numbers, self.noise = [], fs.Noise(0)

    def draw(self, draw, number, like):
        self.numbers.append(number)
        return self.noise.draw(draw, number, like)


@pytest.mark.parametrize(("nfe", "corrections"), [(6, 3), (7, 2), (10, 3), (11, 4)])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_no_draw_is_used_twice(solver, nfe, corrections):
    """Also where the budget leaves some level fewer corrections than those before."""
    source = Numbered()
    model = point_mass(fs.EDM())
    options = {"nfe": nfe, "corrections": corrections, "noise": source, "progress": False}
    fs.sample_corrected(model, (2, 5), solver=solver, **options)
    assert len(source.numbers) >= nfe - math.ceil(nfe / (corrections + 1))
    assert len(set(source.numbers)) == len(source.numbers)
