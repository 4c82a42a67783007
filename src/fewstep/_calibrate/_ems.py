r"""Empirical model statistics (EMS): the three coefficients of DPM-Solver-v3, tabulated in lambda.

With e the noise prediction, D the data prediction and ' = d/dlambda along the ODE, split off a
linear part l of the model, and a linear part s and an offset b of what is left as it moves:

    N = sigma e - l x,      f = N / alpha = (1 - l) x / alpha - D
    l = argmin E |d N / d x|^2  = E[ diag(sigma d e / d x) ]
    (s, b) = argmin E |f' - s f - b|^2:      s = Cov(f, f') / Var(f),   b = E f' - s E f

per coordinate, or with coefficients that many coordinates share. l = 0, s = -1, b = 0 is the
exponential integrator in e (noise form), l = 1, s = b = 0 the one in D (data form). f depends on
x / alpha and lambda alone: two processes with the same network in (x / alpha, lambda) have the same
table.

Source: DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics (arXiv
2310.13268), equations 8, 10 and 11.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike

from .._files import _parsed, _tensors, read, to_bytes, write
from .._prediction import unknown
from .._process import Array, Process

__all__ = ["EMS", "lam_grid", "shared"]

_FORMAT = "fewstep.ems.1"


@dataclass(frozen=True, eq=False, repr=False)
class EMS:
    """Coefficients l, s, b of DPM-Solver-v3 at values of lambda; see the module for what they are.

    lam: (n,), n >= 2, strictly increasing (from noise to data), finite.
    l, s, b: (n, *size), finite. size broadcasts against the shape of a sample: that shape, (C, 1,
        1) for one value per channel, () for one in all.
    info: how they were made.
    """

    lam: Array
    l: Array
    s: Array
    b: Array
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if array.flags.writeable:  # else nobody changes it: no copy of a large table
                array = array.copy()
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds nan or infinity; need finite numbers")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        lam = self.lam
        if lam.ndim != 1 or len(lam) < 2 or not bool((np.diff(lam) > 0).all()):
            raise ValueError(
                f"lam has shape {lam.shape}; need (n,) with n >= 2, strictly increasing (from "
                "noise to data)"
            )
        for name in ("l", "s", "b"):
            shape = getattr(self, name).shape
            if shape[:1] != lam.shape or shape != self.l.shape:
                raise ValueError(
                    f"{name} has shape {shape} for {len(lam)} values of lambda and l of shape "
                    f"{self.l.shape}; need (n, *size), the same for l, s and b"
                )
        info = dict(self.info)
        if not all(isinstance(v, str) for pair in info.items() for v in pair):
            raise ValueError(f"info = {info}; need a mapping of strings to strings")
        object.__setattr__(self, "info", info)

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of one value: it broadcasts against a sample."""
        return self.l.shape[1:]

    def __repr__(self) -> str:
        return (
            f"EMS({len(self.lam)} levels, lambda = {self.lam[0]:.4g} to {self.lam[-1]:.4g}, "
            f"size {self.size})"
        )

    @classmethod
    def gaussian(
        cls,
        process: Process,
        std: ArrayLike,
        mean: ArrayLike = 0.0,
        *,
        count: int = 240,
        lam: tuple[float, float] | ArrayLike | None = None,
    ) -> EMS:
        """The table of data N(mean, std^2), in closed form:

            l = sigma^2 / (std^2 alpha^2 + sigma^2),    s = l - 1,    b = l (1 - l) mean

        There f = -l mean whatever x is, and any s fits. With s = l - 1 the table is the exponential
        integrator in the prediction rotated by std (v-prediction on a variance-preserving path for
        std = 1).

        std, mean: numbers, or arrays of the shape of a sample (or broadcasting against it).
        count: levels, equally spaced in lambda. lam: their ends, or the levels themselves (three or
        more); default: the range of the process.
        """
        scale, mu = np.asarray(std, dtype=np.float64), np.asarray(mean, dtype=np.float64)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"std = {std}; need positive finite numbers")
        if not np.isfinite(mu).all():
            raise ValueError(f"mean = {mean}; need finite numbers")
        try:
            size = np.broadcast_shapes(scale.shape, mu.shape)
        except ValueError as error:
            raise ValueError(
                f"std and mean have shapes {scale.shape} and {mu.shape}; they must broadcast"
            ) from error
        grid = lam_grid(process, count, lam)
        column = grid.reshape(-1, *(1 for _ in size))
        # l = 1 / (1 + std^2 e^(2 lambda)), without overflow at either end.
        turn = 2 * (column + np.log(scale))
        l, rest = np.exp(-np.logaddexp(0.0, turn)), np.exp(-np.logaddexp(0.0, -turn))
        l, rest = (np.broadcast_to(v, (len(grid), *size)) for v in (l, rest))
        info = {"made by": "closed form of Gaussian data", "process": repr(process)}
        return cls(grid, l, -rest, l * rest * mu, info)

    def reduced(self, reduction: str) -> EMS:
        """Averages over coordinates: "channel" (over all axes of a sample but the first, of two or
        more), "scalar" (over all), "element" (none: the table itself).

        An average of tables. The estimator's own reductions are better: they share l before f
        exists, and fit the shared s and b to all coordinates at once.
        """
        axes = shared(reduction, len(self.size))
        if not axes:
            return self
        axes, keep = tuple(k + 1 for k in axes), reduction == "channel"
        l, s, b = (v.mean(axes, keepdims=keep) for v in (self.l, self.s, self.b))
        return EMS(self.lam, l, s, b, {**self.info, "reduced to": reduction})

    def to_bytes(self) -> bytes:
        """The table as safetensors."""
        arrays = {"lam": self.lam, "l": self.l, "s": self.s, "b": self.b}
        meta = {"format": _FORMAT, "info": json.dumps(dict(self.info))}
        return to_bytes(_tensors(arrays), meta)

    @classmethod
    def from_bytes(cls, content: bytes) -> EMS:
        """The table that `to_bytes` wrote."""
        meta, tensors = _parsed(content, _FORMAT, "EMS.save")
        try:
            lam, l, s, b = (tensors[k].numpy() for k in ("lam", "l", "s", "b"))
            return cls(lam, l, s, b, json.loads(meta["info"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"says it is an EMS table but {error}; save it again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; a kill leaves the old one or the new one."""
        write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EMS:
        """The table that `save` wrote."""
        return read(path, cls.from_bytes)


def shared(reduction: str, ndim: int) -> tuple[int, ...]:
    """The axes of a sample along which coordinates share their coefficients."""
    axes = {"element": (), "channel": tuple(range(1, ndim)), "scalar": tuple(range(ndim))}
    if reduction not in axes:
        raise ValueError(unknown("reduction", str(reduction), axes))
    if reduction == "channel" and ndim < 2:
        raise ValueError(
            f"reduction = 'channel' for samples with {ndim} axes; channels are the first axis of "
            "two or more"
        )
    return axes[reduction]


def lam_grid(
    process: Process, count: int, lam: tuple[float, float] | ArrayLike | None = None
) -> Array:
    """Levels for a table: `count` equally spaced in lambda between two ends, or as given."""
    if not isinstance(process, Process):
        raise ValueError(f"process = {process!r} is not a process; give for example fewstep.VP()")
    given = None if lam is None else np.asarray(lam, dtype=np.float64)
    if given is not None and given.shape != (2,):
        return given
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 2:
        raise ValueError(f"count = {count!r}; need an integer >= 2")
    low, high = (
        (process.lam_start, float(process.lam(process.t_end))) if given is None else given.tolist()
    )
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"lam = {(low, high)}; need two finite numbers, the first below the second"
        )
    return np.linspace(low, high, int(count))
