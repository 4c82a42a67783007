"""Cut tests/golden from the full set of results of the official implementations.

    python tests/make_golden.py SOURCE [--rows FILE]

SOURCE is a folder with manifest.json, problems.npz and <implementation>.npz: final states that the
official implementations reach on exact Gaussian mixtures, computed in float64. Kept are the first
samples of every case but a few, which are counted by reason, so that the tests can say what they do
not cover, and the model statistics that DPM-Solver-v3 was given. FILE holds single rows in several
forms; those that fewstep has are kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
from pathlib import Path

import numpy as np

SAMPLES = {"G1": 16, "G2": 4}
#: Arguments that say nothing a solver needs.
DROPPED = {
    "scheduler",
    "sampler",
    "epsilon_s",
    "C_1",
    "C_2",
    "M",
    "S_churn",
    "ratio_source",
    "search",
    "tau_func",
    "quadrature",
    "nfe",
    "nfe_reported",
    "ddim_eta",
    "eta",
    "deis_mode",
    "t_start",
    "dtype",
    "time_grid",
    "rk_method",
    "timesteps",
    "num_step",
    "num_steps",
    "n_sigmas",
    "num_inference_steps",
    "steps",
    "n",
    "indexes",
    "statistics_steps",
}

#: Why some are not kept: the first pattern that matches "implementation:method".
MISSING = ((r"flow_matching:(dopri5|bosh3)", "adaptive Runge-Kutta of a general ODE package"),)


def left_out(case: dict) -> str | None:
    """Why a case is not kept, or None if it is."""
    label = f"{case['impl']}:{case['method']}"
    return next((why for pattern, why in MISSING if re.fullmatch(pattern, label)), None)


def short(value: object) -> object:
    """An argument; a list that names more steps than any case has (disable_corrector) is "all"."""
    return "all" if isinstance(value, list) and len(value) >= 50 else value


def boundaries(case: dict, manifest: dict) -> list[float]:
    """lambda at the ends of the steps. Adaptive steps: start and end. DDIM and PNDM of diffusers:
    where the network is called."""
    if "grid" in case:
        return [float(v) for v in manifest["grids"][case["grid"]]["lam"]]
    if "adaptive" in case["method"]:
        reference = manifest["references"][case["ref"]]
        ends = float(reference["rho_start"]), float(reference["rho_end"])
        return [-math.log(rho) for rho in ends]
    lam = [float(v) for v in manifest["lists"][case["evals"]]]
    if case["impl"] == "nvlabs_edm":  # Heun evaluates in between, but for its last step
        return [*(lam[::2] if case["method"] == "ablation_heun" else lam), math.inf]
    return lam


#: Names of rows in FILE, and "kind form variable" in the tests.
ROWS = {
    **{
        f"{kind}_{form}{tail}": f"{kind} {form} {variable}".strip()
        for form in ("data", "eps")
        for kind, tail, variable in (
            ("ddim", "", ""),
            *((k, f"_u={u}", u) for k in ("exact2", "exact3") for u in ("lambda", "t", "rho")),
        )
    },
    **{f"two_node_half_bh2_{form}": f"two_midpoint {form}" for form in ("data", "eps")},
    **{f"3M_official_halfD2_{form}": f"three_shipped {form}" for form in ("data", "eps")},
    **{
        f"unic_exact_order{k}_{form}": f"unic{k} {form}" for k in (1, 2) for form in ("data", "eps")
    },
    **{f"angleAB{k}_c0.5": f"angle{k} 0.5" for k in (1, 2)},
}


def cut_rows(source: Path, target: Path) -> None:
    """Keep the rows of ROWS: coefficients a of states and b of data, or the weights W."""
    out = {}
    for path, entry in json.loads(source.read_text()).items():
        rows = {}
        for theirs, ours in ROWS.items():
            row = entry["rows"][theirs]
            if ours.startswith("unic"):
                rows[ours] = {"W": row["W"]}
            else:
                rows[ours] = {"a": row["x_coef"], "b": row["D_coef"]}
        out[path] = {"times": entry["times"], "target": entry["target"], "rows": rows}
    lines = json.dumps(out, separators=(",", ":")).replace("},", "},\n")
    target.write_text(lines + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "golden")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    if options.rows is not None:
        cut_rows(options.rows, options.target / "rows.json")
    manifest = json.loads((options.source / "manifest.json").read_text())
    problems = np.load(options.source / "problems.npz")
    arrays: dict[str, np.ndarray] = {}
    for p in SAMPLES:
        for key in ("w", "mu", "cov", "check_x", "check_alpha_sigma", "check_D", "check_eps"):
            arrays[f"{p}_{key}"] = problems[f"{p}_{key}"]
        arrays[f"{p}_z"] = problems[f"{p}_z"]  # all: adaptive steps depend on the whole batch

    results: dict[str, dict[str, np.ndarray]] = {}
    finals: dict[str, list[np.ndarray]] = {p: [] for p in SAMPLES}
    rows: dict[str, list] = {"lists": [], "args": []}
    known: dict[str, dict[str, int]] = {"lists": {}, "args": {}}
    tables: dict[str, np.ndarray] = {}
    cases = []
    skipped: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def index(table: str, value: object) -> int:
        key = json.dumps(value, sort_keys=True)
        if key not in known[table]:
            known[table][key] = len(rows[table])
            rows[table].append(value)
        return known[table][key]

    for case in manifest["cases"]:
        name, args = case["impl"], case["args"]
        reason = left_out(case)
        if reason is not None:
            skipped[name][reason] += 1
            continue
        p = case["problem"]
        if name not in results:
            with np.load(options.source / f"{name}.npz") as file:
                results[name] = {key: file[key] for key in file.files}
        stored = results[name][case["array"]]
        if "statistics" in args and f"{args['statistics']}/lam" not in tables:
            with np.load(options.source / f"{args['statistics']}.npz") as file:
                tables |= {f"{args['statistics']}/{key}": file[key] for key in file.files}
        reference = manifest["references"][case["ref"]]
        if reference["start_coord"] == "ve":
            start = ["ve", float(reference["scale"])]
        else:
            start = ["vp", float(reference["scale"])]
        lam = boundaries(case, manifest)
        kept = {
            "id": case["id"],
            "p": p,
            "row": len(finals[p]),
            "process": case["process"],
            "method": case["method"],
            "steps": case.get("steps", 0),  # 0: adaptive
            "nfe": case["nfe"],
            "args": index("args", {k: short(v) for k, v in args.items() if k not in DROPPED}),
            "lam": index("lists", lam),
            "start": index("args", start),
        }
        if case["final_coord"] == "y":
            kept["y"] = 1
        # Only where the code's own time is the process's, not sigma.
        timed = name == "deis" or (
            name in ("dpm_solver", "unipc", "dc_solver") and case["process"] == "vplin"
        )
        if timed and "grid" in case and "t" in manifest["grids"][case["grid"]]:
            kept["t"] = index("lists", manifest["grids"][case["grid"]]["t"])
        if case.get("model_eval") == "timestep":
            kept["timesteps"] = index("lists", manifest["lists"][case["timesteps"]])
            kept["evals"] = index("lists", manifest["lists"][case["evals"]])
        elif case.get("evals", "grid") != "grid":
            kept["asked"] = index("lists", [float(v) for v in manifest["lists"][case["evals"]]])
        if "exact_quadrature_max_abs_diff" in case:
            kept["quadrature"] = case["exact_quadrature_max_abs_diff"]
        cases.append(kept)
        finals[p].append(stored[case["row"]][: SAMPLES[p]])

    for p, states in finals.items():
        arrays[f"{p}_final"] = np.array(states)
    width = max(map(len, rows["lists"]))
    arrays["lists"] = np.array([[*v, *[math.nan] * (width - len(v))] for v in rows["lists"]])
    versions = {
        name: entry.get("version", "") for name, entry in manifest["implementations"].items()
    }
    totals = collections.Counter(case["impl"] for case in manifest["cases"])
    text = json.dumps(
        {
            "about": "results of the official implementations on exact Gaussian mixtures, float64",
            "implementations": {
                name: {
                    "version": versions[name],
                    "cases": totals[name],
                    "left_out": dict(sorted(skipped[name].items())),
                }
                for name in sorted(totals)
            },
            "args": rows["args"],
        },
        indent=1,
    )
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    options.target.mkdir(exist_ok=True)
    (options.target / "cases.json").write_text(text[:-2] + f',\n "cases": [\n{lines}\n]}}\n')
    np.savez_compressed(options.target / "states.npz", **arrays)
    np.savez_compressed(options.target / "statistics.npz", **tables)
    print(f"{len(cases)} of {len(manifest['cases'])} cases kept")


if __name__ == "__main__":
    main()
