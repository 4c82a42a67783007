r"""Adaptive step size: every sample takes the steps that its own error asks for.

An attempt from level s to level t = t(lambda_s + h) computes two solutions of neighbouring order
from the same evaluations. With N the prediction that is interpolated (form "data": N = D,
R = sigma_t / sigma_s, K = alpha_t h, z = -h; form "noise": N = eps, R = alpha_t / alpha_s,
K = -sigma_t h, z = h) and u_1, u_2 the states at lambda_s + r_i h,

    12:  low  = R x + K phi_1(z) N_s                                              r_1 = 1/2
         high = R x + K [phi_1(z) N_s + w / r_1 (N_1 - N_s)]                      w = phi_1(z) / 2
    23:  low  = the `high` of 12                                                  r = 1/3, 2/3
         high = R x + K [phi_1(z) N_s + phi_2(z) / r_2 (N_2 - N_s)]
         u_2  as in DPM-Solver-3: exact weights on N_s, N_1

(second = "exact": w = phi_2(z), and exact weights on all three nodes in `high` of 23). The error is

    E = rms over the sample of (high - low) / max(atol, rtol max(|low|, |low before|)).

E <= 1 accepts `high`; then, or with the same start again, h <- h clip(0.9 E^(-1/p), limits), p
evaluations per attempt. Source: DPM-Solver (arXiv 2206.00927), appendix C; step control from
arXiv 2105.14080. What is different here: official code takes the largest E of the batch for all
samples, so that a sample depends on its neighbours and the hardest one sets everyone's cost; it
evaluates N_s again after a rejection; and it limits neither growth nor shrinking of h.

From alpha = 0, where lambda is infinite, the first step is taken in kappa = alpha / sigma instead
(z = 0: plain Runge-Kutta in x / sigma), under the same control.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._denoiser import Guided, Model, check_output
from ._plan import Hook, Plan
from ._prediction import unknown
from ._process import Array, Level, Process
from ._sampling import DEFAULT_GRID, _begin, _check_hook, _compile
from ._segment import Start
from ._shifted import sample_mean

__all__ = ["AdaptiveResult", "sample_adaptive"]

#: solver -> (order of the higher method, where its inner states are)
_SOLVERS = {"dpm_solver_12": (0.5,), "dpm_solver_23": (1 / 3, 2 / 3)}
_FORMS = ("data", "noise")
_SECONDS = ("midpoint", "exact")
#: A step that would end this close to the end, in lambda, ends there.
_SLACK = 1e-5


@dataclass(frozen=True, eq=False)
class AdaptiveResult:
    """Samples, and what each of them took.

    x: the samples. nfe: network evaluations of each sample, (batch,). rounds: network calls, each
    with the samples that needed one. accepted, rejected: attempts of each sample, (batch,).
    times: the times at which each sample has been, start and end included.
    converged: False for samples that reached `max_nfe` and were finished by one DDIM step.
    """

    x: Tensor
    nfe: np.ndarray
    rounds: int
    accepted: np.ndarray
    rejected: np.ndarray
    times: tuple[Array, ...]
    converged: np.ndarray

    def __repr__(self) -> str:
        return (
            f"<AdaptiveResult {tuple(self.x.shape)}: NFE {self.nfe.min()} to {self.nfe.max()}, "
            f"{self.rounds} rounds, {int(self.rejected.sum())} rejected, "
            f"{int((~self.converged).sum())} not converged>"
        )


def sample_adaptive(
    model: Model,
    shape: Sequence[int] | None = None,
    *,
    solver: str = "dpm_solver_23",
    form: str = "data",
    second: str = "midpoint",
    rtol: float = 0.05,
    atol: float = 0.0078,
    max_nfe: int | None = None,
    h: float = 0.05,
    limits: tuple[float, float] = (0.2, 5.0),
    pid: tuple[float, float, float] | None = None,
    final: str = "zero",
    start: Start | None = None,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    hook: Hook | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> AdaptiveResult:
    """Draw samples to a tolerance instead of a number of evaluations: for reference solutions
    (tight tolerances, float64), not for few steps. Formulas: top of this module.

    solver: "dpm_solver_12" or "dpm_solver_23", 2 or 3 evaluations per attempt (one less after a
        rejection), order 2 or 3. form: what is interpolated, "data" or "noise".
    second: "midpoint" as published, "exact" for exact weights (official code: "taylor").
    rtol, atol: relative and absolute tolerance of a step, per element, in the units of the state
        (0.0078 is 2 / 256). Both to zero: the exact solution.
    max_nfe: no sample takes more evaluations than this. One that cannot afford another attempt is
        finished by one DDIM step, marked in `converged`, and a RuntimeWarning says how many were.
    h: first step in lambda. limits: least and largest factor from one h to the next.
    pid: (P, I, D): the controller of k-diffusion instead, there (0, 1, 0): h <- f h with
        f = 1 + atan(E^-b1 E'^-b2 E''^-b3 - 1), b = ((P + I + D), -(P + 2 D), D) / p, over the
        errors of this attempt and of the last accepted ones; f >= 0.81 accepts; `limits` not used.
    final: "zero": from t_end on to sigma = 0 by one DDIM step, one evaluation; "min": not.

    Every sample has its own times, steps and decisions; it is the same alone and in any batch, as
    far as the network is. Samples that are done leave the network's batch: conditions whose
    leading axis is the batch are narrowed with it (so give per-sample conditions, or none: a shared
    tensor whose first axis happens to be the batch, or with `Guided` what is left of it, is taken
    for one). A `hook` gets a level of arrays, one entry per sample. The rest as in `sample`. The
    network is asked at any time: one that knows integer times only is refused.
    """
    return _sample(
        model,
        shape,
        _Method(solver, form, second, rtol, atol, max_nfe, h, limits, pid),
        final,
        start,
        (seed, first, device, dtype),
        x,
        cond or {},
        hook,
        progress,
    )


@dataclass(frozen=True)
class _Method:
    """What is computed, checked. `couple`: one error for all samples, made from all of theirs, as
    in official code: to compare with it."""

    solver: str
    form: str
    second: str
    rtol: float
    atol: float
    max_nfe: int | None
    h: float
    limits: tuple[float, float]
    pid: tuple[float, float, float] | None
    couple: Callable[[Array], float] | None = None

    def __post_init__(self) -> None:
        for name, known in (("solver", _SOLVERS), ("form", _FORMS), ("second", _SECONDS)):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, str(getattr(self, name)), known))
        if not (0 <= self.rtol < math.inf and 0 < self.atol < math.inf):
            raise ValueError(f"rtol = {self.rtol}, atol = {self.atol}; need rtol >= 0 and atol > 0")
        n = self.max_nfe
        if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n < 1):
            raise ValueError(f"max_nfe = {n!r}; need an integer >= 1, or None")
        if not 0 < self.h < math.inf:
            raise ValueError(f"h = {self.h}; need a positive step in lambda")
        if not 0 <= self.limits[0] < 1 < self.limits[1]:
            raise ValueError(f"limits = {self.limits}; need 0 <= least < 1 < largest")
        if self.pid is not None and not (
            len(self.pid) == 3 and all(map(math.isfinite, self.pid)) and sum(self.pid) > 0
        ):
            raise ValueError(f"pid = {self.pid}; need three numbers with a positive sum")

    @property
    def nodes(self) -> tuple[float, ...]:
        return _SOLVERS[self.solver]

    @property
    def order(self) -> int:
        return len(self.nodes) + 1

    def decide(self, E: Array, past: Array) -> tuple[np.ndarray, Array]:
        """(accept, factor of h) from the errors and those of the last accepted attempts (n, 2)."""
        with np.errstate(divide="ignore"):
            if self.pid is None:
                return E <= 1, np.clip(0.9 * E ** (-1 / self.order), *self.limits)
            P, I, D = self.pid
            powers = np.array([P + I + D, -(P + 2 * D), D]) / self.order
            f = np.prod((1 / (np.column_stack([E, past]) + 1e-8)) ** powers, axis=1)
        f = 1 + np.arctan(f - 1)
        return f >= 0.81, f


def _phi(z: Array) -> tuple[Array, Array, Array]:
    """phi_1, phi_2, phi_3 of z, elementwise; a series near 0, where the recursion cancels."""
    far = np.where(np.abs(z) < 1, 1.0, z)
    one = np.expm1(far) / far
    two = (one - 1) / far
    three = (two - 0.5) / far

    def near(k: int, value: Array) -> Array:
        series = sum(z**n / math.factorial(n + k) for n in range(18))
        return np.where(np.abs(z) < 1, series, value)

    return near(1, one), near(2, two), near(3, three)


@dataclass(frozen=True)
class _Coefficients:
    """Coefficients of one attempt of n samples: arrays (n,). inner: the levels of u_1, u_2.
    states: of every u_i, the coefficient of x and those of N_s, N_1. low: those of the low
    solution. change: those of every N in high - low."""

    inner: list[Level]
    states: list[list[Array]]
    low: list[Array]
    change: list[Array]


def _coefficients(
    method: _Method, process: Process, s: Level, t: Level, noise: np.ndarray
) -> _Coefficients:
    from_noise = s.alpha == 0
    r = method.nodes

    def frame(end: Level) -> tuple[Array, Array, Array]:
        """R, K, z of a step to `end`."""
        step = np.where(from_noise, 0.0, end.lam - s.lam)
        K = np.where(from_noise, end.alpha, np.where(noise, -end.sigma, end.alpha) * step)
        ratio = np.where(noise, end.alpha, end.sigma) / np.where(noise, s.alpha, s.sigma)
        return ratio, K, np.where(noise, step, -step)

    with np.errstate(invalid="ignore"):  # -inf + inf, in the branch not taken
        lams = [np.where(from_noise, t.lam + math.log(c), s.lam + c * (t.lam - s.lam)) for c in r]
    inner = [process.level(process.time(lam)) for lam in lams]
    R, K, z = frame(inner[0])
    states = [[R, K * _phi(z)[0]]]
    if len(r) == 2:
        R, K, z = frame(inner[1])
        p1, p2, _ = _phi(z)
        w = r[1] / r[0] * p2
        states.append([R, K * (p1 - w), K * w])
    R, K, z = frame(t)
    p1, p2, p3 = _phi(z)
    w = K * (p2 if method.second == "exact" else p1 / 2) / r[0]
    if len(r) == 1:
        return _Coefficients(inner, states, [R, K * p1], [-w, w])
    if method.second == "exact":
        high = K * (p2 * r[1] - 2 * p3) / (r[0] * (r[1] - r[0]))
        last = K * (2 * p3 - p2 * r[0]) / (r[1] * (r[1] - r[0]))
    else:
        high, last = np.zeros_like(K), K * p2 / r[1]
    return _Coefficients(inner, states, [R, K * p1 - w, w], [w - high - last, high - w, last])


def _ddim(s: Level, end: Level, noise: np.ndarray) -> list[Array]:
    """Coefficients of x and N_s in a DDIM step; the end may be clean."""
    ratio = np.where(noise, end.alpha, end.sigma) / np.where(noise, s.alpha, s.sigma)
    return [ratio, np.where(noise, end.sigma - s.sigma * ratio, end.alpha - s.alpha * ratio)]


def _at(level: Level, where: np.ndarray) -> Level:
    return Level(level.t[where], level.alpha[where], level.sigma[where], level.lam[where])


def _columns(values: Sequence[Array], like: Tensor) -> list[Tensor]:
    """Host arrays (n,) as tensors that broadcast against n samples, in one transfer."""
    array = torch.from_numpy(np.stack(values)).to(like.dtype)
    return list(
        array.to(like.device, non_blocking=True).reshape(*array.shape, *(1,) * (like.ndim - 1))
    )


class _Run:
    """All samples, and where those are that are not done. `index` says which those are; arrays and
    tensors from `x` on have one entry for each of them."""

    def __init__(
        self,
        model: Model,
        method: _Method,
        whole: Plan,
        x: Tensor,
        cond: Mapping[str, Any],
        hook: Hook | None,
    ) -> None:
        s, n = whole.levels[0], len(x)
        self.model, self.method, self.cond, self.hook = model, method, cond, hook
        self.process, self.last = model.process, whole.levels[-1]
        self.end = self.process.level(self.process.t_end)
        self.goes_on = self.last.t != self.end.t  # from t_end to sigma = 0
        self.batch, self.rounds = n, 0
        self.nfe, self.accepted, self.rejected = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self.converged = np.ones(n, dtype=bool)
        self.times = [[s.t] for _ in range(n)]
        self.result = torch.empty_like(x)

        self.index = np.arange(n)
        self.x, self.low = x, x
        self.N = torch.empty_like(x)  # N_s, where it is known from a rejected attempt
        self.known = np.zeros(n, dtype=bool)
        self.level = Level(*(np.full(n, v) for v in (s.t, s.alpha, s.sigma, s.lam)))
        # From alpha = 0 this is the kappa to go to, not a step in lambda.
        self.h = np.full(n, method.h if s.alpha else math.exp(self.process.lam_start))
        self.past = np.full((n, 2), np.nan)

    def advance(self) -> None:
        """One attempt of every sample, or its last step."""
        from_noise = self.level.alpha == 0
        with np.errstate(divide="ignore", invalid="ignore"):
            lam = np.where(from_noise, np.log(self.h), self.level.lam + self.h)
        there = self.level.t == self.end.t
        reach = lam >= self.end.lam - _SLACK
        if bool(np.any(~there & ~reach & (lam <= self.level.lam))):
            raise FloatingPointError(
                f"step size below rounding at lambda = {self.level.lam.min():g}: rtol = "
                f"{self.method.rtol}, atol = {self.method.atol} cannot be met; loosen them"
            )
        # What is left must pay for an attempt, and then for a last step.
        cost = self.method.order - self.known + np.where(reach & (not self.goes_on), 0, 1)
        short = np.zeros_like(there)
        if self.method.max_nfe is not None:
            short = ~there & (self.method.max_nfe - self.nfe[self.index] < cost)
        self._know()
        closing = there | short
        if closing.any():
            self.converged[self.index[short]] = False
            self._close(closing)
        if len(self.index):
            self._attempt(np.minimum(lam, self.end.lam)[~closing], reach[~closing])

    def _where(self, mask: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flatnonzero(mask)).to(self.x.device)

    def _noise(self) -> np.ndarray:
        """Where N is the noise prediction: not from alpha = 0, whence no noise form leads."""
        return (self.level.alpha > 0) & (self.method.form == "noise")

    def _know(self) -> None:
        """N_s of every sample."""
        new, noise = ~self.known, self._noise()
        if new.all():
            self.N = self._ask(self.x, self.level, noise, self.index)
        elif new.any():
            some = self._where(new)
            N = self._ask(self.x[some], _at(self.level, new), noise[new], self.index[new])
            self.N = self.N.index_copy(0, some, N)
        self.known = np.ones_like(new)

    def _ask(self, x: Tensor, level: Level, noise: np.ndarray, who: np.ndarray) -> Tensor:
        """N at these states, of the samples with these indices."""
        self.rounds += 1
        self.nfe[who] += 1
        model, cond = _narrow(self.model, self.cond, who, self.batch)
        p, q, c_in, c_noise = (
            np.broadcast_to(v, who.shape) for v in model.prediction.scalars(level)
        )
        of_x, of_value = (p, q) if self.hook is None else (0 * p, 0 * q + 1)  # value = out, or D
        rest = 1 - level.alpha * of_x  # 0, but for rounding, if the network predicts the noise
        rest = np.where(np.abs(rest) < 1e-14, 0.0, rest)
        of_x = np.where(noise, rest / level.sigma, of_x)
        of_value = np.where(noise, -level.alpha / level.sigma, 1.0) * of_value
        columns = _columns([c_in, c_noise, p, q, of_x, of_value], x)
        c_in, c_noise, p, q, of_x, of_value = columns
        value = model.output(c_in * x, c_noise.reshape(-1), level, cond)
        check_output(value, x)
        value = value.to(x.dtype)
        if self.hook is not None:
            value = self.hook(p * x + q * value, level)
            check_output(value, x)
        return of_x * x + of_value * value

    def _close(self, mask: np.ndarray) -> None:
        """One DDIM step to the last level."""
        some = self._where(mask)
        coefficients = _ddim(_at(self.level, mask), self.last, self._noise()[mask])
        x = _combine(coefficients, [self.x[some], self.N[some]])
        for i in self.index[mask]:
            self.times[i].append(self.last.t)
        self._leave(mask, x)

    def _leave(self, mask: np.ndarray, x: Tensor) -> None:
        """These samples are done."""
        self.result[torch.from_numpy(self.index[mask]).to(x.device)] = x
        stay = self._where(~mask)
        self.x, self.low, self.N = self.x[stay], self.low[stay], self.N[stay]
        self.level = _at(self.level, ~mask)
        for name in ("index", "known", "h", "past"):
            setattr(self, name, getattr(self, name)[~mask])

    def _attempt(self, lam: Array, reach: np.ndarray) -> None:
        s, noise, x, method = self.level, self._noise(), self.x, self.method
        t = self.process.level(np.where(reach, self.end.t, self.process.time(lam)))
        step = _coefficients(method, self.process, s, t, noise)
        N = [self.N]
        for inner, coefficients in zip(step.inner, step.states, strict=True):
            N.append(self._ask(_combine(coefficients, [x, *N]), inner, noise, self.index))
        low = _combine(step.low, [x, *N[:-1]])
        change = _combine(step.change, N)
        delta = torch.maximum(low.abs(), self.low.abs()).mul(method.rtol).clamp(min=method.atol)
        E = sample_mean((change / delta).square()).sqrt()
        E = E.double().cpu().numpy()  # the one read from the device of an attempt
        if not np.isfinite(E).all():
            raise FloatingPointError(
                f"network returned NaN or inf in a step from t = {s.t[~np.isfinite(E)][0]:g}, from "
                "a finite input; look for overflow in half precision, or a wrong process or "
                "prediction"
            )
        if method.couple is not None:
            E = np.full_like(E, method.couple(E))
        past = np.where(np.isnan(self.past), E[:, None], self.past)
        accept, factor = method.decide(E, past)
        self.accepted[self.index[accept]] += 1
        self.rejected[self.index[~accept]] += 1
        for i, time in zip(self.index[accept], t.t[accept], strict=True):
            self.times[i].append(time)
        chosen = torch.from_numpy(accept).to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
        self.x = torch.where(chosen, low + change, x)
        self.low = torch.where(chosen, low, self.low)
        self.past = np.where(accept[:, None], np.column_stack([E, past[:, 0]]), past)
        with np.errstate(invalid="ignore"):
            taken = np.where(s.alpha == 0, np.exp(t.lam), t.lam - s.lam)
            self.h = np.where((s.alpha == 0) & accept, method.h, taken * factor)
        self.level = Level(
            *(
                np.where(accept, getattr(t, v), getattr(s, v))
                for v in ("t", "alpha", "sigma", "lam")
            )
        )
        self.known = ~accept
        done = accept & reach & (not self.goes_on)
        if done.any():
            self._leave(done, self.x[self._where(done)])


def _sample(
    model: Model,
    shape: Sequence[int] | None,
    method: _Method,
    final: str,
    start: Start | None,
    draw: tuple[int | Sequence[int], int, torch.device | str | None, torch.dtype],
    x: Tensor | None,
    cond: Mapping[str, Any],
    hook: Hook | None,
    progress: bool,
) -> AdaptiveResult:
    if isinstance(model, Model) and model.rounds:
        raise ValueError(
            "model knows integer times only, and adaptive steps end anywhere; use fewstep.sample, "
            "or integer_times=False where the network takes times in between"
        )
    # One DDIM step knows where a run starts and ends, and refuses what cannot be run.
    whole = _compile(model, "ddim", 1, DEFAULT_GRID, final, start, False)
    _check_hook(hook, whole)
    seed, first, device, dtype = draw
    device = model.device if device is None else device
    x = _begin(whole, shape, seed, first, None, x, device, dtype, model.process).x
    run = _Run(model, method, whole, x, cond, hook)
    bar = tqdm(total=100, unit="%", delay=1.0, leave=False, disable=not progress)
    with torch.no_grad(), bar:
        while len(run.index):
            run.advance()
            bar.set_postfix(NFE=run.rounds, refresh=False)
            bar.update(int(100 * _progress(run)) - bar.n)
    if not bool(torch.isfinite(run.result).all()):
        raise FloatingPointError("network returned NaN or inf at the last step of a sample")
    if not run.converged.all():
        warnings.warn(
            f"{int((~run.converged).sum())} of {run.batch} samples reached max_nfe = "
            f"{method.max_nfe} and were finished by one DDIM step; see converged in the result, "
            "raise max_nfe or loosen rtol and atol",
            RuntimeWarning,
            stacklevel=3,
        )
    return AdaptiveResult(
        run.result,
        run.nfe,
        run.rounds,
        run.accepted,
        run.rejected,
        tuple(map(np.array, run.times)),
        run.converged,
    )


def _progress(run: _Run) -> float:
    """The share of the way in lambda that the samples have gone, in the mean."""
    end, begin = run.end.lam, run.process.lam_start
    return 1 - np.clip((end - run.level.lam) / (end - begin), 0, 1).sum() / run.batch


def _combine(coefficients: Sequence[Array], tensors: Sequence[Tensor]) -> Tensor:
    # Product and sum are two roundings each, in every batch: a fused kernel may not be.
    columns = _columns(coefficients, tensors[0])
    total = columns[0] * tensors[0]
    for c, v in zip(columns[1:], tensors[1:], strict=True):
        total = total + c * v
    return total


def _narrow(
    model: Model, cond: Mapping[str, Any], who: np.ndarray, batch: int
) -> tuple[Model, Mapping[str, Any]]:
    """The model and its conditions for these samples of the batch."""
    if len(who) == batch:
        return model, cond
    inner = getattr(model, "model", None)
    if isinstance(inner, Model) and is_dataclass(model):
        model = replace(model, model=_narrow(inner, cond, who, batch)[0])
    if isinstance(model, Guided):
        uncond = {k: _part(v, who, batch, cond.get(k, v)) for k, v in model.uncond.items()}
        model = replace(model, uncond=uncond)
    return model, _part(cond, who, batch, cond)


def _part(value: Any, who: np.ndarray, batch: int, like: Any) -> Any:
    """The entries of these samples, where a value has one for each. like: the condition that it
    stands in for: with one axis more, a value is that of one sample."""
    if isinstance(value, Mapping):
        inner = like if isinstance(like, Mapping) else {}
        return {k: _part(v, who, batch, inner.get(k, v)) for k, v in value.items()}
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        if isinstance(like, Tensor) and like.ndim != value.ndim:
            return value
        return value[torch.from_numpy(who).to(value.device)]
    if isinstance(value, (list, tuple)) and len(value) == batch:
        return type(value)([value[i] for i in who])
    return value
