"""The commands: sample, calibrate, plan, solvers, models. The others have modules of their own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from ._calibrate._calibrate import METHODS, calibrate
from ._calibrate._picture import draw
from ._calibrate._recipe import Recipe
from ._command_arguments import (
    AnyModel,
    Device,
    Guidance,
    Shape,
    asked,
    check_device,
    integers,
)
from ._denoiser import Guided, Model
from ._grids import grids
from ._noise import Noise
from ._plan import Plan
from ._prediction import predictions, unknown
from ._process import EDM, VE, VP, CosineVP, DiscreteVP, Flow, Process
from ._sampling import DEFAULT_GRID, DEFAULT_SOLVER, plan, sample
from ._solvers._registry import solvers
from ._version import __version__
from .models import Bundled, find, load, models

__all__ = ["app", "run"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Sample diffusion and flow models in few network evaluations (NFE).",
)

PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": VP,
    "cosine": CosineVP,
    "linear-table": DiscreteVP.linear,
    "scaled-linear-table": DiscreteVP.scaled_linear,
    "squared-cosine-table": DiscreteVP.squared_cosine,
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
}


DEFAULT_NFE = 8


class Final(str, Enum):
    """Where a run ends."""

    zero = "zero"
    min = "min"


ModelName = Annotated[str, typer.Option("--model", "-m", help="Model to sample: `fewstep models`.")]
SolverName = Annotated[
    str | None,
    typer.Option("--solver", "-s", help=f"`fewstep solvers` lists them. Default {DEFAULT_SOLVER}."),
]
GridName = Annotated[
    str | None,
    typer.Option(
        "--grid",
        "-g",
        help=f"Placement of the times: {', '.join(grids)}; or a comma-separated list of times. "
        f"Default {DEFAULT_GRID}.",
    ),
]
Nfe = Annotated[
    int | None,
    typer.Option(
        "--nfe", "-n", help=f"Network evaluations to spend on every sample. Default {DEFAULT_NFE}."
    ),
]
FinalName = Annotated[
    Final | None,
    typer.Option(
        help="End at sigma = 0 (zero), or at the least noise the network knows (min). Default zero."
    ),
]


@app.command("sample")
def sample_command(
    model: ModelName = "digits",
    solver: SolverName = None,
    grid: GridName = None,
    nfe: Nfe = None,
    final: FinalName = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--class",
            "-c",
            help="Classes to draw in turn, such as 3, 0-4 or 1,3,7. Default: all of them.",
        ),
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance scale; 1 is none, more is stronger.")
    ] = 1.5,
    count: Annotated[int, typer.Option(help="Number of samples.")] = 50,
    seed: Annotated[int, typer.Option(help="Sample k depends on the seed and k alone.")] = 0,
    path: Annotated[
        bool,
        typer.Option(
            "--path", help="Stochastic solvers: one Brownian path, which more steps refine."
        ),
    ] = False,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Run this saved plan instead of solver, grid, nfe and final."),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="Run the plan that this recipe (`fewstep calibrate`) has for --nfe."
        ),
    ] = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path(
        "samples.png"
    ),
) -> None:
    """Draw samples from a bundled model and write them as one picture.

    Example: fewstep sample --nfe 6 --class 3,5 --out threes-and-fives.png
    """
    bundled = find(model)
    labels = _labels(bundled, classes, count)
    _check_picture(out)
    check_device(device)
    denoiser: Model = load(model, device)
    cond: dict[str, Any] = {}
    if labels is not None:
        cond = {"label": torch.tensor(labels, device=device)}
        denoiser = Guided(denoiser, guidance, bundled.uncond)
    chosen = _chosen(denoiser, solver, grid, nfe, final, plan_file, recipe_file, cond)
    begin = time.perf_counter()
    if path and not chosen.stochastic:
        name = chosen.about.get("solver", "the plan")
        raise ValueError(f"path: {name} draws no noise; `fewstep solvers` says which ones do")
    x = sample(
        denoiser,
        (count, *bundled.shape),
        solver=chosen,
        seed=seed,
        noise=Noise(seed, path=path),
        cond=cond,
        device=device,
    )
    seconds = time.perf_counter() - begin
    low, high = bundled.data_range
    distinct = 10 if labels is None else len(set(labels))  # one class per column, if it fits
    columns = distinct if 1 < distinct < 10 else 10
    _write_grid((x.float().cpu().numpy() - low) / (high - low), out, columns)
    each = f" of {denoiser.conditions} conditions each" if denoiser.conditions > 1 else ""
    print(
        f"{out}: {count} samples of {model}, {chosen.about.get('solver', 'plan')} on "
        f"{chosen.about.get('grid', 'its own')} grid, {chosen.nfe} evaluations{each}, seed {seed}, "
        f"{seconds:.2g} s"
    )


@app.command("calibrate")
def calibrate_command(
    model: AnyModel = "digits",
    nfe: Annotated[
        str, typer.Option("--nfe", "-n", help="Numbers of evaluations to find plans for.")
    ] = "5,6,8,10",
    shape: Shape = None,
    guidance: Guidance = None,
    each_class: Annotated[
        bool,
        typer.Option(
            "--each-class", help="Also learn a plan for every class; --noises are then per class."
        ),
    ] = False,
    methods: Annotated[
        str, typer.Option(help=f"What to try, of {', '.join(METHODS)}, bands.")
    ] = ",".join(METHODS),
    jacobian: Annotated[
        str,
        typer.Option(
            help="Of learned plans: reverse, forward, or differences (network calls only: for "
            "compiled, quantised, half-precision or remote networks)."
        ),
    ] = "reverse",
    noises: Annotated[
        str, typer.Option(help="Noises for fits, for the choice, and for the report.")
    ] = "256,128,256",
    budget: Annotated[
        float | None, typer.Option(help="Seconds; what does not fit is left out and named.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples per network call.")] = 256,
    seed: Annotated[int, typer.Option(help="Of all noises.")] = 0,
    device: Device = "cpu",
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw errors, and samples beside the converged ones, to this file."),
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Folder for finished parts; with the same one, a killed command goes on from "
            "there. Default: the recipe's name with .parts."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write.")] = Path(
        "recipe.fewstep.safetensors"
    ),
) -> None:
    """Fit samplers to a model, and write the best of each length to a recipe.

    Example: fewstep calibrate --guidance 1.5 --nfe 5,8 --out digits.recipe --picture errors.png,
    then: fewstep sample --guidance 1.5 --recipe digits.recipe --nfe 5
    """
    if not out.resolve().parent.is_dir():
        raise ValueError(f"out = {out}: the folder {out.resolve().parent} does not exist")
    if picture is not None:
        _check_picture(picture)
    check_device(device)
    counts, sizes = integers("nfe", nfe), integers("noises", noises)
    if len(sizes) != 3:
        raise ValueError(f"noises = {noises}; need three numbers, such as 256,128,256")
    known = asked(model, shape, guidance, device)
    if each_class and not known.cond:
        raise ValueError(
            f"each-class: {model} has no classes here; in Python: fewstep.calibrate(each=...)"
        )
    recipe = calibrate(
        known.model,
        known.shape,
        counts,
        cond=known.cond,
        each="label" if each_class else None,
        methods=[m.strip() for m in methods.split(",") if m.strip()],
        noises=(sizes[0], sizes[1], sizes[2]),
        jacobian=jacobian,
        budget=budget,
        seed=seed,
        batch=batch,
        resume=out.with_name(out.name + ".parts") if parts is None else parts,
        device=device,
    )
    recipe.save(out)
    print(recipe)
    if picture is not None:
        draw(recipe, picture, known.model, known.cond, known.data_range)
        print(f"drawn to {picture}")
    print(f"saved to {out}")


@app.command("plan")
def plan_command(
    solver: Annotated[str, typer.Argument(help="Solver: `fewstep solvers`.")] = DEFAULT_SOLVER,
    process: Annotated[
        str, typer.Option("--process", "-p", help=f"Noise process: {', '.join(PROCESSES)}.")
    ] = "vp",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A bundled model instead of a process.")
    ] = None,
    grid: GridName = None,
    nfe: Nfe = None,
    final: FinalName = None,
    predicts: Annotated[
        str, typer.Option(help=f"What the network predicts: {', '.join(predictions)}.")
    ] = "data",
    shift: Annotated[
        float | None, typer.Option(help="Timestep shift of the flow process, such as 3.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Begin at another level: sigma=2, rho=2, lambda=-1, t=0.5 or strength=0.6."
        ),
    ] = None,
    upward: Annotated[
        bool, typer.Option("--upward", help="From data to noise: inversion.")
    ] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="One linear combination after each network call.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Formula, order, stability, sources, other names.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw nodes, steps, orders, coefficients and stability (or what is drawn) to this "
            "picture; with several grids, --grid softened,karras, the nodes of all."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the plan to this file.")] = None,
) -> None:
    """Print a plan: every step's time, noise level, order and coefficients.

    Example: fewstep plan dpmpp_3m --process flow --shift 3 --nfe 6 --explain
    """
    more: dict[str, Any] = {"upward": upward, "start": _start(start)}
    if plot is not None:
        _check_picture(plot, "plot")
    on: Process | Model
    if model is not None:
        on = load(model)
    else:
        if process not in PROCESSES:
            raise ValueError(unknown("process", process, PROCESSES))
        if shift is not None and process != "flow":
            raise ValueError(f"shift = {shift} belongs to --process flow, not {process}")
        on = PROCESSES[process]() if shift is None else Flow(shift=shift)
        more["predicts"] = predicts
    names = [grid] if grid is None else [part.strip() for part in grid.split(",")]
    several = len(names) > 1 and any(name in grids for name in names)
    if several and save is not None:
        raise ValueError(f"grid = {grid} are {len(names)} grids, but --save writes one plan")
    made = [_plan(solver, on, nfe, name, final, **more) for name in (names if several else [grid])]
    shown = [one.fuse() if fused else one for one in made]
    for one, its in zip(made, shown, strict=True):
        print(its)
        if explain:
            print(f"\n{one.explain()}")
    if plot is not None:
        shown[0].plot(plot, *shown[1:])
        print(f"drawn to {plot}")
    if save is not None:
        shown[0].save(save)
        print(f"saved to {save}")


@app.command("solvers")
def solvers_command() -> None:
    """List the solvers: order, evaluations per step, behaviour at the ends, source."""
    table = Table("name", "order", "NFE per step", "ends", "source", title="Solvers")
    for name, solver in solvers.items():
        also = f"\n[dim]also {', '.join(solver.aliases)}[/dim]" if solver.aliases else ""
        order = str(solver.order)
        if solver.smooth_order:
            order += f" ({solver.smooth_order} on smoothly graded grids)"
        if solver.stochastic:
            order += f" weak, {solver.strong_order} strong" if solver.strong_order else " weak"
        ends = f"{solver.ends}. Fragile: {solver.fragile}" if solver.fragile else solver.ends
        table.add_row(name + also, order, str(solver.nfe_per_step), ends, solver.source)
    _console().print(table)


@app.command("models")
def models_command() -> None:
    """List the bundled models: sample shape, classes, process."""
    table = Table("name", "shape", "classes", "process", "what it is", title="Models")
    for name, model in models.items():
        shape = "x".join(map(str, model.shape))
        classes = f"0-{model.classes - 1}" if model.classes else "none"
        table.add_row(name, shape, classes, repr(model.process), model.summary)
    _console().print(table)


def _version(show: bool) -> None:
    if show:
        print(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sample diffusion and flow models in few network evaluations (NFE)."""


