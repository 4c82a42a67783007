"""Searched grids: the objective of `dmn`, the costs and the search of `gits`, against independent
evaluations and exhaustive search."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep import _grid_search as search
from fewstep._grid_search import CostGrid, dmn, gits, shortest
from fewstep._sampling import DEFAULT_SOLVER
from problems import PROCESSES

# -- DMN -----------------------------------------------------------------------------------------

#: Order 3 in data form, orders 1, 2, 3, ..., 3, 2, 1: the method whose error `dmn` bounds.
THIRD = fs.exponential(3, growth=math.inf, lower_final=True)


def bound(process: fs.Process, times, p: int) -> float:
    """The published objective, from the rows of a plan: an error of D_j of sigma_j^p / alpha_j
    enters step s of x / sigma with b_sj / sigma_{s+1}, and nothing there amplifies it."""
    plan = fs.plan(THIRD, process, grid=times)
    n = plan.nfe
    total, summed = 0.0, np.zeros(n)
    for s, row in enumerate(plan.rows):
        terms = {
            j: b / plan.levels[s + 1].sigma * plan.levels[j].sigma ** p / plan.levels[j].alpha
            for j, b in row.b.items()
        }
        if s < 3 or s == n - 1:
            total += math.sqrt(sum(v**2 for v in terms.values()))
        else:
            for j, v in terms.items():
                summed[j] += v
    return total + float(np.abs(summed).sum())


def objective(process: fs.Process, steps: int, p: int) -> search._Bound:
    ends = process.lam_start, float(process.lam(process.t_end))
    return search._Bound(
        lambda lam: np.exp(-lam) * process.sigma(process.time(lam)) ** (p - 1), *ends, steps
    )


@settings(max_examples=30, deadline=None)
@given(
    process=st.sampled_from([fs.VP(), fs.EDM(), fs.Flow(t_start=0.999)]),
    steps=st.integers(1, 12),
    p=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_objective_is_that_of_the_solvers_own_rows(process, steps, p, seed):
    share = np.random.default_rng(seed).dirichlet(np.full(steps, 3.0))
    loss = objective(process, steps, p)
    lam = loss.start + (loss.end - loss.start) * np.cumsum(share)[:-1]
    times = [process.t_start, *process.time(lam), process.t_end]
    assert loss(lam)[0] == pytest.approx(bound(process, times, p), rel=1e-9)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_the_gradient_is_exact(steps, p):
    loss = objective(fs.VP(), steps, p)
    lam = loss.start + (loss.end - loss.start) * np.linspace(0, 1, steps + 1)[1:-1] ** 1.1
    ahead = 1e-6 * np.eye(steps - 1)
    numeric = [(loss(lam + d)[0] - loss(lam - d)[0]) / 2e-6 for d in ahead]
    np.testing.assert_allclose(loss(lam)[1], numeric, rtol=1e-6, atol=1e-6 * max(np.abs(numeric)))


def test_dmn_reproduces_the_official_values_and_goes_below_where_those_are_local():
    """VP, t_end = 1e-3, p = 2: nodes and objective of the official code, scipy's trust-constr."""
    process, grid = fs.VP(), dmn(2)

    def best(steps):
        return fs.plan("ddim", process, steps, grid=grid, final="min").times

    t5, t6 = (
        [1, 0.6582, 0.4978, 0.3095, 0.1014, 0.001],
        [*(1, 0.7107, 0.5352, 0.4206, 0.2403, 0.0836, 0.001)],
    )
    for steps, times, value in ((5, t5, 49.90), (6, t6, 38.35)):
        np.testing.assert_allclose(best(steps), times, atol=6e-5)
        assert bound(process, best(steps), 2) == pytest.approx(value, abs=6e-3)
    # from the log-SNR grid 26.26, from uniform t 18.47; for 10 steps 11.57 and 11.64
    published = [1, 0.8449, 0.7426, 0.6774, 0.5127, 0.3316, 0.1677, 0.0605, 0.001]
    # rounding these nodes to 4 digits moves the value by up to 0.05
    assert bound(process, published, 2) == pytest.approx(18.47, abs=0.05)
    assert bound(process, best(8), 2) < 17.6
    assert bound(process, best(10), 2) < 11.0


