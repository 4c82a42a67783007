"""What calibration gains, beside every solver as it is and beside published learned samplers.

    python benchmarks/calibrate.py --out docs/calibrate.md --picture docs/calibrate.png

Models: a Gaussian mixture in 16 dimensions, the exact digits (8x8, kernel-smoothed), and the
bundled trained digits network, class by class. Error of a sample: root mean square over its
elements of the distance to the converged sample of the same model from the same noise. All errors
are over the same 512 fresh noises, which no fit and no choice has seen; for the solvers as they
are, the best grid and end are chosen on these very noises, which favours them.

Learned samplers that are published are restrictions of one program here, fitted by the same
optimiser from the same starts: times only (LD3, arXiv 2405.15506, with its decoupled network
times), coefficients only (S4S, arXiv 2502.17423), one ratio per step (DC-Solver, arXiv 2409.03755).
"One plan per class" is what `fewstep.calibrate(each="label")` makes of the learned plan; "by bands
of modes" is the learned plan with coefficients of their own for five bands of the principal
directions of the samples (method "bands"). For the exact digits, plans of the program and of its
restrictions are chosen by the median; all else by median times root mean square.

Plans are learned with as many network evaluations of single samples as EVALUATIONS says, each also
from the one before with fewer evaluations, as `fewstep.calibrate` does; seconds are of one core.
Parts are kept in benchmarks/.cache/calibrate; delete it to redo. Two processes with one torch
thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep._calibrate._calibrate import _BANDS, METHODS, candidate, found_in, screened
from fewstep._calibrate._learn import score
from fewstep._calibrate._recipe import called
from fewstep._calibrate._teacher import cycled, run_plan, shared_errors, taken

CACHE = Path(__file__).parent / ".cache" / "calibrate"
NFES = (4, 5, 6, 8, 10)
#: For fits, for the choice, for the report.
NOISES = {
    "mixture": (512, 512, 512),
    "exact digits": (512, 512, 512),
    "trained digits": (512, 128, 512),
}
#: Of those for fits, for restrictions of the program, which have fewer numbers.
FEWER = 256
#: Of every class, over the number of evaluations, so that all of these cost about as much to fit.
NOISES_PER_CLASS = 2000
EVALUATIONS = {"mixture": 12_000_000, "exact digits": 18_000_000, "trained digits": 500_000}
#: Of plans by bands, beside those of the learned plan that they start from.
BY_BANDS = {"mixture": 4_000_000, "exact digits": 10_000_000, "trained digits": 500_000}
#: And these have more numbers: more noises to fit, and where the model can answer in it, a dtype
#: that does not round its derivatives.
FINER = {
    "mixture": (512, torch.float64),
    "exact digits": (2048, torch.float64),
    "trained digits": (512, torch.float32),
}
#: What plans are chosen by. Of the exact digits a few samples become another digit under any small
#: error: which of 512 do changes the root mean square more than plans do.
CHOICE = {"mixture": "both", "exact digits": "median", "trained digits": "both"}
MODELS = ("mixture", "exact digits", "trained digits")
OTHERS = tuple(m for m in METHODS if m != "learned")
KINDS = {
    "solver": "best solver as it is",
    "compensated": "one ratio per step (DC-Solver)",
    "statistics": "model statistics (DPM-Solver-v3)",
    "search": "search (USF)",
    "times": "times only (LD3)",
    "coefficients": "coefficients only (S4S)",
    "learned": "learned plan",
    "bands": "learned, by bands of modes",
    "each": "learned, one plan per class",
}


def build(name: str) -> tuple[fs.Denoiser, tuple[int, ...], dict[str, Any]]:
    """A model, the shape of a sample, and its conditions."""
    if name == "mixture":
        means = np.random.default_rng(1).normal(size=(32, 16))
        model = fs.exact.Mixture(np.full(32, 1 / 32), means, [0.01] * 32)
        return model.denoiser(fs.EDM()), (16,), {}
    if name == "exact digits":
        return fs.exact.digits().denoiser(fs.EDM()), (1, 8, 8), {}
    return fs.models.load("digits"), (1, 8, 8), {"label": torch.arange(10)}


def teachers(
    name: str, quick: bool, finer: bool = False
) -> tuple[fs.Denoiser, tuple[int, ...], Any, list[fs.Teacher]]:
    """Training, held-out and test noises; the last with a finer converged solution."""
    model, shape, cond = build(name)
    train, held, test = NOISES[name]
    most, dtype = FINER[name] if finer else (train, torch.float32)
    choice = 256 if held <= 128 else 20_000  # clear of the report's
    places = zip((most, held, test), (10_000, choice, 384), (None, None, 400), strict=True)
    out = []
    for count, first, nfe in places:
        count = count // 8 if quick else count
        here = taken(cycled(cond, first + count), slice(first, None), first + count)
        made = fs.teach(model, shape, count, cond=here, first=first, nfe=nfe, dtype=dtype)
        out.append(made)
    return model, shape, cond, out


def row(name: str, kind: str, errors: np.ndarray, evaluations: int, seconds: float) -> dict:
    """One line of the tables."""
    line = candidate(0, name, kind, errors, errors, evaluations=evaluations, seconds=seconds)
    return asdict(line)


def solvers_as_they_are(name: str, nfe: int, quick: bool) -> list[dict]:
    """Every solver on its best grid and end, by median."""
    torch.set_num_threads(1)
    model, _, _, (_, _, test) = teachers(name, quick)
    plans, names = screened(model, nfe, "short" if quick else "all")
    rough = [float(np.median(e)) for e in shared_errors(test[:64], plans)]
    best: dict[str, list[int]] = {}
    for i in np.argsort(rough, kind="stable"):
        best.setdefault(names[i][0], []).append(int(i))
    chosen = [i for found in best.values() for i in found[:3]]
    errors = dict(zip(chosen, shared_errors(test, [plans[i] for i in chosen]), strict=True))
    out = []
    for found in best.values():
        i = min(found[:3], key=lambda k: float(np.median(errors[k])))
        out.append(row(called(*names[i]), "solver", errors[i], 0, 0.0))
    return sorted(out, key=lambda r: r["median"])


def folder(name: str, nfe: int, quick: bool) -> Path:
    """Where the parts of a calibration are."""
    return CACHE / f"{name.replace(' ', '-')}-{nfe}{'-quick' * quick}"


def fitted(name: str, nfe: int, quick: bool) -> list[dict]:
    """What calibration finds, and restrictions of its program that are published samplers."""
    torch.set_num_threads(1)
    model, shape, cond, (_, held, test) = teachers(name, quick)
    parts = folder(name, nfe, quick)
    few = min(len(held), 128)
    sizes = (2 * few, few, 2)  # noises 0 to 384: the others are the test's
    fs.calibrate(
        model,
        shape,
        nfe,
        cond=cond,
        methods=OTHERS,
        noises=sizes,
        candidates=300,
        resume=parts,
        progress=False,
    )
    found = [f for method in OTHERS for f in found_in(parts, f"{method}-{nfe}")]
    return [row(f.name, f.kind, test.errors(f.plan), f.evaluations, f.seconds) for f in found]


# Network calls only where they are cheap: exact models have no autograd through their time.
HOW = {"mixture": "differences", "exact digits": "differences", "trained digits": "reverse"}


def starts(model: fs.Model, held: fs.Teacher, nfe: int) -> list[fs.Plan]:
    """The best of every solver, four of them."""
    plans, names = screened(model, nfe)
    order = np.argsort([score(e) for e in shared_errors(held, plans)], kind="stable")
    best = {names[i][0]: plans[i] for i in order[::-1]}
    return [best[solver] for solver in dict.fromkeys(names[i][0] for i in order)][:4]


def restricted(name: str, nfe: int, quick: bool) -> list[dict]:
    """Restrictions of the learned plan's program that are published samplers."""
    torch.set_num_threads(1)
    model, _, _, (train, held, test) = teachers(name, quick)
    hand, out = starts(model, held, nfe), []
    for kind, what in (("times", "times and labels"), ("coefficients", "coefficients")):
        made = fs.learn(
            train[:FEWER],
            held,
            hand,
            what=what,
            choice=CHOICE[name],
            jacobian=HOW[name],
            first_step=False,
        )
        spent = made.evaluations, made.seconds
        out.append(row(made.name, kind, test.errors(made.plan), *spent))
    return out