def run() -> None:
    """Run the commands; every mistake is one sentence on standard error and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"fewstep: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _console() -> Console:
    # A pipe has no width: give it one that keeps every cell on a line.
    return Console(width=None if sys.stdout.isatty() else 480)


def _chosen(
    denoiser: Model,
    solver: Any,
    grid: Any,
    nfe: int | None,
    final: Any,
    plan_file: Path | None,
    recipe_file: Path | None,
    cond: dict[str, Any] | None = None,
) -> Plan:
    """The plan that the options of a command name: compiled, of a file, or of a recipe."""
    if recipe_file is not None:
        given = {"solver": solver, "grid": grid, "final": final, "plan": plan_file}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} = {value}, but --recipe has its own; leave --{name} out")
        return Recipe.load(recipe_file).plan_for(denoiser, nfe, cond)
    if plan_file is None:
        return _plan(solver, denoiser, nfe, grid, final)
    given = {"solver": solver, "grid": grid, "nfe": nfe, "final": final}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is fixed by the plan {plan_file}; leave --{name} out")
    return Plan.load(plan_file)


def _plan(
    solver: str | None,
    on: Process | Model,
    nfe: int | None,
    grid: str | None,
    final: Final | None,
    **more: Any,
) -> Plan:
    solver = solver or DEFAULT_SOLVER
    if grid is None or grid in grids or not any(c.isdigit() for c in grid):
        end = Final.zero if final is None else final
        nfe = DEFAULT_NFE if nfe is None else nfe
        return plan(solver, on, nfe, grid=grid or DEFAULT_GRID, final=end.value, **more)
    if final is not None:
        raise ValueError(f"final = {final.value}, but a list of times ends where it ends")
    try:
        nodes = [float(part) for part in grid.split(",")]
    except ValueError:
        raise ValueError(unknown("grid", grid, grids) + ", or times such as 80,10,1,0") from None
    return plan(solver, on, nfe, grid=nodes, **more)


def _start(text: str | None) -> dict[str, float] | None:
    """sigma=2 as {"sigma": 2.0}; names and ranges are checked by the plan."""
    if text is None:
        return None
    kind, _, value = text.partition("=")
    try:
        return {kind.strip(): float(value)}
    except ValueError:
        raise ValueError(f"start = {text}; give for example sigma=2 or strength=0.6") from None


def _labels(bundled: Bundled, text: str | None, count: int) -> list[int] | None:
    """The class of every sample, in turn; None for a model without classes."""
    if count < 1:
        raise ValueError(f"count = {count}; need at least 1 sample")
    if not bundled.classes:
        if text is not None:
            raise ValueError(f"class = {text}, but model {bundled.name!r} has no classes")
        return None
    wanted: list[int] = []
    for part in (text or f"0-{bundled.classes - 1}").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"class = {text}; give numbers such as 3, 0-4 or 1,3,7")
        wanted += range(int(first), int(last or first) + 1)
    bad = [c for c in wanted if c >= bundled.classes]
    if bad or not wanted:
        raise ValueError(
            f"class = {text}; {bundled.name} has the classes 0 to {bundled.classes - 1}"
        )
    return [wanted[i % len(wanted)] for i in range(count)]


def _check_picture(out: Path, name: str = "out") -> None:
    """Refuse a picture that cannot be written before any work is done."""
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{name} = {out}; give a picture's name, such as samples.png")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"{name} = {out}: the folder {out.resolve().parent} does not exist")


def _write_grid(images: np.ndarray, out: Path, columns: int) -> None:
    """images (n, 1 or 3, height, width) in [0, 1], enlarged so that a person can see them."""
    n, channels, height, width = images.shape
    zoom, gap = max(1, 64 // max(height, width)), 4
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    rows = -(-n // columns)
    columns = min(columns, n)
    high, wide = height * zoom + gap, width * zoom + gap
    canvas = np.full((rows * high + gap, columns * wide + gap, channels), 48, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // columns * high + gap, i % columns * wide + gap
        canvas[y : y + height * zoom, x : x + width * zoom] = picture
    Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas).save(out)


from . import _compare_command, _generate_command  # noqa: E402, F401  (use what is above)
from ._convert import convert_command  # noqa: E402

app.command("convert")(convert_command)
