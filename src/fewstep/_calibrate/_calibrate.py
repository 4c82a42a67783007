"""`calibrate`: a network and a number of evaluations in, a recipe out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .._denoiser import Guided, Model
from .._files import _parsed, plan_from_bytes, plan_to_bytes, read, to_bytes, write
from .._grids import grids
from .._plan import Plan
from .._prediction import unknown
from .._process import Array
from .._sampling import plan
from .._solvers._base import Solver
from .._solvers._registry import solvers
from .._solvers._v3 import dpm_solver_v3
from .._version import __version__
from ._by_value import PlansByValue, values_of
from ._compensate import fit_ratios
from ._ems import EMS
from ._fingerprint import fingerprint, guidance_of, network_of
from ._learn import data_mean, learn, score
from ._program import asking, plan_of, program_of
from ._recipe import Candidate, Recipe, as_it_is, called
from ._robustness import robustness
from ._search import search
from ._statistics import digest, estimate_ems
from ._teacher import Counted, Teacher, cycled, shared_errors, taken, teach

__all__ = ["METHODS", "calibrate", "candidate", "found_in", "screened"]

#: What is tried beside the solvers as they are; and what can be, in the order in which it is.
METHODS = ("learned", "compensated", "statistics", "search")
_IN_TURN = ("learned", "bands", *METHODS[1:])

#: Of method "bands": what benchmarks/calibrate.py measures.
_BANDS = 5

#: How a budget is shared among them.
_SHARES = {
    "learned": 6.0,
    "bands": 6.0,
    "compensated": 0.5,
    "statistics": 2.0,
    "search": 2.0,
    "each": 10.0,
}

#: Few, so that large networks can afford them: good below ten evaluations on the problems of
#: benchmarks/defaults.py, or what users have today. screen = "all" tries every one.
_SOLVERS = (
    "ddim",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc_2",
    "unipc_3",
    "ipndm_2",
    "ipndm_3",
    "ipndm_4",
    "flow_ipndm_2",
    "cflow_pc2",
    "flow_pc2",
    "flow_ab2",
    "bdia_per_step",
    "deis_tab3",
)
_GRIDS = ("softened_8", "softened", "lambda", "karras", "arctan", "uniform", "quadratic")
#: Compensation is for methods with a history; statistics have orders and correctors.
_COMPENSATED = 2
_STATISTICS_SAMPLES = 256
#: Iterations per fit; with `each`, of the plan for all, and of the plans for one value, which
#: start from it: more change little there.
_ITERATIONS, _SHARED, _EACH = 80, 24, 4
_FORMAT = "fewstep.calibration.1"


@dataclass(frozen=True)
class _Found:
    """A plan, where it came from, and what finding it cost."""

    name: str
    kind: str
    plan: Plan | PlansByValue
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def one(self) -> Plan:
        """The plan, where it is one for all."""
        assert isinstance(self.plan, Plan)
        return self.plan


@dataclass(frozen=True)
class _Store:
    """Finished parts of a calibration, one file each; nothing if there is no folder."""

    folder: Path | None
    job: str

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "job.json"
        if note.exists() and note.read_text() != self.job:
            raise ValueError(
                f"resume = {str(self.folder)!r} holds the parts of another calibration (another "
                "network, guidance, shape, conditions, noises, seed or setting); give another one"
            )
        write(note, self.job.encode())

    def part(
        self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
    ) -> tuple[dict[str, Tensor], Any]:
        """Tensors and a description, from the folder if they are there."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            meta, tensors = read(path, lambda content: _parsed(content, _FORMAT, "calibrate"))
            return tensors, json.loads(meta["body"])
        tensors, body = make()
        meta = {"format": _FORMAT, "body": json.dumps(body)}
        whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        write(path, to_bytes(whole, meta))
        return tensors, body

    def found(self, name: str, make: Callable[[], Iterable[_Found]]) -> list[_Found]:
        """Plans, from the folder if they are there."""

        def fresh() -> tuple[dict[str, Tensor], Any]:
            made = list(make())
            blobs = [np.frombuffer(plan_to_bytes(f.one), np.uint8).copy() for f in made]
            body = [(f.name, f.kind, f.evaluations, f.seconds) for f in made]
            return {str(i): torch.from_numpy(blob) for i, blob in enumerate(blobs)}, body

        return _unpacked(*self.part(name, fresh))


