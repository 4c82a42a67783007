"""Critically damped Langevin diffusion: its matrices, and gDDIM where scores are known."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from fewstep._cld import CLD, CLDPlan, sample_cld

PUBLISHED = CLD()
OFFICIAL = CLD(jitter=1e-6)
OTHER = CLD(beta=1.5, mass=1.0, friction=2.0, gamma=0.3, t_start=2.0)
PROCESSES = {"published": PUBLISHED, "official": OFFICIAL, "other": OTHER}


def drift(cld: CLD) -> np.ndarray:
    """F."""
    return cld.beta * np.array([[0, 1 / cld.mass], [-1, -cld.friction / cld.mass]])


def diffusion(cld: CLD) -> np.ndarray:
    """G G^T."""
    return np.diag([0, 2 * cld.friction * cld.beta])


def solved(slope, s: float, t: float, start: np.ndarray) -> np.ndarray:
    """The matrix at t of dY/dt = slope(t, Y)."""
    out = solve_ivp(
        lambda r, y: slope(r, y.reshape(start.shape)).ravel(),
        (s, t),
        start.ravel(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-14,
    )
    return out.y[:, -1].reshape(start.shape)


def joint(cld: CLD, t: float, variance: float) -> np.ndarray:
    """The covariance of u_t for data of this variance."""
    first = cld.psi(t, 0.0)[:, :1]
    return cld.covariance(t) + variance * first @ first.T


def on(matrix: np.ndarray, u: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,bj...->bi...", torch.from_numpy(matrix), u)


def network(cld: CLD, mean: float = 0.0, variance: float = 0.0, predicts: str = "score"):
    """The exact one for normal data."""

    def out(u, t):
        t = float(t[0])
        centre = torch.from_numpy(cld.psi(t, 0.0) @ [mean, 0.0]).reshape(1, 2, *[1] * (u.ndim - 2))
        score = -on(np.linalg.inv(joint(cld, t, variance)), u.double() - centre)
        if predicts != "score":
            kind = "gddim" if predicts == "noise" else "cholesky"
            score = -on(cld.root(t, kind).T, score)
        return score.to(u.dtype)

    return out


def start(shape, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(shape[0], 2, *shape[1:], dtype=torch.float64, generator=g)
    return on(PUBLISHED._units, z)


def flow(cld: CLD, variance: float, s: float, t: float) -> np.ndarray:
    """The map of the ODE from s to t, for normal data around 0."""

    def slope(r, y):
        return (drift(cld) + 0.5 * diffusion(cld) @ np.linalg.inv(joint(cld, r, variance))) @ y

    return solved(slope, s, t, np.eye(2))


# -- the matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cld", PROCESSES.values(), ids=PROCESSES)
def test_matrices_solve_their_equations(cld):
    F, Q = drift(cld), diffusion(cld)
    for s, t in ((0.0, 0.4), (0.03, 1.0), (0.7, 0.1)):
        psi = solved(lambda r, y: F @ y, s, t, np.eye(2))
        np.testing.assert_allclose(cld.psi(t, s), psi, rtol=1e-9, atol=1e-11)
        moved = solved(lambda r, y: F @ y + y @ F.T + Q, s, t, cld.covariance(s))
        np.testing.assert_allclose(cld.covariance(t), moved, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(
        cld.covariance(0.0), np.diag([cld.jitter, cld.gamma * cld.mass + cld.jitter]), atol=1e-16
    )
    np.testing.assert_allclose(cld.covariance(9.0), np.diag([1.0, cld.mass]), atol=1e-9)


@pytest.mark.parametrize("cld", PROCESSES.values(), ids=PROCESSES)
def test_the_root_solves_its_equation(cld):
    """R of gDDIM; the Cholesky root does not."""
    F, Q = drift(cld), diffusion(cld)

    def slope(r, R):
        return (F + 0.5 * Q @ np.linalg.inv(cld.covariance(r))) @ R

    times = [0.004, 0.05, 0.3, 1.0]
    for kind in ("gddim", "cholesky"):
        roots = cld.root(np.array(times), kind)
        np.testing.assert_allclose(roots @ roots.swapaxes(1, 2), cld.covariance(times), atol=1e-15)
        for i in range(3):
            moved = solved(slope, times[i], times[i + 1], roots[i])
            same = np.allclose(moved, roots[i + 1], rtol=1e-8, atol=1e-10)
            assert same == (kind == "gddim")
    assert (np.triu(cld.root(0.3, "cholesky"), 1) == 0).all()
    np.testing.assert_allclose(cld.root(1e-14), cld.root(0.0), atol=1e-5)
    np.testing.assert_array_equal(cld.root(0.0) ** 2 > 0, [[cld.jitter > 0, False], [False, True]])


def test_the_official_root_is_met_from_the_official_start():
    """The official code integrates R from diag(sqrt(1e-6), sqrt(gamma M + 1e-6)) at t = 0."""
    F, Q = drift(OFFICIAL), diffusion(OFFICIAL)
    R = np.diag(np.sqrt([1e-6, 0.01 + 1e-6]))
    for s, t in ((0.0, 1e-3), (1e-3, 0.1), (0.1, 1.0)):
        R = solved(lambda r, R: F @ R + 0.5 * Q @ np.linalg.inv(R).T, s, t, R)
        np.testing.assert_allclose(OFFICIAL.root(t), R, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cld", PROCESSES.values(), ids=PROCESSES)
def test_moments_keep_their_digits(cld):
    """The determinant too, which vanishes as t^3 or jitter."""
    with mpmath.workdps(80):
        d, s = (mpmath.mpf(v) for v in cld._start)
        for z in (1e-9, 1e-4, 0.03, 0.49999, 0.5, 2.0, 20.0):
            r = mpmath.mpf(z)
            psi = mpmath.exp(-r) * mpmath.matrix([[1 + r, r], [-r, 1 - r]])
            S = mpmath.eye(2) + psi * mpmath.matrix([[d - 1, 0], [0, s - 1]]) * psi.T
            want = (S[0, 0], S[0, 1], S[1, 1], mpmath.det(S))
            for have, true in zip(cld._moments(z), want, strict=True):
                assert abs(float(have / true - 1)) < 1e-14


def test_the_angle_is_an_integral():
    """By quadrature in sqrt(z), where the integrand is analytic."""
    x, w = np.polynomial.legendre.leggauss(200)
    for z in (1e-6, 0.2, 3.0, 8.0):
        r = 0.5 * (x + 1) * math.sqrt(z)
        integral = np.sum(w * 0.5 * math.sqrt(z) * 2 * r * PUBLISHED._rate(r * r))
        assert abs(PUBLISHED._theta(z) - (integral - math.pi / 2)) < 1e-12
    assert abs(PUBLISHED._theta(8.0) + math.pi / 2) > 12


# -- the ODE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cld", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("predicts", ["noise", "cholesky", "score"])
def test_one_point_is_reached_in_one_step(predicts, cld):
    """eps is constant along the trajectory: with gDDIM's root, of any order."""
    mean, u = 0.7, start((4, 3))
    clean = cld.psi(cld.t_start, 0.0) @ [mean, 0.0]
    eps = on(np.linalg.inv(cld.root(cld.t_start)), u - torch.from_numpy(clean).reshape(1, 2, 1))
    want = on(cld.root(0.0), eps) + torch.tensor([mean, 0.0], dtype=torch.float64).reshape(1, 2, 1)
    for nfe, order, corrector in ((1, 1, False), (3, 2, False), (8, 3, False), (40, 1, True)):
        plan = cld.plan(nfe, order=order, corrector=corrector, predicts=predicts)
        out = plan.run(network(cld, mean, 0.0, predicts), u)
        torch.testing.assert_close(out, want, rtol=0, atol=2e-9)
    step = cld.plan(times=[0.8, 0.1], order=1).steps[0]
    closed = cld.root(0.1) - cld.psi(0.1, 0.8) @ cld.root(0.8)
    np.testing.assert_allclose(step.weights[0], closed, atol=1e-12)


