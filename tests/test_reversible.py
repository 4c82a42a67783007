"""BDIA, reversible Heun and EDICT: published updates taken literally, and exact inversion."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._solvers._reversible import bdia, edict, reversible_heun, second_state, walk
from problems import PROCESSES, Mixture

MIXTURE = Mixture(components=3, dim=3, seed=5)
CLEAN = {name: p for name, p in PROCESSES.items() if p.t_clean is not None}


class Exact(fs.Denoiser):
    """The mixture as a model, which predicts data and is told the time."""

    def __init__(self, process: fs.Process) -> None:
        def network(x, t):
            level = process.level(float(t[0]))
            d = MIXTURE.denoise(x.double().numpy(), level.alpha, level.sigma)
            return torch.from_numpy(d).to(x)

        super().__init__(network, process, "data", integer_times=False)


def noise_of(plan: fs.Plan, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(MIXTURE.start(6)).to(dtype) * plan.prior_std


def images() -> torch.Tensor:
    return torch.from_numpy(MIXTURE.start(6, seed=3)) * 0.4


def e_of(x, level: fs.Level):
    d = MIXTURE.denoise(x, level.alpha, level.sigma)
    return (x - level.alpha * d) / level.sigma


def transfer(x, e, start: fs.Level, end: fs.Level):
    return end.alpha / start.alpha * x + end.alpha * (end.rho - start.rho) * e


# -- literal updates -----------------------------------------------------------------------------

LITERAL = {"vp": fs.VP(), "edm": fs.EDM(), "table": fs.DiscreteVP.scaled_linear()}


def end_of(plan: fs.Plan, process: fs.Process) -> tuple[np.ndarray, np.ndarray]:
    """(start, sample)"""
    x = noise_of(plan)
    return x.numpy(), walk(plan, Exact(process), x)[0].numpy()


@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize("name", LITERAL)
def test_bdia_is_the_official_update(name, gamma):
    plan = fs.plan(bdia(gamma=gamma), LITERAL[name], 9, grid="uniform")
    x, out = end_of(plan, LITERAL[name])
    last = None
    for i, (start, end) in enumerate(pairwise(plan.levels)):
        e = e_of(x, start)
        new = transfer(x, e, start, end)
        if last is not None:
            back = transfer(x, e, start, plan.levels[i - 1])
            new = last - (1 - gamma) * (last - x) - gamma * (back - x) + new - x
        last, x = x, new
    np.testing.assert_allclose(out, x, atol=1e-12 * max(1, np.abs(x).max()))


def test_bdia_with_heun_takes_the_mean_slope_both_ways():
    process, gamma = fs.VP(), 0.6
    plan = fs.plan(bdia("heun", gamma), process, 11, grid="lambda")
    nodes = list({level.t: level for level in plan.levels}.values())
    x, out = end_of(plan, process)
    last = None
    for i, (start, end) in enumerate(pairwise(nodes)):
        e = e_of(x, start)
        if end.sigma > 0:
            e = 0.5 * (e + e_of(transfer(x, e, start, end), end))
        new = transfer(x, e, start, end)
        if last is not None:
            new = new + gamma * (last - transfer(x, e, start, nodes[i - 1]))
        last, x = x, new
    np.testing.assert_allclose(out, x, atol=1e-12 * np.abs(x).max())


@pytest.mark.parametrize("form", ["noise", "flow"])
def test_reversible_heun_is_its_pair(form):
    """The recursion in (y, z), against rows from which y has been eliminated."""
    for process in LITERAL.values():
        plan = fs.plan(reversible_heun(form), process, 8, grid="karras", final="min")
        start, out = end_of(plan, process)

        def place(level, form=form):
            total = level.alpha + level.sigma
            return (level.alpha, level.rho) if form == "noise" else (total, level.sigma / total)

        def slope(z, level, form=form):
            n, _ = place(level)
            d = MIXTURE.denoise(n * z, level.alpha, level.sigma)
            e = (n * z - level.alpha * d) / level.sigma
            return e if form == "noise" else e - d

        y = z = start / place(plan.levels[0])[0]
        for i, (here, there) in enumerate(pairwise(plan.levels)):
            step = place(there)[1] - place(here)[1]
            old = slope(z, here)
            if i == plan.nfe - 1:
                y = y + step * old
                break
            z = 2 * y - z + step * old
            y = y + 0.5 * step * (old + slope(z, there))
        want = y * place(plan.levels[-1])[0]
        np.testing.assert_allclose(out, want, atol=1e-11 * np.abs(want).max())


@pytest.mark.parametrize("nfe", [1, 2, 7, 10])
@pytest.mark.parametrize("name", LITERAL)
def test_edict_is_the_official_loop(name, nfe):
    """Roles alternate, mixing does not; an odd budget ends with half a step."""
    process, p = LITERAL[name], 0.93
    plan = fs.plan("edict", process, nfe, grid="uniform", final="min")
    nodes = list({level.t: level for level in plan.levels}.values())
    x, out = end_of(plan, process)
    pair, spent = [x, x], 0
    for i, (start, end) in enumerate(pairwise(nodes)):
        for k in range(2):
            moves = (k + i) % 2
            if spent < nfe:
                e = e_of(pair[1 - moves], start)
                pair[moves] = transfer(pair[moves], e, start, end)
                spent, result = spent + 1, moves
        if spent < nfe or nfe % 2 == 0:
            pair[0] = p * pair[0] + (1 - p) * pair[1]
            pair[1] = (1 - p) * pair[0] + p * pair[1]
            result = 1
    assert spent == nfe
    np.testing.assert_allclose(out, pair[result], atol=1e-12 * max(1, np.abs(x).max()))


# -- inversion -----------------------------------------------------------------------------------

REVERSIBLE = [
    bdia(gamma=0.8),
    bdia(gamma=1.0),
    bdia("heun", 0.8),
    edict(),
    reversible_heun(),
]


@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize("solver", REVERSIBLE, ids=lambda s: s.name)
@pytest.mark.parametrize("name", CLEAN)
def test_round_trip(name, solver, final):
    """Noise to data to noise, and data to noise to data, on every process, from alpha = 0 too."""
    process = CLEAN[name]
    model = Exact(process)
    for nfe in (10, 21):
        plan = fs.plan(solver, process, nfe, final=final, grid="uniform")
        x = noise_of(plan)
        ends = walk(plan, model, x)
        there = plan.inverse()
        assert there.nfe < nfe
        found = walk(there, model, *ends)
        assert (found[0] - x).abs().max() < 1e-10 * plan.prior_std
        again = walk(there.inverse(), model, *found)
        size = max(1.0, float(ends[0].abs().max()))
        for mine, theirs in zip(again, ends, strict=True):
            assert (mine - theirs).abs().max() < 1e-8 * size
        if final == "min":
            x = images()
            found = walk(there, model, x, second_state(plan, model, x))
            assert (walk(there.inverse(), model, *found)[0] - x).abs().max() < 1e-8


def round_trip(solver: fs.Solver, nfe: int, dtype: torch.dtype) -> float:
    """Error in units of rounding."""
    plan = fs.plan(solver, fs.VP(), nfe, grid="uniform")
    model, x = Exact(fs.VP()), noise_of(plan, dtype)
    back = walk(plan.inverse(), model, *walk(plan, model, x))[0]
    return float((back - x).abs().max()) / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_amplified_by_gamma(dtype):
    """By gamma^-N within a factor of 30; not at all for gamma = 1 and reversible Heun."""
    for nfe in (10, 20, 50):
        assert round_trip(bdia(gamma=1.0), nfe, dtype) < 30
        assert round_trip(reversible_heun(), nfe, dtype) < 30
        assert round_trip(edict(), nfe, dtype) < 30 * 0.93**-nfe
        for gamma in (0.5, 0.8):
            growth = round_trip(bdia(gamma=gamma), nfe, dtype) * gamma**nfe
            assert 1 / 30 < growth < 30


def test_edict_can_start_from_a_pair():
    process = fs.VP()
    model, x = Exact(process), images()
    plan = fs.plan(edict(pair=True), process, 12, final="min")
    assert (plan.given, plan.nfe) == (2, 12)
    there = plan.inverse()
    noise = walk(there, model, x, x)
    assert there.nfe == 12
    assert [level.t for level in there.levels][-2:] == [process.t_start] * 2
    back = walk(plan, model, *noise)
    assert (back[0] - x).abs().max() < 1e-11
    single = fs.plan("edict", process, 12, final="min")
    start = noise_of(plan)
    one, two = walk(plan, model, start, start)[0], walk(single, model, start)[0]
    assert (one - two).abs().max() < 1e-12 * two.abs().max()


def test_a_real_image_through_the_doors_of_the_package():
    model = Exact(fs.Flow())
    plan = fs.plan("reversible_heun", model, 12, final="min")
    x = images()
    noise, partner = walk(plan.inverse(), model, x, second_state(plan, model, x))
    assert 0.5 < noise.std() < 3  # on a coarse grid not 1
    assert (walk(plan.inverse().inverse(), model, noise, partner)[0] - x).abs().max() < 1e-11
    assert second_state(fs.plan("edict", model, 8), model, x) is x


# -- accuracy ------------------------------------------------------------------------------------


def alternating_error(solver: fs.Solver, n: int) -> float:
    """From sigma / alpha = 5 to 1 on steps of rho that alternate 1:3."""
    sizes = np.resize([1.0, 3.0], n)
    rho = 5 - 4 * np.concatenate([[0.0], np.cumsum(sizes) / sizes.sum()])
    rho[-1] = 1.0
    process = fs.EDM(1.0, 5.0)
    x = torch.from_numpy(MIXTURE.start(8)) * 5
    out = walk(fs.plan(solver, process, grid=rho), Exact(process), x)[0]
    fine = fs.plan("deis_rhoab3", process, grid=np.linspace(5.0, 1.0, 3001))
    return float((out - walk(fine, Exact(process), x)[0]).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["noise", "flow"])
def test_reversible_heun_is_second_order_on_any_grid_though_its_states_are_not(form):
    heun = [alternating_error(reversible_heun(form), n) for n in (80, 160, 320)]
    frog = [alternating_error(bdia(gamma=1.0), n) for n in (80, 160, 320)]
    assert math.log2(heun[0] / heun[-1]) / 2 == pytest.approx(2, abs=0.25)
    assert math.log2(frog[0] / frog[-1]) / 2 == pytest.approx(1, abs=0.25)


def test_gamma_divides_the_error_of_ddim():
    """(1 - gamma) / (1 + gamma) on equal steps of rho."""
    process = fs.EDM(1.0, 5.0)
    x = torch.from_numpy(MIXTURE.start(8)) * 5

    def run(solver, n):
        return walk(fs.plan(solver, process, grid=np.linspace(5.0, 1.0, n + 1)), Exact(process), x)

    fine = run("deis_rhoab3", 4000)[0]
    plain = (run("ddim", 2000)[0] - fine).square().mean().sqrt()
    for gamma in (0.3, 0.8):
        ratio = (run(bdia(gamma=gamma), 2000)[0] - fine).square().mean().sqrt() / plain
        assert ratio == pytest.approx((1 - gamma) / (1 + gamma), rel=0.05)


FRAGILE = ("bdia", "bdia_1", "bdia_dpmpp_2m", "bdia_heun", "edict")


def worst_ratio(solver: str, nfes: tuple[int, ...]) -> float:
    """Error over that of DDIM, at its worst over some grids."""
    process, worst = fs.EDM(), 0.0
    model = Exact(process)
    for final in ("min", "zero"):
        fine = fs.plan("ab4", process, 300, grid="lambda", final=final)
        for grid in ("karras", "lambda", "arctan"):
            for nfe in nfes:
                plans = [fs.plan(s, process, nfe, grid=grid, final=final) for s in (solver, "ddim")]
                want, mine, plain = (walk(p, model, noise_of(p))[0] for p in (fine, *plans))
                worst = max(worst, float((mine - want).norm() / (plain - want).norm()))
    return worst


@pytest.mark.parametrize("solver", FRAGILE)
def test_fragile_is_earned(solver):
    """More than 20 times worse than first order somewhere."""
    assert fs.solvers[solver].fragile
    assert worst_ratio(solver, (2, 3, 5)) > 20


@pytest.mark.parametrize("solver", ["bdia_per_step", "reversible_heun"])
def test_in_flow_time_they_are_not(solver):
    assert not fs.solvers[solver].fragile
    assert worst_ratio(solver, (2, 3, 5, 8, 12)) < 1.1


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*REVERSIBLE, bdia(gamma="per step"), bdia("dpmpp_2m", 0.5)])
def test_upward_on_every_process(solver):
    for process in PROCESSES.values():
        for nfe in (1, 6, 7):
            plan = fs.plan(solver, process, nfe, upward=True)
            assert plan.nfe == nfe
            assert torch.isfinite(walk(plan, Exact(process), images())[0]).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bdia(gamma=0.0), "gamma = 0.0"),
        (lambda: bdia(gamma=1.2), "gamma = 1.2"),
        (lambda: bdia("dpmpp_2m", "per step"), "base = 'dpmpp_2m'"),
        (lambda: bdia("heun", "per step"), "base = 'heun'"),
        (lambda: bdia("unipc_2"), "base = 'unipc_2'"),
        (lambda: bdia(form="data"), "form = 'data'"),
        (lambda: reversible_heun("data"), "form = 'data'"),
        (lambda: edict(1.0), "mixing = 1.0"),
        (lambda: edict(0.5), "mixing = 0.5"),
        (lambda: fs.plan("bdia_heun", fs.EDM(), 9, grid=[80.0, 5.0, 0.5]), "nfe = 9.*2 to 4"),
        (lambda: fs.plan("edict", fs.EDM(), 2, grid=[80.0, 5.0, 0.5]), "nfe = 2.*3 to 4"),
        (lambda: fs.plan("bdia_1", fs.EDM(), 5).fuse().inverse(), "fused"),
        (lambda: fs.plan("bdia_1", fs.EDM(), 1).inverse(), "nothing to invert"),
        (lambda: fs.plan("dpmpp_2m", fs.EDM(), 5).inverse(), "dpmpp_2m is not reversible"),
        (lambda: fs.plan("bdia_dpmpp_2m", fs.EDM(), 5).inverse(), "is not reversible"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_second_state_refuses():
    model, x = Exact(fs.EDM()), images()
    with pytest.raises(ValueError, match="ddim hands over no second state"):
        second_state(fs.plan("ddim", model, 4), model, x)
    with pytest.raises(ValueError, match="final='min'"):
        second_state(fs.plan("bdia_1", model, 4), model, x)
