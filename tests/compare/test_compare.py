"""`compare`: its numbers against a loop by hand, its choices, resuming, and what it refuses."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate._by_value import PlansByValue
from fewstep._calibrate._fingerprint import fingerprint, guidance_of
from fewstep._calibrate._learn import score
from fewstep._calibrate._recipe import Recipe
from fewstep._compare._compare import _FEW, SOLVERS, drawn, prepare
from fewstep.metrics import error_ratio, error_summary, frechet_distance, sliced_wasserstein

COUNT = 16
GRIDS = ("softened", "lambda", "karras")
USED = ("dpmpp_2m", "flow_ipndm_2", "heun")


def mixture(process=None, predicts="data"):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 3))
    model = fs.exact.Mixture(np.full(5, 0.2), means, [0.02] * 5)
    return model.denoiser(fs.EDM() if process is None else process, predicts)


def compared(model=None, shape=(3,), **more: Any) -> fs.Comparison:
    settings = {"solvers": USED, "nfe": (4, 5), "grids": GRIDS, "count": COUNT, "progress": False}
    return fs.compare(mixture() if model is None else model, shape, **{**settings, **more})


def squares(x: torch.Tensor) -> torch.Tensor:
    """Features (n, 4)."""
    flat = x.reshape(len(x), -1).float()
    return torch.cat([flat[:, :2], flat[:, :2] ** 2], 1)


@pytest.fixture(scope="module")
def made() -> fs.Comparison:
    data = squares(torch.randn(200, 3, generator=torch.Generator().manual_seed(3)))
    return compared(features=squares, data=data)


def converged(model, first, count, shape=(3,), cond=None):
    if shape == (3,) and repr(model.process) == repr(fs.EDM()):
        return of_mixture(first, count)
    return solved(model, first, count, shape, cond)


@lru_cache
def of_mixture(first, count):
    return solved(mixture(), first, count)


def solved(model, first, count, shape=(3,), cond=None):
    x = fs.start_noise((count, *shape), 0, first=first).double() * model.process.prior_std(
        model.process.t_start
    )
    more = {"solver": "unipc_3", "nfe": 400, "grid": "lambda", "cond": cond, "progress": False}
    return fs.sample(model, x=x, **more)


def by_hand(model, line, first, count, shape=(3,), grid=None, cond=None):
    return fs.sample(
        model,
        (count, *shape),
        solver=line.method,
        nfe=line.nfe,
        grid=grid or line.grid,
        final=line.final,
        first=first,
        cond=cond,
        progress=False,
    )


def distances(x, y):
    return (x - y).double().reshape(len(x), -1).square().mean(1).sqrt().numpy()


def close(a, b, rel=1e-3, tiny=0.0):
    assert tuple(a) == pytest.approx(tuple(b), rel=rel, abs=tiny)


def square(estimate):
    """Of a distance, which near 0 is the root of what has an error."""
    return np.square(estimate)


# Numbers ------------------------------------------------------------------------------------------


def test_numbers_are_those_of_a_loop_by_hand(made):
    model = mixture()
    assert [(v.method, v.nfe) for v in made.lines] == [(m, n) for n in (4, 5) for m in USED]
    fine, other = converged(model, 0, COUNT), converged(model, COUNT + _FEW, 2 * COUNT)
    data = squares(torch.randn(200, 3, generator=torch.Generator().manual_seed(3)))
    for nfe in made.nfes:
        lines = [v for v in made.lines if v.nfe == nfe]
        samples = [by_hand(model, v, 0, COUNT) for v in lines]
        errors = [distances(x, fine) for x in samples]
        best = int(np.argmin([np.median(e) for e in errors]))
        for i, (v, x, e) in enumerate(zip(lines, samples, errors, strict=True)):
            its = error_summary(e)
            close(v.median, its.median)
            close(v.rms, its.rms)
            close(v.p90, its.p90)
            close(v.ratio, error_ratio(e, errors[best]), 2e-3)
            assert v.best == (i == best)
            assert v.tied == (i == best or v.ratio.low <= 1 <= v.ratio.high)
            close(
                square(v.sliced), square(sliced_wasserstein(x, other, directions=128)), 1e-3, 5e-5
            )
            assert v.frechet is not None
            assert v.data is not None
            close(v.frechet, frechet_distance(squares(x), squares(other)), 1e-3, 1e-4)
            close(v.data, frechet_distance(squares(x), data), 1e-3, 1e-4)
    sliced, frechet, of_data = (made.converged[k] for k in ("sliced", "frechet", "data"))
    assert None not in (sliced, frechet, of_data)
    close(square(sliced), square(sliced_wasserstein(fine, other, directions=128)), 1e-3, 5e-5)
    close(frechet, frechet_distance(squares(fine), squares(other)), 1e-3, 1e-4)
    close(of_data, frechet_distance(squares(fine), data), 1e-3, 1e-4)


def test_the_grid_is_the_best_on_noises_that_are_not_reported():
    model, names = mixture(), ("softened", "lambda", "arctan")
    made = compared(model, solvers=["ddim", "dpmpp_2m"], grids=names, count=8, nfe=(6, 8))
    fine, mine = converged(model, 8, _FEW), converged(model, 0, 8)
    differ = 0
    for v in made.lines:
        there, here = (
            [score(distances(by_hand(model, v, first, n, grid=g), y)) for g in names]
            for first, n, y in ((8, _FEW, fine), (0, 8, mine))
        )
        assert v.grid == names[int(np.argmin(there))]
        differ += int(np.argmin(there)) != int(np.argmin(here))
    assert differ  # the reported noises would have chosen others


@pytest.mark.slow
def test_a_solver_runs_to_the_better_end():
    model = mixture()
    made = compared(model, finals=("zero", "min"), nfe=4)
    fine = converged(model, COUNT, _FEW)
    for v in made.lines:
        scores = {}
        for grid in GRIDS:
            for final in ("zero", "min"):
                x = fs.sample(
                    model,
                    (_FEW, 3),
                    solver=v.method,
                    nfe=4,
                    grid=grid,
                    final=final,
                    first=COUNT,
                    progress=False,
                )
                scores[grid, final] = score(distances(x, fine))
        assert (v.grid, v.final) == min(scores, key=lambda k: scores[k])


def test_labels_are_drawn_at_random_and_guidance_is_the_models():
    base = fs.models.load("digits")
    model = fs.Guided(base, 2.0, {"label": 10})
    labels = {"label": torch.arange(10)}
    made = fs.compare(
        model,
        (1, 8, 8),
        solvers=["ddim"],
        nfe=[3],
        grids=["softened"],
        count=8,
        reference=8,
        cond=labels,
        progress=False,
    )
    prompts, cond = drawn(labels, 8 + _FEW + 8, 0)
    assert prompts == 10
    assert cond["label"][:20].tolist() != [i % 10 for i in range(20)]
    mine = {"label": cond["label"][:8]}
    x = fs.start_noise((8, 1, 8, 8), 0) * 80.0
    fine = fs.sample(
        model, x=x, solver="unipc_3", nfe=192, grid="lambda", cond=mine, progress=False
    )
    errors = distances(by_hand(model, made.lines[0], 0, 8, (1, 8, 8), cond=mine), fine)
    close(made.lines[0].median, error_summary(errors).median)
    assert made.about["guidance"] == guidance_of(model)
    assert "10" in made.about["conditions"]
    assert {k: v.shape for k, v in made.pictures.items()} == {
        ("converged", 0): (8, 8, 8, 1),
        ("ddim", 3): (8, 8, 8, 1),
    }
    right = ((fine[:, 0].clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(made.pictures["converged", 0][..., 0] - right).max() <= 0.51


def test_conditions_are_drawn_independently_from_all_prompts():
    cond = {"a": list("xyz"), "b": {"c": np.arange(3)}, "same": 7}
    prompts, many = drawn(cond, 3000, 1)
    assert (prompts, many["same"]) == (3, 7)
    index = many["b"]["c"]
    assert "".join(many["a"]) == "".join("xyz"[i] for i in index)
    counts = np.bincount(index)
    assert counts.sum() == 3000
    assert 900 < counts.min() < counts.max() < 1100
    assert drawn({"same": 7}, 5, 0) == (0, {"same": 7})
    with pytest.raises(ValueError, match="a has 3, b has 2"):
        drawn({"a": [1, 2, 3], "b": [1, 2]}, 4, 0)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 4), (3, 4, 4), (2, 4, 4)])
def test_any_shape_and_pictures_where_there_are_some(shape):
    d = math.prod(shape)
    flat = fs.exact.Gaussian(np.zeros(d), np.linspace(0.1, 1.0, d))
    inner = flat.denoiser(fs.Flow(), "flow")

    def network(x, t, **cond):
        return inner.network(x.reshape(len(x), -1), t, **cond).reshape(x.shape)

    model = fs.Denoiser(network, fs.Flow(), "flow")
    made = compared(model, shape, nfe=4, solvers=["dpmpp_2m", "ddim"], name="g", images=3)
    assert made.model == "g"
    assert made.best(4).method == "dpmpp_2m"
    assert made.best(4).ratio == (1, 1, 1)
    assert not next(v for v in made.lines if v.method == "ddim").tied
    if shape == (3, 4, 4):
        assert {v.shape for v in made.pictures.values()} == {(3, 4, 4, 3)}
    else:
        assert made.pictures == {}


@pytest.mark.slow
def test_half_precision_networks_are_compared_with_themselves():
    inner = mixture(fs.VP(), "noise")

    def network(x, t, **cond):
        assert x.dtype == torch.bfloat16
        return inner.network(x.float(), t, **cond).bfloat16()

    model = fs.Denoiser(network, fs.VP(), "noise", dtype=torch.bfloat16)
    made = compared(model, nfe=6)
    assert all(0 < v.median.value < 0.5 for v in made.lines)


def test_samples_that_are_not_finite_have_infinite_distances():
    def network(x, t, **cond):
        few = 5 if calls.append(len(x)) is None and len(calls) == last else 0
        out = x / (1 + t.reshape(-1, 1) ** 2)
        return out.masked_fill((torch.arange(len(x)) < few)[:, None], torch.inf)

    model = fs.Denoiser(network, fs.EDM(), "data")
    settings = {"solvers": ["ddim"], "nfe": [3], "grids": ["lambda"], "features": squares}
    calls: list[int] = []
    last = -1
    compared(model, **settings)
    last, calls = len(calls), []
    (v,) = compared(model, **settings).lines
    infinite = (math.inf,) * 3
    assert (v.rms, v.sliced, v.frechet) == (infinite,) * 3
    assert math.isfinite(v.median.value)


# Cost ---------------------------------------------------------------------------------------------


def test_evaluations_are_known_beforehand_and_the_first_is_shared():
    inner, counts = fs.exact.Gaussian(np.zeros(3), np.ones(3)).denoiser(fs.EDM(), "data"), [0]

    def network(x, t, **cond):
        counts[0] += len(x)
        return inner.network(x, t, **cond)

    model = fs.Denoiser(network, fs.EDM(), "data")
    job = prepare(
        model, (3,), solvers=USED, nfe=(4, 5), grids=GRIDS, count=8, reference=8, batch=30
    )
    assert counts[0] == 0
    assert job.converged == 16 + _FEW
    methods, choice = 3 * 9 * 8, 3 * 3 * 9 * _FEW
    assert job.evaluations == methods + choice
    fs.teach(model, (3,), job.converged)
    converged = counts[0] + 2  # two questions identify the network
    # Of 3 x 2 methods one asks about the noises; the choice shares more, but reaches every grid.
    methods -= 5 * 8
    counts[0] = 0
    job.run(False)
    assert methods + 3 * 9 * _FEW <= counts[0] - converged <= methods + choice - 2 * 3 * 2 * _FEW
    one = prepare(
        model, (3,), solvers=USED, nfe=(4, 5), grids=["lambda"], count=8, reference=8, batch=30
    )
    counts[0] = 0
    one.run(False)
    assert counts[0] - converged == methods


def test_every_deterministic_solver_can_be_asked_for():
    wanted = [s.name for s in fs.solvers.values() if not (s.stochastic or s.adaptive)]
    job = prepare(mixture(), (3,), solvers="all", nfe=5, grids=["lambda"])
    assert [e.method for e in job.entries] + [m for m, _ in job.skipped] == wanted
    assert all(e.plans[0].nfe == 5 for e in job.entries)
    usual = prepare(mixture(), (3,), nfe=5)
    assert tuple(e.method for e in usual.entries) == SOLVERS
    assert len(SOLVERS) >= 12


@pytest.mark.slow
def test_every_deterministic_solver_runs():
    made = compared(solvers="all", nfe=(3, 8), grids=["softened", "lambda"])
    assert not made.skipped
    assert made.best(8).median.value < 0.02
    assert sum(v.best for v in made.lines) == 2


def test_what_cannot_spend_a_number_of_evaluations_is_left_out_with_its_reason():
    process = fs.DiscreteVP.linear(6)
    inner = mixture(fs.VP(), "noise")
    model = fs.Denoiser(inner.network, process, "noise")
    job = prepare(model, (3,), solvers=["ddim", "heun"], nfe=(5, 9), grids=["uniform"])
    assert {e.nfe for e in job.entries if e.method == "ddim"} == {5}
    assert "9 steps do not fit" in job.skipped["ddim", 9]
    with pytest.raises(ValueError, match="nothing to compare"):
        prepare(model, (3,), solvers=["ddim"], nfe=9, grids=["uniform"])


# Resuming -----------------------------------------------------------------------------------------


def same(one: fs.Comparison, two: fs.Comparison) -> bool:
    return one.json() == two.json() and all(
        np.array_equal(v, two.pictures[k]) for k, v in one.pictures.items()
    )


def test_finished_parts_are_kept_and_more_may_be_asked_for(tmp_path):
    folder = tmp_path / "parts"
    one = compared(resume=folder)
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert sum(name[0] in "45" for name in stamps) == len(one.lines)
    assert same(one, compared(resume=folder))
    assert same(one, compared())
    more = compared(resume=folder, solvers=(*USED, "ddim"), nfe=(4, 5, 6))
    kept = [v for v in more.lines if v.method in USED and v.nfe < 6]
    assert [v.median for v in kept] == [v.median for v in one.lines]
    after = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert {k: after[k] for k in stamps if k != "job.json"} == {
        k: v for k, v in stamps.items() if k != "job.json"
    }
    # Another solver of the same name is not taken for it.
    changed = compared(resume=folder, solvers=[fs.exponential(2, name="ddim")], nfe=4)
    (old,) = [v for v in more.lines if (v.method, v.nfe) == ("ddim", 4)]
    assert changed.lines[0].median != old.median


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"count": COUNT + 1},
        {"reference": 40},
        {"model": mixture(fs.EDM(sigma_max=60))},
        {"features": squares},
        {"batch": 5},
    ],
    ids=" ".join,
)
def test_the_folder_of_another_job_is_refused(tmp_path, change):
    (tmp_path / "job.json").write_text(_job_text())
    with pytest.raises(ValueError, match="holds the parts of another job"):
        compared(**{"model": mixture(), "resume": tmp_path, **change})


_TEXT: list[str] = []


def _job_text() -> str:
    """What the job of `compared` says of itself."""
    if not _TEXT:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            compared(resume=folder, solvers=["ddim"], nfe=2, grids=["lambda"])
            with open(os.path.join(folder, "job.json")) as file:
                _TEXT.append(file.read())
    return _TEXT[0]


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from compare.test_compare import compared
folder, out = sys.argv[1:]
made = compared(resume=folder, nfe=(3, 4, 5, 6, 8), count=64)
open(out, "w").write(json.dumps(made.json()))
"""


