"""Grids: how to place the times of a plan between the noisy and the clean end.

A plan of N steps has N + 1 times. It ends either where the network's knowledge ends
(final = "min": the last time is t_end, sigma small but not 0) or at the clean end
(final = "zero": the last time is t_clean, sigma = 0).

Grids in t run straight on to t_clean, and so do `softened` and `arctan`, which are the same on
every process. Where that would put a node between t_end and t_clean, where the network knows
nothing, they place N times down to t_end and append t_clean. The other grids in lambda or rho
always do (lambda = inf at t_clean): the convention of EDM and k-diffusion, which spends an
evaluation at t_end. `replaced` grids and tables do not: they place N + 1 times down to t_end and
move the last to t_clean. If alpha(t_start) = 0, grids in lambda or rho start at t_start and go on
from lambda = log(1e-3).

    name         placement, u = i / (steps)
    uniform      t + u dt (on the shifted clock of a shifted flow)
    quadratic    sqrt(t) uniform                                        (DDIM, arXiv 2010.02502)
    lambda       lambda uniform                                         (DPM-Solver, 2206.00927)
    exponential  log(sigma / alpha) uniform: the same as lambda, by its k-diffusion name
    karras       rho^(1/7) uniform, rho = sigma / alpha                 (EDM, 2206.00364, eq. 5)
    edm          the same between rho = 80 and 0.002 at most            (EDM, official sampler)
    softened     (rho / (rho + 4))^(1/2.5) uniform                      (ours)
    softened_8   (rho / (rho + 8))^(1/2.5) uniform                      (ours; the default)
    arctan       atan(rho / 0.5) uniform                                (AYS, 2404.14507)
    lambda_zero, karras_zero: `replaced` lambda and karras: no evaluation at t_end
    ays_sd15, ays_sdxl, ays_if, ays_svd: tables of rho, log rho linear in the step between
                 (AYS, 2404.14507); for the model they were optimised on
    beta         t at the quantiles of Beta(0.6, 0.6)                   (2407.12173)
    leading, linspace, trailing: integer times of a discrete process    (2305.08891, table 2)

Made by functions: `power`, `karras`, `softened`, `arctan`, `beta`, `tabulated` with other
parameters; `replaced` and `shifted`, which change another grid; `dmn` and `gits`, which search.
Lists of a fixed number of steps, of papers and distilled models, are in `fewstep.node_lists`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._grid_tables import AYS
from ._prediction import unknown
from ._process import Array, Process

__all__ = [
    "DEFAULT_GRID",
    "Grid",
    "arctan",
    "as_grid",
    "beta",
    "check_nodes",
    "grids",
    "karras",
    "power",
    "replaced",
    "shifted",
    "softened",
    "tabulated",
    "times",
]


# Chosen by benchmarks/defaults.py; see `softened`.
DEFAULT_GRID = "softened_8"


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


def _overlap(process: Process, name: str, low: float, high: float) -> None:
    """Refuse a process whose noise levels all lie outside rho = low to high."""
    end, start = math.exp(-float(process.lam(process.t_end))), math.exp(-process.lam_start)
    if not (low < start and end < high):
        raise ValueError(
            f"grid = {name!r} lies in sigma / alpha = {low:g} to {high:g}, but {process!r} in "
            f"{end:.4g} to {start:.4g}; use a grid that takes its range from the process"
        )


def karras(
    rho: float = 7.0, *, low: float = 0.0, high: float = math.inf, name: str | None = None
) -> Grid:
    """(sigma / alpha)^(1 / rho) uniform (arXiv 2206.00364, equation 5); rho -> inf is lambda.

    low, high: the range of sigma / alpha laid out, where the process goes further; the ends still
    are those of the process. `edm` is 0.002 to 80, the range of EDM's official sampler.
    """
    if not rho > 0:
        raise ValueError(f"rho = {rho}; need a positive number")
    if not 0 <= low < high:
        raise ValueError(f"low = {low}, high = {high}; need 0 <= low < high in sigma / alpha")
    limits = "" if (low, high) == (0.0, math.inf) else f", {low:g} to {high:g}"
    own = "karras" if rho == 7 and not limits else f"karras({rho:g}{limits})"
    name = name or own
    bounds = -math.log(high), -math.log(low) if low else math.inf

    def place(process: Process, steps: int, final: str) -> Array:
        _overlap(process, name, low, high)
        return _in_lambda(
            process,
            steps,
            final,
            lambda lam: np.exp(-np.clip(lam, *bounds) / rho),
            lambda u: -rho * np.log(u),
        )

    return Grid(name, place)


def _in_share(process: Process, steps: int, final: str, share, inverse) -> Array:
    """Uniform in share(lambda), which is finite at alpha = 0 and 0 at sigma = 0: from pure noise to
    the clean end, unless a node would fall between t_end and it. `inverse` gives lambda."""

    def lay(last: float, count: int) -> Array:
        inner = np.linspace(share(float(process.lam(process.t_start))), last, count)[1:-1]
        return np.concatenate([[process.t_start], process.time(inverse(inner)), [process.t_end]])

    if final == "zero":
        t = lay(0.0, steps + 1)
        t[-1] = _clean(process)
        if process.lam(t[-2]) <= process.lam(process.t_end):
            return t
    end = share(float(process.lam(process.t_end)))
    return _closed(process, lay(end, steps + (final == "min")), final)


def softened(scale: float = 4.0, power: float = 2.5) -> Grid:
    """(rho / (rho + scale))^(1 / power) uniform in rho = sigma / alpha: the same noise levels on
    every process, from pure noise (alpha = 0) to sigma = 0, both included.

    scale = inf is Karras, power = 1 the uniform grid of a flow of shift `scale`. The scale should
    grow with that of the data's strongest mode, which grows with the number of pixels: 3 to 4 is
    best for 8x8 digits, 8 to 12 for photographs of 32x32 (benchmarks/defaults.py). 8, "softened_8",
    is the default; 4 is "softened".
    """
    if not (0 < scale < math.inf and power > 0):
        raise ValueError(f"scale = {scale}, power = {power}; need positive numbers")

    def share(lam: float) -> float:
        return float(1 / (1 + scale * np.exp(lam))) ** (1 / power)

    def inverse(u: Array) -> Array:
        return np.log1p(-(u**power)) - np.log(u**power) - math.log(scale)

    def place(process: Process, steps: int, final: str) -> Array:
        return _in_share(process, steps, final, share, inverse)

    named = {(4.0, 2.5): "softened", (8.0, 2.5): "softened_8"}
    return Grid(named.get((scale, power), f"softened({scale:g}, {power:g})"), place)


def arctan(scale: float = 0.5) -> Grid:
    """phi = atan(rho / scale) uniform in rho = sigma / alpha: the same noise levels on every
    process, from pure noise (phi = pi / 2) to sigma = 0 (phi = 0), both included.

    For data N(0, scale^2 I) it is the grid of least KL divergence for Euler steps (Align Your
    Steps, arXiv 2404.14507), so scale is the standard deviation of the data: about 0.5 for images
    in [-1, 1]. Spends more nodes at low noise than `softened`.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale}; need a positive number")

    def share(lam: float) -> float:
        return float(np.arctan(np.exp(-lam) / scale))

    def inverse(phi: Array) -> Array:
        return -np.log(scale * np.tan(phi))

    def place(process: Process, steps: int, final: str) -> Array:
        return _in_share(process, steps, final, share, inverse)

    return Grid("arctan" if scale == 0.5 else f"arctan({scale:g})", place)


