"""The law of one stochastic step given its past: mean, standard deviation, log-density.

Reinforcement learning on samplers treats a step as an action with density
N(x_next; mean, std^2 I) (DDPO, arXiv 2305.13301; Flow-GRPO, 2505.05470; G2RPO, 2510.01982). In a
plan it is exactly that for every solver: the next state is linear in the draws that it uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ._denoiser import check_output
from ._noise import Draw, Source
from ._process import Array

if TYPE_CHECKING:
    from ._plan import Hook, State

__all__ = ["Transition", "transition"]


class _Still(Source):
    """No noise: rows give their means."""

    def draw(self, draw: Draw, number: int, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


@dataclass(frozen=True, eq=False)
class Transition:
    """Normal law of the next state given everything before it.

    mean: (batch, ...), differentiable in the network's output. std: one number for all elements, or
    an array that broadcasts against a state (levels per sample or token). 0 where the step is
    deterministic.
    """

    mean: Tensor
    std: float | Array

    def log_prob(self, x: Tensor) -> Tensor:
        """(batch,) log-density of x, (batch, ...), summed over elements.

        Elements of a deterministic step count 0: their law is a point mass at the mean, the same
        for every policy that is compared there. Divide by the elements for a mean per element.
        """
        check_output(x, self.mean)
        std = np.asarray(self.std, dtype=np.float64)
        safe = np.where(std > 0, std, 1.0)
        scale = np.where(std > 0, 1 / safe, 0.0)
        const = np.where(std > 0, -np.log(safe) - 0.5 * math.log(2 * math.pi), 0.0)
        scale, const = (torch.as_tensor(v).to(x.device, self.mean.dtype) for v in (scale, const))
        z = (x.to(self.mean.dtype) - self.mean) * scale
        return (const - 0.5 * z * z).sum(tuple(range(1, x.ndim)))


def transition(state: State, output: Tensor, hook: Hook | None = None) -> Transition:
    """See `State.transition`."""
    plan = state.plan
    if plan.basis is not None:
        raise ValueError(
            "transition: the plan acts on the modes of a basis, where its law is not that of "
            "independent elements; use a plan without basis"
        )
    still = plan._walk(*state._answered(output, hook), _Still(), dict(state.draws))
    end = still.index
    # Coefficients of new draws in every state made on the way
    spread: dict[int, dict[int, float | Array]] = {}
    for k in range(state.index + 1, end + 1):
        row, here = plan.rows[k - plan.given], dict[int, float | Array]()
        for m, c in row.e.items():
            if m not in state.draws:
                here[m] = here.get(m, 0.0) + c
        for j, c in row.a.items():
            for m, inner in spread.get(j, {}).items():
                here[m] = here.get(m, 0.0) + c * inner
        spread[k] = here
    variance = sum((np.square(c) for c in spread[end].values()), np.float64(0.0))
    std = np.sqrt(variance)
    return Transition(still.x, float(std) if np.ndim(std) == 0 else std)
