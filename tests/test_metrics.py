"""Distances of samples: exact answers, brute force, and intervals that cover the truth."""

from __future__ import annotations

import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep import metrics
from fewstep.metrics import Estimate

DISTANCES = {
    "sliced": lambda x, y, **more: metrics.sliced_wasserstein(x, y, directions=16, **more),
    "energy": metrics.energy_distance,
    "mmd": metrics.mmd,
    "cubic": lambda x, y: metrics.mmd(x, y, kernel="cubic"),
    "frechet": metrics.frechet_distance,
}
PARTS = {
    name: lambda x, y, f=f, name=name, **more: getattr(f(x, y, **more), name)
    for f in (metrics.precision_recall, metrics.density_coverage)
    for name in f(np.eye(40), np.eye(40))._fields
}
ALL = DISTANCES | PARTS


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=-1)


def root(S):
    w, v = np.linalg.eigh(S)
    return (v * np.sqrt(np.maximum(w, 0))) @ v.T


# Gaussians, for which all is known


class Gaussians:
    """x ~ N(shift 1, scale^2 I), y ~ N(0, I) in d dimensions."""

    def __init__(self, d, shift, scale):
        self.d, self.shift, self.scale = d, shift, scale

    def draw(self, n, m, seed):
        rng = np.random.default_rng(seed)
        x = self.shift + self.scale * rng.normal(size=(n, self.d))
        return x, rng.normal(size=(m, self.d))

    def sliced(self):
        """z.x ~ N(shift 1.z, scale^2), and E (1.z)^2 = 1."""
        return math.sqrt(self.shift**2 + (self.scale - 1) ** 2)

    def frechet(self):
        return self.d * (self.shift**2 + (self.scale - 1) ** 2)

    def mmd(self, h):
        def mean(variance, shift):  # of the kernel, for a difference with this law
            total = h * h + variance
            return (h * h / total) ** (self.d / 2) * math.exp(-self.d * shift**2 / (2 * total))

        s = self.scale
        return mean(2 * s * s, 0) + mean(2, 0) - 2 * mean(1 + s * s, self.shift)

    def energy(self):
        """E|u| of u ~ N(shift 1, v I), by quadrature of the identity
        |u| = 1/sqrt(pi) int_0^inf (1 - exp(-t^2 |u|^2)) / t^2 dt."""

        def mean(v, shift):
            t = np.tan(np.pi / 2 * (np.arange(20_000) + 0.5) / 20_000)
            known = (1 + 2 * v * t**2) ** (-self.d / 2)
            known = known * np.exp(-self.d * shift**2 * t**2 / (1 + 2 * v * t**2))
            return float(((1 - known) / t**2 * (1 + t**2)).mean() * np.pi / 2 / np.sqrt(np.pi))

        s = self.scale
        return 2 * mean(1 + s * s, self.shift) - mean(2 * s * s, 0) - mean(2, 0)


EQUAL, DIFFERENT = Gaussians(3, 0.0, 1.0), Gaussians(3, 0.4, 1.3)
KNOWN = {
    "sliced": (
        lambda x, y, k: metrics.sliced_wasserstein(x, y, directions=48, seed=k),
        Gaussians.sliced,
    ),
    "energy": (lambda x, y, k: metrics.energy_distance(x, y), Gaussians.energy),
    "mmd": (lambda x, y, k: metrics.mmd(x, y, bandwidth=1.5), lambda g: g.mmd(1.5)),
    "frechet": (lambda x, y, k: metrics.frechet_distance(x, y, seed=k), Gaussians.frechet),
}


def simulated(name, law, runs=150, n=60, m=90):
    """Estimates from independent samples, and the truth."""
    estimate, truth = KNOWN[name]
    found = [estimate(*law.draw(n, m, seed), seed) for seed in range(runs)]
    return np.array(found), truth(law)


@pytest.mark.parametrize("name", KNOWN)
def test_no_bias_and_intervals_that_cover_the_truth(name):
    found, truth = simulated(name, DIFFERENT)
    value, low, high = found.T
    if name == "sliced":
        value, truth, low, high = value**2, truth**2, low**2, high**2
    assert abs(value.mean() - truth) < 3.5 * value.std() / math.sqrt(len(value))
    covered = ((low <= truth) & (truth <= high)).mean()
    assert 0.89 <= covered <= 0.995  # 95 %: 3 standard deviations of 150 trials, and nearly normal
    width = (high - low).mean() / 2 / 1.96
    assert 0.85 < width / value.std() < 1.25


