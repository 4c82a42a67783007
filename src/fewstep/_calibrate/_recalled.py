"""The first evaluation once per condition instead of once per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._denoiser import Model, Wrapper
from .._noise import start_noise
from .._process import Level
from ._teacher import taken

__all__ = ["Recalled"]


class Recalled(Wrapper):
    """A model whose data prediction from pure noise is remembered, one for each condition.

    At the start of a process with little signal, D(x, t_start, cond) hardly depends on x: it is the
    mean of the data under the condition. Here it is that, the average over `count` fixed noises,
    asked for when a condition is met first: `count` evaluations per condition instead of one per
    sample. Everywhere else it is the model. A plan of N + 1 evaluations costs N on it.

    Plans must be learned on it to be worth it: their other N evaluations are then placed where they
    are needed. `evaluations` counts what means have cost.
    """

    def __init__(self, model: Model, count: int = 4, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count = {count}; need an integer >= 1")
        self.model, self.count, self.seed = model, count, seed
        self.evaluations = 0
        self._means: dict[Any, Tensor] = {}

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        first = np.ravel(np.asarray(level.t) == self.process.t_start)
        if not first.any():
            return self.model.output(x_in, t_in, level, cond)
        batch = len(x_in)
        if len(first) not in (1, batch) or t_in.ndim != 1:
            raise ValueError("Recalled: levels along other axes than the batch are not supported")
        rows = [i for i in range(batch) if first[i if len(first) > 1 else 0]]
        start = self.process.level(self.process.t_start)
        p, q, c_in, _ = (float(s) for s in self.prediction.scalars(start))
        mean = torch.stack([self._mean(x_in, t_in, start, cond, i) for i in rows])
        recalled = (mean.to(x_in) - p * (x_in[rows] / c_in)) / q
        if len(rows) == batch:
            return recalled
        rest = [i for i in range(batch) if not first[i]]
        here = Level(*(np.asarray(v)[rest] for v in (level.t, level.alpha, level.sigma, level.lam)))
        asked = self.model.output(x_in[rest], t_in[rest], here, taken(cond, rest, batch))
        out = asked.new_empty(x_in.shape)
        out[rest], out[rows] = asked, recalled.to(asked.dtype)
        return out

    def _mean(
        self, x_in: Tensor, t_in: Tensor, start: Level, cond: Mapping[str, Any], i: int
    ) -> Tensor:
        """Of the condition of sample i."""
        one = taken(cond, [i], len(x_in))
        key = (tuple(x_in.shape[1:]), str(x_in.device), _key(one))
        if key not in self._means:
            p, q, c_in, c_noise = (float(s) for s in self.prediction.scalars(start))
            shape = (self.count, *x_in.shape[1:])
            dtype = torch.promote_types(x_in.dtype, torch.float32)
            z = start_noise(shape, self.seed, first=0, dtype=dtype, device=x_in.device)
            x = z * self.process.prior_std(self.process.t_start)
            many = taken(one, [0] * self.count, 1)
            told = t_in.new_full((self.count,), c_noise)
            with torch.no_grad():
                out = self.model.output((c_in * x).to(x_in.dtype), told, start, many)
            self.evaluations += self.count
            self._means[key] = (p * x + q * out.to(dtype)).mean(0)
        return self._means[key]


def _key(value: Any) -> Any:
    """A condition as something that can be looked up."""
    if isinstance(value, Mapping):
        return tuple((k, _key(value[k])) for k in sorted(value))
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.detach().float().cpu().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (value.shape, value.tobytes())
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    return value
