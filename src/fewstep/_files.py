"""Plans and states as safetensors: one file or one string of bytes, checked when read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ._noise import Draw, Given, Noise
from ._plan import Call, Plan, Row, State
from ._process import Array, Level

__all__ = [
    "plan_arrays",
    "plan_from_bytes",
    "plan_to_bytes",
    "read",
    "state_from_bytes",
    "state_to_bytes",
    "to_bytes",
    "write",
]

_PLAN, _STATE = "fewstep.plan.2", "fewstep.state.1"


def _four(level: Level) -> tuple[Any, Any, Any, Any]:
    return level.t, level.alpha, level.sigma, level.lam


def _level(numbers: Array) -> Level:
    """Level of (4, ...) numbers."""
    return Level(*(float(v) if numbers.ndim == 1 else v for v in numbers))


def plan_arrays(plan: Plan) -> dict[str, Array]:
    """Everything but the description, as arrays: what a file holds and what equality means."""
    levels = np.array([_four(v) for v in plan.levels], dtype=np.float64)
    calls = np.full((len(plan.levels), 8, *levels.shape[2:]), np.nan)
    for i, c in enumerate(plan.calls):
        if c is not None:
            for k, v in enumerate((c.p, c.q, c.c_in, c.c_noise, *_four(plan.asked(i)))):
                calls[i, k] = v
    axis = math.nan if plan.axis is None else plan.axis
    scalars = (plan.integer_times, plan.prior_std, plan.given, plan.raw, axis)
    out = {
        "levels": levels,
        "calls": calls,
        "keep": np.array(plan.keep, dtype=np.float64),
        "rows": np.array([(row.order, row.exact) for row in plan.rows], dtype=np.float64),
        "scalars": np.array(scalars, dtype=np.float64),
    }
    if plan.draws:
        none = (math.nan, math.nan)
        numbers = [(*_four(v.start), *_four(v.end), *(v.clock or none), v.tag) for v in plan.draws]
        flat = [[np.ravel(v) for v in row] for row in numbers]
        size = max(len(v) for row in flat for v in row)
        out["draws"] = np.array([[np.broadcast_to(v, size) for v in row] for row in flat])
    for i, row in enumerate(plan.rows):
        for kind, terms in (("a", row.a), ("b", row.b), ("e", row.e)):
            for j, c in terms.items():
                out[f"{kind}.{i}.{j}"] = np.array(c, dtype=np.float64, order="C")
        if row.shifts:
            out[f"c.{i}"] = np.array(row.c, dtype=np.float64, order="C")
    if plan.basis is not None:
        for name, array in plan.basis.arrays().items():
            out[f"basis.{name}"] = np.ascontiguousarray(array)
    return out


def _plan_meta(plan: Plan) -> dict[str, str]:
    meta = {"about": json.dumps(dict(plan.about))}
    return meta if plan.basis is None else {**meta, "basis": plan.basis.kind}


def _plan(meta: Mapping[str, str], data: Mapping[str, Array]) -> Plan:
    """The plan that these arrays are; KeyError, IndexError, TypeError or ValueError if none."""
    about = json.loads(meta["about"])
    levels = tuple(_level(v) for v in data["levels"])
    calls: list[Call | None] = []
    for numbers, own in zip(data["calls"], data["levels"], strict=True):
        if np.isnan(numbers[0]).any():
            calls.append(None)
            continue
        scalars = [float(v) if v.ndim == 0 else v for v in numbers[:4]]
        same = np.array_equal(numbers[4:], own)
        calls.append(Call(*scalars, level=None if same else _level(numbers[4:])))
    terms: list[dict[str, dict[int, Any]]] = [{"a": {}, "b": {}, "e": {}} for _ in data["rows"]]
    constants: list[Any] = [0.0] * len(terms)
    parts: dict[str, Array] = {}
    for key, value in data.items():
        kind, *where = key.split(".")
        if kind in ("a", "b", "e"):
            i, j = map(int, where)
            terms[i][kind][j] = float(value) if value.ndim == 0 else value
        elif kind == "c":
            constants[int(where[0])] = float(value) if value.ndim == 0 else value
        elif kind == "basis":
            parts[where[0]] = value
    rows = tuple(
        Row(term["a"], term["b"], int(order), bool(exact), term["e"], c)
        for term, (order, exact), c in zip(terms, data["rows"], constants, strict=True)
    )
    draws = []
    for row in data.get("draws", ()):
        v = [float(c[0]) if len(c) == 1 or (c == c[0]).all() else c for c in row]
        clock = None if np.isnan(v[8]).any() else (v[8], v[9])
        draws.append(Draw(Level(*v[:4]), Level(*v[4:8]), clock, int(row[10][0])))
    integer, prior, given, raw, axis = data["scalars"]
    basis = None
    if "basis" in meta:
        from ._basis import basis_from

        basis = basis_from(meta["basis"], parts)
    return Plan(
        levels,
        rows,
        tuple(calls),
        bool(integer),
        float(prior),
        about,
        int(given),
        tuple(int(k) for k in data["keep"]),
        basis,
        bool(raw),
        tuple(draws),
        None if math.isnan(axis) else int(axis),
    )


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file; a kill leaves the old one or the new one, never half."""
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)


