"""States of every solver: values that go on with the same bits wherever, whenever, beside whom."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

import fewstep as fs
from fewstep._noise import Noise
from fewstep._plan import Plan, State

SOLVERS = list(fs.solvers)
SHAPE = (2, 3, 5)
FORMS = ("plain", "cheapest")


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Element by element: bits that depend on neither the batch nor the place in it."""
    return torch.tanh(0.8 * x - 0.3 * t.reshape(-1, *(1,) * (x.ndim - 1)))


@cache
def plan_of(solver: str, nfe: int = 5, form: str = "plain") -> Plan:
    plan = fs.plan(solver, fs.CosineVP(), nfe, predicts="v")
    return plan.cheapest if form == "cheapest" else plan


def begin(plan: Plan, noise: Noise, shape: tuple[int, ...] = SHAPE) -> State:
    return plan.start(noise.start(shape) * plan.prior_std, noise=noise)


def step(state: State) -> State:
    return state.advance(network(*state.query()))


def finish(state: State) -> torch.Tensor:
    while not state.done:
        state = step(state)
    return state.x


def reloaded(state: State, folder: Path) -> State:
    state.save(folder / "state")
    return State.load(folder / "state")


@pytest.mark.parametrize("solver", SOLVERS)
def test_copied_pickled_and_saved_at_every_step(solver, tmp_path):
    ways = (
        copy.copy,
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),
        lambda state: reloaded(state, tmp_path),
    )
    state = begin(plan_of(solver), Noise(7))
    others = [state] * len(ways)
    while True:
        others = [way(other) for way, other in zip(ways, others, strict=True)]
        assert all(other == state for other in others)
        if state.done:
            break
        state, others = step(state), [step(other) for other in others]
    assert all(torch.equal(other.x, state.x) for other in others)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_state_on_the_way_leads_to_the_same_end(solver):
    """A run split in two anywhere is the run; going on does not change what was there."""
    state, kept = begin(plan_of(solver), Noise(3)), []
    while not state.done:
        kept.append(state)
        state = step(state)
    for k, old in enumerate(kept):
        assert old.nfe == k
        assert torch.equal(finish(old), state.x)
    assert len(kept) == plan_of(solver).nfe


def test_a_run_of_two_plans_is_one_run():
    """n times are n - 1 steps: times [0..k] and then [k..n] are all of them, for solvers without
    history; those with history go on from a state instead."""
    times = fs.plan("ddim", fs.CosineVP(), 6).times.tolist()
    tried = []
    for solver in SOLVERS:
        whole = fs.plan(solver, fs.CosineVP(), grid=times, predicts="v")
        if whole.stochastic or any({*r.a, *r.b} != {i} for i, r in enumerate(whole.rows)):
            continue
        tried.append(solver)
        x = Noise(1).start(SHAPE)
        for k in (1, 4):
            first = fs.plan(solver, fs.CosineVP(), grid=times[: k + 1], predicts="v")
            second = fs.plan(solver, fs.CosineVP(), grid=times[k:], predicts="v")
            assert (first.nfe, second.nfe) == (k, 6 - k)
            assert torch.equal(finish(second.start(finish(first.start(x)))), finish(whole.start(x)))
    assert "ddim" in tried


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_requests_interleaved(solver):
    starts = [begin(plan_of(solver, nfe), Noise(nfe)) for nfe in (4, 7)]
    alone = [finish(state) for state in starts]
    states = starts
    while not all(state.done for state in states):
        states = [state if state.done else step(state) for state in states]
    assert all(torch.equal(s.x, want) for s, want in zip(states, alone, strict=True))
    assert not torch.equal(*alone)


@pytest.mark.parametrize("solver", SOLVERS)
def test_eight_threads_share_a_plan(solver):
    plan = fs.plan(solver, fs.CosineVP(), 5, predicts="v")  # new: nothing of it is computed yet
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda seed: finish(begin(plan, Noise(seed))), range(16)))
    for seed in (0, 5, 15):
        assert torch.equal(together[seed], finish(begin(plan_of(solver), Noise(seed))))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver, form):
    """Sample k of a batch of any size and order is its own run, bit for bit."""
    plan, whole, sample = plan_of(solver, form=form), Noise(11, 20), (3, 7)
    full = finish(begin(plan, whole, (7, *sample)))
    for chosen in ([2], [6], [3, 0, 5, 1], [6, 2, 0, 1, 5, 3, 4]):
        part = finish(begin(plan, whole.take(chosen, 7), (len(chosen), *sample)))
        assert torch.equal(part, full[chosen])
    assert len(torch.unique(full, dim=0)) == 7


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc_3", "ddpm"])
def test_a_sample_of_many_elements_does_not_depend_on_its_batch(solver):
    """Also where a batch is long enough for other kernels, and several threads."""
    plan, whole, sample = plan_of(solver, form="cheapest"), Noise(1), (3, 64, 67)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        full = finish(begin(plan, whole, (7, *sample)))
        for k in (0, 5):
            alone = finish(begin(plan, whole.take([k], 7), (1, *sample)))
            assert torch.equal(alone[0], full[k])
    finally:
        torch.set_num_threads(threads)


