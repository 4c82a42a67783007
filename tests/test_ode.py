"""The probability-flow ODE: derivatives, solutions by other libraries, ends."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import fewstep as fs
from fewstep import exact
from fewstep._ode import _rates, probability_flow
from problems import PROCESSES

#: Derivatives of the processes that users bring.
OWN = {
    "custom": lambda t: (
        -0.5 * math.pi * math.sin(math.pi * t),
        0.5 * math.pi * math.cos(0.5 * math.pi * t),
    ),
    "custom, time reversed": lambda t: (1.0, -1.0),
    "custom, scalar functions, no clean end": lambda t: (-math.exp(-t), 0.5 / math.sqrt(t)),
}


def continuous(process: fs.Process, gaussian: exact.Gaussian, predicts: str = "data") -> fs.Model:
    found = gaussian.denoiser(process, predicts)
    return fs.Denoiser(found.network, process, predicts, integer_times=False)


@pytest.fixture(scope="module")
def gaussian() -> exact.Gaussian:
    rng = np.random.default_rng(3)
    return exact.Gaussian(rng.normal(size=(2, 3)) * 0.3, rng.uniform(0.1, 0.9, size=(2, 3)))


@pytest.mark.parametrize("name", PROCESSES)
def test_rates_are_the_derivatives(name):
    process = PROCESSES[name]
    rates = OWN[name] if name in OWN else _rates(process)
    for u in np.linspace(0.02, 0.98, 25):
        t = process.t_end + u * (process.t_start - process.t_end)
        h = 1e-4 * abs(process.t_start - process.t_end)
        if isinstance(process, fs.DiscreteVP):  # between the knots, where it is smooth
            t, h = math.floor(t) + 0.5, 0.02
        for got, f in zip(rates(t), (process.alpha, process.sigma), strict=True):
            near, far = (float(f(t + k * h) - f(t - k * h)) for k in (1, 2))
            want = (8 * near - far) / (12 * h)
            assert got == pytest.approx(want, rel=2e-6, abs=1e-9), t


@pytest.mark.parametrize(
    ("name", "clock"),
    [
        *((name, clock) for name in PROCESSES for clock in ("t", "lambda")),
        *((name, "rho") for name in ("vp", "linear table", "edm", "flow")),
    ],
)
def test_scipy_reaches_the_exact_solution(name, clock, gaussian):
    process = PROCESSES[name]
    f = probability_flow(continuous(process, gaussian), clock, rates=OWN.get(name))
    start, end = f.span
    if not math.isfinite(start):
        with pytest.raises(ValueError, match="alpha = 0"):
            f(start, torch.zeros(1, 2, 3))
        start = f.at(process.t_start + 0.01 * (process.t_end - process.t_start))
    stops = [start, end]
    if isinstance(process, fs.DiscreteVP) and clock == "t":
        # dx/dt jumps at every index (dx/d lambda does not): from one to the next
        if len(process.log_alphas) > 100:
            start, end = stops = [500.0, 497.0]
        stops = np.arange(start, end - 1, -1).tolist()
    first, last = (process.level(f.time(s)) for s in (start, end))
    x = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * math.hypot(first.alpha, first.sigma)
    y = x.numpy().ravel()
    inside = 1e-9 if len(stops) > 2 else 0.0
    for s, e in itertools.pairwise(stops):
        got = solve_ivp(
            f.flat(x.shape), (s - inside, e + inside), y, "DOP853", rtol=1e-8, atol=1e-10
        )
        assert got.success
        y = got.y[:, -1]
    want = gaussian.solve(x, (first.alpha, first.sigma), (last.alpha, last.sigma))
    assert np.abs(y - want.numpy().ravel()).max() < 1e-6


def test_the_samplers_converge_to_it():
    """A mixture, from noise to the least noise: many steps of a sampler, and DOP853."""
    model = exact.Mixture([0.4, 0.6], [[0.5, -0.4], [-0.6, 0.3]], [0.02, 0.05]).denoiser(
        fs.VP(), "noise"
    )
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f = probability_flow(model, "lambda")
    got = (
        solve_ivp(
            f.flat(x.shape), f.span, x.numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-11
        )
        .y[:, -1]
        .reshape(3, 2)
    )
    errors = []
    for nfe in (64, 128):
        run = fs.plan("dpmpp_3m", model, nfe, grid="lambda", final="min")
        errors.append(np.abs(fs.sample(model, x=x, solver=run).numpy() - got).max())
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 5  # third order: 8


@pytest.mark.parametrize("predicts", ["noise", "data", "v", "flow", "score", "edm"])
def test_every_prediction_is_the_same_ode(predicts, gaussian):
    x = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = [
        probability_flow(continuous(process, gaussian, p))(t, x)
        for process, t in ((fs.VP(), 0.3), (fs.Flow(), 0.7))
        for p in (predicts, "data")
    ]
    for got, want in (values[:2], values[2:]):
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-12)
    if predicts == "flow":  # where the velocity is the answer
        network = continuous(fs.Flow(), gaussian, "flow").network
        want = network(x, torch.full((2,), 0.7, dtype=x.dtype))
        assert torch.allclose(values[2], want, rtol=1e-14)


def test_ends(gaussian):
    flow = continuous(fs.Flow(), gaussian, "flow")
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    f = probability_flow(flow)
    at_noise = f(torch.tensor(1.0), x)  # alpha = 0 is no trouble in time
    assert torch.allclose(at_noise, x - torch.as_tensor(gaussian._components.centre).view(2, 3))
    with pytest.raises(ValueError, match="sigma = 0"):
        f(0.0, x)
    with pytest.raises(ValueError, match="rho = 0"):
        probability_flow(flow, "rho")(0.0, x)
    for process in (fs.VP(), fs.CosineVP(), fs.EDM(), fs.Flow()):  # past the clean end
        with pytest.raises(ValueError, match="sigma = "):
            probability_flow(continuous(process, gaussian, "data"))(-0.01, x)
    # float32 next to the clean end: nothing is divided by sigma for a network that predicts noise
    vp = probability_flow(continuous(fs.VP(), gaussian, "noise"), "rho")
    fine = vp(1e-6, x)
    assert torch.allclose(vp(1e-6, x.float()).double(), fine, rtol=1e-4, atol=1e-5)


def test_conditions_and_the_forms_of_other_libraries():
    def network(x, t, shift=0.0):
        return x * 0.1 + shift

    model = fs.Denoiser(network, fs.Flow(), "flow")
    x = torch.ones(2, 3)
    f = probability_flow(model, cond={"shift": 1.0})
    assert torch.equal(f(0.5, x), network(x, None, 1.0))
    assert torch.equal(f(torch.tensor(0.5), x, {"shift": 2.0}), network(x, None, 2.0))
    assert torch.equal(f(0.5, x, None), f(0.5, x))
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(f(0.5, x).sum(), x)
    assert torch.allclose(slope, torch.full_like(x, 0.1))
    guided = fs.Guided(model, 3.0, {"shift": 0.0})
    shift = {"shift": torch.ones(2, 1)}
    assert torch.allclose(probability_flow(guided, cond=shift)(0.5, x), network(x, None, 3.0))


def test_torchdiffeq(gaussian):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    process = fs.VP()
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = probability_flow(continuous(process, gaussian, "noise"), "lambda")
    times = torch.tensor(f.span, dtype=torch.float64)
    got = torchdiffeq.odeint(f, x, times, method="dopri5", rtol=1e-8, atol=1e-10)[-1]
    levels = (process.level(process.t_start), process.level(process.t_end))
    want = gaussian.solve(x, *((v.alpha, v.sigma) for v in levels))
    assert (got - want).abs().max() < 1e-6
    past = probability_flow(continuous(fs.EDM(), gaussian))  # it asks beyond the end, at sigma < 0
    with pytest.raises(ValueError, match="use clock = 'lambda'"):
        torchdiffeq.odeint(past, 80 * x, torch.tensor(past.span), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: probability_flow(torch.nn.Identity()), "give a fewstep.Denoiser"),  # pyright: ignore
        (lambda: probability_flow(fs.Denoiser(abs, fs.VP()), "lamda"), "did you mean 'lambda'"),
        (
            lambda: probability_flow(fs.Denoiser(abs, fs.DiscreteVP.linear())),
            "integer_times=False",
        ),
        (lambda: probability_flow(fs.Denoiser(abs, PROCESSES["custom"])), "rates is missing"),
    ],
)
def test_mistakes(build, words):
    with pytest.raises(ValueError, match=words):
        build()
