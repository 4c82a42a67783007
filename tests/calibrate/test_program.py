"""Every deterministic plan is a program, and every program a plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate._program import Space, answered, plan_of, program_of

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
