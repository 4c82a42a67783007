r"""The stochastic multistep family: DDPM, eta-DDIM, SDE-DPM-Solver++, SA-Solver, ER-SDE, LCM.

Every reverse-time SDE with the marginals of the process is, in lambda (B a Brownian motion in it),

    dx = (dlog sigma/dlambda - eta^2) x dlambda + (1 + eta^2) alpha D dlambda + sqrt(2) eta sigma dB

with any noise level squared eta^2(lambda) >= 0: 0 is the probability-flow ODE, 1 the SDE of DDPM.
With E = int_s^t eta^2 dlambda, E(lambda) the same from lambda to the end of the step, and
h = lambda_t - lambda_s, one step from s to the cleaner t is, D replaced by a polynomial,

    data   x_t = (sigma_t/sigma_s) e^{-E} x_s + sum_j W_j D_j + sigma_t sqrt(1 - e^{-2E}) z,
           W_j = alpha_t int ell_j (1 + eta^2) e^{-(lambda_t - lambda) - E(lambda)} dlambda
    noise  x_t = (alpha_t/alpha_s) x_s + sum_j W_j e_j
                 + alpha_t sqrt(int 2 eta^2 rho^2 dlambda) z,  e = (x - alpha D) / sigma,
           W_j = -alpha_t int ell_j (1 + eta^2) rho dlambda

with ell_j the Lagrange basis in lambda or rho through the newest nodes. sum_j W_j is
alpha_t (1 - e^{-(h+E)}) in data form. The noise of a data row is so large that the variance stays
the process's for any step; that of a noise row is not, and errors grow as e^h: for short steps.

One node: x_t = alpha_t D + sqrt(sigma_t^2 - v^2) e + v z, v = sigma_t sqrt(1 - e^{-2E}) in data
form, which is also how methods are written that choose v step by step (`ancestral`).

Other people's symbols in eta^2:

    SA-Solver, gDDIM               tau, lambda: eta itself
    k-diffusion 2M/3M SDE          "eta" is eta^2, not eta
    DDIM, k-diffusion ancestral    per step, "eta"^2 = (1 - e^{-2E}) / (1 - e^{-2h}): not eta but at
                                   0 and 1
    ER-SDE                         phi: 1 + eta^2 = dlog phi / dlog rho, e^{-(h+E)} = phi_t / phi_s
    Flow-GRPO                      noise level a: eta^2 = a^2 / 2

Order. Strong order 1; weak order 1 with one node, 2 with more: polynomials of any degree leave out
the noise inside the step. More nodes make the error smaller all the same. Where eta^2 = 0 a row is
the deterministic one of `exponential`.

Corrector. Once the network has been called at the new state the step is taken again, with that D as
one more node and the same z (SA-Solver, PEC): no evaluation more.

Named deviations from the exact weights, in lambda: second and third as in `exponential`, with
H = h + E in place of h: with two nodes the first moment 1 - A/H, A = 1 - e^{-H}, becomes A/2
("midpoint", SDE-DPM-Solver++(2M)) or H/2 ("bh1", what SA-Solver's code calls rescaling, for few
steps). third = "shipped" halves the second-derivative term: k-diffusion's 3M SDE, which makes its
ODE case second order. In rho, third = "uncorrected": ER-SDE-3 takes the last divided difference for
the first derivative at the newest node, second order too. Not offered: order 3 of sde-dpmsolver++
in diffusers, where that term has the wrong sign: first order, worse than its own order 2.

Weights are exact (Gauss-Legendre quadrature in pieces, no cancellation, also for eta^2 that varies
inside a step). The ER-SDE code uses sums of 100 rectangles in rho, which cost the order on steps
over a decade; SA-Solver's integrates monomials of the unshifted lambda, which in float32 leaves
order-4 coefficients with two digits at h = 0.05.

Ends. To sigma = 0: x = D, no noise, which is the limit of one node in data form. From alpha = 0:
E is infinite unless eta^2 vanishes there, the start is forgotten, x = alpha_t D + sigma_t z; noise
form, which has no limit there, does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from .._noise import Draw
from .._prediction import unknown
from .._process import Array, Level, Process
from .._weights import _FAR, _W, _X, _difference, _lagrange, usable
from ._base import Formula, Multistep
from ._exponential import Second, _add, _Exponential

__all__ = ["Window", "ancestral", "er_sde", "jump", "sa_solver", "sde"]

Third = Literal["exact", "shipped", "uncorrected"]
#: A choice for a step: (start, end) -> standard deviation.
Deviation = Callable[[Level, Level], float]

_SDE = "exponential SDE multistep: one formula, weights by quadrature"
_ER = "Extended Reverse-Time SDE, 2309.06169"
_SA = "SA-Solver, 2309.05019"


# Noise levels: eta^2 as a function of rho


@dataclass(frozen=True)
class Window:
    """eta^2 = `eta2` where low <= sigma / alpha < high, 0 elsewhere. A step that crosses an end of
    the window is integrated exactly.

    SA-Solver's tau in a range of times and the S_min, S_max of EDM are windows. Noise repairs
    errors that the network makes at high rho, and amplifies those of low rho.
    """

    eta2: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        _number("eta2", self.eta2)
        if not 0 <= self.low < self.high:
            raise ValueError(f"low = {self.low}, high = {self.high}; need 0 <= low < high")

    @property
    def none(self) -> bool:
        """Whether there is no noise at all."""
        return self.eta2 == 0

    @property
    def _ends(self) -> tuple[float, float]:
        """In lambda."""
        noisy = -math.log(self.high) if self.high < math.inf else -math.inf
        return noisy, -math.log(self.low) if self.low > 0 else math.inf

    def between(self, a: Any, b: float) -> Any:
        """int eta^2 dlambda from a (one or many) to b."""
        if self.none:
            return np.zeros_like(a)
        low, high = self._ends
        return self.eta2 * np.maximum(min(b, high) - np.maximum(a, low), 0.0)

    def at(self, lam: Array) -> Array:
        """eta^2."""
        low, high = self._ends
        return np.where((lam > low) & (lam <= high), self.eta2, 0.0)

    def knots(self, a: float, b: float) -> list[float]:
        """Where eta^2 jumps between a and b."""
        return [end for end in self._ends if a < end < b]

    def place(self, lam: float) -> float:
        """int eta^2 dlambda up to lambda, from anywhere."""
        low, high = self._ends
        return self.eta2 * min(max(lam, low), high)

    def scaled(self, factor: float) -> Window:
        """`factor` times eta."""
        return replace(self, eta2=self.eta2 * factor**2)

    def __str__(self) -> str:
        inside = (self.low, self.high) != (0.0, math.inf)
        return f"{self.eta2:g}" + f" in {self.low:g}..{self.high:g}" * inside


@dataclass(frozen=True)
class _Smooth:
    """eta^2 = factor^2 function(rho), for any function that is smooth."""

    function: Callable[[Array], Array]
    factor: float = 1.0

    def __post_init__(self) -> None:
        rho = np.exp(np.linspace(-12.0, 12.0, 25))
        value = np.asarray(self.function(rho))
        if value.shape != rho.shape or not (np.isfinite(value) & (value >= 0)).all():
            raise ValueError(
                f"eta2 = {self} gives {np.min(value):g} to {np.max(value):g} of shape "
                f"{value.shape} for sigma / alpha of shape {rho.shape}; need a function of arrays "
                "whose values are finite and not negative"
            )

    @property
    def none(self) -> bool:
        return self.factor == 0

    def at(self, lam: Any) -> Any:
        with np.errstate(over="ignore"):
            return self.factor**2 * np.asarray(self.function(np.exp(-np.asarray(lam))))

    def between(self, a: Any, b: float) -> Any:
        if np.ndim(a) == 0 and a == -math.inf:
            # Where eta^2 goes on for ever, the start is forgotten.
            a = -_FAR
            if np.all(self.at(np.array([a])) > 0):
                return math.inf
        a = np.asarray(a)
        count = max(1, math.ceil(2 * float(np.max(np.abs(b - a)))))
        x = ((np.arange(count)[:, None] + _X) / count).ravel()
        mass = np.tile(_W / count, count)
        return (b - a) * (self.at(a[..., None] + (b - a)[..., None] * x) @ mass)

    def knots(self, a: float, b: float) -> list[float]:
        return []

    def place(self, lam: float) -> float:
        return -float(self.between(lam, 0.0))

    def scaled(self, factor: float) -> _Smooth:
        return replace(self, factor=self.factor * factor)

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", "function")
        return name + f" x {self.factor**2:g}" * (self.factor != 1)


_Noise = Window | _Smooth
#: What users give: a number, a window, or a function of rho = sigma / alpha (an array).
NoiseLevel = float | Window | _Smooth | Callable[[Array], Array]


def _noise_level(eta2: Any) -> _Noise:
    if isinstance(eta2, (Window, _Smooth)):
        return eta2
    if callable(eta2):
        return _Smooth(eta2)  # pyright: ignore[reportArgumentType]
    return Window(_number("eta2", eta2))


def _number(name: str, value: Any, high: float = math.inf) -> float:
    ok = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not (ok and 0 <= value <= high and math.isfinite(value)):
        accepted = "a number >= 0" if high == math.inf else f"a number from 0 to {high:g}"
        raise ValueError(f"{name} = {value!r}; need {accepted}")
    return float(value)


# The family


def sde(
    order: int,
    *,
    eta2: NoiseLevel = 1.0,
    form: str = "data",
    variable: str = "lambda",
    second: Second = "exact",
    third: Third = "exact",
    corrector: int = 0,
    frozen: bool = False,
    s_noise: float = 1.0,
    growth: float = 1.5,
    lower_final: bool = False,
    name: str | None = None,
    source: str = _SDE,
    fragile: str = "",
    member: str = "",
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """A stochastic exponential multistep solver, 1 NFE per step; weak order min(order, 2), strong
    order 1.

    order: number of nodes. eta2: noise level squared, 1 for the SDE of DDPM, 0 for the ODE: a
        number, a `Window`, or a smooth function of sigma / alpha (arrays).
    form: "data", or "noise" (short steps only). variable: "lambda" or "rho".
    second, third: published approximations: "midpoint", "bh1"; "shipped", "uncorrected".
    corrector: nodes of a corrector, that at the new state included (SA-Solver); 0: none.
    frozen: eta^2 of a step is its value at the step's end, as in SA-Solver's code, instead of its
        integral. Draws belong to no path then, unless eta^2 is one number.
    s_noise: factor of the noise alone (EDM, k-diffusion). Other than 1 it changes the variance, so
        that nothing converges to the law of the data (order 0).
    growth: as in `exponential`. lower_final: last steps use at most as many nodes as there are
        steps left. fragile, member, ...: facts, see `Solver`.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order = {order!r}; need an integer >= 1")
    for argument, value, known in (
        ("form", form, ("data", "noise")),
        ("variable", variable, ("lambda", "rho")),
        ("second", second, ("exact", "midpoint", "bh1")),
        ("third", third, ("exact", "shipped", "uncorrected")),
    ):
        if value not in known:
            raise ValueError(unknown(argument, value, known))
    if isinstance(corrector, bool) or not isinstance(corrector, int) or corrector not in range(10):
        raise ValueError(f"corrector = {corrector!r}; need 0 (none) or its number of nodes, 2 to 9")
    if corrector == 1 or (corrector and (form, third) != ("data", "exact")):
        raise ValueError(
            f"corrector = {corrector} with form = {form!r}, third = {third!r}; need two nodes or "
            "more, data form and exact weights"
        )
    wanted = {"shipped": "lambda", "uncorrected": "rho"}.get(third, variable)
    if wanted != variable or (third != "exact" and order != 3):
        raise ValueError(
            f"third = {third!r} with order = {order}, variable = {variable!r}; it is a variant of "
            f"order 3 in {wanted!r}"
        )
    if second != "exact" and variable != "lambda":
        raise ValueError(f"second = {second!r} with variable = {variable!r}; it is in 'lambda'")
    if not growth > 0:
        raise ValueError(f"growth = {growth}; need a positive number (math.inf for no limit)")
    if not _number("s_noise", s_noise):
        raise ValueError(f"s_noise = {s_noise!r}; need a positive number (eta2 = 0: no noise)")
    noise = _noise_level(eta2)
    if form == "noise" and not isinstance(noise, Window):
        raise ValueError(f"eta2 = {eta2!r} with form = 'noise'; need a number or a Window")
    step = _Stochastic(
        form,
        variable,
        second,
        third,
        growth,
        noise,
        order,
        corrector,
        frozen,
        float(s_noise),
    )
    on_path = not frozen or noise == Window(getattr(noise, "eta2", 0.0))
    ends = "start-up orders 1, 2, ...; at sigma = 0 order 1"
    if order > 1 and growth < math.inf:
        ends += "; rows that would amplify errors take fewer nodes"
    if lower_final:
        ends += "; last steps of order 1, 2, ... from the end"
    settings: dict[str, Any] = {
        "form": form,
        "variable": variable,
        "second": second,
        "third": third,
        "corrector": corrector,
        "frozen": frozen,
        "s_noise": s_noise,
        "growth": growth,
        "lower_final": lower_final,
        "source": source,
    }
    usual = (sde.__kwdefaults__ or {}) | {"source": source}
    special = [f"{key} {value}" for key, value in settings.items() if value != usual[key]]
    return Multistep(
        name=name or f"sde({', '.join([f'{order}, eta2 {noise}', *special])})",
        order=min(max(order, corrector), step.best),
        step=step,
        source=source,
        ends=ends,
        nodes=max(order, corrector - 1),
        lower_final=lower_final,
        corrector=step.correct if corrector else None,
        fragile=fragile,
        stochastic=not noise.none,
        strong_order=int(on_path and not noise.none),
        scaled=None if noise.none else partial(_scaled_sde, order, noise, settings),
        member="" if noise.none else member,
        aliases=aliases,
    )


