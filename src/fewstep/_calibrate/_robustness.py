"""How a plan stands up to what it was not fitted to, against hand-made plans."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._denoiser import Denoiser, Guided, Model, Wrapper
from .._plan import Plan
from .._process import Array, Level
from .._sampling import plan
from ._by_value import PlansByValue
from ._teacher import Teacher, run_plan

__all__ = ["Robustness", "robustness"]

_NOISES = {"output noise 2^-11": 2.0**-11, "output noise 2^-8": 2.0**-8}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Robustness:
    """Errors under one condition: of the plan, and of the hand-made plan that is best there (by
    median)."""

    errors: Array
    hand: Array
    best: str

    @property
    def ratio(self) -> float:
        """Median error of the plan over that of the best hand-made one: below 1 it is better."""
        return float(np.median(self.errors) / np.median(self.hand))


class _Noisy(Wrapper):
    """Outputs with relative noise: out (1 + size z)."""

    def __init__(self, model: Model, size: float, seed: int) -> None:
        self.model, self.size, self.seed, self.calls = model, size, seed, 0

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        out = self.model.output(x_in, t_in, level, cond)
        self.calls += 1
        source = torch.Generator().manual_seed(self.seed + self.calls)
        z = torch.randn(out.shape, generator=source).to(out)
        return out * (1 + self.size * z)


class _Rounded(Wrapper):
    """Inputs and outputs rounded: what is left of a dtype where the network cannot be converted."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def output(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        out = self.model.output(x_in.to(self.dtype).to(x_in.dtype), t_in, level, cond)
        return out.to(self.dtype)


def _in(model: Model, dtype: torch.dtype) -> Model:
    """The model with its network in another dtype."""
    if isinstance(model, Guided):
        return replace(model, model=_in(model.model, dtype))
    if isinstance(model, Denoiser) and isinstance(model.network, torch.nn.Module):
        return replace(model, network=copy.deepcopy(model.network).to(dtype), dtype=dtype)
    return _Rounded(model, dtype)


def robustness(
    run: Plan | PlansByValue,
    hand: Mapping[str, Plan] | Sequence[Plan],
    teacher: Teacher,
    *,
    scales: Sequence[float] = (),
    seed: int = 0,
) -> dict[str, Robustness]:
    """Errors of a plan, and of the best of some hand-made ones, on fresh noises: as it is; with
    relative noise of 2^-11 and 2^-8 in every output of the network (the rounding of float16 and
    bfloat16); with the network in float16 and in bfloat16 (input and output only, where it is no
    module); and at other guidance scales, if the model is `Guided`, against what converges there.
    """
    named = dict(hand) if isinstance(hand, Mapping) else {f"{i}: {p!r}": p for i, p in
                                                           enumerate(hand)}  # fmt: skip
    if not named:
        raise ValueError("hand is empty; give at least one plan to compare with")
    model = teacher.model
    if scales and not isinstance(model, Guided):
        raise ValueError(f"scales = {tuple(scales)}, but the model is not Guided")

    def compare(other: Model, against: Teacher) -> Robustness:
        found = {name: against.errors(p, other) for name, p in named.items()}
        best = min(found, key=lambda name: float(np.median(found[name])))
        return Robustness(against.errors(run, other), found[best], best)

    out = {"as it is": compare(model, teacher)}
    for name, size in _NOISES.items():
        out[name] = compare(_Noisy(model, size, seed), teacher)
    for name, dtype in _DTYPES.items():
        out[name] = compare(_in(model, dtype), teacher)
    for scale in scales:
        other = replace(model, scale=float(scale))  # pyright: ignore[reportArgumentType]
        fine = plan("unipc_3", other, max(teacher.nfe, 48), grid="lambda")
        samples = run_plan(other, fine, teacher.x, teacher.cond, teacher.batch)
        moved = replace(teacher, model=other, samples=samples)
        out[f"guidance {scale:g}"] = compare(other, moved)
    return out
