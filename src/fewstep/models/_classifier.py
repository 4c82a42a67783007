"""The networks behind Frechet distances: small classifiers of the data of the bundled models.

Their features are few (32 and 48), so that some hundred samples have a mean and a covariance, and
see what a sampler may get wrong: besides its classes each network was trained to tell noise and
blur in an image, and the one for photographs how it was turned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, silu

__all__ = ["CLASSIFIERS", "Classifier", "DigitsBody", "PhotographsBody"]


class DigitsBody(nn.Module):
    """(n, 1, 8, 8) to (n, 1024): three convolutions, the last at half the side."""

    shape = (1, 8, 8)
    out = 1024

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 32), (32, 48), (48, 64))
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.convs
        h = silu(second(silu(first(x))))
        return silu(third(avg_pool2d(h, 2))).flatten(1)


class PhotographsBody(nn.Module):
    """(n, 3, 32, 32) to (n, 392): four convolutions, each at half the side of the one before.

    Means of all of them are kept, which tell colour and texture, and means over the quarters of the
    last, which tell what is where. Nothing is normalised: that would hide contrast and noise.
    """

    shape = (3, 32, 32)
    widths = (24, 48, 64, 64)
    out = sum(widths[:-1]) + 4 * widths[-1]

    def __init__(self) -> None:
        super().__init__()
        before = (3, *self.widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(before, self.widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        h, kept = x, []
        for level, conv in enumerate(self.convs):
            h = silu(conv(avg_pool2d(h, 2) if level else h))
            kept.append(h.mean((2, 3)))
        return torch.cat([*kept[:-1], adaptive_avg_pool2d(h, 2).flatten(1)], 1)


class Classifier(nn.Module):
    """body, a linear layer to z (n, width), and logits linear in silu(z).

    The features are z less its mean over the data, in units of its standard deviation.

    names: of the classes. pretext: number of the things that may have been done to an image; its
        logits served training only.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: DigitsBody | PhotographsBody,
        width: int,
        names: tuple[str, ...],
        pretext: int,
    ) -> None:
        super().__init__()
        self.width, self.names = width, names
        self.body = body
        self.project = nn.Linear(body.out, width)
        self.head = nn.Linear(width, len(names))
        self.pretext = nn.Linear(width, pretext)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def features(self, x: Tensor) -> Tensor:
        """Features (n, width) of images (n, *shape) in [-1, 1]; values outside count as they are.

        Computed and returned in the dtype of the weights.
        """
        if x.shape[1:] != self.body.shape:
            need = ", ".join(map(str, self.body.shape))
            raise ValueError(f"x has shape {tuple(x.shape)}; need images (n, {need})")
        z = self.project(self.body(x.to(self.mean.dtype)))
        return (z - self.mean) / self.std

    def logits(self, features: Tensor) -> Tensor:
        """Logits (n, classes) from features (n, width)."""
        return self.head(silu(features * self.std + self.mean))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, *shape)."""
        return self.logits(self.features(x))


#: Nothing, noise of four strengths, blur of two.
_DONE = 7


def _digits() -> Classifier:
    return Classifier(DigitsBody(), 32, tuple("0123456789"), _DONE)


def _photographs() -> Classifier:
    names = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower")
    return Classifier(PhotographsBody(), 48, names, 4 * _DONE)  # four directions


CLASSIFIERS = {"digits": _digits, "photographs": _photographs}