@pytest.mark.parametrize("name", KNOWN)
def test_equal_distributions_are_at_no_distance(name):
    found, truth = simulated(name, EQUAL)
    value, low, high = found.T
    assert truth == pytest.approx(0, abs=1e-12)
    if name != "sliced":
        assert abs(value.mean()) < 3.5 * value.std() / math.sqrt(len(value))
        assert (high - low).mean() / 2 / 1.96 < 2 * value.std()
    assert (value <= 1e-9).mean() > 0.3
    assert ((low <= 1e-12) & (high >= 0)).mean() >= 0.94


def test_few_directions_widen_the_interval():
    """The distance is along one of eight axes: what is left is how many directions see it."""
    covered = []
    for seed in range(60):
        x, y = Gaussians(8, 0.0, 1.0).draw(100, 100, seed)
        x[:, 0] += 4
        found = metrics.sliced_wasserstein(x, y, directions=16, seed=seed)
        covered.append(found.low <= math.sqrt(16 / 8) <= found.high)
    assert np.mean(covered) > 0.85


def test_a_value_below_zero_does_not_exclude_zero():
    """In one dimension a nearly linear kernel sees the difference of means alone: where it is 0 by
    chance so are all influences, and the estimate is below 0 by its bias correction."""
    draws = [Gaussians(1, 0.0, 1.0).draw(50, 60, seed) for seed in range(100)]
    found = [metrics.mmd(x, y, bandwidth=2.0) for x, y in draws]
    assert min(e.value for e in found) < -1e-3
    assert all(e.low <= 0 <= e.high for e in found if e.value < 0)


@pytest.mark.parametrize("name", ["sliced", "frechet"])
def test_what_is_not_extrapolated_is_biased(name):
    """The correction is of that size: twice the mean over halves would not do."""
    draws = [EQUAL.draw(60, 90, seed) for seed in range(40)]
    each = [[DISTANCES[name](*d, extrapolate=e).value for d in draws] for e in (False, True)]
    plain, extrapolated = (np.mean(np.square(v) if name == "sliced" else v) for v in each)
    # Roots of what is above 0 keep a part; each set of 60 to 90 samples has c/n about 0.1.
    assert plain > (3 if name == "sliced" else 10) * abs(extrapolated)
    half = np.mean([DISTANCES[name](x[:30], y[:45], extrapolate=False).value for x, y in draws])
    assert half == pytest.approx(np.mean(each[0]) * (math.sqrt(2) if name == "sliced" else 2), 0.15)


# Against the definitions


def test_transport_in_one_dimension_is_exact_for_any_sizes():
    p, q = normals(4, 3), 1 + 2 * normals(6, 3, seed=1)
    want = np.mean((np.sort(p.repeat(3, 0), 0) - np.sort(q.repeat(2, 0), 0)) ** 2, axis=0)
    cost, phi, psi = metrics._transport(torch.tensor(p), torch.tensor(q))
    assert np.allclose(cost, want)
    # Every plan of a permutation costs more.
    few, other = p[:, 0], q[:4, 0]
    best = min(np.mean((few - other[list(s)]) ** 2) for s in itertools.permutations(range(4)))
    found = metrics._transport(torch.tensor(few[:, None]), torch.tensor(other[:, None]))[0]
    assert float(found) == pytest.approx(best)
    assert torch.allclose(phi.mean(0), torch.zeros(3).double())
    assert torch.allclose(psi.mean(0), torch.zeros(3).double())


def test_sliced_wasserstein_is_the_root_of_the_mean_over_directions():
    x, y = normals(30, 2, 3), 0.5 + normals(30, 2, 3, seed=1)
    plain = metrics.sliced_wasserstein(x, y, directions=4000, extrapolate=False)
    z = normals(6, 3000, seed=9)
    z /= np.linalg.norm(z, axis=0)
    a, b = (np.sort(v.reshape(30, 6) @ z, axis=0) for v in (x, y))
    assert plain.value == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=0.03)


@pytest.mark.parametrize("name", ["energy", "gaussian", "cubic"])
def test_u_statistics_are_sums_over_pairs(name):
    x, y = normals(7, 4), 2 + normals(9, 4, seed=1)
    k, found = {
        "energy": (lambda u, v: -np.linalg.norm(u - v), metrics.energy_distance(x, y)),
        "gaussian": (
            lambda u, v: math.exp(-np.sum((u - v) ** 2) / 18),
            metrics.mmd(x, y, bandwidth=3.0),
        ),
        "cubic": (lambda u, v: (u @ v / 4 + 1) ** 3, metrics.mmd(x, y, kernel="cubic")),
    }[name]
    within = [np.mean([k(u, v) for u, v in itertools.permutations(s, 2)]) for s in (x, y)]
    across = np.mean([k(u, v) for u in x for v in y])
    assert found.value == pytest.approx(sum(within) - 2 * across, rel=1e-10)


