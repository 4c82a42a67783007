"""k-diffusion's calling convention for every solver: `sample_<name>(model, x, sigmas, ...)`.

    from fewstep import k_diffusion as K

    x = K.sample_flow_ipndm_2(model, noise * sigmas[0], sigmas, extra_args={"cond": c})

`sample_<name>` exists for every name and alias of `fewstep.solvers` (and `sample_lms`, of order 4);
`sampler` makes one from a `Solver` or a `Plan`. As in k-diffusion,

    model(x, sigma, **extra_args) -> data prediction, sigma one per sample;
    x = x_0 + sigma eps, or (1 - sigma) x_0 + sigma eps with process=fewstep.Flow();
    sigmas falls, n + 1 values for n full steps, to 0 or to some noise;
    callback gets {"x", "i", "sigma", "sigma_hat", "denoised"} once for each step, at its start.

Where k-diffusion has the same method the result is the same to rounding (tests/test_k_diffusion.py
has the pairs, and where k-diffusion is known to differ). The state is float32 or better whatever x
is; model and result have x's dtype. Nothing of k-diffusion is needed or imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._calibrate._recipe import moved
from ._denoiser import Denoiser
from ._noise import Called, Draw, Noise, Source
from ._plan import Plan
from ._prediction import unknown
from ._process import EDM, Flow
from ._sampling import _Watch, plan
from ._solvers._base import Solver
from ._solvers._noisy import churn
from ._solvers._registry import as_solver, solvers
from ._solvers._seeds import ancestral_singlestep, dpmpp_sde
from ._solvers._stochastic import ancestral

__all__ = ["get_sigmas", "sampler"]

#: Names of k-diffusion that no solver has.
_NAMES = {"lms": "deis_rhoab3"}


def _squared(name: str, eta: float) -> Solver:
    """The "eta" of k-diffusion's 2M and 3M SDE is the noise level of the SDE squared."""
    scaled = solvers[name].scaled
    assert scaled is not None
    return scaled(math.sqrt(eta))


#: What k-diffusion's eta makes of a solver; others have none there.
_ETA: dict[str, Callable[[float], Solver]] = {
    "ddpm": ancestral,
    "dpm_2_ancestral": partial(ancestral_singlestep, "dpm_solver_2"),
    "dpmpp_2s_ancestral": partial(ancestral_singlestep, "dpmpp_2s"),
    "dpmpp_sde": dpmpp_sde,
    **{
        name: partial(_squared, name)
        for name in ("sde_dpmpp_2m", "sde_dpmpp_2m_heun", "sde_dpmpp_3m_shipped")
    },
}

#: Relative: float32 lists, and what "the same level" is.
_ROUNDING = 1e-6


def sampler(solver: str | Solver | Plan) -> Callable[..., Tensor]:
    """A solver or a plan as a function of k-diffusion's form.

    function(model, x, sigmas, extra_args=None, callback=None, disable=None, *, eta=None,
    s_noise=1, noise_sampler=None, seed=None, s_churn=0, s_tmin=0, s_tmax=inf, process=None)

    model, x, sigmas, extra_args, callback, disable: see the module; disable: no progress bar.
    eta: k-diffusion's, for the solvers that have it there; others are refused (`Solver.scaled`).
    s_noise: factor of all noise that is drawn.
    noise_sampler: function (sigma, sigma_next) -> standard normal. Default: noise that depends on
        the seed and the index of a sample alone, see `fewstep.Noise`.
    seed: of that noise; default extra_args["seed"] (ComfyUI's), or else a number from torch's
        global generator, so that torch.manual_seed governs, as in k-diffusion.
    s_churn, s_tmin, s_tmax: see `fewstep.churn`, for solvers that carry nothing from step to step;
        as in k-diffusion also above the first sigma, unless a process says where noise ends.
    process: `EDM` (default) or `Flow`. Its range bounds the levels that a solver chooses itself.

    A plan runs from its own levels, which are `get_sigmas(plan)`, and takes no eta nor s_churn.
    What a solver has no use for is refused, before the model is called.
    """
    if isinstance(solver, Plan):
        return _function(solver, solver.about.get("solver", "plan"))
    if isinstance(solver, str):
        as_solver(_NAMES.get(solver, solver))
        return getattr(sys.modules[__name__], f"sample_{solver}")
    return _function(as_solver(solver), solver.name)


