"""The three ways to a Jacobian agree, with each other and with the program run twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep._calibrate._jacobian import MODES, Machine
from fewstep._calibrate._program import (
    Program,
    Space,
    answered,
    banded,
    principal,
    program_of,
)

torch.set_num_threads(1)


class Net(nn.Module):
    """A small smooth network for samples of any shape. blind: it looks its time up."""

    def __init__(self, shape: tuple[int, ...], blind: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = int(np.prod(shape))
        self.enter, self.leave = nn.Linear(size + 1, 16), nn.Linear(16, size)
        self.blind = blind

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        if self.blind:
            t = torch.from_numpy(t.numpy().copy())
        told = t.to(self.enter.weight.dtype)
        h = torch.cat([x.flatten(1), torch.sin(2 * told[:, None])], dim=1)
        h = torch.tanh(self.enter(h))
        if shift is not None:
            h = h + shift[:, None]
        return self.leave(h).reshape(x.shape)


def _problem(
    process: fs.Process, predicts: str, shape: tuple[int, ...], dtype: torch.dtype, **net: bool
) -> tuple[fs.Denoiser, Program, Tensor, dict[str, Tensor], Tensor]:
    time = 1e-3 if process.integer_times else None
    model = fs.Denoiser(Net(shape, **net).to(dtype), process, predicts, time)
    count = 6
    program = program_of(fs.plan("ipndm_3", model, 4, grid="softened"))
    mean = 0.3 * np.random.default_rng(0).normal(size=shape)
    program = answered(program, mean)
    source = torch.Generator().manual_seed(1)
    z = torch.randn(count, *shape, generator=source, dtype=torch.float64)
    x = (z * process.prior_std(process.t_start)).to(dtype)
    cond = {"shift": torch.linspace(-1, 1, count, dtype=dtype)}
    target = 0.5 * torch.randn(count, *shape, generator=source, dtype=torch.float64).to(dtype)
    return model, program, x, cond, target


CASES = [
    (fs.EDM(0.02, 20.0), "data", (3,)),
    (fs.VP(), "noise", (2, 3)),
    (fs.Flow(), "flow", (1, 2, 2, 1)),
    (fs.CosineVP(), "v", (4,)),
]


def _columns(
    model: fs.Denoiser, program: Program, x: Tensor, cond: dict[str, Tensor]
) -> np.ndarray:
    """J (numbers, count, elements) by central differences of whole runs."""
    space, machine = Space(model.process, program.nfe, bands=program.bands), Machine(model)
    vector = space.vector(program)
    out = []
    for i in range(space.size):
        h, ends = 1e-5, []
        for sign in (-1, 1):
            moved = vector.copy()
            moved[i] += sign * h
            ends.append(machine.run(space.program(moved, program), x, cond).result)
        out.append(((ends[1] - ends[0]) / (2 * h)).flatten(1).numpy())
    return np.array(out)


@pytest.mark.parametrize(("process", "predicts", "shape"), CASES)
@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("bands", [1, 2])
def test_modes_agree(process, predicts, shape, blind: bool, bands: int) -> None:
    model, program, x, cond, target = _problem(process, predicts, shape, torch.float64, blind=blind)
    if bands > 1:
        source = torch.Generator().manual_seed(2)
        groups = principal(torch.randn(20, *shape, generator=source), bands)
        assert groups is not None
        program = banded(program, groups)
        program.b[:] *= np.linspace(0.9, 1.1, bands)
    J = _columns(model, program, x, cond)
    free = np.arange(len(J))
    weights = np.linspace(0.5, 2.0, len(x))
    timed = free < program.nfe
    for mode in MODES:
        machine = Machine(model, mode, probes=150 if mode == "reverse" else 1)
        walk = machine.run(program, x, cond)
        residual = walk.result - target
        want = np.einsum("pnd,nd->np", J, residual.flatten(1).numpy())
        gram = np.einsum("pnd,n,qnd->pq", J, weights, J)
        source = torch.Generator().manual_seed(0)
        got = machine.products(program, walk, x, cond, residual, weights, free, source)
        size = np.abs(want).max(0) + 1e-12
        off = np.abs(got.transposed - want) / size
        # Times that the network looks up are differentiated over 0.01 in lambda.
        loose = blind or mode == "differences"
        assert off[:, ~timed].max() < (1e-4 if mode == "differences" else 1e-7)
        assert off[:, timed].max() < (2e-3 if loose else 1e-6)
        root = np.sqrt(np.diag(gram)) + 1e-12
        error = np.abs(got.gram - gram) / np.outer(root, root)
        assert error.max() < {"reverse": 0.5, "forward": 2e-3 if blind else 1e-6,
                              "differences": 4e-3}[mode]  # fmt: skip
        assert (got.gradients > 0) == (mode != "differences")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_differences_in_short_formats(dtype: torch.dtype) -> None:
    """The step fits what the network answers in."""
    process = fs.VP()
    model, program, x, cond, target = _problem(process, "v", (8,), torch.float64)
    weights, free = np.ones(len(x)), np.arange(Space(process, program.nfe).size)
    exact = Machine(model, "forward")
    walk = exact.run(program, x, cond)
    want = exact.products(program, walk, x, cond, walk.result - target, weights, free).transposed
    network = model.network.to(dtype)  # pyright: ignore[reportAttributeAccessIssue]
    short = fs.Denoiser(network, process, "v", dtype=dtype)
    cond = {"shift": cond["shift"].to(dtype)}
    x, target = x.float(), target.float()
    machine = Machine(short, "differences")
    walk = machine.run(program, x, cond)
    got = machine.products(program, walk, x, cond, walk.result - target, weights, free).transposed
    rows = free >= program.nfe
    off = np.abs(got - want).max(0) / np.abs(want).max(0)
    limit = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    assert off[rows].max() < limit


def test_reverse_needs_a_graph_and_differences_do_not() -> None:
    model, program, x, cond, target = _problem(fs.VP(), "v", (3,), torch.float64)

    @torch.no_grad()
    def remote(x_in: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return model.network(x_in, t, **cond)

    deaf = fs.Denoiser(remote, model.process, "v")
    free, weights = np.arange(Space(model.process, program.nfe).size), np.ones(len(x))
    walk = Machine(deaf).run(program, x, cond)
    residual = walk.result - target
    with pytest.raises(ValueError, match="jacobian = 'reverse'"):
        Machine(deaf).products(program, walk, x, cond, residual, weights, free)
    a = Machine(deaf, "differences").products(program, walk, x, cond, residual, weights, free)
    b = Machine(model).products(program, walk, x, cond, residual, weights, free)
    assert np.allclose(a.transposed, b.transposed, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="accepted: differences, forward, reverse"):
        Machine(model, "backward")


def test_one_graph_at_a_time() -> None:
    """Reverse mode lets go of a call's graph before it makes the next."""
    model, program, x, cond, target = _problem(fs.VP(), "v", (3,), torch.float64)
    alive, most = 0, 0

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v: Tensor) -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return v.clone()

        @staticmethod
        def backward(ctx, *grads: Tensor) -> Tensor:
            nonlocal alive
            alive -= 1
            return grads[0]

    inner = model.network

    def network(x_in: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return inner(Watched.apply(x_in) if x_in.requires_grad else x_in, t, **cond)

    seen = fs.Denoiser(network, model.process, "v")
    machine = Machine(seen)
    walk = machine.run(program, x, cond)
    free = np.arange(Space(model.process, program.nfe).size)
    machine.products(program, walk, x, cond, walk.result - target, np.ones(len(x)), free)
    assert most == 1


def test_integers_are_differentiated_over_integers() -> None:
    process = fs.DiscreteVP.linear(50)
    told: list[Tensor] = []
    inner = Net((3,)).double()

    def network(x_in: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return inner(x_in, 0.02 * t)

    model = fs.Denoiser(network, process, "v")
    program = program_of(fs.plan("ipndm_2", model, 4))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space = Space(process, 4, True)
    results = []
    for mode in MODES:
        machine = Machine(model, mode)
        walk = machine.run(program, x, {})
        free = np.arange(space.size)
        results.append(machine.products(program, walk, x, {}, walk.result, np.ones(5), free))
    for other in results[1:]:
        assert np.allclose(other.transposed, results[0].transposed, rtol=1e-4, atol=1e-5)
    assert np.abs(results[0].transposed[:, :4]).min() > 0
    assert all(t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 49 for t in told)
