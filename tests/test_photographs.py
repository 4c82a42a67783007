"""The crops of photographs in training/photographs.py, and how features of them react."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep import metrics

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

FILE = Path(__file__).resolve().parents[1] / "training" / "photographs.py"


@pytest.fixture(scope="module")
def photographs():
    spec = importlib.util.spec_from_file_location("photographs", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(photographs):
    return photographs.Photographs()


def test_what_is_held_out_is_the_rest_of_every_photograph(photographs, train):
    held = photographs.Photographs(held_out=True)
    assert len(train.pictures) == len(held.pictures) == 24
    assert fs.models.classifier("photographs").names == photographs.NAMES
    for (number, left), (other, right) in zip(train.pictures, held.pictures, strict=True):
        assert number == other
        assert left.shape[0] == right.shape[0]
        assert left.shape[2] == 3
        share = right.shape[1] / (left.shape[1] + right.shape[1])
        assert share == pytest.approx(0.3, abs=0.01)
        assert min(*left.shape[:2], *right.shape[:2]) >= photographs.SIDE


def test_crops_are_parts_of_the_photograph_they_name(photographs, train):
    crops, labels = train.crops(12, np.random.default_rng(0))
    assert crops.dtype == np.uint8
    assert crops.shape == (12, 32, 32, 3)
    again, names = train.crops(12, np.random.default_rng(0))
    assert np.array_equal(crops, again)
    assert np.array_equal(labels, names)
    for crop, label in zip(crops, labels, strict=True):
        found = False
        for number, picture in train.pictures:
            if number == label:
                for one in (crop, crop[:, ::-1]):
                    places = np.argwhere((picture[:-31, :-31] == one[0, 0]).all(-1))
                    found |= any(
                        np.array_equal(picture[i : i + 32, j : j + 32], one) for i, j in places
                    )
        assert found


def test_photographs_are_equally_likely_but_for_flat_crops(photographs, train):
    crops, labels = train.crops(1500, np.random.default_rng(1))
    flat = crops.std(axis=(1, 2)).mean(1) < photographs.FLAT_STD
    assert flat.mean() < 0.15
    parts = np.bincount(labels, minlength=6) / 1500
    assert parts.min() > 0.06
    assert parts.max() < 0.25
    x = photographs.to_float(crops)
    assert x.shape == (1500, 3, 32, 32)
    assert x.dtype == torch.float32
    assert float(x.abs().max()) <= 1
    assert x[3, 2, 4, 5] == pytest.approx(crops[3, 4, 5, 2] / 127.5 - 1)
    assert float(x.std()) == pytest.approx(0.53, abs=0.02)  # SIGMA_DATA of the networks


def blurred(x):
    return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def test_features_react_to_noise_blur_colour_and_missing_photographs(photographs, train):
    crops, labels = train.crops(600, np.random.default_rng(2))
    x = photographs.to_float(crops)
    f, data = metrics.bundled_features("photographs"), fs.models.data_features("photographs")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def distance(images):
        return metrics.frechet_distance(metrics.features(images, f), data)

    noisy = [distance(x + s * noise) for s in (0.0, 0.05, 0.1, 0.2, 0.4)]
    assert abs(noisy[0].value) < 0.3
    assert noisy[0].value < noisy[1].value
    for one, more in itertools.pairwise(noisy[1:]):
        assert one.high < more.low
    assert distance(blurred(x)).low > noisy[0].high
    assert distance(x + torch.tensor([0.2, 0.0, -0.2])[:, None, None]).low > noisy[0].high
    assert distance(x[torch.from_numpy(labels != 3)]).low > noisy[0].high
