"""`recommend`: what it chooses on, what it reports, what it says."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate._calibrate import screened
from fewstep._calibrate._learn import score
from fewstep._calibrate._recipe import called
from fewstep._compare._recommend import _EXACT, _ROUGH, Option
from fewstep._sampling import DEFAULT_GRID, DEFAULT_SOLVER
from fewstep.metrics import Estimate, error_ratio, error_summary

COUNT = 32


def mixture(process=None, predicts="data"):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, 3))
    model = fs.exact.Mixture(np.full(5, 0.2), means, [0.02] * 5)
    return model.denoiser(fs.EDM() if process is None else process, predicts)


@lru_cache
def converged(first, count):
    x = 80 * fs.start_noise((count, 3), 0, first=first)
    return x, fs.sample(mixture(), x=x, solver="unipc_3", nfe=192, grid="lambda", progress=False)


def errors(model, first, count, **how):
    x, fine = converged(first, count)
    off = fs.sample(model, x=x, progress=False, **how) - fine
    return off.double().square().mean(1).sqrt().numpy()


@pytest.fixture(scope="module")
def made():
    return fs.recommend(mixture(), (3,), 5, count=COUNT, progress=False)


def of(option):
    return {"solver": option.solver, "grid": option.grid, "final": option.final, "nfe": 5}


def test_it_reports_noises_that_chose_nothing(made):
    model = mixture()
    mine = errors(model, 0, COUNT, **made.arguments)
    assert tuple(made.median) == pytest.approx(tuple(error_summary(mine).median), rel=2e-3)
    usual = errors(model, 0, COUNT, nfe=5)
    assert tuple(made.ratio) == pytest.approx(tuple(error_ratio(mine, usual)), rel=5e-3)
    assert str(made.default) == f"{DEFAULT_SOLVER} on {DEFAULT_GRID}"
    assert made.default.ratio.value == pytest.approx(float(np.median(usual / mine)), rel=5e-3)
    assert made.runner_ups
    for option in made.runner_ups:
        its = errors(model, 0, COUNT, **of(option))
        assert tuple(option.median) == pytest.approx(tuple(error_summary(its).median), rel=2e-3)
        assert tuple(option.ratio) == pytest.approx(tuple(error_ratio(its, mine)), rel=5e-3)
        assert option.tied == (option.ratio.low <= 1 <= option.ratio.high)
    assert made.tied == tuple(o for o in made.runner_ups if o.tied)


def test_it_chose_the_best_of_all_on_other_noises(made):
    model = mixture()
    first = COUNT + _ROUGH
    ranked = [score(errors(model, first, _EXACT, **of(o))) for o in (made, *made.runner_ups)]
    assert ranked == sorted(ranked)
    plans, names = screened(model, 5)
    assert made.tried == len(plans)
    assert made.plan == plans[names.index((made.solver, made.grid, made.final))]
    rough = [score(errors(model, COUNT, _ROUGH, solver=p)) for p in plans]
    kept = [names[i] for i in np.argsort(rough)[:24]]
    assert all((o.solver, o.grid, o.final) in kept for o in (made, *made.runner_ups))
    best = min(score(errors(model, first, _EXACT, solver=plans[names.index(n)])) for n in kept)
    assert ranked[0] == pytest.approx(best, abs=2e-3)


def test_it_says_why_and_how(made):
    said = str(made)
    assert said.startswith(f"{called(made.solver, made.grid, made.final)}, 5 evaluations\n")
    assert f"over {COUNT} noises is {made.median.value:.3g}" in said
    assert f"best of {made.tried} combinations" in said
    assert f"Use it: {made.python}" in said
    for option in made.runner_ups:
        assert f"  {option}" in said
    images = eval(made.python.replace("fewstep.", "fs."), {"fs": fs, "model": mixture()})
    assert images.shape == (16, 3)
    assert torch.equal(images, fs.sample(mixture(), (16, 3), solver=made.plan, progress=False))
    assert made.options == f"--solver {made.solver} --grid {made.grid} --nfe 5"


def rebuilt(made, ratio, default):
    return str(replace(made, ratio=ratio, default=default))


def test_it_says_what_the_default_is_worth(made):
    usual = made.default
    one = Estimate(1.0, 1.0, 1.0)
    itself = Option(made.solver, made.grid, made.final, made.median, one)
    assert "It is the default." in rebuilt(made, one, itself)
    tied = usual._replace(ratio=Estimate(1.1, 0.9, 1.3))
    assert "you may as well keep it" in rebuilt(made, Estimate(0.9, 0.8, 1.1), tied)
    worse = usual._replace(ratio=Estimate(2.0, 1.8, 2.2))
    said = rebuilt(made, Estimate(0.5, 0.4, 0.6), worse)
    assert "0.5 times (interval 0.4 to 0.6) that of the default" in said
    assert "better by this median" not in said
    better = usual._replace(ratio=Estimate(0.5, 0.4, 0.6))
    assert "better by this median" in rebuilt(made, Estimate(2.0, 1.8, 2.2), better)


@pytest.mark.slow
def test_every_solver_on_every_grid():
    few = fs.recommend(mixture(), (3,), 5, count=64, progress=False)
    many = fs.recommend(mixture(), (3,), 5, count=64, screen="all", progress=False)
    assert many.tried > 10 * few.tried
    assert many.median.value < few.median.value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "model = 3; wrap your network"),
        ({"shape": (0,)}, "shape = "),
        ({"nfe": 0}, "nfe = 0"),
        ({"nfe": 2.5}, "nfe = 2.5"),
        ({"count": 3}, "count = 3; need an integer >= 8"),
        ({"seed": -1}, "seed = -1"),
        ({"batch": 0}, "batch = 0"),
        ({"screen": "long"}, "screen = 'long'"),
        ({"cond": {"a": [1, 2], "b": [1]}}, "a has 2, b has 1"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_refused_before_the_network_is_asked(change, said):
    def network(x, t):
        raise AssertionError("asked")

    settings = {"model": fs.Denoiser(network, fs.EDM(), "data"), "shape": (3,), "nfe": 4}
    with pytest.raises(ValueError, match=said):
        fs.recommend(**{**settings, **change}, progress=False)
