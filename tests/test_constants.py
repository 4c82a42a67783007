"""Rows with a constant, everywhere that rows are used: X = sum a X + sum b D + sum e Z + c."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._combine import plus

SAMPLE = (3, 4)


def constants(plan: fs.Plan, shape: tuple[int, ...] = (), seed: int = 0) -> fs.Plan:
    """The plan with a constant in every other row."""
    rng = np.random.default_rng(seed)
    rows = list(plan.rows)
    for i in range(0, len(rows), 2):
        c = rng.normal(size=shape) if shape else float(rng.normal())
        rows[i] = replace(rows[i], exact=False, c=c)
    return replace(plan, rows=tuple(rows))


def start(plan: fs.Plan, dtype: torch.dtype = torch.float64) -> fs.State:
    x = torch.randn(2, *SAMPLE, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return plan.start(*[x] * plan.given, noise=5)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x - 0.2 * t.reshape(-1, *(1,) * (x.ndim - 1)))


def finish(state: fs.State) -> torch.Tensor:
    while not state.done:
        state = state.advance(network(*state.query()))
    return state.x


def by_hand(plan: fs.Plan) -> torch.Tensor:
    """The definition, in numpy."""
    x = start(plan).x.numpy()
    states, outputs = [x], {}
    for k, row in enumerate(plan.rows):
        call = plan.calls[k]
        if call is not None:
            x_in = torch.from_numpy(call.c_in * states[k])
            t_in = torch.full((2,), call.c_noise, dtype=torch.float64)
            outputs[k] = call.p * states[k] + call.q * network(x_in, t_in).numpy()
        total = sum(c * states[j] for j, c in row.a.items())
        total = total + sum(c * outputs[j] for j, c in row.b.items())
        states.append(total + row.c)
    return torch.from_numpy(states[-1])


PLANS = {
    "one number": constants(fs.plan("unipc_2", fs.VP(), 5, predicts="noise")),
    "one per element": constants(fs.plan("unipc_2", fs.VP(), 5, predicts="noise"), SAMPLE),
    "one per channel": constants(fs.plan("ab4", fs.VP(), 5, predicts="v"), (3, 1)),
}


@pytest.mark.parametrize("form", [lambda p: p, fs.Plan.fuse, lambda p: p.cheapest_on("cuda")])
@pytest.mark.parametrize("name", PLANS)
def test_runs_and_forms(name, form: Callable[[fs.Plan], fs.Plan]):
    plan = PLANS[name]
    want = by_hand(plan)
    made = form(plan)
    torch.testing.assert_close(finish(start(made)), want, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(made.canonical(), plan.canonical(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11)


def test_the_input_is_left_alone():
    """The constant is added in place, to what the sum made."""
    plan = PLANS["one per element"]
    state = start(plan)
    before = state.x.clone()
    after = state.advance(network(*state.query()))
    assert torch.equal(state.x, before)
    again = state.advance(network(*state.query()))
    assert torch.equal(after.x, again.x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func, inside
def test_gradients_and_transforms():
    plan = PLANS["one per element"]

    def run(x: torch.Tensor) -> torch.Tensor:
        return finish(plan.start(x))

    x = start(plan).x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(x).sum(), x)
    step = 1e-6 * torch.ones_like(x)
    with torch.no_grad():
        slope = (run(x + step) - run(x - step)).sum() / 2e-6
    assert float(grad.sum()) == pytest.approx(float(slope), rel=1e-6)
    x = x.detach()
    out, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(out, run(x))
    assert float(tangent.sum()) == pytest.approx(float(slope), rel=1e-6)


def test_printed_and_kept_in_files(tmp_path):
    for plan in PLANS.values():
        assert "+ c; start" in str(plan)
        plan.save(tmp_path / "plan")
        assert fs.Plan.load(tmp_path / "plan") == plan
        state = start(plan).advance(network(*start(plan).query()))
        state.save(tmp_path / "state")
        assert torch.equal(finish(fs.State.load(tmp_path / "state")), finish(state))
    first = PLANS["one number"]
    row = first.rows[0]
    assert f"{row.c:+.5g}\n" in str(first)
    assert "+ c;" not in str(fs.plan("unipc_2", fs.VP(), 5))
    assert replace(first, rows=(replace(row, c=row.c + 1), *first.rows[1:])) != first


def test_canonical_has_a_fourth_table():
    """Two tables, or three with draws, or four with constants: a third table is that of draws."""
    plain = fs.plan("ddpm", fs.VP(), 3)
    assert [v.shape for v in plain.canonical()] == [(4,), (4, 3), (4, len(plain.draws))]
    a, b, z, c = constants(plain).canonical()
    assert (a.shape, b.shape, z.shape, c.shape) == ((4,), (4, 3), (4, len(plain.draws)), (4,))
    a, b, z, c = constants(fs.plan("ddim", fs.VP(), 3), SAMPLE).canonical()
    assert (a.shape, z.shape, c.shape) == ((4, *SAMPLE), (4, 0, *SAMPLE), (4, *SAMPLE))


def test_refused():
    plan = fs.plan("ddim", fs.VP(), 2)
    row = plan.rows[0]
    with pytest.raises(ValueError, match=r"adds a constant.*exact is False"):
        replace(plan, rows=(replace(row, c=1.0), plan.rows[1]))
    with pytest.raises(ValueError, match="not finite"):
        replace(plan, rows=(replace(row, exact=False, c=np.nan), plan.rows[1]))
    with pytest.raises(ValueError, match="has no terms"):
        replace(plan, rows=(fs.Row({}, {}, 1, exact=False, c=1.0), plan.rows[1]))
    moved = fs.Row({0: 1.0}, {}, 1, exact=False, c=0.5)  # not a copy
    assert replace(plan, rows=(moved, fs.Row({1: 1.0}, {0: 1.0}, 1, exact=False))).rows[0] == moved
    with pytest.raises(ValueError, match=r"coefficients of shape \(3, 4\)"):
        PLANS["one per element"].start(torch.zeros(2, 4, 3))


def test_exact_inversion():
    plan = constants(fs.plan("bdia", fs.VP(), 5, final="min"), SAMPLE)
    state = start(plan)
    first = state.x
    while not state.done:
        state = state.advance(network(*state.query()))
    back = plan.inverse().start(*state.ends)
    while not back.done:
        back = back.advance(network(*back.query()))
    torch.testing.assert_close(back.x, first, rtol=1e-9, atol=1e-9)
    assert any(row.shifts for row in plan.inverse().rows)


def test_the_mean_of_a_transition():
    plain = fs.plan("ddpm", fs.VP(), 4, predicts="noise")
    plan = constants(plain, SAMPLE)
    laws = []
    for p in (plain, plan):
        state = start(p)
        laws.append(state.transition(network(*state.query())))
    c = torch.from_numpy(np.array(plan.rows[0].c)).expand_as(laws[0].mean)
    torch.testing.assert_close(laws[1].mean - laws[0].mean, c, rtol=1e-12, atol=1e-12)
    assert laws[0].std == laws[1].std


def test_batched_stacked_and_in_trees():
    plans = [PLANS["one number"], constants(fs.plan("ab4", fs.VP(), 5, predicts="noise"), seed=3)]
    alone = [finish(start(p)) for p in plans]
    many = fs.batch([start(p) for p in plans])
    while not many.done:
        many = many.advance(network(*many.query()))
    assert all(torch.equal(s.x, v) for s, v in zip(many.states, alone, strict=True))
    tree = fs.tree(dict(zip("ab", plans, strict=True)))
    run = tree.start({k: start(p).x for k, p in zip("ab", plans, strict=True)})
    while not run.done:
        x, t = run.query()
        run = run.advance({k: network(x[k], t[k]) for k in x})
    assert all(torch.equal(run.x[k], v) for k, v in zip("ab", alone, strict=True))
    plain = fs.plan("ddim", fs.VP(), 5, predicts="noise")
    whole = fs.stacked([*plans, plain], -3)  # along the batch
    x = torch.cat([start(p).x[:1] for p in (*plans, plain)])
    state = whole.start(x)
    while not state.done:
        state = state.advance(network(*state.query()))
    want = torch.cat([*(v[:1] for v in alone), finish(start(plain))[:1]])
    torch.testing.assert_close(state.x, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("solver", ["same", "ddpm"])
def test_compiled(name, solver):
    """Without a compiler: the same graph, eagerly."""
    plan = PLANS[name]
    if solver != "same":
        shape = np.shape(plan.rows[0].c)
        plan = constants(fs.plan(solver, fs.VP(), 4, predicts="noise"), shape)
    predicts = plan.about["predicts"]
    model = fs.Denoiser(network, fs.VP(), predicts)
    run = fs.compiled(model, backend="eager")
    x = start(plan).x
    want = fs.sample(model, solver=plan, x=x, noise=fs.Noise(5), dtype=torch.float64)
    torch.testing.assert_close(run(plan, x, noise=5), want, rtol=1e-11, atol=1e-11)


def test_coefficients_of_elements_are_still_refused_there():
    plan = fs.plan("ddim", fs.VP(), 2)
    rows = tuple(replace(r, a={j: c * np.ones(4) for j, c in r.a.items()}) for r in plan.rows)
    run = fs.compiled(fs.Denoiser(network, fs.VP(), "data"), backend="eager")
    with pytest.raises(ValueError, match="only numbers are compiled"):
        run(replace(plan, rows=rows), torch.zeros(1, 3, 4))


def test_plus():
    total = torch.ones(2, 3)
    assert plus(total, 0.5) is total
    assert torch.equal(plus(total, np.array([1.0, 2.0, 3.0])), total)
    assert total[1].tolist() == [2.5, 3.5, 4.5]
    assert total.dtype is torch.float32