def test_the_default_bandwidth_is_of_the_reference_alone():
    x, y = normals(30, 4), normals(20, 4, seed=1)
    h = metrics.median_distance(y)
    inside = distances(y, y)[np.triu_indices(20, 1)]
    assert np.sort(inside)[[94, 95]].tolist()[0] == pytest.approx(h)
    assert metrics.mmd(x, y) == metrics.mmd(x, y, bandwidth=h)


def exactly(n, mean, S, seed=0):
    """Samples with exactly this mean and covariance."""
    z = normals(n, len(mean), seed=seed)
    z -= z.mean(0)
    return mean + z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T) @ root(S)


def test_frechet_distance_of_given_moments():
    A, B = normals(4, 4), normals(4, 4, seed=1)
    S, T = A @ A.T + 0.1 * np.eye(4), B @ B.T
    mu, nu = normals(4, seed=2), normals(4, seed=3)
    cross = np.trace(root(root(S) @ T @ root(S)))
    want = np.sum((mu - nu) ** 2) + np.trace(S) + np.trace(T) - 2 * cross
    x, y = exactly(50, mu, S, seed=4), exactly(31, nu, T, seed=5)
    found = metrics.frechet_distance(x, y, extrapolate=False)
    assert found.value == pytest.approx(want, rel=1e-10)


def test_frechet_distance_of_singular_covariances():
    x, y = np.zeros((20, 8)), np.zeros((30, 8))
    x[:, 0], y[:, 1] = normals(20), 3 * normals(30, seed=1)
    want = x[:, 0].mean() ** 2 + y[:, 1].mean() ** 2 + x.var(0, ddof=1)[0] + y.var(0, ddof=1)[1]
    assert metrics.frechet_distance(x, y, extrapolate=False).value == pytest.approx(want, rel=1e-12)
    # Fewer samples than features, and far from 0: the same set is at distance 0 of itself.
    z = 1000 + normals(10, 64)
    assert abs(metrics.frechet_distance(z, z[::-1], extrapolate=False).value) < 1e-8
    rotated = exactly(40, np.zeros(4), np.diag([1.0, 4.0, 0.0, 0.0]))
    other = exactly(40, np.zeros(4), np.diag([9.0, 1.0, 0.0, 0.0]), seed=1)
    found = metrics.frechet_distance(rotated, other, extrapolate=False)
    assert found.value == pytest.approx(4 + 1, rel=1e-6)
    with pytest.warns(UserWarning, match="10 samples for 9 features"):
        metrics.frechet_distance(z, z + 1)


def test_influences_are_derivatives_of_the_distance():
    """To first order, the value without a sample differs by its influence over n - 1."""
    x, y = DIFFERENT.draw(200, 150, 0)

    def pieces(x):
        a, b = metrics._Gaussian.of(torch.tensor(x)), metrics._Gaussian.of(torch.tensor(y))
        left, s, _ = torch.linalg.svd(a.factor @ b.factor.T)
        return a.distance(b, s), a.influence(torch.tensor(x), b.mean, left, s)[0].numpy()

    value, influence = pieces(x)
    influence -= influence.mean()
    off = [(value - pieces(np.delete(x, i, 0))[0]) * 199 for i in range(200)]
    assert np.corrcoef(off, influence)[0, 1] > 0.995
    assert np.polyfit(influence, off, 1)[0] == pytest.approx(1, abs=0.06)


def test_potentials_are_derivatives_of_the_cost():
    p, q = map(torch.tensor, DIFFERENT.draw(200, 150, 0))
    cost, phi, psi = metrics._transport(p, q)
    back = metrics._transport(q, p)
    assert torch.allclose(back[0], cost)
    assert torch.allclose(back[1], psi)
    assert torch.allclose(back[2], phi)
    without = [metrics._transport(torch.cat([p[:i], p[i + 1 :]]), q)[0] for i in range(200)]
    off = (cost - torch.stack(without)) * 199
    for column in range(3):
        one, two = phi[:, column].numpy(), off[:, column].numpy()
        assert np.corrcoef(one, two)[0, 1] > 0.99
        assert np.polyfit(one, two, 1)[0] == pytest.approx(1, abs=0.06)


