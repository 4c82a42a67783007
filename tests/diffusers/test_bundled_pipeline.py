from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.diffusers import Scheduler, pipeline
from fewstep.models import models

PICTURES = [m.name for m in models.values() if len(m.shape) == 3]


def run(pipe: Any, nfe: int, count: int = 4, **how: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, **how)
    generator = torch.Generator().manual_seed(1)
    call = {"batch_size": count, "generator": generator, "output_type": "np"}
    return torch.from_numpy(np.asarray(pipe(num_inference_steps=nfe, **call).images))


@pytest.mark.parametrize("name", ["digits", "exact-digits"])
def test_an_answer_is_that_of_the_model_on_ddpms_path(name: str) -> None:
    """The network predicts what the same model predicts when it is put on the path of DDPM."""
    pipe, model = pipeline(name), fs.models.load(name)
    path = replace(fs.DiscreteVP.linear(), integer_times=False)
    uncond = models[name].uncond
    for t in (0, 250, 800):  # rho = 0.01 to 21; the model knows 0.002 to 80
        x = fs.start_noise((3, *models[name].shape), seed=t)
        eps = pipe.unet(x, t, return_dict=False)[0]
        level = path.level(np.float64(t))
        alpha, sigma = float(level.alpha), float(level.sigma)
        data = fs.on_path(model, path)(x, t, **{k: torch.tensor(v) for k, v in uncond.items()})
        torch.testing.assert_close(alpha * data + sigma * eps, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PICTURES)
def test_noise_above_the_models_is_answered_at_its_largest(name: str) -> None:
    pipe = pipeline(name)
    asked = []

    class Spy:
        model, process = pipe.unet.model, pipe.unet.model.process

        def __call__(self, x: Tensor, times: Any, **cond: Any) -> Tensor:
            asked.extend(float(v) for v in times)
            return self.model(x, times, **cond)

    pipe.unet.model = Spy()
    x = fs.start_noise((2, *models[name].shape), seed=0)
    eps = pipe.unet(x, torch.tensor(999.5)).sample  # rho = 157, where a network of EDM knows 80
    if models[name].process == fs.EDM():
        assert asked == pytest.approx([80.0, 80.0])
    assert eps.shape == x.shape
    assert float((eps - x).abs().max()) < 0.1  # nothing but noise is there


def test_a_class_can_be_asked_for() -> None:
    found = 2 * run(pipeline("digits", label=[3, 8, 3, 8]), 12) - 1
    data = fs.exact.digits()
    images = found.permute(0, 3, 1, 2)
    scores = [data.log_density(images, 1.0, 0.1, label=label) for label in range(10)]
    assert torch.stack(scores).argmax(0).tolist() == [3, 8, 3, 8]


@pytest.mark.parametrize("name", PICTURES)
def test_few_steps_are_near_many(name: str) -> None:
    pipe = pipeline(name)
    converged = run(pipe, 96, 2, solver="unipc_3", grid="lambda")
    off = [float((run(pipe, n, 2) - converged).square().mean().sqrt()) for n in (6, 24)]
    assert off[1] < off[0] / 3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'digit'"):
        pipeline("digit")
    with pytest.raises(ValueError, match="label = 3"):
        pipeline("exact-patches", label=3)
