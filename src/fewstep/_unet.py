"""The U-Net of the score-SDE papers and of EDM, built from the shapes of its weights.

One module stands for DDPM++ and NCSN++ (Score-Based Generative Modeling through SDEs, arXiv
2011.13456, appendix H) and for the ADM network (arXiv 2105.05233), as both are described in EDM
(arXiv 2206.00364, table 7). With s the scale after every sum, N group normalization, R up- or
downsampling by a fixed filter (or nothing), and e the embedding of the noise level,

    residual block    h = R(silu(N0(x))) * conv0,  h = h + A e  (or N1(h) (1 + A1 e) + A2 e: ADM)
                      x = s (skip(R(x)) + conv1(silu(N1(h)))),   s^2 = 1/2 (ADM: s = 1)
    attention         x = s (x + proj(attend(qkv(N2(x)))))

How many levels and blocks there are, how wide, and where attention is, is read off the names:

    map_layer0, map_layer1, map_label     embedding;   frequencies: of its sines and cosines
    taps                                  of the resampling filter, of sum 1
    enc.{level}.conv|down|block{i}        encoder, from fine (level 0) to coarse
    enc.{level}.aux_residual|aux_skip     the shrunk input, added to what `down` gives
    dec.{level}.in0|in1|up|block{i}       decoder, from coarse to fine
    dec.{level}.aux_norm|aux_conv         outputs, added up from coarse to fine; always at level 0
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UNet"]

_NEEDED = {"norm0", "conv0", "affine", "norm1", "conv1"}
_ATTENTION = {"norm2", "qkv", "proj"}
_NAMES = re.compile(
    r"map_(layer0|layer1|label)"
    r"|enc\.\d+\.(conv|aux_residual|aux_skip)|dec\.\d+\.(aux_norm|aux_conv)"
    r"|(enc\.\d+\.(down|block\d+)|dec\.\d+\.(in0|in1|up|block\d+))"
    rf"\.({'|'.join(sorted(_NEEDED | _ATTENTION))}|skip)"
)
_HEAD = 64  # channels per attention head of ADM; the others have one head


def _filter(x: Tensor, taps: Tensor, gain: float = 1.0) -> dict[str, Any]:
    """A separable filter of every channel by itself, from its one-dimensional taps."""
    kernel = gain * taps[:, None] * taps
    return {"weight": kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1), "groups": x.shape[1]}


def _up(x: Tensor, taps: Tensor) -> Tensor:
    return F.conv_transpose2d(x, **_filter(x, taps, 4.0), stride=2, padding=(len(taps) - 1) // 2)


def _down(x: Tensor, taps: Tensor) -> Tensor:
    return F.conv2d(x, **_filter(x, taps), stride=2, padding=(len(taps) - 1) // 2)


def _down_conv(x: Tensor, taps: Tensor, conv: Any) -> Tensor:
    """A 3x3 convolution and then the filter, padded once; they commute, and this is cheaper."""
    x = F.conv2d(x, **_filter(x, taps), padding=(len(taps) - 1) // 2 + 1)
    return F.conv2d(x, conv.weight, conv.bias, stride=2)


class _Block(nn.Module):
    """Residual block, with attention if it has the parts for it."""

    norm0: nn.Module
    conv0: nn.Module
    affine: nn.Module
    norm1: nn.Module
    conv1: nn.Module
    skip: nn.Module
    norm2: nn.Module
    qkv: nn.Module
    proj: nn.Module

    def __init__(self, kind: str, parts: Mapping[str, nn.Module], adm: bool) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.resample, self.adm = {"up": _up, "down": _down}.get(kind), adm
        self.scale = 1.0 if adm else math.sqrt(0.5)

    def forward(self, x: Tensor, e: Tensor, taps: Tensor) -> Tensor:
        part = self._modules
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h, taps), self.resample(x, taps)
        h = self.conv0(h)
        e = self.affine(e)[:, :, None, None]
        if self.adm:
            scale, shift = e.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + e)
        h = self.conv1(F.silu(h))
        x = self.scale * ((self.skip(x) if "skip" in part else x) + h)
        if "qkv" not in part:
            return x
        heads = x.shape[1] // _HEAD if self.adm else 1
        # channels are (head, channel of the head, one of q k v)
        h = self.qkv(self.norm2(x)).reshape(len(x), heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = h.permute(3, 0, 1, 4, 2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return self.scale * (x + self.proj(h))


class UNet(nn.Module):
    """F(x, t, label): x (batch, channels, height, width), sides divisible by 2^(levels - 1);
    t (batch,); label (batch,) or (), integers, -1 for none.

    shapes: of the weights, by name. adm: the ADM variant.
    """

    frequencies: Tensor
    taps: Tensor
    map_layer0: nn.Module
    map_layer1: nn.Module
    map_label: nn.Linear
    enc: Any
    dec: Any

    def __init__(self, shapes: Mapping[str, Sequence[int]], adm: bool) -> None:
        super().__init__()
        tree: dict[tuple[str, int], dict[str, dict[str, nn.Module]]] = {}
        for name in sorted({k.rpartition(".")[0] for k in shapes} - {""}):
            leaf = _leaf(name, shapes, 1e-5 if adm else 1e-6)
            side, _, rest = name.partition(".")
            if side not in ("enc", "dec"):
                self.add_module(name, leaf)
                continue
            level, kind, *part = rest.split(".")
            tree.setdefault((side, int(level)), {}).setdefault(kind, {})[".".join(part)] = leaf
        self.adm = adm
        for name in ("frequencies", "taps"):
            self.register_buffer(name, torch.zeros(*shapes[name]))
        levels = len(tree) // 2
        self.enc, self.dec = (
            nn.ModuleList(
                nn.ModuleDict({k: self._built(k, v) for k, v in tree[side, i].items()})
                for i in range(levels)
            )
            for side in ("enc", "dec")
        )
        self.labels = int(shapes["map_label.weight"][1]) if "map_label.weight" in shapes else 0

    def _built(self, kind: str, parts: Mapping[str, nn.Module]) -> nn.Module:
        if set(parts) == {""}:
            return parts[""]
        attention = _ATTENTION & set(parts)
        if not _NEEDED.issubset(parts) or attention not in (set(), _ATTENTION):
            raise ValueError(f"a block {kind!r} has the parts {', '.join(sorted(parts))}")
        return _Block(kind, parts, self.adm)

    def _embedded(self, t: Tensor, label: Tensor | None) -> Tensor:
        angle = t.to(self.frequencies)[:, None] * self.frequencies
        e = torch.cat([angle.sin(), angle.cos()], 1)
        of_label: Any = 0.0
        if self.labels and label is not None:
            label = label.expand(len(t))
            of_label = self.map_label.weight.T[label.clamp(min=0)] * (label >= 0)[:, None]
        if not self.adm and self.labels:
            e = e + of_label + self.map_label.bias
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        return F.silu(e + of_label if self.adm else e)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Evaluate the network. Of twice the channels (a learned variance) the first half."""
        e, taps = self._embedded(t, label), self.taps
        channels, aux = x.shape[1], x
        h, skips = x, []
        for level, part in enumerate(self.enc):
            if level == 0:
                h = part["conv"](x)
            else:
                h = part["down"](h, e, taps)
                if "aux_residual" in part:
                    h = aux = math.sqrt(0.5) * (h + _down_conv(aux, taps, part["aux_residual"]))
                elif "aux_skip" in part:
                    aux = _down(aux, taps)
                    h = h + part["aux_skip"](aux)
            skips.append(h)
            for block in _blocks(part):
                h = block(h, e, taps)
                skips.append(h)
        out: Tensor | None = None
        for part in reversed(self.dec):
            for kind in ("in0", "in1", "up"):
                h = part[kind](h, e, taps) if kind in part else h
            for block in _blocks(part):
                h = block(torch.cat([h, skips.pop()], 1), e, taps)
            if "aux_conv" in part:
                more = part["aux_conv"](F.silu(part["aux_norm"](h)))
                out = more if out is None else _up(out, taps) + more
        assert out is not None
        assert not skips
        return out[:, :channels]


def _blocks(part: Any) -> Iterator[nn.Module]:
    i = 0
    while f"block{i}" in part:
        yield part[f"block{i}"]
        i += 1


def _leaf(name: str, shapes: Mapping[str, Sequence[int]], eps: float) -> nn.Module:
    """The layer that has these weights: a convolution, a matrix or a normalization."""
    if not _NAMES.fullmatch(name):
        raise ValueError(f"{name!r} has no place in it")
    weight = tuple(shapes.get(f"{name}.weight", ()))
    bias = name != "map_label" or "map_label.bias" in shapes
    if len(weight) == 4:
        return nn.Conv2d(weight[1], weight[0], weight[2], padding=weight[2] // 2, bias=bias)
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias=bias)
    if len(weight) == 1:
        return nn.GroupNorm(max(1, min(32, weight[0] // 4)), weight[0], eps)
    raise ValueError(f"{name!r} has no weight of a known shape")
