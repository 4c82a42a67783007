"""What a piece of code does behind its result: operations it dispatches, bytes it allocates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import _combine

#: Values of `_combine.KERNEL` to test with: the compiled kernel, where there is one, and PyTorch's.
BOTH = [
    pytest.param(
        True,
        id="kernel",
        marks=pytest.mark.skipif(_combine._kernel is None, reason="installed without a compiler"),
    ),
    pytest.param(False, id="eager"),
]


class Operations(TorchDispatchMode):
    """Counts operations by name; `numbers` counts those whose tensors all have at most one element
    (scalar arithmetic on tensors, which the host should have done)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names[name] += 1
        tensors = [v for v in (*args, *(kwargs or {}).values(), out) if isinstance(v, torch.Tensor)]
        if tensors and all(v.numel() <= 1 for v in tensors):
            self.numbers[name] += 1
        return out


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Peak and final growth of memory while `run` runs, its result alive at the end.

    From the allocator's own record, which also sees what a kernel allocates inside itself (a
    dispatch mode does not)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now += change
        peak = max(peak, now)
    del result
    return peak, now