def test_dmn_ends_and_order_on_every_process():
    for p, steps in itertools.product((1, 2), (1, 2, 3, 6)):
        grid = dmn(p)
        for process in PROCESSES.values():
            for final in ("min", "zero"):
                if final == "zero" and process.t_clean is None:
                    continue
                t = fs.plan("ddim", process, steps, grid=grid, final=final).times
                assert len(t) == steps + 1
                assert (np.diff(process.lam(t)) > 0).all()
                end = process.t_end if final == "min" else process.t_clean
                assert (t[0], t[-1]) == (process.t_start, end)


def test_dmn_is_a_matter_of_noise_levels_and_searched_once(monkeypatch):
    """For p = 1 only rho = sigma / alpha counts: every process of one range has the same levels."""
    vp, grid = fs.VP(), dmn()
    edm = fs.EDM(sigma_min=vp.level(vp.t_end).rho, sigma_max=vp.level(vp.t_start).rho)
    a, b = (fs.plan("ddim", p, 7, grid=grid, final="min").levels for p in (vp, edm))
    np.testing.assert_allclose([v.lam for v in a], [v.lam for v in b], atol=1e-5)
    again = fs.plan("ddim", vp, 7, grid=dmn(), final="min")
    assert [v.lam for v in again.levels] == [v.lam for v in a]  # deterministic
    monkeypatch.setattr(search, "_optimum", None)
    assert fs.plan("ddim", vp, 7, grid=grid).times[:-1].tolist() == again.times[:-1].tolist()


def test_dmn_refuses():
    for p in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"p = .*; need an integer >= 1"):
            dmn(p)
    with pytest.raises(ValueError, match=r"nfe = 51; grid 'dmn\(2\)' is searched for at most 50"):
        fs.plan("ddim", fs.VP(), 51, grid=dmn(2))


def test_dmn_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"grid 'dmn' needs scipy: pip install"):
        fs.plan("ddim", fs.VP(), 4, grid=dmn())


# -- dynamic programming -------------------------------------------------------------------------


def exhaustive(cost: np.ndarray, steps: int, gamma: float) -> list[int]:
    """The best nodes by trying all."""
    n = len(cost)

    def total(path):
        return sum(gamma**k * cost[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))

    paths = ([0, *inner, n - 1] for inner in itertools.combinations(range(1, n - 1), steps - 1))
    return min(paths, key=total)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(2, 9),
    data=st.data(),
    gamma=st.floats(0.5, 2.0),
    seed=st.integers(0, 10_000),
)
def test_the_shortest_path_is_the_shortest(n, data, gamma, seed):
    steps = data.draw(st.integers(1, n - 1))
    # like a "dev" cost, some are negative
    cost = np.random.default_rng(seed).normal(1.0, 1.0, size=(n, n))
    assert shortest(cost, steps, gamma).tolist() == exhaustive(cost, steps, gamma)


# -- GITS ----------------------------------------------------------------------------------------

MIXTURE = fs.exact.Mixture([0.3, 0.7], np.array([[0.6, -0.2, 0.1], [-0.4, 0.3, 0.0]]), [0.05, 0.02])
PATHS = {
    "edm": fs.EDM(),
    "vp": fs.VP(),
    "flow from alpha 0": fs.Flow(),
    "cosine from alpha 0": fs.CosineVP(t_start=1.0),
    "table": fs.DiscreteVP.scaled_linear(),
    "no clean end": PROCESSES["custom, scalar functions, no clean end"],
}


class Counted:
    """A network that counts its evaluations of samples."""

    def __init__(self, process: fs.Process) -> None:
        self.process, self.samples = process, 0

    def __call__(self, x, t, shift=0.0):
        self.samples += len(x)
        level = self.process.level(float(t[0]))
        shift = torch.as_tensor(shift, dtype=x.dtype).reshape(-1, 1)
        return MIXTURE.denoise(x - level.alpha * shift, level.alpha, level.sigma) + shift


