"""Cases of tests/golden/stochastic.* as runs of this package, with the recorded noise.

As `official` for deterministic solvers: `compile_case` gives the plan of a case, `run` its states.
Where a solver of the package does what the official code does, the plan is `fewstep.plan` on the
official step boundaries; where official code deviates, its update is written down here as it
stands, with a `NoisyTape`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from fewstep._langevin import langevin
from fewstep._noise import Draw
from fewstep._solvers._noisy import churn
from fewstep._solvers._seeds import ancestral_singlestep, dpmpp_sde
from fewstep._solvers._stochastic import ancestral, er_sde, jump, sa_solver, sde
from official import GOLDEN, Tape, Terms, mixture


@cache
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "stochastic.json").read_text())


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "stochastic.npz") as file:
        return {key: file[key] for key in file.files}


def stored(i: int) -> tuple[float, ...]:
    values = arrays()["lists"][i]
    return tuple(values[~np.isnan(values)].tolist())


def implementation(case: dict) -> str:
    """Code, and class or function."""
    return f"{case['code']} {case['name'].removesuffix('Scheduler').removeprefix('sample_')}"


class NoisyTape(Tape):
    """A tape whose rows may draw noise: terms ("Z", m)."""

    def __init__(self, start: fs.Level) -> None:
        super().__init__(start)
        self.draws: list[Draw] = []

    def draw(self, end: fs.Level, start: fs.Level | None = None) -> Terms:
        """A standard normal for the step from the newest state (or start) to a level."""
        self.draws.append(Draw(start or self.levels[-1], end, None, len(self.draws)))
        return Terms({("Z", len(self.draws) - 1): 1.0})

    def make(self, value: Terms, level: fs.Level, order: int = 1, exact: bool = False) -> Terms:
        a, b, e = ({j: c for (k, j), c in value.items() if k == kind and c} for kind in "xDZ")
        self.rows.append(fs.Row(a, b, order, exact, e))
        self.levels.append(level)
        return self.x

    def plan(self, predicts: str = "data", integer_times: bool = False) -> fs.Plan:
        calls = []
        for j, level in enumerate(self.levels):
            at = self.asked.get(j)
            numbers = () if at is None else fs.predictions[predicts].scalars(at)
            calls.append(None if at is None else fs.Call(*numbers, None if at == level else at))
        rows, draws = tuple(self.rows), tuple(self.draws)
        return fs.Plan(tuple(self.levels), rows, tuple(calls), integer_times, draws=draws)


@dataclass(frozen=True)
class Compiled:
    """A case, ready to run. way: "plan" if a solver of the package does it all, else what was done
    by hand. noise: scale of the draws (S_noise)."""

    plan: fs.Plan
    way: str
    solver: fs.Solver | None = None
    noise: float = 1.0


def levels_of(case: dict) -> tuple[fs.Process, tuple[fs.Level, ...]]:
    """The process of a case and the levels at its step boundaries."""
    coordinates, values = case["coordinates"], np.array(stored(case["lam"]))
    finite = values[np.isfinite(values)]
    process: fs.Process
    if coordinates == "ve":
        high = math.exp(-finite.min()) * (2 if "s_churn" in case["settings"] else 1)
        process = fs.EDM(math.exp(-finite.max()), high)
    elif coordinates == "linear":
        process = fs.VP(t_end=0.01)
    elif coordinates == "flow":
        process = fs.Flow(t_end=float(fs.Flow().time(finite.max())))
    else:
        integers = case["name"] == "TCDScheduler"
        process = replace(fs.DiscreteVP.scaled_linear(), integer_times=integers)
    times = [float(process.time(v)) for v in values]
    if coordinates == "vp":  # rounding must not leave the table, or the integers
        times = [float(round(t)) if abs(t - round(t)) < 1e-9 else t for t in times]
    return process, tuple(process.level(t) for t in times)


def places(case: dict, plan: fs.Plan) -> list[tuple[int, int]]:
    """(step, how many draws of that step were before) for every draw of a plan."""
    lam = np.array(stored(case["lam"]))[:-1]
    taken = [case["settings"].get("corrections", 0)] * len(lam)
    out = []
    for draw in plan.draws:
        step = int(np.flatnonzero(lam <= draw.start.lam + 1e-9)[-1])
        out.append((step, taken[step]))
        taken[step] += 1
    return out


def run(case: dict, compiled: Compiled, checked: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The last state, and the states that the network is asked about. checked: at the levels that
    the official code asks at."""
    plan, model = compiled.plan, mixture("G1")
    first, evals = plan.levels[0], stored(case["evals"])
    bank = torch.from_numpy(arrays()["bank"]) * compiled.noise
    z = torch.from_numpy(arrays()["z"])
    draws = [bank[place] for place in places(case, plan)]
    if case["name"] in ("sample_dpmpp_sde", "DPMSolverSDEScheduler"):
        draws = segments(plan, draws)
    x = z * (first.rho if case["coordinates"] == "ve" else 1.0)
    state = plan.start(x, noise=draws) if draws else plan.start(x)
    denoiser = model.denoiser(fs.EDM(plan.levels[-2].sigma, first.sigma), "data")
    asked: list[Tensor] = []
    while not state.done:
        level = plan.asked(state.index)
        step = len(asked) // (1 + case["settings"].get("corrections", 0))
        for k in range(case["settings"].get("corrections", 0)):
            asked.append(state.x)
            noise = functools.partial(_given, bank[step, k])
            state = langevin(denoiser, state, snr=0.16, norms="batch", noise=noise)
        if checked:
            wanted = evals[len(asked)]
            assert level.lam == wanted or abs(level.lam - wanted) < 1e-8, (case, level, wanted)
        asked.append(state.x)
        state = state.advance(model.predict(state.x, level.alpha, level.sigma)[0])
    assert not checked or len(asked) == len(evals)
    return state.x, asked