def _function(solver: Solver | Plan, name: str) -> Callable[..., Tensor]:
    """See `sampler`."""
    compiled = lru_cache(maxsize=16)(partial(_compile, solver))  # runs are many, lists are few

    @torch.no_grad()
    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        eta: float | None = None,
        s_noise: float = 1.0,
        noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int | Sequence[int] | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        process: EDM | Flow | None = None,
    ) -> Tensor:
        extra_args = {} if extra_args is None else extra_args
        sigmas = torch.as_tensor(sigmas)
        levels = _levels(sigmas, process)
        if len(levels) == 1:
            return x
        run = compiled(levels, process, eta, s_churn, s_tmin, s_tmax).cheapest_on(x.device)
        _check_noise(solver, s_churn, s_noise, noise_sampler, seed)
        source = _source(noise_sampler, sigmas, seed, extra_args, s_noise) if run.draws else 0
        state, watch, first = run.start(x, noise=source), _Watch(run), _first(run, levels)
        with tqdm(total=len(levels) - 1, disable=disable) as bar:
            while not state.done:
                x_in, sigma = (v.to(x.dtype) for v in state.query())
                denoised = model(x_in, sigma, **extra_args)
                for i in first.get(state.nfe, ()):
                    bar.update()
                    if callback is not None:
                        hat = sigmas.new_tensor(run.asked(state.index).sigma)
                        said = {"sigma": sigmas[i], "sigma_hat": hat, "denoised": denoised}
                        callback({"x": x_in, "i": i, **said})
                state = state.advance(denoised)
                watch.look(denoised, state)
        return state.x.to(x.dtype)

    sample.__name__ = sample.__qualname__ = f"sample_{name}"
    sample.__doc__ = _described(solver)
    return sample


def _described(solver: Solver | Plan) -> str:
    if isinstance(solver, Plan):
        return f"{solver!r}, as a k-diffusion sampler: see `fewstep.k_diffusion.sampler`."
    noise = "stochastic" if solver.stochastic else "deterministic"
    return (
        f"{solver.name} as a k-diffusion sampler: see `fewstep.k_diffusion.sampler`.\n\n"
        f"Order {solver.order}, {solver.nfe_per_step} NFE per step, {noise}; {solver.ends}.\n"
        f"Source: {solver.source}."
    )