@pytest.mark.parametrize("metric", ["dev", "l1", "l2"])
@pytest.mark.parametrize("name", PATHS)
def test_costs_are_one_ddim_step_from_the_teacher(name, metric):
    """The table, rebuilt from a teacher run and one-step DDIM plans."""
    process = PATHS[name]
    network = Counted(process)
    model = fs.Denoiser(network, process, "data")
    grid = gits(model, (5, 3), nodes=7, metric=metric, seed=3, dtype=torch.float64)
    assert network.samples == 5 * grid.nfe
    assert grid.nfe == (6 if process.t_clean is None else 7)
    times, n = grid.times, len(grid.times)
    assert times[0] == process.t_start
    assert (times[-1] == process.t_clean) or process.t_clean is None
    teacher = fs.plan(DEFAULT_SOLVER, model, grid=list(times))
    x = fs.start_noise((5, 3), 3, dtype=torch.float64) * teacher.prior_std
    states = [x]
    for record in fs.steps(model, x=x, solver=teacher):
        states.append(record.x)
    levels = teacher.levels

    def position(x, level):
        return (x / level.alpha).numpy()

    end = position(states[-1], levels[-1])
    far = states[0].numpy() * (1.0 / levels[0].alpha if levels[0].alpha else 1e9)
    line = (far - end) / np.linalg.norm(far - end, axis=1, keepdims=True)

    def deviation(y):
        y = y - end
        return np.linalg.norm(y - (y * line).sum(1, keepdims=True) * line, axis=1) / math.sqrt(3)

    for i, j in itertools.combinations(range(n), 2):
        step = fs.plan("ddim", model, grid=[times[i], times[j]])
        landed = step.start(states[i])
        while not landed.done:
            landed = landed.advance(network(*landed.query()))
        landed, there = (position(v, levels[j]) for v in (landed.x, states[j]))
        if metric == "dev":
            want = deviation(landed) - deviation(there)
        elif metric == "l2":
            want = np.sqrt(np.square(landed - there).mean(1))
        else:
            want = np.abs(landed - there).mean(1)
        assert grid.cost[i, j] == pytest.approx(want.mean(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_gits_finds_the_best_nodes_for_every_budget_and_both_ends(name):
    process = PATHS[name]
    model = fs.Denoiser(Counted(process), process, "data")
    grid = gits(model, (8, 3), nodes=8, gamma=1.1)
    for final in ("min", "zero"):
        if final == "zero" and process.t_clean is None:
            continue
        end = int(np.flatnonzero(grid.times == getattr(process, f"t_{_NAMES[final]}"))[0])
        cost = grid.cost[: end + 1, : end + 1]
        for steps in range(1, end + 1):
            t = fs.plan("ddim", model, steps, grid=grid, final=final).times
            assert t.tolist() == grid.times[exhaustive(cost, steps, 1.1)].tolist()
        with pytest.raises(
            ValueError, match=rf"nfe = {end + 1}; grid 'gits' chooses from {end + 1} "
        ):
            fs.plan("ddim", model, end + 1, grid=grid, final=final)


_NAMES = {"min": "end", "zero": "clean"}


def test_gits_batches_conditions_and_seeds_are_those_of_the_samples():
    process = fs.EDM()
    model = fs.Denoiser(Counted(process), process, "data")
    shift = torch.linspace(-1, 1, 7)
    for seed in (5, [4, 3, 2, 1, 9, 8, 7]):
        whole, parts = (
            gits(model, (7, 3), nodes=9, seed=seed, cond={"shift": shift}, batch=b)
            for b in (None, 3)
        )
        upper = np.triu_indices(len(whole.times), 1)
        np.testing.assert_allclose(whole.cost[upper], parts.cost[upper], rtol=1e-4, atol=1e-7)
    other = gits(model, (7, 3), nodes=9, seed=5)
    assert np.abs(other.cost[upper] - whole.cost[upper]).max() > 1e-3
    single = fs.sample(model, (2, 3), nfe=3, grid=whole, progress=False)
    assert torch.isfinite(single).all()


def test_gits_of_a_guided_model_sees_the_guidance():
    plain = fs.models.load("digits")
    labels = {"label": torch.arange(8) % 10}
    guided = fs.Guided(plain, scale=4.0, uncond={"label": 10})
    a, b = (gits(m, (8, 1, 8, 8), nodes=20, cond=labels) for m in (plain, guided))
    assert a.nfe == b.nfe == 20
    upper = np.triu_indices(21, 1)
    assert np.abs(a.cost[upper] - b.cost[upper]).max() > 0.1 * np.abs(a.cost[upper]).max()


def test_gits_halves_the_error_of_karras():
    """DDIM on a Gaussian mixture, the test of the optimal-stepsize literature: searched grids cut
    the error of the Karras grid by half, on fresh noise."""
    mixture = fs.exact.Mixture([0.3, 0.7], np.array([[0.6, -0.2], [-0.4, 0.3]]), [0.03, 0.03])
    model = mixture.denoiser(fs.EDM())
    grid = gits(model, (64, 2), metric="l2", gamma=1.0, seed=1)

    def error(grid, nfe):
        x = fs.start_noise((256, 2), 2, dtype=torch.float64) * 80.0
        out = fs.sample(model, x=x, solver="ddim", nfe=nfe, grid=grid, final="min", progress=False)
        fine = fs.plan("ab4", model, 400, grid="lambda", final="min")
        exact = fs.sample(model, x=x, solver=fine, progress=False)
        return float((out - exact).square().mean().sqrt())

    for nfe in (5, 8):
        assert error(grid, nfe) < 0.6 * error("karras", nfe)


def test_gits_results_are_checked_and_can_be_reweighed():
    process = fs.EDM()
    model = fs.Denoiser(Counted(process), process, "data")
    grid = gits(model, (16, 3), nodes=30)
    heavy = dataclasses.replace(grid, gamma=2.0)
    assert (heavy.gamma, heavy.nfe) == (2.0, 30)
    assert heavy.place(process, 5, "zero").tolist() != grid.place(process, 5, "zero").tolist()
    assert fs.plan("ddim", model, 5, grid=grid).about["grid"] == "gits"
    with pytest.raises(
        ValueError, match=r"grid = 'gits' was searched on EDM.*; search again for VP"
    ):
        fs.plan("ddim", fs.VP(), 5, grid=grid)
    with pytest.raises(ValueError, match=r"has no node at t = 40 or 0"):
        fs.plan("ddim", fs.EDM(sigma_max=40.0), 5, grid=grid)
    with pytest.raises(ValueError, match="gamma = 0"):
        dataclasses.replace(grid, gamma=0.0)
    with pytest.raises(ValueError, match=r"cost has shape \(31, 31\); .* 30 times"):
        dataclasses.replace(grid, times=grid.times[1:])
    assert isinstance(grid, CostGrid)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": "l3"}, "metric = 'l3'"),
        ({"nodes": 1}, "nodes = 1; need an integer >= 2"),
        ({"nodes": 2.0}, "nodes = 2.0"),
        ({"batch": 0}, "batch = 0"),
        ({"gamma": -1.0}, "gamma = -1"),
        ({"grid": "karas"}, "did you mean 'karras'"),
        ({"solver": "dim"}, "did you mean 'ddim'"),
        ({"shape": ()}, "shape"),
        ({"seed": [1, 2]}, "seed has 2 entries"),
    ],
)
def test_gits_refuses(arguments, words):
    model = fs.Denoiser(Counted(fs.EDM()), fs.EDM(), "data")
    with pytest.raises(ValueError, match=words):
        gits(model, **{"shape": (4, 3), "nodes": 4, **arguments})
    assert model.network.samples == 0


def test_gits_needs_a_model():
    with pytest.raises(ValueError, match="wrap your network"):
        gits(fs.EDM(), (4, 3))  # pyright: ignore
