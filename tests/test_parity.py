"""Parity with official implementations: the same final states on exact Gaussian mixtures.

tests/golden holds results of the official implementations (names and versions in cases.json),
computed in float64 on two mixtures whose network is exact. Every case is run through the real loop
on the step boundaries that the official code used. Where official code deviates from its method,
the deviation is reproduced here, by giving every step its order or its rows by hand:

    orders      lowered near the end: dpm_solver below 10 steps, diffusers below 15, UniPC and the
                EDM copies always, to sigma = 0 always
    zero steps  diffusers repeats the last sigma in some settings; that step does nothing
    landing     diffusers DDIM lands on another time than it evaluates next (linspace spacing,
                trailing spacing that does not divide)
    rounding    diffusers may evaluate the network at a rounded time and step from the exact sigma
    quadrature  DEIS sums its integrals as left Riemann sums, the one deviation that is not
                reproduced but bounded: see `LIMIT`
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs

GOLDEN = Path(__file__).parent / "golden"

#: Relative to max(1, max |x|). The two codes round differently, and few-step states of diverging
#: methods reach 1e5: official implementations of one method agree among themselves to 1e-12.
LIMIT = 1e-9


@cache
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "cases.json").read_text())


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "states.npz") as file:
        return {key: file[key] for key in file.files}


def stored(i: int) -> list[float]:
    values = arrays()["lists"][i]
    return values[~np.isnan(values)].tolist()


def implementation(case: dict) -> str:
    return case["id"].rsplit("-", 1)[0]


@cache
def mixture(problem: str) -> fs.exact.Mixture:
    w, mu, cov = (arrays()[f"{problem}_{key}"] for key in ("w", "mu", "cov"))
    return fs.exact.Mixture(w, mu, cov)


class LinearTable(fs.Process):
    """A discrete process with alpha^2, not log alpha, linear between the integers, as in DEIS."""

    t_start, t_end, t_clean = 999.0, 0.0, None

    def __init__(self) -> None:
        self.table = np.exp(2 * np.array(fs.DiscreteVP.scaled_linear().log_alphas))

    def _square(self, t):
        return np.interp(t, np.arange(1000.0), self.table)

    def alpha(self, t):
        return np.sqrt(self._square(t))

    def sigma(self, t):
        return np.sqrt(1 - self._square(t))

    def lam(self, t):
        square = self._square(t)
        return 0.5 * np.log(square / (1 - square))

    def time(self, lam):
        square = 1 / (1 + np.exp(-2 * np.asarray(lam)))
        return np.interp(square, self.table[::-1], np.arange(999.0, -1.0, -1.0))

    def knots(self, lam_from, lam_to):
        lam = self.lam(np.arange(1000.0))[1:-1]
        return lam[(lam > lam_from) & (lam < lam_to)]


@cache
def vp_between(sigma_min: float, sigma_max: float) -> fs.Custom:
    """The linear VP with rho(0.001) = sigma_min and rho(1) = sigma_max, the clock of diff-sampler.
    Its coefficients in t use it for every process, with the range 0.002 to 80, in which beta(0)
    is slightly negative: no `fewstep.VP`."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    first = high - 0.5 * slope

    def integral(t):
        return first * t + 0.5 * slope * t**2

    return fs.Custom(
        lambda t: np.exp(-0.5 * integral(t)),
        lambda t: np.sqrt(-np.expm1(-integral(t))),
        lam=lambda t: -0.5 * np.log(np.expm1(integral(t))),
        t_start=1.0,
        t_end=1e-3,
    )


def process_for(case: dict, lam: Sequence[float]) -> fs.Process:
    name, args = implementation(case), golden()["args"][case["args"]]
    finite = [v for v in lam if math.isfinite(v)]
    if name == "diff_solvers" and case["method"].startswith("deis_tab"):
        return vp_between(0.002, 80.0)
    if case["process"] == "vplin":
        return fs.VP()
    if case["process"] == "sd":
        if name == "deis":
            return LinearTable()
        integers = name == "diffusers_ddim"
        return replace(fs.DiscreteVP.scaled_linear(), integer_times=integers)
    if case["process"] == "flow":
        return fs.Flow(shift=args.get("shift", 1.0), t_end=float(fs.Flow().time(max(finite))))
    return fs.EDM(math.exp(-max(finite)), math.exp(-finite[0]))


