"""Levels per sample, token or frame: every member goes its own way in the same network calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._noise import Noise
from fewstep._plan import Plan, State
from fewstep._stacked import stacked

SOLVERS = list(fs.solvers)


def can(solver: str) -> bool:
    plan = fs.plan(solver, fs.VP(), 3)
    return plan.given == 1 and not plan.keep and plan.basis is None


STACKABLE = [solver for solver in SOLVERS if can(solver)]


def joint(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, channels) at times (batch, tokens) or (batch,): tokens see each other."""
    t = t[:, :, None] if t.ndim == 2 else t[:, None, None]
    return torch.tanh(0.8 * x - 0.3 * t + 0.1 * x.mean(1, keepdim=True))


def drive(state: State) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """The end of a run, and every question with its answer."""
    log = []
    while not state.done:
        x_in, t_in = state.query()
        log.append((x_in, t_in, joint(x_in, t_in)))
        state = state.advance(log[-1][2])
    return state.x, log


def part(v: torch.Tensor, i: int) -> torch.Tensor:
    return v[:, i : i + 1]


def check_members(
    plans: Sequence[Plan],
    delays: Sequence[int],
    x: torch.Tensor,
    end: torch.Tensor,
    log: Sequence[tuple[torch.Tensor, ...]],
    draws: Sequence[torch.Tensor],
) -> None:
    """Token i is the run of plan i from the joint network's answers about it."""
    for i, (plan, delay) in enumerate(zip(plans, delays, strict=True)):
        noise = [part(z, i).clone() for z in draws] if plan.stochastic else 0
        state = plan.start(part(x, i), noise=noise)
        for x_in, t_in, out in log[delay : delay + plan.nfe]:
            mine, told = state.query()
            torch.testing.assert_close(part(x_in, i), mine, rtol=1e-12, atol=1e-12)
            assert torch.equal(t_in[:, i], told)
            state = state.advance(part(out, i))
        assert state.done
        torch.testing.assert_close(part(end, i), state.x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver", STACKABLE)
def test_every_token_is_its_own_run(solver):
    plans = [
        fs.plan(solver, fs.VP(), 5, predicts="v"),
        fs.plan(solver, fs.CosineVP(), 3, grid="lambda", predicts="v"),
        fs.plan("dpmpp_2m", fs.Flow(shift=3.0), 2, predicts="v"),
        fs.plan(solver, fs.VP(), 7, start={"strength": 0.6}, predicts="v"),
    ]
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    draws = [torch.randn_like(x) for _ in range(max(len(plan.draws) for plan in plans))]
    for delays in ((0, 0, 0, 0), (1, 0, 5, 2)):
        plan = stacked(plans, delays=delays)
        assert plan.nfe == max(d + p.nfe for d, p in zip(delays, plans, strict=True))
        assert plan.stochastic == bool(draws)
        for form in (plan, plan.fuse()) if any(delays) else (plan,):
            end, log = drive(form.start(x, noise=draws or 0))
            assert len(log) == plan.nfe
            check_members(plans, delays, x, end, log, draws)


@pytest.mark.parametrize("solver", STACKABLE)
def test_every_sample_is_its_own_run(solver):
    """Levels per sample (image to image with a strength for each): also the noise is its own."""
    plans = [
        fs.plan(solver, fs.VP(), 5, start={"strength": s}, predicts="v") for s in (0.4, 1, 0.7)
    ]
    noise, plan = Noise(3), stacked(plans, axis=-3)
    x = noise.start((3, 4, 2), dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.8 * x - 0.3 * t[:, None, None])

    states = [plan.start(x, noise=noise)]
    states += [p.start(x[i : i + 1], noise=noise.take([i], 3)) for i, p in enumerate(plans)]
    while not states[0].done:
        asked = [state.query() for state in states]
        assert asked[0][1].shape == (3,)
        states = [state.advance(network(*q)) for state, q in zip(states, asked, strict=True)]
    alone = torch.cat([state.x for state in states[1:]])
    torch.testing.assert_close(states[0].x, alone, rtol=1e-11, atol=1e-11)


def test_members_wait_and_rest_unchanged_and_the_network_is_told():
    plans = [fs.plan("unipc_3", fs.VP(), n, predicts="v") for n in (2, 3, 2)]
    delays = (0, 1, 4)
    x = torch.randn(2, 3, 4)
    for rest in (None, 1e-4, (1e-4, None, 0.5)):
        plan = stacked(plans, delays=delays, rest=rest)
        state, xs, times = plan.start(x), [], []
        while not state.done:
            xs.append(state.x)
            times.append(state.query()[1])
            state = state.advance(joint(*state.query()))
        xs, times = torch.stack([*xs, state.x]), torch.stack(times)
        rests = rest if isinstance(rest, tuple) else [rest] * 3
        for i, (p, d) in enumerate(zip(plans, delays, strict=True)):
            assert all(torch.equal(part(v, i), part(x, i)) for v in xs[: d + 1])
            assert all(torch.equal(part(v, i), part(state.x, i)) for v in xs[d + p.nfe :])
            own = [level.t for level in p.evaluations]
            last = own[-1] if rests[i] is None else rests[i]
            want = [own[0]] * d + own + [last] * (plan.nfe - d - p.nfe)
            torch.testing.assert_close(times[:, 0, i], torch.tensor(want))


def test_rest_where_the_answer_means_nothing():
    """At sigma = 0 a prediction of the noise says nothing of the data (q = 0): also when fused."""
    plans = [fs.plan("dpmpp_2m", fs.VP(), n, predicts="noise") for n in (2, 4)]
    plan, x = stacked(plans, rest=0.0), torch.randn(2, 2, 3, dtype=torch.float64)
    assert np.ravel(plan.calls[-2].q)[0] == 0
    ends = [drive(form.start(x)) for form in (plan, plan.fuse())]
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-10, atol=1e-10)
    assert [t[0].tolist()[0] for _, t, _ in ends[1][1]][2:] == [0.0, 0.0]


