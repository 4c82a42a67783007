"""Time shift: the variance of a state says what time the network is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._shifted import sample_mean
from problems import PROCESSES


class Recorder:
    """A network that records its inputs and answers 0.2 x."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, **cond):
        self.calls.append((x.clone(), t.clone()))
        return 0.2 * x


def state(variances, n=64, dtype=torch.float64):
    """States (batch, 2, n) of exactly these variances over their elements."""
    x = fs.start_noise((len(variances), 2, n), 0, dtype=torch.float64)
    x = x - x.mean((1, 2), keepdim=True)
    x = x / x.flatten(1).std(1)[:, None, None]
    return (x * torch.tensor(variances, dtype=torch.float64).sqrt()[:, None, None] + 0.3).to(dtype)


def ask(model, x, t):
    level = model.process.level(t)
    _, _, c_in, c_noise = model.prediction.scalars(level)
    kind = torch.int64 if model.rounds and model.prediction.time == "t" else x.dtype
    c_in, c_noise = (torch.as_tensor(np.broadcast_to(v, len(x)).copy()) for v in (c_in, c_noise))
    x_in = x * c_in.to(x.dtype).reshape(-1, 1, 1)
    return model.output(x_in, c_noise.to(kind), level, {})


@pytest.mark.parametrize("predicts", ["noise", "data", "v", "edm"])
@pytest.mark.parametrize("name", ["vp", "edm", "linear table", "flow", "custom, time reversed"])
def test_right_variance_is_the_nominal_time_and_wrong_variance_the_right_one(name, predicts):
    process, v = PROCESSES[name], 0.3
    span = abs(process.t_start - process.t_end)
    t = float(process.time(-0.3))
    t = float(np.round(t)) if process.integer_times else t
    window = float(np.ceil(0.2 * span)) if process.integer_times else 0.2 * span
    window = 1.0 if name == "edm" else window
    prediction = fs.predictions[predicts]
    for offset in (0.0, 0.25, -0.4, 0.5):
        told = t + offset * window
        told = float(np.round(told)) if process.integer_times else told
        level = process.level(told)
        network = Recorder()
        model = fs.TimeShifted(fs.Denoiser(network, process, predicts), window, data_var=v)
        ask(model, state([level.alpha**2 * v + level.sigma**2]), t)
        ((x_in, t_in),) = network.calls
        want = prediction.scalars(process.level(told))
        step = 1.0 if process.integer_times else window / 128
        assert abs(float(t_in[0]) - want[3]) <= abs(
            prediction.scalars(process.level(told + 1.01 * step))[3] - want[3]
        )
        if offset == 0:
            assert float(t_in[0]) == pytest.approx(prediction.scalars(process.level(t))[3], abs=0)
        if process.integer_times and predicts != "edm":
            assert t_in.dtype == torch.int64
            assert int(t_in[0]) == told
        # The input is scaled for the time that the network is told.
        scale = float(
            x_in.flatten().std() / state([level.alpha**2 * v + level.sigma**2]).flatten().std()
        )
        assert scale == pytest.approx(want[2], rel=0.02)


def test_a_window_is_never_left_and_a_cutoff_is_kept():
    process = fs.DiscreteVP.linear()
    network = Recorder()
    model = fs.TimeShifted(fs.Denoiser(network, process), window=30, cutoff=300)
    for t, variance, want in (
        (500, 100.0, 515),  # as noisy as the window allows
        (500, 1e-6, 485),
        (995, 100.0, 999),  # the table ends
        (301, 1e-6, 286),
        (300, 1e-6, 300),  # not noisier than the cutoff
        (100, 100.0, 100),
    ):
        ask(model, state([variance]), float(t))
        assert network.calls[-1][1].tolist() == [want]
    same = fs.TimeShifted(fs.Denoiser(network, process), window=0)
    ask(same, state([9.0]), 700.0)
    assert network.calls[-1][1].tolist() == [700]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_neighbours(dtype):
    process = fs.EDM()
    network = Recorder()
    model = fs.TimeShifted(fs.Denoiser(network, process, "edm"), 2.0, data_var=0.25)
    x = state([0.5, 4.0, 9.0, 3.3, 7.7], 33, dtype)
    times = np.array([2.0, 2.5, 3.0, 2.0, 1.5])
    whole = ask(model, x, times)
    told = network.calls[-1][1]
    assert len(set(told.tolist())) == 5
    for i in range(5):
        alone = ask(model, x[i : i + 1], float(times[i]))
        assert torch.equal(alone[0], whole[i])
        assert torch.equal(network.calls[-1][1], told[i : i + 1])


