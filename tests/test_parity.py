"""Parity with official implementations: the same final states on exact Gaussian mixtures.

tests/golden holds results of the official implementations (names and versions in cases.json),
computed in float64 on two mixtures whose network is exact. Every case is run through the real loop
on the step boundaries that the official code used. Where official code deviates from its method,
the deviation is reproduced here, by giving every step its order or its rows by hand:

    orders      lowered near the end: dpm_solver below 10 steps, diffusers below 15, UniPC and the
                EDM copies always; to sigma = 0 always
    zero steps  diffusers repeats the last sigma in some settings; that step does nothing but, in a
                predictor-corrector method, call the network once more and correct the last state
    corrector   UniPC of diffusers can leave it out at some steps; the final step to sigma = 0 of
                denoise_to_zero starts from a state that is not corrected
    landing     diffusers DDIM lands on another time than it evaluates next (linspace spacing,
                trailing spacing that does not divide)
    rounding    diffusers may evaluate the network at a rounded time and step from the exact sigma
    sums        DEIS takes Riemann sums of 10,000 points for its integrals. Its cases run twice:
                with these sums in hand-made rows they agree as all others do; with our exact
                weights they differ by what the integrals differ by (recorded with the results)

`pytest tests/test_parity.py -n 0 -s` prints what is covered and what is not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep._solvers._base import Formula

GOLDEN = Path(__file__).parent / "golden"

#: Relative to max(1, max |x|). The codes round differently: official implementations of one method
#: agree among themselves to 1e-12, these runs with them to 3e-13.
LIMIT = 1e-10

#: Cases by implementation: (all that are run, those that a plain `fewstep.plan` covers). Numbers
#: may grow, never shrink: a skipped case is a failure.
COVERED = {
    "bdia": (7, 7),
    "dc_solver": (69, 69),
    "dc_solver_diffusers": (68, 31),
    "deis": (157, 157),
    "diff_solvers": (245, 245),
    "diffusers_ddim": (83, 55),
    "diffusers_deis_multistep": (185, 165),
    "diffusers_dpmsolver_multistep": (354, 331),
    "diffusers_dpmsolver_singlestep": (57, 57),
    "diffusers_edm_dpmsolver_multistep": (140, 132),
    "diffusers_edm_euler": (34, 34),
    "diffusers_euler_discrete": (67, 67),
    "diffusers_flow_match_euler_discrete": (84, 84),
    "diffusers_lms_discrete": (126, 126),
    "diffusers_sasolver": (59, 52),
    "diffusers_unipc_multistep": (364, 247),
    "dpm_solver": (235, 229),
    "edm_dpm_solver": (112, 98),
    "edm_unipc": (205, 205),
    "flow_matching": (15, 15),
    "k_diffusion": (210, 210),
    "nvlabs_edm": (24, 24),
    "unipc": (305, 300),
}


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


def process_for(case: dict, lam: Sequence[float]) -> fs.Process:
    name, args = implementation(case), golden()["args"][case["args"]]
    finite = [v for v in lam if math.isfinite(v)]
    if name == "diff_solvers" and case["method"].startswith("deis_tab"):
        return process_of_diff_sampler()
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
    args = golden()["args"][case["args"]]
    form, variable, second, third = "data", "lambda", "exact", "exact"
    order, corrector = 1, False
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


def predicts_for(case: dict, solver: fs.Multistep) -> str:
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
    corrected: Collection[int] = (),
) -> fs.Plan:
    """A plan whose step i has orders[i] and, if given, ends at landings[i] while the next begins
    at levels[i + 1]: such rows do not reproduce constant data and noise. The states at the levels
    in `corrected` are corrected, with the nodes of the step that ends there and their own."""
    rows, states, made = [], [levels[0]], [0]  # made: the state first made at each level
    called, start = {0}, 0

    def add(formula: Formula, seen: Sequence[int], newest: int, level: fs.Level) -> None:
        a, b = (dict(zip(seen, map(float, values), strict=True)) for values in formula[:2])
        if start != newest:
            share = a[newest] if formula.base is None else formula.base
            a[newest], a[start] = a[newest] - share, share
        a, b = ({j: c for j, c in terms.items() if c} for terms in (a, b))
        rows.append(fs.Row(a, b, formula.order, formula.exact and landings is None))
        states.append(level)
        called.update(b)

    for i, order in enumerate(orders):
        history, seen = levels[i - order + 1 : i + 1][::-1], made[i - order + 1 : i + 1][::-1]
        end = levels[i + 1] if landings is None else landings[i]
        add(solver.step(process, history, end), seen, made[i], levels[i + 1])
        made.append(len(rows))
        if i + 1 in corrected:
            add(solver.corrector(process, [end, *history], end), [made[-1], *seen], made[i], end)
        start = len(rows)
    calls = [
        fs.Call(*map(float, fs.predictions[predicts].scalars(v))) if j in called else None
        for j, v in enumerate(states)
    ]
    return fs.Plan(tuple(states), tuple(rows), tuple(calls), process.integer_times)


def compile_case(case: dict) -> tuple[fs.Process, fs.Plan, str, str]:
    """(process, plan, what the network predicts, how the plan was made)."""
    args = golden()["args"][case["args"]]
    lam = stored(case["lam"])
    process = process_for(case, lam)
    solver = solver_for(case)
    if implementation(case) == "diffusers_ddim":
        plan, way = ddim(case, process, solver)
        return process, plan, predicts_for(case, solver), way
    if case["method"] == "euler" and args.get("interpolation_type") == "log_linear":
        lam = lam[: case["steps"] + 1]  # its grid has a level more than it takes steps
    count = len(lam) - 1
    orders = lowered(case, solver.nodes, count)
    # The official code corrects at all inner levels, or fewer; seen from its own grid.
    corrected = set(range(1, count)) if solver.corrector else set()
    corrected -= {k + 1 for k in args.get("disable_corrector", ()) if corrected}
    if args.get("denoise_to_zero"):
        lam, orders, count = [*lam, math.inf], [*orders, 1], count + 1
    while lam[-1] - lam[-2] < 1e-12:  # a last sigma that is repeated, up to rounding
        lam, orders, count = lam[:-1], orders[:-1], count - 1
    times = stored(case["t"]) if "t" in case else process.time(np.array(lam)).tolist()
    times = [*times, process.t_clean][: count + 1]  # stored times lack an appended clean end
    if math.isinf(lam[-1]):
        times[-1] = process.t_clean
    # The inverse of lambda rounds; the ends of the range do not.
    times[0] = process.t_start if abs(times[0] - process.t_start) < 1e-9 else times[0]
    for i in (count - 1, count):
        near = abs(times[i] - process.t_end) < 1e-9 * max(1e-3, abs(process.t_end))
        times[i] = process.t_end if near else times[i]
    levels = [process.level(t) for t in times]
    predicts = predicts_for(case, solver)

    def seen(orders: Sequence[int]) -> list[int]:
        """Orders as they come out: to sigma = 0 some formulas have order 1 only."""
        first = math.isinf(lam[-1]) and solver.step.first_at_clean
        return [*orders[:-1], 1] if first else list(orders)

    inner = set(range(1, count)) if solver.corrector else set()
    for lower in (False, True):
        ours = [min(i + 1, solver.nodes, count - i if lower else count) for i in range(count)]
        if seen(ours) == seen(orders) and corrected == inner:
            ready = replace(solver, lower_final=lower)
            plan = fs.plan(ready, process, grid=times, predicts=predicts)
            return process, plan, predicts, "plan"
    plan = by_hand(process, solver, levels, orders, predicts, corrected=corrected)
    return process, plan, predicts, "orders by hand" if corrected == inner else "corrector by hand"


def ddim(case: dict, process: fs.DiscreteVP, solver: fs.Multistep) -> tuple[fs.Plan, str]:
    """diffusers DDIM lands at t - 1000 // n, whatever the spacing of the times."""
    args = golden()["args"][case["args"]]
    times = stored(case["timesteps"])
    landings = [t - 1000 // case["steps"] for t in times]
    last = process.t_clean if args["set_alpha_to_one"] else 0.0
    landings = [t if t >= 0 else last for t in landings]
    while landings[-1] == times[-1]:
        times, landings = times[:-1], landings[:-1]
    predicts = predicts_for(case, solver)
    if landings[:-1] == times[1:]:
        return fs.plan(solver, process, grid=[*times, last], predicts=predicts), "plan"
    levels = [process.level(t) for t in (*times, last)]
    ends = [process.level(t) for t in landings]
    orders = [1] * len(times)
    return by_hand(process, solver, levels, orders, predicts, ends), "landing elsewhere"


def run(case: dict, process: fs.Process, plan: fs.Plan, predicts: str) -> Tensor:
    """The final state of a plan on the exact network, in the coordinate of the stored one."""
    model = mixture(case["p"])
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
        }[predicts]
        state = state.advance(output)
    return state.x / last.alpha if "y" in case else state.x


