"""Every grid on every process: ends, monotone nodes, counts, refusals."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

import fewstep as fs
from problems import PROCESSES

CONTINUOUS = [g for g in fs.grids if not fs.grids[g].discrete]


@pytest.mark.parametrize("grid", fs.grids)
@pytest.mark.parametrize("name", PROCESSES)
def test_nodes_are_ordered_and_end_as_asked(name, grid):
    process = PROCESSES[name]
    for final in ("zero", "min"):
        for nfe in (1, 2, 3, 7, 20):
            if final == "zero" and process.t_clean is None:
                with pytest.raises(ValueError, match="no t_clean"):
                    fs.plan("ddim", process, nfe, grid=grid, final=final)
                continue
            if fs.grids[grid].discrete and not process.integer_times:
                with pytest.raises(ValueError, match="integer times"):
                    fs.plan("ddim", process, nfe, grid=grid, final=final)
                continue
            if grid == "leading" and final == "zero" and nfe == 1:
                with pytest.raises(ValueError, match="leading"):
                    fs.plan("ddim", process, nfe, grid=grid, final=final)
                continue
            t = fs.plan("ddim", process, nfe, grid=grid, final=final).times
            assert len(t) == nfe + 1
            assert (np.diff(process.lam(t)) > 0).all()
            assert t[-1] == (process.t_clean if final == "zero" else process.t_end)
            if grid != "leading":
                assert t[0] == process.t_start  # the same start for every NFE
            if process.integer_times:
                assert (t == np.round(t)).all()


@pytest.mark.parametrize("grid", CONTINUOUS)
def test_inner_nodes_follow_the_formula(grid):
    for process in (fs.VP(), fs.EDM(), fs.Flow(t_start=0.999)):
        t = fs.plan("ddim", process, 6, grid=grid, final="min").times
        clock = {
            "uniform": lambda t, p: t,
            "quadratic": lambda t, p: np.sqrt(t),
            "lambda": lambda t, p: p.lam(t),
            "exponential": lambda t, p: np.log(p.sigma(t) / p.alpha(t)),
            "karras": lambda t, p: (p.sigma(t) / p.alpha(t)) ** (1 / 7),
            "softened": lambda t, p: (p.sigma(t) / (p.sigma(t) + 4 * p.alpha(t))) ** 0.4,
        }
        if grid in clock:
            gaps = np.diff(clock[grid](t, process))
            np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
        else:
            from scipy.stats import beta

            u = (t[0] - t) / (t[0] - t[-1])
            np.testing.assert_allclose(u, beta.ppf(np.linspace(0, 1, 7), 0.6, 0.6), atol=1e-12)


def test_karras_is_the_published_sequence():
    n = 10
    i = np.arange(n)
    want = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    got = fs.plan("ddim", fs.EDM(), n, grid="karras").times
    np.testing.assert_allclose(got[:-1], want, rtol=1e-12)
    assert (got[0], got[-2], got[-1]) == (80.0, 0.002, 0.0)  # ends exact, not through a logarithm


@pytest.mark.parametrize(
    ("grid", "final", "want"),
    [  # the table of diffusers 0.42 for 5 steps on 1000 levels; -1 is the clean end
        ("linspace", "zero", [999, 749, 500, 250, 0, -1]),
        ("leading", "zero", [800, 600, 400, 200, 0, -1]),
        ("trailing", "zero", [999, 799, 599, 399, 199, -1]),
        ("linspace", "min", [999, 799, 599, 400, 200, 0]),
        ("leading", "min", [830, 664, 498, 332, 166, 0]),
        ("trailing", "min", [999, 799, 599, 399, 199, 0]),
        ("uniform", "zero", [999, 799, 599, 399, 199, -1]),
    ],
)
def test_discrete_spacings(grid, final, want):
    got = fs.plan("ddim", fs.DiscreteVP.scaled_linear(), 5, grid=grid, final=final).times
    np.testing.assert_array_equal(got, want)


def test_crowded_integer_times_are_moved_apart_not_lost():
    """Karras on a cosine table rounds to the same integer many times over; others crash there."""
    process = fs.DiscreteVP.squared_cosine()
    for nfe in range(1, 60):
        t = fs.plan("ddim", process, nfe, grid="karras").times
        assert len(set(t)) == nfe + 1
    anywhere = fs.Denoiser(lambda x, t: x, process, integer_times=False)
    plain = fs.plan("ddim", anywhere, 20, grid="lambda").times
    moved = fs.plan("ddim", process, 20, grid="lambda").times
    assert np.abs(moved - plain).max() < 12


def test_grids_in_t_run_on_to_the_clean_end_unless_nodes_would_pass_t_end():
    t = fs.plan("ddim", fs.VP(), 8, grid="uniform").times
    np.testing.assert_allclose(np.diff(t), -0.125, rtol=1e-12)
    t = fs.plan("ddim", fs.VP(), 50, grid="quadratic").times
    assert (t[-2], t[-1]) == (1e-3, 0.0)


def test_a_list_comes_back_bit_identical():
    nodes = [1.0, 0.9000000000000001, 0.3, 0.1 + 1e-16, 0.0]
    plan = fs.plan("dpmpp_2m", fs.Flow(shift=3.0), grid=nodes)
    assert plan.times.tolist() == nodes
    assert plan.nfe == 4
    import torch

    stored = torch.tensor(nodes, dtype=torch.float64)
    assert fs.plan("dpmpp_2m", fs.Flow(), grid=stored).times.tolist() == nodes


@pytest.mark.parametrize(
    ("process", "grid", "words"),
    [
        (fs.VP(), [1.0, 0.5, 0.5, 0.1], r"node 2 \(t = 0.5\) repeats the one before"),
        (fs.VP(), [1.0, 0.5, 0.6, 0.1], r"node 2 \(t = 0.6\) goes back toward noise"),
        (fs.VP(), [1.2, 0.5], r"node 0 \(t = 1.2\) is outside the range 1 to 0"),
        (fs.VP(), [1.0, 0.5, -0.1], "node 2 .* outside"),
        (fs.VP(), [1.0, 1e-4, 0.0], "node 1 .* cleaner than t_end = 0.001"),
        (fs.VP(), [1.0, math.nan], "NaN"),
        (fs.VP(), [1.0], "1 times"),
        (fs.EDM(), [80.0, 81.0], "node 1 .* outside"),
        (PROCESSES["custom, time reversed"], [0.1, 0.05], "goes back toward noise"),
        (fs.DiscreteVP.linear(), [999, 500.5, 0], "500.5, which is not one of the integer"),
        (fs.DiscreteVP.linear(), [999, 999, 0], "repeats"),
        (fs.DiscreteVP.linear(), [1000, 0], "outside"),
    ],
)
def test_bad_nodes_are_refused_with_the_table(process, grid, words):
    with pytest.raises(ValueError, match=words) as error:
        fs.plan("dpmpp_2m", process, grid=grid)
    if "node" in words:
        assert "sigma" in str(error.value)
        assert f"\n> {int(words.split('node ')[1][0]):>4}" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nfe": 5, "grid": "karas"}, "grid = 'karas' .* did you mean 'karras'"),
        ({"nfe": 5, "final": "one"}, "final = 'one'"),
        ({"nfe": 5, "grid": fs.karras}, "give a name, a Grid or a list of times"),
        ({"nfe": 5, "grid": ["a"]}, "give a name, a Grid or a list of times"),
        ({"nfe": 5, "grid": None}, "grid = None; give a name"),
        ({"nfe": 5, "grid": [1.0, 0.5, 0.0]}, "nfe = 5, but the grid has 3 times"),
        ({"nfe": 0}, "nfe = 0"),
        ({"nfe": -3}, "nfe = -3"),
        ({"nfe": 2.5}, "nfe = 2.5"),
        ({"nfe": True}, "nfe = True"),
        ({}, "nfe is missing"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        fs.plan("ddim", fs.VP(), **arguments)


def test_integers_of_any_kind_are_a_budget():
    assert fs.plan("ddim", fs.VP(), np.int64(3)).nfe == 3


def test_too_many_steps_for_a_table():
    small = PROCESSES["user table"]
    assert fs.plan("ddim", small, 50, grid="uniform").nfe == 50
    with pytest.raises(ValueError, match="51 steps do not fit"):
        fs.plan("ddim", small, 51, grid="uniform")
    with pytest.raises(ValueError, match="nfe = 51"):
        fs.plan("ddim", small, 51, grid="trailing")


def test_the_softened_grid_is_the_same_on_every_process_and_holds_its_relatives():
    """Same noise levels whatever the path; Karras and a shifted flow's uniform grid are members."""
    vp = fs.VP()
    flow = fs.Flow(t_start=float(fs.Flow().time(vp.lam(1.0))))
    a, b = (fs.plan("ddim", p, 7, grid="softened") for p in (vp, flow))
    np.testing.assert_allclose([n.lam for n in a.levels], [n.lam for n in b.levels], rtol=1e-9)
    karras = fs.plan("ddim", fs.EDM(), 7, grid="karras", final="min").times
    soft = fs.plan("ddim", fs.EDM(), 7, grid=fs.softened(1e9, 7.0), final="min").times
    np.testing.assert_allclose(soft, karras, rtol=1e-6)
    shifted = fs.plan("ddim", fs.Flow(shift=3.0), 7, grid="uniform").times
    soft = fs.plan("ddim", fs.Flow(), 7, grid=fs.softened(3.0, 1.0)).times
    np.testing.assert_allclose(soft, shifted, rtol=1e-12, atol=1e-15)


def test_beta_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"grid 'beta' needs scipy: pip install"):
        fs.plan("ddim", fs.VP(), 4, grid="beta")


def test_own_grids_and_their_parameters():
    assert fs.karras(3.0).name == "karras(3)"
    a = fs.plan("ddim", fs.EDM(), 8, grid=fs.karras(1e6)).times
    b = fs.plan("ddim", fs.EDM(), 8, grid="lambda").times
    np.testing.assert_allclose(a, b, rtol=1e-4)
    cubic = fs.plan("ddim", fs.VP(), 4, grid=fs.power(3)).times
    np.testing.assert_allclose(cubic, (1 - np.arange(5) / 4) ** 3, rtol=1e-12)
    halves = fs.Grid("halves", lambda p, n, final: p.t_start * 0.5 ** np.arange(n + 1))
    assert fs.plan("ddim", fs.EDM(), 3, grid=halves).times.tolist() == [80, 40, 20, 10]
    for make in (
        lambda: fs.softened(-1),
        lambda: fs.softened(1, 0),
        lambda: fs.karras(0),
        lambda: fs.power(-1),
        lambda: fs.beta(0, 1),
    ):
        with pytest.raises(ValueError, match="positive"):
            make()