# Precision and recall


def inside(x, y, k):
    """x_i in the ball of y_j."""
    return distances(x, y) <= np.sort(distances(y, y), axis=1)[:, k]


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_density_and_coverage_are_what_they_say(k):
    x, y = normals(45, 3), 0.8 + normals(60, 3, seed=1)
    precision, recall = metrics.precision_recall(x, y, k=k)
    density, coverage = metrics.density_coverage(x, y, k=k)
    assert precision.value == pytest.approx(inside(x, y, k).any(1).mean())
    assert recall.value == pytest.approx(inside(y, x, k).any(1).mean())
    assert density.value == pytest.approx(inside(x, y, k).sum() / (k * 45))
    assert coverage.value == pytest.approx(inside(x, y, k).any(0).mean())
    for found in (precision, recall, density, coverage):
        assert found.low < found.value < found.high


def test_without_a_group_means_computed_without_it():
    x, y, k = normals(45, 3), 0.8 + normals(60, 3, seed=1), 3
    balls = metrics._Balls.around(torch.tensor(y), torch.tensor(x), k, 0)
    values, without = balls.means(balls.counts > 0)
    reached, without_tested = balls.reached()
    for g in range(20):
        kept, fewer = y[balls.centres != g], x[balls.tested != g]
        assert len(kept) == 57
        assert 42 <= len(fewer) <= 43
        assert np.array_equal(balls.counts[:, g + 1], inside(x, kept, k).sum(1))
        assert values[g + 1] == pytest.approx(inside(x, kept, k).any(1).mean())
        assert without[g] == pytest.approx(inside(fewer, y, k).any(1).mean())
        assert reached[g + 1] == pytest.approx(inside(x, kept, k).any(0).mean())
        assert without_tested[g] == pytest.approx(inside(fewer, y, k).any(0).mean())


def test_supports_that_are_disjoint_or_half():
    y = normals(200, 2)
    y[::2] += 100
    x = normals(150, 2, seed=1)
    precision, recall = metrics.precision_recall(x - 100, y)
    assert precision.value == recall.value == 0
    assert 0.01 < precision.high < 0.05
    density, coverage = metrics.density_coverage(x - 100, y)
    assert density.value == coverage.value == density.low == 0
    assert 0.001 < density.high < 0.01
    precision, recall = metrics.precision_recall(x, y)
    assert precision.value > 0.95
    assert 0.45 < recall.value <= 0.5
    same = metrics.precision_recall(y, y)
    assert same.precision.value == same.recall.value == 1
    assert 0.9 < same.precision.low < 1


def test_parts_of_equal_distributions_have_their_known_means_and_intervals():
    n, m, k, runs = 60, 80, 5, 80
    found = {name: [] for name in PARTS}
    for seed in range(runs):
        x, y = EQUAL.draw(n, m, seed)
        for result in (metrics.precision_recall(x, y), metrics.density_coverage(x, y, k=k)):
            for name, estimate in result._asdict().items():
                found[name].append(estimate)
    want = {
        "density": 1.0,
        "coverage": 1 - math.prod((m - i) / (m + n - i) for i in range(1, k + 1)),
    }
    for name, estimates in found.items():
        value, low, high = np.array(estimates).T
        mean = want.get(name, value.mean())
        assert abs(value.mean() - mean) < 3.5 * value.std() / math.sqrt(runs), name
        assert ((low <= mean) & (mean <= high)).mean() > 0.88, name
        assert ((high - low) / 2).mean() < 6 * value.std(), name


def test_intervals_know_that_the_balls_are_random():
    """With many samples and few centres the balls are what varies: the binomial variance of the
    precision is a tenth of all."""
    found = []
    for seed in range(40):
        x, y = Gaussians(3, 0.6, 1.0).draw(400, 60, seed)
        found.append(metrics.precision_recall(x, y).precision)
    value, low, high = np.array(found).T
    binomial = math.sqrt(value.mean() * (1 - value.mean()) / 400)
    assert binomial < 0.5 * value.std()
    assert 0.85 < (high - low).mean() / 2 / 2.09 / value.std() < 2
    assert ((low <= value.mean()) & (value.mean() <= high)).mean() > 0.88


# Of everything