def test_the_cholesky_root_does_not_have_constant_noise():
    """Along trajectories for one point, eps of L turns, by up to a circle and more."""
    c = np.array([0.6, -0.8])
    turned = [PUBLISHED.root(t, "cholesky").T @ np.linalg.inv(PUBLISHED.root(t)).T @ c
              for t in (0.05, 0.2, 0.8)]  # fmt: skip
    for eps in turned:
        assert abs(np.linalg.norm(eps) - 1) < 1e-12
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(turned, 2)) > 0.3
    errors = {}
    for root in ("gddim", "cholesky"):
        plan = PUBLISHED.plan(10, order=1, predicts="score", root=root)
        out = plan.run(network(PUBLISHED, 0.7), start((8, 3)))
        errors[root] = float((out[:, 0] - 0.7).abs().max())
    assert errors["gddim"] < 1e-12
    assert errors["cholesky"] > 0.5


def test_only_momentum_is_asked_for_with_the_cholesky_root():
    """What CLD's own networks know: the x part of the output has no weight."""
    plan = PUBLISHED.plan(5, order=2, predicts="cholesky", root="cholesky")
    for step in plan.steps:
        for weight in step.weights:
            assert (weight[:, 0] == 0).all()
            assert (weight[:, 1] != 0).all()


@pytest.mark.parametrize(
    ("root", "corrector", "order"),
    [
        *itertools.product(["gddim"], [False, True], [1, 2, 3]),
        *[("cholesky", False, n) for n in (1, 2)],
    ],
)
def test_order_on_normal_data(root, corrector, order):
    """With the Cholesky root order 3 is lost at the start, where its eps is not constant."""
    cld, variance, end = PUBLISHED, 0.09, 0.01
    want = torch.from_numpy(flow(cld, variance, 1.0, end))
    basis = torch.eye(2, dtype=torch.float64)  # the run is a linear map
    errors = []
    for n in (80, 160):
        times = np.linspace(1.0, math.sqrt(end), n + 1) ** 2
        plan = cld.plan(times=times, order=order, corrector=corrector, predicts="score", root=root)
        out = plan.run(network(cld, 0.0, variance), basis)
        errors.append(float((out - want.T).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order + corrector - 0.2, errors
    assert errors[-1] < 0.2, errors


@pytest.mark.parametrize(
    ("order", "corrector", "enough"),
    [(1, False, 5), (2, False, 12), (3, False, 30), (1, True, 40), (2, True, 60), (3, True, 100)],
)
def test_errors_of_the_network_are_magnified_by_long_steps(order, corrector, enough):
    """What the docstring of `plan` says: how far small errors at every evaluation get."""
    g = torch.Generator().manual_seed(0)
    exact, u = network(PUBLISHED), torch.zeros(64, 2, 1, dtype=torch.float64)

    def disturbed(u, t):
        return exact(u, t) + torch.randn(u.shape, dtype=u.dtype, generator=g)

    def spread(nfe):
        plan = PUBLISHED.plan(nfe, order=order, corrector=corrector, predicts="score")
        return float(plan.run(disturbed, u)[:, 0].std())

    assert spread(enough) < 1
    assert (spread(20) > 1e4) == corrector


def test_order_two_holds_down_to_clean_data():
    """t = 0 itself, where eps is a series in sqrt(t): polynomials in t are worse there."""
    want = torch.from_numpy(flow(PUBLISHED, 0.09, 1.0, 1e-13)).T
    errors = []
    for n in (160, 320):
        plan = PUBLISHED.plan(n, predicts="score")
        out = plan.run(network(PUBLISHED, 0.0, 0.09), torch.eye(2, dtype=torch.float64))
        errors.append(float((out - want).abs().max()))
    assert math.log2(errors[0] / errors[1]) > 1.9, errors
    assert errors[1] < 4e-3, errors


def test_order_on_a_mixture():
    """Of three normals in one dimension; trajectories by scipy."""
    cld, end = PUBLISHED, 0.01
    means, weights, variance = np.array([-0.8, 0.1, 0.9]), np.array([0.3, 0.5, 0.2]), 0.01

    def score(u, t):
        psi, S = cld.psi(t, 0.0), np.linalg.inv(joint(cld, t, variance))
        d = u[:, None, :] - means[:, None] * psi[:, 0]
        force = d @ S
        log_p = np.log(weights) - 0.5 * (d * force).sum(-1)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        return -(p[..., None] * force).sum(1) / p.sum(1)[:, None, None].reshape(-1, 1)

    def slope(r, u):
        return u @ drift(cld).T - 0.5 * score(u, r) @ diffusion(cld)

    u = start((6,)).numpy()
    want = torch.from_numpy(solved(slope, 1.0, end, u))
    for order, bound in ((1, 0.8), (2, 1.7), (3, 2.6)):
        errors = []
        for n in (80, 160):
            times = np.linspace(1.0, math.sqrt(end), n + 1) ** 2
            plan = cld.plan(times=times, order=order, predicts="score")
            out = plan.run(lambda v, t: torch.from_numpy(score(v.numpy(), float(t[0]))),
                           torch.from_numpy(u))  # fmt: skip
            errors.append(float((out - want).abs().max()))
        assert math.log2(errors[0] / errors[1]) > bound, (order, errors)


# -- the SDE ---------------------------------------------------------------------------------------

ETAS = (0.3, 1.0, 2.0)


def laws(plan: CLDPlan, variance: float) -> list[np.ndarray]:
    """Covariances of the states of a run of order 1 on exact scores, from the exact one."""
    covariance = joint(plan.process, plan.steps[0].start.t, variance)
    out = []
    for step in plan.steps:
        score = -np.linalg.inv(joint(plan.process, step.start.t, variance))
        linear = step.psi + step.weights[0] @ score
        noise = np.zeros((2, 2)) if step.noise is None else step.noise
        covariance = linear @ covariance @ linear.T + noise @ noise.T
        out.append(covariance)
    return out


@pytest.mark.parametrize("cld", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("eta", [0.0, *ETAS])
def test_laws_of_one_point_are_exact_after_every_step(eta, cld):
    for nfe in (1, 2, 7):
        plan = cld.plan(nfe, order=1, eta=eta, predicts="score")
        for step, have in zip(plan.steps, laws(plan, 0.0), strict=True):
            np.testing.assert_allclose(have, cld.covariance(step.end.t), rtol=0, atol=2e-8)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("cld", [PUBLISHED, OTHER], ids=["published", "other"])
def test_noise_has_the_covariance_of_its_equation(cld, eta):
    """And Psih its own; without the transpose, as in the official code, it is no covariance."""
    Q = diffusion(cld)

    def Fh(r):
        return drift(cld) + 0.5 * (1 + eta**2) * Q @ np.linalg.inv(cld.covariance(r))

    for s, t in ((1.0, 0.5), (0.3, 0.1), (0.05, 0.01)):
        (step,) = cld.plan(times=[s, t], order=1, eta=eta).steps
        psih = solved(lambda r, y: Fh(r) @ y, s, t, np.eye(2))
        have = step.weights[0] + step.psi @ cld.root(s)
        np.testing.assert_allclose(have, psih @ cld.root(s), rtol=1e-7, atol=1e-9)
        P = step.noise @ step.noise.T
        zero = np.zeros((2, 2))
        want = solved(lambda r, y: Fh(r) @ y + y @ Fh(r).T - eta**2 * Q, s, t, zero)
        np.testing.assert_allclose(P, want, rtol=1e-7, atol=1e-9)
        assert np.linalg.eigvalsh(P)[0] >= -1e-16
        moved = have @ np.linalg.inv(cld.root(s))
        np.testing.assert_allclose(
            moved @ cld.covariance(s) @ moved.T + P, cld.covariance(t), rtol=1e-9, atol=1e-9
        )
        wrong = solved(lambda r, y: Fh(r) @ y + y @ Fh(r) - eta**2 * Q, s, t, zero)
        law = psih @ cld.covariance(s) @ psih.T + wrong
        assert np.abs(law - cld.covariance(t)).max() > 0.1 * np.abs(P).max()
        assert np.linalg.eigvalsh(wrong + wrong.T)[0] < -0.05 * np.abs(P).max()


def test_the_last_step_puts_no_noise_on_data():
    for eta in ETAS:
        noise = PUBLISHED.plan(4, order=1, eta=eta).steps[-1].noise
        assert (noise[0] == 0).all()
        assert (noise[1] != 0).any()


def test_without_noise_it_is_the_ode():
    plan, none = (PUBLISHED.plan(6, order=1, eta=eta) for eta in (1e-9, 0.0))
    for a, b in zip(plan.steps, none.steps, strict=True):
        np.testing.assert_allclose(a.weights[0], b.weights[0], rtol=1e-10, atol=1e-11)
        assert b.noise is None
        assert np.abs(a.noise).max() < 1e-6
    mean, noise = PUBLISHED._stochastic(0.5, 0.2, 0.0)
    np.testing.assert_array_equal(mean, PUBLISHED.root(0.2))
    assert (noise == 0).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_weak_order_one_on_normal_data(eta):
    """Covariances, without sampling."""
    cld, variance, end = PUBLISHED, 0.09, 0.01
    errors = []
    for n in (160, 320):
        times = np.linspace(1.0, math.sqrt(end), n + 1) ** 2
        plan = cld.plan(times=times, order=1, eta=eta, predicts="score")
        errors.append(np.abs(laws(plan, variance)[-1] - joint(cld, end, variance)).max())
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.15, errors
    assert errors[-1] < 0.01, errors


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"order": 3, "corrector": True}, {"order": 1, "eta": 0.7}], ids=str
)
@pytest.mark.parametrize("nfe", [1, 2, 3, 9])
def test_evaluations_are_counted(nfe, options):
    asked = []

    def watched(u, t, scale):
        assert u.shape == (2, 2, 3, 4)
        assert t.shape == (2,)
        asked.append(float(t[0]))
        return u * scale

    plan = PUBLISHED.plan(nfe, **options)
    assert plan.nfe == len(plan.evaluations) == nfe
    out = sample_cld(watched, (2, 3, 4), plan, cond={"scale": 0.5})
    assert out.shape == (2, 3, 4)
    assert bool(out.isfinite().all())
    assert asked == pytest.approx([v.t for v in plan.evaluations])
    assert asked[0] == 1.0
    assert plan.steps[-1].end.t == 0.0


