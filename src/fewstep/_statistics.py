r"""Where the scales of a basis come from: data, samples of the model, or the model's Jacobian.

For data of mean mu and covariance Sigma the data prediction at high noise is that of a Gaussian,

    D(x) = mu + Sigma (Sigma + rho^2)^-1 (x / alpha - mu),     rho = sigma / alpha,

so alpha dD/dx is diagonal in the eigenbasis of Sigma, with entries J = c^2 / (c^2 + rho^2), and
c^2 = rho^2 J / (1 - J): no data needed. (Exactly, alpha dD/dx = Cov[x_0 | x] / rho^2 at any noise
level; at low noise that is another, smaller covariance.) In a given basis B the diagonal is
estimated from directions z of random signs, E[z (B alpha dD/dx B^T z)] (Hutchinson).

Means and covariances belong to the conditions they were measured under, guidance included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._basis import Basis, Channel, Cosine, LowRank, bases
from ._denoiser import Model
from ._noise import start_noise
from ._prediction import unknown
from ._process import Array
from ._sampling import sample

__all__ = ["Statistics", "scales_from_data", "scales_from_jacobian", "scales_from_model"]


class Statistics(NamedTuple):
    """A basis with its mean, the scales of its modes as `gaussian` takes them, and what it cost:
    network evaluations times samples (a Jacobian-vector product counts as two)."""

    basis: Basis
    scales: Array
    nfe: int


def scales_from_data(
    data: ArrayLike | Tensor,
    basis: str = "cosine",
    *,
    rank: int = 64,
    rotate: bool = False,
    floor: float = 0.1,
) -> Statistics:
    """Mean and standard deviations of samples (n, *sample), n >= 2, in a basis.

    basis: "identity", "channel", "cosine" or "low_rank". rank: of low_rank, less than n.
    rotate: channel and cosine: rotate the channels onto their principal axes.
    floor: scales are at least this part of their root mean square: elements that never change have
        scale 0, where there is no clock.
    """
    kind = _kind(basis)
    x = torch.as_tensor(data).detach().to("cpu", torch.float64)
    if x.ndim < 2 or x.shape[0] < 2 or not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"data has shape {tuple(x.shape)}; need n >= 2 finite samples (n, *sample)"
        )
    shape = tuple(x.shape[1:])
    mean = x.mean(0)
    x = x - mean
    fields = {"mean": mean.numpy(), "shape": np.array(shape, dtype=np.float64)}
    if kind is LowRank:
        if not 0 < rank < min(x.shape[0], math.prod(shape)):
            raise ValueError(
                f"rank = {rank}; need 1 to {min(x.shape[0], math.prod(shape)) - 1} for data of "
                f"shape {(x.shape[0], *shape)}"
            )
        flat = x.flatten(1)
        values, vectors = torch.linalg.svd(flat, full_matrices=False)[1:]
        variances = values**2 / len(x)
        rest = variances[rank:].sum() / (flat.shape[1] - rank)
        made: Basis = LowRank(**fields, columns=vectors[:rank].T.numpy())
        found = np.append(variances[:rank].numpy(), rest)
    else:
        if rotate:
            _needs_channels(kind, shape)
            channels = x.movedim(1, -1).flatten(0, -2)
            fields["rotation"] = np.linalg.eigh((channels.T @ channels).numpy())[1].T[::-1]
        made = kind(**fields)
        found = _pool(kind, made.forward(x).square().mean(0).numpy())
    return Statistics(made, _scales(made, found, floor), 0)


def scales_from_model(
    model: Model,
    shape: Sequence[int],
    basis: str = "cosine",
    *,
    nfe: int = 8,
    rank: int = 64,
    rotate: bool = False,
    floor: float = 0.1,
    **options: Any,
) -> Statistics:
    """The same from samples drawn with the default solver: shape (n, *sample), a few hundred.

    options: of `sample` (seed, cond, solver, ...). For more samples than fit in one batch, draw
    them yourself and give them to `scales_from_data`.
    """
    drawn = sample(model, shape, nfe=nfe, **options)
    found = scales_from_data(drawn, basis, rank=rank, rotate=rotate, floor=floor)
    return found._replace(nfe=nfe * drawn.shape[0])


def scales_from_jacobian(
    model: Model,
    shape: Sequence[int],
    basis: str = "cosine",
    *,
    rho: float = 4.0,
    derivative: str = "jvp",
    rank: int = 64,
    rotate: bool = False,
    floor: float = 0.3,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
) -> Statistics:
    """The same from Jacobians of D at n states of pure noise, shape (n, *sample); no samples.

    rho: sigma / alpha of those states, some times the standard deviation of the data: less, and
        the Jacobian is that of a neighbourhood; more, and it drowns in rounding.
    derivative: "jvp" (torch.func.jvp; the network must support forward mode) or "difference"
        (central, step sigma / 10).
    floor: as above, but high: small entries are lost in the noise of the estimate, and a scale that
        is far too small costs much more than one that is too large.
    cond: for these n states; the directions differ from state to state, so spread conditions too.
    Cost: 2 n; with `rotate` 4 n; low_rank 2 n + 4 n (rank + 8), by subspace iteration with the
    Jacobian averaged over states.
    """
    kind = _kind(basis)
    if derivative not in ("jvp", "difference"):
        raise ValueError(unknown("derivative", derivative, ("jvp", "difference")))
    process, count, one = model.process, int(shape[0]), tuple(int(n) for n in shape[1:])
    highest = float(process.level(process.t_start).rho)
    if not 0 < rho < highest:
        raise ValueError(f"rho = {rho}; need 0 < rho < {highest:.4g}, where {process!r} starts")
    t = float(process.time(-math.log(rho)))
    level = process.level(round(t) if model.rounds else t)
    x = start_noise((count, *one), seed, device=model.device) * level.sigma
    options = dict(cond or {})
    spent = 0

    def denoise(v: Tensor) -> Tensor:
        return model(v, level.t, **options)

    def products(direction: Tensor) -> tuple[Tensor, Tensor]:
        """D and alpha dD/dx applied to one direction per state, float64 on the host."""
        nonlocal spent
        spent += 2 * count
        direction = direction.to(x)
        with torch.no_grad():
            if derivative == "jvp":
                try:
                    value, slope = torch.func.jvp(denoise, (x,), (direction,))[:2]
                except (NotImplementedError, RuntimeError) as error:
                    denoise(x)  # if that fails too, it is not the derivative
                    raise ValueError(
                        f"derivative = 'jvp', but the network has no forward-mode derivative "
                        f"({str(error).splitlines()[0]}); use 'difference'"
                    ) from error
                slope = slope * level.alpha
            else:
                step = 0.1 * level.sigma
                up, down = denoise(x + step * direction), denoise(x - step * direction)
                value, slope = (up + down) / 2, (up - down) * (level.alpha / (2 * step))
        return value.to("cpu", torch.float64), slope.to("cpu", torch.float64)

    signs = np.random.default_rng(seed).integers(0, 2, (count, *one)) * 2.0 - 1.0
    z = torch.from_numpy(signs)
    fields: dict[str, Any] = {"shape": np.array(one, dtype=np.float64)}
    if kind is LowRank:
        d = math.prod(one)
        if not 0 < rank < d:
            raise ValueError(f"rank = {rank}; need 1 to {d - 1} for samples of shape {one}")
        width = min(d, rank + 8)
        start = np.random.default_rng(seed).standard_normal((d, width))
        columns = torch.linalg.qr(torch.from_numpy(start))[0]
        image = columns
        for _ in range(2):
            columns = torch.linalg.qr(image)[0]
            image = torch.stack(
                [
                    products(c.reshape(one).expand(count, *one))[1].mean(0).flatten()
                    for c in columns.T
                ],
                dim=1,
            )
        inside = columns.T @ image
        values, vectors = torch.linalg.eigh(0.5 * (inside + inside.T))
        top = torch.flip(values, (0,))[:rank]
        U = columns @ torch.flip(vectors, (1,))[:, :rank]
        made: Basis = LowRank(**fields, columns=U.numpy())
        # The trace of the rest from signs projected onto the rest (Hutch++): the large entries
        # would drown it.
        flat = z.flatten(1)
        rest = (flat - flat @ U @ U.T).reshape(z.shape)
        value, slope = products(rest)
        found = np.append(top.numpy(), float((rest * slope).sum()) / count / (d - rank))
    else:
        if rotate:
            _needs_channels(kind, one)
            # E[z slope^T], summed over positions, is the block of J between channels.
            value, slope = products(z)
            outer = torch.einsum("ncp,nep->ce", z.flatten(2), slope.flatten(2))
            fields["rotation"] = np.linalg.eigh((outer + outer.T).numpy())[1].T[::-1]
        made = kind(**fields)
        value, slope = products(made.inverse(z))
        found = _pool(kind, (z * made.forward(slope)).mean(0).numpy())
    gain = np.clip(found, 0.0, 0.999)
    if not (gain > 0).any():
        raise ValueError(
            f"rho = {rho}: the Jacobian has no positive entries there; try another rho, or measure "
            "on samples"
        )
    found = level.rho**2 * gain / (1 - gain)
    # The states are noise about 0, not about mu: there E[D] = (1 - J) mu.
    modes = made.forward(value.mean(0)[None]) / torch.from_numpy(1 - made.spread(gain))
    made = type(made)(**{**fields, **made.arrays(), "mean": made.inverse(modes)[0].numpy()})
    return Statistics(made, _scales(made, found, floor), spent)


def _kind(basis: str) -> type[Basis]:
    if basis not in bases:
        raise ValueError(unknown("basis", str(basis), bases))
    return bases[basis]


def _needs_channels(kind: type[Basis], shape: tuple[int, ...]) -> None:
    if kind not in (Channel, Cosine) or len(shape) < 2:
        raise ValueError(
            f"rotate = True with basis {kind.kind!r} and samples of shape {shape}; channels are "
            "the first axis of samples with two or more, in a channel or cosine basis"
        )


def _pool(kind: type[Basis], variances: Array) -> Array:
    """Per mode; per channel for a channel basis."""
    if kind is Channel:
        return variances.mean(axis=tuple(range(1, variances.ndim)))
    return variances


def _scales(basis: Basis, variances: Array, floor: float) -> Array:
    """Square roots, no less than `floor` times their root mean square over modes."""
    if not floor > 0:
        raise ValueError(f"floor = {floor}; need a positive number")
    typical = float(np.mean(basis.spread(np.maximum(variances, 0.0))))
    if typical == 0:
        raise ValueError("data does not vary: all samples are equal")
    return np.sqrt(np.maximum(variances, floor**2 * typical))