def test_frames_in_a_rolling_window():
    """Frames of a video, each one evaluation behind the one before: at any time neighbours differ
    by one step, and the whole takes frames + steps - 1 evaluations."""
    member, frames = fs.plan("dpmpp_2m", fs.Flow(), 4, predicts="flow"), 6
    plan = stacked([member] * frames, axis=-4, delays=range(frames), rest=0.0)
    assert plan.nfe == frames + 4 - 1
    x = torch.randn(2, frames, 3, 4, 4)  # (batch, frames, channels, height, width)
    state = plan.start(x)
    while not state.done:
        x_in, t_in = state.query()
        assert t_in.shape == (2, frames)
        assert np.all(np.diff(np.ravel(state.level.t)) >= 0)  # cleaner frames are in front
        assert (len(state.states), len(state.outputs)) <= (1, 2)  # copies keep nothing old alive
        state = state.advance(torch.tanh(x_in - t_in[:, :, None, None, None]))
    alone = member.start(x[:, 2])
    while not alone.done:
        x_in, t_in = alone.query()
        alone = alone.advance(torch.tanh(x_in - t_in[:, None, None, None]))
    torch.testing.assert_close(state.x[:, 2], alone.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_any_axis(axis):
    plans = [fs.plan("dpmpp_2m", fs.VP(), n, predicts="v") for n in (2, 3)]
    shape = [3, 4, 5, 6]
    shape[axis] = 2
    x = torch.randn(shape, dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x - t.reshape(3, 2, *(1,) * (-axis - 1)).reshape(3, *each))

    each = [1, 1, 1]
    each[axis] = 2
    state = stacked(plans, axis=axis).start(x)
    while not state.done:
        state = state.advance(network(*state.query()))
    for i, plan in enumerate(plans):
        alone = plan.start(x.narrow(axis, i, 1))
        while not alone.done:
            x_in, t_in = alone.query()
            alone = alone.advance(torch.tanh(x_in - t_in.reshape(-1, 1, 1, 1)))
        torch.testing.assert_close(state.x.narrow(axis, i, 1), alone.x, rtol=1e-12, atol=1e-12)


def test_integer_times():
    process = fs.DiscreteVP.scaled_linear()
    plans = [fs.plan("dpmpp_2m", process, n) for n in (3, 5)]
    state = stacked(plans, delays=(1, 0), rest=0).start(torch.randn(2, 2, 3))
    while not state.done:
        x_in, t_in = state.query()
        assert t_in.dtype == torch.int64
        state = state.advance(joint(x_in, t_in / 1000))
    assert t_in.tolist() == [[0, int(plans[1].evaluations[-1].t)]] * 2


@pytest.mark.parametrize("solver", ["dpmpp_3m", "unipc_2", "sa_solver", "ddpm"])
def test_states_of_stacked_plans_are_values(solver, tmp_path):
    plans = [fs.plan(solver, fs.VP(), n, predicts="v") for n in (3, 5)]
    plan = stacked(plans, delays=(1, 0))
    plan.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan")
    assert back == plan
    assert str(back) == str(plan)
    assert plan != stacked(plans)
    state = plan.start(torch.randn(2, 2, 3), noise=4)
    other = back.start(state.x, noise=4)
    while not state.done:
        other.save(tmp_path / "state")
        other = State.load(tmp_path / "state")
        assert other == state
        state, other = (s.advance(joint(*s.query())) for s in (state, other))
    assert torch.equal(state.x, other.x)


def test_equal_members_share_a_path():
    """Draws at the same place for all members can come from one path; at different places not."""
    member = fs.plan("sde_dpmpp_2m", fs.VP(), 4, predicts="v")
    path, x = Noise(1, path=True), torch.randn(2, 3, 4, dtype=torch.float64)

    def finish(state: State) -> torch.Tensor:
        while not state.done:
            x_in, t_in = state.query()
            state = state.advance(torch.tanh(0.8 * x_in - 0.3 * t_in[:1].reshape(-1)[0]))
        return state.x

    together = finish(stacked([member] * 3).start(x, noise=path))
    torch.testing.assert_close(together, finish(member.start(x, noise=path)), rtol=1e-12, atol=0)
    other = fs.plan("sde_dpmpp_2m", fs.VP(), 5, predicts="v")
    with pytest.raises(ValueError, match="which no one path has"):
        stacked([member, other, other]).start(x, noise=path)


def test_the_law_of_a_step_has_one_deviation_per_member():
    plans = [fs.plan("ddpm", fs.VP(), n, predicts="v") for n in (4, 8)]
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    state = stacked(plans, delays=(0, 2)).start(x)
    out = joint(*state.query())
    law = state.transition(out)
    alone = plans[0].start(part(x, 0)).transition(part(out, 0))
    assert law.std.shape == (2, 1)
    assert law.std[0, 0] == pytest.approx(alone.std)
    assert law.std[1, 0] == 0  # it waits
    torch.testing.assert_close(part(law.mean, 0), alone.mean)
    after = state.advance(out).x
    torch.testing.assert_close(law.log_prob(after), alone.log_prob(part(after, 0)))


def test_sampling_and_guidance_with_levels_per_token():
    """Guidance acts on the tokens in its interval, and only these calls are doubled."""
    sizes = []

    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[0])
        return torch.tanh(x - t[:, :, None] + label[:, None, None])

    base = fs.Denoiser(network, fs.VP(), "v")
    model = fs.Guided(base, 3.0, {"label": 0.5}, interval=(0.3, 2.0))
    plans = [fs.plan("ddim", base, n) for n in (6, 3)]
    plan, x, label = stacked(plans, delays=(0, 3)), torch.randn(2, 2, 4), torch.tensor([1.0, 2.0])
    end = fs.sample(model, solver=plan, x=x, cond={"label": label}, progress=False)
    acts = [(v.rho >= 0.3) & (v.rho <= 2.0) for v in plan.evaluations]
    assert sizes == [4 if a.any() else 2 for a in acts]
    assert any(a.any() and not a.all() for a in acts)
    for i, (member, delay) in enumerate(zip(plans, (0, 3), strict=True)):
        state = member.start(part(x, i))
        for level, act in zip(member.evaluations, acts[delay:], strict=False):
            x_in, t_in = state.query()
            with_cond = network(x_in, t_in[:, None], label)
            without = network(x_in, t_in[:, None], torch.full((2,), 0.5))
            assert bool(np.ravel(act)[i]) == (0.3 <= level.rho <= 2.0)
            guided = without + 3.0 * (with_cond - without)
            state = state.advance(guided if np.ravel(act)[i] else with_cond)
        torch.testing.assert_close(part(end, i), state.x)
    records = list(fs.steps(model, solver=plan, x=x, cond={"label": label}))
    torch.testing.assert_close(records[-1].x, end)


