"""deepinv's denoisers and ours in each other's place, and its physics in our samplers.

Most of it needs no deepinv: `fewstep.deepinv` imports none either. The tests with its real package
are at the end.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
import fewstep.deepinv as fd
import peers
from fewstep import exact

PROCESSES = [fs.VP(), fs.Flow(), fs.EDM(), fs.DiscreteVP.linear()]
#: A Gaussian of independent elements, in [-1, 1] as models have it
MEAN, STD = np.array([[0.2, -0.3, 0.5]]), 0.4


def gaussian() -> exact.Gaussian:
    return exact.Gaussian(MEAN, STD**2)


class Mask:
    """A physics in four lines: the first and the last element are seen. A A^T = 1."""

    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)

    def A(self, u):
        return u * self.mask.to(u)

    A_dagger = A

    def prox_l2(self, z, y, gamma):
        return (z + gamma * self.mask.to(z) * y) / (1 + gamma * self.mask.to(z))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("predicts", ["noise", "data", "v"])
def test_a_model_as_their_denoiser(process, predicts):
    """E[u | x] for u normal, in [0, 1]: a number, one per sample, and axes behind it."""
    denoiser = fd.Denoiser(gaussian().denoiser(process, predicts))
    mean, variance = torch.tensor((MEAN + 1) / 2), (STD / 2) ** 2
    x = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.01, 0.1, 1.0, 20.0], dtype=torch.float64)
    if process.integer_times:  # only the levels of the table are exact
        levels = torch.as_tensor(process.level(np.array([2.0, 90, 500, 950])).rho) / 2
    weight = (variance / (variance + levels**2)).reshape(-1, 1, 1)
    want = mean + weight * (x - mean)
    for sigma in (levels, levels.reshape(-1, 1, 1), levels.tolist()):
        assert torch.allclose(denoiser(x, sigma), want, rtol=1e-6, atol=1e-7)
    for k, sigma in enumerate(levels):
        for number in (float(sigma), sigma):
            assert torch.allclose(denoiser(x, number)[k], want[k], rtol=1e-6, atol=1e-7)
    assert torch.equal(denoiser(x, 0.0), x)
    mixed = denoiser(x, torch.tensor([0.0, 0.1, 0.0, 0.1]))
    assert torch.equal(mixed[::2], x[::2])
    assert not torch.equal(mixed[1::2], x[1::2])


def test_their_denoiser_as_a_model_and_back():
    model = gaussian().denoiser(fs.EDM(), "data")
    there = fd.model(fd.Denoiser(model), dtype=None)
    for solver in ("ddim", "dpmpp_2m"):
        runs = [
            fs.sample(m, (5, 1, 3), solver=solver, nfe=7, dtype=torch.float64)
            for m in (model, there)
        ]
        assert torch.allclose(*runs, rtol=1e-6, atol=1e-7)
    told: list[tuple[torch.Tensor, torch.Tensor]] = []

    def denoiser(x, sigma, flavour):
        told.append((x, sigma))
        return x

    x = torch.full((2, 1, 3), 3.0)
    fd.model(denoiser, sigma_max=2.0)(x, 0.5, flavour="sweet")
    assert torch.equal(told[0][0], torch.full_like(x, 2.0))  # [-1, 1] to [0, 1]
    assert torch.equal(told[0][1], torch.full((2,), 0.25))
    fd.model(denoiser, data_range=(0.0, 1.0))(x, 0.5, flavour="sour")
    assert torch.equal(told[1][0], x)
    assert torch.equal(told[1][1], torch.full((2,), 0.5))


def test_denoiser_parameters_conditions_and_gradients():
    network = torch.nn.Linear(3, 3)
    model = fs.Denoiser(lambda x, t, add=0.0: network(x) + add, fs.VP())
    assert list(fd.Denoiser(model).parameters()) == []  # a function has none
    model = fs.Denoiser(network_of := _Adds(network), fs.VP())
    denoiser = fd.Denoiser(fs.Guided(model, 2.0, {"add": 0.0}), cond={"add": torch.ones(2, 1)})
    assert set(denoiser.parameters()) == set(network_of.parameters())
    x = torch.randn(2, 3, requires_grad=True)
    assert not torch.equal(denoiser(x, 0.3), denoiser(x, 0.3, add=torch.zeros(2, 1)))
    denoiser(x, 0.3).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0


class _Adds(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t, add=0.0):
        return self.inner(x) + add


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "flow_ipndm_2", "dpmpp_3m", "er_sde_2"])
def test_consistent_samples_fit_the_measurements(solver):
    physics, model = Mask(), gaussian().denoiser(fs.VP(), "noise")
    u = torch.rand(4, 1, 3, dtype=torch.float64)
    y = physics.A(u)
    hook = fd.consistent(physics, y)
    x = fs.sample(model, u.shape, solver=solver, nfe=8, hook=hook, dtype=torch.float64)
    assert torch.allclose(physics.A((x + 1) / 2), y, atol=1e-12)
    free = fs.sample(model, u.shape, solver=solver, nfe=8, dtype=torch.float64)
    assert torch.allclose(x[..., 1], free[..., 1])  # elements are independent: unseen, unchanged
    inside = fd.consistent(physics, y, data_range=(0.0, 1.0))
    assert torch.allclose(physics.A(inside(u + 1, fs.VP().level(0.5))), y, atol=1e-12)


def test_proximal_is_the_minimum():
    physics, level = Mask(), fs.VP().level(0.4)
    D = torch.randn(2, 1, 3, dtype=torch.float64).requires_grad_(True)
    y = physics.A(torch.rand(2, 1, 3, dtype=torch.float64))
    found = fd.proximal(physics, y, 0.1, weight=2.0)(D, level).detach().requires_grad_(True)
    u, anchor, rho = (found + 1) / 2, (D.detach() + 1) / 2, level.rho / 2
    cost = (physics.A(u) - y).square().sum() / 0.02 + (u - anchor).square().sum() / rho**2
    (slope,) = torch.autograd.grad(cost, found)
    assert slope.abs().max() < 1e-12
    several = fs.VP().level(np.array([0.4, 0.4]))  # one level per sample
    again = fd.proximal(physics, y, 0.1, weight=2.0)(D.detach(), several)
    assert torch.allclose(again, found.detach())


@pytest.mark.parametrize("predicts", ["noise", "data", "v", "flow"])
@pytest.mark.parametrize("process", [fs.VP(), fs.Flow(), fs.EDM()], ids=repr)
def test_posterior_is_exact_for_normal_data(process, predicts):
    """E[x_0 | x_t, y]: precisions add up, of the prior, of x_t and of y."""
    physics, noise = Mask(), 0.07
    y = physics.A(torch.rand(4, 1, 3, dtype=torch.float64))
    model = fd.posterior(gaussian().denoiser(process, predicts), physics, y, noise, std=STD / 2)
    t = np.array([0.1, 0.3, 0.6, 0.9])
    level = process.level(t)
    alpha, sigma = (torch.as_tensor(v).reshape(-1, 1, 1) for v in (level.alpha, level.sigma))
    x = torch.randn(4, 1, 3, dtype=torch.float64)
    seen = physics.mask / (2 * noise) ** 2  # y is of (x_0 + 1) / 2
    precision = 1 / STD**2 + alpha**2 / sigma**2 + seen
    want = (torch.tensor(MEAN) / STD**2 + alpha / sigma**2 * x + seen * (2 * y - 1)) / precision
    assert torch.allclose(model(x, t), want, rtol=1e-6, atol=1e-6)
    assert torch.allclose(model(x[:2].repeat(2, 1, 1), 0.3)[1], model(x, 0.3)[1])


def test_posterior_samples_have_the_moments():
    physics, noise, n = Mask(), 0.1, 4000
    y = physics.A(torch.tensor([[[0.9, 0.0, 0.2]]], dtype=torch.float64)).expand(n, 1, 3)
    model = fd.posterior(gaussian().denoiser(fs.VP(), "noise"), physics, y, noise, std=STD / 2)
    x = fs.sample(model, (n, 1, 3), solver="dpmpp_2m", grid="softened", nfe=30, dtype=torch.float64)
    seen = physics.mask / (2 * noise) ** 2
    precision = 1 / STD**2 + seen
    mean = (torch.tensor(MEAN) / STD**2 + seen * (2 * y[0] - 1)) / precision
    assert torch.allclose(x.mean(0), mean, atol=4 * STD / n**0.5)
    assert torch.allclose(x.var(0), 1 / precision, rtol=0.1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: fd.model(None), "denoiser = None is not callable"),  # pyright: ignore
        (lambda: fd.consistent(Mask(), torch.zeros(1), data_range=(1, 1)), "data_range = "),
        (lambda: fd.proximal(Mask(), torch.zeros(1), 0.0), "sigma = 0.0"),
        (lambda: fd.posterior(gaussian().denoiser(fs.VP()), Mask(), torch.zeros(1), -1), "sigma"),
        (lambda: fd.Denoiser(gaussian().denoiser(fs.VP()))(torch.zeros(2, 1, 3), [1.0] * 3), "one"),
        (lambda: fd.Denoiser(gaussian().denoiser(fs.VP()))(torch.zeros(2, 1, 3), -1.0), ">= 0"),
    ],
)
def test_mistakes(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ------------------------------------------------------------------- with the real package


@pytest.fixture(scope="module")
def deepinv():
    return peers.deepinv()


@pytest.fixture(scope="module")
def digits():
    """Digits of the exact model, in [0, 1], a mask that hides a third of them, and the model."""
    model = exact.digits()
    x = fs.sample(model.denoiser(fs.EDM()), (3, 1, 8, 8), nfe=20, seed=4)
    seen = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) > 1 / 3
    return (x + 1) / 2, seen.float(), model


def error(u, v):
    return float((u - v).square().mean().sqrt())


def test_its_physics_in_our_samplers(deepinv, digits):
    u, mask, model = digits
    denoiser = model.denoiser(fs.EDM())
    nothing = (fs.sample(denoiser, u.shape, nfe=10) + 1) / 2
    blur = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]])  # condition 5
    for physics in (
        deepinv.physics.Inpainting((1, 8, 8), mask=mask),
        deepinv.physics.Downsampling((1, 8, 8), factor=2, filter=blur[None, None]),
        deepinv.physics.Blur(blur[None, None], padding="circular"),
    ):
        y = physics.A(u)
        runs = [
            (denoiser, fd.consistent(physics, y), 2e-4),
            (denoiser, fd.proximal(physics, y, 0.01), 0.02),
            (fd.posterior(denoiser, physics, y, 0.05, std=0.4), None, error(physics.A(nothing), y)),
        ]
        for one, hook, fit in runs:
            x = (fs.sample(one, u.shape, nfe=16, hook=hook) + 1) / 2
            assert error(physics.A(x), y) < fit, physics
            assert error(x, u) < error(nothing, u), physics


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DiffPIR", "DPS", "HQS"])
def test_our_model_in_its_algorithms(deepinv, digits, name):
    """The same as with the exact denoiser, written by hand in deepinv's convention."""
    u, mask, model = digits

    class ByHand(deepinv.models.Denoiser):
        def forward(self, x, sigma, **_):
            sigma = torch.as_tensor(sigma).reshape(-1).double().numpy()
            return (model.predict(2 * x - 1, 1.0, 2 * sigma)[0] + 1) / 2

    physics = deepinv.physics.Inpainting((1, 8, 8), mask=mask)
    y = physics(u)
    fidelity = deepinv.optim.L2()
    results = []
    for denoiser in (fd.Denoiser(model.denoiser(fs.VP(), "noise")), ByHand()):
        if name == "DiffPIR":
            run = deepinv.sampling.DiffPIR(denoiser, fidelity, sigma=0.02, max_iter=20)
        elif name == "DPS":
            run = deepinv.sampling.DPS(denoiser, num_steps=30, solver="ddim", weight=2.0)
        else:
            run = deepinv.optim.optim_builder(
                "HQS",
                prior=deepinv.optim.PnP(denoiser),
                data_fidelity=fidelity,
                max_iter=8,
                params_algo={"stepsize": 1.0, "g_param": np.geomspace(0.5, 0.02, 8).tolist()},
            )
        torch.manual_seed(1)
        results.append(run(y, physics))
    assert error(*results) < 1e-4
    assert error(results[0], u) < error(y, u)


