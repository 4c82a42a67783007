"""Network and update as one compiled graph, the same for every step, number of steps and solver
of a kind.

A compiler guards on Python numbers: a loop whose coefficients are floats is compiled again at every
step. Here they are rows of one small tensor on the device, uploaded once per run,

    out = network(c_in x, c_noise),   v' = p x + q out,   x' = sum_s a_s X_s + sum_m b_m V_m

over fixed windows of past states X and past values V, padded with zeros while a run starts up.
V are data predictions, or raw outputs (p = 0, q = 1) where rows then have fewer terms. What a
stochastic step draws, and the constants of rows, are summed outside and come in as one more tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._combine import combine, plus
from ._denoiser import Guided, Model, check_output
from ._noise import Noise, Source, as_source
from ._plan import Plan
from ._process import Array, Level
from ._transform import fuse

__all__ = ["Compiled", "compiled"]


@dataclass(frozen=True)
class _Program:
    """A plan as arrays. coefficients: (steps, 3 + states + values), columns c_in, p, q, then the
    windows, newest first. states counts x itself; values counts the newest."""

    coefficients: Array
    times: np.ndarray
    levels: tuple[Level, ...]
    states: int
    values: int
    scaled: bool
    plan: Plan


def _program(plan: Plan) -> _Program:
    # On equal terms data predictions: they do not lengthen the window of states.
    forms = [plan] if plan.raw else [fuse(plan, outputs=False), fuse(plan)]
    fused = min(forms, key=lambda form: sum(len(row.a) + len(row.b) for row in form.rows))
    if fused.given != 1 or None in fused.calls[:-1] or fused.basis is not None:
        raise ValueError(
            f"plan: {plan!r} starts from several states, hands over several, or has a basis; only "
            "plans of one state and one network call per row can be compiled"
        )
    rows, calls = fused.rows, [call for call in fused.calls if call is not None]
    for row in rows:
        terms = (*row.a.values(), *row.b.values(), *row.e.values())
        if not all(isinstance(c, (int, float)) for c in terms):
            raise ValueError(f"plan: {plan!r} has coefficients per mode; only numbers are compiled")
    states = max(made - j for made, row in enumerate(rows, 1) for j in (*row.a, made - 1))
    values = max(made - j for made, row in enumerate(rows, 1) for j in (*row.b, made - 1))
    table = np.zeros((len(rows), 3 + states + values))
    for i, (row, call) in enumerate(zip(rows, calls, strict=True)):
        table[i, :3] = (call.c_in, 0.0, 1.0) if fused.raw else (call.c_in, call.p, call.q)
        for j, c in row.a.items():
            table[i, 3 + i - j] = c
        for j, c in row.b.items():
            table[i, 3 + states + i - j] = c
    times = np.array([call.c_noise for call in calls])
    if plan.integer_times:
        times = times.astype(np.int64)
    levels = tuple(fused.asked(i) for i in range(len(rows)))
    scaled = any(call.c_in != 1 for call in calls)
    return _Program(table, times, levels, states, values, scaled, fused)


def _noise(program: _Program, like: Tensor, source: Source) -> Iterator[Tensor | None]:
    """What every step adds: sum e Z + c; None for a plan without draws and constants."""
    plan, kept = program.plan, dict[int, Tensor]()
    last, shifted = plan._last_use[2], any(row.shifts for row in plan.rows)
    shape = np.broadcast_shapes(*(np.shape(row.c) for row in plan.rows))
    for made, row in enumerate(plan.rows, 1):
        if not plan.draws:  # constants alone stay as small as they are, all of one shape
            c = np.array(np.broadcast_to(row.c, shape))
            yield torch.from_numpy(c).to(like.device, like.dtype) if shifted else None
        elif not row.e:
            yield plus(torch.zeros_like(like), row.c)
        else:
            for m in row.e:
                if m not in kept:
                    kept[m] = source.draw(plan.draws[m], m, like)
            yield plus(combine([(c, kept[m]) for m, c in row.e.items()], like.dtype), row.c)
            kept = {m: z for m, z in kept.items() if last[m] > made}


def _decided(model: Model, level: Level, made: dict[tuple[int, bool], Model]) -> Model:
    """The model with what it decides by the level decided on the host: a compiler cannot branch on
    it. `made` keeps one model for each decision, since a compiler tells objects apart."""
    if not isinstance(model, Guided) or model.interval == (0.0, math.inf):
        return model
    low, high = model.interval
    active = low <= float(level.rho) <= high
    inner = _decided(model.model, level, made)
    if not active:
        return inner
    key = (id(inner), active)
    if key not in made:
        made[key] = replace(model, model=inner, interval=(0.0, math.inf))
    return made[key]


def _step(
    model: Model,
    level: Level,
    cond: Mapping[str, Any],
    scaled: bool,
    states: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    row: Tensor,
    time: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(new state, new value if later rows need any): what is compiled. Windows newest first."""
    x = states[0]
    c_in, p, q, *weights = row.unbind()
    out = model.output(x * c_in if scaled else x, time.expand(x.shape[0]), level, cond)
    check_output(out, x)
    value = p * x + q * out.to(x.dtype)
    total = weights[0] * x
    for c, v in zip(weights[1:], (*states[1:], value, *values), strict=True):
        total = total + c * v
    if noise is not None:
        total = total + noise
    return total, ((value,) if values else ())


