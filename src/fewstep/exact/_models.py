"""The three exact models; see `ExactModel` for the mathematics they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._base import Components, ExactModel, Label, Moments

__all__ = ["Empirical", "Gaussian", "Mixture"]

Array: TypeAlias = ArrayLike | Tensor
Covariance: TypeAlias = Array | tuple[Array, Array]

#: Entries of the matrix batch x data points held at once: on a CPU what its caches hold, if that is
#: enough rows for a matrix product.
_CHUNK, _CACHED, _ROWS = 2**22, 2**18, 32


class Gaussian(ExactModel):
    """N(mean, cov), with the ODE solution in closed form.

    `mean` has the shape of a sample (d elements). `cov` is one of: the variance, a number; the
    variances of the elements, in the shape of a sample; the matrix (d, d) acting on the flattened
    sample; its eigen-decomposition, a tuple of eigenvalues (d,) and orthonormal columns (d, d).

    Each eigenmode of x - alpha mean is proportional to sqrt(alpha^2 e + sigma^2) along the ODE,
    e its variance.
    """

    def __init__(self, mean: Array, cov: Covariance) -> None:
        mu = _tensor("mean", mean)
        variances, basis = _spectrum("cov", cov, mu)
        super().__init__(
            mu.shape, mu.new_ones(1), mu.reshape(1, -1), variances[None], _stack([basis])
        )

    def solve(
        self,
        x: Tensor,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        label: Label | None = None,
    ) -> Tensor:
        """Exact solution at level `end` of the probability-flow ODE through `x` at level `start`.

        As for every exact model, but to rounding error and without scipy.
        """
        c = self._components
        self._log_weights(c, label, len(x))
        before, after = (alpha**2 * c.variances[0] + sigma**2 for alpha, sigma in (start, end))
        if not bool((before > 0).all()):
            raise ValueError(f"start: {start}; sigma = 0 is accepted only for a nonsingular cov.")
        y = self._flatten(x.detach()).to("cpu", torch.float64) - start[0] * c.centre
        gain = (after / before).sqrt()
        y = y * gain if c.basis is None else ((y @ c.basis[0]) * gain) @ c.basis[0].T
        return (y + end[0] * c.centre).view(x.shape).to(x.device)


class Mixture(ExactModel):
    """sum_k weights_k N(means_k, covs_k), K components with any covariances.

    `means` has shape (K, *shape); `covs` holds K covariances, each in a form that `Gaussian`
    accepts; `labels` (K,), non-negative integers, optionally give the class of each component.
    """

    def __init__(
        self,
        weights: Array,
        means: Array,
        covs: Sequence[Covariance] | Tensor | np.ndarray,
        *,
        labels: Label | None = None,
    ) -> None:
        w, mu = _tensor("weights", weights), _tensor("means", means)
        if mu.ndim == 0 or w.shape != mu.shape[:1] or len(covs) != len(mu):
            raise ValueError(
                f"weights, means, covs: shape {tuple(w.shape)}, shape {tuple(mu.shape)} and "
                f"{len(covs)} covariances; accepted are (K,), (K, *shape) and K."
            )
        if not (bool((w > 0).all()) and abs(float(w.sum()) - 1) < 1e-6):
            raise ValueError(f"weights: {w.tolist()}; accepted are positive numbers that sum to 1.")
        spectra = [_spectrum(f"covs[{k}]", covs[k], mu[k]) for k in range(len(mu))]
        variances = torch.stack([e.expand(mu[0].numel()) for e, _ in spectra])
        super().__init__(
            mu.shape[1:],
            w / w.sum(),
            mu.reshape(len(mu), -1),
            variances,
            _stack([basis for _, basis in spectra]),
            _labels(labels, len(mu)),
        )


class Empirical(ExactModel):
    """(1/N) sum_i N(data_i, bandwidth^2 I), a data set smoothed by a Gaussian kernel.

    `data` has shape (N, *shape); `labels` (N,), non-negative integers, optionally give the class
    of each point. A prediction takes two matrix products, in blocks over the batch that bound the
    memory. Bandwidth 0 is the data set itself, whose exact samples are its points.
    """

    def __init__(self, data: Array, bandwidth: float, *, labels: Label | None = None) -> None:
        points = _tensor("data", data)
        if points.ndim == 0 or len(points) == 0:
            raise ValueError(f"data: shape {tuple(points.shape)}; accepted is (N, *shape), N >= 1.")
        if not 0 <= bandwidth < math.inf:
            raise ValueError(f"bandwidth: {bandwidth}; accepted are finite numbers >= 0.")
        n = len(points)
        variance = points.new_full((1, 1), bandwidth**2)
        super().__init__(
            points.shape[1:],
            points.new_full((n,), 1 / n),
            points.reshape(n, -1),
            variance,
            labels=_labels(labels, n),
        )

    def _moments(
        self, c: Components, x: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor
    ) -> Moments:
        n = len(c.means)
        rows = max(1, _CHUNK // n)
        if x.device.type == "cpu":
            rows = min(rows, max(_ROWS, _CACHED // n))
        log_weights = log_weights.expand(len(x), -1)
        blocks = zip(*(v.split(rows) for v in (x, alpha, sigma, log_weights)), strict=True)
        return Moments(*map(torch.cat, zip(*(_isotropic(c, *b) for b in blocks), strict=True)))


def _isotropic(
    c: Components, x: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor
) -> Moments:
    """The moments of a mixture whose components share one variance in all directions."""
    s = alpha.square() * c.variances + sigma.square()
    # |x - alpha mu|^2 / 2 without the term |x|^2 / 2 that all components share
    logits = torch.addcmul(
        (alpha / s * x) @ c.means.T, alpha.square() / s, c.half_squares, value=-1
    )
    logits = logits + log_weights
    peak = logits.detach().amax(1, keepdim=True)
    # Far below rounding, and far above where products are denormal, which takes ten times as long.
    r = (logits - peak).clamp(min=2.5 * math.log(torch.finfo(x.dtype).eps)).exp()
    total = r.sum(1, keepdim=True)
    mean = (r @ c.means) / total
    score = (alpha * mean - x) / s
    data = (alpha * c.variances * x + sigma.square() * mean) / s
    shared = (x.square() / s + s.log() + math.log(2 * math.pi)).sum(1) / 2
    return Moments(data, score, (peak + total.log())[:, 0] - shared)


def _tensor(name: str, value: object) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: contains nan or infinity; accepted are finite numbers.")
    return tensor


def _labels(labels: Label | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    classes = torch.as_tensor(labels, device="cpu")
    if classes.shape != (n,) or classes.is_floating_point() or bool((classes < 0).any()):
        raise ValueError(
            f"labels: {classes.dtype} of shape {tuple(classes.shape)}; accepted are {n} "
            "non-negative integers."
        )
    return classes.to(torch.int64, copy=True)


def _spectrum(name: str, cov: Covariance, mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (1 or d,) and eigenvectors (d, d), or None for the coordinate axes."""
    d = mean.numel()
    if isinstance(cov, tuple) and len(cov) == 2 and np.ndim(cov[1]) == 2:
        variances, basis = _tensor(name, cov[0]), _tensor(name, cov[1])
        accepted = variances.shape == (d,) and basis.shape == (d, d)
        if not accepted or not torch.allclose(basis.T @ basis, torch.eye(d).to(basis), atol=1e-6):
            raise ValueError(
                f"{name}: eigenvalues {tuple(variances.shape)}, eigenvectors {tuple(basis.shape)}; "
                f"accepted are ({d},) and orthonormal columns ({d}, {d})."
            )
    else:
        matrix = _tensor(name, cov)
        if matrix.ndim == 0 or matrix.shape == mean.shape:
            variances, basis = matrix.reshape(-1), None
        elif matrix.shape == (d, d):
            skew = float((matrix - matrix.T).abs().max())
            if skew > 1e-6 * float(matrix.abs().max()):
                raise ValueError(
                    f"{name}: differs from its transpose by {skew:.3g}; accepted are symmetric "
                    "matrices."
                )
            variances, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
        else:
            raise ValueError(
                f"{name}: shape {tuple(matrix.shape)}; accepted are a number, variances of shape "
                f"{tuple(mean.shape)}, a matrix ({d}, {d}) or its eigen-decomposition."
            )
    if float(variances.min()) < -1e-6 * float(variances.abs().max()):
        raise ValueError(
            f"{name}: smallest eigenvalue {float(variances.min()):.3g}; accepted are "
            "positive semi-definite covariances."
        )
    return variances.clamp(min=0), basis


def _stack(bases: Sequence[Tensor | None]) -> Tensor | None:
    sizes = [basis for basis in bases if basis is not None]
    if not sizes:
        return None
    axes = torch.eye(len(sizes[0]), dtype=torch.float64)
    return torch.stack([axes if basis is None else basis for basis in bases])
