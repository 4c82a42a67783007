"""Networks that ship with the package: small, real, trained by scripts in the repository; and the
exact models of `fewstep.exact` under the same roof, so that one command samples either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import exact
from .._denoiser import Denoiser
from .._prediction import Prediction, edm, unknown
from .._process import EDM, Flow, Process
from ._classifier import CLASSIFIERS, Classifier

__all__ = [
    "Bundled",
    "Classifier",
    "classifier",
    "classifiers",
    "data_features",
    "find",
    "load",
    "models",
]

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Bundled:
    """A bundled model: its sample shape, what it draws, and its conditions.

    classes: number of classes, requested by cond={"label": numbers}; 0 for none.
    uncond: the condition that stands for no class, for `Guided`.
    data_range: of the data, for display.
    features: the `classifier` whose features tell its samples from the data; None: there is none.
    """

    name: str
    shape: tuple[int, ...]
    summary: str
    process: Process
    build: Callable[[Process], Denoiser]
    classes: int = 0
    uncond: Mapping[str, Any] = field(default_factory=dict)
    data_range: tuple[float, float] = (-1.0, 1.0)
    features: str | None = None


def _tensors(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load as load_tensors

    return load_tensors((resources.files(__name__) / "weights" / name).read_bytes())


def _weights(network: Network, name: str) -> Network:
    """A network with stored weights, in float32, ready for use."""
    network.load_state_dict({k: v.float() for k, v in _tensors(f"{name}.safetensors").items()})
    return network.eval().requires_grad_(False)


def _load_digits(process: Process) -> Denoiser:
    from ._digits import SIGMA_DATA, DigitsNet

    return Denoiser(_weights(DigitsNet(), "digits"), process, edm(SIGMA_DATA))


def _load_patches(kind: str, process: Process) -> Denoiser:
    from ._patches import SIGMA_DATA, TIMES, PatchesNet

    predicts: str | Prediction = edm(SIGMA_DATA) if kind == "edm" else "flow"
    return Denoiser(_weights(PatchesNet(TIMES[kind]), f"patches-{kind}"), process, predicts)


models: dict[str, Bundled] = {
    model.name: model
    for model in (
        Bundled(
            "digits",
            (1, 8, 8),
            "trained network: handwritten digits 8x8 by class, EDM preconditioning",
            EDM(),
            _load_digits,
            classes=10,
            uncond={"label": 10},
            features="digits",
        ),
        Bundled(
            "patches-edm",
            (3, 32, 32),
            "trained network: RGB 32x32 crops of photographs, EDM preconditioning",
            EDM(),
            lambda process: _load_patches("edm", process),
            features="photographs",
        ),
        Bundled(
            "patches-flow",
            (3, 32, 32),
            "trained network: RGB 32x32 crops of photographs, flow matching",
            Flow(),
            lambda process: _load_patches("flow", process),
            features="photographs",
        ),
        Bundled(
            "exact-digits",
            (1, 8, 8),
            "exact: the 1,797 digits of scikit-learn, smoothed with standard deviation 0.1",
            EDM(),
            lambda process: exact.digits().denoiser(process),
            classes=10,
            uncond={"label": -1},
            features="digits",
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


#: Names of the networks whose features make Frechet distances.
classifiers: tuple[str, ...] = tuple(CLASSIFIERS)


def classifier(name: str, device: torch.device | str = "cpu") -> Classifier:
    """A small classifier of the data of bundled models: `classifier("digits")`.

    `features(x)` (n, width) are scaled to mean 0 and standard deviation 1 over the data; calling it
    gives logits (n, classes).
    """
    if name not in CLASSIFIERS:
        raise ValueError(unknown("classifier", name, CLASSIFIERS))
    return _weights(CLASSIFIERS[name](), f"{name}-classifier").to(device)


def data_features(name: str, held_out: bool = False) -> Tensor:
    """Features (n, width) of data, by `classifier(name)`: of the part that the bundled models and
    the classifier were trained on, drawn at random; or of the part that none of them saw.

    digits: all 1,500 training images, all 297 others. photographs: 2,000 and 1,000 crops. What is
    held out there are other parts of the photographs, which is another distribution: compare
    samples with what their model was trained on.
    """
    if name not in CLASSIFIERS:
        raise ValueError(unknown("classifier", name, CLASSIFIERS))
    return _tensors(f"{name}-features.safetensors")["held" if held_out else "train"].float()
