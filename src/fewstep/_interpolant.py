r"""Stochastic interpolants with a latent term: between two data sets, neither of them noise.

    x_t = I(t, x_0, x_1) + gamma(t) z,     t from 0 (data x_0) to 1 (data x_1)
    b = E[dI/dt + gamma' z | x_t] = v - gamma gamma' s
    v = E[dI/dt | x_t],    s = -E[z | x_t] / gamma

s is the score of x_t. For any eps(t) >= 0 these have the marginals of x_t:

    dx = b dt                                             either way
    dx = (b + eps s) dt + sqrt(2 eps) dW                  t = 0 to 1
    dx = (b - eps s) dt + sqrt(2 eps) dW                  t = 1 to 0, dt < 0

There is no alpha and sigma, and no solver of the registry applies: `Interpolant.plan` makes plans
of its own, whose rows combine drifts. They are run, saved, interrupted and given noise as all are:

    fs.sample(model, x=x0, solver=model.plan(20))

    euler   X' = X + h f(X, t) + sqrt(2 eps(t) h) Z                            order 1, 1 NFE a step
    heun    X1 = X + h f(X, t) + e Z,  X' = X + h/2 (f(X, t) + f(X1, t')) + e Z    order 2, 2 NFE

with e = sqrt(2 eps((t + t')/2) h), the same Z in both rows. Both have strong order 1 where eps > 0,
on the Brownian path W(t); heun has weak order 2. In these plans a level is (alpha, sigma) =
(1, gamma): the noise around I.

If x_0 is normal and independent of x_1, the latent term only changes the schedule, sigma^2 = a^2 +
gamma^2: use a Gaussian path. Where s is learned, keep eps small toward the data.

Source: Stochastic interpolants: a unifying framework for flows and diffusions (arXiv 2303.08797).
The official code's Heun step for the SDE takes both drifts at the end of the step, which is of
first order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._denoiser import Model, check_output, device_of
from ._noise import Draw
from ._plan import Call, Plan, Row
from ._prediction import Prediction, unknown
from ._process import Array, Level, Process

__all__ = ["Gamma", "Interpolant", "Own", "gammas"]


@dataclass(frozen=True)
class Own(Process):
    """The times of a model that compiles its own plans: no solver knows its path."""

    why: str
    at: Callable[[Any], Level] = field(repr=False)
    t_start: float = 0.0
    t_end: float = 1.0
    t_clean: float | None = field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_clean", self.t_end)

    def level(self, t: Any) -> Level:
        return self.at(t)

    def _refused(self) -> ValueError:
        return ValueError(f"solver: {self.why}; sample with solver=model.plan(...)")

    def alpha(self, t: ArrayLike) -> Array:
        raise self._refused()

    def sigma(self, t: ArrayLike) -> Array:
        raise self._refused()

    def lam(self, t: ArrayLike) -> Array:
        raise self._refused()

    def time(self, lam: ArrayLike) -> Array:
        raise self._refused()


@dataclass(frozen=True)
class Gamma:
    """The scale gamma(t) of the latent term, and the product gamma(t) gamma'(t), finite where
    gamma' alone is not. Functions of numbers or arrays."""

    name: str
    value: Callable[[Any], Any]
    product: Callable[[Any], Any]

    @classmethod
    def brownian(cls, a: float = 1.0) -> Gamma:
        """sqrt(a t (1 - t))."""
        if not 0 < a < math.inf:
            raise ValueError(f"a = {a}; need a positive finite number")
        return cls(
            f"brownian({a:g})", lambda t: np.sqrt(a * t * (1 - t)), lambda t: 0.5 * a * (1 - 2 * t)
        )


def _bump(t: Any) -> tuple[Any, Any]:
    """S(10 t - 4) - S(10 t - 6), 0 at both ends, and its derivative; S the logistic function."""

    def s(u: Any) -> Any:
        return 0.5 * (1 + np.tanh(0.5 * u))

    up, down = s(10 * t - 4), s(10 * t - 6)
    slope = 10 * (up * (1 - up) - down * (1 - down))
    return up - down - (s(-4.0) - s(-6.0)), slope