def segments(plan: fs.Plan, draws: list[Tensor]) -> list[Tensor]:
    """k-diffusion draws noise from s to m and from s to t, on one path that is Brownian in rho;
    here it is from s to m and from m to t."""
    out = []
    for (first, second), (sm, st) in zip(pairs(plan.draws), pairs(draws), strict=True):
        s, m, t = first.start.rho, first.end.rho, second.end.rho
        mt = (math.sqrt(s - t) * st - math.sqrt(s - m) * sm) / math.sqrt(m - t)
        out += [sm, mt]
    return out


def pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _given(z: Tensor, draw: Draw, like: Tensor) -> Tensor:
    return z


def deviation(case: dict, compiled: Compiled) -> float:
    """Largest distance from the official states, relative to max(1, max |x|)."""
    final, asked = run(case, compiled)
    wanted = [arrays()["final"][case["row"]]]
    found = [final]
    if "asked" in case:
        i = case["asked"]
        wanted += list(arrays()["asked"][i : i + len(asked)])
        found += asked
    return max(
        float(np.abs(a.numpy() - b).max()) / max(1.0, float(np.abs(b).max()))
        for a, b in zip(found, wanted, strict=True)
    )


# What official code does and no solver here.


def noise_of(x: Terms, D: Terms, level: fs.Level) -> Terms:
    return (x - level.alpha * D) / level.sigma


def by_hand(case: dict, levels: Sequence[fs.Level], process: fs.Process) -> fs.Plan:
    """Rows of official code as it stands, step by step."""
    tape, update = NoisyTape(levels[0]), UPDATES[case["name"]]
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        update(case, tape, s, t, i + 2 == len(levels), process)
    return tape.plan()


def churned(case: dict, tape: NoisyTape, s: fs.Level, t: fs.Level, last: bool, _: object) -> None:
    """Churn of diffusers: the network is asked before the noise is added, so that nothing removes
    it: x + sqrt(sigma_hat^2 - sigma^2) z + (sigma_t - sigma_hat) eps(x, sigma)."""
    settings = case["settings"]
    inside = settings.get("s_tmin", 0.0) <= s.sigma <= settings.get("s_tmax", math.inf)
    gamma = min(settings["s_churn"] / case["steps"], math.sqrt(2) - 1) * inside
    x, hat = tape.x, s.sigma * (1 + gamma)
    D = tape.ask()
    z = math.sqrt(hat**2 - s.sigma**2) * tape.draw(t) if gamma else Terms()
    if case["name"] == "EDMEulerScheduler":
        # the answer F = (D - c_skip x) / c_out belongs to sigma; it is read as that of sigma_hat
        def scalings(sigma: float) -> tuple[float, float]:
            return 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.hypot(sigma, 0.5)

        (skip, out), (skip_hat, out_hat) = scalings(s.sigma), scalings(hat)
        answer = (D - skip * x) / out
        D_hat = skip_hat * (x + z) + out_hat * answer
        eps = (x + z - D_hat) / hat
    else:
        eps = noise_of(x, D, s)
    tape.make(x + z + (t.sigma - hat) * eps, t)


