from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate import _diagnose
from fewstep._calibrate._diagnose import Clock, Diagnosis, Hypothesis, diagnose
from fewstep._prediction import network_time


def mixture(shape: tuple[int, ...] = (3, 5), seed: int = 0) -> fs.exact.Mixture:
    means = torch.randn((6, *shape), generator=torch.Generator().manual_seed(seed))
    return fs.exact.Mixture(torch.ones(6) / 6, means * 0.8, [0.01] * 6)


MODEL = mixture()
DATA = MODEL.sample(32, seed=5)


def default_hypotheses() -> list[Hypothesis]:
    std = float(DATA.std(correction=0))
    predictions = _diagnose._predictions(None, std)
    return _diagnose._hypotheses(_diagnose._processes(None), predictions, None)


HYPOTHESES = {str(h): h for h in default_hypotheses()}


def raw(h: Hypothesis | str, model=MODEL):
    """The network that a hypothesis describes: the time it is told is inverted on a table."""
    h = HYPOTHESES[h] if isinstance(h, str) else h
    process, prediction = h.process, h.prediction
    if process.integer_times:
        times = np.arange(process.t_start + 1)
    else:
        ends = process.lam(process.t_start), process.lam(process.t_end)
        lam = np.linspace(max(float(ends[0]), -8.0), float(ends[1]), 4001)
        times = np.asarray(process.time(lam))
    told = np.asarray(network_time(prediction.time, process.level(times)), dtype=np.float64)
    order = np.argsort(told)

    def network(x_in, t_in):
        t = np.interp(t_in.double().numpy(), told[order], times[order])
        level = process.level(t)

        def each(value):
            value = torch.as_tensor(np.broadcast_to(value, t.shape).copy()).to(x_in)
            return value.reshape(-1, *(1 for _ in x_in.shape[1:]))

        x = x_in / each(prediction.scalars(level)[2])
        D, eps = model.predict(x, level.alpha, level.sigma)
        u, w = prediction.from_data(level)
        return each(u * level.alpha + w) * D + each(u * level.sigma) * eps

    return network


def gap(found: Diagnosis, model=MODEL, data=DATA) -> float:
    """Largest squared distance of the found denoiser from the exact one, over the exact error."""
    denoiser, worst = found.denoiser(), 0.0
    eps = torch.randn(data.shape, generator=torch.Generator().manual_seed(3)).double()
    for lam in np.linspace(found.levels[0], found.levels[-1], 5):
        t = float(denoiser.process.time(lam))
        level = denoiser.process.level(round(t) if denoiser.rounds else t)
        x = (level.alpha * data + level.sigma * eps).float()
        exact = model.denoise(x, level.alpha, level.sigma).double()
        error = (denoiser(x, level.t).double() - exact).square().sum()
        worst = max(worst, float(error / (exact - data).square().sum()))
    return worst


def named(found: Diagnosis) -> list[str]:
    return [str(h) for h in (found.best, *found.equivalent)]


def check_named(h: Hypothesis) -> None:
    found = diagnose(raw(h), DATA, rescale=False)
    assert found.fits, found
    assert str(h) in named(found), found
    assert gap(found) < 0.05, found
    # Where it is not certain, what fits alike is all but as good.
    assert found.certain or found.sentence.startswith("Cannot tell"), found
    for fit in found.table[1:]:
        if fit.hypothesis in found.equivalent:
            assert fit.ratio < 1.1, found


