"""ComfyUI nodes around `fewstep.k_diffusion`. docs/comfyui.md lists what they ask of ComfyUI.

ComfyUI hands samplers x in one of two coordinates: x_0 + sigma eps, or, for flow models (whose
model_sampling is a CONST), (1 - sigma) x_0 + sigma eps. Nothing in the call itself says which, so
every sampler here looks at the model's model_sampling.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import folder_paths
import torch
from torch import Tensor

import fewstep as fs
from fewstep import k_diffusion

__all__ = ["FewstepRecipe", "FewstepSampler", "FewstepSigmas", "register"]

_FOLDER = "fewstep"
_DEFAULTS = fs.sample.__kwdefaults__

folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))


def coordinates(sampling: Any) -> fs.EDM | fs.Flow:
    """The process of x as ComfyUI writes it, over the noise levels that the network knows."""
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    if isinstance(sampling, comfy.model_sampling.CONST):
        return fs.Flow(t_start=min(high, 1.0), t_end=low)
    return fs.EDM(low, high)


def trained(sampling: Any) -> fs.Process:
    """The process on whose times grids are laid: the table of a network that is told its indices, a
    flow with its shift, or else the range of sigma."""
    table = sampling.sigmas.detach().double().cpu()
    if isinstance(sampling, comfy.model_sampling.CONST):
        # sigma = S t / (1 + (S - 1) t) at t = i / n; the attribute `shift` is S or log S.
        t, sigma = (len(table) // 2) / len(table), float(table[len(table) // 2 - 1])
        return fs.Flow(sigma * (1 - t) / (t * (1 - sigma)), t_end=float(table[0]))
    if not sampling.timestep(torch.as_tensor(sampling.sigma_max).reshape(1)).is_floating_point():
        return fs.DiscreteVP.from_alphas_cumprod(1 / (1 + table.numpy() ** 2), "ComfyUI's table")
    return coordinates(sampling)


def sampler_function(solver: str | fs.Solver | fs.Plan) -> Callable[..., Tensor]:
    """A solver or a plan as a function for KSAMPLER."""
    run = k_diffusion.sampler(solver)

    @functools.wraps(run)
    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        process = coordinates(model.inner_model.inner_model.model_sampling)
        return run(model, x, sigmas, extra_args, callback, disable, process=process, **options)

    return sample


class FewstepSampler:
    """Any solver of fewstep as a SAMPLER."""

    DESCRIPTION = "A solver of fewstep, for SamplerCustom and its like. For flow models too."
    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes."""
        return {"required": {"solver": (list(fs.solvers), {"default": _DEFAULTS["solver"]})}}

    def make(self, solver: str) -> tuple[Any]:
        """The SAMPLER."""
        return (comfy.samplers.KSAMPLER(sampler_function(solver)),)


class FewstepSigmas:
    """A grid of fewstep as SIGMAS."""

    DESCRIPTION = (
        "Noise levels of a fewstep grid, laid on the times that this model was trained on. A step "
        "costs one evaluation with most solvers, several with some (heun: 2)."
    )
    CATEGORY = "sampling/custom_sampling/schedulers"
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes."""
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 8, "min": 1, "max": 1000}),
                "grid": (list(fs.grids), {"default": _DEFAULTS["grid"]}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }

    def make(self, model: Any, steps: int, grid: str, denoise: float) -> tuple[Tensor]:
        """The SIGMAS."""
        if denoise == 0:
            return (torch.empty(0),)  # what ComfyUI takes for "leave the latent as it is"
        sampling = model.get_model_object("model_sampling")
        start = None if denoise == 1 else {"strength": denoise}
        plan = fs.plan("ddim", trained(sampling), steps, grid=grid, start=start)
        return (k_diffusion.get_sigmas(plan, coordinates(sampling)),)


class FewstepRecipe:
    """A plan from a file, as the SAMPLER that runs it and the SIGMAS it is made for."""

    DESCRIPTION = (
        "A recipe or a plan of fewstep, from models/fewstep. Give both outputs to one sampling "
        "node. A recipe is for one network and guidance, which cannot be checked here."
    )
    CATEGORY = "sampling/custom_sampling"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes."""
        files = folder_paths.get_filename_list(_FOLDER)
        return {
            "required": {
                "model": ("MODEL",),
                "file": ([f for f in files if f.endswith(".safetensors")],),
                "nfe": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": _NFE}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, file: str, nfe: int) -> float:
        """What tells another file of the same name apart."""
        return os.path.getmtime(_path(file))

    def make(self, model: Any, file: str, nfe: int) -> tuple[Any, Tensor]:
        """The SAMPLER and its SIGMAS."""
        plans = _plans(_path(file))
        if nfe == 0 and len(plans) == 1:
            (nfe,) = plans
        if nfe not in plans:
            have = ", ".join(map(str, sorted(plans)))
            raise ValueError(f"nfe = {nfe}; {file} has plans for {have}")
        process = coordinates(model.get_model_object("model_sampling"))
        sigmas = k_diffusion.get_sigmas(plans[nfe], process)
        asked = [float(process.time(level.lam)) for level in plans[nfe].evaluations]
        low, high = sorted(float(process.sigma(t)) for t in (process.t_start, process.t_end))
        if max(asked) > high * 1.001 or min(asked) < low * 0.999:
            raise ValueError(
                f"{file} asks the network about sigma = {min(asked):.6g} to {max(asked):.6g}, but "
                f"this model knows {low:.6g} to {high:.6g}: it was made for another one"
            )
        return comfy.samplers.KSAMPLER(sampler_function(plans[nfe])), sigmas


_NFE = "Network evaluations, one of those that the recipe is for. 0: the only one it has."


def _path(file: str) -> str:
    path = folder_paths.get_full_path(_FOLDER, file)
    if path is None:
        raise FileNotFoundError(f"file = {file!r} is not in models/{_FOLDER}")
    return path


def _plans(path: str) -> dict[int, fs.Plan]:
    """By number of evaluations."""
    try:
        recipe = fs.Recipe.load(path)
    except ValueError as no_recipe:
        try:
            plan = fs.Plan.load(path)
        except ValueError as no_plan:
            raise ValueError(f"neither a recipe ({no_recipe}) nor a plan ({no_plan})") from no_plan
        return {plan.nfe: plan}
    return {nfe: recipe.one(nfe) for nfe in recipe.nfes}


def register(chosen: str) -> None:
    """Add solvers, as "fewstep_<name>", to the list that KSampler and KSamplerSelect offer.

    chosen: names with commas between them, or "all"."""
    names = [n.strip() for n in chosen.split(",")] if chosen != "all" else list(fs.solvers)
    functions = {f"fewstep_{name}": sampler_function(name) for name in names}
    places = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.SAMPLER_NAMES
    if not all(isinstance(place, list) for place in places):
        logging.warning("fewstep: this ComfyUI keeps its samplers elsewhere; use the nodes")
        return
    for name, function in functions.items():
        setattr(comfy.k_diffusion.sampling, f"sample_{name}", function)
        for place in places:
            if name not in place:  # the two may be one list
                place.append(name)