def learned(name: str, nfe: int, quick: bool, shorter: int | None = None) -> list[dict]:
    """The learned plan."""
    torch.set_num_threads(1)
    model, _, _, (train, held, test) = teachers(name, quick)
    most = EVALUATIONS[name] // 10 if quick else EVALUATIONS[name]
    hand, began = starts(model, held, nfe), time.process_time()
    if shorter is not None:
        hand.append(fs.Plan.load(folder(name, shorter, quick) / LEARNED))
    made = fs.learn(
        train,
        held,
        hand,
        nfe=nfe,
        choice=CHOICE[name],
        jacobian=HOW[name],
        evaluations=most,
    )
    seconds = time.process_time() - began
    path = folder(name, nfe, quick) / LEARNED
    path.parent.mkdir(parents=True, exist_ok=True)
    made.plan.save(path)
    return [row(made.name, "learned", test.errors(made.plan), made.evaluations, seconds)]


LEARNED = "learned.safetensors"


def by_bands(name: str, nfe: int, quick: bool) -> list[dict]:
    """The learned plan with coefficients for every band."""
    torch.set_num_threads(1)
    model, _, _, (train, held, test) = teachers(name, quick, finer=True)
    most = BY_BANDS[name] // 10 if quick else BY_BANDS[name]
    start, began = fs.Plan.load(folder(name, nfe, quick) / LEARNED), time.process_time()
    made = fs.learn(
        train,
        held,
        [start],
        guards=starts(model, held, nfe),
        loss="log" if CHOICE[name] == "both" else "median",
        choice=CHOICE[name],
        jacobian=HOW[name],
        first_step=False,
        bands=_BANDS,
        evaluations=most,
    )
    seconds = time.process_time() - began
    return [row(made.name, "bands", test.errors(made.plan), made.evaluations, seconds)]