@dataclass(frozen=True, eq=False)
class Compiled:
    """A model whose steps are compiled; make it with `compiled`."""

    model: Model
    step: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]

    def __call__(
        self, plan: Plan, x: Tensor, cond: Mapping[str, Any] | None = None, noise: Any = 0
    ) -> Tensor:
        """Run a plan from x, (batch, ...) noise of scale `plan.prior_std`: the sample, in float32
        or better. Equal to the plain loop up to rounding. noise: as in `Plan.start`."""
        sample = self._load(plan, x, dict(cond or {}), as_source(noise))()
        if not bool(torch.isfinite(sample).all()):
            raise FloatingPointError(
                "the sample contains NaN or inf; run it uncompiled (fewstep.sample) to learn at "
                "which evaluation it began"
            )
        return sample

    def _load(
        self, plan: Plan, x: Tensor, cond: Mapping[str, Any], source: Source | None = None
    ) -> Callable[[], Tensor]:
        """Everything before the first step: the program, its tables on the device."""
        program = _program(plan)
        x = plan.start(x).x
        kind = torch.int64 if plan.integer_times else x.dtype
        # A tensor each: compilers may assume the alignment of the first they see.
        rows = [v.clone() for v in torch.tensor(program.coefficients, dtype=x.dtype).to(x.device)]
        times = [v.clone() for v in torch.tensor(program.times, dtype=kind).to(x.device)]

        made: dict[tuple[int, bool], Model] = {}
        models = [_decided(self.model, level, made) for level in program.levels]

        @torch.no_grad()
        def run() -> Tensor:
            # Tensors of their own, since a compiler also guards on which arguments are the same.
            states = (x, *(torch.zeros_like(x) for _ in range(program.states - 1)))
            values = tuple(torch.zeros_like(x) for _ in range(program.values - 1))
            noise = _noise(program, x, source or Noise())
            steps = zip(models, program.levels, rows, times, noise, strict=True)
            for model, level, row, time, drawn in steps:
                new, kept = self.step(
                    model, level, cond, program.scaled, states, values, row, time, drawn
                )
                states = (new, *states)[: program.states]
                values = (*kept, *values)[: program.values - 1]
            return states[0]

        return run


def compiled(model: Model, **options: Any) -> Compiled:
    """Compile network and update together, in one graph: `run = compiled(model)`, `run(plan, x)`.

    Compiled at the first step for a shape; later steps, other numbers of steps and other solvers
    with windows of the same lengths use the same code (guidance in an interval takes two). The
    update then costs one pass over memory, the conversion of a half-precision output included.

    options: for `torch.compile`, such as `backend`; `fullgraph` is on. Not for CUDA graphs
        (mode="reduce-overhead"), which reuse the memory of the past values.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    return Compiled(model, torch.compile(_step, fullgraph=True, dynamic=False, **options))
