r"""DPM-Solver-v3: an exponential multistep method that knows statistics of the model.

With y = x / alpha, D the data prediction and tables l, s, b over lambda (`EMS`), one number or one
per coordinate, the ODE dy / dlambda = D - y is

    dy / dlambda = -l y - f,     f = (1 - l) y - D,     df / dlambda = s f + b + (what is left)

l is chosen so that f depends little on y, s and b so that what is left is small. With L, S the
integrals of l and s, everything relative to the start s of a step,

    y_t = e^(L_s - L_t) y_s - int_s^t e^(L_u - L_t + S_u - S_s) (g_u + B_u) du
    g_j = e^(S_s - S_j) f_j - B_j,     B_j = int_s^j e^(S_s - S_u) b du

and g is replaced by the polynomial in lambda through the newest `order` nodes. It is linear in past
states and data predictions, so it is a row, with a constant where b is not 0. l = 1, s = b = 0 is
`exponential(order)`, l = 0, s = -1, b = 0 its noise form.

Source: DPM-Solver-v3, arXiv 2310.13268, equation 9, algorithm 1 and appendix; and its official
code, which the paper does not agree with everywhere:

    pseudo     derivatives of g are k! times the divided differences of the newest k + 1 nodes. From
               three nodes on that is not the polynomial, and the order is 2, whatever their number.
    corrector  once the network has been called at the new state, the step is taken again with that
               node as one more (`corrector_pseudo`), or in place of the oldest. The next step
               starts from the corrected state; f stays what it is at the evaluated one.
    half       the code corrects where t is above a threshold, the paper says below: "above" and
               "below".

Statistics are linear in lambda between the values of the table, and hold their first and last value
outside it. Any lambda can be a node: the integrals of rule = "exact" are Gauss-Legendre sums on
every cell of the table, to rounding. rule = "trapezoid" takes the values at the table's lambda and
at the ends of the step, which is what the official code does, whose nodes are values of the table.

Ends. Start-up orders 1, 2, ...; nodes at alpha = 0 are dropped, and steps from or to alpha = 0 are
DDIM. At sigma = 0 the closed form has a limit, which is taken. Tables end before: D at the table's
last lambda, as the formula has it there, is the result (a step from beyond has x = alpha_t D_s).
The formula is of order 1 there in the coordinates in which f does not decay on the way, since
polynomials in lambda have no limit.
Upward, from data to noise, formulas are the same with h < 0. As in `exponential`, coordinates in
which a row would amplify errors by more than growth 2^p take fewer nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._calibrate._ems import EMS
from .._prediction import unknown
from .._process import Array, Level, Process
from .._weights import weights
from ._base import Formula, Multistep

__all__ = ["dpm_solver_v3"]

_CORRECTORS = ("none", "full", "above", "below")
_SOURCE = "DPM-Solver-v3, 2310.13268, algorithm 1"
_STD = 0.5  # of the closed form: what data scaled to [-1, 1] have, about
_BLOCK = 1 << 22  # numbers in one array of a sum
_FAR = 60.0  # exp(-60) is nothing beside 1 in float64


def dpm_solver_v3(
    ems: EMS | None = None,
    order: int = 3,
    *,
    pseudo: bool = False,
    corrector: Literal["none", "full", "above", "below"] = "full",
    corrector_pseudo: bool = False,
    threshold: float = 0.5,
    lower_final: bool = True,
    rule: Literal["exact", "trapezoid"] = "exact",
    growth: float = 1.5,
    name: str | None = None,
    source: str = _SOURCE,
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """DPM-Solver-v3 with the statistics `ems`, 1 NFE per step.

    ems: statistics of the model; their size broadcasts against a sample. None: those of data
        N(0, 0.5^2) in closed form, which needs no calibration.
    order: number of nodes. The authors take 3, and 2 under guidance.
    pseudo: derivatives by divided differences alone; the authors do at 5 NFE and fewer.
    corrector: "full" corrects every state but the last with the evaluation made there, "none" no
        state, "above" and "below" those at times t > threshold, t <= threshold (in the process's
        own units). corrector_pseudo: divided differences with one node more; the authors do for
        latent and for guided models. Without it a corrector of order 1 has nothing to correct.
    lower_final: last steps use at most as many nodes as there are steps left.
    rule: "trapezoid" for the arithmetic of the official code.
    growth: as in `exponential`; math.inf for the official code, which has no such limit.
    The defaults are what the authors do on unguided pixels from 6 NFE on.
    """
    if ems is not None and not isinstance(ems, EMS):
        raise ValueError(f"ems = {type(ems).__name__}; need statistics (fewstep.EMS) or None")
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 4:
        raise ValueError(f"order = {order!r}; need an integer from 1 to 4")
    if corrector not in _CORRECTORS:
        raise ValueError(unknown("corrector", corrector, _CORRECTORS))
    if rule not in _RULES:
        raise ValueError(unknown("rule", rule, tuple(_RULES)))
    if rule == "trapezoid" and ems is None:
        raise ValueError("rule = 'trapezoid' without ems; there is no table to take it on")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold = {threshold}; need a finite time")
    if not growth > 0:
        raise ValueError(f"growth = {growth}; need a positive number (math.inf for no limit)")
    knows = _Normal(_STD) if ems is None else _Table(ems, rule)
    step = _V3(knows, pseudo, corrector, corrector_pseudo, float(threshold), rule, growth)
    corrected = corrector != "none" and (corrector_pseudo or order > 1)
    plain = min(order, 2) if pseudo else order
    if corrected:
        better = 2 if corrector_pseudo else order
        reached = better if corrector == "full" else min(better, plain)
    else:
        reached = plain
    special = ["pseudo"] * pseudo
    if corrected:
        special.append(f"{'pseudo ' * corrector_pseudo}corrector")
        if corrector != "full":
            special[-1] += f" {corrector} t = {threshold:g}"
    special += ["lower final"] * lower_final + [rule] * (rule != "exact")
    special += [f"growth {growth:g}"] * (growth != 1.5)
    what = "Gaussian" if ems is None else f"table of {len(ems.lam)}, size {list(ems.size)}"
    ends = "start-up orders 1, 2, ...; at sigma = 0 "
    ends += "the limit of the formula" if ems is None else "the data prediction at the table's end"
    if order > 1 and growth < math.inf:
        ends += "; coordinates whose row would amplify errors take fewer nodes"
    if lower_final:
        ends += "; last steps of order 1, 2, ... from the end"
    return Multistep(
        name=name or f"dpm_solver_v3({', '.join([str(order), *special, what])})",
        order=reached,
        step=step,
        source=source,
        ends=ends,
        nodes=order,
        lower_final=lower_final,
        corrector=step.correct if corrected else None,
        aliases=aliases,
    )


# -- statistics ------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """A sum on a cell [0, 1]: points, weights, and the matrix that integrates from 0 to the points
    what has given values there."""

    x: Array
    w: Array
    within: Array


def _gauss(count: int) -> _Rule:
    x, w = np.polynomial.legendre.leggauss(count)
    k = np.arange(count)
    # Integrals of Legendre polynomials from -1, times those that project on them.
    P = np.polynomial.legendre.legvander(x, count)
    integral = np.array([P[:, 1] + 1, *((P[:, j + 1] - P[:, j - 1]) / (2 * j + 1) for j in k[1:])])
    project = (2 * k[:, None] + 1) / 2 * P[:, :count].T * w
    return _Rule(0.5 * (x + 1), 0.5 * w, 0.5 * integral.T @ project)


_RULES = {
    "exact": _gauss(8),
    "trapezoid": _Rule(np.array([0.0, 1.0]), np.full(2, 0.5), np.array([[0.0, 0.0], [0.5, 0.5]])),
}


class _At(NamedTuple):
    """l, and the integrals L and S, at one lambda: (size,) each, or numbers."""

    l: Any
    L: Any
    S: Any


def _kept(knows: _Normal | _Table) -> Callable[[float, float, float], _Moments]:
    """`_moments` with the last ones kept: a predictor, its corrector and the steps that look back
    over it integrate over the same step."""
    return lru_cache(maxsize=4)(partial(_moments, knows))


class _Inside(NamedTuple):
    """L + S, and where b is not 0 also S and b, at the points of a rule on every cell: (cells,
    points, coordinates)."""

    both: Array
    S: Any = None
    b: Any = None


class _Normal:
    """Statistics of data N(0, std^2): l = 1 / (1 + std^2 e^(2 lambda)), s = l - 1, b = 0."""

    shape: tuple[int, ...] = ()
    last = math.inf
    shifts = False
    rule = _RULES["exact"]

    def __init__(self, std: float) -> None:
        self.twice = 2 * math.log(std)
        self.moments = _kept(self)

    def _L(self, lam: Any) -> Any:
        return -0.5 * np.logaddexp(-2 * lam, self.twice)

    def at(self, lam: float) -> _At:
        L = self._L(lam)
        return _At(math.exp(2 * (L - lam)) if lam < math.inf else 0.0, L, L - lam)

    def edges(self, low: float, high: float) -> Array:
        high = min(high, low + _FAR + abs(low))
        return np.linspace(low, high, math.ceil(2 * (high - low)) + 1)

    def inside(self, edges: Array) -> _Inside:
        lam = (edges[:-1, None] + np.diff(edges)[:, None] * self.rule.x)[..., None]
        return _Inside(2 * self._L(lam) - lam)


class _Table:
    """Statistics between the values of a table, linear in lambda; constant outside it."""

    def __init__(self, ems: EMS, rule: str) -> None:
        self.shape, self.last, self.rule = ems.size, float(ems.lam[-1]), _RULES[rule]
        self.lam, n = ems.lam, len(ems.lam)
        self.l, self.s, self.b = (v.reshape(n, -1) for v in (ems.l, ems.s, ems.b))
        self.shifts = bool(self.b.any())
        self.L, self.S = map(self._integral, (self.l, self.s))
        self.most: Array | None = None
        if rule == "exact":
            # Cells are cut where exponents move by more than the sum takes to rounding.
            size = np.abs(self.l).max(1) + np.abs(self.s).max(1) + 1
            size = np.maximum(size[1:], size[:-1])
            fine = bool((np.diff(self.lam) * size).max() <= 0.1)
            most = 0.1 if fine else 0.25 if self.shifts else 1.0
            self.rule = _gauss(4) if fine else self.rule
            self.most = most / np.concatenate([size[:1], size, size[-1:]])
        self.moments = _kept(self)

    def _integral(self, v: Array) -> Array:
        parts = 0.5 * (v[1:] + v[:-1]) * np.diff(self.lam)[:, None]
        return np.concatenate([np.zeros_like(v[:1]), np.cumsum(parts, 0)])

    def at(self, lam: float) -> _At:
        left, right, way, width = (v[0] for v in self._cells(np.array([lam])))
        l, s = self.l[left], self.s[left]
        rise, turn = (v[right] - v[left] for v in (self.l, self.s))
        half = 0.5 * way / width
        L = self.L[left] + way * (l + half * rise)
        return _At(l + 2 * half * rise, L, self.S[left] + way * (s + half * turn))

    def edges(self, low: float, high: float) -> Array:
        here = self.lam[(self.lam > low) & (self.lam < high)]
        edges = np.concatenate([[low], here, [high]])
        if self.most is None:
            return edges
        widths = np.diff(edges)
        cell = np.searchsorted(self.lam, edges[:-1], side="right")
        parts = np.ceil(widths / self.most[cell]).astype(int)
        k = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        cut = np.repeat(edges[:-1], parts) + k * np.repeat(widths / parts, parts)
        return np.append(cut, high)

    def _cells(self, lam: Array) -> tuple[NDArray[Any], NDArray[Any], Array, Array]:
        """The values of the table on either side (the same one outside it), the way from the left
        one, and between them."""
        cell = np.searchsorted(self.lam, lam, side="right") - 1
        left, right = np.maximum(cell, 0), np.minimum(cell + 1, len(self.lam) - 1)
        width = self.lam[right] - self.lam[left]
        return left, right, lam - self.lam[left], np.where(width > 0, width, 1.0)

    def inside(self, edges: Array) -> _Inside:
        left, right, way, width = self._cells(edges[:-1])
        delta = (way[:, None] + np.diff(edges)[:, None] * self.rule.x)[..., None]

        def line(first: Array, last: Array) -> tuple[Array, Array]:
            return first[:, None], ((last - first) / width[:, None])[:, None]

        def primitive(value: Array, slope: Array, before: Array) -> Array:
            out = 0.5 * slope * delta
            out += value
            out *= delta
            out += before[:, None]
            return out

        l, s, L, S = self.l, self.s, self.L[left], self.S[left]
        both = primitive(*line(l[left] + s[left], l[right] + s[right]), L + S)
        if not self.shifts:
            return _Inside(both)
        value, slope = line(self.b[left], self.b[right])
        return _Inside(both, primitive(*line(s[left], s[right]), S), value + slope * delta)


# -- rows ------------------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """Over a step, with delta = lambda - lambda_start: int K delta^k, k = 0 to 3; int K B; and B at
    the end. Axes (k, coordinates)."""

    powers: Array
    drift: Any
    B: Any


def _moments(knows: _Normal | _Table, start: float, end: float, scale: float) -> _Moments:
    """Moments with K = exp(L_u - L_end + S_u - S_start + scale)."""
    x, w, within = knows.rule
    base, shift = knows.at(end).L + knows.at(start).S - scale, knows.at(start).S
    edges = knows.edges(min(start, end), max(start, end))
    block = max(1, _BLOCK // (max(1, math.prod(knows.shape)) * len(x)))
    powers, drift, B = np.zeros((4, 1)), np.zeros(1), np.zeros(1)
    for i in range(0, len(edges) - 1, block):
        part = edges[i : i + block + 1]
        widths = np.diff(part)
        exponent, S, b = knows.inside(part)
        exponent -= base
        K = np.exp(exponent, out=exponent)
        K *= (widths[:, None] * w)[..., None]
        delta = (part[:-1, None] + widths[:, None] * x).ravel() - start
        powers = powers + np.vander(delta, 4, increasing=True).T @ K.reshape(len(delta), -1)
        if S is not None:
            S -= shift
            rate = np.exp(np.negative(S, out=S), out=S)
            rate *= b
            rate *= widths[:, None, None]
            steps = np.einsum("q,kqd->kd", w, rate)
            inner = np.matmul(within, rate)
            inner += (B + np.cumsum(steps, 0) - steps)[:, None]
            drift = drift + np.einsum("kpd,kpd->d", K, inner)
            B = B + steps.sum(0)
    if end < start:  # B was counted from the end; it is 0 at the start
        return _Moments(-powers, B * powers[0] - drift, -B)
    return _Moments(powers, drift, B)


@dataclass(frozen=True, eq=False)
class _V3:
    """The coefficient function: process, history (newest first), target -> row."""

    knows: _Normal | _Table
    pseudo: bool
    corrector: str
    corrector_pseudo: bool
    threshold: float
    rule: str
    growth: float

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        return self._formula(history, end, history, self.pseudo)

    def correct(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        """The same step with the target as the second node. None from alpha = 0, on the other side
        of the threshold, and where there are no two nodes."""
        side = self.corrector == "full" or (end.t > self.threshold) == (self.corrector == "above")
        nodes = [history[1], history[0], *history[2:]]
        nodes = nodes if self.corrector_pseudo else nodes[:-1]
        if history[1].alpha == 0 or not side or len(nodes) < 2:
            return None
        return self._formula(history, end, nodes, self.corrector_pseudo)

    def _formula(
        self, history: Sequence[Level], end: Level, nodes: Sequence[Level], pseudo: bool
    ) -> Formula:
        """A step from nodes[0] to the end through the nodes, over the history."""
        knows, start = self.knows, nodes[0]
        a: list[Any] = [0.0] * len(history)
        b: list[Any] = [0.0] * len(history)
        at = history.index(start)
        if start.alpha == 0 or end.alpha == 0:  # DDIM
            a[at] = end.sigma / start.sigma
            b[at] = float(weights("data", "lambda", start, end, [start])[0])
            return Formula(a, b, 1)
        if end.sigma == 0 and start.lam >= knows.last:
            b[at] = end.alpha
            return Formula(a, b, 1)
        nodes = [node for node in nodes if math.isfinite(node.lam)]
        keep, W, c, order = self._weights(nodes, end, pseudo)
        keep = keep / start.alpha
        a[at] = keep
        for node, w in zip(nodes, W, strict=True):
            k = history.index(node)
            a[k] = a[k] - w * ((1 - knows.at(node.lam).l) / node.alpha)
            b[k] = w
        a, b = [self._shaped(v) for v in a], [self._shaped(v) for v in b]
        c = self._shaped(c) if knows.shifts else 0.0
        return Formula(a, b, order, False, self._shaped(keep), c=c)

    def _shaped(self, v: Any) -> Any:
        """Coordinates in the shape of the statistics; a number stays one."""
        shape = self.knows.shape
        size = math.prod(shape)
        return np.broadcast_to(v, size).reshape(shape) if shape else float(np.ravel(v)[0])

    def _weights(
        self, nodes: Sequence[Level], end: Level, pseudo: bool
    ) -> tuple[Any, list[Any], Any, int]:
        """alpha_t y_t = keep y_s - sum_j w_j f_j + c for a step from nodes[0] through the nodes:
        keep, the w, c, and the least order in any coordinate."""
        knows, scale = self.knows, math.log(end.alpha)
        lam = [node.lam for node in nodes]
        to = min(end.lam, knows.last) if end.sigma == 0 else end.lam
        here, there = knows.at(lam[0]), knows.at(to)
        keep = np.exp(here.L - there.L + scale)
        # Newton's basis through the nodes, or powers, as polynomials in delta.
        basis = np.zeros((len(lam), 4))
        basis[0, 0] = 1.0
        for k in range(1, len(lam)):
            basis[k] = np.roll(basis[k - 1], 1)
            if not pseudo:
                basis[k] -= (lam[k - 1] - lam[0]) * basis[k - 1]
        powers, drift, B = knows.moments(lam[0], to, scale)
        J = basis @ powers
        calm = np.ones(J.shape[-1], dtype=bool)
        if end.sigma == 0 and to < end.lam:
            # From y and f at the table's end: D = (1 - l) y - f.
            share, tail = 1 - there.l, np.exp(there.S - here.S + scale)
            J = share * J + tail * (basis @ (to - lam[0]) ** np.arange(4))[:, None]
            keep, drift = share * keep, share * drift + tail * B
            calm = np.broadcast_to(there.S < here.S, calm.shape)
        W, order = self._through(lam, J, calm)
        c = -drift
        if knows.shifts:
            c = c + sum(w * v for w, v in zip(W, self._offsets(nodes, end), strict=True))
        W = [w * np.exp(here.S - knows.at(v).S) for w, v in zip(W, lam, strict=True)]
        return keep, W, c, min(order, 2) if pseudo else order

    def _offsets(self, nodes: Sequence[Level], end: Level) -> list[Any]:
        """B at the nodes, from the integrals of the steps between them."""
        knows, start = self.knows, nodes[0]
        S, behind, total, out = knows.at(start.lam).S, start, 0.0, [0.0]
        for node in nodes[1:]:
            if node is end:
                out.append(knows.moments(start.lam, end.lam, math.log(end.alpha)).B)
                continue
            part = knows.moments(node.lam, behind.lam, math.log(behind.alpha)).B
            total = total - np.exp(S - knows.at(node.lam).S) * part
            out.append(total)
            behind = node
        return out

    def _through(
        self, lam: Sequence[float], J: Array, calm: NDArray[np.bool_]
    ) -> tuple[list[Any], int]:
        """The weight of g at every node, in every coordinate through as many as do not amplify
        errors (one where not `calm`), and the least number of these."""
        W, order = np.zeros_like(J), len(lam)
        left = np.ones(J.shape[-1], dtype=bool)
        for p in range(len(lam), 0, -1):
            trial = np.zeros_like(J)
            for k in range(p):  # divided differences of the first k + 1 nodes
                for j in range(k + 1):
                    others = math.prod(lam[j] - lam[m] for m in range(k + 1) if m != j)
                    trial[j] += J[k] / others
            good = calm & (np.abs(trial).sum(0) <= self.growth * 2**p * np.abs(J[0]))
            take = left & (good | (p == 1))
            W[:, take] = trial[:, take]
            left &= ~take
            if not left.any():
                break
            order = p - 1
        return list(W), order
