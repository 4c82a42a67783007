"""`calibrate` from end to end: what it keeps, resumes, refuses and says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate._calibrate import (
    METHODS,
    _compared,
    _described,
    calibrate,
    candidate,
    screened,
)
from fewstep._calibrate._learn import score
from fewstep._calibrate._recipe import Recipe
from fewstep._calibrate._teacher import cycled

SIZES = (24, 16, 24)


def mixture(process=None, predicts="data"):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 3))
    model = fs.exact.Mixture(np.full(5, 0.2), means, [0.02] * 5)
    return model.denoiser(fs.EDM() if process is None else process, predicts)


def fitted(model, nfe=(4,), methods=("learned",), **more):
    more = {"noises": SIZES, "progress": False, "candidates": 60, **more}
    return calibrate(model, (3,), nfe, methods=methods, **more)


@pytest.fixture(scope="module")
def made():
    return fitted(mixture(), methods=METHODS)


def test_every_method_is_compared_and_the_best_is_kept(made):
    kinds = {c.kind for c in made.candidates}
    assert kinds == {"solver", *METHODS}
    (chosen,) = [c for c in made.candidates if c.chosen]
    plain = made.best_uncalibrated(4)
    assert chosen.held <= plain.held
    assert chosen.median < plain.median
    assert all(c.low <= c.median <= c.high <= np.inf for c in made.candidates)
    assert all(c.evaluations > 0 for c in made.candidates)
    assert made.statistics is not None
    assert made.plans[4].nfe == 4


def test_the_errors_in_the_report_are_those_of_a_run(made):
    """The third set of noises, run through the public loop against the exact solution."""
    model = mixture()
    first, count = SIZES[0] + SIZES[1], SIZES[2]
    x = fs.start_noise((count, 3), 0, first=first) * 80.0
    ours = fs.sample(model, (count, 3), solver=made, nfe=4, first=first, progress=False)
    fine = fs.sample(model, solver="rk4", nfe=2000, grid="lambda", x=x.double(), progress=False)
    errors = (ours - fine).square().mean(1).sqrt()
    assert np.median(errors.numpy()) == pytest.approx(made.chosen(4).median, rel=0.02)


def test_a_recipe_of_calibrate_goes_through_its_file(made, tmp_path):
    made.save(tmp_path / "r")
    read = Recipe.load(tmp_path / "r")
    model = mixture()
    a, b = (fs.sample(model, (3, 3), solver=r, nfe=4, progress=False) for r in (made, read))
    assert torch.equal(a, b)
    assert str(read) == str(made)


def test_parts_are_kept_and_gone_on_from(tmp_path):
    model = mixture()
    folder = tmp_path / "parts"
    methods = ("compensated",)
    one = fitted(model, methods=methods, resume=folder)
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert {"job.json", "teacher.safetensors", "solver-4.safetensors"} <= set(stamps)
    two = fitted(model, (3, 4), methods, resume=folder)
    assert two.plans[4] == one.plans[4]
    assert two.nfes == (3, 4)
    for name, stamp in stamps.items():
        if name != "job.json":
            assert (folder / name).stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="parts of another calibration"):
        fitted(model, methods=methods, resume=folder, seed=1)
    with pytest.raises(ValueError, match="parts of another calibration"):
        fitted(model, methods=methods, resume=folder, jacobian="differences")
    with pytest.raises(ValueError, match="parts of another calibration"):
        fitted(mixture(fs.EDM(sigma_max=60)), resume=folder)


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
from calibrate.test_calibrate import fitted, mixture
folder, out = sys.argv[1:]
fitted(mixture(), nfe=(3, 4), methods=("learned", "statistics"), resume=folder).save(out)
"""


@pytest.mark.slow
def test_killed_at_any_time_it_resumes_to_the_same_file(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(os.path.dirname(__file__))))

    def run(folder, out, after=None):
        job = subprocess.Popen([sys.executable, str(script), str(folder), str(out)])
        if after is None:
            assert job.wait(timeout=300) == 0
            return
        time.sleep(after)
        job.send_signal(signal.SIGKILL)
        job.wait()

    run(tmp_path / "whole", tmp_path / "a")
    for i in range(6):
        run(tmp_path / "cut", tmp_path / "b", after=2.5 + 0.7 * i)
    run(tmp_path / "cut", tmp_path / "b")
    a, b = (Recipe.load(tmp_path / name) for name in "ab")
    assert a.plans == b.plans
    assert [(c.name, c.median, c.rms) for c in a.candidates] == [
        (c.name, c.median, c.rms) for c in b.candidates
    ]
    assert np.array_equal(a.statistics.s, b.statistics.s)