def _unpacked(tensors: Mapping[str, Tensor], body: Any) -> list[_Found]:
    return [
        _Found(label, kind, plan_from_bytes(tensors[str(i)].numpy().tobytes()), spent, seconds)
        for i, (label, kind, spent, seconds) in enumerate(body)
    ]


def found_in(folder: Path, name: str) -> list[_Found]:
    """Plans of a finished part, "learned-8" for example."""
    path = folder / f"{name}.safetensors"
    meta, tensors = read(path, lambda content: _parsed(content, _FORMAT, "calibrate"))
    return _unpacked(tensors, json.loads(meta["body"]))


@dataclass
class _Job:
    """One calibration on its way."""

    model: Counted
    shape: tuple[int, ...]
    train: Teacher
    held: Teacher
    test: Teacher
    store: _Store
    seed: int
    jacobian: str
    first_step: bool
    reduction: str
    derivative: str
    screen: str
    candidates: int
    deadline: float
    data: Tensor | None
    each: str | None
    #: Of the training and the held-out noises, for plans that are one for all values of `each`.
    few: tuple[Teacher, Teacher]
    say: Callable[[str], None]
    skipped: list[str] = field(default_factory=list)
    #: The learned plan of the last, smaller number of evaluations.
    shorter: Plan | None = None
    ems: EMS | None = None

    def left(self) -> float | None:
        """Seconds left, None without a budget."""
        return None if math.isinf(self.deadline) else max(0.0, self.deadline - time.monotonic())

    @contextmanager
    def cost(self) -> Iterator[list[float]]:
        """[evaluations, seconds] of what is done inside."""
        spent, began, out = self.model.evaluations, time.monotonic(), [0.0, 0.0]
        yield out
        out[:] = [self.model.evaluations - spent, time.monotonic() - began]