def deviation(case: dict, found: Tensor) -> tuple[float, float]:
    """(absolute, relative to max(1, max |x|)) largest distance from the official result."""
    wanted = torch.from_numpy(arrays()[f"{case['p']}_final"][case["row"]])
    worst = float((found - wanted).abs().max())
    return worst, worst / max(1.0, float(wanted.abs().max()))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny: more threads only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cases_of(name: str) -> list[dict]:
    return [case for case in golden()["cases"] if implementation(case) == name]


@pytest.mark.parametrize("problem", ["G1", "G2"])
def test_network_is_the_one_of_the_results(problem):
    x, levels, data, noise = (
        torch.from_numpy(arrays()[f"{problem}_check_{key}"])
        for key in ("x", "alpha_sigma", "D", "eps")
    )
    found = mixture(problem).predict(x, levels[:, 0], levels[:, 1])
    for ours, theirs in zip(found, (data, noise), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-12


@pytest.mark.parametrize("name", COVERED)
def test_final_states(name, record_property):
    """Every case of one implementation, within LIMIT (DEIS: within what its sums miss)."""
    failures, ways, methods, worst = [], Counter(), Counter(), 0.0
    for case in cases_of(name):
        process, plan, predicts, way = compile_case(case)
        absolute, relative = deviation(case, run(case, process, plan, predicts))
        excess = relative
        if "quadrature" in case:
            excess = absolute - case["quadrature"]
            relative = 0.0
        if not excess < LIMIT:
            failures.append(f"{case['id']} {case['method']}: {excess:.3g} {case['steps']} steps")
        worst = max(worst, relative)
        ways[way] += 1
        methods[case["method"]] += 1
    summary = (
        f"{name}: {ways.total()} cases ({', '.join(f'{n} {way}' for way, n in ways.items())}), "
        f"largest deviation {worst:.1e}; {', '.join(f'{m} {n}' for m, n in methods.items())}"
    )
    print(f"\n{summary}")
    record_property("covered", summary)
    assert not failures, f"{summary}\n" + "\n".join(failures)
    reached = (ways.total(), ways["plan"])
    expected = COVERED[name]
    assert reached[0] >= expected[0], f"covers fewer cases than {expected}: {summary}"
    assert reached[1] >= expected[1], f"covers fewer cases than {expected}: {summary}"


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_by_name(variant):
    """The names stand for the solvers that were compared."""
    for order in (1, 2, 3):
        named = fs.solvers[f"unipc_{order}" + "_bh1" * (variant == "bh1")]
        method = f"unipc_{order}_{variant}_data_prediction"
        case = next(case for case in cases_of("unipc") if case["method"] == method)
        plans = [
            fs.plan(solver, fs.VP(), 7)
            for solver in (named, replace(solver_for(case), lower_final=True))
        ]
        assert plans[0] == plans[1], method


def test_every_result_is_accounted_for(record_property):
    """Run or left out for a stated reason: the numbers add up, and nothing is lost on the way."""
    lines, reasons = [], Counter()
    for name, entry in golden()["implementations"].items():
        count, out = len(cases_of(name)), entry["left_out"]
        assert count + sum(out.values()) == entry["cases"], f"{name}: {count} + {out}"
        assert count == COVERED.get(name, (0, 0))[0], f"{name}: {count} cases are stored"
        reasons.update(out)
        why = "; ".join(f"{n} {reason}" for reason, n in out.items())
        lines.append(f"{name}: {count} of {entry['cases']}{' - not: ' + why if why else ''}")
    total = sum(entry["cases"] for entry in golden()["implementations"].values())
    lines.append(f"covered: {len(golden()['cases'])} of {total}; not covered, by reason:")
    lines += [f"    {n:5d} {reason}" for reason, n in reasons.most_common()]
    print("\n" + "\n".join(lines))
    record_property("covered", "\n".join(lines))


#: Sum points that fall exactly on an integer time, where the slope of alpha^2 jumps: rounding of
#: the point decides which side counts, and on this grid (steps of 945 - 999, 888 - 945, ...) one or
#: two of the 200,000 points come out differently. One point is worth up to 1e-7.
TIES = {"deis-00377": 2e-7, "deis-00379": 2e-7}


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


@pytest.mark.parametrize("name", ["deis", "diff_solvers"])
def test_sums_of_deis(name, record_property):
    """With the official sums in place of exact integrals, DEIS agrees as everything else does; and
    sums over the midpoints of the same cells, which are accurate, agree with our weights."""
    cells = np.arange(10000) / 10000
    points = cells if name == "deis" else np.linspace(0.0, 1.0, 10000)
    worst = {"result": 0.0, "rho": 0.0, "t": 0.0}
    failures, count = [], 0
    for case in cases_of(name):
        if "quadrature" not in case:
            continue
        count += 1
        process, plan, predicts, _ = compile_case(case)
        solver, rows = solver_for(case), []
        for i, end in enumerate(plan.levels[1:]):
            nodes = plan.levels[max(0, i + 1 - solver.nodes) : i + 1][::-1]
            variable = solver.step.variable
            exact = fs.weights("noise", variable, nodes[0], end, nodes, process)
            middle = summed_weights(process, variable, nodes, end, cells + 0.5e-4)
            miss = np.abs(exact - middle).max() / np.abs(exact).max()
            worst[variable] = max(worst[variable], miss)
            # diff-sampler takes no sum for its first step
            summed = name == "deis" or i > 0
            w = summed_weights(process, variable, nodes, end, points) if summed else exact
            a = {i - j: v / node.sigma for j, (v, node) in enumerate(zip(w, nodes, strict=True))}
            b = {i - j: -a[i - j] * node.alpha for j, node in enumerate(nodes)}
            a[i] += end.alpha / nodes[0].alpha
            rows.append(fs.Row(a, b, len(nodes), exact=False))
        plan = fs.Plan(plan.levels, tuple(rows), plan.calls)
        relative = deviation(case, run(case, process, plan, predicts))[1]
        if not relative < TIES.get(case["id"], LIMIT):
            failures.append(f"{case['id']} {case['method']}: {relative:.3g}")
        if case["id"] not in TIES:
            worst["result"] = max(worst["result"], relative)
    summary = f"{name}: {count} cases with official sums, {worst}"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert not failures, f"{summary}\n" + "\n".join(failures)
    assert count >= {"deis": 131, "diff_solvers": 21}[name], summary
    # Midpoint sums err by the square of a cell: 1e-8 of the step's curvature, which is large for
    # the last uniform-t step of VP; on a table each of the kinks adds half a cell's slope jump.
    assert worst["rho"] < 1e-8, summary
    assert worst["t"] < 1e-5, summary


#: Official names of our grids.
GRIDS = {
    "logSNR": "lambda",
    "time_uniform": "uniform",
    "time_quadratic": "quadratic",
    "edm": "karras",
    "polynomial": "karras",
    "logsnr": "lambda",
    "karras": "karras",
    "exponential": "exponential",
    "vp": "uniform",
}


def laid_out(case: dict) -> tuple[str, fs.Process, str, list[float], list[float]] | None:
    """(our grid, process, final, its lambdas, the official ones), or None where the official
    generator is another one: sigmas of flow models, beta quantiles in sigma, log-linear sigmas."""
    name, args = implementation(case), golden()["args"][case["args"]]
    lam, count, final = stored(case["lam"]), case["steps"], "min"
    process = None if case["process"] == "flow" else process_for(case, lam)
    whole = True
    if name in ("dpm_solver", "edm_dpm_solver", "dc_solver", "edm_unipc", "unipc"):
        grid, count = GRIDS[args["skip_type"]], len(lam) - 1
    elif name == "deis":
        phases = {("t", 1): "uniform", ("t", 2): "quadratic", ("log", 1): "lambda"}
        grid = phases.get((args["ts_phase"], args["ts_order"]), "karras")
        t = np.array(stored(case["t"]))
        if grid in ("lambda", "karras") and bool((t == np.round(t)).all()):
            return None  # moved to integers, because rounding would have made duplicates
    elif name == "diff_solvers":
        grid = GRIDS[args["schedule_type"]]
        process = process_of_diff_sampler() if grid == "uniform" else process
    elif name == "k_diffusion" and "sigmas" in args:
        grid = GRIDS[args["sigmas"]]
        if args["final_zero"]:
            # Uniform VP time ends at t_end and jumps to 0; our "uniform" would run on to 0.
            lam, count, final = (
                (lam[:-1], count - 1, "min") if grid == "uniform" else (lam, count, "zero")
            )
    elif name == "flow_matching":
        grid, process, final = "uniform", fs.Flow(shift=args["shift"]), "zero"
    elif name == "nvlabs_edm" and args["discretization"] == "edm":
        grid, final = "karras", "zero"
    elif name.startswith("diffusers") and case["process"] != "flow":
        # N sigmas down to the least; what follows is 0 or, if so configured, the least again.
        grid = args.get("sigma_schedule")
        for key, known in (
            ("karras_sigmas", "karras"),
            ("exponential_sigmas", "exponential"),
            ("lu_lambdas", "lambda"),
        ):
            grid = known if args.get(f"use_{key}") else grid
        final, whole = "zero", False
        if grid is None:
            return None
    else:
        return None
    if isinstance(process, fs.EDM):
        high, low = (float(np.exp(-v)) for v in (lam[0], max(v for v in lam if math.isfinite(v))))
        process = fs.EDM(low, high)
    ours = [v.lam for v in fs.plan("ddim", process, count, grid=grid, final=final).levels]
    return grid, process, final, ours[: None if whole else count], lam[: None if whole else count]


def test_time_grids(record_property):
    """Our grids are the official ones, where the same generator exists."""
    seen, covered, worst, failures = set(), Counter(), 0.0, []
    for case in golden()["cases"]:
        found = laid_out(case)
        if found is None:
            continue
        grid, process, final, ours, theirs = found
        key = (implementation(case), case["lam"], grid, final)
        if key in seen:
            continue
        seen.add(key)
        ours, theirs = np.array(ours), np.array(theirs)
        finite = np.isfinite(theirs)
        good = len(ours) == len(theirs) and bool((finite == np.isfinite(ours)).all())
        gap = float(np.abs(ours[finite] - theirs[finite]).max()) if good else math.inf
        worst = max(worst, gap)
        if not gap < 1e-9:
            failures.append(f"{case['id']} {grid} {final} {process}: {gap:.3g}\n{ours}\n{theirs}")
        covered[f"{implementation(case)}/{case['process']}/{grid}"] += 1
    summary = f"{covered.total()} grids, largest difference of lambda {worst:.1e}: {dict(covered)}"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert not failures, "\n".join(failures)
    assert covered.total() >= 432, summary


def test_integer_spacings(record_property):
    """leading, linspace and trailing as in diffusers; its steps_offset shifts leading by one."""
    process = fs.DiscreteVP.scaled_linear()
    zero, least = set(), set()
    for case in golden()["cases"]:
        name, args = implementation(case), golden()["args"][case["args"]]
        spacing = args.get("timestep_spacing", "linspace")
        offset = args.get("steps_offset", 0) if spacing == "leading" else 0
        key = (spacing, offset, case["steps"])
        if name == "diffusers_ddim":
            ours = fs.plan("ddim", process, case["steps"], grid=spacing).times[:-1]
            assert ours.tolist() == [t - offset for t in stored(case["timesteps"])], case["id"]
            zero.add(key)
        elif name in ("diffusers_dpmsolver_multistep", "diffusers_deis_multistep"):
            other = case["process"] == "flow" or any(k.startswith("use_") for k in args)
            least_end = "deis" in name or args.get("final_sigmas_type") == "sigma_min"
            if other or not least_end:
                continue
            ours = fs.plan("ddim", process, case["steps"], grid=spacing, final="min").times
            theirs = process.time(np.array(stored(case["lam"])))
            theirs[:-1] -= offset
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8, err_msg=case["id"])
            least.add(key)
    summary = f"{len(zero)} grids to sigma = 0, {len(least)} to the least sigma"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert len(zero) >= 24, summary
    assert len(least) >= 18, summary


