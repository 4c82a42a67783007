"""The report of a comparison: numbers, charts, samples and a page that a person opens offline.

The page is one file without a library. What it needs is a scatter chart and a table that sorts:
plotly.js would make every report 4.8 MB, Bokeh with its tables and widgets 2 MB, and both build
functions from strings, so that a page with them could not forbid all scripts but its own. Ours is
35 kB. `page.html` is the frame, `page.css` the looks, `page.js` everything that moves; numbers and
sentences come from here as JSON, and the script writes them as text nodes only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write as write_file
from ._figures import MEASURES, Images, axis, chart, measured, ranked, resized, sheet, strip
from ._numbers import Comparison, Line, table

__all__ = ["write"]

#: Bytes of pixels in the page; as PNG in base64 about the same number of characters.
_PIXELS = 4 << 20
#: Samples of a method.
_CELL = 8


def write(comparisons: Sequence[Comparison], out: Path) -> Path:
    """Write the report into the folder `out` and return the path of its page, index.html.

    numbers.csv, numbers.json; errors.png and distances.png (against network evaluations, log-log,
    95 % intervals); samples-MODEL.png where there are pictures; index.html, which holds all of it.
    Needs matplotlib.
    """
    if not comparisons:
        raise ValueError("comparisons = []: nothing to report; at least one is needed")
    if empty := [c.model for c in comparisons if not c.lines]:
        raise ValueError(f"comparisons: nothing ran on {empty[0]!r}; at least one line is needed")
    charts = {"errors.png": ["median"], "distances.png": ["frechet", "sliced"]}
    content = {
        "numbers.csv": table(comparisons).encode(),
        "numbers.json": _json([c.json() for c in comparisons], indent=1).encode(),
        **{name: chart(comparisons, keys) for name, keys in charts.items()},
    }
    for comparison, name in zip(comparisons, _file_names(comparisons), strict=True):
        if comparison.pictures:
            content[f"samples-{name}.png"] = sheet(comparison)
    content["index.html"] = page(comparisons).encode()  # last: where it is, the rest is
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        write_file(out / name, data)
    return out / "index.html"


def _file_names(comparisons: Iterable[Comparison]) -> list[str]:
    """Names of models as parts of file names, each once on disks that ignore case too."""
    names: list[str] = []
    for comparison in comparisons:
        stem = re.sub(r"[^\w.-]+", "-", comparison.model, flags=re.ASCII).strip("-.") or "model"
        name, count = stem, 1
        while name.lower() in (n.lower() for n in names):
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


# Sentences


def _number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def _listed(names: Sequence[Any], most: int = 6) -> str:
    """a, b and c; a, b and 7 others."""
    shown = [str(n) for n in names]
    if len(shown) > most:
        shown = [*shown[: most - 1], f"{len(shown) - most + 1} others"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def says(comparison: Comparison) -> dict[str, Any]:
    """What the numbers say: a paragraph, and a sentence per number of evaluations."""
    at = {n: comparison.at(n) for n in comparison.nfes}
    summary = [
        f"{len({v.method for v in comparison.lines})} methods, "
        f"{len(comparison.lines)} runs at {_listed(comparison.nfes, 20)} network evaluations."
    ]
    summary += _leaders(at) + _saving(at)
    for key, name in (("frechet", "Fréchet distance"), ("sliced", "sliced Wasserstein distance")):
        summary += _of_distance(comparison, key, name)
    bad = [f"{v.method} at {v.nfe}" for v in comparison.lines if not math.isfinite(v.median.value)]
    if bad:
        summary.append(f"Diverged (errors are not finite): {_listed(bad, 8)}.")
    return {
        "summary": " ".join(summary),
        "by_nfe": [{"nfe": n, "text": _of_nfe(lines)} for n, lines in at.items()],
    }


def _of_nfe(lines: list[Line]) -> str:
    best = next(v for v in lines if v.best)
    m = best.median
    text = f"{best.method} on {best.grid}, {_number(m.value)}"
    text += f" ({_number(m.low)} to {_number(m.high)})"
    if tied := [v.method for v in lines if v.tied and not v.best]:
        return f"{text}; tied: {_listed(tied)}"
    if not (others := [v for v in lines if not v.best]):
        return f"{text}; nothing else ran"
    r = others[0].ratio
    text += f"; next {others[0].method}, {_number(r.value)} times that"
    return f"{text} ({_number(r.low)} to {_number(r.high)})"


def _leaders(at: Mapping[int, list[Line]]) -> list[str]:
    wins: dict[str, int] = {}
    for lines in at.values():
        for v in lines:
            if v.best or v.tied:
                wins[v.method] = wins.get(v.method, 0) + 1
    if len(at) < 2 or not wins:
        return []
    most = max(wins.values())
    first, second = ([m for m, n in wins.items() if n == k] for k in (most, most - 1))
    verb = "has" if len(first) == 1 else "have"
    where = f"all {most}" if most == len(at) else f"{most} of the {len(at)}"
    text = f"{_listed(first)} {verb} the smallest median error, or a tie with it,"
    text += f" at {where} numbers of evaluations"
    return [f"{text}; {_listed(second)} at {most - 1}." if most > 1 and second else f"{text}."]


def _saving(at: Mapping[int, list[Line]]) -> list[str]:
    """What the better half of methods reach at most evaluations, and when the best one does."""
    last = max(at)
    middle = float(np.median([v.median.value for v in at[last]]))
    soon = [n for n, lines in at.items() if min(v.median.value for v in lines) <= middle]
    if len(at[last]) < 3 or not math.isfinite(middle) or not soon or min(soon) == last:
        return []
    return [
        f"Half of the methods have a median error above {_number(middle)} with {last} evaluations; "
        f"the best one is below it with {min(soon)}."
    ]


def _of_distance(comparison: Comparison, key: str, name: str) -> list[str]:
    values, floor = measured(comparison, key), comparison.converged.get(key)
    if not values:
        return []
    other, level = [], []
    for nfe in sorted({n for _, n in values}):
        here = {m: v for (m, n), v in values.items() if n == nfe}
        first = min(here, key=lambda m: here[m].value)
        good = {v.method for v in comparison.at(nfe) if v.best or v.tied}
        # Only where the intervals are apart: most orders of distances are chance.
        rivals = [here[m] for m in good & here.keys()]
        if floor is not None and here[first].low <= floor.high:
            level.append(nfe)
        elif rivals and all(here[first].high < v.low for v in rivals):
            other.append(f"{first} at {nfe}")
    text = []
    if level:
        text.append(
            f"By the {name} of these samples the best method cannot be told from the converged "
            f"ones at {_listed(level, 20)} evaluations."
        )
    if other:
        text.append(
            f"The {name} prefers another method than the median error does: {_listed(other, 8)}."
        )
    return text


# The page


def page(comparisons: Sequence[Comparison]) -> str:
    """The report as one HTML file that loads nothing."""
    source = {name: _source(f"page.{name}") for name in ("html", "css", "js")}
    budget = _PIXELS // max(1, sum(bool(c.pictures) for c in comparisons))
    data = [_page_data(c, budget) for c in comparisons]
    models = ", ".join(c.model for c in comparisons)
    csv = base64.b64encode(table(comparisons).encode()).decode()
    parts = {
        "policy": "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(source['js'])}; style-src {_hash(source['css'])}",
        "title": _escaped(f"Samplers compared: {models}"),
        "style": source["css"],
        "script": source["js"],
        # No text can end the element: "<" is written as an escape of JSON.
        "data": _json({"measures": MEASURES, "models": data}).replace("<", "\\u003c"),
        "csv": f"data:text/csv;charset=utf-8;base64,{csv}",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], source["html"])


def _source(name: str) -> str:
    return (files("fewstep") / "_compare" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)


def _page_data(comparison: Comparison, budget: int) -> dict[str, Any]:
    keys = [k for k in MEASURES if measured(comparison, k)]
    low_high = {k: axis(comparison, k) for k in keys}
    return {
        **_rounded(comparison.json()),
        "says": says(comparison),
        "axes": {k: {"low": low, "high": high} for k, (low, high) in low_high.items()},
        "ranks": {k: ranked(comparison, k) for k in keys},
        **_page_pictures(comparison, budget),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _page_pictures(comparison: Comparison, budget: int) -> dict[str, Any]:
    """Strips of samples as PNG; fewer samples, then smaller ones, where they are many."""
    if not comparison.pictures:
        return {"pictures": [], "strip": None}
    n, height, width, channels = next(iter(comparison.pictures.values())).shape
    size = height * width * channels * len(comparison.pictures)
    count = min(n, _CELL, max(1, budget // size))
    reduce = math.ceil(math.sqrt(count * size / budget))
    strips = [
        [method, nfe, base64.b64encode(_png(resized(v[:count], reduce))).decode()]
        for (method, nfe), v in comparison.pictures.items()
    ]
    strip = {"count": count, "width": width, "height": height, "reduced": reduce}
    return {"pictures": strips, "strip": strip}


def _png(images: Images) -> bytes:
    """Images side by side, nothing between them, as a page is light or dark."""
    from PIL import Image

    solid = np.concatenate([images, np.full_like(images[..., :1], 255)], axis=-1)
    gap = max(1, images.shape[2] // 16)
    out = io.BytesIO()
    Image.fromarray(strip(solid, gap, 0)).save(out, "png", optimize=True)
    return out.getvalue()
