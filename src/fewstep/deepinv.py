"""deepinv (https://deepinv.org): its denoisers as models, models as its denoisers, and its physics
in any solver.

    model = fs.deepinv.model(denoiser)                        their denoiser, our samplers
    denoiser = fs.deepinv.Denoiser(model)                     our model, their algorithms
    hook = fs.deepinv.consistent(physics, y)                  A D = y in every evaluation (DDNM)
    hook = fs.deepinv.proximal(physics, y, sigma=0.05)        the same for noisy y (DiffPIR)
    model = fs.deepinv.posterior(model, physics, y, sigma=0.05)     gradient of the likelihood (DPS)

    x = fs.sample(model, shape, nfe=20, hook=hook)            then (x + 1) / 2 in deepinv's scale

deepinv's images are in [0, 1], and so are its noise levels and its measurements' preimages. Those
of models are in `data_range`, by default (-1, 1); everything here converts between the two. Nothing
is imported: any object with the methods of a `Physics`, any function (x, sigma), will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._denoiser import Denoiser as _FewstepDenoiser
from ._denoiser import Model, Wrapper
from ._plan import Hook
from ._process import EDM, Level

__all__ = ["Denoiser", "Posterior", "consistent", "model", "posterior", "proximal"]

Range = tuple[float, float]


@dataclass(frozen=True)
class _Scale:
    """u in [0, 1] is x = low + width u."""

    low: float
    width: float

    @classmethod
    def of(cls, data_range: Range) -> _Scale:
        low, high = data_range
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"data_range = {data_range}; need finite numbers low < high")
        return cls(float(low), float(high - low))

    def unit(self, x: Tensor) -> Tensor:
        return (x - self.low) / self.width

    def data(self, u: Tensor) -> Tensor:
        return self.low + self.width * u


class _Unit(torch.nn.Module):
    """A denoiser of [0, 1] as one of the data range, in x = x_0 + sigma eps."""

    def __init__(self, denoiser: Callable[..., Tensor], scale: _Scale) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        u = self.denoiser(self.scale.unit(x), sigma.to(x.dtype) / self.scale.width, **cond)
        return self.scale.data(u)


def model(
    denoiser: Callable[..., Tensor],
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    data_range: Range = (-1.0, 1.0),
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """A deepinv denoiser, (x, sigma) -> x with x in [0, 1], as a model: D(x, t) with sigma = t.

    sigma_min, sigma_max: the noise levels it was trained for, in the scale of `data_range`: with
        (-1, 1) twice those of deepinv. Many restoration networks know little noise only (DRUNet:
        0.2 here 0.4); begin there, from a noisy image: `fs.sample(model, x=..., start=...)`.
    dtype: what the denoiser wants (None: as the state). Conditions are passed on.
    """
    if not callable(denoiser):
        raise ValueError(f"denoiser = {denoiser!r} is not callable; give denoiser(x, sigma)")
    network = _Unit(denoiser, _Scale.of(data_range))
    return _FewstepDenoiser(network, EDM(sigma_min, sigma_max), "data", "sigma", dtype=dtype)


class Denoiser(torch.nn.Module):
    """A model as a deepinv denoiser: (x, sigma) -> E[u | x] for x = u + sigma eps, u in [0, 1].

    sigma: a number, or one per sample, with any axes of size 1 behind. sigma = 0 returns x. Beyond
    the levels that the network knows it is told the nearest that it knows. Further keyword
    arguments are conditions (so are `cond`, for all calls); gradients pass through.
    """

    def __init__(
        self,
        model: Model,
        *,
        data_range: Range = (-1.0, 1.0),
        cond: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.scale, self.cond = model, _Scale.of(data_range), dict(cond or {})
        while isinstance(model, Wrapper):
            model = model.model
        self.network = getattr(model, "network", None)  # its parameters are this module's

    def forward(self, x: Tensor, sigma: Any, **cond: Any) -> Tensor:
        """Denoise x (batch, ...)."""
        given = torch.as_tensor(sigma).detach().double().cpu().numpy().reshape(-1)
        if given.size not in (1, len(x)) or not (np.isfinite(given) & (given >= 0)).all():
            raise ValueError(f"sigma = {given.tolist()}; need one number >= 0, or one per sample")
        process = self.model.process
        with np.errstate(divide="ignore"):
            lam = -np.log(self.scale.width * np.broadcast_to(given, len(x)))
        ends = sorted((float(process.lam(process.t_start)), float(process.lam(process.t_end))))
        t = process.time(np.clip(lam, ends[0], ends[1]))
        t = np.round(t) if self.model.rounds else t
        shape = (-1, *(1 for _ in x.shape[1:]))
        alpha = torch.as_tensor(process.alpha(t)).to(x).reshape(shape)
        D = self.model(alpha * self.scale.data(x), t, **{**self.cond, **cond})
        clean = torch.as_tensor(np.isposinf(lam)).to(x.device).reshape(shape)
        return torch.where(clean, x, self.scale.unit(D))


def consistent(physics: Any, y: Tensor, *, data_range: Range = (-1.0, 1.0)) -> Hook:
    """D <- D + A^+ (y - A D): every data prediction fits the measurements, as exactly as
    `A_dagger` solves (see its physics' `tol`); what A does not see stays as it was. For linear
    physics without noise.

    Source: DDNM (arXiv 2212.00490), algorithm 1.
    """
    scale = _Scale.of(data_range)

    def hook(D: Tensor, level: Level) -> Tensor:
        u = scale.unit(D)
        return scale.data(u + physics.A_dagger(y - physics.A(u)))

    return hook


def proximal(
    physics: Any,
    y: Tensor,
    sigma: float,
    *,
    weight: float = 1.0,
    data_range: Range = (-1.0, 1.0),
) -> Hook:
    """D <- argmin_u  |A u - y|^2 / (2 sigma^2) + weight |u - D|^2 / (2 rho^2): less of D, the more
    noise there is in it (rho = sigma_t / alpha_t).

    physics: linear, with `prox_l2(z, y, gamma)`. sigma: of the noise in y, in y's own scale.
    weight: lambda of the paper. With a deterministic solver this is its zeta = 0; stochastic ones
    take the place of zeta > 0. Source: DiffPIR (arXiv 2305.08995), algorithm 1.
    """
    scale = _Scale.of(data_range)
    if not (sigma > 0 and weight > 0 and math.isfinite(sigma * weight)):
        raise ValueError(
            f"sigma = {sigma}, weight = {weight}; need positive finite numbers (without noise: "
            "consistent)"
        )

    def hook(D: Tensor, level: Level) -> Tensor:
        gamma = (np.asarray(level.rho) / scale.width) ** 2 / (weight * sigma**2)
        if not np.isfinite(gamma).all():
            raise ValueError("proximal: alpha = 0, where D is not known at all; start later")
        u = scale.unit(D)
        if gamma.ndim:
            strength: Any = torch.as_tensor(gamma).to(u).reshape(-1, *(1 for _ in u.shape[1:]))
        else:
            strength = float(gamma)
        return scale.data(physics.prox_l2(u, y, strength))

    return hook


@dataclass(frozen=True)
class Posterior(Wrapper):
    """The model of p(x_0 | y): see `posterior`."""

    model: Model
    physics: Any
    y: Tensor
    sigma: float
    std: float
    weight: float
    scale: _Scale

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        """The raw output that means the data prediction given y."""

        def each(v: Any) -> Any:
            if np.ndim(v) == 0:
                return float(v)
            return torch.as_tensor(v).to(x_in).reshape(-1, *(1 for _ in x_in.shape[1:]))

        p, q, c_in, _ = self.prediction.scalars(level)
        rho = np.asarray(level.rho) / self.scale.width
        variance = self.sigma**2 + 1 / (1 / rho**2 + 1 / self.std**2)
        with torch.enable_grad():
            x_in = x_in.detach().requires_grad_(True)
            out = self.model.output(x_in, t_in, level, cond)
            u = self.scale.unit(each(p / c_in) * x_in + each(q) * out)
            miss = (self.y - self.physics.A(u)).flatten(1).square().sum(1)
            loss = (0.5 * miss / torch.as_tensor(variance).to(miss)).sum()
            (slope,) = torch.autograd.grad(loss, x_in)
        # score' = score - weight d loss/dx, and D = (x + sigma^2 score) / alpha; x_in = c_in x
        return out.detach() - each(self.weight * c_in * level.sigma**2 / (level.alpha * q)) * slope


def posterior(
    model: Model,
    physics: Any,
    y: Tensor,
    sigma: float,
    *,
    std: float = 0.5,
    weight: float = 1.0,
    data_range: Range = (-1.0, 1.0),
) -> Posterior:
    """The model whose score is that of p(x_t) and of the likelihood p(y | x_t) together, the latter
    by the gradient through the network, for any differentiable physics and any solver:

        p(y | x_t) = N(y; A(D(x_t)), sigma^2 + r^2),   1 / r^2 = 1 / rho^2 + 1 / std^2

    It is exact where data is normal with standard deviation std and A A^T = 1. A likelihood that is
    sharper than the solver's steps makes them unstable: take more of them, or a smaller weight.

    sigma: of the noise in y. std: of the data. Both in deepinv's scale, [0, 1]. weight: of the
    likelihood. An evaluation costs a backward pass more, and its memory.
    Source: DPS (arXiv 2209.14687), theorem 1, with the variance r^2 of Pseudoinverse-Guided
    Diffusion Models for Inverse Problems (ICLR 2023).
    """
    if not (sigma >= 0 and std > 0 and math.isfinite(sigma + std + weight)):
        raise ValueError(
            f"sigma = {sigma}, std = {std}, weight = {weight}; need finite numbers, sigma >= 0, "
            "std > 0"
        )
    return Posterior(model, physics, y, sigma, std, weight, _Scale.of(data_range))