def all_learned(name: str, nfes: Sequence[int], quick: bool) -> list[tuple[Job, Any]]:
    """The learned plans of a model, one after the other."""
    pairs = zip((None, *nfes), nfes, strict=False)
    made = [part(("learned", name, nfe, quick), shorter=before) for before, nfe in pairs]
    return made + [part(("bands", name, nfe, quick)) for nfe in nfes]


def each(name: str, nfe: int, quick: bool) -> list[dict]:
    """One plan per class, from the noises of another seed."""
    torch.set_num_threads(1)
    model, shape, cond, (_, _, test) = teachers(name, quick)
    if not cond:
        return []
    began = time.process_time()
    made = fs.calibrate(
        model,
        shape,
        nfe,
        cond=cond,
        each="label",
        methods=["learned"],
        noises=(30, 15, 2) if quick else (NOISES_PER_CLASS // nfe, 110, 2),
        seed=1,
        progress=False,
    )
    seconds = time.process_time() - began
    spent, errors = made.info["evaluations"], test.errors(made.plans[nfe])
    return [row(made.chosen(nfe).name, "each", errors, spent, seconds)]


def distribution(name: str, nfe: int, quick: bool) -> dict[str, fs.metrics.Estimate]:
    """Sliced Wasserstein distances of 2,000 samples of the learned plan, and of the best solver as
    it is, to as many converged ones from other noises, and to the data."""
    torch.set_num_threads(1)
    model, shape, cond, _ = teachers(name, True)
    count = 200 if quick else 2000
    rng = np.random.default_rng(3)

    def drawn() -> dict[str, Any]:  # classes in turn would be nearer to each other than by chance
        return {k: v[torch.from_numpy(rng.integers(len(v), size=count))] for k, v in cond.items()}

    here, there = (
        fs.teach(model, shape, count, cond=drawn(), first=first, nfe=96)
        for first in (1 << 16, 1 << 17)
    )
    parts = folder(name, nfe, quick)
    plans = {
        "solver": found_in(parts, f"solver-{nfe}")[0].plan,
        "learned": fs.Plan.load(parts / LEARNED),
    }
    data = None if name == "mixture" else fs.exact.digits().sample(count, seed=5).float()
    samples = {kind: run_plan(model, run, here.x, here.cond) for kind, run in plans.items()}
    samples["converged"] = here.samples
    out: dict[str, fs.metrics.Estimate] = {}
    for kind, x in samples.items():
        out[f"{kind} to converged"] = fs.metrics.sliced_wasserstein(x, there.samples)
        if data is not None:
            out[f"{kind} to data"] = fs.metrics.sliced_wasserstein(x, data)
    return out


PARTS = {
    "solvers": solvers_as_they_are,
    "fitted": fitted,
    "restricted": restricted,
    "learned": learned,
    "bands": by_bands,
    "each": each,
    "distribution": distribution,
}
#: What runs beside the learned plans, and after them.
ALL = (("each", "restricted", "fitted", "solvers"), ("distribution",))
SHORT = (("solvers",),)
Job = tuple[str, str, int]
Results = dict[Job, Any]


def part(job: tuple[str, str, int, bool], **more: Any) -> tuple[Job, Any]:
    """One part of the measurement, from the cache if it is there."""
    kind, name, nfe, quick = job
    path = folder(name, nfe, quick) / f"{kind}.json"
    if not path.exists():
        began = time.time()
        result = PARTS[kind](name, nfe, quick, **more)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(result))
        path.with_suffix(".tmp").replace(path)
        print(
            f"{name}, NFE {nfe}, {kind}: {time.time() - began:.0f} s", file=sys.stderr, flush=True
        )
    return (kind, name, nfe), json.loads(path.read_text())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if math.isfinite(value) else "inf"


