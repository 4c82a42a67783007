from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from fabricated import AWKWARD, NFES, comparison, estimate
from PIL import Image

import fewstep as fs
from fewstep._compare import _figures, _report
from fewstep._compare._numbers import Comparison
from fewstep._compare._report import page, says, write
from fewstep.metrics import Estimate


@pytest.fixture(scope="module")
def two() -> list[Comparison]:
    small = comparison("points", methods=4, frechet=False, pictures=(), seed=1)
    return [comparison("digits", methods=14), small]


@pytest.fixture(scope="module")
def report(two: list[Comparison], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert write(two, out) == out / "index.html"
    return out


def test_the_files_of_a_report(report: Path) -> None:
    names = {p.name for p in report.iterdir()}
    charts = {"errors.png", "distances.png", "samples-digits.png"}
    assert names == {"numbers.csv", "numbers.json", "index.html"} | charts
    for name in charts:
        pixels = np.asarray(Image.open(report / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels @ [1, 256, 65536])) > 20


def test_the_numbers_are_in_csv_and_json(report: Path, two: list[Comparison]) -> None:
    lines = [v for c in two for v in c.lines]
    rows = list(csv.DictReader(io.StringIO((report / "numbers.csv").read_text())))
    assert [(r["method"], float(r["median"])) for r in rows] == [
        (v.method, v.median.value) for v in lines
    ]
    read = json.loads((report / "numbers.json").read_text(), parse_constant=pytest.fail)
    assert [c["model"] for c in read] == ["digits", "points"]
    shown = [v["median"]["value"] for c in read for v in c["lines"]]
    assert shown == [v.median.value if np.isfinite(v.median.value) else None for v in lines]


def test_nothing_is_left_of_a_write_that_fails(
    two: list[Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_report, "chart", lambda *_: b"chart")
    write(two[1:], tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(two, tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".part"}
    assert after == before


def data_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=pytest.fail)


def test_the_page_is_one_file_that_loads_nothing(two: list[Comparison]) -> None:
    text = page(two)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert "http" not in policy[1]
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"@import|url\(", text)
    code = text.split('id="data">')[0] + text.split("</script>", 1)[1]
    assert not re.search(r"\b(?:fetch|eval|Function|XMLHttpRequest|innerHTML|import)\b", code)


def test_names_cannot_become_markup(two: list[Comparison]) -> None:
    named = dataclasses.replace(two[0], model=AWKWARD)
    text = page([named])
    assert AWKWARD not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert "alert(1)" in unescape(re.findall("<title>(.*?)</title>", text)[0])
    data = data_of(text)["models"][0]
    assert data["model"] == AWKWARD
    assert AWKWARD in {v["method"] for v in data["lines"]}


def test_what_looks_like_a_placeholder_stays_as_it_is(two: list[Comparison]) -> None:
    text = page([dataclasses.replace(two[1], model="{{script}} {{data}}")])
    assert data_of(text)["models"][0]["model"] == "{{script}} {{data}}"


def test_the_page_has_the_csv_and_the_numbers(two: list[Comparison], report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    found = re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]*)"', text)
    assert found is not None
    assert base64.b64decode(found[1]) == (report / "numbers.csv").read_bytes()
    for c, shown in zip(two, data_of(text)["models"], strict=True):
        for line, v in zip(c.lines, shown["lines"], strict=True):
            assert (v["method"], v["nfe"]) == (line.method, line.nfe)
            if np.isfinite(line.rms.value):
                assert v["rms"]["value"] == pytest.approx(line.rms.value, rel=1e-5)
            else:
                assert v["rms"] == {"value": None, "low": None, "high": None}


