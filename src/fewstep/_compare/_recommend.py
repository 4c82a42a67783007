"""`recommend`: the solver and the grid for a model and a number of evaluations, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .._calibrate._calibrate import screened
from .._calibrate._learn import score
from .._calibrate._recipe import called
from .._calibrate._teacher import shared_errors
from .._denoiser import Model
from .._plan import Plan
from .._prediction import unknown
from .._sampling import DEFAULT_GRID, DEFAULT_SOLVER, plan
from ..metrics import Estimate, error_ratio, error_summary
from ._compare import check_integer, checked, converged, drawn, onward

__all__ = ["Option", "Recommendation", "recommend"]

#: Noises that leave out most, and noises that choose among the rest.
_ROUGH, _EXACT = 32, 128
#: Plans that are chosen among, and runner-ups that are reported.
_KEPT, _SHOWN = 24, 5


class Option(NamedTuple):
    """A solver as it is, beside the recommended one, on the noises of the report.

    median: of its errors. ratio: median over noises of its error over that of the recommended one;
    the two are tied where the interval contains 1.
    """

    solver: str
    grid: str
    final: str
    median: Estimate
    ratio: Estimate

    @property
    def tied(self) -> bool:
        """Whether these noises cannot tell which of the two is better."""
        return self.ratio.low <= 1 <= self.ratio.high

    def __str__(self) -> str:
        return called(self.solver, self.grid, self.final)


@dataclass(frozen=True, eq=False)
class Recommendation:
    """What to use at `nfe` evaluations, and why; `print` says it in sentences.

    solver, grid, final, plan: what to use. median: of its errors. ratio: median over noises of its
        error over that of the default solver.
    runner_ups: the next best where the choice was made, best first. default: the default solver.
    tried: plans that were compared. noises: on which most were left out, on which the choice was
        made, and of the report: all different.
    """

    nfe: int
    solver: str
    grid: str
    final: str
    plan: Plan = field(repr=False)
    median: Estimate
    ratio: Estimate
    runner_ups: tuple[Option, ...]
    default: Option
    tried: int
    noises: tuple[int, int, int]
    shape: tuple[int, ...]

    @property
    def tied(self) -> tuple[Option, ...]:
        """Those of the runner-ups that are not told from it."""
        return tuple(o for o in self.runner_ups if o.tied)

    @property
    def arguments(self) -> dict[str, Any]:
        """For `fewstep.sample` and `fewstep.plan`."""
        more = {} if self.final == "zero" else {"final": self.final}
        return {"solver": self.solver, "nfe": self.nfe, "grid": self.grid, **more}

    @property
    def python(self) -> str:
        """The line of Python that uses it."""
        given = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        size = ", ".join(map(str, (16, *self.shape)))
        return f"fewstep.sample(model, ({size}), {given})"

    @property
    def options(self) -> str:
        """Of the commands `sample`, `generate` and `plan`."""
        final = "" if self.final == "zero" else f" --final {self.final}"
        return f"--solver {self.solver} --grid {self.grid} --nfe {self.nfe}{final}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rough, exact, count = self.noises
        m, r = self.median, self.ratio
        yield f"{called(self.solver, self.grid, self.final)}, {self.nfe} evaluations"
        yield (
            f"Its median error over {count} noises is {m.value:.3g} (95 % interval {m.low:.3g} to "
            f"{m.high:.3g}): root mean square distance to the converged sample from the same noise."
        )
        name = str(self.default)
        if name == called(self.solver, self.grid, self.final):
            yield "It is the default."
        elif self.default.tied:
            yield f"The default, {name}, is tied with it on these noises; you may as well keep it."
        else:
            much = f"{r.value:.3g} times (interval {r.low:.3g} to {r.high:.3g})"
            yield f"Its error is {much} that of the default, {name}, from the same noise."
            if r.low > 1:
                yield "The default is better by this median: weigh the two yourself."
        yield (
            f"It was the best of {self.tried} combinations of solver, grid and end: all ran from "
            f"{rough} noises, the best {min(_KEPT, self.tried)} from {exact} others, on which it "
            f"was chosen by the product of its median and its root mean square error. The {count} "
            "noises of this report chose nothing."
        )
        if self.runner_ups:
            yield "The next best of the choice, and the median over noises of their error over its:"
        width = max([len(str(o)) for o in self.runner_ups], default=0)
        for o in self.runner_ups:
            its = f"{o.ratio.value:.3g} (interval {o.ratio.low:.3g} to {o.ratio.high:.3g})"
            yield f"  {o!s:{width}}  {its}{', tied' * o.tied}"
        yield f"Use it: {self.python}"


def recommend(
    model: Model,
    shape: Sequence[int],
    nfe: int,
    *,
    cond: Mapping[str, Any] | None = None,
    count: int = 256,
    screen: str = "short",
    seed: int = 0,
    batch: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Recommendation:
    """Compare the solvers on a model, and say which one to use, on which grid, and why.

    The measure is the distance to the model's own converged sample from the same noise. Noises that
    choose are other noises than those of the report.

    model: as it will be used: with its guidance, in its dtype. shape: of one sample.
    nfe: network evaluations to spend.
    cond: conditions, one entry per prompt; every sample draws one at random.
    count: noises of the report. screen: "short" (some ten solvers on six grids) or "all" (every
        deterministic solver on every grid, to both ends). seed: of all noises.
    batch: samples per network call. device: of the state.
    """
    size = checked(model, shape, batch)
    check_integer("nfe", nfe, 1)
    check_integer("count", count, 8)
    check_integer("seed", seed, 0)
    if screen not in ("short", "all"):
        raise ValueError(unknown("screen", str(screen), ("short", "all")))
    nfe, count = int(nfe), int(count)
    plans, names = screened(model, nfe, screen)
    if not plans:
        raise ValueError(f"nfe = {nfe}; no solver can spend exactly that")
    try:
        default = plan(DEFAULT_SOLVER, model, nfe)
        usual = (DEFAULT_SOLVER, DEFAULT_GRID, "zero")
    except ValueError:  # a process without an end at sigma = 0
        default = plan(DEFAULT_SOLVER, model, nfe, final="min")
        usual = (DEFAULT_SOLVER, DEFAULT_GRID, "min")
    total = _ROUGH + _EXACT + count
    device = model.device if device is None else torch.device(device)
    _, pool = drawn(cond or {}, total, seed)
    with tqdm(total=total + 2 * len(plans), disable=not progress, delay=1, leave=False) as bar:
        bar.set_description("converged samples")
        teacher = converged(model, size, total, pool, seed, batch, device, onward(bar))
        test, others = teacher[:count], teacher[count:]
        rough, exact = others[:_ROUGH], others[_ROUGH:]
        bar.set_description(f"{len(plans)} plans")
        scores = [score(e) for e in shared_errors(rough, plans, onward(bar))]
        few = np.argsort(scores, kind="stable")[:_KEPT].tolist()
        bar.set_description(f"{len(few)} plans")
        scores = [score(e) for e in shared_errors(exact, [plans[i] for i in few])]
        ranked = [few[k] for k in np.argsort(scores, kind="stable")][: _SHOWN + 1]
        bar.set_description("report")
        errors = shared_errors(test, [*(plans[i] for i in ranked), default])
        bar.update(bar.total - bar.n)
    median = [error_summary(e).median for e in errors]

    def option(k: int, name: tuple[str, str, str]) -> Option:
        return Option(*name, median[k], error_ratio(errors[k], errors[0]))

    solver, grid, final = names[ranked[0]]
    return Recommendation(
        nfe,
        solver,
        grid,
        final,
        plans[ranked[0]],
        median[0],
        error_ratio(errors[0], errors[-1]),
        tuple(option(k, names[i]) for k, i in enumerate(ranked) if k),
        option(len(errors) - 1, usual),
        len(plans),
        (_ROUGH, _EXACT, count),
        size,
    )
