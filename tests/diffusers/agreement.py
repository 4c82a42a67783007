"""Where a scheduler of diffusers and a solver of fewstep are the same method on the same nodes.

Left out, because theirs is wrong there: test_upstream.py. Left out, because it differs by design:
rounded Karras times, a start from sigma_max instead of hypot(1, sigma_max), or from t = 1 - 1e-6
instead of 1, noise that is not that of the clipped data prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers as hf
from pipelines import Tiny, pipelines
from torch import Tensor

from fewstep.diffusers import Scheduler

#: Relative to the largest element. diffusers computes its tables in float32; typical is 1e-6.
ROUNDING = 2e-5

FROM_IMAGES = ("sd_img2img", "sdxl_img2img", "sdxl_inpaint")
FLOWS = ("sd3", "flux", "sana", "wan", "ltx")
#: What belongs to the model, and stays when another scheduler is put in.
KEPT = (
    *("beta_start", "beta_end", "beta_schedule", "steps_offset", "prediction_type"),
    *("use_flow_sigmas", "flow_shift", "shift", "shift_terminal"),
    *("use_dynamic_shifting", "base_shift", "max_shift"),
    *("sigma_min", "sigma_max", "sigma_data"),
)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@dataclass(frozen=True)
class Same:
    """A scheduler of theirs, by class and settings, that makes `steps`, and our solver."""

    kind: Any
    solver: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 6

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.config.items() if v is not False)
        return f"{self.kind.__name__.removesuffix('Scheduler')}({given})"

    def theirs(self, tiny: Tiny) -> Any:
        """For this pipeline's network."""
        accepted, model = self.kind().config, tiny.pipe.scheduler.config
        kept = {k: model[k] for k in KEPT if k in model and k in accepted}
        flow = kept.get("use_flow_sigmas")
        return (told_exactly(self.kind) if flow else self.kind)(**{**kept, **self.config})


def told_exactly(kind: Any) -> Any:
    """A flow scheduler of theirs that tells the network the times that it uses, not whole numbers
    below them (see test_upstream.py)."""

    class Exact(kind):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    return Exact


def ours(theirs: Any, solver: str, **changes: Any) -> Scheduler:
    return Scheduler.from_config(theirs.config, solver=solver, grid="config", **changes)


DDIM = Same(hf.DDIMScheduler, "ddim", {"clip_sample": False})
EULER = Same(hf.EulerDiscreteScheduler, "ddim", {"timestep_spacing": "leading"})
DPMPP = Same(hf.DPMSolverMultistepScheduler, "dpmpp_2m")
UNIPC = Same(hf.UniPCMultistepScheduler, "unipc_2")
FLOW_EULER = Same(hf.FlowMatchEulerDiscreteScheduler, "ddim")
#: Below 15 steps theirs lowers the order at the end as it does at sigma = 0.
SETTINGS = (
    Same(DDIM.kind, "ddim", {"clip_sample": False, "prediction_type": "v_prediction"}),
    Same(DDIM.kind, "ddim", {"clip_sample": False, "prediction_type": "sample"}),
    Same(
        DDIM.kind,
        "ddim",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        5,
    ),
    Same(DPMPP.kind, "dpmpp_2m", {"prediction_type": "v_prediction"}),
    Same(DPMPP.kind, "dpmpp_2m", {"timestep_spacing": "leading"}),
    Same(DPMPP.kind, "dpmpp_2m", {"timestep_spacing": "trailing"}),
    Same(DPMPP.kind, "dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2"}),
    Same(DPMPP.kind, "dpmpp_2m", {"thresholding": True}),
    Same(DPMPP.kind, "dpmpp_2m_heun", {"solver_type": "heun"}),
    Same(DPMPP.kind, "ddim", {"solver_order": 1}),
    Same(DPMPP.kind, "dpmpp_3m_shipped", {"solver_order": 3}, 15),
    Same(
        DPMPP.kind,
        "dpm_solver_2m",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        15,
    ),
    Same(UNIPC.kind, "unipc_1", {"solver_order": 1}),
    Same(UNIPC.kind, "unipc_3", {"solver_order": 3}),
    Same(UNIPC.kind, "unipc_2_bh1", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 15),
    Same(hf.PNDMScheduler, "pndm"),
    Same(hf.PNDMScheduler, "plms", {"skip_prk_steps": True}),
)


def same(name: str) -> Iterator[Same]:
    """What is the same in this pipeline."""
    if name in ("flux", "ltx"):
        yield FLOW_EULER
    elif name in FLOWS:
        yield Same(FLOW_EULER.kind, "ddim", {"shift": 1.0})
        if name == "sd3":
            yield Same(hf.FlowMatchHeunDiscreteScheduler, "flow_heun", {"shift": 1.0})
        else:
            yield DPMPP  # UniPC: see test_unipc_agrees_in_a_flow
    elif name == "stable_audio":
        for schedule in ("exponential", "karras"):
            for kind, solver in (
                (hf.EDMDPMSolverMultistepScheduler, "dpmpp_2m"),
                (hf.EDMEulerScheduler, "ddim"),
            ):
                yield Same(kind, solver, {"sigma_schedule": schedule})
    else:
        yield from (DDIM, DPMPP)
        if name not in ("kandinsky22", "dit", "ddpm"):  # these do not scale noise and input
            yield EULER
        if name not in ("kandinsky22", "ddpm"):  # these pass a generator, which UniPC refuses
            yield UNIPC
        if name == "sd":
            yield from SETTINGS


def compared(tiny: Tiny, case: Same) -> tuple[int, float]:
    """Evaluations of a run, the same in both, and how far ours ends from theirs.

    AssertionError where the network is not called as often, or told other times."""
    theirs = case.theirs(tiny)
    expected = tiny.scheduled(theirs)(case.steps)
    calls, told = tiny.calls, tiny.times
    # where they count steps of several evaluations (Heun, PNDM), we count evaluations
    asked = case.steps if "strength" in tiny.call else calls // tiny.per_step
    found = tiny.scheduled(ours(theirs, case.solver))(asked)
    assert tiny.calls == calls
    for ours_told, theirs_told in zip(tiny.times, told, strict=True):
        assert abs(ours_told - theirs_told) <= 1e-6 * max(1.0, theirs_told)
    return calls // tiny.per_step, distance(found, expected)


CASES = [(name, case) for name in pipelines for case in same(name)]
