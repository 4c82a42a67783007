"""Runs that start elsewhere than their process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from problems import PROCESSES, Mixture, in_turn, network_for, run

MIXTURE = Mixture()


@pytest.mark.parametrize("name", PROCESSES)
def test_all_ways_to_name_a_start_agree(name):
    process = PROCESSES[name]
    final = "min" if process.t_clean is None else "zero"
    middle = 0.5 * (process.lam_start + float(process.lam(process.t_end)))
    t = float(process.time(middle))
    t = float(np.round(t)) if process.integer_times else t
    level = process.level(t)
    starts = [t, {"t": t}, {"rho": level.rho}, {"lambda": level.lam}, {"sigma": level.sigma}]
    plans = [fs.plan("ddim", process, 5, start=start, final=final) for start in starts]
    for plan in plans:
        assert plan.nfe == 5
        assert plan.levels[0].lam == pytest.approx(level.lam, abs=1e-9)
        assert (np.diff([v.lam for v in plan.levels]) > 0).all()
        np.testing.assert_allclose(plan.times, plans[0].times, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "grid"), in_turn(3, PROCESSES, fs.grids))
def test_strength_is_a_share_of_the_grid(name, grid):
    """With n steps in all, strength k / n leaves k: the level of node n - k."""
    process = PROCESSES[name]
    final = "min" if process.t_clean is None else "zero"
    arguments = {"grid": grid, "final": final}
    if fs.grids[grid].discrete and not process.integer_times:
        with pytest.raises(ValueError, match="grid = "):
            fs.plan("ddim", process, 4, **arguments, start={"strength": 0.4})
        return
    if grid == "leading":  # it never evaluates its first time
        with pytest.raises(ValueError, match="does not begin where it is told to"):
            fs.plan("ddim", process, 4, **arguments, start={"strength": 0.4})
        return
    whole = fs.plan("ddim", process, 10, **arguments)
    part = fs.plan("ddim", process, 4, **arguments, start={"strength": 0.4})
    assert part.nfe == 4
    # the nodes of a fine grid and a coarse one of the same name nearly coincide
    lam = [v.lam for v in whole.levels]
    assert lam[5] < part.levels[0].lam < lam[min(7, len(lam) - 2)] + 1e-9
    assert part.times[-1] == whole.times[-1]
    full = fs.plan("ddim", process, 4, **arguments, start={"strength": 1.0})
    assert full.times[0] == pytest.approx(process.t_start)


def test_image_to_image():
    """From data with noise added, down again: the samples stay near what they came from, nearer
    the less noise was added; the exact noise level is the one asked for."""
    process = fs.VP()
    model = network_for(process, "noise", MIXTURE.denoise)
    data = torch.from_numpy(MIXTURE.means[0] + MIXTURE.std[0] * MIXTURE.start(2000))
    gaps = []
    for start in ({"strength": 0.2}, {"strength": 0.5}, {"strength": 0.9}):
        x = fs.add_noise(model, data, start, seed=3)
        plan = fs.plan("dpmpp_2m", model, 6, start=start)
        level = plan.levels[0]
        noise = (x - level.alpha * data) / level.sigma
        assert float(noise.std()) == pytest.approx(1.0, abs=0.03)
        out = fs.sample(model, solver=plan, x=x, progress=False)
        direct = fs.sample(model, solver="dpmpp_2m", nfe=6, start=start, x=x, progress=False)
        assert torch.equal(out, direct)
        gaps.append(float((out - data).square().mean()))
    assert gaps[0] < gaps[1] < gaps[2]


def test_noise_of_a_start_depends_on_the_sample_alone():
    data = torch.ones(4, 3)
    whole = fs.add_noise(fs.EDM(), data, {"sigma": 2.0}, seed=5)
    part = fs.add_noise(fs.EDM(), data[:2], {"sigma": 2.0}, seed=5, first=2)
    assert torch.equal(whole[2:], part)
    assert whole.dtype == torch.float32
    assert fs.add_noise(fs.EDM(), data.half(), 2.0).dtype == torch.float32


def test_upward_from_a_level():
    """Inversion from an image that still has noise, to the noise at the top."""
    process = fs.EDM()
    plan = fs.plan("dpmpp_2m", process, 7, start={"sigma": 0.05}, upward=True)
    assert plan.times[0] == pytest.approx(0.05)
    assert plan.times[-1] == process.t_start
    model = network_for(process, "data", MIXTURE.denoise)
    with pytest.raises(ValueError, match=r"x is missing; this run starts at t = 0\.05"):
        fs.sample(model, (2, 3), nfe=7, start={"sigma": 0.05}, upward=True)
    x = torch.from_numpy(MIXTURE.start(2)) * 0.3
    noise = fs.sample(model, nfe=300, x=x, upward=True, solver="ab4", grid="lambda", progress=False)
    back = fs.sample(
        model, nfe=300, x=noise, solver="ab4", grid="lambda", final="min", progress=False
    )
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


def test_upward_to_no_signal():
    """To alpha = 0: the last step is DDIM's limit, finite."""
    process = fs.Flow()
    for solver in ("ddim", "dpmpp_2m", "flow_ab2", "v_ab3", "noise_ab2"):
        plan = fs.plan(solver, process, 6, upward=True)
        assert plan.levels[-1].alpha == 0
        assert np.isfinite(run(plan, MIXTURE.denoise, MIXTURE.start(3))).all()


def test_a_list_upward_is_in_the_order_of_the_run():
    times = [0.1, 0.4, 0.9]
    plan = fs.plan("ddim", fs.Flow(), grid=times, upward=True)
    assert plan.times.tolist() == times
    with pytest.raises(ValueError, match="goes back toward noise"):
        fs.plan("ddim", fs.Flow(), grid=times)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"sigmas": 1.0}, "start = 'sigmas' is not known; did you mean 'sigma'"),
        ({"sigma": 1.0, "t": 2.0}, "give one of t, sigma"),
        ({"strength": 0.0}, r"strength is in \(0, 1\]"),
        ({"strength": 1.5}, r"strength is in \(0, 1\]"),
        ({"rho": -1.0}, "need sigma / alpha > 0"),
        ({"sigma": 500.0}, "accepted: sigma from"),
        ({"t": 500.0}, "accepted: t from 80 to 0.002"),
        (float("nan"), "finite number"),
        ("top", "finite number"),
    ],
)
def test_bad_starts(start, words):
    with pytest.raises(ValueError, match=words):
        fs.plan("ddim", fs.EDM(), 4, start=start)
    with pytest.raises(ValueError, match="the list says where it starts"):
        fs.plan("ddim", fs.EDM(), grid=[3.0, 1.0], start=2.0)


def test_noise_of_ones_own():
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    process = fs.VP()
    level = process.level(0.4)
    noised = fs.add_noise(process, x, 0.4, noise=eps)
    torch.testing.assert_close(noised, level.alpha * x + level.sigma * eps)
    with pytest.raises(ValueError, match="noise is \\(3, 2\\)"):
        fs.add_noise(process, x, 0.4, noise=eps.T)
    with pytest.raises(ValueError, match="noise is int"):
        fs.add_noise(process, x, 0.4, noise=3)


def test_a_list_upward_from_no_noise_is_refused():
    with pytest.raises(ValueError, match="begins at sigma = 0"):
        fs.plan("ddim", fs.VP(), grid=[0.0, 0.5], upward=True)
