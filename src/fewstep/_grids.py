"""Grids: how to place the times of a plan between the noisy and the clean end.

A plan of N steps has N + 1 times. It ends either where the network's knowledge ends
(final = "min": the last time is t_end, sigma small but not 0) or at the clean end
(final = "zero": the last time is t_clean, sigma = 0).

Grids in t run straight on to t_clean, and so does `softened`, which is the same on every process.
Where that would put a node between t_end and t_clean, where the network knows nothing, they place N
times down to t_end and append t_clean. The other grids in lambda or rho always do (lambda = inf at
t_clean): the convention of EDM and k-diffusion, which spends an evaluation at t_end. If
alpha(t_start) = 0 they start at t_start and go on from lambda = log(1e-3).

    name         placement, u = i / (steps)
    uniform      t + u dt (on the shifted clock of a shifted flow)
    quadratic    sqrt(t) uniform                                        (DDIM, arXiv 2010.02502)
    lambda       lambda uniform                                         (DPM-Solver, 2206.00927)
    exponential  log(sigma / alpha) uniform: the same as lambda, by its k-diffusion name
    karras       rho^(1/7) uniform                                      (EDM, 2206.00364, eq. 5)
    softened     (rho / (rho + 4))^(1/2.5) uniform, rho = sigma / alpha (ours; the default)
    beta         t at the quantiles of Beta(0.6, 0.6)                   (2407.12173)
    leading, linspace, trailing: integer times of a discrete process    (2305.08891, table 2)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._prediction import unknown
from ._process import Array, Process

__all__ = [
    "Grid",
    "as_grid",
    "beta",
    "check_nodes",
    "grids",
    "karras",
    "power",
    "softened",
    "times",
]


@dataclass(frozen=True)
class Grid:
    """A named placement of times: place(process, steps, final) -> steps + 1 times, noise first."""

    name: str
    place: Callable[[Process, int, str], Array]
    discrete: bool = False  # only for processes with integer times


def _clean(process: Process) -> float:
    """t_clean as a float; `times` has refused processes without one where it matters."""
    return math.nan if process.t_clean is None else process.t_clean


def _closed(process: Process, t: Array, final: str) -> Array:
    """Times from t_start to t_end, both exact, and t_clean appended if final is "zero"."""
    t[-1] = process.t_end
    t[0] = process.t_start
    return np.append(t, _clean(process)) if final == "zero" else t


def _in_lambda(process: Process, steps: int, final: str, clock, inverse) -> Array:
    """Uniform in clock(lambda) from the start to t_end; t_clean appended if final is "zero"."""
    count = steps if final == "zero" else steps + 1
    ends = clock(np.array([process.lam_start, float(process.lam(process.t_end))]))
    return _closed(process, process.time(inverse(np.linspace(ends[0], ends[1], count))), final)


def _in_time(process: Process, steps: int, final: str, clock, inverse) -> Array:
    """Uniform in clock(|t - clean end|), running on to t_clean where that is finite and no node
    would fall between t_end and it (there the network knows nothing)."""
    clean = _clean(process)
    origin = clean if math.isfinite(clean) else 0.0
    sign = 1.0 if process.t_start > origin else -1.0
    ends = process.t_start, process.t_end
    start, end = (sign * (float(process.unwarp(t)) - origin) for t in ends)

    def lay(last: float, count: int) -> Array:
        u = inverse(np.linspace(0.0, 1.0, count), clock(start), clock(last))
        return process.warp(origin + sign * u)

    if final == "zero" and math.isfinite(clean):
        t = lay(0.0, steps + 1)
        t[0], t[-1] = process.t_start, clean
        if process.lam(t[-2]) <= process.lam(process.t_end):
            return t
    return _closed(process, lay(end, steps if final == "zero" else steps + 1), final)


def power(exponent: float, name: str | None = None) -> Grid:
    """t^(1 / exponent) uniform: 1 is uniform in t, 2 quadratic."""
    if not exponent > 0:
        raise ValueError(f"exponent = {exponent}; need a positive number")

    def place(process: Process, steps: int, final: str) -> Array:
        return _in_time(
            process,
            steps,
            final,
            lambda t: t ** (1 / exponent),
            lambda u, a, b: np.maximum(a + u * (b - a), 0.0) ** exponent,
        )

    return Grid(name or f"power({exponent:g})", place)


def karras(rho: float = 7.0) -> Grid:
    """(sigma / alpha)^(1 / rho) uniform (arXiv 2206.00364, equation 5); rho -> inf is lambda."""
    if not rho > 0:
        raise ValueError(f"rho = {rho}; need a positive number")

    def place(process: Process, steps: int, final: str) -> Array:
        return _in_lambda(
            process,
            steps,
            final,
            lambda lam: np.exp(-lam / rho),
            lambda u: -rho * np.log(u),
        )

    return Grid("karras" if rho == 7 else f"karras({rho:g})", place)


def softened(scale: float = 4.0, power: float = 2.5) -> Grid:
    """(rho / (rho + scale))^(1 / power) uniform in rho = sigma / alpha: the same noise levels on
    every process, from pure noise (alpha = 0) to sigma = 0, both included.

    scale = inf is Karras, power = 1 the uniform grid of a flow of shift `scale`. Chosen on
    image-like problems (benchmarks/defaults.py), where scale 3 to 4 with power 2 to 3 is a plateau
    for data of standard deviation 0.5 to 0.75; scale should grow with that of the data.
    """
    if not (0 < scale < math.inf and power > 0):
        raise ValueError(f"scale = {scale}, power = {power}; need positive numbers")

    def place(process: Process, steps: int, final: str) -> Array:
        def share(t: float) -> float:
            return float(1 / (1 + scale * np.exp(process.lam(t)))) ** (1 / power)

        def lay(last: float, count: int) -> Array:
            inner = np.linspace(share(process.t_start), last, count)[1:-1] ** power
            t = process.time(np.log1p(-inner) - np.log(inner) - math.log(scale))
            return np.concatenate([[process.t_start], t, [process.t_end]])

        if final == "zero":
            t = lay(0.0, steps + 1)
            t[-1] = _clean(process)
            if process.lam(t[-2]) <= process.lam(process.t_end):
                return t
        return _closed(process, lay(share(process.t_end), steps + (final == "min")), final)

    default = (scale, power) == (4.0, 2.5)
    return Grid("softened" if default else f"softened({scale:g}, {power:g})", place)


def beta(a: float = 0.6, b: float = 0.6) -> Grid:
    """t at the quantiles of Beta(a, b): dense at both ends for a, b < 1 (arXiv 2407.12173).

    The quantiles are taken in t, as in the paper; diffusers takes them in sigma, which leaves one
    giant last step. Needs scipy.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"a = {a}, b = {b}; need positive numbers")

    def place(process: Process, steps: int, final: str) -> Array:
        try:
            from scipy.special import betaincinv
        except ImportError as error:
            raise ImportError("grid 'beta' needs scipy: pip install \"fewstep[exact]\"") from error
        return _in_time(
            process,
            steps,
            final,
            lambda t: t,
            lambda u, start, last: start + (last - start) * betaincinv(a, b, u),
        )

    return Grid("beta" if (a, b) == (0.6, 0.6) else f"beta({a:g}, {b:g})", place)