def tabulated(rho: Sequence[float], name: str = "tabulated") -> Grid:
    """A table of noise levels rho = sigma / alpha, falling; log rho is linear in the step between.

    A table of n + 1 levels is met exactly by n steps where the process has its range. Else the
    part of the table inside the range of the process is used, and the ends are those of the
    process. With final = "zero" the last level is replaced by sigma = 0, as AYS is used.
    """
    table = np.asarray(rho, dtype=np.float64)
    ok = table.ndim == 1 and len(table) >= 2 and bool((np.diff(table) < 0).all())
    if not (ok and table[-1] > 0 and math.isfinite(table[0])):
        raise ValueError(f"rho = {list(rho)}; need at least 2 positive, falling noise levels")
    lam, index = -np.log(table), np.arange(float(len(table)))

    def place(process: Process, steps: int, final: str) -> Array:
        _overlap(process, name, table[-1], table[0])
        return _in_lambda(
            process,
            steps,
            final,
            lambda v: np.interp(v, lam, index),
            lambda u: np.interp(u, index, lam),
        )

    return replaced(Grid(name, place), name)


def replaced(grid: str | Grid, name: str | None = None) -> Grid:
    """Another grid laid out in N steps to t_end, with t_end itself then moved to sigma = 0.

    The grids in lambda and rho end with an evaluation at t_end, where D changes little any more,
    and a step from there to sigma = 0. This variant goes to sigma = 0 from the node before, and has
    one more node for the way down to it. With final = "min" it is the grid itself.
    """
    base = as_grid(grid)

    def place(process: Process, steps: int, final: str) -> Array:
        t = np.array(base.place(process, steps, "min"), dtype=np.float64)
        if final == "zero":
            t[-1] = _clean(process)
        return t

    return Grid(name or f"replaced({base.name})", place, base.discrete)