@pytest.mark.slow
def test_statistics_of_two_seeds_differ_by_less_than_they_gain():
    """Gain: over the best data-prediction solver without statistics, on the same grid."""
    model, cond = fs.models.load("digits"), {"label": torch.arange(256) % 10}
    test = fs.teach(model, (1, 8, 8), 256, cond=cond, first=1000)
    data = fs.teach(model, (1, 8, 8), 256, cond=cond).samples
    tables = [
        fs.estimate_ems(model, data, cond=cond, levels=60, seed=seed, progress=False)
        for seed in (0, 1)
    ]
    for nfe in (5, 6, 8, 10):

        def error(solver, nfe=nfe):
            return float(np.median(test.errors(fs.plan(solver, model, nfe, grid="softened"))))

        plain = min(error(s) for s in ("dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3"))
        ours = [error(fs.dpm_solver_v3(ems)) for ems in tables]
        assert abs(ours[0] - ours[1]) < 0.5 * (plain - max(ours))


def test_bands_are_a_candidate_where_they_are_asked_for(tmp_path):
    gaussian = fs.exact.Gaussian(np.linspace(-1, 1, 12), np.geomspace(9, 1e-3, 12))
    model = gaussian.denoiser(fs.EDM())
    how = {"noises": (64, 32, 64), "methods": ["learned", "bands"], "jacobian": "differences"}
    made = fs.calibrate(model, (12,), 2, progress=False, resume=tmp_path / "parts", **how)
    assert made.chosen(2).kind == "bands"
    assert made.plans[2].basis is not None
    learned = next(c for c in made.candidates if c.kind == "learned")
    assert made.chosen(2).median < learned.median / 2
    made.save(tmp_path / "recipe")
    again = Recipe.load(tmp_path / "recipe")
    assert again.plans == made.plans
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)) * 80
    found = [fs.sample(model, solver=r.plan_for(model, 2), x=x) for r in (made, again)]
    assert torch.equal(*found)
    resumed = fs.calibrate(model, (12,), 2, progress=False, resume=tmp_path / "parts", **how)
    assert resumed.plans == made.plans
    with pytest.raises(ValueError, match=r"methods = \['bands'\]; 'bands' starts from 'learned'"):
        fs.calibrate(model, (12,), 2, progress=False, methods=["bands"])


def test_a_budget_leaves_out_what_does_not_fit_and_says_so():
    made = fitted(mixture(), methods=METHODS, budget=1e-3)
    assert made.info["skipped"]
    assert made.chosen(4).kind == "solver"
    assert "no calibrated plan is better" in str(made)
    assert "not tried" in str(made)


def test_a_lower_median_does_not_buy_a_larger_root_mean_square():
    errors = {
        "solver": np.array([1.0, 1.0, 1.0, 1.0]),
        "tail": np.array([0.01, 0.01, 0.01, 2.5]),
        "both": np.array([0.9, 0.9, 0.9, 0.9]),
    }
    noises = SimpleNamespace(errors=errors.get)
    job = SimpleNamespace(held=noises, test=noises)
    kinds = {"solver": "solver", "tail": "learned", "both": "search"}
    found = [SimpleNamespace(name=k, kind=v, plan=k, evaluations=1, seconds=1.0)
             for k, v in kinds.items()]  # fmt: skip
    assert score(errors["tail"]) < score(errors["both"]) < score(errors["solver"])
    chosen, lines = _compared(job, 4, found)
    assert chosen.plan == "both"
    assert [c.chosen for c in lines] == [False, False, True]
    assert _compared(job, 4, found[:2])[0].plan == "solver"


def test_parts_belong_to_their_conditions_to_the_last_number():
    model, z = mixture(), torch.zeros(5000)
    z[2500] = 1.0
    settings = ((3,), {"values": np.zeros(2)}), (SIZES, 0, torch.float32, None, {})
    same, other = ({"text": [torch.zeros(5000), v]} for v in (torch.zeros(5000), z))
    (shape, known), rest = settings
    assert _described(model, shape, known, same, *rest) != _described(
        model, shape, known, other, *rest
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": lambda x, t: x}, "wrap your network"),
        ({"nfe": 0}, "need integers >= 1"),
        ({"nfe": (4, 2.5)}, "need integers >= 1"),
        ({"nfe": ()}, "need integers >= 1"),
        ({"methods": ("learnt",)}, "methods = 'learnt'"),
        ({"noises": (1, 2, 3)}, "at least 2"),
        ({"screen": "some"}, "screen = 'some'"),
        ({"budget": 0}, "budget = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"candidates": 0}, "candidates = 0"),
        ({"guidance": 2.0}, "needs uncond"),
        ({"uncond": {"label": 0}}, "without guidance"),
        ({"jacobian": "backward"}, "jacobian = 'backward'"),
        ({"reduction": "pixel"}, "reduction = 'pixel'"),
        ({"cond": {"a": torch.zeros(3), "b": [1, 2]}}, "one entry per prompt"),
    ],
)
def test_bad_arguments_are_refused_before_the_network_is_asked(change, said):
    asked = []

    def network(x, t, **cond):
        asked.append(t)
        return x

    model = fs.Denoiser(network, fs.EDM(), "data")
    arguments = {"model": model, "shape": (3,), "nfe": 4, "progress": False, **change}
    with pytest.raises(ValueError, match=said):
        calibrate(arguments.pop("model"), arguments.pop("shape"), arguments.pop("nfe"), **arguments)
    assert not asked


