"""The law of what stochastic solvers sample: weak order, and the variance at every node.

Nothing here is sampled, but for the slow tests. Two exact problems:

Data N(mean, std^2). Every state is affine in the start and the draws, so that its mean and variance
follow from the rows. The process's law is known: errors are absolute.

The same data tilted, of density N(x) (1 + eps cos(w x + p)), to first order in eps. Its exact data
prediction is D - eps w tau^2 e^{-w^2 tau^2 / 2} sin(w D + p), with D as before and tau^2 the
variance of the data given x. So X = X0 + eps X1, with X0 as before and X1 a linear combination of
sines of quantities that are jointly normal with X0: all expectations are characteristic functions,
and the process's law is known. This is a nonlinear problem, and Gaussian data is not: rows that
hold eps and are of first order can have order 2 there.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._noise import Draw, Noise
from problems import Normal, in_turn, normals, reverse_sde, run

NORMAL = Normal()
#: Solvers by hand keep the tests alive by themselves.
SOLVERS: dict[str, fs.Solver] = {
    "by hand, order 1": reverse_sde(1, 1.0),
    "by hand, order 2": reverse_sde(2, 0.5),
    **{name: entry for name, entry in fs.solvers.items() if entry.stochastic},
}
PROCESSES = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow()}
#: Step sizes: equal, and alternating 1 : 3.
SPACINGS = {"uniform": (1.0, 1.0), "alternating 1:3": (0.5, 1.5)}
LAM = (-1.2, 1.2)
SIZES = (128, 256, 512)


def compiled(
    solver: fs.Solver,
    process: fs.Process,
    n: int,
    spacing: str = "uniform",
    ends: tuple[float, float] = LAM,
) -> fs.Plan:
    sizes = np.resize(SPACINGS[spacing], n) * (ends[1] - ends[0]) / n
    lam = ends[0] + np.concatenate([[0.0], np.cumsum(sizes)])
    return fs.plan(solver, process, grid=process.time(lam))


# -- tilted data ---------------------------------------------------------------------------------

#: Frequencies of the tilt and of what is observed (0: X itself), in units of the data's standard
#: deviation and of the process's; a phase. Several, so that no error is missed where one of them
#: happens to change sign.
TILTS, LOOKS, PHASE = (0.7, 1.3, 1.9), (0.0, 1.0, 1.6), 0.6


def wave(v: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """E exp(i (V + phase)) of V = v . (1, normals)."""
    return np.exp(1j * (v[..., 0] + phase) - 0.5 * (v[..., 1:] ** 2).sum(-1))


def left(level: fs.Level) -> float:
    """Variance of the data given x."""
    return (NORMAL.std * level.sigma) ** 2 / ((level.alpha * NORMAL.std) ** 2 + level.sigma**2)


def weighted(x: np.ndarray, data: np.ndarray, level: fs.Level, w: float, v: float) -> float:
    """E f(X) g(X') at a level, f(x) = sin(v x) or x, of the weight g = E[cos(w x_0 + p) | x] less
    its mean, that is e^{-w^2 tau^2 / 2} cos(w D + p) with D the data prediction `data`."""
    u, damp = w * data, math.exp(-0.5 * w * w * left(level))
    if v == 0:
        return -damp * float(x[1:] @ u[1:]) * wave(u, PHASE).imag
    both = 0.5 * (wave(v * x + u, PHASE) + wave(v * x - u, -PHASE))
    return damp * (both.imag - wave(v * x).imag * wave(u, PHASE).real)


def tilted_errors(plan: fs.Plan) -> np.ndarray:
    """Of E f(X) at the end, to first order in the tilt, against the law of the process."""
    states = NORMAL.states(plan)

    def predicted(state: np.ndarray, level: fs.Level) -> np.ndarray:
        out = NORMAL.gain(level.alpha, level.sigma) * state
        out[0] += NORMAL.mean * (1 - NORMAL.gain(level.alpha, level.sigma) * level.alpha)
        return out

    # X1 at the end, over the changes of the data prediction at every evaluation
    asked = [k for k, call in enumerate(plan.calls) if call is not None]
    unit = dict(zip(asked, np.eye(len(asked)), strict=True))
    zero = np.zeros(len(asked))
    change, data = [zero], {}
    for i, row in enumerate(plan.rows):
        if i in unit:
            level = plan.asked(i)
            data[i] = NORMAL.gain(level.alpha, level.sigma) * change[i] + unit[i]
        parts = ((row.a, change), (row.b, data))
        change.append(zero + sum(c * v[j] for terms, v in parts for j, c in terms.items()))

    first, last = plan.levels[0], plan.levels[-1]
    mean, scale = NORMAL.moments(last)
    end, change = states[-1] / scale, change[-1] / scale
    seen = np.array([predicted(states[k], plan.asked(k)) for k in asked])
    tau2 = np.array([left(plan.asked(k)) for k in asked])
    exact = np.array([mean, scale])
    out = []
    for w in (w / NORMAL.std for w in TILTS):
        size = -w * tau2 * np.exp(-0.5 * w * w * tau2) * change
        for v in LOOKS:
            if v:  # cos a sin b = (sin(b + a) + sin(b - a)) / 2
                both = wave(w * seen + v * end, PHASE) + wave(w * seen - v * end, PHASE)
                moved = 0.5 * v * size @ both.imag
            else:
                moved = size @ wave(w * seen, PHASE).imag
            start = weighted(end, predicted(states[0], first), first, w, v)
            true = weighted(exact / scale, predicted(exact, last), last, w, v)
            out.append(moved + start - true)
    return np.array(out)


def slope(values: list[float] | np.ndarray) -> float:
    return float(-np.polyfit(np.log(SIZES[: len(values)]), np.log(values), 1)[0])


def orders(
    solver: fs.Solver,
    process: fs.Process = PROCESSES["vp"],
    spacing: str = "uniform",
    ends: tuple[float, float] = LAM,
) -> tuple[float, float]:
    """Measured on Gaussian and on tilted data."""
    plans = [compiled(solver, process, n, spacing, ends) for n in SIZES]
    return (
        slope([NORMAL.gap(plan) for plan in plans]),
        slope([float(np.linalg.norm(tilted_errors(plan))) for plan in plans]),
    )


@pytest.mark.parametrize(
    ("solver", "name", "spacing"),
    in_turn(3, SOLVERS, ["edm", "flow", "vp"], ["uniform", "alternating 1:3"]),
)
def test_weak_order_is_the_declared_one(solver, name, spacing):
    entry = SOLVERS[solver]
    declared = (entry.smooth_order if spacing == "uniform" else 0) or entry.order
    gaussian, tilted = orders(entry, PROCESSES[name], spacing)
    if declared == 0:  # noise that does not become less with the steps: not the law of the process
        assert max(gaussian, tilted) < 0.2
        return
    assert gaussian > declared - 0.2  # more is flattery
    assert tilted == pytest.approx(declared, abs=0.2)


def noise_form(process, history, end):
    """eps held over the step, eta = 1: order 1, but 2 on Gaussian data."""
    start = history[0]
    h = end.lam - start.lam
    c = 2 * end.sigma * math.expm1(h) / start.sigma
    draw = Draw(start, end, (-end.lam, -start.lam))
    noise = {draw: end.sigma * math.sqrt(math.expm1(2 * h))}
    return fs.Formula([end.alpha / start.alpha - c], [c * start.alpha], 1, False, noise=noise)


def test_gaussian_data_flatters_and_tilted_data_does_not():
    solver = fs.Multistep("noise form", 1, noise_form, "", "", stochastic=True, strong_order=1)
    gaussian, tilted = orders(solver, ends=(-3.0, 3.9))
    assert gaussian > 1.5
    assert tilted == pytest.approx(1, abs=0.1)


def test_the_weak_order_test_can_fail():
    """A weight that is wrong, and a variance that is."""
    assert min(orders(reverse_sde(2))) > 1.8
    assert max(orders(reverse_sde(2, weight=0.4))) < 1.5
    assert orders(reverse_sde(2, spread=1.02))[0] < 0.2  # goes elsewhere
    # draws that are not independent of those of the step before: the variance of every row is right
    plain = reverse_sde(2)

    def again(process, history, end):
        formula = plain.step(process, history, end)
        if len(history) < 2:
            return formula
        (draw, c), *_ = formula.noise.items()
        old = Draw(history[1], history[0], (history[1].lam, history[0].lam))
        return formula._replace(noise={draw: c * 0.8, old: c * 0.6}, exact=False)

    solver = fs.Multistep("again", 2, again, "", "", stochastic=True, strong_order=1)
    assert orders(solver)[0] < 0.2


def test_the_tilt_is_what_it_says():
    """The data prediction and the expectations against quadrature on a truly tilted density."""
    level, eps, w = fs.VP().level(0.4), 1e-4, TILTS[1] / NORMAL.std
    x0 = np.linspace(-6, 6, 6001)[:, None] * NORMAL.std + NORMAL.mean

    def tilt(eps):
        z = (x0 - NORMAL.mean) / NORMAL.std
        return np.exp(-0.5 * z * z) * (1 + eps * np.cos(w * x0 + PHASE))

    x = np.linspace(-6, 6, 601) * NORMAL.moments(level)[1] + NORMAL.moments(level)[0]
    seen = np.exp(-0.5 * ((x - level.alpha * x0) / level.sigma) ** 2)

    def difference(f):
        return (f(eps) - f(-eps)) / (2 * eps)

    found = difference(lambda e: (tilt(e) * seen * x0).sum(0) / (tilt(e) * seen).sum(0))
    gain, tau2 = NORMAL.gain(level.alpha, level.sigma), left(level)
    D = NORMAL.mean + gain * (x - level.alpha * NORMAL.mean)
    want = -w * tau2 * math.exp(-0.5 * w * w * tau2) * np.sin(w * D + PHASE)
    np.testing.assert_allclose(found, want, atol=1e-6)

    mean, scale = NORMAL.moments(level)
    law = np.array([mean, scale])
    predicted = np.array([NORMAL.mean, gain * scale])
    for v in LOOKS:
        f = np.sin(v * x / scale) if v else x / scale
        change = difference(lambda e, f=f: (tilt(e) * seen * f).sum() / (tilt(e) * seen).sum())
        assert weighted(law / scale, predicted, level, w, v) == pytest.approx(change, abs=1e-6)


def test_tilted_errors_are_those_of_runs():
    """Six steps on tilted data, a million samples: the error of the first-order change."""
    plan, eps, w = compiled(reverse_sde(1, 0.7), fs.VP(), 6), 1e-3, TILTS[1] / NORMAL.std
    rng = np.random.default_rng(0)
    mean, std = NORMAL.moments(plan.levels[0])
    x = mean + std * rng.normal(size=1_000_000)

    def denoise(x, alpha, sigma, eps):
        D = NORMAL.mean + NORMAL.gain(alpha, sigma) * (x - alpha * NORMAL.mean)
        tau2 = left(fs.Level(0.0, alpha, sigma, 0.0))
        return D - eps * w * tau2 * math.exp(-0.5 * w * w * tau2) * np.sin(w * D + PHASE)

    z = normals(plan, x.shape)
    scale = NORMAL.moments(plan.levels[-1])[1]
    up, down = (run(plan, functools.partial(denoise, eps=e), x, z) / scale for e in (eps, -eps))
    gain = NORMAL.gain(plan.levels[0].alpha, plan.levels[0].sigma)
    D = NORMAL.mean + gain * (x - mean)
    g = math.exp(-0.5 * w * w * left(plan.levels[0])) * np.cos(w * D + PHASE)
    g -= g.mean()
    law, errors = np.array(NORMAL.moments(plan.levels[-1])), []
    end = plan.levels[-1]
    seen = np.array([NORMAL.mean, NORMAL.gain(end.alpha, end.sigma) * law[1]])
    for v in LOOKS:
        f = [np.sin(v * y) if v else y for y in (up, down)]
        change = (f[0] - f[1]).mean() / (2 * eps) + (g * (f[0] + f[1]) / 2).mean()
        errors.append(change - weighted(law / law[1], seen, end, w, v))
    want = tilted_errors(plan)[3:6]
    np.testing.assert_allclose(errors, want, atol=0.004)
    assert np.abs(want).max() > 0.02


# -- variance at the nodes -----------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "name"), in_turn(3, SOLVERS, PROCESSES))
def test_small_steps_have_the_law_of_the_process_at_every_node(solver, name):
    entry, worst = SOLVERS[solver], []
    for n in (100, 400):
        plan = compiled(entry, PROCESSES[name], n, ends=(-3.0, 3.0))
        want = np.array([NORMAL.moments(level) for level in plan.levels])
        gaps = np.hypot(*(NORMAL.laws(plan) - want).T) / want[:, 1]
        # a node's last state is what goes on
        last = {v.t: g for v, g in zip(plan.levels, gaps, strict=True) if v.t in plan.origin.times}
        worst.append(max(last.values()))
    if entry.order:
        assert worst[1] < 0.35 * worst[0]
        assert worst[1] < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_that_claim_it_keep_the_variance(solver):
    """With constant data the noise of every state has the process's sigma: in one step
    lin^2 sigma_s^2 + v^2 = sigma_t^2."""
    for process in (*PROCESSES.values(), fs.DiscreteVP.squared_cosine().zero_terminal_snr()):
        plan = fs.plan(SOLVERS[solver], process, 7, grid="uniform")
        if all(row.exact for row in plan.rows):
            sigmas = [level.sigma for level in plan.levels]
            np.testing.assert_allclose(Normal(0.3, 0.0).laws(plan)[:, 1], sigmas, atol=1e-12)


# -- a mixture, sampled --------------------------------------------------------------------------

MEANS, STDS, SHARES = np.array([-1.0, 0.2, 1.2]), np.array([0.35, 0.5, 0.4]), (0.3, 0.3, 0.4)


def mixture(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """Data prediction of a one-dimensional mixture."""
    weight, total = 0.0, 0.0
    for m, s, share in zip(MEANS, STDS, SHARES, strict=True):
        v = alpha**2 * s**2 + sigma**2
        d = x - alpha * m
        r = share / math.sqrt(v) * np.exp(-0.5 * d * d / v)
        weight, total = weight + r, total + r * (m + alpha * s * s / v * d)
    return total / weight


def sampled_from(level: fs.Level, n: int, rng: np.random.Generator) -> np.ndarray:
    k = rng.choice(3, size=n, p=SHARES)
    x = level.alpha * (MEANS[k] + STDS[k] * rng.normal(size=n))
    return x + level.sigma * rng.normal(size=n)


def observables(level: fs.Level) -> np.ndarray:
    """E of x, x^2, cos 3x and sin 3x under the process's law."""
    m, v = level.alpha * MEANS, level.alpha**2 * STDS**2 + level.sigma**2
    wave = np.exp(3j * m - 4.5 * v) @ SHARES
    return np.array([m @ SHARES, (m**2 + v) @ SHARES, wave.real, wave.imag])


def expectations(x: np.ndarray) -> np.ndarray:
    return np.stack([x, x**2, np.cos(3 * x), np.sin(3 * x)])


def refined(entry: fs.Solver, first: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences of expectations between `first` steps, twice and four times as many, on the same
    Brownian paths, 50,000 samples times `parts`; and their standard errors."""
    plans = [compiled(entry, fs.VP(), n) for n in (first, 2 * first, 4 * first)]
    like, found = torch.empty(1, 50_000, dtype=torch.float64), []
    for k in range(parts):
        x = sampled_from(plans[0].levels[0], like.numel(), np.random.default_rng(k))
        noise, out = Noise(k, path=True), []
        for plan in plans:
            draws = [noise.draw(draw, m, like)[0].numpy() for m, draw in enumerate(plan.draws)]
            out.append(expectations(run(plan, mixture, x, draws)))
        found.append([(a - b).mean(1) for a, b in itertools.pairwise(out)])
    spread = np.std(found, 0, ddof=1) / math.sqrt(len(found))
    return np.linalg.norm(np.mean(found, 0), axis=1), np.linalg.norm(spread, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [k for k, entry in SOLVERS.items() if entry.strong_order])
def test_weak_order_on_a_mixture(solver):
    """What runs on the same paths share is not in the noise of their difference."""
    entry = SOLVERS[solver]
    for first, parts, clear in ((16, 8, 10), (16, 40, 5), (8, 40, 5)):
        (coarse, fine), noise = refined(entry, first, parts)
        if coarse > clear * noise[0]:
            break  # else too small to be seen: fewer steps, or more samples
    assert coarse > 5 * noise[0]
    assert fine - 2 * noise[1] < coarse * 2.0 ** -(entry.order - 0.3), (coarse, fine, noise)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [k for k, entry in SOLVERS.items() if not entry.strong_order])
def test_errors_on_a_mixture(solver):
    """Errors of expectations at 4 and 16 steps, a million samples each, with their noise."""
    entry, errors, noise = SOLVERS[solver], [], []
    for n in (4, 16):
        plan, rng, found = compiled(entry, fs.VP(), n), np.random.default_rng(n), []
        for _ in range(20):
            x = sampled_from(plan.levels[0], 50_000, rng)
            out = run(plan, mixture, x, rng.normal(size=(len(plan.draws), x.size)))
            found.append(expectations(out).mean(1) - observables(plan.levels[-1]))
        errors.append(np.linalg.norm(np.mean(found, 0)))
        noise.append(np.linalg.norm(np.std(found, 0, ddof=1)) / math.sqrt(len(found)))
    # the fine error may be all noise: what it is at most
    assert errors[0] > 10 * noise[0]
    assert errors[1] - 2 * noise[1] < errors[0] * 4.0 ** -(entry.order - 0.4), (errors, noise)


def test_the_mixture_is_the_one_of_the_package():
    exact = fs.exact.Mixture(np.array(SHARES), MEANS[:, None], STDS**2)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    level = fs.VP().level(0.4)
    want = exact.denoise(x, level.alpha, level.sigma)
    np.testing.assert_allclose(mixture(x[:, 0].numpy(), level.alpha, level.sigma), want[:, 0])