#: The published ones.
gammas: dict[str, Gamma] = {
    g.name: g
    for g in (
        Gamma("zero", lambda t: 0.0 * t, lambda t: 0.0 * t),
        replace(Gamma.brownian(), name="brownian"),
        Gamma("parabola", lambda t: t * (1 - t), lambda t: t * (1 - t) * (1 - 2 * t)),
        Gamma(
            "sine_squared",
            lambda t: np.sin(math.pi * t) ** 2,
            lambda t: 2 * math.pi * np.sin(math.pi * t) ** 3 * np.cos(math.pi * t),
        ),
        Gamma("sigmoid", lambda t: _bump(t)[0], lambda t: math.prod(_bump(t))),
    )
}


@dataclass(frozen=True)
class Interpolant(Model):
    """Networks of a stochastic interpolant.

    drift: network(x, t, **cond) -> b, or v if `predicts` is "v". x (batch, ...), t (batch,) in
        [0, 1]. score: network of s, called alike; needed where eps > 0, and for v with a gamma that
        is not zero.
    predicts: "b" or "v". gamma: a name in `gammas`, or a `Gamma`; what v needs to become b.
    eps: the noise level of the SDE, a number or a function of t (of numbers and arrays); 0: ODE.
        It is the paper's epsilon, eta^2 g^2 / 2 in terms of a diffusion.
    backward: from t = 1 to t = 0.
    """

    drift: Callable[..., Tensor]
    score: Callable[..., Tensor] | None = None
    predicts: str = "b"
    gamma: str | Gamma = "zero"
    eps: float | Callable[[Any], Any] = 0.0
    backward: bool = False
    _gamma: Gamma = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, network in (("drift", self.drift), ("score", self.score)):
            if network is not None and not callable(network):
                raise ValueError(f"{name} = {network!r} is not callable; give {name}(x, t)")
        if self.predicts not in ("b", "v"):
            raise ValueError(unknown("predicts", str(self.predicts), ("b", "v")))
        gamma = self.gamma
        if not isinstance(gamma, Gamma):
            if gamma not in gammas:
                raise ValueError(unknown("gamma", str(gamma), gammas))
            gamma = gammas[gamma]
        object.__setattr__(self, "_gamma", gamma)
        if not callable(self.eps) and not 0 <= self.eps < math.inf:
            raise ValueError(f"eps = {self.eps}; need a finite number >= 0, or a function of t")
        if self.score is None and self._draws:
            raise ValueError(f"eps = {self.eps!r} without a score; give the network of s, or eps=0")
        if self.score is None and self.predicts == "v" and gamma.name != "zero":
            raise ValueError(
                f"gamma = {gamma.name!r} with predicts = 'v' and no score; b = v - gamma gamma' s "
                "needs one"
            )

    @property
    def _draws(self) -> bool:
        return callable(self.eps) or self.eps > 0

    def _eps(self, t: Any) -> Any:
        value = self.eps(t) if callable(self.eps) else self.eps + 0.0 * t
        if not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
            raise ValueError(f"eps({t}) = {value}; need finite numbers >= 0")
        return value

    def _level(self, t: Any) -> Level:
        t = np.asarray(t, dtype=np.float64) if np.ndim(t) else float(t)
        sigma = self._gamma.value(t)
        with np.errstate(divide="ignore"):
            lam = -np.log(sigma)
        if np.ndim(t) == 0:
            return Level(t, 1.0, float(sigma), float(lam))
        return Level(t, np.ones_like(t), sigma, lam)

    @property
    def process(self) -> Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Own("a stochastic interpolant has no alpha and sigma", self._level)

    @property
    def prediction(self) -> Prediction:
        """The output is the drift f of the run; nothing is made of it."""

        def same(level: Level) -> tuple[Any, Any]:
            return 0.0 * level.alpha, 0.0 * level.alpha + 1.0

        return Prediction("drift", same, same)

    @property
    def rounds(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return device_of(self.drift)

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        f = self.drift(x_in, t_in, **cond)
        c = self._eps(level.t) * (-1.0 if self.backward else 1.0) if self._draws else 0.0 * level.t
        if self.predicts == "v":
            c = c - self._gamma.product(level.t)
        if self.score is None or not np.any(c):
            return f
        check_output(f, x_in)
        s = self.score(x_in, t_in, **cond)
        check_output(s, x_in)
        if np.ndim(c):
            c = torch.as_tensor(c).to(s.device, s.dtype).reshape(-1, *(1,) * (s.ndim - 1))
        return f + c * s

    def plan(
        self,
        nfe: int | None = None,
        *,
        method: str = "heun",
        times: Sequence[float] | None = None,
    ) -> Plan:
        """The run as a plan.

        nfe: evaluations (of drift and score together); with "heun" an odd one is spent on an Euler
            step at the end. Steps are equal from t = 0 to 1 (from 1 to 0 if `backward`).
        method: "heun" or "euler". times: nodes in the order of the run instead, for example away
            from the ends, where networks are not trained; nfe must fit or be left out.
        """
        if method not in ("heun", "euler"):
            raise ValueError(unknown("method", str(method), ("heun", "euler")))
        calls = 2 if method == "heun" else 1
        if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1):
            raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
        if times is None:
            if nfe is None:
                raise ValueError("nfe is missing; give the number of evaluations, or times")
            ends = (1.0, 0.0) if self.backward else (0.0, 1.0)
            nodes = np.linspace(*ends, -(-nfe // calls) + 1)
        else:
            nodes = np.array([float(t) for t in times])
        n = len(nodes) - 1
        sign = -1.0 if self.backward else 1.0
        inside = bool((nodes >= 0).all() and (nodes <= 1).all())
        if n < 1 or not inside or not (sign * np.diff(nodes) > 0).all():
            way = "falling" if self.backward else "rising"
            raise ValueError(f"times = {nodes.tolist()}; need two or more in [0, 1], {way}")
        spent = calls * n if nfe is None else nfe
        if not n <= spent <= calls * n or (calls == 2 and spent < calls * n - 1):
            raise ValueError(f"nfe = {nfe}, but {n} {method} steps take {calls * n}")
        return self._compile(nodes, method, spent)

    def _compile(self, nodes: Array, method: str, nfe: int) -> Plan:
        levels, rows, draws = [self._level(nodes[0])], [], []
        evaluated, at = [True], 0
        for i, (s, t) in enumerate(itertools.pairwise(nodes)):
            s, t = float(s), float(t)
            h, start, end = t - s, levels[at], self._level(t)
            heun = method == "heun" and not (i == len(nodes) - 2 and nfe % 2)
            e = {}
            if self._draws:
                size = float(self._eps(0.5 * (s + t) if heun else s))
                if size > 0:  # W(t) is Brownian in t
                    low, high = (0.5 * math.log(v) if v else -math.inf for v in sorted((s, t)))
                    e = {len(draws): math.sqrt(2 * size * abs(h))}
                    draws.append(Draw(start, end, (low, high)))
            rows.append(Row({at: 1.0}, {at: h}, 1, exact=False, e=e))
            levels.append(end)
            evaluated.append(heun)
            if heun:
                made = len(levels) - 1
                rows.append(Row({at: 1.0}, {at: 0.5 * h, made: 0.5 * h}, 2, exact=False, e=e))
                levels.append(end)
                evaluated.append(False)
            at = len(levels) - 1
            evaluated[at] = i < len(nodes) - 2
        about = {
            "solver": f"{method} on drifts",
            "process": f"interpolant, gamma {self._gamma.name}",
            "direction": "backward" if self.backward else "forward",
        }
        return Plan(
            tuple(levels),
            tuple(rows),
            tuple(
                Call(0.0, 1.0, 1.0, level.t) if asked else None
                for asked, level in zip(evaluated, levels, strict=True)
            ),
            prior_std=0.0,
            about=about,
            raw=True,
            draws=tuple(draws),
        )