@pytest.mark.parametrize("solver", ["ddim", "flow_ab2", "unipc_2", "dpmpp_2m"])
def test_runs_inside_and_outside_of_guidance(solver):
    process = fs.DiscreteVP.scaled_linear()

    def network(x, t, label):
        assert t.dtype == torch.int64
        return (0.9 - 1e-4 * t)[:, None] * x + label[:, None] * 1e-2

    base = fs.Denoiser(network, process)
    cond = {"label": torch.ones(4)}
    inside = fs.Guided(fs.TimeShifted(base, 40, data_var=0.25), 2.0, {"label": 0.0})
    outside = fs.TimeShifted(fs.Guided(base, 2.0, {"label": 0.0}), 40, data_var=0.25)
    plain = fs.Guided(base, 2.0, {"label": 0.0})
    runs = [
        fs.sample(model, (4, 50), solver=solver, nfe=6, cond=cond)
        for model in (inside, outside, plain)
    ]
    assert inside.conditions == outside.conditions == 2
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # Called as a model, with one time per sample
    x = fs.start_noise((4, 50), 1)
    times = torch.tensor([900, 700, 500, 300])
    assert torch.equal(inside(x, times, **cond), outside(x, times, **cond))


def test_it_repairs_a_state_of_the_wrong_noise_level():
    """A state with more noise than its time says: the exact network of a Gaussian, told the right
    time, finds the noise that is there; at the nominal time it does not."""
    process, v = fs.VP(), 0.05
    d = 20000  # the time is found from the sample's variance, to 1 / sqrt(d)
    data = fs.exact.Gaussian(np.zeros(d), [v] * d)
    t, true = 0.30, process.level(0.34)
    x0, noise = data.sample(3, 0), fs.start_noise((3, d), 1).double()
    x = true.alpha * x0 + true.sigma * noise
    model = data.denoiser(process, "noise")
    level = process.level(t)
    t_in = torch.full((3,), t, dtype=torch.float64)
    error = []
    for m in (model, fs.TimeShifted(model, 0.2, data_var=v)):
        e = m.output(x, t_in, level, {})
        exact = true.sigma / (true.alpha**2 * v + true.sigma**2) * x
        error.append(float((e - exact).square().mean().sqrt()))
    assert error[1] < 0.3 * error[0]


def test_sample_mean():
    for n in (1, 2, 3, 7, 64, 1000, 1023):
        v = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        torch.testing.assert_close(sample_mean(v), v.mean(1), rtol=1e-12, atol=1e-15)


def test_refusals():
    model = fs.Denoiser(Recorder(), fs.VP())
    for bad, message in (
        (lambda: fs.TimeShifted(Recorder(), 1.0), "model"),
        (lambda: fs.TimeShifted(model, -1.0), "window"),
        (lambda: fs.TimeShifted(model, float("nan")), "window"),
        (lambda: fs.TimeShifted(model, 0.1, data_var=-1.0), "data_var"),
        (lambda: fs.TimeShifted(model, 0.1, cutoff=0.0), "cutoff"),
        (lambda: fs.sample(fs.TimeShifted(model, 0.1), (3, 1), nfe=2), "1 element"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
