"""What ships with the package: networks that denoise, classifiers that know the data, and their
features, which react to what is wrong with images. None of it needs the packages of training."""

from __future__ import annotations

import itertools
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import load

import fewstep as fs
from fewstep import metrics

PATCHES = ("patches-edm", "patches-flow")
WEIGHTS = files("fewstep.models") / "weights"


def stored(name):
    return load((WEIGHTS / f"{name}.safetensors").read_bytes())


def digits():
    """Images and labels, (1500 and 297, 1, 8, 8), in the order of training/train_digits.py."""
    data = load((files("fewstep.exact") / "data" / "digits.safetensors").read_bytes())
    order = np.random.default_rng(0).permutation(1797)
    images, labels = data["images"][order].float()[:, None] / 8 - 1, data["labels"][order]
    return images[297:], labels[297:], images[:297], labels[:297]


# Denoisers


@pytest.mark.parametrize("name", fs.models.models)
def test_every_model_runs_and_says_what_it_is(name):
    known = fs.models.find(name)
    assert known.name == name
    assert known.summary
    assert known.features is None or known.features in fs.models.classifiers
    model = fs.models.load(name)
    cond = {"label": torch.tensor([0, known.classes - 1])} if known.classes else None
    x = fs.sample(model, (2, *known.shape), nfe=2, cond=cond, progress=False)
    assert x.shape == (2, *known.shape)
    assert x.isfinite().all()
    if known.features is not None:
        f = metrics.features(x, metrics.bundled_features(known.features))
        assert f.shape == (2, fs.models.classifier(known.features).width)


@pytest.mark.parametrize("file", [f.name for f in WEIGHTS.iterdir() if f.name != "README.md"])
def test_files_are_small_and_stored_in_half_precision(file):
    data = (WEIGHTS / file).read_bytes()
    assert len(data) <= (8e6 if file in {f"{name}.safetensors" for name in PATCHES} else 3e6)
    for name, tensor in load(data).items():
        assert tensor.dtype == (torch.uint8 if "labels" in name else torch.float16), name
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("name", PATCHES)
def test_photograph_models_are_told_their_time_and_scaled(name):
    model = fs.models.load(name)
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in model.network.parameters())
    told = []
    hook = model.network.register_forward_pre_hook(lambda _, given: told.append(given))
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 0.4
    data = model(x, t)
    hook.remove()
    x_in, time = told[0]
    out = model.network(x_in, time)
    if name == "patches-flow":
        torch.testing.assert_close(time, torch.full((2,), t))
        torch.testing.assert_close(x_in, x)
        torch.testing.assert_close(data, x - t * out)
    else:
        total = (t**2 + 0.53**2) ** 0.5
        torch.testing.assert_close(time, torch.full((2,), np.log(t) / 4, dtype=torch.float32))
        torch.testing.assert_close(x_in, x / total)
        torch.testing.assert_close(data, (0.53 / total) ** 2 * x + t * 0.53 / total * out)


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("side", [(32, 32), (64, 48)])
def test_photograph_models_remove_noise(name, side):
    model = fs.models.load(name)
    clean = fs.sample(model, (4, 3, *side), nfe=16, seed=3, progress=False)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for lam, left in ((1.5, 0.4), (0.5, 0.25)):
        t = float(model.process.time(lam))
        level = model.process.level(t)
        data = model(float(level.alpha) * clean + float(level.sigma) * noise, t)
        rms = float((data - clean).square().mean().sqrt())
        assert rms < left * float(level.sigma / level.alpha), (lam, rms)


@pytest.mark.parametrize("name", PATCHES)
def test_photograph_models_have_derivatives_and_other_precisions(name):
    model, exact, rough = (fs.models.load(name) for _ in range(3))
    exact.network.double()
    rough.network.bfloat16()
    x, w = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    data = model(x, 0.6)
    torch.testing.assert_close(model(x[1:], 0.6), data[1:], atol=1e-5, rtol=1e-5)
    precise = exact(x.double(), 0.6)
    torch.testing.assert_close(data.double(), precise, atol=1e-5, rtol=1e-5)
    assert float((rough(x, 0.6) - data).square().mean().sqrt()) < 0.02

    def of(v):
        return exact(v, 0.6)

    _, forward = torch.func.jvp(of, (x.double(),), (w.double(),))
    _, back = torch.func.vjp(of, x.double())
    torch.testing.assert_close((forward * w).sum(), (back(w.double())[0] * w).sum())
    ahead = (of(x.double() + 1e-5 * w) - of(x.double() - 1e-5 * w)) / 2e-5
    torch.testing.assert_close(forward, ahead, atol=1e-6, rtol=1e-6)


