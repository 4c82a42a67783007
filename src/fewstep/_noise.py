"""Starting noise that depends on (seed, sample index) alone: sample k of a run is the same
whatever the batch size, the split or the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["start_noise"]


def start_noise(
    shape: Sequence[int],
    seed: int | Sequence[int],
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of the given shape (batch first), drawn on the host in float32.

    seed: one integer: sample i draws from (seed, first + i). A list: sample i draws from
        (seed[i], 0), so that `seed=[a, b]` gives the first samples of runs a and b.
    first: index of the first sample, to continue or split a run.
    """
    batch = shape[0]
    if isinstance(seed, (int, np.integer)):
        keys = [(int(seed), first + i) for i in range(batch)]
    else:
        keys = [(int(s), 0) for s in seed]
        if len(keys) != batch:
            raise ValueError(f"seed has {len(keys)} entries for {batch} samples; give one each")
    if any(k < 0 for key in keys for k in key):
        raise ValueError(f"seed = {seed}, first = {first}; need integers >= 0")
    noise = torch.empty(tuple(shape), dtype=torch.float32)
    for row, key in zip(noise, keys, strict=True):
        # SeedSequence mixes (seed, index) well; torch's generators alone correlate close seeds.
        state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.randn(row.shape, generator=torch.Generator().manual_seed(state), out=row)
    return noise.to(device=device, dtype=dtype)