def test_a_corrected_run_is_what_its_steps_say():
    """By hand, in matrices: predict, evaluate, correct, predict from there."""
    net = network(PUBLISHED, 0.2, 0.3, "noise")
    plan, u = PUBLISHED.plan(4, order=2, corrector=True), start((3, 2))
    (s0, s1, s2, s3), t = plan.steps, [torch.full((3,), v.t) for v in plan.evaluations]

    def made(step, base, weights, outputs):
        return on(step.psi, base) + sum(on(w, o) for w, o in zip(weights, outputs, strict=True))

    e0 = net(u, t[0])
    e1 = net(made(s0, u, s0.weights, [e0]), t[1])
    u1 = made(s0, u, s0.corrections, [e1, e0])
    e2 = net(made(s1, u1, s1.weights, [e1, e0]), t[2])
    u2 = made(s1, u1, s1.corrections, [e2, e1, e0])
    e3 = net(made(s2, u2, s2.weights, [e2, e1]), t[3])
    u3 = made(s2, u2, s2.corrections, [e3, e2, e1])
    assert s3.corrections is None
    want = made(s3, u3, s3.weights, [e3, e2])
    torch.testing.assert_close(plan.run(net, u), want, rtol=1e-6, atol=1e-9)


def test_runs_are_reproducible():
    net = network(PUBLISHED, 0.3, 0.2)
    plan = PUBLISHED.plan(8, order=1, eta=1.0, predicts="score")

    def drawn(n, **options):
        return sample_cld(net, (n, 3), plan, dtype=torch.float64, **options)

    whole = drawn(4, seed=7)
    assert torch.equal(whole, drawn(4, seed=7))
    assert torch.equal(whole[2:], drawn(2, seed=7, first=2))
    assert torch.equal(whole[:1], drawn(2, seed=[7, 8])[:1])
    assert not torch.equal(whole, drawn(4, seed=8))
    assert not torch.equal(whole, drawn(4, seed=7, noise=8))
    torch.testing.assert_close(
        sample_cld(net, (4, 3), plan, seed=7), whole.float(), rtol=1e-3, atol=1e-3
    )
    u = start((2, 3))
    draws = [torch.zeros_like(u) for _ in range(8)]
    silent = plan.run(net, u, noise=draws)
    draws[3] = torch.ones_like(u)
    assert not torch.equal(silent, plan.run(net, u, noise=draws))


