"""Predictions: what a network's output means, as four scalars of the noise level.

    out = network(c_in x, c_noise)          D = p x + q out

D is the data prediction E[x_0 | x_t]. With e the noise prediction, x = alpha D + sigma e always
holds, so every convention is a linear combination of x and D, and back:

    name     out                                p                    q
    noise    e                                  1/alpha              -sigma/alpha
    data     D                                  0                    1
    v        alpha e - sigma D                  alpha/(a^2 + s^2)    -sigma/(a^2 + s^2)
    flow     e - D  (velocity)                  1/(alpha + sigma)    -sigma/(alpha + sigma)
    score    -e / sigma                         1/alpha              sigma^2/alpha
    edm      F: D = c_skip x + c_out F          see `edm`

(a = alpha, s = sigma.) noise and score say nothing about the data where alpha = 0.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ._process import Level

__all__ = ["Prediction", "Time", "as_prediction", "convert", "edm", "predictions", "velocity"]

#: What the network is told: "t", "sigma", "rho", "lambda", "edm" (log(rho) / 4), a factor of t,
#: or a function of the Level.
Time = str | float | Callable[[Level], Any]


@dataclass(frozen=True)
class Prediction:
    """A network convention: D = p x + q out with (p, q) = `to_data(level)`; the inverse
    out = u x + w D with (u, w) = `from_data(level)`; the scale of the network's input
    `input_scale(level)`; and the time it is told, `time`.
    """

    name: str
    to_data: Callable[[Level], tuple[Any, Any]]
    from_data: Callable[[Level], tuple[Any, Any]]
    input_scale: Callable[[Level], Any] = lambda level: level.alpha * 0.0 + 1.0
    time: Time = "t"
    #: needs alpha > 0 (noise, score), and noise independent of data (score)
    needs_signal: bool = False
    needs_score: bool = False

    def scalars(self, level: Level) -> tuple[Any, Any, Any, Any]:
        """(p, q, c_in, c_noise) at a level."""
        if self.needs_signal and bool(np.any(np.asarray(level.alpha) == 0)):
            raise ValueError(
                f"predicts = {self.name!r} says nothing about the data where alpha = 0 (t = "
                f"{level.t}); start later, or use a network that predicts data, v or flow"
            )
        p, q = self.to_data(level)
        return p, q, self.input_scale(level), network_time(self.time, level)


def network_time(time: Time, level: Level) -> Any:
    """c_noise at a level, for any way of saying it."""
    if callable(time):
        return time(level)
    if isinstance(time, str):
        return _TIMES[time](level)
    return time * level.t


_TIMES: dict[str, Callable[[Level], Any]] = {
    "t": lambda level: level.t,
    "sigma": lambda level: level.sigma,
    "rho": lambda level: level.rho,
    "lambda": lambda level: level.lam,
    "edm": lambda level: -0.25 * level.lam,
}


def _squared(level: Level) -> Any:
    return level.alpha**2 + level.sigma**2


def edm(sigma_data: float = 0.5, time: Time = "edm") -> Prediction:
    """The preconditioned output F of EDM (arXiv 2206.00364, table 1) for data of standard
    deviation sigma_data, on any process: with y = x / alpha and rho = sigma / alpha,

        D = c_skip y + c_out F(c_in y, log(rho)/4),   c_skip = sd^2 / (rho^2 + sd^2),
        c_out = rho sd / sqrt(rho^2 + sd^2),          c_in = 1 / sqrt(rho^2 + sd^2).
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data = {sigma_data}; need a positive finite number")

    def norm(level: Level) -> Any:
        return np.hypot(level.sigma, sigma_data * level.alpha)

    def to_data(level: Level) -> tuple[Any, Any]:
        n = norm(level)
        return sigma_data**2 * level.alpha / n**2, level.sigma * sigma_data / n

    def from_data(level: Level) -> tuple[Any, Any]:
        p, q = to_data(level)
        return -p / q, 1 / q

    return Prediction("edm", to_data, from_data, lambda level: 1 / norm(level), time)


def velocity(rates: Callable[[Any], tuple[Any, Any]], time: Time = "t") -> Prediction:
    """The velocity u = dx/dt of any path in its own time, u = alpha' D + sigma' e:

        D = (sigma u - sigma' x) / (alpha' sigma - sigma' alpha)

    rates: t -> (alpha', sigma'), derivatives in the network's time. For a straight path they are
    (-1, 1), which is "flow"; for times that run from noise to data, (1, -1). It is a velocity that
    `convert` turns into a score: s = -e / sigma.
    """

    def to_data(level: Level) -> tuple[Any, Any]:
        da, ds = rates(level.t)
        w = da * level.sigma - ds * level.alpha
        return -ds / w, level.sigma / w

    def from_data(level: Level) -> tuple[Any, Any]:
        da, ds = rates(level.t)
        return ds / level.sigma, da - ds * level.alpha / level.sigma

    return Prediction("velocity", to_data, from_data, time=time)


predictions: dict[str, Prediction] = {
    p.name: p
    for p in (
        Prediction(
            "noise",
            lambda n: (1 / n.alpha, -n.sigma / n.alpha),
            lambda n: (1 / n.sigma, -n.alpha / n.sigma),
            needs_signal=True,
        ),
        Prediction(
            "data",
            lambda n: (n.alpha * 0.0, n.alpha * 0.0 + 1.0),
            lambda n: (n.alpha * 0.0, n.alpha * 0.0 + 1.0),
        ),
        Prediction(
            "v",
            lambda n: (n.alpha / _squared(n), -n.sigma / _squared(n)),
            lambda n: (n.alpha / n.sigma, -_squared(n) / n.sigma),
        ),
        Prediction(
            "flow",
            lambda n: (1 / (n.alpha + n.sigma), -n.sigma / (n.alpha + n.sigma)),
            lambda n: (1 / n.sigma, -(n.alpha + n.sigma) / n.sigma),
        ),
        Prediction(
            "score",
            lambda n: (1 / n.alpha, n.sigma**2 / n.alpha),
            lambda n: (-1 / n.sigma**2, n.alpha / n.sigma**2),
            needs_signal=True,
            needs_score=True,
        ),
        edm(),
    )
}


def as_prediction(predicts: str | Prediction, time: Time | None = None) -> Prediction:
    """Look a prediction up by name, and say what time the network is told."""
    if isinstance(predicts, str):
        if predicts not in predictions:
            raise ValueError(unknown("predicts", predicts, predictions))
        predicts = predictions[predicts]
    elif not isinstance(predicts, Prediction):
        raise ValueError(f"predicts = {predicts!r}; give one of {', '.join(predictions)}")
    if time is None:
        return predicts
    if isinstance(time, str) and time not in _TIMES:
        raise ValueError(unknown("time", time, _TIMES))
    return replace(predicts, time=time)


def convert(out: Any, x: Any, level: Level, source: str | Prediction, target: str | Prediction):
    """The output that a network of convention `target` would give where one of convention
    `source` gave `out` at state x: (u' + w' p) x + w' q out. Scalars in float64."""
    p, q, _, _ = as_prediction(source).scalars(level)
    if not bool(np.all(np.asarray(level.sigma) > 0)):
        raise ValueError(f"level: sigma = {level.sigma}; conversions need sigma > 0")
    u, w = as_prediction(target).from_data(level)
    return (u + w * p) * x + (w * q) * out


def unknown(argument: str, value: str, known: Any) -> str:
    """One sentence for a name that does not exist, with the nearest that does."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{argument} = {value!r} is not known; {hint}accepted: {', '.join(names)}"
