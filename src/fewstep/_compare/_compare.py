"""`compare`: solvers and recipes side by side on one model, from the same noises."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from .._calibrate._calibrate import _described, _Store
from .._calibrate._fingerprint import fingerprint, guidance_of, network_of, same_guidance
from .._calibrate._learn import score
from .._calibrate._recipe import Recipe
from .._calibrate._statistics import digest
from .._calibrate._teacher import Teacher, cycled, shared_errors, taken, teach
from .._denoiser import Model
from .._files import plan_to_bytes
from .._grids import Grid
from .._plan import Plan, State
from .._sampling import plan
from .._solvers._base import Solver
from .._solvers._registry import as_solver
from .._solvers._registry import solvers as registry
from .._version import __version__
from ..metrics import (
    Estimate,
    error_ratio,
    error_summary,
    frechet_distance,
    sliced_wasserstein,
)
from ..metrics import features as features_of
from ._numbers import Comparison, Line

__all__ = ["GRIDS", "NFES", "SOLVERS", "Prepared", "compare", "drawn", "prepare"]

#: What users have, and what is best here on one kind of problem or another.
SOLVERS = (
    "ddim",
    "heun",
    "dpm_solver_2",
    "deis_tab3",
    "ipndm_2",
    "ipndm_4",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc_2",
    "unipc_3",
    "flow_ipndm_2",
    "flow_ab2",
    "flow_pc2",
    "cflow_pc2",
)
GRIDS = ("softened_8", "softened", "lambda", "karras")
NFES = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20)
#: Noises on which a solver's grid is chosen; enough, for grids differ more than noises do.
_FEW = 16
#: Of the sliced Wasserstein distance: its interval knows that there are so many.
_DIRECTIONS = 128
#: What converged samples are said to take before it is known.
_STEPS = 96


def compare(
    model: Model,
    shape: Sequence[int],
    *,
    solvers: Sequence[str | Solver] | str | None = None,
    nfe: int | Sequence[int] = NFES,
    grids: Sequence[str | Grid] = GRIDS,
    finals: Sequence[str] = ("zero",),
    recipes: Mapping[str, Recipe] | None = None,
    count: int = 256,
    reference: int | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    features: Callable[[Tensor], Tensor] | None = None,
    data: ArrayLike | Tensor | None = None,
    images: int = 8,
    data_range: tuple[float, float] = (-1.0, 1.0),
    name: str | None = None,
    resume: str | Path | None = None,
    batch: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Run solvers and recipes on one model from the same noises, and measure them.

    The error of a sample is its distance to the converged sample of the same model from the same
    noise. Distances of distributions are to converged samples from other noises. Every solver runs
    on the best of the grids, chosen for each nfe on noises that are not reported.

    model: as it will be used: with its guidance, in its dtype. shape: of one sample.
    solvers: names or solvers, deterministic ones. None: fourteen. "all": every one there is.
    nfe: numbers of evaluations. What cannot spend exactly so many is left out, with the reason.
    grids: to choose from. finals: ends to choose from, "zero" and "min", as in `fewstep.plan`.
    recipes: of `fewstep.calibrate`, by what to call them.
    count: noises that are reported. reference: converged samples from other noises. None: twice as
        many.
    cond: conditions; tensors, arrays and lists with one entry per prompt, of which every sample
        draws one at random; everything else is passed on.
    seed: sample k starts from noise number k, as in `fewstep.sample`.
    features: a function of a batch of samples, for Frechet distances (see `fewstep.metrics`).
    data: features (n, d) of real data.
    images: samples to keep as pictures, where they have 1 or 3 channels. data_range: of the data.
    name: of the model. resume: a folder for finished parts. A call that was killed goes on from
        there, and a later one may ask for more solvers, recipes and numbers of evaluations.
    batch: samples per network call. device: of the state.

    Stochastic solvers have no trajectory to converge to, and are refused; `fewstep.metrics` has
    distances for their samples.
    """
    return prepare(
        model,
        shape,
        solvers=solvers,
        nfe=nfe,
        grids=grids,
        finals=finals,
        recipes=recipes,
        count=count,
        reference=reference,
        cond=cond,
        seed=seed,
        features=features,
        data=data,
        images=images,
        data_range=data_range,
        name=name,
        resume=resume,
        batch=batch,
        device=device,
    ).run(progress)


