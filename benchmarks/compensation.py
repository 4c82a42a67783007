"""Print what dynamic compensation gains, and whether a regression can replace its search.

    python benchmarks/compensation.py

Bundled digits network (EDM), plain and guided, and the exact digits on a flow. Median over 128
fresh noises of the per-sample RMS distance to the converged sample; ratios are fitted to 10 other
noises and checked on 32 more. "trajectory" is the published objective, "fitted" what `fit_ratios`
returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep._calibrate._compensate import Cascade, compensated, fit_ratios
from fewstep._calibrate._teacher import Teacher, teach

SOLVERS = ("unipc_2", "unipc_3", "dpmpp_2m", "ipndm_3")
NFES = (4, 5, 6, 8, 10)
SCALES = (1.0, 2.0, 4.0)


def labels(count: int) -> dict[str, Any]:
    """Every class in turn."""
    return {"label": torch.arange(count) % 10}


def teachers(
    model: fs.Model, shape: tuple[int, ...], cond: Callable[[int], dict[str, Any]]
) -> tuple[Teacher, Teacher]:
    """(to fit and to check, to report)."""
    return tuple(  # pyright: ignore[reportReturnType]
        teach(model, shape, count, cond=cond(count), seed=seed)
        for count, seed in ((42, 1), (128, 2))
    )


def compare(name: str, fit: Teacher, fresh: Teacher) -> dict[tuple[str, int], tuple[float, ...]]:
    """Print errors with and without; return the ratios."""
    print(f"\n{name}: {fit.nfe} evaluations to converge, median error {fit.error:.1e}\n")
    print("| solver | NFE | error | trajectory | fitted | gain | evaluations | s | ratios |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    out = {}
    for solver in SOLVERS:
        for nfe in NFES:
            plan = fs.plan(solver, fit.model, nfe)
            start = time.perf_counter()
            found = fit_ratios(fit, plan)
            seconds = time.perf_counter() - start
            greedy = compensated(plan, found.found["trajectory"])
            plain, published, fitted = (
                float(np.median(fresh.errors(p))) for p in (plan, greedy, found.plan)
            )
            out[solver, nfe] = found.ratios
            print(
                f"| `{solver}` | {nfe} | {plain:.4f} | {published:.4f} | {fitted:.4f} "
                f"| {plain / fitted:.2f} | {found.evaluations} | {seconds:.1f} "
                f"| {' '.join(f'{r:.2f}' for r in found.ratios)} |",
                flush=True,
            )
    return out


def regression(
    fresh: dict[float, Teacher], runs: list[tuple[float, int, tuple[float, ...]]], solver: str
) -> None:
    """Every budget, and every scale, predicted from the others."""
    print(f"\n`{solver}`: error with 1, searched, predicted without this NFE, without this scale\n")
    print("| scale | NFE | 1 | searched | other NFE | other scales |")
    print("| --- | --- | --- | --- | --- | --- |")
    for scale, nfe, ratios in runs:
        plan = fs.plan(solver, fresh[scale].model, nfe)
        others = (
            Cascade.fit([run for run in runs if run[1] != nfe]),
            Cascade.fit([run for run in runs if run[0] != scale]),
        )
        choices = [(1.0,) * nfe, ratios, *(c.predict(scale, nfe) for c in others)]
        errors = [np.median(fresh[scale].errors(compensated(plan, r))) for r in choices]
        print(f"| {scale:g} | {nfe} | {' | '.join(f'{e:.4f}' for e in errors)} |", flush=True)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    flow = fs.exact.digits().denoiser(fs.Flow())
    compare("exact digits, flow", *teachers(flow, (1, 8, 8), lambda count: {}))
    digits, ratios, fresh = fs.models.load("digits"), {}, {}
    for scale in SCALES:
        model = digits if scale == 1 else fs.Guided(digits, scale, {"label": 10})
        fit, fresh[scale] = teachers(model, (1, 8, 8), labels)
        ratios[scale] = compare(f"digits network, scale {scale:g}", fit, fresh[scale])
    for solver in ("unipc_2", "dpmpp_2m"):
        runs = [(s, nfe, ratios[s][solver, nfe]) for s in SCALES for nfe in NFES]
        regression(fresh, runs, solver)


if __name__ == "__main__":
    main()
