"""`fewstep compare` and `fewstep recommend` as a person uses them."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fewstep as fs
from fewstep._calibrate._fingerprint import fingerprint
from fewstep._calibrate._recipe import Recipe
from fewstep._commands import app
from fewstep._compare_command import _ranges

SMALL = ["--count", "8", "--solvers", "flow_ipndm_2,ddim", "--grids", "softened"]

OWN = """
import numpy as np
import fewstep as fs

def model():
    return fs.exact.Gaussian(np.zeros(4), np.linspace(0.1, 1.0, 4)).denoiser(fs.Flow(), "flow")

def other():
    return fs.exact.Gaussian(np.zeros(4), np.linspace(0.1, 1.0, 4)).denoiser(fs.VP(), "noise")
"""


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def recipe(path, model, shape, nfe=3):
    known = fingerprint(model, shape, {}, 1)
    made = Recipe(
        {nfe: fs.plan("dpmpp_2m", model, nfe)},
        (),
        repr(model.process),
        model.prediction.name,
        [],
        shape,
        known,
    )
    made.save(path)


def test_a_report_with_a_recipe(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path / "tuned.fewstep.safetensors", fs.models.load("digits"), (1, 8, 8))
    out = tmp_path / "report"
    command = ["compare", "--model", "digits", "--nfe", "3-4", *SMALL, "--out", str(out)]
    with pytest.warns(UserWarning, match="fewer than two per feature"):
        done = run(*command, "--recipe", "tuned.fewstep.safetensors")
    assert done.exit_code == 0, done.output
    assert re.search(
        r"needs at most 136 evaluations of one sample, and 48 to 384 for each of 40 converged",
        done.stdout,
    )
    assert "flow_ipndm_2 / best" in done.stdout
    assert f"report: {out / 'index.html'}" in done.stdout
    assert {"index.html", "numbers.csv", "numbers.json"} <= {p.name for p in out.iterdir()}
    with (out / "numbers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["nfe"], r["kind"]) for r in rows] == [
        ("flow_ipndm_2", "3", "solver"),
        ("ddim", "3", "solver"),
        ("tuned", "3", "recipe"),
        ("flow_ipndm_2", "4", "solver"),
        ("ddim", "4", "solver"),
    ]
    assert all(float(r[k]) > 0 for r in rows for k in ("median", "frechet", "data"))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "report.parts" / "digits").iterdir()}
    assert len(stamps) == 2 + 5


def test_two_models_one_of_ones_own(tmp_path, monkeypatch):
    written = []

    def write(comparisons, out):
        written.extend(comparisons)
        return out / "index.html"

    monkeypatch.setattr("fewstep._compare._report.write", write)
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    models = ["--model", "mine:model,mine:other", "--shape", "4"]
    done = run("compare", *models, "--nfe", "3", *SMALL)
    assert done.exit_code == 0, done.output
    assert [c.model for c in written] == ["mine:model", "mine:other"]
    assert all([v.method for v in c.lines] == ["flow_ipndm_2", "ddim"] for c in written)
    assert written[0].best(3).median != written[1].best(3).median
    assert (tmp_path / "report.parts" / "mine.model" / "converged.safetensors").exists()
    done = run("recommend", "--model", "mine:model", "--shape", "4", "--nfe", "3", "--count", "8")
    assert done.exit_code == 0, done.output
    assert "Use it: fewstep.sample(model, (16, 4)" in done.stdout
    assert "fewstep sample --model" not in done.stdout


@pytest.mark.slow
def test_recommend_prints_a_command_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("recommend", "--nfe", "2", "--count", "8")
    assert done.exit_code == 0, done.output
    assert "The 8 noises of this report chose nothing" in done.stdout
    (line,) = re.findall(r"Or: fewstep (.*)", done.stdout)
    assert line.startswith("sample --model digits --guidance 1 --solver ")
    done = run(*line.split(), "--count", "2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("compare --model digts", "did you mean"),
        ("compare --model digits,digits", "named twice"),
        ("compare --model ,", "give names separated by commas"),
        ("compare --model a:b", "shape is missing"),
        ("compare --model a:b --shape 3 --guidance 2", "guidance is for bundled models"),
        ("compare --model exact-patches --guidance 2", "has no classes"),
        ("compare --nfe 3-x", "nfe = 3-x"),
        ("compare --solvers ddm", "did you mean"),
        ("compare --out missing/report", "does not exist"),
        ("compare --out file", "file is a file"),
        ("compare --recipe absent", "no such file"),
        ("compare --recipe other", "made for samples of shape"),
        ("compare --recipe other --recipe other.recipe", "called the same"),
        ("compare --device nowhere", "device = nowhere"),
        ("recommend --nfe 0", "nfe = 0"),
        ("recommend --model digts", "did you mean"),
    ],
)
def test_mistakes_are_one_sentence(command, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("other", "other.recipe"):
        if name in command:
            recipe(tmp_path / name, fs.models.load("digits"), (1, 8, 4))
    done = run(*command.split())
    assert isinstance(done.exception, (ValueError, OSError)), done.output
    assert said in str(done.exception)
    assert not (tmp_path / "report.parts").exists()


def test_ranges_of_numbers():
    assert _ranges("3-6,8") == [3, 4, 5, 6, 8]
    assert _ranges("7") == [7]
    for bad in ("", "3-", "-3", "3,,4", "a"):
        with pytest.raises(ValueError, match="nfe ="):
            _ranges(bad)


def test_without_matplotlib_it_says_so_before_it_measures(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "from fewstep._cli import main\n"
        f"sys.argv = ['fewstep', 'compare', '--out', {str(tmp_path / 'report')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "fewstep[plot]"' in done.stderr
    assert "needs at most" not in done.stdout
