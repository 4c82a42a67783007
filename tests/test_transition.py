"""The law of a step given its past: what reinforcement learning on samplers needs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._noise import Draw, Noise
from problems import reverse_sde

#: Solvers by hand keep the tests alive by themselves.
SOLVERS: dict[str, fs.Solver] = {
    "by hand, order 1": reverse_sde(1, 1.0),
    "by hand, order 2": reverse_sde(2, 0.5),
    **{name: entry for name, entry in fs.solvers.items() if entry.stochastic},
}
solvers = pytest.mark.parametrize("solver", SOLVERS)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.1 * torch.cos(3 * x)


def started(solver: str, shape=(3, 2, 5), seed: int = 0, nfe: int = 12) -> fs.State:
    plan = fs.plan(SOLVERS[solver], fs.Flow(), nfe, predicts="flow", grid="uniform")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return plan.start(x, noise=Noise(seed))


def walk(state: fs.State):
    """(state, answer) of every step of a run."""
    while not state.done:
        answer = network(*state.query())
        yield state, answer
        state = state.advance(answer)


@solvers
def test_log_density_is_the_normal_one(solver):
    drawn = 0
    begin = started(solver, nfe=20)  # restarts need some
    for state, answer in walk(begin):
        law, x = state.transition(answer), state.advance(answer).x
        assert isinstance(law.std, float)
        assert law.mean.shape == x.shape
        if law.std == 0:
            assert torch.equal(x, law.mean)
            assert torch.equal(law.log_prob(x), torch.zeros(3, dtype=torch.float64))
        else:
            drawn += 1
            assert not torch.equal(x, law.mean)
            normal = torch.distributions.Normal(law.mean, law.std)
            want = normal.log_prob(x).sum((1, 2))
            torch.testing.assert_close(law.log_prob(x), want)
    assert drawn


@solvers
def test_moments_are_those_of_samples(solver):
    """Steps from one state, with the draws that are made in the step drawn anew."""
    many = (400, 50)
    for state, answer in walk(started(solver, shape=(1, 1))):
        law = state.transition(answer)
        wide = {
            name: {j: v.expand(many) for j, v in getattr(state, name).items()}
            for name in ("states", "outputs", "draws")
        }
        other = dataclasses.replace(state, **wide, noise=Noise(11))
        x = other.advance(answer.expand(many)).x
        mean, std = float(law.mean), law.std
        assert abs(float(x.mean()) - mean) <= 5 * std / math.sqrt(x.numel()) + 1e-12
        assert abs(float(x.std()) - std) <= 5 * std / math.sqrt(2 * x.numel()) + 1e-12


def test_steps_of_one_draw_in_several_rows_count_it_once():
    """SA-Solver's corrector uses its predictor's draw: conditionally on the past the next state
    has the spread of the sum, and a draw that is known already moves the mean."""
    plan = fs.plan("sa_solver", fs.Flow(), 6, predicts="flow", grid="uniform")
    shared = [m for m in range(len(plan.draws)) if sum(m in row.e for row in plan.rows) > 1]
    assert shared
    state = plan.start(torch.zeros(2, 3, dtype=torch.float64), noise=Noise(0))
    known = 0
    for before, answer in walk(state):
        moved = dataclasses.replace(before, draws={m: z + 1 for m, z in before.draws.items()})
        law, other = before.transition(answer), moved.transition(answer)
        assert law.std == other.std
        known += not torch.equal(law.mean, other.mean)
    assert known


@solvers
def test_gradients_flow_to_the_network_and_to_x(solver):
    for state, answer in walk(started(solver)):
        x = state.x.clone().requires_grad_()
        out = answer.clone().requires_grad_()
        law = state.replaced(x).transition(out)
        (law.mean * torch.arange(30.0, dtype=x.dtype).reshape(x.shape)).sum().backward()
        assert out.grad is not None
        assert float(out.grad.abs().max()) > 0
        if not law.std:
            continue
        # d log p = (x - mean) / std^2 dmean
        seen, out = state.advance(answer).x, answer.clone().requires_grad_()
        law = state.transition(out)
        (grad,) = torch.autograd.grad(law.log_prob(seen).sum(), out)
        push = (seen - law.mean.detach()) / law.std**2
        (want,) = torch.autograd.grad(state.transition(out).mean, out, grad_outputs=push)
        torch.testing.assert_close(grad, want)


@solvers
def test_the_ratio_of_an_unchanged_policy_is_one(solver):
    """A recorded trajectory evaluated again: the states whole, and, where no draw is carried from
    step to step, its x put into a run on other noise."""
    recorded = list(walk(started(solver)))
    last = recorded[-1][0].advance(recorded[-1][1])
    xs = [*(s.x for s, _ in recorded[1:]), last.x]
    old = [s.transition(a).log_prob(x) for (s, a), x in zip(recorded, xs, strict=True)]
    asked = [(s, network(*s.query())) for s, _ in recorded]
    new = [s.transition(a).log_prob(x) for (s, a), x in zip(asked, xs, strict=True)]
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close((b - a).exp(), torch.ones(3, dtype=a.dtype), rtol=0, atol=0)
    if any(s.draws for s, _ in recorded):
        return
    state = started(solver, seed=99)
    for (_, answer), x, logp in zip(recorded, xs, old, strict=True):
        again = network(*state.query())
        torch.testing.assert_close(again, answer)
        ratio = (state.transition(again).log_prob(x) - logp).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
        state = state.advance(again)
        state = state if state.done else state.replaced(x)


def test_importance_weights_average_to_one():
    """E[p_new / p_old] = 1 over trajectories of the old policy, and their weighted mean is that of
    the new one: the densities are normalised and belong to the samples."""
    plan = fs.plan(reverse_sde(2, 1.0), fs.Flow(), 6, predicts="flow", grid="uniform")
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(100_000, 1)))

    def answer(state, shift):
        return network(*state.query()) + shift

    def ends(shift, other=0.0):
        state, ratio = plan.start(x, noise=Noise(1)), torch.zeros(len(x), dtype=x.dtype)
        new = plan.start(x, noise=Noise(1))
        while not state.done:
            old_law, new_law = (
                s.transition(answer(s, v)) for s, v in ((state, shift), (new, other))
            )
            state, last = state.advance(answer(state, shift)), state
            if old_law.std:
                ratio = ratio + new_law.log_prob(state.x) - old_law.log_prob(state.x)
            new = new.advance(answer(new, other))
            new = new if new.done else new.replaced(state.x)
        return last.x, ratio.exp()

    # the last step is deterministic: compare where it starts
    x_old, weight = ends(0.0, 0.1)
    x_new, one = ends(0.1, 0.1)
    torch.testing.assert_close(one, torch.ones_like(one))
    error = 5 * float(weight.std()) / math.sqrt(len(x))
    assert float(weight.std()) > 0.1
    assert abs(float(weight.mean()) - 1) < error
    moved = float((weight[:, None] * x_old).mean() - x_new.mean())
    assert abs(moved) < 5 * float((weight[:, None] * x_old).std()) / math.sqrt(len(x))
    assert abs(float(x_old.mean() - x_new.mean())) > 0.05


def test_levels_per_sample():
    """Standard deviations are arrays where levels are; a sample that does not move counts 0."""
    levels = [fs.Flow().level(np.array([[a], [b]])) for a, b in ((0.9, 0.6), (0.6, 0.6))]
    b, v = np.array([[0.1], [0.0]]), np.array([[0.3], [0.0]])
    rows = (fs.Row({0: np.array([[0.9], [0.999]])}, {0: b}, 1, False, {0: v}),)
    draw = Draw(fs.Flow().level(0.9), fs.Flow().level(0.6), (0.0, 1.0))
    call = fs.Call(0.0, 1.0, 1.0, 0.5)
    plan = fs.Plan(tuple(levels), rows, (call, None), draws=(draw,), axis=-2)
    state = plan.start(torch.ones(2, 4), noise=Noise(0))
    out = torch.full((2, 4), 0.5)
    law = state.transition(out)
    assert np.shape(law.std) == (2, 1)
    x = state.advance(out).x
    want = torch.distributions.Normal(law.mean[0], 0.3).log_prob(x[0]).sum()
    torch.testing.assert_close(law.log_prob(x), torch.stack([want, torch.zeros(())]))
    assert torch.equal(x[1], law.mean[1])


def test_refusals_and_shapes():
    state = started("by hand, order 1")
    answer = network(*state.query())
    law = state.transition(answer)
    with pytest.raises(ValueError, match="shape"):
        law.log_prob(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="shape"):
        state.transition(answer[:, :1])
    solver = dataclasses.replace(reverse_sde(1))
    plan = dataclasses.replace(fs.plan(solver, fs.Flow(), 3), basis=fs.Cosine())
    state = plan.start(torch.zeros(1, 1, 4, 4), noise=0)
    with pytest.raises(ValueError, match="modes of a basis"):
        state.transition(torch.zeros(1, 1, 4, 4))