def test_data_come_out():
    """Law of samples of one point's neighbourhood, and of a network in half precision."""
    net, plan = network(PUBLISHED, 0.5, 0.04), PUBLISHED.plan(60, order=2, predicts="score")
    x = sample_cld(net, (4000,), plan)
    assert abs(float(x.mean()) - 0.5) < 0.02
    assert abs(float(x.std()) - 0.2) < 0.015
    half = sample_cld(lambda u, t: net(u, t).half(), (5,), PUBLISHED.plan(60, predicts="score"))
    torch.testing.assert_close(half, x[:5], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CLD(beta=0.0), "beta = 0.0"),
        (lambda: CLD(mass=-1.0), "mass = -1.0"),
        (lambda: CLD(gamma=0.0), "gamma = 0.0"),
        (lambda: CLD(friction=2.0), r"friction = 2.0 with mass = 0.25.*friction = 1\)"),
        (lambda: CLD(jitter=-1e-6), "jitter = -1e-06"),
        (lambda: CLD(t_end=1.0), "t_start, t_end = 1.0, 1.0"),
        (lambda: PUBLISHED.root(0.5, "lower"), "kind = 'lower'"),
        (lambda: PUBLISHED.plan(), "nfe is missing"),
        (lambda: PUBLISHED.plan(0), "nfe = 0"),
        (lambda: PUBLISHED.plan(True), "nfe = True"),
        (lambda: PUBLISHED.plan(3, order=4), "order = 4"),
        (lambda: PUBLISHED.plan(3, eta=-1.0), "eta = -1.0"),
        (lambda: PUBLISHED.plan(3, eta=1.0), "eta = 1.0 with order = 2"),
        (lambda: PUBLISHED.plan(3, order=1, eta=1.0, root="cholesky"), "root = 'cholesky'"),
        (lambda: PUBLISHED.plan(3, predicts="v"), "predicts = 'v'"),
        (lambda: PUBLISHED.plan(3, root="R"), "root = 'R'"),
        (lambda: PUBLISHED.plan(times=[0.1, 0.5]), "falling"),
        (lambda: PUBLISHED.plan(times=[0.5, -0.1]), ">= 0"),
        (lambda: PUBLISHED.plan(times=[0.5, 1e-14, 0.0]), "at least 1e-12"),
        (lambda: PUBLISHED.plan(3, times=[0.5, 0.0]), "nfe = 3"),
        (lambda: sample_cld(network(PUBLISHED), (2, 0), PUBLISHED.plan(2)), r"shape = \(2, 0\)"),
        (lambda: sample_cld(network(PUBLISHED), (2, 3), PUBLISHED), "plan = CLD"),
        (lambda: sample_cld(None, (2, 3), PUBLISHED.plan(2)), "network = None"),
        (lambda: PUBLISHED.plan(2).run(network(PUBLISHED), torch.ones(2, 3)), r"\(2, 3\)"),
        (lambda: PUBLISHED.plan(2).run(network(PUBLISHED), torch.ones(2, 2) / 0), "NaN or inf"),
        (lambda: PUBLISHED.plan(2).run(lambda u, t: u[:, :1], torch.ones(2, 2)), "shape"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_an_answer_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match="evaluation 1 of 3"):
        PUBLISHED.plan(3).run(lambda u, t: u / 0, torch.ones(2, 2))
