"""Checkpoints of EDM and of score-SDE as denoisers: safetensors in, never a pickle.

Both families are the same networks under other names, and the same paths in other coordinates.
Images are in [-1, 1]; with F the raw output:

    formulation  process                       D from x and F               the network is told
    edm          EDM()                         `fewstep.edm(sigma_data)`    log(sigma) / 4
    vp           VP(0.1, 20)                   F = eps                      999 t
    subvp        sigma = 1 - exp(-B) of VP     F = eps                      999 t
    ddpm         DiscreteVP.linear()           F = eps                      t = 0 .. 999
    iddpm        the checkpoint's own table    F = eps                      t = 0 .. n - 1
    ve           VE(0.02, 100)                 F = -eps                     log(sigma / 2)

EDM's "vp" and "ve" networks are asked in coordinates x / alpha there; that is the same evaluation.
Score-SDE's variance-exploding networks are trained on [0, 1] with half the sigma, which they are
still told.

Sources: EDM (arXiv 2206.00364, table 1), Score-Based Generative Modeling through SDEs (arXiv
2011.13456, appendix C and H).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._denoiser import Denoiser
from ._prediction import Prediction, edm, predictions, unknown
from ._process import EDM, VE, VP, Array, Custom, DiscreteVP, Process
from ._unet import UNet

__all__ = ["FORMAT", "FORMULATIONS", "family", "load_checkpoint"]

FORMAT = "fewstep.checkpoint.1"
State = Mapping[str, Tensor]

#: eps = -F
_NEGATED = Prediction(
    "negated noise",
    lambda n: (1 / n.alpha, n.sigma / n.alpha),
    lambda n: (-1 / n.sigma, n.alpha / n.sigma),
    needs_signal=True,
    time=lambda level: np.log(0.5 * level.sigma),
)


@dataclass(frozen=True)
class _Settings:
    """What a formulation leaves open; EDM's defaults, in coordinates where data is in [-1, 1]."""

    sigma_data: float = 0.5
    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.02
    sigma_max: float = 100.0


def _sub_vp(settings: _Settings) -> Process:
    vp = VP(settings.beta_min, settings.beta_max)

    def lam(t: Any) -> Array:
        integral = vp._integral(t)
        with np.errstate(divide="ignore"):
            return -0.5 * integral - np.log(-np.expm1(-integral))

    return Custom(
        vp.alpha, lambda t: vp.sigma(t) ** 2, lam=lam, t_start=1.0, t_end=1e-3, t_clean=0.0
    )


def _table(state: State) -> Process:
    """EDM holds improved DDPM's levels as sigma / alpha, noisiest first, then 0."""
    if "u" not in state:
        raise ValueError("formulation = 'iddpm' needs the table of noise levels 'u'")
    rho = state["u"].double().numpy()[-2::-1]
    return DiscreteVP.from_alphas_cumprod(1 / (1 + rho**2), "improved DDPM")


#: process and prediction of every formulation, from its settings and the checkpoint's tensors
FORMULATIONS: dict[str, Callable[[_Settings, State], tuple[Process, Prediction, Any]]] = {
    "edm": lambda s, _: (EDM(), edm(s.sigma_data), None),
    "vp": lambda s, _: (VP(s.beta_min, s.beta_max), predictions["noise"], 999.0),
    "subvp": lambda s, _: (_sub_vp(s), predictions["noise"], 999.0),
    "ddpm": lambda s, _: (DiscreteVP.linear(), predictions["noise"], None),
    "iddpm": lambda _, state: (_table(state), predictions["noise"], None),
    "ve": lambda s, _: (VE(s.sigma_min, s.sigma_max), _NEGATED, None),
}


