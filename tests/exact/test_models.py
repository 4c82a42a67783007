"""The exact models against the definitions, against each other, and at both ends."""

import math

import numpy as np
import pytest
import torch

from fewstep.exact import Empirical, ExactModel, Gaussian, Mixture, digits, patches

LEVELS = [(1.0, 0.02), (0.8, 0.6), (0.3, 0.7), (0.01, 1.0), (1.0, 80.0)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def covariance(d: int, seed: int) -> torch.Tensor:
    a = normal(d, d, seed=seed)
    return 0.1 * a @ a.T / d + 0.01 * torch.eye(d, dtype=torch.float64)


def mixture(labels: bool = False) -> Mixture:
    means = normal(3, 2, 2, seed=5)
    covs = [covariance(4, seed) for seed in range(3)]
    return Mixture([0.5, 0.3, 0.2], means, covs, labels=[0, 1, 1] if labels else None)


def gaussian() -> Gaussian:
    return Gaussian(normal(2, 2, seed=7), covariance(4, 8))


def empirical(labels: bool = False) -> Empirical:
    points = normal(40, 2, 3, seed=3)
    return Empirical(points, 0.2, labels=torch.arange(40) % 4 if labels else None)


MODELS = {"gaussian": gaussian, "mixture": mixture, "empirical": empirical, "digits": digits}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> ExactModel:
    return MODELS[request.param]()


def state(model: ExactModel, alpha: float, sigma: float, n: int = 5) -> torch.Tensor:
    return alpha * model.sample(n, 1) + sigma * normal(n, *model.shape, seed=2)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_predictions_add_up_to_the_state(model: ExactModel, alpha: float, sigma: float):
    x = state(model, alpha, sigma)
    data, eps = model.predict(x, alpha, sigma)
    torch.testing.assert_close(alpha * data + sigma * eps, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model.denoise(x, alpha, sigma), data, rtol=0, atol=0)
    torch.testing.assert_close(-sigma * model.score(x, alpha, sigma), eps, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("alpha", "sigma"), [*LEVELS, (1.0, 0.0), (0.7, 0.0)])
def test_score_is_the_gradient_of_log_density(model: ExactModel, alpha: float, sigma: float):
    x = state(model, alpha, sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density(x, alpha, sigma).sum(), x)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(
        model.score(x, alpha, sigma), gradient, rtol=1e-10, atol=1e-12 * scale
    )


def test_jacobian_of_the_denoiser_is_a_covariance(model: ExactModel):
    alpha, sigma = 0.8, 0.5
    x = state(model, alpha, sigma, n=1)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.denoise(v, alpha, sigma), x)
    assert isinstance(jacobian, torch.Tensor)
    jacobian = jacobian.reshape(x.numel(), x.numel())
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(jacobian).min()) > 0


