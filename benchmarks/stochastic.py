"""When does noise help? Deterministic against stochastic solvers at equal NFE.

    python benchmarks/stochastic.py [--quick] [--plot docs/stochastic.png]

Distance of the law of samples to that of the data, mean and standard error over seeds:

    digits   the bundled trained network, classes in turn: energy distance to the held-out images
    exact    a mixture of three normals in the plane with its exact data prediction: sliced
             Wasserstein-2 distance (32 directions)
    high     the same, wrong where sigma / alpha > 1: its first component is twice as likely there
    low      the same, wrong where sigma / alpha < 0.2: D is off by 0.02

The floor is the distance of as many exact samples (digits: training images) to the data. Every
solver runs on the default grid to sigma = 0. Deterministic but for the rounding of the machine; two
processes of one thread, a few minutes.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fewstep as fs

sys.path.append(str(Path(__file__).parent.parent / "training"))

DETERMINISTIC = ("ddim", "dpmpp_2m", "flow_ipndm_2")
STOCHASTIC = ("ddpm", "sde_dpmpp_2m", "seeds_2", "sa_solver", "er_sde_3", "edm_churn")
NFES = (5, 10, 20, 50, 100)
PROBLEMS = ("digits", "exact", "high", "low")

#: Mean and standard error over seeds.
Result = tuple[float, float]

MEANS = np.array([[-1.0, -0.6], [0.9, -0.5], [0.1, 1.0]])
SHARES = np.array([0.3, 0.3, 0.4])
STD = 0.25


# Problems


def plane(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Data prediction of the mixture on EDM's process, told rho."""
    means = torch.from_numpy(MEANS)

    def denoise(x: Tensor, rho: Tensor) -> Tensor:
        s = float(rho[0])
        shares = np.array([0.6, 0.3, 0.4]) if kind == "high" and s > 1 else SHARES
        v = STD**2 + s * s
        away = x[:, None] - means
        weight = torch.softmax(torch.from_numpy(np.log(shares)) - (away**2).sum(-1) / (2 * v), -1)
        data = (weight[..., None] * (means + STD**2 / v * away)).sum(1)
        return data + 0.02 if kind == "low" and s < 0.2 else data

    return denoise


def plane_data(n: int, seed: int) -> Tensor:
    """Exact samples of the mixture."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(MEANS[rng.choice(3, n, p=SHARES)] + STD * rng.normal(size=(n, 2)))


@functools.lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out images."""
    from train_digits import split  # pyright: ignore[reportMissingImports]

    train, _, held, _ = split()
    return train.flatten(1).double(), held.flatten(1).double()


# Distances


def energy(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased."""

    def within(v: Tensor) -> float:
        return float(torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)))

    return 2 * float(torch.cdist(x, y).mean()) - within(x) - within(y)


def sliced(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein-2, of as many samples."""
    angles = torch.arange(32, dtype=x.dtype) * math.pi / 32
    along = torch.stack([angles.cos(), angles.sin()])
    gaps = (x @ along).sort(0).values - (y @ along).sort(0).values
    return float(gaps.square().mean().sqrt())


# Runs


def distances(problem: str, solver: str, nfe: int, count: int, seeds: int) -> Result:
    """Of samples to the data."""
    found = []
    for seed in range(seeds):
        if problem == "digits":
            label = torch.arange(count) % 10
            model = fs.models.load("digits")
            x = fs.sample(
                model,
                (count, 1, 8, 8),
                solver=solver,
                nfe=nfe,
                seed=seed,
                cond={"label": label},
                progress=False,
            )
            found.append(energy(x.flatten(1).double(), digits()[1]))
        else:
            n = 40 * count
            model = fs.Denoiser(plane(problem), fs.EDM(), "data", time="rho")
            x = fs.sample(
                model,
                (n, 2),
                solver=solver,
                nfe=nfe,
                seed=seed,
                dtype=torch.float64,
                progress=False,
            )
            found.append(sliced(x, plane_data(n, seed + 100)))
    return summary(found)


def rows(problem: str, solver: str, count: int, seeds: int) -> list[Result]:
    """A line of a table."""
    return [distances(problem, solver, nfe, count, seeds) for nfe in NFES]


def summary(found: list[float]) -> Result:
    """Mean and standard error."""
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(len(found)))


def floor(problem: str, count: int, seeds: int) -> Result:
    """The distance of exact samples."""
    if problem != "digits":
        n = 40 * count
        pairs = [(plane_data(n, s + 200), plane_data(n, s + 100)) for s in range(seeds)]
        return summary([sliced(*pair) for pair in pairs])
    train, held = digits()
    parts = [train[torch.from_numpy(p)] for p in np.array_split(np.arange(len(train)), seeds)]
    return summary([energy(part, held) for part in parts])


# Report


def table(problem: str, found: Mapping[str, list[Result]], least: Result) -> None:
    """Print a problem."""
    digits = 3 if problem == "digits" else 4
    print(f"\n{problem}: floor {least[0]:.{digits}f} +- {least[1]:.{digits}f}")
    print(f"  {'':<14}" + "".join(f"{f'NFE {n}':>17}" for n in NFES))
    for solver, row in found.items():
        cells = "".join(f"{f'{m:.{digits}f} +- {e:.{digits}f}':>17}" for m, e in row)
        print(f"  {solver:<14}{cells}")


def plot(path: str, results: Mapping[str, Mapping[str, list[Result]]]) -> None:
    """Write the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.9), layout="constrained")
    for axes, (problem, found) in zip(
        figure.subplots(1, len(results)), results.items(), strict=True
    ):
        for i, (solver, row) in enumerate(found.items()):
            mean, error = np.array(row).T
            style = "--" if solver in DETERMINISTIC else "-"
            axes.errorbar(NFES, mean, error, ls=style, color=f"C{i}", lw=1.1, label=solver)
        axes.set(xscale="log", title=problem)
        if problem == "digits":  # energy distances may be negative
            axes.set_yscale("symlog", linthresh=0.05)
        else:
            axes.set_yscale("log")
        axes.set_xticks(NFES, [str(n) for n in NFES])
        axes.minorticks_off()
        axes.set_xlabel("NFE")
    figure.axes[0].set_ylabel("distance to the data")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Format)
    parser.add_argument("--quick", action="store_true", help="fewer samples and two seeds")
    parser.add_argument("--plot", metavar="PNG", help="write the figure")
    options = parser.parse_args()
    count, seeds = (100, 2) if options.quick else (300, 3)
    solvers, results = (*DETERMINISTIC, *STOCHASTIC), {}
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {
            (problem, solver): pool.submit(rows, problem, solver, count, seeds)
            for problem in PROBLEMS
            for solver in solvers
        }
        for problem in PROBLEMS:
            results[problem] = {solver: running[problem, solver].result() for solver in solvers}
            table(problem, results[problem], floor(problem, count, seeds))
    if options.plot:
        plot(options.plot, results)


class _Format(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
