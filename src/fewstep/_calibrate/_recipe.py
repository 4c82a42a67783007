"""Recipes: what calibration found for one network, as one file.

A recipe holds a plan for every number of evaluations it was asked for, what they are for (process,
prediction, guidance, a fingerprint of the network), the model statistics if any were made, and the
report: errors of every candidate with confidence intervals, and what finding it cost.

    recipe = fewstep.calibrate(denoiser, shape=(3, 32, 32), nfe=[5, 6, 8])
    recipe.save("my-model.fewstep.safetensors")
    images = fewstep.sample(denoiser, (16, 3, 32, 32), solver=recipe, nfe=6)

A plan that was fitted to one network says nothing about another: used with another network,
guidance or process a recipe is refused, unless forced, and then warns.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._denoiser import Model
from .._files import _parsed, plan_from_bytes, plan_to_bytes, read, to_bytes, write
from .._plan import Call, Plan, Row
from .._process import Level
from .._sampling import PlanSource, check_match, plan
from ._by_value import PlansByValue
from ._ems import EMS
from ._fingerprint import differs, same_guidance

__all__ = ["Candidate", "Recipe", "as_it_is", "called", "moved"]

_FORMAT = "fewstep.recipe.1"


@dataclass(frozen=True)
class Candidate:
    """One line of a report: a way to sample with `nfe` evaluations, and its errors.

    An error is the root mean square over elements of the distance between a sample and the
    converged one from the same noise. median, rms (root mean square) and p90 are over the test
    noises, which no fit and no choice has seen; low, high: 95 % confidence interval of the median.
    held: median over the held-out noises, on which the choice was made.
    kind: "solver", "compensated", "statistics", "search", "learned", "bands" (learned, by bands of
        modes), "each" (learned, one plan for every value of a condition).
    evaluations, seconds: what finding it cost, in network evaluations of one sample.
    """

    nfe: int
    name: str
    kind: str
    median: float
    low: float
    high: float
    rms: float
    p90: float
    held: float
    evaluations: int = 0
    seconds: float = 0.0
    chosen: bool = False


@dataclass(frozen=True, eq=False)
class Recipe(PlanSource):
    """Plans fitted to one network, and the report of how they were found. `print` shows it.

    plans: by number of evaluations; with `each`, for some a `PlansByValue`. candidates: everything
        that was compared.
    process, prediction: in words. guidance: of the model, outermost first.
    shape: of one sample. known: the fingerprint of the network.
    statistics: model statistics (DPM-Solver-v3), if made. info: noises, teacher, versions.
    forced: use it with any network, guidance and process, and warn.
    """

    plans: Mapping[int, Plan | PlansByValue]
    candidates: tuple[Candidate, ...]
    process: str
    prediction: str
    guidance: list[dict[str, Any]]
    shape: tuple[int, ...]
    known: Mapping[str, Any] = field(repr=False)
    statistics: EMS | None = field(default=None, repr=False)
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)
    forced: bool = False
    _checked: dict[int, weakref.ref[Any]] = field(default_factory=dict, repr=False, init=False)

    @property
    def nfes(self) -> tuple[int, ...]:
        """The numbers of evaluations that it has plans for."""
        return tuple(sorted(self.plans))

    def plan_for(
        self, model: Model, nfe: int | None = None, cond: Mapping[str, Any] | None = None
    ) -> Plan:
        """The plan for this model and these conditions, refused if the recipe was not made for
        them.

        A network without parameters is asked two questions about one sample, once, to know it."""
        run = self.one(nfe, cond)
        problems = self._problems(model)
        fits = ""
        try:
            check_match(run, model)
        except ValueError as error:
            fits = str(error)
            problems.insert(
                0,
                f"process {model.process!r}, prediction {model.prediction.name!r}, where the "
                f"recipe is for {self.process}, {self.prediction!r}",
            )
        if problems and not self.forced:
            raise ValueError(
                f"solver: the recipe was made for another model: {'; '.join(problems)}. Calibrate "
                "this one, or take the risk with recipe.force()"
            )
        if problems:
            warnings.warn(
                f"the recipe was made for another model: {'; '.join(problems)}; its errors do not "
                "hold here",
                stacklevel=4,
            )
        return moved(run, model) if fits else run

    def one(self, nfe: int | None = None, cond: Mapping[str, Any] | None = None) -> Plan:
        """The plan for these conditions, whatever the model. Hosts that do not know conditions
        leave them out: refused where there is a plan for each value of one."""
        if nfe is None and len(self.plans) == 1:
            nfe = self.nfes[0]
        if nfe is None or nfe not in self.plans:
            have = ", ".join(map(str, self.nfes))
            raise ValueError(f"nfe = {nfe}; this recipe has plans for {have}")
        run = self.plans[nfe]
        return run if isinstance(run, Plan) else run.plan(cond, 1 + len(self.shape))

    def _problems(self, model: Model) -> list[str]:
        out = []
        if said := same_guidance(self.guidance, model):
            out.append(said)
        seen = self._checked.get(id(model))
        if seen is None or seen() is not model:
            if said := differs(self.known, model, self.shape):
                return [*out, f"another network: {said}"]
            self._checked[id(model)] = weakref.ref(model)
        return out

    def force(self) -> Recipe:
        """The same recipe for any network, guidance and process; using it then warns."""
        return replace(self, forced=True)

    def best_uncalibrated(self, nfe: int) -> Candidate:
        """The best of the solvers as they are: least median on the held-out noises."""
        rows = [c for c in self.candidates if c.nfe == nfe and c.kind == "solver"]
        return min(rows, key=lambda c: c.held)

    def chosen(self, nfe: int) -> Candidate:
        """The line of the plan that the recipe has."""
        return next(c for c in self.candidates if c.nfe == nfe and c.chosen)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        info = self.info
        yield (
            f"recipe for {info.get('network', 'a network')}, samples {list(self.shape)}, "
            f"{self.process}, predicts {self.prediction}"
        )
        for g in self.guidance:
            yield f"guidance scale {g['scale']}"
        if "teacher" in info:
            yield str(info["teacher"])
        if self.statistics is not None:
            how = self.statistics.info.get("derivative", "")
            yield f"statistics: {self.statistics!r}, derivatives: {how}"
        yield (
            "error: distance to the converged sample from the same noise, root mean square over "
            "elements"
        )
        for nfe in self.nfes:
            rows = [c for c in self.candidates if c.nfe == nfe]
            best = {
                kind: min((c for c in rows if c.kind == kind), key=lambda c: c.held)
                for kind in dict.fromkeys(c.kind for c in rows)
            }
            here, plain = self.chosen(nfe), self.best_uncalibrated(nfe)
            yield ""
            if here.kind == "solver":
                yield f"NFE {nfe}: no calibrated plan is better than {here.name}, which is kept"
            else:
                how = here.name if here.kind == "each" else here.kind
                yield (
                    f"NFE {nfe}: {how}, median error {plain.median / here.median:.2g} times "
                    f"smaller than that of {plain.name}"
                )
            width = max(len(c.name) for c in best.values())
            yield (
                f"  {'':12} {'':{width}}  {'median':>8} {'95 % interval':>19} {'rms':>8} "
                f"{'p90':>8} {'evaluations':>12} {'seconds':>8}"
            )
            for c in sorted(best.values(), key=lambda c: c.median):
                mark = "*" if c.chosen else " "
                yield (
                    f"{mark} {c.kind:12} {c.name:{width}}  {c.median:8.3g} "
                    f"{c.low:8.3g} - {c.high:8.3g} {c.rms:8.3g} {c.p90:8.3g} "
                    f"{c.evaluations:12,} {c.seconds:8.1f}"
                )
            robust = info.get("robust", {}).get(str(nfe), {})
            if robust:
                said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in robust.items())
                yield f"  median error over that of the best solver as it is: {said}"
        yield ""
        if info.get("skipped"):
            yield f"not tried, for lack of time: {', '.join(info['skipped'])}"
        yield "* the plan in this recipe. Intervals are of the median over fresh noises."

    def to_bytes(self) -> bytes:
        """The recipe as safetensors."""
        tensors: dict[str, Tensor] = {}
        each: dict[str, Any] = {}
        for n, p in self.plans.items():
            if isinstance(p, Plan):
                tensors[f"plan.{n}"] = _bytes(plan_to_bytes(p))
                continue
            each[str(n)] = {"name": p.name, "values": list(p.plans)}
            for i, one in enumerate(p.plans.values()):
                tensors[f"each.{n}.{i}"] = _bytes(plan_to_bytes(one))
        if self.statistics is not None:
            tensors["statistics"] = _bytes(self.statistics.to_bytes())
        tensors["fingerprint"] = torch.from_numpy(np.array(self.known["values"], np.float64))
        plain: dict[str, Any] = {}
        for name, value in self.known.get("cond", {}).items():
            _put(tensors, plain, f"cond.{name}", value)
        body = {
            "candidates": [asdict(c) for c in self.candidates],
            "process": self.process,
            "prediction": self.prediction,
            "guidance": self.guidance,
            "shape": list(self.shape),
            "known": {"kind": self.known["kind"], "size": self.known["size"], "cond": plain},
            "info": dict(self.info),
            **({"each": each} if each else {}),
        }
        return to_bytes(tensors, {"format": _FORMAT, "recipe": json.dumps(body)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file. A kill leaves the old file or the new one, never half."""
        write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], force: bool = False) -> Recipe:
        """Read a file written by `save`; refused in a sentence if it is anything else.

        force: use it whatever the network, guidance and process; it then warns."""
        recipe: Recipe = read(path, recipe_from_bytes)
        return recipe.force() if force else recipe


