"""Which methods `benchmarks/patches.py` calls better, and which tied."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import patches


def lines(**factors):
    """Errors of methods on two sets of noises: common ones, times a factor for every set."""
    rng = np.random.default_rng(0)
    common = [np.exp(rng.normal(size=40)) for _ in range(2)]
    return {
        name: {
            "errors": [
                (e * f * np.exp(0.1 * rng.normal(size=40))).tolist()
                for e, f in zip(common, both, strict=True)
            ]
        }
        for name, both in factors.items()
    }


def test_pairs_that_differ_in_both_sets_are_not_tied():
    found = patches.order(lines(d=(4, 4), a=(1, 1), b=(1, 1), c=(2, 2)))
    assert [found.rank(m) for m in "abcd"] == [1, 1, 3, 4]
    assert found.ties("a") == ["b"]
    assert not found.ties("c")
    assert found.tied == pytest.approx(1 / 6)
    assert found.names[2:] == ["c", "d"]


def test_pairs_that_change_their_order_are_tied():
    found = patches.order(lines(a=(1, 2), b=(2, 1), c=(8, 8)))
    assert found.ties("a") == ["b"]  # each is surely better in one of the two
    assert [found.rank(m) for m in "abc"] == [1, 1, 3]
    assert [found.changed, found.tied] == pytest.approx([1 / 3, 1 / 3])
    assert found.tau == pytest.approx(1 / 3)
    assert found.rho == pytest.approx(0.5)


def test_pairs_that_differ_in_one_set_only_are_tied():
    found = patches.order(lines(a=(1, 1), b=(3, 1.0)))
    assert found.tied == 1
