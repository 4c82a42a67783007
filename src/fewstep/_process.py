"""Processes: what noise level a time is.

A Gaussian process (or path) is x_t = alpha(t) x_0 + sigma(t) eps with eps standard normal. Its
half log-SNR lambda = log(alpha / sigma) grows strictly from noise to data; rho = sigma / alpha =
exp(-lambda). In (x / alpha, lambda) all Gaussian processes are the same problem, so a process is
no more than the pair (alpha, sigma), the map between t and lambda, and a range of times:

    t_start   where sampling starts (most noise)
    t_end     the least noise the network knows
    t_clean   where sigma = 0 exactly (None if the process never gets there; may be -inf)

Times may run either way; only lambda has a direction. Everything here is float64 on the host and
is written without cancellation at both ends: sigma keeps its relative accuracy as sigma -> 0, and
alpha as alpha -> 0. All functions accept a float or an array and return arrays of its shape.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["EDM", "VE", "VP", "CosineVP", "Custom", "DiscreteVP", "Flow", "Level", "Process"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """One noise level: time, alpha, sigma and lambda = log(alpha / sigma), floats or arrays.

    lambda is +inf where sigma = 0 and -inf where alpha = 0.
    """

    t: Any
    alpha: Any
    sigma: Any
    lam: Any

    @property
    def rho(self) -> Any:
        """sigma / alpha, the noise level of k-diffusion and EDM (inf where alpha = 0)."""
        return np.exp(-self.lam) if isinstance(self.lam, np.ndarray) else math.exp(-self.lam)


class Process(abc.ABC):
    """A Gaussian path. To write one: set the three times and `independent`, and give
    `alpha`, `sigma`, `lam` and its inverse `time`, each free of cancellation.
    """

    t_start: float
    t_end: float
    t_clean: float | None
    #: Times are the integers 0..n-1 a network was trained on (in between: interpolation).
    integer_times: bool = False
    #: Noise and data were drawn independently in training. False for reflowed, distilled or
    #: optimal-transport pairs: the ODE stays valid there, but the score is not -eps / sigma.
    independent: bool = True

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> Array:
        """Signal scale alpha(t)."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> Array:
        """Noise scale sigma(t)."""

    @abc.abstractmethod
    def lam(self, t: ArrayLike) -> Array:
        """Half log-SNR lambda(t) = log(alpha / sigma)."""

    @abc.abstractmethod
    def time(self, lam: ArrayLike) -> Array:
        """Inverse of `lam`."""

    def prior_std(self, t: float) -> float:
        """Standard deviation of pure noise from which sampling starts at time t."""
        return float(self.sigma(t))

    @property
    def no_score(self) -> str:
        """Why -eps / sigma is not the score of the states of this path; "" where it is."""
        return "" if self.independent else "its noise and data are coupled (independent = False)"

    def noise_from(self, z: Any, source: Any) -> Any:
        """Pure noise of unit scale from standard normals z, (batch, ...): z itself on a Gaussian
        path. source: the `fewstep.Noise` that z is from, for what else it takes."""
        return z

    def warp(self, u: ArrayLike) -> Array:
        """Map the clock in which t-grids are uniform to t (identity but for a shifted flow)."""
        return _array(u)

    def unwarp(self, t: ArrayLike) -> Array:
        """Inverse of `warp`."""
        return _array(t)

    def knots(self, lam_from: float, lam_to: float) -> Array:
        """Values of lambda between the two where t(lambda) has a kink (tabulated processes)."""
        return np.empty(0)

    def level(self, t: Any) -> Level:
        """The noise level at time t (float or array)."""
        parts = self.alpha(t), self.sigma(t), self.lam(t)
        if np.ndim(t) == 0:
            return Level(float(t), *(float(p) for p in parts))
        return Level(_array(t), *parts)

    @property
    def lam_start(self) -> float:
        """lambda where lambda-grids begin: lambda(t_start), or log(1e-3) if alpha(t_start) = 0,
        where no grid in lambda can begin."""
        lam = float(self.lam(self.t_start))
        return lam if math.isfinite(lam) else math.log(1e-3)


