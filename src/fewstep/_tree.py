"""Several plans in one run: a state that is a tree of tensors, one network call for all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from ._files import _parsed, read, state_from_bytes, state_to_bytes, write
from ._noise import Noise, as_source
from ._plan import Hook, Plan, State

__all__ = ["Tree", "TreeState", "tree"]

_FORMAT = "fewstep.tree.1"


@dataclass(frozen=True)
class Tree:
    """Plans of a network that is asked about several tensors at once, at noise levels of their own:
    video and audio with different shifts, an image and its depth. Made by `tree`.

        run = fs.tree({"video": plan_v, "audio": plan_a})
        state = run.start({"video": x_v, "audio": x_a})
        while not state.done:
            x_in, t_in = state.query()                   # trees too
            state = state.advance(network(x_in, t_in))   # the network answers with such a tree
        samples = state.x

    Every leaf has the bits of its own run from the network's answers about it.
    """

    plans: Any

    @property
    def nfe(self) -> int:
        """Network evaluations of a run, the same for every leaf."""
        return next(leaf.nfe for _, leaf in _leaves(self.plans))

    def noise(self, noise: int | Noise = 0) -> Any:
        """A `Noise` for every leaf, all independent: that of the leaf at "/video" has for seed the
        first 8 bytes, little-endian, of SHA-256 of "{seed}/video" (of each seed, if there is one
        per sample); list and tuple entries are named by their index. For the noise to start from:
        run.noise(seed)["video"].start(shape)."""
        source = as_source(noise)
        if not isinstance(source, Noise):
            raise ValueError(f"noise = {noise!r}; need a seed or fewstep.Noise")

        def derived(path: str, _: Any) -> Noise:
            if isinstance(source.seed, int):
                return replace(source, seed=_seed(source.seed, path))
            return replace(source, seed=tuple(_seed(s, path) for s in source.seed))

        return _map(derived, self.plans)

    def start(self, x: Any, noise: Any = 0) -> TreeState:
        """The state before the first call. x: a tree of tensors, each as `Plan.start` takes it.
        noise: a seed or a `Noise`, from which every leaf gets its own (`Tree.noise`); or a tree
        of what `Plan.start` takes."""
        noises = self.noise(noise) if _is_seed(noise) or isinstance(noise, Noise) else noise

        def begin(path: str, plan: Plan, x: Any, noise: Any) -> State:
            return plan.start(x, noise=noise)

        return TreeState(_map(begin, self.plans, x=x, noise=noises))


def tree(plans: Any) -> Tree:
    """A run of all these plans with joint network calls: `Tree`. plans: nested dicts, lists and
    tuples of plans with equal numbers of evaluations."""
    leaves = list(_leaves(plans))
    if not leaves:
        raise ValueError(f"plans = {plans!r}; need at least one plan")
    for path, leaf in leaves:
        if not isinstance(leaf, Plan):
            raise ValueError(
                f"plans: {path or 'the tree'} is {type(leaf).__name__}; need a plan, or a dict "
                "with names, a list or a tuple of such"
            )
        if leaf.given != 1:
            raise ValueError(
                f"plans: {path} starts from {leaf.given} states; in a tree each starts from one"
            )
        if leaf.nfe != leaves[0][1].nfe:
            raise ValueError(
                f"plans: {leaves[0][0]} makes {leaves[0][1].nfe} network evaluations and {path} "
                f"{leaf.nfe}; they share the calls, so the numbers must be equal"
            )
    return Tree(plans)


@dataclass(frozen=True)
class TreeState:
    """A run of a `Tree` before its next call: a tree of states, a value as they are."""

    states: Any

    @property
    def x(self) -> Any:
        """The newest state of every leaf; the samples once `done`."""
        return _map(lambda _, state: state.x, self.states)

    @property
    def done(self) -> bool:
        """Whether all rows have been taken."""
        return all(state.done for _, state in _leaves(self.states))

    @property
    def nfe(self) -> int:
        """Network evaluations spent so far."""
        return next(state.nfe for _, state in _leaves(self.states))

    @property
    def level(self) -> Any:
        """The level of every leaf that the network is asked at."""
        return _map(lambda _, state: state.plan.asked(state.index), self.states)

    def query(self) -> tuple[Any, Any]:
        """What to ask the network: a tree of inputs and a tree of times."""
        asked = {path: state.query() for path, state in _leaves(self.states)}
        x_in, t_in = (_map(lambda path, _, i=i: asked[path][i], self.states) for i in (0, 1))
        return x_in, t_in

    def advance(self, output: Any, hook: Any = None) -> TreeState:
        """The state after the network's answer to `query`, a tree of tensors. hook: as for
        `State.advance`, one for all leaves or a tree (with None where there is none)."""
        hooks = _map(lambda *_: hook, self.states) if hook is None or callable(hook) else hook

        def go_on(path: str, state: State, output: Any, hook: Hook | None) -> State:
            return state.advance(output, hook)

        return TreeState(_map(go_on, self.states, output=output, hook=hooks))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: every leaf as `State.save` has it. Never leaves half."""
        parts = [state_to_bytes(state) for _, state in _leaves(self.states)]
        numbers = iter(range(len(parts)))
        meta = {
            "format": _FORMAT,
            "tree": json.dumps(_described(_map(lambda *_: next(numbers), self.states))),
        }
        tensors = {
            f"leaf.{i}": torch.frombuffer(bytearray(v), dtype=torch.uint8)
            for i, v in enumerate(parts)
        }
        write(path, save_tensors(tensors, metadata=meta))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TreeState:
        """Read a file written by `save`: the run goes on as if it had not stopped."""

        def parse(content: bytes) -> TreeState:
            meta, tensors = _parsed(content, _FORMAT, "TreeState.save")
            try:
                numbers = _undescribed(json.loads(meta["tree"]))
                leaves = {i: tensors[f"leaf.{i}"].numpy().tobytes() for _, i in _leaves(numbers)}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"says it is a tree but lacks or garbles {error}; save again"
                ) from error
            return cls(_map(lambda _, i: state_from_bytes(leaves[i], device), numbers))

        return read(path, parse)


