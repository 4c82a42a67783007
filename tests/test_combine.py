from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from accounting import BOTH, peak_bytes
from fewstep import _combine
from fewstep._combine import combine

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The first is cheaper in calls, the second in memory, the third is no whole number of blocks.
SHAPES = ((3, 4, 5), (2, 3, 11, 13, 61), (1, 5, 250_001))


@pytest.fixture(autouse=True, params=BOTH)
def kernel(request, monkeypatch):
    """Every test of this file runs with the compiled kernel and without."""
    monkeypatch.setattr(_combine, "KERNEL", request.param)
    return request.param


def make(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(terms):
    return sum(torch.as_tensor(c, dtype=torch.float64) * v.double() for c, v in terms)


def check(terms, dtype):
    got, want = combine(terms, dtype), expected(terms)
    size = sum(torch.as_tensor(c, dtype=torch.float64).abs() * v.double().abs() for c, v in terms)
    assert got.dtype == dtype
    assert got.shape == terms[0][1].shape
    bound = 2 * len(terms) * torch.finfo(dtype).eps * size
    assert bool(((got.double() - want).abs() <= bound).all())
    return got


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_types_and_any_number_of_terms(shape, dtype):
    pattern = itertools.cycle([dtype, torch.bfloat16, dtype, torch.float16, torch.float32])
    for k in range(1, 8):
        kinds = list(itertools.islice(pattern, k))
        for first in range(k if shape is SHAPES[0] else 1):
            rotated = kinds[first:] + kinds[:first]
            check([(0.7 - 0.3 * i, make(shape, d, i)) for i, d in enumerate(rotated)], dtype)


@pytest.mark.parametrize("one", FLOATS)
@pytest.mark.parametrize("two", FLOATS)
def test_pairs_of_types(one, two):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float64)):
        check([(1.3, make(shape, one)), (-0.4, make(shape, two, 1))], dtype)


@pytest.mark.parametrize("half", [False, True])
def test_strides(half):
    shape = (2, 8, 63, 65)
    last = make(shape, torch.float32, 3).to(memory_format=torch.channels_last)
    cut = make((2, 8, 63, 130), torch.float32, 4)[..., ::2]
    expanded = make((1, 8, 63, 1), torch.float32, 5).expand(shape)
    flipped = make((65, 63, 8, 2), torch.float32, 6).permute(3, 2, 1, 0)
    plain = make(shape, torch.float32, 7)
    kinds = [plain, last, cut, expanded, flipped]
    for order in itertools.permutations(kinds, 3):
        terms = [(0.5 + i, v) for i, v in enumerate(order)]
        if half:
            terms = [(c, v.bfloat16() if i % 2 else v) for i, (c, v) in enumerate(terms)]
        got = check(terms, torch.float32)
        got.zero_()  # a tensor of its own, not a view that repeats elements
        assert got.eq(0).all()


@pytest.mark.parametrize("first", [1.0, 1 - 2**-53, 1 + 2**-25, 1 + 2**-24, -1.0, 1 - 1e-6])
def test_a_coefficient_of_about_one(first):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float64)):
        for kind in (dtype, torch.bfloat16):
            terms = [(first, make(shape, dtype)), (0.3, make(shape, kind, 1))]
            check(terms, dtype)
            check([*terms, (-2.0, make(shape, dtype, 2))], dtype)
    x = make((2, 3), torch.float64)
    assert torch.equal(combine([(first, x), (1.0, x)], torch.float64), x * first + x)


def test_never_writes_to_its_terms():
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        vs = [make(shape, torch.float32), make(shape, dtype, 1), make(shape, dtype, 2)]
        before = [v.clone() for v in vs]
        for k in (1, 2, 3):
            got = combine([(1.0, v) for v in vs[:k]], torch.float32)
            got.add_(1.0)
        assert all(torch.equal(v, w) for v, w in zip(vs, before, strict=True))


def test_zero_coefficients():
    x, bad = make((2, 3), torch.float32), torch.full((2, 3), torch.inf)
    assert torch.equal(combine([(0.0, bad), (2.0, x)], torch.float32), 2 * x)
    nothing = combine([(0.0, bad.bfloat16())], torch.float32)
    assert nothing.dtype == torch.float32
    assert torch.equal(nothing, torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 4, 101, 103)])
def test_arrays_broadcast_against_a_sample(shape):
    rng = np.random.default_rng(0)
    whole, channel = rng.normal(size=shape[1:]), rng.normal(size=(4, *(1 for _ in shape[2:])))
    x, y, z = (make(shape, torch.float32, i) for i in range(3))
    check([(whole, x)], torch.float32)
    check([(whole, x.bfloat16()), (0.3, y), (channel, z)], torch.float32)
    check([(0.2, x), (channel, y.bfloat16()), (0.3, z)], torch.float64)


