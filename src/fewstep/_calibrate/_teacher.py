"""What calibration compares with: converged samples of the same model from the same noises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._denoiser import Model, Wrapper
from .._noise import Noise, start_noise
from .._plan import Plan
from .._process import Array, Level
from .._sampling import plan
from ._by_value import PlansByValue

__all__ = [
    "Counted",
    "Teacher",
    "cycled",
    "run_plan",
    "shared_errors",
    "taken",
    "teach",
    "trajectory",
]

#: Solver and grid of converged samples: of the solvers here, on the trained and the exact digits,
#: the one with the smallest error at 48 to 192 evaluations.
_SOLVER, _GRID = "unipc_3", "lambda"
#: Samples that the number of steps is chosen on.
_PILOT = 16


class Counted(Wrapper):
    """A model that counts: `evaluations` of single samples (a guided one counts once)."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.evaluations = 0

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        self.evaluations += x_in.shape[0]
        return self.model.output(x_in, t_in, level, cond)


def taken(cond: Mapping[str, Any], index: Sequence[int] | slice, count: int) -> dict[str, Any]:
    """The conditions of some of `count` samples: what has a leading axis (or a length) of `count`
    is indexed, the rest is for all."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: of(v) for k, v in value.items()}
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim and value.shape[0] == count:
            return value[index]
        if isinstance(value, (list, tuple)) and len(value) == count:
            if isinstance(index, slice):
                return value[index]
            return type(value)(value[i] for i in index)
        return value

    return {k: of(v) for k, v in cond.items()}


def cycled(cond: Mapping[str, Any], total: int) -> dict[str, Any]:
    """Conditions of `total` samples from those of some prompts, taken in turn. Tensors, arrays and
    lists have one entry per prompt; the rest is for all."""
    sizes: dict[str, int] = {}

    def look(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for k, v in value.items():
                look(f"{prefix}.{k}", v)
        elif isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            sizes[prefix] = int(value.shape[0])
        elif isinstance(value, (list, tuple)):
            sizes[prefix] = len(value)

    for name, value in cond.items():
        look(name, value)
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{k} has {v}" for k, v in sizes.items())
        raise ValueError(f"cond: {said} entries; give every condition one entry per prompt")
    if not sizes:
        return dict(cond)
    count = next(iter(sizes.values()))
    index = [i % count for i in range(total)]
    return taken(cond, index, count)


@dataclass(frozen=True, eq=False)
class Teacher:
    """Noises, the converged samples of a model from them, and the conditions they were made with.

    x: (count, ...) states at the start of the process, noise of scale `prior_std`.
    samples: (count, ...) where the ODE leads from there, at sigma = 0.
    cond: conditions; what has a leading axis of `count` is per sample.
    error: median over samples of the distance to twice the steps, NaN if unknown.
    nfe: evaluations that every sample took, 0 if they were given.
    batch: samples per network call.
    """

    model: Model
    x: Tensor
    samples: Tensor
    cond: Mapping[str, Any] = field(default_factory=dict)
    error: float = math.nan
    nfe: int = 0
    batch: int = 256

    def __post_init__(self) -> None:
        if self.x.shape != self.samples.shape or self.x.ndim < 1 or not len(self.x):
            raise ValueError(
                f"samples have shape {tuple(self.samples.shape)} for noises of shape "
                f"{tuple(self.x.shape)}; the two must agree, batch first"
            )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | list[int]) -> Teacher:
        """Some of the samples, with their conditions."""
        cond = taken(self.cond, index, len(self))
        return replace(self, x=self.x[index], samples=self.samples[index], cond=cond)

    def chunks(self) -> list[slice]:
        """The samples in batches."""
        return [slice(i, i + self.batch) for i in range(0, len(self), self.batch)]

    def run(self, run: Plan | PlansByValue, model: Model | None = None) -> Tensor:
        """Samples of a plan from the same noises."""
        return run_plan(self.model if model is None else model, run, self.x, self.cond, self.batch)

    def distances(self, samples: Tensor) -> Array:
        """Of every sample, the root mean square over its elements of the distance to the converged
        one; infinite where it is not finite."""
        off = (samples.double() - self.samples.double()).reshape(len(self), -1)
        rms = off.square().mean(1).sqrt().cpu().numpy()
        return np.where(np.isfinite(rms), rms, np.inf)

    def errors(self, run: Plan | PlansByValue, model: Model | None = None) -> Array:
        """`distances` of the samples of a plan, one batch of which is kept at a time."""
        parts = [self[part] for part in self.chunks()]
        return np.concatenate([part.distances(part.run(run, model)) for part in parts])


def run_plan(
    model: Model, run: Plan | PlansByValue, x: Tensor, cond: Mapping[str, Any], batch: int = 256
) -> Tensor:
    """Samples of a plan from these states, in batches; not finite ones included, silently."""
    count, out = len(x), []
    with torch.no_grad():
        for i in range(0, count, batch):
            part = slice(i, i + batch)
            here = taken(cond, part, count)
            its = run if isinstance(run, Plan) else run.plan(here, x.ndim)
            state = its.start(x[part])
            while not state.done:
                output = model.output(*state.query(), its.asked(state.index), here)
                state = state.advance(output)
            out.append(state.x)
    return torch.cat(out)


def _signatures(run: Plan) -> list[str]:
    """Every row as text, up to rounding."""
    return [
        repr(
            [
                [(j, np.char.mod("%.9e", np.asarray(c)).tolist()) for j, c in terms.items()]
                for terms in (row.a, row.b)
            ]
        )
        for row in run.rows
    ]


def shared_errors(
    teacher: Teacher, plans: Sequence[Plan], each: Callable[[int], None] | None = None
) -> list[Array]:
    """`teacher.errors` of many deterministic plans. Those that evaluate at the same levels and
    whose rows agree so far share their evaluations. each: told how many plans are done."""
    groups: dict[Any, list[int]] = {}
    for i, run in enumerate(plans):
        asked = tuple(call is not None for call in run.calls)
        groups.setdefault((tuple(run.times), asked, run.evaluations), []).append(i)
    out: list[Array] = [np.empty(0)] * len(plans)
    done = 0
    for members in groups.values():
        here = [plans[i] for i in members]
        texts = [_signatures(run) for run in here]
        parts: list[list[Array]] = [[] for _ in members]
        with torch.no_grad():
            for part in teacher.chunks():
                sub = teacher[part]
                states = [run.start(sub.x) for run in here]
                while not states[0].done:
                    keys = [tuple(t[: s.index]) for t, s in zip(texts, states, strict=True)]
                    told: dict[Any, Tensor] = {}
                    for key, state in zip(keys, states, strict=True):
                        if key not in told:
                            level = state.plan.asked(state.index)
                            told[key] = teacher.model.output(*state.query(), level, sub.cond)
                    states = [s.advance(told[k]) for s, k in zip(states, keys, strict=True)]
                for p, state in zip(parts, states, strict=True):
                    p.append(sub.distances(state.x))
        for i, p in zip(members, parts, strict=True):
            out[i] = np.concatenate(p)
        done += len(members)
        if each is not None:
            each(done)
    return out


def teach(
    model: Model,
    shape: Sequence[int],
    count: int,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    first: int = 0,
    nfe: int | None = None,
    tolerance: float = 3e-5,
    batch: int = 256,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    each: Callable[[int], None] | None = None,
) -> Teacher:
    """Converged samples from fresh noises.

    shape: of one sample. cond: conditions; what has a leading axis of `count` is per sample.
    first: number of the first noise, as in `fewstep.sample`.
    nfe: evaluations per sample. None: 48, 96, 192 or 384, the first at which the median distance to
        twice the steps, on a few samples, is below `tolerance` times the data's root mean square,
        and nine of ten are below ten times that.
    """
    device = model.device if device is None else device
    z = start_noise((count, *shape), seed, first=first, dtype=dtype, device=device)
    z = model.process.noise_from(z, Noise(seed, first))
    x = z * model.process.prior_std(model.process.t_start)
    cond = dict(cond or {})
    pilot = slice(0, min(_PILOT, count))
    few, its = x[pilot], taken(cond, pilot, count)

    def solve(n: int, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return run_plan(model, plan(_SOLVER, model, n, grid=_GRID), x, cond, batch)

    spent, steps = 0, [nfe] if nfe is not None else [48, 96, 192, 384]
    coarse = solve(steps[0], few, its)
    error, chosen = math.inf, steps[0]
    for chosen in steps:
        fine = solve(2 * chosen, few, its)
        spent += 2 * chosen
        off = (fine - coarse).double().reshape(len(few), -1).square().mean(1).sqrt()
        error = float(off.median())
        limit = tolerance * float(fine.double().square().mean().sqrt())
        # The median alone would leave out the samples that are about to change their mode.
        if error <= limit and float(off.quantile(0.9)) <= 10 * limit:
            break
        coarse = fine
    samples = []
    for i in range(0, count, batch):
        part = slice(i, i + batch)
        samples.append(solve(chosen, x[part], taken(cond, part, count)))
        if each is not None:
            each(min(i + batch, count))
    return Teacher(model, x, torch.cat(samples), cond, error, chosen, batch)


def trajectory(
    model: Model,
    x: Tensor,
    times: Sequence[float],
    cond: Mapping[str, Any] | None = None,
    *,
    nfe: int = 200,
    batch: int = 256,
) -> list[Tensor]:
    """Converged states at these times (of the process, from its start to its end), the first of
    which is where x is: the teacher's solver on a grid refined between them, about nfe steps."""
    times = [float(t) for t in times]
    fine = [float(t) for t in plan(_SOLVER, model, nfe, grid=_GRID).times]
    down = times[0] > times[-1]
    inside = [t for t in fine if (times[-1] < t < times[0]) == down and t not in times]
    grid = sorted({*times, *inside}, reverse=down)
    run = plan(_SOLVER, model, grid=grid)
    where = set(times)
    out: list[list[Tensor]] = [[] for _ in times]
    with torch.no_grad():
        for i in range(0, len(x), batch):
            part = slice(i, i + batch)
            here = taken(cond or {}, part, len(x))
            state = run.start(x[part])
            seen = 0
            while True:
                if float(state.level.t) in where:
                    out[seen].append(state.x)
                    seen += 1
                if state.done:
                    break
                output = model.output(*state.query(), run.asked(state.index), here)
                state = state.advance(output)
    return [torch.cat(parts) for parts in out]
