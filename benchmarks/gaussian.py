"""Is one scale per mode worth it? Gaussian-matched solvers against the others, each at its best.

    python benchmarks/gaussian.py [--quick] [--problems "trained EDM" ...] [--nfe 5 8 12]

Problems, references and errors as in defaults.py, whose cache it shares. Every solver runs on every
grid; the grid is chosen on half of the noises and its error taken from the other half, both ways,
so that no number is the best of many. Scales are measured on 2,000 data ("data"), on data less the
means of their classes ("within", what a network sees that is given the class), on samples of the
model at 8 NFE ("model"), or on Jacobians of the network at rho = 4 ("slope"), guidance included.

Columns: error at each NFE, and the geometric mean over NFE of the error relative to flow_ab2.
About 5 minutes on 2 busy cores, --quick 1 minute (cached references). Deterministic.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from defaults import PROCESSES, SAMPLES, Choice, denoiser, measure, noise, reference, run, table
from defaults import trained as network

import fewstep as fs

PROBLEMS = ("trained EDM", "guided table", "digits EDM", "patches EDM")
LIBRARY = ("ddim", "dpmpp_2m", "unipc_2", "noise_ab4", "v_ab3", "flow_exp2", "flow_ab2", "flow_pc2")
GRIDS = tuple(fs.softened(*p) for p in ((1, 1.5), (1, 2), (2, 1.5), (2, 2), (2, 2.5), (4, 2.5)))
Statistic = Callable[[np.ndarray], float]
STATISTICS: dict[str, Statistic] = {
    "median over samples": lambda e: float(np.median(e)),
    "root mean square over samples": lambda e: float(np.sqrt(np.mean(e**2))),
}


def sources(model: str) -> dict[str, fs.Statistics]:
    """Scales in several bases from several sources."""
    exact = fs.exact.patches() if model == "patches" else fs.exact.digits()
    rank = 64 if model == "patches" else 32
    data = exact.sample(2000, 0)
    out = {
        f"{kind} data": fs.scales_from_data(data, kind, rank=rank)
        for kind in ("identity", "channel", "cosine", "low_rank")
    }
    shape = (80, *exact.shape)
    if model in ("digits", "patches"):
        slope = partial(fs.scales_from_jacobian, exact.denoiser(fs.EDM()), derivative="difference")
    else:
        classes = [exact.sample(200, k, label=k) for k in range(10)]
        within = torch.cat([v - v.mean(0) for v in classes]) + data.mean(0)
        for kind in ("cosine", "low_rank"):
            out[f"{kind} within"] = fs.scales_from_data(within, kind, rank=rank)
        guided = network(1.5 if model == "guided" else 1.0)
        cond = {"label": torch.arange(80) % 10}
        out["cosine model"] = fs.scales_from_model(guided, shape, "cosine", cond=cond)
        slope = partial(fs.scales_from_jacobian, guided, cond=cond)
    out["cosine slope"] = slope(shape, "cosine")
    out["low_rank slope"] = slope(shape, "low_rank", rank=rank)
    return out


def solvers(model: str) -> list[fs.Solver]:
    """Library solvers, one scale for all modes, and one scale per mode."""
    found: list[fs.Solver] = [fs.solvers[name] for name in LIBRARY]
    for c in (0.3, 0.5):
        for order, corrector in ((2, False), (1, True), (2, True)):
            kind = f"flow {order}{' corrector' * corrector}"
            found.append(fs.gaussian(order, c, corrector=corrector, name=f"{kind}, c = {c}"))
    for label, (basis, scales, _) in sources(model).items():
        for form, order, corrector in (
            ("flow", 2, False),
            ("flow", 2, True),
            ("v", 1, False),
            ("v", 2, False),
            ("v", 2, True),
        ):
            name = f"{form} {order}{' corrector' * corrector}, {label}"
            made = fs.gaussian(order, scales, basis, form=form, corrector=corrector, name=name)
            found.append(made)
    return found


Errors = dict[tuple[str, int], dict[str, np.ndarray]]


def solve(problem: str, nfes: Sequence[int]) -> Errors:
    """(solver, NFE) -> grid -> errors of the samples."""
    torch.set_num_threads(1)
    model, path = problem.split()
    process = PROCESSES[path]
    denoise, shape = denoiser(model)
    start = noise(model, shape, process)
    target = reference(model, process, denoise, start)
    errors: Errors = defaultdict(dict)
    chosen = solvers(model)
    for nfe in nfes:
        for grid in GRIDS:
            groups: dict[object, list[fs.Plan]] = defaultdict(list)
            names: dict[object, list[str]] = defaultdict(list)
            for solver in chosen:
                plan = fs.plan(solver, process, nfe, grid=grid)
                key = tuple(call is not None for call in plan.calls)
                groups[key].append(plan)
                names[key].append(solver.name)
            for key, plans in groups.items():
                for name, x in zip(names[key], run(plans, denoise, start), strict=True):
                    error = (x.double() - target).flatten(1).square().mean(1).sqrt()
                    errors[name, nfe][grid.name] = error.numpy()
    return dict(errors)


def crossed(by_grid: dict[str, np.ndarray], statistic: Statistic) -> float:
    """The statistic, each half of the samples on the grid that is best for the other half."""
    count = len(next(iter(by_grid.values())))
    half = np.arange(count) % 20 < 10  # every class in both
    out = np.empty(count)
    for mine, other in ((half, ~half), (~half, half)):
        best = min(by_grid, key=lambda name: statistic(by_grid[name][other]))
        out[mine] = by_grid[best][mine]
    return statistic(out)


def report(problem: str, errors: Errors, nfes: Sequence[int]) -> None:
    """One table per statistic, best first."""
    names = dict.fromkeys(name for name, _ in errors)
    for title, statistic in STATISTICS.items():
        rows = []
        for name in names:
            values = [crossed(errors[name, nfe], statistic) for nfe in nfes]
            base = [crossed(errors["flow_ab2", nfe], statistic) for nfe in nfes]
            rows.append((name, *values, float(np.exp(np.mean(np.log(np.divide(values, base)))))))
        head = ("solver", *(f"NFE {nfe}" for nfe in nfes), "ratio")
        table(f"{problem}, {title}", head, sorted(rows, key=lambda row: row[-1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the trained network, NFE 5 and 8")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, metavar="P")
    parser.add_argument("--nfe", nargs="+", type=int, default=(5, 8, 12))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    problems = PROBLEMS[:1] if options.quick else tuple(options.problems)
    nfes = (5, 8) if options.quick else tuple(options.nfe)
    for problem in problems:
        model, _, path = problem.partition(" ")
        if model not in SAMPLES or path not in PROCESSES:
            parser.error(f"problem {problem!r}: give one of {', '.join(SAMPLES)} and a process")
    measure(problems, (), Choice(), options.jobs)  # the cache of references
    with ProcessPoolExecutor(options.jobs) as pool:
        for problem, errors in zip(
            problems, pool.map(partial(solve, nfes=nfes), problems), strict=True
        ):
            report(problem, errors, nfes)


if __name__ == "__main__":
    main()