def load_checkpoint(
    path: str | os.PathLike[str],
    formulation: str | None = None,
    *,
    device: torch.device | str = "cpu",
    **settings: float,
) -> Denoiser:
    """A denoiser from a safetensors file with the weights of an EDM or score-SDE network: DDPM++,
    NCSN++ or ADM, whose sizes are read off the weights.

    path: written by `fewstep convert` or by you, from the official state dict, under its names.
    formulation: what the network was trained for: "edm", "vp", "ve", "iddpm" (EDM's four
        preconditionings), "subvp" or "ddpm" (score-SDE's). Files of `fewstep convert` say so,
        unless the source did not.
    settings: sigma_data = 0.5 ("edm"), beta_min = 0.1, beta_max = 20 ("vp", "subvp"), sigma_min =
        0.02, sigma_max = 100 ("ve", for images in [-1, 1]), where they differ.

    Images are in [-1, 1]. Conditions: `label`, one integer per sample, -1 for none, where the
    network has classes. Both papers' samplers for "vp" end at t = 1e-3, and so does the process.
    """
    state, meta = _read(path)
    try:
        kind = family(state)
        given = {**json.loads(meta.get("settings", "{}")), **settings}
        name = formulation or meta.get("formulation") or ("ve" if kind == "fourier" else None)
        if name is None:
            raise ValueError(
                "does not say what the network was trained for; give formulation, one of "
                f"{', '.join(sorted(FORMULATIONS))}"
            )
        if name not in FORMULATIONS:
            raise ValueError(f"asks for {unknown('formulation', name, FORMULATIONS)}")
        if kind != "edm" and (kind == "fourier") != (name == "ve"):
            raise ValueError(
                f"with formulation = {name!r}: score-SDE's networks have Fourier features of "
                f"log(sigma) for 've' (continuous) and for nothing else; this one has {kind} ones"
            )
        if set(given) - set(_Settings.__annotations__):
            wrong = sorted(set(given) - set(_Settings.__annotations__))[0]
            raise ValueError(f"with {unknown('settings', wrong, _Settings.__annotations__)}")
        if kind != "edm" and "sigmas" in state and name == "ve":
            ends = state["sigmas"].double()
            given = {
                "sigma_min": 2 * float(ends.min()),
                "sigma_max": 2 * float(ends.max()),
                **given,
            }
        process, prediction, time = FORMULATIONS[name](_Settings(**given), state)
        if kind == "edm":
            network = _network(_edm_names(state), "out_conv.weight" in state)
        else:
            network = _network(_score_sde_names(state), False)
    except ValueError as error:
        raise ValueError(f"path = {str(path)!r} {error}") from error
    return Denoiser(network.to(device), process, prediction, time, dtype=torch.float32)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path = {str(path)!r}: no such file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            meta = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"path = {str(path)!r} is not a readable safetensors file ({error}); other files: "
            "fewstep convert"
        ) from error
    return {re.sub(r"^(module|model)\.", "", k): v for k, v in tensors.items()}, meta


def family(state: State) -> str:
    """Whose names these are: "edm", or score-SDE's: "fourier" (continuous ve), "positional"."""
    if "map_layer0.weight" in state:
        return "edm"
    if "all_modules.0.W" in state:
        return "fourier"
    if "all_modules.0.weight" in state:
        return "positional"
    some = ", ".join(sorted(state)[:3]) or "nothing"
    raise ValueError(
        f"holds {some} ...; need the names of an EDM network (map_layer0.weight ...) or of "
        "score-SDE's ncsnpp (all_modules.0 ...)"
    )