def _array(t: ArrayLike) -> Array:
    return np.asarray(t, dtype=np.float64)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_range(process: Process) -> None:
    """The range must be real: lambda grows strictly from t_start to t_end, sigma(t_clean) = 0."""
    name = type(process).__name__
    start, end = float(process.lam(process.t_start)), float(process.lam(process.t_end))
    _check(
        start < end,
        f"{name}: t_start = {process.t_start} and t_end = {process.t_end} give lambda = {start:.6g}"
        f" and {end:.6g}; t_start must be the noisier end (smaller lambda)",
    )
    _check(
        float(process.sigma(process.t_end)) > 0,
        f"{name}: t_end = {process.t_end} has sigma = 0; give the least noise the network knows "
        "(sampling still ends at sigma = 0 unless you ask otherwise)",
    )


class _VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, so pure noise of any level is standard normal."""

    def prior_std(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving with linear beta(t), continuous t in (0, 1].

    alpha = exp(-B / 2), sigma = sqrt(1 - exp(-B)), B = beta_min t + (beta_max - beta_min) t^2 / 2.
    Source: Score-Based Generative Modeling through SDEs (arXiv 2011.13456), appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 1e-3
    t_clean: float | None = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(
            0 <= self.beta_min <= self.beta_max and self.beta_max > 0,
            f"VP: beta_min = {self.beta_min}, beta_max = {self.beta_max}; need 0 <= beta_min <= "
            "beta_max and beta_max > 0",
        )
        _check(
            min(self.t_start, self.t_end) >= 0,
            f"VP: t_start = {self.t_start}, t_end = {self.t_end}; times must be >= 0",
        )
        _check_range(self)

    def _integral(self, t: ArrayLike) -> Array:
        t = _array(t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t: ArrayLike) -> Array:
        return np.exp(-0.5 * self._integral(t))

    def sigma(self, t: ArrayLike) -> Array:
        return np.sqrt(np.abs(np.expm1(-self._integral(t))))

    def lam(self, t: ArrayLike) -> Array:
        integral = self._integral(t)
        with np.errstate(divide="ignore"):  # log(expm1(B)), without its overflow
            return -0.5 * (integral + np.log(-np.expm1(-integral)))

    def time(self, lam: ArrayLike) -> Array:
        integral = np.logaddexp(0.0, -2.0 * _array(lam))
        slope = self.beta_max - self.beta_min
        # The textbook root is a difference of nearly equal numbers near t = 0; this form is not.
        return 2 * integral / (np.sqrt(self.beta_min**2 + 2 * slope * integral) + self.beta_min)


@dataclass(frozen=True)
class CosineVP(_VariancePreserving):
    """Variance preserving with alpha(t) = cos(a) / cos(b), a = pi/2 (t + s) / (1 + s),
    b = pi/2 s / (1 + s), continuous t in (0, 1]; s = 0 is the plain trigonometric path.

    alpha(1) = 0. The default start stops just short of it, as noise-predicting networks must;
    give t_start = 1 for networks that predict data, v or velocity.
    Source: Improved DDPM (arXiv 2102.09672), equation 17; start from DPM-Solver (2206.00927).
    """

    s: float = 0.008
    t_start: float = 0.9946
    t_end: float = 1e-3
    t_clean: float | None = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(0 <= self.s < 1, f"CosineVP: s = {self.s}; need 0 <= s < 1")
        _check(
            min(self.t_start, self.t_end) >= 0 and max(self.t_start, self.t_end) <= 1,
            f"CosineVP: t_start = {self.t_start}, t_end = {self.t_end}; times must be in [0, 1]",
        )
        _check_range(self)

    @property
    def _b(self) -> float:
        return 0.5 * math.pi * self.s / (1 + self.s)

    def alpha(self, t: ArrayLike) -> Array:
        # cos(a) = sin(pi/2 - a), and pi/2 - a is proportional to 1 - t: exact near t = 1.
        return np.sin(0.5 * math.pi * (1 - _array(t)) / (1 + self.s)) / math.cos(self._b)

    def sigma(self, t: ArrayLike) -> Array:
        # cos^2 b - cos^2 a = sin(a - b) sin(a + b): no 1 - alpha^2 near t = 0.
        d = 0.5 * math.pi * _array(t) / (1 + self.s)
        return np.sqrt(np.sin(d) * np.sin(d + 2 * self._b)) / math.cos(self._b)

    def lam(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def time(self, lam: ArrayLike) -> Array:
        lam = _array(lam)
        sin_b, cos_b = math.sin(self._b), math.cos(self._b)
        cos_a = np.exp(-0.5 * np.logaddexp(0.0, -2 * lam)) * cos_b
        rise = np.exp(-np.logaddexp(0.0, 2 * lam)) * cos_b**2  # sin^2 a - sin^2 b
        sin_a = np.sqrt(sin_b**2 + rise)
        a = np.arctan2(sin_a, cos_a)
        # Near t = 0 the difference a - b cancels; use sin a - sin b = 2 cos(.) sin((a - b) / 2).
        with np.errstate(divide="ignore", invalid="ignore"):
            half = np.where(rise > 0, rise / (sin_a + sin_b), 0.0) / 2 / np.cos((a + self._b) / 2)
        d = np.where(a < 1.0, 2 * np.arcsin(np.minimum(half, 1.0)), a - self._b)
        from_end = 0.5 * math.pi - np.arcsin(np.minimum(cos_a, 1.0)) - self._b
        return np.where(a < 1.0, d, from_end) * (1 + self.s) / (0.5 * math.pi)


@dataclass(frozen=True)
class DiscreteVP(_VariancePreserving):
    """Variance preserving on a table of n levels, t = 0 .. n-1 the index a network was trained on.

    alpha_i^2 is the table's cumulative product ("alpha bar"). Between indices log alpha is linear
    in t, and t = -1 is the clean end alpha = 1 (the convention t_i = (i + 1) / n of DPM-Solver,
    arXiv 2206.00927, appendix D). With zero terminal SNR (alpha_{n-1} = 0) alpha itself is linear
    over the last interval, where log alpha cannot be.

    Make one with `DiscreteVP.linear()`, `.scaled_linear()`, `.squared_cosine()`, `.from_betas(...)`
    or `.from_alphas_cumprod(...)`; `.zero_terminal_snr()` rescales any of them.
    """

    log_alphas: tuple[float, ...] = field(repr=False)
    name: str = "table"
    integer_times: bool = True
    t_start: float = field(init=False, repr=False)
    t_end: float = field(default=0.0, init=False, repr=False)
    t_clean: float | None = field(default=-1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_start", float(len(self.log_alphas) - 1))
        table = np.asarray(self.log_alphas)
        _check(table.ndim == 1 and table.size >= 2, "DiscreteVP: the table needs at least 2 levels")
        ok = not np.isnan(table).any() and table[0] < 0 and bool((table[1:] < table[:-1]).all())
        _check(
            ok,
            f"DiscreteVP: the cumulative product {np.exp(2 * table[:3]).tolist()} ... "
            f"{np.exp(2 * table[-2:]).tolist()} must start below 1 and fall strictly",
        )

    @classmethod
    def from_betas(cls, betas: ArrayLike, name: str = "betas") -> DiscreteVP:
        """From beta_i in (0, 1), alpha_i^2 = prod_{k <= i} (1 - beta_k); beta = 1 may come last."""
        betas = _array(betas)
        ok = betas.ndim == 1 and bool(((betas > 0) & (betas <= 1)).all())
        _check(ok, f"betas: values from {betas.min()} to {betas.max()}; need one axis in (0, 1]")
        with np.errstate(divide="ignore"):
            return cls(tuple((0.5 * np.cumsum(np.log1p(-betas))).tolist()), name)

    @classmethod
    def from_alphas_cumprod(cls, values: ArrayLike, name: str = "alphas_cumprod") -> DiscreteVP:
        """From alpha_i^2 itself, falling; the last may be 0."""
        values = _array(values)
        ok = values.ndim == 1 and bool(((values >= 0) & (values < 1)).all())
        _check(
            ok, f"alphas_cumprod: values {values.min()} to {values.max()}; need one axis in [0, 1)"
        )
        with np.errstate(divide="ignore"):
            return cls(tuple((0.5 * np.log(values)).tolist()), name)

    @classmethod
    def linear(cls, n: int = 1000, first: float = 1e-4, last: float = 0.02) -> DiscreteVP:
        """beta linear in the index (DDPM, arXiv 2006.11239)."""
        return cls.from_betas(np.linspace(first, last, n), f"linear({n}, {first}, {last})")

    @classmethod
    def scaled_linear(
        cls, n: int = 1000, first: float = 0.00085, last: float = 0.012
    ) -> DiscreteVP:
        """sqrt(beta) linear in the index (latent diffusion, Stable Diffusion)."""
        betas = np.linspace(math.sqrt(first), math.sqrt(last), n) ** 2
        return cls.from_betas(betas, f"scaled_linear({n}, {first}, {last})")

    @classmethod
    def squared_cosine(cls, n: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """beta_i = 1 - abar((i+1)/n) / abar(i/n), at most max_beta (arXiv 2102.09672, eq. 17)."""
        angle = (np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2
        abar = np.cos(angle) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], max_beta)
        return cls.from_betas(betas, f"squared_cosine({n})")

    def zero_terminal_snr(self) -> DiscreteVP:
        """Rescaled so that alpha_{n-1} = 0 and alpha_0 stays (arXiv 2305.08891, algorithm 1)."""
        alphas = np.exp(np.asarray(self.log_alphas))
        scaled = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
        with np.errstate(divide="ignore"):
            table = tuple(np.log(scaled).tolist())
        return DiscreteVP(table, f"{self.name}, zero terminal SNR", self.integer_times)

    @cached_property
    def _table(self) -> tuple[Array, Array]:
        """(times, log alpha) with the clean end."""
        table = np.concatenate([[0.0], self.log_alphas])
        return np.arange(-1.0, len(self.log_alphas)), table

    def _log_alpha(self, t: ArrayLike) -> Array:
        t = _array(t)
        times, table = self._table
        if np.isfinite(table[-1]):
            return np.interp(t, times, table)
        inner = np.interp(t, times[:-1], table[:-1])
        with np.errstate(divide="ignore"):
            last = table[-2] + np.log(np.clip(times[-1] - t, 0.0, 1.0))
        return np.where(t > times[-2], last, inner)

    def alpha(self, t: ArrayLike) -> Array:
        return np.exp(self._log_alpha(t))

    def sigma(self, t: ArrayLike) -> Array:
        return np.sqrt(np.abs(np.expm1(2 * self._log_alpha(t))))

    def lam(self, t: ArrayLike) -> Array:
        log_alpha = self._log_alpha(t)
        with np.errstate(divide="ignore"):
            return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def time(self, lam: ArrayLike) -> Array:
        log_alpha = -0.5 * np.logaddexp(0.0, -2 * _array(lam))
        times, table = (values[::-1] for values in self._table)
        if np.isfinite(table[0]):
            return np.interp(log_alpha, table, times)
        inner = np.interp(log_alpha, table[1:], times[1:])
        last = times[0] - np.exp(np.minimum(log_alpha - table[1], 0.0))
        return np.where(log_alpha < table[1], last, inner)

    def knots(self, lam_from: float, lam_to: float) -> Array:
        lam = self.lam(np.arange(len(self.log_alphas)))
        return lam[(lam > lam_from) & (lam < lam_to)]


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, t in [0, 1].

    The clean end is t = -inf. Networks of this family are told sigma: use time="sigma".
    Source: arXiv 2011.13456, appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_start: float = field(default=1.0, init=False, repr=False)
    t_end: float = field(default=0.0, init=False, repr=False)
    t_clean: float | None = field(default=-math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_sigmas("VE", self.sigma_min, self.sigma_max)

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(_array(t))

    def sigma(self, t: ArrayLike) -> Array:
        return np.exp(-self.lam(t))

    def lam(self, t: ArrayLike) -> Array:
        return -math.log(self.sigma_min) - _array(t) * math.log(self.sigma_max / self.sigma_min)

    def time(self, lam: ArrayLike) -> Array:
        return (-_array(lam) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Process):
    """alpha = 1, sigma = t, t in [sigma_min, sigma_max] (arXiv 2206.00364, table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_start: float = field(init=False, repr=False)
    t_end: float = field(init=False, repr=False)
    t_clean: float | None = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_sigmas("EDM", self.sigma_min, self.sigma_max)
        object.__setattr__(self, "t_start", self.sigma_max)
        object.__setattr__(self, "t_end", self.sigma_min)

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(_array(t))

    def sigma(self, t: ArrayLike) -> Array:
        return _array(t)

    def lam(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -np.log(_array(t))

    def time(self, lam: ArrayLike) -> Array:
        return np.exp(-_array(lam))


def _check_sigmas(name: str, low: float, high: float) -> None:
    _check(
        0 < low < high < math.inf,
        f"{name}: sigma_min = {low}, sigma_max = {high}; need 0 < sigma_min < sigma_max < inf",
    )


@dataclass(frozen=True)
class Flow(Process):
    """Straight path alpha = 1 - t, sigma = t, t in (0, 1] with noise at 1 (flow matching,
    rectified flow: arXiv 2210.02747, 2209.03003; SD3, FLUX).

    `shift` = S moves nodes toward noise: grids in t are laid out in u and mapped by
    t = S u / (1 + (S - 1) u), which is lambda -> lambda - log S (arXiv 2403.03206, equation 23).
    The path itself, and what the network is told, stay t: a shift can only be applied once.
    `Flow.for_tokens` gives the shift that depends on resolution.
    """

    shift: float = 1.0
    t_start: float = 1.0
    t_end: float = 1e-3
    independent: bool = True
    t_clean: float | None = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(
            0 < self.shift < math.inf, f"Flow: shift = {self.shift}; need a positive finite number"
        )
        _check(
            self.t_end >= 0 and self.t_start <= 1,
            f"Flow: t_start = {self.t_start}, t_end = {self.t_end}; times must be in [0, 1]",
        )
        _check_range(self)

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        *,
        low: tuple[int, float] = (256, 0.5),
        high: tuple[int, float] = (4096, 1.15),
        t_end: float = 1e-3,
    ) -> Flow:
        """Resolution-dependent shift S = exp(mu), mu linear in the number of image tokens through
        (256, 0.5) and (4096, 1.15): the constants of FLUX.1-dev. Give those of your model.

        SD3's rule S = sqrt(m / n) for m pixels after training at n is `Flow(shift=...)` directly.
        """
        _check(tokens > 0, f"tokens = {tokens}; need a positive number of image tokens")
        _check(low[0] != high[0], f"low = {low}, high = {high}; the two token counts must differ")
        mu = low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0])
        return cls(shift=math.exp(mu), t_end=t_end)

    def alpha(self, t: ArrayLike) -> Array:
        return 1.0 - _array(t)

    def sigma(self, t: ArrayLike) -> Array:
        return _array(t)

    def lam(self, t: ArrayLike) -> Array:
        t = _array(t)
        with np.errstate(divide="ignore"):
            return np.log1p(-t) - np.log(t)

    def time(self, lam: ArrayLike) -> Array:
        return np.exp(-np.logaddexp(0.0, _array(lam)))

    def warp(self, u: ArrayLike) -> Array:
        u = _array(u)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def unwarp(self, t: ArrayLike) -> Array:
        t = _array(t)
        return t / (self.shift - (self.shift - 1) * t)


