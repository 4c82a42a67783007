"""Compile a plan for a model; run plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._denoiser import Model, told_integers
from ._grids import Grid, times
from ._noise import start_noise
from ._plan import Call, Plan, State
from ._prediction import Prediction, as_prediction
from ._process import Level, Process
from ._solvers._base import Solver
from ._solvers._registry import as_solver

__all__ = ["DEFAULT_GRID", "DEFAULT_SOLVER", "Record", "plan", "sample", "steps"]

# Chosen by benchmarks/defaults.py on digits, photograph patches and the trained digits network, on
# six processes, for 4 to 20 evaluations; two-dimensional toys would have chosen otherwise.
DEFAULT_SOLVER = "flow_ab2"
DEFAULT_GRID = "softened"


def plan(
    solver: str | Solver,
    on: Process | Model,
    nfe: int | None = None,
    *,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    predicts: str | Prediction | None = None,
) -> Plan:
    """Compile a solver for a process, or for a model (its process and prediction).

    nfe: network evaluations, >= 1; may be left out when `grid` is a list of times.
    grid: a name, a `Grid`, or a list of times from noise to data, used as it is.
    final: "zero" ends at sigma = 0, "min" at the least noise the network knows. For grids by name.
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
    count = None if nfe is None else solver.steps(int(nfe))
    nodes = times(process, grid, count, final, rounds)
    if nfe is not None and not placed and count != len(nodes) - 1:
        raise ValueError(
            f"nfe = {nfe}, but the grid has {len(nodes)} times, which is {len(nodes) - 1} steps; "
            "leave nfe out"
        )
    draft = solver.draft(process, nodes)
    calls = tuple(
        Call(*(float(s) for s in prediction.scalars(level))) if evaluated else None
        for level, evaluated in zip(draft.levels, draft.evaluated, strict=True)
    )
    about = {
        "solver": solver.name,
        "process": repr(process),
        "grid": grid if isinstance(grid, str) else grid.name if isinstance(grid, Grid) else "list",
        "predicts": prediction.name,
    }
    if isinstance(on, Model) and on.conditions > 1:
        about["conditions per evaluation"] = str(on.conditions)
    prior = process.prior_std(float(nodes[0]))
    integers = told_integers(rounds, prediction)
    return Plan(draft.levels, draft.rows, calls, integers, prior, about)


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
    solver: str | Solver | Plan = DEFAULT_SOLVER,
    nfe: int | None = None,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    seed: int | Sequence[int] = 0,
    first: int = 0,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Record]:
    """`sample`, one record per network evaluation: preview, stop early (just stop iterating), or
    keep `record.state` and go on later. Arguments are checked before the first `next`."""
    run = _compile(model, solver, nfe, grid, final)
    state = _start(run, shape, seed, first, x, model.device if device is None else device, dtype)
    return _iterate(model, run, state, dict(cond or {}))


def _compile(
    model: Model,
    solver: str | Solver | Plan,
    nfe: int | None,
    grid: str | Grid | Sequence[float],
    final: str,
) -> Plan:
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    if not isinstance(solver, Plan):
        return plan(solver, model, nfe, grid=grid, final=final)
    if nfe not in (None, solver.nfe):
        raise ValueError(f"nfe = {nfe}, but the plan has {solver.nfe}; leave nfe out")
    if not (isinstance(grid, str) and (grid, final) == (DEFAULT_GRID, "zero")):
        raise ValueError(f"grid = {grid!r}, final = {final!r}, but the plan has its own; leave out")
    _check_match(solver, model)
    return solver


def _start(
    run: Plan,
    shape: Sequence[int] | None,
    seed: int | Sequence[int],
    first: int,
    x: Tensor | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> State:
    if x is not None:
        if shape is not None and tuple(shape) != tuple(x.shape):
            raise ValueError(f"shape = {tuple(shape)}, but x has shape {tuple(x.shape)}")
        return run.start(x)
    if shape is None:
        raise ValueError("shape is missing; give (batch, ...) or a starting tensor x")
    shape = tuple(shape)
    if not shape or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise ValueError(f"shape = {shape}; need positive integers, batch first")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}; need a floating-point type")
    noise = start_noise(shape, seed, first=first, dtype=dtype, device=device)
    return run.start(noise * run.prior_std)