#: Where the lines of a kind are; the others are in "fitted".
PART = {
    "solver": "solvers",
    "times": "restricted",
    "coefficients": "restricted",
    "learned": "learned",
    "bands": "bands",
    "each": "each",
}


def page(
    results: Results, names: Sequence[str], nfes: Sequence[int], options: str, picture: str
) -> str:
    """The documentation page."""
    out = [
        "# What calibration gains",
        "",
        f"Made by `python benchmarks/calibrate.py{options}`, which says how. Errors are "
        "distances to the converged sample from the same noise, over 512 fresh noises: median / "
        "root mean square (of solvers as they are, the best of each). Below "
        "a method: the factor by which its median is smaller than that of the best solver as it "
        "is.",
        "",
        f"![errors against evaluations]({picture})",
    ]
    for name in names:
        out += ["", f"## {name[0].upper() + name[1:]}", ""]
        head = ["", *(f"NFE {n}" for n in nfes)]
        lines, above = [], []
        kinds = [k for k in KINDS if results.get((PART.get(k, "fitted"), name, nfes[0]))]
        for kind in kinds:
            label = KINDS[kind]
            cells, factors = [], []
            for n in nfes:
                best = best_of(results, name, n, kind)
                plain = best_of(results, name, n, "solver")
                cells.append(f"{number(best['median'])} / {number(best['rms'])}")
                factors.append(f"{plain['median'] / best['median']:.1f}x")
                if kind in ("learned", "bands", "each") and best["rms"] > plain["rms"]:
                    above.append(f"{label} at NFE {n}")
            lines.append([label, *cells])
            if kind != "solver":
                lines.append(["", *factors])
        out.append(table(head, lines))
        if above:
            out += ["", f"Root mean square above that of solvers as they are: {'; '.join(above)}."]
        said = "What the best solver was, and what fitting cost"
        if "each" in kinds:
            said += " (plans per class: with converged samples and everything else)"
        out += ["", f"{said}:", ""]
        lines = []
        for kind in kinds:
            best = [best_of(results, name, n, kind) for n in nfes]
            if kind == "solver":
                lines.append([KINDS[kind], *(b["name"] for b in best)])
            else:
                cost = [f"{b['evaluations'] / 1e3:,.0f}k, {b['seconds']:.0f} s" for b in best]
                lines.append([KINDS[kind], *cost])
        out.append(table(["evaluations of one sample, seconds on one core", *head[1:]], lines))
        out += ["", "Every solver as it is, on its best grid: median.", ""]
        solvers: dict[str, dict[int, float]] = {}
        for n in nfes:
            for r in results["solvers", name, n]:
                solvers.setdefault(r["name"].split(" on ")[0], {})[n] = r["median"]
        ranked = sorted(
            solvers, key=lambda s: np.mean([math.log(solvers[s].get(n, math.inf)) for n in nfes])
        )
        lines = [
            [f"`{s}`", *(number(solvers[s][n]) if n in solvers[s] else "" for n in nfes)]
            for s in ranked
        ]
        out.append(table(["solver", *head[1:]], lines))
    if ("distribution", names[0], nfes[0]) not in results:
        return "\n".join(out) + "\n"
    out += [
        "",
        "## Distributions",
        "",
        "Sliced 2-Wasserstein distance of 2,000 samples to as many converged ones of other noises "
        "and to the data, extrapolated to any number of samples, with 95 % intervals "
        "(`fewstep.metrics.sliced_wasserstein`). Converged samples are there for comparison: no "
        "method can be nearer to them but by chance.",
        "",
    ]
    lines = []
    for name in names:
        for n in nfes:
            d = results["distribution", name, n]
            cells = [
                "{} [{}, {}]".format(*map(number, d[key])) if key in d else ""
                for to in ("converged", "data")
                for key in (f"solver to {to}", f"learned to {to}", f"converged to {to}")
            ]
            lines.append([f"{name}, NFE {n}", *cells])
    what = ("solver as it is", "learned", "converged")
    head = ["", *(f"{w} to converged" for w in what), *(f"{w} to data" for w in what)]
    out.append(table(head, lines))
    out.append("")
    for to, words in (("converged", "converged samples"), ("data", "the data")):
        ours, solver = (
            nearer(results, names, nfes, *pair, to)
            for pair in (("learned", "solver"), ("solver", "learned"))
        )
        out.append(
            f"Nearer to {words}, by intervals that do not touch. The learned plan: {ours}. "
            f"The solver as it is: {solver}."
        )
    out.append(
        "Everywhere else these samples do not tell them apart, and there the distribution is not "
        "shown to improve. A learned plan goes where the model's own ODE goes: as near to the data "
        "as converged samples are."
    )
    return "\n".join(out) + "\n"


