"""One plan for every value of a condition: a class, a style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .._plan import Plan
from .._stacked import stacked

__all__ = ["PlansByValue", "values_of"]


@dataclass(frozen=True)
class PlansByValue:
    """Plans of as many evaluations each, one for every value of a condition.

    name: of the condition, which is one integer or one string per sample. plans: by value.
    """

    name: str
    plans: Mapping[int | str, Plan]

    @property
    def nfe(self) -> int:
        """Network evaluations of a run."""
        return next(iter(self.plans.values())).nfe

    def plan(self, cond: Mapping[str, Any] | None, axes: int) -> Plan:
        """The plan for these conditions and a state of so many axes, batch first: that of their
        value, or the plans of every sample's own, side by side (`fewstep.stacked`)."""
        if cond is None or self.name not in cond:
            raise ValueError(
                f"the condition {self.name!r} is not known here, and there is one plan for each of "
                "its values: give it in cond, or use a recipe made without each"
            )
        values = values_of(self.name, cond[self.name])
        for value in dict.fromkeys(values):
            if value not in self.plans:
                have = ", ".join(repr(v) for v in self.plans)
                raise ValueError(f"cond: {self.name} = {value!r}; there are plans for {have}")
        if len(set(values)) == 1:
            return self.plans[values[0]]
        return stacked([self.plans[v] for v in values], -axes)


def values_of(name: str, value: Any) -> list[int | str]:
    """A condition as integers or strings, one per sample; one alone is for all samples."""
    given = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if given.ndim > 1 or given.dtype.kind not in "iuU" or not given.size:
        raise ValueError(
            f"cond: {name} is {type(value).__name__} of shape {given.shape} and type "
            f"{given.dtype}; one plan per value needs one integer or one string per sample"
        )
    return given.reshape(-1).tolist()
