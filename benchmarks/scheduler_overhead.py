"""Print what a scheduler costs inside a pipeline: fewstep's over diffusers' own.

    pip install -c constraints.txt -e ".[diffusers]" transformers
    python benchmarks/scheduler_overhead.py

The pipelines are those of tests/diffusers/pipelines.py, with networks so small that the scheduler
is seen. Both schedulers run the same solver on the same nodes, in turn, in one process on one
thread; the clock is the thread's own. Timed are the calls that the pipeline makes: `set_timesteps`
once, `scale_model_input` and `step` for each of the evaluations. Ratios of medians, below 1 where
fewstep is faster; "run" is the whole call of the pipeline, network included.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as hf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "diffusers"))
from agreement import DDIM, DPMPP, EULER, FLOW_EULER, UNIPC, Same, ours
from pipelines import Tiny, pipelines

STEPS = 20
AUDIO = Same(hf.EDMDPMSolverMultistepScheduler, "dpmpp_2m")
HEUN = Same(hf.HeunDiscreteScheduler, "heun")
PNDM = Same(hf.PNDMScheduler, "plms", {"skip_prk_steps": True})
DEIS = Same(hf.DEISMultistepScheduler, "noise_ab2")
THIRD = Same(hf.DPMSolverMultistepScheduler, "dpmpp_3m_shipped", {"solver_order": 3})
ROWS = [("sd", case) for case in (DDIM, EULER, DPMPP, THIRD, UNIPC, DEIS, HEUN, PNDM)]
ROWS += [("flux", FLOW_EULER), ("wan", FLOW_EULER), ("sana", DPMPP), ("stable_audio", AUDIO)]


class Timed:
    """Seconds of this thread spent in a scheduler's methods, one list entry per call."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.spent: dict[str, float] = defaultdict(float)
        for name in ("set_timesteps", "scale_model_input", "step"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, self._timed(getattr(scheduler, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # pipelines look at the signatures
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time_ns()
            result = method(*args, **kwargs)
            self.spent[method.__name__] += time.thread_time_ns() - begin
            return result

        return call


def measured(tiny: Tiny, timed: Timed, steps: int) -> tuple[float, float, float]:
    """Time of set_timesteps, of one evaluation's calls, and of the whole run."""
    timed.spent.clear()
    tiny.scheduled(timed.scheduler)
    begin = time.thread_time_ns()
    tiny(steps)
    whole = time.thread_time_ns() - begin
    each = timed.spent["scale_model_input"] + timed.spent["step"]
    return timed.spent["set_timesteps"], each / tiny.calls * tiny.per_step, whole


def row(name: str, case: Same, runs: int) -> str:
    """One line of the table."""
    tiny = pipelines[name]()
    theirs = case.theirs(tiny)
    theirs_alone = tiny.scheduled(theirs)(STEPS)  # warm, and the number of evaluations
    nfe = tiny.calls // tiny.per_step
    pair = (Timed(theirs), STEPS), (Timed(ours(theirs, case.solver)), nfe)
    assert theirs_alone.isfinite().all()
    times = [[measured(tiny, timed, steps) for timed, steps in pair] for _ in range(runs)]
    ratios = [
        statistics.median(ours[i] for _, ours in times)
        / statistics.median(other[i] for other, _ in times)
        for i in range(3)
    ]
    each, once, whole = (f"{ratios[i]:.2f}" for i in (1, 0, 2))
    return f"| `{name}` | `{case}` | `{case.solver}` | {each} | {once} | {whole} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="runs of each, medians are shown")
    runs = parser.parse_args().runs
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("| pipeline | diffusers | fewstep | step | set_timesteps | run |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, case in ROWS:
        print(row(name, case, runs), flush=True)


if __name__ == "__main__":
    main()