def _check_match(run: Plan, model: Model) -> None:
    """A plan made for another process or prediction would run, and give rubbish: refuse it."""
    for i, (level, call) in enumerate(zip(run.levels, run.calls, strict=True)):
        if call is None:
            continue
        true = model.process.level(level.t)
        want = (true.alpha, true.sigma, *model.prediction.scalars(true))
        have = (level.alpha, level.sigma, call.p, call.q, call.c_in, call.c_noise)
        if not np.allclose(have, want, rtol=1e-6, atol=1e-9):
            names = ("alpha", "sigma", "p", "q", "c_in", "c_noise")
            k = int(np.argmin(np.isclose(have, want, rtol=1e-6, atol=1e-9)))
            raise ValueError(
                f"solver: the plan was made for another model ({names[k]} = {have[k]:.6g} at "
                f"evaluation {i + 1}, t = {level.t:g}, where this model has {want[k]:.6g}); make "
                "the plan from this model"
            )


def _iterate(model: Model, run: Plan, state: State, cond: Mapping[str, Any]) -> Iterator[Record]:
    # On a CPU a look at every answer costs nothing. On an accelerator it would stall the queue at
    # every step, so the verdicts stay there, one bit each, and are read once at the end.
    verdicts: list[Tensor] = []
    while not state.done:
        level = state.level
        with torch.no_grad():
            x_in, t_in = state.query()
            after = state.advance(model.output(x_in, t_in, level, cond))
            denoised = after.denoised
            verdicts.append(torch.isfinite(denoised).all())
        if after.done or denoised.device.type == "cpu":
            _check_finite(run, after.nfe - len(verdicts), verdicts)
            verdicts.clear()
        state = after
        yield Record(state.nfe, level, denoised, state.x, state.level, state.done, state)


def _check_finite(run: Plan, before: int, verdicts: Sequence[Tensor]) -> None:
    """Refuse to go on (or to return) once an answer was not finite, and say which one it was."""
    good = torch.stack(list(verdicts)).tolist()
    if all(good):
        return
    bad = before + good.index(False)
    level = run.evaluations[bad]
    raise FloatingPointError(
        f"network returned NaN or inf at evaluation {bad + 1} of {run.nfe} (t = "
        f"{level.t:g}, sigma = {level.sigma:g}), from a finite input; look for "
        "overflow in half precision, or a wrong process or prediction"
    )


def sample(
    model: Model,
    shape: Sequence[int] | None = None,
    *,
    solver: str | Solver | Plan = DEFAULT_SOLVER,
    nfe: int | None = None,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    seed: int | Sequence[int] = 0,
    first: int = 0,
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Tensor:
    """Draw samples of the given shape (batch first).

    model: a `Denoiser` or `Guided`. solver: a name, a solver, or a `Plan`.
    nfe, grid, final: see `plan`.
    seed, first: sample i starts from noise that depends on (seed, first + i) only, or on seed[i]
        if seed is a list: not on batch size, order or device.
    x: start from this tensor instead (scale `plan.prior_std` for pure noise).
    cond: keyword arguments for the network, per-sample tensors batch first.
    device, dtype: of the state; default: the network's device, float32 (or better).
    progress: a bar, shown only once the run has taken a second.
    """
    records = steps(
        model,
        shape,
        solver=solver,
        nfe=nfe,
        grid=grid,
        final=final,
        seed=seed,
        first=first,
        x=x,
        cond=cond,
        device=device,
        dtype=dtype,
    )
    last: Record | None = None
    with tqdm(unit="NFE", delay=1.0, leave=False, disable=not progress) as bar:
        for last in records:
            bar.total = last.state.plan.nfe
            bar.update()
    assert last is not None  # a plan has at least one row
    return last.x
