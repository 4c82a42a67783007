r"""How far samples are from where they should be, with 95 % confidence intervals.

Of each sample, against the converged solution of the same model from the same noise:

    m = fs.metrics.trajectory_error(fs.teach(model, shape, 256), plan)     m.median, m.rms, m.p90
    r = fs.metrics.error_ratio(teacher.errors(one), teacher.errors(two))   a tie where 1 is inside

Of the distribution of samples x, against a reference y (data, or converged samples):

    sliced_wasserstein(x, y)     energy_distance(x, y)     mmd(x, y)     frechet_distance(f, g)
    precision_recall(f, g)       density_coverage(f, g)    f, g = features(x, net), features(y, net)

x and y are (n, *sample) and (m, *sample), tensors or arrays of any shape, flattened; or features of
them. All samples must be independent: x and y not made from the same noises, and conditions drawn
at random. Labels taken in turn make both sets more even than chance would, and their distances too
small by about c / n, below 0 where nothing differs.

Sums are in float64, pairs of samples in blocks of 8 MB; results depend on x, y and the seed alone
(on a GPU up to rounding).

What an interval is about: the distance between the two distributions that x and y were drawn from,
of which one run with one seed sees n and m samples. The estimate of such a distance from n samples
has a variance and, for most, a bias that a comparison of the value with 0 or with a published one
must not ignore:

- Energy distance and MMD are U-statistics, without bias; they may be negative.
- Sliced Wasserstein and Frechet distances of samples are too large by about c / n, also for equal
  distributions, and by more for few samples of many features. What is returned is extrapolated,

      2 T(n, m) - mean T(n/2, m/2),

  over random halves, as FID-infinity is (Chong & Forsyth, arXiv 1911.07023), which is exact for a
  bias of c / n. `extrapolate=False` gives T(n, m), which is comparable at equal n and m only, and
  whose interval is then about the mean of T(n, m).
- Precision, recall, density and coverage have no limit that is of use: they are comparable at equal
  n, m and k only.

Intervals of the first four are normal, of the variance of the influence function (first-order
projection) of every sample. A bootstrap would be wrong for these: repeated samples are at distance
0, which adds again the very bias that was removed. They cover 95 % where the distributions differ
and more where they agree: there influences vanish, what is measured is up to twice the variance,
and a value below 0, which is off by its own size at least, gets an interval of twice that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._calibrate._by_value import PlansByValue
from ._calibrate._teacher import Teacher
from ._denoiser import Model
from ._plan import Plan
from ._prediction import unknown
from ._process import Array
from .models import classifier

__all__ = [
    "DensityCoverage",
    "ErrorSummary",
    "Estimate",
    "PrecisionRecall",
    "bundled_features",
    "density_coverage",
    "energy_distance",
    "error_ratio",
    "error_summary",
    "features",
    "frechet_distance",
    "inception",
    "median_distance",
    "mmd",
    "precision_recall",
    "sliced_wasserstein",
    "trajectory_error",
]

Samples = ArrayLike | Tensor

#: Of the standard normal, and of Student's t with 19 degrees of freedom, at 97.5 %.
_Z, _T = 1.959964, 2.093024
#: Groups of the jackknife.
_GROUPS = 20
#: Random halvings of an extrapolation.
_HALVINGS = 4
#: Resamples of a bootstrap.
_RESAMPLES = 1999
#: Elements of a block.
_BLOCK = 1 << 20


class Estimate(NamedTuple):
    """A value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


# Errors of samples


class ErrorSummary(NamedTuple):
    """Of errors: median, root mean square, and what nine of ten are below."""

    median: Estimate
    rms: Estimate
    p90: Estimate


def trajectory_error(
    teacher: Teacher, run: Plan | PlansByValue, model: Model | None = None
) -> ErrorSummary:
    """Distances between samples of a plan and the converged ones from the same noises.

    The error of a sample is the root mean square over its elements, infinite if it is not finite.
    teacher: of `fewstep.teach`. model: what to run instead of the teacher's.
    """
    return error_summary(teacher.errors(run, model))


