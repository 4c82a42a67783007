"""Print what one step costs beside the network, against what its memory traffic costs.

    pip install -c constraints.txt -e . diffusers
    pip install --no-deps azula k-diffusion && pip install einops scipy    # both optional
    python benchmarks/step_cost.py                                         # --quick: a look

One step is all that happens between two network calls: the input's scaling and the time tensor,
the conversion of the output, the update (fewstep: `query` and `advance`; diffusers:
`scale_model_input` and `step`; k-diffusion and azula: their sampling functions). The network is the
same everywhere: it returns a tensor that was there before. All run side by side in one process, in
turn, without gradients, on a fixed number of threads; a run is 20 steps, start-up included, and its
time over 20 is one measurement; figures are medians. On one thread the clock is the thread's own,
so that other work on the machine counts only through the caches.

**Limit.** One fused pass over the memory that the method needs: read the state, the newest output
in the network's type and the older outputs of the formula in the state's type, write the new state
into a tensor of its own, since states are values. It is measured as one `torch.add` of two tensors
into a third and one copy of a tensor (whichever moves bytes faster), scaled to the formula's bytes:
order p reads p + 1 tensors, a predictor-corrector of order p reads p + 2. How a library keeps its
history does not change it: conversions between predictions, and states read twice, count against
the library. `--compile` adds what torch.compile makes of that one pass, as a second estimate (it
is slower than the first, so the first is the stricter), and our step compiled with the network.

**Allocation.** glibc returns large freed tensors to the system and takes them back page by page,
which costs several times the arithmetic and depends on what else lives in the process. The
benchmark restarts itself with an allocator that keeps its memory (as CUDA's does), for every
library and for the limit; this favours those that allocate most. `--system-allocator` leaves it.

FEWSTEP_KERNEL=0 in the environment measures fewstep as it is without its compiled kernel.

Numbers are ratios: times are those of a machine and belong in no document.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

import fewstep as fs
from fewstep._combine import KERNEL, combine
from fewstep._compiled import compiled

SHAPES = ((1, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 60, 104))
DTYPES = (torch.float32, torch.bfloat16)
STEPS = 20
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

#: prepare(x, out) -> run; run() takes STEPS steps
Prepare = Callable[[Tensor, Tensor], Callable[[], object]]


@dataclass(frozen=True)
class Entry:
    """One implementation of a task."""

    library: str
    name: str
    prepare: Prepare


@dataclass(frozen=True)
class Task:
    """Methods of one kind; `reads` tensors per step, one of them the newest output."""

    name: str
    order: int
    reads: int
    entries: tuple[Entry, ...]


def ours(solver: str, predicts: str, flow: bool = False) -> Entry:
    """The public loop, on the form of the plan that `sample` runs."""
    process = fs.Flow() if flow else fs.VP()
    plan = fs.plan(solver, process, STEPS, grid="uniform", predicts=predicts).cheapest

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        start = plan.start(x)

        def run() -> Tensor:
            state = start
            while not state.done:
                state.query()
                state = state.advance(out)
            return state.x

        return run

    return Entry("fewstep", f"{solver}, {predicts}", prepare)


def ours_compiled(solver: str, predicts: str, flow: bool = False) -> Entry:
    """Network and update compiled together; times include the call into compiled code."""
    process = fs.Flow() if flow else fs.VP()

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        model = fs.Denoiser(lambda x_in, t_in: out, process, predicts)
        plan = fs.plan(solver, model, STEPS, grid="uniform")
        return compiled(model)._load(plan, x, {})

    return Entry("fewstep", f"{solver}, {predicts}, compiled", prepare)


def same_memory(solver: str, predicts: str, flow: bool = False) -> Entry:
    """One fused pass over the tensors that this step of ours does read: as many states and outputs
    as its row has, from the same rotating history, summed by one call and nothing around it."""
    process = fs.Flow() if flow else fs.VP()
    plan = fs.plan(solver, process, STEPS, grid="uniform", predicts=predicts).cheapest
    row = plan.rows[STEPS // 2]

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        def run() -> Tensor:
            states = [x] * len(row.a)
            for _ in range(STEPS):
                new = combine([*((0.3, v) for v in (*states, *[out] * len(row.b)))], x.dtype)
                states = [new, *states[:-1]]
            return states[0]

        return run

    return Entry("limit", f"same memory, {solver}, {predicts}", prepare)


def one_pass(reads: int) -> Entry:
    """The limit a second time: what a compiler makes of one pass over as many tensors."""

    @functools.partial(torch.compile, fullgraph=True, dynamic=False)
    def combined(out: Tensor, *states: Tensor) -> Tensor:
        return sum((0.5 * v for v in states), 0.3 * out.to(states[0].dtype))

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        states = [torch.randn_like(x) for _ in range(reads - 1)]

        def run() -> None:
            kept = x
            for _ in range(STEPS):
                kept = combined(out, *states)
            del kept

        return run

    return Entry("limit", "one compiled pass", prepare)


def diffusers(scheduler: str, **config: object) -> Entry | None:
    """A scheduler, with the pipelines' loop."""
    if find_spec("diffusers") is None:
        return None
    module = importlib.import_module("diffusers")
    made = getattr(module, scheduler)(**config)

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        scale = getattr(made, "scale_model_input", None)

        def reset() -> None:
            made.set_timesteps(STEPS)
            made._step_index = None

        def run() -> Tensor:
            state = x
            for t in made.timesteps:
                t.expand(x.shape[0])  # what the network is told, as pipelines make it
                if scale is not None:
                    scale(state, t)
                state = made.step(out, t, state, return_dict=False)[0]
            return state

        run.reset = reset  # pyright: ignore[reportFunctionMemberAccess]
        return run

    extra = "".join(f" {v}" for k, v in config.items() if k == "solver_order")
    return Entry("diffusers", scheduler.replace("Scheduler", "") + extra, prepare)


