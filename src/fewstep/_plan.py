"""Plans: a sampler as data, and the state that walks it.

A plan is a lower-triangular linear program over past states and past data predictions,

    X[k] = sum_j a[k,j] X[j] + sum_j b[k,j] D[j] + sum_m e[k,m] Z[m] + c[k]      (j < k)
    D[j] = p[j] X[j] + q[j] out[j]

with Z[m] independent standard normals (none for a deterministic method), and constants c (none but
where a method knows something about the data),

with the level (t, alpha, sigma, lambda) of every state and, for the states at which the network is
called, the four scalars of its prediction. It is computed once, on the host, in float64. A plan
never calls a network; it is driven from outside:

    state = plan.start(x)                      # noise=..., if rows draw any
    while not state.done:
        x_in, t_in = state.query()
        state = state.advance(network(x_in, t_in))
    sample = state.x

States are values: nothing here changes after it is made, so runs can be interleaved, shared
between threads, stopped and continued.

With a basis B and a mean mu, rows act on the modes B (X - alpha mu) and B (D - mu), and their
coefficients may be arrays, one number per mode. Levels may be arrays too, one per sample, token or
frame, and coefficients then are (`stacked`). A plan is `raw` when its rows combine network
outputs instead of data predictions (`Plan.fuse`). It may start from several states (`given`) and
hand over several at its end (`keep`): what reversible methods need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._combine import combine, plus, uploaded
from ._denoiser import check_output
from ._noise import Draw, Noise, Source, as_source
from ._process import Array, Level

if TYPE_CHECKING:
    from ._analysis import ErrorConstant, Stability
    from ._basis import Basis
    from ._sampling import Origin
    from ._transition import Transition

__all__ = ["Call", "Coefficient", "Hook", "Plan", "Row", "State", "shown"]

#: A coefficient: a float, or an array that broadcasts against one sample (or its modes).
Coefficient = float | Array
#: A correction of the data prediction at a level, before it enters any row: hook(D, level) -> D.
Hook = Callable[[Tensor, Level], Tensor]

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
    predictions, by index; the order of this row; whether it reproduces constant data and constant
    noise exactly (`exact`; with draws: constant data and the process's variance) or only to its
    order; coefficients `e` of the plan's draws; and a constant `c`, the same for every sample. A
    row with a constant is not exact: it does not map every constant data to itself."""

    a: Mapping[int, Coefficient]
    b: Mapping[int, Coefficient]
    order: int
    exact: bool = True
    e: Mapping[int, Coefficient] = field(default_factory=dict)
    c: Coefficient = 0.0

    def __post_init__(self) -> None:
        # One order of terms, newest first, whatever made the row: sums have the same bits then.
        for name in ("a", "b", "e"):
            terms = getattr(self, name)
            object.__setattr__(self, name, dict(sorted(terms.items(), reverse=True)))

    @property
    def coefficients(self) -> tuple[Coefficient, ...]:
        """All of them, and the constant if there is one."""
        c = (self.c,) if self.shifts else ()
        return (*self.a.values(), *self.b.values(), *self.e.values(), *c)

    @property
    def shifts(self) -> bool:
        """Whether it adds a constant."""
        return bool(np.any(np.asarray(self.c) != 0))


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
    draws: the standard normals that rows use, each by its place in time.
    axis: where levels are arrays, the axis of the state that they run along, counted from its end.
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
    draws: tuple[Draw, ...] = ()
    axis: int | None = None
    origin: Origin | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = len(self.rows)
        if n < 1 or self.given < 1 or not len(self.levels) == len(self.calls) == n + self.given:
            raise ValueError(
                f"plan: {n} rows, {len(self.levels)} levels, {len(self.calls)} calls, "
                f"{self.given} given; n >= 1 rows need n + given levels and n + given calls"
            )
        scalars = [(c.p, c.q, c.c_in, c.c_noise) for c in self.calls if c is not None]
        for numbers in (*scalars, *(row.coefficients for row in self.rows)):
            for c in numbers:
                if isinstance(c, np.ndarray):
                    c.setflags(write=False)  # so that it is uploaded once, not at every step
        if self.calls[-1] is not None:
            raise ValueError("plan: the last state must not be evaluated")
        if self.integer_times:
            for call in self.calls:
                if call is not None and np.any(call.c_noise != np.round(call.c_noise)):
                    raise ValueError(
                        f"plan: the network is told integers, but an evaluation is at time "
                        f"{call.c_noise}"
                    )
        inside = self._inside() if self.draws else None
        for i, row in enumerate(self.rows):
            self._check_row(i, row, inside)

    def _check_row(self, i: int, row: Row, inside: list[Array] | None) -> None:
        problem, made = "", self.given + i
        if not all(np.isfinite(c).all() for c in row.coefficients):
            problem = "has a coefficient that is not finite"
        elif any(not 0 <= j < made for j in (*row.a, *row.b)):
            problem = "uses a state that does not exist yet"
        elif any(self.calls[j] is None for j in row.b):
            problem = "uses a data prediction of a state that is not evaluated"
        elif any(not 0 <= m < len(self.draws) for m in row.e):
            problem = "uses a draw that the plan does not have"
        elif not row.a and not row.b:
            problem = "has no terms"
        elif len(row.coefficients) == len(row.a) == 1 and np.all(row.coefficients[0] == 1):
            problem = "copies a state: the step would do nothing"
        elif row.exact and row.shifts:
            problem = "adds a constant, so it does not reproduce constant data: exact is False"
        elif row.exact:
            data, noise, size = self._consistency(made, row, inside)
            if not (abs(data) <= _TOLERANCE * size and abs(noise) <= _TOLERANCE * size):
                what = "sum a sigma" if inside is None else "standard deviation"
                problem = (
                    "does not reproduce constant data and noise: sum a alpha + sum b - alpha = "
                    f"{data:.3g}, {what} - sigma = {noise:.3g}"
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
            b[j] = _over(c, call.q)
            a[j] = a.get(j, 0.0) - b[j] * call.p
        return Row(a, b, row.order, row.exact, row.e, row.c)

    def _inside(self) -> list[Array]:
        """What is noise in every state when all data predictions are constant, as coefficients over
        the noise at the start and the draws (first axis), scaled to the state's own sigma."""
        sizes = [np.shape(level.sigma) for level in self.levels]
        sizes += [np.shape(c) for row in self.rows for c in row.coefficients]
        shape = np.broadcast_shapes(*sizes)
        out: list[Array] = []

        def scaled(v: Array, level: Level) -> Array:
            norm = np.sqrt((v * v).sum(0))
            return v * np.where(norm > 0, level.sigma / np.where(norm > 0, norm, 1.0), 0.0)

        for k, level in enumerate(self.levels):
            v = np.zeros((1 + len(self.draws), *shape))
            v[0] = level.sigma
            if k >= self.given:
                v = self._noise_of(self.data_row(self.rows[k - self.given]), out, v.shape)
            out.append(scaled(v, level))
        return out

    @staticmethod
    def _noise_of(row: Row, inside: Sequence[Array], shape: tuple[int, ...]) -> Array:
        parts = [c * inside[j] for j, c in row.a.items() if j < len(inside)]
        v = np.array(np.broadcast_to(sum(parts, np.zeros(shape)), shape))
        for m, c in row.e.items():
            if 0 <= m < len(v) - 1:
                v[1 + m] += c
        return v

    def _consistency(
        self, made: int, row: Row, inside: list[Array] | None
    ) -> tuple[float, float, float]:
        """Largest defects on constant data and on constant noise, and the size of the terms."""
        levels, end, row = self.levels, self.levels[made], self.data_row(row)
        data = sum((c * levels[j].alpha for j, c in row.a.items()), 0.0) + sum(row.b.values(), 0.0)
        if inside is None:
            noise = sum((c * levels[j].sigma for j, c in row.a.items()), 0.0)
        else:
            v = self._noise_of(row, inside, inside[0].shape)
            noise = np.sqrt((v * v).sum(0))
        size = np.maximum(
            sum(
                (np.max(np.abs(c)) * (levels[j].alpha + levels[j].sigma) for j, c in row.a.items()),
                0.0,
            )
            + sum(np.max(np.abs(c)) for c in row.b.values()),
            end.alpha + end.sigma,
        )

        def worst(defect: Any) -> float:
            return float(np.ravel(defect)[np.argmax(np.abs(defect))])

        return worst(data - end.alpha), worst(noise - end.sigma), float(np.min(size))

    @property
    def stochastic(self) -> bool:
        """Whether rows use draws."""
        return bool(self.draws)

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
    def _last_use(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """The last state that needs each state, each data prediction, and each draw."""
        states: dict[int, int] = dict.fromkeys(self.keep, len(self.levels))
        outputs: dict[int, int] = {}
        draws: dict[int, int] = {}
        for made, row in enumerate(self.rows, self.given):
            for j in row.a:
                states[j] = max(states.get(j, 0), made)
            outputs.update(dict.fromkeys(row.b, made))
            draws.update(dict.fromkeys(row.e, made))
        return states, outputs, draws

    def start(self, x: Tensor, *others: Tensor, noise: Any = 0) -> State:
        """The state before the first call. x: (batch, ...), noise of scale `prior_std` (or
        whatever the plan is to start from). Kept in float32, or float64 if x is. A plan that
        starts from several states takes them all, in order.

        noise: where draws come from, if rows use any: `fewstep.Noise` (or its seed), tensors of
            unit variance, one per draw in order, or a function of (draw, like)."""
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
        elif self.axis is None and not _fits(self._shape, tuple(x.shape[1:])):
            raise ValueError(
                f"x is {tuple(x.shape)}; this plan has coefficients of shape {self._shape}, which "
                "must broadcast against one sample"
            )
        if self.axis is not None and not -x.ndim <= self.axis < 0:
            raise ValueError(f"x has {x.ndim} axes; this plan has levels along axis {self.axis}")
        count = 1 if self.axis is None else np.size(self.levels[0].sigma)
        if self.axis is not None and x.shape[self.axis] != count:
            raise ValueError(
                f"x is {tuple(x.shape)}; this plan has {count} levels along axis {self.axis}"
            )
        source = as_source(noise) if self.draws else None
        if (
            isinstance(source, Noise)
            and source.path
            and any(np.ndim(v.t) or np.ndim(v.sigma) for z in self.draws for v in (z.start, z.end))
        ):
            raise ValueError(
                "noise = Noise(path=True) for a plan whose draws are at different levels along "
                f"axis {self.axis}, which no one path has; use Noise(path=False)"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        states = {
            i: self._modes(v.to(dtype), self.levels[i].alpha) for i, v in enumerate((x, *others))
        }
        return self._walk(states, {}, -1, source)

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
    def _schedule(self) -> list[tuple[Any, Any, Any, Any, list[int], list[int], list[int], bool]]:
        """For every state: the terms of its row, and its constant or None; the states, outputs and
        draws that nothing needs any more once it is made; and whether the run stops there for an
        evaluation."""
        state_use, output_use, draw_use = self._last_use
        last = len(self.levels) - 1
        out: list[tuple[Any, Any, Any, Any, list[int], list[int], list[int], bool]] = []
        kept: set[int] = set()
        held: set[int] = set()
        for k, call in enumerate(self.calls):
            a, b, e, c, gone, spent, used = (), (), (), None, [], [], []
            if k >= self.given:
                row = self.rows[k - self.given]
                a, b, e = (tuple(part.items()) for part in (row.a, row.b, row.e))
                c = row.c if row.shifts else None
                kept |= set(range(self.given)) if k == self.given else set()
                kept.add(k)
                gone = [j for j in kept if j < k and state_use.get(j, -1) <= k]
                spent = [j for j in held if output_use[j] <= k]
                used = [m for m in row.e if draw_use[m] == k]
            kept.difference_update(gone)
            held.difference_update(spent)
            if call is not None and k in output_use:
                held.add(k)
            out.append((a, b, e, c, gone, spent, used, call is not None or k == last))
        return out

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """What coefficients broadcast to: () if all are numbers."""
        return np.broadcast_shapes(*(np.shape(c) for row in self.rows for c in row.coefficients))

    @cached_property
    def _told(self) -> dict[int, Array]:
        """Of every call, the time of every level."""
        out: dict[int, Array] = {}
        for k, call in enumerate(self.calls):
            if call is not None:
                shape = np.shape(self.levels[k].sigma)
                out[k] = np.broadcast_to(call.c_noise, shape).flatten()
                out[k].setflags(write=False)
        return out

    def _walk(
        self,
        states: dict[int, Tensor],
        outputs: dict[int, Tensor],
        k: int,
        noise: Source | None = None,
        draws: dict[int, Tensor] | None = None,
    ) -> State:
        """From state k, which is done with, to the next that is to be evaluated, or the last."""
        schedule = self._schedule
        dtype = next(iter(states.values())).dtype
        draws = {} if draws is None else draws
        if k in outputs and k not in self._last_use[1]:
            del outputs[k]  # no row needs it
        while True:
            k += 1
            a, b, e, constant, gone, spent, used, stop = schedule[k]
            if a or b:
                terms = [(c, states[j]) for j, c in a]
                terms += [(c, outputs[j]) for j, c in b]
                for m, c in e:
                    if m not in draws:
                        like = next(iter(states.values()))
                        draws[m] = self._drawn(m, like, noise)
                    terms.append((c, draws[m]))
                states[k] = combine(terms, dtype)
                if constant is not None:
                    states[k] = plus(states[k], constant)
                for j in gone:
                    states.pop(j, None)
                for j in spent:
                    outputs.pop(j, None)
                for m in used:
                    del draws[m]
            if stop:
                # Past the checks that a frozen dataclass makes for every field: a tenth of a step.
                state = object.__new__(State)
                state.__dict__.update(
                    plan=self, index=k, states=states, outputs=outputs, noise=noise, draws=draws
                )
                if self.basis is None:
                    state.__dict__["x"] = states[k]
                return state

    def _drawn(self, m: int, like: Tensor, noise: Source | None) -> Tensor:
        """Draw number m, in the coordinates of the rows."""
        if noise is None:
            raise ValueError("noise is missing; this plan has draws: start it with plan.start")
        if self.basis is None:
            return noise.draw(self.draws[m], m, like)
        return self._modes(noise.draw(self.draws[m], m, self._image(like, 0.0)), 0.0)

    def _of_one(self, what: str) -> None:
        if self.axis is not None:
            raise ValueError(
                f"plan: {what} is not defined for a plan with levels along axis {self.axis}; ask "
                "the plans that it was stacked from"
            )

    def order(self) -> int:
        """The order of the whole run as its grid is refined, start-up and end included: the least
        of the orders of the bulk and of both ends, computed from the rows (`_analysis`)."""
        from ._analysis import order

        self._of_one("order")
        return order(self)

    def error_constant(self) -> ErrorConstant:
        """Leading constants of the local error, of every step and of equal small ones."""
        from ._analysis import error_constant

        self._of_one("error_constant")
        return error_constant(self)

    def stability(self) -> Stability:
        """Which stiffness every step is stable for: regions, largest values, and a plot."""
        from ._analysis import stability

        self._of_one("stability")
        return stability(self)

    def explain(self) -> str:
        """The formula in use, its source, order, stability, and its names in other code."""
        from ._analysis import explain

        self._of_one("explain")
        return explain(self)

    def plot(self, target: str | os.PathLike[str], *others: Plan) -> None:
        """Draw the plan to a picture file: nodes, steps and orders, when the network is asked and
        what it is told, the coefficients of every row, and regions of stability or what is drawn.
        With others: the nodes and steps of all of them, one below the other. Needs matplotlib."""
        from ._plan_picture import draw

        draw(self, target, *others)

    def fuse(self) -> Plan:
        """The same sampler with one linear combination after each network call."""
        from ._transform import fuse

        return fuse(self)

    @cached_property
    def cheapest(self) -> Plan:
        """This plan in the form whose run moves the least memory: what `sample` runs on a CPU."""
        from ._transform import cheapest

        return cheapest(self)

    @cached_property
    def _cheapest_elsewhere(self) -> Plan:
        from ._transform import cheapest

        return cheapest(self, one_pass=False)

    def cheapest_on(self, device: torch.device | str) -> Plan:
        """`cheapest`, for states on this device: other devices add one tensor at a time."""
        return self.cheapest if torch.device(device).type == "cpu" else self._cheapest_elsewhere

    def inverse(self) -> Plan:
        """The plan that undoes this one exactly, from the states it hands over at its end."""
        from ._transform import inverse

        self._of_one("inverse")
        return inverse(self)

    def canonical(self) -> tuple[Array, ...]:
        """(a, b): the state asked about at evaluation k (and the result, last) is
        a[k] x_start + sum_j b[k, j] D_j, with D_j the data prediction of evaluation j; a third
        table holds the coefficients of the draws, if there are any. If rows add constants, there
        are four tables: the third, of draws, may have no columns, and the fourth is the sum of
        constants. Two plans are the same method exactly when these tables and their evaluations
        agree."""
        from ._transform import canonical

        return canonical(self)

    def __str__(self) -> str:
        return self._text()

    def _text(self, mark: int | None = None) -> str:
        head = "  ".join(f"{k}: {v}" for k, v in self.about.items())
        lines = [head] if head else []
        symbol = "N" if self.raw else "D"
        noise = " + sum e Z" if self.draws else ""
        noise += " + c" if any(row.shifts for row in self.rows) else ""
        made = "X[i+1]" if self.given == 1 else f"X[i+{self.given}]"
        modes = "" if self.basis is None else f"; on the modes of {self.basis}"
        if self.axis is not None:
            modes += f"; {np.size(self.levels[0].sigma)} levels along axis {self.axis}"
        lines.append(
            f"NFE {self.nfe}, {len(self.rows)} rows; "
            f"{made} = sum a X + sum b {symbol}{noise}{modes}; "
            f"start: standard deviation {self.prior_std:g}"
        )
        w, v = (10, 8) if self.axis is None else (20, 16)  # ranges are wider
        title = f"{'row':>5} {'t':>{w}} {'sigma':>{w}} {'lambda':>{v}} {'h':>{v}} order  NFE"
        lines.append(f"{title}  coefficients")
        nfe = sum(call is not None for call in self.calls[: self.given - 1])
        for i, row in enumerate(self.rows):
            s, t = self.levels[self.given + i - 1], self.levels[self.given + i]
            nfe += self.calls[self.given + i - 1] is not None
            with np.errstate(invalid="ignore"):
                h = np.where(np.equal(t.lam, s.lam), 0.0, np.subtract(t.lam, s.lam))
            numbers = (
                f"{shown(s.t):>{w}} {shown(s.sigma):>{w}} {shown(s.lam, 4):>{v}} {shown(h, 4):>{v}}"
            )
            terms = [f"{_show(c)} X{j}" for j, c in sorted(row.a.items(), reverse=True)]
            terms += [f"{_show(c)} {symbol}{j}" for j, c in sorted(row.b.items(), reverse=True)]
            terms += [f"{_show(c)} Z{m}" for m, c in sorted(row.e.items(), reverse=True)]
            terms += [_show(row.c)] * row.shifts
            flag = ">" if mark == i else " "
            order = f"{row.order}{'' if row.exact else '~'}"
            lines.append(f"{flag}{i:>4} {numbers} {order:>5} {nfe:>4}  {' '.join(terms)}")
        t = self.levels[-1]
        lines.append(f"  end {shown(t.t):>{w}} {shown(t.sigma):>{w}} {shown(t.lam, 4):>{v}}")
        if any(not row.exact for row in self.rows):
            lines.append("~ reproduces constant data and noise only to its order, not exactly")
        return "\n".join(lines)

    def __repr__(self) -> str:
        name = self.about.get("solver", "plan")
        ends = (shown(self.levels[i].t) for i in (0, -1))
        return f"<Plan {name}: {self.nfe} NFE, t = {' to '.join(ends)}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        from ._files import plan_arrays

        mine, theirs = plan_arrays(self), plan_arrays(other)
        kinds = [b if b is None else b.kind for b in (self.basis, other.basis)]
        return (
            kinds[0] == kinds[1]
            and mine.keys() == theirs.keys()
            and all(np.array_equal(v, theirs[k], equal_nan=True) for k, v in mine.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> Any:
        from ._files import plan_from_bytes, plan_to_bytes

        return plan_from_bytes, (plan_to_bytes(self),)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, the description as metadata. Never leaves half a file."""
        from ._files import plan_to_bytes, write

        write(path, plan_to_bytes(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file written by `save`; the plan is checked as when it was built."""
        from ._files import plan_from_bytes, read

        return read(path, plan_from_bytes)


@dataclass(frozen=True, eq=False)
class State:
    """A run of a plan, before call number `nfe` + 1: a value that `advance` never changes.

    index: the state that the network is asked about next; the last state once `done`.
    states, outputs, draws: the X[j], D[j] and Z[m] that it and later rows need, in the coordinates
        of the rows. noise: where draws still to come are from.

    `a == b` compares plans, position, noise and tensors bit for bit; states are copied, pickled,
    saved and loaded whole, and go on with the same bits wherever that is done.
    """

    plan: Plan
    index: int
    states: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    noise: Source | None = None
    draws: Mapping[int, Tensor] = field(default_factory=dict)

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
        (int64 for integer times, else the state's dtype: never below float32). Where levels run
        along another axis than the batch, times are (batch, levels)."""
        call, x, axis = self._call(), self.x, self.plan.axis
        dtype = torch.int64 if self.plan.integer_times else x.dtype
        if axis is not None:
            t_in = uploaded(self.plan._told[self.index], x.device, dtype)
            if axis != -x.ndim:
                t_in = t_in.expand(x.shape[0], -1)
            return combine([(call.c_in, x)], x.dtype), t_in
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
        return self.plan._walk(*self._answered(output, hook), self.noise, dict(self.draws))

    def _answered(
        self, output: Tensor, hook: Hook | None
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], int]:
        """States and outputs with this answer among them."""
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
            # Half precision stays what it is: half as much to keep, and to read in every row.
            value = output
            if plan.basis is not None:
                shift = (1 - call.p * plan.levels[i].alpha) / call.q
                value = plan._modes(output.to(x.dtype), shift)
        return dict(self.states), {**self.outputs, i: value}, i

    def transition(self, output: Tensor, hook: Hook | None = None) -> Transition:
        """The normal law of the state that `advance(output, hook)` leads to, given all before it:
        mean, standard deviation, log-density."""
        from ._transition import transition

        return transition(self, output, hook)

    def replaced(self, x: Tensor) -> State:
        """This state with another `x`: a recorded one, an edited one. (batch, ...), as `x` is.

        Draws and data predictions that later rows still need stay as they are: to replay a record
        of a solver that shares draws between evaluations, record states, not only their x."""
        check_output(x, self.x)
        new = self.plan._modes(x.to(self.x.dtype), self.level.alpha)
        states = {**self.states, self.index: new}
        return State(self.plan, self.index, states, self.outputs, self.noise, self.draws)

    def edited(self, x: Tensor) -> State:
        """This state with an edit of `x` that the rest of the run keeps: a mask, a callback.

        `replaced` changes one state only, and a row that goes back to an older one (a corrector, a
        last stage) loses the edit. Here the states X[j] that later rows still need move with it
        along the noise, X[j] += sigma_j / sigma_i (x - X[i]). A row that reproduces constant noise
        exactly then moves by the edit, scaled to its own level; where a row only goes on from X[i],
        this is `replaced`."""
        check_output(x, self.x)
        sigma = self.level.sigma
        if len(self.states) == 1 or not np.all(np.asarray(sigma) > 0):
            return self.replaced(x)
        new = self.plan._modes(x.to(self.x.dtype), self.level.alpha)
        change = new - self.states[self.index]
        states = {
            j: combine([(1.0, v), (self.plan.levels[j].sigma / sigma, change)], v.dtype)
            for j, v in self.states.items()
        }
        states[self.index] = new
        return State(self.plan, self.index, states, self.outputs, self.noise, self.draws)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        if (self.index, self.noise) != (other.index, other.noise) or self.plan != other.plan:
            return False
        mine, theirs = ([v.states, v.outputs, v.draws] for v in (self, other))
        return all(
            a.keys() == b.keys() and all(_same(v, b[j]) for j, v in a.items())
            for a, b in zip(mine, theirs, strict=True)
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> Any:
        from ._files import state_from_bytes, state_to_bytes

        return state_from_bytes, (state_to_bytes(self), str(self.x.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: plan, tensors and noise. Never leaves half a file."""
        from ._files import state_to_bytes, write

        write(path, state_to_bytes(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Read a file written by `save`: the run goes on as if it had not stopped."""
        from ._files import read, state_from_bytes

        return read(path, lambda content: state_from_bytes(content, device))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit (NaN equals NaN), in type, shape and place."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    return bool(
        torch.equal(a, b) or torch.equal(a.isnan() | (a == b), torch.ones_like(a, dtype=torch.bool))
    )


def _fits(shape: tuple[int, ...], sample: tuple[int, ...]) -> bool:
    """Whether an array broadcasts against a sample without making it larger."""
    if not shape:
        return True
    pairs = zip(shape[::-1], sample[::-1], strict=False)
    return len(shape) <= len(sample) and all(n in (1, m) for n, m in pairs)


def _over(c: Coefficient, q: Coefficient) -> Coefficient:
    """c / q; 0 where both are: there the network is asked about a member that does not use it."""
    if not isinstance(q, np.ndarray):
        return c / q
    return np.where((q == 0) & (c == 0), 0.0, c / np.where((q == 0) & (c == 0), 1.0, q))


def shown(value: Any, digits: int = 5) -> str:
    """A number, or the range of an array, to some digits."""
    low, high = float(np.min(value)), float(np.max(value))
    text = f"{low:.{digits}g}"
    return text if low == high or np.size(value) == 1 else f"{text}..{high:.{digits}g}"


def _show(c: Coefficient) -> str:
    if isinstance(c, float):
        return f"{c:+.5g}"
    return f"[{np.min(c):+.3g}..{np.max(c):+.3g}]{list(np.shape(c))}"