def test_the_scale_of_the_start():
    same = [fs.plan("ddim", fs.EDM(), n) for n in (2, 3)]
    assert stacked(same).prior_std == same[0].prior_std
    assert np.isnan(stacked([same[0], fs.plan("ddim", fs.VP(), 2)]).prior_std)


def test_printing():
    plans = [fs.plan("ddim", fs.VP(), 2), fs.plan("dpmpp_2m", fs.VP(), 3)]
    plan = stacked(plans, delays=(1, 0))
    text = str(plan)
    assert "ddim, dpmpp_2m" in text
    assert "2 levels along axis -2" in text
    assert "nan" not in text
    header, *rows = text.splitlines()[2:]
    assert all(row.index("[") == header.index("coefficients") for row in rows[:-1])
    assert repr(plan) == "<Plan ddim, dpmpp_2m: 3 NFE, t = 1 to 0>"


@pytest.mark.parametrize("what", ["order", "stability", "error_constant", "explain", "inverse"])
def test_what_a_stacked_plan_is_not_asked(what):
    plan = stacked([fs.plan("ddim", fs.VP(), n) for n in (2, 3)])
    with pytest.raises(ValueError, match=f"{what} is not defined for a plan with levels along"):
        getattr(plan, what)()


def test_every_solver_that_cannot_be_stacked_is_refused():
    refused = [solver for solver in SOLVERS if solver not in STACKABLE]
    for solver in refused:
        with pytest.raises(ValueError, match=r"plans: number 0 .* cannot be stacked"):
            stacked([fs.plan(solver, fs.VP(), 4)])
    assert {"bdia", "edict"} <= set(refused)


