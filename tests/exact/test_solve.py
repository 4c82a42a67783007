"""The exact ODE solution against closed forms, other integrators and its own symmetries."""

import builtins
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from fewstep.exact import Empirical, Gaussian, Mixture, digits

NOISE, CLEAN = (0.0, 1.0), (1.0, 0.0)
FLOW = (0.9, 0.1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def parameters() -> tuple[torch.Tensor, torch.Tensor]:
    a = normal(4, 4, seed=1)
    return normal(2, 2, seed=2), 0.1 * a @ a.T + 1e-4 * torch.eye(4, dtype=torch.float64)


def mixture() -> Mixture:
    covs = [0.05 * torch.eye(3, dtype=torch.float64), 0.01, torch.tensor([0.3, 0.04, 0.002])]
    return Mixture([0.5, 0.3, 0.2], normal(3, 3, seed=3), covs, labels=[0, 1, 1])


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert one.dtype == torch.float64
    scale = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("start", "end"),
    [(NOISE, CLEAN), (CLEAN, NOISE), ((1.0, 80.0), (1.0, 0.002)), ((0.5, 0.5), (0.9, 0.2))],
)
def test_gaussian_agrees_with_integration(start: tuple[float, float], end: tuple[float, float]):
    mean, cov = parameters()
    x = start[0] * mean + math.hypot(start[0] * 0.5, start[1]) * normal(3, 2, 2)
    model = Gaussian(mean, cov)
    y = model.solve(x, start, end)
    close(Mixture([1.0], mean[None], cov[None]).solve(x, start, end), y)
    close(model.solve(y, end, start), x, 1e-12)


def test_gaussian_maps_noise_to_data_and_back_to_pure_noise():
    mean, cov = parameters()
    e, v = torch.linalg.eigh(cov)
    z = normal(3, 2, 2)
    expected = mean + (z.flatten(1) @ (v * e.sqrt()) @ v.T).view_as(z)
    close(Gaussian(mean, cov).solve(z, NOISE, CLEAN), expected, 1e-13)
    close(Gaussian(mean, 0.0).solve(z, NOISE, CLEAN), mean.expand_as(z), 1e-15)


def test_one_dimension_follows_quantiles():
    """In one dimension the ODE keeps the cumulative probability, here evaluated by mpmath."""
    parts = [(0.3, -0.7, 0.01), (0.7, 0.5, 0.09)]
    model = Mixture(*zip(*parts, strict=True))
    start, end = (0.6, 0.8), (1.0, 0.0)
    x = torch.tensor([-1.5, -0.4, 0.2, 1.3], dtype=torch.float64)
    y = model.solve(x, start, end)

    def probability(v: float, alpha: float, sigma: float):
        return mpmath.fsum(
            w * mpmath.ncdf((v - alpha * m) / mpmath.sqrt(alpha**2 * c + sigma**2))
            for w, m, c in parts
        )

    for before, after, density in zip(x, y, model.log_density(y, *end), strict=True):
        excess = probability(float(after), *end) - probability(float(before), *start)
        assert abs(float(excess) / math.exp(density)) < 1e-10


def test_agrees_with_another_method_in_another_variable():
    model = mixture()
    x = 5.0 * normal(3, 3, seed=4)

    def slope(log_rho: float, y: np.ndarray) -> np.ndarray:
        rho = math.exp(log_rho)
        eps = model.predict(torch.from_numpy(y).view(1, 3), 1.0, rho)[1]
        return rho * eps.numpy()[0]

    span = (math.log(5.0), math.log(0.01))
    ends = [solve_ivp(slope, span, row, "LSODA", rtol=1e-13, atol=1e-14).y[:, -1] for row in x]
    close(model.solve(x, (1.0, 5.0), (1.0, 0.01)), torch.tensor(np.array(ends)), 1e-9)


@pytest.mark.parametrize("model", [mixture(), Empirical(normal(30, 3, seed=6), 0.1)])
def test_path_change_and_return(model: Mixture | Empirical):
    """Flow, variance-preserving and variance-exploding levels of one rho are one ODE."""
    z = normal(2, 3, seed=7)
    flow = model.solve(z, NOISE, FLOW)
    norm, rho = math.hypot(*FLOW), FLOW[1] / FLOW[0]
    close(model.solve(z, NOISE, (FLOW[0] / norm, FLOW[1] / norm)) * norm, flow, 1e-13)
    close(model.solve(z, NOISE, (1.0, rho)) * FLOW[0], flow, 1e-13)
    data = model.solve(flow, FLOW, CLEAN)
    close(model.solve(3 / FLOW[0] * flow, (3.0, 3 * rho), CLEAN), data, 1e-13)
    close(model.solve(z, NOISE, CLEAN), data)  # two steps are one
    close(model.solve(data, CLEAN, NOISE), z)  # and back
    torch.testing.assert_close(model.solve(z, FLOW, FLOW), z)


def test_digits_there_and_back():
    model = digits()
    label = torch.tensor([3, -1])
    x = 80 * normal(2, 1, 8, 8)
    for end in ((1.0, 0.002), CLEAN):
        y = model.solve(x, (1.0, 80.0), end, label=label)
        close(model.solve(y, end, (1.0, 80.0), label=label), x)
    assert float(model.log_density(y, *CLEAN, label=label).min()) > 0


def test_sample_does_not_depend_on_its_batch():
    model, z = mixture(), normal(4, 3)
    torch.testing.assert_close(
        model.solve(z, NOISE, CLEAN, label=[0, 1, -1, 0])[1:2],
        model.solve(z[1:2], NOISE, CLEAN, label=1),
        rtol=0,
        atol=0,
    )
    assert model.solve(z[:0], NOISE, CLEAN).shape == (0, 3)


def test_bandwidth_zero_reaches_small_sigma():
    points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    y = Empirical(points, 0.0).solve(torch.tensor([[0.3]]), NOISE, (1.0, 1e-6))
    assert abs(float(y) - 1) < 1e-5
    y = Empirical(points[:1], 0.0).solve(torch.tensor([[0.3]]), NOISE, (1.0, 0.5))
    assert float(y) == pytest.approx(-1 + 0.5 * 0.3, abs=1e-7)


def test_missing_scipy_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    actual = builtins.__import__

    def without_scipy(name: str, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return actual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r'pip install "fewstep\[exact\]"'):
        mixture().solve(normal(1, 3), NOISE, CLEAN)
    Gaussian([0.0], 1.0).solve(normal(1, 1), NOISE, CLEAN)
