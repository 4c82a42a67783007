"""A diffusers pipeline as a model, and its calibration.

One evaluation is one step of the pipeline's own loop: a shallow copy of the pipeline is called with
a scheduler that offers one time, hands the network the state as it is, and leaves the loop when it
is given the output. What the pipeline does around its network (text conditioning, guidance,
ControlNet, packing, the learned variance) is therefore done by the pipeline's own code, whichever
it is; and the copy is made for the one call, so that the user's pipeline never changes and threads
do not meet.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from .._calibrate._calibrate import calibrate as calibrate_model
from .._calibrate._recipe import Recipe
from .._calibrate._statistics import digest
from .._calibrate._teacher import taken
from .._denoiser import Denoiser
from .._prediction import unknown
from .._process import Flow, Level
from ._config import described

__all__ = ["PipelineDenoiser", "calibrate", "denoiser"]

#: What is one value for every sample, or a list or tensor with one entry per sample: arguments with
#: these in their names.
_PER_SAMPLE = ("prompt", "embeds", "label")
#: Arguments that say where the pipeline's loop goes.
_OURS = ("latents", "num_inference_steps", "timesteps", "sigmas", "strength")
#: Bytes of encoded prompts that are kept.
_KEPT = 1 << 28
#: Of a calibration: noises for fits, for the choice and for the report, at most and at least; and
#: elements of a state in one network call.
_MOST, _LEAST, _CALL = 256, 8, 1 << 17
#: Its arguments that the pipeline decides.
_DECIDED = ("model", "shape", "cond", "guidance", "uncond", "first_step")


class _Asked(Exception):  # noqa: N818, it is no error
    """Leaves a pipeline's loop with what its scheduler was given."""

    def __init__(self, output: Tensor, state: Tensor) -> None:
        self.output, self.state = output, state


class _Probe:
    """A scheduler that offers one time, shows the network `x` there, and ends the loop.

    x None: the state that the pipeline makes for itself.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, x: Tensor | None, time: Tensor, sigma: float) -> None:
        self._scheduler, self._x = scheduler, x
        self.timesteps, self.sigmas = time, torch.tensor([sigma, 0.0])
        self.mu: float | None = None
        self.shown = False  # whether the network's input came through here

    def __getattr__(self, name: str) -> Any:  # its config, and what else a pipeline may look at
        return getattr(self._scheduler, name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **more: Any,
    ) -> None:
        self.timesteps, self.mu = self.timesteps.to(device), mu

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def scale_model_input(self, sample: Tensor, *args: Any) -> Tensor:
        if self._x is None:
            return sample
        self.shown = True  # twice or more often, for guidance
        return self._x.repeat(len(sample) // len(self._x), *(1 for _ in self._x.shape[1:]))

    def add_noise(self, original: Tensor, *args: Any) -> Tensor:
        return original  # where a picture would start: nobody looks at it

    scale_noise = add_noise

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any):
        raise _Asked(model_output, sample)


class _Encodings:
    """What a pipeline's encoders said, by what they were asked; the oldest go."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[Any, Any, int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        asked = [*args, *kwargs.items()]
        with torch.no_grad():
            try:
                key = digest(name, [v for v in asked if not _is_generator(v)])
            except RuntimeError:  # tensors inside torch.func transforms cannot be read
                return encode(*args, **kwargs)
            with self._lock:
                if key in self._found:
                    self._found.move_to_end(key)
                    return self._found[key][1]
            said = encode(*args, **kwargs)
            try:
                size = sum(v.nbytes for v in tree_leaves(said) if _is_plain(v))
            except RuntimeError:
                return said  # belongs to the transform, and ends with it
        with self._lock:
            if key not in self._found and size <= _KEPT:
                # What was asked stays alive with the answer: a key may hold the address of a part.
                self._found[key] = (asked, said, size)
                self._size += size
                while self._size > _KEPT:
                    self._size -= self._found.popitem(last=False)[1][2]
        return said


