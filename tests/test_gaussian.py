"""Gaussian-matched solvers: what they are exact for, their order, and where scales come from."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._basis import Basis, Channel, Cosine, Identity, LowRank
from problems import PROCESSES

# torch warns of itself when it loads its forward-mode rules
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is")

SHAPE = (2, 4, 3)
ENDING = {name: p for name, p in PROCESSES.items() if p.t_clean is not None}


def orthogonal(n: int, m: int | None = None) -> np.ndarray:
    square = np.random.default_rng(n).standard_normal((n, n))
    return np.linalg.qr(square)[0][:, : m or n]


def setting(kind: str) -> tuple[Basis, np.ndarray]:
    """A basis, and scales of very different sizes in it."""
    rng = np.random.default_rng(3)
    mean, shape = rng.standard_normal(SHAPE), np.array(SHAPE)
    if kind == "identity":
        return Identity(mean, shape), rng.uniform(0.02, 3, SHAPE)
    if kind == "channel":
        return Channel(mean, shape, orthogonal(2)), np.array([0.1, 2.0])
    if kind == "cosine":
        return Cosine(mean, shape, orthogonal(2)), rng.uniform(0.02, 3, SHAPE)
    return LowRank(mean, shape, orthogonal(24, 3)), np.array([4.0, 1.0, 0.5, 0.07])


def covariance(basis: Basis, scales: np.ndarray) -> np.ndarray:
    """B^T diag(c^2) B over the flattened sample."""
    modes = basis.forward(torch.eye(24, dtype=torch.float64).reshape(24, *SHAPE)).numpy()
    c = np.broadcast_to(basis.spread(scales), modes.shape[1:])
    flat = modes.reshape(24, -1)
    return (flat * c.ravel() ** 2) @ flat.T


KINDS = ("identity", "channel", "cosine", "low_rank")


@pytest.mark.parametrize("process", ENDING)
@pytest.mark.parametrize("kind", KINDS)
def test_v_form_is_exact_for_gaussians(kind: str, process: str) -> None:
    """Any number of steps, any order, from pure noise (alpha = 0 included) to sigma = 0."""
    basis, scales = setting(kind)
    path = ENDING[process]
    exact = fs.exact.Gaussian(np.array(basis.mean), covariance(basis, scales))
    level = path.level(path.t_start)
    x = torch.randn((5, *SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * path.prior_std(path.t_start)
    want = exact.solve(x, (level.alpha, level.sigma), (1.0, 0.0))
    for order, nfe in ((1, 1), (2, 3), (3, 5)):
        solver = fs.gaussian(order, scales, basis, form="v", corrector=nfe == 5)
        found = fs.sample(exact.denoiser(path), x=x, solver=solver, nfe=nfe)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-9)
        ddim = fs.sample(exact.denoiser(path), x=x, solver="ddim", nfe=nfe)
        assert (ddim - want).abs().max() > 1e-2  # the problem is not trivial


class Scaled(fs.Process):
    """A path with c alpha in place of alpha."""

    def __init__(self, path: fs.Process, c: float) -> None:
        self.path, self.c = path, c
        self.t_start, self.t_end, self.t_clean = path.t_start, path.t_end, path.t_clean

    def alpha(self, t):
        return self.c * self.path.alpha(t)

    def sigma(self, t):
        return self.path.sigma(t)

    def lam(self, t):
        return self.path.lam(t) + math.log(self.c)

    def time(self, lam):
        return self.path.time(np.asarray(lam) - math.log(self.c))


@pytest.mark.parametrize(
    ("form", "order", "corrector"), list(product(("v", "flow"), (1, 2, 3, 4), (False, True)))
)
@pytest.mark.parametrize("process", ENDING)
def test_rows_are_the_exponential_ones(
    process: str, form: str, order: int, corrector: bool
) -> None:
    """One scale c is the exponential family on (c alpha, sigma), with D / c; written by another
    route (quadrature in lambda)."""
    path = ENDING[process]
    times = fs.plan("ddim", path, 7).times
    for c in (0.3, 1.0, 2.0):
        twin = fs.exponential(order, form=form, variable="own", corrector=corrector)
        want = twin.draft(Scaled(path, c), times)
        found = fs.gaussian(order, c, form=form, corrector=corrector).draft(path, times)
        assert found.evaluated == want.evaluated
        for one, two in zip(found.rows, want.rows, strict=True):
            assert (one.order, one.exact) == (two.order, two.exact)
            assert one.a == pytest.approx(dict(two.a), rel=1e-9, abs=1e-11)
            b = {j: v / c for j, v in two.b.items()}
            assert one.b == pytest.approx(b, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_has_its_own_rows(kind: str) -> None:
    """Coefficients of a mode are those of a solver with that one scale, guard included."""
    basis, scales = setting(kind)
    times = fs.plan("ddim", fs.EDM(), 6, grid="lambda").times
    draft = fs.gaussian(3, scales, basis).draft(fs.EDM(), times)
    spread = basis.spread(scales)
    orders = []
    for where in np.ndindex(spread.shape):
        one = fs.gaussian(3, float(spread[where])).draft(fs.EDM(), times)
        orders.append([row.order for row in one.rows])
        for row, single in zip(draft.rows, one.rows, strict=True):
            for many, few in ((row.a, single.a), (row.b, single.b)):
                for j, c in many.items():
                    mine = np.broadcast_to(c, spread.shape)[where]
                    assert mine == pytest.approx(few.get(j, 0.0), rel=1e-12, abs=1e-14)
    assert [row.order for row in draft.rows] == np.min(orders, axis=0).tolist()
    assert draft.basis == basis


def test_modes_lose_order_one_by_one() -> None:
    """A step that is calm for one scale and wild for another."""
    basis = Identity(shape=[2])
    times = [80.0, 3.0, 0.01, 0.0]
    alone = [fs.gaussian(2, c).draft(fs.EDM(), np.array(times)).rows[1].order for c in (0.05, 60.0)]
    row = fs.gaussian(2, [0.05, 60.0], basis).draft(fs.EDM(), np.array(times)).rows[1]
    assert sorted(alone) == [1, 2]
    assert row.order == 1
    used = np.asarray(row.b[0]) != 0
    assert used.tolist() == [order == 2 for order in alone]


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("form", ["v", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order(order: int, form: str, corrector: bool) -> None:
    """The error of one step with exact history shrinks as h^(order + 1). The data are Gaussian
    with scales that are not the solver's."""
    true = np.array([0.2, 0.7, 1.5])
    solver = fs.gaussian(order, [0.5, 0.5, 0.9], Identity(shape=[3]), form=form, growth=math.inf)
    step = solver.step
    if corrector:
        step = fs.gaussian(order, [0.5, 0.5, 0.9], Identity(shape=[3]), form=form, corrector=True)
        step = step.corrector
    process, errors, sizes = fs.Flow(), [], (0.2, 0.1, 0.05)

    def state(level: fs.Level) -> np.ndarray:
        return np.hypot(true * level.alpha, level.sigma)

    def data(level: fs.Level) -> np.ndarray:
        return level.alpha * true**2 / state(level)

    for h in sizes:
        lam = 0.3 + h * np.array([1.0, 0.0, -0.8, -1.9])
        levels = [process.level(float(process.time(v))) for v in lam]
        past = levels[: order + 1] if corrector else levels[1 : order + 1]
        formula = step(process, past, levels[0])
        x = sum(a * state(v) for a, v in zip(formula.a, past, strict=True))
        x = x + sum(b * data(v) for b, v in zip(formula.b, past, strict=True))
        errors.append(np.abs(x - state(levels[0])))
    measured = np.log2(np.divide(errors[:-1], errors[1:]))[-1]
    np.testing.assert_allclose(measured, solver.order + corrector + 1, atol=0.35)


