"""Time shift: the network is told the time at which a state with this variance belongs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._denoiser import Model, Wrapper, told_integers
from ._process import Level

__all__ = ["TimeShifted", "sample_mean"]

#: Candidates in a window of continuous times; odd, so that the nominal time is one.
_CANDIDATES = 129


def sample_mean(v: Tensor) -> Tensor:
    """The mean of every sample (n, ...) -> (n,), bit for bit the same in every batch: a pairwise
    sum of halves. The order in which torch sums depends on shape, alignment and device."""
    v = v.reshape(v.shape[0], -1)
    n = v.shape[1]
    while v.shape[1] > 1:
        half = v.shape[1] // 2
        pairs = v[:, :half] + v[:, half : 2 * half]
        v = torch.cat([pairs, v[:, 2 * half :]], dim=1) if v.shape[1] % 2 else pairs
    return v[:, 0] / n


@dataclass(frozen=True)
class TimeShifted(Wrapper):
    """A model whose network is told, for every sample, the time that the variance of its state
    belongs to, while the coefficients of the solver keep t:

        tau = argmin over [t - window / 2, t + window / 2] of |Var(x) - (alpha^2 v + sigma^2)|

    with Var(x) the variance over the elements of a sample and alpha, sigma at tau. It counters
    exposure bias: a state that an imperfect model and coarse steps have made carries another amount
    of noise than its time says. No evaluation is added and nothing is read from the device.

    model: any model; goes inside or outside `Guided`. Out of it, both halves are told the same.
    window: width, in the times of the process. Whole times stay whole. 0 does nothing.
    cutoff: shift only at times noisier than this one; None: at all.
    data_var: v, the mean over data of the variance over the elements of one. 0 as in the paper.

    Source: Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps
    (arXiv 2305.15583), on VP tables of 1000 times, with v = 0: then the rule is informative where
    the data hardly counts, hence the cutoff. Its (window, cutoff): PNDM (5, 550), DPM-Solver
    (30, 300), DEIS of order 2 (10, 900); they depend on the number of steps and the data. The
    official code departs from the paper: for PNDM and DDIM the target time of the step is shifted
    and the network told the scheduled one; for DPM-Solver the variance is that of the network's
    output; for DEIS the window is twice as wide. This is the paper's rule. For data of unit
    variance on a VP process the variance of x is 1 at every time, and no such rule says anything.
    """

    model: Model
    window: float
    cutoff: float | None = None
    data_var: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, Model):
            raise ValueError(f"model = {self.model!r}; need a Denoiser or another model")
        if not 0 <= self.window < math.inf:
            raise ValueError(f"window = {self.window}; need a finite width >= 0, in times")
        if not 0 <= self.data_var < math.inf:
            raise ValueError(f"data_var = {self.data_var}; need a finite variance >= 0")
        if self.cutoff is not None and not math.isfinite(float(self.process.lam(self.cutoff))):
            raise ValueError(f"cutoff = {self.cutoff}; need a time between the ends, or None")

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        n = x_in[0].numel()
        if n < 2:
            raise ValueError(f"x has {n} element per sample; TimeShifted needs a variance of 2")
        times = np.atleast_1d(level.t)
        # Inside `Guided` there are two halves, and a level has an entry for each sample of one.
        times = np.tile(times, x_in.shape[0] // len(times)) if len(times) > 1 else times
        nominal = self.process.level(times)
        told = self._candidates(nominal)
        shape = told.t.shape
        _, _, c_in, c_noise = (np.broadcast_to(v, shape) for v in self.prediction.scalars(told))
        base = np.broadcast_to(self.prediction.scalars(nominal)[2], times.shape)[:, None]
        whole = told_integers(self.rounds, self.prediction)
        wide = torch.promote_types(x_in.dtype, torch.float32)
        variance = told.alpha**2 * self.data_var + told.sigma**2
        table = torch.from_numpy(np.stack([variance * base**2, c_in / base, c_noise]))
        variance, scale, c_noise = table.to(wide).to(x_in.device, non_blocking=True)
        v = x_in.to(wide)
        v = v - sample_mean(v).reshape(-1, *(1,) * (v.ndim - 1))
        v = sample_mean(v.square()) * (n / (n - 1))
        # The first of equals is the one nearest to the nominal time.
        best = (v[:, None] - variance).abs().argmin(dim=1, keepdim=True)
        rows = (x_in.shape[0], shape[1])
        t_in = c_noise.expand(rows).gather(1, best)[:, 0].to(torch.int64 if whole else t_in.dtype)
        if bool((c_in != base).any()):
            scale = scale.expand(rows).gather(1, best).reshape(-1, *(1,) * (x_in.ndim - 1))
            x_in = (x_in * scale).to(x_in.dtype)
        return self.model.output(x_in, t_in, level, cond)

    def _candidates(self, nominal: Level) -> Level:
        """Levels (n, k), those nearest to the nominal times first."""
        half = 0.5 * self.window
        if self.rounds:
            reach = np.arange(1, math.floor(half) + 1)
        else:
            reach = half * np.arange(1, _CANDIDATES // 2 + 1) / (_CANDIDATES // 2)
        steps = np.concatenate([[0.0], np.stack([reach, -reach], axis=1).reshape(-1)])
        low, high = sorted((self.process.t_start, self.process.t_end))
        t = nominal.t[:, None]
        t = np.clip(t + steps, np.minimum(low, t), np.maximum(high, t))
        if self.cutoff is not None:
            late = nominal.lam >= float(self.process.lam(self.cutoff))
            t = np.where(late[:, None], nominal.t[:, None], t)
        return self.process.level(t)
