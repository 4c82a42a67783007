"""Where a run starts, if not at the start of its process: image to image, inversion, hand-over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._denoiser import Model
from ._grids import DEFAULT_GRID, as_grid, times
from ._noise import Noise
from ._prediction import unknown
from ._process import Array, Level, Process

__all__ = ["Segment", "Start", "add_noise", "start_time"]

#: A time, or {"t" | "sigma" | "rho" | "lambda" | "strength": value}.
Start = float | Mapping[str, float]

_KINDS = ("t", "sigma", "rho", "lambda", "strength")
#: Steps of the fine grid on which a strength is looked up.
_FINE = 1000


@dataclass(frozen=True)
class Segment(Process):
    """A process that starts or ends elsewhere, or whose network knows integer times only (or does
    not): what grids are laid on and solvers see."""

    whole: Process
    t_start: float  # pyright: ignore[reportIncompatibleVariableOverride]
    t_end: float  # pyright: ignore[reportIncompatibleVariableOverride]
    integer_times: bool  # pyright: ignore[reportIncompatibleVariableOverride]
    t_clean: float | None = field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_clean", self.whole.t_clean)

    def alpha(self, t: ArrayLike) -> Array:
        return self.whole.alpha(t)

    def sigma(self, t: ArrayLike) -> Array:
        return self.whole.sigma(t)

    def lam(self, t: ArrayLike) -> Array:
        return self.whole.lam(t)

    def time(self, lam: ArrayLike) -> Array:
        return self.whole.time(lam)

    def warp(self, u: ArrayLike) -> Array:
        return self.whole.warp(u)

    def unwarp(self, t: ArrayLike) -> Array:
        return self.whole.unwarp(t)

    def knots(self, lam_from: float, lam_to: float) -> Array:
        return self.whole.knots(lam_from, lam_to)


def start_time(process: Process, start: Any, grid: Any, final: str, rounds: bool) -> float:
    """The time that `start` names, checked; the nearest integer where the network knows no other.
    `grid`, `final`: what a strength is a share of."""
    if isinstance(start, Mapping):
        if len(start) != 1:
            raise ValueError(f"start = {dict(start)!r}; give one of {', '.join(_KINDS)}")
        (kind, value) = next(iter(start.items()))
        if kind not in _KINDS:
            raise ValueError(unknown("start", str(kind), _KINDS))
    else:
        kind, value = "t", start
    if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(float(value)):
        raise ValueError(f"start = {start!r}; need a finite number")
    value = float(value)
    if kind == "strength":
        if not 0 < value <= 1:
            raise ValueError(f"start = {start!r}; a strength is in (0, 1]")
        discrete = as_grid(grid).discrete
        fine = int(min(_FINE, abs(process.t_start - process.t_end))) if discrete else _FINE
        # not moved to distinct integers: so many would fill any range evenly
        nodes = times(process, grid, fine, final, False)
        finite = np.isfinite(nodes)
        t = float(np.interp((1 - value) * fine, np.arange(fine + 1)[finite], nodes[finite]))
    elif kind == "t":
        t = value
    elif kind == "sigma":
        t = _time_of_sigma(process, value)
    else:
        if kind == "rho" and not value > 0:
            raise ValueError(f"start = {start!r}; need sigma / alpha > 0")
        t = float(process.time(-np.log(value) if kind == "rho" else value))
    t = float(np.round(t)) if rounds else t
    low, high = sorted((process.t_start, process.t_end))
    if not low <= t <= high:
        ends = [process.level(s) for s in (process.t_start, process.t_end)]
        raise ValueError(
            f"start = {start!r} is t = {t:g}; accepted: t from {ends[0].t:g} to {ends[1].t:g}, "
            f"which is sigma from {ends[0].sigma:g} to {ends[1].sigma:g}"
        )
    return t


def _time_of_sigma(process: Process, sigma: float) -> float:
    """The noisiest time at which sigma(t) is this, by bisection in lambda."""
    noisy, clean = process.lam_start, float(process.lam(process.t_end))
    ends = [float(process.sigma(process.time(lam))) for lam in (noisy, clean)]
    if not ends[1] <= sigma <= max(ends[0], float(process.sigma(process.t_start))):
        raise ValueError(
            f"start = {{'sigma': {sigma:g}}}; accepted: sigma from {ends[0]:g} to {ends[1]:g}"
        )
    if sigma >= ends[0]:
        return process.t_start
    for _ in range(200):
        middle = 0.5 * (noisy + clean)
        if middle in (noisy, clean):
            break
        above = float(process.sigma(process.time(middle))) > sigma
        noisy, clean = (middle, clean) if above else (noisy, middle)
    return float(process.time(0.5 * (noisy + clean)))


def add_noise(
    on: Process | Model,
    x: Tensor,
    start: Start,
    *,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    noise: Tensor | None = None,
    grid: Any = DEFAULT_GRID,
    final: str = "zero",
) -> Tensor:
    """alpha x + sigma eps at the level that `start` names: what a run with this `start` begins
    with. x: data, (batch, ...). grid, final: those of the run, if `start` is a strength.

    seed, first: as in `sample`. noise: eps itself instead, in the shape of x.
    """
    process, rounds = (on.process, on.rounds) if isinstance(on, Model) else (on, on.integer_times)
    level: Level = process.level(start_time(process, start, grid, final, rounds))
    dtype = torch.promote_types(x.dtype, torch.float32)
    if noise is None:
        source = Noise(seed, first)
        eps: Tensor = process.noise_from(source.start(x.shape, dtype, x.device), source)
    elif not isinstance(noise, Tensor) or noise.shape != x.shape:
        shape = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise is {shape}; need a tensor of the shape of x, {tuple(x.shape)}")
    else:
        eps = noise.to(x.device, dtype)
    return level.alpha * x.to(dtype) + level.sigma * eps
