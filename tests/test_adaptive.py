"""Adaptive step size: convergence, control, budgets, and independence of neighbours."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._adaptive import _coefficients, _Method, _phi
from problems import PROCESSES

WEIGHTS, MEANS = [0.3, 0.7], [[1.0, 0.2, 0.1], [-0.5, 0.3, 0.0]]
MIXTURE = fs.exact.Mixture(WEIGHTS, MEANS, np.stack([np.eye(3) * 0.04, np.eye(3) * 0.09]))
SOLVERS = ["dpm_solver_12", "dpm_solver_23"]
FORMS = ["data", "noise"]


def elementwise(process, predicts="data"):
    """A network whose every number depends on one sample alone, bit for bit, with curvature in x
    and t. D = tanh of a shrunken x."""
    prediction = fs.predictions[predicts]

    def network(x, t, shift=None):
        level = process.level(t.double().numpy())
        columns = (torch.from_numpy(np.asarray(v)).to(x) for v in (level.alpha, level.sigma))
        alpha, sigma = (c.reshape(-1, *(1,) * (x.ndim - 1)) for c in columns)
        c = 0.25 * alpha / (0.25 * alpha * alpha + sigma * sigma)
        D = torch.tanh(3 * c * x)
        D = D if shift is None else D + 0.1 * shift.reshape(D.shape[0], *(1,) * (x.ndim - 1))
        if predicts == "data":
            return D
        u, w = (torch.from_numpy(np.asarray(v)).to(x) for v in prediction.from_data(level))
        return u.reshape(alpha.shape) * x + w.reshape(alpha.shape) * D

    return fs.Denoiser(network, process, predicts)


def quiet(*args, **options):
    return fs.sample_adaptive(*args, progress=False, **options)


@pytest.mark.parametrize("second", ["midpoint", "exact"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "scaled-linear table"])
def test_tolerance_to_zero_is_the_exact_solution(name, solver, form, second):
    process = PROCESSES[name]
    if process.integer_times:
        process = replace(process, integer_times=False)
    level, end = process.level(process.t_start), process.level(process.t_end)
    x = fs.start_noise((4, 3), 0, dtype=torch.float64) * process.prior_std(process.t_start)
    exact = MIXTURE.solve(x, (level.alpha, level.sigma), (end.alpha, end.sigma))
    tolerance = 1e-4 if solver == "dpm_solver_12" else 1e-6
    model = MIXTURE.denoiser(process, "data" if level.alpha == 0 else "noise")
    got = quiet(
        model,
        x=x,
        solver=solver,
        form=form,
        second=second,
        rtol=tolerance,
        atol=tolerance,
        final="min",
    )
    assert got.converged.all()
    assert float((got.x - exact).abs().max()) < 10 * tolerance


@pytest.mark.parametrize(
    ("solver", "p", "tolerances"),
    [
        ("dpm_solver_12", 2, (1e-4, 1e-5)),
        ("dpm_solver_23", 3, (1e-6, 1e-8)),
    ],
)
def test_order_of_the_pair(solver, p, tolerances):
    """h goes as tolerance^(1 / p): so does the inverse of the cost."""
    model = MIXTURE.denoiser(fs.VP())
    runs = [
        quiet(model, (2, 3), solver=solver, rtol=r, atol=r, dtype=torch.float64) for r in tolerances
    ]
    measured = np.log(runs[1].nfe / runs[0].nfe) / math.log(tolerances[0] / tolerances[1])
    np.testing.assert_allclose(measured, 1 / p, rtol=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("second", ["midpoint", "exact"])
def test_coefficients_are_exact_on_polynomials(solver, second):
    """N = 1 for all, N = theta for exact weights and for the last row of 23 (at r_2 = 2/3)."""
    process = fs.VP()
    s, t = process.level(np.array([0.9, 0.3])), process.level(np.array([0.5, 0.05]))
    method = _Method(solver, "data", second, 0.1, 0.1, None, 0.1, (0.2, 5.0), None)
    for noise in (np.array([False, False]), np.array([True, True])):
        c = _coefficients(method, process, s, t, noise)
        h = t.lam - s.lam
        z = np.where(noise, h, -h)
        K = np.where(noise, -t.sigma, t.alpha) * h
        nodes = np.array([0.0, *method.nodes])
        change = np.array(c.change)
        low = np.zeros_like(change)
        low[: len(c.low) - 1] = c.low[1:]
        high = low + change
        phi = _phi(z)
        np.testing.assert_allclose(change.sum(0), 0, atol=1e-14)
        np.testing.assert_allclose(low.sum(0), K * phi[0], rtol=1e-13)
        if second == "exact" or solver == "dpm_solver_23":
            np.testing.assert_allclose(nodes @ high, K * phi[1], rtol=1e-13)
        if second == "exact" and solver == "dpm_solver_23":
            np.testing.assert_allclose(nodes**2 @ high, 2 * K * phi[2], rtol=1e-12)
        for level, r in zip(c.inner, method.nodes, strict=True):
            np.testing.assert_allclose(level.lam, s.lam + r * h, atol=1e-9)


def test_phi_functions():
    z = np.array([-30.0, -1.0, -0.999999, -1e-3, -1e-12, 0.0, 1e-7, 0.3, 1.0, 12.0])
    for k, got in enumerate(_phi(z), 1):
        want = [float(mpmath.hyp1f1(1, k + 1, v) / mpmath.factorial(k)) for v in z]
        np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "custom"])
def test_a_sample_is_the_same_alone_and_in_any_batch(name, solver, form, dtype):
    process = PROCESSES[name]
    model = elementwise(process)
    final = "min" if process.t_clean is None else "zero"
    x = fs.start_noise((7, 2, 5), 3, dtype=dtype) * process.prior_std(process.t_start)
    x = x * torch.linspace(0.2, 3.0, 7, dtype=dtype).reshape(-1, 1, 1)  # different difficulty
    shift = torch.linspace(-1, 1, 7)
    options = {"solver": solver, "form": form, "rtol": 1e-3, "atol": 1e-3, "final": final}
    whole = quiet(model, x=x, cond={"shift": shift}, **options)
    assert len(set(whole.nfe.tolist())) > 1
    assert whole.rejected.sum() > 0
    for part in ([0], [6], [5, 2], [1, 3, 4]):
        alone = quiet(model, x=x[part], cond={"shift": shift[part]}, **options)
        assert torch.equal(alone.x, whole.x[part])
        for field in ("nfe", "accepted", "rejected", "converged"):
            assert np.array_equal(getattr(alone, field), getattr(whole, field)[part])
        for mine, theirs in zip(alone.times, (whole.times[i] for i in part), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_counts_are_what_the_network_saw(name, final, solver, form):
    process, order = PROCESSES[name], {"dpm_solver_12": 2, "dpm_solver_23": 3}[solver]
    inner, seen = elementwise(process), []

    def network(x, t):
        seen.append(t.clone())
        return inner.network(x, t)

    model = fs.Denoiser(network, process, "data")
    got = quiet(model, (5, 4), solver=solver, form=form, final=final, seed=1)
    assert len(seen) == got.rounds >= got.nfe.max()
    assert sum(map(len, seen)) == got.nfe.sum()
    assert got.rejected.sum() > 0
    # The first evaluation of a retry is remembered; going on to sigma = 0 takes one.
    attempts = order * got.accepted + (order - 1) * got.rejected
    assert np.array_equal(got.nfe, attempts + (final == "zero"))
    for times, accepted in zip(got.times, got.accepted, strict=True):
        assert len(times) == accepted + 1 + (final == "zero")
        assert times[0] == process.t_start
        assert times[-1] == (process.t_clean if final == "zero" else process.t_end)
        assert (np.diff(process.lam(times)) > 0).all()


@pytest.mark.parametrize("final", ["zero", "min"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_cap_is_never_exceeded_and_never_silent(solver, form, final):
    model = elementwise(fs.VP())
    options = {"solver": solver, "form": form, "final": final, "seed": 2}
    free = quiet(model, (6, 4), **options)
    assert free.converged.all()
    for cap in range(1, int(free.nfe.max()) + 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = quiet(model, (6, 4), max_nfe=cap, **options)
        assert got.nfe.max() <= cap
        assert np.array_equal(got.converged, free.nfe <= cap)
        assert torch.equal(got.x[got.converged], free.x[got.converged])
        assert torch.isfinite(got.x).all()
        assert len(caught) == (not got.converged.all())
        for times, ok in zip(got.times, got.converged, strict=True):
            assert ok or times[-1] == (0.0 if final == "zero" else fs.VP().t_end)
        # What is left over would not have paid for another attempt and a last step.
        assert (got.nfe[~got.converged] > cap - 4).all()
        for w in caught:
            assert w.category is RuntimeWarning
            assert f"max_nfe = {cap}" in str(w.message)


def test_one_evaluation_is_one_ddim_step():
    for form in FORMS:
        with pytest.warns(RuntimeWarning, match="3 of 3 samples"):
            got = quiet(elementwise(fs.VP()), (3, 4), max_nfe=1, form=form, dtype=torch.float64)
        want = fs.sample(elementwise(fs.VP()), (3, 4), solver="ddim", nfe=1, dtype=torch.float64)
        assert torch.allclose(got.x, want, rtol=1e-12)


@pytest.mark.parametrize("predicts", ["noise", "data", "v", "flow"])
@pytest.mark.parametrize("form", FORMS)
def test_any_prediction_and_a_hook(form, predicts):
    base = quiet(elementwise(fs.VP()), (3, 4), form=form, dtype=torch.float64)
    model = elementwise(fs.VP(), predicts)
    other = quiet(model, (3, 4), form=form, dtype=torch.float64)
    assert torch.allclose(base.x, other.x, atol=1e-10)
    levels = []

    def hook(D, level):
        levels.append(level)
        return D.clamp(-0.3, 0.3)

    def clipped(x, t):
        return elementwise(fs.VP()).network(x, t).clamp(-0.3, 0.3)

    hooked = quiet(model, (3, 4), form=form, hook=hook, dtype=torch.float64)
    plain = quiet(fs.Denoiser(clipped, fs.VP(), "data"), (3, 4), form=form, dtype=torch.float64)
    assert torch.allclose(hooked.x, plain.x, atol=1e-10)
    assert all(1 <= len(level.alpha) <= 3 for level in levels)


def test_a_network_without_error_takes_few_steps():
    """E = 0 everywhere: h grows by its largest factor from attempt to attempt."""
    model = fs.Denoiser(lambda x, t: torch.full_like(x, 0.5), fs.VP(), "data")
    got = quiet(model, (2, 3), solver="dpm_solver_12", h=0.01, limits=(0.2, 3.0), final="min")
    lam = fs.VP().lam(got.times[0])
    np.testing.assert_allclose(np.diff(lam)[:-1], 0.01 * 3.0 ** np.arange(len(lam) - 2), rtol=1e-9)
    assert got.rejected.sum() == 0
    level = fs.VP().level(fs.VP().t_end)
    assert float((got.x - level.alpha * 0.5).abs().max()) < 5 * level.sigma


def test_conditions_leave_with_their_samples():
    """Tensors, lists, nested mappings, and an unconditional half with a value for each sample."""

    def network(x, t, label, text, more):
        assert len(label) == len(text) == len(more["mask"]) == len(x)
        assert more["table"].shape == (9, 2)
        number = torch.tensor([float(len(v)) for v in text]) + more["mask"]
        c = (0.02 * label + 0.1 * number).reshape(-1, 1)
        return torch.tanh(4 * x / (1 + t.reshape(-1, 1))) + c

    inner = fs.Denoiser(network, fs.EDM(), "data")
    cond = {
        "label": torch.tensor([3.0, 9.0, 1.0, 5.0]),
        "text": ["a", "bb", "ccc", "dddd"],
        "more": {"mask": torch.arange(4.0), "table": torch.ones(9, 2)},
    }
    for uncond in (torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor(7.0)):
        model = fs.Guided(inner, 2.0, {"label": uncond}, interval=(0.05, 5.0))
        x = fs.start_noise((4, 6), 0) * torch.tensor([20.0, 40.0, 60.0, 80.0])[:, None]
        whole = quiet(model, x=x, cond=cond, rtol=1e-3, atol=1e-3)
        assert len(set(whole.nfe.tolist())) > 1
        for i in range(4):
            own = fs.Guided(
                inner, 2.0, {"label": uncond.reshape(-1)[i % uncond.numel()]}, (0.05, 5.0)
            )
            part = {
                "label": cond["label"][i : i + 1],
                "text": cond["text"][i : i + 1],
                "more": {"mask": torch.arange(4.0)[i : i + 1], "table": torch.ones(9, 2)},
            }
            alone = quiet(own, x=x[i : i + 1], cond=part, rtol=1e-3, atol=1e-3)
            assert torch.equal(alone.x[0], whole.x[i])


@pytest.mark.parametrize("pid", [(0.0, 1.0, 0.0), (0.2, 0.4, 0.0), (0.2, 0.4, 0.1)])
def test_pid_control(pid):
    process = fs.EDM()
    x = fs.start_noise((3, 3), 0, dtype=torch.float64) * 80
    exact = MIXTURE.solve(x, (1.0, 80.0), (1.0, process.t_end))
    got = quiet(
        MIXTURE.denoiser(process), x=x, form="noise", pid=pid, rtol=1e-6, atol=1e-6, final="min"
    )
    assert float((got.x - exact).abs().max()) < 1e-5


def test_start_in_between():
    process = fs.VP()
    level, end = process.level(0.5), process.level(process.t_end)
    x = MIXTURE.sample(3, 0) * level.alpha + level.sigma * fs.start_noise((3, 3), 1).double()
    exact = MIXTURE.solve(x, (level.alpha, level.sigma), (end.alpha, end.sigma))
    model = MIXTURE.denoiser(process)
    got = quiet(model, x=x, start=0.5, rtol=1e-5, atol=1e-5, final="min")
    assert got.times[0][0] == 0.5
    assert float((got.x - exact).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="x is missing"):
        quiet(model, (3, 3), start=0.5)


def test_failures_are_reported():
    def network(x, t):
        return torch.where(t.reshape(-1, 1) < 0.2, math.nan, 0.3) * x

    with pytest.raises(FloatingPointError, match="NaN or inf in a step from t"):
        quiet(fs.Denoiser(network, fs.VP(), "data"), (2, 3))
    last = fs.Denoiser(
        lambda x, t: x * torch.where(t[:, None] <= 1e-3, math.nan, 0.1), fs.VP(), "data"
    )
    with pytest.raises(FloatingPointError, match="NaN or inf"):
        quiet(last, (2, 3))


def test_refusals():
    model = elementwise(fs.VP())
    table = fs.Denoiser(lambda x, t: x, fs.DiscreteVP.linear(), "noise")
    cases = [
        (table, {}, "integer"),
        (model, {"solver": "dpm_solver_32"}, "did you mean 'dpm_solver_"),
        (model, {"form": "v"}, "form = 'v'"),
        (model, {"second": "taylor"}, "second = 'taylor'"),
        (model, {"rtol": -1.0}, "rtol"),
        (model, {"atol": 0.0}, "atol"),
        (model, {"max_nfe": 0}, "max_nfe"),
        (model, {"max_nfe": 2.5}, "max_nfe"),
        (model, {"h": 0.0}, "h = 0"),
        (model, {"limits": (0.5, 1.0)}, "limits"),
        (model, {"pid": (0.0, 0.0, 0.0)}, "pid"),
        (model, {"hook": 3}, "hook"),
        (model, {"final": "clean"}, "final"),
        (elementwise, {}, "model"),
    ]
    for bad, options, message in cases:
        with pytest.raises(ValueError, match=message):
            quiet(bad, (2, 3), **options)