@dataclass(frozen=True)
class _Entry:
    """One method at one number of evaluations. where: (grid, final) of every plan; a recipe has
    its own."""

    method: str
    nfe: int
    where: tuple[tuple[str, str], ...]
    plans: tuple[Plan, ...]
    recipe: Recipe | None = None

    @property
    def known(self) -> str:
        """What its numbers depend on, beside the job."""
        if self.recipe is None:
            return digest([plan_to_bytes(p) for p in self.plans])
        its = self.recipe.plans[self.nfe]
        if isinstance(its, Plan):
            return digest(plan_to_bytes(its))
        return digest(its.name, [(v, plan_to_bytes(p)) for v, p in its.plans.items()])


class _Parts(_Store):
    """Finished parts of a comparison."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError:
            raise ValueError(
                f"resume = {str(self.folder)!r} holds the parts of another job (another network, "
                "guidance, shape, conditions, features, noises, seed or setting); give another one"
            ) from None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A comparison that was checked and compiled, before its first sample.

    evaluations: of one sample, at most, without those of `converged` converged samples, which take
    48 to 384 each.
    """

    model: Model
    shape: tuple[int, ...]
    name: str
    entries: tuple[_Entry, ...]
    skipped: Mapping[tuple[str, int], str]
    count: int
    reference: int
    cond: Mapping[str, Any]
    prompts: int
    seed: int
    grids: tuple[str, ...]
    features: Callable[[Tensor], Tensor] | None
    data: Tensor | None
    images: int
    data_range: tuple[float, float]
    resume: Path | None
    batch: int
    device: torch.device

    @property
    def converged(self) -> int:
        """Samples to converge: reported ones, those that choose, the reference."""
        return self.count + _FEW + self.reference

    @property
    def evaluations(self) -> int:
        """Of the choice (most of whose first ones are shared) and of the methods."""
        choice = sum(p.nfe for e in self.entries if len(e.plans) > 1 for p in e.plans)
        return choice * _FEW + self.count * sum(e.nfe for e in self.entries)

    def run(self, progress: bool = True) -> Comparison:
        """Measure everything."""
        probe = None if self.features is None else self._probe()
        known = fingerprint(self.model, self.shape, self.cond, self.converged)
        settings = {
            "reported, chosen on, reference": [self.count, _FEW, self.reference],
            "directions": _DIRECTIONS,
            "images": self.images,
            "data range": list(self.data_range),
            "batch": self.batch,
            "fewstep": __version__,
            "features": None if probe is None else digest(probe),
        }
        noises = (self.count, _FEW, self.reference)
        text = _described(
            self.model,
            self.shape,
            known,
            self.cond,
            noises,
            self.seed,
            torch.float32,
            self.data,
            settings,
        )
        store = _Parts(self.resume, text)
        total = self.evaluations + _STEPS * self.converged
        with tqdm(total=total, disable=not progress, unit=" evaluations", unit_scale=True) as bar:
            bar.set_description(f"{self.name}: converged samples")
            return _Run(self, store, self._teacher(store, bar), bar).comparison()

    def _probe(self) -> Tensor:
        """Features of two noises."""
        assert self.features is not None
        few = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        made = features_of(few, self.features, device=self.device)
        if self.data is not None and made.shape[1] != self.data.shape[1]:
            raise ValueError(
                f"data has {self.data.shape[1]} features where the function features makes "
                f"{made.shape[1]}; they must agree"
            )
        if min(self.count, self.reference) < 2 * made.shape[1]:
            warnings.warn(
                f"{min(self.count, self.reference)} samples for {made.shape[1]} features: with "
                "fewer than two per feature Frechet distances are too large; compare them with "
                "that of the converged samples only",
                stacklevel=4,
            )
        return made

    def _teacher(self, store: _Store, bar: Any) -> Teacher:
        def make() -> tuple[dict[str, Tensor], Any]:
            made = converged(
                self.model,
                self.shape,
                self.converged,
                self.cond,
                self.seed,
                self.batch,
                self.device,
                onward(bar, _STEPS),
            )
            return {"x": made.x, "samples": made.samples}, (made.error, made.nfe)

        tensors, (error, spent) = store.part("converged", make)
        bar.update(_STEPS * self.converged - bar.n)
        x, samples = (tensors[k].to(self.device) for k in ("x", "samples"))
        return Teacher(self.model, x, samples, self.cond, error, spent, self.batch)


