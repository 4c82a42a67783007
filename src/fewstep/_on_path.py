r"""A model trained on one Gaussian path as a model of another.

Two paths at levels of equal lambda are the same state up to scale:

    x' = c x,   c = alpha' / alpha = sigma' / sigma,     D' = D,   eps' = eps

so that D = p x + q out = (p / c) x' + q out: only the prediction's scalars change, and a run costs
what it cost. ODE trajectories and laws are carried over exactly. Exponential rows in lambda (DDIM,
DPM-Solver++, stochastic ones) commute with the change: there it changes nothing but the grid and
the noise level as a function of lambda. Methods whose variable is the path's own time do not.

In velocities it is u'(x') = (c' / c) x' + (dt/dt') c u(x' / c), how "inference-time conversion of
the interpolant" is written (Inference-time scaling for flow models, arXiv 2503.19385; the scheduler
transform of the flow-matching library).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ._denoiser import Model, Wrapper
from ._prediction import Prediction, network_time
from ._process import Level, Process
from ._segment import Segment

__all__ = ["OnPath", "on_path"]


@dataclass(frozen=True)
class _Shared(Segment):
    """The part of a path that another one, `trained`, knows."""

    trained: Process = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "independent", self.trained.independent)

    @property
    def no_score(self) -> str:
        return self.trained.no_score

    def noise_from(self, z: Any, source: Any) -> Any:
        return self.trained.noise_from(z, source)

    def prior_std(self, t: float) -> float:
        here = self.level(t)
        there = _there(self.trained, here)
        return self.trained.prior_std(there.t) * float(_norm(here) / _norm(there))

    def __repr__(self) -> str:
        return f"{self.whole!r} for a model of {self.trained!r}"


def _norm(level: Level) -> Any:
    return np.hypot(level.alpha, level.sigma)


def _there(trained: Process, level: Level) -> Level:
    """The level of equal lambda on the path of training."""
    return trained.level(trained.time(level.lam))


@dataclass(frozen=True)
class OnPath(Wrapper):
    """See `on_path`."""

    model: Model
    path: Process

    @property
    def process(self) -> Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.path

    @property
    def prediction(self) -> Prediction:
        own, trained = self.model.prediction, self.model.process

        def at(level: Level) -> tuple[Level, Any]:
            there = _there(trained, level)
            return there, _norm(there) / _norm(level)

        def to_data(level: Level) -> tuple[Any, Any]:
            there, c = at(level)
            p, q = own.to_data(there)
            return p * c, q

        def from_data(level: Level) -> tuple[Any, Any]:
            there, c = at(level)
            u, w = own.from_data(there)
            return u * c, w

        def input_scale(level: Level) -> Any:
            there, c = at(level)
            return own.input_scale(there) * c

        def told(level: Level) -> Any:
            return network_time(own.time, at(level)[0])

        return replace(
            own, to_data=to_data, from_data=from_data, input_scale=input_scale, time=told
        )

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        return self.model.output(x_in, t_in, _there(self.model.process, level), cond)


def on_path(model: Model, process: Process) -> OnPath:
    """`model`, trained on its own Gaussian path, as a model of `process`.

    Times of `process` where the model's path has no level (lambda beyond its t_start or t_end) are
    left out: t_start and t_end move to the model's. Noise starts at the model's scale, converted.
    """
    if not isinstance(model, Model):
        raise ValueError(f"model = {model!r}; need a Denoiser or another model")
    if not isinstance(process, Process):
        raise ValueError(f"process = {process!r} is not a process; give for example fewstep.VP()")
    if model.rounds or process.integer_times:
        raise ValueError(
            f"process = {process!r} for a model of {model.process!r}; the whole times of one path "
            "are not those of another: give both integer_times = False"
        )
    trained = model.process
    ends = []
    for name, choose in (("t_start", max), ("t_end", min)):
        own, other = getattr(process, name), getattr(trained, name)
        lam, limit = float(process.lam(own)), float(trained.lam(other))
        ends.append(own if choose(lam, limit) == lam else float(process.time(limit)))
    if not process.lam(ends[0]) < process.lam(ends[1]):
        raise ValueError(f"process = {process!r} shares no levels with {trained!r}, of the model")
    return OnPath(model, _Shared(process, ends[0], ends[1], False, trained=trained))
