"""Recipes of pipelines: calibrated on the pipeline, and used in it."""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers as hf
from diffusers.configuration_utils import register_to_config
from pipelines import Tiny, pipelines

import fewstep as fs
from fewstep.diffusers import Scheduler
from fewstep.diffusers import _pipeline as module
from fewstep.diffusers._pipeline import calibrate, denoiser

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning"),
]
PROMPTS = ["a cat", "a dog", "red house"]


def smooth() -> Tiny:
    """Stable Diffusion whose network does not change with time, on latents of 4 x 4."""
    tiny = pipelines["sd"]()
    with torch.no_grad():
        tiny.network.time_embedding.linear_1.weight.zero_()
    config = tiny.pipe.scheduler.config
    tiny.scheduled(
        hf.DDIMScheduler.from_config(
            config, prediction_type="v_prediction", set_alpha_to_one=True, clip_sample=False
        )
    )
    return tiny


CALL = {"guidance_scale": 3.0, "height": 8, "width": 8}
QUICK = {"methods": ("learned",), "noises": (8, 4, 8), "progress": False}


def off(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1).sqrt()


@pytest.fixture(scope="module")
def made() -> tuple[Tiny, fs.Recipe]:
    tiny = smooth()
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # for time: fewer to compare with, and to start from
        patch.setattr("fewstep._calibrate._calibrate._SOLVERS", ("ddim", "dpmpp_2m", "flow_pc2"))
        patch.setattr("fewstep._calibrate._calibrate._GRIDS", ("softened",))
        return tiny, calibrate(tiny.pipe, PROMPTS, nfe=2, **CALL, **QUICK)


def test_a_calibrated_pipeline_is_closer_to_the_converged_one(made: Any) -> None:
    tiny, recipe = made
    assert recipe.chosen(2).kind == "learned"
    assert recipe.info["jacobian"] == "reverse"
    assert recipe.info["network"] == "UNet2DConditionModel of StableDiffusionPipeline"
    generator = torch.Generator().manual_seed(7)
    count = 12
    x = torch.randn(count, 4, 4, 4, generator=generator)
    prompts = [PROMPTS[i % 3] for i in range(count)]

    def run(nfe: int, **how: Any) -> Tensor:
        tiny.scheduled(Scheduler.from_config(tiny.pipe.scheduler.config, **how))
        call = {**CALL, "prompt": prompts, "latents": x, "output_type": "latent"}
        return tiny.pipe(**call, num_inference_steps=nfe)[0]

    converged = run(96, solver="unipc_3", grid="lambda")
    mine = off(run(2, recipe=recipe), converged)
    plain = [c.name.split(" on ") for c in recipe.candidates if c.kind == "solver"]
    best = min(
        float(off(run(2, solver=solver, grid=grid), converged).median()) for solver, grid in plain
    )
    assert float(mine.median()) < best / 2
    # The pipeline runs the plan that was fitted.
    model = denoiser(tiny.pipe, **CALL)
    here = fs.sample(model, x=x, solver=recipe, cond={"prompt": prompts}, progress=False)
    torch.testing.assert_close(run(2, recipe=recipe), here, rtol=1e-4, atol=1e-4)


def test_a_recipe_is_for_its_guidance_and_its_network(made: Any) -> None:
    tiny, recipe = made
    other = denoiser(tiny.pipe, **{**CALL, "guidance_scale": 7.5}, prompt="a cat")
    with pytest.raises(ValueError, match=r"guidance scale 7.5, where the recipe is for .* 3.0"):
        fs.sample(other, (1, *other.shape), solver=recipe)
    trained = smooth()
    with torch.no_grad():
        for parameter in trained.network.parameters():
            parameter.mul_(1.01)
    model = denoiser(trained.pipe, **CALL, prompt="a cat")
    with pytest.raises(ValueError, match="another network"):
        fs.sample(model, (1, *model.shape), solver=recipe)


class Elementwise(hf.ModelMixin, hf.ConfigMixin):
    """A network that costs nothing, of pictures of any size."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 4) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> Any:
        u = t.reshape(-1, *(1 for _ in x.shape[1:])) / 1000
        return hf.models.unets.unet_2d.UNet2DOutput(sample=u * torch.tanh(self.scale * x))


def large(side: int) -> Any:
    scheduler = hf.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    return hf.DDPMPipeline(Elementwise(side), scheduler)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `fewstep.calibrate` is told."""
    known: dict[str, Any] = {}

    def record(model: Any, shape: Any, nfe: Any, **options: Any) -> Any:
        known.update(options, model=model, shape=shape, nfe=nfe)
        return fs.Recipe({}, (), "", "", [], tuple(shape), {})

    record.__signature__ = module.inspect.signature(fs.calibrate)  # pyright: ignore
    monkeypatch.setattr(module, "calibrate_model", record)
    return known


