"""Every grid on every process: ends, monotone nodes, counts, refusals."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep._grid_tables import AYS, NodeList, node_lists
from fewstep._grids import arctan, replaced, shifted, tabulated
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


def rho(process, t):
    return np.exp(-process.lam(t))


def clock(name):
    """The function of (process, t) in which a grid is uniform between the ends of the process."""
    if name in AYS:
        table = -np.log(AYS[name])
        return lambda p, t: np.interp(p.lam(t), table, np.arange(11.0))
    return {
        "uniform": lambda p, t: t,
        "quadratic": lambda p, t: np.sqrt(t),
        "lambda": lambda p, t: p.lam(t),
        "lambda_zero": lambda p, t: p.lam(t),
        "exponential": lambda p, t: np.log(p.sigma(t) / p.alpha(t)),
        "karras": lambda p, t: (p.sigma(t) / p.alpha(t)) ** (1 / 7),
        "karras_zero": lambda p, t: (p.sigma(t) / p.alpha(t)) ** (1 / 7),
        "edm": lambda p, t: np.clip(p.sigma(t) / p.alpha(t), 0.002, 80) ** (1 / 7),
        "softened": lambda p, t: (p.sigma(t) / (p.sigma(t) + 4 * p.alpha(t))) ** 0.4,
        "softened_8": lambda p, t: (p.sigma(t) / (p.sigma(t) + 8 * p.alpha(t))) ** 0.4,
        "arctan": lambda p, t: np.arctan2(2 * p.sigma(t), p.alpha(t)),
    }.get(name)


@pytest.mark.parametrize("grid", CONTINUOUS)
def test_inner_nodes_follow_the_formula(grid):
    for process in (fs.VP(), fs.EDM(), fs.Flow(t_start=0.999)):
        t = fs.plan("ddim", process, 6, grid=grid, final="min").times
        if clock(grid) is not None:
            gaps = np.diff(clock(grid)(process, t))
            np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
        else:
            from scipy.stats import beta

            assert grid == "beta"
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


# -- ranges --------------------------------------------------------------------------------------


def test_edm_is_karras_in_the_range_of_the_official_sampler():
    for final in ("zero", "min"):
        edm, karras = (fs.plan("ddim", fs.EDM(), 9, grid=g, final=final) for g in ("edm", "karras"))
        np.testing.assert_allclose(edm.times, karras.times, rtol=1e-13)
    wide = fs.EDM(sigma_min=1e-4, sigma_max=1000.0)
    inner = fs.plan("ddim", wide, 9, grid="edm").times[1:-2]
    np.testing.assert_allclose(inner, fs.plan("ddim", fs.EDM(), 9, grid="edm").times[1:-2])
    narrow = fs.EDM(sigma_min=0.1, sigma_max=10.0)
    a, b = (fs.plan("ddim", narrow, 9, grid=g).times for g in ("edm", "karras"))
    np.testing.assert_allclose(a, b, rtol=1e-13)
    with pytest.raises(ValueError, match=r"grid = 'edm' lies in sigma / alpha = 0.002 to 80, but"):
        fs.plan("ddim", fs.EDM(sigma_min=100.0, sigma_max=1000.0), 3, grid="edm")
    with pytest.raises(ValueError, match=r"low = 2, high = 1"):
        fs.karras(low=2, high=1)


def test_arctan_holds_both_ends_and_is_one_grid_on_all_processes():
    """The angle of equation sigma / alpha = c tan(phi): 90 degrees at pure noise, 0 at the end."""
    process = fs.CosineVP(s=0.0, t_start=1.0)  # sigma / alpha = tan(pi t / 2)
    t = fs.plan("ddim", process, 9, grid=arctan(1.0)).times
    np.testing.assert_allclose(t, np.linspace(1, 0, 10), atol=1e-15)
    vp = fs.VP()
    flow = fs.Flow(t_start=float(fs.Flow().time(vp.lam(1.0))))
    a, b = (fs.plan("ddim", p, 7, grid="arctan").levels for p in (vp, flow))
    np.testing.assert_allclose([n.lam for n in a], [n.lam for n in b], rtol=1e-9)
    # where a node would be cleaner than t_end, it stops there
    assert fs.plan("ddim", fs.EDM(sigma_min=0.4), 9, grid="arctan").times[-2:].tolist() == [0.4, 0]


def test_tables_are_met_and_interpolated():
    sd = fs.DiscreteVP.scaled_linear()
    for name, want in (  # diffusers 0.42, AysSchedules
        ("ays_sd15", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, -1]),
        ("ays_sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13, -1]),
    ):
        assert fs.plan("ddim", sd, 10, grid=name).times.tolist() == want
    svd = fs.EDM(sigma_min=0.002, sigma_max=700.0)
    for final, last in (("zero", 0.0), ("min", 0.002)):
        t = fs.plan("ddim", svd, 10, grid="ays_svd", final=final).times
        np.testing.assert_allclose(t, [*AYS["ays_svd"][:-1], last], rtol=1e-12)
    double = fs.plan("ddim", svd, 20, grid="ays_svd").times
    np.testing.assert_allclose(double[::2], [*t[:-1], 0.0], rtol=1e-12)
    between = np.sqrt(np.multiply(AYS["ays_svd"][1:], AYS["ays_svd"][:-1]))
    np.testing.assert_allclose(double[1::2], between, rtol=1e-12)
    half = fs.plan("ddim", svd, 5, grid="ays_svd").times
    np.testing.assert_allclose(half[:-1], t[:-1:2], rtol=1e-12)
    # where the process ends inside the table, the part inside is used
    t = fs.plan("ddim", fs.EDM(sigma_max=6.0, sigma_min=0.5), 4, grid=tabulated([8, 4, 2, 1]))
    levels = np.interp([6, 1], [1, 2, 4, 8], [3, 2, 1, 0])
    levels[0] = np.log(8 / 6) / np.log(2)
    inner = 8 * 0.5 ** np.linspace(levels[0], 3, 5)[1:-1]
    np.testing.assert_allclose(t.times, [6, *inner, 0], rtol=1e-12)
    for bad in ([1.0], [1, 2], [2, 1, 0], [math.inf, 1], [2, 2, 1]):
        with pytest.raises(ValueError, match="falling noise levels"):
            tabulated(bad)
    with pytest.raises(ValueError, match="grid = 'ays_sd15' lies in"):
        fs.plan("ddim", fs.EDM(sigma_min=100.0, sigma_max=1000.0), 3, grid="ays_sd15")


# -- grids from grids ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", CONTINUOUS)
@pytest.mark.parametrize("name", PROCESSES)
def test_replaced_moves_the_last_node_only(name, grid):
    process = PROCESSES[name]
    if process.t_clean is None:
        return
    low = fs.grids[grid].place(process, 6, "min")  # before times are made integers
    np.testing.assert_array_equal(
        replaced(grid).place(process, 6, "zero"), [*low[:-1], process.t_clean]
    )
    np.testing.assert_array_equal(replaced(grid).place(process, 6, "min"), low)
    assert fs.plan("ddim", process, 6, grid=replaced(grid)).times[-1] == process.t_clean


@pytest.mark.parametrize("shift", [0.3, 1.7, 3.0])
def test_shifted_uniform_is_the_grid_of_a_shifted_flow(shift):
    for steps in (1, 2, 5, 20):
        a = fs.plan("ddim", fs.Flow(), steps, grid=shifted("uniform", shift)).times
        b = fs.plan("ddim", fs.Flow(shift=shift), steps, grid="uniform").times
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([n for n in PROCESSES if not PROCESSES[n].integer_times]),
    grid=st.sampled_from([g for g in CONTINUOUS if g != "beta"]),
    shifts=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)),
    steps=st.integers(1, 12),
    final=st.sampled_from(["zero", "min"]),
)
def test_shifts_keep_the_ends_move_one_way_and_multiply(name, grid, shifts, steps, final):
    process, (a, b) = PROCESSES[name], shifts
    final = "min" if process.t_clean is None else final

    def lay(g):
        return fs.plan("ddim", process, steps, grid=g, final=final).times

    plain, once = lay(grid), lay(shifted(grid, a))
    assert (once[0], once[-1]) == (plain[0], plain[-1])
    if plain[-2] == process.t_end or once[-2] != process.t_end:  # else: closed by t_end instead
        up = process.lam(once[1:-1]) - process.lam(plain[1:-1])
        assert (up * math.copysign(1, 1 - a) >= -1e-9).all()
    if final == "min" or plain[-2] == process.t_end:
        product = lay(shifted(grid, a * b))
        np.testing.assert_allclose(
            lay(shifted(shifted(grid, a), b)), product, rtol=1e-6, atol=1e-12
        )


def test_a_shift_moves_lambda_by_its_logarithm():
    flow = fs.Flow()
    for grid in ("softened", "arctan", "uniform"):
        a, b = (fs.plan("ddim", flow, 8, grid=g).times for g in (grid, shifted(grid, 2.5)))
        moved = flow.lam(b[1:-1]) - flow.lam(a[1:-1])
        np.testing.assert_allclose(moved, -math.log(2.5), rtol=1e-9)
    with pytest.raises(ValueError, match="shift = 0"):
        shifted("uniform", 0)
    with pytest.raises(ValueError, match="grid = 'unifrom'"):
        shifted("unifrom", 2)


# -- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", node_lists)
def test_node_lists_make_plans_and_say_where_they_come_from(name):
    entry = node_lists[name]
    assert entry.name == name
    assert len(entry.source) > 20
    for steps in entry.nodes:
        times = entry.times(nfe=steps)
        model = fs.Denoiser(lambda x, t: x, entry.process, "data", integer_times=False)
        plan = fs.plan("ddim", model, grid=times)
        assert plan.nfe == steps
        assert (plan.levels[-1].sigma == 0) == entry.to_clean
        told = fs.plan("ddim", entry.process, grid=entry.times(entry.process, steps))
        if entry.process.integer_times:
            assert (told.times == np.round(times)).all()
        # the same noise levels on a path that reaches them
        wide = fs.EDM(sigma_min=2e-4, sigma_max=1e3)
        if plan.levels[0].alpha:
            other = fs.plan("ddim", wide, grid=entry.times(wide, steps))
            got, want = ([v.lam for v in p.levels[:-1]] for p in (other, plan))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=rf"nfe = 77; node list '{name}' exists for \d"):
        entry.times(nfe=77)


def test_node_lists_against_published_numbers():
    assert node_lists["lcm"].times(nfe=4) == [999, 759, 499, 259, -1]
    assert node_lists["sdxl_lightning"].times(nfe=8)[:-1] == [
        *(999, 874, 749, 624, 499, 374, 249, 124)
    ]
    assert node_lists["dmd2_sdxl"].times(nfe=1) == [399, -1]
    assert node_lists["flux_schnell"].times(nfe=4) == [1, 0.75, 0.5, 0.25, 0]
    # sigma / alpha of "Hyperparameters are all you need", which the times were rounded from
    entry = node_lists["sd_5_6_8"]
    for steps, want in (
        (5, [14.615, 4.519, 1.962, 1.001, 0.502, 0.132]),
        (8, [14.615, 6.712, 3.608, 2.172, 1.404, 0.937, 0.617, 0.373, 0.147]),
    ):
        np.testing.assert_allclose(rho(entry.process, entry.times(nfe=steps)), want, rtol=3e-3)


def test_node_lists_refuse_what_they_cannot_do():
    schnell = node_lists["flux_schnell"]
    assert schnell.times(fs.CosineVP(s=0.0, t_start=1.0), 2) == [1.0, pytest.approx(0.5), 0.0]
    with pytest.raises(ValueError, match=r"has sigma / alpha from .* to inf, VP"):
        schnell.times(fs.VP(), 2)
    with pytest.raises(ValueError, match="no t_clean"):
        schnell.times(
            PROCESSES["custom, scalar functions, no clean end"].__class__(
                lambda t: 1 - t, lambda t: t, t_start=1.0, t_end=0.01
            ),
            2,
        )
    with pytest.raises(ValueError, match="give a process or a model"):
        schnell.times("flow", 2)
    with pytest.raises(ValueError, match=r"nfe = None; .* exists for 1, 2, 3, 4 steps"):
        schnell.times()
    only = NodeList("one", fs.EDM(), {2: [80.0, 1.0]}, "test")
    assert only.times() == [80.0, 1.0, 0.0]
    model = fs.Denoiser(lambda x, t: x, fs.DiscreteVP.scaled_linear(), "noise")
    rounded = node_lists["sd_5_6_8"].times(model, 5)
    assert rounded == [999, 772, 557, 354, 170, 18]
