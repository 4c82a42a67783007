"""`generate` as a pipeline of Ray Data: the shards, mapped by actors that write them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ._generate import Job, natural

__all__ = ["run_on_ray"]

#: Mistakes and failures that come back as what they are; anything else as Ray reports it.
_SAID = (ValueError, OSError, ImportError, FloatingPointError)


class _Writer:
    """An actor."""

    def __init__(self, make: Callable[[], Job]) -> None:
        self.make = make

    @cached_property
    def job(self) -> Job:
        """With its model: once for all shards."""
        job = self.make()
        job.claim()
        return job

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        kind = said = ""
        try:
            self.job.run(batch["shard"].tolist(), progress=False)
        except _SAID as error:
            kind = next(c.__name__ for c in _SAID if isinstance(error, c))
            said = str(error)
        return {"kind": np.array([kind]), "said": np.array([said])}


def run_on_ray(make: Callable[[], Job], shards: int, workers: int, device: Any) -> None:
    """Run a job (a partial of `Job`) in so many workers of the Ray cluster that this process is
    connected to or that RAY_ADDRESS names; without one, on this machine."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('ray needs Ray Data: pip install "fewstep[ray]"') from error
    workers = natural("ray", workers)
    gpus = int(device is not None and torch.device(device).type == "cuda")
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False)
    try:
        # Not `ray.data.range`, whose tasks would wait for the processors that the actors hold.
        items = [{"shard": k} for k in range(shards)]
        written = ray.data.from_items(items, override_num_blocks=shards).map_batches(
            _Writer,
            fn_constructor_args=(make,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, shards)),
            num_gpus=gpus,
        )
        for row in written.iter_rows():
            if row["kind"]:
                raise next(c for c in _SAID if c.__name__ == row["kind"])(row["said"])
    finally:
        if mine:
            ray.shutdown()
