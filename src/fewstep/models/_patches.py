"""The network of the bundled photograph models: a small residual U-Net on RGB images.

Two models use it, each with its own weights: the raw network F of the EDM preconditioning (Karras
et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
https://arxiv.org/abs/2206.00364, section 5), and the velocity of a linear path (flow matching,
Lipman et al., 2022, https://arxiv.org/abs/2210.02747). The denoisers that wrap it apply the
scalings.

It works on squares of 2x2 pixels (12 channels at half the side), for most of its arithmetic would
be spent at full size otherwise, and is convolutional: trained on 32x32, it takes any sides that are
multiples of 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pixel_shuffle, pixel_unshuffle, silu

__all__ = ["SIGMA_DATA", "TIMES", "PatchesNet"]

# Standard deviation of the training data over all pixels and crops (0.533), rounded; fixed by
# training.
SIGMA_DATA = 0.53
#: What the network's time spans: log(sigma) / 4 for sigma from 0.002 to 80; t of the flow.
TIMES = {"edm": 2.65, "flow": 1.0}


def _zero(conv: nn.Conv2d) -> None:
    for p in conv.parameters():
        nn.init.zeros_(p)


class _Block(nn.Module):
    """skip(h) + conv(silu(scale(e) * norm(conv(silu(norm(h)))) + shift(e))), h (B, C, H, W)."""

    def __init__(self, wide: int, narrow: int, cond_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, wide)
        self.inner = nn.Conv2d(wide, narrow, 3, padding=1)
        self.film = nn.Linear(cond_width, 2 * narrow)
        self.middle = nn.GroupNorm(8, narrow, affine=False)
        self.outer = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.skip = nn.Conv2d(wide, narrow, 1) if wide != narrow else nn.Identity()
        _zero(self.outer)  # each block starts as its skip: depth does not slow the first steps

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        u = self.inner(silu(self.norm(h)))
        scale, shift = self.film(e)[:, :, None, None].chunk(2, dim=1)
        return self.skip(h) + self.outer(silu(self.middle(u) * (1 + scale) + shift))


class PatchesNet(nn.Module):
    """Network F(x, time) for images (B, 3, H, W), H and W multiples of 8.

    span: range of `time`, which the features of it resolve. The default sizes are those of the
    stored weights.
    """

    frequencies: Tensor

    def __init__(
        self, span: float, widths: tuple[int, ...] = (48, 96, 128), cond_width: int = 128
    ) -> None:
        super().__init__()
        # 16 frequencies from 1/3 of a period to 10 periods over the span: the sine of the lowest is
        # monotone on two thirds of it, and no level is finer than the highest tells apart.
        frequencies = 2 * math.pi / span * torch.logspace(math.log10(1 / 3), 1, 16)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Linear(2 * len(frequencies), cond_width)
        self.mix = nn.Linear(cond_width, cond_width)
        self.enter = nn.Conv2d(12, widths[0], 3, padding=1)
        before = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(
            _Block(a, b, cond_width) for a, b in zip(before, widths, strict=True)
        )
        self.bottom = _Block(widths[-1], widths[-1], cond_width)
        after = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            _Block(b + a, a, cond_width) for a, b in zip(widths, after, strict=True)
        )
        self.norm = nn.GroupNorm(8, widths[0])
        self.leave = nn.Conv2d(widths[0], 12, 3, padding=1)
        _zero(self.leave)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Evaluate F.

        x: scaled noisy images, (B, 3, H, W).
        time: (B,) or (); log(sigma) / 4 or t.
        Returns F of the shape and dtype of x; computed in the dtype of the weights.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; need (B, 3, H, W) with H and W multiples of 8"
            )
        batch, dtype = x.shape[0], self.enter.weight.dtype
        angle = time.to(dtype).expand(batch)[:, None] * self.frequencies.to(dtype)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        e = silu(self.mix(silu(self.time(features))))
        h, kept = self.enter(pixel_unshuffle(x.to(dtype), 2)), []
        for level, block in enumerate(self.down):
            h = block(avg_pool2d(h, 2) if level else h, e)
            kept.append(h)
        h = self.bottom(h, e)
        for level, block in reversed(list(enumerate(self.up))):
            h = block(torch.cat([h, kept[level]], dim=1), e)
            h = interpolate(h, scale_factor=2.0) if level else h
        return pixel_shuffle(self.leave(silu(self.norm(h))), 2).to(x.dtype)
