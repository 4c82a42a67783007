r"""The Gaussian-matched multistep family: exponential Adams methods with one scale per mode.

The exponential family (`_exponential`) has one clock for the whole state, and its v and flow forms
take data of standard deviation 1 for granted: their clocks turn where sigma = alpha. In mode k of
an orthogonal basis the data have their own scale c_k, and the clock should turn at
sigma = c_k alpha. With r = B (x - alpha mu), d = B (D - mu), mode by mode:

    form  N                        clock u                     M, with r = N y and dy/du = M
    v     hypot(c alpha, sigma)    phi = atan(sigma/(c alpha)) (c alpha / N) e - (sigma / N) d / c
    flow  c alpha + sigma          tau = sigma / N             e - d / c

    e = (r - alpha d) / sigma,      r_t = (N_t / N_s) r_s + N_t sum_j w_j M_j

with w_j the variable-step Adams-Bashforth weights in u: the v and flow forms of `_weights` on the
process (c alpha, sigma) with data prediction d / c. Both are dr/d rho = (r - d) / rho, exactly.

v:    M = 0 for Gaussian data of mean mu and standard deviations c_k in the basis B: any step is
      exact there. It reproduces constant data and constant noise to its order only.
flow: M is constant, and any step exact, for constant data plus constant noise, whatever c.

c -> 0 is data form in alpha / sigma, c -> inf noise form in sigma / alpha, both with Adams weights
in their own variable.

Rows whose weights amplify by more than growth 2^p use fewer nodes, mode by mode; the order of a row
is that of its worst mode. Corrector and ends are as in the exponential family. Weights are exact:
differences of u are products (no cancellation), the integral a Gauss rule of sufficient degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._basis import Basis
from .._prediction import unknown
from .._process import Array, Level, Process
from .._weights import weights
from ._base import Draft, Formula, Multistep

__all__ = ["Gaussian", "gaussian"]

_SOURCE = "exponential Adams-Bashforth on modes of their own scale (ours); v: compare 2410.11081"


@dataclass(frozen=True)
class Gaussian(Multistep):
    """A multistep method whose rows act on the modes of `basis` (None: on the elements)."""

    basis: Basis | None = field(default=None, hash=False)

    def draft(self, process: Process, times: Array, nfe: int | None = None) -> Draft:
        return replace(super().draft(process, times, nfe), basis=self.basis)


def gaussian(
    order: int,
    scales: ArrayLike = 0.5,
    basis: Basis | None = None,
    *,
    form: str = "flow",
    corrector: bool = False,
    growth: float = 1.5,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Gaussian:
    """An Adams method on modes of their own scale, 1 NFE per step.

    order: number of nodes, 1 to 4. scales: standard deviation of the data in each mode, in the
        units of x_0: a number, or what `basis.spread` accepts. `scales_from_data`,
        `scales_from_model` and `scales_from_jacobian` measure them.
    basis: None for the elements themselves, about the mean 0.
    form: "flow" (exact for constant data and noise) or "v" (exact for Gaussian data).
    corrector: correct every state but the last with the evaluation made there: one order more, no
        evaluation more. growth: as in `exponential`.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 4:
        raise ValueError(f"order = {order!r}; need an integer from 1 to 4")
    if form not in ("v", "flow"):
        raise ValueError(unknown("form", form, ("v", "flow")))
    if not growth > 0:
        raise ValueError(f"growth = {growth}; need a positive number (math.inf for no limit)")
    c = np.array(scales, dtype=np.float64) if basis is None else np.array(basis.spread(scales))
    if basis is None and c.ndim:
        raise ValueError(
            f"scales has shape {c.shape}, but there is no basis; give one, or one number"
        )
    if not (c.size and np.isfinite(c).all() and (c > 0).all()):
        raise ValueError(f"scales = {_brief(c)}; need positive finite numbers")
    c.flags.writeable = False
    step = _Matched(c, form, growth)
    where = "" if basis is None else f", {basis.kind}"
    special = ", corrector" * corrector + f", growth {growth:g}" * (growth != 1.5)
    ends = "start-up orders 1, 2, ...; at sigma = 0 the limit of the formula"
    if order > 1 and growth < np.inf:
        ends += "; modes whose row would amplify errors take fewer nodes"
    return Gaussian(
        name=name or f"gaussian({order}, {form}, {_brief(c)}{where}{special})",
        order=order + corrector,
        step=step,
        source=_SOURCE,
        ends=ends,
        nodes=order,
        corrector=step.correct if corrector else None,
        aliases=aliases,
        basis=basis,
    )


