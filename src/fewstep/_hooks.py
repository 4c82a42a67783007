"""Hooks: corrections of the data prediction D before it enters any row, hook(D, level) -> D.

They are for models whose data has known bounds (pixels), where a strong guidance pushes D out of
them. They act on D in every method: where a row is written in the noise prediction, that is the
(x - alpha D) / sigma of the corrected D. A latent has no such bounds: do not clip it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._plan import Hook
from ._process import Level

__all__ = ["chain", "clip", "dynamic_threshold"]


@dataclass(frozen=True)
class _Clip:
    low: float
    high: float

    def __call__(self, D: Tensor, level: Level) -> Tensor:
        return D.clamp(self.low, self.high)


@dataclass(frozen=True)
class _DynamicThreshold:
    quantile: float
    floor: float
    ceiling: float

    def __call__(self, D: Tensor, level: Level) -> Tensor:
        # 16-bit types neither rank nor divide well.
        value = D.to(torch.promote_types(D.dtype, torch.float32))
        s = _quantile(value.reshape(value.shape[0], -1).abs(), self.quantile)
        s = s.clamp(self.floor, self.ceiling).reshape(-1, *(1 for _ in D.shape[1:]))
        return (torch.maximum(torch.minimum(value, s), -s) / s).to(D.dtype)


@dataclass(frozen=True)
class _Chain:
    hooks: tuple[Hook, ...]

    def __call__(self, D: Tensor, level: Level) -> Tensor:
        for hook in self.hooks:
            D = hook(D, level)
        return D


def _quantile(rows: Tensor, q: float) -> Tensor:
    """The quantile of every row, linear between order statistics. torch.quantile refuses more than
    2^24 elements in all, which a batch of large images exceeds."""
    n = rows.shape[1]
    place = q * (n - 1)
    below = math.floor(place)
    value = rows.kthvalue(below + 1, dim=1).values
    if place == below:
        return value
    return torch.lerp(value, rows.kthvalue(below + 2, dim=1).values, place - below)


def clip(low: float = -1.0, high: float = 1.0) -> Hook:
    """D <- min(max(D, low), high): static thresholding."""
    if not low < high:
        raise ValueError(f"low = {low}, high = {high}; need low < high")
    return _Clip(float(low), float(high))


def dynamic_threshold(
    quantile: float = 0.995, floor: float = 1.0, ceiling: float = math.inf
) -> Hook:
    """D <- clip(D, -s, s) / s with s = min(max(quantile of |D| over a sample, floor), ceiling).

    Samples of any number of axes, each by itself; data in [-1, 1] (floor = 1). Nothing is read
    from the device. Source: Imagen (arXiv 2205.11487), section 2.3.

    The published rule has no ceiling. diffusers has one (`sample_max_value`), by default 1.0,
    which makes its "dynamic thresholding" a plain `clip`.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile = {quantile}; need a number in (0, 1]")
    if not (0 < floor <= ceiling and math.isfinite(floor)):
        raise ValueError(f"floor = {floor}, ceiling = {ceiling}; need 0 < floor <= ceiling")
    return _DynamicThreshold(float(quantile), float(floor), float(ceiling))


def chain(*hooks: Hook) -> Hook:
    """One hook after the other, first to last."""
    for hook in hooks:
        if not callable(hook):
            raise ValueError(f"hooks: {hook!r}; need functions of (data prediction, level)")
    return _Chain(hooks)
