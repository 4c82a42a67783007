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

import numpy as np

from ._process import Array, Level, Process

__all__ = ["FORMS", "VARIABLES", "scale", "weights"]

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

    `process` is needed for the variable "t" only. The end may be clean (lambda = inf) and a single
    node needs no finite lambda at all; otherwise start and nodes need finite lambda, except that
    the variables "t" and "own" take a node with alpha = 0 where their value there is finite.
    """
    if len(nodes) == 1:
        return np.array([_total(form, start, end)])
    h = end.lam - start.lam
    if math.isinf(h) and form == "data":
        # All the kernel's mass sits at the end: extrapolate D to it.
        if _infinite(form, variable, end):
            raise ValueError(f"{form} form in {variable}: no limit at sigma = 0 beyond order 1")
        return end.alpha * _basis(form, variable, nodes, [end])[:, 0]
    lam = start.lam
    low = max(0.0, h - _FAR) if form == "data" else 0.0
    high = min(h, _FAR if form == "noise" else _FAR + abs(lam))
    edges = np.linspace(low, high, max(1, math.ceil(high - low)) + 1)
    if variable == "t" and process is not None:
        edges = np.unique(np.append(edges, process.knots(lam + low, lam + high) - lam))
    widths = np.diff(edges)
    delta = (edges[:-1, None] + widths[:, None] * _X).ravel()
    mass = (widths[:, None] * _W).ravel() * _kernel(form, start, end, h, delta)
    points = Level(
        process.time(lam + delta) if variable == "t" and process is not None else None,
        None,
        None,
        delta,
    )
    return _basis_at(form, variable, nodes, points, lam) @ mass


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


def _infinite(form: str, variable: str, level: Level) -> bool:
    """Whether the basis variable is infinite at a level."""
    if variable == "lambda":
        return math.isinf(level.lam)
    if variable == "t":
        return math.isinf(level.t)
    if variable == "rho" or form == "noise":
        return level.alpha == 0
    return level.sigma == 0 if form == "data" else False


def usable(form: str, variable: str, level: Level) -> bool:
    """Whether a level can be a node: the basis variable is finite there."""
    return not _infinite(form, variable, level)


def _basis(form: str, variable: str, nodes: Sequence[Level], at: Sequence[Level]) -> Array:
    """ell_j at single levels (no quadrature), as (nodes, at)."""
    base = next(n.lam for n in nodes if math.isfinite(n.lam))
    return np.array(
        [
            [
                math.prod(
                    _difference(form, variable, a, k, base)
                    / _difference(form, variable, j, k, base)
                    for k in nodes
                    if k is not j
                )
                for a in at
            ]
            for j in nodes
        ]
    )


def _basis_at(
    form: str, variable: str, nodes: Sequence[Level], points: Level, base: float
) -> Array:
    """ell_j at the quadrature points, whose `lam` counts from `base`, as (nodes, points)."""
    factors = [_difference(form, variable, points, k, base, True) for k in nodes]
    rows = []
    for j, node in enumerate(nodes):
        row = np.ones_like(points.lam)
        for k, other in enumerate(nodes):
            if k != j:
                row = row * (factors[k] / _difference(form, variable, node, other, base))
        rows.append(row)
    return np.array(rows)


def _difference(form: str, variable: str, a: Level, b: Level, base: float, offset: bool = False):
    """u(a) - u(b) up to a common factor, without cancellation. With `offset`, a.lam counts from
    `base` already."""
    if variable == "t":
        return a.t - b.t
    da = a.lam if offset else a.lam - base
    db = b.lam - base
    if variable == "lambda":
        return da - db
    if variable == "rho" or form == "noise":
        # exp(-da) - exp(-db), the form that is exact for da near db
        return np.exp(-db) * np.expm1(db - da)
    if form == "data":
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


def _tau(lam):
    return 1 / (1 + np.exp(lam))


def _phi(lam):
    return np.arctan(np.exp(-lam))