ROWS = json.loads((GOLDEN / "rows.json").read_text())


@pytest.mark.parametrize("path", ROWS)
def test_rows(path):
    """Single rows and weights, derived apart from this package, as listed in rows.json."""
    entry = ROWS[path]
    process = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow()}[path]
    past = [process.level(t) for t in reversed(entry["times"])]
    end = process.level(entry["target"])
    for name, row in entry["rows"].items():
        kind, form, variable = (*name.split(), "lambda")[:3]
        form = {"eps": "noise"}.get(form, form)
        if kind.startswith("unic"):  # nodes: start, end, older
            nodes = [past[0], end, *past[1:]][: len(row["W"])]
            found = fs.weights(form, variable, past[0], end, nodes, process)
            np.testing.assert_allclose(found, row["W"], rtol=1e-9, atol=1e-9, err_msg=name)
            continue
        count, c = len(row["b"]), 1.0
        if kind.startswith("angle"):
            # The angle form of data of scale c: alpha is c alpha, D is D / c.
            c = float(form)
            form, variable = "v", "own"
        options = {"two_midpoint": {"second": "midpoint"}, "three_shipped": {"third": "shipped"}}
        solver = fs.exponential(
            count, form=form, variable=variable, growth=math.inf, **options.get(kind, {})
        )
        levels = [
            fs.Level(v.t, c * v.alpha, v.sigma, v.lam + math.log(c)) for v in (*past[:count], end)
        ]
        a, b, *_ = solver.step(process, levels[:-1], levels[-1])
        np.testing.assert_allclose(a, row["a"], rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(np.array(b) / c, row["b"], rtol=1e-9, atol=1e-9, err_msg=name)
