r"""Bases: orthogonal transforms in which the coefficients of a plan may differ from mode to mode.

The covariance of images, latents or sound is far from a multiple of the identity, but nearly
diagonal in a fixed basis B. A plan with a basis acts on the modes B (x - alpha mu) and
B (D - mu); a coefficient is a float, or an array that broadcasts against the modes of one sample.

    kind        modes B v                                              scales c (one per)
    identity    v                                                      element, or one number
    channel     R v over the channel axis; no R: v                     channel
    cosine      orthonormal DCT-II over all axes after the first       mode, or spatial frequency
                of a sample (over that one if there is no other),
                and R over the channels
    low_rank    [U^T v, v - U U^T v], flat                             column of U, one for the rest

R is an orthogonal matrix over the channels (the first axis of a sample, axis 1 of a batch). U has
orthonormal columns over the flattened sample. The modes of low_rank are r + d numbers for a sample
of d, so that its rows are elementwise as all others; inner products are kept. `spread` turns
scales, as listed above, into an array that broadcasts against modes.

A basis with a `shape` is for samples of that shape; without, for all that its arrays fit: plans
with one number for all modes, or one per channel, then work at any size.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._prediction import unknown
from ._process import Array

__all__ = ["Basis", "Channel", "Cosine", "Identity", "LowRank", "bases", "basis_from"]

_ORTHONORMAL = 1e-6  # columns that came through float32 pass


@dataclass(frozen=True, eq=False)
class Basis(abc.ABC):
    """An orthogonal transform of samples. Frozen; equal when kind and arrays are.

    mean: broadcasts against a sample, or None for zero. It is not part of the transform: `forward`
        and `inverse` are linear.
    shape: of a sample, or None for any.
    """

    mean: Array | None = None
    shape: Array | None = None
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_placed", {})
        self._freeze("mean", None)
        self._freeze("shape", 1)
        if self.sample is not None:
            if any(n < 1 for n in self.sample) or self.sample != tuple(self._floats()):
                raise ValueError(f"shape = {tuple(self._floats())}; need positive integers")
            if self.mean is not None:
                _fits("mean", self.mean.shape, self.sample)

    def _floats(self) -> list[float]:
        return [] if self.shape is None else self.shape.tolist()

    @property
    def sample(self) -> tuple[int, ...] | None:
        """`shape` as integers."""
        return None if self.shape is None else tuple(int(n) for n in self._floats())

    def _freeze(self, name: str, axes: int | None) -> Array | None:
        """A field as a read-only float64 array, checked."""
        value = getattr(self, name)
        if value is None:
            return None
        array = np.array(value, dtype=np.float64)
        if not np.isfinite(array).all() or not array.size or (axes and array.ndim != axes):
            need = "finite numbers" if axes is None else f"a finite array with {axes} axes"
            raise ValueError(f"{name} has shape {array.shape}; need {need}")
        array.flags.writeable = False
        object.__setattr__(self, name, array)
        return array

    @abc.abstractmethod
    def forward(self, v: Tensor) -> Tensor:
        """B v for a batch (batch, *sample), in its dtype and on its device."""

    @abc.abstractmethod
    def inverse(self, m: Tensor) -> Tensor:
        """The batch whose modes these are: B^T m."""

    def _near(self, name: str, v: Tensor) -> Tensor:
        """A field next to a batch, in its dtype; uploaded once."""
        key = name, v.device, v.dtype
        placed: dict[Any, Tensor] = self.__dict__["_placed"]
        if key not in placed:
            placed[key] = torch.tensor(getattr(self, name), dtype=v.dtype, device=v.device)
        return placed[key]

    def mean_like(self, v: Tensor) -> Tensor:
        """The mean (zero if there is none) next to a batch, in its dtype; uploaded once."""
        return v.new_zeros(()) if self.mean is None else self._near("mean", v)

    def spread(self, scales: ArrayLike) -> Array:
        """Scales, one per mode or group of modes, as an array that broadcasts against the modes
        of one sample; refused in a sentence if they do not fit. A number always fits."""
        c = np.asarray(scales, dtype=np.float64)
        if self.sample is not None and c.ndim:
            _fits("scales", c.shape, self.sample)
        return c

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse samples (no batch axis) of a shape that does not fit."""
        if self.sample not in (None, shape):
            raise ValueError(f"basis: a sample of shape {shape}, but it is for {self.sample}")
        if self.mean is not None:
            _fits("mean", self.mean.shape, shape)

    def arrays(self) -> dict[str, Array]:
        """What `basis_from` needs to make it again."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: np.asarray(value) for name, value in found.items() if value is not None}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Basis) or self.kind != other.kind:
            return NotImplemented if not isinstance(other, Basis) else False
        mine, theirs = self.arrays(), other.arrays()
        return mine.keys() == theirs.keys() and all(
            np.array_equal(v, theirs[k]) for k, v in mine.items()
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        shapes = (f"{k} {list(v.shape)}" for k, v in self.arrays().items())
        return f"{self.kind}({', '.join(shapes)})"


def _fits(name: str, part: Sequence[int], shape: Sequence[int]) -> None:
    try:
        fits = np.broadcast_shapes(tuple(part), tuple(shape)) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"basis: a sample of shape {tuple(shape)}, but its {name} has shape {tuple(part)}"
        )


@lru_cache(maxsize=32)
def _dct(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal DCT-II of n points, modes in rows."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    matrix = math.sqrt(2 / n) * np.cos(math.pi * k * (2 * x + 1) / (2 * n))
    matrix[0] = math.sqrt(1 / n)
    return torch.tensor(matrix, dtype=dtype, device=device)


def _along(matrix: Tensor, v: Tensor, axis: int) -> Tensor:
    """A matrix applied over one axis."""
    return torch.movedim(torch.movedim(v, axis, -1) @ matrix.T, -1, axis)


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Basis):
    """Modes are the elements: scales per element (the shape of a sample), or any that broadcast."""

    kind: ClassVar[str] = "identity"

    def forward(self, v: Tensor) -> Tensor:
        return v

    def inverse(self, m: Tensor) -> Tensor:
        return m


@dataclass(frozen=True, eq=False, repr=False)
class Channel(Basis):
    """Modes are the channels, rotated by `rotation` (C, C) if that is given: scales per channel,
    for samples (C, ...) with any other axes."""

    rotation: Array | None = None
    kind: ClassVar[str] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        _rotation(self)

    def forward(self, v: Tensor) -> Tensor:
        return v if self.rotation is None else _along(self._near("rotation", v), v, 1)

    def inverse(self, m: Tensor) -> Tensor:
        return m if self.rotation is None else _along(self._near("rotation", m).T, m, 1)

    def spread(self, scales: ArrayLike) -> Array:
        c = np.asarray(scales, dtype=np.float64)
        if c.ndim == 1 and self.sample is not None and len(c) == self.sample[0]:
            c = c.reshape(-1, *(1,) * (len(self.sample) - 1))
        if c.ndim > 1 and math.prod(c.shape[1:]) != 1:
            raise ValueError(
                f"scales has shape {c.shape}; a channel basis needs one per channel, as (C,) if it "
                "has a shape and as (C, 1, ...) with all axes of a sample if not"
            )
        return super().spread(c)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        _check_channels(self, shape)


def _rotation(basis: Channel | Cosine) -> None:
    R = basis._freeze("rotation", 2)
    if R is not None and not (
        R.shape[0] == R.shape[1] and np.allclose(R @ R.T, np.eye(len(R)), atol=_ORTHONORMAL)
    ):
        raise ValueError(f"rotation has shape {R.shape}; need an orthogonal matrix (C, C)")


def _check_channels(basis: Channel | Cosine, shape: tuple[int, ...]) -> None:
    if basis.rotation is not None and (not shape or shape[0] != len(basis.rotation)):
        raise ValueError(
            f"basis: a sample of shape {shape}, but its rotation is for {len(basis.rotation)} "
            "channels (the first axis of a sample)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Cosine(Basis):
    """Modes are spatial frequencies (DCT-II, orthonormal), with an optional `rotation` (C, C) of
    the channels: scales of the shape of a sample, or of its spatial part, the same for all
    channels. Spatial axes are all after the channels; a vector has one, its only one.
    """

    rotation: Array | None = None
    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        _rotation(self)

    def _apply(self, v: Tensor, back: bool) -> Tensor:
        for axis in range(1 if v.ndim == 2 else 2, v.ndim):
            matrix = _dct(v.shape[axis], v.device, v.dtype)
            v = _along(matrix.T if back else matrix, v, axis)
        if self.rotation is not None:
            matrix = self._near("rotation", v)
            v = _along(matrix.T if back else matrix, v, 1)
        return v

    def forward(self, v: Tensor) -> Tensor:
        return self._apply(v, back=False)

    def inverse(self, m: Tensor) -> Tensor:
        return self._apply(m, back=True)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        _check_channels(self, shape)
        if self.rotation is not None and len(shape) < 2:
            raise ValueError(f"basis: a sample of shape {shape} has no channels to rotate")


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Basis):
    """Modes are r directions, the columns of `columns` (d, r), and the remainder, which is not
    resolved: r + 1 scales. d is the number of elements of a sample; `shape` is needed."""

    columns: Array | None = None
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        U = self._freeze("columns", 2)
        if U is None or self.sample is None or math.prod(self.sample) != len(U):
            raise ValueError(
                f"columns, shape = {None if U is None else U.shape}, {self.sample}; need (d, r) "
                "and the shape of a sample of d elements"
            )
        if not np.allclose(U.T @ U, np.eye(U.shape[1]), atol=_ORTHONORMAL):
            raise ValueError(f"columns has shape {U.shape}; its columns must be orthonormal")

    def forward(self, v: Tensor) -> Tensor:
        U, flat = self._near("columns", v), v.flatten(1)
        m = flat @ U
        return torch.cat([m, flat - m @ U.T], dim=1)

    def inverse(self, m: Tensor) -> Tensor:
        U = self._near("columns", m)
        rank = U.shape[1]
        return (m[:, :rank] @ U.T + m[:, rank:]).reshape(-1, *(self.sample or ()))

    def spread(self, scales: ArrayLike) -> Array:
        assert self.columns is not None
        c = np.asarray(scales, dtype=np.float64)
        d, rank = self.columns.shape
        if c.ndim == 0:
            return c
        if c.shape != (rank + 1,):
            raise ValueError(
                f"scales has shape {c.shape}; a basis of rank {rank} needs {rank + 1}: one per "
                "column and one for the remainder, or one number"
            )
        return np.concatenate([c[:-1], np.full(d, c[-1])])


bases: dict[str, type[Basis]] = {b.kind: b for b in (Identity, Channel, Cosine, LowRank)}


def basis_from(kind: str, arrays: Mapping[str, Array]) -> Basis:
    """The basis that gave these `arrays`: how plans are read from files."""
    if kind not in bases:
        raise ValueError(unknown("basis", kind, bases))
    return bases[kind](**dict(arrays))
