"""Checkpoints of EDM and score-SDE: the outputs of the official code, for the same weights.

golden/checkpoints.safetensors has names, shapes and answers of twelve small networks of the two
official repositories (the commits are in the file); the weights follow from the names.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fewstep as fs
from fewstep._checkpoints import FORMULATIONS, load_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "checkpoints.safetensors"
with safe_open(GOLDEN, "pt") as file:
    _META = file.metadata()
    _TENSORS = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
SHAPES, ABOUT = json.loads(_META["shapes"]), json.loads(_META["about"])


def golden(case: str, kind: str) -> torch.Tensor:
    return _TENSORS[f"{case}/{kind}"]


def weight(name: str, shape: list[int]) -> torch.Tensor:
    """Of order one in every layer, and known by its name."""
    name = name.removeprefix("module.")
    v = np.random.default_rng([0, *name.encode()]).standard_normal(shape)
    if len(shape) > 1:
        v /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith(("freqs", "all_modules.0.W")):
        v *= 2
    else:
        v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    return torch.tensor(v, dtype=torch.float32)


def state(case: str) -> dict[str, torch.Tensor]:
    return dict(_state(case))


@functools.cache
def _state(case: str) -> dict[str, torch.Tensor]:
    made = {k: weight(k, shape) for k, shape in SHAPES[case].items()}
    fixed = f"{case}/fixed/"
    return {**made, **{k.removeprefix(fixed): v for k, v in _TENSORS.items() if fixed in k}}


def loaded(tmp_path, weights, formulation=None, meta=None, **settings) -> fs.Denoiser:
    save_file(weights, tmp_path / "file", metadata=meta)
    return load_checkpoint(tmp_path / "file", formulation, **settings)


@pytest.mark.parametrize("case", SHAPES)
def test_outputs_of_the_official_code(case, tmp_path):
    about = ABOUT[case]
    model = loaded(tmp_path, state(case), about["formulation"], **about["settings"])
    x, at, want = (golden(case, k) for k in ("x", "at", "D"))
    cond = {"label": golden(case, "label")} if f"{case}/label" in _TENSORS else {}
    if case.startswith("score"):  # their time; images of the exploding variance in [0, 1]
        t = at.numpy()
        x = 2 * x - 1 if about["formulation"] == "ve" else x
    else:  # EDM's sigma, of x / alpha
        t = model.process.time(-np.log(at.numpy()))
        x = x * torch.as_tensor(model.process.alpha(t)).float().reshape(-1, 1, 1, 1)
    got = model(x, t, **cond)
    assert got.dtype == torch.float32
    each = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert each.max() < 1e-5
    assert (golden(case, "x") - want).abs().max() > 1  # the network has a say


def test_every_formulation_is_tested():
    assert {about["formulation"] for about in ABOUT.values()} == set(FORMULATIONS)


@pytest.mark.parametrize("case", ["edm-ddpmpp-class", "ve-ncsnpp", "score-ddpmpp", "iddpm-adm"])
def test_they_sample(case, tmp_path):
    model = loaded(tmp_path, state(case), ABOUT[case]["formulation"])
    channels = golden(case, "x").shape[1]
    cond = {}
    if f"{case}/label" in _TENSORS:
        cond = {"label": torch.tensor([1, 2])}
        model = fs.Guided(model, 2.0, {"label": -1})
    x = fs.sample(model, (2, channels, 16, 8), nfe=3, cond=cond)  # fully convolutional
    assert x.shape == (2, channels, 16, 8)
    assert torch.isfinite(x).all()
    several = fs.sample(model, (2, channels, 16, 8), nfe=3, cond=cond, dtype=torch.float64)
    assert several.dtype == torch.float64


def test_labels(tmp_path):
    model = loaded(tmp_path, state("edm-adm"), "edm")
    x = golden("edm-adm", "x")
    none = model(x, 1.0)
    assert torch.equal(model(x, 1.0, label=torch.full((3,), -1)), none)
    one = model(x, 1.0, label=torch.tensor(1))
    assert torch.equal(model(x, 1.0, label=torch.tensor([1, 1, 1])), one)
    assert not torch.allclose(one, none, atol=1e-3)
    with pytest.raises(IndexError):
        model(x, 1.0, label=torch.tensor([0, 1, 4]))


def test_what_the_file_says_and_what_the_call_says(tmp_path):
    weights = state("edm-ddpmpp-class")
    meta = {"formulation": "edm", "settings": json.dumps({"sigma_data": 0.7})}
    x = golden("edm-ddpmpp-class", "x")
    by_file = loaded(tmp_path, weights, meta=meta)(x, 1.0)
    assert torch.equal(by_file, loaded(tmp_path, weights, "edm", sigma_data=0.7)(x, 1.0))
    other = loaded(tmp_path, weights, meta=meta, sigma_data=0.5)(x, 1.0)
    assert not torch.allclose(other, by_file, atol=1e-3)
    plain = {k.removeprefix("model."): v for k, v in weights.items()}
    assert torch.equal(loaded(tmp_path, plain, meta=meta)(x, 1.0), by_file)
    half = {k: v.half() for k, v in plain.items()}
    assert torch.allclose(loaded(tmp_path, half, meta=meta)(x, 1.0), by_file, atol=0.05)
    # score-SDE's exploding variance: the range is in its table, doubled for [-1, 1]
    ve = loaded(tmp_path, state("score-ncsnpp-skip")).process
    assert (ve.sigma(0.0), ve.sigma(1.0)) == pytest.approx((0.02, 2 * 348))


_UNLIKE = torch.tensor([[0.1, 0.4], [0.1, 0.4]])[None, None]


def without(case, *names):
    return {k: v for k, v in state(case).items() if not k.endswith(names)}


@pytest.mark.parametrize(
    ("weights", "formulation", "words"),
    [
        (lambda: state("score-ddpmpp"), None, "give formulation, one of ddpm, edm"),
        (lambda: state("score-ddpmpp"), "vpp", "did you mean 'vp'"),
        (lambda: state("score-ddpmpp"), "ve", "this one has positional"),
        (lambda: state("score-ncsnpp"), "vp", "this one has fourier"),
        (lambda: {"a.weight": torch.zeros(1)}, "vp", "holds a.weight ...; need the names"),
        (lambda: without("edm-adm", "block0.conv1.weight"), "edm", "make no DDPM"),
        (lambda: without("edm-adm", "block0.norm1.weight"), "edm", "make no DDPM"),
        (lambda: without("edm-adm", "norm2.weight", "norm2.bias"), "edm", "make no DDPM.*parts"),
        (lambda: without("edm-adm", "4x4_in0.conv0.bias"), "edm", "make no DDPM"),
        (lambda: without("vp-ddpmpp", "8x8_aux_conv.weight"), "vp", "make no DDPM"),
        (lambda: {**state("vp-ddpmpp"), "extra.weight": torch.ones(3)}, "vp", "'extra' has no"),
        (lambda: {**state("vp-ddpmpp"), "model.map_layer1.bias": torch.ones(3)}, "vp", "make no"),
        (lambda: without("score-ddpmpp", "NIN_3.W"), "vp", "has unknown as module"),
        (lambda: without("score-ddpmpp", "Conv_2.weight"), "vp", "residual blocks"),
        (
            lambda: {**state("score-ddpmpp"), "module.all_modules.99.weight": torch.ones(3)},
            "vp",
            "modules, where",
        ),
        (
            lambda: {**state("vp-ddpmpp"), "model.enc.4x4_down.conv0.resample_filter": _UNLIKE},
            "vp",
            "filters that differ",
        ),
        (lambda: state("edm-adm"), "iddpm", "table of noise levels"),
    ],
)
def test_what_does_not_fit_is_refused(weights, formulation, words, tmp_path):
    with pytest.raises(ValueError, match=f"path = .*{words}"):
        loaded(tmp_path, weights(), formulation)


def test_other_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path / "nothing")
    torch.save(state("vp-ddpmpp"), tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="fewstep convert"):
        load_checkpoint(tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="did you mean 'sigma_data'"):
        loaded(tmp_path, state("vp-ddpmpp"), "vp", sigma_dat=0.5)