def lowered(case: dict, order: int, count: int) -> list[int]:
    """The orders that the official code takes at its `count` steps."""
    name, args = implementation(case), golden()["args"][case["args"]]
    warm = [min(i + 1, order) for i in range(count)]
    wanted = bool(args.get("lower_order_final", name.startswith("diffusers")))
    if name == "dpm_solver" and count >= 10:
        wanted = False
    if name in ("dpm_solver", "edm_dpm_solver", "diff_solvers", "diffusers_unipc_multistep"):
        return [min(k, count - i) for i, k in enumerate(warm)] if wanted else warm
    if name in (
        "diffusers_dpmsolver_multistep",
        "diffusers_edm_dpmsolver_multistep",
        "diffusers_deis_multistep",
    ):
        if wanted and count < 15:
            warm[-1] = 1
            warm[-2] = min(warm[-2], 2)
        if args.get("euler_at_final"):
            warm[-1] = 1
    return warm


def solver_for(case: dict) -> fs.Multistep:
    """The solver of fewstep for a case; as published, so without a limit of growth."""
    name, method = implementation(case), case["method"]
    args = golden()["args"][case["args"]]
    form, variable, second, third = "data", "lambda", "exact", "exact"
    order = 1
    if name in ("dpm_solver", "edm_dpm_solver"):
        order = args["order"]
        form = "data" if args["algorithm_type"] == "dpmsolver++" else "noise"
        second = "midpoint" if args["solver_type"] == "dpmsolver" else "exact"
        third = "shipped"
    elif name == "deis" and args["method"] != "rho_rk":
        order, form = args["ab_order"] + 1, "noise"
        variable = "t" if args["method"] == "t_ab" else "rho"
    elif name == "diff_solvers" and method.startswith("deis"):
        order, form = args["max_order"], "noise"
        variable = "t" if "tab" in method else "rho"
    elif name == "diff_solvers" and method.startswith("dpm_pp"):
        order, form = args["max_order"], "data" if args["predict_x0"] else "noise"
        second, third = "midpoint", "shipped"
    elif name == "k_diffusion" and method.startswith("dpmpp_3m"):
        order, third = 3, "shipped"
    elif name == "k_diffusion" and method.startswith("dpmpp"):
        order, second = 2, "exact" if method.endswith("heun") else "midpoint"
    elif "lms" in method:
        order, form, variable = int(method[-1]), "noise", "rho"
    elif name == "diffusers_deis_multistep":
        order, form = args["solver_order"], "noise"
    elif name in ("diffusers_dpmsolver_multistep", "diffusers_edm_dpmsolver_multistep"):
        order = args.get("solver_order", 2)
        form = "noise" if args.get("algorithm_type") == "dpmsolver" else "data"
        second = "midpoint" if args.get("solver_type", "midpoint") == "midpoint" else "exact"
        third = "shipped"
    elif name == "diffusers_unipc_multistep":
        order, second = 2, "midpoint"
    return fs.exponential(
        order,
        form=form,
        variable=variable,
        second=second if order > 1 and variable == "lambda" else "exact",
        third=third if order == 3 else "exact",
        growth=math.inf,
    )


def predicts_for(case: dict, solver: fs.Multistep, levels: Sequence[fs.Level]) -> str:
    """What the network predicts. It matters where the evaluation is at another level than the
    step; elsewhere every convention must give the same, and the form's own is taken."""
    args = golden()["args"][case["args"]]
    kind = args.get("prediction_type")
    if kind is None and case["process"] == "flow":
        kind = "flow_prediction"
    if kind is None:
        kind = "epsilon" if solver.step.form == "noise" or "evals" in case else "sample"
    return {
        "epsilon": "noise",
        "sample": "data",
        "v_prediction": "v",
        "flow_prediction": "flow",
    }[kind]


def by_hand(
    process: fs.Process,
    solver: fs.Multistep,
    levels: Sequence[fs.Level],
    orders: Sequence[int],
    predicts: str,
    landings: Sequence[fs.Level] | None = None,
) -> fs.Plan:
    """A plan whose step i has orders[i] and, if given, ends at landings[i] while the next begins
    at levels[i + 1]: such rows do not reproduce constant data and noise."""
    rows = []
    for i, order in enumerate(orders):
        history = levels[i - order + 1 : i + 1][::-1]
        end = levels[i + 1] if landings is None else landings[i]
        a, b, _, exact = solver.step(process, history, end)
        rows.append(
            fs.Row(
                {i - j: c for j, c in enumerate(a) if c},
                {i - j: c for j, c in enumerate(b) if c},
                order,
                exact and landings is None,
            )
        )
    calls = [fs.Call(*map(float, fs.predictions[predicts].scalars(v))) for v in levels[:-1]]
    return fs.Plan(tuple(levels), tuple(rows), (*calls, None), process.integer_times)