# Classifiers


@pytest.mark.parametrize("name", fs.models.classifiers)
def test_features_are_standard_and_classify_what_is_held_out(name):
    net, file = fs.models.classifier(name), stored(f"{name}-features")
    for held_out, part in ((False, "train"), (True, "held")):
        f, labels = fs.models.data_features(name, held_out), file[f"{part}_labels"]
        assert f.shape == (len(labels), net.width)
        assert f.dtype == torch.float32
        assert len(f) <= 2000
        right = net.logits(f).argmax(1) == labels
        assert right.double().mean() > (0.97 if name == "digits" else 0.85)
        assert set(labels.tolist()) == set(range(len(net.names)))
    f = fs.models.data_features(name)
    torch.testing.assert_close(f.mean(0), torch.zeros(net.width), atol=2e-3, rtol=0)
    torch.testing.assert_close(f.std(0), torch.ones(net.width), atol=2e-3, rtol=0)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", fs.models.classifiers)
def test_classifiers_are_functions_of_each_image(name):
    net = fs.models.classifier(name)
    x = torch.randn(5, *net.body.shape, generator=torch.Generator().manual_seed(0))
    f = metrics.bundled_features(name)(x)
    assert torch.equal(f, net.features(x))
    assert torch.equal(f, fs.models.classifier(name).features(x))
    torch.testing.assert_close(f[2:3], net.features(x[2:3]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(x), net.logits(f))
    assert net(x.double()).shape == (5, len(net.names))
    precise = fs.models.classifier(name).double().features(x.double())
    torch.testing.assert_close(precise.float(), f, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"x has shape \(5, .*; need images \(n, "):
        net.features(x[..., :-1])
    with pytest.raises(ValueError, match="x has shape"):
        net.features(x[0])


def test_stored_features_are_those_of_the_digits():
    train, _, held, _ = digits()
    net = fs.models.classifier("digits")
    for x, held_out in ((train, False), (held, True)):
        found = metrics.features(x, net.features)
        torch.testing.assert_close(
            found, fs.models.data_features("digits", held_out), atol=2e-3, rtol=2e-3
        )
    assert net(held).argmax(1).eq(digits()[3]).double().mean() > 0.97


def test_features_react_to_noise_blur_and_missing_digits():
    x, labels, *_ = digits()
    f, data = metrics.bundled_features("digits"), fs.models.data_features("digits")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def distance(images):
        return metrics.frechet_distance(metrics.features(images, f), data)

    noisy = [distance(x + s * noise) for s in (0.0, 0.05, 0.1, 0.2, 0.4)]
    assert noisy[0].low < 0 < noisy[0].high
    for one, more in itertools.pairwise(noisy):
        assert one.high < more.low
    held = metrics.frechet_distance(fs.models.data_features("digits", True), data)
    assert held.low < 0 < held.high
    line = torch.tensor([0.1, 0.8, 0.1])
    kernel = (line[:, None] * line)[None, None]
    assert distance(torch.nn.functional.conv2d(x, kernel, padding=1)).low > 10
    missing = [distance(x[labels >= first]) for first in (1, 2, 5)]
    assert missing[0].low > 0
    for one, more in itertools.pairwise(missing):
        assert one.value < more.value
    assert distance(x.flip(2)).low > missing[0].high


def test_unknown_names_are_refused():
    for call in (
        fs.models.find,
        fs.models.load,
        fs.models.classifier,
        fs.models.data_features,
        metrics.bundled_features,
    ):
        with pytest.raises(ValueError, match=r"(model|classifier) = 'digit'.*'?digits'?"):
            call("digit")


@pytest.mark.slow
def test_nothing_of_training_is_needed():
    code = (
        "import sys; sys.modules.update(sklearn=None, skimage=None, scipy=None)\n"
        "import fewstep as fs\n"
        "for name in fs.models.classifiers:\n"
        "    net = fs.models.classifier(name)\n"
        "    print(name, *net.logits(fs.models.data_features(name)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["digits", "1500", "10", "photographs", "2000", "6"]