def error_summary(errors: ArrayLike, *, seed: int = 0) -> ErrorSummary:
    """Median, root mean square and p90 of errors e >= 0 of independent samples, such as
    `Teacher.errors`.

    Intervals of median and p90 are order statistics with exact binomial ranks: they hold for every
    distribution of errors; 0 or infinite where so few samples bound the quantile on one side only.
    That of the root mean square is a studentised bootstrap of log mean e^2, the widest and most
    accurate of the usual ones where few errors dominate; a few hundred samples cannot bound the
    root mean square of errors one of which in hundreds is a hundred times larger. Infinite errors
    leave nothing to say of it: infinite.
    """
    e = _errors("errors", errors)
    return ErrorSummary(_quantile(e, 0.5), _root_mean_square(e, seed), _quantile(e, 0.9))


def error_ratio(errors: ArrayLike, others: ArrayLike) -> Estimate:
    """Median over samples of e / f, of two ways to sample from the same noises: below 1, the first
    is better for most of them. The pairing leaves out what makes some noises hard for both. The
    interval is made of order statistics; the two are tied where it contains 1.

    Where both errors are 0 or infinite their ratio is 1.
    """
    e, f = _errors("errors", errors), _errors("others", others)
    if e.shape != f.shape:
        raise ValueError(
            f"others has {len(f)} errors for {len(e)} in errors; need those of the same noises"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return _quantile(np.where(e == f, 1.0, e / f), 0.5)


def _errors(name: str, errors: ArrayLike) -> Array:
    e = np.asarray(errors, dtype=np.float64)
    if e.ndim != 1 or len(e) < 2 or not bool((e >= 0).all()):
        raise ValueError(f"{name} has shape {e.shape}; need two or more numbers >= 0, not NaN")
    return e


def _quantile(e: Array, q: float) -> Estimate:
    """The order statistics around which P(X_(low) <= quantile <= X_(high)) >= 95 %."""
    n, ranked = len(e), np.sort(e)
    k = np.arange(n)
    log_pmf = np.cumsum(np.log((n - k) / (k + 1) * q / (1 - q))) + n * math.log(1 - q)
    below = np.cumsum(np.exp(np.append(n * math.log(1 - q), log_pmf)))  # P(K <= k), k = 0 .. n
    low = int(np.searchsorted(below, 0.025, "right"))  # the largest rank with P(K < rank) <= 2.5 %
    high = int(np.searchsorted(below, 0.975)) + 1  # the smallest with P(K >= rank) <= 2.5 %
    value = float(np.quantile(ranked, q, method="higher"))
    if math.isfinite(value):  # between order statistics; next to an infinite one that is NaN
        value = float(np.quantile(ranked, q))
    return Estimate(
        value,
        float(ranked[low - 1]) if low else 0.0,
        float(ranked[high - 1]) if high <= n else math.inf,
    )


def _root_mean_square(e: Array, seed: int) -> Estimate:
    if not bool(np.isfinite(e).all()):
        return Estimate(math.inf, math.inf, math.inf)
    scale = float(e.max())
    if scale == 0.0:
        return Estimate(0.0, 0.0, 0.0)
    n, square = len(e), np.square(e / scale)  # errors below 1e-154 have squares too
    rng = np.random.default_rng(seed)
    mean, deviation = square.mean(), square.std(ddof=1)
    found = []
    for i in range(0, _RESAMPLES, _rows_of(n)):
        b = square[rng.integers(0, n, (min(_rows_of(n), _RESAMPLES - i), n))]
        found.append((b.mean(1), b.std(1, ddof=1)))
    means, deviations = (np.concatenate(v) for v in zip(*found, strict=True))
    some = deviations > 0
    t = np.log(means[some] / mean) * means[some] / deviations[some]
    value = scale * math.sqrt(mean)
    if not len(t):  # all equal
        return Estimate(value, value, value)
    low, high = np.quantile(t, [0.025, 0.975]) * (deviation / mean) / 2
    return Estimate(value, float(value * np.exp(-high)), float(value * np.exp(-low)))


# Samples, in blocks


def _tensor(x: Samples) -> Tensor:
    """Arrays are copied: torch takes no negative strides, and warns of what is read-only."""
    return x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))


def _flat(name: str, x: Samples, least: int) -> Tensor:
    x = _tensor(x)
    if x.device.type == "mps":  # has no float64
        x = x.cpu()
    if x.ndim < 1 or len(x) < least or not x.numel():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; need at least {least} samples, batch first"
        )
    x = x.reshape(len(x), -1)
    if x.is_complex():
        x = torch.view_as_real(x).flatten(1)
    bad = sum(int((~rows.isfinite()).any(1).sum()) for rows in x.split(_rows_of(x.shape[1])))
    if bad:
        raise ValueError(
            f"{name} has {bad} of {len(x)} samples that are not finite; there is no distance of "
            "distributions to them: count them, and leave them out"
        )
    return x


