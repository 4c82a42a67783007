"""Networks that ship with the package: small, real, trained by scripts in the repository; and the
exact models of `fewstep.exact` under the same roof, so that one command samples either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch

from .. import exact
from .._denoiser import Denoiser
from .._prediction import edm, unknown
from .._process import EDM, Process

__all__ = ["Bundled", "find", "load", "models"]


@dataclass(frozen=True)
class Bundled:
    """A bundled model: its sample shape, what it draws, and its conditions.

    classes: number of classes, requested by cond={"label": numbers}; 0 for none.
    uncond: the condition that stands for no class, for `Guided`.
    data_range: of the data, for display.
    """

    name: str
    shape: tuple[int, ...]
    summary: str
    process: Process
    build: Callable[[Process], Denoiser]
    classes: int = 0
    uncond: Mapping[str, Any] = field(default_factory=dict)
    data_range: tuple[float, float] = (-1.0, 1.0)


def _digits(process: Process) -> Denoiser:
    from safetensors.torch import load as load_tensors

    from ._digits import SIGMA_DATA, DigitsNet

    file = resources.files(__name__) / "weights" / "digits.safetensors"
    network = DigitsNet()
    network.load_state_dict({k: v.float() for k, v in load_tensors(file.read_bytes()).items()})
    network.eval().requires_grad_(False)
    return Denoiser(network, process, edm(SIGMA_DATA))


models: dict[str, Bundled] = {
    model.name: model
    for model in (
        Bundled(
            "digits",
            (1, 8, 8),
            "trained network: handwritten digits 8x8 by class, EDM preconditioning",
            EDM(),
            _digits,
            classes=10,
            uncond={"label": 10},
        ),
        Bundled(
            "exact-digits",
            (1, 8, 8),
            "exact: the 1,797 digits of scikit-learn, smoothed with standard deviation 0.1",
            EDM(),
            lambda process: exact.digits().denoiser(process),
            classes=10,
            uncond={"label": -1},
        ),
        Bundled(
            "exact-patches",
            (1, 16, 16),
            "exact: 4,200 grey 16x16 patches of photographs, smoothed with standard deviation 0.1",
            EDM(),
            lambda process: exact.patches().denoiser(process),
        ),
    )
}


def find(name: str) -> Bundled:
    """What is known of a bundled model without loading it."""
    if name not in models:
        raise ValueError(unknown("model", name, models))
    return models[name]


def load(name: str, device: torch.device | str = "cpu") -> Denoiser:
    """A bundled model as a denoiser, ready to sample: `load("digits")`.

    device: where to put a network; exact models follow the state they are given.
    """
    model = find(name)
    denoiser = model.build(model.process)
    if isinstance(denoiser.network, torch.nn.Module):
        denoiser.network.to(device)
    return denoiser