def onward(bar: Any, step: int = 1) -> Callable[[int], None]:
    """What takes a number of things done, and moves a bar from where it is by `step` for each."""
    begin = bar.n

    def to(done: int) -> None:
        bar.update(begin + done * step - bar.n)

    return to


def converged(
    model: Model,
    shape: tuple[int, ...],
    count: int,
    cond: Mapping[str, Any],
    seed: int,
    batch: int,
    device: torch.device,
    each: Callable[[int], None] | None = None,
) -> Teacher:
    """Converged samples, refused where they are not finite."""
    made = teach(model, shape, count, cond=cond, seed=seed, batch=batch, device=device, each=each)
    if not bool(torch.isfinite(made.samples).all()):
        raise FloatingPointError(
            "the model's converged samples are not finite; look for overflow in half precision, or "
            "a wrong process or prediction (fewstep.diagnose)"
        )
    return made


@dataclass
class _Run:
    """A comparison on its way."""

    job: Prepared
    store: _Store
    teacher: Teacher
    bar: Any
    test: Teacher = field(init=False)
    few: Teacher = field(init=False)
    reference: Tensor = field(init=False)
    reference_features: Tensor | None = field(init=False)
    #: What the network answers to the noises themselves, which all methods ask first.
    first: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, m = self.job.count, self.job.count + _FEW
        self.test, self.few = self.teacher[:n], self.teacher[n:m]
        self.reference = self.teacher.samples[m:]
        self.reference_features = self._features(self.reference)

    def comparison(self) -> Comparison:
        job = self.job
        lines: list[Line] = []
        pictures: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._picture(("converged", 0), self.test.samples, pictures)
        for nfe in sorted({e.nfe for e in job.entries}):
            entries = [e for e in job.entries if e.nfe == nfe]
            where = self._chosen(nfe, entries)
            found = [self._measured(e, k) for e, k in zip(entries, where, strict=True)]
            errors = [tensors["errors"].numpy() for tensors, _ in found]
            summaries = [error_summary(e) for e in errors]
            best = int(np.argmin([s.median.value for s in summaries]))
            for i, (entry, (tensors, body), its) in enumerate(
                zip(entries, found, summaries, strict=True)
            ):
                ratio = error_ratio(errors[i], errors[best])
                distances = {k: Estimate(*v) for k, v in body["distances"].items()}
                lines.append(
                    Line(
                        entry.method,
                        "solver" if entry.recipe is None else "recipe",
                        body["grid"],
                        body["final"],
                        nfe,
                        its.median,
                        its.rms,
                        its.p90,
                        ratio,
                        i == best,
                        i == best or ratio.low <= 1 <= ratio.high,
                        **distances,
                    )
                )
                if "pictures" in tensors:
                    pictures[entry.method, nfe] = tensors["pictures"].numpy()
        there: dict[str, Estimate | None] = {"sliced": None, "frechet": None, "data": None}
        there |= self._distances(self.test.samples)
        return Comparison(job.name, tuple(lines), there, job.skipped, self._about(), pictures)

    def _about(self) -> dict[str, Any]:
        job, t = self.job, self.teacher
        return {
            "process": repr(job.model.process),
            "prediction": job.model.prediction.name,
            "guidance": guidance_of(job.model),
            "shape": list(job.shape),
            "conditions": f"one of {job.prompts} each, at random" if job.prompts else "",
            "seed": job.seed,
            "noises": job.count,
            "chosen on": _FEW,
            "reference": job.reference,
            "grids": list(job.grids),
            "converged samples": (
                f"{t.nfe} evaluations each, median distance to twice as many steps {t.error:.2g}"
            ),
            "features": "" if job.features is None else _called(job.features),
            "fewstep": __version__,
            "torch": str(torch.__version__),
        }

    def _chosen(self, nfe: int, entries: Sequence[_Entry]) -> list[int]:
        """Which plan of every method: the best on the noises to choose on."""
        plans = [p for e in entries if len(e.plans) > 1 for p in e.plans]
        spent = nfe * _FEW

        def make() -> tuple[dict[str, Tensor], Any]:
            self.bar.set_description(f"{self.job.name}: NFE {nfe}, grids")
            errors = shared_errors(self.few, plans, onward(self.bar, spent))
            scores, out = iter([score(e) for e in errors]), []
            for e in entries:
                several = len(e.plans) > 1
                out.append(int(np.argmin([next(scores) for _ in e.plans])) if several else 0)
            return {}, out

        end = self.bar.n + len(plans) * spent
        key = digest([(e.method, e.known) for e in entries])
        _, chosen = self.store.part(f"grids-{nfe}-{key[:16]}", make) if plans else make()
        self.bar.update(end - self.bar.n)
        return chosen

    def _measured(self, entry: _Entry, chosen: int) -> tuple[dict[str, Tensor], Any]:
        """Errors, distances and pictures."""

        def make() -> tuple[dict[str, Tensor], Any]:
            self.bar.set_description(f"{self.job.name}: NFE {entry.nfe}, {entry.method}")
            samples = self._samples(entry, chosen)
            grid, final = entry.where[chosen]
            tensors = {"errors": torch.from_numpy(self.test.distances(samples))}
            pictures: dict[tuple[str, int], NDArray[np.uint8]] = {}
            self._picture(("", 0), samples, pictures)
            for picture in pictures.values():
                tensors["pictures"] = torch.from_numpy(picture)
            distances = {k: list(v) for k, v in self._distances(samples).items()}
            return tensors, {"grid": grid, "final": final, "distances": distances}

        end = self.bar.n + entry.nfe * self.job.count
        key = digest(entry.method, entry.known, entry.where[chosen])
        plain = re.sub(r"[^\w.-]", "_", entry.method)[:40]
        made = self.store.part(f"{entry.nfe}-{plain}-{key[:16]}", make)
        self.bar.update(end - self.bar.n)
        return made

    def _samples(self, entry: _Entry, chosen: int) -> Tensor:
        model, out = self.job.model, []
        for part in self.test.chunks():
            sub = self.test[part]
            if entry.recipe is None:
                run = entry.plans[chosen]
            else:
                run = entry.recipe.plan_for(model, entry.nfe, sub.cond)
            with torch.no_grad():
                state = run.start(sub.x)
                while not state.done:
                    state = state.advance(self._answer(part.start, state, sub.cond))
            out.append(state.x)
            self.bar.update(entry.nfe * len(sub))
        return torch.cat(out)

    def _answer(self, start: int, state: State, cond: Mapping[str, Any]) -> Tensor:
        """The network's answer, the first one from memory."""
        model, level, call = self.job.model, state.plan.asked(state.index), state.plan.calls[0]
        if state.index or call is None or state.plan.axis is not None:
            return model.output(*state.query(), level, cond)
        key = (start, call.c_in, call.c_noise, level, state.plan.integer_times)
        if key not in self.first:
            self.first[key] = model.output(*state.query(), level, cond)
        return self.first[key]

    def _features(self, samples: Tensor) -> Tensor | None:
        if self.job.features is None:
            return None
        return features_of(samples, self.job.features, batch=self.job.batch, device=self.job.device)

    def _distances(self, samples: Tensor) -> dict[str, Estimate]:
        """To the reference and the data; infinite where something is not finite."""
        its, infinite = self._features(samples), Estimate(math.inf, math.inf, math.inf)
        out: dict[str, Estimate] = {}

        def add(key: str, of: Callable[..., Estimate], x: Tensor, y: Tensor, **more: Any) -> None:
            good = bool(torch.isfinite(x).all())
            with warnings.catch_warnings():  # too few for so many features was said once
                warnings.simplefilter("ignore", UserWarning)
                out[key] = of(x, y, **more) if good else infinite

        add("sliced", sliced_wasserstein, samples, self.reference, directions=_DIRECTIONS)
        if its is not None:
            assert self.reference_features is not None
            add("frechet", frechet_distance, its, self.reference_features)
            if self.job.data is not None:
                add("data", frechet_distance, its, self.job.data)
        return out

    def _picture(self, key: tuple[str, int], samples: Tensor, into: dict[Any, Any]) -> None:
        shape, (low, high) = self.job.shape, self.job.data_range
        if not self.job.images or len(shape) != 3 or shape[0] not in (1, 3):
            return
        unit = (samples[: self.job.images].double().cpu() - low) / (high - low)
        bytes_ = (255 * unit.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)).round().to(torch.uint8)
        into[key] = bytes_.permute(0, 2, 3, 1).contiguous().numpy()


