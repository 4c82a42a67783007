"""Plans: a sampler as data, and the state that walks it.

A plan is a lower-triangular linear program over past states and past data predictions,

    X[i+1] = sum_j a[i,j] X[j] + sum_j b[i,j] D[j],        D[j] = p[j] X[j] + q[j] out[j],

with the level (t, alpha, sigma, lambda) of every state and, for the states at which the network is
called, the four scalars of its prediction. It is computed once, on the host, in float64. A plan
never calls a network; it is driven from outside:

    state = plan.start(x)
    while not state.done:
        x_in, t_in = state.query()
        state = state.advance(network(x_in, t_in))
    sample = state.x

States are values: nothing here changes after it is made, so runs can be interleaved, shared
between threads, stopped and continued.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ._denoiser import check_output
from ._process import Array, Level

__all__ = ["Call", "Plan", "Row", "State"]

#: A coefficient: a float, or an array that broadcasts against a sample.
Coefficient = float | Array

_FORMAT = "fewstep.plan.1"
#: A row must reproduce constant data and constant noise to this, relative to its terms.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Call:
    """One network evaluation: out = network(c_in x, c_noise), D = p x + q out."""

    p: float
    q: float
    c_in: float
    c_noise: float


@dataclass(frozen=True)
class Row:
    """How one state is made: coefficients `a` of earlier states and `b` of earlier data
    predictions, by index; the order of this row; and whether it reproduces constant data and
    constant noise exactly (`exact`) or only to its order."""

    a: Mapping[int, Coefficient]
    b: Mapping[int, Coefficient]
    order: int
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler as data: levels of the states 0..n, rows 1..n, and the network calls.

    levels: one per state, state 0 being the start. rows: rows[i] makes state i + 1.
    calls: one per state, None where the network is not evaluated.
    integer_times: the network is told integers.
    prior_std: standard deviation of the noise to start from.
    about: description, kept in files and shown by `print`.
    """

    levels: tuple[Level, ...]
    rows: tuple[Row, ...]
    calls: tuple[Call | None, ...]
    integer_times: bool = False
    prior_std: float = 1.0
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.rows)
        if n < 1 or len(self.levels) != n + 1 or len(self.calls) != n + 1:
            raise ValueError(
                f"plan: {n} rows, {len(self.levels)} levels, {len(self.calls)} calls; n >= 1 rows "
                "need n + 1 levels and n + 1 calls"
            )
        if self.calls[0] is None or self.calls[-1] is not None:
            raise ValueError("plan: the first state must be evaluated and the last must not be")
        for i, row in enumerate(self.rows):
            self._check_row(i, row)

    def _check_row(self, i: int, row: Row) -> None:
        problem = ""
        coefficients = [*row.a.values(), *row.b.values()]
        if not all(np.isfinite(c).all() for c in coefficients):
            problem = "has a coefficient that is not finite"
        elif any(not 0 <= j <= i for j in (*row.a, *row.b)):
            problem = "uses a state that does not exist yet"
        elif any(self.calls[j] is None for j in row.b):
            problem = "uses a data prediction of a state that is not evaluated"
        elif not row.b:
            problem = "uses no data prediction: the step would do nothing"
        elif row.exact:
            data, noise, size = _consistency(self.levels, i, row)
            if not (abs(data) <= _TOLERANCE * size and abs(noise) <= _TOLERANCE * size):
                problem = (
                    "does not reproduce constant data and noise: sum a alpha + sum b - alpha = "
                    f"{data:.3g}, sum a sigma - sigma = {noise:.3g}"
                )
        if problem:
            raise ValueError(f"plan: row {i} {problem}\n{self._text(mark=i)}")

    @property
    def nfe(self) -> int:
        """Network evaluations of a run."""
        return sum(call is not None for call in self.calls)

    @property
    def evaluations(self) -> tuple[Level, ...]:
        """The level of every network evaluation, in order."""
        return tuple(v for v, call in zip(self.levels, self.calls, strict=True) if call is not None)

    @property
    def times(self) -> Array:
        """Time of every state."""
        return np.array([level.t for level in self.levels])

    @cached_property
    def _last_use(self) -> tuple[dict[int, int], dict[int, int]]:
        """The last row that needs each state, and each data prediction."""
        states: dict[int, int] = {}
        outputs: dict[int, int] = {}
        for i, row in enumerate(self.rows):
            states.update(dict.fromkeys(row.a, i))
            outputs.update(dict.fromkeys(row.b, i))
        return states, outputs

    def start(self, x: Tensor) -> State:
        """The state before the first call. x: (batch, ...), noise of scale `prior_std` (or
        whatever the plan is to start from). Kept in float32, or float64 if x is."""
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[0] < 1:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x is {shape}; need a tensor with a leading batch axis")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; need a floating-point tensor")
        finite = bool(torch.isfinite(x).all())  # the only read from the device that a plan makes
        if not finite:
            raise ValueError("x contains NaN or inf; start from finite values")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return State(self, 0, {0: x}, {})

    def __str__(self) -> str:
        return self._text()

    def _text(self, mark: int | None = None) -> str:
        head = "  ".join(f"{k}: {v}" for k, v in self.about.items())
        lines = [head] if head else []
        lines.append(
            f"NFE {self.nfe}, {len(self.rows)} rows; X[i+1] = sum a X + sum b D; "
            f"start: standard deviation {self.prior_std:g}"
        )
        title = f"{'row':>5} {'t':>10} {'sigma':>10} {'lambda':>8} {'h':>8} {'order':>5} {'NFE':>4}"
        lines.append(f"{title}  coefficients")
        nfe = 0
        for i, row in enumerate(self.rows):
            s, t = self.levels[i], self.levels[i + 1]
            nfe += self.calls[i] is not None
            numbers = f"{s.t:>10.5g} {s.sigma:>10.5g} {s.lam:>8.4g} {t.lam - s.lam:>8.4g}"
            terms = [f"{_show(c)} X{j}" for j, c in sorted(row.a.items(), reverse=True)]
            terms += [f"{_show(c)} D{j}" for j, c in sorted(row.b.items(), reverse=True)]
            flag = ">" if mark == i else " "
            order = f"{row.order}{'' if row.exact else '~'}"
            lines.append(f"{flag}{i:>4} {numbers} {order:>5} {nfe:>4}  {' '.join(terms)}")
        t = self.levels[-1]
        lines.append(f"  end {t.t:>10.5g} {t.sigma:>10.5g} {t.lam:>8.4g}")
        if any(not row.exact for row in self.rows):
            lines.append("~ reproduces constant data and noise only to its order, not exactly")
        return "\n".join(lines)

    def __repr__(self) -> str:
        name = self.about.get("solver", "plan")
        return f"<Plan {name}: {self.nfe} NFE, t = {self.times[0]:g} to {self.times[-1]:g}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        mine, theirs = self._arrays(), other._arrays()
        return mine.keys() == theirs.keys() and all(
            np.array_equal(v, theirs[k], equal_nan=True) for k, v in mine.items()
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _arrays(self) -> dict[str, Array]:
        """Everything but the description, as arrays: what a file holds and what equality means."""
        n = len(self.levels)
        levels = np.array([(v.t, v.alpha, v.sigma, v.lam) for v in self.levels])
        calls = np.full((n, 4), np.nan)
        for i, c in enumerate(self.calls):
            if c is not None:
                calls[i] = c.p, c.q, c.c_in, c.c_noise
        out = {"levels": levels, "calls": calls}
        out["rows"] = np.array([(row.order, row.exact) for row in self.rows], dtype=np.float64)
        out["scalars"] = np.array([float(self.integer_times), self.prior_std])
        for i, row in enumerate(self.rows):
            for kind, terms in (("a", row.a), ("b", row.b)):
                for j, c in terms.items():
                    out[f"{kind}.{i}.{j}"] = np.array(c, dtype=np.float64, order="C")
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, the description as metadata. Never leaves half a file."""
        target = Path(path)
        meta = {"format": _FORMAT, "about": json.dumps(dict(self.about))}
        part = target.with_name(target.name + ".part")
        part.write_bytes(save(self._arrays(), metadata=meta))
        os.replace(part, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file written by `save`; the plan is checked as when it was built."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"path = {str(path)!r}: no such plan file")
        try:
            with safe_open(str(path), framework="numpy") as file:
                meta = file.metadata() or {}
                data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"path = {str(path)!r} is not a readable safetensors file ({error}); it may be "
                "truncated: save the plan again"
            ) from error
        if meta.get("format") != _FORMAT:
            raise ValueError(
                f"path = {str(path)!r} is a safetensors file of another kind (format "
                f"{meta.get('format')!r}); accepted: {_FORMAT!r}, as written by Plan.save"
            )
        try:
            about = json.loads(meta["about"])
            levels = tuple(Level(*map(float, v)) for v in data["levels"])
            calls = tuple(None if math.isnan(c[0]) else Call(*map(float, c)) for c in data["calls"])
            terms: list[dict[str, dict[int, Coefficient]]] = [{"a": {}, "b": {}} for _ in levels]
            for key, value in data.items():
                kind, *where = key.split(".")
                if kind in ("a", "b"):
                    i, j = map(int, where)
                    terms[i][kind][j] = float(value) if value.ndim == 0 else value
            rows = tuple(
                Row(
                    dict(sorted(term["a"].items())),
                    dict(sorted(term["b"].items())),
                    int(o),
                    bool(e),
                )
                for term, (o, e) in zip(terms, data["rows"], strict=False)
            )
            integer, prior = data["scalars"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"path = {str(path)!r} says it is a plan but lacks or garbles {error}; save again"
            ) from error
        return cls(levels, rows, calls, bool(integer), float(prior), about)


@dataclass(frozen=True, eq=False)
class State:
    """A run of a plan, before call number `nfe` + 1: a value that `advance` never changes.

    index: the newest state. states, outputs: the X[j] and D[j] that later rows need.
    newest: the newest D, needed later or not (None before the first call).
    """

    plan: Plan
    index: int
    states: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    newest: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The newest state; the sample once `done`."""
        return self.states[self.index]

    @property
    def denoised(self) -> Tensor:
        """The newest data prediction."""
        if self.newest is None:
            raise ValueError("state: the network has not been called yet")
        return self.newest

    @property
    def done(self) -> bool:
        """Whether all rows have been taken."""
        return self.index == len(self.plan.rows)

    @property
    def level(self) -> Level:
        """Noise level of `x`."""
        return self.plan.levels[self.index]

    @property
    def nfe(self) -> int:
        """Network evaluations spent so far."""
        return sum(call is not None for call in self.plan.calls[: self.index])

    def query(self) -> tuple[Tensor, Tensor]:
        """What to ask the network: its input c_in x, and its time c_noise for every sample
        (int64 for integer times, else the state's dtype: never below float32)."""
        call = self.plan.calls[self.index]
        if call is None:
            raise ValueError("state: the run is done; there is nothing left to ask")
        x = self.x
        dtype = torch.int64 if self.plan.integer_times else x.dtype
        value = round(call.c_noise) if self.plan.integer_times else call.c_noise
        t_in = torch.full((x.shape[0],), value, dtype=dtype, device=x.device)
        return (x if call.c_in == 1 else x * call.c_in), t_in

    def advance(self, output: Tensor) -> State:
        """The state after the network's answer to `query`."""
        plan, i = self.plan, self.index
        call = plan.calls[i]
        if call is None:
            raise ValueError("state: the run is done; it cannot advance")
        x = self.x
        check_output(output, x)
        denoised = _combine([(call.p, x), (call.q, output.to(x.dtype))])
        states, outputs = dict(self.states), {**self.outputs, i: denoised}
        state_use, output_use = plan._last_use
        while True:
            row = plan.rows[i]
            terms = [(c, states[j]) for j, c in row.a.items()]
            terms += [(c, outputs[j]) for j, c in row.b.items()]
            i += 1
            states[i] = _combine(terms)
            states = {j: v for j, v in states.items() if j == i or state_use.get(j, -1) >= i}
            outputs = {j: v for j, v in outputs.items() if output_use.get(j, -1) >= i}
            if i == len(plan.rows) or plan.calls[i] is not None:
                return State(plan, i, states, outputs, denoised)


def _combine(terms: Sequence[tuple[Coefficient, Tensor]]) -> Tensor:
    """sum c v, the one place where host coefficients meet device tensors."""
    total: Tensor | None = None
    for c, v in terms:
        if not isinstance(c, float):
            part = v * torch.as_tensor(c, dtype=v.dtype).to(v.device, non_blocking=True)
            total = part if total is None else total + part
        elif c != 0:
            total = v * c if total is None else torch.add(total, v, alpha=c)
    return torch.zeros_like(terms[0][1]) if total is None else total


def _consistency(levels: Sequence[Level], i: int, row: Row) -> tuple[float, float, float]:
    """Largest defects on constant data and on constant noise, and the size of the terms."""
    end = levels[i + 1]
    data = sum((c * levels[j].alpha for j, c in row.a.items()), 0.0) + sum(row.b.values(), 0.0)
    noise = sum((c * levels[j].sigma for j, c in row.a.items()), 0.0)
    size = max(
        sum(np.max(np.abs(c)) * (levels[j].alpha + levels[j].sigma) for j, c in row.a.items())
        + sum(np.max(np.abs(c)) for c in row.b.values()),
        end.alpha + end.sigma,
    )

    def worst(defect: Any) -> float:
        return float(np.ravel(defect)[np.argmax(np.abs(defect))])

    return worst(data - end.alpha), worst(noise - end.sigma), float(size)


def _show(c: Coefficient) -> str:
    if isinstance(c, float):
        return f"{c:+.5g}"
    return f"[{np.min(c):+.3g}..{np.max(c):+.3g}]{list(np.shape(c))}"