@pytest.mark.parametrize("side", [8, 64, 256, 512])
@pytest.mark.parametrize("jacobian", ["reverse", "differences"])
def test_noises_are_as_many_as_fit(side: int, jacobian: str, told: dict[str, Any]) -> None:
    memory, nfe = 5.0, (4, 8)
    calibrate(large(side), nfe=nfe, memory=memory, jacobian=jacobian)
    n, m, test = told["noises"]
    state, b = 4 * 4 * side**2 / 2**30, told["batch"]
    assert (m, test) == (n // 2, n)
    assert b * 4 * side**2 <= max(2**17, 4 * side**2)

    def bound(n: int) -> float:
        c = 4 * 8**2 if jacobian == "differences" else 3 * 8 + 3
        return state * ((6 * 8 + 50) * n + c * b)

    assert bound(n) <= memory
    assert n == 256 or bound(n + 1) > memory


def test_too_little_memory_is_said(told: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"memory = 0.1 GiB is too little .* give memory = 3\.\d"):
        calibrate(large(512), nfe=8, memory=0.1, jacobian="reverse")
    with pytest.raises(ValueError, match=r"noises = \(64, 32, 64\) of shape \(4, 64, 64\)"):
        calibrate(large(64), nfe=8, memory=0.1, noises=(64, 32, 64))
    assert not told


def test_options_go_where_they_belong(told: dict[str, Any]) -> None:
    tiny = smooth()
    calibrate(tiny.pipe, PROMPTS, nfe=4, seed=3, **CALL)
    assert (told["seed"], told["cond"], told["shape"]) == (3, {"prompt": PROMPTS}, (4, 4, 4))
    assert told["jacobian"] == "reverse"
    assert told["first_step"] is False
    assert told["model"].guidance[0]["scale"] == 3.0
    calibrate(tiny.pipe, {"prompt": PROMPTS, "negative_prompt": ["snow"] * 3}, nfe=4)
    assert set(told["cond"]) == {"prompt", "negative_prompt"}
    tiny.pipe.to(torch.bfloat16)
    calibrate(tiny.pipe, PROMPTS, nfe=4)
    assert told["jacobian"] == "differences"
    with pytest.raises(ValueError, match="guidance = 3: the pipeline says so"):
        calibrate(tiny.pipe, PROMPTS, guidance=3)
    with pytest.raises(ValueError, match="prompts = 'a cat'; need a list"):
        calibrate(tiny.pipe, "a cat")


@pytest.mark.parametrize(
    ("name", "size", "want"),
    [
        ("flux", {"height": 80, "width": 80}, "scalar"),  # packed: (400, 16)
        ("ltx", {"height": 96, "width": 96}, "scalar"),
        ("wan", {"height": 128, "width": 192, "num_frames": 9}, None),  # (4, 3, 16, 24)
        ("sd", {"height": 80, "width": 80}, None),
    ],
)
def test_statistics_share_what_a_channel_is(
    name: str, size: dict[str, int], want: str | None, told: dict[str, Any]
) -> None:
    tiny = pipelines[name]()
    call = {k: v for k, v in tiny.call.items() if k not in ("output_type", *size)}
    calibrate(tiny.pipe, nfe=4, **call, **size)
    assert told.get("reduction") == want
    assert math.prod(told["shape"]) > 4096


def test_statistics_of_a_video_pipeline_per_channel() -> None:
    tiny = pipelines["wan"]()
    with torch.no_grad():  # random networks turn with every unit of time: too fast to difference
        tiny.network.condition_embedder.time_embedder.linear_1.weight.zero_()
    call = {k: v for k, v in tiny.call.items() if k != "output_type"}
    model = denoiser(tiny.pipe, **call)
    options: dict[str, Any] = {"reduction": "channel", "levels": 4, "lam": (-2.0, 2.0), "batch": 4}
    options["progress"] = False
    data = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(0))
    forward = fs.estimate_ems(model, data, **options)
    assert forward.size == (4, 1, 1, 1)
    differences = fs.estimate_ems(model, data, derivative="difference", **options)
    np.testing.assert_allclose(forward.l, differences.l, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads the peak from /proc")
def test_memory_holds_whatever_the_size_and_the_prompts() -> None:
    def peak() -> float:
        with open("/proc/self/status") as lines:
            return next(int(v.split()[1]) for v in lines if v.startswith("VmHWM")) / 2**20

    options: dict[str, Any] = {"methods": ("learned",), "progress": False, "jacobian": "reverse"}
    calibrate(large(2), nfe=3, noises=(8, 4, 8), budget=1, **options)
    memory = 0.15
    for side in (32, 64, 96):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = peak()
        recipe = calibrate(large(side), nfe=3, memory=memory, budget=20, **options)
        assert recipe.info["noises"][0] < 256 or side == 32
        assert peak() - before <= memory


@pytest.mark.slow
def test_digits_of_a_calibrated_ddpm_pipeline() -> None:
    tiny = pipelines["ddpm"]()
    # Its label is the place in the batch: every part begins at a multiple of ten.
    options: dict[str, Any] = {"noises": (120, 60, 120), "batch": 60, "methods": ("learned",)}
    recipe = calibrate(tiny.pipe, nfe=6, budget=90, progress=False, **options)

    def run(nfe: int, **how: Any) -> Tensor:
        tiny.scheduled(Scheduler.from_config(tiny.pipe.scheduler.config, **how))
        generator = torch.Generator().manual_seed(5)
        call = {"batch_size": 60, "generator": generator, "output_type": "np"}
        return torch.from_numpy(np.asarray(tiny.pipe(**call, num_inference_steps=nfe).images))

    converged = run(192, solver="unipc_3", grid="lambda")
    mine = off(run(6, recipe=recipe), converged)
    plain = [c.name.split(" on ") for c in recipe.candidates if c.kind == "solver"]
    errors = [off(run(6, solver=s, grid=g), converged) for s, g in plain]
    assert float(mine.median()) < min(float(e.median()) for e in errors) / 2
    rms = [float(e.square().mean().sqrt()) for e in (mine, *errors)]
    assert rms[0] < min(rms[1:]) / 1.5
