"""A diffusers pipeline without a download: DDPM around a bundled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from .._process import DiscreteVP
from ..models import find, load

__all__ = ["BundledUNet", "pipeline"]

_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class BundledUNet(ModelMixin, ConfigMixin):
    """A bundled model as diffusers' networks are: it is told one of DDPM's 1,000 times and predicts
    noise.

    The state x = alpha x_0 + sigma eps is asked about at the model's own level of equal lambda,
    where it is (sigma' / sigma) x; above the largest noise of the model, at that. Times between the
    integers are understood. label: of all samples, or one each; None: the model's "no class".
    """

    @register_to_config
    def __init__(
        self, name: str, sample_size: tuple[int, int], in_channels: int, label: Any = None
    ) -> None:
        super().__init__()
        bundled = find(name)
        self.model = load(name)
        # diffusers asks for device and dtype of what is in here; exact models have no tensors.
        self.network = self.model.network
        self.register_buffer("here", torch.zeros(()), persistent=False)
        self.path = DiscreteVP.linear()
        self.label = bundled.uncond.get("label") if label is None else label

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        """Noise eps = (x - alpha D) / sigma in samples (B, C, H, W)."""
        t = torch.as_tensor(timestep).double().expand(len(sample)).cpu().numpy()
        here, own = self.path.level(t), self.model.process
        lam = np.maximum(np.log(here.alpha / here.sigma), own.lam(own.t_start))
        times = own.time(lam)
        scale = own.level(times).sigma / here.sigma
        cond = {} if self.label is None else {"label": torch.as_tensor(self.label)}

        def each(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values)).to(sample).reshape(-1, 1, 1, 1)

        data = self.model(each(scale) * sample, times, **cond)
        noise = (sample - each(here.alpha) * data) / each(here.sigma)
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


def pipeline(name: str = "digits", label: Any = None) -> DDPMPipeline:
    """A `DDPMPipeline` that draws from a bundled model of pictures, to try things on.

    name: "digits", "patches-edm", "patches-flow" (`fewstep models`). label: class of all samples,
    or one of each in a batch; None: no class.

    >>> pipe = fewstep.diffusers.pipeline("patches-edm")
    >>> pipe.scheduler = fewstep.diffusers.Scheduler.from_config(pipe.scheduler.config)
    >>> image = pipe(num_inference_steps=8).images[0]
    """
    bundled = find(name)
    if len(bundled.shape) != 3:
        raise ValueError(f"name = {name!r} has samples of shape {bundled.shape}, not pictures")
    if label is not None and not bundled.classes:
        raise ValueError(f"label = {label!r}, but {name} has no classes; leave it out")
    unet: Any = BundledUNet(name, bundled.shape[1:], bundled.shape[0], label)
    scheduler = DDPMScheduler(num_train_timesteps=1000, clip_sample=False, **_BETAS)
    return DDPMPipeline(unet, scheduler)
