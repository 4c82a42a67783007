"""PFGM++: the noise it starts from, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import fewstep as fs
from fewstep._noise import Noise
from fewstep._pfgm import PFGM, _chi_square


@pytest.mark.parametrize("D", [0.5, 1, 1.9, 2, 3, 128, 2048, 1e6])
def test_the_chi_square_is_one(D):
    values = _chi_square(D, Noise(3), 20_000).numpy()
    assert stats.kstest(values, "chi2", args=(D,)).pvalue > 1e-3


@pytest.mark.parametrize("D", [1, 8, 128])
def test_the_radius_has_the_papers_law(D):
    """R^2 = r^2 B / (1 - B), B from Beta(N/2, D/2), r = sigma sqrt(D)."""
    N, sigma, process = 48, 80.0, PFGM(D=D)
    x = sigma * process.noise_from(fs.start_noise((20_000, N), 1), Noise(1))
    square = x.double().square().sum(1).numpy() / process.radius(sigma) ** 2
    law = stats.beta(N / 2, D / 2)
    assert stats.kstest(square / (1 + square), law.cdf).pvalue > 1e-3


def test_images_have_the_spread_of_the_card():
    """R / (sigma sqrt(N)) at N = 3072: 1.006 +- 0.065 (D = 128), 1.000 +- 0.020 (D = 2048)."""
    z = fs.start_noise((500, 3072), 0)
    for D, spread in ((128, 0.065), (2048, 0.020)):
        r = PFGM(D=D).noise_from(z, Noise(0)).norm(dim=1) / math.sqrt(3072)
        assert float(r.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(r.std()) == pytest.approx(spread, rel=0.12)


def test_a_sample_depends_on_its_seed_and_index_only():
    process = PFGM(D=3)

    def start(n, **place):
        return process.noise_from(fs.start_noise((n, 5), **place), Noise(**place))

    whole = start(6, seed=7)
    assert torch.equal(start(2, seed=7, first=3), whole[3:5])
    assert not torch.equal(start(6, seed=8), whole)
    seeds = start(2, seed=[7, 9])
    assert torch.equal(seeds[:1], start(1, seed=7))
    assert torch.equal(seeds[1:], start(1, seed=9))


POINTS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def two_points(process: PFGM) -> fs.Denoiser:
    """The exact denoiser of two points in the plane under the kernel of the process."""

    def network(x, t):
        r2 = float(t[0]) ** 2 * process.D
        square = (x[:, None] - POINTS).square().sum(-1)
        logits = WEIGHTS.log() - (2 + process.D) / 2 * torch.log1p(square / r2)
        return logits.softmax(1) @ POINTS

    return fs.Denoiser(network, process, "data")


@pytest.mark.parametrize("D", [1, 8, 2048])
def test_masses_of_two_points(D):
    n, model = 12_000, two_points(PFGM(D=D))
    options = {"nfe": 59, "solver": "heun", "grid": "karras", "progress": False}
    out = fs.sample(model, (n, 2), seed=1, dtype=torch.float64, **options)
    far = (out - POINTS[(out[:, 0] > 0).long()]).norm(dim=1) > 1e-3
    assert int(far.sum()) <= 0.015 * n  # D = 1 starts from heavy tails, which 30 steps leave late
    error = math.sqrt(0.3 * 0.7 / n)
    assert float((out[:, 0] < 0).double().mean()) == pytest.approx(0.3, abs=3 * error)
    if D == 1:  # a normal start is wrong, and that is seen
        x = 80 * fs.start_noise((n, 2), 1, dtype=torch.float64)
        wrong = fs.sample(model, x=x, **options)
        assert float((wrong[:, 0] < 0).double().mean()) < 0.3 - 3 * error


def test_plans_are_those_of_edm():
    for solver in ("heun", "dpmpp_2m", "ddim"):
        assert fs.plan(solver, PFGM(D=4), 7) == fs.plan(solver, fs.EDM(), 7)


def test_noise_added_to_data_is_of_the_same_kind():
    process, data = PFGM(D=2), torch.ones(3, 4)
    x = fs.add_noise(process, data, {"sigma": 5.0}, seed=2)
    z = process.noise_from(fs.start_noise((3, 4), 2), Noise(2))
    torch.testing.assert_close(x, data + 5 * z)


@pytest.mark.parametrize("solver", [s for s in fs.solvers if fs.solvers[s].stochastic])
def test_stochastic_solvers_are_refused(solver):
    with pytest.raises(ValueError, match=r"draws noise, but with PFGM\(.*not normal"):
        fs.plan(solver, PFGM(), 30)


def test_refusals():
    with pytest.raises(ValueError, match="there is no score"):
        fs.Denoiser(lambda x, t: x, PFGM(), "score")
    for D in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="D ="):
            PFGM(D=D)
    with pytest.raises(ValueError, match="sigma_min"):
        PFGM(2.0, 1.0)
    assert np.isclose(PFGM(D=4).radius(3.0), 6.0)
