"""Every deterministic plan is a program, and every program a plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate._jacobian import Machine
from fewstep._calibrate._program import (
    Space,
    answered,
    banded,
    plan_of,
    principal,
    program_of,
)

torch.set_num_threads(1)

MIXTURE = fs.exact.Mixture([0.4, 0.6], [[-1.0, 0.5], [0.7, 0.2]], [0.05, 0.1])
MODELS = {
    "edm": MIXTURE.denoiser(fs.EDM(), "data"),
    "vp": MIXTURE.denoiser(fs.VP(), "noise"),
    "cosine": MIXTURE.denoiser(fs.CosineVP(), "v"),
    "flow": MIXTURE.denoiser(fs.Flow(), "flow"),
    "table": MIXTURE.denoiser(fs.DiscreteVP.scaled_linear(), "noise"),
    "ve": MIXTURE.denoiser(fs.VE(), "data", "lambda"),
}
DETERMINISTIC = [name for name, solver in fs.solvers.items() if not solver.stochastic]


def _noise(model: fs.Model, count: int = 5) -> torch.Tensor:
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z * model.process.prior_std(model.process.t_start)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_every_solver_is_a_program(solver: str) -> None:
    model = MODELS["vp"]
    run = fs.plan(solver, model, 5)
    if run.given != 1 or run.basis is not None:
        with pytest.raises(ValueError, match="plan: "):
            program_of(run)
        return
    program = program_of(run)
    again = plan_of(program, model)
    x = _noise(model)
    before, after = (fs.sample(model, solver=p, x=x) for p in (run, again))
    assert again.nfe == run.nfe
    assert torch.allclose(after, before, rtol=1e-11, atol=1e-11 * program.gain)
    same = program_of(again)
    assert np.allclose(same.a, program.a, atol=1e-13)
    assert np.allclose(same.b, program.b, atol=1e-13)
    assert np.array_equal(same.times, program.times)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_step", [False, True])
def test_learned_plans_run_everywhere(name: str, first_step: bool, tmp_path) -> None:
    """Saved, fused, and at levels that are not those of the states, in float32 and float64."""
    model = MODELS[name]
    program = program_of(fs.plan("ipndm_3", model, 5))
    if first_step:
        program = answered(program, np.array([0.1, 0.3]))
        program.a[0] *= 0.9
    else:  # the first call is told another time than that of pure noise
        lam = model.process.lam_start + 0.5
        program.times[0] = np.round(model.process.time(lam)) if model.rounds else (
            model.process.time(lam)
        )  # fmt: skip
    run = plan_of(program, model)
    assert run.nfe == program.nfe == (4 if first_step else 5)
    run.save(tmp_path / "plan.safetensors")
    loaded = fs.Plan.load(tmp_path / "plan.safetensors")
    assert loaded == run
    x = _noise(model)
    want = fs.sample(model, solver=run, x=x)
    assert torch.equal(fs.sample(model, solver=loaded, x=x), want)
    assert torch.allclose(fs.sample(model, solver=run.fuse(), x=x), want, rtol=1e-9, atol=1e-9)
    *_, last = fs.steps(model, solver=run, x=x, hook=lambda D, level: D)
    assert torch.allclose(last.x, want, rtol=1e-9, atol=1e-9)
    short = fs.sample(model, (3, 2), solver=run, seed=3)
    assert short.dtype == torch.float32
    assert bool(short.isfinite().all())
    if first_step:
        back = program_of(run)
        assert np.allclose(np.outer(back.c, back.mean), np.outer(program.c, program.mean))


def test_an_answered_first_step_is_the_mean_in_place_of_an_evaluation() -> None:
    model = MODELS["edm"]
    run = fs.plan("ipndm_3", model, 4, grid="karras")
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
    got = plan_of(answered(program_of(run), mean.numpy()), model)
    state = run.start(_noise(model))
    state = state.advance(mean.expand(5, 2))  # the network predicts data here
    while not state.done:
        state = state.advance(model.output(*state.query(), state.level, {}))
    assert torch.allclose(fs.sample(model, solver=got, x=_noise(model)), state.x, atol=1e-11)
    with pytest.raises(ValueError, match="free already"):
        answered(answered(program_of(run), mean.numpy()), mean.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_vectors_and_programs_are_the_same(name: str) -> None:
    model = MODELS[name]
    program = program_of(fs.plan("unipc_3", model, 4))
    space = Space(model.process, 4, model.rounds)
    vector = space.vector(program)
    assert len(vector) == space.size
    back = space.program(vector, program)
    assert np.array_equal(back.times, program.times)
    assert np.array_equal(back.a, program.a)
    assert np.array_equal(back.b, program.b)
    assert vector[space.place("b", 3, 1)] == program.b[3, 1]
    assert vector[space.place("a", 4)] == program.a[4]
    if model.rounds:
        vector[:4] += 0.01
        times = space.program(vector, program).times
        assert np.array_equal(times, np.round(times))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 2), (1,)])
def test_bands_are_principal_directions_in_order(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    scales = torch.linspace(3, 0.1, size, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    samples = torch.randn(5000, size, generator=source, dtype=torch.float64) * scales + 2
    bands = principal(samples.reshape(-1, *shape), 3)
    if size == 1:
        assert bands is None
        return
    assert bands is not None
    assert bands.count == 3
    assert list(bands.index) == sorted(bands.index)
    rank = len(bands.index) - 1
    assert (bands.index[:-1] < 2).all()
    assert bands.basis.columns is not None
    assert np.abs(np.diag(bands.basis.columns[:rank])).min() > 0.9
    spread = bands.spread(np.array([[1.0, 2.0, 3.0]]))
    assert spread.shape == (1, rank + size)
    assert (spread[0, rank:] == 3).all()
    for few in (1, 2, 3):  # no more than the samples know
        known = principal(samples[:few].reshape(-1, *shape), 5)
        assert known is None or len(known.index) <= few


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_step", [False, True])
def test_plans_with_bands(name: str, first_step: bool, tmp_path) -> None:
    """The same numbers in every band change nothing; others run as the program says."""
    model = MODELS[name]
    program = program_of(fs.plan("ipndm_3", model, 5))
    if first_step:
        program = answered(program, np.array([0.1, 0.3]))
    bands = principal(torch.tensor([[1.0, 0.9], [-1.0, -0.8], [0.1, -0.1]]), 2)
    assert bands is not None
    wide, x = banded(program, bands), _noise(model)
    want = fs.sample(model, solver=plan_of(program, model), x=x)
    got = fs.sample(model, solver=plan_of(wide, model), x=x)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9 * program.gain)
    space = Space(model.process, wide.nfe, model.rounds, bands)
    vector = space.vector(wide)
    assert len(vector) == space.size
    vector[wide.nfe :] *= 1 + 0.1 * np.random.default_rng(0).normal(size=len(vector) - wide.nfe)
    if not first_step:
        vector[list(space.places("a", 0))] = 1.0
    moved = space.program(vector, wide)
    assert moved.b[3, 1, 1] == vector[space.place("b", 3, 1) + 1]
    assert np.array_equal(space.vector(moved), vector)
    run = plan_of(moved, model)
    run.save(tmp_path / "plan.safetensors")
    assert fs.Plan.load(tmp_path / "plan.safetensors") == run
    want = Machine(model).run(moved, x, {}).result
    assert torch.allclose(fs.sample(model, solver=run, x=x), want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(want, got, rtol=1e-3, atol=1e-3)


def test_what_is_no_program_is_refused() -> None:
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = MODELS["edm"]
    plans = [
        fs.plan("ddpm_ancestral" if "ddpm_ancestral" in fs.solvers else next(
            n for n, s in fs.solvers.items() if s.stochastic), model, 4),
        fs.begin_analytically("ddim", model, 4, std=np.array([0.5, 0.7]), mean=data.mean(0)),
    ]  # fmt: skip
    for run in plans:
        with pytest.raises(ValueError, match="plan: "):
            program_of(run)