def k_diffusion(function: str, **keywords: object) -> Entry | None:
    """A sampling function of k-diffusion. Only its `sampling` module is loaded: the package imports
    training code, and libraries for it, that no sampler here uses."""
    spec = find_spec("k_diffusion")
    if spec is None:
        return None
    if "k_diffusion" not in sys.modules:
        sys.modules["k_diffusion"] = module_from_spec(spec)  # and not executed
        missing = [n for n in ("torchsde", "torchdiffeq", "torchvision") if not find_spec(n)]
        for name in [*missing, *(f"{n}.transforms" for n in missing)]:
            stub = module_from_spec(ModuleSpec(name, None))
            stub.odeint = stub.functional = None  # type: ignore
            sys.modules[name] = stub
    sampling = importlib.import_module("k_diffusion.sampling")

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        sigmas = sampling.get_sigmas_karras(STEPS, 0.03, 14.6)
        call = getattr(sampling, function)
        return lambda: call(lambda x, sigma: out, x, sigmas, disable=True, **keywords)

    return Entry("k-diffusion", function.replace("sample_", ""), prepare)


def azula(sampler: str, **keywords: object) -> Entry | None:
    """A sampler of azula, on a denoiser that predicts data."""
    if find_spec("azula") is None:
        return None
    sample = importlib.import_module("azula.sample")
    noise = importlib.import_module("azula.noise")
    denoise = importlib.import_module("azula.denoise")

    class Given(denoise.Denoiser):
        def __init__(self, out: Tensor) -> None:
            super().__init__()
            self.schedule, self.posterior = noise.VPSchedule(), denoise.DiracPosterior(out)

        def forward(self, x: Tensor, t: Tensor) -> object:
            return self.posterior

    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        made = getattr(sample, sampler)(Given(out), steps=STEPS, silent=True, **keywords)
        return lambda: made(x)

    return Entry("azula", sampler.replace("Sampler", ""), prepare)


