r"""PFGM++: Poisson flow generative models with D extra dimensions.

    p_r(x | x_0) ~ (|x - x_0|^2 + r^2)^(-(N + D) / 2),   r = sigma sqrt(D),
    dx/dsigma = (x - D(x, sigma)) / sigma

for data of N dimensions: with the radius r of the paper written as sigma the ODE is EDM's, and so
are its solvers, grids and preconditioning. D -> infinity is EDM, D = 1 is PFGM. What differs is the
noise, in training and at the start: a Student law instead of a normal one,

    x = x_0 + sigma sqrt(D / chi^2_D) z,   z standard normal, one chi^2 of D degrees per sample.

(The paper draws a radius, R^2 = r^2 B / (1 - B) with B from Beta(N/2, D/2), and a direction: the
same law.) The kernel is no Gaussian, and Gaussian noise does not lead from one level to another:
stochastic solvers, churn, Langevin steps and scores -eps / sigma are not valid for finite D. The
official code leaves churn switched on, with its noise scaled by 0 unless asked otherwise.

Source: PFGM++: Unlocking the potential of physics-inspired generative models (arXiv 2302.04265).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._noise import Draw, Noise
from ._process import EDM, Level

__all__ = ["PFGM"]

#: The normals that a chi-square is made of, and their number among the draws: the last possible.
_CLEAN = Level(0.0, 1.0, 0.0, math.inf)
_DRAW, _NUMBER = Draw(_CLEAN, _CLEAN), 2**48 - 1
#: Pairs of a normal and a uniform per sample. One in 20 is rejected at worst: 32 are never enough
#: with probability 1e-41.
_TRIES = 32


@dataclass(frozen=True)
class PFGM(EDM):
    """EDM's path (alpha = 1, sigma = t) with the noise of PFGM++ for D extra dimensions.

    D: extra dimensions, any positive number; published: 128 (FFHQ), 2048 (CIFAR-10).
    A network of PFGM++ is told sigma as EDM's is: `Denoiser(..., predicts="edm")`.
    """

    D: float = field(default=2048.0, kw_only=True)
    independent: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.D < math.inf:
            raise ValueError(f"D = {self.D}; need a positive finite number (EDM is its limit)")

    @property
    def no_score(self) -> str:
        return "its noise is not normal (PFGM++ with finite D)"

    def radius(self, sigma: float) -> float:
        """r = sigma sqrt(D), the paper's variable."""
        return sigma * math.sqrt(self.D)

    def noise_from(self, z: Tensor, source: Any) -> Tensor:
        """sqrt(D / chi^2_D) z, with a chi^2 for every sample that depends on the seed and the
        index of the sample alone, as z does."""
        if not isinstance(source, Noise):
            raise ValueError(f"noise = {source!r}; PFGM++ starts from a seed or fewstep.Noise")
        scale = (self.D / _chi_square(self.D, source, len(z))).sqrt()
        return z * scale.to(z.dtype).to(z.device).reshape(-1, *(1,) * (z.ndim - 1))


def _chi_square(degrees: float, source: Noise, batch: int) -> Tensor:
    """(batch,) in float64 on the host: 2 Gamma(degrees / 2), exact for any number of degrees.

    Gamma(a), a >= 1, is d v with d = a - 1/3, v = (1 + z / sqrt(9 d))^3, accepted where
    log u < z^2 / 2 + d - d v + d log v (Marsaglia and Tsang 2000: the first of a fixed number of
    tries that is accepted), and Gamma(a) = Gamma(a + 1) u^(1 / a) below.
    """
    like = torch.empty(batch, 2 * _TRIES + 1, dtype=torch.float64)
    normals = source.draw(_DRAW, _NUMBER, like)
    z, u = normals[:, :_TRIES], torch.special.log_ndtr(normals[:, _TRIES:])
    a = degrees / 2
    d = (a if a >= 1 else a + 1) - 1 / 3
    v = (1 + z / math.sqrt(9 * d)) ** 3
    log_v = v.clamp(min=1e-300).log()
    good = (v > 0) & (u[:, 1:] < z.square() / 2 + d - d * v + d * log_v)
    first = good.to(torch.int8).argmax(1, keepdim=True)
    gamma = d * v.gather(1, first)[:, 0]
    return 2 * (gamma if a >= 1 else gamma * (u[:, 0] / a).exp())