def _is_generator(value: Any) -> bool:
    return isinstance(value[1] if isinstance(value, tuple) else value, torch.Generator)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor; raises for one that lives inside a torch.func transform only."""
    return isinstance(value, Tensor) and value.data_ptr() >= 0


class _Network:
    """A pipeline as a function of (state, time, conditions)."""

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        # Under the no_grad of the pipeline's own __call__ there would be no gradients.
        self._run = inspect.unwrap(type(pipe).__call__)
        self._known = inspect.signature(self._run).parameters
        self._check(call)
        self._pipe, self._call = copy.copy(pipe), dict(call)
        self._pipe.__dict__["_progress_bar_config"] = {"disable": True}
        self._encoders = [n for n in dir(type(pipe)) if n.lstrip("_").startswith("encode")]
        self._encodings = _Encodings()
        self.learned = False
        self._look()

    def _check(self, call: Mapping[str, Any]) -> None:
        for name, value in call.items():
            if name in _OURS:
                raise ValueError(f"{name} = {value!r} is for the sampler to say; leave it out")
            if name not in self._known:  # many pipelines would ignore it
                raise ValueError(unknown("argument", name, [k for k in self._known if k != "self"]))

    def _asked(
        self, x: Tensor | None, time: Tensor, sigma: float, cond: Mapping[str, Any]
    ) -> tuple[_Asked, _Probe]:
        """The pipeline at one time, up to its scheduler's step."""
        pipe = copy.copy(self._pipe)
        probe = _Probe(pipe.scheduler, x, time, sigma)
        parts = pipe.__dict__
        for name in self._encoders:
            if callable(encode := getattr(pipe, name)):
                parts[name] = functools.partial(self._encodings, name, encode)
        parts["scheduler"] = probe
        batch = 1 if x is None else len(x)
        call = {k: _each(k, v, batch) for k, v in {**self._call, **cond}.items()}
        ours = {
            "num_inference_steps": 1,
            "output_type": "latent",
            "strength": 1.0,
            "generator": torch.Generator().manual_seed(0),  # else it would draw from the global one
            "latents": x,
        }
        call = {**{k: v for k, v in ours.items() if k in self._known}, **call}
        try:
            try:
                self._run(pipe, **call)
            except NotImplementedError:  # fused attention has no forward-mode derivative
                with sdpa_kernel(SDPBackend.MATH):
                    self._run(pipe, **call)
        except _Asked as asked:
            return asked, probe
        raise ValueError(f"{type(pipe).__name__} ended without a step of its scheduler")

    def _look(self) -> None:
        """Two evaluations of one sample: what a state is, which network is asked and how often,
        and whether it is asked about the state that it is given."""
        given: dict[str, Any] = {}
        if "prompt" in self._known and not any(map(_per_sample, self._call)):
            given["prompt"] = ""
        times = torch.as_tensor(self._pipe.scheduler.timesteps).reshape(-1)
        middle = times[len(times) // 2 :][:1].clone()
        rows: dict[str, int] = {}
        me = threading.get_ident()

        def count(name: str, module: Any, args: Any, kwargs: Any) -> None:
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            if threading.get_ident() == me:
                rows[name] = rows.pop(name, 0) + len(first)  # the last one called comes last

        parts = {k: v for k, v in self._pipe.components.items() if isinstance(v, torch.nn.Module)}
        with torch.no_grad():
            asked, probe = self._asked(None, middle, 0.5, given)
            self.shape, self.dtype = tuple(asked.state.shape[1:]), asked.state.dtype
            self.device, self.mu = asked.state.device, probe.mu
            x = torch.randn(
                (1, *self.shape), generator=torch.Generator().manual_seed(0), dtype=self.dtype
            ).to(self.device)
            hooks = [
                part.register_forward_pre_hook(functools.partial(count, name), with_kwargs=True)
                for name, part in parts.items()
            ]
            try:
                asked, probe = self._asked(x, middle, 0.5, given)
            finally:
                for hook in hooks:
                    hook.remove()
        if not rows or not (probe.shown or torch.equal(asked.state, x)):
            raise ValueError(
                f"{type(self._pipe).__name__} neither takes latents as they are nor asks its "
                "scheduler to scale them, so its network cannot be asked about a given state"
            )
        name = list(rows)[-1]
        self.network, self.conditions = parts[name], rows[name]

    def __call__(self, x: Tensor, time: Tensor, sigma: float, **cond: Any) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, where the pipeline has latents of shape "
                f"{self.shape}; give (batch, *model.shape), or a model of another height and width"
            )
        self._check(cond)
        output = self._asked(x, time, sigma, cond)[0].output[: len(x)]
        return output[:, : x.shape[1]] if self.learned else output

    @property
    def guidance(self) -> list[dict[str, Any]]:
        """Guidance inside the pipeline, in the words of a recipe."""
        given = {k: self._call.get(k, v.default) for k, v in self._known.items()}
        numbers = {
            k: v
            for k, v in given.items()
            if isinstance(v, (int, float)) and any(part in k for part in ("guidance", "cfg", "pag"))
        }
        scale, rescale = numbers.pop("guidance_scale", 1.0), numbers.pop("guidance_rescale", 0.0)
        if self.conditions == 1 and scale <= 1:
            return []
        more = {k: v for k, v in numbers.items() if v != self._known[k].default}
        return [{"scale": scale, "interval": [0.0, None], "rescale": rescale, **more}]


