"""Denoisers and guidance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs
from problems import PROCESSES, Mixture, network_for

MIXTURE = Mixture()


@pytest.mark.parametrize("predicts", fs.predictions)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "cosine", "ve"])
def test_calling_a_denoiser_gives_the_data_prediction(name, predicts):
    process = PROCESSES[name]
    denoiser = network_for(process, predicts, MIXTURE.denoise)
    for where in (0.1, 0.5, 0.9):
        t = process.t_start + where * (process.t_end - process.t_start)
        level = process.level(t)
        x = level.alpha * 0.3 + level.sigma * MIXTURE.start(4)
        got = denoiser(torch.from_numpy(x), t)
        want = MIXTURE.denoise(x, level.alpha, level.sigma)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-8)


def test_one_time_per_sample():
    denoiser = fs.Denoiser(lambda x, t: x * t[:, None, None], fs.Flow(), "flow")
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    times = [0.2, 0.5, 0.9]
    together = denoiser(x, torch.tensor(times, dtype=torch.float64))
    for i, t in enumerate(times):
        torch.testing.assert_close(together[i : i + 1], denoiser(x[i : i + 1], t))
    with pytest.raises(ValueError, match=r"t has shape \(2,\); give one time, or one per sample"):
        denoiser(x, [0.1, 0.2])


@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 5)])
def test_any_shape(shape):
    x = fs.sample(fs.Denoiser(lambda x, t: 0.1 * x, fs.VP(), "data"), shape, nfe=4, progress=False)
    assert x.shape == shape


def test_the_network_gets_the_dtype_it_wants_and_the_state_does_not():
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype))
        return x

    denoiser = fs.Denoiser(network, fs.VP(), "data", dtype=torch.bfloat16)
    out = fs.sample(denoiser, (2, 3), nfe=3)
    assert out.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.float32)}  # time is never below float32


def test_integer_times_reach_the_network_as_integers_and_set_the_level():
    process = fs.DiscreteVP.scaled_linear()
    seen = []

    def network(x, t):
        seen.append(t.clone())
        return x

    denoiser = fs.Denoiser(network, process)
    plan = fs.plan("dpmpp_2m", denoiser, 7, grid="karras")
    fs.sample(denoiser, (2, 3), solver=plan)
    for told, level in zip(seen, plan.levels, strict=False):
        assert told.dtype == torch.int64
        table = math.exp(process.log_alphas[int(told[0])])
        assert level.alpha == pytest.approx(table, rel=1e-14)
    denoiser(torch.zeros(2, 3), 499.6)
    assert seen[-1].tolist() == [500, 500]


# -- guidance --------------------------------------------------------------------------------------


class Counting:
    """out = x * label, and a record of every call."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, label, **other):
        self.batches.append(x.shape[0])
        self.other = other
        return x * label.reshape(-1, *(1 for _ in x.shape[1:])).to(x)


LABEL = torch.tensor([1.0, 2.0, 3.0])


def guided(scale, network=None, **options):
    network = network or Counting()
    denoiser = fs.Denoiser(network, fs.VP(), "noise")
    return fs.Guided(denoiser, scale, {"label": 0.5}, **options), network


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.0])
def test_guidance_is_the_formula_in_one_call(scale):
    model, network = guided(scale)
    x = torch.randn(3, 2, dtype=torch.float64)
    got = model(x, 0.5, label=LABEL)
    plain = model.model
    cond, uncond = plain(x, 0.5, label=LABEL), plain(x, 0.5, label=torch.full((3,), 0.5))
    torch.testing.assert_close(got, uncond + scale * (cond - uncond))
    assert network.batches[0] == (3 if scale == 1 else 6)
    assert model.conditions == (1 if scale == 1 else 2)


