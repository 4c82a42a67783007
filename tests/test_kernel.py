"""The compiled kernel of `combine`: to the bit, on its own. What both paths do: test_combine.py."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from accounting import Operations
from fewstep import _combine, _noise

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

built = pytest.mark.skipif(_combine._kernel is None, reason="installed without a compiler")


def make(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_one_pass(terms, dtype=torch.float32):
    return _combine._one_pass(terms, dtype) is not None


def test_the_kernel_is_built_where_there_is_a_compiler():
    """Its extension is optional, so an installation that lost it would go unnoticed."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    assert _combine._kernel is not None or compiler is None
    assert (_combine._kernel is None) == (_noise._kernel is None)


def rounded(terms, dtype):
    """What the kernel promises, to the bit: every product and sum rounded to `dtype`, the types in
    the order of its list, and within a type the order of the terms."""
    kind = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    total = None
    for _, c, v in sorted(((_combine._KINDS[v.dtype], c, v) for c, v in terms), key=lambda t: t[0]):
        part = kind(c) * v.to(dtype).numpy()
        total = part if total is None else total + part
    return torch.from_numpy(total)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    for k in range(1, 13):
        for size in (1, 7, 511, 512, 513, 1543):
            kinds = [FLOATS[i] for i in rng.integers(4, size=k)]
            for some in (kinds, [kinds[0]] * k, sorted(kinds, key=str)):
                terms = [(float(rng.normal()), make((size,), d, i)) for i, d in enumerate(some)]
                assert torch.equal(_combine._one_pass(terms, dtype), rounded(terms, dtype))
    terms = [
        (0.3, make((1, 5, 250_001), torch.float32)),
        (-1.7, make((1, 5, 250_001), torch.bfloat16, 1)),
    ] * 5
    assert torch.equal(_combine._one_pass(terms, dtype), rounded(terms, dtype))
    assert _combine._one_pass([(1.0, torch.empty(3, 0, 2))], dtype).shape == (3, 0, 2)


@built
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_every_half_precision_number(half, flush):
    """Subnormals, infinities and NaN included, also while the processor flushes subnormals (which
    in bfloat16 are float32's own)."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    want = {d: every.to(d) for d in (torch.float32, torch.float64)}
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        for dtype, values in want.items():
            got = _combine._one_pass([(1.0, every)], dtype)
            if flush and half is torch.bfloat16:
                normal = values.abs() >= torch.finfo(torch.float32).tiny
                got, values = got[normal], values[normal]
            torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)
            sign = torch.signbit(got) == torch.signbit(values)
            assert bool((sign | values.isnan()).all())
    finally:
        torch.set_flush_denormal(False)


@built
def test_a_value_does_not_depend_on_its_place_or_on_the_threads():
    vs = [make((5, 60_007), d, i) for i, d in enumerate(FLOATS * 3)]

    def run(vs):
        terms = [(0.7 - 0.2 * i, v) for i, v in enumerate(vs)]
        return _combine._one_pass(terms, torch.float32)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(vs)
        for part in (slice(0, 1), slice(3, 4), slice(1, 5)):
            assert torch.equal(run([v[part] for v in vs]), whole[part])
        for ends in (slice(3, -5), slice(1, 2), slice(70_000, 70_019)):  # any alignment
            assert torch.equal(run([v.view(-1)[ends] for v in vs]), whole.view(-1)[ends])
        for threads in (2, 3) if _combine._parallel() else ():
            torch.set_num_threads(threads)
            assert torch.equal(run(vs), whole)
    finally:
        torch.set_num_threads(before)


@built
def test_which_layouts_go_in_one_pass():
    shape = (2, 8, 5, 7)
    plain = make(shape, torch.float32)
    last = make(shape, torch.bfloat16, 1).to(memory_format=torch.channels_last)
    terms = [(0.5, last), (2.0, last), (-1.0, last.float())]
    assert in_one_pass(terms)
    got = _combine._one_pass(terms, torch.float32)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, 1.5 * last.float())
    assert not in_one_pass([(0.5, last), (2.0, plain)])
    assert not in_one_pass([(2.0, plain), (0.5, last)])
    assert not in_one_pass([(2.0, plain[..., ::2])])
    assert not in_one_pass([(2.0, plain[:1].expand(shape))])
    # The result has the layout of what it is made of, not of what is skipped.
    skipped = [(0.0, last), (2.0, plain), (0.25, plain)]
    assert in_one_pass(skipped)
    assert torch.equal(_combine._one_pass(skipped, torch.float32), 2.25 * plain)


@built
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, inside
def test_the_kernel_keeps_away_from_whoever_watches():
    x, y = make((3, 4), torch.float32), make((3, 4), torch.float32, 1)

    def terms(v):
        return [(0.5, v), (2.0, y)]

    class Own(torch.Tensor):
        pass

    assert in_one_pass(terms(x))
    assert in_one_pass(terms(x.clone().requires_grad_().detach()))
    with torch.no_grad():
        assert in_one_pass(terms(x.clone().requires_grad_()))
    with torch.inference_mode():
        assert in_one_pass(terms(x))
    for v in (
        x.clone().requires_grad_(),
        x.as_subclass(Own),
        torch.nn.Parameter(x, requires_grad=False),
        torch._neg_view(x),
        torch._efficientzerotensor((3, 4)),
        x.to("meta"),
        x.to_sparse(),
        x.int(),
        x[:2],
    ):
        assert not in_one_pass(terms(v))
        assert not in_one_pass(terms(v)[::-1])
    assert not in_one_pass([(np.ones(4), x), (2.0, y)])
    assert not in_one_pass(terms(x), torch.bfloat16)
    with Operations():
        assert not in_one_pass(terms(x))
    with torch.overrides.BaseTorchFunctionMode():
        assert not in_one_pass(terms(x))
    with forward_ad.dual_level():
        assert not in_one_pass(terms(forward_ad.make_dual(x, y)))
    negative = _combine.combine(terms(torch._neg_view(x)), torch.float32)
    torch.testing.assert_close(negative, 2 * y - 0.5 * x)


@built
def test_the_kernel_refuses_what_does_not_exist():
    x = make((3,), torch.float32)
    with pytest.raises(TypeError, match="terms of three"):
        _combine._kernel(0, 1, 3, x.data_ptr(), 0)
    for arguments in (
        (0, 1, 3, x.data_ptr(), 2, x.data_ptr(), 0, 1.0),  # a result in half precision
        (0, 1, 3, x.data_ptr(), 0, x.data_ptr(), 4, 1.0),
        (0, 1, 3, x.data_ptr(), 0, 0, 0, 1.0),
        (0, 1, 3, 0, 0, x.data_ptr(), 0, 1.0),
        (0, 1, -3, x.data_ptr(), 0, x.data_ptr(), 0, 1.0),
    ):
        with pytest.raises(ValueError, match="does not exist"):
            _combine._kernel(*arguments)
    with pytest.raises(TypeError):
        _combine._kernel(0, 1, 3, x.data_ptr(), 0, x.data_ptr(), 0, "1")
    gone = x.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="does not exist"):
        _combine._one_pass([(1.0, gone)], torch.float32)