def _lambda(process: Process, steps: int, final: str) -> Array:
    return _in_lambda(process, steps, final, lambda lam: lam, lambda u: u)


def _spaced(name: str, evaluated: Callable[[int, int], ArrayLike]) -> Grid:
    """The three spacings of integer times 0..n-1. final = "min" evaluates N of the N + 1 times
    and lands on time 0; final = "zero" evaluates all and lands on the clean end."""

    def place(process: Process, steps: int, final: str) -> Array:
        n = round(process.t_start) + 1
        if steps + (final == "min") > n:
            raise ValueError(f"nfe = {steps}; the process has {n} integer times")
        if final == "zero":
            if name == "leading" and steps == 1:
                raise ValueError(
                    "grid = 'leading' with one step starts from pure noise at time 0, where there "
                    "is almost none; use 'trailing', or more steps"
                )
            return np.append(evaluated(n, steps), _clean(process))
        if name == "trailing":
            return np.append(evaluated(n, steps), 0.0)
        return np.append(np.asarray(evaluated(n, steps + 1))[:-1], 0.0)

    return Grid(name, place, discrete=True)


grids: dict[str, Grid] = {
    g.name: g
    for g in (
        power(1, "uniform"),
        power(2, "quadratic"),
        Grid("lambda", _lambda),
        Grid("exponential", _lambda),
        karras(),
        softened(),
        beta(),
        _spaced("leading", lambda n, k: np.arange(k - 1, -1, -1.0) * (n // k)),
        _spaced(
            "linspace",
            lambda n, k: np.round(np.linspace(n - 1, 0, k)) if k > 1 else np.array([n - 1.0]),
        ),
        _spaced("trailing", lambda n, k: np.round(n - np.arange(k) * (n / k)) - 1),
    )
}


def as_grid(grid: str | Grid) -> Grid:
    """Look a grid up by name."""
    if isinstance(grid, Grid):
        return grid
    if not isinstance(grid, str) or grid not in grids:
        raise ValueError(unknown("grid", str(grid), grids))
    return grids[grid]


def times(process: Process, grid: Any, nfe_steps: int | None, final: str, rounds: bool) -> Array:
    """The times of a plan, checked. `grid`: a name, a `Grid`, or a list of times (returned
    bit-identical). With `rounds`, laid-out times are moved to distinct integers."""
    if final not in ("zero", "min"):
        raise ValueError(f"final = {final!r}; accepted: 'zero' (sigma = 0) or 'min' (t_end)")
    if isinstance(grid, (str, Grid)):
        grid = as_grid(grid)
        assert nfe_steps is not None
        if final == "zero" and process.t_clean is None:
            raise ValueError(
                f"final = 'zero', but {process!r} has no t_clean, a time at which sigma = 0; "
                "use final='min'"
            )
        if grid.discrete and not process.integer_times:
            raise ValueError(
                f"grid = {grid.name!r} is for processes with integer times; for {process!r} use "
                "'uniform', which is what 'trailing' is there"
            )
        t = grid.place(process, nfe_steps, final)
        if rounds:
            t = _distinct_integers(t)
    else:
        try:
            t = np.array([float(s) for s in grid], dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"grid = {grid!r}; give a name, a Grid or a list of times") from None
        if rounds and bool((t[:-1] != np.round(t[:-1])).any()):
            bad = t[:-1][t[:-1] != np.round(t[:-1])][0]
            raise ValueError(
                f"grid contains {bad:g}, which is not one of the integer times of this network; "
                "round it, or set integer_times=False if the network was trained on any time"
            )
    check_nodes(process, t)
    return t


def _distinct_integers(t: Array) -> Array:
    """The nearest integers, moved apart where they coincide; both ends stay. Grids that crowd
    (Karras on a cosine table) collapse when rounded, which is how other libraries crash."""
    n = np.round(t)
    sign = 1.0 if n[0] > n[-1] else -1.0
    n = sign * n
    if n[0] - n[-1] < len(n) - 1:
        raise ValueError(
            f"nfe: {len(n) - 1} steps do not fit between the integer times {sign * n[0]:g} and "
            f"{sign * n[-1]:g}; use fewer"
        )
    for i in range(1, len(n)):
        n[i] = min(n[i], n[i - 1] - 1)
    n[-1] = max(n[-1], np.round(sign * t[-1]))
    for i in range(len(n) - 2, 0, -1):
        n[i] = max(n[i], n[i + 1] + 1)
    return sign * n


def check_nodes(process: Process, t: Array) -> None:
    """Refuse times that repeat, run backward or leave the range, with the table of nodes."""
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"grid has {t.size} times; need at least 2 (one step)")
    if np.isnan(t).any():
        raise ValueError(f"grid contains NaN:\n{_table(process, t, int(np.isnan(t).argmax()))}")
    last = process.t_end if process.t_clean is None else process.t_clean
    low, high = sorted((process.t_start, last))
    for i, s in enumerate(t):
        evaluated = i < len(t) - 1
        if not low <= s <= high:
            reason = f"is outside the range {high:g} to {low:g}"
        elif evaluated and process.lam(s) > process.lam(process.t_end) + 1e-9:
            reason = f"is cleaner than t_end = {process.t_end:g}, which only the last node may be"
        elif i and not process.lam(s) > process.lam(t[i - 1]):
            same = s == t[i - 1]
            reason = "repeats the one before" if same else "goes back toward noise"
        else:
            continue
        raise ValueError(f"grid: node {i} (t = {s:g}) {reason}\n{_table(process, t, i)}")


def _table(process: Process, t: Array, bad: int) -> str:
    rows = [f"{'':2}{'node':>4} {'t':>14} {'sigma':>12} {'lambda':>10}"]
    with np.errstate(all="ignore"):
        for i, s in enumerate(t):
            sigma, lam = float(process.sigma(s)), float(process.lam(s))
            mark = ">" if i == bad else ""
            rows.append(f"{mark:2}{i:>4} {s:>14.8g} {sigma:>12.6g} {lam:>10.5g}")
    return "\n".join(rows)
