"""The command `generate`."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ._command_arguments import check_device, imported, integers
from ._commands import (
    FinalName,
    GridName,
    ModelName,
    Nfe,
    SolverName,
    _chosen,
    _labels,
    app,
)
from ._denoiser import Guided, Model
from ._generate import generate
from .models import find, load

__all__ = ["generate_command"]


class Format(str, Enum):
    """What a shard is."""

    npz = "npz"
    tar = "tar"
    png = "png"


@app.command("generate")
def generate_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the shards.")],
    count: Annotated[int, typer.Option(help="Number of samples.")],
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
        float | None,
        typer.Option(
            help="Classifier-free guidance scale of a bundled model; 1 is none. Default 1.5."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of one sample, such as 3x32x32. Bundled models know theirs.")
    ] = None,
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
    format: Annotated[
        Format,
        typer.Option(help="Arrays, a WebDataset tar, or a folder of pictures per shard."),
    ] = Format.npz,
    pixels: Annotated[
        str | None,
        typer.Option(
            help="Write 8-bit samples: the values that become 0 and 255, such as -1,1. Pictures "
            "of a bundled model know theirs. Default: float32 arrays."
        ),
    ] = None,
    shard: Annotated[int, typer.Option(help="Samples per file.")] = 1024,
    batch: Annotated[int, typer.Option(help="Samples per network call.")] = 64,
    threads: Annotated[int, typer.Option(help="Of each process, on a CPU.")] = 1,
    ray: Annotated[
        int | None, typer.Option(help="Run in so many workers of a Ray cluster.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="Torch device; under torchrun, cuda is that of the process's own GPU."),
    ] = "cpu",
) -> None:
    """Write many samples to a folder of shards; call it again to go on after a kill.

    Example: fewstep generate --count 64 --shard 16 --nfe 8 --out folder; in two processes:
    torchrun --nproc-per-node 2 --no-python fewstep generate --count 64 --shard 16 --out folder
    """
    if device == "cuda" and "LOCAL_RANK" in os.environ and ray is None:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if ray is None:
        check_device(device)
    cond: dict[str, Any] = {}
    if ":" in model:
        for name, value in {"class": classes, "guidance": guidance}.items():
            if value is not None:
                raise ValueError(f"{name} = {value} is for bundled models; put it in your denoiser")
        if shape is None:
            raise ValueError("shape is missing; give that of one sample, such as 3x32x32")
        build: Callable[[], Model] = partial(imported, model)
        size = tuple(integers("shape", shape, "x"))
    else:
        bundled = find(model)
        if shape is not None:
            raise ValueError(f"shape = {shape}, but {model} has its own; leave --shape out")
        labels = _labels(bundled, classes, count)
        cond = {} if labels is None else {"label": torch.tensor(labels)}
        build = partial(_bundled, model, device, 1.5 if guidance is None else guidance)
        size = bundled.shape
        if pixels is None and format.value == "png":
            pixels = ",".join(map(str, bundled.data_range))
    denoiser = build()
    plan = _chosen(denoiser, solver, grid, nfe, final, plan_file, recipe_file)
    there = generate(
        denoiser if ray is None else build,
        count,
        out,
        shape=size,
        solver=plan,
        seed=seed,
        path=path,
        cond=cond,
        format=format.value,
        pixels=None if pixels is None else _range(pixels),
        shard=shard,
        batch=batch,
        threads=threads,
        device=device,
        ray=ray,
    )
    shards = -(-count // shard)
    rest = "" if len(there) == shards else "; other processes make the rest"
    print(f"{out}: {len(there)} of {shards} shards{rest}")


def _bundled(name: str, device: str, guidance: float) -> Model:
    denoiser, uncond = load(name, device), find(name).uncond
    return Guided(denoiser, guidance, uncond) if uncond else denoiser


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"pixels = {text}; give two numbers, such as -1,1") from None
    return low, high