def test_flow_form_of_order_one_is_ddim() -> None:
    basis, scales = setting("cosine")
    for path in ENDING.values():
        times = fs.plan("ddim", path, 5).times
        one = fs.gaussian(1, scales, basis).draft(path, times)
        ddim = fs.solvers["ddim"].draft(path, times)
        for row, want in zip(one.rows, ddim.rows, strict=True):
            assert row.a == pytest.approx(dict(want.a), rel=1e-12)
            assert row.b == pytest.approx(dict(want.b), rel=1e-12)


def test_the_process_does_not_matter() -> None:
    """The same noise levels of another path give the same samples."""
    basis, scales = setting("low_rank")
    exact = fs.exact.Mixture([0.5, 0.5], torch.randn((2, *SHAPE)).double(), [0.3, 0.1])
    rho = [20.0, 5.0, 2.0, 1.0, 0.4, 0.1]
    x = torch.randn((3, *SHAPE), dtype=torch.float64)
    found = []
    for path in (fs.EDM(), fs.VP(), fs.Flow()):
        times = [*(float(path.time(-math.log(r))) for r in rho), path.t_clean]
        start = path.level(times[0])
        solver = fs.gaussian(2, scales, basis, corrector=True)
        sample = fs.sample(exact.denoiser(path), x=x * start.alpha, solver=solver, grid=times)
        found.append(sample)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fs.gaussian(0), "order = 0"),
        (lambda: fs.gaussian(5), "1 to 4"),
        (lambda: fs.gaussian(True), "integer"),
        (lambda: fs.gaussian(2, 0.0), "positive finite"),
        (lambda: fs.gaussian(2, [0.5, 1.0]), "no basis"),
        (lambda: fs.gaussian(2, [0.5, -1.0], Identity()), "positive finite"),
        (lambda: fs.gaussian(2, form="data"), "accepted: flow, v"),
        (lambda: fs.gaussian(2, growth=0), "growth"),
        (lambda: fs.scales_from_data(np.ones((5, 3)), "dct"), "accepted: channel"),
        (lambda: fs.scales_from_data(np.ones((5, 3))), "does not vary"),
        (lambda: fs.scales_from_data(np.ones((1, 3))), "n >= 2"),
        (lambda: fs.scales_from_data(np.full((4, 3), np.nan)), "finite samples"),
        (lambda: fs.scales_from_data(np.eye(4), floor=0), "floor"),
        (lambda: fs.scales_from_data(np.eye(4), rotate=True), "channels"),
        (lambda: fs.scales_from_data(np.eye(4), "low_rank", rank=4), "rank = 4"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Where scales come from


def draw(n: int, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    root = np.linalg.cholesky(cov)
    noise = np.random.default_rng(5).standard_normal((n, 24))
    return (noise @ root.T).reshape(n, *SHAPE) + mean


@pytest.mark.parametrize("kind", KINDS)
def test_scales_from_data(kind: str) -> None:
    basis, scales = setting(kind)
    data = draw(20_000, np.asarray(basis.mean), covariance(basis, scales))
    found = fs.scales_from_data(
        data, kind, rank=3, rotate=kind in ("channel", "cosine"), floor=1e-3
    )
    assert found.nfe == 0
    assert found.basis.kind == kind
    # eigenvalues, whatever the order and sign of the directions; the rotation is found as well
    np.testing.assert_allclose(found.basis.mean, basis.mean, atol=0.1)
    cov = covariance(found.basis, found.scales)
    want = covariance(basis, scales)
    if kind == "cosine":  # scales differ per channel and mode: the rotation is not identifiable
        assert np.trace(cov) == pytest.approx(np.trace(want), rel=0.05)
    else:
        np.testing.assert_allclose(cov, want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["identity", "channel", "cosine"])
def test_scales_mode_by_mode(kind: str) -> None:
    """Without a rotation every scale can be compared: data to sampling error, slopes exactly."""
    basis, scales = setting(kind)
    basis = type(basis)(basis.mean, basis.shape)
    cov = covariance(basis, scales)
    data = draw(20_000, np.asarray(basis.mean), cov)
    found = fs.scales_from_data(data, kind, floor=1e-3)
    np.testing.assert_allclose(found.scales, scales, rtol=0.03)
    model = fs.exact.Gaussian(np.array(basis.mean), cov).denoiser(fs.EDM())
    found = fs.scales_from_jacobian(model, (4, *SHAPE), kind, derivative="difference", floor=1e-3)
    np.testing.assert_allclose(found.scales, scales, rtol=1e-2, atol=2e-3)
    assert found.nfe == 8


def test_scales_never_vanish() -> None:
    data = np.random.default_rng(0).standard_normal((50, 2, 4))
    data[:, :, 0] = 1.0
    scales = fs.scales_from_data(data, "identity", floor=0.02).scales
    assert np.all(scales[:, 1:] > 0.5)
    rms = math.sqrt((data.var(0)).mean())
    np.testing.assert_allclose(scales[:, 0], 0.02 * rms)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("process", ["edm", "vp", "flow", "scaled-linear table"])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_from_jacobian(kind: str, process: str, derivative: str) -> None:
    """Gaussian data, whose Jacobian is diagonal in the right basis: scales are exact, and every
    evaluation is counted."""
    basis, scales = setting(kind)
    path, cov = PROCESSES[process], torch.from_numpy(covariance(basis, scales)).float()
    mu = torch.from_numpy(np.array(basis.mean)).float().flatten()
    spent = 0

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        spent += len(x) * (1 if derivative == "difference" else 2)
        level = path.level(float(t[0]))
        gain = (
            level.alpha
            * cov
            @ torch.linalg.inv(level.alpha**2 * cov + level.sigma**2 * torch.eye(24))
        )
        flat = x.flatten(1)
        return (mu + (flat - level.alpha * mu) @ gain.T).reshape(x.shape)

    model = fs.Denoiser(network, path, "data")
    n = 512 if kind != "low_rank" else 64
    found = fs.scales_from_jacobian(
        model, (n, *SHAPE), kind, rank=3, rho=6.0, derivative=derivative, floor=1e-3
    )
    assert found.nfe == spent
    got = np.broadcast_to(found.basis.spread(found.scales), basis.spread(scales).shape)
    if kind == "identity":
        np.testing.assert_allclose(got, scales, rtol=2e-2, atol=0.02)
    if kind == "low_rank":
        np.testing.assert_allclose(found.scales, scales, rtol=2e-2, atol=0.02)
    total = np.trace(covariance(found.basis, found.scales))
    assert total == pytest.approx(float(torch.trace(cov)), rel=0.1)
    np.testing.assert_allclose(found.basis.mean, basis.mean, atol=0.25)


def test_networks_without_forward_mode_are_told() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5

    model = fs.Denoiser(lambda x, t: Opaque.apply(x), fs.EDM(), "data")
    with pytest.raises(ValueError, match="use 'difference'"):
        fs.scales_from_jacobian(model, (2, 3))
    broken = fs.Denoiser(lambda x, t: torch.ones(7) + x, fs.EDM(), "data")
    with pytest.raises(RuntimeError, match="must match the size"):  # not about the derivative
        fs.scales_from_jacobian(broken, (2, 3))
    with pytest.raises(ValueError, match="rho = 100"):
        fs.scales_from_jacobian(model, (2, 3), rho=100)
    with pytest.raises(ValueError, match="did you mean 'jvp'"):
        fs.scales_from_jacobian(model, (2, 3), derivative="jv")
    negative = fs.Denoiser(lambda x, t: -x, fs.EDM(), "data")
    with pytest.raises(ValueError, match="no positive entries"):
        fs.scales_from_jacobian(negative, (2, 3))


def test_trained_network() -> None:
    """The three sources on the bundled network agree about its digits; guidance narrows them."""
    model = fs.models.load("digits")
    cond = {"label": torch.arange(60) % 10}
    exact = fs.exact.digits()
    data = fs.scales_from_data(exact.sample(2000, 0), "cosine")
    drawn = fs.scales_from_model(model, (60, 1, 8, 8), "cosine", cond=cond)
    assert drawn.nfe == 60 * 8
    ratio = drawn.scales / data.scales
    assert 0.8 < np.median(ratio) < 1.1
    slope = fs.scales_from_jacobian(model, (60, 1, 8, 8), "cosine", cond=cond)
    guided = fs.Guided(model, 1.5, uncond={"label": 10})
    narrow = fs.scales_from_jacobian(guided, (60, 1, 8, 8), "cosine", cond=cond)
    size = [math.sqrt((s.scales**2).mean()) for s in (data, slope, narrow)]
    # The Jacobian is taken at one label, so it sees the spread within classes (0.72 of the whole).
    assert 0.6 * size[0] < size[1] < 0.85 * size[0]
    assert size[2] < 0.9 * size[1]
    classes = [exact.sample(200, k, label=k) for k in range(10)]
    within = fs.scales_from_data(torch.cat([v - v.mean(0) for v in classes]), "cosine")
    together = np.corrcoef(np.log(slope.scales.ravel()), np.log(within.scales.ravel()))[0, 1]
    assert together > 0.7
