"""Ready-made exact models on the small image sets that ship with the library."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor

from ._models import Empirical

__all__ = ["digits", "patches"]


@lru_cache
def digits(bandwidth: float = 0.1) -> Empirical:
    """1797 handwritten digits (1, 8, 8) in [-1, 1], with labels 0 to 9."""
    arrays = _load("digits")
    return Empirical(_images(arrays, 16), bandwidth, labels=arrays["labels"])


@lru_cache
def patches(bandwidth: float = 0.1) -> Empirical:
    """About 4200 grey patches of photographs (1, 16, 16) in [-1, 1]."""
    return Empirical(_images(_load("patches"), 255), bandwidth)


def _load(name: str) -> dict[str, Tensor]:
    return load((files("fewstep.exact") / "data" / f"{name}.safetensors").read_bytes())


def _images(arrays: dict[str, Tensor], white: int) -> Tensor:
    return arrays["images"][:, None].to(torch.float64) * (2 / white) - 1
