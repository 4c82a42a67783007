"""Plans: checks when built, printing, files, and the state that walks them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fewstep as fs
from fewstep._files import plan_arrays
from problems import Mixture, Normal, network_for, normals, run

SOLVERS = list(fs.solvers)


def plan_of(solver: str, nfe: int = 6) -> fs.Plan:
    return fs.plan(solver, fs.CosineVP(), nfe, predicts="v")


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_reproduce_constant_data_and_noise(solver):
    """Recomputed here: sum a alpha + sum b = alpha and sum a sigma = sigma, row by row."""
    for process in (fs.VP(), fs.EDM(), fs.Flow(), fs.DiscreteVP.squared_cosine()):
        for grid in ("lambda", "uniform", "karras"):
            plan = fs.plan(solver, process, 9, grid=grid)
            for i, row in enumerate(plan.rows):
                if row.exact:
                    size = sum(abs(c) for c in [*row.a.values(), *row.b.values()])
                    size *= max(1.0, process.sigma(plan.times[0]))
                    assert max(defects(plan, i)) < 1e-12 * size
    # The others (Runge-Kutta in lambda, Adams in the angle, EDICT) do so as steps shrink.
    if fs.solvers[solver].stochastic:
        return  # their variance does: tests/test_weak.py
    coarse, fine = (fs.plan(solver, fs.EDM(), n, grid="lambda", final="min") for n in (40, 160))
    worst = [max(max(defects(p, i)) for i, r in enumerate(p.rows)) for p in (coarse, fine)]
    assert worst[1] < max(0.5 * worst[0], 1e-10)


def defects(plan, i):
    """|sum a alpha + sum b - alpha|, and |sum a sigma - sigma| relative to sigma + alpha."""
    row, end = plan.rows[i], plan.levels[i + 1]
    data = sum(c * plan.levels[j].alpha for j, c in row.a.items()) + sum(row.b.values())
    if plan.draws:  # with constant data: that of data without spread
        before = all(r.exact for r in plan.rows[:i])  # or another noise comes in already
        noise = Normal(0.0, 0.0).laws(plan)[i + 1, 1] if before else end.sigma
    else:
        noise = sum(c * plan.levels[j].sigma for j, c in row.a.items())
    return abs(data - end.alpha), abs(noise - end.sigma) / (end.sigma + end.alpha)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_is_the_definition(solver):
    mixture = Mixture()
    x = mixture.start(7)
    for predicts in fs.predictions:
        denoiser = network_for(fs.CosineVP(), predicts, mixture.denoise)
        plan = fs.plan(solver, denoiser, 6)
        state = plan.start(torch.from_numpy(x), noise=torch.from_numpy(normals(plan, x.shape)))
        while not state.done:
            x_in, t_in = state.query()
            state = state.advance(denoiser.network(x_in, t_in))
        np.testing.assert_allclose(state.x.numpy(), run(plan, mixture.denoise, x), atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_save_and_load(solver, tmp_path):
    plan = plan_of(solver)
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    back = fs.Plan.load(path)
    assert back == plan
    assert str(back) == str(plan)
    assert back.about == plan.about
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_array_coefficients(tmp_path):
    """Coefficients may be arrays that broadcast against a sample: here two channels of (2, 3)."""
    plan = plan_of("ddim", 2)
    first = plan.rows[0]
    a, b = first.a[0] * np.ones((2, 1)), first.b[0] * np.ones((2, 1))
    changed = dataclasses.replace(plan, rows=(fs.Row({0: a}, {0: b}, 1), plan.rows[1]))
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def final(plan: fs.Plan) -> torch.Tensor:
        state = plan.start(x)
        while not state.done:
            state = state.advance(torch.sin(state.query()[0]))
        return state.x

    torch.testing.assert_close(final(changed), final(plan))
    changed.save(tmp_path / "p")
    assert fs.Plan.load(tmp_path / "p") == changed
    assert changed != plan
    assert "[2, 1]" in str(changed)
    # one channel that breaks consistency is found
    a = a * np.array([[1.0], [1.01]])
    with pytest.raises(ValueError, match="constant data"):
        dataclasses.replace(plan, rows=(fs.Row({0: a}, {0: b}, 1), plan.rows[1]))


def test_printed_table():
    text = str(fs.plan("dpmpp_2m", fs.VP(), 4))
    for word in ("sigma", "lambda", "h", "order", "NFE", "dpmpp_2m", "VP(", "NFE 4", "X0", "D0"):
        assert word in text
    orders = [line.split()[5] for line in text.splitlines()[3:7]]
    assert orders == ["1", "2", "2", "1"]
    assert "~" in str(plan_of("v_ab2"))
    assert repr(fs.plan("ddim", fs.EDM(), 3)) == "<Plan ddim: 3 NFE, t = 80 to 0>"


def broken(**changes) -> None:
    dataclasses.replace(plan_of("dpmpp_2m", 3), **changes)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (fs.Row({0: 0.5}, {0: 0.5}, 1), "row 1 does not reproduce constant data"),
        (fs.Row({2: 1.0}, {0: 0.5}, 1), "row 1 uses a state that does not exist yet"),
        (fs.Row({0: float("nan")}, {0: 0.5}, 1), "row 1 has a coefficient that is not finite"),
        (fs.Row({0: 1.0}, {}, 1), "row 1 copies a state"),
        (fs.Row({}, {}, 1, exact=False), "row 1 has no terms"),
    ],
)
def test_a_bad_row_is_refused_with_the_table(row, words):
    plan = plan_of("dpmpp_2m", 3)
    with pytest.raises(ValueError, match=words) as error:
        broken(rows=(plan.rows[0], row, plan.rows[2]))
    assert "\n>   1" in str(error.value)


def test_bad_shapes_of_a_plan():
    plan = plan_of("ddim", 3)
    with pytest.raises(ValueError, match="levels"):
        broken(levels=plan.levels[:-1])
    with pytest.raises(ValueError, match="row 0 uses a data prediction of a state that is not"):
        broken(calls=(None, *plan.calls[1:]))
    with pytest.raises(ValueError, match="not evaluated"):
        broken(
            calls=(plan.calls[0], None, *plan.calls[2:]),
            rows=(plan.rows[0], fs.Row(dict(plan.rows[1].a), {1: 1.0}, 1, False), plan.rows[2]),
        )


def test_states_that_are_not_evaluated_cost_nothing():
    """A plan may have states without a call (a corrector's): rows run on to the next call."""
    plan = plan_of("ddim", 2)
    start, middle, end = plan.levels
    between = fs.CosineVP().level(0.5 * (start.t + middle.t))
    first = fs.plan("ddim", fs.CosineVP(), grid=[start.t, between.t, middle.t], predicts="v")
    # second row written with the first network output alone: DDIM again
    longer = fs.Plan(
        (start, between, middle, end),
        (
            first.rows[0],
            fs.Row(dict(plan.rows[0].a), dict(plan.rows[0].b), 1),
            fs.Row({2: plan.rows[1].a.get(1, 0.0)}, {2: plan.rows[1].b[1]}, 1),
        ),
        (plan.calls[0], None, plan.calls[1], None),
    )
    assert longer.nfe == 2
    x = torch.randn(3, 5, dtype=torch.float64)
    results = []
    for p in (plan, longer):
        state, calls = p.start(x), 0
        while not state.done:
            state, calls = state.advance(torch.tanh(state.query()[0])), calls + 1
        results.append(state.x)
        assert calls == p.nfe == state.nfe
    torch.testing.assert_close(*results)


def test_states_are_values():
    plan = plan_of("dpmpp_3m", 5)
    state = plan.start(torch.randn(2, 3, 4))
    kept = []
    while not state.done:
        kept.append((state, {k: v.clone() for k, v in state.states.items()}))
        state = state.advance(torch.cos(state.query()[0]))
    for old, copy in kept:
        assert old.states.keys() == copy.keys()
        assert all(torch.equal(old.states[k], copy[k]) for k in copy)
    again = kept[2][0]
    while not again.done:
        again = again.advance(torch.cos(again.query()[0]))
    assert torch.equal(again.x, state.x)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.index = 0


def test_nothing_is_kept_longer_than_needed():
    """Data-form rows need the newest state and `order` outputs, whatever the number of steps."""
    plan = fs.plan("dpmpp_3m", fs.VP(), 20, grid="lambda")
    state = plan.start(torch.randn(2, 3))
    while not state.done:
        assert len(state.states) == 1
        assert len(state.outputs) <= 2
        state = state.advance(torch.cos(state.query()[0]))
    assert state.outputs == {}


def test_queries():
    plan = fs.plan("ddim", fs.DiscreteVP.linear(), 4, grid="trailing")
    x_in, t_in = plan.start(torch.randn(3, 2)).query()
    assert t_in.dtype == torch.int64
    assert t_in.tolist() == [999] * 3
    state = fs.plan("ddim", fs.EDM(), 4, predicts="edm").start(torch.ones(2, 2))
    x_in, t_in = state.query()
    assert x_in[0, 0].item() == pytest.approx(1 / np.hypot(80, 0.5))
    assert (t_in.dtype, t_in.shape) == (torch.float32, (2,))
    assert state.nfe == 0
    assert len(state.plan.evaluations) == 4
    torch.testing.assert_close(
        state.data(torch.ones(2, 2)),
        torch.full((2, 2), state.plan.calls[0].p + state.plan.calls[0].q),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_state_is_float32_or_better(dtype):
    state = plan_of("dpmpp_2m").start(torch.randn(2, 3).to(dtype))
    want = torch.float64 if dtype == torch.float64 else torch.float32
    while not state.done:
        assert state.x.dtype == want
        assert state.query()[1].dtype == want
        state = state.advance(state.query()[0].to(dtype))
    assert state.x.dtype == want


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor([[float("nan"), 1.0]]), "x contains NaN"),
        (torch.tensor([[float("inf"), 1.0]]), "NaN or inf"),
        (torch.zeros(2, 2, dtype=torch.int64), "dtype torch.int64"),
        (torch.tensor(1.0), "leading batch axis"),
        (torch.zeros(0, 3), "leading batch axis"),
        ([1.0], "list"),
    ],
)
def test_bad_starts(x, words):
    with pytest.raises(ValueError, match=words):
        plan_of("ddim").start(x)


