"""Every deterministic solver, and what calibration makes, on the networks trained on photographs.

    python benchmarks/patches.py --out docs/patches.md --picture docs/patches.png

Models: `patches-edm` and `patches-flow`, trained on crops of photographs (RGB, 32x32). Error of a
sample: root mean square over its elements of the distance to the converged sample of the same model
from the same noise.

Every solver runs on its best grid of GRIDS, which is chosen at every number of evaluations on
noises that are not reported. Errors are measured on two disjoint sets of noises (two seeds). Of two
methods, one is better than the other where in both sets its median error is smaller, and the 95 %
interval of the median of the paired ratios (`fewstep.metrics.error_ratio`) leaves out 1; otherwise
they are tied.

Frechet distance: of features of the bundled classifier, of FRECHET_SAMPLES samples to as many
converged samples of other noises, and to data.

Calibrated samplers are fitted at fewer numbers of evaluations, with as many network evaluations as
LEARNING, SEARCHING and the counts of noises say. Parts are kept in benchmarks/.cache/patches, for
these weights (other settings: delete it); a killed run goes on from there. Two processes with one
torch thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep import metrics
from fewstep._calibrate._calibrate import v3_variants
from fewstep._calibrate._learn import score
from fewstep._calibrate._teacher import Counted, run_plan, shared_errors
from fewstep._sampling import DEFAULT_GRID, DEFAULT_SOLVER

CACHE = Path(__file__).parent / ".cache" / "patches"
MODELS = ("patches-edm", "patches-flow")
NFES = (4, 5, 6, 8, 10, 15, 20)
GRIDS = ("softened_8", "softened", "lambda", "karras", "uniform", "quadratic")
#: Where calibrated samplers are fitted, and where distributions are compared.
CALIBRATED, DISTRIBUTIONS = (5, 6, 8, 10), (5, 8)
#: Noises of each of the two reports; on which grids are chosen, up to 10 evaluations and above;
#: for fits, and for the choice of fits.
REPORT, CHOICE, FEWER, FITTED, HELD = 40, 8, 4, 64, 32
FRECHET_SAMPLES = 512
#: Network evaluations of single samples, for one number of evaluations.
LEARNING, SEARCHING = 30_000, 20_000
#: Of the model's statistics: samples and levels; noises and grids on which a table is chosen.
EMS_SAMPLES, EMS_LEVELS, EMS_HELD = 48, 80, 16
EMS_GRIDS = ("lambda", "softened", "softened_8")
#: Seeds of the noises: two reports, the choice of grids, fits, samples, converged samples.
REPORTS, CHOOSING, FITTING, SAMPLES, REFERENCE = (0, 1), 2, 3, 4, 5
#: Solvers of a trial: the default, and what users have.
TRIED = ("flow_ipndm_2", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc_2", "heun", "ipndm_4")
KINDS = {
    "solver": "best solver as it is",
    "statistics": "model statistics (DPM-Solver-v3)",
    "search": "search (USF)",
    "learned": "learned plan",
}
#: What users get who choose nothing: its grid is not the best one.
DEFAULT = f"the default ({DEFAULT_SOLVER} on {DEFAULT_GRID})"
FITS = tuple(kind for kind in KINDS if kind != "solver")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One part of the measurement."""

    kind: str
    model: str
    nfe: int
    quick: bool

    @property
    def folder(self) -> Path:
        """Of the parts of this model with its weights."""
        return CACHE / f"{self.model}-{digest(self.model)}{'-quick' * self.quick}"

    @property
    def path(self) -> Path:
        """Of what was found; of distances, with the weights of the classifier."""
        name = f"{self.kind}-{self.nfe}"
        if self.kind == "distributions":
            name += f"-{digest(fs.models.find(self.model).features or '')}"
        return self.folder / f"{name}.json"

    def count(self, n: int) -> int:
        """So many, or fewer in a trial."""
        return max(8, n // 8) if self.quick else n


@cache
def digest(name: str) -> str:
    """Eight digits that change with the weights of a model, or of its classifier."""
    known = fs.models.models
    network = fs.models.load(name).network if name in known else fs.models.classifier(name)
    if not isinstance(network, torch.nn.Module):
        return "exact"
    seen = hashlib.sha256()
    for tensor in network.state_dict().values():
        seen.update(tensor.numpy().tobytes())
    return seen.hexdigest()[:8]


# -- the model, its noises and converged samples ---------------------------------------------------


def build(name: str) -> tuple[fs.Denoiser, tuple[int, ...], int]:
    """A bundled model, the shape of a sample, and its number of classes."""
    bundled = fs.models.find(name)
    return fs.models.load(name), bundled.shape, bundled.classes


def conditions(classes: int, count: int, seed: int) -> dict[str, Any]:
    """Classes at random, where the model has any."""
    if not classes:
        return {}
    return {"label": torch.from_numpy(np.random.default_rng(seed).integers(classes, size=count))}


def teacher(job: Job, seed: int, count: int, nfe: int | None = None) -> fs.Teacher:
    """Noises of a seed and where they lead, from the cache if they are there."""
    model, shape, classes = build(job.model)
    cond = conditions(classes, count, seed)
    path = job.folder / f"converged-{seed}-{count}.safetensors"
    if not path.exists():
        made = fs.teach(model, shape, count, seed=seed, cond=cond, nfe=nfe, batch=64)
        if not bool(made.samples.isfinite().all()):
            raise FloatingPointError(f"{job.model}: converged samples are not finite")
        facts = torch.tensor([made.error, made.nfe], dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": made.x, "samples": made.samples, "facts": facts}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    kept = load_file(path)
    error, spent = kept["facts"].tolist()
    return fs.Teacher(model, kept["x"], kept["samples"], cond, error, int(spent), batch=64)


def reports(job: Job) -> list[fs.Teacher]:
    """The two sets of noises that are reported."""
    return [teacher(job, seed, job.count(REPORT)) for seed in REPORTS]


def converged(job: Job) -> dict[str, Any]:
    """Makes the converged samples that later parts need."""
    seed = job.nfe  # a part per seed
    sizes = {
        **dict.fromkeys(REPORTS, REPORT),
        CHOOSING: CHOICE,
        FITTING: FITTED + HELD,
        SAMPLES: FRECHET_SAMPLES,
        REFERENCE: FRECHET_SAMPLES,
    }
    many = 64 if seed in (SAMPLES, REFERENCE) else None
    made = teacher(job, seed, job.count(sizes[seed]), many)
    return {"nfe": made.nfe, "error": made.error, "evaluations": made.nfe * len(made)}


# -- solvers as they are ---------------------------------------------------------------------------


def compiled(job: Job) -> tuple[list[fs.Plan], list[tuple[str, str]], dict[str, str]]:
    """Every deterministic solver on every grid, their (solver, grid), and why one is missing."""
    model, _, _ = build(job.model)
    plans, names, missing = [], [], {}
    for solver in fs.solvers.values():
        if solver.stochastic or solver.adaptive or (job.quick and solver.name not in TRIED):
            continue
        for grid in GRIDS:
            try:
                made = fs.plan(solver, model, job.nfe, grid=grid)
            except ValueError as error:
                missing.setdefault(solver.name, str(error).splitlines()[0])
                continue
            if made.given == 1:
                plans.append(made)
                names.append((solver.name, grid))
    found = {solver for solver, _ in names}
    return plans, names, {k: v for k, v in missing.items() if k not in found}


def choice(job: Job) -> dict[str, Any]:
    """The best grid of every solver, by the mean log error."""
    plans, names, missing = compiled(job)
    some = teacher(job, CHOOSING, job.count(CHOICE))[: CHOICE if job.nfe <= 10 else FEWER]
    counted = Counted(some.model)
    errors = shared_errors(replace(some, model=counted), plans)
    best: dict[str, tuple[float, str]] = {}
    for (solver, grid), e in zip(names, errors, strict=True):
        rank = float(np.log(e + np.finfo(float).tiny).mean())
        if solver not in best or rank < best[solver][0]:
            best[solver] = (rank, grid)
    grids = {solver: grid for solver, (_, grid) in best.items()}
    return {"grids": grids, "missing": missing, "evaluations": counted.evaluations}


def chosen(job: Job) -> dict[str, tuple[str, fs.Plan]]:
    """Every solver: its grid and its plan."""
    model, _, _ = build(job.model)
    grids = part(replace(job, kind="choice"))["grids"]
    return {s: (grid, fs.plan(s, model, job.nfe, grid=grid)) for s, grid in grids.items()}


# -- calibrated ------------------------------------------------------------------------------------


def fit_noises(job: Job) -> tuple[fs.Teacher, fs.Teacher]:
    """For fits, and for the choice of what is fitted."""
    both = teacher(job, FITTING, job.count(FITTED + HELD))
    n = len(both) * FITTED // (FITTED + HELD)
    return both[:n], both[n:]


def fitted(job: Job, kind: str) -> dict[str, Any]:
    """A calibrated plan: saved, with its name and what finding it cost."""
    model, _, _ = build(job.model)
    train, held = fit_noises(job)
    counted = Counted(model)
    train, held = replace(train, model=counted), replace(held, model=counted)
    began = time.process_time()
    if kind == "learned":
        most = LEARNING // 8 if job.quick else LEARNING
        made = fs.learn(train, held, starts(job, counted, held), evaluations=most)
        name, run = made.name, made.plan
    elif kind == "search":
        most = SEARCHING // 8 if job.quick else SEARCHING
        run, name = fs.search(train, held, job.nfe, evaluations=most).plan, "staged search"
    else:
        name, run = with_statistics(job, counted, train, held)
    seconds = time.process_time() - began
    run.save(job.folder / f"{kind}-{job.nfe}.safetensors")
    return {"name": name, "evaluations": counted.evaluations, "seconds": seconds}


def starts(job: Job, model: fs.Model, held: fs.Teacher, count: int = 3) -> list[fs.Plan]:
    """The best solvers on the noises of the choice."""
    found = list(chosen(job).values())
    errors = shared_errors(held[:EMS_HELD], [run for _, run in found])
    best = np.argsort([score(e) for e in errors], kind="stable")[:count]
    return [found[i][1] for i in best]


def with_statistics(
    job: Job, model: fs.Model, train: fs.Teacher, held: fs.Teacher
) -> tuple[str, fs.Plan]:
    """DPM-Solver-v3 with the model's statistics, estimated once for every number of evaluations."""
    path = job.folder / "statistics.safetensors"
    if path.exists():
        ems = fs.EMS.load(path)
    else:
        some = train[: job.count(EMS_SAMPLES)]
        ems = fs.estimate_ems(
            model,
            some.samples,
            cond=some.cond or None,
            levels=EMS_LEVELS // 4 if job.quick else EMS_LEVELS,
            progress=False,
        )
        ems.save(path)
    plans, names = [], []
    for label, table in (("", ems), (", mean", ems.reduced("scalar"))):
        for solver, grid in itertools.product(v3_variants(table), EMS_GRIDS):
            try:
                plans.append(fs.plan(solver, model, job.nfe, grid=grid))
            except ValueError:
                continue
            names.append(f"{solver.name}{label} on {grid}")
    best = int(np.argmin([score(e) for e in shared_errors(held[:EMS_HELD], plans)]))
    return names[best], plans[best]


# -- errors and distributions ----------------------------------------------------------------------


def methods(job: Job) -> dict[str, tuple[str, str, fs.Plan]]:
    """Every method of this number of evaluations: its kind, its grid or name, its plan."""
    out = {solver: ("solver", grid, run) for solver, (grid, run) in chosen(job).items()}
    model, _, _ = build(job.model)
    out[DEFAULT] = ("default", "", fs.plan(DEFAULT_SOLVER, model, job.nfe))
    if job.nfe in CALIBRATED:
        for kind in FITS:
            name = part(replace(job, kind=kind))["name"]
            run = fs.Plan.load(job.folder / f"{kind}-{job.nfe}.safetensors")
            out[KINDS[kind]] = (kind, name, run)
    return out


def errors(job: Job) -> dict[str, Any]:
    """The errors of every method on both sets of noises."""
    found = methods(job)
    runs = [run for _, _, run in found.values()]
    lines = {
        name: {"kind": kind, "label": label, "errors": []}
        for name, (kind, label, _) in found.items()
    }
    spent = 0
    for test in reports(job):
        counted = Counted(test.model)
        its = shared_errors(replace(test, model=counted), runs)
        spent += counted.evaluations
        for line, e in zip(lines.values(), its, strict=True):
            line["errors"].append(e.tolist())
    return {"lines": lines, "evaluations": spent}


def distributions(job: Job) -> dict[str, Any]:
    """Frechet distances of features to converged samples of other noises, and to the data."""
    model, _, _ = build(job.model)
    name = fs.models.find(job.model).features
    assert name is not None
    network, data = metrics.bundled_features(name), fs.models.data_features(name)
    count = job.count(FRECHET_SAMPLES)
    here, there = teacher(job, SAMPLES, count), teacher(job, REFERENCE, count)
    reference = metrics.features(there.samples, network)
    runs = {m: run for m, (_, _, run) in methods(job).items()}
    out = {}
    for m in (*runs, "converged"):
        x = run_plan(model, runs[m], here.x, here.cond, 64) if m in runs else here.samples
        if not bool(x.isfinite().all()):
            out[m] = [[math.inf] * 3] * 2
            continue
        f = metrics.features(x, network)
        with warnings.catch_warnings():  # of a trial with too few samples
            warnings.simplefilter("ignore" if job.quick else "default")
            out[m] = [list(metrics.frechet_distance(f, other)) for other in (reference, data)]
    return {"lines": out, "evaluations": count * job.nfe * len(runs)}


PARTS: dict[str, Any] = {
    "converged": converged,
    "choice": choice,
    **{kind: lambda job: fitted(job, job.kind) for kind in FITS},
    "errors": errors,
    "distributions": distributions,
}


def part(job: Job) -> dict[str, Any]:
    """One part, from the cache if it is there."""
    path = job.path
    if not path.exists():
        torch.set_num_threads(1)
        began = time.process_time()
        result = PARTS[job.kind](job)
        result["core seconds"] = time.process_time() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(result))
        path.with_suffix(".tmp").replace(path)
        said = f"{result['evaluations']:,} evaluations, {result['core seconds']:.0f} s of a core"
        print(f"{job.model}, {job.kind} {job.nfe}: {said}", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


# -- which differ ----------------------------------------------------------------------------------


def pooled(line: dict[str, Any]) -> tuple[float, float]:
    """Median and root mean square over both sets of noises."""
    e = np.concatenate(line["errors"])
    return float(np.median(e)), float(np.sqrt(np.mean(np.square(e))))


@dataclass(frozen=True)
class Order:
    """Methods in the order of their pooled medians; better[i, j]: i is better than j in both sets.

    tau, rho: Kendall's and Spearman's correlation of the two orders. changed: pairs, as a share,
    whose medians are in another order in the other set. tied: pairs that are ties.
    """

    names: list[str]
    better: NDArray[np.bool_]
    tau: float
    rho: float
    changed: float
    tied: float

    def rank(self, name: str) -> int:
        """One more than the number of methods that are better."""
        return 1 + int(self.better[:, self.names.index(name)].sum())

    def ties(self, name: str) -> list[str]:
        """The methods that it is tied with."""
        i = self.names.index(name)
        out = ~(self.better[i] | self.better[:, i])
        return [other for k, other in enumerate(self.names) if out[k] and k != i]


def order(lines: dict[str, Any]) -> Order:
    """Which methods differ."""
    names = sorted(lines, key=lambda m: pooled(lines[m])[0])
    n = len(names)
    medians = np.array([[np.median(e) for e in lines[m]["errors"]] for m in names])
    better = np.zeros((n, n), dtype=bool)
    changed = concordant = pairs = 0
    for i, j in itertools.combinations(range(n), 2):
        a, b = medians[i], medians[j]
        pairs += 1
        below, above = bool((a < b).all()), bool((a > b).all())
        concordant += below or above
        changed += bool((a < b).any() and (a > b).any())
        if not (below or above):
            continue
        ratios = [
            metrics.error_ratio(e, f)
            for e, f in zip(lines[names[i]]["errors"], lines[names[j]]["errors"], strict=True)
        ]
        better[i, j] = below and all(r.high < 1 for r in ratios)
        better[j, i] = above and all(r.low > 1 for r in ratios)
    ranks = np.argsort(np.argsort(medians, axis=0, kind="stable"), axis=0)
    rho = float(np.corrcoef(ranks.T)[0, 1]) if n > 2 else math.nan
    tau = (concordant - changed) / pairs
    tied = 1 - float((better | better.T).sum()) / (2 * pairs)
    return Order(names, better, tau, rho, changed / pairs, tied)


# -- the page --------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "inf"


def estimate(value: Sequence[float]) -> str:
    """A value and its interval."""
    return f"{number(value[0])} ({number(value[1])} to {number(value[2])})"


def shown(name: str) -> str:
    """A solver as code."""
    return f"`{name}`" if name in fs.solvers else name


Results = dict[tuple[str, str, int], dict[str, Any]]


def section(results: Results, name: str, nfes: Sequence[int]) -> list[str]:
    """What one model's numbers say."""
    lines = {n: results["errors", name, n]["lines"] for n in nfes}
    orders = {n: order(lines[n]) for n in nfes}
    plain = {n: [m for m in orders[n].names if lines[n][m]["kind"] == "solver"] for n in nfes}
    out = ["", f"## {name}", "", "### Which solver, as it is", ""]
    rows = []
    for n in nfes:
        best = plain[n][0]
        ties = [m for m in orders[n].ties(best) if m in plain[n]]
        said = ", ".join(f"`{m}`" for m in ties[:4])
        said += f" and {len(ties) - 4} more" if len(ties) > 4 else ""
        both = (np.concatenate(lines[n][m]["errors"]) for m in (DEFAULT, best))
        ratio = estimate(metrics.error_ratio(*both))
        median, rms = pooled(lines[n][best])
        where = f"`{best}` on {lines[n][best]['label']}"
        rows.append([str(n), where, f"{number(median)} / {number(rms)}", said or "none", ratio])
    head = ["NFE", "smallest median", "median / RMS", "tied with it", "the default over it"]
    out.append(table(head, rows))
    head = ["", *(f"NFE {n}" for n in nfes)]
    fits = [n for n in nfes if any(lines[n][m]["kind"] in FITS for m in lines[n])]
    if fits:
        out += ["", "### What calibration gains", ""]
        out += [
            "Median / root mean square, over the noises of both reports, and the median of the "
            "ratios to the best solver as it is with its interval (below 1: better).",
            "",
        ]
        rows = []
        for kind, label in KINDS.items():
            cells, ratios, costs = [], [], []
            for n in fits:
                m = plain[n][0] if kind == "solver" else label
                cells.append(" / ".join(map(number, pooled(lines[n][m]))))
                both = (np.concatenate(lines[n][k]["errors"]) for k in (m, plain[n][0]))
                ratios.append(estimate(metrics.error_ratio(*both)))
                if kind != "solver":
                    cost = results[kind, name, n]
                    costs.append(f"{cost['evaluations'] / 1e3:,.0f}k")
            rows.append([label, *cells])
            if kind != "solver":
                rows += [["ratio", *ratios], ["evaluations of one sample to find it", *costs]]
        out.append(table(["", *(f"NFE {n}" for n in fits)], rows))
    out += ["", "### Distributions", ""]
    out += [
        f"Squared Frechet distance of features of {results['count', '', 0]['samples']} samples to "
        "converged samples of other noises, then to the data, with 95 % intervals; extrapolated in "
        "the number of samples, so it may be negative. Noises and references are the same for all "
        "methods. None is nearer to converged samples than converged samples but by chance.",
        "",
    ]
    where = [n for n in nfes if ("distributions", name, n) in results]
    distances = {n: results["distributions", name, n]["lines"] for n in where}
    seen = list(dict.fromkeys(m for n in where for m in distances[n]))

    def far(m: str) -> tuple[int, float]:
        values = [distances[n][m][0][0] for n in where if m in distances[n]]
        return -len(values), float(np.mean(values))

    seen = ["converged", *sorted((m for m in seen if m != "converged"), key=far)]
    rows = [
        [
            shown(m),
            *(
                "<br>".join(map(estimate, distances[n][m])) if m in distances[n] else ""
                for n in where
            ),
        ]
        for m in seen
    ]
    out.append(table(["", *(f"NFE {n}" for n in where)], rows))
    out += ["", "### Do two seeds agree", ""]
    rows = [
        ["Kendall's tau of the two orders", *(f"{orders[n].tau:.3f}" for n in nfes)],
        ["Spearman's rho", *(f"{orders[n].rho:.3f}" for n in nfes)],
        ["pairs in another order", *(f"{orders[n].changed:.1%}" for n in nfes)],
        ["pairs that are ties", *(f"{orders[n].tied:.1%}" for n in nfes)],
    ]
    out.append(table(head, rows))
    out += [
        "",
        "### Every method",
        "",
        "Median / root mean square over the noises of both reports; rank: one more than the number "
        "of methods that are better in both, so that ties have close ranks; the grid.",
        "",
    ]

    def overall(m: str) -> float:
        kept = [n for n in nfes if m in lines[n]]
        return float(
            np.mean(
                [np.log(pooled(lines[n][m])[0] / pooled(lines[n][plain[n][0]])[0]) for n in kept]
            )
        )

    def cell(m: str, n: int) -> str:
        if m not in lines[n]:
            return ""
        median, rms = pooled(lines[n][m])
        grid = lines[n][m]["label"] if lines[n][m]["kind"] == "solver" else ""
        return f"{number(median)} / {number(rms)}<br>{orders[n].rank(m)} {grid}".rstrip()

    every = sorted({m for n in nfes for m in lines[n]}, key=lambda m: (overall(m), m))
    out.append(table(head, [[shown(m), *(cell(m, n) for n in nfes)] for m in every]))
    missing = {m: why for n in nfes for m, why in results["choice", name, n]["missing"].items()}
    if missing:
        out += ["", "Not there at every number of evaluations:", ""]
        out += [f"- `{m}`: {why}" for m, why in sorted(missing.items())]
    return out


def page(results: Results, names: Sequence[str], nfes: Sequence[int]) -> str:
    """The documentation page."""
    spent = sum(r.get("evaluations", 0) for r in results.values())
    cores = sum(r.get("core seconds", 0.0) for r in results.values())
    made = [results["converged", name, seed] for name in names for seed in REPORTS]
    worst = max(r["error"] for r in made)
    counts = results["count", "", 0]
    out = [
        "# Solvers on networks trained on photographs",
        "",
        "Made by `python benchmarks/patches.py`, which says how. Errors are distances to the "
        f"converged sample from the same noise, over two times {counts['report']} noises; every "
        "solver on its best of the grids "
        f"{', '.join(f'`{g}`' for g in GRIDS)}, chosen on other noises. Converged samples are "
        f"{max(r['nfe'] for r in made)} steps or fewer, whose median distance to twice as many is "
        f"at most {number(worst)}. All of it took {spent / 1e6:.1f} million evaluations of one "
        f"sample ({cores / 60:.0f} minutes of one core where this page was made).",
        "",
        "![errors and distances against evaluations](patches.png)",
    ]
    for name in names:
        out += section(results, name, nfes)
    return "\n".join(out) + "\n"


def draw(results: Results, names: Sequence[str], nfes: Sequence[int], path: Path) -> None:
    """Work and precision: errors above, distances of features below, a column per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(names) + 1, 9.5), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False)
    named = {
        "flow_ipndm_2": ("#0072b2", "o"),
        "ddim": ("#999999", "v"),
        "dpmpp_2m": ("#009e73", "s"),
        "unipc_2": ("#56b4e9", "D"),
        "heun": ("#cc79a7", "^"),
        KINDS["statistics"]: ("#e69f00", "P"),
        KINDS["search"]: ("#f0e442", "X"),
        KINDS["learned"]: ("#d55e00", "*"),
    }
    for (above, below), name in zip(panels.T, names, strict=True):
        lines = {n: results["errors", name, n]["lines"] for n in nfes}
        every = sorted({m for n in nfes for m in lines[n]})
        medians = {m: {n: pooled(lines[n][m])[0] for n in nfes if m in lines[n]} for m in every}
        for m in every:
            if m not in named:
                above.plot(*zip(*medians[m].items(), strict=True), color="0.87", lw=0.8, zorder=0)
        plain = [m for m in every if m in fs.solvers]
        best = [min(medians[m][n] for m in plain if n in medians[m]) for n in nfes]
        above.plot(nfes, best, "--", color="black", label="best of all solvers")
        for m, (colour, mark) in named.items():
            if m in medians:
                x, y = zip(*medians[m].items(), strict=True)
                above.plot(x, y, f"{mark}-", color=colour, label=m, markeredgecolor="0.2", mew=0.4)
        least = min(v for m in (*named, *plain) for v in medians.get(m, {}).values())
        most = max(medians["ddim"].values())
        above.set_ylim(0.4 * least, 2.5 * most)
        above.set_title(name)
        above.set_ylabel("median distance to the converged sample")
        where = [n for n in nfes if ("distributions", name, n) in results]
        distances = {n: results["distributions", name, n]["lines"] for n in where}
        value, low, high = np.array([distances[n]["converged"][0] for n in where]).T
        below.fill_between(where, low, high, color="0.9", label="converged samples")
        floor = float(high.max())
        for k, (m, (colour, mark)) in enumerate(named.items()):
            x = [n for n in where if m in distances[n] and math.isfinite(distances[n][m][0][0])]
            if not x:
                continue
            value, low, high = np.array([distances[n][m][0] for n in x]).T
            at = np.array(x) * (1 + 0.006 * (k - 4))  # side by side
            reach = [value - low, high - value]
            below.errorbar(at, value, reach, fmt=f"{mark}-", color=colour, elinewidth=0.8)
        below.set_ylabel("Frechet distance of features to converged samples")
        above.set_yscale("log")
        # Estimates without bias may be negative: linear where distances are no more than chance.
        below.set_yscale("symlog", linthresh=floor)
        for ax in (above, below):
            ax.set_xscale("log")
            ticks = nfes if ax is above else where
            ax.set_xticks(ticks, map(str, ticks))
            ax.minorticks_off()
            ax.set_xlabel("network evaluations (NFE)")
            ax.grid(alpha=0.25)
    handles, said = panels[0, 0].get_legend_handles_labels()
    (extra,), (what,) = panels[1, 0].get_legend_handles_labels()
    columns = 2 + 2 * min(len(names), 2)
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 9}
    figure.legend([*handles, extra], [*said, what], **place)
    figure.suptitle("grey: every other solver on its best grid; bars: 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer noises and solvers: a trial")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(fs.models.models))
    parser.add_argument("--nfe", nargs="*", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    nfes = sorted(set(args.nfe or ([5, 8] if args.quick else NFES)))

    def jobs(kinds: Sequence[str], counts: Sequence[int]) -> list[Job]:
        # The longest first: what is left at the end is short.
        its = sorted(counts, reverse=True)
        return [Job(k, m, n, args.quick) for n in its for m in args.models for k in kinds]

    both = [n for n in nfes if n in CALIBRATED]
    seeds = (*REPORTS, CHOOSING, FITTING, SAMPLES, REFERENCE)
    phases = [
        jobs(["converged"], seeds),
        jobs(["choice"], nfes),
        jobs(["statistics"], both[:1]),  # estimates what the others read
        jobs(["learned", "search", "statistics"], both),
        jobs(["errors"], nfes),
        jobs(["distributions"], [n for n in nfes if n in DISTRIBUTIONS]),
    ]
    results: Results = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for phase in phases:
            for job, found in zip(phase, pool.map(part, phase), strict=True):
                results[job.kind, job.model, job.nfe] = found
    size = Job("", "", 0, args.quick).count
    results["count", "", 0] = {"report": size(REPORT), "samples": size(FRECHET_SAMPLES)}
    text = page(results, args.models, nfes)
    print(text)
    if args.out is not None:
        args.out.write_text(text)
    if args.picture is not None:
        draw(results, args.models, nfes, args.picture)


if __name__ == "__main__":
    main()