def test_posterior_mean_by_quadrature():
    model = Mixture([0.3, 0.7], [-0.6, 0.9], [0.04, 0.25])
    alpha, sigma = 0.6, 0.5
    x = torch.tensor([-1.0, 0.1, 0.8], dtype=torch.float64)
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    prior = sum(
        w * torch.exp(-((grid - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
        for w, m, v in [(0.3, -0.6, 0.04), (0.7, 0.9, 0.25)]
    )
    kernel = torch.exp(-((x[:, None] - alpha * grid) ** 2) / (2 * sigma**2))
    joint = prior * kernel / math.sqrt(2 * math.pi * sigma**2)
    mass = torch.trapezoid(joint, grid)
    mean = torch.trapezoid(joint * grid, grid) / mass
    torch.testing.assert_close(model.denoise(x, alpha, sigma), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.log_density(x, alpha, sigma), mass.log(), rtol=0, atol=1e-12)


def test_covariance_forms_agree():
    mean, variances = normal(2, 3), torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    axes = torch.linalg.qr(normal(6, 6, seed=1))[0]
    dense = axes @ torch.diag(variances) @ axes.T
    pairs = [
        (dense, (variances, axes)),
        (torch.diag(variances), variances.view(2, 3)),
        (0.3 * torch.eye(6), 0.3),
    ]
    x = normal(4, 2, 3, seed=2)
    for one, other in pairs:
        a, b = Gaussian(mean, one), Gaussian(mean, other)
        assert a.std == pytest.approx(b.std, rel=1e-7)
        for left, right in zip(a.predict(x, 0.6, 0.4), b.predict(x, 0.6, 0.4), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        left, right = a.log_density(x, 0.6, 0.4), b.log_density(x, 0.6, 0.4)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_gaussian_log_density_is_torchs():
    model, cov = gaussian(), covariance(4, 8)
    x = normal(4, 2, 2)
    level_cov = 0.36 * cov + 0.16 * torch.eye(4, dtype=torch.float64)
    mean = 0.6 * normal(2, 2, seed=7).flatten()
    expected = torch.distributions.MultivariateNormal(mean, level_cov).log_prob(x.flatten(1))
    torch.testing.assert_close(model.log_density(x, 0.6, 0.4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), [*LEVELS, (1.0, 1e-9), (1.0, 0.0), (0.0, 1.0)])
def test_special_cases_agree_with_the_mixture(alpha: float, sigma: float):
    points, classes = normal(40, 2, 3, seed=3), torch.arange(40) % 4
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    pairs = [
        (gaussian(), Mixture([1.0], normal(2, 2, seed=7)[None], covariance(4, 8)[None]), None),
        (empirical(True), Mixture(weights, points, [0.04] * 40, labels=classes), [3, -1, 0, 3, 3]),
    ]
    for special, general, label in pairs:
        assert special.std == pytest.approx(general.std, rel=1e-13)
        x = state(special, alpha, sigma)
        for name in ("predict", "score", "log_density"):
            one = getattr(special, name)(x, alpha, sigma, label=label)
            other = getattr(general, name)(x, alpha, sigma, label=label)
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_label_restricts_to_one_class():
    model = empirical(labels=True)
    alone = Empirical(normal(40, 2, 3, seed=3)[2::4], 0.2)
    x = state(model, 0.7, 0.6)
    torch.testing.assert_close(model.denoise(x, 0.7, 0.6, label=2), alone.denoise(x, 0.7, 0.6))
    torch.testing.assert_close(
        model.log_density(x, 0.7, 0.6, label=2), alone.log_density(x, 0.7, 0.6)
    )
    mixed = model.denoise(x, 0.7, 0.6, label=torch.tensor([2, -1, 2, 0, 1]))
    torch.testing.assert_close(mixed[1], model.denoise(x, 0.7, 0.6)[1])
    torch.testing.assert_close(mixed[2], alone.denoise(x, 0.7, 0.6)[2])
    draws = digits(0.0).sample(20, 0, label=7)
    assert (digits().log_density(draws, 1.0, 0.0, label=7) > 20).all()


def test_ends(model: ExactModel):
    x = normal(5, *model.shape)
    data, eps = model.predict(x, 0.0, 1.0)
    torch.testing.assert_close(eps, x)
    mean = data[:1].expand_as(data)
    torch.testing.assert_close(data, mean)
    near = model.denoise(x, 1e-9, 1.0)
    torch.testing.assert_close(near, data, rtol=1e-6, atol=1e-6)
    clean = 0.7 * model.sample(5, 1)
    data, eps = model.predict(clean, 0.7, 0.0)
    torch.testing.assert_close(data, clean / 0.7)
    assert not eps.any()
    close = model.predict(clean, 0.7, 1e-12)[1] / -1e-12
    score = model.score(clean, 0.7, 0.0)
    torch.testing.assert_close(close, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_lower_precision(model: ExactModel, alpha: float, sigma: float):
    x = state(model, alpha, sigma)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
        low = x.to(dtype)
        for got, exact in zip(
            model.predict(low, alpha, sigma), model.predict(low.double(), alpha, sigma), strict=True
        ):
            assert got.dtype == dtype
            assert float((got.double() - exact).abs().max() / exact.abs().max()) < tolerance


def test_samples_do_not_depend_on_their_batch(model: ExactModel, monkeypatch: pytest.MonkeyPatch):
    alpha, sigma = torch.tensor(LEVELS, dtype=torch.float64).T
    x = alpha.view(-1, *[1] * len(model.shape)) * model.sample(5, 1)
    batch = model.predict(x, alpha, sigma)
    monkeypatch.setattr("fewstep.exact._models._CHUNK", 2 * 1797)  # blocks of two digits
    chunked = model.predict(x, alpha.numpy(), sigma.tolist())
    for i, level in enumerate(LEVELS):
        alone = model.predict(x[i : i + 1], *level)
        for one, all_, blocks in zip(alone, batch, chunked, strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(one[0], blocks[i], rtol=1e-11, atol=1e-11)
    assert model.denoise(x[:0], 1.0, 0.5).shape == x[:0].shape


def test_sample_moments():
    n = 20_000
    for model in (gaussian(), mixture(), empirical()):
        x = model.sample(n, 0)
        torch.testing.assert_close(x, model.sample(n, 0), rtol=0, atol=0)
        assert not torch.equal(x, model.sample(n, 1))
        # at sigma -> infinity the score is linear: D = mean + alpha cov (x - alpha mean) / sigma^2
        basis = 1e6 * torch.eye(x[0].numel(), dtype=torch.float64).view(-1, *model.shape)
        mean = model.denoise(0 * basis[:1], 0.0, 1.0).flatten()
        slope = model.denoise(basis, 1.0, 1e6) - model.denoise(-basis, 1.0, 1e6)
        cov = slope.flatten(1) * 1e6 / 2
        flat = x.flatten(1)
        spread = float(cov.diag().max())
        assert float((flat.mean(0) - mean).abs().max()) < 5 * math.sqrt(spread / n)
        assert float((flat.T.cov() - cov).abs().max()) < 10 * spread / math.sqrt(n)
        assert model.std == pytest.approx(math.sqrt(float(cov.diag().mean())), rel=1e-4)
    assert gaussian().sample(2, 0, dtype=torch.float32).dtype == torch.float32


def test_ready_made_models():
    assert digits().shape == (1, 8, 8)
    assert patches().shape == (1, 16, 16)
    assert digits() is digits()
    labels = digits().labels
    assert labels is not None
    assert sorted(set(labels.tolist())) == list(range(10))
    assert patches().labels is None
    for model in (digits(0.0), patches(0.0)):
        x = model.sample(50, 0)
        assert float(x.min()) == -1
        assert float(x.max()) == 1


def test_inference_mode_leaves_autograd_usable():
    model = gaussian()
    with torch.inference_mode():
        model.denoise(torch.zeros(1, 2, 2), 1.0, 1.0)
    x = torch.zeros(1, 2, 2, requires_grad=True)
    model.denoise(x, 1.0, 1.0).sum().backward()
    assert x.grad is not None


E2 = np.eye(2)
BAD = {
    "skew": (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "cov: differs from its tran"),
    "negative": (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "cov: smallest eigenvalu"),
    "number": (lambda: Gaussian([0.0, 0.0], -1.0), "cov: smallest eigenvalue -1"),
    "size": (lambda: Gaussian([0.0, 0.0], np.eye(3)), r"cov: shape \(3, 3\)"),
    "basis": (lambda: Gaussian([0.0, 0.0], (np.ones(2), 2 * E2)), "cov: eigenvalues"),
    "nan": (lambda: Gaussian([0.0, math.nan], 1.0), "mean: contains nan"),
    "weights": (lambda: Mixture([0.5, 0.6], [0.0, 1.0], [1.0, 1.0]), r"weights: \[0.5, 0.6\]"),
    "count": (lambda: Mixture([0.5, 0.5], [0.0, 1.0], [1.0]), "weights, means, covs: shape"),
    "component": (lambda: Mixture([0.5, 0.5], [0.0, 1.0], [1.0, -1.0]), r"covs\[1\]: smallest"),
    "empty": (lambda: Empirical(np.zeros((0, 2)), 0.1), r"data: shape \(0, 2\)"),
    "bandwidth": (lambda: Empirical(np.zeros((3, 2)), -0.1), "bandwidth: -0.1"),
    "labels": (lambda: Empirical(np.zeros((3, 2)), 0.1, labels=[0, 1]), "labels: torch.int64"),
    "x shape": (lambda: gaussian().denoise(torch.zeros(3, 4), 1.0, 1.0), r"x: .*\(B, 2, 2\)"),
    "x dtype": (lambda: gaussian().denoise(torch.zeros(3, 2, 2).int(), 1.0, 1.0), "x: torch.int"),
    "alpha": (lambda: gaussian().denoise(torch.zeros(3, 2, 2), np.ones(2), 1.0), "alpha: 2 values"),
    "sigma": (lambda: gaussian().predict(torch.zeros(3, 2, 2), 1.0, np.ones(2)), "sigma: 2 values"),
    "no labels": (lambda: gaussian().denoise(torch.zeros(1, 2, 2), 1, 1, label=1), "no labels"),
    "class": (lambda: digits().denoise(torch.zeros(1, 1, 8, 8), 1, 1, label=10), "label: 10;"),
    "many": (lambda: digits().denoise(torch.zeros(1, 1, 8, 8), 1, 1, label=[1, 2]), "label: 2 val"),
    "level": (lambda: mixture().solve(normal(1, 2, 2), (0.0, 0.0), (1, 0)), "start: .0.0, 0.0."),
    "point": (lambda: digits(0.0).solve(normal(1, 1, 8, 8), (0, 1), (1, 0)), "nonsingular"),
    "flat": (lambda: Gaussian([0.0], 0.0).solve(normal(1, 1), (1, 0), (0, 1)), "start: .1, 0."),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_sentence(case: str):
    act, match = BAD[case]
    with pytest.raises(ValueError, match=match) as caught:
        act()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