def called(solver: str, grid: str, final: str) -> str:
    """The name of a solver as it is, in reports."""
    return f"{solver} on {grid}" + (" to min" if final == "min" else "")


def as_it_is(model: Model, nfe: int, name: str) -> Plan:
    """The plan of a solver as it is, from its name in a report."""
    solver, _, grid = name.partition(" on ")
    final = "min" if grid.endswith(" to min") else "zero"
    return plan(solver, model, nfe, grid=grid.removesuffix(" to min"), final=final)


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _put(tensors: dict[str, Tensor], plain: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _put(tensors, plain, f"{name}.{key}", part)
    elif isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
    else:
        plain[name] = value


def recipe_from_bytes(content: bytes) -> Recipe:
    """The recipe that `Recipe.to_bytes` wrote."""
    meta, tensors = _parsed(content, _FORMAT, "Recipe.save")
    try:
        body = json.loads(meta["recipe"])
        plans: dict[int, Plan | PlansByValue] = {}
        for n, its in body.get("each", {}).items():
            ones = (tensors.pop(f"each.{n}.{i}").numpy() for i in range(len(its["values"])))
            some = {
                v: plan_from_bytes(one.tobytes())
                for v, one in zip(its["values"], ones, strict=True)
            }
            plans[int(n)] = PlansByValue(its["name"], some)
        cond: dict[str, Any] = {}
        for name, value in {**tensors, **body["known"].pop("cond")}.items():
            kind, *where = name.split(".")
            if kind == "plan":
                plans[int(where[0])] = plan_from_bytes(value.numpy().tobytes())
            elif kind == "cond":
                inner = cond
                for key in where[:-1]:
                    inner = inner.setdefault(key, {})
                inner[where[-1]] = value
        statistics = None
        if "statistics" in tensors:
            statistics = EMS.from_bytes(tensors["statistics"].numpy().tobytes())
        known = {**body["known"], "values": tensors["fingerprint"].numpy(), "cond": cond}
        if not plans:
            raise ValueError("no plan")
        return Recipe(
            dict(sorted(plans.items())),
            tuple(Candidate(**c) for c in body["candidates"]),
            body["process"],
            body["prediction"],
            body["guidance"],
            tuple(body["shape"]),
            known,
            statistics,
            body["info"],
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"says it is a recipe but lacks or garbles {error}; save again") from error


def moved(run: Plan, model: Model) -> Plan:
    """A plan for a model of another process or prediction, at the same lambda.

    At equal lambda all Gaussian paths are one, up to the scale n = hypot(alpha, sigma) of the
    state: X' = (n' / n) X, D' = D. Refused where the model does not know the plan's levels."""
    process, prediction = model.process, model.prediction
    if run.raw or run.axis is not None:
        raise ValueError("plan: only a plan of data predictions, with one level per state, moves")
    ends = float(process.lam(process.t_start)), float(process.lam(process.t_end))

    def there(level: Level) -> Level:
        if level.sigma == 0:
            if process.t_clean is None:
                return Level(process.t_end, 1.0, 0.0, math.inf)
            return process.level(process.t_clean)
        slack = 1e-9
        if not ends[0] - slack <= level.lam <= ends[1] + slack:
            raise ValueError(
                f"plan: it goes to lambda = {level.lam:.6g}, but {process!r} knows lambda from "
                f"{ends[0]:.6g} to {ends[1]:.6g}"
            )
        return process.level(float(process.time(np.clip(level.lam, *ends))))

    levels = tuple(there(v) for v in run.levels)
    scale = [
        float(np.hypot(new.alpha, new.sigma) / np.hypot(old.alpha, old.sigma))
        for new, old in zip(levels, run.levels, strict=True)
    ]

    def call(k: int) -> Call | None:
        old = run.calls[k]
        if old is None:
            return None
        level = levels[k] if old.level is None else there(old.level)
        # The state has its own level's scale, the network wants that of the level it is told.
        scalars = (float(v) for v in prediction.scalars(level))
        if model.rounds and level.t != round(level.t):
            raise ValueError(f"plan: {process!r} knows integer times only, not {level.t:.6g}")
        return Call(*scalars, level=None if old.level is None else level)

    rows = []
    for made, row in enumerate(run.rows, run.given):
        a = {j: c * scale[made] / scale[j] for j, c in row.a.items()}
        b = {j: c * scale[made] for j, c in row.b.items()}
        e = {m: c * scale[made] for m, c in row.e.items()}
        rows.append(Row(a, b, row.order, row.exact, e, row.c * scale[made]))
    return replace(
        run,
        levels=levels,
        rows=tuple(rows),
        calls=tuple(call(k) for k in range(len(levels))),
        integer_times=model.rounds and prediction.time == "t",
        prior_std=run.prior_std * scale[0],
        draws=tuple(replace(z, start=there(z.start), end=there(z.end)) for z in run.draws),
        origin=None,
    )
