r"""The exponential multistep family: DDIM, DPM-Solver++, DEIS, Adams-Bashforth in any form.

One formula (notation and integrals in `_weights`):

    x_t = (N_t / N_s) x_s + sum_j W_j M_j,    W_j = N_t int_s^t ell_j(u) dzeta

with M one of D (data), e (noise), v or u (flow), and ell_j the Lagrange basis in lambda, t, rho or
the form's own variable through the newest `order` nodes. As a row,
M_j = x_coefficient x_j + D_coefficient D_j:

    data   (0, 1)                                      noise  (1/sigma, -alpha/sigma)
    v      (alpha/(sigma R), -R/sigma)                 flow   (1/sigma, -(alpha + sigma)/sigma)

Since sum_j W_j M_s alone is DDIM for data, noise and flow, rows are formed as DDIM plus
sum_{j != s} W_j (M_j - M_s): reproducing constant data and noise is then not left to rounding.
The v form is Euler or Adams in the angle; it reproduces constants only to its order.

Named deviations from the exact weights, all in lambda:

    second = "midpoint"   two nodes: the first moment int kernel delta is replaced by h/2 times the
                          zeroth ("dpmsolver" type of DPM-Solver, default of DPM-Solver++ 2M, and
                          B(h) = exp(h) - 1, "bh2", of UniPC).
    second = "bh1"        the same with B(h) = h: moment alpha_t h (data), -sigma_t h (noise).
    third = "shipped"     three nodes: the second-derivative term is halved. This is what DPM-Solver
                          and its copies ship as "3M"; it makes the method second order.

Uneven grids. Extrapolating over a step much longer than the ones before it amplifies every error
by sum |W_j| / |sum W_j|: at most 2^p for equal steps, hundreds after a sixfold step, which is how
uniform-t grids ruin high orders at their last step. Rows above growth 2^p use fewer nodes; the
plan's table shows the order each row has.

Corrector. Once the network has been called at the new state, the step is taken again with that M as
one more node (UniC, arXiv 2302.04867): x_t^C = (N_t/N_s) x_s^C + sum_j W_j M_j over s, t and the
older nodes, where M is taken at the predicted states. The next step starts from x_t^C. The paper's
B(h) cancels for three nodes or more; its "vary_coeff" variant is published with terms missing at
orders 2 and 3.

Ends. Start-up: orders 1, 2, 3, ... A node where the basis variable is infinite (alpha = 0 in lambda
or rho) is dropped. The step from alpha = 0 is DDIM (v: Euler in the angle), the limit of all forms.
The step to sigma = 0 uses the limit of the formula: in data form D extrapolated to the end in t or
rho, x = alpha_t D_s where the variable is infinite there (lambda, own: order 1); noise, v and flow
have finite integrals there in every variable, midpoint moments excepted (order 1). Upward, from
data to noise, the formulas are the same with h < 0; a step to alpha = 0 is DDIM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .._prediction import unknown
from .._process import Level, Process
from .._weights import FORMS, VARIABLES, scale, usable, weights
from ._base import Formula, Multistep

__all__ = ["Second", "exponential"]

Second = Literal["exact", "midpoint", "bh1"]


def exponential(
    order: int,
    *,
    form: str = "data",
    variable: str = "lambda",
    second: Second = "exact",
    third: Literal["exact", "shipped"] = "exact",
    growth: float = 1.5,
    corrector: bool = False,
    lower_final: bool = False,
    name: str | None = None,
    source: str = "exponential multistep: one formula, weights by quadrature",
    aliases: tuple[str, ...] = (),
) -> Multistep:
    """An exponential multistep solver of any order, 1 NFE per step.

    order: number of nodes. form: "data", "noise", "v", "flow". variable: "lambda", "t", "rho",
    "own". second, third: "midpoint", "bh1", "shipped": published approximations (in lambda).
    growth: a row of p nodes whose weights amplify by more than growth 2^p takes fewer nodes; 1.5
        leaves steps that alternate 1:3 alone. math.inf: as published, no limit.
    corrector: correct every state but the last with the evaluation made there (UniC): one order
        more, no evaluation more.
    lower_final: last steps use at most as many nodes as there are steps left.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order = {order!r}; need an integer >= 1")
    for argument, value, known in (
        ("form", form, FORMS),
        ("variable", variable, VARIABLES),
        ("second", second, ("exact", "midpoint", "bh1")),
        ("third", third, ("exact", "shipped")),
    ):
        if value not in known:
            raise ValueError(unknown(argument, value, known))
    if variable != "lambda" and (second, third) != ("exact", "exact"):
        raise ValueError(
            f"variable = {variable!r} with second = {second!r}, third = {third!r}; the published "
            "approximations exist for variable = 'lambda' only"
        )
    if third == "shipped" and order != 3:
        raise ValueError(f"third = 'shipped' with order = {order}; it is a variant of order 3")
    if second == "bh1" and form not in ("data", "noise"):
        raise ValueError(f"second = 'bh1' with form = {form!r}; it exists for data and noise")
    if corrector and third == "shipped":
        raise ValueError("third = 'shipped' with a corrector; no such method is published")
    if not growth > 0:
        raise ValueError(f"growth = {growth}; need a positive number (math.inf for no limit)")
    step = _Exponential(form, variable, second, third, growth)
    limit = "order 1" if step.first_at_clean else "the limit of the formula"
    ends = f"start-up orders 1, 2, ...; at sigma = 0 {limit}"
    if order > 1 and growth < math.inf:
        ends += "; rows that would amplify errors take fewer nodes"
    if lower_final:
        ends += "; last steps of order 1, 2, ... from the end"
    special = [f"{second} second"] * (second != "exact") + [f"{third} third"] * (third != "exact")
    special += ["corrector"] * corrector + ["lower final"] * lower_final
    special += [f"growth {growth:g}"] * (growth != 1.5)
    return Multistep(
        name=name or f"exponential({', '.join(map(str, [order, form, variable, *special]))})",
        order=2 if third == "shipped" else order + corrector,
        step=step,
        source=source,
        ends=ends,
        nodes=order,
        lower_final=lower_final,
        corrector=step.correct if corrector else None,
        aliases=aliases,
    )