def test_a_changed_state_is_another():
    state = step(begin(plan_of("ddpm"), Noise(1)))
    assert state == step(begin(plan_of("ddpm"), Noise(1)))
    assert state != step(begin(plan_of("ddpm"), Noise(2)))
    assert state != begin(plan_of("ddpm"), Noise(1))
    assert state != state.replaced(state.x + 1e-6)
    assert state != step(begin(plan_of("ddim"), Noise(1)))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_file_is_whole_or_not_there(broken, tmp_path, monkeypatch):
    """An error in the middle of a save leaves the file before."""
    first = begin(plan_of("unipc_3"), Noise(1))
    first.save(tmp_path / "state")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(OSError, match="no space"):
        step(first).save(tmp_path / "state")
    assert State.load(tmp_path / "state") == first


# -- other processes -------------------------------------------------------------------------------

_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


def python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", f"from test_state import *\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, env=_ENVIRONMENT)


def go_on_with_all(folder: Path) -> None:
    """Every state in a folder, to its end: what another process does here."""
    for path in sorted(folder.glob("*.state")):
        torch.save(finish(State.load(path)), path.with_suffix(".end"))


def test_another_process_goes_on(tmp_path):
    """Saved in the middle of a run by one process, all solvers; finished by another."""
    ends = {}
    for solver in SOLVERS:
        state = step(step(begin(plan_of(solver, form="cheapest"), Noise((5, 9)))))
        state.save(tmp_path / f"{solver}.state")
        ends[solver] = finish(state)
    assert python("go_on_with_all(Path(sys.argv[1]))", tmp_path).wait(120) == 0
    for solver, end in ends.items():
        assert torch.equal(torch.load(tmp_path / f"{solver}.end"), end)


BIG = (2, 3, 96, 96)


def save_for_ever(solver: str, path: Path) -> None:
    """Save after every step, begin again at the end: until it is killed."""
    while True:
        state = begin(plan_of(solver, 9), Noise(4), BIG)
        while not state.done:
            state.save(path)
            state = step(state)


def killed_while_saving(folder: Path, attempt: int) -> None:
    children = {}
    for solver in ("dpmpp_3m", "unipc_3", "sa_solver"):
        path = folder / f"{solver}.{attempt}"
        children[path] = python("save_for_ever(sys.argv[1], Path(sys.argv[2]))", solver, path)
    for i, (path, child) in enumerate(children.items()):
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.013 * (1 + i + 3 * attempt))
        child.kill()
        assert child.wait() == -9
        state = State.load(path)
        want = finish(begin(plan_of(path.stem, 9), Noise(4), BIG))
        assert state.x.shape == BIG
        assert torch.equal(finish(state), want)


def test_killed_while_saving(tmp_path):
    """kill -9 at any moment: there is a whole state to go on from, and it leads to the same end."""
    killed_while_saving(tmp_path, 0)


@pytest.mark.slow
def test_killed_while_saving_often(tmp_path):
    for attempt in range(1, 11):
        killed_while_saving(tmp_path, attempt)


def _edited_run(plan: Plan, how: str, delta: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The end of a run on constant data, with an edit in its middle, and the scale there."""
    torch.manual_seed(0)
    state, sigma = plan.start(torch.randn(2, 3, dtype=torch.float64) * plan.prior_std), 1.0
    while not state.done:
        if state.nfe == 3 and how:
            sigma = state.level.sigma
            state = getattr(state, how)(state.x + delta)
        state = state.advance(torch.ones(2, 3, dtype=torch.float64))
    return state.x, plan.levels[-1].sigma / sigma


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not fs.solvers[s].stochastic])
def test_an_edit_stays_in_the_run(solver):
    """On constant data an edit is a change of the noise, and only scales with sigma."""
    plan = fs.plan(solver, fs.CosineVP(), 6, final="min")
    if not all(row.exact for row in plan.rows) or plan.basis is not None:
        return
    delta = torch.tensor([[0.1, -0.2, 0.0], [0.3, 0.0, 0.5]], dtype=torch.float64)
    plain, _ = _edited_run(plan, "", delta)
    moved, scale = _edited_run(plan, "edited", delta)
    torch.testing.assert_close(moved - plain, scale * delta, rtol=1e-9, atol=1e-11)


def test_replacing_one_state_loses_an_edit_where_a_corrector_goes_back():
    plan = fs.plan("unipc_2", fs.CosineVP(), 6, final="min")
    delta = torch.full((2, 3), 0.1, dtype=torch.float64)
    plain, _ = _edited_run(plan, "", delta)
    lost, scale = _edited_run(plan, "replaced", delta)
    assert (lost - plain).abs().max() < 0.5 * scale * 0.1
