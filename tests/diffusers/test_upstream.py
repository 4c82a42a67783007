"""Where diffusers' own schedulers are wrong: each test shows theirs failing and ours passing.

The network is exact for Gaussian data and answers at the time it is told, so every error here is
the scheduler's. A test that fails on theirs alone means that diffusers has repaired it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", minversion="0.33")


import diffusers as hf

import fewstep as fs
from fewstep.diffusers import Scheduler

# torch tensors in NumPy 2, inside diffusers
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
MULTISTEP = {
    hf.DPMSolverMultistepScheduler: "dpmpp_2m",
    hf.DEISMultistepScheduler: "noise_ab2",
    hf.UniPCMultistepScheduler: "unipc_2",
}

EXACT = fs.exact.Gaussian(np.full(16, 0.3), np.geomspace(0.02, 1.0, 16))
NOISE = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True)
class Run:
    """told: what the network was told; moved: the largest change of the last step; error: relative
    to the exact solution from the same noise."""

    told: list[float]
    moved: float
    error: float


def path_of(config: Any) -> tuple[fs.Process, str, float]:
    """The process, what the network predicts, and what it is told, per unit of time."""
    if config.get("use_flow_sigmas") or "shift" in config:
        return fs.Flow(), "flow", 1000.0
    if config["beta_schedule"] == "squaredcos_cap_v2":
        return fs.DiscreteVP.squared_cosine(), "noise", 1.0
    return fs.DiscreteVP.scaled_linear(), "noise", 1.0


def run(scheduler: Any, steps: int | None, **given: Any) -> Run:
    """The loop of a pipeline around the exact network."""
    path, predicts, scale = path_of(scheduler.config)
    network = EXACT.denoiser(path, predicts, time=scale if scale != 1 else None).network
    if steps is None:
        scheduler.set_timesteps(**given)
    else:
        scheduler.set_timesteps(steps, **given)
    x = NOISE * getattr(scheduler, "init_noise_sigma", 1.0)
    told, before = [], x
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled, t.double().expand(len(x)))
        before, x = x, scheduler.step(output, t, x).prev_sample
        told.append(float(t))
    start = path.level(told[0] / scale)
    exact = EXACT.solve(NOISE, (start.alpha, start.sigma), (1.0, 0.0))
    return Run(told, float((x - before).abs().max()), _relative(x, exact))


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def ours(theirs: Any, solver: str) -> Scheduler:
    return Scheduler.from_config(theirs.config, solver=solver, grid="config")


def mismatch(scheduler: Any, steps: int) -> float:
    """The largest relative difference of the noise level used and the one the network is told."""
    path, _, scale = path_of(scheduler.config)
    scheduler.set_timesteps(steps)
    told = path.level(scheduler.timesteps.double().numpy() / scale)
    used = scheduler.sigmas[:-1].double().numpy()
    level = told.sigma if isinstance(path, fs.Flow) else told.rho
    return float(np.max(np.abs(used / level - 1)))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_deis_throws_its_last_evaluation_away(spacing: str) -> None:
    theirs = hf.DEISMultistepScheduler(**SCALED_LINEAR, **{spacing: True})
    wasted = run(theirs, 10)
    assert wasted.moved == 0
    good = run(ours(theirs, "noise_ab2"), 10)
    assert len(good.told) == 10
    assert good.moved > 1e-3
    assert good.error < 1.1 * wasted.error


def test_deis_leaves_noise_in_flows() -> None:
    """The same waste, but the last evaluation is far from the data: ours goes on from the same
    nodes to the end."""
    theirs = hf.DEISMultistepScheduler(**FLOW)
    wasted = run(theirs, 20)
    assert wasted.moved == 0
    assert float(theirs.sigmas[-1]) > 0.1
    nodes = (1000 * theirs.sigmas[:-1]).tolist()
    assert run(ours(theirs, "noise_ab2"), None, timesteps=nodes).error < wasted.error / 3


@pytest.mark.parametrize(
    ("kind", "config", "solver"),
    [
        (hf.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, "ddim"),
        (hf.PNDMScheduler, {"skip_prk_steps": True}, "plms"),
    ],
)
def test_the_last_evaluation_without_an_offset(
    kind: Any, config: dict[str, Any], solver: str
) -> None:
    """With steps_offset = 0 the last evaluation is at the level where the run ends."""
    theirs = kind(**SCALED_LINEAR, **config)
    wasted = run(theirs, 10)
    assert wasted.moved < 1e-15
    good = run(ours(theirs, solver), len(wasted.told))
    assert good.told == wasted.told
    assert good.moved > 1e-3


@pytest.mark.parametrize("kind", list(MULTISTEP))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_cosine_betas_break_the_spacings(kind: Any, spacing: str) -> None:
    theirs = kind(**COSINE, **{spacing: True})
    for steps in (10, 40):
        with pytest.raises((IndexError, AssertionError)):
            run(theirs, steps)
        good = run(ours(theirs, MULTISTEP[kind]), steps)
        assert len(set(good.told)) == steps
    assert good.error < 0.1


@pytest.mark.parametrize("kind", list(MULTISTEP))
def test_beta_spacing_repeats_times(kind: Any) -> None:
    """Cut to whole numbers, and then looked up: 40 steps of Stable Diffusion's betas fail."""
    theirs = kind(**SCALED_LINEAR, use_beta_sigmas=True)
    with pytest.raises((IndexError, AssertionError)):
        run(theirs, 40)
    assert run(ours(theirs, MULTISTEP[kind]), 40).error < 0.02