@pytest.mark.parametrize("name", ALL)
def test_shape_order_and_blocks_do_not_matter_and_a_seed_decides(name, monkeypatch):
    x, y = DIFFERENT.draw(50, 61, 3)
    x, y = np.float32(np.tile(x, 4)), np.float32(np.tile(y, 4))
    y[:, 3:] += normals(61, 9)
    x[:, 3:] += normals(50, 9)
    want = ALL[name](x, y)
    assert isinstance(want, Estimate)
    assert want.low <= want.value <= want.high
    assert ALL[name](np.flip(x[::-1], 0), y) == want
    x.flags.writeable = False
    shaped = ALL[name](x.reshape(50, 3, 2, 2), torch.tensor(y).reshape(61, 3, 2, 2))
    assert shaped == want
    assert np.allclose(ALL[name](x + 1000, y + 1000), want, rtol=2e-3, atol=1e-4) or name == "cubic"
    monkeypatch.setattr(metrics, "_BLOCK", 100)
    assert np.allclose(ALL[name](x, y), want, rtol=1e-9, atol=1e-12)
    if name in ("energy", "mmd", "cubic"):
        back = ALL[name](x[::-1], y)
        assert np.allclose(back, want, rtol=1e-9)
    elif name in ("sliced", "frechet"):
        assert ALL[name](x, y, seed=1) != want
        assert np.allclose(ALL[name](x, y, seed=1), want, rtol=0.3)


@pytest.mark.parametrize("name", ALL)
def test_bad_samples_are_refused(name):
    x, y = normals(50, 4), normals(50, 4, seed=1)
    bad = x.copy()
    bad[[3, 7], 2] = np.nan, np.inf
    for these, said in (
        ((bad, y), r"^x has 2 of 50 samples that are not finite"),
        ((x, bad), r"^y has 2 of 50"),
        ((x, y[:, :3]), r"^y has 3 numbers per sample for 4 of x"),
        ((x[:1], y), r"^x has shape \(1, 4\); need at least"),
        ((x, y[:, :0]), r"^y has shape \(50, 0\)"),
    ):
        with pytest.raises(ValueError, match=said):
            ALL[name](*these)