def test_arrays_that_cannot_change_are_uploaded_once():
    x, array = make((3, 4), torch.float32), np.arange(4.0)
    first = combine([(array, x)], torch.float32)
    array += 1
    assert torch.equal(combine([(array, x)], torch.float32), first + x)
    array.flags.writeable = False
    gc.collect()  # what other tests left
    before = len(_combine._UPLOADED)
    for _ in range(3):
        assert torch.equal(combine([(array, x)], torch.float32), first + x)
    assert len(_combine._UPLOADED) == before + 1
    del array
    gc.collect()
    assert len(_combine._UPLOADED) == before


@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 120, 110)])
def test_gradients(shape):
    x, y = make(shape, torch.float64).requires_grad_(), make(shape, torch.float64, 1)
    z = make(shape, torch.bfloat16, 2).requires_grad_()
    weight = make(shape, torch.float64, 3)
    got = combine([(0.5, x), (2.0, y), (-3.0, z)], torch.float64)
    gx, gz = torch.autograd.grad((got**2 * weight).sum(), (x, z), create_graph=True)
    torch.testing.assert_close(gx, 0.5 * 2 * got * weight)
    torch.testing.assert_close(gz, (-3.0 * 2 * got * weight).bfloat16())
    (second,) = torch.autograd.grad(gx.sum(), x)
    torch.testing.assert_close(second, 0.5 * weight)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func, inside
@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 120, 110)])
@pytest.mark.parametrize("narrow", [False, True])
def test_forward_mode_and_transforms(shape, narrow):
    x, y, t = (make(shape, torch.float32, i) for i in range(3))
    z = y.bfloat16() if narrow else y

    def f(v):
        return combine([(0.5, x), (2.0, v), (1.5, z)], torch.float32)

    value, tangent = torch.func.jvp(f, (y,), (t,))
    torch.testing.assert_close(value, f(y))
    torch.testing.assert_close(tangent, 2 * t)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(y, t)))
    torch.testing.assert_close(dual.tangent, 2 * t)
    # The first term is not mapped over: an in-place sum would have nowhere to put the batch.
    many = torch.stack([y, t])
    torch.testing.assert_close(torch.func.vmap(f)(many), torch.stack([f(y), f(t)]))
    torch.testing.assert_close(torch.func.grad(lambda v: f(v).sum())(y), torch.full(shape, 2.0))


@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 120, 110)])
def test_compiles_without_a_break(shape):
    x, y = make(shape, torch.float32), make(shape, torch.bfloat16, 1)

    def f(a, b):
        return combine([(0.5, a), (2.0, b), (1.5, a)], torch.float32)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), f(x, y))


def test_meta_and_inference():
    x = torch.empty(2, 3, 120, 110, device="meta")
    got = combine([(0.5, x), (1.0, x.bfloat16()), (2.0, x)], torch.float32)
    assert (got.shape, got.dtype, got.device.type) == (x.shape, torch.float32, "meta")
    real = make(x.shape, torch.float32)
    _combine._one.cache_clear()
    with torch.inference_mode():
        inside = combine([(0.5, real), (2.0, real)], torch.float32)
    outside = combine([(0.5, real), (2.0, real.clone().requires_grad_())], torch.float32)
    torch.testing.assert_close(inside, outside.detach())


@pytest.mark.parametrize("kinds", ["ff", "ffff", "fb", "ffb", "bb", "fbbh", "dfd"])
def test_allocates_the_result_and_no_more(kinds, kernel):
    types = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16, "d": torch.float64}
    shape = (1, 16, 60, 104, 5)
    terms = [(0.5 + i, make(shape, types[k], i)) for i, k in enumerate(kinds)]
    dtype = torch.float64 if "d" in kinds else torch.float32
    with torch.no_grad():
        combine(terms, dtype)  # its constants
        peak, final = peak_bytes(lambda: combine(terms, dtype))
    result = terms[0][1].numel() * dtype.itemsize
    assert final == pytest.approx(result, abs=1024)
    # PyTorch's add_ widens a narrower tensor whole; the first narrow one needs no add_.
    narrow = sum(v.dtype != dtype for _, v in terms)
    assert peak <= result * (1 if kernel or narrow < 2 else 2) + 1024


def test_the_account_sees_what_a_kernel_allocates_inside():
    wide, narrow = make((1 << 20,), torch.float32), make((1 << 20,), torch.bfloat16)
    assert peak_bytes(lambda: wide.add_(narrow))[0] >= wide.nbytes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces():
    x, y = make((3, 4), torch.float32), make((3, 4), torch.bfloat16, 1)

    def f(a, b):
        return combine([(0.5, a), (2.0, b)], torch.float32)

    traced = torch.jit.trace(f, (x, y))
    torch.testing.assert_close(traced(3 * x, 5 * y), f(3 * x, 5 * y))
