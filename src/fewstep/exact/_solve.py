"""The probability-flow ODE of any denoiser, integrated to near rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["integrate"]


def integrate(
    predict: Callable[[Tensor, float, float], tuple[Tensor, Tensor]],
    x: Tensor,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    std: float,
    smallest: float,
    rtol: float = 1e-13,
) -> Tensor:
    """Carry the float64 state `x` from level `start` to `end`; `predict` returns (D, eps).

    All paths share one ODE. On the ellipse alpha = cos phi, sigma = S sin phi, with S = `std` the
    scale of the data, the state is q = x / hypot(alpha, sigma / S) and

        dq / dphi = S cos(phi) eps - sin(phi) D,

    finite from pure noise (phi = pi/2) to data (phi = 0) and zero for white data of scale S.
    Structure of size c = `smallest` shows at phi near c / S, hence phi = (c / S) sinh(u), and
    steps are taken in u.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError('solve needs scipy: pip install "fewstep[exact]".') from error
    angles = []
    for name, (alpha, sigma) in (("start", start), ("end", end)):
        if not (0 <= alpha < math.inf and 0 <= sigma < math.inf and alpha + sigma > 0):
            raise ValueError(
                f"{name}: ({alpha}, {sigma}); accepted are finite alpha, sigma >= 0, not both 0."
            )
        angles.append(math.atan2(sigma / std, alpha))
    scale = min(1.0, max(smallest / std, min(angles)))
    if scale == 0:
        raise ValueError(
            f"start, end: {start}, {end}; sigma = 0 is accepted only for nonsingular covariances."
        )

    def slope(u: float, q: np.ndarray) -> np.ndarray:
        phi = scale * math.sinh(u)
        data, eps = predict(torch.from_numpy(q).view_as(x), math.cos(phi), std * math.sin(phi))
        dq = (std * math.cos(phi)) * eps - math.sin(phi) * data
        return (scale * math.cosh(u)) * dq.flatten().numpy()

    span = [math.asinh(phi / scale) for phi in angles]
    q = (x / math.hypot(start[0], start[1] / std)).flatten().numpy()
    result = solve_ivp(slope, span, q, method="DOP853", rtol=rtol, atol=rtol / 10)
    if not result.success:
        raise RuntimeError(f"solve stopped between {start} and {end}: {result.message}")
    end_state = torch.from_numpy(np.ascontiguousarray(result.y[:, -1])).view_as(x)
    return end_state * math.hypot(end[0], end[1] / std)
