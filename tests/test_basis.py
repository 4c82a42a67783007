"""Bases: orthogonal, linear, refused where they do not fit, the same after a file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

import fewstep as fs
from fewstep._basis import Basis, Channel, Cosine, Identity, LowRank, bases, basis_from

SHAPES = [(12,), (2, 9), (3, 8, 6), (2, 3, 4, 5)]


def rotation(n: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]


def make(kind: str, shape: tuple[int, ...]) -> Basis:
    rng = np.random.default_rng(0)
    fields = {"mean": rng.standard_normal(shape), "shape": np.array(shape)}
    if kind in ("channel", "cosine") and len(shape) > 1:
        fields["rotation"] = rotation(shape[0])
    if kind == "low_rank":
        square = rng.standard_normal((math.prod(shape), 4))
        fields["columns"] = np.linalg.qr(square)[0]
    return basis_from(kind, fields)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", bases)
def test_orthogonal(kind: str, shape: tuple[int, ...]) -> None:
    basis = make(kind, shape)
    basis.check(shape)
    v, w = torch.randn((2, 3, *shape), generator=torch.Generator().manual_seed(1)).double()
    m, n = basis.forward(v), basis.forward(w)
    assert m.shape[0] == 3
    torch.testing.assert_close(basis.inverse(m), v, rtol=0, atol=1e-12)
    torch.testing.assert_close((m * n).sum(), (v * w).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(basis.forward(2 * v - 3 * w), 2 * m - 3 * n, rtol=0, atol=1e-12)
    # one sample is not mixed with another; float32 stays float32, and accurate
    torch.testing.assert_close(basis.forward(v[1:2])[0], m[1], rtol=0, atol=1e-13)
    single = basis.forward(v.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), m, rtol=0, atol=5e-6)
    torch.testing.assert_close(basis.inverse(single), v.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_is_the_dct(shape: tuple[int, ...]) -> None:
    v = np.random.default_rng(0).standard_normal((2, *shape))
    axes = range(1 if len(shape) == 1 else 2, v.ndim)
    found = Cosine().forward(torch.from_numpy(v)).numpy()
    np.testing.assert_allclose(found, dctn(v, axes=tuple(axes), norm="ortho"), atol=1e-13)


def test_low_rank_splits_off_its_columns() -> None:
    basis = make("low_rank", (3, 8, 6))
    assert isinstance(basis, LowRank)
    U = torch.from_numpy(np.array(basis.columns))
    m = basis.forward((U @ torch.tensor([1.0, 0, -2, 3]).double()).reshape(1, 3, 8, 6))
    want = torch.cat([torch.tensor([1.0, 0, -2, 3]).double(), torch.zeros(144).double()])
    torch.testing.assert_close(m[0], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", bases)
def test_gradients_flow(kind: str) -> None:
    basis = make(kind, (2, 9))
    v = torch.randn((2, 2, 9), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.forward, v)
    assert torch.autograd.gradcheck(basis.inverse, basis.forward(v).detach().requires_grad_())


@pytest.mark.parametrize("kind", bases)
def test_rebuilt_and_equal(kind: str) -> None:
    basis = make(kind, (3, 8, 6))
    again = basis_from(basis.kind, basis.arrays())
    assert again == basis
    assert type(again) is type(basis)
    arrays = {**basis.arrays(), "mean": np.zeros((3, 8, 6))}
    assert basis_from(kind, arrays) != basis
    assert basis != Identity()
    assert basis != "identity"
    with pytest.raises(ValueError, match="read-only"):
        basis.arrays()["mean"][...] = 0
    assert kind in repr(basis)


@pytest.mark.parametrize("kind", bases)
def test_plans_keep_their_basis(kind: str, tmp_path) -> None:
    basis = make(kind, (3, 8, 6))
    plan = fs.plan(fs.gaussian(2, 0.7, basis), fs.Flow(), 4)
    plan.save(tmp_path / "plan.safetensors")
    again = fs.Plan.load(tmp_path / "plan.safetensors")
    assert again == plan
    assert again.basis == basis
    x = torch.randn((2, 3, 8, 6))
    with pytest.raises(ValueError, match="sample of shape"):
        plan.start(x[..., :5])
    # one scale for all modes: the basis cancels, but for its mean
    model = fs.Denoiser(lambda x, t: torch.tanh(x), fs.Flow(), "data")
    plain = fs.Plan(plan.levels, plan.rows, plan.calls, prior_std=plan.prior_std)
    one, two = (fs.sample(model, x=x.double(), solver=p) for p in (plan, plain))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)  # flow rows keep constants: no mean


def test_spread() -> None:
    shape = np.array([3, 8, 6])
    assert Channel(shape=shape).spread([1.0, 2, 3]).shape == (3, 1, 1)
    assert Channel().spread(np.ones((3, 1, 1))).shape == (3, 1, 1)
    assert Cosine(shape=shape).spread(np.ones((8, 6))).shape == (8, 6)
    assert make("low_rank", (3, 8, 6)).spread(np.arange(5.0))[3:6].tolist() == [3.0, 4.0, 4.0]
    assert all(make(kind, (3, 8, 6)).spread(2.0) == 2 for kind in bases)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Channel(rotation=np.ones((2, 2))), "orthogonal"),
        (lambda: Channel(rotation=np.eye(3)[:2]), "orthogonal"),
        (lambda: Channel(rotation=rotation(3)).check((2, 8)), "3 channels"),
        (lambda: Cosine(rotation=rotation(3)).check((3,)), "no channels"),
        (lambda: Channel().spread(np.ones((3, 2))), "per channel"),
        (lambda: Channel(shape=[3, 8]).spread(np.ones(2)), "scales has shape"),
        (lambda: Cosine(shape=[3, 8, 6]).spread(np.ones((8, 8))), "scales has shape"),
        (lambda: Identity(shape=[3, 8]).check((3, 9)), r"\(3, 8\)"),
        (lambda: Identity(mean=np.ones((3, 8))).check((3, 9)), "mean has shape"),
        (lambda: Identity(mean=np.ones((3, 8)), shape=[8]), "mean has shape"),
        (lambda: Identity(mean=[1.0, math.nan]), "finite"),
        (lambda: Identity(shape=[3.5]), "positive integers"),
        (lambda: LowRank(columns=np.eye(4)[:, :2]), "shape of a sample"),
        (lambda: LowRank(columns=np.eye(4)[:, :2], shape=[5]), "shape of a sample"),
        (lambda: LowRank(columns=np.ones((4, 2)), shape=[4]), "orthonormal"),
        (lambda: make("low_rank", (12,)).spread(np.ones(4)), "rank 4 needs 5"),
        (lambda: basis_from("cosin", {}), "did you mean 'cosine'"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
