"""What several commands are told: which model, of which shape, with which guidance, where."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ._denoiser import Guided, Model
from .metrics import bundled_features
from .models import data_features, find, load

__all__ = [
    "AnyModel",
    "Asked",
    "Device",
    "Guidance",
    "Shape",
    "asked",
    "check_device",
    "imported",
    "integers",
]

AnyModel = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A bundled model (`fewstep models`), or package.module:name of your own denoiser "
        "(or of a function that returns it).",
    ),
]
Device = Annotated[str, typer.Option(help="Torch device, for example cpu or cuda.")]
Shape = Annotated[
    str | None, typer.Option(help="Of one sample, such as 3x32x32. Bundled models know theirs.")
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Classifier-free guidance scale (bundled models with classes). Default: none."
    ),
]


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device = {device}: {reason}; cpu always works") from None


def integers(name: str, text: str, separator: str = ",") -> list[int]:
    try:
        return [int(part) for part in text.lower().split(separator)]
    except ValueError:
        raise ValueError(f"{name} = {text}; give integers separated by {separator!r}") from None


def imported(name: str) -> Model:
    """The denoiser package.module:name, or what it returns."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as with `python -m`: modules of the folder one is in
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model = {name}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(found, Model) and callable(found):
        found = found()
    if not isinstance(found, Model):
        raise ValueError(f"model = {name} is {found!r}; need a fewstep.Denoiser or Guided")
    return found


@dataclass(frozen=True)
class Asked:
    """A model that a command names, and what is known of it."""

    name: str
    model: Model
    shape: tuple[int, ...]
    cond: Mapping[str, Any] = field(default_factory=dict)
    data_range: tuple[float, float] = (-1.0, 1.0)
    features: Callable[[Tensor], Tensor] | None = None
    data: Tensor | None = None
    #: Options of `fewstep sample` that make it this model; None: it does not know it.
    options: str | None = None


def asked(name: str, shape: str | None, guidance: float | None, device: str) -> Asked:
    size = None if shape is None else tuple(integers("shape", shape, "x"))
    if ":" in name:
        if size is None:
            raise ValueError("shape is missing; give that of one sample, such as 3x32x32")
        if guidance is not None:
            raise ValueError("guidance is for bundled models; wrap your own in fewstep.Guided")
        return Asked(name, imported(name), size)
    bundled = find(name)
    denoiser: Model = load(name, device)
    cond, options = {}, f"--model {name}"
    if bundled.classes:
        cond = {"label": torch.arange(bundled.classes, device=device)}
        options += f" --guidance {1 if guidance is None else guidance:g}"
    if guidance is not None:
        if not bundled.classes:
            raise ValueError(f"guidance = {guidance}, but model {name!r} has no classes")
        denoiser = Guided(denoiser, guidance, bundled.uncond)
    network, data = None, None
    if bundled.features is not None:
        network, data = (
            bundled_features(bundled.features, device=device),
            data_features(bundled.features),
        )
    if size not in (None, bundled.shape):
        network, data, options = None, None, None
    return Asked(
        name,
        denoiser,
        bundled.shape if size is None else size,
        cond,
        bundled.data_range,
        network,
        data,
        options,
    )
