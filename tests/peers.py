"""Packages that tests compare with, where they are installed (`tests/peers.txt`)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import warnings
from typing import Any

import pytest
import torch

#: deepinv imports torchvision, which needs these operators when it is imported; its library brings
#: none where it was built for another torch. Nobody calls them here.
OPERATORS = """nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
roi_align(Tensor x, Tensor rois, float scale, int h, int w, int ratio, bool aligned) -> Tensor
roi_pool(Tensor x, Tensor rois, float scale, int h, int w) -> (Tensor, Tensor)
ps_roi_align(Tensor x, Tensor rois, float scale, int h, int w, int ratio) -> (Tensor, Tensor)
ps_roi_pool(Tensor x, Tensor rois, float scale, int h, int w) -> (Tensor, Tensor)
deform_conv2d(Tensor i, Tensor w, Tensor o, Tensor m, Tensor b, int a, int c, int d, int e, int f,\
 int g, int h, int j, bool k) -> Tensor"""


@functools.cache
def _torchvision() -> Any:
    """Make torchvision importable; what is returned has to live on."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in OPERATORS.splitlines():
            with contextlib.suppress(RuntimeError):
                library.define(operator)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return library
    return None


def deepinv() -> Any:
    """The package, or the test is skipped."""
    if importlib.util.find_spec("deepinv") is None:
        pytest.skip("deepinv is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _torchvision()
        import deepinv

        return deepinv
