"""The command line as a person uses it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fewstep as fs
from fewstep._commands import app


def call(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    code = "from fewstep._cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd
    )
    return done.returncode, done.stdout, done.stderr


def test_sample_writes_a_picture_of_the_classes_asked_for(tmp_path):
    code, out, err = call("sample", "--nfe", "6", "--class", "3,5", "--count", "7", cwd=tmp_path)
    assert code == 0, err
    assert "7 samples of digits" in out
    assert "6 evaluations of 2 conditions each" in out
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    assert picture.shape == (4 * 68 + 4, 2 * 68 + 4)  # two columns, four rows
    assert picture[4:68, 4:68].std() > 30  # a digit, not a flat square
    assert (picture[-68:-4, -68:-4] == 48).all()  # the eighth place is empty


def test_sample_is_reproducible_and_depends_on_the_seed(tmp_path):
    runner = CliRunner()
    pictures = []
    for name, seed, count in (("a", 0, 10), ("b", 0, 20), ("c", 1, 10)):
        out = tmp_path / f"{name}.png"
        arguments = ["sample", "--seed", str(seed), "--count", str(count), "-o", str(out)]
        assert runner.invoke(app, arguments).exit_code == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    first_row = pictures[1][: pictures[0].shape[0] - 4]
    assert np.abs(first_row - pictures[0][:-4]).max() <= 1  # more samples, the same first ten
    assert np.abs(pictures[2] - pictures[0]).max() > 50


def test_plan_prints_and_saves_a_plan_that_sample_runs(tmp_path):
    code, out, _ = call("plan", "dpmpp_3m", "-m", "digits", "-n", "5", "--save", "p", cwd=tmp_path)
    assert code == 0
    plan = fs.Plan.load(tmp_path / "p")
    assert str(plan) in out
    code, out, err = call("sample", "--plan", "p", "--count", "2", cwd=tmp_path)
    assert code == 0, err
    assert "dpmpp_3m" in out
    code, _, err = call("sample", "--plan", "p", "--nfe", "3", cwd=tmp_path)
    assert code == 2
    assert "nfe is fixed by the plan" in err


def test_lists():
    _, out, _ = call("solvers")
    for name, solver in fs.solvers.items():
        line = next(row for row in out.splitlines() if row.startswith(f"│ {name} "))
        assert f"│ {solver.order} " in line
        assert solver.source in line
    _, out, _ = call("models")
    for name in fs.models.models:
        assert f"│ {name} " in out
    assert call("--version")[1] == f"fewstep {fs.__version__}\n"


@pytest.mark.parametrize(
    "command", ["", *(str(command.name) for command in app.registered_commands)]
)
def test_help(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sample -s dpmp_2m", "did you mean 'dpmpp_2m'"),
        ("sample -n 0", "nfe = 0"),
        ("sample -g karas", "did you mean 'karras'"),
        ("sample --class 12", "class = 12; digits has the classes 0 to 9"),
        ("sample --class x", "class = x; give numbers"),
        ("sample --class 5-3", "class = 5-3"),
        ("sample -m exact-patches --class 1", "has no classes"),
        ("sample --count 0", "count = 0"),
        ("sample -m digit", "did you mean 'digits'"),
        ("sample -o samples.xyz", "give a picture's name"),
        ("sample -o no/such/folder.png", "does not exist"),
        ("sample --plan nowhere", "no such file"),
        ("sample --device warp", "device = warp"),
        ("sample --guidance nan", "scale = nan"),
        ("sample --seed -1", "seed = -1"),
        ("plan -p vpp", "did you mean 'vp'"),
        ("plan --shift 3", "belongs to --process flow"),
        ("plan -g 1,0.5,0.6", "node 2 (t = 0.6) goes back toward noise"),
        ("plan -g 1,0.5,0 -n 5", "nfe = 5, but the grid has 3 times"),
        ("plan -g 1,0.5,0 --final min", "a list of times ends where it ends"),
        ("plan -g 1,x", "or times such as"),
        ("plan --predicts eps", "predicts = 'eps'"),
        ("plan -p cosine -g leading", "integer times"),
    ],
)
def test_every_mistake_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, monkeypatch):
    from fewstep import _commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fewstep", *arguments.split()])
    errors: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", errors.append)
    with pytest.raises(SystemExit) as stop:
        _commands.run()
    text = "".join(errors)
    assert stop.value.code == 2
    assert words in text
    assert text.startswith("fewstep: ")
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2_too():
    assert CliRunner().invoke(app, ["sample", "--nfe", "five"]).exit_code == 2
    assert CliRunner().invoke(app, ["smaple"]).exit_code == 2


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['typer'] = None; sys.modules['PIL'] = None\n"
        "from fewstep._cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "fewstep[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
