"""Every convention: its scalars, and exact conversion between all pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from problems import PROCESSES

PAIRS = list(itertools.product(fs.predictions, fs.predictions))


def outputs(level: fs.Level, x0: float, eps: float, sd: float = 0.5) -> dict[str, float]:
    """What each network would say, from the definitions rather than the library's table."""
    a, s = level.alpha, level.sigma
    x = a * x0 + s * eps
    rho = s / a if a else math.inf
    if a:
        skip, out = sd**2 / (rho**2 + sd**2), rho * sd / math.sqrt(rho**2 + sd**2)
        edm = (x0 - skip * x / a) / out
    else:
        edm = x0 / sd
    return {
        "noise": eps,
        "data": x0,
        "v": a * eps - s * x0,
        "flow": eps - x0,
        "score": -eps / s,
        "edm": edm,
    }


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(PROCESSES)),
    where=st.floats(0.0, 1.0),
    x0=st.floats(-3, 3),
    eps=st.floats(-3, 3),
)
def test_conversions_between_all_pairs_are_exact(name, where, x0, eps):
    process = PROCESSES[name]
    level = process.level(process.t_start + where * (process.t_end - process.t_start))
    x = level.alpha * x0 + level.sigma * eps
    said = outputs(level, x0, eps)
    for source, target in PAIRS:
        if level.alpha == 0 and fs.predictions[source].needs_signal:
            with pytest.raises(ValueError, match="alpha = 0"):
                fs.convert(said[source], x, level, source, target)
            continue
        got = fs.convert(said[source], x, level, source, target)
        # Rounding of the source is amplified by |d target / d source|, and of x likewise.
        p, q, _, _ = fs.predictions[source].scalars(level)
        u, w = fs.predictions[target].from_data(level)
        size = abs(w * q * said[source]) + (abs(w * p) + abs(u)) * max(abs(x), 1e-300)
        size += (abs(w) + abs(u)) * (abs(x0) + abs(eps))
        if source == "edm":  # its reference above subtracts c_skip x
            size *= 1 + level.alpha / level.sigma
        assert got == pytest.approx(said[target], rel=1e-12, abs=1e-13 * size + 1e-300)


@pytest.mark.parametrize("name", sorted(fs.predictions))
def test_data_prediction_from_four_scalars(name):
    for process in PROCESSES.values():
        t = process.t_start + 0.4 * (process.t_end - process.t_start)
        level = process.level(t)
        x = level.alpha * 0.3 + level.sigma * -1.2
        p, q, c_in, c_noise = fs.predictions[name].scalars(level)
        assert p * x + q * outputs(level, 0.3, -1.2)[name] == pytest.approx(0.3, abs=1e-11)
        if name == "edm":
            assert c_in == pytest.approx(1 / math.hypot(level.sigma, 0.5 * level.alpha))
            assert c_noise == pytest.approx(math.log(level.rho) / 4, abs=1e-12)
        else:
            assert (c_in, c_noise) == (1.0, t)


def test_scalars_of_arrays_are_those_of_each_entry():
    level = fs.VP().level(np.array([0.2, 0.5, 0.9]))
    for prediction in fs.predictions.values():
        many = prediction.scalars(level)
        for i, t in enumerate((0.2, 0.5, 0.9)):
            one = prediction.scalars(fs.VP().level(t))
            np.testing.assert_allclose([m[i] for m in many], one, rtol=1e-13)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (None, 0.3),
        ("t", 0.3),
        ("sigma", 0.3),
        ("rho", 0.3 / 0.7),
        ("lambda", math.log(0.7 / 0.3)),
        ("edm", math.log(0.3 / 0.7) / 4),
        (1000.0, 300.0),
        (lambda level: 1 - level.t, 0.7),
    ],
)
def test_what_the_network_is_told(time, expected):
    denoiser = fs.Denoiser(lambda x, t: x, fs.Flow(), "flow", time=time)
    c_noise = denoiser.prediction.scalars(fs.Flow().level(0.3))[3]
    assert c_noise == pytest.approx(expected, rel=1e-14)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"predicts = 'nois' .* did you mean 'noise'"):
        fs.Denoiser(lambda x, t: x, fs.VP(), "nois")
    with pytest.raises(ValueError, match=r"time = 'sigm' .* did you mean 'sigma'"):
        fs.Denoiser(lambda x, t: x, fs.VP(), "noise", time="sigm")
    with pytest.raises(ValueError, match="sigma_data = -1"):
        fs.edm(-1)
    with pytest.raises(ValueError, match="sigma > 0"):
        fs.convert(1.0, 1.0, fs.VP().level(0.0), "data", "noise")


def test_score_is_refused_where_noise_and_data_are_coupled():
    coupled = fs.Flow(independent=False)
    with pytest.raises(ValueError, match="there is no score"):
        fs.Denoiser(lambda x, t: x, coupled, "score")
    fs.Denoiser(lambda x, t: x, coupled, "flow")


@pytest.mark.parametrize("name", ["flow", "vp", "edm", "cosine"])
def test_velocity_of_any_path(name):
    """dx/dt of a path, by its formula, and the score and the data that it means."""
    t = 0.4
    process, rates = {
        "flow": (fs.Flow(), lambda t: (-1.0, 1.0)),
        "edm": (fs.EDM(), lambda t: (0.0, 1.0)),
        "cosine": (
            fs.CosineVP(s=0.0),
            lambda t: tuple(
                0.5 * math.pi * f for f in (-math.sin(math.pi * t / 2), math.cos(math.pi * t / 2))
            ),
        ),
        "vp": (fs.VP(), lambda t: _vp_rates(fs.VP().level(t))),
    }[name]
    h = 1e-6
    da, ds = ((float(f(t + h)) - float(f(t - h))) / (2 * h) for f in (process.alpha, process.sigma))
    assert rates(t) == pytest.approx((da, ds), rel=1e-7, abs=1e-9)
    level, D, e = process.level(t), 0.3, -1.2
    x = level.alpha * D + level.sigma * e
    u = rates(t)[0] * D + rates(t)[1] * e
    kind = fs._prediction.velocity(rates)
    assert fs.convert(u, x, level, kind, "data") == pytest.approx(D, rel=1e-12)
    assert fs.convert(u, x, level, kind, "score") == pytest.approx(-e / level.sigma, rel=1e-12)
    assert fs.convert(D, x, level, "data", kind) == pytest.approx(u, rel=1e-12)


def _vp_rates(level: fs.Level) -> tuple[float, float]:
    beta = 0.1 + 19.9 * level.t
    return -0.5 * beta * level.alpha, 0.5 * beta * level.alpha**2 / level.sigma
