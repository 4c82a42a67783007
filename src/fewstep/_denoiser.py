"""Denoisers: a network together with what its times and its output mean; and guidance around one.

A model is anything with a `process`, a `prediction` and an `output`: what the loop in `_sampling`
needs. `Denoiser` wraps a network, `Guided` wraps a model.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._prediction import Prediction, Time, as_prediction
from ._process import Array, Level, Process

__all__ = ["Denoiser", "Guided", "Model", "Wrapper", "check_output", "device_of", "told_integers"]


def told_integers(rounds: bool, prediction: Prediction) -> bool:
    """Whether a network is told integers: it is evaluated at integer times, and told the time."""
    return rounds and prediction.time == "t"


def device_of(network: Any) -> torch.device:
    """Where a network lives: the host, if it is no module or has no parameters."""
    if isinstance(network, torch.nn.Module):
        for tensor in network.parameters():
            return tensor.device
    return torch.device("cpu")


class Model(abc.ABC):
    """What a sampler needs to know of a network. Calling one gives the data prediction D(x, t)."""

    process: Process
    #: tensors of conditions that one evaluation carries (2 for classifier-free guidance)
    conditions: int = 1

    @property
    @abc.abstractmethod
    def prediction(self) -> Prediction:
        """The meaning of the output."""

    @property
    @abc.abstractmethod
    def rounds(self) -> bool:
        """Whether the network may be evaluated at integer times of the process only."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where the network lives."""

    @abc.abstractmethod
    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        """The raw output for input c_in x and network time c_noise (one per sample)."""

    def __call__(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        """Data prediction D(x, t) = p x + q out, in x's dtype.

        x: (batch, ...). t: a time of the process, or one per sample. cond: passed to the network.
        """
        times = t.detach().cpu().numpy() if isinstance(t, Tensor) else t
        times = np.asarray(times, dtype=np.float64)
        if times.ndim and times.shape != x.shape[:1]:
            raise ValueError(
                f"t has shape {times.shape}; give one time, or one per sample ({x.shape[0]})"
            )
        if self.rounds:
            times = np.round(times)
        level = self.process.level(np.broadcast_to(times, x.shape[:1]))
        p, q, c_in, c_noise = (
            torch.as_tensor(np.broadcast_to(s, x.shape[:1]).copy(), device="cpu")
            for s in self.prediction.scalars(level)
        )

        def per_sample(s: Tensor) -> Tensor:
            return s.to(x.device, x.dtype).reshape(-1, *(1 for _ in x.shape[1:]))

        whole = told_integers(self.rounds, self.prediction)
        kind = torch.int64 if whole else torch.promote_types(x.dtype, torch.float32)
        t_in = c_noise.to(x.device, kind)
        out = self.output(per_sample(c_in) * x, t_in, level, cond)
        check_output(out, x)
        return per_sample(p) * x + per_sample(q) * out.to(x.dtype)


@dataclass(frozen=True)
class Denoiser(Model):
    """A pretrained network with its process and prediction.

    network: called as network(x_in, t_in, **cond); x_in (batch, ...) in `dtype`, t_in (batch,);
        returns a tensor of x_in's shape. Any callable, any number of axes.
    process: the path it was trained on.
    predicts: "noise", "data", "v", "flow", "score", "edm", or a `Prediction`
        (`fewstep.edm(sigma_data)` for preconditioned networks).
    time: what it is told: "t" (default), "sigma", "rho", "lambda", "edm" (log(rho) / 4), a factor
        of t such as 1000, or a function of the level.
    integer_times: the network knows only the integers it was trained on. Default: what the process
        says. Plans then place every evaluation on an integer and compute with exactly that level.
    dtype: what the network wants x in (default: as the state, float32 or float64). Sampling keeps
        its state in float32 or better whatever this is.
    """

    network: Callable[..., Tensor]
    process: Process  # pyright: ignore[reportIncompatibleVariableOverride]
    predicts: str | Prediction = "noise"
    time: Time | None = None
    integer_times: bool | None = None
    dtype: torch.dtype | None = None
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _prediction: Prediction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise ValueError(f"network = {self.network!r} is not callable; give network(x, t)")
        if not isinstance(self.process, Process):
            raise ValueError(
                f"process = {self.process!r} is not a process; give for example fewstep.VP()"
            )
        prediction = as_prediction(self.predicts, self.time)
        if prediction.needs_score and self.process.no_score:
            raise ValueError(
                f"predicts = {prediction.name!r}, but with {self.process!r} there is no score: "
                f"{self.process.no_score}; use 'flow', 'data' or 'noise'"
            )
        object.__setattr__(self, "_prediction", prediction)

    @property
    def prediction(self) -> Prediction:
        return self._prediction

    @property
    def rounds(self) -> bool:
        return self.process.integer_times if self.integer_times is None else self.integer_times

    @property
    def device(self) -> torch.device:
        return device_of(self.network)

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        return self.network(x_in if self.dtype is None else x_in.to(self.dtype), t_in, **cond)


class Wrapper(Model):
    """A model around another, `model`: the same path and convention, another output."""

    model: Model

    @property
    def process(self) -> Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.process

    @property
    def prediction(self) -> Prediction:
        return self.model.prediction

    @property
    def rounds(self) -> bool:
        return self.model.rounds

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def conditions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.conditions


@dataclass(frozen=True)
class Guided(Wrapper):
    """Classifier-free guidance: out = uncond + scale (cond - uncond), in one batched network call
    (arXiv 2207.12598, with scale = 1 + w: 1 is no guidance, 0 is unconditional).

    scale: a number, or one per sample (kept as a tuple), so that requests with different scales
        share a call; every sample gets the bits that it gets alone.
    uncond: the keyword arguments that differ for the unconditional half, as values for the whole
        batch or for one sample ({"label": 10}, {"text": empty_embedding}); nested mappings work.
        Other keyword arguments whose leading axis is the batch are repeated, the rest is passed on.
    interval: (low, high) of rho = sigma / alpha in which guidance acts; outside, the conditional
        output is used alone, at half the cost (arXiv 2404.07724).
    rescale: phi in [0, 1]; pulls the per-sample standard deviation of the guided output back to
        that of the conditional one (arXiv 2305.08891, equations 14-16).

    The network is asked twice about the samples on which guidance acts, once about the others.
    """

    model: Model
    scale: float | Sequence[float] | Array | Tensor
    uncond: Mapping[str, Any]
    interval: tuple[float, float] = (0.0, math.inf)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        given = self.scale.tolist() if isinstance(self.scale, (Tensor, np.ndarray)) else self.scale
        scales = np.asarray(given, dtype=np.float64)
        if scales.ndim > 1 or not scales.size or not np.isfinite(scales).all():
            raise ValueError(
                f"scale = {self.scale}; need a finite number (1 is no guidance), or one per sample"
            )
        object.__setattr__(self, "scale", tuple(scales.tolist()) if scales.ndim else float(scales))
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"interval = {self.interval}; need 0 <= low < high in sigma / alpha")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale = {self.rescale}; need a number in [0, 1]")
        if not self.uncond:
            raise ValueError("uncond is empty; name the arguments of the unconditional half")

    @property
    def conditions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.conditions * (2 if np.any(np.asarray(self.scale) != 1) else 1)

    def _acts(self, x_in: Tensor, t_in: Tensor, level: Level) -> Array:
        """Where guidance acts, as an array that broadcasts against x_in."""
        scales, rho = np.asarray(self.scale), np.asarray(level.rho)
        batch, each = x_in.shape[0], (-1, *(1 for _ in x_in.shape[1:]))
        if scales.ndim and len(scales) != batch:
            raise ValueError(f"scale has {len(scales)} entries for {batch} samples; give one each")
        if rho.ndim and t_in.ndim == 1:  # one level per sample; else per token, and it broadcasts
            rho = rho.reshape(each)
        inside = (rho >= self.interval[0]) & (rho <= self.interval[1])
        acts = (scales.reshape(each) != 1) & inside
        return np.broadcast_to(acts, (batch, *np.shape(acts)[1:]))

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        batch, rows, acts = x_in.shape[0], None, None  # None: all samples, all of them
        if self.scale == 1:
            return self.model.output(x_in, t_in, level, cond)
        if isinstance(self.scale, tuple) or self.interval != (0.0, math.inf):
            acts = self._acts(x_in, t_in, level)
            rows = np.flatnonzero(acts.reshape(batch, -1).any(1)).tolist()
            if not rows:
                return self.model.output(x_in, t_in, level, cond)
            rows, acts = (None, acts) if len(rows) == batch else (rows, acts[rows])
        unknown = sorted(set(self.uncond) - set(cond))
        if unknown:
            raise ValueError(
                f"uncond names {unknown[0]!r}, which the condition lacks; it has: "
                f"{', '.join(sorted(cond)) or 'nothing'}"
            )
        both = {k: _pair(v, self.uncond.get(k, v), batch, rows) for k, v in cond.items()}
        x_two, t_two = (torch.cat([v, _at(v, rows)]) for v in (x_in, t_in))
        out = self.model.output(x_two, t_two, _doubled(level, x_in, t_in, rows), both)
        if out.shape[:1] != x_two.shape[:1]:
            return out  # the wrong shape is reported with the others, by check_output
        with_cond, without = out[:batch], out[batch:]
        chosen = _at(with_cond, rows)
        guided = self._lerp(without, chosen, rows)
        if self.rescale:
            axes = tuple(range(1, out.ndim))
            ratio = chosen.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
            guided = guided * (self.rescale * ratio + (1 - self.rescale))
        if acts is not None and not acts.all():
            mask = torch.as_tensor(acts.copy()).to(x_in.device, non_blocking=True)
            guided = torch.where(mask, guided, chosen)
        if rows is None:
            return guided
        return with_cond.index_copy(0, _index(rows, out.device), guided.to(out.dtype))

    def _lerp(self, without: Tensor, with_cond: Tensor, rows: list[int] | None) -> Tensor:
        """without + scale (with_cond - without), the same bits for one scale and for many."""
        if not isinstance(self.scale, tuple):
            return torch.lerp(without, with_cond, float(self.scale))  # type: ignore[arg-type]
        # In half precision torch computes in float32 with the scale in float32, if it is a number;
        # a tensor of scales would be rounded to half first.
        wide = torch.promote_types(without.dtype, torch.float32)
        scales = np.asarray(self.scale)[slice(None) if rows is None else rows]
        weight = torch.from_numpy(scales).to(wide).to(without.device, non_blocking=True)
        weight = weight.reshape(-1, *(1 for _ in without.shape[1:]))
        return torch.lerp(without.to(wide), with_cond.to(wide), weight).to(without.dtype)


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows).to(device, non_blocking=True)  # waits for nothing


