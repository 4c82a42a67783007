"""Pictures of a comparison, and in which order and on which axes it is shown."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import Estimate
from ._numbers import Comparison

__all__ = [
    "MEASURES",
    "axis",
    "chart",
    "measured",
    "new_figure",
    "ranked",
    "resized",
    "sheet",
    "strip",
]

Images = NDArray[np.uint8]

#: What a chart can show, and what the axis says.
MEASURES = {
    "median": "Median error",
    "rms": "RMS error",
    "p90": "90 % error",
    "frechet": "Fréchet distance",
    "sliced": "Sliced Wasserstein distance",
    "data": "Fréchet distance to the data",
}
# Okabe & Ito (2008), told apart with any colour vision; without yellow, which is faint on white.
# The page has the first six in the same order.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_GREY = "#b8b8b8"
#: Of a picture of samples: samples of a cell, methods, width in pixels.
_CELL, _ROWS, _WIDTH = 4, 24, 2000


# Order and axes


def measured(comparison: Comparison, key: str) -> dict[tuple[str, int], Estimate]:
    found = {(v.method, v.nfe): getattr(v, key) for v in comparison.lines}
    return {k: v for k, v in found.items() if v is not None}


def axis(comparison: Comparison, key: str) -> tuple[float, float]:
    """Ends of a logarithmic axis on which the good methods can be told apart.

    A method that diverges, and a distance that came out near or below 0 by chance, would take all
    of the axis: they are drawn at its edges.
    """
    values = measured(comparison, key)
    positive = sorted(v.value for v in values.values() if 0 < v.value < math.inf)
    if not positive:
        return 0.1, 1.0
    fewest = min(n for _, n in values)
    first = [v.value for (_, n), v in values.items() if n == fewest and 0 < v.value < math.inf]
    low, high = positive[0], min(positive[-1], 20 * float(np.median(first or positive)))
    floor = comparison.converged.get(key)
    if floor is not None and math.isfinite(floor.high) and floor.high > 0:
        low = max(min(low, floor.value if floor.value > 0 else low), floor.high / 8)
        low = min(low, floor.high / 2)
    return low / 1.3, max(high, 2 * low) * 1.3


def ranked(comparison: Comparison, key: str) -> list[str]:
    """Methods, best first: by the geometric mean of their number over that of the best one at the
    same number of evaluations. (Without "over", methods that ran at many evaluations would lead.)
    """
    low, high = axis(comparison, key)
    logs = {
        at: math.log(min(max(v.value, low), high)) if v.value == v.value else math.log(high)
        for at, v in measured(comparison, key).items()
    }
    best: dict[int, float] = {}
    for (_, nfe), v in logs.items():
        best[nfe] = min(v, best.get(nfe, math.inf))
    excess: dict[str, list[float]] = {}
    for (method, nfe), v in logs.items():
        excess.setdefault(method, []).append(v - best[nfe])
    return sorted(excess, key=lambda m: float(np.mean(excess[m])))


# Charts


def new_figure(**settings: Any) -> Any:
    """An empty figure; refused without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a report needs matplotlib: pip install "fewstep[plot]".') from error
    return Figure(**settings)


