"""Analytic beginnings: exact for Gaussian data, budgets kept, any basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._basis import Cosine, Identity
from problems import PROCESSES

MEAN = np.array([[[0.3, -0.2], [0.1, 0.4]]])
#: mean and scales by kind of plan: one number, one per element, one per mode
GAUSSIANS = {
    "number": (0.5, None, None),
    "unit": (1.0, None, None),
    "mean": (0.5, MEAN, None),
    "elements": (np.array([[[0.1, 0.2], [0.5, 1.3]]]), None, None),
    "modes": (np.array([[[1.1, 0.4], [0.3, 0.0]]]), None, Cosine(mean=MEAN)),
}


def model_of(process, std, mean, basis):
    """The exact network of this Gaussian."""
    basis = basis or Identity(mean=mean)
    mu = torch.zeros(()) if basis.mean is None else torch.tensor(basis.mean)

    def network(x, t):
        level = process.level(float(t[0]))
        g = level.alpha * np.square(std) / (level.alpha**2 * np.square(std) + level.sigma**2)
        return mu + basis.inverse(torch.as_tensor(g) * basis.forward(x - level.alpha * mu))

    return fs.Denoiser(network, process, "data")


@pytest.mark.parametrize("kind", GAUSSIANS)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "zero terminal SNR", "custom"])
def test_it_is_what_the_network_of_a_gaussian_says(name, kind):
    """First step: the run is that of the plan with one evaluation more. Skip: the state there has
    the exact solution of the ODE, so that the run is that of a plan that starts from it."""
    process = PROCESSES[name]
    std, mean, basis = GAUSSIANS[kind]
    model = model_of(process, std, mean, basis)
    final = "min" if process.t_clean is None else "zero"
    z = fs.start_noise((2, 1, 2, 2), 0, dtype=torch.float64)
    x = z * process.prior_std(process.t_start)
    given = {"std": std, "mean": mean, "basis": basis}
    run = fs.begin_analytically("flow_ab2", model, 4, final=final, **given)
    assert run.nfe == 4
    assert run.calls[0] is None
    full = fs.plan("flow_ab2", model, 5, final=final)
    got = fs.sample(model, x=x, solver=run)
    torch.testing.assert_close(got, fs.sample(model, x=x, solver=full), rtol=1e-9, atol=1e-11)

    start = {"rho": 3.0}
    later = fs.plan("flow_ab2", model, 4, start=start, final=final)
    s, t = process.level(process.t_start), later.levels[0]
    mapped = basis or Identity(mean=mean)
    mu = torch.zeros(()) if mapped.mean is None else torch.tensor(mapped.mean)
    c = np.asarray(std)
    k = np.hypot(t.alpha * c, t.sigma) / np.hypot(s.alpha * c, s.sigma)
    there = mapped.inverse(torch.as_tensor(k) * mapped.forward(x - s.alpha * mu)) + t.alpha * mu
    want = fs.sample(model, x=there, solver=later)
    run = fs.begin_analytically("flow_ab2", model, 4, skip=start, first=False, final=final, **given)
    assert run.nfe == 4
    got = fs.sample(model, x=z * run.prior_std, solver=run)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert run.evaluations == later.evaluations

    both = fs.begin_analytically("flow_ab2", model, 4, skip=start, final=final, **given)
    assert both.nfe == 4
    got = fs.sample(model, x=z * both.prior_std, solver=both)
    later = fs.plan("flow_ab2", model, 5, start=start, final=final)
    want = fs.sample(model, x=there, solver=later)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", list(fs.solvers))
def test_budgets_fusion_and_files(solver, tmp_path):
    """nfe is what is spent, for every solver and budget; plans run from noise, fuse, are kept."""
    process = fs.EDM()
    calls = []

    def network(x, t):
        calls.append(t)
        return torch.tanh(3 * x / (1 + t.reshape(-1, 1, 1, 1) ** 2))

    model = fs.Denoiser(network, process, "data", time="rho")
    for kind in ("number", "modes"):
        std, mean, basis = GAUSSIANS[kind]
        taken = fs.plan(solver, model, 5)
        if basis is not None and taken.basis is not None:
            with pytest.raises(ValueError, match="acts on"):
                fs.begin_analytically(solver, model, 5, std=std, basis=basis)
            continue
        for nfe in (1, 2, 5):
            for skip, first in (({"rho": 4.0}, True), ({"rho": 4.0}, False), (None, True)):
                run = fs.begin_analytically(
                    solver, model, nfe, std=std, mean=mean, basis=basis, skip=skip, first=first
                )
                calls.clear()
                options = {"seed": 1, "dtype": torch.float64}
                plain = fs.sample(model, (2, 1, 2, 2), solver=run, **options)
                assert len(calls) == run.nfe == nfe
                fused = fs.sample(model, (2, 1, 2, 2), solver=run.fuse(), **options)
                torch.testing.assert_close(plain, fused, rtol=1e-8, atol=1e-8)
                run.save(tmp_path / "plan")
                assert fs.Plan.load(tmp_path / "plan") == run


def test_the_slope_of_other_code():
    """AMED's x / sqrt(1 + sigma^2) is c^2 = 1/2 to leading order; USF's is c = 0."""
    x, sigma = 2.0, 80.0
    level = fs.EDM().level(sigma)

    def slope(c2):
        return (x - level.alpha * c2 / (level.alpha**2 * c2 + sigma**2) * x) / sigma

    amed = x / np.sqrt(1 + sigma**2)
    assert abs(slope(0.5) - amed) < 1e-3 * abs(slope(1.0) - amed)
    run = fs.analytic_first(fs.plan("ddim", fs.EDM(), 3), std=0.0)
    assert run.rows[0].a[0] == pytest.approx(run.levels[1].sigma / 80.0, rel=1e-12)


def test_samples_start_with_the_spread_of_the_data():
    """Where the mean and the modes are those of the data, what the network is first asked about
    has mean alpha mu and covariance alpha^2 C + sigma^2: the Analytic-Init of arXiv 2406.15735."""
    std, _, basis = GAUSSIANS["modes"]
    process = fs.VP()
    run = fs.begin_analytically(
        "ddim", process, 2, std=std, basis=basis, skip={"rho": 0.5}, first=False
    )
    z = fs.start_noise((20000, 1, 2, 2), 0, dtype=torch.float64)
    state = run.start(z * run.prior_std)
    level = run.evaluations[0]
    modes = basis.forward(state.x - level.alpha * torch.from_numpy(MEAN))
    want = torch.from_numpy(np.hypot(level.alpha * std, level.sigma))[0]
    torch.testing.assert_close(modes.std(0)[0], want, rtol=0.03, atol=0.0)
    assert float(modes.mean(0).abs().max()) < 0.03


def test_refusals():
    process = fs.EDM()
    run = fs.plan("ddim", process, 3)
    with pytest.raises(ValueError, match="nothing would be analytic"):
        fs.begin_analytically("ddim", process, 3, std=0.5, first=False)
    with pytest.raises(ValueError, match="give a process"):
        fs.begin_analytically("ddim", None, 3, std=0.5)
    with pytest.raises(ValueError, match="nfe = 0"):
        fs.begin_analytically("ddim", process, 0, std=0.5)
    with pytest.raises(ValueError, match="std = -1"):
        fs.begin_analytically("ddim", process, 3, std=-1.0)
    with pytest.raises(ValueError, match="both given"):
        fs.begin_analytically("ddim", process, 3, std=0.5, mean=0.1, basis=Identity())
    with pytest.raises(ValueError, match="unfused"):
        fs.analytic_first(run.fuse(), 0.5)
    with pytest.raises(ValueError, match="one evaluation"):
        fs.analytic_first(fs.plan("ddim", process, 1), 0.5)
    with pytest.raises(ValueError, match="analytic first step already"):
        fs.analytic_first(fs.analytic_first(run, 0.5), 0.5)
    with pytest.raises(ValueError, match="nfe = 0"):
        fs.begin_analytically("ddim", process, 0, std=0.5, first=False, skip={"rho": 3.0})
