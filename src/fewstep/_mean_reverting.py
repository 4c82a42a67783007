r"""Mean-reverting diffusion: paths from an image to a degraded one, for restoration.

    dx = theta_t (mu - x) dt + s sqrt(2 theta_t) dw,      Theta_t = int theta
    x_t = mu + (x_0 - mu) e^-Theta + s sqrt(1 - e^-2Theta) eps

with mu the degraded image and s the stationary standard deviation. y = x - mu is an ordinary
Gaussian path of the data x_0 - mu, with alpha = e^-Theta and sigma = s sqrt(1 - alpha^2), so that
every solver, grid and noise source works on y, and mu enters at the network only (`Centred`).

The samplers of MaRS (Fast sampler for mean reverting diffusion, arXiv 2502.07856), eight formulas
in x and mu, are rows of the exponential families on y: "ddim", "dpmpp_2m_heun" and "noise_ab2"
(ODE, orders 1, 2 data, 2 noise), and the stochastic ones with eta^2 = 1 in data and noise form.

Sources: Image restoration with mean-reverting SDEs (arXiv 2301.11699); 2502.07856. Where the
official samplers depart from this: between levels they interpolate alpha, sigma and lambda each
by itself, so that lambda is not log(alpha / sigma) there; their third order halves a term, as
DPM-Solver++ 3M does; their Heun and Adams-Moulton baselines divide the noise by the diffusion
coefficient instead of sigma, which is not the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._denoiser import Model, Wrapper
from ._plan import Hook
from ._prediction import Prediction
from ._process import Array, DiscreteVP, Level, Process
from ._sampling import sample

__all__ = ["Centred", "MeanReverting", "restore"]

#: Outputs that are the same for x and for y; and those that contain the mean, as data does.
_INVARIANT, _WITH_MEAN = ("noise", "score", "v", "flow", "velocity"), ("data", "edm")


@dataclass(frozen=True)
class MeanReverting(Process):
    """The path of y = x - mu, on a table of theta: alpha_i = alpha_end^(S_i / S_n), S_i the sum of
    theta up to i, sigma = std sqrt(1 - alpha^2). Between levels log alpha is linear in t.

    std: s, 50 / 255 in restoration. Pure noise has this standard deviation; what is left of the
        data there, alpha_end (x_0 - mu), is ignored, as in the papers.
    t_clean: the time where alpha = 1, one before the first level of the table: -1 (MaRS, DA-CLIP:
        the table starts at 0), or 0 (the first IR-SDE code, which leaves theta_0 out).
    integer_times: False, as the published samplers take times between levels too.

    `.cosine()`, `.linear()` and `.constant()` are the published schedules; `.from_thetas(...)`
    takes any.
    """

    log_alphas: tuple[float, ...] = field(repr=False)
    std: float = 50 / 255
    name: str = "table"
    integer_times: bool = False
    t_clean: float | None = -1.0
    t_start: float = field(init=False, repr=False)
    t_end: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"std = {self.std}; need a positive finite number (s in [0, 1] units)")
        if self.t_clean is None or not math.isfinite(self.t_clean):
            raise ValueError(f"t_clean = {self.t_clean}; need a finite time, -1 or 0 as published")
        object.__setattr__(self, "t_start", self.t_clean + self._vp.t_start + 1)
        object.__setattr__(self, "t_end", self.t_clean + self._vp.t_end + 1)

    @cached_property
    def _vp(self) -> DiscreteVP:
        """The same alphas with sigma^2 = 1 - alpha^2, its clean end at t = -1."""
        return DiscreteVP(self.log_alphas, self.name)

    @classmethod
    def from_thetas(
        cls,
        thetas: ArrayLike,
        alpha_end: float = 0.005,
        std: float = 50 / 255,
        *,
        name: str = "thetas",
        t_clean: float = -1.0,
        integer_times: bool = False,
    ) -> MeanReverting:
        """From theta_i > 0, one per level, scaled so that the last level has alpha_end."""
        thetas = np.asarray(thetas, dtype=np.float64)
        if thetas.ndim != 1 or thetas.size < 2 or not (np.isfinite(thetas) & (thetas > 0)).all():
            raise ValueError(
                f"thetas has shape {thetas.shape}; need two or more positive numbers, one per level"
            )
        if not 0 < alpha_end < 1:
            raise ValueError(f"alpha_end = {alpha_end}; need a number between 0 and 1")
        total = np.cumsum(thetas)
        table = tuple((math.log(alpha_end) * total / total[-1]).tolist())
        return cls(table, std, name, integer_times, t_clean)

    @classmethod
    def cosine(cls, n: int = 100, alpha_end: float = 0.005, std: float = 50 / 255) -> MeanReverting:
        """theta_i = 1 - c(i + 1), c(i) = cos^2((i / (n + 2) + s) / (1 + s) pi / 2) / c(0), s =
        0.008, at the levels 0 to n. The default."""
        angle = (np.arange(n + 3) / (n + 2) + 0.008) / 1.008 * math.pi / 2
        c = np.cos(angle) ** 2
        return cls.from_thetas(1 - c[1:-1] / c[0], alpha_end, std, name=f"cosine({n})")

    @classmethod
    def linear(cls, n: int = 100, alpha_end: float = 0.005, std: float = 50 / 255) -> MeanReverting:
        """theta_i from 1 to 200 in equal steps (the scale does not matter), levels 0 to n."""
        return cls.from_thetas(np.linspace(1.0, 200.0, n + 1), alpha_end, std, name=f"linear({n})")

    @classmethod
    def constant(
        cls, n: int = 100, alpha_end: float = 0.005, std: float = 50 / 255
    ) -> MeanReverting:
        """theta_i = 1 at the levels 0 to n."""
        return cls.from_thetas(np.ones(n + 1), alpha_end, std, name=f"constant({n})")

    def _index(self, t: ArrayLike) -> Array:
        assert self.t_clean is not None
        return np.asarray(t, dtype=np.float64) - (self.t_clean + 1)

    def alpha(self, t: ArrayLike) -> Array:
        return self._vp.alpha(self._index(t))

    def sigma(self, t: ArrayLike) -> Array:
        return self.std * self._vp.sigma(self._index(t))

    def lam(self, t: ArrayLike) -> Array:
        return self._vp.lam(self._index(t)) - math.log(self.std)

    def time(self, lam: ArrayLike) -> Array:
        assert self.t_clean is not None
        shifted = np.asarray(lam, dtype=np.float64) + math.log(self.std)
        return self._vp.time(shifted) + (self.t_clean + 1)

    def knots(self, lam_from: float, lam_to: float) -> Array:
        shift = math.log(self.std)
        return self._vp.knots(lam_from + shift, lam_to + shift) - shift

    def prior_std(self, t: float) -> float:
        return self.std

    @property
    def velocity(self) -> Prediction:
        """dy/dphi with alpha = cos(phi), sigma = s sin(phi), MaRS's velocity:
        D - mu = alpha y - (sigma / s) v, eps = (alpha v + (sigma / s) y) / s."""
        s = self.std

        def to_data(level: Level) -> tuple[Any, Any]:
            return level.alpha, -level.sigma / s

        def from_data(level: Level) -> tuple[Any, Any]:
            return s * level.alpha / level.sigma, -s / level.sigma

        return Prediction("velocity", to_data, from_data)


@dataclass(frozen=True)
class Centred(Wrapper):
    """A model of x as a model of y = x - mean: the network is asked about y + mean.

    mean: a tensor that broadcasts against the batch of states, or has one entry per sample.

    Predictions of noise, score and velocities are the same in x and y; data predictions lose the
    mean. Sampling gives y, hooks are called with D - mean; `restore` puts the mean back in both.
    Wrap a `Guided` model as a whole.
    """

    model: Model
    mean: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.model, Model):
            raise ValueError(f"model = {self.model!r}; need a Denoiser or another model")
        if not (isinstance(self.mean, Tensor) and self.mean.is_floating_point()):
            raise ValueError(f"mean is {type(self.mean).__name__}; need a floating-point tensor")
        name = self.prediction.name
        if name not in (*_INVARIANT, *_WITH_MEAN):
            raise ValueError(
                f"model predicts {name!r}; Centred knows what a mean does to "
                f"{', '.join((*_INVARIANT, *_WITH_MEAN))}"
            )

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Any) -> Tensor:
        p, q, c_in, _ = self.prediction.scalars(level)
        mean = self.mean.to(x_in.device, x_in.dtype)
        try:
            mean = mean.expand(x_in.shape)
        except RuntimeError:
            raise ValueError(
                f"mean has shape {tuple(self.mean.shape)}; need one that broadcasts against the "
                f"states, {tuple(x_in.shape)}"
            ) from None
        out = self.model.output(x_in + _times(c_in, mean), t_in, level, cond)
        if self.prediction.name in _INVARIANT or out.shape != mean.shape:
            return out  # a wrong shape is reported by check_output
        return out + _times((p - 1) / q, mean)


def _times(c: Any, v: Tensor) -> Tensor:
    """c v, where c is a number or one per sample."""
    if np.ndim(c) == 0:
        return v if c == 1 else v * float(c)
    column = torch.as_tensor(c).to(v.device, v.dtype)
    return v * column.reshape(-1, *(1,) * (v.ndim - 1))


def restore(
    model: Model,
    degraded: Tensor,
    *,
    x: Tensor | None = None,
    hook: Hook | None = None,
    **options: Any,
) -> Tensor:
    """Draw one restored image for every degraded one: `sample` on y = x - degraded, and back.

    model: a Denoiser on a `MeanReverting` process. degraded: mu, (batch, ...). If the network takes
        it as a condition too, give it in `cond`.
    x: start from this state instead of degraded + noise. hook: sees and returns D itself.
    options: those of `sample` (solver, nfe, grid, seed, noise, cond, ...).
    """
    if not isinstance(degraded, Tensor) or degraded.ndim < 1:
        raise ValueError(f"degraded is {type(degraded).__name__}; need a tensor, batch first")
    centred = Centred(model, degraded)
    if x is not None:
        options["x"] = x - degraded
    options.setdefault("device", degraded.device)
    y = sample(centred, degraded.shape, hook=_about(hook, degraded), **options)
    return y + degraded


def _about(hook: Hook | None, mean: Tensor) -> Callable[[Tensor, Level], Tensor] | None:
    """The hook on D as one on D - mean."""
    if hook is None:
        return None
    return lambda data, level: hook(data + mean, level) - mean
