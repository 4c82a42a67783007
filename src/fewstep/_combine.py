"""Linear combinations of tensors with host coefficients: the one place where the two meet.

One step of any solver is  sum_i c_i v_i  over states (float32 or float64) and raw network outputs
(any floating type). PyTorch has no kernel for k tensors, so the cost is made of kernels for two:

    same types       addr:           o = c_0 v_0 + c_1 v_1     one kernel, one new tensor
                     (c_0 = 1: add)
    a narrower v_0   copy_, addr_:   o = v_0;  o = c_0 o + c_1 v_1
    every further v  add_(alpha=c):  o = o + c v

that is k - 1 kernels and one allocation, where `torch.add` chained takes k and k. Nothing is read
back and nothing is copied between devices. Cutting the tensors into blocks that stay in a core's
cache was measured to lose to this on a CPU (the calls cost more than the traffic they save) except
for one thing: `add_` of a narrower tensor widens all of it first, so those go block by block.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ._process import Array

__all__ = ["Coefficient", "combine"]

#: A coefficient: a float, or an array (or tensor) that broadcasts against a sample.
Coefficient = float | Array | Tensor

#: Elements of a block: its widened copy (512 KiB in float32) stays in a second-level cache.
_BLOCK = 1 << 17
#: Up to here the number of calls is the cost, not the memory.
_SMALL = 1 << 15

Term = tuple[float, Tensor]


def combine(terms: Sequence[tuple[Coefficient, Tensor]], dtype: torch.dtype) -> Tensor:
    """sum c v in `dtype`, a new tensor; accumulated in `dtype`, whatever the types of the v.

    terms: at least one (coefficient, tensor); the tensors have one shape and device, any strides.
        Coefficients of exactly zero are skipped. Read-only arrays are uploaded once.
    Differentiable in the tensors, and usable under `torch.func` and `torch.compile`.
    """
    wide, narrow, vectors = [], [], []
    watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    grad = torch.is_grad_enabled()
    for term in terms:
        c, v = term
        if type(v) is not Tensor or (grad and v.requires_grad):
            watched = True
        if not isinstance(c, (float, int)):
            vectors.append((_uploaded(c, v.device, dtype), v))
        elif c != 0:
            (wide if v.dtype is dtype else narrow).append(term)
    if not (wide or narrow or vectors):
        return torch.zeros_like(terms[0][1], dtype=dtype)
    # Where somebody watches (a graph, a transform, a compiler, a subclass) an out-of-place chain is
    # right, and compilers fuse it. Other devices may lack addr.
    if watched or terms[0][1].device.type not in ("cpu", "cuda"):
        return _functional([*wide, *narrow], vectors, dtype)
    total = _scalars(wide, narrow, dtype) if wide or narrow else None
    for c, v in vectors:
        total = (v.to(dtype) * c) if total is None else total.addcmul_(v, c)
    assert total is not None
    return total


def _functional(
    plain: Sequence[Term], vectors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    total: Tensor | None = None
    for c, v in plain:
        wide = v.to(dtype)
        total = wide * c if total is None else torch.add(total, wide, alpha=c)
    for c, v in vectors:
        part = v.to(dtype) * c
        total = part if total is None else total + part
    assert total is not None
    return total


def _scalars(wide: list[Term], narrow: list[Term], dtype: torch.dtype) -> Tensor:
    c, v = wide[0] if wide else narrow[0]
    small = v.numel() <= _SMALL
    # In float32 this is 1 itself: Euler steps of flows, and of everything in x / alpha.
    unit = abs(c - 1) <= (2**-25 if dtype is torch.float32 else 0)
    if wide and unit and (len(wide) > 1 or (small and narrow)):
        d, w = wide[1] if len(wide) > 1 else narrow.pop(0)
        total = torch.add(v, w, alpha=d)
        rest = wide[2:]
    elif wide and (small or not all(v.is_contiguous() for _, v in (*wide, *narrow))):
        total = v * c
        rest = wide[1:]
    elif narrow:
        c, v = narrow.pop(0)
        total = torch.empty_like(v, dtype=dtype).copy_(v)
        rest = wide[1:]
        if wide:
            d, w = wide[0]
            total.view(1, -1).addr_(_one(w.device, dtype), w.view(-1), beta=c, alpha=d)
        else:
            total.mul_(c)
    elif len(wide) > 1:
        d, w = wide[1]
        one = _one(v.device, dtype)
        total = torch.addr(v.view(1, -1), one, w.view(-1), beta=c, alpha=d).view(v.shape)
        rest = wide[2:]
    else:
        total, rest = v * c, ()
    for c, v in rest:
        total.add_(v, alpha=c)
    for c, v in narrow:
        if small or v.device.type != "cpu":
            total.add_(v, alpha=c)
        else:
            for part, piece in _blocks(total, v):
                part.add_(piece, alpha=c)
    return total


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of matching parts of at most about _BLOCK elements."""
    if a.is_contiguous() and b.is_contiguous():
        a, b = a.view(-1), b.view(-1)
    dim = max(range(a.ndim), key=lambda d: a.shape[d])
    size = max(1, a.shape[dim] * _BLOCK // a.numel())
    return zip(a.split(size, dim), b.split(size, dim), strict=True)


@cache
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, device=device, dtype=dtype)


_UPLOADED: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def _uploaded(c: Array | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The array on the device. Kept for arrays that cannot change, as long as they live."""
    if isinstance(c, Tensor):
        return c
    key = (id(c), device, dtype)
    found = _UPLOADED.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = torch.tensor(c, dtype=dtype).to(device, non_blocking=True)
        if not c.flags.writeable:
            _UPLOADED[key] = found
            weakref.finalize(c, _UPLOADED.pop, key, None).atexit = False
    return found
