"""One thread per test process: pytest-xdist already fills the cores, and torch's own threads on top
of that make tiny tensors many times slower."""

from __future__ import annotations

import collections

import pytest
import torch

torch.set_num_threads(1)

#: Tests with at least so many cases are combinations, of which a share may stand for all.
MANY = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=int,
        default=1,
        help=f"of tests with {MANY} cases or more, run one case in so many",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.getoption("--share")
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            cases[item.nodeid.split("[")[0]].append(item)
    left = [
        item
        for its in cases.values()
        if len(its) >= MANY
        for i, item in enumerate(its)
        if i % share
    ]
    if left:
        gone = set(left)
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in gone]