def test_pictures_of_the_page_are_the_samples(two: list[Comparison]) -> None:
    data = data_of(page(two))["models"]
    assert data[1]["strip"] is None
    found = {(m, n): png for m, n, png in data[0]["pictures"]}
    assert found.keys() == two[0].pictures.keys()
    images = two[0].pictures["unipc_3", 8]
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["unipc_3", 8]))))
    side = images.shape[2] + 1  # a column between samples
    for k, image in enumerate(images):
        np.testing.assert_array_equal(strip[:, k * side : k * side + 8, :1], image)
    assert (strip[:, 8, 1] == 0).all()


@pytest.mark.parametrize("shape", [(8, 32, 32, 3), (8, 96, 128, 3), (2, 5, 7, 1)])
def test_many_or_large_pictures_are_fewer_or_smaller(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    pictures = {(f"m{k}", 8): rng.integers(0, 256, shape, np.uint8) for k in range(4)}
    c = dataclasses.replace(comparison(methods=4, pictures=()), pictures=pictures)
    budget = 200_000
    shown = _report._page_pictures(c, budget)
    strip = shown["strip"]
    sizes = {Image.open(io.BytesIO(base64.b64decode(p))).size for _, _, p in shown["pictures"]}
    ((width, height),) = sizes
    small = (-(-shape[2] // strip["reduced"]), -(-shape[1] // strip["reduced"]))
    assert height == small[1]
    assert (width + max(1, small[0] // 16)) % strip["count"] == 0
    # Rounding up to whole pixels may add a little.
    assert 4 * strip["count"] * small[0] * small[1] * shape[3] <= 1.2 * budget
    if shape[1] < 32:
        assert (strip["count"], strip["reduced"]) == (shape[0], 1)


def test_the_sheet_has_converged_samples_on_top_and_the_best_below(two: list[Comparison]) -> None:
    sheet = np.asarray(Image.open(io.BytesIO(_figures.sheet(two[0]))).convert("L"))

    def places(images: np.ndarray) -> list[tuple[int, int]]:
        first = images[0, :, :, 0].repeat(7, 0).repeat(7, 1)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, first.shape)
        corners = [np.s_[::7, ::7], np.s_[6::7, 6::7]]  # of the squares that pixels became
        equal = np.logical_and.reduce(
            [
                (windows[(slice(None), slice(None), *at)] == first[at]).all(axis=(2, 3))
                for at in corners
            ]
        )
        return [(int(y), int(x)) for y, x in np.argwhere(equal)]

    top = places(two[0].pictures["converged", 0])
    assert len({y for y, _ in top}) == 1
    assert len({x for _, x in top}) >= len(NFES)
    for k, method in enumerate(_figures.ranked(two[0], "median")[:3]):
        ys = {y for y, _ in places(two[0].pictures[method, 3])}
        assert ys, method
        assert min(ys) > top[0][0] + 48 * k


def test_files_of_models_with_awkward_names_are_apart(two: list[Comparison]) -> None:
    names = ["a/b", "a:b", "A-B", "../..", AWKWARD]
    found = _report._file_names([dataclasses.replace(two[1], model=n) for n in names])
    assert len({n.lower() for n in found}) == len(names)
    assert all(re.fullmatch(r"\w[\w.-]*", n, re.ASCII) for n in found)


def test_methods_are_ranked_by_what_they_reach_where_they_ran() -> None:
    """A method that ran at many evaluations only is not the best because errors are small there."""
    c = comparison(methods=3, diverges=False)
    worst = max(v.median.value for v in c.lines if v.nfe == 20)
    late = dataclasses.replace(c.at(20)[-1], method="late", median=estimate(2 * worst))
    ranked = _figures.ranked(dataclasses.replace(c, lines=(*c.lines, late)), "median")
    assert ranked[-1] == "late"


def test_axes_hold_the_good_ones_whatever_the_bad_ones_do() -> None:
    c = comparison(methods=8, diverges=False)
    good = _figures.axis(c, "median")
    values = [v.median.value for v in c.lines]
    assert good[0] < min(values)
    for bad in (Estimate(np.inf, np.inf, np.inf), estimate(1e30), Estimate(np.nan, np.nan, np.nan)):
        line = dataclasses.replace(c.lines[0], method="bad", median=bad)
        low, high = _figures.axis(dataclasses.replace(c, lines=(*c.lines, line)), "median")
        assert low == good[0]
        assert max(values) <= high < 100 * max(values)
    # A distance far below the floor is chance.
    line = dataclasses.replace(c.lines[-1], method="lucky", sliced=Estimate(1e-12, -0.01, 0.01))
    low, _ = _figures.axis(dataclasses.replace(c, lines=(*c.lines, line)), "sliced")
    assert low > c.converged["sliced"].high / 20


def test_what_it_says_is_what_the_numbers_are() -> None:
    c = comparison(methods=5, diverges=False)
    said = says(c)
    assert [v["nfe"] for v in said["by_nfe"]] == list(c.nfes)
    for v in said["by_nfe"]:
        best = c.best(v["nfe"])
        assert v["text"].startswith(
            f"{best.method} on {best.grid}, {_report._number(best.median.value)} ("
        )
        tied = [w.method for w in c.at(v["nfe"]) if w.tied and not w.best]
        assert ("tied: " in v["text"]) == bool(tied)
        assert all(method in v["text"].split("tied: ")[1] for method in tied)
    wins = {m: sum(v.tied for v in c.lines if v.method == m) for m in {v.method for v in c.lines}}
    first = max(wins, key=lambda m: wins[m])
    assert re.search(rf"{first}\b[^.]*? ha(s|ve) the smallest median error", said["summary"])
    assert f"at {wins[first]} of the 8" in said["summary"] or wins[first] == 8


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0271, "0.0271"), (0.025, "0.0250"), (1.0, "1.00"), (123.4, "123"), (1234.5, "1234"),
     (1.2e-5, "1.20e-05"), (0.0, "0"), (-0.012, "-0.0120"), (np.inf, "not finite")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert _report._number(value) == text


def test_a_report_of_everything_that_is_extreme(tmp_path: Path) -> None:
    """One method at one number of evaluations; errors 0, infinite and not a number."""
    c = comparison(methods=1, pictures=(1, 3, 200, 1), frechet=False)
    for value in (0.0, np.inf, np.nan):
        e = Estimate(value, value, value)
        line = dataclasses.replace(c.lines[0], median=e, rms=e, p90=e, sliced=e)
        one = dataclasses.replace(c, lines=(line,), skipped={}, about={})
        data_of(page([one]))
    assert write([one], tmp_path).is_file()


def test_without_comparisons_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^comparisons = \[\]: .*at least one"):
        write([], tmp_path / "out")
    with pytest.raises(ValueError, match=r"^comparisons: nothing ran on 'digits'"):
        write([dataclasses.replace(comparison(methods=1), lines=())], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_comparison_that_ran(tmp_path: Path) -> None:
    model = fs.exact.Gaussian(np.zeros((1, 3, 4)), np.full((1, 3, 4), 0.5)).denoiser(fs.Flow())
    ran = fs.compare(
        model, (1, 3, 4), solvers=("ddim", "heun", "dpmpp_2m"), nfe=(3, 4), grids=("lambda",),
        count=24, images=2, name="exact", progress=False,
    )  # fmt: skip
    write([ran], tmp_path)
    assert (tmp_path / "samples-exact.png").is_file()
    data = data_of((tmp_path / "index.html").read_text(encoding="utf-8"))["models"][0]
    assert {v["method"] for v in data["lines"]} == {"ddim", "heun", "dpmpp_2m"}
    assert {(v["method"], v["nfe"]): v["why"] for v in data["skipped"]} == ran.skipped
    assert data["strip"] == {"count": 2, "width": 4, "height": 3, "reduced": 1}


def test_without_matplotlib_it_says_what_to_install(
    two: list[Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fewstep\[plot\]"):
        write(two, tmp_path / "out")
    assert not (tmp_path / "out").exists()
