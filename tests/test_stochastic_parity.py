"""Parity of stochastic solvers with diffusers, k-diffusion and the code of two papers, given the
same noise: the same states at every network call and the same result, on an exact mixture.

tests/golden/stochastic.* holds what the official code does in float64 (names and versions in the
file; `make_golden_stochastic.py` makes it). Noise number k of step i is the same tensor there and
here. Where official code deviates from its method, or does what no solver here does, it is
reproduced by hand in `official_stochastic`:

    sign        diffusers, third-order sde-dpmsolver++: -1/2 in the place of +1/2, first order
    churn       diffusers Euler and EDM Euler ask the network before they add the noise, which
                nothing removes then
    last noise  diffusers DDPM adds noise to the sample itself where its last time is not 0: the
                whole of beta with "fixed_large"
    boundary    diffusers LCM mixes c_skip of the state into the data prediction, about 1e-8
    sums        ER-SDE integrates by 100 rectangles. Its cases run twice: with these sums in
                hand-made rows, and from its own code with accurate integrals against our weights
    window      SA-Solver takes tau at one end of a step (its own code: where it ends; diffusers:
                where it starts); its own code takes the last step without noise
    corrector   SA-Solver of diffusers corrects in noise form too, and through the new state alone
    orders      of the last steps, diffusers below 15
    dpm_fast    of k-diffusion with eta: DPM-Solver-3 steps with noise after each

Draws of k-diffusion's dpmpp_sde from s to m and from s to t are those of one path (Brownian in
sigma); here they are segments. A sampler of diffusers that draws and multiplies by 0 needs nothing.
What others call eta: `test_what_eta_means`.

`pytest tests/test_stochastic_parity.py -n 0 -s` prints what is covered and what is not.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._solvers._noisy import churn
from fewstep._solvers._stochastic import ancestral, er_sde, jump, sa_solver, sde
from official import mixture
from official_stochastic import (
    Compiled,
    NoisyTape,
    arrays,
    churned,
    compile_case,
    deviation,
    golden,
    implementation,
    levels_of,
    names_for,
    run,
    sign_error,
)

#: Relative to max(1, max |x|).
LIMIT = 1e-10

#: Cases by implementation: (all that are run, those that a solver of the package covers as it is).
#: Numbers may grow, never shrink.
COVERED = {
    "ER-SDE-Solver er_sde": (96, 54),
    "SA-Solver few_steps": (48, 0),
    "diffusers CosineDPMSolverMultistep": (10, 10),
    "diffusers DDIM": (18, 18),
    "diffusers DDPM": (18, 9),
    "diffusers DPMSolverMultistep": (37, 23),
    "diffusers DPMSolverSDE": (6, 6),
    "diffusers EDMDPMSolverMultistep": (10, 10),
    "diffusers EDMEuler": (6, 0),
    "diffusers EulerAncestralDiscrete": (6, 6),
    "diffusers EulerDiscrete": (6, 0),
    "diffusers FlowMatchEulerDiscrete": (6, 6),
    "diffusers FlowMatchLCM": (3, 3),
    "diffusers KDPM2AncestralDiscrete": (6, 6),
    "diffusers LCM": (6, 3),
    "diffusers LTXEulerAncestralRF": (6, 6),
    "diffusers SASolver": (90, 33),
    "diffusers ScoreSdeVe": (9, 9),
    "diffusers TCD": (9, 9),
    "k-diffusion dpm_2": (9, 9),
    "k-diffusion dpm_2_ancestral": (9, 9),
    "k-diffusion dpm_fast": (6, 0),
    "k-diffusion dpmpp_2m_sde": (24, 24),
    "k-diffusion dpmpp_2s_ancestral": (9, 9),
    "k-diffusion dpmpp_3m_sde": (15, 15),
    "k-diffusion dpmpp_sde": (12, 12),
    "k-diffusion euler": (9, 9),
    "k-diffusion euler_ancestral": (15, 15),
    "k-diffusion heun": (9, 9),
}

#: What the official code does not run (an error, or NaN), and what has no plan.
NOT_COVERED = {
    "DDPM variance_type = fixed_large_log: the square root of a logarithm": 6,
    "DPMSolverMultistep sde-dpmsolver: no third order": 2,
    "CosineDPMSolverMultistep: no third order": 2,
    "EDMDPMSolverMultistep sde-dpmsolver++: no third order": 2,
    "PECE: evaluates the corrected state too": 12,
}


def why_not(case: dict) -> str | None:
    """Why a case is not run, or None."""
    name, settings = implementation(case).split()[1], case["settings"]
    if "error" in case:
        if name == "DDPM":
            kind = settings["variance_type"]
            return f"DDPM variance_type = {kind}: the square root of a logarithm"
        if name.startswith("Cosine"):
            return f"{name}: no third order"
        return f"{name} {settings['algorithm_type']}: no third order"
    if settings.get("pc_mode") == "PECE":
        return "PECE: evaluates the corrected state too"
    return None


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", COVERED)
def test_states(name, record_property):
    """Every case of one implementation, within LIMIT."""
    failures, ways, worst = [], Counter(), 0.0
    for case in golden()["cases"]:
        if implementation(case) != name or why_not(case):
            continue
        compiled = compile_case(case)
        found = deviation(case, compiled)
        if not found < LIMIT:
            failures.append(f"{case['settings']}, {case['steps']} steps: {found:.3g}")
        worst = max(worst, found)
        ways[compiled.way] += 1
    summary = (
        f"{name}: {ways.total()} cases ({', '.join(f'{n} {way}' for way, n in ways.items())}), "
        f"largest deviation {worst:.1e}"
    )
    print(f"\n{summary}")
    record_property("covered", summary)
    assert not failures, f"{summary}\n" + "\n".join(failures)
    reached, expected = (ways.total(), ways["plan"]), COVERED[name]
    assert reached[0] >= expected[0], f"covers fewer cases than {expected}: {summary}"
    assert reached[1] >= expected[1], f"covers fewer cases than {expected}: {summary}"


def test_every_result_is_accounted_for(record_property):
    """Run, or left out for a stated reason, and counted."""
    reasons = Counter(map(why_not, golden()["cases"]))
    total, run_ = sum(reasons.values()), reasons.pop(None)
    lines = [f"covered: {run_} of {total}; not covered, by reason:"]
    lines += [f"    {n:5d} {reason}" for reason, n in reasons.most_common()]
    print("\n" + "\n".join(lines))
    record_property("covered", "\n".join(lines))
    assert {implementation(case) for case in golden()["cases"]} == set(COVERED)
    assert run_ == sum(count for count, _ in COVERED.values())
    assert dict(reasons) == NOT_COVERED


def test_a_wrong_noise_is_seen():
    """The comparison fails with a draw in another place, or of another size."""
    case = next(c for c in cases("sample_dpmpp_2m_sde") if c["steps"] == 8)
    compiled = compile_case(case)
    assert deviation(case, compiled) < LIMIT
    plan = compiled.plan
    swapped = (plan.draws[1], plan.draws[0], *plan.draws[2:])
    rows = [fs.Row(r.a, r.b, r.order, False, {m ^ 1 if m < 2 else m: c for m, c in r.e.items()})
            for r in plan.rows]  # fmt: skip
    assert deviation(case, Compiled(plan_with(plan, rows, plan.draws), "")) > 0.01
    assert deviation(case, Compiled(plan_with(plan, rows, swapped), "")) < LIMIT
    assert deviation(case, Compiled(plan, "", None, 1.0 + 1e-6)) > 1e-7


def plan_with(plan: fs.Plan, rows: list[fs.Row], draws: tuple) -> fs.Plan:
    return fs.Plan(plan.levels, tuple(rows), plan.calls, draws=draws)


def cases(name: str, **settings: object) -> list[dict]:
    """The cases of a class or function with these settings."""
    return [
        case
        for case in golden()["cases"]
        if case["name"] == name
        and "error" not in case
        and all(case["settings"].get(k) == v for k, v in settings.items())
    ]


def ours(case: dict, solver: fs.Solver) -> np.ndarray:
    """What a solver of the package makes of the steps and the noise of a case."""
    process, levels = levels_of(case)
    plan = fs.plan(solver, process, grid=[level.t for level in levels])
    return run(case, Compiled(plan, ""), checked=False)[0].numpy()


def theirs(case: dict) -> np.ndarray:
    return arrays()["final"][case["row"]]


# Where official code is wrong: what that is, and how much.


@pytest.mark.parametrize("eta2", [1.0])
def test_third_order_of_diffusers_is_first_order(eta2):
    """On a quadratic D(lambda), the local error of three formulas as the step is halved: exact
    weights have none, the shipped ones h^3, the sign error h^2: global order 1."""
    process = fs.VP()

    def error(formula, h):
        ends = [process.level(float(process.time(0.3 - k * h))) for k in (0, 1, 2, 3)]
        data = [(node.lam - 0.3) ** 2 for node in ends[1:]]
        right = sde(3, eta2=eta2, growth=math.inf).step(process, ends[1:], ends[0])
        mine = formula(process, ends[1:], ends[0])
        return abs(np.dot(np.subtract(mine.b, right.b), data))

    def slope(formula):
        return math.log2(error(formula, 0.02) / error(formula, 0.01))

    shipped = sde(3, eta2=eta2, third="shipped", growth=math.inf).step
    assert abs(slope(shipped) - 3) < 0.1
    assert abs(slope(sign_error) - 2) < 0.1
    for case in cases("DPMSolverMultistepScheduler", solver_order=3):
        if case["steps"] > 4 and case["settings"]["algorithm_type"] == "sde-dpmsolver++":
            solver = sde(3, third="shipped", growth=math.inf)
            assert np.abs(ours(case, solver) - theirs(case)).max() > 0.01


def test_churn_of_diffusers_leaves_the_noise_in():
    """With constant data, a step from sigma = 1 to 0.5 ends with twice the noise of its level."""
    process = fs.EDM(0.01, 10.0)
    start, end = process.level(1.0), process.level(0.5)
    case = {"name": "EulerDiscreteScheduler", "settings": {"s_churn": 1.0}, "steps": 1}
    tape = NoisyTape(start)
    churned(case, tape, start, end, True, process)
    row = tape.plan().rows[0]
    assert row.a[0] + row.b[0] == pytest.approx(1)
    found = math.hypot(row.a[0] * start.sigma, row.e[0])
    assert found == pytest.approx(1.0037, abs=1e-4)
    right = fs.plan(churn("ddim", 1.0), process, grid=[1.0, 0.5])
    assert all(row.exact for row in right.rows)
    for name in ("EulerDiscreteScheduler", "EDMEulerScheduler"):
        for case in cases(name):
            settings = case["settings"]
            solver = churn(
                "ddim", settings["s_churn"], settings.get("s_tmin", 0), settings.get("s_tmax", 1e9)
            )
            assert np.abs(ours(case, solver) - theirs(case)).max() > 0.01


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_ddpm_of_diffusers_adds_noise_to_the_sample(kind):
    for case in cases("DDPMScheduler", timestep_spacing="trailing", variance_type=kind):
        _, levels = levels_of(case)
        std = levels[-2].sigma if kind == "fixed_large" else 1e-10
        solver = ancestral(variance="large" if kind == "fixed_large" else "small")
        noise = std * arrays()["bank"][case["steps"] - 1, 0]
        assert np.abs(ours(case, solver) + noise - theirs(case)).max() < 1e-13
        assert std > (0.1 if kind == "fixed_large" else 0)


def test_lcm_of_diffusers_is_a_sample_but_for_its_boundary_condition():
    for case in cases("LCMScheduler", timestep_scaling=10.0):
        worst = np.abs(ours(case, jump()) - theirs(case)).max()
        assert LIMIT < worst < 1e-5


def test_sums_of_er_sde(record_property):
    """What 100 rectangles cost: up to 3e-3 on these samples."""
    worst = {}
    for case in cases("er_sde", points=100, phi="default"):
        order = case["settings"]["order"]
        if order > 1:
            solver = er_sde(order, third="uncorrected" if order == 3 else "exact")
            miss = np.abs(ours(case, solver) - theirs(case)).max()
            key = (order, case["coordinates"], case["steps"])
            worst[key] = max(worst.get(key, 0.0), float(miss))
    summary = f"ER-SDE, rectangles: { ({k: f'{v:.1g}' for k, v in worst.items()}) }"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert min(worst.values()) > 1e-4
    assert 1e-3 < max(worst.values()) < 1e-2


# What others call eta, in eta^2 of the library (E = int eta^2 dlambda, h = lambda_t - lambda_s).


def coefficients(case: dict) -> list[tuple[float, float, float]]:
    """(h, share of the noise that is kept, share that is new) of first-order steps, from the
    official samples alone: x_t = alpha_t D + sigma_t (kept eps + new z)."""
    levels, model, out = levels_of(case)[1][:-1], mixture("G1"), []
    asked, bank = arrays()["asked"][case["asked"] :], arrays()["bank"]
    for i, (s, t) in enumerate(pairwise(levels)):
        data, eps = (v.numpy() for v in model.predict(torch.from_numpy(asked[i]), s.alpha, s.sigma))
        parts = np.stack([eps.ravel(), bank[i, 0].ravel()], 1)
        rest = (asked[i + 1] - t.alpha * data).ravel() / t.sigma
        kept, new = np.linalg.lstsq(parts, rest, rcond=None)[0]
        out.append((t.lam - s.lam, float(kept), float(new)))
    return out


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        # (name, settings, E of h)
        ("DDPMScheduler", {"variance_type": "fixed_small"}, lambda h: h),
        ("EulerAncestralDiscreteScheduler", {}, lambda h: h),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, lambda h: h),
        ("CosineDPMSolverMultistepScheduler", {"solver_order": 1}, lambda h: h),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 1}, lambda h: h),
        *(
            ("DDIMScheduler", {"eta": eta}, lambda h, eta=eta: per_step(eta, h))
            for eta in (0.3, 0.5, 1.0)
        ),
        *(
            ("sample_euler_ancestral", {"eta": eta}, lambda h, eta=eta: per_step(eta, h))
            for eta in (0.5, 0.7, 1.0)
        ),
        ("er_sde", {"order": 1, "phi": "rho^2"}, lambda h: h),
        ("LCMScheduler", {"timestep_scaling": 1e12}, lambda h: math.inf),
        ("FlowMatchLCMScheduler", {}, lambda h: math.inf),
    ],
)
def test_what_eta_means(name, settings, rule):
    """A first-order step keeps e^-E of the noise and draws sqrt(1 - e^-2E) anew; E = eta^2 h for
    an SDE of noise level eta^2. The official steps say which E they have."""
    count = 0
    for case in cases(name, **settings):
        noise_form = case["settings"].get("algorithm_type") == "sde-dpmsolver"
        if "asked" not in case or "s_noise" in case["settings"] or noise_form:
            continue
        for h, kept, new in coefficients(case):
            wanted = math.exp(-rule(h)) if math.isfinite(h) else 0.0
            assert kept == pytest.approx(wanted, abs=1e-9), (case, h)
            assert new == pytest.approx(math.sqrt(1 - wanted**2), abs=1e-9)
            count += 1
    assert count >= 6


def per_step(eta: float, h: float) -> float:
    """E of DDIM's eta, which is one for each step: eta^2 = (1 - e^-2E) / (1 - e^-2h)."""
    return -0.5 * math.log1p(eta**2 * math.expm1(-2 * h))