@pytest.mark.slow
def test_killed_at_any_time_it_resumes_to_the_same_numbers(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(os.path.dirname(__file__))))

    def run(folder, out, stop):
        job = subprocess.Popen([sys.executable, str(script), str(folder), str(out)])
        while job.poll() is None:
            if stop is not None and folder.exists() and len(list(folder.iterdir())) >= stop:
                job.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        return job.wait()

    assert run(tmp_path / "whole", tmp_path / "a.json", None) == 0
    assert len(list((tmp_path / "whole").iterdir())) == 2 + 5 + 15
    kills = 0
    for stop in (1, 2, 3, 5, 6, 9, 12, 16, 20):  # parts, whole or half-written
        kills += run(tmp_path / "parts", tmp_path / "b.json", stop) == -signal.SIGKILL
    assert kills >= 7
    assert run(tmp_path / "parts", tmp_path / "b.json", None) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


# Recipes ------------------------------------------------------------------------------------------


def recipe(model, plans, shape=(3,), cond=None) -> Recipe:
    known = fingerprint(model, shape, cond or {}, 1)
    return Recipe(
        plans,
        (),
        repr(model.process),
        model.prediction.name,
        guidance_of(model),
        shape,
        known,
    )


def test_recipes_run_beside_solvers():
    model = mixture()
    plan = fs.plan("unipc_3", model, 4, grid="karras")
    made = compared(recipes={"mine": recipe(model, {4: plan})}, solvers=["unipc_3", "ddim"])
    mine = next(v for v in made.lines if v.method == "mine")
    (other,) = compared(solvers=["unipc_3"], nfe=4, grids=["karras"]).lines
    assert (mine.kind, mine.nfe, mine.grid, mine.final) == ("recipe", 4, "karras", "zero")
    close(mine.median, other.median, 1e-5)
    assert made.skipped["mine", 5] == "nfe = 5; this recipe has plans for 4"