def tasks(compiling: bool) -> list[Task]:
    """What is compared with what: methods of one family and order."""
    dpm, unipc = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"

    def us(solver: str, predicts: str, flow: bool = False) -> list[Entry]:
        made = [ours(solver, predicts, flow), same_memory(solver, predicts, flow)]
        return [*made, ours_compiled(solver, predicts, flow)] if compiling else made

    table: list[tuple[str, int, int, list[Entry | None]]] = [
        ("Euler, DDIM", 1, 2, [
            *us("ddim", "noise"),
            *us("ddim", "data"),
            diffusers("EulerDiscreteScheduler"),
            diffusers("DDIMScheduler"),
            k_diffusion("sample_euler"),
            azula("DDIMSampler", eta=0.0),
            azula("EulerSampler"),
        ]),
        ("flow Euler", 1, 2, [
            *us("ddim", "flow", True),
            diffusers("FlowMatchEulerDiscreteScheduler"),
        ]),
        ("DPM++ 2M", 2, 3, [
            *us("dpmpp_2m", "noise"),
            *us("dpmpp_2m", "data"),
            diffusers(dpm, solver_order=2),
            k_diffusion("sample_dpmpp_2m"),
            azula("xEABSampler", order=2),
        ]),
        ("DEIS", 2, 3, [
            *us("deis_tab1", "noise"),
            diffusers("DEISMultistepScheduler", solver_order=2),
            azula("zABSampler", order=2),
        ]),
        ("flow AB2", 2, 3, [*us("flow_ab2", "flow", True), azula("vABSampler", order=2)]),
        ("DPM++ 3M", 3, 4, [
            *us("dpmpp_3m", "noise"),
            *us("dpmpp_3m", "data"),
            diffusers(dpm, solver_order=3),
            azula("xEABSampler", order=3),
        ]),
        ("DEIS 3", 3, 4, [
            *us("deis_tab2", "noise"),
            diffusers("DEISMultistepScheduler", solver_order=3),
            k_diffusion("sample_lms", order=3),
            azula("zABSampler", order=3),
        ]),
        ("UniPC 2", 2, 4, [*us("unipc_2", "noise"), diffusers(unipc, solver_order=2)]),
        ("UniPC 3", 3, 5, [*us("unipc_3", "noise"), diffusers(unipc, solver_order=3)]),
    ]  # fmt: skip
    if compiling:
        for _, _, reads, entries in table:
            entries.append(one_pass(reads))
    return [Task(n, p, k, tuple(e for e in entries if e)) for n, p, k, entries in table]


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run, with its reset left out."""
    getattr(run, "reset", lambda: None)()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def limit_runs(x: Tensor) -> list[tuple[int, Callable[[], object]]]:
    """(bytes, passes): two estimates of what memory costs, each into a tensor of its own."""
    y = torch.randn_like(x)

    def add() -> None:
        for _ in range(STEPS):
            torch.add(x, y)

    def copy() -> None:
        for _ in range(STEPS):
            x.clone()

    return [(3 * x.nbytes, add), (2 * x.nbytes, copy)]


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, all_tasks: list[Task], seconds: float
) -> list[dict[str, object]]:
    """One row per entry."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    out = torch.randn(shape, generator=generator).to(dtype)
    passes = limit_runs(x)
    runs = [(task, entry, entry.prepare(x, out)) for task in all_tasks for entry in task.entries]
    samples: list[list[float]] = [[] for _ in runs]
    moved: list[list[float]] = [[] for _ in passes]
    for _, _, run in runs:
        timed(run)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 5:
        for kept, (size, run) in zip(moved, passes, strict=True):
            kept.append(timed(run) / STEPS / size)
        for kept, (_, _, run) in zip(samples, runs, strict=True):
            kept.append(timed(run) / STEPS)
    per_byte = min(float(np.median(kept)) for kept in moved)
    rows: list[dict[str, object]] = []
    for (task, entry, _), kept in zip(runs, samples, strict=True):
        limit = per_byte * (x.nbytes * task.reads + out.nbytes)  # state and history in, state out
        step = float(np.median(kept))
        rows.append(
            {
                "shape": "x".join(map(str, shape[1:])),
                "output": str(dtype).removeprefix("torch."),
                "task": task.name,
                "order": task.order,
                "reads": task.reads,
                "library": entry.library,
                "method": entry.name,
                "to limit": step / limit,
                "microseconds": step * 1e6,
                "limit microseconds": limit * 1e6,
            }
        )
    return rows


def report(rows: list[dict[str, object]]) -> None:
    """One line per method, one column per state and output type: how many times the limit, and in
    brackets, for others, how many times the fastest of ours (not compiled) in the same task."""
    columns = list(dict.fromkeys((str(r["shape"]), str(r["output"])) for r in rows))
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        place = (str(row["shape"]), str(row["output"]))
        ratio = float(row["to limit"])  # type: ignore
        own = [
            float(r["to limit"])  # type: ignore
            for r in rows
            if r["library"] == "fewstep"
            and not str(r["method"]).endswith("compiled")
            and (str(r["shape"]), str(r["output"]), r["task"]) == (*place, row["task"])
        ]
        cell = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
        if row["library"] != "fewstep":
            cell += f" ({ratio / min(own):.1f})"
        line = (f"{row['task']}, {row['reads']}", f"{row['library']} {row['method']}")
        cells.setdefault(line, {})[place] = cell
    titles = ["task, tensors read", "method", *(f"{s} {d}" for s, d in columns)]
    print(f"| {' | '.join(titles)} |")
    print(f"|{' --- |' * len(titles)}")
    for line, found in cells.items():
        print(f"| {' | '.join((*line, *(found[place] for place in columns)))} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of one step, the network left out.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--out", help="also write a CSV file, with times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="per state and type (default 40; quick 4)")
    parser.add_argument("--only", help="tasks whose name contains this")
    parser.add_argument("--compile", action="store_true", help="with torch.compile (needs g++)")
    parser.add_argument("--system-allocator", action="store_true", help="leave glibc's as it is")
    args = parser.parse_args()
    if not args.system_allocator and any(os.environ.get(k) != v for k, v in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # other libraries' deprecations
    torch._dynamo.config.recompile_limit = 1000  # one model per entry, state and type
    seconds = args.seconds or (4.0 if args.quick else 40.0)
    wanted = [t for t in tasks(args.compile) if args.only is None or args.only in t.name]
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {STEPS} steps a run, "
        f"{'with' if KERNEL else 'without'} the compiled kernel"
    )
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for shape in SHAPES:
            for dtype in DTYPES:
                rows += measure(shape, dtype, wanted, seconds)
    report(rows)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