# What is asked for


def prepare(
    model: Model,
    shape: Sequence[int],
    *,
    solvers: Sequence[str | Solver] | str | None = None,
    nfe: int | Sequence[int] = NFES,
    grids: Sequence[str | Grid] = GRIDS,
    finals: Sequence[str] = ("zero",),
    recipes: Mapping[str, Recipe] | None = None,
    count: int = 256,
    reference: int | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    features: Callable[[Tensor], Tensor] | None = None,
    data: ArrayLike | Tensor | None = None,
    images: int = 8,
    data_range: tuple[float, float] = (-1.0, 1.0),
    name: str | None = None,
    resume: str | Path | None = None,
    batch: int = 256,
    device: torch.device | str | None = None,
) -> Prepared:
    """Check and compile what `compare` is asked for, without asking the network anything."""
    size = checked(model, shape, batch)
    reference = 2 * count if reference is None else reference
    for what, value, least in (
        ("count", count, 8),
        ("reference", reference, 8),
        ("images", images, 0),
        ("seed", seed, 0),
    ):
        check_integer(what, value, least)
    counts = [nfe] if isinstance(nfe, Integral) else list(nfe)  # type: ignore[list-item]
    if not counts:
        raise ValueError("nfe is empty; give numbers of evaluations, such as (5, 8, 10)")
    for value in counts:
        check_integer("nfe", value, 1)
    if features is not None and not callable(features):
        raise ValueError(f"features = {features!r}; need a function of a batch of samples")
    if isinstance(features, torch.nn.Module) and features.training:
        raise ValueError("features is in training mode, where they depend on the batch: .eval()")
    if len(data_range) != 2 or not data_range[0] < data_range[1]:
        raise ValueError(f"data_range = {data_range}; need two numbers low < high")
    if not grids or not finals:
        raise ValueError(f"grids = {grids!r}, finals = {finals!r}; need one of each at least")
    if isinstance(grids, str) or isinstance(finals, str):
        raise ValueError(f"grids = {grids!r}, finals = {finals!r}; need lists of them")
    used = _solvers(solvers)
    labels = [s.name for s in used] + list(recipes or {})
    if not labels:
        raise ValueError(f"solvers = {solvers!r} and no recipes: nothing to compare")
    for label in labels:
        if labels.count(label) > 1 or label == "converged":
            raise ValueError(f"solvers, recipes: the name {label!r} is taken; call one differently")
    prompts, pool = drawn(cond or {}, count + _FEW + reference, seed)
    entries: list[_Entry] = []
    skipped: dict[tuple[str, int], str] = {}
    for n in sorted({int(n) for n in counts}):
        for made in _compiled(model, n, used, grids, finals, skipped):
            entries.append(made)
        for label, recipe in (recipes or {}).items():
            if n in recipe.plans:
                entries.append(_Entry(label, n, (_where(recipe, n),), (), recipe))
            else:
                have = ", ".join(map(str, recipe.nfes))
                skipped[label, n] = f"nfe = {n}; this recipe has plans for {have}"
    if not entries:
        raise ValueError(f"nothing to compare: {next(iter(skipped.values()))}")
    for label, recipe in (recipes or {}).items():
        fits(label, recipe, model, size, taken(pool, slice(0, 2), count + _FEW + reference))
    return Prepared(
        model,
        size,
        type(network_of(model)).__name__ if name is None else name,
        tuple(entries),
        skipped,
        count,
        reference,
        pool,
        prompts,
        seed,
        tuple(g if isinstance(g, str) else g.name for g in grids),
        features,
        _data(data, features),
        images,
        (float(data_range[0]), float(data_range[1])),
        None if resume is None else Path(resume),
        batch,
        model.device if device is None else torch.device(device),
    )


