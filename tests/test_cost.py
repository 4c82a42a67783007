"""What `advance` does beside the arithmetic, for every solver: nothing; and what it allocates.

Operations are counted by a dispatch mode, under which `combine` takes PyTorch's kernels: what is
counted is what CUDA runs. The compiled kernel is given addresses and calls nothing; what is around
it is the same code. Allocation is measured on both.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fewstep as fs
from accounting import BOTH, Operations, peak_bytes
from fewstep import _combine
from fewstep._noise import Noise, as_source

NFE = 7
SHAPE = (2, 5, 21, 33)  # no axis of length 1, and small enough for the path that minds calls
LARGE = (2, 4, 91, 93)  # the path that minds memory

READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero"}
READS |= {"aten::equal", "aten::allclose", "aten::masked_select", "aten::unique"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone", "aten::lift_fresh", "aten::scalar_tensor"}

STOCHASTIC = [name for name, entry in fs.solvers.items() if entry.stochastic]
solvers = pytest.mark.parametrize("solver", list(fs.solvers), ids=str)
fused = pytest.mark.parametrize("fuse", [False, True], ids=["plain", "cheapest"])


def compiled(solver, fuse, predicts="noise"):
    process = fs.Flow() if predicts == "flow" else fs.VP()
    plan = fs.plan(solver, process, NFE, predicts=predicts)
    return plan.cheapest if fuse else plan


def noise(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def started(plan, x):
    """A run whose draws are there already: what an `advance` does beside making them."""
    draws = noise((max(1, len(plan.draws)), *x.shape), x.dtype, 2)
    return plan.start(x, noise=draws)


def watched(plan, shape, dtype, state_dtype=torch.float32):
    """The operations of every `advance` of a run."""
    state, out = started(plan, noise(shape, state_dtype)), noise(shape, dtype, 1)
    with torch.no_grad():
        with Operations():
            state.advance(out)  # constants, once per process
        seen = Operations()
        while not state.done:
            state.query()
            with seen:
                state = state.advance(out)
    assert state.x.dtype == state_dtype
    return seen


@solvers
@fused
@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
def test_no_read_no_copy_no_scalar_arithmetic(solver, fuse, shape):
    for predicts in ("noise", "data", "flow"):
        plan = compiled(solver, fuse, predicts)
        for state_dtype in (torch.float32, torch.float64):
            seen = watched(plan, shape, state_dtype, state_dtype)
            assert sum(seen.names.values()) >= plan.nfe
            assert not READS & set(seen.names)
            assert not COPIES & set(seen.names)
            assert not seen.numbers


@solvers
@fused
def test_half_precision_is_widened_and_nothing_else(solver, fuse):
    for shape in (SHAPE, LARGE):
        seen = watched(compiled(solver, fuse), shape, torch.bfloat16)
        assert not READS & set(seen.names)
        assert not seen.numbers
        widened = sum(seen.names[name] for name in COPIES)
        assert widened <= NFE
        assert set(seen.names) & COPIES <= {"aten::copy_", "aten::_to_copy"}


@solvers
@fused
def test_nothing_but_the_states_device_is_touched(solver, fuse):
    """On a device without values every tensor that comes from the host would show."""

    class Devices(Operations):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = super().__torch_dispatch__(func, types, args, kwargs)
            for v in (*args, *(kwargs or {}).values(), found):
                assert not isinstance(v, torch.Tensor) or v.device.type == "meta", func
            return found

    plan = compiled(solver, fuse)
    state, out = plan.start(noise(SHAPE)), noise(SHAPE, torch.bfloat16).to("meta")
    states = {j: v.to("meta") for j, v in state.states.items()}
    draws = as_source(noise((max(1, len(plan.draws)), *SHAPE)).to("meta"))
    state = dataclasses.replace(state, states=states, noise=draws)
    while not state.done:
        with Devices() as seen:
            state = state.advance(out)
        assert seen.names
    assert (state.x.shape, state.x.device.type) == (SHAPE, "meta")


def test_the_count_sees_what_it_forbids():
    x = noise(SHAPE)
    with Operations() as seen:
        float(x[0, 0, 0, 0])
        bool(torch.isfinite(x).all())
        torch.tensor(0.5).exp() * x
        x.double()
    assert seen.names["aten::_local_scalar_dense"] == 2
    assert seen.names["aten::_to_copy"] == 1
    assert seen.numbers["aten::exp"] == 1


@pytest.mark.parametrize("path", [False, True], ids=["fresh", "path"])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_making_noise_reads_nothing_either(solver, path):
    """Draws of the default source are made where the state is, and the host waits for none."""
    plan = compiled(solver, True)
    for shape in ((2, 3, 17),) if path else (SHAPE, LARGE):
        state, out = plan.start(noise(shape), noise=Noise(3, path=path)), noise(shape, seed=1)
        with torch.no_grad():
            while not state.done:
                with Operations() as seen:
                    state = state.advance(out)
                assert not READS & set(seen.names)


def allowed(plan):
    """Tensors alive at once in a run, beside the start, the draws and the output: at every call
    what later rows need, and within `advance` what its rows make until its rows are done with it.
    """
    last = {}
    for made, row in enumerate(plan.rows, plan.given):
        last |= {("X", j): made for j in row.a} | {("D", j): made for j in row.b}
    end = len(plan.levels) - 1
    alive, peak, k = set(), 0, 0
    while k < end:
        before, new = set(alive), set()
        if not plan.raw:
            new.add(("D", k))
        while k < end:
            k += 1
            new.add(("X", k))
            peak = max(peak, len(before | new))
            new = {v for v in new if v == ("X", k) or last.get(v, 0) > k}
            if plan.calls[k] is not None:
                break
        alive = {v for v in before | new if v == ("X", k) or last.get(v, 0) > k}
    return peak


@solvers
@fused
@pytest.mark.parametrize("kernel", BOTH)
def test_allocates_what_the_rows_need(solver, fuse, kernel, monkeypatch):
    monkeypatch.setattr(_combine, "KERNEL", kernel)
    plan = compiled(solver, fuse)
    for dtype in (torch.float32,) if plan.raw else (torch.float32, torch.bfloat16):
        x, out = noise(LARGE), noise(LARGE, dtype, 1)

        begin = started(plan, x)

        def run(begin=begin, x=x, out=out):
            state = plan.start(x, noise=begin.noise)
            while not state.done:
                state = state.advance(out)
            return state.x

        with torch.no_grad():
            run()
            peak, final = peak_bytes(run)
        assert final == pytest.approx(x.nbytes, abs=4096)
        assert peak <= allowed(plan) * x.nbytes + 4096


def test_more_history_is_seen_by_the_account():
    counts = [allowed(compiled(name, False)) for name in ("ddim", "dpmpp_2m", "dpmpp_3m")]
    assert counts == sorted(set(counts))