def _is_seed(noise: Any) -> bool:
    return isinstance(noise, Integral) and not isinstance(noise, bool)


def _seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}{path}".encode()).digest()[:8], "little")


def _children(node: Any) -> dict[Any, Any] | None:
    """The entries of a node by name or index; None for a leaf."""
    if type(node) in (list, tuple):
        return dict(enumerate(node))
    return node if type(node) is dict else None


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = _children(node)
    if children is None:
        yield path, node
        return
    for key, child in children.items():
        if type(node) is dict and not (isinstance(key, str) and "/" not in key):
            raise ValueError(f"plans: {path} has the name {key!r}; need strings without '/'")
        yield from _leaves(child, f"{path}/{key}")


def _map(f: Callable[..., Any], node: Any, path: str = "", **others: Any) -> Any:
    """f(path, leaf, *leaves of the others) for every leaf, as a tree."""
    children = _children(node)
    if children is None:
        return f(path, node, *others.values())
    parts: dict[str, dict[Any, Any]] = {}
    for name, other in others.items():
        parts[name] = _children(other) or {}
        if parts[name].keys() != children.keys():
            have = ", ".join(map(str, parts[name])) or type(other).__name__
            raise ValueError(
                f"{name}: {path or 'the tree'} has {have}; need {', '.join(map(str, children))}"
            )
    out = {
        key: _map(f, child, f"{path}/{key}", **{name: part[key] for name, part in parts.items()})
        for key, child in children.items()
    }
    return out if type(node) is dict else type(node)(out.values())


def _described(node: Any) -> Any:
    """A tree of numbers in JSON: containers as [kind, entries]."""
    if type(node) is dict:
        return ["dict", {k: _described(v) for k, v in node.items()}]
    if type(node) in (list, tuple):
        return [type(node).__name__, [_described(v) for v in node]]
    return node


def _undescribed(said: Any) -> Any:
    if not isinstance(said, list):
        return said
    kind, entries = said
    if kind == "dict":
        return {k: _undescribed(v) for k, v in entries.items()}
    return {"list": list, "tuple": tuple}[kind](_undescribed(v) for v in entries)