def test_eta_of_k_diffusion_is_a_noise_level_squared():
    """dpmpp_2m_sde and 3m_sde: eta = 0.5 is half of the noise's power, not half of the noise."""
    for name, make in (
        ("sample_dpmpp_2m_sde", lambda e: sde(2, eta2=e, second="midpoint", growth=math.inf)),
        ("sample_dpmpp_3m_sde", lambda e: sde(3, eta2=e, third="shipped", growth=math.inf)),
    ):
        for case in cases(name, eta=0.5):
            if case["settings"].get("solver_type") != "heun":
                assert np.abs(ours(case, make(0.5)) - theirs(case)).max() < LIMIT
                assert np.abs(ours(case, make(0.25)) - theirs(case)).max() > 1e-3


def test_tau_of_sa_solver_is_eta():
    for case in cases("SASolverScheduler", tau_func="0.5", algorithm_type="data_prediction"):
        p, c = (case["settings"][k] for k in ("predictor_order", "corrector_order"))
        right, wrong = (sa_solver(p, c, eta2=e, second="bh1") for e in (0.25, 0.5))
        assert np.abs(ours(case, right) - theirs(case)).max() < LIMIT
        assert np.abs(ours(case, wrong) - theirs(case)).max() > 1e-3


#: Registered solvers that some official run is exactly. May grow, never shrink.
NAMED = {
    "ddim_eta_0_5",
    "ddpm",
    "ddpm_large",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "edm_churn",
    "er_sde_1",
    "er_sde_2",
    "euler_churn",
    "lcm",
    "sde_dpm_solver_1",
    "sde_dpm_solver_2m",
    "sde_dpmpp_2m",
    "sde_dpmpp_2m_heun",
    "sde_dpmpp_3m_shipped",
    "tcd",
}


def test_names_stand_for_what_was_compared(record_property):
    """`fewstep.plan` of the name is the official run on its step boundaries, in all its rows."""
    found, tried = Counter(), Counter()
    for case in golden()["cases"]:
        # one of every setting is enough here: benchmarks/conformance.py takes all
        key = (case["name"], str(case["settings"]))
        if case["steps"] != 15 or tried[key] or set(found) >= NAMED or why_not(case):
            continue
        tried[key] += 1
        found.update(names_for(case, compile_case(case), NAMED - set(found)))
    summary = f"{len(found)} solvers: {', '.join(sorted(found))}"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert set(found) >= NAMED, f"not found: {NAMED - set(found)}"
