"""What all exact models share: a mixture of Gaussians held by its eigen-decompositions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import _process as path
from .._denoiser import Denoiser
from .._prediction import Prediction, Time, as_prediction
from .._process import Process
from ._solve import integrate

__all__ = ["Components", "ExactModel", "Label", "Level", "Moments"]

Level: TypeAlias = ArrayLike | Tensor
Label: TypeAlias = ArrayLike | Tensor


class Components(NamedTuple):
    """K Gaussians in d dimensions; `variances` may have size 1 in place of K or d."""

    centre: Tensor  # (d,), the mean of the mixture
    means: Tensor  # (K, d), relative to the centre, which limits cancellation
    half_squares: Tensor  # (K,), |mean|^2 / 2
    variances: Tensor  # (K, d), eigenvalues of the covariances
    log_weights: Tensor  # (K,)
    basis: Tensor | None  # (K, d, d), eigenvectors in columns; None: the coordinate axes


class Moments(NamedTuple):
    """Posterior mean of the data (B, d), score (B, d) and log-density (B,) of noisy states."""

    data: Tensor
    score: Tensor
    log_density: Tensor


class ExactModel(ABC):
    """x_0 ~ sum_k w_k N(mu_k, C_k), exact at every level (alpha, sigma) of every path.

    With C_k = V_k diag(e_k) V_k^T, y_k = V_k^T (x - alpha mu_k) and s_k = alpha^2 e_k + sigma^2:

        r_k   = softmax_k( log w_k - 1/2 sum y_k^2 / s_k - 1/2 sum log s_k )
        D     = sum_k r_k ( mu_k + V_k (alpha e_k / s_k) y_k )
        score = - sum_k r_k V_k (y_k / s_k)
        eps   = - sigma score

    No form divides a difference by alpha or sigma, so D stays accurate as alpha -> 0 and eps as
    sigma -> 0. Both ends are allowed; at sigma = 0 a singular covariance gives non-finite values.

    States `x` have shape (B, *shape), levels are one number or one per sample. Results have the
    dtype and device of `x`; 16-bit states are computed in float32. `label` restricts a model that
    has labels to the components of one class: one integer or one per sample, -1 meaning all.

    Attributes: `shape` of one sample; `labels`, the class of each component (K,) or None; `std`,
    the root mean square over elements of the standard deviation of the data.
    """

    @abstractmethod
    def __init__(
        self,
        shape: Sequence[int],
        weights: Tensor,
        means: Tensor,
        variances: Tensor,
        basis: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Take float64 tensors on the CPU: (K,), (K, d), then as in `Components`."""
        centre = weights @ means
        means = means - centre
        squares = means.square().sum(1)
        spread = squares / len(centre) + variances.mean(1)
        self.shape = tuple(shape)
        self.labels = labels
        self.std = math.sqrt(weights @ spread)
        self._components = Components(centre, means, squares / 2, variances, weights.log(), basis)
        self._copies: dict[tuple[torch.dtype, torch.device], Components] = {}

    def predict(
        self, x: Tensor, alpha: Level, sigma: Level, *, label: Label | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data and noise predictions (D, eps), with alpha D + sigma eps = x."""
        moments = self._evaluate(x, alpha, sigma, label)
        eps = -_column("sigma", sigma, moments.score) * moments.score
        return moments.data.to(x.dtype).view_as(x), eps.to(x.dtype).view_as(x)

    def denoise(
        self, x: Tensor, alpha: Level, sigma: Level, *, label: Label | None = None
    ) -> Tensor:
        """Data prediction D = E[x_0 | x]."""
        return self._evaluate(x, alpha, sigma, label).data.to(x.dtype).view_as(x)

    def score(self, x: Tensor, alpha: Level, sigma: Level, *, label: Label | None = None) -> Tensor:
        """Gradient of the log-density of x: -eps / sigma, with its limit at sigma = 0."""
        return self._evaluate(x, alpha, sigma, label).score.to(x.dtype).view_as(x)

    def denoiser(
        self, process: Process, predicts: str | Prediction = "data", time: Time | None = None
    ) -> Denoiser:
        """This model as a network of any convention on any process: a stand-in for a pretrained
        one whose every answer is known. Conditions: cond={"label": ...} where there are labels.

        The network answers from the time it is told, like a real one, so a float32 state limits
        its level to float32. `time` as in `Denoiser`, but not "sigma" or a function, which are
        not inverted here.
        """
        prediction = as_prediction(predicts, time)
        to_lam = {"lambda": 1.0, "edm": -4.0}

        def level_of(t: np.ndarray) -> path.Level:
            told = prediction.time
            if told == "t":
                return process.level(t)
            if isinstance(told, (int, float)):
                return process.level(t / told)
            if told == "rho":
                return process.level(process.time(-np.log(t)))
            if isinstance(told, str) and told in to_lam:
                return process.level(process.time(to_lam[told] * t))
            raise ValueError(f"time: {told!r}; accepted are 't', 'rho', 'lambda', 'edm', a factor.")

        def network(x_in: Tensor, t_in: Tensor, label: Label | None = None) -> Tensor:
            level = level_of(t_in.double().cpu().numpy())
            columns = (-1, *(1 for _ in self.shape))

            def per_sample(value: np.ndarray) -> Tensor:
                array = np.broadcast_to(value, t_in.shape).copy()
                return torch.from_numpy(array).to(x_in.device, x_in.dtype).reshape(columns)

            x = x_in / per_sample(prediction.scalars(level)[2])
            data, eps = self.predict(x, level.alpha, level.sigma, label=label)
            # out = u x + w D with x = alpha D + sigma eps, so that no D is recovered from x
            u, w = prediction.from_data(level)
            mixed = per_sample(u * level.alpha + w) * data
            return mixed + per_sample(u * level.sigma) * eps

        level_of(np.ones(1))
        return Denoiser(network, process, prediction)

    def log_density(
        self, x: Tensor, alpha: Level, sigma: Level, *, label: Label | None = None
    ) -> Tensor:
        """Log-density of x at this level, in nats, shape (B,)."""
        return self._evaluate(x, alpha, sigma, label).log_density.to(x.dtype)

    def sample(
        self,
        n: int,
        seed: int,
        *,
        label: Label | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """`n` independent draws of x_0 on the CPU; drawn in float64 and then cast to `dtype`."""
        c = self._components
        generator = torch.Generator().manual_seed(seed)
        weights = self._log_weights(c, label, n).exp()
        draws = n if len(weights) == 1 else 1
        k = torch.multinomial(weights, draws, replacement=True, generator=generator).flatten()
        z = torch.randn(n, len(c.centre), generator=generator, dtype=torch.float64)
        z = z * c.variances.expand(len(c.means), -1)[k].sqrt()
        for i, columns in enumerate(() if c.basis is None else c.basis):
            z[k == i] = z[k == i] @ columns.T
        return (c.centre + c.means[k] + z).to(dtype).view(n, *self.shape)

    def solve(
        self,
        x: Tensor,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        label: Label | None = None,
    ) -> Tensor:
        """Exact solution at level `end` of the probability-flow ODE through `x` at level `start`.

        Levels are pairs (alpha, sigma) of any path, in either direction, and may be clean
        (sigma = 0) or pure noise (alpha = 0). The result is float64, with a relative error near
        1e-12 times the amplification of the flow itself, which is large for the rare states that
        pass close to the boundary between two modes. Needs scipy.
        """
        state = self._flatten(x.detach()).to("cpu", torch.float64).view(-1, *self.shape)
        labels = None if label is None else _column("label", label, state, torch.int64)
        smallest = math.sqrt(float(self._components.variances.min()))

        def solve_one(i: int) -> Tensor:
            chosen = None if labels is None else labels[i]

            def predict(y: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
                return self.predict(y, alpha, sigma, label=chosen)

            return integrate(
                predict, state[i : i + 1], start, end, std=self.std or 1.0, smallest=smallest
            )

        # One sample at a time: each gets the steps it needs and the accuracy asked for.
        return torch.cat([solve_one(i) for i in range(len(state))] or [state]).to(x.device)

    def _moments(
        self, c: Components, x: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor
    ) -> Moments:
        """Moments at centred states (B, d); levels (B, 1) and log-weights (1 or B, K)."""
        alpha, sigma = alpha[:, :, None], sigma[:, :, None]
        s = alpha.square() * c.variances + sigma.square()
        y = x[:, None] - alpha * c.means
        if c.basis is not None:
            y = torch.einsum("kij,bki->bkj", c.basis, y)
        log_s = s.log().expand_as(y) + math.log(2 * math.pi)
        logits = log_weights - (y.square() / s + log_s).sum(2) / 2
        r = logits.softmax(1)
        data, score = alpha * c.variances / s * y, -y / s
        if c.basis is not None:
            data, score = (torch.einsum("kij,bkj->bki", c.basis, v) for v in (data, score))
        data = torch.einsum("bk,bki->bi", r, c.means + data)
        return Moments(data, torch.einsum("bk,bki->bi", r, score), logits.logsumexp(1))

    def _evaluate(self, x: Tensor, alpha: Level, sigma: Level, label: Label | None) -> Moments:
        flat = self._flatten(x)
        c = self._on(flat)
        a, s = _column("alpha", alpha, flat), _column("sigma", sigma, flat)
        moments = self._moments(c, flat - a * c.centre, a, s, self._log_weights(c, label, len(x)))
        return moments._replace(data=moments.data + c.centre)

    def _flatten(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape or x.ndim != len(self.shape) + 1 or not x.is_floating_point():
            raise ValueError(
                f"x: {x.dtype} of shape {tuple(x.shape)}; accepted is a floating-point batch of "
                f"shape (B, {', '.join(map(str, self.shape))})."
            )
        flat = x.reshape(len(x), math.prod(self.shape))
        return flat.to(torch.promote_types(x.dtype, torch.float32))

    def _on(self, x: Tensor) -> Components:
        """The parameters in the dtype and on the device of `x`, converted once."""
        key = (x.dtype, x.device)
        if key not in self._copies:
            *tensors, basis = self._components
            with torch.inference_mode(False):  # else a later autograd could not use the copies
                self._copies[key] = Components(
                    *(p.to(x.dtype).to(x.device) for p in tensors),
                    basis=None if basis is None else basis.to(x.dtype).to(x.device),
                )
        return self._copies[key]

    def _log_weights(self, c: Components, label: Label | None, n: int) -> Tensor:
        """Normalised log-weights (1 or n, K) of the components of the given classes."""
        if label is None:
            return c.log_weights[None]
        if self.labels is None:
            raise ValueError(f"label: {label} given; this model has no labels and accepts None.")
        wanted = torch.as_tensor(label, device=c.log_weights.device).reshape(-1, 1)
        if len(wanted) not in (1, n):
            raise ValueError(f"label: {len(wanted)} values; accepted are 1 or {n}, one per sample.")
        chosen = (wanted == self.labels.to(wanted.device)) | (wanted == -1)
        if not bool(chosen.any(1).all()):
            raise ValueError(
                f"label: {label}; accepted are -1 and {self.labels.unique().tolist()}."
            )
        return c.log_weights.masked_fill(~chosen, -math.inf).log_softmax(1)


def _column(name: str, value: Level, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One number per sample of `x`, shape (B, 1), by default of the dtype of `x`."""
    column = torch.as_tensor(value, dtype=dtype or x.dtype, device=x.device).reshape(-1, 1)
    if len(column) not in (1, len(x)):
        raise ValueError(
            f"{name}: {len(column)} values; accepted are 1 or {len(x)}, one per sample."
        )
    return column.expand(len(x), 1)
