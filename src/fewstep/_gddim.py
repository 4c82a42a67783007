r"""Blurring diffusion: every spatial frequency has a path of its own.

    y_k(t) = alpha(t) d_k(t) (x_0)_k + sigma(t) eps_k,    d_k = (1 - m) e^(-l_k tau(t)) + m,
    l_k = sum over axes of (pi k / n)^2,                  modes k of the orthonormal DCT-II

with (alpha, sigma) a Gaussian path, tau(t) the time of the heat equation, m a floor. In mode k this
is the Gaussian path (alpha d_k, sigma), so that every row of every solver applies there with its
own coefficients: `Blurring.plan` compiles a solver once for each value of l_k and stacks the rows
into one plan on the cosine basis. Order 1 is gDDIM: exact, in any number of steps, where eps is
constant along the trajectory; with noise, per mode, the exact first-order row for eta^2.

    fs.sample(model, (16, 3, 32, 32), solver=model.plan("ddim", 10, (3, 32, 32)))

Sources: gDDIM: generalized denoising diffusion implicit models (arXiv 2206.05564), for diagonal
drifts; Blurring diffusion models (arXiv 2209.05557), whose sampler is "ddpm" (eta^2 = 1), with
tau = sigma_b^2 / 2, sigma_b = sigma_max sin^2(pi t / 2), m = 0.001. The official gDDIM covariance
ODE leaves out a transpose, which diagonal drifts do not notice. Momentum paths, where levels
are 2 x 2 matrices, are in `_cld`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ._basis import Cosine
from ._denoiser import Model, device_of
from ._grids import Grid, times
from ._interpolant import Own
from ._noise import Draw
from ._plan import Call, Plan, Row
from ._prediction import Prediction, as_prediction, unknown
from ._process import Array, Custom, Level, Process
from ._sampling import DEFAULT_GRID
from ._solvers._base import Draft, Solver
from ._solvers._registry import as_solver

__all__ = ["Blurring", "dissipation"]


def dissipation(sigma_max: float = 20.0) -> Callable[[ArrayLike], Array]:
    """tau(t) = sigma_b^2 / 2 with sigma_b = sigma_max sin^2(pi t / 2), t in [0, 1]; sigma_max in
    pixels (published: 20)."""
    if not 0 <= sigma_max < math.inf:
        raise ValueError(f"sigma_max = {sigma_max}; need a finite width >= 0, in pixels")
    return partial(_dissipation, sigma_max)


def _dissipation(sigma_max: float, t: ArrayLike) -> Array:
    s = np.sin(0.5 * math.pi * np.asarray(t, dtype=np.float64))
    return 0.5 * (sigma_max * s * s) ** 2


@dataclass(frozen=True)
class Blurring(Model):
    """A network of blurring diffusion.

    network: network(x, t, **cond), in pixels. base: the path (alpha, sigma) of mode 0; t in [0, 1]
        for the default `blur`.
    predicts: "noise" or "data". blur: tau(t), rising with noise, 0 at the clean end. floor: m.
    """

    network: Callable[..., Tensor]
    base: Process
    predicts: str = "noise"
    blur: Callable[[Any], Any] = field(default_factory=dissipation)
    floor: float = 0.001

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise ValueError(f"network = {self.network!r} is not callable; give network(x, t)")
        if not isinstance(self.base, Process):
            raise ValueError(
                f"base = {self.base!r} is not a process; give for example fewstep.VP()"
            )
        if self.predicts not in ("noise", "data"):
            raise ValueError(unknown("predicts", str(self.predicts), ("noise", "data")))
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor = {self.floor}; need a number in [0, 1)")
        clean = self.base.t_clean
        if clean is None or not math.isfinite(clean) or float(self.blur(clean)) != 0:
            raise ValueError(
                f"base = {self.base!r} with t_clean = {clean}; need a finite clean end, where "
                "blur is 0"
            )

    @property
    def process(self) -> Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        why = "blurring diffusion has levels of its own for every frequency"
        return Own(why, self.base.level, self.base.t_start, self.base.t_end)

    @property
    def prediction(self) -> Prediction:
        """The output itself: what it means for the data differs from mode to mode."""
        return replace(as_prediction("data"), name=self.predicts)

    @property
    def rounds(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return device_of(self.network)

    def output(self, x_in: Tensor, t_in: Tensor, level: Any, cond: Mapping[str, Any]) -> Tensor:
        return self.network(x_in, t_in, **cond)

    def frequencies(self, shape: Sequence[int]) -> Array:
        """l_k for samples of this shape, (channels, ...) or one axis: broadcasts against modes."""
        shape = tuple(shape)
        if not shape or not all(isinstance(n, Integral) and n > 0 for n in shape):
            raise ValueError(f"shape = {shape}; need that of one sample, without the batch")
        axes = shape if len(shape) == 1 else shape[1:]
        squares = [(math.pi * np.arange(n) / n) ** 2 for n in axes]
        return np.asarray(sum(np.ix_(*squares), np.zeros(())), dtype=np.float64)

    def mode(self, rate: float) -> Process:
        """The Gaussian path (alpha d, sigma) of the modes with l_k = rate."""
        base = self.base
        if rate == 0:
            return base

        def log_d(t: Any) -> Any:
            tau = np.asarray(self.blur(t), dtype=np.float64)
            return np.log1p((1 - self.floor) * np.expm1(-rate * tau))

        return Custom(
            lambda t: base.alpha(t) * np.exp(log_d(t)),
            base.sigma,
            t_start=base.t_start,
            t_end=base.t_end,
            t_clean=base.t_clean,
            lam=lambda t: base.lam(t) + log_d(t),
            independent=base.independent,
        )

    def plan(
        self,
        solver: str | Solver,
        nfe: int,
        shape: Sequence[int],
        *,
        grid: str | Grid | Sequence[float] = DEFAULT_GRID,
        final: str = "zero",
    ) -> Plan:
        """The rows of a solver in every mode. solver: one whose states are at nodes of the grid in
        all modes (multistep methods). shape: of one sample. grid: as in `fewstep.plan`, laid out on
        the base path.
        """
        solver = as_solver(solver)
        if isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1:
            raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
        if solver.stochastic and self.base.no_score:
            raise ValueError(
                f"solver = {solver.name!r} draws noise, but with {self.base!r} there is no score: "
                f"{self.base.no_score}; use a deterministic solver"
            )
        if self.predicts == "noise" and float(self.base.alpha(self.base.t_start)) == 0:
            raise ValueError(
                f"predicts = 'noise' says nothing about the data where alpha = 0 (t = "
                f"{self.base.t_start}); start later, or use a network that predicts data"
            )
        count = solver.steps(int(nfe), final == "zero")
        nodes = times(self.base, grid, count, final, False)
        rates = self.frequencies(shape)
        values, which = np.unique(rates, return_inverse=True)
        drafts = [solver.draft(self.mode(float(v)), nodes, int(nfe)) for v in values]
        first = drafts[0]
        for draft in drafts:
            same = [v.t for v in draft.levels] == [v.t for v in first.levels]
            if not same or draft.evaluated != first.evaluated:
                raise ValueError(
                    f"solver = {solver.name!r} has states at other times in other modes; use one "
                    "whose states are at the nodes of the grid, as multistep methods do"
                )
        if first.basis is not None or any(isinstance(v, Level) for v in first.evaluated):
            raise ValueError(
                f"solver = {solver.name!r} has a basis, or asks at other levels than its states'; "
                "use one that does not"
            )
        stack = _Stack(which.reshape(rates.shape))
        levels = tuple(self.base.level(v.t) for v in first.levels)
        draws: dict[tuple[float, float, int], int] = {}
        rows = []
        for i, row in enumerate(first.rows):
            parts = [self._terms(draft, i, draws) for draft in drafts]
            a, b, e = (stack([part[k] for part in parts]) for k in range(3))
            rows.append(Row(a, b, row.order, exact=False, e=e))
        about = {
            "solver": solver.name,
            "process": f"blurring, {self.base!r}",
            "grid": grid if isinstance(grid, str) else getattr(grid, "name", "list"),
            "predicts": self.predicts,
        }
        return Plan(
            levels,
            tuple(rows),
            tuple(
                Call(0.0, 1.0, 1.0, v.t) if asked else None
                for asked, v in zip(first.evaluated, levels, strict=True)
            ),
            prior_std=self.base.prior_std(levels[0].t),
            about=about,
            given=first.given,
            keep=first.keep,
            basis=Cosine(shape=np.array(shape, dtype=np.float64)),
            raw=self.predicts == "noise",
            draws=tuple(
                Draw(self.base.level(s), self.base.level(t), None, tag) for s, t, tag in draws
            ),
        )

    def _terms(
        self, draft: Draft, i: int, draws: dict[tuple[float, float, int], int]
    ) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
        """Row i of one mode over states, network outputs and draws."""
        row = draft.rows[i]
        a, b, e = dict(row.a), dict(row.b), dict[int, Any]()
        if self.predicts == "noise":  # D = (x - sigma eps) / alpha
            for j, c in row.b.items():
                level = draft.levels[j]
                a[j] = a.get(j, 0.0) + c / level.alpha
                b[j] = -c * level.sigma / level.alpha
        for m, c in row.e.items():
            # The clock of a draw differs from mode to mode: on no path, it is told by its place.
            draw = draft.draws[m]
            key = (draw.start.t, draw.end.t, draw.tag)
            e[draws.setdefault(key, len(draws))] = c
        return a, b, e


@dataclass(frozen=True)
class _Stack:
    """Coefficients of all modes from those of the different rates."""

    which: NDArray[np.intp]

    def __call__(self, parts: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
        out: dict[int, Any] = {}
        for j in sorted({j for part in parts for j in part}):
            c = np.array([part.get(j, 0.0) for part in parts], dtype=np.float64)
            out[j] = float(c[0]) if (c == c[0]).all() else c[self.which]
        return out
