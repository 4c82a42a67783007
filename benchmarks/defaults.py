"""Which solver, grid and end should be the default? Decided on image-like problems.

    python benchmarks/defaults.py [--quick] [--extras] [--out results.csv] [--from results.csv]

Problems: the exact digits (8x8) and patches (16x16) on every kind of process, the bundled trained
digits network, unguided and guided at 1.5, and the network trained on photographs (RGB, 32x32), on
EDM, a discrete table and flows. Error of a
sample: root mean square over its elements of the distance to the converged solution of the same
model from the same noise, at sigma = 0. With final = "min" the noise left in the sample counts,
because a user sees it. Reported: median over samples, and root mean square over samples.

A candidate is (solver, grid, final). Its loss in a problem at one NFE is its median error divided
by the best median error any candidate reaches there; its score is the geometric mean of its loss
over problems and NFE 5 to 12. "2.0" thus means: twice the error of choosing by hand, everywhere.

The exact models are solved once (about 2 minutes) into a cache; delete benchmarks/.cache to redo.
The default solver was chosen, before the photographs were there, from

    --extras --solvers flow_ab2 flow_pc2 cflow_ab2 cflow_pc1 cflow_pc2 flow_ipndm_2 bdia_per_step \
        v_ab3 angle_ab2 flow_exp2 dpmpp_2m noise_ab3 unipc_2 ipndm_4 dpmpp_3m ddim \
    --grids softened "softened(1, 1.5)" "softened(1, 2)" "softened(2, 2)" "softened(2, 2.5)" \
        "softened(3, 2.5)" "softened(2, 1.5)" arctan lambda lambda_zero

together with `guidance.py`: `cflow_pc2`, which wins on many problems, is twice as bad as
`flow_ipndm_2` at guidance 4 and 7.5 with 8 evaluations or fewer. The scale of its grid from

    --extras --solvers flow_ipndm_2 flow_ab2 cflow_pc2 ipndm_3 --grids karras lambda softened \
        softened_8 "softened(6, 2.5)" "softened(12, 2.5)" "softened(8, 3)"

where "softened" (scale 4) is better by a third on digits, and "softened_8" more than twice as good
on photographs, which are more like what users have. All of the library takes more than an hour.
Deterministic; one torch thread per process, two processes.

Mind three things. Grids in rho or lambda are the same on "flow" and "flow3", which count twice.
The exact models remember their data: the median rewards landing on the right example, the mean
square shows the samples that did not; "trained" and "guided" have no such cliff. The best error
of each cell is the best of hundreds, so a loss of 2 is good.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fewstep as fs

CACHE = Path(__file__).parent / ".cache"
NFES = (4, 5, 6, 8, 10, 12, 20)
SCORED = range(5, 13)
FINALS = ("zero", "min")
CHUNK = 8  # samples per cache file

PROCESSES: dict[str, fs.Process] = {
    "EDM": fs.EDM(),
    "VP": fs.VP(),
    "cosine": fs.CosineVP(),
    "table": fs.DiscreteVP.scaled_linear(),
    "flow": fs.Flow(),
    "flow3": fs.Flow(shift=3.0),
}
FAMILY = {"EDM": "EDM", "VP": "VP", "cosine": "VP", "table": "VP", "flow": "flow", "flow3": "flow"}
SAMPLES = {"digits": 64, "patches": 32, "trained": 64, "guided": 64, "photographs": 16}
PROBLEMS = tuple(
    f"{model} {process}"
    for model, processes in (
        ("patches", PROCESSES),
        ("guided", ("EDM", "table", "flow", "flow3")),
        ("trained", ("EDM", "table", "flow", "flow3")),
        ("photographs", ("EDM", "table", "flow")),
        ("digits", PROCESSES),
    )
    for process in processes
)
QUICK = ("patches EDM", "patches flow3", "guided table", "digits EDM", "trained flow", "digits VP")
#: Candidates shown in the tables of losses whatever their rank.
SHOWN = (
    ("dpmpp_2m", "lambda", "zero"),
    ("dpmpp_2m", "karras", "zero"),
    ("dpmpp_3m", "lambda", "zero"),
    ("dpmpp_3m", "karras", "zero"),
    ("noise_ab3", "lambda", "min"),
    ("flow_ab3", "quadratic", "zero"),
    ("flow_ipndm_2", "softened", "zero"),
    ("flow_ipndm_2", "softened_8", "zero"),
    ("cflow_pc2", "softened", "zero"),
    ("flow_ab2", "softened", "zero"),
    ("v_ab4", "softened", "zero"),
    ("flow_exp2", "softened", "zero"),
    ("ddim", "uniform", "zero"),
)

Denoise = Callable[[Tensor, float, float], Tensor]


def extras() -> list[fs.Solver]:
    """Exponential solvers that are not in the registry, to see whether they should be."""
    make = fs.exponential
    forms = [
        make(order, form=form, variable=variable, name=f"*{form}{order}_{variable}")
        for form, variable, orders in (
            ("flow", "lambda", (3,)),
            ("flow", "t", (2, 3)),
            ("v", "lambda", (2, 3)),
            ("data", "rho", (2, 3)),
            ("data", "t", (2, 3)),
        )
        for order in orders
    ]
    return [
        *forms,
        make(3, form="noise", lower_final=True, name="*noise_ab3_lower"),
        make(2, second="midpoint", lower_final=True, name="*dpmpp_2m_lower"),
        make(3, lower_final=True, name="*dpmpp_3m_lower"),
        make(4, lower_final=True, name="*ab4_lower"),
        make(2, form="flow", variable="own", lower_final=True, name="*flow_ab2_lower"),
        make(3, form="flow", variable="own", lower_final=True, name="*flow_ab3_lower"),
        make(3, growth=1.0, name="*dpmpp_3m_g1"),
        make(3, growth=math.inf, name="*dpmpp_3m_ginf"),
        make(3, form="flow", variable="own", growth=1.0, name="*flow_ab3_g1"),
        make(3, form="flow", variable="own", growth=math.inf, name="*flow_ab3_ginf"),
    ]


def extra_grids() -> list[fs.Grid]:
    """Grids that are not in `fewstep.grids`."""
    scales = [(s, p) for s in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0) for p in (1.5, 2.0, 2.5, 3.0)]
    return [
        *(g for g in (fs.softened(*pair) for pair in scales) if g.name not in fs.grids),
        fs.karras(3.0),
    ]


@dataclass(frozen=True)
class Result:
    """Errors of one candidate in one problem at one NFE; infinite where it was refused."""

    problem: str
    nfe: int
    solver: str
    grid: str
    final: str
    median: float
    rms: float
    note: str = ""

    @property
    def candidate(self) -> tuple[str, str, str]:
        """Solver, grid and final."""
        return self.solver, self.grid, self.final


# Models


@lru_cache
def trained(scale: float) -> fs.Model:
    """The bundled network, class by class, with classifier-free guidance if scale is not 1."""
    model = fs.models.load("digits")
    return model if scale == 1 else fs.Guided(model, scale=scale, uncond={"label": 10})


def denoiser(model: str) -> tuple[Denoise, tuple[int, ...]]:
    """D(x, alpha, sigma) of a model on any path, and the shape of a sample."""
    if model in ("digits", "patches"):
        exact = fs.exact.digits() if model == "digits" else fs.exact.patches()
        return exact.denoise, exact.shape
    photographs = model == "photographs"
    network = (
        fs.models.load("patches-edm") if photographs else trained(1.0 + 0.5 * (model == "guided"))
    )

    def denoise(x: Tensor, alpha: float, sigma: float) -> Tensor:
        # The network knows alpha = 1, sigma from 0.002 to 80. Noisier states are told 80, which
        # gives alpha = 0 its limit.
        labels = torch.arange(len(x)) % SAMPLES[model] % 10
        cond = {} if photographs else {"label": labels}
        rho = sigma / alpha if sigma < 80 * alpha else 80.0
        scaled = x / alpha if sigma < 80 * alpha else x * (80.0 / sigma)
        told = max(rho, 0.002)
        return network(scaled, told, **cond)

    return denoise, (3, 32, 32) if photographs else (1, 8, 8)


def noise(model: str, shape: tuple[int, ...], process: fs.Process) -> Tensor:
    """The starting states, float32."""
    start = fs.start_noise((SAMPLES[model], *shape), seed=0)
    return start * process.prior_std(process.t_start)


# References


def solve_chunk(model: str, process: str, first: int) -> None:
    """Solve CHUNK samples of an exact model and write them to the cache."""
    path = PROCESSES[process]
    target = cache_file(model, path, first)
    if target.exists():
        return
    torch.set_num_threads(1)
    exact = fs.exact.digits() if model == "digits" else fs.exact.patches()
    x = noise(model, exact.shape, path)[first : first + CHUNK]
    level = path.level(path.t_start)
    solved = exact.solve(x, (level.alpha, level.sigma), (1.0, 0.0))
    part = target.with_suffix(".part")
    np.save(part.open("wb"), solved.numpy())
    part.replace(target)


def cache_file(model: str, process: fs.Process, first: int) -> Path:
    """Where the solution of samples first, first + 1, ... is kept: one per starting level, as all
    paths through it are one ODE, and per noise."""
    level = process.level(process.t_start)
    drawn = zlib.crc32(fs.start_noise((1, 64), seed=0).numpy().tobytes())
    return CACHE / f"{model}-{level.alpha:.12g}-{level.sigma:.12g}-{first}-{drawn:08x}.npy"


def reference(model: str, process: fs.Process, denoise: Denoise, start: Tensor) -> Tensor:
    """The converged samples, float64."""
    if model in ("digits", "patches"):
        firsts = range(0, len(start), CHUNK)
        chunks = [np.load(cache_file(model, process, first)) for first in firsts]
        return torch.from_numpy(np.concatenate(chunks))
    level = process.level(process.t_start)
    if level.alpha == 0:
        fine: fs.Process = fs.Flow(t_end=0.002 / 1.002)
        x = start / level.sigma
    else:
        fine = fs.EDM(sigma_max=level.rho)
        x = start / level.alpha
    plan = fs.plan("ab4", fine, 500, grid="lambda")
    return run([plan], denoise, x.double())[0]


# Runs


def signature(row: fs.Row) -> str:
    """A row as text, up to rounding."""
    return repr(
        [
            [(j, np.char.mod("%.9e", np.asarray(c)).tolist()) for j, c in terms.items()]
            for terms in (row.a, row.b)
        ]
    )


def run(plans: Sequence[fs.Plan], denoise: Denoise, start: Tensor) -> list[Tensor]:
    """Samples of plans that evaluate at the same levels. Plans whose rows agree so far share their
    evaluations, and the rest share a batch."""
    states = [plan.start(start) for plan in plans]
    texts = [[signature(row) for row in plan.rows] for plan in plans]
    while not states[0].done:
        keys = [tuple(text[: s.index]) for text, s in zip(texts, states, strict=True)]
        order = dict.fromkeys(keys)
        batch = torch.cat([states[keys.index(key)].x for key in order])
        level = plans[0].asked(states[0].index)
        with torch.no_grad():
            outputs = denoise(batch, level.alpha, level.sigma).split(len(start))
        by_key = dict(zip(order, outputs, strict=True))
        states = [s.advance(by_key[key]) for s, key in zip(states, keys, strict=True)]
    return [s.x for s in states]


@dataclass(frozen=True)
class Choice:
    """What to compare: solvers and grids outside the library too, or only those of some names."""

    extras: bool = False
    solvers: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()

    def candidates(self) -> tuple[list[fs.Solver], list[fs.Grid]]:
        """Solvers and grids; a grid that is a copy of another is left out."""
        solvers = [s for s in fs.solvers.values() if not (s.stochastic or s.adaptive)]
        solvers = [s for s in solvers if not s.needs_calibration] + extras() * self.extras
        # "exponential" and "edm" are copies of "lambda" and "karras" here
        grids = [g for name, g in fs.grids.items() if name not in ("exponential", "edm")]
        grids += extra_grids() * self.extras
        return (
            [s for s in solvers if not self.solvers or s.name in self.solvers],
            [g for g in grids if not self.grids or g.name in self.grids],
        )


def solve_problem(name: str, nfes: Sequence[int], choice: Choice) -> list[Result]:
    """All candidates in one problem."""
    torch.set_num_threads(1)
    model, path = name.split()
    process = PROCESSES[path]
    denoise, shape = denoiser(model)
    start = noise(model, shape, process)
    target = reference(model, process, denoise, start)
    solvers, grids = choice.candidates()
    results = []
    for nfe in nfes:
        for grid in grids:
            if grid.discrete and not process.integer_times:
                continue
            for final in FINALS:
                groups: dict[object, list[tuple[str, fs.Plan]]] = defaultdict(list)
                for solver in solvers:
                    about = name, nfe, solver.name, grid.name, final
                    try:
                        plan = fs.plan(solver, process, nfe, grid=grid, final=final)
                    except ValueError as error:
                        reason = str(error).splitlines()[0]
                        results.append(Result(*about, math.inf, math.inf, reason))
                        continue
                    evaluated = tuple(call is not None for call in plan.calls)
                    groups[tuple(plan.times), evaluated, plan.evaluations].append(
                        (solver.name, plan)
                    )
                for members in groups.values():
                    samples = run([plan for _, plan in members], denoise, start)
                    for (solver_name, _), x in zip(members, samples, strict=True):
                        errors = (x.double() - target).flatten(1).square().mean(1).sqrt()
                        median, rms = errors.median(), errors.square().mean().sqrt()
                        about = name, nfe, solver_name, grid.name, final
                        results.append(Result(*about, float(median), float(rms)))
    return results


def measure(names: Sequence[str], nfes: Sequence[int], choice: Choice, jobs: int) -> list[Result]:
    """Solve the exact models where the cache lacks them, then all problems."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    chunks = {}
    for name in names:
        model, path = name.split()
        if model in ("digits", "patches"):
            for first in range(0, SAMPLES[model], CHUNK):
                target = cache_file(model, PROCESSES[path], first)
                if not target.exists():
                    chunks[target] = (model, path, first)
    results: list[Result] = []
    began = time.time()
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(solve_chunk, *zip(*chunks.values(), strict=True)) if chunks else ())
        say(f"{len(chunks)} chunks of references, {time.time() - began:.0f} s")
        futures = [pool.submit(solve_problem, name, nfes, choice) for name in names]
        for name, future in zip(names, futures, strict=True):
            results += future.result()
            say(f"{name}, {time.time() - began:.0f} s")
    return results


