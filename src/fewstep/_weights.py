r"""Weights: the integral of an exponential kernel times a Lagrange basis.

The probability-flow ODE has four forms dX/dzeta = M with X = x / N, each exact for every process:

    form     N                      zeta                     M
    data     sigma                  kappa = alpha / sigma    D
    noise    alpha                  rho = sigma / alpha      e = (x - alpha D) / sigma
    v        R = hypot(alpha,sigma) phi = atan2(sigma,alpha) v = (alpha e - sigma D) / R
    flow     alpha + sigma          tau = sigma / N          u = e - D

A solver replaces M by the polynomial in a basis variable u(lambda) through p nodes:

    x_t = (N_t / N_s) x_s + sum_j W_j M_j,    W_j = N_t int_s^t ell_j(u) (dzeta / dlambda) dlambda.

With delta = lambda - lambda_s the kernel N_t dzeta/dlambda is

    data   alpha_t exp(-(h - delta))                noise  -(alpha_t sigma_s / alpha_s) exp(-delta)
    v      -R_t / (2 cosh lambda)                   flow   -(alpha_t + sigma_t) tau (1 - tau)

(the c-angle form of the literature is `v` on rescaled data). It never changes sign, nor does ell_j
when all nodes lie outside the step; so Gauss-Legendre quadrature of the product form of ell_j adds
terms of one sign and nothing cancels, for any step size. The textbook route, phi functions by
recursion and a Vandermonde system, loses digits as h^-k. Weights agree with 50-digit arithmetic to
1e-12 for h from 1e-6 to 20 (tests); with the basis variable t, only as far as differences of
float64 times allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._prediction import unknown
from ._process import Array, Level, Process

__all__ = ["FORMS", "VARIABLES", "scale", "usable", "weights"]

FORMS = ("data", "noise", "v", "flow")
#: "own" is the form's own zeta, in which the weights are ordinary variable-step Adams weights.
VARIABLES = ("lambda", "t", "rho", "own")

_X, _W = np.polynomial.legendre.leggauss(16)
_X, _W = 0.5 * (_X + 1), 0.5 * _W
_FAR = 60.0  # exp(-60) is nothing beside 1 in float64


def scale(form: str, level: Level) -> float:
    """N of a form: x / N is the coordinate in which the ODE has no linear part."""
    if form == "data":
        return level.sigma
    if form == "noise":
        return level.alpha
    return math.hypot(level.alpha, level.sigma) if form == "v" else level.alpha + level.sigma


def weights(
    form: str,
    variable: str,
    start: Level,
    end: Level,
    nodes: Sequence[Level],
    process: Process | None = None,
) -> Array:
    """W_j for a step from `start` to `end` through `nodes` (any order, any side, all different).

    `process` is needed for the variable "t" only. The end may be clean (lambda = inf), or noisier
    than the start. Two nodes or more need a finite lambda at `start`, a finite basis variable at
    every node, and alpha > 0 at the end.
    """
    for argument, value, known in (("form", form, FORMS), ("variable", variable, VARIABLES)):
        if value not in known:
            raise ValueError(unknown(argument, value, known))
    if len(nodes) == 1:
        return np.array([_total(form, start, end)])
    lam, h = start.lam, end.lam - start.lam
    if not math.isfinite(lam):
        raise ValueError(f"start: lambda = {lam}; from there one node (order 1) is all there is")
    if h == -math.inf:
        raise ValueError("end: alpha = 0; to there one node (order 1) is all there is")
    if not all(usable(form, variable, node) for node in nodes):
        raise ValueError(f"nodes: {variable} is infinite at one of them; leave it out")
    points = [(n.t, n.lam - lam) for n in nodes]
    if math.isinf(h) and form == "data":
        # All the kernel's mass sits at the end: extrapolate D to it.
        if not usable(form, variable, end):
            raise ValueError(f"{form} form in {variable}: no limit at sigma = 0 beyond order 1")
        return end.alpha * _lagrange(form, variable, points, end.t, math.inf, lam)
    if h < 0:  # upward: towards noise
        low, high = 0.0, max(h, -_FAR - abs(lam))
    else:
        low = max(0.0, h - _FAR) if form == "data" else 0.0
        high = min(h, _FAR if form == "noise" else _FAR + abs(lam))
    edges = np.linspace(low, high, max(1, math.ceil(abs(high - low))) + 1)
    if variable == "t":
        if process is None:
            raise ValueError("process: the variable 't' needs t(lambda); give the process")
        knots = process.knots(lam + min(low, high), lam + max(low, high)) - lam
        edges = np.unique(np.append(edges, knots))[:: 1 if h > 0 else -1]
    widths = np.diff(edges)
    delta = (edges[:-1, None] + widths[:, None] * _X).ravel()
    mass = (widths[:, None] * _W).ravel() * _kernel(form, start, end, h, delta)
    t = process.time(lam + delta) if variable == "t" and process is not None else None
    return _lagrange(form, variable, points, t, delta, lam) @ mass


def _total(form: str, start: Level, end: Level) -> float:
    """Sum of the weights, N_t (zeta_t - zeta_s), in closed form."""
    cross = start.sigma * end.alpha - end.sigma * start.alpha
    if math.isfinite(start.lam) and math.isfinite(end.lam):
        # alpha_t sigma_s - sigma_t alpha_s without the cancellation of a short step
        cross = -start.sigma * end.alpha * math.expm1(start.lam - end.lam)
    if form == "data":
        return cross / start.sigma
    if form == "noise":
        return -cross / start.alpha
    if form == "v":
        dot = start.alpha * end.alpha + start.sigma * end.sigma
        return -scale(form, end) * math.atan2(cross, dot)
    return -cross / (start.alpha + start.sigma)


def _kernel(form: str, start: Level, end: Level, h: float, delta: Array) -> Array:
    if form == "data":
        return end.alpha * np.exp(delta - h)
    if form == "noise":
        return -(end.alpha * start.sigma / start.alpha) * np.exp(-delta)
    lam = start.lam + delta
    if form == "v":
        return -scale(form, end) * 0.5 / np.cosh(lam)
    return -scale(form, end) * 0.25 / np.cosh(0.5 * lam) ** 2


def usable(form: str, variable: str, level: Level) -> bool:
    """Whether a level can be a node: the basis variable is finite there."""
    if variable == "lambda":
        return math.isfinite(level.lam)
    if variable == "t":
        return math.isfinite(level.t)
    if variable == "rho" or form == "noise":
        return level.alpha > 0
    return level.sigma > 0 or form != "data"


#: A time and a lambda that counts from a common base.
_Point = tuple[Any, Any]


def _lagrange(
    form: str, variable: str, nodes: Sequence[_Point], t: Any, delta: Any, base: float
) -> Array:
    """The basis ell_j at the points (t, delta), in product form, as (nodes, *points)."""

    def gap(a: _Point, b: _Point) -> Any:
        return _difference(form, variable, a, b, base)

    rows = []
    for j in nodes:
        row = np.ones_like(delta)
        for k in nodes:
            if k is not j:
                row = row * (gap((t, delta), k) / gap(j, k))
        rows.append(row)
    return np.array(rows)


def _difference(form: str, variable: str, a: _Point, b: _Point, base: float) -> Any:
    """u(a) - u(b) up to a common factor, without cancellation."""
    if variable == "t":
        return a[0] - b[0]
    da, db = a[1], b[1]
    if variable == "lambda":
        return da - db
    if variable == "rho" or form == "noise":
        # exp(-da) - exp(-db), the form that is exact for da near db
        return np.exp(-db) * np.expm1(db - da)
    if form == "data":
        if np.any(np.isinf(da)) or np.isinf(db):  # alpha = 0: nothing is near
            return np.exp(da) - np.exp(db)
        return np.exp(db) * np.expm1(da - db)
    # flow: tau = 1 / (1 + exp(lam)); v: phi = atan(exp(-lam)). Where alpha = 0, lam = -inf, nothing
    # is near and the plain difference is exact; elsewhere it is not.
    la, lb = da + base, db + base
    if np.any(np.isinf(la)) or np.isinf(lb):
        value = _tau if form == "flow" else _phi
        return value(la) - value(lb)
    if form == "flow":
        return -np.sinh(0.5 * (da - db)) / (2 * np.cosh(0.5 * la) * np.cosh(0.5 * lb))
    return -np.arctan(np.sinh(0.5 * (da - db)) / np.cosh(0.5 * (la + lb)))


def _tau(lam: Any) -> Any:
    return 1 / (1 + np.exp(lam))


def _phi(lam: Any) -> Any:
    return np.arctan(np.exp(-lam))
