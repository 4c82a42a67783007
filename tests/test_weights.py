"""Weights against 50-digit arithmetic, for every form and basis variable."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pytest

import fewstep as fs
from fewstep._weights import FORMS, VARIABLES

STEPS = [1e-6, 1e-4, 1e-2, 0.3, 1.0, 3.0, 8.0, 20.0]
#: Older nodes in units of the step: none, even, uneven both ways, and a corrector's node.
HISTORIES = [(0,), (0, -1), (0, -1, -2, -3), (0, -0.3, -1.7), (0, -3, -3.5, -9), (0, 1, -1, -2)]
WIDE = fs.EDM(1e-30, 1e30)  # lambda from -69 to 69


def level(lam: float) -> fs.Level:
    """alpha^2 + sigma^2 = 1 at this lambda, with t = exp(-lambda) for the basis variable t."""
    alpha, sigma = (
        math.exp(-0.5 * np.logaddexp(0, -2 * lam)),
        math.exp(-0.5 * np.logaddexp(0, 2 * lam)),
    )
    return fs.Level(math.exp(-lam), alpha, sigma, lam)


def zeta(form, lam):
    rho = mp.exp(-lam)
    return {"data": 1 / rho, "noise": rho, "v": mp.atan(rho), "flow": rho / (1 + rho)}[form]


def exact(form, variable, lam, h, offsets, end: fs.Level):
    """W_j by mpmath quadrature of ell_j(u) dzeta, from the definition."""

    def u(x):
        if variable == "lambda":
            return x
        if variable in ("t", "rho"):
            return mp.exp(-x)
        return zeta(form, x)

    s = mp.mpf(lam)
    nodes = [u(s + mp.mpf(d)) for d in offsets]
    scale = {
        "data": end.sigma,
        "noise": end.alpha,
        "v": mp.sqrt(mp.mpf(end.alpha) ** 2 + mp.mpf(end.sigma) ** 2),
        "flow": mp.mpf(end.alpha) + end.sigma,
    }[form]

    def slope(x):
        rho = mp.exp(-x)
        return {
            "data": 1 / rho,
            "noise": -rho,
            "v": -rho / (1 + rho**2),
            "flow": -rho / (1 + rho) ** 2,
        }[form]

    out = []
    pieces = [s + mp.mpf(h) * k / max(1, math.ceil(h)) for k in range(max(1, math.ceil(h)) + 1)]
    for j in range(len(nodes)):

        def integrand(x, j=j):
            value = slope(x)
            for k in range(len(nodes)):
                if k != j:
                    value *= (u(x) - nodes[k]) / (nodes[j] - nodes[k])
            return value

        # quad stops at an absolute error, so it must be given numbers of size one
        size = integrand((pieces[0] + pieces[1]) / 2)
        unit = mp.quad(lambda x, f=integrand, size=size: f(x) / size, pieces)
        out.append(float(scale * size * unit))
    return np.array(out)


CASES = [
    (form, variable, lam, h, history)
    for (form, variable), lam, h, history in itertools.product(
        itertools.product(FORMS, VARIABLES), (-3.0, 2.0), STEPS, HISTORIES
    )
    # t is a float64 number given from outside: its differences hold only eps / h digits
    if not (variable == "t" and h < 0.3) and -min(history) * h <= 40  # no process has lambda beyond
]


def check(form, variable, lam, h, history):
    offsets = [d * h for d in history]
    # the inputs are these float64 levels: h and offsets are taken from them exactly
    start, end = level(lam), level(lam + h)
    nodes = [level(lam + d) for d in offsets]
    got = fs.weights(form, variable, start, end, nodes, WIDE)
    with mp.workdps(50):
        real_h = mp.mpf(end.lam) - mp.mpf(start.lam)
        real = [mp.mpf(n.lam) - mp.mpf(start.lam) for n in nodes]
        want = exact(form, variable, lam, real_h, real, end)
    np.testing.assert_allclose(got, want, rtol=1e-12)


FAST = [case for case in CASES[::13] if case[3] < 20]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_weights_against_50_digits(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_weights_against_50_digits_all(part):
    for case in CASES[part::16]:
        check(*case)


@pytest.mark.parametrize(("form", "variable"), list(itertools.product(FORMS, VARIABLES)))
def test_limit_at_the_clean_end(form, variable):
    """The weights at lambda = inf are the limit of those at growing lambda, where there is one."""
    process = fs.VP()
    history = [process.level(t) for t in (0.2, 0.35, 0.6)]
    clean = process.level(0.0)
    if form == "data" and variable in ("lambda", "own"):
        with pytest.raises(ValueError, match="no limit at sigma = 0"):
            fs.weights(form, variable, history[0], clean, history, process)
        return
    limit = fs.weights(form, variable, history[0], clean, history, process)
    gaps = []
    for t in (1e-6, 1e-8, 1e-10):
        near = fs.weights(form, variable, history[0], process.level(t), history, process)
        gaps.append(np.abs(near - limit).max())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3 * np.abs(limit).max()


@pytest.mark.parametrize("form", FORMS)
def test_one_node_is_the_closed_form(form):
    p = fs.VP()
    s, t = p.level(0.5), p.level(0.3)
    want = {
        "data": t.alpha - t.sigma * s.alpha / s.sigma,
        "noise": t.sigma - t.alpha * s.sigma / s.alpha,
        "v": math.atan2(t.sigma, t.alpha) - math.atan2(s.sigma, s.alpha),
        "flow": t.sigma - (t.alpha + t.sigma) * s.sigma / (s.alpha + s.sigma),
    }[form]
    assert fs.weights(form, "lambda", s, t, [s])[0] == pytest.approx(want, rel=1e-13)


def test_kinks_of_a_table_are_integrated_exactly():
    """In t, a tabulated process has a kink at every index; the pieces between them are smooth."""
    process = fs.DiscreteVP.from_alphas_cumprod([0.95, 0.7, 0.4, 0.2, 0.05])
    s, e, older = process.level(3.0), process.level(0.5), process.level(4.0)
    got = fs.weights("noise", "t", s, e, [s, older], process)
    # the same integral as a sum over a very fine grid, midpoint rule
    lam = np.linspace(s.lam, e.lam, 2_000_001)
    mid = 0.5 * (lam[1:] + lam[:-1])
    ell = (process.time(mid) - s.t) / (older.t - s.t)
    want = -e.alpha * np.sum(np.exp(-mid) * ell) * (lam[1] - lam[0])
    assert got[1] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dat", "lambda"), "did you mean 'data'"),
        (("data", "lam"), "variable = 'lam'"),
        (("data", "t"), "process: the variable 't'"),
        (("noise", "lambda", 1.0), "start: lambda = -inf"),
        (("noise", "rho", 0.5, 1.0), "rho is infinite at one of them"),
    ],
)
def test_bad_arguments(arguments, words):
    form, variable, *more = arguments
    p = fs.Flow()
    start = p.level(more[0] if more else 0.5)
    older = p.level(more[1] if len(more) > 1 else 0.7)
    with pytest.raises(ValueError, match=words):
        fs.weights(form, variable, start, p.level(0.2), [start, older])


def test_to_no_signal_there_is_one_node_only():
    process = fs.Flow()
    nodes = [process.level(0.5), process.level(0.4)]
    with pytest.raises(ValueError, match="end: alpha = 0"):
        fs.weights("data", "lambda", nodes[0], process.level(1.0), nodes)
    assert fs.weights("data", "lambda", nodes[0], process.level(1.0), nodes[:1]) == -1.0