class Custom(Process):
    """A path from your own alpha(t) and sigma(t); t(lambda) is found numerically.

    alpha, sigma: functions of a float (or of an array), alpha >= 0, sigma >= 0.
    t_start, t_end: the noisy and the clean end of the range a network knows; either may be larger.
    t_clean: where sigma = 0, if it is reached and sampling may go there.
    lam: log(alpha / sigma), if you can give it with less cancellation than the quotient.
    prior_std: standard deviation of the starting noise; default sigma(t_start).

    lambda must grow strictly from t_start to the clean end; this is checked on 4,097 points. The
    inverse is a bisection to the last bit of t.
    """

    _POINTS = 4097

    def __init__(
        self,
        alpha: Callable[[Any], Any],
        sigma: Callable[[Any], Any],
        *,
        t_start: float,
        t_end: float,
        t_clean: float | None = None,
        lam: Callable[[Any], Any] | None = None,
        prior_std: float | None = None,
        independent: bool = True,
        integer_times: bool = False,
    ) -> None:
        self._alpha, self._sigma, self._lam = alpha, sigma, lam
        self.t_start, self.t_end, self.t_clean = float(t_start), float(t_end), t_clean
        self.independent, self.integer_times = independent, integer_times
        self._prior_std = prior_std
        last = self.t_end if t_clean is None else float(t_clean)
        _check(
            math.isfinite(self.t_start) and math.isfinite(last) and self.t_start != last,
            f"Custom: t_start = {t_start}, t_end = {t_end}, t_clean = {t_clean}; need finite, "
            "different times",
        )
        between = min(self.t_start, last) <= self.t_end <= max(self.t_start, last)
        _check(between, f"Custom: t_end = {t_end} must lie between t_start and t_clean")
        t = np.linspace(self.t_start, last, self._POINTS)
        for name, values in (("alpha", self.alpha(t)), ("sigma", self.sigma(t))):
            bad = ~(np.isfinite(values) & (values >= 0))
            _check(
                not bad.any(),
                f"Custom: {name}(t = {t[bad.argmax()]:.6g}) = {values[bad.argmax()]:.6g}; need a "
                "finite number >= 0",
            )
        rise = np.diff(self.lam(t))
        _check(
            bool((rise > 0).all()),
            f"Custom: lambda = log(alpha / sigma) falls near t = {t[int(np.argmin(rise > 0))]:.6g};"
            " it must grow strictly from t_start to the clean end",
        )
        if t_clean is not None:
            _check(
                float(self.sigma(t_clean)) == 0.0,
                f"Custom: sigma(t_clean = {t_clean}) = {float(self.sigma(t_clean)):.6g}; need "
                "exactly 0, or leave t_clean out",
            )
        _check_range(self)

    def _call(self, function: Callable[[Any], Any], t: ArrayLike) -> Array:
        t = _array(t)
        if t.ndim == 0:
            return _array(function(float(t)))
        try:
            values = _array(function(t))
        except (TypeError, ValueError):  # written for floats, with the math module
            values = np.empty(0)
        if values.shape != t.shape:
            values = _array([float(function(float(s))) for s in t.ravel()]).reshape(t.shape)
        return values

    def alpha(self, t: ArrayLike) -> Array:
        return self._call(self._alpha, t)

    def sigma(self, t: ArrayLike) -> Array:
        return self._call(self._sigma, t)

    def lam(self, t: ArrayLike) -> Array:
        if self._lam is not None:
            return self._call(self._lam, t)
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def time(self, lam: ArrayLike) -> Array:
        lam = _array(lam)
        noisy = np.full(lam.shape, self.t_start)
        clean = np.full(lam.shape, self.t_end if self.t_clean is None else self.t_clean)
        for _ in range(128):
            middle = 0.5 * (noisy + clean)
            below = self.lam(middle) < lam
            noisy, clean = np.where(below, middle, noisy), np.where(below, clean, middle)
            if bool((np.abs(noisy - clean) <= np.spacing(np.abs(middle))).all()):
                break
        return 0.5 * (noisy + clean)

    def prior_std(self, t: float) -> float:
        if self._prior_std is not None and t == self.t_start:
            return self._prior_std
        return super().prior_std(t)

    def __repr__(self) -> str:
        return f"Custom(t_start={self.t_start}, t_end={self.t_end}, t_clean={self.t_clean})"
