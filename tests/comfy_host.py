"""A host for the ComfyUI nodes: the part of ComfyUI that they touch, as docs/comfyui.md says it.

`install` puts stand-ins for `comfy.samplers`, `comfy.model_sampling`, `comfy.k_diffusion.sampling`
and `folder_paths` where imports find them; `load` imports the folder of nodes as ComfyUI does;
`sample` is what the node SamplerCustom does. The network is the exact data prediction of data
N(MEAN, SPREAD^2), for which the sampling ODE has an end in closed form (`end`).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"
MEAN, SPREAD = 0.3, 0.7


# comfy.model_sampling: an object is made from a class of levels and a class of coordinates


class EPS:
    """x = x_0 + sigma eps."""

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False
    ) -> Tensor:
        return latent + noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma)

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


class CONST:
    """x = (1 - sigma) x_0 + sigma eps: flow models."""

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False
    ) -> Tensor:
        return (1 - sigma) * latent + sigma * noise

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - sigma)


class _Levels:
    sigmas: Tensor

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]


class ModelSamplingDiscrete(_Levels):
    """A table; the network is told the nearest index."""

    def __init__(self) -> None:
        betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
        kept = np.cumprod(1 - betas)
        self.sigmas = torch.tensor(np.sqrt((1 - kept) / kept), dtype=torch.float32)

    def timestep(self, sigma: Tensor) -> Tensor:
        distance = (sigma.log()[None] - self.sigmas.log()[:, None]).abs()
        return distance.argmin(0).view(sigma.shape)


class ModelSamplingContinuousEDM(_Levels):
    """A range of sigma. It has a table too, for schedulers."""

    def __init__(self) -> None:
        self.sigmas = torch.linspace(math.log(0.002), math.log(120.0), 1000).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()


class ModelSamplingDiscreteFlow(_Levels):
    """A flow with a shift S."""

    def __init__(self, shift: float = 3.0) -> None:
        self.shift, t = shift, torch.arange(1, 1001) / 1000
        self.sigmas = shift * t / (1 + (shift - 1) * t)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 1000


class ModelSamplingFlux(_Levels):
    """A flow whose `shift` is log S."""

    def __init__(self, shift: float = 1.15) -> None:
        self.shift, t = shift, torch.arange(1, 10001) / 10000
        self.sigmas = math.exp(shift) / (math.exp(shift) + (1 / t - 1))

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma


def sampling_of(levels: type, coordinates: type) -> Any:
    return type("ModelSampling", (levels, coordinates), {})()


MODELS: dict[str, Callable[[], Any]] = {
    "sd": lambda: sampling_of(ModelSamplingDiscrete, EPS),
    "edm": lambda: sampling_of(ModelSamplingContinuousEDM, EPS),
    "sd3": lambda: sampling_of(ModelSamplingDiscreteFlow, CONST),
    "flux": lambda: sampling_of(ModelSamplingFlux, CONST),
}


# The model, and what is around it


class BaseModel:
    def __init__(self, model_sampling: Any) -> None:
        self.model_sampling = model_sampling
        self.asked: list[float] = []

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == x.shape[:1]
        self.asked.append(float(sigma[0]))
        s = sigma.view(-1, *(1 for _ in x.shape[1:]))
        a = 1 - s if isinstance(self.model_sampling, CONST) else torch.ones_like(s)
        gain = SPREAD**2 * a / (SPREAD**2 * a**2 + s**2)
        return MEAN + gain * (x - a * MEAN)


class ModelPatcher:
    """The MODEL of the graph."""

    def __init__(self, name: str) -> None:
        self.model = BaseModel(MODELS[name]())

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)


class Guider:
    """model_wrap: called with x, sigma and the rest of extra_args."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self.inner_model, self.options = patcher.model, []

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None) -> Tensor:
        self.options.append((model_options, seed))
        return self.inner_model.denoised(x, sigma)


class KSamplerX0Inpaint:
    """What the sampler function gets as its model."""

    latent_image: Tensor
    noise: Tensor

    def __init__(self, model: Guider, sigmas: Tensor) -> None:
        self.inner_model, self.sigmas = model, sigmas

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        denoise_mask: Tensor | None,
        model_options: dict | None = None,
        seed: int | None = None,
    ) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options or {}, seed)
        keep = 1 - denoise_mask
        each = sigma.view(-1, *(1 for _ in x.shape[1:]))
        sampling = self.inner_model.inner_model.model_sampling
        x = x * denoise_mask + sampling.noise_scaling(each, self.noise, self.latent_image) * keep
        out = self.inner_model(x, sigma, model_options or {}, seed)
        return out * denoise_mask + self.latent_image * keep


