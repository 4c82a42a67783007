"""Converged samples, and errors of plans against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate._teacher import Counted, Teacher, shared_errors, teach, trajectory


def model(process=None):
    return fs.exact.digits().denoiser(fs.EDM() if process is None else process)


@pytest.mark.parametrize("process", [fs.EDM(), fs.VP(), fs.Flow()], ids=repr)
def test_converged_samples_are_where_the_ode_leads(process):
    teacher = teach(model(process), (1, 8, 8), 4, dtype=torch.float64)
    level = process.level(process.t_start)
    solved = fs.exact.digits().solve(teacher.x, (level.alpha, level.sigma), (1.0, 0.0))
    # What the process itself cuts off at its end is part of its own solution.
    off = (teacher.samples - solved).square().flatten(1).mean(1).sqrt()
    assert float(off.median()) < 2e-3
    assert teacher.error < 2e-4
    assert teacher.nfe in (48, 96, 192, 384)


def test_sample_k_is_sample_k_of_a_run_whatever_the_batch():
    one = teach(model(), (1, 8, 8), 6, nfe=12, cond={"label": torch.arange(6)})
    two = teach(model(), (1, 8, 8), 6, nfe=12, cond={"label": torch.arange(6)}, batch=4)
    assert torch.equal(one.x, two.x)
    assert torch.allclose(one.samples, two.samples, atol=1e-6)
    late = teach(model(), (1, 8, 8), 2, nfe=12, first=4, cond={"label": torch.tensor([4, 5])})
    assert torch.equal(late.x, one.x[4:])
    assert torch.allclose(late.samples, one[4:].samples, atol=1e-6)
    x = fs.sample(
        model(),
        (6, 1, 8, 8),
        solver="ddim",
        nfe=5,
        progress=False,
        cond={"label": one.cond["label"]},
    )
    errors = one.errors(fs.plan("ddim", one.model, 5))
    want = (x.double() - one.samples.double()).square().flatten(1).mean(1).sqrt()
    assert np.allclose(errors, want.numpy(), rtol=1e-5)


def test_plans_that_share_evaluations_have_the_errors_they_have_alone():
    counted = Counted(model())
    teacher = teach(counted, (1, 8, 8), 5, nfe=16)
    plans = [
        fs.plan(s, teacher.model, 5, grid=g)
        for s in ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc_2", "heun", "bdia")
        for g in ("lambda", "softened")
    ]
    counted.evaluations = 0
    alone = [teacher.errors(p) for p in plans]
    spent, counted.evaluations = counted.evaluations, 0
    shared = shared_errors(teacher, plans)
    assert counted.evaluations < spent == 5 * 5 * len(plans)
    for a, b in zip(alone, shared, strict=True):
        assert np.allclose(a, b, rtol=1e-4)


def test_what_is_not_finite_has_infinite_error():
    def network(x, t):
        return torch.where(t.reshape(-1, 1) < 1.0, torch.nan, 0.0) * x

    blind = fs.Denoiser(network, fs.EDM(), "data")
    x = fs.start_noise((3, 2), 0) * 80
    teacher = Teacher(blind, x, torch.zeros(3, 2))
    assert np.isinf(teacher.errors(fs.plan("ddim", blind, 4))).all()
    with pytest.raises(ValueError, match="must agree"):
        Teacher(blind, x, torch.zeros(2, 2))


@pytest.mark.parametrize("process", [fs.EDM(), fs.Flow()], ids=repr)
def test_trajectories_pass_where_they_should(process):
    exact = fs.exact.Gaussian(np.array([0.5, -1.0]), 0.3)
    times = [float(t) for t in fs.plan("ddim", process, 4, grid="karras").times]
    level = process.level(times[0])
    x = fs.start_noise((3, 2), 0, dtype=torch.float64) * level.sigma
    states = trajectory(exact.denoiser(process), x, times)
    for t, state in zip(times, states, strict=True):
        here = process.level(t)
        want = exact.solve(x, (level.alpha, level.sigma), (here.alpha, here.sigma))
        assert torch.allclose(state, want, atol=2e-3 * max(1.0, here.sigma))