def two(**options: Any) -> Plan:
    return stacked([fs.plan("ddim", fs.VP(), n) for n in (2, 3)], **options)


INTEGERS = fs.DiscreteVP.linear()
GRAM = {"predicts": "edm"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stacked([]), "plans = "),
        (lambda: stacked(["ddim"]), "plans = "),
        (lambda: two(axis=1), "axis = 1; need a negative integer"),
        (lambda: stacked([two()]), "number 0 is stacked already"),
        (lambda: two(delays=(1,)), "need 2 integers"),
        (lambda: two(delays=(-1, 0)), "need 2 integers"),
        (lambda: two(delays=(1, 1)), "no member moves at evaluation 1"),
        (lambda: two(delays=(0, 3)), "no member moves at evaluation 3"),
        (lambda: two(rest=(1.0,)), "rest"),
        (
            lambda: stacked([fs.plan("ddim", fs.EDM(), n, **GRAM) for n in (1, 2)], rest=0.0),
            "cannot be asked at t = 0",
        ),
        (
            lambda: stacked([fs.plan("ddim", fs.VP(), 2), fs.plan("ddim", fs.VP(), 2).fuse()]),
            "number 1 is fused, or the first is",
        ),
        (
            lambda: stacked(
                [fs.plan("ddim", fs.VP(), 2), fs.plan("ddim", INTEGERS, 2, predicts="v")]
            ),
            "number 1 tells the network integers",
        ),
        (lambda: two().start(torch.zeros(1, 3, 2)), "2 levels along axis -2"),
        (lambda: two().start(torch.zeros(2)), "x has 1 axes"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_copy_of_a_state_is_refused_only_if_all_members_copy():
    plan = two()
    row = fs.Row({0: np.ones((2, 1))}, {}, 1)
    with pytest.raises(ValueError, match="copies a state"):
        Plan(plan.levels, (row, *plan.rows[1:]), plan.calls, axis=-2)