@pytest.mark.parametrize("name", list(HYPOTHESES)[11::131])
def test_names_the_right_one(name):
    check_named(HYPOTHESES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", HYPOTHESES)
def test_names_the_right_one_always(name):
    check_named(HYPOTHESES[name])


def test_result_is_a_denoiser_and_a_page():
    found = diagnose(raw("flow, predicts -flow, told 1 - t"), DATA)
    assert found.certain
    assert found.best.names == ("flow", "-flow", "1 - t")
    assert found.table[0].hypothesis is found.best
    assert found.table[0].ratio == 1
    assert found.score == found.table[0].score < 0.95
    assert len(found.table) == len(HYPOTHESES)
    ratios = [f.ratio for f in found.table if not f.failure]
    assert ratios == sorted(ratios)
    page = str(found)
    assert found.sentence in page
    assert len(page.splitlines()) < 25
    assert f"{found.evaluations} evaluations" in page
    samples = fs.sample(found.denoiser(), (64, 3, 5), nfe=30, seed=1)
    nearest = torch.cdist(samples.flatten(1).double(), MODEL.sample(2000, 9).flatten(1)).amin(1)
    assert nearest.median() < 3 * 0.1 * math.sqrt(15) / 2


def test_the_trained_network():
    network = fs.models.load("digits").network
    data = fs.exact.digits().sample(32, seed=5)
    labels = torch.full((32,), 10)
    found = diagnose(network, data, cond={"label": labels})
    assert found.certain, found
    # sigma_data is that of these data, 0.76; 0.75 in training
    assert found.best.names == ("EDM", "edm(0.76)", "log(rho) / 4"), found
    given = diagnose(
        network, data, cond={"label": labels}, predictions=["v", "noise", fs.edm(0.75)]
    )
    assert given.best.names == ("EDM", "edm", "log(rho) / 4")
    assert given.score == pytest.approx(found.score, rel=0.01)


def test_conditions_go_with_their_samples():
    model = fs.exact.digits()
    labels = torch.arange(20) % 10
    data = torch.cat([model.sample(1, seed=i, label=int(k)) for i, k in enumerate(labels)])
    network = model.denoiser(fs.VP(), "noise").network
    processes = [fs.VP(), fs.Flow()]

    def seen(x, t, *, given):
        return network(x, t, label=given["label"])

    right = diagnose(seen, data, cond={"given": {"label": labels}}, processes=processes)
    assert right.certain
    assert right.best.names[1:] == ("noise", "t")
    listed = diagnose(
        lambda x, t, k: network(x, t, label=k),
        data,
        cond={"k": labels.tolist()},
        processes=processes,
    )
    assert listed.score == right.score
    wrong = diagnose(seen, data, cond={"given": {"label": labels.flip(0)}}, processes=processes)
    assert wrong.score > 2 * right.score


def test_calls_are_counted_shared_and_few():
    asked = []
    right = raw("scaled-linear table, predicts v, told its integers")

    def network(x, t):
        asked.append((len(x), float(t[0]), t.dtype, round(float(x.sum()), 3)))
        return right(x, t)

    found = diagnose(network, DATA, rescale=False)
    assert (found.calls, found.evaluations) == (len(asked), sum(n for n, *_ in asked))
    assert len(set(asked)) == len(asked), "an evaluation was repeated"
    # Readings share evaluations, and most hypotheses are given up early.
    assert found.evaluations < 0.1 * len(HYPOTHESES) * 68 * 6
    split = diagnose(raw("flow, predicts flow, told t"), DATA, batch=3, rescale=False)
    whole = diagnose(raw("flow, predicts flow, told t"), DATA, rescale=False)
    assert split.score == pytest.approx(whole.score, rel=1e-5)
    assert split.evaluations == whole.evaluations
    assert split.calls > whole.calls


def test_seed_and_repetition():
    network = raw("VP, predicts noise, told t")
    options = {"processes": [fs.VP(), fs.Flow()], "rescale": False}
    one, two, other = (diagnose(network, DATA, seed=s, **options) for s in (0, 0, 1))
    assert one.score == two.score != other.score
    assert str(one) == str(two)
    assert one.best.names == other.best.names


@pytest.mark.parametrize("shape", [(), (2,), (4, 3), (2, 3, 4, 4)])
def test_shapes(shape):
    model = mixture(shape, seed=1)
    data = model.sample(24, seed=2)
    h = HYPOTHESES["flow, predicts flow, told 1000 t"]
    found = diagnose(raw(h, model), data, processes=[fs.Flow(), fs.VP(), fs.EDM()], rescale=False)
    assert found.fits, found
    assert gap(found, model, data) < 0.02
    assert found.best.names[1:] == ("flow", "1000 t"), found


def test_few_samples():
    for n in (2, 4):
        found = diagnose(raw("cosine VP, predicts v, told 1000 t"), DATA[:n])
        assert found.fits
        assert gap(found, data=DATA[:n]) < 0.05, found


class Net(torch.nn.Module):
    def __init__(self, seed: int, zero: bool):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = torch.nn.Linear(19, 64), torch.nn.Linear(64, 15)
        if zero:
            torch.nn.init.zeros_(self.last.weight)
            torch.nn.init.zeros_(self.last.bias)

    def forward(self, x, t):
        angle = t.float()[:, None] * torch.tensor([1.0, 0.01])
        h = torch.cat([x.flatten(1), angle.sin(), angle.cos()], 1)
        return self.last(torch.nn.functional.silu(self.first(h))).view(x.shape)


@pytest.mark.parametrize(
    "network",
    [Net(0, False), Net(1, False), Net(0, True), lambda x, t: x, lambda x, t: 0.1 - 0.5 * x],
    ids=["random", "random 2", "zero", "identity", "affine"],
)
def test_what_is_no_denoiser(network):
    found = diagnose(network, DATA, rescale=False)
    assert not found.certain, found
    assert found.score > 0.95
    assert "Wiener" in found.sentence or "no better than 0" in found.sentence
    if not found.fits:
        with pytest.raises(ValueError, match="no denoiser: Nothing fits"):
            found.denoiser()


def test_random_network_with_the_search_for_scalings():
    found = diagnose(Net(0, False), DATA, processes=[fs.VP(), fs.Flow()])
    assert not found.fits
    assert (found.hint, found.rescale) == ("", None)


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("linear table, predicts noise, told its integers", 0.5, 0.5),
        ("flow, predicts flow, told t", 127.5, 127.5),
    ],
    ids=["0..1", "0..255"],
)
def test_data_scaled_wrongly(name, a, b):
    """Data in [0, 1] or [0, 255] for a network of [-1, 1]."""
    means = torch.randint(0, 2, (6, 32), generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
    model = fs.exact.Mixture(torch.ones(6) / 6, means, [0.002] * 6)
    x = model.sample(32, seed=5).clip(-1, 1)
    network, processes = (
        raw(name, model),
        {"linear table": fs.DiscreteVP.linear(), "flow": fs.Flow()},
    )
    assert diagnose(network, x, processes=processes).hint == ""
    found = diagnose(network, a * x + b, processes=processes)
    assert found.rescale == pytest.approx((1 / a, -b / a)), found
    assert not found.certain
    assert "scaled" in found.hint
    assert name in found.hint
    assert found.hint in str(found)


def test_integers_only():
    """An embedding table: floats and integers out of range raise."""
    right = raw("scaled-linear table, predicts noise, told its integers")
    table = torch.nn.Embedding(1000, 1)

    def network(x, t):
        table(t)
        return right(x, t)

    found = diagnose(network, DATA)
    assert found.certain or found.sentence.startswith("Cannot tell")
    assert "scaled-linear table, predicts noise, told its integers" in named(found)
    assert found.best.names[2] == "its integers"
    failed = [f for f in found.table if f.failure]
    assert failed
    assert all("RuntimeError" in f.failure for f in failed)
    assert all(math.isnan(f.score) for f in failed)
    assert gap(found) < 0.02


def test_not_finite_and_raising_is_evidence_against():
    right = raw("flow, predicts flow, told t")

    def network(x, t):
        if not t.is_floating_point():
            raise KeyError("floats only")
        out = right(x, t)
        return out * float("nan") if float(t.max()) > 1 else out

    found = diagnose(network, DATA)
    assert found.certain
    assert found.best.names == ("flow", "flow", "t")
    reasons = {f.failure for f in found.table if f.failure}
    assert "the output is not finite" in reasons
    assert any("floats only" in r for r in reasons)


def test_never_an_answer():
    def network(x, t, label):
        raise AssertionError

    found = diagnose(network, DATA)
    assert not found.fits
    assert not found.certain
    assert isinstance(found.failure, TypeError)
    assert "label" in found.sentence
    with pytest.raises(ValueError, match="no answer") as caught:
        found.denoiser()
    assert caught.value.__cause__ is found.failure
    shapes = diagnose(lambda x, t: torch.cat([x, x], 1), DATA)
    assert "twice the channels" in shapes.sentence
    assert str(shapes)


def test_out_of_memory_is_raised():
    def network(x, t):
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        diagnose(network, DATA)


def test_what_cannot_be_told():
    # A shift says where to step, not what the network is told.
    found = diagnose(
        raw("flow, predicts flow, told t"),
        DATA,
        processes={"plain": fs.Flow(), "shifted": fs.Flow(shift=3.0)},
        times=["t"],
    )
    assert found.certain
    assert named(found) == [f"{p}, predicts flow, told t" for p in ("plain", "shifted")]
    assert found.same == found.equivalent
    # Any clock of the noise level, on inputs of the same scale.
    found = diagnose(raw("VP, predicts noise, told lambda"), DATA, rescale=False)
    assert {
        f"{p}, predicts noise, told lambda" for p in ("VP", "cosine VP", "trigonometric")
    } <= set(named(found))
    # edm(1) is -v.
    found = diagnose(raw("VP, predicts -v, told t"), DATA, rescale=False)
    assert {"VP, predicts -v, told t", "VP, predicts edm(1), told t"} <= set(named(found))
    # White data of unit variance: a flow is its mirror image, and the denoiser is the same.
    flow = {"processes": {"flow": fs.Flow()}, "rescale": False}
    white = fs.exact.Gaussian(torch.zeros(40), 1.0)
    h = HYPOTHESES["flow, predicts flow, told t"]
    found = diagnose(raw(h, white), white.sample(32, seed=1), **flow)
    assert {"flow, predicts flow, told t", "flow, predicts -flow, told 1 - t"} <= set(named(found))
    assert not found.certain
    assert "Gaussian and white" in found.sentence
    # At another variance it is told apart.
    other = fs.exact.Gaussian(torch.zeros(40), torch.logspace(-3, 0.6, 40))
    found = diagnose(raw(h, other), other.sample(32, seed=1), **flow)
    assert "flow, predicts -flow, told 1 - t" not in named(found)
    assert found.certain


def test_different_denoisers_that_fit_alike_are_said_to():
    """EDM's sigma_data hardly matters to the error of a network that was trained with another."""
    h = HYPOTHESES["EDM, predicts edm(0.5), told log(rho) / 4"]
    options = {"processes": {"EDM": fs.EDM()}, "times": ["edm"], "rescale": False, "count": 8}
    found = diagnose(raw(h), DATA, predictions={"a": fs.edm(0.5), "b": fs.edm(0.52)}, **options)
    assert found.fits
    assert not found.certain, found
    assert found.sentence.startswith("Cannot tell")
    assert {h.names[1] for h in (found.best, *found.equivalent)} == {"a", "b"}
    assert found.same == ()
    assert found.evaluations == 2 * 6 * 32, "samples are doubled twice before that is said"


def test_own_candidates():
    def half(level):
        return 0.5 * level.t

    process = fs.Custom(lambda t: 1 - t**2, lambda t: t, t_start=0.99, t_end=0.01, t_clean=0.0)
    h = Hypothesis(process, dataclasses.replace(fs.predictions["flow"], time=half), ("", "", ""))
    found = diagnose(
        raw(h),
        DATA,
        processes={"bent": process, "flow": fs.Flow()},
        predictions=["flow", "v", "-flow"],
        times={"half": half, "t": "t", "late": Clock(1.0, -0.5)},
    )
    assert found.certain
    assert found.best.names == ("bent", "flow", "half")
    listed = diagnose(raw(h), DATA, processes=[process], predictions=["flow", "v"], times=[half, 2])
    assert [listed.best.names[1], listed.best.names[2]] == ["flow", "half"]
    assert {f.hypothesis.names[2] for f in listed.table} == {"half", "2 t"}
    coupled = diagnose(
        raw("flow, predicts flow, told t"), DATA, processes=[fs.Flow(independent=False)]
    )
    assert coupled.best.names[1] == "flow"
    assert not any("score" in f.hypothesis.names[1] for f in coupled.table)


def test_dtype():
    seen = set()
    right = raw("flow, predicts flow, told t")

    def network(x, t):
        seen.add((x.dtype, t.dtype))
        return right(x.float(), t.float()).to(x.dtype)

    options = {"processes": {"flow": fs.Flow()}, "times": ["t"], "rescale": False}
    found = diagnose(network, DATA, dtype=torch.float64, **options)
    assert seen == {(torch.float64, torch.float64)}
    assert found.denoiser().dtype == torch.float64
    seen.clear()
    assert diagnose(network, DATA, dtype=torch.bfloat16, **options).certain
    assert seen == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": 3}, "network = 3 is not callable"),
        ({"network": MODEL.denoiser(fs.VP())}, "give the raw network"),
        ({"data": [1.0, 2.0]}, "data is list"),
        ({"data": DATA[:1]}, "need n >= 2 finite samples"),
        ({"data": DATA * float("nan")}, "need n >= 2 finite samples"),
        ({"data": torch.ones(4, 3)}, "data does not vary"),
        ({"cond": [1]}, r"cond = \[1\]"),
        ({"levels": 1}, "levels = 1"),
        ({"count": 7}, "count = 7"),
        ({"batch": 0}, "batch = 0"),
        ({"dtype": torch.int64}, "floating-point"),
        ({"processes": []}, "processes is empty"),
        ({"processes": ["vp"]}, "need one or more"),
        ({"processes": "vp"}, "processes = 'vp'"),
        ({"predictions": ["nois"]}, "did you mean 'noise'"),
        ({"predictions": "noise"}, "predictions = 'noise'"),
        ({"predictions": []}, "predictions is empty"),
        ({"predictions": [3]}, "predicts = 3"),
        ({"times": ["sigmas"]}, "did you mean 'sigma'"),
        ({"times": 1000}, "times = 1000"),
        ({"processes": [fs.EDM(0.1, 0.2), fs.EDM(5.0, 9.0)]}, "share too few noise levels"),
        ({"processes": [fs.Flow(independent=False)], "predictions": ["score"]}, "scores only"),
    ],
)
def test_bad_arguments(change, words):
    def never(x, t):
        raise AssertionError

    with pytest.raises(ValueError, match=words):
        diagnose(**{"network": never, "data": DATA, **change})
