"""Print what noise costs: the path against torchsde's tree, independent draws against torch.randn.

    pip install -c constraints.txt -e . torchsde
    pip install --no-deps k-diffusion && pip install einops scipy      # optional
    python benchmarks/noise.py                                         # --quick: a look

A run asks for the noise of every step between 20 or 50 Karras levels from 14.6 to 0.03 (the largest
state: 20 only), in order, start-up included: `Noise(path=True).draw`, its coefficients computed
anew, and k-diffusion's BrownianTreeNoiseSampler, that is torchsde.BrownianTree with its default
tolerance (without k-diffusion: the same calls to torchsde), a tree for each sample as there is a
seed for each. `Noise().draw` is compared with torch.randn with a generator for each sample.

All run side by side in one process, in turn, on one thread with the thread's own clock (--threads
changes both); a figure is the median of the ratios of the rounds. The allocator keeps its memory,
which favours whoever allocates most: the tree. "eager" is the tensor code, which runs where there
is no compiled kernel; its bits are the same, which every row checks.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

import fewstep as fs
from fewstep import _combine, _noise
from fewstep._noise import Draw, Noise

SHAPES = ((4, 64, 64), (16, 128, 128), (16, 21, 60, 104))
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
LEVEL = fs.EDM().level(1.0)

Sampler = Callable[[Tensor, Tensor], Tensor]


def tree_sampler() -> Callable[[Tensor, float, float, list[int]], Sampler]:
    """k-diffusion's noise sampler (only its `sampling` module is loaded), or the same calls."""
    spec = find_spec("k_diffusion")
    if spec is not None:
        sys.modules["k_diffusion"] = module_from_spec(spec)  # and not executed
        missing = [n for n in ("torchdiffeq", "torchvision") if not find_spec(n)]
        for name in [*missing, *(f"{n}.transforms" for n in missing)]:
            stub = module_from_spec(ModuleSpec(name, None))
            stub.odeint = stub.functional = None  # type: ignore
            sys.modules[name] = stub
        return importlib.import_module("k_diffusion.sampling").BrownianTreeNoiseSampler
    brownian_tree = importlib.import_module("torchsde").BrownianTree

    def sampler(x: Tensor, low: float, high: float, seeds: list[int]) -> Sampler:
        ends = torch.tensor(low), torch.tensor(high)
        trees = [brownian_tree(ends[0], torch.zeros_like(x[0]), ends[1], entropy=s) for s in seeds]

        def draw(a: Tensor, b: Tensor) -> Tensor:
            return -torch.stack([tree(b, a) for tree in trees]) / (a - b).sqrt()

        return draw

    return sampler


def karras(count: int, low: float = 0.03, high: float = 14.6, rho: float = 7.0) -> list[float]:
    """Noise levels, without the final zero."""
    ends = high ** (1 / rho), low ** (1 / rho)
    middle = [(ends[0] + i / (count - 1) * (ends[1] - ends[0])) ** rho for i in range(1, count - 1)]
    return [high, *middle, low]


def ratios(runs: list[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[str]:
    """Times of the first over times of the others."""
    found = []
    for _ in range(rounds):
        times = []
        for run in runs:
            start = clock()
            run()
            times.append(clock() - start)
        found.append([times[0] / t for t in times[1:]])
    return [f"{median(column):.2f}" for column in zip(*found, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one round, the smaller states")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    warnings.simplefilter("ignore")  # torchsde's about queries at the ends of its interval
    sampler = tree_sampler()
    kernel = _noise._kernel is not None and _combine.KERNEL

    def timed(draw: Callable[[], object], on: bool) -> Callable[[], object]:
        def run() -> None:
            _combine.KERNEL = on
            _noise._innovation.cache_clear()
            draw()

        return run

    print(f"kernel: {'yes' if kernel else 'no'}, threads: {options.threads}\n")
    print("| sample | batch | steps | tree / path | tree / path, eager | randn / draw | eager |")
    print("|---|---|---|---|---|---|---|")
    for one in SHAPES[: 2 if options.quick else None]:
        for batch in (1, 4):
            for count in (20, 50) if one is not SHAPES[-1] else (20,):
                x = torch.zeros(batch, *one)
                rounds = 5 if x.numel() < 1 << 17 and not options.quick else 1
                levels = karras(count + 1)
                sigmas = [torch.tensor(s) for s in levels]
                places = [math.log(s) for s in levels]
                seeds = list(range(batch))
                path, free = Noise(seeds, path=True), Noise(seeds)

                def tree(x=x, levels=levels, sigmas=sigmas, seeds=seeds) -> None:
                    draw = sampler(x, levels[-1], levels[0], seeds)
                    for a, b in pairwise(sigmas):
                        draw(a, b)

                def ours(x=x, places=places, path=path) -> None:
                    for a, b in pairwise(places):
                        path.draw(Draw(LEVEL, LEVEL, (a, b)), 0, x)

                def randn(one=one, count=count, seeds=seeds) -> None:
                    made = [torch.Generator().manual_seed(s) for s in seeds]
                    for _ in range(count):
                        torch.stack([torch.randn(one, generator=g) for g in made])

                def independent(x=x, count=count, free=free) -> None:
                    for i in range(count):
                        free.draw(Draw(LEVEL, LEVEL), i, x)

                both = []
                for on in (kernel, False):
                    _combine.KERNEL = on
                    both.append(path.draw(Draw(LEVEL, LEVEL, (places[0], places[1])), 0, x))
                assert torch.equal(*both)
                ways = [True, False] if kernel else [False]
                cells = ratios([tree, *(timed(ours, on) for on in ways)], rounds, clock)
                more = ratios([randn, *(timed(independent, on) for on in ways)], rounds, clock)
                if not kernel:
                    cells, more = ["-", *cells], ["-", *more]
                name = "x".join(map(str, one))
                print(f"| {name} | {batch} | {count} | {' | '.join([*cells, *more])} |", flush=True)


if __name__ == "__main__":
    main()