class Labelled(torch.nn.Module):
    """Data around the label."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x, t, label):
        t2 = t.reshape(-1, 1) ** 2
        mean = label.reshape(-1, 1).to(x.dtype)
        return mean + (self.scale * x - mean) * 0.04 / (0.04 + t2)


def test_a_recipe_of_one_plan_per_class_gives_every_sample_its_own():
    model = fs.Denoiser(Labelled(), fs.EDM(), "data")
    cond = {"label": torch.tensor([0, 1, 2])}
    grids = {0: "lambda", 1: "karras", 2: "softened"}
    by = PlansByValue("label", {v: fs.plan("dpmpp_2m", model, 4, grid=g) for v, g in grids.items()})
    made = compared(
        model,
        (2,),
        cond=cond,
        recipes={"each": recipe(model, {4: by}, (2,))},
        solvers=["ddim"],
        nfe=4,
        batch=6,
    )
    _, drawn_ = drawn(cond, 3 * COUNT + _FEW, 0)
    labels = drawn_["label"][:COUNT]
    x = fs.start_noise((COUNT, 2), 0)
    out = torch.empty_like(x)
    for v, grid in grids.items():
        rows = labels == v
        settings = {"nfe": 4, "grid": grid, "cond": {"label": labels[rows]}, "progress": False}
        out[rows] = fs.sample(model, x=80 * x[rows], solver="dpmpp_2m", **settings)
    fine = converged(model, 0, COUNT, (2,), {"label": labels})
    mine = next(v for v in made.lines if v.method == "each")
    close(mine.median, error_summary(distances(out, fine)).median)


def test_recipes_that_do_not_fit_are_refused_before_any_sample():
    model = fs.Denoiser(Labelled(), fs.EDM(), "data")
    good = recipe(model, {4: fs.plan("ddim", model, 4)}, (2,))
    calls = []

    class Counting(Labelled):
        def forward(self, x, t, label):
            calls.append(len(x))
            return super().forward(x, t, label)

    here = fs.Denoiser(Counting(), fs.EDM(), "data")
    changed = Counting()
    changed.scale.data += 0.5
    cond = {"label": torch.tensor([0, 1])}
    for other, shape, said in (
        (here, (3,), r"made for samples of shape \(2,\), not \(3,\)"),
        (fs.Guided(here, 2.0, {"label": 0}), (2,), "another model: guidance scale 2"),
        (fs.Denoiser(changed, fs.EDM(), "data"), (2,), "another network"),
        (fs.Denoiser(Counting(), fs.VE(), "data"), (2,), "another model: process VE"),
    ):
        with pytest.raises(ValueError, match=said):
            compared(other, shape, recipes={"r": good}, cond=cond)
    assert calls == []
    assert compared(here, (2,), recipes={"r": good}, cond=cond, nfe=4).lines
    assert calls


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "model = 3; wrap your network"),
        ({"shape": ()}, "shape = "),
        ({"shape": (3, 0)}, "shape = "),
        ({"solvers": ["dpmp_2m"]}, "did you mean"),
        ({"solvers": "dpmpp_2m"}, "solvers = 'dpmpp_2m'; give a list"),
        ({"solvers": ["sde_dpmpp_2m"]}, "draws noise"),
        ({"solvers": []}, "nothing to compare"),
        ({"nfe": ()}, "nfe is empty"),
        ({"nfe": 0}, "nfe = 0"),
        ({"nfe": (4, 2.5)}, "nfe = 2.5"),
        ({"grids": ["lamda"]}, "lamda"),
        ({"grids": "lambda"}, "grids = 'lambda'"),
        ({"grids": []}, "grids = "),
        ({"finals": ["one"]}, "final = 'one'"),
        ({"count": 7}, "count = 7; need an integer >= 8"),
        ({"count": True}, "count = True"),
        ({"reference": 3}, "reference = 3"),
        ({"seed": -1}, "seed = -1"),
        ({"batch": 0}, "batch = 0"),
        ({"images": -1}, "images = -1"),
        ({"data_range": (1, 1)}, "data_range = "),
        ({"cond": {"a": [1, 2], "b": [1]}}, "a has 2, b has 1"),
        ({"features": 3}, "features = 3"),
        ({"features": torch.nn.Linear(3, 3)}, "training mode"),
        ({"data": np.zeros((9, 2))}, "data is given without features"),
        ({"data": np.zeros(9), "features": squares}, r"data has shape \(9,\)"),
        ({"data": np.full((9, 4), np.nan), "features": squares}, "need finite"),
        ({"data": np.zeros((9, 5)), "features": squares}, "data has 5 features"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_refused_before_the_network_is_asked(change, said):
    def network(x, t):
        raise AssertionError("asked")

    model = fs.Denoiser(network, fs.EDM(), "data")
    with pytest.raises(ValueError, match=said):
        compared(**{"model": model, **change})


def test_names_are_given_once():
    model = mixture()
    mine = recipe(model, {4: fs.plan("ddim", model, 4)})
    for label in ("heun", "converged"):
        with pytest.raises(ValueError, match=f"the name '{label}' is taken"):
            compared(model, recipes={label: mine})
    job = prepare(model, (3,), solvers=["euler", "ddim"], nfe=4)
    assert [e.method for e in job.entries] == ["ddim"]


def test_too_few_samples_for_the_features_are_warned_of_once():
    with pytest.warns(UserWarning, match="16 samples for 12 features") as seen:
        compared(features=lambda x: torch.cat([squares(x)] * 3, 1), solvers=["ddim"], nfe=3)
    assert len(seen) == 1


def test_a_model_that_does_not_converge_to_numbers_is_refused():
    model = fs.Denoiser(lambda x, t: x / 0, fs.EDM(), "data")
    with pytest.raises(FloatingPointError, match="converged samples are not finite"):
        compared(model)