def posterior(case: dict, tape: NoisyTape, s: fs.Level, t: fs.Level, last: bool, _: object) -> None:
    """DDPM of diffusers where the last time is not 0: noise is added to the sample itself, of
    variance beta ("fixed_large") or 1e-20, the floor of the other."""
    x, D, h = tape.x, tape.ask(), t.lam - s.lam
    shrink = math.exp(-2 * h)
    large = case["settings"]["variance_type"] == "fixed_large"
    v = (s.sigma if large else max(t.sigma, 1e-10)) * math.sqrt(1 - shrink)
    mean = t.alpha * (1 - shrink) * D + (t.sigma / s.sigma * math.exp(-h)) * x
    tape.make(mean + v * tape.draw(t), t)


def boundary(case: dict, tape: NoisyTape, s: fs.Level, t: fs.Level, last: bool, _: object) -> None:
    """LCM of diffusers: the sample at the end of the trajectory is c_skip x + c_out D."""
    scaled = s.t * case["settings"]["timestep_scaling"]
    x, D = tape.x, tape.ask()
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    value = t.alpha * (skip * x + out * D)
    tape.make(value if last else value + t.sigma * tape.draw(t), t)


def fast(
    case: dict, tape: NoisyTape, s: fs.Level, t: fs.Level, last: bool, process: fs.Process
) -> None:
    """dpm_fast: a step of DPM-Solver to a cleaner level, not beyond the end, and noise up to t."""
    n, done, eta = case["steps"], len(tape.asked), case["settings"]["eta"]
    count = n - done if last else 2 if (n - done) == 3 else 3
    end = math.exp(-max(stored(case["lam"])))
    up = min(t.sigma, eta * t.sigma * math.sqrt(1 - (t.sigma / s.sigma) ** 2))
    down = process.level(max(end, math.sqrt(t.sigma**2 - up**2)))
    solver = fs.solvers["dpm_solver_3" if count == 3 else "dpm_solver_2"]
    inner, formulas = solver.step(process, s, down, count)
    x, D = [tape.x], [tape.ask()]
    for level, formula in zip((*inner, down), formulas, strict=True):
        value = Terms()
        for terms, numbers in ((x, formula.a), (D, formula.b)):
            for term, c in zip(terms, numbers, strict=True):
                value = value + c * term
        if len(x) == count:
            value = value + math.sqrt(t.sigma**2 - down.sigma**2) * tape.draw(t, s)
            tape.make(value, t)
        else:
            x, D = [*x, tape.make(value, level)], [*D, tape.ask()]


UPDATES: dict[str, Callable[..., None]] = {
    "DDPMScheduler": posterior,
    "EDMEulerScheduler": churned,
    "EulerDiscreteScheduler": churned,
    "LCMScheduler": boundary,
    "sample_dpm_fast": fast,
}


# Which solver a case is.