@dataclass(frozen=True)
class _Exponential:
    """The coefficient function: process, history (newest first), target -> row."""

    form: str
    variable: str
    second: str
    third: str
    growth: float

    @property
    def first_at_clean(self) -> bool:
        return self.second != "exact" or (
            self.form == "data" and self.variable in ("lambda", "own")
        )

    def __call__(self, process: Process, history: Sequence[Level], end: Level) -> Formula:
        return self._formula(process, history, end, 0)

    def correct(self, process: Process, history: Sequence[Level], end: Level) -> Formula | None:
        """The same step with the target's own M as one more node: UniC. None from alpha = 0,
        where lambda has no place for the start."""
        if history[1].alpha == 0:
            return None
        return self._formula(process, history, end, 1)

    def _formula(self, process: Process, history: Sequence[Level], end: Level, at: int) -> Formula:
        """A step from history[at], through it and all other levels of the history."""
        start = history[at]
        others = [n for n in history if n is not start and usable(self.form, self.variable, n)]
        if start.alpha == 0 or end.alpha == 0 or (end.sigma == 0 and self._first_only(end)):
            others = []
        nodes = [start, *others]
        a, b = [0.0] * len(history), [0.0] * len(history)
        base = scale(self.form, end) / scale(self.form, start) if start.alpha else None
        if self.form == "v":
            first = float(weights("v", self.variable, start, end, [start])[0])
            a[at], b[at] = _add(scale("v", end) / scale("v", start), 0.0, first, "v", start)
        else:  # DDIM
            a[at] = end.sigma / start.sigma
            b[at] = float(weights("data", self.variable, start, end, [start])[0])

        def weigh(nodes: Sequence[Level]) -> list[float]:
            W = list(weights(self.form, self.variable, start, end, nodes, process))
            self._approximate(W, start, end, nodes)
            return W

        count = self._through(weigh, nodes, history, at, a, b)
        order = 2 if count == 3 and self.third == "shipped" else count
        return Formula(a, b, order, self.form != "v", base)

    def _through(
        self,
        weigh: Callable[[Sequence[Level]], list[float]],
        nodes: Sequence[Level],
        history: Sequence[Level],
        at: int,
        a: list[float],
        b: list[float],
    ) -> int:
        """Add sum W_j (M_j - M_s) to a row from nodes[0] = history[at], through as many of the
        nodes as do not amplify errors; how many that are."""
        for count in range(len(nodes), 1, -1):
            W = weigh(nodes[:count])
            if sum(map(abs, W)) > self.growth * 2**count * abs(sum(W)):
                continue
            for node, w in zip(nodes[1:count], W[1:], strict=True):
                k = history.index(node)
                a[k], b[k] = _add(0.0, 0.0, w, self.form, node)
                a[at], b[at] = _add(a[at], b[at], -w, self.form, nodes[0])
            return count
        return 1

    def _first_only(self, end: Level) -> bool:
        """Whether the formula beyond order 1 has no limit at this clean end."""
        return self.first_at_clean or (
            self.form == "data" and not usable("data", self.variable, end)
        )

    def _approximate(
        self, W: list[float], start: Level, end: Level, nodes: Sequence[Level]
    ) -> None:
        """Published replacements of the exact weights of the older nodes; the newest follows, as
        the sum stays."""
        delta, total = [n.lam - start.lam for n in nodes], sum(W)
        if len(nodes) == 2 and self.second != "exact":
            h = end.lam - start.lam
            flat = total  # bh2, and the midpoint rule
            if self.second == "bh1":
                flat = end.alpha * h if self.form == "data" else -end.sigma * h
            W[1] = flat * 0.5 * h / delta[1]
        if len(nodes) == 3 and self.third == "shipped":
            # W_j of the older nodes is made of I_1 = int kernel delta and I_2 = int kernel
            # delta^2 / 2; the exact method uses 2 I_2 times the divided difference, this one I_2.
            moment = 0.5 * (W[1] * delta[1] ** 2 + W[2] * delta[2] ** 2)
            W[1] -= moment / (delta[1] * (delta[1] - delta[2]))
            W[2] -= moment / (delta[2] * (delta[2] - delta[1]))
        W[0] = total - sum(W[1:])


def _add(a: float, b: float, w: float, form: str, node: Level) -> tuple[float, float]:
    """(a, b) + w (x_coefficient, D_coefficient) of M at a node."""
    if form == "data":
        return a, b + w
    n = scale(form, node)
    x = node.alpha / n if form == "v" else 1.0
    return a + w * x / node.sigma, b - w * n / node.sigma
