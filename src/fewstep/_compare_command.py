"""The commands `compare` and `recommend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ._calibrate._recipe import Recipe
from ._command_arguments import AnyModel, Asked, Device, Guidance, Shape, asked, check_device
from ._commands import _console, app
from ._compare._compare import GRIDS, SOLVERS, fits, prepare
from ._compare._numbers import Comparison
from ._compare._recommend import recommend
from ._sampling import DEFAULT_SOLVER

__all__ = ["compare_command", "recommend_command"]


@app.command("compare")
def compare_command(
    models: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Bundled models (`fewstep models`), or package.module:name of your own denoiser "
            "(or of a function that returns it), separated by commas.",
        ),
    ] = "digits",
    solvers: Annotated[
        str | None,
        typer.Option("--solvers", "-s", help=f"Names, or all. Default: {', '.join(SOLVERS)}."),
    ] = None,
    nfe: Annotated[
        str, typer.Option("--nfe", "-n", help="Numbers of evaluations, such as 5,8 or 3-10,20.")
    ] = "3-8,10,12,15,20",
    grids: Annotated[
        str, typer.Option(help="Grids, of which every solver gets the best.")
    ] = ",".join(GRIDS),
    recipes: Annotated[
        list[Path] | None,
        typer.Option(
            "--recipe",
            help="Also run this recipe (`fewstep calibrate`), where it was made for the model. "
            "May be given several times.",
        ),
    ] = None,
    shape: Shape = None,
    guidance: Guidance = None,
    count: Annotated[int, typer.Option(help="Noises that errors are measured on.")] = 256,
    seed: Annotated[int, typer.Option(help="Of all noises.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples per network call.")] = 256,
    device: Device = "cpu",
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Folder for finished parts; with the same one, a killed command goes on from "
            "there. Default: the report's name with .parts."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path(
        "report"
    ),
) -> None:
    """Compare solvers and recipes on models, and write a report that opens in a browser.

    Every solver runs on its best grid, from the same noises; errors are distances to the model's
    own converged samples.

    Example: fewstep compare --model digits --solvers dpmpp_2m,unipc_3,flow_ipndm_2 --nfe 3-8
    """
    from ._compare._figures import new_figure
    from ._compare._report import write

    new_figure()  # without matplotlib it is said now, and not when everything has been measured
    if not out.resolve().parent.is_dir():
        raise ValueError(f"out = {out}: the folder {out.resolve().parent} does not exist")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {out} is a file; give a folder")
    check_device(device)
    names = _words("model", models)
    counts = _ranges(nfe)
    listed = None if solvers is None else "all" if solvers == "all" else _words("solvers", solvers)
    read = {_label(path): Recipe.load(path) for path in recipes or []}
    if len(read) < len(recipes or []):
        raise ValueError(f"recipe: two of the files are called the same: {', '.join(read)}")
    known = [asked(name, shape, guidance, device) for name in names]
    shared = _recipes(read, known)
    folder = out.with_name(out.name + ".parts") if parts is None else parts
    prepared = [
        prepare(
            one.model,
            one.shape,
            solvers=listed,
            nfe=counts,
            grids=_words("grids", grids),
            recipes=its,
            count=count,
            cond=one.cond,
            seed=seed,
            features=one.features,
            data=one.data,
            data_range=one.data_range,
            name=one.name,
            resume=folder / one.name.replace(":", "."),
            batch=batch,
            device=device,
        )
        for one, its in zip(known, shared, strict=True)
    ]
    evaluations, converged = (
        sum(getattr(job, what) for job in prepared) for what in ("evaluations", "converged")
    )
    print(
        f"needs at most {evaluations:,} evaluations of one sample, and 48 to 384 for each of "
        f"{converged:,} converged samples"
    )
    found = [job.run() for job in prepared]
    for comparison in found:
        _console().print(_table(comparison))
    print(f"report: {write(found, out)}")


def _recipes(read: Mapping[str, Recipe], known: Sequence[Asked]) -> list[dict[str, Recipe]]:
    """For every model the recipes that were made for it; refused if one was made for none."""
    out: list[dict[str, Recipe]] = [{} for _ in known]
    for label, recipe in read.items():
        problem: ValueError | None = None
        for one, its in zip(known, out, strict=True):
            try:
                fits(label, recipe, one.model, one.shape, one.cond)
                its[label] = recipe
            except ValueError as error:
                problem = problem or error
        if problem is not None and not any(label in its for its in out):
            raise problem
    return out


def _label(path: Path) -> str:
    """What a recipe is called: its file without what files of recipes end in."""
    name = path.name
    for end in (".safetensors", ".fewstep", ".recipe"):
        name = name.removesuffix(end)
    return name or path.name


def _table(comparison: Comparison) -> Table:
    table = Table(
        "NFE",
        "best",
        "grid",
        "median error (95 % interval)",
        "tied with it",
        f"{DEFAULT_SOLVER} / best",
        title=comparison.model,
        title_justify="left",
    )
    for nfe in comparison.nfes:
        best = comparison.best(nfe)
        tied = [line.method for line in comparison.at(nfe) if line.tied and not line.best]
        usual = [line.ratio for line in comparison.at(nfe) if line.method == DEFAULT_SOLVER]
        table.add_row(
            str(nfe),
            best.method,
            best.grid + " to min" * (best.final == "min"),
            f"{best.median.value:.3g} ({best.median.low:.3g} to {best.median.high:.3g})",
            ", ".join(tied),
            f"{usual[0].value:.3g}" if usual else "",
        )
    return table


@app.command("recommend")
def recommend_command(
    model: AnyModel = "digits",
    nfe: Annotated[
        int, typer.Option("--nfe", "-n", help="Network evaluations to spend on every sample.")
    ] = 8,
    shape: Shape = None,
    guidance: Guidance = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Try every solver on every grid, to both ends. Takes long."),
    ] = False,
    count: Annotated[int, typer.Option(help="Noises of the report.")] = 256,
    seed: Annotated[int, typer.Option(help="Of all noises.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples per network call.")] = 256,
    device: Device = "cpu",
) -> None:
    """Say which solver to use on which grid, and why.

    Example: fewstep recommend --model digits --nfe 6
    """
    check_device(device)
    known = asked(model, shape, guidance, device)
    made = recommend(
        known.model,
        known.shape,
        nfe,
        cond=known.cond,
        count=count,
        screen="all" if every else "short",
        seed=seed,
        batch=batch,
        device=device,
    )
    print(made)
    if known.options is not None:
        print(f"Or: fewstep sample {known.options} {made.options}")


def _words(name: str, text: str) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words:
        raise ValueError(f"{name} = {text!r}; give names separated by commas")
    if len(set(words)) < len(words):
        raise ValueError(f"{name} = {text}: one is named twice")
    return words


def _ranges(text: str) -> list[int]:
    """3-6,8 as [3, 4, 5, 6, 8]."""
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"nfe = {text}; give numbers such as 5,8 or 3-10,20")
        out += range(int(first), int(last or first) + 1)
    if not out:
        raise ValueError(f"nfe = {text}; give numbers such as 5,8 or 3-10,20")
    return out
