"""Runs that share network calls: each has the bits that it has alone."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import fewstep as fs
from accounting import Operations
from fewstep._batch import Batch, batch
from fewstep._noise import Noise
from fewstep._plan import Plan, State
from fewstep._stacked import stacked

SOLVERS = list(fs.solvers)
SAMPLE = (2, 3)


def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    each = (-1, *(1,) * (x.ndim - 1))
    out = 0.8 * x - 0.3 * t.reshape(each)
    return torch.tanh(out if label is None else out + label.reshape(each))


def begin(plan: Plan, seed: int, size: int = 1, sample: tuple[int, ...] = SAMPLE) -> State:
    noise = Noise(seed)
    return plan.start(noise.start((size, *sample)) * plan.prior_std, noise=noise)


def ahead(state: State, steps: int) -> State:
    for _ in range(steps):
        state = state.advance(network(*state.query()))
    return state


def finish(state: State) -> torch.Tensor:
    return ahead(state, state.plan.nfe - state.nfe).x


def six(solver: str) -> list[State]:
    """Different numbers of evaluations, positions, schedules and sizes; one is done."""
    vp = [fs.plan(solver, fs.VP(), nfe, predicts="v").cheapest for nfe in (3, 6, 9)]
    flow = [fs.plan(solver, fs.VP(), nfe, grid="lambda", predicts="v") for nfe in (1, 4)]
    return [
        begin(vp[0], 1),
        ahead(begin(vp[1], 2, 3), 5),
        ahead(begin(vp[2], 3, 2), 4),
        begin(flow[0], 4),
        ahead(begin(flow[1], 5), 2),
        ahead(begin(vp[1], 6), 6),
    ]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_of_mixed_positions_is_each_alone(solver):
    states = six(solver)
    assert states[-1].done
    together, calls = batch(states), 0
    x_in, t_in = together.query()
    assert (x_in.shape, t_in.shape) == ((8, *SAMPLE), (8,))
    first = together.advance(network(x_in, t_in))
    alone = [s if s.done else s.advance(network(*s.query())) for s in states]
    assert first == Batch(tuple(alone))
    while not together.done:
        together, calls = together.advance(network(*together.query())), calls + 1
    assert calls == max(state.plan.nfe - state.nfe for state in states)
    for state, end in zip(states, together.states, strict=True):
        assert torch.equal(end.x, finish(state))


def test_two_processes_in_one_batch():
    plans = [fs.plan("dpmpp_2m", p, n, predicts="flow") for p, n in ((fs.Flow(), 3), (fs.VP(), 5))]
    states = [begin(plan, 1) for plan in plans]
    together = batch(states)
    while not together.done:
        together = together.advance(network(*together.query()))
    assert all(torch.equal(s.x, finish(a)) for s, a in zip(together.states, states, strict=True))


def test_requests_come_and_go():
    """A serving loop: a request joins whenever another is done."""
    plan = fs.plan("sa_solver", fs.VP(), 6, predicts="v")
    waiting = [begin(fs.plan("unipc_3", fs.VP(), n, predicts="v"), n) for n in (2, 5, 3, 4)]
    want = {6: finish(begin(plan, 9)), **{s.plan.nfe: finish(s) for s in waiting}}
    running, results = batch([ahead(begin(plan, 9), 2)]), {}
    while running.running:
        running = running.advance(network(*running.query()))
        results.update({state.plan.nfe: state.x for state in running.states if state.done})
        assert pickle.loads(pickle.dumps(running)) == running
        arrived = [waiting.pop()] if waiting else []
        running = batch([*running.running, *arrived])
    assert results.keys() == want.keys()
    assert all(torch.equal(results[nfe], end) for nfe, end in want.items())


def test_a_batch_is_a_value():
    together = batch(six("dpmpp_2m"))
    copies = [{j: v.clone() for j, v in s.states.items()} for s in together.states]
    together.advance(network(*together.query()))
    for state, copy in zip(together.states, copies, strict=True):
        assert all(torch.equal(state.states[j], v) for j, v in copy.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        together.states = ()


def test_a_step_of_a_batch_reads_nothing_back():
    """No value leaves the device: not with guidance scales, nor with levels per token."""
    states = six("unipc_3")[:-1]
    label = {"label": torch.ones(8)}
    model = fs.Guided(VP, (1.0, *range(2, 9)), {"label": 0.5}, interval=(0.1, 9.0))
    tokens = stacked([fs.plan("unipc_3", fs.VP(), n, predicts="v") for n in (2, 4)])
    together, frames = batch(states), batch([begin(tokens, 1, 2, (2, 3))])
    with Operations() as operations:
        out = model.output(*together.query(), together.level, label)
        together.advance(out)
        x_in, t_in = frames.query()
        frames.advance(torch.tanh(x_in - t_in[:, :, None]))
    assert operations.names["aten::cat"] > 2
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"} & set(
        operations.names
    )


def test_the_level_of_every_sample():
    together = batch(six("ddim"))
    level, (_, t_in) = together.level, together.query()
    assert level.t.shape == level.sigma.shape == (8,)
    np.testing.assert_allclose(level.t, t_in.numpy(), rtol=1e-6)
    np.testing.assert_allclose(level.sigma, fs.VP().sigma(level.t), rtol=1e-12)


def test_stacked_plans_in_a_batch():
    plans = [fs.plan("dpmpp_2m", fs.VP(), n, predicts="v") for n in (3, 4, 5)]

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.8 * x - 0.3 * t[:, :, None])

    states = [begin(stacked(p), 1, n, (3, 4)) for p, n in ((plans, 1), (plans[::-1], 2))]
    alone = [state.advance(net(*state.query())) for state in states]
    together = batch(states)
    assert together.query()[1].shape == (3, 3)
    assert together.level.t.shape == (3, 3, 1)
    assert together.advance(net(*together.query())) == Batch(tuple(alone))


# -- one call of a model ---------------------------------------------------------------------------

VP = fs.Denoiser(network, fs.VP(), "v")


def guided(scale: float | Sequence[float], **options: object) -> fs.Guided:
    return fs.Guided(VP, scale, {"label": 0.5}, **options)


def run(model: fs.Model, state: State, **cond: torch.Tensor) -> State:
    with torch.no_grad():
        return state.advance(model.output(*state.query(), state.plan.asked(state.index), cond))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"interval": (0.3, 3.0)}, {"rescale": 0.7}])
def test_requests_with_different_guidance_share_a_call(options, dtype):
    def half(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return network(x, t, label).to(dtype)

    base = fs.Denoiser(half, fs.VP(), "v")
    models = [
        fs.Guided(base, 7.3, {"label": 0.5}, **options),
        base,
        fs.Guided(base, 2.1, {"label": 0.5}, **options),
        fs.Guided(base, (1.0, -0.7, 4.0), {"label": 0.5}, **options),
    ]
    mixed = (("ddim", 4), ("dpmpp_2m", 6), ("unipc_3", 5), ("sa_solver", 3))
    plans = [fs.plan(solver, fs.VP(), nfe, predicts="v") for solver, nfe in mixed]
    states = [begin(p, i, n) for i, (p, n) in enumerate(zip(plans, (1, 2, 1, 3), strict=True))]
    labels = [torch.arange(1.0 + len(s.x))[1:] for s in states]
    together, alone = batch(states), states
    while not together.done:
        together = together.step(models, [{"label": v} for v in labels])
        alone = [
            s if s.done else run(m, s, label=v)
            for m, s, v in zip(models, alone, labels, strict=True)
        ]
        assert together == Batch(tuple(alone))


def test_the_network_is_asked_twice_only_where_guidance_acts():
    sizes = []

    def net(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[0])
        return network(x, t, label)

    base = fs.Denoiser(net, fs.VP(), "v")
    scales = (1.0, 3.0, 1.0, 2.0)
    model = fs.Guided(base, torch.tensor(scales), {"label": 0.5}, (0.0, 1e3))
    assert model.scale == scales
    assert model.conditions == 2
    assert fs.Guided(base, [1.0, 1.0], {"label": 0.5}).conditions == 1
    x, label = torch.randn(4, *SAMPLE), torch.arange(4.0)
    out = model(x, [0.1, 0.2, 0.3, 0.4], label=label)
    assert sizes == [6]
    for i, scale in enumerate(scales):
        alone = fs.Guided(base, scale, {"label": 0.5})(
            x[i : i + 1], 0.1 * (i + 1), label=label[i : i + 1]
        )
        torch.testing.assert_close(out[i : i + 1], alone)


def test_guidance_around_guidance():
    """Two conditions with scales and intervals of their own, samples at different levels."""

    def net(
        x: torch.Tensor, t: torch.Tensor, label: torch.Tensor, style: torch.Tensor
    ) -> torch.Tensor:
        return network(x, t, label * style)

    inner = fs.Guided(fs.Denoiser(net, fs.VP(), "v"), 2.0, {"style": 0.1}, interval=(0.5, 9.0))
    model = fs.Guided(inner, 3.0, {"label": 0.5}, interval=(0.0, 2.0))
    plans = [fs.plan("dpmpp_2m", fs.VP(), nfe, predicts="v") for nfe in (7, 4, 5)]
    states = [begin(plan, i) for i, plan in enumerate(plans)]
    cond = {"label": torch.ones(1), "style": torch.full((1,), 0.3)}
    together, alone = batch(states), states
    while not together.done:
        together = together.step(model, [cond] * 3)
        alone = [s if s.done else run(model, s, **cond) for s in alone]
        assert together == Batch(tuple(alone))


def test_conditions_of_every_kind_are_joined():
    seen = {}

    def net(x: torch.Tensor, t: torch.Tensor, **cond: object) -> torch.Tensor:
        seen.update(cond)
        return x

    model, table = fs.Denoiser(net, fs.VP(), "v"), torch.ones(5, 5)
    plan = fs.plan("ddim", model, 2)
    states = [begin(plan, 1, 2), ahead(begin(plan, 1), 2), begin(plan, 3)]
    conds = [
        {
            "text": torch.full((n, 4), float(i)),
            "extra": {"names": [str(i)] * n, "flag": True},
            "table": table.clone(),
            "mode": "fast",
        }
        for i, n in enumerate((2, 1, 1))
    ]
    batch(states).step(model, conds)
    assert seen["text"][:, 0].tolist() == [0, 0, 2]  # the state that is done is not asked about
    assert seen["extra"] == {"names": ["0", "0", "2"], "flag": True}
    assert torch.equal(seen["table"], table)
    assert seen["mode"] == "fast"


def ragged(*conds: dict[str, object], model: object = VP) -> None:
    plan = fs.plan("ddim", fs.VP(), 2, predicts="v")
    batch([begin(plan, i) for i in range(len(conds))]).step(model, conds)


def other(
    sample: tuple[int, ...] = SAMPLE, dtype: torch.dtype = torch.float32, **kind: bool
) -> State:
    process = fs.DiscreteVP.linear() if kind else fs.VP()
    plan = fs.plan("ddim", process, 3, predicts="v")
    return plan.start(torch.zeros(1, *sample, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: batch([other(), other((3, 2))]), r"samples of shape \(2, 3\) and \(3, 2\)"),
        (lambda: batch([other(), other(dtype=torch.float64)]), "dtype torch.float32 and"),
        (lambda: batch([other(), other(integers=True)]), "integer_times False and True"),
        (lambda: batch([other(), 3]), "states holds int"),
        (lambda: batch([]).query(), "nothing left to ask"),
        (lambda: batch([other()]).advance(torch.zeros(2, *SAMPLE)), "network returned shape"),
        (lambda: batch([other()]).advance([0]), "network returned list"),
        (lambda: ragged({"a": 1}, {"b": 1}), "have different entries"),
        (lambda: ragged({"a": 1}, {"a": 2}), r"conds\['a'\] differs"),
        (
            lambda: ragged({"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)}),
            "different shapes per sample",
        ),
        (lambda: ragged({}, {}, model=[VP]), "model has 1 entries for 2 states"),
        (
            lambda: ragged({}, {}, model=[VP, fs.Denoiser(network, fs.VP(), "v")]),
            "different networks",
        ),
        (
            lambda: ragged({}, {}, model=[guided(2.0), guided(2.0, rescale=0.5)]),
            "only the scale may differ",
        ),
        (
            lambda: ragged({}, {}, model=[guided(2.0), guided([2.0, 3.0])]),
            "scale has 2 entries for 1 samples",
        ),
        (
            lambda: guided([2.0, 3.0])(torch.zeros(3, 2), 0.5, label=torch.zeros(3)),
            "scale has 2 entries for 3 samples",
        ),
        (
            lambda: ragged({}, model=fs.Denoiser(network, fs.EDM(), "v")),
            "the plan was made for another model",
        ),
        (lambda: guided([2.0, float("nan")]), "one per sample"),
        (lambda: guided([]), "one per sample"),
        (lambda: guided([[2.0]]), "one per sample"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ValueError, match=words):
        make()
