"""A pipeline as a model."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers as hf
from pipelines import Tiny, pipelines

import fewstep as fs
from fewstep.diffusers import Scheduler
from fewstep.diffusers import _pipeline as module
from fewstep.diffusers._config import described
from fewstep.diffusers._pipeline import PipelineDenoiser, denoiser

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*len.prompt. != len.image.:FutureWarning"),
]

#: Arguments of a run, which a model has none of.
RUN = ("strength", "output_type", "batch_size")
PACKED = {"flux": (64, 16), "ltx": (192, 8)}


def made(tiny: Tiny, **changes: Any) -> PipelineDenoiser:
    call = {k: v for k, v in tiny.call.items() if k not in RUN}
    return denoiser(tiny.pipe, **{**call, **changes})


def noise(model: PipelineDenoiser, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(seed))


def recorded(tiny: Tiny, steps: int = 3) -> list[tuple[Tensor, float, Tensor]]:
    """A run of the pipeline with diffusers' own scheduler: what its network was shown, what it was
    told, and what came out, guided."""
    scheduler, shown, out = tiny.pipe.scheduler, [], []
    step = scheduler.step
    if scale := getattr(scheduler, "scale_model_input", None):

        def scaled(sample: Tensor, *args: Any) -> Tensor:
            shown.append(scale(sample, *args))
            return shown[-1]

        scheduler.scale_model_input = scaled

    @functools.wraps(step)
    def stepped(output: Tensor, t: Any, sample: Tensor, *args: Any, **more: Any) -> Any:
        out.append((shown.pop() if shown else sample, float(t), output))
        return step(output, t, sample, *args, **more)

    scheduler.step = stepped
    tiny(steps)
    for name in ("step", "scale_model_input"):
        vars(scheduler).pop(name, None)
    assert out
    return out


def asked(model: PipelineDenoiser, x: Tensor, told: float, config: Any, **cond: Any) -> Tensor:
    level = model.process.level(described(config, model.network.mu).time_of(told))
    kind = torch.int64 if model.rounds else torch.float32
    return model.output(x, torch.full((len(x),), told).to(kind), level, cond)


@pytest.mark.parametrize("name", pipelines)
def test_answers_what_the_pipeline_hears_in_its_own_loop(name: str) -> None:
    tiny = pipelines[name]()
    batch = tiny.call.get("batch_size", 1)
    model = made(tiny)
    assert model.shape == PACKED.get(name, model.shape)
    for shown, told, heard in recorded(tiny):
        assert shown.shape[1:] == model.shape
        x = shown[:batch].clone()
        answer = asked(model, x, told, tiny.pipe.scheduler.config)
        want = heard[:batch, : x.shape[1]]
        torch.testing.assert_close(answer, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    tiny.calls = 0
    asked(model, x, told, tiny.pipe.scheduler.config)
    assert tiny.calls == tiny.per_step


def test_a_learned_variance_is_dropped() -> None:
    """Kandinsky leaves it to a scheduler that says it wants it, and drops it for others."""
    tiny = pipelines["kandinsky22"]()
    plain = made(tiny)
    config = tiny.pipe.scheduler.config
    tiny.scheduled(hf.DDPMScheduler.from_config(config, variance_type="learned_range"))
    learned = made(tiny)
    x = noise(plain)
    assert torch.equal(plain(x, 500), learned(x, 500))


@pytest.mark.parametrize("name", ["sd", "flux", "wan", "stable_audio"])
def test_samples_are_those_of_the_pipeline_with_the_same_solver(name: str) -> None:
    tiny = pipelines[name]()
    model = made(tiny)
    x = noise(model, 1)
    scheduler = Scheduler.from_config(tiny.pipe.scheduler.config, solver="dpmpp_2m", grid="lambda")
    tiny.scheduled(scheduler)
    there = tiny(4, latents=x)
    plan = scheduler.plan
    mine = fs.sample(model, x=x * plan.prior_std, solver=plan, progress=False)
    assert model.conditions == (1 if name == "flux" else 2)
    torch.testing.assert_close(mine, there, rtol=0, atol=2e-5 * float(there.abs().max()))


def test_conditions_are_per_sample() -> None:
    tiny = pipelines["sd"]()
    model = denoiser(tiny.pipe, guidance_scale=4.0)
    x, t = noise(model, 3), 500
    cond = {"prompt": ["a cat", "a red dog", "house"], "negative_prompt": ["snow", "", "blue"]}
    together = model(x, t, **cond)
    for i in range(3):
        alone = model(x[i : i + 1], t, **{k: [v[i]] for k, v in cond.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    one = model(x, t, prompt="a cat")
    torch.testing.assert_close(one[:1], model(x[:1], t, prompt=["a cat"]), rtol=1e-4, atol=1e-4)
    assert (one[1:] - together[1:]).abs().max() > 1e-2
    embeds = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(3))
    both = model(x, t, prompt_embeds=embeds, negative_prompt=[""] * 3)
    one = model(x[1:2], t, prompt_embeds=embeds[1:2], negative_prompt=[""])
    torch.testing.assert_close(both[1:2], one, rtol=1e-4, atol=1e-4)


def test_arguments_become_one_per_sample() -> None:
    each, one = module._each, torch.ones(1, 2)
    assert each("negative_prompt_2", "snow", 2) == ["snow"] * 2
    assert each("class_labels", [4], 3) == [4] * 3
    assert each("prompt", ["a", "b"], 2) == ["a", "b"]
    assert each("pooled_prompt_embeds", one, 3).shape == (3, 2)
    # None of samples: one entry per adapter, one for all, a number, a picture.
    adapters = [one]
    assert each("ip_adapter_image_embeds", adapters, 3) is adapters
    assert each("system_prompt", "draw", 2) == "draw"
    assert each("num_images_per_prompt", 1, 2) == 1
    assert each("image", one, 3) is one
    assert each("negative_prompt", None, 3) is None


def test_guidance_of_the_pipeline_is_that_of_fewstep() -> None:
    """Two ways to the same: inside the pipeline, and around it."""
    tiny = pipelines["sd"]()
    inside = denoiser(tiny.pipe, guidance_scale=4.0)
    bare = denoiser(tiny.pipe, guidance_scale=1.0)
    around = fs.Guided(bare, 4.0, {"prompt": ""})
    assert (inside.conditions, bare.conditions, around.conditions) == (2, 1, 2)
    assert bare.guidance == []
    assert inside.guidance == [{"scale": 4.0, "interval": [0.0, None], "rescale": 0.0}]
    x, cond = noise(inside), {"prompt": ["a cat", "a dog"]}
    torch.testing.assert_close(inside(x, 300, **cond), around(x, 300, **cond), rtol=1e-4, atol=1e-4)


def test_guidance_of_its_own_counts_where_nothing_is_asked_twice() -> None:
    model = made(pipelines["flux"](), guidance_scale=2.0)
    assert (model.conditions, model.guidance[0]["scale"]) == (1, 2.0)


def test_inversion_leads_back() -> None:
    model = made(pipelines["wan"]())
    x = fs.sample(model, (2, *model.shape), solver="unipc_2", nfe=60, final="min", progress=False)
    noise = fs.sample(model, x=x, solver="unipc_2", nfe=60, upward=True, progress=False)
    back = fs.sample(model, x=noise, solver="unipc_2", nfe=60, final="min", progress=False)
    assert float((back - x).norm()) < 0.02 * float((noise - x).norm())


@pytest.mark.parametrize("name", ["sd", "flux", "ddpm"])
def test_samples_at_different_times_are_asked_in_turn(name: str) -> None:
    tiny = pipelines[name]()
    model = made(tiny)
    if name == "ddpm":  # there the picture depends on the place in the batch
        tiny.network.forward = lambda x, t: hf.models.unets.unet_2d.UNet2DOutput(
            sample=x * t[:, None, None, None]
        )
    x = noise(model, 4)
    t = [model.process.t_end + s * (model.process.t_start - model.process.t_end)
         for s in (0.9, 0.3, 0.9, 0.6)]  # fmt: skip
    alone = torch.cat([model(x[i : i + 1], t[i]) for i in range(4)])
    torch.testing.assert_close(model(x, torch.tensor(t)), alone, rtol=1e-4, atol=1e-4)


def test_the_pipeline_is_left_as_it_was() -> None:
    tiny = pipelines["sd"]()
    pipe = tiny.pipe
    pipe.scheduler.set_timesteps(7)
    before = dict(vars(pipe)), dict(vars(pipe.scheduler)), torch.random.get_rng_state()
    model = denoiser(pipe, guidance_scale=3.0)
    fs.sample(model, (1, *model.shape), nfe=2, cond={"prompt": ["a cat"]}, progress=False)
    for then, now in zip(before[:2], (vars(pipe), vars(pipe.scheduler)), strict=True):
        assert then.keys() == now.keys()
        assert all(then[k] is now[k] for k in then)
    assert torch.equal(before[2], torch.random.get_rng_state())
    hooks = [p._forward_pre_hooks for p in pipe.components.values() if hasattr(p, "forward")]
    assert [len(h) for h in hooks] == [int(h is tiny.network._forward_pre_hooks) for h in hooks]


def test_threads_share_a_model() -> None:
    model = denoiser(pipelines["sd"]().pipe, guidance_scale=3.0)
    words = ["a", "cat", "dog", "house", "in", "the", "snow", "red"]
    found: dict[str, Tensor] = {}

    def one(word: str, into: dict[str, Tensor]) -> None:
        cond = {"prompt": [word]}
        into[word] = fs.sample(model, (1, *model.shape), nfe=3, cond=cond, progress=False)

    threads = [threading.Thread(target=one, args=(word, found)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone: dict[str, Tensor] = {}
    for word in words:
        one(word, alone)
        assert torch.equal(found[word], alone[word])


def test_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = pipelines["sd"]()
    model = denoiser(tiny.pipe, guidance_scale=3.0)
    calls: list[int] = []
    tiny.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    cond = {"prompt": ["a cat", "a dog"]}
    run = functools.partial(fs.sample, model, (2, *model.shape), cond=cond, progress=False)
    first = run(nfe=5)
    assert len(calls) == 2  # the prompts, and none
    run(nfe=3)
    assert len(calls) == 2
    assert torch.equal(run(nfe=5), first)
    # Nothing is kept beyond the bound, and the answers do not depend on it.
    kept = model.network._encodings
    monkeypatch.setattr(module, "_KEPT", kept._size)
    for word in ("house", "snow", "blue"):
        model(noise(model), 500, prompt=[word] * 2)
        assert 0 < kept._size <= module._KEPT
    assert torch.equal(run(nfe=5), first)
    assert len(calls) == 2 + 3 * 2 + 2


FORWARD = ["sd", "sdxl_controlnet", "sd3", "flux", "pixart_sigma", "wan", "ltx", "stable_audio"]


@pytest.mark.parametrize("name", FORWARD)
def test_derivatives_go_through_the_pipeline(name: str) -> None:
    model = made(pipelines[name]())
    x, v, u = (noise(model, 1, seed) for seed in range(3))
    t = 500 if model.rounds else float(model.process.time(0.3))

    def ask(x: Tensor) -> Tensor:
        return model(x, t)

    forward = torch.func.jvp(ask, (x,), (v,))[1]
    with torch.no_grad():
        h = 1e-2
        slope = (ask(x + h * v) - ask(x - h * v)) / (2 * h)
    assert float((forward - slope).norm()) < 1e-2 * float(slope.norm())
    x.requires_grad_()
    (backward,) = torch.autograd.grad((ask(x) * u).sum(), x)
    torch.testing.assert_close((backward * v).sum(), (forward * u).sum(), rtol=1e-3, atol=1e-3)


def test_derivative_in_the_time_that_the_network_is_told() -> None:
    model = made(pipelines["wan"]())
    x, level = noise(model, 1), model.process.level(0.5)

    def ask(t: Tensor) -> Tensor:
        return model.output(x, t, level, {})

    t = torch.tensor([500.0])
    forward = torch.func.jvp(ask, (t,), (torch.ones(1),))[1]
    with torch.no_grad():
        slope = (ask(t + 0.03) - ask(t - 0.03)) / 0.06
    assert float((forward - slope).norm()) < 1e-2 * float(slope.norm()) > 0


def test_divergence() -> None:
    """The trace of dD/dx, which likelihoods need: exactly by Jacobian-vector products, and by one
    vector-Jacobian product per probe."""
    model = made(pipelines["wan"]())
    x = noise(model, 1)
    flat = torch.eye(x.numel()).reshape(-1, *x.shape)

    def ask(x: Tensor) -> Tensor:
        return model(x, 0.5)

    columns = torch.vmap(lambda v: torch.func.jvp(ask, (x,), (v,))[1], chunk_size=32)(flat)
    exact = float((columns * flat).sum())
    x.requires_grad_()
    out = ask(x)
    signs = torch.randint(0, 2, (200, *x.shape), generator=torch.Generator().manual_seed(0)) * 2.0
    probes = [
        float((torch.autograd.grad(out, x, v, retain_graph=True)[0] * v).sum()) for v in signs - 1
    ]
    values = torch.tensor(probes)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 200**0.5
    assert float(values.std()) > 0


def test_what_a_transform_made_is_not_kept() -> None:
    tiny = pipelines["sd"]()
    model = denoiser(tiny.pipe, guidance_scale=3.0)
    x = noise(model, 1)
    torch.func.jvp(lambda x: model(x, 500, prompt="a blue house"), (x,), (x,))
    fresh = denoiser(tiny.pipe, guidance_scale=3.0)
    want = fresh(x, 500, prompt="a blue house")
    torch.testing.assert_close(model(x, 500, prompt="a blue house"), want)


def test_the_network_keeps_its_precision() -> None:
    tiny = pipelines["sd"]()
    tiny.pipe.to(torch.bfloat16)
    model = denoiser(tiny.pipe, guidance_scale=3.0, prompt="a cat")
    assert model.dtype == torch.bfloat16
    out = model(noise(model), 400)
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())


class Closed(hf.DiffusionPipeline):
    """A loop that neither takes latents nor asks its scheduler to scale them."""

    def __init__(self, transformer: Any, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    def __call__(self, num_inference_steps: int = 5) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.ones(1, 1, 8, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t).sample, t, x).prev_sample
        return x


def test_refusals() -> None:
    pipe, ddpm = pipelines["sd"]().pipe, pipelines["ddpm"]().pipe
    with pytest.raises(ValueError, match="need a diffusers pipeline"):
        denoiser(pipe.unet)
    for name, value in {"latents": 1, "num_inference_steps": 4, "strength": 0.5}.items():
        with pytest.raises(ValueError, match=f"{name} = {value} is for the sampler to say"):
            denoiser(pipe, **{name: value})
    with pytest.raises(ValueError, match="guidance_scale: DDPMPipeline has no conditions"):
        denoiser(ddpm, guidance_scale=3.0)
    model = denoiser(pipe)
    with pytest.raises(ValueError, match="prompt has 3 entries for 2 samples"):
        model(noise(model), 5, prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 8, 8\).* of shape \(4, 16, 16\)"):
        model(torch.zeros(2, 4, 8, 8), 5, prompt="a")
    with pytest.raises(ValueError, match="Closed neither takes latents as they are nor asks"):
        denoiser(Closed(ddpm.unet, hf.DDIMScheduler()))
    for argument in ({"promt": "a cat"}, {"guidance": 3.0}):
        with pytest.raises(ValueError, match=f"argument = '{next(iter(argument))}' is not known"):
            denoiser(pipe, **argument)
        with pytest.raises(ValueError, match=f"argument = '{next(iter(argument))}' is not known"):
            model(noise(model), 5, prompt="a", **argument)