def chosen(
    solver: fs.Multistep, pick: Callable[[fs.Level, fs.Level], fs.Multistep]
) -> fs.Multistep:
    """A solver whose steps and corrections are those of pick(start, end)."""

    def step(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        return pick(nodes[0], end).step(process, nodes, end)

    def corrector(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        return pick(nodes[1], end).corrector(process, nodes, end)

    return replace(solver, step=step, corrector=solver.corrector and corrector)


def limited(solver: fs.Multistep, ends: Sequence[fs.Level], orders: Sequence[int]) -> fs.Multistep:
    """A solver whose step to ends[i] uses orders[i] nodes at most."""
    known = {end.t: order for end, order in zip(ends, orders, strict=True)}

    def step(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        formula = solver.step(process, nodes[: known[end.t]], end)
        rest = [0.0] * (len(nodes) - len(formula.a))
        return formula._replace(a=[*formula.a, *rest], b=[*formula.b, *rest])

    return replace(solver, step=step)


def sign_error(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
    """Third-order sde-dpmsolver++ of diffusers: -1/2 where the second difference has +1/2."""
    right = sde(3, third="shipped", growth=math.inf).step(process, nodes, end)
    if len(nodes) < 3 or end.sigma == 0:
        return right
    h, before, earlier = (a.lam - b.lam for a, b in zip((end, *nodes[:2]), nodes, strict=True))
    r, q = before / h, earlier / h
    b = np.array(right.b)
    b += -end.alpha * np.array([1 / r, -1 / r - 1 / q, 1 / q]) / (r + q)
    return right._replace(b=b.tolist())


def implicit(tau: float) -> fs.Multistep:
    """SA-Solver with corrector_order = 1 and one predicting node: D of the new state alone."""
    solver = sa_solver(1, 2, eta2=tau**2, second="bh1")

    def corrector(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        formula = solver.step(process, nodes[1:], end)
        return formula._replace(a=[0.0, *formula.a], b=[*formula.b[::-1], 0.0], base=formula.a[0])

    return replace(solver, corrector=corrector)


def in_noise(p: int, c: int, tau: float) -> fs.Multistep:
    """SA-Solver with algorithm_type = "noise_prediction": predictor and corrector in noise form."""
    solver = sde(p, eta2=tau**2, form="noise", growth=math.inf, lower_final=True)

    def step(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        base = end.alpha / nodes[0].alpha
        return solver.step(process, nodes, end)._replace(base=base, exact=False)

    def corrector(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        start, nodes = nodes[1], nodes[:c]
        W = (1 + tau**2) * fs.weights("noise", "lambda", start, end, nodes, process)
        a = [w / node.sigma for w, node in zip(W, nodes, strict=True)]
        b = [-w * node.alpha / node.sigma for w, node in zip(W, nodes, strict=True)]
        base = end.alpha / start.alpha
        a[1] += base
        noise = solver.step(process, [start], end).noise
        return fs.Formula(a, b, 2, False, base, noise)

    return replace(solver, nodes=max(p, c - 1), step=step, corrector=corrector)


def lowered(case: dict, order: int) -> list[int]:
    """The orders of the steps of diffusers' DPM solvers."""
    n = case["steps"]
    orders = [min(i + 1, order) for i in range(n)]
    if n < 15:
        orders[-1], orders[-2] = 1, min(orders[-2], 2)
    return orders


#: k-diffusion's samplers with churn, and its defaults.
CHURNED = {"sample_euler": "ddim", "sample_heun": "heun", "sample_dpm_2": "dpm_solver_2"}
CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


#: Noise scales phi of ER-SDE: function of rho, and what `er_sde` is told.
SCALES: dict[str, tuple[Callable[[Any], Any], float | None]] = {
    "default": (lambda rho: rho * (np.exp(rho**0.3) + 10), None),
    "rho": (lambda rho: rho, 1.0),
    "rho^1.5": (lambda rho: rho**1.5, 1.5),
    "rho^2": (lambda rho: rho**2, 2.0),
    "rho^2.5": (lambda rho: rho**2.5, 2.5),
}


def rectangles(order: int, scale: str) -> fs.Multistep:
    """ER-SDE as its code has it: integrals are sums over 100 points, from the left."""
    phi, exponent = SCALES[scale]
    first = er_sde(1, phi=exponent)

    def step(process: fs.Process, nodes: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        formula, rest = first.step(process, nodes[:1], end), [0.0] * (len(nodes) - 1)
        b = np.array([*formula.b, *rest])
        if len(nodes) > 1 and end.sigma > 0:
            s, t = nodes[0].rho, end.rho
            at, width = t + np.arange(100) / 100 * (s - t), (s - t) / 100
            rows = np.eye(len(nodes))
            slope = (rows[0] - rows[1]) / (s - nodes[1].rho)
            b += end.alpha * (t - s + phi(t) * np.sum(width / phi(at))) * slope
            if len(nodes) > 2:
                before = (rows[1] - rows[2]) / (nodes[1].rho - nodes[2].rho)
                second = 2 * (slope - before) / (s - nodes[2].rho)
                moment = phi(t) * np.sum(width * (at - s) / phi(at))
                b += end.alpha * (0.5 * (t - s) ** 2 + moment) * second
        return formula._replace(a=[*formula.a, *rest], b=b.tolist())

    return replace(first, step=step, nodes=order)


def windowed(made: Callable[[float], fs.Multistep], tau: str, way: str) -> tuple[fs.Multistep, str]:
    """tau of a step is that of its start in diffusers (in the official code, of its end)."""
    if tau != "window":
        return made(float(tau)), way
    on, off = made(1.0), made(0.0)
    return chosen(on, lambda s, t: on if 200 <= s.t <= 800 else off), "window by hand"


def solver_for(case: dict, levels: Sequence[fs.Level]) -> tuple[fs.Solver | None, str]:
    """(solver, way); None if no solver of the package does this."""
    name, settings, inf = case["name"], case["settings"], math.inf
    eta = settings.get("eta", 1.0)
    kind = "midpoint" if settings.get("solver_type", "midpoint") == "midpoint" else "exact"
    if name in ("sample_euler_ancestral", "EulerAncestralDiscreteScheduler", "DDIMScheduler"):
        return ancestral(eta), "plan"
    if name == "er_sde":
        order, scale = settings["order"], settings["phi"]
        if settings["points"] == 100 and order > 1:
            return rectangles(order, scale), "sums by hand"
        third = "uncorrected" if order == 3 else "exact"
        return er_sde(order, phi=SCALES[scale][1], third=third), "plan"
    if name == "sample_few_steps":
        p, c, tau = (settings[k] for k in ("predictor_order", "corrector_order", "tau"))
        on, off = (sa_solver(p, c, eta2=e, second="bh1") for e in (1.0, 0.0))
        last, inside = levels[-1].t, ((0.2, 0.8) if tau == "window" else (0.0, 1.0))

        def pick(s: fs.Level, t: fs.Level) -> fs.Multistep:
            return on if t.t != last and inside[0] <= t.t <= inside[1] else off

        return chosen(on, pick), "last step by hand"
    if name == "ScoreSdeVeScheduler":
        # "reverse diffusion": the noise of the forward step
        return ancestral(variance=lambda s, t: math.sqrt(s.rho**2 - t.rho**2)), "plan"
    if name == "DDPMScheduler" and settings["timestep_spacing"] == "trailing":
        return None, "noise on the sample by hand"
    if name == "DDPMScheduler":
        large = settings["variance_type"] == "fixed_large"
        return ancestral(variance="large" if large else "small"), "plan"
    if name in ("sample_dpmpp_sde", "DPMSolverSDEScheduler"):
        return dpmpp_sde(eta, settings.get("r", 0.5)), "plan"
    if name == "sample_dpmpp_2s_ancestral":
        return ancestral_singlestep("dpmpp_2s", eta), "plan"
    if name in ("sample_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"):
        return ancestral_singlestep("dpm_solver_2", eta), "plan"
    if name in CHURNED:
        given = {key: settings.get(key, value) for key, value in CHURN.items()}
        return churn(CHURNED[name], **{k.replace("_t", "_"): v for k, v in given.items()}), "plan"
    if name == "sample_dpmpp_2m_sde":
        return sde(2, eta2=eta, second=kind, growth=inf), "plan"
    if name == "sample_dpmpp_3m_sde":
        scale = settings.get("s_noise", 1.0)
        return sde(3, eta2=eta, third="shipped", growth=inf, s_noise=scale), "plan"
    if "DPMSolverMultistep" in name:
        order = settings.get("solver_order", 2)
        form = "noise" if settings.get("algorithm_type") == "sde-dpmsolver" else "data"
        orders = lowered(case, order)
        if max(orders) == 3:
            wrong = replace(sde(3, growth=inf), step=sign_error)
            return limited(wrong, levels[1:], orders), "wrong sign by hand"
        solver = sde(max(orders), form=form, second=kind if order > 1 else "exact", growth=inf)
        if orders[-1] == max(orders) or (levels[-1].sigma == 0 and orders[-2] == max(orders)):
            return solver, "plan"
        return limited(solver, levels[1:], orders), "orders by hand"
    if name == "SASolverScheduler" and settings["algorithm_type"] == "data_prediction":
        p, c, tau = (settings[k] for k in ("predictor_order", "corrector_order", "tau_func"))
        if c == 1:
            made, way = implicit, "corrector by hand"
        else:
            made, way = (lambda tau: sa_solver(p, c, eta2=tau**2, second="bh1")), "plan"
        return windowed(made, tau, way)
    if name == "SASolverScheduler":
        p, c, tau = (settings[k] for k in ("predictor_order", "corrector_order", "tau_func"))
        return windowed(functools.partial(in_noise, p, c), tau, "corrector by hand")
    if name == "LCMScheduler" and settings["timestep_scaling"] > 1e9:
        return jump(), "plan"
    if name == "TCDScheduler":
        return jump(eta, to="time"), "plan"
    if name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"):
        return jump(), "plan"
    if name == "LTXEulerAncestralRFScheduler":

        def renoise(s: fs.Level, t: fs.Level) -> float:
            down = t.sigma * (1 + (t.sigma / s.sigma - 1) * eta)
            return math.sqrt(max(t.sigma**2 - (down * t.alpha / (1 - down)) ** 2, 0.0))

        return ancestral(renoise), "plan"
    return None, "by hand"


def compile_case(case: dict) -> Compiled:
    process, levels = levels_of(case)
    solver, way = solver_for(case, levels)
    if solver is None:
        plan = by_hand(case, levels, process)
    else:
        plan = fs.plan(solver, process, grid=[level.t for level in levels])
    own = solver if way == "plan" else None
    scaled = case["name"] in CHURNED or case["name"] == "sample_dpmpp_3m_sde"  # by the solver
    return Compiled(plan, way, own, 1.0 if scaled else case["settings"].get("s_noise", 1.0))


def factors(case: dict, entry: fs.Solver) -> list[float]:
    """What the noise level of a case may be, as factors of the one that a solver has."""
    settings = case["settings"]
    eta = settings.get("eta", 1.0)
    tau = settings.get("tau_func", "1")
    churned = math.sqrt(settings.get("s_churn", 1.0) / getattr(entry, "s_churn", 1.0))
    taus = [] if tau == "window" else [float(tau)]
    return [*dict.fromkeys([1.0, eta, math.sqrt(eta), 2 * eta, churned, *taus])]


def same_method(one: fs.Plan, other: fs.Plan) -> bool:
    """Whether two plans are the same method, up to rounding."""
    if [v.t for v in one.evaluations] != [v.t for v in other.evaluations]:
        return False
    ends = [[(d.start.lam, d.end.lam) for d in plan.draws] for plan in (one, other)]
    return ends[0] == ends[1] and all(
        np.allclose(a, b, rtol=1e-9, atol=1e-11)
        for a, b in zip(one.canonical(), other.canonical(), strict=True)
    )


def kind(solver: fs.Solver) -> tuple:
    """What two solvers of one method have in common."""
    corrected = getattr(solver, "corrector", None) is not None
    return type(solver), getattr(solver, "nodes", 0), corrected, solver.nfe_per_step


def names_for(case: dict, compiled: Compiled, among: Iterable[str] | None = None) -> list[str]:
    """The registered solvers (of these names) that do what this case does, at the noise level of
    the case."""
    found = []
    if compiled.solver is None or not compiled.plan.stochastic:
        return found
    process, levels = levels_of(case)
    times = [level.t for level in levels]
    for name in fs.solvers if among is None else among:
        entry = fs.solvers[name]
        if not entry.stochastic or kind(entry) != kind(compiled.solver):
            continue
        for factor in factors(case, entry):
            try:
                solver = entry.scaled(factor)
                plan = fs.plan(solver, process, compiled.plan.nfe, grid=times)
            except ValueError as error:
                # a noise level or a budget that this one does not have
                if not re.match("nfe|gamma|eta|snr", str(error)):
                    raise
                continue
            if same_method(plan, compiled.plan):
                found.append(name)
                break
    return found
