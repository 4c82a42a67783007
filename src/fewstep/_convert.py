"""Checkpoints from other files to safetensors, without running what is in them.

A .pt, .pth or .pkl file is a pickle: a list of instructions, among them "import this" and "call
it", which are followed by whoever opens the file in the usual way. Here nothing is imported, and
nothing called but what rebuilds a tensor. Archives of torch.save are read by torch's own reader for
weights only. In plain pickles, which EDM publishes, every class and every function becomes an inert
record of its arguments; the weights are then picked out of the records of the modules.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from ._checkpoints import FORMAT, FORMULATIONS
from ._files import to_bytes, write
from ._prediction import unknown

__all__ = ["convert_checkpoint", "convert_command"]

#: EDM's preconditionings by class; what the module holds as settings of the formulation
_EDM: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, float]]]] = {
    "EDMPrecond": ("edm", lambda v: {"sigma_data": v["sigma_data"]}),
    "VPPrecond": (
        "vp",
        lambda v: {"beta_min": v["beta_min"], "beta_max": v["beta_min"] + v["beta_d"]},
    ),
    "VEPrecond": ("ve", lambda v: {"sigma_min": v["sigma_min"], "sigma_max": v["sigma_max"]}),
    "iDDPMPrecond": ("iddpm", lambda v: {}),
}


class _Record:
    """Stands for an object of a class that is not imported: what it would have been made from."""

    args: tuple[Any, ...]
    state: Any
    content: dict[Any, Any]

    def __new__(cls, *args: Any, **named: Any) -> _Record:
        self = object.__new__(cls)
        self.args, self.state, self.content = args, None, {}
        return self

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.content[key] = value

    def append(self, value: Any) -> None:
        """An entry, if the object is a kind of list."""

    def __hash__(self) -> int:
        return id(self)


def _weights_only(file: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _storage(content: bytes) -> Any:
    return _weights_only(io.BytesIO(content))


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _Reader(pickle.Unpickler):
    """Imports nothing: a name is one of `_KNOWN` or a new class of records."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        known = _KNOWN.get((module, name))
        if known is None:
            return type(name, (_Record,), {})
        return lambda *args: known(*args)  # a new one: a pickle may set attributes of what it gets


def _unpickled(path: Path) -> Any:
    old_archive = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
    with path.open("rb") as file:
        by_torch = zipfile.is_zipfile(path) or old_archive in file.read(32)
        file.seek(0)
        try:
            return _weights_only(file) if by_torch else _Reader(file).load()
        except Exception as error:  # a pickle can fail in any way
            reason = str(error).strip().split("\n")[0][:200]
            if "weights_only" in str(error):  # torch's own advice for this case is to run it
                name = re.search(r"GLOBAL ([\w.]+)", str(error))
                reason = f"it needs {name[1] if name else 'other things'}"
            raise ValueError(
                f"source = {str(path)!r} is no pickle or torch archive of tensors and plain "
                f"containers: {reason}"
            ) from None