def _scaled_sde(order: int, noise: _Noise, settings: dict[str, Any], factor: float) -> Multistep:
    return sde(order, eta2=noise.scaled(_number("factor", factor)), **settings)


@dataclass(frozen=True)
class _Stochastic(_Exponential):
    """The coefficient function: process, history (newest first), target -> row."""

    noise: _Noise
    order: int
    nodes: int  # of the corrector
    frozen: bool
    s_noise: float

    @property
    def best(self) -> int:
        """The largest order of a row."""
        if self.s_noise != 1 and not self.noise.none:
            return 0
        return 2 if not self.noise.none or self.third != "exact" else 10**6

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        return self._padded(process, history, self.order, end, 0)

    def correct(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        """The same step with the target's own D as one more node and the same draw. None from
        alpha = 0, where lambda has no place for the start."""
        if history[1].alpha == 0:
            return None
        return self._padded(process, history, self.nodes, end, 1)

    def _padded(
        self, process: Process, history: Sequence[Level], nodes: int, end: Level, at: int
    ) -> Formula:
        """The predictor and the corrector may look back less far than the other."""
        row = self._formula(process, history[:nodes], end, at)
        rest = [0.0] * (len(history) - len(row.a))
        order = min(row.order, self.best)
        return row._replace(a=[*row.a, *rest], b=[*row.b, *rest], order=order)

    def _formula(self, process: Process, history: Sequence[Level], end: Level, at: int) -> Formula:
        """A step from history[at], through it and all other levels of the history."""
        start, size = history[at], len(history)
        a, b = [0.0] * size, [0.0] * size
        if end.sigma == 0:
            b[at] = end.alpha
            return Formula(a, b, 1)
        noise = Window(float(self.noise.at(np.array(end.lam)))) if self.frozen else self.noise
        E = 0.0 if noise.none else float(noise.between(start.lam, end.lam))
        if E == 0 or noise.place(start.lam) == noise.place(end.lam):  # upward too
            return super()._formula(process, history, end, at)
        h = end.lam - start.lam
        data = self.form == "data" or start.alpha == 0
        draw = Draw(start, end, self._clock(noise, data, start, end))
        if data:
            a[at] = end.sigma / start.sigma * math.exp(-E)
            b[at] = -end.alpha * math.expm1(-(h + E))
            std = end.sigma * math.sqrt(-math.expm1(-2 * E))
        else:
            assert isinstance(noise, Window)  # checked when the solver was made
            total, variance = _noise_form(noise, start, end)
            a[at], b[at] = _add(end.alpha / start.alpha, 0.0, total, "noise", start)
            std = math.sqrt(variance)
        others = [n for n in history if n is not start and usable(self.form, self.variable, n)]
        nodes = [start, *(others if start.alpha else [])]

        def weigh(nodes: Sequence[Level]) -> list[float]:
            W = list(_weights(self.form, self.variable, noise, start, end, nodes))
            self._approximate(W, start, end, nodes)
            if len(nodes) == 2 and self.second == "bh1":
                W[1] *= (h + E) / h
                W[0] -= W[1] * E / (h + E)
            return W

        count = self._through(weigh, nodes, history, at, a, b)
        exact = data and self.s_noise == 1
        return Formula(a, b, count, exact, noise={draw: std * self.s_noise})

    def _clock(
        self, noise: _Noise, data: bool, start: Level, end: Level
    ) -> tuple[float, float] | None:
        if self.frozen and self.noise != noise:
            return None  # steps would overlap on the path where eta^2 changes
        if data:
            return noise.place(start.lam), noise.place(end.lam)
        # The noise is an increment of a Brownian motion in rho^2, known at the clean end.
        assert isinstance(noise, Window)
        low = noise.low

        def place(rho: float) -> float:
            rho = min(rho, noise.high)
            if rho <= low:
                return -math.inf
            return math.log(rho) + 0.5 * math.log1p(-((low / rho) ** 2))

        return place(end.rho), place(start.rho)

    def _approximate(
        self, W: list[float], start: Level, end: Level, nodes: Sequence[Level]
    ) -> None:
        if len(nodes) < 3 or self.third != "uncorrected":
            return super()._approximate(W, start, end, nodes)
        # D0 + (u - u0) D[0,1] + (u - u0) (u - u1) D[0,1,2] with (u - u0)^2 in the last term
        u = [_difference("data", "rho", (0, n.lam), (0, start.lam), 0.0) for n in nodes]
        moment = W[1] * u[1] + W[2] * u[2]
        shift = -moment * u[1]
        W[1] -= shift / (u[1] * (u[1] - u[2]))
        W[2] -= shift / (u[2] * (u[2] - u[1]))
        W[0] += shift / (u[1] * (u[1] - u[2])) + shift / (u[2] * (u[2] - u[1]))
        return None


def _noise_form(noise: Window, start: Level, end: Level) -> tuple[float, float]:
    """-alpha_t int (1 + eta^2) rho dlambda and the variance alpha_t^2 int 2 eta^2 rho^2 dlambda."""
    noisy, clean = noise._ends
    a, b = max(start.lam, noisy), min(end.lam, clean)
    noisy_part = -noise.eta2 * math.exp(-a) * math.expm1(a - b)
    total = start.rho * math.expm1(start.lam - end.lam) - noisy_part
    return end.alpha * total, end.alpha**2 * noisy_part * (math.exp(-a) + math.exp(-b))


def _weights(
    form: str,
    variable: str,
    noise: _Noise,
    start: Level,
    end: Level,
    nodes: Sequence[Level],
) -> Array:
    """W_j of the module docstring for nodes with a finite basis variable."""
    lam, h = start.lam, end.lam - start.lam
    points = [(n.t, n.lam - lam) for n in nodes]
    low, high = 0.0, h

    def left(delta: Any) -> Any:  # the exponent of the kernel in data form
        return h - delta + noise.between(lam + delta, end.lam)

    if form == "noise":
        high = min(h, _FAR)
    elif left(0.0) > _FAR:  # nothing that far from the end counts
        low = _bisected(left, h)
    length = high if form == "noise" else float(left(low))
    knots = [k - lam for k in noise.knots(lam + low, lam + high)]
    edges = np.linspace(low, high, max(1, math.ceil(length), math.ceil(high - low)) + 1)
    edges = np.unique(np.append(edges, knots))
    widths = np.diff(edges)
    delta = (edges[:-1, None] + widths[:, None] * _X).ravel()
    mass = (widths[:, None] * _W).ravel() * (1 + noise.at(lam + delta))
    if form == "data":
        mass = end.alpha * mass * np.exp(-left(delta))
    else:
        mass = -(end.alpha * start.rho) * mass * np.exp(-delta)
    return _lagrange(form, variable, points, None, delta, lam) @ mass


def _bisected(left: Callable[[float], Any], h: float) -> float:
    low, high = 0.0, h
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if left(middle) > _FAR else (low, middle)
    return low


# Named members


def sa_solver(
    predictor: int = 3,
    corrector: int = 4,
    *,
    eta2: NoiseLevel = 1.0,
    second: Second = "bh1",
    frozen: bool = False,
    lower_final: bool = True,
    fragile: str = "",
    name: str | None = None,
    member: str = "",
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """SA-Solver: stochastic Adams, predictor and corrector with one draw (PEC), 1 NFE per step.

    predictor, corrector: nodes; the corrector's include the new state. 3 and 4 are the authors'
        choice without guidance, 2 and 2 with much of it. corrector = 0: none.
    eta2: their tau, squared. Their default is tau = 1 for t in [0.2, 0.8] of the linear VP process,
        which is Window(1, 0.72, 25); with `frozen` taken at the end of each step as in their code.
    second: "bh1" is what their code does with two nodes for few steps ("rescaling"), and diffusers
        always: a first moment that grows with the step; "exact", as in the paper, is the better
        one where a step is long, such as the first of few.

    Their code for few steps returns the state at the last network level, its last step without
    noise; here the end is the grid's. Weak order 2, strong order 1. Source: arXiv 2309.05019,
    algorithm 1.
    """
    return sde(
        predictor,
        eta2=eta2,
        second=second,
        corrector=corrector,
        frozen=frozen,
        growth=math.inf,
        lower_final=lower_final,
        name=name or f"sa_solver({predictor}, {corrector}, eta2 {_noise_level(eta2)}, {second})",
        source=f"{_SA}, algorithm 1",
        fragile=fragile,
        member=member,
        aliases=aliases,
    )


def er_noise(rho: Array) -> Array:
    """eta^2 of the noise scale that ER-SDE-Solver uses by default,
    phi(rho) = rho (exp(rho^0.3) + 10): 1 + eta^2 = dlog phi / dlog rho."""
    u = rho**0.3
    return 0.3 * u / (1 + 10 * np.exp(-u))


def er_sde(
    order: int,
    *,
    phi: float | None = None,
    third: Literal["exact", "uncorrected"] = "exact",
    name: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """ER-SDE-Solver: polynomials in rho = sigma / alpha, 1 NFE per step.

    order: 1 to 3. phi: the exponent p of a noise scale phi = rho^p, p >= 1 (1: ODE, 2: the SDE of
        DDPM); None: the authors' rho (exp(rho^0.3) + 10), which is almost an ODE at low rho. For
        others, sde(order, variable="rho", eta2=...) with eta^2 = dlog phi / dlog rho - 1.
    third: "uncorrected" is order 3 as published, whose first derivative is the last divided
        difference: second order even as an ODE solver.

    Weak order min(order, 2), strong order 1. Source: arXiv 2309.06169, algorithms 1 to 3; integrals
    exactly, where the official code adds up 100 rectangles.
    """
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(f"order = {order!r}; need 1, 2 or 3")
    if phi is not None and _number("phi", phi) < 1:
        raise ValueError(f"phi = {phi!r}; need an exponent >= 1, or None")
    special = [] if phi is None else [f"phi rho^{phi:g}"]
    special += ["uncorrected"] * (third != "exact")
    return sde(
        order,
        eta2=er_noise if phi is None else phi - 1,
        variable="rho",
        third=third,
        growth=math.inf,
        name=name or f"er_sde({', '.join(map(str, [order, *special]))})",
        source=f"{_ER}, algorithm {order}",
        member="ddim" if order == 1 else f"er_ode_{order}" * (third == "exact"),
        aliases=aliases,
    )


# One node, the noise of every step chosen for itself


def ancestral(
    eta: float | Deviation = 1.0,
    *,
    variance: Literal["small", "large"] | Deviation = "small",
    name: str | None = None,
    source: str = "Denoising Diffusion Implicit Models, 2010.02502, eqs. 12 and 16",
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """x_t = alpha_t D + sqrt(sigma_t^2 - v^2) e + w z, 1 NFE per step, weak and strong order 1.

    eta: v = eta sigma_t sqrt(1 - e^{-2h}), at most sigma_t. 0: DDIM; 1: DDPM, Euler ancestral of
        k-diffusion, sde(1). Or a function (start, end) -> v of levels, 0 <= v <= sigma_t.
    variance: of the noise alone: "small" is w = v, the variance of DDPM's posterior for data at one
        point; "large" is its variance for data N(0, I),
        w = eta sqrt((1 - e^{-2h}) (alpha_t^2 + sigma_t^2) / (alpha_s^2 + sigma_s^2)) sigma_s
        (DDPM's beta, sigma-hat of DDIM), which inflates the variance of few steps; or a function
        (start, end) -> w.

    An eta between 0 and 1 is not one SDE: eta^2 of that step depends on h (see `sde`). Draws of
    functions belong to no path; their order is what the function makes it, 1 is claimed.
    """
    if not callable(variance) and variance not in ("small", "large"):
        raise ValueError(unknown("variance", variance, ("small", "large")))
    choice = _User(1.0, eta) if callable(eta) else _Eta(_number("eta", eta))
    special = [_called(eta), _called(variance)][: 1 if variance == "small" else 2]
    name = name or f"ancestral({', '.join(special)})"
    return _one_node(_OneNode(choice, variance), name, source, aliases)


def _called(value: Any) -> str:
    return getattr(value, "__name__", "function") if callable(value) else f"{value}"


def jump(
    gamma: float = 1.0,
    *,
    to: Literal["rho", "time"] = "rho",
    name: str | None = None,
    source: str = "Consistency Models, 2303.01469, algorithm 1 (gamma = 1)",
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """Jump beyond the next level by DDIM, then add noise up to it: 1 NFE per step.

    gamma: 1 jumps to the data: x_t = alpha_t D + sigma_t z (consistency models; latent ones, LCM,
        arXiv 2310.04378); 0 is DDIM.
    to: where the jump goes. "rho": sqrt(1 - gamma^2) rho_t, so that v = gamma sigma_t (CTM, arXiv
        2310.02279). "time": the time (1 - gamma) t, counted from the clean end and rounded down
        where times are integers (TCD, arXiv 2402.19159).

    For networks that give a sample, as consistency functions do. With a denoiser it does not
    converge as steps are added, whatever gamma > 0 (order 0): each step forgets a fixed share of
    the state and replaces it by the mean.
    """
    gamma = _number("gamma", gamma, 1.0)
    if to not in ("rho", "time"):
        raise ValueError(unknown("to", to, ("rho", "time")))
    return _one_node(
        _OneNode(_Jump(gamma, to), "small"), name or f"jump({gamma:g}, {to})", source, aliases
    )


def _one_node(step: _OneNode, name: str, source: str, aliases: tuple[str, ...] = ()) -> Multistep:
    choice = step.choice
    ends = "at sigma = 0 order 1" + "; no convergence with a denoiser" * (step.order == 0)
    return Multistep(
        name=name,
        order=step.order,
        step=step,
        source=source,
        ends=ends,
        nodes=1,
        stochastic=not choice.none,
        strong_order=int(isinstance(choice, _Eta) and not choice.none),
        scaled=None if choice.none else partial(_scaled_one_node, step, name, source),
        member="" if choice.none else "ddim",
        aliases=aliases,
    )


def _scaled_one_node(step: _OneNode, name: str, source: str, factor: float) -> Multistep:
    whole = step.choice.factor * _number("factor", factor)
    if isinstance(step.choice, _Jump):
        _number("gamma", whole, 1.0)
    step = replace(step, choice=replace(step.choice, factor=whole))
    if callable(step.variance):
        step = replace(step, variance=partial(_times, step.variance, factor))
    return _one_node(step, name if factor == 1 else f"{name} x {factor:g}", source)


@dataclass(frozen=True)
class _Choice:
    """v of a step."""

    factor: float

    @property
    def none(self) -> bool:
        return self.factor == 0

    def clock(self, start: Level, end: Level) -> tuple[float, float] | None:
        return None


@dataclass(frozen=True)
class _Eta(_Choice):
    def __call__(self, process: Process, start: Level, end: Level) -> float:
        if self.none:
            return 0.0
        return min(1.0, self.factor * _share(start, end)) * end.sigma

    def clock(self, start: Level, end: Level) -> tuple[float, float] | None:
        """For short steps eta^2 is factor^2."""
        return self.factor**2 * start.lam, self.factor**2 * end.lam


@dataclass(frozen=True)
class _User(_Choice):
    function: Deviation

    def __call__(self, process: Process, start: Level, end: Level) -> float:
        if self.none:
            return 0.0
        v = float(self.function(start, end)) * self.factor
        if not 0 <= v <= end.sigma * (1 + 1e-12):
            raise ValueError(
                f"eta: the function gives v = {v:.6g} for the step from {start} to {end}; need "
                "0 <= v <= sigma at its end"
            )
        return min(v, end.sigma)


@dataclass(frozen=True)
class _Jump(_Choice):
    to: str

    def __call__(self, process: Process, start: Level, end: Level) -> float:
        if self.to == "rho" or self.none:
            return self.factor * end.sigma
        clean = process.t_clean
        if process.integer_times or clean is None or not math.isfinite(clean):
            clean = process.t_end
        t = clean + (1 - self.factor) * (end.t - clean)
        if process.integer_times:
            t = math.floor(t)
        return _share(end, process.level(t)) * end.sigma


def _share(start: Level, end: Level) -> float:
    """sqrt(1 - e^{-2h})"""
    return math.sqrt(-math.expm1(2 * (start.lam - end.lam)))


def _times(function: Deviation, factor: float, start: Level, end: Level) -> float:
    return factor * function(start, end)


@dataclass(frozen=True)
class _OneNode:
    """The coefficient function of one node with a chosen v."""

    choice: _Eta | _User | _Jump
    variance: str | Deviation

    @property
    def order(self) -> int:
        """With a jump every step, however short, forgets a fixed share of the state."""
        return 0 if isinstance(self.choice, _Jump) and not self.choice.none else 1

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        start = history[0]
        if end.sigma == 0:
            return Formula([0.0], [end.alpha], 1)
        v = self.choice(process, start, end)
        keep = math.sqrt((end.sigma - v) * (end.sigma + v))
        b = 0.0 if end.alpha == 0 else -end.alpha * math.expm1(start.lam - end.lam)
        b += start.alpha / start.sigma * v * v / (end.sigma + keep)
        std = self._std(start, end, v)
        noise = {Draw(start, end, self.choice.clock(start, end)): std} if std > 0 else {}
        return Formula([keep / start.sigma], [b], self.order, std == v, noise=noise)

    def _std(self, start: Level, end: Level, v: float) -> float:
        if self.variance == "small" or self.choice.none:
            return v
        if callable(self.variance):
            std = float(self.variance(start, end))
            if not 0 <= std < math.inf:
                raise ValueError(
                    f"variance: the function gives {std} for the step from {start} to {end}; need "
                    "a standard deviation >= 0"
                )
            return std
        size = math.hypot(end.alpha, end.sigma) / math.hypot(start.alpha, start.sigma)
        return self.choice.factor * _share(start, end) * start.sigma * size