def _png(figure: Any, dpi: int) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def chart(comparisons: Sequence[Comparison], keys: Sequence[str]) -> bytes:
    """PNG: a panel per model, the first of the measures that it has against evaluations."""
    having = [(c, [key for key in keys if measured(c, key)]) for c in comparisons]
    drawn = [(c, found[0]) for c, found in having if found]
    columns = min(3, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    figure = new_figure(figsize=(max(7.0, 5.0 * columns), 4.2 * rows + 0.9), layout="constrained")
    # In turn the best of every model, so that a method looks the same in all panels.
    turns = zip_longest(*(ranked(c, key) for c, key in drawn))
    best = list(dict.fromkeys(m for turn in turns for m in turn if m is not None))
    looks = dict(zip(best, zip(_COLOURS, _MARKERS, strict=True), strict=False))
    kinds = {v.method: v.kind for c in comparisons for v in c.lines}
    places = figure.add_gridspec(rows, columns)
    for k, (comparison, key) in enumerate(drawn):
        axes = figure.add_subplot(places[k // columns, k % columns])
        _frame(axes, comparison, key)
        for method in reversed(ranked(comparison, key)):
            _curve(axes, comparison, key, method, looks.get(method), _dashes(kinds[method]))
    handles = [(_short(m), _handle(c, s, _dashes(kinds[m]))) for m, (c, s) in looks.items()]
    if others := best[len(looks) :]:
        name = _short(others[0]) if len(others) == 1 else f"{len(others)} others"
        handles.append((name, _handle(_GREY, "", "-")))
    names, lines = zip(*handles, strict=True) if handles else ((), ())
    legend = figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    for text in legend.get_texts():
        text.set(parse_math=False, fontsize=9)  # a name is no formula, whatever dollars are in it
    return _png(figure, 130)


def _dashes(kind: str) -> Any:
    return "-" if kind == "solver" else (0, (4, 1.5))


def _handle(colour: str, marker: str, dashes: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, ms=5, ls=dashes, lw=1.6)


def _frame(axes: Any, comparison: Comparison, key: str) -> None:
    low, high = axis(comparison, key)
    nfes = sorted({n for _, n in measured(comparison, key)})
    axes.set(xscale="log", yscale="log", ylim=(low, high), xlim=(nfes[0] / 1.06, nfes[-1] * 1.06))
    axes.set_title(_short(comparison.model, 48), fontsize=11, parse_math=False)
    axes.set_xlabel("network evaluations per sample (NFE)")
    axes.set_ylabel(MEASURES[key])
    axes.set_xticks(nfes, [str(n) for n in nfes])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    floor = comparison.converged.get(key)
    if floor is None or not floor.high > low:
        return
    axes.axhspan(max(floor.low, low), floor.high, color="#d9d9d9", alpha=0.6, lw=0)
    if floor.value > low:
        axes.axhline(floor.value, color="#666666", lw=1, ls=":")
    place = {"xy": (nfes[0], floor.high), "xytext": (2, -3), "textcoords": "offset points"}
    axes.annotate("converged samples", **place, va="top", fontsize=8, color="#555555", zorder=6)


def _curve(
    axes: Any,
    comparison: Comparison,
    key: str,
    method: str,
    look: tuple[str, str] | None,
    dashes: Any,
) -> None:
    """A method; with marks and intervals if it has a look of its own."""
    low, high = axis(comparison, key)
    values = measured(comparison, key)
    points = sorted((n, v) for (m, n), v in values.items() if m == method)
    x = np.array([n for n, _ in points])
    y, y_low, y_high = np.array([v for _, v in points], dtype=float).T
    at = np.clip(np.where(np.isnan(y), np.inf, y), low, high)
    if look is None:
        axes.plot(x, at, color=_GREY, lw=0.8, ls=dashes, zorder=2)
        return
    colour, marker = look
    axes.plot(x, at, color=colour, lw=1.6, ls=dashes, zorder=3)
    inside = at == y
    ends = np.abs(np.clip([y_low, y_high], low, high) - at)[:, inside]
    bars = {"fmt": marker, "ms": 4.5, "color": colour, "elinewidth": 1, "zorder": 4}
    axes.errorbar(x[inside], at[inside], ends, **bars)
    for shape, edge in (("^", at == high), ("v", at == low)):
        off = edge & ~inside
        # Not in the layout: matplotlib gets the extent of an empty unclipped line wrong.
        (line,) = axes.plot(x[off], at[off], shape, color=colour, clip_on=False)
        line.set_in_layout(False)


# Samples


def resized(images: Images, reduce: int = 1, enlarge: int = 1) -> Images:
    """Mean over blocks of pixels, or every pixel several times."""
    if reduce > 1:
        from PIL import Image

        small = [
            Image.fromarray(v[..., 0] if v.shape[-1] == 1 else v).reduce(reduce) for v in images
        ]
        images = np.stack([np.asarray(v) for v in small]).reshape(
            len(images), small[0].height, small[0].width, -1
        )
    return images.repeat(enlarge, axis=1).repeat(enlarge, axis=2)


def strip(images: Images, gap: int, between: int = 255) -> Images:
    """Images side by side, something else between them."""
    around = [(0, 0), (0, 0), (0, gap), (0, 0)]
    padded = np.pad(images, around, constant_values=between)
    n, height, width, channels = padded.shape
    row = padded.transpose(1, 0, 2, 3).reshape(height, n * width, channels)
    return row[:, : n * width - gap]


def sheet(comparison: Comparison) -> bytes:
    """PNG: samples of methods (rows, best first) at numbers of evaluations (columns)."""
    pictures = comparison.pictures
    ran = list(dict.fromkeys(m for m, _ in pictures if m != "converged"))
    order = {m: k for k, m in enumerate(ranked(comparison, "median"))}
    methods = sorted(ran, key=lambda m: order.get(m, len(order)))
    names = ["converged"] * (("converged", 0) in pictures) + methods[:_ROWS]
    nfes = sorted({n for m, n in pictures if m != "converged"}) or [0]
    # As many samples as there is room for, then larger or smaller ones.
    first = next(iter(pictures.values()))
    width = len(nfes) * first.shape[2]
    count = min(len(first), _CELL, max(1, _WIDTH // width))
    reduce = math.ceil(count * width / _WIDTH)
    enlarge = max(1, min(64 // first.shape[2], _WIDTH // (count * width)))

    def cell(images: Images) -> Images:
        return strip(resized(images[:count], reduce, enlarge), 2)

    tall, wide, channels = cell(first).shape
    gap, left, top, right = 8, 34 + 7 * max(9, *(len(_short(m)) for m in names)), 62, 16
    size = (top + len(names) * (tall + gap) + 10, left + len(nfes) * (wide + gap) - gap + right)
    down, across = size[0], max(size[1], 620)
    rows = [top + i * (tall + gap) for i in range(len(names))]
    columns = [left + j * (wide + gap) for j in range(len(nfes))]
    canvas = np.full((down, across, channels), 255, np.uint8)
    for y, name in zip(rows, names, strict=True):
        for x, nfe in zip(columns, nfes, strict=True):
            found = pictures.get((name, 0 if name == "converged" else nfe))
            canvas[y : y + tall, x : x + wide] = 235 if found is None else cell(found)
    dpi = 100
    figure = new_figure(figsize=(across / dpi, down / dpi), dpi=dpi)
    figure.figimage(canvas.repeat(3 // channels, axis=2), 0, 0, origin="upper")

    def label(x: float, y: float, text: str, **looks: Any) -> None:
        looks = {"fontsize": 9, "va": "center", "color": "#333333", "parse_math": False, **looks}
        figure.text(x / across, 1 - y / down, text, **looks)

    about = "best methods first; same noises in every cell; grey: not run"
    if len(methods) > _ROWS:
        about = f"the best {_ROWS} of {len(methods)} methods; {about}"
    label(14, 22, _short(comparison.model, 36), fontsize=12, weight="bold")
    label(across - right, 22, about, ha="right", color="#555555")
    for x, nfe in zip(columns, nfes, strict=True):
        label(x + wide / 2, top - 10, f"NFE {nfe}", ha="center")
    for y, name in zip(rows, names, strict=True):
        weight = "bold" if name == "converged" else "normal"
        label(left - 10, y + tall / 2, _short(name), ha="right", weight=weight)
    return _png(figure, dpi)
