"""A comparison as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest

import fewstep as fs
from fewstep._compare._numbers import Comparison, Line, table
from fewstep.metrics import Estimate


def line(method: str, nfe: int, median: float, **more) -> Line:
    e = Estimate(median, 0.5 * median, 2 * median)
    settings = {"best": False, "tied": False, "sliced": e, **more}
    return Line(method, "solver", "lambda", "zero", nfe, e, e, e, e, **settings)


@pytest.fixture
def made() -> Comparison:
    infinite = Estimate(math.inf, math.inf, math.inf)
    return Comparison(
        "a model",
        (
            line("a", 4, 0.3),
            line("b", 4, 0.1, best=True, tied=True, frechet=Estimate(1.0, 0.0, 2.0)),
            line("a", 8, 0.01),
            line("b", 8, 0.02, sliced=infinite),
            line("c", 8, math.inf),
        ),
        {"sliced": Estimate(0.0, 0.0, 0.1), "frechet": None, "data": None},
        {("c", 4): 'not 4, "never"'},
        {"seed": 0},
        {("a", 4): np.zeros((2, 8, 8, 1), np.uint8)},
    )


def test_lines_are_ranked_by_median_error(made):
    assert made.nfes == (4, 8)
    assert [v.method for v in made.at(8)] == ["a", "b", "c"]
    assert made.best(4).method == "b"
    with pytest.raises(ValueError, match="nfe = 5; compared were 4, 8"):
        made.best(5)


def test_json_has_everything_but_pictures_and_nothing_infinite(made):
    text = json.dumps(made.json(), allow_nan=False)
    read = json.loads(text)
    assert read["model"] == "a model"
    assert read["about"] == {"seed": 0}
    assert read["skipped"] == [{"method": "c", "nfe": 4, "why": 'not 4, "never"'}]
    assert read["converged"]["sliced"] == {"value": 0.0, "low": 0.0, "high": 0.1}
    first, second, _, fourth, last = read["lines"]
    assert first["median"] == {"value": 0.3, "low": 0.15, "high": 0.6}
    assert second["frechet"] == {"value": 1.0, "low": 0.0, "high": 2.0}
    assert first["frechet"] is None
    assert (second["best"], second["tied"]) == (True, True)
    assert fourth["sliced"]["value"] is None
    assert last["median"] == {"value": None, "low": None, "high": None}


def test_csv_has_a_line_per_method_and_nfe(made):
    rows = list(csv.DictReader(io.StringIO(table([made, made]))))
    assert len(rows) == 10
    assert [r["model"] for r in rows] == ["a model"] * 10
    assert [float(rows[1][f"frechet{k}"]) for k in ("", "_low", "_high")] == [1.0, 0.0, 2.0]
    assert rows[0]["frechet"] == ""
    assert "data" not in rows[0]
    assert float(rows[4]["median"]) == math.inf
    assert fs.Comparison is Comparison
