"""Linear combinations of tensors with host coefficients: the one place where the two meet.

One step of any solver is  sum_i c_i v_i  over states (float32 or float64) and raw network outputs
(any floating type). There are three ways to it:

- The compiled kernel (`_kernel.c`, built where there is a C compiler; `KERNEL` says whether it is
  there): one pass over plain tensors on the CPU, whatever their number and types. Every tensor is
  read once, the result written once, nothing else allocated. It runs on torch's own OpenMP threads.
- Elsewhere PyTorch, which has no kernel for k tensors, with kernels for two:

      same types       addr:           o = c_0 v_0 + c_1 v_1     one kernel, one new tensor
                       (c_0 = 1: add)
      a narrower v_0   copy_, addr_:   o = v_0;  o = c_0 o + c_1 v_1
      every further v  add_(alpha=c):  o = o + c v

  that is k - 1 kernels and one allocation, where `torch.add` chained takes k and k. (On a CPU
  `add_` widens a narrower tensor whole before it adds it.)
- Where somebody watches (autograd, a transform, a compiler or tracer, a subclass), out of place.

Nothing is read back and nothing is copied between devices.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._process import Array

try:
    from ._kernel import combine as _kernel
except ModuleNotFoundError:  # installed without a compiler
    _kernel = None

__all__ = ["KERNEL", "Coefficient", "combine", "plus", "uploaded"]

#: Whether the compiled kernel is there and in use (the environment variable FEWSTEP_KERNEL=0
#: leaves it out).
KERNEL = _kernel is not None and os.environ.get("FEWSTEP_KERNEL") != "0"

#: A coefficient: a float, or an array (or tensor) that broadcasts against a sample.
Coefficient = float | Array | Tensor

#: The kernel's numbers for types; the first two are those of states.
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Elements that are worth a thread: as torch's own kernels have it.
_GRAIN = 1 << 15
#: Up to here the number of calls is the cost, not the memory.
_SMALL = 1 << 15

Term = tuple[float, Tensor]


def combine(terms: Sequence[tuple[Coefficient, Tensor]], dtype: torch.dtype) -> Tensor:
    """sum c v in `dtype`, a new tensor; accumulated in `dtype`, whatever the types of the v.

    terms: at least one (coefficient, tensor); the tensors have one shape and device, any strides.
        Coefficients of exactly zero are skipped. Read-only arrays are uploaded once.
    Differentiable in the tensors, and usable under `torch.func` and `torch.compile`.
    """
    if len(terms) == 2:
        (c, v), (d, w) = terms
        alike = v.dtype is w.dtype is dtype
        if alike and isinstance(c, float) and isinstance(d, float) and d != 0 and _is_one(c, dtype):
            return torch.add(v, w, alpha=d)  # one pass and one call, whoever watches
    watched = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
    if KERNEL and not watched and (total := _one_pass(terms, dtype)) is not None:
        return total
    wide, narrow, vectors = [], [], []
    grad = torch.is_grad_enabled()
    for term in terms:
        c, v = term
        if type(v) is not Tensor or (grad and v.requires_grad):
            watched = True
        if not isinstance(c, (float, int)):
            vectors.append((uploaded(c, v.device, dtype), v))
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


def plus(total: Tensor, c: Coefficient) -> Tensor:
    """total + c, in place: a new tensor from `combine` that nobody else holds yet."""
    return total.add_(c if isinstance(c, (float, int)) else uploaded(c, total.device, total.dtype))


def _is_one(c: float, dtype: torch.dtype) -> bool:
    """In float32 this is 1 itself: Euler steps of flows, and of everything in x / alpha."""
    return abs(c - 1) <= (2**-25 if dtype is torch.float32 else 0)


def _one_pass(terms: Sequence[tuple[Coefficient, Tensor]], dtype: torch.dtype) -> Tensor | None:
    """By the kernel; None where it does not apply: it sees addresses and nothing else, so whatever
    could give a tensor another meaning has to be ruled out here."""
    kind = _KINDS.get(dtype, 2)
    first = terms[0][1]
    if (
        kind > 1
        or not first.is_cpu
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
    ):
        return None
    shape, grad = first.shape, torch.is_grad_enabled()
    used: list[Tensor] = []
    arguments: list[float] = []
    for c, v in terms:
        of = _KINDS.get(v.dtype)
        if (
            of is None
            or not isinstance(c, (float, int))
            or type(v) is not Tensor
            or not v.is_cpu
            or v.layout is not torch.strided
            or v.shape != shape
            or (grad and v.requires_grad)
            or v.is_neg()
            or v._is_zerotensor()
        ):
            return None
        if c != 0:
            used.append(v)
            arguments += (v.data_ptr(), of, c)
    size = first.numel()
    threads = min(torch.get_num_threads(), size // _GRAIN)
    parallel = _parallel() if threads > 1 else 0
    if not used or (threads > 1 and not parallel):
        return None
    total = torch.empty_like(used[0], dtype=dtype)
    # One order of elements in all: the usual one, or that of the new tensor, which is dense.
    if not all(v.is_contiguous() for v in used):
        strides = total.stride()
        if any(v.stride() != strides for v in used):
            return None
    assert _kernel is not None
    _kernel(parallel, threads, size, total.data_ptr(), kind, *arguments)
    return total


@cache
def _parallel() -> int:
    """The address of GOMP_parallel in the OpenMP library that torch itself uses, or 0.

    Threads of our own would compete with torch's, which go on spinning for a while after every
    operation of the network: on all cores in use, that was measured to take back the gain.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


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
    unit = _is_one(c, dtype)
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
    for c, v in (*rest, *narrow):
        total.add_(v, alpha=c)
    return total


@cache
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, device=device, dtype=dtype)


_UPLOADED: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def uploaded(c: Array | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
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