class _Direct:
    """The network of a pipeline that has nothing else: DDPM, DDIM and their kin."""

    conditions, guidance, mu, learned = 1, (), None, False

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        if call:
            raise ValueError(f"{next(iter(call))}: {type(pipe).__name__} has no conditions")
        self.network = pipe.unet
        config, self.dtype, self.device = pipe.unet.config, pipe.unet.dtype, pipe._execution_device
        side = config.sample_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        self.shape = (config.in_channels, *size)

    def __call__(self, x: Tensor, time: Tensor, sigma: float) -> Tensor:
        output = self.network(x, time).sample
        return output[:, : x.shape[1]] if self.learned else output


def _per_sample(name: str) -> bool:
    return any(part in name for part in _PER_SAMPLE) and not name.startswith("system")


def _each(name: str, value: Any, batch: int) -> Any:
    """A value for every sample, where the argument is one of samples."""
    if not _per_sample(name):
        return value
    if isinstance(value, str):
        return [value] * batch
    if isinstance(value, (list, tuple)) and not any(isinstance(v, Tensor) for v in value):
        if len(value) not in (1, batch):
            raise ValueError(
                f"{name} has {len(value)} entries for {batch} samples; what differs from sample to "
                f"sample goes into cond={{{name!r}: [...]}}"
            )
        return list(value) * (batch if len(value) == 1 else 1)
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        return value.expand(batch, *value.shape[1:])
    return value


@dataclass(frozen=True)
class PipelineDenoiser(Denoiser):
    """A diffusers pipeline as a `fewstep.Denoiser`; made by `denoiser`.

    shape: of one sample, as the pipeline's loop holds it (packed, where it packs).
    guidance: what the pipeline does of its own, as recipes keep it.
    """

    network: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.network.shape

    @property
    def guidance(self) -> list[dict[str, Any]]:
        return list(self.network.guidance)

    @property
    def conditions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.network.conditions

    @property
    def device(self) -> torch.device:
        return self.network.device

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        """The pipeline's output, guided. Its loop knows one time: samples at different ones are
        asked about in turn."""
        x_in, times = x_in.to(self.dtype), np.asarray(level.t)
        flow = isinstance(self.process, Flow)
        sigmas = np.asarray(level.sigma if flow else level.rho)  # as schedulers say it
        if times.ndim == 0 or (times == times[0]).all():
            return self.network(x_in, t_in[:1], float(sigmas.flat[0]), **cond)
        out: list[Any] = [None] * len(x_in)
        for t in np.unique(times):
            index = np.flatnonzero(times == t).tolist()
            here = taken(cond, index, len(x_in))
            some = self.network(x_in[index], t_in[index[:1]], float(sigmas[index[0]]), **here)
            for i, row in zip(index, some, strict=True):
                out[i] = row
        return torch.stack(out)


