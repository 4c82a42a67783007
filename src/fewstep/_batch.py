"""Runs that share network calls: states of different plans, positions and lengths as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._denoiser import Guided, Model, check_output
from ._plan import Hook, State
from ._process import Level
from ._sampling import check_match

__all__ = ["Batch", "batch"]


@dataclass(frozen=True)
class Batch:
    """States that are asked about together. A value: `advance` makes a new one.

    Any mix of solvers, budgets and positions: all the unfinished states form one network input.
    Every state then advances by its own plan from its own part of the answer, so that each run has
    the bits that it has alone (as far as the network's answer about a sample does not depend on
    the other samples). States that are done stay where they are and cost nothing.

        batch = fs.batch(requests)
        while batch.running:
            batch = batch.step(model, conds)                     # conds: one per state
            finished = [s.x for s in batch.states if s.done]
            batch = fs.batch([*batch.running, *arrived])
    """

    states: tuple[State, ...]

    @property
    def running(self) -> tuple[State, ...]:
        """The states that are not done."""
        return tuple(state for state in self.states if not state.done)

    @property
    def done(self) -> bool:
        """Whether all states are."""
        return not self.running

    def _asked(self) -> tuple[State, ...]:
        if not self.running:
            raise ValueError("batch: all of its runs are done; there is nothing left to ask")
        return self.running

    def query(self) -> tuple[Tensor, Tensor]:
        """The queries of the running states, one after the other: input (total, ...), and times
        (total,), or (total, levels) where levels run along another axis than the batch."""
        inputs, times = zip(*(state.query() for state in self._asked()), strict=True)
        return torch.cat(inputs), torch.cat(times)

    @property
    def level(self) -> Level:
        """The levels that the network is asked at: (total,) arrays, one per sample of `query`; or
        arrays that broadcast against its input, where levels run along another axis."""
        states = self._asked()

        def part(state: State, v: Any) -> Any:
            size, axis = state.x.shape[0], state.plan.axis
            if axis is None or axis == -state.x.ndim:
                return np.broadcast_to(np.ravel(v), (size,))
            shape = (size, *(1,) * (state.x.ndim + axis - 1), state.x.shape[axis])
            return np.broadcast_to(v, (*shape, *(1,) * (-axis - 1)))

        asked = [(state, state.plan.asked(state.index)) for state in states]
        names = ("t", "alpha", "sigma", "lam")
        return Level(
            *(np.concatenate([part(s, getattr(v, name)) for s, v in asked]) for name in names)
        )

    def advance(self, output: Tensor, hook: Hook | None = None) -> Batch:
        """After the network's answer to `query`: every running state goes on with its part."""
        states = self._asked()
        sizes = [state.x.shape[0] for state in states]
        whole = (sum(sizes), *states[0].x.shape[1:])
        check_output(output, torch.empty(whole, device="meta"))
        parts = iter(output.split(sizes))
        return Batch(tuple(s if s.done else s.advance(next(parts), hook) for s in self.states))

    def step(
        self,
        model: Model | Sequence[Model],
        conds: Sequence[Mapping[str, Any]] | None = None,
        hook: Hook | None = None,
    ) -> Batch:
        """One call of a model for all, and what follows from it.

        model: for all states, or one for each: the same model under different `Guided`s that
            agree in all but `scale`, or under none.
        conds: keyword arguments of the network, one mapping for each state. Values whose leading
            axis is the state's batch (tensors, lists) are joined; others must be equal.
        """
        count = len(self.states)
        models = [model] * count if isinstance(model, Model) else list(model)
        given: Sequence[Mapping[str, Any]] = [{}] * count if conds is None else list(conds)
        for name, values in (("model", models), ("conds", given)):
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} states; one each")
        self._asked()
        which = [i for i, state in enumerate(self.states) if not state.done]
        sizes = [self.states[i].x.shape[0] for i in which]
        cond = _joined("conds", [given[i] for i in which], sizes)
        for i in which:
            if self.states[i].nfe == 0:
                check_match(self.states[i].plan, models[i])
        one = _common([models[i] for i in which], sizes)
        with torch.no_grad():
            return self.advance(one.output(*self.query(), self.level, cond), hook)


