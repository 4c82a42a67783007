"""The picture of a recipe: errors against evaluations, and samples beside the converged ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._denoiser import Model
from ._recipe import Candidate, Recipe, as_it_is
from ._teacher import cycled, teach

__all__ = ["draw"]

_COLOURS = {
    "solver": "#777777",
    "compensated": "#1b9e77",
    "statistics": "#7570b3",
    "search": "#e6ab02",
    "learned": "#d95f02",
    "bands": "#1f78b4",
    "each": "#a6006a",
}
_LABELS = {
    "solver": "best solver as it is",
    "compensated": "compensated (DC-Solver)",
    "statistics": "model statistics (DPM-Solver-v3)",
    "search": "searched (USF)",
    "learned": "learned plan",
    "bands": "learned, by bands of modes",
    "each": "learned, one plan per value",
}
_COLUMNS = 8
#: How differences from the converged samples are shown.
_MAGNIFIED = 5


def draw(
    recipe: Recipe,
    path: str | os.PathLike[str],
    model: Model | None = None,
    cond: Mapping[str, Any] | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
) -> None:
    """Write the picture. Samples are drawn where a model is given and they are images, (1 or 3,
    height, width); cond: conditions of the samples, as for `calibrate`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('draw needs matplotlib: pip install "fewstep[plot]".') from error
    images = model is not None and len(recipe.shape) == 3 and recipe.shape[0] in (1, 3)
    rows = 1 + 4 * len(recipe.nfes)
    size = (12, max(4.6, 0.55 * rows + 0.6)) if images else (6.4, 4.6)
    figure = Figure(figsize=size, layout="constrained")
    places = figure.add_gridspec(1, 2 if images else 1)
    _errors(figure.add_subplot(places[0]), recipe)
    if images:
        assert model is not None
        _samples(figure.add_subplot(places[1]), recipe, model, cond or {}, data_range)
    # Beside the curves, never on them.
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def _errors(axes: Any, recipe: Recipe) -> None:
    kinds = dict.fromkeys(c.kind for c in recipe.candidates)
    for kind in kinds:
        best: list[Candidate] = []
        for n in recipe.nfes:
            rows = [c for c in recipe.candidates if (c.nfe, c.kind) == (n, kind)]
            if rows:
                best.append(min(rows, key=lambda c: c.held))
        x = [c.nfe for c in best]
        colour = _COLOURS.get(kind)
        axes.plot(x, [c.median for c in best], "o-", color=colour, label=_LABELS.get(kind, kind))
        low, high = ([getattr(c, name) for c in best] for name in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_xticks(recipe.nfes)
    axes.set_xlabel("network evaluations (NFE)")
    axes.set_ylabel("median distance to the converged sample")
    axes.grid(which="both", alpha=0.25)
    axes.set_title("fresh noises; bands: 95 % of the median", fontsize=10)


def _samples(
    axes: Any,
    recipe: Recipe,
    model: Model,
    cond: Mapping[str, Any],
    data_range: tuple[float, float],
) -> None:
    """Rows: the converged samples, then per number of evaluations the best solver as it is and the
    recipe, from noises that calibration did not see."""
    here = cycled(cond, _COLUMNS)
    teacher = teach(model, recipe.shape, _COLUMNS, cond=here, first=1 << 20)
    lines = [("converged", teacher.samples)]
    for n in recipe.nfes:
        name = recipe.best_uncalibrated(n).name
        plain = as_it_is(model, n, name)
        for label, run in ((name.partition(" on ")[0], plain), ("recipe", recipe.plans[n])):
            x = teacher.run(run)
            lines += [(f"{n}: {label}", x), (f"off, {_MAGNIFIED}-fold", x - teacher.samples)]
    low, high = data_range
    gap = 1
    channels, height, width = recipe.shape
    canvas = np.full(
        (len(lines) * (height + gap) + gap, _COLUMNS * (width + gap) + gap, channels), 0.2
    )
    for i, (name, x) in enumerate(lines):
        shown = (x.float().cpu().numpy() - low) / (high - low)
        if name.startswith("off"):
            shown = 0.5 + _MAGNIFIED * x.float().cpu().numpy() / (high - low)
        for j, picture in enumerate(shown.clip(0, 1)):
            top, side = i * (height + gap) + gap, j * (width + gap) + gap
            canvas[top : top + height, side : side + width] = picture.transpose(1, 2, 0)
    axes.imshow(canvas.squeeze(-1) if channels == 1 else canvas, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    centres = [(i + 0.5) * (height + gap) for i in range(len(lines))]
    axes.set_yticks(centres, [name for name, _ in lines], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title("the same noises: converged, best solver as it is, recipe", fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
