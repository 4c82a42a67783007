"""Plans: a sampler as data, and the state that walks it.

A plan is a lower-triangular linear program over past states and past data predictions,

    X[k] = sum_j a[k,j] X[j] + sum_j b[k,j] D[j],  j < k,        D[j] = p[j] X[j] + q[j] out[j],

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

With a basis B and a mean mu, rows act on the modes B (X - alpha mu) and B (D - mu), and their
coefficients may be arrays, one number per mode. A plan is `raw` when its rows combine network
outputs instead of data predictions (`Plan.fuse`). It may start from several states (`given`) and
hand over several at its end (`keep`): what reversible methods need.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ._combine import combine
from ._denoiser import check_output
from ._process import Array, Level

if TYPE_CHECKING:
    from ._analysis import ErrorConstant, Stability
    from ._basis import Basis
    from ._sampling import Origin

__all__ = ["Call", "Coefficient", "Hook", "Plan", "Row", "State"]

#: A coefficient: a float, or an array that broadcasts against one sample (or its modes).
Coefficient = float | Array
#: A correction of the data prediction at a level, before it enters any row: hook(D, level) -> D.
Hook = Callable[[Tensor, Level], Tensor]

_FORMAT = "fewstep.plan.1"
#: A row must reproduce constant data and constant noise to this, relative to its terms.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Call:
    """One network evaluation: out = network(c_in x, c_noise), D = p x + q out.

    level: the level it is asked at, where that is not the level of its state.
    """

    p: float
    q: float
    c_in: float
    c_noise: float
    level: Level | None = None


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
    """A sampler as data: levels of the states, rows, and the network calls.

    levels: one per state. rows: rows[i] makes state given + i.
    calls: one per state, None where the network is not evaluated.
    integer_times: the network is told integers.
    prior_std: standard deviation of the noise to start from.
    about: description, kept in files and shown by `print`.
    given: states that the run starts from. keep: states, beside the last, that it hands over.
    basis: rows act on its modes. raw: rows combine network outputs, not data predictions.
    origin: what it was compiled from, to compile it again for other times; lost in files.
    """

    levels: tuple[Level, ...]
    rows: tuple[Row, ...]
    calls: tuple[Call | None, ...]
    integer_times: bool = False
    prior_std: float = 1.0
    about: Mapping[str, str] = field(default_factory=dict)
    given: int = 1
    keep: tuple[int, ...] = ()
    basis: Basis | None = None
    raw: bool = False
    origin: Origin | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = len(self.rows)
        if n < 1 or self.given < 1 or not len(self.levels) == len(self.calls) == n + self.given:
            raise ValueError(
                f"plan: {n} rows, {len(self.levels)} levels, {len(self.calls)} calls, "
                f"{self.given} given; n >= 1 rows need n + given levels and n + given calls"
            )
        for row in self.rows:
            for c in (*row.a.values(), *row.b.values()):
                if isinstance(c, np.ndarray):
                    c.setflags(write=False)  # so that it is uploaded once, not at every step
        if self.calls[-1] is not None:
            raise ValueError("plan: the last state must not be evaluated")
        if self.integer_times:
            for call in self.calls:
                if call is not None and call.c_noise != round(call.c_noise):
                    raise ValueError(
                        f"plan: the network is told integers, but an evaluation is at time "
                        f"{call.c_noise:g}"
                    )
        for i, row in enumerate(self.rows):
            self._check_row(i, row)

    def _check_row(self, i: int, row: Row) -> None:
        problem, made = "", self.given + i
        coefficients = [*row.a.values(), *row.b.values()]
        if not all(np.isfinite(c).all() for c in coefficients):
            problem = "has a coefficient that is not finite"
        elif any(not 0 <= j < made for j in (*row.a, *row.b)):
            problem = "uses a state that does not exist yet"
        elif any(self.calls[j] is None for j in row.b):
            problem = "uses a data prediction of a state that is not evaluated"
        elif not row.a and not row.b:
            problem = "has no terms"
        elif not row.b and list(map(repr, row.a.values())) == ["1.0"]:
            problem = "copies a state: the step would do nothing"
        elif row.exact:
            data, noise, size = self._consistency(made, row)
            if not (abs(data) <= _TOLERANCE * size and abs(noise) <= _TOLERANCE * size):
                problem = (
                    "does not reproduce constant data and noise: sum a alpha + sum b - alpha = "
                    f"{data:.3g}, sum a sigma - sigma = {noise:.3g}"
                )
        if problem:
            raise ValueError(f"plan: row {i} {problem}\n{self._text(mark=i)}")

    def data_row(self, row: Row) -> Row:
        """The row in terms of data predictions, also if the plan is raw."""
        if not self.raw:
            return row
        a, b = dict(row.a), {}
        for j, c in row.b.items():
            call = self.calls[j]
            assert call is not None  # checked when the plan was made
            b[j] = c / call.q
            a[j] = a.get(j, 0.0) - b[j] * call.p
        return Row(a, b, row.order, row.exact)

    def _consistency(self, made: int, row: Row) -> tuple[float, float, float]:
        """Largest defects on constant data and on constant noise, and the size of the terms."""
        levels, end, row = self.levels, self.levels[made], self.data_row(row)
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

    @property
    def nfe(self) -> int:
        """Network evaluations of a run."""
        return sum(call is not None for call in self.calls)

    @property
    def evaluations(self) -> tuple[Level, ...]:
        """The level of every network evaluation, in order."""
        return tuple(self.asked(i) for i, call in enumerate(self.calls) if call is not None)

    @property
    def times(self) -> Array:
        """Time of every state."""
        return np.array([level.t for level in self.levels])

    def asked(self, state: int) -> Level:
        """The level at which the network is asked about a state."""
        call = self.calls[state]
        return self.levels[state] if call is None or call.level is None else call.level

    @cached_property
    def _last_use(self) -> tuple[dict[int, int], dict[int, int]]:
        """The last state that needs each state, and each data prediction."""
        states: dict[int, int] = dict.fromkeys(self.keep, len(self.levels))
        outputs: dict[int, int] = {}
        for made, row in enumerate(self.rows, self.given):
            for j in row.a:
                states[j] = max(states.get(j, 0), made)
            outputs.update(dict.fromkeys(row.b, made))
        return states, outputs

    def start(self, x: Tensor, *others: Tensor) -> State:
        """The state before the first call. x: (batch, ...), noise of scale `prior_std` (or
        whatever the plan is to start from). Kept in float32, or float64 if x is. A plan that
        starts from several states takes them all, in order."""
        if 1 + len(others) != self.given:
            raise ValueError(f"x: {1 + len(others)} states; this plan starts from {self.given}")
        for v in (x, *others):
            if not isinstance(v, Tensor) or v.ndim < 1 or v.shape[0] < 1:
                shape = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
                raise ValueError(f"x is {shape}; need a tensor with a leading batch axis")
            if v.shape != x.shape:
                raise ValueError(f"x: states of shapes {tuple(x.shape)} and {tuple(v.shape)}")
            if not v.is_floating_point():
                raise ValueError(f"x has dtype {v.dtype}; need a floating-point tensor")
            # The only read from the device that a plan makes.
            if not bool(torch.isfinite(v).all()):
                raise ValueError("x contains NaN or inf; start from finite values")
        if self.basis is not None:
            self.basis.check(tuple(x.shape[1:]))
        dtype = torch.promote_types(x.dtype, torch.float32)
        states = {
            i: self._modes(v.to(dtype), self.levels[i].alpha) for i, v in enumerate((x, *others))
        }
        return self._walk(states, {}, -1)

    def _modes(self, v: Tensor, scale: float) -> Tensor:
        """What rows act on: B (v - scale mu)."""
        if self.basis is None:
            return v
        return self.basis.forward(v if self.basis.mean is None else v - self._mean(v) * scale)

    def _image(self, v: Tensor, scale: float) -> Tensor:
        """The inverse of `_modes`."""
        if self.basis is None:
            return v
        x = self.basis.inverse(v)
        return x if self.basis.mean is None else x + self._mean(x) * scale

    def _mean(self, like: Tensor) -> Tensor:
        assert self.basis is not None
        return self.basis.mean_like(like)

    @cached_property
    def _schedule(self) -> list[tuple[Any, Any, list[int], list[int], bool]]:
        """For every state: the terms of its row, the states and outputs that nothing needs any more
        once it is made, and whether the run stops there for an evaluation."""
        state_use, output_use = self._last_use
        last = len(self.levels) - 1
        out: list[tuple[Any, Any, list[int], list[int], bool]] = []
        kept: set[int] = set()
        held: set[int] = set()
        for k, call in enumerate(self.calls):
            a, b, gone, spent = (), (), [], []
            if k >= self.given:
                row = self.rows[k - self.given]
                a, b = tuple(row.a.items()), tuple(row.b.items())
                kept |= set(range(self.given)) if k == self.given else set()
                kept.add(k)
                gone = [j for j in kept if j < k and state_use.get(j, -1) <= k]
                spent = [j for j in held if output_use[j] <= k]
            kept.difference_update(gone)
            held.difference_update(spent)
            if call is not None and k in output_use:
                held.add(k)
            out.append((a, b, gone, spent, call is not None or k == last))
        return out

    def _walk(self, states: dict[int, Tensor], outputs: dict[int, Tensor], k: int) -> State:
        """From state k, which is done with, to the next that is to be evaluated, or the last."""
        schedule = self._schedule
        dtype = next(iter(states.values())).dtype
        if k in outputs and k not in self._last_use[1]:
            del outputs[k]  # no row needs it
        while True:
            k += 1
            a, b, gone, spent, stop = schedule[k]
            if a or b:
                terms = [(c, states[j]) for j, c in a]
                terms += [(c, outputs[j]) for j, c in b]
                states[k] = combine(terms, dtype)
                for j in gone:
                    states.pop(j, None)
                for j in spent:
                    outputs.pop(j, None)
            if stop:
                # Past the checks that a frozen dataclass makes for every field: a tenth of a step.
                state = object.__new__(State)
                state.__dict__.update(plan=self, index=k, states=states, outputs=outputs)
                if self.basis is None:
                    state.__dict__["x"] = states[k]
                return state

    def order(self) -> int:
        """The order of the whole run as its grid is refined, start-up and end included: the least
        of the orders of the bulk and of both ends, computed from the rows (`_analysis`)."""
        from ._analysis import order

        return order(self)

    def error_constant(self) -> ErrorConstant:
        """Leading constants of the local error, of every step and of equal small ones."""
        from ._analysis import error_constant

        return error_constant(self)

    def stability(self) -> Stability:
        """Which stiffness every step is stable for: regions, largest values, and a plot."""
        from ._analysis import stability

        return stability(self)

    def explain(self) -> str:
        """The formula in use, its source, order, stability, and its names in other code."""
        from ._analysis import explain

        return explain(self)

    def fuse(self) -> Plan:
        """The same sampler with one linear combination after each network call."""
        from ._transform import fuse

        return fuse(self)

    @cached_property
    def cheapest(self) -> Plan:
        """This plan in the form whose run moves the least memory: what `sample` runs."""
        from ._transform import cheapest

        return cheapest(self)

    def inverse(self) -> Plan:
        """The plan that undoes this one exactly, from the states it hands over at its end."""
        from ._transform import inverse

        return inverse(self)

    def canonical(self) -> tuple[Array, Array]:
        """(a, b): the state asked about at evaluation k (and the result, last) is
        a[k] x_start + sum_j b[k, j] D_j, with D_j the data prediction of evaluation j. Two plans
        are the same method exactly when these tables and their evaluations agree."""
        from ._transform import canonical

        return canonical(self)

    def __str__(self) -> str:
        return self._text()

    def _text(self, mark: int | None = None) -> str:
        head = "  ".join(f"{k}: {v}" for k, v in self.about.items())
        lines = [head] if head else []
        symbol = "N" if self.raw else "D"
        made = "X[i+1]" if self.given == 1 else f"X[i+{self.given}]"
        modes = "" if self.basis is None else f"; on the modes of {self.basis}"
        lines.append(
            f"NFE {self.nfe}, {len(self.rows)} rows; {made} = sum a X + sum b {symbol}{modes}; "
            f"start: standard deviation {self.prior_std:g}"
        )
        title = f"{'row':>5} {'t':>10} {'sigma':>10} {'lambda':>8} {'h':>8} {'order':>5} {'NFE':>4}"
        lines.append(f"{title}  coefficients")
        nfe = sum(call is not None for call in self.calls[: self.given - 1])
        for i, row in enumerate(self.rows):
            s, t = self.levels[self.given + i - 1], self.levels[self.given + i]
            nfe += self.calls[self.given + i - 1] is not None
            numbers = f"{s.t:>10.5g} {s.sigma:>10.5g} {s.lam:>8.4g} {t.lam - s.lam:>8.4g}"
            terms = [f"{_show(c)} X{j}" for j, c in sorted(row.a.items(), reverse=True)]
            terms += [f"{_show(c)} {symbol}{j}" for j, c in sorted(row.b.items(), reverse=True)]
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
        kinds = [b if b is None else b.kind for b in (self.basis, other.basis)]
        return (
            kinds[0] == kinds[1]
            and mine.keys() == theirs.keys()
            and all(np.array_equal(v, theirs[k], equal_nan=True) for k, v in mine.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _arrays(self) -> dict[str, Array]:
        """Everything but the description, as arrays: what a file holds and what equality means."""
        levels = np.array([(v.t, v.alpha, v.sigma, v.lam) for v in self.levels])
        calls = np.full((len(self.levels), 8), np.nan)
        for i, c in enumerate(self.calls):
            if c is not None:
                v = self.asked(i)
                calls[i] = c.p, c.q, c.c_in, c.c_noise, v.t, v.alpha, v.sigma, v.lam
        out = {"levels": levels, "calls": calls, "keep": np.array(self.keep, dtype=np.float64)}
        out["rows"] = np.array([(row.order, row.exact) for row in self.rows], dtype=np.float64)
        scalars = (self.integer_times, self.prior_std, self.given, self.raw)
        out["scalars"] = np.array(scalars, dtype=np.float64)
        for i, row in enumerate(self.rows):
            for kind, terms in (("a", row.a), ("b", row.b)):
                for j, c in terms.items():
                    out[f"{kind}.{i}.{j}"] = np.array(c, dtype=np.float64, order="C")
        if self.basis is not None:
            for name, array in self.basis.arrays().items():
                out[f"basis.{name}"] = np.ascontiguousarray(array)
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, the description as metadata. Never leaves half a file."""
        target = Path(path)
        meta = {"format": _FORMAT, "about": json.dumps(dict(self.about))}
        if self.basis is not None:
            meta["basis"] = self.basis.kind
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
            calls: list[Call | None] = []
            for numbers, level in zip(data["calls"], levels, strict=True):
                at = Level(*map(float, numbers[4:]))
                call = Call(*map(float, numbers[:4]), level=None if at == level else at)
                calls.append(None if math.isnan(call.p) else call)
            terms: list[dict[str, dict[int, Coefficient]]] = [{"a": {}, "b": {}} for _ in levels]
            parts: dict[str, Array] = {}
            for key, value in data.items():
                kind, *where = key.split(".")
                if kind in ("a", "b"):
                    i, j = map(int, where)
                    terms[i][kind][j] = float(value) if value.ndim == 0 else value
                elif kind == "basis":
                    parts[where[0]] = value
            rows = tuple(
                Row(
                    dict(sorted(term["a"].items())),
                    dict(sorted(term["b"].items())),
                    int(o),
                    bool(e),
                )
                for term, (o, e) in zip(terms, data["rows"], strict=False)
            )
            integer, prior, given, raw = data["scalars"]
            keep = tuple(int(k) for k in data["keep"])
            basis = None
            if "basis" in meta:
                from ._basis import basis_from

                basis = basis_from(meta["basis"], parts)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"path = {str(path)!r} says it is a plan but lacks or garbles {error}; save again"
            ) from error
        return cls(
            levels,
            rows,
            tuple(calls),
            bool(integer),
            float(prior),
            about,
            int(given),
            keep,
            basis,
            bool(raw),
        )


