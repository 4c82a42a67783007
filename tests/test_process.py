"""One suite over all processes: the pair, its lambda, the inverse, both ends, the range."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest

import fewstep as fs
from problems import PROCESSES

EACH = pytest.mark.parametrize("name", PROCESSES)


def interior(process: fs.Process, n: int = 401) -> np.ndarray:
    """Times over the whole range, crowded at both ends."""
    u = 0.5 - 0.5 * np.cos(np.pi * np.arange(n) / (n - 1))
    return process.t_start + u * (process.t_end - process.t_start)


@EACH
def test_lambda_is_log_alpha_over_sigma_and_grows(name):
    process = PROCESSES[name]
    t = interior(process)
    alpha, sigma, lam = process.alpha(t), process.sigma(t), process.lam(t)
    assert alpha.dtype == sigma.dtype == lam.dtype == np.float64
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lam, np.log(alpha) - np.log(sigma), rtol=1e-12, atol=1e-12)
    assert (np.diff(lam) > 0).all()
    assert (sigma > 0).all()


@EACH
def test_time_inverts_lambda(name):
    process = PROCESSES[name]
    t = interior(process)
    lam = process.lam(t)
    t, lam = t[np.isfinite(lam)], lam[np.isfinite(lam)]
    # Exact in lambda wherever a float64 time can hold it: one rounding of t moves lambda by
    # |dlambda/dt| eps |t|, which is large near alpha = 0.
    slack = np.abs(process.lam(np.nextafter(t, np.inf)) - process.lam(np.nextafter(t, -np.inf)))
    back = process.lam(process.time(lam))
    assert (np.abs(back - lam) <= 1e-12 * np.maximum(1, np.abs(lam)) + 4 * slack).all()


@EACH
def test_relative_accuracy_of_time_near_clean(name):
    process = PROCESSES[name]
    if process.t_clean is None or not math.isfinite(process.t_clean):
        return
    span = process.t_end - process.t_clean
    for fraction in (1.0, 1e-3, 1e-6):
        t = process.t_clean + fraction * (span or 1e-3)
        got = float(process.time(process.lam(t)))
        assert got - process.t_clean == pytest.approx(
            t - process.t_clean, rel=1e-9, abs=4e-16 * abs(process.t_clean)
        )


@EACH
def test_ends(name):
    process = PROCESSES[name]
    start = process.level(process.t_start)
    assert start.sigma > 0
    assert math.isfinite(start.lam) == (start.alpha > 0)
    assert process.prior_std(process.t_start) > 0
    assert math.isfinite(process.lam_start)
    if process.t_clean is not None:
        clean = process.level(process.t_clean)
        assert (clean.sigma, clean.lam) == (0.0, math.inf)
        assert math.copysign(1, clean.sigma) == 1  # prints as 0, not -0
        assert clean.alpha == pytest.approx(1.0)
        assert process.lam(process.t_end) < math.inf


@EACH
def test_level_takes_floats_and_arrays(name):
    process = PROCESSES[name]
    t = interior(process, 5)
    many = process.level(t)
    for i, s in enumerate(t):
        one = process.level(float(s))
        assert isinstance(one.alpha, float)
        # numpy's vector and scalar code paths may differ in the last bit
        for field in ("t", "alpha", "sigma", "lam"):
            assert getattr(one, field) == pytest.approx(getattr(many, field)[i], rel=1e-14)
        if math.isfinite(one.lam):
            assert one.rho == pytest.approx(one.sigma / one.alpha, rel=1e-12)


# -- against 50-digit arithmetic, at both ends ----------------------------------------------------


def _vp(p: fs.VP, t):
    b = p.beta_min * t + (mp.mpf(p.beta_max) - p.beta_min) * t**2 / 2
    return mp.exp(-b / 2), mp.sqrt(-mp.expm1(-b))


def _cosine(p: fs.CosineVP, t):
    angle = mp.pi / 2 * (t + mp.mpf(p.s)) / (1 + mp.mpf(p.s))
    alpha = mp.cos(angle) / mp.cos(mp.pi / 2 * p.s / (1 + mp.mpf(p.s)))
    return alpha, mp.sqrt(1 - alpha**2)


def _flow(p: fs.Flow, t):
    return 1 - t, t


def _ve(p: fs.VE, t):
    return mp.mpf(1), p.sigma_min * (mp.mpf(p.sigma_max) / p.sigma_min) ** t


@pytest.mark.parametrize(
    ("process", "exact"),
    [
        (fs.VP(), _vp),
        (fs.VP(beta_min=0.0, beta_max=8.0), _vp),
        (fs.CosineVP(), _cosine),
        (fs.CosineVP(s=0.0), _cosine),
        (fs.Flow(), _flow),
        (fs.VE(), _ve),
    ],
)
def test_no_cancellation_at_either_end(process, exact):
    with mp.workdps(50):
        for t in (1e-12, 1e-8, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1 - 1e-8, 1 - 1e-12):
            alpha, sigma = exact(process, mp.mpf(t))
            level = process.level(t)
            assert level.alpha == pytest.approx(float(alpha), rel=1e-13)
            assert level.sigma == pytest.approx(float(sigma), rel=1e-13)
            assert level.lam == pytest.approx(float(mp.log(alpha / sigma)), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("process", [fs.VP(), fs.CosineVP(), fs.CosineVP(s=0.0), fs.Flow()])
@pytest.mark.parametrize("lam", [-15.0, -5.0, -0.1, 0.0, 3.0, 9.0, 16.0])
def test_inverse_against_mpmath(process, lam):
    exact = {fs.VP: _vp, fs.CosineVP: _cosine, fs.Flow: _flow}[type(process)]

    def defect(t):
        alpha, sigma = exact(process, t)
        return mp.log(alpha / sigma) - lam

    with mp.workdps(50):
        got = mp.mpf(float(process.time(lam)))
        step = defect(got) / mp.diff(defect, got, h=got * mp.mpf(10) ** -20)  # Newton's, from got
        assert abs(step) < 2e-14 * got


def test_discrete_tables_are_the_published_ones():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    with mp.workdps(50):
        product, alphas, sigmas = mp.mpf(1), [], []
        for beta in betas:
            product *= 1 - mp.mpf(float(beta))
            alphas.append(float(mp.sqrt(product)))
            sigmas.append(float(mp.sqrt(1 - product)))
    process = fs.DiscreteVP.scaled_linear()
    t = np.arange(1000.0)
    np.testing.assert_allclose(process.alpha(t), alphas, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t), sigmas, rtol=1e-12)
    # figures everybody quotes for Stable Diffusion
    assert process.level(999.0).rho == pytest.approx(14.6146, abs=1e-4)
    assert process.level(0.0).rho == pytest.approx(0.0292, abs=1e-4)


def test_zero_terminal_snr_keeps_the_first_level_and_zeroes_the_last():
    plain = fs.DiscreteVP.scaled_linear()
    scaled = plain.zero_terminal_snr()
    assert scaled.alpha(999.0) == 0.0
    assert scaled.sigma(999.0) == 1.0
    assert scaled.alpha(0.0) == pytest.approx(float(plain.alpha(0.0)), rel=1e-14)
    assert 0 < scaled.alpha(998.5) < scaled.alpha(998.0)


def test_beta_of_one_gives_zero_terminal_snr():
    assert fs.DiscreteVP.from_betas([0.1, 0.5, 1.0]).alpha(2.0) == 0.0


def test_knots_are_where_the_table_bends():
    process = fs.DiscreteVP.from_alphas_cumprod([0.9, 0.5, 0.1])
    knots = process.knots(float(process.lam(1.5)), float(process.lam(-0.5)))
    np.testing.assert_allclose(np.sort(knots), process.lam(np.array([1.0, 0.0])))
    assert len(fs.VP().knots(-5.0, 5.0)) == 0


def test_flow_shift_moves_nodes_and_nothing_else():
    shifted = fs.Flow(shift=3.0)
    u = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(shifted.unwarp(shifted.warp(u)), u, rtol=1e-14)
    np.testing.assert_allclose(fs.Flow(shift=1 / 3).warp(shifted.warp(u)), u, rtol=1e-14)
    plain = fs.Flow()
    np.testing.assert_allclose(shifted.lam(shifted.warp(u)), plain.lam(u) - math.log(3), atol=1e-13)
    np.testing.assert_array_equal(shifted.sigma(u), plain.sigma(u))
    grid = fs.plan("ddim", shifted, 4, grid="uniform").times
    np.testing.assert_allclose(grid, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-15)


def test_flow_shift_for_tokens():
    assert fs.Flow.for_tokens(256).shift == pytest.approx(math.exp(0.5))
    assert fs.Flow.for_tokens(4096).shift == pytest.approx(math.exp(1.15))


def test_custom_agrees_with_the_process_it_copies():
    vp = fs.VP()
    mine = fs.Custom(vp.alpha, vp.sigma, t_start=1.0, t_end=1e-3, t_clean=0.0, lam=vp.lam)
    lam = np.linspace(float(vp.lam(1.0)), 8.0, 100)
    np.testing.assert_allclose(mine.time(lam), vp.time(lam), rtol=1e-13)
    assert mine.prior_std(1.0) == pytest.approx(float(vp.sigma(1.0)))
    named = fs.Custom(vp.alpha, vp.sigma, t_start=1.0, t_end=1e-3, prior_std=1.5)
    assert named.prior_std(1.0) == 1.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fs.VP(beta_min=3.0, beta_max=1.0), "beta_min = 3.0"),
        (lambda: fs.VP(t_start=1e-3, t_end=1.0), "noisier end"),
        (lambda: fs.VP(t_end=0.0), "t_end = 0.0 has sigma = 0"),
        (lambda: fs.VP(t_end=-0.1), "must be >= 0"),
        (lambda: fs.CosineVP(s=2.0), "s = 2.0"),
        (lambda: fs.CosineVP(t_start=1.5), r"must be in \[0, 1\]"),
        (lambda: fs.EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min = 2.0"),
        (lambda: fs.VE(sigma_min=0.0), "sigma_min = 0"),
        (lambda: fs.Flow(shift=0.0), "shift = 0.0"),
        (lambda: fs.Flow(t_start=2.0), r"must be in \[0, 1\]"),
        (lambda: fs.Flow.for_tokens(0), "tokens = 0"),
        (lambda: fs.Flow.for_tokens(9, low=(5, 1.0), high=(5, 2.0)), "must differ"),
        (lambda: fs.DiscreteVP.from_betas([0.1, -0.2]), "betas"),
        (lambda: fs.DiscreteVP.from_betas([0.1, 0.2, 1.0, 1.0]), "fall strictly"),
        (lambda: fs.DiscreteVP.from_alphas_cumprod([0.5, 0.9]), "fall strictly"),
        (lambda: fs.DiscreteVP.from_alphas_cumprod([1.0, 0.5]), "alphas_cumprod"),
        (lambda: fs.DiscreteVP((-0.5,)), "at least 2 levels"),
        (
            lambda: fs.Custom(lambda t: t, lambda t: 1 - t, t_start=0.9, t_end=0.1),
            "lambda = log",
        ),
        (
            lambda: fs.Custom(
                lambda t: 1 - t, lambda t: t + 0.1, t_start=1.0, t_end=0.1, t_clean=0.0
            ),
            "exactly 0",
        ),
        (lambda: fs.Custom(lambda t: -t, lambda t: t, t_start=1.0, t_end=0.1), "alpha"),
        (lambda: fs.Custom(lambda t: 1 - t, lambda t: t, t_start=0.5, t_end=0.5), "different"),
        (
            lambda: fs.Custom(lambda t: 1 - t, lambda t: t, t_start=0.5, t_end=0.7, t_clean=0.0),
            "between",
        ),
    ],
)
def test_a_bad_process_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