def _at(v: Tensor, rows: list[int] | None) -> Tensor:
    """These samples; None: all."""
    return v if rows is None else v.index_select(0, _index(rows, v.device))


def _doubled(level: Level, x_in: Tensor, t_in: Tensor, rows: list[int] | None) -> Level:
    """The level for the doubled batch."""
    if torch.compiler.is_compiling():  # one level for all there; a look at it would be compiled in
        return level

    def twice(v: Any) -> Any:
        if not isinstance(v, np.ndarray) or (t_in.ndim > 1 and v.ndim < x_in.ndim):
            return v  # the same for every sample
        return np.concatenate([v, v if rows is None else v[rows]])

    return Level(*(twice(v) for v in (level.t, level.alpha, level.sigma, level.lam)))


def _pair(cond: Any, uncond: Any, batch: int, rows: list[int] | None = None) -> Any:
    """The argument for the doubled batch: conditional half first, then `rows` of the other."""
    if isinstance(cond, Mapping):
        return {k: _pair(v, uncond.get(k, v), batch, rows) for k, v in cond.items()}
    if isinstance(cond, Tensor) and cond.ndim and cond.shape[0] == batch:
        other = torch.as_tensor(uncond, dtype=cond.dtype, device=cond.device)
        if other.ndim == cond.ndim and other.shape[0] == 1:
            other = other[0]
        other = other.expand_as(cond)
        return torch.cat([cond, _at(other, rows)])
    if isinstance(cond, (list, tuple)) and len(cond) == batch:
        other = uncond if isinstance(uncond, (list, tuple)) else [uncond] * batch
        return type(cond)([*cond, *(other if rows is None else [other[i] for i in rows])])
    if cond is not uncond:
        raise ValueError(
            f"uncond: a condition of type {type(cond).__name__} without a leading axis of "
            f"{batch} samples cannot be doubled; give one value per sample"
        )
    return cond


def check_output(out: Any, x: Tensor) -> None:
    """A network must return a tensor of the state's shape; say so in one sentence."""
    if not isinstance(out, Tensor):
        raise ValueError(
            f"network returned {type(out).__name__}; give a callable that returns a tensor of "
            f"shape {tuple(x.shape)} (for a diffusers model: lambda x, t: unet(x, t).sample)"
        )
    if out.shape != x.shape:
        hint = ""
        if out.ndim == x.ndim and out.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
            hint = "; twice the channels means a learned variance: return the first half"
        raise ValueError(
            f"network returned shape {tuple(out.shape)} for a state of shape {tuple(x.shape)}; "
            f"the two must agree{hint}"
        )
