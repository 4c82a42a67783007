"""Compile a plan for a model; run plans."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._denoiser import Model, told_integers
from ._grids import DEFAULT_GRID, Grid, times
from ._noise import Noise, as_source, start_noise
from ._plan import Call, Hook, Plan, State, shown
from ._prediction import Prediction, as_prediction
from ._process import Level, Process
from ._segment import Segment, Start, start_time
from ._solvers._base import Solver
from ._solvers._registry import as_solver

__all__ = [
    "DEFAULT_GRID",
    "DEFAULT_SOLVER",
    "PlanSource",
    "Record",
    "check_match",
    "plan",
    "sample",
    "steps",
]

# Chosen by benchmarks/defaults.py, as is the default grid, on networks trained on digits and on
# photographs and on exact digits and patches, for 4 to 20 evaluations, and by
# benchmarks/guidance.py; two-dimensional toys would have chosen otherwise.
DEFAULT_SOLVER = "flow_ipndm_2"


def plan(
    solver: str | Solver,
    on: Process | Model,
    nfe: int | None = None,
    *,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    start: Start | None = None,
    upward: bool = False,
    predicts: str | Prediction | None = None,
) -> Plan:
    """Compile a solver for a process, or for a model (its process and prediction).

    nfe: network evaluations, >= 1; may be left out when `grid` is a list of times.
    grid: a name, a `Grid`, or a list of times in the order of the run, used as it is.
    final: "zero" ends at sigma = 0, "min" at the least noise the network knows. For grids by name.
    start: begin at another level than the process: a time t, or one of {"t": t}, {"sigma": sigma},
        {"rho": sigma / alpha}, {"lambda": half log-SNR}, {"strength": s}: the level at which the
        share s of the whole grid is still to come (1: all of it). nfe is what is spent from there.
    upward: run from data (t_end, or `start`) to noise: inversion. `final` has no meaning then.
    predicts: the network's convention where `on` is a process (default "data").
    """
    solver = as_solver(solver)
    if isinstance(on, Model):
        if predicts is not None:
            raise ValueError(
                f"predicts = {predicts!r}, but the model says so already; leave it out"
            )
        process, prediction, rounds = on.process, on.prediction, on.rounds
    elif isinstance(on, Process):
        process, rounds = on, on.integer_times
        prediction = as_prediction("data" if predicts is None else predicts)
    else:
        raise ValueError(f"on = {on!r}; give a process or a model, for example fewstep.VP()")
    placed = isinstance(grid, (str, Grid))
    if nfe is None and placed:
        raise ValueError(
            "nfe is missing; give the number of network evaluations, or a list of times"
        )
    if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1):
        raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
    nfe = None if nfe is None else int(nfe)
    if start is not None and not placed:
        raise ValueError(f"start = {start!r} with a list of times; the list says where it starts")
    final = "min" if upward and placed else final
    count = None if nfe is None else solver.steps(nfe, final == "zero")
    part = process
    if start is not None:
        t = start_time(process, start, grid, final, rounds)
        ends = (process.t_start, t) if upward else (t, process.t_end)
        part = Segment(process, *ends, rounds)
    if upward and solver.stochastic:
        raise ValueError(
            f"upward = True with solver = {solver.name!r}; only deterministic solvers run from "
            "data to noise (fewstep.add_noise adds noise)"
        )
    if upward and not placed:
        nodes = times(part, list(grid)[::-1], count, final, rounds)[::-1]
    else:
        nodes = times(part, grid, count, final, rounds)[:: -1 if upward else 1]
    if upward and float(process.level(np.asarray(nodes[0])).sigma) == 0:
        raise ValueError(
            f"grid = {grid!r} begins at sigma = 0, where a sample does not tell its noise; begin "
            "an upward run at the least noise the network knows"
        )
    first = part.t_end if upward else part.t_start
    if start is not None and nodes[0] != first:
        raise ValueError(
            f"grid = {grid!r} does not begin where it is told to (start: t = {first:g}, first "
            f"node {nodes[0]:g}); use another grid"
        )
    about = {
        "solver": solver.name,
        "process": repr(process),
        "grid": grid if isinstance(grid, str) else grid.name if isinstance(grid, Grid) else "list",
        "predicts": prediction.name,
    }
    if start is not None:
        about["start"] = repr(start)
    if upward:
        about["direction"] = "upward"
    if isinstance(on, Model) and on.conditions > 1:
        about["conditions per evaluation"] = str(on.conditions)
    places = tuple(float(t) for t in nodes)
    return Origin(solver, process, prediction, nfe, rounds, about, places)()


@dataclass(frozen=True)
class Origin:
    """What a plan was compiled from; calling it compiles again, for other times if given."""

    solver: Solver
    process: Process
    prediction: Prediction
    nfe: int | None
    rounds: bool
    about: Mapping[str, str]
    times: tuple[float, ...]

    def __call__(self, times: Sequence[float] | None = None) -> Plan:
        """The plan: the solver's rows, and what the network's prediction makes of them."""
        here = self if times is None else replace(self, times=tuple(map(float, times)))
        return _compiled(here)


def _compiled(origin: Origin) -> Plan:
    solver, process, prediction = origin.solver, origin.process, origin.prediction
    rounds = origin.rounds
    if rounds != process.integer_times:  # solvers that place nodes themselves must know
        seen = Segment(process, process.t_start, process.t_end, rounds)
    else:
        seen = process
    draft = solver.draft(seen, np.array(origin.times), origin.nfe)
    if draft.draws and process.no_score:
        raise ValueError(
            f"solver = {solver.name!r} draws noise, but with {process!r} there is no score: "
            f"{process.no_score}; use a deterministic solver"
        )

    def call(asked: bool | Level, level: Level) -> Call | None:
        if asked is False:
            return None
        at = level if asked is True else asked
        scalars = (float(s) for s in prediction.scalars(at))
        return Call(*scalars, level=None if asked is True else at)

    return Plan(
        draft.levels,
        draft.rows,
        tuple(call(*pair) for pair in zip(draft.evaluated, draft.levels, strict=True)),
        told_integers(rounds, prediction),
        process.prior_std(draft.levels[0].t),
        origin.about,
        draft.given,
        draft.keep,
        draft.basis,
        draws=draft.draws,
        origin=origin,
    )


class PlanSource(abc.ABC):
    """What has plans ready for a model, by number of evaluations: `sample(solver=...)` takes it."""

    @abc.abstractmethod
    def plan_for(
        self, model: Model, nfe: int | None = None, cond: Mapping[str, Any] | None = None
    ) -> Plan:
        """The plan to run for these conditions; a ValueError says why there is none."""


@dataclass(frozen=True)
class Record:
    """What one step of a run did: network evaluation number `nfe` at `level` on the way to `x`.

    denoised: the data prediction of that evaluation (for previews). x: the state after the step,
    at `x_level`; the sample in the last record, where `last` is true.
    """

    nfe: int
    level: Level
    denoised: Tensor
    x: Tensor
    x_level: Level
    last: bool
    state: State


def steps(
    model: Model,
    shape: Sequence[int] | None = None,
    *,
    solver: str | Solver | Plan | PlanSource = DEFAULT_SOLVER,
    nfe: int | None = None,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    start: Start | None = None,
    upward: bool = False,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    noise: Any = None,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    hook: Hook | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Record]:
    """`sample`, one record per network evaluation: preview, stop early (just stop iterating), or
    keep `record.state` and go on later. Arguments are checked before the first `next`."""
    run = _compile(model, solver, nfe, grid, final, start, upward, cond or {})
    _check_hook(hook, run)
    device = (model.device if device is None else device) if x is None else x.device
    run = run if hook is not None else run.cheapest_on(device)
    state = _begin(run, shape, seed, first, noise, x, device, dtype, model.process)

    def records() -> Iterator[Record]:
        before, watch = state, _Watch(run)
        while not before.done:
            output, after = _step(model, before, cond or {}, hook)
            watch.look(output, after)
            with torch.no_grad():
                denoised = before.data(output)
                level = run.asked(before.index)
                denoised = denoised if hook is None else hook(denoised, level)
            yield Record(after.nfe, level, denoised, after.x, after.level, after.done, after)
            before = after

    return records()


def _compile(
    model: Model,
    solver: str | Solver | Plan | PlanSource,
    nfe: int | None,
    grid: str | Grid | Sequence[float],
    final: str,
    start: Start | None,
    upward: bool,
    cond: Mapping[str, Any] | None = None,
) -> Plan:
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    if isinstance(solver, PlanSource):
        solver = solver.plan_for(model, nfe, cond)
    if not isinstance(solver, Plan):
        return plan(solver, model, nfe, grid=grid, final=final, start=start, upward=upward)
    if nfe not in (None, solver.nfe):
        raise ValueError(f"nfe = {nfe}, but the plan has {solver.nfe}; leave nfe out")
    if not (isinstance(grid, str) and (grid, final) == (DEFAULT_GRID, "zero")):
        raise ValueError(f"grid = {grid!r}, final = {final!r}, but the plan has its own; leave out")
    if start is not None or upward:
        raise ValueError(
            f"start = {start!r}, upward = {upward}, but the plan has its own; leave out"
        )
    check_match(solver, model)
    return solver


def _begin(
    run: Plan,
    shape: Sequence[int] | None,
    seed: int | Sequence[int],
    first: int,
    noise: Any,
    x: Tensor | None,
    device: torch.device | str,
    dtype: torch.dtype,
    process: Process | None = None,
) -> State:
    source = as_source(Noise(seed, first) if noise is None else noise)
    if x is not None:
        if shape is not None and tuple(shape) != tuple(x.shape):
            raise ValueError(f"shape = {tuple(shape)}, but x has shape {tuple(x.shape)}")
        return run.start(x, noise=source)
    if run.about.get("start") or run.about.get("direction"):
        level = run.levels[0]
        raise ValueError(
            f"x is missing; this run starts at t = {shown(level.t, 6)} (sigma = "
            f"{shown(level.sigma, 6)}), not from noise: give the state there, for example from "
            "fewstep.add_noise"
        )
    if shape is None:
        raise ValueError("shape is missing; give (batch, ...) or a starting tensor x")
    shape = tuple(shape)
    if not shape or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise ValueError(f"shape = {shape}; need positive integers, batch first")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}; need a floating-point type")
    z = start_noise(shape, seed, first=first, dtype=dtype, device=device)
    if process is not None:
        z = process.noise_from(z, Noise(seed, first))
    if np.isnan(run.prior_std):
        raise ValueError("x is missing; the parts of this plan start at different noise scales")
    return run.start(z * run.prior_std, noise=source)


def check_match(run: Plan, model: Model) -> None:
    """A plan made for another process or prediction would run, and give rubbish: refuse it."""
    for i, call in enumerate(run.calls):
        if call is None:
            continue
        level = run.asked(i)
        with np.errstate(all="ignore"):  # a time that this process does not have
            true = model.process.level(level.t)
            want = (true.alpha, true.sigma, *model.prediction.scalars(true))
        have = (level.alpha, level.sigma, call.p, call.q, call.c_in, call.c_noise)
        idle = np.asarray(call.q) == 0  # members of a stacked plan that wait or are done
        names = ("alpha", "sigma", "p", "q", "c_in", "c_noise")
        for name, mine, theirs in zip(names, have, want, strict=True):
            if not np.all(np.isclose(mine, theirs, rtol=1e-6, atol=1e-9) | idle):
                raise ValueError(
                    f"solver: the plan was made for another model ({name} = {shown(mine, 6)} at "
                    f"evaluation {i + 1}, t = {shown(level.t, 6)}, where this model has "
                    f"{shown(theirs, 6)}); make the plan from this model"
                )


def _check_hook(hook: Hook | None, run: Plan) -> None:
    if hook is not None and not callable(hook):
        raise ValueError(f"hook = {hook!r}; need a function of (data prediction, level)")
    if hook is not None and run.raw:
        raise ValueError("hook: a fused plan has no data predictions; use the plan unfused")


def _step(
    model: Model, state: State, cond: Mapping[str, Any], hook: Hook | None
) -> tuple[Tensor, State]:
    """One network evaluation: the answer, and the state after it."""
    with torch.no_grad():
        output = model.output(*state.query(), state.plan.asked(state.index), cond)
        return output, state.advance(output, hook)


class _Watch:
    """Refuses to go on (or to return) once an answer was not finite, and says which one it was.

    On a CPU a look at every answer costs nothing. On an accelerator it would stall the queue at
    every step, so the verdicts stay there, one bit each, and are read once at the end.
    """

    def __init__(self, run: Plan) -> None:
        self._run = run
        self._verdicts: list[Tensor] = []

    def look(self, output: Tensor, after: State) -> None:
        self._verdicts.append(torch.isfinite(output).all())
        if not after.done and output.device.type != "cpu":
            return
        good = torch.stack(self._verdicts).tolist()
        if not all(good):
            bad = after.nfe - len(good) + good.index(False)
            level = self._run.evaluations[bad]
            raise FloatingPointError(
                f"network returned NaN or inf at evaluation {bad + 1} of {self._run.nfe} (t = "
                f"{shown(level.t, 6)}, sigma = {shown(level.sigma, 6)}), from a finite input; look "
                "for overflow in half precision, or a wrong process or prediction"
            )
        self._verdicts.clear()


def sample(
    model: Model,
    shape: Sequence[int] | None = None,
    *,
    solver: str | Solver | Plan | PlanSource = DEFAULT_SOLVER,
    nfe: int | None = None,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    start: Start | None = None,
    upward: bool = False,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    noise: Any = None,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    hook: Hook | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Tensor:
    """Draw samples of the given shape (batch first).

    model: a `Denoiser` or `Guided`. solver: a name, a solver, a `Plan`, or a `Recipe`.
    nfe, grid, final, start, upward: see `plan`.
    seed, first: sample i starts from noise that depends on (seed, first + i) only, or on seed[i]
        if seed is a list: not on batch size, order or device. The same holds for later draws.
    noise: what later draws come from instead, for solvers that draw: a `fewstep.Noise`
        (`Noise(seed, path=True)`: more steps refine one Brownian path), tensors of unit variance,
        one per draw in order, or a function of (draw, like).
    x: start from this tensor instead (scale `plan.prior_std` for pure noise). Needed with `start`
        (`fewstep.add_noise` makes it from data) and with `upward` (the data itself).
    cond: keyword arguments for the network, per-sample tensors batch first.
    hook: corrects every data prediction before it is used, hook(D, level) -> D: `fewstep.clip`,
        `fewstep.dynamic_threshold`, or your own.
    device, dtype: of the state; default: the network's device, float32 (or better).
    progress: a bar, shown only once the run has taken a second.
    """
    run = _compile(model, solver, nfe, grid, final, start, upward, cond or {})
    _check_hook(hook, run)
    device = (model.device if device is None else device) if x is None else x.device
    run = run if hook is not None else run.cheapest_on(device)
    state = _begin(run, shape, seed, first, noise, x, device, dtype, model.process)
    with tqdm(total=run.nfe, unit="NFE", delay=1.0, leave=False, disable=not progress) as bar:
        watch = _Watch(run)
        while not state.done:
            output, state = _step(model, state, cond or {}, hook)
            watch.look(output, state)
            del output  # the next call may need its memory
            bar.update()
    return state.x