def batch(states: Sequence[State]) -> Batch:
    """States as one batch: `Batch`. Their samples must have one shape, type and device, and their
    times be all integers or all real."""
    states = tuple(states)
    for state in states:
        if not isinstance(state, State):
            raise ValueError(
                f"states holds {type(state).__name__}; need states, as plan.start makes them"
            )
    facts: tuple[tuple[str, Callable[[State], Any]], ...] = (
        ("samples of shape", lambda s: tuple(s.x.shape[1:])),
        ("dtype", lambda s: s.x.dtype),
        ("device", lambda s: s.x.device),
        ("integer_times", lambda s: s.plan.integer_times),
        ("times of a sample with axis", _time_axis),
    )
    for name, fact in facts:
        for state in states:
            first, here = fact(states[0]), fact(state)
            if here != first:
                raise ValueError(
                    f"states: {name} {first} and {here} in one batch; they must agree, or be "
                    "batches of their own"
                )
    return Batch(states)


def _time_axis(state: State) -> int | None:
    axis = state.plan.axis
    return None if axis == -state.x.ndim else axis


def _joined(name: str, values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One condition for all samples from one per state."""
    first = values[0]
    if all(isinstance(v, Mapping) for v in values):
        keys = list(first)
        for v in values:
            if set(v) != set(keys):
                raise ValueError(
                    f"{name} have different entries, {sorted(keys)} and {sorted(v)}; a call needs "
                    "the same from every state"
                )
        return {k: _joined(f"{name}[{k!r}]", [v[k] for v in values], sizes) for k in keys}
    pairs = list(zip(values, sizes, strict=True))
    if all(isinstance(v, Tensor) and v.ndim and v.shape[0] == n for v, n in pairs):
        if len({(v.shape[1:], v.dtype, v.device) for v in values}) > 1:
            raise ValueError(
                f"{name} holds tensors of different shapes per sample, types or devices, which "
                "cannot be joined; pad or convert them"
            )
        return torch.cat(list(values))
    if all(isinstance(v, (list, tuple)) and len(v) == n for v, n in pairs):
        return type(first)(x for v in values for x in v)
    if not all(v is first or _equal(v, first) for v in values):
        raise ValueError(
            f"{name} differs from state to state and has no leading axis of {list(sizes)} samples; "
            "give one value per sample, or the same for all"
        )
    return first


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(np.all(a == b))


def _common(models: Sequence[Model], sizes: Sequence[int]) -> Model:
    """The one model that is all of these, its guidance scales one per sample."""
    first = models[0]
    if all(model is first for model in models) and not (
        isinstance(first, Guided) and isinstance(first.scale, tuple)
    ):
        return first
    guides = [model for model in models if isinstance(model, Guided)]
    bases = [model.model if isinstance(model, Guided) else model for model in models]
    if not all(base is bases[0] for base in bases):
        raise ValueError(
            "model: states with different networks cannot share a call; only the guidance scale "
            "around one and the same model may differ"
        )
    for guide in guides:
        if (guide.interval, guide.rescale) != (guides[0].interval, guides[0].rescale) or not _equal(
            guide.uncond, guides[0].uncond
        ):
            raise ValueError(
                "model: guidance of different uncond, interval or rescale cannot share a call; "
                "only the scale may differ"
            )
    scales: list[float] = []
    for model, n in zip(models, sizes, strict=True):
        scale = np.asarray(model.scale if isinstance(model, Guided) else 1.0)
        if scale.ndim and len(scale) != n:
            raise ValueError(f"scale has {len(scale)} entries for {n} samples; give one each")
        scales += np.broadcast_to(scale, (n,)).tolist()
    return Guided(bases[0], scales, guides[0].uncond, guides[0].interval, guides[0].rescale)