def test_bad_options_are_refused():
    x, y = normals(50, 4), normals(50, 4, seed=1)
    for call, said in (
        (lambda: metrics.mmd(x, y, kernel="gausian"), "kernel = 'gausian' is not known; did you"),
        (lambda: metrics.mmd(x, y, bandwidth=0.0), r"bandwidth = 0\.0; need"),
        (lambda: metrics.mmd(x, x * 0), r"bandwidth = 0\.0; need"),
        (lambda: metrics.mmd(x, y, kernel="cubic", bandwidth=1.0), "bandwidth = 1"),
        (lambda: metrics.sliced_wasserstein(x, y, directions=1), "directions = 1"),
        (lambda: metrics.precision_recall(x, y, k=0), "k = 0; need 1 to 46"),
        (lambda: metrics.density_coverage(x, y, k=47), "k = 47; need 1 to 46"),
        (lambda: metrics.error_summary([1.0, math.nan]), r"errors has shape \(2,\)"),
        (lambda: metrics.error_summary([1.0, -1.0]), r"errors has shape \(2,\)"),
        (lambda: metrics.error_ratio([1.0, 2.0], [1.0, 2.0, 3.0]), "others has 3 errors for 2"),
        (lambda: metrics.inception(data_range=(1, 1)), r"data_range = \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    metrics.precision_recall(x, y, k=46)


# Errors of samples


def test_trajectory_error_is_the_distance_to_the_converged_samples():
    model = fs.exact.digits().denoiser(fs.EDM())
    teacher = fs.teach(model, (1, 8, 8), 12, nfe=48)
    run = fs.plan("ddim", model, 5)
    found = metrics.trajectory_error(teacher, run)
    x = fs.sample(model, (12, 1, 8, 8), solver="ddim", nfe=5, progress=False)
    each = (x.double() - teacher.samples.double()).square().flatten(1).mean(1).sqrt().numpy()
    assert found.median.value == pytest.approx(np.median(each), rel=1e-4)
    assert found.rms.value == pytest.approx(np.sqrt(np.mean(each**2)), rel=1e-4)
    assert found.p90.value == pytest.approx(np.quantile(each, 0.9), rel=1e-4)
    assert found.median.low == pytest.approx(np.sort(each)[2], rel=1e-4)  # ranks 3 and 10 of 12
    assert found.median.high == pytest.approx(np.sort(each)[9], rel=1e-4)
    assert found.p90.high == math.inf  # 12 samples are all below p90 28 times in 100
    assert found == metrics.trajectory_error(teacher, run)


@pytest.mark.parametrize("n", [2, 6, 36, 37, 200, 5000])
@pytest.mark.parametrize("q", [0.5, 0.9])
def test_ranks_are_the_binomial_ones(n, q):
    stats = pytest.importorskip("scipy.stats")
    found = metrics._quantile(np.arange(1.0, n + 1), q)
    law = stats.binom(n, q)
    low, high = found.low, min(found.high, n + 1)
    assert law.cdf(low - 1) <= 0.025 < law.cdf(low)
    assert law.sf(high - 1) <= 0.025 < law.sf(high - 2)


def test_intervals_of_errors_cover_the_truth():
    truth = [1.0, math.exp(0.25), math.exp(0.5 * 1.2815515655)]
    runs = [
        metrics.error_summary(np.exp(0.5 * normals(100, seed=s)), seed=s) for s in np.arange(60)
    ]
    for each, want in zip(zip(*runs, strict=True), truth, strict=True):
        value, low, high = np.array(each).T
        assert value.mean() == pytest.approx(want, rel=0.03)
        assert ((low <= want) & (want <= high)).mean() >= 0.87
    value, low, high = np.log([run.rms for run in runs]).T
    assert 0.8 < (high - low).mean() / (2 * 1.96) / value.std() < 1.25
    assert (high - value).mean() > 1.1 * (value - low).mean()  # as the errors are skewed


def test_samples_that_diverged_count():
    e = np.append(np.linspace(1, 2, 98), [np.inf, np.inf])
    found = metrics.error_summary(e)
    assert found.rms == (math.inf, math.inf, math.inf)
    assert found.median.high < 2
    assert found.p90.value < 2
    assert math.isfinite(found.p90.high)
    assert metrics.error_summary([1.0, np.inf]).median.value == math.inf
    assert metrics.error_summary(np.append(e[:-12], [np.inf] * 12)).p90.value == math.inf
    none = metrics.error_summary(np.zeros(100))
    assert none.median == none.rms == none.p90 == (0, 0, 0)
    assert metrics.error_summary(np.full(100, 1e-200)).rms == pytest.approx((1e-200,) * 3)


def test_ratio_of_errors_is_paired():
    hard = np.exp(2 * normals(200))  # noises differ far more than solvers
    one, two = hard * np.exp(0.1 * normals(200, seed=1)), 1.2 * hard
    found = metrics.error_ratio(one, two)
    assert found.low < 1 / 1.2 < found.high < 0.9
    back = metrics.error_ratio(two, one)
    assert (back.low, back.high) == pytest.approx((1 / found.high, 1 / found.low))
    tie = metrics.error_ratio([0.0, np.inf, 1.0], [0.0, np.inf, 1.0])
    assert tie.value == 1


# Features


def test_features_are_those_of_any_function_in_batches():
    x = torch.tensor(normals(10, 3, 4))
    seen = []

    def network(v):
        seen.append(len(v))
        return v[:, :2].requires_grad_() * 2

    found = metrics.features(x, network, batch=4)
    assert torch.equal(found, (x[:, :2] * 2).flatten(1))
    assert seen == [4, 4, 2]
    assert not found.requires_grad
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5).double())
    with pytest.raises(ValueError, match="training mode"):
        metrics.features(x, module)
    assert metrics.features(x, module.eval()).shape == (10, 5)


def test_inception_is_asked_as_torch_fidelity_expects(monkeypatch):
    asked = {}

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            asked.update(name=name, features=features_list, path=feature_extractor_weights_path)

        def forward(self, x):
            asked.update(dtype=x.dtype, shape=tuple(x.shape), x=x)
            return (x.flatten(1).float(),)

    package = types.ModuleType("torch_fidelity")
    package.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    network = metrics.inception(layer="64", weights="file.pth")
    grey = torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    found = metrics.features(grey, network)
    assert asked["name"] == "inception-v3-compat"
    assert (asked["features"], asked["path"]) == (["64"], "file.pth")
    assert (asked["dtype"], asked["shape"]) == (torch.uint8, (1, 3, 2, 2))
    assert found.tolist() == [[0, 0, 128, 255] * 3]
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 8, 8\); need images"):
        network(torch.zeros(2, 4, 8, 8))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        metrics.inception()


def test_estimates_print():
    assert str(Estimate(0.123456, 0.1, 0.2)) == "0.1235 [0.1, 0.2]"