def __getattr__(name: str) -> Any:
    known = name.removeprefix("sample_")
    known = _NAMES.get(known, known)
    if not name.startswith("sample_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if known not in solvers:
        raise AttributeError(unknown("solver", known, _names()))
    # Kept, so that it is one object, which pickle finds by its name.
    return globals().setdefault(name, _function(solvers[known], name.removeprefix("sample_")))


def __dir__() -> list[str]:
    return sorted({*__all__, *(f"sample_{name}" for name in _names())})


def _names() -> list[str]:
    return [*_NAMES, *(n for name in solvers for n in (name, *solvers[name].aliases))]


def get_sigmas(plan: Plan, process: EDM | Flow | None = None) -> Tensor:
    """The sigmas that a plan goes down through, as k-diffusion writes them, float32: what its
    `sampler` is to be called with. Inner states of steps that lie on the way are among them.

    The plan may be for any process: sigmas are at its lambdas, on `process` (default: `EDM`)."""
    if plan.axis is not None:
        raise ValueError("plan: it has levels along an axis; one list of sigmas cannot express it")
    at = _known(process)
    out: list[float] = []
    for level in plan.levels:
        sigma = float(at.time(level.lam))
        if not out or sigma < out[-1] * (1 - _ROUNDING):
            out.append(sigma)
    if len(out) < 2 or out[0] == math.inf:
        where = "from data to noise" if len(out) < 2 else "from alpha = 0, where sigma is infinite"
        raise ValueError(f"plan: it runs {where}; a list of falling sigmas cannot express it")
    return torch.tensor(out, dtype=torch.float32)


def _known(process: EDM | Flow | None) -> EDM | Flow:
    """On both, time is sigma."""
    if process is None:
        return EDM()
    if not isinstance(process, (EDM, Flow)):
        raise ValueError(
            f"process = {process!r}; accepted: fewstep.EDM(...), where x = x_0 + sigma eps, or "
            "fewstep.Flow(...), where x = (1 - sigma) x_0 + sigma eps"
        )
    return process


def _levels(sigmas: Tensor, process: EDM | Flow | None) -> tuple[float, ...]:
    """The list as numbers, checked."""
    high = 1.0 if isinstance(_known(process), Flow) else math.inf
    values = sigmas.detach().double().cpu().tolist() if sigmas.ndim == 1 else []
    if values and high < values[0] <= high * (1 + _ROUNDING):
        values[0] = high
    falls = all(a > b for a, b in pairwise(values))
    if not (values and falls and values[-1] >= 0 and values[0] <= high and values[0] < math.inf):
        shown = ", ".join(f"{v:.6g}" for v in values[:8]) or f"shape {tuple(sigmas.shape)}"
        raise ValueError(
            f"sigmas = {shown}{', ...' * (len(values) > 8)}; need one axis of numbers that fall "
            f"strictly, from at most {high:g} to at least 0 (with process = {_known(process)!r})"
        )
    return tuple(values)


def _span(process: EDM | Flow | None, low: float, high: float, most: float = 1.0) -> EDM | Flow:
    """The process with these sigmas in its range; by default they are the range, the highest raised
    by a factor of `most`."""
    if process is None:
        high *= most
        return EDM(low if low < high else high / 2, high)
    if isinstance(process, Flow):
        return replace(process, t_start=max(process.t_start, high), t_end=min(process.t_end, low))
    return EDM(min(process.sigma_min, low), max(process.sigma_max, high))


def _compile(
    solver: Solver | Plan,
    levels: tuple[float, ...],
    process: EDM | Flow | None,
    eta: float | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
) -> Plan:
    """The plan to run, in k-diffusion's coordinates, for a network that predicts data."""
    if isinstance(solver, Plan):
        if eta is not None or s_churn:
            raise ValueError(
                f"eta = {eta}, s_churn = {s_churn}, but a plan has its noise; leave out"
            )
        return _at(solver, levels, process)
    if eta is not None:
        if solver.name not in _ETA:
            raise ValueError(
                f"eta = {eta} with solver = {solver.name!r}, for which k-diffusion has none; "
                "fewstep.k_diffusion.sampler(solver.scaled(...)) has another noise level"
            )
        if not eta >= 0:
            raise ValueError(f"eta = {eta!r}; need a number >= 0")
        solver = _ETA[solver.name](eta)
    most = 1.0
    if s_churn:
        most += min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
        solver = churn(solver, s_churn, s_tmin, s_tmax)
    low = min(v for v in levels if v > 0)
    return plan(solver, _span(process, low, levels[0], most), grid=levels)


def _at(run: Plan, levels: tuple[float, ...], process: EDM | Flow | None) -> Plan:
    """The plan in k-diffusion's coordinates; refused for other sigmas than its own."""
    own = get_sigmas(run, process).tolist()
    if len(own) != len(levels) or not np.allclose(own, levels, rtol=1e-5, atol=0):
        raise ValueError(
            f"sigmas: {len(levels)} values from {levels[0]:.6g} to {levels[-1]:.6g}, but this plan "
            f"is made for {len(own)} from {own[0]:.6g} to {own[-1]:.6g} and runs whole; give it "
            "fewstep.k_diffusion.get_sigmas(plan)"
        )
    at = _known(process)
    asked = [float(at.time(v.lam)) for v in (*run.levels, *run.evaluations) if v.sigma > 0]
    at = _span(process, min(asked), max(asked))
    # Of the network nothing but its meaning is used.
    return moved(run, Denoiser(lambda x, t: x, at, "data"))


def _check_noise(
    solver: Solver | Plan, s_churn: float, s_noise: float, noise_sampler: Any, seed: Any
) -> None:
    """Refuse what says how to draw where nothing is drawn, and two ways at once."""
    factor = None if s_noise == 1 else s_noise
    for name, value in {"noise_sampler": noise_sampler, "seed": seed, "s_noise": factor}.items():
        if value is not None and not (solver.stochastic or s_churn):
            raise ValueError(f"{name} = {value!r}, but this solver draws no noise; leave it out")
    if noise_sampler is not None and seed is not None:
        raise ValueError(f"seed = {seed!r} with a noise_sampler, which has its own; leave it out")
    if not 0 <= s_noise < math.inf:
        raise ValueError(f"s_noise = {s_noise!r}; need a number >= 0")


@dataclass(frozen=True)
class _Scaled(Source):
    source: Source
    factor: float

    def draw(self, draw: Draw, number: int, like: Tensor) -> Tensor:
        return self.factor * self.source.draw(draw, number, like)


def _source(
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None,
    sigmas: Tensor,
    seed: int | Sequence[int] | None,
    extra_args: Mapping[str, Any],
    s_noise: float,
) -> Source:
    """Where draws come from. A noise_sampler is told sigmas as k-diffusion does, in their dtype."""
    if noise_sampler is not None:

        def normal(draw: Draw, like: Tensor) -> Tensor:
            ends = (sigmas.new_tensor(level.sigma) for level in (draw.start, draw.end))
            return noise_sampler(*ends)

        source: Source = Called(normal)
    else:
        seed = extra_args.get("seed") if seed is None else seed
        source = Noise(int(torch.randint(2**63 - 1, ())) if seed is None else seed)
    return source if s_noise == 1 else _Scaled(source, s_noise)


def _first(run: Plan, levels: Sequence[float]) -> dict[int, list[int]]:
    """The steps that begin with each evaluation: a step's is the last one before the network is
    asked about less noise than the step starts from (Heun's second at this level, not its first,
    which ends the step before; the one above it after churn)."""
    asked = [level.sigma for level in run.evaluations]
    out: dict[int, list[int]] = {}
    for i, sigma in enumerate(levels[:-1]):
        cleaner = [k for k, v in enumerate(asked) if v < sigma * (1 - _ROUNDING)]
        out.setdefault(max(0, min(cleaner, default=len(asked)) - 1), []).append(i)
    return out
