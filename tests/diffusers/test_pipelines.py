"""fewstep's scheduler inside the pipelines that diffusers ships."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", minversion="0.33")
pytest.importorskip("transformers")

import diffusers as hf
from agreement import (
    CASES,
    DDIM,
    DPMPP,
    FLOW_EULER,
    FROM_IMAGES,
    ROUNDING,
    UNIPC,
    Same,
    compared,
    distance,
    ours,
)
from pipelines import Tiny, pipelines

import fewstep as fs
from fewstep.diffusers import Scheduler

pytestmark = [
    # torch tensors in NumPy 2, inside diffusers
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver:FutureWarning"),
]

SOLVERS = ("dpmpp_2m", "unipc_2", "heun", "pndm", "sde_dpmpp_2m", "flow_ipndm_2")


def evaluations(name: str, steps: int) -> int:
    """What a pipeline runs of the steps that it is asked for."""
    return int(steps * 0.6) if name in FROM_IMAGES else steps


# -------------------------------------------------------------------------------- every pipeline


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", list(pipelines))
def test_runs_and_spends_what_was_asked_for(name: str, solver: str) -> None:
    tiny = pipelines[name]()
    tiny.scheduled(Scheduler.from_config(tiny.pipe.scheduler.config, solver=solver))
    for steps in (5, 8):
        assert torch.isfinite(tiny(steps)).all()
        assert tiny.calls == evaluations(name, steps) * tiny.per_step


@pytest.mark.slow
@pytest.mark.parametrize("name", list(pipelines))
def test_every_solver_runs(name: str) -> None:
    tiny = pipelines[name]()
    config = tiny.pipe.scheduler.config
    for solver in fs.solvers:
        tiny.scheduled(Scheduler.from_config(config, solver=solver))
        for steps in (2, 7):
            assert torch.isfinite(tiny(steps)).all(), solver
            assert tiny.calls == evaluations(name, steps) * tiny.per_step, solver


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_agrees(name: str, case: Same) -> None:
    assert compared(pipelines[name](), case)[1] < ROUNDING


@pytest.mark.parametrize("name", ["kandinsky22", "ddpm"])
def test_unipc_runs_where_theirs_does_not(name: str) -> None:
    """Theirs does not take the generator that these pipelines pass."""
    tiny = pipelines[name]()
    theirs = UNIPC.theirs(tiny)
    with pytest.raises(TypeError, match="generator"):
        tiny.scheduled(theirs)(5)
    assert torch.isfinite(tiny.scheduled(ours(theirs, "unipc_2"))(5)).all()


def test_agrees_at_times_between_the_trained_ones() -> None:
    """Euler's and Heun's linspace. Their noise there is sigma_max, not hypot(1, sigma_max)."""
    tiny = pipelines["sd"]()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for kind, solver in ((hf.EulerDiscreteScheduler, "ddim"), (hf.HeunDiscreteScheduler, "heun")):
        theirs = Same(kind, solver, {"timestep_spacing": "linspace"}).theirs(tiny)
        expected = tiny.scheduled(theirs)(6, latents=noise)
        nodes = list(dict.fromkeys(theirs.timesteps.tolist()))
        assert nodes != [round(t) for t in nodes]
        top = float(theirs.sigmas[0])
        tiny.scheduled(ours(theirs, solver))
        found = tiny(None, timesteps=nodes, latents=noise * top / np.hypot(1, top))
        assert distance(found, expected) < ROUNDING


# ----------------------------------------------------------------------------- flows and audio


@pytest.mark.parametrize("name", ["flux", "ltx"])
def test_dynamic_shift_follows_the_resolution(name: str) -> None:
    tiny = pipelines[name]()
    compared(tiny, FLOW_EULER)
    small = tiny.times
    tiny = pipelines[name]()
    tiny.call.update(height=64, width=64)
    assert compared(tiny, FLOW_EULER)[1] < ROUNDING
    assert tiny.times[1] > small[1]


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_a_given_clock_is_shifted_once(name: str) -> None:
    tiny = pipelines[name]()
    theirs = hf.FlowMatchEulerDiscreteScheduler(shift=3.0)
    clock = np.linspace(1, 1 / 6, 6).tolist()
    expected = tiny.scheduled(theirs)(6, sigmas=clock)
    assert distance(tiny.scheduled(ours(theirs, "ddim"))(6, sigmas=clock), expected) < ROUNDING


def test_unipc_agrees_in_a_flow() -> None:
    """Theirs starts just below 1: from 1 itself our first rows would have no history."""
    tiny = pipelines["sana"]()
    theirs = UNIPC.theirs(tiny)
    expected = tiny.scheduled(theirs)(6)
    nodes = theirs.timesteps.tolist()
    assert nodes[0] < 1000
    found = tiny.scheduled(ours(theirs, "unipc_2"))(None, timesteps=nodes)
    assert distance(found, expected) < ROUNDING


def test_stable_audio_s_own_scheduler_is_read_right() -> None:
    """It has no deterministic form, so what is compared is what it makes of the network's input
    and output."""
    pytest.importorskip("torchsde")  # theirs needs it to be made
    theirs = hf.CosineDPMSolverMultistepScheduler()
    mine = ours(theirs, "ddim")
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    assert mine.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    noise, output = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    for t, u, sigma in zip(theirs.timesteps, mine.timesteps, theirs.sigmas, strict=False):
        x = sigma * noise
        scaled = theirs.scale_model_input(x, t)
        assert distance(mine.scale_model_input(x, u), scaled) < ROUNDING
        data = theirs.convert_model_output(output, sample=x)
        theirs._step_index += 1
        assert distance(mine.step(output, u, x).pred_original_sample, data) < ROUNDING


# --------------------------------------------------------------------------- what users do


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpm_solver_2"])
@pytest.mark.parametrize("strength", [0.17, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_strength(name: str, strength: float, solver: str) -> None:
    """The share of the evaluations, from the entry of `timesteps` where the pipeline begins; for a
    two-stage solver that may be inside a step."""
    tiny = pipelines[name]()
    theirs = DPMPP.theirs(tiny)
    tiny.scheduled(ours(theirs, solver))
    for steps in (6, 7):
        expected = int(steps * strength)
        found = tiny(steps, strength=strength)
        assert torch.isfinite(found).all()
        assert tiny.calls == expected
        assert tiny.times == sorted(set(tiny.times), reverse=True)
        if solver == "dpmpp_2m":
            tiny.scheduled(theirs)
            assert distance(found, tiny(steps, strength=strength)) < ROUNDING
            tiny.scheduled(ours(theirs, solver))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", [DDIM, DPMPP, UNIPC], ids=str)
def test_callbacks_see_every_step_and_edit_latents(case: Same, in_place: bool) -> None:
    tiny = pipelines["sd"]()
    theirs = case.theirs(tiny)
    seen: list[int] = []

    def edit(pipe: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        if step != 2:
            return {}
        latents = given["latents"]
        return {"latents": latents.mul_(0.9) if in_place else latents * 0.9}

    plain = tiny.scheduled(ours(theirs, case.solver))(6)
    found = tiny(6, callback_on_step_end=edit)
    assert seen == list(range(6))
    assert distance(found, plain) > 0.05
    expected = tiny.scheduled(theirs)(6, callback_on_step_end=edit)
    if case is UNIPC:  # their corrector goes back to the state before the edit
        assert distance(found, plain) > 2 * distance(expected, plain)
    else:
        assert distance(found, expected) < ROUNDING


def test_a_callback_that_changes_nothing_changes_no_bit() -> None:
    tiny = pipelines["sd"]()
    tiny.scheduled(Scheduler.from_config(tiny.pipe.scheduler.config, solver="dpmpp_3m"))
    plain = tiny(6)
    copied = tiny(6, callback_on_step_end=lambda p, i, t, kw: {"latents": kw["latents"].clone()})
    assert torch.equal(plain, copied)


def test_custom_timesteps_and_sigmas_are_kept() -> None:
    tiny = pipelines["sdxl"]()
    tiny.scheduled(Scheduler.from_config(tiny.pipe.scheduler.config, solver="dpmpp_2m"))
    for times in ([999, 700, 450, 200, 50], [998.25, 701.5, 333.3, 20.75]):
        tiny(None, timesteps=times)
        np.testing.assert_array_equal(tiny.times, np.float32(times))
        np.testing.assert_array_equal(tiny.pipe.scheduler.timesteps.numpy(), np.float32(times))
    sigmas = [14.5, 6.0, 2.5, 1.0, 0.3]
    tiny(None, sigmas=sigmas)
    np.testing.assert_array_equal(tiny.pipe.scheduler.sigmas.numpy(), np.float32([*sigmas, 0]))
    path = fs.DiscreteVP.scaled_linear()
    np.testing.assert_allclose(path.level(np.array(tiny.times)).rho, sigmas, rtol=1e-5)
    tiny = pipelines["sd3"]()  # its shift of 3 is not for them
    tiny.scheduled(Scheduler.from_config(tiny.pipe.scheduler.config, solver="dpmpp_2m"))
    tiny(None, sigmas=[1.0, 0.9, 0.55, 0.2])
    np.testing.assert_array_equal(tiny.times, [1000.0, 900.0, 550.0, 200.0])


@pytest.mark.parametrize("kept", ["solver", "recipe"])
def test_schedulers_are_saved_with_their_pipeline(tmp_path: Path, kept: str) -> None:
    tiny = pipelines["sd"]()
    config = tiny.pipe.scheduler.config
    if kept == "recipe":
        gaussian = fs.exact.Gaussian(np.zeros((4, 16, 16)), 0.25)
        model = gaussian.denoiser(fs.DiscreteVP.scaled_linear(), "noise")
        recipe = fs.calibrate(
            model,
            (4, 16, 16),
            nfe=4,
            noises=(8, 8, 8),
            methods=["learned"],
            first_step=False,
            progress=False,
        )
        scheduler = Scheduler.from_config(config, recipe=recipe)
    else:
        scheduler = Scheduler.from_config(config, solver="unipc_2", grid="karras")
    found = tiny.scheduled(scheduler)(4)
    tiny.pipe.save_pretrained(tmp_path)
    again = hf.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert isinstance(again.scheduler, Scheduler)
    assert torch.equal(Tiny(again, tiny.call, again.unet)(4), found)
    alone = Scheduler.from_pretrained(tmp_path / "scheduler")
    assert torch.equal(tiny.scheduled(alone)(4), found)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_eight_threads_share_a_pipeline(name: str) -> None:
    tiny = pipelines[name]()
    config = tiny.pipe.scheduler.config
    if name == "sd":  # a fast tokenizer cannot be shared by threads, whatever the scheduler
        text = tiny.pipe.encode_prompt("a red cat", "cpu", 1, True)
        del tiny.call["prompt"]
        tiny.call.update(prompt_embeds=text[0], negative_prompt_embeds=text[1])
    tiny.scheduled(Scheduler.from_config(config, solver="unipc_2"))
    jobs = [(seed, 4 + seed % 3) for seed in range(16)]
    alone = [tiny(steps, seed) for seed, steps in jobs]
    together: dict[int, Tensor] = {}
    barrier = threading.Barrier(8)

    def work(mine: list[tuple[int, int]]) -> None:
        barrier.wait()
        for seed, steps in mine:
            generator = torch.Generator().manual_seed(seed)
            call = {"num_inference_steps": steps, "generator": generator, **tiny.call}
            together[seed] = tiny.pipe(**call)[0]

    threads = [threading.Thread(target=work, args=(jobs[i::8],)) for i in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for seed, expected in enumerate(alone):
        assert torch.equal(together[seed], expected)


def test_digits_come_out_of_a_ddpm_pipeline() -> None:
    """Real pictures: sample k is the digit k, and few steps of a good solver are near the end of
    many, nearer than diffusers' own."""
    tiny = pipelines["ddpm"]()
    config = tiny.pipe.scheduler.config
    tiny.scheduled(Scheduler.from_config(config, solver="ddim", grid="config"))
    converged = tiny(500)
    tiny.scheduled(Scheduler.from_config(config))
    found = tiny(10)
    assert tiny.calls == 10
    theirs = tiny.scheduled(DPMPP.theirs(tiny))(10)
    assert distance(found, converged) < distance(theirs, converged) / 2
    data = fs.exact.digits()
    scores = [data.log_density(2 * found - 1, 1.0, 0.1, label=label) for label in range(10)]
    assert torch.stack(scores).argmax(0).tolist() == list(range(10))
