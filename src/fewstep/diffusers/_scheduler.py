"""A diffusers scheduler that runs plans: the host's interface around `Plan.start` and `advance`."""

from __future__ import annotations

import base64
import inspect
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import (
    KarrasDiffusionSchedulers,
    SchedulerMixin,
    SchedulerOutput,
)
from torch import Tensor

from .._calibrate._recipe import Recipe, recipe_from_bytes
from .._denoiser import Denoiser
from .._grids import Grid, as_grid, grids
from .._noise import Noise
from .._plan import Plan, State
from .._prediction import unknown
from .._process import DiscreteVP, Flow, Level, Process
from .._sampling import DEFAULT_GRID, DEFAULT_SOLVER, check_match, plan
from .._solvers._base import Solver
from .._solvers._registry import as_solver, solvers
from ._config import Described, described, spacing

__all__ = ["Scheduler", "StepOutput"]

#: What this class puts into a config beside the entries of the scheduler it was made from.
_OWN = ("solver", "grid", "recipe")
#: Compiled plans that are kept, by what set_timesteps was asked for.
_KEPT = 16


@dataclass
class StepOutput(SchedulerOutput):
    """prev_sample: the state that the network is asked about next, the sample after the last step.
    pred_original_sample: the data prediction of this step."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Scheduler(SchedulerMixin, ConfigMixin):
    """Any fewstep solver as the scheduler of a diffusers pipeline.

        pipe.scheduler = fewstep.diffusers.Scheduler.from_config(pipe.scheduler.config,
                                                                 solver="unipc", grid="softened")

    solver: a name in `fewstep.solvers`, or a `Solver`.
    grid: a name in `fewstep.grids`, a `Grid`, or "config": the spacing that the config asks for.
        Default: "softened_8"; for flow models 1 - i / n, shifted as config and pipeline say.
    recipe: a `Recipe` or its file, instead of solver and grid. A scheduler sees neither the network
        nor the guidance that the recipe was fitted to; process and prediction are checked.

    `num_inference_steps` is the number of network evaluations, whatever the solver; `timesteps`
    has one entry for each. Custom `timesteps` and `sigmas` (sigma / alpha for tables, with or
    without a last 0; t for flows) are used as they are, never shifted or rounded; what a flow
    pipeline passes by itself, 1 - i / n, is the clock before the shift. `num_inference_steps` of a
    recipe must be one that it has a plan for.

    Latents may be edited between steps (callbacks, masks): the run goes on from the edited ones.
    The state is kept in float32 whatever the pipeline computes in. Every thread has its own run, so
    one pipeline object serves many. Noise of stochastic solvers is fewstep's, seeded from the
    `generator` given to `step`. `clip_sample` and `thresholding` of the config act on the data
    prediction.
    """

    config_name = "scheduler_config.json"
    _compatibles: ClassVar[list[str]] = [k.name for k in KarrasDiffusionSchedulers]
    order = 1

    def __init__(
        self,
        solver: str | Solver | None = None,
        grid: str | Grid | None = None,
        recipe: Recipe | str | None = None,
        **config: Any,
    ) -> None:
        if recipe is not None and not (solver is None and grid is None):
            raise ValueError(
                f"solver = {solver!r}, grid = {grid!r} with a recipe; give one of both"
            )
        self._solver = as_solver(DEFAULT_SOLVER if solver is None else solver)
        self._grid: Grid | None = None if grid in (None, "config") else _grid(grid)
        self._recipe = _as_recipe(recipe)
        kept = None
        if self._recipe is not None:
            kept = base64.b64encode(self._recipe.to_bytes()).decode("ascii")
        name = grid.name if isinstance(grid, Grid) else grid
        self.register_to_config(
            **{**config, "solver": None if recipe is not None else self._solver.name},
            grid=name,
            recipe=kept,
        )
        self._plans: dict[Any, Any] = {}
        self._local = threading.local()
        self._latest: _Run | None = None
        self._described()  # refuses now what it cannot do

    @classmethod
    def from_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        config: Mapping[str, Any],
        return_unused_kwargs: bool = False,
        *,
        solver: str | Solver | None = None,
        grid: str | Grid | None = None,
        recipe: Recipe | str | None = None,
        **overrides: Any,
    ) -> Any:
        """A scheduler for the model that a diffusers scheduler config belongs to.

        config: of any scheduler class, this one included. overrides: entries of it to change, for
        example use_karras_sigmas=True.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config = {config!r}; give the config of a scheduler, a mapping")
        base = {k: v for k, v in config.items() if not k.startswith("_")}
        base.setdefault("source", config.get("_class_name", ""))
        for key in overrides:
            if key not in {*base, *_parameters(base["source"])}:
                raise ValueError(unknown("config", key, {*base, *_parameters(base["source"])}))
        if solver is None and grid is None and recipe is None:
            solver, grid, recipe = (base.get(k) for k in _OWN)
        elif recipe is None:
            solver = base.get("solver") if solver is None else solver
            grid = base.get("grid") if grid is None else grid
        base = {k: v for k, v in base.items() if k not in _OWN}
        made = cls(solver, grid, recipe, **{**base, **overrides})
        return (made, {}) if return_unused_kwargs else made

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the config; refused for solvers and grids that have no name to be found by."""
        if solvers.get(self._solver.name) is not self._solver and self._recipe is None:
            raise ValueError(
                f"solver = {self._solver.name!r} is not in fewstep.solvers; a file cannot name it"
            )
        if self._grid is not None and grids.get(self._grid.name) is not self._grid:
            raise ValueError(
                f"grid = {self._grid.name!r} is not in fewstep.grids; a file cannot name it"
            )
        super().save_config(save_directory, push_to_hub, **kwargs)

    # ---------------------------------------------------------------- what pipelines read

    @property
    def timesteps(self) -> Tensor:
        """What the network is told, one entry per evaluation."""
        run = self._current()
        if run is not None:
            return run.timesteps
        n = int(self.config.get("num_train_timesteps", 1000))
        return torch.arange(n - 1, -1, -1)

    @property
    def sigmas(self) -> Tensor:
        """Noise level of every evaluation, and of the end: sigma / alpha, of flows t."""
        return self._require("sigmas").sigmas

    @property
    def num_inference_steps(self) -> int | None:
        """Network evaluations of the run."""
        run = self._current()
        return None if run is None else len(run.timesteps)

    @property
    def plan(self) -> Plan:
        """The plan in use: `print(pipe.scheduler.plan)`."""
        return self._require("plan").part

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run starts from."""
        run = self._current()
        if run is not None:
            return run.whole.prior_std
        process = self._described().process
        return process.prior_std(process.t_start)

    @property
    def step_index(self) -> int | None:
        """Evaluations done, from the first entry of `timesteps` on."""
        run = self._current()
        return None if run is None or run.state is None else (run.begin or 0) + run.state.nfe

    @property
    def begin_index(self) -> int | None:
        """Entry of `timesteps` that the run begins with, once known."""
        run = self._current()
        return None if run is None else run.begin

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_i^2 of a table."""
        process = self._described().process
        if not isinstance(process, DiscreteVP):
            raise AttributeError(f"alphas_cumprod: {process!r} has no table")
        return torch.from_numpy(np.exp(2 * np.asarray(process.log_alphas))).float()

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))

    def __repr__(self) -> str:
        what = f"recipe of {list(self._recipe.plans)}" if self._recipe else self._solver.name
        return f"Scheduler({what}, grid={self.config.get('grid')}, of {self.config.get('source')})"

    # ---------------------------------------------------------------- what pipelines call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Compile the plan of the next run.

        num_inference_steps: network evaluations. timesteps, sigmas: noise levels of the run, kept
        as they are. mu: shift that the pipeline computes from the resolution.
        """
        lists = _numbers("timesteps", timesteps), _numbers("sigmas", sigmas)
        asked = (num_inference_steps, *lists, mu)
        if self._plans.get("config") is not self._internal_dict or len(self._plans) > _KEPT:
            self._plans = {"config": self._internal_dict}  # pipelines may replace it
        found = self._plans.get(asked)
        if found is None:
            known = described(self.config, mu)
            found = self._plans[asked] = known, self._compile(known, num_inference_steps, *lists)
        known, whole = found
        self._local.run = self._latest = _Run(whole, known, device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps` (image to image)."""
        self._require("set_begin_index").start_at(int(begin_index), self._fallback())

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """c_in x: what the network wants to see."""
        run = self._require("scale_model_input")
        if run.state is None and run.begin is None:
            run.start_at(run.find(timestep), self._fallback())
        c_in = run.call.c_in
        return sample if c_in == 1 else sample * c_in

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """The state after the network's answer.

        model_output: (batch, ...), for the scaled sample at this timestep. sample: as returned by
        the step before, or edited. Returns the next sample in the type of this one.
        """
        run = self._require("step")
        if run.state is None:
            if run.begin is None:
                run.start_at(run.find(timestep), self._fallback())
            run.state = run.part.start(sample, noise=_noise(run.part, generator))
        elif run.state.done:
            raise ValueError(
                f"step: all {run.part.nfe} evaluations of this run are done; call set_timesteps"
            )
        else:
            run.state = run.taken(sample)
        run.check(timestep)
        if run.known.learned and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        before, hook = run.state, run.known.hook
        run.state = before.advance(model_output, hook)
        previous = run.hand(sample.dtype)
        if not return_dict:
            return (previous,)
        denoised = before.data(model_output)
        if hook is not None:
            denoised = hook(denoised, before.plan.asked(before.index))
        return StepOutput(previous, denoised.to(sample.dtype))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma eps at the levels of these timesteps, one per sample or one for all."""
        run = self._current()
        known = run.known if run is not None else self._described()
        told = torch.as_tensor(timesteps).reshape(-1).tolist()
        levels = [_level(known, run, t) for t in told]
        shape = (-1, *(1 for _ in original_samples.shape[1:]))
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        alpha, sigma = (
            torch.tensor([getattr(v, name) for v in levels], dtype=wide)
            .to(original_samples.device)
            .reshape(shape)
            for name in ("alpha", "sigma")
        )
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """`add_noise` as flow pipelines call it."""
        if noise is None:
            raise ValueError("noise is missing; give standard normal noise of the sample's shape")
        return self.add_noise(sample, noise, timestep)

    # ---------------------------------------------------------------- inside

    def _described(self) -> Described:
        """What the config says, before a shift is known."""
        return described(self.config, 1.0 if self.config.get("use_dynamic_shifting") else None)

    def _fallback(self) -> Grid:
        return as_grid(DEFAULT_GRID) if self._grid is None else self._grid

    def _compile(
        self,
        known: Described,
        nfe: int | None,
        timesteps: tuple[float, ...] | None,
        sigmas: tuple[float, ...] | None,
    ) -> Plan:
        if timesteps is not None and sigmas is not None:
            raise ValueError("timesteps and sigmas are both given; give one")
        given = timesteps or sigmas
        if given is not None and nfe not in (None, len(given), len(given) - (given[-1] == 0)):
            raise ValueError(
                f"num_inference_steps = {nfe} with a list of {len(given)} levels; leave it out"
            )
        process, clock = known.process, self.config.get("grid") != "config"
        if sigmas is not None:
            if not (isinstance(process, Flow) and _uniform(sigmas)):
                return self._listed(known, *_nodes(process, np.array(sigmas)))
            nfe, clock = len(sigmas), True
        if timesteps is not None:
            nodes = [known.time_of(t) for t in timesteps]
            return self._listed(known, process, [*nodes, _end(known, process, nodes[-1])])
        if nfe is None:
            raise ValueError("num_inference_steps is missing; give the number of evaluations")
        if self._recipe is not None:
            return self._from_recipe(known, nfe)
        grid = self._grid
        if self.config.get("grid") == "config" or (grid is None and isinstance(process, Flow)):
            grid = spacing(self.config, process, clock)
        grid = as_grid(DEFAULT_GRID) if grid is None else grid
        if isinstance(process, Flow):  # a shift < 1 puts nodes below the default end
            process = replace(process, t_end=min(process.t_end, float(process.warp(1e-3))))
        return plan(
            self._solver, process, nfe, grid=grid, final=known.final, predicts=known.prediction
        )

    def _listed(self, known: Described, process: Process, nodes: Sequence[float]) -> Plan:
        """The plan on these nodes, every step a full one."""
        if self._recipe is not None:
            raise ValueError("timesteps, sigmas: a recipe has its own; leave them out")
        whole = all(t == round(t) for t in nodes[:-1])
        if isinstance(process, DiscreteVP) and not whole:
            process = replace(process, integer_times=False)
        if isinstance(process, Flow):
            process = replace(process, t_end=min(process.t_end, nodes[-2]))
        return plan(self._solver, process, grid=list(nodes), predicts=known.prediction)

    def _from_recipe(self, known: Described, nfe: int) -> Plan:
        assert self._recipe is not None
        if nfe not in self._recipe.plans:
            have = ", ".join(map(str, self._recipe.nfes))
            raise ValueError(f"num_inference_steps = {nfe}; this recipe has plans for {have}")
        run = self._recipe.one(nfe)
        if run.calls[0] is None:
            raise ValueError(
                f"num_inference_steps = {nfe}: the recipe's plan begins with a step without the "
                "network, which a pipeline cannot take; calibrate with first_step=False"
            )
        check_match(run, Denoiser(_unused, known.process, known.prediction))
        return run

    def _current(self) -> _Run | None:
        """This thread's run; one that another thread prepared is copied, never shared."""
        run = getattr(self._local, "run", None)
        if run is None and self._latest is not None:
            run = self._local.run = self._latest.fresh()
        return run

    def _require(self, what: str) -> _Run:
        run = self._current()
        if run is None:
            raise ValueError(f"{what}: there is no run yet; call set_timesteps first")
        return run

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_plans", "_local", "_latest")}
        for key, known in (("_solver", solvers), ("_grid", grids)):  # by name, where it has one
            name = str(getattr(state[key], "name", ""))
            state[key] = name if known.get(name) is state[key] is not None else state[key]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._solver = as_solver(self._solver)
        self._grid = None if self._grid is None else as_grid(self._grid)
        self._plans, self._local, self._latest = {}, threading.local(), None


class _Run:
    """One run of one thread: the only thing here that changes, because the host demands it.

    whole: the plan of all timesteps. part: the plan from `begin` on, which is what runs.
    """

    def __init__(self, whole: Plan, known: Described, device: torch.device | str | None) -> None:
        self.whole = self.part = whole
        self.known = known
        self.begin: int | None = None
        self.state: State | None = None
        self._handed: weakref.ref[Tensor] | None = None
        self._version = -1
        told = [call.c_noise for call in whole.calls if call is not None]
        self._told = list(map(float, told))
        kind = torch.int64 if whole.integer_times else torch.float32
        self.timesteps = torch.tensor(self._told, dtype=kind, device=device)
        flow = isinstance(known.process, Flow)
        levels = (*whole.evaluations, whole.levels[-1])
        self.sigmas = torch.tensor([v.sigma if flow else v.rho for v in levels])

    def fresh(self) -> _Run:
        """The same schedule with nothing run yet."""
        return _Run(self.whole, self.known, self.timesteps.device)

    @property
    def call(self) -> Any:
        """The evaluation that is next."""
        if self.state is not None:
            return self.part.calls[self.state.index]
        return next(c for c in self.part.calls if c is not None)

    def find(self, timestep: Any) -> int:
        """Where in `timesteps` this one is (its first place)."""
        if timestep is None:
            return 0
        value = float(timestep)
        near = [abs(value - t) <= 1e-6 * max(1.0, abs(t)) for t in self._told]
        if not any(near):
            have = ", ".join(f"{t:g}" for t in self._told)
            raise ValueError(f"timestep = {value:g} is not one of this run's: {have}")
        return near.index(True)

    def start_at(self, begin: int, fallback: Grid) -> None:
        """Run from this entry on: the same nodes where steps begin there, a new plan with as many
        evaluations where the entry is inside a step (the times after it then change)."""
        if not 0 <= begin < len(self._told):
            raise ValueError(f"begin_index = {begin}; need 0 to {len(self._told) - 1}")
        self.begin, self.state = begin, None
        self.part = self.whole if begin == 0 else self._tail(begin, fallback)
        told = [float(c.c_noise) for c in self.part.calls if c is not None]
        if told != self._told[begin:]:
            self._told[begin:] = told
            # Pipelines hold a slice of this tensor, so it is changed in place.
            self.timesteps[begin:] = torch.tensor(told, dtype=self.timesteps.dtype)

    def _tail(self, begin: int, fallback: Grid) -> Plan:
        origin, nfe = self.whole.origin, len(self._told) - begin
        if origin is None:
            raise ValueError(
                f"begin_index = {begin}: the plans of a recipe start from noise; use a solver"
            )
        t = self.whole.evaluations[begin].t
        process = origin.process
        after = [s for s in origin.times if process.lam(s) > process.lam(t)]
        if not after and process.t_clean is not None:  # a last stage, where the run would end
            after = [process.t_clean]
        if t in origin.times:
            try:
                return replace(origin, nfe=nfe, times=(t, *after))()
            except ValueError as error:
                if not str(error).startswith("nfe"):
                    raise
        final = "zero" if self.whole.levels[-1].sigma == 0 else "min"
        return plan(
            origin.solver,
            process,
            nfe,
            grid=fallback,
            final=final,
            start=t,
            predicts=origin.prediction,
        )

    def check(self, timestep: Any) -> None:
        """A step at another time than the plan's would be silently wrong; looking at a number on a
        device would stall it, so only numbers on the host are looked at."""
        if isinstance(timestep, Tensor) and (
            timestep.device.type != "cpu" or timestep.numel() != 1
        ):
            return
        assert self.state is not None
        want, have = float(self.call.c_noise), float(timestep)
        if abs(want - have) > 1e-3 * max(1.0, abs(want)):
            raise ValueError(
                f"timestep = {have:g}, but the run is at {want:g}; steps are taken in the order of "
                "timesteps, each once (set_timesteps begins anew)"
            )

    def hand(self, dtype: torch.dtype) -> Tensor:
        """The newest state for the pipeline."""
        assert self.state is not None
        x = self.state.x.to(dtype)
        if x is self.state.x and len(self.state.states) > 1:  # what is done to it must be seen
            x = x.clone()
        self._handed = weakref.ref(x)
        self._version = -1 if x.is_inference() else x._version
        return x

    def taken(self, sample: Tensor) -> State:
        """The state with what the pipeline made of it: itself, or an edit."""
        state = self.state
        assert state is not None
        mine = None if self._handed is None else self._handed()
        if sample is mine and self._version >= 0 and sample._version == self._version:
            return state
        if sample is state.x:  # edited in place, if at all
            return state
        x = sample
        if sample.dtype != state.x.dtype:  # what was not edited keeps its full precision
            x = torch.where(state.x.to(sample.dtype) == sample, state.x, sample.to(state.x.dtype))
        return state.edited(x)


def _parameters(name: str) -> Iterable[str]:
    """Entries that the config of a diffusers scheduler class may have."""
    for each in (name, "DPMSolverMultistepScheduler"):
        yield from inspect.signature(getattr(diffusers, each, object)).parameters


def _unused(*_: Any) -> Tensor:
    raise AssertionError("the network of a scheduler is the pipeline's")


def _grid(grid: str | Grid) -> Grid:
    if isinstance(grid, str) and grid not in grids:
        raise ValueError(unknown("grid", grid, {*grids, "config"}))
    return as_grid(grid)


def _as_recipe(recipe: Any) -> Recipe | None:
    """A recipe, from its file, or from the text in a config."""
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    text = str(recipe)
    if len(text) > 4096:  # longer than any path: the text of a saved config
        try:
            return recipe_from_bytes(base64.b64decode(text, validate=True))
        except ValueError as error:
            raise ValueError(f"recipe: the text in the config {error}") from None
    return Recipe.load(text)


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    given = values.detach().cpu() if isinstance(values, Tensor) else values
    array = np.asarray(given, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} = {values!r}; need a list of finite numbers")
    return tuple(array.tolist())


def _uniform(values: Sequence[float]) -> bool:
    """Whether these are 1 - i / n, what flow pipelines pass when the user gave nothing."""
    n = len(values)
    return bool(np.allclose(values, 1 - np.arange(n) / n, rtol=0, atol=1e-6))


def _end(known: Described, process: Process, last: float) -> float:
    """Where a list of times goes on to after its last evaluation."""
    early = known.final == "min" and process.lam(last) < process.lam(process.t_end)
    if early or process.t_clean is None:
        return process.t_end
    return process.t_clean


def _nodes(process: Process, sigmas: np.ndarray) -> tuple[Process, list[float]]:
    """Times of a list of noise levels, with the end. A level within 1 % beyond an end of the
    process is that end: published lists are rounded."""
    values = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    clean = process.t_end if process.t_clean is None else process.t_clean
    if isinstance(process, Flow):
        return process, [*values.tolist(), clean]
    if not (values > 0).all():
        raise ValueError(f"sigmas = {sigmas.tolist()}; need falling positive numbers, 0 only last")
    if isinstance(process, DiscreteVP):
        process = replace(process, integer_times=False)
    ends = process.lam([process.t_start, process.t_end])
    lam = -np.log(values)
    inside = np.clip(lam, *ends)
    if (np.abs(lam - inside) > 0.01).any():
        bad, (high, low) = values[np.abs(lam - inside).argmax()], np.exp(-ends)
        raise ValueError(f"sigmas: {bad:g} is outside the range of the model, {high:g} to {low:g}")
    times = [float(t) for t in process.time(inside)]
    return process, [*times, clean]


def _level(known: Described, run: _Run | None, told: float) -> Level:
    """The level of a timestep: exactly that of the run's evaluation, if it is one of them."""
    if run is not None:
        for level, t in zip(run.part.evaluations, run._told[run.begin or 0 :], strict=True):
            if abs(t - told) <= 1e-6 * max(1.0, abs(t)):
                return level
    return known.process.level(known.time_of(float(told)))


def _noise(run: Plan, generator: Any) -> Noise | int:
    """Seeds for the draws of a run, one number from each generator."""
    if not run.draws:
        return 0

    def seed(g: torch.Generator | None) -> int:
        device = "cpu" if g is None else g.device
        return int(torch.randint(2**62, (1,), generator=g, device=device))

    if isinstance(generator, (list, tuple)):
        return Noise([seed(g) for g in generator])
    return Noise(seed(generator))