def _both(x: Samples, y: Samples, least: int) -> tuple[Tensor, Tensor]:
    """Two sets of samples as matrices on one device."""
    a, b = _flat("x", x, least), _flat("y", y, least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"y has {b.shape[1]} numbers per sample for {a.shape[1]} of x; they must agree"
        )
    return a, b.to(a.device)


def _rows_of(columns: int) -> int:
    return max(1, _BLOCK // columns)


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Rows of a matrix in float64."""
    return (rows.double() for rows in x.split(_rows_of(x.shape[1])))


def _times(x: Tensor, w: Tensor) -> Tensor:
    """x w in float64."""
    return torch.cat([rows @ w for rows in _pieces(x)])


def _mean(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in _pieces(x):
        total += rows.sum(0)
    return total / len(x)


Kernel = Callable[[Tensor, Tensor], Tensor]


def _against(x: Tensor, y: Tensor, of: Kernel) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix of(x_i, y_j), in float64."""
    step = min(_rows_of(len(y)), _rows_of(x.shape[1]))
    for i in range(0, len(x), step):
        part = slice(i, min(i + step, len(x)))
        a = x[part].double()
        yield part, torch.cat([of(a, b) for b in _pieces(y)], dim=1)


def _distance(centre: Tensor) -> Kernel:
    """|a - b|. Its square is a difference of squares, so both are taken from a centre."""

    def of(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - centre, b - centre
        square = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
        return square.clamp_(min=0).sqrt_()

    return of


def _estimate(value: float, variance: float) -> Estimate:
    reach = max(_Z * math.sqrt(variance), -2 * value)
    return Estimate(value, value - reach, value + reach)


def _variance(*influences: Tensor) -> float:
    """Of a statistic, to first order, from the influences of the samples of every set."""
    return sum(float(psi.var()) / len(psi) for psi in influences)


def _halves(x: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two random halves."""
    order = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    return order[: len(x) // 2], order[len(x) // 2 :]


# Sliced Wasserstein distance


def sliced_wasserstein(
    x: Samples, y: Samples, *, directions: int = 512, extrapolate: bool = True, seed: int = 0
) -> Estimate:
    r"""Sliced 2-Wasserstein distance, sqrt of the mean over directions z of W_2^2(z.x, z.y).

    W_2^2 of two sets of numbers is exact, of any two sizes. The influence of a sample is its
    Kantorovich potential, 2 \int (u - T(u)) du to z.x of the map T from one to the other, averaged
    over directions (Manole, Balakrishnan & Wasserman, Minimax confidence intervals for the sliced
    Wasserstein distance, arXiv 1909.07862). The interval has the variance over directions, too. The
    root is taken at the end: 0 is a square that is not above 0.

    directions: uniform on the sphere, the same for the same seed. Cost: n d + n log n for each.
    """
    a, b = _both(x, y, 4)
    if directions < 2:
        raise ValueError(f"directions = {directions}; need 2 or more")
    rng = np.random.default_rng(seed)
    halvings = [(_halves(a, rng), _halves(b, rng)) for _ in range(_HALVINGS * extrapolate)]
    potentials = [torch.zeros(len(v), dtype=torch.float64, device=a.device) for v in (a, b)]
    found: list[Tensor] = []
    step = min(directions, _rows_of(max(len(a), len(b), a.shape[1])))
    for i in range(0, directions, step):
        z = torch.from_numpy(rng.normal(size=(min(step, directions - i), a.shape[1])))
        z = (z / z.norm(dim=1, keepdim=True)).T.to(a.device)
        p, q = _times(a, z), _times(b, z)
        cost, *phi = _transport(p, q)
        for total, its in zip(potentials, phi, strict=True):
            total += its.sum(1) / directions
        if halvings:
            half = sum(
                _transport(p[s], q[t])[0]
                for ss, ts in halvings
                for s, t in zip(ss, ts, strict=True)
            )
            cost = 2 * cost - half / (2 * len(halvings))
        found.append(cost)
    each = torch.cat(found)
    square = _estimate(float(each.mean()), _variance(*potentials, each))
    return Estimate(*(math.sqrt(max(v, 0.0)) for v in square))


def _transport(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W_2^2 of every column of p (n, L) and q (m, L), and the potentials at p and at q."""
    n, m = len(p), len(q)
    # Between neighbouring multiples of 1/n and 1/m both quantile functions are constant.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    starts = np.append(0, ends[:-1])
    i, j = (torch.from_numpy(starts // s).to(p.device) for s in (m, n))
    mass = torch.from_numpy((ends - starts) / (n * m)).to(p.device)[:, None]
    (p, p_order), (q, q_order) = p.sort(0), q.sort(0)
    gap = p[i] - q[j]
    cost = (mass * gap * gap).sum(0)

    def potential(u: Tensor, order: Tensor, k: Tensor, sign: float) -> Tensor:
        slope = torch.zeros_like(u).index_add_(0, k, mass * gap) * (2 * sign * len(u))
        rise = (slope[1:] + slope[:-1]) / 2 * u.diff(dim=0)
        phi = torch.cat([torch.zeros_like(u[:1]), rise.cumsum(0)])
        return torch.empty_like(phi).scatter_(0, order, phi - phi.mean(0))

    return cost, potential(p, p_order, i, 1.0), potential(q, q_order, j, -1.0)


# Energy distance and MMD


def energy_distance(x: Samples, y: Samples) -> Estimate:
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias (Szekely & Rizzo, Energy statistics,
    2013). It is the squared MMD of the kernel -|x - y|. scipy.stats.energy_distance is its root, in
    one dimension, and biased (the distances of samples to themselves are counted)."""
    a, b = _both(x, y, 4)
    distance = _distance(_mean(b))
    return _two_sample(a, b, lambda u, v: -distance(u, v))


def mmd(
    x: Samples, y: Samples, *, kernel: str = "gaussian", bandwidth: float | None = None
) -> Estimate:
    """Squared maximum mean discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y), without bias (Gretton
    et al., A kernel two-sample test, 2012).

    kernel: "gaussian", exp(-|u - v|^2 / (2 bandwidth^2)); "cubic", (u.v / d + 1)^3, which for
        Inception features is KID (Binkowski et al., arXiv 1801.01401), with all the samples instead
        of averaged subsets.
    bandwidth: of "gaussian". None: `median_distance(y)`, of the reference alone, so that values for
        different x can be compared.
    """
    a, b = _both(x, y, 4)
    if kernel == "cubic":
        if bandwidth is not None:
            raise ValueError(f"bandwidth = {bandwidth}; kernel = 'cubic' has none")
        return _two_sample(a, b, lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3)
    if kernel != "gaussian":
        raise ValueError(unknown("kernel", kernel, ("cubic", "gaussian")))
    h = median_distance(b) if bandwidth is None else float(bandwidth)
    if not 0 < h < math.inf:
        raise ValueError(f"bandwidth = {h}; need a finite number > 0")
    distance = _distance(_mean(b))
    return _two_sample(a, b, lambda u, v: (distance(u, v) / h).square_().mul_(-0.5).exp_())


def median_distance(y: Samples) -> float:
    """Median distance between two samples, of at most 1,000 that are evenly spaced in y."""
    b = _flat("y", y, 2)
    b = b[torch.linspace(0, len(b) - 1, min(len(b), 1000)).long().to(b.device)].double()
    distances = _distance(b.mean(0))(b, b)
    above = torch.ones_like(distances, dtype=torch.bool).triu(1)
    return float(distances[above].median())


def _two_sample(x: Tensor, y: Tensor, kernel: Kernel) -> Estimate:
    """The U-statistic of a kernel. The influence of a sample is in its mean over the others."""

    def means(x: Tensor, y: Tensor, same: bool) -> tuple[Tensor, Tensor]:
        rows, columns = [], torch.zeros(len(y), dtype=torch.float64, device=x.device)
        for part, k in _against(x, y, kernel):
            if same:
                k[:, part].fill_diagonal_(0)
            rows.append(k.sum(1) / (len(y) - same))
            columns += k.sum(0) / len(x)
        return torch.cat(rows), columns

    cross, back = means(x, y, False)
    u, v = means(x, x, True)[0] - cross, means(y, y, True)[0] - back
    return _estimate(float(u.mean() + v.mean()), _variance(2 * u, 2 * v))


# Frechet distance


def frechet_distance(
    x: Samples, y: Samples, *, extrapolate: bool = True, seed: int = 0
) -> Estimate:
    r"""|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^{1/2}) of means and covariances: the squared
    2-Wasserstein distance of two Gaussians with these; of Inception features, FID (Heusel et al.,
    arXiv 1706.08500).

    No covariance is formed and no root of one is taken: with S_x = A^T A and S_y = B^T B, A and B
    from the QR decomposition of the centred samples, tr (S_x S_y)^{1/2} is the sum of the singular
    values of A B^T, for singular covariances and n < d as well. (Roots of S_x S_y lose half the
    digits where it is singular, and the usual remedy, adding eps I, changes the result.)

    The influence of a sample u from its mean is |u|^2 + 2 (mu_x - mu_y).u - u^T T u, T the linear
    map that takes one Gaussian to the other.

    The bias is c / n from about two samples per feature on. For fewer the extrapolated value is too
    large as well, and there is a warning: take fewer features, or `mmd(kernel="cubic")`, which has
    no bias for any n.

    Cost: 2 n d^2 + d^3, and four times as much again to extrapolate.
    """
    a, b = _both(x, y, 4)
    one, two = _Gaussian.of(a), _Gaussian.of(b)
    left, s, right = torch.linalg.svd(one.factor @ two.factor.T, full_matrices=False)
    value = one.distance(two, s)
    variance, rank = 0.0, 0
    for g, other, v, axes in ((one, two, a, left), (two, one, b, right.T)):
        influence, its = g.influence(v, other.mean, axes, s)
        variance, rank = variance + _variance(influence), max(rank, its)
    if extrapolate:
        few = min(len(a), len(b))
        if few < 2 * rank:
            warnings.warn(
                f"{few} samples for {rank} features: with fewer than two per feature the bias is "
                "not c / n, and the Frechet distance stays too large when it is extrapolated",
                stacklevel=2,
            )
        rng, half = np.random.default_rng(seed), []
        for _ in range(_HALVINGS):
            parts = [[_Gaussian.of(v[i]) for i in _halves(v, rng)] for v in (a, b)]
            half += [p.distance(q) for p, q in zip(*parts, strict=True)]
        value = 2 * value - float(np.mean(half))
    return _estimate(value, variance)


class _Gaussian(NamedTuple):
    """Mean (d,) and a factor F (r, d) of the covariance F^T F, r <= d."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Gaussian:
        mean = _mean(x)
        r = torch.zeros(0, x.shape[1], dtype=torch.float64, device=x.device)
        # At least as many rows as columns at a time: the factor so far is factored along.
        for rows in x.split(max(_rows_of(x.shape[1]), x.shape[1])):
            r = torch.linalg.qr(torch.cat([r, rows.double() - mean]), mode="r").R
        return cls(mean, r / math.sqrt(len(x) - 1))

    def distance(self, other: _Gaussian, s: Tensor | None = None) -> float:
        """To another. s: singular values of F F'^T, if known."""
        root = torch.linalg.svdvals(self.factor @ other.factor.T) if s is None else s
        trace = self.factor.square().sum() + other.factor.square().sum() - 2 * root.sum()
        return float((self.mean - other.mean).square().sum() + trace)

    def influence(self, x: Tensor, other: Tensor, axes: Tensor, s: Tensor) -> tuple[Tensor, int]:
        """Of every sample on the distance to another Gaussian, and the rank of the covariance.
        other: its mean. axes: singular vectors of F F'^T on this side. s: its singular values."""
        u, scales, v = torch.linalg.svd(self.factor, full_matrices=False)
        size = scales[0] + self.mean.norm()  # of what was subtracted, too
        keep = scales > size * max(x.shape) * torch.finfo(torch.float64).eps
        back = (v[keep].T / scales[keep]) @ (u[:, keep].T @ axes)  # F^+ axes: T = back s back^T
        shift, out = 2 * (self.mean - other), []
        for rows in _pieces(x):
            w = rows - self.mean
            out.append(w.square().sum(1) + w @ shift - (w @ back).square() @ s)
        return torch.cat(out), int(keep.sum())


# Precision and recall


class PrecisionRecall(NamedTuple):
    """Part of the samples that is in the reference, and part of the reference that they reach."""

    precision: Estimate
    recall: Estimate


class DensityCoverage(NamedTuple):
    """In how many of its neighbourhoods a sample is, of those it would be in if it came from the
    reference; and part of the neighbourhoods with a sample."""

    density: Estimate
    coverage: Estimate


def precision_recall(x: Samples, y: Samples, *, k: int = 3, seed: int = 0) -> PrecisionRecall:
    """Improved precision and recall of samples x for a reference y (Kynkaanniemi et al., arXiv
    1904.06991): precision is the part of x in the union of balls around all y_j that reach to their
    k-th nearest neighbour in y; recall is the part of y in that of x.

    Intervals are about the mean over other x and y of these sizes. The variance is that of a
    jackknife over 20 random groups of each: a bootstrap's repeated samples would shrink the balls.
    The interval is Wilson's for as many independent trials as have this variance, so that 0 and 1
    have intervals too. Where a few outliers with large balls make the recall, nothing that is
    computed from one x and y knows it: the interval is too narrow there.
    """
    a, b = _both(x, y, 2 * _GROUPS)
    parts = []
    for tested, centres in ((a, b), (b, a)):
        balls = _Balls.around(centres, tested, k, seed)
        values, without = balls.means(balls.counts > 0)
        variance = _jackknife(values[1:]) + _jackknife(without)
        parts.append(_proportion(values[0], variance, len(tested)))
    return PrecisionRecall(*parts)


def density_coverage(x: Samples, y: Samples, *, k: int = 5, seed: int = 0) -> DensityCoverage:
    """Density and coverage of samples x for a reference y (Naeem et al., Reliable fidelity and
    diversity metrics for generative models, arXiv 2002.09797), with the balls of
    `precision_recall`: the number of pairs with x_i in the ball of y_j, over k n, and the part of
    the balls with an x_i inside. For equal distributions, whatever they are, density has mean 1
    and coverage 1 - (m - 1) ... (m - k) / ((m + n - 1) ... (m + n - k)), about 1 - 2^-k at n = m.

    Intervals as there; that of density, which has no upper end, is Student's.
    """
    a, b = _both(x, y, 2 * _GROUPS)
    balls = _Balls.around(b, a, k, seed)
    values, without = balls.means(balls.counts / k)
    reach = _T * math.sqrt(_jackknife(values[1:]) + _jackknife(without))
    few = -math.log(0.025) / (k * len(a))  # 97.5 % upper end where no pair was seen
    value = float(values[0])
    density = Estimate(value, max(0.0, value - reach), value + max(reach, few))
    values, without = balls.reached()
    variance = _jackknife(values[1:]) + _jackknife(without)
    return DensityCoverage(density, _proportion(values[0], variance, len(b)))


class _Balls(NamedTuple):
    """Balls around m centres and n tested samples, both in random groups.

    Axes of 1 + _GROUPS: with all centres, then without one group of them.
    counts: (n, 1 + _GROUPS) balls that a sample is in. radii: (m, 1 + _GROUPS), -1 for no ball.
    nearest: (_GROUPS, m) distance from a centre to the nearest sample of a group.
    tested, centres: groups of the samples and of the centres.
    """

    counts: Array
    radii: Array
    nearest: Array
    tested: Array
    centres: Array

    @classmethod
    def around(cls, y: Tensor, x: Tensor, k: int, seed: int) -> _Balls:
        most = len(y) - 1 - math.ceil(len(y) / _GROUPS)
        if not 1 <= k <= most:
            raise ValueError(f"k = {k}; need 1 to {most} for {len(y)} samples")
        rng = np.random.default_rng(seed)
        tested, centres = (
            torch.from_numpy(rng.permutation(len(v)) % _GROUPS).to(v.device) for v in (x, y)
        )
        distance = _distance(_mean(y))
        radii = []
        for part, d in _against(y, y, distance):
            d[:, part].fill_diagonal_(math.inf)
            # So many that k are left without any group.
            near, who = d.topk(len(y) - 1 - most + k, largest=False)
            its = [near[:, k - 1]]
            for g in range(_GROUPS):
                rank = (centres[who] != g).cumsum(1)
                its.append(near.gather(1, (rank < k).sum(1, keepdim=True))[:, 0])
            radii.append(torch.stack(its, 1))
        r = torch.cat(radii)
        r[torch.arange(len(y), device=y.device), centres + 1] = -1
        counts, nearest = [], torch.full((_GROUPS, len(y)), math.inf).to(r)
        for part, d in _against(x, y, distance):
            counts.append(torch.stack([(d <= each).sum(1) for each in r.T], 1))
            for g in range(_GROUPS):
                its = d[tested[part] == g]
                nearest[g] = torch.minimum(nearest[g], its.amin(0)) if len(its) else nearest[g]
        found = (torch.cat(counts), r, nearest, tested, centres)
        return cls(*(v.cpu().numpy() for v in found))

    def means(self, of: np.ndarray) -> tuple[Array, list[float]]:
        """Of values (n, 1 + _GROUPS): over the samples; and over those outside each group."""
        return of.mean(0), [float(of[self.tested != g, 0].mean()) for g in range(_GROUPS)]

    def reached(self) -> tuple[list[float], list[float]]:
        """The part of the balls with a sample inside: with all centres and without each group of
        them; and without each group of the samples."""
        inside = self.nearest.min(0)[:, None] <= self.radii
        own = self.centres
        without = [np.delete(self.nearest, g, 0).min(0) <= self.radii[:, 0] for g in range(_GROUPS)]
        return (
            [float(inside[own != g, g + 1].mean()) for g in range(-1, _GROUPS)],
            [float(these.mean()) for these in without],
        )


def _jackknife(without: Sequence[float] | Array) -> float:
    """Variance of a statistic from its values without each group."""
    return (_GROUPS - 1) * float(np.var(without))


def _proportion(p: float, variance: float, trials: int) -> Estimate:
    """Wilson's interval for as many trials as have this variance."""
    about = (p * trials + 2) / (trials + 4)  # not 0 and not 1
    n = min(about * (1 - about) / variance, trials) if variance > 0 else trials
    q = _T * _T / n
    centre, reach = p + q / 2, math.sqrt(q * p * (1 - p) + q * q / 4)
    return Estimate(p, max(0.0, (centre - reach) / (1 + q)), min(1.0, (centre + reach) / (1 + q)))


# Features


def features(
    x: Samples,
    network: Callable[[Tensor], Tensor],
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """Features (n, d) of samples (n, *sample) on the host: network(samples) flattened, in batches.

    network: any function of a batch of samples; a module must be in evaluation mode. device: where
        it is; None: where the samples are.
    """
    if isinstance(network, torch.nn.Module) and network.training:
        raise ValueError("network is in training mode, where features depend on the batch: .eval()")
    samples = _tensor(x)
    with torch.no_grad():
        parts = [network(v if device is None else v.to(device)) for v in samples.split(batch)]
    return torch.cat([v.reshape(len(v), -1).cpu() for v in parts])


def bundled_features(
    name: str, *, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """The features of a network that ships with the package, as a `network` of `features`: those of
    `models.classifier(name)`, which `models.find(model).features` names for a bundled model.

    For images like those of that model only: (n, 1, 8, 8) digits, (n, 3, 32, 32) crops of
    photographs. They have mean 0 and standard deviation 1 over the data, so that the square of one
    of these is the unit of a Frechet distance; `models.data_features(name)` are those of the data.
    """
    return classifier(name, device).features


def inception(
    *, data_range: tuple[float, float] = (-1.0, 1.0), layer: str = "2048", weights: Any = None
) -> Callable[[Tensor], Tensor]:
    """The Inception network of FID as torch-fidelity has it (the original weights and resizing), as
    a `network` of `features`: images (n, 3, h, w), or (n, 1, h, w) for grey, in `data_range`,
    rounded to 8 bits as the published numbers are.

    layer: "64", "192", "768", "2048" or "logits". weights: a file; None: what torch-fidelity
    downloads. Needs torch-fidelity.
    """
    low, high = data_range
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"data_range = {data_range}; need finite numbers low < high")
    try:
        from torch_fidelity import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ImportError(
            "fewstep.metrics.inception needs torch-fidelity: pip install torch-fidelity"
        ) from error
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [layer], feature_extractor_weights_path=weights
    )

    def of(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x has shape {tuple(x.shape)}; need images (n, 3 or 1, h, w)")
        unit = ((x.float() - low) / (high - low)).clamp(0, 1)
        bytes_ = (255 * unit).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return network.to(x.device)(bytes_)[0]

    return of