@dataclass(frozen=True, eq=False)
class State:
    """A run of a plan, before call number `nfe` + 1: a value that `advance` never changes.

    index: the state that the network is asked about next; the last state once `done`.
    states, outputs: the X[j] and D[j] that it and later rows need, in the coordinates of the rows.
    """

    plan: Plan
    index: int
    states: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]

    @cached_property
    def x(self) -> Tensor:
        """The newest state; the sample once `done`."""
        return self._image(self.index)

    def _image(self, j: int) -> Tensor:
        return self.plan._image(self.states[j], self.plan.levels[j].alpha)

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """Once `done`: what `plan.inverse()` starts from: the sample, and the kept states."""
        if not self.done:
            raise ValueError("state: the run is not done; it has no ends yet")
        return (self.x, *(self._image(j) for j in self.plan.keep))

    @property
    def done(self) -> bool:
        """Whether all rows have been taken."""
        return self.index == len(self.plan.levels) - 1

    @property
    def level(self) -> Level:
        """Noise level of `x`."""
        return self.plan.levels[self.index]

    @property
    def nfe(self) -> int:
        """Network evaluations spent so far."""
        return sum(call is not None for call in self.plan.calls[: self.index])

    def _call(self) -> Call:
        call = self.plan.calls[self.index]
        if call is None:
            raise ValueError("state: the run is done; there is nothing left to ask")
        return call

    def query(self) -> tuple[Tensor, Tensor]:
        """What to ask the network: its input c_in x, and its time c_noise for every sample
        (int64 for integer times, else the state's dtype: never below float32)."""
        call, x = self._call(), self.x
        dtype = torch.int64 if self.plan.integer_times else x.dtype
        value = round(call.c_noise) if self.plan.integer_times else call.c_noise
        t_in = x.new_full((x.shape[0],), value, dtype=dtype)
        return (x if call.c_in == 1 else x * call.c_in), t_in

    def data(self, output: Tensor) -> Tensor:
        """The data prediction that this answer to `query` means: D = p x + q out."""
        call, x = self._call(), self.x
        check_output(output, x)
        return combine([(call.p, x), (call.q, output)], x.dtype)

    def advance(self, output: Tensor, hook: Hook | None = None) -> State:
        """The state after the network's answer to `query`. hook: corrects the data prediction."""
        plan, i = self.plan, self.index
        call = self._call()
        if not plan.raw:
            value = self.data(output)
            if hook is not None:
                value = hook(value, plan.asked(i))
                check_output(value, output)
            value = plan._modes(value, 1.0)
        elif hook is not None:
            raise ValueError("hook: a fused plan has no data predictions; use the plan unfused")
        else:
            x = self.x
            check_output(output, x)
            value = output
            # An answer in half precision that several rows need is widened once, not by each.
            if plan.basis is not None or plan._last_use[1].get(i, 0) > i + 1:
                value = output.to(x.dtype)
            value = plan._modes(value, (1 - call.p * plan.levels[i].alpha) / call.q)
        return plan._walk(dict(self.states), {**self.outputs, i: value}, i)


def _show(c: Coefficient) -> str:
    if isinstance(c, float):
        return f"{c:+.5g}"
    return f"[{np.min(c):+.3g}..{np.max(c):+.3g}]{list(np.shape(c))}"
