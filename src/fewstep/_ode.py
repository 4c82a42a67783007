"""The probability-flow ODE as a function, for solvers of other libraries.

With D the data prediction and eps = (x - alpha D) / sigma, a path x = alpha x_0 + sigma eps has

    dx/ds = alpha' D + sigma' eps                          (' = d/ds, in any clock s)

Clocks: "t", the process's own time, and "lambda" = log(alpha / sigma) and "rho" = sigma / alpha,
with d/dlambda = (1 / lambda') d/dt and d/drho = -(1 / rho lambda') d/dt,
lambda' = alpha' / alpha - sigma' / sigma.

Source: Score-Based Generative Modeling through SDEs (arXiv 2011.13456), equation 13, written in the
data prediction as in EDM (arXiv 2206.00364), equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._denoiser import Model, check_output
from ._prediction import unknown
from ._process import EDM, VE, VP, Array, CosineVP, DiscreteVP, Flow, Process
from ._segment import Segment

__all__ = ["ProbabilityFlow", "probability_flow"]

Rates = Callable[[float], tuple[float, float]]
CLOCKS = ("t", "lambda", "rho")


@dataclass(frozen=True)
class ProbabilityFlow:
    """f(s, x) = dx/ds, with the arguments of torchdiffeq: `odeint(f, x, torch.tensor(f.span))`.

    A third argument is taken as the conditions, which is the form f(t, y, args) of diffrax.
    `flat` is the same for SciPy. span: the clock where sampling starts, and where it ends.

    sigma = 0 is not a place to ask: eps is undetermined there. End at span[1], the least noise that
    the network knows, and let D = model(x, t_end) be the sample, if the rest matters. torchdiffeq's
    adaptive methods step past the end and interpolate; in "lambda" there is nothing to step past.
    """

    model: Model
    clock: str
    rates: Rates = field(repr=False)
    cond: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) of sampling, in this clock."""
        process = self.model.process
        return self.at(process.t_start), self.at(process.t_end)

    def at(self, t: float) -> float:
        """The clock at time t of the process."""
        if self.clock == "t":
            return float(t)
        level = self.model.process.level(float(t))
        return float(level.lam if self.clock == "lambda" else level.rho)

    def time(self, s: float) -> float:
        """The time of the process at which the clock is s."""
        if self.clock == "t":
            return float(s)
        if self.clock == "rho" and not s > 0:
            raise ValueError(f"rho = {s}; need a positive number, for the noise is unknown at 0")
        lam = s if self.clock == "lambda" else -math.log(s)
        return float(self.model.process.time(lam))

    def __call__(self, s: Any, x: Tensor, args: Mapping[str, Any] | None = None) -> Tensor:
        """dx/ds at x (batch, ...); s: a number, or a tensor of one. In x's dtype."""
        model, t = self.model, self.time(float(s))
        with np.errstate(invalid="ignore"):
            level = model.process.level(t)
        alpha, sigma = level.alpha, level.sigma
        if not sigma > 0 or math.isnan(level.lam):
            raise ValueError(
                f"t = {t} has sigma = {sigma}; end where sigma > 0 (see span), and where the "
                "solver steps past the end to interpolate, use clock = 'lambda'"
            )
        p, q, c_in, c_noise = (float(v) for v in model.prediction.scalars(level))
        da, ds = self.rates(t)
        if self.clock != "t":
            if not alpha > 0:
                raise ValueError(f"t = {t} has alpha = 0, where {self.clock} is infinite")
            slope = da / alpha - ds / sigma  # d lambda / dt
            slope *= 1.0 if self.clock == "lambda" else -level.rho
            da, ds = da / slope, ds / slope
        t_in = x.new_full((x.shape[0],), c_noise, dtype=torch.promote_types(x.dtype, torch.float32))
        out = model.output(x if c_in == 1 else c_in * x, t_in, level, args or self.cond)
        check_output(out, x)
        # D = p x + q out and eps = (x - alpha D) / sigma, put together in double precision: for a
        # network that predicts eps nothing is divided by sigma.
        of_x = da * p + ds * (1 - alpha * p) / sigma
        return of_x * x + (q * (da - ds * alpha / sigma)) * out.to(x.dtype)

    def flat(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Callable[[float, Array], Array]:
        """g(s, y) on NumPy vectors, y = x.ravel() for x of this shape (batch first):
        `scipy.integrate.solve_ivp(f.flat(x.shape), f.span, x.ravel())`."""
        where = self.model.device if device is None else device

        def g(s: float, y: Array) -> Array:
            x = torch.as_tensor(y).to(where, dtype).reshape(tuple(shape))
            with torch.no_grad():
                return self(s, x).double().cpu().numpy().ravel()

        return g


def probability_flow(
    model: Model,
    clock: str = "t",
    *,
    rates: Rates | None = None,
    cond: Mapping[str, Any] | None = None,
) -> ProbabilityFlow:
    """The right-hand side dx/ds of the probability-flow ODE of a model, for any ODE solver.

    clock: what s is: "t", the time of the process; "lambda" = log(alpha / sigma); "rho" = sigma /
        alpha. Solvers that know nothing of diffusion do well in lambda.
    rates: t -> (alpha', sigma'), derivatives in the process's time. Needed for processes of your
        own only; the others know theirs.
    cond: conditions, passed to the network.

    Gradients pass through, unless the solver stops them. Each call is one network evaluation (a
    guided model: one of two conditions), so count those of the solver against the `nfe` of
    `sample`, which needs far fewer.
    """
    if not isinstance(model, Model):
        raise ValueError(f"model = {model!r}; give a fewstep.Denoiser or Guided")
    if clock not in CLOCKS:
        raise ValueError(unknown("clock", str(clock), CLOCKS))
    if model.rounds:
        raise ValueError(
            "model: its network knows integer times only, and an ODE has all times; if it takes "
            "fractions, say so: Denoiser(..., integer_times=False)"
        )
    found = _rates(model.process) if rates is None else rates
    return ProbabilityFlow(model, clock, found, dict(cond or {}))


def _rates(process: Process) -> Rates:
    """(alpha', sigma') of the processes that have closed forms."""
    if isinstance(process, Segment):
        return _rates(process.whole)
    if isinstance(process, EDM):
        return lambda t: (0.0, 1.0)
    if isinstance(process, Flow):
        return lambda t: (-1.0, 1.0)
    if isinstance(process, VE):
        grow = math.log(process.sigma_max / process.sigma_min)
        return lambda t: (0.0, grow * float(process.sigma(t)))
    slope = _alpha_rate(process)
    if slope is None:
        raise ValueError(
            f"rates is missing; give t -> (alpha', sigma') for the process {process!r}"
        )

    def rates(t: float) -> tuple[float, float]:  # alpha^2 + sigma^2 = 1
        da = slope(t)
        return da, -da * float(process.alpha(t)) / float(process.sigma(t))

    return rates


def _alpha_rate(process: Process) -> Callable[[float], float] | None:
    """alpha' of the variance-preserving processes."""
    if isinstance(process, VP):
        rise = process.beta_max - process.beta_min
        return lambda t: -0.5 * (process.beta_min + rise * t) * float(process.alpha(t))
    if isinstance(process, CosineVP):
        k = 0.5 * math.pi / (1 + process.s)
        return lambda t: -k * math.cos(k * (1 - t)) / math.cos(k * process.s)
    if isinstance(process, DiscreteVP):
        table = np.concatenate([[0.0], process.log_alphas])  # at t = -1, 0, ...

        def slope(t: float) -> float:
            i = min(max(math.floor(t) + 1, 0), len(table) - 2)  # at a knot: of the noisier side
            if math.isfinite(table[i + 1]):
                return float(process.alpha(t) * (table[i + 1] - table[i]))
            return -math.exp(table[i])  # alpha is linear down to 0

        return slope
    return None
