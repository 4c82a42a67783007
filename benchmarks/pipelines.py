"""Print which solvers run in which diffusers pipelines, and which schedulers they agree with.

    pip install -c constraints.txt -e ".[diffusers]" transformers
    python benchmarks/pipelines.py

The pipelines are the real ones around tiny random networks (tests/diffusers/pipelines.py); every
solver of `fewstep.solvers` is run in each, for six evaluations (image-to-image: ten steps at
strength 0.6), and evaluations are counted by a hook on the network. What is compared with which
scheduler of diffusers is listed in tests/diffusers/agreement.py; its tests are test_pipelines.py.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import diffusers as hf
import torch

import fewstep as fs
from fewstep.diffusers import Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "diffusers"))
from agreement import CASES, ROUNDING, compared
from pipelines import Tiny, pipelines

NFE = 6
HEAD = f"""# Inside diffusers' pipelines

What runs, what it costs and what it agrees with, in the pipelines that diffusers ships, built
around tiny random networks from their own configs (nothing is downloaded). Printed by

```sh
python benchmarks/pipelines.py
```

(diffusers {hf.__version__}, torch {torch.__version__}, float32 on the CPU.)

## Every solver in every pipeline

`fewstep.diffusers.Scheduler.from_config(pipe.scheduler.config, solver=...)`, asked for {NFE}
evaluations (image-to-image: ten steps at strength 0.6, which are as many). A number is how often
the network was called, counted inside it, per call that guidance makes of one evaluation; `=`
marks where the last table compares the solver with a scheduler of diffusers, and they agree.
"""
AGREEMENT = """
## Agreement with diffusers' own schedulers

On the nodes of the scheduler's config, with the network told the same times. The difference is the
largest of the final latents, relative to the largest latent, in float32: diffusers computes its
tables in float32. Where its schedulers are in error they are not in this table but in
`tests/diffusers/test_upstream.py`, one test each; flow schedulers of the DPM-Solver family tell the
network whole numbers below the times that they use, and are compared with that repaired.
"""


def spent(tiny: Tiny, config: object, solver: str) -> str:
    """Evaluations of one run, or why there is none."""
    try:
        tiny.scheduled(Scheduler.from_config(config, solver=solver))
        found = tiny(10 if "strength" in tiny.call else NFE)
    except ValueError as error:
        return str(error)
    assert torch.isfinite(found).all(), (solver, tiny.pipe)
    return f"{tiny.calls / tiny.per_step:g}"


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    agreed: dict[tuple[str, str], float] = {}
    rows = []
    for name, case in CASES:
        nfe, difference = compared(pipelines[name](), case)
        assert difference < ROUNDING, (name, str(case), difference)
        agreed[name, case.solver] = max(difference, agreed.get((name, case.solver), 0.0))
        rows.append(f"| `{name}` | `{case}` | `{case.solver}` | {nfe} | {difference:.0e} |")

    built = {name: build() for name, build in pipelines.items()}
    configs = {name: tiny.pipe.scheduler.config for name, tiny in built.items()}
    table, notes = [], Counter[str]()
    for solver in fs.solvers:
        cells = []
        for name, tiny in built.items():
            cell = spent(tiny, configs[name], solver)
            if not cell.isdigit():
                notes[f"`{solver}`: {cell}"] += 1
                cell = "no"
            cells.append(cell + (" =" if (name, solver) in agreed else ""))
        table.append(f"| `{solver}` | {' | '.join(cells)} |")

    print(HEAD)
    print("| name | pipeline | network |\n| --- | --- | --- |")
    for name, tiny in built.items():
        print(f"| `{name}` | {type(tiny.pipe).__name__} | {type(tiny.network).__name__} |")
    print(f"\n| solver | {' | '.join(built)} |\n| --- |{' --- |' * len(built)}")
    print("\n".join(table))
    for note, count in notes.items():
        print(f"\n- {note} ({count} pipelines)")
    print(AGREEMENT)
    print("| pipeline | scheduler | solver | NFE | difference |\n| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
