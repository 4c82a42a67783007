"""What a comparison measured: plain numbers and a few pictures, from and to files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import Estimate

__all__ = ["Comparison", "Line"]


@dataclass(frozen=True)
class Line:
    """One method at one number of evaluations.

    method: a solver's name, or what the recipe is called. kind: "solver" or "recipe".
    grid, final: where it was run; of a recipe what its plan says.
    nfe: network evaluations that every sample took.
    median, rms, p90: of the errors of samples: root mean square over the elements of the distance
        to the converged sample of the same model from the same noise.
    ratio: median over samples of the error over that of the best method at this nfe. best: it is
        the one with the smallest median. tied: the interval of `ratio` contains 1.
    frechet: squared Frechet distance of features to converged samples from other noises; without
        features None. data: the same to the data, where features of data are known.
    sliced: sliced Wasserstein distance of the samples to converged ones from other noises.
    """

    method: str
    kind: str
    grid: str
    final: str
    nfe: int
    median: Estimate
    rms: Estimate
    p90: Estimate
    ratio: Estimate
    best: bool
    tied: bool
    sliced: Estimate
    frechet: Estimate | None = None
    data: Estimate | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side on one model, at several numbers of evaluations.

    model: its name. lines: every method that ran, at every nfe it can spend exactly.
    converged: the columns `sliced`, `frechet`, `data` of the converged samples from the noises of
        the comparison, which no method is below but by chance.
    skipped: (method, nfe) to the sentence that says why there is no line.
    about: settings, versions, counts, for the reader.
    pictures: (method, nfe) to samples, uint8 (n, height, width, 1 or 3), the same noises for all;
        ("converged", 0) are what they should be. Empty where samples are no pictures.
    """

    model: str
    lines: tuple[Line, ...]
    converged: Mapping[str, Estimate | None]
    skipped: Mapping[tuple[str, int], str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[tuple[str, int], NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    @property
    def nfes(self) -> tuple[int, ...]:
        """Numbers of evaluations, ascending."""
        return tuple(sorted({line.nfe for line in self.lines}))

    def at(self, nfe: int) -> list[Line]:
        """The lines of this number of evaluations, the smallest median first."""
        return sorted((v for v in self.lines if v.nfe == nfe), key=lambda v: v.median.value)

    def best(self, nfe: int) -> Line:
        """The method with the smallest median error."""
        if not (found := self.at(nfe)):
            raise ValueError(f"nfe = {nfe}; compared were {', '.join(map(str, self.nfes))}")
        return found[0]

    def json(self) -> dict[str, Any]:
        """Everything but the pictures, in types of JSON. Infinite numbers are null."""
        shown = {
            "model": self.model,
            "about": dict(self.about),
            "converged": dict(self.converged),
            "lines": [asdict(line) for line in self.lines],
            "skipped": [
                {"method": m, "nfe": n, "why": why} for (m, n), why in self.skipped.items()
            ],
        }
        return json.loads(json.dumps(_plain(shown), allow_nan=False))


def _plain(value: Any) -> Any:
    """Estimates as {value, low, high}; what is not finite as None."""
    if isinstance(value, Estimate):
        return {k: _plain(v) for k, v in value._asdict().items()}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def table(comparisons: Sequence[Comparison]) -> str:
    """CSV, a line per model, method and nfe; estimates take three columns."""
    lines = list(_rows(comparisons))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for line in lines for k in line)))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _rows(comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    for comparison in comparisons:
        for line in comparison.lines:
            row: dict[str, Any] = {"model": comparison.model}
            for f in fields(line):
                value = getattr(line, f.name)
                if isinstance(value, tuple):
                    row[f.name], row[f"{f.name}_low"], row[f"{f.name}_high"] = value
                elif value is not None or f.name not in ("frechet", "data"):
                    row[f.name] = value
            yield row
