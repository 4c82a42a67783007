"""Print which official implementations every solver agrees with, and to what.

    python benchmarks/conformance.py [--json FILE]

Runs the stored results of tests/golden (some minutes) and counts a case for a solver only if
`fewstep.plan` of that name, on the official step boundaries, is the official run: last steps,
start-up and evaluations included. Agreement is the largest difference of the final states, relative
to max(1, max |x|), float64. "Measured order" is that of `Plan.order` on a grid equal in lambda: of
the steps in bulk (first and last steps may be of lower order).

Stochastic solvers are compared given the same noise, at the noise level of the official run
(`Solver.scaled`). Their measured order is the weak one, of exact moments (tests/test_weak.py).
FILE gets the counts: solver -> implementation -> [cases, largest deviation].
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import fewstep as fs
from fewstep._analysis import orders

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import official_stochastic as noisy
from official import agreement, golden, implementation, is_adaptive
from test_weak import orders as weak_orders

#: Where official code is in error, or far from its paper, by solver: measured on these problems.
UPSTREAM = {
    r"ddim": "diffusers DDIM lands at t - 1000 // n, not at the time that it evaluates next "
    "(linspace spacing; trailing, where n does not divide 1000)",
    r"dpmpp_2m|dpm_solver_2m": "dpm_solver lowers the last orders below 10 steps only, documented "
    "as 15",
    r"dpmpp_3m_shipped": "this is the shipped formula: half of the second difference, order 2; "
    "dpm_solver: 10 steps of uniform t are worse than 8, for want of lower last orders",
    r"dpmpp_3m|noise_ab3": "shipped third order (all code bases) has half of the second "
    "difference: order 2",
    r"dpm_solver_3|dpmpp_3s": "diffusers: the second inner state of order 3 'midpoint' is of "
    "another method, errors 18 to 24 % larger",
    r"unipc_\d(_bh1)?": "diffusers: NaN with bh1 to sigma = 0, and with bh2 unless "
    "lower_order_final; a last sigma repeated (Karras, exponential, beta)",
    r"unipc_[23]_vary": "official vary_coeff drops the highest old difference: order 1",
    r"deis_tab\d": "official integrals are left Riemann sums of 10,000 points: samples move by "
    "1.6e-3 in the median, up to 0.3 (agreement of 4e-8: on two grids, rounding decides on which "
    "side of a kink a point of the sum counts)",
    r"deis_rhoab[12]": "official integrals are left Riemann sums: samples move by 2e-5 in the "
    "median",
    r"deis_rhoab3": "diff-sampler ipndm_v of orders 3 and 4: a misplaced parenthesis, at 4 a wrong "
    "sign; official DEIS sums as for deis_rhoab2",
    r"flow_heun": "diffusers: the shift is applied twice to the last sigma, and the last "
    "evaluation covers 0.001 to 0 only",
    r"pndm|plms": "diffusers lands at t - 1000 // n, not at the time that it evaluates next "
    "(linspace spacing)",
    r"bdia.*": "official steps of 1000 // n: more than asked if n does not divide 1000, and a "
    "start below index 999",
    r"ddpm": "diffusers DDPM adds noise of 1e-10 to the sample where its last time is not 0",
    r"ddpm_large": "diffusers adds all of beta to the sample where its last time is not 0; its "
    "fixed_large_log is NaN",
    r"sde_dpmpp_3m.*": "diffusers: a wrong sign in third-order sde-dpmsolver++ makes it first "
    "order; EDM and cosine schedulers, and sde-dpmsolver, raise at order 3",
    r"er_sde_[23]": "official integrals are sums of 100 rectangles: samples move by up to 3e-3 "
    "(compared with its code at 200,000 midpoints)",
    r"lcm": "diffusers LCM mixes 1 / (1 + 400 t^2) of the state into the data prediction",
    r"tcd": "rounds the time that it jumps to down to an integer; so does this, for networks that "
    "know integers only",
    r"(edm|euler)_churn": "diffusers Euler and EDM Euler ask the network before they add the "
    "noise, which nothing removes",
    r"calibrated:.*": "official times are moved to the nearest level of the table, its integrals "
    "are sums over the levels; the half corrector acts above the threshold, below it in the paper",
    r"adaptive:.*": "official: one error for the whole batch, so that a sample depends on its "
    "neighbours",
}
#: DEIS is compared with its own sums in place of our integrals.
SUMS = re.compile(r"deis_(tab|rhoab)\d")

Counts = dict[str, dict[str, tuple[int, float]]]


def conformance() -> Counts:
    """solver -> implementation -> (cases, largest deviation)."""
    out: Counts = {name: {} for name in fs.solvers if not fs.solvers[name].stochastic}
    for case in golden()["cases"]:
        names, deviation = agreement(case)
        if is_adaptive(case):
            names = [{"2": "adaptive: dpm_solver_12", "3": "adaptive: dpm_solver_23"}[order(case)]]
        if implementation(case) == "dpm_solver_v3":  # with its tables, and its sums over them
            names = ["calibrated: dpm_solver_v3"]
        for name in names:
            mine = out.setdefault(name, {})
            count, worst = mine.get(implementation(case), (0, 0.0))
            mine[implementation(case)] = (count + 1, max(worst, deviation))
    return out


def stochastic() -> Counts:
    """The same for stochastic solvers."""
    out: Counts = {name: {} for name in fs.solvers if fs.solvers[name].stochastic}
    for case in noisy.golden()["cases"]:
        if "error" in case or case["settings"].get("pc_mode") == "PECE":
            continue
        compiled = noisy.compile_case(case)
        for name in noisy.names_for(case, compiled):
            who = noisy.implementation(case)
            count, worst = out[name].get(who, (0, 0.0))
            out[name][who] = (count + 1, max(worst, noisy.deviation(case, compiled)))
    return out


def order(case: dict) -> str:
    """Of an adaptive method."""
    return case["method"][-1]


def measured(name: str) -> str:
    """Order of the steps in bulk."""
    plan = fs.plan(name, fs.VP(), 24, grid="lambda", final="min")
    return f"{orders(plan).bulk:.1f}"


def weak(name: str) -> str:
    """Weak order: the least that `tests/test_weak.py` measures on two exact problems."""
    found = min(weak_orders(fs.solvers[name]))
    return f"{max(found, 0.0):.1f}"


def rows(counts: Counts, noise: bool) -> Iterator[str]:
    """Of the table, in markdown."""
    titles = (
        "solver",
        *(("weak order", "measured", "strong order") if noise else ("order (smooth grids)",)),
        *(() if noise else ("measured",)),
        "NFE per step",
        "cases",
        "agrees with (cases)",
        "to",
        "upstream",
    )
    yield f"| {' | '.join(titles)} |"
    yield f"| {' | '.join(['---'] * len(titles))} |"
    for name, found in counts.items():
        if noise:
            solver = fs.solvers[name]
            strong = str(solver.strong_order) if solver.strong_order else "no path"
            facts = [str(solver.order), weak(name), strong, str(solver.nfe_per_step)]
        elif name in fs.solvers:
            solver = fs.solvers[name]
            smooth = f" ({solver.smooth_order})" if solver.smooth_order else ""
            facts = [f"{solver.order}{smooth}", measured(name), str(solver.nfe_per_step)]
        elif name.startswith("calibrated"):
            facts = ["1 to 3", "", "1"]
        else:
            facts = [name[-1], "", name[-1]]
        total = sum(count for count, _ in found.values())
        who = ", ".join(f"{k} ({count})" for k, (count, _) in found.items()) or "no official result"
        sums = " with its sums" if SUMS.fullmatch(name) else ""
        worst = f"{max(v for _, v in found.values()):.0e}{sums}" if found else ""
        known = next((v for k, v in UPSTREAM.items() if re.fullmatch(k, name)), "") if found else ""
        yield f"| {' | '.join([f'`{name}`', *facts, str(total), who, worst, known])} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts, noise = conformance(), stochastic()
    if options.json is not None:
        options.json.write_text(json.dumps({**counts, **noise}, indent=1) + "\n")
    print("\n".join(rows(counts, False)))
    print("\n## Stochastic solvers\n")
    print("\n".join(rows(noise, True)))


if __name__ == "__main__":
    main()