def _module(found: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Class and attributes of a recorded torch module; None for anything else."""
    if not isinstance(found, _Record):
        return None
    name, state = type(found).__name__, found.state
    if name == "_reconstruct_persistent_obj" and found.args:  # EDM's: {class_name, state, ...}
        meta = found.args[0]
        meta = meta.content if isinstance(meta, _Record) else meta
        name, state = meta["class_name"], meta["state"]
        state = state.content if isinstance(state, _Record) else state
    return (name, state) if isinstance(state, Mapping) and "_parameters" in state else None


def _weights(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a recorded module."""
    own = {**state["_parameters"], **state["_buffers"]}
    out = {prefix + k: v for k, v in own.items() if isinstance(v, Tensor)}
    for name, child in state["_modules"].items():
        module = _module(child)
        if module is not None:
            out.update(_weights(module[1], f"{prefix}{name}."))
    return out


def _averaged(weights: Mapping[str, Any], shadow: list[Tensor]) -> dict[str, Tensor]:
    """Score-SDE keeps averages as a list, in the order of the trained parameters."""
    out = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    fixed = re.compile(r"(^|\.)(sigmas|all_modules\.0\.W)$")  # a table; random frequencies
    trained = [k for k in out if not fixed.search(k)]
    if [out[k].shape for k in trained] != [v.shape for v in shadow]:
        raise ValueError(
            f"holds {len(shadow)} averaged parameters ('ema') that do not fit its "
            f"{len(trained)} parameters ('model')"
        )
    return {**out, **dict(zip(trained, shadow, strict=True))}


def _found(content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights, and what is known of their meaning."""
    if isinstance(content, _Record) and not _module(content):
        content = content.content
    if isinstance(content, Mapping):
        ema, model = content.get("ema"), content.get("model")
        if isinstance(ema, Mapping) and isinstance(model, Mapping) and "shadow_params" in ema:
            return _averaged(model, ema["shadow_params"]), {}
        for inner in (ema, content.get("state_dict"), model, content):
            module = _module(inner)
            if module is not None:
                content = inner
                break
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                return {k: v for k, v in inner.items() if isinstance(v, Tensor)}, {}
    module = _module(content)
    if module is None:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else ""
        what = names[:200] or type(content).__name__
        raise ValueError(f"holds {what}; need a state dict, EDM's 'ema' or score-SDE's 'model'")
    name, state = module
    meta = {}
    if name in _EDM:
        formulation, settings = _EDM[name]
        said = {k: float(v) for k, v in settings(state).items()}
        meta = {"formulation": formulation, "settings": json.dumps(said)}
    return _weights(state), meta


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    formulation: str | None = None,
) -> dict[str, str]:
    """Write the weights of a .pt, .pth or .pkl file as safetensors, averaged ones where there are;
    returns what is written as metadata. Nothing in the source is run, and `out` is written whole or
    not at all.

    source: a state dict; a checkpoint of score-SDE; a network pickle of EDM.
    formulation: of `load_checkpoint`, where the source does not say it.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ValueError(
            f"torch = {torch.__version__}, whose reader for weights runs code in some files "
            "(CVE-2025-32434); use 2.6 or later"
        )
    if formulation is not None and formulation not in FORMULATIONS:
        raise ValueError(unknown("formulation", formulation, FORMULATIONS))
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise FileNotFoundError(f"source = {str(source)!r}: no such file")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"out = {out}: the folder {out.resolve().parent} does not exist")
    content = _unpickled(source)
    try:
        weights, meta = _found(content)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"source = {str(source)!r} lacks or garbles {error}") from None
    except ValueError as error:
        raise ValueError(f"source = {str(source)!r} {error}") from None
    if formulation is not None:
        meta["formulation"] = formulation
    digest = hashlib.sha256()
    with source.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    meta = {
        "format": FORMAT,
        **meta,
        "source": source.name,
        "sha256 of source": digest.hexdigest(),
        "tensors": str(len(weights)),
    }
    # copies: safetensors refuses tensors that share memory
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in weights.items()}
    write(out, to_bytes(tensors, meta))
    return meta


def convert_command(source: Path, out: Path, formulation: str | None = None) -> None:
    """Write the weights of a checkpoint (.pt, .pth, .pkl) as safetensors.

    SOURCE: a state dict, a checkpoint of score-SDE, or a network pickle of EDM. OUT: the file to
    write, for fewstep.load_checkpoint. --formulation: what the network was trained for (edm, vp,
    ve, iddpm, subvp, ddpm), where the source does not say it.

    The risk: such a file is a pickle, that is a program. Whoever opens it in the usual way runs
    whatever its author, or anyone who changed it since, has put there. This command runs nothing
    of it: it reads numbers and names, and leaves the rest out. It cannot tell whether the numbers
    are what they are said to be: get files from their authors, and compare the sha256 that is
    printed with one that they publish.

    Example: fewstep convert edm-cifar10-32x32-cond-vp.pkl cifar10.safetensors
    """
    meta = convert_checkpoint(source, out, formulation)
    print(f"{out}: {meta['tensors']} tensors, formulation {meta.get('formulation', 'not said')}")
    print(f"sha256 of {source}: {meta['sha256 of source']}")