class KSAMPLER:
    """A SAMPLER."""

    def __init__(
        self, sampler_function: Any, extra_options: Any = None, inpaint_options: Any = None
    ) -> None:
        self.sampler_function = sampler_function
        self.extra_options, self.inpaint_options = extra_options or {}, inpaint_options or {}

    def sample(
        self,
        model_wrap: Guider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        extra_args["denoise_mask"] = denoise_mask
        model = KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        sampling = model_wrap.inner_model.model_sampling
        high = float(sampling.sigma_max)
        most = math.isclose(high, float(sigmas[0]), rel_tol=1e-5) or float(sigmas[0]) > high
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, most)

        def told(said: dict[str, Any]) -> None:
            callback(said["i"], said["denoised"], said["x"], len(sigmas) - 1)

        samples = self.sampler_function(
            model,
            x,
            sigmas,
            extra_args=extra_args,
            callback=told,
            disable=disable_pbar,
            **self.extra_options,
        )
        return sampling.inverse_noise_scaling(sigmas[-1], samples)


def ksampler(name: str) -> KSAMPLER:
    """What KSampler and KSamplerSelect make of a name."""
    return KSAMPLER(getattr(sys.modules["comfy.k_diffusion.sampling"], f"sample_{name}"))


def sample(
    patcher: ModelPatcher,
    sampler: KSAMPLER,
    sigmas: Tensor,
    noise: Tensor,
    latent: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int = 5,
    callback: Any = lambda *said: None,
) -> Tensor:
    """What SamplerCustom does."""
    latent = torch.zeros_like(noise) if latent is None else latent
    if len(sigmas) == 0:
        return latent
    guider = Guider(patcher)
    extra = {"model_options": {"transformer_options": {}}, "seed": seed}
    with torch.inference_mode():
        out = sampler.sample(guider, sigmas, extra, callback, noise, latent, mask, True)
    assert all(said == (extra["model_options"], seed) for said in guider.options)
    return out


def end(sampling: Any, sigma: float, noise: Tensor) -> Tensor:
    """Where the ODE leads from noise alone at sigma."""
    a, s = (1 - sigma, sigma) if isinstance(sampling, CONST) else (1.0, sigma)
    x = noise * (s if a != 1 else math.sqrt(1 + s * s))
    return MEAN + SPREAD * (x - a * MEAN) / math.hypot(SPREAD * a, s)


def install(monkeypatch: Any, models: Path) -> dict[str, ModuleType]:
    """Put the modules where imports find them; models: ComfyUI's folder of models."""
    names = ("comfy", "comfy.samplers", "comfy.model_sampling", "comfy.k_diffusion")
    made = {n: ModuleType(n) for n in (*names, "comfy.k_diffusion.sampling", "folder_paths")}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    samplers: Any = made["comfy.samplers"]
    samplers.SAMPLER_NAMES = ["euler", "heun"]
    samplers.KSampler = type("KSampler", (), {"SAMPLERS": samplers.SAMPLER_NAMES})
    samplers.KSAMPLER = KSAMPLER
    model_sampling: Any = made["comfy.model_sampling"]
    model_sampling.CONST = CONST
    paths: Any = made["folder_paths"]
    folders: dict[str, list[str]] = {}
    paths.models_dir = str(models)
    paths.add_model_folder_path = lambda name, path: folders.setdefault(name, []).append(path)

    def full(name: str, file: str) -> str | None:
        found = [Path(folder, file) for folder in folders[name] if Path(folder, file).is_file()]
        return str(found[0]) if found else None

    paths.get_full_path = full
    paths.get_filename_list = lambda name: sorted(
        str(f.relative_to(folder)) for folder in folders[name] for f in Path(folder).rglob("*.*")
    )
    return made


def load(monkeypatch: Any) -> ModuleType:
    """The folder of nodes, imported as ComfyUI imports custom nodes: from its path."""
    name = "custom_nodes_fewstep"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"{name}.nodes", raising=False)
    spec.loader.exec_module(module)
    return module
