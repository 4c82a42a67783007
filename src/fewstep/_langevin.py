r"""Samplers around a plan whose steps depend on the state: no plan can hold them.

Langevin corrector (Score-based generative modeling through SDEs, arXiv 2011.13456, algorithms 4 and
5). At a fixed level, with the score s = -eps / sigma and z standard normal,

    x <- x + delta s + sqrt(2 delta) z,       delta = 2 (r |z| / |s|)^2

It leaves the law at that level alone in the limit r -> 0; at a point mass in many dimensions the
stationary variance is sigma^2 (1 + r^2). |s| ~ sqrt(d) / sigma, so that delta ~ 2 r^2 sigma^2. The
official code averages the norms over the batch, which makes a sample depend on its neighbours; here
they are its own unless asked otherwise. It multiplies delta by 1 - beta_i for VP, a factor near 1
left out here.

Denoising Langevin Gibbs (Denoising MCMC, arXiv 2209.14593). A chain in (y, rho), y = x / alpha, of
Langevin steps y <- y + (eta / 2) s + sqrt(eta) z at the current rho and draws rho ~ p(rho | y) from
a noise-level classifier; from time to time the chain's state is denoised by a short run that starts
at its own rho. The official code takes the classifier's argmax where the method says sample, and
the least rho of a window, which biases the law; both are options here, neither is the default.

Levenberg-Marquardt-Langevin (arXiv 2505.24222). The increment n of a step is replaced by

    nbar = k n_before + (1 - k) n,    m = n - nbar <n, nbar> / (l + |nbar|^2),    n <- m |n| / |m|

For k = 0, the default of the official scripts, m is parallel to n and n does not change: there the
method is its base solver, and what the code does in float32 is rounding. For k > 0 it is not a
consistent solver: errors do not vanish with more steps. It is here to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._denoiser import Model
from ._noise import Draw, Noise, Source, as_source
from ._plan import State
from ._sampling import DEFAULT_GRID, _begin, _check_hook, _compile, _step, _Watch, plan
from ._solvers._base import Solver
from ._solvers._registry import as_solver
from ._stacked import stacked

__all__ = [
    "GibbsSample",
    "denoising_gibbs",
    "langevin",
    "sample_corrected",
    "sample_levenberg",
]


def _axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _norm(v: Tensor) -> Tensor:
    """Per-sample norm that broadcasts against v."""
    return v.square().sum(_axes(v), keepdim=True).sqrt()


def langevin(
    model: Model,
    state: State,
    *,
    snr: float = 0.16,
    corrections: int = 1,
    norms: Literal["sample", "batch"] = "sample",
    noise: Any = None,
    cond: Mapping[str, Any] | None = None,
) -> State:
    """The state after Langevin corrections at its own level, one network evaluation each.

    snr: r in the module's formula; published: 0.16 (CIFAR-10), 0.075 (LSUN, CelebA-HQ), 0.15 (1024
        pixels). norms: of every sample, or averaged over the batch as in the official code.
    noise: as in `Plan.start`; default: that of the state. Draws are numbered after the plan's.
    """
    if not 0 < snr < 1:
        raise ValueError(f"snr = {snr}; need a number in (0, 1)")
    if isinstance(corrections, bool) or not isinstance(corrections, Integral) or corrections < 0:
        raise ValueError(f"corrections = {corrections!r}; need an integer >= 0")
    if norms not in ("sample", "batch"):
        raise ValueError(f"norms = {norms!r}; accepted: 'sample', 'batch'")
    _scored(model)
    source = state.noise if noise is None else as_source(noise)
    source = Noise() if source is None else source
    level = state.plan.asked(state.index)
    for k in range(corrections):
        with torch.no_grad():
            output = model.output(*state.query(), level, cond or {})
            x = state.x
            score = (level.alpha * state.data(output) - x) / level.sigma**2
            # Its own at every level, however many corrections the levels have.
            number = len(state.plan.draws) + k * len(state.plan.levels) + state.index
            z = source.draw(Draw(level, level, None, k), number, x)
            sizes = _norm(z), _norm(score)
            if norms == "batch":
                sizes = tuple(v.mean() for v in sizes)
            delta = 2 * (snr * sizes[0] / sizes[1]).square()
            state = state.replaced(x + delta * score + (2 * delta).sqrt() * z)
    return state


def _scored(model: Model) -> None:
    if not isinstance(model, Model):
        raise ValueError(f"model = {model!r}; wrap your network in a fewstep.Denoiser")
    if model.process.no_score:
        raise ValueError(
            f"model: on {model.process!r} there is no score to correct with: "
            f"{model.process.no_score}"
        )


def sample_corrected(
    model: Model,
    shape: Sequence[int] | None = None,
    *,
    solver: str | Solver = "ddpm",
    nfe: int,
    snr: float = 0.16,
    corrections: int = 1,
    norms: Literal["sample", "batch"] = "sample",
    grid: Any = DEFAULT_GRID,
    final: str = "zero",
    start: Any = None,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    noise: Any = None,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Tensor:
    """Predictor-corrector: at every level Langevin corrections, then a step of the solver.

    solver: any of one evaluation per step. nfe: all evaluations together; ceil(nfe / (corrections
    + 1)) steps, and the last levels go without corrections where the budget does not divide.
    Everything else as in `sample` and `langevin`. Corrections pull states of a wrong law towards
    that of the network's score; they repair nothing else.
    """
    chosen = as_solver(solver)
    if chosen.nfe_per_step != 1:
        raise ValueError(
            f"solver = {chosen.name!r} spends {chosen.nfe_per_step} evaluations per step; need one"
        )
    if isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1:
        raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
    _scored(model)
    steps = math.ceil(nfe / (corrections + 1))
    device = (model.device if device is None else device) if x is None else x.device
    run = _compile(model, chosen, steps, grid, final, start, False).cheapest_on(device)
    state = _begin(run, shape, seed, first, noise, x, device, dtype, model.process)
    source = as_source(noise) if noise is not None else Noise(seed, first)
    spare = nfe - steps
    with tqdm(total=nfe, unit="NFE", delay=1.0, leave=False, disable=not progress) as bar:
        watch = _Watch(run)
        while not state.done:
            count = min(corrections, spare)
            spare -= count
            state = langevin(
                model, state, snr=snr, corrections=count, norms=norms, noise=source, cond=cond
            )
            output, state = _step(model, state, cond or {}, None)
            watch.look(output, state)
            bar.update(count + 1)
    return state.x


@dataclass(frozen=True, eq=False)
class GibbsSample:
    """What the chain yields: the denoised samples, the chain's y = x / alpha and rho they came
    from, and the network evaluations spent so far on every sample."""

    sample: Tensor
    y: Tensor
    rho: np.ndarray
    nfe: int


def denoising_gibbs(
    model: Model,
    y: Tensor,
    rho: Sequence[float] | float,
    classifier: Callable[[Tensor], Tensor],
    levels: Sequence[float],
    *,
    step: float | Callable[[np.ndarray], np.ndarray],
    skip: int = 10,
    nfe: int = 9,
    solver: str | Solver = "heun",
    grid: Any = "karras",
    argmax: bool = False,
    least: bool = False,
    noise: int | Source = 0,
    cond: Mapping[str, Any] | None = None,
) -> Iterator[GibbsSample]:
    """An endless chain that yields a batch of samples every `skip` iterations.

    y, rho: where the chain begins, (batch, ...) in x / alpha and one rho = sigma / alpha for each,
        for example data and noise of that size. Samples along a chain are correlated.
    classifier: y -> (batch, len(levels)) log-probabilities (up to a constant) of the noise levels
        `levels`, rho = sigma / alpha. step: eta, or a function of the rho of every sample.
    nfe, solver, grid: of the runs that denoise, each from its sample's own rho.
    argmax: the likeliest level instead of a draw. least: denoise the state of least rho since the
        last time instead of the newest. Both as the official code does, both bias the law.
    """
    _scored(model)
    places = np.asarray(levels, dtype=np.float64)
    if places.ndim != 1 or len(places) < 1 or not (places > 0).all():
        raise ValueError(f"levels = {levels!r}; need a list of rho = sigma / alpha > 0")
    if isinstance(skip, bool) or not isinstance(skip, Integral) or skip < 1:
        raise ValueError(f"skip = {skip!r}; need an integer >= 1")
    here = np.array(np.broadcast_to(np.asarray(rho, dtype=np.float64), y.shape[:1]))
    source, process = as_source(noise), model.process
    extra = dict(cond or {})

    def column(v: Any) -> Tensor:
        return (
            torch.tensor(np.asarray(v)).to(y.device, y.dtype).reshape(-1, *(1 for _ in y.shape[1:]))
        )

    def chain(y: Tensor, here: np.ndarray) -> Iterator[GibbsSample]:
        spent, count = 0, 0
        best, best_rho = y, np.full_like(here, np.inf)
        while True:
            with torch.no_grad():
                for _ in range(skip):
                    level = process.level(process.time(-np.log(here)))
                    D = model(y * column(level.alpha), level.t, **extra)
                    sizes = np.broadcast_to(
                        step(here) if callable(step) else np.float64(step), here.shape
                    )
                    place = process.level(float(process.time(-np.log(places[0]))))
                    z = source.draw(Draw(place, place, None, 0), 2 * count, y)
                    eta = column(sizes)
                    y = y + 0.5 * eta * (D - y) / column(here**2) + eta.sqrt() * z
                    log_p = classifier(y)
                    if log_p.shape != (len(y), len(places)):
                        raise ValueError(
                            f"classifier returned shape {tuple(log_p.shape)}; need "
                            f"{(len(y), len(places))}"
                        )
                    if argmax:
                        chosen = log_p.argmax(1)
                    else:
                        like = y.reshape(len(y), -1)[:, :1]
                        u = source.draw(Draw(place, place, None, 1), 2 * count + 1, like)
                        u = torch.special.ndtr(u.double())
                        mass = torch.softmax(log_p.double(), 1).cumsum(1)
                        chosen = torch.searchsorted(mass, u).clamp(max=len(places) - 1)[:, 0]
                    here = places[chosen.cpu().numpy()]
                    spent, count = spent + 1, count + 1
                    if not least:
                        best, best_rho = y, here
                    else:
                        new = here < best_rho
                        best = torch.where(column(new.astype(float)) > 0, y, best)
                        best_rho = np.where(new, here, best_rho)
                spent += nfe
                sample = _denoised(model, best, best_rho, solver, nfe, grid, extra)
            yield GibbsSample(sample, y, here, spent)
            best_rho = np.full_like(here, np.inf)

    return chain(y.to(torch.promote_types(y.dtype, torch.float32)), here)


def _denoised(
    model: Model,
    y: Tensor,
    rho: np.ndarray,
    solver: str | Solver,
    nfe: int,
    grid: Any,
    cond: Mapping[str, Any],
) -> Tensor:
    """Every sample run from its own rho to sigma = 0, together."""
    plans = [plan(solver, model, nfe, grid=grid, start={"rho": float(r)}) for r in rho]
    run = stacked(plans, axis=-y.ndim)
    state = run.start(y * torch.tensor(run.levels[0].alpha).to(y.device, y.dtype))
    while not state.done:
        _, state = _step(model, state, cond, None)
    return state.x


def sample_levenberg(
    model: Model,
    shape: Sequence[int] | None = None,
    *,
    keep: float,
    damping: float,
    solver: str | Solver = "dpmpp_2m",
    nfe: int,
    grid: Any = DEFAULT_GRID,
    final: str = "zero",
    seed: int | Sequence[int] = 0,
    first: int = 0,
    noise: Any = None,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A solver whose increments are filtered as in Levenberg-Marquardt-Langevin, for comparison.

    keep: k, damping: l > 0 of the module's formula, with norms of every sample in float64. keep = 0
    is the solver itself; with keep > 0 errors do not vanish as nfe grows.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep = {keep}; need a number in [0, 1]")
    if not damping > 0:
        raise ValueError(f"damping = {damping}; need a number > 0")
    run = _compile(model, solver, nfe, grid, final, None, False)
    _check_hook(None, run)
    run = run.fuse()
    if run.given != 1 or None in run.calls[:-1] or run.basis is not None or run.axis is not None:
        raise ValueError(
            f"solver: {run!r} has several states, a basis, or levels of its own in one state; use "
            "one without"
        )
    state = _begin(
        run,
        shape,
        seed,
        first,
        noise,
        x,
        model.device if device is None else device,
        dtype,
        model.process,
    )
    before: Tensor | None = None
    watch = _Watch(run)
    while not state.done:
        old, row = state, run.data_row(run.rows[state.index])
        output, state = _step(model, state, cond or {}, None)
        watch.look(output, state)
        c = row.a.get(old.index, 0.0)
        assert isinstance(c, float)  # the plan has no basis: its coefficients are numbers
        linear = c * old.x
        n = (state.x - linear).double()
        before = n if before is None else before
        mean = keep * before + (1 - keep) * n
        inner = (n * mean).sum(_axes(n), keepdim=True)
        m = n - mean * inner / (damping + mean.square().sum(_axes(n), keepdim=True))
        m = m * (_norm(n) / _norm(m).clamp(min=torch.finfo(torch.float64).tiny))
        state = state.replaced((linear + m).to(state.x.dtype))
        before = n
    return state.x
