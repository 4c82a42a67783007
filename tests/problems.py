"""Processes and exact problems that several test files iterate over."""

from __future__ import annotations

import math

import numpy as np
import torch

import fewstep as fs

#: Every process of the package, by a short name; tests iterate over it.
PROCESSES: dict[str, fs.Process] = {
    "vp": fs.VP(),
    "cosine": fs.CosineVP(),
    "cosine to alpha 0": fs.CosineVP(t_start=1.0),
    "trigonometric": fs.CosineVP(s=0.0, t_start=1.0),
    "linear table": fs.DiscreteVP.linear(),
    "scaled-linear table": fs.DiscreteVP.scaled_linear(),
    "squared-cosine table": fs.DiscreteVP.squared_cosine(),
    "zero terminal SNR": fs.DiscreteVP.scaled_linear().zero_terminal_snr(),
    "user table": fs.DiscreteVP.from_alphas_cumprod(np.linspace(0.999, 0.01, 50)),
    "ve": fs.VE(),
    "edm": fs.EDM(),
    "flow": fs.Flow(),
    "flow shift 3": fs.Flow(shift=3.0),
    "flow 4096 tokens": fs.Flow.for_tokens(4096),
    "custom": fs.Custom(
        lambda t: np.cos(0.5 * math.pi * t) ** 2,
        lambda t: np.sin(0.5 * math.pi * t),
        t_start=0.99,
        t_end=0.01,
        t_clean=0.0,
    ),
    "custom, time reversed": fs.Custom(
        lambda t: t, lambda t: 1 - t, t_start=0.001, t_end=0.99, t_clean=1.0
    ),
    "custom, scalar functions, no clean end": fs.Custom(
        lambda t: math.exp(-t), lambda t: math.sqrt(t), t_start=4.0, t_end=1e-4
    ),
}


class Mixture:
    """A mixture of isotropic Gaussians in numpy, for tests that take thousands of runs."""

    def __init__(self, components: int = 5, dim: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.means = rng.normal(size=(components, dim)) * 0.45
        self.std = rng.uniform(0.1, 0.3, size=components)
        self.dim = dim

    def denoise(self, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        v = alpha**2 * self.std**2 + sigma**2
        d = x[:, None] - alpha * self.means
        r = -0.5 * (d**2).sum(-1) / v - 0.5 * self.dim * np.log(v)
        r = np.exp(r - r.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        return np.einsum("bk,bkd->bd", r, self.means + (alpha * self.std**2 / v)[:, None] * d)

    def start(self, n: int, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(n, self.dim))


def run(plan: fs.Plan, denoise, x: np.ndarray) -> np.ndarray:
    """A plan by its definition, in numpy: what the real loop must agree with."""
    states, data = {0: x}, {}
    for i, row in enumerate(plan.rows):
        level = plan.asked(i)
        if plan.calls[i] is not None:
            data[i] = denoise(states[i], level.alpha, level.sigma)
        states[i + 1] = sum(c * states[j] for j, c in row.a.items()) + sum(
            c * data[j] for j, c in row.b.items()
        )
    return states[len(plan.rows)]


def network_for(process: fs.Process, predicts: str, denoise) -> fs.Denoiser:
    """A denoiser of convention `predicts` whose network answers from the time it is told."""
    prediction = fs.predictions[predicts]

    def network(x_in: torch.Tensor, t_in: torch.Tensor) -> torch.Tensor:
        t = t_in[0].item() if predicts != "edm" else float(process.time(-4 * t_in[0].item()))
        level = process.level(float(t))
        x = x_in / prediction.scalars(level)[2]
        d = torch.from_numpy(denoise(x.double().numpy(), level.alpha, level.sigma)).to(x)
        u, w = prediction.from_data(level)
        return u * x + w * d

    return fs.Denoiser(network, process, predicts)