def compile_case(case: dict) -> tuple[fs.Process, fs.Plan, str]:
    """(process, plan, how it was made)."""
    args = golden()["args"][case["args"]]
    lam = stored(case["lam"])
    process = process_for(case, lam)
    solver = solver_for(case)
    if implementation(case) == "diffusers_ddim":
        return process, *ddim(case, process, solver)
    if case["method"] == "euler" and args.get("interpolation_type") == "log_linear":
        lam = lam[: case["steps"] + 1]  # its grid has a level more than it takes steps
    count = len(lam) - 1
    orders = lowered(case, solver.nodes, count)
    if args.get("denoise_to_zero"):
        lam, orders, count = [*lam, math.inf], [*orders, 1], count + 1
    while lam[-1] == lam[-2] or abs(lam[-1] - lam[-2]) < 1e-12:
        lam, orders, count = lam[:-1], orders[:-1], count - 1
    times = stored(case["t"]) if "t" in case else process.time(np.array(lam)).tolist()
    times = times[: count + 1]
    if len(times) <= count:
        times.append(process.t_clean)
    if math.isinf(lam[-1]):
        times[-1] = process.t_clean
    # The inverse of lambda rounds; the ends of the range do not.
    times[0] = process.t_start if abs(times[0] - process.t_start) < 1e-9 else times[0]
    for i in (count - 1, count):
        near = abs(times[i] - process.t_end) < 1e-9 * max(1e-3, abs(process.t_end))
        times[i] = process.t_end if near else times[i]
    levels = [process.level(t) for t in times]
    predicts = predicts_for(case, solver, levels)

    def seen(orders: Sequence[int]) -> list[int]:
        """Orders as they come out: to sigma = 0 some formulas have order 1 only."""
        first = math.isinf(lam[-1]) and solver.step.first_at_clean
        return [*orders[:-1], 1] if first else list(orders)

    for lower in (False, True):
        ours = [min(i + 1, solver.nodes, count - i if lower else count) for i in range(count)]
        if seen(ours) == seen(orders):
            ready = replace(solver, lower_final=lower)
            return process, fs.plan(ready, process, grid=times, predicts=predicts), "plan"
    return process, by_hand(process, solver, levels, orders, predicts), "orders by hand"


def ddim(case: dict, process: fs.DiscreteVP, solver: fs.Multistep) -> tuple[fs.Plan, str]:
    """diffusers DDIM lands at t - 1000 // n, whatever the spacing of the times."""
    args = golden()["args"][case["args"]]
    times = stored(case["timesteps"])
    landings = [t - 1000 // case["steps"] for t in times]
    last = process.t_clean if args["set_alpha_to_one"] else 0.0
    landings = [t if t >= 0 else last for t in landings]
    while landings[-1] == times[-1]:
        times, landings = times[:-1], landings[:-1]
    predicts = predicts_for(case, solver, ())
    if landings[:-1] == times[1:]:
        return fs.plan(solver, process, grid=[*times, last], predicts=predicts), "plan"
    levels = [process.level(t) for t in (*times, last)]
    ends = [process.level(t) for t in landings]
    orders = [1] * len(times)
    return by_hand(process, solver, levels, orders, predicts, ends), "landing elsewhere"


def run_case(case: dict) -> tuple[float, str]:
    """(deviation from the official result relative to max(1, max |x|), how the plan was made)."""
    process, plan, how = compile_case(case)
    model = mixture(case["p"])
    predicts = plan_prediction(case, process, plan)
    evals = stored(case["evals"]) if "evals" in case else None
    coordinate, scale = golden()["args"][case["start"]]
    z = torch.from_numpy(arrays()[f"{case['p']}_z"])
    first, last = plan.levels[0], plan.levels[-1]
    factor = first.alpha if coordinate == "ve" else math.hypot(first.alpha, first.sigma)
    state = plan.start(factor * scale * z)
    while not state.done:
        x_in, t_in = state.query()
        if evals is None:
            level = process.level(float(t_in[0]))
        else:
            lam = evals[state.index]
            level = fs.Level(None, (1 + math.exp(-2 * lam)) ** -0.5, 1.0, lam)
            level = replace(level, sigma=(1 + math.exp(2 * lam)) ** -0.5)
        state = state.advance(answer(model, x_in, level, predicts))
    found = state.x / last.alpha if "y" in case else state.x
    wanted = torch.from_numpy(arrays()[f"{case['p']}_final"][case["row"]])
    deviation = (found - wanted).abs().max() / max(1.0, float(wanted.abs().max()))
    return float(deviation), how


def plan_prediction(case: dict, process: fs.Process, plan: fs.Plan) -> str:
    return predicts_for(case, solver_for(case), plan.levels)


def answer(model: fs.exact.Mixture, x: Tensor, level: fs.Level, predicts: str) -> Tensor:
    data, noise = model.predict(x, level.alpha, level.sigma)
    if predicts == "v":
        return level.alpha * noise - level.sigma * data
    return {"data": data, "noise": noise, "flow": noise - data}[predicts]