def test_flow_euler_shifts_twice() -> None:
    theirs = hf.FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = np.linspace(1, 1e-3, 4)
    shifted = 1000 * 3 * u / (1 + 2 * u)
    assert run(theirs, 4).told[-1] > 2.9 * shifted[-1]
    assert run(ours(theirs, "ddim"), 4).told == pytest.approx(shifted, rel=1e-6)


def test_flow_euler_alters_custom_timesteps() -> None:
    """They are told to the network as given, and used shifted."""
    theirs = hf.FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = np.linspace(1000, 20, 50).tolist()
    wrong = run(theirs, None, timesteps=times)
    good = run(ours(theirs, "dpmpp_2m"), None, timesteps=times)
    assert good.told == wrong.told == pytest.approx(times, abs=1e-4)
    assert wrong.error > 0.05
    assert good.error < wrong.error / 10


@pytest.mark.parametrize("kind", list(MULTISTEP))
@pytest.mark.parametrize("spacing", [*SPACINGS, "use_flow_sigmas"])
def test_told_times_are_not_those_used(kind: Any, spacing: str) -> None:
    """The network is told a whole number near, or below, the time that is used."""
    config = FLOW if spacing == "use_flow_sigmas" else {**SCALED_LINEAR, spacing: True}
    theirs = kind(**config)
    assert mismatch(theirs, 20) > 2e-3
    assert mismatch(ours(theirs, MULTISTEP[kind]), 20) < 1e-6


def test_truncation_bounds_the_error() -> None:
    """On the same nodes ours converges; theirs stays where truncation puts it."""
    theirs = hf.UniPCMultistepScheduler(**FLOW)
    stuck = run(theirs, 320).error
    nodes = (1000 * theirs.sigmas[:-1]).tolist()
    assert run(ours(theirs, "unipc_2"), None, timesteps=nodes).error < stuck / 2


@pytest.mark.parametrize("steps", [2, 5, 10])
@pytest.mark.parametrize(
    ("config", "solver"),
    [({"lower_order_final": False}, "unipc_2"), ({"solver_type": "bh1"}, "unipc_2_bh1")],
)
def test_unipc_at_sigma_zero(config: dict[str, Any], solver: str, steps: int) -> None:
    """Without a lower order at the end, and with B(h) = h even with it: theirs divides by zero, or
    multiplies with infinity."""
    theirs = hf.UniPCMultistepScheduler(**SCALED_LINEAR, **config)
    assert not np.isfinite(run(theirs, steps).error)
    assert run(ours(theirs, solver), steps).error < 1


def test_unipc_of_order_three() -> None:
    theirs = hf.UniPCMultistepScheduler(**SCALED_LINEAR, solver_order=3, lower_order_final=False)
    with pytest.raises(RuntimeError, match="singular"):
        run(theirs, 5)
    assert run(ours(theirs, "unipc_3"), 5).error < 0.5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_of_few_steps(steps: int) -> None:
    theirs = hf.PNDMScheduler(**SCALED_LINEAR)
    with pytest.raises(ValueError, match="broadcast"):
        run(theirs, steps)
    good = run(Scheduler.from_config(theirs.config, solver="pndm"), steps)
    assert len(good.told) == steps
    assert good.error < 1


@pytest.mark.parametrize("betas", [SCALED_LINEAR, COSINE])
def test_heun_of_two_steps(betas: dict[str, Any]) -> None:
    """From pure noise straight to almost none: worse than not to sample. The method asks for it on
    these nodes, so what ours has to offer for the three evaluations is another solver."""
    theirs = hf.HeunDiscreteScheduler(**betas)
    bad = run(theirs, 2)
    assert len(bad.told) == 3
    assert bad.error > 10
    assert run(Scheduler.from_config(theirs.config), 3).error < 0.3