def checked(model: Any, shape: Sequence[int], batch: int) -> tuple[int, ...]:
    """The shape of one sample."""
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    check_integer("batch", batch, 1)
    size = tuple(shape)
    if not size or not all(isinstance(n, Integral) and n > 0 for n in size):
        raise ValueError(f"shape = {size}; need positive integers, that of one sample")
    return tuple(int(n) for n in size)


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} = {value!r}; need an integer >= {least}")


def drawn(cond: Mapping[str, Any], total: int, seed: int) -> tuple[int, dict[str, Any]]:
    """The number of prompts, and for every sample the conditions of one, at random: taken in turn
    they would be more even than chance, and samples not independent."""
    cycled(cond, 1)  # refuses lists of different lengths
    count = _entries(cond)
    if not count:
        return 0, dict(cond)
    index = np.random.default_rng(seed).integers(0, count, total).tolist()
    return count, taken(cond, index, count)


def _entries(cond: Mapping[str, Any]) -> int:
    """Entries of the conditions that have one per prompt; 0 if none has."""
    for value in cond.values():
        if isinstance(value, Mapping):
            if found := _entries(value):
                return found
        elif isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return int(value.shape[0])
        elif isinstance(value, (list, tuple)):
            return len(value)
    return 0


def _solvers(asked: Sequence[str | Solver] | str | None) -> list[Solver]:
    if asked == "all":
        return [
            s for s in registry.values() if not (s.stochastic or s.adaptive or s.needs_calibration)
        ]
    if isinstance(asked, str):
        raise ValueError(f"solvers = {asked!r}; give a list of names, or 'all'")
    out = [as_solver(s) for s in (SOLVERS if asked is None else asked)]
    for s in out:
        if s.stochastic:
            raise ValueError(
                f"solvers: {s.name!r} draws noise, so that its samples do not converge to those of "
                "the ODE; compare deterministic solvers, and distributions with fewstep.metrics"
            )
        if s.adaptive or s.needs_calibration:
            raise ValueError(f"solvers: {s.name!r} has no plan for a number of evaluations alone")
    return list({id(s): s for s in out}.values())  # once, whatever its aliases


