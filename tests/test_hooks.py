"""Hooks on the data prediction: the published rule, for any shape and type, sample by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs

LEVEL = fs.EDM().level(1.0)
SHAPES = [(3,), (3, 7), (2, 3, 8, 8), (2, 4, 3, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantile", [0.3, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_the_published_rule(shape, quantile):
    D = torch.from_numpy(np.random.default_rng(0).normal(size=shape)) * 3
    for floor, ceiling in ((1.0, math.inf), (0.1, 2.0), (1.0, 1.0)):
        got = fs.dynamic_threshold(quantile, floor, ceiling)(D, LEVEL)
        for sample, result in zip(D.numpy(), got.numpy(), strict=True):
            s = min(max(np.quantile(np.abs(sample), quantile), floor), ceiling)
            np.testing.assert_allclose(result, np.clip(sample, -s, s) / s, rtol=1e-13)


def test_small_predictions_pass_and_a_ceiling_of_one_is_a_clip():
    D = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fs.dynamic_threshold()(D * 0.05, LEVEL), D * 0.05)
    assert torch.equal(fs.dynamic_threshold(ceiling=1.0)(D * 5, LEVEL), fs.clip()(D * 5, LEVEL))
    assert float(fs.dynamic_threshold()(D * 5, LEVEL).abs().max()) <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "hook", [fs.clip(), fs.dynamic_threshold(0.9), fs.chain(fs.clip(-2, 3), fs.clip(-1, 1))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_sample_by_itself_in_its_own_type(shape, hook, dtype):
    D = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    whole = hook(D, LEVEL)
    assert whole.dtype == dtype
    assert whole.shape == D.shape
    for i in range(shape[0]):
        assert torch.equal(whole[i : i + 1], hook(D[i : i + 1], LEVEL))
    exact = hook(D.double(), LEVEL)
    assert float((whole.double() - exact).abs().max()) <= 4 * torch.finfo(dtype).eps


def test_more_elements_than_torch_ranks_at_once():
    D = torch.zeros(2, 2**23 + 1)
    D[:, -(2**18) :] = 4.0
    got = fs.dynamic_threshold(0.995)(D, LEVEL)
    assert got.unique().tolist() == [0.0, 1.0]


def test_hooks_are_values_and_chain_in_order():
    assert fs.clip(-1, 1) == fs.clip()
    assert hash(fs.dynamic_threshold(0.9)) == hash(fs.dynamic_threshold(0.9))
    D = torch.tensor([[-4.0, 0.5, 4.0]])
    double = fs.chain(lambda D, level: 2 * D, fs.clip(-3, 5))
    assert double(D, LEVEL).tolist() == [[-3.0, 1.0, 5.0]]
    assert torch.equal(fs.chain()(D, LEVEL), D)


@pytest.mark.parametrize("form", ["ddim", "dpmpp_2m", "dpm_solver_2m", "flow_ab2"])
def test_a_run_sees_corrected_predictions_only(form):
    """Also where rows are written in the noise prediction: the run is that of a clipped network."""
    model = fs.Denoiser(lambda x, t: 3 * torch.sin(5 * x), fs.VP(), "data")
    clipped = fs.Denoiser(lambda x, t: (3 * torch.sin(5 * x)).clamp(-1, 1), fs.VP(), "data")
    options = {"solver": form, "nfe": 6, "seed": 3, "dtype": torch.float64}
    hooked = fs.sample(model, (4, 5), hook=fs.clip(), **options)
    plain = fs.sample(clipped, (4, 5), **options)
    assert torch.equal(hooked, plain)
    assert not torch.equal(hooked, fs.sample(model, (4, 5), **options))


def test_refusals():
    for bad in (
        lambda: fs.clip(1, 1),
        lambda: fs.clip(float("nan"), 1),
        lambda: fs.dynamic_threshold(0.0),
        lambda: fs.dynamic_threshold(1.1),
        lambda: fs.dynamic_threshold(floor=0.0),
        lambda: fs.dynamic_threshold(floor=2.0, ceiling=1.0),
        lambda: fs.dynamic_threshold(floor=math.inf),
        lambda: fs.chain(fs.clip(), 3),
    ):
        with pytest.raises(ValueError, match="need"):
            bad()