def _tensors(arrays: Mapping[str, Array], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + k: torch.from_numpy(np.array(v, order="C")) for k, v in arrays.items()}


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors as safetensors: the same bytes for the same content. (The library writes metadata in
    an order of its own, another one every time.)"""
    content = save_tensors(dict(tensors), metadata=dict(metadata))
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def plan_to_bytes(plan: Plan) -> bytes:
    """A plan as safetensors, the description as metadata."""
    meta = {"format": _PLAN, **_plan_meta(plan)}
    return to_bytes(_tensors(plan_arrays(plan)), meta)


def plan_from_bytes(content: bytes) -> Plan:
    """The plan that `plan_to_bytes` wrote; checked as when it was built."""
    meta, tensors = _parsed(content, _PLAN, "Plan.save")
    try:
        return _plan(meta, {k: v.numpy() for k, v in tensors.items()})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"says it is a plan but lacks or garbles {error}; save again") from error


def _parsed(content: bytes, kind: str, writer: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        size = int.from_bytes(content[:8], "little")
        meta = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        tensors = load_tensors(content)
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(
            f"is not a readable safetensors file ({error}); it may be truncated: save it again"
        ) from error
    if meta.get("format") != kind:
        raise ValueError(
            f"is a safetensors file of another kind (format {meta.get('format')!r}); accepted: "
            f"{kind!r}, as written by {writer}"
        )
    return meta, tensors


def read(path: str | os.PathLike[str], parse: Callable[[bytes], Any]) -> Any:
    """Parse a file; what is wrong with it is said with its name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path = {str(path)!r}: no such file")
    try:
        return parse(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"path = {str(path)!r} {error}") from error


def state_to_bytes(state: State) -> bytes:
    """Plan, tensors and noise of a state, as safetensors."""
    noise: Any = None
    tensors = _tensors(plan_arrays(state.plan), "plan.")
    if isinstance(state.noise, Noise):
        noise = {"noise": state.noise.describe()}
    elif isinstance(state.noise, Given):
        noise = {"given": len(state.noise.draws)}
        tensors.update({f"N.{m}": v for m, v in enumerate(state.noise.draws)})
    elif state.noise is not None:
        raise ValueError(
            f"noise = {state.noise!r} cannot be written to a file; use fewstep.Noise(seed) or "
            "tensors, one per draw"
        )
    for kind, kept in (("X", state.states), ("D", state.outputs), ("Z", state.draws)):
        tensors.update({f"{kind}.{j}": v for j, v in kept.items()})
    meta = {
        "format": _STATE,
        "index": str(state.index),
        "noise": json.dumps(noise),
        **_plan_meta(state.plan),
    }
    # Copies: safetensors refuses tensors that share memory, and views that are not dense.
    copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    return to_bytes(copies, meta)


def state_from_bytes(content: bytes, device: torch.device | str = "cpu") -> State:
    """The state that `state_to_bytes` wrote."""
    meta, tensors = _parsed(content, _STATE, "State.save")
    try:
        parts: dict[str, dict[Any, Any]] = {"plan": {}, "X": {}, "D": {}, "Z": {}, "N": {}}
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            parts[kind][name if kind == "plan" else int(name)] = (
                value.numpy() if kind == "plan" else value.to(device)
            )
        said = json.loads(meta["noise"])
        noise: Any = None
        if said is not None:
            if "noise" in said:
                noise = Noise.from_description(said["noise"])
            else:
                noise = Given(tuple(parts["N"][m] for m in range(said["given"])))
        plan = _plan(meta, parts["plan"])
        return State(plan, int(meta["index"]), parts["X"], parts["D"], noise, parts["Z"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"says it is a state but lacks or garbles {error}; save again") from error