def denoiser(pipe: Any, **call: Any) -> PipelineDenoiser:
    """The model inside a diffusers pipeline: its network, text conditioning and guidance.

        model = fewstep.diffusers.denoiser(pipe, guidance_scale=5.0)
        latents = fewstep.sample(model, (2, *model.shape), cond={"prompt": ["a cat", "a dog"]})

    pipe: any pipeline that takes `latents` or asks its scheduler to scale them. It is not changed,
        and may be used meanwhile. Of an image-to-image pipeline this is the text-to-image model:
        where a run begins is `start` of `fewstep.sample`.
    call: arguments of the pipeline that are the same for every sample: guidance_scale, height,
        width, a prompt, a ControlNet picture. What differs goes into `cond`, lists or tensors with
        one entry per sample; what both name is taken from `cond`.

    Process and prediction are those of the scheduler's config, of any class; what its clip_sample
    does is a `hook`, and none of the model. The model is asked in the pipeline's dtype, about
    states of shape `model.shape`, which is the loop's own: packed where the pipeline packs. One
    evaluation of a sample is one pass through the pipeline, with the guidance in it
    (`model.conditions` network rows). Prompts are encoded once, and up to 256 MiB of encodings
    kept; an encoder that is changed later is not asked again.

    Gradients and forward-mode derivatives (torch.autograd, torch.func) go through the pipeline
    where its network has them. Tables of integers (DiscreteVP) have no derivative in time.

    Making one takes two evaluations of one sample, to see what latents are, and that the network is
    asked about those that it is given.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"pipe = {pipe!r}; need a diffusers pipeline")
    config = pipe.scheduler.config
    network = (_Direct if set(pipe.components) == {"unet", "scheduler"} else _Network)(pipe, call)
    known = described(config, network.mu if config.get("use_dynamic_shifting") else None)
    network.learned = known.learned
    return PipelineDenoiser(network, known.process, known.prediction, dtype=network.dtype)


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | Mapping[str, Sequence[Any]] | None = None,
    nfe: int | Sequence[int] = (5, 6, 8, 10),
    *,
    memory: float = 16.0,
    **options: Any,
) -> Recipe:
    """`fewstep.calibrate` of the model inside a pipeline, with its conditions and its guidance.

        recipe = fewstep.diffusers.calibrate(pipe, prompts, nfe=[6, 8], guidance_scale=5.0)
        pipe.scheduler = fewstep.diffusers.Scheduler.from_config(
            pipe.scheduler.config, recipe=recipe)
        pipe("a lighthouse", num_inference_steps=6, guidance_scale=5.0)

    prompts: as many as you like, given to the noises in turn; or a mapping of arguments to lists,
        {"prompt": [...], "negative_prompt": [...]} or {"class_labels": [...]}; None where the
        pipeline has none, or `prompt` is among the options.
    nfe: numbers of evaluations to find a plan for.
    options: of `fewstep.calibrate` (methods, noises, budget, resume, seed ...) and of the pipeline
        (guidance_scale, height ...), by their names.
    memory: GiB that the states of a calibration may take, where the pipeline runs, whatever the
        size of a latent and however many prompts there are: with E bytes in a latent, N the largest
        nfe, n noises for fits (n / 2 for the choice, n for the report), b samples in a call

            E ((6 N + 50) n + c b),   c = 4 N^2 with differences, 3 N + 3 in reverse mode,

        and n is the most that fits, up to 256. Beside that there is the network's own call of b
        samples (b = 2^17 elements), in reverse mode with its graph; and at most 50 MiB of
        statistics: 120 levels per element up to 4,096 elements, else per channel, and one in all
        where latents are packed and have no axis of channels in front.

    Learned plans take gradients in reverse mode where the pipeline's network is in float32 and its
    answer has a graph, else differences (`jacobian`); statistics take forward-mode derivatives or
    differences, as `fewstep.calibrate` does. `recipe.info` says which, and how many noises.
    """
    known = inspect.signature(calibrate_model).parameters
    for name in _DECIDED:
        if name in options:
            raise ValueError(
                f"{name} = {options[name]!r}: the pipeline says so; give its own arguments "
                "(guidance_scale, prompts)"
            )
    ours = {k: v for k, v in options.items() if k in known}
    call = {k: v for k, v in options.items() if k not in known}
    cond = _conditions(prompts)
    model = denoiser(pipe, **{**call, **{k: v[:1] for k, v in cond.items()}})
    elements = math.prod(model.shape)
    ours.setdefault("jacobian", "reverse" if _has_graph(model) else "differences")
    ours.setdefault("batch", min(_MOST, max(1, _CALL // elements)))
    if ours.get("reduction") is None and elements > 4096 and not _channels_first(model):
        ours["reduction"] = "scalar"
    noises = ours.get("noises", (_LEAST, _LEAST // 2, _LEAST))
    least, most = max(noises), nfe if isinstance(nfe, int) else max(nfe, default=1)
    fixed = ours["batch"] * (4 * most**2 if ours["jacobian"] == "differences" else 3 * most + 3)
    state = elements * ours.get("dtype", torch.float32).itemsize / 2**30
    fit = int((memory / state - fixed) / (6 * most + 50))
    if fit < least:
        need = state * ((6 * most + 50) * least + fixed)
        raise ValueError(
            f"memory = {memory} GiB is too little for noises = {noises} of shape {model.shape} at "
            f"nfe = {most}; give memory = {need:.1f} or more, fewer evaluations or smaller latents"
        )
    n = min(fit, _MOST)
    ours.setdefault("noises", (n, n // 2, n))
    # A pipeline hands its noise straight to the network: no free step before.
    recipe = calibrate_model(model, model.shape, nfe, cond=cond, first_step=False, **ours)
    name = f"{type(model.network.network).__name__} of {type(pipe).__name__}"
    return replace(recipe, info={**recipe.info, "network": name, "jacobian": ours["jacobian"]})


def _conditions(prompts: Any) -> dict[str, list[Any]]:
    if prompts is None:
        return {}
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, Mapping)) or not prompts:
        raise ValueError(f"prompts = {prompts!r}; need a list of prompts, or a mapping to lists")
    return dict(prompts) if isinstance(prompts, Mapping) else {"prompt": list(prompts)}


def _has_graph(model: PipelineDenoiser) -> bool:
    """Whether reverse mode goes through the pipeline, with digits to spare."""
    if torch.finfo(model.network.dtype).bits < 32:
        return False
    with torch.enable_grad():
        x = torch.zeros(1, *model.shape, device=model.device, requires_grad=True)
        return model(x, model.process.t_end).requires_grad


def _channels_first(model: PipelineDenoiser) -> bool:
    """Whether the first axis of a latent is that of channels (packed latents: the last)."""
    channels = getattr(getattr(model.network.network, "config", None), "in_channels", None)
    return len(model.shape) > 1 and not (model.shape[-1] == channels != model.shape[0])