def calibrate(
    model: Model,
    shape: Sequence[int],
    nfe: int | Sequence[int] = (5, 6, 8, 10),
    *,
    cond: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    uncond: Mapping[str, Any] | None = None,
    each: str | None = None,
    methods: Sequence[str] = METHODS,
    noises: tuple[int, int, int] = (256, 128, 256),
    jacobian: str = "reverse",
    first_step: bool = True,
    reduction: str | None = None,
    derivative: str = "auto",
    data: Tensor | None = None,
    candidates: int = 800,
    screen: str = "short",
    budget: float | None = None,
    seed: int = 0,
    batch: int = 256,
    resume: str | Path | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Recipe:
    """Fit samplers to a network, compare them with all others, and keep the best of each length.

    Converged samples of the model itself are the measure: an error is the distance of a sample to
    the converged one from the same noise. Nothing but the model is needed. Fits see training
    noises; the choice is made on held-out noises, where the plan that is kept has neither a larger
    median nor a larger root mean square error than the best solver as it is; the report is of a
    third set.

    model: as it will be used: with its guidance, in its dtype. shape: of one sample.
    nfe: numbers of evaluations to find a plan for. In increasing order, so that a learned plan can
        also start from the one before, with evaluations put in.
    cond: conditions; tensors, arrays and lists with one entry per prompt (as many as you like, used
        in turn), everything else is passed on.
    guidance, uncond: classifier-free guidance around the model, as in `fewstep.Guided`.
    each: name of a condition that is one integer or string per prompt, a class for example: also
        learn one plan for each of its values, from the "learned" plan that is one for all. A sample
        then has the plan of its value, in one network call with samples of other values.
    methods: of "learned" (plans fitted in canonical form), "compensated" (DC-Solver), "statistics"
        (DPM-Solver-v3), "search" (USF / S^3); and, if asked for, "bands": the learned plan with
        coefficients of their own for five bands of principal directions of the samples, for
        samples of this shape only.
    noises: for fits, for the choice, for the report; with `each`, of every value.
    jacobian: of learned plans: "reverse", "forward", or "differences" (network calls only: for
        compiled, quantised, half-precision or remote networks).
    first_step: whether learned plans may begin with a free step, from the mean of the data. Not
        where a host hands its noise straight to the network.
    reduction: of statistics: "element", "channel" or "scalar"; None: per element up to 4,096.
    derivative: of statistics: "forward", "difference" (network calls only), or "auto": forward, or
        differences where the network has no forward-mode derivative. The report says which.
    data: clean samples (count, *shape) for statistics; None: the model's own converged samples.
    candidates: schedules that a search looks at.
    screen: "short" (some ten solvers on six grids) or "all" (every solver on every grid).
    budget: seconds; what does not fit is left out and named in the report. None: all of it.
    resume: a folder for finished parts. A call that was killed goes on from there, and a later one
        may ask for more numbers of evaluations.
    batch: samples per network call. seed: of all noises. device, dtype: of the state.
    """
    _check_arguments(model, methods, noises, budget, batch, candidates)
    values = _values(each, cond or {}, methods)
    for name, value, accepted in (
        ("screen", screen, ("short", "all")),
        ("jacobian", jacobian, ("reverse", "forward", "differences")),
        ("reduction", reduction, (None, "element", "channel", "scalar")),
        ("derivative", derivative, ("auto", "forward", "difference")),
    ):
        if value not in accepted:
            raise ValueError(unknown(name, str(value), [v for v in accepted if v]))
    model = _guided(model, guidance, uncond)
    counts = _counts(nfe)
    shape = tuple(int(n) for n in shape)
    n, m, total = (int(k) * len(values or [0]) for k in np.cumsum(noises))
    pool = cycled(cond or {}, total)
    device = model.device if device is None else torch.device(device)
    known = fingerprint(model, shape, pool, total)
    reduced = _reduction(reduction, shape)
    settings = {
        "jacobian": jacobian,
        "first_step": first_step,
        "reduction": reduced,
        "derivative": derivative,
        "screen": screen,
        "candidates": candidates,
        "batch": batch,
        **({} if each is None else {"each": each}),
    }
    job_text = _described(model, shape, known, pool, noises, seed, dtype, data, settings)
    store = _Store(None if resume is None else Path(resume), job_text)
    counted = Counted(model)
    units = 1 + len(counts) * (1 + len(methods) + (each is not None))
    deadline = math.inf if budget is None else time.monotonic() + budget
    with tqdm(total=units, disable=not progress, unit="part", delay=1) as bar:
        began = time.monotonic()
        bar.set_description("converged samples")
        teacher = _teacher(store, counted, shape, total, pool, seed, batch, device, dtype)
        bar.update()
        train, held = teacher[:n], teacher[n:m]
        job = _Job(
            counted,
            shape,
            train,
            held,
            teacher[m:],
            store,
            seed,
            jacobian,
            first_step,
            reduced,
            derivative,
            screen,
            candidates,
            deadline,
            data,
            each,
            (train[: noises[0]], held[: noises[1]]),
            bar.set_postfix_str,
        )
        found: dict[int, list[_Found]] = {}
        for count in counts:
            bar.set_description(f"NFE {count}: solvers")
            found[count] = store.found(f"solver-{count}", lambda c=count: _solvers(job, c))
            bar.update()
        todo = [(m, c) for m in _IN_TURN if m in methods for c in counts]
        if each is not None:
            todo += [("each", c) for c in counts]
        for i, (method, count) in enumerate(todo):
            bar.set_description(f"NFE {count}: {method}")
            left, share = job.left(), None
            if left is not None:
                share = left * _SHARES[method] / sum(_SHARES[m] for m, _ in todo[i:])
            if left == 0:
                job.skipped.append(f"{method} at NFE {count}")
            else:
                # A part that a budget cut short is not kept: a later call may do better.
                keep = store if share is None else _Store(None, "")
                made = keep.found(
                    f"{method}-{count}",
                    lambda m=method, c=count, s=share: _FITS[m](job, c, found[c], s),
                )
                if method == "learned":
                    job.shorter = made[0].one
                if method == "each":
                    assert each is not None
                    made = [_together(each, values, found[count], made)]
                found[count] += made
            bar.update()
        if any(f.kind == "statistics" for f in found[counts[-1]]):
            _statistics(job)  # from the folder, where plans were
        plans: dict[int, Plan | PlansByValue] = {}
        lines: list[Candidate] = []
        robust: dict[str, dict[str, float]] = {}
        for count in counts:
            chosen, reported = _compared(job, count, found[count])
            plans[count] = chosen.plan
            lines += reported
            if chosen.kind != "solver":
                robust[str(count)] = _robust(job, chosen, found[count])
    teacher_said = (
        f"converged samples: {teacher.nfe} evaluations each, median distance to twice as many "
        f"steps {teacher.error:.2g}"
    )
    info = {
        "network": type(network_of(model)).__name__,
        "teacher": teacher_said,
        "noises": list(noises),
        "seed": seed,
        "evaluations": counted.evaluations,
        "seconds": time.monotonic() - began,
        "skipped": job.skipped,
        "robust": robust,
        "fewstep": __version__,
        "torch": str(torch.__version__),
    }
    return Recipe(
        plans,
        tuple(lines),
        repr(model.process),
        model.prediction.name,
        guidance_of(model),
        shape,
        known,
        job.ems,
        info,
    )


def _check_arguments(
    model: Any,
    methods: Sequence[str],
    noises: tuple[int, int, int],
    budget: float | None,
    batch: int,
    candidates: int,
) -> None:
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    for method in methods:
        if method not in _IN_TURN:
            raise ValueError(unknown("methods", method, _IN_TURN))
    if "bands" in methods and "learned" not in methods:
        raise ValueError(f"methods = {list(methods)}; 'bands' starts from 'learned'")
    if len(noises) != 3 or min(noises) < 2:
        raise ValueError(
            f"noises = {noises}; need three numbers of at least 2: for fits, for the choice, for "
            "the report"
        )
    if budget is not None and not budget > 0:
        raise ValueError(f"budget = {budget}; need seconds > 0, or None")
    for name, value in (("batch", batch), ("candidates", candidates)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} = {value!r}; need an integer >= 1")


def _values(each: str | None, cond: Mapping[str, Any], methods: Sequence[str]) -> list[int | str]:
    """The values that have a plan each."""
    if each is None:
        return []
    if each not in cond:
        raise ValueError(unknown("each", each, cond))
    if "learned" not in methods:
        raise ValueError(f"each = {each!r} goes on from a learned plan; put 'learned' into methods")
    values = list(dict.fromkeys(values_of(each, cond[each])))
    if len(values) < 2:
        raise ValueError(f"each = {each!r}: cond has one value of it, {values[0]!r}; leave it out")
    return values


def _guided(model: Model, guidance: float | None, uncond: Mapping[str, Any] | None) -> Model:
    if guidance is None:
        if uncond is not None:
            raise ValueError("uncond is given without guidance; give both, or a Guided model")
        return model
    if guidance_of(model):
        raise ValueError(f"guidance = {guidance}, but the model has guidance already; leave it out")
    if uncond is None:
        raise ValueError(
            f"guidance = {guidance} needs uncond: the conditions of the unconditional half"
        )
    return Guided(model, guidance, uncond)


def _counts(nfe: int | Sequence[int]) -> list[int]:
    counts = [nfe] if isinstance(nfe, Integral) else list(nfe)  # type: ignore[list-item]
    bad = [n for n in counts if isinstance(n, bool) or not isinstance(n, Integral) or n < 1]
    if bad or not counts:
        raise ValueError(f"nfe = {nfe!r}; need integers >= 1")
    return sorted({int(n) for n in counts})


def _reduction(reduction: str | None, shape: tuple[int, ...]) -> str:
    if reduction is not None:
        return reduction
    if math.prod(shape) <= 4096:
        return "element"
    return "channel" if len(shape) > 1 else "scalar"


def _described(
    model: Model,
    shape: tuple[int, ...],
    known: Mapping[str, Any],
    cond: Mapping[str, Any],
    noises: tuple[int, int, int],
    seed: int,
    dtype: torch.dtype,
    data: Tensor | None,
    settings: Mapping[str, Any],
) -> str:
    """What parts of a calibration depend on, as text."""
    body = {
        "process": repr(model.process),
        "prediction": model.prediction.name,
        "guidance": guidance_of(model),
        "shape": shape,
        "noises": noises,
        "seed": seed,
        "dtype": str(dtype),
        **settings,
        "network, conditions and data": digest(known["values"], cond, data),
    }
    return json.dumps(body, indent=1)


def _teacher(
    store: _Store,
    model: Counted,
    shape: tuple[int, ...],
    count: int,
    cond: Mapping[str, Any],
    seed: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Teacher:
    def make() -> tuple[dict[str, Tensor], Any]:
        made = teach(
            model,
            shape,
            count,
            cond=cond,
            seed=seed,
            batch=batch,
            device=device,
            dtype=dtype,
        )
        if not bool(torch.isfinite(made.samples).all()):
            raise FloatingPointError(
                "the model's converged samples are not finite; look for overflow in half "
                "precision, or a wrong process or prediction (fewstep.diagnose)"
            )
        return {"x": made.x, "samples": made.samples}, (made.error, made.nfe)

    tensors, (error, spent) = store.part("teacher", make)
    x, samples = (tensors[k].to(device) for k in ("x", "samples"))
    return Teacher(model, x, samples, cond, error, spent, batch)


def screened(
    model: Model, nfe: int, which: str = "short"
) -> tuple[list[Plan], list[tuple[str, str, str]]]:
    """The solvers as they are: plans, and their (solver, grid, final). Duplicates and what a
    solver, a grid or this number of evaluations cannot do are left out."""
    plans: list[Plan] = []
    names: list[tuple[str, str, str]] = []
    seen: set[bytes] = set()
    for solver in solvers.values():
        if (
            solver.stochastic
            or solver.adaptive
            or (which == "short" and solver.name not in _SOLVERS)
        ):
            continue
        for grid in grids.values():
            if which == "short" and grid.name not in _GRIDS:
                continue
            for final in ("zero", "min"):
                if which == "short" and final == "min":
                    continue
                try:
                    made = plan(solver, model, nfe, grid=grid, final=final)
                except ValueError:
                    continue
                if made.nfe != nfe or made.given != 1:
                    continue
                key = b"".join(np.round(v, 10).tobytes() for v in _numbers(made))
                if key not in seen:
                    seen.add(key)
                    plans.append(made)
                    names.append((solver.name, grid.name, final))
    return plans, names


def _numbers(run: Plan) -> list[Array]:
    parts = [np.array([(v.alpha, v.sigma) for v in run.levels])]
    for row in run.rows:
        for terms in (row.a, row.b):
            parts += [np.array(list(terms), dtype=float)]
            parts += [np.asarray(c, dtype=float) for c in terms.values()]
    return parts


def _solvers(job: _Job, nfe: int) -> Iterator[_Found]:
    """The best solvers as they are: all on a few held-out noises, the best on all of them."""
    with job.cost() as spent:
        plans, names = screened(job.model, nfe, job.screen)
        if not plans:
            raise ValueError(f"nfe = {nfe}; no solver can spend exactly that")
        held = job.few[1]
        rough = [score(e) for e in shared_errors(held[:32], plans)]
        order = np.argsort(rough, kind="stable")[:24]
        exact = shared_errors(held, [plans[i] for i in order])
        ranked = sorted(range(len(order)), key=lambda k: score(exact[k]))[:8]
    for k in ranked:
        label = called(*names[order[k]])
        yield _Found(label, "solver", plans[order[k]], int(spent[0]), spent[1])


def _learned(
    job: _Job, nfe: int, found: Sequence[_Found], budget: float | None
) -> Iterator[_Found]:
    shorter = [] if job.shorter is None else [job.shorter]
    with job.cost() as spent:
        made = learn(
            *job.few,
            [*_diverse(job, nfe, found), *shorter],
            nfe=nfe,
            jacobian=job.jacobian,
            first_step=job.first_step,
            iterations=_ITERATIONS if job.each is None else _SHARED,
            budget=budget,
            seed=job.seed,
        )
    yield _Found(made.name, "learned", made.plan, int(spent[0]), spent[1])


def _bands(job: _Job, nfe: int, found: Sequence[_Found], budget: float | None) -> Iterator[_Found]:
    """The learned plan with coefficients for every band of directions."""
    (start,) = (f for f in found if f.kind == "learned")
    with job.cost() as spent:
        made = learn(
            *job.few,
            [start.one],
            guards=[f.one for f in found if f.kind == "solver"],
            bands=_BANDS,
            jacobian=job.jacobian,
            first_step=False,
            iterations=_ITERATIONS,
            budget=budget,
            seed=job.seed,
        )
    name = f"{start.name}, {_BANDS} bands"
    yield _Found(name, "bands", made.plan, int(spent[0]), spent[1])


def _each(job: _Job, nfe: int, found: Sequence[_Found], budget: float | None) -> Iterator[_Found]:
    """For every value of a condition, its plan."""
    assert job.each is not None
    of = [values_of(job.each, t.cond[job.each]) for t in (job.train, job.held)]
    values = dict.fromkeys(of[0])
    guards = [f.one for f in found if f.kind == "solver"]
    (start,) = (f.one for f in found if f.kind == "learned")
    program = program_of(start)
    if program.first_step:  # then from the mean of all data to that of the value's
        mean, t = data_mean(job.few[0]), job.model.process.t_start
        start = plan_of(asking(program, mean, t), job.model)
    for value in values:
        index = [[i for i, v in enumerate(its) if v == value] for its in of]
        with job.cost() as spent:
            made = learn(
                job.train[index[0]],
                job.held[index[1]],
                [start],
                guards=guards,
                jacobian=job.jacobian,
                first_step=job.first_step,
                iterations=_EACH,
                budget=None if budget is None else budget / len(values),
                seed=job.seed,
            )
        yield _Found(str(value), "each", made.plan, int(spent[0]), spent[1])


def _together(
    each: str, values: Sequence[int | str], found: Sequence[_Found], made: Sequence[_Found]
) -> _Found:
    """The plans of all values as one line of the report, with the cost of where they are from."""
    plans = {v: f.one for v, f in zip(values, made, strict=True)}
    spent = [*made, *(f for f in found if f.kind == "learned")]
    return _Found(
        f"one plan per {each}",
        "each",
        PlansByValue(each, plans),
        sum(f.evaluations for f in spent),
        sum(f.seconds for f in spent),
    )


def _diverse(job: _Job, nfe: int, found: Sequence[_Found], count: int = 4) -> list[Plan]:
    """The best hand-made plans, no two of the same solver or on the same grid while that lasts."""
    solver = [f for f in found if f.kind == "solver"]
    out: list[_Found] = []
    for wanted in (True, False):
        for f in solver:
            used = {part for g in out for part in g.name.split(" on ")}
            if f not in out and not (wanted and used & set(f.name.split(" on "))):
                out.append(f)
    # Compiled again: what was read from a file does not know what it was compiled from.
    return [as_it_is(job.model, nfe, f.name) for f in out[:count]]


def _compensated(
    job: _Job, nfe: int, found: Sequence[_Found], budget: float | None
) -> Iterator[_Found]:
    made = 0
    for f in found:
        if f.kind != "solver" or made == _COMPENSATED:
            continue
        with job.cost() as spent:
            try:
                fit = fit_ratios(job.few[0], f.one, held_out=job.few[1])
            except ValueError:  # it has no history to compensate with
                continue
        made += 1
        yield _Found(f"{f.name}, ratios", "compensated", fit.plan, int(spent[0]), spent[1])


def _statistics(job: _Job) -> EMS:
    """The model's statistics, made once."""

    def estimated(derivative: str) -> EMS:
        return estimate_ems(
            job.model,
            clean[:count],
            cond=taken(cond, slice(0, count), len(clean)) or None,
            reduction=job.reduction,
            derivative=derivative,
            seed=job.seed,
            batch=min(64, job.train.batch),
            progress=False,
        )

    def make() -> tuple[dict[str, Tensor], Any]:
        how = "forward" if job.derivative == "auto" else job.derivative
        try:
            ems = estimated(how)
        except ValueError as error:
            if job.derivative != "auto" or "derivative = 'difference'" not in str(error):
                raise
            ems = estimated("difference")
        blob = np.frombuffer(ems.to_bytes(), np.uint8).copy()
        return {"ems": torch.from_numpy(blob)}, None

    clean = job.few[0].samples if job.data is None else job.data
    count = min(len(clean), _STATISTICS_SAMPLES) if job.data is None else len(clean)
    cond = job.few[0].cond if job.data is None else cycled(job.train.cond, count)
    if job.ems is None:
        tensors, _ = job.store.part("statistics", make)
        job.ems = EMS.from_bytes(tensors["ems"].numpy().tobytes())
    return job.ems


def _with_statistics(
    job: _Job, nfe: int, found: Sequence[_Found], budget: float | None
) -> Iterator[_Found]:
    with job.cost() as spent:
        ems = _statistics(job)
        plans, names = [], []
        # Averages over all elements are less noisy, and often the better table.
        tables = {"": ems}
        if job.reduction != "scalar":
            tables[", mean"] = ems.reduced("scalar")
        for label, solver in ((k, v) for k, e in tables.items() for v in v3_variants(e)):
            for grid in ("lambda", "softened", "softened_8", "karras", "arctan", "uniform"):
                try:
                    plans.append(plan(solver, job.model, nfe, grid=grid))
                except ValueError:
                    continue
                names.append(f"{solver.name}{label} on {grid}")
        errors = [score(e) for e in shared_errors(job.few[1], plans)]
    best = int(np.argmin(errors))
    yield _Found(names[best], "statistics", plans[best], int(spent[0]), spent[1])


def v3_variants(ems: EMS) -> list[Solver]:
    """DPM-Solver-v3 with these statistics: what its authors use in one setting or another."""
    out: list[Solver] = []
    for order in (2, 3):
        for pseudo in (False, True)[: order - 1]:
            name = f"dpm_solver_v3_{order}" + "_pseudo" * pseudo
            out += [
                dpm_solver_v3(ems, order, pseudo=pseudo, corrector="none", name=name),
                dpm_solver_v3(ems, order, pseudo=pseudo, name=f"{name}_c"),
                dpm_solver_v3(ems, order, pseudo=pseudo, corrector_pseudo=True, name=f"{name}_cp"),
            ]
    return out


def _searched(
    job: _Job, nfe: int, found: Sequence[_Found], budget: float | None
) -> Iterator[_Found]:
    with job.cost() as spent:
        made = search(
            *job.few,
            nfe,
            candidates=job.candidates,
            seconds=budget,
            seed=job.seed,
        )
    yield _Found("staged search", "search", made.plan, int(spent[0]), spent[1])


_FITS: dict[str, Callable[[_Job, int, Sequence[_Found], float | None], Iterator[_Found]]] = {
    "learned": _learned,
    "compensated": _compensated,
    "statistics": _with_statistics,
    "search": _searched,
    "each": _each,
    "bands": _bands,
}


def candidate(nfe: int, name: str, kind: str, test: Array, held: Array, **more: Any) -> Candidate:
    """A line of a report from errors on test and held-out noises."""
    ranked = np.sort(test)
    n = len(ranked)
    reach = 0.98 * math.sqrt(n)  # of ranks around the middle: binomial, 95 %
    low = ranked[max(0, math.floor(n / 2 - reach))]
    high = ranked[min(n - 1, math.ceil(n / 2 + reach))]
    return Candidate(
        nfe,
        name,
        kind,
        float(np.median(test)),
        float(low),
        float(high),
        float(np.sqrt(np.square(test).mean())),
        float(np.quantile(test, 0.9)),
        float(np.median(held)),
        **more,
    )


def _robust(job: _Job, chosen: _Found, found: Sequence[_Found]) -> dict[str, float]:
    """Median error of the plan over that of the best solver as it is, where answers are rounded."""
    plain = {f.name: f.one for f in found if f.kind == "solver"}
    seen = robustness(chosen.plan, plain, job.test[:64], seed=job.seed)
    return {name: r.ratio for name, r in seen.items()}


def _compared(job: _Job, nfe: int, found: Sequence[_Found]) -> tuple[_Found, list[Candidate]]:
    """The plan to keep, and the report."""
    held = [job.held.errors(f.plan) for f in found]
    test = [job.test.errors(f.plan) for f in found]
    scores = [score(e) for e in held]
    plain = min((i for i, f in enumerate(found) if f.kind == "solver"), key=lambda i: scores[i])

    def no_worse(i: int) -> bool:
        rms = [math.sqrt(float(np.square(held[k]).mean())) for k in (i, plain)]
        return float(np.median(held[i])) <= float(np.median(held[plain])) and rms[0] <= rms[1]

    best = min((i for i in range(len(found)) if no_worse(i)), key=lambda i: scores[i])
    lines = [
        candidate(
            nfe,
            f.name,
            f.kind,
            test[i],
            held[i],
            evaluations=f.evaluations,
            seconds=f.seconds,
            chosen=i == best,
        )
        for i, f in enumerate(found)
    ]
    return found[best], lines