def _compiled(
    model: Model,
    nfe: int,
    used: Sequence[Solver],
    grids: Sequence[str | Grid],
    finals: Sequence[str],
    skipped: dict[tuple[str, int], str],
) -> Iterator[_Entry]:
    for solver in used:
        where, plans, why = [], [], ""
        for grid in grids:
            for final in finals:
                try:
                    made = plan(solver, model, nfe, grid=grid, final=final)
                except ValueError as error:
                    why = why or str(error)
                    continue
                if made.nfe != nfe or made.given != 1:
                    why = why or f"it spends {made.nfe} evaluations, or needs more than one state"
                    continue
                where.append((grid if isinstance(grid, str) else grid.name, final))
                plans.append(made)
        if plans:
            yield _Entry(solver.name, nfe, tuple(where), tuple(plans))
        else:
            skipped[solver.name, nfe] = why


def _where(recipe: Recipe, nfe: int) -> tuple[str, str]:
    """Grid and end of a recipe's plan, as far as it says."""
    its = recipe.plans[nfe]
    one = its if isinstance(its, Plan) else next(iter(its.plans.values()))
    final = "zero" if np.all(np.asarray(one.levels[-1].sigma) == 0) else "min"
    return one.about.get("grid", ""), final


def fits(
    label: str, recipe: Recipe, model: Model, shape: tuple[int, ...], cond: Mapping[str, Any]
) -> None:
    """Refuse a recipe that was made for another model. What needs no network call comes first."""
    if not recipe.forced:
        if said := same_guidance(recipe.guidance, model):
            raise ValueError(f"recipes: {label!r} was made for another model: {said}")
        if recipe.shape != shape:
            raise ValueError(
                f"recipes: {label!r} was made for samples of shape {recipe.shape}, not {shape}"
            )
    for nfe in recipe.nfes:
        try:
            recipe.plan_for(model, nfe, cond)
        except ValueError as error:
            raise ValueError(f"recipes: {label!r}: {error}") from error


def _data(
    data: ArrayLike | Tensor | None, features: Callable[[Tensor], Tensor] | None
) -> Tensor | None:
    if data is None:
        return None
    if features is None:
        raise ValueError("data is given without features; it is compared with features of samples")
    made = data.detach().cpu() if isinstance(data, Tensor) else torch.from_numpy(np.array(data))
    if made.ndim != 2 or len(made) < 8 or not bool(torch.isfinite(made).all()):
        raise ValueError(
            f"data has shape {tuple(made.shape)}; need finite features (n, d) of 8 or more"
        )
    return made


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