def test_guidance_interval():
    model, network = guided(3.0, interval=(0.5, 2.0))
    run = fs.sample(model, (3, 2), solver="ddim", nfe=12, cond={"label": LABEL})
    assert len(network.batches) == 12
    rho = [level.rho for level in fs.plan("ddim", fs.VP(), 12).levels[:-1]]
    assert network.batches == [6 if 0.5 <= r <= 2.0 else 3 for r in rho]
    assert 6 in network.batches
    assert 3 in network.batches
    assert torch.isfinite(run).all()
    # per-sample times: some inside, some outside
    x, t = torch.randn(3, 2, dtype=torch.float64), [0.01, 0.4, 0.99]
    together = model(x, t, label=LABEL)
    for i in range(3):
        alone = model(x[i : i + 1], t[i], label=LABEL[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_guidance_rescale():
    model, _ = guided(5.0, rescale=1.0)
    half, _ = guided(5.0, rescale=0.5)
    none, _ = guided(5.0)
    x_in, t_in = torch.randn(3, 400), torch.zeros(3)
    level, cond = fs.VP().level(0.5), {"label": LABEL}
    full, mid, raw = (m.output(x_in, t_in, level, cond) for m in (model, half, none))
    alone = model.model.output(x_in, t_in, level, cond)
    torch.testing.assert_close(full.std(1), alone.std(1))
    torch.testing.assert_close(mid, 0.5 * (full + raw))


def test_conditions_of_every_kind_are_doubled():
    seen = {}

    def network(x, t, **cond):
        seen.update(cond)
        return x

    model = fs.Guided(
        fs.Denoiser(network, fs.VP()), 2.0, {"text": torch.zeros(1, 7, 4), "extra": {"size": 0}}
    )
    cond = {
        "text": torch.ones(2, 7, 4),  # one unconditional embedding for all
        "extra": {"size": torch.ones(2, dtype=torch.int64), "flag": True},  # nested
        "image": torch.arange(2.0),  # per sample, not in uncond: repeated
        "names": ["a", "b"],
        "table": torch.ones(5, 5),  # no batch axis: passed on
        "mode": "fast",
    }
    fs.sample(model, (2, 3), nfe=1, cond=cond)
    assert seen["text"].shape == (4, 7, 4)
    assert seen["text"][:2].eq(1).all()
    assert seen["text"][2:].eq(0).all()
    assert seen["extra"]["size"].tolist() == [1, 1, 0, 0]
    assert seen["extra"]["flag"] is True
    assert seen["image"].tolist() == [0, 1, 0, 1]
    assert seen["names"] == ["a", "b", "a", "b"]
    assert seen["table"].shape == (5, 5)
    assert seen["mode"] == "fast"


def test_guided_runs_count_one_evaluation_per_step():
    model, network = guided(2.0)
    fs.sample(model, (3, 2), nfe=6, cond={"label": LABEL})
    assert network.batches == [6] * 6
    assert fs.plan("ddim", model, 6).about["conditions per evaluation"] == "2"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: guided(math.nan), "scale = nan"),
        (lambda: guided(2.0, interval=(3.0, 1.0)), "interval"),
        (lambda: guided(2.0, rescale=1.5), "rescale = 1.5"),
        (lambda: fs.Guided(guided(2.0)[0], 2.0, {}), "uncond is empty"),
        (lambda: guided(2.0)[0](torch.zeros(1, 2), 0.5), "uncond names 'label'"),
        (
            lambda: fs.Guided(fs.Denoiser(lambda x, t, a: x, fs.VP()), 2.0, {"a": 0})(
                torch.zeros(2, 3), 0.5, a=torch.ones(5)
            ),
            "cannot be doubled",
        ),
        (lambda: fs.Denoiser("unet", fs.VP()), "network = 'unet' is not callable"),
        (lambda: fs.Denoiser(lambda x, t: x, "vp"), "process = 'vp' is not a process"),
        (lambda: fs.Denoiser(lambda x, t: x, fs.VP(), 3), "predicts = 3"),
        (
            lambda: guided(2.0, lambda x, t, label: x[:2])[0](torch.zeros(3, 2), 0.5, label=LABEL),
            "network returned shape",
        ),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("predicts", fs.predictions)
def test_exact_models_stand_in_for_networks_of_any_convention(predicts):
    exact = fs.exact.Gaussian(torch.zeros(2, 3), 0.25)
    for process in PROCESSES.values():
        t = process.t_start + 0.6 * (process.t_end - process.t_start)
        t = float(np.round(t)) if process.integer_times else t
        level = process.level(t)
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        want = exact.denoise(x, level.alpha, level.sigma)
        for time in ("t", "rho", "lambda", "edm", 1000.0, None):
            got = exact.denoiser(process, predicts, time)(x, t)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="time: 'sigma'"):
        exact.denoiser(fs.VP(), predicts, "sigma")


def test_an_integer_network_told_another_clock_is_evaluated_at_integer_times():
    process = fs.DiscreteVP.linear()
    denoiser = fs.Denoiser(lambda x, t: x, process, "edm")
    plan = fs.plan("ddim", denoiser, 3)
    state = plan.start(torch.zeros(1, 2))
    assert plan.times[1] == round(plan.times[1])
    assert state.query()[1].dtype == torch.float32
    assert state.query()[1].item() == pytest.approx(-0.25 * plan.levels[0].lam)
