"""Parity with official implementations: the same final states on exact Gaussian mixtures.

tests/golden holds results of the official implementations (names and versions in cases.json),
computed in float64 on two mixtures whose network is exact. Every case is run through the real loop
on the step boundaries that the official code used. Where official code deviates from its method,
or does what no solver here does, that is reproduced in `official` by giving every step its order,
its inner states or its rows by hand:

    orders      lowered near the end: dpm_solver below 10 steps, diffusers below 15, UniPC and the
                EDM copies always; to sigma = 0 always; first order for denoise_to_zero
    zero steps  diffusers repeats the last sigma in some settings; that step does nothing but, in a
                predictor-corrector method, call the network once more and correct the last state
    corrector   UniPC of diffusers can leave it out at some steps; SA-Solver takes any number of
                nodes for either part (one node less than a predictor's: lower order)
    vary_coeff  UniPC, orders 2 and 3: the corrector weights the new point by another term's number
    outputs     DC-Solver replaces the newest output by an interpolation of the stored ones, for
                good: later steps see the replaced one
    landing     diffusers DDIM and PNDM land on another time than they evaluate next (linspace
                spacing, trailing spacing that does not divide)
    inner       DPM-Solver puts inner states at even places of its grid's variable, which is lambda
                for logSNR only; diffusers takes nodes of its grid, and its third-order "midpoint"
                makes the second inner state by the second-order rule
    to zero     torchdiffeq's flow methods take a full last step; Heun and RK4 evaluate at sigma = 0
    clocks      the ablation study of EDM integrates x = s(t) y in clocks other than sigma
    numbers     ipndm_v of diff-sampler misplaces a parenthesis (orders 3, 4) and a sign (4); its
                analytical first step (afs) asks no network
    clipping    diffusers DDIM clips D but keeps the noise prediction of the unclipped one; its
                dynamic threshold has a ceiling, by default at the floor: a clip
    adaptive    one error for the whole batch (its largest or mean), where here every sample has its
                own; dpm_solver takes its factor of the step through float32
    rounding    diffusers may evaluate the network at a rounded time and step from the exact sigma
    snapped     nodes of DPM-Solver-v3 are values of its table of statistics, its integrals sums
                over that table: rule = "trapezoid", and no limit of growth
    sums        DEIS takes Riemann sums of 10,000 points for its integrals. Its cases run twice:
                with these sums in hand-made rows they agree as all others do; with our exact
                weights they differ by what the integrals differ by (recorded with the results)

`pytest tests/test_parity.py -n 0 -s` prints what is covered and what is not;
`python benchmarks/conformance.py` prints it by solver.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import fewstep as fs
from official import (
    GOLDEN,
    arguments,
    arrays,
    cases_of,
    compile_case,
    deviation,
    golden,
    implementation,
    is_adaptive,
    mixture,
    names_for,
    process_for,
    process_of_diff_sampler,
    run,
    solver_for,
    stored,
    summed_weights,
    with_sums,
)

#: Relative to max(1, max |x|). The codes round differently: official implementations of one method
#: agree among themselves to 1e-12, these runs with them to 1e-11.
LIMIT = 1e-10

#: Cases by implementation: (all that are run, those that a solver of the package covers as it is).
#: Numbers may grow, never shrink: a skipped case is a failure.
COVERED = {
    "bdia": (42, 42),
    "dc_solver": (210, 69),
    "dc_solver_diffusers": (192, 31),
    "deis": (308, 308),
    "diff_solvers": (448, 392),
    "diffusers_ddim": (92, 55),
    "diffusers_deis_multistep": (185, 165),
    "diffusers_dpmsolver_multistep": (364, 341),
    "diffusers_dpmsolver_singlestep": (189, 57),
    "diffusers_edm_dpmsolver_multistep": (140, 132),
    "diffusers_edm_euler": (34, 34),
    "diffusers_euler_discrete": (67, 67),
    "diffusers_flow_match_euler_discrete": (84, 84),
    "diffusers_flow_match_heun_discrete": (14, 14),
    "diffusers_heun_discrete": (35, 35),
    "diffusers_lms_discrete": (126, 126),
    "diffusers_pndm": (90, 48),
    "diffusers_sasolver": (210, 138),
    "diffusers_unipc_multistep": (364, 247),
    "dpm_solver": (469, 301),
    "dpm_solver_v3": (448, 448),
    "edm_dpm_solver": (252, 162),
    "edm_heun_v3repo": (17, 17),
    "edm_unipc": (252, 205),
    "flow_matching": (51, 15),
    "k_diffusion": (330, 330),
    "nvlabs_edm": (178, 86),
    "unipc": (378, 301),
}

#: Adaptive cases, which take hundreds of evaluations: (all, those of up to LONG).
ADAPTIVE = {"dpm_solver": (56, 49), "k_diffusion": (48, 48)}
LONG = 1000


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny: more threads only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("problem", ["G1", "G2"])
def test_network_is_the_one_of_the_results(problem):
    x, levels, data, noise = (
        torch.from_numpy(arrays()[f"{problem}_check_{key}"])
        for key in ("x", "alpha_sigma", "D", "eps")
    )
    found = mixture(problem).predict(x, levels[:, 0], levels[:, 1])
    for ours, theirs in zip(found, (data, noise), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-12


def compare(cases: Sequence[dict]) -> tuple[str, Counter, list[str]]:
    """(what was found, how the plans were made, what disagrees) of cases of one implementation."""
    failures, ways, methods, worst = [], Counter(), Counter(), 0.0
    for case in cases:
        compiled = compile_case(case)
        absolute, relative = deviation(case, run(case, compiled))
        excess = relative
        if "quadrature" in case:  # DEIS: within what its sums miss
            excess = absolute - case["quadrature"]
            relative = 0.0
        if not excess < LIMIT:
            failures.append(f"{case['id']} {case['method']}: {excess:.3g} {case['steps']} steps")
        worst = max(worst, relative)
        ways[compiled.way] += 1
        methods[case["method"]] += 1
    summary = (
        f"{implementation(cases[0])}: {ways.total()} cases "
        f"({', '.join(f'{n} {way}' for way, n in ways.items())}), "
        f"largest deviation {worst:.1e}; {', '.join(f'{m} {n}' for m, n in methods.items())}"
    )
    print(f"\n{summary}")
    return summary, ways, failures


@pytest.mark.parametrize("name", COVERED)
def test_final_states(name, record_property):
    """Every case of one implementation, within LIMIT (DEIS: within what its sums miss)."""
    summary, ways, failures = compare([case for case in cases_of(name) if not is_adaptive(case)])
    record_property("covered", summary)
    assert not failures, f"{summary}\n" + "\n".join(failures)
    reached = (ways.total(), ways["plan"])
    expected = COVERED[name]
    assert reached[0] >= expected[0], f"covers fewer cases than {expected}: {summary}"
    assert reached[1] >= expected[1], f"covers fewer cases than {expected}: {summary}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_steps(name, record_property):
    """The same final states by the same attempts, accepted and rejected, where official code takes
    one error for the batch."""
    cases = [case for case in cases_of(name) if is_adaptive(case) and case["nfe"] <= LONG]
    summary, ways, failures = compare(cases)
    record_property("covered", summary)
    assert not failures, f"{summary}\n" + "\n".join(failures)
    assert ways.total() >= ADAPTIVE[name][1], summary


@pytest.mark.slow
def test_adaptive_steps_of_the_tightest_tolerance(record_property):
    """The rest, of 3,000 evaluations and more: only the tolerance is another."""
    cases = [case for case in cases_of("dpm_solver") if is_adaptive(case) and case["nfe"] > LONG]
    summary, ways, failures = compare(cases)
    record_property("covered", summary)
    assert not failures, f"{summary}\n" + "\n".join(failures)
    assert ways.total() >= 7, summary


#: Registered solvers that some official run is exactly. May grow, never shrink.
NAMED = [
    "bdia",
    "bdia_1",
    "ddim",
    "deis_rhoab1",
    "deis_rhoab2",
    "deis_rhoab3",
    "deis_tab1",
    "deis_tab2",
    "deis_tab3",
    "dpm_solver_2",
    "dpm_solver_2m",
    "dpm_solver_3",
    "dpmpp_2m",
    "dpmpp_2m_heun",
    "dpmpp_2s",
    "dpmpp_2s_taylor",
    "dpmpp_3m_shipped",
    "dpmpp_3s",
    "dpmpp_3s_taylor",
    "flow_heun",
    "heun",
    "ipndm_2",
    "ipndm_3",
    "ipndm_4",
    "noise_ab2",
    "noise_ab3",
    "plms",
    "pndm",
    "rho_midpoint",
    "rho_rk3",
    "rho_rk4",
    "unipc_1",
    "unipc_1_bh1",
    "unipc_1_vary",
    "unipc_2",
    "unipc_2_bh1",
    "unipc_3",
    "unipc_3_bh1",
]


@pytest.mark.slow
def test_names_stand_for_what_was_compared(record_property):
    """`fewstep.plan` of the name is the official run on its step boundaries, in all its rows."""
    found, tried = Counter(), Counter()
    for case in golden()["cases"]:
        # a few of every method are enough here: benchmarks/conformance.py takes all
        key = (implementation(case), case["method"], case["process"])
        if is_adaptive(case) or tried[key] == 4 or set(NAMED) <= set(found):
            continue
        tried[key] += 1
        found.update(names_for(compile_case(case)))
    summary = f"{len(found)} solvers: {dict(found.most_common())}"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert set(NAMED) <= set(found), f"not found: {set(NAMED) - set(found)}"


def test_every_result_is_accounted_for(record_property):
    """Run or left out for a stated reason: the numbers add up, and nothing is lost on the way."""
    lines, reasons = [], Counter()
    for name, entry in golden()["implementations"].items():
        count, out = len(cases_of(name)), entry["left_out"]
        assert count + sum(out.values()) == entry["cases"], f"{name}: {count} + {out}"
        known = COVERED.get(name, (0, 0))[0] + ADAPTIVE.get(name, (0, 0))[0]
        assert count == known, f"{name}: {count} cases are stored"
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


@pytest.mark.parametrize("name", ["deis", "diff_solvers"])
def test_sums_of_deis(name, record_property):
    """With the official sums in place of exact integrals, DEIS agrees as everything else does; and
    sums over the midpoints of the same cells, which are accurate, agree with our weights."""
    middle = (np.arange(10000) + 0.5) / 10000
    worst = {"result": 0.0, "rho": 0.0, "t": 0.0}
    failures, count = [], 0
    for case in cases_of(name):
        if "quadrature" not in case:
            continue
        count += 1
        compiled, solver = compile_case(case), solver_for(case)
        process, levels, variable = compiled.process, compiled.plan.levels, solver.step.variable
        for i, end in enumerate(levels[1:]):
            nodes = levels[max(0, i + 1 - solver.nodes) : i + 1][::-1]
            exact = fs.weights("noise", variable, nodes[0], end, nodes, process)
            sums = summed_weights(process, variable, nodes, end, middle)
            miss = np.abs(exact - sums).max() / np.abs(exact).max()
            worst[variable] = max(worst[variable], miss)
        relative = deviation(case, run(case, with_sums(case, compiled)))[1]
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


def laid_out(
    case: dict,
) -> tuple[str | fs.Grid, fs.Process, str, list[float], list[float]] | None:
    """(our grid, process, final, its lambdas, the official ones), or None where the official
    generator is another one: sigmas of flow models, beta quantiles in sigma, log-linear sigmas."""
    name, args = implementation(case), arguments(case)
    if is_adaptive(case):
        return None
    lam, count, final = list(stored(case["lam"])), case["steps"], "min"
    process = None if case["process"] == "flow" else process_for(case, lam)
    whole = True
    if args.get("method") == "singlestep" and args["skip_type"] != "logSNR":
        return None  # some of the nodes of a finer grid
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
    elif name == "nvlabs_edm" and args.get("discretization", "edm") == "edm":
        grid = "karras" if args.get("rho", 7) == 7 else fs.karras(args["rho"])
        final = "zero"
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
    assert covered.total() >= 581, summary


def test_integer_spacings(record_property):
    """leading, linspace and trailing as in diffusers; its steps_offset shifts leading by one."""
    process = fs.DiscreteVP.scaled_linear()
    zero, least = set(), set()
    for case in golden()["cases"]:
        name, args = implementation(case), arguments(case)
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
