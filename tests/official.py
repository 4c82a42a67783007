"""Cases of tests/golden as runs of this package: which solver, grid and hook, or which rows.

`compile_case` gives the plan of a case; `run` and `deviation` compare its end with the official
one. Where a solver of the package does what the official code does, the plan is `fewstep.plan` on
the official step boundaries. Where official code deviates from its method, its update is written
down here as it stands, with a `Tape`, and becomes the rows of a plan by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from fewstep._adaptive import _Method, _sample
from fewstep._calibrate._ems import EMS
from fewstep._hooks import clip, dynamic_threshold
from fewstep._solvers._momentum import ipndm, unic
from fewstep._solvers._pndm import pndm
from fewstep._solvers._reversible import bdia
from fewstep._solvers._runge_kutta import runge_kutta, tableaus
from fewstep._solvers._singlestep import Singlestep, singlestep
from fewstep._solvers._v3 import dpm_solver_v3

GOLDEN = Path(__file__).parent / "golden"

#: Implementations of UniPC and of what equals it: DC-Solver with all ratios 1; SA-Solver at tau = 0
#: with a corrector one order above the predictor (data: bh1, noise: exact weights).
CORRECTING = (
    "dc_solver",
    "dc_solver_diffusers",
    "diffusers_sasolver",
    "diffusers_unipc_multistep",
    "edm_unipc",
    "unipc",
)


@cache
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "cases.json").read_text())


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "states.npz") as file:
        return {key: file[key] for key in file.files}


@cache
def stored(i: int) -> tuple[float, ...]:
    values = arrays()["lists"][i]
    return tuple(values[~np.isnan(values)].tolist())


@cache
def statistics(name: str, degenerated: bool) -> EMS:
    """Of a network, as DPM-Solver-v3 was given them. degenerated: those of the data form, on the
    same lambdas."""
    with np.load(GOLDEN / "statistics.npz") as file:
        lam, l, s, b = (file[f"{name}/{key}"] for key in ("lam", "l", "s", "b"))
    if degenerated:
        zero = np.zeros(len(lam))
        return EMS(lam, zero + 1, zero, zero)
    return EMS(lam, l, s, b)


def implementation(case: dict) -> str:
    return case["id"].rsplit("-", 1)[0]


def arguments(case: dict) -> dict[str, Any]:
    return golden()["args"][case["args"]]


def is_adaptive(case: dict) -> bool:
    return "adaptive" in case["method"]


def cases_of(name: str) -> list[dict]:
    return [case for case in golden()["cases"] if implementation(case) == name]


@cache
def mixture(problem: str) -> fs.exact.Mixture:
    w, mu, cov = (arrays()[f"{problem}_{key}"] for key in ("w", "mu", "cov"))
    return fs.exact.Mixture(w, mu, cov)


class LinearTable(fs.Process):
    """A discrete process with alpha^2, not log alpha, linear between the integers, as in DEIS."""

    t_start, t_end, t_clean = 999.0, 0.0, None

    def __init__(self) -> None:
        self.table = np.exp(2 * np.array(fs.DiscreteVP.scaled_linear().log_alphas))

    def square(self, t):
        return np.interp(t, np.arange(1000.0), self.table)

    def alpha(self, t):
        return np.sqrt(self.square(t))

    def sigma(self, t):
        return np.sqrt(1 - self.square(t))

    def lam(self, t):
        square = self.square(t)
        return 0.5 * np.log(square / (1 - square))

    def time(self, lam):
        square = 1 / (1 + np.exp(-2 * np.asarray(lam)))
        return np.interp(square, self.table[::-1], np.arange(999.0, -1.0, -1.0))

    def knots(self, lam_from, lam_to):
        lam = self.lam(np.arange(1000.0))[1:-1]
        return lam[(lam > lam_from) & (lam < lam_to)]


def clock_of_diff_sampler() -> tuple[float, float]:
    """(beta(0), beta'(t)) of the linear VP with rho(0.001) = 0.002 and rho(1) = 80, in whose time
    diff-sampler integrates for every process and every range. beta(0) is slightly negative."""
    low, high = math.log1p(0.002**2), math.log1p(80.0**2)
    slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    return high - 0.5 * slope, slope


@cache
def process_of_diff_sampler() -> fs.Custom:
    first, slope = clock_of_diff_sampler()

    def integral(t):
        return first * t + 0.5 * slope * t**2

    return fs.Custom(
        lambda t: np.exp(-0.5 * integral(t)),
        lambda t: np.sqrt(-np.expm1(-integral(t))),
        lam=lambda t: -0.5 * np.log(np.expm1(integral(t))),
        t_start=1.0,
        t_end=1e-3,
    )


@cache
def table(linear: bool, integers: bool) -> fs.Process:
    process = LinearTable() if linear else fs.DiscreteVP.scaled_linear()
    return process if linear else replace(process, integer_times=integers)


def process_for(case: dict, lam: Sequence[float]) -> fs.Process:
    name, args = implementation(case), arguments(case)
    finite = [v for v in lam if math.isfinite(v)]
    if name == "diff_solvers" and case["method"].startswith("deis_tab"):
        return process_of_diff_sampler()
    if case["process"] == "vplin":
        return fs.VP()
    if case["process"] == "sd":
        return table(name == "deis", name in ("diffusers_ddim", "diffusers_pndm"))
    if case["process"] == "flow":
        return fs.Flow(shift=args.get("shift", 1.0), t_end=float(fs.Flow().time(max(finite))))
    return fs.EDM(math.exp(-max(finite)), math.exp(-finite[0]))


def lowered(case: dict, order: int, count: int) -> list[int]:
    """The orders that the official code takes at its `count` steps."""
    name, args = implementation(case), arguments(case)
    warm = [min(i + 1, order) for i in range(count)]
    wanted = bool(args.get("lower_order_final", name.startswith("diffusers")))
    if name == "dpm_solver" and count >= 10:
        wanted = False
    if name in ("dpm_solver", "edm_dpm_solver", "diff_solvers", *CORRECTING):
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
    args = arguments(case)
    form, variable, second, third = "data", "lambda", "exact", "exact"
    order, corrector = 1, False
    if name == "dpm_solver_v3":
        corrector = ("above" if args["half"] else "full") if args["use_corrector"] else "none"
        return dpm_solver_v3(
            statistics(args["statistics"], args["degenerated"]),
            args["order"],
            pseudo=args["p_pseudo"],
            corrector=corrector,
            corrector_pseudo=args["c_pseudo"],
            lower_final=args["lower_order_final"],
            rule="trapezoid",
            growth=math.inf,
        )
    if name == "bdia" and args["gamma"]:
        return bdia("ddim", args["gamma"])
    if method.startswith("ipndm") and "_v" not in method:
        return ipndm(args.get("max_order", 4))
    variants = {"bh1": "bh1", "bh2": "midpoint", "vary_coeff": "exact"}
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
    elif method.startswith("ipndm_v"):
        order, form, variable = args["max_order"], "noise", "rho"
    elif "lms" in method:
        order, form, variable = int(method[-1]), "noise", "rho"
    elif name == "diffusers_deis_multistep":
        order, form = args["solver_order"], "noise"
    elif name in ("diffusers_dpmsolver_multistep", "diffusers_edm_dpmsolver_multistep"):
        order = args.get("solver_order", 2)
        form = "noise" if args.get("algorithm_type") == "dpmsolver" else "data"
        second = "midpoint" if args.get("solver_type", "midpoint") == "midpoint" else "exact"
        third = "shipped"
    elif name == "diffusers_sasolver":
        order, corrector = args["predictor_order"], True
        form = "noise" if args.get("algorithm_type") == "noise_prediction" else "data"
        second = "bh1" if form == "data" else "exact"
    elif name in CORRECTING or method.startswith("unipc"):
        order = args.get("order", args.get("max_order", args.get("solver_order", 2)))
        noise = args.get("algorithm_type") == "noise_prediction" or not args.get("predict_x0", True)
        form = "noise" if noise else "data"
        second = variants[args.get("variant", args.get("solver_type", "bh2"))]
        corrector = args.get("disable_corrector") != "all"
    return fs.exponential(
        order,
        form=form,
        variable=variable,
        second=second if (order > 1 or corrector) and variable == "lambda" else "exact",
        third=third if order == 3 else "exact",
        corrector=corrector,
        growth=math.inf,
    )


def predicts_for(case: dict, solver: fs.Multistep | None) -> str:
    """What the network predicts. It matters where the evaluation is at another level than the
    step; elsewhere every convention must give the same, and the form's own is taken."""
    args = arguments(case)
    kind = args.get("prediction_type")
    if kind is None and case["process"] == "flow":
        kind = "flow_prediction"
    if kind is None:
        form = getattr(getattr(solver, "step", None), "form", None)
        noise = "evals" in case or form == "noise"
        kind = "epsilon" if noise else "sample"
    return {
        "epsilon": "noise",
        "sample": "data",
        "v_prediction": "v",
        "flow_prediction": "flow",
    }[kind]


class Terms(dict):
    """A linear combination of states ("x", j) and data predictions ("D", j)."""

    __array_ufunc__ = None  # numpy numbers leave the product to us

    def __add__(self, other: Terms) -> Terms:
        return Terms({k: self.get(k, 0.0) + other.get(k, 0.0) for k in {**self, **other}})

    def __mul__(self, c: float) -> Terms:
        return Terms({k: v * float(c) for k, v in self.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Terms) -> Terms:
        return self + -1.0 * other

    def __truediv__(self, c: float) -> Terms:
        return self * (1.0 / c)


class Tape:
    """Official code, as it is written, into rows: an update is a linear combination of states and
    data predictions, and `make` turns it into the next state of a plan.

        tape = Tape(start)
        x, D = tape.x, tape.ask()
        x = tape.make(sigma_t / sigma_s * x + (alpha_t - alpha_s * sigma_t / sigma_s) * D, end)
    """

    def __init__(self, start: fs.Level) -> None:
        self.levels = [start]
        self.rows: list[fs.Row] = []
        self.asked: dict[int, fs.Level] = {}

    @property
    def x(self) -> Terms:
        """The newest state."""
        return Terms({("x", len(self.rows)): 1.0})

    def ask(self, level: fs.Level | None = None) -> Terms:
        """Its data prediction, from an evaluation at its own or another level."""
        self.asked[len(self.rows)] = self.levels[-1] if level is None else level
        return Terms({("D", len(self.rows)): 1.0})

    def ask_noise(self, level: fs.Level | None = None) -> Terms:
        """Its noise prediction."""
        at = self.levels[-1] if level is None else level
        return (self.x - at.alpha * self.ask(level)) / at.sigma

    def make(self, value: Terms, level: fs.Level, order: int = 1, exact: bool = False) -> Terms:
        """A state at this level, which the next evaluation is about."""
        a, b = ({j: c for (k, j), c in value.items() if k == kind and c} for kind in ("x", "D"))
        self.rows.append(fs.Row(a, b, order, exact))
        self.levels.append(level)
        return self.x

    def plan(self, predicts: str, integer_times: bool = False) -> fs.Plan:
        scalars = fs.predictions[predicts].scalars
        calls = [
            fs.Call(*map(float, scalars(at)), level=None if at == level else at)
            if (at := self.asked.get(j))
            else None
            for j, level in enumerate(self.levels)
        ]
        return fs.Plan(tuple(self.levels), tuple(self.rows), tuple(calls), integer_times)


def compensated(outputs: list[Terms], times: Sequence[float], order: int, ratio: float) -> Terms:
    """DC-Solver: the newest output, interpolated in t through order + 1 of them at another t."""
    at = times[-2] + ratio * (times[-1] - times[-2])
    total = Terms()
    for i in range(1, order + 2):
        others = [times[-j] for j in range(1, order + 2) if j != i]
        weight = math.prod((at - t) / (times[-i] - t) for t in others)
        total = total + weight * outputs[-i]
    return total


def by_hand(
    process: fs.Process,
    solver: fs.Multistep,
    levels: Sequence[fs.Level],
    orders: Sequence[int],
    landings: Sequence[fs.Level] | None = None,
    corrected: Collection[int] = (),
    ratios: Sequence[float] = (),
    ratio_order: int = 0,
) -> Tape:
    """Steps of a multistep solver where step i has orders[i] and, if given, ends at landings[i]
    while the next begins at levels[i + 1]: such rows do not reproduce constant data and noise.
    The states at the levels in `corrected` are corrected, with the nodes of the step that ends
    there and their own. ratios: DC-Solver replaces the newest output before step i."""
    tape, exact = Tape(levels[0]), landings is None and not ratios
    x, states, outputs = tape.x, [tape.x], [tape.ask()]

    def add(formula: fs.Formula, X: Sequence[Terms], D: Sequence[Terms], end: fs.Level) -> Terms:
        share = formula.a[X.index(states[-1])] if formula.base is None else formula.base
        value = share * x - share * states[-1]
        for terms, numbers in ((X, formula.a), (D, formula.b)):
            for term, c in zip(terms, numbers, strict=True):
                value = value + c * term
        value = Terms({k: c for k, c in value.items() if c})
        return tape.make(value, end, formula.order, formula.exact and exact)

    for i, order in enumerate(orders):
        if ratios and ratios[i] != 1:
            times = [level.t for level in levels[: i + 1]]
            outputs[-1] = compensated(outputs, times, ratio_order, ratios[i])
        history = levels[i - order + 1 : i + 1][::-1]
        X, D = states[-order:][::-1], outputs[-order:][::-1]
        end = levels[i + 1] if landings is None else landings[i]
        made = add(solver.step(process, history, end), X, D, levels[i + 1])
        if i + 1 == len(orders) and i + 1 not in corrected:
            break
        answer = tape.ask()
        if i + 1 in corrected:
            formula = solver.corrector(process, [end, *history], end)
            x = add(formula, [made, *X], [answer, *D], end)
        else:
            x = made
        states, outputs = [*states, made], [*outputs, answer]
    return tape


@dataclass(frozen=True)
class Compiled:
    """A case, ready to run. way: "plan" if a solver of the package does it all, else what was done
    by hand. solver: that solver. method: of adaptive steps, which have no plan."""

    process: fs.Process
    plan: fs.Plan | None
    predicts: str
    way: str
    solver: fs.Solver | None = None
    hook: fs.Hook | None = None
    method: _Method | None = None
    grid: tuple[float, ...] = ()


def planned(
    process: fs.Process,
    solver: fs.Solver,
    grid: Sequence[float],
    predicts: str,
    nfe: int | None = None,
    way: str = "plan",
) -> Compiled:
    """What a solver of the package makes of these step boundaries."""
    plan = fs.plan(solver, process, nfe, grid=list(grid), predicts=predicts)
    own = solver if way == "plan" else None
    return Compiled(process, plan, predicts, way, own, grid=tuple(grid))


@dataclass(frozen=True)
class Steps:
    """The step boundaries of a case, without a last sigma that is repeated (up to rounding)."""

    process: fs.Process
    levels: tuple[fs.Level, ...]
    count: int  # steps of the official code, with the ones that do nothing

    @property
    def times(self) -> list[float]:
        return [level.t for level in self.levels]

    @property
    def clean(self) -> bool:
        return math.isinf(self.levels[-1].lam)


def steps_of(case: dict, to_zero: bool = False) -> Steps:
    """to_zero: with a last step to sigma = 0 beyond the official grid (denoise_to_zero)."""
    args = arguments(case)
    lam = list(stored(case["lam"]))
    process = process_for(case, lam)
    if case["method"] == "euler" and args.get("interpolation_type") == "log_linear":
        lam = lam[: case["steps"] + 1]  # its grid has a level more than it takes steps
    total = len(lam) - 1
    while lam[-1] - lam[-2] < 1e-12:
        lam.pop()
    count = len(lam) - 1
    times = list(stored(case["t"])) if "t" in case else process.time(np.array(lam)).tolist()
    # The inverse of lambda rounds; the ends of the range do not.
    times = [*times, process.t_clean][: count + 1]  # stored times lack an appended clean end
    if math.isinf(lam[-1]):
        times[-1] = process.t_clean
    times[0] = process.t_start if abs(times[0] - process.t_start) < 1e-9 else times[0]
    for i in (count - 1, count):
        near = abs(times[i] - process.t_end) < 1e-9 * max(1e-3, abs(process.t_end))
        times[i] = process.t_end if near else times[i]
    if to_zero:
        times, total = [*times, process.t_clean], total + 1
    return Steps(process, tuple(map(process.level, times)), total)


def multistep(case: dict) -> Compiled:
    """Multistep solvers of one evaluation a step, with or without correctors."""
    args, solver = arguments(case), solver_for(case)
    to_zero = bool(args.get("denoise_to_zero"))
    steps = steps_of(case, to_zero)
    process, levels = steps.process, steps.levels
    # The official code corrects at all inner levels, or fewer; seen from its own grid.
    total, count = steps.count - to_zero, len(levels) - 1
    orders = lowered(case, solver.nodes, total) + [1] * to_zero
    corrected = set(range(1, total)) if solver.corrector else set()
    corrected -= {k + 1 for k in args.get("disable_corrector", ()) if corrected}
    orders = orders[:count]
    predicts = predicts_for(case, solver)

    def seen(orders: Sequence[int]) -> list[int]:
        """Orders as they come out: to sigma = 0 some formulas have order 1 only."""
        first = steps.clean and getattr(solver.step, "first_at_clean", False)
        return [*orders[:-1], 1] if first else list(orders)

    ratios = args.get("dc_ratios") or ()
    ratios = () if all(r == 1 for r in ratios) else ratios
    inner = set(range(1, count)) if solver.corrector else set()
    for lower in (False, True):
        ours = [min(i + 1, solver.nodes, count - i if lower else count) for i in range(count)]
        if seen(ours) == seen(orders) and corrected == inner and not ratios:
            ready = replace(solver, lower_final=lower)
            return planned(process, ready, steps.times, predicts)
    tape = by_hand(
        process,
        solver,
        levels,
        orders,
        corrected=corrected,
        ratios=ratios,
        ratio_order=args.get("dc_order", 0),
    )
    way = "orders by hand" if corrected == inner else "corrector by hand"
    way = "compensated outputs" if ratios else way
    return Compiled(process, tape.plan(predicts, process.integer_times), predicts, way)


def ddim(case: dict) -> Compiled:
    """diffusers DDIM lands at t - 1000 // n, whatever the spacing of the times."""
    args, solver = arguments(case), solver_for(case)
    process = process_for(case, stored(case["lam"]))
    times = list(stored(case["timesteps"]))
    landings = [t - 1000 // case["steps"] for t in times]
    last = process.t_clean if args["set_alpha_to_one"] else 0.0
    landings = [t if t >= 0 else last for t in landings]
    while landings[-1] == times[-1]:
        times, landings = times[:-1], landings[:-1]
    predicts = predicts_for(case, solver)
    if landings[:-1] == times[1:]:
        return planned(process, solver, [*times, last], predicts)
    levels = [process.level(t) for t in (*times, last)]
    ends = [process.level(t) for t in landings]
    plan = by_hand(process, solver, levels, [1] * len(times), ends).plan(predicts, True)
    return Compiled(process, plan, predicts, "landing elsewhere")


def sa_solver(case: dict) -> Compiled:
    """SA-Solver at tau = 0, any predictor and corrector: the number of nodes of either. Two nodes
    in data form take the moment of UniPC's bh1."""
    args = arguments(case)
    steps, n = steps_of(case), case["steps"]
    p, c = args["predictor_order"], args["corrector_order"]
    lower = args.get("lower_order_final", True)
    form = "noise" if args.get("algorithm_type") == "noise_prediction" else "data"
    tape, levels, predicts = Tape(steps.levels[0]), steps.levels, predicts_for(case, None)
    if c > 1 and steps.count == len(levels) - 1:
        second = "bh1" if form == "data" else "exact"
        exact = {"growth": math.inf, "form": form}
        predictor = fs.exponential(p, second=second if p > 1 else "exact", **exact)
        solver = replace(unic(predictor, c - 1, second=second, **exact), lower_final=lower)
        return planned(steps.process, solver, steps.times, predicts)

    def update(start: fs.Level, end: fs.Level, nodes: list[fs.Level], M: list[Terms]) -> Terms:
        W = fs.weights(form, "lambda", start, end, nodes)
        if form == "data" and len(nodes) == 2:
            k = 1 - nodes.index(start)
            h = end.lam - start.lam
            moment = end.alpha * h * 0.5 * h / (nodes[k].lam - start.lam)
            W[k], W[1 - k] = moment, W.sum() - moment
        value = (end.sigma / start.sigma if form == "data" else end.alpha / start.alpha) * x
        for w, m in zip(W, M, strict=True):
            value = value + w * m
        return value

    ask = tape.ask if form == "data" else tape.ask_noise
    x, M = tape.x, [ask()]
    for i, (start, end) in enumerate(pairwise(levels)):
        order = min(p, n - i if lower else p, i + 1)
        nodes = list(levels[i - order + 1 : i + 1][::-1])
        after = tape.make(update(start, end, nodes, M[-order:][::-1]), end, order)
        if i + 1 < n:
            M.append(ask())
            order = min(c, n - i + 1 if lower else c, i + 2)
            nodes = list(levels[i + 2 - order : i + 2][::-1])
            after = tape.make(update(start, end, nodes, M[-order:][::-1]), end, order)
        x = after
    return Compiled(steps.process, tape.plan(predicts), predicts, "corrector by hand")


def vary_coeff(case: dict) -> Compiled:
    """UniPC, variant "vary_coeff", as shipped: the corrector takes the new point with a coefficient
    of the last loop's index, which belongs to another term."""
    args = arguments(case)
    steps = steps_of(case, bool(args.get("denoise_to_zero")))
    levels, p, n = steps.levels, args["order"], case["steps"]
    data = args["algorithm_type"] == "data_prediction"
    tape = Tape(levels[0])
    ask = tape.ask if data else tape.ask_noise
    x, M = tape.x, [ask()]
    for i, (start, end) in enumerate(pairwise(levels[: n + 1])):
        order = min(p, i + 1, n - i if args["lower_order_final"] else p)
        h = end.lam - start.lam
        ratio = [(levels[i - k].lam - start.lam) / h for k in range(1, order)] + [1.0]
        older = [(M[-1 - k] - M[-1]) / ratio[k - 1] for k in range(1, order)]
        matrix = np.array([[r**k / math.factorial(k + 1) for k in range(order)] for r in ratio])
        hh = -h if data else h
        phi = [math.expm1(hh)]
        for k in range(1, order + 1):
            phi.append(phi[-1] / hh - 1 / math.factorial(k))
        scale = end.alpha if data else end.sigma
        base = (end.sigma / start.sigma if data else end.alpha / start.alpha) * x
        base = base - scale * phi[0] * M[-1]

        def update(A: np.ndarray, base=base, older=older, scale=scale, phi=phi) -> Terms:
            for k in range(len(older)):
                for m, difference in enumerate(older):
                    base = base - scale * phi[k + 1] * A[k, m] * difference
            return base

        x = tape.make(update(np.linalg.inv(matrix[:-1, :-1])), end, order)
        if i + 1 < n:
            M.append(ask())
            inverse = np.linalg.inv(matrix)
            last = inverse[max(order - 2, 0), -1]
            value = update(inverse) - scale * phi[order] * last * (M[-1] - M[-2])
            x = tape.make(value, end, order)
    if len(levels) > n + 1:
        tape.make(tape.ask(), levels[-1])
    predicts = predicts_for(case, None)
    return Compiled(steps.process, tape.plan(predicts), predicts, "vary_coeff as shipped")


def clock(args: dict) -> tuple[Callable, Callable, Callable, Callable]:
    """(sigma(t), its derivative, its inverse, s'(t)/s(t)) of the ablation study of EDM."""
    low, high = {
        "vp": tuple(math.sqrt(math.expm1(0.1 * t + 9.95 * t**2)) for t in (1e-3, 1.0)),
        "ve": (0.02, 100.0),
        "iddpm": (0.002, 81.0),
        "edm": (0.002, 80.0),
    }[args["discretization"]]
    slope = 2 * (math.log1p(low**2) / 1e-3 - math.log1p(high**2)) / (1e-3 - 1)
    first = math.log1p(high**2) - 0.5 * slope
    if args["schedule"] == "vp":

        def sigma(t):
            return math.sqrt(math.expm1(0.5 * slope * t**2 + first * t))

        def rate(t):
            return 0.5 * (first + slope * t) * (sigma(t) + 1 / sigma(t))

        def inverse(v):
            return (math.sqrt(first**2 + 2 * slope * math.log1p(v**2)) - first) / slope

    elif args["schedule"] == "ve":
        sigma, rate, inverse = math.sqrt, (lambda t: 0.5 / math.sqrt(t)), (lambda v: v**2)
    else:
        sigma, rate, inverse = (lambda t: t), (lambda t: 1.0), (lambda v: v)

    def scaling(t):
        return -sigma(t) * rate(t) / (1 + sigma(t) ** 2) if args["scaling"] == "vp" else 0.0

    return sigma, rate, inverse, scaling


def ablation(case: dict) -> Compiled:
    """Euler and Heun-like steps of dx/dt in x = s(t) y, with sigma(t), in the clock t; here as
    steps of y, so that every state is one of alpha = 1."""
    args = arguments(case)
    steps = steps_of(case)
    process, share = steps.process, args.get("alpha", 1.0)
    sigma, rate, inverse, scaling = clock(args)

    def scale(t: float) -> float:
        return 1 / math.hypot(1.0, sigma(t)) if args["scaling"] == "vp" else 1.0

    def level(t: float) -> fs.Level:
        return process.level(sigma(t))

    def slope(y: Terms, D: Terms, t: float) -> Terms:
        """dx/dt."""
        pull = rate(t) / sigma(t)
        return scale(t) * ((pull + scaling(t)) * y - pull * D)

    times = [*(inverse(v.sigma) for v in steps.levels[:-1]), 0.0]
    tape = Tape(steps.levels[0])
    for i, (t, after) in enumerate(pairwise(times)):
        h, y = after - t, tape.x
        d = slope(y, tape.ask(), t)
        if case["method"] == "ablation_heun" and i + 2 < len(times):
            middle = t + share * h
            y_middle = tape.make((scale(t) * y + share * h * d) / scale(middle), level(middle))
            d_middle = slope(y_middle, tape.ask(), middle)
            d = (1 - 0.5 / share) * d + 0.5 / share * d_middle
        tape.make((scale(t) * y + h * d) / scale(after), level(after))
    return Compiled(process, tape.plan("data"), "data", "in another clock or scaling")


def clipped_ddim(case: dict) -> Compiled:
    """diffusers DDIM clips D but keeps the noise prediction of the unclipped one. As a hook, which
    has one D to give, that is the D with which the step comes out the same."""
    found, process = ddim(case), process_for(case, stored(case["lam"]))
    ends = {
        process.level(t): process.level(max(t - 1000 // case["steps"], process.t_clean))
        for t in stored(case["timesteps"])
    }

    def hook(D: Tensor, level: fs.Level) -> Tensor:
        end = ends[level]
        kept = end.sigma * level.alpha / level.sigma
        return (end.alpha * clip(-1, 1)(D, level) - kept * D) / (end.alpha - kept)

    return replace(found, way="clipped D with the unclipped noise", hook=hook, solver=None)


def adaptive(case: dict) -> Compiled:
    """Adaptive DPM-Solver. The official codes take one error for the whole batch, where this
    package lets every sample have its own steps; and DPM-Solver rounds its factor of h to
    float32."""
    args, p = arguments(case), arguments(case)["order"]
    process = process_for(case, stored(case["lam"]))
    if implementation(case) == "k_diffusion":
        process = fs.EDM(args["sigma_min"], args["sigma_max"])
        form, second = "noise", "midpoint"
        pid = (args["pcoeff"], args["icoeff"], args["dcoeff"])

        def couple(E: np.ndarray) -> float:
            return float(np.sqrt(np.mean(E**2)))

    else:
        form = "data" if args["algorithm_type"] == "dpmsolver++" else "noise"
        second = "midpoint" if args["solver_type"] == "dpmsolver" else "exact"
        pid = None

        def couple(E: np.ndarray) -> float:
            return float(np.float32(E.max() ** (-1 / p))) ** -p

    solver = {2: "dpm_solver_12", 3: "dpm_solver_23"}[p]
    method = _Method(
        solver,
        form,
        second,
        args["rtol"],
        args["atol"],
        None,
        args["h_init"],
        (0.0, math.inf),
        pid,
        couple,
    )
    return Compiled(process, None, form, "adaptive, one error per batch", method=method)


def threshold(case: dict) -> fs.Hook | None:
    """The hook of a case. diffusers caps the threshold at `sample_max_value`: at 1, a clip."""
    args = arguments(case)
    if args.get("thresholding"):
        return dynamic_threshold(0.995, ceiling=args["sample_max_value"])
    if args.get("dynamic_thresholding") or args.get("correcting_x0_fn"):
        return dynamic_threshold(0.995)
    return None


def place(variable: str) -> Callable:
    """Where the inner states of the official DPM-Solver are: evenly between the ends of the step in
    the variable of the grid, which is lambda only for logSNR."""

    def inner(process: fs.Process, start: fs.Level, end: fs.Level, count: int) -> list[float]:
        shares = [k / count for k in range(1, count)]
        # The official time of a table's index n is (n + 1) / 1000.
        shift = 1.0 if isinstance(process, fs.DiscreteVP) else 0.0
        power = {"time_uniform": 1, "time_quadratic": 2, "edm": 7}[variable]
        low, high = ((v.t + shift) ** (1 / power) for v in (start, end))
        return [((1 - c) * low + c * high) ** power - shift for c in shares]

    return inner


def singlestep_for(case: dict) -> Singlestep | None:
    """The solver of fewstep for a case of several stages per step; None for other cases."""
    name, method, args = implementation(case), case["method"], arguments(case)
    if name in ("dpm_solver", "edm_dpm_solver") and "singlestep" in method and args["order"] > 1:
        solver = singlestep(
            args["order"],
            form="data" if args["algorithm_type"] == "dpmsolver++" else "noise",
            second="midpoint" if args["solver_type"] == "dpmsolver" else "exact",
        )
        if args["skip_type"] != "logSNR":
            solver = replace(solver, inner=place(args["skip_type"]))
        return solver
    if name == "diffusers_dpmsolver_singlestep" and args["solver_order"] > 1:
        return singlestep(
            args["solver_order"],
            form="noise" if args.get("algorithm_type") == "dpmsolver" else "data",
            second="midpoint" if args["solver_type"] == "midpoint" else "exact",
        )
    if name == "deis" and method != "rhork_1euler" and method.startswith("rhork"):
        return runge_kutta(method.removeprefix("rhork_"))
    if name == "flow_matching" and method != "euler":
        tables = {"midpoint": "midpoint", "heun2": "2heun", "heun3": "3heun", "rk4": "38"}
        return runge_kutta(tables[method], form="flow")
    if method == "flow_heun":
        return runge_kutta("2heun", form="flow")
    if method in ("heun", "edm_heun"):
        return runge_kutta("2heun")
    if method == "ablation_heun" and (args["schedule"], args["scaling"]) == ("linear", "none"):
        return runge_kutta({1.0: "2heun", 0.5: "midpoint"}[args["alpha"]])
    known = {
        "dpm_2": lambda: singlestep(2, form="noise", ratios=[args.get("r", 0.5)]),
        "dpmpp_2s": lambda: singlestep(2),
        "dpmpp_sde": lambda: singlestep(2),
        "dpm_fast": lambda: singlestep(3, form="noise"),
    }
    return known[method]() if method in known else None


def stages(case: dict, solver: Singlestep) -> Compiled:
    """Several evaluations per step."""
    name, args = implementation(case), arguments(case)
    to_zero = bool(args.get("denoise_to_zero"))
    steps = steps_of(case, to_zero)
    process, nodes = steps.process, steps.levels
    predicts, n = predicts_for(case, solver), len(nodes) - 1
    if name == "diffusers_dpmsolver_singlestep":
        return on_the_grid(case, solver)
    if name == "flow_matching":
        if case["method"] in ("heun2", "rk4"):
            return stage_at_zero(case, solver)
        draft = solver.lay(process, nodes, [solver.nfe_per_step] * n)
        return Compiled(process, finish(draft, predicts), predicts, "full step to sigma = 0")
    elsewhere = "dpm_solver" in name and args["skip_type"] != "logSNR"
    way = "inner states by hand" if elsewhere else "plan"
    return planned(process, solver, steps.times, predicts, case["nfe"], way)


def finish(draft: fs.Draft, predicts: str) -> fs.Plan:
    scalars = fs.predictions[predicts].scalars
    calls = [
        fs.Call(*map(float, scalars(level))) if asked else None
        for level, asked in zip(draft.levels, draft.evaluated, strict=True)
    ]
    return fs.Plan(draft.levels, draft.rows, tuple(calls))


def on_the_grid(case: dict, solver: Singlestep) -> Compiled:
    """diffusers takes its grid's own nodes as inner states. Its third order has another row for the
    second inner state if solver_type is "midpoint"."""
    args = arguments(case)
    lam, steps = stored(case["lam"]), steps_of(case)
    nodes = [*steps.levels, *steps.levels[-1:] * (len(lam) - len(steps.levels))]
    n, p = len(nodes) - 1, solver.nfe_per_step
    counts = [p] * (n // p)
    if args["lower_order_final"]:
        rest = {2: ([1, 1], [1]), 3: ([2, 1], [1], [2])}[p]
        counts = [p] * (n // p - (n % p == 0)) + rest[n % p]
    if math.isinf(lam[-1]) and counts[-1] > 1:
        counts[-1:] = [counts[-1] - 1, 1]
    if p == 3 and args["solver_type"] == "midpoint":
        two = singlestep(2, form=predicted_form(solver))

        def rows(process: fs.Process, levels: Sequence[fs.Level], end: fs.Level) -> list:
            out = list(solver.stages(process, levels, end))
            if len(levels) == 3:
                out[1] = two.stages(process, levels[:2], levels[2])[-1]
            return out

        used = replace(solver, stages=rows)
    else:
        used = solver
    outer, budget, inner = [nodes[0]], [], {}
    for i, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        if nodes[i + count].lam > nodes[i].lam:
            inner[nodes[i]] = [level.t for level in nodes[i + 1 : i + count]]
            outer.append(nodes[i + count])
            budget.append(count)
    used = replace(used, inner=lambda process, start, end, count: inner[start])
    predicts = predicts_for(case, solver)
    plan = finish(used.lay(steps.process, outer, budget), predicts)
    return Compiled(steps.process, plan, predicts, "inner states by hand")


def predicted_form(solver: Singlestep) -> str:
    return getattr(solver.stages, "form", "noise")


def stage_at_zero(case: dict, solver: Singlestep) -> Compiled:
    """Runge-Kutta in the time of a flow with a stage at sigma = 0. D = x there, so u = -x, and no
    evaluation is needed."""
    steps, table = steps_of(case), tableaus[{"heun2": "2heun", "rk4": "38"}[case["method"]]]
    process, tape = steps.process, Tape(steps.levels[0])
    for start, end in pairwise(steps.levels):
        h, x, slopes, places = end.t - start.t, tape.x, [], (0.0, *table.c)
        for row, c in zip((*table.a, table.b), (*places[1:], 1.0), strict=True):
            slopes.append(tape.ask_noise() - tape.ask() if tape.levels[-1].sigma else -1 * tape.x)
            value = x
            for weight, u in zip(row, slopes, strict=True):
                value = value + h * weight * u
            tape.make(value, process.level(end.t if c == 1 else start.t + c * h))
    return Compiled(process, tape.plan("flow"), "flow", "stage at sigma = 0 by hand")


def adams(case: dict) -> Compiled:
    """Adams steps in rho as written in diff-sampler: a first slope without evaluation (afs), or
    the numbers of ipndm_v, which are not those of variable-step Adams-Bashforth beyond order 2."""
    args, steps = arguments(case), steps_of(case)
    tape, slopes, rho = Tape(steps.levels[0]), [], [level.rho for level in steps.levels]
    for i, (start, end) in enumerate(pairwise(steps.levels)):
        if args.get("afs") and i == 0:
            slopes.append(tape.x / math.hypot(start.alpha, start.sigma))
        else:
            slopes.append(tape.ask_noise())
        order = min(args["max_order"], i + 1)
        if case["method"].startswith("ipndm_v"):
            numbers = shipped_adams(rho[i - order + 1 : i + 2])
        else:
            numbers = EQUAL_ADAMS[order]
        value = (end.alpha / start.alpha) * tape.x
        for c, e in zip(numbers, slopes[::-1], strict=False):
            value = value + end.alpha * (end.rho - start.rho) * c * e
        tape.make(value, end)
    predicts = predicts_for(case, None)
    way = "first slope by hand" if args.get("afs") else "numbers by hand"
    return Compiled(steps.process, tape.plan(predicts), predicts, way)


#: Adams-Bashforth for equal steps, newest first.
EQUAL_ADAMS = {
    1: (1.0,),
    2: (1.5, -0.5),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def shipped_adams(nodes: Sequence[float]) -> list[float]:
    """Numbers of ipndm_v of diff-sampler, newest first; nodes: oldest first, the target last."""
    h, *past = np.diff(nodes)[::-1]  # the step, and those before
    if not past:
        return [1.0]
    r = h / past[0]
    numbers = [1 + r / 2, -r / 2]
    if len(past) > 1:
        q = past[0] / past[1]
        # 1 - a b, where the method has (1 - a) b
        u = (1 - h / (3 * (h + past[0])) * h * (h + past[0]) / (past[0] * sum(past[:2]))) / 2
        numbers = [numbers[0] + u, numbers[1] - (1 + q) * u, q * u]
    if len(past) > 2:
        w = h + past[0]
        v = (1 - h / (3 * w)) / 2 + (1 - h / (2 * w)) * h / (6 * (w + past[1]))  # a sign is wrong
        v *= h * w * (w + past[1]) / (past[0] * sum(past[:2]) * sum(past))
        p = past[0] * sum(past[:2]) / (past[1] * sum(past[1:]))
        fourth = [1.0, -(1 + q + p), q + p * (1 + past[1] / past[2]), -p * q]
        numbers = [a + v * b for a, b in zip([*numbers, 0.0], fourth, strict=True)]
    return numbers


def plms(case: dict) -> Compiled:
    """PNDM of diffusers, with and without its Runge-Kutta steps. It lands at t - 1000 // n whatever
    the spacing of the times."""
    args, process = arguments(case), process_for(case, stored(case["lam"]))
    asked, ratio = [int(t) for t in stored(case["timesteps"])], 1000 // case["steps"]
    long = 0 if args["skip_prk_steps"] else 12
    tape, noises, kept = Tape(process.level(asked[0])), [], []

    def land(x: Terms, t: int, to: int, e: Terms) -> None:
        least = process.t_clean if args["set_alpha_to_one"] else 0.0
        start, end = process.level(t), process.level(to if to >= 0 else least)
        if start != end:
            value = (end.alpha / start.alpha) * x
            tape.make(value + end.alpha * (end.rho - start.rho) * e, end)

    for k, t in enumerate(asked):
        if k == len(asked) - 1 and t - ratio < 0 == t and not args["set_alpha_to_one"]:
            break  # from index 0 to index 0
        e = tape.ask_noise(process.level(t))
        if k < long:
            if k % 4 == 0:
                x, kept = tape.x, []
                noises.append(e)
            kept.append(e)
            mean = (kept[0] + 2 * kept[1] + 2 * kept[2] + e) / 6 if k % 4 == 3 else e
            land(x, asked[k // 4 * 4], t if k % 2 else t - ratio // 2, mean)
        elif k == 1 and not long:
            land(x, t + ratio, t, (e + noises[-1]) / 2)
        else:
            x = tape.x
            noises.append(e)
            order = min(len(noises), 4)
            mean = Terms()
            for c, noise in zip(EQUAL_ADAMS[order], noises[::-1], strict=False):
                mean = mean + c * noise
            land(x, t, t - ratio, mean)
    predicts = predicts_for(case, None)
    plan = tape.plan(predicts, True)
    if all(tape.levels[j] == level for j, level in tape.asked.items()):
        solver = pndm(4, 4 if long else 2, name="pndm")
        outer = asked[:long:4] + list(dict.fromkeys(asked[long:]))
        outer += [tape.levels[-1].t] * (tape.levels[-1].t != outer[-1])
        ours = planned(process, solver, outer, predicts)
        if ours.plan.levels == plan.levels:
            return ours
    return Compiled(process, plan, predicts, "landing elsewhere")


def compile_case(case: dict) -> Compiled:
    name, method, args = implementation(case), case["method"], arguments(case)
    if is_adaptive(case):
        found = adaptive(case)
    elif name == "diffusers_ddim":
        found = clipped_ddim(case) if args.get("clip_sample") else ddim(case)
    elif name == "diffusers_sasolver" and args["corrector_order"] != args["predictor_order"] + 1:
        found = sa_solver(case)
    elif "vary_coeff" in method and not method.startswith("unipc_1"):
        found = vary_coeff(case)
    elif method.startswith("ablation") and (args["schedule"], args["scaling"]) != (
        "linear",
        "none",
    ):
        found = ablation(case)
    elif name == "diffusers_pndm":
        found = plms(case)
    elif name == "dpm_solver_v3":
        steps = steps_of(case)
        found = planned(steps.process, solver_for(case), steps.times, "noise")
    elif args.get("afs") or (method.startswith("ipndm_v") and args["max_order"] > 2):
        found = adams(case)
    elif (solver := singlestep_for(case)) is not None:
        found = stages(case, solver)
    else:
        found = multistep(case)
    hook = threshold(case)
    return found if hook is None else replace(found, hook=hook)


def run(case: dict, compiled: Compiled) -> Tensor:
    """The final state on the exact network, in the coordinate of the stored one."""
    process, plan, model = compiled.process, compiled.plan, mixture(case["p"])
    coordinate, scale = golden()["args"][case["start"]]
    count = arrays()[f"{case['p']}_final"].shape[1]
    z = torch.from_numpy(arrays()[f"{case['p']}_z"])  # all: adaptive steps depend on the batch
    first, last = (
        (process.level(process.t_start), process.level(process.t_end))
        if plan is None
        else (plan.levels[0], plan.levels[-1])
    )
    x = scale * (first.alpha if coordinate == "ve" else math.hypot(first.alpha, first.sigma)) * z
    if plan is None:
        net, draw = model.denoiser(process, compiled.predicts), (0, 0, None, torch.float64)
        found = _sample(net, None, compiled.method, "min", None, draw, x, {}, None, False)
        attempts = int(found.accepted[0]), int(found.rejected[0])
        args = arguments(case)
        if "n_accept" in args:
            assert attempts == (args["n_accept"], args["n_reject"]), case["id"]
        assert sum(attempts) * args["order"] == case["nfe"], case["id"]
        x = found.x[:count]
    else:
        x = walk(case, compiled, plan.start(x[:count])).x
    return x / last.alpha if "y" in case else x


def walk(case: dict, compiled: Compiled, state: fs.State) -> fs.State:
    """The last state of a plan."""
    process, model = compiled.process, mixture(case["p"])
    known = {level.t: level for level in state.plan.levels}
    evals = stored(case["evals"]) if "evals" in case else None
    while not state.done:
        x_in, t_in = state.query()
        if evals is None:
            t = float(t_in[0])
            level = known[t] if t in known else process.level(t)
            alpha, sigma = level.alpha, level.sigma
        else:
            lam = evals[state.nfe]
            alpha, sigma = (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5
        data, noise = model.predict(x_in, alpha, sigma)
        output = {
            "data": data,
            "noise": noise,
            "flow": noise - data,
            "v": alpha * noise - sigma * data,
        }[compiled.predicts]
        state = state.advance(output, compiled.hook)
    return state


def deviation(case: dict, found: Tensor) -> tuple[float, float]:
    """(absolute, relative to max(1, max |x|)) largest distance from the official result."""
    wanted = torch.from_numpy(arrays()[f"{case['p']}_final"][case["row"]])
    worst = float((found - wanted).abs().max())
    return worst, worst / max(1.0, float(wanted.abs().max()))


def log_square_slope(process: fs.Process, t: np.ndarray) -> np.ndarray:
    """d log(alpha^2) / dt."""
    if isinstance(process, LinearTable):
        left = np.clip(np.floor(t), 0, 998).astype(int)
        return (process.table[left + 1] - process.table[left]) / process.square(t)
    if isinstance(process, fs.VP):
        return -(process.beta_min + (process.beta_max - process.beta_min) * t)
    first, slope = clock_of_diff_sampler()
    return -(first + slope * t)


def summed_weights(
    process: fs.Process, variable: str, nodes: Sequence[fs.Level], end: fs.Level, u: np.ndarray
) -> list[float]:
    """W_j = alpha_t int ell_j drho as a sum over the points u (0 to 1) of 10,000 cells."""
    start = nodes[0]
    if variable == "t":
        at = start.t * (1 - u) + end.t * u
        rho = process.sigma(at) / process.alpha(at)
        slope = -0.5 * log_square_slope(process, at) * (1 + rho**2) / rho
        width, places = end.t - start.t, [node.t for node in nodes]
    else:
        at = start.rho + (end.rho - start.rho) * u
        slope, width, places = np.ones_like(u), end.rho - start.rho, [node.rho for node in nodes]
    out = []
    for j, own in enumerate(places):
        basis = np.ones_like(u)
        for k, other in enumerate(places):
            if k != j:
                basis = basis * (at - other) / (own - other)
        out.append(float(end.alpha * np.sum(slope * basis) * width / 10000))
    return out


def with_sums(case: dict, compiled: Compiled) -> Compiled:
    """A case of DEIS with the official sums in place of exact integrals."""
    name, solver, levels, rows = implementation(case), solver_for(case), compiled.plan.levels, []
    points = np.arange(10000) / 10000 if name == "deis" else np.linspace(0.0, 1.0, 10000)
    for i, end in enumerate(levels[1:]):
        nodes = levels[max(0, i + 1 - solver.nodes) : i + 1][::-1]
        w = [end.alpha * (end.rho - nodes[0].rho)]
        if name == "deis" or i > 0:  # diff-sampler takes no sum for its first step
            w = summed_weights(compiled.process, solver.step.variable, nodes, end, points)
        a = {i - j: v / node.sigma for j, (v, node) in enumerate(zip(w, nodes, strict=True))}
        b = {i - j: -a[i - j] * node.alpha for j, node in enumerate(nodes)}
        a[i] += end.alpha / nodes[0].alpha
        rows.append(fs.Row(a, b, len(nodes), exact=False))
    return replace(compiled, plan=fs.Plan(levels, tuple(rows), compiled.plan.calls))


def same_method(one: fs.Plan, other: fs.Plan) -> bool:
    """Whether two plans are the same method, up to rounding."""
    if [level.t for level in one.evaluations] != [level.t for level in other.evaluations]:
        return False
    tables = one.canonical(), other.canonical()
    shapes = [[v.shape for v in part] for part in tables]
    return shapes[0] == shapes[1] and all(
        np.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*tables, strict=True)
    )


def family(solver: fs.Solver) -> tuple:
    """What two solvers of one method have in common."""
    if getattr(solver, "nodes", 0) == 1 and solver.corrector is None:
        return ("ddim",)  # in any form and variable
    step = getattr(solver, "step", getattr(solver, "stages", None))
    marks = [getattr(step, mark, None) for mark in ("form", "variable", "gamma", "beta")]
    corrected = getattr(solver, "corrector", None) is not None
    return (type(step), *marks, corrected, getattr(solver, "nodes", None), solver.nfe_per_step)


def names_for(compiled: Compiled) -> list[str]:
    """The registered solvers that do exactly what this case does, steps at the ends included."""
    found = []
    if compiled.solver is None:
        return found
    for name, solver in fs.solvers.items():
        if family(solver) != family(compiled.solver):
            continue
        try:
            nfe = compiled.plan.nfe
            own = planned(compiled.process, solver, compiled.grid, compiled.predicts, nfe).plan
        except ValueError as error:
            if not str(error).startswith("nfe"):  # so many cannot be spent on these times
                raise
            continue
        if same_method(own, compiled.plan):
            found.append(name)
    return found


def agreement(case: dict) -> tuple[list[str], float]:
    """(the registered solvers that a case is a case of, its deviation; DEIS: with its sums)."""
    compiled = compile_case(case)
    used = with_sums(case, compiled) if "quadrature" in case else compiled
    return names_for(compiled), deviation(case, run(case, used))[1]