def _network(weights: State, adm: bool) -> UNet:
    """The network that has these weights, run once without data: every size must fit."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    try:
        with torch.device("meta"):
            network = UNet(shapes, adm)
            channels, side = shapes["enc.0.conv.weight"][1], 2 ** len(network.enc)
            network(torch.zeros(1, channels, side, side), torch.zeros(1))
        network.load_state_dict(weights, assign=True)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"has weights that make no DDPM++, NCSN++ or ADM network: {reason}"
        ) from None
    return network.eval().requires_grad_(False)


def _frequencies(channels: int, endpoint: bool) -> Tensor:
    half = channels // 2
    return 10000.0 ** (-torch.arange(half) / (half - endpoint))


def _edm_names(state: State) -> dict[str, Tensor]:
    """EDM names blocks by their resolution: enc.32x32_block0."""
    adm = "out_conv.weight" in state
    filters = [v[0, 0].sum(0) for k, v in state.items() if k.endswith("resample_filter")]
    if any(not torch.equal(v, filters[0]) for v in filters):
        raise ValueError("has resampling filters that differ")
    weights = {"taps": filters[0] if filters else torch.full((2,), 0.5)}
    found = {k: re.fullmatch(r"(enc|dec)\.(\d+)x\d+_(.+)", k) for k in state}
    top = max((int(m[2]) for m in found.values() if m), default=0)
    for key, value in state.items():
        match = found[key]
        if key == "u" or key.startswith("map_augment.") or key.endswith("resample_filter"):
            continue  # the table of "iddpm"; conditions that are 0 when sampling; see taps
        if key.startswith("out_"):
            weights[key.replace("out_", "dec.0.aux_")] = value.float()
        elif match:
            level = round(math.log2(top / int(match[2])))
            weights[f"{match[1]}.{level}.{match[3]}"] = value.float()
        else:
            weights[key] = value.float()
    wide = weights["map_layer0.weight"].shape[1]
    if "map_noise.freqs" in weights:
        weights["frequencies"] = 2 * math.pi * weights.pop("map_noise.freqs")
    else:
        weights["frequencies"] = _frequencies(wide, not adm)
    if adm:  # cosines first
        weights["map_layer0.weight"] = weights["map_layer0.weight"].roll(wide // 2, 1)
    elif "map_label.weight" in weights:
        label = weights["map_label.weight"]
        weights["map_label.weight"] = label * math.sqrt(label.shape[1])
    return weights


def _score_sde_names(state: State) -> dict[str, Tensor]:
    """Score-SDE numbers its modules in the order of the forward pass: all_modules.0 ..."""
    modules: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", key)
        if match:
            modules.setdefault(int(match[1]), {})[match[2]] = value.float()
    return _Walk([modules[i] for i in sorted(modules)]).named()


def _kind(module: Mapping[str, Tensor]) -> str:
    if "NIN_3.W" in module:
        return "attention"
    if "Dense_0.weight" in module:
        return "block"
    if "Conv2d_0.weight" in module:
        return "residual"
    if "Conv_0.weight" in module:
        return "combine"
    if "W" in module:
        return "fourier"
    axes = module["weight"].ndim if "weight" in module else 0
    return {1: "norm", 2: "linear", 4: "conv"}.get(axes, "unknown")


_BLOCK = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}


class _Walk:
    """Goes through the modules in their order and names them; what does not fit is refused."""

    def __init__(self, modules: list[dict[str, Tensor]]) -> None:
        self.modules, self.at = modules, 0
        self.weights: dict[str, Tensor] = {}

    def next(self, *kinds: str) -> str:
        """The kind of the next module, if it is one of these; else ""."""
        kind = _kind(self.modules[self.at]) if self.at < len(self.modules) else "nothing"
        return kind if kind in kinds else ""

    def take(self, kind: str) -> dict[str, Tensor]:
        if not self.next(kind):
            found = _kind(self.modules[self.at]) if self.at < len(self.modules) else "nothing"
            raise ValueError(
                f"has {found} as module {self.at} where an ncsnpp network with BigGAN blocks has "
                f"{kind}"
            )
        self.at += 1
        return self.modules[self.at - 1]

    def plain(self, kind: str, name: str, inner: str = "") -> None:
        for key, value in self.take(kind).items():
            self.weights[f"{name}.{key.removeprefix(inner)}"] = value

    def block(self, name: str, attention: bool = False) -> None:
        for key, value in self.take("block").items():
            part, _, kind = key.partition(".")
            if part not in _BLOCK:
                raise ValueError(f"has {key!r} in module {self.at - 1}; need BigGAN blocks")
            self.weights[f"{name}.{_BLOCK[part]}.{kind}"] = value
        if attention and self.next("attention"):
            self.attention(name)

    def attention(self, name: str) -> None:
        part = self.take("attention")
        for kind in ("weight", "bias"):
            self.weights[f"{name}.norm2.{kind}"] = part[f"GroupNorm_0.{kind}"]
        # matrices (in, out); channels of qkv are (channel, one of q k v)
        qkv = torch.stack([part[f"NIN_{j}.W"].T for j in range(3)], 1)
        self.weights[f"{name}.qkv.weight"] = qkv.flatten(0, 1)[..., None, None]
        self.weights[f"{name}.qkv.bias"] = torch.stack(
            [part[f"NIN_{j}.b"] for j in range(3)], 1
        ).flatten()
        self.weights[f"{name}.proj.weight"] = part["NIN_3.W"].T[..., None, None].contiguous()
        self.weights[f"{name}.proj.bias"] = part["NIN_3.b"]

    def named(self) -> dict[str, Tensor]:
        kinds = [_kind(m) for m in self.modules]
        total = kinds.count("block")
        # only blocks that resample have a matrix on the skip path and as many channels as before
        resampling = sum(
            "Conv_2.weight" in m and m["Conv_2.weight"].shape[0] == m["Conv_2.weight"].shape[1]
            for m in self.modules
        )
        levels = 1 + resampling // 2
        each, left = divmod(total - resampling - 2 - levels, 2 * levels)
        if left or each < 1:
            raise ValueError(f"has {total} residual blocks, which {levels} levels cannot have")
        if self.next("fourier"):
            self.weights["frequencies"] = 2 * math.pi * self.take("fourier")["W"]
        self.plain("linear", "map_layer0")
        self.plain("linear", "map_layer1")
        wide = self.weights["map_layer0.weight"].shape[1]
        self.weights.setdefault("frequencies", _frequencies(wide, True))
        self.plain("conv", "enc.0.conv")
        smooth = "residual" in kinds or "combine" in kinds
        for level in range(levels):
            if level:
                self.block(f"enc.{level}.down")
                if self.next("residual"):
                    self.plain("residual", f"enc.{level}.aux_residual", "Conv2d_0.")
                elif self.next("combine"):
                    self.plain("combine", f"enc.{level}.aux_skip", "Conv_0.")
            for i in range(each):
                self.block(f"enc.{level}.block{i}", attention=True)
        deepest = f"dec.{levels - 1}"
        self.block(f"{deepest}.in0", attention=True)
        self.block(f"{deepest}.in1")
        for level in reversed(range(levels)):
            for i in range(each + 1):
                self.block(f"dec.{level}.block{i}", attention=i == each)
            if level == 0 or self.next("norm"):
                self.plain("norm", f"dec.{level}.aux_norm")
                self.plain("conv", f"dec.{level}.aux_conv")
            if level:
                self.block(f"dec.{level - 1}.up")
        if self.at != len(self.modules):
            raise ValueError(f"has {len(self.modules)} modules, where {self.at} make a network")
        # The weights do not tell the filter, nor that sums are scaled. In every published
        # configuration they are, and the filter is the smooth one where the input is fed in at
        # every level, and the plain mean elsewhere.
        taps = [0.125, 0.375, 0.375, 0.125] if smooth else [0.5, 0.5]
        return {**self.weights, "taps": torch.tensor(taps)}
