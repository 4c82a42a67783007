"""Strong order: runs of more and more steps on one Brownian path converge; with fresh noise they
do not. A mixture, through the real loop."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._noise import Draw, Noise
from problems import Mixture, in_turn, reverse_sde

MIXTURE = Mixture(components=3, dim=2, seed=4)
#: Solvers by hand keep the tests alive by themselves.
SOLVERS: dict[str, fs.Solver] = {
    "by hand, order 1": reverse_sde(1, 1.0),
    "by hand, order 2": reverse_sde(2, 0.5),
    **{name: entry for name, entry in fs.solvers.items() if entry.stochastic},
}
ON_A_PATH = [name for name, entry in SOLVERS.items() if entry.strong_order]
PROCESSES = {"vp": fs.VP(), "edm": fs.EDM(), "flow": fs.Flow()}
LAM = (-1.5, 1.5)
SIZES = (16, 32, 64, 128)
SAMPLES = 500


@functools.cache
def start(process: fs.Process) -> torch.Tensor:
    rng = np.random.default_rng(0)
    level = process.level(float(process.time(LAM[0])))
    k = rng.integers(3, size=SAMPLES)
    data = MIXTURE.means[k] + MIXTURE.std[k, None] * rng.normal(size=(SAMPLES, 2))
    return torch.from_numpy(level.alpha * data + level.sigma * rng.normal(size=(SAMPLES, 2)))


def sampled(solver: fs.Solver, process: fs.Process, n: int, noise: Noise) -> torch.Tensor:
    plan = fs.plan(solver, process, grid=process.time(np.linspace(*LAM, n + 1)))
    state = plan.start(start(process), noise=noise)
    while not state.done:
        level = plan.asked(state.index)
        answer = MIXTURE.denoise(state.query()[0].numpy(), level.alpha, level.sigma)
        state = state.advance(torch.from_numpy(answer))
    return state.x / plan.levels[-1].alpha


def distances(solver: fs.Solver, process: fs.Process, noises: list[Noise]) -> np.ndarray:
    """Root mean square of what doubling the steps changes."""
    runs = [sampled(solver, process, n, z) for n, z in zip(SIZES, noises, strict=True)]
    return np.array([float((b - a).square().mean().sqrt()) for a, b in itertools.pairwise(runs)])


def slope(values: np.ndarray) -> float:
    return float(-np.polyfit(np.log(SIZES[: len(values)]), np.log(values), 1)[0])


#: Cells of the path are well below the smallest step, eta^2 h in its clock.
PATH = [Noise(3, path=True, resolution=2.0**-16)] * len(SIZES)


@pytest.mark.parametrize(("solver", "name"), in_turn(3, ON_A_PATH, PROCESSES))
def test_strong_order_on_one_path_is_the_declared_one(solver, name):
    entry = SOLVERS[solver]
    found = slope(distances(entry, PROCESSES[name], PATH))
    assert found > entry.strong_order - 0.25
    if found > entry.strong_order + 0.25:  # so little noise that the order of the ODE is seen
        strong = slope(distances(entry.scaled(4.0), PROCESSES[name], PATH))
        assert strong == pytest.approx(entry.strong_order, abs=0.25)


@pytest.mark.parametrize("solver", in_turn(2, ON_A_PATH))
def test_with_fresh_noise_runs_do_not_come_closer(solver):
    fresh = [Noise(seed) for seed in range(len(SIZES))]
    gaps = distances(SOLVERS[solver], fs.VP(), fresh)
    assert abs(slope(gaps)) < 0.2
    # and two runs of as many steps on different paths are as far apart
    paths = [Noise(seed, path=True) for seed in range(len(SIZES))]
    assert abs(slope(distances(SOLVERS[solver], fs.VP(), paths))) < 0.2
    on_one = distances(SOLVERS[solver], fs.VP(), PATH)
    assert on_one[-1] < 0.2 * gaps[-1]


def test_the_strong_order_test_can_fail():
    """Every step on the same piece of the path, or from the same place: the variance of every row
    is right still, but fine draws do not add up to the coarse ones."""
    plain = reverse_sde(1)
    assert slope(distances(plain, fs.VP(), PATH)) > 0.75
    for clock in (lambda a, b: (0.0, 1.0), lambda a, b: (0.0, b - a)):

        def wrong(process, history, end, clock=clock):
            formula = plain.step(process, history, end)
            ((draw, c),) = formula.noise.items()
            other = Draw(draw.start, draw.end, clock(*draw.clock))
            return formula._replace(noise={other: c})

        solver = fs.Multistep("wrong", 1, wrong, "", "", stochastic=True, strong_order=1)
        assert slope(distances(solver, fs.VP(), PATH)) < 0.5


@pytest.mark.parametrize("solver", ON_A_PATH)
def test_clocks_of_a_run_are_one_line(solver):
    """Steps through finer nodes have clocks that cut those of the coarse steps, without a gap."""
    process, entry = fs.VP(), SOLVERS[solver]
    coarse, fine = (
        {tuple(sorted(d.clock)) for d in plan.draws}
        for plan in (
            fs.plan(entry, process, grid=process.time(np.linspace(*LAM, n + 1))) for n in (6, 12)
        )
    )
    cuts = {end for clock in fine for end in clock}
    for a, b in coarse:
        assert min(abs(a - c) for c in cuts) < 1e-9
        assert min(abs(b - c) for c in cuts) < 1e-9
    for clocks in (coarse, fine):
        line = sorted(clocks)
        for (_, b), (a, _) in itertools.pairwise(line):
            assert a == pytest.approx(b, abs=1e-9)