@pytest.mark.filterwarnings("ignore")
def test_our_model_in_its_ode_sampler_is_exact(deepinv):
    """deepinv's Heun on the probability flow, from its own starting noise: the closed form."""
    model = gaussian()
    sde = deepinv.sampling.VarianceExplodingDiffusion(
        alpha=0.0,
        sigma_min=0.02,
        sigma_max=20.0,
        denoiser=fd.Denoiser(model.denoiser(fs.VP(), "noise")),
        solver=deepinv.sampling.HeunSolver(timesteps=torch.linspace(1, 0, 150)),
    )
    x = torch.randn(3, 1, 3, dtype=torch.float64) * 20
    start, end = (float(sde.sigma_t(t)) for t in (1.0, 0.0))
    want = (model.solve(x, (1.0, start), (1.0, end)) + 1) / 2
    got = sde.sample(x.clone())
    assert (got - want).abs().max() < 2e-3


def test_its_denoiser_in_our_sampler(deepinv):
    torch.manual_seed(0)
    drunet = deepinv.models.DRUNet(1, 1, nc=[4, 4, 4, 4], nb=1, pretrained=None).eval()
    model = fd.model(drunet, sigma_min=0.01, sigma_max=0.4)
    assert model.device == torch.device("cpu")
    assert len(list(model.network.parameters())) == len(list(drunet.parameters()))
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        want = 2 * drunet((x + 1) / 2, 0.1) - 1
        assert torch.allclose(model(x, 0.2), want, atol=1e-6)
    noisy = x + 0.3 * torch.randn_like(x)
    told = []
    drunet.register_forward_pre_hook(lambda _, given: told.append(float(given[1][0])))
    fs.sample(model, x=noisy, start={"sigma": 0.3}, nfe=3)
    assert told[0] == pytest.approx(0.15)
    assert len(told) == 3
