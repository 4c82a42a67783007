r"""Beginnings without a network: where noise dominates, data are as good as Gaussian.

For data of mean mu and standard deviations c (a number, or one per mode of a basis) the data
prediction and the solution of the ODE are closed forms, in the modes r = B (x - alpha mu):

    B (D - mu) = g r,     g = alpha c^2 / (alpha^2 c^2 + sigma^2)
    r_t = k r_s,          k = sqrt((alpha_t^2 c^2 + sigma_t^2) / (alpha_s^2 c^2 + sigma_s^2))

The first replaces the first network evaluation of a plan (analytic first step, AFS): in every row,
b_0 D_0 becomes b_0 g X_0. The second replaces the steps from pure noise to a level where the data
are no longer as good as Gaussian. What is lost does not shrink with the steps after it: such rows
have order 0. How much is lost is decided by the largest standard deviation of any mode, not by that
of an element: smooth images of n elements of standard deviation c have a mode of up to c sqrt(n).
One number c serves while rho = sigma / alpha is far above that mode; below, scales per mode do, for
as long as the modes are Gaussian. Conditions, and guidance, have a Gaussian of their own.

Sources: The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models (arXiv
2412.09726); first step: Fast ODE-based Sampling for Diffusion Models in Around 5 Steps (AMED,
arXiv 2312.00094), A Unified Sampling Framework (USF, arXiv 2312.07243). In AMED's code the slope
dx/dsigma is x / sqrt(1 + sigma^2), to leading order in 1 / sigma that of c^2 = 1/2, not of data of
unit variance, sigma x / (1 + sigma^2); USF has c = 0 with mu = 0 or the mean of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._basis import Basis, Identity
from ._denoiser import Model
from ._grids import Grid
from ._plan import Plan, Row
from ._prediction import Prediction
from ._process import Array, Level, Process
from ._sampling import DEFAULT_GRID, plan
from ._segment import Start
from ._solvers._base import Solver

__all__ = ["analytic_first", "begin_analytically"]


def begin_analytically(
    solver: str | Solver,
    on: Process | Model,
    nfe: int,
    *,
    std: ArrayLike,
    mean: ArrayLike | None = None,
    basis: Basis | None = None,
    skip: Start | None = None,
    first: bool = True,
    grid: str | Grid = DEFAULT_GRID,
    final: str = "zero",
    predicts: str | Prediction | None = None,
) -> Plan:
    """A plan that begins with the Gaussian of the data instead of the network; `nfe` evaluations
    are spent on the rest. Formulas and sources: top of this module.

    std: c, the standard deviation of the data: a number, an array that broadcasts against a
        sample, or the scales of `basis` (`fewstep.scales_from_data` gives both).
    mean: mu, broadcasts against a sample; None: zero, or that of `basis`.
    skip: go there first, by the Gaussian's solution of the ODE: a level as in `plan(start=...)`,
        such as {"rho": 10.0}. None: no skip.
    first: the first data prediction (after the skip) is the Gaussian's.

    Solvers with a basis of their own have it and its mean already: leave `basis` and `mean` out,
    and give std per mode.
    """
    if skip is None and not first:
        raise ValueError("skip = None, first = False; nothing would be analytic: use fewstep.plan")
    if isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1:
        raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
    spent = int(nfe) + first
    run = plan(solver, on, spent, grid=grid, final=final, start=skip, predicts=predicts)
    if basis is None and mean is None and run.basis is None and np.ndim(std):
        basis = Identity()
    run = _placed(run, _basis(mean, basis))
    if first:
        run = analytic_first(run, std)
    if skip is not None:
        process = on.process if isinstance(on, Model) else on
        run = _skip(run, process, _scales(std, run.basis))
    return run


def analytic_first(run: Plan, std: ArrayLike, mean: ArrayLike | None = None) -> Plan:
    """The same plan with its first data prediction replaced by that of Gaussian data of standard
    deviation `std` (see `begin_analytically`): one evaluation less."""
    if run.raw:
        raise ValueError("plan: a fused plan has no data predictions; use the plan unfused")
    calls = [j for j, call in enumerate(run.calls) if call is not None]
    if "first step" in run.about.get("analytic", ""):
        raise ValueError(f"plan: {run!r} has an analytic first step already")
    if not calls or run.given != 1:
        raise ValueError(f"plan: {run!r} starts from several states, or asks about none")
    asked = calls[0]
    if len(calls) < 2:
        raise ValueError(f"plan: {run!r} has one evaluation; without it no network would be asked")
    if run.asked(asked) != run.levels[asked]:
        raise ValueError("plan: its first state is asked about at another level than its own")
    if mean is not None:
        run = _placed(run, _basis(mean, None))
    level, c = run.levels[asked], _scales(std, run.basis)
    square = level.alpha * c**2
    g = square / (level.alpha * square + level.sigma**2)
    return replace(
        run,
        rows=tuple(_replaced(row, g, asked) for row in run.rows),
        calls=tuple(None if j == asked else call for j, call in enumerate(run.calls)),
        about={**run.about, "analytic": "first step"},
        origin=None,
    )


def _replaced(row: Row, g: Any, j: int) -> Row:
    """b_j D_j as b_j g X_j."""
    if j not in row.b:
        return row
    a, b = dict(row.a), dict(row.b)
    a[j] = a.get(j, 0.0) + b.pop(j) * g
    return _row({k: v for k, v in a.items() if np.any(v != 0)}, b, row.e, row.c)


def _row(
    a: dict[int, Any], b: dict[int, Any], e: Mapping[int, Any] | None = None, c: Any = 0.0
) -> Row:
    """A row that the Gaussian made."""
    if not b and not e and len(a) == 1:
        # 1 as an array: this step is no idle one, which plans refuse. Unit data on a VP process
        # stay where they are, but for their mean.
        a = {j: np.ones(1) if np.ndim(v) == 0 and v == 1 else v for j, v in a.items()}
    return Row(a, b, 0, exact=False, e=e or {}, c=c)


def _skip(run: Plan, process: Process, c: Any) -> Plan:
    """The plan, from noise at the start of its process."""
    s, t = process.level(process.t_start), run.levels[0]
    k = _norm(t, c) / _norm(s, c)
    about = {key: value for key, value in run.about.items() if key != "start"}
    did = [about[key] for key in ("analytic",) if key in about]
    about["analytic"] = ", ".join([f"from t = {s.t:g} to {t.t:g}", *did])
    prior = process.prior_std(process.t_start)
    if run.basis is None:
        # Only the scale of the noise to start from changes: no row is needed.
        return replace(run, prior_std=prior * k, about=about, origin=None)
    rows = [_row({0: k}, {})]
    for row in run.rows:
        a, b = ({j + 1: v for j, v in terms.items()} for terms in (row.a, row.b))
        rows.append(Row(a, b, row.order, row.exact, row.e, row.c))
    return replace(
        run,
        levels=(s, *run.levels),
        rows=tuple(rows),
        calls=(None, *run.calls),
        keep=tuple(j + 1 for j in run.keep),
        prior_std=prior,
        about=about,
        origin=None,
    )


def _norm(level: Level, c: Any) -> Any:
    norm = np.hypot(level.alpha * c, level.sigma)
    return float(norm) if np.ndim(norm) == 0 else norm


def _scales(std: ArrayLike, basis: Basis | None) -> float | Array:
    c = np.asarray(std, dtype=np.float64)
    if not (np.isfinite(c).all() and (c >= 0).all() and c.size):
        raise ValueError(f"std = {std}; need finite standard deviations >= 0")
    c = c if basis is None else basis.spread(c)
    return float(c) if c.ndim == 0 else c


def _basis(mean: ArrayLike | None, basis: Basis | None) -> Basis | None:
    if mean is None:
        return basis
    if basis is not None:
        raise ValueError("mean and basis are both given; put the mean into the basis")
    return Identity(mean=np.asarray(mean, dtype=np.float64))


def _placed(run: Plan, basis: Basis | None) -> Plan:
    """The plan on the modes of a basis."""
    if basis is None:
        return run
    if run.basis is not None:
        raise ValueError(
            f"basis, mean: {run!r} acts on {run.basis} already; give std per mode of that"
        )
    return replace(run, basis=basis, origin=None)
