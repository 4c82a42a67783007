"""The network of the bundled digits model: a class-conditional residual MLP on 8x8 images.

It is the raw network F of the EDM preconditioning (Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, https://arxiv.org/abs/2206.00364, section 5):

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise),   c_noise = log(sigma) / 4.

The scalings are not part of this module; the denoiser that wraps it applies them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["SIGMA_DATA", "UNCONDITIONAL", "DigitsNet"]

SIDE = 8
CLASSES = 10
# The label that stands for "no label"; it was trained by replacing labels at random.
UNCONDITIONAL = 10
# Standard deviation of the data over all pixels and images (0.752), rounded; fixed by training.
SIGMA_DATA = 0.75


class _Block(nn.Module):
    """h + W2 silu(W1 (scale(e) * norm(h) + shift(e))), with h (B, width) and e (B, cond_width)."""

    def __init__(self, width: int, cond_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(cond_width, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        # Each block starts as the identity, so that depth does not slow the first steps.
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.film(e).chunk(2, dim=-1)
        u = self.norm(h) * (1 + scale) + shift
        return h + self.outer(self.dropout(nn.functional.silu(self.inner(u))))


class DigitsNet(nn.Module):
    """Raw network F(x, c_noise, label) for images of shape (1, 8, 8).

    The default sizes are those of the stored weights. ``dropout`` acts in training mode only and
    has no parameters.
    """

    frequencies: Tensor

    def __init__(
        self,
        width: int = 304,
        depth: int = 5,
        cond_width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # 16 frequencies from 1/8 to 4 periods per unit of c_noise, which spans 2.65 units (sigma
        # from 0.002 to 80): the sine of the lowest is monotone there, and the highest has one
        # period per factor e in sigma.
        frequencies = 2 * math.pi * torch.logspace(-3, 2, 16, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise = nn.Linear(2 * len(frequencies), cond_width)
        self.label = nn.Embedding(CLASSES + 1, cond_width)
        self.mix = nn.Linear(cond_width, cond_width)
        self.enter = nn.Linear(SIDE * SIDE, width)
        self.blocks = nn.ModuleList(_Block(width, cond_width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, SIDE * SIDE)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """Evaluate F.

        x: scaled noisy images c_in x, (B, 1, 8, 8).
        c_noise: log(sigma) / 4, (B,) or ().
        label: class 0..9, or 10 for none, int64 (B,) or ().
        Returns F of the shape and dtype of x; computed in the dtype of the weights.
        """
        batch, dtype = x.shape[0], self.enter.weight.dtype
        angle = c_noise.to(dtype).expand(batch)[:, None] * self.frequencies.to(dtype)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        e = nn.functional.silu(self.noise(features) + self.label(label.expand(batch)))
        e = nn.functional.silu(self.mix(e))
        h = self.enter(x.flatten(1).to(dtype))
        for block in self.blocks:
            h = block(h, e)
        return self.leave(self.norm(h)).reshape(x.shape).to(x.dtype)
