"""Which network a recipe was made for.

A network's own numbers identify it: a few thousand of its parameters, taken at even distances. They
are compared to half-precision rounding, so that a float16 or bfloat16 copy, a compiled one, or one
on another device is the same network, and a fine-tuned one is another. A network without
parameters (a function, an exact model, a remote service) is identified by what it answers to two
questions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._denoiser import Denoiser, Guided, Model, Wrapper
from .._noise import start_noise
from .._process import Array
from ._teacher import taken

__all__ = ["differs", "fingerprint", "guidance_of", "network_of", "same_guidance"]

_VALUES = 2048
#: Root mean square relative difference of parameters: rounding to bfloat16 makes 0.0017.
_SAME_PARAMETERS = 0.003
#: Of answers, where the network's own rounding to bfloat16 is amplified.
_SAME_ANSWERS = 0.03
#: What is said of every guidance; a model may say more of its own.
_GUIDED = ("scale", "interval", "rescale")


def network_of(model: Any) -> Any:
    """The network inside wrappers of models."""
    while isinstance(model, Wrapper):
        model = model.model
    return model.network if isinstance(model, Denoiser) else model


def _modules(value: Any, depth: int = 3) -> Iterator[torch.nn.Module]:
    """Modules in a callable: itself, or in what it is bound to, partial of, or closes over."""
    if isinstance(value, torch.nn.Module):
        yield value
    elif depth and isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules(part, depth - 1)
    elif depth and callable(value):
        bound = getattr(value, "__self__", None)
        if bound is not None:
            yield from _modules(bound, depth - 1)
        for cell in getattr(value, "__closure__", None) or ():
            try:
                yield from _modules(cell.cell_contents, depth - 1)
            except ValueError:  # an empty cell
                continue
        state = getattr(value, "__dict__", None) or {}
        for part in state.values():
            if isinstance(part, torch.nn.Module):
                yield part


def _parameters(network: Any) -> tuple[Array, int] | None:
    """Some parameters, and the number of all; None without any."""
    tensors: list[Tensor] = []
    for module in dict.fromkeys(_modules(network)):
        tensors += [p.detach() for p in module.parameters() if p.is_floating_point()]
    if not tensors:
        return None
    each = max(1, _VALUES // len(tensors))
    parts = []
    for p in tensors:
        flat, size = p.reshape(-1), p.numel()
        where = torch.linspace(0, size - 1, min(each, size), dtype=torch.float64).long()
        parts.append(flat[where.to(flat.device)].double().cpu().numpy())
    return np.concatenate(parts), sum(p.numel() for p in tensors)


def _plain(cond: Mapping[str, Any]) -> bool:
    return all(
        _plain(v) if isinstance(v, Mapping) else isinstance(v, (Tensor, bool, int, float, str))
        for v in cond.values()
    )


def _answers(model: Model, shape: tuple[int, ...], cond: Mapping[str, Any]) -> Array:
    """Data predictions of one noise at two levels in the middle of the process."""
    process = model.process
    ends = process.lam_start, float(process.lam(process.t_end))
    z = start_noise((1, *shape), 2_024, device=model.device)
    base = model
    while isinstance(base, Guided):
        base = base.model
    out = []
    for share in (0.4, 0.7):
        lam = ends[0] + share * (ends[1] - ends[0])
        t = float(process.time(lam))
        level = process.level(t)
        with torch.no_grad():
            answer = base(float(np.hypot(level.alpha, level.sigma)) * z, t, **cond)
        out.append(answer.double().reshape(-1).cpu().numpy())
    return np.concatenate(out)


def fingerprint(
    model: Model, shape: tuple[int, ...], cond: Mapping[str, Any], count: int
) -> dict[str, Any]:
    """What identifies the network of a model. cond: conditions of `count` samples."""
    found = _parameters(network_of(model))
    if found is not None:
        return {"kind": "parameters", "values": found[0], "size": found[1]}
    first = taken(cond, slice(0, 1), count)
    if not _plain(first):
        return {"kind": "none", "values": np.zeros(0), "size": 0}
    return {
        "kind": "answers",
        "values": _answers(model, shape, first),
        "size": int(np.prod(shape)),
        "cond": first,
    }


def differs(known: Mapping[str, Any], model: Model, shape: tuple[int, ...]) -> str:
    """Why the network is not the one of a fingerprint; "" if it is."""
    network = network_of(model)
    found = _parameters(network)
    if known["kind"] == "parameters":
        if found is None:
            return "it has no parameters to compare"
        if found[1] != known["size"] or len(found[0]) != len(known["values"]):
            return f"it has {found[1]:,} parameters, not {known['size']:,}"
        mine, theirs, limit = found[0], known["values"], _SAME_PARAMETERS
        what = "parameters"
    elif known["kind"] == "answers":
        if found is not None:
            return f"it has {found[1]:,} parameters, where there were none"
        mine = _answers(model, shape, known.get("cond", {}))
        theirs, limit, what = known["values"], _SAME_ANSWERS, "answers"
    else:
        return ""
    size = float(np.sqrt(np.square(theirs).mean()))
    off = float(np.sqrt(np.square(mine - theirs).mean())) / max(size, 1e-300)
    return "" if off <= limit else f"its {what} differ by {off:.2g} of their size"


def guidance_of(model: Model) -> list[dict[str, Any]]:
    """The guidance around a network, outermost first, and what a model says of guidance inside it;
    empty without any."""
    out = []
    while isinstance(model, Wrapper):
        if isinstance(model, Guided) and np.any(np.asarray(model.scale) != 1):
            scale: Any = model.scale
            if isinstance(scale, tuple):
                scale = scale[0] if len(set(scale)) == 1 else list(scale)
            low, high = model.interval
            inside = [low, high if np.isfinite(high) else None]
            out.append({"scale": scale, "interval": inside, "rescale": model.rescale})
        model = model.model
    return [*out, *getattr(model, "guidance", ())]


def same_guidance(known: list[dict[str, Any]], model: Model) -> str:
    """How the guidance differs from the one that is known; "" if it does not."""
    mine = guidance_of(model)
    return "" if mine == known else f"{_said(mine)}, where the recipe is for {_said(known)}"


def _said(guidance: list[dict[str, Any]]) -> str:
    if not guidance:
        return "no guidance"
    parts = []
    for g in guidance:
        text = f"guidance scale {g['scale']}"
        low, high = g["interval"]
        if low or high is not None:
            text += f" for rho in [{low}, {'inf' if high is None else high}]"
        if g["rescale"]:
            text += f" with rescale {g['rescale']}"
        text += "".join(f", {k} {v}" for k, v in g.items() if k not in _GUIDED)
        parts.append(text)
    return " and ".join(parts)
