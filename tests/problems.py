"""Processes and exact problems that several test files iterate over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._noise import Draw


def in_turn(share: int, *axes: Iterable[Any]) -> list[Any]:
    """All combinations, for `parametrize`: one of `share` of them in the fast suite, chosen so that
    every entry of every axis comes up, and the others in the slow one."""
    return [
        pytest.param(
            *(value for _, value in combination),
            id="-".join(str(value) for _, value in combination),
            marks=[] if sum(i for i, _ in combination) % share == 0 else pytest.mark.slow,
        )
        for combination in itertools.product(*map(enumerate, axes))
    ]


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


def normals(plan: fs.Plan, shape: tuple[int, ...], seed: int = 2) -> np.ndarray:
    """Standard normals for the draws of a plan, (draws, *shape)."""
    return np.random.default_rng(seed).normal(size=(len(plan.draws), *shape))


def run(plan: fs.Plan, denoise, x: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
    """A plan by its definition, in numpy: what the real loop must agree with. draws: of the plan's
    noise; default `normals`."""
    return walk(plan, denoise, x, draws)[-1]


def walk(plan: fs.Plan, denoise, x: np.ndarray, draws: np.ndarray | None = None) -> list:
    """Every state of `run`."""
    z = normals(plan, x.shape) if draws is None else draws
    states, data = [x], {}
    for i, row in enumerate(plan.rows):
        level = plan.asked(i)
        if plan.calls[i] is not None:
            data[i] = denoise(states[i], level.alpha, level.sigma)
        parts = ((row.a, states), (row.b, data), (row.e, z))
        states.append(sum(c * values[j] for terms, values in parts for j, c in terms.items()))
    return states


class Normal:
    """Data N(mean, std^2), for which every state of a plan is an affine function of the start and
    the draws: its law is exact, without sampling."""

    def __init__(self, mean: float = 0.7, std: float = 0.4) -> None:
        self.mean, self.std = mean, std

    def moments(self, level: fs.Level) -> tuple[float, float]:
        """Mean and standard deviation of the process at a level."""
        return level.alpha * self.mean, math.hypot(level.alpha * self.std, level.sigma)

    def gain(self, alpha: float, sigma: float) -> float:
        """Slope of the data prediction: D = mean + gain (x - alpha mean)."""
        return alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)

    def states(self, plan: fs.Plan, start: tuple[float, float] | None = None) -> np.ndarray:
        """(states, 2 + draws): every state over (1, the start's normal, the draws). start: mean and
        standard deviation there; default: of the process."""

        def denoise(v: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
            gain = self.gain(alpha, sigma)
            out = gain * v
            out[0] += self.mean * (1 - gain * alpha)
            return out

        unit = np.eye(2 + len(plan.draws))
        mean, std = self.moments(plan.levels[0]) if start is None else start
        return np.array(walk(plan, denoise, mean * unit[0] + std * unit[1], unit[2:]))

    def laws(self, plan: fs.Plan) -> np.ndarray:
        """(states, 2): mean and standard deviation of every state."""
        v = self.states(plan)
        return np.stack([v[:, 0], np.sqrt((v[:, 1:] ** 2).sum(1))], axis=1)

    def gap(self, plan: fs.Plan) -> float:
        """Wasserstein-2 distance of the law of the result to that of the process there."""
        return float(np.hypot(*(self.laws(plan)[-1] - self.moments(plan.levels[-1]))))


def reverse_sde(
    order: int = 1, eta2: float = 1.0, *, weight: float = 0.5, spread: float = 1.0
) -> fs.Multistep:
    """The data-form reverse SDE with constant noise level squared eta2, by hand: D held over the
    step (order 1, weak and strong), or through the last two (order 2, weak),

        x_t = (sigma_t / sigma_s) e^-E x_s + alpha_t A (D_s + w (h / h_prev) (D_s - D_prev))
              + sigma_t sqrt(1 - e^-2E) z,        E = eta2 h,  A = 1 - e^-(h + E),  w = 1/2

    weight (w) and spread (a factor of the variance of what is drawn) are there to be wrong.
    """

    def step(process: fs.Process, history: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        start, *older = history
        h, rest = end.lam - start.lam, [0.0] * (len(history) - 1)
        E = eta2 * h if eta2 else 0.0
        data = end.alpha * -math.expm1(-h - E) if eta2 else end.alpha * -math.expm1(-h)
        b, reached = [data, *rest], 1
        if older and end.sigma > 0 and math.isfinite(older[0].lam):
            slope = weight * data * h / (start.lam - older[0].lam)
            b, reached = [data + slope, -slope], 2
        a = [end.sigma / start.sigma * math.exp(-E), *rest]
        if not eta2 or end.sigma == 0:
            return fs.Formula(a, b, reached)
        draw = Draw(start, end, (eta2 * start.lam, eta2 * end.lam))
        noise = {draw: end.sigma * math.sqrt(-math.expm1(-2 * E) * spread)}
        return fs.Formula(a, b, reached, exact=spread == 1, noise=noise)

    return fs.Multistep(
        f"reverse_sde({order}, {eta2:g})",
        order,
        step,
        "by hand, for tests",
        "start-up orders 1, 2, ...; at sigma = 0 order 1",
        stochastic=eta2 > 0,
        strong_order=1 if eta2 else 0,
        scaled=lambda s: reverse_sde(order, eta2 * s * s, weight=weight, spread=spread),
        member=("ddim", "dpmpp_2m")[order - 1],
    )


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
