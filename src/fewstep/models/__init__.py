"""Networks that ship with the package: small, real, trained by scripts in the repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch

from .._denoiser import Denoiser
from .._prediction import edm, unknown
from .._process import EDM

__all__ = ["Bundled", "load", "models"]


@dataclass(frozen=True)
class Bundled:
    """A bundled model: its sample shape, what it draws, and how it was made."""

    name: str
    shape: tuple[int, ...]
    summary: str
    classes: int
    data_range: tuple[float, float]
    build: Callable[[torch.device | str], Denoiser]


def _digits(device: torch.device | str) -> Denoiser:
    from safetensors.torch import load as load_tensors

    from ._digits import SIGMA_DATA, DigitsNet

    file = resources.files(__name__) / "weights" / "digits.safetensors"
    state = load_tensors(file.read_bytes())
    network = DigitsNet()
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    network.eval().requires_grad_(False).to(device)
    return Denoiser(network, process=EDM(), predicts=edm(SIGMA_DATA))


models: dict[str, Bundled] = {
    "digits": Bundled(
        name="digits",
        shape=(1, 8, 8),
        summary="handwritten digits 8x8 by class (label 0-9, 10 for none), EDM preconditioning",
        classes=10,
        data_range=(-1.0, 1.0),
        build=_digits,
    ),
}


def load(name: str, device: torch.device | str = "cpu") -> Denoiser:
    """A bundled network as a denoiser, ready to sample: `load("digits")`.

    Conditions are keyword arguments: cond={"label": tensor of class numbers, one per sample}.
    """
    if name not in models:
        raise ValueError(unknown("model", name, models))
    return models[name].build(device)