def test_bad_outputs():
    state = plan_of("ddim").start(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"network returned shape \(2, 3, 5\) for .* \(2, 3, 4\)"):
        state.advance(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="learned variance"):
        state.advance(torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match="network returned dict"):
        state.advance({"sample": torch.zeros(2, 3, 4)})
    while not state.done:
        state = state.advance(torch.zeros(2, 3, 4))
    for call in (state.query, lambda: state.advance(torch.zeros(2, 3, 4))):
        with pytest.raises(ValueError, match="the run is done"):
            call()


def test_bad_files(tmp_path):
    good = tmp_path / "good"
    plan_of("dpmpp_2m").save(good)
    with pytest.raises(FileNotFoundError, match="no such file"):
        fs.Plan.load(tmp_path / "absent")
    raw = good.read_bytes()
    for cut in (0, 5, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut").write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="truncated"):
            fs.Plan.load(tmp_path / "cut")
    (tmp_path / "text").write_text("not a plan at all, but long enough to be read as a header")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        fs.Plan.load(tmp_path / "text")
    save_file({"weight": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="of another kind"):
        fs.Plan.load(tmp_path / "foreign")
    meta = {"format": "fewstep.plan.2", "about": json.dumps({})}
    save_file({"levels": np.zeros((2, 4))}, tmp_path / "partial", metadata=meta)
    with pytest.raises(ValueError, match="lacks or garbles 'calls'"):
        fs.Plan.load(tmp_path / "partial")


def test_a_changed_number_in_a_file_is_found(tmp_path):
    plan = plan_of("dpmpp_2m")
    arrays = plan_arrays(plan)
    arrays["b.2.2"] = np.array(arrays["b.2.2"] * 1.001)
    meta = {"format": "fewstep.plan.2", "about": "{}"}
    save_file(arrays, tmp_path / "bent", metadata=meta)
    with pytest.raises(ValueError, match="constant data"):
        fs.Plan.load(tmp_path / "bent")