def say(text: str) -> None:
    """Progress, kept out of the tables."""
    print(text, file=sys.stderr, flush=True)


# Tables


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right."""
    text = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *text, strict=True)]
    print(f"\n{title}")
    for line in (head, *text):
        cells = (
            c.rjust(w) if text and _numeric(text, i) else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  " + "  ".join(cells).rstrip())


def _numeric(text: Sequence[Sequence[str]], column: int) -> bool:
    return text[0][column][:1].isdigit() or text[0][column] in ("inf", "nan", "-")


Losses = Mapping[tuple[str, str, str], Mapping[tuple[str, int], float]]


def losses(results: Iterable[Result], value: Callable[[Result], float]) -> Losses:
    """candidate -> (problem, NFE) -> error over the best error there."""
    results = list(results)
    best: dict[tuple[str, int], float] = defaultdict(lambda: math.inf)
    for r in results:
        key = r.problem, r.nfe
        best[key] = min(best[key], value(r))
    out: dict[tuple[str, str, str], dict[tuple[str, int], float]] = defaultdict(dict)
    for r in results:
        out[r.candidate][r.problem, r.nfe] = value(r) / best[r.problem, r.nfe]
    return out


def mean(loss: Mapping[tuple[str, int], float], where: Callable[[str, int], bool]) -> float:
    """Geometric mean of the losses at the chosen (problem, NFE)."""
    chosen = [v for (problem, nfe), v in loss.items() if where(problem, nfe)]
    return math.exp(sum(map(math.log, chosen)) / len(chosen)) if chosen else math.nan


def family(problem: str) -> str:
    """EDM, VP or flow."""
    return FAMILY[problem.split()[1]]


def ranking(
    medians: Losses, rms: Losses, members: set[str], nfes: Sequence[int]
) -> list[tuple[str, str, str, float, float, float, float, float]]:
    """Candidates that work in all these problems, best score first."""
    entries = []
    for candidate, loss in medians.items():
        cells = {cell: value for cell, value in loss.items() if cell[0] in members}
        if len(cells) < len(members) * len(nfes):
            continue
        entries.append(
            (
                *candidate,
                mean(cells, lambda _, n: n in SCORED),
                max(v for (_, n), v in cells.items() if n in SCORED),
                mean(rms[candidate], lambda p, n: p in members and n in SCORED),
                mean(cells, lambda _, n: n == 4),
                mean(cells, lambda _, n: n == 20),
            )
        )
    return sorted(entries, key=lambda entry: entry[3])


def report(results: Sequence[Result], top: int) -> None:
    """All tables."""
    problems = list(dict.fromkeys(r.problem for r in results))
    nfes = sorted({r.nfe for r in results})
    rows = []
    for problem in problems:
        for nfe in nfes:
            here = [r for r in results if (r.problem, r.nfe) == (problem, nfe)]
            for rank, r in enumerate(sorted(here, key=lambda r: r.median)[:3]):
                first = (problem, nfe) if rank == 0 else ("", "")
                rows.append((*first, r.median, r.rms, *r.candidate))
    head = ("problem", "NFE", "median", "rms", "solver", "grid", "final")
    table("Best three by problem and NFE", head, rows)

    medians = losses(results, lambda r: r.median)
    rms = losses(results, lambda r: r.rms)
    cells = len(problems) * len(nfes)
    whole = {c: loss for c, loss in medians.items() if len(loss) == cells}

    head = ("solver", "grid", "final", "score", "worst", "score of rms", "NFE 4", "NFE 20")
    for chosen in ("overall", *dict.fromkeys(map(family, problems))):
        members = {p for p in problems if chosen in ("overall", family(p))}
        entries = ranking(medians, rms, members, nfes)
        table(f"Ranking, {chosen} (1 = best everywhere; NFE 5-12)", head, entries[:top])

    ranked = sorted(whole, key=lambda c: mean(whole[c], lambda p, n: n in SCORED))
    shown = list(dict.fromkeys([*ranked[:4], *(c for c in SHOWN if c in whole)]))
    names = [f"{chr(65 + i)}" for i in range(len(shown))]
    print(
        "\nCandidates: "
        + ", ".join(f"{n} = {' '.join(c)}" for n, c in zip(names, shown, strict=True))
    )
    rows = [
        (p, *(mean(whole[c], lambda q, n, p=p: q == p and n in SCORED) for c in shown))
        for p in problems
    ]
    table("Loss by problem, NFE 5-12", ("problem", *names), rows)
    rows = [(n, *(mean(whole[c], lambda _, m, n=n: m == n) for c in shown)) for n in nfes]
    table("Loss by NFE, all problems", ("NFE", *names), rows)

    notes = defaultdict(int)
    for r in results:
        if r.note:
            notes[r.problem, r.grid, r.final, r.note] += 1
    if notes:
        table(
            "Refused",
            ("problem", "grid", "final", "reason", "plans"),
            [(*key, count) for key, count in notes.items()],
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six problems, NFE 5, 8, 12")
    parser.add_argument("--extras", action="store_true", help="also solvers, grids outside the lib")
    parser.add_argument("--out", type=Path, help="write all errors to this CSV file")
    parser.add_argument(
        "--from", type=Path, nargs="+", dest="sources", help="read such files, measure nothing"
    )
    parser.add_argument("--problems", nargs="+", help="measure these only", choices=PROBLEMS)
    parser.add_argument("--solvers", nargs="+", default=(), help="compare these only")
    parser.add_argument("--grids", nargs="+", default=(), help="compare these only")
    parser.add_argument("--top", type=int, default=10, help="rows of each ranking")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if options.sources:
        merged: dict[object, Result] = {}
        for source in options.sources:
            with source.open(newline="") as file:
                for p, n, s, g, f, median, rms, note in list(csv.reader(file))[1:]:
                    r = Result(p, int(n), s, g, f, float(median), float(rms), note)
                    merged[r.problem, r.nfe, r.candidate] = r
        results = list(merged.values())
    else:
        names = options.problems or (QUICK if options.quick else PROBLEMS)
        nfes = (5, 8, 12) if options.quick else NFES
        choice = Choice(options.extras, tuple(options.solvers), tuple(options.grids))
        results = measure(names, nfes, choice, options.jobs)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Result.__dataclass_fields__)
            writer.writerows(map(astuple, results))
    report(results, options.top)


if __name__ == "__main__":
    main()