def shifted(grid: str | Grid, shift: float, name: str | None = None) -> Grid:
    """Another grid with its nodes moved toward noise (shift > 1) or data: lambda - log(shift),
    which is what a shifted flow does to its uniform grid. Shifts multiply.

    The ends stay, so the map of rho = sigma / alpha is the one that fixes both, with rho_e = 0 if
    the grid runs on to sigma = 0 and rho(t_end) if it stops there:

        (rho' - rho_e) / (1 - rho' / rho_s) = shift (rho - rho_e) / (1 - rho / rho_s).

    From pure noise (rho_s = inf) to sigma = 0 that is exactly rho' = shift rho, and elsewhere
    nearly so but near the ends, beyond which no node is moved.
    """
    base = as_grid(grid)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift = {shift}; need a positive finite number")

    def move(process: Process, t: Array, fixed: int) -> Array:
        """Move the nodes between the first and number `fixed`."""
        lam = process.lam(t[: fixed + 1])
        rho = np.exp(-lam[1:-1])
        start, end = np.exp(-lam[0]), np.exp(-lam[-1])
        y = shift * (rho - end) / (1 - rho / start)
        t = t.copy()
        t[1 : len(lam) - 1] = process.time(-np.log((y + end) / (1 + y / start)))
        return t

    def place(process: Process, steps: int, final: str) -> Array:
        t = np.array(base.place(process, steps, final), dtype=np.float64)
        closed = final == "zero" and len(t) > 2 and t[-2] == process.t_end
        t = move(process, t, len(t) - 2 if closed else len(t) - 1)
        if process.lam(t[-2]) > process.lam(process.t_end):  # shift < 1: closed by t_end instead
            t = np.array(base.place(process, steps - 1, "min"), dtype=np.float64)
            t = np.append(move(process, t, len(t) - 1), _clean(process))
        return t

    return Grid(name or f"shifted({base.name}, {shift:g})", place, base.discrete)


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


def as_grid(grid: str | Grid) -> Grid:
    """Look a grid up by name."""
    if isinstance(grid, Grid):
        return grid
    if not isinstance(grid, str) or grid not in grids:
        raise ValueError(unknown("grid", str(grid), grids))
    return grids[grid]


grids: dict[str, Grid] = {
    g.name: g
    for g in (
        power(1, "uniform"),
        power(2, "quadratic"),
        Grid("lambda", _lambda),
        Grid("exponential", _lambda),
        karras(),
        karras(low=0.002, high=80.0, name="edm"),
        softened(),
        softened(8.0),
        arctan(),
        replaced(Grid("lambda", _lambda), "lambda_zero"),
        replaced(karras(), "karras_zero"),
        beta(),
        _spaced("leading", lambda n, k: np.arange(k - 1, -1, -1.0) * (n // k)),
        _spaced(
            "linspace",
            lambda n, k: np.round(np.linspace(n - 1, 0, k)) if k > 1 else np.array([n - 1.0]),
        ),
        _spaced("trailing", lambda n, k: np.round(n - np.arange(k) * (n / k)) - 1),
        *(tabulated(rho, name) for name, rho in AYS.items()),
    )
}


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