def nearer(
    results: Results, names: Sequence[str], nfes: Sequence[int], one: str, other: str, to: str
) -> str:
    """Where one is nearer than the other: their intervals do not touch."""
    found = [
        f"{name} at NFE {n}"
        for name in names
        for n in nfes
        for d in [results["distribution", name, n]]
        if f"{one} to {to}" in d and d[f"{one} to {to}"][2] < d[f"{other} to {to}"][1]
    ]
    return ", ".join(found) or "nowhere"


def best_of(results: Results, name: str, nfe: int, kind: str) -> dict:
    """The line of a kind with the least median; of solvers as they are, with the least root mean
    square of any of them."""
    rows = results[PART.get(kind, "fitted"), name, nfe]
    rows = [r for r in rows if r["kind"] == kind]
    best = min(rows, key=lambda r: r["median"])
    return {**best, "rms": min(r["rms"] for r in rows)} if kind == "solver" else best


def draw(results: Results, names: Sequence[str], nfes: Sequence[int], path: Path) -> None:
    """Errors against evaluations, one panel per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(names), 4.9), layout="constrained")
    colours = [
        "#777777",
        "#1b9e77",
        "#7570b3",
        "#e6ab02",
        "#66a61e",
        "#1f78b4",
        "#d95f02",
        "#e7298a",
        "#5c0a3c",
    ]
    for axes, name in zip(np.ravel(figure.subplots(1, len(names))), names, strict=True):
        for (kind, label), colour in zip(KINDS.items(), colours, strict=True):
            if not results.get((PART.get(kind, "fitted"), name, nfes[0])):
                continue
            best = [best_of(results, name, n, kind) for n in nfes]
            axes.plot(nfes, [b["median"] for b in best], "o-", color=colour, label=label)
            low, high = ([b[end] for b in best] for end in ("low", "high"))
            axes.fill_between(nfes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("network evaluations (NFE)")
        axes.grid(which="both", alpha=0.25)
    figure.axes[0].set_ylabel("median distance to the converged sample")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer noises, solvers and NFE")
    parser.add_argument(
        "--short", action="store_true", help="only solvers as they are, and learned plans"
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--nfe", nargs="*", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    nfes = sorted(chosen.nfe or ([4, 6] if chosen.quick else NFES))
    order = [(name, n) for name in reversed(MODELS) if name in chosen.models for n in nfes]
    results: Results = {}
    with ProcessPoolExecutor(chosen.jobs) as pool:
        plans = [pool.submit(all_learned, m, nfes, chosen.quick) for m in chosen.models]
        for kinds in SHORT if chosen.short else ALL:
            jobs = [(kind, name, n, chosen.quick) for name, n in order for kind in kinds]
            results.update(pool.map(part, jobs))
            results.update(line for made in plans for line in made.result())
    options = " --short" * chosen.short
    if chosen.models != list(MODELS):
        options += " --models " + " ".join(f'"{m}"' for m in chosen.models)
    if nfes != list(NFES):
        options += " --nfe " + " ".join(map(str, nfes))
    text = page(
        results, chosen.models, nfes, options, (chosen.picture or Path("calibrate.png")).name
    )
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text)
    if chosen.picture is not None:
        draw(results, chosen.models, nfes, chosen.picture)


if __name__ == "__main__":
    main()