def test_conditions_are_used_in_turn():
    cond = {"label": torch.arange(3), "text": ["a", "b", "c"], "size": 7, "more": {"z": np.eye(3)}}
    got = cycled(cond, 7)
    assert got["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert got["text"] == ["a", "b", "c", "a", "b", "c", "a"]
    assert got["size"] == 7
    assert got["more"]["z"].shape == (7, 3)


@pytest.mark.parametrize("process", [fs.VP(), fs.Flow(), fs.DiscreteVP.scaled_linear()], ids=repr)
def test_other_processes_and_predictions(process):
    made = fitted(mixture(process, "noise" if process.alpha(process.t_start) > 0 else "flow"))
    best = made.chosen(4)
    assert best.held <= made.best_uncalibrated(4).held
    for call in made.plans[4].calls:
        if call is not None and made.plans[4].integer_times:
            assert call.c_noise == round(call.c_noise)


def test_guided_and_conditional():
    exact = fs.exact.digits()
    model = exact.denoiser(fs.EDM())
    made = calibrate(
        model,
        (1, 8, 8),
        3,
        cond={"label": torch.arange(10)},
        guidance=1.5,
        uncond={"label": -1},
        methods=("compensated",),
        noises=(12, 8, 8),
        progress=False,
    )
    assert made.guidance[0]["scale"] == 1.5
    with pytest.raises(ValueError, match="no guidance, where the recipe is for"):
        fs.sample(model, (2, 1, 8, 8), solver=made, nfe=3, cond={"label": torch.arange(2)})


def test_all_solvers_are_screened_once():
    plans, names = screened(mixture(), 4, "all")
    assert len(plans) == len(names) == len(set(names))
    assert all(p.nfe == 4 for p in plans)
    assert {n for n, _, _ in names} > {"heun", "ddim", "unipc_2", "bdia"}
    assert len(screened(mixture(), 4)[0]) < len(plans) / 5


def test_intervals_of_a_median_cover_it():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        line = candidate(4, "x", "solver", np.exp(rng.normal(size=101)), np.ones(3))
        inside += line.low <= 1.0 <= line.high
    assert 370 <= inside <= 396


def test_the_commands(tmp_path, monkeypatch, capsys):
    from fewstep._commands import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import fewstep as fs\nmodel = fs.models.load('digits')\n"
        "def make():\n    return fs.exact.Gaussian([0.0, 1.0], 0.3).denoiser(fs.EDM())\n"
    )
    base = ["--methods", "compensated", "--nfe", "3", "--noises", "12,8,8"]
    app(
        ["calibrate", *base, "--guidance", "1.5", "--out", "r.safetensors", "--picture", "p.png"],
        standalone_mode=False,
    )
    said = capsys.readouterr().out
    assert "NFE 3:" in said
    assert "saved to r.safetensors" in said
    assert (tmp_path / "p.png").stat().st_size > 10_000
    app(
        ["sample", "--recipe", "r.safetensors", "--count", "4", "--out", "s.png"],
        standalone_mode=False,
    )
    assert "3 evaluations of 2 conditions each" in capsys.readouterr().out
    with pytest.raises(ValueError, match="guidance scale 4"):
        app(
            ["sample", "--recipe", "r.safetensors", "--guidance", "4", "--out", "s.png"],
            standalone_mode=False,
        )
    app(
        ["calibrate", *base, "--model", "own:make", "--shape", "2", "--out", "o"],
        standalone_mode=False,
    )
    assert json.loads((tmp_path / "o.parts" / "job.json").read_text())["shape"] == [2]
    for more, wrong in (
        (["--model", "own:nothing", "--shape", "2"], "nothing"),
        (["--model", "own:make"], "shape is missing"),
        (["--shape", "1xx"], "give integers"),
        (["--noises", "3,4"], "three numbers"),
    ):
        with pytest.raises(ValueError, match=wrong):
            app(["calibrate", "--nfe", "3", *more], standalone_mode=False)