def _brief(c: Array) -> str:
    return f"{c:g}" if c.ndim == 0 else f"{np.min(c):.3g}..{np.max(c):.3g} {list(c.shape)}"


@dataclass(frozen=True, eq=False)
class _Matched:
    """The coefficient function: process, history (newest first), target -> row of arrays."""

    c: Array
    form: str
    growth: float

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        return self._formula(history, end, 0)

    def correct(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        """The same step with the target's own M as one more node. None from alpha = 0, where
        there is nothing but the first order."""
        if history[1].alpha == 0:
            return None
        return self._formula(history, end, 1)

    def _formula(self, history: Sequence[Level], end: Level, at: int) -> Formula:
        """A step from history[at], through it and all other levels of the history."""
        start = history[at]
        others = [n for n in history if n is not start] if start.alpha else []
        W, order = self._weights(start, end, [start, *others])
        a: list[Any] = [0.0] * len(history)
        b: list[Any] = [0.0] * len(history)
        if self.form == "flow":  # order 1 is DDIM, whatever c
            a[at] = end.sigma / start.sigma
            b[at] = float(weights("data", "lambda", start, end, [start])[0])
        else:
            x, d = self._output(start)
            a[at] = self._scale(end) / self._scale(start) + sum(W) * x
            b[at] = sum(W) * d
        x0, d0 = self._output(start)
        for node, w in zip(others, W[1:], strict=True):
            k, (x, d) = history.index(node), self._output(node)
            a[k], b[k] = w * x, w * d
            a[at], b[at] = a[at] - w * x0, b[at] - w * d0
        base = self._scale(end) / self._scale(start) if start.alpha else None
        return Formula(a, b, order, self.form == "flow", base)

    def _scale(self, level: Level) -> Any:
        signal = self.c * level.alpha
        return np.hypot(signal, level.sigma) if self.form == "v" else signal + level.sigma

    def _output(self, level: Level) -> tuple[Any, Any]:
        """(coefficient of r, coefficient of d) of M."""
        n = self._scale(level)
        d = -n / (self.c * level.sigma)
        return (
            self.c * level.alpha / (n * level.sigma) if self.form == "v" else 1 / level.sigma
        ), d

    def _weights(self, start: Level, end: Level, nodes: Sequence[Level]) -> tuple[list[Any], int]:
        """N_t w_j of every node, zero where a mode does without it, and the least order."""
        h = self._difference(end, start)
        behind = [self._difference(start, n) for n in nodes]
        total = self._scale(end) * h
        W = np.zeros((len(nodes), *np.shape(h)))
        left, order = np.ones(np.shape(h), dtype=bool), len(nodes)
        for p in range(len(nodes), 0, -1):
            trial = np.zeros_like(W)
            for x, mass in zip(*_gauss(p), strict=True):
                for j in range(p):
                    term = total * mass
                    for k in range(p):
                        if k != j:
                            gap = behind[k] if j == 0 else self._difference(nodes[j], nodes[k])
                            term = term * ((h * x + behind[k]) / gap)
                    trial[j] += term
            calm = np.abs(trial).sum(0) <= self.growth * 2**p * np.abs(total)
            take = left & (calm | (p == 1))
            W[:, take] = trial[:, take]
            left &= ~take
            if not left.any():
                break
            order = p - 1
        return list(W), order

    def _clock(self, lam: Any) -> Any:
        return np.arctan(np.exp(-lam)) if self.form == "v" else 1 / (1 + np.exp(lam))

    def _difference(self, a: Level, b: Level) -> Any:
        """u(a) - u(b), without cancellation, also where alpha or sigma is 0."""
        la, lb = a.lam + np.log(self.c), b.lam + np.log(self.c)
        if b.lam == np.inf:  # u = 0 there
            return self._clock(la)
        if a.lam == np.inf:
            return -self._clock(lb)
        if b.lam == -np.inf:  # u is at its largest there, and u(-lam) its distance from that
            return -self._clock(-la)
        if a.lam == -np.inf:
            return self._clock(-lb)
        half = np.sinh(0.5 * (a.lam - b.lam))
        if self.form == "v":
            return -np.arctan(half / np.cosh(0.5 * (la + lb)))
        return -half / (2 * np.cosh(0.5 * la) * np.cosh(0.5 * lb))


def _gauss(nodes: int) -> tuple[Array, Array]:
    """A Gauss rule on [0, 1], exact for the polynomials of this many nodes."""
    x, w = np.polynomial.legendre.leggauss(nodes // 2 + 1)
    return 0.5 * (x + 1), 0.5 * w
